"""Pictures of data, of runs and of what a network has learned.

    python -m tools.visualize curves log/RUN …                       losses, rate, rank-1 and mAP over the epochs
    python -m tools.visualize cmc log/test_….json …                  CMC curves, mean and spread over the trials
    python -m tools.visualize embedding FEATURES.npz …               features of some persons, in the plane
    python -m tools.visualize distances FEATURES.npz …               distances between the modalities
    python -m tools.visualize ranked FEATURES.npz --data_path TREE   queries and their ten nearest gallery images
    python -m tools.visualize attention CHECKPOINT --data_path TREE  where the stripes look
    python -m tools.visualize samples TREE                           persons x cameras of a dataset

FEATURES.npz is what test.py --save_features writes. Where several files may be given, each may have a name in front:
"with HC=FILE".
"""

import argparse
import functools
import itertools
import json
import os
import random
import re
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

import data_manager
import utils
from data_loader import read_image, to_input
from data_manager import IMAGE_SUFFIXES, Search, Split
from eval_metrics import MEASURES, Counts, Distances, same_room
from model import EmbedNet, network_of, stripe_window
from tools.score import load_features

# Okabe and Ito's colours, which colour-blind people can tell apart; their yellow is too light for lines.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
HIT, MISS = "#009E73", "#C62D1F"
STYLE = {
    "font.size": 13, "axes.titlesize": 13, "legend.fontsize": 12, "figure.titlesize": 15, "savefig.dpi": 100,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS), "pdf.fonttype": 42, "text.parse_math": False,
}  # fmt: skip
DATASETS = {"sysu": "SYSU-MM01", "regdb": "RegDB"}
KINDS = {".png": "png", ".jpg": "jpeg", ".pdf": "pdf"}
IMAGE = (160, 72)  # height and width at which persons are shown
CELL = (72, 160)  # pixels, width x height; every image is fitted into one
MARGIN, HEADER, GAP = 44, 16, 3
SYSU_COLUMNS = {f"cam{c}": f"cam{c} {'IR' if c in (3, 6) else 'RGB'}" for c in range(1, 7)}
REGDB_COLUMNS = {"Visible": "visible", "Thermal": "thermal"}


class Features(NamedTuple):
    """One kind of features of all test images: (N, dim), and what is known of the network."""

    images: Split
    values: np.ndarray
    kind: str
    network: dict
    dataset: str


# ---- reading --------------------------------------------------------------------------------------------------------


def labelled(entries: list[str]) -> dict[str, str]:
    """``LABEL=FILE`` or ``FILE`` -> {label: file}; without a label, the file's name stands for it."""
    found = {}
    for entry in entries:
        label, _, path = (None, None, entry) if os.path.exists(entry) else entry.rpartition("=")
        found[label or re.sub(r"\.(json|jsonl|npz)$", "", os.path.basename(path.rstrip("/")))] = path
    if len(found) < len(entries):
        utils.fail("two files have one label: tell them apart with LABEL=FILE")
    return found


def read_metrics(path: str) -> list[dict]:
    """The lines of a run's metrics.jsonl; ``path`` is that file or its folder.

    Raises:
        OSError: it is missing, or is not such a file.
    """
    file = os.path.join(path, "metrics.jsonl") if os.path.isdir(path) else path
    if not os.path.isfile(file):
        raise FileNotFoundError(f"{file} not found: give the folder of a run, like log/<run>")
    try:
        with open(file, encoding="utf-8") as lines:
            metrics = [{name: float(value) for name, value in json.loads(line).items()} for line in lines]
        if metrics and all({"epoch", "lr", "CE", "HC"} <= {*line} for line in metrics):
            return metrics
    except (ValueError, AttributeError, TypeError, RecursionError, OverflowError):
        pass
    raise OSError(f"{file} holds no finished epoch, or is not the metrics.jsonl of a run")


