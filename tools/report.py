"""Put the results of several test.py runs into one table, beside chance.

python -m tools.report CE=log/test_a.json "CE + HC=log/test_b.json"
"""

import argparse

import utils
from tools.visualize import MEASURES, check_alike, labelled, read_results


def build_parser() -> argparse.ArgumentParser:
    parser = utils.Parser(
        prog="python -m tools.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", metavar="[LABEL=]FILE", help="JSON file of test.py or tools.score")
    parser.add_argument("--features", default="fc", help="features to show: fc, pool5, … (%(default)s)")
    return parser


def table(results: dict[str, dict], features: str) -> str:
    """``results``: label -> what `read_results` gives. A block per protocol, a row per label, percent."""
    first = next(iter(results.values()))
    width = max(map(len, [*results, "chance"])) + 2
    lines = []
    for protocol, counts in first["counts"].items():
        lines.append(
            f"\n{protocol}: {counts['queries']} queries ({counts['without_match']} without a match, not counted), "
            f"{counts['gallery_images']} gallery images of {counts['gallery_persons']} persons"
        )
        lines.append(f"{'':{width + 2}s}" + "".join(f"{title:>9s}" for title in MEASURES.values()))
        rows = {"chance": first["rows"][protocol, "chance"]}
        rows |= {label: found["rows"][protocol, features] for label, found in results.items()}
        for label, mean in rows.items():
            lines.append(f"  {label:{width}s}" + "".join(f"{100 * mean[key]:9.2f}" for key in MEASURES))
    lines.append(f"\n{features} features, %, means over the trials")
    lines += [f"{label}: {', '.join(found['options'])}" for label, found in results.items() if found["options"]]
    return "\n".join(lines)


def main() -> None:
    args = build_parser().parse_args()
    results = {label: read_results(path) for label, path in labelled(args.results).items()}
    check_alike(results, args.features)
    print(table(results, args.features))


if __name__ == "__main__":
    utils.run(main)
