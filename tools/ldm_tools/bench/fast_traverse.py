"""`ldm bench traverse --fast`: what `ldm traverse --fast` keeps of the trajectories.

ldm bench traverse --fast --seeds 100-149 --out out/bench/fast
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ldm.bench import fast_traversal, harness
from ldm.bench.fast_traversal import GOALS, Comparison
from ldm.bench.rows import RowFile
from ldm.files import write_json
from ldm.names import nearest
from ldm.pipeline import PHANTOM_WEIGHTS, StableDiffusion
from ldm.study import classifier as classifiers
from ldm.study import shipped
from ldm.study.evaluation.instruments import Instruments
from ldm.study.metrics import perceptual
from ldm.study.report.results import MAIN_READING
from ldm.traversal.following import evaluations
from ldm.traversal.plan import parse_integers
from ldm_tools.options import load_model

CELLS = ("chest", "nevus", "real_nevus")  # drawn chest and skin, and real skin
TIMED = {"steps": 50, "rounds": 3, "json": False, "weights": PHANTOM_WEIGHTS}  # the tree's options, and their defaults
NO_LPIPS = perceptual.Unavailable("not asked for", "see `ldm evaluate`")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options to `parser`."""
    fast = parser.add_argument_group("how near `ldm traverse --fast` comes", "by the shipped models and classifiers")
    fast.add_argument(
        "--fast",
        action="store_true",
        help="instead: the same seeds with --fast and without, at --guidance; cosines of the swap directions, and "
        "CFRT. A line a seed in fast.jsonl, from which a run that was cut off goes on; at the end fast.json",
    )
    fast.add_argument("--seeds", help="such as 0-7 (default 100-149)")
    fast.add_argument("--cells", help=f"some of {', '.join(shipped.CELLS)} (default: {','.join(CELLS)})")
    fast.add_argument("--out", type=Path, help="folder (default out/bench/fast)")


def refuse_idle(args: argparse.Namespace) -> None:
    """ValueError for an option that the other measurement takes."""
    if args.fast:
        idle = [f"--{name}" for name, usual in TIMED.items() if getattr(args, name) != usual]
        if idle:
            raise ValueError(
                f"{idle[0]}: it does nothing beside --fast, which has models and steps of its own; leave it out"
            )
    elif idle := [f"--{name}" for name in ("seeds", "cells", "out") if getattr(args, name) is not None]:
        raise ValueError(f"{idle[0]}: it belongs to --fast, which is missing")


def run(args: argparse.Namespace) -> None:
    """Raises ValueError for options that do not fit."""
    seeds = parse_integers(args.seeds or "100-149", "--seeds")
    args.out = args.out or Path("out/bench/fast")
    comparisons = comparisons_of(args)
    settings = {"averaged": "5, 10, 15 of 50", "cells": {c.cell.name: c.settings for c in comparisons}}
    file = RowFile(args.out / "fast.jsonl", settings, ("cell", "seed"))
    missing = [c for c in comparisons for seed in seeds if {"cell": c.cell.name, "seed": seed} not in file]
    if missing:
        print(f"{sum(c.rows_a_seed for c in missing)} U-Net rows: {duration(missing)}", flush=True)
    with tqdm(total=len(seeds) * sum(c.rows_a_seed for c in comparisons), unit="row", mininterval=1) as bar:
        fast_traversal.measure_all(comparisons, seeds, file, bar.update)
    cells: dict[str, Any] = {}
    for comparison in comparisons:
        name = comparison.cell.name
        cells[name] = fast_traversal.summarise(comparison, [file[{"cell": name, "seed": seed}] for seed in seeds])
    result = {
        "goals": GOALS,
        "cells": cells,
        "environment": harness.environment(),
    }
    write_json(args.out / "fast.json", result)
    print(table(cells))
    print(f"see {args.out / 'fast.json'}")


def comparisons_of(args: argparse.Namespace) -> list[Comparison]:
    """A comparison for each of --cells, by its own model."""
    names = tuple(name.strip() for name in args.cells.split(",")) if args.cells else CELLS
    for name in names:
        if name not in shipped.CELLS:
            hint = nearest(name, list(shipped.CELLS))
            raise ValueError(f"--cells: got {name!r}{hint}; expected some of {', '.join(shipped.CELLS)}")
    models: dict[Path, StableDiffusion] = {}
    found = []
    for name in dict.fromkeys(names):
        model = shipped.model_of(name)
        if model.weights not in models:
            models[model.weights] = load_model(argparse.Namespace(**{**vars(args), "weights": model.weights}))
        sd, judge = models[model.weights], model.classifiers[name]
        instruments = Instruments(sd, classifiers.load(judge, sd.device), judge, NO_LPIPS)
        guidance = model.guidance if args.guidance is None else args.guidance
        found.append(Comparison(shipped.CELLS[name], instruments, guidance))
    return found


def duration(missing: Sequence[Comparison]) -> str:
    """How long it will take, by the speed of one small call of each model."""
    seconds, speeds = 0.0, {}
    for comparison in missing:
        sd = comparison.instruments.sd
        if sd not in speeds:
            speeds[sd] = seconds_a_row(comparison)
        seconds += comparison.rows_a_seed * speeds[sd]
    return f"about {seconds / 60:.1f} minutes at this moment's speed; run it again to go on after a stop"


def seconds_a_row(comparison: Comparison) -> float:
    """Of a latent through the U-Net, guidance's second half included, eight latents a call."""
    sd = comparison.instruments.sd
    contexts = sd.encode_prompts([comparison.cell.neutral])
    began = 0.0
    for step in sd.sample(contexts, range(8), steps=3, guidance_scale=comparison.guidance):
        if step.index == 0:  # the first call warms up
            began = time.perf_counter()
    return (time.perf_counter() - began) / (2 * 8)


def table(cells: dict[str, Any]) -> str:
    """A line an attribute."""
    lines = [
        f"{'':14}{'':18}{'seeds':>6}{'cosine':>8}{'95 %':>16}{'least (s of 50)':>18}{'length':>8}"
        f"{'CFRT':>9}{'fast':>6}{'difference':>24}"
    ]
    for cell, found in cells.items():
        for name, one in found["attributes"].items():
            cosine, least, apart = one["cosine"], one["least_cosine"], one["difference"][MAIN_READING]
            shares = [one["cfrt"][way][MAIN_READING]["value"] for way in ("usual", "fast")]
            lines.append(
                f"{cell:14}{name:18}{found['n']:6}{cosine['value']:8.3f}{_interval(cosine['interval'], 3):>16}"
                f"{least['value']:10.3f} ({least['swap_step']:2}){one['length']['value']:11.2f}"
                f"{shares[0]:9.2f}{shares[1]:6.2f}{apart['value']:+8.2f} {_interval(apart['interval'], 2):>15}"
            )
    fast, usual = evaluations(fast=True), evaluations(fast=False)
    lines.append(
        f"{fast} network evaluations a seed and attribute against {usual}, {usual / fast:.1f} x fewer; "
        f"CFRT in the reading {MAIN_READING}, the others in fast.json"
    )
    return "\n".join(lines)


def _interval(ends: Sequence[float], digits: int) -> str:
    return f"[{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"
