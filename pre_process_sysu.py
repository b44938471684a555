"""Resize the training images of SYSU-MM01 once, into four arrays beside the data.

    python pre_process_sysu.py

The script writes into the dataset's folder: train_rgb_resized_img.npy (N, 288, 144, 3) uint8,
train_rgb_resized_label.npy (N,), and the same two with ir. Labels are 0..n-1 in ascending order of
person id.
"""

import argparse
import contextlib
import logging
import os

import numpy as np
from tqdm import tqdm

import utils
from data_loader import array_files, chunks_of, read_images
from data_manager import DATASETS, Split, check_counts, concatenate, relabel, sysu_train

log = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    parser = utils.new_parser(__doc__)
    utils.add_image_flags(parser, {"sysu": DATASETS["sysu"]})
    parser.set_defaults(data_path=DATASETS["sysu"].defaults["data_path"])
    parser.add_argument(
        "--force", action="store_true", help="write the arrays, even if they exist and match"
    )
    return parser


def arrays_match(files: tuple[str, str], split: Split, size: tuple[int, int]) -> bool:
    """Return whether two files are the arrays of a split, and newer than its images."""
    images_file, labels_file = files
    try:
        images = np.load(images_file, mmap_mode="r")
        labels = np.load(labels_file)
    except Exception:  # missing, or corrupt in one of many ways
        return False
    if images.shape != (len(split), *size, 3) or not np.array_equal(labels, relabel(split.pids)):
        return False
    newest_image = max(os.path.getmtime(path) for path in split.paths)
    return os.path.getmtime(images_file) > newest_image


def write_images(path: str, split: Split, size: tuple[int, int], workers: int) -> None:
    """Write the images of a split as an .npy file, (N, height, width, 3) uint8.

    It works batch by batch: the whole array is never in memory.
    """
    shape = (len(split), *size, 3)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with open(path, "wb") as file, tqdm(total=len(split), unit=" images", disable=None) as bar:
        np.lib.format.write_array_header_1_0(file, header)
        for batch in read_images(chunks_of(split.paths), size, workers):
            file.write(batch.numpy().data)
            bar.update(len(batch))


def write_arrays(
    files: dict[str, tuple[str, str]],
    splits: dict[str, Split],
    size: tuple[int, int],
    workers: int,
) -> None:
    """Write images and labels of both modalities; a kill never leaves new images with old labels.

    All four files are written under other names. Then the old labels are removed, the images get
    their names, and last the labels. After a kill in between, `load_arrays` finds no labels.
    """
    label_files = [labels for _, labels in files.values()]
    image_files = [images for images, _ in files.values()]
    with contextlib.ExitStack() as stack:
        partial = {}
        # ExitStack renames them in reverse order: labels come first here, to be renamed last.
        for path in label_files + image_files:
            partial[path] = stack.enter_context(utils.atomic_write(path))
        for modality, split in splits.items():
            images, labels = files[modality]
            write_images(partial[images], split, size, workers)
            with open(partial[labels], "wb") as file:
                np.save(file, relabel(split.pids))
        for path in label_files:
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)


def main() -> None:
    args = utils.parse(build_parser())
    utils.start_log(args)
    root = args.data_path
    size = (args.img_h, args.img_w)
    visible, thermal = sysu_train(root)
    splits = {"rgb": visible, "ir": thermal}
    files = {modality: array_files(root, modality) for modality in splits}
    for modality, split in splits.items():
        log.info("%s: %d images of %d persons", modality, len(split), len(np.unique(split.pids)))
    check_counts(concatenate(visible, thermal), DATASETS["sysu"], "train")

    is_done = all(arrays_match(files[modality], split, size) for modality, split in splits.items())
    if is_done and not args.force:
        log.info("the arrays exist and match: nothing to do (--force writes them again)")
        return
    lock = os.path.join(root, "pre_process.lock")
    with utils.lock_file(lock, "another process writes these arrays: wait for it"):
        if any(os.path.exists(images) for images, _ in files.values()):
            log.warning("existing arrays are replaced by arrays of %d x %d pixels", *size)
        write_arrays(files, splits, size, args.workers)
    log.info("written: %s", os.path.join(root, "train_{rgb,ir}_resized_{img,label}.npy"))


if __name__ == "__main__":
    utils.run(main)
