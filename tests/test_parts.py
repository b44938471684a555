"""The parts of a training, each against something simpler: pixels, batches, loss, network, a step, checkpoints."""

import contextlib
import hashlib
import os
import shutil
from types import SimpleNamespace

import numpy as np
import PIL
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import golden
from PIL import Image
from torchvision.transforms.functional import hflip, normalize, to_tensor

import data_loader
import data_manager
import model
import utils
from data_loader import IdentitySampler, ImageBatches, TrainBatches, TrainingSet, to_input
from data_manager import DATASETS, Split
from eval_metrics import extract_features
from loss import HeteroCenterLoss, loss_terms, person_centers, total
from model import EmbedNet, stripe_window
from train import build_optimizer, train_epoch, train_step

CPU = torch.device("cpu")
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation
ARGS = SimpleNamespace(w_hc=0.6, thd=0.0, dist_type="l2", lr=0.01, optim="sgd", amp="off", batch_size=8, epochs=0)


def tiny_net(n_class: int = 3, low_dim: int = 8, **options) -> EmbedNet:
    return EmbedNet(n_class, low_dim, arch="resnet18", pretrained="none", **options)


# ---- pixels ---------------------------------------------------------------------------------------------------------


def test_preprocessed_arrays(golden_tree, call, tmp_path):
    """To the bit on the Pillow that made the golden numbers; other decoders may differ by two grey levels."""
    tree = shutil.copytree(golden_tree, tmp_path / "SYSU-MM01")
    call("pre_process_sysu.py", "--data_path", tree)
    data = data_loader.load_training_set(DATASETS["sysu"], str(tree), 0, (288, 144), workers=0)
    assert data.n_class == 7 and not [*tree.glob("*.partial")]
    g = golden("sysu_preprocess.npz")
    for modality, images, labels in (("rgb", *data[::2]), ("ir", *data[1::2])):
        assert images.shape == tuple(g[f"{modality}_shape"]) and images.dtype == str(g[f"{modality}_dtype"])
        np.testing.assert_array_equal(labels, g[f"{modality}_label"])
        if PIL.__version__ == "13.0.0":
            assert hashlib.sha256(images.tobytes()).hexdigest() == str(g[f"{modality}_sha256"])
        np.testing.assert_allclose(images.mean((1, 2)), g[f"{modality}_channel_mean"], atol=0.5)
        np.testing.assert_allclose(images[:, :8, :8, 0], g[f"{modality}_corner8"].astype(int), atol=2)


def test_preprocessing_again_only_if_need_be(golden_tree, call, tmp_path):
    tree = shutil.copytree(golden_tree, tmp_path / "tree")

    def made(*flags) -> bool:
        before = {path.stat().st_mtime_ns for path in tree.glob("*.npy")}
        out = call("pre_process_sysu.py", "--data_path", tree, "--img_h", 24, "--img_w", 12, "--workers", 0, *flags)
        changed = before != {path.stat().st_mtime_ns for path in tree.glob("*.npy")}
        assert ("are replaced" in out) == (changed and bool(before))
        return changed

    assert made() and not made()
    assert made("--force") and made("--img_h", 32) and made()
    file = tree / "train_rgb_resized_img.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert made() and file.read_bytes() == whole
    os.utime(data_manager.sysu_train(str(tree))[1].paths[0], (2e9, 2e9))  # an image that is newer than the arrays
    assert made()


@pytest.mark.parametrize("workers", [0, 2])
def test_test_images(golden_tree, workers):
    """Of both modalities, mixed. torch's generator stays as it is, lest a test shift dropout."""
    lists, g = golden("sysu_lists.json"), golden("sysu_preprocess.npz")
    names = ("query_all", "gallery_all_single_first_call")
    paths, cams = (np.concatenate([lists[name][key] for name in names]) for key in ("paths", "cams"))
    order = np.random.default_rng(0).permutation(len(paths))
    thermal = np.isin(cams, (3, 6))[order]
    split = Split([str(golden_tree / path) for path in paths[order]], thermal * 0, thermal * 0, thermal)
    x, before = np.empty((len(paths), 3, 288, 144), np.float32), torch.get_rng_state()
    for modality, rows, images in ImageBatches(split, (288, 144), batch_size=4, workers=workers, device=CPU):
        assert (thermal[rows] == (modality == "thermal")).all()
        x[order[rows]] = images
    assert torch.equal(torch.get_rng_state(), before)
    means, corners = (np.concatenate([g[f"testdata_{name}_{key}"] for name in names]) for key in ("mean", "corner4"))
    np.testing.assert_allclose(x.mean((2, 3)), means, atol=0.01)
    np.testing.assert_allclose(x[:, :, :4, :4], corners, atol=2 / 255 / 0.22)


