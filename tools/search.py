"""Find the person of each query image among gallery images, without labels.

    python -m tools.search CHECKPOINT --query DIR --gallery DIR --out DIR
    python -m tools.search CHECKPOINT --query DIR --gallery features.npz --out DIR

Images are found in a folder and its sub-folders, in any layout. Queries are infrared and the
gallery is visible, unless --query-modality and --gallery-modality say otherwise. The tool writes to
--out:

    ranking.csv     the --top gallery images of each query, by the cosine of their fc features
    search.html     the first --show queries with their nearest images; one file, for any browser
    features.npz    the features of the gallery, if that is a folder

--gallery takes features.npz in place of the folder, so that a gallery is embedded once: a second
search with the same --out has to. It also takes a file of test.py --save-features. Paths in
ranking.csv are below --query and below --gallery; those of a file of test.py are below its
--data-path. To embed images in Python:

    from tools.search import Embedder
    embedder = Embedder("run_last.t")
    features = embedder(paths, "thermal")  # (N, 3072) float32, the fc features of test.py
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
from data_manager import LeftOut, Split, file_identity, images_below
from model import digest_of_weights, extract_features, image_size, load_network, to_device
from tools.features_files import list_paths, malformed, parse_network, read_arrays
from utils import InputError

MODALITIES = {"visible": "visible", "thermal": "infrared"}  # flag value -> word in messages
THUMBNAIL_SIZE = (160, 72)  # height and width
THUMBNAILS = 10  # gallery images of a query in search.html
SIMILARITIES_AT_ONCE = 2**24

PAGE = string.Template(
    """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Search</title>
