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
import resource
import time
import tracemalloc
from collections.abc import Callable, Iterator
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
from model import EmbedNet

SIZES = {  # (queries, gallery, persons)
    "SYSU-MM01 single-shot": (3803, 301, 96),
    "SYSU-MM01 multi-shot": (3803, 3010, 96),
    "RegDB": (2060, 2060, 206),
}
LARGE = (20_000, 50_000, 1_000)
PER_IMG, PERSONS = 4, 395


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


def rate(batches: Iterator, steps: int, images: int) -> float:
    """Images per second of ``steps`` batches, after one that warms up."""
    next(batches)
    start = time.perf_counter()
    for _ in range(steps):
        next(batches)
    return steps * images / (time.perf_counter() - start)


def benchmark_data(args: argparse.Namespace) -> None:
    device = utils.select_device(args.gpu)
    size, half = (args.img_h, args.img_w), args.batch_size // 2
    data = noise(max(1000, args.steps * half), size)
    sampler = IdentitySampler(data.visible_labels, data.thermal_labels, half, PER_IMG)
    found = {}
    for workers in args.workers:
        loader = DataLoader(ImageByImage(data, sampler, size), half, num_workers=workers)
        found[f"image by image, {workers} workers"] = rate(iter(loader), args.steps, 2 * half)
    best = max(found.values())
    batches = TrainBatches(data, sampler, size, device, "host")
    found["ours, on the host"] = rate(batches._gather(sampler.epoch(0)), args.steps, 2 * half)
    found["ours, to the network's input"] = rate(batches.epoch(0), args.steps, 2 * half)
    for name, images in found.items():
        print(f"{name:32s}{images:10,.0f} images/s{images / best:8.1f}x")


