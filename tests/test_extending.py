"""The examples of docs/EXTENDING.md, applied to a copy of the code: they do what the page says."""

import contextlib
import importlib
import re
import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torchvision
from conftest import ROOT, folder_flags, only_json, read_all

PAGE = ROOT / "docs/EXTENDING.md"
PARTS = ("*.py", "tools/*.py")  # of the repository
FLAGS = ["--dataset", "campus", "--arch", "mobilenet", "--img_h", "96", "--img_w", "32"]
FLAGS += ["--low-dim", "16", "--batch-size", "8", "--per_img", "4", "--workers", "0"]
FLAGS += ["--no-tensorboard", "--epochs", "2"]
# The flags of the trainings, by the name of the run.
STEM = "campus_id_mobilenet_lr0.008_whc0.6_imgh96_imgw32_lowdim16"
PLAIN = f"{STEM}_batchsize8_perimg4"
WITH_TERM = f"{STEM}_wintra5.0_batchsize8_perimg4"
WITH_WARMUP = f"{STEM}_warmup1_batchsize8_perimg4"
RUNS = {PLAIN: [], WITH_TERM: ["--w-intra", "5"], WITH_WARMUP: ["--warmup", "1"]}


# ---- applying the page --------------------------------------------------------------------------


def blocks(kind: str) -> list[str]:
    """The fenced blocks of a kind, "diff" or "python"."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def apply_diff(diff: str, folder: Path) -> None:
    """Replace the old lines of each hunk by the new ones; the old ones must occur exactly once."""
    for part in re.split("^--- ", diff, flags=re.MULTILINE)[1:]:
        name, *hunks = re.split("^@@.*\n", part, flags=re.MULTILINE)
        file = folder / name.strip()
        text = file.read_text()
        for hunk in hunks:
            lines = hunk.splitlines(keepends=True)
            assert {line[0] for line in lines if line.strip()} <= set(" +-"), hunk
            old = "".join(line[1:] for line in lines if line[0] != "+")
            new = "".join(line[1:] for line in lines if line[0] != "-")
            assert f"\n{text}".count(f"\n{old}") == 1, f"{name}: not there once:\n{old}"
            text = f"\n{text}".replace(f"\n{old}", f"\n{new}")[1:]
        file.write_text(text)


def append_block(block: str, folder: Path) -> None:
    name = re.match(r"# At the end of (\w+\.py)\n", block)[1]
    with open(folder / name, "a") as file:
        file.write(f"\n\n{block}")


@pytest.fixture(scope="module")
def extended_code(tmp_path_factory) -> Path:
    """A copy of the code, with all examples of the page."""
    folder = tmp_path_factory.mktemp("extended")
    (folder / "tools").mkdir()
    for pattern in PARTS:
        for file in ROOT.glob(pattern):
            shutil.copy(file, folder / file.relative_to(ROOT))
    diffs = blocks("diff")
    appended = blocks("python")
    assert (len(diffs), len(appended)) == (3, 2)
    for diff in diffs:
        apply_diff(diff, folder)
    for block in appended:
        append_block(block, folder)
    return folder


# ---- running the copy ---------------------------------------------------------------------------


@contextlib.contextmanager
def modules_of(folder: Path) -> Iterator[None]:
    """Within it, the project's modules are imported anew, from ``folder``; then they are forgotten.

    To import torch in a new process would take seconds.
    """
    names = {"tools"}
    for pattern in PARTS:
        names |= {file.stem for file in folder.glob(pattern)}

    def take_out() -> dict[str, ModuleType]:
        loaded = [name for name in sys.modules if name.partition(".")[0] in names]
        return {name: sys.modules.pop(name) for name in loaded}

    originals = take_out()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(folder)
            yield
    finally:
        take_out()
        sys.modules.update(originals)


def run_script(folder: Path, script: str, *flags) -> None:
    with modules_of(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *(str(flag) for flag in flags)])
        patch.setattr(sys, "unraisablehook", sys.unraisablehook)  # restored, if a script changes it
        runpy.run_path(str(folder / script), run_name="__main__")


@pytest.fixture(scope="module")
def campus(folder_tree, tmp_path_factory) -> Path:
    """Images named <person>_c<camera>_<number>.jpg, and one with another name."""
    root = tmp_path_factory.mktemp("campus")
    for subset in ("train", "test"):
        for ours, theirs, camera in (("visible", "visible", 1), ("infrared", "thermal", 2)):
            folder = root / subset / ours
            folder.mkdir(parents=True)
            for pid, person in enumerate(sorted((folder_tree / subset / theirs).iterdir())):
                for number, image in enumerate(sorted(person.iterdir())):
                    shutil.copy(image, folder / f"{pid:04d}_c{camera}_{number:04d}.jpg")
    shutil.copy(folder / "0000_c2_0000.jpg", folder / "cover.jpg")
    return root


@pytest.fixture(scope="module")
def runs(extended_code, campus, tmp_path_factory) -> dict:
    """What `RUNS` leave: {"out": folder, "files": their contents, "pretrained": weights}."""
    out = tmp_path_factory.mktemp("runs")
    hub = tmp_path_factory.mktemp("hub")
    weights = torchvision.models.MobileNet_V3_Small_Weights.IMAGENET1K_V1
    (hub / "checkpoints").mkdir()
    torch.manual_seed(1)
    state = torchvision.models.mobilenet_v3_small().state_dict()
    torch.save(state, hub / "checkpoints" / Path(weights.url).name)  # in place of a download
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.hub, "get_dir", lambda: str(hub))
        for flags in RUNS.values():
            run_script(extended_code, "train.py", *FLAGS, *flags, *folder_flags(campus, out))
    return {"out": out, "files": read_all(out), "pretrained": state}


# ---- what the page promises ---------------------------------------------------------------------


def test_a_flag_is_in_the_name_and_in_the_checkpoint(runs):
    checkpoints = {name for name in runs["files"] if name.endswith("_last.t")}
    assert checkpoints == {f"{name}_last.t" for name in RUNS}
    for name, expected in ((PLAIN, (0, 0)), (WITH_TERM, (5, 0)), (WITH_WARMUP, (0, 1))):
        config = runs["files"][f"{name}_last.t"]["config"]
        assert (config["dataset"], config["arch"]) == ("campus", "mobilenet")
        assert (config["w_intra"], config["warmup"]) == expected


def test_a_checkpoint_with_another_value_of_a_flag_is_not_resumed(
    runs, extended_code, campus, capsys
):
    flags = [*FLAGS, "--warmup", "2", "--resume", f"{WITH_WARMUP}_last.t"]
    with pytest.raises(SystemExit):
        run_script(extended_code, "train.py", *flags, *folder_flags(campus, runs["out"]))
    assert "was trained with --warmup 1, not --warmup 2" in capsys.readouterr().err


def test_the_term_is_trained_with_and_recorded_by_its_name(runs, extended_code):
    last_values = []
    for name, weight in ((PLAIN, 0), (WITH_TERM, 5)):
        lines = runs["files"][f"{name}/metrics.jsonl"]
        for line in lines:
            total = line["CE"] + 0.6 * line["HC"] + weight * line["Intra"]
            assert line["loss"] == pytest.approx(total)
        last_values.append(lines[-1]["Intra"])
        log = (runs["out"] / f"{name}.log").read_text()
        assert f"Intra {last_values[-1]:.4f}" in log
    assert last_values[1] < 0.97 * last_values[0]
    with modules_of(extended_code):
        figures = importlib.import_module("tools.figures")
        panels = figures.recorded_panels({"run": lines})
    assert "Intra" in [panel.name for panel in panels]


def test_the_term_is_the_mean_over_processes_with_persons_of_their_own(extended_code):
    feats = torch.randn(3, 8, 5)  # of 4 visible rows, then 4 infrared ones
    logits = torch.randn(3, 8, 2)
    labels = torch.tensor([0, 0, 1, 1])
    with modules_of(extended_code):
        criterion = importlib.import_module("loss").Criterion(0.6, w_intra=0.5)
    whole = criterion(logits, feats, labels, labels)
    parts = []
    for person in (0, 1):
        rows = torch.cat([labels, labels]) == person
        pids = labels[labels == person]
        parts.append(criterion(logits[:, rows], feats[:, rows], pids, pids)["Intra"])
    torch.testing.assert_close(torch.stack(parts).mean(0), whole["Intra"])


def test_the_flag_changes_the_rate_and_its_default_does_not(runs):
    rates = {}
    for name in (PLAIN, WITH_WARMUP):
        rates[name] = [line["lr"] for line in runs["files"][f"{name}/metrics.jsonl"]]
    assert rates == {PLAIN: [0.008] * 3, WITH_WARMUP: [0.004, 0.008, 0.008]}


def test_the_backbone_starts_from_its_weights_and_is_trained(runs):
    weights = runs["files"][f"{PLAIN}_last.t"]["net"]
    for net in ("visible_net.visible", "thermal_net.thermal"):
        before = runs["pretrained"]["features.0.0.weight"]
        change = weights[f"{net}.0.0.weight"] - before
        assert 0 < change.norm() < 0.3 * before.norm()  # 1.4: of two random networks


def test_the_logger_writes_a_line_for_each_epoch(runs):
    for name in RUNS:
        expected = []
        for line in runs["files"][f"{name}/metrics.jsonl"]:
            expected.append(f"{line['epoch']},{line['loss']},{line.get('fc_rank1', '')}")
        assert len(expected) == 3
        assert not expected[2].endswith(",")
        assert (runs["out"] / name / "progress.csv").read_text().splitlines() == expected


def test_the_dataset_is_listed_trained_with_and_tested(runs, extended_code, campus, capsys):
    with modules_of(extended_code):
        images = importlib.import_module("data_manager").campus_images(str(campus), "test")
    assert (len(images), set(images.pids.tolist())) == (24, {0, 1, 2, 3})
    assert (images.camids == 1 + images.thermal).all()

    resume = ["--resume", f"{PLAIN}_last.t", "--search", "both", "--workers", "0"]
    flags = ["--dataset", "campus", *resume, *folder_flags(campus, runs["out"])]
    run_script(extended_code, "test.py", *flags)
    output = capsys.readouterr().out
    assert "names other than <person>_c<camera>_<number> (1)" in output
    protocols = {row["protocol"] for row in only_json(runs["out"], "**/*.json")["results"]}
    assert protocols == {"t2v", "v2t"}
