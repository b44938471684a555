"""Several processes on CPUs, in place of several GPUs, and a backbone that trains in a second.

    torchrun --nproc_per_node=2 tests/distributed_helpers.py train.py <flags>

runs train.py with the backbone "tiny" and with a stand-in for torch's SyncBatchNorm, which
computes on GPUs alone. KILL_RANK_1_AFTER=<steps> in the environment sends SIGKILL to rank 1.
"""

import os
import runpy
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import model  # noqa: E402
import train  # noqa: E402


def build_tiny() -> nn.Module:
    """(N, 3, height, width) -> (N, 32, height / 16, width / 16), rounded up."""
    return nn.Sequential(
        nn.Conv2d(3, 32, kernel_size=3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AvgPool2d(8, ceil_mode=True),
    )


def tiny_weights() -> dict[str, Tensor]:
    raise OSError("nobody has trained this backbone")


model.BACKBONES["tiny"] = model.Backbone(build_tiny, 32, tiny_weights)


class SumOverRanks(torch.autograd.Function):
    """The sum over the ranks; the gradient is summed, too."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


class ExactBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the rows of all ranks, which all must have equally many."""

    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        rank = dist.get_rank()
        rows_of_ranks = [torch.zeros_like(x) for _ in range(dist.get_world_size())]
        rows_of_ranks[rank] = x
        whole_batch = SumOverRanks.apply(torch.cat(rows_of_ranks))
        return super().forward(whole_batch)[rank * len(x) : (rank + 1) * len(x)]

    @classmethod
    def convert_sync_batchnorm(cls, net: nn.Module) -> nn.Module:
        for module in net.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.__class__ = cls
        return net


def in_processes(world_size: int, function: Callable, *args) -> None:
    """Call ``function(*args)`` in forked processes that are the ranks of one run."""
    with tempfile.TemporaryDirectory() as folder:  # where they meet
        store = f"{folder}/store"
        torch.multiprocessing.start_processes(
            call_in_process,
            (world_size, store, function, args),
            nprocs=world_size,
            start_method="fork",
        )


def call_in_process(
    rank: int, world_size: int, store: str, function: Callable, args: tuple
) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    nn.SyncBatchNorm = ExactBatchNorm
    function(*args)
    if dist.is_initialized():  # a script has destroyed it at its end
        dist.destroy_process_group()


def kill_rank_1_after(n_steps: int) -> None:
    train_step = train.train_step
    steps_done = 0

    def counting_step(*args):
        nonlocal steps_done
        result = train_step(*args)
        steps_done += 1
        if steps_done == n_steps and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    train.train_step = counting_step


if __name__ == "__main__":
    nn.SyncBatchNorm = ExactBatchNorm
    if "KILL_RANK_1_AFTER" in os.environ:
        kill_rank_1_after(int(os.environ["KILL_RANK_1_AFTER"]))
    script = sys.argv.pop(1)
    if script == "train.py":
        # runpy would load the file anew, without the step that counts. Other scripts have none.
        train.utils.run(train.main)
    else:
        runpy.run_path(str(ROOT / script), run_name="__main__")