def published_steps(net: EmbedNet, optimizer, data: TrainingSet, args: argparse.Namespace, device) -> Iterator:
    """The published loop in stock PyTorch; yields the seconds that each step waited for its batch."""
    size, half = (args.img_h, args.img_w), args.batch_size // 2
    sampler = IdentitySampler(data.visible_labels, data.thermal_labels, half, PER_IMG)
    loader = iter(DataLoader(ImageByImage(data, sampler, size), half, num_workers=args.workers[-1]))
    while True:
        start = time.perf_counter()
        visible, thermal, visible_labels, thermal_labels = (x.to(device) for x in next(loader))
        waited = time.perf_counter() - start
        logits, feats = net(visible, thermal)
        labels = torch.cat([visible_labels, thermal_labels])
        loss, half = 0.0, len(visible)
        for stripe, feat in zip(logits, feats, strict=True):
            centers = [x.unflatten(0, (-1, PER_IMG)).mean(1) for x in (feat[:half], feat[half:])]
            loss = loss + F.cross_entropy(stripe, labels) + 0.6 * ((centers[0] - centers[1]) ** 2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        yield waited


def our_steps(net: EmbedNet, optimizer, data: TrainingSet, args: argparse.Namespace, device, flags: dict) -> Iterator:
    """train.py's loop, or with ``bare`` its network on one batch over and over."""
    size, half = (args.img_h, args.img_w), args.batch_size // 2
    sampler = IdentitySampler(data.visible_labels, data.thermal_labels, half, PER_IMG)
    batches = TrainBatches(data, sampler, size, device).epoch(0)
    amp, fast_net = train.AMP[flags.get("amp", "off")], torch.compile(net) if flags.get("compile") else net
    batch = next(batches)
    while True:
        start = time.perf_counter()
        if not flags.get("bare"):
            batch = next(batches)
        waited = time.perf_counter() - start
        if flags.get("bare"):
            with torch.autocast(device.type, amp, enabled=amp is not None):
                logits, _ = fast_net(*batch[:2])
            optimizer.zero_grad(set_to_none=True)
            torch.stack(logits).float().logsumexp(2).sum().backward()
            optimizer.step()
        else:
            train.train_step(fast_net, optimizer, batch, HeteroCenterLoss(), 0.6, amp)
        yield waited


def measure(args: argparse.Namespace, flags: dict) -> dict[str, float]:
    """Images per second, milliseconds a step and of it for data, and peak memory in GiB; in a process of its own."""
    device = utils.select_device(args.gpu)
    published = flags.get("published", False)
    if published:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.manual_seed(1)
    else:
        utils.seed_everything(1, flags.get("deterministic", True), flags.get("tf32", False))
    data = noise((args.steps + 5) * args.batch_size // 2, (args.img_h, args.img_w))
    net = EmbedNet(PERSONS, arch=args.arch, pretrained="none").to(device).train()
    if published:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.008, momentum=0.9, weight_decay=5e-4, nesterov=True)
        steps = published_steps(net, optimizer, data, args, device)
    else:
        net = net.to(memory_format=torch.channels_last)
        optimizer = train.build_optimizer(net, SimpleNamespace(optim="sgd", lr=0.008))
        steps = our_steps(net, optimizer, data, args, device, flags)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(args.warmup):
        next(steps)
    synchronize()
    start = time.perf_counter()
    waited = sum(next(steps) for _ in range(args.steps))
    synchronize()
    seconds = (time.perf_counter() - start) / args.steps
    on_gpu = device.type == "cuda"
    memory = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"images/s": args.batch_size / seconds, "step ms": 1000 * seconds,
            "data wait ms": 1000 * waited / args.steps, "peak GiB": memory / 2**30}  # fmt: skip


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
    if torch.cuda.is_available():
        variants["ours, --no-deterministic"] = {"deterministic": False}
        variants["ours, --tf32"] = {"tf32": True}
        variants["ours, --amp bf16 --compile --no-deterministic"] = {**fast, "deterministic": False}
    if args.only and not any(name.endswith(tuple(args.only)) for name in variants):
        utils.fail(f"--only {' '.join(args.only)}: no row ends so; there are {', '.join(variants)}")
    found = {}
    context = multiprocessing.get_context("spawn")
    for name, flags in variants.items():
        if args.only and not name.endswith(tuple(args.only)):
            continue
        with ProcessPoolExecutor(1, mp_context=context) as pool:  # memory and compiled code of others do not count
            found[name] = pool.submit(measure, args, flags).result()
        if len(found) == 1:
            print(f"{'':48s}" + "".join(f"{key:>14s}" for key in found[name]) + f"{'ratio':>8s}")
        ratio = found[name]["images/s"] / next(iter(found.values()))["images/s"]
        print(
            f"{name:48s}" + "".join(f"{value:14.2f}" for value in found[name].values()) + f"{ratio:7.2f}x", flush=True
        )
    if args.json:
        with utils.whole_file(args.json) as partial, open(partial, "w", encoding="utf-8") as file:
            json.dump(
                {"flags": {**vars(args), "benchmark": "train"}, "versions": utils.versions(), "results": found},
                file,
                indent=1,
            )


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
    for command, benchmark, n, workers in ((data, benchmark_data, 30, (0, 1, 2)), (steps, benchmark_train, 5, (4,))):
        add = command.add_argument
        add("--batch-size", type=utils.number(int, 8, 1025), default=64, help="images of both modalities (%(default)s)")
        add("--img-h", type=utils.number(int, 81, utils.LARGEST + 1), default=288, help="image height (%(default)s)")
        add("--img-w", type=utils.number(int, 1, utils.LARGEST + 1), default=144, help="image width (%(default)s)")
        add("--steps", type=utils.number(int, 1, 10**4), default=n, help="batches to time (%(default)s)")
        add("--workers", type=utils.number(int, 0), nargs="+", default=workers,
            help="of the loader that takes an image at a time (%(default)s)")  # fmt: skip
        add("--gpu", default="0", help="number of the GPU (%(default)s)")
        command.set_defaults(benchmark=benchmark)
    add = steps.add_argument
    add("--arch", choices=["resnet50", "resnet18"], default="resnet50", help="both streams (%(default)s)")
    add("--warmup", type=utils.number(int, 1), default=2, help="steps before the clock starts (%(default)s)")
    add("--only", nargs="+", metavar="NAME", help="the rows whose names end so")
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
