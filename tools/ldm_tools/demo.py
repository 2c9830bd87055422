"""`ldm demo`: the main job. Both phantom domains, several seeds, every attribute, with the shipped model."""

import argparse
import shlex
import sys
import time
from pathlib import Path

import ldm
from ldm import pipeline
from ldm.files import write_json
from ldm.phantom.prompts import DOMAINS, GUIDANCE, Cell
from ldm.study import classifier
from ldm.study.evaluation import pictures
from ldm.study.evaluation.instruments import Instruments
from ldm.study.evaluation.trajectories import stacked
from ldm.study.metrics.perceptual import load_lpips
from ldm.study.report import explorer
from ldm.traversal.figures import grid, save_image
from ldm.traversal.plan import Traversal, parse_integers
from ldm.traversal.run_folder import read_record, run_traversal
from ldm.traversal.run_images import trajectory_columns, trajectory_rows, write_figures
from ldm.traversal.store import load_seed

MAP_STEPS = (5, 15, 25)  # the swaps that the map of the latents shows
NOTE = "Drawn phantoms and a small model trained on them: nothing here is a patient. Every image was made from noise."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command to `parser`."""
    parser.description = (
        "Run the paper's traversal on drawn chest X-rays and skin lesions with the model in weights/: for every "
        "attribute nine swap steps and a Bezier curve of 50 points. Writes index.html, a page to drag along the "
        "trajectories on; overview.png; and for each domain figure.png, curve.gif, images/, latents.safetensors and "
        "run.json. About two minutes on two CPU cores; no "
        "network needed."
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder to write (default %(default)s)")
    parser.add_argument("--seeds", default="0-2", help="which patients, such as 0-7 (default %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Raises ValueError when the shipped weights are missing or the folder holds something else."""
    began = time.monotonic()
    seeds = parse_integers(args.seeds, "--seeds")
    sd = ldm.load(pipeline.PHANTOM_WEIGHTS)
    records, overview, pages = {}, [], []
    for domain, cell in DOMAINS.items():
        plan = Traversal(neutral=cell.neutral, styles=cell.styles, seeds=seeds, guidance=GUIDANCE)
        records[domain] = run_traversal(sd, plan, args.out / domain, label=domain)
        write_figures(args.out / domain, plan, title=f'{domain}: "{cell.neutral}"')
        overview += trajectory_rows(args.out / domain, plan, seeds[0])
        pages.append(page(sd, cell, plan, args.out / domain))
    explorer.write(
        explorer.Explorer("Language-guided trajectories", shlex.join(["ldm", *sys.argv[1:]]), NOTE, tuple(pages)),
        args.out / "index.html",
    )
    labels, images = zip(*overview, strict=True)
    save_image(args.out / "overview.png", grid(images, labels, trajectory_columns(plan)))

    evaluated = sum(record["unet_rows_this_run"] for record in records.values())
    totals = {
        "unet_rows": sum(record["unet_rows"] for record in records.values()),
        "unet_rows_separate": sum(record["unet_rows_separate"] for record in records.values()),
        "seconds": round(time.monotonic() - began, 1),
        **{key: records["chest"][key] for key in ("seeds", "backend", "dtype", "weights_sha256")},
        "domains": records,
    }
    if evaluated or not read_record(args.out):
        write_json(args.out / "run.json", totals)
    print(f"{len(seeds)} seeds, {' and '.join(f'{len(cell.styles)} {d} attributes' for d, cell in DOMAINS.items())}")
    print(
        f"{totals['unet_rows']} U-Net rows, {evaluated} of them now, where separate runs cost "
        f"{totals['unet_rows_separate']}; {totals['seconds']} s"
    )
    print(f"look at {args.out / 'index.html'} and {args.out / 'overview.png'}")


def page(sd: pipeline.StableDiffusion, cell: Cell, plan: Traversal, run: Path) -> explorer.Domain:
    """One domain of the explorer: every seed, what the classifier sees along its curves, and the map of the latents."""
    file = classifier.PHANTOM_CLASSIFIERS[cell.name]
    instruments = Instruments(sd, classifier.load(file), file, load_lpips())
    shown = [pictures.read(run, plan, seed) for seed in plan.seeds]
    latents = {seed: load_seed(run / "latents.safetensors", seed) for seed in plan.seeds}
    at = pictures.latent_map(
        plan, {seed: (named["neutral"], stacked(named, plan)) for seed, named in latents.items()}, MAP_STEPS, shown
    )
    patients = [pictures.generated_patient(instruments, cell, plan, one) for one in shown]
    return pictures.domain(instruments, cell, plan, patients, at)
