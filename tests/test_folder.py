"""Own folders as a dataset: what is listed, what is left out, training with and without tests.

The lists and scores that are expected are written out here, or computed in another way.
"""

import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    RUN_FLAGS,
    TINY,
    folder_flags,
    make_tree,
    only_json,
    read_all,
    rows_of,
    run_here,
    same_content,
)
from PIL import Image

import train
import utils
from data_manager import (
    DATASETS,
    LeftOut,
    Split,
    folder_test,
    folder_train,
    images_below,
    is_synthetic,
    list_training_images,
)
from tools import figures
from tools.results_files import read_features, read_metrics

FOLDER = DATASETS["folder"]
MODALITIES = ("visible", "thermal")
UNTRAINED = ["--pretrained", "none", "--arch", "tiny", "--img_h", 96, "--img_w", 32, "--workers", 0]
# The name of a training with the flags TINY and --drop 0.3.
RUN = "folder_id_tiny_lr0.008_whc0.6_imgh96_imgw32_lowdim16_drop0.3"
RUN += "_batchsize8_perimg4_pretrainednone"
# Names for the persons of `folder_tree`, in sorted order.
TRAIN_NAMES = ["8", "Amélie", "Anna B", "O'Brien", "amélie", "Łukasz", "שרה", "李四"]
TEST_NAMES = ["$x_1$ & 100%", "A quite long name", "Zoë Müller", "张三"]
SHORT_TEST_NAMES = ["$x_1$ & 100%", "A quit… name", "Zoë Müller", "张三"]


# ---- trees, runs and what they say --------------------------------------------------------------


def make_files(root: Path, *names: str) -> Path:
    """Make empty files: lists read no pixels."""
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return root


def make_images(root: Path, subset: str, *persons: str) -> Path:
    """Add persons with one visible and one infrared image."""
    for modality in MODALITIES:
        for person in persons:
            folder = root / subset / modality / person
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 16)).save(folder / "1.png")
    return root


def rows_in(split: Split, root: Path) -> list[tuple]:
    """(path below the root, person, camera, is infrared) of each image."""
    paths = [os.path.relpath(path, root) for path in split.paths]
    columns = [paths, split.pids.tolist(), split.camids.tolist(), split.thermal.tolist()]
    return list(zip(*columns, strict=True))


