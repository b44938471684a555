"""Train the two-stream network with cross-entropy and the Hetero-Center loss.

    python pre_process_sysu.py
    python train.py --dataset sysu --lr 0.008 --epochs 60 --w_hc 0.6 --per_img 8
    python train.py --dataset regdb --lr 0.0098 --epochs 80 --w_hc 0.58 --per_img 8 --trial 1

The script tests every second epoch. It writes <run>_last.t after each epoch, <run>_best.t (the best
rank-1 of fc features: selected on the test set) and <run>_epoch_<n>.t to --model-path; <run>.log
and <run>/metrics.jsonl to --log-path. The same command with --resume last resumes a run after its
last finished epoch.
"""

# "FIDELITY n" in docstrings and comments is row n of docs/FIDELITY.md.

import argparse
import contextlib
import datetime
import json
import logging
import math
import os
import shlex
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import utils
from data_loader import (
    IdentitySampler,
    ImageBatches,
    TrainBatches,
    TrainingSet,
    load_training_set,
)
from data_manager import (
    DATASETS,
    Dataset,
    EvalTrial,
    Split,
    check_images_exist,
    check_no_shared_images,
    keep_used,
    list_training_images,
)
from eval_metrics import Distances, Scores, center_distances, check_trials, score_trial
from loss import CENTER_DISTANCES, Criterion
from model import BACKBONES, EmbedNet, extract_features, load_network, to_device
from utils import InputError

LOG_EVERY = 20  # steps
TEST_EVERY = 2  # epochs; epoch 0 is not tested, as in the original code
KEEP_AFTER = 10  # --save-epoch keeps checkpoints of later epochs only, as in the original code
RUNTIME_FLAGS = (  # may change when a run is resumed; all other flags define the experiment
    "arrays",
    "cache",
    "data_path",
    "epochs",
    "gpu",
    "log_path",
    "method",
    "model_path",
    "resume",
    "save_epoch",
    "tensorboard",
    "test_batch",
    "test_only",
    "workers",
)

log = logging.getLogger(__name__)


# ---- flags --------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = utils.new_parser(__doc__)
    utils.add_shared_flags(parser, DATASETS, BACKBONES)
    utils.add_arrays_flag(parser)
    add_method_flags(parser.add_argument_group("method and training").add_argument)
    add_machine_flags(parser.add_argument_group("precision and reproducibility").add_argument)
    add_run_flags(parser.add_argument_group("the run and its files").add_argument)
    return parser


def add_method_flags(add: Callable) -> None:
    """Add the flags for the loss, the optimizer and the batches."""
    lr = utils.defaults_of_datasets(DATASETS, "lr")
    w_hc = utils.defaults_of_datasets(DATASETS, "w_hc")
    add("--trial", type=int, choices=range(1, 11), default=1, help="RegDB's trial (%(default)s)")
    add("--lr", type=utils.positive_float, help=f"learning rate; backbones use a tenth ({lr})")
    add("--w-hc", type=utils.non_negative_float, help=f"weight of the Hetero-Center loss ({w_hc})")
    add(
        "--thd",
        type=utils.non_negative_float,
        default=0.0,
        help="margin of the Hetero-Center loss (%(default)s)",
    )
    add(
        "--dist-type",
        choices=list(CENTER_DISTANCES),
        default="l2",
        help="distance between centers; l2 is squared (%(default)s)",
    )
    add("--optim", choices=["sgd", "adam"], default="sgd", help="optimizer (%(default)s)")
    add(
        "--batch-size",
        type=utils.positive_int,
        default=32,
        help="images of each modality in a batch, on all GPUs together (%(default)s)",
    )
    add(
        "--per-img",
        type=utils.positive_int,
        default=8,
        help="images of each person and modality in a batch (%(default)s)",
    )
    add(
        "--pretrained",
        type=utils.file_path,
        default="imagenet",
        help="weights of the backbones to start from: imagenet, none or a file (%(default)s)",
    )
    add(
        "--mode",
        choices=["all", "indoor"],
        default="all",
        help="SYSU-MM01's gallery in the tests during training (%(default)s)",
    )


