"""What all scripts share: errors, flags, ranks, logs, device and seeds, files, checkpoints."""

# "FIDELITY n" in docstrings and comments is row n of docs/FIDELITY.md.

import argparse
import codecs
import contextlib
import errno
import importlib.metadata
import io
import json
import logging
import os
import pickle
import random
import re
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout

PRECISIONS = ("tf32", "fp32", "bf16", "fp16")
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

log = logging.getLogger(__name__)


# ---- errors -------------------------------------------------------------------------------------


class InputError(ValueError):
    """An error that the user can fix. The message names cause and remedy in one line."""


MEMORY_ADVICE = (
    "out of memory: lower --test-batch or --workers; in training --batch-size, or "
    "give --cache host or --precision bf16"
)
READER_REMEDY = (
    "give --workers 0, or in a container raise its shared memory, as by docker run --shm-size 1g"
)
COMPILER_ADVICE = "no compiler for --compile: install one (gcc and g++), or leave --compile out"
RESOURCE_ADVICE = {  # part of an error message, in lower case: what to do about it
    "out of memory": MEMORY_ADVICE,
    "not enough memory": MEMORY_ADVICE,
    "allocate memory": MEMORY_ADVICE,
    "could not create a primitive": MEMORY_ADVICE,  # as PyTorch's library for CPUs says it
    "too many open files": "too many open files: give --workers 0, or raise `ulimit -n`",
    "dataloader worker (pid": f"an image reader died: lower --workers, {READER_REMEDY}",
    "start new thread": "no more threads can be started: lower --workers, or raise `ulimit -u`",
    "c++ compiler": COMPILER_ADVICE,
    "c compiler": COMPILER_ADVICE,
}


def resource_advice(error: BaseException) -> str | None:
    """Return what to do if memory, files or processes ran out; None for any other error."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return MEMORY_ADVICE
    if isinstance(error, OSError | RuntimeError):  # PyTorch raises mere RuntimeErrors
        text = str(error).lower()
        for words, advice in RESOURCE_ADVICE.items():
            if words in text:
                return advice
    if error.__context__ is not None:  # PyTorch may raise another error while it ends a call
        return resource_advice(error.__context__)
    return None


def user_message(error: BaseException) -> str | None:
    """Return the line to show for an error that the user can fix; None if it is a bug."""
    advice = resource_advice(error)
    if advice is not None:
        return advice
    if isinstance(error, InputError | OSError):
        return str(error) or type(error).__name__
    return None


def run(main: Callable[[], None], when_interrupted: str = "interrupted") -> None:
    """Run a script's ``main``, as one of torchrun's processes if it started this one.

    An error that the user can fix becomes one line on stderr and exit status 2, Ctrl-C one line and
    status 130. Any other error is a bug, and shows its traceback.
    """
    script = os.path.basename(sys.argv[0])
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as Python does with stderr
    try:
        if dist.is_torchelastic_launched():
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend)
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except KeyboardInterrupt:
        sys.stderr.write(f"\n{script}: {when_interrupted}\n")
        sys.exit(130)
    except Exception as error:
        log.debug("the program ends with this error", exc_info=True)  # to the log file alone
        message = user_message(error)
        if message is None:
            raise
        one_line = " ".join(message.split())
        sys.stderr.write(f"{script}: error: {one_line}\n")
        # A DataLoader whose workers did not start would print a traceback when it is deleted.
        sys.unraisablehook = lambda unraisable: None
        sys.exit(2)


# ---- flags --------------------------------------------------------------------------------------


def new_parser(description: str) -> argparse.ArgumentParser:
    """Make a parser with one short line of usage, so that its errors are short."""
    script = os.path.basename(sys.argv[0])
    return argparse.ArgumentParser(
        prog=script,
        usage=f"{script} [flags]; --help lists them",
        description=description,
        allow_abbrev=False,  # --epoch would silently be --epochs
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def with_dashes(words: Iterable[str]) -> list[str]:
    """Spell the names of flags with dashes: --per_img -> --per-img. Values stay as they are.

    The published commands have both spellings.
    """
    return [re.sub(r"^--[\w-]+", lambda match: match[0].replace("_", "-"), word) for word in words]


def parse(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse ``argv``, or the command line. Flags may be spelt with ``-`` or with ``_``."""
    if argv is None:
        argv = sys.argv[1:]
    return parser.parse_args(with_dashes(argv))