def warnings_in(caplog) -> list[str]:
    """The messages of all warnings."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def warning_lines(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("warning: ")]


def link_persons(tree: Path, subset: str, names: list[str], renamed: Path) -> None:
    """Make a subset whose folders of persons are links to those in ``tree``, by other names."""
    for modality in MODALITIES:
        folder = renamed / subset / modality
        folder.mkdir(parents=True)
        persons = sorted((tree / subset / modality).iterdir())
        for person, name in zip(persons, names, strict=True):
            (folder / name).symlink_to(person)


@pytest.fixture
def trainable(folder_tree, tmp_path) -> Path:
    """A tree of links, with training images but no test images."""
    tree = tmp_path / "trainable"
    link_persons(folder_tree, "train", TRAIN_NAMES, tree)
    return tree


@pytest.fixture(scope="session")
def folder_run(folder_tree, made_once) -> Path:
    """A folder with persons of many names, a training and its test in both directions.

    In it are data/folder, the models and logs of the run, features.npz and test_<...>.json.
    """

    def make(out: Path) -> None:
        data = out / "data/folder"
        link_persons(folder_tree, "train", TRAIN_NAMES, data)
        link_persons(folder_tree, "test", TEST_NAMES, data)
        flags = ["--dataset", "folder", *folder_flags(data, out)]
        run_here("train.py", *flags, *TINY, "--drop", 0.3, "--epochs", 2)
        flags += ["--workers", 0, "--resume", f"{RUN}_last.t", "--search", "both"]
        run_here("test.py", *flags, "--save-features", out / "features.npz")

    return made_once("folder_run", make)


# ---- lists --------------------------------------------------------------------------------------


def test_the_lists_of_a_tree(tmp_path):
    """Persons are numbered in the order of their names, in train and in test from 0."""
    root = make_files(
        tmp_path,
        "train/visible/Zoë Müller/b.jpg",
        "train/visible/Zoë Müller/a.PNG",
        "train/visible/张三/10.jpg",
        "train/visible/张三/2.webp",
        "train/thermal/anna/x y.jpeg",
        "train/thermal/Zoë Müller/c.bmp",
        "train/thermal/张三/1.tif",
        "test/visible/10/1.jpg",
        "test/visible/9/1.jpg",
        "test/thermal/9/2.tiff",
        "test/thermal/9/1.jpg",
    )
    visible, thermal = folder_train(str(root))
    assert rows_in(visible, root) == [
        ("train/visible/Zoë Müller/a.PNG", 0, 1, False),
        ("train/visible/Zoë Müller/b.jpg", 0, 1, False),
        ("train/visible/张三/10.jpg", 2, 1, False),
        ("train/visible/张三/2.webp", 2, 1, False),
    ]
    assert rows_in(thermal, root) == [
        ("train/thermal/Zoë Müller/c.bmp", 0, 2, True),
        ("train/thermal/anna/x y.jpeg", 1, 2, True),
        ("train/thermal/张三/1.tif", 2, 2, True),
    ]
    test = folder_test(str(root))
    assert rows_in(test, root) == [
        ("test/visible/10/1.jpg", 0, 1, False),
        ("test/visible/9/1.jpg", 1, 1, False),
        ("test/thermal/9/1.jpg", 1, 2, True),
        ("test/thermal/9/2.tiff", 1, 2, True),
    ]
    assert FOLDER.person_names(thermal) == {0: "Zoë Müller", 1: "anna", 2: "张三"}
    assert FOLDER.person_names(test) == {0: "10", 1: "9"}


def test_persons_of_one_modality_are_named_and_not_trained_on(tmp_path, caplog):
    root = make_files(
        tmp_path,
        "train/visible/Zoë Müller/1.jpg",
        "train/visible/b/1.jpg",
        "train/thermal/b/1.jpg",
        "train/thermal/张三/1.jpg",
    )
    images = list_training_images(FOLDER, str(root), None)
    assert rows_in(images, root) == [
        ("train/visible/b/1.jpg", 1, 1, False),
        ("train/thermal/b/1.jpg", 1, 2, True),
    ]
    (warning,) = warnings_in(caplog)
    assert "Zoë Müller, 张三" in warning
    assert "one modality" in warning


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("train/visible/stray.jpg", "train/visible/stray.jpg"),
        ("train/infrared/a/1.jpg", "train/infrared"),
        ("train/Visible/a/1.jpg", "train/Visible"),
        ("train/list.txt", "train/list.txt"),
        ("train/thermal/a/notes.txt", "train/thermal/a/notes.txt"),
        ("train/thermal/a/more/2.jpg", "train/thermal/a/more"),
        ("train/thermal/a/folder.jpg/2.jpg", "train/thermal/a/folder.jpg"),
        ("train/visible/Zoë Müller/", "Zoë Müller"),
    ],
)
def test_strays_are_named(tmp_path, caplog, name, named):
    root = make_files(tmp_path, "train/visible/a/1.jpg", "train/thermal/a/1.jpg")
    if name.endswith("/"):
        (root / name).mkdir()
        expected = named
    else:
        make_files(root, name)
        expected = str(root / named)
    images = list_training_images(FOLDER, str(root), None)
    assert [row[0] for row in rows_in(images, root)] == [
        "train/visible/a/1.jpg",
        "train/thermal/a/1.jpg",
    ]
    (warning,) = warnings_in(caplog)
    assert warning.startswith("train: left out: ")
    assert warning.endswith(f" (1): {expected}")


def test_strays_of_the_tests_are_named(tmp_path, caplog):
    root = make_files(tmp_path, "test/visible/a/1.jpg", "test/thermal/b/1.jpg", "test/cam3/a/1.jpg")
    assert len(folder_test(str(root))) == 2
    (warning,) = warnings_in(caplog)
    assert warning.startswith("test: left out: ")
    assert warning.endswith(f" (1): {root}/test/cam3")


def test_hidden_and_system_files_are_passed_over(tmp_path, caplog):
    root = make_files(tmp_path, "train/visible/a/1.jpg", "train/thermal/a/1.jpg")
    for folder in ("train", "train/visible", "train/visible/a"):
        for name in (".DS_Store", "Thumbs.db", "desktop.ini", ".hidden.jpg"):
            make_files(root, f"{folder}/{name}")
    make_files(root, "train/visible/.trash/1.jpg", "train/.git/1.jpg")
    assert len(list_training_images(FOLDER, str(root), None)) == 2
    assert warnings_in(caplog) == []


# ---- synthetic people ---------------------------------------------------------------------------


def test_a_synthetic_tree(tmp_path):
    make_tree("folder", tmp_path / "tree", "--ids", 5, "--images", 2)
    persons = {}
    for file in (tmp_path / "tree").glob("*/*/*/*.jpg"):
        subset, modality, person, name = file.relative_to(tmp_path / "tree").parts
        persons.setdefault((subset, modality), {}).setdefault(person, set()).add(name)
    for subset, n_persons in (("train", 3), ("test", 2)):
        assert persons[subset, "visible"] == persons[subset, "thermal"]
        assert len(persons[subset, "visible"]) == n_persons
        for names in persons[subset, "visible"].values():
            assert names == {"0001.jpg", "0002.jpg"}
    assert len({*persons["train", "visible"], *persons["test", "visible"]}) == 5
    assert is_synthetic(str(tmp_path / "tree"))  # so that titles of figures say it


def test_no_synthetic_tree_has_the_real_size(error_of, tmp_path):
    line = error_of(
        "-m tools.make_synthetic", "--dataset", "folder", "--full", "--out", tmp_path / "tree"
    )
    assert "--full" in line
    assert "--ids" in line
    assert not (tmp_path / "tree").exists()


# ---- training and its test ----------------------------------------------------------------------


def test_training_tests_and_keeps_the_best(folder_run):
    checkpoints = read_all(folder_run)
    last = checkpoints[f"{RUN}_last.t"]
    best = checkpoints[f"{RUN}_best.t"]
    assert last["config"]["dataset"] == "folder"
    assert last["config"]["n_class"] == 8
    assert last["config"]["trial"] is None
    assert best["epoch"] == 2
    metrics = checkpoints[f"{RUN}/metrics.jsonl"]
    assert ["fc_rank1" in line for line in metrics] == [False, False, True]
    # Training tests the default direction.
    trials = rows_of(only_json(folder_run, "test_*.json"))["t2v", "fc"]["trials"]
    assert metrics[2]["fc_rank1"] == pytest.approx(trials[0]["cmc"][0])
    assert metrics[2]["fc_mAP"] == pytest.approx(trials[0]["mAP"])
    log = (folder_run / f"{RUN}.log").read_text()
    assert "train: 8 persons, 24 visible and 24 infrared images, cameras 1, 2" in log
    assert "test: 4 persons, 12 visible and 12 infrared images, cameras 1, 2" in log
    assert log.count("score it: ") == 1
    assert "--search both" in log


def test_the_folder_of_the_data_has_a_default(output_of, folder_run, tmp_path, monkeypatch):
    """Without --search infrared images are the queries."""
    monkeypatch.chdir(folder_run)
    output_of("test.py", "--dataset", "folder", *UNTRAINED, "--log_path", tmp_path)
    result = only_json(tmp_path)
    assert {protocol for protocol, _ in rows_of(result)} == {"t2v"}
    assert result["flags"]["data_path"] == "data/folder"
    assert train.parse_args(["--dataset", "folder"]).data_path == "data/folder"


def test_v2t_alone(output_of, folder_run, tmp_path):
    flags = ["--dataset", "folder", *folder_flags(folder_run / "data/folder", tmp_path)]
    flags += ["--resume", folder_run / f"{RUN}_last.t", "--workers", 0]
    output_of("test.py", *flags, "--search", "v2t")
    rows = rows_of(only_json(tmp_path))
    both = rows_of(only_json(folder_run, "test_*.json"))
    assert set(rows) == {("v2t", "fc"), ("v2t", "pool5"), ("v2t", "chance")}
    for key in rows:
        assert rows[key] == both[key]


def test_saved_features_are_of_all_test_images(folder_run):
    with np.load(folder_run / "features.npz") as saved:
        paths = saved["paths"].tolist()
        pids = saved["pids"].tolist()
    expected_paths = []
    expected_pids = []
    for modality in MODALITIES:
        for pid, name in enumerate(TEST_NAMES):
            for number in (1, 2, 3):
                expected_paths.append(f"test/{modality}/{name}/{number:04d}.jpg")
                expected_pids.append(pid)
    assert paths == expected_paths
    assert pids == expected_pids


def scores_one_by_one(
    features: np.ndarray, persons: list[str], is_query: np.ndarray
) -> tuple[list[float], float, float]:
    """CMC of 20 ranks by image, mAP and mINP, from one query and one gallery image at a time."""
    features = features.astype(np.float64)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    hits = np.zeros(20)
    precisions = []
    penalties = []
    for q in np.flatnonzero(is_query):
        nearest = sorted(np.flatnonzero(~is_query), key=lambda g: -(features[q] @ features[g]))
        matches = [rank for rank, g in enumerate(nearest, 1) if persons[g] == persons[q]]
        hits[matches[0] - 1 :] += 1
        precisions.append(np.mean([(i + 1) / rank for i, rank in enumerate(matches)]))
        penalties.append(len(matches) / matches[-1])
    return list(hits / is_query.sum()), np.mean(precisions), np.mean(penalties)


@pytest.mark.parametrize("kind", ["fc", "pool5"])
@pytest.mark.parametrize(("protocol", "query_modality"), [("t2v", "thermal"), ("v2t", "visible")])
def test_scores_are_those_of_the_saved_features(folder_run, kind, protocol, query_modality):
    """All images of one modality query all of the other; persons and modalities are in paths."""
    with np.load(folder_run / "features.npz") as saved:
        features = saved[kind]
        parts = [path.split("/") for path in saved["paths"].tolist()]
    persons = [part[2] for part in parts]
    is_query = np.array([part[1] == query_modality for part in parts])
    cmc, mean_precision, mean_penalty = scores_one_by_one(features, persons, is_query)
    result = only_json(folder_run, "test_*.json")
    (trial,) = rows_of(result)[protocol, kind]["trials"]
    assert trial["cmc"] == pytest.approx(cmc)
    assert trial["mAP"] == pytest.approx(mean_precision)
    assert trial["mINP"] == pytest.approx(mean_penalty)
    counts = result["counts"][protocol]
    assert counts["queries"] == 12
    assert counts["gallery_images"] == 12
    assert counts["gallery_persons"] == 4


def test_scores_by_hand(output_of, tmp_path):
    """Features are directions, so that the order of each gallery can be read off the angles."""
    degrees = {
        "test/visible/a/1.jpg": 0,
        "test/visible/b/1.jpg": 30,
        "test/visible/b/2.jpg": 40,
        "test/thermal/a/1.jpg": 60,  # then b/2, b/1, a/1 are at 20, 30, 60 degrees
        "test/thermal/b/1.jpg": 10,  # then a/1, b/1, b/2 are at 10, 20, 30 degrees
    }
    angles = np.radians(list(degrees.values()))
    np.savez(
        tmp_path / "by_hand.npz",
        paths=np.array(list(degrees)),
        pids=np.array([0, 1, 1, 0, 1]),
        camids=np.array([1, 1, 1, 2, 2]),  # they tell the modality
        fc=np.stack([np.cos(angles), np.sin(angles)], axis=1),
    )
    flags = ["--dataset", "folder", "--search", "both", "--log-path", tmp_path]
    output_of("-m tools.score", tmp_path / "by_hand.npz", *flags)
    rows = rows_of(only_json(tmp_path))
    (trial,) = rows["t2v", "fc"]["trials"]
    assert trial["cmc"][:3] == [0, 1 / 2, 1]  # by identity it would be 0, 1, 1
    assert trial["mAP"] == pytest.approx((1 / 3 + (1 / 2 + 2 / 3) / 2) / 2)
    assert trial["mINP"] == pytest.approx((1 / 3 + 2 / 3) / 2)
    (trial,) = rows["v2t", "fc"]["trials"]
    assert trial["cmc"][:2] == pytest.approx([1 / 3, 1])
    assert trial["mAP"] == pytest.approx((1 / 2 + 1 + 1 / 2) / 3)
    assert trial["mINP"] == pytest.approx((1 / 2 + 1 + 1 / 2) / 3)


def test_test_persons_of_one_modality_count_as_gallery_only(output_of, tmp_path):
    root = make_images(tmp_path / "tree", "test", "a", "b")
    for name in ("test/visible/c/1.png", "test/thermal/d/1.png"):
        (root / name).parent.mkdir()
        shutil.copy(root / "test/visible/a/1.png", root / name)
    flags = ["--dataset", "folder", "--search", "both", *UNTRAINED, *folder_flags(root, tmp_path)]
    output_of("test.py", *flags)
    for counts in only_json(tmp_path)["counts"].values():
        assert counts["queries"] == 3
        assert counts["without_match"] == 1
        assert counts["gallery_persons"] == 3


def test_saved_features_get_the_same_results(output_of, folder_run, tmp_path):
    flags = ["--dataset", "folder", "--search", "both", "--log-path", tmp_path]
    output_of("-m tools.score", folder_run / "features.npz", *flags)
    tested = only_json(folder_run, "test_*.json")
    assert only_json(tmp_path)["results"] == tested["results"]
    assert only_json(tmp_path)["counts"] == tested["counts"]


# ---- figures and the report ---------------------------------------------------------------------


def texts_of(figure: figures.Figure) -> list[str]:
    """The texts of a figure."""
    figure.canvas.draw()
    texts = figure.findobj(lambda artist: hasattr(artist, "get_text"))
    return [text.get_text() for text in texts]


def test_long_names_are_cut(tmp_path):
    names = ["12characters", "13 characters", "张三" * 7]
    make_files(tmp_path, *(f"test/visible/{name}/1.jpg" for name in names))
    images = folder_test(str(tmp_path))
    short = figures.short_names(images, FOLDER)
    assert short == {0: "12characters", 1: "13 cha…cters", 2: "张三张三张三…三张三张三"}
    numbers = figures.short_names(images, DATASETS["sysu"])
    assert numbers == {0: "0", 1: "1", 2: "2"}


def test_embedding_has_the_names_of_persons(folder_run):
    features = read_features(str(folder_run / "features.npz"), FOLDER, "fc")
    texts = texts_of(figures.embedding({"run": features}, method="pca"))
    assert [text for text in texts if text in SHORT_TEST_NAMES] == SHORT_TEST_NAMES


def test_ranked_lists_have_the_names_of_persons(folder_run):
    """Those under ✓ are of the query's person, those under ✗ of others, by their folders."""
    features = read_features(str(folder_run / "features.npz"), FOLDER, "fc")
    trial = features.first_trial({})
    figure = figures.ranked(features, trial, str(folder_run / "data/folder"), rows=2)
    rows = np.array(figure.axes).reshape(6, 11)
    shown = set()
    for row in rows:
        captions = [axis.get_title().splitlines() for axis in row]
        query_name = captions[0][3].removeprefix("id ")
        assert query_name in SHORT_TEST_NAMES
        shown.add(query_name)
        for mark, name, camera in captions[1:]:
            assert name.removeprefix("id ") in SHORT_TEST_NAMES
            assert ("✓" in mark) == (name == f"id {query_name}")
            assert camera == "cam 1"
    assert len(shown) > 1


