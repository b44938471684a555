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

import train
import utils
from data_loader import IMAGENET_MEAN, IMAGENET_STD, IdentitySampler, TrainBatches, TrainingSet
from eval_metrics import Distances, eval_sysu
from loss import Criterion
from model import EmbedNet, to_device

N_CLASS = 395  # training persons of SYSU-MM01
# At least as many as readers make before they are asked for: `data` uses them up before the clock
# starts, and there are images for as many more.
BATCHES_AHEAD = 10
STOCK = "stock PyTorch, the original's loop"
OURS = "ours"
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
    """(Q,) and (G,) random person ids, then camera numbers, in the order that `eval_sysu` takes."""
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
    """Rank-1 and mAP as the field's codes compute them: query by query, with Python lists."""
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
    """The seconds of the fastest of some calls."""
    return min(timeit.repeat(function, number=1, repeat=calls))


def peak_memory(function: Callable[[], object]) -> float:
    """The most memory that a call holds at once, in MiB."""
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

    def peak_bytes(self) -> int:
        """The most memory in use: on a GPU since the warm-up, on a CPU by this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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


def random_images(steps: int, options: argparse.Namespace) -> tuple[TrainingSet, IdentitySampler]:
    """Images of noise, for an epoch of more than ``steps`` batches, and their sampler."""
    rng = np.random.default_rng(0)
    n_images = (steps + BATCHES_AHEAD) * options.batch_size
    labels = np.arange(n_images) % min(N_CLASS, n_images // options.per_img)
    shape = (n_images, options.img_h, options.img_w, 3)
    visible = rng.integers(0, 256, shape, dtype=np.uint8)
    thermal = rng.integers(0, 256, shape, dtype=np.uint8)
    sampler = IdentitySampler(labels, labels, options.batch_size, options.per_img)
    return TrainingSet(visible, thermal, labels, labels), sampler


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


def stock_loader(
    train_set: TrainingSet, sampler: IdentitySampler, options: argparse.Namespace
) -> DataLoader:
    """A DataLoader whose batches are (visible, thermal, visible_labels, thermal_labels)."""
    # Other ways to start its workers would copy all images to each of them first.
    context = "fork" if options.workers > 0 else None
    return DataLoader(
        ImageByImage(train_set, sampler),
        options.batch_size,
        num_workers=options.workers,
        multiprocessing_context=context,
    )


def benchmark_data(args: argparse.Namespace, options: argparse.Namespace) -> None:
    """Print images per second of each way to make batches, and the ratio to the first."""
    device = utils.select_device(options.gpu)
    size = (options.img_h, options.img_w)
    train_set, sampler = random_images(BATCHES_AHEAD + args.steps, options)
    loader = stock_loader(train_set, sampler, options)
    rows = {f"image by image, {options.workers} workers": loader}
    caches = ["host"]
    if device.type == "cuda":
        caches.append("device")
    for cache in caches:
        batches = TrainBatches(train_set, sampler, size, device, cache)
        visible_plan, thermal_plan = sampler.epoch(0)
        rows[f"ours, gathered on the {cache}"] = batches.images_of_steps(visible_plan, thermal_plan)
        rows[f"ours, from the {cache} to the network"] = batches.epoch(0)

    first_speed = None
    for name, batches in rows.items():
        stopwatch = Stopwatch(BATCHES_AHEAD, args.steps, device)
        for _ in stopwatch.watch(batches):
            pass
        speed = 2 * args.steps * options.batch_size / stopwatch.seconds
        if first_speed is None:
            first_speed = speed
        print(f"{name:36s}{speed:10,.0f} images/s{speed / first_speed:8.1f}x", flush=True)


# ---- training -----------------------------------------------------------------------------------


def time_stock(options: argparse.Namespace, device: torch.device, stopwatch: Stopwatch) -> None:
    """Time the original's loop in stock PyTorch, with our network and PyTorch's own precision."""
    utils.seed_everything(1, deterministic=False)
    train_set, sampler = random_images(stopwatch.warmup + stopwatch.steps, options)
    loader = stock_loader(train_set, sampler, options)
    net = new_network(options).to(device)
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
    """The sum over the stripes of cross-entropy and 0.6 times the Hetero-Center loss.

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
    train_set, sampler = random_images(stopwatch.warmup + stopwatch.steps, options)
    size = (options.img_h, options.img_w)
    batches = TrainBatches(
        train_set, sampler, size, device, options.cache, utils.rank(), utils.world_size()
    )
    net = to_device(new_network(options), device)
    optimizer = train.build_optimizer(net, options)
    criterion = Criterion(options.w_hc, options.thd, options.dist_type, utils.world_size())
    scaler = torch.amp.GradScaler(enabled=options.precision == "fp16")
    wrapped_net = train.wrap_network(net, options)
    if device.type == "cuda" and not utils.is_distributed():
        batch = next(batches.epoch(0))
        amp_dtype = utils.AMP_DTYPES.get(options.precision)
        warn_of_waiting(
            partial(train.train_step, wrapped_net, criterion, optimizer, batch, amp_dtype, scaler)
        )
    watched = WatchedBatches(batches, stopwatch)
    train.train_epoch(wrapped_net, criterion, optimizer, watched, 0, options, scaler)


METHODS = {STOCK: time_stock, OURS: time_ours}


def new_network(options: argparse.Namespace) -> EmbedNet:
    return EmbedNet(
        N_CLASS,
        options.low_dim,
        options.drop,
        options.arch,
        options.num_parts,
        pretrained="none",
    )


def warn_of_waiting(step: Callable[[], object]) -> None:
    """Let an update that waits for the GPU print a warning. The first one may wait."""
    step()
    torch.cuda.set_sync_debug_mode("warn")
    step()
    torch.cuda.set_sync_debug_mode("default")


