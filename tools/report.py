"""Gather what some tests and trainings came to: a table on the screen, and a page with tables and pictures.

    python -m tools.report CE=log/test_a.json "CE + HC=log/test_b.json" --out report.html

Give results of test.py, or folders of runs, log/<run>. What belongs to a result is found by what it tells: the run's
metrics.jsonl beside it, the features that --save_features wrote, the checkpoint and the data. The page is one file,
pictures included, and needs no network.
"""

import argparse
import base64
import html
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from PIL import Image

import utils
from eval_metrics import MEASURES
from tools import visualize
from tools.visualize import check_alike, labelled, read_features, read_metrics, read_results

PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --text: #1a1a1a; --faint: #595959; --back: #ffffff; --line: #d0d0d0; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --text: #ececec; --faint: #b4b4b4; --back: #17191c; --line: #44484d; }}
}}
body {{ font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
        max-width: 75rem; margin: auto; padding: 1rem; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.6rem; }}
h2 {{ font-size: 1.25rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line); }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; overflow-wrap: normal; }}
figcaption {{ text-align: left; color: var(--faint); padding: .3rem 0; }}
th, td {{ padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }}
th:first-child {{ text-align: left; position: sticky; left: 0; background: var(--back); }}
figure {{ margin: 1.5rem 0; }}
@media (max-width: 40rem) {{ th, td {{ padding: .25rem .35rem; font-size: .85rem; }} }}
img {{ width: 100%; min-width: 40rem; background: #ffffff; border-radius: 6px; display: block; }}
</style>
<h1>{title}</h1>
{sections}
</html>
"""


class Report(NamedTuple):
    """What is gathered, by label."""

    results: dict[str, dict]  # as `read_results` gives them
    metrics: dict[str, list[dict]]  # as `read_metrics` gives them
    features: dict[str, visualize.Features]
    checkpoints: dict[str, str]
    roots: dict[str, str]  # the datasets' folders


def build_parser() -> argparse.ArgumentParser:
    parser = utils.Parser(
        prog="python -m tools.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("files", nargs="+", metavar="[LABEL=]FILE", help="JSON file of test.py or tools.score, or folder of a run")
    add("--features", default="fc", help="features to show: fc, pool5, … (%(default)s)")
    add("--out", type=Path, default=Path("report.html"), help="page to write (%(default)s)")
    return parser


def gather(files: dict[str, str], feature: str) -> Report:
    """Read results and runs, and what they point to, where it is there."""
    report = Report({}, {}, {}, {}, {})
    for label, path in files.items():
        if os.path.isdir(path) or path.endswith(".jsonl"):
            report.metrics[label] = read_metrics(path)
            continue
        report.results[label] = found = read_results(path)
        run = re.sub(r"_(last|best|epoch_\d+)\.t$", "", os.path.basename(found["checkpoint"]))
        if os.path.isfile(os.path.join(os.path.dirname(path), run, "metrics.jsonl")):
            report.metrics[label] = read_metrics(os.path.join(os.path.dirname(path), run))
        if os.path.isfile(found["save_features"]):
            report.features[label] = read_features(found["save_features"], found["dataset"], feature)
        if os.path.isdir(found["data_path"]):
            report.roots[label] = found["data_path"]
            if os.path.isfile(found["checkpoint"]):
                report.checkpoints[label] = found["checkpoint"]
    if report.results:
        check_alike(report.results, feature)
    return report


def rows(results: dict[str, dict], protocol: str, feature: str) -> dict[str, dict]:
    """Label -> means over the trials, chance first."""
    first = next(iter(results.values()))
    return {"chance": first["rows"][protocol, "chance"]} | {
        label: found["rows"][protocol, feature] for label, found in results.items()
    }


def table(results: dict[str, dict], feature: str) -> str:
    """``results``: label -> what `read_results` gives. A block per protocol, a row per label, percent."""
    width, lines = max(map(len, [*results, "chance"])) + 2, []
    for protocol, counts in next(iter(results.values()))["counts"].items():
        lines.append(f"\n{protocol}: {counts}")
        lines.append(f"{'':{width + 2}s}" + "".join(f"{title:>9s}" for title in MEASURES.values()))
        for label, mean in rows(results, protocol, feature).items():
            lines.append(f"  {label:{width}s}" + "".join(f"{100 * mean[key]:9.2f}" for key in MEASURES))
    lines.append(f"\n{feature} features, %, means over the trials")
    lines += [f"{label}: {', '.join(found['options'])}" for label, found in results.items() if found["options"]]
    return "\n".join(lines)


def html_tables(results: dict[str, dict], feature: str) -> str:
    parts = []
    for protocol, counts in next(iter(results.values()))["counts"].items():
        body = "<tr><th></th>" + "".join(f"<th scope=col>{title}</th>" for title in MEASURES.values()) + "</tr>"
        for label, mean in rows(results, protocol, feature).items():
            cells = "".join(f"<td>{100 * mean[key]:.2f}</td>" for key in MEASURES)
            body += f"\n<tr><th scope=row>{html.escape(label)}</th>{cells}</tr>"
        caption = html.escape(f"{protocol}: {counts}")
        table = f"<div class=wide><table>{body}</table></div>"
        parts.append(f"<figure><figcaption>{caption}</figcaption>{table}</figure>")
    parts.append(f"<p>{html.escape(feature)} features, %, means over the trials.</p>\n<ul>")
    for label, found in results.items():
        options = f"; options: {', '.join(found['options'])}" if found["options"] else ""
        checkpoint = os.path.basename(found["checkpoint"]) or "no checkpoint"
        parts.append(f"<li>{html.escape(f'{label}: {checkpoint}{options}')}</li>")
    return "\n".join([*parts, "</ul>"])


def pictures(report: Report, feature: str) -> Iterator[tuple[str, str, Figure]]:
    """Heading, words and picture of all that can be drawn."""
    if report.results:
        words = "The share of queries with a match among the first ranks."
        yield "CMC", words, visualize.cmc(report.results, feature)
    if report.metrics:
        datasets = {visualize.DATASETS[found["dataset"]] for found in report.results.values()}
        where = f"on {datasets.pop()}" if datasets else ""
        yield (
            "Training",
            "Means of each epoch; rank-1 and mAP of those that were tested.",
            visualize.curves(report.metrics, tuple(report.results), where),
        )
    if report.features:
        words = (
            "Each mark is an image; a line joins the centers of a person's visible and infrared images, "
            "whose distance the Hetero-Center loss makes small."
        )
        yield "Embedding", words, visualize.embedding(report.features)
        words = "The less the two overlap, the better an image of the other modality tells a person from others."
        yield "Distances", words, visualize.distances(report.features)
    for label, features in report.features.items():
        if label in report.roots:
            words = "Queries, each with its ten nearest gallery images: green ✓ the same person, red ✗ another one."
            figure = visualize.ranked(features, visualize.first_search(features), report.roots[label])
            yield f"Ranked: {label}", words, figure
    for label, checkpoint in report.checkpoints.items():
        words = "How much each place adds to the feature of its stripe, from the least (0) to the most (1) there."
        dataset = report.results[label]["dataset"]
        yield f"Stripes: {label}", words, visualize.attention_of(checkpoint, dataset, report.roots[label])


def page(report: Report, feature: str) -> str:
    """The whole page, as HTML."""
    sections = ["<h2>Results</h2>\n" + html_tables(report.results, feature)] if report.results else []
    for title, words, figure in pictures(report, feature):
        data, small = io.BytesIO(), io.BytesIO()
        figure.savefig(data, format="png")
        Image.open(data).convert("RGB").quantize(256).save(small, "PNG", optimize=True)  # a page to attach to a mail
        source = base64.b64encode(small.getvalue()).decode()
        image = f'<img alt="{html.escape(title)}" src="data:image/png;base64,{source}">'
        caption = f"<figcaption>{html.escape(words)}</figcaption>"
        sections.append(f"<h2>{html.escape(title)}</h2>\n<figure>{caption}<div class=wide>{image}</div></figure>")
    if report.results and not report.features:
        sections.append("<p>Pictures of features need a file of test.py --save_features.</p>")
    found = [*dict.fromkeys([*report.results, *report.metrics])]
    labels = ", ".join(found) if len(found) < 5 else f"{len(found)} results and runs"
    return PAGE.format(title=html.escape(f"Hetero-Center loss: {labels}"), sections="\n".join(sections))


def main() -> None:
    args = build_parser().parse_args()
    if args.out.suffix != ".html":
        utils.fail(f"--out {args.out}: give a name that ends in .html")
    utils.make_folder(str(args.out.parent), "--out")
    report = gather(labelled(args.files), args.features)
    if report.results:
        print(table(report.results, args.features))
    text = page(report, args.features)
    with utils.whole_file(str(args.out)) as partial:
        Path(partial).write_text(text, encoding="utf-8", errors="backslashreplace")
    print(f"\nthe same with pictures: {args.out}")


if __name__ == "__main__":
    utils.run(main)
