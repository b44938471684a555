"""Several processes train and score as one does (FIDELITY 10), on CPUs with gloo.

What no test here runs, for want of GPUs: torch's SyncBatchNorm and NCCL.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, only_json, read_all, rows_of, run_here, same_content
from distributed_helpers import in_processes
from torch.testing import assert_close

import train
import utils
from data_loader import IdentitySampler, TrainBatches, TrainingSet
from data_manager import sysu_test
from loss import Criterion
from model import EmbedNet, extract_features, to_device

CPU = torch.device("cpu")

# ---- steps: losses, gradients, BatchNorm --------------------------------------------------------


def noise_batches(width: int) -> TrainBatches:
    """Batches of four persons and two images each, from six persons; this rank's rows."""
    rng = np.random.default_rng(3)
    labels = np.repeat(np.arange(6), 9)
    visible = rng.integers(0, 256, (54, 96, width, 3), np.uint8)
    thermal = rng.integers(0, 256, (54, 96, width, 3), np.uint8)
    train_set = TrainingSet(visible, thermal, labels, labels)
    sampler = IdentitySampler(labels, labels, batch_size=8, per_img=2)
    ranks = {"rank": utils.rank(), "world_size": utils.world_size()}
    return TrainBatches(train_set, sampler, (96, width), CPU, **ranks)


def trajectory(
    arch: str, width: int, dist_type: str, margin: float, fp16_scale: float | None = None
) -> dict:
    """Six steps: the losses of each, the gradients of the last, and all that they have changed.

    In float64; or, with the scale that a gradient scaler starts with, in float16.
    """
    torch.manual_seed(3)
    dtype = torch.float64 if fp16_scale is None else torch.float32
    net = EmbedNet(6, 32, arch=arch, pretrained="none").to(dtype)
    net = to_device(net, CPU).train()
    args = SimpleNamespace(lr=0.008, optim="sgd", sync_bn=True, compile=False)
    wrapped_net = train.wrap_network(net, args)
    optimizer = train.build_optimizer(net, args)
    criterion = Criterion(0.6, margin, dist_type, utils.world_size())
    amp_dtype = None
    scaler = None
    if fp16_scale is not None:
        amp_dtype = torch.float16
        scaler = torch.amp.GradScaler("cpu", init_scale=fp16_scale)
    losses_of_steps = []
    for step, batch in enumerate(noise_batches(width).epoch(0)):
        if step == 6:
            break
        visible, thermal, visible_labels, thermal_labels = batch
        batch = (visible.to(dtype), thermal.to(dtype), visible_labels, thermal_labels)
        losses, accuracy = train.train_step(
            wrapped_net, criterion, optimizer, batch, amp_dtype, scaler
        )
        losses["accuracy"] = accuracy
        losses_of_steps.append({name: utils.mean_over_ranks(x) for name, x in losses.items()})
    gradients = {name: x.grad for name, x in net.named_parameters() if x.requires_grad}
    momentum = [buffers["momentum_buffer"] for buffers in optimizer.state.values()]
    return {
        "losses": losses_of_steps,
        "gradients": gradients,
        "momentum": momentum,
        "net": net.state_dict(),
        "scale": scaler.get_scale() if scaler else None,
    }


def expect_trajectory(expected: dict, *case) -> None:
    assert_close(trajectory(*case), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("arch", "width", "dist_type", "has_margin"),
    [
        ("resnet18", 16, "l2", False),
        ("tiny", 32, "l2", False),
        ("tiny", 32, "l2", True),
        ("tiny", 32, "l1", False),
        ("tiny", 32, "l1", True),
        ("tiny", 32, "cos", False),
        ("tiny", 32, "cos", True),
    ],
)
def test_several_processes_follow_one(arch, width, dist_type, has_margin):
    margin = 0.0
    expected = trajectory(arch, width, dist_type, margin)
    if has_margin:
        without_margin = expected["losses"][0]["HC"]
        margin = float(without_margin.mean()) / 4  # the mean distance of the four persons
        expected = trajectory(arch, width, dist_type, margin)
        # Some persons are within the margin, so that less than four margins are taken off.
        assert (expected["losses"][0]["HC"] > without_margin - 4 * margin + 1e-4).all()
    for world_size in (2, 4) if arch == "tiny" else (2,):
        in_processes(world_size, expect_trajectory, expected, arch, width, dist_type, margin)


