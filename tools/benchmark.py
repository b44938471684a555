"""Measure speed and memory on this machine.

    python -m tools.benchmark evaluate
        scoring at the datasets' sizes, beside a loop over the queries and bare sorts
    python -m tools.benchmark data
        batches of training images, beside an image at a time through torchvision
    python -m tools.benchmark train
        training steps, beside the original's loop in stock PyTorch
    python -m tools.benchmark scale
        distributed training steps on 1, 2, 4, ... processes, one for each GPU

Flags of train.py hold here, too, like --arch or --batch-size. Ratios are taken within one run: they
mean more than the seconds.

`train` compares equal settings: each of our rows with stock PyTorch at the same precision, a row
with --no-deterministic or --compile with the row without it. Stock PyTorch always has the published
loss and optimizer, and is, if anything, faster than the original. Its columns:

    data wait      until there is a batch; ours is then on the device and normalised
    peak memory    of PyTorch's tensors on a GPU, with the training images that are kept there; of
                   the process on a CPU
    GPU busy       the share of a step in which the GPU computes; where it is small, the processor
                   is the limit
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
import timeit
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

# `python tools/benchmark.py` would search for modules in tools/ alone.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
import utils
from data_loader import IMAGENET_MEAN, IMAGENET_STD, IdentitySampler, TrainBatches, TrainingSet
from data_manager import DATASETS
from eval_metrics import Distances, eval_sysu
from loss import Criterion
from model import EmbedNet, to_device

N_CLASS, N_VISIBLE, N_THERMAL = DATASETS["sysu"].counts["train"]
# A DataLoader prefetches two batches for each worker; there are at most 8 by default. `data`
# skips as many before the clock starts. An epoch is longer by as many, so that it never runs dry.
BATCHES_AHEAD = 16
PROFILED_STEPS = 5  # on a GPU, after the clock has stopped: the profiler slows the program down
MIB = 2**20
GIB = 2**30


# ---- scoring ------------------------------------------------------------------------------------


class RankingSize(NamedTuple):
    queries: int
    gallery: int
    persons: int


SIZES = {
    "SYSU-MM01 single-shot": RankingSize(queries=3803, gallery=301, persons=96),
    "SYSU-MM01 multi-shot": RankingSize(queries=3803, gallery=3010, persons=96),
    "RegDB": RankingSize(queries=2060, gallery=2060, persons=206),
}
LARGE_SIZE = RankingSize(queries=5_000, gallery=50_000, persons=1_000)


def labels_of(size: RankingSize) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return (Q,) and (G,) random person ids, then camera numbers, as `eval_sysu` takes them."""
    rng = np.random.default_rng(0)
    q_pids = rng.integers(0, size.persons, size.queries)
    g_pids = np.sort(np.arange(size.gallery) % size.persons)
    q_camids = rng.choice([3, 6], size.queries)
    g_camids = rng.choice([1, 2, 4, 5], size.gallery)
    return q_pids, g_pids, q_camids, g_camids


def loop_over_queries(
    distmat: np.ndarray,
    q_pids: np.ndarray,
    g_pids: np.ndarray,
    q_camids: np.ndarray,
    g_camids: np.ndarray,
) -> tuple[float, float]:
    """Return rank-1 and mAP as the field's codes compute them: query by query, with lists."""
    order = np.argsort(distmat, axis=1)
    ranked_pids = g_pids[order]
    matches = (ranked_pids == q_pids[:, None]).astype(np.int32)
    cmc_curves = []
    average_precisions = []
    for query, ranking in enumerate(order):
        is_junk = (q_camids[query] == 3) & (g_camids[ranking] == 2)
        query_matches = matches[query][~is_junk]
        if not query_matches.any():
            continue
        pids = ranked_pids[query][~is_junk]
        _, first_seen = np.unique(pids, return_index=True)
        persons = np.array([pids[position] for position in sorted(first_seen)])
        cmc_curves.append((persons == q_pids[query]).cumsum()[:20])
        matches_so_far = query_matches.cumsum()
        precision = np.array([n / (position + 1.0) for position, n in enumerate(matches_so_far)])
        average_precisions.append((precision * query_matches).sum() / query_matches.sum())
    rank1 = np.mean([curve[0] for curve in cmc_curves])
    return rank1, np.mean(average_precisions)


