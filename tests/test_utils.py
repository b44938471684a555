"""What utils.py promises to all scripts: errors, Ctrl-C, flags, device, readers, versions."""

import errno
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RUN, RUN_FLAGS, TINY, folder_flags, read_all, run_here

import data_loader
import loss
import model
import test
import train
import utils
from utils import InputError

CPU = torch.device("cpu")
CUDA = torch.device("cuda")

# The flags that help when memory is exhausted.
MEMORY_FLAGS = ("--test-batch", "--batch-size", "--cache host", "--precision bf16")


def raise_always(error: BaseException) -> Callable:
    """A function that takes anything, and raises this error."""

    def function(*args, **options) -> None:
        raise error

    return function


def caught_error(function: Callable, *args) -> Exception:
    """The error that this call raises."""
    with pytest.raises(Exception) as caught:
        function(*args)
    return caught.value


@pytest.fixture
def ending(capsys, monkeypatch) -> Callable[..., tuple[int, str]]:
    """(error, options of utils.run): exit status and stderr of a script whose main raises it."""

    def run(error: BaseException, **options) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["folder/script.py"])
        with pytest.raises(SystemExit) as stop:
            utils.run(raise_always(error), **options)
        return stop.value.code, capsys.readouterr().err

    return run


# ---- errors of the user -------------------------------------------------------------------------


def test_an_input_error_is_one_line_and_status_2(ending):
    error = InputError("x.t is\n  damaged:\ttake another one")
    assert ending(error) == (2, "script.py: error: x.t is damaged: take another one\n")


def test_an_error_of_the_system_names_its_file(ending):
    status, line = ending(PermissionError(errno.EACCES, "Permission denied", "log/x.log"))
    assert status == 2
    assert line == "script.py: error: [Errno 13] Permission denied: 'log/x.log'\n"


def test_the_log_file_keeps_the_traceback_that_the_screen_does_not_show(
    error_of, sysu_tree, tmp_path
):
    line = error_of("train.py", *TINY, *folder_flags(sysu_tree, tmp_path), "--resume", "missing.t")
    assert "Traceback" not in line
    (log_file,) = tmp_path.glob("*.log")
    log = log_file.read_text()
    assert "Traceback" in log
    assert "missing.t: no such file" in log


# ---- bugs ---------------------------------------------------------------------------------------

BUGS = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x3 and 5x6)"),
    RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:5"),
    KeyError("net"),
    ValueError("setting an array element with a sequence"),
    TypeError("forward() takes 2 positional arguments but 3 were given"),
    AssertionError(),
]


@pytest.mark.parametrize("bug", BUGS, ids=repr)
def test_a_bug_is_not_turned_into_one_line(capsys, bug):
    with pytest.raises(type(bug)) as caught:
        utils.run(raise_always(bug))
    assert caught.value is bug
    assert capsys.readouterr().err == ""  # Python writes the traceback when the script ends


@pytest.mark.parametrize("bug", BUGS[:4], ids=repr)
def test_a_bug_in_a_training_step_shows_its_traceback(sysu_tree, tmp_path, monkeypatch, bug):
    words = ["train.py", *TINY, *folder_flags(sysu_tree, tmp_path), "--epochs", 0]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    monkeypatch.setattr(train, "train_step", raise_always(bug))
    with pytest.raises(type(bug)) as caught:
        utils.run(train.main)
    assert caught.value is bug
    (log_file,) = tmp_path.glob("*.log")
    assert "Traceback" in log_file.read_text()
    assert not list(tmp_path.glob("*.t"))


def test_the_screen_shows_the_traceback_of_a_bug():
    code = "import utils; utils.run(lambda: {}['no such key'])"
    command = [sys.executable, "-c", code]
    root = Path(utils.__file__).parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("KeyError: 'no such key'\n")


# ---- exhausted resources ------------------------------------------------------------------------

