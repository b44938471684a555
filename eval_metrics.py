"""Features -> distances -> CMC, mAP and mINP -> a table and JSON. numpy arrays in and out.

A smaller distance means more alike. Every measure is computed for each query, and averaged over
the queries that have a match in the gallery (FIDELITY 12). Equal distances keep the order of the
gallery (FIDELITY 17).
"""

# "FIDELITY n" in docstrings and comments is row n of docs/FIDELITY.md.

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from data_manager import DATASETS, Dataset, EvalTrial, Split
from utils import InputError

RANKS = (1, 5, 10, 20)  # the reported ones
MEASURES = {f"rank{rank}": f"rank-{rank}" for rank in RANKS}  # name in files -> name in print
MEASURES |= {"mAP": "mAP", "mINP": "mINP"}
BLOCK_SIZE = 2**18  # distances that are ranked at a time: they stay in the processor's cache

log = logging.getLogger(__name__)


# ---- distances ----------------------------------------------------------------------------------


class Distances:
    """(Q, G) distances of features, computed for some queries at a time: ``distances[rows]``.

    The whole matrix need not fit into memory.

    Args:
        query, gallery: (Q, dim) and (G, dim) features.
        kind: "cosine" is minus the cosine similarity: it gives the ranking of the original code's
            dot product. "euclidean" is the squared distance in float64: it gives the ranking of
            SYSU-MM01's official evaluation.

    Raises:
        InputError: there is no such kind, or a feature is zero, so that it has no cosine.
    """

    KINDS = ("cosine", "euclidean")

    def __init__(self, query: np.ndarray, gallery: np.ndarray, kind: str = "cosine"):
        if kind not in self.KINDS:
            raise InputError(f"there is no distance {kind!r}: give one of {', '.join(self.KINDS)}")
        self.shape = (len(query), len(gallery))
        self.kind = kind
        if kind == "euclidean":
            self.query = query.astype(np.float64, copy=False)
            self.gallery = gallery.astype(np.float64, copy=False)
            self.query_squares = squared_lengths(self.query)
            self.gallery_squares = squared_lengths(self.gallery)
        else:
            self.query = unit_length(query)
            self.gallery = unit_length(gallery)

    def __getitem__(self, rows: slice) -> np.ndarray:
        products = self.query[rows] @ self.gallery.T
        if self.kind == "cosine":
            return -products
        return self.query_squares[rows, None] + self.gallery_squares - 2 * products


def squared_lengths(features: np.ndarray) -> np.ndarray:
    """(N, dim) -> (N,), summed in float64 without a copy of the features."""
    return np.einsum("nd,nd->n", features, features, dtype=np.float64)


def unit_length(features: np.ndarray) -> np.ndarray:
    """(N, dim) features -> (N, dim) of length 1, float32 or wider."""
    features = features.astype(np.promote_types(features.dtype, np.float32), copy=False)
    squares = squared_lengths(features)
    if not ((squares > 0) & np.isfinite(squares)).all():
        raise InputError("a feature is zero or too large for a cosine: compare by another distance")
    return features / np.sqrt(squares).astype(features.dtype)[:, None]


# ---- ranking ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """The scores of a ranking, all in [0, 1]."""

    cmc: np.ndarray  # (max_rank,): [r - 1] is the fraction of queries with a match up to rank r
    mAP: float
    mINP: float

    def measures(self) -> dict[str, float]:
        """Return the reported measures, by the names of `MEASURES`."""
        values = {
            f"rank{rank}": float(self.cmc[rank - 1]) for rank in RANKS if rank <= len(self.cmc)
        }
        values["mAP"] = self.mAP
        values["mINP"] = self.mINP
        return values

    def __str__(self) -> str:
        return "  ".join(f"{MEASURES[name]} {value:.2%}" for name, value in self.measures().items())


class QueryScores(NamedTuple):
    """What the ranking of each query that has a match gives."""

    ahead: np.ndarray  # identities, or images, ahead of the first match
    average_precision: np.ndarray
    inverse_penalty: np.ndarray  # number of matches / rank of the last match


