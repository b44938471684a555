"""Draw figures of data, of training and of what a network has learned.

    python -m tools.visualize curves log/RUN "another run=log/RUN" --out curves.png
    python -m tools.visualize embedding --help

Where several files may be given, each may have a label in front: "with HC=FILE".
"""

import argparse
import glob
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

# `python tools/visualize.py` would search for modules in tools/ alone.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from data_manager import DATASETS
from tools import figures
from tools.results_files import (
    Features,
    check_comparable,
    label_files,
    read_features,
    read_metrics,
    read_results,
)

FEATURES_HELP = "file of test.py --save-features"
OUT_FORMATS = ("png", "jpg", "pdf", "svg")


# ---- flags of several commands ------------------------------------------------------------------


def add_features_flags(parser: argparse.ArgumentParser) -> None:
    """Add which features of a file to draw, and the dataset that they are of."""
    add = parser.add_argument
    add("--features", default="fc", help="kind of features (%(default)s)")
    add("--dataset", choices=list(DATASETS), default="sysu", help="dataset (%(default)s)")


def add_tree_flags(parser: argparse.ArgumentParser) -> None:
    """Add the dataset and where it is."""
    add = parser.add_argument
    add("--dataset", choices=list(DATASETS), default="sysu", help="dataset (%(default)s)")
    utils.add_data_path_flag(parser, DATASETS)


def add_persons_flags(parser: argparse.ArgumentParser, default: int) -> None:
    """Add how many persons to show, and the seed that chooses them."""
    add = parser.add_argument
    add("--persons", type=utils.positive_int, default=default, help="persons to show (%(default)s)")
    add("--seed", type=utils.seed_number, default=0, help="random seed (%(default)s)")


def read_labelled_features(args: argparse.Namespace) -> dict[str, Features]:
    dataset = DATASETS[args.dataset]
    features = {}
    for label, path in label_files(args.files).items():
        features[label] = read_features(path, dataset, args.features)
    return features


# ---- commands -----------------------------------------------------------------------------------


def add_curves_flags(parser: argparse.ArgumentParser) -> None:
    help_text = "folder of a run, or its metrics.jsonl"
    parser.add_argument("files", nargs="+", metavar="[LABEL=]RUN", help=help_text)


def draw_curves(args: argparse.Namespace) -> Figure:
    runs = {label: read_metrics(path) for label, path in label_files(args.files).items()}
    return figures.curves(runs)


def add_centers_flags(parser: argparse.ArgumentParser) -> None:
    help_text = (
        "runs that differ in their seed: a folder with metrics.jsonl, or a pattern like 'a/*'"
    )
    parser.add_argument("files", nargs="+", metavar="LABEL=PATTERN", help=help_text)


def draw_centers(args: argparse.Namespace) -> Figure:
    groups = {}
    for label, pattern in label_files(args.files).items():
        paths = sorted(glob.glob(pattern))
        if not paths:
            raise utils.InputError(f"{label}: there is no run {pattern}")
        groups[label] = [read_metrics(path) for path in paths]
    return figures.centers(groups)


def add_cmc_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    help_text = "file of test.py or tools.score"
    add("files", nargs="+", metavar="[LABEL=]RESULTS.json", help=help_text)
    add("--features", default="fc", help="kind of features (%(default)s)")


def draw_cmc(args: argparse.Namespace) -> Figure:
    results = {label: read_results(path) for label, path in label_files(args.files).items()}
    check_comparable(results, args.features)
    return figures.cmc(results, args.features)


def add_embedding_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("files", nargs="+", metavar="[LABEL=]FEATURES.npz", help=FEATURES_HELP)
    add_features_flags(parser)
    add_persons_flags(parser, default=7)
    methods = list(figures.PROJECTIONS)
    add("--method", choices=methods, default="tsne", help="projection (%(default)s)")


def draw_embedding(args: argparse.Namespace) -> Figure:
    return figures.embedding(read_labelled_features(args), args.persons, args.method, args.seed)


def add_distances_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="[LABEL=]FEATURES.npz", help=FEATURES_HELP)
    add_features_flags(parser)


def draw_distances(args: argparse.Namespace) -> Figure:
    return figures.distances(read_labelled_features(args))


def add_ranked_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", type=utils.file_path, metavar="FEATURES.npz", help=FEATURES_HELP)
    add_features_flags(parser)
    utils.add_data_path_flag(parser, DATASETS)
    utils.add_protocol_flags(parser, DATASETS)
    add("--rows", type=utils.positive_int, default=2, help="queries of each kind (%(default)s)")
    kinds = figures.KINDS_OF_QUERIES
    add("--kinds", nargs="+", choices=kinds, default=kinds, help="kinds of queries (all)")
    add("--seed", type=utils.seed_number, default=0, help="random seed (%(default)s)")


