"""The pictures show what they say: what is drawn is compared with what went in."""

import json

import numpy as np
import pytest
from conftest import RUN, result
from matplotlib.colors import to_hex
from PIL import Image

from data_loader import read_image
from data_manager import DATASETS, Split, sysu_test
from eval_metrics import eval_sysu
from model import network_of
from tools import visualize
from tools.visualize import Features, read_metrics, read_results
from utils import load_checkpoint

SYSU, REGDB = DATASETS["sysu"], DATASETS["regdb"]


def drawn(persons: int, images: int, gap: float = 0.0, cameras: tuple = (1, 2, 3, 4, 5, 6)) -> Features:
    """Features around a center for each person, which infrared ones are ``gap`` away from."""
    rng = np.random.default_rng(0)
    pids = np.repeat(np.arange(1, persons + 1), images * len(cameras))
    camids = np.tile(np.repeat(cameras, images), persons)
    thermal = np.isin(camids, (3, 6))
    own = rng.normal(size=(persons, 16))[pids - 1] + 0.05 * rng.normal(size=(len(pids), 16))
    own[thermal, 0] += gap
    paths = [f"{i:04d}.jpg" for i in range(len(pids))]
    return Features(Split(paths, pids, camids, thermal), own, "fc", {"checkpoint": "m/net_last.t"}, SYSU)


def texts(figure) -> str:
    """All words in a figure."""
    figure.canvas.draw()
    return " ".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


def test_curves_are_the_metrics(sysu_run):
    metrics = [line | {"Triplet": 3.0} for line in read_metrics(str(sysu_run["logs"] / RUN))]
    shorter = [{**line, "CE": 2 * line["CE"]} for line in metrics[:2]]
    figure = visualize.curves({"long": metrics, "short": shorter}, "RegDB")
    panels = {axis.get_title(): axis for axis in figure.axes if axis.get_title()}
    assert [*panels] == ["CE, per stripe", "HC, per stripe", "Triplet, per stripe", "accuracy in training, %",
                         "learning rate", "rank-1 of fc, %", "mAP of fc, %", "centers of a person, distance in fc",
                         "centers of two persons, distance in fc"]  # fmt: skip
    for title, name, scale in (("CE, per stripe", "CE", 1), ("rank-1 of fc, %", "fc_rank1", 100)):
        for line, run in zip(panels[title].lines, (metrics, shorter), strict=True):
            points = [(at["epoch"], scale * at[name]) for at in run if name in at]
            np.testing.assert_allclose(np.array(line.get_xydata()), np.array(points).reshape(-1, 2))
    assert "Training (RegDB)" in texts(figure) and "mAP" not in texts(visualize.curves({"untested": shorter}))


def test_cmc_curves_are_means_over_trials_with_their_deviation(tmp_path):
    trials = np.sort(np.random.default_rng(0).random((10, 20)), axis=1)
    content = json.loads(result())
    for row in content["results"]:
        row["trials"] = [{"cmc": curve.tolist()} for curve in (trials if row["feature"] == "fc" else trials / 2)]
    content["counts"]["v2t"]["deviation"] = 0.2  # which the first versions wrote
    (tmp_path / "a.json").write_text(json.dumps({**content, "networks": [{"synthetic": True}]}))
    figure = visualize.cmc({"ours": read_results(str(tmp_path / "a.json"))})
    chance, ours = (axis := figure.axes[0]).lines
    np.testing.assert_allclose(ours.get_ydata(), 100 * trials.mean(0))
    np.testing.assert_allclose(chance.get_ydata(), 50 * trials.mean(0))
    band = axis.collections[1].get_paths()[0].get_extents()
    assert band.y1 == pytest.approx(100 * (trials.mean(0) + trials.std(0)).max())
    assert f"{100 * trials.mean(0)[0]:.1f}%" in texts(figure) and "synthetic, RegDB layout" in texts(figure)


