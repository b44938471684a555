"""Protocols end to end: golden numbers of other codes; features through test.py and tools.score.

The numbers in tests/golden/official were computed by SYSU-MM01's official MATLAB code and by the
field's baseline (AGW), those of LLCM by its published code.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from conftest import features_file, golden, only_json, rows_of, run_here

import data_loader
import model
from data_manager import (
    DATASETS,
    Split,
    split_of_rows,
    sysu_gallery,
    sysu_query,
    sysu_test,
)
from eval_metrics import MEASURES, Distances, eval_sysu, score_trial
from tools.score import official_draw

SYSU = DATASETS["sysu"]
LLCM = DATASETS["llcm"]
ALL_PROTOCOLS = ["--mode", "both", "--gall-mode", "both"]


# ---- SYSU-MM01: the official evaluation and the baseline's --------------------------------------


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the features that the golden numbers belong to were drawn."""

    seed: int
    dim: int
    noise: float  # of an image, where that of a person is 1
    quantum: float  # features are multiples of it, so that squared distances are exact


RECIPES = {
    "main": Recipe(seed=20170, dim=16, noise=0.75, quantum=2.0**-20),
    "ties": Recipe(seed=31337, dim=6, noise=0.45, quantum=0.5),
}
GALL_MODES = {1: "single", 10: "multi"}


def image_numbers(images: Split) -> np.ndarray:
    """(N,) the numbers in the file names: which image of its person and camera each is."""
    return np.array([int(Path(path).stem) for path in images.paths])


