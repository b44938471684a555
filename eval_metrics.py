"""Features -> distances -> CMC, mAP and mINP, and the extraction of features. Imports no model, reads no file.

Distances are numpy arrays, smaller = more alike. Every measure is computed per query, and averaged over the queries
with a match in the gallery that they see (FIDELITY 12). Equal distances keep the gallery's order (FIDELITY 17).
"""

import logging
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.spatial.distance import cdist
from torch import nn

from data_manager import DATASETS, Dataset, Search, Split

KINDS = ("fc", "pool5")  # of features: of the six heads, and of the stripes before them
RANKS = (1, 5, 10, 20)  # the reported ones
MEASURES = {f"rank{r}": f"rank-{r}" for r in RANKS} | {"mAP": "mAP", "mINP": "mINP"}  # and how they are spelt
log = logging.getLogger(__name__)
BLOCK = 2**18  # distances ranked at a time: they stay in the processor's cache, and memory is bounded


class Scores(NamedTuple):
    """``cmc[r - 1]``: share of queries with a match among the first r; mAP and mINP, all in [0, 1]."""

    cmc: np.ndarray
    mAP: float
    mINP: float

    def measures(self) -> dict[str, float]:
        """What is reported of them: rank1, rank5, rank10, rank20, mAP and mINP."""
        ranks = {f"rank{r}": float(self.cmc[r - 1]) for r in RANKS if r <= len(self.cmc)}
        return ranks | {"mAP": float(self.mAP), "mINP": float(self.mINP)}

    def __str__(self) -> str:
        return "  ".join(f"{MEASURES[name]} {value:.2%}" for name, value in self.measures().items())


# ---- ranking --------------------------------------------------------------------------------------------------------


def rank_plainly(distmat, q_pids, g_pids, hidden, counts_persons: bool) -> np.ndarray:
    """The definition, for a block of queries that each have a match. `rank_fast` gives the same.

    Args:
        distmat: (q, g) distances.
        q_pids, g_pids: (q,) and (g,) person ids.
        hidden: (q, g) bool, the gallery images that a query does not see.
        counts_persons: CMC counts persons, each at their first image; otherwise images.

    Returns:
        (q, 3): persons or images before the first match, average precision, matches / place of the last match.
    """
    order = np.argsort(np.where(hidden, np.inf, distmat), axis=1, kind="stable")  # hidden images come last
    hits = np.take_along_axis((q_pids[:, None] == g_pids) & ~hidden, order, axis=1)  # in order of rank
    places = np.arange(1, len(g_pids) + 1)
    n_hits = hits.sum(axis=1)
    precision = hits.cumsum(axis=1) / places
    ap = (hits * precision).sum(axis=1) / n_hits
    inp = n_hits / (hits * places).max(axis=1)
    before = hits.argmax(axis=1)
    if counts_persons:
        before = [len({*g_pids[row[:n]].tolist()}) for row, n in zip(order, before, strict=True)]
    return np.stack([before, ap, inp], axis=1)


def rank_fast(distmat, q_pids, g_pids, hidden, counts_persons: bool) -> np.ndarray:
    """As `rank_plainly`, whose arguments these are, but queries without a match are left out of the result.

    All measures follow from the places of the matches, and a match's place is the number of smaller distances in its
    row: a sort of bare values and a binary search tell it, several times faster than a sort of indices. That holds
    unless another image has the same distance; such rows go to `rank_plainly`.
    """
    by_person = np.argsort(g_pids, kind="stable")
    persons, starts, counts = np.unique(g_pids[by_person], return_index=True, return_counts=True)
    distances = distmat[:, by_person]  # a copy, in which the images of a person are adjacent
    distances = distances.astype(np.result_type(distances, np.float16), copy=False)  # whole numbers hold no infinity
    if not np.isfinite(distances).all():
        raise ValueError("distmat holds values that are not finite")
    distances[hidden[:, by_person]] = np.inf

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
    last = len(g_pids) - 1
    tied = np.zeros(len(q_pids), bool)
    tied[row[(place < last) & (ranked[row, np.minimum(place + 1, last)] == value)]] = True

    n_hits = np.bincount(row, minlength=len(q_pids))
    matched = n_hits > 0
    n_hits = n_hits[matched]
    ends = n_hits.cumsum()
    begins = ends - n_hits
    number = np.arange(1, len(row) + 1) - np.repeat(begins, n_hits)  # 1, 2, ... in each row
    ap = np.add.reduceat(number / (place + 1), begins) / n_hits if len(row) else np.empty(0)
    inp = n_hits / (place[ends - 1] + 1)
    before = place[begins]
    if counts_persons:
        nearest = np.minimum.reduceat(distances, starts, axis=1)  # (queries, persons)
        before = (nearest[matched] < value[begins, None]).sum(axis=1)
    results = np.stack([before, ap, inp], axis=1)
    if tied.any():
        results[tied[matched]] = rank_plainly(distmat[tied], q_pids[tied], g_pids, hidden[tied], counts_persons)
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


