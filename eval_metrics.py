"""Features -> distances -> CMC, mAP and mINP, and the extraction of the features. Imports no model, reads no file.

`extract_features` embeds images, `Results` scores protocols with them: training and testing both evaluate so.

Distances are numpy arrays, smaller = more alike. Every measure is computed per query and averaged over the queries
that have a match in the gallery; the others do not count (FIDELITY 12).
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor, nn

KINDS = ("fc", "pool5")  # of features: of the six heads, and of the stripes before them
RANKS = (1, 5, 10, 20)  # the reported ones
MEASURES = {f"rank{r}": f"rank-{r}" for r in RANKS} | {"mAP": "mAP", "mINP": "mINP"}  # and how they are spelt
BLOCK = 2**18  # distances ranked at a time: they stay in the processor's cache, and memory is bounded


class Scores(NamedTuple):
    """``cmc[r - 1]``: share of queries with a match among the first r; mAP and mINP, all in [0, 1]."""

    cmc: np.ndarray
    mAP: float
    mINP: float

    def measures(self) -> dict[str, float]:
        """What is reported of them: rank1, rank5, rank10, rank20, mAP and mINP."""
        return {f"rank{r}": float(self.cmc[r - 1]) for r in RANKS} | {"mAP": float(self.mAP), "mINP": float(self.mINP)}

    def __str__(self) -> str:
        ranks = "  ".join(f"rank-{r} {self.cmc[r - 1]:.2%}" for r in RANKS if r <= len(self.cmc))
        return f"{ranks}  mAP {self.mAP:.2%}  mINP {self.mINP:.2%}"


class Distances:
    """The distances of (q, dim) query and (g, dim) gallery features, computed for some queries at a time: [rows].

    Stands for a (q, g) array where that would not fit into memory.

    Args:
        kind: "cosine", minus the cosine of the angle, which ranks as the published dot product does (there all features
            are of one length), or "euclidean", squared and in float64, which ranks as the official evaluation's does.
    """

    KINDS = ("cosine", "euclidean")

    def __init__(self, query: np.ndarray, gallery: np.ndarray, kind: str = "cosine"):
        if kind not in self.KINDS:
            raise ValueError(f"there is no distance {kind!r}: give one of {', '.join(self.KINDS)}")
        query, gallery = (x.astype(np.promote_types(x.dtype, np.float32), copy=False) for x in (query, gallery))
        self.shape = (len(query), len(gallery))
        self.squares = None
        if kind == "euclidean":
            query, gallery = query.astype(np.float64), gallery.astype(np.float64)
            with np.errstate(over="ignore"):
                self.squares = (query**2).sum(1)[:, None], (gallery**2).sum(1)
        else:
            query, gallery = _directions(query), _directions(gallery)
        self.query, self.gallery = query, gallery

    def __getitem__(self, rows: slice) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused by whoever scores it
            dots = self.query[rows] @ self.gallery.T
            return -dots if self.squares is None else self.squares[0][rows] + self.squares[1] - 2 * dots


def _directions(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        lengths = np.sqrt(np.einsum("nd,nd->n", x, x, dtype=np.float64))[:, None]  # large numbers have larger squares
        if not x.any(axis=1).all():
            raise ValueError("a feature is zero, which has no direction: compare by another distance than cosine")
        if not ((lengths > 1e-150) & np.isfinite(lengths.astype(x.dtype))).all():
            return _directions(x / np.abs(x).max(axis=1, keepdims=True))
    return x / lengths.astype(x.dtype)


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
    return _score(distmat, q_pids, g_pids, max_rank, same_room(q_camids, g_camids), rank_persons=True)


def eval_regdb(distmat: np.ndarray | Distances, q_pids: np.ndarray, g_pids: np.ndarray, max_rank: int = 20) -> Scores:
    """Scores under the protocol of RegDB: CMC, mAP and mINP rank images. Arguments and errors as for `eval_sysu`."""
    nothing = np.zeros(len(q_pids), bool), np.zeros(len(g_pids), bool)
    return _score(distmat, q_pids, g_pids, max_rank, nothing, rank_persons=False)


def same_room(q_camids: np.ndarray, g_camids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Masks: such a query does not see such a gallery image. No camera of RegDB, numbered 1 and 2, queries so."""
    return np.asarray(q_camids) == 3, np.asarray(g_camids) == 2


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


