"""Images, the identity sampler and batches, each against something simpler."""

import hashlib
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from conftest import golden, run_here
from PIL import ExifTags, Image
from torchvision.transforms.functional import hflip, normalize, to_tensor

import data_loader
import data_manager
from data_loader import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    IdentitySampler,
    ImageBatches,
    TrainBatches,
    TrainingSet,
    to_input,
)
from data_manager import DATASETS, Split
from utils import InputError

CPU = torch.device("cpu")
GOLDEN_PILLOW = "13.0.0"  # which decoded the golden images

# ---- pixels -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def preprocessed_golden_tree(golden_tree, tmp_path_factory) -> Path:
    tree = shutil.copytree(golden_tree, tmp_path_factory.mktemp("preprocessed") / "SYSU-MM01")
    run_here("pre_process_sysu.py", "--data_path", tree)
    return tree


@pytest.mark.skipif(
    PIL.__version__ != GOLDEN_PILLOW,
    reason=f"the golden arrays are of Pillow {GOLDEN_PILLOW}: other decoders may differ a little",
)
def test_preprocessed_arrays_are_those_of_the_original_to_the_bit(preprocessed_golden_tree):
    g = golden("sysu_preprocess.npz")
    for modality in ("rgb", "ir"):
        images_file, _ = data_loader.array_files(str(preprocessed_golden_tree), modality)
        digest = hashlib.sha256(np.load(images_file).tobytes()).hexdigest()
        assert digest == str(g[f"{modality}_sha256"])


def test_preprocessed_arrays_are_those_of_the_original(preprocessed_golden_tree):
    """Pillow's decoders may differ by two levels."""
    tree = preprocessed_golden_tree
    sysu = DATASETS["sysu"]
    images = data_manager.list_training_images(sysu, str(tree), None)
    data = data_loader.load_training_set(sysu, str(tree), None, images, (288, 144), workers=0)
    assert data.n_class == 7
    assert not list(tree.glob("*.partial"))
    g = golden("sysu_preprocess.npz")
    visible = ("rgb", data.visible, data.visible_labels)
    thermal = ("ir", data.thermal, data.thermal_labels)
    for modality, images, labels in (visible, thermal):
        assert images.shape == tuple(g[f"{modality}_shape"])
        assert images.dtype == str(g[f"{modality}_dtype"])
        np.testing.assert_array_equal(labels, g[f"{modality}_label"])
        means = images.mean((1, 2))
        np.testing.assert_allclose(means, g[f"{modality}_channel_mean"], atol=0.5)
        corners = g[f"{modality}_corner8"].astype(int)
        np.testing.assert_allclose(images[:, :8, :8, 0], corners, atol=2)


def test_preprocessing_is_repeated_only_where_needed(golden_tree, output_of, tmp_path):
    tree = shutil.copytree(golden_tree, tmp_path / "tree")
    size = ["--img_h", 24, "--img_w", 12, "--workers", 0]

    def writes(*flags) -> bool:
        before = {path.stat().st_mtime_ns for path in tree.glob("*.npy")}
        out = output_of("pre_process_sysu.py", "--data_path", tree, *size, *flags)
        changed = before != {path.stat().st_mtime_ns for path in tree.glob("*.npy")}
        assert ("are replaced" in out) == (changed and bool(before))
        return changed

    assert writes()
    assert not writes()
    assert writes("--force")
    assert writes("--img_h", 32)
    assert writes()
    file = tree / "train_rgb_resized_img.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert writes()
    assert file.read_bytes() == whole
    _, thermal = data_manager.sysu_train(str(tree))
    os.utime(thermal.paths[0], (2e9, 2e9))  # an image that is newer than the arrays
    assert writes()
    os.utime(thermal.paths[0], (1e9, 1e9))  # and one that is older, but another than before
    assert writes()
    assert not writes()