def parse_known(
    parser: argparse.ArgumentParser, argv: list[str] | None = None
) -> tuple[argparse.Namespace, list[str]]:
    """As `parse`; also return the words that the parser does not know."""
    if argv is None:
        argv = sys.argv[1:]
    return parser.parse_known_args(with_dashes(argv))


def number_type(to_number: type, is_valid: Callable[[float], bool], needed: str) -> Callable:
    """Make a ``type`` for add_argument: int or float, with an error that says what is needed."""

    def convert(text: str) -> float:
        try:
            value = to_number(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {needed}") from None
        if not is_valid(value):
            raise argparse.ArgumentTypeError(f"{text} is not {needed}")
        return value

    return convert


positive_int = number_type(int, lambda x: x > 0, "a whole number above 0")
non_negative_int = number_type(int, lambda x: x >= 0, "a whole number, 0 or more")
positive_float = number_type(float, lambda x: 0 < x < np.inf, "a number above 0")
non_negative_float = number_type(float, lambda x: 0 <= x < np.inf, "a number, 0 or more")
seed_number = number_type(int, lambda x: 0 <= x < 2**32, "a whole number from 0 to 4294967295")
dropout_rate = number_type(float, lambda x: 0 <= x < 1, "a number from 0 to less than 1")
file_path = os.path.expanduser  # of a file or folder: the shell does not expand --flag=~/folder


def flag_text(name: str, value: object) -> str:
    """Return a flag as one types it: "--img-h 96" for ("img_h", 96), "--no-compile" for False."""
    words = name.replace("_", "-")
    if value is True:
        return f"--{words}"
    if value is False:
        return f"--no-{words}"
    return f"--{words} {value}"


def defaults_of_datasets(datasets: dict, name: str) -> str:
    """Return each dataset's default of a flag, for --help."""
    return ", ".join(f"{dataset.title} {dataset.defaults[name]}" for dataset in datasets.values())


def fill_dataset_defaults(args: argparse.Namespace, datasets: dict) -> None:
    """Set the flags that are still None to the dataset's default."""
    for name, default in datasets[args.dataset].defaults.items():
        if name in args and getattr(args, name) is None:
            setattr(args, name, default)


def add_data_path_flag(parser: argparse.ArgumentParser, datasets: dict) -> None:
    folders = defaults_of_datasets(datasets, "data_path")
    parser.add_argument(
        "--data-path", type=file_path, metavar="DIR", help=f"folder of the dataset ({folders})"
    )


def add_arrays_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arrays",
        type=file_path,
        metavar="DIR",
        help="folder of the arrays of pre_process_sysu.py (that of --data-path)",
    )