class Counts(NamedTuple):
    """How large a ranking is: queries, those of them without a match in the gallery, gallery images and persons.

    ``chance`` is the rank-1 to expect of a random ranking, ``deviation`` how far luck takes it: images of one person
    in one camera are alike and count as one draw.
    """

    queries: int
    without_match: int
    gallery_images: int
    gallery_persons: int
    chance: float
    deviation: float

    @classmethod
    def of(cls, search: NamedTuple, images: NamedTuple) -> "Counts":
        """Arguments as for `Results.add`."""
        q_pids, g_pids = images.pids[search.query], images.pids[search.gallery]
        q_hidden, g_hidden = same_room(images.camids[search.query], images.camids[search.gallery])
        persons, place = np.unique(np.concatenate([q_pids, g_pids]), return_inverse=True)
        q_place, g_place = np.split(place, [len(q_pids)])
        own = np.bincount(g_place, minlength=len(persons))  # gallery images of each person
        hidden = np.bincount(g_place[g_hidden], minlength=len(persons))
        matches = own[q_place] - q_hidden * hidden[q_place]
        seen = len(g_pids) - q_hidden * hidden.sum()
        matched = matches > 0
        chance = float((matches[matched] / seen[matched]).mean()) if matched.any() else 0.0
        draws = len({*zip(q_pids[matched].tolist(), images.camids[search.query][matched].tolist(), strict=True)})
        return cls(len(q_pids), int((~matched).sum()), len(g_pids), len(np.unique(g_pids)), chance,
                   (chance * (1 - chance) / max(draws, 1)) ** 0.5)  # fmt: skip

    def __str__(self) -> str:
        return (
            f"{self.queries} queries ({self.without_match} without a match, not counted), "
            f"{self.gallery_images} gallery images of {self.gallery_persons} persons"
        )