def draw_normal(shape: int | tuple[int, int], *seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def synthetic_features(recipe: Recipe, images: Split) -> np.ndarray:
    """(N, dim) features: of the person, the camera and the image."""
    features = np.empty((len(images), recipe.dim))
    row_in_camera = image_numbers(images) - 1
    pids_and_cameras = np.unique(np.stack([images.pids, images.camids], axis=1), axis=0)
    for pid, camid in pids_and_cameras.tolist():
        is_here = (images.pids == pid) & (images.camids == camid)
        person = draw_normal(recipe.dim, recipe.seed, 1, pid)
        camera = draw_normal(recipe.dim, recipe.seed, 2, camid)
        noise = draw_normal((is_here.sum(), recipe.dim), recipe.seed, 3, camid, pid)
        exact = person + 0.5 * camera + recipe.noise * noise
        rounded = np.round(exact / recipe.quantum) * recipe.quantum
        features[is_here] = rounded[row_in_camera[is_here]]
    return features


@pytest.fixture(scope="module")
def sysu_images() -> Split:
    """All test images of SYSU-MM01, without the pixels."""
    content = golden("official/images.json")
    rows = []
    for pid, n_images_of_cameras in zip(content["test_ids"], content["images"], strict=True):
        for camid, n_images in enumerate(n_images_of_cameras, start=1):
            for number in range(1, n_images + 1):
                path = f"cam{camid}/{pid:04d}/{number:04d}.jpg"
                rows.append((path, pid, camid, camid in (3, 6)))
    return split_of_rows(rows)


@pytest.fixture(scope="module")
def rand_perm(sysu_images, tmp_path_factory) -> Path:
    """The authors' rand_perm_cam.mat, as far as the official galleries tell.

    They tell the first ten of each permutation. The rest follows in ascending order.
    """
    expected = golden("official/official_all_search_10.npz")
    cells = np.empty((6, 1), dtype=object)
    for camera in range(6):
        cells[camera, 0] = np.empty((333, 1), dtype=object)
        for person in range(333):
            cells[camera, 0][person, 0] = np.empty((0, 0), dtype=np.uint8)

    pids = expected["gallery_id"][::10]  # ten images of each person and camera follow each other
    camids = expected["gallery_cam"][::10]
    n_trials = 10
    first_ten_of_trials = expected["gallery_img"].reshape(n_trials, len(pids), 10)
    for i, (pid, camid) in enumerate(zip(pids, camids, strict=True)):
        n_images = np.sum((sysu_images.pids == pid) & (sysu_images.camids == camid))
        permutations = []
        for first_ten in first_ten_of_trials[:, i]:
            others = np.setdiff1d(np.arange(1, n_images + 1), first_ten)
            permutations.append(np.concatenate([first_ten, others]))
        cells[camid - 1, 0][pid - 1, 0] = np.array(permutations, np.uint8)
    path = tmp_path_factory.mktemp("mat") / "rand_perm_cam.mat"
    scipy.io.savemat(path, {"rand_perm_cam": cells})
    return path


@pytest.mark.parametrize("mode", ["all", "indoor"])
@pytest.mark.parametrize(
    ("code", "recipe", "per_camera", "scored_trials"),
    [
        ("official", "main", 1, range(10)),
        ("official", "main", 10, (0, 7)),
        ("ties/official", "ties", 1, (4,)),
        ("ties/official", "ties", 10, (4,)),
        ("agw", "main", 1, range(10)),  # the baseline's: seeded galleries
    ],
)
def test_galleries_and_scores_are_those_of_the_official_code_and_of_the_baseline(
    sysu_images, rand_perm, mode, code, recipe, per_camera, scored_trials
):
    """The galleries of all ten trials, and the scores of some."""
    expected = golden(f"official/{code}_{mode}_search_{per_camera}.npz")
    if code == "agw":
        draw = None
        expected_cmc = expected["cmc_all_f64"]
        expected_mINP = expected["minp_all"]
    else:
        draw = official_draw(str(rand_perm))
        expected_cmc = expected["cmc_all"]
        expected_mINP = expected["minp_all_numpy"]
    features = synthetic_features(RECIPES[recipe], sysu_images)
    choice = {"mode": mode, "gall_mode": GALL_MODES[per_camera]}
    trials = SYSU.eval_trials(sysu_images, choice, draw=draw)
    assert [trial.number for trial in trials] == list(range(10))

    for number, trial in enumerate(trials):
        query = sysu_images.take(trial.query)
        gallery = sysu_images.take(trial.gallery)
        np.testing.assert_array_equal(image_numbers(gallery), expected["gallery_img"][number])
        np.testing.assert_array_equal(gallery.pids, expected["gallery_id"])
        np.testing.assert_array_equal(gallery.camids, expected["gallery_cam"])
        if number not in scored_trials:
            continue
        scores = eval_sysu(
            Distances(features[trial.query], features[trial.gallery], "euclidean"),
            query.pids,
            gallery.pids,
            query.camids,
            gallery.camids,
            max_rank=expected_cmc.shape[1],
        )
        np.testing.assert_allclose(scores.cmc, expected_cmc[number], rtol=0, atol=1e-12)
        np.testing.assert_allclose(scores.mAP, expected["map_all"][number], rtol=0, atol=1e-12)
        np.testing.assert_allclose(scores.mINP, expected_mINP[number], rtol=0, atol=1e-12)


def test_permutations_of_another_tree_are_an_error(golden_tree, rand_perm):
    images = sysu_test(str(golden_tree))
    with pytest.raises(ValueError, match=r"--rand-perm .*belongs to another tree"):
        SYSU.eval_trials(images, {}, draw=official_draw(str(rand_perm)))


def test_a_file_of_features_gets_the_scores_of_the_official_code(
    sysu_images, rand_perm, output_of, tmp_path
):
    """The same numbers the way a user gets them: tools.score and its result file."""
    np.savez(
        tmp_path / "main.npz",
        paths=sysu_images.paths,
        pids=sysu_images.pids,
        camids=sysu_images.camids,
        thermal=sysu_images.thermal,
        random=synthetic_features(RECIPES["main"], sysu_images),
    )
    flags = ["--gallery", "official", "--rand-perm", rand_perm, "--distance", "euclidean"]
    flags += ["--mode", "indoor", "--log-path", tmp_path]
    output_of("-m tools.score", tmp_path / "main.npz", *flags)

    content = only_json(tmp_path, "score_main_*.json")
    assert content["options"] == ["official", "euclidean"]
    assert content["counts"]["indoor-search single-shot"]["without_match"] == 3803 - 2208
    row = rows_of(content)["indoor-search single-shot", "random"]
    expected = golden("official/official_indoor_search_1.npz")
    cmc = [trial["cmc"] for trial in row["trials"]]
    mAP = [trial["mAP"] for trial in row["trials"]]
    np.testing.assert_allclose(cmc, expected["cmc_all"][:, :20], rtol=0, atol=1e-12)
    np.testing.assert_allclose(mAP, expected["map_all"], rtol=0, atol=1e-12)
    assert row["mean"]["rank1"] == pytest.approx(expected["cmc_mean"][0], abs=1e-12)
    assert row["mean"]["rank20"] == pytest.approx(expected["cmc_mean"][19], abs=1e-12)
    assert row["mean"]["mAP"] == pytest.approx(expected["map_mean"], abs=1e-12)
    assert row["std"]["mAP"] == pytest.approx(np.std(expected["map_all"]), abs=1e-12)


# ---- LLCM ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PublishedLLCM:
    """Synthetic test images, and what the published code listed, drew and computed of them."""

    images: Split
    numbers: np.ndarray  # (N,) which of the published list each of `images` is
    features: np.ndarray  # (N, dim)
    expected: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def published_llcm(tmp_path_factory) -> PublishedLLCM:
    expected = golden("llcm_eval.npz")
    root = tmp_path_factory.mktemp("golden") / "LLCM"
    names = expected["names"].tolist()
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "idx").mkdir()
    (root / "idx/test_id.txt").write_text(str(expected["test_id_txt"]))

    images = LLCM.test(str(root), None)
    numbers = np.array([names.index(os.path.relpath(path, root)) for path in images.paths])
    return PublishedLLCM(images, numbers, expected["features"][numbers], expected)


