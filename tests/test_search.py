"""tools.search end to end: which image is found, what is left out, what is an error.

The rankings are compared with brute force on the features that test.py saves of the same files.
"""

import base64
import csv
import errno
import io
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RUN, files_of, folder_flags, run_here, small_net
from PIL import Image
from torch import nn

import data_loader
import tools.search
import utils
from data_loader import ImageBatches
from data_manager import Split, sysu_test
from model import EmbedNet, digest_of_weights
from tools.search import Embedder, rank
from utils import InputError

N_QUERIES = 8  # infrared test images of the fixture `sysu_tree`
N_GALLERY = 11  # its visible ones
ROUNDING = 1.1e-6  # of two similarities with 6 decimals


@dataclass(frozen=True)
class Data:
    """A checkpoint, and images that test.py embeds with it."""

    checkpoint: Path
    tree: Path  # a dataset with these images and others
    query: Path  # folder of its infrared test images, at the same paths below it
    gallery: Path  # folder of its visible test images
    saved: Path  # features of both, by test.py --save-features
    flipped: Path  # by test.py --flip


@pytest.fixture(scope="session")
def data(sysu_run, made_once) -> Data:
    checkpoint = sysu_run["models"] / f"{RUN}_last.t"
    tree = sysu_run["data"]

    def make(folder: Path) -> None:
        images = sysu_test(str(tree))
        for path, thermal in zip(images.paths, images.thermal, strict=True):
            target = folder / ("query" if thermal else "gallery") / Path(path).relative_to(tree)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
        flags = ["--resume", checkpoint, "--workers", 0, *folder_flags(tree, folder)]
        run_here("test.py", *flags, "--save-features", folder / "saved.npz")
        run_here("test.py", *flags, "--save-features", folder / "flipped.npz", "--flip")

    folder = made_once("search", make)
    return Data(
        checkpoint=checkpoint,
        tree=tree,
        query=folder / "query",
        gallery=folder / "gallery",
        saved=folder / "saved.npz",
        flipped=folder / "flipped.npz",
    )


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def command(data, out) -> Callable[..., list]:
    """(flags, query, gallery, checkpoint, out): a search. Without values: of `data`, to `out`."""

    def build(*flags, **paths: Path) -> list:
        return [
            "-m tools.search",
            paths.get("checkpoint", data.checkpoint),
            "--query",
            paths.get("query", data.query),
            "--gallery",
            paths.get("gallery", data.gallery),
            "--out",
            paths.get("out", out),
            "--workers",
            0,
            *flags,
        ]

    return build


@pytest.fixture
def search(command, output_of) -> Callable[..., str]:
    """Search as `command` says; gives what was printed."""

    def run(*flags, **paths: Path) -> str:
        return output_of(*command(*flags, **paths))

    return run


@pytest.fixture
def search_error(command, error_of) -> Callable[..., str]:
    """As `search`, which has to fail without a new or changed file; gives the error."""

    def run(*flags, **paths: Path) -> str:
        return error_of(*command(*flags, **paths))

    return run


Ranking = dict[str, list[tuple[str, float]]]  # {query: [(gallery image, similarity)]}


def ranking_in(folder: Path) -> Ranking:
    """What ranking.csv holds. The ranks of each query must be 1, 2, ..."""
    text = (folder / "ranking.csv").read_bytes().decode("utf-8")
    header, *rows = csv.reader(io.StringIO(text, newline=""))
    assert header == ["query", "rank", "gallery", "similarity"]
    ranking = {}
    for query, place, name, similarity in rows:
        ranking.setdefault(query, []).append((name, float(similarity)))
        assert int(place) == len(ranking[query])
        assert len(similarity.partition(".")[2]) == 6
    return ranking


def assert_close(actual: Ranking, expected: Ranking) -> None:
    """The queries and the images are the same, in the same order; similarities within 1e-6."""
    assert list(actual) == list(expected)
    for query, nearest in expected.items():
        assert [name for name, _ in actual[query]] == [name for name, _ in nearest]
        similarities = [similarity for _, similarity in actual[query]]
        assert similarities == pytest.approx([value for _, value in nearest], abs=ROUNDING)


def brute_force(file: Path, query_thermal: bool = True, gallery_thermal: bool = False) -> Ranking:
    """Rank the images in a file of features, in float64; none finds itself."""
    arrays = np.load(file)
    rows = np.argsort(arrays["paths"])
    names = arrays["paths"].tolist()
    thermal = arrays["thermal"]
    fc = arrays["fc"].astype(np.float64)
    ranking = {}
    for q in rows[thermal[rows] == query_thermal]:
        nearest = []
        for g in rows[thermal[rows] == gallery_thermal]:
            if g != q:
                cosine = fc[q] @ fc[g] / np.sqrt((fc[q] @ fc[q]) * (fc[g] @ fc[g]))
                nearest.append((names[g], float(cosine)))
        ranking[names[q]] = sorted(nearest, key=lambda pair: -pair[1])
    return ranking


