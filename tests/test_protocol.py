"""The protocols: which images search where, how a ranking is scored, and how features in files get there."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from conftest import features_file, golden, only

import data_loader
import data_manager
from data_manager import DATASETS, Search, Split, check_counts, sysu_gallery, sysu_query, sysu_test
from eval_metrics import Counts, Distances, eval_regdb, eval_sysu, rank_fast, rank_plainly, score, score_search
from tools.score import official, rerank

SYSU, REGDB, LLCM = map(DATASETS.get, ("sysu", "regdb", "llcm"))
LISTS = golden("sysu_lists.json")


# ---- lists ----------------------------------------------------------------------------------------------------------


def relative(split: Split, root: Path) -> dict[str, list]:
    paths = [Path(path).relative_to(root).as_posix() for path in split.paths]
    np.testing.assert_array_equal(split.thermal, ["Thermal" in p or p.startswith(("cam3", "cam6")) for p in paths])
    return {"paths": paths, "ids": split.pids.tolist(), "cams": split.camids.tolist()}


@pytest.mark.parametrize("mode", ["all", "indoor"])
def test_sysu_lists_are_the_published_ones(golden_tree, mode):
    """Queries, and the galleries that the published code draws first, from seed 1."""
    assert relative(sysu_query(str(golden_tree), mode), golden_tree) == LISTS[f"query_{mode}"]
    for shots in ("single", "multi"):
        gallery = sysu_gallery(str(golden_tree), mode, shots, trial=1)
        assert relative(gallery, golden_tree) == LISTS[f"gallery_{mode}_{shots}_first_call"]


def test_multi_shot_takes_what_there_is(sysu_tree, caplog):
    gallery = sysu_gallery(str(sysu_tree), "all", "multi")
    test_ids = sorted({*gallery.pids.tolist()})
    files = [path for pid in test_ids for cam in (1, 2, 4, 5) for path in sysu_tree.glob(f"cam{cam}/{pid:04d}/*.jpg")]
    assert files and sorted(gallery.paths) == sorted(map(str, files))
    assert caplog.text.count("fewer than 10 gallery images") == 1


def test_sysu_training_lists_and_labels(golden_tree, tmp_path, caplog):
    """Those of the published code, whatever else lies about; persons of one modality are left out."""
    tree, expected = shutil.copytree(golden_tree, tmp_path / "tree"), LISTS["preprocess"]
    for stray in ("cam1/0002/Thumbs.db", "cam1/0002/._0001.jpg", "cam3/0002/notes.txt", "cam2/readme.txt"):
        (tree / stray).parent.mkdir(exist_ok=True)
        (tree / stray).write_text("not an image")
    visible, thermal = data_manager.sysu_train(str(tree))
    assert relative(visible, tree)["paths"] == expected["train_rgb_paths"]
    assert relative(thermal, tree)["paths"] == expected["train_ir_paths"]
    labels = dict(zip(visible.pids.tolist(), data_manager.relabel(visible.pids).tolist(), strict=True))
    assert labels == {int(pid): label for pid, label in expected["pid2label_if_sorted"].items()}
    for cam in (3, 6):
        shutil.rmtree(tree / f"cam{cam}" / "0006", ignore_errors=True)
    assert all({*split.pids} == {*visible.pids} - {6} for split in data_manager.sysu_train(str(tree)))
    assert "one modality only: persons [6]" in caplog.text


@pytest.mark.parametrize(
    ("name", "trial", "files"),
    [
        ("regdb", 1, ("train_visible_1.txt", "train_thermal_1.txt")),
        ("regdb", 10, ("test_visible_10.txt", "test_thermal_10.txt")),
        ("llcm", None, ("train_vis.txt", "train_nir.txt")),
    ],
)
def test_lists_are_read_line_by_line(request, name, trial, files):
    tree, dataset = request.getfixturevalue(f"{name}_tree"), DATASETS[name]
    train = files[0].startswith("train")
    images = data_manager.joined(*dataset.train(str(tree), trial)) if train else dataset.test(str(tree), trial)
    lines = [f"{Path(path).relative_to(tree)} {pid}" for path, pid in zip(images.paths, images.pids, strict=True)]
    visible, thermal = ((tree / "idx" / file).read_text().splitlines() for file in files)
    assert lines == visible + thermal and images.thermal.tolist() == [False] * len(visible) + [True] * len(thermal)


def test_numbers_unlike_the_real_datasets(caplog):
    """Told where there are about as many persons as in the real one."""
    for name, persons in (("sysu", 20), ("sysu", 80), ("sysu", 90), ("regdb", 205), ("regdb", 206)):
        caplog.clear()
        thermal, pids = np.tile(np.repeat([False, True], 10), persons), np.repeat(np.arange(persons), 20)
        check_counts(made_up(pids, 1 + 2 * thermal, thermal), DATASETS[name], "test")
        assert ("is it complete?" in caplog.text) == (persons in (90, 205))


# ---- SYSU-MM01's official evaluation, the baseline's and LLCM's, on synthetic features ------------------------------
# The numbers in tests/golden/official were computed by the official MATLAB code and by the baseline's.

SETS = {"main": (20170, 16, 0.75, 2.0**-20), "ties": (31337, 6, 0.45, 0.5)}  # seed, dimensions, noise, rounding
GALL_MODE = {1: "single", 10: "multi"}


def numbers(split: Split) -> list[int]:
    """Which image of its person and camera each is."""
    return [int(Path(path).stem) for path in split.paths]


def synthetic(kind: str, split: Split) -> np.ndarray:
    """What the numbers were computed on; rounded so that squared distances are exact."""
    seed, dim, noise, quantum = SETS[kind]
    features, place = np.empty((len(split.paths), dim)), np.array(numbers(split)) - 1
    for cam, pid in {*zip(split.camids.tolist(), split.pids.tolist(), strict=True)}:
        rows = (split.camids == cam) & (split.pids == pid)
        person, camera = (np.random.default_rng([seed, *own]).standard_normal(dim) for own in ((1, pid), (2, cam)))
        image = np.random.default_rng([seed, 3, cam, pid]).standard_normal((rows.sum(), dim))
        features[rows] = (np.round((person + 0.5 * camera + noise * image) / quantum) * quantum)[place[rows]]
    return features


@pytest.fixture(scope="module")
def images() -> Split:
    """All test images of SYSU-MM01, without the pixels."""
    counts, rows = golden("official/images.json"), []
    for pid, numbers in zip(counts["test_ids"], counts["images"], strict=True):
        for cam, n in enumerate(numbers, 1):
            rows += [(f"cam{cam}/{pid:04d}/{image:04d}.jpg", pid, cam, cam in (3, 6)) for image in range(1, n + 1)]
    paths, *columns = zip(*rows, strict=True)
    return Split([*paths], *map(np.array, columns))


@pytest.fixture(scope="module")
def rand_perm(images, tmp_path_factory) -> Path:
    """The authors' rand_perm_cam.mat as far as the official galleries tell: the first ten of each permutation."""
    cells = np.empty((6, 1), dtype=object)
    for cam in range(6):
        cells[cam, 0] = np.empty((333, 1), dtype=object)
        for pid in range(333):
            cells[cam, 0][pid, 0] = np.empty((0, 0), dtype=np.uint8)
    g = golden("official/official_all_search_10.npz")
    firsts = g["gallery_img"].reshape(10, -1, 10).swapaxes(0, 1)
    for pid, cam, first in zip(g["gallery_id"][::10], g["gallery_cam"][::10], firsts, strict=True):
        n = ((images.pids == pid) & (images.camids == cam)).sum()
        rest = [np.setdiff1d(np.arange(1, n + 1), row) for row in first]
        cells[cam - 1, 0][pid - 1, 0] = np.hstack([first, rest]).astype(np.uint8)
    path = tmp_path_factory.mktemp("mat") / "rand_perm_cam.mat"
    scipy.io.savemat(path, {"rand_perm_cam": cells})
    return path


