"""Machines as people have them: little shared memory, few files, readers that die, odd screens."""

import errno
import gc
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import data_loader
import utils
from data_loader import chunks_of, read_images
from data_manager import sysu_train
from utils import InputError

ROOT = Path(utils.__file__).parent
SIZE = ["--img_h", "96", "--img_w", "32"]


def can_mount() -> bool:
    """Whether this user may mount file systems that only one process sees."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


needs_mounts = pytest.mark.skipif(not can_mount(), reason="`unshare -m` is not allowed here")


def preprocess(
    tree: Path, *flags: str | Path, mount: str = "true", screen: str = "utf-8"
) -> subprocess.CompletedProcess:
    """Run pre_process_sysu.py after a command that mounts something for it alone."""
    words = [sys.executable, ROOT / "pre_process_sysu.py", "--data_path", tree, *SIZE, *flags]
    command = [str(word) for word in words]
    if mount != "true":
        command = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", *command]
    environment = os.environ | {"PYTHONIOENCODING": screen}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def image_paths(golden_tree) -> list[str]:
    """40 image files."""
    visible, _ = sysu_train(str(golden_tree))
    return (visible.paths * 40)[:40]


# ---- shared memory ------------------------------------------------------------------------------


@needs_mounts
def test_readers_need_hardly_any_shared_memory(golden_tree, tmp_path):
    mount = "mount -t tmpfs -o size=256k tmpfs /dev/shm"
    size = ["--img_h", 288, "--img_w", 144]  # a batch of these has some MB
    done = preprocess(golden_tree, *size, "--arrays", tmp_path, "--workers", 2, mount=mount)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("*.npy"))) == 4


@needs_mounts
def test_readers_that_cannot_start_are_one_line(golden_tree, tmp_path):
    mount = "mount -t tmpfs -o size=4k tmpfs /dev/shm"
    done = preprocess(golden_tree, "--arrays", tmp_path, "--workers", 2, mount=mount)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("pre_process_sysu.py: error: image readers cannot start")
    assert "--workers 0" in line
    assert "--shm-size" in line


@pytest.mark.parametrize("workers", [0, 2])
def test_readers_yield_arrays_in_order(image_paths, workers):
    batches = list(read_images(chunks_of(image_paths, 3), (24, 12), workers))
    assert all(isinstance(batch, np.ndarray) for batch in batches)
    expected = [data_loader.read_image(path, (24, 12)) for path in image_paths]
    np.testing.assert_array_equal(np.concatenate(batches), expected)


def test_an_image_reader_passes_on_which_image_is_damaged(image_paths, tmp_path):
    (tmp_path / "cut.jpg").write_bytes(Path(image_paths[0]).read_bytes()[:300])
    batches = read_images([[image_paths[0]], [str(tmp_path / "cut.jpg")]], (24, 12), workers=1)
    with pytest.raises(InputError, match=r"cut\.jpg cannot be read as an image"):
        list(batches)


# ---- readers that die, and limits of the system -------------------------------------------------


def test_a_reader_that_dies_ends_the_reading_with_what_helps(image_paths):
    batches = read_images(chunks_of(image_paths, 1), (288, 144), workers=2)
    next(batches)
    reader = multiprocessing.active_children()[0]
    os.kill(reader.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError) as caught:
        list(batches)
    message = utils.user_message(caught.value)
    assert message.startswith("an image reader died")
    assert "--workers 0" in message
    assert "--shm-size" in message


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_too_few_file_descriptors_for_the_readers(image_paths):
    lowest_free = os.dup(0)
    os.close(lowest_free)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 2, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files") as caught:
            list(read_images(chunks_of(image_paths), (24, 12), workers=2))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    message = utils.user_message(caught.value)
    assert "--workers 0" in message
    assert "ulimit -n" in message
    del caught  # and with it, in this test, the loader that is half made
    gc.collect()


def test_a_disk_that_is_full_is_not_taken_for_shared_memory():
    error = OSError(errno.ENOSPC, "No space left on device", "log/x.log")
    assert utils.user_message(error) == "[Errno 28] No space left on device: 'log/x.log'"


# ---- read-only data -----------------------------------------------------------------------------


@needs_mounts
def test_read_only_data_need_another_folder_for_the_arrays(golden_tree, tmp_path):
    mount = f"mount --bind -o ro {golden_tree} {golden_tree}"
    mount += f" && mount -o remount,bind,ro {golden_tree}"
    before = sorted(golden_tree.rglob("*"))
    done = preprocess(golden_tree, "--workers", 0, mount=mount)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert f"{golden_tree} is read-only: name another folder by --arrays" in line

    arrays = tmp_path / "new" / "arrays"
    done = preprocess(golden_tree, "--workers", 0, "--arrays", arrays, mount=mount)
    assert done.returncode == 0, done.stderr
    data_loader.load_arrays(str(golden_tree), str(arrays), None, (96, 32))
    assert sorted(golden_tree.rglob("*")) == before


# ---- screens ------------------------------------------------------------------------------------


@pytest.mark.parametrize("screen", ["ascii", "cp1252"])
def test_characters_that_a_screen_cannot_show_are_replaced(golden_tree, tmp_path, screen):
    tree = tmp_path / "数据"
    tree.symlink_to(golden_tree)
    done = preprocess(tree, "--workers", 0, "--arrays", tmp_path / "数组", screen=screen)
    assert done.returncode == 0, done.stderr
    assert "written: " in done.stdout
    assert r"\u6570\u7ec4" in done.stdout

    done = preprocess(tmp_path / "没有", screen=screen)
    assert done.returncode == 2
    assert r"\u6ca1\u6709/exp/train_id.txt not found" in done.stderr