class Page(HTMLParser):
    """What a browser shows of search.html: tags, texts, and the thumbnails, decoded.

    It must need no other file.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self.tag = ""  # the last that was opened
        self.tags = set()
        self.texts = []
        self.thumbnails = []
        content = (folder / "search.html").read_text(encoding="utf-8")
        without_images = re.sub('base64,[^"]*', "", content)
        for word in ("http", "url(", "@import"):
            assert word not in without_images
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tag = tag
        self.tags.add(tag)
        values = dict(attrs)
        assert "href" not in values
        if "src" in values:
            encoded = values["src"].removeprefix("data:image/jpeg;base64,")
            image = Image.open(io.BytesIO(base64.b64decode(encoded, validate=True)))
            assert image.format == "JPEG"
            self.thumbnails.append(np.asarray(image))

    def handle_data(self, data: str) -> None:
        if self.tag != "style":
            self.texts.append(data)

    def has_text(self, *parts: str) -> bool:
        """Whether one text holds all of these parts."""
        texts = self.texts
        for part in parts:
            texts = [text for text in texts if part in text]
        return bool(texts)


def make_image(path: Path | str | bytes, seed: int, size: tuple[int, int] = (40, 24)) -> None:
    """Save noise, which no other seed gives; the suffix of ``path`` tells the format."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    path = os.fsdecode(path)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def make_images(folder: Path, n_images: int) -> Path:
    for i in range(n_images):
        make_image(folder / f"{i:03d}.png", seed=i)
    return folder


def names_below(folder: Path) -> list[str]:
    """The paths of all files below a folder, with / between folders, in sorted order."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return sorted(file.relative_to(folder).as_posix() for file in files)


# ---- rankings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["gallery", "saved"])
def test_the_ranking_is_that_of_brute_force(data, search, out, source):
    """The images in a folder, and those of the gallery's modality in a file of test.py."""
    printed = search(gallery=getattr(data, source))
    assert "not trained" not in printed
    expected = brute_force(data.saved)
    assert [len(expected), len(expected[min(expected)])] == [N_QUERIES, N_GALLERY]
    assert_close(ranking_in(out), expected)


@pytest.mark.parametrize(
    ("folder", "modality", "thermal"), [("query", "thermal", True), ("gallery", "visible", False)]
)
def test_one_modality_is_searched_in_itself_with_a_warning(
    data, search, tmp_path, folder, modality, thermal
):
    expected = brute_force(data.saved, query_thermal=thermal, gallery_thermal=thermal)
    images = getattr(data, folder)
    flags = ["--query-modality", modality, "--gallery-modality", modality]
    for source in (images, data.saved):
        out = tmp_path / source.name
        assert "not trained" in search(*flags, query=images, gallery=source, out=out)
        ranking = ranking_in(out)
        if source == images:
            assert_close(ranking, expected)
        for query, nearest in ranking.items():
            similarities = dict(nearest)
            for name, similarity in expected[query]:
                assert similarities[name] == pytest.approx(similarity, abs=ROUNDING)


def test_the_modalities_may_change_places(data, search, out):
    flags = ["--query-modality", "visible", "--gallery-modality", "thermal"]
    search(*flags, query=data.gallery, gallery=data.query)
    expected = brute_force(data.saved, query_thermal=False, gallery_thermal=True)
    assert_close(ranking_in(out), expected)


@pytest.mark.parametrize("top", [1, 5, 1000])
def test_top_limits_the_images_of_each_query(data, search, out, top):
    search("--top", top)
    expected = brute_force(data.saved)
    assert_close(ranking_in(out), {query: expected[query][:top] for query in expected})


def test_ties_are_in_the_order_of_the_gallery():
    """The numbers are such that all sums are exact."""
    names = [f"{i:02d}.jpg" for i in range(40)]
    is_near = np.arange(40) % 3 == 0
    features = np.where(is_near[:, None], [[4.0, 3.0]], [[3.0, 4.0]]).astype(np.float32)
    gallery = tools.search.EmbeddedImages(names, "/g", features)
    query = tools.search.EmbeddedImages(["q.jpg"], "/q", np.array([[2, 0]], np.float32))
    ranking = rank(query, gallery, top=40)
    (indices,) = ranking.indices
    assert indices.tolist() == [*np.flatnonzero(is_near), *np.flatnonzero(~is_near)]
    np.testing.assert_allclose(ranking.similarities[0], np.where(np.arange(40) < 14, 0.8, 0.6))


# The last batch has one image, and features that differ in the last bit, or not, by the processor.
def test_copies_are_equal_and_in_the_order_of_the_gallery(search, out, tmp_path):
    """To the last decimal, which may differ with the batch in which a copy was embedded."""
    gallery = make_images(tmp_path / "gallery", 3)
    for name in ("b/1.png", "a/2.png", "a/1.png", "zz.png"):
        (gallery / name).parent.mkdir(exist_ok=True)
        shutil.copy(gallery / "001.png", gallery / name)
    search("--test-batch", 2, gallery=gallery)
    copies = ["001.png", "a/1.png", "a/2.png", "b/1.png", "zz.png"]
    for nearest in ranking_in(out).values():
        assert len(nearest) == 7
        of_copies = [(-similarity, name) for name, similarity in nearest if name in copies]
        assert of_copies == sorted(of_copies)
        assert len(of_copies) == len(copies)
        assert of_copies[-1][0] - of_copies[0][0] < ROUNDING


