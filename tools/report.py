"""Gather what some tests and trainings came to: a table on the screen, and a page with tables and pictures.

    python -m tools.report CE=log/test_a.json "CE + HC=log/test_b.json" --out report.html

Give results of test.py, or folders of runs, log/<run>. What belongs to a result is found by what it tells: the run's
metrics.jsonl beside it, the features that test.py --save_features wrote, the checkpoint and the data. Without them
their pictures are left out. The page is one file, pictures included, and needs no network.
"""

import base64
import html
import io
import os
import re
from collections.abc import Iterator

import utils
from eval_metrics import MEASURES
from tools import visualize
from tools.visualize import Result, check_alike, labelled, read_features, read_metrics, read_results

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


def build_parser() -> utils.Parser:
    parser = utils.Parser(prog="python -m tools.report", description=__doc__)
    add = parser.add_argument
    add("files", nargs="+", metavar="[LABEL=]FILE", help="JSON file of test.py or tools.score, or folder of a run")
    add("--features", default="fc", help="features to show: fc, pool5, … (%(default)s)")
    add("--out", default="report.html", help="page to write (%(default)s)")
    return parser


def gather(files: dict[str, str]) -> tuple[dict[str, Result], dict[str, list[dict]]]:
    """By label, the results, and the metrics of the runs: of those that are given, and of those beside a result."""
    results, metrics = {}, {}
    for label, path in files.items():
        if os.path.isdir(path) or path.endswith(".jsonl"):
            metrics[label] = read_metrics(path)
            continue
        results[label] = read_results(path)
        run = re.sub(r"_(last|best|epoch_\d+)\.t$", "", os.path.basename(results[label].checkpoint))
        if os.path.isfile(os.path.join(os.path.dirname(path), run, "metrics.jsonl")):
            metrics[label] = read_metrics(os.path.join(os.path.dirname(path), run))
    return results, metrics


def rows(results: dict[str, Result], protocol: str, feature: str) -> Iterator[tuple[str, list[str]]]:
    """Label and cells, chance first: of each measure the mean over the trials and, of several, their deviation."""
    first = next(iter(results.values()))
    found = {"chance": first.rows["chance"]} | {label: result.rows[feature] for label, result in results.items()}
    for label, own in found.items():
        mean, std, trials = own[protocol]
        several = len(trials) > 1
        yield label, [f"{100 * mean[key]:.2f}" + f" ± {100 * std[key]:.2f}" * several for key in MEASURES]


def notes(results: dict[str, Result], feature: str) -> list[str]:
    """What the numbers of the tables are, and what each label stands for."""
    first = next(iter(results.values()))
    found = [f"{feature} features ({first.data}): %, mean ± deviation over the trials"]
    for label, result in results.items():
        options = f"; options: {', '.join(result.options)}" if result.options else ""
        found.append(f"{label}: {os.path.basename(result.checkpoint) or 'no checkpoint'}{options}")
    return found


def table(results: dict[str, Result], feature: str) -> str:
    """For the screen: a block per protocol, a row per label."""
    width, lines = max(map(len, [*results, "chance"])) + 2, []
    for protocol, counts in next(iter(results.values())).counts.items():
        lines.append(f"\n{protocol}: {counts}")
        for label, cells in [("", MEASURES.values()), *rows(results, protocol, feature)]:
            lines.append(f"  {label:{width}s}" + "".join(f"{cell:>15s}" for cell in cells))
    return "\n".join([*lines, "", *notes(results, feature)])


def html_tables(results: dict[str, Result], feature: str) -> str:
    what, *labels = map(html.escape, notes(results, feature))
    parts = [f"<p>{what}</p>"]
    for protocol, counts in next(iter(results.values())).counts.items():
        body = "<tr><th></th>" + "".join(f"<th scope=col>{title}</th>" for title in MEASURES.values()) + "</tr>"
        for label, cells in rows(results, protocol, feature):
            cells = "".join(f"<td>{cell}</td>" for cell in cells)
            body += f"\n<tr><th scope=row>{html.escape(label)}</th>{cells}</tr>"
        caption, wide = html.escape(f"{protocol}: {counts}"), f"<div class=wide><table>{body}</table></div>"
        parts.append(f"<figure><figcaption>{caption}</figcaption>{wide}</figure>")
    return "\n".join([*parts, "<ul>", *(f"<li>{label}</li>" for label in labels), "</ul>"])


def pictures(results: dict[str, Result], metrics: dict[str, list[dict]], feature: str) -> Iterator[tuple]:
    """Heading, words, picture and its format of all that can be drawn; photographs are JPEG."""
    if results:
        words = "The share of queries with a match among the first ranks."
        yield "CMC", words, visualize.cmc(results, feature), "png"
    if metrics:
        words = "Means of each epoch; rank-1 and mAP of those that were tested."
        data = next(iter(results.values())).data if results else ""
        yield "Training", words, visualize.curves(metrics, data), "png"
    features = {
        label: read_features(found.save_features, found.dataset, feature)
        for label, found in results.items()
        if os.path.isfile(found.save_features)
    }
    if features:
        words = "A mark is an image; a line joins a person's two centers, which the Hetero-Center loss pulls together."
        yield "Embedding", words, visualize.embedding(features), "png"
        words = "The less the two overlap, the better an image of the other modality tells a person from others."
        yield "Distances", words, visualize.distances(features), "png"
    there = {label: found for label, found in results.items() if os.path.isdir(found.data_path)}
    for label in [label for label in there if label in features]:
        words = "Queries, each with its ten nearest gallery images: green ✓ the same person, red ✗ another one."
        figure = visualize.ranked(features[label], features[label].search({}), there[label].data_path)
        yield f"Ranked: {label}", words, figure, "jpeg"
    for label, found in there.items():
        if os.path.isfile(found.checkpoint):
            words = "How much a place adds to its stripe's feature, from the least to the most of the stripe."
            figure = visualize.attention(found.checkpoint, found.dataset, found.data_path)
            yield f"Stripes: {label}", words, figure, "jpeg"


def page(results: dict[str, Result], metrics: dict[str, list[dict]], feature: str) -> str:
    """The whole page, as HTML."""
    sections = ["<h2>Results</h2>\n" + html_tables(results, feature)] if results else []
    for title, words, figure, form in pictures(results, metrics, feature):
        data = io.BytesIO()
        figure.savefig(data, format=form, pil_kwargs={"quality": 85} if form == "jpeg" else {"optimize": True})
        source = f"data:image/{form};base64,{base64.b64encode(data.getvalue()).decode()}"
        image = f'<div class=wide><img alt="{html.escape(title)}" src="{source}"></div>'
        caption = f"<figcaption>{html.escape(words)}</figcaption>"
        sections.append(f"<h2>{html.escape(title)}</h2>\n<figure>{caption}{image}</figure>")
    found = [*dict.fromkeys([*results, *metrics])]
    labels = ", ".join(found) if len(found) < 5 else f"{len(found)} results and runs"
    return PAGE.format(title=html.escape(f"Hetero-Center loss: {labels}"), sections="\n".join(sections))


def main() -> None:
    args = build_parser().parse_args()
    if not args.out.endswith(".html"):
        raise ValueError(f"--out {args.out}: give a name that ends in .html")
    results, metrics = gather(labelled(args.files))
    if results:
        check_alike(results, args.features)
        print(table(results, args.features))
    text = page(results, metrics, args.features)
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    with utils.whole_file(args.out) as partial, open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
    print(f"\nthe same with pictures: {args.out}")


if __name__ == "__main__":
    utils.run(main)
