"""Figures show what they say: what is drawn is compared with what went in."""

import dataclasses
import io
import json
import re
import tracemalloc
import warnings

import matplotlib
import numpy as np
import pytest
import scipy.stats
import torch
from conftest import RUN, result
from matplotlib import font_manager
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from data_loader import read_image, to_input
from data_manager import DATASETS, Split, sysu_test
from eval_metrics import eval_sysu
from model import load_network
from tools import figures
from tools.results_files import Features, read_metrics, read_results
from utils import InputError, load_checkpoint

SYSU = DATASETS["sysu"]
REGDB = DATASETS["regdb"]
OWN_CENTERS = "same person's centers, distance\n(fc, tested trial)"
OTHER_CENTERS = "two persons' centers, distance\n(fc, tested trial)"


def features_around_centers(
    n_persons: int, per_camera: int, gap: float = 0.0, cameras: tuple = (1, 2, 3, 4, 5, 6)
) -> Features:
    """Features around a center for each person; the infrared ones are ``gap`` away from it."""
    rng = np.random.default_rng(0)
    pids = np.repeat(np.arange(1, n_persons + 1), per_camera * len(cameras))
    camids = np.tile(np.repeat(cameras, per_camera), n_persons)
    thermal = np.isin(camids, (3, 6))
    centers = rng.normal(size=(n_persons, 16))
    values = centers[pids - 1] + 0.05 * rng.normal(size=(len(pids), 16))
    values[thermal, 0] += gap
    paths = [f"{i:04d}.jpg" for i in range(len(pids))]
    images = Split(paths, pids, camids, thermal)
    return Features(images, values, "fc", {"checkpoint": "m/net_last.t"}, SYSU)


def words_of(figure: Figure) -> str:
    """All words in a figure, with single spaces between them."""
    figure.canvas.draw()
    texts = figure.findobj(lambda artist: hasattr(artist, "get_text"))
    text = " ".join(artist.get_text() for artist in texts)
    return " ".join(text.split())


# ---- curves -------------------------------------------------------------------------------------


def test_curves_are_the_metrics_of_a_run(sysu_run):
    long = read_metrics(str(sysu_run["logs"] / RUN))
    for epoch in long:
        epoch["Triplet"] = 3.0
    short = [{**epoch, "CE": 2 * epoch["CE"]} for epoch in long[:2]]
    figure = figures.curves({"long": long, "short": short}, "RegDB")
    axes = {axis.get_title(): axis for axis in figure.axes if axis.get_title()}
    assert list(axes) == [
        "CE, per stripe",
        "HC, per stripe",
        "Triplet, per stripe",  # a new term of the loss is drawn by its name
        "accuracy in training, %",
        "learning rate",
        "rank-1 of fc, %",
        "mAP of fc, %",
        OWN_CENTERS,
        OTHER_CENTERS,
    ]
    for title, name, scale in (
        ("CE, per stripe", "CE", 1),
        ("rank-1 of fc, %", "fc_rank1", 100),
        (OWN_CENTERS, "fc_trial_own_center_distance", 1),
    ):
        for line, run in zip(axes[title].lines, (long, short), strict=True):
            points = [(epoch["epoch"], scale * epoch[name]) for epoch in run if name in epoch]
            expected = np.array(points).reshape(-1, 2)
            np.testing.assert_allclose(np.reshape(line.get_xydata(), (-1, 2)), expected)
    assert "Training (RegDB)" in words_of(figure)


def test_curves_leave_out_what_was_not_recorded(tmp_path):
    untested = [{"epoch": 0, "lr": 0.1, "CE": 2.0}, {"epoch": 1, "lr": 0.1}]
    words = words_of(figures.curves({"untested": untested}))
    assert "CE, per stripe" in words
    assert "mAP" not in words
    assert "accuracy" not in words
    assert "Training" in words
    with pytest.raises(InputError, match="empty run"):
        figures.curves({"empty run": [{"epoch": 0}]})


def test_curves_begin_at_zero_unless_a_value_is_negative():
    epochs = [{"epoch": i, "CE": 2.0 + i, "Zero": 0.0, "Margin": -1.0 - i} for i in range(3)]
    figure = figures.curves({"a run": epochs})
    limits = {axis.get_title().split(",")[0]: axis.get_ylim() for axis in figure.axes}
    assert limits["CE"] == pytest.approx((0, 1.05 * 4))
    assert limits["Zero"] == (0, 1)
    low, high = limits["Margin"]
    assert low <= -3
    assert high >= -1


