"""The pictures show what they say: what is drawn is compared with what went in."""

import json

import numpy as np
import pytest
from conftest import RUN
from matplotlib.colors import to_hex
from PIL import Image
from test_bad_input import result
from test_score import features_file

import data_manager
from data_loader import read_image
from eval_metrics import eval_sysu
from tools import visualize
from tools.visualize import (
    Features,
    attention,
    cmc,
    curves,
    distances,
    embedding,
    histograms,
    labelled,
    ranked,
    read_features,
    read_metrics,
    read_network,
    read_results,
    short_names,
    stripe_parts,
)


def drawn(persons: int, images: int, gap: float = 0.0, seed: int = 0, cameras: tuple = (1, 2, 3, 4, 5, 6)) -> Features:
    """Features around a center for each person, which infrared ones are ``gap`` away from."""
    rng = np.random.default_rng(seed)
    pids = np.repeat(np.arange(1, persons + 1), images * len(cameras))
    camids = np.tile(np.repeat(cameras, images), persons)
    own = rng.normal(size=(persons, 16))[pids - 1] + 0.05 * rng.normal(size=(len(pids), 16))
    own[np.isin(camids, (3, 6)), 0] += gap
    paths = [f"cam{cam}/{pid:04d}/{i:04d}.jpg" for i, (pid, cam) in enumerate(zip(pids, camids, strict=True))]
    return Features(data_manager.Split(paths, pids, camids), own, "fc", {"checkpoint": "m/net_last.t"}, "sysu")


def texts(figure) -> str:
    """All words in a figure."""
    figure.canvas.draw()
    return "\n".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


def test_curves_are_the_metrics(sysu_run):
    metrics = read_metrics(str(sysu_run["logs"] / RUN))
    shorter = [{**line, "CE": 2 * line["CE"]} for line in metrics[:2]]
    figure = curves({"long": metrics, "short": shorter})
    panels = {axis.get_title(): axis for axis in figure.axes}
    for title, name, scale in (("cross-entropy, per stripe", "CE", 1), ("rank-1 of fc, %", "fc_rank1", 100)):
        for line, run in zip(panels[title].lines, (metrics, shorter), strict=True):
            points = [(at["epoch"], scale * at[name]) for at in run if name in at]
            np.testing.assert_allclose(np.array(line.get_xydata()), np.array(points).reshape(-1, 2))
    assert {"long", "short"} <= {*texts(figure).splitlines()}


def test_cmc_curves_are_means_over_trials_with_their_deviation(tmp_path):
    trials = np.sort(np.random.default_rng(0).random((10, 20)), axis=1)
    rows = json.loads(result())["results"]
    for row in rows:
        row["trials"] = [{"cmc": curve.tolist()} for curve in (trials if row["feature"] == "fc" else trials / 2)]
    (tmp_path / "a.json").write_text(result(results=rows))
    figure = cmc({"ours": read_results(str(tmp_path / "a.json"))})
    (axis,) = [axis for axis in figure.axes if axis.lines]
    chance, ours = axis.lines
    np.testing.assert_allclose(ours.get_ydata(), 100 * trials.mean(0))
    np.testing.assert_allclose(chance.get_ydata(), 50 * trials.mean(0))
    band = axis.collections[1].get_paths()[0].get_extents()
    assert band.y1 == pytest.approx(100 * (trials.mean(0) + trials.std(0)).max())
    assert f"{100 * trials.mean(0)[0]:5.1f}%  ours" in texts(figure) and "RegDB" in texts(figure)


def test_embedding_joins_the_centers_of_a_person():
    near, far = drawn(5, 4, gap=0.1), drawn(5, 4, gap=3.0)
    figure = embedding({"near": near, "far": far}, persons=3, method="pca")
    words = texts(figure)
    found = [float(line.split("same person ")[1].split(",")[0]) for line in words.splitlines() if "same person" in line]
    np.testing.assert_allclose(found, [0.1, 3.0], atol=0.05)
    for axis, features in zip(figure.axes, (near, far), strict=True):
        assert len(axis.lines) == 3
        assert "net_last.t" in axis.get_xlabel()
        shown = [int(text.get_text()) for text in axis.texts]
        images = sum(len(c.get_offsets()) for c in axis.collections)
        assert images == 3 * 6 * 4 + 2 * 3  # all images of three persons, and their centers
        colours = [to_hex(line.get_facecolor()[0]) for line in axis.collections[::4]]
        assert len({*colours}) == 3
        # PCA is linear: the center of the places is the place of the center.
        for k, pid in enumerate(shown):
            visible, infrared, at_visible, at_infrared = axis.collections[4 * k : 4 * k + 4]
            np.testing.assert_allclose(visible.get_offsets().mean(0), at_visible.get_offsets()[0], atol=1e-6)
            np.testing.assert_allclose(infrared.get_offsets().mean(0), at_infrared.get_offsets()[0], atol=1e-6)
            assert len(visible.get_offsets()) == 16 and pid in features.images.pids
    assert figure.axes[0].texts[0].get_text() == figure.axes[1].texts[0].get_text()  # the same persons


