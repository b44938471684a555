"""SYSU-MM01's official evaluation, and the baseline's, on synthetic features: the same galleries, the same scores.

The numbers in tests/golden/official were computed by the official MATLAB code and by the baseline's; see `features` for
what they were computed on.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.io

import data_manager
from eval_metrics import Distances, eval_sysu

OFFICIAL = Path(__file__).parent / "golden/official"
SETS = {"main": (20170, 16, 0.75, 2.0**-20), "ties": (31337, 6, 0.45, 0.5)}  # seed, dimensions, noise, rounding
PROTOCOLS = [(mode, shots) for mode in ("all", "indoor") for shots in (1, 10)]
GALL_MODE = {1: "single", 10: "multi"}


def official(name: str) -> dict[str, np.ndarray]:
    with np.load(OFFICIAL / f"{name}.npz") as file:
        return dict(file)


def features(kind: str, cam: int, pid: int, n: int) -> np.ndarray:
    """Row i stands for image i + 1 of a person in a camera; rounded so that squared distances are exact."""
    seed, dim, noise, quantum = SETS[kind]
    person = np.random.default_rng([seed, 1, pid]).standard_normal(dim)
    camera = np.random.default_rng([seed, 2, cam]).standard_normal(dim)
    image = np.random.default_rng([seed, 3, cam, pid]).standard_normal((n, dim))
    return np.round((person + 0.5 * camera + noise * image) / quantum) * quantum


def features_of(kind: str, split: data_manager.Split) -> np.ndarray:
    cache = {}
    rows = []
    for path, pid, cam in zip(split.paths, split.pids.tolist(), split.camids.tolist(), strict=True):
        if (cam, pid) not in cache:
            cache[cam, pid] = features(kind, cam, pid, 60)  # no person has as many images in one camera
        rows.append(cache[cam, pid][int(Path(path).stem) - 1])
    return np.stack(rows)


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """The test half of SYSU-MM01's folders, with empty files for images."""
    root = tmp_path_factory.mktemp("official")
    counts = json.loads((OFFICIAL / "images.json").read_text())
    (root / "exp").mkdir()
    (root / "exp/test_id.txt").write_text(",".join(map(str, counts["test_ids"])))
    for pid, images in zip(counts["test_ids"], counts["images"], strict=True):
        for cam, n in enumerate(images, 1):
            (root / f"cam{cam}/{pid:04d}").mkdir(parents=True)
            for image in range(1, n + 1):
                (root / f"cam{cam}/{pid:04d}/{image:04d}.jpg").touch()
    return root


@pytest.fixture(scope="module")
def rand_perm(tree, tmp_path_factory) -> np.ndarray:
    """The authors' rand_perm_cam.mat as far as the official galleries tell: the first ten of each permutation."""
    cells = np.empty((6, 1), dtype=object)
    for cam in range(6):
        cells[cam, 0] = np.empty((333, 1), dtype=object)
        for pid in range(333):
            cells[cam, 0][pid, 0] = np.empty((0, 0), dtype=np.uint8)
    g = official("official_all_search_10")
    places = zip(
        g["gallery_id"][::10], g["gallery_cam"][::10], g["gallery_img"].reshape(10, -1, 10).swapaxes(0, 1), strict=True
    )
    for pid, cam, first in places:
        n = len([*(tree / f"cam{cam}/{pid:04d}").iterdir()])
        rest = [np.setdiff1d(np.arange(1, n + 1), row) for row in first]
        cells[cam - 1, 0][pid - 1, 0] = np.hstack([first, rest]).astype(np.uint8)
    path = tmp_path_factory.mktemp("mat") / "rand_perm_cam.mat"
    scipy.io.savemat(path, {"rand_perm_cam": cells})
    return data_manager.read_rand_perm(str(path))


@pytest.mark.parametrize(("mode", "shots"), PROTOCOLS)
@pytest.mark.parametrize("kind", SETS)
def test_official_galleries_and_scores(tree, rand_perm, kind, mode, shots):
    """All ten trials, to 1e-12, on distinct distances ("main") and on many equal ones ("ties")."""
    g = official(("ties/" if kind == "ties" else "") + f"official_{mode}_search_{shots}")
    query = data_manager.sysu_query(str(tree), mode)
    query_features = features_of(kind, query)
    for trial in range(10):
        gallery = data_manager.sysu_gallery(str(tree), mode, GALL_MODE[shots], trial, rand_perm)
        assert [int(Path(path).stem) for path in gallery.paths] == g["gallery_img"][trial].tolist()
        np.testing.assert_array_equal(gallery.pids, g["gallery_id"])
        np.testing.assert_array_equal(gallery.camids, g["gallery_cam"])
        distmat = Distances(query_features, features_of(kind, gallery), "euclidean")
        scores = eval_sysu(
            distmat, query.pids, gallery.pids, query.camids, gallery.camids, max_rank=g["cmc_all"].shape[1]
        )
        np.testing.assert_allclose(scores.cmc, g["cmc_all"][trial], rtol=0, atol=1e-12)
        np.testing.assert_allclose(scores.mAP, g["map_all"][trial], rtol=0, atol=1e-12)
        if kind == "main":
            np.testing.assert_allclose(scores.mINP, g["minp_all_numpy"][trial], rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ["all", "indoor"])
