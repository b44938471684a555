"""Score a checkpoint under the protocols of SYSU-MM01 or RegDB: CMC, mAP and mINP, mean and deviation over the trials.

    python test.py --dataset sysu  --resume NAME --mode all --gall-mode single --model_path DIR
    python test.py --dataset regdb --resume NAME --trial 1 --model_path DIR
    python test.py --dataset regdb --resume 'regdb_..._trial{trial}_best.t' --trial all --search both --model_path DIR

Each distinct image is embedded once, whatever the number of trials and protocols. The network's shape and the image
size are read from the checkpoint. The table is printed; --log_path gets test_<name>.log, and test_<name>.json with the
scores of every trial. The rows "chance" are random rankings of the same lists.
"""

import argparse
import json
import logging
import os
import platform
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import data_loader
import data_manager
import utils
from eval_metrics import Scores, cosine_distmat, eval_regdb, eval_sysu, extract_features
from model import EmbedNet, describe_weights, least_height, load_weights

FEATURES = ("fc", "pool5")
RANKS = (1, 5, 10, 20)
SYSU_TRIALS, REGDB_TRIALS = range(10), range(1, 11)

log = logging.getLogger(__name__)


class Row(NamedTuple):
    """A row of the result table: scores of each trial under one protocol."""

    protocol: str
    feature: str
    trials: list[Scores]

    def mean_and_std(self) -> dict[str, tuple[float, float]]:
        measures = {f"rank{r}": [t.cmc[r - 1] for t in self.trials] for r in RANKS}
        measures |= {"mAP": [t.mAP for t in self.trials], "mINP": [t.mINP for t in self.trials]}
        return {name: (float(np.mean(values)), float(np.std(values))) for name, values in measures.items()}


def build_parser() -> tuple[argparse.ArgumentParser, list[argparse.Action]]:
    """The parser, and those of its flags that have no effect here."""
    parser = utils.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    utils.add_shared_flags(parser)
    add = parser.add_argument
    add("--mode", choices=["all", "indoor", "both"], default="all", help="SYSU-MM01 search (%(default)s)")
    add("--gall-mode", choices=["single", "multi", "both"], default="single", help="SYSU-MM01 shots (%(default)s)")
    add("--trial", type=trial_number, default=1, help="RegDB's trial, 1 to 10, or all (%(default)s)")
    add(
        "--search",
        choices=["v2t", "t2v", "both"],
        default="v2t",
        help="RegDB: visible to thermal, or back (%(default)s)",
    )
    unused = utils.add_training_flags(parser.add_argument_group("flags of train.py, accepted and ignored"))
    # None means not given: the checkpoint decides.
    parser.set_defaults(**dict.fromkeys(("arch", "low_dim", "drop", "img_h", "img_w", "pretrained")))
    parser.set_defaults(**{flag.dest: None for flag in unused})
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
        parser.error(
            "name the checkpoint with --resume (or score an untrained network with --pretrained imagenet|none)"
        )
    if args.resume and args.pretrained:
        parser.error("--pretrained scores an untrained network: drop it, or drop --resume")
    if args.dataset == "regdb" and args.trial == "all" and args.resume and "{trial}" not in args.resume:
        parser.error(
            f"--trial all needs ten models: write {{trial}} where --resume {args.resume} has the trial's number"
        )
    return args, ignored


class Embedder:
    """A network and its image size: ``embed(paths, modality)`` gives the features of image files."""

    def __init__(self, args: argparse.Namespace, device: torch.device, trial: int | None = None):
        """Load the --resume checkpoint (RegDB: of ``trial``), or start an untrained network from --pretrained."""
        found = {"arch": "resnet50", "low_dim": 512, "drop": 0.0, "n_class": 1, "epoch": None}
        path, checkpoint = None, None
        if args.resume:
            path = utils.find_checkpoint(args.resume.replace("{trial}", str(trial)), args.model_path)
            checkpoint = utils.load_checkpoint(path)
            flags = argparse.Namespace(**{**vars(args), "trial": trial})
            weights = describe_weights(checkpoint["net"], path)
            found |= utils.check_fit(path, checkpoint, weights, flags) | {"epoch": checkpoint.get("epoch")}
            log.info("checkpoint: %s, epoch %s", path, found["epoch"])
            if "config" not in checkpoint and args.dataset == "regdb":
                log.warning("%s does not know which trial it was trained on: make sure that it was %s", path, trial)
        self.settings = {"img_h": 288, "img_w": 144, **found, "checkpoint": path}
        self.settings |= {k: v for k, v in vars(args).items() if k in self.settings and v is not None}
        if self.settings["img_h"] < least_height():
            utils.fail(f"--img_h {self.settings['img_h']} is too low for six stripes: give {least_height()} or more")
        net = EmbedNet(
            found["n_class"],
            self.settings["low_dim"],
            0.5 if found.get("has_drop") else 0.0,  # which rate does not matter in evaluation
            self.settings["arch"],
            pretrained="none" if checkpoint else args.pretrained,
        )
        if checkpoint:
            load_weights(net, checkpoint["net"], path)
        self.net = net.to(device, memory_format=torch.channels_last)
        self.args, self.device = args, device

    def embed(self, paths: list[str], modality: str) -> dict[str, np.ndarray]:
        size = (self.settings["img_h"], self.settings["img_w"])
        batches = data_loader.ImageBatches(paths, size, self.args.test_batch, self.args.workers, self.device)
        return extract_features(self.net, tqdm(batches, f"embed {modality}", disable=None, leave=False), modality)


