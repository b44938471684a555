"""Sweeps: the statistics, the grid and its commands, the GPUs, and how one is resumed."""

import json
import signal
import threading
from collections import Counter, defaultdict
from pathlib import Path
from subprocess import CompletedProcess
from typing import TextIO

import pytest
import torch
from conftest import ROOT, TINY, files_of, result

import utils
from tools import sweep

# They stand in for train.py and test.py, and use the tiny backbone. A training with --lr=0.03
# fails; with --lr=0.02 it is killed, once, when there is a checkpoint to resume.
FAKE_TRAIN = f"""
import os, runpy, signal, sys
from pathlib import Path

sys.path.insert(0, {str(ROOT)!r})
import train

if "--lr=0.03" in sys.argv:
    sys.exit("this training fails")
(folder,) = [Path(word.partition("=")[2]) for word in sys.argv if word.startswith("--model-path=")]
was_killed = folder / "was_killed"
train_step = train.train_step

def killed_step(*args):
    if list(folder.glob("*_last.t")) and not was_killed.exists():
        was_killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(*args)

if "--lr=0.02" in sys.argv:
    train.train_step = killed_step
sys.argv.insert(1, "train.py")
runpy.run_path({str(ROOT / "tests/distributed_helpers.py")!r}, run_name="__main__")
"""
FAKE_TEST = f"""
import runpy, sys

sys.argv.insert(1, "test.py")
runpy.run_path({str(ROOT / "tests/distributed_helpers.py")!r}, run_name="__main__")
"""
# Ctrl-C reaches the sweep and the training at the same time.
INTERRUPTED_TRAIN = """
import os, signal, sys

os.kill(os.getppid(), signal.SIGINT)
sys.exit(130)
"""


def plan(out: Path, vary: str, over: str, flags: list[str]) -> list[sweep.Run]:
    """The runs of a sweep with these flags."""
    words = [f"--out={out}", f"--vary={vary}", f"--over={over}", "--", *flags]
    return sweep.plan_runs(utils.parse(sweep.build_parser(), words))


def write_result(run: sweep.Run, percent: float) -> None:
    """A result of test.py with this rank-1, and the rest of 100% as mAP."""
    content = json.loads(result(networks=[{"synthetic": True}]))
    content["results"][0]["mean"] |= {"rank1": percent / 100, "mAP": 1 - percent / 100}
    file = run.folder / run.result_pattern.replace("*", "v2t")
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(content))


def start_sweep(monkeypatch, *words) -> int:
    """Run the tool in this process; its exit status."""
    monkeypatch.setattr("sys.argv", ["sweep.py", *map(str, words)])
    try:
        utils.run(sweep.main)
    except SystemExit as stop:
        return stop.code
    return 0


def test_statistics(output_of, tmp_path):
    """By hand: the differences 3, 2, 4 have deviation 1, and t(0.975, 2) is 4.3027.

    The differences -2, -1 have t(0.975, 1) = 12.706.
    """
    vary = "w_hc=0,1,2,3"
    over = "seed=1,2,3"
    runs = plan(tmp_path, vary, over, ["--dataset=regdb"])
    rank1 = [50, 52, 54, 53, 54, 58, None, 50, 53, 40, None, None]
    for run, percent in zip(runs, rank1, strict=True):
        if percent is not None:
            write_result(run, percent)
    words = [f"--out={tmp_path}", f"--vary={vary}", f"--over={over}", "--jobs=0"]
    out = output_of("-m tools.sweep", *words, "--", "--dataset=regdb")
    assert " ".join(out.split()).startswith("v2t, fc n rank-1, % minus first [95%] mAP, % minus")
    lines = [" ".join(line.split()) for line in out.splitlines() if line.startswith("w_hc")]
    assert lines == [
        "w_hc=0 3 52.00 ± 2.00 48.00 ± 2.00",
        "w_hc=1 3 55.00 ± 2.65 +3.00 [+0.52, +5.48] 45.00 ± 2.65 -3.00 [-5.48, -0.52]",
        "w_hc=2 2 51.50 ± 2.12 -1.50 [-7.85, +4.85] 48.50 ± 2.12 +1.50 [-4.85, +7.85]",
        "w_hc=3 1 40.00 60.00",
    ]
    table = (tmp_path / "w_hc.csv").read_text().splitlines()
    header = "cell,replicate,protocol,features,rank1,rank5,rank10,rank20,mAP,mINP,data"
    assert table[0] == header
    assert "w_hc=2,seed=3,v2t,fc,53.0,50.0,50.0,50.0,47.0,50.0" in "\n".join(table)
    assert (tmp_path / "w_hc.png").exists()


