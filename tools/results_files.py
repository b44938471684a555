"""Readers of what training and tests leave on disk: metrics, results and features.

metrics.jsonl of train.py, the JSON files of test.py and tools.score, the features of
test.py --save-features. All of them may be untrusted or damaged: what they hold is checked.
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_manager import DATASETS, Dataset, EvalTrial, Split, is_synthetic
from eval_metrics import MEASURES, RANKS, TrialCounts
from tools.features_files import load_features
from utils import InputError, file_path

MAX_RANK = max(RANKS)  # length of the CMC curves in files of results


# ---- labels and names ---------------------------------------------------------------------------


def label_files(entries: list[str]) -> dict[str, str]:
    """Return {label: path} of words like ``LABEL=FILE``, or ``FILE``: its name is the label.

    Raises:
        InputError: two files have the same label.
    """
    files = {}
    for entry in entries:
        label = ""
        path = file_path(entry)
        if not os.path.exists(path):  # otherwise it is a path that may well hold a "="
            label, _, path = entry.rpartition("=")
            path = file_path(path)
        if not label:
            label = re.sub(r"\.(json|jsonl|npz)$", "", os.path.basename(path.rstrip("/")))
        if label in files:
            raise InputError(f"two files have the label {label!r}: tell them apart by LABEL=FILE")
        files[label] = path
    return files


def name_of_data(dataset: Dataset, people_are_synthetic: bool) -> str:
    """Return a dataset's name for titles, which tells that people are synthetic."""
    if people_are_synthetic:
        return f"synthetic, {dataset.title} layout"
    return dataset.title


def name_of_tree(dataset: Dataset, root: str) -> str:
    """Return the name, for titles, of the data in the folder ``root``."""
    return name_of_data(dataset, is_synthetic(root))


# ---- metrics of a run ---------------------------------------------------------------------------


def read_metrics(path: str) -> list[dict[str, float]]:
    """Read the values that a run recorded, one dict for each epoch.

    A value that was not finite, null in the file, is left out.

    Args:
        path: metrics.jsonl, or the folder of a run that holds it.

    Raises:
        InputError: there is no such file, it is another file, or no epoch is finished.
    """
    metrics_file = path
    if os.path.isdir(path):
        metrics_file = os.path.join(path, "metrics.jsonl")
    if not os.path.isfile(metrics_file):
        raise InputError(f"{metrics_file} not found: give the folder of a run, like log/<run>")
    with open(metrics_file, encoding="utf-8", errors="replace") as file:
        lines = file.read().splitlines()
    if not lines:
        raise InputError(f"{metrics_file} is empty: no epoch of this run is finished")
    return [parse_epoch(line, metrics_file) for line in lines]


