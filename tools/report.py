"""Compare tests and trainings: a table on the screen, and a page with tables and figures.

    python -m tools.report CE=log/test_a.json "CE + HC=log/test_b.json" --out report.html

Give results of test.py or tools.score, or folders of runs, log/<run>. A file of results names what
else belongs to it: the run's metrics.jsonl beside it, the features that test.py --save-features
wrote or tools.score read, the checkpoint and the data. Figures whose files are missing are left
out, and the screen says so. The page is one file, figures included, and needs no network. --search
links a page of tools.search.
"""

import argparse
import base64
import html
import io
import os
import re
import string
import sys
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

# `python tools/report.py` would search for modules in tools/ alone.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from eval_metrics import MEASURES
from tools import figures
from tools.results_files import (
    Features,
    ProtocolScores,
    SavedResults,
    check_comparable,
    format_percent,
    label_files,
    read_features,
    read_metrics,
    read_results,
)

PAGE = string.Template(
    """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: auto; padding: 1rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; overflow-wrap: normal; }
th, td { padding: .25rem .5rem; text-align: right; border-bottom: 1px solid #8888; white-space: nowrap; }
th:first-child { text-align: left; position: sticky; left: 0; background: Canvas; }
img { width: 100%; min-width: 40rem; background: #ffffff; border-radius: 6px; display: block; }
</style>
<h1>$title</h1>
$sections
</html>
"""  # noqa: E501
)

Metrics = list[dict[str, float]]  # the values of each epoch, see `read_metrics`


# ---- reading ------------------------------------------------------------------------------------


def read_inputs(paths: dict[str, str]) -> tuple[dict[str, SavedResults], dict[str, Metrics]]:
    """Read the results, and the metrics of runs, both by label.

    The metrics are those of the runs among the paths, and of the runs beside files of results.
    """
    results = {}
    metrics = {}
    for label, path in paths.items():
        if os.path.isdir(path) or path.endswith(".jsonl"):
            metrics[label] = read_metrics(path)
            continue
        result = read_results(path)
        results[label] = result
        if not result.checkpoint:
            continue
        run = re.sub(r"_(last|best|epoch_\d+)\.t$", "", os.path.basename(result.checkpoint))
        metrics_file = os.path.join(os.path.dirname(path), run, "metrics.jsonl")
        if os.path.isfile(metrics_file):
            metrics[label] = read_metrics(metrics_file)
        else:
            report_missing(label, "training curves", "metrics", metrics_file)
    return results, metrics


def read_saved_features(results: dict[str, SavedResults], feature: str) -> dict[str, Features]:
    """Read the features behind the results, by label, where their file is still there."""
    features = {}
    for label, result in results.items():
        if os.path.isfile(result.features_file):
            features[label] = read_features(result.features_file, result.dataset, feature)
        else:
            figures_of_features = "embedding, distances and ranked queries"
            report_missing(label, figures_of_features, "features", result.features_file)
    return features


def report_missing(label: str, figure_names: str, file_kind: str, path: str) -> None:
    """Say on the screen which figures of a result are left out, and what they need."""
    reason = f"its results name no {file_kind}"
    if path:
        reason = f"{path} not found"
    print(f"left out: {figure_names} of {label}: {reason}")


# ---- tables -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """The scores under one protocol."""

    caption: str
    rows: dict[str, list[str]]  # by label, a cell for each of `MEASURES`


def build_tables(results: dict[str, SavedResults], feature: str) -> list[Table]:
    """Build a table for each protocol: the rows are chance, then each label."""
    first = next(iter(results.values()))
    tables = []
    for protocol, counts in first.counts.items():
        rows = {"chance": format_scores(first.rows["chance"][protocol])}
        for label, result in results.items():
            rows[label] = format_scores(result.rows[feature][protocol])
        tables.append(Table(f"{protocol}: {counts}", rows))
    return tables


def format_scores(scores: ProtocolScores) -> list[str]:
    """Format each of `MEASURES` in percent, of several trials with the deviation."""
    cells = []
    for name in MEASURES:
        deviation = None
        if len(scores.cmc) > 1:
            deviation = 100 * scores.std[name]
        cells.append(format_percent(100 * scores.mean[name], deviation))
    return cells


def build_notes(results: dict[str, SavedResults], feature: str) -> list[str]:
    """Build notes on what the numbers of the tables are, and what each label stands for."""
    first = next(iter(results.values()))
    notes = [f"{feature} features ({first.data_name}): %, mean ± deviation over the trials"]
    for label, result in results.items():
        note = f"{label}: {os.path.basename(result.checkpoint) or 'no checkpoint'}"
        if result.options:
            note += f"; options: {', '.join(result.options)}"
        notes.append(note)
    return notes


def tables_as_text(tables: list[Table], notes: list[str]) -> str:
    """Format the tables and notes for the screen."""
    lines = []
    for table in tables:
        width = max(len(label) for label in table.rows) + 2
        lines.append("")
        lines.append(table.caption)
        lines.append(text_line("", list(MEASURES.values()), width))
        for label, cells in table.rows.items():
            lines.append(text_line(label, cells, width))
    lines.append("")
    return "\n".join(lines + notes)


def text_line(label: str, cells: list[str], width: int) -> str:
    columns = "".join(f"{cell:>15s}" for cell in cells)
    return f"  {label:{width}s}{columns}"


def tables_as_html(tables: list[Table], notes: list[str]) -> str:
    """Format the tables and notes for the page."""
    lines = [f"<p>{html.escape(note)}</p>" for note in notes]
    for table in tables:
        lines.append(f"<p>{html.escape(table.caption)}</p>")
        lines.append("<div class=wide><table>")
        lines.append(html_row("", list(MEASURES.values()), tag="th"))
        for label, cells in table.rows.items():
            lines.append(html_row(label, cells, tag="td"))
        lines.append("</table></div>")
    return "\n".join(lines)


