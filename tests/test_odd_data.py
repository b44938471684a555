"""Datasets as people have them: other spellings, other folders, stray files, stale arrays, leakage.

What is spelt in another way gives the same lists and the same galleries. What is left out is named
in a warning. What would spoil scores is an error.
"""

import codecs
import logging
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    RUN,
    RUN_FLAGS,
    TINY,
    files_of,
    folder_flags,
    golden,
    only_json,
    read_all,
    rows_of,
)
from filelock import FileLock
from PIL import Image

import data_loader
from data_loader import TrainingSet, load_arrays, read_image
from data_manager import DATASETS, Split, list_training_images, sysu_test, sysu_train
from utils import InputError

UNTRAINED = ["--pretrained", "none", "--arch", "tiny", "--low-dim", 16, "--features", "fc"]
UNTRAINED += ["--img-h", 96, "--img-w", 32, "--workers", 0]


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


def lists_of(name: str, root: Path) -> dict[str, list[tuple]]:
    """The rows of training, and of the query and the gallery of all trials of all protocols."""
    dataset = DATASETS[name]
    visible, thermal = dataset.train(str(root), 1)
    lists = {"visible": rows_in(visible, root), "thermal": rows_in(thermal, root)}
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


def test_the_gallery_of_persons_one_a_line_is_the_published_one(copy_of):
    """If only the first line were read there would be one person."""
    tree = copy_of("golden_tree")
    file = tree / "exp/test_id.txt"
    file.write_text(file.read_text().replace(",", "\n"))
    expected = golden("sysu_lists.json")["gallery_all_single_first_call"]
    rows = lists_of("sysu", tree)["all-search single-shot 1 gallery"]
    assert [path for path, _, _, _ in rows] == expected["paths"]
    assert [pid for _, pid, _, _ in rows] == expected["ids"]


