"""Score a checkpoint under the protocols of SYSU-MM01 or RegDB: CMC, mAP and mINP, mean and deviation over the trials.

    python test.py --dataset sysu  --resume NAME --mode all --gall-mode single --model_path DIR
    python test.py --dataset regdb --resume NAME --trial 1 --model_path DIR
    python test.py --dataset regdb --resume 'regdb_..._trial{trial}_best.t' --trial all --search both --model_path DIR

Each distinct image is embedded once, whatever the number of trials and protocols. The network's shape and the image
size are read from the checkpoint. The table is printed; --log_path gets test_<name>.log, and test_<name>.json with the
scores of every trial. The rows "chance" are random rankings of the same lists. The flags that only train.py needs are
accepted and ignored.

SYSU-MM01's ten galleries are drawn with the seeds 0 to 9, as the field's baseline does, or are those of the dataset's
official evaluation (--gallery official), which compares Euclidean distances (--distance euclidean).
"""

import argparse
import json
import logging
import os
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import data_loader
import data_manager
import utils
from eval_metrics import RANKS, Distances, Scores, eval_regdb, eval_sysu, extract_features
from model import EmbedNet, describe_weights, least_height, load_weights

FROM_CHECKPOINT = ("arch", "low_dim", "drop", "img_h", "img_w")  # flags that it decides, unless they are given
FEATURES = ("fc", "pool5", "chance")
SYSU_TRIALS, REGDB_TRIALS = range(10), range(1, 11)

log = logging.getLogger(__name__)


class Row(NamedTuple):
    """A row of the result table: the scores under one protocol, by number of the trial."""

    protocol: str
    feature: str
    trials: dict[int, Scores]

    def mean_and_std(self) -> dict[str, tuple[float, float]]:
        trials = self.trials.values()
        measures = {f"rank{r}": [t.cmc[r - 1] for t in trials] for r in RANKS}
        measures |= {"mAP": [t.mAP for t in trials], "mINP": [t.mINP for t in trials]}
        return {name: (float(np.mean(values)), float(np.std(values))) for name, values in measures.items()}


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
    add("--pretrained", help="score an untrained network instead of a checkpoint: imagenet, none or a file")
    add("--mode", choices=["all", "indoor", "both"], default="all", help="SYSU-MM01 search (%(default)s)")
    add("--gall-mode", choices=["single", "multi", "both"], default="single", help="SYSU-MM01 shots (%(default)s)")
    add("--gallery", choices=["seeded", "official"], default="seeded", help="SYSU-MM01's ten draws (%(default)s)")
    add("--rand-perm", help="the rand_perm_cam.mat of SYSU-MM01's authors, for --gallery official")
    add("--distance", choices=Distances.KINDS, default="cosine", help="distance of the features (%(default)s)")
    add("--trial", type=trial_number, default=1, help="RegDB's trial, 1 to 10, or all (%(default)s)")
    add("--search", choices=["v2t", "t2v", "both"], default="v2t", help="RegDB's direction (%(default)s)")
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
    if (args.gallery == "official") != bool(args.rand_perm):
        parser.error("--gallery official and --rand_perm FILE, its rand_perm_cam.mat, go together")
    if args.dataset == "regdb" and args.trial == "all" and args.resume and "{trial}" not in args.resume:
        parser.error(f"--trial all needs ten models: write {{trial}} for the trial's number in --resume {args.resume}")
    return args, ignored


def trials_of(args: argparse.Namespace) -> Iterable[int]:
    """RegDB's trials to test, each of which has a model of its own."""
    return REGDB_TRIALS if args.trial == "all" else [args.trial]