@pytest.mark.parametrize(
    ("search", "scores_name", "query_name", "gallery_name"),
    [
        ("t2v", "nir2vis", "nir_query", "vis_gallery"),
        ("v2t", "vis2nir", "vis_query", "nir_gallery"),
        ("v2t-published", "vis2nir_swapped", "nir_gallery", "vis_query"),
    ],
)
def test_lists_galleries_and_scores_of_llcm_are_the_published_ones(
    published_llcm, search, scores_name, query_name, gallery_name
):
    images = published_llcm.images
    features = published_llcm.features
    expected = published_llcm.expected
    trials = LLCM.eval_trials(images, {"search": search})
    assert [trial.number for trial in trials] == list(range(10))

    for number, trial in enumerate(trials):
        assert trial.protocol == search
        for name, indices in ((query_name, trial.query), (gallery_name, trial.gallery)):
            expected_numbers = expected[name]
            if expected_numbers.ndim == 2:  # it is drawn, trial by trial
                expected_numbers = expected_numbers[number]
            np.testing.assert_array_equal(published_llcm.numbers[indices], expected_numbers)
            np.testing.assert_array_equal(images.pids[indices], expected[f"{name}_pid"])
            np.testing.assert_array_equal(images.camids[indices], expected[f"{name}_cam"])
        distances = Distances(features[trial.query], features[trial.gallery])
        scores = score_trial(trial, images, distances, LLCM)
        cmc = expected[f"{scores_name}_cmc"][number]
        mAP = expected[f"{scores_name}_mAP"][number]
        mINP = expected[f"{scores_name}_mINP"][number]
        np.testing.assert_allclose(scores.cmc, cmc, rtol=0, atol=1e-6)
        np.testing.assert_allclose(scores.mAP, mAP, rtol=0, atol=1e-10)
        np.testing.assert_allclose(scores.mINP, mINP, rtol=0, atol=1e-10)


