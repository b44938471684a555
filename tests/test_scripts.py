"""The scripts as a user runs them: the whole road on both datasets, resuming, the published commands, bad input."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, TINY_BATCH, run_script, succeed
from PIL import Image

import utils
from data_loader import read_image
from model import EmbedNet

RUN = "sysu_id_resnet18_lr0.01_whc0.6_lowdim16_drop0.3_imgh96_imgw32_batchsize8_perimg4_pretrainednone"


def results(folder: Path) -> dict[tuple[str, str], dict]:
    (file,) = folder.glob("*.json")
    return {(row["protocol"], row["feature"]): row for row in json.loads(file.read_text())["results"]}


# ---- the whole road -------------------------------------------------------------------------------------------------


def test_training_leaves_checkpoints_and_a_log(sysu_run):
    last, best = (utils.load_checkpoint(str(sysu_run["models"] / f"{RUN}_{kind}.t")) for kind in ("last", "best"))
    assert last["epoch"] == 3 and best["epoch"] == 2  # of the epochs 0 to 3 only 2 is tested
    assert last["best"] == best["best"] == {"rank1": best["cmc"][0], "epoch": 2} and len(best["cmc"]) == 20
    assert last["config"]["n_class"] == 10 and last["config"]["w_hc"] == 0.6
    log = (sysu_run["logs"] / f"{RUN}.log").read_text()
    assert sorted(set(re.findall(r"epoch +(\d) step", log))) == ["0", "1", "2", "3"] and log.count("test fc") == 1
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", log)]
    assert losses[-1] < losses[0]


def test_test_only_repeats_the_score_of_training(sysu_run, tmp_path):
    flags = ["--data_path", sysu_run["data"], "--model_path", sysu_run["models"], "--log_path", tmp_path]
    out = succeed("train.py", *TINY, "--drop", 0.3, *flags, "--resume", f"{RUN}_best.t", "--test-only")
    trained = [line for line in (sysu_run["logs"] / f"{RUN}.log").read_text().splitlines() if line.startswith("test ")]
    assert [line for line in out.splitlines() if line.startswith("test ")] == trained


def test_all_sysu_protocols_in_one_go(sysu_run, tmp_path):
    flags = ["--data_path", sysu_run["data"], "--model_path", sysu_run["models"], "--log_path", tmp_path]
    out = succeed("test.py", *flags, "--resume", f"{RUN}_best.t", "--mode", "both", "--gall-mode", "both")
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
    euclidean = succeed("test.py", *flags, "--resume", f"{RUN}_best.t", "--distance", "euclidean")
    # Stripes of unit length: Euclidean distance and dot product rank alike.
    assert f"{100 * found['all-search single-shot', 'fc']['mean']['mAP']:.2f} ±" in euclidean
    assert len([*tmp_path.glob("*.json")]) == 2  # the results above are still there
    table = succeed("-m tools.report", f"trained={next(tmp_path.glob('*_both-both.json'))}")
    for text in (f"{100 * row['mean']['mAP']:.2f}", f"{100 * first['mAP']:.2f}"):
        assert text in out + next(tmp_path.glob("*_both-both.log")).read_text()
    assert table.count("chance") == table.count("trained") == 4


def test_resumed_run_is_the_uninterrupted_run(sysu_run, tmp_path):
    """From epoch 2 on again: weights, momentum, random state and scores are bit-identical (FIDELITY 7)."""
    flags = [*TINY, *TINY_BATCH, "--epochs", 3, "--lr", 0.01, "--drop", 0.3, "--data_path", sysu_run["data"]]
    flags += ["--model_path", tmp_path, "--log_path", tmp_path]
    succeed("train.py", *flags, "--resume", sysu_run["models"] / f"{RUN}_best.t")
    a, b = (utils.load_checkpoint(str(folder / f"{RUN}_last.t")) for folder in (sysu_run["models"], tmp_path))
    assert all(torch.equal(a["net"][key], b["net"][key]) for key in a["net"])
    for x, y in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True):
        assert torch.equal(x["momentum_buffer"], y["momentum_buffer"])
    assert torch.equal(a["rng"]["torch"], b["rng"]["torch"])
    assert (a["epoch"], a["cmc"], a["mAP"], a["best"]) == (b["epoch"], b["cmc"], b["mAP"], b["best"])


def test_resuming_a_published_checkpoint(sysu_tree, tmp_path, bad):
    """Without optimizer and flags, training goes on from its epoch and best rank-1. A loss that explodes names it."""
    net = EmbedNet(10, low_dim=16, arch="resnet18", pretrained="none")
    torch.save({"net": net.state_dict(), "cmc": np.linspace(0.1, 1, 20), "mAP": 0.5, "epoch": 7}, tmp_path / "old.t")
    before = (tmp_path / "old.t").read_bytes()
    flags = [*TINY, *TINY_BATCH, "--data_path", sysu_tree, "--model_path", tmp_path, "--log_path", tmp_path]
    out = succeed("train.py", *flags, "--resume", "old.t", "--epochs", 8)
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
def test_other_settings_train_and_test(sysu_tree, tmp_path, flags):
    out = ["--data_path", sysu_tree, "--model_path", tmp_path, "--log_path", tmp_path]
    succeed("train.py", *TINY, *TINY_BATCH, "--epochs", 0, *flags, *out)
    (checkpoint,) = tmp_path.glob("*.t")
    assert ("classifier1.classifier.2.weight" in utils.load_checkpoint(str(checkpoint))["net"]) == ("--drop" in flags)
    (log,) = tmp_path.glob("*.log")
    assert ("HC 0.0000" in log.read_text()) == ("100" in flags)  # within such a margin the loss is zero
    succeed("test.py", *out, "--resume", checkpoint)
    assert results(tmp_path)["all-search single-shot", "fc"]["mean"]["rank20"] == 1  # two test persons


def test_periodic_checkpoints_and_the_schedule(sysu_tree, tmp_path):
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
    out = ["--data_path", tree, "--model_path", tmp_path, "--log_path", tmp_path]
    log = succeed("train.py", *flags, *out, "--epochs", 31, "--save_epoch", 15)
    assert sorted(re.findall(r"epoch_(\d+)\.t", " ".join(p.name for p in tmp_path.glob("*.t")))) == ["15", "30"]
    rates = [float(rate) for rate in re.findall(r"lr ([\d.e-]+)", log)]
    np.testing.assert_allclose([rates[0], rates[-1]], [0.008, 0.0008])


def test_regdb_all_trials_both_directions(regdb_tree, tmp_path):
    out = ["--dataset", "regdb", "--data_path", regdb_tree, "--model_path", tmp_path, "--log_path", tmp_path]
    for trial in (1, 2):
        succeed("train.py", *TINY, *TINY_BATCH, *out, "--epochs", 0, "--trial", trial)
    name = "regdb_id_resnet18_lr0.0098_whc0.58_trial{}_lowdim16_imgh96_imgw32_batchsize8_perimg4_pretrainednone_last.t"
    for trial in range(3, 11):  # ten models are ten trainings; here the second one's weights pose as the others'
        state = utils.load_checkpoint(str(tmp_path / name.format(2)))
        state["config"]["trial"] = trial
        utils.save_checkpoint(str(tmp_path / name.format(trial)), state)
    succeed("test.py", *out, "--trial", "all", "--search", "both", "--resume", name.replace("{}", "{trial}"))
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


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(sysu_tree, tmp_path) -> Path:
    """A copy of the drawn tree to damage."""
    tree = tmp_path / "broken"
    shutil.copytree(sysu_tree, tree)
    return tree


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset", "market"], "argument --dataset: invalid choice: 'market'"),
        (["--amp", "fp16"], "--amp fp16 needs a GPU"),
        (["--cache", "disk"], "argument --cache: invalid choice"),
        (["--mode", "outdoor"], "argument --mode: invalid choice"),
        (["--arch", "vgg16"], "argument --arch: invalid choice"),
        (["--lr", "-1"], "argument --lr: must be above 0 and finite, not -1"),
        (["--epochs", "ten"], "argument --epochs: must be a whole number, not 'ten'"),
        (["--trial", "11"], "argument --trial: must be at least 1 and at most 10, not 11"),
        (["--lr", "nan"], "argument --lr: must be above 0 and finite, not nan"),
        (["--drop", "1"], "must be at least 0 and below 1"),
        (["--batch-size", "30", "--per_img", "8"], "--batch-size 30 is not a multiple of --per_img 8"),
        (["--img_h", "80"], "--img_h 80 is too low for six stripes: give 81 or more"),
        (["--gpu", "first"], "--gpu first: give the number of a GPU"),
        (["--test-only"], "name it with --resume"),
        (["--data_path", "nowhere"], "nowhere/exp/test_id.txt not found: is the dataset in nowhere?"),
        (["--lr", "inf"], "must be above 0 and finite, not inf"),
        (["--resume", "missing.t"], "--resume missing.t: no such checkpoint"),
        (["--pretrained", "missing.pth"], "--pretrained missing.pth: no such file"),
        (["--batch-size", "44"], "needs 11 persons (--batch-size 44 / --per_img 4), but only 10"),
        (["--log_path", "README.md"], "--log_path README.md: cannot be written"),
        (["--model_path", "README.md/models"], "--model_path README.md/models: cannot be written"),
    ],
)
def test_bad_flags_of_training(bad, sysu_tree, tmp_path, flags, message):
    usual = [*TINY, *TINY_BATCH, "--data_path", sysu_tree, "--model_path", tmp_path / "m", "--log_path", tmp_path / "l"]
    assert message in bad("train.py", *usual, *flags)
    assert not [*tmp_path.rglob("*.t")]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "name the checkpoint with --resume"),
        (["--resume", "missing.t"], "--resume missing.t: no such checkpoint"),
        (["--resume", "README.md"], "README.md is not a checkpoint that can be loaded"),
        (["--resume", f"{RUN}_best.t", "--arch", "resnet50"], "was trained with --arch resnet18, not --arch resnet50"),
        (["--resume", f"{RUN}_best.t", "--low-dim", "512"], "was trained with --low_dim 16, not --low_dim 512"),
        (["--resume", f"{RUN}_best.t", "--drop", "0"], "was trained with dropout, unlike --drop 0"),
        (["--resume", f"{RUN}_best.t", "--img_h", "128"], "was trained with --img_h 96, not --img_h 128"),
        (["--resume", f"{RUN}_best.t", "--dataset", "regdb"], "test_visible_1.txt not found"),
        (["--resume", f"{RUN}_best.t", "--gallery", "official"], "--gallery official and --rand_perm FILE"),
        (["--resume", f"{RUN}_best.t", "--gallery", "official", "--rand_perm", "x.mat"], "--rand_perm x.mat not found"),
        (["--dataset", "regdb", "--trial", "all", "--resume", "x.t"], "write {trial} for"),
        (["--dataset", "regdb", "--trial", "all", "--pretrained", "none", "--save_features", "f.npz"], "write {trial}"),
        (["--dataset", "regdb", "--resume", "x.t", "--mat", "x"], "--mat is for SYSU-MM01"),
        (["--resume", f"{RUN}_best.t", "--mat", "README.md"], "--mat README.md: cannot be written"),
        (["--resume", f"{RUN}_best.t", "--features", "pool4"], "argument --features: invalid choice"),
    ],
)
def test_bad_flags_of_testing(bad, sysu_run, tmp_path, flags, message):
    usual = ["--data_path", sysu_run["data"], "--model_path", sysu_run["models"], "--log_path", tmp_path]
    assert message in bad("test.py", *usual, *flags)
    assert not [*tmp_path.glob("*.json")]


def damage_ids(text: str):
    return lambda tree: (tree / "exp/train_id.txt").write_text(text)


def remove(*names: str):
    def damage(tree: Path):
        for name in names:
            shutil.rmtree(tree / name) if (tree / name).is_dir() else (tree / name).unlink()

    return damage


def truncate(pattern: str):
    def damage(tree: Path):
        path = sorted(tree.glob(pattern))[0]
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("exp/val_id.txt"), "exp/val_id.txt not found"),
        (damage_ids("1,two,3\n"), "the first line must hold person ids like '1,2,3', not '1,two,3'"),
        (damage_ids(""), "the first line must hold person ids"),
        (remove("cam3", "cam6"), "no training person has images in both modalities"),
        (truncate("cam[12]/*/0001.jpg"), "0001.jpg cannot be read as an image"),
        (truncate("cam[36]/*/0001.jpg"), "0001.jpg cannot be read as an image"),
    ],
)
def test_bad_trees_for_preprocessing(bad, broken, damage, message):
    # Damage reaches a training person: all twelve are made training persons.
    (broken / "exp/train_id.txt").write_text(",".join(map(str, range(1, 13))))
    damage(broken)
    arrays = {path: path.read_bytes() for path in broken.glob("*.npy")}
    assert message in bad("pre_process_sysu.py", "--data_path", broken)
    assert {path: path.read_bytes() for path in broken.glob("*.npy")} == arrays
    assert not [*broken.glob("*.partial")]


def save_array(name: str, array: np.ndarray):
    return lambda tree: np.save(tree / name, array)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("train_rgb_resized_img.npy"), "run 'python pre_process_sysu.py --data_path"),
        (truncate("train_rgb_resized_img.npy"), "is not a whole array"),
        (save_array("train_ir_resized_label.npy", np.arange(3)), "do not fit each other"),
        (save_array("train_ir_resized_img.npy", np.zeros((9, 8, 8), np.uint8)), "do not fit each other"),
        (save_array("train_ir_resized_label.npy", np.array([{}])), "is not a whole array"),
        (remove("exp/test_id.txt"), "exp/test_id.txt not found"),
        (remove("cam1", "cam4", "cam5", "cam6"), "no query has a match in the gallery"),
        (remove("cam1", "cam2", "cam4", "cam5"), "have no images in the gallery's cameras, (1, 2, 4, 5)"),
    ],
)
def test_bad_trees_for_training(bad, broken, tmp_path, damage, message):
    damage(broken)
    flags = [*TINY, *TINY_BATCH, "--data_path", broken, "--model_path", tmp_path, "--log_path", tmp_path]
    assert message in bad("train.py", *flags)


def test_unreadable_test_image_is_named(bad, broken, sysu_run, tmp_path):
    for image in broken.glob("cam6/*/*.jpg"):
        image.write_text("no image")
    flags = ["--data_path", broken, "--model_path", sysu_run["models"], "--log_path", tmp_path]
    line = bad("test.py", *flags, "--resume", f"{RUN}_best.t")
    assert re.search(r"cam6/\d{4}/\d{4}.jpg cannot be read as an image", line)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Visible/1/person_v_0001.bmp", "line 1: 'Visible/1/person_v_0001.bmp' is not '<relative path> <label>'"),
        ("Visible/1/person_v_0001.bmp one", "is not '<relative path> <label>'"),
        ("../secret.bmp 0", "points outside"),
        ("/etc/secret.bmp 0", "points outside"),
        ("Visible/1/person_v_0001.bmp 99999999999999999999", "is not '<relative path> <label>'"),
        ("Visible/1/missing.bmp 0", "missing.bmp not found, though it is listed"),
        ("", "no image is listed"),
    ],
)
def test_bad_regdb_lists(bad, regdb_tree, tmp_path, line, message):
    tree = tmp_path / "RegDB"
    shutil.copytree(regdb_tree / "idx", tree / "idx")
    for folder in ("Visible", "Thermal"):
        (tree / folder).symlink_to(regdb_tree / folder)
    (tree / "idx/train_visible_1.txt").write_text(line + "\n" + "Visible/1/person_v_0001.bmp 1\n" * bool(line))
    flags = [*TINY, *TINY_BATCH, "--dataset", "regdb", "--data_path", tree, "--model_path", tmp_path]
    assert message in bad("train.py", *flags, "--log_path", tmp_path)


def test_checkpoint_of_another_network_or_number_of_persons(bad, sysu_run, tmp_path):
    torch.save({"net": {"weight": torch.zeros(3)}}, tmp_path / "other.t")
    torch.save(torch.zeros(3), tmp_path / "tensor.t")
    state = EmbedNet(4, low_dim=16, arch="resnet18", pretrained="none").state_dict()
    torch.save({"net": state, "epoch": 0}, tmp_path / "four.t")
    state.popitem(), state.popitem(), state.pop("feature3.feat_block.0.weight")
    torch.save({"net": state}, tmp_path / "holes.t")
    flags = [*TINY, *TINY_BATCH, "--data_path", sysu_run["data"], "--model_path", tmp_path, "--log_path", tmp_path]
    for name, message in (
        ("other.t", "another network than this method's"),
        ("tensor.t", "has no 'net' with the network's weights"),
        ("four.t", "was trained on 4 persons, but"),
    ):
        assert message in bad("train.py", *flags, "--resume", name)
    assert "does not fit the network" in bad("test.py", *flags[-6:], "--resume", "holes.t")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optim", "adam"], "was trained with --optim sgd, not --optim adam"),
        (["--lr", "0.02"], "was trained with --lr 0.01, not --lr 0.02"),
        (["--seed", "2"], "was trained with --seed 1, not --seed 2"),
        (["--img_w", "48"], "was trained with --img_w 32, not --img_w 48"),
        (["--drop", "0.5"], "was trained with --drop 0.3, not --drop 0.5"),
        (["--w_hc", "1", "--per_img", "2"], "was trained with --w_hc 0.6 --per_img 4, not --w_hc 1.0 --per_img 2"),
        (["--epochs", "2"], "has come to epoch 3: --epochs must be 3 or more"),
    ],
)
def test_resuming_with_other_flags(bad, sysu_run, tmp_path, flags, message):
    usual = [*TINY, *TINY_BATCH, "--lr", 0.01, "--drop", 0.3, "--data_path", sysu_run["data"], "--epochs", 9]
    usual += ["--model_path", tmp_path, "--log_path", tmp_path, "--resume", sysu_run["models"] / f"{RUN}_last.t"]
    assert message in bad("train.py", *usual, *flags)
    assert not [*tmp_path.glob("*.t")]


def test_loss_that_is_not_finite_stops_the_run(bad, sysu_tree, tmp_path):
    flags = [*TINY, *TINY_BATCH, "--data_path", sysu_tree, "--model_path", tmp_path, "--log_path", tmp_path]
    line = bad("train.py", *flags, "--lr", 1e30, "--epochs", 0)
    assert re.search(r"epoch 0: the loss is not finite at step \d+ .*no checkpoint was saved yet", line)
    assert not [*tmp_path.glob("*.t")]


def test_weights_that_cannot_be_downloaded(bad, sysu_tree, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody answers there
    flags = [*TINY, *TINY_BATCH, "--data_path", sysu_tree, "--model_path", tmp_path, "--log_path", tmp_path]
    line = bad("train.py", *flags, "--pretrained", "imagenet")
    for hint in ("download.pytorch.org/models/resnet18-", str(tmp_path / "hub/checkpoints"), "--pretrained FILE"):
        assert hint in line
    with pytest.raises(OSError, match=r"resnet50-0676ba61\.pth"):  # torchvision's first weights, not its second
        EmbedNet(3, pretrained="imagenet")


def test_every_flag_takes_both_spellings(sysu_run, tmp_path):
    flags = ["--data-path", sysu_run["data"], "--model-path", sysu_run["models"], f"--log_path={tmp_path}"]
    succeed("test.py", *flags, "--resume", f"{RUN}_best.t", "--gall_mode", "multi", "--img-h=96", "--test_batch", 16)


def test_images_of_any_mode_are_read_as_rgb(tmp_path):
    for mode, name in (("L", "a.bmp"), ("P", "b.png"), ("RGBA", "c.png"), ("CMYK", "d.jpg")):
        Image.new(mode, (20, 40)).save(tmp_path / name)
        assert read_image(str(tmp_path / name), (96, 32)).shape == (96, 32, 3)
