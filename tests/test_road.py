"""The whole road as a user goes it, on all datasets, and the published commands."""

import io
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RUN, RUN_FLAGS, TINY, only, places, rows_of

import train
import utils
from data_manager import DATASETS
from model import EmbedNet, network_of
from tools.killtest import read_all


@pytest.fixture(scope="module")
def short_regdb(regdb_tree, tmp_path_factory) -> Path:
    """The drawn RegDB with two test images per person and modality, which are enough to score; folders may be links."""
    tree = tmp_path_factory.mktemp("short") / "RegDB"
    shutil.copytree(regdb_tree / "idx", tree / "idx")
    (tree / "Visible").symlink_to(regdb_tree / "Visible")
    (tree / "Thermal").symlink_to(regdb_tree / "Thermal")
    for file in (tree / "idx").glob("test_*.txt"):
        file.write_text("".join(file.read_text().splitlines(keepends=True)[::5]))
    return tree


def test_training_leaves_checkpoints_metrics_and_a_log(sysu_run):
    files, log = read_all(sysu_run["models"]), (sysu_run["logs"] / f"{RUN}.log").read_text()
    last, best = (files[f"{RUN}_{kind}.t"] for kind in ("last", "best"))
    assert (last["epoch"], best["epoch"]) == (3, 2)  # of the epochs 0 to 3 only 2 is tested
    assert last["best"] == best["best"] == {"rank1": best["cmc"][0], "mAP": best["mAP"], "epoch": 2}
    assert len(best["cmc"]) == 20 and (last["config"]["n_class"], last["config"]["w_hc"]) == (10, 0.6)
    metrics = read_all(sysu_run["logs"])[f"{RUN}/metrics.jsonl"]
    assert [line["epoch"] for line in metrics] == [0, 1, 2, 3] and metrics[3]["loss"] < metrics[0]["loss"]
    assert ["fc_rank1" in line for line in metrics] == [False, False, True, False]
    assert (metrics[2]["fc_rank1"], metrics[2]["fc_mAP"]) == (best["cmc"][0], best["mAP"])
    assert re.findall(r"epoch +\d step .*loss ([\d.]+)", log) == [f"{line['loss']:.4f}" for line in metrics]
    assert all(word in log for word in ("low_dim=16", f"torch={torch.__version__.partition('+')[0]}", "test fc"))


def test_the_last_line_names_the_command_to_run_next(call, sysu_run, tmp_path, monkeypatch):
    """Word for word, from anywhere."""
    log = (sysu_run["logs"] / f"{RUN}.log").read_text()  # to which refused commands of other tests may add lines
    command = shlex.split(re.search("was the last one; to score it: python (.*)", log)[1])
    command[command.index("--log_path") + 1] = tmp_path
    monkeypatch.chdir(tmp_path)
    assert "indoor-search multi-shot" in call(*command, "--workers", 0)


def test_test_only_repeats_the_score_of_training(call, sysu_run, tmp_path):
    best = sysu_run["models"] / f"{RUN}_best.t"
    out = call("train.py", *RUN_FLAGS, *places(sysu_run["data"], tmp_path), "--test-only", "--resume", best)
    trained = [line for line in (sysu_run["logs"] / f"{RUN}.log").read_text().splitlines() if line.startswith("test ")]
    assert [line for line in out.splitlines() if line.startswith("test ")] == trained


def test_all_protocols_in_one_go(call, sysu_run, tmp_path):
    """The flags are spelt in the other way, too."""
    flags = ["--data-path", sysu_run["data"], "--model-path", sysu_run["models"], f"--log-path={tmp_path}"]
    flags += ["--resume", f"{RUN}_best.t", "--test_batch", 16, "--workers", 0]
    kept = tmp_path / "kept.npz"
    out = call("test.py", *flags, "--mode", "both", "--gall_mode", "both", "--save_features", kept)
    found = rows_of(only(tmp_path))
    modes, shots, features = ("all", "indoor"), ("single", "multi"), ("fc", "pool5", "chance")
    assert [*found] == [(f"{m}-search {s}-shot", f) for m in modes for s in shots for f in features]
    trained = utils.load_checkpoint(str(sysu_run["models"] / f"{RUN}_best.t"))
    trials = found["all-search single-shot", "fc"]["trials"]
    np.testing.assert_allclose(trials[0]["cmc"], trained["cmc"])  # the draw that training tests on
    np.testing.assert_allclose(trials[0]["mAP"], trained["mAP"])
    assert any(len({t["mAP"] for t in found[key]["trials"]}) > 1 for key in found if key[1] != "chance")  # the draws
    row = found["indoor-search multi-shot", "pool5"]
    np.testing.assert_allclose(row["mean"]["rank1"], np.mean([t["cmc"][0] for t in row["trials"]]))
    np.testing.assert_allclose(row["std"]["mAP"], np.std([t["mAP"] for t in row["trials"]]))
    assert f"{100 * row['mean']['mAP']:.2f}" in out and out.count("chance") >= 4
    # Stripes of unit length rank alike by either distance.
    call("-m tools.score", kept, "--distance", "euclidean", "--log_path", tmp_path)
    euclidean = rows_of(only(tmp_path, "*euclidean.json"))["all-search single-shot", "fc"]["trials"]
    np.testing.assert_allclose([trial["mAP"] for trial in euclidean], [trial["mAP"] for trial in trials])


