"""Score features under a dataset's protocols with the evaluation of test.py, whatever made them.

    python test.py --resume NAME --save_features features.npz
    python -m tools.score features.npz --mode both --gall-mode both
    python -m tools.score --dataset regdb trial_1.npz trial_2.npz …
    python -m tools.score features.npz --gallery official --rand_perm rand_perm_cam.mat --distance euclidean

A file holds the features of all test images, of both modalities. For another method write one with numpy.savez:

    paths     (N,) the images' paths below the dataset's folder, like cam1/0006/0001.jpg: galleries depend on them
    pids      (N,) person ids
    camids    (N,) camera numbers: of SYSU-MM01 1 to 6, of RegDB 1 visible and 2 thermal
    thermal   (N,) bool, which images are infrared; of SYSU-MM01 and RegDB optional, camera numbers tell it
    any name  (N, dim) float features; several arrays are scored each
    network   optional, JSON: {"trial": 3, "flip": true}, RegDB's trial and whether mirror images were averaged

Each file gets a table of its own, but files of RegDB are the trials of one method, and are averaged. The last command
scores as SYSU-MM01's official evaluation does; --mat writes the features for that evaluation's own code.
"""

import argparse
import json
import logging
import os
import zipfile
from collections.abc import Callable
from functools import partial

import numpy as np
import scipy.io
from tqdm import tqdm

import utils
from data_manager import DATASETS, Dataset, Split
from eval_metrics import Distances, Results

KINDS = {"paths": "U", "pids": "iu", "camids": "iu", "thermal": "b"}  # the types of the lists, as numpy calls them


log = logging.getLogger(__name__)


def build_parser() -> utils.Parser:
    parser = utils.Parser(prog="python -m tools.score", description=__doc__)
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE.npz", help="features of all test images")
    add("--dataset", choices=[*DATASETS], default="sysu", help="dataset (%(default)s)")
    add("--features", metavar="NAME", help="score these features alone")
    add("--log_path", default="log/", help="folder of score_<file>.log and .json (%(default)s)")
    add("--seed", type=int, default=1, help="seed of the random rankings (%(default)s)")
    utils.add_search_flags(add)
    add("--gallery", choices=["seeded", "official"], default="seeded", help="SYSU-MM01's ten galleries (%(default)s)")
    add("--rand_perm", metavar="FILE", help="the rand_perm_cam.mat of SYSU-MM01's authors, for --gallery official")
    add("--distance", choices=Distances.KINDS, default="cosine", help="distance of features (%(default)s)")
    add("--rerank", action="store_true", help="k-reciprocal re-ranking (Zhong et al. 2017); compares queries too")
    add("--mat", metavar="DIR", help="write the features as .mat files for SYSU-MM01's official evaluation")
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


def official(path: str) -> Callable[[dict, int, int], np.ndarray]:
    """How SYSU-MM01's official evaluation draws, as `data_manager.seeded` does: by camera, inside it by person.

    ``path`` is its authors' rand_perm_cam.mat: [camera - 1, 0][person - 1, 0] is a (10, n) permutation, whose row t
    orders the n images of that person in that camera for trial t; its numbers start at 1. OSError: it is not that file.
    """
    try:
        cells = scipy.io.loadmat(path)["rand_perm_cam"]
        if {camera.shape[1] for camera in cells.reshape(6)} != {1}:
            raise ValueError("it has other cells")
    except Exception as error:  # SciPy raises whatever the damage leads to
        raise OSError(f"--rand_perm {path} is not the rand_perm_cam.mat of SYSU-MM01's evaluation ({error})") from error

    def draw(places: dict[tuple[int, int], list[int]], shots: int, trial: int) -> np.ndarray:
        picks = []
        for (pid, cam), own in sorted(places.items(), key=lambda place: place[0][::-1]):
            order = cells[cam - 1, 0][pid - 1 : pid, 0]
            if not len(order) or order[0].shape != (10, len(own)):
                raise ValueError(f"person {pid}, camera {cam}: --rand_perm belongs to another tree")
            picks += [own[number - 1] for number in order[0][trial, :shots]]
        return np.array(picks)

    return draw


