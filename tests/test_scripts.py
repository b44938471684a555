"""The scripts as a user runs them: the whole road on both datasets, resuming, the published commands, bad input."""

import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, RUN, TINY, TINY_BATCH, run_script, succeed
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import utils
from data_loader import read_image
from model import EmbedNet


def results(folder: Path) -> dict[tuple[str, str], dict]:
    (file,) = folder.glob("*.json")
    return {(row["protocol"], row["feature"]): row for row in json.loads(file.read_text())["results"]}


# ---- the whole road -------------------------------------------------------------------------------------------------


def test_training_leaves_checkpoints_and_a_log(sysu_run):
    last, best = (utils.load_checkpoint(str(sysu_run["models"] / f"{RUN}_{kind}.t")) for kind in ("last", "best"))
    assert last["epoch"] == 3 and best["epoch"] == 2  # of the epochs 0 to 3 only 2 is tested
    assert (
        last["best"] == best["best"] == {"rank1": best["cmc"][0], "mAP": best["mAP"], "epoch": 2}
        and len(best["cmc"]) == 20
    )
    assert last["config"]["n_class"] == 10 and last["config"]["w_hc"] == 0.6
    log = (sysu_run["logs"] / f"{RUN}.log").read_text()
    assert sorted(set(re.findall(r"epoch +(\d) step", log))) == ["0", "1", "2", "3"] and log.count("test fc") == 1
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", log)]
    assert losses[-1] < losses[0]
    metrics = [json.loads(line) for line in (sysu_run["logs"] / RUN / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in metrics] == [0, 1, 2, 3] and [f"{line['loss']:.4f}" for line in metrics] == [
        f"{loss:.4f}" for loss in losses[-4:]
    ]
    assert ["fc_rank1" in line for line in metrics] == [False, False, True, False]
    assert (metrics[2]["fc_rank1"], metrics[2]["fc_mAP"]) == (best["cmc"][0], best["mAP"])


def test_the_last_line_names_the_command_to_run_next(sysu_run, tmp_path):
    """Word for word, from anywhere."""
    last_line = (sysu_run["logs"] / f"{RUN}.log").read_text().splitlines()[-1]
    assert re.match(
        r"best in training: epoch 2, rank-1 [\d.]+%, mAP [\d.]+%, saved as .*_best\.t; all protocols: ", last_line
    )
    command = shlex.split(last_line.partition("all protocols: python ")[2])
    command[command.index("--log_path") + 1] = tmp_path
    assert "indoor-search multi-shot" in succeed(*command, cwd=tmp_path)


def test_test_only_repeats_the_score_of_training(output, sysu_run, tmp_path):
    flags = ["--data_path", sysu_run["data"], "--model_path", sysu_run["models"], "--log_path", tmp_path]
    flags += [*TINY, "--drop", 0.3, "--test-only", "--resume"]
    out = output("train.py", *flags, f"{RUN}_best.t")
    assert "test fc" in output("train.py", *flags, "last", *TINY_BATCH, "--lr", 0.01)
    trained = [line for line in (sysu_run["logs"] / f"{RUN}.log").read_text().splitlines() if line.startswith("test ")]
    assert [line for line in out.splitlines() if line.startswith("test ")] == trained


def test_all_sysu_protocols_in_one_go(output, sysu_run, tmp_path):
    flags = ["--data_path", sysu_run["data"], "--model_path", sysu_run["models"], "--log_path", tmp_path]
    out = output("test.py", *flags, "--resume", f"{RUN}_best.t", "--mode", "both", "--gall-mode", "both")
    found = results(tmp_path)
    modes, shots, features = ("all", "indoor"), ("single", "multi"), ("fc", "pool5", "chance")
    assert [*found] == [(f"{m}-search {s}-shot", f) for m in modes for s in shots for f in features]
    trained = utils.load_checkpoint(str(sysu_run["models"] / f"{RUN}_best.t"))
    first = found["all-search single-shot", "fc"]["trials"][0]  # the draw that training tests on
    np.testing.assert_allclose(first["cmc"], trained["cmc"])
    np.testing.assert_allclose(first["mAP"], trained["mAP"])
    assert len({t["mAP"] for t in found["all-search single-shot", "fc"]["trials"]}) > 1  # each has its own gallery
    row = found["indoor-search multi-shot", "pool5"]
    np.testing.assert_allclose(row["mean"]["rank1"], np.mean([t["cmc"][0] for t in row["trials"]]))
    np.testing.assert_allclose(row["std"]["mAP"], np.std([t["mAP"] for t in row["trials"]]))
    euclidean = output("test.py", *flags, "--resume", f"{RUN}_best.t", "--distance", "euclidean")
    # Stripes of unit length: Euclidean distance and dot product rank alike.
    assert f"{100 * found['all-search single-shot', 'fc']['mean']['mAP']:.2f} ±" in euclidean
    assert len([*tmp_path.glob("*.json")]) == 2  # the results above are still there
    result = next(tmp_path.glob("*_both-both.json"))
    table = output("-m tools.report", f"trained={result}", "--out", tmp_path / "r.html")
    for text in (f"{100 * row['mean']['mAP']:.2f}", f"{100 * first['mAP']:.2f}"):
        assert text in out + next(tmp_path.glob("*_both-both.log")).read_text()
    assert table.count("chance") == table.count("trained") == 4


def test_resuming_a_published_checkpoint(output, sysu_tree, tmp_path, bad):
    """Without optimizer and flags, training goes on from its epoch and best rank-1. A loss that explodes names it."""
    net = EmbedNet(10, low_dim=16, arch="resnet18", pretrained="none")
    torch.save({"net": net.state_dict(), "cmc": np.linspace(0.1, 1, 20), "mAP": 0.5, "epoch": 7}, tmp_path / "old.t")
    before = (tmp_path / "old.t").read_bytes()
    flags = [*TINY, *TINY_BATCH, "--data_path", sysu_tree, "--model_path", tmp_path, "--log_path", tmp_path]
    out = output("train.py", *flags, "--resume", "old.t", "--epochs", 8)
    assert "holds no optimizer state" in out and "epoch   8 step" in out and "epoch   7 step" not in out
    (last,) = tmp_path.glob("*_last.t")
    state = utils.load_checkpoint(str(last))
    assert state["epoch"] == 8 and state["best"]["rank1"] >= 0.1
    line = bad("train.py", *flags, "--resume", "old.t", "--epochs", 8, "--lr", 1e30)
    assert re.search("epoch 8: .*not finite.*the last good checkpoint is .*old.t", line)
    assert (tmp_path / "old.t").read_bytes() == before


@pytest.mark.parametrize(
    "flags",
    [
        ["--optim", "adam", "--dist-type", "l1", "--thd", "0.05", "--drop", "0.3", "--lr", "0.001"],
        [
            "--dist-type",
            "cos",
            "--thd",
            "100",
            "--w_hc",
            "0.1",
            "--img_h",
            "120",
            "--img_w",
            "40",
            "--mode",
            "indoor",
        ],  # scaled arrays
    ],
)
def test_other_settings_train_and_test(output, sysu_tree, tmp_path, flags):
    out = ["--data_path", sysu_tree, "--model_path", tmp_path, "--log_path", tmp_path]
    output("train.py", *TINY, *TINY_BATCH, "--epochs", 0, *flags, *out, "--tensorboard")
    (checkpoint,) = tmp_path.glob("*.t")
    (folder,) = (file.parent for file in tmp_path.rglob("metrics.jsonl"))
    board = EventAccumulator(str(folder)).Reload()
    metrics = json.loads((folder / "metrics.jsonl").read_text())
    for name in ("CE", "HC", "accuracy", "lr"):
        assert [(event.step, event.value) for event in board.Scalars(name)] == [(0, pytest.approx(metrics[name]))]
    assert ("classifier1.classifier.2.weight" in utils.load_checkpoint(str(checkpoint))["net"]) == ("--drop" in flags)
    (log,) = tmp_path.glob("*.log")
    assert ("HC 0.0000" in log.read_text()) == ("100" in flags)  # within such a margin the loss is zero
    output("test.py", *out, "--resume", checkpoint)
    assert results(tmp_path)["all-search single-shot", "fc"]["mean"]["rank20"] == 1  # two test persons


def test_periodic_checkpoints_and_the_schedule(output, sysu_tree, tmp_path):
    """Epochs above 10 that --save_epoch divides are kept; the rate falls at 30. One batch an epoch makes it quick."""
    flags = [*TINY, "--batch-size", 4, "--per_img", 1, "--lr", 0.008]
    tree = tmp_path / "tree"
    shutil.copytree(sysu_tree / "exp", tree / "exp")
    for cam in range(1, 7):
        (tree / f"cam{cam}").symlink_to(sysu_tree / f"cam{cam}")
    labels = np.arange(4)  # four images of noise stand for the training set
    noise = np.random.default_rng(0).integers(0, 256, (4, 96, 32, 3), dtype=np.uint8)
    for modality in ("rgb", "ir"):
        np.save(tree / f"train_{modality}_resized_img.npy", noise)
        np.save(tree / f"train_{modality}_resized_label.npy", labels)
    out = ["--data_path", tree, "--model_path", tmp_path, "--log_path", tmp_path, "--workers", 0]
    net = EmbedNet(4, low_dim=16, arch="resnet18", pretrained="none").state_dict()
    rates = []
    for start, end in ((8, 12), (28, 30)):
        utils.save_checkpoint(str(tmp_path / "start.t"), {"net": net, "epoch": start, "cmc": [1.0] * 20, "mAP": 1.0})
        logs = [*out, "--log_path", tmp_path / str(start), "--resume", tmp_path / "start.t", "--save_epoch", 3]
        log = output("train.py", *flags, *logs, "--epochs", end)
        rates += [float(rate) for rate in re.findall(r"lr ([\d.e-]+)", log)]
    assert sorted(re.findall(r"epoch_(\d+)\.t", " ".join(p.name for p in tmp_path.glob("*.t")))) == ["12", "30"]
    np.testing.assert_allclose(rates, [0.008] * 5 + [0.0008])


def test_regdb_all_trials_both_directions(output, regdb_tree, tmp_path):
    out = ["--dataset", "regdb", "--data_path", regdb_tree, "--model_path", tmp_path, "--log_path", tmp_path]
    output("train.py", *TINY, *TINY_BATCH, *out, "--epochs", 0, "--trial", 2)
    name = "regdb_id_resnet18_lr0.0098_whc0.58_trial{}_lowdim16_imgh96_imgw32_batchsize8_perimg4_pretrainednone_last.t"
    state = utils.load_checkpoint(str(tmp_path / name.format(2)))
    for trial in {*range(1, 11)} - {2}:  # ten models are ten trainings; here one's weights pose as the others'
        posing = {"net": state["net"], "epoch": 0, "config": state["config"] | {"trial": trial}}
        utils.save_checkpoint(str(tmp_path / name.format(trial)), posing)
    output(
        "test.py", *out, "--workers", 0, "--trial", "all", "--search", "both", "--resume", name.replace("{}", "{trial}")
    )
    found = results(tmp_path)
    assert {search for search, _ in found} == {"v2t", "t2v"}
    assert all(len(row["trials"]) == 10 for row in found.values())
    assert found["v2t", "fc"]["trials"] != found["t2v", "fc"]["trials"]
    (file,) = tmp_path.glob("*.json")
    assert [n["trial"] for n in json.loads(file.read_text())["networks"]] == [*range(1, 11)]

    mixed = run_script("test.py", *out, "--trial", 2, "--resume", name.format(1))
    assert mixed.returncode == 2 and "was trained with --trial 1, not --trial 2" in mixed.stderr


PUBLISHED = [
    "train.py --dataset sysu --lr 0.008 --drop 0.0 --trial 1 --gpu 0 --epochs 60 --w_hc 0.6 --per_img 8",
    "test.py --dataset sysu --lr 0.01 --drop 0.0 --trial 1 --gpu 1 --low-dim 512 --resume NAME --w_hc 0.5 --mode all "
    "--gall-mode single --model_path DIR",
    "train.py --dataset regdb --lr 0.0098 --drop 0.0 --trial 1 --gpu 0 --epochs 80 --w_hc 0.58 --per_img 8",
    "test.py --dataset regdb --lr 0.01 --drop 0.0 --trial 1 --gpu 1 --low-dim 512 --resume NAME --w_hc 0.5 "
    "--model_path DIR",
]


@pytest.mark.parametrize("command", PUBLISHED)
def test_published_commands_are_understood(command, monkeypatch):
    script, *flags = command.split()
    monkeypatch.setattr(sys, "argv", [script, *flags])
    parsed = runpy.run_path(str(ROOT / script))["parse_args"]()
    args, ignored = (parsed, None) if script == "train.py" else parsed
    regdb = "regdb" in command
    assert args.data_path == ("data/RegDB" if regdb else "data/SYSU-MM01") and (args.img_h, args.trial) in (
        (288, 1),
        (None, 1),
    )
    if script == "train.py":
        values = (
            args.lr,
            args.epochs,
            args.w_hc,
            args.batch_size,
            args.per_img,
            args.low_dim,
            args.arch,
            args.pretrained,
        )
        expected = (0.0098, 80, 0.58) if regdb else (0.008, 60, 0.6)
        assert values == (*expected, 32, 8, 512, "resnet50", "imagenet")
        plain = [flag for flag in flags if flag in ("--dataset", "sysu", "regdb")]
        monkeypatch.setattr(sys, "argv", [script, *plain])
        assert runpy.run_path(str(ROOT / script))["parse_args"]() == args  # these are the defaults
    else:
        assert sorted(ignored) == ["lr", "w_hc"] and args.resume == "NAME" and args.low_dim == 512


@pytest.mark.parametrize("dataset", ["sysu", "regdb"])
def test_published_test_command_scores_a_published_checkpoint(dataset, sysu_tree, regdb_tree, tmp_path):
    """Verbatim, with data in its place, on a file with nothing but net, cmc, mAP and epoch."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/SYSU-MM01").symlink_to(sysu_tree)
    (tmp_path / "data/RegDB").symlink_to(regdb_tree)
    (tmp_path / "DIR").mkdir()
    net = EmbedNet(395, arch="resnet18", pretrained="none")
    torch.save({"net": net.state_dict(), "cmc": np.ones(20), "mAP": np.float64(1), "epoch": 7}, tmp_path / "DIR/NAME")
    command = next(c for c in PUBLISHED if c.startswith(f"test.py --dataset {dataset}"))
    out = succeed(*command.split(), cwd=tmp_path)
    for text in ("only training uses --lr, --w_hc: ignored", "no GPU is available", "checkpoint: DIR/NAME, epoch 7"):
        assert text in out
    (file,) = (tmp_path / "log").glob("*.json")
    network = json.loads(file.read_text())["networks"][0]
    assert [network[k] for k in ("arch", "low_dim", "img_h", "img_w", "n_class")] == ["resnet18", 512, 288, 144, 395]


def test_every_flag_takes_both_spellings(output, sysu_run, tmp_path):
    flags = ["--data-path", sysu_run["data"], "--model-path", sysu_run["models"], f"--log_path={tmp_path}"]
    output("test.py", *flags, "--resume", f"{RUN}_best.t", "--gall_mode", "multi", "--img-h=96", "--test_batch", 16)


def test_images_of_any_mode_are_read_as_rgb(tmp_path):
    for mode, name in (("L", "a.bmp"), ("P", "b.png"), ("RGBA", "c.png"), ("CMYK", "d.jpg")):
        Image.new(mode, (20, 40)).save(tmp_path / name)
        assert read_image(str(tmp_path / name), (96, 32)).shape == (96, 32, 3)
