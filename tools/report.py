"""Put the results of several test.py runs into one table, beside chance.

python -m tools.report CE=log/test_a.json "CE + HC=log/test_b.json"
"""

import argparse
import json
import os

import utils

MEASURES = {
    "rank1": "rank-1",
    "rank5": "rank-5",
    "rank10": "rank-10",
    "rank20": "rank-20",
    "mAP": "mAP",
    "mINP": "mINP",
}


def build_parser() -> argparse.ArgumentParser:
    parser = utils.Parser(
        prog="python -m tools.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", metavar="[LABEL=]FILE", help="JSON file that test.py wrote")
    parser.add_argument("--features", choices=["fc", "pool5"], default="fc", help="features to show (%(default)s)")
    return parser


def read_results(path: str) -> dict[tuple[str, str], dict[str, float]]:
    """(protocol, features) -> mean over the trials of each measure."""
    try:
        with open(path, encoding="utf-8") as file:
            return {(row["protocol"], row["feature"]): row["mean"] for row in json.load(file)["results"]}
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} not found: give a JSON file that test.py wrote") from None
    except (ValueError, KeyError, TypeError):
        raise OSError(f"{path} is not a JSON file that test.py wrote") from None


def table(results: dict[str, dict], features: str) -> str:
    """``results``: label -> what `read_results` gives. A block per protocol, a row per label, percent."""
    first = next(iter(results.values()))
    width = max(map(len, [*results, "chance"])) + 2
    lines = []
    for protocol in dict.fromkeys(protocol for protocol, _ in first):
        lines.append(f"\n{protocol:{width + 24}s}" + "".join(f"{title:>9s}" for title in MEASURES.values()))
        rows = {"chance": first[protocol, "chance"]}
        rows |= {name: found[protocol, features] for name, found in results.items()}
        for name, mean in rows.items():
            lines.append(f"{'':24s}{name:{width}s}" + "".join(f"{100 * mean[key]:9.2f}" for key in MEASURES))
    return "\n".join(lines) + f"\n\n{features} features, %, means over the trials"


def main() -> None:
    args = build_parser().parse_args()
    results = {}
    for entry in args.results:
        label, _, path = entry.rpartition("=")
        results[label or os.path.basename(path).removesuffix(".json")] = read_results(path)
    if len(results) < len(args.results):
        utils.fail("two results have one label: tell them apart with LABEL=FILE")
    for label, found in results.items():
        for protocol, _ in next(iter(results.values())):
            if (protocol, args.features) not in found:
                utils.fail(
                    f"{label} has no {args.features} results of {protocol}: compare results of the same protocols"
                )
    print(table(results, args.features))


if __name__ == "__main__":
    utils.run(main)
