"""The options of `ldm evaluate`, and those that do not go together."""

import argparse
import os
from pathlib import Path

from ldm.study import shipped
from ldm.study.evaluation import steps
from ldm_tools import options

# The options that only sampling takes, with their defaults; None: as many as there are seeds, or as is needed.
SAMPLED = {
    "cells": None,
    "seeds": "0-15",
    "steps": 50,
    "sampled_swap_steps": None,
    "guidance": None,
    "negative": "",
    "prompt_weights": False,
    "baseline_seeds": None,
    "truth_seeds": None,
    "truth_swap_steps": None,
    "truth_guidance": 1.0,
    "max_batch": None,
}
BASELINE_SEEDS = 8
MOST_PROCESSES = 8  # processes, unless told: each takes a gigabyte
SEEDS_A_PROCESS = 4  # at least, unless told: one takes as long to start as a seed of a shipped model or two


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command to `parser`."""
    parser.description = (
        "Score trajectories: CFRT in four readings, LPIPS, SSIM, latent directions, baselines and, for phantoms, "
        "ground truth. Writes metrics.json, the paper's tables (Markdown, CSV, LaTeX) and figures (PNG, PDF), and "
        "index.html, an explorer that opens from disk. Without RUN it samples phantoms and real skin itself, with the "
        "shipped models. Run it again to go on after a stop."
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folders that `ldm traverse` has written")
    parser.add_argument("--out", type=Path, help="folder to write (needed but for --predictions, which prints)")
    parser.add_argument(
        "--swap-steps", help="those that CFRT averages (default 5,10,15 of 50, as the authors; else as early ones)"
    )
    parser.add_argument(
        "--classifier", type=Path, help="from `ldm classify train` (default: the shipped one that fits)"
    )
    parser.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="STYLE=ATTRIBUTE",
        help="which of the classifier's attributes a RUN's style is; repeat for each. A style that no classifier knows "
        "has no CFRT, but all the rest",
    )
    parser.add_argument("--lpips", default="alex", choices=("alex", "vgg", "squeeze"), help="network (default alex)")
    parser.add_argument("--fetch", action="store_true", help="download LPIPS' ImageNet weights if they are not on disk")
    parser.add_argument(
        "--data",
        type=Path,
        action="append",
        default=[],
        help="a data set to count in Table 3 (default: what the classifiers learned)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="CPU threads of each process (default %(default)s, as under torchrun; more change the last bits)",
    )
    parser.add_argument(
        "--processes",
        type=int,
        help="that share the seeds; the numbers stay the same (default: on a CPU, with models as small as the shipped "
        f"ones, one a core, of {SEEDS_A_PROCESS} seeds or more, {MOST_PROCESSES} at most; else 1; torchrun starts its "
        "own)",
    )
    parser.add_argument("--shown-seeds", type=int, default=6, help="in figures and explorer (default %(default)s)")

    tables = parser.add_argument_group("from a table alone")
    tables.add_argument(
        "--predictions", type=Path, action="append", metavar="FILE.csv",
        help="seed,path,neutral_<attr>,5_<attr>,...,45_<attr>; several files: one per classifier",
    )  # fmt: skip
    tables.add_argument("--attribute", help="the attribute that the table's trajectories swap in")

    # Absent unless typed, so that an option which would do nothing is refused.
    phantoms = parser.add_argument_group(
        "what is sampled, where no RUN is given", "a RUN was sampled with its own", argument_default=argparse.SUPPRESS
    )
    phantoms.add_argument(
        "--cells", help=f"default: {','.join(shipped.CELLS)}; beside --weights those that the model is for"
    )
    phantoms.add_argument("--seeds", help=f"such as 0-199 (default {SAMPLED['seeds']})")
    phantoms.add_argument("--steps", type=int, help=f"DDIM steps (default {SAMPLED['steps']})")
    phantoms.add_argument(
        "--sampled-swap-steps", help="the swaps (default 5,10..45; of fewer than 46 steps the same shares of them)"
    )
    scales = " and ".join(f"{model.guidance:g} for {', '.join(model.cells)}" for model in shipped.MODELS)
    phantoms.add_argument("--guidance", type=float, help=f"guidance scale (default {scales})")
    phantoms.add_argument("--negative", help="the prompt that guidance pushes away from (default: empty)")
    phantoms.add_argument(
        "--prompt-weights", action="store_true", help="read brackets in it as weights, as `ldm generate` does"
    )
    phantoms.add_argument(
        "--baseline-seeds", type=int, help=f"so many for the baselines (default {BASELINE_SEEDS}; one seed has none)"
    )
    phantoms.add_argument("--truth-seeds", type=int, help="rendered phantoms (default: as many as --seeds)")
    phantoms.add_argument(
        "--truth-swap-steps",
        help=f"of those (default {','.join(map(str, steps.TRUTH))}, and those of --swap-steps)",
    )
    phantoms.add_argument("--truth-guidance", type=float, help=f"of those (default {SAMPLED['truth_guidance']})")
    phantoms.add_argument("--max-batch", type=int, help="most rows in one U-Net call, to bound memory")
    options.add_model(parser)
    parser.set_defaults(weights=None)  # each cell has a model of its own
    options.add_adapters(parser)
    options.add_cuda_graph(parser)


def refuse_idle_options(args: argparse.Namespace) -> None:
    """ValueError for an option that would do nothing beside a RUN or --predictions."""
    idle = [name for name in SAMPLED if name in args] if args.runs or args.predictions else []
    if args.predictions:
        idle += [name for name in ("classifier", "data", "fetch", "processes") if getattr(args, name)]
    if idle:
        option, beside = "--" + idle[0].replace("_", "-"), "--predictions" if args.predictions else "RUN"
        raise ValueError(f"{option}: it does nothing beside {beside}, whose samples exist; leave it out")


def check_options(args: argparse.Namespace) -> None:
    """ValueError for what cannot be, where samples are measured."""
    if args.attribute:
        raise ValueError("--attribute: it belongs to --predictions, which is missing")
    if args.out is None:
        raise ValueError("--out: missing; name a folder to write, such as out/evaluation")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out: {args.out} is a file, expected a folder")
    if args.shown_seeds < 1:
        raise ValueError(f"--shown-seeds: got {args.shown_seeds}, expected 1 or more")
    if args.threads < 1:
        raise ValueError(f"--threads: got {args.threads}, expected 1 or more")
    if args.processes is not None and args.processes < 1:
        raise ValueError(f"--processes: got {args.processes}, expected 1 or more")
    if args.processes is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--processes: torchrun has started some already; leave out one of the two")


def named_attributes(args: argparse.Namespace) -> dict[str, str]:
    """What --map says: style -> attribute. Raises ValueError for what is no such pair, or without a RUN."""
    if args.map and not args.runs:
        raise ValueError("--map: it belongs to a RUN, whose styles have names of their own; phantoms' are known")
    pairs = [text.partition("=") for text in args.map]
    for style, equals, attribute in pairs:
        if not (style and equals and attribute):
            raise ValueError(f"--map: got {style + equals + attribute!r}, expected STYLE=ATTRIBUTE")
    named = {style: attribute for style, _, attribute in pairs}
    if len(set(named.values())) < len(pairs):
        raise ValueError(f"--map: expected each style and each attribute once, got {' '.join(args.map)}")
    return named