def add_machine_flags(add: Callable) -> None:
    """Add the flags for precision and reproducibility."""
    yes_or_no = argparse.BooleanOptionalAction
    add("--seed", type=utils.seed_number, default=1, help="random seed (%(default)s)")
    add(
        "--precision",
        choices=utils.PRECISIONS,
        default="tf32",
        help="tf32 is PyTorch's own default (%(default)s)",
    )
    add(
        "--deterministic", action=yes_or_no, default=True, help="use deterministic algorithms (yes)"
    )
    add("--sync-bn", action=yes_or_no, default=True, help="share BatchNorm's batch over GPUs (yes)")
    add("--compile", action=yes_or_no, default=False, help="compile the network (no)")


def add_run_flags(add: Callable) -> None:
    """Add flags that may change when a run is resumed: they are in `RUNTIME_FLAGS`."""
    yes_or_no = argparse.BooleanOptionalAction
    epochs = utils.defaults_of_datasets(DATASETS, "epochs")
    add("--method", default="id", help="run-name prefix (%(default)s)")
    add(
        "--epochs",
        type=utils.non_negative_int,
        help=f"number of the last epoch: N trains N + 1 epochs, 0 to N ({epochs})",
    )
    add(
        "--save-epoch",
        type=utils.non_negative_int,
        default=20,
        metavar="N",
        help="after epoch 10, also keep a checkpoint every N epochs; 0: none (%(default)s)",
    )
    add("--test-only", action="store_true", help="test the --resume checkpoint, then stop")
    add(
        "--cache",
        choices=["auto", "device", "host"],
        default="auto",
        help="where training images are kept (%(default)s)",
    )
    add("--tensorboard", action=yes_or_no, default=True, help="write TensorBoard scalars (yes)")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags of train.py. Those that do not apply to the dataset are set to None."""
    args = utils.parse(build_parser(), argv)
    utils.fill_dataset_defaults(args, DATASETS)
    dataset = DATASETS[args.dataset]
    if not dataset.one_model_per_trial:
        args.trial = None
    if "mode" not in dataset.protocol_flags:
        args.mode = None
    if args.arrays and not dataset.preprocessed:
        raise InputError(f"{dataset.title} is read from image files: leave --arrays out")
    if args.precision == "fp16" and not torch.cuda.is_available():
        raise InputError("--precision fp16 needs a GPU: give bf16, or leave it out")
    return args


def experiment_flags(args: argparse.Namespace) -> dict[str, object]:
    """Return the flags that decide what is computed."""
    return {name: value for name, value in vars(args).items() if name not in RUNTIME_FLAGS}


def run_name(args: argparse.Namespace) -> str:
    """Name the files of a run by its experiment flags; those at their default are left out."""
    parser = build_parser()
    name = f"{args.dataset}_{args.method}_{args.arch}_lr{args.lr:g}_whc{args.w_hc:g}"
    if args.trial is not None:
        name += f"_trial{args.trial}"
    for flag, value in experiment_flags(args).items():
        if flag in ("dataset", "arch", "lr", "w_hc", "trial"):
            continue
        if value is None or value == parser.get_default(flag):
            continue
        word = flag.replace("_", "")
        if value is True:
            name += f"_{word}"
        elif value is False:
            name += f"_no{word}"
        else:
            name += f"_{word}{os.path.basename(str(value))}"  # --pretrained may be a path
    return name


# ---- one training run ---------------------------------------------------------------------------


def main() -> None:
    args = parse_args()
    dataset = DATASETS[args.dataset]
    name = run_name(args)
    utils.start_log(args, os.path.join(args.log_path, f"{name}.log"))
    device = utils.select_device(args.gpu)
    utils.seed_everything(args.seed, args.deterministic)
    utils.set_precision(args.precision, device)

    if args.test_only:
        score_checkpoint(name, device, args)
        return

    train_images, test_images, test_trial = list_images(dataset, args)
    has_test = test_images is not None
    with lock_run(name, args):
        checkpoint, checkpoint_path = open_run(name, args)
        size = (args.img_h, args.img_w)
        train_set = load_training_set(
            dataset, args.data_path, args.arrays, train_images, size, args.workers
        )
        batches = build_batches(train_set, device, args)

        net = build_network(train_set.n_class, checkpoint, checkpoint_path, args)
        net = to_device(net, device)
        criterion = Criterion(args.w_hc, args.thd, args.dist_type, utils.world_size())
        # Only for training. It shares its weights with ``net``, which is tested and saved.
        wrapped_net = wrap_network(net, args)
        optimizer = build_optimizer(net, args)
        scaler = torch.amp.GradScaler(enabled=args.precision == "fp16")
        record = RunRecord(name, train_set.n_class, args)
        start_epoch = record.start(checkpoint, checkpoint_path, optimizer, scaler)

        for epoch in range(start_epoch, args.epochs + 1):
            utils.seed_epoch(args.seed, epoch)
            set_learning_rate(optimizer, learning_rate(epoch, args.lr))
            metrics = train_epoch(wrapped_net, criterion, optimizer, batches, epoch, args, scaler)
            scores = None
            if has_test and epoch > 0 and epoch % TEST_EVERY == 0:
                scores, test_metrics = evaluate(net, test_images, test_trial, device, args)
                metrics |= test_metrics
            record.finish_epoch(epoch, metrics, scores, net, optimizer, scaler)
    log.info("done after epoch %d: %s", record.epoch, record.checkpoint_path("last"))
    if has_test:
        log.info("score it: %s", score_command(record, args))


def list_images(
    dataset: Dataset, args: argparse.Namespace
) -> tuple[Split | None, Split | None, EvalTrial | None]:
    """List the images of training and of the tests, and the trial of the tests.

    The training images are None where only the arrays of pre_process_sysu.py exist. Test images and
    trial are None if the dataset need not have any, and has none.

    Raises:
        InputError: something is missing or malformed, or training and tests share an image.
    """
    train_images = list_training_images(
        dataset, args.data_path, args.trial, may_be_missing=dataset.preprocessed
    )
    if dataset.lacks_test(args.data_path):
        log.warning(
            "%s has no folder %s: no tests during training, and no checkpoint _best",
            args.data_path,
            dataset.optional_test_folder,
        )
        return train_images, None, None
    test_images = dataset.test(args.data_path, args.trial)
    check_images_exist(test_images)
    if train_images is not None:
        check_no_shared_images(train_images, test_images)
    test_images, test_trial = select_test(test_images, dataset, args)
    return train_images, test_images, test_trial


def build_batches(
    train_set: TrainingSet, device: torch.device, args: argparse.Namespace
) -> TrainBatches:
    """Build what makes the batches of every epoch: the images of this process, and their order."""
    sampler = IdentitySampler(
        train_set.visible_labels,
        train_set.thermal_labels,
        args.batch_size,
        args.per_img,
        args.seed,
    )
    return TrainBatches(
        train_set,
        sampler,
        (args.img_h, args.img_w),
        device,
        args.cache,
        utils.rank(),
        utils.world_size(),
    )


def learning_rate(epoch: int, base_lr: float) -> float:
    """Return base_lr before epoch 30, a tenth of it before epoch 60, then a hundredth."""
    return base_lr * 0.1 ** min(epoch // 30, 2)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give each parameter group ``lr`` times its own factor, "lr_scale"."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def build_network(
    n_class: int, checkpoint: dict | None, path: str, args: argparse.Namespace
) -> EmbedNet:
    """Build a new network, or the one of the checkpoint, which was read from ``path``."""
    if checkpoint is None:
        return EmbedNet(
            n_class, args.low_dim, args.drop, args.arch, args.num_parts, args.pretrained
        )
    trained_persons = checkpoint["config"].get("n_class")
    # None: the weights are not of this method. `load_network` raises the error.
    if trained_persons not in (None, n_class):
        raise InputError(
            f"{path} was trained on {trained_persons} persons, "
            f"but --data-path {args.data_path} has {n_class}"
        )
    # Published checkpoints do not record the rate of their dropout.
    rate_is_unknown = checkpoint["config"].get("drop", 0.0) is None
    if rate_is_unknown and not args.drop:
        raise InputError(
            f"{path} was trained with dropout, but does not record the rate: give --drop"
        )
    return load_network(checkpoint, path, args.drop)


def wrap_network(net: EmbedNet, args: argparse.Namespace) -> nn.Module:
    """Return what training calls: ``net``, in DDP under torchrun, and compiled by --compile.

    Gradients are averaged over the ranks, and BatchNorm sees the whole batch (FIDELITY 10).
    """
    wrapped_net = net
    if utils.is_distributed():
        if args.sync_bn:  # this replaces the BatchNorm layers of ``net`` itself
            wrapped_net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        try:
            wrapped_net = DistributedDataParallel(wrapped_net)
        except ValueError as error:  # SyncBatchNorm needs GPUs
            raise InputError(f"{error}: on a CPU add --no-sync-bn, which is not exact") from error
    if args.compile:
        wrapped_net = torch.compile(wrapped_net)
    return wrapped_net


def build_optimizer(net: EmbedNet, args: argparse.Namespace) -> torch.optim.Optimizer:
    """Build SGD with Nesterov momentum, or Adam, weight decay 5e-4 (``args.optim``, ``args.lr``).

    Group 0 is the two backbones, at a tenth of the rate. As in the original code, a group for each
    head and classifier follows. Every group needs an "lr_scale", its factor of the rate.
    """
    backbones = [*net.visible_net.parameters(), *net.thermal_net.parameters()]
    groups = [{"params": backbones, "lr_scale": 0.1}]
    for module in net.heads + net.classifiers:
        groups.append({"params": module.parameters(), "lr_scale": 1.0})

    if args.optim == "adam":
        optimizer = torch.optim.Adam(groups, weight_decay=5e-4, fused=True)
    else:
        optimizer = torch.optim.SGD(
            groups, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=True
        )
        # Fused SGD would leave momentum undefined if the first fp16 step overflows.
        for parameter in net.parameters():
            if parameter.requires_grad:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    set_learning_rate(optimizer, args.lr)
    return optimizer


def train_step(
    net: nn.Module,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor, Tensor, Tensor],
    amp_dtype: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Update the network once. The losses stay on the device: no step waits for a GPU.

    Args:
        net: gives (logits, feats), as `EmbedNet` does in training.
        criterion: gives the losses by name; "loss" is minimised.
        optimizer: of the parameters of ``net``.
        batch: (visible, thermal, visible_labels, thermal_labels), as `TrainBatches` yields them.
        amp_dtype: autocast computes the network in it; losses are in float32 or wider.
        scaler: gradient scaler, which torch.float16 needs.

    Returns:
        The losses of each stripe by name, (S,) each, and the accuracy of the classifiers.
    """
    visible, thermal, visible_labels, thermal_labels = batch
    with torch.autocast(visible.device.type, amp_dtype, enabled=amp_dtype is not None):
        logits, feats = net(visible, thermal)
    logits = torch.stack(logits)  # (S, N + M, n_class)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    feats = torch.stack(feats)  # (S, N + M, low_dim)
    losses = criterion(logits, feats, visible_labels, thermal_labels)

    if scaler is None:
        scaler = torch.amp.GradScaler(enabled=False)  # which does nothing
    optimizer.zero_grad(set_to_none=True)
    # As in the original code the stripes' losses are added; the log shows their mean.
    scaler.scale(losses["loss"].sum()).backward()
    scaler.step(optimizer)
    scaler.update()

    labels = torch.cat([visible_labels, thermal_labels])
    accuracy = (logits.argmax(2) == labels).double().mean()
    return {name: loss.detach() for name, loss in losses.items()}, accuracy


