"""The measurements run, and print all of their rows. What they measure is for their reader."""

from functools import partial

import numpy as np
import pytest
import torch

import utils
from eval_metrics import eval_sysu
from tools import benchmark

SIZE = ["--batch-size=16", "--img_h=81", "--img_w=16", "--steps=1"]
SMALL = benchmark.RankingSize(queries=30, gallery=20, persons=5)


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run a command of the tool in this process; gives what it printed."""

    def run_command(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["benchmark.py", *words])
        benchmark.main()
        return capsys.readouterr().out

    # Forked processes have the tiny backbone, and need not import torch.
    fork = partial(torch.multiprocessing.start_processes, start_method="fork")
    monkeypatch.setattr(torch.multiprocessing, "spawn", fork)
    monkeypatch.chdir(tmp_path)
    return run_command


def test_evaluate(run, monkeypatch):
    monkeypatch.setattr(benchmark, "SIZES", {"small": SMALL})
    monkeypatch.setattr(benchmark, "LARGE_SIZE", SMALL)
    head, row, _, large = run("evaluate").splitlines()
    assert "loop/ours" in head
    assert "ours/sort" in head
    assert "ours/argsort" in head
    assert row.startswith("small")
    assert row.count("MiB") == 2
    assert large.startswith("30 x 20, from 128-dimensional features")


def test_the_loop_over_queries_gives_our_scores():
    """There are queries of camera 3, which ignore camera 2, and some without a match."""
    size = benchmark.RankingSize(queries=50, gallery=30, persons=40)
    labels = benchmark.labels_of(size)
    distmat = np.random.default_rng(1).random((50, 30))
    scores = eval_sysu(distmat, *labels)
    expected = benchmark.loop_over_queries(distmat, *labels)
    np.testing.assert_allclose((scores.cmc[0], scores.mAP), expected, atol=1e-12)


def test_data(run):
    out = run("data", *SIZE, "--workers=0")
    assert "image by image, 0 workers" in out
    assert "ours, gathered on the host" in out
    assert "ours, from the host to the network" in out
    assert out.count("images/s") == 3


def test_train(run):
    out = run("train", *SIZE, "--workers=0", "--warmup=0", "--arch=tiny")
    head, stock, ours = out.splitlines()
    assert " ".join(head.split()) == "images/s step ms data wait ms peak GiB to first"
    assert stock.startswith(benchmark.STOCK)
    assert stock.endswith(" 1.00x")
    assert ours.startswith(f"{benchmark.OURS} ")


def test_scale(run):
    out = run("scale", *SIZE, "--workers=0", "--warmup=0", "--arch=tiny", "--batch-size=32")
    assert out.startswith("no GPU")
    rows = [line.split()[:3] for line in out.splitlines() if line.startswith(("strong", "weak"))]
    assert rows == [
        ["strong", "1", "64"],
        ["strong", "2", "64"],
        ["weak", "1", "64"],
        ["weak", "2", "128"],
    ]


def test_the_stopwatch_counts_the_steps_after_the_warmup():
    device = torch.device("cpu")
    stopwatch = benchmark.Stopwatch(warmup=2, steps=3, device=device)
    clock = [0.0]

    def batches():
        for number in range(100):
            clock[0] += 10 if number < 2 else 1  # to make a batch
            yield number

    def work():
        clock[0] += 5

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark.time, "perf_counter", lambda: clock[0])
        seen = []
        for number in stopwatch.watch(batches()):
            seen.append(number)
            work()
    assert seen == [0, 1, 2, 3, 4]
    assert stopwatch.waited == 3
    assert stopwatch.seconds == 3 * (1 + 5)


def test_wrong_flags_are_errors(error_of):
    assert "--per-img" in error_of("-m tools.benchmark", "data", "--batch-size=7", "--per-img=2")
    assert "steps" in error_of("-m tools.benchmark", "data", "--steps=0")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_flags_are_for_our_row_alone(run, monkeypatch, precision):
    """Both rows are measured in this process, which sees what each of them sets."""
    precisions = []
    monkeypatch.setattr(utils, "set_precision", lambda name, device: precisions.append(name))
    monkeypatch.setattr(
        torch.multiprocessing,
        "spawn",
        lambda function, arguments, n_processes: function(0, *arguments),
    )
    stock_time = benchmark.time_stock

    def time_stock(*arguments):
        stock_time(*arguments)
        assert precisions == []

    monkeypatch.setitem(benchmark.METHODS, benchmark.STOCK, time_stock)
    run("train", *SIZE, "--workers=0", "--warmup=0", "--arch=tiny", f"--precision={precision}")
    assert precisions == [precision]
