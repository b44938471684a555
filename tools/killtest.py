"""Kill a training, and the preprocessing, again and again: whatever the moment, what is left must be whole, and what
comes out in the end the same, byte for byte, as without a kill.

    python -m tools.killtest --kills 50

Small drawn people, on the CPU. A process is killed at a random moment, or as soon as it has begun to write a file;
then the same command is given again, until it is through. Exit status 1: something was lost.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import utils
from data_loader import open_array
from tools.make_synthetic import make_sysu

ROOT = Path(__file__).resolve().parent.parent
SIZE = ["--img_h", 96, "--img_w", 32]
TRAIN = [
    "train.py", *SIZE, "--arch", "resnet18", "--low-dim", 16, "--drop", 0.3, "--pretrained", "none", "--batch-size", 8,
    "--per_img", 4, "--lr", 0.01, "--epochs", 2, "--save_every_steps", 3, "--resume", "last", "--no-tensorboard",
]  # fmt: skip
PREPROCESS = ["pre_process_sysu.py", "--img_h", 288, "--img_w", 144, "--workers", 2]
WAYS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGINT: 128 + signal.SIGINT}


class Lost(Exception):
    """What the kill test looks for."""


def start(command: list) -> subprocess.Popen:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    script, *flags = map(str, command)
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *flags],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill(process: subprocess.Popen, folder: Path, longest: float, rng: random.Random) -> str | None:
    """End the process within ``longest`` seconds; gives how and when, or None if it was through before."""
    way, moment = rng.choices([*WAYS], [8, 1, 1])[0], rng.uniform(0, longest)
    writes, begin = rng.choice([0, 0, 1, 2, 3]), time.monotonic()  # 0: by the clock; else as the n-th file is begun
    seen: set[Path] = set()
    while process.poll() is None and len(seen) < (writes or 1):
        if writes:
            seen |= {*folder.rglob("*.partial")}
        elif time.monotonic() - begin > moment:
            break
        time.sleep(0.0005)
    process.send_signal(way)
    output = process.communicate()[0]
    if process.returncode == 0:
        return None
    # Before Python has come to the script, a signal ends it as it does any program.
    if process.returncode not in (WAYS[way], -way) and not (way == signal.SIGINT and "KeyboardInterrupt" in output):
        raise Lost(f"exit status {process.returncode} after {way.name}:\n{output}")
    return f"{way.name} {f'as it wrote file {writes}' if writes else f'after {moment:.1f} s'}"


def hashes(folder: Path, *patterns: str) -> dict[str, str]:
    """Of all files of these patterns: path below the folder -> SHA-256."""
    files = sorted(file for pattern in patterns for file in folder.rglob(pattern))
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def killed_until_through(
    command: list, folder: Path, longest: float, rng: random.Random, check: Callable[[], None], most: int
) -> list[str]:
    """Give the command again and again, killed ``most`` times at most, until it is through; gives the kills."""
    kills = []
    while True:
        process = start(command)
        if len(kills) < most and (how := kill(process, folder, longest, rng)):
            kills.append(how)
        else:
            output = process.communicate()[0] if process.returncode is None else ""
            if process.returncode:
                raise Lost(f"exit status {process.returncode} without a kill:\n{output}")
        check()
        if process.returncode == 0:
            left = [str(file) for file in folder.rglob("*") if file.suffix in (".partial", ".lock")]
            if left:
                raise Lost(f"left over: {left}")
            return kills


def kill_training(folder: Path, tree: Path, kills: int, rng: random.Random) -> list[str]:
    """Kill trainings until there were ``kills`` kills; gives how each was killed; `Lost`: something was."""

    def flags(out: Path) -> list:
        return [*TRAIN, "--data_path", tree, "--model_path", out / "models", "--log_path", out / "logs"]

    def check_whole() -> None:
        for file in folder.rglob("*.t"):
            utils.load_checkpoint(str(file))
        for file in folder.rglob("metrics.jsonl"):
            [json.loads(line) for line in file.read_text().splitlines()]

    def steps(out: Path) -> list[str]:
        (log,) = out.rglob("*.log")
        return re.findall(r"^(?:epoch +\d+ step +\d+|test \w+|epoch \d+ was)", log.read_text(), re.MULTILINE)

    begin = time.monotonic()
    killed_until_through(flags(folder / "whole"), folder, 0, rng, check_whole, 0)
    longest, done = time.monotonic() - begin, []
    expected = hashes(folder / "whole", "*.t", "metrics.jsonl")
    while len(done) < kills:
        out = folder / "killed"
        done += killed_until_through(flags(out), out, longest, rng, check_whole, kills - len(done))
        found = hashes(out, "*.t", "metrics.jsonl")
        if found != expected:
            raise Lost(f"after {done}: other files, {[name for name in expected if found.get(name) != expected[name]]}")
        if steps(out) != steps(folder / "whole"):
            raise Lost(f"after {done}: the log repeats or lacks lines: {steps(out)}")
        shutil.rmtree(out)
    return done


def kill_preprocessing(tree: Path, kills: int, rng: random.Random) -> list[str]:
    """The same with pre_process_sysu.py, whose arrays in ``tree`` are replaced each time."""
    command, done = [*PREPROCESS, "--data_path", tree], []

    def check_whole() -> None:
        for file in tree.glob("*.npy"):
            open_array(str(file))

    begin = time.monotonic()
    killed_until_through([*command, "--force"], tree, 0, rng, check_whole, 0)
    longest, expected = time.monotonic() - begin, hashes(tree, "*.npy")
    while len(done) < kills:
        for file in tree.glob("*.npy"):
            file.unlink()
        done += killed_until_through(command, tree, longest, rng, check_whole, kills - len(done))
        if hashes(tree, "*.npy") != expected:
            raise Lost(f"after {done}: other arrays")
    return done


def build_parser() -> argparse.ArgumentParser:
    parser = utils.Parser(
        prog="python -m tools.killtest", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=utils.number(int, 1), default=50, help="of each of the two (%(default)s)")
    parser.add_argument("--seed", type=utils.number(int, 0), default=0, help="of the moments (%(default)s)")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        out, tree, arrays = Path(folder) / "runs", Path(folder) / "SYSU-MM01", Path(folder) / "arrays"
        try:
            make_sysu(tree, ids=12, images=2)
            shutil.copytree(tree, arrays)
            start(["pre_process_sysu.py", *SIZE, "--data_path", tree]).communicate()
            for name, done in (
                ("preprocessing", kill_preprocessing(arrays, args.kills, rng)),
                ("training", kill_training(out, tree, args.kills, rng)),
            ):
                ways = ", ".join(f"{n} by {way}" for way, n in Counter(how.split()[0] for how in done).items())
                writing = sum("wrote" in how for how in done)
                print(f"{name}: {len(done)} kills survived ({ways}; {writing} while a file was written)")
        except Lost as lost:
            sys.exit(f"LOST: {lost}")


if __name__ == "__main__":
    utils.run(main)
