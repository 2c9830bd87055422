"""`ldm finetune`: teach the U-Net a data set, from its images and captions. [paper, stage one]

The text encoder stays as it is, as in the paper; with --train-text-encoder it learns along, for words it does not know.

ldm finetune --weights v1-5-pruned-emaonly.safetensors --data CheXpert-v1.0-small --out runs/chest
torchrun --nproc-per-node 4 --no-python ldm finetune ...     # the same run on four GPUs: a step's batches are dealt out
"""

import argparse
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from ldm.data import captions, images, tables
from ldm.data.labelled import LabelledImages
from ldm.data.reading import Reading
from ldm.files import read_json, write_json
from ldm.pipeline import StableDiffusion
from ldm.train import distributed, finetune, objective, watch
from ldm.train.distributed import Processes
from ldm.train.latent_cache import Interrupted, Posteriors, Preprocessing, Uncached, build, fingerprint
from ldm.train.objective import FineTuning, Material
from ldm.train.run_folder import LAST, RunFolder, stop_on_signals
from ldm.train.unet_learner import UNetLearner
from ldm_tools import reading
from ldm_tools.data import chosen_split
from ldm_tools.options import add_model, latent_size, load_model
from ldm_tools.reading import FOLDER, add_reading

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command to `parser`."""
    parser.description = (
        "Fine-tune the U-Net on a folder of labelled images; the autoencoder stays as it is, and so does the text "
        "encoder without --train-text-encoder. What is not given is as the paper's authors had it. The newest "
        f"checkpoint is OUT/{LAST}, a whole model."
    )
    add_model(parser)
    parser.set_defaults(dtype="float32")  # what the weights are kept in; --bf16 is about the arithmetic
    parser.add_argument("--data", type=Path, required=True, help=FOLDER)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and log.jsonl")
    parser.add_argument("--resume", choices=("auto",), help="auto: go on with the run in OUT, if there is one")
    _add_recipe(parser.add_argument_group("the recipe"))
    _add_data(parser.add_argument_group("the data"))
    _add_run(parser.add_argument_group("the run"))
    add_reading(parser, "labels that captions name (default: all that the data set's captions do)")


def _add_recipe(group: argparse._ArgumentGroup) -> None:
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


def _add_data(group: argparse._ArgumentGroup) -> None:
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


def _add_run(group: argparse._ArgumentGroup) -> None:
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


def run(args: argparse.Namespace) -> None:
    """Train, and say what came of it. Raises ValueError for data and options that do not fit each other."""
    check(args)
    device = distributed.own_device(args.device)
    args.device = str(device)
    with distributed.together(device) as processes:
        data = read(args, processes)
        split = chosen_split(data, args.split, seed=42)
        training, held_out = data.select(split.train), data.select(split.validation[: args.validate])
        if len(training) < args.batch:
            raise ValueError(f"--batch: got {args.batch}, more than the {len(training)} training images of {args.data}")
        recipe = recipe_of(args, data.kind, len(training))
        sd = load_model(args)
        if sd.prediction != "eps":
            raise ValueError(
                f"--weights: {args.weights} predicts {sd.prediction}; only networks of eps are trained here"
            )
        preprocessing = preprocessing_of(args, sd, data.reading)
        folder = run_folder(args, sd, training, recipe, preprocessing, processes)
        learner = UNetLearner(sd.unet, recipe, processes, args.shard, sd.clip if args.train_text_encoder else None)
        with stop_on_signals() as stop:
            try:
                material = prepare(training, sd, preprocessing, args, stop, processes)
                held = prepare(held_out, sd, preprocessing, args, stop, processes) if len(held_out) else None
                rounds = finetune.Rounds(
                    save_every=args.save_every,
                    held_out=watch.validation_examples(held) if held else (),
                    sample_every=args.sample_every,
                    sample=sampler(sd, training.prompts(args.template)),
                )
                done = finetune.finetune(learner, sd.schedule, material, folder, rounds, stop)
            except Interrupted:
                done = 0
        if done == recipe.steps and args.measure_cache:
            uncached = as_uncached(material, preprocessing, sd, args)
            speeds = finetune.compare_speed(learner, sd.schedule, material, uncached)
            add_to_record(args.out, {"speed": speeds}, processes)
    if not processes.first:
        return
    if done < recipe.steps:
        print(f"stopped at step {done} of {recipe.steps}; the same command with --resume auto goes on")
    else:
        print(f"{folder.path / LAST}: the model after {done} steps on {len(training)} images")


def run_folder(
    args: argparse.Namespace,
    sd: StableDiffusion,
    training: LabelledImages,
    recipe: FineTuning,
    preprocessing: Preprocessing,
    processes: Processes,
) -> RunFolder:
    """OUT, seen to be free or to hold this very run, and to have room for it."""
    frozen: dict[str, nn.Module] = {"vae": sd.vae} if args.train_text_encoder else {"clip": sd.clip, "vae": sd.vae}
    settings = {
        **recipe.settings(),
        "data": objective.data_hash(training.keys, training.captions(args.template)),
        "preprocessing": preprocessing.settings(),
        "unet": asdict(sd.config.unet),
        "frozen": fingerprint(*frozen.values()),
    }
    if args.train_text_encoder:
        settings["text_encoder"] = asdict(sd.config.clip)
    folder = RunFolder(args.out, frozen, settings, args.keep, processes.first)
    folder.check(resume=args.resume == "auto")
    folder.require_space([sd.clip, sd.unet] if args.train_text_encoder else [sd.unet], averaged=recipe.ema_decay > 0)
    record = {
        "command": "finetune",
        "settings": folder.settings,
        "steps": recipe.steps,
        "images": len(training),
        "weights_sha256": sd.weights_sha256(),
        "processes": processes.world,
        "sharded": args.shard,
        "device": str(sd.device),
        "torch": torch.__version__,
    }
    add_to_record(args.out, record, processes)
    return folder


def add_to_record(out: Path, entries: dict[str, object], processes: Processes) -> None:
    """Put entries into OUT/run.json, beside what is there."""
    if processes.first:
        write_json(out / "run.json", read_json(out / "run.json") | entries)


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
    if args.measure_cache and args.no_cache:
        raise ValueError("--measure-cache: there is no cache to measure with --no-cache")


def read(args: argparse.Namespace, processes: Processes) -> LabelledImages:
    """The images that there is a caption for, that --only lets through, and that can be decoded."""
    data = reading.read(args.data, args)
    if args.attributes:
        data = data.saying(data.attributes)
    for note in data.notes if processes.first else ():
        log.info("%s: %s", args.data, note)
    for label in args.only:
        known = tables.one_of(f"--only, labels of {args.data}", label, data.observations)
        data = data.select((data.observations[known] == 1).to_numpy())
    if not len(data):
        raise ValueError(f"--data: no image of {args.data} is left" + (f" that shows {args.only}" if args.only else ""))
    scan = args.out / "scan.json"
    if processes.first:
        args.out.mkdir(parents=True, exist_ok=True)
        images.usable(data.files, args.max_bad, args.workers, scan, data.reading)
    processes.any(False)  # the others wait, and find what the first one found
    kept = images.usable(data.files, args.max_bad, args.workers, scan, data.reading, said=False)
    return data.select(kept)


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


def preprocessing_of(args: argparse.Namespace, sd: StableDiffusion, reading: Reading) -> Preprocessing:
    """Raises ValueError for a --size that the networks cannot halve often enough."""
    if args.size is not None:
        latent_size(str(args.size), sd)
    return Preprocessing(args.size or sd.latent_shape[1] * sd.config.vae.downscale, args.fit, args.flip, reading)


def prepare(
    data: LabelledImages,
    sd: StableDiffusion,
    preprocessing: Preprocessing,
    args: argparse.Namespace,
    stop: Callable[[], bool],
    processes: Processes,
) -> Material:
    """Let the frozen networks say what they will say of some images."""
    encode = sd.tokenizer if args.train_text_encoder else lambda prompts: sd.encode_prompts(prompts).float()
    contexts, places = objective.encode_captions(encode, data.captions(args.template))
    posteriors: Posteriors
    if args.no_cache:
        posteriors = Uncached(data.files, preprocessing, sd.vae, args.workers)
    else:
        folder = args.cache or args.out / "latents"
        posteriors = build(folder, data.files, preprocessing, sd.vae, args.workers, stop, processes)
    return Material(data.files, posteriors, places, contexts, sd.config.vae.scaling_factor)


def as_uncached(
    material: Material, preprocessing: Preprocessing, sd: StableDiffusion, args: argparse.Namespace
) -> Material:
    """The same material without its cache."""
    return replace(material, posteriors=Uncached(material.files, preprocessing, sd.vae, args.workers))


def sampler(sd: StableDiffusion, prompts: list[str]) -> Callable[[], Image.Image]:
    """Draws the prompts with the networks as they are by then."""

    def draw() -> Image.Image:
        *contexts, empty = sd.encode_prompts([*prompts, ""])[:, None]
        named = dict(zip(prompts, contexts, strict=True))
        return watch.draw_samples(sd.unet, sd.schedule, named, empty, sd.decode_latents, sd.latent_shape)

    return draw
