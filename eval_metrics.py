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
BLOCK = 2**18  # distances ranked at a time: they stay in the processor's cache, and memory is bounded


class Scores(NamedTuple):
    """``cmc[r - 1]``: share of queries with a match among the first r; mAP and mINP, all in [0, 1]."""

    cmc: np.ndarray
    mAP: float
    mINP: float

    def __str__(self) -> str:
        ranks = "  ".join(f"rank-{r} {self.cmc[r - 1]:.2%}" for r in RANKS if r <= len(self.cmc))
        return f"{ranks}  mAP {self.mAP:.2%}  mINP {self.mINP:.2%}"


class Distances:
    """The distances of (q, dim) query and (g, dim) gallery features, computed for some queries at a time: [rows].

    Stands for a (q, g) array where that would not fit into memory.

    Args:
        kind: "cosine", minus the dot product as published (of L2-normalised stripes it ranks as the cosine does), or
            "euclidean", squared and in float64, which ranks as the official evaluation's distance does.
    """

    KINDS = ("cosine", "euclidean")

    def __init__(self, query: np.ndarray, gallery: np.ndarray, kind: str = "cosine"):
        self.shape = (len(query), len(gallery))
        self.squares = None
        if kind == "euclidean":
            query, gallery = query.astype(np.float64), gallery.astype(np.float64)
            self.squares = (query**2).sum(1)[:, None], (gallery**2).sum(1)
        self.query, self.gallery = query, gallery

    def __getitem__(self, rows: slice) -> np.ndarray:
        dots = self.query[rows] @ self.gallery.T
        return -dots if self.squares is None else self.squares[0][rows] + self.squares[1] - 2 * dots


