"""`ldm invert`: from real images back to the noise that a sampler would make them of, and down again.

ldm invert patient1.jpg patient2.png --prompt "Normal chest X-ray with no significant findings" --out out/inverted
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm.traversal.real_images import open_images, run_inversion
from ldm.traversal.round_trip import FITS, METHODS, Inversion
from ldm_tools.options import (
    add_adapters,
    add_long_prompts,
    add_model,
    add_spacing,
    latent_size,
    load_model,
    ready_for,
    take_own,
)
from ldm_tools.pixels import add_pixels, pixels

MEASURED = ("round_trip_error", "psnr_db", "autoencoder_psnr_db")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command to `parser`."""
    parser.description = (
        "Encode images, invert them to noise under a prompt, and sample back. Writes latents.safetensors (encoded, "
        "x_T, retraced), images/, comparison.png and run.json: for each image the round trip's error and PSNR beside "
        "what the autoencoder alone loses. `ldm traverse --image` starts trajectories there. Run it again to go on "
        "after a stop."
    )
    parser.add_argument(
        "image", nargs="+", type=Path, metavar="IMAGE", help="files of any format that Pillow reads, or DICOM"
    )
    parser.add_argument("--prompt", required=True, help="what the images show")
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="fixed-point",
        help="naive: DDIM backwards, one evaluation a step. fixed-point: each step until it is settled, so that DDIM "
        "retraces the image. edict: a sampler on a pair of latents with an exact inverse, which alone retraces it "
        "(default %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=50, help="sampling steps (default %(default)s)")
    add_spacing(parser)
    parser.add_argument(
        "--guidance",
        type=float,
        default=1.0,
        help="both ways. A larger scale costs accuracy: a step back guesses at eps of a latent not yet known, and "
        "guidance multiplies what the guess is off by; run.json says how much was lost (default %(default)s)",
    )
    parser.add_argument(
        "--negative",
        default="",
        help="the prompt that guidance pushes away from (default: empty). Where it is the prompt itself, any scale "
        "acts as 1: so an image inverted at 1 is retraced at 7.5",
    )
    parser.add_argument(
        "--fit", choices=FITS, default="squash", help="how an image is brought to --size (default %(default)s)"
    )
    parser.add_argument("--size", help="of the images in pixels, WIDTHxHEIGHT or one number (default: as trained)")
    parser.add_argument("--max-batch", type=int, help="most rows in one U-Net call, to bound memory")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; continues a run cut off there")
    add_long_prompts(parser)
    add_pixels(parser)
    add_model(parser)
    add_adapters(parser)


def run(args: argparse.Namespace) -> None:
    """Raises ValueError for options that do not fit."""
    sources = take_own(args)
    how = Inversion(  # before the weights are read, so that bad options are refused at once
        prompt=args.prompt,
        method=args.method,
        steps=args.steps,
        spacing=args.spacing or "leading",
        guidance=args.guidance,
        negative=args.negative,
        fit=args.fit,
        reading=pixels(args),
        own_code=sources,
    )
    images = open_images(args.image)
    sd = ready_for(args, load_model(args), [args.prompt, args.negative])
    how = replace(how, spacing=args.spacing or sd.schedule.spacing)
    record = run_inversion(sd, how, images, args.out, latent_size=latent_size(args.size, sd))
    for entry in record["images"]:
        print(round_trip(entry))
    print(f"{record['unet_rows_this_run']} U-Net rows, {record['seconds']} s; see {args.out / 'comparison.png'}")


def round_trip(entry: Mapping[str, Any]) -> str:
    """What run.json says of an image, in a line."""
    number = {name: "lost" if value is None else f"{value:.4g}" for name, value in entry.items() if name in MEASURED}
    line = f"{entry['file']} (seed{entry['seed']:04d}): relative error of the latent {number['round_trip_error']}"
    if "psnr_db" not in entry:
        return line
    return f"{line}, {number['psnr_db']} dB where the autoencoder alone reaches {number['autoencoder_psnr_db']} dB"
