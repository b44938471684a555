"""Nothing lost: runs that are stopped or killed, files that are whole or absent, one process to a run."""

import errno
import itertools
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import RUN, RUN_FLAGS, places
from filelock import FileLock

import train
import utils
from tools import killtest
from tools.killtest import SIZE, kill_preprocessing, kill_training, read_all, same
from tools.make_synthetic import make_sysu


def sends(number: int) -> Callable[..., None]:
    return lambda *_: signal.raise_signal(number)


@pytest.fixture
def training(monkeypatch, sysu_run, tmp_path):
    """Run the training of `sysu_run`, in folders of its own, in this process.

    After so many steps ``happens`` is called, and ``in_test`` in place of a test. Gives the exit status and, for each
    step, its losses and accuracy as train.py had them.
    """
    usual = [*RUN_FLAGS, "--data_path", sysu_run["data"], "--model_path", tmp_path / "m", "--log_path", tmp_path / "l"]

    def run(*flags, after: int = 0, happens: Callable | None = None, in_test: Callable | None = None) -> tuple:
        steps, numbers, real = [], itertools.count(1), train.train_step

        def step(*args):
            losses, accuracy = real(*args)
            steps.append(torch.stack([*(value.mean() for value in losses.values()), accuracy]))
            if next(numbers) == after:
                happens()
            return losses, accuracy

        with monkeypatch.context() as patch:
            patch.setattr(train, "train_step", step)
            patch.setattr(train, "evaluate", in_test or train.evaluate)
            patch.setattr(sys, "argv", ["train.py", *map(str, [*usual, *flags])])
            try:
                utils.run(train.main)
            except SystemExit as stop:
                return stop.code, steps
        return 0, steps

    return run


def test_a_run_in_pieces_is_the_run_in_one(training, sysu_run, tmp_path, capsys):
    """--epochs raised, signals in an epoch and in a test, a crash, other workers: the same values in the end."""
    last = tmp_path / "m" / f"{RUN}_last.t"
    assert training("--resume", "last", "--epochs", 0)[0] == 0
    assert "starting from the beginning" in capsys.readouterr().out
    pieces = (
        ({"after": 2, "happens": sends(signal.SIGTERM)}, 143, (0, 2)),
        ({"after": 2, "happens": sends(signal.SIGINT)}, 130, (0, 4)),
        ({"in_test": sends(signal.SIGINT)}, 130, (1, 5)),  # the finished epoch's steps are saved
    )
    for event, status, place in pieces:
        assert training("--resume", "last", "--workers", 1, **event)[0] == status
        assert ("stopped at" in capsys.readouterr().out.splitlines()[-1]) == ("happens" in event)
        state = utils.load_checkpoint(str(last))
        assert (state["epoch"], state["step"]) == place
        for own in state["optimizer"]["state"].values():  # another memory format is no other value
            own["momentum_buffer"] = own["momentum_buffer"].contiguous()
        utils.save_checkpoint(str(last), state)
    with pytest.raises(ZeroDivisionError):  # stands for a crash
        training("--resume", "last", "--save_every_steps", 3, after=4, happens=lambda: 1 / 0)
    state = utils.load_checkpoint(str(last))
    assert (state["epoch"], state["step"]) == (2, 3)
    for steps in (2, 0):  # then nothing is left to do
        status, done = training("--resume", "last")
        assert (status, len(done)) == (0, steps)
        assert same(read_all(tmp_path / "m"), read_all(sysu_run["models"]))
        assert same(read_all(tmp_path / "l"), read_all(sysu_run["logs"]))
    assert {file.suffix for file in tmp_path.rglob("*") if file.is_file()} == {".t", ".log", ".jsonl", ".lock"}


