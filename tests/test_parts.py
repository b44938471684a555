"""What the golden numbers do not reach: the evaluation by brute force, the loss, the network, checkpoints."""

import copy
import io
import zipfile
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

import utils
from data_manager import Search, Split, sysu_searches
from eval_metrics import BLOCK, Counts, Distances, Results, eval_regdb, eval_sysu, extract_features, rerank
from loss import HeteroCenterLoss
from model import EmbedNet, _l2_normalise, _stripes, describe_weights, least_height
from train import build_optimizer, train_step

# ---- evaluation -----------------------------------------------------------------------------------------------------


def brute_force(distmat, q_pids, g_pids, q_camids, g_camids, rank_persons):
    """The protocol in words: walk down each query's ranking."""
    curves, aps, inps = [], [], []
    for row, pid, cam in zip(distmat, q_pids, q_camids, strict=True):
        seen = [i for i in range(len(g_pids)) if not (cam == 3 and g_camids[i] == 2)]
        ranking = sorted(seen, key=lambda i: row[i])  # Python's sort is stable: ties keep the gallery's order
        hits = [place for place, i in enumerate(ranking, 1) if g_pids[i] == pid]
        if not hits:
            continue
        persons = list(dict.fromkeys(g_pids[i] for i in ranking))
        first = persons.index(pid) + 1 if rank_persons else hits[0]
        curves.append([first <= rank for rank in range(1, 21)])
        aps.append(np.mean([n / place for n, place in enumerate(hits, 1)]))
        inps.append(len(hits) / hits[-1])
    return np.mean(curves, axis=0), np.mean(aps), np.mean(inps)


