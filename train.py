"""Train the two-stream network with cross-entropy and the Hetero-Center loss.

    python pre_process_sysu.py
    python train.py --dataset sysu  --lr 0.008  --drop 0.0 --trial 1 --gpu 0 --epochs 60 --w_hc 0.6  --per_img 8
    python train.py --dataset regdb --lr 0.0098 --drop 0.0 --trial 1 --gpu 0 --epochs 80 --w_hc 0.58 --per_img 8

Every second epoch is tested. --model_path gets <run>_last.t, <run>_best.t (best fc rank-1, selected on test data) and
<run>_epoch_<n>.t; --log_path gets <run>.log and <run>/metrics.jsonl. --resume last goes on where the run stopped.
"""

import argparse
import contextlib
import datetime
import inspect
import json
import logging
import math
import os
import shlex
import sys
import time

import torch
import torch.distributed as dist
from filelock import FileLock
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import utils
from data_loader import IdentitySampler, ImageBatches, TrainBatches, load_training_set
from data_manager import DATASETS, Search, Split, restrict
from eval_metrics import Distances, Scores, center_distances, extract_features, score_search
from loss import DISTANCES, Term, loss_terms, total
from model import BACKBONES, EmbedNet, network_of, to_device

LOG_EVERY = 20  # steps
YES_NO = argparse.BooleanOptionalAction  # --flag or --no-flag
PROGRESS = ("epoch", "step", "cmc", "mAP", "best", "metrics")  # of a run, as its checkpoints keep it
AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}

log = logging.getLogger(__name__)


def build_parser() -> utils.Parser:
    parser = utils.Parser(description=__doc__)
    utils.add_shared_flags(parser, BACKBONES)
    add, running = parser.optimisation.add_argument, parser.running.add_argument
    parser.data.add_argument("--trial", type=int, choices=range(1, 11), default=1, help="RegDB's trial (%(default)s)")
    add("--lr", type=float, help=f"learning rate; the backbones' is a tenth ({utils.by_dataset('lr')})")
    add("--w_hc", type=float, help=f"weight of the Hetero-Center loss ({utils.by_dataset('w_hc')})")
    add("--optim", choices=["sgd", "adam"], default="sgd", help="optimizer (%(default)s)")
    add("--dist-type", choices=[*DISTANCES], default="l2", help="distance of centers, l2 squared (%(default)s)")
    add("--thd", type=float, default=0.0, help="margin of the Hetero-Center loss (%(default)s)")
    add("--batch-size", type=int, default=32, help="images of each modality in a batch (%(default)s)")
    add("--per_img", type=int, default=8, help="images per person and modality in a batch (%(default)s)")
    add("--mode", choices=["all", "indoor"], default="all", help="SYSU-MM01's search that selects _best (%(default)s)")
    add("--seed", type=int, default=1, help="seed of everything random (%(default)s)")
    add("--amp", choices=[*AMP], default="off", help="precision of the network: faster, rounds more (%(default)s)")
    add("--tf32", action="store_true", help="use TF32 on a GPU: faster, rounds more")
    add("--sync_bn", action=YES_NO, default=True, help="several GPUs: BatchNorm sees the whole batch (yes)")
    add("--compile", action="store_true", help="compile the network: a slow start, then faster steps")
    add("--deterministic", action=YES_NO, default=True, help="repeat exactly on a GPU (yes)")
    add("--pretrained", default="imagenet", help="weights to start from: imagenet, none or a file (%(default)s)")
    running("--method", default="id", help="a word for the names of the run's files (%(default)s)")
    running("--epochs", type=int, help=f"the last epoch: N trains N + 1 epochs, 0 to N ({utils.by_dataset('epochs')})")
    running("--save_epoch", type=int, default=20, help="keep epochs after 10 that N divides; 0: none (%(default)s)")
    running("--save_every_steps", type=int, metavar="N", help="save <run>_last.t within an epoch, too, every N steps")
    running("--test-only", action="store_true", help="score the --resume checkpoint and stop")
    running("--cache", choices=["auto", "device", "host"], default="auto", help="where images are kept (%(default)s)")
    running("--tensorboard", action=YES_NO, default=True, help="write TensorBoard scalars (yes)")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    args = build_parser().parse_args(argv)
    if args.amp == "fp16" and not torch.cuda.is_available():
        raise ValueError("--amp fp16 needs a GPU: give bf16, or off")
    args.trial = args.trial if DATASETS[args.dataset].trial_trains else None
    return args


