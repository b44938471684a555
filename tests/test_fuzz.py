"""Damaged and untrusted files: rejected with an InputError that names them, or read as they are.

A longer search, with other examples each time:

    pytest tests/test_fuzz.py --hypothesis-profile long
"""

import codecs
import functools
import io
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import features_file, result, same_content
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import ExifTags, Image

import data_loader
import data_manager
import utils
from data_manager import DATASETS, Split
from tools.features_files import load_features
from tools.results_files import read_metrics, read_results
from utils import InputError

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """``content`` with a bit flipped, cut off, or with bytes inserted or removed."""
    position = draw(st.integers(0, len(content) - 1))
    bit = draw(st.integers(0, 7))
    flipped = bytes([content[position] ^ 1 << bit])
    # What is listed twice is drawn more often.
    inserted = draw(st.sampled_from([flipped, flipped, b""]) | st.binary(max_size=9))
    n_removed = draw(st.sampled_from([len(inserted), 1, 1, 99, len(content)]))
    return content[:position] + inserted + content[position + n_removed :]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder whose files each example writes anew."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "idx").mkdir()
    return folder


outcomes = Counter()  # of the examples of the test that runs: how many were read, and rejected


def has_both_outcomes(test: Callable) -> Callable:
    """A test some of whose examples must be read, and others rejected: it is not empty."""

    @functools.wraps(test)
    def counted_test(*args, **options) -> None:
        outcomes.clear()
        test(*args, **options)
        assert outcomes["read"] >= 3, outcomes
        assert outcomes["rejected"] >= 3, outcomes

    return counted_test


def read(name: str, reader: Callable, *args) -> object:
    """What ``reader`` returns; None: an InputError that has ``name`` in its message."""
    try:
        result = reader(*args)
    except InputError as error:
        assert name in str(error)
        assert len(str(error)) < 1000
        outcomes["rejected"] += 1
        return None
    outcomes["read"] += 1
    return result


def write_and_read(path: Path, content: bytes, reader: Callable, *args) -> object:
    """As `read`, of a file with this content."""
    path.write_bytes(content)
    return read(path.name, reader, str(path), *args)


def bytes_of(save: Callable, *args, **options) -> bytes:
    """What ``save(file, ...)`` writes."""
    file = io.BytesIO()
    save(file, *args, **options)
    return file.getvalue()


# ---- text files ---------------------------------------------------------------------------------

ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le with mark", "utf-16-be with mark"]
OTHER_ENCODINGS = ["utf-16-le", "utf-16-be", "utf-32", "cp1252"]  # without a mark, but utf-32
encoding = st.sampled_from(ENCODINGS)
any_encoding = st.sampled_from(ENCODINGS * 3 + OTHER_ENCODINGS)
line_end = st.sampled_from(["\n", "\n", "\r\n", "\r"])


def encode(text: str, encoding: str) -> bytes:
    """``text`` as an editor saves it."""
    if encoding == "utf-16-le with mark":
        return codecs.BOM_UTF16_LE + text.encode("utf-16-le")
    if encoding == "utf-16-be with mark":
        return codecs.BOM_UTF16_BE + text.encode("utf-16-be")
    return text.encode(encoding, errors="replace")


def decode(content: bytes) -> str | None:
    """The text of a file as the first bytes tell its encoding; None: it cannot be that."""
    try:
        if content[:2] == b"\xff\xfe":
            text = content[2:].decode("utf-16-le")
        elif content[:2] == b"\xfe\xff":
            text = content[2:].decode("utf-16-be")
        else:
            text = content.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except ValueError:
        return None
    return None if "\0" in text else text


# ---- lists of images ----------------------------------------------------------------------------

list_path = st.sampled_from(
    ["Visible/1/a.bmp", "my images/b.bmp", "é/٣..bmp", "Visible\\1\\a.bmp", "./a\\b//c.bmp"]
)
list_space = st.sampled_from([" ", "\t", "   "])
list_number = st.integers(0, 10**9 - 1).map(str)
# A path, a space and a person id; then the same with what others may write.
list_row = st.tuples(list_path, list_space, list_number)
odd_list_row = st.tuples(
    list_path
    | st.sampled_from(["../a.bmp", "/a.bmp", "b/../../a.bmp", "..\\a.bmp", "\\a.bmp", "\x00", ""]),
    list_space | st.just(""),
    list_number | st.sampled_from(["٣", "-1", "1.5", "9999999999", ""]),
)


