"""Train and test with some values of flags, several times each, and compare the results.

    python -m tools.sweep --out sweeps/sysu --vary w_hc=0,0.1,0.5 --over seed=1,2,3 -- --epochs 20
    python -m tools.sweep --out sweeps/regdb --over trial=1,2,3,4,5,6,7,8,9,10 \\
        --test '--search both' -- --dataset regdb

Flags of train.py for all runs follow --. A cell is one combination of --vary; its replicates are
the values of --over. Several --vary are combined with each other. With
--vary dist-type:w_hc=l2:0.1,l1:2.2 two flags change together. Each run has a folder of its own in
--out, and sweeps with the same --out share their runs. The comparison is printed, and written
beside them to <flags>.csv and, of the first protocol alone, to <flags>.png; a later sweep over the
same flags replaces it.

Ctrl-C ends the sweep. The same command resumes it: what is finished is not run again. With several
GPUs the runs are spread over them: give --jobs as many runs at a time as there are GPUs. For a
cluster, --dry-run prints a line of shell for each run that is left. --jobs 0 compares what is
there.
"""

import argparse
import csv
import itertools
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# `python tools/sweep.py` would search for modules in tools/ alone.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
import utils
from eval_metrics import MEASURES
from tools.figures import (
    STYLE,
    add_legend,
    mean_and_interval,
    new_figure,
    save_figure,
    writable,
)
from tools.results_files import format_percent, read_results

ROOT = Path(__file__).resolve().parent.parent
# Flags of train.py that test.py needs, too.
SHARED_FLAGS = ("dataset", "data_path", "trial", "workers", "gpu", "test_batch")
COMPARED_MEASURES = ("rank1", "mAP")
INTERRUPTED = (130, -signal.SIGINT)  # exit statuses of a script that Ctrl-C ended


# ---- the runs -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """The scores of one run under one protocol, with one kind of features."""

    cell: str  # like "w_hc=0.1"
    replicate: str  # like "seed=2"
    protocol: str
    features: str
    percent: dict[str, float]  # of each of `MEASURES`, the mean over the trials of the test
    data_name: str  # of the dataset, for titles


@dataclass(frozen=True)
class Run:
    """One training and its test."""

    cell: str
    replicate: str
    folder: Path
    training: list[str]  # a command
    testing: list[str]  # a command
    result_pattern: str  # of the JSON file that test.py writes, below the folder

    def read_rows(self) -> list[Row]:
        """Read the scores; [] if the run is not finished."""
        rows = []
        for path in sorted(self.folder.glob(self.result_pattern)):
            result = read_results(str(path))
            for protocol, kind in itertools.product(result.counts, result.rows):
                if kind == "chance":
                    continue
                mean = result.rows[kind][protocol].mean
                percent = {name: round(100 * mean[name], 4) for name in MEASURES}
                rows.append(
                    Row(self.cell, self.replicate, protocol, kind, percent, result.data_name)
                )
        return rows


def parse_choices(text: str) -> list[dict[str, str]]:
    """Parse the values that a flag takes in turn, or that several flags take together.

    ``one=a,b`` -> [{one: a}, {one: b}]; ``one:two=a:1,b:2`` -> [{one: a, two: 1}, {one: b, two: 2}]
    """
    flags, _, values = text.partition("=")
    names = flags.replace("-", "_").split(":")
    choices = []
    for value in values.split(","):
        parts = value.split(":")
        if len(parts) != len(names) or not all(parts):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not FLAG=A,B,... or FLAG:FLAG=A:B,C:D,..."
            )
        choices.append(dict(zip(names, parts, strict=True)))
    return choices


def plan_runs(args: argparse.Namespace) -> list[Run]:
    """Plan all runs, those of the first cell first. A wrong flag ends the program."""
    runs = []
    for *choices, replicate in itertools.product(*args.vary, args.over):
        cell = {}
        for choice in choices:
            cell |= choice
        runs.append(plan_run(args, cell, replicate))
    return runs


