"""`ldm finetune`: teach the U-Net a data set, from its images and captions. [paper, stage one]

The text encoder stays as it is, as in the paper; with --train-text-encoder it learns along, for words it does not know.

ldm finetune --weights v1-5-pruned-emaonly.safetensors --data CheXpert-v1.0-small --out runs/chest
ldm finetune --lora 8 --lr 1e-4 --data CheXpert-v1.0-small --out runs/chest-lora      # a low-rank adapter of a few MB
torchrun --nproc-per-node 4 --no-python ldm finetune ...     # the same run on four GPUs: a step's batches are dealt out
"""

import argparse
import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ldm.config import SD15_DIFFUSION
from ldm.data import images, splits, tables
from ldm.data.labelled import LabelledImages
from ldm.data.reading import Reading
from ldm.files import read_json, write_json
from ldm.images import from_uint8
from ldm.pipeline import StableDiffusion
from ldm.schedule import TRAIN_STEPS
from ldm.train import distributed, finetune, objective, watch
from ldm.train.autoencoder import reconstruction_psnr
from ldm.train.distributed import Processes
from ldm.train.latent_cache import Interrupted, Posteriors, Preprocessing, Uncached, build, fingerprint
from ldm.train.low_rank import Adapter, adapt
from ldm.train.objective import FineTuning, Material
from ldm.train.run_folder import LAST, RunFolder, stop_on_signals
from ldm.train.unet_learner import UNetLearner
from ldm.traversal.real_images import ENOUGH_DB, too_little
from ldm_tools import reading
from ldm_tools.data import chosen_split
from ldm_tools.finetune_options import add_data, add_recipe, add_run, check, recipe_of
from ldm_tools.options import add_model, latent_size, load_model
from ldm_tools.reading import FOLDER, add_reading

SHEET = 16  # prompts on a sheet of samples

log = logging.getLogger(__name__)

MEASURED_IMAGES = 8  # that the autoencoder is tried on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command to `parser`."""
    parser.description = (
        "Fine-tune the U-Net on a folder of labelled images; the autoencoder stays as it is, and so does the text "
        "encoder without --train-text-encoder. What is not given is as the paper's authors had it. The newest "
        f"checkpoint is OUT/{LAST}, a whole model; with --lora RANK, a file for --lora of the other commands."
    )
    add_model(parser)
    parser.set_defaults(dtype="float32")  # what the weights are kept in; --bf16 is about the arithmetic
    parser.add_argument("--data", type=Path, required=True, help=FOLDER)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and log.jsonl")
    parser.add_argument("--resume", choices=("auto",), help="auto: go on with the run in OUT, if there is one")
    add_recipe(parser.add_argument_group("the recipe"))
    add_data(parser.add_argument_group("the data"))
    add_run(parser.add_argument_group("the run"))
    add_reading(parser, "labels that captions name (default: all that the data set's captions do)")