@pytest.mark.parametrize("workers", [0, 2])
def test_test_images_are_those_of_the_original(golden_tree, workers):
    """In the order of the lists, whatever the order of reading; torch's generator is not moved."""
    g = golden("sysu_preprocess.npz")
    lists = golden("sysu_lists.json")
    names = ("query_all", "gallery_all_single_first_call")
    paths = np.concatenate([lists[name]["paths"] for name in names])
    cameras = np.concatenate([lists[name]["cams"] for name in names])
    order = np.random.default_rng(0).permutation(len(paths))  # modalities mixed
    thermal = np.isin(cameras, (3, 6))[order]
    zeros = np.zeros(len(paths), int)
    split = Split([str(golden_tree / path) for path in paths[order]], zeros, zeros, thermal)
    images = np.empty((len(paths), 3, 288, 144), np.float32)
    random_state = torch.get_rng_state()
    for modality, indices, batch in ImageBatches(split, (288, 144), 4, workers, CPU):
        assert (thermal[indices] == (modality == "thermal")).all()
        images[order[indices]] = batch
    assert torch.equal(torch.get_rng_state(), random_state)
    means = np.concatenate([g[f"testdata_{name}_mean"] for name in names])
    corners = np.concatenate([g[f"testdata_{name}_corner4"] for name in names])
    np.testing.assert_allclose(images.mean((2, 3)), means, atol=0.01)
    np.testing.assert_allclose(images[:, :, :4, :4], corners, atol=2 / 255 / 0.22)


COLOUR = (200, 40, 90)
GREY = (93, 93, 93)  # of the same lightness: 0.299 R + 0.587 G + 0.114 B


@pytest.mark.parametrize(
    ("mode", "name", "colour"),
    [
        ("L", "a.bmp", GREY),
        ("P", "b.png", COLOUR),
        ("RGBA", "c.png", COLOUR),
        ("CMYK", "d.jpg", COLOUR),
    ],
)
def test_images_of_any_mode_are_read_as_rgb(tmp_path, mode, name, colour):
    image = Image.new("RGB", (20, 40), COLOUR)
    image.convert(mode, palette=Image.Palette.ADAPTIVE).save(tmp_path / name)
    with Image.open(tmp_path / name) as file:
        assert file.mode == mode
    pixels = data_loader.read_image(str(tmp_path / name), (96, 32))
    assert pixels.shape == (96, 32, 3)
    np.testing.assert_allclose(pixels[48, 16], colour, atol=3)


# Four corners of flat colour, in blocks of 8 x 8 pixels, which JPEG keeps within two levels.
UPRIGHT = np.zeros((32, 16, 3), np.uint8)
UPRIGHT[:16, :8] = (250, 10, 20)
UPRIGHT[:16, 8:] = (20, 240, 30)
UPRIGHT[16:, :8] = (10, 30, 230)
UPRIGHT[16:, 8:] = (200, 200, 210)
# EXIF's orientation -> what a camera does to the upright image before it is stored.
AS_STORED = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels.swapaxes(0, 1)[::-1],
    7: lambda pixels: pixels.swapaxes(0, 1)[::-1, ::-1],
    8: lambda pixels: pixels.swapaxes(0, 1)[:, ::-1],
}


@pytest.mark.parametrize("orientation", AS_STORED)
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_images_are_turned_upright(tmp_path, orientation, suffix):
    """EXIF: 6 says that the first row is the right side of the scene, 8 that it is the left one."""
    stored = np.ascontiguousarray(AS_STORED[orientation](UPRIGHT))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / f"image.{suffix}"
    options = {}
    if suffix == "jpg":
        options = {"quality": 95, "subsampling": 0}
    elif suffix == "webp":
        options = {"lossless": True}
    Image.fromarray(stored).save(path, exif=exif, **options)
    pixels = data_loader.read_image(str(path), (32, 16))
    np.testing.assert_allclose(pixels.astype(int), UPRIGHT, atol=2)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")
@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("RGBA", "png"),
        ("RGBA", "webp"),
        ("RGBA", "tif"),
        ("LA", "png"),
        ("LA", "tif"),
        ("P", "png"),  # PNG may mark a colour as transparent
        ("RGB", "png"),
        ("L", "png"),
    ],
)
def test_transparency_is_ignored(tmp_path, mode, suffix):
    """The colours are as they are stored, even where nothing of them would be seen."""
    image = Image.fromarray(UPRIGHT)
    expected = UPRIGHT
    options = {}
    if mode in ("L", "LA"):
        image = image.convert("L")
        expected = np.stack([np.asarray(image)] * 3, axis=2)
    if mode in ("RGBA", "LA"):
        alpha = np.linspace(0, 255, UPRIGHT[..., 0].size).reshape(32, 16).astype(np.uint8)
        image.putalpha(Image.fromarray(alpha))
    elif mode == "P":
        image = image.convert("P", palette=Image.Palette.ADAPTIVE)
        options = {"transparency": bytes([0, 0, 128, 255])}
    else:
        options = {"transparency": image.getpixel((0, 0))}
    if suffix == "webp":
        options = {"lossless": True, "exact": True}  # exact: also where alpha is 0
    path = tmp_path / f"image.{suffix}"
    image.save(path, **options)
    with Image.open(path) as file:
        assert file.mode == mode
    pixels = data_loader.read_image(str(path), (32, 16))
    np.testing.assert_array_equal(pixels, expected)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def write_16_bit_png(path: Path, values: np.ndarray) -> None:
    """Write (height, width, channels) uint16 by hand: Pillow writes no colours of 16 bits."""
    height, width, n_channels = values.shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[n_channels]
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    rows = b""
    for row in values.astype(">u2"):
        rows += b"\0" + row.tobytes()  # 0: without a filter
    content = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)
    content += png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    path.write_bytes(content)