class Results:
    """Scores of several kinds of features under the protocols of one dataset, trial by trial.

    Args:
        dataset: "sysu" or "regdb".
        distance: a kind of `Distances`.
        reranked: compare by `rerank` of these distances.
        seed: of the random rankings that stand beside the features as "chance".

    Attributes:
        counts: {protocol: Counts} of its first trial.
        scores: {(protocol, feature): {trial: Scores}}.
    """

    def __init__(self, dataset: str, distance: str = "cosine", reranked: bool = False, seed: int = 1):
        self.dataset, self.distance, self.reranked, self.seed = dataset, distance, reranked, seed
        self.counts, self.scores = {}, {}

    def add(self, search: NamedTuple, images: NamedTuple, features: dict[str, np.ndarray]) -> None:
        """Score one trial of one protocol.

        Args:
            search: its ``protocol``, ``trial``, and the places of ``query`` and ``gallery`` among the images.
            images: ``pids`` and ``camids``, (N,) each.
            features: kind -> (N, dim).

        Raises:
            ValueError: as `eval_sysu` does.
        """
        query, gallery = search.query, search.gallery
        pids, camids = (images.pids[query], images.pids[gallery]), (images.camids[query], images.camids[gallery])
        if search.protocol not in self.counts:
            self.counts[search.protocol] = Counts.of(search, images)
        for feature in (*features, "chance"):
            if feature == "chance":
                distmat = np.random.default_rng([self.seed, search.trial]).random((len(query), len(gallery)))
            else:
                compare = rerank if self.reranked else Distances
                distmat = compare(features[feature][query], features[feature][gallery], self.distance)
            scores = eval_sysu(distmat, *pids, *camids) if self.dataset == "sysu" else eval_regdb(distmat, *pids)
            self.scores.setdefault((search.protocol, feature), {})[search.trial] = scores

    def mean_and_std(self, protocol: str, feature: str) -> dict[str, tuple[float, float]]:
        """Mean and deviation over the trials of each of `Scores.measures`."""
        trials = [scores.measures() for scores in self.scores[protocol, feature].values()]
        values = {name: [trial[name] for trial in trials] for name in trials[0]}
        return {name: (float(np.mean(found)), float(np.std(found))) for name, found in values.items()}

    def near_chance(self) -> list[str]:
        """For each protocol and feature whose rank-1 is within three deviations of chance, a few words."""
        found = []
        for protocol, feature in self.scores:
            counts, rank1 = self.counts[protocol], self.mean_and_std(protocol, feature)["rank1"][0]
            if feature != "chance" and rank1 < counts.chance + 3 * counts.deviation:
                found.append(
                    f"{protocol} {feature} {rank1:.1%}, by chance {counts.chance:.1%} ± {counts.deviation:.1%}"
                )
        return found

    def table(self) -> str:
        """What was ranked, then a row of percentages for each protocol and feature."""
        lines = [f"{protocol}: {counts}" for protocol, counts in self.counts.items()]
        lines += ["", f"{'protocol':26s}{'features':9s}" + "".join(f"{name:>14s}" for name in MEASURES.values())]
        n_trials = len(next(iter(self.scores.values())))
        several = n_trials > 1
        for protocol, feature in self.scores:
            values = self.mean_and_std(protocol, feature).values()
            cells = (f"{100 * mean:.2f}" + f" ± {100 * std:4.2f}" * several for mean, std in values)
            lines.append(f"{protocol:26s}{feature:9s}" + "".join(f"{cell:>14s}" for cell in cells))
        return "\n".join([*lines, "%" + f", mean ± deviation over {n_trials} trials" * several])

    def to_json(self) -> dict:
        rows = []
        for (protocol, feature), trials in self.scores.items():
            measures = self.mean_and_std(protocol, feature)
            rows.append(
                {
                    "protocol": protocol,
                    "feature": feature,
                    "mean": {name: mean for name, (mean, _) in measures.items()},
                    "std": {name: std for name, (_, std) in measures.items()},
                    "trials": [{"trial": n, **t._asdict(), "cmc": t.cmc.tolist()} for n, t in trials.items()],
                }
            )
        return {"counts": {protocol: c._asdict() for protocol, c in self.counts.items()}, "results": rows}