def fastest(function: Callable[[], object], calls: int) -> float:
    """Return the seconds of the fastest of some calls."""
    return min(timeit.repeat(function, number=1, repeat=calls))


def peak_memory(function: Callable[[], object]) -> float:
    """Return the most memory that a call holds at once, in MiB."""
    tracemalloc.start()
    function()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak / MIB


def benchmark_evaluate(args: argparse.Namespace, options: argparse.Namespace) -> None:
    """Print a line for each size: seconds, ratios of them, and peak memory; then a large case."""
    columns = ["ours", "loop", "sort", "argsort", "loop/ours", "ours/sort", "ours/argsort"]
    columns += ["memory, ours", "memory, loop"]
    heads = "".join(f"{column:>13s}" for column in columns)
    print(f"{'':24s}{'queries x gallery':>18s}{heads}")
    for name, size in SIZES.items():
        print(f"{name:24s}{evaluate_row(size)}", flush=True)
    print(f"\n{evaluate_large()}")


def evaluate_row(size: RankingSize) -> str:
    """Time and memory of scoring float32 distances of this size, as a line of the table."""
    rng = np.random.default_rng(0)
    distmat = rng.standard_normal((size.queries, size.gallery), dtype=np.float32)
    labels = labels_of(size)
    score_ours = partial(eval_sysu, distmat, *labels)
    score_in_loop = partial(loop_over_queries, distmat, *labels)
    scores = score_ours()
    np.testing.assert_allclose((scores.cmc[0], scores.mAP), score_in_loop(), atol=1e-9)

    ours = fastest(score_ours, calls=3)
    loop = fastest(score_in_loop, calls=3)
    sort = fastest(partial(np.sort, distmat, axis=1), calls=3)
    argsort = fastest(partial(np.argsort, distmat, axis=1), calls=3)
    size_text = f"{size.queries:,} x {size.gallery:,}"
    row = f"{size_text:>18s}"
    row += "".join(f"{seconds:11.3f} s" for seconds in (ours, loop, sort, argsort))
    row += "".join(f"{ratio:12.1f}x" for ratio in (loop / ours, ours / sort, ours / argsort))
    row += "".join(f"{peak_memory(call):9.0f} MiB" for call in (score_ours, score_in_loop))
    return row


def evaluate_large() -> str:
    """Time and memory of scoring more distances than one would hold at once, as a sentence."""
    size = LARGE_SIZE
    rng = np.random.default_rng(0)
    query = rng.standard_normal((size.queries, 128), dtype=np.float32)
    gallery = rng.standard_normal((size.gallery, 128), dtype=np.float32)
    labels = labels_of(size)
    score = partial(eval_sysu, Distances(query, gallery), *labels)
    seconds = fastest(score, calls=1)
    peak = peak_memory(score)
    all_distances = size.queries * size.gallery * 4 / MIB
    return (
        f"{size.queries:,} x {size.gallery:,}, from 128-dimensional features: {seconds:.1f} s, "
        f"{peak:.0f} MiB beyond them; all distances at once would be {all_distances:.0f} MiB"
    )


# ---- the stopwatch ------------------------------------------------------------------------------


