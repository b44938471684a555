"""The network and its features, each part against something simpler."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import small_net

import model
from model import EmbedNet, extract_features, load_network, stripe_window
from utils import InputError, load_checkpoint, save_checkpoint


def test_a_new_network_has_the_original_initialisation():
    net = small_net(200, low_dim=256)
    visible = net.visible_net["visible"]
    thermal = net.thermal_net["thermal"]
    for parameter, other in zip(visible.parameters(), thermal.parameters(), strict=True):
        assert torch.equal(parameter, other)  # they start alike
        assert parameter.data_ptr() != other.data_ptr()  # and are not shared
    linear, norm = net.feature3.feat_block
    classifier = net.classifier3.classifier[1]
    assert linear.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.02)  # Kaiming
    assert norm.weight.mean().item() == pytest.approx(1, rel=0.01)
    assert norm.weight.std().item() == pytest.approx(0.01, rel=0.2)
    assert classifier.weight.std().item() == pytest.approx(0.001, rel=0.02)
    for layer in (linear, norm, classifier):
        assert not layer.bias.any()


def test_both_backbones_start_from_a_file(tmp_path):
    resnet = torchvision.models.resnet18(weights=None)
    file = tmp_path / "resnet18.pth"
    torch.save(resnet.state_dict(), file)
    net = EmbedNet(3, arch="resnet18", pretrained=str(file))
    expected = resnet.layer3[0].conv1.weight
    assert torch.equal(net.visible_net["visible"].layer3[0].conv1.weight, expected)
    assert torch.equal(net.thermal_net["thermal"].layer3[0].conv1.weight, expected)
    with pytest.raises(InputError, match=r"resnet18\.pth .*resnet50 weights"):
        EmbedNet(3, arch="resnet50", pretrained=str(file))


def test_a_backbone_brings_its_own_pretrained_weights(monkeypatch):
    """Of one that torchvision does not know, nothing else has to be changed."""

    def weights() -> dict[str, torch.Tensor]:
        return {"weight": torch.full((4, 3, 16, 16), 0.5), "bias": torch.zeros(4)}

    backbone = model.Backbone(lambda: torch.nn.Conv2d(3, 4, 16, 16), 4, weights)
    monkeypatch.setitem(model.BACKBONES, "patches", backbone)
    net = EmbedNet(3, 8, arch="patches")
    assert (net.thermal_net["thermal"].weight == 0.5).all()
    assert net.eval()(visible=torch.ones(2, 3, 96, 16))[0].shape == (2, 6 * 4)


def test_heads_and_classifiers_can_be_replaced():
    net = small_net().train()
    net.feature2 = torch.nn.Linear(512, 8)
    net.classifier5 = torch.nn.Linear(8, 3)
    with torch.no_grad():
        net.classifier5.weight.zero_()
        net.classifier5.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    logits, feats = net(torch.randn(2, 3, 96, 32), torch.randn(2, 3, 96, 32))
    assert logits[4].tolist() == [[1, 2, 3]] * 4
    assert len(feats) == 6
    net.eval()
    images = torch.randn(1, 3, 96, 32)
    _, fc = net(visible=images)
    stripes = model.pool_stripes(net.feature_maps(visible=images), 6)
    torch.testing.assert_close(fc[:, 8:16], F.normalize(net.feature2(stripes[1])))


def test_a_network_is_read_from_its_checkpoint_with_any_number_of_stripes(tmp_path):
    net = small_net(num_parts=4).eval()
    state = {"net": net.state_dict(), "epoch": 1}
    config = {"n_class": 3, "low_dim": 8, "drop": 0.0, "arch": "resnet18", "num_parts": 4}
    images = torch.randn(1, 3, 64, 32)
    for checkpoint in (state, state | {"config": config}):  # without it, the weights tell
        path = str(tmp_path / "checkpoint.t")
        save_checkpoint(path, checkpoint)
        loaded = load_network(load_checkpoint(path), path).eval()
        torch.testing.assert_close(loaded(visible=images), net(visible=images))


def test_other_numbers_of_stripes():
    net = small_net(num_parts=4).eval()
    assert net(torch.randn(1, 3, 49, 32))[1].shape == (1, 8 * 4)
    with pytest.raises(InputError, match="--img-h must be 49"):
        net(torch.randn(1, 3, 48, 32))


def test_a_network_without_images_is_an_error():
    with pytest.raises(InputError, match="nothing to embed"):
        small_net().eval()()


def test_features_are_normalised_without_an_epsilon():
    tiny = 1e-15 * torch.randn(4, 8, dtype=torch.float64)
    lengths = model.l2_normalise(tiny).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("rows", "height", "stride"), [(6, 1, 1), (7, 2, 1), (11, 6, 1), (18, 3, 3), (20, 5, 3)]
)
def test_stripes_overlap_where_six_does_not_divide_the_rows(rows, height, stride):
    """The original pooling: windows of H - 5 s rows, moved by s = H // 6 (FIDELITY 20)."""
    assert stripe_window(rows) == (height, stride)
    maps = torch.randn(2, 5, rows, 3, dtype=torch.float64)
    expected = F.avg_pool2d(maps, kernel_size=(height, 3), stride=(stride, 3))
    stripes = torch.stack(model.pool_stripes(maps, 6), dim=2)
    torch.testing.assert_close(stripes, expected[..., 0], rtol=0, atol=1e-12)


def test_features_come_in_the_order_of_the_images():
    """With --flip: the mean with those of the mirror image, each stripe of length 1 again."""
    net = small_net()
    images = torch.randn(5, 3, 96, 32)
    batches = []
    for indices in ([4, 1], [0, 2, 3]):
        batches.append(("thermal", np.array(indices), images[indices]))
    features = extract_features(net, batches, 5)
    flipped = extract_features(net, batches, 5, kinds=("fc",), flip=True)
    assert net.training
    assert list(flipped) == ["fc"]
    mirrored = torch.from_numpy(images.numpy()[..., ::-1].copy())
    with torch.no_grad():
        pool5, fc = net.eval()(thermal=images)
        _, mirrored_fc = net(thermal=mirrored)
    stripes = (fc + mirrored_fc).view(5, 6, 8)
    stripes = stripes / stripes.norm(dim=2, keepdim=True)
    np.testing.assert_allclose(features["pool5"], pool5, atol=1e-5)
    np.testing.assert_allclose(features["fc"], fc, atol=1e-5)
    np.testing.assert_allclose(flipped["fc"], stripes.flatten(1), atol=1e-5)