def rank_queries(
    distmat: np.ndarray,
    query_pids: np.ndarray,
    gallery_pids: np.ndarray,
    junk_mask: np.ndarray,
    cmc_by_identity: bool,
) -> QueryScores:
    """Rank the gallery for each query, and return where its matches stand.

    Queries that have no match, or whose matches are all junk, are left out.

    Args:
        distmat: (Q, G) finite distances.
        query_pids: (Q,) person ids.
        gallery_pids: (G,) person ids.
        junk_mask: (Q, G) bool, gallery images that a query ignores.
        cmc_by_identity: count the persons ahead of the first match, not the images.
    """
    distances = np.where(junk_mask, np.inf, distmat)  # junk comes last
    order = np.argsort(distances, axis=1)
    ranked = np.take_along_axis(distances, order, axis=1)
    is_junk = np.isinf(ranked)
    # Only rows with ties need the slower stable sort. It changes ``order``, not ``ranked``.
    has_ties = ((ranked[:, 1:] == ranked[:, :-1]) & ~is_junk[:, 1:]).any(axis=1)
    order[has_ties] = np.argsort(distances[has_ties], axis=1, kind="stable")

    is_match = (gallery_pids[order] == query_pids[:, None]) & ~is_junk
    query, position = np.nonzero(is_match)  # an entry for each match: by query, then by position
    rank = position + 1
    n_matches = np.bincount(query, minlength=len(query_pids))
    # rank[first[q] : last[q] + 1] are the ranks of the matches of query q.
    last = np.cumsum(n_matches) - 1
    first = last - n_matches + 1
    matches_so_far = np.arange(len(query)) - first[query] + 1
    precision = matches_so_far / rank
    precision_sums = np.bincount(query, weights=precision, minlength=len(query_pids))

    has_match = n_matches > 0
    n_matches = n_matches[has_match]
    first_match = position[first[has_match]]
    if cmc_by_identity:
        ahead = count_identities_ahead(order[has_match], gallery_pids, first_match)
    else:
        ahead = first_match
    return QueryScores(
        ahead=ahead,
        average_precision=precision_sums[has_match] / n_matches,
        inverse_penalty=n_matches / rank[last[has_match]],
    )


def count_identities_ahead(
    order: np.ndarray, gallery_pids: np.ndarray, first_match: np.ndarray
) -> np.ndarray:
    """Count the persons who have an image ahead of the first match.

    Args:
        order: (Q, G) the gallery images of each query, the most alike first.
        gallery_pids: (G,) person ids.
        first_match: (Q,) positions in ``order``.

    Returns:
        (Q,) numbers of persons.
    """
    # The inverse of ``order``: where each gallery image stands. Junk stands last.
    position_of_image = np.empty(order.shape, np.int32)
    positions = np.arange(order.shape[1], dtype=np.int32)
    np.put_along_axis(position_of_image, order, positions[None], axis=1)
    by_person = np.argsort(gallery_pids, kind="stable")
    _, start_of_person = np.unique(gallery_pids[by_person], return_index=True)
    # The best position of each person: (Q, persons).
    best_position = np.minimum.reduceat(position_of_image[:, by_person], start_of_person, axis=1)
    return (best_position < first_match[:, None]).sum(axis=1)