def train_epoch(
    net: nn.Module,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: TrainBatches,
    epoch: int,
    args: argparse.Namespace,
    scaler: torch.amp.GradScaler | None = None,
) -> dict[str, float]:
    """Train one epoch.

    Returns:
        The number of the epoch, its learning rate, and the means over its steps of each loss (per
        stripe) and of the accuracy, by name.

    Raises:
        InputError: the loss is not finite.
    """
    net.train()
    amp_dtype = utils.AMP_DTYPES.get(args.precision)
    lr = optimizer.param_groups[1]["lr"]  # of the heads
    start_time = time.perf_counter()
    sums = 0
    means = {}
    for step, batch in enumerate(batches.epoch(epoch), 1):
        losses, accuracy = train_step(net, criterion, optimizer, batch, amp_dtype, scaler)
        step_metrics = [loss.mean().double() for loss in losses.values()]  # over the stripes
        step_metrics.append(accuracy)
        sums = sums + utils.mean_over_ranks(torch.stack(step_metrics))
        if step % LOG_EVERY == 0 or step == len(batches):
            means = read_means(sums / step, [*losses, "accuracy"])
            log_progress(epoch, step, len(batches), lr, means, start_time, args)
            if not math.isfinite(means["loss"]):
                raise InputError(
                    f"epoch {epoch}, step {step}: the loss is not finite: "
                    f"lower --lr {args.lr:g} or --w-hc {args.w_hc:g}"
                )
    return {"epoch": epoch, "lr": lr, **means}


