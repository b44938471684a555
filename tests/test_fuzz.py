"""Damaged and made-up files: refused with an OSError that names the file, or read for what they are; nothing else.

A longer search, with other examples each time: pytest tests/test_fuzz.py --hypothesis-profile long
"""

import contextlib
import io
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import features_file, result
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import data_loader
import data_manager
import utils
from data_manager import DATASETS
from tools.killtest import same
from tools.score import load_features
from tools.visualize import read_results


@st.composite
def damaged(draw, data: bytes) -> bytes:
    """``data`` with a bit flipped, cut off, or with bytes put in or taken out."""
    place = draw(st.integers(0, len(data) - 1))
    flipped = bytes([data[place] ^ 1 << draw(st.integers(0, 7))])
    new = draw(st.sampled_from([flipped, flipped, b""]) | st.binary(max_size=9))
    return data[:place] + new + data[place + draw(st.sampled_from([len(new), 1, 1, 99, len(data)])) :]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder whose files each example writes anew."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "idx").mkdir()
    return folder


def read(file: Path, data: bytes, reader, *args):
    """What ``reader`` makes of a file with this content; None: an OSError that names it."""
    file.write_bytes(data)
    try:
        return reader(str(file), *args)
    except OSError as error:
        assert file.name in str(error)
        return None


def bytes_of(save, *args, **options) -> bytes:
    """What ``save(file, ...)`` writes."""
    file = io.BytesIO()
    save(file, *args, **options)
    return file.getvalue()


pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")


LIKELY = ("Visible/1/a.bmp", " ", "0", "12", "\n", "\t", "..", "/", "\\", "\r", "\x00", "٣", "é")  # in a list of images


@given(st.lists(st.sampled_from(LIKELY).map(str.encode) | st.binary(max_size=3), max_size=40).map(b"".join))
def test_index_files(place, data):
    root = str(place)
    file = place / "idx/train_visible_1.txt"
    split = read(file, data, lambda _: data_manager.regdb_split(root, 1, "visible", "train"))
    if split:
        text = data.decode(errors="replace")
        lines = [re.fullmatch(r"\s*(\S.*)\s([0-9]+)\s*", line) for line in text.splitlines() if line.strip()]
        assert split.paths == [os.path.join(place, line[1].strip()) for line in lines]
        assert split.pids.tolist() == [int(line[2]) for line in lines]
        assert all(Path(os.path.normpath(path)).is_relative_to(place) for path in split.paths)


STATE = {
    "net": {"classifier1.classifier.1.weight": torch.arange(300.0).reshape(3, 100), "b": torch.tensor([1, 2])},
    "epoch": 3,
    "cmc": [0.5, 1.0],
    "mAP": 0.25,
    "config": {"arch": "resnet18", "low_dim": 100, "drop": 0.0, "n_class": 3, "lr": 0.01},
    "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3, 100)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
}
SAVED = bytes_of(lambda file: torch.save(STATE, file))


@given(damaged(SAVED))
def test_damaged_checkpoints(place, data):
    """Checksums cover all that counts, so that whatever is not refused is what was saved."""
    state = read(place / "damaged.t", data, utils.load_checkpoint)
    assert state is None or same(state, STATE)


def forged(data: bytes) -> bytes:
    """A checkpoint with this pickle, and checksums to match."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(SAVED)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            new.writestr(name, data if name.endswith("data.pkl") else old.read(name))
    return file.getvalue()


OLD = bytes_of(lambda file: torch.save(STATE, file, _use_new_zipfile_serialization=False))


@given(damaged(OLD) | damaged(zipfile.ZipFile(io.BytesIO(SAVED)).read("archive/data.pkl")).map(forged))
def test_damaged_checkpoints_without_checksums(place, data):
    """Of the old format, or forged: a number may be another one, but nothing else happens."""
    read(place / "old.t", data, utils.load_checkpoint)


ARRAY = np.arange(2 * 4 * 3 * 3, dtype=np.uint8).reshape(2, 4, 3, 3)


@given(damaged(bytes_of(np.save, ARRAY)), damaged(bytes_of(np.save, np.array([0, 1]))))
def test_damaged_arrays(place, images, labels):
    """Arrays have no checksums: pixels and labels may be others, their number and range may not."""
    files = [Path(file) for modality in ("rgb", "ir") for file in data_loader.array_files(str(place), modality)]
    for file, content in zip(files, (images, labels) * 2, strict=True):
        file.unlink(missing_ok=True)  # the one before may be mapped into memory
        file.write_bytes(content)
    with contextlib.suppress(OSError):
        data = data_loader.load_arrays(str(place))
        assert data.visible.dtype == np.uint8 and data.visible.shape[::3] == (len(data.visible_labels), 3)
        assert {*data.visible_labels} == {*range(data.n_class)}


@given(data=st.data())
def test_damaged_features(place, data):
    whole = features_file(place / "whole.npz", network='{"trial": 3}')
    found = read(place / "f.npz", data.draw(damaged(whole.read_bytes())), load_features, DATASETS["sysu"])
    if found:
        images, arrays, network = load_features(str(whole), DATASETS["sysu"])
        assert same([*images], [*found[0]]) and same([arrays, network], [*found[1:]])


@given(damaged(result().encode()))
def test_damaged_results(place, data):
    """A number may be another one."""
    read(place / "r.json", data, read_results)


PIXELS = np.random.default_rng(0).integers(0, 256, (24, 12, 3), dtype=np.uint8)


@given(
    st.sampled_from(["JPEG", "PNG", "BMP"]).flatmap(lambda kind: damaged(bytes_of(Image.fromarray(PIXELS).save, kind)))
)
def test_damaged_images(place, data):
    image = read(place / "image.jpg", data, data_loader.read_image, (8, 4))
    assert image is None or image.shape == (8, 4, 3)
