"""Export a trained network to ONNX, a file for each modality, and compare both with PyTorch.

    pip install -r requirements-export.txt
    python -m tools.export CHECKPOINT --out DIR

The tool writes to --out:

    visible.onnx    the network for visible images
    thermal.onnx    the network for infrared images
    export.json     what the networks take and give, and the checkpoint that they are made of

A network takes ``images``, (N, height, width, 3) uint8, RGB; N is 1 or more. It gives the features
of test.py, ``fc`` and ``pool5``: (N, dim) float32, L2-normalised stripe by stripe. Values are
normalised inside the network. Images are resized outside of it, by the Lanczos filter of Pillow;
infrared images in one channel are given as three equal ones. In Python:

    images = np.stack([data_loader.read_image(path, (288, 144)) for path in paths])
    session = onnxruntime.InferenceSession("DIR/visible.onnx")
    fc, pool5 = session.run(["fc", "pool5"], {"images": images})

Before the files appear, ONNX Runtime computes features of random images on the CPU. If one of their
values differs from that of PyTorch by more than 0.0001, the tool fails and writes nothing.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import io
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

# `python tools/export.py` would search for modules in tools/ alone.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from data_loader import mean_and_std_rows, to_input
from model import (
    FEATURE_KINDS,
    EmbedNet,
    digest_of_weights,
    embed,
    extract_features,
    image_size,
    load_network,
    to_device,
)
from utils import InputError

PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # requirements of this tool alone
MODALITIES = ("visible", "thermal")
INPUT_NAME = "images"
DESCRIPTION_FILE = "export.json"
OPSET = 18  # the exporter's own version of ONNX; others go through a converter
STACK_TRACE = "pkg.torch.onnx.stack_trace"  # metadata of a node that would reveal folders
TRACED_IMAGES = 2
COMPARED_IMAGES = 8  # differs from TRACED_IMAGES: the number of images must be free
MAX_DIFFERENCE = 1e-4
CPU = torch.device("cpu")

log = logging.getLogger(__name__)


# ---- flags --------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = utils.new_parser(__doc__)
    utils.add_checkpoint_flags(parser)
    out_help = "folder to write to"
    parser.add_argument("--out", type=utils.file_path, required=True, metavar="DIR", help=out_help)
    return parser


def check_packages() -> None:
    """Raise InputError if a package that this tool alone needs cannot be imported."""
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise InputError(
                f"the package {name} cannot be imported ({utils.short_reason(error)}): "
                "pip install -r requirements-export.txt"
            ) from error


# ---- one file -----------------------------------------------------------------------------------


class ExportedNet(nn.Module):
    """The network of one modality with the normalisation of its images, in evaluation mode.

    Args:
        net: the network, on the CPU.
        modality: "visible" or "thermal".
        size: (height, width) of the images.
    """

    def __init__(self, net: EmbedNet, modality: str, size: tuple[int, int]):
        super().__init__()
        self.net = net
        self.modality = modality
        self.size = size
        self.eval()
        # Fills the cache of this function: if tracing filled it, it would hold symbolic tensors.
        mean_and_std_rows(size[1], CPU)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(N, height, width, 3) uint8 images -> the features in the order of `FEATURE_KINDS`."""
        features = embed(self.net, self.modality, to_input(images, self.size))
        return tuple(features[kind] for kind in FEATURE_KINDS)


def noise_images(n_images: int, size: tuple[int, int]) -> np.ndarray:
    """Return (n_images, height, width, 3) uint8 noise, the same at each call."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (n_images, *size, 3), np.uint8)


def write_onnx(path: str, net: EmbedNet, modality: str, size: tuple[int, int]) -> None:
    """Write the network of one modality, weights included, for any number of images."""
    with without_messages():
        program = torch.onnx.export(
            ExportedNet(net, modality, size),
            (torch.from_numpy(noise_images(TRACED_IMAGES, size)),),
            input_names=[INPUT_NAME],
            output_names=list(FEATURE_KINDS),
            opset_version=OPSET,
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("N")},),
            verbose=False,
        )
        for node in program.model.graph:
            node.metadata_props.pop(STACK_TRACE, None)
        program.save(path, external_data=False)


@contextlib.contextmanager
def without_messages() -> Iterator[None]:
    """Hide printed lines, warnings, and log lines below errors: the exporter has many."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def features_of_pytorch(net: EmbedNet, modality: str, images: np.ndarray) -> dict[str, np.ndarray]:
    """Embed (N, height, width, 3) uint8 images as test.py does; return (N, dim) of each kind."""
    n_images = len(images)
    size = images.shape[1:3]
    batch = (modality, np.arange(n_images), to_input(torch.from_numpy(images), size))
    return extract_features(net, [batch], n_images)


