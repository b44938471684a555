"""The network: a backbone per modality; a shared head and classifier per stripe (section 3.2)."""

# "FIDELITY n" in docstrings and comments is row n of docs/FIDELITY.md.

import copy
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import utils
from utils import InputError

FEATURE_KINDS = ("fc", "pool5")  # the outputs of the heads; the stripes before them
PUBLISHED_SIZE = (288, 144)  # height and width of images; published checkpoints do not record it

log = logging.getLogger(__name__)


# ---- backbones ----------------------------------------------------------------------------------


class ResNetTrunk(ResNet):
    """torchvision's ResNet up to its feature map, with stride 1 in layer4.

    (N, 3, height, width) -> (N, C, height / 16, width / 16), rounded up. ``fc``,
    its ImageNet classifier, is unused: it is kept for the keys of published checkpoints
    (FIDELITY 21).
    """

    def __init__(self, block: type[nn.Module], layers: list[int]):
        super().__init__(block, layers)
        # The block has one convolution with stride 2, and its shortcut another.
        for module in self.layer4[0].modules():
            if isinstance(module, nn.Conv2d):
                module.stride = (1, 1)
        self.fc.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.maxpool(x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        return self.layer4(x)


@dataclass(frozen=True)
class Backbone:
    """How to make a backbone, and where its pretrained weights come from."""

    # (N, 3, height, width) images -> (N, C, rows, columns) maps; rows = height / 16, rounded up.
    build: Callable[[], nn.Module]
    channels: int  # C
    imagenet_weights: Callable[[], dict[str, Tensor]]  # its state_dict, trained on ImageNet


def torchvision_weights(weights: torchvision.models.WeightsEnum) -> dict[str, Tensor]:
    """Return the state_dict of some torchvision weights, downloaded once."""
    return weights.get_state_dict(check_hash=True)


BACKBONES = {  # by --arch
    "resnet50": Backbone(
        build=partial(ResNetTrunk, Bottleneck, [3, 4, 6, 3]),
        channels=2048,
        imagenet_weights=partial(
            torchvision_weights, torchvision.models.ResNet50_Weights.IMAGENET1K_V1
        ),
    ),
    "resnet18": Backbone(
        build=partial(ResNetTrunk, BasicBlock, [2, 2, 2, 2]),
        channels=512,
        imagenet_weights=partial(
            torchvision_weights, torchvision.models.ResNet18_Weights.IMAGENET1K_V1
        ),
    ),
}


def build_backbone(arch: str, pretrained: str) -> nn.Module:
    """Build a backbone with pretrained weights.

    Args:
        arch: a key of `BACKBONES`.
        pretrained: "imagenet", "none" (random weights) or a file with a state_dict.

    Raises:
        InputError: there is no such backbone; the weights are missing, or of another network.
    """
    if arch not in BACKBONES:
        raise InputError(f"--arch {arch}: give one of {', '.join(BACKBONES)}")
    backbone = BACKBONES[arch].build()
    if pretrained == "none":
        return backbone
    if pretrained == "imagenet":
        weights = download_weights(arch)
    else:
        try:
            weights = utils.read_torch_file(pretrained)
        except InputError as error:
            raise InputError(f"--pretrained {pretrained}: {error}") from error
    try:
        backbone.load_state_dict(weights)
    except (TypeError, RuntimeError, AttributeError) as error:  # the weights of another network
        if utils.resource_advice(error):
            raise
        reason = utils.short_reason(error)
        raise InputError(
            f"--pretrained {pretrained} does not hold {arch} weights ({reason})"
        ) from error
    return backbone


def download_weights(arch: str) -> dict[str, Tensor]:
    try:
        return BACKBONES[arch].imagenet_weights()
    except (OSError, RuntimeError) as error:  # no network, no disk space, a wrong hash
        if utils.resource_advice(error):
            raise
        folder = f"{torch.hub.get_dir()}/checkpoints"
        reason = utils.short_reason(error)
        raise InputError(
            f"--pretrained imagenet: the weights of {arch} cannot be downloaded ({reason}): put "
            f"torchvision's IMAGENET1K_V1 into {folder}, or give --pretrained FILE or none"
        ) from error


# ---- the network --------------------------------------------------------------------------------


class EmbedNet(nn.Module):
    """Two backbones without shared weights, then stripe heads that both modalities share.

    The state_dict has the keys, shapes and order of the published checkpoints. The heads are
    ``feature1``, ``feature2``, ..., the classifiers ``classifier1``, .... To replace one, assign a
    module with the same input and output sizes.

    Args:
        n_class: number of training persons (395 for SYSU-MM01, 206 for RegDB).
        low_dim: dimensions of a stripe's feature.
        drop: dropout rate before the classifiers; 0 leaves the layer out.
        arch: a key of `BACKBONES`.
        num_parts: number of horizontal stripes.
        pretrained: the weights that both backbones start from, as `build_backbone` takes it. They
            are the same for both, even if they are random.

    Raises:
        InputError: there is no such backbone, or its pretrained weights cannot be loaded.
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
        backbone = build_backbone(arch, pretrained)
        channels = BACKBONES[arch].channels
        self.feature_dims = {"fc": num_parts * low_dim, "pool5": num_parts * channels}
        # The names of modules are those of the published checkpoints.
        self.visible_net = nn.ModuleDict({"visible": backbone})
        self.thermal_net = nn.ModuleDict({"thermal": copy.deepcopy(backbone)})
        for i in range(1, num_parts + 1):
            self.add_module(f"feature{i}", StripeHead(channels, low_dim))
        for i in range(1, num_parts + 1):
            self.add_module(f"classifier{i}", StripeClassifier(low_dim, n_class, drop))

    @property
    def heads(self) -> list[nn.Module]:
        """The head of each stripe, from the top of the image down."""
        return [getattr(self, f"feature{i}") for i in range(1, self.num_parts + 1)]

    @property
    def classifiers(self) -> list[nn.Module]:
        """The classifier of each stripe, from the top of the image down."""
        return [getattr(self, f"classifier{i}") for i in range(1, self.num_parts + 1)]

    def forward(
        self, visible: Tensor | None = None, thermal: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor]] | tuple[Tensor, Tensor]:
        """Embed visible images, thermal images, or both: visible rows come first, then thermal.

        Args:
            visible, thermal: (N, 3, height, width) normalised images.

        Returns:
            In training (logits, feats): num_parts x (N, n_class) and num_parts x (N, low_dim), the
            features L2-normalised. In evaluation (pool5, fc): (N, num_parts * C) and
            (N, num_parts * low_dim), each stripe L2-normalised.

        Raises:
            InputError: no images, or images not tall enough for the stripes.
        """
        maps = self.feature_maps(visible, thermal)  # (N, C, rows, columns)
        stripes = pool_stripes(maps, self.num_parts)  # num_parts x (N, C)
        feats = [head(stripe) for head, stripe in zip(self.heads, stripes, strict=True)]
        if self.training:
            logits = [
                classifier(feat) for classifier, feat in zip(self.classifiers, feats, strict=True)
            ]
            return logits, [l2_normalise(feat) for feat in feats]
        pool5 = torch.cat([l2_normalise(stripe) for stripe in stripes], dim=1)
        fc = torch.cat([l2_normalise(feat) for feat in feats], dim=1)
        return pool5, fc

    def feature_maps(self, visible: Tensor | None = None, thermal: Tensor | None = None) -> Tensor:
        """The backbones' output, (N, C, height / 16, width / 16), rounded up."""
        maps = []
        if visible is not None:
            maps.append(self.visible_net["visible"](visible))
        if thermal is not None:
            maps.append(self.thermal_net["thermal"](thermal))
        if not maps:
            raise InputError("nothing to embed: give visible images, thermal images or both")
        return torch.cat(maps)


class StripeHead(nn.Sequential):
    """(N, C) pooled stripe -> (N, low_dim) feature."""

    def __init__(self, channels: int, low_dim: int):
        linear = nn.Linear(channels, low_dim)
        nn.init.kaiming_normal_(linear.weight, a=0, mode="fan_out")
        nn.init.zeros_(linear.bias)
        norm = nn.BatchNorm1d(low_dim)
        nn.init.normal_(norm.weight, 1.0, 0.01)
        nn.init.zeros_(norm.bias)
        super().__init__(OrderedDict(feat_block=nn.Sequential(linear, norm)))


class StripeClassifier(nn.Sequential):
    """(N, low_dim) feature -> (N, n_class) logits."""

    def __init__(self, low_dim: int, n_class: int, drop: float):
        linear = nn.Linear(low_dim, n_class)
        nn.init.normal_(linear.weight, std=0.001)
        nn.init.zeros_(linear.bias)
        layers = [nn.LeakyReLU(0.1)]
        if drop > 0:
            layers.append(nn.Dropout(drop))
        layers.append(linear)
        super().__init__(OrderedDict(classifier=nn.Sequential(*layers)))


def stripe_window(rows: int, num_parts: int = 6) -> tuple[int, int]:
    """Return (height, stride) of the stripes, in rows of the feature map.

    Stripes overlap where ``num_parts`` does not divide ``rows`` (FIDELITY 20).

    Raises:
        InputError: there are fewer rows than stripes.
    """
    if rows < num_parts:
        least_height = 16 * num_parts - 15  # the backbone makes one row of 16 pixels, rounded up
        raise InputError(
            f"images are not tall enough for --num-parts {num_parts}: they give {rows} rows of "
            f"features; --img-h must be {least_height} or more"
        )
    stride = rows // num_parts
    height = rows - (num_parts - 1) * stride
    return height, stride


def pool_stripes(maps: Tensor, num_parts: int) -> tuple[Tensor, ...]:
    """(N, C, rows, columns) maps -> num_parts x (N, C): the mean of each horizontal stripe."""
    # The order (N, rows, columns, C) keeps the gradient of channels_last maps channels_last.
    row_means = maps.permute(0, 2, 3, 1).mean(2)  # (N, rows, C)
    height, stride = stripe_window(row_means.shape[1], num_parts)
    if height == stride:
        # The same result as below; torch.compile generates faster code for it.
        stripes = row_means.unflatten(1, (num_parts, height)).mean(2)  # (N, num_parts, C)
    else:
        windows = row_means.unfold(1, height, stride)  # (N, num_parts, C, height)
        stripes = windows.mean(3)
    return stripes.unbind(1)


def l2_normalise(x: Tensor) -> Tensor:
    """(..., dim) -> (..., dim) of length 1, in float32 or wider."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))  # autocast makes it half precision
    return x / x.norm(dim=-1, keepdim=True)  # without an epsilon, as in the original code


def to_device(net: EmbedNet, device: torch.device) -> EmbedNet:
    """Move a network to ``device``, in the memory format of the images."""
    return net.to(device, memory_format=utils.memory_format(device))


# ---- checkpoints, features ----------------------------------------------------------------------


def load_network(checkpoint: dict, path: str, drop: float | None = None) -> EmbedNet:
    """Build the network of a checkpoint, with its weights.

    Args:
        checkpoint: what `utils.load_checkpoint` read from ``path``.
        path: for errors.
        drop: the rate of dropout, for published checkpoints, which do not record it.

    Raises:
        InputError: the checkpoint does not hold a network of this method.
    """
    config = checkpoint["config"]
    for name in ("n_class", "low_dim", "arch", "num_parts"):
        if name not in config:
            first_weights = ", ".join(list(checkpoint["net"])[:3]) or "none"
            raise InputError(
                f"{path} does not hold a network of this method, but another one or a part: it "
                f"lacks the weights of the classifiers (its first weights: {first_weights})"
            )
    if config["arch"] not in BACKBONES:
        raise InputError(
            f"{path} holds a network of another backbone, {config['arch']}: give another file"
        )
    rate = config.get("drop")
    if rate is None:
        rate = drop or 0.5  # any: the keys need the layer, and testing does not use its rate
    net = EmbedNet(
        config["n_class"],
        config["low_dim"],
        rate,
        config["arch"],
        config["num_parts"],
        pretrained="none",
    )
    try:
        net.load_state_dict(checkpoint["net"])
    except Exception as error:  # malformed weights make PyTorch raise many types
        if utils.resource_advice(error):
            raise
        reason = utils.short_reason(error)
        raise InputError(f"{path} does not hold a network of this method ({reason})") from error
    return net


def image_size(
    checkpoint: dict, path: str, requested_size: tuple[int, int] | None = None
) -> tuple[int, int]:
    """Return the (height, width) of a network's images.

    Args:
        checkpoint: what `utils.load_checkpoint` read from ``path``. Published ones record no size.
        path: for messages.
        requested_size: used if the checkpoint records no size; by default 288 x 144.

    Raises:
        InputError: the checkpoint records another size than the requested one.
    """
    config = checkpoint["config"]
    if "img_h" not in config or "img_w" not in config:
        if requested_size is None:
            log.warning(
                "%s does not record the size of its images: %d x %d (height x width) is used; "
                "--img-h and --img-w (in Python: size) choose another",
                path,
                *PUBLISHED_SIZE,
            )
        return requested_size or PUBLISHED_SIZE
    size = (config["img_h"], config["img_w"])
    if requested_size is not None and tuple(requested_size) != size:
        raise InputError(
            f"{path} was trained with images of {size[0]} x {size[1]} (height x width), "
            f"not {requested_size[0]} x {requested_size[1]}: leave --img-h and --img-w (in Python: "
            "size) out"
        )
    return size


def digest_of_weights(net: EmbedNet) -> str:
    """Return the SHA-256 of a network's weights and their names."""
    digest = hashlib.sha256()
    for name, tensor in net.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def extract_features(
    net: EmbedNet,
    batches: Iterable[tuple[str, np.ndarray, Tensor]],
    n_images: int,
    kinds: tuple[str, ...] = FEATURE_KINDS,
    flip: bool = False,
    gather_ranks: bool = True,
) -> dict[str, np.ndarray]:
    """Embed images. Each rank embeds its own ``batches``, and gets the features of all images.

    Args:
        net: the network, in any mode; it is evaluated, without autocast.
        batches: yields (modality, indices, images). The modality is "visible" or "thermal". The
            indices, a (B,) int array, are the positions of the images among the ``n_images``. The
            images are (B, 3, height, width), normalised, on the device of ``net``.
        n_images: the total number of images, over all ranks.
        kinds: the kinds of features to return.
        flip: average the features of each image and its mirror image, stripe by stripe.
        gather_ranks: add up the features of all ranks; False: this process has all images.

    Returns:
        {"fc": (n_images, num_parts * low_dim), "pool5": (n_images, num_parts * C)}, float32 or
        wider. Rows of images that no batch holds are zero.

    Raises:
        InputError: a feature is not finite.
    """
    dtype = torch.promote_types(next(net.parameters()).dtype, torch.float32)
    features = {kind: torch.zeros(n_images, net.feature_dims[kind], dtype=dtype) for kind in kinds}
    was_training = net.training
    net.eval()
    for modality, indices, images in batches:
        embedded = embed(net, modality, images)
        if flip:
            mirrored = embed(net, modality, images.flip(3))
            for kind in kinds:
                both = embedded[kind] + mirrored[kind]
                stripes = both.unflatten(1, (net.num_parts, -1))
                embedded[kind] = l2_normalise(stripes).flatten(1)
        for kind in kinds:
            values = embedded[kind].cpu()
            if not values.isfinite().all():
                raise InputError(
                    f"{kind} features of {modality} images are not finite: the weights are broken, "
                    "give another checkpoint"
                )
            features[kind][torch.from_numpy(indices)] = values
    net.train(was_training)
    if gather_ranks and utils.is_distributed():
        for values in features.values():
            dist.all_reduce(values)  # each row is zero on all ranks but one
    return {kind: values.numpy() for kind, values in features.items()}


def embed(net: EmbedNet, modality: str, images: Tensor) -> dict[str, Tensor]:
    """(B, 3, height, width) images of one modality -> {"pool5": (B, ...), "fc": (B, ...)}."""
    if modality == "visible":
        pool5, fc = net(visible=images)
    else:
        pool5, fc = net(thermal=images)
    return {"pool5": pool5, "fc": fc}
