"""`ldm train-phantom`: the recipe of the shipped model, from rendering its training set to the checkpoint.

Each stage restarts where it stopped: render, autoencoder, text encoder, U-Net, and the U-Net three times again
on more of what it finds hard. About two hours and a half on two cores.
"""

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from ldm import checkpoint
from ldm.config import PHANTOM
from ldm.tokenizer import Tokenizer
from ldm.train import small_model
from ldm.train.learner import Recipe
from ldm.train.phantom_set import PhantomSet, draw
from ldm.train.small_model import Draw, Round, shrunk
from ldm.train.text_encoder import CaptionTokens

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
    small_model.continue_only(args.work / "recipe.json", {"seed": args.seed, "shrink": args.shrink})
    data = PhantomSet(args.work, max(64, IMAGES // args.shrink), FIRST_SEED)
    tokenizer = Tokenizer()
    tokens = CaptionTokens(data.captions, tokenizer)
    clip, vae, unet = networks = small_model.build(PHANTOM, args.seed)

    def any_of(batch: int) -> Draw:
        return lambda step: draw(args.seed, step, len(data), batch)

    latents = small_model.train_autoencoder(
        vae, data, any_of(AUTOENCODER_BATCH), shrunk(AUTOENCODER, args.shrink), args.work, args.seed
    )
    small_model.train_text_encoder(
        clip, latents, tokens, any_of(TEXT_ENCODER_BATCH), shrunk(TEXT_ENCODER, args.shrink), args.work, args.seed
    )
    rounds = [Round("unet", shrunk(UNET, args.shrink), any_of(UNET_BATCH))]
    for i, (recipe, kinds) in enumerate(REFINEMENTS, start=1):
        rounds.append(Round(f"refinement{i}", shrunk(recipe, args.shrink), by_kind(data, kinds, args.seed)))
    contexts = small_model.contexts_of(clip, tokens.ids, tokenizer([""]))
    small_model.train_unet(unet, latents, contexts, tokens, rounds, args.work, args.seed)
    checkpoint.save(args.out, networks._asdict(), dtype=torch.float16, overwrite=args.force)
    log.info("wrote %s", args.out)


def by_kind(data: PhantomSet, batch: Mapping[str, int], seed: int) -> Draw:
    """Batches that hold so many images of each domain, or with each attribute."""
    kinds = {name: data.having(name) for name in batch}
    return lambda step: np.concatenate([of[draw(seed, step, len(of), batch[name])] for name, of in kinds.items()])