def draw_ranked(args: argparse.Namespace) -> Figure:
    features = read_features(args.file, DATASETS[args.dataset], args.features)
    trial = features.first_trial(vars(args))
    return figures.ranked(features, trial, args.data_path, args.rows, args.seed, args.kinds)


def add_attention_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    checkpoint_help = "file that train.py saved"
    add("checkpoint", type=utils.file_path, metavar="CHECKPOINT", help=checkpoint_help)
    add_tree_flags(parser)
    add("--trial", type=utils.positive_int, help="RegDB's trial (the checkpoint's)")
    add_persons_flags(parser, default=4)


def draw_attention(args: argparse.Namespace) -> Figure:
    dataset = DATASETS[args.dataset]
    return figures.attention(
        args.checkpoint, dataset, args.data_path, args.trial, args.persons, args.seed
    )


def add_samples_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_tree_flags(parser)
    add_persons_flags(parser, default=8)
    help_text = "images of a person in a camera (%(default)s)"
    add("--per-camera", type=utils.positive_int, default=1, help=help_text)


def draw_samples(args: argparse.Namespace) -> Figure:
    dataset = DATASETS[args.dataset]
    return figures.samples(dataset, args.data_path, args.persons, args.per_camera, args.seed)


def add_side_by_side_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    help_text = "paired scores, like docs/side_by_side.json"
    add("file", type=utils.file_path, metavar="PAIRS.json", help=help_text)
    add("--protocol", default="all-search single-shot", help="protocol (%(default)s)")
    add("--features", default="fc", help="kind of features (%(default)s)")


def draw_side_by_side(args: argparse.Namespace) -> Figure:
    pairs = figures.read_paired_scores(args.file, args.protocol, args.features)
    return figures.side_by_side(pairs)


@dataclass(frozen=True)
class Command:
    description: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    draw: Callable[[argparse.Namespace], Figure]


COMMANDS = {
    "curves": Command(
        "terms of the loss, accuracy, learning rate, rank-1 and mAP over the epochs",
        add_curves_flags,
        draw_curves,
    ),
    "centers": Command(
        "HC in training and the distances of test persons' centers, means over some runs",
        add_centers_flags,
        draw_centers,
    ),
    "cmc": Command(
        "CMC curves of each protocol: means over the trials, and their deviation as a band",
        add_cmc_flags,
        draw_cmc,
    ),
    "embedding": Command(
        "features of some persons in the plane; a line joins the two centers of a person",
        add_embedding_flags,
        draw_embedding,
    ),
    "distances": Command(
        "histograms of the cosine distances between visible and infrared images",
        add_distances_flags,
        draw_distances,
    ),
    "ranked": Command(
        "the best queries, some at random and the worst, with their nearest gallery images",
        add_ranked_flags,
        draw_ranked,
    ),
    "attention": Command(
        "where the stripes look: how much each location contributes to its stripe's feature",
        add_attention_flags,
        draw_attention,
    ),
    "samples": Command(
        "images of some test persons in each camera; grey where there is none",
        add_samples_flags,
        draw_samples,
    ),
    "side-by-side": Command(
        "scores of the published code and of this one, seed by seed, and their mean difference",
        add_side_by_side_flags,
        draw_side_by_side,
    ),
}


# ---- command line -------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = utils.new_parser(__doc__)
    subparsers = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", prog=parser.prog
    )
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            usage=f"{parser.prog} {name} [flags]; --help lists them",
            description=f"Draw {command.description}.",
            help=command.description,
            allow_abbrev=False,
        )
        command.add_flags(subparser)
        subparser.add_argument(
            "--out",
            type=utils.file_path,
            default=f"{name}.png",
            help=f"file to write: {', '.join(OUT_FORMATS)} (%(default)s)",
        )
    return parser


def main() -> None:
    args = utils.parse(build_parser())
    image_format = os.path.splitext(args.out)[1].removeprefix(".").lower()
    if image_format not in OUT_FORMATS:
        formats = ", ".join(f".{name}" for name in OUT_FORMATS)
        raise utils.InputError(f"--out {args.out}: give a name that ends in one of {formats}")
    if "data_path" in args:
        utils.fill_dataset_defaults(args, DATASETS)
    figure = COMMANDS[args.command].draw(args)
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    with utils.atomic_write(args.out) as partial:
        figures.save_figure(figure, partial, image_format)
    print(args.out)


if __name__ == "__main__":
    utils.run(main)
