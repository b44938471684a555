"""Which image, person and camera is train, query or gallery: lists read off the disk, no pixels and no torch.

SYSU-MM01 (491 persons, 30,071 visible and 15,792 infrared images)::

    cam1 .. cam6/<person, 4 digits>/<image, 4 digits>.jpg     cameras 1, 2, 4, 5 visible, 3 and 6 infrared
    exp/train_id.txt, val_id.txt, test_id.txt                 person ids, comma separated, on the first line

RegDB (412 persons, 10 visible and 10 thermal images each; ten trials)::

    idx/{train,test}_{visible,thermal}_<trial>.txt            one image a line: <relative path> <label>

Whatever is missing or malformed on disk is an ``OSError`` whose one-line message names the file and the remedy.
"""

import itertools
import logging
import os
import random
import re
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import numpy as np
import scipy.io

VISIBLE_CAMERAS, INFRARED_CAMERAS = (1, 2, 4, 5), (3, 6)
THERMAL_CAMERAS = {"sysu": INFRARED_CAMERAS, "regdb": (2,)}  # RegDB's two are numbered here: 1 visible, 2 thermal
GALLERY_CAMERAS = {"all": VISIBLE_CAMERAS, "indoor": (1, 2)}
SHOTS = {"single": 1, "multi": 10}  # gallery images per person and camera
SYSU_TRIALS, REGDB_TRIALS = range(10), range(1, 11)
# Of the real datasets: training persons and images, test persons, and the queries and gallery images of each protocol.
SYSU_TRAIN_PERSONS, SYSU_TRAIN_IMAGES = 395, {"rgb": 22258, "ir": 11909}
TEST_PERSONS = {"sysu": 96, "regdb": 206}
TEST_IMAGES = {
    "all-search single-shot": (3803, 301),
    "all-search multi-shot": (3803, 3010),
    "indoor-search single-shot": (3803, 112),
    "indoor-search multi-shot": (3803, 1120),
    "v2t": (2060, 2060),
    "t2v": (2060, 2060),
}
LONGEST_LIST = 2**26  # bytes of a text file; those of the real datasets have less than 2**18
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")

log = logging.getLogger(__name__)


class Split(NamedTuple):
    """Parallel lists, an entry per image: file path, person id and camera number (both int64 arrays)."""

    paths: list[str]
    pids: np.ndarray
    camids: np.ndarray

    def take(self, rows: np.ndarray) -> "Split":
        return Split([self.paths[i] for i in rows], self.pids[rows], self.camids[rows])


class Search(NamedTuple):
    """What is ranked in one trial of a protocol: the queries' and the gallery's places in a `Split` of test images."""

    protocol: str  # a key of TEST_IMAGES
    trial: int
    query: np.ndarray
    gallery: np.ndarray


def sysu_train(root: str) -> tuple[Split, Split]:
    """The visible and the infrared training images of SYSU-MM01: persons ascending, cameras ascending, names sorted.

    Persons of ``train_id.txt`` and ``val_id.txt`` (395 of them in the real dataset) who were seen in one modality
    only are left out, with a warning (FIDELITY 25).
    """
    pids = sorted({*_read_ids(root, "train"), *_read_ids(root, "val")})
    visible = _split((path, pid, cam) for pid in pids for cam in VISIBLE_CAMERAS for path in _images(root, cam, pid))
    thermal = _split((path, pid, cam) for pid in pids for cam in INFRARED_CAMERAS for path in _images(root, cam, pid))
    return paired(visible, thermal, root)


def sysu_test(root: str) -> Split:
    """All images of the test persons, of all cameras: persons ascending, cameras ascending, names sorted."""
    pids, cams = sorted(set(_read_ids(root, "test"))), sorted(VISIBLE_CAMERAS + INFRARED_CAMERAS)
    images = _split((path, pid, cam) for pid in pids for cam in cams for path in _images(root, cam, pid))
    return _not_empty(images, root, "test persons have no images")


def sysu_query(root: str, mode: str = "all") -> Split:
    """All infrared images of the test persons: 3,803 in the real dataset, the same for both search modes."""
    images = sysu_test(root)
    return images.take(sysu_searches(images, mode, trials=[0])[0].query)


def sysu_gallery(
    root: str, mode: str = "all", gall_mode: str = "single", trial: int = 0, rand_perm: np.ndarray | None = None
) -> Split:
    """The gallery of one trial, as `sysu_searches` draws it."""
    images = sysu_test(root)
    return images.take(sysu_searches(images, mode, gall_mode, rand_perm, [trial])[0].gallery)