def test_sysu(args: argparse.Namespace, device: torch.device) -> tuple[list[Row], dict]:
    modes = ["all", "indoor"] if args.mode == "both" else [args.mode]
    shots = ["single", "multi"] if args.gall_mode == "both" else [args.gall_mode]
    query = data_manager.sysu_query(args.data_path)
    galleries = {
        (mode, shot): [data_manager.sysu_gallery(args.data_path, mode, shot, trial) for trial in SYSU_TRIALS]
        for mode in modes
        for shot in shots
    }
    embedder = Embedder(args, device)
    paths = sorted({path for trials in galleries.values() for gallery in trials for path in gallery.paths})
    row_of = {path: row for row, path in enumerate(paths)}
    query_features, gallery_features = embedder.embed(query.paths, "thermal"), embedder.embed(paths, "visible")

    rows = []
    for (mode, shot), trials in galleries.items():
        protocol = f"{mode}-search {shot}-shot"
        log.info("%s: %d queries, %d gallery images of %d persons, %d trials", protocol, len(query.paths),
                 len(trials[0].paths), len(set(trials[0].pids)), len(trials))  # fmt: skip
        for feature in (*FEATURES, "chance"):
            scores = []
            for trial, gallery in zip(SYSU_TRIALS, trials, strict=True):
                if feature == "chance":
                    distmat = np.random.default_rng([args.seed, trial]).random((len(query.paths), len(gallery.paths)))
                else:
                    picked = gallery_features[feature][[row_of[path] for path in gallery.paths]]
                    distmat = cosine_distmat(query_features[feature], picked)
                with utils.blame(args.data_path):
                    scores.append(eval_sysu(distmat, query.pids, gallery.pids, query.camids, gallery.camids))
            rows.append(Row(protocol, feature, scores))
    return rows, embedder.settings


def test_regdb(args: argparse.Namespace, device: torch.device) -> tuple[list[Row], dict]:
    trials = REGDB_TRIALS if args.trial == "all" else [args.trial]
    searches = ["v2t", "t2v"] if args.search == "both" else [args.search]
    rows = {(search, feature): Row(search, feature, []) for search in searches for feature in (*FEATURES, "chance")}
    for trial in trials:
        visible = data_manager.regdb_split(args.data_path, trial, "visible", "test")
        thermal = data_manager.regdb_split(args.data_path, trial, "thermal", "test")
        log.info("trial %d: %d visible and %d thermal images", trial, len(visible.paths), len(thermal.paths))
        embedder = Embedder(args, device, trial)
        features = embedder.embed(visible.paths, "visible"), embedder.embed(thermal.paths, "thermal")
        for (search, feature), row in rows.items():
            # Both directions score the same features; t2v makes thermal images the queries.
            (query, query_features), (gallery, gallery_features) = [*zip((visible, thermal), features, strict=True)][
                :: 1 if search == "v2t" else -1
            ]
            if feature == "chance":
                distmat = np.random.default_rng([args.seed, trial]).random((len(query.paths), len(gallery.paths)))
            else:
                distmat = cosine_distmat(query_features[feature], gallery_features[feature])
            with utils.blame(args.data_path):
                row.trials.append(eval_regdb(distmat, query.pids, gallery.pids))
    return [*rows.values()], embedder.settings


def report(rows: list[Row]) -> None:
    log.info("")
    for row in rows:
        for number, t in enumerate(row.trials):
            ranks = "  ".join(f"rank-{r} {t.cmc[r - 1]:.2%}" for r in RANKS)
            log.debug(f"{row.protocol}  {row.feature}  trial {number}: {ranks}  mAP {t.mAP:.2%}  mINP {t.mINP:.2%}")
    columns = [*(f"rank-{r}" for r in RANKS), "mAP", "mINP"]
    log.info(f"{'protocol':24s} {'features':9s}" + "".join(f"{column:>15s}" for column in columns) + "   %, mean ± std")
    for row in rows:
        cells = (f"{100 * mean:6.2f} ± {100 * std:5.2f}" for mean, std in row.mean_and_std().values())
        log.info(f"{row.protocol:24s} {row.feature:9s}" + "".join(f"{cell:>15s}" for cell in cells))


def write_json(path: str, rows: list[Row], settings: dict, args: argparse.Namespace) -> None:
    results = [
        {
            "protocol": row.protocol,
            "feature": row.feature,
            "mean": {name: mean for name, (mean, _) in row.mean_and_std().items()},
            "std": {name: std for name, (_, std) in row.mean_and_std().items()},
            "trials": [{"cmc": t.cmc.tolist(), "mAP": t.mAP, "mINP": t.mINP} for t in row.trials],
        }
        for row in rows
    ]
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    with utils.whole_file(path) as partial, open(partial, "w", encoding="utf-8") as file:
        json.dump({"flags": vars(args), "network": settings, "versions": versions, "results": results}, file, indent=1)


def main() -> None:
    args, ignored = parse_args()
    name = os.path.basename(args.resume).removesuffix(".t") or f"untrained_{os.path.basename(args.pretrained)}"
    what = f"{args.mode}-{args.gall_mode}" if args.dataset == "sysu" else f"trial-{args.trial}-{args.search}"
    output = os.path.join(args.log_path, f"test_{name}_{what}")
    utils.start_log(f"{output}.log")
    utils.log_run(args)
    if ignored:
        log.info("note: only training uses %s: ignored", ", ".join(f"--{flag}" for flag in ignored))
    device = utils.select_device(args.gpu)
    utils.seed_everything(args.seed)
    rows, settings = (test_sysu if args.dataset == "sysu" else test_regdb)(args, device)
    report(rows)
    write_json(f"{output}.json", rows, settings, args)
    log.info("all trials: %s.json", output)


if __name__ == "__main__":
    utils.run(main)
