"""The drawn datasets, and the measurements."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import files_of
from PIL import Image

import data_manager
from tools import benchmark
from tools.make_synthetic import DIFFICULTIES, draw, make_sysu, real_sysu, small_sysu


def test_a_tree_is_the_same_byte_for_byte(tmp_path):
    trees = {}
    for name, seed, workers in (("a", 4, 1), ("b", 4, 2), ("c", 5, 1)):
        make_sysu(tmp_path / name, ids=5, images=2, seed=seed, workers=workers)
        trees[name] = {file.relative_to(tmp_path / name): file.read_bytes() for file in files_of(tmp_path / name)}
    assert trees["a"] == trees["b"] != trees["c"] and len(set(trees["a"].values())) == len(trees["a"])


@pytest.mark.parametrize("ids", [5, 12, 40])
def test_small_trees_hold_what_every_protocol_needs(ids):
    splits, counts = small_sysu(ids, 12, seed=0)
    assert sorted(pid for pids in splits.values() for pid in pids) == list(range(1, ids + 1)) and all(splits.values())
    assert all({3, 6} & {*cams} and {1, 2, 4, 5} & {*cams} for cams in counts.values())
    assert all(min(counts[pid].values()) >= 10 for pid in splits["test"])
    for pids in splits.values():
        assert any({1, 2} <= set(counts[pid]) and {3, 6} & set(counts[pid]) for pid in pids)


def test_full_size_is_that_of_sysu_mm01():
    splits, counts = real_sysu(seed=0)
    training, test = splits["train"] + splits["val"], splits["test"]
    assert [len(pids) for pids in (splits["train"], splits["val"], test)] == [296, 99, 96]
    for pids, rgb, ir in ((counts, 30071, 15792), (training, 22258, 11909), (test, 6775, 3803)):
        images = {cam: sum(counts[pid].get(cam, 0) for pid in pids) for cam in range(1, 7)}
        assert sum(images[cam] for cam in (1, 2, 4, 5)) == rgb and images[3] + images[6] == ir
    assert (images[3], images[6]) == (1883, 1920)
    assert [sum(cam in counts[pid] for pid in test) for cam in range(1, 7)] == [56, 56, 93, 94, 95, 96]
    assert min(n for pid in test for n in counts[pid].values()) == 13


def test_regdb_trees(regdb_tree):
    for trial, subset in ((trial, subset) for trial in range(1, 11) for subset in ("train", "test")):
        sides = [data_manager.regdb_split(regdb_tree, trial, side, subset) for side in ("visible", "thermal")]
        visible, thermal = ([Path(path).parent.name for path in side.paths] for side in sides)
        assert visible == thermal and all(np.bincount(side.pids).tolist() == [10] * 4 for side in sides)
        assert all(Path(path).is_file() for side in sides for path in side.paths)
    with Image.open(sides[0].paths[0]) as image:
        assert image.size == (64, 128) and image.mode == "RGB"


def test_infrared_follows_luminance_at_the_easy_end_only():
    """Over many persons, how bright a body is in infrared camera 3 against how bright it is in camera 1."""

    def body(pid: int, camera: int, difficulty: str) -> float:
        image = draw(0, pid, camera, 1, DIFFICULTIES[difficulty]).convert("L")
        return image.resize((5, 6), Image.Resampling.BOX).getpixel((2, 2))  # the mean over the middle of the trunk

    for difficulty, least, most in (("easy", 0.7, 1), ("hard", -0.4, 0.4)):
        pairs = [(body(pid, 1, difficulty), body(pid, 3, difficulty)) for pid in range(1, 61)]
        assert least < np.corrcoef(np.transpose(pairs))[0, 1] < most


def test_make_synthetic_leaves_other_folders_alone(call, bad, tmp_path):
    tool = "-m tools.make_synthetic", "--dataset", "sysu", "--images", 2, "--workers", 1, "--out", tmp_path / "tree"
    assert "written" in call(*tool, "--ids", 5)
    before = files_of(tmp_path)
    assert "already there" in call(*tool, "--ids", 5) and files_of(tmp_path) == before
    assert "give another --out, or delete it" in bad(*tool, "--ids", 5, "--seed", 1)
    assert "--ids from 5" in bad(*tool, "--ids", 3)


SIZE = "--workers 0 --batch-size 16 --img_h 81 --img_w 16 --steps 1"
TRAIN = f"train {SIZE} --warmup 0 --arch resnet18"
ROWS = {
    "evaluate": ["small", "30 x 20, from 128-dimensional features"],
    f"data {SIZE}": ["image by image, 0 workers", "ours, gathered on the host", "ours, from the host to the network"],
    TRAIN: ["the published way", "ours"],
    f"scale {SIZE.removeprefix('--workers 0')} --warmup 0 --arch tiny --batch-size 32": ["no GPU", "strong", "weak"],
}


@pytest.mark.parametrize(("command", "rows"), ROWS.items(), ids=["evaluate", "data", "train", "scale"])
def test_benchmarks_run(monkeypatch, capsys, tmp_path, command, rows):
    """What they measure is for their reader; that they measure all of it is for us."""
    monkeypatch.setattr(benchmark, "SIZES", {"small": (30, 20, 5)})
    monkeypatch.setattr(benchmark, "LARGE", (30, 20, 5))
    forked = partial(torch.multiprocessing.start_processes, start_method="fork")
    monkeypatch.setattr(torch.multiprocessing, "spawn", forked)
    monkeypatch.setattr("sys.argv", ["benchmark", *command.split()])
    monkeypatch.chdir(tmp_path)
    benchmark.main()
    out = capsys.readouterr().out
    assert all(row in out for row in rows)