def fp16_trajectory(scale: float) -> dict:
    return trajectory(arch="tiny", width=32, dist_type="l2", margin=0.0, fp16_scale=scale)


def check_steps_left_out() -> None:
    high_scale = 2.0**17
    overflowing = fp16_trajectory(high_scale)
    overflowing.pop("gradients")  # of the last step: not finite if it overflowed
    # Some steps were left out, but not all.
    assert overflowing["scale"] < high_scale
    assert overflowing["momentum"][0].any()
    first, second = utils.gather(overflowing)
    assert same_content(first, second)


def test_ranks_leave_out_the_same_fp16_steps():
    in_processes(2, check_steps_left_out)


LOW_SCALE = 2.0**8  # no step overflows


def expect_fp16_net(expected_net: dict) -> None:
    assert_close(fp16_trajectory(LOW_SCALE)["net"], expected_net, rtol=0, atol=1e-3)


def test_ranks_follow_one_process_in_fp16():
    in_processes(2, expect_fp16_net, fp16_trajectory(LOW_SCALE)["net"])


def test_persons_are_not_split_between_ranks():
    labels = np.repeat(np.arange(6), 4)
    train_set = TrainingSet(np.empty(0), np.empty(0), labels, labels)
    sampler = IdentitySampler(labels, labels, 12, 2)
    with pytest.raises(
        utils.InputError, match=r"4 processes.* 6 persons.*nproc_per_node 1 or 2 or 3 or 6"
    ):
        TrainBatches(train_set, sampler, (96, 32), CPU, rank=0, world_size=4)


def extract_on_rank_0() -> None:
    """Three images, all of them on rank 0."""
    torch.manual_seed(0)
    net = EmbedNet(3, 8, arch="tiny", pretrained="none")
    images = torch.randn(3, 3, 96, 32)
    batches = []
    if utils.rank() == 0:
        batches = [("thermal", np.array([2, 0, 1]), images)]
    features = extract_features(net, batches, 3)
    with torch.no_grad():
        pool5, fc = net.eval()(thermal=images)
    np.testing.assert_allclose(features["fc"][[2, 0, 1]], fc, atol=1e-6)
    np.testing.assert_allclose(features["pool5"][[2, 0, 1]], pool5, atol=1e-6)


def test_a_rank_without_images_takes_part():
    in_processes(2, extract_on_rank_0)


# ---- a run --------------------------------------------------------------------------------------


@pytest.fixture
def flags(sysu_run) -> list:
    return [*TINY, "--data_path", sysu_run["data"], "--epochs", 3, "--resume", "last"]


def run_training(flags: list, out: Path, *more) -> None:
    run_here("train.py", *flags, "--model_path", out, "--log_path", out, *more)


def comparable(contents: dict) -> dict:
    """Numbers in files, without those that rounding changes by leaps.

    A broken tie moves scores, and a gradient jumps where ReLU has its kink.
    """
    for content in contents.values():
        lines = content
        if isinstance(content, dict):
            for name in ("cmc", "mAP", "best", "optimizer", "config"):
                del content[name]
            lines = content["metrics"]
        for line in lines:
            for name in line:
                if name.startswith(("fc_", "pool5_")):
                    line[name] = None
    return contents


