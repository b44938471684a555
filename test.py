"""Score a checkpoint under a dataset's protocols: CMC, mAP and mINP, mean ± deviation of trials.

    python test.py --dataset sysu --resume NAME --mode all --gall-mode single --model-path DIR
    python test.py --dataset regdb --resume NAME --trial 1 --model-path DIR
    python test.py --dataset regdb --resume '..._trial{trial}_last.t' --trial all --search both

Each image is embedded once, whatever the number of trials and protocols. The shape of the network
and the size of images are read from the checkpoint. --log-path gets test_<name>.log, and
test_<name>.json with the scores of every trial. The rows "chance" are random rankings of the same
lists. The training flags of the published commands are accepted and ignored.

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
from data_manager import DATASETS, Dataset, EvalTrial, Split, keep_used
from eval_metrics import FEATURE_KINDS, Results
from model import BACKBONES, EmbedNet, extract_features, load_network, to_device

NETWORK_DEFAULTS = {"arch": "resnet50", "low_dim": 512, "num_parts": 6, "img_h": 288, "img_w": 144}
TRAINING_FLAGS = (  # of the published commands; they have a value each
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
    # None: the checkpoint's.
    parser.set_defaults(**dict.fromkeys(NETWORK_DEFAULTS), drop=None)
    add = parser.add_argument
    trials = [*(str(trial) for trial in range(1, 11)), "all"]
    add("--trial", default="1", choices=trials, help="RegDB's trial (%(default)s)")
    utils.add_protocol_flags(parser, DATASETS)
    add("--tvsearch", dest="search", action="store_const", const="t2v", help="= --search t2v")
    add("--pretrained", help="score an untrained network instead: imagenet, none or a file")
    kinds = [*FEATURE_KINDS, "both"]
    add("--features", choices=kinds, default="both", help="features to score (%(default)s)")
    add("--flip", action="store_true", help="average features of each image and its mirror image")
    add("--precision", choices=["tf32", "fp32"], default="tf32", help="on a GPU (%(default)s)")
    add("--seed", type=utils.non_negative_int, default=1, help="seed of random rankings (1)")
    add("--save-features", metavar="FILE", help="write the features of all test images, .npz")
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
    """A flag of train.py: its name is kept for a note."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        namespace.ignored = [*getattr(namespace, "ignored", []), option_string]


def parse_args() -> argparse.Namespace:
    parser = build_parser()
    args = utils.parse(parser)
    utils.fill_dataset_defaults(args, DATASETS)
    dataset = DATASETS[args.dataset]
    if bool(args.resume) == bool(args.pretrained):
        parser.error("give a checkpoint by --resume, or --pretrained none for an untrained network")
    args.trials = [None]
    if dataset.one_model_per_trial:
        args.trials = list(dataset.trials) if args.trial == "all" else [int(args.trial)]
    for flag in ("resume", "save_features"):
        name = getattr(args, flag)
        if name and len(args.trials) > 1 and "{trial}" not in name:
            parser.error(
                f"--trial all needs ten files: write {{trial}} into {utils.flag_text(flag, name)}"
            )
    if args.save_features and not args.save_features.endswith(".npz"):
        parser.error(f"--save-features {args.save_features}: give a name that ends in .npz")
    return args


def report_ignored_flags(args: argparse.Namespace, dataset: Dataset) -> None:
    """Say which flags are not used: those of training, and those of other datasets' protocols."""
    if "ignored" in args:
        log.info("note: only training uses %s: ignored", ", ".join(args.ignored))
    for flag in utils.PROTOCOL_FLAGS:
        if getattr(args, flag) and flag not in dataset.protocol_flags:
            log.warning("%s has no --%s: ignored", dataset.title, flag.replace("_", "-"))


def with_trial(name: str, trial: int | None) -> str:
    """A file name with the number of its trial in place of {trial}."""
    return name if trial is None else name.replace("{trial}", str(trial))


def network_name(args: argparse.Namespace) -> str:
    """What files of results call the network: its checkpoint, or what is untrained; its sizes."""
    if args.resume:
        words = [os.path.basename(args.resume).removesuffix(".t")]
        sizes = ("img_h", "img_w")  # which published checkpoints do not tell
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
    """The stem of the log and of the result file: the network, the protocols and the options."""
    words = dataset.protocol_values(vars(args))
    if dataset.one_model_per_trial:
        words.insert(0, f"trial-{args.trial}")
    if args.features != "both":
        words.append(args.features)
    if args.flip:
        words.append("flip")
    return f"test_{network_name(args)}_{'-'.join(words)}"


def sources_of_results(args: argparse.Namespace) -> list[str]:
    """What the results come from: the dataset's folder and the checkpoints."""
    sources = [os.path.abspath(args.data_path)]
    for trial in args.trials:
        if args.resume:
            path = utils.find_checkpoint(with_trial(args.resume, trial), args.model_path)
            sources.append(os.path.abspath(path))
        elif args.pretrained in ("imagenet", "none"):
            sources.append(f"seed {args.seed}")
        else:
            sources.append(os.path.abspath(args.pretrained))
    return sources


