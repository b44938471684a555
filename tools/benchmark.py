"""Measure speed and memory on this machine.

    python -m tools.benchmark evaluate      scoring at the datasets' sizes, beside a loop over queries and a bare sort
    python -m tools.benchmark data          batches of training images, beside an image at a time through torchvision
    python -m tools.benchmark train         training steps, beside the published way and the bare network
    python -m tools.benchmark scale         training steps shared by 1, 2, 4, ... processes, one for each GPU

Ratios are taken in one run; they mean more than the seconds.
"""

import argparse
import collections
import itertools
import json
import multiprocessing
import os
import platform
import resource
import tempfile
import time
import timeit
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

import train
import utils
from data_loader import IMAGENET_MEAN, IMAGENET_STD, IdentitySampler, TrainBatches, TrainingSet
from eval_metrics import Distances, eval_sysu
from model import BACKBONES, EmbedNet, to_device

SIZES = {  # (queries, gallery, persons)
    "SYSU-MM01 single-shot": (3803, 301, 96),
    "SYSU-MM01 multi-shot": (3803, 3010, 96),
    "RegDB": (2060, 2060, 206),
}
LARGE = (20_000, 50_000, 1_000)
PERSONS, PER_IMG = 395, 8
AHEAD = 10  # batches that may be made before they are asked for

PUBLISHED, OURS, BARE = "the published way", "ours", "the bare network"
FLAGS = ["", "--amp bf16", "--compile", "--amp bf16 --compile"]  # of train.py, that training is measured with
GPU_FLAGS = ["--tf32", "--no-deterministic", "--amp fp16", "--amp bf16 --compile --no-deterministic"]


# ---- scoring --------------------------------------------------------------------------------------------------------


def lists(queries: int, gallery: int, persons: int) -> tuple[np.ndarray, ...]:
    """Person and camera numbers of queries and gallery, as `eval_sysu` takes them."""
    rng = np.random.default_rng(0)
    pids = rng.integers(0, persons, queries), np.sort(np.arange(gallery) % persons)
    return *pids, rng.choice([3, 6], queries), rng.choice([1, 2, 4, 5], gallery)


def loop_over_queries(distmat, q_pids, g_pids, q_camids, g_camids) -> tuple[float, float]:
    """Rank-1 and mAP the way the field's codes compute them: a query at a time, with Python lists along its ranking."""
    ranking = np.argsort(distmat, axis=1)
    ranked_pids = g_pids[ranking]
    hits = (ranked_pids == q_pids[:, None]).astype(np.int32)
    curves, aps = [], []
    for query, order in enumerate(ranking):
        keep = ~((q_camids[query] == 3) & (g_camids[order] == 2))
        own_hits = hits[query][keep]
        if not own_hits.any():
            continue
        pids = ranked_pids[query][keep]
        first_seen = np.unique(pids, return_index=True)[1]
        persons = np.array([pids[place] for place in sorted(first_seen)])  # each at their first image
        curves.append((persons == q_pids[query]).cumsum()[:20])
        precisions = np.array([found / (place + 1.0) for place, found in enumerate(own_hits.cumsum())])
        aps.append((precisions * own_hits).sum() / own_hits.sum())
    return np.mean([curve[0] for curve in curves]), np.mean(aps)


def peak_memory(function: Callable) -> float:
    """The most memory that a call holds at once, in MiB."""
    tracemalloc.start()
    function()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def benchmark_evaluate(args: argparse.Namespace) -> None:
    rng = np.random.default_rng(0)
    columns = ("ours", "loop", "sort", "loop/ours", "ours/sort", "ours", "loop")
    print(f"{'':24s}{'queries x gallery':>18s}" + "".join(f"{column:>11s}" for column in columns))
    for name, (queries, gallery, persons) in SIZES.items():
        distmat = rng.standard_normal((queries, gallery), dtype=np.float32)
        where = lists(queries, gallery, persons)
        score, compare = partial(eval_sysu, distmat, *where), partial(loop_over_queries, distmat, *where)
        scores = score()
        np.testing.assert_allclose((scores.cmc[0], scores.mAP), compare(), atol=1e-9)
        calls = (score, 5), (compare, 1), (partial(np.sort, distmat, axis=1), 5)
        ours, loop, sort = (min(timeit.repeat(call, number=1, repeat=n)) for call, n in calls)
        times = "".join(f"{t:9.3f} s" for t in (ours, loop, sort))
        memory = "".join(f"{peak_memory(call):7.0f} MiB" for call in (score, compare))
        size = f"{queries:,} x {gallery:,}"
        print(f"{name:24s}{size:>18s}{times}{loop / ours:10.0f}x{ours / sort:10.1f}x{memory}")

    queries, gallery, persons = LARGE
    features = [rng.standard_normal((n, 128), dtype=np.float32) for n in (queries, gallery)]
    where = lists(queries, gallery, persons)
    start = time.perf_counter()
    peak = peak_memory(lambda: eval_sysu(Distances(*features), *where))
    took, whole = time.perf_counter() - start, queries * gallery * 4 / 2**20
    print(f"\n{queries:,} x {gallery:,}, from 128-dimensional features: {took:.1f} s, {peak:.0f} MiB beyond them; "
          f"all distances at once would be {whole:.0f} MiB")  # fmt: skip


