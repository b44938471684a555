"""Train the two-stream network with cross-entropy and the Hetero-Center loss.

    python pre_process_sysu.py
    python train.py --dataset sysu  --lr 0.008  --drop 0.0 --trial 1 --gpu 0 --epochs 60 --w_hc 0.6  --per_img 8
    python train.py --dataset regdb --lr 0.0098 --drop 0.0 --trial 1 --gpu 0 --epochs 80 --w_hc 0.58 --per_img 8

Every second epoch is tested. The checkpoints in --model_path are <run>_best.t (best rank-1 of the fc features),
<run>_last.t and <run>_epoch_<n>.t; the log in --log_path is <run>.log. To go on where a run stopped, give its command
again with --resume <run>_last.t.
"""

import argparse
import functools
import logging
import os
import time
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

import data_loader
import data_manager
import utils
from data_manager import Search, Split
from eval_metrics import KINDS, Counts, Results, Scores, extract_features
from loss import HeteroCenterLoss, stripe_losses
from model import EmbedNet, describe_weights, least_height, load_weights

LOG_EVERY = 50  # steps
BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"  # fits 80 columns
# What decides a checkpoint's scores, and what a run comes to: resuming needs the same values.
TEST_FLAGS = ("drop", "img_h", "img_w")
RUN_FLAGS = ("optim", "dist_type", "thd", "batch_size", "per_img", "mode", "seed")
SPEED_FLAGS = ("amp", "tf32", "compile", "deterministic")  # these round differently
AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}

log = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    parser = utils.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    utils.add_shared_flags(parser)
    utils.add_training_flags(parser)
    add = parser.add_argument
    add("--pretrained", default="imagenet", help="weights to start from: imagenet, none or a file (%(default)s)")
    add("--mode", choices=["all", "indoor"], default="all", help="SYSU-MM01 search (%(default)s)")
    add("--trial", type=utils.number(int, 1, 11), default=1, help="RegDB's trial, 1 to 10 (%(default)s)")
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
    if args.resume:
        args.resume = utils.find_checkpoint(args.resume, args.model_path)
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
        amp: precision of the network, if not its own; the losses are computed in float32 at least.
        scaler: of the gradients, which torch.float16 needs.

    Returns:
        Cross-entropy and Hetero-Center loss of each stripe, (stripes,) both, and the share of right classifications.
        If they are not finite neither are the network's weights any more.
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
    w_hc: float,
    lr: float,
) -> None:
    """Run one epoch and log its means: the loss per stripe and its two parts, accuracy, images per second.

    Args:
        update: `train_step` with all but the batch.

    Raises:
        FloatingPointError: a loss was not finite.
    """
    steps = batches.sampler.steps
    history = torch.full((steps, 3), torch.nan, dtype=torch.float64, device=batches.device)  # CE, HC, accuracy
    start = shown = time.perf_counter()
    bar = tqdm(
        batches.epoch(epoch), f"epoch {epoch}", steps, disable=None, leave=False, dynamic_ncols=True, bar_format=BAR
    )
    for step, batch in enumerate(bar, 1):
        ce, hc, accuracy = update(batch)
        history[step - 1] = torch.stack([ce.mean(), hc.mean(), accuracy])
        a_line = step % LOG_EVERY == 0 or step == steps
        if not a_line and time.perf_counter() < shown + 1:
            continue  # looking at the losses makes the program wait for the device
        past = history[:step].cpu()
        if not past.isfinite().all():
            step = int((~past.isfinite()).any(1).nonzero()[0]) + 1
            ce, hc, _ = past[step - 1].tolist()
            raise FloatingPointError(f"the loss is not finite at step {step} (CE {ce:.4g}, HC {hc:.4g})")
        shown = time.perf_counter()
        (ce, hc, accuracy), speed = past.mean(0).tolist(), step * 2 * batches.sampler.batch_size / (shown - start)
        bar.set_postfix_str(f"CE {ce:.2f} HC {hc:.2f} acc {accuracy:.0%} {speed:.0f} img/s")
        if a_line:
            log.info(
                f"epoch {epoch:3d} step {step:4d}/{steps}  loss {ce + w_hc * hc:.4f}  CE {ce:.4f}  HC {hc:.4f}  "
                f"accuracy {accuracy:6.2%}  lr {lr:g}  {speed:.0f} images/s"
            )