@pytest.mark.parametrize("mode", ["all", "indoor"])
@pytest.mark.parametrize(
    ("code", "kind", "shots", "trials"),
    [
        ("official", "main", 1, range(10)),
        ("official", "main", 10, (0, 7)),
        ("ties/official", "ties", 1, (4,)),
        ("ties/official", "ties", 10, (4,)),
        ("agw", "main", 1, range(10)),  # the baseline's: seeded galleries
    ],
)
def test_official_galleries_and_scores(images, rand_perm, mode, code, kind, shots, trials):
    """The galleries of all ten trials, and the scores of some."""
    g, features = golden(f"official/{code}_{mode}_search_{shots}.npz"), synthetic(kind, images)
    drawn = None if code == "agw" else official(str(rand_perm))
    cmc = g["cmc_all_f64"] if code == "agw" else g["cmc_all"]
    for search in SYSU.searches(images, {"mode": mode, "gall_mode": GALL_MODE[shots]}, draw=drawn):
        (query, gallery), trial = (images.take(side) for side in search[2:]), search.trial
        assert numbers(gallery) == g["gallery_img"][trial].tolist()
        np.testing.assert_array_equal([gallery.pids, gallery.camids], [g["gallery_id"], g["gallery_cam"]])
        if trial in trials:
            distmat = Distances(features[search.query], features[search.gallery], "euclidean")
            lists = query.pids, gallery.pids, query.camids, gallery.camids
            scores = eval_sysu(distmat, *lists, max_rank=cmc.shape[1])
            np.testing.assert_allclose(scores.cmc, cmc[trial], rtol=0, atol=1e-12)
            np.testing.assert_allclose(scores.mAP, g["map_all"][trial], rtol=0, atol=1e-12)
            minp = g["minp_all" if code == "agw" else "minp_all_numpy"][trial]
            np.testing.assert_allclose(scores.mINP, minp, rtol=0, atol=1e-12)