class Stopwatch:
    """Times what a loop does with its batches, from the end of its warm-up on.

    Args:
        warmup: batches before the clock starts.
        steps: batches after that.
        device: what the loop computes on.
        profiled_steps: batches after those, on a GPU alone.

    Attributes, valid when the loop is over:
        seconds: the time of the ``steps``.
        waited: the part of it in which the loop waited for its next batch.
        gpu_seconds: the time in which the GPU was busy, in the ``profiled_steps``.
    """

    def __init__(self, warmup: int, steps: int, device: torch.device, profiled_steps: int = 0):
        self.warmup = warmup
        self.steps = steps
        self.device = device
        self.profiled_steps = profiled_steps
        self.seconds = 0.0
        self.waited = 0.0
        self.gpu_seconds = 0.0

    @property
    def batches_used(self) -> int:
        return self.warmup + self.steps + self.profiled_steps

    def watch(self, batches: Iterable) -> Iterator:
        """Yield the first `batches_used` batches."""
        batches = iter(batches)
        for _ in range(self.warmup):
            yield next(batches)
        self.synchronize()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        for _ in range(self.steps):
            asked = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - asked
            yield batch
        self.synchronize()
        self.seconds = time.perf_counter() - start
        if self.profiled_steps:
            yield from self.profile(batches)

    def profile(self, batches: Iterator) -> Iterator:
        """Yield the ``profiled_steps`` batches, and measure how long the GPU is busy with them."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            for _ in range(self.profiled_steps):
                yield next(batches)
            self.synchronize()
        self.gpu_seconds = busy_seconds(profiler.events())

    def synchronize(self) -> None:
        """Wait until the device has done what it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def busy_seconds(events: Iterable[FunctionEvent]) -> float:
    """Return the time in which at least one kernel ran on the GPU; copies do not count."""
    intervals = [
        (event.time_range.start, event.time_range.end) for event in events if is_kernel(event)
    ]
    microseconds = 0.0
    last_end = 0.0
    for start, end in sorted(intervals):
        microseconds += max(0.0, end - max(start, last_end))
        last_end = max(last_end, end)
    return microseconds / 1e6


def is_kernel(event: FunctionEvent) -> bool:
    """Return whether an event of a profile is a computation on the GPU."""
    # An annotation spans what it names, and the gaps between.
    if event.device_type != DeviceType.CUDA or event.is_user_annotation:
        return False
    return not event.name.startswith(("Memcpy", "Memset"))


class WatchedBatches:
    """One short epoch of `TrainBatches` that a stopwatch watches, for `train.train_epoch`."""

    def __init__(self, batches: TrainBatches, stopwatch: Stopwatch):
        self.batches = batches
        self.stopwatch = stopwatch

    def __len__(self) -> int:
        return self.stopwatch.batches_used

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, ...]]:
        return self.stopwatch.watch(self.batches.epoch(epoch))


# ---- batches ------------------------------------------------------------------------------------