def load_network(args: argparse.Namespace, device: torch.device, trial: int | None = None) -> tuple[EmbedNet, dict]:
    """The --resume checkpoint (RegDB: of ``trial``), or an untrained network; and the settings it is tested with."""
    settings = {"arch": "resnet50", "low_dim": 512, "img_h": 288, "img_w": 144, "n_class": 1, "has_drop": False}
    settings |= {"checkpoint": None, "epoch": None}
    if args.resume:
        path = utils.find_checkpoint(args.resume.replace("{trial}", str(trial)), args.model_path)
        checkpoint = utils.load_checkpoint(path)
        flags = argparse.Namespace(**{**vars(args), "trial": trial})
        settings |= utils.check_fit(path, checkpoint, describe_weights(checkpoint["net"], path), flags)
        settings |= {"checkpoint": path, "epoch": checkpoint.get("epoch")}
        log.info("checkpoint: %s, epoch %s", path, settings["epoch"])
        if args.dataset == "regdb" and "trial" not in settings:
            log.warning("%s does not say which trial it was trained on: make sure that it was %s", path, trial)
    settings |= {name: vars(args)[name] for name in FROM_CHECKPOINT if vars(args)[name] is not None}
    if settings["img_h"] < least_height():
        utils.fail(f"--img_h {settings['img_h']} is too low for six stripes: give {least_height()} or more")
    drop = 0.5 if settings["has_drop"] else 0.0  # the rate does not matter in evaluation
    pretrained = "none" if args.resume else args.pretrained
    net = EmbedNet(settings["n_class"], settings["low_dim"], drop, settings["arch"], pretrained=pretrained)
    if args.resume:
        load_weights(net, checkpoint["net"], path)
    return net.to(device, memory_format=torch.channels_last), settings


def embed(net: EmbedNet, settings: dict, args: argparse.Namespace, paths: list[str], modality: str) -> dict:
    size = settings["img_h"], settings["img_w"]
    device = next(net.parameters()).device
    batches = data_loader.ImageBatches(paths, size, args.test_batch, args.workers, device)
    return extract_features(net, tqdm(batches, f"embed {modality}", disable=None, leave=False), modality)


def distances(
    feature: str, query: dict, gallery: dict, args: argparse.Namespace, draw: list[int]
) -> np.ndarray | Distances:
    """(queries, gallery) from the features that `embed` gives; "chance" stands for a random ranking, seeded by draw."""
    if feature == "chance":
        return np.random.default_rng([args.seed, *draw]).random((len(query["fc"]), len(gallery["fc"])))
    return Distances(query[feature], gallery[feature], args.distance)


def test_sysu(args: argparse.Namespace, device: torch.device) -> tuple[list[Row], list[dict]]:
    """A row per protocol and kind of feature, and the settings of the network."""
    modes = ["all", "indoor"] if args.mode == "both" else [args.mode]
    shots = ["single", "multi"] if args.gall_mode == "both" else [args.gall_mode]
    query = data_manager.sysu_query(args.data_path)
    rand_perm = data_manager.read_rand_perm(args.rand_perm) if args.rand_perm else None
    galleries = {
        f"{mode}-search {shot}-shot": [
            data_manager.sysu_gallery(args.data_path, mode, shot, trial, rand_perm) for trial in SYSU_TRIALS
        ]
        for mode in modes
        for shot in shots
    }
    net, settings = load_network(args, device)
    # Each distinct gallery image is embedded once, whatever the number of draws that it is in.
    paths = sorted({path for draws in galleries.values() for gallery in draws for path in gallery.paths})
    place = {path: i for i, path in enumerate(paths)}
    query_features = embed(net, settings, args, query.paths, "thermal")
    gallery_features = embed(net, settings, args, paths, "visible")

    rows = []
    for protocol, draws in galleries.items():
        log.info("%s: %d queries, %d gallery images of %d persons, %d trials", protocol, len(query.paths),
                 len(draws[0].paths), len({*draws[0].pids}), len(draws))  # fmt: skip
        by_feature = {feature: Row(protocol, feature, {}) for feature in FEATURES}
        for trial, gallery in zip(SYSU_TRIALS, draws, strict=True):
            picks = [place[path] for path in gallery.paths]
            picked = {name: values[picks] for name, values in gallery_features.items()}
            for feature, row in by_feature.items():
                distmat = distances(feature, query_features, picked, args, [trial])
                with utils.blame(args.data_path):
                    row.trials[trial] = eval_sysu(distmat, query.pids, gallery.pids, query.camids, gallery.camids)
        rows += by_feature.values()
    return rows, [settings]