def test_permutations_of_another_tree_are_refused(golden_tree, rand_perm):
    with pytest.raises(ValueError, match="--rand_perm belongs to another tree"):
        SYSU.searches(sysu_test(str(golden_tree)), {}, draw=official(str(rand_perm)))


def test_a_features_file_is_scored_as_the_official_code_does(images, rand_perm, call, tmp_path):
    """The same numbers on the road a user takes: a file of features, tools.score and its JSON file."""
    np.savez(tmp_path / "main.npz", **images._asdict(), random=synthetic("main", images))
    flags = ["--gallery", "official", "--rand_perm", rand_perm, "--distance", "euclidean", "--mode", "indoor"]
    call("-m tools.score", tmp_path / "main.npz", *flags, "--log_path", tmp_path)
    content, g = only(tmp_path, "score_main_*.json"), golden("official/official_indoor_search_1.npz")
    assert content["options"] == ["official", "euclidean"]
    assert content["counts"]["indoor-search single-shot"]["without_match"] == 3803 - 2208
    (trials,) = (row["trials"] for row in content["results"] if row["feature"] == "random")
    np.testing.assert_allclose([t["cmc"] for t in trials], g["cmc_all"][:, :20], rtol=0, atol=1e-12)
    np.testing.assert_allclose([t["mAP"] for t in trials], g["map_all"], rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def llcm_published(tmp_path_factory) -> tuple:
    """The made-up test images, and what the published code listed, drew and computed; places are among the images."""
    root, g = tmp_path_factory.mktemp("golden") / "LLCM", golden("llcm_eval.npz")
    for name in g["names"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "idx").mkdir()
    (root / "idx/test_id.txt").write_text(str(g["test_id_txt"]))
    images = LLCM.test(str(root), None)
    names = g["names"].tolist()
    where = np.array([names.index(os.path.relpath(path, root)) for path in images.paths])
    return images, g["features"][where], where, g


@pytest.mark.parametrize(
    ("search", "name", "query", "gallery"),
    [
        ("t2v", "nir2vis", "nir_query", "vis_gallery"),
        ("v2t", "vis2nir", "vis_query", "nir_gallery"),
        ("v2t-published", "vis2nir_swapped", "nir_gallery", "vis_query"),
    ],
)
def test_llcm_lists_galleries_and_scores_are_the_published_ones(llcm_published, search, name, query, gallery):
    images, features, where, g = llcm_published
    searches = LLCM.searches(images, {"search": search})
    assert [own.trial for own in searches] == [*range(10)] and {own.protocol for own in searches} == {search}
    for own in searches:
        for side, key in ((own.query, query), (own.gallery, gallery)):
            ours = {key: where[side], f"{key}_pid": images.pids[side], f"{key}_cam": images.camids[side]}
            for what, values in ours.items():
                np.testing.assert_array_equal(values, g[what][own.trial] if g[what].ndim == 2 else g[what])
        scores = score_search(own, images, Distances(features[own.query], features[own.gallery]), LLCM)
        np.testing.assert_allclose(scores.cmc, g[f"{name}_cmc"][own.trial], rtol=0, atol=1e-6)
        np.testing.assert_allclose(scores.mAP, g[f"{name}_mAP"][own.trial], rtol=0, atol=1e-10)
        np.testing.assert_allclose(scores.mINP, g[f"{name}_mINP"][own.trial], rtol=0, atol=1e-10)


# ---- scores and results ----------------------------------------------------------------------------------------------


RULES = {  # what a query does not see: the mask, and one pair (person, camera), (person, camera)
    "sysu": (SYSU.hidden, lambda query, image: query[1] == 3 and image[1] == 2),
    "nothing": (REGDB.hidden, lambda query, image: False),
    "own camera": (LLCM.hidden, lambda query, image: query == image),
}


def walk_down(distmat, queries, gallery, unseen, counts_persons) -> tuple[list[int], list[tuple]]:
    """The definition in plain words: which queries have a match, and what `rank_plainly` gives for each of them."""
    matched, results = [], []
    for number, query in enumerate(queries):
        seen = [i for i, image in enumerate(gallery) if not unseen(query, image)]
        ranking = sorted(seen, key=lambda i: distmat[number, i])  # Python's sort is stable: ties keep the order
        persons = [gallery[i][0] for i in ranking]
        places = [place for place, person in enumerate(persons, 1) if person == query[0]]
        if places:
            before = len({*persons[: places[0] - 1]}) if counts_persons else places[0] - 1
            precisions = [n / place for n, place in enumerate(places, 1)]
            matched.append(number)
            results.append((before, sum(precisions) / len(places), len(places) / places[-1]))
    return matched, results


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(12))
def test_rankings_against_a_walk_down_each(seed, rule, monkeypatch):
    """The plain and the fast ranking of whole lists, and their scores in blocks of 64 queries."""
    rng = np.random.default_rng(seed)
    n, m, persons = rng.integers(1, 200), rng.integers(2, 60), rng.integers(1, 25)
    distmat = [rng.random((n, m)), rng.integers(0, 5, (n, m)), rng.integers(0, 9, (n, m)).astype(np.float32)][seed % 3]
    q_pids, g_pids = rng.integers(0, persons, n), rng.integers(0, persons, m)
    q_camids, g_camids = rng.integers(1, 7, n), rng.integers(1, 7, m)
    q_pids[0], q_camids[0], g_camids[0] = g_pids[0], 6, 1  # a match, whatever else was drawn
    mask, unseen = RULES[rule]
    lists = q_pids, g_pids, q_camids, g_camids
    hidden = mask(q_pids, q_camids, g_pids, g_camids)
    queries, gallery = [*zip(q_pids, q_camids, strict=True)], [*zip(g_pids, g_camids, strict=True)]
    monkeypatch.setattr("eval_metrics.BLOCK", 1)
    for counts_persons in (True, False):
        own, expected = walk_down(distmat, queries, gallery, unseen, counts_persons)
        plain = rank_plainly(distmat[own], q_pids[own], g_pids, hidden[own], counts_persons)
        np.testing.assert_allclose(plain, expected, atol=1e-12)
        np.testing.assert_allclose(rank_fast(distmat, q_pids, g_pids, hidden, counts_persons), expected, atol=1e-12)
        scores, (before, ap, inp) = score(distmat, *lists, mask, counts_persons), np.transpose(expected)
        np.testing.assert_allclose(scores.cmc, [(before < rank).mean() for rank in range(1, 21)], atol=1e-12)
        np.testing.assert_allclose([scores.mAP, scores.mINP], [ap.mean(), inp.mean()], atol=1e-12)