def random_images(
    batches_used: int, device: torch.device, options: argparse.Namespace
) -> TrainingSet:
    """Make noise images, enough for an epoch of ``batches_used + BATCHES_AHEAD`` steps.

    One process alone on a GPU gets at least as many as SYSU-MM01 has: they are part of its memory.
    """
    n_visible = (batches_used + BATCHES_AHEAD) * options.batch_size
    n_thermal = n_visible
    if device.type == "cuda" and not utils.is_distributed():
        n_visible = max(n_visible, N_VISIBLE)
        n_thermal = max(n_thermal, N_THERMAL)
    n_persons = min(N_CLASS, n_visible // options.per_img, n_thermal // options.per_img)
    rng = np.random.default_rng(0)
    image_shape = (options.img_h, options.img_w, 3)
    return TrainingSet(
        visible=rng.integers(0, 256, (n_visible, *image_shape), dtype=np.uint8),
        thermal=rng.integers(0, 256, (n_thermal, *image_shape), dtype=np.uint8),
        visible_labels=np.arange(n_visible) % n_persons,
        thermal_labels=np.arange(n_thermal) % n_persons,
    )


def with_flags(options: argparse.Namespace, **changes) -> argparse.Namespace:
    """Copy the flags of train.py, of which some are changed."""
    return argparse.Namespace(**(vars(options) | changes))


class ImageByImage(Dataset):
    """Pairs of images as the original code makes them: one by one, through torchvision.

    An item is (visible image, thermal image, visible label, thermal label).
    """

    def __init__(self, train_set: TrainingSet, sampler: IdentitySampler):
        self.train_set = train_set
        visible_plan, thermal_plan = sampler.epoch(0)
        self.visible_indices = visible_plan.ravel()
        self.thermal_indices = thermal_plan.ravel()
        self.transform = transforms.Compose(
            [
                transforms.ToPILImage(),
                transforms.RandomCrop(train_set.visible.shape[1:3]),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.visible_indices)

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor, int, int]:
        visible = self.visible_indices[item]
        thermal = self.thermal_indices[item]
        return (
            self.transform(self.train_set.visible[visible]),
            self.transform(self.train_set.thermal[thermal]),
            self.train_set.visible_labels[visible],
            self.train_set.thermal_labels[thermal],
        )


def stock_loader(train_set: TrainingSet, options: argparse.Namespace) -> DataLoader:
    """Make a DataLoader of batches (visible, thermal, visible_labels, thermal_labels)."""
    sampler = IdentitySampler(
        train_set.visible_labels, train_set.thermal_labels, options.batch_size, options.per_img
    )
    # Other ways to start its workers would send all images to each of them first.
    context = "fork" if options.workers > 0 else None
    return DataLoader(
        ImageByImage(train_set, sampler),
        options.batch_size,
        num_workers=options.workers,
        multiprocessing_context=context,
    )


def benchmark_data(args: argparse.Namespace, options: argparse.Namespace) -> None:
    """Print images per second of each way to make batches, and the ratio to the stock one."""
    device = utils.select_device(options.gpu)
    train_set = random_images(BATCHES_AHEAD + args.steps, device, options)
    loader = stock_loader(train_set, options)
    stock_speed = speed_of_batches(loader, args.steps, device, options)
    name = f"image by image, {options.workers} workers"
    print(data_row(name, stock_speed, stock_speed), flush=True)
    caches = ["host"]
    if device.type == "cuda":
        caches.append("device")
    for cache in caches:
        batches = train.build_batches(train_set, device, with_flags(options, cache=cache))
        visible_plan, thermal_plan = batches.sampler.epoch(0)
        images = batches.images_of_steps(visible_plan, thermal_plan)
        gather_speed = speed_of_batches(images, args.steps, device, options)
        print(data_row(f"ours, gathered on the {cache}", gather_speed, stock_speed), flush=True)
        input_speed = speed_of_batches(batches.epoch(0), args.steps, device, options)
        name = f"ours, from the {cache} to the network"
        print(data_row(name, input_speed, stock_speed), flush=True)


def data_row(name: str, speed: float, stock_speed: float) -> str:
    return f"{name:36s}{speed:10,.0f} images/s{speed / stock_speed:8.1f}x"


def speed_of_batches(
    batches: Iterable, steps: int, device: torch.device, options: argparse.Namespace
) -> float:
    """Return images per second of both modalities, when only their batches are made."""
    stopwatch = Stopwatch(BATCHES_AHEAD, steps, device)
    for _ in stopwatch.watch(batches):
        pass
    return 2 * steps * options.batch_size / stopwatch.seconds


# ---- training -----------------------------------------------------------------------------------


# Trains for the batches of a stopwatch: (flags of train.py, device, stopwatch).
TimeTraining = Callable[[argparse.Namespace, torch.device, Stopwatch], None]


def time_stock(options: argparse.Namespace, device: torch.device, stopwatch: Stopwatch) -> None:
    """Time the original's loop in stock PyTorch, with our network.

    As in the original code images come one by one from worker processes, cuDNN is deterministic,
    nothing else differs from PyTorch's defaults, and each step waits for its loss. With
    ``options.precision`` "tf32" these are the original's settings; the others are what one would
    change in its code to have them.
    """
    torch.manual_seed(1)
    torch.backends.cudnn.deterministic = True
    utils.set_precision(options.precision, device)
    amp_dtype = utils.AMP_DTYPES.get(options.precision)
    train_set = random_images(stopwatch.batches_used, device, options)
    loader = stock_loader(train_set, options)
    net = train.build_network(N_CLASS, None, "", options).to(device)
    optimizer = stock_optimizer(net)
    scaler = torch.amp.GradScaler(enabled=options.precision == "fp16")
    for batch in stopwatch.watch(loader):
        visible, thermal, visible_labels, thermal_labels = (x.to(device) for x in batch)
        labels = torch.cat([visible_labels, thermal_labels])
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            logits, feats = net(visible, thermal)
            loss = stock_loss(logits, feats, labels, options.per_img)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        loss.item()


def stock_optimizer(net: EmbedNet) -> torch.optim.Optimizer:
    """Build SGD with the original's groups: the backbones, each head and each classifier."""
    backbones = [*net.visible_net.parameters(), *net.thermal_net.parameters()]
    groups = [{"params": backbones, "lr": 0.0008}]
    for module in net.heads + net.classifiers:
        groups.append({"params": module.parameters()})
    return torch.optim.SGD(groups, lr=0.008, momentum=0.9, weight_decay=5e-4, nesterov=True)


def stock_loss(logits: list[Tensor], feats: list[Tensor], labels: Tensor, per_img: int) -> Tensor:
    """Return the sum over the stripes of cross-entropy and 0.6 times the Hetero-Center loss.

    It is faster than the original's, which compares the centers person by person and waits for the
    GPU at each.

    Args:
        logits, feats: of each stripe (2 N, n_class) and (2 N, dim), the N visible rows first.
        labels: (2 N,). The ``per_img`` rows of a person are contiguous in each modality.
        per_img: rows of a person.
    """
    loss = 0.0
    for stripe_logits, stripe_feats in zip(logits, feats, strict=True):
        visible_feats, thermal_feats = stripe_feats.chunk(2)
        visible_centers = visible_feats.unflatten(0, (-1, per_img)).mean(1)
        thermal_centers = thermal_feats.unflatten(0, (-1, per_img)).mean(1)
        hetero_center = ((visible_centers - thermal_centers) ** 2).sum()
        loss = loss + F.cross_entropy(stripe_logits, labels) + 0.6 * hetero_center
    return loss


def time_ours(options: argparse.Namespace, device: torch.device, stopwatch: Stopwatch) -> None:
    """Time train.py's own `train_epoch`, with the precision and algorithms of the flags."""
    utils.seed_everything(1, options.deterministic)
    utils.set_precision(options.precision, device)
    train_set = random_images(stopwatch.batches_used, device, options)
    batches = train.build_batches(train_set, device, options)
    net = to_device(train.build_network(N_CLASS, None, "", options), device)
    optimizer = train.build_optimizer(net, options)
    criterion = Criterion(options.w_hc, options.thd, options.dist_type, utils.world_size())
    scaler = torch.amp.GradScaler(enabled=options.precision == "fp16")
    wrapped_net = train.wrap_network(net, options)
    watched = WatchedBatches(batches, stopwatch)
    train.train_epoch(wrapped_net, criterion, optimizer, watched, 0, options, scaler)


def measure(
    rank: int,
    world_size: int,
    time_training: TimeTraining,
    args: argparse.Namespace,
    options: argparse.Namespace,
    result_file: str,
) -> None:
    """Time a training as one of ``world_size`` processes. Rank 0 writes the results, as JSON:

    images/s        of both modalities, on all ranks together
    step ms         of a step
    data wait ms    the part of it in which the loop waits for its batch
    peak GiB        on a GPU of tensors, after the warm-up; on a CPU of the process
    GPU busy        the share of a step in which the GPU computes; None if it is unknown
    """
    os.environ["LOCAL_RANK"] = str(rank)
    if world_size > 1:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            init_method=f"file://{result_file}.store",
            rank=rank,
            world_size=world_size,
        )
    device = utils.select_device(options.gpu)
    has_gpu = device.type == "cuda"
    profiled_steps = PROFILED_STEPS if has_gpu and world_size == 1 else 0
    stopwatch = Stopwatch(args.warmup, args.steps, device, profiled_steps)
    time_training(options, device, stopwatch)
    step_seconds = stopwatch.seconds / args.steps
    if has_gpu:
        peak_bytes = torch.cuda.max_memory_allocated()
    else:
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    gpu_busy = None
    if stopwatch.gpu_seconds > 0:  # else there is no GPU, or the profiler has no permission
        gpu_busy = stopwatch.gpu_seconds / profiled_steps / step_seconds
    results = {
        "images/s": 2 * options.batch_size / step_seconds,
        "step ms": 1000 * step_seconds,
        "data wait ms": 1000 * stopwatch.waited / args.steps,
        "peak GiB": peak_bytes / GIB,
        "GPU busy": gpu_busy,
    }
    if rank == 0:
        Path(result_file).write_text(json.dumps(results), encoding="utf-8")
    if world_size > 1:
        dist.destroy_process_group()


