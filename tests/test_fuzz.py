"""Damaged and made-up files: refused with the one-line error of the scripts, or read for what they are; nothing else.

A longer search, with other examples each time: pytest tests/test_fuzz.py --hypothesis-profile long
"""

import io
import json
import os
import random
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_bad_input import result
from test_score import features_file

import data_loader
import data_manager
import utils
from tools.report import read_results, table
from tools.score import load_features


@st.composite
def damaged(draw, data: bytes, within: slice = slice(None)) -> bytes:
    """``data`` with some bits flipped, cut off, or with bytes put in or taken out."""
    start, stop, _ = within.indices(len(data))
    place, kind = draw(st.integers(start, stop - 1)), draw(st.sampled_from(["flip", "flip", "cut", "insert", "remove"]))
    if kind == "cut":
        return data[:place]
    if kind == "insert":
        return data[:place] + draw(st.binary(min_size=1, max_size=9)) + data[place:]
    if kind == "remove":
        return data[:place] + data[place + draw(st.integers(1, 99)) :]
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        changed[place] ^= 1 << draw(st.integers(0, 7))
        place = draw(st.integers(start, stop - 1))
    return bytes(changed)


def words(*likely: str) -> st.SearchStrategy[bytes]:
    """Text made of likely pieces and of anything else, as bytes."""
    return st.lists(st.sampled_from(likely).map(str.encode) | st.binary(max_size=3), max_size=40).map(b"".join)


# ---- lists ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder whose files each example writes anew."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "idx").mkdir()
    (folder / "exp").mkdir()
    return folder


@given(words("Visible/1/a.bmp", " ", "0", "12", "\n", "\t", "..", "/", "\\", "\r", "\x00", "٣", "é"))
def test_index_files(place, data):
    (place / "idx/train_visible_1.txt").write_bytes(data)
    try:
        split = data_manager.regdb_split(str(place), 1, "visible", "train")
    except OSError as error:
        assert "train_visible_1.txt" in str(error)
        return
    lines = [re.fullmatch(r"\s*(\S.*)\s([0-9]+)\s*", line) for line in data.decode().splitlines() if line.strip()]
    assert split.paths == [os.path.join(place, line[1].strip()) for line in lines]
    assert split.pids.tolist() == [int(line[2]) for line in lines]
    assert all(Path(os.path.normpath(path)).is_relative_to(place) for path in split.paths)


@given(words("1", "23", ",", ", ", "\n", "-", " ", "٣", "0", "999999999", "1.5"))
def test_id_files(place, data):
    (place / "exp/test_id.txt").write_bytes(data)
    try:
        ids = data_manager._read_ids(str(place), "test")
    except OSError as error:
        assert "test_id.txt" in str(error)
        return
    first_line = data.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n")[0]
    assert ids == [int(word) for word in first_line.split(",")] and min(ids) >= 0


# ---- checkpoints ----------------------------------------------------------------------------------------------------


STATE = {
    "net": {"a.weight": torch.arange(300.0).reshape(3, 100), "b": torch.tensor([1, 2])},
    "epoch": 3,
    "cmc": [0.5, 1.0],
    "mAP": 0.25,
    "config": {"lr": 0.01, "arch": "resnet18", "img_h": 96},
    "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3, 100)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
}


def saved(**options) -> bytes:
    file = io.BytesIO()
    torch.save(STATE, file, **options)
    return file.getvalue()


def equal(a, b) -> bool:
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and [*a] == [*b] and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


@given(damaged(saved()))
def test_damaged_checkpoints(place, data):
    """Checksums cover all that counts, so that whatever is not refused is what was saved."""
    (place / "damaged.t").write_bytes(data)
    try:
        state = utils.load_checkpoint(str(place / "damaged.t"))
    except OSError as error:
        assert "damaged.t" in str(error)
        return
    assert equal(state, STATE)


def test_checkpoints_cut_off_anywhere(place):
    data = saved()
    for end in random.Random(0).sample(range(len(data)), 300):
        (place / "cut.t").write_bytes(data[:end])
        with pytest.raises(OSError, match=r"cut\.t"):
            utils.load_checkpoint(str(place / "cut.t"))


@given(damaged(saved(_use_new_zipfile_serialization=False)))
def test_damaged_checkpoints_of_the_old_format(place, data):
    """These have no checksums: a number may be another one, but nothing else happens."""
    (place / "old.t").write_bytes(data)
    try:
        state = utils.load_checkpoint(str(place / "old.t"))
    except OSError as error:
        assert "old.t" in str(error)
        return
    assert all(torch.is_tensor(value) for value in state["net"].values())