def check_weights(net: EmbedNet) -> None:
    """FloatingPointError: the last step has broken the network."""
    if not all(value.isfinite().all() for value in net.state_dict().values()):
        raise FloatingPointError("a weight is not finite")


def list_images(args: argparse.Namespace) -> tuple[Split, Search]:
    """The test that runs during training: one draw, single-shot (FIDELITY 23), or RegDB's visible to thermal."""
    with utils.blame(args.data_path):
        if args.dataset == "sysu":
            images = data_manager.sysu_test(args.data_path)
            searches = data_manager.sysu_searches(images, args.mode, "single", trials=[0])
        else:
            images = data_manager.regdb_test(args.data_path, args.trial)
            searches = data_manager.regdb_searches(images, args.trial, "v2t")
    data_manager.check_counts(images, searches, args.dataset)
    images, (search,) = data_manager.restrict(images, searches)
    log.info("test: %d query and %d gallery images", len(search.query), len(search.gallery))
    counts = Counts.of(search, images)
    if counts.without_match == counts.queries:  # better known now than after some epochs
        utils.fail(f"{args.data_path}: no query has a match in the gallery")
    return images, search


def evaluate(
    net: EmbedNet, images: Split, search: Search, args: argparse.Namespace, device: torch.device
) -> dict[str, Scores]:
    """Log and return the scores of the fc and the pool5 features."""
    thermal_cameras, size = data_manager.THERMAL_CAMERAS[args.dataset], (args.img_h, args.img_w)
    batches = data_loader.ImageBatches(images, thermal_cameras, size, args.test_batch, args.workers, device)
    results = Results(args.dataset)
    with utils.blame(args.data_path):
        results.add(search, images, extract_features(net, batches, len(images.paths)))
    scores = {kind: results.scores[search.protocol, kind][search.trial] for kind in KINDS}
    for kind, found in scores.items():
        log.info(f"test {kind:6s} {found}")
    return scores


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


def build_network(args: argparse.Namespace, checkpoint: dict | None, n_class: int | None) -> EmbedNet:
    """A new network for ``n_class`` persons, or the checkpoint's (any number of persons if ``n_class`` is None)."""
    if checkpoint is None:
        return EmbedNet(n_class, args.low_dim, args.drop, args.arch, pretrained=args.pretrained)
    found = describe_weights(checkpoint["net"], args.resume)
    fixed = TEST_FLAGS if args.test_only else (*TEST_FLAGS, "lr", "w_hc", *RUN_FLAGS, *SPEED_FLAGS)
    utils.check_fit(args.resume, checkpoint, found, args, fixed)
    if n_class not in (None, found["n_class"]):
        utils.fail(f"{args.resume} was trained on {found['n_class']} persons, but {args.data_path} has {n_class}")
    net = EmbedNet(found["n_class"], args.low_dim, args.drop, args.arch, pretrained="none")
    load_weights(net, checkpoint["net"], args.resume)
    log.info("resumed %s, which finished epoch %s", args.resume, checkpoint.get("epoch"))
    return net


def restore(
    checkpoint: dict,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    progress: dict,
    device: torch.device,
) -> dict:
    """Continue exactly where the checkpoint stopped (FIDELITY 7); ``progress`` with its epoch and scores."""
    progress = progress | {name: checkpoint[name] for name in progress if name in checkpoint}
    if "optimizer" not in checkpoint:
        log.warning("the checkpoint holds no optimizer state, as published ones do not: momentum starts at zero")
        return progress | {"best": {"rank1": [*progress["cmc"], -1.0][0], "epoch": progress["epoch"]}}
    optimizer.load_state_dict(checkpoint["optimizer"])
    if scaler and checkpoint.get("scaler"):
        scaler.load_state_dict(checkpoint["scaler"])
    torch.set_rng_state(checkpoint["rng"]["torch"])
    if device.type == "cuda" and checkpoint["rng"]["cuda"] is not None:
        torch.cuda.set_rng_state(checkpoint["rng"]["cuda"], device)
    return progress


