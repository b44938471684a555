"""Score features under the protocols of SYSU-MM01 or RegDB with the evaluation of test.py, whatever made them.

    python test.py --resume NAME --save_features features.npz
    python -m tools.score features.npz --mode both --gall-mode both
    python -m tools.score --dataset regdb trial_1.npz trial_2.npz …

A file holds the features of all test images of one network, of both modalities. To score another method write, with
numpy.savez,

    pids      (N,) person ids            camids   (N,) camera numbers: 1 to 6; RegDB: 1 visible, 2 thermal
    paths     (N,) the images' paths below the dataset's folder
    any name  (N, dim) float features; several arrays are scored each
    network   optional, JSON: {"trial": 3, "flip": true}, RegDB's trial and whether mirror images were averaged

Paths are those of the dataset, like cam1/0006/0001.jpg, and are ordered as text: seeded galleries depend on it.

Of SYSU-MM01 each file gets a table of its own; of RegDB files are the trials of one method, and are averaged.
"""

import argparse
import json
import logging
import math
import os
import zipfile

import numpy as np
from tqdm import tqdm

import data_manager
import utils
from eval_metrics import Results

LISTS = ("pids", "camids", "paths")
FLOATS = (np.float16, np.float32, np.float64)

log = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    parser = utils.Parser(
        prog="python -m tools.score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE.npz", help="features of all test images")
    add("--dataset", choices=["sysu", "regdb"], default="sysu", help="dataset (%(default)s)")
    add("--features", metavar="NAME", help="score these features alone")
    add("--log-path", default="log/", help="folder of score_<file>.log and .json (%(default)s)")
    add("--seed", type=utils.number(int, 0, 2**32), default=1, help="seed of the random rankings (%(default)s)")
    utils.add_scoring_flags(parser)
    return parser


def load_features(
    path: str, dataset: str, only: str | None = None
) -> tuple[data_manager.Split, dict[str, np.ndarray], dict]:
    """The images of a file, their features by kind, and what it says of the network; OSError: it is not such a file.

    ``only`` names the one kind of features to load.
    """
    try:
        utils.check_archive(path)
        with zipfile.ZipFile(path) as archive:
            if not all(tells_its_size(archive, entry) for entry in archive.infolist()):
                raise ValueError("an array's header tells another size than it has")
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        network = json.loads(str(arrays.pop("network", "{}")))
        pids, camids, paths = (arrays.pop(name) for name in LISTS)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} not found: give a file of features, see --help") from None
    except Exception as error:  # numpy raises whatever the damage leads to
        problem = f"it has no array {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        raise OSError(f"{path} cannot be read as features ({problem}): see --help for what it must hold") from None
    if only:
        if only not in arrays:
            raise OSError(f"{path} holds no features {only!r}: there are {', '.join(arrays)}")
        arrays = {only: arrays[only]}
    if not isinstance(network, dict):
        raise OSError(f"{path}: network must be a JSON object")
    if not (network.get("trial") is None or (type(network["trial"]) is int and network["trial"] >= 0)):
        raise OSError(f"{path}: the trial in network must be a number from 0 on, not {network['trial']!r}")
    n, cameras = len(paths), 6 if dataset == "sysu" else 2
    if any(x.shape != (n,) for x in (pids, camids, paths)) or {pids.dtype.kind, camids.dtype.kind} - {*"iu"}:
        raise OSError(f"{path}: pids, camids and paths must be lists of one length, the first two of whole numbers")
    if paths.dtype.kind != "U" or (dataset == "sysu" and len(np.unique(paths)) < n):
        raise OSError(f"{path}: paths must be text, another one for each image")
    if dataset == "sysu" and n and camids.max() <= 2:
        raise OSError(f"{path}: camids are 1 and 2 only: is it RegDB? Give --dataset regdb")
    if not n:
        raise OSError(f"{path} holds the features of no images")
    if camids.min() < 1 or camids.max() > cameras:
        raise OSError(f"{path}: camids must be 1 to {cameras} for {dataset}: is --dataset {dataset} right?")
    for name, values in arrays.items():
        if values.ndim != 2 or len(values) != n or values.dtype not in FLOATS or not np.isfinite(values).all():
            raise OSError(f"{path}: {name} {values.shape} {values.dtype} is not ({n}, dim) finite float features")
    if not arrays or "chance" in arrays:
        raise OSError(f"{path} must hold features, arrays ({n}, dim) of any name but chance")
    return data_manager.Split(paths.tolist(), pids.astype(np.int64), camids.astype(np.int64)), arrays, network


def tells_its_size(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bool:
    """Whether a .npy file in an archive is as large as its header tells: memory is taken for that."""
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with archive.open(entry) as file:
        shape, _, dtype = read_header[np.lib.format.read_magic(file)](file)
        return dtype.hasobject or math.prod(shape) * dtype.itemsize == entry.file_size - file.tell()


def score(files: list[str], args: argparse.Namespace) -> tuple[Results, list[dict]]:
    """The results of one method, and what is known of its networks."""
    rand_perm = data_manager.read_rand_perm(args.rand_perm) if args.rand_perm else None
    results, networks = Results(args.dataset, args.distance, args.rerank, args.seed), []
    for number, path in enumerate(files, 1):
        images, features, network = load_features(path, args.dataset, args.features)
        networks.append({"features": path, **network})
        trial = number if network.get("trial") is None else network["trial"]
        with utils.blame(path):
            searches = data_manager.list_searches(
                args.dataset, images, trial, args.mode, args.gall_mode, args.search, rand_perm
            )
            if any(search.trial in results.scores.get((search.protocol, "chance"), ()) for search in searches):
                utils.fail(f"{path}: another file is of trial {trial} too")
            data_manager.check_counts(images, searches, args.dataset)
            for search in tqdm(searches, "score", unit="trial", disable=None, leave=False):
                results.add(search, images, features)
    return results, networks


def main() -> None:
    args = build_parser().parse_args()
    options = utils.scoring_options(args)
    if len({*map(os.path.basename, args.files)}) < len(args.files):
        utils.fail("two files have one name, which names their results: rename one, or score them one by one")
    for files in [[file] for file in args.files] if args.dataset == "sysu" else [args.files]:
        what = [f"{args.mode}-{args.gall_mode}"] if args.dataset == "sysu" else [f"{len(files)}-trials-{args.search}"]
        what += [args.features] * bool(args.features) + options
        name = os.path.basename(files[0]).removesuffix(".npz")
        output = os.path.join(args.log_path, f"score_{name}_{'-'.join(what)}")
        utils.start_log(f"{output}.log")
        utils.log_run(args)
        log.info("features: %s", ", ".join(files))
        results, networks = score(files, args)
        flipped = ["flip"] * any(network.get("flip") for network in networks)
        utils.report(results, networks, flipped + options, args, f"{output}.json")


if __name__ == "__main__":
    utils.run(main)