def eval_sysu(
    distmat: np.ndarray | Distances,
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
    if (len(q_camids), len(g_camids)) != distmat.shape:
        raise ValueError(f"distmat is {distmat.shape} for {len(q_camids)} query and {len(g_camids)} gallery cameras")
    same_room = (np.asarray(q_camids) == 3), (np.asarray(g_camids) == 2)
    return _score(distmat, q_pids, g_pids, max_rank, same_room, rank_persons=True)


def eval_regdb(distmat: np.ndarray | Distances, q_pids: np.ndarray, g_pids: np.ndarray, max_rank: int = 20) -> Scores:
    """Scores under the protocol of RegDB: CMC, mAP and mINP rank images. Arguments and errors as for `eval_sysu`."""
    nothing = np.zeros(len(q_pids), bool), np.zeros(len(g_pids), bool)
    return _score(distmat, q_pids, g_pids, max_rank, nothing, rank_persons=False)


def _score(distmat, q_pids, g_pids, max_rank: int, hidden, rank_persons: bool) -> Scores:
    """``hidden``: masks over queries and gallery; such a query does not see such a gallery image."""
    q_pids, g_pids = np.asarray(q_pids), np.asarray(g_pids)
    if distmat.shape != (len(q_pids), len(g_pids)):
        raise ValueError(f"distmat is {distmat.shape} for {len(q_pids)} queries and {len(g_pids)} gallery images")
    if 0 in distmat.shape:
        raise ValueError("no queries or no gallery to rank")
    rows = max(64, BLOCK // len(g_pids))
    blocks = [slice(start, start + rows) for start in range(0, len(q_pids), rows)]
    # One row per query with a match: rank of the first match (from 0), average precision, inverse penalty.
    results = np.concatenate(
        [_rank_block(distmat[b], q_pids[b], g_pids, hidden[0][b], hidden[1], rank_persons) for b in blocks]
    )
    if not len(results):
        raise ValueError("no query has a match in the gallery")
    first, ap, inp = results.T
    cmc = (first[:, None] <= np.arange(max_rank)).mean(axis=0)
    return Scores(cmc, mAP=float(ap.mean()), mINP=float(inp.mean()))


def _rank_block(distmat, q_pids, g_pids, q_hidden, g_hidden, rank_persons: bool) -> np.ndarray:
    """(q, g) distances -> (queries with a match, 3); columns as in `_score`.

    Only the places of the matches are needed. A match's place is the number of smaller distances in its row, which a
    sort of the bare values (several times faster than one of indices) and a binary search tell. That holds unless an
    equal distance competes for the place: such rows are ranked in full, by `_rank_ties`.
    """
    by_person = np.argsort(g_pids, kind="stable")
    persons, starts, counts = np.unique(g_pids[by_person], return_index=True, return_counts=True)
    distances = distmat[:, by_person]  # a copy, in which the images of a person are adjacent
    if distances.dtype.kind != "f":  # whole numbers hold no infinity
        distances = distances.astype(np.float64)
    if not np.isfinite(distances).all():
        raise ValueError("distmat holds values that are not finite")
    distances[np.ix_(q_hidden, g_hidden[by_person])] = np.inf

    # Every pair of a query and a match that it sees: row and distance, in order of both.
    person = np.searchsorted(persons, q_pids).clip(max=len(persons) - 1)
    n_own = np.where(persons[person] == q_pids, counts[person], 0)
    row = np.repeat(np.arange(len(q_pids)), n_own)
    column = np.arange(len(row)) + np.repeat(starts[person] - (n_own.cumsum() - n_own), n_own)
    value = distances[row, column]
    row, value = row[np.isfinite(value)], value[np.isfinite(value)]
    order = np.lexsort((value, row))
    row, value = row[order], value[order]

    ranked = np.sort(distances, axis=1)
    place = _count_smaller(ranked, row, value)
    after = np.minimum(place + 1, len(g_pids) - 1)
    tied = np.zeros(len(q_pids), bool)
    tied[row[(place + 1 < len(g_pids)) & (ranked[row, after] == value)]] = True

    n_hits = np.bincount(row, minlength=len(q_pids))
    matched = n_hits > 0
    ends = n_hits[matched].cumsum()
    begins = ends - n_hits[matched]
    number = np.arange(1, len(row) + 1) - np.repeat(begins, n_hits[matched])  # 1, 2, ... in each row
    ap = np.add.reduceat(number / (place + 1), begins) / n_hits[matched] if len(row) else np.empty(0)
    inp = n_hits[matched] / (place[ends - 1] + 1)  # matches / place of the last one
    first = place[begins]
    if rank_persons:  # a person's place is that of their first image
        nearest = np.minimum.reduceat(distances, starts, axis=1)  # (queries, persons)
        first = (nearest[matched] < value[begins, None]).sum(axis=1)
    results = np.stack([first, ap, inp], axis=1)
    if tied.any():
        hidden = np.outer(q_hidden[tied], g_hidden)
        results[tied[matched]] = _rank_ties(distmat[tied], q_pids[tied], g_pids, hidden, rank_persons)
    return results


def _count_smaller(ranked: np.ndarray, row: np.ndarray, value: np.ndarray) -> np.ndarray:
    """How many entries of the ascending ``ranked[row]`` are below ``value``: a binary search for many pairs at once."""
    low, high = np.zeros(len(row), np.int64), np.full(len(row), ranked.shape[1])
    for _ in range(ranked.shape[1].bit_length()):
        middle = (low + high) // 2
        smaller = ranked[row, np.minimum(middle, ranked.shape[1] - 1)] < value
        smaller &= low < high
        low, high = np.where(smaller, middle + 1, low), np.where(smaller, high, middle)
    return low


def _rank_ties(distmat, q_pids, g_pids, hidden, rank_persons: bool) -> np.ndarray:
    """The definition, by a stable sort of indices: ties keep the gallery's order. Every query has a match."""
    order = np.argsort(np.where(hidden, np.inf, distmat), axis=1, kind="stable")  # hidden images come last
    hits = np.take_along_axis((q_pids[:, None] == g_pids) & ~hidden, order, axis=1)  # in order of rank
    places = np.arange(1, len(g_pids) + 1)
    n_hits = hits.sum(axis=1)
    ap = (hits * hits.cumsum(axis=1) / places).sum(axis=1) / n_hits
    inp = n_hits / (hits * places).max(axis=1)
    first = hits.argmax(axis=1)
    if rank_persons:
        place = np.empty_like(order)
        np.put_along_axis(place, order, np.broadcast_to(places - 1, order.shape), axis=1)
        by_person = np.argsort(g_pids, kind="stable")
        starts = np.unique(g_pids[by_person], return_index=True)[1]
        first = (np.minimum.reduceat(place[:, by_person], starts, axis=1) < first[:, None]).sum(axis=1)
    return np.stack([first, ap, inp], axis=1)


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