def write_tiff(path: Path, values: np.ndarray) -> None:
    """Write (height, width, 3) uint8 or uint16 by hand, pixel after pixel."""
    write_tiff_strips(path, values, list(values), rows_per_strip=1, planar_configuration=1)


def write_planar_tiff(path: Path, values: np.ndarray) -> None:
    """Write (height, width, 3) uint8 or uint16 by hand, channel after channel."""
    channels = [values[..., 0], values[..., 1], values[..., 2]]
    write_tiff_strips(path, values, channels, len(values), planar_configuration=2)


def write_tiff_strips(
    path: Path,
    values: np.ndarray,
    strips: list[np.ndarray],
    rows_per_strip: int,
    planar_configuration: int,
) -> None:
    """Write the tags of an uncompressed TIFF file, and its pixels in strips of equal length."""
    height, width, n_channels = values.shape
    bits = 8 * values.itemsize
    strip_length = strips[0].nbytes
    # After eight bytes come three lists, the pixels, and the tags.
    bits_start = 8
    starts_start = bits_start + 2 * n_channels
    lengths_start = starts_start + 4 * len(strips)
    pixels_start = lengths_start + 4 * len(strips)
    tags_start = pixels_start + values.nbytes

    content = b"II*\0" + struct.pack("<I", tags_start)
    for _ in range(n_channels):
        content += struct.pack("<H", bits)
    for number in range(len(strips)):
        content += struct.pack("<I", pixels_start + number * strip_length)
    for _ in strips:
        content += struct.pack("<I", strip_length)
    for strip in strips:
        content += strip.astype(values.dtype.newbyteorder("<")).tobytes()
    tags = [  # number, type (3: 16 bits, 4: 32 bits), length, and the value or where the list is
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, n_channels, bits_start),
        (259, 3, 1, 1),  # no compression
        (262, 3, 1, 2),  # RGB
        (273, 4, len(strips), starts_start),
        (277, 3, 1, n_channels),
        (278, 4, 1, rows_per_strip),
        (279, 4, len(strips), lengths_start),
        (284, 3, 1, planar_configuration),
    ]
    content += struct.pack("<H", len(tags))
    for tag in tags:
        content += struct.pack("<HHII", *tag)
    path.write_bytes(content + struct.pack("<I", 0))


WIDE_VALUES = np.random.default_rng(0).integers(0, 65536, (8, 4, 4), dtype=np.uint16)


def write_with_pillow(path: Path, values: np.ndarray) -> None:
    Image.fromarray(values).save(path)


@pytest.mark.parametrize(
    ("name", "write", "values"),
    [
        ("I16.png", write_with_pillow, WIDE_VALUES[..., 0]),
        ("I16.tif", write_with_pillow, WIDE_VALUES[..., 0]),
        ("I32.tif", write_with_pillow, WIDE_VALUES[..., 0].astype(np.int32)),
        ("F.tif", write_with_pillow, WIDE_VALUES[..., 0].astype(np.float32)),
        ("F_of_1.tif", write_with_pillow, np.ones((8, 4), np.float32)),
        ("L16.png", write_16_bit_png, WIDE_VALUES[..., :1]),
        ("LA16.png", write_16_bit_png, WIDE_VALUES[..., :2]),
        ("RGB16.png", write_16_bit_png, WIDE_VALUES[..., :3]),
        ("RGBA16.png", write_16_bit_png, WIDE_VALUES),
        ("RGB16.tif", write_tiff, WIDE_VALUES[..., :3]),
        ("RGB16_planar.tif", write_planar_tiff, WIDE_VALUES[..., :3]),
        ("RGB16_small.png", write_16_bit_png, WIDE_VALUES[..., :3] % 256),
    ],
)
def test_images_of_more_than_8_bits_are_an_error(tmp_path, name, write, values):
    """Pillow would clip them, or cut them off: thermal cameras write such images."""
    path = tmp_path / name
    write(path, values)
    with Image.open(path) as file:
        file.load()  # the file is sound
    with pytest.raises(InputError, match=rf"{name} .*8 bits"):
        data_loader.read_image(str(path), (8, 4))


