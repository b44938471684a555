"""Resize the training images of SYSU-MM01 once, into four arrays beside the data.

    python pre_process_sysu.py

In the dataset's folder: train_rgb_resized_img.npy (N, 288, 144, 3) uint8, train_rgb_resized_label.npy (N,), and the
same two with ir. Labels are 0..n-1 in ascending order of person id.
"""

import argparse
import contextlib
import io
import logging
import os
from concurrent.futures import as_completed

import numpy as np
from tqdm import tqdm

import data_loader
import data_manager
import utils

BATCH = 64  # images that a process writes at a time

log = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    parser = utils.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data_path, *_ = utils.add_data_flags(parser)
    data_path.default, data_path.help = utils.DATA_PATHS["sysu"], "the dataset's folder (%(default)s)"
    parser.add_argument("--force", action="store_true", help="make the arrays again, though they are there and match")
    return parser


def match(images: str, labels: str, split: data_manager.Split, size: tuple[int, int]) -> bool:
    """Whether two files are the arrays of these images at this size, and newer than each of them."""
    try:
        array, found = data_loader.open_array(images), data_loader.open_array(labels)
        same = array.shape == (len(split.paths), *size, 3) and array.dtype == np.uint8
        same = same and np.array_equal(found, data_manager.relabel(split.pids))
        return same and os.path.getmtime(images) > max(map(os.path.getmtime, split.paths))
    except OSError:  # missing or damaged
        return False


def write_arrays(images: str, labels: str, split: data_manager.Split, size: tuple[int, int], workers: int) -> None:
    """Write the images (N, height, width, 3) and labels (N,) of a split to two .npy files, in several processes."""
    np.lib.format.open_memmap(images, "w+", np.uint8, (len(split.paths), *size, 3)).flush()
    parts = range(0, len(split.paths), BATCH)
    with (
        data_loader.start_workers(workers) as pool,
        tqdm(total=len(split.paths), unit=" images", disable=None) as bar,
    ):
        try:
            written = [pool.submit(write_part, images, split.paths[i : i + BATCH], i, size) for i in parts]
            for part in as_completed(written):
                bar.update(part.result())
        except BaseException:  # an unreadable image, or Ctrl-C: the rest need not be read
            pool.shutdown(cancel_futures=True)
            raise
    array = io.BytesIO()  # numpy itself would not say that a disk is full
    np.save(array, data_manager.relabel(split.pids))
    with open(labels, "wb") as file:
        file.write(array.getbuffer())


def write_part(images: str, paths: list[str], start: int, size: tuple[int, int]) -> int:
    """Write the images of ``paths`` to the rows from ``start`` on; gives their number."""
    array, batch = np.load(images, mmap_mode="r"), data_loader.read_part(paths, size)
    with open(images, "r+b") as file:  # a plain write is faster than one through the memory map
        file.seek(array.offset + start * array[0].nbytes)
        file.write(batch.data)
    return len(paths)


def main() -> None:
    args = build_parser().parse_args()
    utils.start_log()
    splits = dict(zip(("rgb", "ir"), data_manager.sysu_train(args.data_path), strict=True))
    size, arrays = (args.img_h, args.img_w), {m: data_loader.sysu_arrays(args.data_path, m) for m in splits}
    for modality, split in splits.items():
        log.info("%s: %d images of %d persons (SYSU-MM01 has %d of %d)", modality, len(split.paths),
                 len(np.unique(split.pids)), data_manager.SYSU_TRAIN_IMAGES[modality],
                 data_manager.SYSU_TRAIN_PERSONS)  # fmt: skip
    utils.remove_partial_files(args.data_path)
    if not args.force and all(match(*arrays[modality], split, size) for modality, split in splits.items()):
        log.info("the arrays are there and match: nothing to do (--force makes them again)")
        return
    utils.make_folder(args.data_path, "--data_path")
    with utils.lock(os.path.join(args.data_path, "pre_process")), contextlib.ExitStack() as stack:
        # All four take their names when all are whole: first the images, then the labels, and the old ones of these go
        # before. So a kill between two names leaves arrays that are seen to be incomplete, never a mixture.
        files = [labels for _, labels in arrays.values()] + [images for images, _ in arrays.values()]
        whole = {file: stack.enter_context(utils.whole_file(file)) for file in files}  # named in reverse
        for modality, split in splits.items():
            write_arrays(*(whole[file] for file in arrays[modality]), split, size, args.workers)
        for _, labels in arrays.values():
            with contextlib.suppress(FileNotFoundError):
                os.remove(labels)
    log.info("written: %s", os.path.join(args.data_path, "train_{rgb,ir}_resized_{img,label}.npy"))


if __name__ == "__main__":
    utils.run(main)