OUT_OF_MEMORY = [
    MemoryError(),
    caught_error(np.empty, 2**50),
    caught_error(torch.empty, 2**50),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("could not create a primitive"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=repr)
def test_out_of_memory_names_the_flags_that_help(ending, error):
    status, line = ending(error)
    assert status == 2
    assert line.count("\n") == 1
    for flag in MEMORY_FLAGS:
        assert flag in line


def test_out_of_memory_is_found_behind_another_error(ending):
    """torch.save raises an error of its own while it closes the file that it cannot write."""

    def save() -> None:
        try:
            raise MemoryError
        finally:
            raise RuntimeError("unexpected pos 164438592 vs 164438480")

    status, line = ending(caught_error(save))
    assert status == 2
    assert "out of memory" in line


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=repr)
@pytest.mark.parametrize(
    ("owner", "function"), [(torch, "load"), (torch.nn.Module, "load_state_dict")]
)
def test_out_of_memory_is_no_fault_of_a_checkpoint(
    error_of, sysu_run, tmp_path, monkeypatch, owner, function, error
):
    best = sysu_run["models"] / f"{RUN}_best.t"
    monkeypatch.setattr(owner, function, raise_always(error))
    line = error_of("test.py", *folder_flags(sysu_run["data"], tmp_path), "--resume", best)
    for flag in MEMORY_FLAGS:
        assert flag in line
    for words in ("another", "cannot be read", "does not hold", "_best.t"):
        assert words not in line


def test_out_of_memory_while_momentum_is_restored_is_no_fault_of_a_checkpoint(
    error_of, sysu_run, tmp_path, monkeypatch
):
    last = sysu_run["models"] / f"{RUN}_last.t"
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    monkeypatch.setattr(torch.optim.SGD, "load_state_dict", raise_always(error))
    line = error_of(
        "train.py", *RUN_FLAGS, *folder_flags(sysu_run["data"], tmp_path), "--resume", last
    )
    assert "--cache host" in line
    assert "another" not in line


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=repr)
def test_out_of_memory_is_no_fault_of_images_arrays_or_weights(
    ending, golden_tree, tmp_path, monkeypatch, error
):
    image = next(golden_tree.glob("cam1/*/*.jpg"))
    weights = model.Backbone(model.BACKBONES["tiny"].build, 32, raise_always(error))
    monkeypatch.setattr(data_loader.Image, "open", raise_always(error))
    for modality in ("rgb", "ir"):
        for file in data_loader.array_files(str(tmp_path), modality):
            Path(file).touch()
    monkeypatch.setattr(np.lib.format, "open_memmap", raise_always(error))
    monkeypatch.setitem(model.BACKBONES, "tiny", weights)
    errors = [
        caught_error(data_loader.read_image, str(image), (96, 32)),
        caught_error(data_loader.load_arrays, str(tmp_path), None, None, (96, 32)),
        caught_error(model.build_backbone, "tiny", "imagenet"),
    ]
    for raised in errors:
        _, line = ending(raised)
        assert "--cache host" in line


FEW_RESOURCES = [
    (OSError(errno.EMFILE, "Too many open files", "a.jpg"), "--workers 0"),
    (RuntimeError("Too many open files. Communication with the workers is"), "--workers 0"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "--workers"),
    (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "--workers"),
    (RuntimeError("can't start new thread"), "--workers"),
    (RuntimeError("No working C++ compiler found in torch._inductor"), "--compile"),
    (RuntimeError("Failed to find C compiler. Please specify via CC"), "--compile"),
]


@pytest.mark.parametrize(("error", "flag"), FEW_RESOURCES, ids=repr)
def test_other_exhausted_resources_name_the_flag_that_helps(ending, error, flag):
    status, line = ending(error)
    assert status == 2
    assert line.count("\n") == 1
    assert flag in line


def test_too_many_open_files_are_no_fault_of_an_image_or_a_checkpoint(
    ending, golden_tree, sysu_run, monkeypatch
):
    error = OSError(errno.EMFILE, "Too many open files")
    image = next(golden_tree.glob("cam1/*/*.jpg"))
    best = sysu_run["models"] / f"{RUN}_best.t"
    monkeypatch.setattr(data_loader.Image, "open", raise_always(error))
    monkeypatch.setattr(torch, "load", raise_always(error))
    errors = [
        caught_error(data_loader.read_image, str(image), (96, 32)),
        caught_error(utils.load_checkpoint, str(best)),
    ]
    for raised in errors:
        _, line = ending(raised)
        assert "--workers 0" in line


