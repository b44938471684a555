"""Files of features, which test.py --save-features and tools.search write; see tools.score.

They may come from other methods, be untrusted or damaged: what they hold is checked.
"""

import json
import os
import zipfile

import numpy as np

import utils
from data_manager import DATASETS, Dataset, Split
from utils import InputError

# The columns of a file of features: numpy's letters for the types that each may have.
COLUMN_TYPES = {"paths": "U", "pids": "iu", "camids": "iu", "thermal": "b"}


def load_features(
    path: str, dataset: Dataset, only: str | None = None
) -> tuple[Split, dict[str, np.ndarray], dict]:
    """Read the images of a file, their features, and what the file says of the network.

    Args:
        path: an .npz file as tools.score describes it.
        dataset: the dataset that the images are of.
        only: the name of the features to load; None loads all.

    Returns:
        The N images; {name: (N, dim) float array}; the dict of ``network``, {} without one.

    Raises:
        InputError: the file is missing, corrupt, or not such a file.
    """
    wanted = None if only is None else (*COLUMN_TYPES, "network", only)
    arrays = read_arrays(path, wanted)
    network = parse_network(path, arrays.pop("network", None))
    check_trial(path, network.get("trial"), dataset)
    name = network.get("dataset")  # test.py writes it
    if isinstance(name, str) and DATASETS.get(name, dataset) is not dataset:
        raise InputError(f"{path} holds features of another dataset: give --dataset {name}")
    columns = {name: arrays.pop(name, None) for name in COLUMN_TYPES}
    images = build_split(path, columns, dataset)
    features = arrays  # all others
    if not features:
        raise malformed(path, f"it must hold features {only or ''}".rstrip())
    for name, values in features.items():
        check_features(path, name, values, len(images))
    return images, features, network


def malformed(path: str, reason: str) -> InputError:
    return InputError(
        f"{path} cannot be read as features ({reason}): "
        "python -m tools.score --help says what it must hold"
    )


def read_arrays(path: str, names: tuple[str, ...] | None = None) -> dict[str, np.ndarray]:
    """Read the arrays of an .npz file; with ``names`` those of them that it has.

    Raises:
        InputError: it is missing, or cannot be read.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path} not found: test.py --save-features writes such files")
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # numpy does not compare all checksums
                raise ValueError("a checksum is wrong")
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file if names is None or name in names}
    except Exception as error:  # zipfile and numpy raise many types on corrupt files
        if utils.resource_advice(error):
            raise
        raise malformed(path, utils.short_reason(error)) from error


def parse_network(path: str, text: np.ndarray | None) -> dict:
    """Parse the JSON object that an .npz file holds as text; {} without one."""
    if text is None:
        return {}
    try:
        network = json.loads(str(text))
    except (ValueError, RecursionError) as error:
        raise malformed(path, f"network is not JSON: {utils.short_reason(error)}") from error
    if not isinstance(network, dict):
        raise malformed(path, "network is not a JSON object")
    return network


def check_trial(path: str, trial: object, dataset: Dataset) -> None:
    """Raise InputError if a file's network names a trial that the dataset does not have."""
    is_valid = isinstance(trial, int) and trial in dataset.trials
    if trial is not None and not is_valid:
        raise malformed(path, f"{dataset.title} has no trial {trial!r}, which its network names")


def build_split(path: str, columns: dict[str, np.ndarray | None], dataset: Dataset) -> Split:
    """List the images of a file by its columns. InputError: one is missing or wrong."""
    n_images = np.size(columns["paths"])
    cameras_tell_modality = columns["thermal"] is None and len(dataset.thermal_cameras) > 0
    if cameras_tell_modality:
        del columns["thermal"]
    for name, column in columns.items():
        if column is None:
            raise malformed(path, f"it has no {name!r}")
        if column.dtype.kind not in COLUMN_TYPES[name] or column.shape != (n_images,):
            shape_and_type = f"{column.shape} {column.dtype}"
            raise malformed(path, f"{name!r} {shape_and_type} is of another shape or type")
    if cameras_tell_modality:
        columns["thermal"] = np.isin(columns["camids"], dataset.thermal_cameras)
    if n_images == 0:
        raise malformed(path, "it lists no image")
    if not dataset.one_model_per_trial and len(np.unique(columns["paths"])) < n_images:
        raise malformed(path, "two of its paths are the same: galleries are drawn by path")
    return Split(
        paths=list_paths(path, columns["paths"]),
        pids=columns["pids"].astype(np.int64),
        camids=columns["camids"].astype(np.int64),
        thermal=columns["thermal"],
    )


def list_paths(path: str, column: np.ndarray) -> list[str]:
    """Return the paths of a column. InputError: one cannot be the path of a file."""
    try:
        paths = column.tolist()
    except ValueError as error:  # numpy takes any number for a character
        raise malformed(path, utils.short_reason(error)) from error
    if any("\0" in name for name in paths):
        raise malformed(path, "one of its paths holds a zero character")
    return paths


def check_features(path: str, name: str, values: np.ndarray, n_images: int) -> None:
    """Raise InputError if this is not a (n_images, dim) array of finite floats."""
    if name == "chance":
        raise malformed(path, "features must not be named chance, as the random rankings are")
    has_shape = values.ndim == 2 and len(values) == n_images
    if not has_shape or values.dtype.kind != "f" or not np.isfinite(values).all():
        raise malformed(
            path, f"{name} {values.shape} {values.dtype} is not ({n_images}, dim) finite floats"
        )