def test_the_figure_shows_means_and_replicates_in_the_order_of_the_values(tmp_path):
    runs = plan(tmp_path, "w_hc=1,0,10,2", "seed=1,2", ["--dataset=regdb"])
    rank1 = [50, 52, 54, 53, 40, None, 60, 70]
    rows = []
    for run, percent in zip(runs, rank1, strict=True):
        if percent is not None:
            write_result(run, percent)
            rows += run.read_rows()
    figure = sweep.draw(rows)
    assert "synthetic, RegDB layout" in figure.get_suptitle()
    axis = figure.axes[1]  # of mAP
    labels = [label.get_text() for label in axis.get_xticklabels()]
    assert labels == ["w_hc=0", "w_hc=1", "w_hc=2", "w_hc=10"]
    assert list(axis.lines[0].get_ydata()) == pytest.approx([46.5, 49, 35, 60])
    assert len(axis.collections[0].get_offsets()) == 7


def test_a_dry_run_prints_whole_commands(output_of, tmp_path):
    words = [f"--out={tmp_path}", "--dry-run", "--jobs=999", "--over=trial=2,3"]
    words += ["--vary=dist-type:thd=l2:0,l1:17", "--test=--flip"]
    out = output_of("-m tools.sweep", *words, "--", "--dataset=regdb", "--gpu=1")
    assert list(tmp_path.iterdir()) == []
    change, training, test = (command.split() for command in out.splitlines()[3].split(" && "))
    assert change[0] == "cd"
    assert training[:2] == ["env", "OMP_NUM_THREADS=1"]
    assert test[:2] == ["env", "OMP_NUM_THREADS=1"]

    run = plan(tmp_path, "dist-type:thd=l1:17", "trial=3", ["--dataset=regdb", "--gpu=1"])[0]
    assert f"--model-path={run.folder}" in training
    assert {"--dataset=regdb", "--gpu=1", "--trial=3", "--resume=last"} <= set(training)
    assert {"--dist-type=l1", "--thd=17"} <= set(training)
    name = run.folder.name.removesuffix("_epochs80")
    assert name.startswith("regdb_id_resnet50_lr0.0098_whc0.58_trial3_")
    assert "_disttypel1" in name
    assert "_thd17.0" in name
    assert f"--resume={run.folder}/{name}_last.t" in test
    assert {"--dataset=regdb", "--gpu=1", "--trial=3", "--flip"} <= set(test)
    assert "--dist-type=l1" not in test


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--vary=w_hc"], "--vary"),
        (["--vary=w_hc="], "--vary"),
        (["--vary=w_hc:lr=1:2,3"], "--vary"),
        (["--vary=w_hc=x"], "--w-hc"),
        (["--jobs=-1"], "--jobs"),
    ],
)
def test_wrong_flags_are_errors(error_of, tmp_path, words, message):
    assert message in error_of("-m tools.sweep", f"--out={tmp_path}", "--dry-run", *words)


@pytest.fixture
def commands(monkeypatch) -> list[list[str]]:
    """Collects the commands of a sweep, which are not run."""
    collected = []

    def run(command: list[str], **options) -> CompletedProcess:
        collected.append(command)
        return CompletedProcess(command, 0)

    monkeypatch.setattr(sweep.subprocess, "run", run)
    return collected


def gpu_flags(command: list[str]) -> list[str]:
    return [word for word in command if word.startswith("--gpu")]


