"""Score a checkpoint under a dataset's protocols: CMC, mAP and mINP, averaged over the trials.

    python test.py --dataset sysu --resume NAME --mode all --gall-mode single --model-path DIR
    python test.py --dataset regdb --resume NAME --trial 1 --model-path DIR
    python test.py --dataset regdb --resume '..._trial{trial}_last.t' --trial all --search both

Each image is embedded once, whatever the number of trials and protocols. The checkpoint tells the
shape of the network and the size of images. The script writes test_<name>.log, and test_<name>.json
with the scores of every trial, to --log-path. The rows "chance" are random rankings of the same
queries and galleries. The training flags of the published commands are accepted and ignored.

SYSU-MM01's ten galleries are drawn with the seeds 0 to 9, as the field's baseline does.
--save-features keeps the features for tools.score, which also has the official galleries,
Euclidean distances and re-ranking.
"""

import argparse
import json
import logging
import os
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

import utils
from data_loader import ImageBatches
from data_manager import DATASETS, Dataset, EvalTrial, Split, is_synthetic, keep_used
from eval_metrics import Results, check_trials
from model import (
    BACKBONES,
    FEATURE_KINDS,
    EmbedNet,
    digest_of_weights,
    extract_features,
    load_network,
    to_device,
)

NETWORK_DEFAULTS = {"arch": "resnet50", "low_dim": 512, "num_parts": 6, "img_h": 288, "img_w": 144}
TRAINING_FLAGS = (  # of the published commands; each takes one value
    "--lr",
    "--optim",
    "--epochs",
    "--batch-size",
    "--per-img",
    "--w-hc",
    "--thd",
    "--dist-type",
    "--save-epoch",
    "--method",
)

log = logging.getLogger(__name__)


