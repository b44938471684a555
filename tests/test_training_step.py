"""One training step, and an epoch of them."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import small_net
from torch import Tensor

import train
from data_loader import IdentitySampler, TrainBatches, TrainingSet
from loss import Criterion
from train import build_optimizer, set_learning_rate, train_epoch, train_step

ARGS = SimpleNamespace(lr=0.01, w_hc=0.6, optim="sgd", precision="fp32", batch_size=8, epochs=0)


def noise_batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two persons, two images of each in both modalities."""
    rng = torch.Generator().manual_seed(1)
    labels = torch.tensor([0, 0, 1, 1])
    visible = torch.randn(4, 3, 96, 32, generator=rng)
    thermal = torch.randn(4, 3, 96, 32, generator=rng)
    return visible, thermal, labels, labels


def step(
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    backend: str | None = None,
    amp_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The losses of one training step, and what it adds to a weight."""
    torch.manual_seed(0)
    net = small_net(4, low_dim=16).to(dtype, memory_format=memory_format).train()
    visible, thermal, visible_labels, thermal_labels = noise_batch()
    visible = visible.to(dtype, memory_format=memory_format)
    thermal = thermal.to(dtype, memory_format=memory_format)
    called_net = net
    if backend:
        called_net = torch.compile(net, backend=backend, fullgraph=True)
    weight = net.feature1.feat_block[0].weight
    before = weight.detach().clone()
    losses, _ = train_step(
        called_net,
        Criterion(0.6),
        build_optimizer(net, ARGS),
        (visible, thermal, visible_labels, thermal_labels),
        amp_dtype,
    )
    assert {loss.dtype for loss in losses.values()} == {dtype}  # whatever the network computes in
    return torch.stack(list(losses.values())).double(), (weight.detach() - before).double()


def test_what_is_faster_changes_no_value():
    """Memory format, fused update, graph capture: within rounding; bfloat16: within a fifth."""
    exact_losses, exact_change = step(torch.float64)
    channels_last = {"memory_format": torch.channels_last}
    for options, tolerance in (
        ({}, 1e-4),
        (channels_last, 1e-4),
        ({"backend": "eager"}, 1e-4),  # in one graph, without breaks
        ({**channels_last, "amp_dtype": torch.bfloat16}, 0.2),
    ):
        losses, change = step(**options)
        np.testing.assert_allclose(losses, exact_losses, rtol=tolerance)
        assert (change - exact_change).norm() / exact_change.norm() < tolerance


class WithFurtherTerm(Criterion):
    """Takes away the cross-entropy, which alone trains the classifiers."""

    def forward(self, logits, feats, visible_labels, thermal_labels):
        losses = super().forward(logits, feats, visible_labels, thermal_labels)
        further = -losses["CE"]
        losses["loss"] = losses["loss"] + further
        return losses | {"further": further}


def test_a_further_term_is_trained_with():
    net = small_net().train()
    optimizer = build_optimizer(net, ARGS)
    losses, _ = train_step(net, WithFurtherTerm(0.6), optimizer, noise_batch())
    assert list(losses) == ["loss", "CE", "HC", "further"]
    for classifier in net.classifiers:
        assert not any(parameter.grad.any() for parameter in classifier.parameters())
    for head in net.heads:
        assert all(parameter.grad.any() for parameter in head.parameters())


def test_each_group_keeps_its_share_of_the_rate():
    """So does a group that somebody adds, through the whole schedule."""
    optimizer = build_optimizer(small_net(), ARGS)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([0.001] + [0.01] * 12)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer.add_param_group({"params": [parameter], "lr_scale": 5})
    set_learning_rate(optimizer, 0.001)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([0.0001] + [0.001] * 12 + [0.005])


def test_an_epoch_reads_nothing_from_the_device(monkeypatch):
    """On torch's device "meta", which stands for a GPU.

    Its tensors hold no values, so that whatever would wait for one raises. Copies to the device
    pass unnoticed.
    """
    device = torch.device("meta")
    sgd = torch.optim.SGD  # fused updates and autocast do not know the device
    monkeypatch.setattr(torch.optim, "SGD", lambda groups, fused, **rest: sgd(groups, **rest))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    sums = []

    def read_later(means: Tensor, names: list[str]) -> dict[str, float]:
        sums.append(means)
        return dict.fromkeys(names, 0.0)

    monkeypatch.setattr(train, "read_means", read_later)  # the one look, every 20 steps
    images = np.zeros((16, 96, 32, 3), np.uint8)
    labels = np.repeat(np.arange(4), 4)
    sampler = IdentitySampler(labels, labels, batch_size=8, per_img=4)
    data = TrainingSet(images, images, labels, labels)
    batches = TrainBatches(data, sampler, (96, 32), device, "device")
    with device:
        net = small_net(4, drop=0.5)
    metrics = train_epoch(
        net, Criterion(0.6), build_optimizer(net, ARGS), batches, epoch=0, args=ARGS
    )
    assert list(metrics) == ["epoch", "lr", "loss", "CE", "HC", "accuracy"]
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        sums[0].tolist()


def test_a_first_step_that_overflows_leaves_weights_and_momentum():
    """As with fp16, whose scale starts high: the step is left out, and momentum stays zero."""
    net = small_net().train()
    optimizer = build_optimizer(net, ARGS)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    train_step(net, Criterion(0.6), optimizer, noise_batch(), scaler=scaler)
    assert scaler.get_scale() == 2.0**126
    for old, parameter in zip(before, net.parameters(), strict=True):
        assert torch.equal(old, parameter)
    assert not any(state["momentum_buffer"].any() for state in optimizer.state.values())
