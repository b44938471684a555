"""Score features under a dataset's protocols with the evaluation of test.py, whatever made them.

    python test.py --resume NAME --save-features features.npz
    python -m tools.score features.npz --mode both --gall-mode both
    python -m tools.score --dataset regdb trial_1.npz trial_2.npz ...
    python -m tools.score features.npz --gallery official --rand-perm rand_perm_cam.mat \\
        --distance euclidean

A file holds the features of all test images, of both modalities. For another method write one with
numpy.savez:

    paths     (N,) paths of the images below the dataset's folder, like cam1/0006/0001.jpg: they
              decide which images galleries are drawn from
    pids      (N,) person ids
    camids    (N,) camera numbers: of SYSU-MM01 1 to 6, of RegDB 1 visible and 2 thermal
    thermal   (N,) bool, which images are infrared; not needed for SYSU-MM01 and RegDB, where the
              camera numbers tell it
    any name  (N, dim) float features; each array is scored by itself
    network   optional, JSON: {"trial": 3, "flip": true}, RegDB's trial and whether the features of
              mirror images were averaged in

Each file gets a table of its own. Files of RegDB are the trials of one method, and are averaged.
The last command scores as SYSU-MM01's official evaluation does. --mat writes the features for the
code of that evaluation.
"""

import argparse
import logging
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import scipy.io
from tqdm import tqdm

# `python tools/score.py` would search for modules in tools/ alone.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from data_manager import DATASETS, DrawGallery, Split
from eval_metrics import Distances, Results, check_trials
from tools.features_files import load_features

SYSU_CAMERAS = 6
OFFICIAL_TRIALS = 10

log = logging.getLogger(__name__)


# ---- flags --------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = utils.new_parser(__doc__)
    add = parser.add_argument
    files_help = "features of all test images"
    add("files", nargs="+", type=utils.file_path, metavar="FILE.npz", help=files_help)
    add("--dataset", choices=list(DATASETS), default="sysu", help="dataset (%(default)s)")
    add("--features", metavar="NAME", help="score these features alone")
    log_help = "folder of logs and results (%(default)s)"
    add("--log-path", type=utils.file_path, default="log/", help=log_help)
    add("--seed", type=utils.seed_number, default=1, help="seed of random rankings (1)")
    utils.add_protocol_flags(parser, DATASETS)
    galleries = ["seeded", "official"]
    gallery_help = "which galleries of SYSU-MM01 (%(default)s)"
    add("--gallery", choices=galleries, default="seeded", help=gallery_help)
    rand_perm_help = "rand_perm_cam.mat, for --gallery official"
    add("--rand-perm", type=utils.file_path, metavar="FILE", help=rand_perm_help)
    kinds = Distances.KINDS
    add("--distance", choices=kinds, default="cosine", help="distance of features (%(default)s)")
    rerank_help = "k-reciprocal re-ranking; it uses the other queries, too"
    add("--rerank", action="store_true", help=rerank_help)
    mat_help = "write .mat files for SYSU-MM01's official evaluation"
    add("--mat", type=utils.file_path, metavar="DIR", help=mat_help)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    args = utils.parse(parser, argv)
    dataset = DATASETS[args.dataset]
    if (args.gallery == "official") != bool(args.rand_perm):
        parser.error("--gallery official and --rand-perm FILE, its rand_perm_cam.mat, go together")
    if (args.rand_perm or args.mat) and not dataset.official_persons:
        parser.error(
            f"--gallery official and --mat are for SYSU-MM01: {dataset.title} has no official "
            "evaluation"
        )
    if args.mat and len(args.files) > 1:
        parser.error("--mat writes the features of one file: give one FILE.npz")
    if dataset.one_model_per_trial and len(args.files) > len(dataset.trials):
        n_trials = len(dataset.trials)
        parser.error(f"{dataset.title} has {n_trials} trials: give at most {n_trials} FILE.npz")
    return args


# ---- SYSU-MM01's official evaluation ------------------------------------------------------------


def official_draw(path: str) -> DrawGallery:
    """Return how SYSU-MM01's official evaluation draws a gallery, for `Dataset.eval_trials`.

    Args:
        path: rand_perm_cam.mat of the dataset's authors. Its cell [camera - 1, 0][person - 1, 0] is
            a (10, n) permutation of the person's n images in that camera, counted from 1. Row t
            orders them for trial t.

    Raises:
        InputError: the file is missing, corrupt, or another one; drawing: it is of another tree.
    """
    cameras = read_rand_perm(path)

    def draw(groups: dict[tuple[int, int], list[int]], per_camera: int, trial: int) -> np.ndarray:
        """Return the first images of each (person, camera), by camera, then by person."""
        indices = []
        for pid, cam in sorted(groups, key=lambda pair: (pair[1], pair[0])):
            group = groups[pid, cam]
            permutations = cameras[cam - 1].get(pid)
            if not are_permutations(permutations, len(group)):
                raise utils.InputError(
                    f"person {pid}, camera {cam}: --rand-perm {path} belongs to another tree"
                )
            for number in permutations[trial, :per_camera]:
                indices.append(group[int(number) - 1])
        return np.array(indices)

    return draw