def sysu_searches(
    images: Split,
    mode: str = "all",
    gall_mode: str = "single",
    rand_perm: np.ndarray | None = None,
    trials: Iterable[int] = SYSU_TRIALS,
) -> list[Search]:
    """The protocols of SYSU-MM01: infrared queries, and a gallery that is drawn anew in each trial.

    ``mode`` "all" searches the cameras 1, 2, 4, 5, "indoor" 1 and 2; the gallery has one image (``gall_mode`` "single")
    or up to ten ("multi") of each person in each of these cameras; "both" gives either's searches.

    Without ``rand_perm``, trial t draws with seed t (FIDELITY 11): persons ascending and inside a person cameras
    ascending, single-shot with Python's generator as the field's baseline does, multi-shot with numpy's. With
    ``rand_perm`` (`read_rand_perm`) the picks are those of the official evaluation, whose order is cameras ascending
    and inside a camera persons ascending; the trials are 0 to 9. A person's images in a camera count in order of path.

    Args:
        images: all images of the test persons, like `sysu_test` gives them, in any order.

    Raises:
        ValueError: nothing to search with or in, or ``rand_perm`` does not fit the images.
    """
    query = np.flatnonzero(np.isin(images.camids, INFRARED_CAMERAS))
    if not len(query):
        raise ValueError("the test persons have no infrared images (cameras 3 and 6), which are the queries")
    where = {}  # (person, camera) -> its images
    for i in sorted(range(len(images.paths)), key=images.paths.__getitem__):
        where.setdefault((int(images.pids[i]), int(images.camids[i])), []).append(i)
    searches = []
    for cameras, shots in itertools.product(_choice(mode, GALLERY_CAMERAS), _choice(gall_mode, SHOTS)):
        protocol = f"{cameras}-search {shots}-shot"
        places = {place: where[place] for place in sorted(where) if place[1] in GALLERY_CAMERAS[cameras]}
        if not places:
            raise ValueError(f"the test persons have no images in the gallery's cameras, {GALLERY_CAMERAS[cameras]}")
        short = sum(len(own) < SHOTS[shots] for own in places.values())
        if short:
            log.warning("%s: %d (person, camera) pairs have fewer than ten images; all are used", protocol, short)
        for trial in trials:
            if rand_perm is None:
                gallery = _seeded_draw(places, SHOTS[shots], trial)
            else:
                gallery = _official_draw(places, SHOTS[shots], trial, rand_perm)
            searches.append(Search(protocol, trial, query, np.array(gallery)))
    return searches


def _seeded_draw(places: dict[tuple[int, int], list[int]], shots: int, trial: int) -> list[int]:
    if shots == 1:
        choose = random.Random(trial).choice
        return [choose(own) for own in places.values()]
    draw = np.random.RandomState(trial).choice
    return [i for own in places.values() for i in draw(own, min(shots, len(own)), replace=False).tolist()]


def _official_draw(
    places: dict[tuple[int, int], list[int]], shots: int, trial: int, rand_perm: np.ndarray
) -> list[int]:
    gallery = []
    for pid, cam in sorted(places, key=lambda place: (place[1], place[0])):
        own, persons = places[pid, cam], rand_perm[cam - 1, 0]
        order = persons[pid - 1, 0] if 1 <= pid <= len(persons) else np.empty((0, 0))
        if order.shape != (10, len(own)) or sorted(order[trial]) != [*range(1, len(own) + 1)]:
            raise ValueError(
                f"person {pid} has {len(own)} images in camera {cam}, but --rand_perm orders {order.shape[1]}: "
                "it belongs to another tree"
            )
        gallery += [own[number - 1] for number in order[trial][:shots].tolist()]
    return gallery