def test_a_large_gallery_is_ranked_in_blocks(monkeypatch, tmp_path):
    """In each block, too, an image does not find itself: here query q is gallery image q."""
    rng = np.random.default_rng(0)
    names = [f"{i}.jpg" for i in range(9)]
    for name in names:
        (tmp_path / name).touch()
    root = str(tmp_path)
    gallery = tools.search.EmbeddedImages(names, root, rng.normal(size=(9, 5)))
    query = tools.search.EmbeddedImages(names[:7], root, rng.normal(size=(7, 5)))
    cosines = query.features @ gallery.features.T
    cosines /= np.linalg.norm(query.features, axis=1)[:, None]
    cosines /= np.linalg.norm(gallery.features, axis=1)
    for n_at_once in (1, 20, 2**20):
        monkeypatch.setattr(tools.search, "SIMILARITIES_AT_ONCE", n_at_once)
        ranking = rank(query, gallery, top=4)
        assert len(ranking.indices) == 7
        for q in range(7):
            order = np.argsort(-cosines[q])
            order = order[order != q][:4]
            np.testing.assert_array_equal(ranking.indices[q], order)
            np.testing.assert_allclose(ranking.similarities[q], cosines[q, order], atol=1e-6)


@pytest.mark.parametrize("flags", [["--workers", 2], ["--test-batch", 3], ["--test-batch", 1]])
def test_readers_and_batches_do_not_change_the_ranking(data, search, out, flags):
    search(*flags)
    assert_close(ranking_in(out), brute_force(data.saved))


def test_paths_may_be_relative(data, search, out, tmp_path, monkeypatch):
    """The features tell where the images are, whatever the folder one works in later."""
    shutil.copytree(data.query, tmp_path / "some/query")
    shutil.copytree(data.gallery, tmp_path / "some/gallery")
    monkeypatch.chdir(tmp_path / "some")
    search("--show", 1, query="query", gallery="../some/gallery/", out="../out")
    assert_close(ranking_in(out), brute_force(data.saved))
    monkeypatch.chdir("/")
    search("--show", 1, gallery=out / "features.npz", out=tmp_path / "later")
    assert len(Page(tmp_path / "later").thumbnails) == 11


# ---- an image does not find itself --------------------------------------------------------------

IN_ITSELF = ["--query-modality", "visible", "--gallery-modality", "visible"]


def assert_finds_others(folder: Path, names: list[str]) -> Ranking:
    """Each image finds all images but itself."""
    ranking = ranking_in(folder)
    assert sorted(ranking) == names
    for query, nearest in ranking.items():
        assert sorted([query, *(name for name, _ in nearest)]) == names
    return ranking


def test_a_folder_searched_in_itself_finds_copies(search, tmp_path):
    """Also by its features, and through a link to the folder."""
    folder = make_images(tmp_path / "images", 4)
    (folder / "sub").mkdir()
    shutil.copy(folder / "002.png", folder / "sub/copy.png")
    link = tmp_path / "link"
    link.symlink_to(folder)
    names = names_below(folder)

    searches = {
        "plain": {"query": folder, "gallery": folder},
        "features": {"query": folder, "gallery": tmp_path / "plain/features.npz"},
        "query_link": {"query": link, "gallery": folder},
        "gallery_link": {"query": folder, "gallery": link},
        "features_link": {"query": folder, "gallery": tmp_path / "gallery_link/features.npz"},
    }
    for name, paths in searches.items():
        search(*IN_ITSELF, **paths, out=tmp_path / name)
        ranking = assert_finds_others(tmp_path / name, names)
        assert ranking["002.png"][0] == ("sub/copy.png", 1)
        assert ranking["sub/copy.png"][0] == ("002.png", 1)
        assert [nearest[1][1] < 0.999 for nearest in ranking.values()] == [True] * 5
    plain = (tmp_path / "plain/ranking.csv").read_bytes()
    assert (tmp_path / "features/ranking.csv").read_bytes() == plain


def test_a_part_of_the_dataset_does_not_find_itself_by_features_of_test_py(data, search, out):
    """The names of an image differ: 0002/0001.jpg and cam1/0002/0001.jpg."""
    search(*IN_ITSELF, query=data.tree / "cam1", gallery=data.saved)
    ranking = ranking_in(out)
    names = [path for path in np.load(data.saved)["paths"].tolist() if path.startswith("cam1/")]
    assert names
    for name in names:
        nearest = dict(ranking[name.removeprefix("cam1/")])
        assert name not in nearest
        assert len(nearest) == N_GALLERY - 1


def test_an_image_with_two_names_does_not_find_itself(search, out, tmp_path):
    folder = make_images(tmp_path / "images/a", 3).parent
    (folder / "b").symlink_to(folder / "a")
    search(*IN_ITSELF, query=folder, gallery=folder)
    for query, nearest in ranking_in(out).items():
        names = [name for name, _ in nearest]
        assert len(names) == 4
        assert f"a/{Path(query).name}" not in names
        assert f"b/{Path(query).name}" not in names


def test_an_only_image_finds_nothing(search, out, tmp_path):
    folder = make_images(tmp_path / "images", 1)
    search(*IN_ITSELF, query=folder, gallery=folder)
    assert ranking_in(out) == {}
    assert len(Page(out).thumbnails) == 1


# ---- names and formats --------------------------------------------------------------------------

NAMES = [
    "a, b.jpg",
    'c"d.jpg',
    "e'f.png",
    "two\nlines.jpg",
    " blank .jpg",
    "<script>alert(1)<!-- .jpg",
    "&amp; &lt;.jpg",
    "$title ${text} %s {0}.jpg",
    "~home.jpg",
    "-dash.jpg",
    "back\\slash.jpg",
    "=1+1.jpg",
    "UPPER.JPG",
    "Mixed.JpEg",
    "ümlaut/日本 語/نص/深.webp",
    "cam1/x.jpg.png",
    "x.tif/y.bmp",
]
NOT_UTF8 = b"not \xff\xfe utf-8.jpg"