@pytest.mark.parametrize(
    ("tree_name", "script", "file"),
    [
        ("sysu_tree", "pre_process_sysu.py", "exp/val_id.txt"),
        ("llcm_tree", "train.py --dataset llcm", "idx/test_id.txt"),
        ("regdb_tree", "train.py --dataset regdb", "idx/train_visible_1.txt"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32", "latin-1"])
def test_an_error_names_the_encoding_that_is_needed(
    copy_of, error_of, tmp_path, tree_name, script, file, encoding
):
    """UTF-16 without a mark, and what is not ASCII in Latin-1."""
    tree = copy_of(tree_name)
    text = (tree / file).read_text()
    if encoding == "latin-1":
        text += "é.bmp 1\n"
    (tree / file).write_bytes(text.encode(encoding))
    name, *flags = script.split()
    flags += ["--data-path", tree]
    if name == "train.py":
        flags += [*TINY, *folder_flags(tree, tmp_path)]
    line = error_of(name, *flags)
    assert f"{tree / file} is in another encoding than UTF-8: save it as UTF-8" in line


@pytest.mark.parametrize("text", ["", "\n", " ,\r\n"])
def test_an_empty_list_of_validation_persons_means_none(copy_of, text):
    tree = copy_of("golden_tree")
    training_ids = (tree / "exp/train_id.txt").read_text().split(",")
    (tree / "exp/val_id.txt").write_text(text)
    visible, thermal = sysu_train(str(tree))
    expected = sorted(int(pid) for pid in training_ids)
    assert np.unique(visible.pids).tolist() == expected
    assert np.unique(thermal.pids).tolist() == expected


@pytest.mark.parametrize(
    ("tree_name", "script", "file", "words"),
    [
        ("sysu_tree", "pre_process_sysu.py", "exp/val_id.txt", "not found"),
        ("sysu_tree", "pre_process_sysu.py", "exp/train_id.txt", "holds no person id"),
        ("sysu_tree", "test.py", "exp/test_id.txt", "holds no person id"),
        ("llcm_tree", "test.py --dataset llcm", "idx/test_id.txt", "holds no person id"),
    ],
)
def test_lists_that_must_not_be_missing_or_empty(
    copy_of, error_of, tmp_path, tree_name, script, file, words
):
    tree = copy_of(tree_name)
    if words == "not found":
        (tree / file).unlink()
    else:
        (tree / file).write_text(" \n,\n")
    name, *flags = script.split()
    if name == "test.py":
        flags += [*UNTRAINED, "--log-path", tmp_path]
    assert f"{tree / file} {words}" in error_of(name, *flags, "--data-path", tree)


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
    ("tree_name", "script", "folder"),
    [
        ("sysu_tree", "pre_process_sysu.py", "cam6/0012"),
        ("sysu_tree", "test.py", "cam3/0002"),
        ("llcm_tree", "test.py --dataset llcm", "test_nir/cam4/0001"),
    ],
)
def test_two_folders_of_a_person_in_a_camera_are_an_error(
    copy_of, error_of, tmp_path, tree_name, script, folder
):
    tree = copy_of(tree_name)
    first = tree / folder
    assert first.is_dir()
    second = first.with_name(str(int(first.name)))
    second.mkdir()
    name, *flags = script.split()
    if name == "test.py":
        flags += [*UNTRAINED, "--log-path", tmp_path]
    line = error_of(name, *flags, "--data-path", tree)
    assert f"{first} and {second} are folders of the same person" in line


# ---- image files --------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".tif", ".tiff", ".webp", ".TIF", ".png"])
def test_images_of_other_formats_give_the_same_arrays(sysu_copy, output_of, tmp_path, suffix):
    """Those of camera 6 are saved anew, without any loss."""
    expected = np.load(sysu_copy / "train_ir_resized_img.npy")
    expected_rows = [(path, *others) for path, *others in rows_in(sysu_test(sysu_copy), sysu_copy)]
    for path in list(sysu_copy.glob("cam6/*/*.jpg")):
        with Image.open(path) as image:
            image.save(path.with_suffix(suffix), lossless=True)
        path.unlink()
    size = ["--img-h", 96, "--img-w", 32, "--workers", 0]
    printed = output_of(
        "pre_process_sysu.py", "--data-path", sysu_copy, "--arrays", tmp_path / "arrays", *size
    )
    assert "left out" not in printed
    np.testing.assert_array_equal(np.load(tmp_path / "arrays/train_ir_resized_img.npy"), expected)

    rows = rows_in(sysu_test(sysu_copy), sysu_copy)
    n_renamed = 0
    for row, (path, *others) in zip(rows, expected_rows, strict=True):
        if path.startswith("cam6"):
            path = path.replace(".jpg", suffix)
            n_renamed += 1
        assert row == (path, *others)
    assert n_renamed > 0


# ---- what is left out ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sysu", "llcm"])
def test_what_is_left_out_is_named_once_for_each_kind(copy_of, request, caplog, name):
    tree_name = {"sysu": "golden_tree", "llcm": "llcm_tree"}[name]
    tree = copy_of(tree_name)
    root, ids, camera, person = {
        "sysu": (tree, tree / "exp/test_id.txt", "cam3", "0008"),
        "llcm": (tree / "test_nir", tree / "idx/test_id.txt", "cam1", "0001"),
    }[name]
    folder = root / camera / person
    for file in ("1.gif", "2.heic", "3.jpg.part", "README"):
        (folder / file).touch()
    (folder / "0001.png").mkdir()
    (root / camera / "list.txt").touch()
    (root / camera / "person 9").mkdir()
    (root / "cam77/0008").mkdir(parents=True)
    (root / "cam9.zip").touch()
    ids.write_text(f"{ids.read_text()},900,902,901,903")

    images = DATASETS[name].test(str(tree), None)
    expected_ends = [
        f".webp (4): {folder}/1.gif, {folder}/2.heic, {folder}/3.jpg.part, ...",
        f" (1): {folder}/0001.png",
        f" (2): {root}/{camera}/list.txt, {root}/{camera}/person 9",
        f" (2): {root}/cam77, {root}/cam9.zip",
        " (4): 900, 901, 902, ...",
    ]
    warnings = warnings_in(caplog)
    assert len(warnings) == len(expected_ends)
    for end in expected_ends:
        (warning,) = [text for text in warnings if text.endswith(end)]
        assert warning.startswith("test: left out: ")
    untouched = request.getfixturevalue(tree_name)
    expected = DATASETS[name].test(str(untouched), None)
    assert rows_in(images, tree) == rows_in(expected, untouched)


def test_scripts_warn_of_what_is_left_out(sysu_copy, output_of, tmp_path):
    """Of training images and of test images, each for itself."""
    (sysu_copy / "cam6/0001/0001.gif").touch()
    (sysu_copy / "cam6/0002/0001.gif").touch()
    flags = [*TINY, *folder_flags(sysu_copy, tmp_path), "--epochs", 0]
    warnings = lines_with("warning: ", output_of("train.py", *flags))
    left_out = [line for line in warnings if "left out" in line]
    assert [line[:14] for line in left_out] == ["warning: train", "warning: test:"]
    assert left_out[0].endswith(f"(1): {sysu_copy}/cam6/0001/0001.gif")
    assert left_out[1].endswith(f"(1): {sysu_copy}/cam6/0002/0001.gif")


@pytest.mark.parametrize("name", DATASETS)
def test_nothing_is_said_of_files_of_operating_systems(copy_of, caplog, name):
    """Nor of an untouched tree."""
    tree = copy_of(f"{name}_tree")
    for folder in [tree, *tree.glob("*/"), *tree.glob("*/*/"), *tree.glob("*/*/*/")]:
        for file in (".DS_Store", "._0001.jpg", "Thumbs.db", "thumbs.db", "desktop.ini"):
            (folder / file).touch()
        (folder / ".cache").mkdir()
    n_images = 0
    for split in (*DATASETS[name].train(str(tree), 1), DATASETS[name].test(str(tree), 1)):
        n_images += len(split)
    assert n_images > 0
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
    paths = [f"{tree}/{line.split()[0]}" for line in (first, second)]
    assert warning == f"train: listed more than once (2): {', '.join(paths)}"


# ---- what is logged of a dataset ----------------------------------------------------------------


def count_lines(file: Path) -> int:
    return len(file.read_text().splitlines())


def count_labels(file: Path) -> int:
    return len({line.split()[1] for line in file.read_text().splitlines()})


def count_files(tree: Path, pattern: str, pids: list[int]) -> int:
    """How many images there are of these persons; the pattern has {} for a person's folder."""
    n_files = 0
    for pid in pids:
        n_files += len(list(tree.glob(pattern.format(f"{pid:04d}"))))
    return n_files


def ids_in(*files: Path) -> list[int]:
    pids = []
    for file in files:
        pids += [int(pid) for pid in file.read_text().split(",")]
    return pids


def expected_lines(name: str, tree: Path) -> dict[str, str]:
    """What is to be logged of training and test, counted in the tree."""
    if name == "sysu":
        train_pids = ids_in(tree / "exp/train_id.txt", tree / "exp/val_id.txt")
        test_pids = ids_in(tree / "exp/test_id.txt")
        train = (
            len(train_pids),
            count_files(tree, "cam[1245]/{}/*.jpg", train_pids),
            count_files(tree, "cam[36]/{}/*.jpg", train_pids),
        )
        test = (
            len(test_pids),
            count_files(tree, "cam[1245]/{}/*.jpg", test_pids),
            count_files(tree, "cam[36]/{}/*.jpg", test_pids),
        )
        train_cameras = "1, 2, 3, 4, 5, 6"
        test_cameras = "1, 2, 3, 4, 5, 6"
    elif name == "regdb":
        train = (
            count_labels(tree / "idx/train_visible_3.txt"),
            count_lines(tree / "idx/train_visible_3.txt"),
            count_lines(tree / "idx/train_thermal_3.txt"),
        )
        test = (
            count_labels(tree / "idx/test_visible_3.txt"),
            count_lines(tree / "idx/test_visible_3.txt"),
            count_lines(tree / "idx/test_thermal_3.txt"),
        )
        train_cameras = "1, 2"
        test_cameras = "1, 2"
    else:
        train = (
            count_labels(tree / "idx/train_vis.txt"),
            count_lines(tree / "idx/train_vis.txt"),
            count_lines(tree / "idx/train_nir.txt"),
        )
        test_pids = ids_in(tree / "idx/test_id.txt")
        test = (
            len(test_pids),
            count_files(tree, "test_vis/cam?/{}/*.jpg", test_pids),
            count_files(tree, "test_nir/cam?/{}/*.jpg", test_pids),
        )
        cameras = {folder.name.removeprefix("cam") for folder in tree.glob("test_*/cam?")}
        train_cameras = "unknown"
        test_cameras = ", ".join(sorted(cameras))
    text = "{} persons, {} visible and {} infrared images, cameras"
    return {
        "train": f"train: {text.format(*train)} {train_cameras}",
        "test": f"test: {text.format(*test)} {test_cameras}",
    }


@pytest.mark.parametrize("name", DATASETS)
def test_scripts_log_how_many_images_there_are(request, output_of, tmp_path, name):
    tree = request.getfixturevalue(f"{name}_tree")
    expected = expected_lines(name, tree)
    flags = ["--dataset", name, *folder_flags(tree, tmp_path), "--trial", 3]
    printed = output_of("train.py", *TINY, *flags, "--epochs", 0)
    assert lines_with("train: ", printed) == [expected["train"]]
    assert lines_with("test: ", printed) == [expected["test"]]
    printed = output_of("test.py", *UNTRAINED, *flags)
    assert lines_with("train: ", printed) == []
    assert lines_with("test: ", printed) == [expected["test"]]
    if name == "sysu":
        printed = output_of(
            "pre_process_sysu.py", "--data-path", tree, "--img-h", 96, "--img-w", 32
        )
        assert lines_with("train: ", printed) == [expected["train"]]
        assert lines_with("test: ", printed) == []


# ---- persons and images in training and in the test ---------------------------------------------


@pytest.mark.parametrize("file", ["exp/train_id.txt", "exp/val_id.txt"])
@pytest.mark.parametrize("script", ["pre_process_sysu.py", "train.py"])
def test_test_persons_on_a_training_list_are_an_error(sysu_copy, error_of, tmp_path, script, file):
    """Without any arrays, too: the lists are compared first."""
    pid, *_ = ids_in(sysu_copy / "exp/test_id.txt")
    (sysu_copy / file).write_text(f"{pid}, {(sysu_copy / file).read_text()}")
    flags = ["--data-path", sysu_copy]
    if script == "train.py":
        flags = [*TINY, *folder_flags(sysu_copy, tmp_path)]
        for array in sysu_copy.glob("*.npy"):
            array.unlink()
    line = error_of(script, *flags)
    assert f"{sysu_copy}/exp: 1 persons are on a training list and on the test list ({pid})" in line
    assert "scores would be too high" in line


def test_a_test_needs_no_training_lists(sysu_copy, sysu_tree, output_of, tmp_path):
    """Whatever they hold, and without any, the scores are the same."""
    output_of("test.py", *UNTRAINED, "--data-path", sysu_tree, "--log-path", tmp_path / "before")
    expected = only_json(tmp_path / "before")["results"]
    flags = [*UNTRAINED, "--data-path", sysu_copy]
    shutil.copy(sysu_copy / "exp/test_id.txt", sysu_copy / "exp/train_id.txt")
    output_of("test.py", *flags, "--log-path", tmp_path / "leakage")
    assert only_json(tmp_path / "leakage")["results"] == expected
    (sysu_copy / "exp/train_id.txt").unlink()
    (sysu_copy / "exp/val_id.txt").unlink()
    output_of("test.py", *flags, "--log-path", tmp_path / "alone")
    assert only_json(tmp_path / "alone")["results"] == expected


LEAKS = {
    "regdb": ("idx/train_visible_1.txt", "Visible/2/person_v_0001.bmp"),
    "llcm": ("idx/train_nir.txt", "test_nir/cam1/0001/0001_c01_0002_nir.jpg"),
}


@pytest.mark.parametrize("name", LEAKS)
@pytest.mark.parametrize("spelling", ["{}", "./{}", "folder//image", "backslashes", "link"])
def test_images_in_training_and_in_the_test_are_an_error(
    copy_of, error_of, tmp_path, name, spelling
):
    """One file is one image, whatever path leads to it."""
    tree = copy_of(f"{name}_tree")
    list_name, image = LEAKS[name]
    assert (tree / image).is_file()
    if spelling == "link":
        (tree / "link.bmp").symlink_to(tree / image)
        listed = "link.bmp"
    elif spelling == "folder//image":
        listed = image.replace("/", "//")
    elif spelling == "backslashes":
        listed = image.replace("/", "\\")
    else:
        listed = spelling.format(image)
    with open(tree / list_name, "a") as file:
        file.write(f"{listed} 0\n")
    flags = ["--dataset", name, *TINY, *folder_flags(tree, tmp_path)]
    line = error_of("train.py", *flags)
    path = f"{tree}/{listed}".replace("\\", "/")
    assert f"1 images are both training and test images ({path})" in line
    assert "scores would be too high" in line


def test_images_that_are_missing_are_no_leak(copy_of, error_of, tmp_path):
    tree = copy_of("regdb_tree")
    for subset in ("train", "test"):
        with open(tree / f"idx/{subset}_visible_1.txt", "a") as file:
            file.write("Visible/1/missing.bmp 0\n")
    flags = ["--dataset", "regdb", *TINY, *folder_flags(tree, tmp_path)]
    assert "missing.bmp not found" in error_of("train.py", *flags)


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
    ("name", "change", "words"),
    [
        (
            "llcm",
            move_to_camera_1,
            "a query ignores images of its person in the camera of its own number (query cameras: "
            "[1], gallery cameras: [1])",
        ),
        (
            "sysu",
            keep_cameras_2_and_3,
            "queries of camera 3 ignore images of camera 2 (query cameras: [3], gallery cameras: "
            "[2])",
        ),
        ("sysu", keep_other_persons, "no person is in both (query cameras: [3 6]"),
    ],
)
def test_queries_without_any_match_end_the_program_at_once(
    copy_of, error_of, monkeypatch, tmp_path, script, name, change, words
):
    """Before an image is read."""

    def no_reads(path: str, size: tuple[int, int]) -> None:
        raise AssertionError(f"{path} is read")

    monkeypatch.setattr(data_loader, "read_image", no_reads)
    tree = copy_of(f"{name}_tree")
    change(tree)
    flags = TINY if script == "train.py" else UNTRAINED
    line = error_of(script, *flags, "--dataset", name, *folder_flags(tree, tmp_path))
    assert f"no query has a match in the gallery: {words}" in line


@pytest.mark.parametrize(
    ("name", "file"), [("llcm", "idx/test_id.txt"), ("sysu", "exp/test_id.txt")]
)
def test_a_gallery_of_one_person_is_warned_of(copy_of, output_of, tmp_path, name, file):
    tree = copy_of(f"{name}_tree")
    pid, *_ = ids_in(tree / file)
    (tree / file).write_text(str(pid))
    flags = [*UNTRAINED, "--dataset", name, "--log-path", tmp_path]
    printed = output_of("test.py", *flags, "--data-path", tree)
    warnings = [line for line in lines_with("warning: ", printed) if "100% rank-1" in line]
    assert len(warnings) == 1
    assert "of 1 persons: are any persons missing?" in warnings[0]
    for row in rows_of(only_json(tmp_path)).values():
        assert row["mean"]["rank1"] == 1


# ---- arrays: where they are ---------------------------------------------------------------------

SIZE = ["--img-h", 96, "--img-w", 32, "--workers", 0]
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


def test_arrays_may_be_in_a_folder_of_their_own(
    sysu_copy, output_of, error_of, train_one_epoch, tmp_path
):
    """They are written there and found there, and nothing is written beside the data."""
    expected = {}
    for name in ARRAYS:
        expected[name] = np.load(sysu_copy / name)
    for name in (*ARRAYS, DIGEST, "pre_process.lock"):
        (sysu_copy / name).unlink()
    before = files_of(sysu_copy)
    folder = tmp_path / "new/arrays"
    command = ["pre_process_sysu.py", "--data-path", sysu_copy, "--arrays", folder, *SIZE]
    assert "written: " in output_of(*command)
    names = {file.name for file in folder.iterdir()}
    assert names - {"pre_process.lock"} == {*ARRAYS, DIGEST}
    for name in ARRAYS:
        np.testing.assert_array_equal(np.load(folder / name), expected[name])
    assert "nothing to do" in output_of(*command)

    train_one_epoch(sysu_copy, "--arrays", folder)
    assert files_of(sysu_copy) == before

    flags = [*RUN_FLAGS, *folder_flags(sysu_copy, tmp_path)]
    line = error_of("train.py", *flags)
    assert f"{sysu_copy}/{ARRAYS[2]} not found" in line
    assert line.endswith(preprocess_command("--data-path", sysu_copy))
    line = error_of("train.py", *flags, "--arrays", tmp_path)
    assert f"{tmp_path}/{ARRAYS[2]} not found" in line
    assert line.endswith(preprocess_command("--data-path", sysu_copy, "--arrays", tmp_path))


def test_the_lock_is_beside_the_arrays(sysu_copy, error_of, tmp_path):
    (tmp_path / "arrays").mkdir()
    command = ["pre_process_sysu.py", "--data-path", sysu_copy, "--arrays", tmp_path / "arrays"]
    with FileLock(tmp_path / "arrays/pre_process.lock"):
        line = error_of(*command, *SIZE)
    assert f"{tmp_path}/arrays/pre_process.lock is locked" in line


@pytest.mark.parametrize(("name", "title"), [("regdb", "RegDB"), ("llcm", "LLCM")])
def test_other_datasets_have_no_arrays(error_of, tmp_path, name, title):
    line = error_of("train.py", "--dataset", name, *TINY, "--arrays", tmp_path)
    assert f"{title} is read from image files: leave --arrays out" in line


@pytest.mark.parametrize("flag", ["--data-path", "--arrays"])
def test_a_folder_that_is_read_only_is_named(sysu_copy, error_of, monkeypatch, tmp_path, flag):
    """For root every folder can be written to: the answer of the system is replaced."""
    (tmp_path / "arrays").mkdir()
    folder = {"--data-path": sysu_copy, "--arrays": tmp_path / "arrays"}[flag]
    access = os.access

    def read_only(path, mode, **options) -> bool:
        if Path(path) == folder and mode & os.W_OK:
            return False
        return access(path, mode, **options)

    monkeypatch.setattr(os, "access", read_only)
    flags = ["--data-path", sysu_copy, "--force", *SIZE]
    if flag == "--arrays":
        flags += ["--arrays", folder]
    line = error_of("pre_process_sysu.py", *flags)
    assert f"{folder} is read-only: name another folder by --arrays, also in train.py" in line


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


@pytest.mark.parametrize("change", [remove_person, remove_image, copy_image, exchange_persons])
@pytest.mark.parametrize("has_digest", [True, False])
def test_arrays_of_other_images_are_an_error(sysu_copy, error_of, tmp_path, change, has_digest):
    """Numbers alone tell it: the original code writes no digest."""
    if not has_digest:
        (sysu_copy / DIGEST).unlink()
    change(sysu_copy)
    line = error_of("train.py", *RUN_FLAGS, *folder_flags(sysu_copy, tmp_path))
    assert f"{sysu_copy}: the arrays are of other persons or images: " in line
    assert line.endswith(preprocess_command("--data-path", sysu_copy))


def test_arrays_of_persons_who_were_renamed_are_an_error(sysu_copy, error_of, tmp_path):
    """There are as many images of each, but the digest tells."""
    *others, last = ids_in(sysu_copy / "exp/train_id.txt")
    for folder in list(sysu_copy.glob(f"cam?/{last:04d}")):
        folder.rename(folder.with_name("0499"))
    (sysu_copy / "exp/train_id.txt").write_text(",".join(str(pid) for pid in [*others, 499]))
    line = error_of("train.py", *RUN_FLAGS, *folder_flags(sysu_copy, tmp_path))
    assert "image files were changed, renamed, or copied without their times" in line


def test_arrays_without_a_digest_are_accepted(sysu_copy, train_one_epoch):
    (sysu_copy / DIGEST).unlink()
    assert "not compared" not in train_one_epoch(sysu_copy)


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
    n_visible = len(np.load(sysu_copy / "train_rgb_resized_label.npy"))
    n_thermal = len(np.load(sysu_copy / "train_ir_resized_label.npy"))
    (line,) = [line for line in printed.splitlines() if "train: " in line]
    counts = f"{len(train_pids)} persons, {n_visible} visible and {n_thermal} infrared images"
    assert line.startswith(f"warning: train: {counts}")
    assert "not compared with image files" in line
    assert "left out" not in printed


def test_arrays_of_images_that_changed_are_noticed(sysu_copy, output_of, error_of, tmp_path):
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

    line = error_of("train.py", *RUN_FLAGS, *folder_flags(sysu_copy, tmp_path))
    assert "image files were changed, renamed, or copied without their times" in line
    assert line.endswith(preprocess_command("--data-path", sysu_copy))

    before = np.load(sysu_copy / "train_ir_resized_img.npy")
    printed = output_of("pre_process_sysu.py", "--data-path", sysu_copy, *SIZE)
    assert "nothing to do" not in printed
    images = np.load(sysu_copy / "train_ir_resized_img.npy")
    np.testing.assert_array_equal(images[4], read_image(str(changed), (96, 32)))
    differs = (images != before).any(axis=(1, 2, 3))
    assert np.flatnonzero(differs).tolist() == [4]
    assert "nothing to do" in output_of("pre_process_sysu.py", "--data-path", sysu_copy, *SIZE)


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
def test_arrays_match_after_a_move_that_keeps_times(sysu_tree, output_of, tmp_path, move):
    tree = tmp_path / "moved"
    move(sysu_tree, tree)
    printed = output_of("pre_process_sysu.py", "--data-path", tree, *SIZE)
    assert "the arrays exist and match: nothing to do" in printed
    assert load_all_arrays(tree).n_class == 10
    visible, _ = sysu_train(str(tree))
    os.utime(visible.paths[0], (1e9, 1e9))  # then they do not match
    with pytest.raises(InputError, match="image files were changed"):
        load_all_arrays(tree)


def test_other_sizes_of_arrays_have_another_digest(sysu_copy, output_of):
    """They are made anew, and train.py accepts them."""
    command = ["pre_process_sysu.py", "--data-path", sysu_copy, *SIZE]
    digest = (sysu_copy / DIGEST).read_text()
    output_of(*command, "--img-w", 40)
    assert (sysu_copy / DIGEST).read_text() != digest
    assert load_all_arrays(sysu_copy).visible.shape[1:] == (96, 40, 3)
    output_of(*command)
    assert (sysu_copy / DIGEST).read_text() == digest


def test_a_kill_between_two_files_leaves_arrays_that_do_not_match(
    sysu_copy, output_of, monkeypatch
):
    """New labels come after new images, and the digest last. The arrays are written again."""
    replace = os.replace
    n_files = len(ARRAYS) + 1
    for n_replaced in range(n_files):
        calls = 0

        def replace_some(source: str, target: str, n_replaced=n_replaced) -> None:
            nonlocal calls
            calls += 1
            if calls > n_replaced:
                raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace_some)
            with pytest.raises(SystemExit):
                output_of("pre_process_sysu.py", "--data-path", sysu_copy, *SIZE, "--force")
        if n_replaced < len(ARRAYS):
            with pytest.raises(InputError, match=r"label\.npy not found|img\.npy not found"):
                load_all_arrays(sysu_copy)
        printed = output_of("pre_process_sysu.py", "--data-path", sysu_copy, *SIZE)
        assert "nothing to do" not in printed, n_replaced