# ---- cmc ----------------------------------------------------------------------------------------


def test_cmc_curves_are_means_over_trials_with_their_deviation(tmp_path):
    trials = np.sort(np.random.default_rng(0).random((10, 20)), axis=1)
    content = json.loads(result(networks=[{"synthetic": True}]))
    for row in content["results"]:
        curves = trials if row["feature"] == "fc" else trials / 2
        row["trials"] = [{"cmc": curve.tolist()} for curve in curves]
    (tmp_path / "a.json").write_text(json.dumps(content))
    figure = figures.cmc({"ours": read_results(str(tmp_path / "a.json"))})
    axis = figure.axes[0]
    chance, ours = axis.lines
    mean = 100 * trials.mean(axis=0)
    std = 100 * trials.std(axis=0)
    np.testing.assert_allclose(ours.get_ydata(), mean)
    np.testing.assert_allclose(chance.get_ydata(), mean / 2)
    band = axis.collections[1].get_paths()[0].get_extents()
    assert band.y1 == pytest.approx((mean + std).max())
    assert band.y0 == pytest.approx((mean - std).min())
    words = words_of(figure)
    assert f"{mean[0]:.1f}%" in words
    assert "v2t: 3 queries, 3 gallery images" in words
    assert "synthetic, RegDB layout" in words


# ---- centers: training --------------------------------------------------------------------------


def epoch_of_centers(epoch: int, hc: float, own: float | None = None) -> dict[str, float]:
    """A line of metrics.jsonl. The other distance of a tested epoch is 4."""
    metrics = {"epoch": epoch, "HC": hc}
    if own is not None:
        metrics["fc_trial_own_center_distance"] = own
        metrics["fc_trial_other_center_distance"] = 4.0
    return metrics


def test_centers_are_means_over_runs_with_their_deviation():
    first = [epoch_of_centers(0, 5.0), epoch_of_centers(1, 3.0), epoch_of_centers(2, 2.0, own=1.0)]
    second = [epoch_of_centers(0, 7.0), epoch_of_centers(1, 3.0), epoch_of_centers(2, 4.0, own=3.0)]
    figure = figures.centers({"CE": [first, second], "one": [first]})
    hc_axis, ratio_axis = figure.axes
    mean, alone = hc_axis.lines
    np.testing.assert_allclose(mean.get_xydata(), [[0, 6], [1, 3], [2, 3]])
    np.testing.assert_allclose(alone.get_xydata(), [[0, 5], [1, 3], [2, 2]])
    band = hc_axis.collections[0].get_paths()[0].vertices
    at_zero = band[band[:, 0] == 0, 1]
    assert (at_zero.min(), at_zero.max()) == pytest.approx((6 - 2**0.5, 6 + 2**0.5))
    np.testing.assert_allclose(ratio_axis.lines[0].get_xydata(), [[2, 0.5]])
    assert "CE (2 runs)" in words_of(figure)


def test_centers_need_runs_with_tests(error_of, tmp_path):
    with pytest.raises(InputError, match="CE"):
        figures.centers({"CE": [[epoch_of_centers(0, 1.0)]]})
    pattern = f"{tmp_path}/none*"
    assert pattern in error_of("-m tools.visualize", "centers", f"a={pattern}")


# ---- embedding and distances --------------------------------------------------------------------


def test_embedding_joins_the_two_centers_of_a_person():
    gaps = {"near": 0.1, "far": 3.0}
    panels = {label: features_around_centers(5, 4, gap) for label, gap in gaps.items()}
    figure = figures.embedding(panels, persons=3, method="pca")
    for axis, gap in zip(figure.axes, gaps.values(), strict=True):
        distances = [float(text) for text in re.findall(r"\d+\.\d+", axis.get_title())]
        own, other, ratio = distances
        assert own == pytest.approx(gap, abs=0.05)
        assert ratio == pytest.approx(own / other, abs=0.01)
        assert len(axis.lines) == 3
        marks = [collection.get_offsets() for collection in axis.collections]
        # For each person: images of four visible and of two infrared cameras, then the centers.
        assert [len(points) for points in marks] == [4 * 4, 2 * 4, 1, 1] * 3
        for person, line in enumerate(axis.lines):
            visible, thermal, visible_center, thermal_center = marks[4 * person : 4 * person + 4]
            # PCA is linear: the center of the points is the point of the center.
            np.testing.assert_allclose(visible.mean(axis=0), visible_center[0], atol=1e-6)
            np.testing.assert_allclose(thermal.mean(axis=0), thermal_center[0], atol=1e-6)
            ends = np.concatenate([visible_center, thermal_center])
            np.testing.assert_allclose(line.get_xydata(), ends)
    assert "each plane has a scale of its own" in words_of(figure)
    first, second = figure.axes
    assert [text.get_text() for text in first.texts] == [text.get_text() for text in second.texts]


