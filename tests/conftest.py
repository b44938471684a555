"""What the tests share: small trees of images and input files, and ways to run the scripts as a user does."""

import json
import os
import runpy
import signal
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

# Before torch is imported, here and in the processes that tests start: the tests are small, fp32 sums differ between
# devices, and a thread for each of pytest's workers is enough.
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
# A network, of the backbone in several.py, and images small enough to train in a second.
TINY = ["--arch", "tiny", "--img_h", "96", "--img_w", "32", "--low-dim", "16", "--pretrained", "none"]
TINY += ["--batch-size", "8", "--per_img", "4", "--workers", "0", "--no-tensorboard"]
# The training of `sysu_run`: its flags and its name.
RUN_FLAGS = [*TINY, "--lr", "0.01", "--drop", "0.3", "--epochs", "3"]
RUN = "sysu_id_tiny_lr0.01_whc0.6_lowdim16_drop0.3_imgh96_imgw32_batchsize8_perimg4_pretrainednone"

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore it
settings.register_profile("short", max_examples=100, derandomize=True, deadline=None, database=None)
settings.register_profile("long", max_examples=5_000, deadline=None, suppress_health_check=[*HealthCheck])
settings.load_profile("short")


@pytest.fixture(scope="session", autouse=True)
def tiny_backbone() -> None:
    """Not at the top: it imports torch, which takes seconds, and the process that hands out the tests needs none."""
    import several  # noqa: F401


def golden(name: str) -> dict:
    """What a file in tests/golden holds."""
    file = ROOT / "tests/golden" / name
    if file.suffix == ".json":
        return json.loads(file.read_text())
    with np.load(file) as arrays:
        return dict(arrays)


def only(folder: Path, pattern: str = "*.json") -> dict:
    """What the one JSON file in a folder holds."""
    (file,) = folder.glob(pattern)
    return json.loads(file.read_text())


def rows_of(content: dict) -> dict[tuple[str, str], dict]:
    """{(protocol, feature): mean, deviation and trials} of a JSON file of test.py or tools.score."""
    return {(row.pop("protocol"), row.pop("feature")): row for row in content["results"]}


def features_file(path: Path, **changes) -> Path:
    """Features of two persons in every camera; ``changes`` replaces arrays, or takes them away where None."""
    pids, camids = np.repeat([1, 2], 12), np.tile(np.repeat(np.arange(1, 7), 2), 2)
    arrays = {"pids": pids, "camids": camids, "paths": np.array([f"{i:02d}" for i in range(24)]), "fc": np.eye(24)}
    np.savez(path, **{name: values for name, values in (arrays | changes).items() if values is not None})
    return path


def result(**changes) -> str:
    """A JSON file of test.py in small; ``changes`` replaces entries."""
    mean = dict.fromkeys(("rank1", "rank5", "rank10", "rank20", "mAP", "mINP"), 0.5)
    row = {"protocol": "v2t", "mean": mean, "std": mean}
    row["trials"] = [{"trial": trial, "cmc": [0.5] * 20} for trial in (1, 2)]
    counts = {"queries": 3, "without_match": 0, "gallery_images": 3, "gallery_persons": 3, "chance": 0.3}
    rows = [{"feature": kind, **row} for kind in ("fc", "chance")]
    content = {"results": rows, "counts": {"v2t": counts}, "options": [], "flags": {"dataset": "regdb"}}
    return json.dumps(content | changes)


def places(data: Path, out: Path) -> list:
    return ["--data_path", data, "--model_path", out, "--log_path", out]


def run_here(script: str, *flags) -> None:
    """Run a script, or a tool named like "-m tools.report", in this process: importing torch takes seconds."""
    path = ROOT / f"{script.removeprefix('-m ').removesuffix('.py').replace('.', '/')}.py"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [path.name, *map(str, flags)])
        runpy.run_path(str(path), run_name="__main__")


def make_tree(dataset: str, out: Path, *flags) -> None:
    run_here("-m tools.make_synthetic", "--dataset", dataset, "--out", out, "--seed", 3, "--workers", 1, *flags)


