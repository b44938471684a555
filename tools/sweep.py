"""Train and test with some values of flags, several times each, and compare the results.

    python -m tools.sweep --out sweeps/sysu --vary w_hc=0,0.1,0.5 --over seed=1,2,3 -- --arch resnet18 --epochs 20
    python -m tools.sweep --out sweeps/regdb --over trial=1,2,3,4,5,6,7,8,9,10 --test '--search both' -- --dataset regdb

Flags of train.py for all runs follow --. Several --vary are combined; --vary dist-type:w_hc=l2:0.1,l1:2.2 changes flags
together. Each run has a folder of its own in --out, which sweeps with the same --out share; the comparison is in
<flags>.csv and <flags>.png beside them, until another sweep varies the same flags there. The same command goes on where
it was stopped. For a cluster, --dry-run prints a line of shell for each run that is left; --jobs 0 just compares.
"""

import argparse
import contextlib
import csv
import itertools
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.stats
import torch
from matplotlib.figure import Figure

import train
import utils
from tools.visualize import STYLE, add_legend, new_figure, read_results

ROOT = Path(__file__).resolve().parent.parent
SHARED = ("dataset", "data_path", "trial", "workers", "gpu", "test_batch")  # flags of train.py that test.py needs, too
SHOWN = {"rank1": "rank-1, %", "mAP": "mAP, %"}