# ---- test.py, its file of features, and tools.score ---------------------------------------------


def best_checkpoint(run: dict[str, Path]) -> Path:
    (path,) = run["models"].glob("*_best.t")
    return path


def check_same_scores(rows: dict, expected_rows: dict, tolerance: float) -> None:
    """The means of all protocols and features but "chance": random rankings are of positions."""
    assert rows.keys() == expected_rows.keys()
    for (protocol, kind), row in rows.items():
        if kind == "chance":
            continue
        for name in MEASURES:
            expected = expected_rows[protocol, kind]["mean"][name]
            assert row["mean"][name] == pytest.approx(expected, abs=tolerance), (protocol, name)


@dataclasses.dataclass(frozen=True)
class SavedFeatures:
    """A run of test.py under all protocols of SYSU-MM01, which kept its features."""

    path: Path
    arrays: dict[str, np.ndarray]
    result: dict  # what the result file holds
    images_read: list[str]


def record_reads(patch: pytest.MonkeyPatch) -> list[str]:
    """The paths of all images that are read from now on, in a list that grows."""
    images_read = []
    read_image = data_loader.read_image

    def recording_read(path, size):
        images_read.append(path)
        return read_image(path, size)

    patch.setattr(data_loader, "read_image", recording_read)
    return images_read


@pytest.fixture(scope="module")
def saved_features(sysu_run, tmp_path_factory) -> SavedFeatures:
    folder = tmp_path_factory.mktemp("saved_features")
    path = folder / "features/net.npz"
    with pytest.MonkeyPatch.context() as patch:
        images_read = record_reads(patch)
        flags = ["--data-path", sysu_run["data"], "--resume", best_checkpoint(sysu_run)]
        flags += ["--workers", 0, "--save-features", path, "--log-path", folder]
        run_here("test.py", *flags, *ALL_PROTOCOLS)
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    return SavedFeatures(path, arrays, only_json(folder, "test_*.json"), images_read)


def test_a_test_reads_each_image_once(saved_features, sysu_tree):
    images = sysu_test(str(sysu_tree))
    assert sorted(saved_features.images_read) == sorted(images.paths)


def test_a_file_of_features_lists_all_test_images(saved_features, sysu_tree):
    images = sysu_test(str(sysu_tree))
    arrays = saved_features.arrays
    assert [str(sysu_tree / path) for path in arrays["paths"]] == images.paths
    np.testing.assert_array_equal(arrays["pids"], images.pids)
    np.testing.assert_array_equal(arrays["camids"], images.camids)
    np.testing.assert_array_equal(arrays["thermal"], images.thermal)


def test_a_file_of_features_is_scored_as_its_network_was(saved_features, output_of, tmp_path):
    output_of("-m tools.score", saved_features.path, *ALL_PROTOCOLS, "--log-path", tmp_path)
    content = only_json(tmp_path)
    assert len(content["results"]) == 4 * 3  # protocols; fc, pool5 and chance
    assert content["results"] == saved_features.result["results"]
    assert content["counts"] == saved_features.result["counts"]
    network = saved_features.result["networks"][0]
    assert content["networks"] == [{"features": str(saved_features.path), **network}]


def test_the_order_of_images_in_a_file_changes_no_score(saved_features, output_of, tmp_path):
    """Images of a person in a camera are told apart by their paths."""
    n_images = len(saved_features.arrays["paths"])
    order = np.random.default_rng(0).permutation(n_images)
    mixed = {}
    for name, values in saved_features.arrays.items():
        is_column = values.ndim > 0
        mixed[name] = values[order] if is_column else values
    np.savez(tmp_path / "mixed.npz", **mixed)
    output_of("-m tools.score", tmp_path / "mixed.npz", *ALL_PROTOCOLS, "--log-path", tmp_path)
    expected_rows = rows_of({"results": [dict(row) for row in saved_features.result["results"]]})
    check_same_scores(rows_of(only_json(tmp_path)), expected_rows, tolerance=1e-6)