# ---- flags --------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = utils.new_parser(__doc__)
    utils.add_shared_flags(parser, DATASETS, BACKBONES)
    # None: the checkpoint's value or, with --pretrained, the default.
    for name in (*NETWORK_DEFAULTS, "drop"):
        parser.set_defaults(**{name: None})
    add = parser.add_argument
    trials = [*(str(trial) for trial in range(1, 11)), "all"]
    add("--trial", default="1", choices=trials, help="RegDB's trial (%(default)s)")
    utils.add_protocol_flags(parser, DATASETS)
    add("--tvsearch", dest="search", action="store_const", const="t2v", help="same as --search t2v")
    add(
        "--pretrained",
        type=utils.file_path,
        help="score an untrained network instead: imagenet, none or a file",
    )
    kinds = [*FEATURE_KINDS, "both"]
    add("--features", choices=kinds, default="both", help="features to score (%(default)s)")
    add("--flip", action="store_true", help="average features of each image and its mirror image")
    add(
        "--precision",
        choices=["tf32", "fp32"],
        default="tf32",
        help="of a GPU's convolutions (%(default)s)",
    )
    add(
        "--seed",
        type=utils.seed_number,
        default=1,
        help="seed of random rankings and untrained weights (1)",
    )
    add(
        "--save-features",
        type=utils.file_path,
        metavar="FILE",
        help="write the features of all test images, .npz",
    )
    for flag in TRAINING_FLAGS:
        add(flag, action=IgnoredFlag, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    add(
        "--test-only",
        action=IgnoredFlag,
        nargs=0,
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )
    return parser


class IgnoredFlag(argparse.Action):
    """A training flag: accepted, and kept so that the log can say that it is ignored."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        namespace.ignored = [*getattr(namespace, "ignored", []), option_string]


def parse_args() -> argparse.Namespace:
    parser = build_parser()
    args = utils.parse(parser)
    utils.fill_dataset_defaults(args, DATASETS)
    if bool(args.resume) == bool(args.pretrained):
        parser.error("give a checkpoint by --resume, or --pretrained none for an untrained network")
    n_models = len(model_trials(args))
    for flag in ("resume", "save_features"):
        name = getattr(args, flag)
        if name and n_models > 1 and "{trial}" not in name:
            words = utils.flag_text(flag, name)
            parser.error(f"--trial all needs ten files: write {{trial}} for the number in {words}")
    if args.save_features and not args.save_features.endswith(".npz"):
        parser.error(f"--save-features {args.save_features}: give a name that ends in .npz")
    return args


def model_trials(args: argparse.Namespace) -> list[int | None]:
    """Return RegDB's trials to test, each with its own model; [None]: one model for all trials."""
    dataset = DATASETS[args.dataset]
    if not dataset.one_model_per_trial:
        return [None]
    if args.trial == "all":
        return list(dataset.trials)
    return [int(args.trial)]


def report_ignored_flags(args: argparse.Namespace, dataset: Dataset) -> None:
    """Log which flags are not used: those of training, and those of other datasets' protocols."""
    if "ignored" in args:
        log.info("note: only training uses %s: ignored", ", ".join(args.ignored))
    for flag in utils.PROTOCOL_FLAGS:
        if getattr(args, flag) and flag not in dataset.protocol_flags:
            log.warning("%s has no --%s: ignored", dataset.title, flag.replace("_", "-"))


def fill_trial(name: str, trial: int | None) -> str:
    """Put the number of a trial in place of {trial} in a file name."""
    return name if trial is None else name.replace("{trial}", str(trial))


def network_name(args: argparse.Namespace) -> str:
    """Name the network for output files: its checkpoint or "untrained", and unusual sizes."""
    if args.resume:
        words = [os.path.basename(args.resume).removesuffix(".t")]
        sizes = ("img_h", "img_w")  # published checkpoints do not record them
    else:
        arch = args.arch or NETWORK_DEFAULTS["arch"]
        words = ["untrained", arch, os.path.basename(args.pretrained)]
        sizes = ("low_dim", "num_parts", "img_h", "img_w")
    for name in sizes:
        value = getattr(args, name)
        if value not in (None, NETWORK_DEFAULTS[name]):
            words.append(f"{name.replace('_', '')}{value}")
    return "_".join(words)


def output_name(args: argparse.Namespace, dataset: Dataset) -> str:
    """Name the log and the result file: the network, the protocols and the options."""
    words = dataset.protocol_values(vars(args))
    if dataset.one_model_per_trial:
        words.insert(0, f"trial-{args.trial}")
    if args.features != "both":
        words.append(args.features)
    words += option_names(args)
    return f"test_{network_name(args)}_{'-'.join(words)}"


def option_names(args: argparse.Namespace) -> list[str]:
    """Return the options that change scores, for the table and the names of files."""
    options = []
    if args.flip:
        options.append("flip")
    if args.precision != "tf32":
        options.append(args.precision)
    return options


def sources_of_results(args: argparse.Namespace) -> list[str]:
    """Return what the results come from: the dataset's folder and the checkpoints."""
    sources = [os.path.abspath(args.data_path)]
    for trial in model_trials(args):
        if args.resume:
            path = utils.find_checkpoint(fill_trial(args.resume, trial), args.model_path)
            sources.append(os.path.abspath(path))
        elif args.pretrained in ("imagenet", "none"):
            sources.append(f"seed {args.seed}")
        else:
            sources.append(os.path.abspath(args.pretrained))
    return sources


# ---- one test -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelTest:
    """What one network is tested on."""

    trial: int | None  # number of the model's trial; None: one model for all trials
    images: Split
    eval_trials: list[EvalTrial]


def main() -> None:
    args = parse_args()
    dataset = DATASETS[args.dataset]
    output = os.path.join(args.log_path, output_name(args, dataset))
    utils.start_log(args, f"{output}.log")
    report_ignored_flags(args, dataset)
    device = utils.select_device(args.gpu)
    utils.seed_everything(args.seed)
    utils.set_precision(args.precision, device)

    # Check all inputs first: a missing file ends the program before the first test.
    sources = sources_of_results(args)
    utils.check_results_path(f"{output}.json", sources)
    make_feature_folders(args)
    model_tests = [prepare_test(trial, dataset, args) for trial in model_trials(args)]

    results = Results(dataset, args.seed)
    networks = []
    for model_test in model_tests:
        images = model_test.images
        net, description = open_network(model_test.trial, args)
        networks.append(description)
        net = to_device(net, device)
        features = embed_images(net, description, images, device, args)
        if utils.rank() > 0:
            continue
        for eval_trial in tqdm(model_test.eval_trials, "score", disable=None, leave=False):
            results.add(eval_trial, images, features)
        if args.save_features:
            path = fill_trial(args.save_features, model_test.trial)
            save_features(path, images, features, description, args.data_path)

    if utils.rank() == 0:
        results.report(option_names(args), trained=bool(args.resume))
        header = {
            "flags": vars(args),
            "options": option_names(args),
            "versions": utils.versions(),
            "networks": networks,
            "sources": sources,
        }
        utils.write_json(f"{output}.json", header | results.to_json())
        log.info("all trials: %s.json", output)


def make_feature_folders(args: argparse.Namespace) -> None:
    if args.save_features:
        for trial in model_trials(args):
            folder = os.path.dirname(fill_trial(args.save_features, trial))
            os.makedirs(folder or ".", exist_ok=True)


def prepare_test(trial: int | None, dataset: Dataset, args: argparse.Namespace) -> ModelTest:
    """List a network's test images and trials. Without --save-features, drop unused images."""
    images = dataset.test(args.data_path, trial)
    trials = None if trial is None else [trial]
    eval_trials = dataset.eval_trials(images, vars(args), trials)
    check_trials(eval_trials, images, dataset)
    if not args.save_features:
        images, eval_trials = keep_used(images, eval_trials)
    return ModelTest(trial, images, eval_trials)


def open_network(trial: int | None, args: argparse.Namespace) -> tuple[EmbedNet, dict]:
    """Open the network to test; return it and its description, for results and features.

    That is the --resume checkpoint (of RegDB the one of ``trial``), or an untrained network.
    """
    if args.resume:
        net, description = open_trained(trial, args)
    else:
        net, description = build_untrained(args)
    description["dataset"] = args.dataset
    description["flip"] = args.flip
    description["trial"] = trial
    description["synthetic"] = is_synthetic(args.data_path)
    # For tools.search: whether its network is this one, and where the images are.
    description["weights"] = digest_of_weights(net)
    description["data_path"] = os.path.abspath(args.data_path)
    return net, description


def build_untrained(args: argparse.Namespace) -> tuple[EmbedNet, dict]:
    """Build an untrained network with the sizes of the flags; return it and its description."""
    description = sizes_of_flags(args)
    net = EmbedNet(
        n_class=1,
        low_dim=description["low_dim"],
        arch=description["arch"],
        num_parts=description["num_parts"],
        pretrained=args.pretrained,
    )
    return net, description | {"n_class": 1, "checkpoint": None, "epoch": None}


def sizes_of_flags(args: argparse.Namespace) -> dict:
    """Return the shape of the network and the size of images: the flags', or the defaults."""
    values = dict(NETWORK_DEFAULTS)
    for name in NETWORK_DEFAULTS:
        if getattr(args, name) is not None:
            values[name] = getattr(args, name)
    return values


def open_trained(trial: int | None, args: argparse.Namespace) -> tuple[EmbedNet, dict]:
    """Open the --resume checkpoint; return its network and its description."""
    flags = {name: getattr(args, name) for name in NETWORK_DEFAULTS}
    flags |= {"dataset": args.dataset, "trial": trial, "drop": args.drop}
    checkpoint, path = utils.open_checkpoint(fill_trial(args.resume, trial), args.model_path, flags)
    config = checkpoint["config"]
    if trial is not None and "trial" not in config:
        log.warning("%s does not say its trial: make sure that it was trained on %d", path, trial)
    log.info("checkpoint: %s, epoch %s", path, checkpoint.get("epoch", "unknown"))
    description = sizes_of_flags(args)
    # The config wins: flags do not contradict it, and published checkpoints have no image size.
    for name in (*NETWORK_DEFAULTS, "n_class"):
        if name in config:
            description[name] = config[name]
    if "img_h" not in config and args.img_h is None:
        log.warning(
            "%s does not tell the size of its images: %d x %d (height x width) is used; "
            "--img-h and --img-w choose another",
            path,
            description["img_h"],
            description["img_w"],
        )
    description["checkpoint"] = path
    description["epoch"] = checkpoint.get("epoch")
    return load_network(checkpoint, path, args.drop), description


def embed_images(
    net: EmbedNet, description: dict, images: Split, device: torch.device, args: argparse.Namespace
) -> dict[str, np.ndarray]:
    """Compute the kinds of features that --features asks for, (N, dim) each."""
    batches = ImageBatches(
        images,
        (description["img_h"], description["img_w"]),
        args.test_batch,
        args.workers,
        device,
        utils.rank(),
        utils.world_size(),
    )
    hide_bar = True if utils.rank() > 0 else None  # None: hide it where the output is no terminal
    batches = tqdm(batches, f"embed {len(images)} images", disable=hide_bar, leave=False)
    kinds = FEATURE_KINDS if args.features == "both" else (args.features,)
    return extract_features(net, batches, len(images), kinds, args.flip)


def save_features(
    path: str, images: Split, features: dict[str, np.ndarray], description: dict, root: str
) -> None:
    """Write fc and pool5 (N, dim), the columns of `Split`, and the network, for tools.score."""
    names = [os.path.relpath(file, root).replace(os.sep, "/") for file in images.paths]
    with utils.atomic_write(path) as partial, open(partial, "wb") as file:
        np.savez(
            file,
            **features,
            paths=np.array(names),
            pids=images.pids,
            camids=images.camids,
            thermal=images.thermal,
            network=json.dumps(description),
        )
    log.info("features: %s", path)


if __name__ == "__main__":
    utils.run(main)