def features_of_onnx(path: str, images: np.ndarray) -> dict[str, np.ndarray]:
    """Embed (N, height, width, 3) uint8 images with ONNX Runtime; return (N, dim) of each kind.

    Raises:
        InputError: ONNX Runtime cannot run the file.
    """
    import onnxruntime  # `check_packages` says what is missing

    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        features = session.run(list(FEATURE_KINDS), {INPUT_NAME: images})
    except Exception as error:  # it raises a type of its own for each kind of failure
        if utils.resource_advice(error):
            raise
        raise InputError(
            f"onnxruntime {onnxruntime.__version__} cannot run the exported network "
            f"({utils.short_reason(error)}): pip install --upgrade -r requirements-export.txt"
        ) from error
    return dict(zip(FEATURE_KINDS, features, strict=True))


def largest_difference(
    features: dict[str, np.ndarray], expected_features: dict[str, np.ndarray]
) -> float:
    """Return the largest difference of two values, over all kinds; NaN if one is NaN."""
    differences = []
    for kind, expected in expected_features.items():
        differences.append(np.abs(features[kind] - expected).max())
    return float(np.max(differences))


# ---- the folder ---------------------------------------------------------------------------------


def onnx_file(modality: str) -> str:
    return f"{modality}.onnx"


def describe(net: EmbedNet, checkpoint_path: str, size: tuple[int, int]) -> dict:
    """Return what a program that uses the files must know, for export.json."""
    height, width = size
    outputs = {}
    for kind in FEATURE_KINDS:
        outputs[kind] = {
            "dimensions": ["N", net.feature_dims[kind]],
            "dtype": "float32",
            "stripes": net.num_parts,  # each has an equal part of the dimensions, of length 1
        }
    return {
        "files": {modality: onnx_file(modality) for modality in MODALITIES},
        "input": {
            "name": INPUT_NAME,
            "dimensions": ["N", height, width, 3],
            "layout": "NHWC",
            "dtype": "uint8",
            "channels": "RGB",
            "height": height,
            "width": width,
            "resize_filter": "Pillow's Lanczos",
            "normalisation": "inside the network",
        },
        "outputs": outputs,
        "checkpoint": checkpoint_path,
        "weights": digest_of_weights(net),
        "opset": OPSET,
        "versions": all_versions(),
    }


def all_versions() -> dict[str, str]:
    """Return the versions of `utils.versions`, and those of this tool's own packages."""
    own_versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return utils.versions() | own_versions


def write_files(out: str, net: EmbedNet, size: tuple[int, int], description: dict) -> None:
    """Write and compare all files; they replace older ones together, at the end.

    Args:
        out: the folder, which exists.
        net: the network, on the CPU.
        size: (height, width) of the images.
        description: for export.json; the largest differences are added.

    Raises:
        InputError: a file does not compute the features of PyTorch, or cannot be run.
    """
    images = noise_images(COMPARED_IMAGES, size)
    differences = {}
    with contextlib.ExitStack() as stack:
        description_path = os.path.join(out, DESCRIPTION_FILE)
        partial_description = stack.enter_context(utils.atomic_write(description_path))
        for modality in MODALITIES:
            path = os.path.join(out, onnx_file(modality))
            partial = stack.enter_context(utils.atomic_write(path))
            # First: images that are not tall enough, or broken weights, end the tool here.
            expected_features = features_of_pytorch(net, modality, images)
            write_onnx(partial, net, modality, size)
            features = features_of_onnx(partial, images)
            difference = largest_difference(features, expected_features)
            log.info("%s: largest difference from PyTorch %.1e", onnx_file(modality), difference)
            if math.isnan(difference) or difference > MAX_DIFFERENCE:
                raise InputError(
                    f"{path} is not written: its features differ from PyTorch's by "
                    f"{difference:.1e}, and {MAX_DIFFERENCE:.0e} is allowed: install other "
                    f"versions of {', '.join(PACKAGES)}"
                )
            differences[modality] = difference
        utils.write_json(partial_description, description | {"largest_difference": differences})


def main() -> None:
    args = utils.parse(build_parser())
    if utils.is_distributed():
        raise InputError("tools.export is one process: start it without torchrun")
    requested_size = utils.size_of_flags(args)
    check_packages()
    utils.start_log(args)
    checkpoint = utils.load_checkpoint(args.checkpoint)
    size = image_size(checkpoint, args.checkpoint, requested_size)
    net = to_device(load_network(checkpoint, args.checkpoint), CPU)
    utils.make_writable_folder(args.out, "give another --out")
    write_files(args.out, net, size, describe(net, args.checkpoint, size))
    log.info("%s, %s: %s", ", ".join(map(onnx_file, MODALITIES)), DESCRIPTION_FILE, args.out)


if __name__ == "__main__":
    utils.run(main)
