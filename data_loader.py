"""Lists -> tensors: reading images, the identity sampler, the transforms, and the batches of an epoch.

Functions that need torch import it themselves: it takes seconds and half a gigabyte, which preprocessing does without.
"""

from __future__ import annotations

import functools
import itertools
import logging
import multiprocessing
import os
import signal
import sys
import threading
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

import data_manager

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IMAGE_FORMATS = ("JPEG", "PNG", "BMP")  # some others would make Pillow start other programs
PART = 8  # images that a worker reads at a time
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

log = logging.getLogger(__name__)


class TrainingSet(NamedTuple):
    """uint8 images (N, height, width, 3) and class labels (N,), 0..n_class-1, of both modalities."""

    visible: np.ndarray
    thermal: np.ndarray
    visible_labels: np.ndarray
    thermal_labels: np.ndarray

    @property
    def n_class(self) -> int:
        return int(max(self.visible_labels.max(), self.thermal_labels.max())) + 1

    def checksum(self) -> int:
        """Of the labels: that of another dataset differs."""
        return zlib.crc32(self.thermal_labels.tobytes(), zlib.crc32(self.visible_labels.tobytes()))


def sysu_arrays(root: str, modality: str) -> tuple[str, str]:
    """Paths of the preprocessed training images and their labels; ``modality`` is "rgb" or "ir"."""
    return tuple(os.path.join(root, f"train_{modality}_resized_{what}.npy") for what in ("img", "label"))


def load_sysu(root: str) -> TrainingSet:
    """The arrays of pre_process_sysu.py, the images memory-mapped.

    Raises:
        OSError: an array is missing, damaged, or does not fit the others.
    """
    visible, visible_labels = _load_arrays(root, "rgb")
    thermal, thermal_labels = _load_arrays(root, "ir")
    if visible.shape[1:] != thermal.shape[1:]:
        raise OSError(
            f"{root}: rgb images are {visible.shape[1:]} but ir images {thermal.shape[1:]}; {_preprocess(root)}"
        )
    labels = np.union1d(visible_labels, thermal_labels)
    if not np.array_equal(labels, np.arange(len(labels))):
        raise OSError(f"{root}: the labels of the training arrays are not 0..n-1; {_preprocess(root)}")
    return TrainingSet(visible, thermal, visible_labels, thermal_labels)


def load_regdb(root: str, trial: int, size: tuple[int, int], workers: int) -> TrainingSet:
    """The training images of one trial of RegDB, read into memory at ``size`` (height, width)."""
    splits = (data_manager.regdb_split(root, trial, modality, "train") for modality in ("visible", "thermal"))
    splits = data_manager.paired(*splits, root)
    images = read_images([split.paths for split in splits], size, workers)
    return TrainingSet(*images, *(data_manager.relabel(split.pids) for split in splits))


def read_image(path: str, size: tuple[int, int]) -> np.ndarray:
    """One image file as uint8 (height, width, 3), resized with Pillow's Lanczos filter (FIDELITY 3).

    Raises:
        OSError: the file is missing, or is not a whole image, or one of more pixels than Pillow takes for harmless.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} not found, though it is listed: restore the image or correct the list")
    try:
        with (
            warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning),
            Image.open(path, formats=IMAGE_FORMATS) as image,
        ):
            return np.asarray(image.convert("RGB").resize(size[::-1], Image.Resampling.LANCZOS))
    except Exception as error:  # Pillow raises whatever the damage leads to
        raise OSError(f"{path} cannot be read as an image ({error}): replace or remove it") from None


def read_images(batches: Iterable[list[str]], size: tuple[int, int], workers: int) -> Iterator[np.ndarray]:
    """For each batch of paths its images, uint8 (n, height, width, 3), read ahead by `start_workers`.

    Errors as for `read_image`.
    """
    pool = start_workers(workers)

    def submit(paths: list[str]) -> list[Future]:
        return [pool.submit(read_part, paths[i : i + PART], size) for i in range(0, len(paths), PART)]

    for parts in _ahead(pool, submit, batches):
        yield np.concatenate([part.result() for part in parts])


def read_part(paths: list[str], size: tuple[int, int]) -> np.ndarray:
    return np.stack([read_image(path, size) for path in paths])


def start_workers(workers: int) -> Executor:
    """A pool of processes to read images in; of one thread, if ``workers`` is 0."""
    if not workers:
        return ThreadPoolExecutor(1)
    # Forked ones start at once; elsewhere than on Linux each imports everything anew, but forking is not safe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    return ProcessPoolExecutor(workers, context, _live_with_parent)


def _live_with_parent() -> None:
    """Leave Ctrl-C and the like to the parent process, and end with it, whatever ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def _ahead(pool: Executor, submit: Callable, tasks: Iterable) -> Iterator:
    """What ``submit`` makes of each task, in order, while ``pool`` works at the next two; then it is shut down."""
    tasks = iter(tasks)
    submitted = deque(map(submit, itertools.islice(tasks, 2)))
    try:
        while submitted:
            submitted.extend(map(submit, itertools.islice(tasks, 1)))
            yield submitted.popleft()
    finally:
        pool.shutdown(cancel_futures=True)


