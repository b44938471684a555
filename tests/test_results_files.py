"""Readers of files: labels, metrics, results and features."""

import json

import pytest
from conftest import features_file, result

from data_manager import DATASETS
from tools.results_files import (
    check_comparable,
    label_files,
    read_features,
    read_metrics,
    read_results,
)
from utils import InputError

REGDB = DATASETS["regdb"]

# ---- labels -------------------------------------------------------------------------------------


def test_files_are_labelled_by_their_name_or_by_what_stands_in_front(tmp_path):
    path = tmp_path / "w_hc=0.5.json"  # its "=" does not end a label
    path.touch()
    words = [str(path), "a label=some.json", "w=1=other.npz", "log/run/"]
    assert label_files(words) == {
        "w_hc=0.5": str(path),
        "a label": "some.json",
        "w=1": "other.npz",
        "run": "log/run/",
    }
    with pytest.raises(InputError, match="LABEL=FILE"):
        label_files(["a/net.npz", "b/net.npz"])


# ---- metrics ------------------------------------------------------------------------------------


def write_metrics(folder, *epochs: dict):
    lines = [json.dumps(epoch) + "\n" for epoch in epochs]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return str(folder)


def test_a_metric_that_was_not_finite_is_left_out(tmp_path):
    first = {"epoch": 0, "lr": 0.1, "CE": 2.5}
    second = {"epoch": 1, "lr": 0.1, "CE": None}
    path = write_metrics(tmp_path, first, second)
    assert read_metrics(path) == [first, {"epoch": 1, "lr": 0.1}]
    assert read_metrics(f"{path}/metrics.jsonl") == read_metrics(path)


@pytest.mark.parametrize(
    "text",
    ["", "no JSON\n", '{"lr": 0.1}\n', '{"epoch": null}\n', '{"epoch": 1, "CE": "a"}\n', "[1]\n"],
)
def test_other_files_than_metrics_are_errors(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(InputError, match=r"metrics\.jsonl.*run"):
        read_metrics(str(tmp_path))


def test_a_missing_file_of_metrics_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"metrics\.jsonl not found.*log/<run>"):
        read_metrics(str(tmp_path))


# ---- results ------------------------------------------------------------------------------------


def remove_a_row(content: dict) -> None:
    del content["results"][-1]


def shorten_a_cmc(content: dict) -> None:
    content["results"][0]["trials"][0]["cmc"].pop()


def remove_the_trials(content: dict) -> None:
    content["results"][0]["trials"].clear()


def remove_a_measure(content: dict) -> None:
    del content["results"][0]["mean"]["mAP"]


def turn_a_count_into_a_word(content: dict) -> None:
    content["counts"]["v2t"]["queries"] = "three"


def name_another_dataset(content: dict) -> None:
    content["flags"]["dataset"] = "market"


def turn_networks_into_words(content: dict) -> None:
    content["networks"] = ["net.t"]


@pytest.mark.parametrize(
    "damage",
    [
        remove_a_row,
        shorten_a_cmc,
        remove_the_trials,
        remove_a_measure,
        turn_a_count_into_a_word,
        name_another_dataset,
        turn_networks_into_words,
    ],
)
def test_results_with_a_malformed_entry_are_errors(tmp_path, damage):
    path = tmp_path / "r.json"
    content = json.loads(result())
    path.write_text(json.dumps(content))
    assert read_results(str(path)).counts["v2t"].queries == 3
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"r\.json is not a JSON file that test\.py"):
        read_results(str(path))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"results": []}'])
def test_other_files_than_results_are_errors(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(InputError, match=r"r\.json is not a JSON file that test\.py"):
        read_results(str(tmp_path / "r.json"))


@pytest.mark.parametrize(
    ("network", "save_features", "expected"),
    [
        ({}, None, ""),
        ({"trial": None}, "f_{trial}.npz", "f_{trial}.npz"),
        ({"trial": 3}, "f.npz", "f.npz"),
        ({"trial": 3}, "f_{trial}.npz", "f_3.npz"),  # test.py --trial all
        ({"trial": 3, "features": "{trial}.npz"}, None, "{trial}.npz"),  # of tools.score
    ],
)
def test_results_name_the_features_of_their_first_network(
    tmp_path, network, save_features, expected
):
    networks = [network, {"trial": 4, "features": "another.npz"}]
    flags = {"dataset": "regdb", "save_features": save_features}
    (tmp_path / "r.json").write_text(result(networks=networks, flags=flags))
    assert read_results(str(tmp_path / "r.json")).features_file == expected


def test_random_rankings_keep_their_label(tmp_path):
    (tmp_path / "r.json").write_text(result())
    results = {"chance": read_results(str(tmp_path / "r.json"))}
    with pytest.raises(InputError, match="'chance'"):
        check_comparable(results, "fc")


# ---- features -----------------------------------------------------------------------------------


@pytest.mark.parametrize("trial", [0, 11, -1, "1", 1.0, [1]])
def test_a_trial_that_the_dataset_does_not_have_is_an_error(tmp_path, trial):
    network = json.dumps({"trial": trial})
    path = features_file(tmp_path / "f.npz", camids=[1, 2] * 12, network=network)
    with pytest.raises(InputError, match=r"f\.npz cannot .*RegDB has no trial"):
        read_features(str(path), REGDB, "fc")


@pytest.mark.parametrize("trial", [1, 10, None])
def test_the_trial_of_features_is_that_of_their_network(tmp_path, trial):
    network = json.dumps({"trial": trial})
    path = features_file(tmp_path / "f.npz", camids=[1, 2] * 12, network=network)
    features = read_features(str(path), REGDB, "fc")
    assert features.first_trial({}).number == (trial or 1)


def test_more_files_than_trials_are_an_error(error_of, tmp_path):
    file = features_file(tmp_path / "f.npz")
    line = error_of("-m tools.score", "--dataset", "regdb", *[file] * 11)
    assert "at most 10" in line


def test_persons_without_a_cell_of_the_official_code_are_an_error(error_of, tmp_path):
    pids = [0, 1] * 12
    file = features_file(tmp_path / "f.npz", pids=pids)
    flags = ["--mat", tmp_path / "mat", "--log-path", tmp_path / "log"]
    line = error_of("-m tools.score", file, *flags)
    assert "f.npz: --mat needs person ids above 0, but there is 0" in line
