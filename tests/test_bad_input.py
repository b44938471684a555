"""Bad input, systematically: a line that names cause and remedy, exit status 2, no file changed.

The fixture `error_of` checks all of that but the words.
"""

import copy
import functools
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RUN, RUN_FLAGS, TINY, features_file, folder_flags, result, run_here
from PIL import Image

import train
import utils
from model import load_network

pytestmark = [
    pytest.mark.filterwarnings("ignore:Detected pickle protocol"),
    pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants"),
]


def check_words(line: str, words: str, folder: Path) -> None:
    """All of these words, space separated, are in a line: each whole, and not in ``folder``."""
    text = line.replace(str(folder), "").lower()
    for word in words.lower().split():
        is_whole_word = rf"(?<![\w.-]){re.escape(word)}(?![\w-]|\.\w)"  # "4" is not in "44", "0.4"
        assert re.search(is_whole_word, text), f"{word!r} is not in {line!r}"


def test_words_are_looked_for_as_a_whole():
    line = "/tmp/9/x.t was trained with --no-compile --lr 0.01 --img-h 96, not --lr 1"
    check_words(line, "x.t --no-compile --lr 0.01 --img-h 96, 96 1", Path("/tmp/9"))
    for word in ("9", "01", "0", "compile", "--img", "trained_with", "x", "t"):
        with pytest.raises(AssertionError):
            check_words(line, word, Path("/tmp/9"))


# ---- flags --------------------------------------------------------------------------------------

