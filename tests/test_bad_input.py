"""Bad input, systematically: one line that names cause and remedy, exit status 2, and every file left as it is.

The fixture `bad` sees to all of that but the words.
"""

import functools
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RUN, RUN_FLAGS, TINY, features_file, places, result
from PIL import Image

import utils

# ---- flags ----------------------------------------------------------------------------------------------------------

COMMANDS = {  # script: flags, and words of the message; BEST is a checkpoint, good.* and text.npz are files
    "train.py": [
        ("--trial 11", "--trial 11"),
        ("--lr -1", "--lr -1"),
        ("--drop 2", "dropout 2"),
        ("--amp fp16", "--amp fp16 GPU"),
        ("--batch-size 30 --per_img 8", "--batch-size 30 --per_img 8"),
        ("--batch-size 44", "11 persons --batch-size 44 --per_img 4 10"),
        ("--per_img 0", "--per_img 0"),
        ("--img_h 80", "--img_h 81"),
        ("--test-only", "--resume"),
        ("--data_path nowhere", "nowhere/exp/test_id.txt --data_path"),
        ("--resume missing.t", "--resume missing.t"),
        ("--resume BEST --optim adam", "_best.t --optim sgd --optim adam"),
        ("--resume BEST --seed 2 --lr 0.02", "_best.t --seed 1 --lr 0.01 --seed 2 --lr 0.02"),
        ("--resume BEST --drop 0.5 --w_hc 1", "_best.t --drop 0.3 --w_hc 0.6 --drop 0.5 --w_hc 1.0"),
        ("--pretrained missing.pth", "--pretrained missing.pth"),
        ("--pretrained empty.pth", "--pretrained empty.pth"),
        ("--pretrained imagenet", "--pretrained imagenet hub/checkpoints"),
        ("--log_path text.npz", "text.npz"),
        ("--img_w 0", "--img_w 0"),
        ("--low-dim 0", "--low_dim 0"),
        ("--test-batch 0", "--test_batch 0"),
        ("--model_path text.npz/models", "text.npz/models"),
    ],
    "test.py": [
        ("", "--resume --pretrained"),
        ("--resume missing.t", "--resume missing.t"),
        ("--resume BEST --low-dim 512", "--low_dim 16 --low_dim 512"),
        ("--resume BEST --img_h 128", "--img_h 96 --img_h 128"),
        ("--resume BEST --mode outdoor", "--mode outdoor"),
        ("--resume BEST --save_features text.npz/x.npz", "text.npz"),
        ("--resume BEST --save_features x.t", "--save_features x.t .npz"),
        ("--dataset regdb --trial all --resume x.t", "{trial} --resume"),
    ],
    "-m tools.report": [
        ("a=good.json a=good.json", "label"),
        ("good.json --features pool5", "pool5 fc"),
        ("nothing.json", "nothing.json"),
        ("good.json --out good.json", ".html"),
    ],
    "-m tools.score": [
        ("", "required"),
        ("good.npz --gallery official", "--gallery official --rand_perm"),
        ("good.npz --gallery official --rand_perm x.mat", "--rand_perm x.mat"),
        ("good.npz --mat text.npz", "text.npz"),
        ("good.npz --dataset regdb --mat x", "--mat SYSU-MM01 RegDB"),
        ("text.npz", "text.npz features"),
    ],
    "-m tools.visualize": [
        ("curves good.json", "good.json metrics.jsonl"),
        ("attention nothing.t --data-path .", "nothing.t"),
    ],
    "-m tools.make_synthetic": [
        ("--dataset sysu --out .", "--out"),
    ],
}


def holds(line: str, words: str) -> bool:
    return all(word.lower() in line.lower() for word in words.split())


@pytest.mark.parametrize(("script", "flags", "words"), [(key, *case) for key, own in COMMANDS.items() for case in own])
def test_bad_flags(bad, sysu_run, monkeypatch, tmp_path, script, flags, words):
    (tmp_path / "good.json").write_text(result())
    (tmp_path / "text.npz").write_text("text")
    (tmp_path / "empty.pth").touch()
    features_file(tmp_path / "good.npz")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody answers there
    usual = {"train.py": [*TINY, *places(sysu_run["data"], tmp_path)]}
    usual["test.py"] = ["--data_path", sysu_run["data"], "--model_path", sysu_run["models"], "--log_path", tmp_path]
    flags = flags.replace("BEST", str(sysu_run["models"] / f"{RUN}_best.t"))
    assert holds(bad(script, *usual.get(script, []), *flags.split()), words)


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        ({"pids": None}, [], "pids"),
        ({"camids": np.tile([1, 4], 12)}, [], "infrared"),
        ({"thermal": np.zeros(24, int)}, [], "thermal"),
        ({"paths": np.array(["a"] * 24)}, [], "paths"),
        ({"paths": np.array(["a", "b"] * 12, object)}, [], "f.npz cannot be read as features"),
        ({"fc": None}, [], "features"),
        ({"fc": np.eye(23)}, [], "fc (23, 23)"),
        ({"fc": np.full((24, 3), np.nan)}, [], "finite"),
        ({"fc": np.diag(np.arange(24.0))}, [], "a feature is zero"),
        ({"fc": 1e300 * np.eye(24)}, ["--distance", "euclidean"], "not finite"),
        ({"network": "{"}, [], "f.npz cannot be read as features"),
        ({}, ["--features", "pool5"], "pool5"),
    ],
)
def test_bad_feature_files(bad, tmp_path, changes, flags, message):
    command = ["-m tools.score", features_file(tmp_path / "f.npz", **changes), "--log_path", tmp_path / "log", *flags]
    assert message in bad(*command)


