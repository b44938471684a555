"""Put the results of several test.py runs into one table, beside chance.

python -m tools.report CE=log/test_a.json "CE + HC=log/test_b.json"
"""

import argparse
import itertools
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
COUNTS = ("queries", "without_match", "gallery_images", "gallery_persons")


def build_parser() -> argparse.ArgumentParser:
    parser = utils.Parser(
        prog="python -m tools.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", metavar="[LABEL=]FILE", help="JSON file of test.py or tools.score")
    parser.add_argument("--features", default="fc", help="features to show: fc, pool5, … (%(default)s)")
    return parser


def read_results(path: str) -> dict:
    """Of a JSON file: ``rows`` {(protocol, features): {measure: mean over the trials}}, ``counts`` and ``options``.

    Raises:
        OSError: it is missing, or is not such a file.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} not found: give a JSON file that test.py wrote")
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        rows = {
            (row["protocol"], row["feature"]): {measure: float(row["mean"][measure]) for measure in MEASURES}
            for row in content["results"]
        }
        counts = {protocol: {what: found[what] for what in COUNTS} for protocol, found in content["counts"].items()}
        features = {feature for _, feature in rows} | {"chance"}
        if not counts or {*itertools.product(counts, features)} != {*rows}:
            raise ValueError("rows are missing")
        return {"rows": rows, "counts": counts, "options": [str(option) for option in content["options"]]}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise OSError(f"{path} is not a JSON file that test.py wrote: give one, or run test.py again") from None


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
    results = {}
    for entry in args.results:
        label, _, path = entry.rpartition("=")
        results[label or os.path.basename(path).removesuffix(".json")] = read_results(path)
    if len(results) < len(args.results):
        utils.fail("two results have one label: tell them apart with LABEL=FILE")
    first_label, first = next(iter(results.items()))
    for label, found in results.items():
        features = dict.fromkeys(feature for _, feature in found["rows"] if feature != "chance")
        if args.features not in features:
            utils.fail(f"{label} has no {args.features} features, but {', '.join(features)}: choose with --features")
        if found["counts"] != first["counts"]:
            utils.fail(f"{label} and {first_label} are of other protocols or other images: compare like with like")
    print(table(results, args.features))


if __name__ == "__main__":
    utils.run(main)