<style>
:root { color-scheme: light dark; }
body { font: 14px/1.4 system-ui, sans-serif; margin: auto; padding: 1rem; }
.row { display: flex; gap: .5rem; overflow-x: auto; padding: .5rem 0; border-bottom: 1px solid #8888; }
figure { flex: none; width: 72px; margin: 0; }
figure:first-child { padding-right: 1rem; }
img, .missing { width: 72px; height: 160px; display: block; }
.missing { background: #8884; }
figcaption { font-size: 11px; overflow-wrap: anywhere; }
</style>
<h1>Search</h1>
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
        checkpoint_path: file of train.py, or a published one.
        size: (height, width) of the images, if the checkpoint does not record it; None: 288 x 144.
        gpu: number of the GPU; without any GPU the CPU is used.
        batch_size: images that are embedded at a time.
        workers: processes that read images; 0 reads them in this process. Where processes are not
            forked, a program that uses some needs ``if __name__ == "__main__"``.

    Raises:
        InputError: the checkpoint cannot be read, is of another method, or of another image size.
        ValueError: ``batch_size`` is below 1.
    """

    def __init__(
        self,
        checkpoint_path: str | Path,
        size: tuple[int, int] | None = None,
        gpu: int = 0,
        batch_size: int = 64,
        workers: int = 0,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} is below 1")
        self.checkpoint_path = os.path.expanduser(checkpoint_path)
        checkpoint = utils.load_checkpoint(self.checkpoint_path)
        self.size = image_size(checkpoint, self.checkpoint_path, size)
        self.batch_size = batch_size
        self.workers = workers
        self.device = utils.select_device(gpu)
        self.net = load_network(checkpoint, self.checkpoint_path)
        self.net = to_device(self.net, self.device)

    def __call__(self, paths: Iterable[str | Path], modality: str) -> np.ndarray:
        """Embed images of one modality.

        Args:
            paths: N image files.
            modality: "visible" or "thermal" (infrared).

        Returns:
            (N, num_parts * low_dim) float32; the part of each stripe has L2 norm 1.

        Raises:
            InputError: an image cannot be read.
            ValueError: there is no such modality.
            TypeError: ``paths`` is a single path.
        """
        features, _ = self.embed(paths, modality)
        return features

    def embed(
        self, paths: Iterable[str | Path], modality: str, skip_unreadable: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Embed images of one modality, and tell which could be read.

        Args:
            paths, modality: as in a call.
            skip_unreadable: leave out images that cannot be read, with a warning for each.

        Returns:
            The features of the images that could be read, and the indices of these in ``paths``.

        Raises:
            As a call does.
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
        features = extract_features(self.net, bar, n_images, kinds=("fc",), gather_ranks=False)
        readable = np.setdiff1d(np.arange(n_images), batches.unreadable)
        if len(readable) == n_images:  # spares a copy
            return features["fc"], readable
        return features["fc"][readable], readable

    def description(self) -> dict:
        """Return what decides the features of an image: the weights, and the size of images."""
        height, width = self.size
        return {"weights": digest_of_weights(self.net), "img_h": height, "img_w": width}


# ---- images and their features ------------------------------------------------------------------


@dataclass(frozen=True)
class EmbeddedImages:
    """N images of one modality, and their features."""

    names: list[str]  # paths below ``root``, with / between folders
    root: str  # their folder
    features: np.ndarray  # (N, dim)

    def path(self, i: int) -> str:
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
    folder: str, paths: list[str], modality: str, embedder: Embedder, strict: bool
) -> EmbeddedImages:
    """Embed the images of a folder; leave out those that cannot be read, and count them.

    Raises:
        InputError: no image can be read; with ``strict``, one cannot.
    """
    features, readable = embedder.embed(paths, modality, skip_unreadable=not strict)
    n_left_out = len(paths) - len(readable)
    if n_left_out:
        log.warning("%s: %d of %d images cannot be read: left out", folder, n_left_out, len(paths))
    if not len(readable):
        raise InputError(f"{folder}: no image can be read")
    names = [os.path.relpath(paths[i], folder).replace(os.sep, "/") for i in readable]
    return EmbeddedImages(names, os.path.abspath(folder), features)


def save_gallery(path: str, images: EmbeddedImages, modality: str, embedder: Embedder) -> None:
    """Write the features of a gallery for later searches."""
    network = embedder.description()
    network |= {"checkpoint": embedder.checkpoint_path, "data_path": images.root}
    with utils.atomic_write(path) as partial, open(partial, "wb") as file:
        np.savez(
            file,
            paths=np.array(images.names),
            thermal=np.full(len(images.names), modality == "thermal"),
            fc=images.features,
            network=json.dumps(network),
        )


def load_gallery(path: str, modality: str, embedder: Embedder) -> EmbeddedImages:
    """Read the images of one modality from a file of this tool or of test.py --save-features.

    Raises:
        InputError: it is no such file, it has no such images, or another network made it.
    """
    arrays = read_arrays(path, ("paths", "thermal", "fc", "network"))
    if "fc" not in arrays:
        raise InputError(f"{path} has no fc features: make it by test.py --features fc or both")
    network = parse_network(path, arrays.get("network"))
    check_network(path, network, embedder)
    root = network.get("data_path")
    paths = arrays.get("paths")
    thermal = arrays.get("thermal")
    features = arrays["fc"]
    dim = embedder.net.feature_dims["fc"]
    if not isinstance(root, str) or "\0" in root or not are_columns(paths, thermal, features, dim):
        raise malformed(
            path, "network, paths, thermal or fc is missing or of a wrong type or shape"
        )
    wants_thermal = modality == "thermal"
    rows = np.flatnonzero(thermal == wants_thermal)
    if not len(rows):
        raise InputError(
            f"{path} holds no {MODALITIES[modality]} images: give another --gallery-modality"
        )
    if len(rows) < len(paths):  # otherwise a copy of all features is spared
        paths = paths[rows]
        features = features[rows]
    return EmbeddedImages(list_paths(path, paths), root, features)


def check_network(path: str, network: dict, embedder: Embedder) -> None:
    """Raise InputError unless a file's features are those that ``embedder`` computes."""
    if "weights" not in network:
        raise InputError(
            f"{path} does not tell which network made its features: make it anew, by this tool or "
            "by test.py --save-features"
        )
    for name, value in embedder.description().items():
        if network.get(name) != value:
            raise InputError(
                f"{path} holds features of another network or image size than those of "
                f"{embedder.checkpoint_path}: give the checkpoint that made them, or the folder of "
                "the gallery"
            )
    if network.get("flip"):
        raise InputError(f"{path} holds features of test.py --flip: make them without")


def are_columns(
    paths: np.ndarray | None, thermal: np.ndarray | None, features: np.ndarray, dim: int
) -> bool:
    """Return whether these are (N,) text, (N,) bool and (N, dim) floats; no row may be zero."""
    if paths is None or thermal is None:
        return False
    if paths.dtype.kind != "U" or thermal.dtype.kind != "b" or features.dtype.kind != "f":
        return False
    n_images = paths.size
    if paths.shape != (n_images,) or thermal.shape != (n_images,):
        return False
    if features.shape != (n_images, dim):
        return False
    lengths = lengths_of(features)
    return bool(np.isfinite(lengths).all() and (lengths > 0).all())


def lengths_of(features: np.ndarray) -> np.ndarray:
    """Return the (N,) lengths of (N, dim) features, without a temporary (N, dim) array."""
    return np.sqrt(np.einsum("nd,nd->n", features, features))


# ---- ranking ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranking:
    """The gallery images nearest to each query, the nearest first."""

    indices: list[np.ndarray]  # item q: the indices into the gallery of query q's nearest images
    similarities: list[np.ndarray]  # item q: their cosines with query q


def rank(query: EmbeddedImages, gallery: EmbeddedImages, top: int) -> Ranking:
    """Rank the gallery for each query by the cosine of their features, to 6 decimals.

    Ties are in gallery order. A query does not find its own file, under whatever name.
    """
    gallery_indices = indices_by_file(gallery)
    query_lengths = lengths_of(query.features)
    gallery_lengths = lengths_of(gallery.features)
    all_indices = []
    all_similarities = []
    queries_at_once = max(1, SIMILARITIES_AT_ONCE // len(gallery.names))
    starts = range(0, len(query.names), queries_at_once)
    for start in tqdm(starts, "rank", disable=None, leave=False):
        rows = slice(start, start + queries_at_once)
        similarities = query.features[rows] @ gallery.features.T
        similarities /= query_lengths[rows, None]
        similarities /= gallery_lengths
        # Beyond that, copies of an image differ with the batch in which they were embedded.
        similarities = similarities.round(6)
        for q, row in enumerate(similarities, start):
            itself = gallery_indices.get(existing_file(query.path(q)), [])  # none if it is gone
            nearest = np.argsort(-row, kind="stable")
            if itself:
                nearest = nearest[~np.isin(nearest, itself)]
            nearest = nearest[:top]
            all_indices.append(nearest)
            all_similarities.append(row[nearest])
    return Ranking(all_indices, all_similarities)


def indices_by_file(images: EmbeddedImages) -> dict[tuple[int, int], list[int]]:
    """Return {file: indices of the images that it is}, of the files that still exist."""
    indices = {}
    for i in range(len(images.names)):
        file = existing_file(images.path(i))
        if file is not None:
            indices.setdefault(file, []).append(i)
    return indices


def existing_file(path: str) -> tuple[int, int] | None:
    """Return the identity of a file, which is the same for all of its paths; None if it is gone."""
    return file_identity(path) if os.path.exists(path) else None


# ---- output -------------------------------------------------------------------------------------


def write_ranking(
    path: str, query: EmbeddedImages, gallery: EmbeddedImages, ranking: Ranking
) -> None:
    """Write ranking.csv: a line for each query and rank."""
    # Names of files need not be UTF-8.
    with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["query", "rank", "gallery", "similarity"])
        for q, name in enumerate(query.names):
            nearest = zip(ranking.indices[q], ranking.similarities[q], strict=True)
            for position, (g, similarity) in enumerate(nearest, start=1):
                writer.writerow([name, position, gallery.names[g], f"{similarity:.6f}"])


def write_page(
    path: str,
    query: EmbeddedImages,
    gallery: EmbeddedImages,
    ranking: Ranking,
    text: str,
    show: int,
) -> None:
    """Write search.html: the first ``show`` queries with the images nearest to each."""
    rows = []
    for q in tqdm(range(min(show, len(query.names))), "draw", disable=None, leave=False):
        figures = [figure_as_html(query.path(q), f"query {query.names[q]}")]
        nearest = zip(ranking.indices[q], ranking.similarities[q], strict=True)
        for position, (g, similarity) in enumerate(list(nearest)[:THUMBNAILS], start=1):
            caption = f"{position}: {similarity:.3f} {gallery.names[g]}"
            figures.append(figure_as_html(gallery.path(g), caption))
        rows.append(f"<div class=row>{''.join(figures)}</div>")
    page = PAGE.substitute(text=html.escape(text), rows="\n".join(rows))
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(page)


def figure_as_html(path: str, caption: str) -> str:
    """Return a thumbnail with its caption; a grey area if the file is gone or cannot be read."""
    try:
        pixels = read_image(path, THUMBNAIL_SIZE)
    except InputError:
        reason = "cannot be read" if os.path.exists(path) else "the file is gone"
        image = f"<div class=missing>{reason}</div>"
    else:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=85)
        encoded = base64.b64encode(file.getvalue()).decode()
        image = f'<img alt="" src="data:image/jpeg;base64,{encoded}">'
    return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"


# ---- command line -------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = utils.new_parser(__doc__)
    utils.add_checkpoint_flags(parser)
    add = parser.add_argument
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
    add("--test-batch", type=utils.positive_int, default=64, help="images a batch (%(default)s)")
    add("--gpu", type=utils.non_negative_int, default=0, help="number of the GPU (%(default)s)")
    workers = utils.default_workers()
    workers_help = "processes that read images (%(default)s)"
    add("--workers", type=utils.non_negative_int, default=workers, help=workers_help)
    return parser


def main() -> None:
    args = utils.parse(build_parser())
    if utils.is_distributed():
        raise InputError("tools.search is one process: start it without torchrun")
    utils.start_log(args)
    query_paths = list_folder(args.query, "--query")
    gallery_paths = list_gallery(args)
    size = utils.size_of_flags(args)
    utils.make_writable_folder(args.out, "give another --out")
    if args.query_modality == args.gallery_modality:
        log.warning(
            "queries and gallery are both %s: the method is not trained for that",
            MODALITIES[args.query_modality],
        )

    embedder = Embedder(args.checkpoint, size, args.gpu, args.test_batch, args.workers)
    # To embed a gallery takes longest: whatever can fail comes before it.
    if gallery_paths is None:
        gallery = load_gallery(args.gallery, args.gallery_modality, embedder)
    query = embed_folder(args.query, query_paths, args.query_modality, embedder, args.strict)
    if gallery_paths is not None:
        gallery = embed_folder(
            args.gallery, gallery_paths, args.gallery_modality, embedder, args.strict
        )
        save_gallery(features_file(args), gallery, args.gallery_modality, embedder)

    ranking = rank(query, gallery, args.top)
    text = (
        f"{len(query.names)} {MODALITIES[args.query_modality]} queries of {args.query}, "
        f"{len(gallery.names)} {MODALITIES[args.gallery_modality]} gallery images of "
        f"{args.gallery}, network {args.checkpoint}"
    )
    ranking_file = os.path.join(args.out, "ranking.csv")
    page_file = os.path.join(args.out, "search.html")
    with (  # if writing one fails, neither replaces that of a former search
        utils.atomic_write(ranking_file) as partial_ranking,
        utils.atomic_write(page_file) as partial_page,
    ):
        write_ranking(partial_ranking, query, gallery, ranking)
        write_page(partial_page, query, gallery, ranking, text, args.show)
    log.info("%s", text)
    log.info("ranking.csv, search.html: %s", args.out)


def features_file(args: argparse.Namespace) -> str:
    return os.path.join(args.out, "features.npz")


def list_gallery(args: argparse.Namespace) -> list[str] | None:
    """List the image files of --gallery; None if it is a file of features.

    Raises:
        InputError: it is missing, it has no image, or features of a gallery would be overwritten.
    """
    if os.path.isfile(args.gallery):
        return None
    if not os.path.isdir(args.gallery):
        raise InputError(f"--gallery {args.gallery} is not a folder or a file of features")
    if os.path.exists(features_file(args)):
        raise InputError(
            f"{features_file(args)} exists already: give it as --gallery, or give another --out"
        )
    return list_folder(args.gallery, "--gallery")


if __name__ == "__main__":
    utils.run(main)
