"""Score a checkpoint under the protocols of SYSU-MM01 or RegDB: CMC, mAP and mINP, mean and deviation over the trials.

    python test.py --dataset sysu  --resume NAME --mode all --gall-mode single --model_path DIR
    python test.py --dataset regdb --resume NAME --trial 1 --model_path DIR
    python test.py --dataset regdb --resume 'regdb_..._trial{trial}_best.t' --trial all --search both --model_path DIR

Each distinct image is embedded once, whatever the number of trials and protocols. The network's shape and the image
size are read from the checkpoint. The table is printed; --log_path gets test_<name>.log, and test_<name>.json with the
scores of every trial. The rows "chance" are random rankings of the same lists. The flags that only train.py needs are
accepted and ignored.

SYSU-MM01's ten galleries are drawn with the seeds 0 to 9, as the field's baseline does, or are those of the dataset's
official evaluation (--gallery official), which compares Euclidean distances (--distance euclidean). Features can be
kept (--save_features, for tools.score) and handed to that evaluation's own code (--mat).
"""

import argparse
import json
import logging
import os

import numpy as np
import scipy.io
import torch
from tqdm import tqdm

import data_loader
import data_manager
import utils
from data_manager import Search, Split
from eval_metrics import KINDS, Results, extract_features
from model import EmbedNet, describe_weights, least_height, network_of

FROM_CHECKPOINT = ("arch", "low_dim", "drop", "img_h", "img_w")  # flags that it decides, unless they are given
MAT_PERSONS = 533  # the persons that SYSU-MM01's own evaluation counts, in its rand_perm_cam.mat

log = logging.getLogger(__name__)


def build_parser() -> tuple[argparse.ArgumentParser, list[argparse.Action]]:
    """The parser, and those of its flags that have no effect here."""
    parser = utils.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in utils.add_shared_flags(parser):
        if flag.dest in FROM_CHECKPOINT:
            flag.default, flag.help = None, flag.help.replace("%(default)s", "the checkpoint's")
    unused = utils.add_training_flags(parser)
    for flag in unused:
        flag.default, flag.help = None, argparse.SUPPRESS
    add = parser.add_argument
    add("--pretrained", type=utils.weights,
        help="score an untrained network instead of a checkpoint: imagenet, none or a file")  # fmt: skip
    add("--trial", type=trial_number, default=1, help="RegDB's trial, 1 to 10, or all (%(default)s)")
    add("--features", choices=[*KINDS, "both"], default="both", help="features to score (%(default)s)")
    add("--flip", action="store_true", help="average the features of each image and its mirror image")
    add("--save-features", metavar="FILE", help="write the features of all test images, .npz, for tools.score")
    add("--mat", metavar="DIR", help="write those of SYSU-MM01 as .mat files for its official evaluation")
    utils.add_scoring_flags(parser)
    return parser, unused


def trial_number(text: str) -> int | str:
    return text if text == "all" else utils.number(int, 1, 11)(text)


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    """The flags, and the names of those that were given without having an effect here."""
    parser, unused = build_parser()
    args = parser.parse_args()
    args.data_path = args.data_path or utils.DATA_PATHS[args.dataset]
    ignored = [flag.dest for flag in unused if getattr(args, flag.dest) is not None]
    for flag in unused:
        delattr(args, flag.dest)
    if not args.resume and not args.pretrained:
        parser.error("name the checkpoint with --resume, or score an untrained network with --pretrained none")
    if args.resume and args.pretrained:
        parser.error("--pretrained scores an untrained network: drop it, or drop --resume")
    if args.mat and args.dataset == "regdb":
        parser.error("--mat is for SYSU-MM01: RegDB has no official evaluation code")
    if args.dataset == "regdb" and args.trial == "all":
        for flag in ("resume", "save_features"):
            name = getattr(args, flag)
            if name and "{trial}" not in name:
                parser.error(f"--trial all needs ten files: write {{trial}} for the trial's number in --{flag} {name}")
    return args, ignored


def of_trial(name: str, trial: int | None) -> str:
    """A file's name with the number of RegDB's trial in it; SYSU-MM01 has none."""
    return name if trial is None else name.replace("{trial}", str(trial))


def list_images(
    args: argparse.Namespace, trial: int | None, rand_perm: np.ndarray | None
) -> tuple[Split, list[Search]]:
    """The images to embed, and what to rank of them: all protocols of SYSU-MM01, or those of a trial of RegDB."""
    with utils.blame(args.data_path):
        images = data_manager.list_test(args.dataset, args.data_path, trial)
        searches = data_manager.list_searches(
            args.dataset, images, trial, args.mode, args.gall_mode, args.search, rand_perm
        )
    data_manager.check_counts(images, searches, args.dataset)
    if args.save_features or args.mat:
        return images, searches
    return data_manager.restrict(images, searches)