@pytest.fixture
def odd_folder(tmp_path) -> Path:
    """A folder with images of all `NAMES`, and with one whose name is not UTF-8."""
    folder = tmp_path / "<b> & $text 日本"
    for seed, name in enumerate(NAMES):
        make_image(folder / name, seed)
    make_image(os.fsencode(folder) + b"/" + NOT_UTF8, len(NAMES))
    return folder


def test_any_name_is_found_again(search, odd_folder, out, tmp_path):
    """In ranking.csv, and shown in search.html as it is; by features.npz as by the folder."""
    printed = search("--top", 100, query=odd_folder, gallery=odd_folder)
    assert "left out" not in printed
    names = {*NAMES, os.fsdecode(NOT_UTF8).encode(errors="backslashreplace").decode()}
    ranking = ranking_in(out)
    assert set(ranking) == names
    for query, nearest in ranking.items():
        assert {query, *(name for name, _ in nearest)} == names
        assert len(nearest) == len(NAMES)

    page = Page(out)
    assert not page.tags & {"script", "b", "link", "a", "iframe"}
    assert len(page.thumbnails) == len(names) * 11
    assert page.has_text(str(odd_folder))
    for name in names:
        assert page.has_text("query", name)

    later = tmp_path / "later"
    search("--top", 100, query=odd_folder, gallery=out / "features.npz", out=later)
    assert (later / "ranking.csv").read_bytes() == (out / "ranking.csv").read_bytes()
    assert len(Page(later).thumbnails) == len(page.thumbnails)


def test_the_same_pixels_in_any_format_are_the_same(search, out, tmp_path):
    formats = ["a.png", "b.PNG", "c.bmp", "d.tif", "e.TIFF", "f/g.png"]
    for name in formats:
        make_image(tmp_path / "images" / name, seed=1)
    Image.open(tmp_path / "images/a.png").save(tmp_path / "images/h.webp", lossless=True)
    search(gallery=tmp_path / "images")
    for nearest in ranking_in(out).values():
        assert {name for name, _ in nearest} == {*formats, "h.webp"}
        similarities = [similarity for _, similarity in nearest]
        assert max(similarities) - min(similarities) < 2e-6


def test_other_files_are_named_and_left_out(data, search, out, tmp_path):
    """Hidden files are passed over without a word. A link to a folder above has no end."""
    gallery = shutil.copytree(data.gallery, tmp_path / "gallery")
    for name in ("notes.txt", "cam1/clip.mp4", ".hidden.jpg", "Thumbs.db"):
        (gallery / name).write_text("no image")
    (gallery / "loop").symlink_to(gallery)
    printed = search(gallery=gallery)
    for name in ("notes.txt", "cam1/clip.mp4", "loop"):
        assert f"{gallery}/{name}" in printed
    for name in (".hidden", "Thumbs"):
        assert name not in printed
    assert_close(ranking_in(out), brute_force(data.saved))


# ---- search.html --------------------------------------------------------------------------------


def test_the_page_shows_the_nearest_images_of_the_first_queries(data, search, out):
    search("--show", 3)
    page = Page(out)
    ranking = list(ranking_in(out).items())
    assert len(page.thumbnails) == 3 * 11
    assert {thumbnail.shape for thumbnail in page.thumbnails} == {(160, 72, 3)}
    for query, nearest in ranking[:3]:
        assert page.has_text("query", query)
        for place, (name, similarity) in enumerate(nearest[:10], start=1):
            assert page.has_text(f"{place}", f"{similarity:.3f}", name)
    assert not page.has_text("query", ranking[3][0])

    query, nearest = ranking[2]
    paths = [data.query / query, *(data.gallery / name for name, _ in nearest[:10])]
    for path, thumbnail in zip(paths, page.thumbnails[22:], strict=True):
        pixels = Image.open(path).convert("RGB").resize((72, 160), Image.Resampling.LANCZOS)
        difference = np.asarray(pixels).astype(int) - thumbnail
        assert np.abs(difference).mean() < 4  # that of JPEG; of another image it is above 10


def test_defaults_show_100_queries_and_rank_20_images(search, out, tmp_path):
    query = make_images(tmp_path / "query", 101)
    gallery = make_images(tmp_path / "gallery", 21)
    search(query=query, gallery=gallery)
    ranking = ranking_in(out)
    assert list(ranking) == names_below(query)
    assert {len(nearest) for nearest in ranking.values()} == {20}
    page = Page(out)
    assert len(page.thumbnails) == 100 * 11
    assert page.has_text("query", "099.png")
    assert not page.has_text("query", "100.png")


def test_a_page_without_queries(search, out):
    search("--show", 0)
    assert Page(out).thumbnails == []
    assert len(ranking_in(out)) == N_QUERIES


# ---- features.npz -------------------------------------------------------------------------------