def rerank(
    query: np.ndarray, gallery: np.ndarray, kind: str = "cosine", k1: int = 20, k2: int = 6, weight: float = 0.3
) -> np.ndarray:
    """(q, g) float32 distances after k-reciprocal re-ranking (Zhong et al., CVPR 2017, with its published parameters).

    Two images are alike when each other's near neighbours are: the ``k1`` nearest of ``kind`` (`Distances`). The
    neighbourhoods of the ``k2`` nearest are averaged; ``weight`` is the share of the plain distance (the paper's
    lambda). A query is compared with all other queries too; this holds some (q + g) x (q + g) arrays.
    """
    features, q = np.concatenate([query, gallery]).astype(np.float32), len(query)
    plain = (Distances(features, features, kind)[:] + (kind == "cosine")).clip(min=0)  # 1 - cosine: half of squared l2
    nearest = np.argsort(plain, axis=1, kind="stable")  # each image's own first
    plain = (plain / np.maximum(plain.max(axis=1, keepdims=True), 1e-30)).astype(np.float32)

    def reciprocal(k: int) -> np.ndarray:
        near = np.zeros(plain.shape, bool)
        np.put_along_axis(near, nearest[:, : k + 1], True, axis=1)
        return near & near.T

    near, closer = reciprocal(k1), reciprocal(round(k1 / 2))
    sizes, members = closer.sum(axis=1), near.copy()
    for i, own in enumerate(near):
        for j in np.flatnonzero(own):  # a neighbour brings its own neighbourhood if more than two thirds lie in ours
            if 3 * (closer[j] & own).sum() > 2 * sizes[j]:
                members[i] |= closer[j]
    weights = np.where(members, np.exp(-plain), 0)
    weights /= weights.sum(axis=1, keepdims=True)
    weights = np.stack([weights[own].mean(axis=0) for own in nearest[:, :k2]])
    result = np.empty((q, len(gallery)), np.float32)
    for i in range(q):
        own = np.flatnonzero(weights[i])
        overlap = np.minimum(weights[i, own], weights[q:, own]).sum(axis=1)
        result[i] = (1 - weight) * (1 - overlap / (2 - overlap)) + weight * plain[i, q:]
    return result


def write_mat(folder: str, images: Split, features: dict[str, np.ndarray], persons: int) -> None:
    """Files <kind>_cam<number>.mat with a cell array "feature": row i of cell {person id} is their i-th image."""
    for kind, values in features.items():
        for cam in np.unique(images.camids):
            cells = np.empty((max(persons, images.pids.max()), 1), dtype=object)
            for pid in range(1, len(cells) + 1):
                cells[pid - 1, 0] = values[(images.pids == pid) & (images.camids == cam)].astype(np.float64)
            with utils.whole_file(os.path.join(folder, f"{kind}_cam{cam}.mat")) as path, open(path, "wb") as file:
                scipy.io.savemat(file, {"feature": cells})
    log.info("features for the official evaluation: %s", os.path.join(folder, "<kind>_cam<number>.mat"))


def score(files: list[str], args: argparse.Namespace) -> tuple[Results, list[dict]]:
    """The results of one method, and what is known of its networks. OSError, ValueError: a file cannot be scored."""
    dataset, draw = DATASETS[args.dataset], official(args.rand_perm) if args.rand_perm else None
    results = Results(dataset, args.seed, partial(rerank if args.rerank else Distances, kind=args.distance))
    networks = []
    for number, path in enumerate(files, dataset.trials.start):
        images, features, network = load_features(path, dataset, args.features)
        networks.append({"features": path, **network})
        if args.mat:
            write_mat(args.mat, images, features, dataset.official_persons)
        try:
            trials = [int(network.get("trial") or number)] if dataset.trial_trains else ()
            searches = dataset.searches(images, vars(args), trials, draw)
            for search in tqdm(searches, "score", unit="trial", disable=None, leave=False):
                if search.trial in results.scores.get((search.protocol, "chance"), ()):
                    raise ValueError(f"another file is of trial {search.trial}, too")
                results.add(search, images, features)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return results, networks


def main() -> None:
    args = build_parser().parse_args()
    dataset = DATASETS[args.dataset]
    if (args.gallery == "official") != bool(args.rand_perm):
        raise ValueError("--gallery official and --rand_perm FILE, its rand_perm_cam.mat, go together")
    if (args.rand_perm or args.mat) and not dataset.official_persons:
        raise ValueError(f"--gallery official and --mat are for SYSU-MM01: {dataset.title} has no official evaluation")
    os.makedirs(args.mat or ".", exist_ok=True)
    choices = {"official": args.rand_perm, "euclidean": args.distance == "euclidean", "rerank": args.rerank}
    options = [option for option, chosen in choices.items() if chosen]
    for files in [args.files] if dataset.trial_trains else [[file] for file in args.files]:
        what = [f"{len(files)}-trials"] * dataset.trial_trains + dataset.values(vars(args))
        what += [args.features] * bool(args.features) + options
        name = os.path.basename(files[0]).removesuffix(".npz")
        output = os.path.join(args.log_path, f"score_{name}_{'-'.join(what)}")
        utils.start_log(args, f"{output}.log")
        results, networks = score(files, args)
        named = ["flip"] * any(network.get("flip") for network in networks) + options
        results.log(named)
        known = {"flags": vars(args), "options": named, "versions": utils.versions(), "networks": networks}
        utils.write_json(f"{output}.json", known | results.to_json())
        log.info("all trials: %s.json", output)


if __name__ == "__main__":
    utils.run(main)
