"""Resize the training images of SYSU-MM01 once, into four arrays beside the data.

    python pre_process_sysu.py

The script writes into the dataset's folder, or into --arrays: train_rgb_resized_img.npy
(N, 288, 144, 3) uint8, train_rgb_resized_label.npy (N,), and the same two with ir. Labels are
0..n-1 in ascending order of person id. By train_resized_digest.txt this script and train.py notice
later changes of the image files.
"""

import argparse
import contextlib
import logging
import os

import numpy as np
from tqdm import tqdm

import utils
from data_loader import (
    array_files,
    chunks_of,
    digest_file,
    digest_of_images,
    load_arrays,
    read_digest,
    read_images,
)
from data_manager import DATASETS, Split, list_training_images, relabel

log = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    parser = utils.new_parser(__doc__)
    utils.add_image_flags(parser, {"sysu": DATASETS["sysu"]})
    parser.set_defaults(data_path=DATASETS["sysu"].defaults["data_path"])
    utils.add_arrays_flag(parser)
    parser.add_argument(
        "--force", action="store_true", help="write the arrays, even if they exist and match"
    )
    return parser


def arrays_match(folder: str, root: str, train_images: Split, size: tuple[int, int]) -> bool:
    """Return whether a folder has arrays of these training images, in this size.

    False without a digest: then the arrays may be of other images.
    """
    if read_digest(folder) is None:
        return False
    try:
        train_set = load_arrays(root, folder, train_images, size)
    except utils.InputError:  # they are missing, damaged or of other images
        return False
    return train_set.visible.shape[1:3] == size


def write_images(path: str, split: Split, size: tuple[int, int], workers: int) -> None:
    """Write the images of a split as an .npy file, (N, height, width, 3) uint8.

    It works batch by batch: the whole array is never in memory.
    """
    shape = (len(split), *size, 3)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with open(path, "wb") as file, tqdm(total=len(split), unit=" images", disable=None) as bar:
        np.lib.format.write_array_header_1_0(file, header)
        for batch in read_images(chunks_of(split.paths), size, workers):
            file.write(batch.data)
            bar.update(len(batch))


def write_arrays(
    folder: str, splits: dict[str, Split], digest: str, size: tuple[int, int], workers: int
) -> None:
    """Write images and labels of both modalities; a kill never leaves new images with old labels.

    All files are written under other names. Then the old digest and labels are removed, and images,
    labels and digest get their names, in this order. After a kill in between, labels are missing,
    which is an error in train.py, or the digest is, and this script writes the arrays again.

    Args:
        folder: where to write.
        splits: "rgb" and "ir" -> the training images.
        digest: of these images.
        size: (height, width).
        workers: processes that read images.
    """
    files = {modality: array_files(folder, modality) for modality in splits}
    image_paths = [images for images, _ in files.values()]
    label_paths = [labels for _, labels in files.values()]
    digest_path = digest_file(folder)
    with contextlib.ExitStack() as stack:
        partial = {}
        for path in [digest_path, *label_paths, *image_paths]:  # they are renamed last to first
            partial[path] = stack.enter_context(utils.atomic_write(path))
        for modality, split in splits.items():
            images, labels = files[modality]
            write_images(partial[images], split, size, workers)
            with open(partial[labels], "wb") as file:
                np.save(file, relabel(split.pids))
        with open(partial[digest_path], "w", encoding="utf-8") as file:
            file.write(f"{digest}\n")
        for path in [digest_path, *label_paths]:
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)


def main() -> None:
    args = utils.parse(build_parser())
    utils.start_log(args)
    root = args.data_path
    folder = args.arrays or root
    size = (args.img_h, args.img_w)
    images = list_training_images(DATASETS["sysu"], root, trial=None)
    if not args.force and arrays_match(folder, root, images, size):
        log.info("the arrays exist and match: nothing to do (--force writes them again)")
        return

    splits = {"rgb": images.where(~images.thermal), "ir": images.where(images.thermal)}
    digest = digest_of_images(images, root, size)
    utils.make_writable_folder(folder, "name another folder by --arrays, also in train.py")
    lock = os.path.join(folder, "pre_process.lock")
    with utils.lock_file(lock, "another process writes these arrays: try again when it is done"):
        if any(os.path.exists(array_files(folder, modality)[0]) for modality in splits):
            log.warning(
                "existing arrays are replaced by arrays of %d x %d pixels (height x width)", *size
            )
        write_arrays(folder, splits, digest, size, args.workers)
    log.info("written: %s", os.path.join(folder, "train_{rgb,ir}_resized_{img,label}.npy"))


if __name__ == "__main__":
    utils.run(main)