def read_rand_perm(path: str) -> list[dict[int, np.ndarray]]:
    """Read the permutations {person: array} of each camera. InputError: it is no such file."""
    if not os.path.isfile(path):
        raise utils.InputError(f"--rand-perm {path} not found")
    try:
        content = scipy.io.loadmat(path)
    except Exception as error:  # SciPy raises many types on corrupt files
        if utils.resource_advice(error):
            raise
        raise not_rand_perm(path, utils.short_reason(error)) from error
    cells = content.get("rand_perm_cam")
    if cells is None or cells.dtype != object or cells.shape != (SYSU_CAMERAS, 1):
        raise not_rand_perm(path, f"it has no {SYSU_CAMERAS} x 1 cells rand_perm_cam")
    cameras = []
    for camera in cells[:, 0]:
        if camera.dtype != object or camera.ndim != 2 or camera.shape[1] != 1:
            raise not_rand_perm(path, "a camera has other cells than one for each person")
        cameras.append(dict(enumerate(camera[:, 0], start=1)))
    return cameras


def are_permutations(rows: np.ndarray | None, n: int) -> bool:
    """Return whether each row is a permutation of 1..n, one for each of the official trials."""
    if rows is None or rows.shape != (OFFICIAL_TRIALS, n) or rows.dtype.kind not in "iuf":
        return False
    return bool((np.sort(rows, axis=1) == np.arange(1, n + 1)).all())


def not_rand_perm(path: str, reason: str) -> utils.InputError:
    return utils.InputError(
        f"--rand-perm {path} is not the rand_perm_cam.mat of SYSU-MM01's evaluation ({reason})"
    )


def write_mat(folder: str, images: Split, features: dict[str, np.ndarray], n_persons: int) -> None:
    """Write <name>_cam<number>.mat with a cell array "feature", for each kind and camera.

    Row i of the cell {person id} is the person's i-th image in that camera. There are cells for
    the persons 1 to ``n_persons``, and further ones if there are larger ids.

    Raises:
        InputError: a person's id is not above 0: there is no such cell.
    """
    if images.pids.min() < 1:
        raise utils.InputError(f"--mat needs person ids above 0, but there is {images.pids.min()}")
    n_cells = max(n_persons, images.pids.max())
    for name, values in features.items():
        for cam in np.unique(images.camids):
            cells = np.empty((n_cells, 1), dtype=object)
            for pid in range(1, n_cells + 1):
                rows = (images.pids == pid) & (images.camids == cam)
                cells[pid - 1, 0] = values[rows].astype(np.float64)
            path = os.path.join(folder, f"{name}_cam{cam}.mat")
            with utils.atomic_write(path) as partial_path, open(partial_path, "wb") as file:
                scipy.io.savemat(file, {"feature": cells})
    log.info("features for the official evaluation: %s/<name>_cam<number>.mat", folder)


# ---- re-ranking ---------------------------------------------------------------------------------


def rerank(
    query: np.ndarray,
    gallery: np.ndarray,
    kind: str = "cosine",
    k1: int = 20,
    k2: int = 6,
    weight: float = 0.3,
) -> np.ndarray:
    """Return (Q, G) float32 distances after k-reciprocal re-ranking (Zhong et al., CVPR 2017).

    Two images are alike when each other's near neighbours are. A query is compared with all other
    queries too. The call holds some (Q + G) x (Q + G) arrays.

    Args:
        query: (Q, dim) features.
        gallery: (G, dim) features.
        kind: the plain distance, see `Distances`.
        k1: how many neighbours an image has.
        k2: over how many neighbours the neighbourhoods are averaged.
        weight: share of the plain distance in the result, the paper's lambda.
    """
    n_query = len(query)
    features = np.concatenate([query, gallery]).astype(np.float32)
    distances = Distances(features, features, kind)[:]
    if kind == "cosine":
        distances = distances + 1  # 1 - cosine is half of the squared distance of the directions
    distances = distances.clip(min=0)
    nearest = np.argsort(distances, axis=1, kind="stable")  # each image's own index first
    farthest = distances.max(axis=1, keepdims=True)
    distances = (distances / np.maximum(farthest, 1e-30)).astype(np.float32)

    memberships = np.where(expanded_neighbours(nearest, k1), np.exp(-distances), 0)
    memberships /= memberships.sum(axis=1, keepdims=True)
    memberships = np.stack([memberships[row].mean(axis=0) for row in nearest[:, :k2]])
    jaccard = jaccard_distances(memberships[:n_query], memberships[n_query:])
    return (1 - weight) * jaccard + weight * distances[:n_query, n_query:]


def expanded_neighbours(nearest: np.ndarray, k1: int) -> np.ndarray:
    """Return (n, n) bool: each image's k-reciprocal neighbours, expanded as in the paper.

    A neighbour j of image i brings its own, smaller neighbourhood if more than two thirds of that
    are neighbours of i.
    """
    neighbours = reciprocal_neighbours(nearest, k1)
    smaller = reciprocal_neighbours(nearest, round(k1 / 2))
    smaller_sizes = smaller.sum(axis=1)
    expanded = neighbours.copy()
    for i, row in enumerate(neighbours):
        for j in np.flatnonzero(row):
            if 3 * (smaller[j] & row).sum() > 2 * smaller_sizes[j]:
                expanded[i] |= smaller[j]
    return expanded


