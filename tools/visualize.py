"""Pictures of data, of runs and of what a network has learned.

    python -m tools.visualize curves log/RUN …                       losses, rate, rank-1 and mAP over the epochs
    python -m tools.visualize cmc log/test_….json …                  CMC curves, mean and deviation over the trials
    python -m tools.visualize embedding FEATURES.npz …               features of some persons, in the plane
    python -m tools.visualize distances FEATURES.npz …               distances between the modalities
    python -m tools.visualize ranked FEATURES.npz --data_path TREE   queries and their ten nearest gallery images
    python -m tools.visualize attention CHECKPOINT --data_path TREE  where the stripes look
    python -m tools.visualize samples --data_path TREE               test persons x cameras of a dataset

FEATURES.npz comes from test.py --save_features. Several files may each have a name in front: "with HC=FILE".
"""

import argparse
import functools
import inspect
import json
import os
import re
import textwrap
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter, MaxNLocator
from PIL import Image

import utils
from data_loader import read_image, to_input
from data_manager import DATASETS, Dataset, Search, Split
from eval_metrics import MEASURES, Counts, Distances, centers, rank_plainly
from model import EmbedNet, network_of, stripe_window
from tools.score import load_features

# Okabe and Ito's colours, which colour-blind people can tell apart; their yellow is too light for lines.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
HIT, MISS = "#009E73", "#C62D1F"
STYLE = matplotlib.rc_context({
    "font.size": 13, "axes.titlesize": 13, "legend.fontsize": 12, "figure.titlesize": 15, "text.parse_math": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS * 4) + matplotlib.cycler(linestyle=["-", "--", "-.", ":"] * 7),
})  # fmt: skip
IMAGE = (160, 72)  # height and width at which persons are shown
# What a line of metrics.jsonl holds besides the terms of the loss, and the title of what is drawn of it.
METRICS = {"epoch": "", "loss": "", "accuracy": "accuracy in training, %", "lr": "learning rate",
           "fc_rank1": "rank-1 of fc, %", "fc_mAP": "mAP of fc, %",
           "fc_own_centers": "centers of a person, distance in fc",
           "fc_other_centers": "centers of two persons, distance in fc"}  # fmt: skip


# ---- reading --------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """Scores of one kind of features under one protocol."""

    mean: dict[str, float]  # over the trials, of each measure
    std: dict[str, float]
    cmc: np.ndarray  # (trials, 20)


class Result(NamedTuple):
    """What test.py or tools.score found."""

    rows: dict[str, dict[str, Row]]  # {kind of features: {protocol: Row}}; one kind is "chance"
    counts: dict[str, Counts]  # {protocol: Counts}
    options: list[str]
    dataset: Dataset
    data: str  # the dataset's name, as `name_of` gives it
    checkpoint: str  # this file and the next two may be gone; "" where there is none
    save_features: str
    data_path: str


class Features(NamedTuple):
    """One kind of features of all test images: (N, dim), and what is known of the network."""

    images: Split
    values: np.ndarray
    kind: str
    network: dict
    dataset: Dataset

    @property
    def data(self) -> str:
        return name_of(self.dataset, self.network.get("synthetic"))

    @property
    def caption(self) -> str:
        path = self.network.get("checkpoint")
        return f"checkpoint: {os.path.basename(path)}" if path else "no checkpoint named"

    def search(self, choice: dict) -> Search:
        """The first trial of the chosen protocol (see `Dataset.searches`), or the one of the network."""
        trial = self.network.get("trial") or self.dataset.trials[0]
        return self.dataset.searches(self.images, choice, [trial])[0]


def name_of(dataset: Dataset, synthetic: bool) -> str:
    """A dataset's name, for titles; drawn people are not those of the dataset."""
    return f"synthetic, {dataset.title} layout" if synthetic else dataset.title


def name_of_tree(dataset: Dataset, root: str) -> str:
    return name_of(dataset, os.path.exists(os.path.join(root, "synthetic.json")))


def labelled(entries: list[str]) -> dict[str, str]:
    """``LABEL=FILE`` or ``FILE`` -> {label: file}; without a label, the file's name stands for it."""
    found = {}
    for entry in entries:
        label, _, path = ("", "", entry) if os.path.exists(entry) else entry.rpartition("=")
        found[label or re.sub(r"\.(json|jsonl|npz)$", "", os.path.basename(path.rstrip("/")))] = path
    if len(found) < len(entries):
        raise ValueError("two files have one label: tell them apart with LABEL=FILE")
    return found


