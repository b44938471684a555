"""Disk -> lists: which image, person and camera is train, query or gallery. No pixels, no torch.

SYSU-MM01 (491 persons)
    cam1 .. cam6/<person, 4 digits>/<image, 4 digits>.jpg     cameras 1, 2, 4, 5 visible, 3 and 6 infrared
    exp/train_id.txt, val_id.txt, test_id.txt                 person ids, comma separated, on the first line
RegDB (412 persons, 10 visible and 10 thermal images each; ten trials)
    idx/{train,test}_{visible,thermal}_<trial>.txt            one image a line: <relative path> <label>
LLCM (1,064 persons)
    idx/train_vis.txt, train_nir.txt                          one image a line: <relative path> <label>, of vis/, nir/
    idx/test_id.txt                                           person ids, comma separated, on the first line
    test_vis/cam1 .. cam9/<person, 4 digits>/*.jpg            visible; test_nir/ likewise infrared, without cam3

All else that the code knows of a dataset is its entry in `DATASETS`, at the end. What is missing or malformed on disk
raises OSError, test images that give no query or gallery ValueError.
"""

import itertools
import logging
import os
import random
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import scipy.io

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
MODALITIES = ("visible", "thermal")

log = logging.getLogger(__name__)


class Split(NamedTuple):
    """Parallel lists, an entry per image: path, person (int64), camera number (int64), and whether it is infrared."""

    paths: list[str]
    pids: np.ndarray
    camids: np.ndarray
    thermal: np.ndarray

    def take(self, rows: np.ndarray) -> "Split":
        return Split([self.paths[i] for i in rows], *(column[rows] for column in self[1:]))


class Search(NamedTuple):
    """What is ranked in one trial of a protocol: the queries' and the gallery's places in a `Split` of test images."""

    protocol: str
    trial: int
    query: np.ndarray
    gallery: np.ndarray


Sides = list[tuple[np.ndarray, np.ndarray]]  # (query, gallery) of each trial, places among the test images
RandPerm = np.ndarray | None  # see `read_rand_perm`


class Dataset(NamedTuple):
    """All that the code knows of a dataset."""

    title: str
    defaults: dict[str, float | str]  # of flags: --data_path, the published --lr, --epochs and --w_hc, ...
    counts: dict[str, tuple[int, ...]]  # persons and, if known, visible and infrared images of "train" and "test"
    train: Callable[[str, int], tuple[Split, Split]]  # (root, trial) -> visible and infrared training images
    test: Callable[[str, int], Split]  # (root, trial) -> all test images
    trials: range
    protocol: str  # its name, with {} for the value of each of these flags
    search_flags: dict[str, tuple[str, ...]]  # flag -> its values
    draw: Callable[..., Sides]  # of (test images, the flags' values, trials, rand_perm)
    hidden: Callable[..., np.ndarray]  # (q_pids, q_camids, g_pids, g_camids) -> (queries, gallery): not to be seen
    thermal_cameras: tuple[int, ...] = ()  # tell the modality in files of features that do not
    counts_persons: bool = True  # CMC counts persons, each at their first image, not images
    preprocessed: bool = False  # train.py reads the arrays of pre_process_sysu.py, not image files
    trial_trains: bool = False  # each trial has training persons, and so a model, of its own
    tuned: bool = True  # the defaults are published settings of this method
    official_persons: int = 0  # rows of the .mat files of its official evaluation, if there is one

    def list_test(
        self, root: str, choice: dict, trial: int | None, trials: Iterable[int] = (), rand_perm: RandPerm = None
    ) -> tuple[Split, list[Search]]:
        """All test images of ``trial``, if it has some of its own, and the `searches` among them."""
        images = self.test(root, trial)
        check_counts(images, self, "test")
        return images, self.searches(images, choice, [trial] if self.trial_trains else trials, rand_perm)

    def values(self, choice: dict[str, str | None]) -> list[str]:
        """The value of each of ``search_flags``: the chosen one, or the first."""
        return [choice.get(flag) or known[0] for flag, known in self.search_flags.items()]

    def searches(self, images: Split, choice: dict, trials: Iterable[int] = (), rand_perm=None) -> list[Search]:
        """What to rank among all test ``images`` in some trials, or in all, of the chosen protocols.

        ``choice`` has values of ``search_flags``; "both" takes all. With ``rand_perm`` (`read_rand_perm`) galleries are
        those of SYSU-MM01's official evaluation. ValueError: no such protocol, or nothing to search with or in.
        """
        trials, chosen = trials or self.trials, []
        if rand_perm is not None and not self.official_persons:
            raise ValueError(f"--gallery official is for SYSU-MM01: {self.title} has no such galleries")
        for value, (flag, known) in zip(self.values(choice), self.search_flags.items(), strict=True):
            if value not in (*known, "both"):
                raise ValueError(f"{self.title} has no --{flag} {value}: give one of {', '.join(known)}, both")
            chosen.append(known if value == "both" else (value,))
        return [
            Search(self.protocol.format(*own), trial, *sides)
            for own in itertools.product(*chosen)
            for trial, sides in zip(trials, self.draw(images, own, trials, rand_perm), strict=True)
        ]