def test_features_are_written_for_the_official_code(saved_features, output_of, tmp_path):
    """A cell array for each camera; the cell of a person holds their images, in order."""
    mat_folder = tmp_path / "mat"
    output_of("-m tools.score", saved_features.path, "--mat", mat_folder, "--log-path", tmp_path)
    arrays = saved_features.arrays
    for camid in range(1, 7):
        for kind in ("fc", "pool5"):
            cells = scipy.io.loadmat(mat_folder / f"{kind}_cam{camid}.mat")["feature"]
            assert cells.shape == (533, 1)
            for pid in np.unique(arrays["pids"]):
                is_here = (arrays["pids"] == pid) & (arrays["camids"] == camid)
                np.testing.assert_array_equal(cells[pid - 1, 0], arrays[kind][is_here])


def test_images_that_no_trial_needs_are_not_read(
    saved_features, sysu_run, output_of, monkeypatch, tmp_path
):
    """They are where features are kept. The scores are the same."""
    images_read = record_reads(monkeypatch)
    tree = str(sysu_run["data"])
    flags = ["--data-path", tree, "--resume", best_checkpoint(sysu_run), "--workers", 0]
    output_of("test.py", *flags, "--mode", "indoor", "--log-path", tmp_path)

    needed = set(sysu_query(tree).paths)
    for trial in range(10):
        needed |= set(sysu_gallery(tree, "indoor", trial=trial).paths)
    assert sorted(images_read) == sorted(needed)
    assert len(needed) < len(saved_features.images_read)

    expected_rows = {}
    for row in saved_features.result["results"]:
        if row["protocol"] == "indoor-search single-shot":
            expected_rows[row["protocol"], row["feature"]] = row
    check_same_scores(rows_of(only_json(tmp_path)), expected_rows, tolerance=1e-6)


# ---- files of features from elsewhere -----------------------------------------------------------


def test_files_of_regdb_are_trials_and_tell_the_modality(error_of, output_of, tmp_path):
    """By an array of their own; without one, the camera numbers tell it."""
    thermal = np.arange(24) % 3 == 0
    fc = np.random.default_rng(0).standard_normal((24, 8))
    by_camera = features_file(tmp_path / "by_camera.npz", fc=fc, camids=1 + thermal)
    by_array = features_file(
        tmp_path / "by_array.npz",
        fc=fc,
        camids=np.arange(24),
        thermal=thermal,
        network=json.dumps({"trial": 7}),
    )
    command = ["-m tools.score", "--dataset", "regdb", "--log-path", tmp_path]
    output_of(*command, by_camera, by_array, "--search", "both")

    content = only_json(tmp_path)
    counts = content["counts"]
    assert counts.keys() == {"v2t", "t2v"}
    assert (counts["v2t"]["queries"], counts["v2t"]["gallery_images"]) == (16, 8)
    assert (counts["t2v"]["queries"], counts["t2v"]["gallery_images"]) == (8, 16)
    first, second = content["results"][0]["trials"]
    assert first.pop("trial") == 1
    assert second.pop("trial") == 7
    assert first == second
    assert "trial 7" in error_of(*command, by_array, by_array)


def test_features_of_another_dataset_are_an_error(error_of, tmp_path):
    """test.py writes the dataset into the file; others need not."""
    file = features_file(tmp_path / "f.npz", network=json.dumps({"dataset": "regdb"}))
    assert "--dataset regdb" in error_of("-m tools.score", file, "--log-path", tmp_path)