def read_results(path: str) -> dict:
    """What test.py or tools.score found, of its JSON file.

    Returns:
        rows: {(protocol, features): {measure: mean over the trials}}, "chance" among the features.
        cmc: {(protocol, features): (trials, 20)}.
        counts: {protocol: Counts}.
        options, dataset: as test.py wrote them.
        checkpoint, save_features, data_path: where they are, "" if unknown.

    Raises:
        OSError: it is missing, or is not such a file.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} not found: give a JSON file that test.py wrote")
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        rows = {
            (row["protocol"], row["feature"]): {measure: float(row["mean"][measure]) for measure in MEASURES}
            for row in content["results"]
        }
        cmc = {
            (row["protocol"], row["feature"]): np.array([trial["cmc"] for trial in row["trials"]], dtype=float)
            for row in content["results"]
        }
        counts = {protocol: Counts(**found) for protocol, found in content["counts"].items()}
        features = {feature for _, feature in rows} | {"chance"}
        if not all(isinstance(value, (int, float)) for count in counts.values() for value in count):
            raise ValueError("a count is not a number")
        if not counts or {*itertools.product(counts, features)} != {*rows}:
            raise ValueError("rows are missing")
        if any(curves.ndim != 2 or curves.shape[1] != 20 or not len(curves) for curves in cmc.values()):
            raise ValueError("curves are missing")
        dataset = content["flags"]["dataset"]
        if dataset not in DATASETS:
            raise ValueError("there is no such dataset")
        options = [str(option) for option in content["options"]]
        network = next(iter(content.get("networks", [])), {})
        places = {"checkpoint": network.get("checkpoint")} | {
            flag: content["flags"].get(flag) for flag in ("save_features", "data_path")
        }
        places = {name: place if isinstance(place, str) else "" for name, place in places.items()}
        return {"rows": rows, "cmc": cmc, "counts": counts, "options": options, "dataset": dataset, **places}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        raise OSError(f"{path} is not a JSON file that test.py wrote: give one, or run test.py again") from None


def check_alike(results: dict[str, dict], feature: str) -> None:
    """End the program if results cannot be compared: other protocols, other images, no such features."""
    first_label, first = next(iter(results.items()))
    for label, found in results.items():
        features = dict.fromkeys(feature for _, feature in found["rows"] if feature != "chance")
        if feature not in features:
            utils.fail(f"{label} has no {feature} features, but {', '.join(features)}: choose with --features")
        if (found["dataset"], found["counts"]) != (first["dataset"], first["counts"]):
            utils.fail(f"{label} and {first_label} are of other protocols or other images: compare like with like")


def read_features(path: str, dataset: str, kind: str) -> Features:
    """Of a file of `tools.score`; ``kind`` "" takes fc, or the only one there is. OSError: it is not such a file."""
    images, arrays, network = load_features(path, dataset, kind or None)
    if not kind and len(arrays) > 1 and "fc" not in arrays:
        raise OSError(f"{path} holds {', '.join(arrays)}: choose with --features")
    kind = kind or ("fc" if "fc" in arrays else next(iter(arrays)))
    return Features(images, arrays[kind], kind, network, dataset)


def read_network(path: str) -> tuple[EmbedNet, dict]:
    """The network of a checkpoint, and its config."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} not found: give a checkpoint, like save_model/<run>_last.t")
    checkpoint = utils.load_checkpoint(path)
    return network_of(checkpoint["net"], path).eval(), checkpoint.get("config", {})


# ---- drawing --------------------------------------------------------------------------------------------------------


def styled(draw: Callable) -> Callable:
    """Draw with the fonts and colours of this project."""

    @functools.wraps(draw)
    def wrapper(*args, **kwargs):
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapper


def new_figure(rows: int, columns: int, size: tuple[float, float], title: str, **options) -> tuple[Figure, np.ndarray]:
    """A figure of ``rows`` x ``columns`` axes, each of this width and height in inches."""
    figure = Figure((max(columns * size[0], 6), rows * size[1] + 0.8), layout="constrained")
    figure.suptitle(textwrap.fill(title, int(figure.get_figwidth() * 7)))
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def shorten(text: str, length: int = 48) -> str:
    """Long names with their middle left out."""
    return text if len(text) <= length else f"{text[: length // 2]}…{text[-(length - length // 2 - 1) :]}"


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Of each name, if they are long, what tells it from the others."""
    names = [*dict.fromkeys(names)]
    if len(names) < 2 or max(map(len, names)) <= 40:
        return {name: shorten(name) for name in names}
    words = [name.split("_") for name in names]
    start, end, least = 0, 0, min(map(len, words)) - 1
    while start < least and len({own[start] for own in words}) == 1:
        start += 1
    while start + end < least and len({own[-1 - end] for own in words}) == 1:
        end += 1
    own = {
        name: "…" * (start > 0) + "_".join(parts[start : len(parts) - end]) + "…" * (end > 0)
        for name, parts in zip(names, words, strict=True)
    }
    short = {name: shorten(text) for name, text in own.items()}
    return short if len({*short.values()}) == len(names) else own


def checkpoints(panels: dict[str, Features]) -> dict[str, str]:
    """Which checkpoint each panel's features come from, as a caption."""
    found = {label: features.network.get("checkpoint") for label, features in panels.items()}
    found = {label: os.path.basename(name) if isinstance(name, str) else "" for label, name in found.items()}
    short = short_names(filter(None, found.values()))
    return {label: f"checkpoint: {short[name]}" if name else "no checkpoint named" for label, name in found.items()}


