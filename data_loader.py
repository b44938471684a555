"""Lists -> tensors: reading images, the identity sampler, the transforms, and the batches of an epoch."""

import functools
import logging
import os
import signal
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

import data_manager

IMAGE_FORMATS = ("JPEG", "PNG", "BMP")  # some others would make Pillow start other programs
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

log = logging.getLogger(__name__)


# ---- image files ----------------------------------------------------------------------------------------------------


def read_image(path: str, size: tuple[int, int]) -> np.ndarray:
    """One image file as uint8 (height, width, 3), resized with Pillow's Lanczos filter (FIDELITY 3).

    OSError: it is missing, damaged, or of more pixels than Pillow takes for harmless.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} not found, though it is listed: is --data_path right, and the list?")
    try:
        with (
            warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning),
            Image.open(path, formats=IMAGE_FORMATS) as image,
        ):
            return np.asarray(image.convert("RGB").resize(size[::-1], Image.Resampling.LANCZOS))
    except Exception as error:  # Pillow raises whatever the damage leads to
        raise OSError(f"{path} cannot be read as an image ({error}): replace or remove it") from None


def read_batch(paths: list[str], size: tuple[int, int]) -> Tensor | OSError:
    """Some image files as uint8 (n, height, width, 3), or the error: if raised here, its line would be a traceback."""
    try:
        return torch.from_numpy(np.stack([read_image(path, size) for path in paths]))
    except OSError as error:
        return error


def read_images(batches: list[list[str]], size: tuple[int, int], workers: int) -> Iterator[Tensor]:
    """The images of each batch of paths, uint8 (n, height, width, 3), read ahead. OSError: one cannot be read."""
    # A generator of its own: the loader would otherwise draw a number from torch's, which changes dropout.
    own = {"generator": torch.Generator(), "worker_init_fn": _ignore_interrupts}
    read = functools.partial(read_batch, size=size)
    for images in DataLoader(batches, batch_size=None, collate_fn=read, num_workers=workers, **own):
        if isinstance(images, OSError):
            raise images
        yield images


def _ignore_interrupts(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the script


class ImageBatches:
    """Test images as batches (modality, rows, images), first all thermal ones, then all visible ones.

    ``rows`` are places in the lists of ``split``, ``images`` (n, 3, height, width), normalised, on ``device``. With a
    ``share`` (rank, processes) they are those of one process.
    """

    def __init__(self, split: data_manager.Split, size: tuple, batch_size: int, workers: int, device, share=(0, 1)):
        self.split, self.size, self.workers, self.device = split, size, workers, device
        self.batches = []
        for modality, side in (("thermal", split.thermal), ("visible", ~split.thermal)):
            rows = np.flatnonzero(side)[share[0] :: share[1]]
            self.batches += [(modality, rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[str, np.ndarray, Tensor]]:
        paths = [[self.split.paths[i] for i in rows] for _, rows in self.batches]
        images = read_images(paths, self.size, self.workers)
        for (modality, rows), batch in zip(self.batches, images, strict=True):
            yield modality, rows, to_input(batch.to(self.device), self.size)


# ---- training images ------------------------------------------------------------------------------------------------


class TrainingSet(NamedTuple):
    """uint8 images (N, height, width, 3) and class labels (N,), 0..n_class-1, of both modalities."""

    visible: np.ndarray
    thermal: np.ndarray
    visible_labels: np.ndarray
    thermal_labels: np.ndarray

    @property
    def n_class(self) -> int:
        return int(max(self.visible_labels.max(), self.thermal_labels.max())) + 1


def load_training_set(
    dataset: data_manager.Dataset, root: str, trial: int | None, size: tuple, workers: int
) -> TrainingSet:
    """The arrays of pre_process_sysu.py, or the dataset's training images, read at ``size`` (height, width).

    OSError: something is missing, damaged, or does not fit the rest.
    """
    if dataset.preprocessed:
        return load_arrays(root)
    splits = data_manager.paired(*dataset.train(root, trial), root)  # the same persons, so that labels mean the same
    data_manager.check_counts(data_manager.joined(*splits), dataset, "train")
    images = [np.concatenate([*read_images(batches_of(split.paths), size, workers)]) for split in splits]
    return TrainingSet(*images, *(data_manager.relabel(split.pids) for split in splits))


def batches_of(paths: list[str], n: int = 64) -> list[list[str]]:
    return [paths[start : start + n] for start in range(0, len(paths), n)]


def array_files(root: str, modality: str) -> tuple[str, str]:
    """Paths of the preprocessed training images and their labels; ``modality`` is "rgb" or "ir"."""
    return tuple(os.path.join(root, f"train_{modality}_resized_{what}.npy") for what in ("img", "label"))


def load_arrays(root: str) -> TrainingSet:
    """The arrays of pre_process_sysu.py, the images memory-mapped. OSError: they are missing or damaged."""
    try:
        files = [array_files(root, modality) for modality in ("rgb", "ir")]
        images, labels = zip(*([np.load(path, mmap_mode="r") for path in pair] for pair in files), strict=True)
        labels = [own.astype(np.int64, casting="safe") for own in labels]
        for x, own in zip(images, labels, strict=True):
            if x.dtype != np.uint8 or x.shape != (*own.shape, *images[0].shape[1:3], 3) or not x.size:
                raise ValueError(f"images {x.shape} {x.dtype} and labels {own.shape} do not fit each other")
        persons = np.unique(np.concatenate(labels))
        if not np.array_equal(persons, np.arange(len(persons))):
            raise ValueError("the labels are not 0..n-1")
        return TrainingSet(*images, *labels)
    except Exception as error:  # numpy raises whatever the damage leads to
        raise OSError(f"{root}: {error}: run 'python pre_process_sysu.py --data_path {root}'") from error


class IdentitySampler:
    """Which images go into which batch: persons at random, then images of each person in both modalities.

    Row k of the visible half of a batch and row k of its thermal half show the same person, and a person's rows are
    contiguous. A person with fewer than ``per_img`` images in a modality is drawn with repetition (FIDELITY 5).

    Args:
        visible_labels, thermal_labels: (N,) and (M,) class labels of all training images.
        batch_size, per_img: images of each modality in a batch, and of each person among them.
        seed: with the epoch's number it decides the whole plan.

    ValueError: ``per_img`` does not divide ``batch_size``, or too few persons have images in both modalities.
    """

    def __init__(
        self, visible_labels: np.ndarray, thermal_labels: np.ndarray, batch_size: int, per_img: int, seed: int = 0
    ):
        if min(batch_size, per_img) < 1 or batch_size % per_img:
            raise ValueError(f"--batch-size {batch_size} is not a multiple of --per_img {per_img}")
        self.batch_size, self.per_img, self.seed = batch_size, per_img, seed
        self.persons, needed = np.intersect1d(visible_labels, thermal_labels), batch_size // per_img
        if len(self.persons) < needed:
            raise ValueError(f"a batch needs {needed} persons (--batch-size {batch_size} / --per_img {per_img}), but "
                             f"only {len(self.persons)} have images in both modalities")  # fmt: skip
        both = visible_labels, thermal_labels
        self.steps = max(map(len, both)) // batch_size + 1  # as published
        self.images_of = [{person: np.flatnonzero(labels == person) for person in self.persons} for labels in both]
        short = sum(min(len(images[person]) for images in self.images_of) < per_img for person in self.persons)
        if short:
            log.warning("%d persons have fewer than %d images in a modality; theirs are repeated", short, per_img)

    def epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices into visible and thermal images, (steps, batch_size) each; labels, sizes, seed and epoch decide."""
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
        share: (rank, processes): this process takes its part of a batch's persons, both modalities (FIDELITY 10).

    ValueError: the processes cannot have equally many persons.
    """

    def __init__(self, data: TrainingSet, sampler: IdentitySampler, size: tuple, device, cache="auto", share=(0, 1)):
        persons, (rank, processes) = sampler.batch_size // sampler.per_img, share
        if persons % processes:
            numbers = [str(n) for n in range(1, persons + 1) if persons % n == 0]
            raise ValueError(f"{processes} processes cannot share the {persons} persons of a batch (--batch-size / "
                             f"--per_img) equally: start {' or '.join(numbers)}")  # fmt: skip
        self.own = slice(rank * sampler.batch_size // processes, (rank + 1) * sampler.batch_size // processes)
        self.sampler, self.size, self.device = sampler, size, device
        self.images, self.labels = (data.visible, data.thermal), (data.visible_labels, data.thermal_labels)
        if data.visible.shape[1:3] != size:
            log.warning("images of %d x %d pixels are scaled to %d x %d", *data.visible.shape[1:3], *size)
        needed = sum(images.nbytes for images in self.images)
        fits = device.type == "cuda" and 4 * needed <= torch.cuda.mem_get_info(device)[0]
        self.cache = ("device" if fits else "host") if cache == "auto" else cache
        if self.cache == "device":
            log.info("all images are put on the device: %.1f GB", needed / 1e9)
            self.images = [torch.tensor(images, device=device) for images in self.images]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Yield (visible, thermal, visible_labels, thermal_labels): (n, 3, height, width) and (n,).

        The first ``start`` batches are left out; n is batch_size / processes.
        """
        plan = np.stack(self.sampler.epoch(epoch))  # (2, steps, batch_size)
        flips = np.random.default_rng([self.sampler.seed, epoch]).random(plan.shape) < 0.5
        plan, flips = plan[:, start:, self.own], torch.from_numpy(flips[:, start:, self.own]).to(self.device)
        labels = [torch.from_numpy(every[rows]).to(self.device) for every, rows in zip(self.labels, plan, strict=True)]
        for step, images in enumerate(self.gather(plan)):
            visible, thermal = (to_input(x, self.size, flip[step]) for x, flip in zip(images, flips, strict=True))
            yield visible, thermal, labels[0][step], labels[1][step]

    def gather(self, plan: np.ndarray) -> Iterator[list[Tensor]]:
        """The images of each step, uint8 (n, h, w, 3) of both modalities, on the device.

        ``plan``: their places, (2, steps, n), of visible and of thermal images.
        """
        if self.cache == "device":
            for rows in torch.from_numpy(plan).to(self.device).unbind(1):
                yield [images.index_select(0, i) for images, i in zip(self.images, rows, strict=True)]
            return
        ahead = deque()
        with ThreadPoolExecutor(1) as pool:  # on the host, while the device computes
            for rows in plan.swapaxes(0, 1):
                ahead.append(pool.submit(self._gather, rows))
                if len(ahead) > 2:
                    yield [x.to(self.device, non_blocking=True) for x in ahead.popleft().result()]
            while ahead:
                yield [x.to(self.device, non_blocking=True) for x in ahead.popleft().result()]

    def _gather(self, rows: np.ndarray) -> list[Tensor]:
        batch = [torch.from_numpy(images[i]) for images, i in zip(self.images, rows, strict=True)]
        return [x.pin_memory() for x in batch] if self.device.type == "cuda" else batch


def to_input(images: Tensor, size: tuple[int, int], flip: Tensor | None = None) -> Tensor:
    """uint8 (N, h, w, 3) -> normalised float (N, 3, height, width), scaled to ``size`` where it differs.

    ``flip``: (N,) bool, which images to mirror. The values are those of torchvision's ToTensor and Normalize.
    """
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
    return torch.tensor([IMAGENET_MEAN, IMAGENET_STD], device=device).repeat(1, width)
