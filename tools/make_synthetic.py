"""Make images of synthetic people, laid out like SYSU-MM01, RegDB, LLCM or --dataset folder.

    python -m tools.make_synthetic --dataset sysu  --out data/toy --ids 130 --seed 0
    python -m tools.make_synthetic --dataset regdb --out data/toy_regdb --full

The real datasets are under licence; these trees can stand in for them in tests and demos. With
--full they have as many persons and images. RegDB has ten images per person and camera, always.

A synthetic person is a set of attributes. Build, hair, bag, garment shapes and patterns show in
both modalities. Colours show in visible light alone, infrared reflectances in infrared alone.
--difficulty sets how far the modalities agree and how much the cameras differ: "easy" people look
alike in all cameras, "hard" ones are too much for a small network.

Each image has its own stream of random numbers. So a tree is the same byte for byte whatever
--workers says, as long as the version of Pillow stays the same.
"""

import argparse
import functools
import json
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from tqdm import tqdm

# `python tools/make_synthetic.py` would search for modules in tools/ alone.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from data_loader import ignore_ctrl_c
from data_manager import SYNTHETIC_MARKER
from tools.synthetic_people import DIFFICULTIES, SPLIT, TRIAL, VERSION, draw_image


class ImageKey(NamedTuple):
    """Which image a file holds: arguments of `draw_image`."""

    pid: int
    camera_id: int
    index: int


@dataclass
class Tree:
    """The content of a dataset's folder, by path within the folder."""

    images: dict[str, ImageKey] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


# ---- SYSU-MM01 -----------------------------------------------------------------------------------

# Of the real set: the number of persons in each set of cameras. Persons of "none" are in no list.
REAL_CAMERA_SETS = {
    "train": {
        "123456": 180,
        "345": 92,
        "12356": 11,
        "3456": 5,
        "12456": 3,
        "35": 2,
        "34": 2,
        "23456": 1,
    },
    "val": {"345": 96, "34": 3},
    "test": {"123456": 53, "3456": 37, "12456": 2, "456": 1, "346": 1, "12356": 1, "356": 1},
    "none": {"45": 10, "1245": 6, "6": 2, "12": 2, "145": 1, "36": 1},
}
# Of the real set: split -> camera -> number of images, and the least and the most of one person.
REAL_IMAGE_TOTALS = {
    "train": {
        1: (4721, 2, 50),
        2: (5753, 7, 88),
        3: (5929, 20, 40),
        4: (4821, 8, 30),
        5: (4989, 9, 27),
        6: (4000, 20, 20),
    },
    "val": {3: (1980, 20, 20), 4: (990, 10, 10), 5: (984, 10, 30)},
    "test": {
        1: (1374, 13, 42),
        2: (1565, 18, 40),
        3: (1883, 20, 26),
        4: (1918, 20, 27),
        5: (1918, 20, 24),
        6: (1920, 20, 20),
    },
    "none": {
        1: (194, 16, 29),
        2: (210, 11, 39),
        3: (20, 20, 20),
        4: (301, 10, 24),
        5: (333, 10, 50),
        6: (60, 20, 20),
    },
}
Splits = dict[str, list[int]]  # split -> person ids
Counts = dict[int, dict[int, int]]  # person id -> camera -> number of images


def real_sysu(seed: int) -> tuple[Splits, Counts]:
    """Plan the real set's sizes: 513 persons, 30,071 RGB images and 15,792 infrared images."""
    rng = np.random.default_rng([seed, SPLIT])
    pids = 1 + rng.permutation(513)
    unused_pids = iter(pids.tolist())
    splits = {}
    counts = {}
    for split, persons_by_cameras in REAL_CAMERA_SETS.items():
        cameras_of = {}
        for cameras, n_persons in persons_by_cameras.items():
            for _ in range(n_persons):
                cameras_of[next(unused_pids)] = cameras
        splits[split] = sorted(cameras_of)
        for camera_id, (total, least, most) in REAL_IMAGE_TOTALS[split].items():
            pids_here = [pid for pid in cameras_of if str(camera_id) in cameras_of[pid]]
            for pid, count in sample_counts(pids_here, total, least, most, rng).items():
                counts.setdefault(pid, {})[camera_id] = count
    return splits, counts


