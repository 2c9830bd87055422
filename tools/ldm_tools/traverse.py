"""`ldm traverse`: trajectories from a neutral prompt to each style, for any checkpoint.

ldm traverse --neutral "Normal chest X-ray with no significant findings" \\
             --style effusion="Chest X-ray of a subject with Pleural Effusion" --seeds 0-15 --out out/effusion
"""

import argparse
from dataclasses import replace
from pathlib import Path

from ldm.pipeline import StableDiffusion
from ldm.traversal.following import evaluations
from ldm.traversal.plan import SWAP_STEPS, Traversal, parse_integers
from ldm.traversal.real_images import ImageStart, open_images
from ldm.traversal.round_trip import FITS
from ldm.traversal.run_folder import run_traversal
from ldm.traversal.run_images import write_figures
from ldm_tools.invert import round_trip
from ldm_tools.options import (
    add_adapters,
    add_model,
    add_sampling,
    latent_size,
    load_model,
    named_prompts,
    ready_for,
    take_own,
)
from ldm_tools.pixels import add_pixels, pixels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command to `parser`."""
    parser.description = (
        "Denoise every seed under the neutral prompt, and again with each style's prompt swapped in after s steps, for "
        "every s of --swap-steps; steps that branches share are taken once. Draw a Bezier curve through each style's "
        "latents, decode everything, and write latents.safetensors, images/, figure.png, curve.gif and run.json."
    )
    parser.add_argument("--neutral", required=True, help="the prompt of the unedited image")
    parser.add_argument("--style", action="append", required=True, metavar="NAME=PROMPT", help="repeat for each style")
    parser.add_argument(
        "--swap-steps",
        default=",".join(map(str, SWAP_STEPS)),
        help="numbers of neutral steps before the swap; early swaps edit strongly (default %(default)s)",
    )
    parser.add_argument(
        "--fast",
        action="store_true",
        help="past its swap a branch asks the network at a few steps only, and else follows the neutral path: "
        f"{evaluations(fast=True)} evaluations a seed and attribute, not {evaluations(fast=False)}. Of ddim without "
        "--eta only. What it keeps of the trajectories was measured: see ldm/samplers/README.md",
    )
    parser.add_argument(
        "--indexing",
        choices=("steps", "authors"),
        default="steps",
        help="authors: s + 1 neutral steps, as in the paper's published code",
    )
    parser.add_argument("--bezier-points", type=int, default=50, help="points along each curve; 0: none (default 50)")
    parser.add_argument("--keep", metavar="x_t,x0_pred,eps", help="also save these of every step of every branch")
    parser.add_argument("--no-images", action="store_true", help="write latents and run.json only")
    real = parser.add_argument_group("from real images instead of seeds")
    real.add_argument(
        "--image",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="start from these images, inverted to noise under the neutral prompt; the neutral prompt is then also the "
        "negative one, so that the neutral branch retraces them at any guidance. Each takes the place of a seed, whose "
        "number is made of its bytes; comparison.png and run.json say how well it is retraced",
    )
    real.add_argument(
        "--inversion",
        choices=("fixed-point", "naive"),
        default="fixed-point",
        help="see `ldm invert` (default %(default)s)",
    )
    real.add_argument(
        "--fit", choices=FITS, default="squash", help="how an image is brought to --size (default %(default)s)"
    )
    add_pixels(parser)
    add_model(parser)
    add_adapters(parser)
    add_sampling(parser)
    parser.set_defaults(negative=None)  # empty, or with --image the neutral prompt


def refuse_equal_prompts(sd: StableDiffusion, plan: Traversal) -> None:
    """Raises ValueError for a style whose tokens are the neutral prompt's: its trajectory would stand still."""
    prompts = [plan.neutral, *plan.styles.values()]
    ids, weights = (read(prompts, sd.prompt_chunks) for read in (sd.tokenizer.chunked, sd.tokenizer.weights))
    for name, prompt, style, own in zip(plan.styles, prompts[1:], ids[1:], weights[1:], strict=True):
        if style.equal(ids[0]) and own == weights[0]:
            longer = len(sd.tokenizer.encode(prompt)) > sd.prompt_chunks * (sd.tokenizer.tokens - 2)
            why = "what it adds is cut off; shorten both, or give --long-prompts" if longer else "it is the same text"
            raise ValueError(f"--style: {name} has the same tokens as the neutral prompt: {why}")


def run(args: argparse.Namespace) -> None:
    """Raises ValueError for options that do not fit."""
    styles = named_prompts(args.style)
    if args.image and args.seeds != "0":
        raise ValueError(
            f"--seeds: got {args.seeds!r} beside --image, expected one or the other: an image has its own start"
        )
    if args.image and args.end == "zero":
        raise ValueError("--end: zero has no way back to an image's noise; leave it out beside --image")
    images = open_images(args.image)
    sources = take_own(args)
    plan = Traversal(  # before the weights are read, so that bad options are refused at once
        neutral=args.neutral,
        styles=styles,
        seeds=tuple(images) or parse_integers(args.seeds, "--seeds"),
        swap_steps=parse_integers(args.swap_steps, "--swap-steps"),
        steps=args.steps,
        guidance=args.guidance,
        negative=(args.neutral if images else "") if args.negative is None else args.negative,
        sampler=args.sampler,
        sampler_named=args.sampler_named,
        end=args.end,
        spacing=args.spacing or "leading",
        eta=args.eta,
        own_code=sources,
        indexing=args.indexing,
        bezier_points=args.bezier_points,
        keep=tuple(args.keep.split(",")) if args.keep else (),
        fast=args.fast,
    )
    sd = ready_for(args, load_model(args), [plan.neutral, *styles.values(), plan.negative])
    refuse_equal_prompts(sd, plan)
    plan = replace(plan, latent_size=latent_size(args.size, sd), spacing=args.spacing or sd.schedule.spacing)
    start = ImageStart(sd, plan, images, args.inversion, args.fit, pixels(args)) if images else None
    record = run_traversal(sd, plan, args.out, images=not args.no_images, start=start)
    if not args.no_images:
        write_figures(args.out, plan)
    for entry in record.get("images", []):
        print(round_trip(entry))
    print(
        f"{len(plan.seeds)} seeds, {len(styles)} styles, {len(plan.swap_steps)} swap steps: {record['unet_rows']} "
        f"U-Net rows where separate runs cost {record['unet_rows_separate']}; {record['seconds']} s; see {args.out}"
    )
