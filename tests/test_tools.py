"""The drawn datasets and the pictures of them."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import run_script, succeed
from PIL import Image

import data_manager
from tools.make_synthetic import DIFFICULTIES, draw, make_sysu, real_sysu, small_sysu


def digest(tree: Path) -> dict[str, str]:
    files = sorted(path for path in tree.rglob("*") if path.is_file())
    return {path.relative_to(tree).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_tree_is_the_same_byte_for_byte(tmp_path):
    for name, workers in (("a", 1), ("b", 2)):
        make_sysu(tmp_path / name, ids=5, images=2, seed=4, workers=workers)
    make_sysu(tmp_path / "c", ids=5, images=2, seed=5)
    a, b, c = (digest(tmp_path / name) for name in "abc")
    assert a == b and len(set(a.values())) == len(a) and a != c


@pytest.mark.parametrize("ids", [5, 12, 40])
def test_small_trees_hold_what_every_protocol_needs(ids):
    splits, counts = small_sysu(ids, 12, seed=0)
    assert sorted(pid for pids in splits.values() for pid in pids) == list(range(1, ids + 1)) and all(splits.values())
    for cams in counts.values():
        assert {3, 6} & set(cams) and {1, 2, 4, 5} & set(cams)
    assert all(min(counts[pid].values()) >= 10 for pid in splits["test"])
    for pids in splits.values():
        assert any({1, 2} <= set(counts[pid]) and {3, 6} & set(counts[pid]) for pid in pids)


def test_full_size_is_that_of_sysu_mm01():
    splits, counts = real_sysu(seed=0)
    assert [len(splits[s]) for s in ("train", "val", "test")] == [296, 99, 96]

    def images(pids, cams):
        return sum(counts[pid].get(cam, 0) for pid in pids for cam in cams)

    rgb, ir = (1, 2, 4, 5), (3, 6)
    assert (images(counts, rgb), images(counts, ir)) == (30071, 15792)
    training = splits["train"] + splits["val"]
    assert (images(training, rgb), images(training, ir)) == (22258, 11909)
    test = splits["test"]
    assert (images(test, (3,)), images(test, (6,)), images(test, rgb)) == (1883, 1920, 6775)
    present = Counter(cam for pid in test for cam in counts[pid])
    assert [present[cam] for cam in range(1, 7)] == [56, 56, 93, 94, 95, 96]
    assert min(n for pid in test for n in counts[pid].values()) == 13


def test_regdb_trees(regdb_tree):
    for trial in range(1, 11):
        for subset in ("train", "test"):
            visible, thermal = (
                data_manager.regdb_split(str(regdb_tree), trial, modality, subset)
                for modality in ("visible", "thermal")
            )
            assert Counter(visible.pids.tolist()) == Counter(thermal.pids.tolist()) == dict.fromkeys(range(4), 10)
            person_of = [Path(path).parent.name for path in visible.paths]
            assert person_of == [Path(path).parent.name for path in thermal.paths]
            assert all(Path(path).is_file() for path in visible.paths + thermal.paths)
    with Image.open(visible.paths[0]) as image:
        assert image.size == (64, 128) and image.mode == "RGB"


def test_infrared_follows_luminance_at_the_easy_end_only():
    """Over many persons, how bright a body is in infrared camera 3 against how bright it is in camera 1."""

    def body(pid: int, camera: int, difficulty: str) -> float:
        image = np.asarray(draw(0, pid, camera, 1, DIFFICULTIES[difficulty]).convert("L"), dtype=float)
        height, width = image.shape
        return image[height // 3 : height // 2, width * 2 // 5 : width * 3 // 5].mean()

    def correlation(difficulty: str) -> float:
        pairs = [(body(pid, 1, difficulty), body(pid, 3, difficulty)) for pid in range(1, 61)]
        return np.corrcoef(np.transpose(pairs))[0, 1]

    assert correlation("easy") > 0.7 and abs(correlation("hard")) < 0.4
    for camera, difficulty in ((3, "easy"), (6, "hard")):
        r, g, b = np.moveaxis(np.asarray(draw(0, 1, camera, 1, DIFFICULTIES[difficulty])), 2, 0)
        assert (r == g).all() and (g == b).all()


def test_make_synthetic_leaves_other_folders_alone(sysu_tree, tmp_path):
    flags = ["--dataset", "sysu", "--ids", 5, "--images", 2, "--workers", 1]
    assert "written" in succeed("-m tools.make_synthetic", *flags, "--out", tmp_path / "tree")
    before = digest(tmp_path / "tree")
    assert "already there" in succeed("-m tools.make_synthetic", *flags, "--out", tmp_path / "tree")
    other = run_script("-m tools.make_synthetic", *flags, "--seed", 1, "--out", tmp_path / "tree")
    assert other.returncode == 2 and "give another --out, or delete it" in other.stderr
    few = run_script("-m tools.make_synthetic", "--dataset", "sysu", "--ids", 3, "--out", tmp_path / "few")
    assert few.returncode == 2 and "--ids from 5" in few.stderr
    assert digest(tmp_path / "tree") == before and not (tmp_path / "few").exists()


def test_contact_sheet(sysu_tree, regdb_tree, call, tmp_path):
    for tree, columns in ((sysu_tree, 6), (regdb_tree, 2)):
        call("-m tools.visualize", "samples", tree, "--out", tmp_path / "sheet.png", "--persons", 20)
        with Image.open(tmp_path / "sheet.png") as sheet:
            pixels = np.asarray(sheet)
        persons = 12 if columns == 6 else 8
        cells = pixels[16:, 44:].reshape(persons, 163, columns, 75, 3)[:, :160, :, :72].std(axis=(1, 3, 4))
        present = [[*tree.glob(f"cam*/{pid:04d}/")] for pid in range(1, 13)] if columns == 6 else [[0, 0]] * 8
        assert (cells > 5).sum(axis=1).tolist() == [len(folders) for folders in present]  # the others are plain grey


@pytest.mark.parametrize(
    ("flags", "rows"),
    [
        (
            ["data", "--workers", 0],
            ["image by image, 0 workers", "ours, gathered on the host", "ours, from the host to the network"],
        ),
        (["train", "--arch", "resnet18", "--warmup", 1, "--workers", 0, "--only", "way"], ["the published way"]),
        (["train", "--arch", "resnet18", "--warmup", 1, "--only", "ours"], ["ours"]),
    ],
)
def test_benchmarks_run(tmp_path, flags, rows):
    """What they measure is for their reader; that they measure all of it is for us."""
    size = ["--batch-size", 16, "--img-h", 96, "--img-w", 32, "--steps", 1]
    json_file = ["--json", tmp_path / "b.json"] if flags[0] == "train" else []
    out = succeed("-m tools.benchmark", *flags, *size, *json_file)
    assert all(row in out for row in rows)
    if flags[0] == "train":
        assert [*json.loads((tmp_path / "b.json").read_text())["results"]] == rows
