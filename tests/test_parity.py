"""The numbers of the published implementation (tests/golden), reproduced in float64."""

import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import golden

from data_loader import IdentitySampler
from eval_metrics import eval_regdb, eval_sysu
from loss import HeteroCenterLoss, loss_terms
from loss import total as total_loss
from model import EmbedNet, to_device
from train import build_optimizer, learning_rate, train_step


def recipe(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weights of every golden network: a generator of its own for each tensor, seeded with its name."""
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


# ---- evaluation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("evaluate", "case"), [*((eval_sysu, case) for case in "abcde"), *((eval_regdb, case) for case in "abc")]
)
def test_scores(evaluate, case):
    g, lists = golden(f"{evaluate.__name__}.npz"), ("distmat", "q_pids", "g_pids", "q_camids", "g_camids")
    scores = evaluate(*(g[f"{case}_{name}"] for name in lists[: 5 if evaluate is eval_sysu else 3]))
    expected = g[f"{case}_cmc"]
    assert len(scores.cmc) == 20
    close(scores.cmc[: len(expected)], expected, atol=1e-6)
    close(scores.cmc[len(expected) :], expected[-1], atol=1e-6)  # FIDELITY 13: padded where the golden CMC is short
    close(scores.mAP, g[f"{case}_mAP"], atol=1e-10)


# ---- loss -----------------------------------------------------------------------------------------------------------


def loss_inputs(kind: str, seed: int, n_id: int, per_id: int) -> list[torch.Tensor]:
    rng, n, dim = np.random.default_rng(seed), n_id * per_id, 512
    if kind == "iid":
        pair = rng.standard_normal((n, dim)), rng.standard_normal((n, dim))
    else:
        u, v = rng.standard_normal((n_id, dim)), rng.standard_normal((n_id, dim))
        t = np.linspace(0, 1, n_id)[:, None]
        pair = (
            np.repeat(u, per_id, 0) + 0.5 * rng.standard_normal((n, dim)),
            np.repeat((1 - t) * u + t * v, per_id, 0) + 0.5 * rng.standard_normal((n, dim)),
        )
    return [torch.tensor(f / np.linalg.norm(f, axis=1, keepdims=True), requires_grad=True) for f in pair]


@pytest.mark.parametrize("case", range(72))
def test_hetero_center_loss(case):
    g = golden("hetero_loss.npz")
    kind, seed, n_id, per_id = (g[name][case] for name in ("kind", "seed", "n_id", "per_id"))
    visible, thermal = loss_inputs(str(kind), int(seed), int(n_id), int(per_id))
    labels = torch.arange(int(n_id)).repeat_interleave(int(per_id))
    value = HeteroCenterLoss(float(g["margin"][case]), str(g["dist_type"][case]))(visible, thermal, labels, labels)
    value.backward()  # also where every person is within the margin (FIDELITY 18)
    close(value.item(), g["value"][case], atol=1e-10)
    close(visible.grad.norm(), g["grad1_fro"][case], atol=1e-10)
    close(thermal.grad.norm(), g["grad2_fro"][case], atol=1e-10)
    close(visible.grad[:, :8], g[f"grad1_head8_{case:03d}"], atol=1e-10)


# ---- network --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", golden("state_dict_keys.json"))
def test_state_dict_keys(variant):
    arch, n_class, drop = variant.split("_")
    net = EmbedNet(int(n_class[1:]), drop=float(drop[4:]), arch=arch, pretrained="none")
    parameters = dict(net.named_parameters())
    ours = [
        [name, list(t.shape), str(t.dtype).removeprefix("torch."), "param" if name in parameters else "buffer"]
        for name, t in net.state_dict().items()
    ]
    assert ours == golden("state_dict_keys.json")[variant]


def check_reductions(rows: np.ndarray, g: dict, prefix: str):
    """Each row against its stored sums, norm, first columns of the row and of each part, and a random projection."""
    close(rows.sum(-1), g[f"{prefix}_sum"], atol=1e-9)
    close(np.abs(rows).sum(-1), g[f"{prefix}_abs_sum"], atol=1e-9)
    close(np.linalg.norm(rows, axis=-1), g[f"{prefix}_norm"], atol=1e-9)
    close(rows[..., :64], g[f"{prefix}_head64"], atol=1e-9)
    close(rows @ np.random.default_rng(99).standard_normal(rows.shape[-1]), g[f"{prefix}_proj"], atol=1e-9)


@pytest.mark.parametrize(("arch", "seed"), [("resnet18", 401), ("resnet50", 402)])
def test_model_forward(arch, seed):
    g, rng = golden(f"model_forward_{arch}.npz"), np.random.default_rng(seed)
    x1, x2, t1, t2 = (torch.from_numpy(rng.standard_normal((n, 3, 288, 144))) for n in (2, 2, 4, 4))
    net = golden_net(arch, 10).eval()
    with torch.no_grad():
        for modal, embedded in ((1, net(visible=x1)), (2, net(thermal=x2))):
            for name, rows in zip("xy", embedded, strict=True):
                prefix = f"eval_modal{modal}_{name}"
                check_reductions(rows.numpy(), g, prefix)
                close(rows.reshape(2, 6, -1)[:, :, :16], g[f"{prefix}_parts16"].reshape(2, 6, 16), atol=1e-9)
        for name, rows in zip("xy", net(x1, x2), strict=True):
            projection = rows.numpy() @ np.random.default_rng(99).standard_normal(rows.shape[1])
            close(projection, g[f"eval_modal0_{name}_proj"], atol=1e-9)
        logits, feats = net.train()(t1, t2)
    close(torch.stack(logits), g["train_logits"], atol=1e-9)
    check_reductions(torch.stack(feats).numpy(), g, "train_feats")
    buffers = dict(net.named_buffers())
    for name, total, l2 in zip(g["bn_after_names"], g["bn_after_sum"], g["bn_after_l2"], strict=True):
        close(buffers[name].double().sum(), total, rtol=1e-9, atol=1e-9)
        close(buffers[name].double().norm(), l2, rtol=1e-9)


# ---- optimizer, schedule, trajectory, sampler -----------------------------------------------------------------------


def test_learning_rate():
    g = golden("lr_schedule.npz")
    ours = [learning_rate(epoch, float(g["lr_argument"])) for epoch in g["epoch"].tolist()]
    close(ours, g["head_lr"], rtol=1e-12)
    net = EmbedNet(2, arch="resnet18", pretrained="none")
    for lr, expected in zip(ours, g["base_lr"], strict=True):
        optimizer = build_optimizer(net, SimpleNamespace(lr=lr, optim="sgd"))
        close(optimizer.param_groups[0]["lr"], expected, rtol=1e-12)
        assert {group["lr"] for group in optimizer.param_groups[1:]} == {lr}


def test_param_groups():
    g = golden("param_groups_resnet18.json")
    net = EmbedNet(g["class_num"], arch="resnet18", pretrained="none")
    groups = build_optimizer(net, SimpleNamespace(lr=g["lr"], optim="sgd")).param_groups
    name_of = {id(p): name for name, p in net.named_parameters()}
    names = [[name_of[id(p)] for p in group["params"]] for group in groups]
    assert sorted(names[0]) == g["base_sorted"]
    assert names[1:] == g["head_groups_in_order"]
    for group, expected in zip(groups, g["group_hyperparameters"], strict=True):
        assert {key: group[key] for key in expected} == pytest.approx(expected)
    assert sorted(n for n, p in net.named_parameters() if not p.requires_grad) == g["never_receives_gradient"]
    adam = build_optimizer(net, SimpleNamespace(lr=g["lr"], optim="adam"))
    assert isinstance(adam, torch.optim.Adam)
    for group, other in zip(groups, adam.param_groups, strict=True):
        assert all(group[key] == other[key] for key in ("params", "lr", "weight_decay"))


def test_training_trajectory():
    g = golden("train_traj_resnet18.npz")
    net = golden_net("resnet18", 6).train()
    optimizer = build_optimizer(net, SimpleNamespace(lr=0.008, optim="sgd"))
    terms = loss_terms(SimpleNamespace(w_hc=0.6, thd=0.0, dist_type="l2"))
    for step in range(12):
        rng = np.random.default_rng(1000 + step)
        labels = torch.from_numpy(np.repeat(rng.permutation(6)[:2], 4))
        visible, thermal = (torch.from_numpy(rng.standard_normal((8, 3, 96, 48))) for _ in range(2))
        losses, _ = train_step(net, optimizer, (visible, thermal, labels, labels), terms)
        close(losses["CE"], g["ce"][step], atol=1e-8)
        close(losses["HC"], g["hc"][step], atol=1e-8)
        close(total_loss(terms, losses).mean(), g["loss"][step], atol=1e-8)
    state = net.state_dict()
    for name, total, l2 in zip(g["final_names"], g["final_sum"], g["final_l2"], strict=True):
        close(state[name].double().norm(), l2, rtol=1e-8)
        close(state[name].double().sum(), total, atol=1e-7)
    for name, l2 in zip(g["momentum_names"], g["momentum_l2"], strict=True):
        close(optimizer.state[net.get_parameter(name)]["momentum_buffer"].norm(), l2, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("case", "batch_size", "per_img"), [("main", 16, 4), ("b32p8", 32, 8)])
def test_sampler_draws_as_published(case, batch_size, per_img):
    """From one numpy stream over two epochs; the first batch is the one that the published code loses (FIDELITY 4)."""
    g = golden("identity_sampler.npz")
    rng = np.random.RandomState(1)
    for epoch in (0, 1):
        sampler = IdentitySampler(g[f"{case}_labels_visible"], g[f"{case}_labels_thermal"], batch_size, per_img)
        plan = sampler.draw(rng)
        for ours, modality in zip(plan, (1, 2), strict=True):
            published = g[f"{case}_epoch{epoch}_index{modality}"]
            np.testing.assert_array_equal(ours.ravel(), g[f"{case}_epoch{epoch}_index{modality}_fixed"])
            np.testing.assert_array_equal(ours.ravel()[batch_size:], published[batch_size:])
    np.testing.assert_array_equal(rng.randint(0, 2**31 - 1, 4), g[f"{case}_rng_next_uint"])
