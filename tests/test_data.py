"""From the disk to the batch: lists, pixels, the identity sampler and the transforms."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from conftest import ROOT, succeed
from PIL import Image
from torchvision.transforms import v2

import data_loader
import data_manager
from data_loader import IdentitySampler, ImageBatches, TrainBatches, TrainingSet, to_input

LISTS = json.loads((ROOT / "tests/golden/sysu_lists.json").read_text())
CPU = torch.device("cpu")


def relative(split: data_manager.Split, root: Path) -> dict[str, list]:
    paths = [Path(path).relative_to(root).as_posix() for path in split.paths]
    return {"paths": paths, "ids": split.pids.tolist(), "cams": split.camids.tolist()}


# ---- lists ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["all", "indoor"])
def test_sysu_query_is_the_published_list(golden_tree, mode):
    assert relative(data_manager.sysu_query(str(golden_tree), mode), golden_tree) == LISTS[f"query_{mode}"]


@pytest.mark.parametrize("mode", ["all", "indoor"])
@pytest.mark.parametrize("shots", ["single", "multi"])
def test_sysu_gallery_of_trial_1_is_the_published_draw_from_seed_1(golden_tree, mode, shots):
    gallery = data_manager.sysu_gallery(str(golden_tree), mode, shots, trial=1)
    assert relative(gallery, golden_tree) == LISTS[f"gallery_{mode}_{shots}_first_call"]


def test_sysu_gallery_depends_on_the_trial_alone(golden_tree):
    first = data_manager.sysu_gallery(str(golden_tree), trial=3)
    np.random.seed(99)
    assert data_manager.sysu_gallery(str(golden_tree), trial=3).paths == first.paths
    assert data_manager.sysu_gallery(str(golden_tree), trial=4).paths != first.paths


def test_multi_shot_takes_what_there_is(sysu_tree, caplog):
    gallery = data_manager.sysu_gallery(str(sysu_tree), "all", "multi")
    for pid, cam in {*zip(gallery.pids.tolist(), gallery.camids.tolist(), strict=True)}:
        files = [*(sysu_tree / f"cam{cam}" / f"{pid:04d}").iterdir()]
        picked = [p for p in gallery.paths if Path(p).parent == files[0].parent]
        assert len(files) < 10 and sorted(picked) == sorted(map(str, files))
    assert caplog.text.count("fewer than ten images") == 1


def test_sysu_train_lists_and_labels(golden_tree):
    expected = LISTS["preprocess"]
    visible, thermal = data_manager.sysu_train(str(golden_tree))
    assert relative(visible, golden_tree)["paths"] == expected["train_rgb_paths"]
    assert relative(thermal, golden_tree)["paths"] == expected["train_ir_paths"]
    labels = dict(zip(visible.pids.tolist(), data_manager.relabel(visible.pids).tolist(), strict=True))
    assert labels == {int(pid): label for pid, label in expected["pid2label_if_sorted"].items()}


def test_stray_files_and_persons_of_one_modality(golden_tree, tmp_path, caplog):
    tree = tmp_path / "tree"
    shutil.copytree(golden_tree, tree)
    for stray in ("cam1/0002/Thumbs.db", "cam1/0002/._0001.jpg", "cam3/0002/notes.txt", "cam2/readme.txt"):
        (tree / stray).parent.mkdir(exist_ok=True)
        (tree / stray).write_text("not an image")
    before = data_manager.sysu_train(str(golden_tree))
    assert [relative(s, tree) for s in data_manager.sysu_train(str(tree))] == [relative(s, golden_tree) for s in before]
    for cam in (3, 6):
        shutil.rmtree(tree / f"cam{cam}" / "0006", ignore_errors=True)
    visible, thermal = data_manager.sysu_train(str(tree))
    assert set(visible.pids) == set(thermal.pids) == set(before[0].pids) - {6}
    assert "one modality only: persons 6" in caplog.text


def test_regdb_lists(regdb_tree):
    for trial in (1, 10):
        train, test = (data_manager.regdb_split(str(regdb_tree), trial, "visible", s) for s in ("train", "test"))
        assert len(train.paths) == len(test.paths) == 40 and not set(train.paths) & set(test.paths)
        lines = (regdb_tree / f"idx/train_visible_{trial}.txt").read_text().splitlines()
        pairs = zip(relative(train, regdb_tree)["paths"], train.pids, strict=True)
        assert [f"{path} {pid}" for path, pid in pairs] == lines
    thermal = data_manager.regdb_split(str(regdb_tree), 1, "thermal", "test")
    assert set(thermal.camids) == {2} and all("Thermal" in path for path in thermal.paths)


# ---- pixels ---------------------------------------------------------------------------------------------------------


def check_pixels(pixels: np.ndarray, sha256: str):
    """To the bit on the Pillow that made the golden numbers; the callers allow other decoders two grey levels."""
    if PIL.__version__ == "13.0.0":
        assert hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest() == sha256


def test_preprocessed_arrays(golden_tree, tmp_path):
    tree = tmp_path / "SYSU-MM01"
    shutil.copytree(golden_tree, tree)
    succeed("pre_process_sysu.py", "--data_path", tree)
    with np.load(ROOT / "tests/golden/sysu_preprocess.npz") as g:
        for modality in ("rgb", "ir"):
            images, labels = (np.load(path) for path in data_loader.sysu_arrays(str(tree), modality))
            assert images.shape == tuple(g[f"{modality}_shape"]) and images.dtype == str(g[f"{modality}_dtype"])
            np.testing.assert_array_equal(labels, g[f"{modality}_label"])
            check_pixels(images, str(g[f"{modality}_sha256"]))
            np.testing.assert_allclose(images.mean((1, 2)), g[f"{modality}_channel_mean"], atol=0.5)
            np.testing.assert_allclose(images.std((1, 2)), g[f"{modality}_channel_std"], atol=0.5)
            corner = images[:, :8, :8, 0].astype(int)
            np.testing.assert_allclose(corner, g[f"{modality}_corner8"].astype(int), atol=2)
    assert data_loader.load_sysu(str(tree)).n_class == 7
    assert not [*tree.glob("*.partial")]


def test_preprocessing_again_only_if_need_be(golden_tree, call, tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(golden_tree, tree, ignore=shutil.ignore_patterns("*.npy"))

    def made(*flags) -> bool:
        """Whether a run made arrays; they are always whole."""
        before = [path.stat().st_mtime_ns for path in sorted(tree.glob("*.npy"))]
        call("pre_process_sysu.py", "--data_path", tree, "--img_h", 24, "--img_w", 12, *flags)
        after = [path.stat().st_mtime_ns for path in sorted(tree.glob("*.npy"))]
        assert len(after) == 4 and len([*tree.glob("*.npy*")]) == 4
        return before != after

    assert made() and not made()
    assert made("--force") and made("--img_h", 32) and made()
    images = np.load(tree / "train_rgb_resized_img.npy")
    (tree / "train_rgb_resized_img.npy").write_bytes((tree / "train_rgb_resized_img.npy").read_bytes()[:-1])
    assert made() and np.array_equal(np.load(tree / "train_rgb_resized_img.npy"), images)
    os.utime(data_manager.sysu_train(str(tree))[1].paths[0], (2e9, 2e9))  # an image that is newer than the arrays
    assert made()


@pytest.mark.parametrize("name", ["query_all", "gallery_all_single_first_call"])
def test_test_images(golden_tree, name):
    paths = [str(golden_tree / path) for path in LISTS[name]["paths"]]
    split = data_manager.Split(paths, np.zeros(len(paths), int), np.array(LISTS[name]["cams"]))
    x = np.empty((len(paths), 3, 288, 144), np.float32)
    for modality, rows, images in ImageBatches(split, (3, 6), (288, 144), batch_size=4, workers=2, device=CPU):
        assert {modality} == {"thermal" if cam in (3, 6) else "visible" for cam in split.camids[rows]}
        x[rows] = images
    with np.load(ROOT / "tests/golden/sysu_preprocess.npz") as g:
        assert x.shape == tuple(g[f"testdata_{name}_shape"])
        np.testing.assert_allclose(x.mean((2, 3)), g[f"testdata_{name}_mean"], atol=0.01)
        np.testing.assert_allclose(x.std((2, 3)), g[f"testdata_{name}_std"], atol=0.01)
        np.testing.assert_allclose(x[:, :, :4, :4], g[f"testdata_{name}_corner4"], atol=2 / 255 / 0.22)


# ---- transforms -----------------------------------------------------------------------------------------------------


def reference_transform(image: np.ndarray, flip: bool) -> torch.Tensor:
    """One (h, w, 3) image through torchvision: [0, 1], mirror, ImageNet mean and standard deviation."""
    steps = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.RandomHorizontalFlip(float(flip))]
    return v2.Compose([*steps, v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])(image)


def test_training_transform_equals_torchvisions():
    images = np.random.default_rng(0).integers(0, 256, (5, 12, 8, 3), dtype=np.uint8)
    flip = torch.tensor([True, False, True, False, False])
    ours = to_input(torch.from_numpy(images), (12, 8), flip)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    expected = torch.stack([reference_transform(i, f) for i, f in zip(images, flip.tolist(), strict=True)])
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def test_scaling_equals_pillows_bilinear():
    """Arrays of another size than --img_h x --img_w are scaled as the published RectScale does."""
    images = np.random.default_rng(0).integers(0, 256, (2, 48, 24, 3), dtype=np.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    ours = (to_input(torch.from_numpy(images), (20, 10)).permute(0, 2, 3, 1) * std + mean) * 255
    expected = np.stack([np.asarray(Image.fromarray(i).resize((10, 20), Image.Resampling.BILINEAR)) for i in images])
    np.testing.assert_allclose(ours.numpy(), expected, atol=1.01)


# ---- sampler and batches --------------------------------------------------------------------------------------------


def random_labels(rng: np.random.Generator, persons: int, least: int, most: int) -> np.ndarray:
    return rng.permutation(np.repeat(np.arange(persons), rng.integers(least, most + 1, persons)))


@pytest.mark.parametrize(("batch_size", "per_img", "persons", "least"), [(32, 8, 20, 8), (8, 2, 4, 2), (12, 4, 5, 1)])
def test_sampler_properties(batch_size, per_img, persons, least, caplog):
    rng = np.random.default_rng(batch_size)
    visible, thermal = random_labels(rng, persons, least, 30), random_labels(rng, persons, least, 12)
    sampler = IdentitySampler(visible, thermal, batch_size, per_img, seed=5)
    plans = [sampler.epoch(epoch) for epoch in (0, 1, 0)]
    for v, t in plans:
        assert v.shape == t.shape == (max(len(visible), len(thermal)) // batch_size + 1, batch_size)
        np.testing.assert_array_equal(visible[v], thermal[t])  # row by row the same person
        for labels, plan in ((visible, v), (thermal, t)):
            for batch in plan:
                rows_of = [batch[i : i + per_img] for i in range(0, batch_size, per_img)]  # contiguous
                shown = [set(labels[rows].tolist()) for rows in rows_of]
                assert all(len(persons_shown) == 1 for persons_shown in shown)
                assert len(set.union(*shown)) == batch_size // per_img  # distinct persons
                for rows in rows_of:
                    enough = (labels == labels[rows[0]]).sum() >= per_img
                    assert len(set(rows.tolist())) == per_img or not enough
    np.testing.assert_array_equal(plans[0], plans[2])  # the same (seed, epoch), the same plan
    assert (plans[0][0] != plans[1][0]).any()
    assert (IdentitySampler(visible, thermal, batch_size, per_img, seed=6).epoch(0)[0] != plans[0][0]).any()
    assert ("theirs are repeated" in caplog.text) == (least < per_img)


def test_sampler_leaves_out_persons_of_one_modality():
    sampler = IdentitySampler(np.array([0, 0, 1, 1, 2, 2]), np.array([0, 0, 2, 2]), batch_size=4, per_img=2)
    visible, _ = sampler.epoch(0)
    assert not np.isin(visible, (2, 3)).any()


def test_sampler_refuses_what_it_cannot_do():
    labels = np.repeat(np.arange(3), 4)
    with pytest.raises(ValueError, match="not a multiple"):
        IdentitySampler(labels, labels, batch_size=10, per_img=4)
    with pytest.raises(ValueError, match="needs 4 persons"):
        IdentitySampler(labels, labels, batch_size=8, per_img=2)


def test_training_batches_follow_the_plan():
    rng, labels = np.random.default_rng(0), np.repeat(np.arange(4), 6)
    images = [rng.integers(0, 256, (24, 8, 6, 3), dtype=np.uint8) for _ in range(2)]
    data = TrainingSet(*images, labels, labels)
    sampler = IdentitySampler(labels, labels, batch_size=8, per_img=2, seed=1)
    batches = TrainBatches(data, sampler, (8, 6), CPU)
    flipped = 0
    for plan_v, plan_t, batch in zip(*sampler.epoch(2), batches.epoch(2), strict=True):
        for images_of, plan, x, batch_labels in zip(images, (plan_v, plan_t), batch[:2], batch[2:], strict=True):
            np.testing.assert_array_equal(batch_labels, labels[plan])
            for image, row in zip(images_of[plan], x, strict=True):
                mirrored = torch.equal(row, to_input(torch.from_numpy(image[None]), (8, 6), torch.tensor([True]))[0])
                assert mirrored or torch.equal(row, to_input(torch.from_numpy(image[None]), (8, 6))[0])
                flipped += mirrored
    assert 0.25 < flipped / (2 * 4 * 8) < 0.75
    for first, again in zip(batches.epoch(2), TrainBatches(data, sampler, (8, 6), CPU, "device").epoch(2), strict=True):
        assert all(map(torch.equal, first, again))
        assert first[0].is_contiguous(memory_format=torch.channels_last)
