"""`ldm hspace`: are directions straighter at the network's bottleneck than in the latents?

ldm hspace --out out/hspace                            the middle block, both domains
ldm hspace --places mid_block,up_blocks.1 --steps 50   any places; see ldm/probe
ldm hspace --weights FILE --neutral "a man" --style glasses="a man with glasses"
"""

import argparse
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ldm import pipeline, probe
from ldm.files import write_json
from ldm.phantom.prompts import DOMAINS, GUIDANCE, Cell
from ldm.study.report.plot_style import save_figure
from ldm.study.structure import bottleneck, bottleneck_figures
from ldm.study.structure.domains import chosen_domains
from ldm.traversal.plan import parse_integers
from ldm_tools.options import add_adapters, add_model, add_own_prompts, load_model, own_prompts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command to `parser`."""
    parser.description = (
        "Draw every seed under the neutral prompt and with each style swapped in at nine steps, and compare the "
        "directions and paths of the final latents with those of the network's own activations: cosine matrices, "
        "measures of straightness, and how alike the directions of different seeds are. Writes hspace.json and the "
        "figures directions and straightness (PNG, PDF). A few minutes on two free CPU cores."
    )
    parser.add_argument("--out", type=Path, default=Path("out/hspace"), help="folder to write (default %(default)s)")
    parser.add_argument("--domains", default=",".join(DOMAINS), help="whose prompts (default: %(default)s)")
    add_own_prompts(parser, "those of --domains")
    parser.add_argument("--places", default="mid_block", help="of the U-Net, such as mid_block,up_blocks.1")
    parser.add_argument("--seeds", default="0-5", help="which patients, such as 0-15 (default %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="DDIM steps; swaps scale along (default %(default)s)")
    parser.add_argument("--guidance", type=float, default=GUIDANCE, help="guidance scale (default %(default)s)")
    add_model(parser)
    add_adapters(parser)


def run(args: argparse.Namespace) -> None:
    """Raises ValueError for options that do not fit."""
    styles, seeds = own_prompts(args), parse_integers(args.seeds, "--seeds")
    cells = {"own": Cell("own", "Own", args.neutral, styles)} if styles else chosen_domains(args.domains)
    if args.steps < 10:
        raise ValueError(f"--steps: got {args.steps}, expected 10 or more: nine swaps want steps of their own")
    swap_steps = bottleneck.scaled_swap_steps(args.steps)
    sd = load_model(args)
    places = probe.find_places(sd.unet, *args.places.split(","))
    rows = sum(1 + len(cell.styles) * len(swap_steps) for cell in cells.values())
    attributes: dict[str, Any] = {}
    with tqdm(total=rows * len(seeds) * args.steps, desc="U-Net rows", unit="row", mininterval=1) as bar:
        for cell in cells.values():
            attributes |= measure(sd, cell, seeds, swap_steps, places, args, bar)

    save_figure(bottleneck_figures.figure_directions(attributes), args.out / "directions")
    save_figure(bottleneck_figures.figure_straightness(attributes), args.out / "straightness")
    write_json(
        args.out / "hspace.json",
        {
            "weights_sha256": sd.weights_sha256(),
            "dtype": str(sd.dtype).removeprefix("torch."),
            "seeds": seeds,
            "steps": args.steps,
            "guidance": args.guidance,
            "places": places,
            "attributes": attributes,
        },
    )
    print(f"look at {args.out / 'directions.png'} and straightness.png")


def measure(
    sd: pipeline.StableDiffusion,
    cell: Cell,
    seeds: tuple[int, ...],
    swap_steps: tuple[int, ...],
    places: tuple[str, ...],
    args: argparse.Namespace,
    bar: tqdm,
) -> dict[str, Any]:
    """One domain: attribute -> its part of hspace.json."""
    by_space: dict[str, list[bottleneck.Seen]] = {}
    for seed in seeds:
        spaces = bottleneck.trajectories(sd, cell, seed, swap_steps, places, args.steps, args.guidance, bar.update)
        for name, points in spaces.items():
            by_space.setdefault(name, []).append(bottleneck.seen_in(points, len(cell.styles), len(swap_steps)))
    return {
        attribute: {
            "title": cell.title_of(attribute),
            "spaces": {name: bottleneck.report(seen, i, swap_steps) for name, seen in by_space.items()},
        }
        for i, attribute in enumerate(cell.styles)
    }