def test_few_or_many_persons_and_long_labels_can_be_drawn():
    many = features_around_centers(500, 1, cameras=(1, 6))
    one = features_around_centers(1, 1, cameras=(1, 3))
    assert words_of(figures.distances({"a": many, "b" * 300: many}))
    for method in ("tsne", "pca"):
        words = words_of(figures.embedding({"$a_{" * 80: many, "one": one}, method=method))
        assert "centers of all 500 persons: own distance" in words
        assert "centers of a single person" in words


def test_centers_of_many_persons_need_little_memory():
    """An array of all pairs of centers would take 128 MB."""
    features = features_around_centers(1000, 1, cameras=(1, 6))
    tracemalloc.start()
    figures.describe_centers(features)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40e6


@pytest.mark.parametrize("draw", [figures.embedding, figures.distances])
def test_a_single_modality_is_an_error(draw):
    with pytest.raises(InputError, match="both modalities"):
        draw({"a": features_around_centers(3, 2, cameras=(3, 6))})


def test_features_of_one_dimension_cannot_be_embedded():
    features = features_around_centers(3, 2)
    narrow = dataclasses.replace(features, values=features.values[:, :1])
    with pytest.raises(InputError, match="single dimension"):
        figures.embedding({"a": narrow})


def test_distances_are_those_of_brute_force():
    features = features_around_centers(6, 3, gap=1.0)
    values = features.values / np.linalg.norm(features.values, axis=1, keepdims=True)
    pids = features.images.pids
    same_person = []
    other = []
    for i in np.flatnonzero(features.images.thermal):
        for j in np.flatnonzero(~features.images.thermal):
            distances = same_person if pids[i] == pids[j] else other
            distances.append(1 - values[i] @ values[j])
    deviation = np.sqrt((np.var(same_person) + np.var(other)) / 2)
    separation = (np.mean(other) - np.mean(same_person)) / deviation

    (axis,) = figures.distances({"a": features}).axes
    assert f"d' = {separation:.2f}" in axis.get_title()
    # Each histogram is drawn as an area, then as a line.
    for area, distances in zip(axis.patches[::2], (other, same_person), strict=True):
        density, edges, _ = area.get_data()
        distances = np.clip(distances, edges[0], edges[-1])  # their rounding differs
        np.testing.assert_allclose(density, np.histogram(distances, edges, density=True)[0])


# ---- ranked lists -------------------------------------------------------------------------------


def test_ranked_lists_frame_matches_and_leave_out_junk(sysu_tree):
    images = sysu_test(str(sysu_tree))
    values = np.random.default_rng(0).normal(size=(len(images), 8))
    features = Features(images, values, "fc", {"checkpoint": "net.t"}, SYSU)
    trial = features.first_trial({"gall_mode": "multi"})
    figure = figures.ranked(features, trial, str(sysu_tree), rows=3)
    precisions = {"best": [], "random": [], "worst": []}
    for row in np.array(figure.axes).reshape(-1, 11):
        kind, precision = check_row_of_ranked(row, features, trial)
        precisions[kind].append(precision)
    # The best and the worst query of both test persons, and three queries at random.
    assert [len(rows) for rows in precisions.values()] == [2, 3, 2]
    assert max(precisions["best"]) >= max(precisions["random"])
    assert min(precisions["worst"]) <= min(precisions["random"])
    words = words_of(figure)
    assert "all-search multi-shot, trial 0 (synthetic, SYSU-MM01 layout)" in words

    figure = figures.ranked(features, trial, str(sysu_tree), rows=1, kinds=("worst",))
    assert len(figure.axes) == 11
    kind, precision = check_row_of_ranked(figure.axes, features, trial)
    assert (kind, precision) == ("worst", min(precisions["worst"]))