def test_checkpoints_of_earlier_versions_go_on(training, sysu_run, tmp_path):
    """They kept CE, HC and accuracy of each step, not sums; this one was stopped within an epoch."""
    last = tmp_path / "m" / f"{RUN}_last.t"
    epoch_2 = utils.load_checkpoint(str(sysu_run["models"] / f"{RUN}_best.t"))
    utils.save_checkpoint(str(tmp_path / "older.t"), epoch_2 | {"sums": torch.zeros(2)})  # of fewer terms of the loss
    status, steps = training("--resume", tmp_path / "older.t", after=2, happens=sends(signal.SIGTERM))
    state = utils.load_checkpoint(str(last))
    assert (status, state["epoch"], state["step"]) == (143, 2, 2)
    del state["sums"]
    utils.save_checkpoint(str(last), state | {"history": torch.stack(steps), "scaler": None})
    assert training("--resume", "last")[0] == 0
    found, expected = utils.load_checkpoint(str(last)), utils.load_checkpoint(str(sysu_run["models"] / last.name))
    assert found.pop("metrics") == [pytest.approx(line) for line in expected.pop("metrics")]
    assert same(found, expected)


def test_a_run_is_not_written_over(bad, sysu_run, tmp_path):
    data, models, logs = ["--data_path", sysu_run["data"]], sysu_run["models"], sysu_run["logs"]
    for resume in ([], ["--resume", f"{RUN}_best.t", "--epochs", 2]):
        line = bad("train.py", *RUN_FLAGS, *data, "--model_path", models, "--log_path", logs, *resume)
        assert f"{RUN}_last.t is there already" in line and "--resume last" in line
    for resume in ([], ["--resume", "last"]):  # the metrics alone are a run, too
        line = bad("train.py", *RUN_FLAGS, *data, "--model_path", tmp_path, "--log_path", logs, *resume)
        assert "metrics.jsonl is there already" in line


def test_the_second_process_of_one_name_is_refused(bad, sysu_run, tmp_path):
    with FileLock(tmp_path / f"{RUN}.lock"):
        assert f"{RUN}.lock" in bad("train.py", *RUN_FLAGS, *places(sysu_run["data"], tmp_path))
    (lock,) = sysu_run["data"].glob("*.lock")
    with FileLock(lock):
        assert lock.name in bad("pre_process_sysu.py", "--data_path", sysu_run["data"], *SIZE, "--force")


@pytest.mark.parametrize("event", [{}, {"after": 3, "happens": sends(signal.SIGTERM)}])
def test_a_loss_that_is_not_finite_stops_the_run(training, capsys, tmp_path, event):
    """Also if a signal comes before it is noticed."""
    assert training("--lr", 1e30, "--epochs", 0, **event)[0] == 2
    line = capsys.readouterr().err
    assert len(line.splitlines()) == 1 and "epoch 0" in line and "not finite" in line
    assert not [*tmp_path.rglob("*.t")]


def test_a_loss_that_is_not_finite_is_not_saved(training, capsys, monkeypatch, tmp_path):
    """Even if all weights are finite: in fp16 the scaler leaves such a step out."""
    monkeypatch.setattr(utils, "process_mean", lambda x: x * float("nan"))
    assert training("--save_every_steps", 1)[0] == 2
    assert "not finite" in capsys.readouterr().err and not [*tmp_path.rglob("*.t")]


# ---- kills; more of them: python -m tools.killtest ------------------------------------------------------------------


def test_a_killed_preprocessing_loses_nothing(tmp_path):
    make_sysu(tmp_path / "tree", ids=5, images=2)
    assert len(kill_preprocessing(tmp_path / "runs", tmp_path / "tree", 1, random.Random(1))) == 1


def test_a_killed_training_loses_nothing(sysu_tree, tmp_path, monkeypatch):
    monkeypatch.setattr(killtest, "TRAIN", ["tests/several.py", *killtest.TRAIN, "--arch", "tiny"])
    assert len(kill_training(tmp_path / "runs", sysu_tree, 1, random.Random(1))) == 1


# ---- files ----------------------------------------------------------------------------------------------------------


def test_what_was_there_stays_until_the_new_is_whole(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("before")
    with pytest.raises(KeyError), utils.whole_file(str(file)) as partial:
        Path(partial).write_text("aft")
        raise KeyError
    assert os.listdir(tmp_path) == ["file"] and file.read_text() == "before"

    def full(_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"file .*disk is full"):
        utils.save_checkpoint(str(file), {})
    assert os.listdir(tmp_path) == ["file"] and file.read_text() == "before"
    monkeypatch.undo()
    (tmp_path / "file.partial").write_text("what a killed run left, much more than what is written now")
    with utils.whole_file(str(file)) as partial:
        Path(partial).write_text("now")
    assert os.listdir(tmp_path) == ["file"] and file.read_text() == "now"
