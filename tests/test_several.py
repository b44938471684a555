"""Several processes train and score as one does (FIDELITY 10), on CPUs with gloo.

What no test here runs, for want of GPUs: torch's SyncBatchNorm and NCCL.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, only, rows_of, run_here
from several import in_processes
from torch.testing import assert_close

import train
import utils
from data_loader import IdentitySampler, TrainBatches, TrainingSet
from data_manager import sysu_test
from loss import loss_terms
from model import EmbedNet, to_device
from tools.killtest import read_all, same

# ---- one step: losses, gradients, BatchNorm -------------------------------------------------------------------------


def trajectory(arch: str, width: int, dist_type: str, margin: float, scale: float = 0) -> dict:
    """Six steps: the losses of each, the gradients of the last, and all that they have changed.

    In float64; if ``scale`` is given, in float16 with a gradient scaler that starts with it.
    """
    torch.manual_seed(3)
    rng, labels, cpu = np.random.default_rng(3), np.repeat(np.arange(6), 9), torch.device("cpu")
    images = [rng.integers(0, 256, (54, 96, width, 3), np.uint8) for _ in range(2)]
    sampler = IdentitySampler(labels, labels, 8, 2)  # four persons
    batches = TrainBatches(TrainingSet(*images, labels, labels), sampler, (96, width), cpu, share=utils.share())
    args = {"lr": 0.008, "optim": "sgd", "w_hc": 0.6, "thd": margin, "dist_type": dist_type}
    args = SimpleNamespace(**args, sync_bn=True)
    dtype = torch.float32 if scale else torch.float64
    net = to_device(EmbedNet(6, 32, arch=arch, pretrained="none").to(dtype), cpu).train()
    half = (torch.float16, torch.amp.GradScaler("cpu", init_scale=scale)) if scale else ()
    fast, optimizer, terms = train.distributed(net, args), train.build_optimizer(net, args), loss_terms(args)
    found = {"losses": []}
    for _, (visible, thermal, *labels) in zip(range(6), batches.epoch(0), strict=False):
        batch = visible.to(dtype), thermal.to(dtype), *labels
        losses, accuracy = train.train_step(fast, optimizer, batch, terms, *half)
        found["losses"].append({name: utils.process_mean(x) for name, x in (losses | {"accuracy": accuracy}).items()})
    found["gradients"] = {name: x.grad for name, x in net.named_parameters() if x.requires_grad}
    found["momentum"] = {i: own["momentum_buffer"] for i, own in enumerate(optimizer.state.values())}
    return found | {"net": net.state_dict(), "scale": half[1].get_scale() if half else 0}


def follow(expected: dict, *case) -> None:
    assert_close(trajectory(*case), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("arch", "width", "dist_type", "clips"),
    [("resnet18", 16, "l2", False), *(("tiny", 32, kind, clips) for kind in ("l2", "l1", "cos") for clips in (0, 1))],
)
def test_processes_follow_one(arch, width, dist_type, clips):
    margin, expected = 0.0, trajectory(arch, width, dist_type, 0.0)
    if clips:
        plain = expected["losses"][0]["HC"]
        margin = float(plain.mean()) / 4  # the mean distance of the four persons
        expected = trajectory(arch, width, dist_type, margin)
        assert (expected["losses"][0]["HC"] > plain - 4 * margin + 1e-4).all()  # some persons' terms are clipped
    for processes in (2, 4) if arch == "tiny" else (2,):
        in_processes(processes, follow, expected, arch, width, dist_type, margin)


def agree(expected: dict) -> None:
    case = "tiny", 32, "l2", 0.0
    overflowing = trajectory(*case, scale=2.0**17)
    overflowing.pop("gradients")  # of the last step, not finite if it overflowed
    assert overflowing["scale"] < 2.0**17 and overflowing["momentum"][0].any()  # some steps were skipped, not all
    assert same(*utils.gather(overflowing))
    assert_close(trajectory(*case, scale=2.0**8)["net"], expected, rtol=0, atol=1e-3)


def test_processes_scale_alike():
    """In fp16 they skip the same steps; where none overflows, they follow one process."""
    in_processes(2, agree, trajectory("tiny", 32, "l2", 0.0, scale=2.0**8)["net"])


def test_persons_are_not_split():
    labels = np.repeat(np.arange(6), 4)
    data, sampler = TrainingSet(np.empty(0), np.empty(0), labels, labels), IdentitySampler(labels, labels, 12, 2)
    with pytest.raises(ValueError, match=r"4 processes.* 6 persons.*start 1 or 2 or 3 or 6"):
        TrainBatches(data, sampler, (96, 32), torch.device("cpu"), share=(0, 4))


# ---- a run ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def flags(sysu_run) -> list:
    return [*TINY, "--data_path", sysu_run["data"], "--epochs", 3, "--resume", "last"]


def training(flags: list, out: Path, *more) -> None:
    run_here("train.py", *flags, "--model_path", out, "--log_path", out, *more)


def test_a_run_is_that_of_one_process(flags, tmp_path):
    """Begun by one process, carried on by two, ended by one; without dropout rounding is all that differs."""
    flags = [*flags, "--lr", 0.001]  # rounding grows with it
    one, several = tmp_path / "one", tmp_path / "several"
    training(flags, one, "--epochs", 4)
    training(flags, several, "--epochs", 0)
    in_processes(2, training, flags, several)
    training(flags, several, "--epochs", 4)
    found, expected, configs = read_all(several), read_all(one), []
    for content in (*found.values(), *expected.values()):
        for line in content if isinstance(content, list) else content["metrics"]:
            for name in [name for name in line if name.startswith(("fc", "pool5"))]:
                line[name] = None  # whether a tie is broken thus or so is no rounding
        if isinstance(content, dict):
            content["cmc"] = content["mAP"] = content["best"] = content["rng"] = None
            content["optimizer"] = None  # a gradient jumps where ReLU has its kink
            configs.append(content.pop("config"))
    assert all(config == configs[0] for config in configs)
    assert_close(found, expected, rtol=0, atol=5e-4)
    files = [{str(file.relative_to(out)) for file in out.rglob("*")} for out in (one, several)]
    assert files[0] == files[1]
    log = next(several.glob("*.log")).read_text()
    assert "2 processes" in log and all(log.count(f"epoch   {epoch} step") == 1 for epoch in range(5))


def train_apart(flags: list, out: Path) -> None:
    training(flags, out / str(utils.share()[0]))


def test_processes_that_see_other_folders_are_refused(flags, tmp_path, capfd):
    """Like machines without a shared folder: only process 0 finds the checkpoint."""
    training(flags, tmp_path / "0", "--epochs", 0)
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="exit code 2"):
        in_processes(2, train_apart, flags, tmp_path)
    assert "must be one folder for all machines" in capfd.readouterr().err


def write_and_end(file: Path) -> None:
    if not torch.distributed.get_rank():
        time.sleep(0.5)
        file.touch()
    utils.end_processes()
    assert file.exists()


def test_processes_end_together(tmp_path):
    """When process 0 has written its files: torchrun would kill it for the others' exit status."""
    in_processes(2, write_and_end, tmp_path / "file")