def default_workers() -> int:
    """Return how many image readers each rank starts: its part of the processors, at most 8."""
    if hasattr(os, "sched_getaffinity"):
        processors = len(os.sched_getaffinity(0))
    else:
        processors = os.cpu_count() or 1
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(8, max(1, processors // ranks_here))


def add_image_flags(parser: argparse.ArgumentParser, datasets: dict) -> None:
    """Add where images are, the size they are resized to, and how many processes read them."""
    add = parser.add_argument
    add_data_path_flag(parser, datasets)
    add(
        "--img-h",
        type=positive_int,
        default=288,
        help="image height in pixels (288; test.py: the checkpoint's)",
    )
    add(
        "--img-w",
        type=positive_int,
        default=144,
        help="image width in pixels (144; test.py: the checkpoint's)",
    )
    add(
        "--workers",
        type=non_negative_int,
        default=default_workers(),
        help="data-loading workers: processes that read image files; 0: none (%(default)s)",
    )


def add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    """Add a checkpoint, and the size of images if it does not record it; see `size_of_flags`."""
    checkpoint_help = "file of train.py, or a published one"
    parser.add_argument("checkpoint", type=file_path, metavar="CHECKPOINT", help=checkpoint_help)
    for name, side, default in (("--img-h", "height", 288), ("--img-w", "width", 144)):
        help_text = f"image {side}, if the checkpoint does not record it ({default})"
        parser.add_argument(name, type=positive_int, help=help_text)


def size_of_flags(args: argparse.Namespace) -> tuple[int, int] | None:
    """Return (--img-h, --img-w); None without them. InputError: one alone is given."""
    if args.img_h is None and args.img_w is None:
        return None
    if args.img_h is None or args.img_w is None:
        raise InputError("--img-h and --img-w go together: give both, or none")
    return args.img_h, args.img_w


def add_shared_flags(parser: argparse.ArgumentParser, datasets: dict, archs: Iterable[str]) -> None:
    """Add the flags that train.py and test.py have in common."""
    or_checkpoint = "; test.py: the checkpoint's"
    add = parser.add_argument
    add("--dataset", choices=list(datasets), default="sysu", help="dataset (%(default)s)")
    add_image_flags(parser, datasets)
    add(
        "--arch",
        choices=list(archs),
        default="resnet50",
        help=f"backbone (resnet50{or_checkpoint})",
    )
    add(
        "--low-dim",
        type=positive_int,
        default=512,
        help=f"size of stripe features (512{or_checkpoint})",
    )
    add("--num-parts", type=positive_int, default=6, help=f"stripes (6{or_checkpoint})")
    add(
        "--drop",
        type=dropout_rate,
        default=0.0,
        help=f"dropout of the classifiers (0{or_checkpoint})",
    )
    add(
        "--resume",
        "-r",
        type=file_path,
        default="",
        help="checkpoint path, or name in --model-path; train.py: `last` resumes this run",
    )
    add(
        "--model-path",
        type=file_path,
        default="save_model/",
        help="folder of the checkpoints (%(default)s)",
    )
    add(
        "--log-path",
        type=file_path,
        default="log/",
        help="folder of logs and results (%(default)s)",
    )
    add("--test-batch", type=positive_int, default=64, help="images per test batch (%(default)s)")
    add("--gpu", type=non_negative_int, default=0, help="number of the GPU (%(default)s)")


PROTOCOL_FLAGS = {
    "mode": "cameras of the gallery",
    "gall_mode": "gallery images per person and camera",
    "search": "query and gallery modality",
}


def add_protocol_flags(parser: argparse.ArgumentParser, datasets: dict) -> None:
    """Add the flags that choose evaluation protocols; `Dataset.protocols` checks their values."""
    for flag, meaning in PROTOCOL_FLAGS.items():
        choices = []
        for dataset in datasets.values():
            if flag in dataset.protocol_flags:
                values = ", ".join(dataset.protocol_flags[flag])
                choices.append(f"{dataset.title} {values}")
        words = flag.replace("_", "-")
        help_text = f"{meaning} ({'; '.join(choices)}; or both). The first is the default"
        parser.add_argument(f"--{words}", help=help_text)


# ---- distributed training -----------------------------------------------------------------------


def is_distributed() -> bool:
    """Return whether torchrun started this process."""
    return dist.is_initialized()


def rank() -> int:
    """Return the number of this process; 0 without torchrun."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Return the number of processes; 1 without torchrun."""
    return dist.get_world_size() if is_distributed() else 1


def mean_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """Average ``x`` over all ranks, in place. The program does not wait for the GPU."""
    if is_distributed():
        dist.all_reduce(x.div_(world_size()))
    return x


def gather(value: object) -> list:
    """Return the values of all ranks, in their order."""
    if not is_distributed():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


# ---- logs, device, seeds ------------------------------------------------------------------------


def start_log(args: argparse.Namespace, path: str | None = None) -> None:
    """Send log lines to the screen, and append them to the file ``path``. Other ranks are silent.

    Flags and versions come first, in the file alone.
    """
    logging.raiseExceptions = False  # a closed screen or a full disk ends the log, not the training
    if rank() > 0:
        logging.basicConfig(level=logging.CRITICAL, force=True)
        return
    screen = logging.StreamHandler(sys.stdout)
    screen.setLevel(logging.INFO)
    handlers = [screen]
    if path:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        handlers.append(logging.FileHandler(path, encoding="utf-8", errors="backslashreplace"))
    # Warnings show their level, other lines do not.
    logging.addLevelName(logging.DEBUG, "")
    logging.addLevelName(logging.INFO, "")
    logging.addLevelName(logging.WARNING, "warning: ")
    logging.basicConfig(
        level=logging.INFO, format="%(levelname)s%(message)s", handlers=handlers, force=True
    )
    log.setLevel(logging.DEBUG)
    log.debug("flags: %s", " ".join(f"{name}={vars(args)[name]}" for name in sorted(vars(args))))
    log.debug("versions: %s", " ".join(f"{name}={text}" for name, text in versions().items()))


def versions() -> dict[str, str]:
    """Return the versions of Python and libraries, and the commit of this code."""
    libraries = ("torch", "torchvision", "numpy")
    result = {"python": sys.version.split()[0]}
    result |= {name: importlib.metadata.version(name) for name in libraries}
    result["commit"] = git_commit()
    return result


def git_commit() -> str:
    """Return the commit of this folder; "unknown" if it is not the root of a repository."""
    folder = Path(__file__).resolve().parent
    if not (folder / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    except OSError:  # git is not installed
        return "unknown"
    return done.stdout.strip() or "unknown"


def select_device(gpu: int) -> torch.device:
    """Return GPU number ``gpu``, or under torchrun this rank's own; without any GPU the CPU.

    With a single GPU any number means that one: the published commands say --gpu 1.

    Raises:
        InputError: there is no GPU of this number, or there are fewer GPUs than ranks.
    """
    count = torch.cuda.device_count()
    if not count:
        log.info("device: cpu (no GPU is available)")
        return torch.device("cpu")
    if is_distributed():
        gpu = int(os.environ["LOCAL_RANK"])
        if gpu >= count:
            raise InputError(
                f"this machine has {count} GPUs: give torchrun --nproc_per_node={count}"
            )
    elif count == 1 and gpu > 0:
        log.warning("there is no GPU %d: the only one, 0, is used", gpu)
        gpu = 0
    elif gpu >= count:
        raise InputError(f"--gpu {gpu}: this machine has {count} GPUs, 0 to {count - 1}")
    log.info("device: cuda:%d (%s)", gpu, torch.cuda.get_device_name(gpu))
    torch.cuda.set_device(gpu)
    return torch.device("cuda", gpu)


def seed_everything(seed: int, deterministic: bool = True) -> None:
    """Seed torch, numpy and random, and choose whether PyTorch is deterministic."""
    set_seeds(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic cuBLAS needs it
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    # Filling memory that nothing reads would cost time.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = not deterministic


def seed_epoch(seed: int, epoch: int) -> None:
    """Seed torch, numpy and random from (seed, epoch, rank): a resumed epoch repeats exactly."""
    numbers = np.random.SeedSequence([seed, epoch, rank()])
    set_seeds(int(numbers.generate_state(1)[0]))


def set_seeds(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def set_precision(precision: str, device: torch.device) -> None:
    """Choose the precision of convolutions, and log what is in effect.

    "tf32" is PyTorch's own default: TF32 within cuDNN's convolutions where the GPU has it, matrix
    products in fp32. "fp32" turns TF32 off. "bf16" and "fp16" are autocast's, in the training step.
    """
    if precision == "fp32":
        torch.backends.cudnn.allow_tf32 = False
    has_tf32 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if precision in AMP_DTYPES:
        log.info("precision: autocast to %s", precision)
    elif precision == "tf32" and has_tf32:
        log.info("precision: TF32 within convolutions, fp32 elsewhere")
    else:
        log.info("precision: fp32")


def memory_format(device: torch.device) -> torch.memory_format:
    """Return the memory format of images and weights, after `set_precision`.

    It is channels_last, except for --precision fp32 on a GPU, where PyTorch's default is faster.
    """
    if device.type == "cuda" and not torch.backends.cudnn.allow_tf32:
        return torch.contiguous_format
    return torch.channels_last


# ---- files --------------------------------------------------------------------------------------


def make_writable_folder(folder: str, remedy: str) -> None:
    """Make a folder where there is none. InputError: it cannot be made or be written to."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"the folder {folder} cannot be made ({error.strerror}): {remedy}"
        ) from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"{folder} is read-only: {remedy}")


@contextlib.contextmanager
def atomic_write(path: str) -> Iterator[str]:
    """Yield a name beside ``path`` to write to. At the end, that file replaces ``path``.

    A kill or a full disk leaves what was there before. The next run overwrites a partial file.
    """
    partial = f"{path}.partial"
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"{path} cannot be written: the disk is full") from error
        raise
    finally:
        with contextlib.suppress(OSError):  # it is gone if all went well
            os.remove(partial)


@contextlib.contextmanager
def lock_file(path: str, message: str) -> Iterator[None]:
    """Hold a lock; a kill releases it. Raise InputError(``message``) if another one holds it."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"{message} ({path} is locked)") from None
    try:
        yield
    finally:
        lock.release()


def write_json(path: str, content: dict) -> None:
    with atomic_write(path) as partial, open(partial, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)


def check_results_path(path: str, sources: list[str]) -> None:
    """Raise InputError if the results at ``path`` come from other sources: they would be lost."""
    if not os.path.exists(path):
        return
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or content.get("sources") != sources:
        raise InputError(
            f"{path} holds results of another checkpoint, network or dataset: "
            "give another --log-path, or remove it"
        )


# ---- checkpoints --------------------------------------------------------------------------------


def save_checkpoint(path: str, state: dict) -> None:
    """Write a dict of plain types and tensors, atomically."""
    data = io.BytesIO()  # torch's own writer would not say that a disk is full
    torch.save(state, data)
    with atomic_write(path) as partial, open(partial, "wb") as file:
        file.write(data.getbuffer())


def read_torch_file(path: str, map_location: str = "cpu") -> object:
    """Read a file of torch.save without running code from it (FIDELITY 16).

    Raises:
        InputError: the file is missing, damaged, or holds other types than tensors, plain values
            and the numpy types of published checkpoints.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path} not found")
    # Published checkpoints hold numpy arrays and scalars. codecs.encode restores their bytes.
    allowed = [np.ndarray, np.dtype, codecs.encode]
    allowed += [type(np.dtype(code)) for code in ("f4", "f8", "i8")]
    make_array = np.empty(0).__reduce__()[0]  # what pickle calls for an array, and for a scalar
    make_scalar = np.float64(0).__reduce__()[0]
    for module in ("core", "_core"):  # as numpy 1 and numpy 2 call it
        allowed.append((make_array, f"numpy.{module}.multiarray._reconstruct"))
        allowed.append((make_scalar, f"numpy.{module}.multiarray.scalar"))
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():  # torch does not compare the checksums
                    raise ValueError("a checksum is wrong")
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} cannot be read as a checkpoint: it is damaged, or holds more than tensors and "
            "plain values. Of a whole model save the state_dict() alone"
        ) from error
    except Exception as error:  # corrupt files make torch raise many types
        if resource_advice(error):
            raise
        reason = short_reason(error)
        raise InputError(
            f"{path} cannot be read as a checkpoint ({reason}): give another file"
        ) from error


def short_reason(error: BaseException) -> str:
    """Return a library's error in one line of at most 100 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:100]


def load_checkpoint(path: str, map_location: str = "cpu") -> dict:
    """Read a checkpoint of train.py, a published ``.t`` file, or weights that others saved.

    ``cmc`` becomes a list of float, ``mAP`` a float. Published files lack ``config``, which is
    inferred from the weights: "drop" is None if there is dropout, for they do not record its rate.
    Weights that others saved have no ``epoch`` either.

    Raises:
        InputError: the file is missing or damaged, or it is not a checkpoint of this method.
    """
    checkpoint = as_checkpoint(read_torch_file(path, map_location))
    damaged = InputError(f"{path} is not a complete checkpoint of this method: give another file")
    weights = checkpoint.get("net")
    if not isinstance(weights, dict):
        raise InputError(
            f"{path} is not a complete checkpoint of this method: it has no weights as net, "
            "state_dict or model"
        )
    # torch.nn.DataParallel, with which some ran the original code, puts "module." before each name.
    weights = {str(name).removeprefix("module."): value for name, value in weights.items()}
    checkpoint["net"] = weights
    config = checkpoint.get("config", {})
    epoch = checkpoint.get("epoch", 0)
    if not is_sound_config(config) or not isinstance(epoch, int) or epoch < 0:
        raise damaged
    checkpoint["config"] = config_of_weights(weights) | config
    try:
        cmc = np.asarray(checkpoint.get("cmc", []), dtype=float)
        mAP = float(checkpoint.get("mAP", 0.0))
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise damaged from None
    checkpoint["cmc"] = cmc.ravel().tolist()
    checkpoint["mAP"] = mAP
    return checkpoint


def as_checkpoint(content: object) -> dict:
    """Return what a file holds as a checkpoint, {"net": weights, ...}; {} if it is none.

    Other programs save the weights themselves, or as "state_dict" or "model". Their further
    entries, such as an epoch, are ignored: they may mean something else.
    """
    if not isinstance(content, dict):
        return {}
    if "net" in content:
        return content
    for name in ("state_dict", "model"):
        if isinstance(content.get(name), dict):
            return {"net": content[name]}
    if content and all(isinstance(value, torch.Tensor) for value in content.values()):
        return {"net": content}
    return {}


def is_sound_config(config: object) -> bool:
    """Return whether this is a dict of plain values with sizes above 0 and a rate of dropout."""
    if not is_plain_dict(config):
        return False
    for name in ("n_class", "low_dim", "num_parts", "img_h", "img_w"):
        size = config.get(name, 1)
        if not isinstance(size, int) or size < 1:
            return False
    drop = config.get("drop")
    return drop is None or (isinstance(drop, int | float) and 0 <= drop < 1)


def is_plain_dict(value: object) -> bool:
    """Return whether this is a dict from str to numbers, strings, bools and None."""
    if not isinstance(value, dict):
        return False
    if not all(isinstance(name, str) for name in value):
        return False
    return all(x is None or isinstance(x, bool | int | float | str) for x in value.values())


def config_of_weights(weights: dict[str, torch.Tensor]) -> dict:
    """Infer the arguments of `EmbedNet` from its state_dict; {} if it is another network's."""
    # The Dropout shifts the Linear from 1 to 2.
    has_dropout = "classifier1.classifier.2.weight" in weights
    classifier = weights.get(f"classifier1.classifier.{1 + has_dropout}.weight")
    if not isinstance(classifier, torch.Tensor) or classifier.dim() != 2:
        return {}
    n_class, low_dim = classifier.shape
    num_parts = len({name.partition(".")[0] for name in weights if name.startswith("classifier")})
    has_bottlenecks = "visible_net.visible.layer1.0.conv3.weight" in weights
    return {
        "arch": "resnet50" if has_bottlenecks else "resnet18",
        "low_dim": low_dim,
        "drop": None if has_dropout else 0.0,
        "num_parts": num_parts,
        "n_class": n_class,
    }


def find_checkpoint(resume: str, model_path: str) -> str:
    """Return the path of --resume: a name in --model-path, as in published commands, or a path."""
    for path in (os.path.join(model_path, resume), resume):
        if os.path.isfile(path):
            return path
    raise InputError(f"--resume {resume}: no such file, in --model-path {model_path} or as a path")


def open_checkpoint(resume: str, model_path: str, flags: dict[str, object]) -> tuple[dict, str]:
    """Read the checkpoint that --resume names; return it and its path (FIDELITY 14, 24).

    Raises:
        InputError: it cannot be found or read, or its config contradicts some of ``flags``. A
            value of None matches anything.
    """
    path = find_checkpoint(resume, model_path)
    checkpoint = load_checkpoint(path)
    trained_with = []
    given = []
    for name, value in flags.items():
        trained_value = checkpoint["config"].get(name)
        if value is None or trained_value is None or value == trained_value:
            continue
        trained_with.append(flag_text(name, trained_value))
        given.append(flag_text(name, value))
    if given:
        raise InputError(
            f"{path} was trained with {' '.join(trained_with)}, not {' '.join(given)}: "
            "give the same flags, or another checkpoint"
        )
    return checkpoint, path
