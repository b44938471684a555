"""Sweeps: the statistics, the grid and its commands, and what a kill leaves to do."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
from conftest import ROOT, TINY, files_of, result

from tools import sweep

SCRIPT = f"""# train.py and test.py with the tiny backbone; if asked to, a step stops the sweep, which started it
import os, runpy, signal, sys, time
if "--lr=0.03" in sys.argv:
    sys.exit("it fails")
sys.path.insert(0, {str(ROOT)!r})
import train
def step(*args, real=train.train_step):
    if os.environ["STATUS"] == "143":
        os.kill(os.getppid(), signal.SIGTERM), time.sleep(1)
    return real(*args)
train.train_step = step
sys.argv.insert(1, os.path.basename(__file__))
runpy.run_path({str(ROOT / "tests/several.py")!r}, run_name="__main__")
"""


def planned(out: Path, vary: str, over: str, flags: list[str], rank1: list) -> list[sweep.Run]:
    """The runs, some with a result of test.py: this rank-1, and the rest of 100% as mAP."""
    args = Namespace(out=out, vary=[sweep.choices(vary)], over=sweep.choices(over), test=[], jobs=1, flags=flags)
    for run, percent in zip(runs := sweep.plan(args), rank1, strict=True):
        if percent:
            content = json.loads(result(networks=[{"synthetic": True}]))
            content["results"][0]["mean"] |= {"rank1": percent / 100, "mAP": 1 - percent / 100}
            file = run.folder / run.results.replace("*", "v2t")
            file.parent.mkdir(parents=True)
            file.write_text(json.dumps(content))
    return runs


def test_statistics(call, tmp_path):
    """By hand: differences 3, 2, 4 have deviation 1 and t(0.975, 2) = 4.3027; -2, -1 have t(0.975, 1) = 12.706."""
    vary, over, regdb = "w_hc=0,1,2,3", "seed=1,2,3", "--dataset=regdb"
    runs = planned(tmp_path, vary, over, [regdb], [50, 52, 54, 53, 54, 58, 0, 50, 53, 40, 0, 0])
    out = call("-m tools.sweep", f"--out={tmp_path}", f"--vary={vary}", f"--over={over}", "--jobs=0", "--", regdb)
    assert [" ".join(line.split()) for line in out.splitlines() if line.startswith("w_hc")] == [
        "w_hc=0 3 52.00 ± 2.00 48.00 ± 2.00",
        "w_hc=1 3 55.00 ± 2.65 +3.00 [+0.52, +5.48] 45.00 ± 2.65 -3.00 [-5.48, -0.52]",
        "w_hc=2 2 51.50 ± 2.12 -1.50 [-7.85, +4.85] 48.50 ± 2.12 +1.50 [-4.85, +7.85]",
        "w_hc=3 1 40.00 60.00",
    ]
    assert "w_hc=2,seed=3,v2t,fc,53.0,50.0,50.0,50.0,47.0,50.0" in (tmp_path / "w_hc.csv").read_text()
    mAP = (figure := sweep.draw([row for run in runs[::-1] for row in run.rows()])).axes[1]
    assert "synthetic, RegDB layout" in figure.get_suptitle() and (tmp_path / "w_hc.png").exists()
    assert [*mAP.lines[0].get_ydata()] == [48, 45, 48.5, 60] and len(mAP.collections[0].get_offsets()) == 9


def test_a_dry_run_prints_whole_commands(call, bad, tmp_path):
    tool = ["-m tools.sweep", f"--out={tmp_path}", "--dry-run", "--jobs=999", "--over=trial=2,3", "--vary"]
    out = call(*tool, "dist-type:thd=l2:0,l1:17", "--test=--flip", "--", "--dataset=regdb", "--gpu=1")
    change, training, test = (command.split() for command in out.splitlines()[3].split(" && "))
    assert change[0] == "cd" and training[:2] == test[:2] == ["env", "OMP_NUM_THREADS=1"] and not [*tmp_path.iterdir()]
    name = "regdb_id_resnet50_lr0.0098_whc0.58_trial3_disttypel1_thd17.0"
    shared, place = {"--dataset=regdb", "--trial=3"}, f"{tmp_path}/{name}_epochs80"
    assert {*training} > shared | {"--dist_type=l1", "--thd=17", place}
    assert {*test} > shared | {"--flip", "--gpu=1", f"{place}/{name}_last.t"}
    assert "--w_hc" in bad(*tool, "w_hc=x") and "--vary" in bad(*tool, "w_hc")


def test_a_sweep_goes_on_after_a_signal_and_past_a_failure(sysu_tree, tmp_path, monkeypatch, capsys):
    _ = (tmp_path / "train.py").write_text(SCRIPT), (tmp_path / "test.py").write_text(SCRIPT)
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    flags = [*TINY, f"--data_path={sysu_tree}", "--batch-size=4", "--per_img=1", "--epochs=1"]
    runs = done, killed, failing = planned(tmp_path, "lr=0.01,0.02,0.03", "seed=1", flags, [50, 0, 0])
    before, tool = files_of(done.folder), ["sweep.py", f"--out={tmp_path}", "--vary=lr=0.01,0.02,0.03", "--jobs"]
    for jobs, status in (("1", "143"), ("2", "2")):
        monkeypatch.setattr("sys.argv", [*tool, jobs, "--", *flags])
        monkeypatch.setenv("STATUS", status)
        with pytest.raises(SystemExit, match=status):
            sweep.utils.run(sweep.main)
        assert [bool(run.rows()) for run in runs] == [True, status == "2", False]
    text, error = (killed.folder / "output.txt").read_text(), capsys.readouterr().err
    assert "stopped at epoch 0" in text and "resumed" in text and files_of(done.folder) == before
    assert f"1 of 3 runs failed, see {failing.folder}/output.txt" in error