def test_features_serve_for_later_searches(data, search, out, tmp_path):
    """Byte for byte, without the images of the gallery. The page says that they are gone."""
    gallery = shutil.copytree(data.gallery, tmp_path / "gallery")
    search(gallery=gallery)
    expected = (out / "ranking.csv").read_bytes()
    features = out / "features.npz"
    with np.load(features) as arrays, np.load(data.saved) as saved:
        rows = np.argsort(saved["paths"])
        rows = rows[~saved["thermal"][rows]]
        assert set(arrays) == {"paths", "thermal", "fc", "network"}
        assert arrays["paths"].tolist() == saved["paths"][rows].tolist()
        assert arrays["thermal"].tolist() == [False] * N_GALLERY
        assert arrays["fc"].dtype == np.float32
        np.testing.assert_allclose(arrays["fc"], saved["fc"][rows], atol=1e-6)
        network = json.loads(str(arrays["network"]))
        of_test_py = json.loads(str(saved["network"]))
    for name in ("weights", "img_h", "img_w"):
        assert network[name] == of_test_py[name]

    shutil.rmtree(gallery)
    before = files_of(features)
    for folder in (tmp_path / "other", out):  # to another folder, and to the same one
        search(gallery=features, out=folder)
        assert (folder / "ranking.csv").read_bytes() == expected
        page = Page(folder)
        assert len(page.thumbnails) == N_QUERIES
        assert sum("gone" in text for text in page.texts) == N_QUERIES * 10
    assert files_of(features) == before
    assert not (tmp_path / "other/features.npz").exists()


def test_features_of_a_folder_are_not_overwritten(data, search, search_error, out):
    search("--show", 0)
    line = search_error("--show", 0)
    assert f"{out}/features.npz" in line
    assert "--gallery" in line
    assert "--out" in line


def change_features(source: Path, target: Path, changes: dict, **arrays) -> Path:
    """Copy a file of features. ``changes``: of its network; entries that are None go."""
    with np.load(source) as file:
        content = dict(file)
    entries = json.loads(str(content["network"])) | changes
    entries = {name: value for name, value in entries.items() if value is not None}
    content |= {"network": json.dumps(entries)} | arrays
    np.savez(target, **content)
    return target


@pytest.mark.parametrize(
    ("network", "word"),
    [
        ({"weights": "0" * 64}, "network"),
        ({"weights": None}, "--save-features"),
        ({"img_h": 112}, "size"),
        ({"img_w": None}, "size"),
        ({"flip": True}, "--flip"),
    ],
)
def test_features_of_another_network_are_an_error(data, search_error, tmp_path, network, word):
    file = change_features(data.saved, tmp_path / "changed.npz", network)
    line = search_error(gallery=file)
    assert str(file) in line
    assert word in line


def test_features_of_test_py_with_flip_are_an_error(data, search_error):
    line = search_error(gallery=data.flipped)
    assert str(data.flipped) in line
    assert "--flip" in line


@pytest.mark.parametrize("change", ["weight", "size"])
def test_features_need_the_checkpoint_that_made_them(data, search_error, tmp_path, change):
    """One weight that changed a little is enough."""
    content = torch.load(data.checkpoint)
    if change == "weight":
        content["net"]["thermal_net.thermal.0.weight"][0, 0, 0, 0] += 1e-6
    else:
        content["config"]["img_h"] = 112
    torch.save(content, tmp_path / "other.t")
    line = search_error(gallery=data.saved, checkpoint=tmp_path / "other.t")
    assert f"{data.saved} " in line
    assert f"{tmp_path}/other.t" in line


def test_features_without_images_of_the_modality_are_an_error(data, search, search_error, out):
    search("--show", 0)
    line = search_error("--gallery-modality", "thermal", gallery=out / "features.npz")
    assert f"{out}/features.npz" in line
    assert "--gallery-modality" in line


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-200])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def write_text(file: Path) -> None:
    file.write_text("no features")


@pytest.mark.parametrize("damage", [cut, flip_a_bit, write_text])
def test_damaged_features_are_an_error(data, search_error, tmp_path, damage):
    file = shutil.copy(data.saved, tmp_path / "damaged.npz")
    damage(Path(file))
    assert str(file) in search_error(gallery=file)


N_SAVED = N_QUERIES + N_GALLERY
SHAPES = {
    "one path less": {"paths": np.array(["a"] * (N_SAVED - 1))},
    "numbers as paths": {"paths": np.arange(N_SAVED)},
    "numbers as modalities": {"thermal": np.zeros(N_SAVED, int)},
    "whole numbers as features": {"fc": np.ones((N_SAVED, 96), int)},
    "one dimension": {"fc": np.ones(N_SAVED, np.float32)},
    "not finite": {"fc": np.full((N_SAVED, 96), np.nan, np.float32)},
    "network is a list": {"network": "[]"},
    "network is no JSON": {"network": "{"},
    "no images": {
        "paths": np.array([], str),
        "thermal": np.array([], bool),
        "fc": np.ones((0, 96), np.float32),
    },
}


@pytest.mark.parametrize("name", SHAPES)
def test_features_of_other_shapes_are_an_error(data, search_error, tmp_path, name):
    file = change_features(data.saved, tmp_path / "changed.npz", {}, **SHAPES[name])
    assert str(file) in search_error(gallery=file)


@pytest.mark.parametrize(
    ("network", "arrays"),
    [
        ({}, {"fc": np.ones((N_SAVED, 50), np.float32)}),
        ({}, {"paths": np.array(["a\0b"] * N_SAVED)}),
        ({"data_path": "a\0b"}, {}),
    ],
)
def test_features_that_others_wrote_are_an_error(data, search_error, tmp_path, network, arrays):
    """Of another dimension, and with zeros in their paths."""
    file = change_features(data.saved, tmp_path / "changed.npz", network, **arrays)
    assert str(file) in search_error(gallery=file)


# ---- images that cannot be read -----------------------------------------------------------------

UNREADABLE = ["cut.jpg", "empty.png", "link.jpg", "text.jpg", "wide.png", "wide.tif"]