# ---- SYSU-MM01 ------------------------------------------------------------------------------------------------------

VISIBLE_CAMERAS, INFRARED_CAMERAS = (1, 2, 4, 5), (3, 6)
GALLERY_CAMERAS = {"all": VISIBLE_CAMERAS, "indoor": (1, 2)}
SHOTS = {"single": 1, "multi": 10}  # gallery images per person and camera


def sysu_train(root: str, trial: int = 0) -> tuple[Split, Split]:
    """The visible and the infrared training images of SYSU-MM01: persons ascending, cameras ascending, names sorted.

    Persons of train_id.txt and val_id.txt (395 of them in the real dataset) who were seen in one modality only are left
    out, with a warning (FIDELITY 25).
    """
    pids = sorted({*_read_ids(root, "exp/train_id.txt"), *_read_ids(root, "exp/val_id.txt")})
    visible, thermal = (_in_folders(root, pids, own, INFRARED_CAMERAS) for own in (VISIBLE_CAMERAS, INFRARED_CAMERAS))
    return paired(visible, thermal, root)


def sysu_test(root: str, trial: int = 0) -> Split:
    """All images of the test persons, of all cameras: persons ascending, cameras ascending, names sorted."""
    return _in_folders(root, sorted({*_read_ids(root, "exp/test_id.txt")}), range(1, 7), INFRARED_CAMERAS)


def sysu_query(root: str, mode: str = "all") -> Split:
    """All infrared images of the test persons: 3,803 in the real dataset, the same for both search modes."""
    images = sysu_test(root)
    return images.take(sysu_draw(images, (mode, "single"), [0])[0][0])


def sysu_gallery(root: str, mode: str = "all", gall_mode: str = "single", trial: int = 0, rand_perm=None) -> Split:
    """The gallery of one trial, as `sysu_draw` draws it."""
    images = sysu_test(root)
    return images.take(sysu_draw(images, (mode, gall_mode), [trial], rand_perm)[0][1])


