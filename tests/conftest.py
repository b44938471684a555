"""Small trees of images that the tests share, and a way to run the scripts as a user does."""

import os
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are small, and fp32 sums differ between devices

from tools.make_synthetic import make_regdb, make_sysu

ROOT = Path(__file__).resolve().parent.parent
# A network and images small enough to train in seconds.
TINY = ["--arch", "resnet18", "--img_h", "96", "--img_w", "32", "--low-dim", "16", "--pretrained", "none"]
TINY_BATCH = ["--batch-size", "8", "--per_img", "4", "--no-tensorboard"]
# The name of the training of `sysu_run`.
RUN = "sysu_id_resnet18_lr0.01_whc0.6_lowdim16_drop0.3_imgh96_imgw32_batchsize8_perimg4_pretrainednone"

settings.register_profile("short", max_examples=200, derandomize=True, deadline=None, database=None)
settings.register_profile("long", max_examples=5_000, deadline=None, suppress_health_check=[*HealthCheck])
settings.load_profile("short")


def run_script(script: str, *flags, cwd=ROOT) -> subprocess.CompletedProcess:
    """Run a script, or a tool named like "-m tools.report", in a process of its own."""
    command = script.split() if script.startswith("-m") else [str(ROOT / script)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command, *map(str, flags)], cwd=cwd, env=env, capture_output=True, text=True
    )


def succeed(script: str, *flags, cwd=ROOT) -> str:
    done = run_script(script, *flags, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def call(monkeypatch):
    """Run a script or tool in this process, which saves the seconds that importing torch takes."""
    monkeypatch.chdir(ROOT)

    def run(script: str, *flags) -> None:
        name, start = script, runpy.run_path
        if script.startswith("-m "):
            name, start = script.split(".")[-1] + ".py", runpy.run_module
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
        start(script.removeprefix("-m "), run_name="__main__")

    return run


@pytest.fixture
def output(call, capsys):
    """Run a script or tool in this process; gives what it printed."""

    def run(script: str, *flags) -> str:
        call(script, *flags)
        return capsys.readouterr().out

    return run


def files_of(*places: Path) -> dict[Path, tuple]:
    """All files below some folders, and what tells a file that was written to: identity, size and time."""
    files = {file for place in places for file in (place.rglob("*") if place.is_dir() else [place]) if file.is_file()}
    return {file: (file.stat().st_ino, file.stat().st_size, file.stat().st_mtime_ns) for file in files}


@pytest.fixture
def bad(call, capsys, tmp_path):
    """Run a script or tool that must be refused, with every file left as it is; gives its one line on stderr."""

    def run(script: str, *flags) -> str:
        places = [tmp_path, *(Path(flag) for flag in flags if isinstance(flag, Path) and flag.exists())]
        before = files_of(*places)
        with pytest.raises(SystemExit) as stop:
            call(script, *flags)
        stderr = capsys.readouterr().err
        assert stop.value.code == 2 and len(stderr.splitlines()) == 1 and stderr.startswith(f"{sys.argv[0]}: error: ")
        after = files_of(*places)
        assert {file: after.get(file) for file in before} == before
        assert not [file for file in after if file.suffix in (".partial", ".lock")]
        return stderr

    return run


@pytest.fixture(scope="session")
def golden_tree(tmp_path_factory) -> Path:
    """The tree of noise images that the golden file lists and pixels belong to."""
    folder = tmp_path_factory.mktemp("golden_tree")
    with tarfile.open(ROOT / "tests/golden/sysu_tree.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "SYSU-MM01"


@pytest.fixture(scope="session")
def sysu_tree(tmp_path_factory) -> Path:
    """A drawn SYSU-MM01 tree of 12 persons, preprocessed."""
    tree = tmp_path_factory.mktemp("sysu") / "SYSU-MM01"
    make_sysu(tree, ids=12, images=3, seed=3)
    succeed("pre_process_sysu.py", "--data_path", tree, "--img_h", 96, "--img_w", 32)
    return tree


@pytest.fixture(scope="session")
def regdb_tree(tmp_path_factory) -> Path:
    tree = tmp_path_factory.mktemp("regdb") / "RegDB"
    make_regdb(tree, ids=8, seed=3)
    return tree


@pytest.fixture(scope="session")
def sysu_run(sysu_tree, tmp_path_factory) -> dict[str, Path]:
    """Epochs 0 to 3 of a training on the drawn tree: {"models": folder, "logs": folder, "data": tree}."""
    out = tmp_path_factory.mktemp("sysu_run")
    flags = [*TINY, *TINY_BATCH, "--epochs", 3, "--lr", 0.01, "--drop", 0.3]
    succeed("train.py", "--data_path", sysu_tree, *flags, "--model_path", out / "models", "--log_path", out / "logs")
    return {"models": out / "models", "logs": out / "logs", "data": sysu_tree}
