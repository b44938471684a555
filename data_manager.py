"""Disk -> lists: which image, person and camera is train, query or gallery. It reads no pixels.

SYSU-MM01 (491 persons)
    cam1 .. cam6/<person, 4 digits>/<image, 4 digits>.jpg     1, 2, 4, 5 visible, 3 and 6 infrared
    exp/train_id.txt, val_id.txt, test_id.txt                 person ids
RegDB (412 persons, 10 visible and 10 thermal images each; ten trials)
    idx/{train,test}_{visible,thermal}_<trial>.txt            an image a line: <path> <label>
LLCM (1,064 persons)
    idx/train_vis.txt, train_nir.txt                          an image a line: <path> <label>
    idx/test_id.txt                                           person ids
    test_vis/cam1 .. cam9/<person, 4 digits>/*.jpg            visible
    test_nir/cam1 .. cam9/<person, 4 digits>/*.jpg            infrared, without cam3
folder (a dataset of one's own)
    {train,test}/{visible,thermal}/<person>/*.jpg             <person>: any name; test is optional

Person ids are separated by commas, spaces or line ends. A person's folder may have fewer digits.
If anything of a listed person is left out, a warning or an error names it. "thermal" in names means
infrared.

Everything else about a dataset is its entry in `DATASETS`, at the end; docs/DATASETS.md says how to
add one. A list or a dataset that is missing or malformed on disk raises `InputError`.
"""

# "FIDELITY n" in docstrings and comments is row n of docs/FIDELITY.md.

import codecs
import itertools
import logging
import os
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from utils import InputError

SYNTHETIC_MARKER = "synthetic.json"  # tools.make_synthetic writes it into its datasets
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
UNKNOWN_CAMERA = 0
SYSTEM_FILES = ("thumbs.db", "desktop.ini")  # passed over without a warning, as hidden files are

log = logging.getLogger(__name__)


# ---- types --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """N images, as parallel columns."""

    paths: list[str]
    pids: np.ndarray  # (N,) int64, person ids
    camids: np.ndarray  # (N,) int64, camera numbers
    thermal: np.ndarray  # (N,) bool, which images are infrared

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: np.ndarray) -> "Split":
        """The images at these indices, in their order."""
        paths = [self.paths[i] for i in indices]
        return Split(paths, self.pids[indices], self.camids[indices], self.thermal[indices])

    def where(self, mask: np.ndarray) -> "Split":
        """The images for which a (N,) bool mask is true."""
        return self.take(np.flatnonzero(mask))


@dataclass(frozen=True)
class EvalTrial:
    """One trial of a protocol: the indices of its queries and its gallery in a `Split`."""

    protocol: str
    number: int
    query: np.ndarray
    gallery: np.ndarray


@dataclass(frozen=True)
class Selection:
    """The test images that are queries, or those from which the gallery is drawn."""

    mask: np.ndarray  # (N,) bool
    per_camera: int | None = None  # images to draw of each person in each camera; None: all


# A way to draw a gallery: ({(person, camera): indices}, per_camera, trial) -> indices.
DrawGallery = Callable[[dict[tuple[int, int], list[int]], int, int], np.ndarray]