def sysu_draw(images: Split, values: tuple[str, str], trials: Iterable[int], rand_perm: RandPerm = None) -> Sides:
    """Infrared queries; a gallery of one ("single") or up to ten ("multi") images per person and visible camera.

    Trial t draws with seed t (FIDELITY 11), persons ascending and inside a person cameras ascending: single-shot with
    Python's generator, as the field's baseline does, multi-shot with numpy's. With ``rand_perm`` the trials are 0 to 9
    and the picks those of the official evaluation, cameras ascending and inside a camera persons ascending. A person's
    images in a camera count in the order of their paths.
    """
    cameras, shots = GALLERY_CAMERAS[values[0]], SHOTS[values[1]]
    query, places = np.flatnonzero(images.thermal), _places(images, np.isin(images.camids, cameras))
    if not (len(query) and places):
        raise ValueError(f"the test persons have no images in {f'cameras {cameras}' if len(query) else 'infrared'}")
    short = sum(len(own) < shots for own in places.values())
    if short:
        log.warning("%s-search: %d (person, camera) pairs have fewer than ten images; all are used", values[0], short)

    def seeded(trial: int) -> np.ndarray:
        draw = np.random.RandomState(trial).choice
        return np.concatenate([draw(own, min(shots, len(own)), replace=False) for own in places.values()])

    def official(trial: int) -> np.ndarray:
        picks = []
        for (pid, cam), own in sorted(places.items(), key=lambda place: place[0][::-1]):
            order = rand_perm[cam - 1, 0][pid - 1 : pid, 0]
            if not len(order) or order[0].shape != (10, len(own)):
                raise ValueError(f"person {pid}, camera {cam}: --rand_perm belongs to another tree")
            picks += [own[number - 1] for number in order[0][trial, :shots]]
        return np.array(picks)

    if rand_perm is not None:
        return [(query, official(trial)) for trial in trials]
    return [(query, _one_each(places, trial) if shots == 1 else seeded(trial)) for trial in trials]


def read_rand_perm(path: str) -> np.ndarray:
    """The rand_perm_cam.mat of SYSU-MM01's authors: [camera - 1, 0][person - 1, 0] is a (10, n) permutation.

    Row t orders the n images of that person in that camera for trial t; its numbers start at 1.
    """
    try:
        cells = scipy.io.loadmat(path)["rand_perm_cam"]
        if {camera.shape[1] for camera in cells.reshape(6)} == {1}:
            return cells
    except Exception:  # SciPy raises whatever the damage leads to
        pass
    raise OSError(f"--rand_perm {path} is missing, or not the rand_perm_cam.mat of SYSU-MM01's evaluation code")


# ---- RegDB ----------------------------------------------------------------------------------------------------------


def regdb_split(root: str, trial: int, modality: str, subset: str) -> Split:
    """The images that idx/<subset>_<modality>_<trial>.txt lists: 2,060 in the real dataset.

    ``modality`` is "visible" (given camera number 1) or "thermal" (2), ``subset`` "train" or "test". The person ids are
    the labels of the file; they name a person within one trial and subset only.
    """
    thermal = modality == "thermal"
    return _listed(root, f"{subset}_{modality}_{trial}.txt", 1 + thermal, thermal)


def regdb_draw(images: Split, values: tuple[str], trials: Iterable[int], rand_perm: RandPerm = None) -> Sides:
    """All visible images query all thermal ones ("v2t"), or the other way round ("t2v")."""
    sides = np.flatnonzero(~images.thermal), np.flatnonzero(images.thermal)
    if not all(map(len, sides)):
        raise ValueError("visible or thermal test images are missing")
    return [sides if values == ("v2t",) else sides[::-1] for _ in trials]


# ---- LLCM -----------------------------------------------------------------------------------------------------------

LLCM_CAMERAS = range(1, 10)  # a number occurs in both modalities


def llcm_test(root: str, trial: int = 0) -> Split:
    """All test images, the visible ones first: persons ascending, cameras ascending, names sorted."""
    pids = sorted({*_read_ids(root, "idx/test_id.txt")})
    visible = _in_folders(os.path.join(root, "test_vis"), pids, LLCM_CAMERAS, ())
    return joined(visible, _in_folders(os.path.join(root, "test_nir"), pids, LLCM_CAMERAS, LLCM_CAMERAS))


def llcm_draw(images: Split, values: tuple[str], trials: Iterable[int], rand_perm: RandPerm = None) -> Sides:
    """All images of one modality query one image per person and camera of the other, drawn with seed t for trial t.

    "t2v": infrared queries visible, "v2t": visible queries infrared; "v2t-published" turns "v2t" round as the dataset's
    own evaluation does: the drawn infrared images query all visible ones (FIDELITY 26).
    """
    gallery = images.thermal != (values == ("t2v",))
    query, places = np.flatnonzero(~gallery), _places(images, gallery)
    if not (len(query) and places):
        raise ValueError("visible or infrared test images are missing")
    sides = [(query, _one_each(places, trial)) for trial in trials]
    return [side[::-1] for side in sides] if values == ("v2t-published",) else sides