def test_attention_has_the_names_of_persons(folder_run):
    figure = figures.attention(
        str(folder_run / f"{RUN}_last.t"), FOLDER, str(folder_run / "data/folder")
    )
    captions = [text for text in texts_of(figure) if text.startswith("id ")]
    expected = [f"id {name}\ncam 1" for name in SHORT_TEST_NAMES]
    expected += [f"id {name}\ncam 2" for name in SHORT_TEST_NAMES]
    assert captions == expected


def test_a_name_in_another_encoding_is_the_same_person(error_of, tmp_path):
    root = tmp_path / "tree"
    composed = "Zo\u00eb"
    decomposed = "Zoe\u0308"
    make_images(root, "train", composed, "a", "b")
    (root / "train/thermal" / composed).rename(root / "train/thermal" / decomposed)
    visible, thermal = FOLDER.train(str(root), None)
    assert set(visible.pids) == set(thermal.pids) == {0, 1, 2}
    (root / "train/thermal" / composed).mkdir()
    flags = ["--dataset", "folder", *TINY, *folder_flags(root, tmp_path)]
    assert "merge them" in error_of("train.py", *flags)
    (root / "train/thermal" / composed).rmdir()
    make_images(root, "test", "c")
    (root / "test/visible" / decomposed).mkdir()
    assert "train and in test" in error_of("train.py", *flags)


