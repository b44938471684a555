"""The measurements run, and print all of their rows, with ratios the right way round."""

import argparse
import itertools
import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

import train
import utils
from eval_metrics import eval_sysu
from loss import Criterion
from model import EmbedNet
from tools import benchmark

CPU = torch.device("cpu")
CUDA = torch.device("cuda")

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
    memory = "memory, ours memory, loop"
    assert words_of(head) == f"queries x gallery ours loop sort argsort {ratios} {memory}"
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


def test_the_stopwatch_counts_the_steps_after_the_warmup():
    stopwatch = benchmark.Stopwatch(warmup=2, steps=3, device=CPU)
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


def test_train_measures_the_stock_loop_and_ours(run):
    out = run("train", *SIZE, "--workers=0", "--warmup=0", "--arch=tiny")
    head, stock, ours = out.splitlines()
    columns = "images/s step data wait peak memory GPU busy"
    assert words_of(head) == f"{columns} ratio to its baseline"
    assert stock.startswith("stock PyTorch, the original's settings ")
    assert words_of(stock).endswith("GiB -")  # no GPU, no baseline
    assert ours.startswith("ours --precision tf32 ")
    assert ours.endswith("x stock PyTorch, the original's settings")


def known_results(speed: float, gpu_busy: float | None = None) -> dict[str, float | None]:
    return {
        "images/s": speed,
        "step ms": 10,
        "data wait ms": 1,
        "peak GiB": 2,
        "GPU busy": gpu_busy,
    }


def test_each_row_of_train_has_its_ratio_to_a_baseline_of_equal_settings(run, monkeypatch):
    rows = iter([(100, 0.5), (250, None), (500, 0.905)])

    def measure_in_processes(world_size, time_training, args, options):
        assert options.precision == "bf16"
        return known_results(*next(rows))

    monkeypatch.setattr(benchmark, "measure_in_processes", measure_in_processes)
    _, stock, ours, compiled = run("train", *SIZE, "--precision=bf16", "--compile").splitlines()
    results = "10.0 ms 1.0 ms 2.00 GiB"
    assert words_of(stock) == f"stock PyTorch, bf16 autocast 100.0 {results} 50%"
    ratio = "2.50x stock PyTorch, bf16 autocast"
    assert words_of(ours) == f"ours --precision bf16 250.0 {results} - {ratio}"
    ratio = "2.00x ours --precision bf16"
    assert words_of(compiled) == f"ours --precision bf16 --compile 500.0 {results} 90% {ratio}"


def flags_of_train(*flags: str) -> argparse.Namespace:
    options = train.parse_args(["--arch=tiny", "--workers=0", "--img_h=81", "--img_w=16", *flags])
    return benchmark.with_flags(options, pretrained="none", batch_size=16)


def test_a_row_and_the_one_before_it_differ_in_one_thing():
    """Ours from stock PyTorch in the loop, the others in a flag."""
    options = flags_of_train("--no-deterministic", "--compile")
    for precision in utils.PRECISIONS:
        stock, ours, fast, compiled = benchmark.training_rows(precision, options)
        assert stock.time_training is benchmark.time_stock
        for row in (ours, fast, compiled):
            assert row.time_training is benchmark.time_ours
        assert stock.options == ours.options
        assert ours.options.precision == precision
        assert ours.options.deterministic
        assert not ours.options.compile
        assert fast.options == benchmark.with_flags(ours.options, deterministic=False)
        assert compiled.options == benchmark.with_flags(fast.options, compile=True)


