"""Score features under a dataset's protocols with the evaluation of test.py, whatever made them.

    python test.py --resume NAME --save_features features.npz
    python -m tools.score features.npz --mode both --gall-mode both
    python -m tools.score --dataset regdb trial_1.npz trial_2.npz …

A file holds the features of all test images, of both modalities. For another method write one with numpy.savez:

    paths     (N,) the images' paths below the dataset's folder, like cam1/0006/0001.jpg: galleries depend on them
    pids      (N,) person ids
    camids    (N,) camera numbers: of SYSU-MM01 1 to 6, of RegDB 1 visible and 2 thermal
    thermal   (N,) bool, which images are infrared; of SYSU-MM01 and RegDB optional, camera numbers tell it
    any name  (N, dim) float features; several arrays are scored each
    network   optional, JSON: {"trial": 3, "flip": true}, RegDB's trial and whether mirror images were averaged

Each file gets a table of its own, but files of RegDB are the trials of one method, and are averaged.
"""

import argparse
import json
import os
import zipfile

import numpy as np
from tqdm import tqdm

import utils
from data_manager import DATASETS, Dataset, Split, check_counts, read_rand_perm
from eval_metrics import Results

KINDS = {"paths": "U", "pids": "iu", "camids": "iu", "thermal": "b"}  # the types of the lists, as numpy calls them


def build_parser() -> utils.Parser:
    parser = utils.Parser(prog="python -m tools.score", description=__doc__)
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE.npz", help="features of all test images")
    add("--dataset", choices=[*DATASETS], default="sysu", help="dataset (%(default)s)")
    add("--features", metavar="NAME", help="score these features alone")
    add("--log_path", default="log/", help="folder of score_<file>.log and .json (%(default)s)")
    add("--seed", type=int, default=1, help="seed of the random rankings (%(default)s)")
    utils.add_scoring_flags(parser)
    return parser


def load_features(path: str, dataset: Dataset, only: str | None = None) -> tuple[Split, dict[str, np.ndarray], dict]:
    """The images of a file, their features by kind, or ``only`` this kind, and what it says of the network.

    OSError: it is missing, damaged, or not such a file.
    """
    try:
        with zipfile.ZipFile(path) as archive, np.load(path, allow_pickle=False) as file:
            if archive.testzip():
                raise ValueError("a checksum is wrong")
            arrays = dict(file)
        network = dict(json.loads(str(arrays.pop("network", "{}"))))
        lists = {name: arrays.pop(name, None) for name in KINDS}
        if lists["thermal"] is None and dataset.thermal_cameras:
            lists["thermal"] = np.isin(lists["camids"], dataset.thermal_cameras)
        n = np.size(lists["paths"])
        for name, values in lists.items():
            if values is None or values.dtype.kind not in KINDS[name] or values.shape != (n,) or not n:
                raise ValueError(f"it must hold {name!r}, an entry for each image")
        if not dataset.trial_trains and len(np.unique(lists["paths"])) < n:
            raise ValueError("two images have one of the paths, by which galleries are drawn")
        arrays = arrays if only is None else {name: values for name, values in arrays.items() if name == only}
        if not arrays or "chance" in arrays:
            raise ValueError(f"it must hold features {only}" if only else "it must hold features, not named chance")
        for name, values in arrays.items():
            fits = values.ndim == 2 and len(values) == n and values.dtype.kind == "f"
            if not fits or not np.isfinite(values).all():
                raise ValueError(f"{name} {values.shape} {values.dtype} is not ({n}, dim) finite floats")
    except Exception as error:  # zipfile and numpy raise whatever the damage leads to
        raise OSError(f"{path} cannot be read as features ({error}): see --help for what it must hold") from error
    paths, pids, camids, thermal = lists.values()
    return Split(paths.tolist(), pids.astype(np.int64), camids.astype(np.int64), thermal), arrays, network


def score(files: list[str], args: argparse.Namespace) -> tuple[Results, list[dict]]:
    """The results of one method, and what is known of its networks. OSError, ValueError: a file cannot be scored."""
    dataset = DATASETS[args.dataset]
    rand_perm = read_rand_perm(args.rand_perm) if args.rand_perm else None
    results, networks = Results(dataset, args.distance, args.rerank, args.seed), []
    for number, path in enumerate(files, dataset.trials.start):
        images, features, network = load_features(path, dataset, args.features)
        networks.append({"features": path, **network})
        check_counts(images, dataset, "test")
        try:
            trials = [int(network.get("trial") or number)] if dataset.trial_trains else ()
            searches = dataset.searches(images, vars(args), trials, rand_perm)
            for search in tqdm(searches, "score", unit="trial", disable=None, leave=False):
                if search.trial in results.scores.get((search.protocol, "chance"), ()):
                    raise ValueError(f"another file is of trial {search.trial}, too")
                results.add(search, images, features)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return results, networks


def main() -> None:
    args = build_parser().parse_args()
    options, dataset = utils.scoring_options(args), DATASETS[args.dataset]
    for files in [args.files] if dataset.trial_trains else [[file] for file in args.files]:
        what = [f"{len(files)}-trials"] * dataset.trial_trains + dataset.values(vars(args))
        what += [args.features] * bool(args.features) + options
        name = os.path.basename(files[0]).removesuffix(".npz")
        output = os.path.join(args.log_path, f"score_{name}_{'-'.join(what)}")
        utils.start_log(args, f"{output}.log")
        results, networks = score(files, args)
        flip = ["flip"] * any(network.get("flip") for network in networks)
        utils.write_results(results, networks, flip + options, args, f"{output}.json")


if __name__ == "__main__":
    utils.run(main)
