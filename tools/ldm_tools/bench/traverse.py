"""`ldm bench traverse`: the prompt tree against every branch run alone, by the same code."""

import argparse
import json

from ldm.bench import harness, traversal
from ldm.phantom.prompts import CELLS
from ldm.study import shipped
from ldm.traversal.plan import SWAP_STEPS, Traversal
from ldm_tools.bench import fast_traverse
from ldm_tools.options import add_model, load_model

CELL = CELLS["chest"]  # two attributes, as the paper's chest X-rays


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the subject to `parser`."""
    parser.description = (
        "Two attributes swapped in at nine steps each, to the final latents: as one tree, and as 19 runs of their own. "
        "Prompts are the phantom chest's, whatever the weights: what is timed does not depend on them."
    )
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps; swaps scale along (default %(default)s)")
    parser.add_argument("--guidance", type=float, help="scale (default 3; with --fast each shipped model's own)")
    parser.add_argument("--rounds", type=int, default=3, help="of the timing (default %(default)s)")
    parser.add_argument("--max-batch", type=int, help="most rows in one U-Net call, to bound memory")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    fast_traverse.add_arguments(parser)
    add_model(parser)


def run(args: argparse.Namespace) -> None:
    """Raises ValueError for options that do not fit."""
    fast_traverse.refuse_idle(args)
    if args.fast:
        fast_traverse.run(args)
        return
    if args.rounds < 1 or args.steps < len(SWAP_STEPS) + 1:
        raise ValueError(f"--rounds, --steps: got {args.rounds}, {args.steps}, expected 1 or more, 10 or more")
    plan = Traversal(
        neutral=CELL.neutral,
        styles=CELL.styles,
        seeds=(0,),
        steps=args.steps,
        swap_steps=tuple(s * args.steps // 50 for s in SWAP_STEPS),
        guidance=shipped.PHANTOM.guidance if args.guidance is None else args.guidance,
        bezier_points=0,
    )
    sd = load_model(args)
    result = traversal.tree_against_separate(sd, plan, args.rounds)
    result |= {"peak_memory_mib": round(harness.peak_memory_mib(sd.device)), "environment": harness.environment()}
    if args.json:
        print(json.dumps(result, indent=1))
        return
    for name, timing in result["timings"].items():
        low, median, high = (timing[key] / 1000 for key in ("p20_ms", "median_ms", "p80_ms"))
        print(f"{name:14} {median:8.2f} s ({low:.2f}-{high:.2f})  {timing['ratio']:.2f} x")
    print(
        f"{result['unet_rows']} rows against {result['unet_rows_separate']}, {result['rows_ratio']:.2f} x fewer; "
        f"{result['peak_memory_mib']} MiB at most"
    )
