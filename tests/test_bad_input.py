"""Bad input, systematically: one line that names cause and remedy, exit status 2, and every file left as it is.

The fixture `bad` sees to all of that but the words.
"""

import contextlib
import functools
import json
import os
import pickle
import re
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RUN, TINY, TINY_BATCH, succeed
from PIL import Image
from test_score import features_file

import utils
from model import EmbedNet
from tools.killtest import start

# ---- flags ----------------------------------------------------------------------------------------------------------


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
        (["--low-dim", "1" + "0" * 30], "argument --low-dim: must be at least 1 and at most 65535"),
        (["--img_w", "1" + "0" * 20], "argument --img-w: must be at least 1 and at most 2048"),
        (["--batch-size", "1" + "0" * 5000], "argument --batch-size: must be"),
        (["--workers", "100000"], "argument --workers: must be at least 0 and at most 256"),
        (["--method", "a/b"], "--method a/b becomes part of file names: leave out the slash"),
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
        (["--resume", f"{RUN}_best.t", "--save_features", f"{RUN}_best.t"], "give a name that ends in .npz"),
        (["--resume", "{trial}_best.t"], "--resume {trial}_best.t: no such checkpoint"),
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


def folder_instead(name: str):
    def damage(tree: Path):
        (tree / name).unlink()
        (tree / name).mkdir()

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
        (folder_instead("train_ir_resized_img.npy"), "train_ir_resized_img.npy is a folder"),
        (truncate("cam[12]/*/0001.jpg"), "0001.jpg cannot be read as an image"),
        (truncate("cam[36]/*/0001.jpg"), "0001.jpg cannot be read as an image"),
    ],
)
def test_bad_trees_for_preprocessing(bad, broken, damage, message):
    # Damage reaches a training person: all twelve are made training persons.
    (broken / "exp/train_id.txt").write_text(",".join(map(str, range(1, 13))))
    damage(broken)
    arrays = {path: path.read_bytes() for path in broken.glob("*.npy") if path.is_file()}
    assert message in bad("pre_process_sysu.py", "--data_path", broken)
    assert {path: path.read_bytes() for path in broken.glob("*.npy") if path.is_file()} == arrays
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
        (save_array("train_ir_resized_img.npy", np.zeros((5, 0, 0, 3), np.uint8)), "train_ir_resized_"),
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
    state.popitem(), state.popitem(), state.pop("feature3.feat_block.0.bias")
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


@pytest.mark.parametrize("stopped", [False, True])
def test_loss_that_is_not_finite_stops_the_run(bad, sysu_tree, tmp_path, monkeypatch, stopped):
    """Also if a signal comes before it is noticed."""
    if stopped:
        steps = []

        def check() -> None:
            steps.append(True)
            if len(steps) == 3:
                raise utils.Stopped(130)

        monkeypatch.setattr(utils, "stoppable", lambda: contextlib.nullcontext(check))
    flags = [*TINY, *TINY_BATCH, "--data_path", sysu_tree, "--model_path", tmp_path, "--log_path", tmp_path]
    line = bad("train.py", *flags, "--lr", 1e30, "--epochs", 0)
    assert re.search(r"epoch 0: the loss is not finite at step \d+ .*no checkpoint was saved yet", line)
    assert not [*tmp_path.glob("*.t")]


def test_what_is_refused_writes_no_log(tmp_path):
    """Not even as the program ends."""
    process = start(["train.py", *TINY, "--data_path", tmp_path, "--model_path", tmp_path, "--log_path", tmp_path])
    assert "test_id.txt not found" in process.communicate()[0] and process.returncode == 2
    assert not [*tmp_path.rglob("*.log")]