def measure_in_processes(
    world_size: int,
    time_training: TimeTraining,
    args: argparse.Namespace,
    options: argparse.Namespace,
) -> dict[str, float | None]:
    """Run `measure` in new processes and return its results.

    Memory and compiled code of the rows before do not count.
    """
    utils.select_device(options.gpu)  # an error of a new process would show its traceback
    with tempfile.TemporaryDirectory() as folder:
        result_file = os.path.join(folder, "results.json")
        torch.multiprocessing.spawn(
            measure, (world_size, time_training, args, options, result_file), world_size
        )
        return json.loads(Path(result_file).read_text(encoding="utf-8"))


class TrainingRow(NamedTuple):
    """A row of the table: what is trained, and how. It is compared with the row before it."""

    name: str
    time_training: TimeTraining
    options: argparse.Namespace


STOCK_NAMES = {
    "tf32": "stock PyTorch, the original's settings",
    "fp32": "stock PyTorch, fp32",
    "bf16": "stock PyTorch, bf16 autocast",
    "fp16": "stock PyTorch, fp16 autocast",
}


def training_rows(precision: str, options: argparse.Namespace) -> list[TrainingRow]:
    """Return the rows of one precision: stock PyTorch, ours, and ours with further flags."""
    name = f"ours --precision {precision}"
    flags = with_flags(options, precision=precision, deterministic=True, compile=False)
    rows = [
        TrainingRow(STOCK_NAMES[precision], time_stock, flags),
        TrainingRow(name, time_ours, flags),
    ]
    if not options.deterministic:
        name += " --no-deterministic"
        flags = with_flags(flags, deterministic=False)
        rows.append(TrainingRow(name, time_ours, flags))
    if options.compile:
        name += " --compile"
        flags = with_flags(flags, compile=True)
        rows.append(TrainingRow(name, time_ours, flags))
    return rows


