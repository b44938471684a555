"""Measure speed and memory on this machine.

    python -m tools.benchmark evaluate
        scoring at the datasets' sizes, beside a loop over the queries and bare sorts
    python -m tools.benchmark data
        batches of training images, beside an image at a time through torchvision
    python -m tools.benchmark train
        training steps, beside the original's loop in stock PyTorch
    python -m tools.benchmark scale
        distributed training steps on 1, 2, 4, ... processes, one for each GPU

Flags of train.py hold here, too, like --arch, --batch-size, --precision bf16 or --compile. Those
that change precision or algorithms leave stock PyTorch as it is. Ratios are taken within one run:
they mean more than the seconds.
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
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

# `python tools/benchmark.py` would search for modules in tools/ alone.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
import utils
from data_loader import IMAGENET_MEAN, IMAGENET_STD, IdentitySampler, TrainBatches, TrainingSet
from eval_metrics import Distances, eval_sysu
from loss import Criterion
from model import to_device

N_CLASS = 395  # training persons of SYSU-MM01
# A DataLoader has two batches ready for each of its workers, which are at most 8 by default. `data`
# uses so many up before the clock starts, and there are images for as many more.
BATCHES_AHEAD = 16
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
LARGE_SIZE = RankingSize(queries=20_000, gallery=50_000, persons=1_000)


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
    columns += ["ours", "loop"]  # the last two: memory
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

    ours = fastest(score_ours, calls=5)
    loop = fastest(score_in_loop, calls=1)
    sort = fastest(partial(np.sort, distmat, axis=1), calls=5)
    argsort = fastest(partial(np.argsort, distmat, axis=1), calls=5)
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
    start = time.perf_counter()
    peak = peak_memory(lambda: eval_sysu(Distances(query, gallery), *labels))
    seconds = time.perf_counter() - start
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

    Attributes, valid when the loop is over:
        seconds: the time of the ``steps``.
        waited: the part of it in which the loop waited for its next batch.
    """

    def __init__(self, warmup: int, steps: int, device: torch.device):
        self.warmup = warmup
        self.steps = steps
        self.device = device
        self.seconds = 0.0
        self.waited = 0.0

    def watch(self, batches: Iterable) -> Iterator:
        """Yield the first ``warmup + steps`` batches."""
        batches = iter(batches)
        start = time.perf_counter()
        for step in range(self.warmup + self.steps):
            if step == self.warmup:
                self.synchronize()
                if self.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                self.waited = 0.0
                start = time.perf_counter()
            asked = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - asked
            yield batch
        self.synchronize()
        self.seconds = time.perf_counter() - start

    def synchronize(self) -> None:
        """Wait until the device has done what it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class WatchedBatches:
    """One short epoch of `TrainBatches` that a stopwatch watches, for `train.train_epoch`."""

    def __init__(self, batches: TrainBatches, stopwatch: Stopwatch):
        self.batches = batches
        self.stopwatch = stopwatch

    def __len__(self) -> int:
        return self.stopwatch.warmup + self.stopwatch.steps

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, ...]]:
        return self.stopwatch.watch(self.batches.epoch(epoch))


# ---- batches ------------------------------------------------------------------------------------


def random_images(batches_used: int, options: argparse.Namespace) -> TrainingSet:
    """Make images of noise, for an epoch of `BATCHES_AHEAD` more batches than are used."""
    rng = np.random.default_rng(0)
    n_images = (batches_used + BATCHES_AHEAD) * options.batch_size
    labels = np.arange(n_images) % min(N_CLASS, n_images // options.per_img)
    shape = (n_images, options.img_h, options.img_w, 3)
    visible = rng.integers(0, 256, shape, dtype=np.uint8)
    thermal = rng.integers(0, 256, shape, dtype=np.uint8)
    return TrainingSet(visible, thermal, labels, labels)


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
    # Other ways to start its workers would copy all images to each of them first.
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
    train_set = random_images(BATCHES_AHEAD + args.steps, options)
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
        speed = speed_of_batches(images, args.steps, device, options)
        print(data_row(f"ours, gathered on the {cache}", speed, stock_speed), flush=True)
        speed = speed_of_batches(batches.epoch(0), args.steps, device, options)
        print(data_row(f"ours, from the {cache} to the network", speed, stock_speed), flush=True)


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
    """Time the original's loop in stock PyTorch, with our network and PyTorch's own precision."""
    utils.seed_everything(1, deterministic=False)
    train_set = random_images(stopwatch.warmup + stopwatch.steps, options)
    loader = stock_loader(train_set, options)
    net = train.build_network(N_CLASS, None, "", options).to(device)
    optimizer = torch.optim.SGD(
        net.parameters(), lr=0.008, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    for batch in stopwatch.watch(loader):
        visible, thermal, visible_labels, thermal_labels = (x.to(device) for x in batch)
        labels = torch.cat([visible_labels, thermal_labels])
        logits, feats = net(visible, thermal)
        loss = stock_loss(logits, feats, labels, options.per_img)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()


def stock_loss(logits: list[Tensor], feats: list[Tensor], labels: Tensor, per_img: int) -> Tensor:
    """Return the sum over the stripes of cross-entropy and 0.6 times the Hetero-Center loss.

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
    train_set = random_images(stopwatch.warmup + stopwatch.steps, options)
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
    """Time a training as one of ``world_size`` processes. Rank 0 writes the results, as JSON.

    They are images per second, milliseconds of a step and of its wait for data, and peak memory: on
    a GPU since the warm-up, on a CPU of the process.
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
    stopwatch = Stopwatch(args.warmup, args.steps, device)
    time_training(options, device, stopwatch)
    if device.type == "cuda":
        peak_bytes = torch.cuda.max_memory_allocated()
    else:
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    step_seconds = stopwatch.seconds / args.steps
    results = {
        "images/s": 2 * options.batch_size / step_seconds,
        "step ms": 1000 * step_seconds,
        "data wait ms": 1000 * stopwatch.waited / args.steps,
        "peak GiB": peak_bytes / GIB,
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
) -> dict[str, float]:
    """Return the results of `measure`. Memory and compiled code of others do not count."""
    with tempfile.TemporaryDirectory() as folder:
        result_file = os.path.join(folder, "results.json")
        torch.multiprocessing.spawn(
            measure, (world_size, time_training, args, options, result_file), world_size
        )
        return json.loads(Path(result_file).read_text(encoding="utf-8"))


def benchmark_train(args: argparse.Namespace, options: argparse.Namespace) -> None:
    """Print the results of `measure` for both loops, and the ratio to the stock one's speed."""
    stock = measure_in_processes(1, time_stock, args, options)
    heads = "".join(f"{name:>14s}" for name in stock)
    print(f"{'':36s}{heads}{'to stock':>10s}")
    print(training_row("stock PyTorch, the original's loop", stock, stock), flush=True)
    ours = measure_in_processes(1, time_ours, args, options)
    print(training_row("ours", ours, stock))