class ImageBatches:
    """Test images as batches (modality, rows, images), all of one modality and then of the other.

    ``rows`` are places in the lists of ``split``, ``images`` (n, 3, height, width), normalised, on ``device``.

    Args:
        thermal_cameras: the numbers of the cameras whose images are "thermal"; the others are "visible".
    """

    def __init__(
        self,
        split: data_manager.Split,
        thermal_cameras: tuple[int, ...],
        size: tuple[int, int],
        batch_size: int,
        workers: int,
        device: torch.device,
    ):
        self.paths, self.size, self.device = split.paths, size, device
        self.batch_size, self.workers = batch_size, workers
        thermal = np.isin(split.camids, thermal_cameras)
        self.rows = {"thermal": np.flatnonzero(thermal), "visible": np.flatnonzero(~thermal)}

    def __len__(self) -> int:
        return sum(-(-len(rows) // self.batch_size) for rows in self.rows.values())

    def __iter__(self) -> Iterator[tuple[str, np.ndarray, Tensor]]:
        import torch

        batches = [
            (modality, rows[start : start + self.batch_size])
            for modality, rows in self.rows.items()
            for start in range(0, len(rows), self.batch_size)
        ]
        images = read_images(([self.paths[i] for i in rows] for _, rows in batches), self.size, self.workers)
        for (modality, rows), batch in zip(batches, images, strict=True):
            yield modality, rows, to_input(torch.from_numpy(batch).to(self.device), self.size)


class IdentitySampler:
    """Which images stand in which batch: persons at random, then images of each person in both modalities.

    Row k of the visible half of a batch and row k of its thermal half show the same person, and a person's rows are
    contiguous. A person with fewer than ``per_img`` images in a modality is drawn with repetition (FIDELITY 5).

    Args:
        visible_labels, thermal_labels: (N,) and (M,) class labels of all training images.
        batch_size: images of each modality in a batch.
        per_img: images of each person and modality in a batch; divides ``batch_size``.
        seed: with the epoch's number it decides the whole plan.

    Raises:
        ValueError: ``per_img`` does not divide ``batch_size``, or too few persons have images in both modalities.
    """

    def __init__(
        self, visible_labels: np.ndarray, thermal_labels: np.ndarray, batch_size: int, per_img: int, seed: int = 0
    ):
        if min(batch_size, per_img) < 1 or batch_size % per_img:
            raise ValueError(f"--batch-size {batch_size} is not a multiple of --per_img {per_img}")
        self.batch_size, self.per_img, self.seed = batch_size, per_img, seed
        self.persons = np.intersect1d(visible_labels, thermal_labels)
        if len(self.persons) < batch_size // per_img:
            raise ValueError(
                f"a batch needs {batch_size // per_img} persons (--batch-size {batch_size} / --per_img {per_img}), "
                f"but only {len(self.persons)} have images in both modalities"
            )
        self.steps = max(len(visible_labels), len(thermal_labels)) // batch_size + 1
        self.images_of = [
            {p: np.flatnonzero(labels == p) for p in self.persons} for labels in (visible_labels, thermal_labels)
        ]
        short = [p for p in self.persons if any(len(images[p]) < per_img for images in self.images_of)]
        if short:
            log.warning("%d persons have fewer than %d images in a modality; theirs are repeated", len(short), per_img)

    def epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices into the visible and the thermal images, (steps, batch_size); steps = max(N, M) // batch_size + 1.

        A pure function of the labels, the sizes, the seed and ``epoch``.
        """
        return self.draw(np.random.RandomState([self.seed, epoch]))

    def draw(self, rng: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
        """An epoch's indices, drawn from ``rng`` in the published order (FIDELITY 4)."""
        plan = np.empty((2, self.steps, self.batch_size), dtype=np.int64)
        for step in range(self.steps):
            persons = rng.choice(self.persons, self.batch_size // self.per_img, replace=False)
            for place, person in enumerate(persons):
                rows = slice(place * self.per_img, (place + 1) * self.per_img)
                for modality, images_of in enumerate(self.images_of):
                    images = images_of[person]
                    plan[modality, step, rows] = rng.choice(images, self.per_img, replace=len(images) < self.per_img)
        return plan[0], plan[1]


class TrainBatches:
    """The training batches of any epoch, which the seed and the epoch's number decide.

    Args:
        size: (height, width) that images are scaled to, where they have another size.
        cache: "device" puts all images there, once; "host" gathers each batch from ``data``, ahead of its use; "auto"
            takes the device if that is a GPU and the images fill at most a quarter of its free memory.
    """

    def __init__(
        self,
        data: TrainingSet,
        sampler: IdentitySampler,
        size: tuple[int, int],
        device: torch.device,
        cache: str = "auto",
    ):
        self.sampler, self.size, self.device = sampler, size, device
        self.images, self.labels = (data.visible, data.thermal), (data.visible_labels, data.thermal_labels)
        if cache == "auto":
            cache = "device" if device.type == "cuda" and self._fits() else "host"
        self.cache = cache
        if cache == "device":
            log.info("all images are put on the device: %.1f GB", sum(images.nbytes for images in self.images) / 1e9)
            self.images = [self._put_whole(images) for images in self.images]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Yield (visible, thermal, visible_labels, thermal_labels): (batch_size, 3, height, width), (batch_size,).

        The first ``start`` batches are left out.
        """
        import torch

        plan = np.stack(self.sampler.epoch(epoch))  # (2, steps, batch_size)
        flips = np.random.default_rng([self.sampler.seed, epoch]).random(plan.shape) < 0.5
        plan, flips = plan[:, start:], torch.from_numpy(flips[:, start:]).to(self.device)
        labels = [torch.from_numpy(own[rows]).to(self.device) for own, rows in zip(self.labels, plan, strict=True)]
        for step, images in enumerate(self.gather(plan)):
            visible, thermal = (to_input(x, self.size, flip[step]) for x, flip in zip(images, flips, strict=True))
            yield visible, thermal, labels[0][step], labels[1][step]

    def gather(self, plan: np.ndarray) -> Iterator[list[Tensor]]:
        """The images of each step, uint8 (batch_size, h, w, 3) of both modalities, on the device.

        ``plan``: their places, (2, steps, batch_size), of visible and of thermal images.
        """
        return self._gather_there(plan) if self.cache == "device" else self._gather_ahead(plan)

    def _gather_there(self, plan: np.ndarray) -> Iterator[list[Tensor]]:
        import torch

        for rows in zip(*(torch.from_numpy(rows).to(self.device) for rows in plan), strict=True):
            yield [images.index_select(0, own) for images, own in zip(self.images, rows, strict=True)]

    def _gather_ahead(self, plan: np.ndarray) -> Iterator[list[Tensor]]:
        """On the host, while the device computes."""
        import torch

        def gather(rows: tuple[np.ndarray, np.ndarray]) -> list[Tensor]:
            batch = [torch.from_numpy(images[own]) for images, own in zip(self.images, rows, strict=True)]
            if self.device.type == "cpu":
                return batch
            with torch.cuda.device(self.device):
                return [x.pin_memory() for x in batch]

        pool = ThreadPoolExecutor(1)
        for batch in _ahead(pool, lambda rows: pool.submit(gather, rows), zip(*plan, strict=True)):
            yield [x.to(self.device, non_blocking=True) for x in batch.result()]

    def _fits(self) -> bool:
        import torch

        return 4 * sum(images.nbytes for images in self.images) <= torch.cuda.mem_get_info(self.device)[0]

    def _put_whole(self, images: np.ndarray) -> Tensor:
        import torch

        whole = torch.empty(images.shape, dtype=torch.uint8, device=self.device)
        starts = range(0, len(images), 512)  # in parts: they need not fit into the host's memory
        pool = ThreadPoolExecutor(3)
        parts = _ahead(pool, lambda start: pool.submit(np.array, images[start : start + 512]), starts)
        for start, part in zip(starts, parts, strict=True):
            whole[start : start + 512] = torch.from_numpy(part.result())
        return whole


def to_input(images: Tensor, size: tuple[int, int], flip: Tensor | None = None) -> Tensor:
    """uint8 (N, h, w, 3) -> normalised float (N, 3, height, width), scaled to ``size`` where it differs.

    ``flip``: (N,) bool, which images to mirror. The values are those of torchvision's ToTensor and Normalize.
    """
    import torch
    import torch.nn.functional as F

    if images.shape[1:3] != size:
        x = F.interpolate(images.permute(0, 3, 1, 2).float(), size, mode="bilinear", antialias=True).round()
        images = x.permute(0, 2, 3, 1).contiguous()
    if flip is not None:
        both = torch.cat([images, images.flip(2)])  # the images, then their mirror images; faster than torch.where
        images = both.index_select(0, torch.arange(len(images), device=images.device) + len(images) * flip)
    mean, std = _mean_and_std(size[1], images.device)
    x = images.flatten(2).float().div_(255).sub_(mean).div_(std)  # (N, height, width * 3): plain rows are fastest
    return x.unflatten(2, (size[1], 3)).permute(0, 3, 1, 2)  # storage stays NHWC: channels_last without a copy


@functools.cache
def _mean_and_std(width: int, device: torch.device) -> Tensor:
    """Two rows of pixels (2, width * 3), made once: a copy to a GPU makes the program wait for it."""
    import torch

    return torch.tensor([IMAGENET_MEAN, IMAGENET_STD], device=device).repeat(1, width)


def open_array(path: str) -> np.ndarray:
    """Map a .npy file into memory.

    Raises:
        OSError: it is missing, is not such a file, or its header tells another size than it has.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} not found")
    try:
        array = np.lib.format.open_memmap(path, mode="r")
        if array.offset + array.nbytes == os.path.getsize(path):
            return array
        problem = "its header tells another size than it has"
    except Exception as error:  # numpy raises whatever the damage leads to
        problem = str(error)
    raise OSError(f"{path} is not a whole array ({problem})")


def _load_arrays(root: str, modality: str) -> tuple[np.ndarray, np.ndarray]:
    arrays = []
    for path in sysu_arrays(root, modality):
        try:
            arrays.append(open_array(path))
        except OSError as error:
            raise OSError(f"{error}: {_preprocess(root)}") from None
    images, labels = arrays
    if (
        images.ndim != 4
        or images.shape[3] != 3
        or images.dtype != np.uint8
        or labels.shape != images.shape[:1]
        or labels.dtype.kind not in "iu"
    ):
        raise OSError(
            f"{root}: train_{modality}_resized_img.npy {images.shape} {images.dtype} and its labels {labels.shape} "
            f"do not fit each other as (N, height, width, 3) uint8 and (N,); {_preprocess(root)}"
        )
    if not images.size:
        raise OSError(f"{root}: train_{modality}_resized_img.npy holds no images; {_preprocess(root)}")
    return images, labels.astype(np.int64)


def _preprocess(root: str) -> str:
    return f"run 'python pre_process_sysu.py --data_path {root}'"