def check_row_of_ranked(row, features, trial) -> tuple[str, float]:
    """Compare a query and its images with `eval_sysu`; returns its kind and average precision."""
    images = features.images
    values = features.values
    kind, precision, first_match, pid_words, cam_words = row[0].get_title().split("\n")
    pid = int(pid_words.removeprefix("id "))
    cam = int(cam_words.removeprefix("cam "))
    pixels = row[0].images[0].get_array()
    (q,) = [
        index
        for index in trial.query
        if np.array_equal(pixels, read_image(images.paths[index], figures.IMAGE_SIZE))
    ]
    assert (pid, cam) == (images.pids[q], images.camids[q])

    gallery = images.take(trial.gallery)
    gallery_values = values[trial.gallery]
    distances = -(gallery_values @ values[q]) / np.linalg.norm(gallery_values, axis=1)
    scores = eval_sysu(
        distances[None], np.array([pid]), gallery.pids, np.array([cam]), gallery.camids
    )
    junk = (cam == 3) & (gallery.camids == 2)
    order = np.argsort(distances, kind="stable")
    order = order[~junk[order]]
    rank = np.flatnonzero(gallery.pids[order] == pid)[0] + 1
    assert precision == f"AP {scores.mAP:.0%}"
    assert first_match == f"1st match {rank}"
    expected_label = f"gallery images\nnot counted: {junk.sum()}" if junk.any() else ""
    assert row[0].get_xlabel() == expected_label

    drawn = [axis for axis in row[1:] if axis.images]
    assert len(drawn) == min(10, len(order))
    for position, (axis, g) in enumerate(zip(drawn, order, strict=False)):
        is_match = gallery.pids[g] == pid
        mark = "✓" if is_match else "✗"
        caption = f"{position + 1} {mark}\nid {gallery.pids[g]}\ncam {gallery.camids[g]}"
        assert axis.get_title() == caption
        colour = figures.MATCH_COLOUR if is_match else figures.MISMATCH_COLOUR
        assert to_hex(axis.spines["top"].get_edgecolor()) == colour.lower()
        expected_pixels = read_image(gallery.paths[g], figures.IMAGE_SIZE)
        assert np.array_equal(axis.images[0].get_array(), expected_pixels)
    return kind, scores.mAP


# ---- attention ----------------------------------------------------------------------------------


def load_run(sysu_run):
    """The trained network of the run, and the path of its checkpoint."""
    path = str(sysu_run["models"] / f"{RUN}_last.t")
    return load_network(load_checkpoint(path), path).eval(), path


def test_contributions_to_stripes_are_those_of_brute_force(sysu_run):
    net, _ = load_run(sysu_run)
    image = read_image(sysu_test(str(sysu_run["data"])).paths[0], (96, 64))
    contributions, tops = figures.stripe_contributions(net, "visible", image)
    assert contributions.shape == (6, 4)
    assert tops == [i / 6 for i in range(6)]
    with torch.no_grad():
        (maps,) = net.feature_maps(visible=to_input(torch.tensor(image[None]), (96, 64)))
    for row in range(6):  # each is a stripe
        feature = maps[:, row].mean(dim=1)
        products = [float(maps[:, row, column] @ feature) for column in range(4)]
        least = min(products)
        most = max(products)
        expected = [(product - least) / (most - least) for product in products]
        np.testing.assert_allclose(contributions[row], expected, atol=1e-4)
    of_other_backbone, _ = figures.stripe_contributions(net, "thermal", image)
    assert not np.array_equal(contributions, of_other_backbone)


def test_attention_shows_images_of_both_modalities_with_maps(sysu_run):
    _, path = load_run(sysu_run)
    figure = figures.attention(path, SYSU, str(sysu_run["data"]), persons=2)
    drawn = [axis for axis in figure.axes if axis.images]
    assert len(drawn) == 2 * 2 * 2  # two persons, two modalities, an image and its map
    for plain, overlay in zip(drawn[::2], drawn[1::2], strict=True):
        assert len(plain.images) == 1
        assert len(overlay.images) == 2
        assert len(overlay.lines) == 5  # the borders of six stripes
    words = words_of(figure)
    assert "Where the 6 stripes look (synthetic, SYSU-MM01 layout)" in words
    assert "infrared" in words