def list_of(
    rows: list[tuple[str, str, str]], encoding: str = "utf-8", line_end: str = "\n"
) -> bytes:
    """The content of a list of images with these rows."""
    lines = [path + space + number + line_end for path, space, number in rows]
    return encode("".join(lines), encoding)


valid_list = st.builds(list_of, st.lists(list_row, min_size=1, max_size=5), encoding, line_end)
odd_list = st.builds(list_of, st.lists(odd_list_row, min_size=1, max_size=3), any_encoding)


def read_list(folder: Path, content: bytes) -> Split | None:
    def read_split(path: str) -> Split:
        return data_manager.regdb_split(str(folder), 1, "visible", "train")

    return write_and_read(folder / "idx/train_visible_1.txt", content, read_split)


@given(st.lists(list_row, min_size=1, max_size=9), encoding, line_end)
def test_valid_lists_of_images_are_read_row_by_row(folder, rows, encoding, line_end):
    """Backslashes separate folders, too."""
    split = read_list(folder, list_of(rows, encoding, line_end))
    paths = [path.replace("\\", "/") for path, _, _ in rows]
    assert split.paths == [os.path.join(folder, path) for path in paths]
    assert split.pids.tolist() == [int(number) for _, _, number in rows]


@has_both_outcomes
@given(valid_list | odd_list | valid_list.flatmap(damaged))
def test_lists_of_images_name_files_below_their_folder(folder, content):
    """The last word of a line is the person, the others are the path."""
    split = read_list(folder, content)
    if split is None:
        return
    text = decode(content)
    assert text is not None
    lines = text.replace("\r\n", "\n").replace("\r", "\n").replace("\\", "/").split("\n")
    all_words = [line.split() for line in lines]
    all_words = [words for words in all_words if words]
    assert len(split) == len(all_words)
    for path, pid, words in zip(split.paths, split.pids, all_words, strict=True):
        assert path.removeprefix(f"{folder}/").split() == words[:-1]
        assert words[-1].isascii()
        assert pid == int(words[-1])
        assert Path(os.path.normpath(path)).is_relative_to(folder)


# ---- lists of persons ---------------------------------------------------------------------------

person_id = st.integers(0, 10**9 - 1)
odd_id = st.sampled_from(
    ["0456", "007", "", "-1", "1.5", "1;2", "\ufeff1", "1\0", "9999999999", "٣", "é"]
)
comma = st.sampled_from([",", ", ", " , ", " ", "\t", "\n", "\r\n", ",\n", "\r", "\n\n", ",,"])


@st.composite
def text_of_ids(draw: st.DrawFn, word: st.SearchStrategy[str]) -> str:
    """Some words, with commas, blanks or line ends between them, and perhaps around them."""
    text = draw(comma | st.just(""))
    for number in draw(st.lists(word, max_size=5)):
        text += number + draw(comma)
    return text


id_list = st.builds(encode, text_of_ids(person_id.map(str)), encoding)
odd_id_list = st.builds(encode, text_of_ids(person_id.map(str) | odd_id), any_encoding)


def read_ids(folder: Path, content: bytes, may_be_empty: bool = False) -> list[int] | None:
    def read_file(path: str) -> list[int]:
        return data_manager.read_ids(str(folder), "train_id.txt", may_be_empty)

    return write_and_read(folder / "train_id.txt", content, read_file)


def numbers_in(content: bytes) -> list[int] | None:
    """All numbers of a file; None if it holds anything else but commas and white space."""
    text = decode(content)
    if text is None:
        return None
    words = re.findall(r"[^,\s]+", text)
    if not all(re.fullmatch("[0123456789]{1,9}", word) for word in words):
        return None
    return [int(word) for word in words]


@given(st.lists(person_id, min_size=1), comma, comma | st.just(""), encoding)
def test_valid_lists_of_persons_are_all_their_numbers(folder, ids, comma, last, encoding):
    text = comma.join(str(number) for number in ids) + last
    assert read_ids(folder, encode(text, encoding)) == ids


