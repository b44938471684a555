"""What every script shares: flags, device and seeds, logs, whole files, checkpoints.

Functions that need torch import it themselves: it takes seconds and half a gigabyte, which preprocessing does without.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import errno
import importlib.metadata
import io
import json
import logging
import logging.handlers
import os
import pickletools
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, BinaryIO, NoReturn

import numpy as np
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None
if TYPE_CHECKING:
    import torch

DATA_PATHS = {"sysu": "data/SYSU-MM01", "regdb": "data/RegDB"}
# The published training commands, which differ by dataset.
PUBLISHED = {
    "sysu": {"lr": 0.008, "epochs": 60, "w_hc": 0.6},
    "regdb": {"lr": 0.0098, "epochs": 80, "w_hc": 0.58},
}

IMAGE_SIZE, LARGEST = ("img_h", "img_w"), 2048  # pixels a side

log = logging.getLogger(__name__)


# ---- flags ----------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Takes ``--per_img`` and ``--per-img`` alike; a wrong flag is one line on stderr and exit status 2."""

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        args = [re.sub("^--[^=]+", lambda name: name[0].replace("_", "-"), arg) for arg in args]
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        fail(message)


def number(kind: type, least: float, below: float = float("inf"), above: bool = False) -> Callable:
    """An argparse type: a finite int or float from ``least`` on (beyond it if ``above``), smaller than ``below``."""

    def parse(text: str):
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"must be a {'whole ' * (kind is int)}number, not {text!r}") from None
        if not least <= value < below or (above and value == least):
            start = f"{'above' if above else 'at least'} {least}"
            end = "finite" if below == float("inf") else f"at most {below - 1}" if kind is int else f"below {below}"
            raise argparse.ArgumentTypeError(f"must be {start} and {end}, not {text}")
        return value

    return parse


def weights(text: str) -> str:
    """An argparse type: imagenet, none, or a file that is there and whole."""
    if text not in ("imagenet", "none"):
        if not os.path.isfile(text):
            fail(f"--pretrained {text}: no such file; give 'imagenet', 'none' or a file")
        check_archive(text)
    return text


