"""Kill a training, and the preprocessing, again and again: whatever the moment, each file that is left must be whole,
and in the end all files must hold the same, value by value, as without a kill.

    python -m tools.killtest --kills 50

A process is killed at a random moment, or while it writes a file; then the same command is given again, until it is
through. Exit status 1: something was lost.
"""

import contextlib
import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import utils
from tools.make_synthetic import make_sysu

SIZE = ["--img_h", 96, "--img_w", 32]
TRAIN = [
    "train.py", *SIZE, "--arch", "resnet18", "--low-dim", 16, "--drop", 0.3, "--pretrained", "none", "--batch-size", 4,
    "--per_img", 2, "--epochs", 2, "--save_every_steps", 2, "--resume", "last", "--no-tensorboard", "--workers", 0,
]  # fmt: skip
FORKS = multiprocessing.get_context("forkserver")  # of one process that has imported torch, which takes seconds
FORKS.set_forkserver_preload(["train"])


def same(a, b) -> bool:
    """Whether nested dicts, lists and tuples hold the same: types, keys, and every value of arrays and tensors."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor | np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    return a == b


def read_all(folder: Path) -> dict:
    """What the checkpoints, metrics and arrays in a folder hold, by their path below it. SystemExit: one is damaged."""
    readers, found = {".t": utils.load_checkpoint, ".npy": np.load}, {}
    readers[".jsonl"] = lambda path: [json.loads(line) for line in Path(path).read_text().splitlines()]
    try:
        for file in (file for file in folder.rglob("*") if file.suffix in readers):
            found[str(file.relative_to(folder))] = readers[file.suffix](str(file))
    except (OSError, ValueError, EOFError) as error:
        raise SystemExit(f"LOST: {file} is damaged: {error}") from error
    return found


def run(command: list[str], output: Path) -> None:
    """Run a script in this process; ``output`` gets what it prints."""
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    multiprocessing.set_start_method(None, force=True)  # the script's own processes start as they usually do
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def start(command: list, output: Path) -> multiprocessing.Process:
    script, *flags = map(str, command)
    output.write_text("")
    process = FORKS.Process(target=run, args=([str(Path(__file__).parent.parent / script), *flags], output))
    process.start()
    return process


def half_written(folder: Path) -> set[tuple]:
    """The half-written files in a folder, with their times."""
    found = set()
    for file in folder.rglob("*.partial"):
        with contextlib.suppress(FileNotFoundError):  # it has its final name by now
            found.add((file, file.stat().st_mtime_ns))
    return found


def kill(process: multiprocessing.Process, folder: Path, longest: float, rng: random.Random) -> tuple[int, str]:
    """Send a signal at a random moment, or as the process next writes a file; gives the signal, and how in words."""
    way, as_it_wrote = rng.choice([signal.SIGKILL] * 8 + [signal.SIGTERM, signal.SIGINT]), rng.random() < 0.5
    end, stale = time.monotonic() + rng.uniform(0, longest), half_written(folder)
    while process.is_alive() and (time.monotonic() < end or (as_it_wrote and half_written(folder) <= stale)):
        time.sleep(0.0005)
    with contextlib.suppress(ProcessLookupError):  # it was through before
        os.kill(process.pid, way)
    return way, f"{way.name} as it wrote" if as_it_wrote else way.name


def survive(command_in: Callable[[Path], list], folder: Path, kills: int, rng: random.Random) -> list[str]:
    """Run what ``command_in`` (folder) gives in peace, then with kills, until there were enough; gives their kinds."""
    folder.mkdir()
    output, done = folder / "output.txt", []
    start(["train.py", "--help"], output).join()  # the first process waits for the imports
    begin = time.monotonic()
    start(command_in(folder / "whole"), output).join()
    longest, expected = time.monotonic() - begin, read_all(folder / "whole")
    while len(done) < kills:
        command, through = command_in(folder / "killed"), False
        while not through:
            process = start(command, output)
            way, how = kill(process, folder / "killed", longest, rng) if len(done) < kills else (0, "no signal")
            process.join()
            through, text = process.exitcode == 0, output.read_text()
            # A signal that comes before the script has begun ends it as it does any program, maybe without a word.
            interrupted = way == signal.SIGINT and (not text or "KeyboardInterrupt" in text)
            if not (through or interrupted or process.exitcode in (-way, 128 + way)):
                raise SystemExit(f"LOST: exit status {process.exitcode} after {how}:\n{text}")
            done += [how] * (not through)
            found = read_all(folder / "killed")
        if not same(found, expected):
            raise SystemExit(f"LOST: not the same as without a kill, after {done}")
        shutil.rmtree(folder / "killed")
    return done


def kill_training(folder: Path, tree: Path, kills: int, rng: random.Random) -> list[str]:
    """`survive` for train.py, which reads a preprocessed ``tree``."""
    command = [*TRAIN, "--data_path", tree, "--model_path"]
    return survive(lambda out: [*command, out, "--log_path", out], folder, kills, rng)


def kill_preprocessing(folder: Path, tree: Path, kills: int, rng: random.Random) -> list[str]:
    """`survive` for pre_process_sysu.py, on copies of ``tree``."""
    command = ["pre_process_sysu.py", "--workers", 2, "--data_path"]
    return survive(lambda out: [*command, shutil.copytree(tree, out)], folder, kills, rng)


def main() -> None:
    parser = utils.Parser(prog="python -m tools.killtest", description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="of each of the two (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder, tree = Path(name), Path(name) / "SYSU-MM01"
        make_sysu(tree, ids=6, images=2)
        for title, test in (("preprocessing", kill_preprocessing), ("training", kill_training)):
            done = test(folder / title, tree, args.kills, rng)
            kinds = ", ".join(f"{n} by {how}" for how, n in Counter(done).items())
            print(f"{title}: {len(done)} kills survived: {kinds}")
            start(["pre_process_sysu.py", *SIZE, "--data_path", tree], folder / "output.txt").join()  # for the training


if __name__ == "__main__":
    utils.run(main)