def test_without_synchronised_statistics(flags, tmp_path):
    """With torch's own BatchNorm; the run's name says so."""
    in_processes(2, training, [*flags, "--no-sync_bn"], tmp_path)
    (last,) = tmp_path.glob("*_syncbnFalse_*last.t")
    assert utils.load_checkpoint(str(last))["epoch"] == 3


# ---- torchrun -------------------------------------------------------------------------------------------------------


def torchrun(*command, happens: str = "") -> subprocess.CompletedProcess:
    command = ["-m", "torch.distributed.run", "--nproc_per_node=2", ROOT / "tests/several.py", *command]
    env = os.environ | ({"HAPPENS": happens} if happens else {})
    return subprocess.run([sys.executable, *map(str, command)], env=env, capture_output=True, text=True, timeout=120)


def of_ours(done: subprocess.CompletedProcess) -> list[str]:
    """The lines on stderr that are not torchrun's."""
    return re.findall(r"^\S+\.py: error: .*", done.stderr, re.MULTILINE)


def test_killed_and_stopped_runs_go_on(flags, tmp_path):
    """Exactly, with as many processes; each has random states of its own, for dropout."""
    flags = [*flags, "--drop", 0.3, "--save_every_steps", 2]
    in_processes(2, training, flags, tmp_path / "whole")
    out = tmp_path / "out"
    killed = torchrun("train.py", *flags, "--model_path", out, "--log_path", out, happens="4 kill")
    assert killed.returncode and len(of_ours(killed)) == 1, killed.stderr
    assert utils.load_checkpoint(str(next(out.glob("*_last.t"))))["step"] in (2, 4)
    stopped = torchrun("train.py", *flags, "--model_path", out, "--log_path", out, happens="3 stop")
    assert "stopped at epoch" in stopped.stdout and not of_ours(stopped), stopped.stderr
    assert not re.search("warn", killed.stderr + stopped.stderr, re.IGNORECASE), stopped.stderr
    in_processes(2, training, flags, out)
    assert same(read_all(out), read_all(tmp_path / "whole"))


def test_four_processes_go_on_exactly(flags, tmp_path):
    """They add up gradients in the same order in each step, also in the first one (`Run.restore`)."""
    flags = [*flags, "--per_img", 2]
    in_processes(4, training, flags, tmp_path / "whole")
    for epochs in (0, 3):
        in_processes(4, training, [*flags, "--epochs", epochs], tmp_path / "pieces")
    assert same(read_all(tmp_path / "pieces"), read_all(tmp_path / "whole"))


def test_scoring_is_shared(sysu_run, tmp_path):
    """One line tells of an image that one of the processes cannot read."""
    tree, best = shutil.copytree(sysu_run["data"], tmp_path / "tree"), next(sysu_run["models"].glob("*_best.t"))
    command = ["test.py", "--data_path", tree, "--workers", 0, "--test-batch", 4, "--resume", best, "--log_path"]
    run_here(*command, tmp_path / "one")
    in_processes(2, run_here, *command, tmp_path / "several")
    found, expected = (rows_of(only(tmp_path / out)) for out in ("several", "one"))
    assert_close(found, expected, rtol=0, atol=1e-6)
    images = sysu_test(str(tree))
    second = Path(images.paths[np.flatnonzero(images.thermal)[1]])  # process 1's first
    second.write_bytes(b"damaged")
    done = torchrun(*command, tmp_path / "damaged")
    (line,) = of_ours(done)
    assert done.returncode and second.name in line and not [*(tmp_path / "damaged").glob("*.json")]