def read_metrics(path: str) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl; ``path`` is that file or its folder. OSError: it is not, or has none."""
    file = os.path.join(path, "metrics.jsonl") if os.path.isdir(path) else path
    try:
        with open(file, encoding="utf-8") as lines:
            metrics = [{name: float(value) for name, value in json.loads(line).items()} for line in lines]
        if not all("epoch" in line for line in metrics or [{}]):
            raise ValueError("no epoch is finished")
        return metrics
    except Exception as error:  # whatever another file leads to
        raise OSError(f"{file} is not the metrics.jsonl of a run ({error}): give its folder, like log/<run>") from error


def read_results(path: str) -> Result:
    """What test.py or tools.score found, of its JSON file. OSError: it is missing, or not such a file."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        rows = {}
        for row in content["results"]:
            mean, std = ({name: float(row[part][name]) for name in MEASURES} for part in ("mean", "std"))
            cmc = np.array([trial["cmc"] for trial in row["trials"]], dtype=float)
            rows.setdefault(row["feature"], {})[row["protocol"]] = Row(mean, std, cmc.reshape(-1, 20))
        counts = {  # the first versions wrote more than these fields
            protocol: Counts(*(found[name] for name in Counts._fields)) for protocol, found in content["counts"].items()
        }
        if not counts or "chance" not in rows or any({*found} != {*counts} for found in rows.values()):
            raise ValueError("rows are missing")
        flags, networks = content["flags"], content.get("networks", [])
        dataset, options = DATASETS[flags["dataset"]], [str(option) for option in content["options"]]
        data = name_of(dataset, any(network.get("synthetic") for network in networks))
        places = [*networks, {}][0].get("checkpoint"), flags.get("save_features"), flags.get("data_path")
        return Result(rows, counts, options, dataset, data, *(str(place or "") for place in places))
    except Exception as error:  # whatever another file leads to
        raise OSError(f"{path} is not a JSON file that test.py wrote ({error})") from error


def check_alike(results: dict[str, Result], feature: str) -> None:
    """ValueError: results cannot be compared: other protocols, other images, no such features."""
    first_label, first = next(iter(results.items()))
    for label, found in results.items():
        if feature not in found.rows:
            raise ValueError(f"{label} has no {feature} features, but {', '.join(found.rows)}: choose with --features")
        if (found.dataset, found.counts) != (first.dataset, first.counts):
            raise ValueError(f"{label} and {first_label} are of other protocols or images: compare like with like")


def read_features(path: str, dataset: Dataset, kind: str) -> Features:
    """Of a file as `tools.score` describes it. OSError: it is not such a file."""
    images, arrays, network = load_features(path, dataset, kind)
    return Features(images, arrays[kind], kind, network, dataset)


# ---- drawing --------------------------------------------------------------------------------------------------------


def wrap(text: str, width: int = 90) -> str:
    return textwrap.fill(text, width, break_on_hyphens=False)


def new_figure(rows: int, columns: int, size: tuple[float, float], title: str, **options) -> tuple[Figure, np.ndarray]:
    """A figure of ``rows`` x ``columns`` axes, each of this width and height in inches."""
    figure = Figure((max(columns * size[0], 6), rows * size[1] + 0.8), layout="constrained")
    figure.suptitle(wrap(title, int(figure.get_figwidth() * 7)))
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def add_legend(figure: Figure, axes: np.ndarray) -> None:
    """The labels of the first axes, which hold for all, below the figure; axes without lines are hidden."""
    for axis in axes.flat:
        axis.set_visible(len(axis.lines) > 0)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    labels = [wrap(label, 60) for label in labels]
    columns = int(figure.get_figwidth() * 9) // (max(map(len, labels)) + 8)
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, min(columns, len(labels))), frameon=False)


def choose(pids: np.ndarray, persons: int, rng: np.random.Generator) -> np.ndarray:
    """Some of these persons, each once, ascending. ValueError: there are none."""
    pids = np.unique(pids)
    if not len(pids):
        raise ValueError("no person has the images to draw: both modalities of a person are needed")
    return np.sort(rng.choice(pids, min(persons, len(pids)), replace=False))