@given(damaged(zipfile.ZipFile(io.BytesIO(saved())).read("archive/data.pkl")))
def test_forged_checkpoints(place, data):
    """Pickles of whatever content, with checksums to match."""
    with zipfile.ZipFile(io.BytesIO(saved())) as old, zipfile.ZipFile(place / "forged.t", "w") as new:
        for name in old.namelist():
            new.writestr(name, data if name.endswith("data.pkl") else old.read(name))
    try:
        state = utils.load_checkpoint(str(place / "forged.t"))
    except OSError as error:
        assert "forged.t" in str(error)
        return
    for value in state["net"].values():
        value.clone()  # whatever its shape, it lies within its memory


# ---- arrays and features --------------------------------------------------------------------------------------------


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


ARRAY = np.arange(2 * 4 * 3 * 3, dtype=np.uint8).reshape(2, 4, 3, 3)


@given(damaged(npy(ARRAY), slice(0, 128)))
def test_damaged_headers_of_arrays(place, data):
    (place / "a.npy").write_bytes(data)
    try:
        array = data_loader.open_array(str(place / "a.npy"))
    except OSError as error:
        assert "a.npy" in str(error)
        return
    assert array.nbytes == ARRAY.nbytes and array.tobytes() in (ARRAY.tobytes(), ARRAY.tobytes(order="F"))


@given(damaged(npy(ARRAY)), damaged(npy(np.array([0, 1]))))
def test_damaged_arrays(place, images, labels):
    """Arrays have no checksums: pixels and labels may be others, their number and range may not."""
    for modality in ("rgb", "ir"):
        for path, data in zip(data_loader.sysu_arrays(str(place), modality), (images, labels), strict=True):
            Path(path).write_bytes(data)
    try:
        data = data_loader.load_sysu(str(place))
    except OSError as error:
        assert "pre_process_sysu.py" in str(error)
        return
    assert data.visible.ndim == 4 and data.visible.dtype == np.uint8 and data.visible.shape[3] == 3
    assert len(data.visible) == len(data.visible_labels) and {*data.visible_labels} == {*range(data.n_class)}


def features(folder: Path) -> bytes:
    return features_file(folder / "whole.npz", network=json.dumps({"trial": 3})).read_bytes()


@given(data=st.data())
def test_damaged_features(place, data):
    (place / "f.npz").write_bytes(data.draw(damaged(features(place))))
    expected = load_features(str(place / "whole.npz"), "sysu")
    try:
        images, arrays, network = load_features(str(place / "f.npz"), "sysu")
    except OSError as error:
        assert "f.npz" in str(error)
        return
    assert images.paths == expected[0].paths and np.array_equal(arrays["fc"], expected[1]["fc"])
    assert network == expected[2]


@given(damaged(result().encode()))
def test_damaged_results(place, data):
    (place / "r.json").write_bytes(data)
    try:
        found = read_results(str(place / "r.json"))
    except OSError as error:
        assert "r.json" in str(error)
        return
    for feature in {feature for _, feature in found["rows"]}:
        assert table({"label": found}, feature)


@settings(max_examples=settings.default.max_examples // 5)  # each starts a process
@given(data=st.data())
def test_damaged_permutations(place, data):
    """Compressed, as the official file is, which has checksums for that."""
    cells = np.empty((6, 1), dtype=object)
    for camera in range(6):
        cells[camera, 0] = np.empty((3, 1), dtype=object)
        for person in range(3):
            cells[camera, 0][person, 0] = np.tile(np.arange(1, 5), (10, 1))
    file = io.BytesIO()
    scipy.io.savemat(file, {"rand_perm_cam": cells}, do_compression=True)
    (place / "p.mat").write_bytes(data.draw(damaged(file.getvalue())))
    pids, camids = np.repeat([1, 2, 3], 24), np.tile(np.repeat(np.arange(1, 7), 4), 3)
    images = data_manager.Split([f"{i:02d}" for i in range(72)], pids, camids)
    try:
        searches = data_manager.sysu_searches(images, rand_perm=data_manager.read_rand_perm(str(place / "p.mat")))
    except (OSError, ValueError) as error:
        assert re.search("--rand_perm", str(error))
        return
    assert all(len(search.gallery) == 12 for search in searches)


# ---- images ---------------------------------------------------------------------------------------------------------


def picture(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 12, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


@given(st.sampled_from(["JPEG", "PNG", "BMP"]).flatmap(lambda kind: damaged(picture(kind))))
def test_damaged_images(place, data):
    (place / "image.jpg").write_bytes(data)
    try:
        image = data_loader.read_image(str(place / "image.jpg"), (8, 4))
    except OSError as error:
        assert "image.jpg" in str(error)
        return
    assert image.shape == (8, 4, 3)
