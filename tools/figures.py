"""Figures of data, of training and of what a network has learned.

A section for each: curves, centers, cmc, embedding, distances, ranked, attention, samples and side
by side. The function of that name returns a matplotlib figure, which `save_figure` writes.
"""

import functools
import json
import logging
import math
import os
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import matplotlib
import numpy as np
import torch
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import LogFormatter, MaxNLocator
from PIL import Image

import utils
from data_loader import read_image, to_input
from data_manager import Dataset, EvalTrial, Split
from eval_metrics import Distances, QueryScores, center_distances, rank_queries
from model import FEATURE_KINDS, EmbedNet, load_network, stripe_window
from tools.results_files import (
    Features,
    ProtocolScores,
    SavedResults,
    get_entry,
    name_of_tree,
)
from utils import InputError

# Okabe and Ito's colours, which colour-blind people can tell apart. Their yellow is left out: it is
# too light for lines.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
LINE_STYLES = ["-", "--", "-.", ":"]
MATCH_COLOUR = "#009E73"
MISMATCH_COLOUR = "#C62D1F"
HEAT_COLOURS = "viridis"
STYLE = matplotlib.rc_context(  # a decorator: a function draws in this style
    {
        "font.size": 13,
        "axes.titlesize": 13,
        "legend.fontsize": 12,
        "figure.titlesize": 15,
        "text.parse_math": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "axes.prop_cycle": matplotlib.cycler(color=COLOURS * 4)
        + matplotlib.cycler(linestyle=LINE_STYLES * 7),
    }
)
IMAGE_SIZE = (160, 72)  # height and width at which persons are shown
KINDS_OF_QUERIES = ("best", "random", "worst")
LONGEST_NAME = 12  # of a person, in characters
N_RANKED = 10  # gallery images that are shown for a query
# Fonts that have a box or a blank for every character.
PLACEHOLDER_FONTS = ("Last Resort High-Efficiency", "LastResort", ".LastResort", "Adobe Blank")
MAX_PIXELS = 2**16  # the height and width of an image must be below it, says matplotlib
N_BINS = 80  # of the histograms of distances
PROJECTIONS = {"tsne": "t-SNE", "pca": "PCA"}

log = logging.getLogger(__name__)


# ---- what the figures share ---------------------------------------------------------------------


def wrap(text: str, width: int = 90) -> str:
    return textwrap.fill(text, width, break_on_hyphens=False)


def new_figure(
    rows: int, columns: int, size: tuple[float, float], title: str, sharex: bool = False
) -> tuple[Figure, np.ndarray]:
    """Return a figure and its (rows, columns) axes, each of this width and height in inches.

    Raises:
        InputError: it would be too large.
    """
    width, height = size
    figure = Figure((max(columns * width, 6), rows * height + 0.8), layout="constrained")
    if max(figure.get_size_inches()) * figure.dpi >= MAX_PIXELS:
        raise InputError(f"{rows} x {columns} images are too many for a figure: show fewer")
    figure.suptitle(wrap(title, int(figure.get_figwidth() * 7)))
    return figure, figure.subplots(rows, columns, squeeze=False, sharex=sharex)


def add_legend(figure: Figure, axes: np.ndarray) -> None:
    """Put the labels of the first axes, which hold for all, below the figure. Hide empty axes."""
    for axis in axes.flat:
        axis.set_visible(len(axis.lines) > 0)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    labels = [wrap(label, 60) for label in labels]
    widest = max(len(label) for label in labels)
    columns_that_fit = int(figure.get_figwidth() * 9) // (widest + 8)
    columns = max(1, min(columns_that_fit, len(labels)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def short_names(images: Split, dataset: Dataset) -> dict[int, str]:
    """Return the name of each person, by person id; long ones are cut in the middle.

    A name stays whole if another person's would be cut to the same.
    """
    names = dataset.person_names(images)
    short = {pid: cut_name(name) for pid, name in names.items()}
    times_used = Counter(short.values())
    return {pid: short[pid] if times_used[short[pid]] == 1 else names[pid] for pid in names}


def cut_name(name: str) -> str:
    """Cut a name to `LONGEST_NAME` characters, and keep its end, where numbers are."""
    n_last = LONGEST_NAME // 2 - 1
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME - n_last - 1]}…{name[-n_last:]}"


def persons_in_both(images: Split) -> np.ndarray:
    """Return ids of the persons who were seen in both modalities, ascending."""
    return np.intersect1d(images.pids[images.thermal], images.pids[~images.thermal])


def choose_persons(pids: np.ndarray, n_persons: int, rng: np.random.Generator) -> np.ndarray:
    """Return up to ``n_persons`` of these person ids, ascending. InputError: there are none."""
    pids = np.unique(pids)
    if not len(pids):
        raise InputError("no person has the images to draw: both modalities are needed")
    n_chosen = min(n_persons, len(pids))
    return np.sort(rng.choice(pids, n_chosen, replace=False))


def draw_band(
    axis: Axes, label: str, x: Sequence[int], means: np.ndarray, deviations: np.ndarray, **style
) -> None:
    """Draw a line of means, and their deviations as a band."""
    (line,) = axis.plot(x, means, label=label, marker=".", **style)
    colour = line.get_color()
    axis.fill_between(
        x, means - deviations, means + deviations, color=colour, alpha=0.2, linewidth=0
    )


