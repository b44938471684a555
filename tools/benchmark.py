"""Measure speed and memory on this machine.

    python -m tools.benchmark evaluate      scoring at the datasets' sizes, beside a loop over queries and a bare sort
    python -m tools.benchmark data          batches of training images, beside an image at a time through torchvision
    python -m tools.benchmark train         training steps, beside the published way
    python -m tools.benchmark scale         training steps shared by 1, 2, 4, ... processes, one for each GPU

Flags of train.py hold here, too, like --arch, --batch-size, --amp bf16 or --compile; those that change the precision
leave the published way as it is. Ratios are taken in one run; they mean more than the seconds.
"""

import argparse
import collections
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
from model import EmbedNet, to_device

SIZES = {  # (queries, gallery, persons)
    "SYSU-MM01 single-shot": (3803, 301, 96),
    "SYSU-MM01 multi-shot": (3803, 3010, 96),
    "RegDB": (2060, 2060, 206),
}
LARGE = (20_000, 50_000, 1_000)
PERSONS = 395
AHEAD = 10  # batches that may be made before they are asked for
PUBLISHED, OURS = "the published way", "ours"


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


def benchmark_evaluate(args: argparse.Namespace, options: argparse.Namespace) -> None:
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


def noise(steps: int, options: argparse.Namespace) -> tuple[TrainingSet, IdentitySampler]:
    """Random images for an epoch of more than ``steps`` batches, and their sampler."""
    rng, images = np.random.default_rng(0), (steps + AHEAD) * options.batch_size
    labels = np.arange(images) % min(PERSONS, images // options.per_img)
    shape = images, options.img_h, options.img_w, 3
    visible, thermal = (rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(2))
    sampler = IdentitySampler(labels, labels, options.batch_size, options.per_img)
    return TrainingSet(visible, thermal, labels, labels), sampler


class ImageByImage(Dataset):
    """The published way to a batch: each image through torchvision's transforms, in the order of a plan."""

    def __init__(self, data: TrainingSet, sampler: IdentitySampler):
        self.data, self.plan = data, [rows.ravel() for rows in sampler.epoch(0)]
        steps = T.ToPILImage(), T.RandomCrop(data.visible.shape[1:3]), T.RandomHorizontalFlip(), T.ToTensor()
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


def benchmark_data(args: argparse.Namespace, options: argparse.Namespace) -> None:
    device, size = utils.select_device(options.gpu), (options.img_h, options.img_w)
    data, sampler = noise(AHEAD + args.steps, options)
    loader = DataLoader(ImageByImage(data, sampler), options.batch_size, num_workers=options.workers)
    ways, first = {f"image by image, {options.workers} workers": loader}, 0.0
    for cache in ("host", "device") if device.type == "cuda" else ("host",):
        batches = TrainBatches(data, sampler, size, device, cache)
        ways[f"ours, gathered on the {cache}"] = batches.gather(np.stack(sampler.epoch(0)))
        ways[f"ours, from the {cache} to the network"] = batches.epoch(0)
    for name, batches in ways.items():
        watch = Watch(AHEAD, args.steps, device)
        collections.deque(watch(batches), maxlen=0)
        found = 2 * args.steps * options.batch_size / watch.seconds
        first = first or found
        print(f"{name:36s}{found:10,.0f} images/s{found / first:8.1f}x", flush=True)


# ---- training -------------------------------------------------------------------------------------------------------


def published_loop(net: EmbedNet, batches: Iterable, device: torch.device, per_img: int) -> None:
    """The published loop in stock PyTorch, with our network."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.008, momentum=0.9, weight_decay=5e-4, nesterov=True)
    for batch in batches:
        visible, thermal, *labels = (x.to(device) for x in batch)
        logits, feats = net(visible, thermal)
        loss = 0.0
        for stripe, feat in zip(logits, feats, strict=True):
            centers = [x.unflatten(0, (-1, per_img)).mean(1) for x in feat.chunk(2)]
            hetero_center = ((centers[0] - centers[1]) ** 2).sum()
            loss = loss + F.cross_entropy(stripe, torch.cat(labels)) + 0.6 * hetero_center
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()


def warn_of_waiting(run: train.Run, batch: tuple) -> None:
    """Let an update that waits for the GPU say so; the first one may."""
    for mode in ("default", "warn"):
        torch.cuda.set_sync_debug_mode(mode)
        train.train_step(run.wrapped_net, run.optimizer, batch, run.terms, train.AMP[run.args.amp], run.scaler)
    torch.cuda.set_sync_debug_mode("default")


def measure(rank: int, processes: int, way: str, args: argparse.Namespace, flags: list[str], file: str) -> None:
    """Time one way to train with these flags of train.py, in processes that share its batches.

    Process 0 writes to ``file`` what it found: images per second, milliseconds a step and of it for data, peak memory.
    """
    os.environ["LOCAL_RANK"] = str(rank)
    if processes > 1:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, init_method=f"file://{file}.store", rank=rank, world_size=processes)
    options = train.build_parser().parse_args(flags)
    device, size = utils.select_device(options.gpu), (options.img_h, options.img_w)
    utils.seed_everything(1 + rank, options.deterministic and way != PUBLISHED, options.tf32 and way != PUBLISHED)
    data, sampler = noise(args.warmup + args.steps, options)
    net = EmbedNet(PERSONS, options.low_dim, options.drop, options.arch, pretrained="none")
    watch = Watch(args.warmup, args.steps, device)
    if way == PUBLISHED:
        torch.multiprocessing.set_start_method("fork", force=True)  # spawned workers would each get all images first
        loader = DataLoader(ImageByImage(data, sampler), options.batch_size, num_workers=options.workers)
        published_loop(net.to(device), watch(loader), device, options.per_img)
    else:
        run = train.Run("benchmark", options, to_device(net, device), PERSONS)
        run.after_step = lambda: None  # which would save
        batches = TrainBatches(data, sampler, size, device, options.cache, utils.share())
        batch, gather = next(batches.epoch(0)), batches.gather
        if device.type == "cuda" and processes == 1:
            warn_of_waiting(run, batch)
        batches.gather = lambda plan: watch(gather(plan))
        train.train_epoch(run, batches, 0)  # train.py's own
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
    step, wait = watch.seconds / args.steps, watch.waited / args.steps
    if rank == 0:
        Path(file).write_text(json.dumps({"images/s": 2 * options.batch_size / step, "step ms": 1000 * step,
                                          "data wait ms": 1000 * wait, "peak GiB": memory / 2**30}))  # fmt: skip
    utils.end_processes()


def measured(processes: int, way: str, args: argparse.Namespace, *flags: str) -> dict[str, float]:
    """What `measure` found, in processes of its own: memory and compiled code of others do not count."""
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "found")
        torch.multiprocessing.spawn(measure, (processes, way, args, [*args.flags, *flags], file), processes)
        return json.loads(Path(file).read_text())


def benchmark_train(args: argparse.Namespace, options: argparse.Namespace) -> None:
    found = {}
    for way in (PUBLISHED, OURS):
        found[way] = values = measured(1, way, args)
        if way == PUBLISHED:
            print(f"{'':24s}" + "".join(f"{key:>14s}" for key in values) + f"{'to first':>10s}")
        ratio = values["images/s"] / found[PUBLISHED]["images/s"]
        print(f"{way:24s}" + "".join(f"{value:14.2f}" for value in values.values()) + f"{ratio:9.2f}x", flush=True)


def benchmark_scale(args: argparse.Namespace, options: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        print("no GPU: processes that share the cores of one CPU; this shows that it works, and no gain\n")
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // args.processes)))
        args.flags.append("--no-sync_bn")
    heads, first = ("images/s", "to one", "not alone"), 0.0
    print(f"{'':10s}{'processes':>10s}{'images':>8s}" + "".join(f"{head:>10s}" for head in heads))
    for growth in ("strong", "weak"):  # one batch is shared; each process brings a batch
        for processes in (n for n in (1, 2, 4, 8, 16) if n <= args.processes):
            batch = options.batch_size * (processes if growth == "weak" else 1)
            if batch // options.per_img % processes:
                continue  # persons are not split
            shared = alone = measured(processes, OURS, args, "--batch-size", str(batch))["images/s"]
            if processes > 1:  # its own part, without the others
                alone = processes * measured(1, OURS, args, "--batch-size", str(batch // processes))["images/s"]
            first = first or shared
            figures = f"{shared:10.1f}{shared / first:9.2f}x{1 - shared / alone:10.0%}"
            print(f"{growth:10s}{processes:10d}{2 * batch:8d}{figures}", flush=True)


def main() -> None:
    parser, on_gpu = utils.Parser(prog="python -m tools.benchmark", description=__doc__), torch.cuda.is_available()
    add = parser.add_argument
    add("command", choices=["evaluate", "data", "train", "scale"])
    add("--steps", type=int, help="steps to time (100; on a CPU 30 of data, 5 of training)")
    add("--warmup", type=int, default=20 if on_gpu else 2, help="steps before the clock starts (%(default)s)")
    add("--processes", type=int, default=torch.cuda.device_count() or 2, help="scale: at most so many (%(default)s)")
    args, args.flags = parser.parse_known_args()
    args.steps = args.steps or (100 if on_gpu else 30 if args.command == "data" else 5)
    options = train.build_parser().parse_args(args.flags)
    if options.per_img < 1 or options.batch_size % options.per_img:
        raise ValueError(f"--batch-size {options.batch_size} is not a multiple of --per_img {options.per_img}")
    globals()[f"benchmark_{args.command}"](args, options)


if __name__ == "__main__":
    utils.run(main)