def test_a_link_to_itself_is_left_out(tmp_path, caplog):
    root = tmp_path / "tree"
    make_images(root, "train", "a", "b")
    (root / "train/visible/loop").symlink_to("loop")
    visible, _ = FOLDER.train(str(root), None)
    assert set(visible.pids) == {0, 1}
    assert "train/visible/loop" in caplog.text


def test_samples_have_the_names_of_persons(folder_run):
    figure = figures.samples(FOLDER, str(folder_run / "data/folder"))
    texts = texts_of(figure)
    assert [text for text in texts if text in SHORT_TEST_NAMES] == SHORT_TEST_NAMES
    assert [text for text in texts if text.startswith("cam")] == ["cam1\nvisible", "cam2\ninfrared"]


def test_report_and_figures_are_written(output_of, folder_run, tmp_path):
    (result,) = folder_run.glob("test_*.json")
    page = tmp_path / "report.html"
    output = output_of("-m tools.report", f"own={result}", "--out", page)
    assert "left out" not in output
    html = page.read_text()
    for heading in ("CMC", "Training", "Embedding", "Distances", "Ranked: own", "Stripes: own"):
        assert f"<h2>{heading}</h2>" in html
    assert "own dataset" in html

    output_of("-m tools.visualize", "curves", folder_run / RUN, "--out", tmp_path / "curves.png")
    tree = ["--dataset", "folder", "--data-path", folder_run / "data/folder"]
    output_of("-m tools.visualize", "samples", *tree, "--out", tmp_path / "samples.png")
    for name in ("curves", "samples"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert min(image.size) > 300


# ---- training without a test --------------------------------------------------------------------


def test_without_test_images_there_is_no_test(output_of, trainable, tmp_path):
    out = tmp_path / "out"
    flags = ["--dataset", "folder", *TINY, "--drop", 0.3, *folder_flags(trainable, out)]
    printed = output_of("train.py", *flags, "--epochs", 2)
    (warning,) = [line for line in warning_lines(printed) if "folder test" in line]
    assert str(trainable) in warning
    assert "score it" not in printed
    assert "test fc" not in printed
    assert [path.name for path in out.glob("*.t")] == [f"{RUN}_last.t"]
    last = utils.load_checkpoint(str(out / f"{RUN}_last.t"))
    assert last["epoch"] == 2
    assert last["config"]["n_class"] == 8
    metrics = read_all(out)[f"{RUN}/metrics.jsonl"]
    assert [list(line) for line in metrics] == 3 * [["epoch", "lr", "loss", "CE", "HC", "accuracy"]]

    page = tmp_path / "report.html"
    output_of("-m tools.report", out / RUN, "--out", page)
    assert "<h2>Training</h2>" in page.read_text()
    curves = tmp_path / "curves.png"
    output_of("-m tools.visualize", "curves", out / RUN, "--out", curves)
    assert curves.exists()
    figure = figures.curves({"run": read_metrics(str(out / RUN))})
    titles = [axis.get_title() for axis in figure.axes if axis.get_visible()]
    assert titles == [
        "CE, per stripe",
        "HC, per stripe",
        "accuracy in training, %",
        "learning rate",
    ]


def test_resuming_without_tests_is_exact_and_tests_may_come_later(
    output_of, trainable, folder_tree, tmp_path
):
    flags = ["--dataset", "folder", *TINY, "--drop", 0.3]
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    output_of("train.py", *flags, *folder_flags(trainable, whole), "--epochs", 2)
    flags += folder_flags(trainable, parts)
    output_of("train.py", *flags, "--epochs", 1)
    printed = output_of("train.py", *flags, "--epochs", 2, "--resume", "last")
    assert "after epoch 1" in printed
    assert len([line for line in warning_lines(printed) if "folder test" in line]) == 1
    assert same_content(read_all(parts), read_all(whole))

    link_persons(folder_tree, "test", TEST_NAMES, trainable)
    printed = output_of("train.py", *flags, "--epochs", 4, "--resume", "last")
    assert not [line for line in warning_lines(printed) if "folder test" in line]
    assert "score it: " in printed
    contents = read_all(parts)
    metrics = contents[f"{RUN}/metrics.jsonl"]
    assert ["fc_rank1" in line for line in metrics] == [False, False, False, False, True]
    best = contents[f"{RUN}_best.t"]
    assert best["epoch"] == 4
    assert best["best"]["rank1"] == metrics[4]["fc_rank1"]


@pytest.mark.parametrize("script", ["test.py", "train.py"])
def test_without_test_images_nothing_can_be_tested(error_of, trainable, tmp_path, script):
    flags = ["--dataset", "folder", *folder_flags(trainable, tmp_path)]
    if script == "test.py":
        flags += UNTRAINED
    else:
        flags += [*TINY, "--test-only"]
    line = error_of(script, *flags)
    assert f"{trainable} has no folder test:" in line
    assert "test/visible/<person>/" in line
    assert "test/thermal/<person>/" in line


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["train.py", "test.py"])
@pytest.mark.parametrize("modality", MODALITIES)
def test_a_person_in_train_and_in_test_is_an_error(error_of, tmp_path, script, modality):
    """One modality suffices, even of a person without any image."""
    root = make_images(tmp_path / "tree", "train", "Zoë Müller", "Zoë", "b")
    make_images(root, "test", "c", "d")
    (root / "test" / modality / "Zoë Müller").mkdir()
    flags = TINY if script == "train.py" else UNTRAINED
    line = error_of(script, "--dataset", "folder", *flags, *folder_flags(root, tmp_path))
    assert str(root) in line
    assert "(1): Zoë Müller." in line
    assert "train and in test" in line