@pytest.mark.parametrize("write", [write_tiff, write_planar_tiff])
def test_tiff_images_of_8_bits_are_read(tmp_path, write):
    values = WIDE_VALUES[..., :3].astype(np.uint8)
    write(tmp_path / "image.tif", values)
    pixels = data_loader.read_image(str(tmp_path / "image.tif"), (8, 4))
    np.testing.assert_array_equal(pixels, values)


def test_a_script_names_an_image_of_more_than_8_bits(regdb_tree, error_of, tmp_path):
    tree = shutil.copytree(regdb_tree, tmp_path / "RegDB")
    path = tree / "Thermal/2/person_t_0003.bmp"
    path.unlink()
    Image.fromarray(WIDE_VALUES[..., 0]).save(path, "PNG")  # the suffix does not count
    flags = ["--pretrained", "none", "--arch", "tiny", "--img-h", 96, "--img-w", 32, "--workers", 0]
    line = error_of(
        "test.py", "--dataset", "regdb", "--data-path", tree, "--log-path", tmp_path, *flags
    )
    assert str(path) in line
    assert "8 bits" in line


def test_training_transform_equals_torchvisions():
    images = np.random.default_rng(0).integers(0, 256, (5, 12, 8, 3), dtype=np.uint8)
    flip = torch.tensor([True, False, True, False, False])
    ours = to_input(torch.from_numpy(images), (12, 8), flip)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    tensors = torch.stack([to_tensor(image) for image in images])
    expected = normalize(tensors, IMAGENET_MEAN, IMAGENET_STD)
    torch.testing.assert_close(ours[~flip], expected[~flip], rtol=0, atol=1e-6)
    torch.testing.assert_close(ours[flip], hflip(expected[flip]), rtol=0, atol=1e-6)


def test_scaling_equals_pillows_bilinear():
    """Arrays of another size than --img-h x --img-w are scaled as by the original RectScale."""
    images = np.random.default_rng(0).integers(0, 256, (2, 48, 24, 3), dtype=np.uint8)
    normalised = to_input(torch.from_numpy(images), (20, 10)).permute(0, 2, 3, 1)
    ours = (normalised * torch.tensor(IMAGENET_STD) + torch.tensor(IMAGENET_MEAN)) * 255
    expected = []
    for image in images:
        scaled = Image.fromarray(image).resize((10, 20), Image.Resampling.BILINEAR)
        expected.append(np.asarray(scaled))
    np.testing.assert_allclose(ours.numpy(), np.stack(expected), atol=1.01)


# ---- sampler and batches ------------------------------------------------------------------------


def random_labels(rng: np.random.Generator, persons: int, least: int, most: int) -> np.ndarray:
    """Labels in random order, from ``least`` to ``most`` - 1 of each person."""
    return rng.permutation(np.arange(persons).repeat(rng.integers(least, most, persons)))


def check_one_modality(
    labels: np.ndarray, indices: np.ndarray, batch_size: int, per_img: int
) -> None:
    """In one modality persons are contiguous, distinct, and without repeated images."""
    for batch in indices.reshape(len(indices), -1, per_img):  # (persons, per_img)
        persons = labels[batch]
        assert (persons == persons[:, :1]).all()
        assert len(set(persons[:, 0])) == batch_size // per_img
        for images in batch:
            n_images = (labels == labels[images[0]]).sum()
            assert len(set(images)) == per_img or n_images < per_img


