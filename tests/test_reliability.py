"""Nothing lost: runs that are stopped or killed, files that are whole or absent, one run to a name."""

import errno
import logging
import os
import random
import re
import signal
import time
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from conftest import RUN, TINY, TINY_BATCH, succeed

import utils
from tools.killtest import hashes, kill_preprocessing, kill_training, start
from tools.make_synthetic import make_sysu


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_run_in_pieces_is_the_run_in_one(sysu_run, tmp_path):
    """--epochs raised, SIGTERM and SIGINT inside epochs, other workers and folders: the same bytes in the end."""
    command = ["train.py", *TINY, *TINY_BATCH, "--lr", 0.01, "--drop", 0.3, "--data_path", sysu_run["data"]]
    command += ["--model_path", tmp_path / "m", "--log_path", tmp_path / "l", "--resume", "last", "--epochs"]
    assert f"there is no {tmp_path / 'm' / RUN}_last.t to go on with" in succeed(*command, 0)
    last, log = tmp_path / "m" / f"{RUN}_last.t", tmp_path / "l" / f"{RUN}.log"
    for way, status, after in ((signal.SIGTERM, 143, "epoch 1, step 3"), (signal.SIGINT, 130, "epoch 1, step 6")):
        process = start([*command, 3, "--save_every_steps", 3, "--workers", 0])
        wait_for(lambda after=after: f"checkpoint: {after}" in log.read_text())
        process.send_signal(way)
        output = process.communicate()[0]
        assert process.returncode == status
        assert "the same command with --resume last goes on with" in output.splitlines()[-1]
        state = utils.load_checkpoint(str(last))
        assert state["step"] > 0
        for buffers in state["optimizer"]["state"].values():  # another memory format is no other value
            buffers["momentum_buffer"] = buffers["momentum_buffer"].contiguous()
        utils.save_checkpoint(str(last), state)
    succeed(*command, 3)
    whole = hashes(sysu_run["models"], "*.t"), hashes(sysu_run["logs"], "metrics.jsonl")
    assert (hashes(tmp_path / "m", "*.t"), hashes(tmp_path / "l", "metrics.jsonl")) == whole

    def training(text: str) -> list[str]:
        """The lines of the epochs, without the speed at their end."""
        return re.findall(r"^(?:epoch.*  lr|test (?:fc|pool5).*)", text, re.MULTILINE)

    assert training(log.read_text()) == training((sysu_run["logs"] / log.name).read_text())
    assert "epoch 3 was the last one" in succeed(*command, 3)  # nothing is left to do
    assert (hashes(tmp_path / "m", "*.t"), hashes(tmp_path / "l", "metrics.jsonl")) == whole
    assert {file.suffix for file in tmp_path.rglob("*") if file.is_file()} == {".t", ".log", ".jsonl"}


def test_killed_trainings_and_preprocessing(tmp_path):
    """More of it: python -m tools.killtest."""
    make_sysu(tmp_path / "tree", ids=12, images=2)
    rng = random.Random(1)
    assert len(kill_preprocessing(tmp_path / "tree", 3, rng)) == 3
    succeed("pre_process_sysu.py", "--data_path", tmp_path / "tree", "--img_h", 96, "--img_w", 32)
    ways = kill_training(tmp_path / "runs", tmp_path / "tree", 3, rng)
    assert len(ways) == 3 and any("wrote" in way for way in ways)


def test_readers_end_with_a_killed_script(tmp_path):
    make_sysu(tmp_path / "tree", ids=5, images=20)
    process = start(["pre_process_sysu.py", "--data_path", tmp_path / "tree", "--workers", 2])
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_for(lambda: process.poll() is not None or len(children.read_text().split()) == 2)
    readers = children.read_text().split()
    process.kill()
    process.communicate()

    def ended(reader: str) -> bool:
        stat = Path(f"/proc/{reader}/stat")
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"

    wait_for(lambda: all(map(ended, readers)))
    assert readers and not [*(tmp_path / "tree").glob("*.npy")]


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
    with pytest.raises(OSError, match="file cannot be written: the disk is full"), utils.whole_file(str(file)):
        pass
    with pytest.raises(OSError, match="file cannot be written: the disk is full"):
        utils.save_checkpoint(str(file), {})
    assert os.listdir(tmp_path) == ["file"] and file.read_text() == "before"


def test_only_stale_partial_files_are_removed(tmp_path):
    (tmp_path / "a.t.123.partial").touch()
    (tmp_path / "someone's.partial").touch()
    with utils.whole_file(str(tmp_path / "b.t")) as partial:
        utils.make_folder(str(tmp_path), "--model_path")
        assert {*os.listdir(tmp_path)} == {"someone's.partial", os.path.basename(partial)}
    assert {*os.listdir(tmp_path)} == {"someone's.partial", "b.t"}


def test_one_process_to_a_name(tmp_path):
    name = str(tmp_path / "run")
    with utils.lock(name):
        with pytest.raises(OSError, match="another process is writing"), utils.lock(name):
            pass
        with utils.lock(name + "2"):
            pass
        assert os.listdir(tmp_path) == ["run.lock"]
    (tmp_path / "run.lock").touch()  # what a killed one leaves
    with utils.lock(name):
        pass
    assert os.listdir(tmp_path) == []


def test_equal_states_are_equal_files(tmp_path):
    state = {"net": {"w": torch.arange(6.0).reshape(2, 3)}, "best": {"epoch": 1}, "epoch": 1}
    other = {
        "net": OrderedDict({"w": torch.arange(12.0)[:6].reshape(2, 3).requires_grad_()}),
        "best": {"".join(["ep", "och"]): 1},
        "".join(["epo", "ch"]): 1,
    }
    for name, content in (("a", state), ("b", other)):
        utils.save_checkpoint(str(tmp_path / name), content)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_log_file_begins_late_and_goes_on_where_the_checkpoint_did(tmp_path):
    log, path = logging.getLogger("__main__"), tmp_path / "logs" / "run.log"
    try:
        utils.start_log(str(path))
        log.info("refused")
        utils.start_log(str(path))
        assert not path.exists()
        for line in ("flags", "checkpoint: epoch 0", "epoch 1 step 50", "checkpoint: epoch 1", "epoch 2 step 50"):
            log.info(line)
        utils.write_log()
        for last in (1, 0):
            utils.start_log(str(path))
            log.debug("resumed")
            utils.write_log(after=f"checkpoint: epoch {last}")
        log.info("epoch 1 step 50")
        assert path.read_text().splitlines() == ["flags", "checkpoint: epoch 0", "resumed", "epoch 1 step 50"]
    finally:
        logging.basicConfig(handlers=[], force=True)