def html_row(label: str, cells: list[str], tag: str) -> str:
    columns = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
    return f"<tr><th>{html.escape(label)}</th>{columns}</tr>"


# ---- figures ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """A figure of the page with its heading and an explanation."""

    heading: str
    text: str
    figure: Figure
    image_format: str = "png"  # "jpeg" for photographs


def draw_sections(
    results: dict[str, SavedResults], metrics: dict[str, Metrics], feature: str
) -> Iterator[Section]:
    """Yield all figures that can be drawn, one at a time: they take memory."""
    if results:
        text = "The share of queries with a match among the first ranks."
        yield Section("CMC", text, figures.cmc(results, feature))
    if metrics:
        text = "Means of each epoch, and rank-1 and mAP where epochs were tested."
        data_name = next(iter(results.values())).data_name if results else ""
        yield Section("Training", text, figures.curves(metrics, data_name))
    features = read_saved_features(results, feature)
    if features:
        text = (
            "A mark is an image; a line joins a person's two centers, which the Hetero-Center "
            "loss pulls together."
        )
        yield Section("Embedding", text, figures.embedding(features))
        text = (
            "The less the two overlap, the better an image of the other modality tells a person "
            "from others."
        )
        yield Section("Distances", text, figures.distances(features))
    for label, result in results.items():
        if os.path.isdir(result.data_path):
            yield from draw_photographs(label, result, features.get(label))
        else:
            report_missing(label, "ranked queries and stripes", "data", result.data_path)


def draw_photographs(
    label: str, result: SavedResults, features: Features | None
) -> Iterator[Section]:
    """Yield the figures of one result that show images of its data."""
    if features:
        text = (
            "Queries, each with its ten nearest gallery images: green ✓ the same person, "
            "red ✗ another one."
        )
        trial = features.first_trial({})
        figure = figures.ranked(features, trial, result.data_path, rows=1)
        yield Section(f"Ranked: {label}", text, figure, "jpeg")
    if os.path.isfile(result.checkpoint):
        text = "How much each location contributes to its stripe's feature."
        figure = figures.attention(result.checkpoint, result.dataset, result.data_path)
        yield Section(f"Stripes: {label}", text, figure, "jpeg")
    else:
        report_missing(label, "stripes", "checkpoint", result.checkpoint)


def section_as_html(section: Section) -> str:
    image = io.BytesIO()
    options = {"optimize": True}
    if section.image_format == "jpeg":
        options = {"quality": 85}
    figures.save_figure(section.figure, image, section.image_format, pil_kwargs=options)
    encoded = base64.b64encode(image.getvalue()).decode()
    heading = html.escape(section.heading)
    source = f"data:image/{section.image_format};base64,{encoded}"
    return (
        f"<h2>{heading}</h2>\n"
        f"<p>{html.escape(section.text)}</p>\n"
        f'<div class=wide><img alt="{heading}" src="{source}"></div>'
    )


def search_as_html(search_page: str, report_page: str) -> str:
    """Return a heading and a link to a page of tools.search."""
    path = os.path.relpath(search_page, os.path.dirname(report_page) or ".")
    address = urllib.parse.quote(os.fsencode(path.replace(os.sep, "/")))
    text = "queries without labels, and the gallery images nearest to each"
    return f'<h2>Search</h2>\n<p><a href="{address}">{html.escape(path)}</a>: {text}</p>'


# ---- command line -------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = utils.new_parser(__doc__)
    parser.add_argument(
        "files",
        nargs="+",
        metavar="[LABEL=]FILE",
        help="JSON file of test.py or tools.score, or folder of a run",
    )
    parser.add_argument(
        "--features", default="fc", help="features to show: fc, pool5, ... (%(default)s)"
    )
    search_help = "search.html of tools.search, to link"
    parser.add_argument("--search", type=utils.file_path, metavar="FILE", help=search_help)
    out_help = "page to write (%(default)s)"
    parser.add_argument("--out", type=utils.file_path, default="report.html", help=out_help)
    return parser


def write_page(path: str, labels: list[str], sections: list[str]) -> None:
    title = html.escape(f"Hetero-Center loss: {', '.join(labels)}")
    page = PAGE.substitute(title=title, sections="\n".join(sections))
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with (
        utils.atomic_write(path) as partial,
        # Labels may be names of files, which need not be UTF-8.
        open(partial, "w", encoding="utf-8", errors="backslashreplace") as file,
    ):
        file.write(page)


def main() -> None:
    args = utils.parse(build_parser())
    if not args.out.endswith(".html"):
        raise utils.InputError(f"--out {args.out}: give a name that ends in .html")
    if args.search and not os.path.isfile(args.search):
        raise utils.InputError(f"--search {args.search} not found: tools.search writes it")
    paths = label_files(args.files)
    results, metrics = read_inputs(paths)
    sections = []
    if results:
        check_comparable(results, args.features)
        tables = build_tables(results, args.features)
        notes = build_notes(results, args.features)
        print(tables_as_text(tables, notes))
        sections.append("<h2>Results</h2>\n" + tables_as_html(tables, notes))
    for section in draw_sections(results, metrics, args.features):
        sections.append(section_as_html(section))
    if args.search:
        sections.append(search_as_html(args.search, args.out))
    write_page(args.out, list(results | metrics), sections)
    print(f"\nthe same with figures: {args.out}")


if __name__ == "__main__":
    utils.run(main)