# ---- samples ------------------------------------------------------------------------------------


def read_rows_of_samples(dataset, tree, columns: list[str]) -> np.ndarray:
    """The (persons, columns) axes, after a check of the titles and of the number of rows."""
    figure = figures.samples(dataset, str(tree), persons=20)
    axes = np.array(figure.axes).reshape(-1, len(columns))
    assert [axis.get_title(loc="left") for axis in axes[0]] == columns
    assert len(axes) == len(np.unique(dataset.test(str(tree), 1).pids))
    return axes


def test_samples_are_grey_where_a_camera_has_not_seen_a_person(sysu_tree):
    columns = []
    for cam in range(1, 7):
        modality = "infrared" if cam in (3, 6) else "visible"
        columns.append(f"cam{cam}\n{modality}")
    for row in read_rows_of_samples(SYSU, sysu_tree, columns):
        pid = int(row[0].get_ylabel())
        for cam, axis in enumerate(row, start=1):
            was_seen = (sysu_tree / f"cam{cam}" / f"{pid:04d}").exists()
            is_grey = axis.images[0].get_array().std() == 0
            assert is_grey != was_seen


def test_samples_have_a_column_for_each_modality_of_a_camera(regdb_tree):
    def list_one_camera(root: str, trial: int | None) -> Split:
        images = REGDB.test(root, trial)
        return dataclasses.replace(images, camids=np.ones_like(images.camids))

    dataset = dataclasses.replace(REGDB, test=list_one_camera)
    columns = ["cam1\nvisible", "cam1\ninfrared"]
    for row in read_rows_of_samples(dataset, regdb_tree, columns):
        assert all(axis.images[0].get_array().std() > 0 for axis in row)


def test_too_large_a_figure_is_an_error():
    with pytest.raises(InputError, match="500 x 6 images"):
        figures.new_figure(500, 6, (0.95, 1.9), "Test persons")


# ---- side by side -------------------------------------------------------------------------------

N_SEEDS = 7


def paired_scores_file(folder) -> tuple[str, dict]:
    """A file of paired scores, and what it holds."""
    rng = np.random.default_rng(0)
    scores = {}
    for key in ("all-search single-shot fc", "all-search multi-shot pool5"):
        scores[key] = {
            "published": rng.uniform(70, 85, (N_SEEDS, 3)).tolist(),
            "ours": rng.uniform(70, 85, (N_SEEDS, 3)).tolist(),
        }
    content = {
        "what": "Two codes on a synthetic tree.",
        "measures": ["rank1", "rank5", "mAP"],
        "seeds": list(range(11, 11 + N_SEEDS)),
        "scores": scores,
    }
    path = folder / "pairs.json"
    path.write_text(json.dumps(content))
    return str(path), content


@pytest.mark.parametrize(
    ("protocol", "features"), [("all-search single-shot", "fc"), ("all-search multi-shot", "pool5")]
)
def test_side_by_side_shows_each_pair_and_the_interval_of_their_difference(
    tmp_path, protocol, features
):
    path, content = paired_scores_file(tmp_path)
    figure = figures.side_by_side(figures.read_paired_scores(path, protocol, features))
    scores = content["scores"][f"{protocol} {features}"]
    for column, pairs_axis, axis in zip((0, 2), figure.axes[::2], figure.axes[1::2], strict=True):
        published = np.array(scores["published"])[:, column]
        ours = np.array(scores["ours"])[:, column]
        for line, values in zip(pairs_axis.lines, (published, ours), strict=True):
            np.testing.assert_allclose(line.get_ydata(), values)
        ends = [segment[:, 1] for segment in pairs_axis.collections[0].get_segments()]
        np.testing.assert_allclose(ends, np.stack([published, ours], axis=1))
        assert f"{published.mean():.1f} ± {np.std(published, ddof=1):.1f}" in pairs_axis.get_title()

        np.testing.assert_allclose(axis.lines[1].get_ydata(), ours - published)
        interval = scipy.stats.ttest_rel(ours, published).confidence_interval(0.95)
        ((mean_mark, _, (bar,)),) = axis.containers
        ((low, high),) = [segment[:, 1] for segment in bar.get_segments()]
        assert mean_mark.get_ydata() == pytest.approx(np.mean(ours) - np.mean(published))
        assert (low, high) == pytest.approx((interval.low, interval.high))
        words = f"[{interval.low:+.1f}, {interval.high:+.1f}]"
        assert words.replace("-", "\N{MINUS SIGN}") in axis.get_title()
    words = words_of(figure)
    assert f"synthetic people, {N_SEEDS} seeds ({protocol}, {features} features)" in words


