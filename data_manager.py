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

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
Side = tuple[np.ndarray, int]  # mask of test images; images drawn of each person and camera, 0: all

log = logging.getLogger(__name__)


class Split(NamedTuple):
    """Images, as parallel columns: path, person (int64), camera number (int64), and whether it is infrared."""

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


class Dataset(NamedTuple):
    """All that the code knows of a dataset."""

    title: str
    defaults: dict[str, float | str]  # of flags, all four: data_path, lr, epochs, w_hc
    counts: dict[str, tuple[int, ...]]  # persons and, if known, visible and infrared images of "train" and "test"
    train: Callable[[str, int | None], tuple[Split, Split]]  # (root, trial) -> visible and infrared training images
    test: Callable[[str, int | None], Split]  # (root, trial) -> all test images
    search_flags: dict[str, tuple[str, ...]]  # flag -> its values
    sides: Callable[..., tuple[Side, Side]]  # (test images, the flags' values) -> queries and gallery
    hidden: Callable[..., np.ndarray]  # (q_pids, q_camids, g_pids, g_camids) -> (queries, gallery): True, not seen
    protocol: str = "{}"  # its name, with {} for the value of each search flag
    trials: range = range(10)
    thermal_cameras: tuple[int, ...] = ()  # tell the modality, for files of features that do not
    counts_persons: bool = True  # CMC counts persons, each at their first image, not images
    preprocessed: bool = False  # train.py reads the arrays of pre_process_sysu.py, not image files
    trial_trains: bool = False  # each trial has training persons, and so a model, of its own
    official_persons: int = 0  # rows of the .mat files of its official evaluation, if there is one

    def values(self, choice: dict[str, str | None]) -> list[str]:
        """The value of each of ``search_flags``: the chosen one, or the first."""
        return [choice.get(flag) or known[0] for flag, known in self.search_flags.items()]

    def searches(self, images: Split, choice: dict, trials: Iterable[int] = (), draw: Callable | None = None):
        """What to rank among all test ``images`` in some trials, or all, of the chosen protocols: a list of `Search`.

        ``choice`` has values of ``search_flags``; "both" takes all. ``draw`` is `seeded`, or another way to draw.
        ValueError: no such protocol, or nothing to search with or in.
        """
        check_counts(images, self, "test")
        trials, chosen, found = trials or self.trials, [], []
        for value, (flag, known) in zip(self.values(choice), self.search_flags.items(), strict=True):
            if value not in (*known, "both"):
                raise ValueError(f"{self.title} has no --{flag} {value}: give one of {', '.join(known)}, both")
            chosen.append(known if value == "both" else (value,))
        for own in itertools.product(*chosen):
            sides = [_draw(images, *side, trials, draw or seeded) for side in self.sides(images, *own)]
            found += [Search(self.protocol.format(*own), *row) for row in zip(trials, *sides, strict=True)]
        return found


# ---- SYSU-MM01 ------------------------------------------------------------------------------------------------------

VISIBLE_CAMERAS, INFRARED_CAMERAS = (1, 2, 4, 5), (3, 6)


def sysu_train(root: str, trial: int | None = None) -> tuple[Split, Split]:
    """The visible and the infrared training images of SYSU-MM01: persons ascending, cameras ascending, names sorted.

    Persons of train_id.txt and val_id.txt (395 of them in the real dataset) who were seen in one modality only are left
    out, with a warning (FIDELITY 25).
    """
    pids = sorted({*_read_ids(root, "exp/train_id.txt"), *_read_ids(root, "exp/val_id.txt")})
    visible, thermal = (_in_folders(root, pids, own, INFRARED_CAMERAS) for own in (VISIBLE_CAMERAS, INFRARED_CAMERAS))
    return paired(visible, thermal, root)


def sysu_test(root: str, trial: int | None = None) -> Split:
    """All images of the test persons, of all cameras: persons ascending, cameras ascending, names sorted."""
    return _in_folders(root, sorted({*_read_ids(root, "exp/test_id.txt")}), range(1, 7), INFRARED_CAMERAS)


def sysu_sides(images: Split, mode: str, shots: str) -> tuple[Side, Side]:
    """All infrared images query one ("single") or up to ten ("multi") images per person and camera of the search."""
    cameras = {"all": VISIBLE_CAMERAS, "indoor": (1, 2)}[mode]
    return (images.thermal, 0), (np.isin(images.camids, cameras), {"single": 1, "multi": 10}[shots])


def sysu_query(root: str, mode: str = "all") -> Split:
    """All infrared images of the test persons: 3,803 in the real dataset, whatever the ``mode``."""
    images = sysu_test(root)
    return images.take(np.flatnonzero(images.thermal))


def sysu_gallery(root: str, mode: str = "all", gall_mode: str = "single", trial: int = 0) -> Split:
    """The gallery of one trial of a search, as `seeded` draws it: 301 images in the real dataset by default."""
    images = sysu_test(root)
    (search,) = DATASETS["sysu"].searches(images, {"mode": mode, "gall_mode": gall_mode}, [trial])
    return images.take(search.gallery)


# ---- RegDB ----------------------------------------------------------------------------------------------------------


def regdb_split(root: str, trial: int, modality: str, subset: str) -> Split:
    """The images that idx/<subset>_<modality>_<trial>.txt lists: 2,060 in the real dataset.

    ``modality`` is "visible" (given camera number 1) or "thermal" (2), ``subset`` "train" or "test". The person ids are
    the labels of the file; they name a person within one trial and subset only.
    """
    thermal = modality == "thermal"
    return _listed(root, f"{subset}_{modality}_{trial}.txt", 1 + thermal, thermal)


