"""Damaged and untrusted files: rejected with an InputError that names them, or read as they are.

A longer search, with other examples each time:

    pytest tests/test_fuzz.py --hypothesis-profile long
"""

import contextlib
import io
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import features_file, result, same_content
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

import data_loader
import data_manager
import utils
from data_manager import DATASETS, Split
from tools.results_files import read_metrics, read_results
from tools.score import load_features
from utils import InputError

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """``content`` with a bit flipped, cut off, or with bytes inserted or removed."""
    position = draw(st.integers(0, len(content) - 1))
    bit = draw(st.integers(0, 7))
    flipped = bytes([content[position] ^ 1 << bit])
    inserted = draw(st.sampled_from([flipped, flipped, b""]) | st.binary(max_size=9))
    n_removed = draw(st.sampled_from([len(inserted), 1, 1, 99, len(content)]))
    return content[:position] + inserted + content[position + n_removed :]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder whose files each example writes anew."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "idx").mkdir()
    return folder


def read(path: Path, content: bytes, reader: Callable, *args) -> object:
    """What ``reader`` makes of a file with this content; None: an InputError that names it."""
    path.write_bytes(content)
    try:
        return reader(str(path), *args)
    except InputError as error:
        assert path.name in str(error)
        assert len(str(error)) < 1000
        return None


def bytes_of(save: Callable, *args, **options) -> bytes:
    """What ``save(file, ...)`` writes."""
    file = io.BytesIO()
    save(file, *args, **options)
    return file.getvalue()


# ---- lists and ids ------------------------------------------------------------------------------

# Parts of a list of images, and of what others may write into it.
LIST_PARTS = (
    "Visible/1/a.bmp", " ", "0", "12", "\n", "\t", "..", "/", "\\", "\r", "\x00", "٣", "é",
)  # fmt: skip
list_part = st.sampled_from([part.encode() for part in LIST_PARTS]) | st.binary(max_size=3)


def lines_of(content: bytes) -> list[str]:
    """The lines of a file that are not empty."""
    return [line for line in content.decode(errors="replace").splitlines() if line.strip()]


@given(st.lists(list_part, max_size=40).map(b"".join))
def test_lists_of_images_name_files_below_their_folder(folder, content):
    def read_list(path: str) -> Split:
        return data_manager.regdb_split(str(folder), 1, "visible", "train")

    split = read(folder / "idx/train_visible_1.txt", content, read_list)
    if split is None:
        return
    rows = [re.fullmatch(r"\s*(\S.*)\s([0-9]+)\s*", line) for line in lines_of(content)]
    assert split.paths == [os.path.join(folder, row[1].strip()) for row in rows]
    assert split.pids.tolist() == [int(row[2]) for row in rows]
    for path in split.paths:
        assert Path(os.path.normpath(path)).is_relative_to(folder)


ID_PARTS = ("1", "23", "0456", ",", ",", " ", "-", "\n", "\r\n", "\ufeff", "9999999999", "٣")
id_part = st.sampled_from([part.encode() for part in ID_PARTS]) | st.binary(max_size=2)


@given(st.lists(id_part, max_size=20).map(b"".join))
def test_lists_of_persons_are_the_numbers_of_their_first_line(folder, content):
    def read_ids(path: str) -> list[int]:
        return data_manager.read_ids(str(folder), "train_id.txt")

    ids = read(folder / "train_id.txt", content, read_ids)
    if ids is not None:
        text = (folder / "train_id.txt").read_text(errors="replace")
        assert ids == [int(number) for number in re.findall("[0-9]+", text.split("\n")[0])]
        assert max(ids) < 10**9


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
    assert same_content(read(folder / "valid.t", CHECKPOINT, utils.load_checkpoint), STATE)
    content = with_pickle(pickle_of(CHECKPOINT))
    assert same_content(read(folder / "valid.t", content, utils.load_checkpoint), STATE)


@given(damaged(CHECKPOINT))
def test_a_damaged_checkpoint_is_rejected_or_what_was_saved(folder, content):
    """Checksums cover everything that counts."""
    state = read(folder / "damaged.t", content, utils.load_checkpoint)
    assert state is None or same_content(state, STATE)


