"""The Hetero-Center loss (paper, section 3.3) and its sum with cross-entropy over the stripes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DISTANCES = {  # of two (persons, dim) tensors of centers -> (persons,)
    "l2": lambda a, b: (a - b).pow(2).sum(1),  # the squared Euclidean distance
    "l1": lambda a, b: (a - b).abs().mean(1),  # the mean, not the sum, over dimensions
    "cos": lambda a, b: 1 - F.cosine_similarity(a, b, dim=1),
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
            visible, thermal: (N, dim) and (M, dim) features, rows in any order (FIDELITY 19).
            visible_labels, thermal_labels: (N,) and (M,) integers naming each row's person.

        Raises:
            ValueError: the two modalities do not show the same persons.
        """
        visible_persons, visible_centers = _centers(visible, visible_labels)
        thermal_persons, thermal_centers = _centers(thermal, thermal_labels)
        if not torch.equal(visible_persons, thermal_persons):
            raise ValueError(
                "the Hetero-Center loss needs the same persons in both modalities, "
                f"not {visible_persons.tolist()} visible and {thermal_persons.tolist()} thermal"
            )
        return F.relu(self.distance(visible_centers, thermal_centers) - self.margin).sum()


def _centers(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct labels, ascending (P,), and the mean feature of each (P, dim)."""
    persons, row_of, counts = labels.unique(return_inverse=True, return_counts=True)
    members = F.one_hot(row_of, len(persons)).to(features)  # (N, P): a product with it sums each person's rows
    return persons, members.T @ features / counts[:, None]


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
    labels, n = torch.cat([visible_labels, thermal_labels]), len(visible_labels)
    ce = torch.stack([F.cross_entropy(stripe, labels) for stripe in logits])
    hc = torch.stack([hc_loss(stripe[:n], stripe[n:], visible_labels, thermal_labels) for stripe in feats])
    return ce, hc
