"""The trees of synthetic people: their sizes, their lists, and what difficulty means."""

from pathlib import Path

import numpy as np
import pytest
from conftest import files_of
from PIL import Image

import data_manager
from tools import make_synthetic
from tools.make_synthetic import llcm_tree, make_tree, real_sysu, small_sysu, sysu_tree
from tools.synthetic_people import CAMERAS, DIFFICULTIES, VERSION, draw_image

SYSU_VISIBLE = {1, 2, 4, 5}
SYSU_INFRARED = {3, 6}


def content_of(tree: Path) -> dict[Path, bytes]:
    """Relative path -> bytes of each file."""
    return {file.relative_to(tree): file.read_bytes() for file in files_of(tree)}


def test_a_tree_is_the_same_byte_for_byte(tmp_path):
    make_tree("sysu", tmp_path / "one worker", ids=5, images=2, seed=4, workers=1)
    make_tree("sysu", tmp_path / "two workers", ids=5, images=2, seed=4, workers=2)
    make_tree("sysu", tmp_path / "other seed", ids=5, images=2, seed=5, workers=1)
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
    splits, counts = small_sysu(12, 9, seed=2)
    tree = sysu_tree(12, 9, seed=2)
    n_planned = sum(sum(counts_of_person.values()) for counts_of_person in counts.values())
    assert len(tree.images) == n_planned
    for path, key in tree.images.items():
        assert path == f"cam{key.camera_id}/{key.pid:04d}/{key.index:04d}.jpg"
        assert key.index <= counts[key.pid][key.camera_id]
    for split in ("train", "val", "test"):
        listed = tree.texts[f"exp/{split}_id.txt"].split(",")
        assert [int(pid) for pid in listed] == sorted(splits[split])


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


# ---- the drawing ---------------------------------------------------------------------------------

# (difficulty, camera): grey levels of one image, shrunk to 8 x 8 pixels, in hexadecimal digits. The
# cameras are three of SYSU-MM01, both of RegDB and one of each modality of LLCM.
THUMBNAILS_VERSION = 4
THUMBNAILS = {
    ("easy", 1): "71727373727676717273725c71747371704f7873675c69735a44635c66564873"
    "5f5e4b40445c5a695758393c3c51585757583e453e52575655573f4c44505655",
    ("easy", 3): "5962686b6b69635a626c718983716a62686f7c968e787268656e75939474726c"
    "647378737e7d766a61696d6677726d615b6268627168635a535b605c63605b53",
    ("easy", 6): "101416181e1f1c181718185c8e1d201c1a227a9fa78343201c3e75afb17f6923"
    "1a2d44bbad613f1d1a1c21b3974d1d1a171b1d9177381b1714181a5b49261814",
    ("easy", 7): "8d818a6e686673868d808b67657985858b6e697b665f80818c5c515a664a7180"
    "80706345475a777e6f7061343c6c71706f70693d3f7070706e6f6f444770706f",
    ("easy", 8): "202021282c2c2c271f212142792d2a262a2343659f53332629236c8286755326"
    "2a24587f8b74482728232975806128262323236f5d5a24232324256342562323",
    ("easy", 13): "8b8c8e8e8e8d8c8b8f91926f6f8f8e8c917462625263748a92475c51525d4d89"
    "8c7563343a65718283856231347385828282743b3583848380837b514b838281",
    ("easy", 24): "626c737877766e62676d76817d7f7565687072a4a38a776b767b6fa19f8c7b79"
    "767e83868a847f76737d83727c817d736d767d71787c766d636d736b70726d63",
    ("hard", 1): "656972736978705a676b6f60677c7257696d6968627b7f6a6b3d52504c77696a"
    "5d3d5343465d605b3434332a31565f343334342a31545d333133342832525930",
    ("hard", 3): "708792989a948771839aa7abada4968490afccbfc1bbad9264ae7ea8b3c6b89b"
    "6fa1a89bbdc9b9977de1fccfb8b3a6826eb6f8ac918a7e6c5d81be817f797060",
    ("hard", 6): "0e151d2415120d101318252924231a121530a04829271d174f5b576984251c19"
    "5b5680717e241c1824394b452d1c1c17152c3b391a1817121023262c1617140f",
    ("hard", 7): "957bbe8e90d1bdb3c890d39a7db7d6cfc88dd184a9a6bcced2a1ba73888f6598"
    "908285776e70748e8d9091794b578d8d8e90948a6971928d8e92959594949290",
    ("hard", 8): "31303536383437342224272d64513833231d2b50696253362423436b464d7530"
    "2b3134646d6a632f2a31263546492d2a26301c2f48422d282828202d52402827",
    ("hard", 13): "82858b8180888681858c8e6f6c8c8a85874e504f4b4960887b37624a455c4c7c"
    "71754b2a306f71747077532b3977707270735d2a4f766f706a6e69536572696c",
    ("hard", 24): "324850524b4749413b526b674a474b4e4b456858535e605d584663645d5e6254"
    "5566a3af886e6658545f87a0816a5e564754657c6b5e544c3b444e51544e483a",
}


@pytest.mark.parametrize(("difficulty", "camera_id"), THUMBNAILS)
def test_the_drawing_is_that_of_its_version(difficulty, camera_id):
    """Another drawing needs another VERSION, and thumbnails of its own here."""
    assert VERSION == THUMBNAILS_VERSION
    image = draw_image(0, 15, camera_id, 1, DIFFICULTIES[difficulty])
    thumbnail = image.convert("L").resize((8, 8), Image.Resampling.BOX)
    levels = np.asarray(thumbnail, dtype=int).flatten()
    expected = list(bytes.fromhex(THUMBNAILS[difficulty, camera_id]))
    np.testing.assert_allclose(levels, expected, rtol=0, atol=2)


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
    def interrupt(saved_images, **flags):
        next(saved_images)
        raise KeyboardInterrupt

    monkeypatch.setattr(make_synthetic, "tqdm", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_tree("sysu", tmp_path / "tree", ids=30, images=9, workers=2)
    assert not (tmp_path / "tree").exists()
    n_planned = len(sysu_tree(30, 9, seed=0).images)
    assert len(list(tmp_path.rglob("*.jpg"))) < n_planned / 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ids", 3], "--ids: 3 is not a whole number from 5 to 9999"),
        (["--ids", 10000], "--ids: 10000 is not a whole number from 5 to 9999"),
        (["--images", 1], "--images: 1 is not a whole number from 2 to 999"),
        (["--images", 1000], "--images: 1000 is not a whole number from 2 to 999"),
        (["--ids", "many"], "--ids"),
        (["--seed", -1], "--seed"),
        (["--workers", 0], "--workers"),
        (["--difficulty", "none"], "--difficulty"),
        (["--ids", 5, "--full"], "--full: not allowed with argument --ids"),
        (["--full", "--ids", 130], "--ids: not allowed with argument --full"),
    ],
)
def test_wrong_flags(error_of, tmp_path, flags, message):
    assert message in error_of(*COMMAND, "--out", tmp_path / "tree", *flags)