@given(damaged(CHECKPOINT_WITHOUT_ZIP) | damaged(pickle_of(CHECKPOINT)).map(with_pickle))
def test_a_damaged_checkpoint_without_checksums_raises_no_other_error(folder, content):
    """A number may be another one."""
    read(folder / "forged.t", content, utils.load_checkpoint)


plain_value = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
small_tensor = st.sampled_from([torch.zeros(3), torch.tensor(1), torch.zeros(2, 0)])
any_value = st.recursive(
    plain_value | small_tensor,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(st.sampled_from(sorted(STATE)), any_value)
@example("mAP", 10**400)
@example("cmc", [10**400])
@example("cmc", torch.zeros(3, requires_grad=True))
@example("epoch", -7)
def test_a_checkpoint_with_another_value_has_the_types_that_are_promised(folder, name, value):
    content = bytes_of(save_torch, STATE | {name: value})
    state = read(folder / "other.t", content, utils.load_checkpoint)
    if state is None:
        return
    assert all(isinstance(key, str) for key in state["net"])
    assert all(type(score) is float for score in state["cmc"])
    assert type(state["mAP"]) is float
    assert isinstance(state["epoch"], int)
    assert utils.is_plain_dict(state["config"])


# ---- arrays, features, results, images ----------------------------------------------------------

ARRAY = np.arange(2 * 4 * 3 * 3, dtype=np.uint8).reshape(2, 4, 3, 3)


@given(damaged(bytes_of(np.save, ARRAY)), damaged(bytes_of(np.save, np.array([0, 1]))))
def test_damaged_arrays_are_rejected_or_fit_each_other(folder, images, labels):
    """Arrays have no checksums: pixels and labels may be others, number and range may not."""
    for modality in ("rgb", "ir"):
        image_file, label_file = data_loader.array_files(str(folder), modality)
        for path, content in ((image_file, images), (label_file, labels)):
            Path(path).unlink(missing_ok=True)  # the one before may be mapped into memory
            Path(path).write_bytes(content)
    with contextlib.suppress(InputError):
        train_set = data_loader.load_arrays(str(folder))
        assert train_set.visible.dtype == np.uint8
        assert train_set.visible.shape[0] == len(train_set.visible_labels)
        assert train_set.visible.shape[3] == 3
        assert set(train_set.visible_labels) == set(range(train_set.n_class))


@given(data=st.data())
def test_damaged_features_are_rejected_or_what_was_saved(folder, data):
    valid_file = features_file(folder / "valid.npz", network='{"trial": 3}')
    content = data.draw(damaged(valid_file.read_bytes()))
    loaded = read(folder / "damaged.npz", content, load_features, DATASETS["sysu"])
    if loaded is not None:
        images, features, network = loaded
        valid_images, valid_features, valid_network = load_features(
            str(valid_file), DATASETS["sysu"]
        )
        assert same_content(vars(images), vars(valid_images))
        assert same_content(features, valid_features)
        assert network == valid_network


@given(damaged(result().encode()))
def test_damaged_results_raise_no_other_error(folder, content):
    """A number may be another one."""
    read(folder / "damaged.json", content, read_results)


METRICS = b"""\
{"epoch": 0, "lr": 0.01, "loss": 3.5, "CE": 2.0, "HC": null, "accuracy": 0.1}
{"epoch": 1, "lr": 0.01, "loss": 3.0, "CE": 1.5, "HC": 2.5, "accuracy": 0.2, "fc_rank1": 0.5}
"""


@given(damaged(METRICS))
def test_damaged_metrics_raise_no_other_error(folder, content):
    """A number may be another one."""
    read(folder / "damaged.jsonl", content, read_metrics)


PIXELS = np.random.default_rng(0).integers(0, 256, (24, 12, 3), dtype=np.uint8)


def damaged_image(kind: str) -> st.SearchStrategy[bytes]:
    return damaged(bytes_of(Image.fromarray(PIXELS).save, kind))


@given(st.sampled_from(["JPEG", "PNG", "BMP"]).flatmap(damaged_image))
def test_damaged_images_are_rejected_or_have_the_size_that_is_asked_for(folder, content):
    image = read(folder / "image.jpg", content, data_loader.read_image, (8, 4))
    assert image is None or image.shape == (8, 4, 3)
