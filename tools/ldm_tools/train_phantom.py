"""`ldm train-phantom`: the recipe of the shipped model, from rendering its training set to the checkpoint.

Each stage restarts where it stopped: render, autoencoder, text encoder, U-Net, and the U-Net three times again
on more of what it finds hard. About two hours and a half on two cores.
"""

import argparse
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm import checkpoint
from ldm.clip import CLIPTextEncoder
from ldm.config import PHANTOM
from ldm.files import complete
from ldm.schedule import Schedule
from ldm.tokenizer import Tokenizer
from ldm.train import autoencoder, diffusion, text_encoder
from ldm.train.learner import Recipe
from ldm.train.loop import fit
from ldm.train.phantom_set import PhantomSet, draw
from ldm.unet import UNet
from ldm.vae import AutoencoderKL

log = logging.getLogger(__name__)

IMAGES, FIRST_SEED = 24_000, 1_000_000  # half chest, half skin; seeds below are left for evaluation
AUTOENCODER = Recipe(steps=4600, lr=2e-3, weight_decay=0.0)
AUTOENCODER_BATCH = 4
TEXT_ENCODER = Recipe(steps=1000, lr=1e-3, weight_decay=0.0)
TEXT_ENCODER_BATCH = 128
UNET = Recipe(steps=2800, lr=1e-3, warmup=200, ema_decay=0.998)
UNET_BATCH = 32
# Hair comes out ink-like after the first U-Net stage alone, bubbles and rulers faint: three more, on batches that hold
# more of them.
REFINEMENTS = (
    (Recipe(steps=2400, lr=5e-4, ema_decay=0.998), {"chest": 8, "skin": 12, "hair": 12}),
    (Recipe(steps=1400, lr=6e-4, ema_decay=0.998), {"chest": 6, "skin": 26}),
    (Recipe(steps=1800, lr=7e-4, ema_decay=0.998), {"chest": 6, "skin": 14, "gel_bubble": 6, "ruler": 6}),
)
CAPTION_DROPOUT = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command to `parser`."""
    parser.description = (
        "Train the model in weights/ anew: render 24,000 phantoms, train the autoencoder, the text encoder and the "
        "U-Net one after the other, write one checkpoint in the single-file layout of SD1.5. About two hours "
        "and a half on two cores; run it again with the same --work to go on after a stop."
    )
    parser.add_argument(
        "--work", type=Path, default=Path("out/train-phantom"), help="folder of images, checkpoints and logs"
    )
    parser.add_argument("--out", type=Path, default=Path("weights/phantom.safetensors"), help="the checkpoint to write")
    parser.add_argument("--force", action="store_true", help="replace --out where it exists")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, batches and noise (default %(default)s)")
    parser.add_argument("--shrink", type=int, default=1, help="divide images and steps by this, for a trial")


def run(args: argparse.Namespace) -> None:
    """All stages. Raises ValueError for numbers that do not fit."""
    if args.shrink < 1:
        raise ValueError(f"--shrink: got {args.shrink}, expected >= 1")
    if args.out.exists() and not args.force:
        raise ValueError(f"--out: {args.out} exists; pass --force to replace it once training is done")
    args.work.mkdir(parents=True, exist_ok=True)
    continue_only(args.work / "recipe.json", {"seed": args.seed, "shrink": args.shrink})
    data = PhantomSet(args.work, max(64, IMAGES // args.shrink), FIRST_SEED)
    tokenizer = Tokenizer()
    tokens = text_encoder.CaptionTokens(data.captions, tokenizer)

    torch.manual_seed(args.seed)  # the initial weights; everything else has generators of its own
    vae = AutoencoderKL(PHANTOM.vae)
    clip = CLIPTextEncoder(PHANTOM.clip)
    text_encoder.initialise(clip)
    unet = UNet(PHANTOM.unet)
    diffusion.initialise(unet)
    for network in (vae, unet):  # the layout that convolutions are fastest in on a CPU
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    latents = train_autoencoder(vae, data, args)
    train_text_encoder(clip, latents, tokens, args)
    train_unet(unet, latents, clip, tokens, tokenizer([""]), data, args)
    checkpoint.save(args.out, {"clip": clip, "vae": vae, "unet": unet}, dtype=torch.float16, overwrite=args.force)
    log.info("wrote %s", args.out)


def train_autoencoder(vae: AutoencoderKL, data: PhantomSet, args: argparse.Namespace) -> Tensor:
    """Stage 1. Returns the latents of all images: (N, 8, 16, 16), mean and standard deviation, scaled."""
    latents, weights = args.work / "latents.safetensors", args.work / "vae.safetensors"
    if latents.exists():
        vae.load_state_dict(load_file(weights))
        return load_file(latents)["latents"]

    def loss_at(step: int) -> Tensor:
        return autoencoder.autoencoder_loss(vae, data, step, AUTOENCODER_BATCH, args.seed)

    fit("autoencoder", vae, loss_at, shrunk(AUTOENCODER, args.shrink), args.work)
    autoencoder.normalise_latents(vae, data, images=min(2048, len(data)))
    encoded = autoencoder.encode_all(vae, data)
    store(weights, dict(vae.state_dict()))
    store(latents, {"latents": encoded})
    return encoded


def train_text_encoder(
    clip: CLIPTextEncoder, latents: Tensor, tokens: text_encoder.CaptionTokens, args: argparse.Namespace
) -> None:
    """Stage 2. The image tower and the temperature are thrown away."""
    c = PHANTOM.vae.latent_channels
    model = text_encoder.ContrastiveModel(clip, (c, *latents.shape[2:]))

    def loss_at(step: int) -> Tensor:
        images = draw(args.seed, step, len(latents), TEXT_ENCODER_BATCH)
        return text_encoder.contrastive_loss(model, latents[images, :c], tokens.draw(images, args.seed, step), tokens)

    fit("text_encoder", model, loss_at, shrunk(TEXT_ENCODER, args.shrink), args.work)


def train_unet(
    unet: UNet,
    latents: Tensor,
    clip: CLIPTextEncoder,
    tokens: text_encoder.CaptionTokens,
    empty: Tensor,
    data: PhantomSet,
    args: argparse.Namespace,
) -> None:
    """The other stages. The text encoder is frozen: the context of every caption is computed once."""
    with torch.no_grad():
        contexts = clip(torch.cat([tokens.ids, empty]))  # the last one is the empty caption's
    schedule = Schedule.sd15()

    def loss_of(images: NDArray[np.int64], step: int) -> Tensor:
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        mean, std = latents[images].chunk(2, dim=1)
        x_0 = mean + std * torch.randn(mean.shape, generator=generator)
        captions = tokens.draw(images, args.seed, step)
        captions = diffusion.drop_captions(captions, len(contexts) - 1, CAPTION_DROPOUT, generator)
        return diffusion.diffusion_loss(unet, x_0, contexts[captions], schedule, generator)

    def loss_at(images_of: Callable[[int], NDArray[np.int64]], before: int, step: int) -> Tensor:
        return loss_of(images_of(step), before + step)

    def draw_by_kind(batch: Mapping[str, int]) -> Callable[[int], NDArray[np.int64]]:
        kinds = {name: data.having(name) for name in batch}
        return lambda step: np.concatenate(
            [rows[draw(args.seed, step, len(rows), batch[name])] for name, rows in kinds.items()]
        )

    rounds = [("unet", UNET, lambda step: draw(args.seed, step, len(latents), UNET_BATCH))]
    for i, (recipe, batch) in enumerate(REFINEMENTS, start=1):
        rounds.append((f"refinement{i}", recipe, draw_by_kind(batch)))
    done = 0  # so that no noise is drawn twice
    for name, recipe, images_of in rounds:
        recipe = shrunk(recipe, args.shrink)
        fit(name, unet, partial(loss_at, images_of, done), recipe, args.work)
        done += recipe.steps


def continue_only(note: Path, asked: dict[str, int]) -> None:
    """Write down what a work folder is for; ValueError when it was begun for something else."""
    if not note.exists():
        note.write_text(json.dumps(asked) + "\n")
    elif (begun := json.loads(note.read_text())) != asked:
        raise ValueError(f"--work: {note.parent} was begun with {begun}, asked for {asked}; use another folder")


def shrunk(recipe: Recipe, by: int) -> Recipe:
    """The same recipe with fewer steps."""
    return replace(recipe, steps=max(2, recipe.steps // by), warmup=recipe.warmup // by)


def store(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file."""
    with complete(path) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
