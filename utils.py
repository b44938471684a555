"""What every script shares: flags, errors and signals, logs, device and seeds, files, checkpoints."""

import argparse
import codecs
import contextlib
import datetime
import errno
import importlib.metadata
import io
import json
import logging
import os
import random
import shlex
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist

from data_manager import DATASETS

log = logging.getLogger(__name__)


# ---- flags ----------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Takes ``--per_img`` and ``--per-img`` alike; a wrong flag is one line on stderr and exit status 2.

    Flags in the group ``running`` say where and how a run goes on. All others decide what comes out: they stand in the
    checkpoint's config, are compared when a run is resumed and, unless they have their default, are in its name.
    """

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.data, self.model, self.optimisation = map(self.add_argument_group, ("data", "model", "optimisation"))
        self.running = self.add_argument_group("running (may change when a run is resumed)")

    def parse_known_args(self, args=None, namespace=None):
        """As argparse does; flags that were not given take their dataset's defaults, too small ones are refused."""
        spelling = {option.replace("-", "_"): option for option in self._option_string_actions}
        words = [arg.partition("=") for arg in (sys.argv[1:] if args is None else args)]
        words = ["".join([spelling.get(name.replace("-", "_"), name), *value]) for name, *value in words]
        found, rest = super().parse_known_args(words, namespace)
        for name, default in DATASETS[found.dataset].defaults.items() if "dataset" in found else ():
            if name in found and getattr(found, name) is None:
                setattr(found, name, default)
        for name, value in vars(found).items():
            least = int(name in ("img_h", "img_w", "low_dim", "batch_size", "per_img", "test_batch"))
            if isinstance(value, (int, float)) and value < least:
                self.error(f"--{name} {value} must be {least} or more")
        return found, rest

    def error(self, message: str) -> NoReturn:
        fail(message)

    def deciding(self) -> list[str]:
        """The flags that decide what comes out."""
        others = {"help", *(action.dest for action in self.running._group_actions)}
        return [action.dest for action in self._actions if action.dest not in others]

    def shapes(self) -> list[argparse.Action]:
        """The data and model flags, which test.py reads from the checkpoint."""
        return [*self.data._group_actions, *self.model._group_actions]


def by_dataset(name: str) -> str:
    """The defaults of a flag, in words."""
    return ", ".join(f"{own.title} {own.defaults[name]}" for own in DATASETS.values() if name in own.defaults)


def add_data_flags(parser: Parser) -> None:
    """Where images are, how large they become, and who reads them."""
    parser.data.add_argument("--img_h", type=int, default=288, help="image height in pixels (%(default)s)")
    parser.data.add_argument("--img_w", type=int, default=144, help="image width in pixels (%(default)s)")
    parser.running.add_argument("--data_path", help=f"folder of the dataset ({by_dataset('data_path')})")
    parser.running.add_argument(
        "--workers", type=int, default=torch.get_num_threads(), help="image readers (%(default)s)"
    )


def add_shared_flags(parser: Parser, archs: Iterable[str]) -> None:
    """Flags of train.py and test.py."""
    model, running = parser.model.add_argument, parser.running.add_argument
    parser.data.add_argument("--dataset", choices=[*DATASETS], default="sysu", help="dataset (%(default)s)")
    model("--arch", choices=[*archs], default="resnet50", help="backbone of each modality (%(default)s)")
    model("--low-dim", type=int, default=512, help="dimensions of a stripe's feature (%(default)s)")
    model("--drop", type=float, default=0.0, help="dropout before the classifiers (%(default)s)")
    add_data_flags(parser)
    running("--resume", "-r", default="", help="checkpoint: a path, or a name in --model_path; train.py: or last")
    running("--model_path", default="save_model/", help="folder of the checkpoints (%(default)s)")
    running("--log_path", default="log/", help="folder of logs and results (%(default)s)")
    running("--test-batch", type=int, default=64, help="images per test batch (%(default)s)")
    running("--gpu", type=int, default=0, help="number of the GPU (%(default)s)")


def add_search_flags(add: Callable) -> None:
    """The flags that choose protocols; `data_manager.Dataset.searches` checks their values."""
    for flag, text in (("mode", "cameras"), ("gall_mode", "images per person and camera"), ("search", "direction")):
        known = [f"{d.title} {', '.join(d.search_flags[flag])}" for d in DATASETS.values() if flag in d.search_flags]
        add(f"--{flag.replace('_', '-')}", help=f"{text} ({'; '.join(known)}; or both). The first is the default")


# ---- errors, signals and processes ----------------------------------------------------------------------------------


def run(main: Callable[[], None]) -> None:
    """Call a script's ``main``, in each process that torchrun started, if it did. An error is one line on stderr."""
    try:
        if dist.is_torchelastic_launched():
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        main()
        end_processes()
    except (ValueError, OSError, FloatingPointError, MemoryError, torch.OutOfMemoryError) as error:
        fail(str(error) or type(error).__name__)
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        fail(f"a process of this run was lost ({error}): --resume last goes on from the last checkpoint")
    except KeyboardInterrupt:
        sys.exit(130)