def test_weights_that_cannot_be_downloaded(bad, sysu_tree, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody answers there
    flags = [*TINY, *TINY_BATCH, "--data_path", sysu_tree, "--model_path", tmp_path, "--log_path", tmp_path]
    line = bad("train.py", *flags, "--pretrained", "imagenet")
    for hint in ("download.pytorch.org/models/resnet18-", str(tmp_path / "hub/checkpoints"), "--pretrained FILE"):
        assert hint in line
    with pytest.raises(OSError, match=r"resnet50-0676ba61\.pth"):  # torchvision's first weights, not its second
        EmbedNet(3, pretrained="imagenet")


# ---- checkpoints of others ------------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return print, ("this must never be printed",)


def rewrite(path: Path, change) -> None:
    """Change the pickle in a checkpoint of torch.save, with the checksums to match."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, change(data) if name.endswith("data.pkl") else data)


def hostile(folder: Path, how: str) -> Path:
    """A checkpoint of an EmbedNet for ten persons, with one thing about it that a stranger might have made."""
    path, net = folder / "hostile.t", EmbedNet(10, low_dim=16, arch="resnet18", pretrained="none").state_dict()
    state, bias = {"net": net, "epoch": 3, "cmc": [0.5] * 20, "mAP": 0.5}, "classifier1.classifier.1.bias"
    weight = "classifier1.classifier.1.weight"
    changes = {
        "runs code": {"cmc": Bomb()},
        "runs code, old format": {"cmc": Bomb()},
        "a module": {"net": torch.nn.Linear(2, 2)},
        "a set": {"cmc": {1, 2}},
        "nested": {"cmc": functools.reduce(lambda inner, _: [inner], range(5000), [])},
        "epoch": {"epoch": "seven"},
        "size": {"config": {"img_h": 4096}},
        "size in words": {"config": {"img_w": "144"}},
        "config": {"config": {"lr": torch.zeros(3)}},
        "a billion persons": {"net": {**net, weight: torch.zeros(1, 1).expand(10**9, 16)}},
        "sparse": {"net": {**net, bias: torch.zeros(10).to_sparse()}},
        "a word": {"net": {**net, bias: "ten"}},
        "complex": {"net": {**net, bias: torch.zeros(10, dtype=torch.complex64)}},
        "no persons": {"net": {**net, weight: torch.empty(0, 10**12)}},
        "no features": {"net": {**net, weight: torch.empty(10**12, 0)}},
        "large features": {"net": {**net, weight: torch.zeros(1, 10**6)}},
        "many bytes": {"cmc": bytearray(10)},
        "lists of the same lists": {"cmc": functools.reduce(lambda inner, _: [inner] * 10, range(10), 0.5)},
        "one tensor of many names": {"metrics": [net["visible_net.visible.layer4.1.conv2.weight"]] * 500},
        "not finite": {"net": {**net, "visible_net.visible.bn1.weight": torch.full((64,), torch.nan)}},
        "another shape": {"net": {**net, bias: torch.zeros(11)}},
    }
    sys.setrecursionlimit(10**5)
    torch.save(state | changes.get(how, {}), path, _use_new_zipfile_serialization="old format" not in how)
    sys.setrecursionlimit(1000)
    if how == "a bare pickle":
        path.write_bytes(pickle.dumps(Bomb(), protocol=4))
    if how == "a flipped bit":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    if how == "more than the file":
        torch.save({"net": {"a": torch.zeros(12345)}}, path)
        rewrite(
            path,
            lambda data: data.replace(b"M" + (12345).to_bytes(2, "little"), b"J" + (2**31 - 1).to_bytes(4, "little")),
        )
    if how == "a bomb":
        with (
            zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive,
            archive.open("archive/data/9999", "w") as file,
        ):
            for _ in range(200):
                file.write(bytes(2**20))
    return path


SAFELY = "is not a checkpoint that can be loaded safely"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("runs code", SAFELY),
        ("runs code, old format", SAFELY),
        ("a bare pickle", SAFELY),
        ("a module", SAFELY),
        ("a set", SAFELY),
        ("nested", SAFELY),
        ("a billion persons", SAFELY),
        ("sparse", SAFELY),
        ("more than the file", SAFELY),
        ("a flipped bit", "is damaged, or claims more than it holds"),
        ("a bomb", SAFELY),
        ("truncated", "is damaged, or claims more than it holds"),
        ("many bytes", SAFELY),
        ("lists of the same lists", SAFELY),
        ("one tensor of many names", SAFELY),
        ("a word", "has no 'net' with the network's weights"),
        ("complex", "does not fit the network: classifier1.classifier.1.bias is torch.complex64"),
        ("no persons", "another network than this method's"),
        ("no features", "another network than this method's"),
        ("large features", "another network than this method's"),
        ("epoch", "its config or its epoch is not what train.py writes"),
        ("size", "its config or its epoch is not what train.py writes"),
        ("size in words", "its config or its epoch is not what train.py writes"),
        ("config", "its config or its epoch is not what train.py writes"),
        ("not finite", "features of the visible images are not finite"),
        ("another shape", "does not fit the network"),
    ],
)
def test_hostile_checkpoints(bad, capsys, sysu_tree, tmp_path, how, message):
    flags = ["--data_path", sysu_tree, "--log_path", tmp_path, "--img_h", 96, "--img_w", 32, "--features", "fc"]
    flags = flags[: 4 if how.startswith("size") else None]
    assert message in bad("test.py", *flags, "--resume", hostile(tmp_path, how))
    assert "never" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": {"state": {}}}, "the optimizer is of another network"),
        ({"optimizer": {}}, "its training state is damaged"),
        ({"optimizer": None}, "its training state is damaged"),
        (
            {"optimizer": {"state": {number: {"momentum_buffer": torch.zeros(3)} for number in range(200)}}},
            "of another network",
        ),
        ({"optimizer": {"momentum_buffer": torch.tensor(0.5)}}, "of another network"),
        ({"optimizer": {"momentum_buffer": lambda x: x.long()}}, "of another network"),
        ({"optimizer": {"momentum": lambda x: x}}, "of another network"),
        ({"rng": {"torch": torch.zeros(3), "cuda": None}}, "its training state is damaged"),
        ({"rng": None}, "its training state is damaged"),
        ({"step": 10**9}, "there is no such epoch or step"),
        ({"step": 2, "history": torch.zeros(1, 3)}, "its training state is damaged"),
        ({"epoch": -7}, "there is no such epoch or step"),
        ({"cmc": "high"}, "a score is not a number"),
        ({"best": {}}, "its training state is damaged"),
        ({"best": {"rank1": float("nan"), "mAP": 0.5, "epoch": 2}}, "a score is not a number"),
        ({"best": {"rank1": 0.5, "mAP": 0.5, "epoch": "two"}}, "there is no such best epoch"),
        ({"metrics": [torch.zeros(1)]}, "its training state is damaged"),
        ({"metrics": 5}, "or no metrics"),
        ({"metrics": [{"epoch": torch.zeros(1)}]}, "its training state is damaged"),
    ],
)
def test_training_states_that_do_not_hold_together(bad, sysu_run, tmp_path, change, message):
    state = utils.load_checkpoint(str(sysu_run["models"] / f"{RUN}_last.t"))
    ((name, value),) = (change.get("optimizer") or {"state": 0}).items() or [("state", 0)]
    if name.startswith("momentum"):  # of each parameter, instead of its own
        momenta = {number: own["momentum_buffer"] for number, own in state["optimizer"]["state"].items()}
        change = {number: {name: value(x) if callable(value) else value} for number, x in momenta.items()}
        change = {"optimizer": {"state": change}}
    torch.save(state | change, tmp_path / "state.t")
    flags = [*TINY, *TINY_BATCH, "--lr", 0.01, "--drop", 0.3, "--data_path", sysu_run["data"], "--epochs", 9]
    flags += ["--model_path", tmp_path, "--log_path", tmp_path]
    assert message in bad("train.py", *flags, "--resume", tmp_path / "state.t")


def test_metrics_of_another_run_are_not_lost(bad, sysu_run, tmp_path):
    """The same command with other --model_path but the same --log_path."""
    flags = [*TINY, *TINY_BATCH, "--lr", 0.01, "--drop", 0.3, "--data_path", sysu_run["data"], "--epochs", 3]
    flags += ["--model_path", tmp_path, "--log_path", sysu_run["logs"]]
    for resume in ([], ["--resume", "last"]):
        assert "metrics.jsonl is of another run: give another --log_path" in bad("train.py", *flags, *resume)


def test_resuming_on_other_persons(bad, sysu_run, broken, tmp_path):
    labels = np.load(broken / "train_rgb_resized_label.npy")
    np.save(broken / "train_rgb_resized_label.npy", labels[::-1])
    flags = [*TINY, *TINY_BATCH, "--lr", 0.01, "--drop", 0.3, "--data_path", broken, "--epochs", 9]
    flags += ["--model_path", tmp_path, "--log_path", tmp_path, "--resume", sysu_run["models"] / f"{RUN}_last.t"]
    assert "was trained on other persons or images than those of" in bad("train.py", *flags)


def test_existing_runs_are_not_written_over(bad, call, capsys, sysu_run):
    flags = [*TINY, *TINY_BATCH, "--lr", 0.01, "--drop", 0.3, "--data_path", sysu_run["data"], "--epochs", 3]
    flags += ["--model_path", sysu_run["models"], "--log_path", sysu_run["logs"]]
    assert "_last.t is there already: --resume last goes on with it" in bad("train.py", *flags)
    for resume, change, message in (
        ("last", ["--epochs", 2], "has come to epoch 3: --epochs must be 3 or more"),
        (f"{RUN}_best.t", ["--test_batch", 3], "was trained with --test_batch 64, not --test_batch 3"),
        ("last", ["--data_path", sysu_run["models"]], "exp/test_id.txt not found"),
    ):
        assert message in bad("train.py", *flags, "--resume", resume, *change)
    with utils.lock(str(sysu_run["models"] / RUN)), pytest.raises(SystemExit):
        call("train.py", *flags, "--resume", "last")
    assert f"{RUN}… (it holds" in capsys.readouterr().err
    assert "whc0.6_lowdim16_drop0.3_imgh96_imgw32_batchsize8_perimg4_pretrainednone_last.t: no such checkpoint" in bad(
        "train.py", *flags, "--method", "new", "--test-only", "--resume", "last"
    )


# ---- images, lists and arrays of others -----------------------------------------------------------------------------


def bomb(path: Path) -> None:
    Image.new("1", (20000, 20000)).save(path, "PNG")


def postscript(path: Path) -> None:
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("cam1/*/0001.jpg", bomb, "0001.jpg cannot be read as an image (Image size (400000000 pixels) exceeds limit"),
        ("cam1/*/0001.jpg", postscript, "0001.jpg cannot be read as an image (cannot identify image file"),
        ("cam1/*/0001.jpg", pipe, "0001.jpg not found, though it is listed"),
        ("cam1/*/0001.jpg", folder, "0001.jpg not found, though it is listed"),
        ("cam1/*/0001.jpg", lambda path: path.write_bytes(b""), "0001.jpg cannot be read as an image"),
        ("exp/train_id.txt", pipe, "train_id.txt not found"),
        ("exp/train_id.txt", folder, "train_id.txt not found"),
        ("exp/train_id.txt", lambda path: os.truncate(path, 2**40), "train_id.txt is too large for a list"),
        ("exp/train_id.txt", lambda path: path.write_bytes(b"\xff\xfe1"), "train_id.txt is not a text file"),
        ("exp/train_id.txt", lambda path: path.write_text("1,-2"), "must hold person ids like '1,2,3'"),
    ],
)
def test_hostile_trees(bad, broken, file, damage, message):
    (broken / "exp/train_id.txt").write_text(",".join(map(str, range(1, 13))))
    damage(min(broken.glob(file)))
    assert message in bad("pre_process_sysu.py", "--data_path", broken, "--force")


def test_hostile_arrays(bad, broken, tmp_path):
    """Headers that claim a petabyte, or less than there is, or other things than arrays."""
    name, flags = broken / "train_ir_resized_img.npy", [*TINY, *TINY_BATCH, "--log_path", tmp_path / "log"]
    whole = np.load(name)

    def header(shape: tuple) -> bytes:
        return (
            np.lib.format.magic(1, 0)
            + (118).to_bytes(2, "little")
            + (f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n")
        )

    np.savez(tmp_path / "archive.npz", whole)
    for data in (
        header((10**12, *whole.shape[1:])),
        header((len(whole) - 1, *whole.shape[1:])) + whole.tobytes(),
        header(whole.shape) + whole.tobytes() + b"more",
        (tmp_path / "archive.npz").read_bytes(),
        pickle.dumps(whole),
        b"",
    ):
        name.write_bytes(data)
        line = bad("train.py", *flags, "--data_path", broken, "--model_path", tmp_path / "m")
        assert "train_ir_resized_img.npy is not a whole array" in line and "run 'python pre_process_sysu.py" in line


def test_paths_stay_inside_the_tree_but_links_of_its_owner_work(bad, regdb_tree, tmp_path):
    shutil.copytree(regdb_tree, tmp_path / "real")
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    shutil.move(tmp_path / "real/Thermal", tmp_path / "elsewhere")
    (tmp_path / "real/Thermal").symlink_to(tmp_path / "elsewhere")
    flags = ["--dataset", "regdb", "--pretrained", "none", "--arch", "resnet18", "--img_h", 96, "--img_w", 32]
    flags += ["--features", "fc", "--data_path", tmp_path / "linked"]
    assert "v2t" in succeed("test.py", *flags, "--log_path", tmp_path / "log")
    index = tmp_path / "real/idx/test_visible_1.txt"
    for line in ("/etc/passwd 0", "  /etc/passwd 0", "Visible/../../x 0", "..\\x 0", ".. 0"):
        index.write_text(line + "\n")
        assert "points outside" in bad("test.py", *flags, "--log_path", tmp_path / "log2")


# ---- tools ----------------------------------------------------------------------------------------------------------


def result(**changes) -> str:
    """A JSON file of test.py in small."""
    mean = dict.fromkeys(("rank1", "rank5", "rank10", "rank20", "mAP", "mINP"), 0.5)
    trials = [{"trial": trial, "cmc": [0.5] * 20} for trial in (1, 2)]
    rows = [{"protocol": "v2t", "feature": kind, "mean": mean, "trials": trials} for kind in ("fc", "chance")]
    sizes = {"queries": 3, "without_match": 0, "gallery_images": 3, "gallery_persons": 3}
    counts = {"v2t": {**sizes, "chance": 0.3, "deviation": 0.2}}
    content = {"results": rows, "counts": counts, "options": [], "flags": {"dataset": "regdb"}}
    return json.dumps(content | changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "not found: give a JSON file that test.py wrote"),
        ("", "is not a JSON file that test.py wrote"),
        ("[" * 100000, "is not a JSON file that test.py wrote"),
        ("[]", "is not a JSON file that test.py wrote"),
        (result(counts={}), "is not a JSON file that test.py wrote"),
        (result(counts={"v2t": {}}), "is not a JSON file that test.py wrote"),
        (result(counts={"v2t": 3}), "is not a JSON file that test.py wrote"),
        (result(results=[]), "is not a JSON file that test.py wrote"),
        (result(results=[{"protocol": "v2t", "feature": "fc", "mean": {}}]), "is not a JSON file that test.py wrote"),
        (result(results=None), "is not a JSON file that test.py wrote"),
        (result(options=None), "is not a JSON file that test.py wrote"),
        (result(flags={"dataset": "market"}), "is not a JSON file that test.py wrote"),
        (result(flags={}), "is not a JSON file that test.py wrote"),
    ],
)
def test_results_of_others(bad, tmp_path, text, message):
    (tmp_path / "good.json").write_text(result())
    if text is not None:
        (tmp_path / "bad.json").write_text(text)
    assert message in bad("-m tools.report", tmp_path / "good.json", tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("tool", "flags", "message"),
    [
        ("report", [], "the following arguments are required"),
        ("report", ["a=good.json", "a=good.json"], "two files have one label"),
        ("report", ["good.json", "--features", "pool5"], "has no pool5 features, but fc"),
        ("report", ["."], "metrics.jsonl not found: give the folder of a run"),
        ("report", ["nothing.json"], "nothing.json not found: give a JSON file"),
        ("score", [], "the following arguments are required"),
        ("score", ["f.npz", "--gallery", "official"], "--gallery official and --rand_perm FILE"),
        ("score", ["f.npz", "--gallery", "official", "--rand-perm", "f.npz"], "is not the rand_perm_cam.mat"),
        ("score", ["f.npz", "--distance", "l1"], "argument --distance: invalid choice"),
        ("score", ["f.npz", "f.npz"], "two files have one name"),
        ("score", ["nothing.npz"], "nothing.npz not found"),
        ("score", ["text.npz"], "text.npz cannot be read as features"),
        ("score", ["f.npz", "--log-path", "f.npz"], "--log_path f.npz: cannot be written"),
        ("visualize", [], "the following arguments are required"),
        ("visualize", ["portrait"], "invalid choice: 'portrait'"),
        ("visualize", ["samples", "."], "neither cam1..cam6"),
        ("visualize", ["curves", "nowhere"], "nowhere not found: give the folder of a run"),
        ("visualize", ["curves", "good.json"], "is not the metrics.jsonl of a run"),
        ("visualize", ["curves", "."], "metrics.jsonl not found: give the folder of a run"),
        ("visualize", ["cmc", "text.npz"], "is not a JSON file that test.py wrote"),
        ("visualize", ["cmc", "good.json", "--features", "pool5"], "has no pool5 features, but fc"),
        ("visualize", ["embedding", "text.npz"], "text.npz cannot be read as features"),
        ("visualize", ["embedding", "good.npz", "--features", "pool5"], "holds no features 'pool5'"),
        ("visualize", ["distances", "good.npz", "--dataset", "regdb"], "camids must be 1 to 2 for regdb"),
        ("visualize", ["distances", "good.npz", "--out", "x.gif"], "give a name that ends in .png, .jpg, .pdf"),
        ("visualize", ["distances", "good.npz", "--out", "good.json/x.png"], "--out good.json: cannot be written"),
        ("visualize", ["ranked", "good.npz", "--data-path", "."], "not found, though it is listed"),
        ("visualize", ["attention", "nothing.t", "--data-path", "."], "nothing.t not found: give a checkpoint"),
        ("visualize", ["samples", ".", "--out", "x.png", "--persons", "0"], "must be at least 1"),
        ("make_synthetic", ["--dataset", "sysu"], "the following arguments are required: --out"),
        ("make_synthetic", ["--dataset", "sysu", "--out", "."], "holds other content or other settings"),
        ("make_synthetic", ["--dataset", "sysu", "--out", "x", "--ids", "3"], "--ids from 5"),
        ("make_synthetic", ["--dataset", "regdb", "--out", "x", "--seed", "-1"], "must be at least 0"),
        ("benchmark", ["speed"], "invalid choice: 'speed'"),
        ("visualize", ["samples", ".", "--out", "there.png"], "there.png is a file of the dataset"),
        ("report", ["good.json", "--out", "good.json"], "give a name that ends in .html"),
        ("make_synthetic", ["--dataset", "sysu", "--out", "/"], "/ cannot be made: give another --out"),
        ("benchmark", ["train", "--steps", "0"], "must be at least 1"),
        ("benchmark", ["data", "--batch-size", "10"], "--batch-size 10 is not a multiple of 8"),
        ("benchmark", ["train", "--only", "nothing"], "--only nothing: no row ends so"),
        ("benchmark", ["train", "--json", "good.txt"], "give a name that ends in .json"),
        ("killtest", ["--kills", "0"], "must be at least 1"),
    ],
)
def test_bad_flags_of_tools(bad, monkeypatch, tmp_path, tool, flags, message):
    (tmp_path / "good.json").write_text(result())
    (tmp_path / "text.npz").write_text("text")
    (tmp_path / "there.png").write_text("picture")
    np.savez(tmp_path / "f.npz", fc=np.eye(3))
    features_file(tmp_path / "good.npz")
    monkeypatch.chdir(tmp_path)
    assert message in bad(f"-m tools.{tool}", *flags)


def test_features_that_claim_more_than_they_hold(bad, tmp_path):
    np.savez(tmp_path / "f.npz", fc=np.eye(3), pids=np.arange(3))
    with zipfile.ZipFile(tmp_path / "f.npz") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "g.npz", "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data.replace(b"(3, 3), }                    ", b"(999999999999, 3), }         "))
    assert "an array's header tells another size" in bad("-m tools.score", tmp_path / "g.npz", "--log_path", tmp_path)
    with zipfile.ZipFile(tmp_path / "h.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("fc.npy", bytes(2**28))
    assert "claims more than it holds" in bad("-m tools.score", tmp_path / "h.npz", "--log_path", tmp_path)