def label_epochs(axis: Axes) -> None:
    """Label the x axis with whole epochs."""
    axis.set_xlabel("epoch")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))


def show_image(
    axis: Axes, path: str | None, caption: str = "", colour: str = "black", width: float = 0
) -> None:
    """Draw an image in a frame of this line width; a grey area if ``path`` is None."""
    if path is None:
        axis.imshow(np.full((*IMAGE_SIZE, 3), 211, np.uint8))
    else:
        axis.imshow(read_image(path, IMAGE_SIZE))
    axis.set(xticks=[], yticks=[])
    axis.set_title(caption, fontsize=10.5)
    axis.spines[:].set(visible=width > 0, color=colour, linewidth=width)


# ---- writing a figure ---------------------------------------------------------------------------


def save_figure(figure: Figure, file: str | BinaryIO, image_format: str, **options) -> None:
    """Write a figure.

    Texts get further installed fonts for the characters that their own font lacks. A warning names
    the characters that no installed font has.

    Args:
        figure: its texts may be changed.
        file: a path, or a binary file.
        image_format: png, jpg, pdf or svg.
        options: further ones of matplotlib's `savefig`.
    """
    texts = figure.findobj(Text)
    for text in texts:
        text.set_text(writable(text.get_text()))
    missing = add_fonts(texts)
    if missing:
        characters = textwrap.shorten(" ".join(sorted(missing)), 60, placeholder=" ...")
        log.warning("no installed font has these characters: %s", characters)
    with warnings.catch_warnings():
        # matplotlib would warn of each of them.
        warnings.filterwarnings("ignore", "Glyph .* missing|Matplotlib currently does not support")
        figure.savefig(file, format=image_format, **options)


def writable(text: str) -> str:
    r"""Return a text that can be written as UTF-8, as matplotlib needs it.

    What cannot, like a byte of a file's name that is not UTF-8, becomes an escape like \udcff.
    """
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")


def add_fonts(texts: list[Text]) -> set[str]:
    """Add installed fonts to texts that need them; return the characters that no font has."""
    missing = set()
    for text in texts:
        missing |= missing_characters(text)
    if not missing:
        return missing
    families = families_with(missing)
    # matplotlib would warn of a family that lacks the weight of a text.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    still_missing = set()
    for text in texts:
        if missing_characters(text):
            text.set_fontfamily([*text.get_fontfamily(), *families])
            still_missing |= missing_characters(text)
    return still_missing


def missing_characters(text: Text) -> set[str]:
    """Return the characters of a text that none of its fonts has."""
    missing = {character for character in text.get_text() if character.isprintable()}
    font = text.get_fontproperties().copy()
    for family in text.get_fontfamily():
        font.set_family(family)
        missing -= characters_of_font(font_manager.findfont(font))
    return missing


@functools.lru_cache(maxsize=16)  # a figure has few fonts and many texts
def characters_of_font(path: str) -> frozenset[str]:
    """Return the characters of a font; none if it cannot be read."""
    try:
        charmap = FT2Font(path).get_charmap()
    except (OSError, RuntimeError):  # matplotlib also lists fonts that have been removed since
        return frozenset()
    return frozenset(chr(code) for code in charmap)


def families_with(characters: set[str]) -> list[str]:
    """Return installed font families that together have these characters, as far as any has."""
    paths = {font.name: font.fname for font in font_manager.fontManager.ttflist}
    coverage = {}
    for family, path in paths.items():
        if family not in PLACEHOLDER_FONTS:
            coverage[family] = characters & characters_of_font(path)
    # Fonts that have many of them come first: a word looks best in one font.
    most_first = sorted(coverage, key=lambda name: (-len(coverage[name]), name))
    families = []
    remaining = characters
    for family in most_first:
        if coverage[family] & remaining:
            families.append(family)
            remaining = remaining - coverage[family]
    return families


# ---- curves: training ---------------------------------------------------------------------------


@dataclass(frozen=True)
class MetricPanel:
    """What is drawn of one value of metrics.jsonl."""

    name: str
    title: str
    scale: float = 1


METRIC_PANELS = (  # besides those of the loss terms
    MetricPanel("accuracy", "accuracy in training, %", scale=100),
    MetricPanel("lr", "learning rate"),
    MetricPanel("fc_rank1", "rank-1 of fc, %", scale=100),
    MetricPanel("fc_mAP", "mAP of fc, %", scale=100),
    MetricPanel(
        "fc_trial_own_center_distance", "same person's centers, distance\n(fc, tested trial)"
    ),
    MetricPanel(
        "fc_trial_other_center_distance", "two persons' centers, distance\n(fc, tested trial)"
    ),
)


@STYLE
def curves(runs: dict[str, list[dict[str, float]]], data_name: str = "") -> Figure:
    """Draw loss terms, accuracy, learning rate, rank-1 and mAP of some runs over the epochs.

    Only what the runs recorded is drawn.

    Args:
        runs: by label, the values of each epoch, see `results_files.read_metrics`.
        data_name: the name of the data for the title; "" if it is not known.
    """
    panels = recorded_panels(runs)
    if not panels:
        raise InputError(f"{', '.join(runs)}: no values are recorded but the number of the epoch")
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    title = f"Training ({data_name})" if data_name else "Training"
    figure, axes = new_figure(rows, columns, (4.2, 3.2), title, sharex=True)
    for axis, panel in zip(axes.flat, panels, strict=False):  # the last axes may stay empty
        for label, epochs in runs.items():
            recorded = [epoch for epoch in epochs if panel.name in epoch]
            numbers = [epoch["epoch"] for epoch in recorded]
            values = [panel.scale * epoch[panel.name] for epoch in recorded]
            axis.plot(numbers, values, label=label, marker=".")
        axis.set(title=panel.title)
        label_epochs(axis)
        axis.tick_params(labelbottom=True)
        if panel.name == "lr":
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(LogFormatter())
            axis.yaxis.set_minor_formatter(LogFormatter())
        elif axis.dataLim.y0 >= 0:
            top = 1.05 * axis.dataLim.y1
            axis.set_ylim(0, top or 1)  # all values may be 0
    add_legend(figure, axes)
    return figure


