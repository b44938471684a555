"""The network: a ResNet per modality, six stripes, a head and a classifier per stripe (paper, section 3.2)."""

import copy
import os

import torch
import torchvision
from torch import Tensor, nn

ARCHS = {"resnet50": 2048, "resnet18": 512}  # channels that layer4 gives out
DOWNSCALING = 16  # image rows per feature row, with layer4 at stride 1


class EmbedNet(nn.Module):
    """Two ResNets without shared weights, then stripe heads that both modalities share.

    The state_dict has the keys, shapes and order of the published checkpoints, the unused ``fc`` layers included.

    Args:
        n_class: number of training persons (395 for SYSU-MM01, 206 for RegDB).
        low_dim: dimensions of a stripe's feature.
        drop: dropout rate before the classifiers; 0 leaves the layer out.
        arch: "resnet50" or "resnet18".
        num_parts: number of horizontal stripes.
        pretrained: what both ResNets start from: "imagenet" (torchvision's IMAGENET1K_V1, downloaded once), "none"
            (random weights, the same for both) or the path of a torchvision ResNet state_dict.

    Raises:
        OSError: the pretrained weights cannot be downloaded or read, or are those of another network.
    """

    def __init__(
        self,
        n_class: int,
        low_dim: int = 512,
        drop: float = 0.0,
        arch: str = "resnet50",
        num_parts: int = 6,
        pretrained: str = "imagenet",
    ):
        super().__init__()
        self.num_parts = num_parts
        resnet = _resnet(arch, pretrained)
        # The nested names are those of the published checkpoints.
        self.visible_net = nn.ModuleDict({"visible": resnet})
        self.thermal_net = nn.ModuleDict({"thermal": copy.deepcopy(resnet)})
        for i in range(1, num_parts + 1):
            self.add_module(f"feature{i}", StripeHead(ARCHS[arch], low_dim))
        for i in range(1, num_parts + 1):
            self.add_module(f"classifier{i}", StripeClassifier(low_dim, n_class, drop))

    @property
    def heads(self) -> list[nn.Module]:
        return [getattr(self, f"feature{i}") for i in range(1, self.num_parts + 1)]

    @property
    def classifiers(self) -> list[nn.Module]:
        return [getattr(self, f"classifier{i}") for i in range(1, self.num_parts + 1)]

    def forward(self, visible: Tensor | None = None, thermal: Tensor | None = None) -> tuple:
        """Embed visible images, thermal images, or both (then the visible rows come first).

        Args:
            visible, thermal: (N, 3, height, width) normalised images.

        Returns:
            In training (logits, feats): a (N, n_class) tensor and an L2-normalised (N, low_dim) tensor per stripe.
            In evaluation (pool5, fc): (N, num_parts * C) and (N, num_parts * low_dim), each stripe L2-normalised.

        Raises:
            ValueError: no images, or images too low for the stripes.
        """
        stripes = _stripes(self.feature_maps(visible, thermal), self.num_parts)  # num_parts x (N, C)
        feats = [head(stripe) for head, stripe in zip(self.heads, stripes, strict=True)]  # num_parts x (N, low_dim)
        if not self.training:
            return torch.cat([*map(_l2_normalise, stripes)], dim=1), torch.cat([*map(_l2_normalise, feats)], dim=1)
        logits = [classify(feat) for classify, feat in zip(self.classifiers, feats, strict=True)]
        return logits, [_l2_normalise(feat) for feat in feats]

    def feature_maps(self, visible: Tensor | None = None, thermal: Tensor | None = None) -> Tensor:
        """What the ResNets see, before the stripes are pooled: (N, C, height / 16, width / 16), rounded up."""
        maps = []
        if visible is not None:
            maps.append(_feature_map(self.visible_net["visible"], visible))
        if thermal is not None:
            maps.append(_feature_map(self.thermal_net["thermal"], thermal))
        if not maps:
            raise ValueError("nothing to embed: give visible images, thermal images or both")
        return torch.cat(maps)


class StripeHead(nn.Module):
    """(N, C) pooled stripe -> (N, low_dim) feature."""

    def __init__(self, in_dim: int, low_dim: int):
        super().__init__()
        linear, norm = nn.Linear(in_dim, low_dim), nn.BatchNorm1d(low_dim)
        nn.init.kaiming_normal_(linear.weight, a=0, mode="fan_out")
        nn.init.zeros_(linear.bias)
        nn.init.normal_(norm.weight, 1.0, 0.01)
        nn.init.zeros_(norm.bias)
        self.feat_block = nn.Sequential(linear, norm)

    def forward(self, stripe: Tensor) -> Tensor:
        return self.feat_block(stripe)


class StripeClassifier(nn.Module):
    """(N, low_dim) feature -> (N, n_class) logits."""

    def __init__(self, low_dim: int, n_class: int, drop: float):
        super().__init__()
        linear = nn.Linear(low_dim, n_class)
        nn.init.normal_(linear.weight, std=0.001)
        nn.init.zeros_(linear.bias)
        self.classifier = nn.Sequential(nn.LeakyReLU(0.1), *([nn.Dropout(drop)] if drop > 0 else []), linear)

    def forward(self, feat: Tensor) -> Tensor:
        return self.classifier(feat)


