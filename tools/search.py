"""Find the person of each query image among gallery images, without labels.

    python -m tools.search CHECKPOINT --query DIR --gallery DIR --out DIR
    python -m tools.search CHECKPOINT --query DIR --gallery features.npz --out DIR

The images are those in a folder and its sub-folders, whatever their names. Queries are infrared and
the gallery is visible, unless --query-modality and --gallery-modality say otherwise. The tool
writes to --out:

    ranking.csv     the --top gallery images of each query, by the cosine of their fc features
    search.html     the first --show queries with their nearest images; one file, for any browser
    features.npz    the features of the gallery, which --gallery takes in place of its folder

--gallery also takes a file of test.py --save-features. To embed images in Python:

    from tools.search import Embedder
    embed = Embedder("run_last.t")
    features = embed(paths, "thermal")  # (N, 3072) float32, as the fc features of test.py
"""

import argparse
import base64
import csv
import html
import io
import json
import logging
import os
import string
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

# `python tools/search.py` would search for modules in tools/ alone.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from data_loader import ImageBatches, read_image
from data_manager import LeftOut, Split, images_below
from model import digest_of_weights, extract_features, load_network, to_device
from tools.score import malformed, parse_network, read_arrays
from utils import InputError

MODALITIES = {"visible": "visible", "thermal": "infrared"}  # the flags' values, and in prose
PUBLISHED_SIZE = (288, 144)  # height and width; published checkpoints do not tell them
THUMBNAIL_SIZE = (160, 72)
THUMBNAILS = 10  # gallery images of a query in search.html
SIMILARITIES_AT_ONCE = 2**24

PAGE = string.Template(
    """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; }
body { font: 14px/1.4 system-ui, sans-serif; margin: auto; padding: 1rem; }
.row { display: flex; gap: .5rem; overflow-x: auto; padding: .5rem 0; border-bottom: 1px solid #8888; }
figure { flex: none; width: 72px; margin: 0; }
figure:first-child { padding-right: 1rem; }
img, .gone { width: 72px; height: 160px; display: block; }
.gone { background: #8884; }
figcaption { font-size: 11px; overflow-wrap: anywhere; }
</style>
<h1>$title</h1>
<p>$text</p>
$rows
</html>
"""  # noqa: E501
)

log = logging.getLogger(__name__)


# ---- embedding images ---------------------------------------------------------------------------


class Embedder:
    """Computes the fc features of image files, as test.py does.

    Args:
        checkpoint: file of train.py, or a published one.
        size: (height, width) of the images; None: the checkpoint's, or 288 x 144 where it does not
            tell them.
        gpu: number of the GPU; without any GPU the CPU is used.
        batch_size: images that are embedded at a time.
        workers: processes that read images; None: one for each processor, at most 8.

    Raises:
        InputError: the checkpoint cannot be read, is of another method, or of another image size.
        ValueError: ``batch_size`` is below 1.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        size: tuple[int, int] | None = None,
        gpu: int = 0,
        batch_size: int = 64,
        workers: int | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} is below 1")
        self.path = os.path.expanduser(checkpoint)
        content = utils.load_checkpoint(self.path)
        self.size = image_size(content["config"], self.path, size)
        self.batch_size = batch_size
        self.workers = utils.default_workers() if workers is None else workers
        self.device = utils.select_device(gpu)
        self.net = load_network(content, self.path)
        self.digest = digest_of_weights(self.net)
        self.net = to_device(self.net, self.device)

    def __call__(self, paths: Iterable[str | Path], modality: str) -> np.ndarray:
        """Embed images of one modality.

        Args:
            paths: N image files.
            modality: "visible" or "thermal" (infrared).

        Returns:
            (N, num_parts * low_dim) float32; the part of each stripe has the length 1.

        Raises:
            InputError: an image cannot be read.
        """
        features, _ = self.embed(paths, modality, skip_unreadable=False)
        return features

    def embed(
        self, paths: Iterable[str | Path], modality: str, skip_unreadable: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Embed images as a call does, but leave out those that cannot be read, with a warning.

        Returns:
            The features of the N images that can be read, and their (N,) indices in ``paths``.
        """
        if modality not in MODALITIES:
            raise ValueError(f"modality {modality!r} is not visible or thermal")
        if isinstance(paths, str | Path):
            raise TypeError(f"paths is one path, {paths}: give a list of paths")
        paths = [os.path.expanduser(path) for path in paths]
        n_images = len(paths)
        unknown = np.zeros(n_images, np.int64)
        images = Split(paths, unknown, unknown, np.full(n_images, modality == "thermal"))
        batches = ImageBatches(
            images,
            self.size,
            self.batch_size,
            self.workers,
            self.device,
            skip_unreadable=skip_unreadable,
        )
        bar = tqdm(batches, f"embed {n_images} {modality} images", disable=None, leave=False)
        features = extract_features(self.net, bar, n_images, kinds=("fc",))["fc"]
        readable = np.arange(n_images)
        if batches.unreadable:
            readable = np.setdiff1d(readable, batches.unreadable)
            features = features[readable]
        return features, readable

    def description(self) -> dict:
        """Return what a file of features tells of the network."""
        height, width = self.size
        return {
            "checkpoint": self.path,
            "weights": self.digest,
            "img_h": height,
            "img_w": width,
        }