@dataclass(frozen=True)
class Dataset:
    """All that the code knows about a dataset."""

    title: str
    defaults: dict[str, float | str]  # of the flags data_path, lr, epochs and w_hc
    # Numbers of the real dataset: "train" and "test" -> persons, visible, infrared images.
    counts: dict[str, tuple[int, ...]]
    # (root, trial) -> visible, infrared. `list_training_images` drops persons of one modality.
    train: Callable[[str, int | None], tuple[Split, Split]]
    test: Callable[[str, int | None], Split]  # (root, trial) -> all test images
    protocol_flags: dict[str, tuple[str, ...]]  # flag -> its values, the default first
    select: Callable[..., tuple[Selection, Selection]]  # (images, flags' values) -> query, gallery
    junk_mask: Callable[..., np.ndarray]  # (q_pids, q_camids, g_pids, g_camids) -> (Q, G) bool
    protocol_name: str = "{}"  # a template for the values of the protocol flags
    trials: range = range(10)  # their numbers
    thermal_cameras: tuple[int, ...] = ()  # for tools.score, where files do not tell the modality
    cmc_by_identity: bool = True  # CMC: the first r distinct persons; False: the first r images
    junk_rule: str = ""  # what `junk_mask` says, for an error
    preprocessed: bool = False  # train.py reads the arrays of pre_process_sysu.py, not image files
    train_list: str = ""  # of a preprocessed dataset: without this list, arrays are not compared
    optional_test_folder: str = ""  # where test images are, of a dataset that need not have any
    persons_are_folders: bool = False  # persons have names, those of the folders of their images
    one_model_per_trial: bool = False  # each trial has training persons of its own
    official_persons: int = 0  # for tools.score: number of rows of the official .mat files

    def lacks_test(self, root: str) -> bool:
        """Return whether the optional folder of test images is missing in ``root``."""
        folder = self.optional_test_folder
        return bool(folder) and not os.path.isdir(os.path.join(root, folder))

    def person_names(self, images: Split) -> dict[int, str]:
        """Return how people know the persons of some images, by person id."""
        if not self.persons_are_folders:
            return {pid: str(pid) for pid in np.unique(images.pids).tolist()}
        names = {}
        for path, pid in zip(images.paths, images.pids.tolist(), strict=True):
            names[pid] = os.path.basename(os.path.dirname(path))
        return names

    def protocol_values(self, choice: dict[str, str | None]) -> list[str]:
        """Return the value of each protocol flag: the chosen one, or the default."""
        values = []
        for flag, allowed in self.protocol_flags.items():
            values.append(choice.get(flag) or allowed[0])
        return values

    def protocols(self, choice: dict[str, str | None]) -> list[tuple[str, ...]]:
        """Return the values of the protocol flags for each chosen protocol.

        Args:
            choice: a value for protocol flags; "both" takes every value, LLCM's three, too.

        Raises:
            InputError: there is no such value.
        """
        values_of_flags = []
        values = self.protocol_values(choice)
        for value, (flag, allowed) in zip(values, self.protocol_flags.items(), strict=True):
            if value == "both":
                values_of_flags.append(allowed)
            elif value in allowed:
                values_of_flags.append((value,))
            else:
                words = flag.replace("_", "-")
                raise InputError(
                    f"{self.title} has no --{words} {value}: give {', '.join(allowed)} or both"
                )
        return list(itertools.product(*values_of_flags))

    def eval_trials(
        self,
        images: Split,
        choice: dict[str, str | None],
        trials: Iterable[int] | None = None,
        draw: DrawGallery | None = None,
    ) -> list[EvalTrial]:
        """Return the trials of the chosen protocols, protocol by protocol.

        Args:
            images: all test images. Their numbers are logged.
            choice: as `protocols` takes it.
            trials: their numbers; None: all.
            draw: how galleries are drawn; None: `draw_seeded`.

        Raises:
            InputError: there is no such protocol, or there are no queries or no gallery.
        """
        log_counts(images, self, "test")
        numbers = list(self.trials if trials is None else trials)
        draw = draw or draw_seeded
        eval_trials = []
        for values in self.protocols(choice):
            query_selection, gallery_selection = self.select(images, *values)
            queries = indices_of_trials(images, query_selection, numbers, draw)
            galleries = indices_of_trials(images, gallery_selection, numbers, draw)
            protocol = self.protocol_name.format(*values)
            for number, query, gallery in zip(numbers, queries, galleries, strict=True):
                eval_trials.append(EvalTrial(protocol, number, query, gallery))
        return eval_trials


# ---- SYSU-MM01 ----------------------------------------------------------------------------------
# Not every function uses its ``trial``: it has the signature of `Dataset.train` or `.test`.

SYSU_VISIBLE_CAMERAS = (1, 2, 4, 5)
SYSU_THERMAL_CAMERAS = (3, 6)
SYSU_CAMERAS = range(1, 7)
SYSU_TEST_LIST = "exp/test_id.txt"


def sysu_train(root: str, trial: int | None = None) -> tuple[Split, Split]:
    """List the visible and the infrared training images: persons, cameras and names ascending.

    The persons are those of train_id.txt and val_id.txt, 395 in the real dataset. Persons who were
    seen in one modality only are left out, with a warning (FIDELITY 25).

    Raises:
        InputError: a list is missing or malformed, or a person is on the list of test persons, too.
    """
    pids = read_ids(root, "exp/train_id.txt")
    pids += read_ids(root, "exp/val_id.txt", may_be_empty=True)
    if os.path.exists(os.path.join(root, SYSU_TEST_LIST)):
        check_disjoint(pids, read_ids(root, SYSU_TEST_LIST), root)
    images = sysu_images(root, pids, "train")
    return keep_common_persons(images.where(~images.thermal), images.where(images.thermal))


def check_disjoint(train_pids: list[int], test_pids: list[int], root: str) -> None:
    """Raise InputError if a person is both a training and a test person."""
    both = sorted(set(train_pids) & set(test_pids))
    if both:
        raise InputError(
            f"{root}/exp: persons on both a training list and the test list ({len(both)}): "
            f"{first_three(both)}. Scores would be too high: remove them from one of the two"
        )


