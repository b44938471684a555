"""The measurements run, and print all of their rows, with ratios the right way round."""

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


def words_of(line: str) -> str:
    """A line with single spaces."""
    return " ".join(line.split())


# ---- scoring ------------------------------------------------------------------------------------


def test_evaluate_measures_time_and_memory_of_each_size(run, monkeypatch):
    monkeypatch.setattr(benchmark, "SIZES", {"small": SMALL})
    monkeypatch.setattr(benchmark, "LARGE_SIZE", SMALL)
    head, row, _, large = run("evaluate").splitlines()
    ratios = "loop/ours ours/sort ours/argsort"
    assert words_of(head) == f"queries x gallery ours loop sort argsort {ratios} ours loop"
    assert words_of(row).startswith("small 30 x 20 ")
    assert row.count("MiB") == 2
    assert large.startswith("30 x 20, from 128-dimensional features")


def test_evaluate_says_how_much_faster_than_the_loop_it_is(monkeypatch):
    seconds = {
        benchmark.eval_sysu: 2,
        benchmark.loop_over_queries: 10,
        np.sort: 1,
        np.argsort: 0.5,
    }
    monkeypatch.setattr(benchmark, "fastest", lambda function, calls: seconds[function.func])
    row = words_of(benchmark.evaluate_row(SMALL))
    assert row.startswith("30 x 20 2.000 s 10.000 s 1.000 s 0.500 s 5.0x 2.0x 4.0x")


def test_the_loop_over_queries_gives_our_scores():
    """There are queries of camera 3, which ignore camera 2, and some without a match."""
    size = benchmark.RankingSize(queries=50, gallery=30, persons=40)
    labels = benchmark.labels_of(size)
    distmat = np.random.default_rng(1).random((50, 30))
    scores = eval_sysu(distmat, *labels)
    expected = benchmark.loop_over_queries(distmat, *labels)
    np.testing.assert_allclose((scores.cmc[0], scores.mAP), expected, atol=1e-12)


# ---- batches and training -----------------------------------------------------------------------


def test_data_measures_each_way_to_make_batches(run):
    rows = run("data", *SIZE, "--workers=0").splitlines()
    assert len(rows) == 3
    assert rows[0].startswith("image by image, 0 workers ")
    assert rows[1].startswith("ours, gathered on the host ")
    assert rows[2].startswith("ours, from the host to the network ")


def test_data_says_how_much_faster_than_image_by_image_it_is(run, monkeypatch):
    speeds = iter([100, 3000, 50])
    monkeypatch.setattr(benchmark, "speed_of_batches", lambda *_: next(speeds))
    rows = run("data", *SIZE, "--workers=0").splitlines()
    ends = [" ".join(row.split()[-3:]) for row in rows]
    assert ends == ["100 images/s 1.0x", "3,000 images/s 30.0x", "50 images/s 0.5x"]


def test_train_measures_the_stock_loop_and_ours(run):
    out = run("train", *SIZE, "--workers=0", "--warmup=0", "--arch=tiny")
    head, stock, ours = out.splitlines()
    assert words_of(head) == "images/s step ms data wait ms peak GiB to stock"
    assert stock.startswith("stock PyTorch, the original's loop ")
    assert stock.endswith(" 1.00x")
    assert ours.startswith("ours ")


def test_train_says_how_much_faster_than_the_stock_loop_ours_is(run, monkeypatch):
    def known_results(world_size, time_training, args, options):
        speeds = {benchmark.time_stock: 100, benchmark.time_ours: 250}
        return {"images/s": speeds[time_training], "step ms": 10}

    monkeypatch.setattr(benchmark, "measure_in_processes", known_results)
    _, stock, ours = run("train", *SIZE).splitlines()
    assert stock.split()[-3:] == ["100.00", "10.00", "1.00x"]
    assert ours.split()[-3:] == ["250.00", "10.00", "2.50x"]


def test_scale_measures_one_process_and_two(run):
    out = run("scale", *SIZE, "--workers=0", "--warmup=0", "--arch=tiny", "--batch-size=32")
    assert out.startswith("no GPU")
    rows = [line.split()[:3] for line in out.splitlines() if line.startswith(("strong", "weak"))]
    assert rows == [
        ["strong", "1", "64"],
        ["strong", "2", "64"],
        ["weak", "1", "64"],
        ["weak", "2", "128"],
    ]


def test_scale_compares_with_one_process_and_with_a_rank_alone(run, monkeypatch):
    def known_results(world_size, time_training, args, options):
        speeds = {(1, 32): 100, (1, 16): 80, (2, 32): 150, (2, 64): 180}
        return {"images/s": speeds[world_size, options.batch_size]}

    monkeypatch.setattr(benchmark, "measure_in_processes", known_results)
    out = run("scale", *SIZE, "--batch-size=32", "--processes=2")
    assert [words_of(line) for line in out.splitlines()[-4:]] == [
        "strong 1 64 100.0 1.00x 0%",
        "strong 2 64 150.0 1.50x 6%",  # alone, two ranks with half of the batch would make 160
        "weak 1 64 100.0 1.00x 0%",
        "weak 2 128 180.0 1.80x 10%",  # alone, two ranks with a batch each would make 200
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

    monkeypatch.setattr(benchmark, "time_stock", time_stock)
    run("train", *SIZE, "--workers=0", "--warmup=0", "--arch=tiny", f"--precision={precision}")
    assert precisions == [precision]