# ---- what the datasets share ----------------------------------------------------------------------------------------


def restrict(images: Split, searches: list[Search]) -> tuple[Split, list[Search]]:
    """Only the images that a search uses, each once, and the searches among them."""
    used = np.unique(np.concatenate([side for search in searches for side in search[2:]]))
    return images.take(used), [Search(*s[:2], *(np.searchsorted(used, side) for side in s[2:])) for s in searches]


def check_counts(images: Split, dataset: Dataset, subset: str) -> None:
    """Warn if there are about as many persons as in the real dataset, but other numbers of persons or images."""
    expected = dataset.counts.get(subset, (0,))
    found = len(np.unique(images.pids)), int((~images.thermal).sum()), int(images.thermal.sum())
    if abs(found[0] - expected[0]) <= expected[0] // 10 and found[: len(expected)] != expected:
        log.warning("%s: %d persons, %d visible and %d infrared images, but %s has %s: is it complete?",
                    subset, *found, dataset.title, ", ".join(map(str, expected)))  # fmt: skip


def paired(visible: Split, thermal: Split, root: str) -> tuple[Split, Split]:
    """Both splits without the persons who are missing from one of them, whom a warning names (FIDELITY 25)."""
    alone = sorted({*visible.pids.tolist()} ^ {*thermal.pids.tolist()})
    if alone:
        log.warning("left out of training, since they have images in one modality only: persons %s", alone)
    visible, thermal = (split.take(np.flatnonzero(~np.isin(split.pids, alone))) for split in (visible, thermal))
    if not visible.paths:
        raise OSError(f"{root}: no training person has images in both modalities; see the README for the layout")
    return visible, thermal


def joined(visible: Split, thermal: Split) -> Split:
    """The images of both, the visible ones first."""
    return Split(visible.paths + thermal.paths, *map(np.concatenate, zip(visible[1:], thermal[1:], strict=True)))


def relabel(pids: np.ndarray) -> np.ndarray:
    """Class labels 0..n-1 in ascending order of person id (FIDELITY 2)."""
    return np.unique(pids, return_inverse=True)[1]


def _split(rows: Iterable[tuple[str, int, int, bool]]) -> Split:
    paths, *columns = [*zip(*rows, strict=True)] or [()] * 4
    return Split([*paths], *(np.array(c, t) for c, t in zip(columns, (np.int64, np.int64, bool), strict=True)))


def _in_folders(root: str, pids: Iterable[int], cameras: Iterable[int], infrared: Iterable[int]) -> Split:
    """The images in cam<camera>/<person, 4 digits>/ below ``root``; these cameras are ``infrared``."""
    places = [(os.path.join(root, f"cam{cam}", f"{pid:04d}"), pid, cam) for pid in pids for cam in cameras]
    return _split((path, pid, cam, cam in infrared) for folder, pid, cam in places for path in _images(folder))


def _listed(root: str, name: str, camid: int, thermal: bool) -> Split:
    """The images, below ``root``, that idx/<name> lists in lines '<relative path> <label>'; labels are person ids.

    All are of one camera number and modality.
    """
    index, rows = os.path.join(root, "idx", name), []
    for number, line in enumerate(_read_text(index, root).splitlines(), 1):
        path, label, *_ = [*line.strip().rsplit(None, 1), "", ""]
        if line.strip() and not re.fullmatch("[0-9]{1,9}", label):
            raise OSError(f"{index}, line {number}: {line!r} is not '<relative path> <label>'")
        if os.path.isabs(path) or ".." in re.split(r"[/\\]", path):
            raise OSError(f"{index}, line {number}: {path!r} points outside {root}; give paths relative to it")
        if line.strip():
            rows.append((os.path.join(root, path), int(label), camid, thermal))
    return _split(rows)