def published_file(path: Path, net: EmbedNet, numpy_core: bytes = b"core", prefix: str = "") -> None:
    """A checkpoint as PyTorch 0.4.1 and numpy 1.17 (core) or later ones (_core) write it: no zip, numpy values.

    torch.nn.DataParallel, in which some were trained, puts the prefix "module." before each name.
    """
    file, weights = io.BytesIO(), {prefix + name: value for name, value in net.state_dict().items()}
    state = {"net": weights, "cmc": np.ones(20), "mAP": np.float64(0.25), "epoch": 7}
    torch.save(state, file, _use_new_zipfile_serialization=False)
    # The protocol spells module names as lines of text, so that another module is another line.
    data = file.getvalue().replace(b"numpy._core.multiarray\n", b"numpy.%b.multiarray\n" % numpy_core)
    assert b"cnumpy.%b.multiarray\n_reconstruct\n" % numpy_core in data
    path.write_bytes(data)


def test_going_on_from_a_published_checkpoint(call, bad, sysu_tree, tmp_path):
    """It has weights, epoch and scores, from which training goes on; the rate of dropout is what the caller says."""
    flags = [*TINY, "--arch", "resnet18", *places(sysu_tree, tmp_path), "--resume", "old.t", "--epochs", 8]
    for persons, words in ((4, "on 4 persons, but --data_path has 10"), (10, "give --drop")):
        published_file(tmp_path / "old.t", EmbedNet(persons, 16, 0.3, "resnet18", pretrained="none"))
        assert words in bad("train.py", *flags)
    out = call("train.py", *flags, "--drop", 0.4)
    assert "no optimizer state" in out and "epoch   8 step" in out and "epoch   7 step" not in out
    state = utils.load_checkpoint(str(next(tmp_path.glob("*_last.t"))))
    assert state["epoch"] == 8 and state["best"] == {"rank1": 1.0, "mAP": 0.25, "epoch": 7}
    old = utils.load_checkpoint(str(tmp_path / "old.t"))
    assert network_of(old, "old.t", drop=0.4).classifier1.classifier[1].p == 0.4


@pytest.mark.parametrize(
    "flags",
    [
        "--optim adam --dist-type l1 --thd 0.05 --drop 0.3 --lr 0.001",
        "--dist-type cos --thd 100 --w_hc 0.1 --img_h 120 --img_w 40 --mode indoor",  # the arrays are scaled
    ],
)
def test_other_settings_train_and_test(call, sysu_tree, tmp_path, flags):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # slow to import

    out = [*places(sysu_tree, tmp_path), "--workers", 0]
    call("train.py", *TINY, "--epochs", 0, *flags.split(), *out, "--tensorboard")
    (checkpoint,), (file,), (log,) = (tmp_path.rglob(pattern) for pattern in ("*.t", "metrics.jsonl", "*.log"))
    board, metrics = EventAccumulator(str(file.parent)).Reload(), json.loads(file.read_text())
    for name in ("CE", "HC", "accuracy", "lr"):
        assert [(event.step, event.value) for event in board.Scalars(name)] == [(0, pytest.approx(metrics[name]))]
    assert ("classifier1.classifier.2.weight" in utils.load_checkpoint(str(checkpoint))["net"]) == ("--drop" in flags)
    assert ("HC 0.0000" in log.read_text()) == ("100" in flags)  # within such a margin the loss is zero
    call("test.py", *out, "--resume", checkpoint)
    assert rows_of(only(tmp_path))["all-search single-shot", "fc"]["mean"]["rank20"] == 1  # two test persons


def test_periodic_checkpoints_and_the_schedule(call, sysu_tree, tmp_path):
    """Epochs above 10 that --save_epoch divides are kept; the rate falls at 30."""
    flags = [*TINY, *places(sysu_tree, tmp_path), "--save_epoch", 3, "--resume", tmp_path / "start.t"]
    net, rates = EmbedNet(10, low_dim=16, arch="tiny", pretrained="none").state_dict(), []
    state = {"net": net, "cmc": [1.0] * 20, "mAP": 1.0, "config": {"arch": "tiny"}}
    for start, end in ((8, 9), (11, 12), (29, 30)):
        utils.save_checkpoint(str(tmp_path / "start.t"), state | {"epoch": start})
        rates += re.findall(r"lr ([\d.e-]+)", call("train.py", *flags, "--method", f"from{start}", "--epochs", end))
    assert sorted(re.findall(r"epoch_(\d+)\.t", " ".join(os.listdir(tmp_path)))) == ["12", "30"]
    assert [*map(float, rates)] == [0.008, 0.008, 0.0008]


