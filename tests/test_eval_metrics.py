"""Ranking, distances, counts and re-ranking, each held to its definition."""

import dataclasses
import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from data_manager import DATASETS, EvalTrial, Split, no_junk, split_of_rows
from eval_metrics import (
    Distances,
    Results,
    Scores,
    TrialCounts,
    eval_regdb,
    eval_sysu,
    rank_queries,
    score,
    score_trial,
)
from tools.score import rerank

SYSU = DATASETS["sysu"]
REGDB = DATASETS["regdb"]
LLCM = DATASETS["llcm"]


# ---- ranking ------------------------------------------------------------------------------------


def rank_one_query(
    distances, q_pid, g_pids, is_junk, cmc_by_identity
) -> tuple[int, float, float] | None:
    """The definition, for one query. None: the gallery has no match that is not junk.

    Returns:
        The persons, or the images, ahead of the first match; the average precision; the inverse
        negative penalty.
    """
    ranked = [i for i in range(len(g_pids)) if not is_junk[i]]
    ranked.sort(key=lambda i: distances[i])  # stable: equal distances keep the gallery's order
    first_rank = None
    last_rank = None
    persons_ahead = set()
    precisions = []
    for rank, i in enumerate(ranked, start=1):
        if g_pids[i] == q_pid:
            if first_rank is None:
                first_rank = rank
            last_rank = rank
            n_matches = len(precisions) + 1
            precisions.append(n_matches / rank)
        elif first_rank is None:
            persons_ahead.add(g_pids[i])
    if first_rank is None:
        return None
    images_ahead = first_rank - 1
    ahead = len(persons_ahead) if cmc_by_identity else images_ahead
    average_precision = sum(precisions) / len(precisions)
    inverse_penalty = len(precisions) / last_rank
    return ahead, average_precision, inverse_penalty


def rank_by_definition(
    distmat, q_pids, g_pids, junk_mask, cmc_by_identity
) -> tuple[list[int], np.ndarray]:
    """Which queries have a match; what `rank_one_query` says of these, a row each."""
    matched = []
    rows = []
    for i, pid in enumerate(q_pids.tolist()):
        row = rank_one_query(
            distmat[i].tolist(), pid, g_pids.tolist(), junk_mask[i], cmc_by_identity
        )
        if row is not None:
            matched.append(i)
            rows.append(row)
    return matched, np.array(rows).reshape(-1, 3)