def _places(images: Split, chosen: np.ndarray) -> dict[tuple[int, int], list[int]]:
    """(person, camera) -> places of its ``chosen`` images in the order of their paths; keys ascending."""
    places = {}
    for i in sorted(np.flatnonzero(chosen), key=images.paths.__getitem__):
        places.setdefault((int(images.pids[i]), int(images.camids[i])), []).append(i)
    return dict(sorted(places.items()))


def _one_each(places: dict[tuple[int, int], list[int]], trial: int) -> np.ndarray:
    """One image of each person and camera, drawn with Python's generator as the field's baseline does."""
    draw = random.Random(trial).choice
    return np.array([draw(own) for own in places.values()])


def _images(folder: str) -> list[str]:
    """Image files of a folder, sorted by name; stray files are passed over (FIDELITY 25)."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []  # not every person is in every camera
    return [os.path.join(folder, n) for n in names if n.lower().endswith(IMAGE_SUFFIXES) and not n.startswith(".")]


def _read_ids(root: str, name: str) -> list[int]:
    path = os.path.join(root, *name.split("/"))
    first_line = _read_text(path, root).partition("\n")[0]
    if not re.fullmatch(r"\s*[0-9]{1,9}\s*(,\s*[0-9]{1,9}\s*)*", first_line):
        raise OSError(f"{path}: the first line must hold person ids like '1,2,3', not {first_line[:40]!r}")
    return [int(word) for word in first_line.split(",")]


def _read_text(path: str, root: str) -> str:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} not found: is the dataset in {root}? --data_path names its folder")
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


DATASETS = {
    "sysu": Dataset(
        title="SYSU-MM01",
        defaults={"data_path": "data/SYSU-MM01", "lr": 0.008, "epochs": 60, "w_hc": 0.6},
        counts={"train": (395, 22258, 11909), "test": (96, 6775, 3803)},
        train=sysu_train,
        test=sysu_test,
        trials=range(10),
        protocol="{}-search {}-shot",
        search_flags={"mode": ("all", "indoor"), "gall_mode": ("single", "multi")},
        draw=sysu_draw,
        # Cameras 2 and 3 look at the same room: a query of camera 3 does not see the gallery of camera 2.
        hidden=lambda q_pids, q_camids, g_pids, g_camids: (q_camids == 3)[:, None] & (g_camids == 2),
        thermal_cameras=INFRARED_CAMERAS,
        preprocessed=True,
        official_persons=533,
    ),
    "regdb": Dataset(
        title="RegDB",
        defaults={"data_path": "data/RegDB", "lr": 0.0098, "epochs": 80, "w_hc": 0.58},
        counts={"train": (206, 2060, 2060), "test": (206, 2060, 2060)},
        train=lambda root, trial: tuple(regdb_split(root, trial, m, "train") for m in MODALITIES),
        test=lambda root, trial: joined(*(regdb_split(root, trial, m, "test") for m in MODALITIES)),
        trials=range(1, 11),
        protocol="{}",
        search_flags={"search": ("v2t", "t2v")},
        draw=regdb_draw,
        hidden=lambda q_pids, q_camids, g_pids, g_camids: np.zeros((len(q_pids), len(g_pids)), bool),
        thermal_cameras=(2,),
        counts_persons=False,
        trial_trains=True,
    ),
    "llcm": Dataset(
        title="LLCM",
        defaults={"data_path": "data/LLCM", "lr": 0.008, "epochs": 60, "w_hc": 0.6},
        tuned=False,
        counts={"train": (713,), "test": (351,)},
        train=lambda root, trial: tuple(_listed(root, f"train_{m}.txt", 0, m == "nir") for m in ("vis", "nir")),
        test=llcm_test,
        trials=range(10),
        protocol="{}",
        search_flags={"search": ("t2v", "v2t", "v2t-published")},
        draw=llcm_draw,
        # A query does not see the images of its person in the camera of its number.
        hidden=lambda q_pids, q_camids, g_pids, g_camids: (q_pids[:, None] == g_pids) & (q_camids[:, None] == g_camids),
    ),
}