def fail(message: str) -> NoReturn:
    """One line on stderr, the traceback in the log, exit status 2. For scripts; other code raises."""
    log.debug("refused", exc_info=True)
    if dist.is_torchelastic_launched():  # only the first to fail says why: others fail because of it
        place, wait = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), datetime.timedelta(seconds=10)
        with contextlib.suppress(RuntimeError):  # torchrun itself is gone
            store = dist.TCPStore(*place, is_master=False, timeout=wait)
            if store.add(f"failed {os.environ['TORCHELASTIC_RESTART_COUNT']}", 1) > 1:
                sys.exit(2)
    sys.stderr.write(f"{os.path.basename(sys.argv[0])}: error: {' '.join(message.split())}\n")
    sys.exit(2)


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Yield a list that gets an exit status when SIGINT, SIGTERM or SIGHUP comes. A second signal ends the program, but
    not under torchrun, which repeats signals by itself.
    """
    stop = []

    def note(number: int, _) -> None:
        if stop and not dist.is_initialized():
            sys.exit(stop[0])
        stop.append(128 + number)

    numbers = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)}  # Windows has no SIGHUP
    before = {n: signal.signal(n, note) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}  # as under nohup
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stop:  # it came too late to be looked at inside
        sys.exit(stop[0])


def share() -> tuple[int, int]:
    """(rank, processes): which of the processes this is, and how many share the run: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def end_processes() -> None:
    """Leave the processes of the run, when all have come here: torchrun ends the others if one ends in an error."""
    if dist.is_initialized():
        gather(None)
        dist.destroy_process_group()


def process_mean(x: torch.Tensor) -> torch.Tensor:
    """The mean of ``x`` over the processes, in place; a GPU does not wait for it."""
    if dist.is_initialized():
        dist.all_reduce(x.div_(dist.get_world_size()))
    return x


def gather(value) -> list:
    """Each process's value, by rank."""
    found = [value] * share()[1]
    if dist.is_initialized():
        dist.all_gather_object(found, value)
    return found


# ---- logs, device, seeds, files -------------------------------------------------------------------------------------


def start_log(args: argparse.Namespace, path: str | None = None) -> None:
    """Send log lines to the screen and append them to the file ``path``, with flags and versions at their top."""
    handlers = [logging.StreamHandler(sys.stdout)]
    handlers[0].setLevel(logging.INFO)
    if path:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        handlers.append(logging.FileHandler(path, encoding="utf-8", errors="backslashreplace"))
    for handler in handlers if share()[0] else ():  # process 0 speaks for all; of the others the log gets tracebacks
        handler.addFilter(lambda record: bool(record.exc_info))
    logging.raiseExceptions = False  # a closed screen or a full disk ends the log, not the training
    for level, word in ((logging.DEBUG, ""), (logging.INFO, ""), (logging.WARNING, "warning: ")):
        logging.addLevelName(level, word)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s%(message)s", handlers=handlers, force=True)
    log.setLevel(logging.DEBUG)  # such lines go to the log file alone
    for title, values in (("flags", dict(sorted(vars(args).items()))), ("versions", versions())):
        log.debug("%s: %s", title, " ".join(f"{name}={value}" for name, value in values.items()))


def versions() -> dict[str, str]:
    """Versions of what computes the results and, in a git checkout, the commit."""
    here = shlex.quote(os.path.dirname(os.path.abspath(__file__)))
    commit = subprocess.getoutput(f"git -C {here} describe --always --dirty 2>/dev/null")
    libraries = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "numpy")}
    return {"python": sys.version.split()[0], **libraries, "commit": commit or "unknown"}


def select_device(gpu: int, persons: int = 0) -> torch.device:
    """The GPU of this number, under torchrun that of the process, else the CPU. Logs which, and how many GPUs could
    share a batch of ``persons``, 0 for any number. ValueError: there are fewer GPUs than processes.
    """
    count, processes, note = torch.cuda.device_count(), share()[1], ""
    if processes > 1:
        gpu, note = int(os.environ["LOCAL_RANK"]), f"; {processes} processes, --gpu is ignored"
    if not count:
        log.info("device: cpu (no GPU is available)%s", note)
        return torch.device("cpu")
    usable = max(n for n in range(1, count + 1) if persons % n == 0)
    if gpu >= count and processes > 1:
        raise ValueError(f"there are fewer GPUs than processes: torchrun --nproc_per_node={usable}")
    if gpu >= count:
        gpu, note = 0, f"; there is no GPU {gpu}"
    log.info("device: cuda:%d (%s)%s", gpu, torch.cuda.get_device_name(gpu), note)
    if usable > processes == 1:
        log.info("%d of %d GPUs can share this: torchrun --nproc_per_node=%d %s", usable, count, usable, sys.argv[0])
    torch.cuda.set_device(gpu)
    return torch.device("cuda", gpu)