def test_options_of_a_result_are_named(sysu_tree, output_of, tmp_path):
    flags = ["--pretrained", "none", "--arch", "resnet18", "--img-h", 96, "--img-w", 32]
    flags += ["--low-dim", 16, "--features", "fc", "--flip"]
    printed = output_of("test.py", "--data-path", sysu_tree, "--log-path", tmp_path, *flags)
    content = only_json(tmp_path, "*-fc-flip.json")
    assert "; options: flip" in printed
    assert content["options"] == ["flip"]
    assert content["networks"][0]["flip"]
    assert {row["feature"] for row in content["results"]} == {"fc", "chance"}
    assert "warning" not in printed  # an untrained network was asked for

    file = features_file(tmp_path / "f.npz")
    printed = output_of("-m tools.score", file, "--rerank", "--log-path", tmp_path)
    assert "; options: rerank" in printed
    assert only_json(tmp_path, "score_*-rerank.json")["options"] == ["rerank"]


@pytest.mark.parametrize(("signal", "expected_warnings"), [(0.0, [4]), (3.0, [])])
def test_results_near_chance_are_warned_of_in_one_line(
    output_of, tmp_path, signal, expected_warnings
):
    """It names the four protocols. Random rankings score what is to be expected of them."""
    rng = np.random.default_rng(0)
    pids = np.repeat(np.arange(40), 12)
    file = features_file(
        tmp_path / "f.npz",
        pids=pids,
        camids=np.tile([1, 2, 3, 4, 5, 6], 80),
        paths=np.arange(480).astype(str),
        fc=rng.standard_normal((480, 16)) + signal * rng.standard_normal((40, 16))[pids],
    )
    printed = output_of("-m tools.score", file, *ALL_PROTOCOLS, "--log-path", tmp_path)
    content = only_json(tmp_path)
    for (protocol, kind), row in rows_of(content).items():
        if kind == "chance":
            chance = content["counts"][protocol]["chance"]
            assert row["mean"]["rank1"] == pytest.approx(chance, abs=0.02)
    warnings = [line for line in printed.splitlines() if "twice chance" in line]
    assert [line.count("-shot fc ") for line in warnings] == expected_warnings
    head = (
        "all-search single-shot: 160 queries (0 without a match, not counted), "
        "160 gallery images of 40 persons"
    )
    assert head in printed


@pytest.mark.parametrize("name", DATASETS)
def test_an_entry_under_another_name_is_scored_the_same(
    name, request, output_of, monkeypatch, tmp_path
):
    """Nothing but its entry tells test.py and tools.score how to score a dataset."""
    another = dataclasses.replace(DATASETS[name], title="Another")
    monkeypatch.setitem(DATASETS, "another", another)
    tree = request.getfixturevalue(f"{name}_tree")
    flags = ["--pretrained", "none", "--arch", "tiny", "--low-dim", 16]
    flags += ["--img-h", 96, "--img-w", 32, "--workers", 0, "--data-path", tree]
    results = []
    for dataset in (name, "another"):
        folder = tmp_path / dataset
        output_of(
            "test.py", *flags, "--dataset", dataset, "--log-path", folder,
            "--save-features", folder / "net.npz",
        )  # fmt: skip
        output_of("-m tools.score", folder / "net.npz", "--dataset", dataset, "--log-path", folder)
        results.append((only_json(folder, "test_*.json"), only_json(folder, "score_*.json")))
    (tested, scored), (tested_another, scored_another) = results
    assert tested["counts"]
    assert tested_another["counts"] == tested["counts"]
    assert tested_another["results"] == tested["results"]
    assert scored["results"] == tested["results"]
    assert scored_another["results"] == tested["results"]


# ---- result files -------------------------------------------------------------------------------

TEST_FLAGS = ["--mode", "indoor", "--features", "fc", "--workers", 0]


