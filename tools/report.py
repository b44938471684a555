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
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: auto; padding: 1rem; overflow-wrap: anywhere; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; overflow-wrap: normal; }}
th, td {{ padding: .25rem .5rem; text-align: right; border-bottom: 1px solid #8888; white-space: nowrap; }}
th:first-child {{ text-align: left; position: sticky; left: 0; background: Canvas; }}
img {{ width: 100%; min-width: 40rem; background: #ffffff; border-radius: 6px; display: block; }}
</style>
<h1>{title}</h1>
{sections}
</html>
"""


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


def tables(results: dict[str, Result], feature: str) -> Iterator[tuple[str, list[list[str]]]]:
    """Of each protocol a caption and rows: the heads, chance, and each label; of several trials with the deviation."""
    first = next(iter(results.values()))
    found = {"chance": first.rows["chance"]} | {label: result.rows[feature] for label, result in results.items()}
    for protocol, counts in first.counts.items():
        rows = [["", *MEASURES.values()]]
        for label, own in found.items():
            mean, std, trials = own[protocol]
            several = len(trials) > 1
            cells = [f"{100 * mean[key]:.2f}" + f" ± {100 * std[key]:.2f}" * several for key in MEASURES]
            rows.append([label, *cells])
        yield f"{protocol}: {counts}", rows


def notes(results: dict[str, Result], feature: str) -> list[str]:
    """What the numbers of the tables are, and what each label stands for."""
    first = next(iter(results.values()))
    found = [f"{feature} features ({first.data}): %, mean ± deviation over the trials"]
    for label, result in results.items():
        options = f"; options: {', '.join(result.options)}" if result.options else ""
        found.append(f"{label}: {os.path.basename(result.checkpoint) or 'no checkpoint'}{options}")
    return found


def as_text(results: dict[str, Result], feature: str) -> str:
    width, lines = max(map(len, [*results, "chance"])) + 2, []
    for caption, rows in tables(results, feature):
        lines += ["", caption, *(f"  {row[0]:{width}s}" + "".join(f"{cell:>15s}" for cell in row[1:]) for row in rows)]
    return "\n".join([*lines, "", *notes(results, feature)])


def as_html(results: dict[str, Result], feature: str) -> str:
    parts = [f"<p>{html.escape(note)}</p>" for note in notes(results, feature)]
    for caption, rows in tables(results, feature):
        lines = []
        for label, *cells in rows:
            kind = "td" if label else "th"
            cells = "".join(f"<{kind}>{cell}</{kind}>" for cell in cells)
            lines.append(f"<tr><th>{html.escape(label)}</th>{cells}</tr>")
        parts += [f"<p>{html.escape(caption)}</p>", "<div class=wide><table>", *lines, "</table></div>"]
    return "\n".join(parts)


def pictures(results: dict[str, Result], metrics: dict[str, list[dict]], feature: str) -> Iterator[tuple]:
    """Heading, words, picture and its format of all that can be drawn; photographs are JPEG."""
    if results:
        words = "The share of queries with a match among the first ranks."
        yield "CMC", words, visualize.cmc(results, feature), "png"
    if metrics:
        words = "Means of each epoch, and rank-1 and mAP where epochs were tested."
        data = next(iter(results.values())).data if results else ""
        yield "Training", words, visualize.curves(metrics, data), "png"
    there = {label: found for label, found in results.items() if os.path.isfile(found.save_features)}
    features = {label: read_features(found.save_features, found.dataset, feature) for label, found in there.items()}
    if features:
        words = "A mark is an image; a line joins a person's two centers, which the Hetero-Center loss pulls together."
        yield "Embedding", words, visualize.embedding(features), "png"
        words = "The less the two overlap, the better an image of the other modality tells a person from others."
        yield "Distances", words, visualize.distances(features), "png"
    for label, found in results.items():
        has_images = os.path.isdir(found.data_path)
        if has_images and label in features:
            words = "Queries, each with its ten nearest gallery images: green ✓ the same person, red ✗ another one."
            figure = visualize.ranked(features[label], features[label].search({}), found.data_path, rows=1)
            yield f"Ranked: {label}", words, figure, "jpeg"
        if has_images and os.path.isfile(found.checkpoint):
            words = "How much a place adds to its stripe's feature, from the least to the most of the stripe."
            figure = visualize.attention(found.checkpoint, found.dataset, found.data_path)
            yield f"Stripes: {label}", words, figure, "jpeg"


def page(results: dict[str, Result], metrics: dict[str, list[dict]], feature: str) -> str:
    """The whole page, as HTML."""
    sections = ["<h2>Results</h2>\n" + as_html(results, feature)] if results else []
    for title, words, figure, form in pictures(results, metrics, feature):
        data = io.BytesIO()
        figure.savefig(data, format=form, pil_kwargs={"quality": 85} if form == "jpeg" else {"optimize": True})
        source = f"data:image/{form};base64,{base64.b64encode(data.getvalue()).decode()}"
        image = f'<div class=wide><img alt="{html.escape(title)}" src="{source}"></div>'
        sections.append(f"<h2>{html.escape(title)}</h2>\n<p>{html.escape(words)}</p>\n{image}")
    labels = ", ".join(dict.fromkeys([*results, *metrics]))
    return PAGE.format(title=html.escape(f"Hetero-Center loss: {labels}"), sections="\n".join(sections))


def main() -> None:
    parser = utils.Parser(prog="python -m tools.report", description=__doc__)
    add = parser.add_argument
    add("files", nargs="+", metavar="[LABEL=]FILE", help="JSON file of test.py or tools.score, or folder of a run")
    add("--features", default="fc", help="features to show: fc, pool5, … (%(default)s)")
    add("--out", default="report.html", help="page to write (%(default)s)")
    args = parser.parse_args()
    if not args.out.endswith(".html"):
        raise ValueError(f"--out {args.out}: give a name that ends in .html")
    results, metrics = gather(labelled(args.files))
    if results:
        check_alike(results, args.features)
        print(as_text(results, args.features))
    text = page(results, metrics, args.features)
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    with utils.whole_file(args.out) as partial, open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
    print(f"\nthe same with pictures: {args.out}")


if __name__ == "__main__":
    utils.run(main)
