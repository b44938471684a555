"""What test.py does beside plain scores: each image read once, options, features in files, other directions."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

import data_loader
import data_manager
from data_manager import Split
from eval_metrics import Distances, eval_regdb
from model import EmbedNet

SEARCHES = [(mode, shots) for mode in ("all", "indoor") for shots in ("single", "multi")]
EVERYTHING = ["--mode", "both", "--gall-mode", "both"]


def only(folder: Path, pattern: str) -> dict:
    (file,) = folder.glob(pattern)
    return json.loads(file.read_text())


@pytest.fixture
def opened(monkeypatch, tmp_path) -> Callable[[], Counter]:
    """Gives how often each image file was opened, by whichever process."""
    notes, open_image = tmp_path / "opened.txt", data_loader.Image.open

    def note_and_open(path: str, **options) -> Image.Image:
        with open(notes, "a") as file:
            file.write(f"{path}\n")
        return open_image(path, **options)

    monkeypatch.setattr(data_loader.Image, "open", note_and_open)
    return lambda: Counter(notes.read_text().splitlines())


@pytest.fixture
def trained(sysu_run, tmp_path) -> list:
    (best,) = sysu_run["models"].glob("*_best.t")
    return ["--data_path", sysu_run["data"], "--log_path", tmp_path, "--resume", best]


@pytest.mark.parametrize(
    ("flags", "searches"), [(EVERYTHING, SEARCHES), (["--mode", "indoor"], [("indoor", "single")])]
)
def test_each_image_is_opened_once_and_only_if_needed(
    trained, sysu_tree, opened, call, tmp_path, capsys, flags, searches
):
    call("test.py", *trained, *flags, "--flip", "--rerank", "--features", "fc")
    needed = {*data_manager.sysu_query(str(sysu_tree)).paths}
    for mode, shots in searches:
        for trial in range(10):
            needed |= {*data_manager.sysu_gallery(str(sysu_tree), mode, shots, trial).paths}
    assert opened() == dict.fromkeys(needed, 1)
    # What is not at its default is named beside the figures.
    assert "; options: flip, rerank" in capsys.readouterr().out
    content = only(tmp_path, "*-fc-flip-rerank.json")
    assert content["options"] == ["flip", "rerank"] and content["networks"][0]["flip"]
    assert {row["feature"] for row in content["results"]} == {"fc", "chance"}


def test_features_in_files_score_the_same(trained, sysu_tree, opened, call, tmp_path):
    file = tmp_path / "features" / "net.npz"
    call("test.py", *trained, *EVERYTHING, "--save_features", file, "--mat", tmp_path / "mat")
    images = data_manager.sysu_test(str(sysu_tree))
    assert opened() == dict.fromkeys(images.paths, 1)
    with np.load(file, allow_pickle=False) as saved:
        saved = dict(saved)
    assert [str(sysu_tree / path) for path in saved["paths"]] == images.paths
    np.testing.assert_array_equal([saved["pids"], saved["camids"]], images[1:])
    assert (len(saved["fc"]), saved["fc"].shape[1]) == (len(images.paths), 6 * 16)

    # In another order, and with the images of a person in a camera told apart by their paths alone.
    order = np.random.default_rng(0).permutation(len(images.paths))
    mixed = {name: values[order] if values.ndim else values for name, values in saved.items()}
    np.savez(file.with_name("mixed.npz"), **mixed)
    call("-m tools.score", file, file.with_name("mixed.npz"), *EVERYTHING, "--log_path", tmp_path)
    tested, scored, shuffled = (only(tmp_path, f"{name}_*.json") for name in ("test", "score_net", "score_mixed"))
    assert scored["results"] == tested["results"] and scored["counts"] == tested["counts"]
    assert scored["networks"] == [{"features": str(file), **tested["networks"][0]}]
    for row, other in zip(tested["results"], shuffled["results"], strict=True):
        if row["feature"] != "chance":  # random rankings are of positions
            np.testing.assert_allclose([*row["mean"].values()], [*other["mean"].values()], atol=1e-6)

    for cam in range(1, 7):
        cells = scipy.io.loadmat(tmp_path / f"mat/pool5_cam{cam}.mat")["feature"]
        assert cells.shape == (533, 1) and sum(len(cell) for cell in cells[:, 0]) == (images.camids == cam).sum()
        for pid in np.unique(images.pids):
            rows = (images.pids == pid) & (images.camids == cam)
            np.testing.assert_array_equal(cells[pid - 1, 0].reshape(-1, saved["pool5"].shape[1]), saved["pool5"][rows])


def test_both_directions_use_the_branch_of_each_modality(regdb_tree, call, tmp_path):
    net = EmbedNet(4, low_dim=16, arch="resnet18", pretrained="none").eval()
    with torch.no_grad():
        net.thermal_net.thermal.conv1.weight.mul_(-1)  # streams start alike
    torch.save({"net": net.state_dict(), "epoch": 5}, tmp_path / "net.t")
    flags = ["--dataset", "regdb", "--data_path", regdb_tree, "--resume", tmp_path / "net.t", "--log_path", tmp_path]
    flags += ["--img_h", 96, "--img_w", 32, "--trial", 2]
    call("test.py", *flags, "--save_features", tmp_path / "f{trial}.npz", "--tvsearch")
    with np.load(tmp_path / "f2.npz") as saved:
        fc, pids, visible = saved["fc"], saved["pids"], saved["camids"] == 1
    for modality, side in (("visible", visible), ("thermal", ~visible)):
        split = data_manager.regdb_split(str(regdb_tree), 2, modality, "test")
        (images,) = data_loader.read_images([split.paths], (96, 32), 2)
        with torch.no_grad():
            expected = net(**{modality: data_loader.to_input(torch.from_numpy(images), (96, 32))})[1]
        np.testing.assert_allclose(fc[side], expected, atol=1e-4)
    (row, *_), expected = only(tmp_path, "test_*.json")["results"], eval_regdb(
        Distances(fc[~visible], fc[visible]), pids[~visible], pids[visible]
    )  # fmt: skip
    assert (row["protocol"], row["feature"], row["mean"]["mAP"]) == ("t2v", "fc", expected.mAP)

    for trial in (3, 4):
        call("test.py", *flags[:-1], trial, "--save_features", tmp_path / "f{trial}.npz", "--search", "both")
    files = [tmp_path / f"f{trial}.npz" for trial in (2, 3, 4)]
    call("-m tools.score", "--dataset", "regdb", *files, "--search", "both", "--log_path", tmp_path / "score")
    rows = only(tmp_path / "score", "*.json")["results"]
    assert [trial["trial"] for trial in rows[0]["trials"]] == [2, 3, 4]
    (swapped,) = (r for r in rows if (r["protocol"], r["feature"]) == ("t2v", "fc"))
    assert swapped["trials"][0] == row["trials"][0]


def features_file(path: Path, **changes) -> Path:
    """Features of two persons in every camera; ``changes`` replaces arrays, or takes them away where None."""
    pids, camids = np.repeat([1, 2], 12), np.tile(np.repeat(np.arange(1, 7), 2), 2)
    arrays = {"pids": pids, "camids": camids, "paths": np.array([f"{i:02d}" for i in range(24)]), "fc": np.eye(24)}
    np.savez(path, **{name: values for name, values in (arrays | changes).items() if values is not None})
    return path


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        ({"pids": None}, [], "it has no array 'pids'"),
        ({"fc": None}, [], "must hold features"),
        ({"camids": np.full(24, 7)}, [], "camids must be 1 to 6 for sysu"),
        ({}, ["--dataset", "regdb"], "camids must be 1 to 2 for regdb: is --dataset regdb right?"),
        ({"camids": np.tile([1, 2], 12)}, [], "is it RegDB? Give --dataset regdb"),
        ({"camids": np.tile([1, 4], 12)}, [], "no infrared images"),
        ({"chance": np.eye(24)}, [], "of any name but chance"),
        ({"paths": np.array(["a"] * 24)}, [], "paths must be text, another one for each image"),
        ({"paths": np.array([f"{i:02d}" for i in range(24)], object)}, [], "Object arrays cannot be loaded"),
        ({"camids": np.tile([3, 6], 12)}, [], "no images in the gallery's cameras"),
        ({"pids": np.arange(24) % 4 + np.tile([0, 9], 12)}, ["--mode", "indoor"], None),
        ({"pids": np.arange(24)}, [], "no query has a match in the gallery"),
        ({"pids": np.ones(24)}, [], "of whole numbers"),
        ({"paths": np.array(["a"])}, [], "lists of one length"),
        ({"fc": np.eye(23)}, [], "fc (23, 23) float64 is not (24, dim)"),
        ({"fc": np.full((24, 3), np.nan)}, [], "finite float features"),
        ({"fc": np.diag(np.arange(24.0))}, [], "a feature is zero"),
        ({"fc": np.array([None] * 24)}, [], "cannot be read as features (ValueError: "),
        ({"network": "[1]"}, [], "network must be a JSON object"),
        ({"network": '{"trial": -5}'}, [], "the trial in network must be a number from 0 on, not -5"),
        ({"fc": np.eye(24, dtype=np.longdouble)}, [], "finite float features"),
        ({"fc": 1e300 * np.eye(24)}, ["--distance", "euclidean"], "not finite"),
        ({"fc": np.float32(3e38) * np.eye(24, dtype=np.float32)}, [], None),
        ({"network": "{"}, [], "cannot be read as features (JSONDecodeError: "),
        ({}, ["--features", "pool5"], "holds no features 'pool5': there are fc"),
        ({}, ["--rand_perm", "x.mat"], "--gallery official and --rand_perm FILE"),
    ],
)
def test_bad_feature_files(bad, call, tmp_path, changes, flags, message):
    command = ["-m tools.score", features_file(tmp_path / "f.npz", **changes), "--log_path", tmp_path / "log", *flags]
    if message is None:
        call(*command)
        return
    assert message in bad(*command)
    assert not [*tmp_path.rglob("*.json")]


def test_damaged_feature_files(bad, tmp_path):
    path = features_file(tmp_path / "f.npz")
    for damage in (path.read_bytes()[:-100], b"", b"text"):
        (tmp_path / "bad.npz").write_bytes(damage)
        assert "bad.npz cannot be read as features" in bad(
            "-m tools.score", tmp_path / "bad.npz", "--log_path", tmp_path
        )
    assert "no.npz not found" in bad("-m tools.score", tmp_path / "no.npz", "--log_path", tmp_path)
    twice = bad("-m tools.score", *regdb_files(tmp_path), "--dataset", "regdb", "--log_path", tmp_path)
    assert "b.npz: another file is of trial 7 too" in twice


def regdb_files(folder: Path) -> list[Path]:
    network = json.dumps({"trial": 7})
    return [features_file(folder / f"{n}.npz", camids=np.tile([1, 2], 12), network=network) for n in "ab"]


def test_numbers_unlike_the_real_datasets(caplog):
    def listed(persons: int, images: int) -> Split:
        pids, camids = np.repeat(np.arange(persons), images * 6), np.tile(np.repeat(np.arange(1, 7), images), persons)
        return Split([f"{i:06d}" for i in range(len(pids))], pids, camids)

    for persons, warned in ((20, 0), (96, 2), (90, 2), (80, 0)):
        images = listed(persons, 2)
        caplog.clear()
        data_manager.check_counts(images, data_manager.sysu_searches(images, "both", "single"), "sysu")
        assert caplog.text.count("is the data complete?") == warned
    pids = np.repeat(np.arange(206), 20)
    images = Split([""] * 4120, pids, np.tile(np.repeat([1, 2], 10), 206))
    for split, warned in ((images, 0), (images.take(np.arange(4119)), 1)):
        caplog.clear()
        data_manager.check_counts(split, data_manager.regdb_searches(split, 1, "v2t"), "regdb")
        assert caplog.text.count("but RegDB has 206, 2060 and 2060") == warned


def test_an_untrained_network_smells_of_chance(sysu_tree, call, tmp_path, capsys):
    flags = ["--data_path", sysu_tree, "--log_path", tmp_path, "--pretrained", "none", "--arch", "resnet18"]
    call("test.py", *flags, "--img_h", 96, "--img_w", 32, "--low-dim", 16, "--features", "fc")
    out = capsys.readouterr().out
    assert out.count("warning: rank-1 is about what chance gives") == 1  # once, not per row
