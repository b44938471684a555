"""Lists: which images are train, query and gallery, and what the entry of a dataset decides."""

import dataclasses
import logging
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import golden

from data_manager import (
    DATASETS,
    EvalTrial,
    Selection,
    Split,
    concatenate,
    draw_seeded,
    keep_used,
    list_training_images,
    log_counts,
    no_junk,
    relabel,
    sysu_gallery,
    sysu_query,
    sysu_test,
    sysu_train,
)

SYSU = DATASETS["sysu"]
LISTS = golden("sysu_lists.json")


def split_of(pids, camids, thermal) -> Split:
    """A `Split` of these columns, without image files."""
    return Split(
        paths=[f"{number:04d}" for number in range(len(pids))],
        pids=np.array(pids),
        camids=np.array(camids),
        thermal=np.array(thermal),
    )


def warnings_in(caplog) -> list[str]:
    """The messages of all warnings. Lines of information may be logged beside them."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def sysu_columns(split: Split, root: Path) -> dict[str, list]:
    """The columns as the golden lists have them; the cameras in the paths must tell `thermal`."""
    paths = [Path(path).relative_to(root).as_posix() for path in split.paths]
    is_thermal = [path.startswith(("cam3/", "cam6/")) for path in paths]
    assert split.thermal.tolist() == is_thermal
    return {"paths": paths, "ids": split.pids.tolist(), "cams": split.camids.tolist()}


# ---- SYSU-MM01 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["all", "indoor"])
def test_sysu_queries_are_the_published_ones(golden_tree, mode):
    query = sysu_query(str(golden_tree), mode)
    assert sysu_columns(query, golden_tree) == LISTS[f"query_{mode}"]


@pytest.mark.parametrize("gall_mode", ["single", "multi"])
@pytest.mark.parametrize("mode", ["all", "indoor"])
def test_sysu_gallery_of_trial_1_is_the_published_one(golden_tree, mode, gall_mode):
    gallery = sysu_gallery(str(golden_tree), mode, gall_mode, trial=1)
    assert sysu_columns(gallery, golden_tree) == LISTS[f"gallery_{mode}_{gall_mode}_first_call"]


def test_multi_shot_takes_all_images_where_there_are_fewer_than_10(sysu_tree, caplog):
    gallery = sysu_gallery(str(sysu_tree), "all", "multi")
    expected = []
    for pid in np.unique(gallery.pids):
        for camid in (1, 2, 4, 5):
            expected += [str(path) for path in sysu_tree.glob(f"cam{camid}/{pid:04d}/*.jpg")]
    assert expected
    assert sorted(gallery.paths) == sorted(expected)
    assert caplog.text.count("fewer than 10 images to draw") == 1


def test_sysu_training_lists_are_the_published_ones(golden_tree):
    visible, thermal = sysu_train(str(golden_tree))
    visible_paths = sysu_columns(visible, golden_tree)["paths"]
    thermal_paths = sysu_columns(thermal, golden_tree)["paths"]
    assert visible_paths == LISTS["preprocess"]["train_rgb_paths"]
    assert thermal_paths == LISTS["preprocess"]["train_ir_paths"]


def test_sysu_labels_are_the_published_ones(golden_tree):
    expected = {}
    for pid, label in LISTS["preprocess"]["pid2label_if_sorted"].items():
        expected[int(pid)] = label
    for split in sysu_train(str(golden_tree)):
        labels = relabel(split.pids)
        assert dict(zip(split.pids.tolist(), labels.tolist(), strict=True)) == expected


def test_persons_of_one_modality_are_left_out_of_training(golden_tree, tmp_path, caplog):
    tree = shutil.copytree(golden_tree, tmp_path / "tree")
    all_visible, _ = sysu_train(str(tree))
    assert not warnings_in(caplog)
    for camera in ("cam3", "cam6"):
        shutil.rmtree(tree / camera / "0006", ignore_errors=True)

    visible, thermal = sysu_train(str(tree))
    remaining_pids = set(all_visible.pids) - {6}
    assert set(visible.pids) == remaining_pids
    assert set(thermal.pids) == remaining_pids
    assert "one modality only (1): persons 6" in caplog.text


@pytest.mark.parametrize("cameras", ["cam[1245]", "cam[36]"])
def test_preprocessing_needs_persons_in_both_modalities(golden_tree, error_of, tmp_path, cameras):
    tree = shutil.copytree(golden_tree, tmp_path / "tree")
    for folder in list(tree.glob(cameras)):
        shutil.rmtree(folder)
    line = error_of("pre_process_sysu.py", "--data-path", tree)
    assert f"{tree}: no training person has images in both modalities" in line


# ---- RegDB and LLCM -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "subset", "trial", "visible_list", "thermal_list"),
    [
        ("regdb", "train", 1, "train_visible_1.txt", "train_thermal_1.txt"),
        ("regdb", "test", 10, "test_visible_10.txt", "test_thermal_10.txt"),
        ("llcm", "train", None, "train_vis.txt", "train_nir.txt"),
    ],
)
def test_image_lists_are_read_line_by_line(
    request, name, subset, trial, visible_list, thermal_list
):
    tree = request.getfixturevalue(f"{name}_tree")
    dataset = DATASETS[name]
    if subset == "train":
        visible, thermal = dataset.train(str(tree), trial)
        images = concatenate(visible, thermal)
    else:
        images = dataset.test(str(tree), trial)
    lines = []
    for path, pid in zip(images.paths, images.pids, strict=True):
        lines.append(f"{Path(path).relative_to(tree)} {pid}")

    visible_lines = (tree / "idx" / visible_list).read_text().splitlines()
    thermal_lines = (tree / "idx" / thermal_list).read_text().splitlines()
    assert lines == visible_lines + thermal_lines
    is_thermal = [False] * len(visible_lines) + [True] * len(thermal_lines)
    assert images.thermal.tolist() == is_thermal


@pytest.mark.parametrize(
    ("name", "list_name"), [("regdb", "train_thermal_1.txt"), ("llcm", "train_vis.txt")]
)
def test_persons_on_one_list_are_left_out_of_training(request, tmp_path, caplog, name, list_name):
    """The other persons stay, and every image of theirs."""
    tree = shutil.copytree(request.getfixturevalue(f"{name}_tree"), tmp_path / "tree")
    all_images = list_training_images(DATASETS[name], str(tree), 1)
    assert not warnings_in(caplog)
    file = tree / "idx" / list_name
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if not line.endswith(" 2\n")))

    images = list_training_images(DATASETS[name], str(tree), 1)
    expected = all_images.take(np.flatnonzero(all_images.pids != 2))
    assert 0 < len(expected) < len(all_images)
    assert images.paths == expected.paths
    np.testing.assert_array_equal(images.pids, expected.pids)
    np.testing.assert_array_equal(images.thermal, expected.thermal)
    assert not images.thermal[0]
    (warning,) = warnings_in(caplog)
    assert "one modality only (1): persons 2" in warning


@pytest.mark.parametrize("name", ["sysu", "regdb"])
def test_camera_numbers_of_sysu_and_regdb_tell_the_modality(request, name):
    tree = request.getfixturevalue(f"{name}_tree")
    images = DATASETS[name].test(str(tree), 1)
    is_thermal_camera = np.isin(images.camids, DATASETS[name].thermal_cameras)
    assert 0 < images.thermal.sum() < len(images)
    np.testing.assert_array_equal(is_thermal_camera, images.thermal)


# ---- numbers of images --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "n_persons", "is_warned_of"),
    [
        ("sysu", 20, False),
        ("sysu", 80, False),
        ("sysu", 90, True),
        ("regdb", 205, True),
        ("regdb", 206, False),
    ],
)
def test_an_incomplete_dataset_is_warned_of(caplog, name, n_persons, is_warned_of):
    """10 visible and 10 infrared images of each person, as in RegDB."""
    pids = np.repeat(np.arange(n_persons), 20)
    thermal = np.tile(np.repeat([False, True], 10), n_persons)
    images = split_of(pids, 1 + 2 * thermal, thermal)
    log_counts(images, DATASETS[name], "test")
    assert len(warnings_in(caplog)) == is_warned_of
    assert ("is it complete?" in caplog.text) == is_warned_of


def test_llcm_is_compared_by_persons_alone(caplog):
    pids = np.arange(351)
    log_counts(split_of(pids, pids, pids > 9), DATASETS["llcm"], "test")
    assert not warnings_in(caplog)
    log_counts(split_of(pids[1:], pids[1:], pids[1:] > 9), DATASETS["llcm"], "test")
    (warning,) = warnings_in(caplog)
    assert "350 persons" in warning


# ---- trials -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "choice", "message"),
    [
        ("sysu", {"mode": "outdoor"}, "SYSU-MM01 has no --mode outdoor: give all, indoor or both"),
        ("sysu", {"gall_mode": "x"}, "SYSU-MM01 has no --gall-mode x: give single, multi or both"),
        ("regdb", {"search": "v2v"}, "RegDB has no --search v2v: give v2t, t2v or both"),
    ],
)
def test_an_error_of_a_protocol_names_the_known_ones(name, choice, message):
    pids = np.arange(3)
    images = split_of(pids, pids, pids > 0)
    with pytest.raises(ValueError, match=re.escape(message)):
        DATASETS[name].eval_trials(images, choice)


def test_both_takes_every_value_of_a_protocol_flag(golden_tree):
    images = sysu_test(str(golden_tree))
    trials = SYSU.eval_trials(images, {"mode": "both", "gall_mode": "both"}, trials=[3, 5])
    assert [(trial.protocol, trial.number) for trial in trials] == [
        ("all-search single-shot", 3),
        ("all-search single-shot", 5),
        ("all-search multi-shot", 3),
        ("all-search multi-shot", 5),
        ("indoor-search single-shot", 3),
        ("indoor-search single-shot", 5),
        ("indoor-search multi-shot", 3),
        ("indoor-search multi-shot", 5),
    ]


@pytest.mark.parametrize("per_camera", [1, 3])
def test_a_drawn_gallery_depends_on_its_trial_alone(per_camera):
    groups = {(7, 1): [0, 1, 2, 3, 4], (7, 2): [5, 6], (8, 1): [7, 8, 9, 10, 11, 12]}
    galleries = [draw_seeded(groups, per_camera, trial).tolist() for trial in range(10)]
    assert len({tuple(gallery) for gallery in galleries}) > 5
    for trial, gallery in enumerate(galleries):
        assert draw_seeded(groups, per_camera, trial).tolist() == gallery
        assert len(set(gallery)) == len(gallery)
        group_of_image = {}
        for key, group in groups.items():
            group_of_image |= dict.fromkeys(group, key)
        drawn = Counter(group_of_image[image] for image in gallery)
        assert drawn == {key: min(per_camera, len(group)) for key, group in groups.items()}
        assert list(drawn) == list(groups)  # persons ascending, then cameras


def test_images_that_no_trial_uses_are_left_out():
    images = split_of(np.arange(8), np.arange(10, 18), np.arange(8) % 2 == 1)
    trials = [
        EvalTrial("v2t", 1, np.array([6, 1]), np.array([7, 3, 3])),
        EvalTrial("t2v", 2, np.array([1]), np.array([4])),
    ]
    kept, new_trials = keep_used(images, trials)
    assert kept.pids.tolist() == [1, 3, 4, 6, 7]
    assert kept.paths == ["0001", "0003", "0004", "0006", "0007"]
    for old, new in zip(trials, new_trials, strict=True):
        assert (new.protocol, new.number) == (old.protocol, old.number)
        for old_indices, new_indices in ((old.query, new.query), (old.gallery, new.gallery)):
            old_images = images.take(old_indices)
            new_images = kept.take(new_indices)
            assert new_images.paths == old_images.paths
            np.testing.assert_array_equal(new_images.pids, old_images.pids)
            np.testing.assert_array_equal(new_images.camids, old_images.camids)
            np.testing.assert_array_equal(new_images.thermal, old_images.thermal)


# ---- entries ----------------------------------------------------------------------------------


def test_an_entry_describes_its_dataset_fully():
    """A copy of SYSU-MM01's entry with other fields has the protocols that these describe."""

    def select(images: Split, side: str, number: str) -> tuple[Selection, Selection]:
        is_left = images.camids % 2 == 1
        query = is_left if side == "left" else ~is_left
        return Selection(query), Selection(~query, per_camera=int(number))

    another = dataclasses.replace(
        SYSU,
        title="Another",
        counts={"test": (3, 4, 5)},
        protocol_flags={"mode": ("left", "right"), "search": ("1", "2")},
        protocol_name="from the {}, {} each",
        select=select,
        junk_mask=no_junk,
        trials=range(4, 6),
    )
    images = split_of([1, 1, 1, 1, 2, 2], [1, 1, 2, 2, 1, 2], [False] * 6)
    trials = another.eval_trials(images, {"mode": "right", "search": "both"})

    assert [(trial.protocol, trial.number) for trial in trials] == [
        ("from the right, 1 each", 4),
        ("from the right, 1 each", 5),
        ("from the right, 2 each", 4),
        ("from the right, 2 each", 5),
    ]
    for trial in trials:
        assert trial.query.tolist() == [2, 3, 5]
    assert {len(trial.gallery) for trial in trials[:2]} == {2}
    assert {tuple(sorted(trial.gallery)) for trial in trials[2:]} == {(0, 1, 4)}
    assert another.protocol_values({}) == ["left", "1"]
    with pytest.raises(ValueError, match="Another has no --mode all: give left, right or both"):
        another.eval_trials(images, {"mode": "all"})


def test_the_entry_says_how_many_images_are_expected(caplog):
    images = split_of([1, 2, 3], [1, 1, 2], [False, False, True])
    log_counts(images, dataclasses.replace(SYSU, counts={"test": (3, 2, 1)}), "test")
    log_counts(images, dataclasses.replace(SYSU, counts={}), "test")
    assert not warnings_in(caplog)
    another = dataclasses.replace(SYSU, title="Another", counts={"test": (3, 1, 2)})
    log_counts(images, another, "test")
    message = "test: 3 persons, 2 visible and 1 infrared images, but Another has 3, 1, 2"
    (warning,) = warnings_in(caplog)
    assert message in warning