def add_unreadable(folder: Path) -> list[Path]:
    """Add damaged images to the end of a folder; return their paths."""
    bad = folder / "z"
    bad.mkdir(parents=True, exist_ok=True)
    make_image(bad / "cut.jpg", seed=0)
    content = (bad / "cut.jpg").read_bytes()
    (bad / "cut.jpg").write_bytes(content[: len(content) // 2])
    (bad / "empty.png").touch()
    (bad / "link.jpg").symlink_to("nowhere.jpg")
    (bad / "text.jpg").write_text("no image")
    wide = Image.fromarray(np.full((40, 24), 999, np.uint16))
    wide.save(bad / "wide.png")
    wide.save(bad / "wide.tif")
    paths = [bad / name for name in UNREADABLE]
    assert sorted(bad.iterdir()) == paths
    return paths


@pytest.fixture(params=["query", "gallery"])
def damaged(request, data, tmp_path) -> tuple[str, Path, list[Path]]:
    """The queries or the gallery: its name, a copy of it with damaged images, their paths."""
    role = request.param
    folder = shutil.copytree(getattr(data, role), tmp_path / role)
    return role, folder, add_unreadable(folder)


@pytest.mark.parametrize("flags", [[], ["--workers", 2], ["--test-batch", 2]])
def test_unreadable_images_are_named_and_left_out(data, search, damaged, out, flags):
    """Whole batches of them, too. The ranking is that without them."""
    role, folder, paths = damaged
    printed = search(*flags, **{role: folder})
    warnings = [line for line in printed.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == len(paths) + 1
    for path, warning in zip(paths, warnings, strict=False):
        assert f"{path} " in warning
        assert "--data-path" not in warning or path.name == "link.jpg"
    n_images = {"query": N_QUERIES, "gallery": N_GALLERY}[role] + len(paths)
    assert f"{len(paths)} of {n_images} images" in warnings[-1]
    assert f"{folder}: " in warnings[-1]
    assert_close(ranking_in(out), brute_force(data.saved))
    assert len(np.load(out / "features.npz")["paths"]) == N_GALLERY


def test_unreadable_images_may_be_first_and_between(data, search, out, tmp_path):
    gallery = shutil.copytree(data.gallery, tmp_path / "gallery")
    bad = ["a.jpg", "cam1/z.jpg", "cam2/0002/0000.jpg", "cam4/0.jpg"]
    for name in bad:
        (gallery / name).parent.mkdir(exist_ok=True, parents=True)
        (gallery / name).touch()
    printed = search("--test-batch", 3, gallery=gallery)
    for name in bad:
        assert f"{gallery}/{name} " in printed
    assert_close(ranking_in(out), brute_force(data.saved))


def test_strict_makes_unreadable_images_an_error(data, search_error, damaged, out):
    role, folder, paths = damaged
    gallery = {"query": data.saved, "gallery": folder}[role]
    query = {"query": folder, "gallery": data.query}[role]
    line = search_error("--strict", query=query, gallery=gallery)
    assert f"{paths[0]} " in line
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("flags", [["--strict"], []])
def test_an_error_of_the_queries_leaves_no_features(search, search_error, out, tmp_path, flags):
    """Otherwise the same command, once the queries are repaired, is an error."""
    query = tmp_path / "query"
    add_unreadable(query)
    search_error(*flags, query=query)
    make_image(query / "good.png", seed=0)
    search(query=query)
    assert list(ranking_in(out)) == ["good.png"]


def test_strict_accepts_what_can_be_read(data, search, out):
    search("--strict")
    assert_close(ranking_in(out), brute_force(data.saved))


@pytest.mark.parametrize("role", ["query", "gallery"])
def test_a_folder_without_a_readable_image_is_an_error(data, search_error, tmp_path, role):
    folder = tmp_path / "bad"
    add_unreadable(folder)
    paths = {"gallery": data.saved} | {role: folder}
    line = search_error("--test-batch", 2, **paths)
    assert f"{folder}: " in line
    assert "no image" in line


def test_batches_without_unreadable_images_keep_their_indices(tmp_path, caplog):
    """Of both modalities, in any order; a batch without any image is left out."""
    bad = [str(path) for path in add_unreadable(tmp_path)]
    good = [str(tmp_path / f"{i}.png") for i in range(5)]
    for seed, path in enumerate(good):
        make_image(path, seed)
    paths = [bad[0], good[0], bad[1], good[1], bad[2], good[2], bad[3], good[3], good[4]]
    thermal = np.array([1, 0, 0, 1, 1, 0, 0, 1, 0], bool)
    unknown = np.zeros(9, np.int64)
    split = Split(paths, unknown, unknown, thermal)
    arguments = (split, (96, 32), 2, 0, torch.device("cpu"))

    batches = ImageBatches(*arguments, skip_unreadable=True)
    with caplog.at_level(logging.WARNING):
        yielded = list(batches)
    seen = [(modality, indices.tolist()) for modality, indices, _ in yielded]
    # Thermal are 0, 3, 4, 7 and visible 1, 2, 5, 6, 8; the even numbers below 8 are unreadable.
    expected = [("thermal", [3]), ("thermal", [7]), ("visible", [1]), ("visible", [5])]
    assert seen == [*expected, ("visible", [8])]
    assert sorted(batches.unreadable) == [0, 2, 4, 6]
    assert len(caplog.messages) == 4
    for _, indices, images in yielded:
        (index,) = indices
        alone = Split([paths[index]], unknown[:1], unknown[:1], thermal[[index]])
        ((_, _, expected_images),) = ImageBatches(alone, *arguments[1:])
        torch.testing.assert_close(images, expected_images, rtol=0, atol=0)

    in_one = ImageBatches(split, (96, 32), 9, 0, torch.device("cpu"), skip_unreadable=True)
    seen = [(modality, indices.tolist(), len(images)) for modality, indices, images in in_one]
    assert seen == [("thermal", [3, 7], 2), ("visible", [1, 5, 8], 3)]
    assert sorted(in_one.unreadable) == [0, 2, 4, 6]

    whole = ImageBatches(Split(bad[:2], *[unknown[:2]] * 2, thermal[:2]), *arguments[1:])
    whole.skip_unreadable = True
    assert list(whole) == []
    with pytest.raises(InputError, match=bad[0]):
        list(ImageBatches(*arguments))


# ---- Embedder -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embed(data) -> Embedder:
    return Embedder(data.checkpoint, batch_size=3, workers=0)


@pytest.mark.parametrize(
    ("modality", "folder", "type_of_path"),
    [("thermal", "query", str), ("visible", "gallery", Path)],
)
def test_embedder_gives_the_features_of_test_py(data, embed, modality, folder, type_of_path):
    """In the order of the paths, whatever it is, and as often as an image is named."""
    arrays = np.load(data.saved)
    rows = np.flatnonzero(arrays["thermal"] == (modality == "thermal"))
    rows = np.random.default_rng(0).permutation([*rows, *rows[:4]])
    paths = [type_of_path(getattr(data, folder) / arrays["paths"][row]) for row in rows]
    features = embed(paths, modality)
    assert features.dtype == np.float32
    assert features.shape == (len(rows), 6 * 16)
    np.testing.assert_allclose(features, arrays["fc"][rows], rtol=0, atol=1e-6)
    lengths = np.linalg.norm(features.reshape(-1, 6, 16), axis=2)
    np.testing.assert_allclose(lengths, 1, atol=1e-5)
    np.testing.assert_array_equal(embed(iter(paths), modality), features)


def test_embedder_of_no_paths(embed):
    assert embed([], "visible").shape == (0, 6 * 16)


def test_embedder_takes_the_modality_as_it_is_called_in_code(data, embed):
    paths = [data.query / name for name in names_below(data.query)]
    with pytest.raises(ValueError, match="infrared"):
        embed(paths, "infrared")
    difference = np.abs(embed(paths, "thermal") - embed(paths, "visible"))
    assert difference.max() > 0.1


def test_embedder_names_images_that_it_cannot_read(data, embed, tmp_path):
    good = data.query / names_below(data.query)[0]
    for path in [*add_unreadable(tmp_path), tmp_path / "missing.jpg"]:
        with pytest.raises(InputError, match=str(path)):
            embed([good, path, good], "thermal")


def test_embedder_knows_the_size_of_the_images(data):
    assert Embedder(data.checkpoint).size == (96, 32)
    assert Embedder(data.checkpoint, size=(96, 32)).size == (96, 32)
    with pytest.raises(InputError, match="96 x 32"):
        Embedder(data.checkpoint, size=(32, 96))


def test_embedder_takes_the_size_as_a_list(data):
    assert Embedder(data.checkpoint, size=[96, 32]).size == (96, 32)


def test_embedder_rejects_batches_of_less_than_an_image(data):
    good = data.query / names_below(data.query)[0]
    with pytest.raises(ValueError, match="-1"):
        Embedder(data.checkpoint, batch_size=-1, workers=0)([good], "thermal")


# ---- published checkpoints ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def published() -> tuple[EmbedNet, dict]:
    """A network, and its checkpoint as the original code writes it: without a config."""
    torch.manual_seed(0)
    net = small_net().eval()
    return net, {"net": net.state_dict(), "cmc": np.zeros(20), "mAP": 0.1, "epoch": 3}


@pytest.mark.parametrize(
    ("flags", "size"), [([], (288, 144)), (["--img-h", 112, "--img_w", 48], (112, 48))]
)
def test_published_checkpoints_do_not_tell_the_size(
    published, search, search_error, out, tmp_path, flags, size
):
    net, checkpoint = published
    torch.save(checkpoint, tmp_path / "published.t")
    folder = make_images(tmp_path / "images", 2)
    paths = {"query": folder, "gallery": folder, "checkpoint": tmp_path / "published.t"}
    printed = search(*flags, **paths)
    warnings = [line for line in printed.splitlines() if line.startswith("warning: ")]
    if flags:
        assert warnings == []
    else:
        assert len(warnings) == 1
        assert "published.t" in warnings[0]
        assert "288" in warnings[0]
        assert "144" in warnings[0]

    with np.load(out / "features.npz") as arrays:
        network = json.loads(str(arrays["network"]))
        features = arrays["fc"]
    assert (network["img_h"], network["img_w"]) == size
    height, width = size
    for path, row in zip(sorted(folder.iterdir()), features, strict=True):
        image = Image.open(path).resize((width, height), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.asarray(image) / np.float32(255))
        pixels = (pixels - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
            [0.229, 0.224, 0.225]
        )
        with torch.no_grad():
            _, expected = net(visible=pixels.permute(2, 0, 1)[None])
        np.testing.assert_allclose(row, expected[0], atol=1e-4)
    other_size = ["--img-h", height + 16, "--img-w", width]
    assert "size" in search_error(*other_size, **paths | {"gallery": out / "features.npz"})


def test_a_checkpoint_may_tell_one_side_alone(data, tmp_path):
    content = torch.load(data.checkpoint)
    del content["config"]["img_w"]
    torch.save(content, tmp_path / "half.t")
    try:
        Embedder(tmp_path / "half.t")
    except InputError as error:
        assert "half.t" in str(error)


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["query", "gallery"])
@pytest.mark.parametrize("kind", ["empty", "text", "hidden", "missing", "file"])
def test_folders_without_images_are_an_error(search_error, out, tmp_path, role, kind):
    folder = tmp_path / "folder"
    if kind == "file":
        make_image(tmp_path / "folder.jpg", seed=0)
        folder = tmp_path / "folder.jpg"
    elif kind != "missing":
        (folder / "sub").mkdir(parents=True)
    if kind == "text":
        (folder / "sub/notes.txt").touch()
    if kind == "hidden":
        make_image(folder / "sub/.image.jpg", seed=0)
    line = search_error(**{role: folder})
    assert str(folder) in line
    assert not out.exists() or list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--top", 0], ["--top", "0"]),
        (["--top", -1], ["--top", "-1"]),
        (["--show", -1], ["--show", "-1"]),
        (["--test-batch", 0], ["--test-batch", "0"]),
        (["--img-h", 96], ["--img-h", "--img-w"]),
        (["--img-w", 32], ["--img-h", "--img-w"]),
        (["--img-h", 112, "--img-w", 32], ["96 x 32", "112 x 32"]),
        (["--query-modality", "infrared"], ["--query-modality", "infrared", "thermal"]),
    ],
)
def test_wrong_flags_are_an_error(search_error, flags, words):
    line = search_error(*flags)
    for word in words:
        assert word in line