def sysu_test(root: str, trial: int | None = None) -> Split:
    """List all images of the test persons: persons, cameras and names ascending."""
    return sysu_images(root, read_ids(root, SYSU_TEST_LIST), "test")


def sysu_images(root: str, pids: list[int], subset: str) -> Split:
    """List all images of some persons; warn of what is left out of ``subset``, train or test."""
    left_out = LeftOut(subset)
    images = images_in_cameras(root, pids, SYSU_CAMERAS, SYSU_THERMAL_CAMERAS, left_out)
    left_out.add_persons_without_images(pids, images)
    left_out.warn()
    return images


def sysu_select(images: Split, mode: str, gall_mode: str) -> tuple[Selection, Selection]:
    """Every infrared image is a query. The gallery has 1 or 10 images per person and camera."""
    cameras = {"all": SYSU_VISIBLE_CAMERAS, "indoor": (1, 2)}[mode]
    per_camera = {"single": 1, "multi": 10}[gall_mode]
    return Selection(images.thermal), Selection(np.isin(images.camids, cameras), per_camera)


def sysu_junk_mask(
    q_pids: np.ndarray, q_camids: np.ndarray, g_pids: np.ndarray, g_camids: np.ndarray
) -> np.ndarray:
    """(Q, G) bool: queries of camera 3 ignore camera 2, which looks at the same room."""
    return (q_camids == 3)[:, None] & (g_camids == 2)


def sysu_query(root: str, mode: str = "all") -> Split:
    """List the queries, 3,803 in the real dataset: all infrared test images, in every ``mode``."""
    images = sysu_test(root)
    return images.where(images.thermal)


def sysu_gallery(root: str, mode: str = "all", gall_mode: str = "single", trial: int = 0) -> Split:
    """List the gallery of one trial: 301 images in the real dataset by default."""
    images = sysu_test(root)
    choice = {"mode": mode, "gall_mode": gall_mode}
    (eval_trial,) = DATASETS["sysu"].eval_trials(images, choice, [trial])
    return images.take(eval_trial.gallery)


# ---- RegDB --------------------------------------------------------------------------------------


def regdb_split(root: str, trial: int, modality: str, subset: str) -> Split:
    """Read idx/<subset>_<modality>_<trial>.txt: 2,060 images in the real dataset.

    The person ids are the labels of the file. They have a meaning within one trial and subset only.

    Args:
        root: folder of the dataset.
        trial: 1 to 10.
        modality: "visible", which gets the camera number 1, or "thermal", which gets 2.
        subset: "train" or "test".
    """
    thermal = modality == "thermal"
    camid = 2 if thermal else 1
    return images_in_list(root, f"idx/{subset}_{modality}_{trial}.txt", camid, thermal)


def regdb_train(root: str, trial: int) -> tuple[Split, Split]:
    """List the visible and the thermal training images of a trial."""
    visible = regdb_split(root, trial, "visible", "train")
    thermal = regdb_split(root, trial, "thermal", "train")
    return visible, thermal


def regdb_test(root: str, trial: int) -> Split:
    """List the test images of a trial, the visible ones first."""
    visible = regdb_split(root, trial, "visible", "test")
    thermal = regdb_split(root, trial, "thermal", "test")
    return concatenate(visible, thermal)


def regdb_select(images: Split, search: str) -> tuple[Selection, Selection]:
    """All images of one modality query all of the other; "v2t": visible query thermal images."""
    query_is_thermal = search == "t2v"
    query = images.thermal == query_is_thermal
    return Selection(query), Selection(~query)


def no_junk(
    q_pids: np.ndarray, q_camids: np.ndarray, g_pids: np.ndarray, g_camids: np.ndarray
) -> np.ndarray:
    """(Q, G) bool: every gallery image counts for every query."""
    return np.zeros((len(q_pids), len(g_pids)), bool)


# ---- LLCM ---------------------------------------------------------------------------------------

LLCM_CAMERAS = range(1, 10)  # both modalities use the same numbers


def llcm_train(root: str, trial: int | None = None) -> tuple[Split, Split]:
    """List the visible and the infrared training images: the lists name no camera."""
    visible = images_in_list(root, "idx/train_vis.txt", UNKNOWN_CAMERA, thermal=False)
    thermal = images_in_list(root, "idx/train_nir.txt", UNKNOWN_CAMERA, thermal=True)
    return visible, thermal