def test_a_run_may_change_its_number_of_processes(flags, tmp_path):
    """Begun by one process, resumed by two, ended by one; rounding is all that differs."""
    flags = [*flags, "--lr", 0.001]  # rounding grows with it
    one = tmp_path / "one"
    several = tmp_path / "several"
    run_training(flags, one, "--epochs", 4)
    run_training(flags, several, "--epochs", 0)
    in_processes(2, run_training, flags, several)
    run_training(flags, several, "--epochs", 4)
    assert_close(comparable(read_all(several)), comparable(read_all(one)), rtol=0, atol=5e-4)
    names = [{str(file.relative_to(out)) for file in out.rglob("*")} for out in (one, several)]
    assert names[0] == names[1]
    log = next(several.glob("*.log")).read_text()
    assert all(log.count(f"epoch   {epoch} step") == 1 for epoch in range(5))  # of rank 0 alone


def train_apart(flags: list, out: Path) -> None:
    run_training(flags, out / str(utils.rank()))


def test_ranks_that_see_other_folders_are_an_error(flags, tmp_path, capfd):
    """Like machines without a shared folder: only rank 0 finds the checkpoint."""
    run_training(flags, tmp_path / "0", "--epochs", 0)
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="exit code 2"):
        in_processes(2, train_apart, flags, tmp_path)
    assert "must be one folder for all machines" in capfd.readouterr().err


def test_training_without_synchronised_statistics(flags, tmp_path):
    """With torch's own BatchNorm; the run's name says so."""
    in_processes(2, run_training, [*flags, "--no-sync_bn"], tmp_path)
    (last,) = tmp_path.glob("*_nosyncbn_last.t")
    assert utils.load_checkpoint(str(last))["epoch"] == 3


# ---- torchrun -----------------------------------------------------------------------------------


def torchrun(*command, **environment) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    words += [str(ROOT / "tests/distributed_helpers.py"), *(str(word) for word in command)]
    return subprocess.run(
        words, env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


def our_error_lines(done: subprocess.CompletedProcess) -> list[str]:
    """The lines on stderr that are not torchrun's."""
    return re.findall(r"^\S+\.py: error: .*", done.stderr, re.MULTILINE)


def test_a_killed_run_of_two_processes_is_resumed(flags, tmp_path):
    """To the rounding of sums; each rank has its own dropout."""
    flags = [*flags, "--drop", 0.3, "--lr", 0.001]
    in_processes(2, run_training, flags, tmp_path / "whole")
    out = tmp_path / "out"
    command = ["train.py", *flags, "--model_path", out, "--log_path", out]
    killed = torchrun(*command, KILL_RANK_1_AFTER="4")
    assert killed.returncode, killed.stdout
    in_processes(2, run_training, flags, out)
    resumed = comparable(read_all(out))
    whole = comparable(read_all(tmp_path / "whole"))
    assert_close(resumed, whole, rtol=0, atol=5e-4)


@pytest.fixture
def score_command(sysu_run) -> list:
    (best,) = sysu_run["models"].glob("*_best.t")
    return ["test.py", "--resume", best, "--workers", 0, "--test-batch", 4]


def test_processes_score_as_one(score_command, sysu_run, tmp_path):
    command = [*score_command, "--data_path", sysu_run["data"], "--log_path"]
    run_here(*command, tmp_path / "one")
    in_processes(2, run_here, *command, tmp_path / "several")
    several = rows_of(only_json(tmp_path / "several"))
    one = rows_of(only_json(tmp_path / "one"))
    assert_close(several, one, rtol=0, atol=1e-6)


def test_an_image_that_one_rank_cannot_read_is_one_line(score_command, sysu_run, tmp_path):
    tree = shutil.copytree(sysu_run["data"], tmp_path / "tree")
    images = sysu_test(str(tree))
    first_of_rank_1 = Path(images.paths[np.flatnonzero(images.thermal)[1]])
    first_of_rank_1.write_bytes(b"damaged")
    log_path = tmp_path / "log"
    done = torchrun(*score_command, "--data_path", tree, "--log_path", log_path)
    (line,) = our_error_lines(done)
    assert done.returncode
    assert first_of_rank_1.name in line
    assert not list(log_path.glob("*.json"))
