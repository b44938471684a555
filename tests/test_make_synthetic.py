"""The trees of synthetic people: their sizes, their lists, and what difficulty means."""

from pathlib import Path

import numpy as np
import pytest
from conftest import files_of
from PIL import Image

import data_manager
from tools import make_synthetic
from tools.make_synthetic import (
    CAMERAS,
    DIFFICULTIES,
    draw_image,
    llcm_tree,
    make_sysu,
    real_sysu,
    small_sysu,
    sysu_tree,
)

SYSU_VISIBLE = {1, 2, 4, 5}
SYSU_INFRARED = {3, 6}


def content_of(tree: Path) -> dict[Path, bytes]:
    """Relative path -> bytes of each file."""
    return {file.relative_to(tree): file.read_bytes() for file in files_of(tree)}


def test_a_tree_is_the_same_byte_for_byte(tmp_path):
    make_sysu(tmp_path / "one worker", ids=5, images=2, seed=4, workers=1)
    make_sysu(tmp_path / "two workers", ids=5, images=2, seed=4, workers=2)
    make_sysu(tmp_path / "other seed", ids=5, images=2, seed=5, workers=1)
    content = content_of(tmp_path / "one worker")
    assert content == content_of(tmp_path / "two workers")
    assert content != content_of(tmp_path / "other seed")
    assert len(set(content.values())) == len(content), "two files are alike"


# ---- SYSU-MM01 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [5, 12, 40])
def test_small_trees_hold_what_every_protocol_needs(ids):
    splits, counts = small_sysu(ids, 12, seed=0)
    assert set(splits) == {"train", "val", "test"}
    assert all(splits.values()), "a split is empty"
    pids = splits["train"] + splits["val"] + splits["test"]
    assert sorted(pids) == list(range(1, ids + 1))
    for pid in pids:
        cameras = set(counts[pid])
        assert cameras & SYSU_VISIBLE
        assert cameras & SYSU_INFRARED
    for pid in splits["test"]:
        assert min(counts[pid].values()) >= 10, "too few for a multi-shot gallery"
    for split_pids in splits.values():
        # The indoor protocol needs somebody in cameras 1, 2 and an infrared one.
        camera_sets = [set(counts[pid]) for pid in split_pids]
        assert any({1, 2} <= cameras and cameras & SYSU_INFRARED for cameras in camera_sets)


def n_images(counts: dict[int, dict[int, int]], pids: list[int], cameras: set[int]) -> int:
    """Number of images of some persons in some cameras."""
    total = 0
    for pid in pids:
        for camera, count in counts[pid].items():
            if camera in cameras:
                total += count
    return total


def test_full_size_is_that_of_sysu_mm01():
    splits, counts = real_sysu(seed=0)
    assert len(counts) == 513
    assert len(splits["train"]) == 296
    assert len(splits["val"]) == 99
    assert len(splits["test"]) == 96

    everyone = list(counts)
    assert n_images(counts, everyone, SYSU_VISIBLE) == 30071
    assert n_images(counts, everyone, SYSU_INFRARED) == 15792
    training = splits["train"] + splits["val"]
    assert n_images(counts, training, SYSU_VISIBLE) == 22258
    assert n_images(counts, training, SYSU_INFRARED) == 11909
    test = splits["test"]
    assert n_images(counts, test, SYSU_VISIBLE) == 6775
    assert n_images(counts, test, {3}) == 1883
    assert n_images(counts, test, {6}) == 1920

    n_persons = dict.fromkeys(range(1, 7), 0)
    fewest = 999
    for pid in test:
        for camera, count in counts[pid].items():
            n_persons[camera] += 1
            fewest = min(fewest, count)
    assert n_persons == {1: 56, 2: 56, 3: 93, 4: 94, 5: 95, 6: 96}
    assert fewest == 13


def test_a_sysu_tree_holds_the_images_of_its_plan():
    plan = small_sysu(12, 9, seed=2)
    tree = sysu_tree(12, 9, seed=2)
    n_planned = sum(sum(counts.values()) for counts in plan.counts.values())
    assert len(tree.images) == n_planned
    for path, key in tree.images.items():
        assert path == f"cam{key.camera_id}/{key.pid:04d}/{key.index:04d}.jpg"
        assert key.index <= plan.counts[key.pid][key.camera_id]
    for split in ("train", "val", "test"):
        listed = tree.texts[f"exp/{split}_id.txt"].split(",")
        assert [int(pid) for pid in listed] == sorted(plan.splits[split])


# ---- RegDB and LLCM ------------------------------------------------------------------------------


def test_regdb_trees(regdb_tree):
    for trial in range(1, 11):
        for subset in ("train", "test"):
            persons = {}
            for modality in ("visible", "thermal"):
                split = data_manager.regdb_split(regdb_tree, trial, modality, subset)
                assert np.bincount(split.pids).tolist() == [10, 10, 10, 10]
                assert all(Path(path).is_file() for path in split.paths)
                persons[modality] = [Path(path).parent.name for path in split.paths]
            assert persons["visible"] == persons["thermal"]
    for folder in ("Visible", "Thermal"):
        first_file = next((regdb_tree / folder).rglob("*.bmp"))
        with Image.open(first_file) as image:
            assert image.size == (64, 128)
            assert image.mode == "RGB"