@pytest.mark.parametrize("content", ["nothing", "no root", "persons only"])
def test_a_tree_without_training_images_is_an_error(error_of, tmp_path, content):
    root = tmp_path / "tree"
    if content != "no root":
        root.mkdir()
    if content == "persons only":
        make_images(root, ".", "a", "b")
    line = error_of("train.py", "--dataset", "folder", *TINY, *folder_flags(root, tmp_path))
    assert f"{root} has no folder train:" in line
    assert "--data-path" in line
    assert "train/visible/<person>/" in line
    assert "train/thermal/<person>/" in line


def test_a_train_folder_without_a_modality_is_an_error(error_of, tmp_path):
    root = make_files(tmp_path / "tree", "train/visible/a/1.jpg")
    line = error_of("train.py", "--dataset", "folder", *TINY, *folder_flags(root, tmp_path))
    assert str(root) in line
    assert "both modalities" in line


@pytest.mark.parametrize("script", ["train.py", "test.py"])
@pytest.mark.parametrize("persons", [{}, {"visible": "c"}, {"visible": "c", "thermal": "d"}])
def test_a_test_without_a_match_is_an_error(error_of, tmp_path, script, persons):
    root = make_images(tmp_path / "tree", "train", "a", "b")
    (root / "test").mkdir()
    for modality, person in persons.items():
        make_files(root, f"test/{modality}/{person}/1.jpg")
    flags = TINY if script == "train.py" else UNTRAINED
    line = error_of(script, "--dataset", "folder", *flags, *folder_flags(root, tmp_path))
    expected = "no query has a match" if len(persons) == 2 else "query or the gallery is empty"
    assert expected in line