def test_seeded_galleries_are_the_baselines(tree, mode):
    """Trial t's single-shot picks and scores are those of the baseline's code; it stores the CMC in float32."""
    g = official(f"agw_{mode}_search_1")
    query = data_manager.sysu_query(str(tree), mode)
    query_features = features_of("main", query)
    for trial in range(10):
        gallery = data_manager.sysu_gallery(str(tree), mode, "single", trial)
        assert [int(Path(path).stem) for path in gallery.paths] == g["gallery_img"][trial].tolist()
        np.testing.assert_array_equal(gallery.pids, g["gallery_id"])
        distmat = Distances(query_features, features_of("main", gallery), "euclidean")
        scores = eval_sysu(distmat, query.pids, gallery.pids, query.camids, gallery.camids)
        np.testing.assert_allclose(scores.cmc, g["cmc_all"][trial], atol=1e-7)
        np.testing.assert_allclose([scores.mAP, scores.mINP], [g["map_all"][trial], g["minp_all"][trial]], atol=1e-12)


def test_a_small_permutation_file(golden_tree, tmp_path):
    """Picks by hand: the n-th number of a row is the n-th choice, counted from 1; cameras outside, persons inside."""
    images = data_manager.sysu_test(str(golden_tree))
    rng, cells = np.random.default_rng(0), np.empty((6, 1), dtype=object)
    for cam in range(1, 7):
        cells[cam - 1, 0] = np.empty((images.pids.max(), 1), dtype=object)
        for pid in range(1, images.pids.max() + 1):
            n = ((images.pids == pid) & (images.camids == cam)).sum()
            cells[cam - 1, 0][pid - 1, 0] = np.array([rng.permutation(n) + 1 for _ in range(10)], np.uint8)
    scipy.io.savemat(tmp_path / "small.mat", {"rand_perm_cam": cells})
    rand_perm = data_manager.read_rand_perm(str(tmp_path / "small.mat"))
    expected = []
    for cam in (1, 2):
        for pid in sorted({*images.pids.tolist()}):
            files = sorted((golden_tree / f"cam{cam}/{pid:04d}").glob("*.jpg"))
            expected += [str(files[number - 1]) for number in cells[cam - 1, 0][pid - 1, 0][7][:10]]
    assert expected and data_manager.sysu_gallery(str(golden_tree), "indoor", "multi", 7, rand_perm).paths == expected


def test_permutations_of_another_tree_are_refused(golden_tree, rand_perm, tmp_path):
    with pytest.raises(ValueError, match="it belongs to another tree"):
        data_manager.sysu_gallery(str(golden_tree), rand_perm=rand_perm)
    (tmp_path / "bad.mat").write_bytes(b"MATLAB 5.0 MAT-file" + bytes(200))
    scipy.io.savemat(tmp_path / "other.mat", {"rand_perm_cam": np.zeros((6, 1))})
    for name in ("bad.mat", "other.mat", "missing.mat"):
        with pytest.raises(OSError, match=f"{name} (not found|is not the rand_perm_cam.mat)"):
            data_manager.read_rand_perm(str(tmp_path / name))


def test_a_features_file_is_scored_as_the_official_code_does(tree, rand_perm, call, tmp_path):
    """The same numbers on the road a user takes: a file of features, tools.score and its JSON file."""
    images = data_manager.sysu_test(str(tree))
    paths = [Path(path).relative_to(tree).as_posix() for path in images.paths]
    arrays = {"pids": images.pids, "camids": images.camids, "paths": np.array(paths)}
    np.savez(tmp_path / "main.npz", **arrays, random=features_of("main", images))
    scipy.io.savemat(tmp_path / "rand_perm_cam.mat", {"rand_perm_cam": rand_perm})
    flags = ["--gallery", "official", "--rand_perm", tmp_path / "rand_perm_cam.mat", "--distance", "euclidean"]
    call(
        "-m tools.score", tmp_path / "main.npz", *flags, "--mode", "both", "--gall-mode", "both", "--log_path", tmp_path
    )
    content = json.loads((tmp_path / "score_main_both-both-official-euclidean.json").read_text())
    assert content["options"] == ["official", "euclidean"]
    assert content["counts"]["indoor-search single-shot"]["without_match"] == 3803 - 2208
    found = {row["protocol"]: row["trials"] for row in content["results"] if row["feature"] == "random"}
    for mode, shots in PROTOCOLS:
        g = official(f"official_{mode}_search_{shots}")
        trials = found[f"{mode}-search {GALL_MODE[shots]}-shot"]
        np.testing.assert_allclose([t["cmc"] for t in trials], g["cmc_all"][:, :20], rtol=0, atol=1e-12)
        np.testing.assert_allclose([t["mAP"] for t in trials], g["map_all"], rtol=0, atol=1e-12)
        np.testing.assert_allclose([t["mINP"] for t in trials], g["minp_all_numpy"], rtol=0, atol=1e-12)