# The name of a run with the flags `TINY`, and no others.
TINY_RUN = RUN.replace("_lr0.01_", "_lr0.008_").replace("_drop0.3", "")
# script: flags, and words of the message. BEST is a checkpoint's path, in messages its name;
# good.json, good.npz, text.npz and empty.pth are files.
COMMANDS = {
    "train.py": [
        ("--trial 11", "--trial invalid 11 10"),
        ("--lr -1", "--lr -1 above"),
        ("--lr nan", "--lr nan above"),
        ("--drop 2", "--drop 2 less"),
        ("--w_hc -0.5", "--w-hc -0.5 more"),
        ("--arch resnet51", "--arch resnet51 resnet50"),
        ("--no-such-flag", "--no-such-flag"),
        ("--precision fp16", "--precision fp16 GPU bf16"),
        ("--precision half", "--precision half bf16"),
        ("--batch-size 30 --per_img 8", "--batch-size 30 --per-img 8"),
        ("--batch-size 44", "11 persons --batch-size 44 --per-img 4 10"),
        ("--per_img 0", "--per-img 0 above"),
        ("--img_h 80", "--img-h 81"),
        ("--img_w 0", "--img-w 0 above"),
        ("--low-dim 0", "--low-dim 0 above"),
        ("--test-batch 0", "--test-batch 0 above"),
        ("--test-only", f"--resume {TINY_RUN}_last.t --model-path"),
        ("--data_path nowhere", "nowhere/exp/test_id.txt --data-path"),
        ("--resume missing.t", "--resume missing.t --model-path"),
        ("--resume BEST --optim adam", "BEST --optim sgd --optim adam"),
        ("--resume BEST --no_deterministic", "BEST --deterministic --no-deterministic"),
        ("--resume BEST --compile --no-sync_bn", "BEST --no-compile --sync-bn --no-sync-bn"),
        ("--resume BEST --seed 2 --lr 0.02", "BEST --seed 1 --lr 0.01 --seed 2 --lr 0.02"),
        (
            "--resume BEST --drop 0.5 --w_hc 1",
            "BEST --drop 0.3 --w-hc 0.6 --drop 0.5 --w-hc 1.0",
        ),
        ("--test-only --resume BEST --img_w 40", "BEST --img-w 32 --img-w 40"),
        ("--pretrained missing.pth", "--pretrained missing.pth"),
        ("--pretrained empty.pth", "--pretrained empty.pth"),
        ("--pretrained BEST", "--pretrained BEST tiny"),
        ("--pretrained imagenet", "--pretrained imagenet hub/checkpoints"),
        ("--log_path text.npz", "text.npz"),
        ("--model_path text.npz/models", "text.npz/models"),
    ],
    "test.py": [
        ("", "--resume --pretrained"),
        ("--resume missing.t", "--resume missing.t --model-path"),
        ("--resume BEST --pretrained none", "--resume --pretrained"),
        ("--resume BEST --low-dim 512", "--low-dim 16 --low-dim 512"),
        ("--resume BEST --img_h 128", "--img-h 96 --img-h 128"),
        ("--resume BEST --mode outdoor", "--mode outdoor indoor both"),
        ("--resume BEST --features fc7", "--features fc7 pool5"),
        ("--resume BEST --save_features text.npz/x.npz", "text.npz"),
        ("--resume BEST --save_features x.t", "--save-features x.t .npz"),
        ("--dataset regdb --trial all --resume x.t", "{trial} --resume x.t"),
        ("--dataset regdb --trial 11 --resume x.t", "--trial 11 10"),
        ("--dataset market --resume x.t", "--dataset market regdb"),
    ],
    "pre_process_sysu.py": [
        ("--data_path nowhere", "nowhere/exp/train_id.txt --data-path"),
        ("--workers -1", "--workers -1 more"),
    ],
    "-m tools.report": [
        ("a=good.json a=good.json", "label"),
        ("good.json --features pool5", "pool5 fc"),
        ("nothing.json", "nothing.json"),
        ("good.json --out good.json", ".html"),
    ],
    "-m tools.score": [
        ("", "required"),
        ("good.npz --gallery official", "--gallery official --rand-perm"),
        ("good.npz --gallery official --rand_perm x.mat", "--rand-perm x.mat"),
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


def cases_of(table: dict) -> list[tuple]:
    """The cases of a table, each with its key in front."""
    all_cases = []
    for key, cases in table.items():
        for case in cases:
            all_cases.append((key, *case))
    return all_cases


@pytest.mark.parametrize(("script", "flags", "words"), cases_of(COMMANDS))
def test_bad_flags_are_named_with_their_value_and_a_remedy(
    error_of, sysu_run, monkeypatch, tmp_path, script, flags, words
):
    (tmp_path / "good.json").write_text(result())
    (tmp_path / "text.npz").write_text("text")
    (tmp_path / "empty.pth").touch()
    features_file(tmp_path / "good.npz")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody answers there
    usual_flags = []
    if script == "train.py":
        usual_flags = [*TINY, *folder_flags(sysu_run["data"], tmp_path)]
    elif script == "test.py":
        usual_flags = ["--data_path", sysu_run["data"], "--model_path", sysu_run["models"]]
        usual_flags += ["--log_path", tmp_path]
    flags = flags.replace("BEST", str(sysu_run["models"] / f"{RUN}_best.t"))
    line = error_of(script, *usual_flags, *flags.split())
    check_words(line, words.replace("BEST", f"{RUN}_best.t"), tmp_path)


# ---- files of features --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "flags", "words"),
    [
        ({"pids": None}, [], "f.npz pids"),
        ({"camids": np.tile([1, 4], 12)}, [], "f.npz infrared"),
        ({"thermal": np.zeros(24, int)}, [], "f.npz thermal"),
        ({"paths": np.array(["a"] * 24)}, [], "f.npz paths"),
        ({"paths": np.array(["a", "b"] * 12, object)}, [], "f.npz cannot be read as features"),
        ({"fc": None}, [], "f.npz features"),
        ({"fc": np.eye(23)}, [], "f.npz fc (23, 23)"),
        ({"fc": np.full((24, 3), np.nan)}, [], "f.npz finite"),
        ({"fc": np.diag(np.arange(24.0))}, [], "a feature is zero"),
        ({"fc": 1e300 * np.eye(24)}, ["--distance", "euclidean"], "not finite"),
        ({"network": "{"}, [], "f.npz cannot be read as features"),
        ({}, ["--features", "pool5"], "f.npz pool5"),
    ],
)
def test_bad_feature_files_are_named_with_what_is_wrong(error_of, tmp_path, changes, flags, words):
    file = features_file(tmp_path / "f.npz", **changes)
    line = error_of("-m tools.score", file, "--log_path", tmp_path / "log", *flags)
    check_words(line, words, tmp_path)


# ---- trees and arrays ---------------------------------------------------------------------------


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_first_line(text: str) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        lines = path.read_text().splitlines()
        path.write_text("\n".join([text, *lines[1:]]))

    return replace


def replace_text(text: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(text)


def cut_after_500_bytes(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:500])


def cut_last_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def replace_by_huge_image(path: Path) -> None:
    Image.new("1", (20000, 20000)).save(path, "PNG")


def replace_by_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(np.zeros(3)))


