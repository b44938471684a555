"""Features -> distances -> CMC, mAP and mINP, and the extraction of the features. Imports no model, reads no file.

Distances are numpy arrays, smaller = more alike. Every measure is computed per query and averaged over the queries
that have a match in the gallery; the others do not count (FIDELITY 12).
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

RANKS = (1, 5, 10, 20)  # the reported ones
BLOCK = 2**22  # distances ranked at a time: bounds the memory whatever the number of queries


class Scores(NamedTuple):
    """``cmc[r - 1]``: share of queries with a match among the first r; mAP and mINP, all in [0, 1]."""

    cmc: np.ndarray
    mAP: float
    mINP: float

    def __str__(self) -> str:
        ranks = "  ".join(f"rank-{r} {self.cmc[r - 1]:.2%}" for r in RANKS if r <= len(self.cmc))
        return f"{ranks}  mAP {self.mAP:.2%}  mINP {self.mINP:.2%}"


def eval_sysu(
    distmat: np.ndarray,
    q_pids: np.ndarray,
    g_pids: np.ndarray,
    q_camids: np.ndarray,
    g_camids: np.ndarray,
    max_rank: int = 20,
) -> Scores:
    """Scores under the protocol of SYSU-MM01.

    Camera 2 and camera 3 look at the same room, so queries of camera 3 do not see the gallery of camera 2. CMC ranks
    persons (each at their first image), mAP and mINP rank images. Ties keep the gallery's order (FIDELITY 17).

    Args:
        distmat: (queries, gallery) finite distances.
        q_pids, g_pids: person ids, (queries,) and (gallery,).
        q_camids, g_camids: camera numbers 1..6, likewise.
        max_rank: length of the CMC; beyond the number of persons it stays at its last value (FIDELITY 13).

    Raises:
        ValueError: lengths disagree, a distance is not finite, or no query has a match.
    """
    if (len(q_camids), len(g_camids)) != np.shape(distmat):
        raise ValueError(
            f"distmat is {np.shape(distmat)} for {len(q_camids)} query and {len(g_camids)} gallery cameras"
        )
    same_room = (np.asarray(q_camids) == 3), (np.asarray(g_camids) == 2)
    return _score(distmat, q_pids, g_pids, max_rank, same_room, rank_persons=True)


def eval_regdb(distmat: np.ndarray, q_pids: np.ndarray, g_pids: np.ndarray, max_rank: int = 20) -> Scores:
    """Scores under the protocol of RegDB: CMC, mAP and mINP rank images. Arguments and errors as for `eval_sysu`."""
    nothing = np.zeros(len(q_pids), bool), np.zeros(len(g_pids), bool)
    return _score(distmat, q_pids, g_pids, max_rank, nothing, rank_persons=False)


def _score(distmat, q_pids, g_pids, max_rank: int, hidden, rank_persons: bool) -> Scores:
    """``hidden``: masks over queries and gallery; such a query does not see such a gallery image."""
    distmat, q_pids, g_pids = np.asarray(distmat), np.asarray(q_pids), np.asarray(g_pids)
    if distmat.shape != (len(q_pids), len(g_pids)):
        raise ValueError(f"distmat is {distmat.shape} for {len(q_pids)} queries and {len(g_pids)} gallery images")
    if not np.isfinite(distmat).all():
        raise ValueError("distmat holds values that are not finite")
    if not distmat.size:
        raise ValueError("no queries or no gallery to rank")
    rows = max(1, BLOCK // len(g_pids))
    blocks = [slice(start, start + rows) for start in range(0, len(q_pids), rows)]
    # One row per query with a match: rank of the first match (from 0), average precision, inverse penalty.
    results = np.concatenate(
        [_rank_block(distmat[b], q_pids[b], g_pids, np.outer(hidden[0][b], hidden[1]), rank_persons) for b in blocks]
    )
    if not len(results):
        raise ValueError("no query has a match in the gallery")
    first, ap, inp = results.T
    return Scores(
        cmc=(first[:, None] <= np.arange(max_rank)).mean(axis=0), mAP=float(ap.mean()), mINP=float(inp.mean())
    )


def _rank_block(distmat, q_pids, g_pids, hidden, rank_persons: bool) -> np.ndarray:
    """(q, g) distances and mask of hidden pairs -> (queries with a match, 3); columns as in `_score`."""
    order = np.argsort(np.where(hidden, np.inf, distmat), axis=1, kind="stable")  # hidden images come last
    match = (q_pids[:, None] == g_pids) & ~hidden
    valid = match.any(axis=1)
    order, match = order[valid], match[valid]
    hits = np.take_along_axis(match, order, axis=1)  # in order of rank
    places = np.arange(1, len(g_pids) + 1)
    n_hits = hits.sum(axis=1)
    ap = (hits * hits.cumsum(axis=1) / places).sum(axis=1) / n_hits
    inp = n_hits / (hits * places).max(axis=1)  # matches / place of the last match
    first = hits.argmax(axis=1)
    if rank_persons:
        # A person's place is that of their first image; the rank of the match is the number of persons before it.
        place = np.empty_like(order)
        np.put_along_axis(place, order, np.broadcast_to(places - 1, order.shape), axis=1)
        by_person = np.argsort(g_pids, kind="stable")
        starts = np.unique(g_pids[by_person], return_index=True)[1]
        person_place = np.minimum.reduceat(place[:, by_person], starts, axis=1)  # (queries, persons)
        first = (person_place < first[:, None]).sum(axis=1)
    return np.stack([first, ap, inp], axis=1)


def cosine_distmat(query: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Minus the dot product of (q, dim) and (g, dim) features, (q, g): the published similarity."""
    return -(query @ gallery.T)


def euclidean_distmat(query: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances, (q, g) float64, of (q, dim) and (g, dim) features: they rank as the distances do."""
    query, gallery = query.astype(np.float64), gallery.astype(np.float64)
    return (query**2).sum(1)[:, None] + (gallery**2).sum(1) - 2 * query @ gallery.T


DISTANCES = {"cosine": cosine_distmat, "euclidean": euclidean_distmat}


@torch.no_grad()
def extract_features(net: nn.Module, batches: Iterable[Tensor], modality: str) -> dict[str, np.ndarray]:
    """Embed every image of one modality: {"pool5": (N, parts * C), "fc": (N, parts * low_dim)}, float arrays.

    Args:
        net: called as ``net(visible=images)`` or ``net(thermal=images)`` in evaluation mode, gives (pool5, fc).
        batches: normalised images (n, 3, height, width) on the device of ``net``.
        modality: "visible" or "thermal".

    Raises:
        FloatingPointError: a feature is not finite.
    """
    was_training = net.training
    net.eval()
    pool5, fc = zip(*([part.cpu() for part in net(**{modality: images})] for images in batches), strict=True)
    net.train(was_training)
    features = {"pool5": torch.cat(pool5).numpy(), "fc": torch.cat(fc).numpy()}
    for name, values in features.items():
        if not np.isfinite(values).all():
            raise FloatingPointError(
                f"the {name} features of the {modality} images are not finite: the network is broken"
            )
    return features