def test_evaluation_refuses_nonsense():
    ones, pids = np.ones((2, 3)), np.arange(3)
    with pytest.raises(ValueError, match="no query has a match"):
        eval_regdb(ones, pids[:2] + 10, pids)
    with pytest.raises(ValueError, match="2 gallery images"):
        eval_regdb(ones, pids[:2], pids[:2])
    with pytest.raises(ValueError, match="SYSU-MM01 has no --mode outdoor: give one of all, indoor, both"):
        SYSU.searches(made_up(pids, pids, pids > 0), {"mode": "outdoor"})


@pytest.mark.parametrize(("dtype", "factor"), [(np.float16, 1), (np.float16, 300), (np.float32, 1), (np.float32, 1e25)])
def test_distances_of_some_rows(dtype, factor):
    x = np.random.default_rng(0).standard_normal((9, 500)) / 30
    directions = x / np.linalg.norm(x, axis=1, keepdims=True)
    given = (x * factor).astype(dtype)
    cosine, euclidean = Distances(given[:6], given), Distances(given[:6], given, "euclidean")
    assert cosine.shape == euclidean.shape == (6, 9)
    for rows in (slice(0, 2), slice(2, 6)):
        np.testing.assert_allclose(cosine[rows], -directions[rows] @ directions.T, atol=1e-3)
        pairs = given[rows, None].astype(float) - given.astype(float)
        np.testing.assert_allclose(euclidean[rows], (pairs**2).sum(2), rtol=1e-9, atol=1e-9 * factor**2)


