"""Nothing is lost: runs that end at any moment, files that are whole or absent, locks."""

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import RUN, RUN_FLAGS, folder_flags, read_all, same_content
from filelock import FileLock

import loss
import train
import utils
from model import EmbedNet, to_device

# ---- a run in pieces ----------------------------------------------------------------------------


@pytest.fixture
def training(monkeypatch, sysu_run, tmp_path) -> Callable[..., int]:
    """Run the training of `sysu_run` in folders of its own; gives the exit status.

    ``replaced``: functions of train.py to replace, by name.
    """
    usual = [*RUN_FLAGS, "--data_path", sysu_run["data"]]
    usual += ["--model_path", tmp_path / "models", "--log_path", tmp_path / "logs"]

    def run(*flags, **replaced) -> int:
        with monkeypatch.context() as patch:
            for name, function in replaced.items():
                patch.setattr(train, name, function)
            patch.setattr(sys, "argv", ["train.py", *(str(flag) for flag in [*usual, *flags])])
            try:
                utils.run(train.main, "interrupted: --resume last resumes")
            except SystemExit as stop:
                return stop.code
        return 0

    return run


def raising(error: BaseException, after: int, function: Callable) -> Callable:
    """``function``, whose call number ``after`` raises an error instead."""
    calls = 0

    def wrapped(*args):
        nonlocal calls
        calls += 1
        if calls == after:
            raise error
        return function(*args)

    return wrapped


def test_a_run_in_pieces_is_the_run_in_one(training, sysu_run, tmp_path, monkeypatch, capsys):
    """Ended within an epoch, within a test, between two files, by Ctrl-C and by crashes."""
    last = tmp_path / "models" / f"{RUN}_last.t"
    assert training("--resume", "last", "--epochs", 0) == 0
    assert "starting from the beginning" in capsys.readouterr().out

    step = raising(KeyboardInterrupt(), 2, train.train_step)
    assert training("--resume", "last", "--workers", 1, train_step=step) == 130
    assert capsys.readouterr().err.splitlines()[-1].endswith("--resume last resumes")
    assert utils.load_checkpoint(str(last))["epoch"] == 0

    step = raising(ZeroDivisionError(), 8, train.train_step)  # stands for a crash
    with pytest.raises(ZeroDivisionError):  # in epoch 2: an epoch has five steps
        training("--resume", "last", train_step=step)
    assert utils.load_checkpoint(str(last))["epoch"] == 1

    test = raising(KeyboardInterrupt(), 1, train.evaluate)
    assert training("--resume", "last", evaluate=test) == 130
    assert utils.load_checkpoint(str(last))["epoch"] == 1  # the epoch is over after its test

    # Between _best and _last of epoch 2; then between _last and metrics.jsonl.
    for owner, name in ((utils, "save_checkpoint"), (train.RunRecord, "write_metrics")):
        with monkeypatch.context() as patch:
            crash = raising(ZeroDivisionError(), 2, getattr(owner, name))
            patch.setattr(owner, name, crash)
            with pytest.raises(ZeroDivisionError):
                training("--resume", "last")
    assert utils.load_checkpoint(str(last))["epoch"] == 2

    assert training("--resume", "last") == 0
    for _ in range(2):  # the second time nothing is left to do
        assert same_content(read_all(tmp_path / "models"), read_all(sysu_run["models"]))
        assert same_content(read_all(tmp_path / "logs"), read_all(sysu_run["logs"]))
        assert training("--resume", "last") == 0
    suffixes = {file.suffix for file in tmp_path.rglob("*") if file.is_file()}
    assert suffixes == {".t", ".log", ".jsonl", ".lock"}


def test_metrics_that_a_kill_left_behind_are_written_again(training, sysu_run, tmp_path):
    assert training() == 0
    (metrics,) = tmp_path.rglob("metrics.jsonl")
    lines = metrics.read_text()
    metrics.write_text(lines.splitlines(keepends=True)[0])
    assert training("--resume", "last") == 0
    assert metrics.read_text() == lines


def test_an_epoch_does_not_depend_on_what_came_before(training, tmp_path, sysu_run):
    """Dropout of epoch 1 is the same, whatever has drawn random numbers before it."""
    assert training("--epochs", 0) == 0
    load_training_set = train.load_training_set

    def with_draws(*args):
        torch.rand(7)
        return load_training_set(*args)

    assert training("--resume", "last", load_training_set=with_draws) == 0
    assert same_content(read_all(tmp_path / "models"), read_all(sysu_run["models"]))


def test_momentum_takes_the_memory_format_of_the_weights():
    """A checkpoint of a machine with another format: the same update."""
    args = SimpleNamespace(lr=0.1, optim="sgd")
    torch.manual_seed(0)
    contiguous = EmbedNet(3, 8, arch="resnet18", pretrained="none")
    channels_last = EmbedNet(3, 8, arch="resnet18", pretrained="none")
    channels_last.load_state_dict(contiguous.state_dict())
    channels_last = to_device(channels_last, torch.device("cpu"))
    first = train.build_optimizer(contiguous, args)
    second = train.build_optimizer(channels_last, args)
    for buffers in first.state.values():
        buffers["momentum_buffer"].normal_()
    train.load_optimizer(second, first.state_dict(), "checkpoint.t")
    for parameter, other in zip(contiguous.parameters(), channels_last.parameters(), strict=True):
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
            other.grad = torch.ones_like(other)
            momentum = second.state[other]["momentum_buffer"]
            assert momentum.stride() == other.stride()
    first.step()
    second.step()
    for parameter, other in zip(contiguous.parameters(), channels_last.parameters(), strict=True):
        torch.testing.assert_close(parameter, other)