# ---- one test -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Test:
    """What one network is tested on."""

    trial: int | None  # of a dataset with a model for each trial
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

    # What is missing is better known now than after the first trial.
    sources = sources_of_results(args)
    utils.check_results_path(f"{output}.json", sources)
    tests = [load_test(trial, dataset, args) for trial in args.trials]

    results = Results(dataset, args.seed)
    networks = []
    for test in tests:
        net, network = open_network(test.trial, args)
        networks.append(network)
        net = to_device(net, device)
        features = embed_images(net, network, test.images, device, args)
        if utils.rank() > 0:
            continue
        for eval_trial in tqdm(test.eval_trials, "score", disable=None, leave=False):
            results.add(eval_trial, test.images, features)
        if args.save_features:
            path = with_trial(args.save_features, test.trial)
            save_features(path, test.images, features, network, args.data_path)

    if utils.rank() == 0:
        options = ["flip"] if args.flip else []
        results.log(options, trained=bool(args.resume))
        header = {
            "flags": vars(args),
            "options": options,
            "versions": utils.versions(),
            "networks": networks,
            "sources": sources,
        }
        utils.write_json(f"{output}.json", header | results.to_json())
        log.info("all trials: %s.json", output)


def load_test(trial: int | None, dataset: Dataset, args: argparse.Namespace) -> Test:
    """The images and trials of one network; only images that are used, unless features are kept."""
    images = dataset.test(args.data_path, trial)
    trials = None if trial is None else [trial]
    eval_trials = dataset.eval_trials(images, vars(args), trials)
    if args.save_features:
        folder = os.path.dirname(with_trial(args.save_features, trial))
        os.makedirs(folder or ".", exist_ok=True)
    else:
        images, eval_trials = keep_used(images, eval_trials)
    return Test(trial, images, eval_trials)


def open_network(trial: int | None, args: argparse.Namespace) -> tuple[EmbedNet, dict]:
    """The network to test, and what is known of it, for the files of results and features.

    That is the --resume checkpoint (of RegDB the one of ``trial``), or an untrained network.
    """
    network = dict(NETWORK_DEFAULTS)
    for name in NETWORK_DEFAULTS:
        if getattr(args, name) is not None:
            network[name] = getattr(args, name)
    network |= {"n_class": 1, "checkpoint": None, "epoch": None, "flip": args.flip, "trial": trial}
    # tools.make_synthetic marks its trees with this file.
    network["synthetic"] = os.path.exists(os.path.join(args.data_path, "synthetic.json"))
    if not args.resume:
        net = EmbedNet(
            n_class=1,
            low_dim=network["low_dim"],
            arch=network["arch"],
            num_parts=network["num_parts"],
            pretrained=args.pretrained,
        )
        return net, network

    flags = {name: getattr(args, name) for name in NETWORK_DEFAULTS}
    flags |= {"dataset": args.dataset, "trial": trial, "drop": args.drop}
    checkpoint, path = utils.open_checkpoint(with_trial(args.resume, trial), args.model_path, flags)
    config = checkpoint["config"]
    if trial is not None and "trial" not in config:
        log.warning("%s does not say its trial: make sure that it was trained on %d", path, trial)
    log.info("checkpoint: %s, epoch %s", path, checkpoint.get("epoch"))
    net = load_network(checkpoint, path, args.drop)
    for name in (*NETWORK_DEFAULTS, "n_class"):
        if name in config:
            network[name] = config[name]
    network["checkpoint"] = path
    network["epoch"] = checkpoint.get("epoch")
    return net, network


def embed_images(
    net: EmbedNet, network: dict, images: Split, device: torch.device, args: argparse.Namespace
) -> dict[str, np.ndarray]:
    """The kinds of features that --features asks for, (N, dim) each."""
    size = (network["img_h"], network["img_w"])
    batches = ImageBatches(
        images, size, args.test_batch, args.workers, device, utils.rank(), utils.world_size()
    )
    is_silent = utils.rank() > 0 or None  # None: silent where the screen is no terminal
    bar = tqdm(batches, f"embed {len(images)} images", disable=is_silent, leave=False)
    kinds = FEATURE_KINDS if args.features == "both" else (args.features,)
    return extract_features(net, bar, len(images), kinds, args.flip)


def save_features(
    path: str, images: Split, features: dict[str, np.ndarray], network: dict, root: str
) -> None:
    """Write fc and pool5 (N, dim), the columns of `Split`, and the network, for tools.score."""
    paths = [os.path.relpath(path, root).replace(os.sep, "/") for path in images.paths]
    with utils.atomic_write(path) as partial, open(partial, "wb") as file:
        np.savez(
            file,
            **features,
            paths=np.array(paths),
            pids=images.pids,
            camids=images.camids,
            thermal=images.thermal,
            network=json.dumps(network),
        )
    log.info("features: %s", path)


if __name__ == "__main__":
    utils.run(main)
