"""Processes killed at any moment: files are whole, and in the end as if nothing had been killed.

pytest -m slow kills many times.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, TINY, make_tree, read_all, same_content

SIZE = ["--img_h", "96", "--img_w", "32"]


def start(command: list, output: Path) -> subprocess.Popen:
    """Start a script; ``output`` gets what it prints."""
    with open(output, "w") as file:
        words = [sys.executable, *(str(word) for word in command)]
        return subprocess.Popen(words, stdout=file, stderr=file, cwd=ROOT)


def wait_for_partial_file(process: subprocess.Popen, folder: Path) -> None:
    """Wait until a file is half-written, or the process has ended."""
    while process.poll() is None and not list(folder.rglob("*.partial")):
        time.sleep(0.0005)


def run_until_done(
    command: list, folder: Path, kills_left: int, seconds: float, rng: random.Random
) -> int:
    """Run a command, which fills ``folder``, until it ends by itself; gives the number of kills.

    After each kill the same command is given again, and from ``kills_left`` on it runs in peace.
    ``seconds``: how long it takes.
    """
    output = folder.parent / "output.txt"
    kills = 0
    while True:
        process = start(command, output)
        if kills < kills_left:
            time.sleep(rng.uniform(0, seconds))
            if rng.random() < 0.5:
                wait_for_partial_file(process, folder)
            process.kill()
        if process.wait() == 0:
            return kills
        assert process.returncode == -signal.SIGKILL, output.read_text()
        kills += 1
        read_all(folder)  # no file is damaged


def survive(
    prepare: Callable[[Path], list], folder: Path, n_kills: int, rng: random.Random
) -> None:
    """Run a command in peace; then in other folders, killed until there were enough kills.

    In the end all files must hold what those of the first folder hold.

    ``prepare``: makes a folder ready, and gives the command that fills it.
    """
    whole = folder / "whole"
    command = prepare(whole)
    begin = time.monotonic()
    kills = run_until_done(command, whole, kills_left=0, seconds=0, rng=rng)
    seconds = time.monotonic() - begin
    assert kills == 0
    expected = read_all(whole)
    assert expected
    for _ in range(n_kills + 9):  # a command may end before it is killed
        if kills == n_kills:
            break
        killed = folder / "killed"
        command = prepare(killed)
        kills += run_until_done(command, killed, n_kills - kills, seconds, rng)
        assert same_content(read_all(killed), expected)
        shutil.rmtree(killed)
    assert kills == n_kills


def survive_training(tree: Path, folder: Path, n_kills: int) -> None:
    command = [ROOT / "tests/distributed_helpers.py", "train.py", *TINY]
    command += ["--drop", 0.3, "--epochs", 4, "--resume", "last", "--data_path", tree]

    def prepare(out: Path) -> list:
        return [*command, "--model_path", out, "--log_path", out]

    survive(prepare, folder, n_kills, random.Random(n_kills))


def survive_preprocessing(tree: Path, folder: Path, n_kills: int) -> None:
    def prepare(out: Path) -> list:
        shutil.copytree(tree, out)
        return ["pre_process_sysu.py", *SIZE, "--workers", 2, "--data_path", out]

    survive(prepare, folder, n_kills, random.Random(n_kills))


def test_a_killed_training_loses_nothing(sysu_tree, tmp_path):
    survive_training(sysu_tree, tmp_path, 1)


@pytest.mark.slow
def test_a_training_killed_many_times_loses_nothing(sysu_tree, tmp_path):
    survive_training(sysu_tree, tmp_path, int(os.environ.get("KILLS", 20)))


@pytest.mark.slow
def test_a_preprocessing_killed_many_times_loses_nothing(tmp_path):
    make_tree("sysu", tmp_path / "tree", "--ids", 5, "--images", 2)
    survive_preprocessing(tmp_path / "tree", tmp_path, int(os.environ.get("KILLS", 20)))