def test_there_are_no_arrays(error_of, tmp_path):
    root = make_images(tmp_path / "tree", "train", "a", "b")
    flags = ["--dataset", "folder", *TINY, *folder_flags(root, tmp_path)]
    assert "--arrays" in error_of("train.py", *flags, "--arrays", tmp_path)


@pytest.mark.parametrize(("script", "subset"), [("train.py", "train"), ("test.py", "test")])
def test_a_broken_image_is_named(error_of, tmp_path, script, subset):
    root = make_images(tmp_path / "tree", "train", "a", "b")
    make_images(root, "test", "c", "张三")
    make_images(root, subset, "Zoë Müller")
    broken = root / subset / "thermal/Zoë Müller/1.png"
    broken.write_bytes(b"no image")
    flags = TINY if script == "train.py" else UNTRAINED
    line = error_of(script, "--dataset", "folder", *flags, *folder_flags(root, tmp_path))
    assert f"{broken} cannot be read as an image" in line


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_an_image_in_train_and_in_test_is_an_error(error_of, tmp_path, link):
    root = make_images(tmp_path / "tree", "train", "a", "b")
    make_images(root, "test", "c", "d")
    shared = root / "train/visible/b/1.png"
    link(shared, root / "test/visible/c/9.png")
    line = error_of("train.py", "--dataset", "folder", *TINY, *folder_flags(root, tmp_path))
    assert f"(1): {shared}." in line


