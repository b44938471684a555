"""Resize the training images of SYSU-MM01 once, into four arrays beside the data.

    python pre_process_sysu.py

In the dataset's folder: train_rgb_resized_img.npy (N, 288, 144, 3) uint8, train_rgb_resized_label.npy (N,), and the
same two with ir. Labels are 0..n-1 in ascending order of person id.
"""

import argparse
import logging

import numpy as np
from tqdm import tqdm

import data_loader
import data_manager
import utils

BATCH = 64  # images held in memory at a time

log = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    parser = utils.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    utils.add_data_flags(parser)
    parser.set_defaults(data_path=utils.DATA_PATHS["sysu"])
    return parser


def write_arrays(root: str, modality: str, split: data_manager.Split, size: tuple[int, int], workers: int) -> None:
    """Write one modality's images and labels; the old arrays stay until the new ones are whole."""
    image_file, label_file = data_loader.sysu_arrays(root, modality)
    with utils.whole_file(image_file) as images, utils.whole_file(label_file) as labels:
        bar = tqdm(total=len(split.paths), desc=modality, unit=" images", disable=None)
        with open(images, "wb") as file, bar:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(split.paths), *size, 3)}
            np.lib.format.write_array_header_1_0(file, header)
            for batch in data_loader.read_images(split.paths, size, BATCH, workers):
                file.write(batch.tobytes())
                bar.update(len(batch))
        with open(labels, "wb") as file:
            np.save(file, data_manager.relabel(split.pids))


def main() -> None:
    args = build_parser().parse_args()
    utils.start_log()
    splits = data_manager.sysu_train(args.data_path)
    utils.make_folder(args.data_path, "--data_path")
    for modality, split in zip(("rgb", "ir"), splits, strict=True):
        write_arrays(args.data_path, modality, split, (args.img_h, args.img_w), args.workers)
        persons = len(np.unique(split.pids))
        log.info("%s: %d images of %d persons at %d x %d", modality, len(split.paths), persons, args.img_h, args.img_w)


if __name__ == "__main__":
    utils.run(main)
