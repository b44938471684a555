"""Machines as people have them: little shared memory, few files, readers that die, odd screens."""

import contextlib
import errno
import gc
import io
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import run_here
from PIL import Image
from torch.utils.data import DataLoader

import data_loader
import utils
from data_loader import chunks_of, read_images
from data_manager import sysu_train
from utils import InputError

ROOT = Path(utils.__file__).parent
SIZE = ["--img_h", "96", "--img_w", "32"]


@pytest.fixture(scope="module")
def needs_mounts() -> None:
    """Skip a test where this user may not mount file systems that only one process sees."""
    if shutil.which("unshare") is None:
        pytest.skip("there is no program unshare")
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0:
        pytest.skip("`unshare -m` is not allowed here")


def preprocess(
    tree: Path, *flags: str | Path, mount: str | None = None, screen: str = "utf-8"
) -> subprocess.CompletedProcess:
    """Run pre_process_sysu.py in a process of its own.

    Args:
        tree: the dataset.
        flags: further ones.
        mount: a shell command that mounts something for this process alone.
        screen: the encoding of its stdout and stderr.
    """
    words = [sys.executable, ROOT / "pre_process_sysu.py", "--data_path", tree, *SIZE, *flags]
    command = [str(word) for word in words]
    if mount is not None:
        command = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", *command]
    environment = os.environ | {"PYTHONIOENCODING": screen}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def error_of_reading(batches: Iterator[np.ndarray]) -> Exception:
    """The error with which reading ends, when its workers have ended, too."""
    try:
        list(batches)
    except (InputError, OSError, RuntimeError) as error:
        # Its frames refer to the loader. If they were left to the garbage collector, then the
        # workers would be waited for, five seconds each, in whichever test it runs.
        traceback.clear_frames(error.__traceback__)
        return error
    raise AssertionError("all images were read")


@contextlib.contextmanager
def file_limit(n_files: int) -> Iterator[None]:
    """Let this process open at most ``n_files`` further files."""
    lowest_free = os.dup(0)
    os.close(lowest_free)
    soft_limit, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    gc.disable()  # it might close files that other tests left open: then more could be opened
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + n_files, hard_limit))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft_limit, hard_limit))
        gc.enable()


@pytest.fixture(scope="module")
def image_paths(golden_tree) -> list[str]:
    """40 image files."""
    visible, _ = sysu_train(str(golden_tree))
    return (visible.paths * 40)[:40]


# ---- shared memory ------------------------------------------------------------------------------


def test_readers_need_hardly_any_shared_memory(needs_mounts, golden_tree, tmp_path):
    mount = "mount -t tmpfs -o size=256k tmpfs /dev/shm"
    size = ["--img_h", 288, "--img_w", 144]  # a batch of these has some MB
    done = preprocess(golden_tree, *size, "--arrays", tmp_path, "--workers", 2, mount=mount)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("*.npy"))) == 4


def test_readers_that_cannot_start_are_one_line(needs_mounts, golden_tree, tmp_path):
    mount = "mount -t tmpfs -o size=4k tmpfs /dev/shm"
    done = preprocess(golden_tree, "--arrays", tmp_path, "--workers", 2, mount=mount)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("pre_process_sysu.py: error: ")
    assert "--workers 0" in line
    assert "--shm-size" in line


def test_readers_that_cannot_start_are_an_error_of_the_user(image_paths, monkeypatch):
    """As above, where nothing can be mounted."""

    def no_space(loader: DataLoader) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(DataLoader, "__iter__", no_space)
    error = error_of_reading(read_images([image_paths], (24, 12), workers=2))
    assert isinstance(error, InputError)
    assert "No space left on device" in str(error)
    assert "--workers 0" in str(error)
    assert "--shm-size" in str(error)


# ---- readers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_readers_yield_arrays_in_order(image_paths, workers):
    batches = list(read_images(chunks_of(image_paths, 3), (24, 12), workers))
    assert all(isinstance(batch, np.ndarray) for batch in batches)
    expected = [data_loader.read_image(path, (24, 12)) for path in image_paths]
    np.testing.assert_array_equal(np.concatenate(batches), expected)


