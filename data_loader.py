"""Lists -> tensors: read images, draw identities, transform, and make the batches of an epoch."""

# "FIDELITY n" in docstrings and comments is row n of docs/FIDELITY.md.

import functools
import hashlib
import logging
import os
import shlex
import signal
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader

import data_manager
import utils
from data_manager import Dataset, Split
from utils import READER_REMEDY, InputError, resource_advice

IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")  # for EPS Pillow would run Ghostscript
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
READ_BATCH = 64  # image files that a worker reads at a time
GATHERED_AHEAD = 2  # training batches

log = logging.getLogger(__name__)


# ---- image files --------------------------------------------------------------------------------


def read_image(path: str, size: tuple[int, int]) -> np.ndarray:
    """Read an image file as (height, width, 3) uint8, resized by Lanczos (FIDELITY 3).

    An image is turned upright if its EXIF data say so. Transparency is ignored.

    Args:
        path: a JPEG, PNG, BMP, TIFF or WebP file.
        size: (height, width).

    Raises:
        InputError: it is missing, damaged, beyond Pillow's limit of pixels, or has more than 8 bits
            a channel.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path} not found, or a broken link")
    height, width = size
    try:
        with (
            warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning),
            Image.open(path, formats=IMAGE_FORMATS) as file,
        ):
            wide_format = format_beyond_8_bits(file)
            ImageOps.exif_transpose(file, in_place=True)
            image = file.convert("RGB")
    except PermissionError as error:
        raise InputError(f"{path} cannot be read: permission denied") from error
    except Exception as error:  # corrupt files make Pillow raise many types
        if resource_advice(error):
            raise
        raise InputError(
            f"{path} cannot be read as an image ({error}): repair it, convert it to an 8-bit PNG "
            "file, or remove it"
        ) from None
    if wide_format is not None:
        raise InputError(
            f"{path} has more than 8 bits a channel ({wide_format}): convert all images to 8 bits, "
            "with one fixed range of values for all"
        )
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))


def format_beyond_8_bits(file: Image.Image) -> str | None:
    """Return the pixel format of an open image if it has more than 8 bits a channel, or floats.

    Pillow would clip such values to 255, or drop their lower bits. Its modes do not tell: 16-bit
    colours have the mode "RGB", too.
    """
    if file.format == "PNG":
        for tile in file.tile:
            stored_as = str(tile[3])  # "I;16B" or "RGB;16B", for example
            if ";16" in stored_as:
                return f"PNG, {stored_as}"
    if file.format == "TIFF":
        bits = max(file.tag_v2.get(ExifTags.Base.BitsPerSample, (1,)))
        if bits > 8:
            return f"TIFF, {bits} bits a channel"
    return None


def read_batch(paths: list[str], size: tuple[int, int]) -> tuple[np.ndarray, dict[int, str]]:
    """Read some image files.

    Errors are returned, not raised: DataLoader would bury their messages in a worker's traceback.

    Returns:
        The images, (N, height, width, 3) uint8, and the errors' messages by position in ``paths``.
        An image with an error is black.
    """
    images = np.zeros((len(paths), *size, 3), np.uint8)
    errors = {}
    for position, path in enumerate(paths):
        try:
            images[position] = read_image(path, size)
        except InputError as error:
            errors[position] = str(error)
    return images, errors


def read_images(
    batches: list[list[str]], size: tuple[int, int], workers: int
) -> Iterator[np.ndarray]:
    """Yield the images of each batch of paths, (N, height, width, 3) uint8, read ahead.

    Raises:
        InputError: an image cannot be read, or no worker can be started.
    """
    for images, errors in read_images_and_errors(batches, size, workers):
        if errors:
            raise InputError(next(iter(errors.values())))
        yield images


def read_images_and_errors(
    batches: list[list[str]], size: tuple[int, int], workers: int
) -> Iterator[tuple[np.ndarray, dict[int, str]]]:
    """Yield for each batch of paths what `read_batch` returns, read ahead.

    The workers send arrays, not tensors: those would need shared memory, of which containers have
    little.

    Raises:
        InputError: no worker can be started.
    """
    loader = DataLoader(
        batches,  # of paths; collate_fn reads the images of one batch
        batch_size=None,
        collate_fn=functools.partial(read_batch, size=size),
        num_workers=workers,
        # Otherwise the loader draws from torch's global generator, and changes dropout masks.
        generator=torch.Generator(),
        worker_init_fn=ignore_ctrl_c,
    )
    try:
        read_batches = iter(loader)  # starts the workers
    except OSError as error:  # /dev/shm is full, or cannot be written to
        if resource_advice(error):
            raise
        raise InputError(f"image readers cannot start ({error}): {READER_REMEDY}") from error
    yield from read_batches


def ignore_ctrl_c(worker: int) -> None:
    """Leave Ctrl-C to the script, which stops its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def chunks_of(paths: list[str], size: int = READ_BATCH) -> list[list[str]]:
    return [paths[start : start + size] for start in range(0, len(paths), size)]