def llcm_test(root: str, trial: int | None = None) -> Split:
    """List all test images, the visible ones first: persons, cameras and names ascending."""
    pids = read_ids(root, "idx/test_id.txt")
    visible_folder = os.path.join(root, "test_vis")
    thermal_folder = os.path.join(root, "test_nir")
    left_out = LeftOut("test")
    visible = images_in_cameras(visible_folder, pids, LLCM_CAMERAS, (), left_out)
    thermal = images_in_cameras(thermal_folder, pids, LLCM_CAMERAS, LLCM_CAMERAS, left_out)
    images = concatenate(visible, thermal)
    left_out.add_persons_without_images(pids, images)
    left_out.warn()
    return images


def llcm_select(images: Split, search: str) -> tuple[Selection, Selection]:
    """All images of one modality query one image per person and camera of the other.

    "t2v": infrared query visible images; "v2t": visible query infrared images. In "v2t-published",
    the dataset's own evaluation of "v2t", the drawn infrared images query all visible ones
    (FIDELITY 26).
    """
    thermal = images.thermal
    visible = ~images.thermal
    if search == "t2v":
        return Selection(thermal), Selection(visible, per_camera=1)
    if search == "v2t":
        return Selection(visible), Selection(thermal, per_camera=1)
    return Selection(thermal, per_camera=1), Selection(visible)


def llcm_junk_mask(
    q_pids: np.ndarray, q_camids: np.ndarray, g_pids: np.ndarray, g_camids: np.ndarray
) -> np.ndarray:
    """(Q, G) bool: a query ignores images of its own person whose camera has its own number."""
    same_person = q_pids[:, None] == g_pids
    same_camera = q_camids[:, None] == g_camids
    return same_person & same_camera


# ---- --dataset folder ---------------------------------------------------------------------------

FOLDER_CAMERAS = {"visible": 1, "thermal": 2}


def folder_train(root: str, trial: int | None = None) -> tuple[Split, Split]:
    """List the visible and the infrared images below train/."""
    images = folder_images(root, "train")
    return images.where(~images.thermal), images.where(images.thermal)


def folder_test(root: str, trial: int | None = None) -> Split:
    """List all images below test/, the visible ones first."""
    return folder_images(root, "test")


def folder_images(root: str, subset: str) -> Split:
    """List the images in <subset>/{visible,thermal}/<person>/: persons and names ascending.

    Persons are numbered from 0, in the sorted order of the names of their folders.

    Raises:
        InputError: there is no such folder, or a person is in train and in test.
    """
    if not os.path.isdir(os.path.join(root, subset)):
        raise InputError(
            f"{root} has no folder {subset}: is --data-path right? It must hold "
            f"{subset}/visible/<person>/ and {subset}/thermal/<person>/"
        )
    check_folders_disjoint(root)
    left_out = LeftOut(subset)
    folders = folders_of_persons(root, subset, left_out)
    names = sorted(names_of_persons(folders))
    rows = []
    for modality, camid in FOLDER_CAMERAS.items():
        for pid, name in enumerate(names):
            if (modality, name) in folders:
                for path in image_files(folders[modality, name], left_out):
                    rows.append((path, pid, camid, modality == "thermal"))
    images = split_of_rows(rows)
    for pid in sorted(set(range(len(names))) - set(images.pids.tolist())):
        left_out.add("persons without any image", names[pid])
    left_out.warn()
    return images


def folders_of_persons(root: str, subset: str, left_out: "LeftOut") -> dict[tuple[str, str], str]:
    """Return {(modality, person): folder} of all folders <subset>/{visible,thermal}/<person>/.

    Unicode has two encodings for a letter with an accent: both are the same person.

    Raises:
        InputError: a person has two folders in a modality.
    """
    folders = {}
    for entry in entries_of(os.path.join(root, subset)):
        if entry.name not in FOLDER_CAMERAS or not is_folder(entry):
            left_out.add("entries other than the folders visible and thermal", entry.path)
            continue
        for person in entries_of(entry.path):
            if not is_folder(person):
                left_out.add("entries outside of the persons' folders", person.path)
                continue
            key = (entry.name, unicodedata.normalize("NFC", person.name))
            if key in folders:
                raise InputError(
                    f"{folders[key]} and {person.path} are folders of the same person: merge them"
                )
            folders[key] = person.path
    return folders


def names_of_persons(folders: dict[tuple[str, str], str]) -> set[str]:
    """Return the names of the persons, of all modalities."""
    return {name for _, name in folders}


def check_folders_disjoint(root: str) -> None:
    """Raise InputError if a person is in train and in test."""
    # `folder_images` warns of what is left out: these are discarded.
    train = folders_of_persons(root, "train", LeftOut("train"))
    test = folders_of_persons(root, "test", LeftOut("test"))
    both = sorted(names_of_persons(train) & names_of_persons(test))
    if both:
        raise InputError(
            f"{root}: persons in train and in test ({len(both)}): {first_three(both)}. Scores "
            "would be too high: remove them from one of the two, or rename the folder of another "
            "person of the same name"
        )