def image_size(config: dict, path: str, wanted: tuple[int, int] | None) -> tuple[int, int]:
    """Return the (height, width) of a checkpoint's images. InputError: others are wanted."""
    if wanted is not None:
        wanted = tuple(wanted)
    if "img_h" not in config or "img_w" not in config:
        if wanted is None:
            log.warning("%s does not tell the size of its images: 288 x 144 is used", path)
        return wanted or PUBLISHED_SIZE
    size = (config["img_h"], config["img_w"])
    if wanted not in (None, size):
        raise InputError(
            f"{path} was trained with images of {size[0]} x {size[1]}, "
            f"not {wanted[0]} x {wanted[1]} (height x width)"
        )
    return size


# ---- images and their features ------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """N images of one modality, and their features."""

    names: list[str]  # paths below ``root``, with / between folders
    root: str  # their folder; "" if it is not known
    features: np.ndarray  # (N, dim)

    def file(self, i: int) -> str:
        """The path of an image's file."""
        return os.path.join(self.root, self.names[i])


def list_folder(folder: str, flag: str) -> list[str]:
    """List the image files in a folder and its sub-folders. InputError: there are none."""
    if not os.path.isdir(folder):
        raise InputError(f"{flag} {folder} is not a folder")
    left_out = LeftOut(flag)
    paths = images_below(folder, left_out)
    left_out.warn()
    if not paths:
        raise InputError(f"{flag} {folder} holds no image file")
    return paths


def embed_folder(
    folder: str, paths: list[str], modality: str, embed: Embedder, strict: bool
) -> Images:
    """Embed the images of a folder. InputError: none can be read, or with ``strict`` not all."""
    features, readable = embed.embed(paths, modality, skip_unreadable=not strict)
    n_left_out = len(paths) - len(readable)
    if n_left_out:
        log.warning("%s: %d of %d images cannot be read: left out", folder, n_left_out, len(paths))
    if not len(readable):
        raise InputError(f"{folder}: no image can be read")
    names = [os.path.relpath(paths[i], folder).replace(os.sep, "/") for i in readable]
    return Images(names, os.path.abspath(folder), features)


def save_features(path: str, images: Images, modality: str, embed: Embedder) -> None:
    """Write the features of a gallery for later searches."""
    network = embed.description() | {"data_path": images.root}
    with utils.atomic_write(path) as partial, open(partial, "wb") as file:
        np.savez(
            file,
            paths=np.array(images.names),
            thermal=np.full(len(images.names), modality == "thermal"),
            fc=images.features,
            network=json.dumps(network),
        )


def load_features(path: str, modality: str, embed: Embedder) -> Images:
    """Read the images of one modality from a file of this tool or of test.py --save-features.

    Raises:
        InputError: it is no such file, it has no such images, or another network made it.
    """
    arrays = read_arrays(path, ("paths", "thermal", "fc", "network"))
    network = parse_network(path, arrays.get("network"))
    check_network(path, network, embed)
    root = network.get("data_path")
    paths = arrays.get("paths")
    thermal = arrays.get("thermal")
    features = arrays.get("fc")
    dim = embed.net.feature_dims["fc"]
    if not are_columns(paths, thermal, features, dim) or not isinstance(root, str):
        raise malformed(path, "its network, paths, thermal and fc are not as this tool writes them")
    rows = np.flatnonzero(thermal == (modality == "thermal"))
    if not len(rows):
        raise InputError(f"{path} holds no {modality} images: give another --gallery-modality")
    if len(rows) < len(paths):
        paths = paths[rows]
        features = features[rows]
    try:
        names = paths.tolist()
    except ValueError as error:  # numpy reads any number as a character
        raise malformed(path, utils.short_reason(error)) from error
    if any("\0" in name for name in (root, *names)):
        raise malformed(path, "a path holds a zero character")
    return Images(names, root, features)