@STYLE
def curves(runs: dict[str, list[dict]], data: str = "") -> Figure:
    """Terms of the loss, accuracy, learning rate, rank-1 and mAP of some runs over the epochs.

    ``data``: the dataset's name, if known. Only what the runs recorded is drawn.
    """
    recorded = dict.fromkeys(name for metrics in runs.values() for line in metrics for name in line)
    terms = [name for name in recorded if name not in METRICS and name.rpartition("_")[2] not in (*MEASURES, "centers")]
    panels = {term: f"{term}, per stripe" for term in terms}
    panels |= {name: title for name, title in METRICS.items() if title and name in recorded}
    rows, columns = -(-len(panels) // 3), min(3, len(panels))
    figure, axes = new_figure(rows, columns, (4.2, 3.2), f"Training ({data})" if data else "Training", sharex=True)
    for axis, (name, title) in zip(axes.flat, panels.items(), strict=False):
        scale = 100 if title.endswith("%") else 1
        for label, metrics in runs.items():
            points = [(line["epoch"], scale * line[name]) for line in metrics if name in line]
            axis.plot(*np.array(points).reshape(-1, 2).T, label=label, marker=".")
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
        axis.tick_params(labelbottom=True)
        if name == "lr":
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(LogFormatter())
            axis.yaxis.set_minor_formatter(LogFormatter())
        else:
            axis.set_ylim(0, 1.05 * axis.dataLim.y1 or 1)
    add_legend(figure, axes)
    return figure


@STYLE
def cmc(results: dict[str, Result], feature: str = "fc") -> Figure:
    """CMC curves of each protocol: means over the trials, and as a band their deviation."""
    first = next(iter(results.values()))
    rows = {"chance": first.rows["chance"]} | {label: found.rows[feature] for label, found in results.items()}
    columns = min(2, len(first.counts))
    title = f"CMC of {feature} features, mean ± deviation over the trials ({first.data})"
    figure, axes = new_figure(-(-len(first.counts) // columns), columns, (6, 4.2), title)
    for axis, (protocol, counts) in zip(axes.flat, first.counts.items(), strict=False):
        for label, found in rows.items():
            trials, style = 100 * found[protocol].cmc, {"color": "grey", "linestyle": ":"} if label == "chance" else {}
            mean, std, ranks = trials.mean(axis=0), trials.std(axis=0), np.arange(1, trials.shape[1] + 1)
            (line,) = axis.plot(ranks, mean, label=label, marker=".", **style)
            axis.fill_between(ranks, mean - std, mean + std, color=line.get_color(), alpha=0.2, linewidth=0)
        matched = counts.queries - counts.without_match
        axis.set(title=f"{protocol}: {matched} queries, {counts.gallery_images} gallery images",
                 xlabel="rank", ylabel="queries matched, %", xticks=[1, 5, 10, 15, 20], ylim=(0, 102))  # fmt: skip
        rank1 = [f"{line.get_ydata()[0]:.1f}%" for line in axis.lines]
        axis.legend(axis.lines, rank1, title="rank-1", loc="lower right")
    add_legend(figure, axes)
    return figure


@STYLE
def embedding(panels: dict[str, Features], persons: int = 7, method: str = "tsne", seed: int = 0) -> Figure:
    """Features of some persons in the plane, coloured by person, shaped by modality; a line joins a person's centers.

    The persons are the same in all panels. Each panel has a projection of its own, whose scale and axes mean nothing.
    """
    first, rng = next(iter(panels.values())), np.random.default_rng(seed)
    title = f"{ {'tsne': 't-SNE', 'pca': 'PCA'}[method] } of {first.kind} features, some test persons ({first.data})"
    figure, axes = new_figure(1, len(panels), (6, 5.6), title)
    known = {label: centers(features.values, features.images) for label, features in panels.items()}
    chosen = choose(functools.reduce(np.intersect1d, (pids for pids, *_ in known.values())), persons, rng)
    for axis, (label, features) in zip(axes.flat, panels.items(), strict=True):
        rows = np.flatnonzero(np.isin(features.images.pids, chosen))
        images, places = features.images.take(rows), project(features.values[rows], method, seed)
        for i, pid in enumerate(chosen):
            colour, own = COLOURS[i % len(COLOURS)], images.pids == pid
            visible, thermal = places[own & ~images.thermal], places[own & images.thermal]
            axis.scatter(*visible.T, s=26, color=colour, alpha=0.7, linewidth=0)
            axis.scatter(*thermal.T, s=26, marker="^", facecolor="none", edgecolor=colour, alpha=0.9)
            visible, thermal = visible.mean(axis=0), thermal.mean(axis=0)
            axis.plot(*zip(visible, thermal, strict=True), color="black", linestyle="-", linewidth=2, zorder=3)
            axis.scatter(*visible, s=130, color=colour, edgecolor="black", zorder=4)
            axis.scatter(*thermal, s=130, marker="^", facecolor="white", edgecolor=colour, linewidth=2.5, zorder=4)
            axis.annotate(str(pid), visible, (7, 7), textcoords="offset points", fontweight="bold", zorder=5)
        pids, visible, thermal = known[label]
        gaps = np.linalg.norm(visible[:, None] - thermal, axis=2)  # between all persons' centers
        note = f"centers of all {len(pids)} persons, distance: same person {gaps.diagonal().mean():.2f}"
        if len(pids) > 1:
            note += f", others {gaps[~np.eye(len(pids), dtype=bool)].mean():.2f}"
        axis.set_title(f"{wrap(label, 60)}\n{note}", fontsize=12)
        axis.set_xlabel(wrap(features.caption, 80), fontsize=8)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(True)
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
        return TSNE(perplexity=min(30, (len(points) - 1) / 3), init="pca", random_state=seed).fit_transform(points)
    return PCA(2, random_state=seed).fit_transform(points)


@STYLE
def distances(panels: dict[str, Features]) -> Figure:
    """Cosine distances between visible and infrared images, of one person and of two, as histograms.

    Their separation is d': the gap of the two means in mean deviations.
    """
    first = next(iter(panels.values()))
    title = f"Distances between visible and infrared test images, {first.kind} features ({first.data})"
    figure, axes = new_figure(1, len(panels), (6, 4.4), title, sharex=True)
    for axis, (label, features) in zip(axes.flat, panels.items(), strict=True):
        alike, found = pair_distances(features)
        low, high = found.min(), max(found.max(), found.min() + 1e-3)
        same, other = found[alike], found[~alike]
        separation = (other.mean() - same.mean()) / max(np.sqrt((same.var() + other.var()) / 2), 1e-9)
        kinds = ("two persons", other, COLOURS[0], ""), ("one person", same, COLOURS[1], "///")
        for name, values, colour, hatch in kinds:
            density, edges = np.histogram(values, 80, (low, high), density=True)
            axis.stairs(density, edges, fill=True, color=colour, alpha=0.45, hatch=hatch, label=name)
            axis.stairs(density, edges, color=colour, linewidth=1.5)
        axis.set(title=f"{wrap(label, 50)}\nseparation d' = {separation:.2f}", ylabel="density")
        axis.set_xlabel(f"1 - cosine\n{wrap(features.caption, 75)}", fontsize=8)
        axis.legend(title="images of")
    return figure


def pair_distances(features: Features) -> tuple[np.ndarray, np.ndarray]:
    """(infrared, visible): whether two images are of one person, and 1 - cosine of their features.

    ValueError: there are no such pairs of one person, or of two.
    """
    thermal, pids = features.images.thermal, features.images.pids
    alike = pids[thermal][:, None] == pids[~thermal]
    if alike.all() or not alike.any():
        raise ValueError("distances need images of several persons, in both modalities")
    return alike, 1 + Distances(features.values[thermal], features.values[~thermal])[:]


@STYLE
def ranked(features: Features, search: Search, root: str, rows: int = 2, seed: int = 0) -> Figure:
    """Queries and their ten nearest gallery images: the ``rows`` best, some at random, and the worst.

    Best and worst are queries of highest and lowest average precision, of a person each.
    """
    query, gallery = features.images.take(search.query), features.images.take(search.gallery)
    hidden = features.dataset.hidden(query.pids, query.camids, gallery.pids, gallery.camids)
    hits = query.pids[:, None] == gallery.pids
    known = np.flatnonzero((hits & ~hidden).any(axis=1))
    if not len(known):
        raise ValueError("no query has a match in the gallery")
    query, hidden, hits = query.take(known), hidden[known], hits[known]
    distmat = Distances(features.values[search.query[known]], features.values[search.gallery])[:]
    before, precision, _ = rank_plainly(distmat, query.pids, gallery.pids, hidden, counts_persons=False).T
    best_first = np.argsort(-precision, kind="stable")
    chance = np.random.default_rng(seed).permutation(len(known))[:rows]

    def of_persons(queries: np.ndarray) -> np.ndarray:
        """The first query of each person."""
        return queries[np.sort(np.unique(query.pids[queries], return_index=True)[1])][:rows]

    kinds = ("best", of_persons(best_first)), ("random", chance), ("worst", of_persons(best_first[::-1]))
    chosen = [(kind, i) for kind, queries in kinds for i in queries]
    title = f"{search.protocol}, trial {search.trial} ({name_of_tree(features.dataset, root)})"
    figure, axes = new_figure(len(chosen), 11, (1.15, 2.5), title)
    figure.supxlabel(wrap(features.caption), fontsize=9)
    for row, (kind, i) in zip(axes, chosen, strict=True):
        caption = f"{kind}\nAP {precision[i]:.0%}\n1st match {before[i] + 1:.0f}\n"
        caption += f"id {query.pids[i]} cam {query.camids[i]}"
        show(row[0], os.path.join(root, query.paths[i]), caption, "black", 1)
        if hidden[i].any():
            row[0].set_xlabel(f"gallery images\nnot counted: {hidden[i].sum()}", fontsize=10)
        order = np.argsort(np.where(hidden[i], np.inf, distmat[i]), kind="stable")[: (~hidden[i]).sum()]
        for place, (axis, j) in enumerate(zip(row[1:], order, strict=False), 1):
            caption = f"{place} {'✓' if hits[i, j] else '✗'}\nid {gallery.pids[j]}\ncam {gallery.camids[j]}"
            show(axis, os.path.join(root, gallery.paths[j]), caption, HIT if hits[i, j] else MISS, 4)
        for axis in row[1 + len(order) :]:
            axis.axis("off")
    return figure


def show(axis: Axes, path: str | None, caption: str = "", colour: str = "black", width: float = 0) -> None:
    """One image of a person in a frame; grey if there is none."""
    axis.imshow(read_image(path, IMAGE) if path else np.full((*IMAGE, 3), 211, np.uint8))
    axis.set(xticks=[], yticks=[])
    axis.set_title(caption, fontsize=10.5)
    axis.spines[:].set(visible=width > 0, color=colour, linewidth=width)


@STYLE
def attention(path: str, dataset: Dataset, root: str, trial=None, persons: int = 4, seed: int = 0) -> Figure:
    """Where the stripes look: images of some test persons in both modalities, and each place's part in its stripe.

    A stripe's feature is the mean of its places; a place's part is its projection on that mean, shown from the least
    of the stripe (0) to the largest (1). ``path``: a checkpoint. ``trial``: of RegDB, or the one it was trained on.
    """
    checkpoint = utils.load_checkpoint(path)
    net, config = network_of(checkpoint, path).eval(), checkpoint.get("config", {})
    size = config.get("img_h", 288), config.get("img_w", 144)
    images = dataset.test(root, trial or config.get("trial") or dataset.trials[0])
    rng = np.random.default_rng(seed)
    chosen = choose(np.intersect1d(*(images.pids[side] for side in (images.thermal, ~images.thermal))), persons, rng)
    title = f"Where the {net.num_parts} stripes look ({name_of_tree(dataset, root)})"
    figure, axes = new_figure(2, 2 * len(chosen), (1.5, 3.0), title)
    figure.supxlabel(wrap(f"checkpoint: {os.path.basename(path)}"), fontsize=9)
    for row, modality, side in zip(axes, ("visible", "thermal"), (~images.thermal, images.thermal), strict=True):
        for k, pid in enumerate(chosen):
            image = rng.choice(np.flatnonzero(side & (images.pids == pid)))
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
                overlay.axhline(bound * size[0] - 0.5, color="white", linestyle="-", linewidth=1.2)
            for axis in (plain, overlay):
                axis.set(xticks=[], yticks=[])
        row[0].set_ylabel("visible" if modality == "visible" else "infrared")
    bar = figure.colorbar(shown, ax=axes, ticks=[0, 1], label="how much a place adds to its stripe's feature")
    bar.ax.set_yticklabels(["least of\nthe stripe", "most of\nthe stripe"])
    bar.solids.set_alpha(1)
    return figure


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


@STYLE
def samples(dataset: Dataset, root: str, persons: int = 8, per_camera: int = 1, seed: int = 0) -> Figure:
    """Test persons x cameras, ``per_camera`` images of each; grey where a person was not seen."""
    images, rng = dataset.test(root, dataset.trials[0]), np.random.default_rng(seed)
    chosen = choose(images.pids, persons, rng)
    columns = sorted({*zip(images.camids.tolist(), images.thermal.tolist(), strict=True)})
    title = f"Test persons ({name_of_tree(dataset, root)})"
    figure, axes = new_figure(len(chosen), len(columns) * per_camera, (0.95, 1.9), title)
    for row, pid in zip(axes, chosen, strict=True):
        for k, (cam, thermal) in enumerate(columns):
            own = (images.pids == pid) & (images.camids == cam) & (images.thermal == thermal)
            seen = [images.paths[i] for i in rng.permutation(np.flatnonzero(own))[:per_camera]]
            for axis, path in zip(row[k * per_camera :], seen + [None] * (per_camera - len(seen)), strict=False):
                show(axis, path)
        row[0].set_ylabel(pid, rotation=0, labelpad=20)
    for axis, (cam, thermal) in zip(axes[0, ::per_camera], columns, strict=True):
        axis.set_title(f"cam{cam}\n{'infrared' if thermal else 'visible'}", fontsize=10.5, loc="left")
    return figure


# ---- command line ---------------------------------------------------------------------------------------------------

COMMANDS = {  # what each draws, and from which files
    curves: "[LABEL=]RUN",
    cmc: "[LABEL=]RESULT.json",
    embedding: "[LABEL=]FEATURES.npz",
    distances: "[LABEL=]FEATURES.npz",
    ranked: "FEATURES.npz",
    attention: "CHECKPOINT",
    samples: "",
}
OPTIONS = {  # flags of those whose function has such a parameter, with its default
    "method": {"choices": ["tsne", "pca"], "help": "projection (%(default)s)"},
    "persons": {"type": int, "help": "persons to show (%(default)s)"},
    "per_camera": {"type": int, "help": "images of a person in a camera (%(default)s)"},
    "rows": {"type": int, "help": "how many of the best, of random and of the worst queries (%(default)s)"},
    "trial": {"type": int, "help": "RegDB's trial (the checkpoint's)"},
    "seed": {"type": int, "help": "seed of all that is random (%(default)s)"},
}


def build_parser() -> utils.Parser:
    parser = utils.Parser(prog="python -m tools.visualize", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for draw, files in COMMANDS.items():
        own = commands.add_parser(draw.__name__, description=draw.__doc__.partition("\n")[0])
        own.set_defaults(draw=draw)
        add = own.add_argument
        add("--out", default=f"{draw.__name__}.png", help="file to write: .png, .jpg, .pdf or .svg (%(default)s)")
        if files:
            add("files", nargs="+" if "LABEL" in files else 1, metavar=files)
        if "RESULT" in files or "FEATURES" in files:
            add("--features", default="fc", help="kind of features (%(default)s)")
        if draw not in (curves, cmc):
            add("--dataset", choices=[*DATASETS], default="sysu", help="dataset (%(default)s)")
        if draw in (ranked, attention, samples):
            add("--data_path", metavar="TREE", help=f"folder of the dataset ({utils.by_dataset('data_path')})")
        if draw is ranked:
            utils.add_search_flags(add)
        for option, parameter in inspect.signature(draw).parameters.items():
            if option in OPTIONS:
                add(f"--{option}", default=parameter.default, **OPTIONS[option])
    return parser


def inputs(args: argparse.Namespace) -> tuple:
    """What the picture of a command is drawn from."""
    if args.draw is samples:
        return DATASETS[args.dataset], args.data_path
    if args.draw is attention:
        return *args.files, DATASETS[args.dataset], args.data_path
    files = labelled(args.files)
    if args.draw is curves:
        return ({label: read_metrics(path) for label, path in files.items()},)
    if args.draw is cmc:
        results = {label: read_results(path) for label, path in files.items()}
        check_alike(results, args.features)
        return results, args.features
    features = {label: read_features(path, DATASETS[args.dataset], args.features) for label, path in files.items()}
    if args.draw is ranked:
        (own,) = features.values()
        return own, own.search(vars(args)), args.data_path
    return (features,)


def main() -> None:
    args = build_parser().parse_args()
    figure = args.draw(*inputs(args), **{option: vars(args)[option] for option in OPTIONS if option in args})
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    figure.savefig(args.out)
    print(args.out)


if __name__ == "__main__":
    utils.run(main)