def check_scores(scores: Scores, expected_rows: np.ndarray, max_rank: int) -> None:
    """The scores of a ranking are the means of the queries that have a match."""
    ahead, average_precision, inverse_penalty = expected_rows.T
    cmc = [np.mean(ahead < rank) for rank in range(1, max_rank + 1)]
    np.testing.assert_allclose(scores.cmc, cmc, rtol=0, atol=1e-12)
    np.testing.assert_allclose(scores.mAP, average_precision.mean(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(scores.mINP, inverse_penalty.mean(), rtol=0, atol=1e-12)


# Few values, so that many distances are equal. The last two are neighbours, or nearly so: a type of
# lower precision would take them for equal.
FEW_VALUES = {
    np.float16: [-1.0, -0.0, 0.0, 65504.0, 0.5, 0.5 + 2**-11],
    np.float32: [-1.0, -0.0, 0.0, 2.0**127, 0.5, 0.5 + 2**-24],
    np.float64: [-1.0, -0.0, 0.0, 1e308, 0.5, 0.5 + 2**-53],
    np.int8: [-128, 0, 126, 127],
    np.int64: [-1, 0, 2**40, 2**40 + 1],
}


@dataclasses.dataclass
class SmallRanking:
    distmat: np.ndarray
    q_pids: np.ndarray
    g_pids: np.ndarray
    junk_mask: np.ndarray
    cmc_by_identity: bool


@st.composite
def small_rankings(draw) -> SmallRanking:
    """Few persons, some of them absent from the gallery; any image may be junk."""
    n_queries = draw(st.integers(1, 5))
    n_gallery = draw(st.integers(1, 12))
    shape = (n_queries, n_gallery)
    dtype = draw(st.sampled_from(list(FEW_VALUES)))
    values = draw(st.lists(st.sampled_from(FEW_VALUES[dtype]), min_size=1, max_size=4))
    n_persons = draw(st.integers(1, 6))
    person_ids = st.integers(0, n_persons)
    return SmallRanking(
        distmat=draw(hnp.arrays(dtype, shape, elements=st.sampled_from(values))),
        q_pids=draw(hnp.arrays(np.int64, n_queries, elements=person_ids)),
        g_pids=draw(hnp.arrays(np.int64, n_gallery, elements=person_ids)),
        junk_mask=draw(hnp.arrays(bool, shape)),
        cmc_by_identity=draw(st.booleans()),
    )


@given(case=small_rankings())
def test_rank_queries_is_the_definition_query_by_query(case):
    matched, expected_rows = rank_by_definition(
        case.distmat, case.q_pids, case.g_pids, case.junk_mask, case.cmc_by_identity
    )
    ahead, average_precision, inverse_penalty = rank_queries(
        case.distmat[matched],
        case.q_pids[matched],
        case.g_pids,
        case.junk_mask[matched],
        case.cmc_by_identity,
    )
    np.testing.assert_array_equal(ahead, expected_rows[:, 0])
    np.testing.assert_allclose(average_precision, expected_rows[:, 1], rtol=0, atol=1e-12)
    np.testing.assert_allclose(inverse_penalty, expected_rows[:, 2], rtol=0, atol=1e-12)


@given(case=small_rankings(), max_rank=st.integers(1, 20))
def test_score_averages_over_the_queries_that_have_a_match(case, max_rank):
    """Beyond the gallery the CMC keeps its last value."""
    matched, expected_rows = rank_by_definition(
        case.distmat, case.q_pids, case.g_pids, case.junk_mask, case.cmc_by_identity
    )
    n_queries, n_gallery = case.distmat.shape
    query_numbers = np.arange(n_queries)  # in place of cameras: they tell the rows of the junk

    def junk_mask(q_pids, q_camids, g_pids, g_camids) -> np.ndarray:
        return case.junk_mask[q_camids]

    score_case = functools.partial(
        score,
        case.distmat,
        case.q_pids,
        case.g_pids,
        query_numbers,
        np.zeros(n_gallery),
        junk_mask=junk_mask,
        cmc_by_identity=case.cmc_by_identity,
        max_rank=max_rank,
    )
    if matched:
        check_scores(score_case(), expected_rows, max_rank)
    else:
        with pytest.raises(ValueError, match="no query has a match"):
            score_case()


@dataclasses.dataclass
class LargeRanking:
    distmat: np.ndarray
    q_pids: np.ndarray
    g_pids: np.ndarray
    q_camids: np.ndarray
    g_camids: np.ndarray

    def columns(self) -> tuple[np.ndarray, ...]:
        return self.q_pids, self.g_pids, self.q_camids, self.g_camids


LARGE_KINDS = ["no ties", "integers", "float32 ties", "float16"]


def large_ranking(seed: int, kind: str) -> LargeRanking:
    """Up to 300 queries, the first of which has a match under every rule of `JUNK_RULES`."""
    rng = np.random.default_rng(seed)
    n_queries = rng.integers(1, 300)
    n_gallery = rng.integers(2, 80)
    n_persons = rng.integers(1, 25)
    shape = (n_queries, n_gallery)
    distances_of_kinds = {
        "no ties": rng.random(shape),
        "integers": rng.integers(0, 5, shape),
        "float32 ties": rng.integers(0, 9, shape).astype(np.float32),
        "float16": rng.standard_normal(shape).astype(np.float16),
    }
    case = LargeRanking(
        distmat=distances_of_kinds[kind],
        q_pids=rng.integers(0, n_persons, n_queries),
        g_pids=rng.integers(0, n_persons, n_gallery),
        q_camids=rng.integers(1, 7, n_queries),
        g_camids=rng.integers(1, 7, n_gallery),
    )
    case.q_pids[0] = case.g_pids[0]
    case.q_camids[0] = 6
    case.g_camids[0] = 1
    return case


# The mask of a dataset, and the same rule for one query and one gallery image.
JUNK_RULES = {
    "camera 2 for camera 3": (
        SYSU.junk_mask,
        lambda q_pid, q_camid, g_pid, g_camid: q_camid == 3 and g_camid == 2,
    ),
    "no junk": (REGDB.junk_mask, lambda q_pid, q_camid, g_pid, g_camid: False),
    "own person in own camera": (
        LLCM.junk_mask,
        lambda q_pid, q_camid, g_pid, g_camid: q_pid == g_pid and q_camid == g_camid,
    ),
}


def junk_by_rule(case: LargeRanking, is_junk) -> np.ndarray:
    """(Q, G) bool, pair by pair."""
    mask = np.zeros(case.distmat.shape, bool)
    for i, j in np.ndindex(mask.shape):
        mask[i, j] = is_junk(case.q_pids[i], case.q_camids[i], case.g_pids[j], case.g_camids[j])
    return mask


@pytest.mark.parametrize("cmc_by_identity", [True, False])
@pytest.mark.parametrize("rule", JUNK_RULES)
@pytest.mark.parametrize("kind", LARGE_KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_rankings_of_whole_lists_in_blocks_of_queries(
    seed, kind, rule, cmc_by_identity, monkeypatch
):
    case = large_ranking(seed, kind)
    junk_mask, is_junk = JUNK_RULES[rule]
    junk = junk_by_rule(case, is_junk)
    _, expected_rows = rank_by_definition(
        case.distmat, case.q_pids, case.g_pids, junk, cmc_by_identity
    )
    at_once = score(
        case.distmat, *case.columns(), junk_mask=junk_mask, cmc_by_identity=cmc_by_identity
    )
    check_scores(at_once, expected_rows, max_rank=20)

    block_lengths = []

    def recording_mask(q_pids, q_camids, g_pids, g_camids) -> np.ndarray:
        block_lengths.append(len(q_pids))
        return junk_mask(q_pids, q_camids, g_pids, g_camids)

    monkeypatch.setattr("eval_metrics.BLOCK_SIZE", 1)
    in_blocks = score(
        case.distmat, *case.columns(), junk_mask=recording_mask, cmc_by_identity=cmc_by_identity
    )
    check_scores(in_blocks, expected_rows, max_rank=20)
    assert max(block_lengths) <= 64
    assert sum(block_lengths) == len(case.q_pids)


def test_large_rankings_have_several_blocks_and_queries_without_a_match():
    """So that the test above means something."""
    cases = [large_ranking(seed, "integers") for seed in range(3)]
    assert max(len(case.q_pids) for case in cases) > 128
    n_without_match = [np.sum(~np.isin(case.q_pids, case.g_pids)) for case in cases]
    assert max(n_without_match) > 0


@pytest.mark.parametrize("kind", ["integers", "float16"])
def test_eval_sysu_and_eval_regdb_are_the_rules_of_their_datasets(kind):
    case = large_ranking(0, kind)
    _, is_junk = JUNK_RULES["camera 2 for camera 3"]
    junk = junk_by_rule(case, is_junk)
    _, sysu_rows = rank_by_definition(case.distmat, case.q_pids, case.g_pids, junk, True)
    check_scores(eval_sysu(case.distmat, *case.columns()), sysu_rows, max_rank=20)

    no_image = np.zeros(case.distmat.shape, bool)
    _, regdb_rows = rank_by_definition(case.distmat, case.q_pids, case.g_pids, no_image, False)
    check_scores(eval_regdb(case.distmat, case.q_pids, case.g_pids, 9), regdb_rows, max_rank=9)


def test_input_that_cannot_be_ranked_is_an_error():
    distmat = np.ones((2, 3))
    pids = np.arange(3)
    with pytest.raises(ValueError, match="no query has a match"):
        eval_regdb(distmat, pids[:2] + 10, pids)
    with pytest.raises(ValueError, match="2 gallery images"):
        eval_regdb(distmat, pids[:2], pids[:2])
    with pytest.raises(ValueError, match="3 queries"):
        eval_regdb(distmat, pids, pids)
    with pytest.raises(ValueError, match="0 gallery images"):
        eval_regdb(distmat[:, :0], pids[:2], pids[:0])
    for value in (np.nan, np.inf, -np.inf):
        distmat[1, 2] = value
        with pytest.raises(ValueError, match="not finite"):
            eval_regdb(distmat, pids[:2], pids)


# ---- distances ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "factor"),
    [(np.float16, 1), (np.float16, 300), (np.float32, 1), (np.float32, 1e25)],
)
def test_distances_of_some_rows(dtype, factor):
    x = np.random.default_rng(0).standard_normal((9, 500)) / 30
    directions = x / np.linalg.norm(x, axis=1, keepdims=True)
    features = (x * factor).astype(dtype)
    cosine = Distances(features[:6], features)
    euclidean = Distances(features[:6], features, "euclidean")
    assert cosine.shape == (6, 9)
    assert euclidean.shape == (6, 9)
    for rows in (slice(0, 2), slice(2, 6)):
        expected = -directions[rows] @ directions.T
        np.testing.assert_allclose(cosine[rows], expected, atol=1e-3)
        differences = features[rows, None].astype(float) - features.astype(float)
        squares = (differences**2).sum(axis=2)
        np.testing.assert_allclose(euclidean[rows], squares, rtol=1e-9, atol=1e-9 * factor**2)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_cosines_are_computed_in_float32_at_least(dtype):
    features = np.random.default_rng(0).standard_normal((9, 500)).astype(dtype)
    exact = features.astype(float)
    directions = exact / np.linalg.norm(exact, axis=1, keepdims=True)
    cosine = Distances(features, features)[:]
    np.testing.assert_allclose(cosine, -directions @ directions.T, rtol=0, atol=1e-6)


def test_a_feature_without_a_direction_has_no_cosine():
    features = np.eye(3)
    with pytest.raises(ValueError, match="a feature is zero"):
        Distances(features, 0 * features)
    with pytest.raises(ValueError, match="too large for a cosine"):
        Distances(1e200 * features, features)
    with pytest.raises(ValueError, match="no distance 'cos': give one of cosine, euclidean"):
        Distances(features, features, "cos")


# ---- re-ranking ---------------------------------------------------------------------------------


def rerank_by_definition(
    query: np.ndarray, gallery: np.ndarray, k1: int, k2: int, weight: float
) -> np.ndarray:
    """Re-ranking in the paper's words (Zhong et al. 2017, sections 3.2 to 3.5), image by image."""
    features = np.concatenate([query, gallery])
    distances = ((features[:, None] - features) ** 2).sum(axis=2)
    distances /= distances.max(axis=1, keepdims=True)
    nearest = np.argsort(distances, axis=1, kind="stable").tolist()

    def reciprocal_neighbours(i: int, k: int) -> set[int]:
        return {j for j in nearest[i][: k + 1] if i in nearest[j][: k + 1]}

    memberships = np.zeros(distances.shape)
    for i in range(len(features)):
        neighbours = reciprocal_neighbours(i, k1)
        expanded = set(neighbours)
        for j in neighbours:
            smaller = reciprocal_neighbours(j, round(k1 / 2))
            if len(smaller & neighbours) > 2 / 3 * len(smaller):
                expanded |= smaller
        members = sorted(expanded)
        weights = np.exp(-distances[i, members])
        memberships[i, members] = weights / weights.sum()
    memberships = np.array([memberships[row[:k2]].mean(axis=0) for row in nearest])

    of_query = memberships[: len(query), None]
    of_gallery = memberships[len(query) :]
    intersection = np.minimum(of_query, of_gallery).sum(axis=2)
    union = np.maximum(of_query, of_gallery).sum(axis=2)
    jaccard = 1 - intersection / union
    return (1 - weight) * jaccard + weight * distances[: len(query), len(query) :]


@pytest.mark.parametrize("kind", Distances.KINDS)
@pytest.mark.parametrize(
    ("n_query", "n_gallery", "k1", "k2"), [(25, 40, 20, 6), (30, 20, 5, 1), (3, 6, 7, 3)]
)
def test_reranking_against_its_definition(n_query, n_gallery, k1, k2, kind):
    rng = np.random.default_rng(n_query)
    persons = rng.standard_normal((8, 6)) * 1.5
    query = persons[rng.integers(0, 8, n_query)] + rng.standard_normal((n_query, 6))
    gallery = persons[rng.integers(0, 8, n_gallery)] + rng.standard_normal((n_gallery, 6))
    reranked = rerank(query, gallery, kind, k1, k2, 0.3)
    if kind == "cosine":  # half of the squared distance of the directions, which ranks the same
        query = query / np.linalg.norm(query, axis=1, keepdims=True)
        gallery = gallery / np.linalg.norm(gallery, axis=1, keepdims=True)
    expected = rerank_by_definition(query, gallery, k1, k2, 0.3)
    np.testing.assert_allclose(reranked, expected, atol=1e-6)


# ---- trials -------------------------------------------------------------------------------------


def images_of_a_trial() -> Split:
    """Gallery images of the persons 1, 1, 2, then queries of 1, 2, 1, 9."""
    return split_of_rows(
        [
            ("0", 1, 1, False),
            ("1", 1, 4, False),
            ("2", 2, 2, False),
            ("3", 1, 3, True),
            ("4", 2, 3, True),
            ("5", 1, 6, True),
            ("6", 9, 6, True),
        ]
    )


TRIAL = EvalTrial("all-search single-shot", 0, query=np.arange(3, 7), gallery=np.arange(3))


def test_counts_and_chance_by_hand():
    """The image of camera 2 is junk for the queries of camera 3: person 2 has no match."""
    counts = TrialCounts.of(TRIAL, images_of_a_trial(), SYSU)
    assert counts.queries == 4
    assert counts.without_match == 2
    assert counts.gallery_images == 3
    assert counts.gallery_persons == 2
    # Matches / images that are not junk, of the two queries of person 1.
    assert counts.chance == pytest.approx(np.mean([2 / 2, 2 / 3]))


def test_counts_follow_the_junk_mask_of_the_entry():
    another = dataclasses.replace(SYSU, junk_mask=no_junk)
    counts = TrialCounts.of(TRIAL, images_of_a_trial(), another)
    assert counts.without_match == 1
    assert counts.chance == pytest.approx(np.mean([2 / 3, 1 / 3, 2 / 3]))


@pytest.mark.parametrize(
    ("changes", "rank_of_match", "average_precision"),
    [
        ({}, 2, 1 / 3),
        ({"cmc_by_identity": False}, 3, 1 / 3),
        ({"junk_mask": no_junk}, 1, (1 / 1 + 2 / 4) / 2),
    ],
)
def test_scores_follow_the_entry_of_the_dataset(changes, rank_of_match, average_precision):
    """A query of person 1, camera 3. Gallery, nearest first: 1 in camera 2, 2, 2, then 1 again."""
    images = split_of_rows(
        [
            ("0", 1, 3, True),
            ("1", 1, 2, False),
            ("2", 2, 1, False),
            ("3", 2, 1, False),
            ("4", 1, 1, False),
        ]
    )
    trial = EvalTrial("all-search single-shot", 0, query=np.array([0]), gallery=np.arange(1, 5))
    dataset = dataclasses.replace(SYSU, **changes)
    scores = score_trial(trial, images, np.array([[0.1, 0.2, 0.3, 0.4]]), dataset)
    expected_cmc = np.arange(1, 21) >= rank_of_match
    np.testing.assert_array_equal(scores.cmc, expected_cmc)
    assert scores.mAP == pytest.approx(average_precision)


def test_results_average_the_trials_of_each_protocol():
    """In the second of two trials, gallery images have the features of the other person."""
    images = images_of_a_trial()
    good = np.array([[1, 0], [1, 0], [0, 1], [1, 0], [0, 1], [1, 0], [1, 1]], float)
    worse = np.array([[0, 1], [0, 1], [1, 0], [1, 0], [0, 1], [1, 0], [1, 1]], float)
    results = Results(SYSU)
    for number, features in enumerate((good, worse)):
        trial = dataclasses.replace(TRIAL, number=number)
        results.add(trial, images, {"fc": features})
    # Camera 3's query ignores person 2; camera 6's has person 2 ahead in the second trial.
    mean, std = results.mean_and_std(TRIAL.protocol, "fc")
    assert mean["rank1"] == pytest.approx(np.mean([1, 1 / 2]))
    assert std["rank1"] == pytest.approx(np.std([1, 1 / 2]))
    second_mAP = np.mean([1, (1 / 2 + 2 / 3) / 2])
    assert mean["mAP"] == pytest.approx(np.mean([1, second_mAP]))
    assert mean["mINP"] == pytest.approx(np.mean([1, np.mean([1, 2 / 3])]))


@pytest.mark.parametrize(
    ("chance", "rank1", "is_near_chance"),
    [(0.1, 0.19, True), (0.1, 0.21, False), (0.7, 0.99, True), (0.7, 1.0, False)],
)
def test_below_twice_chance_is_near_chance(chance, rank1, is_near_chance):
    results = Results(SYSU)
    results.counts["all"] = TrialCounts(
        queries=9, without_match=0, gallery_images=9, gallery_persons=9, chance=chance
    )
    for kind in ("fc", "chance"):
        results.scores["all", kind] = {0: Scores(np.full(20, rank1), mAP=0.5, mINP=0.5)}
    expected = [f"all fc {rank1:.1%}"] if is_near_chance else []
    assert results.near_chance() == expected