def sample_counts(
    pids: list[int], total: int, least: int, most: int, rng: np.random.Generator
) -> dict[int, int]:
    """Return each person's number of images in one camera, with the given sum and extremes.

    The first person has the least and the second one the most.
    """
    counts = dict.fromkeys(pids, least)
    most_extra = most - least
    n_extra = total - least * len(pids)
    if len(pids) > 1:
        counts[pids[1]] += most_extra
        n_extra -= most_extra
    # Shuffle the places that are still free and fill the first `n_extra`; a person has `most_extra`
    # places.
    free_places = rng.permutation(np.repeat(pids[2:], most_extra))
    for pid in free_places[:n_extra].tolist():
        counts[pid] += 1
    return counts


def small_sysu(n_persons: int, n_images: int, seed: int) -> tuple[Splits, Counts]:
    """Plan a set with about `n_images` images of a person in each camera they pass.

    Camera sets follow the real test split, whose persons are in cameras 1 and 2 together or in
    neither. The first person of every split is in all six cameras, so that every query and gallery
    selection holds an image.
    """
    rng = np.random.default_rng([seed, SPLIT])
    n_val = max(1, round(n_persons * 99 / 491))
    n_test = max(2, round(n_persons * 96 / 491))
    n_train = n_persons - n_val - n_test
    pids = (1 + rng.permutation(n_persons)).tolist()
    splits = {
        "train": pids[:n_train],
        "val": pids[n_train : n_train + n_val],
        "test": pids[n_train + n_val :],
    }
    camera_sets = list(REAL_CAMERA_SETS["test"])
    persons_of_sets = np.array(list(REAL_CAMERA_SETS["test"].values()))
    camera_set_shares = persons_of_sets / persons_of_sets.sum()
    counts = {}
    for split, split_pids in splits.items():
        least = 1
        if split == "test" and n_images >= 9:
            least = 10  # a multi-shot gallery has ten images of each person and camera
        for pid in split_pids:
            cameras = "123456"
            if pid != split_pids[0]:
                cameras = rng.choice(camera_sets, p=camera_set_shares)
            counts[pid] = {}
            for camera in cameras:
                # As uneven as in the real set.
                sd = 0.2 if camera in "12" else 0.04
                deviation = rng.normal(0, sd)
                counts[pid][int(camera)] = max(least, round(n_images * (1 + deviation)))
    return splits, counts


def sysu_tree(n_persons: int | None, n_images: int | None, seed: int) -> Tree:
    """Plan cam<n>/<id>/<image>.jpg and exp/{train,val,test}_id.txt.

    None stands for the persons and images of the real set, here and in the other layouts.
    """
    if n_persons is None:
        splits, counts = real_sysu(seed)
    else:
        splits, counts = small_sysu(n_persons, n_images, seed)
    tree = Tree()
    for pid, counts_of_person in counts.items():
        for camera_id, count in counts_of_person.items():
            for index in range(1, count + 1):
                path = f"cam{camera_id}/{pid:04d}/{index:04d}.jpg"
                tree.images[path] = ImageKey(pid, camera_id, index)
    for split in ("train", "val", "test"):
        tree.texts[f"exp/{split}_id.txt"] = comma_separated(sorted(splits[split]))
    return tree


def comma_separated(pids: list[int]) -> str:
    """Join person ids to one line, as in the lists of SYSU-MM01 and LLCM."""
    return ",".join(str(pid) for pid in pids) + "\n"


# ---- RegDB ---------------------------------------------------------------------------------------

REGDB_CAMERA_IDS = {"visible": 7, "thermal": 8}


def regdb_tree(n_persons: int | None, n_images: int, seed: int) -> Tree:
    """Plan {Visible,Thermal}/<id>/*.bmp and ten random halvings in idx/."""
    n_persons = n_persons or 412
    tree = Tree()
    for pid in range(1, n_persons + 1):
        for modality, camera_id in REGDB_CAMERA_IDS.items():
            for index in range(1, n_images + 1):
                tree.images[regdb_path(modality, pid, index)] = ImageKey(pid, camera_id, index)
    for trial, halving in enumerate(regdb_halvings(n_persons, seed), start=1):
        for modality in REGDB_CAMERA_IDS:
            for subset, pids in halving.items():
                name = f"idx/{subset}_{modality}_{trial}.txt"
                tree.texts[name] = regdb_list(modality, pids, n_images)
    return tree


def regdb_list(modality: str, pids: list[int], n_images: int) -> str:
    """Return one line an image, with its path and its label."""
    lines = []
    for label, pid in enumerate(pids):
        for index in range(1, n_images + 1):
            lines.append(f"{regdb_path(modality, pid, index)} {label}\n")
    return "".join(lines)


def regdb_path(modality: str, pid: int, index: int) -> str:
    """Return for example Visible/7/person_v_0001.bmp."""
    return f"{modality.capitalize()}/{pid}/person_{modality[0]}_{index:04d}.bmp"