def benchmark_train(args: argparse.Namespace, options: argparse.Namespace) -> None:
    """Print the results of `measure` for stock PyTorch and for ours, in each precision."""
    heads = ["images/s", "step", "data wait", "peak memory", "GPU busy"]
    print(f"{'':54s}{''.join(f'{head:>13s}' for head in heads)}     ratio to its baseline")
    for precision in args.precisions:
        baseline_name = ""
        baseline = None
        for row in training_rows(precision, options):
            results = measure_in_processes(1, row.time_training, args, row.options)
            line = f"{row.name:54s}{training_cells(results)}"
            if baseline is not None:
                ratio = results["images/s"] / baseline["images/s"]
                line += f"{ratio:9.2f}x {baseline_name}"
            print(line, flush=True)
            baseline_name = row.name
            baseline = results


def training_cells(results: dict[str, float | None]) -> str:
    """Format the results of `measure` for the columns of the table."""
    cells = f"{results['images/s']:13.1f}"
    cells += f"{results['step ms']:10.1f} ms"
    cells += f"{results['data wait ms']:10.1f} ms"
    cells += f"{results['peak GiB']:9.2f} GiB"
    if results["GPU busy"] is None:
        cells += f"{'-':>13s}"
    else:
        cells += f"{results['GPU busy']:13.0%}"
    return cells