def read_means(means: Tensor, names: list[str]) -> dict[str, float]:
    """Copy means from the device, by name. The program waits for the GPU here."""
    return dict(zip(names, means.tolist(), strict=True))


def log_progress(
    epoch: int,
    step: int,
    n_steps: int,
    lr: float,
    means: dict[str, float],
    start_time: float,
    args: argparse.Namespace,
) -> None:
    """Log the means over the steps of an epoch so far, the speed, and the time that is left."""
    seconds_per_step = (time.perf_counter() - start_time) / step
    images_per_second = 2 * args.batch_size / seconds_per_step  # of both modalities
    steps_left = (args.epochs - epoch + 1) * n_steps - step
    time_left = datetime.timedelta(seconds=round(steps_left * seconds_per_step))
    words = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
    log.info(
        f"epoch {epoch:3d} step {step:4d}/{n_steps}  {words}  lr {lr:g}  "
        f"{images_per_second:.0f} images/s  {time_left} left"
    )


# ---- tests during training ----------------------------------------------------------------------


def select_test(
    images: Split, dataset: Dataset, args: argparse.Namespace
) -> tuple[Split, EvalTrial]:
    """Select the one trial of the tests during training, and its images (FIDELITY 23).

    SYSU-MM01: the first single-shot gallery of --mode. RegDB: the run's own --trial.
    """
    number = args.trial if dataset.one_model_per_trial else dataset.trials[0]
    trials = dataset.eval_trials(images, {"mode": args.mode}, [number])
    check_trials(trials, images, dataset)
    images, trials = keep_used(images, trials)
    return images, trials[0]


