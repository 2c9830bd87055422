"""`ldm bench inversion`: how exactly images come back from their noise, and what it costs.

ldm bench inversion --out out/bench/inversion
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ldm.bench import harness, inversion
from ldm.data.images import load_image
from ldm.files import write_json
from ldm.study.report.plot_style import save_figure
from ldm.traversal.plan import parse_integers
from ldm.traversal.round_trip import finite
from ldm_tools.options import add_model, load_model

DTYPES = ("float32", "bfloat16")
IMAGES = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the subject to `parser`."""
    parser.description = (
        "Invert rendered phantoms, or images of your own, by every method, number of steps, guidance and precision, "
        "and retrace them. Prints the scorecard and writes inversion.json and inversion.png, .pdf."
    )
    parser.add_argument("--images", type=int, help=f"rendered ones, chests and nevi (default {IMAGES})")
    parser.add_argument(
        "--image", nargs="+", type=Path, default=[], metavar="FILE", help="these instead; with --prompt"
    )
    parser.add_argument("--prompt", help="what they show")
    parser.add_argument("--steps", default="10,50", help="default: %(default)s")
    parser.add_argument("--guidance", default="1,7.5", help="scales, the same both ways (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of the timing (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/bench/inversion"), help="folder (default %(default)s)")
    add_model(parser)


def run(args: argparse.Namespace) -> None:
    """Raises ValueError for options that do not fit."""
    steps, guidance = checked(args)
    dtypes = DTYPES if args.dtype == "auto" else (args.dtype,)
    models = {dtype: load_model(argparse.Namespace(**{**vars(args), "dtype": dtype})) for dtype in dtypes}
    sd = models[dtypes[0]]
    size = sd.latent_shape[1] * sd.config.vae.downscale
    subjects = [
        inversion.Subject(str(file), args.prompt, load_image(file, size)) for file in args.image
    ] or inversion.phantoms(args.images or IMAGES, size)

    rows = inversion.scorecard(models, subjects, inversion.cases(steps, guidance, dtypes))
    timings = {dtype: inversion.timings(model, subjects[0], min(steps), args.rounds) for dtype, model in models.items()}
    floor = {subject.name: inversion.psnr_db(sd, subject, inversion.encode(sd, subject)) for subject in subjects}
    target = inversion.target_of(rows)
    result = {
        "rows": [
            {name: finite(value) if isinstance(value, float) else value for name, value in row.items()} for row in rows
        ],
        "target": target,
        "autoencoder_psnr_db": {name: finite(psnr) for name, psnr in floor.items()},
        "timing_steps": min(steps),
        "timings": {
            dtype: {name: asdict(timing) for name, timing in by_method.items()} for dtype, by_method in timings.items()
        },
        "weights_sha256": sd.weights_sha256(),
        "environment": harness.environment(),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "inversion.json", result)
    save_figure(inversion.figure(rows), args.out / "inversion")
    print(f"{inversion.table(rows)}\n{summary(steps, floor, timings, target)}\nsee {args.out / 'inversion.png'}")


def checked(args: argparse.Namespace) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Steps and guidance scales. Raises ValueError for options that do not fit."""
    steps, guidance = parse_integers(args.steps, "--steps"), scales(args.guidance)
    for option, given in (("--images", IMAGES if args.images is None else args.images), ("--rounds", args.rounds)):
        if given < 1:
            raise ValueError(f"{option}: got {given}, expected 1 or more")
    if bool(args.image) != bool(args.prompt):
        raise ValueError("--image, --prompt: expected both or neither")
    if args.image and args.images is not None:
        raise ValueError("--images: it does nothing beside --image; leave one of the two out")
    if missing := [file for file in args.image if not file.is_file()]:
        raise ValueError(f"{missing[0]}: no such file")
    return steps, guidance


def summary(
    steps: tuple[int, ...],
    floor: dict[str, float],
    timings: dict[str, dict[str, harness.Timing]],
    target: dict[str, Any],
) -> str:
    """What stands under the scorecard."""
    alone = ", ".join(f"{name} {psnr:.2f}" for name, psnr in floor.items())
    lines = [f"* with the prompt as the negative one.  The autoencoder alone, dB: {alone}"]
    for dtype, by_method in timings.items():
        spent = ", ".join(
            f"{name} {timing.median_ms:.0f} ms ({timing.ratio:.2f} x)" for name, timing in by_method.items()
        )
        lines.append(f"{min(steps)} steps up, {dtype}: {spent}")
    errors = ", ".join(f"{name} {error:.1e}" for name, error in target["errors"].items())
    limit = f"within {target['limit']:g} at guidance 1, {max(steps)} steps, float32"
    return "\n".join([*lines, f"{limit}: {target['reached']} ({errors})"])


def scales(text: str) -> tuple[float, ...]:
    """ "1,7.5" -> (1.0, 7.5). Raises ValueError, naming the option, for anything else."""
    try:
        return tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError as error:
        raise ValueError(f"--guidance: got {text!r}, expected numbers such as 1,7.5") from error