def test_side_by_side_calls_people_synthetic_only_if_the_file_does(tmp_path):
    path, content = paired_scores_file(tmp_path)
    content["what"] = "Two codes."
    (tmp_path / "pairs.json").write_text(json.dumps(content))
    assert "synthetic" not in words_of(figures.side_by_side(figures.read_paired_scores(path)))


@pytest.mark.parametrize(
    ("names", "value"),
    [
        (("what",), None),
        (("measures",), {}),
        (("measures",), ["rank1", ["mAP"], "rank5"]),
        (("seeds",), [1]),
        (("seeds",), list(range(N_SEEDS + 1))),
        (("scores",), []),
        (("scores", "all-search single-shot fc"), [1.0]),
        (("scores", "all-search single-shot fc", "ours"), [[1.0, 2.0, 3.0]]),
        (("scores", "all-search single-shot fc", "ours", 3), [1.0, 2.0]),
        (("scores", "all-search single-shot fc", "ours", 3), 70.0),
        (("scores", "all-search single-shot fc", "published", 3, 0), "70"),
        (("scores", "all-search single-shot fc", "published", 3, 0), float("nan")),
        (("scores", "all-search single-shot fc", "published", 3, 0), 10**400),
    ],
)
def test_paired_scores_of_another_shape_are_an_error(tmp_path, names, value):
    path, content = paired_scores_file(tmp_path)
    parent = content
    for name in names[:-1]:
        parent = parent[name]
    parent[names[-1]] = value
    (tmp_path / "pairs.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"pairs\.json is not like docs/side_by_side\.json"):
        figures.read_paired_scores(path)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 10**5])