@pytest.mark.parametrize(
    ("script", "source"),
    [
        ("test.py", "--data-path first/tree --resume {}/net.t"),
        ("test.py", "--data-path {}/tree --resume first/net.t"),
        (
            "test.py",
            "--data-path first/tree --arch tiny --img-h 96 --img-w 32 --pretrained {}/weights.pth",
        ),
        ("-m tools.score", "{}/net.npz"),
    ],
)
def test_results_of_other_sources_are_not_written_over(
    sysu_run, output_of, error_of, monkeypatch, tmp_path, script, source
):
    """Files of the same names and contents, in two folders. A test may be repeated."""
    weights = model.BACKBONES["tiny"].build().state_dict()
    for folder in (tmp_path / "first", tmp_path / "second"):
        folder.mkdir()
        shutil.copy(best_checkpoint(sysu_run), folder / "net.t")
        torch.save(weights, folder / "weights.pth")
        features_file(folder / "net.npz")
        (folder / "tree").symlink_to(sysu_run["data"])
    monkeypatch.chdir(tmp_path)
    first = source.format("first").split()
    second = source.format("second").split()
    log_path = tmp_path / "log"
    usual_flags = ["--log-path", log_path]
    if script == "test.py":
        usual_flags += TEST_FLAGS

    output_of(script, *first, *usual_flags)
    content = only_json(log_path)
    output_of(script, *first, *usual_flags)
    assert only_json(log_path) == content

    (result_file,) = log_path.glob("*.json")
    line = error_of(script, *second, *usual_flags)
    assert str(result_file) in line
    assert "give another --log-path" in line

    output_of(script, *second, *usual_flags, "--log-path", tmp_path / "another_log")
    assert only_json(tmp_path / "another_log")["results"] == content["results"]


def test_untrained_networks_of_other_archs_and_sizes_have_result_files_of_their_own(
    sysu_run, output_of, tmp_path
):
    command = ["test.py", "--pretrained", "none", "--data-path", sysu_run["data"], *TEST_FLAGS]
    command += ["--img-h", 96, "--img-w", 32, "--log-path", tmp_path]
    output_of(*command, "--arch", "tiny", "--low-dim", 16)
    output_of(*command, "--arch", "resnet18", "--low-dim", 16)
    output_of(*command, "--arch", "resnet18", "--low-dim", 512)
    output_of(*command, "--arch", "resnet18")  # 512 is the default: the same run
    names = sorted(file.name for file in tmp_path.glob("*.json"))
    assert names == [
        "test_untrained_resnet18_none_imgh96_imgw32_indoor-single-fc.json",
        "test_untrained_resnet18_none_lowdim16_imgh96_imgw32_indoor-single-fc.json",
        "test_untrained_tiny_none_lowdim16_imgh96_imgw32_indoor-single-fc.json",
    ]
    for arch in ("tiny", "resnet18"):
        assert only_json(tmp_path, f"*_{arch}_*_lowdim16_*.json")["networks"][0]["arch"] == arch


def test_results_of_another_precision_have_a_file_of_their_own(sysu_tree, output_of, tmp_path):
    command = ["test.py", "--pretrained", "none", "--data-path", sysu_tree, *TEST_FLAGS]
    command += ["--arch", "tiny", "--img-h", 96, "--img-w", 32, "--log-path", tmp_path]
    output_of(*command)
    output_of(*command, "--precision", "fp32")
    name = "test_untrained_tiny_none_imgh96_imgw32_indoor-single-fc"
    assert {file.name for file in tmp_path.glob("*.json")} == {f"{name}.json", f"{name}-fp32.json"}
    assert only_json(tmp_path, f"{name}.json")["options"] == []
    assert only_json(tmp_path, f"{name}-fp32.json")["options"] == ["fp32"]


def test_all_files_of_features_are_checked_before_one_is_scored(output_of, error_of, tmp_path):
    folders = [tmp_path / name for name in ("x", "y", "z")]
    for folder in folders:
        folder.mkdir()
    tool = ["-m tools.score", "--log-path", tmp_path]
    output_of(*tool, features_file(folders[2] / "b.npz"))
    files = [features_file(folders[0] / "a.npz"), features_file(folders[1] / "b.npz")]
    assert "--log-path" in error_of(*tool, *files)
    assert not list(tmp_path.glob("score_a_*"))