def jaccard_of_neighbourhoods(query, gallery, k1, k2, weight):
    """Re-ranking in the paper's words (Zhong et al. 2017, sections 3.2 to 3.5), with sets, an image at a time."""
    x, q = np.concatenate([query, gallery]), len(query)
    d = ((x[:, None] - x) ** 2).sum(2)
    d /= d.max(axis=1, keepdims=True)
    ranking, vectors = np.argsort(d, axis=1, kind="stable").tolist(), np.zeros(d.shape)

    def reciprocal(i, k):
        return {j for j in ranking[i][: k + 1] if i in ranking[j][: k + 1]}

    for i in range(len(x)):
        near = reciprocal(i, k1)
        brought = [reciprocal(j, round(k1 / 2)) for j in near]
        robust = [*near.union(*(half for half in brought if len(half & near) > 2 / 3 * len(half)))]
        vectors[i, robust] = np.exp(-d[i, robust]) / np.exp(-d[i, robust]).sum()
    vectors = np.array([vectors[own[:k2]].mean(axis=0) for own in ranking])
    a, b = vectors[:q, None], vectors[q:]
    return (1 - weight) * (1 - np.minimum(a, b).sum(2) / np.maximum(a, b).sum(2)) + weight * d[:q, q:]


@pytest.mark.parametrize(("n_query", "n_gallery", "k1", "k2"), [(25, 40, 20, 6), (30, 20, 5, 1), (3, 6, 7, 3)])
@pytest.mark.parametrize("kind", Distances.KINDS)
def test_reranking_against_its_definition(n_query, n_gallery, k1, k2, kind):
    rng = np.random.default_rng(n_query)
    persons = rng.standard_normal((8, 6)) * 1.5
    query, gallery = (persons[rng.integers(0, 8, n)] + rng.standard_normal((n, 6)) for n in (n_query, n_gallery))
    if kind == "cosine":  # half the squared distance of the directions
        directions = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (query, gallery)]
    expected = jaccard_of_neighbourhoods(*(directions if kind == "cosine" else (query, gallery)), k1, k2, 0.3)
    np.testing.assert_allclose(rerank(query, gallery, kind, k1, k2, 0.3), expected, atol=1e-6)