def score(
    distmat: np.ndarray | Distances,
    q_pids: np.ndarray,
    g_pids: np.ndarray,
    q_camids: np.ndarray,
    g_camids: np.ndarray,
    *,
    junk_mask: Callable[..., np.ndarray],
    cmc_by_identity: bool,
    max_rank: int = 20,
) -> Scores:
    """Return the scores of a ranking under the protocol of any dataset.

    Args:
        distmat: (Q, G) finite distances.
        q_pids, g_pids: (Q,) and (G,) person ids.
        q_camids, g_camids: (Q,) and (G,) camera numbers.
        junk_mask: (q_pids, q_camids, g_pids, g_camids) -> (Q, G) bool, what a query ignores. It
            is called for some queries at a time.
        cmc_by_identity: CMC counts persons, each at their first image; otherwise images.
        max_rank: length of the CMC. Beyond the gallery it keeps its last value (FIDELITY 13).

    Raises:
        InputError: lengths disagree, a distance is not finite, or no query has a match.
    """
    q_pids = np.asarray(q_pids)
    g_pids = np.asarray(g_pids)
    q_camids = np.asarray(q_camids)
    g_camids = np.asarray(g_camids)
    check_shapes(distmat, q_pids, g_pids, q_camids, g_camids)
    blocks = []
    n_rows = max(64, BLOCK_SIZE // len(g_pids))  # few rows at a time would be slow
    for start in range(0, len(q_pids), n_rows):
        rows = slice(start, start + n_rows)
        distances = distmat[rows]
        if not np.isfinite(distances).all():
            raise InputError("some distances are not finite: the features are too large or broken")
        junk = junk_mask(q_pids[rows], q_camids[rows], g_pids, g_camids)
        block = rank_queries(distances, q_pids[rows], g_pids, junk, cmc_by_identity)
        blocks.append(block)
    ahead = np.concatenate([block.ahead for block in blocks])
    average_precision = np.concatenate([block.average_precision for block in blocks])
    inverse_penalty = np.concatenate([block.inverse_penalty for block in blocks])
    if not len(ahead):
        raise InputError("no query has a match in the gallery")
    cmc = (ahead[:, None] < np.arange(1, max_rank + 1)).mean(axis=0)
    return Scores(cmc, float(average_precision.mean()), float(inverse_penalty.mean()))


def check_shapes(
    distmat: np.ndarray | Distances,
    q_pids: np.ndarray,
    g_pids: np.ndarray,
    q_camids: np.ndarray,
    g_camids: np.ndarray,
) -> None:
    shape = (len(q_pids), len(g_pids))
    camera_shape = (len(q_camids), len(g_camids))
    if distmat.shape != shape or camera_shape != shape or 0 in shape:
        raise InputError(
            f"distmat is {distmat.shape} for {shape[0]} queries and {shape[1]} gallery images "
            f"with {camera_shape} camera numbers"
        )


def eval_sysu(
    distmat: np.ndarray | Distances,
    q_pids: np.ndarray,
    g_pids: np.ndarray,
    q_camids: np.ndarray,
    g_camids: np.ndarray,
    max_rank: int = 20,
) -> Scores:
    """`score` under SYSU-MM01's protocol: camera-3 queries ignore camera 2, CMC by identity."""
    return score(
        distmat,
        q_pids,
        g_pids,
        q_camids,
        g_camids,
        junk_mask=DATASETS["sysu"].junk_mask,
        cmc_by_identity=True,
        max_rank=max_rank,
    )


def eval_regdb(
    distmat: np.ndarray | Distances,
    q_pids: np.ndarray,
    g_pids: np.ndarray,
    max_rank: int = 20,
) -> Scores:
    """`score` under RegDB's protocol: there is no junk, and CMC counts images."""
    return score(
        distmat,
        q_pids,
        g_pids,
        q_camids=np.zeros(len(q_pids)),
        g_camids=np.zeros(len(g_pids)),
        junk_mask=DATASETS["regdb"].junk_mask,
        cmc_by_identity=False,
        max_rank=max_rank,
    )


# ---- trials -------------------------------------------------------------------------------------


def score_trial(
    trial: EvalTrial, images: Split, distmat: np.ndarray | Distances, dataset: Dataset
) -> Scores:
    """`score` of one evaluation trial; ``distmat`` is (Q, G)."""
    query = images.take(trial.query)
    gallery = images.take(trial.gallery)
    return score(
        distmat,
        query.pids,
        gallery.pids,
        query.camids,
        gallery.camids,
        junk_mask=dataset.junk_mask,
        cmc_by_identity=dataset.cmc_by_identity,
    )


@dataclass(frozen=True)
class TrialCounts:
    """How large a trial is. ``chance`` is the expected rank-1 of a random ranking."""

    queries: int
    without_match: int
    gallery_images: int
    gallery_persons: int
    chance: float

    @classmethod
    def of(cls, trial: EvalTrial, images: Split, dataset: Dataset) -> "TrialCounts":
        query = images.take(trial.query)
        gallery = images.take(trial.gallery)
        junk = dataset.junk_mask(query.pids, query.camids, gallery.pids, gallery.camids)
        is_match = (query.pids[:, None] == gallery.pids) & ~junk  # (Q, G)
        n_matches = is_match.sum(axis=1)
        n_ranked = (~junk).sum(axis=1)
        has_match = n_matches > 0
        chance = 0.0
        if has_match.any():
            chance = float((n_matches[has_match] / n_ranked[has_match]).mean())
        return cls(
            queries=len(query),
            without_match=int((~has_match).sum()),
            gallery_images=len(gallery),
            gallery_persons=len(np.unique(gallery.pids)),
            chance=chance,
        )

    def __str__(self) -> str:
        return (
            f"{self.queries} queries ({self.without_match} without a match, not counted), "
            f"{self.gallery_images} gallery images of {self.gallery_persons} persons"
        )


def check_trials(trials: list[EvalTrial], images: Split, dataset: Dataset) -> None:
    """Check, before any image is embedded, that queries have matches in the gallery.

    Warn if chance is 100%, as it is with a gallery of one person. The first trial of each protocol
    is checked: the others have the same persons and cameras.

    Raises:
        InputError: no query has a match.
    """
    first_trials = {}
    for trial in trials:
        first_trials.setdefault(trial.protocol, trial)
    for protocol, trial in first_trials.items():
        counts = TrialCounts.of(trial, images, dataset)
        if counts.without_match == counts.queries:
            query = images.take(trial.query)
            gallery = images.take(trial.gallery)
            reason = "no person is in both"
            if len(np.intersect1d(query.pids, gallery.pids)):
                reason = dataset.junk_rule
            raise InputError(
                f"{protocol}: no query has a match in the gallery: {reason} (query cameras: "
                f"{np.unique(query.camids)}, gallery cameras: {np.unique(gallery.camids)})"
            )
        if counts.chance == 1:
            log.warning(
                "%s: even a random ranking has 100%% rank-1: %s: are any persons missing?",
                protocol,
                counts,
            )


def modality_centers(
    features: np.ndarray, images: Split
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the centers of all persons who were seen in both modalities.

    Args:
        features: (N, dim).
        images: the N images.

    Returns:
        (P,) person ids, (P, dim) visible centers, (P, dim) infrared centers.
    """
    pids = np.intersect1d(images.pids[images.thermal], images.pids[~images.thermal])
    visible_centers = []
    thermal_centers = []
    for pid in pids:
        is_of_person = images.pids == pid
        visible_centers.append(features[is_of_person & ~images.thermal].mean(axis=0))
        thermal_centers.append(features[is_of_person & images.thermal].mean(axis=0))
    return pids, np.array(visible_centers), np.array(thermal_centers)


def center_distances(features: np.ndarray, images: Split) -> dict[str, float]:
    """Return mean Euclidean distances between visible centers and infrared ones.

    Returns:
        {"own": of the same person, "other": of two persons}; {} if fewer than two persons were
        seen in both modalities.
    """
    pids, visible, thermal = modality_centers(features, images)
    if len(pids) < 2:
        return {}
    distances = np.array([np.linalg.norm(center - thermal, axis=1) for center in visible])  # (P, P)
    is_same_person = np.eye(len(pids), dtype=bool)
    return {
        "own": float(distances[is_same_person].mean()),
        "other": float(distances[~is_same_person].mean()),
    }


# ---- results ------------------------------------------------------------------------------------


class Results:
    """Scores of several kinds of features under the protocols of a dataset, trial by trial.

    A further kind, "chance", has the scores of random rankings, drawn with ``seed``.

    Args:
        dataset: defines the protocols.
        seed: for the random rankings.
        compare: (query features, gallery features) -> (Q, G) distances.

    Attributes:
        counts: {protocol: `TrialCounts` of its first trial}.
        scores: {(protocol, kind of features): {trial: `Scores`}}.
    """

    def __init__(self, dataset: Dataset, seed: int = 1, compare: Callable = Distances):
        self.dataset = dataset
        self.seed = seed
        self.compare = compare
        self.counts: dict[str, TrialCounts] = {}
        self.scores: dict[tuple[str, str], dict[int, Scores]] = {}

    def add(self, trial: EvalTrial, images: Split, features: dict[str, np.ndarray]) -> None:
        """Score one trial of one protocol. ``features``: kind -> (N, dim), a row for each image."""
        if trial.protocol not in self.counts:
            self.counts[trial.protocol] = TrialCounts.of(trial, images, self.dataset)
        for kind, values in features.items():
            distmat = self.compare(values[trial.query], values[trial.gallery])
            self.add_scores(trial, images, kind, distmat)
        rng = np.random.default_rng([self.seed, trial.number])
        random_distances = rng.random((len(trial.query), len(trial.gallery)))
        self.add_scores(trial, images, "chance", random_distances)

    def add_scores(
        self, trial: EvalTrial, images: Split, kind: str, distmat: np.ndarray | Distances
    ) -> None:
        trials = self.scores.setdefault((trial.protocol, kind), {})
        trials[trial.number] = score_trial(trial, images, distmat, self.dataset)

    def mean_and_std(self, protocol: str, kind: str) -> tuple[dict[str, float], dict[str, float]]:
        """Return mean and population standard deviation of each measure over the trials."""
        trials = [scores.measures() for scores in self.scores[protocol, kind].values()]
        mean = {}
        std = {}
        for name in MEASURES:
            values = [measures[name] for measures in trials]
            mean[name] = float(np.mean(values))
            std[name] = float(np.std(values))
        return mean, std

    def table(self) -> str:
        """Return what was ranked, then a row of percentages for each protocol and kind."""
        lines = [f"{protocol}: {counts}" for protocol, counts in self.counts.items()]
        heads = "".join(f"{name:>14s}" for name in MEASURES.values())
        lines += ["", f"{'protocol':26s}{'features':9s}{heads}"]
        n_trials = max(len(trials) for trials in self.scores.values())
        for protocol, kind in self.scores:
            mean, std = self.mean_and_std(protocol, kind)
            cells = ""
            for name in MEASURES:
                cell = f"{100 * mean[name]:.2f}"
                if n_trials > 1:
                    cell += f" ± {100 * std[name]:4.2f}"
                cells += f"{cell:>14s}"
            lines.append(f"{protocol:26s}{kind:9s}{cells}")
        unit = "%"
        if n_trials > 1:
            unit += f", mean ± deviation over {n_trials} trials"
        return "\n".join([*lines, unit])

    def near_chance(self) -> list[str]:
        """Describe each protocol and kind whose rank-1 is below twice that of chance."""
        words = []
        for protocol, kind in self.scores:
            mean, _ = self.mean_and_std(protocol, kind)
            limit = min(2 * self.counts[protocol].chance, 1)
            if kind != "chance" and mean["rank1"] < limit:
                words.append(f"{protocol} {kind} {mean['rank1']:.1%}")
        return words

    def report(self, options: list[str], trained: bool = True) -> None:
        """Log the table and the ``options`` in use; warn of a trained network near chance."""
        used = ""
        if options:
            used = f"; options: {', '.join(options)}"
        log.info("\n%s%s", self.table(), used)
        low = self.near_chance()
        if trained and low:
            log.warning(
                "rank-1 is below twice chance (%s): is the network trained, and on these data?",
                ", ".join(low),
            )

    def to_json(self) -> dict:
        """Return all scores as plain types."""
        rows = []
        for (protocol, kind), trials in self.scores.items():
            mean, std = self.mean_and_std(protocol, kind)
            trial_rows = []
            for trial, scores in trials.items():
                trial_rows.append({"trial": trial, **asdict(scores), "cmc": scores.cmc.tolist()})
            rows.append(
                {
                    "protocol": protocol,
                    "feature": kind,
                    "mean": mean,
                    "std": std,
                    "trials": trial_rows,
                }
            )
        counts = {protocol: asdict(counts) for protocol, counts in self.counts.items()}
        return {"counts": counts, "results": rows}
