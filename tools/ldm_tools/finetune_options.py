"""The options of `ldm finetune`, and the recipe that they make."""

import argparse
import os
from pathlib import Path

from ldm.data import captions, images
from ldm.train import finetune, low_rank, objective
from ldm.train.objective import FineTuning


def add_recipe(group: argparse._ArgumentGroup) -> None:
    epochs = " or ".join(f"{count} epochs of {name} images" for name, count in objective.EPOCHS.items())
    group.add_argument("--steps", type=int, help=f"of the optimiser, --batch times --accumulate images each ({epochs})")
    group.add_argument("--batch", type=int, default=FineTuning.batch, help="images at a time (default %(default)s)")
    group.add_argument(
        "--accumulate", type=int, default=FineTuning.accumulate, help="batches in a step (default %(default)s)"
    )
    group.add_argument("--lr", type=float, default=FineTuning.lr, help="AdamW's learning rate (default %(default)s)")
    group.add_argument("--warmup", type=int, default=0, help="steps in which the rate rises from 0 (default 0)")
    group.add_argument("--seed", type=int, default=0, help="of order and noise (default 0)")
    group.add_argument(
        "--ema-decay", type=float, default=0.0, help="save a moving average of the weights, such as 0.9999 (default 0)"
    )
    group.add_argument(
        "--caption-dropout",
        type=float,
        default=0.0,
        help="share of images shown with the empty caption, such as 0.1: classifier-free guidance subtracts what the "
        "model draws without a caption, which without this it never learns of these images (default 0, as the authors)",
    )
    group.add_argument(
        "--min-snr",
        type=float,
        default=0.0,
        metavar="GAMMA",
        help="weight the loss by time, Hang et al. 2023; 5 is usual",
    )
    group.add_argument(
        "--flip",
        action="store_true",
        help="mirror half of the images; not for radiographs: anatomy has a left and a right, and the heart changes "
        "sides",
    )
    group.add_argument(
        "--train-text-encoder",
        action="store_true",
        help="let the text encoder learn along, for words that it does not know; the paper keeps it as it is",
    )
    group.add_argument(
        "--lora",
        type=int,
        metavar="RANK",
        help="train a low-rank adapter, such as 8, instead of the U-Net, and write it alone, in kohya's names; "
        "--lr 1e-4 is usual",
    )
    group.add_argument(
        "--lora-alpha", type=float, metavar="ALPHA", help="the adapter counts ALPHA / RANK (default: RANK, so 1)"
    )
    group.add_argument(
        "--lora-modules",
        choices=low_rank.MODULES,
        default="attention",
        help="attention: the U-Net's to_q, to_k, to_v, to_out, as PEFT and diffusers (default); transformer: the feed-"
        "forwards, proj_in and proj_out too, as kohya",
    )
    precision = group.add_mutually_exclusive_group()
    for name in ("bf16", "fp16"):
        precision.add_argument(
            f"--{name}",
            dest="precision",
            action="store_const",
            const=name,
            default="float32",
            help="mixed precision" + ("; scales the loss, for GPUs without bfloat16" if name == "fp16" else ""),
        )
    group.add_argument("--fused", action="store_true", help="AdamW in one kernel")
    group.add_argument("--compile", action="store_true", help="let torch.compile translate the network")
    group.add_argument(
        "--gradient-checkpointing", action="store_true", help="less memory for the U-Net, about a third more time"
    )


def add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--template", default="paper", choices=captions.TEMPLATES, help="wording of captions")
    group.add_argument(
        "--split",
        default="grouped",
        metavar="grouped|stratified|paper|FILE",
        help="its train part is trained on, of its validation part the loss is told (default grouped)",
    )
    group.add_argument(
        "--only", action="append", default=[], metavar="LABEL", help="train on images that show this; may be repeated"
    )
    group.add_argument("--size", type=int, help="side of the images in pixels (default: as the model was trained)")
    group.add_argument("--fit", default="squash", choices=images.FITS, help="how they become square (default squash)")
    group.add_argument("--max-bad", type=int, default=0, help="image files that may be broken (default 0)")


def add_run(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--save-every", type=int, default=500, help="steps between checkpoints (default %(default)s)")
    group.add_argument("--keep", type=int, default=2, help="newest checkpoints that stay (default %(default)s)")
    group.add_argument(
        "--sample-every",
        type=int,
        default=500,
        help="steps between sheets of samples, the neutral and every style prompt (default %(default)s, 0: none)",
    )
    group.add_argument("--validate", type=int, default=64, help="images for the validation loss (default %(default)s)")
    group.add_argument("--cache", type=Path, help="folder for the images' latents (default: OUT/latents)")
    group.add_argument("--no-cache", action="store_true", help="encode each image every time, to save disk space")
    group.add_argument(
        "--measure-cache",
        action="store_true",
        help=f"when done, time {finetune.COMPARED_STEPS} steps with and without the cache, into run.json",
    )
    group.add_argument(
        "--shard",
        action="store_true",
        help="under torchrun: divide weights, gradients and moments among the GPUs, for those under 24 GB",
    )
    group.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that read images")


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for options that make no sense whatever the data."""
    for name in ("steps", "batch", "accumulate", "lr", "save_every", "keep", "workers"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')}: got {value}, expected more than 0")
    for name in ("warmup", "seed", "min_snr", "max_bad", "validate", "sample_every"):
        if not getattr(args, name) >= 0:
            raise ValueError(f"--{name.replace('_', '-')}: got {getattr(args, name)}, expected 0 or more")
    for name in ("ema_decay", "caption_dropout"):
        if not 0 <= getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: got {getattr(args, name)}, expected 0 or more, below 1")
    for name in ("fp16", "compile"):
        if args.shard and (args.precision == name or getattr(args, name, False)):
            raise ValueError(f"--shard: not together with --{name}" + ("; use --bf16" if name == "fp16" else ""))
    if args.dtype != "float32" and (args.lora is not None or args.precision != "bf16"):
        raise ValueError(
            f"--dtype: got {args.dtype}, expected float32, which what is learnt is kept in; --bf16 and --fp16 are "
            "about the arithmetic"
        )
    if args.lora is None and args.lora_alpha is not None:
        raise ValueError("--lora-alpha: it is of an adapter; give --lora RANK too")
    for name in ("lora", "lora_alpha"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')}: got {value}, expected more than 0")
    for name in ("train_text_encoder", "shard") if args.lora is not None else ():
        if getattr(args, name):
            raise ValueError(f"--lora: not together with --{name.replace('_', '-')}; it changes the U-Net alone, whole")
    if args.measure_cache and args.no_cache:
        raise ValueError("--measure-cache: there is no cache to measure with --no-cache")


def recipe_of(args: argparse.Namespace, kind: str, count: int) -> FineTuning:
    """What the options say, over as many steps as make the authors' epochs if not told; of no kind: those of chests."""
    steps = args.steps or -(-objective.EPOCHS[kind or "chest"] * count // (args.batch * args.accumulate))
    return FineTuning(
        steps=steps,
        lr=args.lr,
        batch=args.batch,
        accumulate=args.accumulate,
        seed=args.seed,
        warmup=args.warmup,
        ema_decay=args.ema_decay,
        caption_dropout=args.caption_dropout,
        min_snr_gamma=args.min_snr,
        flip=args.flip,
        precision=args.precision,
        fused=args.fused,
        compile=args.compile,
        checkpoint_gradients=args.gradient_checkpointing,
    )
