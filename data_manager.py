"""Which image, person and camera is train, query or gallery: lists read off the disk, no pixels and no torch.

SYSU-MM01 (491 persons, 30,071 visible and 15,792 infrared images)::

    cam1 .. cam6/<person, 4 digits>/<image, 4 digits>.jpg     cameras 1, 2, 4, 5 visible, 3 and 6 infrared
    exp/train_id.txt, val_id.txt, test_id.txt                 person ids, comma separated, on the first line

RegDB (412 persons, 10 visible and 10 thermal images each; ten trials)::

    idx/{train,test}_{visible,thermal}_<trial>.txt            one image a line: <relative path> <label>

Whatever is missing or malformed on disk is an ``OSError`` whose one-line message names the file and the remedy.
"""

import logging
import os
import random
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import scipy.io

VISIBLE_CAMERAS, INFRARED_CAMERAS = (1, 2, 4, 5), (3, 6)
GALLERY_CAMERAS = {"all": VISIBLE_CAMERAS, "indoor": (1, 2)}
MULTI_SHOT = 10  # gallery images per person and camera in the multi-shot setting
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")

log = logging.getLogger(__name__)


class Split(NamedTuple):
    """Parallel lists, an entry per image: file path, person id and camera number (both int64 arrays)."""

    paths: list[str]
    pids: np.ndarray
    camids: np.ndarray


def sysu_train(root: str) -> tuple[Split, Split]:
    """The visible and the infrared training images of SYSU-MM01: persons ascending, cameras ascending, names sorted.

    Persons of ``train_id.txt`` and ``val_id.txt`` (395 of them in the real dataset) who were seen in one modality
    only are left out, with a warning (FIDELITY 25).
    """
    pids = sorted({*_read_ids(root, "train"), *_read_ids(root, "val")})
    visible = _split((path, pid, cam) for pid in pids for cam in VISIBLE_CAMERAS for path in _images(root, cam, pid))
    thermal = _split((path, pid, cam) for pid in pids for cam in INFRARED_CAMERAS for path in _images(root, cam, pid))
    return paired(visible, thermal, root)


def sysu_query(root: str, mode: str = "all") -> Split:
    """All infrared images of the test persons: 3,803 in the real dataset, the same for both search modes."""
    _check_mode(mode)
    pids = sorted(set(_read_ids(root, "test")))
    query = _split((path, pid, cam) for pid in pids for cam in INFRARED_CAMERAS for path in _images(root, cam, pid))
    return _not_empty(query, root, "test persons have no infrared images in cam3 and cam6")


def sysu_gallery(
    root: str, mode: str = "all", gall_mode: str = "single", trial: int = 0, rand_perm: np.ndarray | None = None
) -> Split:
    """Visible test images, one (``single``) or up to ten (``multi``) per person and camera, another draw each trial.

    ``mode`` "all" searches the cameras 1, 2, 4, 5 (301 or 3,010 images in the real dataset), "indoor" 1 and 2 (112 or
    1,120). Without ``rand_perm``, trial t draws with seed t (FIDELITY 11): persons ascending and inside a person
    cameras ascending, single-shot with Python's generator as the field's baseline does, multi-shot with numpy's.
    With ``rand_perm`` (`read_rand_perm`) the picks are those of the official evaluation, whose order is cameras
    ascending and inside a camera persons ascending; the trials are 0 to 9.
    """
    _check_mode(mode)
    if gall_mode not in ("single", "multi"):
        raise ValueError(f"gall_mode is {gall_mode!r}: give 'single' or 'multi'")
    shots = 1 if gall_mode == "single" else MULTI_SHOT
    pids = sorted(set(_read_ids(root, "test")))
    if rand_perm is None:
        places = [(pid, cam) for pid in pids for cam in GALLERY_CAMERAS[mode]]
    else:
        places = [(pid, cam) for cam in GALLERY_CAMERAS[mode] for pid in pids]
    choose, draw = random.Random(trial).choice, np.random.RandomState(trial).choice
    rows, short = [], 0
    for pid, cam in places:
        files = _images(root, cam, pid)
        if not files:
            continue
        short += len(files) < shots
        if rand_perm is not None:
            picks = _official_picks(files, rand_perm, pid, cam, trial, shots)
        elif gall_mode == "single":
            picks = [choose(files)]
        else:
            picks = [str(f) for f in draw(files, min(shots, len(files)), replace=False)]
        rows += [(path, pid, cam) for path in picks]
    if short and trial == 0:  # said for the first trial only: it holds for all
        log.warning(
            "multi-shot %s search: %d (person, camera) pairs have fewer than ten images; all are used", mode, short
        )
    return _not_empty(_split(rows), root, f"test persons have no images in cameras {GALLERY_CAMERAS[mode]}")


def read_rand_perm(path: str) -> np.ndarray:
    """The ``rand_perm_cam.mat`` of SYSU-MM01's authors: [camera - 1, 0][person - 1, 0] is a (10, n) permutation.

    Row t orders the n images of that person in that camera for trial t; its numbers start at 1.
    """
    try:
        cells = scipy.io.loadmat(path)["rand_perm_cam"]
        if cells.shape == (6, 1) and all(camera.ndim == 2 and camera.shape[1] == 1 for camera in cells[:, 0]):
            return cells
    except FileNotFoundError:
        raise FileNotFoundError(f"--rand_perm {path} not found: it comes with SYSU-MM01's evaluation code") from None
    except Exception:  # scipy raises whatever the damage leads to
        pass
    raise OSError(f"--rand_perm {path} is not the rand_perm_cam.mat of SYSU-MM01's evaluation code")


