"""Train the two-stream network with cross-entropy and the Hetero-Center loss.

    python pre_process_sysu.py
    python train.py --dataset sysu  --lr 0.008  --drop 0.0 --trial 1 --gpu 0 --epochs 60 --w_hc 0.6  --per_img 8
    python train.py --dataset regdb --lr 0.0098 --drop 0.0 --trial 1 --gpu 0 --epochs 80 --w_hc 0.58 --per_img 8

Every second epoch is tested. The checkpoints in --model_path are <run>_best.t (best rank-1 of the fc features),
<run>_last.t and <run>_epoch_<n>.t; in --log_path are <run>.log and <run>/metrics.jsonl, a line for each epoch. To go on
where a run stopped, give its command again with --resume last.
"""

import argparse
import functools
import json
import logging
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool

import torch
from torch import Tensor
from tqdm import tqdm

import data_loader
import data_manager
import utils
from data_manager import Search, Split
from eval_metrics import KINDS, Counts, Results, Scores, extract_features
from loss import HeteroCenterLoss, stripe_losses
from model import EmbedNet, describe_weights, least_height, network_of

LOG_EVERY = 50  # steps
BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"  # fits 80 columns
# What decides a checkpoint's scores, and what a run comes to: resuming needs the same values.
TEST_FLAGS = ("drop", "img_h", "img_w")
RUN_FLAGS = ("optim", "dist_type", "thd", "batch_size", "per_img", "mode", "seed")
SPEED_FLAGS = ("amp", "tf32", "compile", "deterministic")  # these round differently
# Where and how it runs, whatever it comes to; not part of a checkpoint, which is therefore the same anywhere.
PLACE_FLAGS = ("data_path", "model_path", "log_path", "workers", "gpu", "cache", "epochs", "resume", "test_only")
PLACE_FLAGS += ("save_every_steps", "tensorboard")
AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}

log = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    parser = utils.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in utils.add_shared_flags(parser):
        if flag.dest == "resume":
            flag.help += "; last: that of this run, if there is one yet"
    utils.add_training_flags(parser)
    add = parser.add_argument
    add("--pretrained", type=utils.weights, default="imagenet",
        help="weights to start from: imagenet, none or a file (%(default)s)")  # fmt: skip
    add("--mode", choices=["all", "indoor"], default="all", help="SYSU-MM01 search (%(default)s)")
    add("--trial", type=utils.number(int, 1, 11), default=1, help="RegDB's trial, 1 to 10 (%(default)s)")
    add("--save-every-steps", type=utils.number(int, 1), metavar="N",
        help="write <run>_last.t within an epoch, too, every N steps")  # fmt: skip
    add("--tensorboard", action=argparse.BooleanOptionalAction,
        help="write scalars for TensorBoard beside metrics.jsonl (default: if it is installed)")  # fmt: skip
    add("--cache", choices=["auto", "device", "host"], default="auto", help="where the images are kept (%(default)s)")
    fast = parser.add_argument_group("speed, at the price of other rounding (docs/PERFORMANCE.md)")
    fast.add_argument("--amp", choices=[*AMP], default="off", help="precision of the network (%(default)s)")
    fast.add_argument("--tf32", action="store_true", help="multiply with 10 bits where a GPU is faster so")
    fast.add_argument("--compile", action="store_true", help="compile the network: a slow start, then faster steps")
    fast.add_argument("--deterministic", action=argparse.BooleanOptionalAction, default=True,
                      help="the same result each time on a GPU (default: yes)")  # fmt: skip
    return parser


def parse_args() -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args()
    args.data_path = args.data_path or utils.DATA_PATHS[args.dataset]
    for name, published in utils.PUBLISHED[args.dataset].items():
        if getattr(args, name) is None:
            setattr(args, name, published)
    if args.batch_size % args.per_img:
        parser.error(f"--batch-size {args.batch_size} is not a multiple of --per_img {args.per_img}")
    if args.img_h < least_height():
        parser.error(f"--img_h {args.img_h} is too low for six stripes: give {least_height()} or more")
    if args.test_only and not args.resume:
        parser.error("--test-only scores a checkpoint: name it with --resume")
    if "/" in args.method:
        parser.error(f"--method {args.method} becomes part of file names: leave out the slash")
    if args.amp == "fp16" and not torch.cuda.is_available():
        parser.error("--amp fp16 needs a GPU: give bf16, or off")
    return args