@pytest.mark.parametrize("flag", ["--query", "--gallery", "--out"])
def test_needed_flags(command, error_of, flag):
    words = command()
    position = words.index(flag)
    assert flag in error_of(*words[:position], *words[position + 2 :])


def save_other_method(file: Path) -> None:
    torch.save({"net": nn.Linear(3, 2).state_dict()}, file)


def save_part_of_network(file: Path) -> None:
    weights = EmbedNet(3, 8, arch="tiny", pretrained="none").state_dict()
    del weights["thermal_net.thermal.0.weight"]
    config = {"arch": "tiny", "low_dim": 8, "num_parts": 6, "n_class": 3, "drop": 0.0}
    torch.save({"net": weights, "config": config}, file)


def save_damaged(file: Path) -> None:
    save_part_of_network(file)
    cut(file)


@pytest.mark.parametrize(
    "save", [None, write_text, save_damaged, save_other_method, save_part_of_network]
)
def test_other_checkpoints_are_an_error(search_error, tmp_path, save):
    file = tmp_path / "checkpoint.t"
    if save is not None:
        save(file)
    assert str(file) in search_error(checkpoint=file)


# ---- digests ------------------------------------------------------------------------------------


def tiny_net(seed: int) -> EmbedNet:
    torch.manual_seed(seed)
    return EmbedNet(3, 8, arch="tiny", pretrained="none")