def recorded_panels(runs: dict[str, list[dict[str, float]]]) -> list[MetricPanel]:
    """Return a panel for each recorded loss term, then those of `METRIC_PANELS`."""
    recorded = {}  # its keys are names, in the order in which they were recorded
    for epochs in runs.values():
        for epoch in epochs:
            recorded.update(epoch)
    panels = [MetricPanel(name, f"{name}, per stripe") for name in recorded if is_loss_term(name)]
    panels.extend(panel for panel in METRIC_PANELS if panel.name in recorded)
    return panels


def is_loss_term(name: str) -> bool:
    """Return whether this value of metrics.jsonl is a term of the loss: none of the others."""
    others = ["epoch", "loss", *(panel.name for panel in METRIC_PANELS)]
    is_of_features = name.partition("_")[0] in FEATURE_KINDS
    return name not in others and not is_of_features


# ---- centers: what the Hetero-Center loss is meant to move --------------------------------------


@STYLE
def centers(groups: dict[str, list[list[dict[str, float]]]]) -> Figure:
    """Draw HC in training, and how near a person's two centers are beside those of two persons.

    Lines are means over the runs of a group, bands their deviation.

    Args:
        groups: by label, some runs: the values of each epoch, see `results_files.read_metrics`.

    Raises:
        InputError: no run recorded these values.
    """
    names = [f"{label} ({len(runs)} runs)" for label, runs in groups.items()]
    title = f"Centers: mean ± deviation of {', '.join(names)}"
    figure, axes = new_figure(1, 2, (5, 4), title)
    hc_axis, ratio_axis = axes.flat
    for label, runs in groups.items():
        draw_epochs(hc_axis, label, values_by_epoch(runs, hc_of_epoch))
        draw_epochs(ratio_axis, label, values_by_epoch(runs, center_ratio))
    hc_axis.set(title="HC of training images, per stripe", ylim=(0, None))
    ratio_axis.set(title="own / other distance of test persons (fc)", ylim=(0, None))
    add_legend(figure, axes)
    return figure


def hc_of_epoch(metrics: dict[str, float]) -> float | None:
    """Return the Hetero-Center loss of an epoch, before its weight; None if it is not recorded."""
    return metrics.get("HC")


def center_ratio(metrics: dict[str, float]) -> float | None:
    """Return own / other center distance of an epoch; None if the epoch was not tested."""
    own_distance = metrics.get("fc_trial_own_center_distance")
    other_distance = metrics.get("fc_trial_other_center_distance")
    if own_distance is None or not other_distance:
        return None
    return own_distance / other_distance


def values_by_epoch(
    runs: list[list[dict[str, float]]], value_of: Callable[[dict[str, float]], float | None]
) -> dict[int, list[float]]:
    """Return {epoch: the value of each run}, of the epochs in which it is recorded."""
    values = {}
    for epochs in runs:
        for metrics in epochs:
            value = value_of(metrics)
            if value is not None:
                values.setdefault(metrics["epoch"], []).append(value)
    return values


def draw_epochs(axis: Axes, label: str, values: dict[int, list[float]]) -> None:
    """Draw the mean of the values of each epoch, and their deviation where there are several."""
    if not values:
        raise InputError(f"{label}: its runs recorded no HC, or no test of centers")
    epochs = sorted(values)
    means = np.array([np.mean(values[epoch]) for epoch in epochs])
    deviations = np.zeros(len(epochs))
    for i, epoch in enumerate(epochs):
        if len(values[epoch]) > 1:
            deviations[i] = np.std(values[epoch], ddof=1)
    draw_band(axis, label, epochs, means, deviations)
    label_epochs(axis)


# ---- cmc ----------------------------------------------------------------------------------------


@STYLE
def cmc(results: dict[str, SavedResults], feature: str = "fc") -> Figure:
    """Draw CMC curves of each protocol: means over the trials, and their deviation as a band.

    Args:
        results: by label, results that pass `results_files.check_comparable`.
        feature: the kind of features.
    """
    first = next(iter(results.values()))
    scores_of_labels = {"chance": first.rows["chance"]}
    for label, result in results.items():
        scores_of_labels[label] = result.rows[feature]
    columns = min(2, len(first.counts))
    rows = math.ceil(len(first.counts) / columns)
    title = f"CMC of {feature} features, mean ± deviation over the trials ({first.data_name})"
    figure, axes = new_figure(rows, columns, (6, 4.2), title)
    for axis, protocol in zip(axes.flat, first.counts, strict=False):  # one axis may stay empty
        for label, scores in scores_of_labels.items():
            draw_cmc(axis, label, scores[protocol])
        counts = first.counts[protocol]
        n_ranked = counts.queries - counts.without_match
        axis.set(
            title=f"{protocol}: {n_ranked} queries, {counts.gallery_images} gallery images",
            xlabel="rank",
            ylabel="queries matched, %",
            xticks=[1, 5, 10, 15, 20],
            ylim=(0, 102),
        )
        rank1 = [f"{line.get_ydata()[0]:.1f}%" for line in axis.lines]
        axis.legend(axis.lines, rank1, title="rank-1", loc="lower right")
    add_legend(figure, axes)
    return figure


