"""The page of tools.report: what stands in it, and how a browser shows it."""

import functools
import http.server
import json
import re
import shutil
import subprocess
import threading

import numpy as np
import pytest
from conftest import RUN
from test_bad_input import result

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# What a page looks like in a frame of some width, as a browser sees it.
FRAME = """<!DOCTYPE html><iframe width="{width}" height="800" src="report.html" onload="
  const page = this.contentDocument, style = this.contentWindow.getComputedStyle.bind(this.contentWindow);
  document.title = JSON.stringify({{
    images: [...page.images].map(image => image.naturalWidth), overflow: page.documentElement.scrollWidth - {width},
    text: style(page.body).color, back: style(page.body).backgroundColor,
    faint: style(page.querySelector('figcaption')).color, sizes: [...page.querySelectorAll('td, p, li, figcaption')]
      .map(element => parseFloat(style(element).fontSize)),
  }});"></iframe>"""


@pytest.fixture(scope="module")
def page(sysu_run, tmp_path_factory):
    """A folder with report.html: two results, of which one has its features, run and checkpoint, and another run."""
    from conftest import succeed

    out, tree = tmp_path_factory.mktemp("page"), sysu_run["data"]
    for name, flags in (("best", ["--save_features", out / "f.npz"]), ("last", [])):
        net = sysu_run["models"] / f"{RUN}_{name}.t"
        succeed("test.py", "--data_path", tree, "--resume", net, "--log_path", sysu_run["logs"], *flags)
    found = [f"<{name}>={sysu_run['logs'] / f'test_{RUN}_{name}_all-single.json'}" for name in ("best", "last")]
    text = succeed("-m tools.report", *found, f"a run={sysu_run['logs'] / RUN}", "--out", out / "report.html")
    (out / "text").write_text(text)
    return out


def test_it_stands_alone_and_holds_all(page):
    content = (page / "report.html").read_text()
    assert not re.search(r"(src|href)=[\"'](?!data:)|url\(|@import|<script", content)
    headings = re.findall("<h2>(.*)</h2>", content)
    assert headings == ["Results", "CMC", "Training", "Embedding", "Distances", "Ranked: &lt;best&gt;",
                        "Stripes: &lt;best&gt;", "Stripes: &lt;last&gt;"]  # fmt: skip
    assert content.count("<img ") == 7 and len(content) < 5 * 2**20  # fit for a mail
    cells = re.findall(r"<td>([\d.]+)</td>", content)
    numbers = re.findall(r"\d+\.\d\d", (page / "text").read_text())
    assert cells == numbers and len(cells) == 3 * 6  # chance and two results, in the page as on the screen


def test_a_result_alone(call, tmp_path, capsys):
    """Without features, checkpoint or data there are still the table and the CMC."""
    (tmp_path / "r.json").write_text(
        result(networks=[{"checkpoint": 3}], flags={"dataset": "regdb", "data_path": None})
    )
    call("-m tools.report", tmp_path / "r.json", "--out", tmp_path / "new" / "r.html")
    content = (tmp_path / "new" / "r.html").read_text()
    assert re.findall("<h2>(.*)</h2>", content) == ["Results", "CMC"] and "need a file of test.py" in content
    assert str(tmp_path / "new" / "r.html") in capsys.readouterr().out


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser(page, tmp_path, width, dark):
    """At the width of a phone and of a desk, light and dark: no errors, images load, text is legible."""
    (page / "frame.html").write_text(FRAME.format(width=width))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=page)
    handler.func.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
        done = subprocess.run(
            [BROWSER, *flags.split(), "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
             f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--user-data-dir={tmp_path}", "--dump-dom",
             f"http://127.0.0.1:{server.server_port}/frame.html"],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        server.shutdown()
    assert ":CONSOLE" not in done.stderr
    seen = json.loads(re.search("<title>(.*)</title>", done.stdout)[1])
    assert len(seen["images"]) == 7 and min(seen["images"]) > 500
    assert seen["overflow"] <= 0  # nothing but pictures and tables scrolls sideways
    assert min(seen["sizes"]) >= 13
    brightness = {
        name: np.mean([int(x) for x in re.findall(r"\d+", seen[name])[:3]]) for name in ("text", "back", "faint")
    }
    assert (brightness["back"] < 60) == dark
    assert min(abs(brightness[name] - brightness["back"]) for name in ("text", "faint")) > 130