def load_network(args: argparse.Namespace, device: torch.device, trial: int | None = None) -> tuple[EmbedNet, dict]:
    """The --resume checkpoint (RegDB: of ``trial``), or an untrained network; and the settings it is tested with."""
    settings = {"arch": "resnet50", "low_dim": 512, "img_h": 288, "img_w": 144, "n_class": 1, "has_drop": False}
    settings |= {"checkpoint": None, "epoch": None, "flip": args.flip}
    if args.resume:
        path = utils.find_checkpoint(of_trial(args.resume, trial), args.model_path)
        checkpoint = utils.load_checkpoint(path)
        flags = argparse.Namespace(**{**vars(args), "trial": trial})
        settings |= utils.check_fit(
            path, checkpoint, describe_weights(checkpoint["net"], path), flags, ("img_h", "img_w")
        )
        settings |= {"checkpoint": path, "epoch": checkpoint.get("epoch")}
        log.info("checkpoint: %s, epoch %s", path, settings["epoch"])
        if args.dataset == "regdb" and "trial" not in settings:
            log.warning("%s does not say which trial it was trained on: make sure that it was %s", path, trial)
    settings |= {name: vars(args)[name] for name in FROM_CHECKPOINT if vars(args)[name] is not None}
    if settings["img_h"] < least_height():
        utils.fail(f"--img_h {settings['img_h']} is too low for six stripes: give {least_height()} or more")
    if args.resume:
        net = network_of(checkpoint["net"], path)
    else:
        net = EmbedNet(1, settings["low_dim"], arch=settings["arch"], pretrained=args.pretrained)
    return net.to(device, memory_format=torch.channels_last), settings | {"trial": trial}


def embed(net: EmbedNet, settings: dict, args: argparse.Namespace, images: Split) -> dict[str, np.ndarray]:
    """The kinds of features that --features asks for, (N, dim) each; every image is read once."""
    size, device = (settings["img_h"], settings["img_w"]), next(net.parameters()).device
    thermal_cameras = data_manager.THERMAL_CAMERAS[args.dataset]
    batches = data_loader.ImageBatches(images, thermal_cameras, size, args.test_batch, args.workers, device)
    bar = tqdm(batches, f"embed {len(images.paths)} images", unit="batch", disable=None, leave=False)
    kinds = KINDS if args.features == "both" else (args.features,)
    return extract_features(net, bar, len(images.paths), kinds, args.flip)


def save_features(path: str, images: Split, features: dict[str, np.ndarray], settings: dict, root: str) -> None:
    """An .npz file for tools.score: fc and pool5 (N, dim), pids, camids, paths below ``root``, and network, in JSON."""
    paths = np.array([os.path.relpath(path, root).replace(os.sep, "/") for path in images.paths])
    with utils.whole_file(path) as partial, open(partial, "wb") as file:
        np.savez(file, **features, pids=images.pids, camids=images.camids, paths=paths, network=json.dumps(settings))


def write_mat(folder: str, images: Split, features: dict[str, np.ndarray]) -> None:
    """Files <kind>_cam<1 to 6>.mat with a cell array "feature": row i of cell {person id} is their i-th image."""
    for kind, values in features.items():
        for cam in sorted(data_manager.VISIBLE_CAMERAS + data_manager.INFRARED_CAMERAS):
            cells = np.empty((max(MAT_PERSONS, images.pids.max()), 1), dtype=object)
            for pid in range(1, len(cells) + 1):
                cells[pid - 1, 0] = values[(images.pids == pid) & (images.camids == cam)].astype(np.float64)
            path = os.path.join(folder, f"{kind}_cam{cam}.mat")
            with utils.whole_file(path) as partial, open(partial, "wb") as file:
                scipy.io.savemat(file, {"feature": cells})


def main() -> None:
    args, ignored = parse_args()
    options = ["flip"] * args.flip + utils.scoring_options(args)
    trials = [None] if args.dataset == "sysu" else data_manager.REGDB_TRIALS if args.trial == "all" else [args.trial]
    if args.resume:  # a missing one is better known now than after the first trial
        for trial in trials:
            utils.find_checkpoint(of_trial(args.resume, trial), args.model_path)
    name = f"untrained_{os.path.basename(args.pretrained)}" if args.pretrained else os.path.basename(args.resume)
    what = [f"{args.mode}-{args.gall_mode}"] if args.dataset == "sysu" else [f"trial-{args.trial}-{args.search}"]
    what += [args.features] * (args.features != "both") + options
    output = os.path.join(args.log_path, f"test_{name.removesuffix('.t')}_{'-'.join(what)}")
    utils.start_log(f"{output}.log")
    utils.log_run(args)
    if ignored:
        log.info("note: only training uses %s: ignored", ", ".join(f"--{flag}" for flag in ignored))
    if args.save_features:
        if not args.save_features.endswith(".npz"):
            utils.fail(f"--save_features {args.save_features}: give a name that ends in .npz")
        utils.make_folder(os.path.dirname(args.save_features), "--save_features")
    if args.mat:
        utils.make_folder(args.mat, "--mat")
    device = utils.select_device(args.gpu)
    utils.seed_everything(args.seed)

    rand_perm = data_manager.read_rand_perm(args.rand_perm) if args.rand_perm else None
    results, networks = Results(args.dataset, args.distance, args.rerank, args.seed), []
    lists = [list_images(args, trial, rand_perm) for trial in trials]
    for trial, (images, searches) in zip(trials, lists, strict=True):
        net, settings = load_network(args, device, trial)
        networks.append(settings)
        features = embed(net, settings, args, images)
        with utils.blame(args.data_path):
            for search in tqdm(searches, "score", unit="trial", disable=None, leave=False):
                results.add(search, images, features)
        if args.save_features:
            path = of_trial(args.save_features, trial)
            save_features(path, images, features, settings, args.data_path)
            log.info("features: %s", path)
        if args.mat:
            write_mat(args.mat, images, features)
            log.info("features for the official evaluation: %s", os.path.join(args.mat, "<kind>_cam<1 to 6>.mat"))
    utils.report(results, networks, options, args, f"{output}.json")


if __name__ == "__main__":
    utils.run(main)