@pytest.mark.parametrize("seed", range(20))
def test_evaluation_against_brute_force(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    queries, gallery, persons = rng.integers(1, 200), rng.integers(1, 60), rng.integers(1, 25)
    distmat = rng.random((queries, gallery)) if seed % 2 else rng.integers(0, 5, (queries, gallery))  # ties
    q_pids, g_pids = rng.integers(0, persons, queries), rng.integers(0, persons, gallery)
    q_pids[0] = g_pids[0]
    q_camids, g_camids = rng.choice([3, 6], queries), rng.choice([1, 2, 4, 5], gallery)
    q_camids[0] = 6  # query 0 has a match whatever else was drawn
    monkeypatch.setattr("eval_metrics.BLOCK", int(rng.choice([1, 70 * gallery, BLOCK])))  # several row blocks, or one
    sysu = eval_sysu(distmat, q_pids, g_pids, q_camids, g_camids)
    regdb = eval_regdb(distmat, q_pids, g_pids)
    nowhere = np.zeros(queries), np.zeros(gallery)
    for scores, expected in (
        (sysu, brute_force(distmat, q_pids, g_pids, q_camids, g_camids, rank_persons=True)),
        (regdb, brute_force(distmat, q_pids, g_pids, *nowhere, rank_persons=False)),
    ):
        for ours, theirs in zip(scores, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_distances_row_by_row():
    rng = np.random.default_rng(0)
    query, gallery = rng.standard_normal((7, 5)).astype(np.float32), rng.standard_normal((9, 5)).astype(np.float32)
    cosine, euclidean = Distances(query, gallery), Distances(query, gallery, "euclidean")
    assert cosine.shape == euclidean.shape == (7, 9)
    for rows in (slice(0, 3), slice(3, 7)):
        lengths = np.linalg.norm(query[rows], axis=1)[:, None] * np.linalg.norm(gallery, axis=1)
        np.testing.assert_allclose(cosine[rows], -(query[rows] @ gallery.T) / lengths, rtol=1e-5)
        pairs = query[rows, None].astype(float) - gallery[None]
        np.testing.assert_allclose(euclidean[rows], (pairs**2).sum(2), rtol=1e-12)


@pytest.mark.parametrize(("dtype", "factor"), [(np.float16, 1), (np.float16, 300), (np.float32, 1e25)])
def test_cosine_of_large_and_of_short_numbers(dtype, factor):
    x = np.random.default_rng(0).standard_normal((9, 500)) / 30
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    found = Distances((x * factor).astype(dtype)[:4], (x * factor).astype(dtype))[:]
    np.testing.assert_allclose(found, -x[:4] @ x.T, atol=1e-3)


def jaccard_of_neighbourhoods(query, gallery, k1, k2, weight):
    """Re-ranking in the paper's words (Zhong et al. 2017, sections 3.2 to 3.5), with sets, an image at a time."""
    x = np.concatenate([query, gallery]).astype(float)
    n = len(x)
    d = np.array([[((a - b) ** 2).sum() for b in x] for a in x])
    d /= d.max(axis=1, keepdims=True)
    ranking = [sorted(range(n), key=lambda j, i=i: d[i, j]) for i in range(n)]

    def reciprocal(i, k):
        return {j for j in ranking[i][: k + 1] if i in ranking[j][: k + 1]}

    vectors = np.zeros((n, n))
    for i in range(n):
        robust = set(reciprocal(i, k1))
        for j in reciprocal(i, k1):
            half = reciprocal(j, round(k1 / 2))
            if len(half & reciprocal(i, k1)) > 2 / 3 * len(half):
                robust |= half
        for j in robust:
            vectors[i, j] = np.exp(-d[i, j])
        vectors[i] /= vectors[i].sum()
    vectors = np.array([vectors[ranking[i][:k2]].mean(axis=0) for i in range(n)])
    result = np.empty((len(query), len(gallery)))
    for i in range(len(query)):
        for j in range(len(gallery)):
            a, b = vectors[i], vectors[len(query) + j]
            jaccard = 1 - np.minimum(a, b).sum() / np.maximum(a, b).sum()
            result[i, j] = (1 - weight) * jaccard + weight * d[i, len(query) + j]
    return result


@pytest.mark.parametrize(("n_query", "n_gallery", "k1", "k2"), [(25, 40, 20, 6), (30, 20, 5, 1), (3, 6, 7, 3)])
@pytest.mark.parametrize("kind", Distances.KINDS)
def test_reranking_against_its_definition(n_query, n_gallery, k1, k2, kind):
    rng = np.random.default_rng(n_query)
    persons = rng.standard_normal((8, 6)) * 1.5
    query, gallery = (persons[rng.integers(0, 8, n)] + rng.standard_normal((n, 6)) for n in (n_query, n_gallery))
    if kind == "cosine":  # half the squared distance of the directions
        directions = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (query, gallery)]
    expected = jaccard_of_neighbourhoods(*(directions if kind == "cosine" else (query, gallery)), k1, k2, 0.3)
    np.testing.assert_allclose(rerank(query, gallery, kind, k1, k2, 0.3), expected, atol=1e-6)


def test_reranking_of_few_images():
    """Fewer images than neighbours: everybody is near, and the closest stays the closest."""
    query, gallery = np.eye(3)[:2], np.eye(3) + 0.1
    assert (rerank(query, gallery).argmin(axis=1) == [0, 1]).all()


class Lists(NamedTuple):
    pids: np.ndarray
    camids: np.ndarray


def test_counts_and_chance():
    """Gallery images of persons 1, 1, 2; the last, of camera 2, is not seen by the queries of camera 3."""
    images = Lists(np.array([1, 1, 2, 1, 2, 1, 9]), np.array([1, 4, 2, 3, 3, 6, 6]))
    counts = Counts.of(Search("all-search single-shot", 0, np.arange(3, 7), np.arange(3)), images)
    assert counts[:4] == (4, 2, 3, 2)
    assert counts.chance == pytest.approx(np.mean([2 / 2, 2 / 3]))  # matches / images seen
    assert counts.deviation == pytest.approx((counts.chance * (1 - counts.chance) / 2) ** 0.5)
    rng = np.random.default_rng(0)
    rank1 = [eval_sysu(rng.random((4, 3)), *(images.pids[i] for i in (slice(3, 7), slice(3))),
             *(images.camids[i] for i in (slice(3, 7), slice(3)))).cmc[0] for _ in range(2000)]  # fmt: skip
    assert np.mean(rank1) == pytest.approx(counts.chance, abs=0.02)


@pytest.mark.parametrize(("signal", "suspicious"), [(0.0, True), (3.0, False)])
def test_results_near_chance_are_named(signal, suspicious):
    rng = np.random.default_rng(0)
    pids, camids = np.repeat(np.arange(40), 12), np.tile([1, 2, 3, 4, 5, 6], 80)
    features = rng.standard_normal((480, 16)) + signal * rng.standard_normal((40, 16))[pids]
    images = Split([f"{i:04d}" for i in range(480)], pids, camids)
    results = Results("sysu")
    for search in sysu_searches(images, "both", "both"):
        results.add(search, images, {"fc": features})
    assert [*results.counts] == [f"{m}-search {s}-shot" for m in ("all", "indoor") for s in ("single", "multi")]
    assert results.counts["all-search single-shot"][:4] == (160, 0, 160, 40)
    assert len(results.near_chance()) == (4 if suspicious else 0)
    assert "160 queries (0 without a match" in results.table()


def test_evaluation_refuses_nonsense():
    ones, pids = np.ones((2, 3)), np.arange(3)
    with pytest.raises(ValueError, match="no query has a match"):
        eval_regdb(ones, pids[:2] + 10, pids)
    with pytest.raises(ValueError, match="not finite"):
        eval_regdb(ones * np.nan, pids[:2], pids)
    with pytest.raises(ValueError, match="2 gallery images"):
        eval_regdb(ones, pids[:2], pids[:2])


def test_features_come_in_order_and_must_be_finite():
    net = EmbedNet(3, low_dim=8, arch="resnet18", pretrained="none")
    x = torch.randn(5, 3, 96, 32)
    batches = [("thermal", np.array([4, 1]), x[[4, 1]]), ("thermal", np.array([0, 2, 3]), x[[0, 2, 3]])]
    features = extract_features(net, batches, 5)
    assert net.training  # as it was
    with torch.no_grad():
        pool5, fc = net.eval()(thermal=x)
    np.testing.assert_allclose(features["pool5"], pool5, atol=1e-5)
    np.testing.assert_allclose(features["fc"], fc, atol=1e-5)
    with pytest.raises(FloatingPointError, match="not finite"):
        extract_features(net, [("visible", np.arange(5), x * torch.nan)], 5)


def test_mirrored_features():
    """--flip: the mean of the features of an image and its mirror image, each stripe of length 1 again."""
    net = EmbedNet(3, low_dim=8, arch="resnet18", pretrained="none")
    x = torch.randn(3, 3, 96, 32)
    batches = [("visible", np.arange(3), x)]
    features = extract_features(net, batches, 3, ("fc",), flip=True)
    with torch.no_grad():
        mean = (net.eval()(visible=x)[1] + net(visible=torch.from_numpy(x.numpy()[..., ::-1].copy()))[1]) / 2
    stripes = mean.view(3, 6, 8)
    expected = stripes / stripes.norm(dim=2, keepdim=True)
    assert [*features] == ["fc"]
    np.testing.assert_allclose(features["fc"], expected.view(3, 48), atol=1e-5)


# ---- loss -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dist_type", ["l2", "l1", "cos"])
def test_loss_does_not_depend_on_the_order_of_rows(dist_type):
    rng = torch.Generator().manual_seed(0)
    visible, thermal = (torch.randn(12, 6, generator=rng, dtype=torch.float64) for _ in range(2))
    labels = torch.tensor([7] * 4 + [2] * 4 + [5] * 4)
    loss = HeteroCenterLoss(0.1, dist_type)
    a, b = torch.randperm(12, generator=rng), torch.randperm(12, generator=rng)
    torch.testing.assert_close(
        loss(visible[a], thermal[b], labels[a], labels[b]), loss(visible, thermal, labels, labels), rtol=1e-12, atol=0
    )


def test_loss_by_hand_with_unequal_numbers_of_rows():
    visible = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]])  # centers: (2, 0) of person 4, (0, 5) of person 9
    thermal = torch.tensor([[0.0, 4.0], [2.0, 1.0]])  # person 9, person 4
    value = HeteroCenterLoss(0.25)(visible, thermal, torch.tensor([4, 4, 9]), torch.tensor([9, 4]))
    assert value.item() == pytest.approx((1 - 0.25) + (1 - 0.25))


