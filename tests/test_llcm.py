"""LLCM: its lists, galleries and scores are those of its authors' code, and the road from files to figures."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, TINY_BATCH, places
from test_parity import golden

from data_manager import DATASETS
from eval_metrics import Distances, score_search
from tools.make_synthetic import make_llcm
from tools.score import load_features

LLCM = DATASETS["llcm"]


@pytest.fixture(scope="module")
def tree(made_once) -> Path:
    return made_once("llcm", lambda folder: make_llcm(folder / "LLCM", ids=9, images=2, seed=3)) / "LLCM"


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple:
    """The made-up test images, and what the published code listed, drew and computed; places are among the images."""
    root, g = tmp_path_factory.mktemp("golden") / "LLCM", golden("llcm_eval")
    for name in g["names"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "idx").mkdir()
    (root / "idx/test_id.txt").write_text(str(g["test_id_txt"]))
    images = LLCM.test(str(root), None)
    names = g["names"].tolist()
    where = np.array([names.index(os.path.relpath(path, root)) for path in images.paths])
    return images, g["features"][where], where, g


@pytest.mark.parametrize(
    ("search", "name", "query", "gallery"),
    [
        ("t2v", "nir2vis", "nir_query", "vis_gallery"),
        ("v2t", "vis2nir", "vis_query", "nir_gallery"),
        ("v2t-published", "vis2nir_swapped", "nir_gallery", "vis_query"),
    ],
)
def test_lists_galleries_and_scores_are_published_ones(published, search, name, query, gallery):
    images, features, where, g = published
    searches = LLCM.searches(images, {"search": search})
    assert [own.trial for own in searches] == [*range(10)] and {own.protocol for own in searches} == {search}
    for own in searches:
        for side, key in ((own.query, query), (own.gallery, gallery)):
            ours = {key: where[side], f"{key}_pid": images.pids[side], f"{key}_cam": images.camids[side]}
            for what, values in ours.items():
                np.testing.assert_array_equal(values, g[what][own.trial] if g[what].ndim == 2 else g[what])
        scores = score_search(own, images, Distances(features[own.query], features[own.gallery]), LLCM)
        np.testing.assert_allclose(scores.cmc, g[f"{name}_cmc"][own.trial], rtol=0, atol=1e-6)
        np.testing.assert_allclose(scores.mAP, g[f"{name}_mAP"][own.trial], rtol=0, atol=1e-10)
        np.testing.assert_allclose(scores.mINP, g[f"{name}_mINP"][own.trial], rtol=0, atol=1e-10)


def test_training_lists(tree):
    for split, kind in zip(LLCM.train(str(tree), None), ("vis", "nir"), strict=True):
        rows = [f"{os.path.relpath(path, tree)} {pid}" for path, pid in zip(split.paths, split.pids, strict=True)]
        assert rows == (tree / f"idx/train_{kind}.txt").read_text().splitlines()
        assert split.thermal.all() if kind == "nir" else not split.thermal.any()
    test = LLCM.test(str(tree), None)
    assert {*test.camids[test.thermal]} & {*test.camids[~test.thermal]}  # a camera number tells no modality


def test_from_files_to_figures(output, bad, tree, tmp_path):
    out, data = [*places(tree, tmp_path), "--workers", 0], ["--dataset", "llcm"]
    output("train.py", *data, *TINY, *TINY_BATCH, *out, "--epochs", 2)
    (last,) = tmp_path.glob("llcm_*_last.t")
    file = tmp_path / "features.npz"
    output("test.py", *data, *out, "--resume", last, "--search", "both", "--save_features", file)
    (found,) = tmp_path.glob("test_*_both.json")
    output("-m tools.score", *data, file, "--search", "both", "--log_path", tmp_path)
    (again,) = tmp_path.glob("score_*_both.json")
    results = [json.loads(path.read_text())["results"] for path in (found, again)]
    assert results[0] == results[1] and [*dict.fromkeys(row["protocol"] for row in results[0])] == [
        *LLCM.search_flags["search"]
    ]
    assert "v2t-published" in output("-m tools.report", found, "--out", tmp_path / "report.html")
    with np.load(file) as saved:
        np.savez(tmp_path / "foreign.npz", **{key: saved[key] for key in saved if key != "thermal"})
    assert "'thermal'" in bad("-m tools.score", *data, tmp_path / "foreign.npz", "--log_path", tmp_path)
    assert load_features(str(file), LLCM)[0].thermal.any()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("train_nir.txt", "nir/0001/x.jpg one\n", "train_nir.txt line 1"),
        ("train_vis.txt", "../secret.jpg 0\n", "train_vis.txt line 1 outside"),
        ("train_vis.txt", "vis/0001/missing.jpg 0\n", "missing.jpg"),
        ("test_id.txt", "one, two\n", "test_id.txt first line"),
        ("test_id.txt", "9999\n", "missing"),
        ("test_id.txt", None, "test_id.txt not found"),
    ],
)
def test_bad_lists(bad, tree, tmp_path, name, content, words):
    broken = shutil.copytree(tree, tmp_path / "LLCM")
    (broken / "idx" / name).unlink()
    if content:
        (broken / "idx" / name).write_text(content)
    line = bad("train.py", "--dataset", "llcm", *TINY, *TINY_BATCH, *places(broken, tmp_path / "out"), "--epochs", 0)
    assert all(word in line for word in words.split())
