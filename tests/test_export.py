"""tools.export: exported networks, run by ONNX Runtime, beside those of PyTorch."""

import contextlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, RUN, run_here, small_net

import utils
from data_loader import read_image, to_input
from data_manager import DATASETS
from model import digest_of_weights, extract_features, load_network

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

SIZE = (96, 32)  # of the images of the fixture `sysu_run`
DIMS = {"fc": 6 * 16, "pool5": 6 * 32}
FILES = ("visible.onnx", "thermal.onnx", "export.json")


@pytest.fixture(scope="session")
def checkpoint(sysu_run) -> Path:
    return sysu_run["models"] / f"{RUN}_last.t"


@pytest.fixture(scope="session")
def exported(checkpoint, made_once) -> Path:
    """A folder of the tool; beside the files, screen.txt holds what it printed."""

    def make(folder: Path) -> None:
        with (
            open(folder / "screen.txt", "w") as screen,
            contextlib.redirect_stdout(screen),
            contextlib.redirect_stderr(screen),
        ):
            run_here("-m tools.export", checkpoint, "--out", folder)

    return made_once("exported", make)


class Program:
    """What torch.onnx.export returns, for a file of this content."""

    def __init__(self, content: bytes):
        self.model = SimpleNamespace(graph=[])
        self.content = content

    def save(self, path: str, external_data: bool) -> None:
        Path(path).write_bytes(self.content)


@pytest.fixture
def quick_export(exported, monkeypatch) -> None:
    """The tool copies the networks of the fixture `exported`, whatever its checkpoint is."""

    def copied(net, images, **options) -> Program:
        return Program((exported / f"{net.modality}.onnx").read_bytes())

    monkeypatch.setattr(torch.onnx, "export", copied)


def run_onnx(file: Path, images: np.ndarray) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    fc, pool5 = session.run(["fc", "pool5"], {"images": images})
    return {"fc": fc, "pool5": pool5}


def contents_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# ---- what is written ----------------------------------------------------------------------------


@pytest.mark.parametrize("modality", ["visible", "thermal"])
@pytest.mark.parametrize("n_images", [1, 3, 8])
def test_an_exported_network_computes_the_features_of_test_py(
    exported, checkpoint, sysu_run, modality, n_images
):
    test_images = DATASETS["sysu"].test(str(sysu_run["data"]), None)
    rows = np.flatnonzero(test_images.thermal == (modality == "thermal"))[:n_images]
    images = np.stack([read_image(test_images.paths[row], SIZE) for row in rows])
    assert len(np.unique(images.reshape(n_images, -1), axis=0)) == n_images

    net = load_network(utils.load_checkpoint(str(checkpoint)), str(checkpoint))
    batch = (modality, np.arange(n_images), to_input(torch.from_numpy(images), SIZE))
    expected = extract_features(net, [batch], n_images)
    features = run_onnx(exported / f"{modality}.onnx", images)
    for kind, dim in DIMS.items():
        assert features[kind].dtype == np.float32
        assert features[kind].shape == (n_images, dim)
        np.testing.assert_allclose(features[kind], expected[kind], rtol=0, atol=1e-5)
        lengths = np.linalg.norm(features[kind].reshape(n_images, 6, -1), axis=2)
        np.testing.assert_allclose(lengths, 1, rtol=0, atol=1e-5)


def test_the_description_says_what_the_files_take_and_give(exported, checkpoint):
    assert {file.name for file in exported.iterdir()} == {*FILES, "screen.txt"}
    content = json.loads((exported / "export.json").read_text())
    versions = content.pop("versions")
    differences = content.pop("largest_difference")
    net = load_network(utils.load_checkpoint(str(checkpoint)), str(checkpoint))
    assert content == {
        "files": {"visible": "visible.onnx", "thermal": "thermal.onnx"},
        "input": {
            "name": "images",
            "dimensions": ["N", 96, 32, 3],
            "layout": "NHWC",
            "dtype": "uint8",
            "channels": "RGB",
            "height": 96,
            "width": 32,
            "resize_filter": "Pillow's Lanczos",
            "normalisation": "inside the network",
        },
        "outputs": {
            "fc": {"dimensions": ["N", 96], "dtype": "float32", "stripes": 6},
            "pool5": {"dimensions": ["N", 192], "dtype": "float32", "stripes": 6},
        },
        "checkpoint": str(checkpoint),
        "weights": digest_of_weights(net),
        "opset": 18,
    }
    assert versions["onnxruntime"] == onnxruntime.__version__
    assert {"python", "torch", "commit", "onnx", "onnxscript"} < versions.keys()
    assert differences.keys() == {"visible", "thermal"}
    assert 0 <= max(differences.values()) < 1e-5


def test_the_files_themselves_name_what_they_take_and_give(exported):
    content = json.loads((exported / "export.json").read_text())
    for name in content["files"].values():
        session = onnxruntime.InferenceSession(exported / name)
        (image_input,) = session.get_inputs()
        assert image_input.name == content["input"]["name"]
        assert image_input.shape == content["input"]["dimensions"]
        assert image_input.type == "tensor(uint8)"
        outputs = {output.name: output.shape for output in session.get_outputs()}
        assert outputs == {
            kind: values["dimensions"] for kind, values in content["outputs"].items()
        }


def test_the_files_do_not_tell_the_folders_of_the_user(exported):
    for name in ("visible.onnx", "thermal.onnx"):
        assert str(ROOT).encode() not in (exported / name).read_bytes()


