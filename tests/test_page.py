"""The page of tools.report: what stands in it, and how a browser shows it."""

import functools
import http.server
import json
import re
import shutil
import subprocess
import threading

import pytest
from conftest import RUN, result, run_here

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# How wide the images and the text of a page are in a frame of some width, as a browser sees it.
FRAME = """<!DOCTYPE html><iframe width="{width}" height="800" src="report.html" onload="
  const page = this.contentDocument, images = [...page.images].map(image => image.naturalWidth);
  document.title = JSON.stringify([images, page.documentElement.scrollWidth]);"></iframe>"""


@pytest.fixture(scope="module")
def page(sysu_run, tmp_path_factory):
    """A folder with report.html: two results, of which one has its features, run and checkpoint, and another run."""
    out, tree = tmp_path_factory.mktemp("page"), sysu_run["data"]
    for name, flags in (("best", ["--save_features", out / "f.npz"]), ("last", [])):
        net = sysu_run["models"] / f"{RUN}_{name}.t"
        run_here("test.py", "--data_path", tree, "--resume", net, "--log_path", sysu_run["logs"], *flags)
    found = [f"<{name}>={sysu_run['logs'] / f'test_{RUN}_{name}_all-single.json'}" for name in ("best", "last")]
    run_here("-m tools.report", *found, f"a run={sysu_run['logs'] / RUN}", "--out", out / "report.html")
    return out


def test_it_stands_alone_and_holds_all(page, sysu_run):
    content = (page / "report.html").read_text()
    assert not re.search(r"(src|href)=[\"'](?!data:)|url\(|@import|<script", content)
    headings = re.findall("<h2>(.*)</h2>", content)
    assert headings == ["Results", "CMC", "Training", "Embedding", "Distances", "Ranked: &lt;best&gt;",
                        "Stripes: &lt;best&gt;", "Stripes: &lt;last&gt;"]  # fmt: skip
    assert (content.count("image/png"), content.count("image/jpeg")) == (4, 3) and len(content) < 5 * 2**20
    assert "fc features (synthetic, SYSU-MM01 layout)" in content
    rows = json.loads((sysu_run["logs"] / f"test_{RUN}_last_all-single.json").read_text())["results"]
    row = next(row for row in rows if row["feature"] == "fc")
    cells = [f"<td>{100 * row['mean'][name]:.2f} ± {100 * row['std'][name]:.2f}</td>" for name in row["mean"]]
    assert "".join(cells) in content and content.count("<td>") == 3 * 6  # chance and two results


def test_a_result_alone(call, tmp_path):
    """Without features, checkpoint or data there are still the table, also on the screen, and the CMC."""
    flags = {"dataset": "regdb", "data_path": None}
    (tmp_path / "r.json").write_text(result(networks=[{"checkpoint": "gone.t"}], flags=flags))
    screen = call("-m tools.report", tmp_path / "r.json", "--out", tmp_path / "new" / "r.html")
    content = (tmp_path / "new" / "r.html").read_text()
    assert re.findall("<h2>(.*)</h2>", content) == ["Results", "CMC"]
    assert screen.count("50.00 ± 50.00") == 2 * 6 and "r.html" in screen and "gone.t" in screen


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(page, tmp_path, width):
    """At the width of a phone and of a desk: no errors, images load, the page as a whole does not scroll sideways."""
    (page / "frame.html").write_text(FRAME.format(width=width))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=page)
    handler.func.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
        done = subprocess.run(
            [BROWSER, *flags.split(), "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
             f"--user-data-dir={tmp_path}", "--dump-dom", f"http://127.0.0.1:{server.server_port}/frame.html"],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        server.shutdown()
    assert ":CONSOLE" not in done.stderr
    images, wide = json.loads(re.search("<title>(.*)</title>", done.stdout)[1])
    assert len(images) == 7 and min(images) > 500 and wide <= width