# ---- query and gallery --------------------------------------------------------------------------


def indices_of_trials(
    images: Split, selection: Selection, trials: list[int], draw: DrawGallery
) -> list[np.ndarray]:
    """Return the indices of the selected images, for each of the trials.

    Raises:
        InputError: there are none.
    """
    if not selection.mask.any():
        n_thermal = int(images.thermal.sum())
        cameras = sorted(set(images.camids.tolist()))
        raise InputError(
            f"the query or the gallery is empty: the test persons have {len(images) - n_thermal} "
            f"visible and {n_thermal} infrared images, of cameras {cameras}: "
            "are --data-path and the protocol flags right?"
        )
    if selection.per_camera is None:
        return [np.flatnonzero(selection.mask) for _ in trials]
    groups = group_by_camera(images, selection.mask)
    n_short = sum(len(group) < selection.per_camera for group in groups.values())
    if n_short:
        log.warning(
            "%d (person, camera) pairs have fewer than %d images to draw; all are used",
            n_short,
            selection.per_camera,
        )
    return [draw(groups, selection.per_camera, trial) for trial in trials]


def group_by_camera(images: Split, mask: np.ndarray) -> dict[tuple[int, int], list[int]]:
    """Return {(person, camera): indices, in the order of paths}, keys ascending."""
    groups = {}
    for i in sorted(np.flatnonzero(mask), key=lambda i: images.paths[i]):
        key = (int(images.pids[i]), int(images.camids[i]))
        groups.setdefault(key, []).append(i)
    return dict(sorted(groups.items()))


def draw_seeded(
    groups: dict[tuple[int, int], list[int]], per_camera: int, trial: int
) -> np.ndarray:
    """Draw up to ``per_camera`` images of each person and camera: persons ascending, then cameras.

    The trial is the seed (FIDELITY 11). One image each is drawn by Python's generator, as in the
    field's baseline, AGW; several are drawn by numpy's, without replacement.
    """
    python_random = random.Random(trial)
    numpy_random = np.random.RandomState(trial)
    indices = []
    for group in groups.values():
        if per_camera == 1:
            indices.append(python_random.choice(group))
        else:
            n = min(per_camera, len(group))
            indices.extend(numpy_random.choice(group, n, replace=False))
    return np.array(indices)


def keep_used(images: Split, trials: list[EvalTrial]) -> tuple[Split, list[EvalTrial]]:
    """Drop the images that no trial uses, and change the indices of the trials accordingly."""
    used = [trial.query for trial in trials] + [trial.gallery for trial in trials]
    used = np.unique(np.concatenate(used))
    new_trials = []
    for trial in trials:
        query = np.searchsorted(used, trial.query)
        gallery = np.searchsorted(used, trial.gallery)
        new_trials.append(EvalTrial(trial.protocol, trial.number, query, gallery))
    return images.take(used), new_trials


# ---- training images and test images ------------------------------------------------------------


def list_training_images(
    dataset: Dataset, root: str, trial: int | None, may_be_missing: bool = False
) -> Split | None:
    """List the training images of all persons who have visible and infrared ones; log how many.

    Args:
        dataset: the dataset.
        root: its folder.
        trial: number of the model's trial, for RegDB.
        may_be_missing: return None if there are no images or no lists of them, for some people
            keep the arrays of pre_process_sysu.py alone.

    Returns:
        The images, the visible ones first.

    Raises:
        InputError: a list is missing or malformed, an image on it is missing, or there are none.
    """
    if may_be_missing and not os.path.exists(os.path.join(root, dataset.train_list)):
        return None
    visible, thermal = dataset.train(root, trial)
    names = dataset.person_names(concatenate(visible, thermal))
    # `relabel` numbers each modality by itself: both must have the same persons.
    images = concatenate(*keep_common_persons(visible, thermal, names))
    if len(images):
        check_images_exist(images)
        log_counts(images, dataset, "train")
        return images
    if may_be_missing:
        return None
    raise InputError(
        f"{root}: no training person has images in both modalities; "
        "the README shows the folders that are expected"
    )


def keep_common_persons(
    visible: Split, thermal: Split, names: dict[int, str] | None = None
) -> tuple[Split, Split]:
    """Drop persons who were seen in one modality only, with a warning (FIDELITY 25).

    ``names``: {person id: name} for the warning; None: the ids.
    """
    in_one_modality = np.setxor1d(visible.pids, thermal.pids)
    if len(in_one_modality):
        dropped = in_one_modality.tolist()
        if names is not None:
            dropped = [names[pid] for pid in dropped]
        log.warning(
            "left out of training, since they have images in one modality only (%d): persons %s",
            len(dropped),
            first_three(dropped),
        )
    visible = visible.where(~np.isin(visible.pids, in_one_modality))
    thermal = thermal.where(~np.isin(thermal.pids, in_one_modality))
    return visible, thermal