def test_loss_at_its_edges():
    x, labels = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 0, 1, 1])
    clipped = HeteroCenterLoss(margin=1e6)(x, x.detach() + 1, labels, labels)
    clipped.backward()
    assert clipped.item() == 0 and x.grad.abs().sum() == 0
    assert HeteroCenterLoss()(x * torch.nan, x, labels, labels).isnan()
    with pytest.raises(ValueError, match="same persons"):
        HeteroCenterLoss()(x, x, labels, labels + 1)
    with pytest.raises(ValueError, match="dist_type"):
        HeteroCenterLoss(dist_type="l3")


# ---- network --------------------------------------------------------------------------------------------------------


def test_both_streams_start_alike_and_are_not_shared():
    net = EmbedNet(3, arch="resnet18", pretrained="none")
    visible, thermal = net.visible_net["visible"], net.thermal_net["thermal"]
    for a, b in zip(visible.parameters(), thermal.parameters(), strict=True):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()
    x = torch.randn(2, 3, 96, 32)
    assert not torch.equal(net.eval()(visible=x)[0], EmbedNet(3, arch="resnet18", pretrained="none").eval()(x)[0])


def test_initial_weights_of_heads_and_classifiers():
    net = EmbedNet(200, low_dim=256, arch="resnet18", pretrained="none")
    linear, norm, classify = net.feature3.feat_block[0], net.feature3.feat_block[1], net.classifier3.classifier[1]
    assert linear.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.02)  # Kaiming, fan-out
    assert (norm.weight.mean().item(), norm.weight.std().item()) == pytest.approx((1, 0.01), rel=0.2)
    assert classify.weight.std().item() == pytest.approx(0.001, rel=0.02)
    assert not any(layer.bias.any() for layer in (linear, norm, classify))