def made_up(pids, camids, thermal) -> Split:
    return Split([f"{i:04d}" for i in range(len(pids))], *map(np.array, (pids, camids, thermal)))


def test_counts_and_chance_by_hand():
    """Gallery images of persons 1, 1, 2; the last, of camera 2, is not seen by the queries of camera 3."""
    images = made_up([1, 1, 2, 1, 2, 1, 9], [1, 4, 2, 3, 3, 6, 6], [False] * 3 + [True] * 4)
    counts = Counts.of(Search("all-search single-shot", 0, np.arange(3, 7), np.arange(3)), images, SYSU)
    assert counts[:4] == (4, 2, 3, 2)
    assert counts.chance == pytest.approx(np.mean([2 / 2, 2 / 3]))  # matches / images seen


# ---- test.py and tools.score ----------------------------------------------------------------------------------------

EVERYTHING = ["--mode", "both", "--gall-mode", "both"]


def test_features_in_files_score_the_same(sysu_run, sysu_tree, call, monkeypatch, tmp_path):
    opened, read = [], data_loader.read_image
    monkeypatch.setattr(data_loader, "read_image", lambda path, size: opened.append(path) or read(path, size))
    (best,) = sysu_run["models"].glob("*_best.t")
    command = ["test.py", "--data_path", sysu_tree, "--resume", best, "--workers", 0]
    file = tmp_path / "features/net.npz"
    call(*command, *EVERYTHING, "--save_features", file, "--log_path", tmp_path)
    images = sysu_test(str(sysu_tree))
    assert sorted(opened) == sorted(images.paths)  # each once
    with np.load(file, allow_pickle=False) as saved:
        saved = dict(saved)
    assert [str(sysu_tree / path) for path in saved["paths"]] == images.paths
    assert all(map(np.array_equal, (saved["pids"], saved["camids"], saved["thermal"]), images[1:]))

    # In another order, and with the images of a person in a camera told apart by their paths alone.
    order = np.random.default_rng(0).permutation(len(images.paths))
    mixed = {name: values[order] if values.ndim else values for name, values in saved.items()}
    np.savez(file.with_name("mixed.npz"), **mixed)
    call("-m tools.score", file, file.with_name("mixed.npz"), *EVERYTHING, "--log_path", tmp_path)
    call("-m tools.score", file, "--mat", tmp_path / "mat", "--log_path", tmp_path / "mat")
    tested, scored, shuffled = (only(tmp_path, f"{name}_*.json") for name in ("test", "score_net", "score_mixed"))
    assert scored["results"] == tested["results"] and scored["counts"] == tested["counts"]
    assert scored["networks"] == [{"features": str(file), **tested["networks"][0]}]
    for row, other in zip(tested["results"], shuffled["results"], strict=True):
        if row["feature"] != "chance":  # random rankings are of positions
            np.testing.assert_allclose([*row["mean"].values()], [*other["mean"].values()], atol=1e-6)

    for cam, pid in {*zip(images.camids.tolist(), images.pids.tolist(), strict=True)}:
        cells = scipy.io.loadmat(tmp_path / f"mat/pool5_cam{cam}.mat")["feature"]
        own = saved["pool5"][(images.pids == pid) & (images.camids == cam)]
        assert cells.shape == (533, 1) and np.array_equal(cells[pid - 1, 0], own)

    # Where features are not kept, what no search needs is not opened.
    opened.clear()
    call(*command, "--mode", "indoor", "--log_path", tmp_path / "indoor")
    searched = [sysu_query(str(sysu_tree)), *(sysu_gallery(str(sysu_tree), "indoor", trial=t) for t in range(10))]
    assert sorted(opened) == sorted({path for split in searched for path in split.paths}) != sorted(images.paths)
    rows = [row for row in tested["results"] if row["protocol"] == "indoor-search single-shot"]
    for row, again in zip(rows, only(tmp_path / "indoor", "*.json")["results"], strict=True):
        np.testing.assert_allclose([*row["mean"].values()], [*again["mean"].values()], atol=1e-6)