# ---- Ctrl-C -------------------------------------------------------------------------------------


def test_ctrl_c_is_one_line_and_status_130(ending):
    status, lines = ending(KeyboardInterrupt())
    assert status == 130
    assert lines == "\nscript.py: interrupted\n"  # after the ^C that a terminal shows


def test_ctrl_c_ends_a_training_with_the_way_to_resume_it(sysu_tree, tmp_path, monkeypatch, capsys):
    """It comes within epoch 1: the checkpoint is the one of epoch 0."""
    forward = loss.Criterion.forward

    def forward_with_ctrl_c(*args) -> dict:
        if list(tmp_path.glob("*_last.t")):
            signal.raise_signal(signal.SIGINT)
        return forward(*args)

    monkeypatch.setattr(loss.Criterion, "forward", forward_with_ctrl_c)
    # A shell lets its background jobs ignore Ctrl-C.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as stop:
            run_here("train.py", *TINY, *folder_flags(sysu_tree, tmp_path), "--epochs", 2)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert stop.value.code == 130
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("train.py: interrupted: ")
    assert "--resume last" in line
    contents = read_all(tmp_path)
    (last,) = [content for name, content in contents.items() if name.endswith("_last.t")]
    assert last["epoch"] == 0


# ---- flags --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("img_h", 96, "--img-h 96"),
        ("lr", 0.01, "--lr 0.01"),
        ("compile", True, "--compile"),
        ("sync_bn", False, "--no-sync-bn"),
    ],
)
def test_a_flag_is_printed_as_one_types_it(name, value, text):
    assert utils.flag_text(name, value) == text


def test_every_experiment_flag_is_printed_as_one_types_it():
    args = vars(train.parse_args(["--dataset", "regdb"]))
    for name in set(args) - set(train.RUNTIME_FLAGS):
        values = [args[name]]
        if args[name] is None:  # RegDB has no such flag
            continue
        if isinstance(args[name], bool):
            values = [True, False]
        for value in values:
            words = ["--dataset", "regdb", *utils.flag_text(name, value).split()]
            assert getattr(train.parse_args(words), name) == value


def test_a_contradiction_of_flags_is_printed_as_one_types_them(tmp_path):
    config = {"deterministic": True, "sync_bn": False, "img_h": 96, "lr": 0.01}
    flags = {"deterministic": False, "sync_bn": True, "img_h": 288, "lr": 0.01}
    utils.save_checkpoint(str(tmp_path / "x.t"), {"net": {}, "config": config})
    error = caught_error(utils.open_checkpoint, "x.t", str(tmp_path), flags)
    assert isinstance(error, InputError)
    assert "x.t was trained with --deterministic --no-sync-bn --img-h 96, not" in str(error)
    assert "not --no-deterministic --sync-bn --img-h 288: give the same flags" in str(error)


def test_names_of_flags_have_dashes_or_underscores():
    dashes = "--per-img 4 --w-hc=0.3 --no-sync-bn --data-path my_data --dist-type l1"
    underscores = "--per_img 4 --w_hc=0.3 --no_sync_bn --data_path my_data --dist_type l1"
    args = train.parse_args(underscores.split())
    assert args == train.parse_args(dashes.split())
    assert args.per_img == 4
    assert args.w_hc == 0.3
    assert args.sync_bn is False
    assert args.data_path == "my_data"


@pytest.mark.parametrize(
    ("words", "method"),
    [
        (["--method", "_r"], "_r"),
        (["--method=_r"], "_r"),
        (["--method", "a_b--c_d"], "a_b--c_d"),
    ],
)
def test_values_of_flags_keep_their_underscores(words, method):
    assert train.parse_args(words).method == method


