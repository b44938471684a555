"""Measure speed and memory on this machine.

    python -m tools.benchmark evaluate      scoring at the datasets' sizes, beside a loop over queries and a bare sort
    python -m tools.benchmark data          batches of training images, beside an image at a time through torchvision
    python -m tools.benchmark train         training steps, beside the published way and the bare network

Ratios are taken in one run; they mean more than the seconds.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import train
import utils
from data_loader import IMAGENET_MEAN, IMAGENET_STD, IdentitySampler, TrainBatches, TrainingSet
from eval_metrics import Distances, eval_sysu
from loss import HeteroCenterLoss
from model import EmbedNet, least_height

SIZES = {  # (queries, gallery, persons)
    "SYSU-MM01 single-shot": (3803, 301, 96),
    "SYSU-MM01 multi-shot": (3803, 3010, 96),
    "RegDB": (2060, 2060, 206),
}
LARGE = (20_000, 50_000, 1_000)
PER_IMG, PERSONS, AHEAD = 4, 395, 5


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


def seconds(function: Callable, repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


def peak_memory(function: Callable) -> float:
    """The most memory that a call holds at once, in MiB."""
    tracemalloc.start()
    function()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def benchmark_evaluate(args: argparse.Namespace) -> None:
    rng = np.random.default_rng(0)
    columns = ("queries x gallery", "ours", "loop", "sort", "loop/ours", "ours/sort", "ours", "loop")
    print(f"{'':24s}" + "".join(f"{column:>{18 if 'x' in column else 11}s}" for column in columns))
    for name, (queries, gallery, persons) in SIZES.items():
        distmat = rng.standard_normal((queries, gallery), dtype=np.float32)
        where = lists(queries, gallery, persons)
        scores, expected = eval_sysu(distmat, *where), loop_over_queries(distmat, *where)
        np.testing.assert_allclose((scores.cmc[0], scores.mAP), expected, atol=1e-9)
        calls = [partial(eval_sysu, distmat, *where), partial(loop_over_queries, distmat, *where)]
        ours = seconds(calls[0], args.repeats)
        loop = seconds(calls[1], 1)
        sort = seconds(partial(np.sort, distmat, axis=1), args.repeats)
        times = "".join(f"{t:9.3f} s" for t in (ours, loop, sort))
        memory = "".join(f"{peak_memory(call):7.0f} MiB" for call in calls)
        size = f"{queries:,} x {gallery:,}"
        print(f"{name:24s}{size:>18s}{times}{loop / ours:10.0f}x{ours / sort:10.1f}x{memory}")

    queries, gallery, persons = LARGE
    features = [rng.standard_normal((n, 128), dtype=np.float32) for n in (queries, gallery)]
    where = lists(queries, gallery, persons)
    start = time.perf_counter()
    peak = peak_memory(lambda: eval_sysu(Distances(*features), *where))
    print(
        f"\n{queries:,} x {gallery:,}, from 128-dimensional features: {time.perf_counter() - start:.1f} s, "
        f"{peak:.0f} MiB beyond the features; all distances at once would be {queries * gallery * 4 / 2**20:.0f} MiB"
    )


# ---- training -------------------------------------------------------------------------------------------------------


def noise(images: int, size: tuple[int, int]) -> TrainingSet:
    """Random images of both modalities, in memory."""
    rng, labels = np.random.default_rng(0), np.arange(images) % min(PERSONS, images // PER_IMG)
    visible, thermal = (rng.integers(0, 256, (images, *size, 3), dtype=np.uint8) for _ in range(2))
    return TrainingSet(visible, thermal, labels, labels)


class ImageByImage(Dataset):
    """The published way to a batch: each image through torchvision's transforms, in the order of a plan."""

    def __init__(self, data: TrainingSet, sampler: IdentitySampler, size: tuple[int, int]):
        self.data, self.plan = data, [rows.ravel() for rows in sampler.epoch(0)]
        self.transform = transforms.Compose(
            [
                transforms.ToPILImage(),
                transforms.RandomCrop(size),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.plan[0])

    def __getitem__(self, i: int) -> tuple:
        v, t = self.plan[0][i], self.plan[1][i]
        images = self.transform(self.data.visible[v]), self.transform(self.data.thermal[t])
        return *images, self.data.visible_labels[v], self.data.thermal_labels[t]


class Timed:
    """An iterator that counts the seconds it was waited for."""

    def __init__(self, items: Iterable):
        self.items, self.seconds = iter(items), 0.0

    def __iter__(self) -> Iterator:
        return self

    def __next__(self):
        start = time.perf_counter()
        try:
            return next(self.items)
        finally:
            self.seconds += time.perf_counter() - start


class TimedBatches(TrainBatches):
    """Those of train.py; ``gathered`` counts what is waited for."""

    def gather(self, plan: np.ndarray) -> Timed:
        self.gathered = Timed(super().gather(plan))
        return self.gathered


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU has still to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rate(batches: Iterator, steps: int, images: int, device: torch.device) -> float:
    """Images per second of ``steps`` batches, after those that may have been made ahead."""
    for _ in range(AHEAD):
        next(batches)
    synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        next(batches)
    synchronize(device)
    return steps * images / (time.perf_counter() - start)


def benchmark_data(args: argparse.Namespace) -> None:
    device = utils.select_device(args.gpu)
    size, half = (args.img_h, args.img_w), args.batch_size // 2
    data = noise(max(1000, (AHEAD + args.steps) * half), size)
    sampler = IdentitySampler(data.visible_labels, data.thermal_labels, half, PER_IMG)
    found = {}
    for workers in args.workers:
        loader = DataLoader(ImageByImage(data, sampler, size), half, num_workers=workers)
        found[f"image by image, {workers} workers"] = rate(iter(loader), args.steps, 2 * half, device)
    best = max(found.values())
    for cache in ("host", "device") if device.type == "cuda" else ("host",):
        batches = TrainBatches(data, sampler, size, device, cache)
        gathered = batches.gather(np.stack(sampler.epoch(0)))
        found[f"ours, gathered on the {cache}"] = rate(gathered, args.steps, 2 * half, device)
        found[f"ours, from the {cache} to the network"] = rate(batches.epoch(0), args.steps, 2 * half, device)
    for name, images in found.items():
        print(f"{name:36s}{images:10,.0f} images/s{images / best:8.1f}x")


def published_steps(net: EmbedNet, data: TrainingSet, args: argparse.Namespace, device: torch.device) -> Iterator:
    """The published loop in stock PyTorch, with our network; yields the seconds that it has waited for batches."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.008, momentum=0.9, weight_decay=5e-4, nesterov=True)
    size, half = (args.img_h, args.img_w), args.batch_size // 2
    sampler = IdentitySampler(data.visible_labels, data.thermal_labels, half, PER_IMG)
    loader = Timed(DataLoader(ImageByImage(data, sampler, size), half, num_workers=args.workers))
    for batch in loader:
        visible, thermal, visible_labels, thermal_labels = (x.to(device) for x in batch)
        logits, feats = net(visible, thermal)
        labels = torch.cat([visible_labels, thermal_labels])
        loss = 0.0
        for stripe, feat in zip(logits, feats, strict=True):
            centers = [x.unflatten(0, (-1, PER_IMG)).mean(1) for x in (feat[:half], feat[half:])]
            loss = loss + F.cross_entropy(stripe, labels) + 0.6 * ((centers[0] - centers[1]) ** 2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        yield loader.seconds


def bare_steps(net: Callable, optimizer: torch.optim.Optimizer, batch: tuple, amp: torch.dtype | None) -> Iterator:
    """Forward, backward and update on one batch, over and over; it waits for nothing."""
    while True:
        with torch.autocast(batch[0].device.type, amp, enabled=amp is not None):
            logits, _ = net(*batch[:2])
        optimizer.zero_grad(set_to_none=True)
        torch.stack(logits).float().logsumexp(2).sum().backward()
        optimizer.step()
        yield 0.0


def our_steps(
    net: EmbedNet, data: TrainingSet, args: argparse.Namespace, device: torch.device, flags: dict
) -> Iterator:
    """An epoch of train.py, or with ``bare`` the `bare_steps` of its network; yields like `published_steps`."""
    flags = {"amp": "off", "compile": False, "cache": "auto", "bare": False, **flags}
    net = net.to(memory_format=torch.channels_last)
    optimizer = train.build_optimizer(net, SimpleNamespace(optim="sgd", lr=0.008))
    sampler = IdentitySampler(data.visible_labels, data.thermal_labels, args.batch_size // 2, PER_IMG)
    batches = TimedBatches(data, sampler, (args.img_h, args.img_w), device, flags["cache"])
    amp, fast_net = train.AMP[flags["amp"]], torch.compile(net) if flags["compile"] else net
    batch = next(batches.epoch(0))
    if flags["bare"]:
        yield from bare_steps(fast_net, optimizer, batch, amp)
    update = partial(
        train.train_step, fast_net, optimizer, hc_loss=HeteroCenterLoss(), w_hc=0.6, amp=amp,
        scaler=torch.amp.GradScaler() if flags["amp"] == "fp16" else None,
    )  # fmt: skip
    if device.type == "cuda":
        update(batch)
        torch.cuda.set_sync_debug_mode("warn")  # a step that waits for the GPU says so here
        update(batch)
        torch.cuda.set_sync_debug_mode("default")
    history = torch.zeros(sampler.steps, 3, dtype=torch.float64, device=device)
    for _ in train.train_epoch(update, batches, 0, SimpleNamespace(lr=0.008, w_hc=0.6, epochs=0), history):
        yield batches.gathered.seconds


def measure(args: argparse.Namespace, flags: dict) -> dict[str, float]:
    """Images per second, milliseconds a step and of it for data, and peak memory in GiB; in a process of its own."""
    device = utils.select_device(args.gpu)
    if flags.get("published"):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.manual_seed(1)
    else:
        utils.seed_everything(1, flags.get("deterministic", True), flags.get("tf32", False))
    data = noise((args.warmup + args.steps) * args.batch_size // 2, (args.img_h, args.img_w))
    net = EmbedNet(PERSONS, arch=args.arch, pretrained="none").to(device).train()
    if flags.get("published"):
        steps = published_steps(net, data, args, device)
    else:
        steps = our_steps(net, data, args, device, flags)
    for _ in range(args.warmup):
        waited = next(steps)
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    for _ in range(args.steps):
        waited_in_all = next(steps)
    synchronize(device)
    step = (time.perf_counter() - start) / args.steps
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
    return {"images/s": args.batch_size / step, "step ms": 1000 * step,
            "data wait ms": 1000 * (waited_in_all - waited) / args.steps, "peak GiB": memory / 2**30}  # fmt: skip


def benchmark_train(args: argparse.Namespace) -> None:
    fast = {"amp": "bf16", "compile": True}
    variants = {
        "the published way": {"published": True},
        "ours": {},
        "the bare network": {"bare": True},
        "ours, --amp bf16": {"amp": "bf16"},
        "the bare network, bf16": {"amp": "bf16", "bare": True},
        "ours, --compile": {"compile": True},
        "ours, --amp bf16 --compile": fast,
        "the bare network, bf16, compiled": {**fast, "bare": True},
    }
    on_gpu = torch.cuda.is_available()
    args.steps, args.warmup = args.steps or (100 if on_gpu else 5), args.warmup or (20 if on_gpu else 2)
    if on_gpu:
        variants["ours, --cache host"] = {"cache": "host"}
        variants["ours, --no-deterministic"] = {"deterministic": False}
        variants["ours, --tf32"] = {"tf32": True}
        variants["the bare network, tf32"] = {"tf32": True, "bare": True}
        variants["ours, --amp fp16"] = {"amp": "fp16"}
        variants["the bare network, fp16"] = {"amp": "fp16", "bare": True}
        variants["ours, --amp bf16 --compile --no-deterministic"] = {**fast, "deterministic": False}
    for end in args.only or ():
        if not any(name.endswith(end) for name in variants):
            utils.fail(f"--only {end}: no row ends so; there are {'; '.join(variants)}")
    found = {}
    context = multiprocessing.get_context("spawn")
    for name, flags in variants.items():
        if args.only and not name.endswith(tuple(args.only)):
            continue
        with ProcessPoolExecutor(1, mp_context=context) as pool:  # memory and compiled code of others do not count
            found[name] = pool.submit(measure, args, flags).result()
        if len(found) == 1:
            print(f"{'':48s}" + "".join(f"{key:>14s}" for key in found[name]) + f"{'to first':>10s}")
        ratio = found[name]["images/s"] / next(iter(found.values()))["images/s"]
        print(
            f"{name:48s}" + "".join(f"{value:14.2f}" for value in found[name].values()) + f"{ratio:9.2f}x", flush=True
        )
    if args.json:
        device = f"{platform.machine()}, {torch.get_num_threads()} threads"
        if on_gpu:
            device = torch.cuda.get_device_name(utils.select_device(args.gpu))
        flags = {name: value for name, value in vars(args).items() if name != "benchmark"}
        content = {"device": device, "flags": flags, "versions": utils.versions(), "results": found}
        with utils.whole_file(args.json) as path, open(path, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)


def build_parser() -> argparse.ArgumentParser:
    parser = utils.Parser(
        prog="python -m tools.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    evaluate = commands.add_parser("evaluate", help="the scoring of test.py")
    evaluate.add_argument("--repeats", type=utils.number(int, 1), default=5, help="the best counts (%(default)s)")
    evaluate.set_defaults(benchmark=benchmark_evaluate)
    data = commands.add_parser("data", help="training batches")
    steps = commands.add_parser("train", help="training steps")
    for command, benchmark in ((data, benchmark_data), (steps, benchmark_train)):
        add = command.add_argument
        add("--batch-size", type=utils.number(int, 8, 1025), default=64, help="images of both modalities (%(default)s)")
        add(
            "--img-h",
            type=utils.number(int, least_height(), utils.LARGEST + 1),
            default=288,
            help="image height (%(default)s)",
        )
        add("--img-w", type=utils.number(int, 1, utils.LARGEST + 1), default=144, help="image width (%(default)s)")
        add("--gpu", default="0", help="number of the GPU (%(default)s)")
        command.set_defaults(benchmark=benchmark)
    n, workers = utils.number(int, 1, 10**4), utils.number(int, 0, 257)
    add = data.add_argument
    add("--steps", type=n, default=30, help="batches to time (%(default)s)")
    add("--workers", type=workers, nargs="+", default=[0, 1, 2],
        help="of the loader that takes an image at a time: the best is 1.0x (0 1 2)")  # fmt: skip
    add = steps.add_argument
    add("--workers", type=workers, default=4, help="of the published way's loader (%(default)s)")
    add("--steps", type=n, help="steps to time (100 on a GPU, 5 on a CPU)")
    add("--warmup", type=n, help="steps before the clock starts (20 on a GPU, 2 on a CPU)")
    add("--arch", choices=["resnet50", "resnet18"], default="resnet50", help="both streams (%(default)s)")
    add("--only", nargs="+", metavar="NAME", help="the rows whose names end so, like 'way', 'bf16' or 'compile'")
    add("--json", help="file to write the results to")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if getattr(args, "batch_size", 0) % (2 * PER_IMG):
        utils.fail(f"--batch-size {args.batch_size} is not a multiple of {2 * PER_IMG}")
    if getattr(args, "json", None):
        if not args.json.endswith(".json"):
            utils.fail(f"--json {args.json}: give a name that ends in .json")
        utils.make_folder(os.path.dirname(args.json), "--json")
    args.benchmark(args)


if __name__ == "__main__":
    utils.run(main)