@pytest.mark.parametrize(
    ("persons", "images", "cameras"), [(1, 1, (1, 3)), (3, 1, (1, 2, 3)), (500, 1, (1, 6)), (4, 2, (1, 2, 4, 5, 6))]
)
def test_odd_trees_can_be_drawn(persons, images, cameras):
    features = drawn(persons, images, cameras=cameras)
    for method in ("tsne", "pca"):
        assert embedding({"a" * 300: features}, method=method)
    assert distances({"a": features, "b" * 300: features})


def test_one_modality_alone_is_refused(sysu_tree):
    features = drawn(3, 2, cameras=(3, 6))
    for draw in (embedding, distances):
        with pytest.raises(OSError, match="there are only thermal images"):
            draw({"a": features})


def test_distances_are_counted_as_by_brute_force():
    features, bins = drawn(6, 3, gap=1.0), np.linspace(0, 2, 41)
    same, other, separation = histograms(features, bins)
    values = features.values / np.linalg.norm(features.values, axis=1, keepdims=True)
    found = {True: [], False: []}
    for i in np.flatnonzero(np.isin(features.images.camids, (3, 6))):
        for j in np.flatnonzero(~np.isin(features.images.camids, (3, 6))):
            found[features.images.pids[i] == features.images.pids[j]].append(1 - values[i] @ values[j])
    np.testing.assert_allclose(same, np.histogram(found[True], bins)[0], atol=1)
    np.testing.assert_allclose(other, np.histogram(found[False], bins)[0], atol=1)
    spread = np.sqrt((np.var(found[True]) + np.var(found[False])) / 2)
    assert separation == pytest.approx((np.mean(found[False]) - np.mean(found[True])) / spread, rel=1e-6)


def test_ranked_lists_frame_hits_and_leave_out_the_same_room(sysu_tree):
    images = data_manager.sysu_test(str(sysu_tree))
    values = np.random.default_rng(0).normal(size=(len(images.paths), 8))
    features = Features(images, values, "fc", {"checkpoint": "net.t"}, "sysu")
    (search,) = data_manager.sysu_searches(images, "all", "multi", trials=[0])
    figure = ranked(features, search, "/", rows=3)
    rows = np.array(figure.axes).reshape(-1, 11)
    precisions = []
    for row in rows:
        kind, precision, match, who = row[0].get_title().split("\n")
        pid, cam = (int(word) for word in who.split()[1::2])
        (i,) = (
            i for i, q in enumerate(search.query)
            if (images.pids[q], images.camids[q]) == (pid, cam) and np.array_equal(
                row[0].images[0].get_array(), read_image(images.paths[q], visualize.IMAGE))
        )  # fmt: skip
        own = search._replace(query=search.query[i : i + 1])
        dist = -(values[own.query] @ values[own.gallery].T) / np.linalg.norm(values[own.gallery], axis=1)
        scores = eval_sysu(dist, images.pids[own.query], images.pids[own.gallery], [cam], images.camids[own.gallery])
        assert precision == f"AP {scores.mAP:.0%}"
        ranking = own.gallery[np.argsort(dist[0] + 9 * ((cam == 3) & (images.camids[own.gallery] == 2)), kind="stable")]
        assert match == f"1st match {np.flatnonzero(images.pids[ranking] == pid)[0] + 1}"
        precisions.append((kind, scores.mAP))
        assert ("the same room" in row[0].get_xlabel()) == (cam == 3)
        for axis in row[1:]:
            if axis.images:
                place, shown, camera = axis.get_title().split("\n")
                hit = shown == f"id {pid}"
                assert ("✓" in place) == hit
                assert to_hex(axis.spines["top"].get_edgecolor()) == (visualize.HIT if hit else visualize.MISS).lower()
                assert not (cam == 3 and camera == "cam 2")
    kinds = [kind for kind, _ in precisions]
    persons = len(np.unique(images.pids[search.query]))
    assert kinds == ["best"] * min(3, persons) + ["random"] * 3 + ["worst"] * min(3, persons)
    of_kind = {kind: [p for k, p in precisions if k == kind] for kind in kinds}
    assert max(of_kind["best"]) >= max(of_kind["random"]) and min(of_kind["worst"]) <= min(of_kind["random"])
    assert "SYSU-MM01, all-search multi-shot, trial 0; checkpoint: net.t" in texts(figure).replace("\n", " ")


