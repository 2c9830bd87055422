"""`ldm convert`: write a checkpoint in another layout or precision, one tensor at a time.

ldm convert v1-5-pruned-emaonly.safetensors sd15/ --layout folder --dtype fp16
ldm convert v1-5-pruned-emaonly.safetensors merged.safetensors --layout single --lora style.safetensors:0.8
"""

import argparse
from pathlib import Path

import torch

from ldm.checkpoint import convert
from ldm.tokenizer import clip_vocabulary
from ldm_tools.options import add_adapters, lora_files

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command to `parser`."""
    parser.description = (
        "Convert between the single file and the folder. Converting back gives the same bytes, unless a dtype, a set "
        "of weights or other names were asked for."
    )
    parser.add_argument("source", type=Path, metavar="IN", help="any checkpoint that `ldm inspect` knows")
    parser.add_argument("target", type=Path, metavar="OUT", help="the file or folder to write")
    parser.add_argument("--layout", required=True, choices=("single", "folder"))
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="what weights are stored in (default: as they are)")
    parser.add_argument(
        "--vae-names",
        choices=("new", "old"),
        help="names of the autoencoder's attention: old is what the published folder has (default: what IN has or had)",
    )
    parser.add_argument("--ema", choices=("ema", "plain"), help="of two sets of U-Net weights keep this one only")
    add_adapters(parser)
    parser.add_argument("--force", action="store_true", help="overwrite OUT")


def run(args: argparse.Namespace) -> None:
    """Convert, and name the files written. Raises CheckpointError when IN does not fit or OUT exists."""
    written = convert(
        args.source,
        args.target,
        layout=args.layout,
        dtype=DTYPES[args.dtype] if args.dtype else None,
        vae_names=args.vae_names,
        ema=args.ema,
        loras=lora_files(args),
        embeddings=args.embeddings,
        vocabulary=clip_vocabulary(),
        overwrite=args.force,
    )
    for path in written:
        print(f"{path}: {path.stat().st_size:,} bytes")