@pytest.mark.parametrize(("mode", "name"), [("L", "a.bmp"), ("P", "b.png"), ("RGBA", "c.png"), ("CMYK", "d.jpg")])
def test_images_of_any_mode_are_read_as_rgb(tmp_path, mode, name):
    Image.new(mode, (20, 40)).save(tmp_path / name)
    assert data_loader.read_image(str(tmp_path / name), (96, 32)).shape == (96, 32, 3)


def test_training_transform_equals_torchvisions():
    images = np.random.default_rng(0).integers(0, 256, (5, 12, 8, 3), dtype=np.uint8)
    flip = torch.tensor([True, False, True, False, False])
    ours = to_input(torch.from_numpy(images), (12, 8), flip)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    expected = normalize(torch.stack([to_tensor(image) for image in images]), *IMAGENET)
    torch.testing.assert_close(ours[~flip], expected[~flip], rtol=0, atol=1e-6)
    torch.testing.assert_close(ours[flip], hflip(expected[flip]), rtol=0, atol=1e-6)


def test_scaling_equals_pillows_bilinear():
    """Arrays of another size than --img_h x --img_w are scaled as the published RectScale does."""
    images = np.random.default_rng(0).integers(0, 256, (2, 48, 24, 3), dtype=np.uint8)
    mean, std = map(torch.tensor, IMAGENET)
    ours = (to_input(torch.from_numpy(images), (20, 10)).permute(0, 2, 3, 1) * std + mean) * 255
    expected = np.stack([np.asarray(Image.fromarray(i).resize((10, 20), Image.Resampling.BILINEAR)) for i in images])
    np.testing.assert_allclose(ours.numpy(), expected, atol=1.01)


# ---- sampler and batches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "per_img", "persons", "least"), [(32, 8, 20, 8), (8, 2, 5, 2), (12, 4, 5, 1)])
def test_sampler_properties(batch_size, per_img, persons, least, caplog):
    rng, everyone = np.random.default_rng(batch_size), np.arange(persons)
    visible, thermal = (rng.permutation(everyone.repeat(rng.integers(least, most, persons))) for most in (31, 13))
    thermal = thermal[thermal > 0]  # nobody can be drawn who was seen in one modality only
    sampler = IdentitySampler(visible, thermal, batch_size, per_img, seed=5)
    plans = [sampler.epoch(epoch) for epoch in (0, 1, 0)]
    for v, t in plans:
        assert v.shape == t.shape == (max(len(visible), len(thermal)) // batch_size + 1, batch_size)
        np.testing.assert_array_equal(visible[v], thermal[t])  # row by row the same person
        for labels, plan in ((visible, v), (thermal, t)):
            for batch in plan.reshape(len(plan), -1, per_img):  # (persons, per_img): rows are contiguous
                assert (labels[batch] == labels[batch[:, :1]]).all()
                assert len({*labels[batch[:, 0]]}) == batch_size // per_img  # distinct persons
                for rows in batch:
                    assert len({*rows}) == per_img or (labels == labels[rows[0]]).sum() < per_img
    np.testing.assert_array_equal(plans[0], plans[2])  # the same (seed, epoch), the same plan
    assert (plans[0][0] != plans[1][0]).any()
    assert (IdentitySampler(visible, thermal, batch_size, per_img, seed=6).epoch(0)[0] != plans[0][0]).any()
    assert ("theirs are repeated" in caplog.text) == (least < per_img)


def test_training_batches_follow_the_plan():
    rng, labels = np.random.default_rng(0), np.repeat(np.arange(4), 6)
    images = [rng.integers(0, 256, (24, 8, 6, 3), dtype=np.uint8) for _ in range(2)]
    data = TrainingSet(*images, labels, labels)
    sampler = IdentitySampler(labels, labels, batch_size=8, per_img=2, seed=1)
    on_host, on_device = ([*TrainBatches(data, sampler, (8, 6), CPU, cache).epoch(2)] for cache in ("host", "device"))
    flipped = 0
    for plan, batch in zip(np.stack(sampler.epoch(2), axis=1), on_host, strict=True):
        for images_of, rows, x, batch_labels in zip(images, plan, batch[:2], batch[2:], strict=True):
            np.testing.assert_array_equal(batch_labels, labels[rows])
            plain = to_input(torch.from_numpy(images_of[rows]), (8, 6))
            same, mirrored = ((x == other).flatten(1).all(1) for other in (plain, plain.flip(3)))
            assert (same | mirrored).all()
            flipped += mirrored.sum()
    assert 0.25 < flipped / (2 * 4 * 8) < 0.75
    for first, again in zip(on_host, on_device, strict=True):
        assert all(map(torch.equal, first, again))
        assert first[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(next(TrainBatches(data, sampler, (8, 6), CPU).epoch(2, start=2))[0], on_host[2][0])


# ---- loss -----------------------------------------------------------------------------------------------------------


def test_loss_by_hand_with_unequal_numbers_of_rows():
    visible, persons = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]]), torch.tensor([4, 4, 9])
    thermal = torch.tensor([[0.0, 4.0], [2.0, 1.0]])  # of person 9, of person 4
    centers = person_centers(torch.stack([visible, 2 * visible]), persons, torch.tensor([9, 4]))  # of two stripes
    assert centers.tolist() == [[[0, 5], [2, 0]], [[0, 10], [4, 0]]]
    value = HeteroCenterLoss(0.25)(visible, thermal, persons, torch.tensor([9, 4]))
    assert value.item() == pytest.approx((1 - 0.25) + (1 - 0.25))


