"""The numbers that the original code computed (tests/golden), reproduced in float64.

The golden files have the original's names: "x" are pool5 features and "y" are fc features; modality
1 is visible, 2 is thermal, and 0 is both.
"""

import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import golden

from data_loader import IdentitySampler
from eval_metrics import Scores, eval_regdb, eval_sysu
from loss import Criterion, HeteroCenterLoss
from model import EmbedNet, to_device
from train import build_optimizer, learning_rate, set_learning_rate, train_step


def recipe(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weights of a golden network: each tensor has a generator, seeded with its name."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("running_var"):
        return 0.5 + rng.random(shape)
    if name.endswith("running_mean"):
        return 0.1 * rng.standard_normal(shape)
    if len(shape) == 1:
        return (1.0 if name.endswith("weight") else 0.0) + 0.1 * rng.standard_normal(shape)
    return rng.standard_normal(shape) * (2.0 / np.prod(shape[1:])) ** 0.5


def golden_net(arch: str, n_class: int) -> EmbedNet:
    net = to_device(EmbedNet(n_class, arch=arch, pretrained="none").double(), torch.device("cpu"))
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.from_numpy(recipe(name, tuple(tensor.shape))))
    return net


def close(actual, expected, rtol: float = 0.0, atol: float = 0.0):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=rtol, atol=atol)


# ---- evaluation ---------------------------------------------------------------------------------


def check_scores(scores: Scores, g: dict, case: str) -> None:
    expected = g[f"{case}_cmc"]
    assert len(scores.cmc) == 20
    close(scores.cmc[: len(expected)], expected, atol=1e-6)
    # Where the golden CMC is shorter, ours goes on with its last value (FIDELITY 13).
    close(scores.cmc[len(expected) :], expected[-1], atol=1e-6)
    close(scores.mAP, g[f"{case}_mAP"], atol=1e-10)


@pytest.mark.parametrize("case", "abcde")
def test_scores_of_sysu(case):
    g = golden("eval_sysu.npz")
    names = ("distmat", "q_pids", "g_pids", "q_camids", "g_camids")
    arrays = [g[f"{case}_{name}"] for name in names]
    check_scores(eval_sysu(*arrays), g, case)


@pytest.mark.parametrize("case", "abc")
def test_scores_of_regdb(case):
    g = golden("eval_regdb.npz")
    arrays = [g[f"{case}_{name}"] for name in ("distmat", "q_pids", "g_pids")]
    check_scores(eval_regdb(*arrays), g, case)


# ---- loss ---------------------------------------------------------------------------------------


def loss_inputs(kind: str, seed: int, n_persons: int, per_img: int) -> list[torch.Tensor]:
    """(N, 512) visible and thermal features of length 1, as the golden values were computed on."""
    rng = np.random.default_rng(seed)
    shape = (n_persons * per_img, 512)
    if kind == "iid":
        visible = rng.standard_normal(shape)
        thermal = rng.standard_normal(shape)
    else:
        visible_centers = rng.standard_normal((n_persons, 512))
        other_centers = rng.standard_normal((n_persons, 512))
        t = np.linspace(0, 1, n_persons)[:, None]
        thermal_centers = (1 - t) * visible_centers + t * other_centers
        visible = np.repeat(visible_centers, per_img, 0) + 0.5 * rng.standard_normal(shape)
        thermal = np.repeat(thermal_centers, per_img, 0) + 0.5 * rng.standard_normal(shape)
    inputs = []
    for features in (visible, thermal):
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        inputs.append(torch.tensor(features, requires_grad=True))
    return inputs