def check_no_shared_images(train: Split, test: Split) -> None:
    """Raise InputError if an image file is both a training and a test image. All must exist."""
    test_files = {file_identity(path) for path in test.paths}
    both = [path for path in train.paths if file_identity(path) in test_files]
    if both:
        raise InputError(
            f"files that are both training and test images ({len(both)}): {first_three(both)}. "
            "Scores would be too high: remove them from one of the two"
        )


def check_images_exist(images: Split) -> None:
    """Raise InputError if an image is missing. Reading would notice it only after some time."""
    missing = [path for path in images.paths if not os.path.isfile(path)]
    if missing:
        raise InputError(
            f"{first_three(missing)} not found ({len(missing)} images), or a broken link: "
            "is --data-path right?"
        )


def file_identity(path: str) -> tuple[int, int]:
    """Return device and inode, which are equal for all paths of a file."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def log_counts(images: Split, dataset: Dataset, subset: str) -> None:
    """Log how many persons and images there are, and in which cameras.

    Warn of files that are listed twice. Warn if this looks like the real dataset, but has other
    numbers of persons or images: small and synthetic datasets have other numbers of persons.
    """
    n_persons = len(np.unique(images.pids))
    n_thermal = int(images.thermal.sum())
    counts = (n_persons, len(images) - n_thermal, n_thermal)
    cameras = [str(camid) for camid in np.unique(images.camids) if camid != UNKNOWN_CAMERA]
    log.info(
        "%s: %d persons, %d visible and %d infrared images, cameras %s",
        subset,
        *counts,
        ", ".join(cameras) or "unknown",
    )
    times_listed = Counter(os.path.normpath(path) for path in images.paths)
    repeated = [path for path, times in times_listed.items() if times > 1]
    if repeated:
        log.warning(
            "%s: listed more than once (%d): %s", subset, len(repeated), first_three(repeated)
        )
    expected = dataset.counts.get(subset)
    if not expected:
        return
    compared_counts = counts[: len(expected)]  # of LLCM only the persons are known
    is_about_as_large = abs(n_persons - expected[0]) <= expected[0] // 10
    if is_about_as_large and compared_counts != expected:
        log.warning(
            "%s: %d persons, %d visible and %d infrared images, but %s has %s: is it complete?",
            subset,
            *counts,
            dataset.title,
            ", ".join(str(number) for number in expected),
        )


# ---- what the datasets share --------------------------------------------------------------------


def concatenate(visible: Split, thermal: Split) -> Split:
    """Join two splits, the visible one first."""
    return Split(
        visible.paths + thermal.paths,
        np.concatenate([visible.pids, thermal.pids]),
        np.concatenate([visible.camids, thermal.camids]),
        np.concatenate([visible.thermal, thermal.thermal]),
    )


def relabel(pids: np.ndarray) -> np.ndarray:
    """Return class labels 0..n-1, in ascending order of person id (FIDELITY 2)."""
    _, labels = np.unique(pids, return_inverse=True)
    return labels


def is_synthetic(root: str) -> bool:
    """Return whether tools.make_synthetic made this dataset."""
    return os.path.exists(os.path.join(root, SYNTHETIC_MARKER))


def split_of_rows(rows: list[tuple[str, int, int, bool]]) -> Split:
    """Make a `Split` from (path, person, camera, is infrared) rows."""
    return Split(
        [path for path, _, _, _ in rows],
        np.array([pid for _, pid, _, _ in rows], np.int64),
        np.array([camid for _, _, camid, _ in rows], np.int64),
        np.array([thermal for _, _, _, thermal in rows], bool),
    )


def first_three(names: list) -> str:
    """Return the first three names, for a message."""
    words = [str(name) for name in names[:3]]
    if len(names) > 3:
        words.append("...")
    return ", ".join(words)


# ---- listing folders ----------------------------------------------------------------------------


class LeftOut:
    """What is left out while folders are listed. `warn` logs a line for each kind of it.

    Args:
        source: what is listed, for the warnings: "train", "test" or the flag of a folder.
    """

    def __init__(self, source: str):
        self.source = source
        self.names = {}  # kind -> what is left out

    def add(self, kind: str, name: str | int) -> None:
        self.names.setdefault(kind, []).append(name)

    def add_persons_without_images(self, pids: list[int], images: Split) -> None:
        """Add the persons who have no image.

        If nobody has one, nothing is added: whoever needs the images raises an error.
        """
        if len(images):
            for pid in sorted(set(pids) - set(images.pids.tolist())):
                self.add("persons on the list without any image", pid)

    def warn(self) -> None:
        for kind, names in self.names.items():
            log.warning(
                "%s: left out: %s (%d): %s", self.source, kind, len(names), first_three(names)
            )


def images_in_cameras(
    root: str,
    pids: Iterable[int],
    cameras: Iterable[int],
    thermal_cameras: Iterable[int],
    left_out: LeftOut,
) -> Split:
    """List the images in cam<camera>/<person>/ below ``root``: persons, cameras, names ascending.

    Raises:
        InputError: a person has two folders in a camera.
    """
    folders = person_folders(root, cameras, left_out)
    rows = []
    for pid in sorted(set(pids)):
        for camid in cameras:
            if (pid, camid) in folders:  # not every camera saw every person
                for path in image_files(folders[pid, camid], left_out):
                    rows.append((path, pid, camid, camid in thermal_cameras))
    return split_of_rows(rows)


def person_folders(
    root: str, cameras: Iterable[int], left_out: LeftOut
) -> dict[tuple[int, int], str]:
    """Return {(person, camera): folder} of all folders cam<camera>/<person>/ below ``root``."""
    names = [f"cam{camid}" for camid in cameras]
    for entry in entries_of(root):
        is_camera = entry.name in names and is_folder(entry)
        if entry.name.lower().startswith("cam") and not is_camera:
            left_out.add("what is named cam, but is no camera folder of this dataset", entry.path)

    folders = {}
    for camid, name in zip(cameras, names, strict=True):
        for entry in entries_of(os.path.join(root, name)):
            if not is_folder(entry) or not re.fullmatch("[0-9]{1,9}", entry.name):
                left_out.add("entries of camera folders that are not person folders", entry.path)
                continue
            key = (int(entry.name), camid)
            if key in folders:
                raise InputError(
                    f"{folders[key]} and {entry.path} are folders of the same person: merge them"
                )
            folders[key] = entry.path
    return folders


def image_files(folder: str, left_out: LeftOut) -> list[str]:
    """Return the paths of a folder's image files, sorted (FIDELITY 25).

    The list is empty where there is no such folder.
    """
    paths = []
    for entry in entries_of(folder):
        if is_folder(entry):
            left_out.add("folders where images are expected", entry.path)
        elif is_image_file(entry, left_out):
            paths.append(entry.path)
    return paths


def images_below(folder: str, left_out: LeftOut, parents: tuple[str, ...] = ()) -> list[str]:
    """Return the paths of the image files in a folder and all of its sub-folders, in sorted order.

    ``parents``: the real paths of the folders around it. To follow a link to one of them would
    never end.
    """
    real_path = os.path.realpath(folder)
    if real_path in parents:
        left_out.add("links to a folder that contains them", folder)
        return []
    paths = []
    for entry in entries_of(folder):
        if is_folder(entry):
            paths += images_below(entry.path, left_out, (*parents, real_path))
        elif is_image_file(entry, left_out):
            paths.append(entry.path)
    return paths


def is_image_file(entry: os.DirEntry, left_out: LeftOut) -> bool:
    """Return whether a file is an image, by its suffix; other files are added to ``left_out``."""
    if entry.name.lower().endswith(IMAGE_SUFFIXES):
        return True
    left_out.add(f"files other than {', '.join(IMAGE_SUFFIXES)}", entry.path)
    return False


def is_folder(entry: os.DirEntry) -> bool:
    """Return whether this is a folder or a link to one. A link to itself is none."""
    return os.path.isdir(entry.path)  # entry.is_dir() would raise OSError for such a link


def entries_of(folder: str) -> list[os.DirEntry]:
    """Return what a folder holds, by name; nothing where there is no such folder.

    Hidden files and those of operating systems are not listed.
    """
    if not os.path.isdir(folder):
        return []
    with os.scandir(folder) as all_entries:
        entries = list(all_entries)
    entries = [entry for entry in entries if not entry.name.startswith(".")]
    entries = [entry for entry in entries if entry.name.lower() not in SYSTEM_FILES]
    return sorted(entries, key=lambda entry: entry.name)


# ---- lists --------------------------------------------------------------------------------------


def images_in_list(root: str, name: str, camid: int, thermal: bool) -> Split:
    """Read a list of images, '<path below root> <person id>' a line.

    Both / and \\ separate the folders of a path.
    """
    index = os.path.join(root, *name.split("/"))
    rows = []
    for number, line in enumerate(read_lines(index, root), 1):
        if not line.strip():
            continue
        match = re.fullmatch(r"(\S.*)\s([0-9]{1,9})", line.strip().replace("\\", "/"))
        if match is None or leaves_folder(match[1]):
            raise InputError(
                f"{index}, line {number}: {line[:100]!r} is not '<path below {root}> <person id>'"
            )
        path = os.path.join(root, match[1].rstrip())
        rows.append((path, int(match[2]), camid, thermal))
    if not rows:
        raise InputError(f"{index} lists no image: is the dataset complete?")
    return split_of_rows(rows)


def leaves_folder(path: str) -> bool:
    """Return whether a relative path, with / between folders, may lead out of its folder."""
    return os.path.isabs(path) or ".." in path.split("/")


def read_ids(root: str, name: str, may_be_empty: bool = False) -> list[int]:
    """Read the person ids of a file, separated by commas, spaces or line ends.

    Raises:
        InputError: the file is missing or holds something else, or it holds nothing.
    """
    path = os.path.join(root, *name.split("/"))
    pids = []
    for number, line in enumerate(read_lines(path, root), 1):
        for word in line.replace(",", " ").split():
            if not re.fullmatch("[0-9]{1,9}", word):
                raise InputError(
                    f"{path}, line {number}: {word[:60]!r} is not a person id: write "
                    "whole numbers of at most 9 digits, like 1,2,3, on one line or more"
                )
            pids.append(int(word))
    if not pids and not may_be_empty:
        raise InputError(f"{path} holds no person id: is the dataset complete?")
    return pids


def read_lines(path: str, root: str) -> list[str]:
    """Read the lines of a text file, in UTF-8 or, with a byte order mark, in UTF-16.

    Raises:
        InputError: it is missing from the dataset in ``root``, or in another encoding.
    """
    if not os.path.isfile(path):
        raise InputError(
            f"{path} not found: is the dataset in {root}? --data-path names its folder"
        )
    with open(path, "rb") as file:
        content = file.read()
    encoding = "utf-8-sig"  # which drops a byte order mark, if there is one
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        text = None
    if text is None or "\0" in text:  # UTF-16 without a mark and UTF-32 have zeros
        raise InputError(f"{path} is in another encoding than UTF-8: save it as UTF-8")
    return re.split("\r\n|\r|\n", text)


# ---- the datasets -------------------------------------------------------------------------------

DATASETS = {
    "sysu": Dataset(
        title="SYSU-MM01",
        defaults={"data_path": "data/SYSU-MM01", "lr": 0.008, "epochs": 60, "w_hc": 0.6},
        counts={"train": (395, 22258, 11909), "test": (96, 6775, 3803)},
        train=sysu_train,
        test=sysu_test,
        protocol_flags={"mode": ("all", "indoor"), "gall_mode": ("single", "multi")},
        protocol_name="{}-search {}-shot",
        select=sysu_select,
        junk_mask=sysu_junk_mask,
        thermal_cameras=SYSU_THERMAL_CAMERAS,
        junk_rule="queries of camera 3 ignore images of camera 2",
        preprocessed=True,
        train_list="exp/train_id.txt",
        official_persons=533,
    ),
    "regdb": Dataset(
        title="RegDB",
        defaults={"data_path": "data/RegDB", "lr": 0.0098, "epochs": 80, "w_hc": 0.58},
        counts={"train": (206, 2060, 2060), "test": (206, 2060, 2060)},
        train=regdb_train,
        test=regdb_test,
        protocol_flags={"search": ("v2t", "t2v")},
        select=regdb_select,
        junk_mask=no_junk,
        trials=range(1, 11),
        thermal_cameras=(2,),
        cmc_by_identity=False,
        one_model_per_trial=True,
    ),
    "llcm": Dataset(
        title="LLCM",
        # SYSU-MM01's settings: none are published.
        defaults={"data_path": "data/LLCM", "lr": 0.008, "epochs": 60, "w_hc": 0.6},
        counts={"train": (713,), "test": (351,)},
        train=llcm_train,
        test=llcm_test,
        protocol_flags={"search": ("t2v", "v2t", "v2t-published")},
        select=llcm_select,
        junk_mask=llcm_junk_mask,
        junk_rule="a query ignores images of its person in the camera of its own number",
    ),
    "folder": Dataset(
        title="own dataset",
        # SYSU-MM01's settings, untuned.
        defaults={"data_path": "data/folder", "lr": 0.008, "epochs": 60, "w_hc": 0.6},
        counts={},
        train=folder_train,
        test=folder_test,
        protocol_flags={"search": ("t2v", "v2t")},
        select=regdb_select,
        junk_mask=no_junk,
        trials=range(1),
        thermal_cameras=(FOLDER_CAMERAS["thermal"],),
        cmc_by_identity=False,
        optional_test_folder="test",
        persons_are_folders=True,
    ),
}