def test_files_of_regdb_are_trials_and_tell_the_modality(bad, call, tmp_path):
    """By an array; in files of older versions, or of others, the camera numbers do."""
    thermal, network = np.arange(24) % 3 == 0, json.dumps({"trial": 7})
    fc = np.random.default_rng(0).standard_normal((24, 8))
    old = features_file(tmp_path / "old.npz", fc=fc, camids=1 + thermal)
    new = features_file(tmp_path / "new.npz", fc=fc, camids=np.arange(24), thermal=thermal, network=network)
    command = ["-m tools.score", "--dataset", "regdb", "--log_path", tmp_path]
    call(*command, old, new, "--search", "both")
    content = only(tmp_path)
    sizes = {search: (own["queries"], own["gallery_images"]) for search, own in content["counts"].items()}
    assert sizes == {"v2t": (16, 8), "t2v": (8, 16)}
    trials = content["results"][0]["trials"]
    assert [trial.pop("trial") for trial in trials] == [1, 7] and trials[0] == trials[1]
    assert "trial 7" in bad(*command, new, new)


def test_options_are_named(sysu_tree, call, tmp_path):
    flags = ["--data_path", sysu_tree, "--log_path", tmp_path, "--pretrained", "none", "--arch", "resnet18"]
    flags += ["--img_h", 96, "--img_w", 32, "--low-dim", 16, "--features", "fc", "--flip"]
    printed = call("test.py", *flags)
    content = only(tmp_path, "*-fc-flip.json")
    assert "; options: flip" in printed and content["options"] == ["flip"]
    assert content["networks"][0]["flip"] and {row["feature"] for row in content["results"]} == {"fc", "chance"}
    assert "warning" not in printed  # an untrained network was asked for
    printed = call("-m tools.score", features_file(tmp_path / "f.npz"), "--rerank", "--log_path", tmp_path)
    assert "; options: rerank" in printed and only(tmp_path, "score_*-rerank.json")["options"] == ["rerank"]


@pytest.mark.parametrize(("signal", "suspicious"), [(0.0, 4), (3.0, 0)])
def test_results_near_chance_are_named(call, tmp_path, signal, suspicious):
    """In one line. Random rankings find what is to be expected of them."""
    rng = np.random.default_rng(0)
    pids, camids = np.repeat(np.arange(40), 12), np.tile([1, 2, 3, 4, 5, 6], 80)
    fc = rng.standard_normal((480, 16)) + signal * rng.standard_normal((40, 16))[pids]
    file = features_file(tmp_path / "f.npz", pids=pids, camids=camids, paths=np.arange(480).astype(str), fc=fc)
    printed = call("-m tools.score", file, *EVERYTHING, "--log_path", tmp_path)
    content = only(tmp_path)
    for row in (row for row in content["results"] if row["feature"] == "chance"):
        assert row["mean"]["rank1"] == pytest.approx(content["counts"][row["protocol"]]["chance"], abs=0.02)
    warned = [line for line in printed.splitlines() if "twice chance" in line]
    assert [line.count("-shot fc ") for line in warned] == [suspicious] * bool(suspicious)
    assert "all-search single-shot: 160 queries (0 without a match, not counted), 160 gallery images of 40" in printed