def _official_picks(files: list[str], rand_perm: np.ndarray, pid: int, cam: int, trial: int, shots: int) -> list[str]:
    persons = rand_perm[cam - 1, 0]
    order = persons[pid - 1, 0] if pid <= len(persons) else np.empty((0, 0))
    if order.shape != (10, len(files)) or sorted(order[trial]) != [*range(1, len(files) + 1)]:
        raise OSError(
            f"{os.path.dirname(files[0])} has {len(files)} images, but --rand_perm orders {order.shape[1]} there: "
            "it belongs to another tree"
        )
    return [files[number - 1] for number in order[trial][:shots].tolist()]


def regdb_split(root: str, trial: int, modality: str, subset: str) -> Split:
    """The images that ``idx/<subset>_<modality>_<trial>.txt`` lists: 2,060 in the real dataset.

    ``modality`` is "visible" (given camera number 1) or "thermal" (2), ``subset`` "train" or "test". The person ids are
    the labels of the file; they name a person within one trial and subset only.
    """
    if modality not in ("visible", "thermal") or subset not in ("train", "test"):
        raise ValueError(f"no RegDB list {subset!r} {modality!r}: give 'train' or 'test', 'visible' or 'thermal'")
    index = os.path.join(root, "idx", f"{subset}_{modality}_{trial}.txt")
    camera = 1 if modality == "visible" else 2
    rows = []
    for number, line in enumerate(_read_text(index, root).splitlines(), 1):
        if not line.strip():
            continue
        path, label, *_ = [*line.rsplit(None, 1), ""]
        if not re.fullmatch("[0-9]{1,9}", label):
            raise OSError(f"{index}, line {number}: {line!r} is not '<relative path> <label>'")
        if os.path.isabs(path) or ".." in path.split("/"):
            raise OSError(f"{index}, line {number}: {path!r} points outside {root}; give paths relative to it")
        rows.append((os.path.join(root, path.strip()), int(label), camera))
    return _not_empty(_split(rows), root, f"no image is listed in {index}")


def paired(visible: Split, thermal: Split, root: str) -> tuple[Split, Split]:
    """Both splits without the persons who are missing from one of them, whom a warning names (FIDELITY 25)."""
    alone = sorted(set(visible.pids.tolist()) ^ set(thermal.pids.tolist()))
    if alone:
        log.warning("left out of training, for they have images in one modality only: persons %s", _shorten(alone))
    complaint = "no training person has images in both modalities"
    return tuple(_not_empty(_without(split, alone), root, complaint) for split in (visible, thermal))


def relabel(pids: np.ndarray) -> np.ndarray:
    """Class labels 0..n-1 in ascending order of person id (FIDELITY 2)."""
    return np.unique(pids, return_inverse=True)[1]


def _check_mode(mode: str) -> None:
    if mode not in GALLERY_CAMERAS:
        raise ValueError(f"mode is {mode!r}: give 'all' or 'indoor'")


def _split(rows: Iterable[tuple[str, int, int]]) -> Split:
    rows = list(rows)
    pids, camids = (np.array([row[column] for row in rows], dtype=np.int64) for column in (1, 2))
    return Split([row[0] for row in rows], pids, camids)


def _without(split: Split, pids: list[int]) -> Split:
    keep = np.flatnonzero(~np.isin(split.pids, pids))
    return Split([split.paths[i] for i in keep], split.pids[keep], split.camids[keep])


def _not_empty(split: Split, root: str, complaint: str) -> Split:
    if not split.paths:
        raise OSError(f"{root}: {complaint}; see the README for the layout of the dataset")
    return split


def _images(root: str, cam: int, pid: int) -> list[str]:
    """Image files of one person in one camera, sorted by name; stray files are passed over (FIDELITY 25)."""
    folder = os.path.join(root, f"cam{cam}", f"{pid:04d}")
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):  # not every person is in every camera
        return []
    return [os.path.join(folder, n) for n in names if n.lower().endswith(IMAGE_SUFFIXES) and not n.startswith(".")]


def _read_ids(root: str, subset: str) -> list[int]:
    path = os.path.join(root, "exp", f"{subset}_id.txt")
    first_line = _read_text(path, root).partition("\n")[0]
    if not re.fullmatch(r"\s*[0-9]{1,9}\s*(,\s*[0-9]{1,9}\s*)*", first_line):
        raise OSError(f"{path}: the first line must hold person ids like '1,2,3', not {first_line[:40]!r}")
    return [int(word) for word in first_line.split(",")]


def _read_text(path: str, root: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path} not found: is the dataset in {root}? --data_path names its folder") from None
    except UnicodeDecodeError:
        raise OSError(f"{path} is not a text file") from None


def _shorten(pids: list[int]) -> str:
    return ", ".join(map(str, pids[:10])) + (f" and {len(pids) - 10} more" if len(pids) > 10 else "")