def rerank(
    query: np.ndarray, gallery: np.ndarray, kind: str = "cosine", k1: int = 20, k2: int = 6, weight: float = 0.3
) -> np.ndarray:
    """Distances after k-reciprocal re-ranking (Zhong et al., CVPR 2017, with its published parameters).

    Two images are alike when each other's near neighbours are. Unlike `Distances` this compares a query with all other
    queries too, and holds (q + g) x (q + g) float32 values.

    Args:
        query, gallery: (q, dim) and (g, dim) features.
        kind: of `Distances`.
        k1, k2: neighbours that count as near, and those whose neighbourhoods are averaged.
        weight: share of the plain distance in the result (the paper's lambda).

    Returns:
        (q, g) float32.
    """
    features, q = np.concatenate([query, gallery]), len(query)
    n = len(features)
    plain, nearest = Distances(features, features, kind), []
    distances = np.empty((n, n), np.float32)
    k1, k2 = min(k1, n - 1), min(k2, n)
    rows = max(64, BLOCK // n)
    for start in range(0, n, rows):
        block = (plain[start : start + rows] + (kind == "cosine")).clip(min=0)  # 1 - cosine, half the squared distance
        distances[start : start + rows] = block / np.maximum(
            block.max(axis=1, keepdims=True), np.finfo(block.dtype).tiny
        )
        near = np.sort(np.argpartition(block, k1, axis=1)[:, : k1 + 1], axis=1)
        order = np.argsort(np.take_along_axis(block, near, axis=1), axis=1, kind="stable")
        nearest.append(np.take_along_axis(near, order, axis=1))
    nearest = np.concatenate(nearest)  # (n, k1 + 1), each image's own first

    def neighbours(k: int) -> sparse.csr_matrix:
        """Who is among whose k nearest: (n, n), 0 or 1."""
        return sparse.csr_matrix(
            (np.ones(n * k, np.float32), nearest[:, :k].ravel(), np.arange(0, n * k + 1, k)), (n, n)
        )

    def reciprocal(k: int) -> sparse.csr_matrix:
        near = neighbours(k + 1)
        return near.multiply(near.T).tocsr()

    # A neighbour brings along its own neighbourhood if that lies mostly, by more than two thirds, in ours.
    near, closer = reciprocal(k1), reciprocal(round(k1 / 2))
    bring = near.multiply(near @ closer).tocsr()
    bring.data = (3 * bring.data > 2 * np.diff(closer.indptr)[bring.indices]).astype(np.float32)
    member = (near + bring @ closer).tocoo()  # (n, n), above 0 where the column is in the row's neighbourhood
    close = np.exp(-distances[member.row, member.col]) * (member.data > 0)
    weights = sparse.csr_matrix((close, (member.row, member.col)), (n, n))
    weights = sparse.diags(1 / weights.sum(axis=1).A1) @ weights
    weights = (neighbours(k2) / k2 @ weights).tocsr()

    by_member = weights[q:].T.tocsr()  # row k: the gallery images that have image k in their neighbourhood
    result = np.empty((q, n - q), np.float32)
    for i in range(q):
        own = weights[i]
        others = by_member[own.indices]
        shared = np.minimum(others.data, np.repeat(own.data, np.diff(others.indptr)))
        overlap = np.bincount(others.indices, shared, minlength=n - q)
        result[i] = (1 - weight) * (1 - overlap / (2 - overlap)) + weight * distances[i, q:]
    return result


@torch.no_grad()
def extract_features(
    net: nn.Module,
    batches: Iterable[tuple[str, np.ndarray, Tensor]],
    n: int,
    kinds: tuple[str, ...] = KINDS,
    flip: bool = False,
) -> dict[str, np.ndarray]:
    """Embed images: {"fc": (n, parts * low_dim), "pool5": (n, parts * C)}, float arrays.

    Args:
        net: called as ``net(visible=images)`` or ``net(thermal=images)`` in evaluation mode, gives (pool5, fc).
        batches: (modality, rows, images): "visible" or "thermal", the images' places among the n, and normalised
            images (b, 3, height, width) on the device of ``net``.
        n: number of images.
        kinds: the features to keep.
        flip: average those of the image and of its mirror image, and normalise each of the ``net.num_parts`` stripes.

    Raises:
        FloatingPointError: a feature is not finite.
    """
    was_training, features = net.training, {}
    net.eval()
    for modality, rows, images in batches:
        found = dict(zip(("pool5", "fc"), net(**{modality: images}), strict=True))
        if flip:
            mirrored = dict(zip(("pool5", "fc"), net(**{modality: images.flip(3)}), strict=True))
            found = {kind: _mean_of_stripes(found[kind], mirrored[kind], net.num_parts) for kind in kinds}
        for kind in kinds:
            values = found[kind].cpu().numpy()
            if not np.isfinite(values).all():
                raise FloatingPointError(
                    f"the {kind} features of the {modality} images are not finite: the network is broken"
                )
            features.setdefault(kind, np.empty((n, values.shape[1]), values.dtype))[rows] = values
    net.train(was_training)
    return features


def _mean_of_stripes(a: Tensor, b: Tensor, num_parts: int) -> Tensor:
    return F.normalize((a + b).unflatten(1, (num_parts, -1)), dim=2).flatten(1)