def check_network(path: str, network: dict, embed: Embedder) -> None:
    """Raise InputError unless a file's features are those that ``embed`` computes."""
    if "weights" not in network:
        raise InputError(
            f"{path} does not tell which network made its features: make it anew, by this tool or "
            "by test.py --save-features"
        )
    for name, value in embed.description().items():
        if name != "checkpoint" and network.get(name) != value:
            raise InputError(
                f"{path} holds features of another network or image size than those of "
                f"{embed.path}: give the checkpoint that made them, or the folder of the gallery"
            )
    if network.get("flip"):
        raise InputError(f"{path} holds features of test.py --flip: make them without")


def are_columns(
    paths: np.ndarray | None, thermal: np.ndarray | None, features: np.ndarray | None, dim: int
) -> bool:
    """Return whether these are columns of equal length: (N,) text, (N,) bool, (N, dim) floats."""
    if paths is None or thermal is None or features is None:
        return False
    if paths.dtype.kind != "U" or thermal.dtype.kind != "b" or features.dtype.kind != "f":
        return False
    n_images = paths.size
    if paths.shape != (n_images,) or thermal.shape != (n_images,):
        return False
    if features.shape != (n_images, dim):
        return False
    lengths = norms(features)
    return bool(np.isfinite(lengths).all() and (lengths > 0).all())


# ---- ranking ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranking:
    """The gallery images nearest to each query, the nearest first."""

    indices: list[np.ndarray]  # of each query, into the gallery
    similarities: list[np.ndarray]  # of each query: cosines