def test_regdb(args: argparse.Namespace, device: torch.device) -> tuple[list[Row], list[dict]]:
    """A row per direction and kind of feature, and the settings of each trial's network."""
    searches = ["v2t", "t2v"] if args.search == "both" else [args.search]
    rows = {(search, feature): Row(search, feature, {}) for search in searches for feature in FEATURES}
    networks = []
    for trial in trials_of(args):
        visible, thermal = (data_manager.regdb_split(args.data_path, trial, m, "test") for m in ("visible", "thermal"))
        net, settings = load_network(args, device, trial)
        networks.append(settings)
        log.info("trial %d: %d visible and %d thermal images", trial, len(visible.paths), len(thermal.paths))
        visible_side = visible, embed(net, settings, args, visible.paths, "visible")
        thermal_side = thermal, embed(net, settings, args, thermal.paths, "thermal")
        for (search, feature), row in rows.items():
            sides = (visible_side, thermal_side) if search == "v2t" else (thermal_side, visible_side)
            (query, query_features), (gallery, gallery_features) = sides
            distmat = distances(feature, query_features, gallery_features, args, [trial, search == "t2v"])
            with utils.blame(args.data_path):
                row.trials[trial] = eval_regdb(distmat, query.pids, gallery.pids)
    return [*rows.values()], networks


def report(rows: list[Row]) -> None:
    log.info("")
    for row in rows:
        for trial, scores in row.trials.items():
            log.debug(f"{row.protocol}  {row.feature}  trial {trial}: {scores}")
    columns = [*(f"rank-{r}" for r in RANKS), "mAP", "mINP"]
    several = len(rows[0].trials) > 1
    unit = f"%, mean ± deviation over {len(rows[0].trials)} trials" if several else "%"
    log.info(f"{'protocol':26s}{'features':9s}" + "".join(f"{column:>14s}" for column in columns))
    for row in rows:
        cells = (f"{100 * mean:.2f}" + f" ± {100 * std:4.2f}" * several for mean, std in row.mean_and_std().values())
        log.info(f"{row.protocol:26s}{row.feature:9s}" + "".join(f"{cell:>14s}" for cell in cells))
    log.info(unit)


def write_json(path: str, rows: list[Row], networks: list[dict], args: argparse.Namespace) -> None:
    results = [
        {
            "protocol": row.protocol,
            "feature": row.feature,
            "mean": {name: mean for name, (mean, _) in row.mean_and_std().items()},
            "std": {name: std for name, (_, std) in row.mean_and_std().items()},
            "trials": [
                {"trial": trial, "cmc": t.cmc.tolist(), "mAP": t.mAP, "mINP": t.mINP} for trial, t in row.trials.items()
            ],
        }
        for row in rows
    ]
    content = {"flags": vars(args), "versions": utils.versions(), "networks": networks, "results": results}
    with utils.whole_file(path) as partial, open(partial, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)


def main() -> None:
    args, ignored = parse_args()
    if args.resume:  # a missing one is better known now than after the first trial
        for trial in trials_of(args):
            utils.find_checkpoint(args.resume.replace("{trial}", str(trial)), args.model_path)
    name = f"untrained_{os.path.basename(args.pretrained)}" if args.pretrained else os.path.basename(args.resume)
    name = name.removesuffix(".t")
    what = f"{args.mode}-{args.gall_mode}" if args.dataset == "sysu" else f"trial-{args.trial}-{args.search}"
    what += "-official" * (args.gallery == "official") + "-euclidean" * (args.distance == "euclidean")
    output = os.path.join(args.log_path, f"test_{name}_{what}")
    utils.start_log(f"{output}.log")
    utils.log_run(args)
    if ignored:
        log.info("note: only training uses %s: ignored", ", ".join(f"--{flag}" for flag in ignored))
    device = utils.select_device(args.gpu)
    utils.seed_everything(args.seed)
    rows, networks = (test_sysu if args.dataset == "sysu" else test_regdb)(args, device)
    report(rows)
    write_json(f"{output}.json", rows, networks, args)
    log.info("all trials: %s.json", output)


if __name__ == "__main__":
    utils.run(main)