# ---- batches --------------------------------------------------------------------------------------------------------


def noise(steps: int, half: int, size: tuple[int, int]) -> tuple[TrainingSet, IdentitySampler]:
    """Random images for an epoch of more than ``steps`` batches, ``half`` of each modality, and their sampler."""
    rng, images = np.random.default_rng(0), (steps + AHEAD) * half
    labels = np.arange(images) % min(PERSONS, images // PER_IMG)
    visible, thermal = (rng.integers(0, 256, (images, *size, 3), dtype=np.uint8) for _ in range(2))
    return TrainingSet(visible, thermal, labels, labels), IdentitySampler(labels, labels, half, PER_IMG)


class ImageByImage(Dataset):
    """The published way to a batch: each image through torchvision's transforms, in the order of a plan."""

    def __init__(self, data: TrainingSet, sampler: IdentitySampler, size: tuple[int, int]):
        self.data, self.plan = data, [rows.ravel() for rows in sampler.epoch(0)]
        steps = T.ToPILImage(), T.RandomCrop(size), T.RandomHorizontalFlip(), T.ToTensor()
        self.transform = T.Compose([*steps, T.Normalize(IMAGENET_MEAN, IMAGENET_STD)])

    def __len__(self) -> int:
        return len(self.plan[0])

    def __getitem__(self, i: int) -> tuple:
        v, t = self.plan[0][i], self.plan[1][i]
        images = self.transform(self.data.visible[v]), self.transform(self.data.thermal[t])
        return *images, self.data.visible_labels[v], self.data.thermal_labels[t]


class Watch:
    """Hands ``warmup + steps`` batches to a loop, and times what the loop does from the end of the warm-up on.

    ``seconds`` is the time of these ``steps``; for ``waited`` of them the loop waited for its batches.
    """

    def __init__(self, warmup: int, steps: int, device: torch.device):
        self.warmup, self.steps, self.device, self.waited = warmup, steps, device, 0.0

    def __call__(self, batches: Iterable) -> Iterator:
        batches, synchronize = iter(batches), torch.get_device_module(self.device).synchronize
        for step in range(self.warmup + self.steps):
            if step == self.warmup:
                synchronize()
                if self.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                start, self.waited = time.perf_counter(), 0.0
            asked = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - asked
            yield batch
        synchronize()
        self.seconds = time.perf_counter() - start


def benchmark_data(args: argparse.Namespace) -> None:
    device = utils.select_device(args.gpu)
    size, half = (args.img_h, args.img_w), args.batch_size // 2
    data, sampler = noise(AHEAD + args.steps, half, size)
    one_by_one = ImageByImage(data, sampler, size)
    ways = {f"image by image, {n} workers": DataLoader(one_by_one, half, num_workers=n) for n in args.workers}
    for cache in ("host", "device") if device.type == "cuda" else ("host",):
        batches = TrainBatches(data, sampler, size, device, cache)
        ways[f"ours, gathered on the {cache}"] = batches.gather(np.stack(sampler.epoch(0)))
        ways[f"ours, from the {cache} to the network"] = batches.epoch(0)
    found = []
    for name, batches in ways.items():
        watch = Watch(AHEAD, args.steps, device)
        collections.deque(watch(batches), maxlen=0)
        found.append(args.steps * args.batch_size / watch.seconds)
        ratio = found[-1] / max(found[: len(args.workers)])
        print(f"{name:36s}{found[-1]:10,.0f} images/s{ratio:8.1f}x", flush=True)


# ---- training -------------------------------------------------------------------------------------------------------


def published_loop(net: EmbedNet, batches: Iterable, device: torch.device) -> None:
    """The published loop in stock PyTorch, with our network."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.008, momentum=0.9, weight_decay=5e-4, nesterov=True)
    for batch in batches:
        visible, thermal, *labels = (x.to(device) for x in batch)
        logits, feats = net(visible, thermal)
        loss = 0.0
        for stripe, feat in zip(logits, feats, strict=True):
            centers = [x.unflatten(0, (-1, PER_IMG)).mean(1) for x in feat.chunk(2)]
            hetero_center = ((centers[0] - centers[1]) ** 2).sum()
            loss = loss + F.cross_entropy(stripe, torch.cat(labels)) + 0.6 * hetero_center
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()


def bare_loop(run: train.Run, batches: Iterable) -> None:
    """Forward, backward and update, with next to no loss."""
    amp = train.AMP[run.args.amp]
    for visible, thermal, *_ in batches:
        with torch.autocast(visible.device.type, amp, enabled=amp is not None):
            logits, _ = run.fast_net(visible, thermal)
        run.optimizer.zero_grad(set_to_none=True)
        torch.stack(logits).float().logsumexp(2).sum().backward()
        run.optimizer.step()


def our_run(args: argparse.Namespace, options: argparse.Namespace, batch: int) -> tuple[train.Run, TrainBatches]:
    """A training with these flags of train.py, on noise, with ``batch`` images a step that its processes share."""
    size, device = (args.img_h, args.img_w), utils.select_device(args.gpu)
    data, sampler = noise(args.warmup + args.steps, batch // 2, size)
    net = EmbedNet(PERSONS, arch=args.arch, pretrained="none")
    run = train.Run("benchmark", options, to_device(net, device), PERSONS)
    run.after_step = lambda: None  # which would save
    return run, TrainBatches(data, sampler, size, device, options.cache, utils.share())


def timed_epoch(run: train.Run, batches: TrainBatches, watch: Watch) -> None:
    """train.py's own epoch, under a watch."""
    gather = batches.gather
    batches.gather = lambda plan: watch(gather(plan))
    train.train_epoch(run, batches, 0)


def warn_of_waiting(run: train.Run, batch: tuple) -> None:
    """Let an update that waits for the GPU say so; the first one may."""
    for mode in ("default", "warn"):
        torch.cuda.set_sync_debug_mode(mode)
        train.train_step(run.fast_net, run.optimizer, batch, run.terms, train.AMP[run.args.amp], run.scaler)
    torch.cuda.set_sync_debug_mode("default")


def measure(args: argparse.Namespace, way: str, flags: str) -> dict[str, float]:
    """Images per second, milliseconds a step and of it for data, and peak memory in GiB; in a process of its own."""
    size, half, device = (args.img_h, args.img_w), args.batch_size // 2, utils.select_device(args.gpu)
    options = train.build_parser().parse_args([*flags.split(), "--batch-size", str(half)])
    utils.seed_everything(1, options.deterministic and way != PUBLISHED, options.tf32)
    watch = Watch(args.warmup, args.steps, device)
    if way == PUBLISHED:
        loader = DataLoader(
            ImageByImage(*noise(args.warmup + args.steps, half, size), size), half, num_workers=args.workers
        )
        published_loop(EmbedNet(PERSONS, arch=args.arch, pretrained="none").to(device), watch(loader), device)
    else:
        run, batches = our_run(args, options, args.batch_size)
        batch = next(batches.epoch(0))
        if way == BARE:
            bare_loop(run, watch(itertools.repeat(batch)))
        else:
            if device.type == "cuda":
                warn_of_waiting(run, batch)
            timed_epoch(run, batches, watch)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
    step = watch.seconds / args.steps
    return {"images/s": args.batch_size / step, "step ms": 1000 * step,
            "data wait ms": 1000 * watch.waited / args.steps, "peak GiB": memory / 2**30}  # fmt: skip


def benchmark_train(args: argparse.Namespace) -> None:
    on_gpu = torch.cuda.is_available()
    pairs = [(PUBLISHED, ""), *((way, flags) for flags in FLAGS + GPU_FLAGS * on_gpu for way in (OURS, BARE))]
    rows = {" ".join(pair).strip(): pair for pair in pairs + [(OURS, "--cache host")] * on_gpu}
    chosen = [row for row in rows if not args.only or row.endswith(tuple(args.only))]
    if not chosen:
        raise ValueError(f"--only {' '.join(args.only)}: no row ends so; there are {'; '.join(rows)}")
    found = {}
    for row in chosen:
        # In a process of its own: memory and compiled code of others do not count.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            found[row] = values = pool.submit(measure, args, *rows[row]).result()
        if row == chosen[0]:
            print(f"{'':48s}" + "".join(f"{key:>14s}" for key in values) + f"{'to first':>10s}")
        ratio = values["images/s"] / found[chosen[0]]["images/s"]
        print(f"{row:48s}" + "".join(f"{value:14.2f}" for value in values.values()) + f"{ratio:9.2f}x", flush=True)
    if args.json:
        device = f"{platform.machine()}, {torch.get_num_threads()} threads"
        if on_gpu:
            device = torch.cuda.get_device_name(utils.select_device(args.gpu))
        content = {"device": device, "flags": vars(args), "versions": utils.versions(), "results": found}
        with utils.whole_file(args.json) as path, open(path, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)


# ---- several processes ----------------------------------------------------------------------------------------------


def take_part(rank: int, processes: int, args: argparse.Namespace, batch: int, file: str) -> None:
    """One of the processes that share a training with ``batch`` images a step; rank 0 writes the seconds of a step."""
    os.environ["LOCAL_RANK"], on_gpu = str(rank), torch.cuda.is_available()
    if processes > 1:
        backend, place = "cpu:gloo,cuda:nccl" if on_gpu else "gloo", {"rank": rank, "world_size": processes}
        dist.init_process_group(backend, init_method=f"file://{file}.store", **place)
    if not on_gpu:
        torch.set_num_threads(max(1, os.cpu_count() // args.processes))
    options = ["--batch-size", str(batch // 2), *["--amp", "bf16"] * args.bf16, *["--no-sync_bn"] * (not on_gpu)]
    options = train.build_parser().parse_args(options)
    utils.seed_everything(1 + rank, options.deterministic)
    run, batches = our_run(args, options, batch)
    watch = Watch(args.warmup, args.steps, run.device)
    timed_epoch(run, batches, watch)
    if rank == 0:
        Path(file).write_text(str(watch.seconds / args.steps))
    utils.end_processes()


def seconds(processes: int, args: argparse.Namespace, batch: int) -> float:
    """Of a step that so many processes share."""
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "seconds")
        torch.multiprocessing.spawn(take_part, (processes, args, batch, file), processes)
        return float(Path(file).read_text())


def benchmark_scale(args: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        print("no GPU: processes that share the cores of one CPU; this shows that it works, and no gain\n")
    heads, first = ("images/s", "to one", "not alone"), 0.0
    print(f"{'':10s}{'processes':>10s}{'images':>8s}" + "".join(f"{head:>10s}" for head in heads))
    for growth in ("strong", "weak"):  # one batch is shared; each process brings a batch
        for processes in (n for n in (1, 2, 4, 8, 16) if n <= args.processes):
            batch = args.batch_size * (processes if growth == "weak" else 1)
            if batch // 2 // PER_IMG % processes:
                continue  # persons are not split
            took = seconds(processes, args, batch)
            alone = took if processes == 1 else seconds(1, args, batch // processes)  # its own part, without the others
            if processes == 1:
                first = batch / took
            figures = f"{batch / took:10.1f}{batch / took / first:9.2f}x{1 - alone / took:10.0%}"
            print(f"{growth:10s}{processes:10d}{batch:8d}{figures}", flush=True)


BENCHMARKS = {
    "evaluate": benchmark_evaluate,
    "data": benchmark_data,
    "train": benchmark_train,
    "scale": benchmark_scale,
}


def build_parser() -> argparse.ArgumentParser:
    parser, on_gpu = utils.Parser(prog="python -m tools.benchmark", description=__doc__), torch.cuda.is_available()
    commands = parser.add_subparsers(dest="command", required=True)
    _, data, steps, scale = (commands.add_parser(name) for name in BENCHMARKS)
    for add in (data.add_argument, steps.add_argument, scale.add_argument):
        add("--batch-size", type=int, default=64, help="images of both modalities (%(default)s)")
        add("--img_h", type=int, default=288, help="image height (%(default)s)")
        add("--img_w", type=int, default=144, help="image width (%(default)s)")
        add("--gpu", type=int, default=0, help="number of the GPU (%(default)s)")
    add = data.add_argument
    add("--steps", type=int, default=30, help="batches to time (%(default)s)")
    add("--workers", type=int, nargs="+", default=[0, 1, 2], help="of the loader of single images (0 1 2)")
    for add in (steps.add_argument, scale.add_argument):
        add("--steps", type=int, default=100 if on_gpu else 5, help="steps to time (%(default)s)")
        add("--warmup", type=int, default=20 if on_gpu else 2, help="steps before the clock starts (%(default)s)")
        add("--arch", choices=[*BACKBONES], default="resnet50", help="both streams (%(default)s)")
    most = torch.cuda.device_count() or 2
    scale.add_argument("--processes", type=int, default=most, help="at most so many (%(default)s)")
    scale.add_argument("--bf16", action="store_true", help="with --amp bf16")
    add = steps.add_argument
    add("--workers", type=int, default=4, help="of the published way's loader (%(default)s)")
    add("--only", nargs="+", default=(), metavar="NAME", help="the rows whose names end so, like 'way' or 'bf16'")
    add("--json", help="file to write the results to")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if getattr(args, "batch_size", 0) % (2 * PER_IMG):
        raise ValueError(f"--batch-size {args.batch_size} is not a multiple of {2 * PER_IMG}")
    BENCHMARKS[args.command](args)


if __name__ == "__main__":
    utils.run(main)
