"""The loss: hand-worked cases, and a further term."""

import pytest
import torch
import torch.nn.functional as F

from loss import Criterion, HeteroCenterLoss, person_centers


def test_loss_by_hand_with_unequal_numbers_of_rows():
    visible = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]])
    visible_labels = torch.tensor([4, 4, 9])
    thermal = torch.tensor([[0.0, 4.0], [2.0, 1.0]])
    thermal_labels = torch.tensor([9, 4])
    stripes = torch.stack([visible, 2 * visible])
    centers = person_centers(stripes, visible_labels, torch.tensor([9, 4]))
    assert centers.tolist() == [[[0, 5], [2, 0]], [[0, 10], [4, 0]]]
    value = HeteroCenterLoss(0.25)(visible, thermal, visible_labels, thermal_labels)
    assert value.item() == pytest.approx((1 - 0.25) + (1 - 0.25))


def test_nan_features_and_persons_of_one_modality_give_nan():
    x = torch.randn(4, 3)
    labels = torch.tensor([0, 0, 1, 1])
    assert HeteroCenterLoss()(x * torch.nan, x, labels, labels).isnan()
    # A person without infrared rows has no center.
    assert HeteroCenterLoss()(x, x, labels, labels + 1).isnan()
    assert HeteroCenterLoss()(x, x, labels, torch.zeros(4, dtype=int)).isnan()


def inputs() -> tuple[torch.Tensor, ...]:
    """Logits and features of three stripes, four visible rows and two thermal ones; labels."""
    torch.manual_seed(0)
    logits = torch.randn(3, 6, 5)
    feats = torch.randn(3, 6, 7)
    return logits, feats, torch.tensor([0, 0, 3, 3]), torch.tensor([3, 0])


@pytest.mark.parametrize("world_size", [1, 4])
def test_criterion_is_the_formula_stripe_by_stripe(world_size):
    logits, feats, visible_labels, thermal_labels = inputs()
    criterion = Criterion(0.6, margin=0.1, dist_type="l1", world_size=world_size)
    losses = criterion(logits, feats, visible_labels, thermal_labels)
    labels = torch.tensor([0, 0, 3, 3, 3, 0])
    hetero_center = HeteroCenterLoss(0.1, "l1")
    for stripe in range(3):
        ce = F.cross_entropy(logits[stripe], labels)
        hc = hetero_center(feats[stripe, :4], feats[stripe, 4:], visible_labels, thermal_labels)
        hc = world_size * hc
        torch.testing.assert_close(losses["CE"][stripe], ce)
        torch.testing.assert_close(losses["HC"][stripe], hc)
        torch.testing.assert_close(losses["loss"][stripe], ce + 0.6 * hc)


def test_a_weight_of_zero_leaves_the_term_out():
    logits, feats, visible_labels, thermal_labels = inputs()
    losses = Criterion(0.0)(logits, feats * torch.inf, visible_labels, thermal_labels)
    assert losses["HC"].isnan().all()
    assert torch.equal(losses["loss"], losses["CE"])