def learning_rate(epoch: int, base_lr: float) -> float:
    """The rate of heads and classifiers: base_lr before epoch 30, a tenth before 60, then a hundredth."""
    return base_lr * 0.1 ** min(epoch // 30, 2)


def build_optimizer(net: EmbedNet, args: argparse.Namespace) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or Adam, weight decay 5e-4 (``args.optim``, ``args.lr``).

    Group 0 is the two backbones at a tenth of the rate; as published, a group for each head and classifier follows.
    """
    backbones = [*net.visible_net.parameters(), *net.thermal_net.parameters()]
    groups = [{"params": backbones, "lr": 0.1 * args.lr}]
    groups += [{"params": module.parameters()} for module in net.heads + net.classifiers]
    if args.optim == "adam":
        optimizer = torch.optim.Adam(groups, lr=args.lr, weight_decay=5e-4, fused=True)
    else:
        optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=True)
        # Momentum starts at zero; fused SGD would leave it uninitialised if the first fp16 step overflows.
        for parameter in net.parameters():
            if parameter.requires_grad:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def train_step(
    net: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, ...],
    terms: list[Term],
    amp: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """One update of the network, without a GPU sync.

    Args:
        batch: (visible, thermal, visible_labels, thermal_labels) as `TrainBatches` yields them.
        terms: what is minimised, as `loss.loss_terms` gives it.
        amp: precision of the network, if not its own; the losses are computed in float32 at least.
        scaler: of the gradients, which torch.float16 needs.

    Returns:
        The losses by name, (stripes,) each, and the accuracy of the classifiers.
    """
    visible, thermal, *labels = batch
    with torch.autocast(visible.device.type, amp, enabled=amp is not None):
        logits, feats = map(torch.stack, net(visible, thermal))  # (stripes, 2 batch_size, n_class or low_dim)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = {term.name: term.of(logits, feats, *labels) for term in terms}
    loss = total(terms, losses).sum()  # over the stripes
    optimizer.zero_grad(set_to_none=True)
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    accuracy = (logits.argmax(2) == torch.cat(labels)).double().mean()
    return {name: value.detach() for name, value in losses.items()}, accuracy


def train_epoch(run: "Run", batches: TrainBatches, epoch: int) -> None:
    """Train the steps of an epoch that are left; log means over its steps. FloatingPointError: a loss is not finite."""
    args, steps, lr = run.args, batches.sampler.steps, learning_rate(epoch, run.args.lr)
    for number, group in enumerate(run.optimizer.param_groups):
        group["lr"] = lr if number else 0.1 * lr
    run.net.train()
    first, begin = run.step, time.perf_counter()
    for batch in batches.epoch(epoch, first):
        losses, accuracy = train_step(run.wrapped_net, run.optimizer, batch, run.terms, AMP[args.amp], run.scaler)
        run.sums += utils.process_mean(torch.stack([*(value.mean() for value in losses.values()), accuracy]))
        run.step += 1
        if run.step % LOG_EVERY == 0 or run.step == steps:  # reading the sums is a GPU sync
            words = "  ".join(f"{name} {mean:.4f}" for name, mean in run.means().items())
            pace = (time.perf_counter() - begin) / (run.step - first)  # seconds a step
            words += f"  lr {lr:g}  {2 * args.batch_size / pace:.0f} images/s"
            left = datetime.timedelta(seconds=round(pace * ((args.epochs - epoch + 1) * steps - run.step)))
            log.info(f"epoch {epoch:3d} step {run.step:4d}/{steps}  {words}  {left} left")
        run.after_step()


def evaluate(net: EmbedNet, images: Split, search: Search, args: argparse.Namespace) -> tuple[Scores, dict[str, float]]:
    """Log the scores of the fc and the pool5 features; returns those of fc, and what metrics.jsonl records of both."""
    size, device = (args.img_h, args.img_w), next(net.parameters()).device
    batches = ImageBatches(images, size, args.test_batch, args.workers, device, utils.share())
    for buffer in net.buffers() if dist.is_initialized() else ():
        dist.broadcast(buffer, 0)  # --no-sync_bn lets BatchNorm differ, and each process embeds a part of the images
    scores, line = {}, {}
    for kind, values in extract_features(net, batches, len(images.paths)).items():
        distances = Distances(values[search.query], values[search.gallery])
        scores[kind] = score_search(search, images, distances, DATASETS[args.dataset])
        log.info(f"test {kind:6s} {scores[kind]}")
        line |= {f"{kind}_{name}": value for name, value in scores[kind].measures().items()}
        line |= {f"{kind}_{whose}_centers": value for whose, value in center_distances(values, images).items()}
    return scores["fc"], line


def main() -> None:
    args, parser = parse_args(), build_parser()
    name, dataset, size = run_name(args), DATASETS[args.dataset], (args.img_h, args.img_w)
    utils.start_log(args, os.path.join(args.log_path, f"{name}.log"))
    rank = utils.share()[0]
    device = utils.select_device(args.gpu, args.batch_size // args.per_img)
    utils.seed_everything(args.seed + rank, args.deterministic, args.tf32)  # dropout differs between processes
    images = dataset.test(args.data_path, args.trial)
    # The first protocol and its first gallery (FIDELITY 23).
    searches = dataset.searches(images, vars(args), [args.trial] if args.trial else dataset.trials[:1])
    images, (search,) = restrict(images, searches)
    if args.test_only:
        args.resume = f"{name}_last.t" if args.resume in ("", "last") else args.resume
        checkpoint, path = utils.open_checkpoint(args, [flag.dest for flag in parser.shapes()])
        log.info("checkpoint: %s, epoch %s", path, checkpoint.get("epoch"))
        evaluate(to_device(network_of(checkpoint, path, args.drop), device), images, search, args)
        return
    for folder in (args.model_path, os.path.join(args.log_path, name)):
        os.makedirs(folder, exist_ok=True)
    lock = FileLock(os.path.join(args.model_path, f"{name}.lock"), timeout=0)
    with contextlib.nullcontext() if rank else lock:
        data = load_training_set(dataset, args.data_path, args.trial, size, args.workers)
        log.info("train: %d persons, images %s and %s", data.n_class, data.visible.shape, data.thermal.shape)
        sampler = IdentitySampler(data.visible_labels, data.thermal_labels, args.batch_size, args.per_img, args.seed)
        batches = TrainBatches(data, sampler, size, device, args.cache, utils.share())
        args.resume = checkpoint_to_resume(args, name)
        checkpoint, path = utils.open_checkpoint(args, parser.deciding()) if args.resume else ({}, "")
        if len({*utils.gather(f"{checkpoint.get('epoch')} {checkpoint.get('step')}")}) > 1:
            raise ValueError(f"--model_path {args.model_path} must be one folder for all machines: their runs differ")
        if checkpoint:
            net = network_of(checkpoint, path, args.drop)
        else:
            net = EmbedNet(data.n_class, args.low_dim, args.drop, args.arch, pretrained=args.pretrained)
        run = Run(name, args, to_device(net, device), data.n_class)
        if checkpoint:
            run.restore(checkpoint, batches)
        for epoch in range(run.epoch + 1, args.epochs + 1):
            tested = epoch > 0 and epoch % 2 == 0
            with utils.stop_signals() as run.stop:
                train_epoch(run, batches, epoch)
                run.save("last") if tested else run.finish_epoch()
            if tested:  # a signal now ends the program at once; --resume last repeats the test
                run.finish_epoch(*evaluate(net, images, search, args))
        run.end()


# ---- what a run leaves on disk, and how it goes on ------------------------------------------------------------------


class Run:
    """A training under way: all that a checkpoint holds of it, and the files that it leaves."""

    def __init__(self, name: str, args: argparse.Namespace, net: EmbedNet, n_class: int):
        self.name, self.args, self.net, self.device = name, args, net, next(net.parameters()).device
        self.rank = utils.share()[0]  # process 0 alone writes
        wrapped = distributed(net, args)
        self.wrapped_net = torch.compile(wrapped) if args.compile else wrapped
        self.optimizer, self.terms = build_optimizer(net, args), loss_terms(args)
        self.scaler = torch.amp.GradScaler(enabled=args.amp == "fp16")
        self.config = {flag: getattr(args, flag) for flag in build_parser().deciding()} | {"n_class": n_class}
        self.epoch, self.step = -1, 0  # the last epoch that is finished, and the steps done of the next
        self.summed = [*(term.name for term in self.terms), "accuracy"]
        self.sums = torch.zeros(len(self.summed), dtype=torch.float64, device=self.device)  # of the epoch so far
        self.cmc, self.mAP = [], 0.0  # of the last test, fc features
        self.best = {"rank1": -1.0, "mAP": 0.0, "epoch": None}  # the test with the best rank-1
        self.metrics_file = os.path.join(args.log_path, name, "metrics.jsonl")
        self.metrics, self.board, self.stop = [], None, []  # metrics.jsonl, TensorBoard's writer, status of a signal

    def file(self, kind: str) -> str:
        return os.path.join(self.args.model_path, f"{self.name}_{kind}.t")

    def means(self) -> dict[str, float]:
        """Over the steps so far: loss per stripe, its terms, accuracy. FloatingPointError: one is not finite."""
        means = dict(zip(self.summed, (self.sums / self.step).tolist(), strict=True))
        if not all(map(math.isfinite, means.values())):
            place = f"epoch {self.epoch + 1}, step {self.step}"
            raise FloatingPointError(f"{place}: the loss is not finite: {means}; a lower --lr or --w_hc may help")
        return {"loss": total(self.terms, means)} | means

    def after_step(self) -> None:
        """Save within the epoch, if that is asked for; save and end all processes, if a signal came to one of them."""
        stop = utils.process_mean(torch.tensor(float(len(self.stop)))) > 0  # a signal came to one of them; no GPU waits
        if stop or (self.args.save_every_steps and self.step % self.args.save_every_steps == 0):
            self.save("last")
        if stop:
            log.warning("stopped at epoch %d, step %d: --resume last goes on", self.epoch + 1, self.step)
            utils.end_processes()
            sys.exit(self.stop[0] if self.stop else 143)  # 143: another process got the signal

    def finish_epoch(self, scores: Scores | None = None, measures: dict[str, float] | None = None) -> None:
        """Record the epoch's means and, if tested, its scores and measures; save, also as _best if it is the best."""
        epoch = self.epoch + 1
        every = self.args.save_epoch
        kinds = [f"epoch_{epoch}"] if every and epoch > 10 and epoch % every == 0 else []
        line = {"epoch": epoch, "lr": learning_rate(epoch, self.args.lr), **self.means(), **(measures or {})}
        if scores:
            self.cmc, self.mAP = scores.cmc.tolist(), scores.mAP
            if self.cmc[0] > self.best["rank1"]:
                self.best = {"rank1": self.cmc[0], "mAP": self.mAP, "epoch": epoch}
                kinds.append("best")
        self.epoch, self.step = epoch, 0
        self.sums.zero_()
        self.metrics.append(line)
        self.save(*kinds, "last")
        if not self.rank:
            self.show(line)

    def show(self, line: dict[str, float]) -> None:
        """Hand an epoch's line of metrics to TensorBoard. Other loggers belong here, too."""
        if self.args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self.board = self.board or SummaryWriter(os.path.dirname(self.metrics_file), purge_step=line["epoch"])
            for name, value in line.items():
                self.board.add_scalar(name.replace("_", "/"), value, line["epoch"])  # a group for each kind of features
            self.board.flush()

    def save(self, *kinds: str) -> None:
        """Write <run>_<kind>.t for each kind, and metrics.jsonl. FloatingPointError: a weight or loss is not finite."""
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        rng = utils.gather({"torch": torch.get_rng_state(), "cuda": cuda})
        if self.rank:
            return
        if not torch.stack([x.isfinite().all() for x in (*self.net.state_dict().values(), self.sums)]).all():
            raise FloatingPointError(f"a weight or loss is not finite in epoch {self.epoch + 1}; a lower --lr may help")
        state = {
            "net": self.net.state_dict(),
            **{name: getattr(self, name) for name in PROGRESS},
            "sums": self.sums,
            "config": self.config,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": rng,
        }
        for kind in kinds:
            utils.save_checkpoint(self.file(kind), state)
        with utils.whole_file(self.metrics_file) as partial, open(partial, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in self.metrics)

    def restore(self, state: dict, batches: TrainBatches) -> None:
        """Go on exactly where a checkpoint was saved (FIDELITY 7); a published one gives weights, epoch and scores."""
        path, persons = self.args.resume, state["config"]["n_class"]
        if persons != self.config["n_class"]:
            raise ValueError(f"{path} was trained on {persons} persons, but --data_path has {self.config['n_class']}")
        if state["config"]["drop"] is None and not self.args.drop:
            raise ValueError(f"{path} was trained with dropout, but does not say at which rate: give --drop")
        if dist.is_initialized() and "optimizer" in state:
            # A step that is thrown away: DDP adds up gradients in another order in its first step than in all others.
            # BatchNorm and weights are put back here, all else below.
            train_step(self.wrapped_net, self.optimizer, next(batches.epoch(0)), self.terms, AMP[self.args.amp])
            self.net.load_state_dict(state["net"])
        try:
            for name in PROGRESS:
                setattr(self, name, state.get(name, getattr(self, name)))
            if "optimizer" not in state:
                log.warning("%s holds no optimizer state, as published ones do not: momentum starts at zero", path)
                self.best = {"rank1": self.cmc[0] if self.cmc else -1.0, "mAP": self.mAP, "epoch": self.epoch}
                return
            if self.step:  # our first versions kept CE, HC and accuracy of each step
                self.sums += (state["history"].sum(0) if "history" in state else state["sums"]).to(self.sums)
            groups = self.optimizer.state_dict()["param_groups"]  # the flags decide these
            self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
            for parameter, own in self.optimizer.state.items():  # the fused update needs the weights' memory format
                own.update({name: torch.empty_like(parameter).copy_(x) for name, x in own.items() if name != "step"})
            self.scaler.load_state_dict(state["scaler"] or {})
            kept = state["rng"] if isinstance(state["rng"], list) else [state["rng"]]  # ours had one at first
            if self.rank < len(kept):  # further processes keep their own
                torch.set_rng_state(kept[self.rank]["torch"])
                if self.device.type == "cuda" and kept[self.rank]["cuda"] is not None:
                    torch.cuda.set_rng_state(kept[self.rank]["cuda"], self.device)
            best = f"{self.best['rank1']:.2%}" if self.best["rank1"] >= 0 else "not tested yet"
            log.info(f"resumed {path}: epoch {self.epoch + 1:d}, step {self.step:d}; best rank-1 so far: {best}")
        except Exception as error:  # whatever the damage leads to
            raise ValueError(f"{path}: its training state cannot be used ({error}): take another checkpoint") from error

    def end(self) -> None:
        """Save once more, and log the command that scores the run under all protocols."""
        self.save("last")  # a kill may have come between the checkpoint and the metrics
        flags = {flag: getattr(self.args, flag) for flag in ("dataset", "trial", "data_path", "log_path")}
        flags |= {**dict.fromkeys(DATASETS[self.args.dataset].search_flags, "both"), "resume": self.file("last")}
        words = [str(word) for flag, value in flags.items() if value for word in (f"--{flag}", value)]
        log.info("epoch %d was the last one; to score it: python test.py %s", self.epoch, shlex.join(words))


def distributed(net: EmbedNet, args: argparse.Namespace) -> nn.Module:
    """Under torchrun: gradients are averaged over the processes, BatchNorm sees the whole batch (FIDELITY 10)."""
    if not dist.is_initialized():
        return net
    # To send process 0's BatchNorm buffers to the others in each step would take time; torch 2.14 renamed the flag.
    names = inspect.signature(DistributedDataParallel).parameters
    keep = {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False}
    try:
        return DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(net) if args.sync_bn else net, **keep)
    except ValueError as error:
        raise ValueError(f"{error}: on a CPU add --no-sync_bn, which is not exact") from error