def test_a_missing_image_is_named(error_of, tmp_path):
    root = make_images(tmp_path / "tree", "train", "a", "b")
    missing = root / "train/visible/b/2.png"
    missing.symlink_to("nowhere.png")
    line = error_of("train.py", "--dataset", "folder", *TINY, *folder_flags(root, tmp_path))
    assert f"{missing} not found" in line


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("train.py", RUN_FLAGS),
        ("train.py", [*RUN_FLAGS, "--test-only"]),
        ("test.py", ["--workers", 0]),
    ],
)
def test_a_checkpoint_of_another_dataset_is_an_error(
    error_of, folder_run, sysu_run, tmp_path, script, flags
):
    """In both directions."""
    (sysu_last,) = sysu_run["models"].glob("*_last.t")
    folder_last = folder_run / f"{RUN}_last.t"
    for dataset, data, last, other in (
        ("folder", folder_run / "data/folder", sysu_last, "sysu"),
        ("sysu", sysu_run["data"], folder_last, "folder"),
    ):
        paths = [*folder_flags(data, tmp_path), "--resume", last]
        line = error_of(script, "--dataset", dataset, *flags, *paths)
        assert f"{last} was trained with --dataset {other}" in line
        assert f"not --dataset {dataset}" in line


def test_features_of_another_dataset_are_an_error(error_of, folder_run, tmp_path):
    file = folder_run / "features.npz"
    line = error_of("-m tools.score", file, "--dataset", "sysu", "--log-path", tmp_path)
    assert str(file) in line
    assert "--dataset folder" in line
    line = error_of(
        "-m tools.visualize", "embedding", file, "--dataset", "regdb",
        "--out", tmp_path / "embedding.png",
    )  # fmt: skip
    assert "--dataset folder" in line