def training_row(name: str, results: dict[str, float], stock: dict[str, float]) -> str:
    cells = "".join(f"{value:14.2f}" for value in results.values())
    ratio = results["images/s"] / stock["images/s"]
    return f"{name:36s}{cells}{ratio:9.2f}x"


def benchmark_scale(args: argparse.Namespace, options: argparse.Namespace) -> None:
    """Print the speed of our training on 1, 2, 4, ... processes.

    "strong": all share one batch; "weak": each brings a batch of its own. "to one" is the ratio to
    the speed of one process. "not alone" is the part of a step that a process would not need for
    its own images without the others.
    """
    if not torch.cuda.is_available():
        print(
            "no GPU: the processes share the cores of one CPU; this shows that it works, no gain\n"
        )
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // args.processes)))
        options = with_flags(options, sync_bn=False)
    heads = "".join(f"{name:>10s}" for name in ("images/s", "to one", "not alone"))
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
            speed_alone = one_process_speed
            if world_size > 1:
                speed = speed_of_ours(world_size, batch_size, args, options)
                rank_speed = speed_of_ours(1, batch_size // world_size, args, options)
                speed_alone = world_size * rank_speed
            print(
                f"{scaling:10s}{world_size:10d}{2 * batch_size:8d}{speed:10.1f}"
                f"{speed / one_process_speed:9.2f}x{1 - speed / speed_alone:10.0%}",
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
        help="training steps before the clock starts; `data` has its own (%(default)s)",
    )
    add(
        "--processes",
        type=utils.positive_int,
        default=torch.cuda.device_count() or 2,
        help="of `scale`, at most (%(default)s)",
    )
    args, flags = utils.parse_known(parser)
    if args.steps is None:
        if has_gpu:
            args.steps = 100
        elif args.command == "data":
            args.steps = 30
        else:
            args.steps = 5
    options = with_flags(train.parse_args(flags), pretrained="none")
    if options.batch_size % options.per_img:
        raise utils.InputError(
            f"--batch-size {options.batch_size} is not a multiple of --per-img {options.per_img}"
        )
    COMMANDS[args.command](args, options)


if __name__ == "__main__":
    utils.run(main)