def regdb_sides(images: Split, search: str) -> tuple[Side, Side]:
    """All visible images query all thermal ones ("v2t"), or the other way round ("t2v")."""
    query = images.thermal == (search == "t2v")
    return (query, 0), (~query, 0)


# ---- LLCM -----------------------------------------------------------------------------------------------------------

LLCM_CAMERAS = range(1, 10)  # a number occurs in both modalities


def llcm_test(root: str, trial: int | None = None) -> Split:
    """All test images, the visible ones first: persons ascending, cameras ascending, names sorted."""
    pids = sorted({*_read_ids(root, "idx/test_id.txt")})
    visible = _in_folders(os.path.join(root, "test_vis"), pids, LLCM_CAMERAS, ())
    return joined(visible, _in_folders(os.path.join(root, "test_nir"), pids, LLCM_CAMERAS, LLCM_CAMERAS))


def llcm_sides(images: Split, search: str) -> tuple[Side, Side]:
    """All images of one modality query one image per person and camera of the other.

    "t2v": infrared queries visible, "v2t": visible queries infrared; "v2t-published" turns "v2t" round as the dataset's
    own evaluation does: the drawn infrared images query all visible ones (FIDELITY 26).
    """
    query = images.thermal == (search == "t2v")
    sides = (query, 0), (~query, 1)
    return sides[::-1] if search == "v2t-published" else sides


# ---- what the datasets share ----------------------------------------------------------------------------------------


def _draw(images: Split, chosen: np.ndarray, shots: int, trials: Iterable[int], draw: Callable) -> list[np.ndarray]:
    """The places of each trial's images: all the ``chosen`` ones, or up to ``shots`` of each person and camera."""
    if not chosen.any():
        seen = f"{(~images.thermal).sum()} visible and {images.thermal.sum()} infrared images"
        raise ValueError(f"nothing to search: the test persons have {seen}, of cameras {[*map(int, {*images.camids})]}")
    if not shots:
        return [np.flatnonzero(chosen) for _ in trials]
    places = {}
    for i in sorted(np.flatnonzero(chosen), key=images.paths.__getitem__):
        places.setdefault((int(images.pids[i]), int(images.camids[i])), []).append(i)
    short = sum(len(own) < shots for own in places.values())
    if short:
        log.warning("%d (person, camera) pairs have fewer than %d gallery images; all are used", short, shots)
    return [draw(dict(sorted(places.items())), shots, trial) for trial in trials]


def seeded(places: dict[tuple[int, int], list[int]], shots: int, trial: int) -> np.ndarray:
    """Up to ``shots`` images of each person and camera, persons ascending and inside a person cameras (FIDELITY 11).

    ``places``: of each (person, camera) its images, in the order of their paths; keys ascending. The trial is the seed:
    of Python's generator for one image each, as in the field's baseline, of numpy's for several.
    """
    one, some = random.Random(trial).choice, np.random.RandomState(trial).choice
    picks = [[one(own)] if shots == 1 else some(own, min(shots, len(own)), replace=False) for own in places.values()]
    return np.concatenate(picks)


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
    """The images of one camera number and modality that idx/<name> lists: '<path below root> <person id>' a line."""
    index, rows = os.path.join(root, "idx", name), []
    for number, line in enumerate(_read_text(index, root).splitlines(), 1):
        if not line.strip():
            continue
        found = re.fullmatch(r"(\S.*)\s([0-9]{1,9})", line.strip())
        path = found[1].rstrip() if found else ""
        if not found or os.path.isabs(path) or ".." in re.split(r"[/\\]", path):
            raise OSError(f"{index}, line {number}: {line!r} is not '<path below {root}> <label>'")
        rows.append((os.path.join(root, path), int(found[2]), camid, thermal))
    return _split(rows)


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
        protocol="{}-search {}-shot",
        search_flags={"mode": ("all", "indoor"), "gall_mode": ("single", "multi")},
        sides=sysu_sides,
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
        train=lambda root, trial: tuple(regdb_split(root, trial, m, "train") for m in ("visible", "thermal")),
        test=lambda root, trial: joined(*(regdb_split(root, trial, m, "test") for m in ("visible", "thermal"))),
        trials=range(1, 11),
        search_flags={"search": ("v2t", "t2v")},
        sides=regdb_sides,
        hidden=lambda q_pids, q_camids, g_pids, g_camids: np.zeros((len(q_pids), len(g_pids)), bool),
        thermal_cameras=(2,),
        counts_persons=False,
        trial_trains=True,
    ),
    "llcm": Dataset(
        title="LLCM",
        defaults={"data_path": "data/LLCM", "lr": 0.008, "epochs": 60, "w_hc": 0.6},  # SYSU-MM01's: none are published
        counts={"train": (713,), "test": (351,)},
        train=lambda root, trial: tuple(_listed(root, f"train_{m}.txt", 0, m == "nir") for m in ("vis", "nir")),
        test=llcm_test,
        search_flags={"search": ("t2v", "v2t", "v2t-published")},
        sides=llcm_sides,
        # A query does not see the images of its person in the camera of its number.
        hidden=lambda q_pids, q_camids, g_pids, g_camids: (q_pids[:, None] == g_pids) & (q_camids[:, None] == g_camids),
    ),
}
