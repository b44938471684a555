"""What the tools have in common: where they may be started, ~ in paths, text beyond ASCII."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, features_file, result, run_here

import utils
from tools import figures, make_synthetic, report, score, sweep, visualize
from tools.results_files import label_files

# Runs scripts, each with its flags, as `python SCRIPT FLAGS` does; but torch, matplotlib and scipy
# are imported once. A text file that is opened without an encoding is an error.
RUN_SCRIPTS = """
import json, os, runpy, sys, warnings
import matplotlib.figure, scipy.stats, torch, torchvision

warnings.filterwarnings("error", category=EncodingWarning, module="__main__|tools")
for script, *flags in json.loads(sys.argv[1]):
    sys.stdout.flush()
    if os.fork() == 0:
        sys.path[0] = os.path.dirname(script)
        sys.argv = [script, *flags]
        status = 0
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as stop:
            status = stop.code
        sys.stdout.flush()
        os._exit(status)  # at once: to clean up takes seconds
    _, status = os.wait()
    if status:
        sys.exit(f"{script} has failed")
"""
# Text files are ASCII unless an encoding is named, and the screen shows ASCII alone.
ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}


def write_results_of_sweep(*words: str) -> None:
    """A result for each run of a sweep with these flags."""
    for run in sweep.plan_runs(utils.parse(sweep.build_parser(), list(words))):
        file = run.folder / run.result_pattern.replace("*", "v2t")
        file.parent.mkdir(parents=True)
        file.write_text(result())


def test_tools_run_in_any_folder_and_with_any_encoding(tmp_path):
    sweep_flags = ["--vary=w_hc=0,1", "--", "--dataset=regdb"]
    write_results_of_sweep(f"--out={tmp_path}/sweep", *sweep_flags)
    features_file(tmp_path / "f.npz")
    content = json.loads(result(networks=[{"checkpoint": "权重.t"}]))
    (tmp_path / "r.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    commands = [
        ["score.py", "f.npz"],
        ["report.py", "r.json"],
        ["visualize.py", "cmc", "r.json"],
        ["sweep.py", "--out=new", "--dry-run"],
        ["sweep.py", "--out=sweep", *sweep_flags],
        ["make_synthetic.py", "--dataset=regdb", "--ids=5", "--workers=1", "--out=tree"],
        ["benchmark.py", "--help"],
    ]
    words = [[str(ROOT / "tools" / name), *flags] for name, *flags in commands]
    done = subprocess.run(
        [sys.executable, "-X", "warn_default_encoding", "-c", RUN_SCRIPTS, json.dumps(words)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | ASCII,
    )
    assert done.returncode == 0, done.stderr
    for line_part in (
        "all trials: log/score_f_all-single.json",
        "50.00 \\xb1 50.00",
        "the same with figures: report.html",
        "cmc.png\n",
        f"{ROOT / 'train.py'} --seed=1",
        "w_hc=0  ",
        "tree: written",
        "usage: benchmark.py",
    ):
        assert line_part in done.stdout
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "r: 权重.t" in page
    assert "50.00 ± 50.00" in page


# ---- the folder of the user ---------------------------------------------------------------------


def parse(tool, *words: str) -> dict:
    return vars(utils.parse(tool.build_parser(), list(words)))


def test_every_path_may_begin_with_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = f"{tmp_path}/x"

    flags = parse(score, "~/x", "~/x", "--log-path=~/x", "--rand-perm=~/x", "--mat=~/x")
    assert flags["files"] == [path, path]
    assert flags["log_path"] == flags["rand_perm"] == flags["mat"] == path

    flags = parse(visualize, "ranked", "~/x", "--data-path=~/x", "--out=~/x")
    assert flags["file"] == flags["data_path"] == flags["out"] == path
    flags = parse(visualize, "attention", "~/x", "--out=~/x")
    assert flags["checkpoint"] == flags["out"] == path
    for command in ("curves", "cmc", "embedding", "distances"):
        assert parse(visualize, command, "a=~/x", "--out=~/x")["out"] == path
    assert parse(visualize, "samples", "--out=~/x")["out"] == path

    assert parse(report, "a=~/x", "--out=~/x")["out"] == path
    assert parse(sweep, "--out=~/x")["out"] == path
    assert parse(make_synthetic, "--dataset=sysu", "--out=~/x")["out"] == path


def test_a_label_may_stand_before_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "w=1.json").touch()  # its "=" does not end a label
    assert label_files(["~/w=1.json", "~/a.npz", "b=~/a.npz"]) == {
        "w=1": f"{tmp_path}/w=1.json",
        "a": f"{tmp_path}/a.npz",
        "b": f"{tmp_path}/a.npz",
    }


def test_a_sweep_leaves_tildes_to_its_scripts(monkeypatch, tmp_path, output_of):
    """They expand them; so does the sweep where it needs a value of its own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = ["--out=~/runs", "--dry-run", "--vary=pretrained=~/a.pth", "--test=--save-features ~/f"]
    out = output_of("-m tools.sweep", *flags, "--", "--data-path=~/data")
    _, training, test = out.split(" && ")
    assert "--pretrained=~/a.pth" in training
    assert f"--log-path={tmp_path}/runs/sysu_id_" in training
    assert f"--data-path={tmp_path}/data" in test
    assert f"--log-path={tmp_path}/runs/sysu_id_" in test


# ---- screens ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("encoding", "plus_minus"), [("ascii", b"\\xb1"), ("cp1252", b"\xb1")])
def test_no_line_is_lost_on_a_screen_that_lacks_its_characters(
    monkeypatch, tmp_path, encoding, plus_minus
):
    screen = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", screen)
    label = "中文 ± \udcff"  # the last one stands for a byte that is not UTF-8
    results = tmp_path / f"{label}.json"
    results.write_text(result())
    run_here("-m tools.report", results, f"b={results}", "--out", tmp_path / f"{label}.html")
    run_here("-m tools.visualize", "cmc", results, "--out", tmp_path / f"{label}.svg")
    file = features_file(tmp_path / f"{label}.npz")
    run_here("-m tools.score", file, "--log-path", tmp_path)
    screen.flush()
    lines = screen.buffer.getvalue().splitlines()
    shown_label = b"\\u4e2d\\u6587 " + plus_minus + b" \\udcff"
    scores = b"50.00 " + plus_minus + b" 50.00"
    assert sum(line.startswith(b"  " + shown_label) for line in lines) == 1
    assert sum(scores in line for line in lines) == 3  # chance and two results
    for name in (b".html", b".svg", b"_all-single.json"):
        assert any(line.endswith(shown_label + name) for line in lines)
    page = (tmp_path / f"{label}.html").read_text(encoding="utf-8")
    assert "<tr><th>中文 ± \\udcff</th>" in page


def test_table_and_plot_of_a_sweep_take_any_characters(monkeypatch, tmp_path, output_of, caplog):
    monkeypatch.setattr(figures, "families_with", lambda characters: [])  # no font has them
    values = "pretrained=中文,\udcff"
    words = [f"--out={tmp_path}", f"--vary={values}", "--", "--dataset=regdb"]
    write_results_of_sweep(*words)
    out = output_of("-m tools.sweep", "--jobs=0", *words)
    table = Path(tmp_path, "pretrained.csv").read_text(encoding="utf-8")
    for cell in ("pretrained=中文", "pretrained=\\udcff"):
        assert f"\n{cell} " in out
        assert f"\n{cell},seed=1,v2t,fc,50.0," in table
    assert (tmp_path / "pretrained.png").exists()
    assert caplog.messages == ["no installed font has these characters: 中 文"]