def checkpoint_to_resume(args: argparse.Namespace, name: str) -> str:
    """What --resume names, "" to start from the beginning. ValueError: a run would be written over."""
    last, metrics = os.path.join(args.model_path, f"{name}_last.t"), os.path.join(args.log_path, name, "metrics.jsonl")
    resume = args.resume
    if resume == "last":
        resume = last if os.path.exists(last) else ""
        log.info("%s: %s", last, "going on with it" if resume else "not there yet, starting from the beginning")
    there = [file for file in (last, metrics) if os.path.exists(file)]
    chosen = os.path.realpath(utils.find_checkpoint(resume, args.model_path)) if resume else ""
    if there and chosen != os.path.realpath(last):
        raise ValueError(f"{there[0]} is there already: go on with that run (--resume last), give another --method "
                         "(or --model_path and --log_path), or remove it")  # fmt: skip
    return resume


def run_name(args: argparse.Namespace) -> str:
    """The stem of the run's files; deciding flags that are not at their default are spelt out."""
    name, parser = f"{args.dataset}_{args.method}_{args.arch}_lr{args.lr:g}_whc{args.w_hc:g}", build_parser()
    name += f"_trial{args.trial}" if args.trial else ""
    for flag in parser.deciding():
        value = getattr(args, flag)
        if flag not in ("dataset", "arch", "lr", "w_hc", "trial") and value != parser.get_default(flag):
            name += f"_{flag.replace('_', '')}{os.path.basename(str(value))}"
    return name


if __name__ == "__main__":
    utils.run(main)