def test_embedding_joins_the_centers_of_a_person():
    near, far = drawn(5, 4, gap=0.1), drawn(5, 4, gap=3.0)
    figure = visualize.embedding({"near": near, "far": far}, persons=3, method="pca")
    for axis, gap in zip(figure.axes, (0.1, 3.0), strict=True):
        note = axis.get_title().split("same person ")[1]
        assert float(note.split(",")[0]) == pytest.approx(gap, abs=0.05)
        assert len(axis.lines) == 3 and "net_last.t" in axis.get_xlabel()
        places = [marks.get_offsets() for marks in axis.collections]
        assert [*map(len, places)] == [4 * 4, 2 * 4, 1, 1] * 3  # images of four and two cameras, and the centers
        # PCA is linear: the center of the places is the place of the center.
        for images, center in ((0, 2), (1, 3), (4, 6), (5, 7)):
            np.testing.assert_allclose(places[images].mean(0), places[center][0], atol=1e-6)
    assert len({axis.texts[0].get_text() for axis in figure.axes}) == 1  # the same persons


def test_odd_trees_can_be_drawn():
    many, one = drawn(500, 1, cameras=(1, 6)), drawn(1, 1, cameras=(1, 3))
    assert texts(visualize.distances({"a": many, "b" * 300: many}))
    for method in ("tsne", "pca"):
        assert texts(visualize.embedding({"$a_{" * 80: many, "one": one}, method=method))
    for draw in (visualize.embedding, visualize.distances):
        with pytest.raises(ValueError, match="both modalities"):
            draw({"a": drawn(3, 2, cameras=(3, 6))})


def test_distances_are_those_of_brute_force():
    features = drawn(6, 3, gap=1.0)
    values = features.values / np.linalg.norm(features.values, axis=1, keepdims=True)
    found = {True: [], False: []}
    for i in np.flatnonzero(features.images.thermal):
        for j in np.flatnonzero(~features.images.thermal):
            found[features.images.pids[i] == features.images.pids[j]].append(1 - values[i] @ values[j])
    (axis,) = visualize.distances({"a": features}).axes
    spread = np.sqrt((np.var(found[True]) + np.var(found[False])) / 2)
    assert f"d' = {(np.mean(found[False]) - np.mean(found[True])) / spread:.2f}" in axis.get_title()
    for patch, same in zip(axis.patches[::2], (False, True), strict=True):
        density, edges, _ = patch.get_data()
        np.testing.assert_allclose(density, np.histogram(np.clip(found[same], *edges[[0, -1]]), edges, density=True)[0])


def test_ranked_lists_frame_hits_and_leave_out_what_is_hidden(sysu_tree):
    images = sysu_test(str(sysu_tree))
    values = np.random.default_rng(0).normal(size=(len(images.paths), 8))
    features = Features(images, values, "fc", {"checkpoint": "net.t"}, SYSU)
    search = features.search({"gall_mode": "multi"})
    figure = visualize.ranked(features, search, str(sysu_tree), rows=3)
    found = {"best": [], "random": [], "worst": []}
    for row in np.array(figure.axes).reshape(-1, 11):
        kind, precision, match, who = row[0].get_title().split("\n")
        pid, cam = (int(word) for word in who.split()[1::2])
        shown = row[0].images[0].get_array()
        (q,) = (q for q in search.query if np.array_equal(shown, read_image(images.paths[q], visualize.IMAGE)))
        assert (pid, cam) == (images.pids[q], images.camids[q])
        gallery = images.take(search.gallery)
        dist = -(values[q] @ values[search.gallery].T) / np.linalg.norm(values[search.gallery], axis=1)
        scores = eval_sysu(dist[None], [pid], gallery.pids, [cam], gallery.camids)
        hidden = (cam == 3) & (gallery.camids == 2)
        ranking = gallery.pids[np.argsort(dist + 9 * hidden, kind="stable")]
        assert (precision, match) == (f"AP {scores.mAP:.0%}", f"1st match {np.flatnonzero(ranking == pid)[0] + 1}")
        assert row[0].get_xlabel() == (f"gallery images\nnot counted: {hidden.sum()}" if hidden.any() else "")
        found[kind].append(scores.mAP)
        for axis in (axis for axis in row[1:] if axis.images):
            place, shown, camera = axis.get_title().split("\n")
            hit = shown == f"id {pid}"
            assert ("✓" in place) == hit and not (cam == 3 and camera == "cam 2")
            assert to_hex(axis.spines["top"].get_edgecolor()) == (visualize.HIT if hit else visualize.MISS).lower()
    assert [*map(len, found.values())] == [2, 3, 2]  # the best and the worst query of both test persons
    assert max(found["best"]) >= max(found["random"]) and min(found["worst"]) <= min(found["random"])
    assert "all-search multi-shot, trial 0 (synthetic, SYSU-MM01 layout)" in texts(figure)


