"""The options that `generate`, `traverse` and `demo` share."""

import argparse
import re
from pathlib import Path

import torch

from ldm import pipeline

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint, where it runs, in which precision."""
    parser.add_argument(
        "--weights",
        type=Path,
        default=pipeline.PHANTOM_WEIGHTS,
        help="SD1.5 single file, diffusers folder, or a file of ours (default: the shipped phantom model)",
    )
    parser.add_argument("--base", type=Path, help="a whole model to lay a U-Net-only --weights over")
    parser.add_argument("--ema", choices=("ema", "plain"), help="which U-Net weights, where a file holds both sets")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="auto: float32 on the CPU, float16 on a GPU, whose autoencoder stays in float32",
    )


def load_model(args: argparse.Namespace) -> pipeline.StableDiffusion:
    """The model that the options of `add_model` name."""
    try:
        device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
        )
    except RuntimeError as error:
        raise ValueError(f"--device: got {args.device!r}, expected cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device: got {args.device!r}, but torch sees no CUDA device here; use --device cpu")
    dtype = DTYPES.get(args.dtype, torch.float16 if device.type == "cuda" else torch.float32)
    return pipeline.load(args.weights, device, dtype, ema=args.ema, base=args.base)


def add_sampling(parser: argparse.ArgumentParser, guidance: float = 7.5) -> None:
    """Steps, guidance, seeds, size, memory, output."""
    parser.add_argument("--seeds", default="0", help="such as 0-15 or 0,3,8 (default %(default)s); a seed is an image")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps (default %(default)s)")
    parser.add_argument(
        "--guidance", type=float, default=guidance, help="classifier-free guidance scale (default %(default)s)"
    )
    parser.add_argument("--negative", default="", help="the prompt that guidance pushes away from (default: empty)")
    parser.add_argument("--eta", type=float, default=0.0, help="0: deterministic DDIM (default); 1: noisy as DDPM")
    parser.add_argument("--size", help="of the images in pixels, WIDTHxHEIGHT or one number (default: as trained)")
    parser.add_argument(
        "--max-batch",
        type=int,
        default=16,
        help="most latents in one network call; bounds memory (default %(default)s)",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; continues a run cut off there")


def latent_size(text: str | None, sd: pipeline.StableDiffusion) -> tuple[int, int] | None:
    """ "640x512" pixels -> (64, 80), height and width of the latent; None for None.

    Raises ValueError for other text, or a side that the networks cannot halve often enough.
    """
    if text is None:
        return None
    downscale = sd.config.vae.downscale
    multiple = downscale * 2 ** (len(sd.config.unet.widths) - 1)
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    width, height = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not match or min(width, height) < multiple or width % multiple or height % multiple:
        raise ValueError(f"--size: got {text!r}, expected WIDTHxHEIGHT or one number, multiples of {multiple} pixels")
    return height // downscale, width // downscale