def evaluate(
    net: EmbedNet, images: Split, trial: EvalTrial, device: torch.device, args: argparse.Namespace
) -> tuple[Scores, dict[str, float]]:
    """Test both kinds of features on one trial; return the scores of fc, and all metrics."""
    if utils.is_distributed():
        # With --no-sync-bn the statistics of BatchNorm differ between ranks, and each rank embeds
        # a part of the images.
        for buffer in net.buffers():
            dist.broadcast(buffer, 0)
    batches = ImageBatches(
        images,
        (args.img_h, args.img_w),
        args.test_batch,
        args.workers,
        device,
        utils.rank(),
        utils.world_size(),
    )
    dataset = DATASETS[args.dataset]
    scores = {}
    metrics = {}
    for kind, values in extract_features(net, batches, len(images)).items():
        distances = Distances(values[trial.query], values[trial.gallery])
        scores[kind] = score_trial(trial, images, distances, dataset)
        log.info("test %-6s %s", kind, scores[kind])
        for name, value in scores[kind].measures().items():
            metrics[f"{kind}_{name}"] = value
        # Over the images of this trial only: fc_trial_own_center_distance, for example.
        for name, value in center_distances(values, images).items():
            metrics[f"{kind}_trial_{name}_center_distance"] = value
    return scores["fc"], metrics


def score_checkpoint(name: str, device: torch.device, args: argparse.Namespace) -> None:
    """Test the checkpoint of --resume, or the last one of the run, as training does."""
    dataset = DATASETS[args.dataset]
    images = dataset.test(args.data_path, args.trial)
    images, trial = select_test(images, dataset, args)
    resume = args.resume
    if resume in ("", "last"):
        resume = f"{name}_last.t"
    network_flags = ("dataset", "trial", "arch", "low_dim", "num_parts", "img_h", "img_w")
    flags = {flag: getattr(args, flag) for flag in network_flags}
    checkpoint, path = utils.open_checkpoint(resume, args.model_path, flags)
    log.info("checkpoint: %s, epoch %s", path, checkpoint.get("epoch", "unknown"))
    net = to_device(load_network(checkpoint, path, args.drop), device)
    evaluate(net, images, trial, device, args)