def measure(
    rank: int,
    world_size: int,
    method: str,
    args: argparse.Namespace,
    flags: list[str],
    result_file: str,
) -> None:
    """Time a method as one of ``world_size`` processes. Rank 0 writes the results, as JSON.

    They are images per second, milliseconds of a step and of its wait for data, and peak memory.
    """
    os.environ["LOCAL_RANK"] = str(rank)
    if world_size > 1:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            init_method=f"file://{result_file}.store",
            rank=rank,
            world_size=world_size,
        )
    options = train.parse_args(flags)
    device = utils.select_device(options.gpu)
    stopwatch = Stopwatch(args.warmup, args.steps, device)
    METHODS[method](options, device, stopwatch)
    step_seconds = stopwatch.seconds / args.steps
    results = {
        "images/s": 2 * options.batch_size / step_seconds,
        "step ms": 1000 * step_seconds,
        "data wait ms": 1000 * stopwatch.waited / args.steps,
        "peak GiB": stopwatch.peak_bytes() / GIB,
    }
    if rank == 0:
        Path(result_file).write_text(json.dumps(results))
    if world_size > 1:
        dist.destroy_process_group()


def measure_in_processes(
    world_size: int, method: str, args: argparse.Namespace, flags: list[str]
) -> dict[str, float]:
    """The results of `measure`. Memory and compiled code of other measurements do not count."""
    with tempfile.TemporaryDirectory() as folder:
        result_file = os.path.join(folder, "results.json")
        torch.multiprocessing.spawn(
            measure, (world_size, method, args, flags, result_file), world_size
        )
        return json.loads(Path(result_file).read_text())


def benchmark_train(args: argparse.Namespace, options: argparse.Namespace) -> None:
    """Print the results of `measure` for each method, and the ratio of its speed to the first."""
    stock_speed = None
    for method in (STOCK, OURS):
        results = measure_in_processes(1, method, args, args.flags)
        if stock_speed is None:
            stock_speed = results["images/s"]
            heads = "".join(f"{name:>14s}" for name in results)
            print(f"{'':36s}{heads}{'to first':>10s}")
        cells = "".join(f"{value:14.2f}" for value in results.values())
        print(f"{method:36s}{cells}{results['images/s'] / stock_speed:9.2f}x", flush=True)


def benchmark_scale(args: argparse.Namespace, options: argparse.Namespace) -> None:
    """Print the speed of our training on 1, 2, 4, ... processes.

    "strong": all share one batch; "weak": each brings a batch of its own. "to one" is the ratio to
    the speed of one process. "not alone" is the part of a step that a process would not need for
    its own images without the others.
    """
    flags = args.flags
    if not torch.cuda.is_available():
        print(
            "no GPU: the processes share the cores of one CPU; this shows that it works, no gain\n"
        )
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // args.processes)))
        flags = [*flags, "--no-sync-bn"]
    heads = "".join(f"{name:>10s}" for name in ("images/s", "to one", "not alone"))
    print(f"{'':10s}{'processes':>10s}{'images':>8s}{heads}")
    one_process_speed = None
    for scaling in ("strong", "weak"):
        for world_size in (1, 2, 4, 8, 16):
            batch_size = options.batch_size
            if scaling == "weak":
                batch_size = world_size * options.batch_size
            n_persons = batch_size // options.per_img
            if world_size > args.processes or n_persons % world_size:  # persons are not split
                continue
            speed = speed_of_ours(world_size, batch_size, args, flags)
            speed_alone = speed
            if world_size > 1:
                speed_of_rank = speed_of_ours(1, batch_size // world_size, args, flags)
                speed_alone = world_size * speed_of_rank
            if one_process_speed is None:
                one_process_speed = speed
            print(
                f"{scaling:10s}{world_size:10d}{2 * batch_size:8d}{speed:10.1f}"
                f"{speed / one_process_speed:9.2f}x{1 - speed / speed_alone:10.0%}",
                flush=True,
            )


def speed_of_ours(
    world_size: int, batch_size: int, args: argparse.Namespace, flags: list[str]
) -> float:
    """Images per second of our training with this batch size."""
    flags = [*flags, "--batch-size", str(batch_size)]
    return measure_in_processes(world_size, OURS, args, flags)["images/s"]


# ---- the program --------------------------------------------------------------------------------

COMMANDS = {
    "evaluate": benchmark_evaluate,
    "data": benchmark_data,
    "train": benchmark_train,
    "scale": benchmark_scale,
}


def default_steps(command: str) -> int:
    if torch.cuda.is_available():
        return 100
    if command == "data":
        return 30
    return 5


def main() -> None:
    parser = utils.new_parser(__doc__)
    add = parser.add_argument
    add("command", choices=list(COMMANDS))
    add(
        "--steps",
        type=utils.positive_int,
        help="steps to time (100; on a CPU 30 of data, 5 of training)",
    )
    add(
        "--warmup",
        type=utils.non_negative_int,
        default=20 if torch.cuda.is_available() else 2,
        help="steps before the clock starts (%(default)s)",
    )
    add(
        "--processes",
        type=utils.positive_int,
        default=torch.cuda.device_count() or 2,
        help="scale: at most so many (%(default)s)",
    )
    args, args.flags = utils.parse_known(parser)
    if args.steps is None:
        args.steps = default_steps(args.command)
    options = train.parse_args(args.flags)
    if options.batch_size % options.per_img:
        raise utils.InputError(
            f"--batch-size {options.batch_size} is not a multiple of --per-img {options.per_img}"
        )
    COMMANDS[args.command](args, options)


if __name__ == "__main__":
    utils.run(main)
