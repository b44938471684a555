"""What the tests share: small trees of images and input files, and ways to run the scripts."""

import json
import os
import runpy
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

# Before torch is imported, here and in the processes that tests start: the tests are small, fp32
# sums differ between devices, and a thread for each of pytest's workers is enough.
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
# A network, of the backbone in distributed_helpers.py, and images that train in a second.
TINY = ["--arch", "tiny", "--img_h", "96", "--img_w", "32", "--low-dim", "16"]
TINY += ["--pretrained", "none", "--batch-size", "8", "--per_img", "4"]
TINY += ["--workers", "0", "--no-tensorboard"]
# The training of the fixture `sysu_run`: its flags and its name.
RUN_FLAGS = [*TINY, "--lr", "0.01", "--drop", "0.3", "--epochs", "3"]
RUN = "sysu_id_tiny_lr0.01_whc0.6_imgh96_imgw32_lowdim16_drop0.3_batchsize8_perimg4_pretrainednone"

settings.register_profile("short", max_examples=100, derandomize=True, deadline=None, database=None)
settings.register_profile(
    "long", max_examples=5_000, deadline=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("short")


@pytest.fixture(scope="session", autouse=True)
def tiny_backbone() -> None:
    """Not at the top: it imports torch, and pytest's process that hands out tests needs none."""
    import distributed_helpers  # noqa: F401


# ---- contents of files --------------------------------------------------------------------------


def golden(name: str) -> dict:
    """What a file in tests/golden holds."""
    file = ROOT / "tests/golden" / name
    if file.suffix == ".json":
        return json.loads(file.read_text())
    with np.load(file) as arrays:
        return dict(arrays)


def only_json(folder: Path, pattern: str = "*.json") -> dict:
    """What the one JSON file in a folder holds."""
    (file,) = folder.glob(pattern)
    return json.loads(file.read_text())


def rows_of(content: dict) -> dict[tuple[str, str], dict]:
    """{(protocol, feature): mean, deviation and trials} of a result file."""
    rows = {}
    for row in content["results"]:
        rest = {name: value for name, value in row.items() if name not in ("protocol", "feature")}
        rows[row["protocol"], row["feature"]] = rest
    return rows


def features_file(path: Path, **changes) -> Path:
    """Features of two persons in every camera; ``changes`` replaces arrays, None removes them."""
    arrays = {
        "pids": np.repeat([1, 2], 12),
        "camids": np.tile(np.repeat(np.arange(1, 7), 2), 2),
        "paths": np.array([f"{i:02d}" for i in range(24)]),
        "fc": np.eye(24),
    }
    arrays |= changes
    np.savez(path, **{name: values for name, values in arrays.items() if values is not None})
    return path


def result(**changes) -> str:
    """A small result file of test.py; ``changes`` replaces entries."""
    mean = dict.fromkeys(("rank1", "rank5", "rank10", "rank20", "mAP", "mINP"), 0.5)
    trials = [{"trial": trial, "cmc": [0.5] * 20} for trial in (1, 2)]
    rows = []
    for kind in ("fc", "chance"):
        rows.append(
            {"feature": kind, "protocol": "v2t", "mean": mean, "std": mean, "trials": trials}
        )
    counts = {
        "queries": 3,
        "without_match": 0,
        "gallery_images": 3,
        "gallery_persons": 3,
        "chance": 0.3,
    }
    content = {
        "results": rows,
        "counts": {"v2t": counts},
        "options": [],
        "flags": {"dataset": "regdb"},
    }
    return json.dumps(content | changes)


def same_content(a, b) -> bool:
    """Whether nested dicts, lists and tuples hold the same types, keys and values."""
    import torch

    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_content(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same_content(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.Tensor | np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    return a == b


def read_all(folder: Path) -> dict:
    """What the checkpoints, metrics and arrays below a folder hold, by their path."""
    import utils

    contents = {}
    for file in folder.rglob("*"):
        name = str(file.relative_to(folder))
        if file.suffix == ".t":
            contents[name] = utils.load_checkpoint(str(file))
        elif file.suffix == ".npy":
            contents[name] = np.load(file)
        elif file.suffix == ".jsonl":
            contents[name] = [json.loads(line) for line in file.read_text().splitlines()]
    return contents


# ---- networks ----------------------------------------------------------------------------------


def small_net(n_class: int = 3, low_dim: int = 8, **options):
    """An `EmbedNet` that is quick to make."""
    from model import EmbedNet

    return EmbedNet(n_class, low_dim, arch="resnet18", pretrained="none", **options)


# ---- running scripts ----------------------------------------------------------------------------


def folder_flags(data: Path, out: Path) -> list:
    """Flags: read this dataset, write everything into this folder."""
    return ["--data_path", data, "--model_path", out, "--log_path", out]


def run_here(script: str, *flags) -> None:
    """Run a script, or a tool named like "-m tools.report", in this process.

    To import torch in a new process would take seconds.
    """
    path = ROOT / f"{script.removeprefix('-m ').removesuffix('.py').replace('.', '/')}.py"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [path.name, *(str(flag) for flag in flags)])
        patch.setattr(sys, "unraisablehook", sys.unraisablehook)  # restored, if a script changes it
        runpy.run_path(str(path), run_name="__main__")


@pytest.fixture
def output_of(capsys) -> Callable[..., str]:
    """Run a script or tool in this process; gives what it printed."""

    def run(script: str, *flags) -> str:
        run_here(script, *flags)
        return capsys.readouterr().out

    return run


def files_of(*folders: Path) -> dict[Path, tuple]:
    """All files in some folders, with what tells that one was written: inode, size, time."""
    files = {}
    for folder in folders:
        paths = folder.rglob("*") if folder.is_dir() else [folder]
        for path in paths:
            if path.is_file():
                stat = path.stat()
                files[path] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return files


@pytest.fixture
def error_of(output_of, capsys, tmp_path) -> Callable[..., str]:
    """Run a script or tool on bad input; gives its line on stderr.

    That is one line of ours, or argparse's two: usage and error. The exit status is 2. Every file
    must stay as it is: only logs and locks may be new or written to.
    """

    def run(script: str, *flags) -> str:
        folders = [tmp_path]
        folders += [flag for flag in flags if isinstance(flag, Path) and flag.exists()]
        before = files_of(*folders)
        with pytest.raises(SystemExit) as stop:
            output_of(script, *flags)
        *usage, line = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2
        assert not usage or (len(usage) == 1 and usage[0].startswith("usage: "))
        name = script.removeprefix("-m ").removesuffix(".py").removeprefix("tools.")
        assert name in line.split(": error: ")[0], line
        after = files_of(*folders)
        changed = {path for path in {*before, *after} if before.get(path) != after.get(path)}
        assert {path.suffix for path in changed} <= {".log", ".lock"}, changed
        return line

    return run


# ---- datasets and a run, made once --------------------------------------------------------------


@pytest.fixture(scope="session")
def made_once(tmp_path_factory, worker_id) -> Callable[[str, Callable[[Path], None]], Path]:
    """(name, make): the folder of this name, which ``make`` fills once for all workers."""
    base = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        base = base.parent

    def folder_of(name: str, make: Callable[[Path], None]) -> Path:
        with FileLock(base / f"{name}.lock"):
            if not (base / f"{name}.made").exists():
                (base / name).mkdir(exist_ok=True)
                make(base / name)
                (base / f"{name}.made").touch()
        return base / name

    return folder_of


@pytest.fixture(scope="session")
def worker_id(request) -> str:
    """The name of this worker of pytest-xdist; "master" without that plugin."""
    return os.environ.get("PYTEST_XDIST_WORKER", "master")


@pytest.fixture(scope="session")
def golden_tree(tmp_path_factory) -> Path:
    """The tree of noise images that the golden lists and pixels belong to."""
    folder = tmp_path_factory.mktemp("golden_tree")
    with tarfile.open(ROOT / "tests/golden/sysu_tree.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "SYSU-MM01"


def make_tree(dataset: str, out: Path, *flags) -> None:
    run_here(
        "-m tools.make_synthetic", "--dataset", dataset, "--out", out, "--seed", 3,
        "--workers", 1, *flags,
    )  # fmt: skip


@pytest.fixture(scope="session")
def sysu_tree(made_once) -> Path:
    """A synthetic SYSU-MM01 of 12 persons, preprocessed; half of its training images are enough."""
    from data_manager import sysu_train

    def make(folder: Path) -> None:
        tree = folder / "SYSU-MM01"
        make_tree("sysu", tree, "--ids", 12, "--images", 2)
        for split in sysu_train(str(tree)):
            for path in split.paths[1::2]:
                os.remove(path)
        size = ["--img_h", 96, "--img_w", 32]
        run_here("pre_process_sysu.py", "--data_path", tree, *size, "--workers", 0)

    return made_once("sysu", make) / "SYSU-MM01"


@pytest.fixture(scope="session")
def regdb_tree(made_once) -> Path:
    def make(folder: Path) -> None:
        make_tree("regdb", folder / "RegDB", "--ids", 8)

    return made_once("regdb", make) / "RegDB"


@pytest.fixture(scope="session")
def llcm_tree(made_once) -> Path:
    def make(folder: Path) -> None:
        make_tree("llcm", folder / "LLCM", "--ids", 9, "--images", 2)

    return made_once("llcm", make) / "LLCM"


@pytest.fixture(scope="session")
def folder_tree(made_once) -> Path:
    """Own folders: 8 persons in train, 4 in test, 3 visible and 3 infrared images of each."""

    def make(folder: Path) -> None:
        make_tree("folder", folder / "mine", "--ids", 12, "--images", 3)
        for modality in ("visible", "thermal"):
            for name in sorted(os.listdir(folder / "mine/train" / modality))[:2]:
                os.rename(
                    folder / "mine/train" / modality / name, folder / "mine/test" / modality / name
                )

    return made_once("folder", make) / "mine"


@pytest.fixture(scope="session")
def sysu_run(sysu_tree, made_once) -> dict[str, Path]:
    """Epochs 0 to 3 of a training: {"models": folder, "logs": folder, "data": tree}."""

    def make(out: Path) -> None:
        folders = ["--model_path", out / "models", "--log_path", out / "logs"]
        run_here("train.py", *RUN_FLAGS, "--data_path", sysu_tree, *folders)

    out = made_once("sysu_run", make)
    return {"models": out / "models", "logs": out / "logs", "data": sysu_tree}


@pytest.fixture
def pytorch_settings(monkeypatch):
    """Settings of PyTorch that a test may change, at PyTorch's own defaults."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(was_deterministic)