def regdb_halvings(n_persons: int, seed: int) -> list[dict[str, list[int]]]:
    """Return the person ids of "train" and "test" in ten trials, no two of them alike."""
    rng = np.random.default_rng([seed, TRIAL])
    halvings = []
    while len(halvings) < 10:
        pids = (1 + rng.permutation(n_persons)).tolist()
        train = sorted(pids[: n_persons // 2])
        test = sorted(pids[n_persons // 2 :])
        halving = {"train": train, "test": test}
        if halving not in halvings:
            halvings.append(halving)
    return halvings


# ---- LLCM ----------------------------------------------------------------------------------------

# LLCM has nine cameras, and all but the third of them also see in near infrared. Its own number of
# a camera is the last digit.
LLCM_CAMERA_IDS = {
    "vis": (11, 12, 13, 14, 15, 16, 17, 18, 19),
    "nir": (21, 22, 24, 25, 26, 27, 28, 29),
}


def llcm_tree(n_persons: int | None, n_images: int, seed: int) -> Tree:
    """Plan {vis,nir}/<id>/*.jpg, test_{vis,nir}/cam<n>/<id>/*.jpg, and the lists of idx/.

    Each person passes three cameras in each modality, with `n_images` images each.
    """
    n_persons = n_persons or 1064
    n_train = round(n_persons * 713 / 1064)
    rng = np.random.default_rng([seed, SPLIT])
    pids = (1 + rng.permutation(n_persons)).tolist()
    labels = {pid: label for label, pid in enumerate(sorted(pids[:n_train]))}
    tree = Tree()
    tree.texts["idx/test_id.txt"] = comma_separated(sorted(pids[n_train:]))
    for modality, camera_ids in LLCM_CAMERA_IDS.items():
        training_lines = []
        for pid in range(1, n_persons + 1):
            for camera_id in sorted(rng.choice(camera_ids, 3, replace=False).tolist()):
                number = camera_id % 10
                folder = modality
                if pid not in labels:
                    folder = f"test_{modality}/cam{number}"
                for index in range(1, n_images + 1):
                    path = f"{folder}/{pid:04d}/{pid:04d}_c{number:02d}_{index:04d}_{modality}.jpg"
                    tree.images[path] = ImageKey(pid, camera_id, index)
                    if pid in labels:
                        training_lines.append(f"{path} {labels[pid]}\n")
        tree.texts[f"idx/train_{modality}.txt"] = "".join(training_lines)
    return tree


# ---- a dataset of one's own ----------------------------------------------------------------------


def folder_tree(n_persons: int, n_images: int, seed: int) -> Tree:
    """Plan {train,test}/{visible,thermal}/<person>/*.jpg; a fifth of the persons are in test.

    The modalities have RegDB's cameras, with `n_images` images of each person.
    """
    rng = np.random.default_rng([seed, SPLIT])
    n_test = max(2, n_persons // 5)
    test_pids = set((1 + rng.permutation(n_persons))[:n_test].tolist())
    tree = Tree()
    for pid in range(1, n_persons + 1):
        subset = "test" if pid in test_pids else "train"
        for modality, camera_id in REGDB_CAMERA_IDS.items():
            for index in range(1, n_images + 1):
                path = f"{subset}/{modality}/person_{pid:04d}/{index:04d}.jpg"
                tree.images[path] = ImageKey(pid, camera_id, index)
    return tree


# ---- writing a tree ------------------------------------------------------------------------------

TREES = {"sysu": sysu_tree, "regdb": regdb_tree, "llcm": llcm_tree, "folder": folder_tree}
# Images per person and camera in the real set. SYSU-MM01 has a number for each person and camera
# (see `real_sysu`), LLCM about this many.
IMAGES_PER_CAMERA = {"sysu": None, "regdb": 10, "llcm": 7}


def make_tree(
    dataset: str,
    out: Path,
    ids: int | None = 130,
    images: int = 20,
    seed: int = 0,
    difficulty: str = "easy",
    workers: int = 1,
) -> bool:
    """Write a tree as a whole or not at all; return False if `out` holds the same one already.

    Args:
        dataset: a key of TREES.
        out: folder that is new, empty or holds the same tree.
        ids: number of persons, 5 to 9999; None stands for the persons and images of the real set.
        images: images per person and camera, 2 to 999; RegDB always has ten.
        seed: another seed gives other people and scenes.
        difficulty: a key of DIFFICULTIES.
        workers: number of processes.

    Raises:
        InputError: `out` holds something else, or a dataset without a real size should have it.
    """
    if ids is None and dataset not in IMAGES_PER_CAMERA:
        raise utils.InputError(f"--full: --dataset {dataset} has no real size: give --ids")
    if ids is None or dataset == "regdb":
        images = IMAGES_PER_CAMERA[dataset]
    settings = {
        "dataset": dataset,
        "ids": ids,
        "images": images,
        "seed": seed,
        "difficulty": difficulty,
        "full": ids is None,
        "version": VERSION,
        "pillow": PIL.__version__,
    }
    note = json.dumps(settings, indent=1) + "\n"
    out = Path(out).resolve()
    if is_made(out, note):
        return False
    tree = TREES[dataset](ids, images, seed)
    tree.texts[SYNTHETIC_MARKER] = note
    partial = out.with_name(out.name + ".synthetic-partial")
    shutil.rmtree(partial, ignore_errors=True)  # what an interrupted run left
    for path, text in tree.texts.items():
        file = partial / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8", newline="\n")  # the same bytes on Windows
    save_images(partial, tree.images, seed, difficulty, workers)
    partial.rename(out)
    return True


def is_made(out: Path, note: str) -> bool:
    """Tell whether a folder holds the tree with this note; other content is an InputError."""
    note_file = out / SYNTHETIC_MARKER
    if note_file.is_file() and note_file.read_bytes() == note.encode():
        return True
    is_empty_folder = out.is_dir() and not any(out.iterdir())
    if out.exists() and not is_empty_folder:
        raise utils.InputError(
            f"--out {out} holds other content or other settings: give another --out, or delete it"
        )
    return False


def save_images(
    folder: Path, images: dict[str, ImageKey], seed: int, difficulty: str, workers: int
) -> None:
    """Draw images and save them below a folder; on a terminal, a bar shows the progress."""
    save = functools.partial(save_image, folder, seed, difficulty)
    # Ctrl-C goes to all processes, but is for the main one, which then ends the others. The 0
    # stands for the number of a worker, which is not used.
    pool = ProcessPoolExecutor(workers, initializer=ignore_ctrl_c, initargs=(0,))
    mapped = map if workers == 1 else pool.map
    try:
        saved_images = mapped(save, images.keys(), images.values())
        for _ in tqdm(saved_images, total=len(images), unit="image", disable=None):
            pass
    finally:
        pool.shutdown(cancel_futures=True)  # after an error, the images left are not drawn


def save_image(folder: Path, seed: int, difficulty: str, path: str, key: ImageKey) -> None:
    """Draw one image and save it."""
    file = folder / path
    file.parent.mkdir(parents=True, exist_ok=True)
    image = draw_image(seed, key.pid, key.camera_id, key.index, DIFFICULTIES[difficulty])
    image.save(file, quality=90)


# ---- command -------------------------------------------------------------------------------------


def int_from(least: int, most: int) -> Callable:
    """Make a ``type`` for add_argument that takes whole numbers in this range."""
    needed = f"a whole number from {least} to {most}"
    return utils.number_type(int, lambda value: least <= value <= most, needed)


def build_parser() -> argparse.ArgumentParser:
    parser = utils.new_parser(__doc__)
    add = parser.add_argument
    add("--dataset", choices=list(TREES), required=True, help="layout to write")
    out_help = "folder to make: new, empty or the same tree"
    add("--out", type=utils.file_path, required=True, help=out_help)
    size = parser.add_mutually_exclusive_group()
    # The default is a text because argparse overlooks a flag whose value is the default itself.
    size.add_argument("--ids", type=int_from(5, 9999), default="130", help="persons (%(default)s)")
    size.add_argument("--full", dest="ids", action="store_const", const=None, help="the real size")
    add("--images", type=int_from(2, 999), default=20, help="per person and camera (%(default)s)")
    add("--seed", type=utils.non_negative_int, default=0, help="chooses the people (%(default)s)")
    add("--difficulty", choices=list(DIFFICULTIES), default="easy", help="see above (%(default)s)")
    workers = utils.default_workers()
    add("--workers", type=utils.positive_int, default=workers, help="processes (%(default)s)")
    return parser


def main() -> None:
    args = utils.parse(build_parser())
    is_new = make_tree(
        args.dataset, args.out, args.ids, args.images, args.seed, args.difficulty, args.workers
    )
    if is_new:
        print(f"{args.out}: written")
    else:
        print(f"{args.out}: already there")


if __name__ == "__main__":
    utils.run(main)