@pytest.mark.parametrize(("n_gpus", "jobs"), [(2, 2), (2, 4), (4, 2), (3, 1)])
def test_runs_are_spread_over_the_gpus(tmp_path, monkeypatch, n_gpus, jobs):
    """``jobs`` commands run at a time, equally many on each GPU, both of a run on the same one."""
    running = Counter()
    counts_at_a_time = []
    gpus_of_run = defaultdict(set)
    lock = threading.Lock()

    def count_running() -> None:
        counts_at_a_time.append(dict(running))
        running.clear()

    barrier = threading.Barrier(jobs, count_running)

    def run(command: list[str], stdout: TextIO, **options) -> CompletedProcess:
        (gpu,) = gpu_flags(command)
        with lock:
            running[gpu] += 1
            gpus_of_run[stdout.name].add(gpu)
        barrier.wait(timeout=60)  # for the other jobs
        return CompletedProcess(command, 0)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    monkeypatch.setattr(sweep.subprocess, "run", run)
    runs = plan(tmp_path, "lr=0.1,0.2", "seed=1,2", [])
    sweep.carry_out_all(runs, jobs)
    assert len(gpus_of_run) == len(runs)
    assert all(len(gpus) == 1 for gpus in gpus_of_run.values())
    n_used = min(n_gpus, jobs)
    n_commands = 2 * len(runs)
    expected = {f"--gpu={gpu}": jobs // n_used for gpu in range(n_used)}
    assert counts_at_a_time == [expected] * (n_commands // jobs)


@pytest.mark.parametrize(("n_gpus", "flags"), [(0, []), (1, []), (2, ["--gpu=0"])])
def test_the_gpu_is_left_to_the_user_or_to_the_default(
    tmp_path, monkeypatch, commands, n_gpus, flags
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    sweep.carry_out_all(plan(tmp_path, "lr=0.1,0.2", "seed=1", flags), jobs=2)
    trainings = [command for command in commands if str(ROOT / "train.py") in command]
    assert len(trainings) == 2
    assert all(gpu_flags(command) == flags for command in trainings)
    tests = [command for command in commands if str(ROOT / "test.py") in command]
    assert len(tests) == 2
    assert all(gpu_flags(command) == [] for command in tests)  # 0 is the default of test.py, too


def test_the_same_command_resumes_what_was_killed(sysu_tree, tmp_path, monkeypatch, capsys):
    (tmp_path / "train.py").write_text(FAKE_TRAIN)
    (tmp_path / "test.py").write_text(FAKE_TEST)
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    vary = "lr=0.01,0.02,0.03"
    flags = [*TINY, f"--data-path={sysu_tree}", "--batch-size=4", "--per-img=1", "--epochs=1"]
    finished, killed, failing = plan(tmp_path, vary, "seed=1", flags)
    write_result(finished, 50)
    before = files_of(finished.folder)
    words = [f"--out={tmp_path}", f"--vary={vary}"]

    assert start_sweep(monkeypatch, *words, "--jobs=1", "--", *flags) == 2
    assert not killed.read_rows()
    assert list(killed.folder.glob("*_last.t"))
    error = capsys.readouterr().err
    assert "2 of 3 runs failed" in error
    assert str(killed.folder / "output.txt") in error
    assert str(failing.folder / "output.txt") in error

    assert start_sweep(monkeypatch, *words, "--jobs=2", "--", *flags) == 2
    assert killed.read_rows()
    assert "resumed" in (killed.folder / "output.txt").read_text()
    (metrics,) = killed.folder.glob("*/metrics.jsonl")
    epochs = [json.loads(line)["epoch"] for line in metrics.read_text().splitlines()]
    assert epochs == [0, 1]
    printed = capsys.readouterr()
    assert "1 of 3 runs failed" in printed.err
    assert str(killed.folder) not in printed.err
    assert f"{failing.folder}/output.txt" in printed.err
    assert "this training fails" in (failing.folder / "output.txt").read_text()
    assert f"not finished: {failing.folder}" in printed.out
    assert files_of(finished.folder) == before


def test_ctrl_c_ends_the_sweep(tmp_path, monkeypatch, capsys, request):
    # A shell lets the programs that it starts in the background ignore Ctrl-C.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, handler))
    (tmp_path / "train.py").write_text(INTERRUPTED_TRAIN)
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    first, second, third = plan(tmp_path, "lr=0.01,0.02,0.03", "seed=1", [])
    words = [f"--out={tmp_path}", "--vary=lr=0.01,0.02,0.03"]
    assert start_sweep(monkeypatch, *words) == 130
    assert len(capsys.readouterr().err.splitlines()) == 2  # an empty one ends that of the terminal
    assert (first.folder / "output.txt").exists()
    assert not second.folder.exists()
    assert not third.folder.exists()


@pytest.mark.parametrize("status", [130, -signal.SIGINT])
def test_no_run_begins_after_one_that_ctrl_c_ended(tmp_path, monkeypatch, status):
    """Even if the run's end comes first, and the sweep's own interrupt later."""
    commands = []

    def run(command: list[str], **options) -> CompletedProcess:
        commands.append(command)
        return CompletedProcess(command, status)

    monkeypatch.setattr(sweep.subprocess, "run", run)
    with pytest.raises(KeyboardInterrupt):
        sweep.carry_out_all(plan(tmp_path, "lr=0.01,0.02,0.03", "seed=1", []), jobs=1)
    assert len(commands) == 1