# ---- what a run leaves on disk, and how it is resumed -------------------------------------------
#
# Why a resumed run ends in the same values as one in one piece:
# - The batches of an epoch depend on (seed, epoch) alone, its learning rate on the epoch.
# - `utils.seed_epoch` seeds dropout from (seed, epoch, rank) at the start of each epoch.
# - A checkpoint is written when an epoch is over. It holds weights, momentum, scores and metrics.
# - "last" is written after all others: a kill before that repeats the whole epoch.


@contextlib.contextmanager
def lock_run(name: str, args: argparse.Namespace) -> Iterator[None]:
    """Make the run's folders, and let only one process (or one torchrun) train this name."""
    if utils.rank() > 0:
        yield
        return
    os.makedirs(args.model_path, exist_ok=True)
    os.makedirs(os.path.join(args.log_path, name), exist_ok=True)
    path = os.path.join(args.model_path, f"{name}.lock")
    with utils.lock_file(
        path, f"another process trains {name}: wait for it, or give another --method"
    ):
        yield


def open_run(name: str, args: argparse.Namespace) -> tuple[dict | None, str]:
    """Read the checkpoint to resume from; return it and its path.

    Without --resume, and with --resume last where there is no checkpoint yet, the run starts from
    the beginning: (None, "").

    Raises:
        InputError: a run of this name exists and would be overwritten, the checkpoint cannot be
            read or is of another experiment, or the ranks do not see the same one.
    """
    last = os.path.join(args.model_path, f"{name}_last.t")
    resume = args.resume
    if resume == "last" and os.path.exists(last):
        resume = last
    elif resume == "last":
        log.info("%s does not exist yet: starting from the beginning", last)
        resume = ""
    checkpoint = None
    path = ""
    if resume:
        checkpoint, path = utils.open_checkpoint(resume, args.model_path, experiment_flags(args))
    resumes_this_run = bool(path) and os.path.realpath(path) == os.path.realpath(last)
    if not resumes_this_run:
        check_is_new(name, last, args)
    epochs = utils.gather(checkpoint.get("epoch") if checkpoint else None)
    if len(set(epochs)) > 1:
        raise InputError(
            f"--model-path {args.model_path} must be one folder for all machines: the "
            "ranks see other runs"
        )
    return checkpoint, path


def check_is_new(name: str, last: str, args: argparse.Namespace) -> None:
    """Raise InputError if a run of this name exists: a new one would overwrite it."""
    other_name = "give another --method (or --model-path and --log-path)"
    if os.path.exists(last):
        raise InputError(f"{last} exists already: give --resume last, or {other_name}")
    metrics = os.path.join(args.log_path, name, "metrics.jsonl")
    if os.path.exists(metrics):
        raise InputError(f"{metrics} exists already, but not {last}: {other_name}, or remove it")