def test_the_screen_shows_the_differences_alone(exported):
    visible_line, thermal_line, last_line = (exported / "screen.txt").read_text().splitlines()
    assert visible_line.startswith("visible.onnx: largest difference from PyTorch ")
    assert thermal_line.startswith("thermal.onnx: largest difference from PyTorch ")
    assert last_line == f"visible.onnx, thermal.onnx, export.json: {exported}"


def test_a_checkpoint_without_the_size_of_its_images(
    quick_export, checkpoint, tmp_path, monkeypatch, output_of, error_of
):
    monkeypatch.setenv("HOME", str(tmp_path))
    content = utils.load_checkpoint(str(checkpoint))
    del content["config"]["img_h"]
    del content["config"]["img_w"]
    utils.save_checkpoint(str(tmp_path / "c.t"), content)
    output_of("-m tools.export", "~/c.t", "--out=~/onnx", "--img_h", 96, "--img_w", 32)
    description = json.loads((tmp_path / "onnx/export.json").read_text())
    assert description["input"]["dimensions"] == ["N", 96, 32, 3]

    small = ["--img-h", 80, "--img-w", 32]
    line = error_of("-m tools.export", tmp_path / "c.t", "--out", tmp_path / "onnx", *small)
    assert "images are not tall enough for --num-parts 6" in line


# ---- errors -------------------------------------------------------------------------------------


def test_a_network_that_differs_is_not_written(
    quick_export, exported, checkpoint, sysu_run, tmp_path, error_of
):
    """The file holds other weights than the checkpoint."""
    untrained = tmp_path / "untrained.t"
    content = utils.load_checkpoint(str(checkpoint))
    net = load_network(content, "")
    torch.nn.init.normal_(net.feature1.feat_block[0].weight)
    utils.save_checkpoint(str(untrained), content | {"net": net.state_dict()})
    out = tmp_path / "onnx"
    out.mkdir()
    for name in FILES:
        shutil.copyfile(exported / name, out / name)
    before = contents_of(out)
    line = error_of("-m tools.export", untrained, "--out", out)
    assert f"{out}/visible.onnx is not written: its features differ from PyTorch's by" in line
    assert contents_of(out) == before

    new_folder = tmp_path / "new"
    error_of("-m tools.export", untrained, "--out", new_folder)
    assert not list(new_folder.iterdir())


@pytest.mark.parametrize("bad_modality", ["visible", "thermal"])
def test_features_that_are_not_numbers_are_no_success(
    quick_export, checkpoint, tmp_path, monkeypatch, error_of, bad_modality
):
    class BrokenSession:
        def __init__(self, path: str, providers: list[str]):
            self.session = Session(path, providers=providers)
            self.is_broken = bad_modality in path

        def run(self, names: list[str], inputs: dict) -> list[np.ndarray]:
            features = self.session.run(names, inputs)
            if self.is_broken:
                features[0][0, 0] = np.nan
            return features

    Session = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", BrokenSession)
    line = error_of("-m tools.export", checkpoint, "--out", tmp_path / "onnx")
    assert f"{bad_modality}.onnx is not written: its features differ from PyTorch's by nan" in line
    assert not list((tmp_path / "onnx").iterdir())


def test_a_network_that_onnx_runtime_cannot_run(checkpoint, tmp_path, monkeypatch, error_of):
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: Program(b"not a network"))
    line = error_of("-m tools.export", checkpoint, "--out", tmp_path / "onnx")
    assert f"onnxruntime {onnxruntime.__version__} cannot run the exported network (" in line
    assert line.endswith("): pip install --upgrade -r requirements-export.txt")


def test_an_interrupted_run_leaves_the_older_files(
    exported, checkpoint, tmp_path, monkeypatch, output_of
):
    def interrupt(*args, **options) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "onnx"
    shutil.copytree(exported, out)
    before = contents_of(out)
    monkeypatch.setattr(torch.onnx, "export", interrupt)
    with pytest.raises(SystemExit) as stop:
        output_of("-m tools.export", checkpoint, "--out", out)
    assert stop.value.code == 130
    assert contents_of(out) == before


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_told_first(tmp_path, monkeypatch, error_of, package):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    line = error_of("-m tools.export", tmp_path / "none.t", "--out", tmp_path / "onnx")
    assert f"the package {package} cannot be imported" in line
    assert line.endswith("): pip install -r requirements-export.txt")
    assert not (tmp_path / "onnx").exists()


def test_checkpoints_that_cannot_be_exported(checkpoint, tmp_path, error_of):
    missing = tmp_path / "none.t"
    other_method = tmp_path / "other.t"
    torch.save({"conv1.weight": torch.zeros(1)}, other_method)
    broken = tmp_path / "broken.t"
    net = small_net()
    torch.nn.init.constant_(net.feature1.feat_block[0].bias, float("nan"))
    utils.save_checkpoint(str(broken), {"net": net.state_dict()})
    size = ["--img-h", 96, "--img-w", 32]
    for flags, message in (
        ([missing], f"{missing} not found"),
        ([other_method], f"{other_method} does not hold a network of this method"),
        ([broken, *size], "fc features of visible images are not finite"),
        ([checkpoint, "--img-h", 288, "--img-w", 144], "was trained with images of 96 x 32"),
        ([checkpoint, "--img-h", 96], "--img-h and --img-w go together"),
    ):
        line = error_of("-m tools.export", *flags, "--out", tmp_path / "onnx")
        assert message in line
