"""Measure speed and memory on this machine.

    python -m tools.benchmark evaluate      scoring at the datasets' sizes, beside a loop over queries and a bare sort

Ratios are taken in one run, each the best of a few repeats; they mean more than the seconds.
"""

import argparse
import time
import tracemalloc
from collections.abc import Callable
from functools import partial

import numpy as np

import utils
from eval_metrics import Distances, eval_sysu

SIZES = {  # (queries, gallery, persons)
    "SYSU-MM01 single-shot": (3803, 301, 96),
    "SYSU-MM01 multi-shot": (3803, 3010, 96),
    "RegDB": (2060, 2060, 206),
}
LARGE = (20_000, 50_000, 1_000)


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


def build_parser() -> argparse.ArgumentParser:
    parser = utils.Parser(
        prog="python -m tools.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    evaluate = commands.add_parser("evaluate", help="the scoring of test.py")
    evaluate.add_argument("--repeats", type=utils.number(int, 1), default=5, help="the best counts (%(default)s)")
    evaluate.set_defaults(benchmark=benchmark_evaluate)
    return parser


def main() -> None:
    args = build_parser().parse_args()
    args.benchmark(args)


if __name__ == "__main__":
    utils.run(main)
