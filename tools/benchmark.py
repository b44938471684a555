"""Measure speed and memory on this machine.

    python -m tools.benchmark evaluate      scoring at the datasets' sizes, beside a loop over queries and a bare sort

Ratios are taken in one run, each the best of a few repeats; they mean more than the seconds.
"""

import argparse
import resource
import time
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
    """Rank-1 and mAP a query at a time, with Python lists along each ranking: the way the field's codes score."""
    ranking = np.argsort(distmat, axis=1, kind="stable")
    firsts, precisions = [], []
    for order, pid, cam in zip(ranking, q_pids, q_camids, strict=True):
        order = order[~((cam == 3) & (g_camids[order] == 2))]
        hits = g_pids[order] == pid
        if not hits.any():
            continue
        persons = list(dict.fromkeys(g_pids[order]))  # in order of their first image
        firsts.append(persons.index(pid))
        precision = np.array([found / place for place, found in enumerate(hits.cumsum(), 1)])
        precisions.append((precision * hits).sum() / hits.sum())
    return np.mean(np.array(firsts) == 0), np.mean(precisions)


def seconds(function: Callable, repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


def peak_memory() -> float:
    """The most memory that this process ever had, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def benchmark_evaluate(args: argparse.Namespace) -> None:
    queries, gallery, persons = LARGE  # first, for the peak only ever grows
    rng = np.random.default_rng(0)
    features = [rng.standard_normal((n, 128), dtype=np.float32) for n in (queries, gallery)]
    before = peak_memory()
    taken = seconds(lambda: eval_sysu(Distances(*features), *lists(queries, gallery, persons)), 1)
    print(
        f"{queries} x {gallery} from features, in row blocks: {taken:.1f} s, {peak_memory() - before:.2f} GiB of memory"
    )
    print(f"(all of these distances at once would be {queries * gallery * 4 / 2**30:.2f} GiB)\n")

    print(
        f"{'':24s}{'queries x gallery':>20s}{'ours':>10s}{'loop':>10s}{'sort':>10s}{'loop/ours':>11s}{'ours/sort':>11s}"
    )
    for name, (queries, gallery, persons) in SIZES.items():
        distmat = rng.standard_normal((queries, gallery), dtype=np.float32)
        where = lists(queries, gallery, persons)
        scores, expected = eval_sysu(distmat, *where), loop_over_queries(distmat, *where)
        np.testing.assert_allclose((scores.cmc[0], scores.mAP), expected, atol=1e-9)
        ours = seconds(partial(eval_sysu, distmat, *where), args.repeats)
        loop = seconds(partial(loop_over_queries, distmat, *where), 1)
        sort = seconds(partial(np.sort, distmat, axis=1), args.repeats)
        times = "".join(f"{t:8.3f} s" for t in (ours, loop, sort))
        print(f"{name:24s}{f'{queries} x {gallery}':>20s}{times}{loop / ours:10.0f}x{ours / sort:10.1f}x")


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