class RunRecord:
    """The scores and metrics of a run, and its files: checkpoints, metrics.jsonl, TensorBoard.

    Args:
        name: the stem of its files.
        n_class: number of training persons.
        args: the flags of train.py.

    Attributes:
        epoch: the last finished epoch, -1 before the first.
        metrics: the lines of metrics.jsonl, one for each epoch.
        cmc, mAP: fc scores of the last test.
        best: the test with the best rank-1.
    """

    def __init__(self, name: str, n_class: int, args: argparse.Namespace):
        self.name = name
        self.args = args
        self.config = experiment_flags(args) | {"n_class": n_class}
        self.folder = os.path.join(args.log_path, name)
        self.epoch = -1
        self.metrics = []
        self.cmc = []
        self.mAP = 0.0
        self.best = {"rank1": -1.0, "mAP": 0.0, "epoch": None}
        self.tensorboard = None

    def checkpoint_path(self, kind: str) -> str:
        return os.path.join(self.args.model_path, f"{self.name}_{kind}.t")

    def start(
        self,
        checkpoint: dict | None,
        path: str,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
    ) -> int:
        """Restore the run from ``checkpoint``, if there is one, and open its logs.

        Returns:
            The first epoch to train.
        """
        if checkpoint is not None:
            self.restore(checkpoint, path, optimizer, scaler)
        if utils.rank() == 0:
            if self.metrics:
                self.write_metrics()  # a kill may have come between the checkpoint and this file
            self.open_tensorboard()
        return self.epoch + 1

    def restore(
        self,
        checkpoint: dict,
        path: str,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
    ) -> None:
        """Restore the state after the checkpoint's epoch.

        A checkpoint of train.py restores all of it exactly (FIDELITY 7). A published one holds the
        epoch and scores only, a file of another program nothing but weights.
        """
        if "epoch" not in checkpoint:
            log.warning("%s holds weights alone: training starts with them at epoch 0", path)
            return
        self.epoch = checkpoint["epoch"]
        self.cmc = checkpoint["cmc"]
        self.mAP = checkpoint["mAP"]
        if "optimizer" in checkpoint:
            check_training_state(checkpoint, scaler, path)
            self.best = checkpoint["best"]
            self.metrics = checkpoint["metrics"]
            load_optimizer(optimizer, checkpoint["optimizer"], path)
            if scaler.is_enabled():
                scaler.load_state_dict(checkpoint["scaler"])
        else:
            log.warning("%s holds no optimizer state: momentum starts at zero", path)
            if self.cmc:
                self.best = {"rank1": self.cmc[0], "mAP": self.mAP, "epoch": self.epoch}
        log.info("resumed %s after epoch %d", path, self.epoch)

    def open_tensorboard(self) -> None:
        if not self.args.tensorboard:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter  # slow to import
        except ImportError:
            log.warning("TensorBoard is not installed: no scalars for it are written")
            return
        self.tensorboard = SummaryWriter(self.folder, purge_step=self.epoch + 1)

    def finish_epoch(
        self,
        epoch: int,
        metrics: dict[str, float],
        scores: Scores | None,
        net: EmbedNet,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
    ) -> None:
        """Record an epoch and save it. ``scores``: its fc scores, if it was tested."""
        self.epoch = epoch
        self.metrics.append(without_infinite(metrics))
        is_best = scores is not None and scores.cmc[0] > self.best["rank1"]
        if scores is not None:
            self.cmc = scores.cmc.tolist()
            self.mAP = scores.mAP
        if is_best:
            self.best = {"rank1": self.cmc[0], "mAP": self.mAP, "epoch": epoch}
        if utils.rank() > 0:
            return

        # In the order in which they are written.
        kinds = []
        keep_every = self.args.save_epoch
        if keep_every and epoch > KEEP_AFTER and epoch % keep_every == 0:
            kinds.append(f"epoch_{epoch}")
        if is_best:
            kinds.append("best")
        kinds.append("last")
        check_weights(net, epoch, self.args)
        self.save(kinds, net, optimizer, scaler)
        self.log_metrics(self.metrics[-1])

    def save(
        self,
        kinds: list[str],
        net: EmbedNet,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
    ) -> None:
        """Write <run>_<kind>.t for each kind, and metrics.jsonl."""
        state = {
            "net": net.state_dict(),
            "epoch": self.epoch,
            "cmc": self.cmc,
            "mAP": self.mAP,
            "best": self.best,
            "metrics": self.metrics,
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "config": self.config,
        }
        for kind in kinds:
            utils.save_checkpoint(self.checkpoint_path(kind), state)
        self.write_metrics()

    def write_metrics(self) -> None:
        path = os.path.join(self.folder, "metrics.jsonl")
        with utils.atomic_write(path) as partial, open(partial, "w", encoding="utf-8") as file:
            for line in self.metrics:
                file.write(json.dumps(line) + "\n")

    def log_metrics(self, metrics: dict[str, float | None]) -> None:
        """Hand an epoch's metrics to all loggers, on rank 0. Add further loggers here."""
        if self.tensorboard is not None:
            self.log_to_tensorboard(metrics)

    def log_to_tensorboard(self, metrics: dict[str, float | None]) -> None:
        for name, value in metrics.items():
            if value is not None:
                tag = name.replace("_", "/", 1)  # a group for each kind of features
                self.tensorboard.add_scalar(tag, value, metrics["epoch"])
        self.tensorboard.flush()