def draw_cmc(axis: Axes, label: str, scores: ProtocolScores) -> None:
    """Draw the mean CMC of the trials as a line, and its deviation as a band."""
    percent = 100 * scores.cmc  # (trials, ranks)
    mean = percent.mean(axis=0)
    std = percent.std(axis=0)
    ranks = np.arange(1, len(mean) + 1)
    style = {}  # the next one of matplotlib's cycle
    if label == "chance":
        style = {"color": "grey", "linestyle": ":"}
    draw_band(axis, label, ranks, mean, std, **style)


# ---- embedding ----------------------------------------------------------------------------------


@STYLE
def embedding(
    panels: dict[str, Features], persons: int = 7, method: str = "tsne", seed: int = 0
) -> Figure:
    """Draw features of some persons in the plane, coloured by person, marked by modality.

    A line joins the two centers of a person. All panels show the same persons. Each panel has a
    projection of its own, whose scale and axes mean nothing.

    Args:
        panels: by label, features of test images.
        persons: how many to show.
        method: a key of `PROJECTIONS`.
        seed: of the choice of persons and of the projection.

    Raises:
        InputError: there is no person with images of both modalities in all panels.
    """
    first = next(iter(panels.values()))
    title = f"{PROJECTIONS[method]} of {first.kind} features, some test persons ({first.data_name})"
    if len(panels) > 1:
        title += "; each plane has a scale of its own"
    figure, axes = new_figure(1, len(panels), (6, 5.6), title)
    chosen = choose_persons(common_persons(panels), persons, np.random.default_rng(seed))
    names = short_names(first.images, first.dataset)
    for axis, (label, features) in zip(axes.flat, panels.items(), strict=True):
        indices = np.flatnonzero(np.isin(features.images.pids, chosen))
        images = features.images.take(indices)
        points = project(features.values[indices], method, seed)
        for i, pid in enumerate(chosen):
            is_of_person = images.pids == pid
            visible = points[is_of_person & ~images.thermal]
            thermal = points[is_of_person & images.thermal]
            draw_person(axis, names[pid], COLOURS[i % len(COLOURS)], visible, thermal)
        axis.set_title(f"{wrap(label, 60)}\n{describe_centers(features)}", fontsize=12)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(True)
    add_embedding_legend(figure, columns=3 if len(panels) > 1 else 2)
    return figure


def common_persons(panels: dict[str, Features]) -> np.ndarray:
    """Return ids of the persons who have images of both modalities in all panels."""
    persons_of_panels = [set(persons_in_both(panel.images)) for panel in panels.values()]
    return np.array(sorted(set.intersection(*persons_of_panels)))


def project(features: np.ndarray, method: str, seed: int) -> np.ndarray:
    """Project (n, dim) features to (n, 2) points, by PCA or t-SNE.

    PCA stands in for t-SNE where there are few points.

    Raises:
        InputError: the features have a single dimension.
    """
    if features.shape[1] < 2:
        raise InputError("features of a single dimension cannot be drawn in the plane")
    from sklearn.decomposition import PCA  # slow to import
    from sklearn.manifold import TSNE

    if method == "tsne" and len(features) > 10:
        perplexity = min(30, (len(features) - 1) / 3)
        tsne = TSNE(perplexity=perplexity, init="pca", random_state=seed)
        return tsne.fit_transform(features)
    return PCA(2, random_state=seed).fit_transform(features)


def draw_person(
    axis: Axes, name: str, colour: str, visible: np.ndarray, thermal: np.ndarray
) -> None:
    """Draw a person's (n, 2) visible and (m, 2) infrared points, the two centers, and a line."""
    axis.scatter(visible[:, 0], visible[:, 1], s=26, color=colour, alpha=0.7, linewidth=0)
    axis.scatter(
        thermal[:, 0],
        thermal[:, 1],
        s=26,
        marker="^",
        facecolor="none",
        edgecolor=colour,
        alpha=0.9,
    )
    visible_x, visible_y = visible.mean(axis=0)
    thermal_x, thermal_y = thermal.mean(axis=0)
    axis.plot(
        [visible_x, thermal_x],
        [visible_y, thermal_y],
        color="black",
        linestyle="-",
        linewidth=2,
        zorder=3,
    )
    axis.scatter(visible_x, visible_y, s=130, color=colour, edgecolor="black", zorder=4)
    axis.scatter(
        thermal_x,
        thermal_y,
        s=130,
        marker="^",
        facecolor="white",
        edgecolor=colour,
        linewidth=2.5,
        zorder=4,
    )
    axis.annotate(
        name,
        (visible_x, visible_y),
        (7, 7),
        textcoords="offset points",
        fontweight="bold",
        zorder=5,
    )