@has_both_outcomes
@given(id_list | odd_id_list | id_list.filter(len).flatmap(damaged), st.booleans())
@example(b"1,2,3\n4,5", False)
@example(b"", True)
@example(b"", False)
@example(b"\xff\xfe1\0,\x002\0", False)
@example(b"\xff\xfe\0\0" + "1,2".encode("utf-32-le"), False)
@example(b"1\0,\x002\0", False)
@example(b"1,2,\xe9", False)
@example(b"\xef\xbb\xbf\xef\xbb\xbf1", False)
def test_lists_of_persons_are_numbers_or_rejected(folder, content, may_be_empty):
    """Read or rejected, and every number, as a plain reading of the rule has it."""
    expected = numbers_in(content)
    if expected == [] and not may_be_empty:
        expected = None
    assert read_ids(folder, content, may_be_empty) == expected


# ---- checkpoints --------------------------------------------------------------------------------

STATE = {
    "net": {
        "classifier1.classifier.1.weight": torch.arange(300.0).reshape(3, 100),
        "b": torch.tensor([1, 2]),
    },
    "epoch": 3,
    "cmc": [0.5, 1.0],
    "mAP": 0.25,
    "best": {"rank1": 0.5, "mAP": 0.25, "epoch": 2},
    "metrics": [{"epoch": 0, "lr": 0.01, "loss": 3.5, "HC": None}],
    "optimizer": {
        "state": {0: {"momentum_buffer": torch.ones(3, 100)}},
        "param_groups": [{"lr": 0.1, "params": [0]}],
    },
    "scaler": {},
    "config": {
        "arch": "resnet18",
        "low_dim": 100,
        "drop": 0.0,
        "num_parts": 1,
        "n_class": 3,
        "lr": 0.01,
    },
}


def save_torch(file: io.BytesIO, state: dict, is_zip: bool = True) -> None:
    torch.save(state, file, _use_new_zipfile_serialization=is_zip)


CHECKPOINT = bytes_of(save_torch, STATE)
CHECKPOINT_WITHOUT_ZIP = bytes_of(save_torch, STATE, is_zip=False)


def pickle_of(checkpoint: bytes) -> bytes:
    """The pickle within a checkpoint, which is a zip archive."""
    with zipfile.ZipFile(io.BytesIO(checkpoint)) as archive:
        return archive.read("archive/data.pkl")