def without_infinite(metrics: dict[str, float]) -> dict[str, float | None]:
    """Replace values that are not finite by None: JSON does not know them."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def check_weights(net: EmbedNet, epoch: int, args: argparse.Namespace) -> None:
    """Raise InputError if the last update of an epoch left weights that are not finite."""
    is_finite = [tensor.isfinite().all() for tensor in net.state_dict().values()]
    if not torch.stack(is_finite).all():
        raise InputError(
            f"epoch {epoch}: a weight is not finite: lower --lr {args.lr:g} or --w-hc {args.w_hc:g}"
        )


def check_training_state(checkpoint: dict, scaler: torch.amp.GradScaler, path: str) -> None:
    """Raise InputError if scores, metrics or scaler are not as `RunRecord` saves them."""
    best = checkpoint.get("best")
    metrics = checkpoint.get("metrics")
    scaler_state = checkpoint.get("scaler")
    is_sound = (
        utils.is_plain_dict(best)
        and isinstance(best.get("rank1"), float)
        and math.isfinite(best["rank1"])
        and isinstance(metrics, list)
        and all(utils.is_plain_dict(line) for line in metrics)
        and utils.is_plain_dict(scaler_state)
        and set(scaler_state) == set(scaler.state_dict())
    )
    if not is_sound:
        raise damaged_state(path)


def damaged_state(path: str) -> InputError:
    return InputError(f"{path}: its training state is damaged: resume another checkpoint")


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict, path: str) -> None:
    """Restore the optimizer's buffers, in the memory format of the weights: fused updates need it.

    Learning rates and other settings stay as the flags have them.

    Raises:
        InputError: the state is damaged, or of other parameters.
    """
    if not is_state_of(optimizer, state):
        raise damaged_state(path)
    settings = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state["state"], "param_groups": settings})
    for parameter, buffers in optimizer.state.items():
        for name, value in buffers.items():
            if value.shape == parameter.shape:
                buffers[name] = torch.empty_like(parameter).copy_(value)


def is_state_of(optimizer: torch.optim.Optimizer, state: object) -> bool:
    """Return whether an optimizer's state_dict has what the parameters of this one need."""
    saved = state.get("state") if isinstance(state, dict) else None
    parameters = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    trained = {i: parameter for i, parameter in enumerate(parameters) if parameter.requires_grad}
    if not isinstance(saved, dict) or set(saved) != set(trained):
        return False
    return all(are_buffers_of(parameter, optimizer, saved[i]) for i, parameter in trained.items())


def are_buffers_of(parameter: Tensor, optimizer: torch.optim.Optimizer, buffers: object) -> bool:
    """Return whether these are the dense tensors that the optimizer keeps for a parameter."""
    if isinstance(optimizer, torch.optim.SGD):
        shapes = {"momentum_buffer": parameter.shape}
    elif isinstance(optimizer, torch.optim.Adam):
        shapes = {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
    else:
        return True  # an optimizer that somebody adds is not checked
    if not isinstance(buffers, dict) or set(buffers) != set(shapes):
        return False
    return all(is_dense(buffers[name], shape) for name, shape in shapes.items())


def is_dense(value: object, shape: tuple[int, ...]) -> bool:
    if not isinstance(value, Tensor) or value.is_meta:
        return False
    return value.layout == torch.strided and value.shape == shape


def score_command(record: RunRecord, args: argparse.Namespace) -> str:
    """Return the command that scores a run's last checkpoint under all protocols."""
    flags = {"dataset": args.dataset, "trial": args.trial}
    flags |= {"data_path": args.data_path, "log_path": args.log_path}
    for flag in DATASETS[args.dataset].protocol_flags:
        flags[flag] = "both"
    flags["resume"] = record.checkpoint_path("last")
    words = ["python", "test.py"]
    for flag, value in flags.items():
        if value is not None:
            words += [f"--{flag.replace('_', '-')}", str(value)]
    return shlex.join(words)


if __name__ == "__main__":
    utils.run(main, "interrupted: --resume last resumes after the last finished epoch")
