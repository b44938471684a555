"""LLCM: its lists, galleries and scores are those of its authors' code, and the road from files to figures."""

import os

import numpy as np
import pytest
from conftest import TINY, golden, only, places

from data_manager import DATASETS
from eval_metrics import Distances, score_search

LLCM = DATASETS["llcm"]


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple:
    """The made-up test images, and what the published code listed, drew and computed; places are among the images."""
    root, g = tmp_path_factory.mktemp("golden") / "LLCM", golden("llcm_eval.npz")
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


def test_from_files_to_figures(call, bad, llcm_tree, tmp_path):
    out, data = [*places(llcm_tree, tmp_path), "--workers", 0], ["--dataset", "llcm"]
    call("train.py", *data, *TINY, *out, "--epochs", 2)
    (last,) = tmp_path.glob("llcm_*_last.t")
    file = tmp_path / "features.npz"
    call("test.py", *data, *out, "--resume", last, "--search", "both", "--save_features", file)
    call("-m tools.score", *data, file, "--search", "both", "--log_path", tmp_path)
    tested, scored = (only(tmp_path, f"{name}_*_both.json")["results"] for name in ("test", "score"))
    assert tested == scored and {row["protocol"] for row in tested} == {*LLCM.search_flags["search"]}
    found = next(tmp_path.glob("test_*.json"))
    assert "v2t-published" in call("-m tools.report", found, "--out", tmp_path / "report.html")
    with np.load(file) as saved:
        np.savez(tmp_path / "foreign.npz", **{key: saved[key] for key in saved if key != "thermal"})
    assert "'thermal'" in bad("-m tools.score", *data, tmp_path / "foreign.npz", "--log_path", tmp_path)
