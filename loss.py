"""The loss: cross-entropy plus the Hetero-Center loss, for each stripe (paper, section 3.3)."""

# "FIDELITY n" in docstrings and comments is row n of docs/FIDELITY.md.

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def l2_distance(a: Tensor, b: Tensor) -> Tensor:
    """(..., dim), (..., dim) -> (...): the squared Euclidean distance, as in the original code."""
    return (a - b).pow(2).sum(-1)


def l1_distance(a: Tensor, b: Tensor) -> Tensor:
    """(..., dim), (..., dim) -> (...): the mean absolute difference, as in the original code.

    It is a mean where l2 is a sum, so that it needs a larger --w-hc.
    """
    return (a - b).abs().mean(-1)


def cos_distance(a: Tensor, b: Tensor) -> Tensor:
    """(..., dim), (..., dim) -> (...): 1 minus the cosine similarity."""
    return 1 - F.cosine_similarity(a, b, dim=-1)


CENTER_DISTANCES = {"l2": l2_distance, "l1": l1_distance, "cos": cos_distance}


def person_centers(feats: Tensor, labels: Tensor, persons: Tensor) -> Tensor:
    """Return the mean feature of each of some persons.

    Args:
        feats: (..., N, dim).
        labels: (N,) the person of each row.
        persons: (P,) labels; a person who occurs twice gets two equal centers.

    Returns:
        (..., P, dim), a center for each entry of ``persons``; NaN for a person without rows.
    """
    is_of_person = (persons[:, None] == labels).to(feats)  # (P, N)
    return is_of_person @ feats / is_of_person.sum(1, keepdim=True)


class HeteroCenterLoss(nn.Module):
    """The sum over the persons of a batch of max(0, d(visible center, thermal center) - margin).

    Args:
        margin: distance up to which two centers cost nothing.
        dist_type: d, a key of `CENTER_DISTANCES`.
    """

    def __init__(self, margin: float = 0.0, dist_type: str = "l2"):
        super().__init__()
        self.margin = margin
        self.distance = CENTER_DISTANCES[dist_type]

    def forward(
        self, visible: Tensor, thermal: Tensor, visible_labels: Tensor, thermal_labels: Tensor
    ) -> Tensor:
        """Return the loss, one value for each leading index.

        Args:
            visible, thermal: (..., N, dim) and (..., M, dim) features.
            visible_labels, thermal_labels: (N,) and (M,), the same persons in any order: rows are
                grouped by label (FIDELITY 19).

        Returns:
            (...); NaN if a person has visible rows only. A person with thermal rows only does not
            count.
        """
        # A person with k visible rows gets k equal centers. torch.unique would find the distinct
        # persons, but it would make the program wait for the GPU.
        visible_centers = person_centers(visible, visible_labels, visible_labels)
        thermal_centers = person_centers(thermal, thermal_labels, visible_labels)
        distance = self.distance(visible_centers, thermal_centers)  # (..., N)
        # relu keeps NaN, and its 0 within the margin can still be back-propagated (FIDELITY 18).
        beyond_margin = F.relu(distance - self.margin)
        # Each of a person's k rows counts for 1 / k: this is a sum over persons.
        n_rows_of_person = (visible_labels[:, None] == visible_labels).sum(1)  # (N,)
        return (beyond_margin / n_rows_of_person).sum(-1)


class Criterion(nn.Module):
    """Cross-entropy plus ``w_hc`` times the Hetero-Center loss, for each stripe.

    To add a term, add it to ``loss`` and return it under its own name, one value for each stripe.
    It must have no parameters of its own: nothing would train or save them. On several GPUs a sum
    over persons needs the factor ``world_size``, a mean needs nothing.

    Args:
        w_hc: weight of the Hetero-Center loss.
        margin, dist_type: as `HeteroCenterLoss` takes them.
        world_size: number of processes that share a batch.
    """

    def __init__(
        self, w_hc: float, margin: float = 0.0, dist_type: str = "l2", world_size: int = 1
    ):
        super().__init__()
        self.w_hc = w_hc
        self.hetero_center = HeteroCenterLoss(margin, dist_type)
        self.world_size = world_size

    def forward(
        self, logits: Tensor, feats: Tensor, visible_labels: Tensor, thermal_labels: Tensor
    ) -> dict[str, Tensor]:
        """Return the losses of each stripe by name.

        Args:
            logits: (S, N + M, n_class) of S stripes, N visible rows and then M thermal ones.
            feats: (S, N + M, dim).
            visible_labels, thermal_labels: (N,) and (M,).

        Returns:
            {"loss": what is minimised, "CE": cross-entropy, "HC": Hetero-Center loss}, (S,) each.
            Averaged over the processes, they are the losses of the whole batch.
        """
        labels = torch.cat([visible_labels, thermal_labels])
        visible, thermal = feats.split([len(visible_labels), len(thermal_labels)], dim=1)

        ce = torch.stack([F.cross_entropy(stripe_logits, labels) for stripe_logits in logits])
        hc = self.hetero_center(visible, thermal, visible_labels, thermal_labels)
        # DDP averages gradients over the processes. This loss is a sum over persons, and each
        # process has its own persons: it must add up instead (FIDELITY 10).
        hc = self.world_size * hc

        loss = ce
        if self.w_hc:  # 0 * inf would be NaN
            loss = loss + self.w_hc * hc
        return {"loss": loss, "CE": ce, "HC": hc}
