"""The whole way as a user goes it, on all datasets, and the published commands."""

import io
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import RUN, RUN_FLAGS, TINY, folder_flags, only_json, read_all, rows_of

import model
import test
import train
import utils
from data_manager import DATASETS
from model import EmbedNet, load_network


@pytest.fixture(scope="module")
def short_regdb(regdb_tree, tmp_path_factory) -> Path:
    """The synthetic RegDB with two test images of each person and modality: enough to score.

    Its folders are symbolic links: that must work, too.
    """
    tree = tmp_path_factory.mktemp("short") / "RegDB"
    shutil.copytree(regdb_tree / "idx", tree / "idx")
    (tree / "Visible").symlink_to(regdb_tree / "Visible")
    (tree / "Thermal").symlink_to(regdb_tree / "Thermal")
    for file in (tree / "idx").glob("test_*.txt"):
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(lines[::5]))
    return tree


def lines_with(start: str, text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


# ---- what a training leaves ---------------------------------------------------------------------


def test_training_leaves_checkpoints_metrics_and_a_log(sysu_run):
    checkpoints = read_all(sysu_run["models"])
    last = checkpoints[f"{RUN}_last.t"]
    best = checkpoints[f"{RUN}_best.t"]
    assert last["epoch"] == 3
    assert best["epoch"] == 2  # of the epochs 0 to 3 only 2 is tested
    assert best["best"] == {"rank1": best["cmc"][0], "mAP": best["mAP"], "epoch": 2}
    assert last["best"] == best["best"]
    assert len(best["cmc"]) == 20
    assert last["config"]["n_class"] == 10
    assert last["config"]["w_hc"] == 0.6

    metrics = read_all(sysu_run["logs"])[f"{RUN}/metrics.jsonl"]
    assert last["metrics"] == metrics
    assert [line["epoch"] for line in metrics] == [0, 1, 2, 3]
    assert metrics[3]["loss"] < metrics[0]["loss"]
    assert ["fc_rank1" in line for line in metrics] == [False, False, True, False]
    assert metrics[2]["fc_rank1"] == best["cmc"][0]
    assert metrics[2]["fc_mAP"] == best["mAP"]

    log = (sysu_run["logs"] / f"{RUN}.log").read_text()
    logged_losses = re.findall(r"epoch +\d step .*loss ([\d.]+)", log)
    assert logged_losses == [f"{line['loss']:.4f}" for line in metrics]
    assert "low_dim=16" in log
    assert f"torch={torch.__version__.partition('+')[0]}" in log
    assert "test fc" in log


def test_a_checkpoint_holds_what_is_promised_and_no_more(sysu_run):
    last = torch.load(sysu_run["models"] / f"{RUN}_last.t", weights_only=True)
    assert list(last) == [
        "net",
        "epoch",
        "cmc",
        "mAP",
        "best",
        "metrics",
        "optimizer",
        "scaler",
        "config",
    ]


def test_a_line_of_metrics_has_the_names_that_tools_read(sysu_run):
    metrics = read_all(sysu_run["logs"])[f"{RUN}/metrics.jsonl"]
    training = ["epoch", "lr", "loss", "CE", "HC", "accuracy"]
    assert list(metrics[3]) == training
    tested = []
    for kind in ("fc", "pool5"):
        for name in ("rank1", "rank5", "rank10", "rank20", "mAP", "mINP"):
            tested.append(f"{kind}_{name}")
        tested.append(f"{kind}_trial_own_center_distance")
        tested.append(f"{kind}_trial_other_center_distance")
    assert sorted(metrics[2]) == sorted(training + tested)


def test_the_last_line_names_the_command_to_run_next(output_of, sysu_run, tmp_path, monkeypatch):
    """It runs from any folder, word for word."""
    # Other tests, of errors, may have added lines to this log.
    log = (sysu_run["logs"] / f"{RUN}.log").read_text()
    command = re.search("score it: python (.*)", log)[1]
    words = shlex.split(command)
    words[words.index("--log-path") + 1] = tmp_path
    monkeypatch.chdir(tmp_path)
    assert "indoor-search multi-shot" in output_of(*words, "--workers", 0)


def test_test_only_repeats_the_score_of_training(output_of, sysu_run, tmp_path):
    best = sysu_run["models"] / f"{RUN}_best.t"
    flags = [*RUN_FLAGS, *folder_flags(sysu_run["data"], tmp_path), "--test-only"]
    out = output_of("train.py", *flags, "--resume", best)
    log = (sysu_run["logs"] / f"{RUN}.log").read_text()
    test_lines = lines_with("test ", log)
    assert len(test_lines) == 2  # fc and pool5, of epoch 2
    assert lines_with("test ", out) == test_lines
    assert not list(tmp_path.glob("*.t"))


def test_training_goes_on_without_tensorboard(output_of, sysu_tree, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # then its import fails
    flags = [*TINY, *folder_flags(sysu_tree, tmp_path), "--epochs", 0, "--tensorboard"]
    out = output_of("train.py", *flags)
    assert "warning: TensorBoard is not installed" in out
    assert len(list(tmp_path.glob("*_last.t"))) == 1


# ---- SYSU-MM01 ----------------------------------------------------------------------------------


def test_all_protocols_at_once(output_of, sysu_run, tmp_path):
    """The flags are spelt in the other way, too."""
    flags = ["--data-path", sysu_run["data"], "--model-path", sysu_run["models"]]
    flags += [f"--log-path={tmp_path}", "--resume", f"{RUN}_best.t"]
    flags += ["--test_batch", 16, "--workers", 0, "--mode", "both", "--gall_mode", "both"]
    features_file = tmp_path / "features.npz"
    out = output_of("test.py", *flags, "--save_features", features_file)
    rows = rows_of(only_json(tmp_path))
    expected_keys = []
    for mode in ("all", "indoor"):
        for shots in ("single", "multi"):
            for kind in ("fc", "pool5", "chance"):
                expected_keys.append((f"{mode}-search {shots}-shot", kind))
    assert list(rows) == expected_keys

    # Trial 0 has the gallery that training tests on.
    trained = utils.load_checkpoint(str(sysu_run["models"] / f"{RUN}_best.t"))
    trials = rows["all-search single-shot", "fc"]["trials"]
    np.testing.assert_allclose(trials[0]["cmc"], trained["cmc"])
    np.testing.assert_allclose(trials[0]["mAP"], trained["mAP"])

    # Trials draw different galleries.
    numbers_of_scores = []
    for (_, kind), row in rows.items():
        if kind != "chance":
            numbers_of_scores.append(len({trial["mAP"] for trial in row["trials"]}))
    assert max(numbers_of_scores) > 1

    row = rows["indoor-search multi-shot", "pool5"]
    rank1_of_trials = [trial["cmc"][0] for trial in row["trials"]]
    mAP_of_trials = [trial["mAP"] for trial in row["trials"]]
    np.testing.assert_allclose(row["mean"]["rank1"], np.mean(rank1_of_trials))
    np.testing.assert_allclose(row["std"]["mAP"], np.std(mAP_of_trials))
    assert f"{100 * row['mean']['mAP']:.2f}" in out
    assert out.count("chance") >= 4

    # Stripes of unit length rank alike by either distance.
    output_of("-m tools.score", features_file, "--distance", "euclidean", "--log_path", tmp_path)
    euclidean_rows = rows_of(only_json(tmp_path, "*euclidean.json"))
    euclidean_trials = euclidean_rows["all-search single-shot", "fc"]["trials"]
    np.testing.assert_allclose(
        [trial["mAP"] for trial in euclidean_trials], [trial["mAP"] for trial in trials]
    )


@pytest.mark.parametrize(
    "flags",
    [
        "--optim adam --dist-type l1 --thd 0.05 --drop 0.3 --lr 0.001",
        # The arrays have another size: they are scaled. Within such a margin the loss is zero.
        "--dist-type cos --thd 100 --w_hc 0.1 --img_h 120 --img_w 40 --mode indoor",
    ],
)
def test_other_settings_train_and_test(output_of, sysu_tree, tmp_path, flags):
    # It is slow to import.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folders = [*folder_flags(sysu_tree, tmp_path), "--workers", 0]
    output_of("train.py", *TINY, "--epochs", 0, *flags.split(), *folders, "--tensorboard")
    (checkpoint_file,) = tmp_path.rglob("*_last.t")
    (metrics_file,) = tmp_path.rglob("metrics.jsonl")
    (log_file,) = tmp_path.rglob("*.log")
    metrics = json.loads(metrics_file.read_text())
    board = EventAccumulator(str(metrics_file.parent)).Reload()
    for name in ("CE", "HC", "accuracy", "lr"):
        (event,) = board.Scalars(name)
        assert event.step == 0
        assert event.value == pytest.approx(metrics[name])
    net = utils.load_checkpoint(str(checkpoint_file))["net"]
    assert ("classifier1.classifier.2.weight" in net) == ("--drop" in flags)
    assert ("HC 0.0000" in log_file.read_text()) == ("--thd 100" in flags)
    output_of("test.py", *folders, "--resume", checkpoint_file)
    row = rows_of(only_json(tmp_path))["all-search single-shot", "fc"]
    assert row["mean"]["rank20"] == 1  # there are two test persons


def test_periodic_checkpoints_are_kept_and_the_rate_falls(output_of, sysu_tree, tmp_path):
    """Epochs above 10 that --save-epoch divides are kept; the rate falls at epoch 30."""
    flags = [*TINY, *folder_flags(sysu_tree, tmp_path), "--save_epoch", 3]
    net = EmbedNet(10, low_dim=16, arch="tiny", pretrained="none")
    state = {"net": net.state_dict(), "cmc": [1.0] * 20, "mAP": 1.0, "config": {"arch": "tiny"}}
    start = tmp_path / "start.t"
    rates = []
    for last_epoch in (9, 12, 30):
        utils.save_checkpoint(str(start), state | {"epoch": last_epoch - 1})
        method = f"until{last_epoch}"
        out = output_of(
            "train.py", *flags, "--resume", start, "--method", method, "--epochs", last_epoch
        )
        rates += re.findall(r"lr ([\d.e-]+)", out)
    kept = {re.search(r"epoch_(\d+)\.t", path.name)[1] for path in tmp_path.glob("*_epoch_*.t")}
    assert kept == {"12", "30"}
    assert [float(rate) for rate in rates] == [0.008, 0.008, 0.0008]


# ---- RegDB and LLCM -----------------------------------------------------------------------------


def test_regdb_all_trials_in_both_directions(output_of, error_of, short_regdb, tmp_path):
    shared = ["--dataset", "regdb", *folder_flags(short_regdb, tmp_path)]
    output_of("train.py", *TINY, *shared, "--epochs", 0, "--trial", 2)
    (trained,) = tmp_path.glob("regdb_*_trial2_*_last.t")
    line = error_of("test.py", *shared, "--trial", 1, "--resume", trained)
    assert "was trained with --trial 2, not --trial 1" in line

    # Ten models are ten trainings; here the weights of one stand for all.
    weights = utils.load_checkpoint(str(trained))["net"]
    state = {"net": weights, "epoch": 0, "config": {"arch": "tiny"}}
    utils.save_checkpoint(str(tmp_path / "trial1.t"), state)
    for trial in range(2, 11):
        (tmp_path / f"trial{trial}.t").symlink_to("trial1.t")
    flags = ["--trial", "all", "--search", "both", "--resume", "trial{trial}.t"]
    flags += ["--img_h", 96, "--img_w", 32, "--workers", 0, "--mode", "all"]
    out = output_of(
        "test.py", *shared, *flags, "--save_features", tmp_path / "features{trial}/x.npz"
    )
    assert "RegDB has no --mode: ignored" in out
    assert "trial3.t does not say its trial: make sure that it was trained on 3" in out
    numbers = list(range(1, 11))
    for trial in numbers:
        assert (tmp_path / f"features{trial}/x.npz").exists()
    content = only_json(tmp_path)
    assert [network["trial"] for network in content["networks"]] == numbers
    rows = rows_of(content)
    assert {protocol for protocol, _ in rows} == {"v2t", "t2v"}
    for row in rows.values():
        assert [trial["trial"] for trial in row["trials"]] == numbers
    assert rows["v2t", "fc"]["trials"] != rows["t2v", "fc"]["trials"]


def test_tvsearch_of_the_original_code_is_thermal_to_visible(output_of, short_regdb, tmp_path):
    flags = ["--dataset", "regdb", *folder_flags(short_regdb, tmp_path), "--workers", 0]
    flags += ["--pretrained", "none", "--arch", "tiny", "--img_h", 96, "--img_w", 32]
    output_of("test.py", *flags, "--tvsearch")
    assert {protocol for protocol, _ in rows_of(only_json(tmp_path))} == {"t2v"}


def test_llcm_from_images_to_a_report(output_of, error_of, llcm_tree, tmp_path):
    dataset = ["--dataset", "llcm"]
    folders = [*folder_flags(llcm_tree, tmp_path), "--workers", 0]
    output_of("train.py", *dataset, *TINY, *folders, "--epochs", 2)
    (last,) = tmp_path.glob("llcm_*_last.t")
    features_file = tmp_path / "features.npz"
    flags = ["--search", "both", "--save_features", features_file]
    output_of("test.py", *dataset, *folders, "--resume", last, *flags)
    output_of("-m tools.score", *dataset, features_file, "--search", "both", "--log_path", tmp_path)
    tested = only_json(tmp_path, "test_*_both.json")["results"]
    assert only_json(tmp_path, "score_*_both.json")["results"] == tested
    protocols = {row["protocol"] for row in tested}
    assert protocols == set(DATASETS["llcm"].protocol_flags["search"])

    (result_file,) = tmp_path.glob("test_*.json")
    out = output_of("-m tools.report", result_file, "--out", tmp_path / "report.html")
    assert "v2t-published" in out

    with np.load(features_file) as saved:
        arrays = {name: saved[name] for name in saved if name != "thermal"}
    np.savez(tmp_path / "foreign.npz", **arrays)
    line = error_of("-m tools.score", *dataset, tmp_path / "foreign.npz", "--log_path", tmp_path)
    assert "'thermal'" in line


# ---- published commands and checkpoints ---------------------------------------------------------


def write_published_file(
    path: Path, net: EmbedNet, numpy_core: str = "core", prefix: str = ""
) -> None:
    """Write a checkpoint as PyTorch 0.4.1 did: no zip, scores of numpy's types.

    Args:
        path: the file.
        net: its network.
        numpy_core: numpy 1 has the module "core", numpy 2 has "_core".
        prefix: torch.nn.DataParallel, with which some trained, puts "module." before each name.
    """
    weights = {prefix + name: value for name, value in net.state_dict().items()}
    state = {"net": weights, "cmc": np.ones(20), "mAP": np.float64(0.25), "epoch": 7}
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=False)
    # This protocol of pickle spells module names as lines of text.
    module = f"numpy.{numpy_core}.multiarray\n".encode()
    content = re.sub(rb"numpy\._?core\.multiarray\n", module, file.getvalue())
    assert b"c" + module + b"_reconstruct\n" in content
    path.write_bytes(content)


def test_resuming_from_a_published_checkpoint(output_of, error_of, sysu_tree, tmp_path):
    """It has weights, epoch and scores, but not the rate of dropout: --drop tells it."""
    flags = [*TINY, "--arch", "resnet18", *folder_flags(sysu_tree, tmp_path), "--epochs", 8]
    flags += ["--resume", "published.t"]
    path = tmp_path / "published.t"
    write_published_file(path, EmbedNet(4, 16, 0.3, "resnet18", pretrained="none"))
    line = error_of("train.py", *flags)
    assert "published.t was trained on 4 persons, but --data-path" in line
    assert "has 10" in line
    write_published_file(path, EmbedNet(10, 16, 0.3, "resnet18", pretrained="none"))
    assert "give --drop" in error_of("train.py", *flags)

    out = output_of("train.py", *flags, "--drop", 0.4)
    assert "no optimizer state" in out
    assert "epoch   8 step" in out
    assert "epoch   7 step" not in out
    (last,) = tmp_path.glob("*_last.t")
    state = utils.load_checkpoint(str(last))
    assert state["epoch"] == 8
    assert state["best"] == {"rank1": 1.0, "mAP": 0.25, "epoch": 7}
    published = utils.load_checkpoint(str(path))
    net = load_network(published, str(path), drop=0.4)
    assert net.classifier1.classifier[1].p == 0.4


PUBLISHED_TRAINING = (
    "--dataset {} --lr {} --drop 0.0 --trial 1 --gpu 0 --epochs {} --w_hc {} --per_img 8"
)
PUBLISHED_TEST = (
    "--dataset {} --lr 0.01 --drop 0.0 --trial 1 --gpu 1 --low-dim 512 --resume NAME --w_hc 0.5 "
    "{} --model_path DIR"
)


@pytest.mark.parametrize(
    ("dataset", "lr", "epochs", "w_hc"), [("sysu", 0.008, 60, 0.6), ("regdb", 0.0098, 80, 0.58)]
)
def test_the_published_training_is_the_default(dataset, lr, epochs, w_hc):
    command = PUBLISHED_TRAINING.format(dataset, lr, epochs, w_hc)
    args = train.parse_args(command.split())
    assert args == train.parse_args(["--dataset", dataset])
    expected = {
        "dataset": dataset,
        "lr": lr,
        "epochs": epochs,
        "w_hc": w_hc,
        "batch_size": 32,
        "per_img": 8,
        "arch": "resnet50",
        "low_dim": 512,
        "img_h": 288,
        "img_w": 144,
        "pretrained": "imagenet",
        "optim": "sgd",
        "precision": "tf32",
        "deterministic": True,
    }
    for name, value in expected.items():
        assert getattr(args, name) == value, name


@pytest.mark.parametrize(
    ("dataset", "mode", "words"),
    [("sysu", "indoor", "_modeindoor"), ("regdb", None, "_trial1"), ("llcm", None, "")],
)
def test_the_mode_is_of_sysu_alone(dataset, mode, words):
    """Other datasets have no such flag, and their runs do not have it in their names."""
    args = train.parse_args(["--dataset", dataset, "--mode", "indoor"])
    assert args.mode == mode
    lr = DATASETS[dataset].defaults["lr"]
    w_hc = DATASETS[dataset].defaults["w_hc"]
    assert train.run_name(args) == f"{dataset}_id_resnet50_lr{lr:g}_whc{w_hc:g}{words}"


@pytest.mark.parametrize(
    ("dataset", "protocol", "numpy_core", "prefix"),
    [
        ("sysu", "--mode all --gall-mode single", "core", ""),
        ("regdb", "", "_core", "module."),
    ],
)
def test_the_published_test_scores_a_published_checkpoint(
    output_of, sysu_tree, short_regdb, tmp_path, monkeypatch, dataset, protocol, numpy_core, prefix
):
    """The command is verbatim, and the data are where it looks for them."""
    (tmp_path / "data").mkdir()
    (tmp_path / "DIR").mkdir()
    (tmp_path / "data/SYSU-MM01").symlink_to(sysu_tree)
    (tmp_path / "data/RegDB").symlink_to(short_regdb)
    net = EmbedNet(395, arch="resnet18", pretrained="none")
    write_published_file(tmp_path / "DIR/NAME", net, numpy_core, prefix)
    monkeypatch.chdir(tmp_path)
    out = output_of("test.py", *PUBLISHED_TEST.format(dataset, protocol).split())
    assert "only training uses --lr, --w-hc: ignored" in out
    assert "no GPU" in out
    assert "DIR/NAME, epoch 7" in out
    assert "has no --" not in out  # would name a flag of another dataset
    network = only_json(tmp_path / "log")["networks"][0]
    assert network["arch"] == "resnet18"
    assert network["low_dim"] == 512
    assert network["img_h"] == 288
    assert network["img_w"] == 144
    assert network["n_class"] == 395


# ---- weights that others saved ------------------------------------------------------------------


def with_prefix(weights: dict) -> dict:
    """As torch.nn.DataParallel names them."""
    return {f"module.{name}": value for name, value in weights.items()}


# How others save the weights of a network.
LAYOUTS = {
    "bare": lambda weights: weights,
    "bare, module": with_prefix,
    "state_dict": lambda weights: {"state_dict": weights, "epoch": 7, "lr": 0.1},
    "state_dict, module": lambda weights: {"state_dict": with_prefix(weights)},
    "model": lambda weights: {"model": weights, "epoch": "last", "config": [1, 2]},
    "model, module": lambda weights: {"model": with_prefix(weights), "best": None},
}


@pytest.fixture(scope="module")
def resnet18_weights() -> dict[str, torch.Tensor]:
    """Of a network for the persons of `sysu_tree`."""
    torch.manual_seed(5)
    return EmbedNet(10, low_dim=16, arch="resnet18", pretrained="none").state_dict()


def test_weights_of_any_layout_get_the_same_scores(
    output_of, sysu_tree, resnet18_weights, tmp_path
):
    contents = {"net": {"net": resnet18_weights}}
    for layout, save in LAYOUTS.items():
        contents[layout] = save(resnet18_weights)
    results = {}
    for i, (layout, content) in enumerate(contents.items()):
        folder = tmp_path / str(i)
        folder.mkdir()
        torch.save(content, folder / "net.pth")
        flags = [*folder_flags(sysu_tree, folder), "--resume", "net.pth", "--features", "fc"]
        flags += ["--mode", "indoor", "--img_h", 96, "--img_w", 32, "--workers", 0]
        output_of("test.py", *flags)
        results[layout] = only_json(folder)
    for layout, result in results.items():
        assert result["results"] == results["net"]["results"], layout
        assert result["networks"][0]["epoch"] is None, layout
        assert result["networks"][0]["n_class"] == 10


@pytest.mark.parametrize(("flags", "is_warned_of"), [([], True), (["--img_h", "96"], False)])
def test_weights_that_do_not_tell_the_size_of_images_are_warned_of(
    resnet18_weights, caplog, tmp_path, flags, is_warned_of
):
    torch.save(resnet18_weights, tmp_path / "net.pth")
    words = ["--resume", str(tmp_path / "net.pth"), *flags]
    args = utils.parse(test.build_parser(), words)
    test.open_trained(None, args)
    assert ("net.pth does not tell the size" in caplog.text) == is_warned_of
    assert ("288 x 144" in caplog.text) == is_warned_of


@pytest.mark.parametrize("layout", ["bare", "state_dict"])
def test_training_starts_with_weights_of_others_at_epoch_0(
    output_of, sysu_tree, resnet18_weights, tmp_path, layout
):
    """With a tiny learning rate the weights of the first epoch are still the ones of the file."""
    file = tmp_path / "weights.pth"
    torch.save(LAYOUTS[layout](resnet18_weights), file)
    flags = [*TINY, "--arch", "resnet18", *folder_flags(sysu_tree, tmp_path), "--epochs", 0]
    printed = output_of("train.py", *flags, "--lr", 1e-12, "--resume", file)
    message = f"{file} holds weights alone: training starts with them at epoch 0"
    assert f"warning: {message}" in lines_with("warning: ", printed)
    assert "epoch   0 step" in printed
    assert "resumed" not in printed
    (last,) = tmp_path.glob("*_last.t")
    state = utils.load_checkpoint(str(last))
    assert state["epoch"] == 0
    assert [line["epoch"] for line in state["metrics"]] == [0]
    for name, value in state["net"].items():
        if "running" not in name and "tracked" not in name:  # BatchNorm has seen images
            torch.testing.assert_close(value, resnet18_weights[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("script", ["test.py", "train.py"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_of_another_network_are_called_that(error_of, sysu_tree, tmp_path, script, layout):
    """The file is whole: another copy of it would not help."""
    resnet = torchvision.models.resnet18(weights=None)
    file = tmp_path / "resnet18.pth"
    torch.save(LAYOUTS[layout](resnet.state_dict()), file)
    flags = TINY if script == "train.py" else ["--workers", 0]
    line = error_of(script, *flags, *folder_flags(sysu_tree, tmp_path), "--resume", file)
    assert f"{file} does not hold a network of this method, but another one" in line
    assert "conv1.weight, bn1.weight, " in line
    for advice in ("another copy", "another file", "damaged"):
        assert advice not in line


# ---- folders below ~ ----------------------------------------------------------------------------


def test_a_tilde_in_a_flag_is_the_home_folder(output_of, sysu_tree, tmp_path, monkeypatch):
    """The shell does not expand --flag=~/folder. Nothing named ~ is made."""
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "cwd").mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path / "cwd")
    (home / "tree").symlink_to(sysu_tree)
    torch.save(model.BACKBONES["tiny"].build().state_dict(), home / "weights.pth")
    data = "--data-path=~/tree"
    arrays = "--arrays=~/arrays"
    logs = "--log_path=~/logs"
    output_of("pre_process_sysu.py", data, arrays, "--img-h", 96, "--img-w", 32, "--workers", 0)
    assert (home / "arrays/train_rgb_resized_img.npy").exists()

    flags = [*TINY, data, arrays, logs, "--model_path=~/models"]
    output_of("train.py", *flags, "--pretrained=~/weights.pth", "--epochs", 0)
    (last,) = (home / "models").glob("*pretrainedweights.pth_last.t")
    printed = output_of(
        "train.py", *flags, "--pretrained=~/weights.pth", "--method", "other",
        f"--resume=~/models/{last.name}", "--epochs", 1,
    )  # fmt: skip
    assert f"resumed {last} after epoch 0" in printed

    tests = [data, logs, "--mode", "indoor", "--workers", 0]
    printed = output_of(
        "test.py", *tests, f"--resume=~/models/{last.name}", "--save-features=~/features/x.npz"
    )
    assert f"features: {home}/features/x.npz" in printed
    size = ["--img-h", 96, "--img-w", 32]
    output_of("test.py", *tests, *size, "--pretrained=~/weights.pth", "--arch", "tiny")

    assert list((tmp_path / "cwd").iterdir()) == []
    assert not [path for path in tmp_path.rglob("*") if "~" in path.name]
    folders = {path.name for path in home.iterdir() if path.is_dir()}
    assert folders == {"tree", "arrays", "models", "logs", "features"}
    assert (home / "features/x.npz").exists()
    assert len(list((home / "logs").glob("test_*.json"))) == 2
    assert len(list((home / "logs").glob("*/metrics.jsonl"))) == 2