@pytest.mark.parametrize(
    ("batch_size", "per_img", "persons", "least"), [(32, 8, 20, 8), (8, 2, 5, 2), (12, 4, 5, 1)]
)
def test_sampler_properties(batch_size, per_img, persons, least, caplog):
    rng = np.random.default_rng(batch_size)
    visible = random_labels(rng, persons, least, 31)
    thermal = random_labels(rng, persons, least, 13)
    thermal = thermal[thermal > 0]  # person 0 was seen in one modality only, and is never drawn
    sampler = IdentitySampler(visible, thermal, batch_size, per_img, seed=5)
    steps = max(len(visible), len(thermal)) // batch_size + 1
    for epoch in (0, 1):
        visible_plan, thermal_plan = sampler.epoch(epoch)
        assert visible_plan.shape == thermal_plan.shape == (steps, batch_size)
        # Row by row the same person.
        np.testing.assert_array_equal(visible[visible_plan], thermal[thermal_plan])
        check_one_modality(visible, visible_plan, batch_size, per_img)
        check_one_modality(thermal, thermal_plan, batch_size, per_img)
    # Seed and epoch decide, and nothing else.
    plan, _ = sampler.epoch(0)
    np.testing.assert_array_equal(plan, sampler.epoch(0)[0])
    assert (plan != sampler.epoch(1)[0]).any()
    other_seed = IdentitySampler(visible, thermal, batch_size, per_img, seed=6)
    assert (plan != other_seed.epoch(0)[0]).any()
    assert ("some are repeated" in caplog.text) == (least < per_img)


def noise_set() -> TrainingSet:
    """24 images of 8 x 6 pixels in each modality, of four persons."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 6)
    visible = rng.integers(0, 256, (24, 8, 6, 3), dtype=np.uint8)
    thermal = rng.integers(0, 256, (24, 8, 6, 3), dtype=np.uint8)
    return TrainingSet(visible, thermal, labels, labels)


def noise_sampler(data: TrainingSet) -> IdentitySampler:
    return IdentitySampler(data.visible_labels, data.thermal_labels, 8, 2, seed=1)


def test_training_batches_follow_the_plan():
    """Each image is the one of the plan, or its mirror image; about half are mirrored."""
    data = noise_set()
    sampler = noise_sampler(data)
    batches = list(TrainBatches(data, sampler, (8, 6), CPU).epoch(2))
    visible_plan, thermal_plan = sampler.epoch(2)
    assert len(batches) == len(visible_plan) == 4
    n_mirrored = 0
    for step, (visible, thermal, visible_labels, thermal_labels) in enumerate(batches):
        modalities = (
            (data.visible, data.visible_labels, visible_plan[step], visible, visible_labels),
            (data.thermal, data.thermal_labels, thermal_plan[step], thermal, thermal_labels),
        )
        for images, labels, indices, batch, batch_labels in modalities:
            np.testing.assert_array_equal(batch_labels, labels[indices])
            plain = to_input(torch.from_numpy(images[indices]), (8, 6))
            is_plain = (batch == plain).flatten(1).all(1)
            is_mirrored = (batch == plain.flip(3)).flatten(1).all(1)
            assert (is_plain | is_mirrored).all()
            n_mirrored += int(is_mirrored.sum())
    assert 0.25 < n_mirrored / (4 * 2 * 8) < 0.75


def test_batches_are_the_same_from_host_and_device():
    data = noise_set()
    sampler = noise_sampler(data)
    on_host = TrainBatches(data, sampler, (8, 6), CPU, "host")
    on_device = TrainBatches(data, sampler, (8, 6), CPU, "device")
    for first, second in zip(on_host.epoch(2), on_device.epoch(2), strict=True):
        assert first[0].is_contiguous(memory_format=torch.channels_last)
        for tensor, other in zip(first, second, strict=True):
            assert torch.equal(tensor, other)


def test_ranks_together_have_the_whole_batch():
    data = noise_set()
    sampler = noise_sampler(data)
    whole = TrainBatches(data, sampler, (8, 6), CPU).epoch(3)
    first = TrainBatches(data, sampler, (8, 6), CPU, rank=0, world_size=2).epoch(3)
    second = TrainBatches(data, sampler, (8, 6), CPU, rank=1, world_size=2).epoch(3)
    for batch, rank_0, rank_1 in zip(whole, first, second, strict=True):
        for tensor, rows_0, rows_1 in zip(batch, rank_0, rank_1, strict=True):
            assert torch.equal(tensor, torch.cat([rows_0, rows_1]))
        # A person's images are on one rank.
        assert not set(rank_0[2].tolist()) & set(rank_1[2].tolist())
