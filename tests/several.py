"""Several processes on CPUs, in place of several GPUs: what stands in for torch's SyncBatchNorm, and two ways to start.

    torchrun --nproc_per_node=2 tests/several.py train.py <flags>

is train.py with the stand-in and the tiny backbone. ``HAPPENS="2 kill"`` in the environment sends SIGKILL to process 1
after its second step, ``"2 stop"`` SIGTERM to torchrun.
"""

import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import model  # noqa: E402
import train  # noqa: E402

# A backbone for what does not hang on the kind of network; it trains in a second.
model.BACKBONES["tiny"] = (
    lambda: nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.AvgPool2d(8, ceil_mode=True)),
    32,
)


class Sum(torch.autograd.Function):
    """The sum over the processes; so is its gradient."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    backward = forward


class ExactBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the rows of all processes, which torch's SyncBatchNorm computes on GPUs alone."""

    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        rank, processes = dist.get_rank(), dist.get_world_size()
        rows = [x if other == rank else torch.zeros_like(x) for other in range(processes)]
        return super().forward(Sum.apply(torch.cat(rows)))[rank * len(x) : (rank + 1) * len(x)]

    @classmethod
    def convert_sync_batchnorm(cls, net: nn.Module) -> nn.Module:
        for module in net.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.__class__ = cls
        return net


def in_processes(k: int, function: Callable, *args) -> None:
    """Call ``function(*args)`` in k forked processes that share a run."""
    with tempfile.TemporaryDirectory() as folder:  # where they find each other
        given = k, f"{folder}/store", function, args
        torch.multiprocessing.start_processes(_in_process, given, k, start_method="fork")


def _in_process(rank: int, k: int, store: str, function: Callable, args: tuple) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=k)
    nn.SyncBatchNorm = ExactBatchNorm
    function(*args)
    if dist.is_initialized():  # a script that ends well has done it
        dist.destroy_process_group()


def happen(after: int, what: str) -> None:
    real, steps = train.train_step, []

    def step(*args):
        done = real(*args)
        steps.append(1)
        if len(steps) == after and what == "kill" and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if len(steps) == after and what == "stop" and dist.get_rank() == 0:
            noted, came = signal.getsignal(signal.SIGTERM), []
            signal.signal(signal.SIGTERM, lambda *args: came.append(noted(*args)))
            os.kill(os.getppid(), signal.SIGTERM)
            while not came:  # torchrun passes it on
                time.sleep(0.01)
        return done

    train.train_step = step


if __name__ == "__main__":
    nn.SyncBatchNorm = ExactBatchNorm
    if "HAPPENS" in os.environ:
        number, event = os.environ["HAPPENS"].split()
        happen(int(number), event)
    script = sys.argv.pop(1)
    if script == "train.py":
        train.utils.run(train.main)
    else:
        runpy.run_path(str(ROOT / script), run_name="__main__")