def test_regdb_all_trials_both_directions(call, bad, short_regdb, tmp_path):
    out = ["--dataset", "regdb", *places(short_regdb, tmp_path)]
    call("train.py", *TINY, *out, "--epochs", 0, "--trial", 2)
    (trained,) = tmp_path.glob("regdb_*_trial2_*_last.t")
    assert "--trial 2" in bad("test.py", *out, "--trial", 1, "--resume", trained)
    # Ten models are ten trainings; here one's weights pose as all of them.
    posing = {"net": utils.load_checkpoint(str(trained))["net"], "epoch": 0, "config": {"arch": "tiny"}}
    utils.save_checkpoint(str(tmp_path / "trial1.t"), posing)
    for trial in range(2, 11):
        (tmp_path / f"trial{trial}.t").symlink_to("trial1.t")
    flags = ["--trial", "all", "--search", "both", "--resume", "trial{trial}.t", "--img_h", 96, "--img_w", 32]
    flags += ["--workers", 0, "--save_features", tmp_path / "features{trial}/x.npz", "--mode", "all"]
    assert "RegDB has no --mode: ignored" in call("test.py", *out, *flags)
    assert all((tmp_path / f"features{trial}/x.npz").exists() for trial in range(1, 11))
    content = only(tmp_path)
    assert [network["trial"] for network in content["networks"]] == [*range(1, 11)]
    found = rows_of(content)
    assert {search for search, _ in found} == {"v2t", "t2v"}
    assert all([trial["trial"] for trial in row["trials"]] == [*range(1, 11)] for row in found.values())
    assert found["v2t", "fc"]["trials"] != found["t2v", "fc"]["trials"]


def test_llcm_from_files_to_figures(call, bad, llcm_tree, tmp_path):
    out, data = [*places(llcm_tree, tmp_path), "--workers", 0], ["--dataset", "llcm"]
    call("train.py", *data, *TINY, *out, "--epochs", 2)
    (last,) = tmp_path.glob("llcm_*_last.t")
    file = tmp_path / "features.npz"
    call("test.py", *data, *out, "--resume", last, "--search", "both", "--save_features", file)
    call("-m tools.score", *data, file, "--search", "both", "--log_path", tmp_path)
    tested, scored = (only(tmp_path, f"{name}_*_both.json")["results"] for name in ("test", "score"))
    assert tested == scored and {row["protocol"] for row in tested} == {*DATASETS["llcm"].search_flags["search"]}
    found = next(tmp_path.glob("test_*.json"))
    assert "v2t-published" in call("-m tools.report", found, "--out", tmp_path / "report.html")
    with np.load(file) as saved:
        np.savez(tmp_path / "foreign.npz", **{key: saved[key] for key in saved if key != "thermal"})
    assert "'thermal'" in bad("-m tools.score", *data, tmp_path / "foreign.npz", "--log_path", tmp_path)


PUBLISHED = {
    "train.py": "--dataset {} --lr {} --drop 0.0 --trial 1 --gpu 0 --epochs {} --w_hc {} --per_img 8",
    "test.py": "--dataset {} --lr 0.01 --drop 0.0 --trial 1 --gpu 1 --low-dim 512 --resume NAME --w_hc 0.5 {}"
    "--model_path DIR",
}


@pytest.mark.parametrize("values", [("sysu", 0.008, 60, 0.6), ("regdb", 0.0098, 80, 0.58)])
def test_the_published_training_is_the_default(values, monkeypatch):
    def parse(flags: str):
        monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
        return train.parse_args()

    args = parse(PUBLISHED["train.py"].format(*values))
    assert (args.dataset, args.lr, args.epochs, args.w_hc, args.batch_size, args.per_img) == (*values, 32, 8)
    assert (args.arch, args.low_dim, args.img_h, args.img_w, args.pretrained) == ("resnet50", 512, 288, 144, "imagenet")
    assert args == parse(f"--dataset {values[0]}")


@pytest.mark.parametrize(
    ("dataset", "more", "written"),
    [("sysu", "--mode all --gall-mode single ", (b"core", "")), ("regdb", "", (b"_core", "module."))],
)
def test_the_published_test_scores_a_published_checkpoint(
    call, dataset, more, written, sysu_tree, short_regdb, tmp_path, monkeypatch
):
    """Verbatim, with data in its place."""
    (tmp_path / "data").mkdir()
    (tmp_path / "DIR").mkdir()
    (tmp_path / "data/SYSU-MM01").symlink_to(sysu_tree)
    (tmp_path / "data/RegDB").symlink_to(short_regdb)
    published_file(tmp_path / "DIR/NAME", EmbedNet(395, arch="resnet18", pretrained="none"), *written)
    monkeypatch.chdir(tmp_path)
    out = call("test.py", *PUBLISHED["test.py"].format(dataset, more).split())
    assert all(text in out for text in ("--lr, --w_hc", "ignored", "no GPU", "DIR/NAME, epoch 7"))
    assert "has no --" not in out  # a flag of another dataset is named
    network = only(tmp_path / "log")["networks"][0]
    assert [network[k] for k in ("arch", "low_dim", "img_h", "img_w", "n_class")] == ["resnet18", 512, 288, 144, 395]