def test_equal_weights_have_equal_digests():
    """Whatever the memory format, and whether the network is trained or evaluated."""
    net = tiny_net(0)
    digest = digest_of_weights(net)
    assert digest_of_weights(tiny_net(0)) == digest
    assert digest_of_weights(tiny_net(1)) != digest
    weight = net.visible_net["visible"][0].weight
    assert weight.is_contiguous()
    assert digest_of_weights(net.to(memory_format=torch.channels_last).eval()) == digest
    assert not net.visible_net["visible"][0].weight.is_contiguous()
    other = tiny_net(1)
    other.load_state_dict(net.state_dict())
    assert digest_of_weights(other) == digest


def test_any_value_changes_the_digest():
    """Those of the running statistics, too."""
    net = tiny_net(0)
    digests = {digest_of_weights(net)}
    n_tensors = 0
    for values in net.state_dict().values():
        values.view(-1)[-1] += 1
        digests.add(digest_of_weights(net))
        n_tensors += 1
    assert n_tensors > 20
    assert len(digests) == n_tensors + 1


def test_exchanged_names_change_the_digest():
    first = torch.ones(2, 3)
    second = torch.zeros(2, 3)
    nets = [
        nn.ParameterDict([("a", first), ("b", second)]),
        nn.ParameterDict([("b", first), ("a", second)]),
        nn.ParameterDict([("a", second), ("b", first)]),
    ]  # of pairs: a dict would be sorted
    digests = [digest_of_weights(net) for net in nets]
    assert digests[0] != digests[1]
    assert digests[0] != digests[2]


# ---- the folder of the results ------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_to_is_noticed_first(search_error, out, monkeypatch):
    """Before images are embedded, which may take hours."""
    monkeypatch.setattr(data_loader, "ImageBatches", None)
    out.mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != out and access(path, mode))
    line = search_error()
    assert f"{out} is read-only" in line
    assert "--out" in line


def test_ranking_and_page_are_replaced_together(data, search, search_error, out, monkeypatch):
    search("--top", 1)

    def fail(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device", "search.html")

    monkeypatch.setattr(Image.Image, "save", fail)  # of a thumbnail
    search_error("--top", 2, gallery=out / "features.npz")
    assert {len(nearest) for nearest in ranking_in(out).values()} == {1}


def test_a_search_is_no_distributed_program(search_error, monkeypatch):
    monkeypatch.setattr(utils, "is_distributed", lambda: True)
    assert "without torchrun" in search_error()