@pytest.mark.parametrize("modality", ["vis", "nir"])
def test_llcm_trees(modality):
    tree = llcm_tree(20, 2, seed=1)
    test_pids = {int(pid) for pid in tree.texts["idx/test_id.txt"].split(",")}
    train_pids = set(range(1, 21)) - test_pids
    assert len(train_pids) == round(20 * 713 / 1064)

    cameras_of = {pid: [] for pid in range(1, 21)}
    for path, key in tree.images.items():
        if path.startswith(f"{modality}/"):
            assert key.pid in train_pids
        elif path.startswith(f"test_{modality}/"):
            assert key.pid in test_pids
        else:
            continue  # of the other modality
        cameras_of[key.pid].append(key.camera_id)
        assert (CAMERAS[key.camera_id].infrared is not None) == (modality == "nir")
    for cameras in cameras_of.values():
        assert len(cameras) == 6
        assert len(set(cameras)) == 3

    labels = {pid: label for label, pid in enumerate(sorted(train_pids))}
    lines = tree.texts[f"idx/train_{modality}.txt"].splitlines()
    assert len(lines) == 6 * len(train_pids)
    for line in lines:
        path, label = line.split()
        assert labels[tree.images[path].pid] == int(label)


# ---- difficulty ----------------------------------------------------------------------------------


def trunk_brightness(pid: int, camera_id: int, difficulty: str) -> float:
    """Mean grey level over the middle of a person's trunk."""
    image = draw_image(0, pid, camera_id, 1, DIFFICULTIES[difficulty])
    cells = image.convert("L").resize((5, 6), Image.Resampling.BOX)
    return cells.getpixel((2, 2))


@pytest.mark.parametrize(("difficulty", "least", "most"), [("easy", 0.7, 1), ("hard", -0.4, 0.4)])
def test_infrared_follows_luminance_at_the_easy_end_only(difficulty, least, most):
    """Over many persons, brightness in infrared camera 3 against brightness in camera 1."""
    visible = [trunk_brightness(pid, 1, difficulty) for pid in range(1, 61)]
    infrared = [trunk_brightness(pid, 3, difficulty) for pid in range(1, 61)]
    correlation = np.corrcoef(visible, infrared)[0, 1]
    assert least < correlation < most


# ---- the command ---------------------------------------------------------------------------------

COMMAND = ["-m tools.make_synthetic", "--dataset", "sysu", "--images", 2, "--workers", 1]


def test_a_folder_with_another_content_stays_as_it_is(output_of, error_of, tmp_path):
    tool = [*COMMAND, "--out", tmp_path / "tree"]
    assert "written" in output_of(*tool, "--ids", 5)
    before = files_of(tmp_path)
    assert "already there" in output_of(*tool, "--ids", 5)
    assert files_of(tmp_path) == before
    message = error_of(*tool, "--ids", 5, "--seed", 1)
    assert f"--out {tmp_path / 'tree'}" in message
    assert "give another --out, or delete it" in message


def test_an_interrupted_tree_is_made_anew(output_of, tmp_path):
    leftover = tmp_path / "tree.synthetic-partial" / "cam1" / "leftover.jpg"
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    output_of(*COMMAND, "--out", tmp_path / "tree", "--ids", 5)
    names = [file.name for file in files_of(tmp_path)]
    assert "synthetic.json" in names
    assert "leftover.jpg" not in names
    assert not leftover.parent.parent.exists()


def test_ctrl_c_ends_all_workers_at_once(tmp_path, monkeypatch):
    def interrupt(saved_images, total):
        next(saved_images)
        raise KeyboardInterrupt

    monkeypatch.setattr(make_synthetic, "show_progress", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_sysu(tmp_path / "tree", ids=30, images=9, workers=2)
    assert not (tmp_path / "tree").exists()
    n_planned = len(sysu_tree(30, 9, seed=0).images)
    assert len(list(tmp_path.rglob("*.jpg"))) < n_planned / 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ids", 3], "--ids 3: give a number from 5 to 9999"),
        (["--ids", 10000], "--ids 10000: give a number from 5 to 9999"),
        (["--images", 1], "--images 1: give a number from 2 to 999"),
        (["--images", 1000], "--images 1000: give a number from 2 to 999"),
        (["--ids", 0], "--ids"),
        (["--seed", -1], "--seed"),
        (["--workers", 0], "--workers"),
        (["--difficulty", "none"], "--difficulty"),
        (["--ids", 5, "--full"], "--full"),
    ],
)
def test_wrong_flags(error_of, tmp_path, flags, message):
    assert message in error_of(*COMMAND, "--out", tmp_path / "tree", *flags)