def reciprocal_neighbours(nearest: np.ndarray, k: int) -> np.ndarray:
    """Return (n, n) bool: pairs that are each among the other's k nearest, or the same image."""
    is_near = np.zeros(nearest.shape, bool)
    np.put_along_axis(is_near, nearest[:, : k + 1], True, axis=1)
    return is_near & is_near.T


def jaccard_distances(query: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Return (Q, G) float32: 1 - intersection / union of fuzzy sets, rows that sum to 1."""
    result = np.empty((len(query), len(gallery)), np.float32)
    for i, row in enumerate(query):
        members = np.flatnonzero(row)  # few: all else adds nothing to the intersection
        intersection = np.minimum(row[members], gallery[:, members]).sum(axis=1)
        result[i] = 1 - intersection / (2 - intersection)
    return result


# ---- scoring ------------------------------------------------------------------------------------


def score_files(files: list[str], args: argparse.Namespace) -> tuple[Results, list[dict]]:
    """Score one method; return its results, and what each of its files says of its network.

    Raises:
        InputError: a file cannot be read or scored, or two files are of one trial.
    """
    dataset = DATASETS[args.dataset]
    draw = official_draw(args.rand_perm) if args.rand_perm else None
    compare = rerank if args.rerank else Distances
    results = Results(dataset, args.seed, partial(compare, kind=args.distance))
    networks = []
    scored_trials = set()
    for position, path in enumerate(files):
        images, features, network = load_features(path, dataset, args.features)
        networks.append(network | {"features": path})
        trials = None  # all
        if dataset.one_model_per_trial:
            trial = network.get("trial")
            if trial is None:
                trial = dataset.trials[position]
            if trial in scored_trials:
                raise utils.InputError(f"{path}: another file is of trial {trial}, too")
            scored_trials.add(trial)
            trials = [trial]
        try:
            if args.mat:
                write_mat(args.mat, images, features, dataset.official_persons)
            eval_trials = dataset.eval_trials(images, vars(args), trials, draw)
            check_trials(eval_trials, images, dataset)
            for eval_trial in tqdm(eval_trials, "score", unit="trial", disable=None, leave=False):
                results.add(eval_trial, images, features)
        except utils.InputError as error:
            raise utils.InputError(f"{path}: {error}") from error
    return results, networks


def option_names(args: argparse.Namespace) -> list[str]:
    """Return words for the flags that change scores and are not at their default."""
    names = []
    if args.gallery == "official":
        names.append("official")
    if args.distance == "euclidean":
        names.append("euclidean")
    if args.rerank:
        names.append("rerank")
    return names


def output_stem(files: list[str], args: argparse.Namespace) -> str:
    """Return the path of one method's log and results, without .log and .json."""
    dataset = DATASETS[args.dataset]
    words = []
    if dataset.one_model_per_trial:
        words.append(f"{len(files)}-trials")
    words += dataset.protocol_values(vars(args))
    if args.features:
        words.append(args.features)
    words += option_names(args)
    name = os.path.basename(files[0]).removesuffix(".npz")
    return os.path.join(args.log_path, f"score_{name}_{'-'.join(words)}")


def sources_of_results(files: list[str], args: argparse.Namespace) -> list[str]:
    """Return what the results of one method come from: absolute paths of files."""
    sources = [os.path.abspath(file) for file in files]
    if args.rand_perm:
        sources.append(os.path.abspath(args.rand_perm))
    return sources


def score_and_write(files: list[str], stem: str, args: argparse.Namespace) -> None:
    """Score the files of one method; log the table, and write <stem>.json."""
    utils.start_log(args, f"{stem}.log")
    results, networks = score_files(files, args)
    options = option_names(args)
    if any(network.get("flip") for network in networks):
        options = ["flip", *options]
    results.report(options)
    header = {
        "flags": vars(args),
        "options": options,
        "versions": utils.versions(),
        "networks": networks,
        "sources": sources_of_results(files, args),
    }
    utils.write_json(f"{stem}.json", header | results.to_json())
    log.info("all trials: %s.json", stem)


def main() -> None:
    args = parse_args()
    if args.mat:
        os.makedirs(args.mat, exist_ok=True)
    if DATASETS[args.dataset].one_model_per_trial:
        methods = [args.files]
    else:
        methods = [[file] for file in args.files]
    stems = [output_stem(files, args) for files in methods]
    if len(set(stems)) < len(stems):
        raise utils.InputError(
            "two files have the same name, and so would their results: rename one, or score each "
            "with a --log-path of its own"
        )
    for files, stem in zip(methods, stems, strict=True):
        utils.check_results_path(f"{stem}.json", sources_of_results(files, args))
    for files, stem in zip(methods, stems, strict=True):
        score_and_write(files, stem, args)


if __name__ == "__main__":
    utils.run(main)
