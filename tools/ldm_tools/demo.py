"""`ldm demo`: the main job. Real skin and both kinds of phantoms, several seeds, every attribute."""

import argparse
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ldm
from ldm.files import write_json
from ldm.phantom.prompts import DOMAINS, Cell
from ldm.pipeline import StableDiffusion
from ldm.study import classifier, shipped
from ldm.study.evaluation import pictures
from ldm.study.evaluation.instruments import Instruments
from ldm.study.evaluation.trajectories import stacked
from ldm.study.metrics.perceptual import load_lpips
from ldm.study.report import explorer
from ldm.traversal.figures import grid, save_image
from ldm.traversal.following import evaluations
from ldm.traversal.plan import Traversal, parse_integers
from ldm.traversal.run_folder import read_record, run_traversal
from ldm.traversal.run_images import trajectory_columns, trajectory_rows, write_figures
from ldm.traversal.store import load_seed

ON_MAP = (0, 2, 4)  # which of the swaps the map of the latents shows: of 50 steps, 5, 15 and 25
NOTE = "Small models, trained on two CPU cores. Every image here was made from noise, and none is of a patient."
FEWER = "Past its swap a branch asks the network at a few of its steps only; ldm demo --paper asks at all of them."
DRAWN = "Drawn phantoms: the model learned drawings, whose true counterfactuals are known."


@dataclass(frozen=True)
class Part:
    """One domain of the demo."""

    name: str
    cell: Cell
    weights: Path
    classifier: Path
    note: str
    guidance: float


def parts() -> list[Part]:
    """Real skin, then what the phantoms have."""
    real, drawn = shipped.REAL, shipped.PHANTOM
    nevus = real.cells["real_nevus"]
    return [
        Part("real_skin", nevus, real.weights, real.classifiers[nevus.name], real.note, real.guidance),
        *(
            Part(name, cell, drawn.weights, classifier.PHANTOM_CLASSIFIERS[name], DRAWN, drawn.guidance)
            for name, cell in DOMAINS.items()
        ),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command to `parser`."""
    parser.description = (
        "Run the paper's traversal with the two models in weights/: that of real dermoscopies, and that of drawn chest "
        "X-rays and skin lesions. For every attribute nine swap steps and a Bezier curve. "
        "Writes index.html, a page to drag along the trajectories on; overview.png; and for each domain figure.png, "
        "curve.gif, images/, latents.safetensors and run.json. A minute and a half on two CPU cores; no network."
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder to write (default %(default)s)")
    parser.add_argument("--seeds", default="0-2", help="which patients, such as 0-7 (default %(default)s)")
    parser.add_argument(
        "--paper",
        action="store_true",
        help="ask the network at every step of every branch, not as `ldm traverse --fast`, "
        f"{evaluations(fast=False) / evaluations(fast=True):.1f} times as often, and draw "
        f"{Traversal.bezier_points} points a curve instead of {pictures.POINTS}",
    )


def run(args: argparse.Namespace) -> None:
    """Raises ValueError when the shipped weights are missing or the folder holds something else."""
    began = time.monotonic()
    seeds = parse_integers(args.seeds, "--seeds")
    load = cache(ldm.load)  # two domains share a model
    records, overview, pages = {}, [], []
    for part in parts():
        sd, out = load(part.weights), args.out / part.name
        plan = plan_of(part, seeds, args.paper)
        records[part.name] = run_traversal(sd, plan, out, label=part.name)
        write_figures(out, plan, title=f'{part.name}: "{part.cell.neutral}"')
        kind = part.name.replace("_", " ")
        overview += [(f"{kind}: {style}", images) for style, images in trajectory_rows(out, plan, seeds[0])]
        pages.append(page(sd, part, plan, out))
    note = NOTE if args.paper else f"{NOTE} {FEWER}"
    explorer.write(
        explorer.Explorer("Language-guided trajectories", shlex.join(["ldm", *sys.argv[1:]]), note, tuple(pages)),
        args.out / "index.html",
    )
    labels, images = zip(*overview, strict=True)
    save_image(args.out / "overview.png", grid(images, labels, trajectory_columns(plan)))
    write_totals(args.out, records, began)
    print(f"look at {args.out / 'index.html'} and {args.out / 'overview.png'}")


def plan_of(part: Part, seeds: tuple[int, ...], paper: bool) -> Traversal:
    """How one domain is traversed: as the paper has it, or with fewer questions and fewer points of a curve."""
    return Traversal(
        neutral=part.cell.neutral,
        styles=part.cell.styles,
        seeds=seeds,
        guidance=part.guidance,
        bezier_points=Traversal.bezier_points if paper else pictures.POINTS,
        fast=not paper,
    )


def write_totals(out: Path, records: Mapping[str, dict[str, Any]], began: float) -> None:
    """run.json of all domains, unless nothing was computed anew; and what to know of it, printed."""
    evaluated = sum(record["unet_rows_this_run"] for record in records.values())
    totals = {
        "unet_rows": sum(record["unet_rows"] for record in records.values()),
        "unet_rows_separate": sum(record["unet_rows_separate"] for record in records.values()),
        "seconds": round(time.monotonic() - began, 1),
        **{key: records["chest"][key] for key in ("seeds", "backend", "dtype", "weights_sha256")},
        "domains": records,
    }
    if evaluated or not read_record(out):
        write_json(out / "run.json", totals)
    count = len(totals["seeds"])
    styles = ", ".join(f"{len(record['styles'])} {name}" for name, record in records.items())
    print(f"{count} seeds; attributes: {styles}")
    print(
        f"{totals['unet_rows']} U-Net rows, {evaluated} of them now, where separate runs cost "
        f"{totals['unet_rows_separate']}; {totals['seconds']} s"
    )


def page(sd: StableDiffusion, part: Part, plan: Traversal, run: Path) -> explorer.Domain:
    """One domain of the explorer: every seed, what the classifier sees along its curves, and the map of the latents."""
    instruments = Instruments(sd, classifier.load(part.classifier), part.classifier, load_lpips())
    shown = [pictures.read(run, plan, seed) for seed in plan.seeds]
    latents = {seed: load_seed(run / "latents.safetensors", seed) for seed in plan.seeds}
    steps = [plan.swap_steps[i] for i in ON_MAP]
    at = pictures.latent_map(
        plan, {seed: (named["neutral"], stacked(named, plan)) for seed, named in latents.items()}, steps, shown
    )
    patients = [pictures.generated_patient(instruments, part.cell, plan, one) for one in shown]
    return pictures.domain(instruments, part.cell, plan, patients, at, note=part.note)
