"""The network: a backbone per modality, six stripes, a head and a classifier per stripe (paper, section 3.2)."""

import copy
from collections import OrderedDict

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet


class MapResNet(ResNet):
    """torchvision's ResNet up to its feature map: (N, 3, height, width) -> (N, C, height / 16, width / 16), rounded up.

    layer4 has stride 1. ``fc`` is unused; it is kept for the keys of published checkpoints (FIDELITY 21).
    """

    def __init__(self, block: type[nn.Module], layers: list[int]):
        super().__init__(block, layers)
        for module in self.layer4[0].modules():
            if isinstance(module, nn.Conv2d):
                module.stride = (1, 1)
        self.fc.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


BACKBONES = {  # --arch, a name of torchvision's for its weights: how to make it, the channels of its feature map
    "resnet50": (lambda: MapResNet(Bottleneck, [3, 4, 6, 3]), 2048),
    "resnet18": (lambda: MapResNet(BasicBlock, [2, 2, 2, 2]), 512),
}


class EmbedNet(nn.Module):
    """Two backbones without shared weights, then stripe heads that both modalities share.

    The state_dict has the keys, shapes and order of the published checkpoints.

    Args:
        n_class: number of training persons (395 for SYSU-MM01, 206 for RegDB).
        low_dim: dimensions of a stripe's feature.
        drop: dropout rate before the classifiers; 0 leaves the layer out.
        arch: a key of `BACKBONES`.
        num_parts: number of horizontal stripes.
        pretrained: what both backbones start from: "imagenet" (torchvision's IMAGENET1K_V1, downloaded once), "none"
            (random weights, the same for both) or a file with a state_dict of torchvision's.

    ValueError: there is no such backbone. OSError: the pretrained weights cannot be had, or are of another network.
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
        if arch not in BACKBONES:
            raise ValueError(f"arch is {arch!r}: give one of {', '.join(BACKBONES)}")
        make, channels = BACKBONES[arch]
        backbone, self.num_parts = make(), num_parts
        if pretrained != "none":
            _load_pretrained(backbone, arch, pretrained)
        # The nested names are those of the published checkpoints.
        self.visible_net = nn.ModuleDict({"visible": backbone})
        self.thermal_net = nn.ModuleDict({"thermal": copy.deepcopy(backbone)})
        self.heads = [StripeHead(channels, low_dim) for _ in range(num_parts)]  # not a ModuleList: keys as published
        self.classifiers = [StripeClassifier(low_dim, n_class, drop) for _ in range(num_parts)]
        for name, modules in (("feature", self.heads), ("classifier", self.classifiers)):
            for i, module in enumerate(modules, 1):
                self.add_module(f"{name}{i}", module)

    def forward(self, visible: Tensor | None = None, thermal: Tensor | None = None) -> tuple:
        """Embed (N, 3, height, width) normalised visible images, thermal images, or both: then visible rows come first.

        Returns:
            In training (logits, feats): a (N, n_class) tensor and an L2-normalised (N, low_dim) tensor per stripe.
            In evaluation (pool5, fc): (N, num_parts * C) and (N, num_parts * low_dim), each stripe L2-normalised.

        ValueError: no images, or images not tall enough for the stripes.
        """
        stripes = _stripes(self.feature_maps(visible, thermal), self.num_parts)  # num_parts x (N, C)
        feats = [head(stripe) for head, stripe in zip(self.heads, stripes, strict=True)]  # num_parts x (N, low_dim)
        if not self.training:
            return torch.cat([*map(_l2_normalise, stripes)], dim=1), torch.cat([*map(_l2_normalise, feats)], dim=1)
        logits = [classify(feat) for classify, feat in zip(self.classifiers, feats, strict=True)]
        return logits, [_l2_normalise(feat) for feat in feats]

    def feature_maps(self, visible: Tensor | None = None, thermal: Tensor | None = None) -> Tensor:
        """(N, C, height / 16, width / 16), rounded up: the backbones' output, before the stripes are pooled."""
        sides = (self.visible_net["visible"], visible), (self.thermal_net["thermal"], thermal)
        maps = [backbone(images) for backbone, images in sides if images is not None]
        if not maps:
            raise ValueError("nothing to embed: give visible images, thermal images or both")
        return torch.cat(maps)


def to_device(net: EmbedNet, device: torch.device) -> EmbedNet:
    """Move a network to ``device``, in the memory format of the images."""
    return net.to(device, memory_format=torch.channels_last)


class StripeHead(nn.Sequential):
    """(N, C) pooled stripe -> (N, low_dim) feature."""

    def __init__(self, channels: int, low_dim: int):
        linear, norm = nn.Linear(channels, low_dim), nn.BatchNorm1d(low_dim)
        nn.init.kaiming_normal_(linear.weight, a=0, mode="fan_out")
        nn.init.zeros_(linear.bias)
        nn.init.normal_(norm.weight, 1.0, 0.01)
        nn.init.zeros_(norm.bias)
        super().__init__(OrderedDict(feat_block=nn.Sequential(linear, norm)))


class StripeClassifier(nn.Sequential):
    """(N, low_dim) feature -> (N, n_class) logits."""

    def __init__(self, low_dim: int, n_class: int, drop: float):
        linear = nn.Linear(low_dim, n_class)
        nn.init.normal_(linear.weight, std=0.001)
        nn.init.zeros_(linear.bias)
        dropout = [nn.Dropout(drop)] if drop > 0 else []
        super().__init__(OrderedDict(classifier=nn.Sequential(nn.LeakyReLU(0.1), *dropout, linear)))


def stripe_window(rows: int, num_parts: int = 6) -> tuple[int, int]:
    """Feature rows of a stripe, and rows to the next: stripes may overlap (FIDELITY 20). ValueError: too few rows."""
    if rows < num_parts:
        raise ValueError(f"images are too low for {num_parts} stripes: --img_h must be {16 * num_parts - 15} or more")
    stride = rows // num_parts
    return rows - (num_parts - 1) * stride, stride


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


def _load_pretrained(backbone: nn.Module, arch: str, pretrained: str) -> None:
    try:
        if pretrained == "imagenet":
            state = torchvision.models.get_model_weights(arch)["IMAGENET1K_V1"].get_state_dict(check_hash=True)
        else:
            state = torch.load(pretrained, map_location="cpu", weights_only=True)
        backbone.load_state_dict(state)
    except Exception as error:  # no network, a wrong hash, weights of another network: all have the same remedy
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise OSError(f"--pretrained {pretrained} cannot be loaded ({reason}): give none, a file of {arch} weights, "
                      f"or torchvision's IMAGENET1K_V1 in {torch.hub.get_dir()}/checkpoints") from error  # fmt: skip


def network_of(checkpoint: dict, path: str, drop: float | None = None) -> EmbedNet:
    """The network of the checkpoint read from ``path``; ``drop`` is the rate of its dropout, if the file does not say.

    OSError: it does not hold a network of this method.
    """
    try:
        config = checkpoint["config"]
        drop = (drop or 0.5) if config["drop"] is None else config["drop"]  # any rate: the layer must be there
        net = EmbedNet(config["n_class"], config["low_dim"], drop, config["arch"], pretrained="none")
        net.load_state_dict(checkpoint["net"])
        return net
    except Exception as error:  # whatever a stranger's file leads to
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise OSError(f"{path} does not hold a network of this method ({reason})") from error