def benchmark_scale(args: argparse.Namespace, options: argparse.Namespace) -> None:
    """Print the speed of our training on 1, 2, 4, ... processes.

    "strong": all share one batch; "weak": each brings a batch of its own. "to one" is the ratio to
    the speed of one process, "overhead" the share of a step that is lost to working together.
    """
    if not torch.cuda.is_available():
        print(
            "no GPU: the processes share the cores of one CPU; this shows that it works, no gain\n"
        )
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // args.processes)))
        options = with_flags(options, sync_bn=False)
    heads = "".join(f"{name:>10s}" for name in ("images/s", "to one", "overhead"))
    print(f"{'':10s}{'processes':>10s}{'images':>8s}{heads}")
    one_process_speed = speed_of_ours(1, options.batch_size, args, options)
    for scaling in ("strong", "weak"):
        for world_size in (1, 2, 4, 8, 16):
            batch_size = options.batch_size
            if scaling == "weak":
                batch_size = world_size * options.batch_size
            n_persons = batch_size // options.per_img
            if world_size > args.processes or n_persons % world_size:  # persons are not split
                continue
            speed = one_process_speed
            independent_speed = one_process_speed  # if the processes did not work together
            if world_size > 1:
                speed = speed_of_ours(world_size, batch_size, args, options)
                rank_speed = speed_of_ours(1, batch_size // world_size, args, options)
                independent_speed = world_size * rank_speed
            print(
                f"{scaling:10s}{world_size:10d}{2 * batch_size:8d}{speed:10.1f}"
                f"{speed / one_process_speed:9.2f}x{1 - speed / independent_speed:10.0%}",
                flush=True,
            )


def speed_of_ours(
    world_size: int, batch_size: int, args: argparse.Namespace, options: argparse.Namespace
) -> float:
    """Return images per second of our training with this batch size."""
    options = with_flags(options, batch_size=batch_size)
    return measure_in_processes(world_size, time_ours, args, options)["images/s"]


# ---- the program --------------------------------------------------------------------------------

COMMANDS = {
    "evaluate": benchmark_evaluate,
    "data": benchmark_data,
    "train": benchmark_train,
    "scale": benchmark_scale,
}


def main() -> None:
    has_gpu = torch.cuda.is_available()
    parser = utils.new_parser(__doc__)
    add = parser.add_argument
    add("command", choices=list(COMMANDS))
    steps_help = "steps to time (100; on a CPU 30 of data, 5 of training)"
    add("--steps", type=utils.positive_int, help=steps_help)
    add(
        "--warmup",
        type=utils.non_negative_int,
        default=20 if has_gpu else 2,
        help=f"training steps before the clock starts; `data` skips {BATCHES_AHEAD} (%(default)s)",
    )
    add(
        "--processes",
        type=utils.positive_int,
        default=torch.cuda.device_count() or 2,
        help="of `scale`, at most (%(default)s)",
    )
    add(
        "--precision",
        choices=utils.PRECISIONS,
        help="this alone; `train` without it: tf32, fp32 and bf16 on a GPU, tf32 (fp32) on a CPU",
    )
    args, flags = utils.parse_known(parser)
    if args.steps is None:
        if has_gpu:
            args.steps = 100
        elif args.command == "data":
            args.steps = 30
        else:
            args.steps = 5
    args.precisions = ["tf32", "fp32", "bf16"] if has_gpu else ["tf32"]
    if args.precision:
        args.precisions = [args.precision]
        flags += ["--precision", args.precision]
    options = with_flags(train.parse_args(flags), pretrained="none")
    if options.batch_size % options.per_img:
        raise utils.InputError(
            f"--batch-size {options.batch_size} is not a multiple of --per-img {options.per_img}"
        )
    n_gpus = torch.cuda.device_count()
    if has_gpu and args.command == "scale" and args.processes > n_gpus:
        raise utils.InputError(f"--processes {args.processes}: this machine has {n_gpus} GPUs")
    COMMANDS[args.command](args, options)


if __name__ == "__main__":
    utils.run(main)