# ---- folders of images without labels -----------------------------------------------------------


def test_images_below_a_folder_in_sorted_order(tmp_path):
    root = make_files(
        tmp_path / "root",
        "b/2.jpg",
        "b/1.png",
        "b/inner/deep/3.JPG",
        "a.jpg",
        "Zoë/x y.webp",
        "c/notes.txt",
        "c/.hidden.jpg",
        ".cache/1.jpg",
        "Thumbs.db",
    )
    elsewhere = make_files(tmp_path / "elsewhere", "1.jpg", "sub/2.jpg")
    (root / "linked").symlink_to(elsewhere)
    (root / "again").symlink_to(elsewhere)  # not a cycle
    (root / "b/inner/up").symlink_to(root)
    (root / "linked.jpg").symlink_to(elsewhere / "1.jpg")
    left_out = LeftOut("--query")
    paths = images_below(str(root), left_out)
    assert [os.path.relpath(path, root) for path in paths] == [
        "Zoë/x y.webp",
        "a.jpg",
        "again/1.jpg",
        "again/sub/2.jpg",
        "b/1.png",
        "b/2.jpg",
        "b/inner/deep/3.JPG",
        "linked/1.jpg",
        "linked/sub/2.jpg",
        "linked.jpg",
    ]
    named = sorted(left_out.names.values())
    assert named == [[str(root / "b/inner/up")], [str(root / "c/notes.txt")]]


def test_folders_that_link_to_each_other_have_an_end(tmp_path, caplog):
    root = make_files(tmp_path, "a/1.jpg", "b/2.jpg")
    (root / "a/to_b").symlink_to(root / "b")
    (root / "b/to_a").symlink_to(root / "a")
    left_out = LeftOut("--gallery")
    paths = images_below(str(root), left_out)
    assert [os.path.relpath(path, root) for path in paths] == [
        "a/1.jpg",
        "a/to_b/2.jpg",
        "b/2.jpg",
        "b/to_a/1.jpg",
    ]
    left_out.warn()
    (warning,) = warnings_in(caplog)
    assert warning.startswith("--gallery: left out: links ")
    assert f"(2): {root}/a/to_b/to_a, {root}/b/to_a/to_b" in warning
