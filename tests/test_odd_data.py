"""Datasets as people have them: other spellings, other folders, stray files, stale arrays, leakage.

What is spelt in another way gives the same lists and the same galleries. What is left out is named
in a warning. What would spoil scores is an error.
"""

import codecs
import logging
import os
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import RUN, RUN_FLAGS, TINY, files_of, folder_flags, only_json, read_all, rows_of
from filelock import FileLock
from PIL import Image

import data_loader
from data_loader import TrainingSet, load_arrays, read_image
from data_manager import DATASETS, Split, list_training_images, sysu_test, sysu_train
from utils import InputError

SIZE = ["--img-h", 96, "--img-w", 32, "--workers", 0]
UNTRAINED = ["--pretrained", "none", "--arch", "tiny", "--low-dim", 16, "--features", "fc", *SIZE]


def command_on(tree: Path, script: str, name: str, out: Path) -> list:
    """A script, and flags: read this tree of the dataset, be quick, write into ``out``."""
    if script == "pre_process_sysu.py":
        return [script, "--data-path", tree, *SIZE]
    flags = TINY if script == "train.py" else UNTRAINED
    return [script, *flags, "--dataset", name, *folder_flags(tree, out)]


@pytest.fixture
def copy_of(request, tmp_path) -> Callable[[str], Path]:
    """The name of a fixture, "llcm_tree": a copy of its tree, with the times of the files."""

    def copy(name: str) -> Path:
        return shutil.copytree(request.getfixturevalue(name), tmp_path / "tree")

    return copy


@pytest.fixture
def sysu_copy(copy_of) -> Path:
    return copy_of("sysu_tree")


def rows_in(split: Split, root: Path) -> list[tuple]:
    """(path below the root, person, camera, is infrared) of each image."""
    paths = [os.path.relpath(path, root) for path in split.paths]
    columns = [paths, split.pids.tolist(), split.camids.tolist(), split.thermal.tolist()]
    return list(zip(*columns, strict=True))


def rows_of_images(name: str, root: Path) -> dict[str, list[tuple]]:
    """The rows of all training images and test images."""
    visible, thermal = DATASETS[name].train(str(root), 1)
    test = DATASETS[name].test(str(root), 1)
    return {
        "visible": rows_in(visible, root),
        "thermal": rows_in(thermal, root),
        "test": rows_in(test, root),
    }


def lists_of(name: str, root: Path) -> dict[str, list[tuple]]:
    """The rows of all images, and of the query and the gallery of all trials of all protocols."""
    dataset = DATASETS[name]
    lists = rows_of_images(name, root)
    images = dataset.test(str(root), 1)
    choice = dict.fromkeys(dataset.protocol_flags, "both")
    for trial in dataset.eval_trials(images, choice):
        lists[f"{trial.protocol} {trial.number} query"] = rows_in(images.take(trial.query), root)
        lists[f"{trial.protocol} {trial.number} gallery"] = rows_in(
            images.take(trial.gallery), root
        )
    return lists