def main() -> None:
    args = parse_args()
    run = run_name(args)
    utils.start_log(os.path.join(args.log_path, f"{run}.log"))
    utils.log_run(args)
    device = utils.select_device(args.gpu)
    utils.seed_everything(args.seed, args.deterministic, args.tf32)
    if not args.test_only:
        utils.make_folder(args.model_path, "--model_path")

    # Data
    images, search = list_images(args)
    checkpoint = utils.load_checkpoint(args.resume) if args.resume else None
    if args.test_only:
        net = build_network(args, checkpoint, None).to(device, memory_format=torch.channels_last)
        evaluate(net, images, search, args, device)
        return
    data = load_training_set(args)
    with utils.blame(args.data_path):
        labels = data.visible_labels, data.thermal_labels
        sampler = data_loader.IdentitySampler(*labels, args.batch_size, args.per_img, args.seed)
    batches = data_loader.TrainBatches(data, sampler, (args.img_h, args.img_w), device, args.cache)

    # Network, optimizer, and how far the run has come
    net = build_network(args, checkpoint, data.n_class).to(device, memory_format=torch.channels_last)
    optimizer = build_optimizer(net, args)
    hc_loss = HeteroCenterLoss(args.thd, args.dist_type)
    scaler = torch.amp.GradScaler() if args.amp == "fp16" else None
    fast_net = torch.compile(net) if args.compile else net
    update = functools.partial(
        train_step, fast_net, optimizer, hc_loss=hc_loss, w_hc=args.w_hc, amp=AMP[args.amp], scaler=scaler
    )
    progress = {"epoch": -1, "cmc": [], "mAP": 0.0, "best": {"rank1": -1.0, "epoch": None}}
    if checkpoint:
        with utils.blame(args.resume):
            progress = restore(checkpoint, optimizer, scaler, progress, device)
        if progress["epoch"] >= args.epochs:
            utils.fail(
                f"{args.resume} has finished epoch {progress['epoch']}: --epochs {args.epochs} leaves nothing to do"
            )
    best_file, last_file = (os.path.join(args.model_path, f"{run}_{kind}.t") for kind in ("best", "last"))
    good_file = args.resume
    if not checkpoint and os.path.exists(last_file):
        log.warning("%s is there already, and will be overwritten; --resume goes on with it", last_file)

    for epoch in range(progress["epoch"] + 1, args.epochs + 1):
        files = [last_file]  # written last: what it says of the others holds
        lr = learning_rate(epoch, args.lr)
        set_learning_rate(optimizer, lr)
        kept = f"the last good checkpoint is {good_file}" if good_file else "no checkpoint was saved yet"
        try:
            net.train()
            train_epoch(update, batches, epoch, args.w_hc, lr)
            check_weights(net)
            if epoch > 0 and epoch % 2 == 0:
                scores = evaluate(net, images, search, args, device)["fc"]
                progress |= {"cmc": scores.cmc.tolist(), "mAP": scores.mAP}
                if scores.cmc[0] > progress["best"]["rank1"]:
                    progress["best"] = {"rank1": float(scores.cmc[0]), "epoch": epoch}
                    files.insert(0, best_file)
        except FloatingPointError as error:
            raise FloatingPointError(f"epoch {epoch}: {error}; {kept}; a lower --lr or --w_hc may help") from None
        except KeyboardInterrupt:
            log.warning("stopped in epoch %d; %s", epoch, kept)
            raise
        if epoch > 10 and epoch % args.save_epoch == 0:
            files.insert(0, os.path.join(args.model_path, f"{run}_epoch_{epoch}.t"))
        progress["epoch"] = epoch
        state = {
            "net": net.state_dict(),
            **progress,
            "config": {**vars(args), "n_class": data.n_class},
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
            "rng": {
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            },
        }
        for file in files:
            utils.save_checkpoint(file, state)
        good_file = last_file

    log.info("epoch %d was the last one, saved as %s", args.epochs, last_file)
    best = progress["best"]
    if best["epoch"] is not None and os.path.exists(best_file):
        log.info(
            "best rank-1 in training: %.2f%% at epoch %d, saved as %s", 100 * best["rank1"], best["epoch"], best_file
        )


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