def with_pickle(data: bytes) -> bytes:
    """A checkpoint with this pickle, and checksums to match."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(CHECKPOINT)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            if name.endswith("data.pkl"):
                new.writestr(name, data)
            else:
                new.writestr(name, old.read(name))
    return file.getvalue()


def test_an_undamaged_checkpoint_is_what_was_saved(folder):
    """Without this the tests of damaged ones would be worth nothing."""
    assert same_content(
        write_and_read(folder / "valid.t", CHECKPOINT, utils.load_checkpoint), STATE
    )
    content = with_pickle(pickle_of(CHECKPOINT))
    assert same_content(write_and_read(folder / "valid.t", content, utils.load_checkpoint), STATE)


@has_both_outcomes
@given(damaged(CHECKPOINT))
def test_a_damaged_checkpoint_is_rejected_or_what_was_saved(folder, content):
    """Checksums cover everything that counts."""
    state = write_and_read(folder / "damaged.t", content, utils.load_checkpoint)
    assert state is None or same_content(state, STATE)


@has_both_outcomes
@given(damaged(CHECKPOINT_WITHOUT_ZIP) | damaged(pickle_of(CHECKPOINT)).map(with_pickle))
def test_a_damaged_checkpoint_without_checksums_raises_no_other_error(folder, content):
    """A number may be another one."""
    write_and_read(folder / "forged.t", content, utils.load_checkpoint)


plain_value = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
small_tensor = st.sampled_from([torch.zeros(3), torch.tensor(1), torch.zeros(2, 0)])
any_value = st.recursive(
    plain_value | small_tensor,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@has_both_outcomes
@given(st.sampled_from(sorted(STATE)), any_value)
@example("mAP", 10**400)
@example("cmc", [10**400])
@example("cmc", torch.zeros(3, requires_grad=True))
@example("epoch", -7)
def test_a_checkpoint_with_another_value_has_the_types_that_are_promised(folder, name, value):
    content = bytes_of(save_torch, STATE | {name: value})
    state = write_and_read(folder / "other.t", content, utils.load_checkpoint)
    if state is None:
        return
    assert all(isinstance(key, str) for key in state["net"])
    assert all(type(score) is float for score in state["cmc"])
    assert type(state["mAP"]) is float
    assert isinstance(state["epoch"], int)
    assert utils.is_plain_dict(state["config"])


# ---- arrays, features, results, images ----------------------------------------------------------

IMAGES = bytes_of(np.save, np.arange(2 * 4 * 3 * 3, dtype=np.uint8).reshape(2, 4, 3, 3))
LABELS = bytes_of(np.save, np.array([0, 1]))
# Valid files which do not fit.
OTHER_IMAGES = [
    bytes_of(np.save, np.zeros((2, 4, 3, 3), np.int8)),
    bytes_of(np.save, np.zeros((2, 4, 3, 1), np.uint8)),
    bytes_of(np.save, np.zeros((3, 4, 3, 3), np.uint8)),
    bytes_of(np.save, np.zeros((2, 0, 3, 3), np.uint8)),
]
OTHER_LABELS = [
    bytes_of(np.save, np.array([0, 2])),
    bytes_of(np.save, np.array([1, 2])),
    bytes_of(np.save, np.array([-1, 0])),
    bytes_of(np.save, np.array([0.0, 1.0])),
    bytes_of(np.save, np.array([0])),
]
other_images = damaged(IMAGES) | st.sampled_from(OTHER_IMAGES)
other_labels = damaged(LABELS) | st.sampled_from(OTHER_LABELS)


@has_both_outcomes
@given(st.tuples(other_images, st.just(LABELS)) | st.tuples(st.just(IMAGES), other_labels))
@example((IMAGES, LABELS))
def test_damaged_arrays_are_rejected_or_fit_each_other(folder, files):
    """Arrays have no checksums: pixels and labels may be others, number and range may not."""
    images, labels = files
    for modality in ("rgb", "ir"):
        image_file, label_file = data_loader.array_files(str(folder), modality)
        for path, content in ((image_file, images), (label_file, labels)):
            Path(path).unlink(missing_ok=True)  # the one before may be mapped into memory
            Path(path).write_bytes(content)
    train_set = read(folder.name, data_loader.load_arrays, str(folder), None, None, (4, 3))
    if train_set is None:
        return
    persons = set(range(train_set.n_class))
    assert persons
    for images, labels in (
        (train_set.visible, train_set.visible_labels),
        (train_set.thermal, train_set.thermal_labels),
    ):
        assert images.dtype == np.uint8
        assert images.shape[0] == len(labels)
        assert images.shape[3] == 3
        assert images.size > 0
        assert labels.dtype == np.int64
        assert set(labels) == persons


@has_both_outcomes
@given(data=st.data())
def test_damaged_features_are_rejected_or_what_was_saved(folder, data):
    valid_file = features_file(folder / "valid.npz", network='{"trial": 3}')
    content = data.draw(damaged(valid_file.read_bytes()))
    loaded = write_and_read(folder / "damaged.npz", content, load_features, DATASETS["sysu"])
    if loaded is not None:
        images, features, network = loaded
        valid_images, valid_features, valid_network = load_features(
            str(valid_file), DATASETS["sysu"]
        )
        assert same_content(vars(images), vars(valid_images))
        assert same_content(features, valid_features)
        assert network == valid_network


@has_both_outcomes
@given(damaged(result().encode()))
def test_damaged_results_raise_no_other_error(folder, content):
    """A number may be another one."""
    write_and_read(folder / "damaged.json", content, read_results)


METRICS = b"""\
{"epoch": 0, "lr": 0.01, "loss": 3.5, "CE": 2.0, "HC": null, "accuracy": 0.1}
{"epoch": 1, "lr": 0.01, "loss": 3.0, "CE": 1.5, "HC": 2.5, "accuracy": 0.2, "fc_rank1": 0.5}
"""


@has_both_outcomes
@given(damaged(METRICS))
def test_damaged_metrics_raise_no_other_error(folder, content):
    """A number may be another one."""
    write_and_read(folder / "damaged.jsonl", content, read_metrics)


PIXELS = np.random.default_rng(0).integers(0, 256, (24, 12, 3), dtype=np.uint8)


def damaged_image(kind: str) -> st.SearchStrategy[bytes]:
    """With a tag of EXIF: turned by a quarter. BMP holds none."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return damaged(bytes_of(Image.fromarray(PIXELS).save, kind, exif=exif))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@has_both_outcomes
@given(st.sampled_from(["JPEG", "PNG", "BMP", "TIFF", "WEBP"]).flatmap(damaged_image))
def test_damaged_images_are_rejected_or_have_the_size_that_is_asked_for(folder, content):
    image = write_and_read(folder / "image.jpg", content, data_loader.read_image, (8, 4))
    assert image is None or image.shape == (8, 4, 3)