def test_parsing_the_known_flags_leaves_the_others():
    parser = utils.new_parser("a tool")
    parser.add_argument("--out-file")
    args, others = utils.parse_known(parser, ["--out_file", "a_b", "--per-img", "4"])
    assert args.out_file == "a_b"
    assert others == ["--per-img", "4"]


@pytest.mark.parametrize("script", [train, test])
def test_a_wrong_flag_is_two_lines_of_argparse(script, capsys):
    with pytest.raises(SystemExit) as stop:
        utils.parse(script.build_parser(), ["--img_w", "wide"])
    assert stop.value.code == 2
    usage, line = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: ")
    assert usage.endswith(" [flags]; --help lists them")
    assert line.endswith(": error: argument --img-w: 'wide' is not a whole number above 0")


@pytest.mark.parametrize(
    ("number_type", "valid", "invalid"),
    [
        (utils.positive_int, ["1", "20"], ["0", "-1", "1.5", "one", ""]),
        (utils.non_negative_int, ["0", "20"], ["-1", "1.5", "one"]),
        (utils.positive_float, ["0.1", "1e-3", "2"], ["0", "-1", "nan", "inf", "one"]),
        (utils.non_negative_float, ["0", "0.1"], ["-0.1", "nan", "inf", "one"]),
        (utils.dropout_rate, ["0", "0.5"], ["1", "-0.1", "nan", "half"]),
    ],
)
def test_numbers_of_flags_are_checked(number_type, valid, invalid):
    for text in valid:
        assert number_type(text) == float(text)
    for text in invalid:
        error = caught_error(number_type, text)
        assert text in str(error)
        assert " is not a " in str(error)


def test_every_flag_of_training_is_runtime_or_in_the_config_of_a_checkpoint(sysu_run):
    last = utils.load_checkpoint(str(sysu_run["models"] / f"{RUN}_last.t"))
    flags = set(vars(train.parse_args([])))
    experiment = set(last["config"]) - {"n_class"}
    assert len(set(train.RUNTIME_FLAGS)) == len(train.RUNTIME_FLAGS)
    assert flags == experiment | set(train.RUNTIME_FLAGS)
    assert not experiment & set(train.RUNTIME_FLAGS)


# ---- device and readers -------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch, caplog) -> Callable[[int], None]:
    """(count): as if this machine had so many GPUs; log lines are kept."""

    def pretend(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: f"GPU number {gpu}")
        monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: None)
        caplog.set_level("INFO")

    return pretend


def test_without_a_gpu_the_cpu_is_used(gpus, caplog):
    gpus(0)
    assert utils.select_device(3) == torch.device("cpu")
    assert "no GPU" in caplog.text


def test_the_only_gpu_is_used_whatever_its_number(gpus, caplog):
    gpus(1)
    assert utils.select_device(3) == torch.device("cuda", 0)
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.getMessage() == "there is no GPU 3: the only one, 0, is used"


def test_one_of_several_gpus_is_chosen_by_its_number(gpus, caplog):
    gpus(4)
    assert utils.select_device(3) == torch.device("cuda", 3)
    assert "cuda:3 (GPU number 3)" in caplog.text


def test_a_gpu_that_is_not_among_several_is_an_error(gpus):
    gpus(2)
    with pytest.raises(InputError, match="--gpu 3: this machine has 2 GPUs, 0 to 1"):
        utils.select_device(3)


def test_each_rank_takes_a_gpu_of_its_own(gpus, monkeypatch):
    gpus(2)
    monkeypatch.setattr(utils, "is_distributed", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert utils.select_device(0) == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="2 GPUs: give torchrun --nproc_per_node=2"):
        utils.select_device(0)


def test_the_default_flags_are_the_originals_settings(pytorch_settings, monkeypatch):
    """Deterministic, no search for fast algorithms, PyTorch's own precision (FIDELITY 9)."""
    args = train.parse_args([])
    utils.seed_everything(args.seed, args.deterministic)
    utils.set_precision(args.precision, CPU)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"