def run(args: argparse.Namespace) -> None:
    """Train, and say what came of it. Raises ValueError for data and options that do not fit each other."""
    check(args)
    device = distributed.own_device(args.device)
    args.device = str(device)
    with distributed.together(device) as processes:
        data = read(args, processes)
        split = chosen_split(data, args.split, seed=42)
        for sentence in splits.uneven(data, split) if processes.first else ():
            log.warning("%s", sentence)
        training, held_out = data.select(split.train), data.select(split.validation[: args.validate])
        if len(training) < args.batch:
            raise ValueError(f"--batch: got {args.batch}, more than the {len(training)} training images of {args.data}")
        recipe = recipe_of(args, data.kind, len(training))
        sd = load_model(args)
        if len(sd.schedule) != TRAIN_STEPS:
            raise ValueError(
                f"--weights: {args.weights} was trained on {len(sd.schedule)} noise levels; here it is {TRAIN_STEPS}"
            )
        preprocessing = preprocessing_of(args, sd, data.reading)
        adapter = adapter_of(args, sd)
        folder = run_folder(args, sd, training, recipe, preprocessing, processes, adapter)
        if processes.first:
            measure_autoencoder(sd, training, preprocessing)
        clip = sd.clip if args.train_text_encoder else None
        learner = UNetLearner(sd.unet, recipe, processes, args.shard, clip, adapter)
        with stop_on_signals() as stop:
            try:
                material = prepare(training, sd, preprocessing, args, stop, processes)
                held = prepare(held_out, sd, preprocessing, args, stop, processes) if len(held_out) else None
                rounds = finetune.Rounds(
                    save_every=args.save_every,
                    held_out=watch.validation_examples(held) if held else (),
                    sample_every=args.sample_every,
                    sample=partial(watch.draw_samples, sd, training.prompts(args.template)[:SHEET]),
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
        what = "model" if adapter is None else f"LoRA (--lora {folder.path / LAST} --weights {args.weights})"
        print(f"{folder.path / LAST}: the {what} after {done} steps on {len(training)} images")


def adapter_of(args: argparse.Namespace, sd: StableDiffusion) -> Adapter | None:
    """What --lora asks for, put into the U-Net; None without it."""
    if args.lora is None:
        return None
    base = sd.weights_sha256() + (f" ({sd.weight_set})" if sd.weight_set else "")
    return adapt(sd.unet, args.lora, args.lora_alpha, args.lora_modules, seed=args.seed, base=base)


def measure_autoencoder(sd: StableDiffusion, data: LabelledImages, preprocessing: Preprocessing) -> None:
    """Say how well the frozen autoencoder brings back some of the images: what it loses is lost to the U-Net."""
    rows = np.linspace(0, len(data) - 1, min(MEASURED_IMAGES, len(data))).astype(int)
    size, fit = preprocessing.size, preprocessing.fit
    pixels = np.stack([images.load_image(data.files[row], size, fit, data.reading) for row in rows])
    batch = from_uint8(pixels).to(sd.device, sd.vae.quant_conv.weight.dtype)
    psnr = float(reconstruction_psnr(sd.vae, batch).mean())
    if psnr < ENOUGH_DB:
        log.warning("%s: of %d images, %s", data.root, len(rows), too_little(psnr))
    else:
        log.info("%s: the autoencoder brings %d images back to %.1f dB", data.root, len(rows), psnr)


def run_folder(
    args: argparse.Namespace,
    sd: StableDiffusion,
    training: LabelledImages,
    recipe: FineTuning,
    preprocessing: Preprocessing,
    processes: Processes,
    adapter: Adapter | None,
) -> RunFolder:
    """OUT, seen to be free or to hold this very run, and to have room for it."""
    frozen: dict[str, nn.Module] = {"vae": sd.vae} if args.train_text_encoder else {"clip": sd.clip, "vae": sd.vae}
    trained: list[nn.Module] = [sd.clip, sd.unet] if args.train_text_encoder else [sd.unet]
    settings = {
        **recipe.settings(),
        "data": objective.data_hash(training.keys, training.captions(args.template)),
        "preprocessing": preprocessing.settings(),
        "unet": asdict(sd.config.unet),
        "frozen": fingerprint(*frozen.values()),
    }
    if args.train_text_encoder:
        settings["text_encoder"] = asdict(sd.config.clip)
    if sd.diffusion != SD15_DIFFUSION:
        settings["diffusion"] = asdict(sd.diffusion)
    if adapter is not None:
        settings["lora"], frozen, trained = adapter.settings(), {}, [adapter]
    folder = RunFolder(args.out, frozen, settings, args.keep, processes.first, sd.diffusion)
    folder.check(resume=args.resume == "auto")
    folder.require_space(trained, averaged=recipe.ema_decay > 0)
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
    sd.tokenizer.say_cut(list(data.captions(args.template)))  # once for all, rather than batch by batch
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