def test_what_is_no_file_of_paired_scores_is_an_error(error_of, tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    line = error_of("-m tools.visualize", "side-by-side", tmp_path / "x.json")
    assert "x.json is not like docs/side_by_side.json" in line


def test_missing_paired_scores_are_an_error_that_names_those_there_are(error_of, tmp_path):
    path, _ = paired_scores_file(tmp_path)
    line = error_of("-m tools.visualize", "side-by-side", path, "--features", "pool5")
    assert "'all-search single-shot pool5'" in line
    assert "of all-search single-shot fc, all-search multi-shot pool5" in line
    missing = tmp_path / "missing.json"
    assert "missing.json not found" in error_of("-m tools.visualize", "side-by-side", missing)


# ---- files and fonts ----------------------------------------------------------------------------


def figure_of_label(label: str) -> Figure:
    """Curves whose legend has this label; a title has two lines."""
    epochs = [{"epoch": i, "CE": 2.0, "fc_trial_own_center_distance": 1.0} for i in range(3)]
    return figures.curves({label: epochs})


def written_by(save, figure: Figure, *arguments) -> bytes:
    """What ``save`` writes of a figure: `figures.save_figure`, or matplotlib's own method."""
    file = io.BytesIO()
    save(figure, file, *arguments)
    return file.getvalue()


@pytest.fixture
def fonts(monkeypatch):
    """Stands for the list of installed fonts, which holds DejaVu Sans and one that was removed."""
    path = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    (font,) = [entry for entry in font_manager.fontManager.ttflist if entry.fname == path]
    removed = dataclasses.replace(font, fname="/removed.ttf", name="Removed Font")
    installed = [font, removed]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", installed)
    return installed


def add_font(fonts: list, file: str, name: str) -> None:
    """Install a font of matplotlib under another name, and with a weight that no text asks for."""
    path = f"{matplotlib.get_data_path()}/fonts/ttf/{file}"
    fonts.append(dataclasses.replace(fonts[0], fname=path, name=name, weight=500))


def test_labels_of_latin_letters_need_no_other_font(monkeypatch):
    monkeypatch.setattr(figures, "families_with", None)  # would fail
    label = "Ångström ± ✓ λ=0.1"
    figure = figure_of_label(label)
    written = written_by(figures.save_figure, figure, "png")
    assert written == written_by(Figure.savefig, figure_of_label(label))


def test_characters_are_drawn_by_another_font_that_has_them(fonts, caplog):
    """The arrow is missing in DejaVu Sans and DejaVu Sans Mono."""
    label = "a ⤀"
    boxes = written_by(figures.save_figure, figure_of_label(label), "png")
    assert len(caplog.messages) == 1
    add_font(fonts, "DejaVuSansMono.ttf", "Font without it")
    add_font(fonts, "STIXGeneral.ttf", "Font with it")
    caplog.clear()
    figure = figure_of_label(label)
    written = written_by(figures.save_figure, figure, "png")
    assert caplog.messages == []

    expected = figure_of_label(label)
    expected.legends[0].get_texts()[0].set_fontfamily(["sans-serif", "Font with it"])
    assert written == written_by(Figure.savefig, expected)
    assert written != boxes
    assert figure.axes[0].title.get_fontfamily() == ["sans-serif"]


def test_a_font_that_has_most_characters_comes_first(fonts):
    add_font(fonts, "DejaVuSerif.ttf", "A Font with the arrow")
    add_font(fonts, "STIXGeneral.ttf", "Font with all")
    add_font(fonts, "LastResortHE-Regular.ttf", "Last Resort High-Efficiency")
    assert figures.families_with({"⤀"}) == ["A Font with the arrow"]
    assert figures.families_with({"⤀", "⌽"}) == ["Font with all"]
    assert figures.families_with({"中"}) == []


@pytest.mark.parametrize("image_format", ["png", "jpg", "pdf", "svg"])
def test_characters_that_no_font_has_are_named_in_one_line(fonts, caplog, image_format):
    # The last one stands for a byte that is not UTF-8 in the name of a file.
    figure = figure_of_label("中文 文字 हिन्दी \udcff")
    with warnings.catch_warnings(action="error"):
        assert written_by(figures.save_figure, figure, image_format)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("no installed font has these characters: द न ह ")
    assert caplog.messages[0].endswith(" 中 字 文")
    assert "\\udcff" in words_of(figure)


def test_many_missing_characters_make_a_short_line(fonts, caplog):
    many = "".join(chr(code) for code in range(0x4E00, 0x4F00))
    written_by(figures.save_figure, figure_of_label(many), "png")
    (line,) = caplog.messages
    assert len(line) < 110
    assert line.endswith(" ...")


# ---- command line -------------------------------------------------------------------------------


def test_every_command_writes_its_figure(sysu_run, output_of, tmp_path):
    results = tmp_path / "r.json"
    results.write_text(result())
    pairs, _ = paired_scores_file(tmp_path)
    features = tmp_path / "f.npz"
    tree = sysu_run["data"]
    net = sysu_run["models"] / f"{RUN}_last.t"
    flags = ["--data-path", tree, "--resume", net, "--log-path", tmp_path]
    output_of("test.py", *flags, "--save-features", features)
    commands = {
        "curves.png": [sysu_run["logs"] / RUN],
        "centers.png": [f"a={sysu_run['logs']}/{RUN}/*.jsonl"],
        "cmc.jpg": [f"a={results}"],
        "embedding.png": [features, f"again={features}", "--persons", 2, "--method", "pca"],
        "distances.png": [features],
        "ranked.png": [features, "--data-path", tree, "--rows", 1],
        "attention.png": [net, "--data_path", tree, "--persons", 1],
        "samples.png": ["--data_path", tree, "--persons", 3, "--per_camera", 2],
        "side-by-side.png": [pairs],
    }
    for name, flags in commands.items():
        out = tmp_path / "figures" / name
        assert str(out) in output_of("-m tools.visualize", out.stem, *flags, "--out", out)
        with Image.open(out) as image:
            assert min(image.size) > 300
            assert np.asarray(image.convert("L")).std() > 10


def test_an_unknown_format_is_an_error(error_of, sysu_run, tmp_path):
    run = sysu_run["logs"] / RUN
    message = error_of("-m tools.visualize", "curves", run, "--out", tmp_path / "curves.gif")
    assert "curves.gif" in message
    assert ".png" in message