def warnings_in(caplog) -> list[str]:
    """The messages of all warnings. Lines of information may be logged beside them."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def load_all_arrays(tree: Path) -> TrainingSet:
    """The arrays of a tree, compared with its training images."""
    images = list_training_images(DATASETS["sysu"], str(tree), None)
    return load_arrays(str(tree), None, images, (96, 32))


def lines_with(start: str, text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


def numbers_in(text: str) -> list[int]:
    return [int(digits) for digits in re.findall("[0-9]+", text)]


def ids_in(*files: Path) -> list[int]:
    """The person ids on lists like 1,2,3."""
    pids = []
    for file in files:
        pids += numbers_in(file.read_text())
    return pids


# ---- lists --------------------------------------------------------------------------------------

# The same numbers, as others may write them.
SPELLINGS = {
    "one a line": lambda ids: "\n".join(ids).encode(),
    "lines of two": lambda ids: ("\n".join([",".join(ids[:2]), ",".join(ids[2:])])).encode(),
    "blanks": lambda ids: f" {'  '.join(ids)}\t".encode(),
    "lines of Windows": lambda ids: "\r\n".join([*ids, ""]).encode(),
    "lines of old Macs": lambda ids: "\r".join(ids).encode(),
    "commas at the ends": lambda ids: ",\n".join([*ids, ""]).encode(),
    "UTF-8 with a mark": lambda ids: b"\xef\xbb\xbf" + ",".join(ids).encode(),
    "UTF-16 LE": lambda ids: b"\xff\xfe" + "\r\n".join(ids).encode("utf-16-le"),
    "UTF-16 BE": lambda ids: b"\xfe\xff" + ",".join(ids).encode("utf-16-be"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(
    ("name", "tree_name", "pattern"),
    [("sysu", "golden_tree", "exp/*_id.txt"), ("llcm", "llcm_tree", "idx/test_id.txt")],
)
def test_lists_of_persons_may_be_spelt_in_other_ways(
    copy_of, request, name, tree_name, pattern, spelling
):
    tree = copy_of(tree_name)
    for file in tree.glob(pattern):
        ids = file.read_text().strip().split(",")
        file.write_bytes(SPELLINGS[spelling](ids))
    assert lists_of(name, tree) == lists_of(name, request.getfixturevalue(tree_name))


@pytest.mark.parametrize(
    ("script", "name", "file"),
    [
        ("pre_process_sysu.py", "sysu", "exp/val_id.txt"),
        ("train.py", "llcm", "idx/test_id.txt"),
        ("train.py", "regdb", "idx/train_visible_1.txt"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32", "latin-1"])
def test_an_error_names_the_encoding_that_is_needed(
    copy_of, error_of, tmp_path, script, name, file, encoding
):
    """UTF-16 without a mark, and what is not ASCII in Latin-1."""
    tree = copy_of(f"{name}_tree")
    text = (tree / file).read_text()
    if encoding == "latin-1":
        text += "é.bmp 1\n"
    (tree / file).write_bytes(text.encode(encoding))
    line = error_of(*command_on(tree, script, name, tmp_path))
    assert str(tree / file) in line
    assert "UTF-8" in line


@pytest.mark.parametrize("text", ["", "\n", " ,\r\n"])
def test_an_empty_list_of_validation_persons_means_none(copy_of, text):
    tree = copy_of("golden_tree")
    training_ids = (tree / "exp/train_id.txt").read_text().split(",")
    (tree / "exp/val_id.txt").write_text(text)
    visible, thermal = sysu_train(str(tree))
    expected = sorted(int(pid) for pid in training_ids)
    assert np.unique(visible.pids).tolist() == expected
    assert np.unique(thermal.pids).tolist() == expected


def test_a_list_of_validation_persons_must_not_be_missing(sysu_copy, error_of, tmp_path):
    file = sysu_copy / "exp/val_id.txt"
    file.unlink()
    line = error_of(*command_on(sysu_copy, "pre_process_sysu.py", "sysu", tmp_path))
    assert f"{file} not found" in line


@pytest.mark.parametrize(
    ("script", "name", "file"),
    [
        ("pre_process_sysu.py", "sysu", "exp/train_id.txt"),
        ("test.py", "sysu", "exp/test_id.txt"),
        ("test.py", "llcm", "idx/test_id.txt"),
    ],
)
def test_other_lists_of_persons_must_not_be_empty(copy_of, error_of, tmp_path, script, name, file):
    tree = copy_of(f"{name}_tree")
    (tree / file).write_text(" \n,\n")
    line = error_of(*command_on(tree, script, name, tmp_path))
    assert str(tree / file) in line
    assert "no person id" in line


@pytest.mark.parametrize(("name", "pattern"), [("regdb", "idx/*.txt"), ("llcm", "idx/train_*.txt")])
def test_backslashes_in_lists_of_images_separate_folders(copy_of, request, name, pattern):
    tree = copy_of(f"{name}_tree")
    for file in tree.glob(pattern):
        text = file.read_text()
        assert "/" in text
        file.write_bytes(codecs.BOM_UTF8 + text.replace("/", "\\").replace("\n", "\r\n").encode())
    assert lists_of(name, tree) == lists_of(name, request.getfixturevalue(f"{name}_tree"))


# ---- folders of persons -------------------------------------------------------------------------


def without_zeros(path: str) -> str:
    """The path of an image, with the folder of its person named by the mere number."""
    folder, person, name = path.rsplit("/", 2)
    return f"{folder}/{int(person)}/{name}"


@pytest.mark.parametrize(
    ("name", "tree_name", "cameras"),
    [
        ("sysu", "golden_tree", "cam?"),
        ("sysu", "golden_tree", "cam[36]"),
        ("llcm", "llcm_tree", "test_*/cam?"),
    ],
)
def test_folders_of_persons_need_no_zeros_in_front(copy_of, request, name, tree_name, cameras):
    """The same images are drawn, whatever the folder is called."""
    tree = copy_of(tree_name)
    for folder in list(tree.glob(f"{cameras}/0*")):
        folder.rename(folder.with_name(str(int(folder.name))))
    renamed = {str(path.relative_to(tree)) for path in tree.glob(f"{cameras}/*/*")}
    expected_lists = {}
    for title, rows in lists_of(name, request.getfixturevalue(tree_name)).items():
        expected_lists[title] = []
        for path, *others in rows:
            new_path = without_zeros(path)
            if new_path not in renamed:
                new_path = path
            expected_lists[title].append((new_path, *others))
    assert lists_of(name, tree) == expected_lists


@pytest.mark.parametrize(
    ("script", "name", "folder"),
    [
        ("pre_process_sysu.py", "sysu", "cam6/0012"),
        ("test.py", "sysu", "cam3/0002"),
        ("test.py", "llcm", "test_nir/cam4/0001"),
    ],
)
def test_two_folders_of_a_person_in_a_camera_are_an_error(
    copy_of, error_of, tmp_path, script, name, folder
):
    tree = copy_of(f"{name}_tree")
    first = tree / folder
    assert first.is_dir()
    second = first.with_name(str(int(first.name)))
    second.mkdir()
    line = error_of(*command_on(tree, script, name, tmp_path))
    assert f"{first} and {second}" in line


# ---- image files --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "options"),
    [(".tif", {}), (".tiff", {}), (".webp", {"lossless": True}), (".TIF", {}), (".png", {})],
)
def test_images_of_other_formats_give_the_same_arrays(
    sysu_copy, output_of, tmp_path, suffix, options
):
    """Those of camera 6 are saved anew, without any loss."""
    expected_array = np.load(sysu_copy / "train_ir_resized_img.npy")
    expected_rows = []
    for path, *others in rows_in(sysu_test(sysu_copy), sysu_copy):
        if path.startswith("cam6"):
            path = path.replace(".jpg", suffix)
        expected_rows.append((path, *others))
    for path in list(sysu_copy.glob("cam6/*/*.jpg")):
        with Image.open(path) as image:
            image.save(path.with_suffix(suffix), **options)
        path.unlink()

    rows = rows_in(sysu_test(sysu_copy), sysu_copy)
    assert rows == expected_rows
    assert any(path.endswith(suffix) for path, *_ in rows)
    arrays = tmp_path / "arrays"
    output_of("pre_process_sysu.py", "--data-path", sysu_copy, "--arrays", arrays, *SIZE)
    np.testing.assert_array_equal(np.load(arrays / "train_ir_resized_img.npy"), expected_array)


# ---- what is left out ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tree_name", "cameras_folder", "person_folder", "list_name"),
    [
        ("sysu", "golden_tree", ".", "cam3/0008", "exp/test_id.txt"),
        ("llcm", "llcm_tree", "test_nir", "cam1/0001", "idx/test_id.txt"),
    ],
)
def test_what_is_left_out_is_named_once_for_each_kind(
    copy_of, request, caplog, name, tree_name, cameras_folder, person_folder, list_name
):
    tree = copy_of(tree_name)
    root = tree / cameras_folder
    folder = root / person_folder
    camera = folder.parent
    for file in ("1.gif", "2.heic", "3.jpg.part", "README"):
        (folder / file).touch()
    (folder / "0001.png").mkdir()
    (camera / "list.txt").touch()
    (camera / "person 9").mkdir()
    (root / "cam77/0008").mkdir(parents=True)
    (root / "cam9.zip").touch()
    with open(tree / list_name, "a") as file:
        file.write(",900,902,901,903")

    images = DATASETS[name].test(str(tree), None)
    expected_ends = [
        f" (4): {folder}/1.gif, {folder}/2.heic, {folder}/3.jpg.part, ...",
        f" (1): {folder}/0001.png",
        f" (2): {camera}/list.txt, {camera}/person 9",
        f" (2): {root}/cam77, {root}/cam9.zip",
        " (4): 900, 901, 902, ...",
    ]
    warnings = warnings_in(caplog)
    assert len(warnings) == len(expected_ends)
    for end in expected_ends:
        (warning,) = [text for text in warnings if text.endswith(end)]
        assert warning.startswith("test: ")
    untouched = request.getfixturevalue(tree_name)
    expected = DATASETS[name].test(str(untouched), None)
    assert rows_in(images, tree) == rows_in(expected, untouched)


def test_scripts_warn_of_what_is_left_out(sysu_copy, output_of, tmp_path):
    """Of training images and of test images, each for itself."""
    (sysu_copy / "cam6/0001/0001.gif").touch()
    (sysu_copy / "cam6/0002/0001.gif").touch()
    printed = output_of(*command_on(sysu_copy, "train.py", "sysu", tmp_path), "--epochs", 0)
    (train_warning,) = lines_with("warning: train: ", printed)
    assert train_warning.endswith(f"(1): {sysu_copy}/cam6/0001/0001.gif")
    (test_warning,) = lines_with("warning: test: ", printed)
    assert test_warning.endswith(f"(1): {sysu_copy}/cam6/0002/0001.gif")


@pytest.mark.parametrize("name", DATASETS)
def test_nothing_is_said_of_files_of_operating_systems(copy_of, request, caplog, name):
    """Nor of an untouched tree."""
    tree = copy_of(f"{name}_tree")
    for folder in [tree, *tree.glob("*/"), *tree.glob("*/*/"), *tree.glob("*/*/*/")]:
        for file in (".DS_Store", "._0001.jpg", "Thumbs.db", "thumbs.db", "desktop.ini"):
            (folder / file).touch()
        (folder / ".cache").mkdir()
    expected = rows_of_images(name, request.getfixturevalue(f"{name}_tree"))
    assert rows_of_images(name, tree) == expected
    assert not warnings_in(caplog)


@pytest.mark.parametrize(
    ("name", "list_name"), [("regdb", "train_thermal_1.txt"), ("llcm", "train_vis.txt")]
)
def test_images_that_are_listed_twice_are_named(copy_of, caplog, name, list_name):
    """They are used as often as they are listed."""
    tree = copy_of(f"{name}_tree")
    n_images = len(list_training_images(DATASETS[name], str(tree), 1))
    assert not warnings_in(caplog)
    file = tree / "idx" / list_name
    first, second, *_ = file.read_text().splitlines()
    with open(file, "a") as lines:
        lines.write(f"{first}\n{second}\n{first}\n")
    assert len(list_training_images(DATASETS[name], str(tree), 1)) == n_images + 3
    (warning,) = warnings_in(caplog)
    assert warning.startswith("train: ")
    assert warning.endswith(f"(2): {tree}/{first.split()[0]}, {tree}/{second.split()[0]}")


# ---- what is logged of a dataset ----------------------------------------------------------------

# Of the trees in conftest.py: persons, visible images, infrared images, and the cameras.
COUNTS = {
    "sysu": {"train": [10, 34, 17, 1, 2, 3, 4, 5, 6], "test": [2, 11, 8, 1, 2, 3, 4, 5, 6]},
    "regdb": {"train": [4, 40, 40, 1, 2], "test": [4, 40, 40, 1, 2]},
    # LLCM's training lists do not tell the camera.
    "llcm": {"train": [6, 36, 36], "test": [3, 18, 18, 1, 3, 4, 5, 6, 7, 8, 9]},
}


@pytest.mark.parametrize("name", COUNTS)
def test_scripts_log_how_many_images_there_are(request, output_of, tmp_path, name):
    tree = request.getfixturevalue(f"{name}_tree")
    trial = ["--trial", 3]  # of RegDB
    printed = output_of(*command_on(tree, "train.py", name, tmp_path), *trial, "--epochs", 0)
    (train_line,) = lines_with("train: ", printed)
    assert numbers_in(train_line) == COUNTS[name]["train"]
    (test_line,) = lines_with("test: ", printed)
    assert numbers_in(test_line) == COUNTS[name]["test"]

    printed = output_of(*command_on(tree, "test.py", name, tmp_path), *trial)
    assert lines_with("train: ", printed) == []
    assert lines_with("test: ", printed) == [test_line]


def test_preprocessing_logs_how_many_training_images_there_are(sysu_tree, output_of, tmp_path):
    printed = output_of(*command_on(sysu_tree, "pre_process_sysu.py", "sysu", tmp_path))
    (train_line,) = lines_with("train: ", printed)
    assert numbers_in(train_line) == COUNTS["sysu"]["train"]
    assert lines_with("test: ", printed) == []


# ---- persons and images in training and in the test ---------------------------------------------


@pytest.mark.parametrize("file", ["exp/train_id.txt", "exp/val_id.txt"])
@pytest.mark.parametrize("script", ["pre_process_sysu.py", "train.py"])
def test_test_persons_on_a_training_list_are_an_error(sysu_copy, error_of, tmp_path, script, file):
    """Without any arrays, too: the lists are compared first."""
    pid, *_ = ids_in(sysu_copy / "exp/test_id.txt")
    (sysu_copy / file).write_text(f"{pid}, {(sysu_copy / file).read_text()}")
    for array in sysu_copy.glob("*.npy"):
        array.unlink()
    line = error_of(*command_on(sysu_copy, script, "sysu", tmp_path))
    assert f"{sysu_copy}/exp" in line
    assert f"(1): {pid}" in line


def test_a_test_needs_no_training_lists(sysu_copy, sysu_tree, output_of, tmp_path):
    """Whatever they hold, and without any, the scores are the same."""
    output_of(*command_on(sysu_tree, "test.py", "sysu", tmp_path / "before"))
    expected = only_json(tmp_path / "before")["results"]
    shutil.copy(sysu_copy / "exp/test_id.txt", sysu_copy / "exp/train_id.txt")
    output_of(*command_on(sysu_copy, "test.py", "sysu", tmp_path / "leakage"))
    assert only_json(tmp_path / "leakage")["results"] == expected
    (sysu_copy / "exp/train_id.txt").unlink()
    (sysu_copy / "exp/val_id.txt").unlink()
    output_of(*command_on(sysu_copy, "test.py", "sysu", tmp_path / "alone"))
    assert only_json(tmp_path / "alone")["results"] == expected


LEAKS = {
    "regdb": ("idx/train_visible_1.txt", "Visible/2/person_v_0001.bmp"),
    "llcm": ("idx/train_nir.txt", "test_nir/cam1/0001/0001_c01_0002_nir.jpg"),
}


def make_link(tree: Path, image: str) -> str:
    (tree / "link.bmp").symlink_to(tree / image)
    return "link.bmp"


# Paths that all lead to the same image of a tree.
PATHS_TO_IMAGE = {
    "as it is": lambda tree, image: image,
    "with ./": lambda tree, image: f"./{image}",
    "with //": lambda tree, image: image.replace("/", "//"),
    "with backslashes": lambda tree, image: image.replace("/", "\\"),
    "link": make_link,
}


@pytest.mark.parametrize("name", LEAKS)
@pytest.mark.parametrize("spelling", PATHS_TO_IMAGE)
def test_images_in_training_and_in_the_test_are_an_error(
    copy_of, error_of, tmp_path, name, spelling
):
    """One file is one image, whatever path leads to it."""
    tree = copy_of(f"{name}_tree")
    list_name, image = LEAKS[name]
    assert (tree / image).is_file()
    listed = PATHS_TO_IMAGE[spelling](tree, image)
    with open(tree / list_name, "a") as file:
        file.write(f"{listed} 0\n")
    line = error_of(*command_on(tree, "train.py", name, tmp_path))
    path = f"{tree}/{listed}".replace("\\", "/")
    assert f"(1): {path}" in line


def test_training_images_are_compared_with_all_test_images(copy_of, error_of, tmp_path):
    """Also with the images that are in the gallery of test.py, but not of the tests of train.py."""
    tree = copy_of("llcm_tree")
    llcm = DATASETS["llcm"]
    images = llcm.test(str(tree), None)
    trial_of_training, *_ = llcm.eval_trials(images, {}, [llcm.trials[0]])
    is_used = np.zeros(len(images), bool)
    is_used[trial_of_training.query] = True
    is_used[trial_of_training.gallery] = True
    unused_images = images.where(~is_used)
    assert not unused_images.thermal.any()  # every infrared image is a query
    path = unused_images.paths[0]
    with open(tree / "idx/train_vis.txt", "a") as file:
        file.write(f"{os.path.relpath(path, tree)} 0\n")
    line = error_of(*command_on(tree, "train.py", "llcm", tmp_path))
    assert f"(1): {path}" in line


def test_images_that_are_missing_are_no_leak(copy_of, error_of, tmp_path):
    tree = copy_of("regdb_tree")
    for subset in ("train", "test"):
        with open(tree / f"idx/{subset}_visible_1.txt", "a") as file:
            file.write("Visible/1/missing.bmp 0\n")
    line = error_of(*command_on(tree, "train.py", "regdb", tmp_path))
    assert "missing.bmp not found" in line


def test_test_images_that_are_missing_end_training_before_its_first_step(
    copy_of, error_of, monkeypatch, tmp_path
):
    tree = copy_of("regdb_tree")
    words = (tree / "idx/test_thermal_1.txt").read_text().split()
    (tree / words[0]).unlink()
    monkeypatch.setattr(data_loader, "read_image", None)  # no image may be read
    line = error_of(*command_on(tree, "train.py", "regdb", tmp_path))
    assert f"{tree / words[0]} not found (1 images)" in line


# ---- queries without a match --------------------------------------------------------------------


def move_to_camera_1(tree: Path) -> None:
    """All test images of LLCM, of both modalities."""
    for folder in list(tree.glob("test_*/cam[2-9]/*/")):
        new_folder = folder.parent.with_name("cam1") / folder.name
        new_folder.mkdir(parents=True, exist_ok=True)
        for file in list(folder.iterdir()):
            file.rename(new_folder / file.name)


def keep_cameras_2_and_3(tree: Path) -> None:
    """Of the test persons of SYSU-MM01."""
    for pid in ids_in(tree / "exp/test_id.txt"):
        for folder in list(tree.glob(f"cam[1456]/{pid:04d}")):
            shutil.rmtree(folder)


def keep_other_persons(tree: Path) -> None:
    """One test person of SYSU-MM01 is seen in visible light, the other one in infrared."""
    first, second = ids_in(tree / "exp/test_id.txt")
    for folder in (*tree.glob(f"cam[36]/{first:04d}"), *tree.glob(f"cam[1245]/{second:04d}")):
        shutil.rmtree(folder)


@pytest.mark.parametrize("script", ["train.py", "test.py"])
@pytest.mark.parametrize(
    ("name", "change", "reason", "cameras"),
    [
        ("llcm", move_to_camera_1, DATASETS["llcm"].junk_rule, ["[1]", "[1]"]),
        ("sysu", keep_cameras_2_and_3, DATASETS["sysu"].junk_rule, ["[3]", "[2]"]),
        ("sysu", keep_other_persons, "no person is in both", ["[3 6]", "[1 2 4 5]"]),
    ],
)
def test_queries_without_any_match_end_the_program_at_once(
    copy_of, error_of, monkeypatch, tmp_path, script, name, change, reason, cameras
):
    """Before an image is read. ``cameras``: of the queries, and of the gallery."""

    def no_reads(path: str, size: tuple[int, int]) -> None:
        raise AssertionError(f"{path} is read")

    monkeypatch.setattr(data_loader, "read_image", no_reads)
    tree = copy_of(f"{name}_tree")
    change(tree)
    line = error_of(*command_on(tree, script, name, tmp_path))
    assert reason in line
    assert re.findall(r"\[.*?\]", line) == cameras


@pytest.mark.parametrize(
    ("name", "file"), [("llcm", "idx/test_id.txt"), ("sysu", "exp/test_id.txt")]
)
def test_a_gallery_of_one_person_is_warned_of(copy_of, output_of, tmp_path, name, file):
    tree = copy_of(f"{name}_tree")
    pid, *_ = ids_in(tree / file)
    (tree / file).write_text(str(pid))
    printed = output_of(*command_on(tree, "test.py", name, tmp_path))
    (warning,) = [line for line in lines_with("warning: ", printed) if "100% rank-1" in line]
    assert "of 1 persons" in warning
    for row in rows_of(only_json(tmp_path)).values():
        assert row["mean"]["rank1"] == 1


# ---- arrays: where they are ---------------------------------------------------------------------

ARRAYS = [
    "train_ir_resized_img.npy",
    "train_ir_resized_label.npy",
    "train_rgb_resized_img.npy",
    "train_rgb_resized_label.npy",
]
DIGEST = "train_resized_digest.txt"


def preprocess_command(*flags) -> str:
    """The end of an error: the command that makes the arrays that `RUN_FLAGS` asks for."""
    words = " ".join(str(flag) for flag in flags)
    return f"run python pre_process_sysu.py {words} --img-h 96 --img-w 32"


@pytest.fixture
def train_one_epoch(sysu_run, output_of, tmp_path) -> Callable[..., str]:
    """(tree, flags): train epoch 0 of `sysu_run` on another tree; gives what was printed.

    The metrics are the same if the images, labels and flags are.
    """

    def train(tree: Path, *flags) -> str:
        out = tmp_path / "out"
        printed = output_of("train.py", *RUN_FLAGS, *folder_flags(tree, out), *flags, "--epochs", 0)
        expected = read_all(sysu_run["logs"])[f"{RUN}/metrics.jsonl"]
        assert read_all(out)[f"{RUN}/metrics.jsonl"] == expected[:1]
        return printed

    return train


@pytest.fixture
def writes_arrays(output_of) -> Callable[..., bool]:
    """(tree, flags): run pre_process_sysu.py; gives whether any file of the tree was written."""

    def run(tree: Path, *flags) -> bool:
        before = files_of(tree)
        output_of("pre_process_sysu.py", "--data-path", tree, *SIZE, *flags)
        return files_of(tree) != before

    return run


def test_arrays_may_be_in_a_folder_of_their_own(
    sysu_copy, output_of, error_of, train_one_epoch, tmp_path
):
    """They are written there and found there, and nothing is written beside the data."""
    expected = {}
    for name in ARRAYS:
        expected[name] = np.load(sysu_copy / name)
    for name in (*ARRAYS, DIGEST, "pre_process.lock"):
        (sysu_copy / name).unlink()
    data_before = files_of(sysu_copy)
    folder = tmp_path / "new/arrays"
    command = ["pre_process_sysu.py", "--data-path", sysu_copy, "--arrays", folder, *SIZE]
    output_of(*command)
    names = {file.name for file in folder.iterdir()}
    assert names - {"pre_process.lock"} == {*ARRAYS, DIGEST}
    for name in ARRAYS:
        np.testing.assert_array_equal(np.load(folder / name), expected[name])
    arrays_before = files_of(folder)
    output_of(*command)
    assert files_of(folder) == arrays_before  # they are not written again

    train_one_epoch(sysu_copy, "--arrays", folder)
    assert files_of(sysu_copy) == data_before

    train_command = command_on(sysu_copy, "train.py", "sysu", tmp_path)
    line = error_of(*train_command)
    assert f"{sysu_copy}/{ARRAYS[2]} not found" in line
    assert line.endswith(preprocess_command("--data-path", sysu_copy))
    line = error_of(*train_command, "--arrays", tmp_path)
    assert f"{tmp_path}/{ARRAYS[2]} not found" in line
    assert line.endswith(preprocess_command("--data-path", sysu_copy, "--arrays", tmp_path))


def test_the_lock_is_beside_the_arrays(sysu_copy, error_of, tmp_path):
    (tmp_path / "arrays").mkdir()
    command = ["pre_process_sysu.py", "--data-path", sysu_copy, "--arrays", tmp_path / "arrays"]
    with FileLock(tmp_path / "arrays/pre_process.lock"):
        line = error_of(*command, *SIZE)
    assert f"{tmp_path}/arrays/pre_process.lock" in line


@pytest.mark.parametrize(("name", "title"), [("regdb", "RegDB"), ("llcm", "LLCM")])
def test_other_datasets_have_no_arrays(error_of, tmp_path, name, title):
    line = error_of("train.py", "--dataset", name, *TINY, "--arrays", tmp_path)
    assert title in line
    assert "--arrays" in line


@pytest.fixture
def make_read_only(monkeypatch) -> Callable[[Path], None]:
    """(folder): the system says that nothing can be written into it. It would let root write."""
    access = os.access

    def make(folder: Path) -> None:
        def answer(path, mode, **options) -> bool:
            if Path(path) == folder and mode & os.W_OK:
                return False
            return access(path, mode, **options)

        monkeypatch.setattr(os, "access", answer)

    return make


def test_a_tree_that_is_read_only_is_named(sysu_copy, error_of, make_read_only):
    make_read_only(sysu_copy)
    line = error_of("pre_process_sysu.py", "--data-path", sysu_copy, "--force", *SIZE)
    assert f"{sysu_copy} is read-only" in line
    assert "--arrays" in line


def test_a_folder_of_arrays_that_is_read_only_is_named(
    sysu_copy, error_of, make_read_only, tmp_path
):
    folder = tmp_path / "arrays"
    folder.mkdir()
    make_read_only(folder)
    line = error_of("pre_process_sysu.py", "--data-path", sysu_copy, "--arrays", folder, *SIZE)
    assert f"{folder} is read-only" in line
    assert "--arrays" in line


# ---- arrays: of which images they are -----------------------------------------------------------


def remove_person(tree: Path) -> None:
    file = tree / "exp/val_id.txt"
    _, *others = ids_in(file)
    file.write_text(",".join(str(pid) for pid in others))


def remove_image(tree: Path) -> None:
    _, thermal = sysu_train(str(tree))
    os.remove(thermal.paths[0])


def copy_image(tree: Path) -> None:
    visible, _ = sysu_train(str(tree))
    shutil.copy(visible.paths[-1], Path(visible.paths[-1]).with_name("0009.jpg"))


def exchange_persons(tree: Path) -> None:
    """The last training person becomes a test person, and the other way round."""
    train_file = tree / "exp/train_id.txt"
    test_file = tree / "exp/test_id.txt"
    *train_pids, last = ids_in(train_file)
    first, *test_pids = ids_in(test_file)
    train_file.write_text(",".join(str(pid) for pid in [*train_pids, first]))
    test_file.write_text(",".join(str(pid) for pid in [last, *test_pids]))


@pytest.mark.parametrize(
    ("change", "modality", "counts"),
    [
        (remove_person, "visible", [34, 10, 32, 9]),
        (remove_image, "infrared", [17, 10, 16, 10]),
        (copy_image, "visible", [34, 10, 35, 10]),
        (exchange_persons, "visible", [34, 10, 38, 10]),
    ],
)
def test_arrays_of_other_images_are_an_error(
    sysu_copy, error_of, tmp_path, change, modality, counts
):
    """Without a digest, too: the original code writes none.

    ``counts``: images and persons in the arrays, images and persons in the folders.
    """
    (sysu_copy / DIGEST).unlink()
    change(sysu_copy)
    line = error_of(*command_on(sysu_copy, "train.py", "sysu", tmp_path))
    # Folder, difference, and the command, which names the folder again.
    _, difference, _ = line.split(str(sysu_copy))
    assert modality in difference
    assert numbers_in(difference) == counts
    assert line.endswith(preprocess_command("--data-path", sysu_copy))


def test_arrays_of_persons_who_were_renamed_are_an_error(sysu_copy, error_of, tmp_path):
    """There are as many images of each, but the digest tells."""
    *others, last = ids_in(sysu_copy / "exp/train_id.txt")
    for folder in list(sysu_copy.glob(f"cam?/{last:04d}")):
        folder.rename(folder.with_name("0499"))
    (sysu_copy / "exp/train_id.txt").write_text(",".join(str(pid) for pid in [*others, 499]))
    line = error_of(*command_on(sysu_copy, "train.py", "sysu", tmp_path))
    assert str(sysu_copy) in line
    assert "renamed" in line


def test_arrays_without_a_digest_are_accepted(sysu_copy, train_one_epoch):
    (sysu_copy / DIGEST).unlink()
    printed = train_one_epoch(sysu_copy)
    assert lines_with("warning: train: ", printed) == []
    assert "arrays without a digest" in printed


@pytest.mark.parametrize("dtype", ["uint8", "int32", "uint64", ">i8"])
def test_labels_may_be_any_whole_numbers(sysu_copy, dtype):
    expected = load_all_arrays(sysu_copy).visible_labels
    for file in sysu_copy.glob("*_label.npy"):
        np.save(file, np.load(file).astype(dtype))
    train_set = load_all_arrays(sysu_copy)
    assert train_set.visible_labels.dtype == np.int64
    np.testing.assert_array_equal(train_set.visible_labels, expected)


@pytest.mark.parametrize("has_lists", [True, False])
def test_arrays_alone_are_accepted(sysu_copy, train_one_epoch, has_lists):
    """People delete the training images once they have the arrays."""
    train_pids = ids_in(sysu_copy / "exp/train_id.txt", sysu_copy / "exp/val_id.txt")
    for pid in train_pids:
        for folder in list(sysu_copy.glob(f"cam?/{pid:04d}")):
            shutil.rmtree(folder)
    if not has_lists:
        (sysu_copy / "exp/train_id.txt").unlink()
        (sysu_copy / "exp/val_id.txt").unlink()
    printed = train_one_epoch(sysu_copy)
    assert lines_with("train: ", printed) == []
    (warning,) = lines_with("warning: train: ", printed)
    assert numbers_in(warning) == [10, 34, 17]  # persons, visible images, infrared images
    assert "not compared" in warning


def test_arrays_of_images_that_changed_are_noticed(sysu_copy, writes_arrays, error_of, tmp_path):
    """Though the image is older than the arrays, and as long as before."""
    _, thermal = sysu_train(str(sysu_copy))
    changed = Path(thermal.paths[4])
    with Image.open(changed) as image:
        pixels = 255 - np.asarray(image.convert("RGB"))
    n_bytes = changed.stat().st_size
    Image.fromarray(pixels).save(changed, quality=10)
    with open(changed, "ab") as file:
        file.write(bytes(n_bytes - changed.stat().st_size))
    assert changed.stat().st_size == n_bytes
    os.utime(changed, (1e9, 1e9))

    line = error_of(*command_on(sysu_copy, "train.py", "sysu", tmp_path))
    assert "image files were changed" in line
    assert line.endswith(preprocess_command("--data-path", sysu_copy))

    before = np.load(sysu_copy / "train_ir_resized_img.npy")
    assert writes_arrays(sysu_copy)
    images = np.load(sysu_copy / "train_ir_resized_img.npy")
    np.testing.assert_array_equal(images[4], read_image(str(changed), (96, 32)))
    differs = (images != before).any(axis=(1, 2, 3))
    assert np.flatnonzero(differs).tolist() == [4]
    assert not writes_arrays(sysu_copy)


def move_by_copy(tree: Path, target: Path) -> None:
    shutil.copytree(tree, target)


def move_by_tar(tree: Path, target: Path, tar_format: int) -> None:
    """USTAR keeps whole seconds, PAX fractions."""
    archive = target.with_suffix(".tar")
    with tarfile.open(archive, "w", format=tar_format) as file:
        file.add(tree, arcname=target.name)
    with tarfile.open(archive) as file:
        file.extractall(target.parent, filter="data")


def move_by_old_tar(tree: Path, target: Path) -> None:
    move_by_tar(tree, target, tarfile.USTAR_FORMAT)


def move_by_new_tar(tree: Path, target: Path) -> None:
    move_by_tar(tree, target, tarfile.PAX_FORMAT)


@pytest.mark.parametrize("move", [move_by_copy, move_by_old_tar, move_by_new_tar])
def test_arrays_match_after_a_move_that_keeps_times(sysu_tree, writes_arrays, tmp_path, move):
    tree = tmp_path / "moved"
    move(sysu_tree, tree)
    assert not writes_arrays(tree)
    assert load_all_arrays(tree).n_class == 10
    visible, _ = sysu_train(str(tree))
    os.utime(visible.paths[0], (1e9, 1e9))  # then they do not match
    with pytest.raises(InputError, match="image files were changed"):
        load_all_arrays(tree)


def test_other_sizes_of_arrays_have_another_digest(sysu_copy, writes_arrays):
    """They are made anew, and train.py accepts them."""
    digest = (sysu_copy / DIGEST).read_text()
    assert writes_arrays(sysu_copy, "--img-w", 40)
    assert (sysu_copy / DIGEST).read_text() != digest
    assert load_all_arrays(sysu_copy).visible.shape[1:] == (96, 40, 3)
    assert writes_arrays(sysu_copy)
    assert (sysu_copy / DIGEST).read_text() == digest


@pytest.fixture
def preprocess_until_interrupt(output_of, monkeypatch) -> Callable[[Path, int], None]:
    """(tree, n_files): Ctrl-C in pre_process_sysu.py when so many files have got their names."""
    replace = os.replace

    def run(tree: Path, n_files: int) -> None:
        replaced = []

        def replace_or_interrupt(source: str, target: str) -> None:
            if len(replaced) == n_files:
                raise KeyboardInterrupt
            replace(source, target)
            replaced.append(target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace_or_interrupt)
            with pytest.raises(SystemExit):
                output_of("pre_process_sysu.py", "--data-path", tree, *SIZE, "--force")

    return run


@pytest.mark.parametrize("n_files", range(len(ARRAYS)))
def test_an_interrupt_between_arrays_leaves_no_labels(
    sysu_copy, preprocess_until_interrupt, writes_arrays, n_files
):
    """So new images never have old labels. The arrays are written again."""
    preprocess_until_interrupt(sysu_copy, n_files)
    with pytest.raises(InputError, match=r"_label\.npy not found"):
        load_all_arrays(sysu_copy)
    assert writes_arrays(sysu_copy)
    load_all_arrays(sysu_copy)


def test_an_interrupt_before_the_digest_leaves_arrays_without_one(
    sysu_copy, preprocess_until_interrupt, writes_arrays
):
    """They are whole, but are written again."""
    preprocess_until_interrupt(sysu_copy, len(ARRAYS))
    assert not (sysu_copy / DIGEST).exists()
    load_all_arrays(sysu_copy)
    assert writes_arrays(sysu_copy)
    assert (sysu_copy / DIGEST).exists()