def plan_run(args: argparse.Namespace, cell: dict[str, str], replicate: dict[str, str]) -> Run:
    """Plan one run of the sweep: its folder and its commands."""
    flags = args.flags + flag_words(cell | replicate)
    run_args = train.parse_args(flags)
    name = train.run_name(run_args)
    folder = Path(args.out) / f"{name}_epochs{run_args.epochs}"
    test_name = "_".join(["test", *args.test]).replace("/", "_")

    python = [sys.executable]
    if args.jobs > 1:
        # Runs at the same time share the cores: more threads than cores would be slower.
        threads = max(1, torch.get_num_threads() // args.jobs)
        python = ["env", f"OMP_NUM_THREADS={threads}", sys.executable]
    return Run(
        cell=in_words(cell),
        replicate=in_words(replicate),
        folder=folder,
        training=[
            *python,
            str(ROOT / "train.py"),
            *flags,
            f"--model-path={folder}",
            f"--log-path={folder}",
            "--resume=last",
        ],
        testing=[
            *python,
            str(ROOT / "test.py"),
            *shared_flags(run_args),
            *args.test,
            f"--log-path={folder / test_name}",
            f"--resume={folder / name}_last.t",
        ],
        result_pattern=f"{test_name}/test_{name}_last_*.json",
    )


def flag_words(flags: dict[str, object]) -> list[str]:
    """Return flags as one types them: {"w_hc": 0.1} -> ["--w-hc=0.1"]."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]


def in_words(flags: dict[str, str]) -> str:
    """Name flags in a title: {"w_hc": "0.1", "lr": "0.01"} -> "w_hc=0.1 lr=0.01"."""
    return writable(" ".join(f"{name}={value}" for name, value in flags.items()))


def shared_flags(run_args: argparse.Namespace) -> list[str]:
    """Return the flags that test.py needs as well, where they are not at their default."""
    parser = train.build_parser()
    flags = {}
    for name in SHARED_FLAGS:
        value = getattr(run_args, name)
        if value is not None and value != parser.get_default(name):
            flags[name] = value
    return flag_words(flags)


# ---- running them -------------------------------------------------------------------------------


def gpus_of_jobs(jobs: int, flags: list[str]) -> list[int | None]:
    """Return a GPU's number for each of the runs at a time; None leaves it to ``flags``.

    Flags of train.py may hold a --gpu, and its default is right where there is one GPU or none.
    """
    n_gpus = torch.cuda.device_count()
    has_gpu_flag = any(flag.startswith("--gpu") for flag in flags)
    if has_gpu_flag or n_gpus < 2:
        return [None] * jobs
    return [job % n_gpus for job in range(jobs)]


def carry_out(run: Run, free_gpus: queue.Queue, interrupted: threading.Event) -> None:
    """Train, or resume the training, and then test. What they print is appended to output.txt.

    The run takes a GPU from the queue, and puts it back. It does not begin after Ctrl-C has ended
    another one.
    """
    if interrupted.is_set():
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    gpu = free_gpus.get()
    gpu_flag = []
    if gpu is not None:
        gpu_flag = [f"--gpu={gpu}"]
    try:
        with open(run.folder / "output.txt", "a", encoding="utf-8") as output:
            for command in (run.training, run.testing):
                done = subprocess.run([*command, *gpu_flag], stdout=output, stderr=output)
                if done.returncode in INTERRUPTED:
                    interrupted.set()
                if done.returncode:
                    break
    finally:
        free_gpus.put(gpu)
    state = "finished" if run.read_rows() else "not finished"
    print(f"{state}: {run.folder}", flush=True)


def carry_out_all(runs: list[Run], jobs: int) -> None:
    """Carry out the runs, ``jobs`` at a time. Ctrl-C ends those under way and cancels the rest."""
    free_gpus = queue.Queue()
    for gpu in gpus_of_jobs(jobs, runs[0].training):  # all runs have the same flags
        free_gpus.put(gpu)
    interrupted = threading.Event()
    pool = ThreadPoolExecutor(jobs)
    futures = [pool.submit(carry_out, run, free_gpus, interrupted) for run in runs]
    try:
        for future in futures:
            future.result()
    finally:
        # The terminal sends Ctrl-C to the runs under way, too: this waits for their end.
        pool.shutdown(cancel_futures=True)
    if interrupted.is_set():
        raise KeyboardInterrupt


# ---- the comparison -----------------------------------------------------------------------------


def group_by_cell(rows: list[Row]) -> dict[str, dict[str, Row]]:
    """Return {cell: {replicate: row}} of the rows of one protocol and kind of features."""
    cells = {}
    for row in rows:
        cells.setdefault(row.cell, {})[row.replicate] = row
    return cells


def format_difference(cell: dict[str, Row], first: dict[str, Row], measure: str) -> str:
    """Return how far a cell is above the first one: mean difference and 95% t interval.

    Args:
        cell, first: {replicate: row}; the difference is taken within each replicate of both.
        measure: a name of `MEASURES`.

    Returns:
        Like "+3.00 [+0.52, +5.48]"; "" if both have fewer than two replicates in common.
    """
    differences = []
    for replicate, row in cell.items():
        if replicate in first:
            differences.append(row.percent[measure] - first[replicate].percent[measure])
    if len(differences) < 2:
        return ""
    mean, half_width = mean_and_interval(np.array(differences))
    return f"{mean:+.2f} [{mean - half_width:+.2f}, {mean + half_width:+.2f}]"


def format_mean(cell: dict[str, Row], measure: str) -> str:
    """Return the mean over the replicates and, of several, the standard deviation."""
    values = [row.percent[measure] for row in cell.values()]
    deviation = None
    if len(values) > 1:
        deviation = np.std(values, ddof=1)
    return format_percent(np.mean(values), deviation)


def table(rows: list[Row]) -> str:
    """Return a line for each cell: replicates, means, differences to the first."""
    head = f"{'n':>43}"
    for measure in COMPARED_MEASURES:
        head += f"{MEASURES[measure] + ', %':>16}{'minus first [95%]':>26}"
    lines = [head]
    cells = group_by_cell(rows)
    first = next(iter(cells.values()))
    for name, cell in cells.items():
        line = f"{name:40}{len(cell):3}"
        for measure in COMPARED_MEASURES:
            difference = ""
            if cell is not first:
                difference = format_difference(cell, first, measure)
            line += f"{format_mean(cell, measure):>16}{difference:>26}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def sorted_cells(rows: list[Row]) -> list[str]:
    """Return the names of the cells, by their values if these are numbers, else as they came."""
    cells = list(dict.fromkeys(row.cell for row in rows))
    try:
        return sorted(cells, key=numbers_in)
    except ValueError:
        return cells


def numbers_in(cell: str) -> list[float]:
    """Return [0.1, 0.01] of the cell "w_hc=0.1 lr=0.01". ValueError: a value is no number."""
    return [float(part.partition("=")[2]) for part in cell.split()]


@STYLE
def draw(rows: list[Row]) -> Figure:
    """Draw rank-1 and mAP of the cells under one protocol."""
    cells = sorted_cells(rows)
    width = max(4.5, 1.1 * len(cells))
    title = f"{rows[0].protocol} ({rows[0].data_name})"
    figure, axes = new_figure(1, len(COMPARED_MEASURES), (width, 3.8), title)
    for axis, measure in zip(axes.flat, COMPARED_MEASURES, strict=True):
        draw_measure(axis, rows, cells, measure)
    add_legend(figure, axes)
    return figure


def draw_measure(axis: Axes, rows: list[Row], cells: list[str], measure: str) -> None:
    """Draw a point for each replicate, and a line through the means, of each kind of features."""
    for kind in dict.fromkeys(row.features for row in rows):
        rows_of_kind = [row for row in rows if row.features == kind]
        means = []
        for cell in cells:
            replicates = [row.percent[measure] for row in rows_of_kind if row.cell == cell]
            means.append(np.mean(replicates))
        (line,) = axis.plot(means, label=f"{kind} features", marker="_", markersize=14)
        x = [cells.index(row.cell) for row in rows_of_kind]
        y = [row.percent[measure] for row in rows_of_kind]
        axis.scatter(x, y, color=line.get_color(), alpha=0.6)
    axis.set(title=f"{MEASURES[measure]}, %")
    axis.set_xticks(range(len(cells)), [cell.replace(" ", "\n") for cell in cells], fontsize=10)


def write_csv(path: str, rows: list[Row]) -> None:
    with (
        utils.atomic_write(path) as partial,
        open(partial, "w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["cell", "replicate", "protocol", "features", *MEASURES, "data"])
        for row in rows:
            percent = [row.percent[name] for name in MEASURES]
            writer.writerow(
                [row.cell, row.replicate, row.protocol, row.features, *percent, row.data_name]
            )


def compare(rows: list[Row], stem: str) -> None:
    """Print a table for each protocol and kind of features; write <stem>.csv and <stem>.png.

    The plot is of the first protocol alone.
    """
    first_protocol = [row for row in rows if row.protocol == rows[0].protocol]
    with utils.atomic_write(f"{stem}.png") as partial:
        save_figure(draw(first_protocol), partial, "png")
    write_csv(f"{stem}.csv", rows)
    for protocol, kind in dict.fromkeys((row.protocol, row.features) for row in rows):
        selected = [row for row in rows if row.protocol == protocol and row.features == kind]
        print(f"\n{protocol}, {kind}\n{table(selected)}")


# ---- the program --------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = utils.new_parser(__doc__)
    add = parser.add_argument
    out_help = "folder of the runs and tables"
    add("--out", type=utils.file_path, required=True, metavar="DIR", help=out_help)
    add(
        "--vary",
        type=parse_choices,
        action="append",
        default=[],
        metavar="FLAG=A,B,...",
        help="values to compare of a flag of train.py; may be repeated",
    )
    add(
        "--over",
        type=parse_choices,
        default="seed=1",
        metavar="FLAG=A,B,...",
        help="replicates: seeds, or RegDB's trials (%(default)s)",
    )
    test_help = "flags for test.py alone, like '--mode both'"
    add("--test", type=shlex.split, default=[], metavar="FLAGS", help=test_help)
    jobs_help = "runs at a time; 0 only compares (%(default)s)"
    add("--jobs", type=utils.non_negative_int, default=1, help=jobs_help)
    add("--dry-run", action="store_true", help="print the commands that are left, run nothing")
    flags_help = "flags of train.py for all runs, less folders and --resume"
    add("flags", nargs="*", metavar="-- FLAGS", help=flags_help)
    return parser


def print_commands(runs: list[Run]) -> None:
    """Print a line of shell for each run."""
    for run in runs:
        commands = [["cd", os.getcwd()], run.training, run.testing]
        print(" && ".join(shlex.join(command) for command in commands))


def main() -> None:
    args = utils.parse(build_parser())
    runs = plan_runs(args)
    unfinished = []
    if args.jobs > 0:
        unfinished = [run for run in runs if not run.read_rows()]
    if args.dry_run:
        print_commands(unfinished)
        return
    if unfinished:
        carry_out_all(unfinished, args.jobs)

    rows = []
    for run in runs:
        rows += run.read_rows()
    varied_flags = []
    for choices in args.vary:
        varied_flags += choices[0]
    if rows:
        compare(rows, os.path.join(args.out, "-".join(varied_flags) or "all"))
    failed = [str(run.folder / "output.txt") for run in unfinished if not run.read_rows()]
    if failed:
        raise utils.InputError(
            f"{len(failed)} of {len(runs)} runs failed: see {', '.join(failed)}; "
            "the same command resumes them"
        )


if __name__ == "__main__":
    utils.run(main, when_interrupted="interrupted; the same command resumes the sweep")