def describe_centers(features: Features) -> str:
    """Return how far visible centers are from infrared ones: of one person, and of two."""
    n_persons = len(persons_in_both(features.images))
    means = center_distances(features.values, features.images)
    if not means:
        return "centers of a single person: nothing to compare"
    return (
        f"centers of all {n_persons} persons: own distance {means['own']:.2f},\n"
        f"other distance {means['other']:.2f}, own / other {means['own'] / means['other']:.2f}"
    )


def add_embedding_legend(figure: Figure, columns: int) -> None:
    style = {"linestyle": "none", "color": "grey", "markersize": 8}
    handles = [
        Line2D([], [], marker="o", label="visible image", **style),
        Line2D([], [], marker="^", label="infrared image", markerfacecolor="none", **style),
        Line2D([], [], color="black", label="joins a person's two centers"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


# ---- distances ----------------------------------------------------------------------------------


@STYLE
def distances(panels: dict[str, Features]) -> Figure:
    """Draw histograms of cosine distances between visible and infrared images.

    One histogram is of pairs of the same person, one of pairs of two persons. Their separation is
    d': the gap between the two means, in units of the mean deviation.

    Args:
        panels: by label, features of test images.

    Raises:
        InputError: there are no pairs of the same person, or none of two persons.
    """
    first = next(iter(panels.values()))
    title = (
        f"Distances between visible and infrared test images, {first.kind} features "
        f"({first.data_name})"
    )
    figure, axes = new_figure(1, len(panels), (6, 4.4), title, sharex=True)
    for axis, (label, features) in zip(axes.flat, panels.items(), strict=True):
        same, other = pair_distances(features)
        low = min(same.min(), other.min())
        high = max(same.max(), other.max(), low + 1e-3)
        draw_histogram(axis, "two persons", other, (low, high), COLOURS[0], hatch="")
        draw_histogram(axis, "one person", same, (low, high), COLOURS[1], hatch="///")
        axis.set(
            title=f"{wrap(label, 50)}\nseparation d' = {separation(same, other):.2f}",
            ylabel="density",
        )
        axis.set_xlabel(f"1 - cosine\n{wrap(features.caption, 75)}", fontsize=8)
        axis.legend(title="images of")
    return figure


def pair_distances(features: Features) -> tuple[np.ndarray, np.ndarray]:
    """Return 1 - cosine of all pairs of an infrared and a visible image.

    Returns:
        (n,) distances of pairs of the same person, (m,) distances of pairs of two persons.

    Raises:
        InputError: there are no pairs of the same person, or none of two persons.
    """
    pids = features.images.pids
    thermal = features.images.thermal
    is_same_person = pids[thermal][:, None] == pids[~thermal]
    if is_same_person.all() or not is_same_person.any():
        raise InputError("distances need images of several persons, in both modalities")
    values = 1 + Distances(features.values[thermal], features.values[~thermal])[:]
    return values[is_same_person], values[~is_same_person]


def separation(same: np.ndarray, other: np.ndarray) -> float:
    """Return d', the gap between the means of two samples in units of their mean deviation."""
    deviation = np.sqrt((same.var() + other.var()) / 2)
    return (other.mean() - same.mean()) / max(deviation, 1e-9)


def draw_histogram(
    axis: Axes,
    label: str,
    values: np.ndarray,
    limits: tuple[float, float],
    colour: str,
    hatch: str,
) -> None:
    """Draw the density of (n,) values between two limits, as an area and its outline."""
    density, edges = np.histogram(values, N_BINS, limits, density=True)
    axis.stairs(density, edges, fill=True, color=colour, alpha=0.45, hatch=hatch, label=label)
    axis.stairs(density, edges, color=colour, linewidth=1.5)


# ---- ranked lists -------------------------------------------------------------------------------


@STYLE
def ranked(
    features: Features,
    trial: EvalTrial,
    root: str,
    rows: int = 2,
    seed: int = 0,
    kinds: tuple[str, ...] = KINDS_OF_QUERIES,
) -> Figure:
    """Draw queries and their ten nearest gallery images: the best, some at random, the worst.

    The best and the worst have the highest and the lowest average precision, one query per person.

    Args:
        features: of all test images.
        trial: which of them are queries, and which are the gallery.
        root: folder of the dataset.
        rows: how many queries of each kind to show.
        seed: of the random queries.
        kinds: which of `KINDS_OF_QUERIES`.

    Raises:
        InputError: no query has a match in the gallery.
    """
    ranking = rank_trial(features, trial)
    queries = choose_queries(ranking, rows, seed, kinds)
    title = f"{trial.protocol}, trial {trial.number} ({name_of_tree(features.dataset, root)})"
    figure, axes = new_figure(len(queries), 1 + N_RANKED, (1.15, 2.5), title)
    figure.supxlabel(wrap(features.caption), fontsize=9)
    for row, (kind, q) in zip(axes, queries, strict=True):
        draw_query(row[0], kind, ranking, q, root)
        draw_nearest(row[1:], ranking, q, root)
    return figure


@dataclass(frozen=True)
class Ranking:
    """The Q queries of a trial that have a match, compared with its G gallery images."""

    query: Split
    gallery: Split
    names: dict[int, str]  # of persons, by person id
    distmat: np.ndarray  # (Q, G)
    junk_mask: np.ndarray  # (Q, G) bool, gallery images that a query ignores
    scores: QueryScores  # ``ahead`` counts images


def rank_trial(features: Features, trial: EvalTrial) -> Ranking:
    """Rank one trial. InputError: no query has a match in the gallery."""
    query = features.images.take(trial.query)
    gallery = features.images.take(trial.gallery)
    junk_mask = features.dataset.junk_mask(query.pids, query.camids, gallery.pids, gallery.camids)
    is_match = (query.pids[:, None] == gallery.pids) & ~junk_mask
    with_match = np.flatnonzero(is_match.any(axis=1))
    if not len(with_match):
        raise InputError("no query has a match in the gallery")
    query = query.take(with_match)
    junk_mask = junk_mask[with_match]
    query_values = features.values[trial.query[with_match]]
    distmat = Distances(query_values, features.values[trial.gallery])[:]
    scores = rank_queries(distmat, query.pids, gallery.pids, junk_mask, cmc_by_identity=False)
    names = short_names(features.images, features.dataset)
    return Ranking(query, gallery, names, distmat, junk_mask, scores)


def choose_queries(
    ranking: Ranking, rows: int, seed: int, kinds: tuple[str, ...]
) -> list[tuple[str, int]]:
    """Return (kind, index of a query), up to ``rows`` of each of the ``kinds``."""
    best_first = np.argsort(-ranking.scores.average_precision, kind="stable")
    best = first_of_each_person(best_first, ranking.query.pids)
    worst = first_of_each_person(best_first[::-1], ranking.query.pids)
    shuffled = np.random.default_rng(seed).permutation(len(ranking.query))
    queries_of_kinds = {"best": best, "random": shuffled, "worst": worst}
    chosen = []
    for kind in kinds:
        chosen.extend((kind, int(q)) for q in queries_of_kinds[kind][:rows])
    return chosen


def first_of_each_person(queries: np.ndarray, pids: np.ndarray) -> np.ndarray:
    """Return those of some queries that are the first of their person, in the same order."""
    _, first = np.unique(pids[queries], return_index=True)
    return queries[np.sort(first)]


def draw_query(axis: Axes, kind: str, ranking: Ranking, q: int, root: str) -> None:
    """Draw the image of a query, with how well it was ranked and how much junk it ignores."""
    caption = (
        f"{kind}\n"
        f"AP {ranking.scores.average_precision[q]:.0%}\n"
        f"1st match {ranking.scores.ahead[q] + 1}\n"
        f"id {ranking.names[ranking.query.pids[q]]}\n"
        f"cam {ranking.query.camids[q]}"
    )
    path = os.path.join(root, ranking.query.paths[q])
    show_image(axis, path, caption, width=1)
    n_junk = ranking.junk_mask[q].sum()
    if n_junk:
        axis.set_xlabel(f"gallery images\nnot counted: {n_junk}", fontsize=10)


def draw_nearest(axes: np.ndarray, ranking: Ranking, q: int, root: str) -> None:
    """Draw the gallery images nearest to a query, without its junk, one on each of the axes."""
    gallery = ranking.gallery
    nearest = np.argsort(ranking.distmat[q], kind="stable")
    nearest = nearest[~ranking.junk_mask[q, nearest]]
    # There may be fewer gallery images than axes, or more.
    for rank, (axis, g) in enumerate(zip(axes, nearest, strict=False), start=1):
        if gallery.pids[g] == ranking.query.pids[q]:
            mark = "✓"
            colour = MATCH_COLOUR
        else:
            mark = "✗"
            colour = MISMATCH_COLOUR
        name = ranking.names[gallery.pids[g]]
        caption = f"{rank} {mark}\nid {name}\ncam {gallery.camids[g]}"
        show_image(axis, os.path.join(root, gallery.paths[g]), caption, colour, width=4)
    for axis in axes[len(nearest) :]:
        axis.axis("off")


# ---- attention ----------------------------------------------------------------------------------


@STYLE
def attention(
    checkpoint_path: str,
    dataset: Dataset,
    root: str,
    trial: int | None = None,
    persons: int = 4,
    seed: int = 0,
) -> Figure:
    """Draw where the stripes look: test images of both modalities, and heat maps over them.

    The map shows how much each location contributes to its stripe's feature, 0 least, 1 most.

    Args:
        checkpoint_path: the network.
        dataset, root: the dataset and its folder.
        trial: of RegDB; None takes the one that the network was trained on.
        persons: how many to show.
        seed: of the choice of persons and images.
    """
    checkpoint = utils.load_checkpoint(checkpoint_path)
    config = checkpoint["config"]
    net = load_network(checkpoint, checkpoint_path).eval()
    size = (config.get("img_h", 288), config.get("img_w", 144))  # published files do not tell it
    images = dataset.test(root, trial or config.get("trial") or dataset.trials[0])
    rng = np.random.default_rng(seed)
    chosen = choose_persons(persons_in_both(images), persons, rng)
    names = short_names(images, dataset)
    title = f"Where the {net.num_parts} stripes look ({name_of_tree(dataset, root)})"
    figure, axes = new_figure(2, 2 * len(chosen), (1.5, 3.0), title)
    figure.supxlabel(wrap(f"checkpoint: {os.path.basename(checkpoint_path)}"), fontsize=9)
    for row, modality in zip(axes, ("visible", "thermal"), strict=True):
        is_of_modality = images.thermal == (modality == "thermal")
        for plain, overlay, pid in zip(row[::2], row[1::2], chosen, strict=True):
            image = rng.choice(np.flatnonzero(is_of_modality & (images.pids == pid)))
            pixels = read_image(images.paths[image], size)
            plain.imshow(pixels)
            plain.set_title(f"id {names[pid]}\ncam {images.camids[image]}", fontsize=11)
            plain.set(xticks=[], yticks=[])
            draw_contributions(overlay, pixels, net, modality)
        row[0].set_ylabel("visible" if modality == "visible" else "infrared")
    add_colour_bar(figure, axes)
    return figure


def draw_contributions(axis: Axes, pixels: np.ndarray, net: EmbedNet, modality: str) -> None:
    """Draw a grey image, and over it what each location contributes to its stripe's feature."""
    height, width = pixels.shape[:2]
    contributions, tops = stripe_contributions(net, modality, pixels)
    heat = Image.fromarray(contributions.astype(np.float32))
    heat = heat.resize((width, len(contributions)), Image.Resampling.BILINEAR)
    # Smooth from left to right only, so that stripes do not run into each other.
    heat = heat.resize((width, height), Image.Resampling.NEAREST)
    axis.imshow(pixels.mean(axis=2), cmap="gray")
    axis.imshow(np.asarray(heat), cmap=HEAT_COLOURS, alpha=0.55, vmin=0, vmax=1)
    for top in tops[1:]:
        axis.axhline(top * height - 0.5, color="white", linestyle="-", linewidth=1.2)
    axis.set(xticks=[], yticks=[])


@torch.no_grad()
def stripe_contributions(
    net: EmbedNet, modality: str, pixels: np.ndarray
) -> tuple[np.ndarray, list[float]]:
    """Return how much each location contributes to its stripe's feature, 0 least, 1 most.

    A stripe's feature is the mean over its locations. A location contributes its projection on that
    mean.

    Args:
        net: in evaluation mode.
        modality: "visible" or "thermal".
        pixels: (height, width, 3) uint8 image.

    Returns:
        (H, W) values in [0, 1], where stripes overlap the larger ones; the tops of the stripes as
        fractions of the height.
    """
    batch = to_input(torch.from_numpy(pixels[None].copy()), pixels.shape[:2])
    if modality == "visible":
        (maps,) = net.feature_maps(visible=batch)  # (C, H, W)
    else:
        (maps,) = net.feature_maps(thermal=batch)
    height = maps.shape[1]
    band, stride = stripe_window(height, net.num_parts)
    contributions = torch.zeros(maps.shape[1:])
    tops = []
    for start in range(0, net.num_parts * stride, stride):
        rows = slice(start, start + band)
        stripe = maps[:, rows]
        projections = torch.einsum("chw,c->hw", stripe, stripe.mean(dim=(1, 2)))
        projections -= projections.min()
        projections /= projections.max().clamp(min=1e-12)
        contributions[rows] = torch.maximum(contributions[rows], projections)
        tops.append(start / height)
    return contributions.numpy(), tops


def add_colour_bar(figure: Figure, axes: np.ndarray) -> None:
    """Explain the colours of the heat maps."""
    colours = ScalarMappable(Normalize(0, 1), HEAT_COLOURS)
    label = "how much a place adds to its stripe's feature"
    bar = figure.colorbar(colours, ax=axes, ticks=[0, 1], label=label)
    bar.ax.set_yticklabels(["least of\nthe stripe", "most of\nthe stripe"])


# ---- samples ------------------------------------------------------------------------------------


@STYLE
def samples(
    dataset: Dataset, root: str, persons: int = 8, per_camera: int = 1, seed: int = 0
) -> Figure:
    """Draw test persons x cameras, ``per_camera`` images of each; grey where there is none."""
    images = dataset.test(root, dataset.trials[0])
    rng = np.random.default_rng(seed)
    chosen = choose_persons(images.pids, persons, rng)
    names = short_names(images, dataset)
    # A camera number may occur in both modalities.
    cameras = sorted(set(zip(images.camids.tolist(), images.thermal.tolist(), strict=True)))
    title = f"Test persons ({name_of_tree(dataset, root)})"
    figure, axes = new_figure(len(chosen), len(cameras) * per_camera, (0.95, 1.9), title)
    for row, pid in zip(axes, chosen, strict=True):
        for k, (camid, thermal) in enumerate(cameras):
            is_in_camera = (images.camids == camid) & (images.thermal == thermal)
            indices = rng.permutation(np.flatnonzero(is_in_camera & (images.pids == pid)))
            for j in range(per_camera):
                path = images.paths[indices[j]] if j < len(indices) else None
                show_image(row[k * per_camera + j], path)
        row[0].set_ylabel(names[pid], rotation=0, ha="right", va="center")
    for axis, (camid, thermal) in zip(axes[0, ::per_camera], cameras, strict=True):
        modality = "infrared" if thermal else "visible"
        axis.set_title(f"cam{camid}\n{modality}", fontsize=10.5, loc="left")
    return figure


# ---- side by side -------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairedScores:
    """Scores of two codes, each trained once with every seed, in percent."""

    protocol: str
    features: str  # their kind
    people: str  # "synthetic people", or "people" where the file does not say so
    published: dict[str, np.ndarray]  # by the names of `PAIRED_MEASURES`, (n_seeds,)
    ours: dict[str, np.ndarray]  # in the same order of seeds

    @property
    def n_seeds(self) -> int:
        return len(self.published["rank1"])


PAIRED_MEASURES = {"rank1": "rank-1", "mAP": "mAP"}  # name in the file: name in the figure


def not_paired_scores(path: str, reason: str) -> InputError:
    """Return the error to raise for a file that is something else, or damaged."""
    return InputError(f"{path} is not like docs/side_by_side.json, paired scores: {reason}")


def read_paired_scores(
    path: str, protocol: str = "all-search single-shot", features: str = "fc"
) -> PairedScores:
    """Read the scores of two codes from a file like docs/side_by_side.json.

    Raises:
        InputError: there is no such file, it is another file, or it lacks these scores.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path} not found: give a file of paired scores")
    with open(path, encoding="utf-8") as file:
        try:
            content = json.load(file)
        except (ValueError, RecursionError) as error:
            raise not_paired_scores(path, str(error)) from error
    get = functools.partial(get_entry, path=path, error_of=not_paired_scores)
    description = get(content, "what", str)
    measures = get(content, "measures", list)
    seeds = get(content, "seeds", list)
    all_scores = get(content, "scores", dict)
    if len(seeds) < 2 or not set(PAIRED_MEASURES).issubset(map(str, measures)):
        raise not_paired_scores(path, "two seeds, rank1 and mAP are needed")
    key = f"{protocol} {features}"
    if key not in all_scores:
        keys = textwrap.shorten(", ".join(all_scores), 300, placeholder=" ...")
        raise InputError(f"{path} has no {key!r}: choose --protocol and --features of {keys}")
    shape = (len(seeds), len(measures))
    scores = {}
    for code in ("published", "ours"):
        table = parse_percents(get(all_scores[key], code, list), shape, path)
        scores[code] = {name: table[:, measures.index(name)] for name in PAIRED_MEASURES}
    people = "synthetic people" if "synthetic" in description else "people"
    return PairedScores(protocol, features, people, **scores)


def parse_percents(rows: list, shape: tuple[int, int], path: str) -> np.ndarray:
    """Parse a table of this shape. InputError: it has another, or a value is no percentage."""
    n_rows, n_columns = shape
    is_table = all(isinstance(row, list) and len(row) == n_columns for row in rows)
    if not is_table or len(rows) != n_rows:
        raise not_paired_scores(path, f"the scores are not {n_rows} rows of {n_columns} numbers")
    for row in rows:
        for value in row:
            if not isinstance(value, int | float) or not 0 <= value <= 100:
                raise not_paired_scores(path, "a score is not a number from 0 to 100")
    return np.array(rows, float)


@STYLE
def side_by_side(pairs: PairedScores) -> Figure:
    """Draw rank-1 and mAP of two codes, seed by seed, and their mean paired difference."""
    title = (
        f"The two codes on {pairs.people}, {pairs.n_seeds} seeds "
        f"({pairs.protocol}, {pairs.features} features)"
    )
    figure, axes = new_figure(1, 2 * len(PAIRED_MEASURES), (2.9, 4.6), title)
    axes[0, 0].get_gridspec().set_width_ratios([5, 3] * len(PAIRED_MEASURES))
    for i, (measure, name) in enumerate(PAIRED_MEASURES.items()):
        published = pairs.published[measure]
        ours = pairs.ours[measure]
        draw_pairs(axes[0, 2 * i], name, published, ours)
        draw_difference(axes[0, 2 * i + 1], ours - published)
    caption = (
        "A line joins the two codes of one seed. Differences are this code minus the original, in "
        "points; bars are the 95% t interval of their mean."
    )
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=2,
        frameon=False,
        title=wrap(caption, 100),
    )
    return figure


def draw_pairs(axis: Axes, name: str, published: np.ndarray, ours: np.ndarray) -> None:
    """Draw two dots for each seed, and the line that joins them."""
    positions = np.arange(1, len(published) + 1)
    axis.vlines(positions, published, ours, color="grey", linewidth=0.8, zorder=1)
    codes = (("original code", published, "o"), ("this code", ours, "D"))
    means = []
    for colour, (label, scores, marker) in zip(COLOURS, codes, strict=False):
        axis.plot(positions, scores, marker, color=colour, label=label, markersize=5)
        means.append(f"{scores.mean():.1f} ± {scores.std(ddof=1):.1f}")
    axis.set_title(f"{name}, %\n{means[0]} and {means[1]}")
    axis.set_xlabel(f"each of {len(positions)} seeds")
    axis.set_xticks([])


def draw_difference(axis: Axes, differences: np.ndarray) -> None:
    """Draw the difference of each seed, and the mean with its interval."""
    mean, half_width = mean_and_interval(differences)
    axis.axhline(0, color="black", linestyle="-", linewidth=0.8)
    axis.plot(np.zeros(len(differences)), differences, ".", color="grey", alpha=0.6)
    axis.errorbar(1, mean, half_width, color=COLOURS[2], marker="s", capsize=6, linewidth=2)
    interval = f"[{mean - half_width:+.1f}, {mean + half_width:+.1f}]"
    title = f"difference\n{mean:+.1f} {interval}"
    axis.set_title(title.replace("-", "\N{MINUS SIGN}"))
    axis.set(xlim=(-0.6, 1.6), xticks=[0, 1])
    axis.set_xticklabels(["seeds", "mean"])


def mean_and_interval(differences: np.ndarray) -> tuple[float, float]:
    """Return the mean of (n,) differences, and half the width of its 95% t interval."""
    from scipy import stats  # slow to import

    quantile = stats.t.ppf(0.975, len(differences) - 1)
    return float(differences.mean()), float(quantile * stats.sem(differences))
