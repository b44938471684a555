"""The Hetero-Center loss (paper, section 3.3), and the named terms that a training step adds up."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DISTANCES = {  # between (..., dim) centers; as published, l2 is squared and a sum over the dimensions, l1 their mean
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
        self.margin, self.distance = margin, DISTANCES[dist_type]

    def forward(self, visible: Tensor, thermal: Tensor, visible_labels: Tensor, thermal_labels: Tensor) -> Tensor:
        """(..., N, dim) and (..., M, dim) features of the same persons, in any order (FIDELITY 19) -> (...)."""
        visible_centers = person_centers(visible, visible_labels, visible_labels)
        thermal_centers = person_centers(thermal, thermal_labels, visible_labels)
        # relu keeps NaN, and gives persons within the margin a 0 that back-propagates (FIDELITY 18).
        beyond = F.relu(self.distance(visible_centers, thermal_centers) - self.margin)  # (..., N)
        repeats = (visible_labels[:, None] == visible_labels).sum(1)  # rows of each row's person, who counts once
        return (beyond / repeats).sum(-1)


class Term(NamedTuple):
    """A term of the loss, known by its name to logs, metrics.jsonl, TensorBoard and pictures."""

    name: str
    weight: float
    value: Callable[..., Tensor]  # (logits, visible feats, thermal feats, labels of both) -> a value per stripe
    sums_persons: bool  # it is a sum over the persons of a batch, not a mean over images

    def of(self, logits: Tensor, feats: Tensor, *labels: Tensor) -> Tensor:
        """(S, N + M, classes), (S, N + M, dim), (N,), (M,) -> (S,). It sees the persons of this process only."""
        # DDP averages over the processes; what is a sum over persons has to be added up instead (FIDELITY 10).
        scale = torch.distributed.get_world_size() if self.sums_persons and torch.distributed.is_initialized() else 1
        return scale * self.value(logits, *feats.split([*map(len, labels)], dim=1), *labels)


def loss_terms(args) -> list[Term]:
    """What a step adds up; flags ``w_hc``, ``thd`` and ``dist_type`` of ``args``. A new term is one more entry."""
    hetero_center = HeteroCenterLoss(args.thd, args.dist_type)

    def ce(logits, visible, thermal, *labels):
        return torch.stack([F.cross_entropy(stripe, torch.cat(labels)) for stripe in logits])

    def hc(logits, visible, thermal, *labels):
        return hetero_center(visible, thermal, *labels)

    return [Term("CE", 1.0, ce, sums_persons=False), Term("HC", args.w_hc, hc, sums_persons=True)]


def total(terms: list[Term], losses: dict) -> Tensor | float:
    """The weighted sum of the terms. A step minimises its sum over the stripes; the log shows its mean over them."""
    return sum(term.weight * losses[term.name] for term in terms)