# ---- trees and arrays -----------------------------------------------------------------------------------------------


def pipe_instead(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def first_line(text: str) -> Callable[[Path], None]:
    """Put this in place of a file's first line."""
    return lambda path: path.write_text("\n".join([text, *path.read_text().splitlines()[1:]]))


PERSON = "cam1/0001/0001.jpg"  # a training image
IMAGES, LABELS, AGAIN = "train_ir_resized_img.npy", "train_ir_resized_label.npy", "/tree pre_process_sysu.py"
TREES = {  # dataset, script: files, what is done to each, words of the message
    ("sysu", "pre_process_sysu.py"): [
        ("exp/val_id.txt", os.remove, "exp/val_id.txt"),
        ("exp/train_id.txt", pipe_instead, "exp/train_id.txt"),
        ("exp/train_id.txt", first_line("1,two,3"), "train_id.txt 1,two,3"),
        ("exp/train_id.txt", first_line("1,-2"), "train_id.txt 1,-2"),
        (PERSON, lambda path: path.write_bytes(path.read_bytes()[:500]), f"{PERSON} image"),
        (PERSON, lambda path: Image.new("1", (20000, 20000)).save(path, "PNG"), f"{PERSON} 400000000 pixels"),
        (PERSON, lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n"), f"{PERSON} image"),
        (PERSON, pipe_instead, f"{PERSON} not found"),
    ],
    ("sysu", "train.py"): [
        ("cam[1245]", shutil.rmtree, "cameras 3, 6"),
        ("cam[36]", shutil.rmtree, "0 infrared"),
        (IMAGES, os.remove, AGAIN),
        (IMAGES, lambda path: path.write_bytes(path.read_bytes()[:-1]), AGAIN),
        (IMAGES, lambda path: path.write_bytes(pickle.dumps(np.zeros(3))), AGAIN),
        (IMAGES, lambda path: np.save(path, np.zeros((9, 8, 8), np.uint8)), AGAIN),
        (IMAGES, lambda path: np.save(path, np.zeros((5, 0, 0, 3), np.uint8)), AGAIN),
        (LABELS, lambda path: np.save(path, np.arange(3)), AGAIN),
        (LABELS, lambda path: np.save(path, np.load(path) * 2), AGAIN),
        (LABELS, lambda path: np.save(path, np.load(path) + 10**15), AGAIN),
        (LABELS, lambda path: np.save(path, np.load(path) * 0.5), AGAIN),
    ],
    ("regdb", "train.py"): [  # also such that leave the tree
        ("idx/train_visible_1.txt", first_line("Visible/1/person_v_0001.bmp one"), "line 1 one"),
        ("idx/train_visible_1.txt", first_line("Visible/1/person_v_0001.bmp 99999999999"), "line 1 99999999999"),
        ("idx/train_visible_1.txt", first_line("/etc/secret.bmp 0"), "line 1 below"),
        ("idx/train_visible_1.txt", first_line("Visible/../../x 0"), "line 1 below"),
        ("idx/train_visible_1.txt", first_line("Visible/1/missing.bmp 0"), "missing.bmp"),
    ],
    ("llcm", "train.py"): [
        ("idx/train_nir.txt", first_line("nir/0001/x.jpg one"), "train_nir.txt line 1"),
        ("idx/train_vis.txt", first_line("../secret.jpg 0"), "train_vis.txt line 1 below"),
        ("idx/test_id.txt", first_line("one, two"), "test_id.txt first line"),
        ("idx/test_id.txt", first_line("9999"), "0 visible"),
        ("idx/test_id.txt", os.remove, "test_id.txt not found"),
    ],
}


@pytest.mark.parametrize(
    ("dataset", "script", "files", "damage", "words"), [(*key, *case) for key, own in TREES.items() for case in own]
)
def test_bad_trees(bad, request, tmp_path, dataset, script, files, damage, words):
    tree = shutil.copytree(request.getfixturevalue(f"{dataset}_tree"), tmp_path / "tree")
    flags = ["--dataset", dataset, *TINY, *places(tree, tmp_path)]
    if script == "pre_process_sysu.py":
        (tree / "exp/train_id.txt").write_text("1,2,3")
        flags = ["--data_path", tree, "--force", "--workers", 1]
    for path in [*tree.glob(files)]:
        damage(path)
    assert holds(bad(script, *flags), words)


# ---- checkpoints of others ------------------------------------------------------------------------------------------


class Bomb(str):
    """Unpickled, it writes the file of this name."""

    def __reduce__(self):
        return open, (str(self), "w")


BIAS = "classifier1.classifier.2.bias"
HOSTILE = {  # other entries of the checkpoint, given its network
    "a module": lambda net: {"net": torch.nn.Linear(2, 2)},
    "nothing": lambda net: {"net": {}},
    "a word": lambda net: {"net": {**net, BIAS: "ten"}},
    "a missing weight": lambda net: {"net": {name: value for name, value in net.items() if name != BIAS}},
    "sparse": lambda net: {"net": {**net, BIAS: torch.zeros(10).to_sparse()}},
    "scores in words": lambda net: {"cmc": ["high"], "mAP": "low"},
    "nested": lambda net: {"cmc": functools.reduce(lambda inner, _: [inner], range(5000), [])},
    "epoch": lambda net: {"epoch": torch.zeros(3)},
    "a config of tensors": lambda net: {"config": {"arch": "tiny", "lr": torch.zeros(3)}},
    "another arch": lambda net: {"config": {"arch": "resnet50"}},
    "no weight is finite": lambda net: {"net": {name: value * float("nan") for name, value in net.items()}},
}


@pytest.mark.parametrize("how", HOSTILE)
def test_hostile_checkpoints(bad, sysu_run, tmp_path, how):
    state, limit = utils.load_checkpoint(str(sysu_run["models"] / f"{RUN}_best.t")), sys.getrecursionlimit()
    sys.setrecursionlimit(10**5)
    torch.save(state | HOSTILE[how](state["net"]), tmp_path / "hostile.t")
    sys.setrecursionlimit(limit)
    flags = [*places(sysu_run["data"], tmp_path), "--workers", 0, "--resume", tmp_path / "hostile.t"]
    assert ("not finite" if how == "no weight is finite" else "hostile.t") in bad("test.py", *flags)


def test_damaged_checkpoints_and_such_that_would_run_code(bad, sysu_tree, tmp_path):
    """The net is small: nothing of it is looked at. A bomb that goes off writes a file, which `bad` sees."""
    path, bomb = tmp_path / "hostile.t", Bomb(tmp_path / "exploded")
    state, contents = {"net": {BIAS: torch.zeros(1600)}, "epoch": 3}, {"pickle": pickle.dumps({"net": bomb})}
    for zipped in (True, False):
        torch.save(state | {"cmc": bomb}, path, _use_new_zipfile_serialization=zipped)
        contents[f"bomb {zipped}"] = path.read_bytes()
    torch.save(state, path)
    whole = path.read_bytes()
    contents |= {"flipped": whole.replace(bytes(64), bytes(63) + b"\1", 1), "cut": whole[:-1000], "empty": b""}
    for name, data in contents.items():
        path.write_bytes(data)
        for script, flags in (("test.py", []), ("train.py", RUN_FLAGS)):
            line = bad(script, *flags, *places(sysu_tree, tmp_path), "--resume", path)
            assert holds(line, "hostile.t checkpoint"), name


STATES = [
    {"optimizer": {}},
    {"optimizer": {"state": {0: {"momentum_buffer": torch.zeros(5)}}}},
    {"rng": {"torch": torch.zeros(3), "cuda": None}},
    {"step": 1, "sums": torch.zeros(7)},  # of an epoch under way; those of a finished one are not used
    {"step": "two"},
    {"best": {}},
    {"metrics": [{"loss": torch.zeros(1)}]},
]


def test_training_states_that_do_not_hold_together(bad, sysu_run, tmp_path):
    state = utils.load_checkpoint(str(sysu_run["models"] / f"{RUN}_last.t"))
    flags = [*RUN_FLAGS, *places(sysu_run["data"], tmp_path), "--resume", tmp_path / "state.t"]
    for number, change in enumerate(STATES):
        utils.save_checkpoint(str(tmp_path / "state.t"), state | change)
        assert holds(bad("train.py", *flags), "state.t checkpoint"), number