# ---- runs that are there ------------------------------------------------------------------------


def test_a_run_is_not_written_over(error_of, sysu_run):
    data = ["--data_path", sysu_run["data"]]
    models = sysu_run["models"]
    logs = sysu_run["logs"]
    folders = ["--model_path", models, "--log_path", logs]
    for resume in ([], ["--resume", f"{RUN}_best.t", "--epochs", 2]):
        line = error_of("train.py", *RUN_FLAGS, *data, *folders, *resume)
        assert f"{RUN}_last.t exists already" in line
        assert "--resume last" in line


@pytest.mark.parametrize("resume", [[], ["--resume", "last"]])
def test_metrics_without_a_checkpoint_are_not_written_over(error_of, sysu_run, tmp_path, resume):
    """There is nothing to resume: the error does not advise it."""
    logs = sysu_run["logs"]
    folders = ["--data_path", sysu_run["data"], "--model_path", tmp_path, "--log_path", logs]
    line = error_of("train.py", *RUN_FLAGS, *folders, *resume)
    assert f"{RUN}/metrics.jsonl exists already, but not {tmp_path}/{RUN}_last.t" in line
    assert "give another --method" in line
    assert "or remove it" in line
    assert "--resume" not in line


def test_a_second_training_of_a_name_is_an_error(error_of, sysu_run, tmp_path):
    with FileLock(tmp_path / f"{RUN}.lock"):
        line = error_of("train.py", *RUN_FLAGS, *folder_flags(sysu_run["data"], tmp_path))
    assert f"{RUN}.lock" in line


def test_a_second_preprocessing_of_a_tree_is_an_error(error_of, sysu_tree, tmp_path):
    tree = shutil.copytree(sysu_tree, tmp_path / "tree")
    size = ["--img_h", 96, "--img_w", 32]
    with FileLock(tree / "pre_process.lock"):
        line = error_of("pre_process_sysu.py", "--data_path", tree, *size, "--force")
    assert "pre_process.lock" in line


# ---- numbers that are not finite ----------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_the_run(training, capsys, tmp_path):
    assert training("--lr", 1e30, "--epochs", 0) == 2
    (line,) = capsys.readouterr().err.splitlines()
    for words in ("epoch 0, step 5", "not finite", "--lr 1e+30", "--w-hc 0.6"):
        assert words in line
    assert not list(tmp_path.rglob("*.t"))


def test_weights_that_are_not_finite_are_not_saved(training, capsys, tmp_path):
    """The last update may spoil them though every loss was finite."""

    train_step = train.train_step

    def step(net, *args):
        result = train_step(net, *args)
        with torch.no_grad():
            net.feature1.feat_block[0].bias[0] = float("inf")
        return ({name: torch.zeros(6) for name in result[0]}, result[1])

    assert training("--epochs", 0, train_step=step) == 2
    assert "a weight is not finite" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.t"))


def test_a_term_without_weight_does_not_spoil_the_loss(training, tmp_path, monkeypatch):
    """In metrics.jsonl its NaN is null, which every reader of JSON knows."""
    forward = loss.HeteroCenterLoss.forward

    def forward_nan(*args) -> torch.Tensor:
        return forward(*args) * float("nan")

    monkeypatch.setattr(loss.HeteroCenterLoss, "forward", forward_nan)
    assert training("--w_hc", 0, "--epochs", 0, "--tensorboard") == 0
    (path,) = tmp_path.rglob("metrics.jsonl")
    text = path.read_text()
    assert '"HC": null' in text
    assert "NaN" not in text
    metrics = json.loads(text)
    assert metrics["loss"] == metrics["CE"]
    (last,) = tmp_path.rglob("*_last.t")
    assert utils.load_checkpoint(str(last))["metrics"] == [metrics]


# ---- files --------------------------------------------------------------------------------------


def test_a_file_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("before")
    with pytest.raises(KeyError), utils.atomic_write(str(file)) as partial:
        Path(partial).write_text("aft")
        raise KeyError
    assert os.listdir(tmp_path) == ["file"]
    assert file.read_text() == "before"

    def full_disk(_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(utils.InputError, match=r"file .*disk is full"):
        utils.save_checkpoint(str(file), {})
    assert os.listdir(tmp_path) == ["file"]
    assert file.read_text() == "before"
    monkeypatch.undo()

    (tmp_path / "file.partial").write_text("what a killed run left: longer than what comes now")
    with utils.atomic_write(str(file)) as partial:
        Path(partial).write_text("now")
    assert os.listdir(tmp_path) == ["file"]
    assert file.read_text() == "now"