@pytest.fixture
def call(capsys) -> Callable[..., str]:
    """Run a script or tool in this process; gives what it printed."""

    def run(script: str, *flags) -> str:
        run_here(script, *flags)
        return capsys.readouterr().out

    return run


def files_of(*places: Path) -> dict[Path, tuple]:
    """All files below some folders, and what tells a file that was written to: identity, size and time."""
    files = {file for place in places for file in (place.rglob("*") if place.is_dir() else [place]) if file.is_file()}
    return {file: (file.stat().st_ino, file.stat().st_size, file.stat().st_mtime_ns) for file in files}


@pytest.fixture
def bad(call, capsys, tmp_path) -> Callable[..., str]:
    """Run a script or tool that must be refused; gives its one line on stderr.

    Every file must stay as it is. Only logs and locks may be new or written to.
    """

    def run(script: str, *flags) -> str:
        folders = [tmp_path, *(flag for flag in flags if isinstance(flag, Path) and flag.exists())]
        before = files_of(*folders)
        with pytest.raises(SystemExit) as stop:
            call(script, *flags)
        stderr, name = capsys.readouterr().err, script.removeprefix("-m tools.").removesuffix(".py")
        assert stop.value.code == 2 and len(stderr.splitlines()) == 1, stderr
        assert stderr.startswith(f"{name}.py: error: ")
        after = files_of(*folders)
        changed = {file for file in {*before, *after} if before.get(file) != after.get(file)}
        assert {file.suffix for file in changed} <= {".log", ".lock"}, changed
        return stderr

    return run


@pytest.fixture(scope="session")
def made_once(tmp_path_factory, worker_id) -> Callable[[str, Callable[[Path], None]], Path]:
    """(name, make): the folder of this name, which ``make`` has filled, once for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    base = base if worker_id == "master" else base.parent

    def folder_of(name: str, make: Callable[[Path], None]) -> Path:
        with FileLock(base / f"{name}.lock"):
            if not (base / f"{name}.made").exists():
                (base / name).mkdir()
                make(base / name)
                (base / f"{name}.made").touch()
        return base / name

    return folder_of


@pytest.fixture(scope="session")
def golden_tree(tmp_path_factory) -> Path:
    """The tree of noise images that the golden file lists and pixels belong to."""
    folder = tmp_path_factory.mktemp("golden_tree")
    with tarfile.open(ROOT / "tests/golden/sysu_tree.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "SYSU-MM01"


@pytest.fixture(scope="session")
def sysu_tree(made_once) -> Path:
    """A drawn SYSU-MM01 tree of 12 persons, preprocessed; every other training image is enough."""

    def make(folder: Path) -> None:
        make_tree("sysu", folder / "SYSU-MM01", "--ids", 12, "--images", 2)
        size = ["--img_h", 96, "--img_w", 32]
        run_here("pre_process_sysu.py", "--data_path", folder / "SYSU-MM01", *size, "--workers", 0)
        for file in (folder / "SYSU-MM01").glob("*.npy"):
            np.save(file, np.load(file)[::2])

    return made_once("sysu", make) / "SYSU-MM01"


@pytest.fixture(scope="session")
def regdb_tree(made_once) -> Path:
    return made_once("regdb", lambda folder: make_tree("regdb", folder / "RegDB", "--ids", 8)) / "RegDB"


@pytest.fixture(scope="session")
def llcm_tree(made_once) -> Path:
    return made_once("llcm", lambda folder: make_tree("llcm", folder / "LLCM", "--ids", 9, "--images", 2)) / "LLCM"


@pytest.fixture(scope="session")
def sysu_run(sysu_tree, made_once) -> dict[str, Path]:
    """Epochs 0 to 3 of a training on the drawn tree: {"models": folder, "logs": folder, "data": tree}."""

    def make(out: Path) -> None:
        run_here("train.py", *RUN_FLAGS, *places(sysu_tree, out / "models"), "--log_path", out / "logs")

    out = made_once("sysu_run", make)
    return {"models": out / "models", "logs": out / "logs", "data": sysu_tree}
