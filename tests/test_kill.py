"""Processes that are killed at any moment: every file is whole, and in the end all are as without.

pytest -m slow kills many times.
"""

import os
import random
import shutil
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


def survive(
    command_in: Callable[[Path], list], folder: Path, n_kills: int, rng: random.Random
) -> None:
    """Run a command in peace; then in other folders, killed until there were enough kills.

    ``command_in``: folder for its files -> command. After each kill the same command is given
    again, until it ends by itself; then all files must hold what those of the first folder hold.
    """
    output = folder / "output.txt"
    begin = time.monotonic()
    process = start(command_in(folder / "whole"), output)
    assert process.wait() == 0, output.read_text()
    seconds = time.monotonic() - begin
    expected = read_all(folder / "whole")
    assert expected
    kills = 0
    while kills < n_kills:
        out = folder / "killed"
        command = command_in(out)
        while True:
            process = start(command, output)
            if kills < n_kills:
                time.sleep(rng.uniform(0, seconds))
                if rng.random() < 0.5:
                    wait_for_partial_file(process, out)
                process.kill()
            if process.wait() == 0:
                break
            assert process.returncode == -9, output.read_text()
            kills += 1
            read_all(out)  # no file is damaged
        assert same_content(read_all(out), expected)
        shutil.rmtree(out)


def survive_training(tree: Path, folder: Path, n_kills: int) -> None:
    command = [ROOT / "tests/distributed_helpers.py", "train.py", *TINY]
    command += ["--drop", 0.3, "--epochs", 4, "--resume", "last", "--data_path", tree]

    def command_in(out: Path) -> list:
        return [*command, "--model_path", out, "--log_path", out]

    survive(command_in, folder, n_kills, random.Random(n_kills))


def survive_preprocessing(tree: Path, folder: Path, n_kills: int) -> None:
    def command_in(out: Path) -> list:
        shutil.copytree(tree, out)
        return ["pre_process_sysu.py", *SIZE, "--workers", 2, "--data_path", out]

    survive(command_in, folder, n_kills, random.Random(n_kills))


def test_a_killed_training_loses_nothing(sysu_tree, tmp_path):
    survive_training(sysu_tree, tmp_path, 1)


@pytest.mark.slow
def test_a_training_killed_many_times_loses_nothing(sysu_tree, tmp_path):
    survive_training(sysu_tree, tmp_path, int(os.environ.get("KILLS", 20)))


@pytest.mark.slow
def test_a_preprocessing_killed_many_times_loses_nothing(tmp_path):
    make_tree("sysu", tmp_path / "tree", "--ids", 5, "--images", 2)
    survive_preprocessing(tmp_path / "tree", tmp_path, int(os.environ.get("KILLS", 20)))