def rank(query: Images, gallery: Images, top: int) -> Ranking:
    """Rank the gallery for each query by the cosine of their features, to 6 decimals.

    Ties are in gallery order. An image does not find itself, under whatever name.
    """
    query_norms = norms(query.features)
    gallery_norms = norms(gallery.features)
    gallery_files = {}  # file -> its indices in the gallery
    for i in range(len(gallery.names)):
        gallery_files.setdefault(os.path.realpath(gallery.file(i)), []).append(i)
    ranking = Ranking([], [])
    block = max(1, SIMILARITIES_AT_ONCE // len(gallery.names))
    starts = range(0, len(query.names), block)
    for start in tqdm(starts, "rank", disable=None, leave=False):
        rows = slice(start, start + block)
        similarities = query.features[rows] @ gallery.features.T
        similarities /= query_norms[rows, None]
        similarities /= gallery_norms
        # In further decimals copies of an image differ by the batch that they were in.
        similarities = similarities.round(6)
        for q, row in enumerate(similarities, start):
            itself = gallery_files.get(os.path.realpath(query.file(q)))
            nearest = np.argsort(-row, kind="stable")
            if itself is not None:
                nearest = nearest[~np.isin(nearest, itself)]
            nearest = nearest[:top]
            ranking.indices.append(nearest)
            ranking.similarities.append(row[nearest])
    return ranking


def norms(features: np.ndarray) -> np.ndarray:
    """Return the (N,) lengths of (N, dim) features, without an array of their size."""
    return np.sqrt(np.einsum("nd,nd->n", features, features))


# ---- output -------------------------------------------------------------------------------------


def write_ranking(path: str, query: Images, gallery: Images, ranking: Ranking) -> None:
    """Write ranking.csv: a line for each query and rank."""
    with (
        utils.atomic_write(path) as partial,
        # Names of files need not be UTF-8.
        open(partial, "w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["query", "rank", "gallery", "similarity"])
        for q, name in enumerate(query.names):
            nearest = zip(ranking.indices[q], ranking.similarities[q], strict=True)
            for place, (g, similarity) in enumerate(nearest, start=1):
                writer.writerow([name, place, gallery.names[g], f"{similarity:.6f}"])


def write_page(
    path: str, query: Images, gallery: Images, ranking: Ranking, text: str, show: int
) -> None:
    """Write search.html: the first ``show`` queries with the images nearest to each."""
    rows = []
    for q in range(min(show, len(query.names))):
        figures = [figure_as_html(query.file(q), f"query {query.names[q]}")]
        nearest = zip(ranking.indices[q], ranking.similarities[q], strict=True)
        for place, (g, similarity) in enumerate(nearest, start=1):
            if place > THUMBNAILS:
                break
            caption = f"{place}: {similarity:.3f} {gallery.names[g]}"
            figures.append(figure_as_html(gallery.file(g), caption))
        rows.append(f"<div class=row>{''.join(figures)}</div>")
    page = PAGE.substitute(title="Search", text=html.escape(text), rows="\n".join(rows))
    with (
        utils.atomic_write(path) as partial,
        open(partial, "w", encoding="utf-8", errors="backslashreplace") as file,
    ):
        file.write(page)


def figure_as_html(path: str, caption: str) -> str:
    """A thumbnail with its caption; a grey area if the file is gone or cannot be read."""
    try:
        pixels = read_image(path, THUMBNAIL_SIZE)
    except InputError:
        reason = "cannot be read" if os.path.exists(path) else "the file is gone"
        image = f"<div class=gone>{reason}</div>"
    else:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=85)
        encoded = base64.b64encode(file.getvalue()).decode()
        image = f'<img alt="" src="data:image/jpeg;base64,{encoded}">'
    return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"


# ---- command line -------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = utils.new_parser(__doc__)
    add = parser.add_argument
    checkpoint_help = "file of train.py, or a published one"
    add("checkpoint", type=utils.file_path, metavar="CHECKPOINT", help=checkpoint_help)
    add("--query", type=utils.file_path, required=True, metavar="DIR", help="folder of queries")
    gallery_help = "folder of the gallery, or features of its images, .npz"
    add("--gallery", type=utils.file_path, required=True, metavar="DIR|NPZ", help=gallery_help)
    add("--out", type=utils.file_path, required=True, metavar="DIR", help="folder to write to")
    for name, default in (("query", "thermal"), ("gallery", "visible")):
        modality_help = "thermal is infrared (%(default)s)"
        add(f"--{name}-modality", choices=list(MODALITIES), default=default, help=modality_help)
    top_help = "gallery images of each query in ranking.csv (%(default)s)"
    add("--top", type=utils.positive_int, default=20, help=top_help)
    show_help = "queries in search.html (%(default)s)"
    add("--show", type=utils.non_negative_int, default=100, help=show_help)
    strict_help = "stop at an image that cannot be read, instead of leaving it out"
    add("--strict", action="store_true", help=strict_help)
    size_help = "of a checkpoint that does not tell the size of its images"
    add("--img-h", type=utils.positive_int, help=f"image height, {size_help} (288)")
    add("--img-w", type=utils.positive_int, help=f"image width, {size_help} (144)")
    add("--test-batch", type=utils.positive_int, default=64, help="images a batch (%(default)s)")
    add("--gpu", type=utils.non_negative_int, default=0, help="number of the GPU (%(default)s)")
    workers = utils.default_workers()
    workers_help = "processes that read images (%(default)s)"
    add("--workers", type=utils.non_negative_int, default=workers, help=workers_help)
    return parser


def parse_args() -> argparse.Namespace:
    parser = build_parser()
    args = utils.parse(parser)
    if (args.img_h is None) != (args.img_w is None):
        parser.error("--img-h and --img-w go together")
    args.size = None if args.img_h is None else (args.img_h, args.img_w)
    return args


def main() -> None:
    args = parse_args()
    utils.start_log(args)
    query_paths = list_folder(args.query, "--query")
    features_file = os.path.join(args.out, "features.npz")
    gallery_is_folder = os.path.isdir(args.gallery)
    if not os.path.exists(args.gallery):
        raise InputError(f"--gallery {args.gallery} is not a folder or a file of features")
    if gallery_is_folder:
        gallery_paths = list_folder(args.gallery, "--gallery")
        if os.path.exists(features_file):
            raise InputError(
                f"{features_file} exists already: give it as --gallery, or give another --out"
            )
    os.makedirs(args.out, exist_ok=True)
    if args.query_modality == args.gallery_modality:
        log.warning(
            "queries and gallery are both %s: the method is not trained for that",
            MODALITIES[args.query_modality],
        )

    embed = Embedder(args.checkpoint, args.size, args.gpu, args.test_batch, args.workers)
    # Queries first: they are few, and an error in them shows before the long part.
    query = embed_folder(args.query, query_paths, args.query_modality, embed, args.strict)
    if gallery_is_folder:
        gallery = embed_folder(
            args.gallery, gallery_paths, args.gallery_modality, embed, args.strict
        )
        save_features(features_file, gallery, args.gallery_modality, embed)
    else:
        gallery = load_features(args.gallery, args.gallery_modality, embed)

    ranking = rank(query, gallery, args.top)
    text = (
        f"{len(query.names)} {MODALITIES[args.query_modality]} queries of {args.query}, "
        f"{len(gallery.names)} {MODALITIES[args.gallery_modality]} gallery images of "
        f"{args.gallery}, "
        f"network {args.checkpoint}"
    )
    write_ranking(os.path.join(args.out, "ranking.csv"), query, gallery, ranking)
    page = os.path.join(args.out, "search.html")
    write_page(page, query, gallery, ranking, text, args.show)
    log.info("%s", text)
    log.info("ranking.csv, search.html: %s", args.out)


if __name__ == "__main__":
    utils.run(main)
