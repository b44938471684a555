"""The Hetero-Center loss (paper, section 3.3) and its sum with cross-entropy over the stripes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DISTANCES = {  # of two (..., dim) tensors of centers -> (...)
    "l2": lambda a, b: (a - b).pow(2).sum(-1),  # the squared Euclidean distance
    "l1": lambda a, b: (a - b).abs().mean(-1),  # the mean, not the sum, over dimensions
    "cos": lambda a, b: 1 - F.cosine_similarity(a, b, dim=-1),
}


class HeteroCenterLoss(nn.Module):
    """Pulls together the visible and the thermal feature center of each person of a batch.

        L_HC = sum over persons of max(0, d(visible center, thermal center) - margin)

    Args:
        margin: distance up to which a person's centers are left alone (``--thd``).
        dist_type: d, one of "l2", "l1", "cos" (``--dist-type``).
    """

    def __init__(self, margin: float = 0.0, dist_type: str = "l2"):
        super().__init__()
        if dist_type not in DISTANCES:
            raise ValueError(f"dist_type is {dist_type!r}: give one of {', '.join(DISTANCES)}")
        self.margin = margin
        self.distance = DISTANCES[dist_type]

    def forward(self, visible: Tensor, thermal: Tensor, visible_labels: Tensor, thermal_labels: Tensor) -> Tensor:
        """A scalar, zero with a graph when every person is within the margin, NaN when a feature is (FIDELITY 18).

        Args:
            visible, thermal: (..., N, dim) and (..., M, dim) features, rows in any order (FIDELITY 19). With leading
                dimensions, for the stripes, the result has them too.
            visible_labels, thermal_labels: (N,) and (M,) integers naming each row's person.

        Raises:
            ValueError: the two modalities do not show the same persons. Labels on a GPU are not looked at, which would
                make the program wait for it: there the result is NaN or lacks the persons without visible rows.
        """
        if not visible_labels.is_cuda and {*visible_labels.tolist()} != {*thermal_labels.tolist()}:
            raise ValueError(
                "the Hetero-Center loss needs the same persons in both modalities, not "
                f"{sorted({*visible_labels.tolist()})} visible and {sorted({*thermal_labels.tolist()})} thermal"
            )
        # Row i holds the centers of the person of visible row i: the number of persons, which only the labels know, is
        # then no shape. A person of k rows stands there k times, so each counts a k-th.
        same_visible, same_thermal = ((visible_labels[:, None] == labels).to(visible)  # (N, N) and (N, M)
                                      for labels in (visible_labels, thermal_labels))  # fmt: skip
        rows = same_visible.sum(1)  # (N,) visible rows of the person of each row
        visible_centers = same_visible @ visible / rows[:, None]
        thermal_centers = same_thermal @ thermal / same_thermal.sum(1, keepdim=True)
        beyond = F.relu(self.distance(visible_centers, thermal_centers) - self.margin)
        return (beyond / rows).sum(-1)


def stripe_losses(
    logits: list[Tensor], feats: list[Tensor], visible_labels: Tensor, thermal_labels: Tensor, hc_loss: HeteroCenterLoss
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and Hetero-Center loss of every stripe, two (stripes,) tensors.

    A step minimises ``(ce + w_hc * hc).sum()``; the loss that the logs report is the mean over stripes of the same.

    Args:
        logits: a (N + M, n_class) tensor per stripe, the N visible rows first.
        feats: a (N + M, dim) tensor of L2-normalised features per stripe, rows likewise.
        visible_labels, thermal_labels: (N,) and (M,) classes.
    """
    logits, feats = torch.stack(logits), torch.stack(feats)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # from half precision
    labels, n = torch.cat([visible_labels, thermal_labels]), len(visible_labels)
    ce = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)), reduction="none").view(len(logits), -1)
    return ce.mean(1), hc_loss(feats[:, :n], feats[:, n:], visible_labels, thermal_labels)