def read_rand_perm(path: str) -> np.ndarray:
    """The ``rand_perm_cam.mat`` of SYSU-MM01's authors: [camera - 1, 0][person - 1, 0] is a (10, n) permutation.

    Row t orders the n images of that person in that camera for trial t; its numbers start at 1.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--rand_perm {path} not found: it comes with SYSU-MM01's evaluation code")
    try:
        with ProcessPoolExecutor(1) as pool:  # a damaged file can crash SciPy, and its process
            cells = pool.submit(scipy.io.loadmat, path).result()["rand_perm_cam"]
        if cells.shape == (6, 1) and all(camera.ndim == 2 and camera.shape[1] == 1 for camera in cells[:, 0]):
            return cells
    except Exception:  # SciPy raises whatever the damage leads to
        pass
    raise OSError(f"--rand_perm {path} is not the rand_perm_cam.mat of SYSU-MM01's evaluation code")


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
        path, label, *_ = [*line.strip().rsplit(None, 1), ""]
        if not re.fullmatch("[0-9]{1,9}", label):
            raise OSError(f"{index}, line {number}: {line!r} is not '<relative path> <label>'")
        if os.path.isabs(path) or ".." in re.split(r"[/\\]", path):
            raise OSError(f"{index}, line {number}: {path!r} points outside {root}; give paths relative to it")
        rows.append((os.path.join(root, path), int(label), camera))
    return _not_empty(_split(rows), root, f"no image is listed in {index}")


def regdb_test(root: str, trial: int) -> Split:
    """The test images of one trial: visible ones (camera 1), then thermal ones (camera 2)."""
    visible, thermal = (regdb_split(root, trial, modality, "test") for modality in ("visible", "thermal"))
    return Split(visible.paths + thermal.paths, *map(np.concatenate, zip(visible[1:], thermal[1:], strict=True)))


def regdb_searches(images: Split, trial: int, search: str = "v2t") -> list[Search]:
    """The protocols of RegDB, from visible to thermal ("v2t") or back ("t2v"), or both; ValueError: a side is empty."""
    visible, thermal = np.flatnonzero(images.camids == 1), np.flatnonzero(images.camids == 2)
    if not (len(visible) and len(thermal)):
        raise ValueError("visible (camera 1) or thermal (camera 2) test images are missing")
    sides = {"v2t": (visible, thermal), "t2v": (thermal, visible)}
    return [Search(direction, trial, *sides[direction]) for direction in _choice(search, sides)]


def list_test(dataset: str, root: str, trial: int | None = None) -> Split:
    """What `sysu_test` or, of a trial, `regdb_test` lists."""
    return sysu_test(root) if dataset == "sysu" else regdb_test(root, trial)


def list_searches(
    dataset: str,
    images: Split,
    trial: int | None = None,
    mode: str = "all",
    gall_mode: str = "single",
    search: str = "v2t",
    rand_perm: np.ndarray | None = None,
    draws: Iterable[int] = SYSU_TRIALS,
) -> list[Search]:
    """`sysu_searches` in the trials ``draws``, or `regdb_searches`; each takes what it knows of the arguments."""
    if dataset == "sysu":
        return sysu_searches(images, mode, gall_mode, rand_perm, draws)
    return regdb_searches(images, trial, search)


def restrict(images: Split, searches: list[Search]) -> tuple[Split, list[Search]]:
    """Only the images that a search uses, each once, and the searches among them."""
    used = np.unique(np.concatenate([np.concatenate([search.query, search.gallery]) for search in searches]))
    renumber = [
        search._replace(query=np.searchsorted(used, search.query), gallery=np.searchsorted(used, search.gallery))
        for search in searches
    ]
    return images.take(used), renumber


def check_counts(images: Split, searches: list[Search], dataset: str) -> None:
    """Warn if test images are about as many as in the real dataset, but not exactly; once for each protocol."""
    name = {"sysu": "SYSU-MM01", "regdb": "RegDB"}[dataset]
    persons, known = len(np.unique(images.pids)), TEST_PERSONS[dataset]
    for search in {search.protocol: search for search in reversed(searches)}.values():
        found, expected = (len(search.query), len(search.gallery)), TEST_IMAGES[search.protocol]
        if abs(persons - known) <= known // 10 and (persons, *found) != (known, *expected):
            log.warning(
                "%s: %d test persons, %d queries, %d gallery images, but %s has %d, %d and %d: is the data complete?",
                search.protocol, persons, *found, name, known, *expected,
            )  # fmt: skip


def paired(visible: Split, thermal: Split, root: str) -> tuple[Split, Split]:
    """Both splits without the persons who are missing from one of them, whom a warning names (FIDELITY 25)."""
    alone = sorted(set(visible.pids.tolist()) ^ set(thermal.pids.tolist()))
    if alone:
        log.warning("left out of training, for they have images in one modality only: persons %s", _shorten(alone))
    both = [split.take(np.flatnonzero(~np.isin(split.pids, alone))) for split in (visible, thermal)]
    return tuple(_not_empty(split, root, "no training person has images in both modalities") for split in both)


def relabel(pids: np.ndarray) -> np.ndarray:
    """Class labels 0..n-1 in ascending order of person id (FIDELITY 2)."""
    return np.unique(pids, return_inverse=True)[1]


def _choice(name: str, options: Iterable[str]) -> list[str]:
    """What a flag's value stands for: itself, or all of ``options``."""
    if name not in (*options, "both"):
        raise ValueError(f"there is no protocol {name!r}: give one of {', '.join([*options, 'both'])}")
    return [*options] if name == "both" else [name]


def _split(rows: Iterable[tuple[str, int, int]]) -> Split:
    rows = list(rows)
    pids, camids = (np.array([row[column] for row in rows], dtype=np.int64) for column in (1, 2))
    return Split([row[0] for row in rows], pids, camids)


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
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} not found: is the dataset in {root}? --data_path names its folder")
    if os.path.getsize(path) > LONGEST_LIST:
        raise OSError(f"{path} is too large for a list: put the dataset's own file there")
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except UnicodeDecodeError:
        raise OSError(f"{path} is not a text file") from None


def _shorten(pids: list[int]) -> str:
    return ", ".join(map(str, pids[:10])) + (f" and {len(pids) - 10} more" if len(pids) > 10 else "")
