"""Resize the training images of SYSU-MM01 once, into four arrays beside the data.

    python pre_process_sysu.py

In the dataset's folder: train_rgb_resized_img.npy (N, 288, 144, 3) uint8, train_rgb_resized_label.npy (N,), and the
same two with ir. Labels are 0..n-1 in ascending order of person id.
"""

import contextlib
import logging
import os

import numpy as np
from filelock import FileLock
from tqdm import tqdm

import utils
from data_loader import array_files, batches_of, read_images
from data_manager import DATASETS, Split, check_counts, joined, relabel, sysu_train

log = logging.getLogger(__name__)


def build_parser() -> utils.Parser:
    parser = utils.Parser(description=__doc__)
    utils.add_data_flags(parser)
    parser.set_defaults(data_path=DATASETS["sysu"].defaults["data_path"])
    parser.add_argument("--force", action="store_true", help="make the arrays again, though they are there and match")
    return parser


def match(images: str, labels: str, split: Split, size: tuple[int, int]) -> bool:
    """Whether two files are the arrays of these images at this size, the first one newer than each of them."""
    try:
        array, found = np.load(images, mmap_mode="r"), np.load(labels)
        same = array.shape == (len(split.paths), *size, 3) and np.array_equal(found, relabel(split.pids))
        return same and os.path.getmtime(images) > max(map(os.path.getmtime, split.paths))
    except Exception:  # missing or damaged
        return False


def write_arrays(images: str, labels: str, split: Split, size: tuple[int, int], workers: int) -> None:
    """Write the images (N, height, width, 3), uint8, and labels (N,) of a split to two .npy files."""
    with open(images, "wb") as file, tqdm(total=len(split.paths), unit=" images", disable=None) as bar:
        shape = (len(split.paths), *size, 3)
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for batch in read_images(batches_of(split.paths), size, workers):
            file.write(batch.numpy().data)  # memory never holds more than some batches
            bar.update(len(batch))
        with open(labels, "wb") as small:
            np.save(small, relabel(split.pids))


def main() -> None:
    args = build_parser().parse_args()
    utils.start_log(args)
    splits = dict(zip(("rgb", "ir"), sysu_train(args.data_path), strict=True))
    size, arrays = (args.img_h, args.img_w), {modality: array_files(args.data_path, modality) for modality in splits}
    for modality, split in splits.items():
        log.info("%s: %d images of %d persons", modality, len(split.paths), len(np.unique(split.pids)))
    check_counts(joined(*splits.values()), DATASETS["sysu"], "train")
    if not args.force and all(match(*arrays[modality], split, size) for modality, split in splits.items()):
        log.info("the arrays are there and match: nothing to do (--force makes them again)")
        return
    with FileLock(os.path.join(args.data_path, "pre_process.lock"), timeout=0), contextlib.ExitStack() as stack:
        if any(os.path.exists(images) for images, _ in arrays.values()):
            log.warning("the arrays that are there are replaced, now %d x %d pixels", *size)
        # When all four are written, the old labels are removed, then the images get their names, then the labels.
        # So a kill in between leaves images without labels, which is noticed, never a mixture.
        files = [labels for _, labels in arrays.values()] + [images for images, _ in arrays.values()]
        whole = {file: stack.enter_context(utils.whole_file(file)) for file in files}  # renamed in reverse order
        for modality, split in splits.items():
            write_arrays(*(whole[file] for file in arrays[modality]), split, size, args.workers)
        for _, labels in arrays.values():
            with contextlib.suppress(FileNotFoundError):
                os.remove(labels)
    log.info("written: %s", os.path.join(args.data_path, "train_{rgb,ir}_resized_{img,label}.npy"))


if __name__ == "__main__":
    utils.run(main)