@pytest.mark.parametrize(
    ("has_gpu", "precision", "expected"),
    [
        # each of stock PyTorch and ours
        (True, None, ["tf32", "tf32", "fp32", "fp32", "bf16", "bf16"]),
        (True, "fp16", ["fp16", "fp16"]),
        (False, None, ["tf32", "tf32"]),
        (False, "bf16", ["bf16", "bf16"]),
    ],
)
def test_train_measures_the_precisions_that_the_machine_has(
    run, monkeypatch, has_gpu, precision, expected
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    measured = []

    def measure_in_processes(world_size, time_training, args, options):
        measured.append(options.precision)
        return known_results(1)

    monkeypatch.setattr(benchmark, "measure_in_processes", measure_in_processes)
    flags = [f"--precision={precision}"] if precision else []
    run("train", *SIZE, *flags)
    assert measured == expected


@pytest.mark.parametrize(
    ("precision", "has_tf32", "dtype"),
    [
        ("tf32", True, torch.float32),
        ("fp32", False, torch.float32),
        ("bf16", True, torch.bfloat16),
    ],
)
def test_the_stock_loop_has_the_originals_settings(
    pytorch_settings, monkeypatch, precision, has_tf32, dtype
):
    """Deterministic cuDNN, NCHW, and PyTorch's defaults but for the precision."""
    stock_loss = benchmark.stock_loss
    steps = []

    def watched_loss(logits, feats, labels, per_img):
        assert {stripe.dtype for stripe in logits} == {dtype}
        assert torch.backends.cudnn.deterministic
        assert not torch.backends.cudnn.benchmark
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.allow_tf32 == has_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
        steps.append(len(labels))
        return stock_loss(logits, feats, labels, per_img)

    def watched_forward(self, visible, thermal):
        assert visible.is_contiguous()
        assert thermal.is_contiguous()
        assert all(parameter.is_contiguous() for parameter in self.parameters())
        return forward(self, visible, thermal)

    forward = EmbedNet.forward
    monkeypatch.setattr(benchmark, "stock_loss", watched_loss)
    monkeypatch.setattr(EmbedNet, "forward", watched_forward)
    options = flags_of_train(f"--precision={precision}")
    benchmark.time_stock(options, CPU, benchmark.Stopwatch(1, 2, CPU))
    assert steps == [32, 32, 32]


def test_the_stock_loop_has_our_loss_and_our_groups_of_parameters():
    options = flags_of_train("--lr=0.008", "--w_hc=0.6")
    net = train.build_network(8, None, "", options)
    ours = train.build_optimizer(net, options)
    stock = benchmark.stock_optimizer(net)
    for group, our_group in zip(stock.param_groups, ours.param_groups, strict=True):
        assert group["lr"] == pytest.approx(our_group["lr"])
        assert list(map(id, group["params"])) == list(map(id, our_group["params"]))
        for name in ("momentum", "weight_decay", "nesterov", "dampening"):
            assert group[name] == our_group[name]

    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 8, 5, generator=rng)
    feats = torch.randn(6, 8, 3, generator=rng)
    labels = torch.tensor([4, 4, 1, 1])
    our_loss = Criterion(0.6)(logits, feats, labels, labels)["loss"].sum()
    stock_loss = benchmark.stock_loss(list(logits), list(feats), torch.cat([labels, labels]), 2)
    torch.testing.assert_close(stock_loss, our_loss)


@pytest.mark.parametrize(
    ("flag", "is_deterministic", "has_tf32"),
    [
        ("--precision=tf32", True, True),
        ("--precision=fp32", True, False),
        ("--no-deterministic", False, True),
    ],
)
def test_ours_is_measured_with_the_settings_of_its_flags(
    pytorch_settings, monkeypatch, flag, is_deterministic, has_tf32
):
    steps = []

    def train_epoch(net, criterion, optimizer, batches, epoch, args, scaler):
        assert torch.are_deterministic_algorithms_enabled() == is_deterministic
        assert torch.backends.cudnn.allow_tf32 == has_tf32
        steps.append(len(batches))

    monkeypatch.setattr(train, "train_epoch", train_epoch)
    stopwatch = benchmark.Stopwatch(warmup=1, steps=2, device=CPU, profiled_steps=3)
    benchmark.time_ours(flags_of_train(flag), CPU, stopwatch)
    assert steps == [6]


# ---- on a GPU: what can be shown without one ----------------------------------------------------


def test_the_images_of_a_gpu_are_as_many_as_those_of_sysu(monkeypatch):
    options = flags_of_train("--img_h=4", "--img_w=2")
    on_cpu = benchmark.random_images(3, CPU, options)
    assert len(on_cpu.visible) == len(on_cpu.thermal) == (3 + benchmark.BATCHES_AHEAD) * 16
    on_gpu = benchmark.random_images(3, CUDA, options)
    assert on_gpu.visible.shape == (22_258, 4, 2, 3)
    assert on_gpu.thermal.shape == (11_909, 4, 2, 3)
    assert on_gpu.n_class == 395
    monkeypatch.setattr(utils, "is_distributed", lambda: True)
    assert len(benchmark.random_images(3, CUDA, options).visible) == len(on_cpu.visible)
    assert len(on_gpu.visible_labels) == 22_258
    assert len(on_gpu.thermal_labels) == 11_909