def score(distmat, q_pids, g_pids, q_camids, g_camids, hidden: Callable, counts_persons: bool, max_rank=20) -> Scores:
    """Scores under the protocol of any dataset.

    Args:
        distmat: (queries, gallery) finite distances, or `Distances`.
        q_pids, g_pids, q_camids, g_camids: person ids and camera numbers, (queries,) and (gallery,).
        hidden: (q_pids, q_camids, g_pids, g_camids) -> (queries, gallery) mask of what a query does not see; it is
            called for some queries at a time.
        counts_persons: CMC counts persons, each at their first image; otherwise images.
        max_rank: length of the CMC; beyond the number of persons it stays at its last value (FIDELITY 13).

    ValueError: lengths disagree, a distance is not finite, or no query has a match.
    """
    q_pids, g_pids, q_camids, g_camids = map(np.asarray, (q_pids, g_pids, q_camids, g_camids))
    if not (len(q_pids), len(g_pids)) == (len(q_camids), len(g_camids)) == distmat.shape or 0 in distmat.shape:
        raise ValueError(f"distmat is {distmat.shape} for {len(q_pids)} queries and {len(g_pids)} gallery images")
    rows, results = max(64, BLOCK // len(g_pids)), []
    for block in (slice(start, start + rows) for start in range(0, len(q_pids), rows)):
        unseen = hidden(q_pids[block], q_camids[block], g_pids, g_camids)
        results.append(rank_fast(distmat[block], q_pids[block], g_pids, unseen, counts_persons))
    before, ap, inp = np.concatenate(results).T
    if not len(ap):
        raise ValueError("no query has a match in the gallery")
    cmc = (before[:, None] < np.arange(1, max_rank + 1)).mean(axis=0)
    return Scores(cmc, mAP=float(ap.mean()), mINP=float(inp.mean()))


def eval_sysu(distmat, q_pids, g_pids, q_camids, g_camids, max_rank: int = 20) -> Scores:
    """`score` by the rules of SYSU-MM01: a query of camera 3 does not see camera 2, and CMC counts persons."""
    return score(distmat, q_pids, g_pids, q_camids, g_camids, DATASETS["sysu"].hidden, True, max_rank)


def eval_regdb(distmat, q_pids, g_pids, max_rank: int = 20) -> Scores:
    """`score` by the rules of RegDB: every query sees the whole gallery, and CMC counts images."""
    return score(distmat, q_pids, g_pids, q_pids, g_pids, DATASETS["regdb"].hidden, False, max_rank)


# ---- distances ------------------------------------------------------------------------------------------------------


class Distances:
    """(queries, gallery) distances of (n, dim) features, computed for some queries at a time: [rows].

    ``kind`` is "cosine", minus the cosine of the angle, which ranks as the published dot product does, or
    "euclidean", squared and in float64, which ranks as the official evaluation does.

    ValueError: there is no such kind, or a feature has no direction, that is, no cosine.
    """

    KINDS = ("cosine", "euclidean")

    def __init__(self, query: np.ndarray, gallery: np.ndarray, kind: str = "cosine"):
        if kind not in self.KINDS:
            raise ValueError(f"there is no distance {kind!r}: give one of {', '.join(self.KINDS)}")
        self.shape, self.kind = (len(query), len(gallery)), kind
        wide = np.float64 if kind == "euclidean" else np.promote_types(query.dtype, np.float32)
        sides = [x.astype(wide, copy=False) for x in (query, gallery)]
        self.squares = [np.einsum("nd,nd->n", x, x, dtype=np.float64) for x in sides]
        if kind == "cosine":
            if not all((squares > 0).all() and np.isfinite(squares).all() for squares in self.squares):
                raise ValueError("a feature is zero or too large to have a direction: compare by another distance")
            sides = [x / np.sqrt(own).astype(wide)[:, None] for x, own in zip(sides, self.squares, strict=True)]
        self.query, self.gallery = sides

    def __getitem__(self, rows: slice) -> np.ndarray:
        dots = self.query[rows] @ self.gallery.T
        return -dots if self.kind == "cosine" else self.squares[0][rows, None] + self.squares[1] - 2 * dots


# ---- results --------------------------------------------------------------------------------------------------------


class Counts(NamedTuple):
    """How large a ranking is; ``chance`` is the rank-1 to expect of a random one."""

    queries: int
    without_match: int
    gallery_images: int
    gallery_persons: int
    chance: float

    @classmethod
    def of(cls, search: Search, images: Split, dataset: Dataset) -> "Counts":
        query, gallery = images.take(search.query), images.take(search.gallery)
        seen = ~dataset.hidden(query.pids, query.camids, gallery.pids, gallery.camids)  # (queries, gallery)
        matches = (seen & (query.pids[:, None] == gallery.pids)).sum(axis=1)
        matched = matches > 0
        chance = float((matches / seen.sum(axis=1).clip(1))[matched].mean()) if matched.any() else 0.0
        return cls(len(matched), int((~matched).sum()), len(gallery.pids), len(np.unique(gallery.pids)), chance)

    def __str__(self) -> str:
        queries = f"{self.queries} queries ({self.without_match} without a match, not counted)"
        return f"{queries}, {self.gallery_images} gallery images of {self.gallery_persons} persons"


def score_search(search: Search, images: Split, compared: np.ndarray | Distances, dataset: Dataset) -> Scores:
    """`score` by the rules of a dataset; ``compared`` is (queries, gallery) distances."""
    query, gallery = images.take(search.query), images.take(search.gallery)
    lists = query.pids, gallery.pids, query.camids, gallery.camids
    return score(compared, *lists, dataset.hidden, dataset.counts_persons)


def centers(values: np.ndarray, images: Split) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of all persons seen in both modalities: ids (n,), visible and infrared centers (n, dim) of (N, dim) values."""
    sides = ~images.thermal, images.thermal
    pids = np.intersect1d(*(images.pids[side] for side in sides))
    means = [[values[side & (images.pids == pid)].mean(axis=0) for pid in pids] for side in sides]
    return pids, *map(np.array, means)


def center_distances(values: np.ndarray, images: Split) -> dict[str, float]:
    """What the Hetero-Center loss is meant to move: mean Euclidean distances of visible centers to infrared ones.

    "own": of the same person, "other": of two persons. Empty if fewer than two persons are seen in both modalities.
    """
    pids, visible, thermal = centers(values, images)
    if len(pids) < 2:
        return {}
    found, own = cdist(visible, thermal), np.eye(len(pids), dtype=bool)
    return {"own": float(found[own].mean()), "other": float(found[~own].mean())}


class Results:
    """Scores of several kinds of features under the protocols of a dataset, trial by trial.

    Beside the features stand random rankings, "chance", drawn with ``seed``. ``compare`` turns features of queries and
    of the gallery into distances: a matrix, or `Distances`.

    Attributes:
        counts: {protocol: Counts} of its first trial.
        scores: {(protocol, feature): {trial: Scores}}.
    """

    def __init__(self, dataset: Dataset, seed: int = 1, compare: Callable = Distances):
        self.dataset, self.seed, self.compare = dataset, seed, compare
        self.counts, self.scores = {}, {}

    def add(self, search: Search, images: Split, features: dict[str, np.ndarray]) -> None:
        """Score one trial of one protocol. ``features``: kind -> (N, dim), a row per image. Errors as for `score`."""
        if search.protocol not in self.counts:
            self.counts[search.protocol] = Counts.of(search, images, self.dataset)
        chance = np.random.default_rng([self.seed, search.trial]).random((len(search.query), len(search.gallery)))
        for feature, values in (*features.items(), ("chance", None)):
            distmat = chance if values is None else self.compare(values[search.query], values[search.gallery])
            scores = score_search(search, images, distmat, self.dataset)
            self.scores.setdefault((search.protocol, feature), {})[search.trial] = scores

    def mean_and_std(self, protocol: str, feature: str) -> dict[str, tuple[float, float]]:
        """Mean and deviation over the trials of each of `Scores.measures`."""
        trials = [scores.measures() for scores in self.scores[protocol, feature].values()]
        values = {name: [trial[name] for trial in trials] for name in MEASURES}
        return {name: (float(np.mean(found)), float(np.std(found))) for name, found in values.items()}

    def table(self) -> str:
        """What was ranked, then a row of percentages for each protocol and feature."""
        n_trials = len(next(iter(self.scores.values())))
        lines = [f"{protocol}: {counts}" for protocol, counts in self.counts.items()]
        lines += ["", f"{'protocol':26s}{'features':9s}" + "".join(f"{name:>14s}" for name in MEASURES.values())]
        for key in self.scores:
            pairs = self.mean_and_std(*key).values()
            cells = [f"{100 * mean:.2f}" + f" ± {100 * std:4.2f}" * (n_trials > 1) for mean, std in pairs]
            lines.append(f"{key[0]:26s}{key[1]:9s}" + "".join(f"{cell:>14s}" for cell in cells))
        return "\n".join([*lines, "%" + f", mean ± deviation over {n_trials} trials" * (n_trials > 1)])

    def near_chance(self) -> list[str]:
        """The protocols and features whose rank-1 is below twice what chance gives, in words."""
        rank1 = {key: self.mean_and_std(*key)["rank1"][0] for key in self.scores if key[1] != "chance"}
        low = {key: value for key, value in rank1.items() if value < min(2 * self.counts[key[0]].chance, 1)}
        return [f"{' '.join(key)} {value:.1%}" for key, value in low.items()]

    def log(self, options: list[str], trained: bool = True) -> None:
        """Log the table, and the ``options`` that are not at their default; warn of a trained network near chance."""
        log.info("\n%s%s", self.table(), f"; options: {', '.join(options)}" if options else "")
        low = self.near_chance()
        if trained and low:
            log.warning("rank-1 is below twice chance (%s): is the network trained, and on these data?", ", ".join(low))

    def to_json(self) -> dict:
        rows = []
        for (protocol, feature), found in self.scores.items():
            pairs = self.mean_and_std(protocol, feature).items()
            mean, std = ({name: pair[i] for name, pair in pairs} for i in (0, 1))
            trials = [{"trial": trial, **own._asdict(), "cmc": own.cmc.tolist()} for trial, own in found.items()]
            rows.append({"protocol": protocol, "feature": feature, "mean": mean, "std": std, "trials": trials})
        return {"counts": {protocol: own._asdict() for protocol, own in self.counts.items()}, "results": rows}


# ---- extraction -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def extract_features(net: nn.Module, batches: Iterable[tuple], n: int, kinds=KINDS, flip=False) -> dict:
    """Embed n images: {"fc": (n, parts * low_dim), "pool5": (n, parts * C)}, float arrays.

    Each process of a run embeds its own ``batches``, and all get the features of all.

    Args:
        net: called as ``net(visible=images)`` or ``net(thermal=images)`` in evaluation mode, gives (pool5, fc).
        batches: (modality, rows, images): "visible" or "thermal", the images' places among the n, and normalised
            images (b, 3, height, width) on the device of ``net``.
        kinds: the features to keep.
        flip: average those of the image and of its mirror image, and normalise each of the ``net.num_parts`` stripes.

    FloatingPointError: a feature is not finite.
    """
    was_training, features = net.training, {}
    net.eval()
    for modality, rows, images in batches:
        found = dict(zip(("pool5", "fc"), net(**{modality: images}), strict=True))
        mirrored = dict(zip(("pool5", "fc"), net(**{modality: images.flip(3)}), strict=True)) if flip else {}
        for kind in kinds:
            values = found[kind]
            if flip:
                stripes = (values + mirrored[kind]).unflatten(1, (net.num_parts, -1))
                values = F.normalize(stripes, dim=2).flatten(1)
            values = values.cpu().numpy()
            if not np.isfinite(values).all():
                raise FloatingPointError(f"{kind} features of {modality} images are not finite: the network is broken")
            features.setdefault(kind, np.zeros((n, values.shape[1]), values.dtype))[rows] = values
    net.train(was_training)
    for values in features.values() if dist.is_initialized() else ():
        dist.all_reduce(torch.from_numpy(values))  # each row is zero on all processes but one
    return features