def test_loss_at_its_edges():
    x, labels = torch.randn(4, 3), torch.tensor([0, 0, 1, 1])
    assert HeteroCenterLoss()(x * torch.nan, x, labels, labels).isnan()
    for others in (labels + 1, torch.zeros(4, dtype=int)):  # a person without infrared rows
        assert HeteroCenterLoss()(x, x, labels, others).isnan()


# ---- network --------------------------------------------------------------------------------------------------------


def test_a_new_network():
    net = tiny_net(200, low_dim=256)
    visible, thermal = net.visible_net["visible"], net.thermal_net["thermal"]
    for a, b in zip(visible.parameters(), thermal.parameters(), strict=True):  # start alike, and are not shared
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()
    linear, norm, classify = net.feature3.feat_block[0], net.feature3.feat_block[1], net.classifier3.classifier[1]
    assert linear.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.02)  # Kaiming, fan-out
    assert (norm.weight.mean().item(), norm.weight.std().item()) == pytest.approx((1, 0.01), rel=0.2)
    assert classify.weight.std().item() == pytest.approx(0.001, rel=0.02)
    assert not any(layer.bias.any() for layer in (linear, norm, classify))


def test_pretrained_file(tmp_path):
    resnet, file = torchvision.models.resnet18(weights=None), tmp_path / "resnet18.pth"
    torch.save(resnet.state_dict(), file)
    net = EmbedNet(3, arch="resnet18", pretrained=str(file))
    assert torch.equal(net.thermal_net["thermal"].layer3[0].conv1.weight, resnet.layer3[0].conv1.weight)
    with pytest.raises(OSError, match=r"resnet18\.pth .*resnet50 weights"):
        EmbedNet(3, arch="resnet50", pretrained=str(file))