@styled
def curves(runs: dict[str, list[dict]], order: tuple[str, ...] = (), where: str = "") -> Figure:
    """Losses, learning rate, rank-1 and mAP of some runs over the epochs.

    ``order``: labels of another picture, whose lines for them look the same. ``where``: the dataset, if known.
    """
    names = short_names(runs)
    styles = dict(zip(dict.fromkeys([*order, *runs]), itertools.cycle(line_styles()), strict=False))
    panels = {"CE": "cross-entropy, per stripe", "HC": "Hetero-Center loss, per stripe", "lr": "learning rate",
              "fc_rank1": "rank-1 of fc, %", "fc_mAP": "mAP of fc, %"}  # fmt: skip
    figure, axes = new_figure(2, 3, (4.2, 3.2), f"Training {where}".strip(), sharex=True)
    for axis, (name, title) in zip(axes.flat, panels.items(), strict=False):
        for label, metrics in runs.items():
            points = [(line["epoch"], line[name]) for line in metrics if name in line]
            epochs, values = np.array(points).reshape(-1, 2).T
            scale = 100 if name.startswith("fc") else 1
            axis.plot(epochs, scale * values, label=names[label], **styles[label], markevery=max(1, len(points) // 15))
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
        axis.tick_params(labelbottom=True)
        if not np.isfinite(axis.dataLim.y1):
            axis.text(0.5, 0.5, "no epoch was tested", transform=axis.transAxes, ha="center", color="#595959")
        if name == "lr":
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("")
        else:
            axis.set_ylim(0, 1.05 * axis.dataLim.y1 if np.isfinite(axis.dataLim.y1) and axis.dataLim.y1 > 0 else 1)
    epochs = [line["epoch"] for metrics in runs.values() for line in metrics]
    axes.flat[0].set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)  # of all, which share it
    axes.flat[-1].axis("off")
    axes.flat[-1].legend(*axes.flat[0].get_legend_handles_labels(), loc="center", frameon=False)
    return figure


def line_styles() -> list[dict]:
    """Colour, dash and marker differ, so that no reader depends on one of them."""
    dashes, markers = ["-", "--", "-.", ":"], "os^DvPX"
    return [{"color": COLOURS[i % 7], "linestyle": dashes[i % 4], "marker": markers[i % 7], "markersize": 5}
            for i in range(28)]  # fmt: skip


@styled
def cmc(results: dict[str, dict], feature: str = "fc") -> Figure:
    """CMC curves of each protocol: means over the trials, and as a band their deviation.

    Args:
        results: label -> what `read_results` gives.
    """
    first = next(iter(results.values()))
    columns = min(2, len(first["counts"]))
    rows = -(-len(first["counts"]) // columns)
    title = f"{DATASETS[first['dataset']]}, {feature} features: CMC, mean ± deviation over the trials"
    figure, axes = new_figure(rows, columns, (6, 4.2), title)
    for axis in axes.flat[len(first["counts"]) :]:
        axis.axis("off")
    names, crowded = short_names(results), len(results) > 4 or max(map(len, results)) > 24
    for axis, protocol in zip(axes.flat, first["counts"], strict=False):
        curves = {"chance": first["cmc"][protocol, "chance"]}
        curves |= {label: found["cmc"][protocol, feature] for label, found in results.items()}
        styles = itertools.chain([{"color": "#777777", "linestyle": ":"}], itertools.cycle(line_styles()))
        for style, (label, trials) in zip(styles, curves.items(), strict=False):
            mean, std = 100 * trials.mean(axis=0), 100 * trials.std(axis=0)
            ranks = np.arange(1, len(mean) + 1)
            text = names.get(label, label) if crowded else f"{mean[0]:5.1f}%  {label}"
            axis.plot(ranks, mean, label=text, **style, markevery=[0, 4, 9, 19])
            axis.fill_between(ranks, mean - std, mean + std, color=style["color"], alpha=0.2, linewidth=0)
        count = first["counts"][protocol]
        matched = count.queries - count.without_match
        axis.set(title=f"{protocol}: {matched} queries, {count.gallery_images} gallery images",
                 xlabel="rank", ylabel="queries matched, %", xticks=[1, 5, 10, 15, 20], ylim=(0, 102))  # fmt: skip
        if not crowded:
            axis.legend(loc="lower right", title="rank-1")
    if crowded:
        several = columns if max(map(len, names.values())) <= 40 else 1
        figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=several)
    return figure


def cross_modal(features: Features) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the visible and of the thermal images; OSError: a modality is missing."""
    thermal = np.isin(features.images.camids, data_manager.THERMAL_CAMERAS[features.dataset])
    if thermal.all() or not thermal.any():
        raise OSError(f"there are only {'thermal' if thermal.all() else 'visible'} images: both modalities are needed")
    return np.flatnonzero(~thermal), np.flatnonzero(thermal)


def centers(features: Features) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of all persons with images in both modalities: ids (n,), visible and thermal centers (n, dim)."""
    sides = cross_modal(features)
    pids = np.intersect1d(*(features.images.pids[rows] for rows in sides))
    if not len(pids):
        raise OSError("no person has images in both modalities")
    means = [
        np.stack([features.values[rows[features.images.pids[rows] == pid]].mean(axis=0) for pid in pids])
        for rows in sides
    ]
    return pids, *means


@styled
def embedding(
    panels: dict[str, Features], persons: int = 7, method: str = "tsne", seed: int = 0, most: int = 40
) -> Figure:
    """Features of some persons in the plane, coloured by person, shaped by modality; a line joins a person's centers.

    The persons are the same in all panels; of each, ``most`` images in a modality at most. Each panel is projected by
    itself: its scale and orientation have no meaning.
    """
    dataset = next(iter(panels.values())).dataset
    method_name, kind = {"tsne": "t-SNE", "pca": "PCA"}[method], next(iter(panels.values())).kind
    title = f"{DATASETS[dataset]}, some test persons: {method_name} of {kind} features"
    figure, axes = new_figure(1, len(panels), (6, 5.6), title)
    rng, names, captions = np.random.default_rng(seed), short_names(panels), checkpoints(panels)
    shared = functools.reduce(np.intersect1d, (centers(features)[0] for features in panels.values()))
    if not len(shared):
        raise OSError("the files have no person in common")
    chosen = np.sort(rng.choice(shared, min(persons, len(shared)), replace=False))
    for axis, (label, features) in zip(axes.flat, panels.items(), strict=True):
        pids, *means = centers(features)
        rows = [rows[features.images.pids[rows] == pid][:most] for pid in chosen for rows in cross_modal(features)]
        places = project(features.values[np.concatenate(rows)], method, seed)
        marks = np.split(places, np.cumsum([len(own) for own in rows])[:-1])
        for i, pid in enumerate(chosen):
            colour, (visible, thermal) = COLOURS[i % len(COLOURS)], marks[2 * i : 2 * i + 2]
            axis.scatter(*visible.T, s=26, color=colour, alpha=0.7, linewidth=0)
            axis.scatter(*thermal.T, s=26, marker="^", facecolor="none", edgecolor=colour, alpha=0.9)
            visible, thermal = visible.mean(axis=0), thermal.mean(axis=0)
            axis.plot(*zip(visible, thermal, strict=True), color="black", linewidth=2, zorder=3)
            axis.scatter(*visible, s=130, color=colour, edgecolor="black", zorder=4)
            axis.scatter(*thermal, s=130, marker="^", facecolor="white", edgecolor=colour, linewidth=2.5, zorder=4)
            axis.annotate(str(pid), visible, (7, 7), textcoords="offset points", fontweight="bold", zorder=5)
        gaps = np.linalg.norm(means[0][:, None] - means[1], axis=2)  # between all persons' centers
        note = f"{names[label]}\ncenters of all {len(pids)} persons, distance: same person {gaps.diagonal().mean():.2f}"
        if len(pids) > 1:
            others = gaps[~np.eye(len(pids), dtype=bool)].mean()
            note += f", others {others:.2f}"
        axis.set_title(note, fontsize=12)
        axis.set(xticks=[], yticks=[])
        axis.set_xlabel(captions[label], fontsize=11)
        for spine in axis.spines.values():
            spine.set_visible(True)
    style = {"linestyle": "none", "color": "grey", "markersize": 8}
    marks = [
        Line2D([], [], marker="o", label="visible image", **style),
        Line2D([], [], marker="^", label="infrared image", markerfacecolor="none", **style),
        Line2D([], [], color="black", label="joins a person's two centers"),
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=3 if len(panels) > 1 else 2, frameon=False)
    return figure


def project(points: np.ndarray, method: str, seed: int) -> np.ndarray:
    """(n, dim) -> (n, 2), by PCA or by t-SNE, which few points fall back from to PCA."""
    from sklearn.decomposition import PCA  # slow to import
    from sklearn.manifold import TSNE

    if method == "tsne" and len(points) > 10:
        perplexity = min(30, (len(points) - 1) / 3)
        return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(points)
    found = PCA(min(2, *points.shape), random_state=seed).fit_transform(points)
    return np.pad(found, ((0, 0), (0, 2 - found.shape[1])))


@styled
def distances(panels: dict[str, Features]) -> Figure:
    """Cosine distances between visible and thermal images, of one person and of two: how far apart they are."""
    dataset = next(iter(panels.values())).dataset
    title = f"{DATASETS[dataset]}, all test images: distances between the modalities"
    figure, axes = new_figure(1, len(panels), (6, 4.4), title, sharex=True)
    bins, names, captions = np.linspace(0, 2, 4001), short_names(panels), checkpoints(panels)
    limits = []
    for axis, (label, features) in zip(axes.flat, panels.items(), strict=True):
        same, other, separation = histograms(features, bins)
        used = np.flatnonzero(same + other)
        wide = max(1, (used[-1] - used[0]) // 80)  # fine bins in each that is drawn
        edges = bins[::wide]
        for name, counts, colour, hatch in (
            ("two persons", other, COLOURS[0], ""),
            ("one person", same, COLOURS[1], "///"),
        ):
            if counts.any():
                drawn = np.add.reduceat(counts, np.arange(0, len(counts), wide))[: len(edges) - 1]
                density = drawn / (counts.sum() * (edges[1] - edges[0]))
                axis.stairs(density, edges, fill=True, color=colour, alpha=0.45, hatch=hatch, label=name)
                axis.stairs(density, edges, color=colour, linewidth=1.5)
        limits += [bins[used[0]], bins[used[-1] + 1]]
        words = f"separation d' = {separation:.2f}"
        if not np.isfinite(separation):
            words = "no separation: one kind of pairs only"
        axis.set(title=f"{names[label]}\n{words}", ylabel="density")
        axis.set_xlabel(f"1 - cosine\n{captions[label]}", fontsize=11)
        axis.legend(title="images of")
    axes.flat[0].set_xlim(min(limits), max(limits))  # of all, which share it
    return figure


def histograms(features: Features, bins: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Counts of the distances of same and of other persons, and d': the gap of their means in mean deviations."""
    visible, thermal = cross_modal(features)
    distmat = Distances(features.values[thermal], features.values[visible])
    pids = features.images.pids
    counts, sums = np.zeros((2, len(bins) - 1)), np.zeros((2, 3))  # of other and same persons: number, sum, squares
    for start in range(0, len(thermal), 256):
        rows = slice(start, start + 256)
        found = 1 + distmat[rows]
        alike = pids[thermal[rows], None] == pids[visible]
        for k, values in enumerate((found[~alike], found[alike])):
            counts[k] += np.histogram(values, bins)[0]
            sums[k] += len(values), values.sum(dtype=float), (values.astype(float) ** 2).sum()
    means = sums[:, 1] / np.maximum(sums[:, 0], 1)
    variances = np.maximum(sums[:, 2] / np.maximum(sums[:, 0], 1) - means**2, 0)
    separation = (means[0] - means[1]) / max(np.sqrt(variances.mean()), 1e-9) if sums[:, 0].all() else float("nan")
    return counts[1], counts[0], float(separation)


@styled
def ranked(features: Features, search: Search, root: str, rows: int = 2, seed: int = 0) -> Figure:
    """Queries and their ten nearest gallery images: the ``rows`` best, the worst, and some at random.

    Best and worst are queries of highest and lowest average precision.
    """
    images = features.images
    distmat = Distances(features.values[search.query], features.values[search.gallery])
    rankings = [rank(features, search, i, distmat[i : i + 1][0]) for i in range(len(search.query))]
    known = [i for i, (_, hits, _) in enumerate(rankings) if hits.any()]
    if not known:
        raise OSError("no query has a match in the gallery")
    places = {i: np.flatnonzero(rankings[i][1]) + 1 for i in known}
    precision = {i: np.mean(np.arange(1, len(places[i]) + 1) / places[i]) for i in known}
    by_precision = sorted(known, key=precision.__getitem__)

    def of_persons(queries: list[int]) -> list[int]:
        """The first of each person."""
        return [*{int(images.pids[search.query[i]]): i for i in reversed(queries)}.values()][::-1]

    rest = by_precision[rows : max(rows, len(known) - rows)] or by_precision
    chance = np.random.default_rng(seed).permutation(rest)[:rows].tolist()
    kinds = [("best", i) for i in of_persons(by_precision[::-1])[:rows]] + [("random", i) for i in chance]
    kinds += [("worst", i) for i in of_persons(by_precision)[:rows]]
    title = f"{DATASETS[features.dataset]}, {search.protocol}, trial {search.trial}; {checkpoints({'': features})['']}"
    figure, axes = new_figure(len(kinds), 11, (1.15, 2.5), title)
    for row, (kind, i) in zip(axes, kinds, strict=True):
        query, (order, hits, hidden) = search.query[i], rankings[i]
        caption = f"{kind}\nAP {precision[i]:.0%}\n1st match {places[i][0]}\n"
        caption += f"id {images.pids[query]} cam {images.camids[query]}"
        show(row[0], root, images.paths[query], caption, "black")
        row[0].spines[:].set_linewidth(1)
        if hidden:
            row[0].set_xlabel(f"{hidden} of cam 2,\nthe same room,\nnot counted", fontsize=10)
        for axis in row[1 + len(order[:10]) :]:
            axis.axis("off")
        for place, (axis, image, hit) in enumerate(zip(row[1:], order, hits, strict=False), 1):
            caption = f"{place} {'✓' if hit else '✗'}\nid {images.pids[image]}\ncam {images.camids[image]}"
            show(axis, root, images.paths[image], caption, HIT if hit else MISS)
    return figure


def first_search(features: Features, mode: str = "all", gall_mode: str = "single", search: str = "v2t") -> Search:
    """The first trial of a protocol, or of RegDB the trial of the network."""
    trial = features.network.get("trial") or 1
    protocol = (mode, gall_mode, search)
    return data_manager.list_searches(features.dataset, features.images, trial, *protocol, draws=[0])[0]


def rank(features: Features, search: Search, i: int, distances: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Of query i: gallery images from near to far, which of them match, and how many were left out."""
    images, query, gallery = features.images, search.query[i], search.gallery
    hidden = np.zeros(len(gallery), bool)
    if features.dataset == "sysu":
        of_query, of_gallery = same_room(images.camids[query], images.camids[gallery])
        hidden = of_query & of_gallery
    order = gallery[~hidden][np.argsort(distances[~hidden], kind="stable")]
    return order, images.pids[order] == images.pids[query], int(hidden.sum())


def show(axis: Axes, root: str, path: str, caption: str, colour: str) -> None:
    """One image of a person in a frame."""
    axis.imshow(read_image(os.path.join(root, path), IMAGE))
    axis.set(xticks=[], yticks=[])
    axis.set_title(caption, fontsize=10.5)
    for spine in axis.spines.values():
        spine.set(visible=True, color=colour, linewidth=4)


@styled
def attention(net: EmbedNet, images: Split, dataset: str, size: tuple[int, int], name: str, persons: int = 4,
              seed: int = 0) -> Figure:  # fmt: skip
    """Where the stripes look: of some persons a visible and a thermal image, and each place's part in its stripe.

    A stripe's feature is the mean of its places; a place's part is its projection on that mean, shown from the least
    of the stripe (0) to the largest (1).
    """
    thermal = np.isin(images.camids, data_manager.THERMAL_CAMERAS[dataset])
    pids = np.intersect1d(images.pids[thermal], images.pids[~thermal])
    if not len(pids):
        raise OSError("no person has images in both modalities")
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(pids, min(persons, len(pids)), replace=False))
    title = f"{DATASETS[dataset]}: where the {net.num_parts} stripes look; checkpoint: {shorten(name, 80)}"
    figure, axes = new_figure(2, 2 * len(chosen), (1.5, 3.0), title)
    for row, (modality, mask) in zip(axes, (("visible", ~thermal), ("thermal", thermal)), strict=True):
        for k, pid in enumerate(chosen):
            image = rng.choice(np.flatnonzero(mask & (images.pids == pid)))
            pixels = read_image(images.paths[image], size)
            parts, bounds = stripe_parts(net, modality, pixels)
            plain, overlay = row[2 * k : 2 * k + 2]
            plain.imshow(pixels)
            plain.set_title(f"id {pid}\ncam {images.camids[image]}", fontsize=11)
            overlay.imshow(pixels.mean(axis=2), cmap="gray")
            heat = Image.fromarray(parts.astype(np.float32)).resize((size[1], len(parts)), Image.Resampling.BILINEAR)
            heat = np.asarray(heat.resize(size[::-1], Image.Resampling.NEAREST))  # stripes do not run into each other
            shown = overlay.imshow(heat, cmap="viridis", alpha=0.55, vmin=0, vmax=1)
            for bound in bounds[1:]:
                overlay.axhline(bound * size[0] - 0.5, color="white", linewidth=1.2)
            for axis in (plain, overlay):
                axis.set(xticks=[], yticks=[])
                axis.grid(False)
        row[0].set_ylabel("visible" if modality == "visible" else "infrared")
    bar = figure.colorbar(shown, ax=axes, shrink=0.6, ticks=[0, 1], label="part in its stripe's feature")
    bar.ax.set_yticklabels(["least of\nthe stripe", "most of\nthe stripe"])
    bar.solids.set_alpha(1)
    return figure


def attention_of(checkpoint: str, dataset: str, root: str, trial: int | None = None, **options) -> Figure:
    """`attention` of a checkpoint, on test images; RegDB's are those of ``trial``, or of the one it was trained on."""
    net, config = read_network(checkpoint)
    images = data_manager.list_test(dataset, root, trial or config.get("trial", 1))
    size = config.get("img_h", 288), config.get("img_w", 144)
    return attention(net, images, dataset, size, os.path.basename(checkpoint), **options)


@torch.no_grad()
def stripe_parts(net: EmbedNet, modality: str, pixels: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """(H, W) in [0, 1]: each place's part in its stripe; and where the stripes begin, in image heights."""
    batch = to_input(torch.from_numpy(pixels[None].copy()), pixels.shape[:2])
    (maps,) = net.feature_maps(**{modality: batch})  # (C, H, W)
    parts, (band, stride) = torch.zeros(maps.shape[1:]), stripe_window(maps.shape[1], net.num_parts)
    starts = range(0, net.num_parts * stride, stride)
    for own in (slice(start, start + band) for start in starts):
        stripe = maps[:, own]
        part = torch.einsum("chw,c->hw", stripe, stripe.mean(dim=(1, 2)))
        part -= part.min()
        parts[own] = torch.maximum(parts[own], part / part.max().clamp(min=1e-12))
    return parts.numpy(), [start / maps.shape[1] for start in starts]


def folders(tree: Path) -> dict[str, str]:
    """The camera folders of a SYSU-MM01 or RegDB tree and their headings."""
    for columns in (SYSU_COLUMNS, REGDB_COLUMNS):
        if any((tree / name).is_dir() for name in columns):
            return columns
    raise OSError(f"{tree} holds neither cam1..cam6 (SYSU-MM01) nor Visible and Thermal (RegDB)")


def samples(tree: Path, persons: int = 8, per_camera: int = 1, seed: int = 0) -> Image.Image:
    """Contact sheet: a row per person, `per_camera` images per camera; a missing camera leaves a grey cell."""
    rng, columns = random.Random(seed), folders(tree)
    names = {p.name for camera in columns for p in (tree / camera).glob("*") if p.is_dir()}
    order = sorted(names, key=lambda n: (len(n), n))
    chosen = sorted(rng.sample(order, min(persons, len(order))), key=lambda n: (len(n), n))
    step = (CELL[0] + GAP, CELL[1] + GAP)
    size = (MARGIN + len(columns) * per_camera * step[0], HEADER + len(chosen) * step[1])
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for c, title in enumerate(columns.values()):
        draw.text((MARGIN + c * per_camera * step[0], 0), title, "black", font)
    for row, name in enumerate(chosen):
        top = HEADER + row * step[1]
        draw.text((4, top + CELL[1] // 2), name, "black", font)
        for c, camera in enumerate(columns):
            files = sorted(p for p in (tree / camera / name).glob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            files = sorted(rng.sample(files, min(per_camera, len(files))))
            for k in range(per_camera):
                left = MARGIN + (c * per_camera + k) * step[0]
                draw.rectangle((left, top, left + CELL[0] - 1, top + CELL[1] - 1), "lightgrey")
                if k < len(files):
                    sheet.paste(Image.fromarray(read_image(str(files[k]), CELL[::-1])), (left, top))
    return sheet


# ---- command line ---------------------------------------------------------------------------------------------------


def save(picture: Figure | Image.Image, out: Path, pdf: bool = False) -> None:
    """Write a picture to ``out``, whose suffix tells the format, and to a PDF of that name, too, if wanted."""
    kind = KINDS.get(out.suffix.lower())
    if not kind:
        utils.fail(f"--out {out}: give a name that ends in {', '.join(KINDS)}")
    utils.make_folder(str(out.parent), "--out")
    files = {out: kind} | ({out.with_suffix(".pdf"): "pdf"} if pdf else {})
    for path, form in files.items():
        with utils.whole_file(str(path)) as partial:
            if isinstance(picture, Figure):
                picture.savefig(partial, format=form)
            else:
                picture.save(partial, form)
        print(path)


def build_parser() -> argparse.ArgumentParser:
    parser = utils.Parser(
        prog="python -m tools.visualize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, draw: Callable, text: str) -> Callable:
        own = commands.add_parser(name, help=text, description=text)
        own.set_defaults(draw=draw)
        own.add_argument("--out", type=Path, default=Path(f"{name}.png"), help="file to write (%(default)s)")
        own.add_argument("--pdf", action="store_true", help="write a PDF beside it, too")
        return own.add_argument

    def add_features(add: Callable, several: bool = True) -> None:
        add(
            "files",
            nargs="+" if several else 1,
            metavar="[LABEL=]FEATURES.npz",
            help="what test.py --save_features wrote",
        )
        add("--features", default="", help="kind of features (fc)")
        add_dataset(add)

    def add_dataset(add: Callable) -> None:
        add("--dataset", choices=[*DATASETS], default="sysu", help="dataset (%(default)s)")

    def add_number(add: Callable, flag: str, default: int, text: str, least: int = 1) -> None:
        add(flag, type=utils.number(int, least, 1001), default=default, help=f"{text} (%(default)s)")

    add = command("curves", draw_curves, "losses, learning rate, rank-1 and mAP over the epochs of some runs")
    add("files", nargs="+", metavar="[LABEL=]RUN", help="folder of a run, log/<run>")

    add = command("cmc", draw_cmc, "CMC curves of some results: mean and deviation over the trials")
    add("files", nargs="+", metavar="[LABEL=]RESULT.json", help="what test.py or tools.score wrote")
    add("--features", default="fc", help="kind of features (%(default)s)")

    add = command("embedding", draw_embedding, "features of some test persons in the plane, and their centers")
    add_features(add)
    add("--method", choices=["tsne", "pca"], default="tsne", help="projection (%(default)s)")
    add_number(add, "--persons", 7, "persons to show")
    add_number(add, "--seed", 0, "which persons, and the projection's", 0)

    add_features(command("distances", draw_distances, "distances between visible and infrared images, as histograms"))

    add = command("ranked", draw_ranked, "queries and their ten nearest gallery images: hits green ✓, misses red ✗")
    add_features(add, several=False)
    add("--data-path", help="the dataset's folder (default: data/SYSU-MM01 or data/RegDB)")
    add("--mode", choices=["all", "indoor"], default="all", help="SYSU-MM01 search (%(default)s)")
    add("--gall-mode", choices=["single", "multi"], default="single", help="SYSU-MM01 shots (%(default)s)")
    add("--search", choices=["v2t", "t2v"], default="v2t", help="RegDB's direction (%(default)s)")
    add_number(add, "--rows", 2, "of the best, of the worst and of random queries")
    add_number(add, "--seed", 0, "which random queries", 0)

    add = command("attention", draw_attention, "where the stripes look, in visible and in infrared images")
    add("checkpoint", help="a checkpoint of train.py, or a published one")
    add_dataset(add)
    add("--data-path", help="the dataset's folder (default: data/SYSU-MM01 or data/RegDB)")
    add("--trial", type=utils.number(int, 1, 11), help="RegDB's trial (the checkpoint's)")
    add_number(add, "--persons", 4, "persons to show")
    add_number(add, "--seed", 0, "which persons and images", 0)

    add = command("samples", draw_samples, "contact sheet of persons x cameras of a dataset")
    add("tree", type=Path, help="SYSU-MM01 or RegDB root folder")
    add_number(add, "--persons", 8, "rows")
    add("--per-camera", type=utils.number(int, 1, 101), default=1, help="images in each cell (%(default)s)")
    add_number(add, "--seed", 0, "which persons and images", 0)
    return parser


def draw_curves(args: argparse.Namespace) -> Figure:
    files = labelled(args.files)
    runs = {os.path.basename(path.removesuffix("metrics.jsonl").rstrip("/")) for path in files.values()}
    datasets = {DATASETS.get(run.partition("_")[0]) for run in runs}  # a run's name begins with it
    where = "" if None in datasets else f"on {' and '.join(sorted(datasets))}"
    return curves({label: read_metrics(path) for label, path in files.items()}, where=where)


def draw_cmc(args: argparse.Namespace) -> Figure:
    results = {label: read_results(path) for label, path in labelled(args.files).items()}
    check_alike(results, args.features)
    return cmc(results, args.features)


def all_features(args: argparse.Namespace) -> dict[str, Features]:
    files = labelled(args.files)
    return {label: read_features(path, args.dataset, args.features) for label, path in files.items()}


def draw_embedding(args: argparse.Namespace) -> Figure:
    return embedding(all_features(args), args.persons, args.method, args.seed)


def draw_distances(args: argparse.Namespace) -> Figure:
    return distances(all_features(args))


def draw_ranked(args: argparse.Namespace) -> Figure:
    (features,) = all_features(args).values()
    root = args.data_path or utils.DATA_PATHS[args.dataset]
    if not os.path.isdir(root):
        utils.fail(f"{root} not found: --data_path names the dataset's folder")
    with utils.blame(args.files[0]):
        search = first_search(features, args.mode, args.gall_mode, args.search)
    return ranked(features, search, root, args.rows, args.seed)


def draw_attention(args: argparse.Namespace) -> Figure:
    root = args.data_path or utils.DATA_PATHS[args.dataset]
    return attention_of(args.checkpoint, args.dataset, root, args.trial, persons=args.persons, seed=args.seed)


def draw_samples(args: argparse.Namespace) -> Image.Image:
    return samples(args.tree, args.persons, args.per_camera, args.seed)


def main() -> None:
    args = build_parser().parse_args()
    root = getattr(args, "tree", None) or getattr(args, "data_path", None)
    if root and args.out.exists() and args.out.resolve().is_relative_to(Path(root).resolve()):
        utils.fail(f"--out {args.out} is a file of the dataset: give a name outside of {root}")
    save(args.draw(args), args.out, args.pdf)


if __name__ == "__main__":
    utils.run(main)