def seed_everything(seed: int, deterministic: bool = True, tf32: bool = False) -> None:
    """Seed every generator; ask for the same result each time and for full fp32, unless told otherwise (FIDELITY 9)."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
    for set_seed in (random.seed, np.random.seed, torch.manual_seed):
        set_seed(seed)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time; nothing here reads such memory
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32


@contextlib.contextmanager
def whole_file(path: str) -> Iterator[str]:
    """Write a file atomically: yield a name beside ``path`` to write to; flushed to disk, it then replaces ``path``.

    A kill or a full disk leaves what was there before; the next run overwrites a half-written file.
    """
    partial = f"{path}.partial"
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(f"{path} cannot be written: the disk is full; what was there before is whole") from error
        raise
    finally:
        with contextlib.suppress(OSError):  # gone if all went well
            os.remove(partial)


def save_checkpoint(path: str, state: dict) -> None:
    """Write a dict of plain types and tensors, atomically. OSError: it cannot be written, say on a full disk."""
    data = io.BytesIO()  # torch's own writer would not say that a disk is full
    torch.save(state, data)
    with whole_file(path) as partial, open(partial, "wb") as file:
        file.write(data.getbuffer())


def load_checkpoint(path: str, map_location: str = "cpu") -> dict:
    """Read a checkpoint of train.py or a published ``.t`` file without running code from it (FIDELITY 16).

    ``cmc`` becomes a list of float, ``mAP`` a float. The ``config`` that published files lack is read off the weights,
    which do not tell the rate of dropout: None, if there is any. OSError: it is missing, damaged, or of another method.
    """
    core = np._core.multiarray  # published files hold numpy values, under numpy 1's names or numpy 2's
    allowed = [(f, f"numpy.{module}.multiarray.{f.__name__}") for f in (core._reconstruct, core.scalar)
               for module in ("core", "_core")]  # fmt: skip
    allowed += [np.ndarray, np.dtype, codecs.encode, *(type(np.dtype(code)) for code in ("f4", "f8", "i8"))]
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():  # torch does not compare the checksums
            raise ValueError("a checksum is wrong")
        with torch.serialization.safe_globals(allowed):
            state = torch.load(path, map_location, weights_only=True)
        # torch.nn.DataParallel, with which some people ran the published code, puts "module." before each name.
        net = state["net"] = {key.removeprefix("module."): value for key, value in state["net"].items()}
        has_drop = "classifier1.classifier.2.weight" in net  # a Dropout moves the Linear's index from 1 to 2
        n_class, low_dim = net.get(f"classifier1.classifier.{1 + has_drop}.weight", torch.empty(0, 0)).shape
        arch = "resnet50" if "visible_net.visible.layer1.0.conv3.weight" in net else "resnet18"
        found = {"arch": arch, "low_dim": low_dim, "drop": None if has_drop else 0.0, "n_class": n_class}
        state["config"] = found | state.get("config", {})
        json.dumps([state["config"], state.get("epoch"), *state.get("metrics", ())])  # they hold plain values alone
        state["cmc"], state["mAP"] = [float(value) for value in state.get("cmc", ())], float(state.get("mAP", 0))
        return state
    except Exception as error:  # torch raises whatever the damage leads to
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:100]
        raise OSError(f"{path} cannot be loaded as a checkpoint of this method ({reason}): get another copy") from error


def find_checkpoint(resume: str, model_path: str) -> str:
    """The path of the --resume checkpoint: a name in --model_path, as in the published commands, or a path itself."""
    for path in (os.path.join(model_path, resume), resume):
        if os.path.isfile(path):
            return path
    raise FileNotFoundError(f"--resume {resume}: no such checkpoint, in --model_path {model_path} or as a path")


def open_checkpoint(args: argparse.Namespace, flags: Iterable[str]) -> tuple[dict, str]:
    """The --resume checkpoint and its path. ValueError: some of ``flags`` are unlike its own (FIDELITY 14, 24).

    A flag that is None, or that its config does not know, contradicts nothing.
    """
    path = find_checkpoint(args.resume, args.model_path)
    checkpoint = load_checkpoint(path)
    pairs = {flag: (checkpoint["config"].get(flag), getattr(args, flag)) for flag in flags}
    wrong = {flag: pair for flag, pair in pairs.items() if None not in pair and pair[0] != pair[1]}
    if wrong:
        was, given = (" ".join(f"--{flag} {pair[side]}" for flag, pair in wrong.items()) for side in (0, 1))
        raise ValueError(f"{path} was trained with {was}, not {given}: give the same flags, or another checkpoint")
    return checkpoint, path


def write_json(path: str, content: dict) -> None:
    with whole_file(path) as partial, open(partial, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