@pytest.mark.parametrize("case", range(72))
def test_hetero_center_loss(case):
    g = golden("hetero_loss.npz")
    n_persons = int(g["n_id"][case])
    per_img = int(g["per_id"][case])
    visible, thermal = loss_inputs(str(g["kind"][case]), int(g["seed"][case]), n_persons, per_img)
    labels = torch.arange(n_persons).repeat_interleave(per_img)
    loss = HeteroCenterLoss(float(g["margin"][case]), str(g["dist_type"][case]))
    value = loss(visible, thermal, labels, labels)
    value.backward()  # also where every person is within the margin (FIDELITY 18)
    close(value.item(), g["value"][case], atol=1e-10)
    close(visible.grad.norm(), g["grad1_fro"][case], atol=1e-10)
    close(thermal.grad.norm(), g["grad2_fro"][case], atol=1e-10)
    close(visible.grad[:, :8], g[f"grad1_head8_{case:03d}"], atol=1e-10)


# ---- network ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", golden("state_dict_keys.json"))
def test_state_dict_keys(variant):
    arch, n_class, drop = variant.split("_")
    net = EmbedNet(int(n_class[1:]), drop=float(drop[4:]), arch=arch, pretrained="none")
    parameters = dict(net.named_parameters())
    ours = []
    for name, tensor in net.state_dict().items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        kind = "param" if name in parameters else "buffer"
        ours.append([name, list(tensor.shape), dtype, kind])
    assert ours == golden("state_dict_keys.json")[variant]


def check_reductions(rows: np.ndarray, g: dict, prefix: str):
    """Each row against its stored sums, norm, first columns and random projection."""
    close(rows.sum(-1), g[f"{prefix}_sum"], atol=1e-9)
    close(np.abs(rows).sum(-1), g[f"{prefix}_abs_sum"], atol=1e-9)
    close(np.linalg.norm(rows, axis=-1), g[f"{prefix}_norm"], atol=1e-9)
    close(rows[..., :64], g[f"{prefix}_head64"], atol=1e-9)
    close(
        rows @ np.random.default_rng(99).standard_normal(rows.shape[-1]),
        g[f"{prefix}_proj"],
        atol=1e-9,
    )


@pytest.mark.parametrize(("arch", "seed"), [("resnet18", 401), ("resnet50", 402)])
def test_model_forward(arch, seed):
    g = golden(f"model_forward_{arch}.npz")
    rng = np.random.default_rng(seed)
    images = [torch.from_numpy(rng.standard_normal((n, 3, 288, 144))) for n in (2, 2, 4, 4)]
    visible, thermal, visible_training, thermal_training = images
    net = golden_net(arch, 10).eval()
    with torch.no_grad():
        embedded = {1: net(visible=visible), 2: net(thermal=thermal), 0: net(visible, thermal)}
        logits, feats = net.train()(visible_training, thermal_training)
    for modality in (1, 2):
        for name, rows in zip("xy", embedded[modality], strict=True):
            prefix = f"eval_modal{modality}_{name}"
            check_reductions(rows.numpy(), g, prefix)
            expected = g[f"{prefix}_parts16"].reshape(2, 6, 16)
            close(rows.reshape(2, 6, -1)[:, :, :16], expected, atol=1e-9)
    for name, rows in zip("xy", embedded[0], strict=True):
        projection = rows.numpy() @ np.random.default_rng(99).standard_normal(rows.shape[1])
        close(projection, g[f"eval_modal0_{name}_proj"], atol=1e-9)
    close(torch.stack(logits), g["train_logits"], atol=1e-9)
    check_reductions(torch.stack(feats).numpy(), g, "train_feats")
    buffers = dict(net.named_buffers())
    names = zip(g["bn_after_names"], g["bn_after_sum"], g["bn_after_l2"], strict=True)
    for name, total, norm in names:
        close(buffers[name].double().sum(), total, rtol=1e-9, atol=1e-9)
        close(buffers[name].double().norm(), norm, rtol=1e-9)


# ---- optimizer, schedule, trajectory, sampler ---------------------------------------------------


def test_learning_rate():
    g = golden("lr_schedule.npz")
    base_lr = float(g["lr_argument"])
    net = EmbedNet(2, arch="resnet18", pretrained="none")
    optimizer = build_optimizer(net, SimpleNamespace(lr=base_lr, optim="sgd"))
    for epoch, head_lr, backbone_lr in zip(g["epoch"], g["head_lr"], g["base_lr"], strict=True):
        set_learning_rate(optimizer, learning_rate(int(epoch), base_lr))
        rates = [group["lr"] for group in optimizer.param_groups]
        close(rates[0], backbone_lr, rtol=1e-12)
        close(rates[1:], np.full(12, head_lr), rtol=1e-12)


