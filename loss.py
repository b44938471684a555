"""The Hetero-Center loss (paper, section 3.3), and the named terms that a training step adds up."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

DISTANCES = {  # between (..., dim) centers: the squared Euclidean one, the mean absolute difference, 1 - cosine
    "l2": lambda a, b: (a - b).pow(2).sum(-1),
    "l1": lambda a, b: (a - b).abs().mean(-1),
    "cos": lambda a, b: 1 - F.cosine_similarity(a, b, dim=-1),
}


def person_centers(feats: Tensor, labels: Tensor, persons: Tensor) -> Tensor:
    """The mean (..., P, dim) of each of the (P,) ``persons``, of (..., N, dim) features with (N,) labels."""
    same = (persons[:, None] == labels).to(feats)  # (P, N); persons may repeat: `unique()` would force a GPU sync
    return same @ feats / same.sum(1, keepdim=True)


class HeteroCenterLoss(nn.Module):
    """L_HC = sum over the persons of a batch of max(0, d(visible center, thermal center) - margin); d is dist_type."""

    def __init__(self, margin: float = 0.0, dist_type: str = "l2"):
        super().__init__()
        if dist_type not in DISTANCES:
            raise ValueError(f"dist_type is {dist_type!r}: give l2, l1 or cos")
        self.margin, self.distance = margin, DISTANCES[dist_type]

    def forward(self, visible: Tensor, thermal: Tensor, visible_labels: Tensor, thermal_labels: Tensor) -> Tensor:
        """Features (..., N, dim) and (..., M, dim), persons (N,) and (M,), rows in any order (FIDELITY 19) -> (...).

        Within the margin it is 0 and back-propagates; NaN stays NaN (FIDELITY 18). ValueError, on CPUs: unlike persons.
        """
        if visible_labels.device.type == "cpu" and {*visible_labels.tolist()} != {*thermal_labels.tolist()}:
            raise ValueError("the Hetero-Center loss needs the same persons in both modalities of a batch")
        visible_centers = person_centers(visible, visible_labels, visible_labels)
        thermal_centers = person_centers(thermal, thermal_labels, visible_labels)
        beyond = F.relu(self.distance(visible_centers, thermal_centers) - self.margin)  # (..., N)
        rows = (visible_labels[:, None] == visible_labels).sum(1)  # of each row's person, who counts once
        return (beyond / rows).sum(-1)


class Term(NamedTuple):
    """A term of the loss, known by its name to logs, metrics.jsonl, TensorBoard and pictures."""

    name: str
    weight: float
    value: Callable[..., Tensor]  # (logits (S, N + M, classes), feats (S, N + M, dim), (N,) and (M,) labels) -> (S,)
    sums_persons: bool  # a sum over the persons of a batch, not a mean; a triplet loss would see one process only

    def of(self, *batch: Tensor) -> Tensor:
        """Its value on one process's persons; the mean over processes is that of the whole batch (FIDELITY 10)."""
        shares = dist.get_world_size() if self.sums_persons and dist.is_initialized() else 1
        return self.value(*batch) * shares


def loss_terms(args) -> list[Term]:
    """What a step adds up; flags ``w_hc``, ``thd`` and ``dist_type`` of ``args``. A new term is one more entry."""
    hetero_center = HeteroCenterLoss(args.thd, args.dist_type)

    def ce(logits, feats, *labels):
        return torch.stack([F.cross_entropy(stripe, torch.cat(labels)) for stripe in logits])

    def hc(logits, feats, *labels):
        return hetero_center(*feats.split([*map(len, labels)], dim=1), *labels)

    return [Term("CE", 1.0, ce, sums_persons=False), Term("HC", args.w_hc, hc, sums_persons=True)]


def total(terms: list[Term], losses: dict) -> Tensor | float:
    """The weighted sum of a step's losses by name. Its sum over the stripes is minimised, its mean is logged."""
    return sum(term.weight * losses[term.name] for term in terms)