def add_data_flags(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    add = parser.add_argument
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # Linux; elsewhere
    return [
        add("--data-path", help="the dataset's folder (default: data/SYSU-MM01 or data/RegDB)"),
        add("--img-w", type=number(int, 1, LARGEST + 1), default=144, help="image width in pixels (%(default)s)"),
        add("--img-h", type=number(int, 1, LARGEST + 1), default=288, help="image height in pixels (%(default)s)"),
        add("--workers", type=number(int, 0, 257), default=cores, help="reading processes (one per core: %(default)s)"),
    ]


def add_shared_flags(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Flags that train.py and test.py have in common."""
    add = parser.add_argument
    return [
        add("--dataset", choices=["sysu", "regdb"], default="sysu", help="dataset (%(default)s)"),
        *add_data_flags(parser),
        add("--arch", choices=["resnet50", "resnet18"], default="resnet50", help="both streams (%(default)s)"),
        add(
            "--low-dim", type=number(int, 1, 2**16), default=512, help="dimensions of a stripe's feature (%(default)s)"
        ),
        add("--drop", type=number(float, 0, 1), default=0.0, help="dropout before the classifiers (%(default)s)"),
        add("--resume", "-r", default="", help="checkpoint: a file, or its name in --model_path"),
        add("--model-path", default="save_model/", help="folder of the checkpoints (%(default)s)"),
        add("--log-path", default="log/", help="folder of the log files (%(default)s)"),
        add("--test-batch", type=number(int, 1, 2**16), default=64, help="images per test batch (%(default)s)"),
        add("--gpu", default="0", help="number of the GPU (%(default)s)"),
        add("--seed", type=number(int, 0, 2**32), default=1, help="seed of everything random (%(default)s)"),
    ]


def add_training_flags(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Flags that only training needs; test.py takes and ignores them, since published commands pass them."""
    add = parser.add_argument
    published = "(as published for the dataset)"
    return [
        add("--lr", type=number(float, 0, above=True), help=f"learning rate; the ResNets' is a tenth {published}"),
        add("--optim", choices=["sgd", "adam"], default="sgd", help="optimizer (%(default)s)"),
        add("--epochs", type=number(int, 0, 10**6), help=f"the last epoch: N trains N + 1 epochs, 0 to N {published}"),
        add(
            "--batch-size",
            type=number(int, 1, 2**16),
            default=32,
            help="images of each modality in a batch (%(default)s)",
        ),
        add("--per-img", type=number(int, 1, 2**16), default=8, help="of these, images of each person (%(default)s)"),
        add("--w-hc", type=number(float, 0), help=f"weight of the Hetero-Center loss {published}"),
        add("--thd", type=number(float, 0), default=0.0, help="margin of the Hetero-Center loss (%(default)s)"),
        add("--dist-type", choices=["l2", "l1", "cos"], default="l2", help="distance of the centers (%(default)s)"),
        add(
            "--save-epoch",
            type=number(int, 1, 10**6),
            default=20,
            help="keep each n-th epoch after the 10th (%(default)s)",
        ),
        add("--method", default="id", help="a word for the names of the run's files (%(default)s)"),
        add("--test-only", action="store_true", help="score the --resume checkpoint and stop"),
    ]


def add_scoring_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of whatever scores features: the protocols and the distance."""
    add = parser.add_argument
    add("--mode", choices=["all", "indoor", "both"], default="all", help="SYSU-MM01 search (%(default)s)")
    add("--gall-mode", choices=["single", "multi", "both"], default="single", help="SYSU-MM01 shots (%(default)s)")
    add("--gallery", choices=["seeded", "official"], default="seeded", help="SYSU-MM01's ten draws (%(default)s)")
    add("--rand-perm", help="the rand_perm_cam.mat of SYSU-MM01's authors, for --gallery official")
    add("--search", choices=["v2t", "t2v", "both"], default="v2t", help="RegDB's direction (%(default)s)")
    add("--tvsearch", dest="search", action="store_const", const="t2v", help="short for --search t2v")
    add("--distance", choices=["cosine", "euclidean"], default="cosine", help="distance of the features (%(default)s)")
    add("--rerank", action="store_true", help="k-reciprocal re-ranking (Zhong et al. 2017); compares queries too")


def scoring_options(args: argparse.Namespace) -> list[str]:
    """What of these flags is not at its default, in words that name results; ends the program if they contradict."""
    if (args.gallery == "official") != bool(args.rand_perm):
        fail("--gallery official and --rand_perm FILE, its rand_perm_cam.mat, go together")
    choices = [("official", args.gallery == "official"), ("euclidean", args.distance == "euclidean")]
    return [option for option, chosen in [*choices, ("rerank", args.rerank)] if chosen]


def run(main: Callable[[], None]) -> None:
    """Call a script's ``main``; what is wrong on disk or not finite becomes one line, not a traceback."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # as Ctrl-C does: temporary files go
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        main()
    except (OSError, FloatingPointError) as error:
        fail(str(error))
    except (MemoryError, RuntimeError) as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's
            fail("the GPU's memory does not suffice: a smaller --batch-size or --test-batch needs less")
        if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
            fail("the memory does not suffice: smaller images or a smaller --batch-size or --test-batch need less")
        if type(error).__name__ == "BrokenProcessPool":
            fail("a process that reads images was killed, perhaps for memory: fewer --workers need less")
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            fail(f"--compile does not work here ({str(error).splitlines()[0]}): leave it out")
        raise
    except KeyboardInterrupt:
        sys.exit(130)


class Stopped(Exception):
    """SIGINT, SIGTERM or SIGHUP has come; ``status`` is the exit status that tells so."""

    def __init__(self, status: int):
        super().__init__()
        self.status = status


@contextlib.contextmanager
def stoppable():
    """Yield a function that raises `Stopped` once SIGINT, SIGTERM or SIGHUP has come; a second one ends the program."""
    received = []

    def note(number: int, _) -> None:
        received.append(number)
        if len(received) > 1:
            os._exit(128 + number)  # at once, wherever it is; what it leaves is removed at the next start

    def check() -> None:
        if received:
            raise Stopped(128 + received[0])

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def blame(cause: str):
    """A ``ValueError`` of the call inside comes from ``cause``, a file or flag: end the program saying so."""
    try:
        yield
    except ValueError as error:
        fail(f"{cause}: {error}")


def fail(message: str) -> NoReturn:
    """End the program with one line on stderr, and in the log file if there is one, and exit status 2."""
    with contextlib.suppress(OSError):
        logging.getLogger("__main__").debug("error: %s", message)
    sys.stderr.write(f"{os.path.basename(sys.argv[0])}: error: {' '.join(message.split())}\n")
    sys.exit(2)


# ---- logs, device and seeds -----------------------------------------------------------------------------------------


class _Console(logging.Handler):
    """Prints around progress bars instead of through them."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:  # nobody reads any more: no reason to end a training
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        raise  # the OSError at hand: a full disk ends the program, not just its log


class _Kept(logging.handlers.MemoryHandler):
    """Keeps lines for a log file until `open`; if that never comes, not even the end of the program writes them."""

    def __init__(self, file: _LogFile):
        super().__init__(sys.maxsize, sys.maxsize)
        self.file = file

    def open(self) -> None:
        self.setTarget(self.file)
        self.capacity = 0
        self.flush()


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return ("warning: " if record.levelno >= logging.WARNING else "") + record.getMessage()


def start_log(path: str | None = None) -> None:
    """Send log lines to the screen, and keep them for the file ``path``, with the scripts' debug lines: `write_log`."""
    console = _Console(logging.INFO)
    console.setFormatter(_Formatter())
    handlers = [console]
    if path:
        make_folder(os.path.dirname(path), "--log_path")
        file = _LogFile(path, encoding="utf-8", errors="backslashreplace", delay=True)
        file.setFormatter(_Formatter())
        handlers.append(_Kept(file))
    logging.basicConfig(level=logging.INFO, handlers=handlers, force=True)
    logging.getLogger("__main__").setLevel(logging.DEBUG)


def write_log(after: str | None = None) -> None:
    """Append what was said so far, and from now on what is said, to the log file: what can be refused has been.

    ``after``: a line of the file. Those below its last occurrence were written by a run that was lost, and are removed.
    """
    for kept in logging.getLogger().handlers:
        if isinstance(kept, _Kept):
            path = kept.file.baseFilename
            if after and os.path.exists(path):
                with open(path, "r+b") as file:
                    head, line, _ = file.read().rpartition(f"\n{after}\n".encode())
                    if line:
                        file.truncate(len(head + line))
            kept.open()


def versions() -> dict[str, str]:
    """Versions of what computes the results and, in a git checkout, the commit."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        git = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty"], capture_output=True, text=True)
        commit = git.stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    libraries = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "numpy")}
    return {"python": platform.python_version(), **libraries, "commit": commit or "unknown"}


def log_run(args: argparse.Namespace) -> None:
    """Write down what runs, at the top of every log file."""
    for title, values in (("flags", dict(sorted(vars(args).items()))), ("versions", versions())):
        text = " ".join(f"{name}={value}" for name, value in values.items())
        logging.getLogger("__main__").debug("%s: %s", title, text)


def select_device(gpu: str) -> torch.device:
    """The GPU that ``--gpu`` names, else what there is; says which and why (FIDELITY 10: one GPU for now)."""
    import torch

    wanted = gpu.split(",")[0].strip()
    if not wanted.isdecimal():
        fail(f"--gpu {gpu}: give the number of a GPU, like 0")
    count = torch.cuda.device_count()
    if count == 0:
        log.info("device: cpu (no GPU is available)")
        return torch.device("cpu")
    index = int(wanted) if int(wanted) < count else 0
    if index != int(wanted):
        log.warning("there is no GPU %s; GPU 0 is used", wanted)
    if count > 1:
        log.info("%d GPUs are visible; a run uses one", count)
    log.info("device: cuda:%d (%s)", index, torch.cuda.get_device_name(index))
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def seed_everything(seed: int, deterministic: bool = True, tf32: bool = False) -> None:
    """Seed every generator; ask for the same result each time and for full fp32, unless told otherwise (FIDELITY 9)."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time; nothing here reads such memory
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32


def report(results, networks: list[dict], options: list[str], args: argparse.Namespace, path: str) -> None:
    """Show `eval_metrics.Results` as a table, and write all of it to ``path``, a JSON file.

    Args:
        networks: where the features come from, a dict for each.
        options: what else must be known to compare the results; stands below the table.
    """
    write_log()
    for (protocol, feature), trials in results.scores.items():
        for trial, scores in trials.items():
            logging.getLogger("__main__").debug("%s  %s  trial %d: %s", protocol, feature, trial, scores)
    log.info("\n%s%s", results.table(), f"; options: {', '.join(options)}" if options else "")
    near_chance = results.near_chance()
    if near_chance:
        log.warning(
            "rank-1 is about what chance gives (%s%s): is the network trained, and on this dataset and trial? "
            "Are the data the right ones, with thermal and visible images where they belong?",
            near_chance[0],
            f", and {len(near_chance) - 1} more rows" if near_chance[1:] else "",
        )
    content = {"flags": vars(args), "options": options, "versions": versions(), "networks": networks}
    with whole_file(path) as partial, open(partial, "w", encoding="utf-8") as file:
        json.dump(content | results.to_json(), file, indent=1)
    log.info("all trials: %s", path)


# ---- files ----------------------------------------------------------------------------------------------------------


def make_folder(path: str, flag: str) -> None:
    """Create a folder for output, if need be, and make sure that it can be written before work is put into it."""
    try:
        os.makedirs(path or ".", exist_ok=True)
        tempfile.TemporaryFile(dir=path or ".").close()
    except OSError as error:
        raise OSError(f"{flag} {path}: cannot be written ({error.strerror}); give another folder") from None
    remove_partial_files(path)


def remove_partial_files(folder: str) -> None:
    """Remove what programs that were killed have left of their `whole_file`; those still being written stay."""
    for name in os.listdir(folder or "."):
        if re.search(r"\.[0-9]+\.partial$", name):
            path = os.path.join(folder, name)
            with contextlib.suppress(OSError), open(path, "r+b") as file:
                _flock(file)
                os.remove(path)


@contextlib.contextmanager
def whole_file(path: str):
    """Yield a temporary name beside ``path`` to write to; the file gets its own name only when it is whole, on disk."""
    if os.path.isdir(path):
        raise OSError(f"{path} is a folder: a file of that name is to be written; give another, or remove it")
    partial = f"{path}.{os.getpid()}.partial"
    try:
        with _open_locked(partial) as file:
            yield partial
            os.fsync(file.fileno())
            os.replace(partial, path)
        if hasattr(os, "O_DIRECTORY"):  # then the new name can be made to last, too
            folder = os.open(os.path.dirname(path) or ".", os.O_DIRECTORY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        if errno.errorcode.get(error.errno) in ("ENOSPC", "EDQUOT"):
            raise OSError(
                f"{path} cannot be written: the disk is full. Make room and go on: what was there before is whole"
            ) from None
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)


@contextlib.contextmanager
def lock(name: str):
    """Keep other processes from the files of this name as long as the ``with`` block, or this process, lives.

    Raises:
        OSError: another process has it.
    """
    path = f"{name}.lock"
    try:
        file = _open_locked(path)
    except BlockingIOError:
        raise OSError(f"another process is writing {name}… (it holds {path}): wait for it, or stop it") from None
    with file:
        try:
            yield
        finally:
            os.remove(path)


def _open_locked(path: str) -> BinaryIO:
    while True:
        file = open(path, "ab")  # noqa: SIM115 given to the caller
        try:
            _flock(file)
        except BlockingIOError:
            file.close()
            raise
        except OSError:  # a file system without locks
            return file
        if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(file.fileno())):
            return file
        file.close()  # whoever had it has just removed it


def _flock(file: BinaryIO) -> None:
    if fcntl is None:
        raise OSError("there are no locks here")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the file is closed, or the process ends in whatever way


def save_checkpoint(path: str | list[str], state: dict) -> None:
    """Write a dict of plain types and tensors; ``path`` always holds a whole checkpoint or the one before.

    Equal states give equal bytes. Of several paths each gets the same, one after the other.

    Raises:
        OSError: the file cannot be written, on a full disk for instance.
        TypeError: ``state`` holds something else.
    """
    import torch

    data = io.BytesIO()  # torch's own writer would not say that a disk is full
    torch.save(_plain(state), data)
    for name in [path] if isinstance(path, str) else path:
        with whole_file(name) as partial, open(partial, "wb") as file:
            file.write(data.getbuffer())


def _plain(value, device: str = "cpu", room: list[int] | None = None):
    """A copy of nested dicts and lists of numbers, text and tensors, these on ``device``; equal texts are one object.

    ``room``: one number, of bytes that the copy may take (and one for each of its parts); it is counted down.

    Raises:
        TypeError: there is something else in it, or a tensor that claims more than the memory it has.
        MemoryError: it takes more than ``room``.
    """
    import torch

    def part(value):
        if room:
            room[0] -= 1 + (value.numel() * value.element_size() if torch.is_tensor(value) else 0)
            if room[0] < 0:
                raise MemoryError("it holds more than its size")
        if isinstance(value, dict):
            return {part(key): part(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            items = [part(item) for item in value]
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, str):
            return sys.intern(str(value))
        if isinstance(value, (np.ndarray, np.generic)):
            return part(value.tolist())
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.is_quantized or value.device.type == "meta":
                raise TypeError("a tensor is not a plain one")
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise TypeError("a tensor is larger than its data")
            return value.detach().to(device, copy=True)
        if value is None or isinstance(value, (bool, int, float)):
            return value
        raise TypeError(f"{type(value).__name__} is not a plain type")

    return part(value)


def load_checkpoint(path: str, map_location: str = "cpu") -> dict:
    """Read a checkpoint of train.py or a published ``.t`` file without running code from it (FIDELITY 16).

    Numpy values become plain ones: ``cmc`` is a list of float, ``mAP`` a float.

    Raises:
        OSError: the file is missing, damaged, claims more than it holds, or holds no network.
    """
    import torch

    check_archive(path)
    try:
        check_names(path)
        with torch.serialization.safe_globals(_PUBLISHED_TYPES), warnings.catch_warnings(action="ignore"):
            # Mapped, a tensor cannot reach beyond the file.
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        state = _plain(state, map_location, [os.path.getsize(path)])
    except Exception as error:  # torch raises whatever the damage leads to
        raise OSError(
            f"{path} is not a checkpoint that can be loaded safely ({type(error).__name__}): get another copy of it"
        ) from None
    net, config = (state.get("net"), state.get("config", {})) if isinstance(state, dict) else (None, None)
    if not (
        isinstance(net, dict)
        and isinstance(config, dict)
        and all(isinstance(key, str) and torch.is_tensor(value) for key, value in net.items())
    ):
        raise OSError(f"{path} is not a checkpoint of this method: it has no 'net' with the network's weights")
    if (
        any(not isinstance(value, (str, int, float, type(None))) for value in config.values())
        or any(type(config.get(size, 1)) is not int or not 1 <= config.get(size, 1) <= LARGEST for size in IMAGE_SIZE)
        or not isinstance(state.get("epoch"), (int, type(None)))
    ):
        raise OSError(f"{path}: its config or its epoch is not what train.py writes: get another copy of it")
    # torch.nn.DataParallel, with which some people ran the published code, puts "module." before each name.
    state["net"] = {key.removeprefix("module."): value for key, value in net.items()}
    return state


def check_archive(path: str) -> None:
    """OSError: a file that torch.save or numpy.savez wrote is damaged, or claims more than it holds.

    Neither library compares the checksums of such a file, or its sizes, itself. Files of PyTorch before 1.6 have none.
    """
    with open(path, "rb") as file:
        if file.read(2) != b"PK" and not zipfile.is_zipfile(path):
            return
    try:
        with zipfile.ZipFile(path) as archive:
            entries, size = archive.infolist(), os.path.getsize(path)
            large = sum(entry.file_size for entry in entries) > 100 * size + 2**26
            whole = not large and sum(entry.compress_size for entry in entries) <= size and not archive.testzip()
    except Exception:  # zipfile, zlib and others raise whatever the damage leads to
        whole = False
    if not whole:
        raise OSError(f"{path} is damaged, or claims more than it holds: get another copy of it")


def check_names(path: str) -> None:
    """TypeError: the pickle in a checkpoint names something else than tensors and what published checkpoints hold.

    What torch.load lets pass by itself is more than that, with bytes of any size among it.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            pickles = [io.BytesIO(archive.read(name))]
    else:
        with open(path, "rb") as file:
            head = io.BytesIO(file.read(2**24))
        pickles = [head] * 5  # one after the other: format, its version, the machine, the content, its tensors' keys
    for pickle in pickles:
        for opcode, argument, _ in pickletools.genops(pickle):
            if opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
                raise TypeError("a name is not spelt out")
            if opcode.name == "GLOBAL" and not re.fullmatch(_NAMES, argument):
                raise TypeError(f"{argument} is not allowed")


def check_fit(path: str, checkpoint: dict, found: dict, args: argparse.Namespace, more: Iterable[str] = ()) -> dict:
    """End the program if flags contradict what a checkpoint was trained with (FIDELITY 14, 24).

    Args:
        found: what `model.describe_weights` reads off the weights: arch, low_dim, n_class, has_drop.
        args: flags; one that is None was not given and contradicts nothing.
        more: flags to compare beside dataset, arch, low_dim and RegDB's trial, where the ``config`` knows them.

    Returns:
        ``found`` and, where the checkpoint has a ``config``, its dataset, trial, img_h and img_w.
    """
    trained = {**checkpoint.get("config", {}), **found}
    names = ["dataset", "arch", "low_dim", *(["trial"] if args.dataset == "regdb" else []), *more]
    pairs = [(name, trained.get(name), getattr(args, name)) for name in names]
    wrong = [(name, was, given) for name, was, given in pairs if None not in (was, given) and was != given]
    if wrong:
        needed = " ".join(f"--{name} {was}" for name, was, _ in wrong)
        given = " ".join(f"--{name} {given}" for name, _, given in wrong)
        fail(
            f"{path} was trained with {needed}, not {given}: give the flags it was trained with, or another checkpoint"
        )
    if args.drop is not None and (args.drop > 0) != found["has_drop"]:
        fail(f"{path} was trained with{'' if found['has_drop'] else 'out'} dropout, unlike --drop {args.drop:g}")
    return found | {name: trained[name] for name in ("dataset", "trial", *IMAGE_SIZE) if name in trained}


def find_checkpoint(resume: str, model_path: str) -> str:
    """``--resume`` is a file's name in ``--model_path``, as in the published commands, or a path of its own."""
    for path in (os.path.join(model_path, resume), resume):
        if os.path.isfile(path):
            return path
    raise FileNotFoundError(
        f"--resume {resume}: no such checkpoint, neither in --model_path {model_path} nor as a path"
    )


def _latin1(text: str, encoding: str) -> bytes:
    """Stands in for ``_codecs.encode``, with which Python 3 pickles bytes under the old protocol of ``.t`` files."""
    if encoding != "latin1":
        raise ValueError(f"unexpected encoding {encoding!r}")
    return codecs.encode(text, encoding)


# What a checkpoint may name: tensors, the dicts that hold them, and the numpy values of published ones.
_NAMES = (
    r"collections OrderedDict|torch(\.storage)? \w+Storage|torch\._utils _rebuild_(tensor(_v2)?|parameter)"
    r"|numpy (ndarray|dtype)|numpy\._?core\.multiarray (_reconstruct|scalar)|numpy\.dtypes \w+DType|_codecs encode"
)
# The numpy names in published checkpoints, whose cmc is an array and mAP a scalar, under numpy 1 and 2.
_PUBLISHED_TYPES = [
    np.ndarray,
    np.dtype,
    *{type(np.dtype(code)) for code in ("f2", "f4", "f8", "i4", "i8")},
    *((getattr(np._core.multiarray, name), f"numpy.{core}.multiarray.{name}")
      for name in ("_reconstruct", "scalar") for core in ("core", "_core")),
    (_latin1, "_codecs.encode"),
]  # fmt: skip