def test_param_groups():
    g = golden("param_groups_resnet18.json")
    net = EmbedNet(g["class_num"], arch="resnet18", pretrained="none")
    sgd = build_optimizer(net, SimpleNamespace(lr=g["lr"], optim="sgd"))
    name_of = {id(parameter): name for name, parameter in net.named_parameters()}
    names = []
    for group in sgd.param_groups:
        names.append([name_of[id(parameter)] for parameter in group["params"]])
    assert sorted(names[0]) == g["base_sorted"]
    assert names[1:] == g["head_groups_in_order"]
    for group, expected in zip(sgd.param_groups, g["group_hyperparameters"], strict=True):
        assert {key: group[key] for key in expected} == pytest.approx(expected)
    frozen = [name for name, parameter in net.named_parameters() if not parameter.requires_grad]
    assert sorted(frozen) == g["never_receives_gradient"]
    adam = build_optimizer(net, SimpleNamespace(lr=g["lr"], optim="adam"))
    assert isinstance(adam, torch.optim.Adam)
    for group, other in zip(sgd.param_groups, adam.param_groups, strict=True):
        assert all(group[key] == other[key] for key in ("params", "lr", "weight_decay"))


def test_training_trajectory():
    g = golden("train_traj_resnet18.npz")
    net = golden_net("resnet18", 6).train()
    optimizer = build_optimizer(net, SimpleNamespace(lr=0.008, optim="sgd"))
    criterion = Criterion(w_hc=0.6)
    for step in range(12):
        rng = np.random.default_rng(1000 + step)
        labels = torch.from_numpy(np.repeat(rng.permutation(6)[:2], 4))
        visible = torch.from_numpy(rng.standard_normal((8, 3, 96, 48)))
        thermal = torch.from_numpy(rng.standard_normal((8, 3, 96, 48)))
        batch = (visible, thermal, labels, labels)
        losses, _ = train_step(net, criterion, optimizer, batch)
        close(losses["CE"], g["ce"][step], atol=1e-8)
        close(losses["HC"], g["hc"][step], atol=1e-8)
        close(losses["loss"].mean(), g["loss"][step], atol=1e-8)
    state = net.state_dict()
    for name, total, norm in zip(g["final_names"], g["final_sum"], g["final_l2"], strict=True):
        close(state[name].double().norm(), norm, rtol=1e-8)
        close(state[name].double().sum(), total, atol=1e-7)
    for name, norm in zip(g["momentum_names"], g["momentum_l2"], strict=True):
        momentum = optimizer.state[net.get_parameter(name)]["momentum_buffer"]
        close(momentum.norm(), norm, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("case", "batch_size", "per_img"), [("main", 16, 4), ("b32p8", 32, 8)])
def test_sampler_draws_as_the_original(case, batch_size, per_img):
    """From one numpy stream over two epochs.

    The first batch is the one that the original code overwrites (FIDELITY 4).
    """
    g = golden("identity_sampler.npz")
    rng = np.random.RandomState(1)
    visible_labels = g[f"{case}_labels_visible"]
    thermal_labels = g[f"{case}_labels_thermal"]
    for epoch in (0, 1):
        sampler = IdentitySampler(visible_labels, thermal_labels, batch_size, per_img)
        for modality, indices in enumerate(sampler.draw(rng), 1):
            published = g[f"{case}_epoch{epoch}_index{modality}"]
            mended = g[f"{case}_epoch{epoch}_index{modality}_fixed"]
            np.testing.assert_array_equal(indices.ravel(), mended)
            np.testing.assert_array_equal(indices.ravel()[batch_size:], published[batch_size:])
    np.testing.assert_array_equal(rng.randint(0, 2**31 - 1, 4), g[f"{case}_rng_next_uint"])