class Run(NamedTuple):
    cell: str  # the values that are compared, in words
    replicate: str
    folder: Path
    commands: list[list[str]]  # train.py, then test.py
    results: str  # pattern of the JSON file that test.py writes in the folder

    def carry_out(self, stop: list[int]) -> None:
        """Train and test, or go on with it, until ``stop`` is filled (`utils.stop_signals`)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "output.txt", "a") as output:
            for command in self.commands:
                # In a session of its own Ctrl-C does not reach it: a second signal would end it before it has saved.
                with subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True) as process:
                    while process.poll() is None and not stop:
                        time.sleep(0.1)
                    process.terminate()
                if process.returncode or stop:
                    break
        print(f"{'finished' if self.rows() else 'not finished'}: {self.folder}", flush=True)

    def rows(self) -> list[dict]:
        """Percentages of each protocol and kind of features, means over the trials of the test; [] if not finished."""
        rows = []
        for result in (read_results(str(path)) for path in self.folder.glob(self.results)):
            for protocol, kind in itertools.product(result.counts, result.rows):
                row = {"cell": self.cell, "replicate": self.replicate, "protocol": protocol, "features": kind}
                row |= {name: round(100 * value, 4) for name, value in result.rows[kind][protocol].mean.items()}
                rows += [row | {"data": result.data}] * (kind != "chance")
        return rows


def choices(text: str) -> list[dict[str, str]]:
    """``one=a,b`` -> [{one: a}, {one: b}]; ``one:two=a:1,b:2`` -> [{one: a, two: 1}, {one: b, two: 2}]."""
    flags, values = text.split("=", 1)
    return [dict(zip(flags.replace("-", "_").split(":"), row.split(":"), strict=True)) for row in values.split(",")]


def plan(args: argparse.Namespace) -> list[Run]:
    """All runs, those of the first cell first. A wrong flag ends the program."""
    runs, parser, python = [], train.build_parser(), [sys.executable]
    if args.jobs > 1:  # each gets its share of the cores: two trainings with two threads on two cores would be slower
        python = ["env", f"OMP_NUM_THREADS={max(1, torch.get_num_threads() // args.jobs)}", *python]
    for *parts, replicate in itertools.product(*args.vary, args.over):
        cell = {flag: value for part in parts for flag, value in part.items()}
        flags = [*args.flags, *(f"--{flag}={value}" for flag, value in (cell | replicate).items())]
        given = train.parse_args(flags)
        shared = [f"--{x}={vars(given)[x]}" for x in SHARED if vars(given)[x] not in (None, parser.get_default(x))]
        name = train.run_name(given)
        folder, tested = args.out / f"{name}_epochs{given.epochs}", "_".join(["test", *args.test]).replace("/", "_")
        training = [ROOT / "train.py", *flags, "--model_path", folder, "--log_path", folder, "--resume", "last"]
        testing = [ROOT / "test.py", *shared, *args.test, "--log_path", folder / tested]
        testing += ["--resume", folder / f"{name}_last.t"]
        words = [" ".join(map("=".join, part.items())) for part in (cell, replicate)]
        commands = [[*python, *map(str, command)] for command in (training, testing)]
        runs.append(Run(*words, folder, commands, f"{tested}/test_{name}_last_*.json"))
    return runs


def difference(own: dict[str, dict], first: dict[str, dict], measure: str) -> str:
    """Mean of own - first over the replicates that both have, and its 95% t interval; of {replicate: row}."""
    gaps = [own[replicate][measure] - first[replicate][measure] for replicate in own if replicate in first]
    if own is first or len(gaps) < 2:
        return ""
    mean, half = np.mean(gaps), scipy.stats.t.ppf(0.975, len(gaps) - 1) * scipy.stats.sem(gaps)
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def table(rows: list[dict]) -> str:
    """Of one protocol and kind of features: for each cell n, mean ± deviation over replicates, and `difference`."""
    cells = {cell: {row["replicate"]: row for row in rows if row["cell"] == cell} for cell in [r["cell"] for r in rows]}
    lines, first = [f"{'n':>43}" + "".join(f"{name:>16}{'- first [95%]':>26}" for name in SHOWN.values())], None
    for cell, own in cells.items():
        first, line = first or own, f"{cell:40}{len(own):3}"
        for measure in SHOWN:
            values = [row[measure] for row in own.values()]
            spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
            line += f"{np.mean(values):>{16 - len(spread)}.2f}{spread}{difference(own, first, measure):>26}"
        lines.append(line.rstrip())
    return "\n".join(lines)


@STYLE
def draw(rows: list[dict]) -> Figure:
    """Of one protocol: rank-1 and mAP of the cells, a point for each replicate and a line through their means."""
    cells = [*dict.fromkeys(row["cell"] for row in rows)]
    with contextlib.suppress(ValueError):  # numbers stand in their order
        cells.sort(key=lambda cell: [float(value.split("=")[1]) for value in cell.split()])
    figure, axes = new_figure(1, 2, (max(4.5, 1.1 * len(cells)), 3.8), "{protocol} ({data})".format(**rows[0]))
    for axis, measure in zip(axes.flat, SHOWN, strict=True):
        for kind in dict.fromkeys(row["features"] for row in rows):
            points = [(cells.index(row["cell"]), row[measure]) for row in rows if row["features"] == kind]
            means = [np.mean([value for cell, value in points if cell == place]) for place in range(len(cells))]
            (line,) = axis.plot(means, label=f"{kind} features", marker="_", markersize=14)
            axis.scatter(*zip(*points, strict=True), color=line.get_color(), alpha=0.6)
        axis.set(title=SHOWN[measure])
        axis.set_xticks(range(len(cells)), [cell.replace(" ", "\n") for cell in cells], fontsize=10)
    add_legend(figure, axes)
    return figure


def main() -> None:
    parser = utils.Parser(prog="python -m tools.sweep", description=__doc__)
    add, grid = parser.add_argument, {"type": choices, "metavar": "FLAG=A,B,…"}
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the runs and of their comparison")
    add("--vary", action="append", default=[], help="a flag of train.py and its values; may be repeated", **grid)
    add("--over", default="seed=1", help="what is repeated: seeds, or RegDB's trials (%(default)s)", **grid)
    add("--test", type=shlex.split, default=[], help="flags for test.py alone, like '--mode both --gall-mode both'")
    add("--jobs", type=int, default=1, help="runs at a time, which share the cores; 0 only compares (%(default)s)")
    add("--dry-run", action="store_true", help="print a line of shell for each run that is left, and do nothing")
    add("flags", nargs="*", metavar="-- FLAGS", help="flags of train.py for all runs, less folders and --resume")
    args = parser.parse_args()
    runs = plan(args)
    left = [run for run in runs if args.jobs and not run.rows()]
    if args.dry_run:
        for run in left:
            print(" && ".join(map(shlex.join, [["cd", str(Path.cwd())], *run.commands])))
        return
    with utils.stop_signals() as stop, ThreadPoolExecutor(max(1, args.jobs)) as pool:
        [*pool.map(lambda run: stop or run.carry_out(stop), left)]
    rows = [row for run in runs for row in run.rows()]
    name = "-".join(flag for part in args.vary for flag in part[0]) or "all"
    if rows:
        with utils.whole_file(str(args.out / f"{name}.png")) as path:
            draw([row for row in rows if row["protocol"] == rows[0]["protocol"]]).savefig(path, format="png")
        with utils.whole_file(str(args.out / f"{name}.csv")) as path, open(path, "w", newline="") as file:
            csv.writer(file).writerows([rows[0].keys(), *(row.values() for row in rows)])
    for key in dict.fromkeys((row["protocol"], row["features"]) for row in rows):
        print("", ", ".join(key), table([row for row in rows if (row["protocol"], row["features"]) == key]), sep="\n")
    if failed := [str(run.folder / "output.txt") for run in left if not run.rows()]:
        raise ValueError(f"{len(failed)} of {len(runs)} runs failed, see {', '.join(failed)}")


if __name__ == "__main__":
    utils.run(main)