def test_attention_is_the_part_of_each_place_in_its_stripe(sysu_run):
    path, tree = str(sysu_run["models"] / f"{RUN}_last.t"), str(sysu_run["data"])
    net, image = network_of(load_checkpoint(path), path).eval(), read_image(sysu_test(tree).paths[0], (96, 64))
    parts, bounds = visualize.stripe_parts(net, "visible", image)
    assert parts.shape == (6, 4) and bounds == [i / 6 for i in range(6)]
    assert {*parts.min(1)} == {0} and parts.max(1) == pytest.approx(1)  # the least and the most of each stripe
    assert not np.array_equal(parts, visualize.stripe_parts(net, "thermal", image)[0])  # of another backbone
    figure = visualize.attention(path, SYSU, tree, persons=2)
    shown = [axis for axis in figure.axes if axis.images]
    assert len(shown) == 2 * 2 * 2 and len(shown[1].lines) == 5  # two persons, image and map; borders of six stripes


def test_samples_are_persons_by_cameras(sysu_tree, regdb_tree):
    """A column for each camera and modality, also where a camera takes images in both; grey is who was not seen."""
    both = REGDB._replace(test=lambda *of: (found := REGDB.test(*of))._replace(camids=np.ones_like(found.camids)))
    for dataset, tree, columns in (
        (SYSU, sysu_tree, [f"cam{cam}\n{'infrared' if cam in (3, 6) else 'visible'}" for cam in range(1, 7)]),
        (both, regdb_tree, ["cam1\nvisible", "cam1\ninfrared"]),
    ):
        axes = np.array(visualize.samples(dataset, str(tree), persons=20).axes).reshape(-1, len(columns))
        assert [axis.get_title(loc="left") for axis in axes[0]] == columns
        assert len(axes) == len({*dataset.test(str(tree), 1).pids.tolist()})
        for row in axes:
            folders = [tree / f"cam{cam}" / f"{int(row[0].get_ylabel()):04d}" for cam in range(1, 7)]
            seen = [folder.exists() for folder in folders] if dataset is SYSU else [True, True]
            assert [axis.images[0].get_array().std() > 0 for axis in row] == seen


def test_every_command_writes_its_picture(sysu_run, call, tmp_path):
    (tmp_path / "r.json").write_text(result())
    features, tree, net = tmp_path / "f.npz", sysu_run["data"], sysu_run["models"] / f"{RUN}_last.t"
    call("test.py", "--data_path", tree, "--resume", net, "--log_path", tmp_path, "--save_features", features)
    commands = {
        "curves.png": [sysu_run["logs"] / RUN],
        "cmc.jpg": [f"a={tmp_path / 'r.json'}"],
        "embedding.png": [features, f"again={features}", "--persons", 2, "--method", "pca"],
        "distances.png": [features],
        "ranked.png": [features, "--data-path", tree, "--rows", 1],
        "attention.png": [net, "--data_path", tree, "--persons", 1],
        "samples.png": ["--data_path", tree, "--persons", 3],
    }
    for name, flags in commands.items():
        out = tmp_path / "pictures" / name
        assert str(out) in call("-m tools.visualize", out.stem, *flags, "--out", out)
        with Image.open(out) as picture:
            assert min(picture.size) > 300 and np.asarray(picture.convert("L")).std() > 10