class ImageBatches:
    """The images of a `Split` for `model.extract_features`: thermal batches, then visible ones.

    Args:
        split: the images.
        size: (height, width).
        batch_size: images in a batch.
        workers: processes that read images.
        device: where the batches are put.
        rank, world_size: each rank gets every ``world_size``-th image of a modality.
        skip_unreadable: leave out images that cannot be read; otherwise they raise InputError.

    Iterating yields (modality, indices into ``split``, images): "thermal" or "visible", (B,),
    and (B, 3, height, width), normalised, on ``device``.

    Attributes:
        unreadable: indices of the images that were left out. A warning names each.
    """

    def __init__(
        self,
        split: Split,
        size: tuple[int, int],
        batch_size: int,
        workers: int,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        skip_unreadable: bool = False,
    ):
        self.split = split
        self.size = size
        self.workers = workers
        self.device = device
        self.skip_unreadable = skip_unreadable
        self.unreadable = []
        self.batches = []  # (modality, indices)
        for modality, mask in (("thermal", split.thermal), ("visible", ~split.thermal)):
            indices = np.flatnonzero(mask)[rank::world_size]
            for start in range(0, len(indices), batch_size):
                self.batches.append((modality, indices[start : start + batch_size]))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[str, np.ndarray, Tensor]]:
        paths = []
        for _, indices in self.batches:
            paths.append([self.split.paths[i] for i in indices])
        self.unreadable = []
        batches = read_images_and_errors(paths, self.size, self.workers)
        for (modality, indices), (images, errors) in zip(self.batches, batches, strict=True):
            if errors and not self.skip_unreadable:
                raise InputError(next(iter(errors.values())))
            if errors:
                indices, images = self.without_unreadable(indices, images, errors)
            if not len(indices):
                continue  # no image of this batch can be read
            images_on_device = torch.from_numpy(images).to(self.device)
            yield modality, indices, to_input(images_on_device, self.size)

    def without_unreadable(
        self, indices: np.ndarray, images: np.ndarray, errors: dict[int, str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return a batch without the images that have errors."""
        for position, message in errors.items():
            log.warning("left out: %s", message)
            self.unreadable.append(int(indices[position]))
        is_readable = np.ones(len(indices), bool)
        is_readable[list(errors)] = False
        return indices[is_readable], images[is_readable]


# ---- training images ----------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingSet:
    """Training images of both modalities, and a class label 0..n_class-1 for each."""

    visible: np.ndarray  # (N, height, width, 3) uint8
    thermal: np.ndarray  # (M, height, width, 3) uint8
    visible_labels: np.ndarray  # (N,)
    thermal_labels: np.ndarray  # (M,)

    @property
    def n_class(self) -> int:
        return int(max(self.visible_labels.max(), self.thermal_labels.max())) + 1


def load_training_set(
    dataset: Dataset,
    root: str,
    arrays_folder: str | None,
    train_images: Split | None,
    size: tuple[int, int],
    workers: int,
) -> TrainingSet:
    """Load the arrays of pre_process_sysu.py, or read the dataset's training images.

    Args:
        dataset: if it is preprocessed, arrays are loaded; else image files are read.
        root: folder of the dataset.
        arrays_folder: folder of the arrays; None: ``root``.
        train_images: as `list_training_images` returns them. None: only for arrays.
        size: (height, width) of images that are read. Arrays have their own size.
        workers: processes that read images.

    Raises:
        InputError: something is missing, damaged, or does not fit the rest.
    """
    if dataset.preprocessed:
        return load_arrays(root, arrays_folder, train_images, size)
    visible = train_images.where(~train_images.thermal)
    thermal = train_images.where(train_images.thermal)
    return TrainingSet(
        read_all_images(visible.paths, size, workers),
        read_all_images(thermal.paths, size, workers),
        data_manager.relabel(visible.pids),
        data_manager.relabel(thermal.pids),
    )


def read_all_images(paths: list[str], size: tuple[int, int], workers: int) -> np.ndarray:
    """Read image files as (N, height, width, 3) uint8."""
    images = np.empty((len(paths), *size, 3), np.uint8)
    start = 0
    for batch in read_images(chunks_of(paths), size, workers):
        images[start : start + len(batch)] = batch
        start += len(batch)
    return images


# ---- arrays of pre_process_sysu.py --------------------------------------------------------------


def array_files(folder: str, modality: str) -> tuple[str, str]:
    """Return the paths of images and labels; ``modality`` is "rgb" or "ir", as published."""
    images = os.path.join(folder, f"train_{modality}_resized_img.npy")
    labels = os.path.join(folder, f"train_{modality}_resized_label.npy")
    return images, labels


def digest_file(folder: str) -> str:
    """Return the path of the digest that pre_process_sysu.py writes beside its arrays."""
    return os.path.join(folder, "train_resized_digest.txt")


def digest_of_images(images: Split, root: str, size: tuple[int, int]) -> str:
    """Return a digest of the files from which arrays of images of this size are made.

    It changes with the path below ``root``, the length or the modification time of any file.
    Times are taken in whole seconds, as most archives keep them: so a tree that is copied with its
    times keeps its digest.
    """
    digest = hashlib.sha256(f"{size}".encode())
    for path in images.paths:
        name = os.path.relpath(path, root).replace(os.sep, "/")
        status = os.stat(path)
        digest.update(f"{name} {status.st_size} {int(status.st_mtime)}\n".encode(errors="replace"))
    return digest.hexdigest()


def read_digest(folder: str) -> str | None:
    """Return the digest beside the arrays; None without one: the original code wrote none."""
    try:
        with open(digest_file(folder), encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except FileNotFoundError:
        return None


def load_arrays(
    root: str, arrays_folder: str | None, train_images: Split | None, size: tuple[int, int]
) -> TrainingSet:
    """Load the arrays of pre_process_sysu.py, the images memory-mapped.

    Args:
        root: folder of the dataset.
        arrays_folder: folder of the arrays; None: ``root``.
        train_images: the images that the arrays must be of. None: they are not compared.
        size: (height, width) for the command in errors. The arrays may have another size.

    Raises:
        InputError: they are missing or damaged, or do not fit each other or the images.
    """
    folder = arrays_folder or root
    remedy = preprocess_command(root, arrays_folder, size)
    visible_file, visible_label_file = array_files(folder, "rgb")
    thermal_file, thermal_label_file = array_files(folder, "ir")
    train_set = TrainingSet(
        map_array(visible_file, remedy),
        map_array(thermal_file, remedy),
        read_labels(visible_label_file, remedy),
        read_labels(thermal_label_file, remedy),
    )
    problem = problem_of_arrays(train_set)
    if problem is None and train_images is not None:
        problem = difference_from_images(train_set, train_images, root, folder)
    if problem:
        raise InputError(f"{folder}: {problem}: {remedy}")
    if train_images is None:
        log.warning(
            "train: %d persons, %d visible and %d infrared images in arrays; they are not compared "
            "with image files: there are none, or no lists of them",
            train_set.n_class,
            len(train_set.visible),
            len(train_set.thermal),
        )
    return train_set


def difference_from_images(
    train_set: TrainingSet, train_images: Split, root: str, folder: str
) -> str | None:
    """Return how arrays differ from the training images; None if they are of these images.

    Arrays without a digest, like those of the original code, are compared by their labels alone.
    """
    labels = data_manager.relabel(train_images.pids)
    for modality, array_labels, image_labels in (
        ("visible", train_set.visible_labels, labels[~train_images.thermal]),
        ("infrared", train_set.thermal_labels, labels[train_images.thermal]),
    ):
        if not np.array_equal(np.bincount(array_labels), np.bincount(image_labels)):
            return (
                f"the arrays have other numbers of {modality} images of a person than the folders: "
                f"in all {len(array_labels)} of {len(np.unique(array_labels))} persons, in the "
                f"folders {len(image_labels)} of {len(np.unique(image_labels))}"
            )
    digest = read_digest(folder)
    if digest is None:
        log.info("arrays without a digest: only the numbers of images of a person were compared")
        return None
    if digest != digest_of_images(train_images, root, train_set.visible.shape[1:3]):
        return (
            "after the arrays were made, image files were changed, renamed, or copied without "
            "their times"
        )
    return None


def problem_of_arrays(train_set: TrainingSet) -> str | None:
    """Return what is wrong with the arrays of a training set; None if they fit each other."""
    size = train_set.visible.shape[1:3]
    for images, labels in (
        (train_set.visible, train_set.visible_labels),
        (train_set.thermal, train_set.thermal_labels),
    ):
        if images.dtype != np.uint8 or images.shape != (*labels.shape, *size, 3):
            return f"images {images.shape} {images.dtype} do not fit labels {labels.shape}"
        if not images.size:
            return "there are no images"
    persons = np.unique(train_set.visible_labels)
    if not np.array_equal(persons, np.unique(train_set.thermal_labels)):
        return "visible and infrared images are of different persons"
    if not np.array_equal(persons, np.arange(len(persons))):
        return "the labels are not 0..n-1"
    return None


def map_array(path: str, remedy: str) -> np.ndarray:
    """Open an .npy file, memory-mapped.

    Raises:
        InputError: it cannot be read. The message ends with the ``remedy``.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path} not found: {remedy}")
    try:
        return np.lib.format.open_memmap(path, mode="r")  # np.load would take archives, too
    except PermissionError:
        raise
    except Exception as error:  # corrupt files make numpy raise many types
        if resource_advice(error):
            raise
        raise InputError(f"{path}: {error}: {remedy}") from error


def read_labels(path: str, remedy: str) -> np.ndarray:
    """Read the labels of an .npy file as int64."""
    labels = map_array(path, remedy)
    if labels.dtype.kind not in "iu":
        raise InputError(f"{path}: labels of type {labels.dtype} are not whole numbers: {remedy}")
    return labels.astype(np.int64)


def preprocess_command(root: str, arrays_folder: str | None, size: tuple[int, int]) -> str:
    """Return the command that makes the arrays, for errors."""
    words = ["python", "pre_process_sysu.py", "--data-path", root]
    if arrays_folder is not None:
        words += ["--arrays", arrays_folder]
    words += ["--img-h", str(size[0]), "--img-w", str(size[1])]
    return f"run {shlex.join(words)}"


# ---- batches ------------------------------------------------------------------------------------


class IdentitySampler:
    """Chooses the images of each batch: random persons, then images of each in both modalities.

    Row k of the visible half of a batch and row k of its thermal half show the same person, and a
    person's rows are contiguous. A person with fewer than ``per_img`` images in a modality is drawn
    with replacement (FIDELITY 5).

    Args:
        visible_labels, thermal_labels: (N,) and (M,) class labels of all training images.
        batch_size: images of each modality in a batch.
        per_img: images of each person and modality in a batch.
        seed: with the number of an epoch, it decides the epoch's batches.

    Raises:
        InputError: ``per_img`` does not divide ``batch_size``, or too few persons have images in
            both modalities.
    """

    def __init__(
        self,
        visible_labels: np.ndarray,
        thermal_labels: np.ndarray,
        batch_size: int,
        per_img: int,
        seed: int = 0,
    ):
        if batch_size < 1 or per_img < 1 or batch_size % per_img:
            raise InputError(f"--batch-size {batch_size} is not a multiple of --per-img {per_img}")
        self.batch_size = batch_size
        self.per_img = per_img
        self.seed = seed
        self.persons = np.intersect1d(visible_labels, thermal_labels)
        self.persons_per_batch = batch_size // per_img
        if len(self.persons) < self.persons_per_batch:
            raise InputError(
                f"a batch needs {self.persons_per_batch} persons (--batch-size {batch_size} / "
                f"--per-img {per_img}), but only {len(self.persons)} have images in both modalities"
            )
        n_images = max(len(visible_labels), len(thermal_labels))
        # As in the original code: one batch more than needed if batch_size divides n_images.
        self.steps = n_images // batch_size + 1
        self.visible_images = {}  # person -> indices of their images
        self.thermal_images = {}
        n_short = 0
        for person in self.persons:
            self.visible_images[person] = np.flatnonzero(visible_labels == person)
            self.thermal_images[person] = np.flatnonzero(thermal_labels == person)
            fewest = min(len(self.visible_images[person]), len(self.thermal_images[person]))
            if fewest < per_img:
                n_short += 1
        if n_short:
            log.warning(
                "%d persons have fewer than %d images in a modality: some are repeated in a batch",
                n_short,
                per_img,
            )

    def epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (steps, batch_size) indices of visible images, and as many of thermal ones."""
        return self.draw(np.random.RandomState([self.seed, epoch]))

    def draw(self, rng: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
        """Draw an epoch's indices as `epoch` returns them, in the original's order (FIDELITY 4)."""
        visible = np.empty((self.steps, self.batch_size), dtype=np.int64)
        thermal = np.empty((self.steps, self.batch_size), dtype=np.int64)
        for step in range(self.steps):
            persons = rng.choice(self.persons, self.persons_per_batch, replace=False)
            for i, person in enumerate(persons):
                rows = slice(i * self.per_img, (i + 1) * self.per_img)
                visible[step, rows] = self.draw_images(rng, self.visible_images[person])
                thermal[step, rows] = self.draw_images(rng, self.thermal_images[person])
        return visible, thermal

    def draw_images(self, rng: np.random.RandomState, images: np.ndarray) -> np.ndarray:
        """Draw ``per_img`` of a person's images; with replacement where there are fewer."""
        return rng.choice(images, self.per_img, replace=len(images) < self.per_img)


class TrainBatches:
    """The training batches of any epoch: a pure function of the seed and the epoch's number.

    Args:
        train_set: the images.
        sampler: which images go into which batch.
        size: (height, width); images of another size are scaled to it.
        device: where the batches are put.
        cache: "device" puts all images there, once; "host" gathers each batch ahead of its use;
            "auto" takes the device if that is a GPU and the images fill at most a quarter of its
            free memory.
        rank, world_size: each rank takes its own persons of a batch (FIDELITY 10).

    Raises:
        InputError: the ranks cannot have equally many persons.
    """

    def __init__(
        self,
        train_set: TrainingSet,
        sampler: IdentitySampler,
        size: tuple[int, int],
        device: torch.device,
        cache: str = "auto",
        rank: int = 0,
        world_size: int = 1,
    ):
        persons = sampler.persons_per_batch
        if persons % world_size:
            divisors = [str(n) for n in range(1, persons + 1) if persons % n == 0]
            raise InputError(
                f"{world_size} processes cannot share the {persons} persons of a batch "
                f"(--batch-size / --per-img) equally: give --nproc_per_node {' or '.join(divisors)}"
            )
        rows_per_rank = sampler.batch_size // world_size
        self.rank_rows = slice(rank * rows_per_rank, (rank + 1) * rows_per_rank)
        self.train_set = train_set
        self.sampler = sampler
        self.size = size
        self.device = device
        image_size = train_set.visible.shape[1:3]
        if image_size != size:
            log.warning("images of %d x %d pixels are scaled to %d x %d", *image_size, *size)
        n_bytes = train_set.visible.nbytes + train_set.thermal.nbytes
        if cache == "auto":
            cache = choose_cache(n_bytes, device)
        self.is_on_device = cache == "device"
        if self.is_on_device:
            log.info("all images are put on the device: %.1f GB", n_bytes / 1e9)
            self.visible_on_device = torch.tensor(train_set.visible, device=device)
            self.thermal_on_device = torch.tensor(train_set.thermal, device=device)

    def __len__(self) -> int:
        """The steps of an epoch."""
        return self.sampler.steps

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Yield (visible, thermal, visible_labels, thermal_labels) for each step of an epoch.

        Images are (B, 3, height, width), normalised, labels (B,); B is batch_size / world_size.
        """
        visible_plan, thermal_plan = self.sampler.epoch(epoch)  # (steps, batch_size)
        # Drawn for the whole batch, then cut: all ranks together mirror what one process would.
        rng = np.random.default_rng([self.sampler.seed, epoch])
        flips = rng.random((2, *visible_plan.shape)) < 0.5
        visible_flips = torch.from_numpy(flips[0, :, self.rank_rows]).to(self.device)
        thermal_flips = torch.from_numpy(flips[1, :, self.rank_rows]).to(self.device)
        visible_plan = visible_plan[:, self.rank_rows]
        thermal_plan = thermal_plan[:, self.rank_rows]
        # All labels are copied at once: a copy in each step would make the program wait.
        visible_labels = torch.from_numpy(self.train_set.visible_labels[visible_plan])
        visible_labels = visible_labels.to(self.device)
        thermal_labels = torch.from_numpy(self.train_set.thermal_labels[thermal_plan])
        thermal_labels = thermal_labels.to(self.device)
        for step, (visible, thermal) in enumerate(self.images_of_steps(visible_plan, thermal_plan)):
            yield (
                to_input(visible, self.size, visible_flips[step]),
                to_input(thermal, self.size, thermal_flips[step]),
                visible_labels[step],
                thermal_labels[step],
            )

    def images_of_steps(
        self, visible_plan: np.ndarray, thermal_plan: np.ndarray
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield visible and thermal images of each step, (B, h, w, 3) uint8, on the device.

        ``visible_plan``, ``thermal_plan``: (steps, B) indices.
        """
        if self.is_on_device:
            visible_plan = torch.from_numpy(visible_plan).to(self.device)
            thermal_plan = torch.from_numpy(thermal_plan).to(self.device)
            for visible, thermal in zip(visible_plan, thermal_plan, strict=True):
                yield (
                    self.visible_on_device.index_select(0, visible),
                    self.thermal_on_device.index_select(0, thermal),
                )
            return
        # A thread gathers batches on the host while the device computes.
        waiting = deque()
        with ThreadPoolExecutor(1) as pool:
            for visible, thermal in zip(visible_plan, thermal_plan, strict=True):
                waiting.append(pool.submit(self.gather_on_host, visible, thermal))
                if len(waiting) > GATHERED_AHEAD:
                    yield self.copy_to_device(waiting.popleft().result())
            while waiting:
                yield self.copy_to_device(waiting.popleft().result())

    def gather_on_host(self, visible: np.ndarray, thermal: np.ndarray) -> tuple[Tensor, Tensor]:
        """Gather the images at (B,) indices; in pinned memory for a GPU, which copies it faster."""
        visible_images = torch.from_numpy(self.train_set.visible[visible])
        thermal_images = torch.from_numpy(self.train_set.thermal[thermal])
        if self.device.type == "cuda":
            return visible_images.pin_memory(), thermal_images.pin_memory()
        return visible_images, thermal_images

    def copy_to_device(self, images: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        visible, thermal = images
        visible = visible.to(self.device, non_blocking=True)
        thermal = thermal.to(self.device, non_blocking=True)
        return visible, thermal


def choose_cache(n_bytes: int, device: torch.device) -> str:
    """Return "device" for a GPU of whose free memory the images fill at most a quarter."""
    if device.type != "cuda":
        return "host"
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return "device" if 4 * n_bytes <= free_bytes else "host"


def to_input(images: Tensor, size: tuple[int, int], flip: Tensor | None = None) -> Tensor:
    """Scale, mirror and normalise images for the network.

    The values are those of torchvision's ToTensor and Normalize.

    Args:
        images: (N, h, w, 3) uint8.
        size: (height, width); images of another size are scaled to it.
        flip: (N,) bool, which images to mirror.

    Returns:
        (N, 3, height, width) float32, in `utils.memory_format`.
    """
    if images.shape[1:3] != size:
        channels_first = images.permute(0, 3, 1, 2).float()
        scaled = F.interpolate(channels_first, size, mode="bilinear", antialias=True).round()
        images = scaled.permute(0, 2, 3, 1).contiguous()
    if flip is not None:
        # Row i of ``both`` is image i, row n_images + i its mirror image. That is faster than
        # torch.where.
        n_images = len(images)
        both = torch.cat([images, images.flip(2)])
        chosen = torch.arange(n_images, device=images.device) + n_images * flip
        images = both.index_select(0, chosen)
    # Whole rows of pixels, (N, height, width * 3), are faster to normalise than single channels.
    mean, std = mean_and_std_rows(size[1], images.device)
    pixel_rows = images.flatten(2).float().div_(255).sub_(mean).div_(std)
    normalised = pixel_rows.unflatten(2, (size[1], 3)).permute(0, 3, 1, 2)
    return normalised.contiguous(memory_format=utils.memory_format(images.device))


@functools.cache
def mean_and_std_rows(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of a row of pixels, (width * 3,) each.

    They are made once: a copy to a GPU makes the program wait for it.
    """
    mean = torch.tensor(IMAGENET_MEAN, device=device).repeat(width)
    std = torch.tensor(IMAGENET_STD, device=device).repeat(width)
    return mean, std