def replace_by_archive(path: Path) -> None:
    with open(path, "wb") as file:
        np.savez(file, images=np.zeros(3))


def replace_array(shape: tuple[int, ...], dtype: type) -> Callable[[Path], None]:
    return lambda path: np.save(path, np.zeros(shape, dtype))


def change_array(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    return lambda path: np.save(path, change(np.load(path)))


PERSON = "cam1/0001/0001.jpg"  # a training image
IMAGES = "train_ir_resized_img.npy"
LABELS = "train_ir_resized_label.npy"
PREPROCESS = "/tree pre_process_sysu.py --data-path"
VISIBLE_LIST = "idx/train_visible_1.txt"
TOO_LARGE_ID = "Visible/1/person_v_0001.bmp 99999999999"
# Dataset and script: files, what is done to each, words of the message.
TREES = {
    "sysu pre_process_sysu.py": [
        ("exp/val_id.txt", os.remove, "exp/val_id.txt --data-path"),
        ("exp/train_id.txt", replace_by_pipe, "exp/train_id.txt --data-path"),
        ("exp/train_id.txt", replace_first_line("1,two,3"), "train_id.txt line 1 two 1,2,3"),
        ("exp/train_id.txt", replace_first_line("1,-2"), "train_id.txt line 1 -2 1,2,3"),
        (PERSON, cut_after_500_bytes, f"{PERSON} image remove"),
        (PERSON, replace_by_huge_image, f"{PERSON} 400000000 pixels remove"),
        (PERSON, replace_text("%!PS-Adobe-3.0 EPSF-3.0\n"), f"{PERSON} image remove"),
        (PERSON, replace_by_pipe, f"{PERSON} not found --data-path"),
    ],
    "sysu train.py": [
        ("cam[1245]", shutil.rmtree, "cameras 3, 6"),
        ("cam[36]", shutil.rmtree, "0 infrared"),
        (IMAGES, os.remove, PREPROCESS),
        (IMAGES, cut_last_byte, PREPROCESS),
        (IMAGES, replace_by_pickle, PREPROCESS),
        (IMAGES, replace_by_archive, PREPROCESS),
        (IMAGES, replace_array((9, 8, 8), np.uint8), PREPROCESS),
        (IMAGES, replace_array((5, 0, 0, 3), np.uint8), PREPROCESS),
        (LABELS, replace_array((3,), int), PREPROCESS),
        (LABELS, replace_by_archive, PREPROCESS),
        (LABELS, change_array(lambda labels: labels * 2), PREPROCESS),
        (LABELS, change_array(lambda labels: labels + 10**15), PREPROCESS),
        (LABELS, change_array(lambda labels: labels * 0.5), PREPROCESS),
        (LABELS, change_array(lambda labels: labels * 0), f"different persons {PREPROCESS}"),
    ],
    "regdb train.py": [  # also lists that point to files outside of the tree
        (VISIBLE_LIST, replace_first_line("Visible/1/person_v_0001.bmp one"), "line 1 one"),
        (VISIBLE_LIST, replace_first_line(TOO_LARGE_ID), "line 1 99999999999"),
        (VISIBLE_LIST, replace_first_line("/etc/secret.bmp 0"), "line 1 below"),
        (VISIBLE_LIST, replace_text(" \n\n"), "train_visible_1.txt no image"),
        (VISIBLE_LIST, replace_first_line("Visible/../../x 0"), "line 1 below"),
        (VISIBLE_LIST, replace_first_line("Visible/1/missing.bmp 0"), "missing.bmp --data-path"),
    ],
    "llcm train.py": [
        ("idx/train_nir.txt", replace_first_line("nir/0001/x.jpg one"), "train_nir.txt line 1"),
        ("idx/train_vis.txt", replace_first_line("../secret.jpg 0"), "train_vis.txt line 1 below"),
        ("idx/test_id.txt", replace_first_line("9, two"), "test_id.txt line 1 two 1,2,3"),
        ("idx/test_id.txt", replace_first_line("9999"), "0 visible"),
        ("idx/test_id.txt", os.remove, "test_id.txt not found --data-path"),
    ],
}


@pytest.mark.parametrize(("dataset_and_script", "pattern", "damage", "words"), cases_of(TREES))
def test_damaged_trees_are_named_with_what_is_wrong(
    error_of, request, tmp_path, dataset_and_script, pattern, damage, words
):
    dataset, script = dataset_and_script.split()
    tree = shutil.copytree(request.getfixturevalue(f"{dataset}_tree"), tmp_path / "tree")
    flags = ["--dataset", dataset, *TINY, *folder_flags(tree, tmp_path)]
    if script == "pre_process_sysu.py":
        (tree / "exp/train_id.txt").write_text("1,3,4")  # a few training persons are enough
        flags = ["--data_path", tree, "--force", "--workers", 1]
    for path in list(tree.glob(pattern)):
        damage(path)
    line = error_of(script, *flags)
    check_words(line, words, tmp_path)


# ---- untrusted checkpoints ----------------------------------------------------------------------

BIAS = "classifier1.classifier.2.bias"
DEEP_LIST = functools.reduce(lambda inner, _: [inner], range(5000), [])


def save_deep(path: Path, state: dict) -> None:
    """As torch.save; lists may be nested deeply."""
    usual_limit = sys.getrecursionlimit()
    sys.setrecursionlimit(100_000)
    try:
        torch.save(state, path)
    finally:
        sys.setrecursionlimit(usual_limit)


def bias(value: object) -> Callable[[dict], dict]:
    """Put this in place of a weight."""
    return lambda state: {"net": state["net"] | {BIAS: value}}


def without_bias(state: dict) -> dict:
    return {"net": {name: value for name, value in state["net"].items() if name != BIAS}}


def config(name: str, value: object) -> Callable[[dict], dict]:
    """Put this in place of a value in the config."""
    return lambda state: {"config": state["config"] | {name: value}}


def nan_weights(state: dict) -> dict:
    return {"net": {name: value * float("nan") for name, value in state["net"].items()}}


NO_NETWORK = "does not hold a network of this method"
NO_CHECKPOINT = "is not a complete checkpoint of this method"
# What is wrong: the entries to put into a checkpoint of this state, and words of the message.
HOSTILE = {
    "a module for a network": (
        lambda state: {"net": torch.nn.Linear(2, 2)},
        "cannot be read as a checkpoint damaged",
    ),
    "an empty network": (lambda state: {"net": {}}, NO_NETWORK),
    "another network": (
        lambda state: {"net": {"a": torch.zeros(2)}, "config": {"n_class": 10}},
        NO_NETWORK,
    ),
    "a word for a weight": (bias("ten"), NO_NETWORK),
    "a missing weight": (without_bias, NO_NETWORK),
    "a sparse weight": (bias(torch.zeros(10).to_sparse()), NO_NETWORK),
    "a config of tensors": (config("lr", torch.zeros(3)), NO_CHECKPOINT),
    "a list for a config": (lambda state: {"config": [1, 2]}, NO_CHECKPOINT),
    "a word for a height": (config("img_h", "tall"), NO_CHECKPOINT),
    "a negative height": (config("img_h", -96), NO_CHECKPOINT),
    "a fraction for a height": (config("img_h", 96.5), NO_CHECKPOINT),
    "scores in words": (lambda state: {"cmc": ["high"], "mAP": "low"}, NO_CHECKPOINT),
    "scores that are too large": (lambda state: {"cmc": [10**400]}, NO_CHECKPOINT),
    "scores with a gradient": (
        lambda state: {"cmc": torch.zeros(3, requires_grad=True)},
        NO_CHECKPOINT,
    ),
    "several mAP": (lambda state: {"mAP": torch.zeros(3)}, NO_CHECKPOINT),
    "a tensor for an epoch": (lambda state: {"epoch": torch.zeros(3)}, NO_CHECKPOINT),
    "a deep list": (lambda state: {"cmc": DEEP_LIST}, NO_CHECKPOINT),
}


@pytest.fixture
def hostile_line(error_of, sysu_run, tmp_path) -> Callable[[str, Callable], str]:
    """(script, change): the line of a script that gets hostile.t, a changed checkpoint."""

    def line_of(script: str, change: Callable[[dict], dict]) -> str:
        state = utils.load_checkpoint(str(sysu_run["models"] / f"{RUN}_best.t"))
        path = tmp_path / "hostile.t"
        save_deep(path, state | change(state))
        flags = ["--workers", 0]
        if script == "train.py":
            flags = RUN_FLAGS
        folders = folder_flags(sysu_run["data"], tmp_path)
        return error_of(script, *flags, *folders, "--resume", path)

    return line_of


@pytest.mark.parametrize("script", ["test.py", "train.py"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_checkpoints_are_named(hostile_line, tmp_path, name, script):
    change, words = HOSTILE[name]
    check_words(hostile_line(script, change), f"hostile.t {words}", tmp_path)


# Files of torch.save that hold no network of this method.
NO_NETWORKS = {
    "nothing": {},
    "a list": [],
    "a tensor": torch.zeros(3),
    "a number for weights": {"state_dict": 5},
    "no weights": {"state_dict": {}, "model": 5},
    "a word for a weight": {"model": {BIAS: "ten"}},
    "weights by another name": {"weights": {BIAS: torch.zeros(10)}},
    "weights and a number": {BIAS: torch.zeros(10), "epoch": 3},
    "a bias alone": {BIAS: torch.zeros(10)},
    "a number for a name": {5: torch.zeros(10)},
}


@pytest.mark.parametrize("name", NO_NETWORKS)
@pytest.mark.parametrize("script", ["test.py", "train.py"])
def test_files_without_a_network_are_named(error_of, sysu_tree, tmp_path, script, name):
    path = tmp_path / "other.pth"
    torch.save(NO_NETWORKS[name], path)
    flags = ["--workers", 0]
    if script == "train.py":
        flags = RUN_FLAGS
    line = error_of(script, *flags, *folder_flags(sysu_tree, tmp_path), "--resume", path)
    check_words(line, "other.pth not of this method", tmp_path)


@pytest.mark.parametrize(
    ("script", "arch", "words"),
    [
        ("test.py", "resnet50", NO_NETWORK),
        ("test.py", "vgg", "another backbone vgg"),
        ("train.py", "resnet50", "trained with --arch resnet50, --arch tiny: another checkpoint"),
        ("train.py", "vgg", "trained with --arch vgg, --arch tiny: another checkpoint"),
    ],
)
def test_a_config_of_another_arch_is_named(hostile_line, tmp_path, script, arch, words):
    line = hostile_line(script, config("arch", arch))
    check_words(line, f"hostile.t {words}", tmp_path)


def test_a_network_that_is_not_finite_gets_no_scores(error_of, sysu_run, tmp_path):
    state = utils.load_checkpoint(str(sysu_run["models"] / f"{RUN}_best.t"))
    path = tmp_path / "nan.t"
    torch.save(state | nan_weights(state), path)
    flags = [*folder_flags(sysu_run["data"], tmp_path), "--workers", 0]
    assert "features of thermal images are not finite" in error_of(
        "test.py", *flags, "--resume", path
    )


class Bomb(str):
    """Unpickled, it writes the file of this name."""

    def __reduce__(self):
        return open, (str(self), "w")


def test_damaged_checkpoints_are_rejected_and_code_in_them_does_not_run(
    error_of, sysu_tree, tmp_path
):
    """The network is not valid: loading fails before it is used.

    A bomb writes a file, which `error_of` would see.
    """
    path = tmp_path / "hostile.t"
    bomb = Bomb(tmp_path / "exploded")
    state = {"net": {BIAS: torch.zeros(1600)}, "epoch": 3}
    contents = {"pickle": pickle.dumps({"net": bomb})}
    for is_zip in (True, False):
        torch.save(state | {"cmc": bomb}, path, _use_new_zipfile_serialization=is_zip)
        contents[f"bomb, zip: {is_zip}"] = path.read_bytes()
    torch.save(state, path)
    valid = path.read_bytes()
    contents["flipped bit"] = valid.replace(bytes(64), bytes(63) + b"\1", 1)
    contents["cut"] = valid[:-1000]
    contents["empty"] = b""
    for content in contents.values():
        path.write_bytes(content)
        for script, flags in (("test.py", []), ("train.py", RUN_FLAGS)):
            line = error_of(script, *flags, *folder_flags(sysu_tree, tmp_path), "--resume", path)
            check_words(line, "hostile.t checkpoint", tmp_path)


# ---- training states ----------------------------------------------------------------------------


def momentum(value: object) -> Callable[[dict], dict]:
    """Put this in place of the momentum of the first parameter."""

    def change(state: dict) -> dict:
        buffers = state["optimizer"]["state"] | {0: {"momentum_buffer": value}}
        return {"optimizer": state["optimizer"] | {"state": buffers}}

    return change


def sparse_momentum(state: dict) -> dict:
    dense = state["optimizer"]["state"][0]["momentum_buffer"]
    return momentum(dense.to_sparse())(state)


def renamed_momentum(state: dict) -> dict:
    buffers = state["optimizer"]["state"]
    first = {"velocity": buffers[0]["momentum_buffer"]}
    return {"optimizer": state["optimizer"] | {"state": buffers | {0: first}}}


def without_last_momentum(state: dict) -> dict:
    buffers = dict(state["optimizer"]["state"])
    del buffers[max(buffers)]
    return {"optimizer": state["optimizer"] | {"state": buffers}}


TRAINING_STATES = {
    "a number for an optimizer": lambda state: {"optimizer": 5},
    "an empty optimizer": lambda state: {"optimizer": {}},
    "a list of momentum": lambda state: {"optimizer": {"state": [1]}},
    "momentum of one parameter": lambda state: {"optimizer": {"state": {0: {}}}},
    "momentum without the last parameter": without_last_momentum,
    "momentum of another shape": momentum(torch.zeros(5)),
    "a word for momentum": momentum("fast"),
    "no momentum": momentum(None),
    "a deep list for momentum": momentum(DEEP_LIST),
    "sparse momentum": sparse_momentum,
    "renamed momentum": renamed_momentum,
    "an empty best": lambda state: {"best": {}},
    "a list for best": lambda state: {"best": [0.5]},
    "a best rank-1 that is not finite": lambda state: {"best": {"rank1": float("nan")}},
    "a word for the best rank-1": lambda state: {"best": {"rank1": "high"}},
    "metrics of tensors": lambda state: {"metrics": [{"loss": torch.zeros(1)}]},
    "a word for metrics": lambda state: {"metrics": "none"},
    "a number for a scaler": lambda state: {"scaler": 5},
    "a word for an epoch": lambda state: {"epoch": "two"},
    "a negative epoch": lambda state: {"epoch": -7},
}


@pytest.mark.parametrize("name", TRAINING_STATES)
def test_training_states_that_do_not_hold_together_are_rejected(error_of, sysu_run, tmp_path, name):
    state = utils.load_checkpoint(str(sysu_run["models"] / f"{RUN}_last.t"))
    path = tmp_path / "state.t"
    save_deep(path, state | TRAINING_STATES[name](state))
    flags = [*RUN_FLAGS, *folder_flags(sysu_run["data"], tmp_path), "--epochs", 4]
    line = error_of("train.py", *flags, "--resume", path)
    check_words(line, "state.t checkpoint", tmp_path)


@pytest.mark.parametrize("missing", ["best", "metrics", "scaler"])
def test_a_training_state_without_one_of_its_parts_is_rejected(
    error_of, sysu_run, tmp_path, missing
):
    state = utils.load_checkpoint(str(sysu_run["models"] / f"{RUN}_last.t"))
    del state[missing]
    utils.save_checkpoint(str(tmp_path / "state.t"), state)
    flags = [
        *RUN_FLAGS,
        *folder_flags(sysu_run["data"], tmp_path),
        "--resume",
        tmp_path / "state.t",
    ]
    line = error_of("train.py", *flags)
    check_words(line, "state.t checkpoint training state", tmp_path)


@pytest.fixture(scope="module")
def adam_state(sysu_tree, tmp_path_factory) -> dict:
    """The state of a training with Adam after one epoch."""
    out = tmp_path_factory.mktemp("adam")
    run_here("train.py", *TINY, *folder_flags(sysu_tree, out), "--optim", "adam", "--epochs", 0)
    (path,) = out.glob("*_last.t")
    return utils.load_checkpoint(str(path))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("exp_avg_sq", None),
        ("exp_avg_sq", torch.zeros(5)),
        ("step", None),
        ("step", "two"),
        ("step", torch.zeros(3)),
    ],
)
def test_adam_states_that_do_not_hold_together_are_rejected(
    error_of, sysu_tree, adam_state, tmp_path, name, value
):
    """``value`` replaces a buffer of the first parameter; None removes it."""
    optimizer = copy.deepcopy(adam_state["optimizer"])
    if value is None:
        del optimizer["state"][0][name]
    else:
        optimizer["state"][0][name] = value
    path = tmp_path / "state.t"
    torch.save(adam_state | {"optimizer": optimizer}, path)
    flags = [*TINY, *folder_flags(sysu_tree, tmp_path), "--optim", "adam", "--epochs", 1]
    line = error_of("train.py", *flags, "--resume", path)
    check_words(line, "state.t checkpoint", tmp_path)


@pytest.mark.parametrize("scaler_state", [{}, {"scale": 65536.0}, {"scale": "large"}])
def test_scaler_states_that_do_not_hold_together_are_rejected(sysu_run, scaler_state):
    """Of --precision fp16, which needs a GPU: this scaler is one for CPUs."""
    path = str(sysu_run["models"] / f"{RUN}_last.t")
    args = train.parse_args([*RUN_FLAGS, "--resume", path])
    checkpoint = utils.load_checkpoint(path) | {"scaler": scaler_state}
    net = load_network(checkpoint, path)
    optimizer = train.build_optimizer(net, args)
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    with pytest.raises(utils.InputError, match=r"_last\.t"):
        train.RunRecord(RUN, 10, args).start(checkpoint, path, optimizer, scaler)
