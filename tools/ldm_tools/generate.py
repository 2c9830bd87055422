"""`ldm generate`: images from a prompt, for any checkpoint.

ldm generate --prompt "Chest X-ray of a subject with Pleural Effusion" --seeds 0-15 --out out/effusion
"""

import argparse
import math
from dataclasses import replace

from ldm.images import load_pixels, save_image
from ldm.traversal import figures
from ldm.traversal.plan import Generation, parse_integers
from ldm.traversal.run_folder import run_generation
from ldm.traversal.run_images import image_path
from ldm_tools.options import add_adapters, add_model, add_sampling, latent_size, load_model, ready_for, take_own


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command to `parser`."""
    parser.description = (
        "Denoise every seed under one prompt. Writes images/seed0000/image.png, contact_sheet.png, "
        "latents.safetensors and run.json."
    )
    parser.add_argument("--prompt", required=True, help="what to draw")
    add_model(parser)
    add_adapters(parser)
    add_sampling(parser)


def run(args: argparse.Namespace) -> None:
    """Raises ValueError for options that do not fit."""
    seeds = parse_integers(args.seeds, "--seeds")
    sources = take_own(args)
    plan = Generation(  # before the weights are read, so that bad options are refused at once
        prompt=args.prompt,
        seeds=seeds,
        steps=args.steps,
        guidance=args.guidance,
        negative=args.negative,
        sampler=args.sampler,
        sampler_named=args.sampler_named,
        end=args.end,
        spacing=args.spacing or "leading",
        eta=args.eta,
        own_code=sources,
    )
    sd = ready_for(args, load_model(args), [args.prompt, args.negative])
    plan = replace(plan, latent_size=latent_size(args.size, sd), spacing=args.spacing or sd.schedule.spacing)
    record = run_generation(sd, plan, args.out)
    columns = math.ceil(math.sqrt(len(seeds)))
    images = [load_pixels(image_path(args.out, seed, "image")) for seed in seeds]
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    sheet = figures.grid(rows, [""] * len(rows), [""] * columns, args.prompt)
    save_image(args.out / "contact_sheet.png", sheet)
    print(f"{len(seeds)} images, {record['unet_rows']} U-Net rows, {record['seconds']} s; see {args.out}")