def learning_rate(epoch: int, base_lr: float) -> float:
    """The rate of heads and classifiers: base_lr before epoch 30, a tenth before 60, then a hundredth."""
    return base_lr * 0.1 ** min(epoch // 30, 2)


def build_optimizer(net: EmbedNet, args: argparse.Namespace) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or Adam, weight decay 5e-4 (``args.optim``, ``args.lr``).

    Group 0 is the two ResNets at a tenth of the rate; a group each for the heads and classifiers follow.
    """
    resnets = [*net.visible_net.parameters(), *net.thermal_net.parameters()]
    groups = [{"params": resnets}, *({"params": module.parameters()} for module in net.heads + net.classifiers)]
    if args.optim == "adam":
        optimizer = torch.optim.Adam(groups, lr=args.lr, weight_decay=5e-4, fused=True)
    else:
        optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=True)
        # Otherwise the first step takes memory as it finds it, and does not write there if its fp16 gradients overflow.
        for parameter in net.parameters():
            if parameter.requires_grad:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    set_learning_rate(optimizer, args.lr)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    resnets, *rest = optimizer.param_groups
    resnets["lr"] = 0.1 * lr
    for group in rest:
        group["lr"] = lr


def train_step(
    net: Callable,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, ...],
    hc_loss: HeteroCenterLoss,
    w_hc: float,
    amp: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One update of the network. The program does not wait for the device.

    Args:
        net: the network, or what `torch.compile` makes of it.
        batch: (visible, thermal, visible_labels, thermal_labels) as `data_loader.TrainBatches` yields them.
        amp: precision of the network, if not its own; the losses are computed in float32 at least (--tf32 rounds the
            factors of their matrix products, like all others on a GPU).
        scaler: of the gradients, which torch.float16 needs.

    Returns:
        Cross-entropy and Hetero-Center loss of each stripe, (stripes,) both, and the share of right classifications.
        If they are not finite neither are the network's weights any more (but for a scaler, which leaves the step out).
    """
    visible, thermal, visible_labels, thermal_labels = batch
    with torch.autocast(visible.device.type, amp, enabled=amp is not None):
        logits, feats = net(visible, thermal)
    ce, hc = stripe_losses(logits, feats, visible_labels, thermal_labels, hc_loss)
    loss = (ce + w_hc * hc).sum()  # over the stripes
    optimizer.zero_grad(set_to_none=True)
    if scaler is None:
        loss.backward()
        optimizer.step()
    else:
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    with torch.no_grad():
        accuracy = (torch.stack(logits).argmax(2) == torch.cat([visible_labels, thermal_labels])).double().mean()
    return ce.detach(), hc.detach(), accuracy


def train_epoch(
    update: Callable[[tuple[Tensor, ...]], tuple[Tensor, Tensor, Tensor]],
    batches: data_loader.TrainBatches,
    epoch: int,
    args: argparse.Namespace,
    history: Tensor,
    start: int = 0,
) -> Iterator[int]:
    """Run one epoch; after each step yields their number. Logs means: the loss per stripe, its two parts, accuracy.

    Args:
        update: `train_step` with all but the batch.
        args: flags; lr, w_hc and epochs count.
        history: (steps, 3), of each step CE, HC and accuracy, to be filled in; float64, on the device.
        start: the steps that are done already.

    Raises:
        FloatingPointError: a loss was not finite.
    """
    lr, begin = learning_rate(epoch, args.lr), time.perf_counter()
    shown = begin
    bar = tqdm(
        batches.epoch(epoch, start), f"epoch {epoch}", len(history), initial=start,
        disable=None, leave=False, dynamic_ncols=True, bar_format=BAR,
    )  # fmt: skip
    for step, batch in enumerate(bar, start + 1):
        ce, hc, accuracy = update(batch)
        history[step - 1] = torch.stack([ce.mean(), hc.mean(), accuracy])
        a_line = step % LOG_EVERY == 0 or step == len(history)
        if a_line or time.perf_counter() > shown + 1:  # looking at the losses makes the program wait for the device
            ce, hc, accuracy = means(history[:step])
            shown = time.perf_counter()
            each = (shown - begin) / (step - start)
            speed = 2 * batches.sampler.batch_size / each
            bar.set_postfix_str(f"CE {ce:.2f} HC {hc:.2f} acc {accuracy:.0%} lr {lr:g} {speed:.0f} img/s")
        if a_line:
            left = tqdm.format_interval(each * ((args.epochs - epoch + 1) * len(history) - step))
            log.info(
                f"epoch {epoch:3d} step {step:4d}/{len(history)}  loss {ce + args.w_hc * hc:.4f}  CE {ce:.4f}  "
                f"HC {hc:.4f}  accuracy {accuracy:6.2%}  lr {lr:g}  {speed:.0f} images/s  {left} left"
            )
        yield step


def means(history: Tensor) -> tuple[float, float, float]:
    """Mean CE, HC and accuracy of some steps (n, 3); FloatingPointError: one of them is not finite."""
    history = history.cpu()
    if not history.isfinite().all():
        step = int((~history.isfinite()).any(1).nonzero()[0])
        ce, hc, _ = history[step].tolist()
        raise FloatingPointError(f"the loss is not finite at step {step + 1} (CE {ce:.4g}, HC {hc:.4g})")
    return tuple(history.mean(0).tolist())


def check_weights(net: EmbedNet) -> None:
    """FloatingPointError: the last step has broken the network."""
    if not torch.stack([value.isfinite().all() for value in net.state_dict().values()]).all():
        raise FloatingPointError("a weight is not finite")


def list_images(args: argparse.Namespace) -> tuple[Split, Search]:
    """The test that runs during training: one draw, single-shot (FIDELITY 23), or RegDB's visible to thermal."""
    with utils.blame(args.data_path):
        images = data_manager.list_test(args.dataset, args.data_path, args.trial)
        searches = data_manager.list_searches(args.dataset, images, args.trial, args.mode, draws=[0])
    data_manager.check_counts(images, searches, args.dataset)
    images, (search,) = data_manager.restrict(images, searches)
    log.info("test: %d query and %d gallery images", len(search.query), len(search.gallery))
    counts = Counts.of(search, images)
    if counts.without_match == counts.queries:  # better known now than after some epochs
        utils.fail(f"{args.data_path}: no query has a match in the gallery")
    return images, search


def evaluate(
    net: EmbedNet,
    images: Split,
    search: Search,
    args: argparse.Namespace,
    device: torch.device,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Scores]:
    """Log and return the scores of the fc and the pool5 features; ``check`` is called before each batch."""
    thermal_cameras, size = data_manager.THERMAL_CAMERAS[args.dataset], (args.img_h, args.img_w)
    batches = data_loader.ImageBatches(images, thermal_cameras, size, args.test_batch, args.workers, device)
    results = Results(args.dataset)
    with utils.blame(args.data_path):
        results.add(search, images, extract_features(net, watched(batches, check), len(images.paths)))
    scores = {kind: results.scores[search.protocol, kind][search.trial] for kind in KINDS}
    for kind, found in scores.items():
        log.info(f"test {kind:6s} {found}")
    return scores


def watched(batches: Iterable, check: Callable[[], None]) -> Iterator:
    """The same batches, with a call of ``check`` before each."""
    try:
        for batch in batches:
            check()
            yield batch
    except BrokenProcessPool:  # a signal to all processes of the program ends those that read first
        check()
        raise


def load_training_set(args: argparse.Namespace) -> data_loader.TrainingSet:
    if args.dataset == "sysu":
        data = data_loader.load_sysu(args.data_path)
    else:
        data = data_loader.load_regdb(args.data_path, args.trial, (args.img_h, args.img_w), args.workers)
    if data.visible.shape[1:3] != (args.img_h, args.img_w):
        found = "x".join(map(str, data.visible.shape[1:3]))
        log.warning("the training arrays are %s: scaled to --img_h %d --img_w %d", found, args.img_h, args.img_w)
    log.info("train: %d persons, %d visible and %d thermal images", data.n_class, len(data.visible), len(data.thermal))
    return data


def build_network(
    args: argparse.Namespace, checkpoint: dict | None, n_class: int | None, device: torch.device
) -> EmbedNet:
    """A new network for ``n_class`` persons, or the checkpoint's (any number of persons if ``n_class`` is None)."""
    if checkpoint is None:
        net = EmbedNet(n_class, args.low_dim, args.drop, args.arch, pretrained=args.pretrained)
    else:
        found = describe_weights(checkpoint["net"], args.resume)
        fixed = TEST_FLAGS if args.test_only else (*TEST_FLAGS, "lr", "w_hc", *RUN_FLAGS, *SPEED_FLAGS, "test_batch")
        utils.check_fit(args.resume, checkpoint, found, args, fixed)
        if n_class not in (None, found["n_class"]):
            utils.fail(f"{args.resume} was trained on {found['n_class']} persons, but {args.data_path} has {n_class}")
        net = network_of(checkpoint["net"], args.resume, args.drop)
    return net.to(device, memory_format=torch.channels_last)


def train(run: "Run", batches: data_loader.TrainBatches, images: Split, search: Search) -> None:
    """The epochs that are left. SIGINT, SIGTERM and SIGHUP finish the step, write <run>_last.t, and end the program."""
    args, net = run.args, run.net
    update = functools.partial(
        train_step, torch.compile(net) if args.compile else net, run.optimizer,
        hc_loss=HeteroCenterLoss(args.thd, args.dist_type), w_hc=args.w_hc, amp=AMP[args.amp], scaler=run.scaler,
    )  # fmt: skip
    with utils.stoppable() as check:
        try:
            for epoch in range(run.epoch + 1, args.epochs + 1):
                set_learning_rate(run.optimizer, learning_rate(epoch, args.lr))
                net.train()
                for step in train_epoch(update, batches, epoch, args, run.history, run.step):  # each turn is an update
                    run.step = step
                    check()
                    if args.save_every_steps and step % args.save_every_steps == 0 and step < len(run.history):
                        run.save("last")
                check_weights(net)
                tested = epoch > 0 and epoch % 2 == 0
                scores = evaluate(net, images, search, args, run.device, check) if tested else {}
                run.save(*run.finish_epoch(scores))
                check()
        except utils.Stopped as stopped:
            run.save("last")
            log.warning("stopped after %s: the same command with --resume last goes on with %s", run, run.good_file)
            sys.exit(stopped.status)


def main() -> None:
    args = parse_args()
    name = run_name(args)
    utils.start_log(os.path.join(args.log_path, f"{name}.log"))
    utils.log_run(args)
    device = utils.select_device(args.gpu)
    utils.seed_everything(args.seed, args.deterministic, args.tf32)
    if args.test_only:
        score_checkpoint(args, name, device)
        return
    logs = os.path.join(args.log_path, name)
    utils.make_folder(args.model_path, "--model_path")
    utils.make_folder(logs, "--log_path")
    with utils.lock(os.path.join(args.model_path, name)), utils.lock(os.path.join(logs, "metrics")):
        checkpoint = read_checkpoint(args, name)
        images, search = list_images(args)
        data = load_training_set(args)
        with utils.blame(args.data_path):
            labels = data.visible_labels, data.thermal_labels
            sampler = data_loader.IdentitySampler(*labels, args.batch_size, args.per_img, args.seed)
        batches = data_loader.TrainBatches(data, sampler, (args.img_h, args.img_w), device, args.cache)
        net = build_network(args, checkpoint, data.n_class, device)
        run = Run(name, args, net, data, sampler.steps, device)
        run.begin(checkpoint)
        try:
            train(run, batches, images, search)
        except FloatingPointError as error:
            kept = f"the last good checkpoint is {run.good_file}" if run.good_file else "no checkpoint was saved yet"
            utils.fail(f"epoch {run.epoch + 1}: {error}; {kept}; a lower --lr or --w_hc may help")
        run.end()


def score_checkpoint(args: argparse.Namespace, name: str, device: torch.device) -> None:
    """What --test-only does: the test that runs during training, on the --resume checkpoint."""
    args.resume = utils.find_checkpoint(f"{name}_last.t" if args.resume == "last" else args.resume, args.model_path)
    images, search = list_images(args)
    net = build_network(args, utils.load_checkpoint(args.resume), None, device)
    evaluate(net, images, search, args, device)
    utils.write_log()


# ---- a run and its files --------------------------------------------------------------------------------------------


class Run:
    """A training under way: all that a checkpoint holds of it, and the files that it leaves.

    Attributes:
        epoch: the last epoch that is finished, -1 before the first.
        step: steps done of the epoch after it.
        history: of that epoch, as `train_epoch` fills it in.
        cmc, mAP: of the last test, fc features.
        best: rank1, mAP and epoch of the test with the best rank-1.
        metrics: of each finished epoch, what stands in metrics.jsonl.
    """

    PROGRESS = ("epoch", "step", "cmc", "mAP", "best", "metrics")

    def __init__(
        self,
        name: str,
        args: argparse.Namespace,
        net: EmbedNet,
        data: data_loader.TrainingSet,
        steps: int,
        device: torch.device,
    ):
        self.name, self.args, self.net, self.device = name, args, net, device
        self.optimizer = build_optimizer(net, args)
        self.scaler = torch.amp.GradScaler() if args.amp == "fp16" else None
        self.config = {flag: value for flag, value in vars(args).items() if flag not in PLACE_FLAGS}
        self.config |= {"n_class": data.n_class, "labels": data.checksum()}
        self.epoch, self.step, self.cmc, self.mAP, self.metrics = -1, 0, [], 0.0, []
        self.best = {"rank1": -1.0, "mAP": 0.0, "epoch": None}
        self.history = torch.full((steps, 3), torch.nan, dtype=torch.float64, device=device)
        self.good_file = self.board = None
        self.metrics_file = os.path.join(args.log_path, name, "metrics.jsonl")

    def file(self, kind: str) -> str:
        return os.path.join(self.args.model_path, f"{self.name}_{kind}.t")

    def __str__(self) -> str:
        return f"epoch {self.epoch + 1}, step {self.step}" if self.step else f"epoch {self.epoch}"

    @property
    def mark(self) -> str:
        """The line of the log below which all is repeated, if the run goes on from the checkpoint of this moment."""
        return f"checkpoint: {self}"

    def begin(self, checkpoint: dict | None) -> None:
        """Start anew, or exactly where the --resume checkpoint stopped (FIDELITY 7); then open the log and the metrics.

        Ends the program if the checkpoint or the metrics are of another run, before any file is touched.
        """
        args = self.args
        if checkpoint:
            self._restore(checkpoint)
            begun = self.epoch + (self.step > 0)
            if begun > args.epochs:
                utils.fail(f"{args.resume} has come to epoch {begun}: --epochs must be {begun} or more")
            self.good_file = args.resume
            log.info("resumed %s, after %s", args.resume, self)
        elif args.resume:
            log.info("there is no %s to go on with: starting from the beginning", self.file("last"))
        self._check_metrics()
        utils.write_log(after=self.mark if args.resume else None)
        if not checkpoint:
            log.debug(self.mark)
        self.write_metrics()
        if args.tensorboard is not False:
            self._open_board()

    def end(self) -> None:
        """Say what came of it, and how to score it."""
        log.info("epoch %d was the last one, saved as %s", self.args.epochs, self.file("last"))
        if self.best["epoch"] is not None and os.path.exists(self.file("best")):
            log.info("best in training: epoch %d, rank-1 %.2f%%, mAP %.2f%%, saved as %s; all protocols: %s",
                     self.best["epoch"], 100 * self.best["rank1"], 100 * self.best["mAP"], self.file("best"),
                     test_command(self.args, self.file("best")))  # fmt: skip
        else:
            log.info("all protocols: %s", test_command(self.args, self.file("last")))

    def finish_epoch(self, scores: dict[str, Scores]) -> list[str]:
        """Take up what came of the epoch, and of its test if there was one; gives the kinds of checkpoints to save."""
        (ce, hc, accuracy), epoch, kinds = means(self.history), self.epoch + 1, ["last"]
        line = {"epoch": epoch, "lr": learning_rate(epoch, self.args.lr), "loss": ce + self.args.w_hc * hc}
        line |= {"CE": ce, "HC": hc, "accuracy": accuracy}
        for feature, found in scores.items():
            line |= {f"{feature}_{name}": value for name, value in found.measures().items()}
        if scores:
            self.cmc, self.mAP = scores["fc"].cmc.tolist(), float(scores["fc"].mAP)
            if self.cmc[0] > self.best["rank1"]:
                self.best = {"rank1": self.cmc[0], "mAP": self.mAP, "epoch": epoch}
                kinds.insert(0, "best")
        if epoch > 10 and epoch % self.args.save_epoch == 0:
            kinds.insert(0, f"epoch_{epoch}")
        self.epoch, self.step, self.metrics = epoch, 0, [*self.metrics, line]
        if self.board:
            for name, value in line.items():
                self.board.add_scalar(name.replace("_", "/"), value, epoch)  # a group for each kind of features
            self.board.flush()
        return kinds

    def save(self, *kinds: str) -> None:
        """Write <run>_<kind>.t, "last" at the end: what it tells of the others holds; then metrics.jsonl.

        Raises:
            FloatingPointError: the network is broken; nothing is written.
        """
        if self.step:
            means(self.history[: self.step])
        check_weights(self.net)
        log.debug(self.mark)
        state = {
            "net": self.net.state_dict(),
            **{name: getattr(self, name) for name in self.PROGRESS},
            "history": self.history[: self.step],
            "config": self.config,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "rng": {
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            },
        }
        utils.save_checkpoint([self.file(kind) for kind in kinds], state)
        self.good_file = self.file("last")
        self.write_metrics()

    def _open_board(self) -> None:
        """Write scalars for TensorBoard from now on, if it is wanted and installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            if self.args.tensorboard:
                utils.fail("--tensorboard: it is not installed ('pip install tensorboard'); leave the flag out")
            return
        # What a killed run wrote of later epochs is not shown.
        self.board = SummaryWriter(os.path.join(self.args.log_path, self.name), purge_step=self.epoch + 1)

    def _check_metrics(self) -> None:
        """End the program if metrics.jsonl is of another run, which used the same --log_path."""
        if os.path.exists(self.metrics_file):
            with open(self.metrics_file, encoding="utf-8", errors="replace") as file:
                there = file.read().splitlines()
            if any(old != json.dumps(new) for old, new in zip(there, self.metrics, strict=False)) or (
                there and not self.metrics
            ):
                utils.fail(f"{self.metrics_file} is of another run: give another --log_path or --method, or remove it")

    def write_metrics(self) -> None:
        with utils.whole_file(self.metrics_file) as partial, open(partial, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in self.metrics)

    def _restore(self, checkpoint: dict) -> None:
        """End the program if the checkpoint was trained on other labels, or does not hold what train.py writes."""
        path = self.args.resume
        if checkpoint.get("config", {}).get("labels") not in (None, self.config["labels"]):
            utils.fail(f"{path}: was trained on other persons or images than those of {self.args.data_path}")
        try:
            self._take(checkpoint)
        except Exception as error:  # whatever the damage leads to
            utils.fail(
                f"{path}: its training state is damaged ({type(error).__name__}: {error}): take another checkpoint"
            )

    def _take(self, checkpoint: dict) -> None:
        for name in self.PROGRESS:
            setattr(self, name, checkpoint.get(name, getattr(self, name)))
        if "optimizer" not in checkpoint:
            log.warning("the checkpoint holds no optimizer state, as published ones do not: momentum starts at zero")
            self.step, self.best = 0, {"rank1": [*self.cmc, -1.0][0], "mAP": self.mAP, "epoch": self.epoch}
        if not type(self.epoch) is type(self.step) is int or self.epoch < -1 or not 0 <= self.step <= len(self.history):
            raise ValueError("there is no such epoch or step")
        scores = [*self.cmc, self.mAP, self.best["rank1"], self.best["mAP"]]
        if not all(isinstance(value, float) and math.isfinite(value) for value in scores):
            raise ValueError("a score is not a number")
        if type(self.best["epoch"]) not in (int, type(None)) or not isinstance(self.metrics, list):
            raise ValueError("there is no such best epoch, or no metrics")
        json.dumps([dict(line) for line in self.metrics])
        if "optimizer" not in checkpoint:
            return
        if checkpoint["history"].shape != (self.step, 3):
            raise ValueError("the losses are not those of its steps")
        self.history[: self.step] = checkpoint["history"]
        state = checkpoint["optimizer"]["state"]
        for number, parameter in enumerate(p for group in self.optimizer.param_groups for p in group["params"]):
            like = parameter.shape, parameter.dtype
            if not parameter.requires_grad:
                expected = {}
            elif self.args.optim == "adam":
                expected = {"step": (torch.Size(), torch.float32), "exp_avg": like, "exp_avg_sq": like}
            else:
                expected = {"momentum_buffer": like}
            if {name: (x.shape, x.dtype) for name, x in state.get(number, {}).items()} != expected:
                raise ValueError("the optimizer is of another network")
            if expected:  # in the parameter's memory format, which the fused step takes for granted
                state[number] = {name: torch.empty_like(parameter).copy_(x) if x.dim() else x
                                 for name, x in state[number].items()}  # fmt: skip
        own = self.optimizer.state_dict()["param_groups"]  # the flags decide these
        self.optimizer.load_state_dict({"state": state, "param_groups": own})
        if self.scaler:
            self.scaler.load_state_dict(checkpoint["scaler"])
        torch.set_rng_state(checkpoint["rng"]["torch"])
        if (checkpoint["rng"]["cuda"] is None) != (self.device.type == "cpu"):
            log.warning(
                "the run began on another kind of device: it goes on, but not bit for bit as it would have there"
            )
        elif self.device.type == "cuda":
            torch.cuda.set_rng_state(checkpoint["rng"]["cuda"], self.device)


def read_checkpoint(args: argparse.Namespace, name: str) -> dict | None:
    """The checkpoint to go on with, if there is one. A run that is there is not written over."""
    last_file = os.path.join(args.model_path, f"{name}_last.t")
    if os.path.exists(last_file):
        if not args.resume:
            utils.fail(
                f"{last_file} is there already: --resume last goes on with it; to start anew give another --model_path "
                "and --log_path, or --method, or remove it and the run's metrics.jsonl"
            )
        args.resume = last_file if args.resume == "last" else args.resume
    if args.resume in ("", "last"):
        return None
    args.resume = utils.find_checkpoint(args.resume, args.model_path)
    return utils.load_checkpoint(args.resume)


def test_command(args: argparse.Namespace, checkpoint: str) -> str:
    """The command that scores a checkpoint of this run under all protocols."""
    command = ["python", "test.py", "--dataset", args.dataset]
    if args.dataset == "sysu":
        command += ["--mode", "both", "--gall-mode", "both"]
    else:
        command += ["--trial", str(args.trial), "--search", "both"]
    parser = build_parser()
    for flag, default in (("data_path", utils.DATA_PATHS[args.dataset]), ("log_path", parser.get_default("log_path"))):
        if getattr(args, flag) != default:
            command += [f"--{flag}", getattr(args, flag)]
    return shlex.join([*command, "--resume", checkpoint])


def run_name(args: argparse.Namespace) -> str:
    """The stem of the run's files; flags that are not at their default are spelt out."""
    name = f"{args.dataset}_{args.method}_{args.arch}_lr{args.lr:g}_whc{args.w_hc:g}"
    if args.dataset == "regdb":
        name += f"_trial{args.trial}"
    parser = build_parser()
    for flag in ("low_dim", *TEST_FLAGS, *RUN_FLAGS, *SPEED_FLAGS, "pretrained"):
        value = getattr(args, flag)
        if value != parser.get_default(flag):
            name += f"_{flag.replace('_', '')}{os.path.basename(str(value))}"
    return name


if __name__ == "__main__":
    utils.run(main)