def test_an_image_reader_passes_on_which_image_is_damaged(image_paths, tmp_path):
    (tmp_path / "cut.jpg").write_bytes(Path(image_paths[0]).read_bytes()[:300])
    batches = read_images([[image_paths[0]], [str(tmp_path / "cut.jpg")]], (24, 12), workers=1)
    error = error_of_reading(batches)
    assert isinstance(error, InputError)
    assert f"{tmp_path}/cut.jpg cannot be read as an image" in str(error)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_may_not_be_read_is_named(image_paths, monkeypatch, workers):
    """Root may read every file: Pillow's answer is replaced, in forked workers, too."""
    if workers > 0 and multiprocessing.get_start_method() != "fork":
        pytest.skip("workers that are not forked have the real Pillow")
    forbidden = image_paths[1]
    open_image = Image.open

    def open_or_refuse(path: str, **options) -> Image.Image:
        if path == forbidden:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return open_image(path, **options)

    monkeypatch.setattr(Image, "open", open_or_refuse)
    error = error_of_reading(read_images(chunks_of(image_paths, 1), (24, 12), workers))
    message = utils.user_message(error)
    assert forbidden in message
    assert "Traceback" not in message
    assert "\n" not in message


def test_a_reader_that_dies_ends_the_reading_with_what_helps(image_paths):
    children_of_other_tests = multiprocessing.active_children()
    batches = read_images(chunks_of(image_paths, 1), (288, 144), workers=2)
    next(batches)
    children = multiprocessing.active_children()
    readers = [child for child in children if child not in children_of_other_tests]
    assert len(readers) == 2
    os.kill(readers[0].pid, signal.SIGKILL)
    message = utils.user_message(error_of_reading(batches))
    assert "reader died" in message
    assert "--workers 0" in message
    assert "--shm-size" in message


def test_too_few_file_descriptors_for_the_readers(image_paths, monkeypatch):
    # PyTorch fails once more when it deletes a loader that is half made. utils.run hides that, too.
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    with file_limit(2):  # the first pipe takes both
        error = error_of_reading(read_images(chunks_of(image_paths), (24, 12), workers=2))
    message = utils.user_message(error)
    assert "--workers 0" in message
    assert "ulimit -n" in message


# ---- read-only data -----------------------------------------------------------------------------


def test_read_only_data_need_another_folder_for_the_arrays(needs_mounts, golden_tree, tmp_path):
    mount = f"mount --bind -o ro {golden_tree} {golden_tree}"
    mount += f" && mount -o remount,bind,ro {golden_tree}"
    before = sorted(golden_tree.rglob("*"))
    done = preprocess(golden_tree, "--workers", 0, mount=mount)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert f"{golden_tree} is read-only" in line
    assert "--arrays" in line

    arrays = tmp_path / "new" / "arrays"
    done = preprocess(golden_tree, "--workers", 0, "--arrays", arrays, mount=mount)
    assert done.returncode == 0, done.stderr
    data_loader.load_arrays(str(golden_tree), str(arrays), None, (96, 32))
    assert sorted(golden_tree.rglob("*")) == before


# ---- screens ------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_characters_that_a_screen_cannot_show_are_replaced(
    golden_tree, tmp_path, monkeypatch, encoding
):
    tree = tmp_path / "数据"
    tree.symlink_to(golden_tree)
    screen = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", screen)
    arrays = tmp_path / "数组"
    run_here("pre_process_sysu.py", "--data_path", tree, "--arrays", arrays, *SIZE, "--workers", 0)
    screen.flush()
    printed = screen.buffer.getvalue().decode(encoding)
    assert "written: " in printed
    assert r"\u6570\u7ec4" in printed
    assert len(list(arrays.glob("*.npy"))) == 4


def test_characters_of_an_error_that_a_screen_cannot_show_are_replaced(tmp_path):
    done = preprocess(tmp_path / "没有", screen="ascii")
    assert done.returncode == 2
    assert r"\u6ca1\u6709/exp/train_id.txt not found" in done.stderr