def test_pretrained_file(tmp_path):
    resnet = torchvision.models.resnet18(weights=None)
    torch.save(resnet.state_dict(), tmp_path / "resnet18.pth")
    net = EmbedNet(3, arch="resnet18", pretrained=str(tmp_path / "resnet18.pth"))
    assert torch.equal(net.thermal_net["thermal"].layer3[0].conv1.weight, resnet.layer3[0].conv1.weight)
    with pytest.raises(OSError, match="not the weights of torchvision's resnet50"):
        EmbedNet(3, arch="resnet50", pretrained=str(tmp_path / "resnet18.pth"))


def step(precision=torch.float32, memory_format=torch.contiguous_format, backend=None, amp=None):
    """Losses of one training step, and a weight after it."""
    torch.manual_seed(0)
    net = EmbedNet(4, low_dim=16, arch="resnet18", pretrained="none").to(precision, memory_format=memory_format).train()
    rng = torch.Generator().manual_seed(1)
    images = (torch.randn(8, 3, 96, 48, generator=rng).to(precision, memory_format=memory_format) for _ in range(2))
    labels = torch.arange(2).repeat_interleave(4)
    optimizer = build_optimizer(net, SimpleNamespace(lr=0.01, optim="sgd"))
    call = torch.compile(net, backend=backend, fullgraph=True) if backend else net
    ce, hc, _ = train_step(call, optimizer, (*images, labels, labels), HeteroCenterLoss(), 0.6, amp)
    assert ce.dtype == hc.dtype == precision  # the losses, whatever the network computes in
    return torch.stack([ce, hc]).double(), net.feature1.feat_block[0].weight.detach().double()


def test_what_is_faster_changes_no_value():
    """Memory format, fused update and graph capture stay within rounding; bfloat16, of 8 bits, within a tenth."""
    exact = step(torch.float64)
    for options, tolerance in (
        ({}, 1e-4),
        ({"memory_format": torch.channels_last}, 1e-4),
        ({"backend": "aot_eager"}, 1e-4),  # in one graph, without breaks
        ({"memory_format": torch.channels_last, "amp": torch.bfloat16}, 0.1),
    ):
        losses, weight = step(**options)
        np.testing.assert_allclose(losses, exact[0], rtol=tolerance)
        assert (weight - exact[1]).norm() / exact[1].norm() < tolerance


def test_a_first_step_that_overflows_leaves_weights_and_momentum():
    """As --amp fp16 may, whose scale starts high: the step is left out, and momentum is not what memory held before."""
    net = EmbedNet(2, low_dim=8, arch="resnet18", pretrained="none").train()
    optimizer = build_optimizer(net, SimpleNamespace(lr=0.01, optim="sgd"))
    before = [parameter.detach().clone() for parameter in net.parameters()]
    images, labels = torch.randn(2, 4, 3, 96, 32), torch.tensor([0, 0, 1, 1])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    train_step(net, optimizer, (*images, labels, labels), HeteroCenterLoss(), 0.6, scaler=scaler)
    assert scaler.get_scale() == 2.0**126
    assert all(map(torch.equal, before, net.parameters()))
    assert not any(state["momentum_buffer"].any() for state in optimizer.state.values())


