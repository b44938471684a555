"""The page of tools.report: what it holds, and how a browser shows it."""

import functools
import html
import http.server
import json
import re
import shutil
import subprocess
import threading
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
from conftest import RUN, features_file, result, run_here

from eval_metrics import MEASURES

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((shutil.which(name) for name in BROWSERS if shutil.which(name)), None)
BROWSER_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--dump-dom",
)
# Measures the page in a frame of some width: how wide its images and its content are.
FRAME = """<!DOCTYPE html><iframe width="{width}" height="800" src="report.html" onload="
  const page = this.contentDocument, images = [...page.images].map(image => image.naturalWidth);
  document.title = JSON.stringify([images, page.documentElement.scrollWidth]);"></iframe>"""


@pytest.fixture(scope="module")
def page(sysu_run, tmp_path_factory) -> Path:
    """A folder with report.html of two results and a run, and with their logs.

    The first result has its features, its run and its checkpoint, the second lacks the features.
    """
    out = tmp_path_factory.mktemp("page")
    logs = out / "logs"
    shutil.copytree(sysu_run["logs"] / RUN, logs / RUN)
    inputs = []
    for name, more_flags in (("best", ["--save-features", out / "f.npz"]), ("last", [])):
        net = sysu_run["models"] / f"{RUN}_{name}.t"
        flags = ["--data-path", sysu_run["data"], "--resume", net, "--log-path", logs]
        run_here("test.py", *flags, *more_flags)
        inputs.append(f"<{name}>={logs / f'test_{RUN}_{name}_all-single.json'}")
    inputs.append(f"a run={logs / RUN}")
    run_here("-m tools.report", *inputs, "--out", out / "report.html")
    return out


def headings_of(content: str) -> list[str]:
    return [html.unescape(heading) for heading in re.findall("<h2>(.*)</h2>", content)]