def parse_epoch(line: str, path: str) -> dict[str, float]:
    """Parse a line of metrics.jsonl; leave out its nulls. InputError: it is not such a line."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        values = {}
    values = {name: value for name, value in values.items() if value is not None}
    has_numbers = all(isinstance(value, int | float) for value in values.values())
    if "epoch" not in values or not has_numbers:
        raise InputError(
            f"{path} is not the metrics.jsonl of a run: give the folder of a run, like log/<run>"
        )
    return values


# ---- results of a test --------------------------------------------------------------------------


@dataclass(frozen=True)
class ProtocolScores:
    """The scores of one kind of features under one protocol, in [0, 1]."""

    mean: dict[str, float]  # over the trials, by the names of `MEASURES`
    std: dict[str, float]
    cmc: np.ndarray  # (trials, MAX_RANK)


@dataclass(frozen=True)
class SavedResults:
    """What a JSON file of test.py or tools.score holds."""

    rows: dict[str, dict[str, ProtocolScores]]  # [kind of features][protocol]; one kind is "chance"
    counts: dict[str, TrialCounts]  # by protocol
    options: list[str]  # settings of the test that are not the default
    dataset: Dataset
    data_name: str  # the dataset's name, for titles
    # Paths of what was tested, of several networks the first one's. "": there is none. The files
    # may be gone.
    checkpoint: str
    features_file: str
    data_path: str


def read_results(path: str) -> SavedResults:
    """Read the results in a JSON file of test.py or tools.score.

    Raises:
        InputError: it is not such a file.
        OSError: it cannot be opened.
    """
    content = read_json(path)
    flags = get_entry(content, "flags", dict, path)
    dataset_key = get_entry(flags, "dataset", str, path)
    if dataset_key not in DATASETS:
        raise not_results(path, f"there is no dataset {dataset_key!r}")
    dataset = DATASETS[dataset_key]
    networks = get_entry(content, "networks", list, path, default=[])
    if not all(isinstance(network, dict) for network in networks):
        raise not_results(path, "'networks' is malformed")
    network = networks[0] if networks else {}
    is_synthetic = any(network.get("synthetic") for network in networks)
    options = get_entry(content, "options", list, path)
    counts = parse_counts(content, path)
    return SavedResults(
        rows=parse_rows(content, set(counts), path),
        counts=counts,
        options=[str(option) for option in options],
        dataset=dataset,
        data_name=name_of_data(dataset, is_synthetic),
        checkpoint=str(network.get("checkpoint") or ""),
        features_file=features_file_of(network, flags),
        data_path=str(flags.get("data_path") or ""),
    )


def features_file_of(network: dict, flags: dict) -> str:
    """Return the path of the features that tools.score read or test.py wrote; "": none."""
    if network.get("features"):
        return str(network["features"])
    path = str(flags.get("save_features") or "")
    if network.get("trial") is not None:  # the number for which test.py lets one write {trial}
        path = path.replace("{trial}", str(network["trial"]))
    return path


def not_results(path: str, reason: str) -> InputError:
    """Return the error to raise for a file that is something else, or damaged."""
    return InputError(f"{path} is not a JSON file that test.py or tools.score wrote ({reason})")


def read_json(path: str) -> object:
    """Read a JSON file. InputError: it is missing, or not JSON."""
    if not os.path.isfile(path):
        raise InputError(f"{path} not found: give a result file of test.py, like log/test_….json")
    with open(path, encoding="utf-8") as file:
        try:
            return json.load(file)
        except (ValueError, RecursionError) as error:
            raise not_results(path, str(error)) from error


def get_entry(
    parent: object,
    name: str,
    kind: type,
    path: str,
    default: object | None = None,
    error_of: Callable[[str, str], InputError] = not_results,
) -> Any:
    """Return ``parent[name]``, a ``kind``. There is no such entry: ``error_of(path, reason)``."""
    value = parent.get(name, default) if isinstance(parent, dict) else None
    if not isinstance(value, kind):
        raise error_of(path, f"{name!r} is missing or malformed")
    return value


def parse_counts(content: dict, path: str) -> dict[str, TrialCounts]:
    """Parse the size of a trial, by protocol."""
    counts = {}
    for protocol, entry in get_entry(content, "counts", dict, path).items():
        counts[protocol] = TrialCounts(
            queries=get_entry(entry, "queries", int, path),
            without_match=get_entry(entry, "without_match", int, path),
            gallery_images=get_entry(entry, "gallery_images", int, path),
            gallery_persons=get_entry(entry, "gallery_persons", int, path),
            chance=get_entry(entry, "chance", float, path),
        )
    return counts


def parse_rows(
    content: dict, protocols: set[str], path: str
) -> dict[str, dict[str, ProtocolScores]]:
    """Parse the scores, by kind of features and protocol. InputError: some are missing."""
    rows: dict[str, dict[str, ProtocolScores]] = {}
    for entry in get_entry(content, "results", list, path):
        feature = get_entry(entry, "feature", str, path)
        protocol = get_entry(entry, "protocol", str, path)
        rows.setdefault(feature, {})[protocol] = parse_scores(entry, path)
    is_complete = all(set(by_protocol) == protocols for by_protocol in rows.values())
    if not protocols or "chance" not in rows or not is_complete:
        raise not_results(path, "scores are missing")
    return rows


def parse_scores(entry: dict, path: str) -> ProtocolScores:
    """Parse the scores of one entry of "results", of at least one trial."""
    mean = get_entry(entry, "mean", dict, path)
    std = get_entry(entry, "std", dict, path)
    cmc = []
    for trial in get_entry(entry, "trials", list, path):
        curve = get_entry(trial, "cmc", list, path)
        if len(curve) != MAX_RANK or not all(isinstance(value, float) for value in curve):
            raise not_results(path, f"a CMC is not {MAX_RANK} numbers")
        cmc.append(curve)
    if not cmc:
        raise not_results(path, "scores without a trial")
    return ProtocolScores(
        mean={name: get_entry(mean, name, float, path) for name in MEASURES},
        std={name: get_entry(std, name, float, path) for name in MEASURES},
        cmc=np.array(cmc),
    )


def check_comparable(results: dict[str, SavedResults], feature: str) -> None:
    """Raise InputError unless all results have these features, the same protocols and images.

    No label may be "chance".
    """
    if "chance" in results:
        raise InputError(
            "the label 'chance' is for random rankings: give another one by LABEL=FILE"
        )
    first_label, first = next(iter(results.items()))
    for label, result in results.items():
        if feature not in result.rows:
            kinds = ", ".join(result.rows)
            raise InputError(f"{label} has no {feature} features, but {kinds}: choose --features")
        if result.dataset is not first.dataset or result.counts != first.counts:
            raise InputError(
                f"{label} and {first_label} are of other protocols or images: "
                "compare results of the same data and protocol flags"
            )


def format_percent(mean: float, deviation: float | None) -> str:
    """Return text like "52.00 ± 2.00"; without a deviation "52.00"."""
    text = f"{mean:.2f}"
    if deviation is not None:
        text += f" ± {deviation:.2f}"
    return text


# ---- features -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Features:
    """One kind of features of all test images, and what their file tells of the network."""

    images: Split
    values: np.ndarray  # (N, dim) float
    kind: str
    network: dict
    dataset: Dataset

    @property
    def data_name(self) -> str:
        return name_of_data(self.dataset, bool(self.network.get("synthetic")))

    @property
    def caption(self) -> str:
        """Return which checkpoint computed them."""
        path = self.network.get("checkpoint")
        if not path:
            return "no checkpoint named"
        return f"checkpoint: {os.path.basename(str(path))}"

    def first_trial(self, choice: dict[str, str | None]) -> EvalTrial:
        """Return the trial that was trained on, or the first one, under the chosen protocol.

        ``choice`` holds values of protocol flags, see `Dataset.eval_trials`.
        """
        trial = self.network.get("trial") or self.dataset.trials[0]
        return self.dataset.eval_trials(self.images, choice, [trial])[0]


def read_features(path: str, dataset: Dataset, kind: str) -> Features:
    """Read one kind of features from a file that tools.score describes. InputError: it is none."""
    images, arrays, network = load_features(path, dataset, kind)
    return Features(images, arrays[kind], kind, network, dataset)