@pytest.mark.parametrize("num_parts", [6, 4])
def test_least_height(num_parts):
    net = EmbedNet(3, low_dim=8, arch="resnet18", num_parts=num_parts, pretrained="none").eval()
    height = least_height(num_parts)
    assert net(torch.randn(1, 3, height, 32))[1].shape == (1, 8 * num_parts)
    with pytest.raises(ValueError, match=f"must be {height} high"):
        net(torch.randn(1, 3, height - 1, 32))
    with pytest.raises(ValueError, match="nothing to embed"):
        net()


def test_features_are_normalised_without_an_epsilon():
    tiny = 1e-15 * torch.randn(4, 8, dtype=torch.float64)
    torch.testing.assert_close(_l2_normalise(tiny).norm(dim=1), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("height", [6, 7, 11, 18, 20])
def test_stripes_overlap_where_six_does_not_divide_the_height(height):
    """The published pooling: an average pool of height H - 5 s, moved by s = H // 6 (FIDELITY 20)."""
    x = torch.randn(2, 5, height, 3, dtype=torch.float64)
    stride = height // 6
    pooled = F.avg_pool2d(x, kernel_size=(height - 5 * stride, 3), stride=(stride, 3))
    torch.testing.assert_close(torch.stack(_stripes(x, 6), dim=2), pooled[..., 0], rtol=0, atol=1e-12)


# ---- devices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpu", "count", "device", "said"),
    [
        ("0", 0, "cpu", ["no GPU is available"]),
        ("1", 0, "cpu", ["no GPU is available"]),
        ("1", 1, "cuda:0", ["there is no GPU 1; GPU 0 is used"]),
        ("1", 2, "cuda:1", ["2 GPUs are visible; a run uses one", "device: cuda:1 (H)"]),
        ("0,1", 2, "cuda:0", ["2 GPUs are visible; a run uses one"]),
    ],
)
def test_device(gpu, count, device, said, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H")
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert utils.select_device(gpu) == torch.device(device)
    assert chosen == ([] if device == "cpu" else [int(device[-1])])
    assert all(text in caplog.text for text in said)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def published_file(net: EmbedNet, numpy_core: str) -> bytes:
    """A checkpoint as PyTorch 0.4.1 and numpy 1.17 (core) or later ones (_core) write it: no zip, numpy values."""
    file = io.BytesIO()
    state = {"net": net.state_dict(), "cmc": np.linspace(0.5, 1, 20), "mAP": np.float64(0.25), "epoch": 42}
    torch.save(state, file, _use_new_zipfile_serialization=False)
    # The protocol spells module names as lines of text, so that another module is another line.
    data = file.getvalue().replace(b"numpy._core.multiarray\n", b"numpy.%b.multiarray\n" % numpy_core.encode())
    assert b"cnumpy.%b.multiarray\n_reconstruct\n" % numpy_core.encode() in data
    return data


@pytest.mark.parametrize("numpy_core", ["core", "_core"])
def test_published_checkpoint(tmp_path, numpy_core):
    net = EmbedNet(5, low_dim=16, arch="resnet18", pretrained="none")
    (tmp_path / "best.t").write_bytes(published_file(net, numpy_core))
    state = utils.load_checkpoint(str(tmp_path / "best.t"))
    assert state["cmc"] == np.linspace(0.5, 1, 20).tolist() and state["mAP"] == 0.25 and state["epoch"] == 42
    assert describe_weights(state["net"], "") == {"arch": "resnet18", "low_dim": 16, "n_class": 5, "has_drop": False}
    copied = copy.deepcopy(net)
    copied.load_state_dict(state["net"])
    x = torch.randn(2, 3, 96, 32)
    assert torch.equal(copied.eval()(x)[0], net.eval()(x)[0])


def test_describe_weights_of_every_kind():
    for arch, drop in (("resnet18", 0.0), ("resnet50", 0.5)):
        net = EmbedNet(7, low_dim=8, drop=drop, arch=arch, pretrained="none")
        expected = {"arch": arch, "low_dim": 8, "n_class": 7, "has_drop": drop > 0}
        assert describe_weights(net.state_dict(), "") == expected


def test_a_failed_save_leaves_the_checkpoint_before(tmp_path):
    path = str(tmp_path / "last.t")
    utils.save_checkpoint(path, {"net": {}, "epoch": 1})
    with pytest.raises(TypeError, match="function is not a plain type"):
        utils.save_checkpoint(path, {"net": {}, "epoch": lambda: 0})
    assert utils.load_checkpoint(path)["epoch"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.t"] and zipfile.is_zipfile(path)