def test_page_stands_alone(page):
    content = (page / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=[\"'](?!data:)|url\(|@import|<script", content)
    assert len(content) < 5 * 2**20


def test_page_holds_all_figures(page):
    content = (page / "report.html").read_text(encoding="utf-8")
    assert headings_of(content) == [
        "Results",
        "CMC",
        "Training",
        "Embedding",
        "Distances",
        "Ranked: <best>",
        "Stripes: <best>",
        "Stripes: <last>",
    ]
    assert "<best>" not in content
    assert content.count("image/png") == 4
    assert content.count("image/jpeg") == 3


def test_page_holds_the_scores(page):
    content = (page / "report.html").read_text(encoding="utf-8")
    file = page / f"logs/test_{RUN}_last_all-single.json"
    for row in json.loads(file.read_text())["results"]:
        if row["feature"] == "fc":
            mean = row["mean"]
            std = row["std"]
    cells = [f"<td>{100 * mean[name]:.2f} ± {100 * std[name]:.2f}</td>" for name in MEASURES]
    assert f"<tr><th>&lt;last&gt;</th>{''.join(cells)}</tr>" in content
    assert content.count("<td>") == 3 * len(MEASURES)  # chance and two results
    assert "fc features (synthetic, SYSU-MM01 layout)" in content


def test_a_result_alone_gives_table_and_cmc(output_of, tmp_path):
    """Without its run, features and data. The table is on the screen, too, and what is left out."""
    flags = {"dataset": "regdb", "data_path": None}
    text = result(networks=[{"checkpoint": "gone.t"}], flags=flags, options=["flip"])
    (tmp_path / "r.json").write_text(text)
    out = tmp_path / "new" / "r.html"
    screen = output_of("-m tools.report", tmp_path / "r.json", "--out", out)
    content = out.read_text(encoding="utf-8")
    assert headings_of(content) == ["Results", "CMC"]
    assert screen.count("50.00 ± 50.00") == 2 * len(MEASURES)
    assert str(out) in screen
    for words in ("r: gone.t; options: flip", "3 queries (0 without a match, not counted)"):
        assert words in screen
        assert words in content
    lines = [line for line in screen.splitlines() if line.startswith("left out: ")]
    assert lines == [
        f"left out: training curves of r: {tmp_path}/gone.t/metrics.jsonl not found",
        "left out: embedding, distances and ranked queries of r: its results name no features",
        "left out: ranked queries and stripes of r: its results name no data",
    ]


@pytest.mark.parametrize(
    ("network", "save_features"),
    [
        ({"trial": 3}, "f_{trial}.npz"),  # of test.py --trial all
        ({"trial": None, "features": "f_3.npz"}, None),  # of tools.score
    ],
)
def test_features_of_a_result_are_drawn(output_of, tmp_path, monkeypatch, network, save_features):
    monkeypatch.chdir(tmp_path)
    values = np.random.default_rng(0).normal(size=(24, 8))
    features_file(tmp_path / "f_3.npz", camids=[1, 2] * 12, fc=values)
    flags = {"dataset": "regdb", "save_features": save_features}
    (tmp_path / "r.json").write_text(result(networks=[network, {"trial": 4}], flags=flags))
    screen = output_of("-m tools.report", "r.json", "--out", "r.html")
    headings = ["Results", "CMC", "Embedding", "Distances"]
    assert headings_of((tmp_path / "r.html").read_text(encoding="utf-8")) == headings
    assert "left out: ranked queries and stripes of r: " in screen


def test_metrics_beside_a_result_without_a_checkpoint_are_not_its_own(output_of, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 0, "CE": 2.5}\n')
    (tmp_path / "r.json").write_text(result())
    output_of("-m tools.report", tmp_path / "r.json", "--out", tmp_path / "r.html")
    assert headings_of((tmp_path / "r.html").read_text(encoding="utf-8")) == ["Results", "CMC"]


def test_a_single_trial_has_no_deviation(output_of, tmp_path):
    content = json.loads(result())
    for row in content["results"]:
        del row["trials"][1]
    (tmp_path / "r.json").write_text(json.dumps(content))
    screen = output_of("-m tools.report", tmp_path / "r.json", "--out", tmp_path / "r.html")
    assert screen.count("50.00") == 2 * len(MEASURES)
    assert "50.00 ±" not in screen


def test_a_search_is_linked(output_of, error_of, sysu_run, tmp_path):
    run = str(sysu_run["logs"] / RUN)
    search = tmp_path / "a search & more" / "search.html"
    page = tmp_path / "reports" / "report.html"
    flags = ["--search", search, "--out", page]
    assert str(search) in error_of("-m tools.report", run, *flags)
    search.parent.mkdir()
    search.touch()
    output_of("-m tools.report", run, *flags)
    (link,) = re.findall('href="([^"]*)"', page.read_text(encoding="utf-8"))
    assert (page.parent / urllib.parse.unquote(link)).samefile(search)


def test_a_run_alone_gives_its_curves(output_of, sysu_run, tmp_path):
    out = tmp_path / "r.html"
    output_of("-m tools.report", f"a & b={sysu_run['logs'] / RUN}", "--out", out)
    content = out.read_text(encoding="utf-8")
    assert headings_of(content) == ["Training"]
    assert "<title>Hetero-Center loss: a &amp; b</title>" in content


@pytest.mark.parametrize(
    "changes",
    [
        {"flags": {"dataset": "sysu"}},
        {"counts": {"v2t": {**json.loads(result())["counts"]["v2t"], "queries": 4}}},
    ],
)
def test_results_of_other_images_are_not_compared(error_of, tmp_path, changes):
    (tmp_path / "a.json").write_text(result())
    (tmp_path / "b.json").write_text(result(**changes))
    out = tmp_path / "r.html"
    message = error_of("-m tools.report", tmp_path / "a.json", tmp_path / "b.json", "--out", out)
    assert "b and a are of other protocols or images" in message


class SilentHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass


def dump_in_browser(folder: Path, name: str, profile: Path) -> subprocess.CompletedProcess:
    """stdout: the document after its scripts have run; stderr: the messages of the browser."""
    handler = functools.partial(SilentHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{name}"
        command = [BROWSER, *BROWSER_FLAGS, f"--user-data-dir={profile}", url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        server.shutdown()
    return done


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [390, 1280])
def test_page_fits_a_phone_and_a_desk(page, tmp_path, width):
    """No errors, images load, and the page as a whole does not scroll sideways."""
    (page / "frame.html").write_text(FRAME.format(width=width))
    done = dump_in_browser(page, "frame.html", tmp_path)
    assert ":CONSOLE" not in done.stderr
    title = re.search("<title>(.*)</title>", done.stdout)[1]
    image_widths, page_width = json.loads(title)
    assert len(image_widths) == 7
    assert min(image_widths) > 500
    assert page_width <= width