def test_attention_without_data(sysu_run, bad, tmp_path):
    net = sysu_run["models"] / f"{RUN}_last.t"
    assert "test_id.txt not found" in bad("-m tools.visualize", "attention", net, "--data-path", tmp_path)


def test_attention_is_the_part_of_each_place_in_its_stripe(sysu_run):
    net, config = read_network(str(sysu_run["models"] / f"{RUN}_last.t"))
    assert (config["img_h"], config["img_w"]) == (96, 32)
    images = data_manager.sysu_test(str(sysu_run["data"]))
    pixels = read_image(images.paths[0], (96, 32))
    parts, bounds = stripe_parts(net, "visible", pixels)
    assert parts.shape == (6, 2) and bounds == [i / 6 for i in range(6)]
    np.testing.assert_allclose(parts.min(1), 0, atol=1e-6)
    np.testing.assert_allclose(parts.max(1), 1, atol=1e-6)
    assert not np.array_equal(parts, stripe_parts(net, "thermal", pixels)[0])  # each modality has its own ResNet
    figure = attention(net, images, "sysu", (96, 32), "net.t", persons=2)
    shown = [axis for axis in figure.axes if axis.images]
    assert len(shown) == 2 * 2 * 2 and len(shown[1].lines) == 5  # two persons, image and map; borders of six stripes


def test_every_command_writes_its_picture(sysu_run, call, capsys, tmp_path):
    (tmp_path / "r.json").write_text(result())
    features, tree, net = tmp_path / "f.npz", sysu_run["data"], sysu_run["models"] / f"{RUN}_last.t"
    call("test.py", "--data_path", tree, "--resume", net, "--log_path", tmp_path, "--save_features", features)
    commands = {
        "curves": [sysu_run["logs"] / RUN],
        "cmc": [f"a={tmp_path / 'r.json'}"],
        "embedding": [features, f"again={features}", "--persons", 2, "--method", "pca"],
        "distances": [features],
        "ranked": [features, "--data_path", tree, "--rows", 1],
        "attention": [net, "--data_path", tree, "--persons", 1],
        "samples": [tree, "--persons", 3],
    }
    for name, flags in commands.items():
        out = tmp_path / "pictures" / f"{name}.png"
        call("-m tools.visualize", name, *flags, "--out", out, "--pdf")
        assert str(out) in capsys.readouterr().out
        with Image.open(out) as picture:
            assert min(picture.size) > 300 and np.asarray(picture.convert("L")).std() > 10
        assert out.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    assert {file.suffix for file in (tmp_path / "pictures").iterdir()} == {".png", ".pdf"}


def test_labels(tmp_path):
    (tmp_path / "a=b").mkdir()
    assert labelled(["CE=x/y.json", "z/run_lr0.1_whc0.5/", str(tmp_path / "a=b")]) == {
        "CE": "x/y.json", "run_lr0.1_whc0.5": "z/run_lr0.1_whc0.5/", "a=b": str(tmp_path / "a=b"),
    }  # fmt: skip


def test_features_of_a_file(tmp_path):
    features_file(tmp_path / "f.npz", other=np.eye(24))
    assert read_features(str(tmp_path / "f.npz"), "sysu", "").kind == "fc"
    assert read_features(str(tmp_path / "f.npz"), "sysu", "other").kind == "other"


def test_long_names_are_told_apart():
    names = [f"sysu_id_resnet50_lr0.008_whc{w}_{'x' * 40}_last.t" for w in ("0", "0.1", "0.60")]
    assert [*short_names(names).values()] == ["…whc0…", "…whc0.1…", "…whc0.60…"]
    assert [*short_names(["CE", "CE + HC"]).values()] == ["CE", "CE + HC"]
    alike = ["a" * 60 + "b" + "c" * 60, "a" * 60 + "d" + "c" * 60]
    assert len({*short_names(alike).values()}) == 2


def test_every_panel_shows_its_histograms():
    """Also those whose distances lie far from the others'."""
    near, far = drawn(4, 3), drawn(4, 3, gap=9.0)
    near = near._replace(values=near.values + 100)  # all alike
    figure = distances({"near": near, "far": far, "$a_{": near})
    for axis in figure.axes:
        low, high = axis.get_xlim()
        for patch in axis.patches:
            values, edges, _ = patch.get_data()
            used = np.flatnonzero(values)
            assert low <= edges[used[0] + 1] and edges[used[-1]] <= high
            np.testing.assert_allclose((values * np.diff(edges)).sum(), 1, rtol=0.02)
    assert texts(figure)