def gpu_event(start: float, end: float, name: str = "kernel", **attributes) -> FunctionEvent:
    """What a profile tells of a kernel; times are in microseconds."""
    attributes = {"device_type": DeviceType.CUDA} | attributes
    return FunctionEvent(id=0, name=name, thread=0, start_us=start, end_us=end, **attributes)


def test_the_gpu_is_busy_while_a_kernel_runs_and_idle_between():
    events = [
        gpu_event(500, 600),
        gpu_event(0, 400),
        gpu_event(100, 200),  # on another stream
        gpu_event(300, 450),
        gpu_event(700, 800, "Memcpy HtoD (Pageable -> Device)"),
        gpu_event(800, 900, "Memset (Device)"),
        gpu_event(0, 1000, "step", is_user_annotation=True),
        gpu_event(0, 1000, "cudaLaunchKernel", device_type=DeviceType.CPU),
    ]
    assert benchmark.busy_seconds(events) == pytest.approx(550e-6)


def test_the_profile_comes_after_the_timed_steps(monkeypatch):
    calls = []

    class FakeProfile:
        def __init__(self, activities):
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def __enter__(self):
            calls.append("profile")
            return self

        def __exit__(self, *_):
            calls.append("end")

        def events(self):
            return [gpu_event(0, 1e6), gpu_event(2e6, 2.5e6)]

    monkeypatch.setattr(torch.profiler, "profile", FakeProfile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: calls.append("reset"))
    stopwatch = benchmark.Stopwatch(warmup=1, steps=2, device=CUDA, profiled_steps=2)
    for batch in stopwatch.watch(itertools.count()):
        calls.append(batch)
    assert calls == [0, "wait", "reset", 1, 2, "wait", "profile", 3, 4, "wait", "end"]
    assert stopwatch.gpu_seconds == 1.5


def test_the_gpus_share_of_a_step_is_that_of_a_timed_step(monkeypatch, tmp_path):
    """The profiler slows the program down, so its steps tell the GPU's time alone."""

    def time_training(options, device, stopwatch):
        assert stopwatch.profiled_steps == 5
        stopwatch.seconds = 1.0  # of 20 steps
        stopwatch.gpu_seconds = 0.1  # of 5 steps

    monkeypatch.setattr(utils, "select_device", lambda gpu: CUDA)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2 * benchmark.GIB)
    args = SimpleNamespace(warmup=3, steps=20)
    file = tmp_path / "results.json"
    benchmark.measure(0, 1, time_training, args, flags_of_train(), str(file))
    assert json.loads(file.read_text(encoding="utf-8")) == {
        "images/s": 640,
        "step ms": 50,
        "data wait ms": 0,
        "peak GiB": 2,
        "GPU busy": pytest.approx(0.4),
    }


# ---- several processes --------------------------------------------------------------------------


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
    def measure_in_processes(world_size, time_training, args, options):
        speeds = {(1, 32): 100, (1, 16): 80, (2, 32): 150, (2, 64): 180}
        return {"images/s": speeds[world_size, options.batch_size]}

    monkeypatch.setattr(benchmark, "measure_in_processes", measure_in_processes)
    out = run("scale", *SIZE, "--batch-size=32", "--processes=2")
    assert [words_of(line) for line in out.splitlines()[-4:]] == [
        "strong 1 64 100.0 1.00x 0%",
        "strong 2 64 150.0 1.50x 6%",  # alone, two ranks with half of the batch would make 160
        "weak 1 64 100.0 1.00x 0%",
        "weak 2 128 180.0 1.80x 10%",  # alone, two ranks with a batch each would make 200
    ]


def test_wrong_flags_are_errors(error_of):
    assert "--per-img" in error_of("-m tools.benchmark", "data", "--batch-size=7", "--per-img=2")
    assert "steps" in error_of("-m tools.benchmark", "data", "--steps=0")
