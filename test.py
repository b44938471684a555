"""Score a checkpoint under a dataset's protocols: CMC, mAP and mINP, mean and deviation over the trials.

    python test.py --dataset sysu  --resume NAME --mode all --gall-mode single --model_path DIR
    python test.py --dataset regdb --resume NAME --trial 1 --model_path DIR
    python test.py --dataset regdb --resume 'regdb_..._trial{trial}_last.t' --trial all --search both --model_path DIR

Each image is embedded once, whatever the number of trials and protocols. The shape of the network and the size of
images are read from the checkpoint. --log_path gets test_<name>.log, and test_<name>.json with every trial's scores.
The rows "chance" are random rankings of the same lists. The published training flags are accepted and ignored.

SYSU-MM01's ten galleries are drawn with the seeds 0 to 9, as the field's baseline does. --save_features keeps the
features for tools.score, which also has the official galleries, Euclidean distances and re-ranking.
"""

import argparse
import json
import logging
import os

import numpy as np
from tqdm import tqdm

import data_loader
import data_manager
import utils
from data_manager import DATASETS, Split
from eval_metrics import KINDS, Results, extract_features
from model import BACKBONES, EmbedNet, network_of, to_device

log = logging.getLogger(__name__)


def build_parser() -> utils.Parser:
    parser = utils.Parser(description=__doc__)
    utils.add_shared_flags(parser, BACKBONES)
    for flag in parser.shapes():
        if flag.dest != "dataset":
            flag.default, flag.help = None, flag.help.replace("%(default)s", "the checkpoint's")
    parser.data.add_argument("--trial", default="1", choices=[*map(str, range(1, 11)), "all"],
                             help="RegDB's trial (%(default)s)")  # fmt: skip
    add = parser.add_argument_group("scoring").add_argument
    add("--pretrained", help="score an untrained network instead of a checkpoint: imagenet, none or a file")
    add("--features", choices=[*KINDS, "both"], default="both", help="features to score (%(default)s)")
    add("--flip", action="store_true", help="average the features of each image and its mirror image")
    add("--seed", type=int, default=1, help="seed of the random rankings and of an untrained network (%(default)s)")
    add("--save_features", metavar="FILE", help="write the features of all test images, .npz, for tools.score")
    utils.add_search_flags(add)
    add("--tvsearch", dest="search", action="store_const", const="t2v", help="short for --search t2v")
    for flag in ("lr", "optim", "epochs", "batch-size", "per_img", "w_hc", "thd", "dist-type", "save_epoch", "method"):
        parser.add_argument(f"--{flag}", action=Ignored, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.add_argument("--test-only", action=Ignored, nargs=0, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


class Ignored(argparse.Action):
    """A flag of train.py, which published commands pass here, too."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        namespace.ignored = [*getattr(namespace, "ignored", []), option_string]


def parse_args() -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args()
    dataset = DATASETS[args.dataset]
    if bool(args.resume) == bool(args.pretrained):
        parser.error("name the checkpoint with --resume, or score an untrained network with --pretrained none")
    args.trials = [None]
    if dataset.trial_trains:
        args.trials = [*dataset.trials] if args.trial == "all" else [int(args.trial)]
    for flag in ("resume", "save_features"):
        name = getattr(args, flag)
        if name and len(args.trials) > 1 and "{trial}" not in name:
            parser.error(f"--trial all needs ten files: write {{trial}} for the trial's number in --{flag} {name}")
    if args.save_features and not args.save_features.endswith(".npz"):
        parser.error(f"--save_features {args.save_features}: give a name that ends in .npz")
    return args


def name_of(name: str, trial: int | None) -> str:
    """A file's name with the number of its trial, if the dataset trains one model a trial."""
    return name if trial is None else name.replace("{trial}", str(trial))


def load_network(args: argparse.Namespace, trial: int | None) -> tuple[EmbedNet, dict]:
    """The --resume checkpoint (RegDB: of ``trial``), or an untrained network; and what is known of it."""
    known = {"arch": "resnet50", "low_dim": 512, "img_h": 288, "img_w": 144}
    known |= {name: vars(args)[name] for name in known if vars(args)[name] is not None}
    known |= {"n_class": 1, "checkpoint": None, "epoch": None, "flip": args.flip, "trial": trial}
    known["synthetic"] = os.path.exists(os.path.join(args.data_path, "synthetic.json"))  # drawn by tools.make_synthetic
    if args.pretrained:
        return EmbedNet(1, known["low_dim"], arch=known["arch"], pretrained=args.pretrained), known
    of_trial = argparse.Namespace(**{**vars(args), "trial": trial, "resume": name_of(args.resume, trial)})
    checkpoint, path = utils.open_checkpoint(of_trial, [flag.dest for flag in build_parser().shapes()])
    config = checkpoint["config"]
    if trial and "trial" not in config:
        log.warning("%s does not say which trial it was trained on: make sure that it was %s", path, trial)
    log.info("checkpoint: %s, epoch %s", path, checkpoint.get("epoch"))
    known |= {name: config[name] for name in ("arch", "low_dim", "img_h", "img_w", "n_class") if name in config}
    return network_of(checkpoint, path, args.drop), known | {"checkpoint": path, "epoch": checkpoint.get("epoch")}


def embed(net: EmbedNet, known: dict, args: argparse.Namespace, images: Split) -> dict[str, np.ndarray]:
    """The kinds of features that --features asks for, (N, dim) each."""
    size, device, share = (known["img_h"], known["img_w"]), next(net.parameters()).device, utils.share()
    batches = data_loader.ImageBatches(images, size, args.test_batch, args.workers, device, share)
    bar = tqdm(batches, f"embed {len(images.paths)} images", unit="batch", disable=share[0] > 0 or None, leave=False)
    kinds = KINDS if args.features == "both" else (args.features,)
    return extract_features(net, bar, len(images.paths), kinds, args.flip)


def save_features(path: str, images: Split, features: dict[str, np.ndarray], known: dict, root: str) -> None:
    """An .npz file for tools.score: fc and pool5 (N, dim), the lists of `Split`, and network, JSON."""
    paths = np.array([os.path.relpath(path, root).replace(os.sep, "/") for path in images.paths])
    lists = images._asdict() | {"paths": paths, "network": json.dumps(known)}
    with utils.whole_file(path) as partial, open(partial, "wb") as file:
        np.savez(file, **features, **lists)
    log.info("features: %s", path)


def main() -> None:
    args = parse_args()
    options, dataset, first = ["flip"] * args.flip, DATASETS[args.dataset], utils.share()[0] == 0
    untrained = f"untrained_{os.path.basename(args.pretrained or '')}"
    name = os.path.basename(args.resume).removesuffix(".t") if args.resume else untrained
    what = [f"trial-{args.trial}"] * dataset.trial_trains + dataset.values(vars(args))
    what += [args.features] * (args.features != "both") + options
    output = os.path.join(args.log_path, f"test_{name}_{'-'.join(what)}")
    utils.start_log(args, f"{output}.log")
    if "ignored" in args:
        log.info("note: only training uses %s: ignored", ", ".join(args.ignored))
    for flag in sorted({flag for own in DATASETS.values() for flag in own.search_flags} - {*dataset.search_flags}):
        if vars(args)[flag]:
            log.warning("%s has no --%s: ignored", dataset.title, flag.replace("_", "-"))
    device = utils.select_device(args.gpu)
    utils.seed_everything(args.seed)

    results, networks = Results(dataset, args.seed), []
    tests = []
    for trial in args.trials:  # what is missing is better known now than after the first trial
        if args.resume:
            utils.find_checkpoint(name_of(args.resume, trial), args.model_path)
        os.makedirs(os.path.dirname(name_of(args.save_features or "", trial)) or ".", exist_ok=True)
        images = dataset.test(args.data_path, trial)
        tests.append((trial, images, dataset.searches(images, vars(args), [trial] if trial else ())))
    for trial, images, searches in tests:
        if not args.save_features:
            images, searches = data_manager.restrict(images, searches)
        net, known = load_network(args, trial)
        networks.append(known)
        features = embed(to_device(net, device), known, args, images)
        for search in tqdm(searches if first else (), "score", unit="trial", disable=None, leave=False):
            results.add(search, images, features)
        if args.save_features and first:
            save_features(name_of(args.save_features, trial), images, features, known, args.data_path)
    if first:
        results.log(options, trained=bool(args.resume))
        header = {"flags": vars(args), "options": options, "versions": utils.versions(), "networks": networks}
        utils.write_json(f"{output}.json", header | results.to_json())
        log.info("all trials: %s.json", output)


if __name__ == "__main__":
    utils.run(main)