def test_no_deterministic_lets_cudnn_search_for_algorithms(pytorch_settings):
    utils.seed_everything(1, deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.benchmark


@pytest.mark.parametrize(
    ("precision", "capability", "line"),
    [
        ("tf32", (9, 0), "TF32 within convolutions, fp32 elsewhere"),
        ("tf32", (7, 5), "fp32"),  # a GPU that has no TF32
        ("fp32", (9, 0), "fp32"),
        ("bf16", (9, 0), "autocast to bf16"),
    ],
)
def test_the_log_tells_the_precision_in_effect(
    pytorch_settings, monkeypatch, caplog, precision, capability, line
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    caplog.set_level("INFO")
    utils.set_precision(precision, CUDA)
    assert caplog.messages == [f"precision: {line}"]
    assert torch.backends.cudnn.allow_tf32 == (precision != "fp32")


@pytest.mark.parametrize("precision", utils.PRECISIONS)
def test_the_format_is_channels_last_except_for_fp32_on_a_gpu(
    pytorch_settings, monkeypatch, precision
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    on_gpu = torch.contiguous_format if precision == "fp32" else torch.channels_last
    utils.set_precision(precision, CUDA)
    assert utils.memory_format(CUDA) == on_gpu
    assert utils.memory_format(CPU) == torch.channels_last


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_images_and_weights_have_one_format(monkeypatch, memory_format):
    """Where they differ, cuDNN copies one of them at each convolution."""
    monkeypatch.setattr(utils, "memory_format", lambda device: memory_format)
    pixels = torch.arange(2 * 4 * 6 * 3, dtype=torch.uint8).reshape(2, 4, 6, 3)
    images = data_loader.to_input(pixels, (4, 6))
    assert images.stride() == torch.empty(images.shape, memory_format=memory_format).stride()
    net = model.EmbedNet(3, 8, arch="resnet18", pretrained="none")
    for weight in model.to_device(net, CPU).parameters():
        if weight.dim() == 4:
            assert weight.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(
    ("processors", "ranks", "workers"),
    [(1, 1, 1), (4, 1, 4), (32, 1, 8), (6, 2, 3), (64, 4, 8), (2, 4, 1)],
)
def test_readers_share_the_processors_of_the_ranks(monkeypatch, processors, ranks, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(processors)))
    monkeypatch.setattr(os, "cpu_count", lambda: 1000)  # of which this process may not use all
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert utils.default_workers() == workers


@pytest.mark.parametrize(("processors", "workers"), [(None, 1), (4, 4), (1000, 8)])
def test_readers_where_the_system_does_not_tell_affinity(monkeypatch, processors, workers):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: processors)
    assert utils.default_workers() == workers


# ---- versions -----------------------------------------------------------------------------------


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    command = ["git", "-C", str(folder), *identity, *words]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """A git repository of one commit, in whose root utils.py seems to be."""
    root = tmp_path / "repository"
    (root / "inner").mkdir(parents=True)
    (root / "utils.py").touch()
    (root / "inner/utils.py").touch()
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message", "first")
    monkeypatch.setattr(utils, "__file__", str(root / "utils.py"))
    return root


def test_the_commit_is_the_one_of_the_repository_with_this_code(repository):
    assert utils.git_commit() == git(repository, "rev-parse", "--short", "HEAD")
    assert utils.versions()["commit"] == utils.git_commit()
    (repository / "utils.py").write_text("changed")
    assert utils.git_commit().endswith("-dirty")


def test_the_commit_of_another_repository_around_this_code_is_not_taken(repository, monkeypatch):
    monkeypatch.setattr(utils, "__file__", str(repository / "inner/utils.py"))
    assert utils.git_commit() == "unknown"


def test_the_commit_is_unknown_without_git(repository, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert utils.git_commit() == "unknown"


# ---- results ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "{", "[]", '{"results": []}', "[" * 100_000])
def test_files_that_are_no_results_are_not_written_over(tmp_path, text):
    path = tmp_path / "test_x.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"test_x\.json .* give another --log-path, or remove it"):
        utils.check_results_path(str(path), ["a.t"])