def least_height(num_parts: int = 6) -> int:
    """The least image height, in pixels, that leaves a row of features to each stripe (FIDELITY 20)."""
    return (num_parts - 1) * DOWNSCALING + 1


def describe_weights(state_dict: dict[str, Tensor], path: str) -> dict:
    """Which EmbedNet the weights read from ``path`` belong to: its arch, low_dim, n_class, and has_drop, drop > 0.

    Raises:
        OSError: they are not those of an EmbedNet.
    """
    arch = "resnet50" if "visible_net.visible.layer1.0.conv3.weight" in state_dict else "resnet18"
    # A Dropout in front of the classifier's Linear moves its index from 1 to 2.
    has_drop = "classifier1.classifier.2.weight" in state_dict
    try:
        n_class, low_dim = state_dict[f"classifier1.classifier.{1 + has_drop}.weight"].shape
        heads = {tuple(state_dict[f"feature{i}.feat_block.0.weight"].shape) for i in range(1, 7)}
        if not n_class or heads != {(low_dim, ARCHS[arch])} or not low_dim:  # memory is taken for these numbers
            raise ValueError("the sizes of the heads disagree")
    except (KeyError, AttributeError, ValueError):
        raise OSError(f"{path} holds the weights of another network than this method's") from None
    return {"arch": arch, "low_dim": low_dim, "n_class": n_class, "has_drop": has_drop}


def network_of(state_dict: dict[str, Tensor], path: str, drop: float = 0.5) -> EmbedNet:
    """The network whose weights were read from ``path``; ``drop`` is the rate of its dropout, if it has any.

    Raises:
        OSError: they are not those of an EmbedNet.
    """
    found = describe_weights(state_dict, path)
    drop = drop if found["has_drop"] else 0.0
    net = EmbedNet(found["n_class"], found["low_dim"], drop, found["arch"], pretrained="none")
    try:
        own = net.state_dict()
        for name in own.keys() & state_dict.keys():
            if state_dict[name].is_complex() or own[name].is_floating_point() != state_dict[name].is_floating_point():
                raise TypeError(f"{name} is {state_dict[name].dtype}")
        net.load_state_dict(state_dict)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise OSError(f"{path} does not fit the network: {reason}") from None
    return net


def _feature_map(resnet: nn.Module, x: Tensor) -> Tensor:
    """(N, 3, height, width) -> (N, C, height / 16, width / 16), both rounded up."""
    x = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(x))))
    return resnet.layer4(resnet.layer3(resnet.layer2(resnet.layer1(x))))


def stripe_window(height: int, num_parts: int = 6) -> tuple[int, int]:
    """How many feature rows a stripe has, and how far the next one is: they may overlap, as published (FIDELITY 20)."""
    if height < num_parts:
        raise ValueError(
            f"{height} feature rows are too few for {num_parts} stripes: images must be {least_height(num_parts)} high"
        )
    stride = height // num_parts
    return height - (num_parts - 1) * stride, stride


def _stripes(x: Tensor, num_parts: int) -> tuple[Tensor, ...]:
    """(N, C, H, W) -> num_parts x (N, C): means over row bands."""
    rows = x.permute(0, 2, 3, 1).mean(2)  # (N, H, C): with the channels last the gradient is so, too
    band, stride = stripe_window(rows.shape[1], num_parts)
    if band == stride:  # the same as below, in simpler steps for the compiler
        return rows.unflatten(1, (num_parts, band)).mean(2).unbind(1)
    return rows.unfold(1, band, stride).mean(3).unbind(1)  # of (N, num_parts, C, band)


def _l2_normalise(x: Tensor) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))  # from half precision
    return x / x.norm(dim=1, keepdim=True)  # no epsilon, as published


def _resnet(arch: str, pretrained: str) -> nn.Module:
    if arch not in ARCHS:
        raise ValueError(f"arch is {arch!r}: give one of {', '.join(ARCHS)}")
    resnet = torchvision.models.get_model(arch, weights=None)
    if pretrained != "none":
        state = _imagenet_weights(arch) if pretrained == "imagenet" else _weights_file(pretrained)
        try:
            resnet.load_state_dict(state)
        except (RuntimeError, TypeError, AttributeError):
            raise OSError(f"--pretrained {pretrained}: not the weights of torchvision's {arch}") from None
    for module in resnet.layer4[0].modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
    resnet.fc.requires_grad_(False)  # unused; stays for the sake of the published keys (FIDELITY 21)
    return resnet


def _imagenet_weights(arch: str) -> dict:
    weights = torchvision.models.get_model_weights(arch)["IMAGENET1K_V1"]
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except Exception as error:  # no network, a proxy's error page, a wrong hash: all have the same remedy
        folder = os.path.join(torch.hub.get_dir(), "checkpoints")
        raise OSError(
            f"ImageNet weights cannot be downloaded ({error}): put {weights.url} into {folder}, "
            "or give --pretrained FILE, or --pretrained none for random weights"
        ) from None


def _weights_file(path: str) -> dict:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--pretrained {path}: no such file; give 'imagenet', 'none' or a file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        raise OSError(
            f"--pretrained {path}: not a file of torchvision ResNet weights; give one, or 'imagenet' or 'none'"
        ) from None