def test_other_numbers_of_stripes_and_no_epsilon():
    net = tiny_net(num_parts=4).eval()
    assert net(torch.randn(1, 3, 49, 32))[1].shape == (1, 8 * 4)
    with pytest.raises(ValueError, match="nothing to embed"):
        net()
    tiny = 1e-15 * torch.randn(4, 8, dtype=torch.float64)
    torch.testing.assert_close(model._l2_normalise(tiny).norm(dim=1), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize(("height", "window"), [(6, (1, 1)), (7, (2, 1)), (11, (6, 1)), (18, (3, 3)), (20, (5, 3))])
def test_stripes_overlap_where_six_does_not_divide_the_height(height, window):
    """The published pooling: an average pool of height H - 5 s, moved by s = H // 6 (FIDELITY 20)."""
    assert stripe_window(height) == window
    x = torch.randn(2, 5, height, 3, dtype=torch.float64)
    pooled = F.avg_pool2d(x, kernel_size=(window[0], 3), stride=(window[1], 3))
    torch.testing.assert_close(torch.stack(model._stripes(x, 6), dim=2), pooled[..., 0], rtol=0, atol=1e-12)


def test_features_come_in_order():
    """With --flip: the mean with those of the mirror image, each stripe of length 1 again."""
    net, x = tiny_net(), torch.randn(5, 3, 96, 32)
    batches = [("thermal", np.array(rows), x[rows]) for rows in ([4, 1], [0, 2, 3])]
    features, flipped = extract_features(net, batches, 5), extract_features(net, batches, 5, ("fc",), flip=True)
    assert net.training and [*flipped] == ["fc"]
    with torch.no_grad():
        pool5, fc = net.eval()(thermal=x)
        stripes = (fc + net(thermal=torch.from_numpy(x.numpy()[..., ::-1].copy()))[1]).view(5, 6, 8)
    np.testing.assert_allclose(features["pool5"], pool5, atol=1e-5)
    np.testing.assert_allclose(features["fc"], fc, atol=1e-5)
    np.testing.assert_allclose(flipped["fc"], (stripes / stripes.norm(dim=2, keepdim=True)).flatten(1), atol=1e-5)


# ---- a training step ------------------------------------------------------------------------------------------------


def step(precision=torch.float32, memory_format=torch.contiguous_format, backend=None, amp=None):
    """Losses of one training step, and what it adds to a weight."""
    torch.manual_seed(0)
    net = tiny_net(4, low_dim=16).to(precision, memory_format=memory_format).train()
    rng = torch.Generator().manual_seed(1)
    images = (torch.randn(4, 3, 96, 32, generator=rng).to(precision, memory_format=memory_format) for _ in range(2))
    labels = torch.arange(2).repeat_interleave(2)
    call = torch.compile(net, backend=backend, fullgraph=True) if backend else net
    weight = net.feature1.feat_block[0].weight
    before = weight.detach().clone()
    losses, _ = train_step(call, build_optimizer(net, ARGS), (*images, labels, labels), loss_terms(ARGS), amp)
    assert {value.dtype for value in losses.values()} == {precision}  # whatever the network computes in
    return torch.stack([*losses.values()]).double(), (weight.detach() - before).double()


def test_what_is_faster_changes_no_value():
    """Memory format, fused update and graph capture stay within rounding; bfloat16, of 8 bits, within a fifth."""
    exact = step(torch.float64)
    for options, tolerance in (
        ({}, 1e-4),
        ({"memory_format": torch.channels_last}, 1e-4),
        ({"backend": "eager"}, 1e-4),  # in one graph, without breaks
        ({"memory_format": torch.channels_last, "amp": torch.bfloat16}, 0.2),
    ):
        losses, change = step(**options)
        np.testing.assert_allclose(losses, exact[0], rtol=tolerance)
        assert (change - exact[1]).norm() / exact[1].norm() < tolerance


def test_a_further_term_is_trained_with():
    """One more entry in the list of terms: its loss is there by name, its gradient with its weight."""
    ce, hc = loss_terms(ARGS)
    terms = [ce, hc, ce._replace(name="back", weight=-1.0)]  # takes away what alone trains the classifiers
    assert total(terms, {"CE": 2.0, "HC": 10.0, "back": 1.5}) == pytest.approx(2 + 0.6 * 10 - 1.5)
    net, labels = tiny_net().train(), torch.tensor([0, 0, 2, 2])
    losses, _ = train_step(net, build_optimizer(net, ARGS), (*torch.randn(2, 4, 3, 96, 32), labels, labels), terms)
    assert [*losses] == ["CE", "HC", "back"] and torch.equal(losses["CE"], losses["back"])
    for classify, head in zip(net.classifiers, net.heads, strict=True):
        assert not any(parameter.grad.any() for parameter in classify.parameters())
        assert all(parameter.grad.any() for parameter in head.parameters())


def test_an_epoch_reads_nothing_from_the_device(monkeypatch):
    """On torch's "meta" device, which stands for a GPU: its tensors hold no values, so that whatever would wait for one
    raises. Copies to the device pass unnoticed.
    """
    plain, device = torch.optim.SGD, torch.device("meta")  # neither fused updates nor autocast know it
    monkeypatch.setattr(torch.optim, "SGD", lambda groups, fused, **options: plain(groups, **options))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    images, labels = np.zeros((16, 96, 32, 3), np.uint8), np.repeat(np.arange(4), 4)
    sampler = IdentitySampler(labels, labels, batch_size=8, per_img=4)
    batches = TrainBatches(TrainingSet(images, images, labels, labels), sampler, (96, 32), device, "device")
    with device:
        net = tiny_net(4, drop=0.5)
    parts = {"optimizer": build_optimizer(net, ARGS), "terms": loss_terms(ARGS), "scaler": None}
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    run = SimpleNamespace(
        args=ARGS, net=net, wrapped_net=net, **parts, sums=sums, step=0, rank=0, means=dict, after_step=lambda: 0
    )
    train_epoch(run, batches, 0)  # all but the look at the means, which is there once a second
    assert run.step == 3
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        run.sums.tolist()


def test_a_first_step_that_overflows_leaves_weights_and_momentum():
    """As --amp fp16 may, whose scale starts high: the step is left out, and momentum is not what memory held before."""
    net = tiny_net().train()
    optimizer = build_optimizer(net, ARGS)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    images, labels = torch.randn(2, 4, 3, 96, 32), torch.tensor([0, 0, 1, 1])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    train_step(net, optimizer, (*images, labels, labels), loss_terms(ARGS), scaler=scaler)
    assert scaler.get_scale() == 2.0**126
    assert all(map(torch.equal, before, net.parameters()))
    assert not any(state["momentum_buffer"].any() for state in optimizer.state.values())


def test_device(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    hint = "2 of 3 GPUs can share this: torchrun --nproc_per_node=2"  # of the four persons of a batch
    for count, device, said in ((0, "cpu", "no GPU"), (1, "cuda:0", "there is no GPU 1"), (3, "cuda:1", hint)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda count=count: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert utils.select_device(1, 4) == torch.device(device) and said in caplog.text
