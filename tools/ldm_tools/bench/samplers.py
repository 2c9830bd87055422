"""`ldm bench samplers`: which sampler and spacing come closest to the flow, for how many evaluations.

ldm bench samplers --out out/bench/samplers
ldm bench samplers --weights FILE --neutral PROMPT --style NAME=PROMPT --guidance 1,7.5
"""

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ldm.bench import harness, sampler_checks, sampler_flips, samplers, samplers_page, samplers_report
from ldm.bench.against import Peer
from ldm.bench.known_flow import Question
from ldm.bench.rows import RowFile
from ldm.bench.sampler_statistics import cheapest, paired, pareto, scored, slopes
from ldm.files import write_json, write_text
from ldm.phantom.prompts import CELLS
from ldm.pipeline import PHANTOM_WEIGHTS
from ldm.samplers import SAMPLERS
from ldm.samplers.names import Meaning, understood
from ldm.schedule import SPACINGS
from ldm.study import classifier as classifiers
from ldm.study.evaluation.instruments import Instruments
from ldm.study.metrics import perceptual
from ldm.study.report.plot_style import save_figure
from ldm.traversal.plan import parse_integers
from ldm_tools import own_code
from ldm_tools.bench import known_flow, optimise_spacing, peers
from ldm_tools.options import add_model, add_own_prompts, load_model, own_prompts

CELL = CELLS["chest"]
Judge = perceptual.Lpips | perceptual.Unavailable
NAMES = ("part", "guidance", "sampler", "spacing", "budget")  # of a row
# What an option is where it is not given; None till then, so that one which would do nothing is refused.
DEFAULTS = {"reference_steps": samplers.Comparison.reference_steps, "cfrt_seeds": 2, "rounds": 3}
OF_SEARCH = ("steps", "tries", "training_seeds")
OF_COMPARISON = ("spacings", "evaluations", "against", "style", "no_images", "cfrt_seeds", "classifier", "rounds")
OF_NETWORK = (
    *("neutral", "style", "guidance", "reference_steps", "no_images", "cfrt_seeds", "classifier", "rounds"),
    *("max_batch", "weights", "base", "ema", "device", "dtype", "blocks", "backend"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the subject to `parser`."""
    parser.description = (
        "Denoise the same noises by every sampler, spacing, guidance and number of evaluations, neutral and with a "
        "prompt swapped in, and compare with a converged run. Prints a line a run as it comes, and writes it to "
        "samplers.jsonl, from which a run that was cut off goes on; at the end samplers.json, .csv, .png, .pdf, .html."
    )
    default = samplers.Comparison(neutral=CELL.neutral, styles=CELL.styles)
    add_own_prompts(parser, "the phantom chest's; the first style is what is swapped in")
    parser.add_argument(
        "--known-flow",
        action="store_true",
        help="no network: mixtures of Gaussians, whose flow is known exactly; every sampler x spacing; a minute",
    )
    parser.add_argument("--seeds", help="such as 0-7 (default: 0-1; 0-7 with --known-flow)")
    parser.add_argument("--guidance", help="scales (default: 1,3,7.5)")
    parser.add_argument("--evaluations", help="of a run (default: 10,20; and 40, 80 with --known-flow)")
    parser.add_argument(
        "--samplers",
        help=f"some of {', '.join(SAMPLERS)}, names for them such as dpmpp_2m_karras, whose spacing joins --spacings, "
        f"or FILE.py:NAME (default: {','.join(default.samplers)}; all with --known-flow)",
    )
    parser.add_argument(
        "--spacings",
        help=f"some of {', '.join(SPACINGS)}, FILE.py:NAME or FILE.json (default: those that --samplers say, else "
        f"{','.join(default.spacings)}; all with --known-flow)",
    )
    parser.add_argument(
        "--sampler", action="append", default=[], metavar="FILE.py:NAME", help="your own, beside them; may be repeated"
    )
    parser.add_argument(
        "--spacing", action="append", default=[], metavar="FILE", help="your own, FILE.py:NAME or FILE.json, likewise"
    )
    parser.add_argument(
        "--against",
        choices=("k-diffusion", "diffusers"),
        help="run that library's samplers beside, where it is installed: k-diffusion's at our levels, diffusers' at "
        "its own for that spacing; their error, and how far from ours they end",
    )
    parser.add_argument("--reference-steps", type=int, help=f"default: {DEFAULTS['reference_steps']}")
    parser.add_argument("--no-images", action="store_true", help="neither SSIM nor LPIPS")
    parser.add_argument("--cfrt-seeds", type=int, help=f"for the CFRT; 0: none (default: {DEFAULTS['cfrt_seeds']})")
    parser.add_argument("--classifier", type=Path, help="for the CFRT (default: the shipped one, for its prompts only)")
    parser.add_argument("--rounds", type=int, help=f"of the timing (default: {DEFAULTS['rounds']})")
    parser.add_argument("--max-batch", type=int, help="most rows in one U-Net call, to bound memory")
    parser.add_argument("--out", type=Path, default=Path("out/bench/samplers"), help="folder (default: %(default)s)")
    optimise_spacing.add_arguments(parser)
    add_model(parser)


def run(args: argparse.Namespace) -> None:
    """Raises ValueError for options that do not fit."""
    refuse_idle(args)
    for name, value in DEFAULTS.items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    own = take_own(args)
    if args.optimise and args.known_flow:
        optimise_spacing.run_on_known_flow(args)
        return
    peer = peers.load(args.against) if args.against else None
    if args.known_flow:
        known_flow.run(args, own, peer)
        return
    if args.optimise:
        optimise_spacing.checked(args)
    comparison = comparison_of(args)
    sd = load_model(args)
    if args.optimise:
        optimise_spacing.run(args, samplers.Bench(sd, comparison), own)
    else:
        compare(args, samplers.Bench(sd, comparison), own, peer)


def refuse_idle(args: argparse.Namespace) -> None:
    """ValueError for an option that would do nothing beside the others."""
    flags = {"optimise": "--optimise", "known_flow": "--known-flow"}
    beside = " ".join(flag for name, flag in flags.items() if getattr(args, name))
    idle = {*(OF_COMPARISON if args.optimise else ()), *(OF_NETWORK if args.known_flow else ())}
    idle |= {"seeds", "training_seeds"} if args.optimise and args.known_flow else set()
    model = argparse.ArgumentParser()
    add_model(model)

    def given(name: str) -> bool:
        value = getattr(args, name)
        return not (value is None or value is False or value == [] or value == model.get_default(name))

    if without_effect := [name for name in vars(args) if name in idle and given(name)]:
        raise ValueError(f"--{without_effect[0].replace('_', '-')}: it does nothing beside {beside}")
    if not args.optimise and (of_search := [name for name in OF_SEARCH if given(name)]):
        raise ValueError(f"--{of_search[0].replace('_', '-')}: it belongs to --optimise, which is missing")
    if args.optimise:
        optimise_spacing.refuse_named_spacings([*_listed(args.samplers), *args.sampler])


def compare(args: argparse.Namespace, bench: samplers.Bench, own: Mapping[str, Any], peer: Peer | None) -> None:
    """Every run, check and timing that the file lacks, and the report."""
    comparison, lpips = bench.comparison, perceptual.load_lpips()
    file = RowFile(args.out / "samplers.jsonl", settings_of(args, bench, lpips, own, peer), NAMES)
    say_how_long(bench, file)
    rows: list[dict[str, Any]] = []
    references: list[dict[str, Any]] = []
    print(samplers_report.heading(peer.name if peer else None), flush=True)
    for row in samplers.compare(bench, file, lpips, images=not args.no_images, peer=peer):
        (rows if row["part"] == "run" else references).append(row)
        if row["part"] == "run":
            print(samplers_report.line(row), flush=True)
    flips = list(flip_rates(args, bench, rows, file))
    if any({"part": "check", "sampler": name} not in file for name in comparison.samplers):
        for checked in sampler_checks.check(bench):
            file.add({"part": "check", **checked})
    if any({"part": "timing", "sampler": name} not in file for name in comparison.samplers):
        for name, timing in sampler_checks.timings(bench, args.rounds).items():
            file.add({"part": "timing", "sampler": name, **timing})
    report(args, bench, file, {"rows": rows, "reference": references, "cfrt": flips}, own)


def settings_of(
    args: argparse.Namespace, bench: samplers.Bench, lpips: Judge, own: Mapping[str, Any], peer: Peer | None
) -> dict[str, Any]:
    """All that rows depend on: another value of it needs another folder."""
    comparison, sd = bench.comparison, bench.sd
    levels = {name: SPACINGS[name](7, sd.schedule) for name in comparison.spacings}
    judged = {
        "classifier": str(classifier_of(args)),
        "lpips": isinstance(lpips, perceptual.Lpips),
        "cfrt_seeds": args.cfrt_seeds,
        "images": not args.no_images,
    }
    model = {"weights_sha256": sd.weights_sha256(), "dtype": str(sd.dtype).removeprefix("torch.")}
    theirs = {"against": peer.name} if peer else {}
    model |= {"ema": args.ema, "blocks": args.blocks}
    return {**asdict(comparison), **model, **judged, "levels": levels, "own_code": own, **theirs}


def say_how_long(bench: samplers.Bench, file: RowFile) -> None:
    """What is left to do, and for how long by the speed of this moment."""
    comparison = bench.comparison
    left = [
        (guidance, *run)
        for guidance in comparison.guidances
        for run in comparison.runs()
        if dict(zip(NAMES, ("run", guidance, *run), strict=True)) not in file
    ]
    rows = samplers.rows_of(comparison, bench.sd.schedule, left)
    minutes = rows * samplers.seconds_a_row(bench) / 60
    print(
        f"{len(left)} runs to do, {rows:.0f} U-Net rows with their references: about {minutes:.1f} minutes at this "
        "moment's speed, and about a quarter more for images, CFRT and timings; a run that is cut off goes on"
    )


def flip_rates(
    args: argparse.Namespace, bench: samplers.Bench, rows: list[dict[str, Any]], file: RowFile
) -> Iterator[dict[str, Any]]:
    """CFRT where a classifier fits the prompts."""
    judge = classifier_of(args)
    if judge is None or args.cfrt_seeds < 1:
        return
    no_lpips = perceptual.Unavailable("not asked for", "see `ldm evaluate`")
    instruments = Instruments(bench.sd, classifiers.load(judge, bench.sd.device), judge, no_lpips)
    for case in sampler_flips.flip_cases(bench.comparison, rows):
        sampler, spacing, steps = case
        name = {"part": "cfrt", "sampler": sampler, "spacing": spacing, "budget": steps, "steps": steps}
        compute = partial(sampler_flips.flip_rate, bench, instruments, case, range(args.cfrt_seeds))
        yield file.get(name, compute)


def report(
    args: argparse.Namespace, bench: samplers.Bench, file: RowFile, found: dict[str, Any], own: Mapping[str, Any]
) -> None:
    """JSON, CSV, figure, page, and what is printed last."""
    comparison, sd, rows = bench.comparison, bench.sd, found["rows"]
    checks = [file[{"part": "check", "sampler": name}] for name in comparison.samplers]
    timed = {name: file[{"part": "timing", "sampler": name}] for name in comparison.samplers}
    floors = {row["guidance"]: row["half_steps_error"] for row in found["reference"]}
    by_guidance = {g: [row for row in rows if row["guidance"] == g] for g in comparison.guidances}
    result = {
        **found,
        "orders": slopes(rows),
        "pareto": [row for of_one in by_guidance.values() for row in pareto(of_one)],
        "cheapest_within_1_percent": {f"{g:g}": cheapest(of_one) for g, of_one in by_guidance.items()},
        "paired": paired(rows),
        "checks": checks,
        "timings": timed,
        "peak_memory_mib": round(harness.peak_memory_mib(sd.device)),
        "prompts": {"neutral": comparison.neutral, **comparison.styles},
        "seeds": list(comparison.seeds),
        "at_swap": "reset",  # what a multistep sampler remembers
        "own_code": dict(own),
        "weights_sha256": sd.weights_sha256(),
        "environment": harness.environment(),
    }
    write_json(args.out / "samplers.json", result)
    write_text(args.out / "samplers.csv", samplers_report.as_csv(rows))
    if scored(rows):
        save_figure(samplers_report.figure(rows, floors), args.out / "samplers")
    write_text(args.out / "samplers.html", page_of(bench, rows, floors))
    print(samplers_report.summary(rows, found["reference"], timed))
    if found["cfrt"]:
        print("\n" + samplers_report.flip_table(found["cfrt"]))
    moved = max(row["batch_error"] for row in checks)
    invariant = all(row["batch_invariant"] for row in checks)
    print(
        f"\nall the same twice; independent of the batch with one latent a call: {invariant} (else within {moved:.0e})"
        f"; {result['peak_memory_mib']} MiB at most; see {args.out / 'samplers.html'}, samplers.png, .csv, .json"
    )


def page_of(bench: samplers.Bench, rows: list[dict[str, Any]], floors: Mapping[float, float]) -> str:
    """The page: this network's runs, and beside them the same samplers' paths on the known flow."""
    comparison = bench.comparison
    what = (
        f"Weights {bench.sd.weights_sha256()[:12]}, {len(comparison.seeds)} seeds, prompt {comparison.neutral!r}. "
        f"Errors are relative, to a run of {comparison.reference_steps} steps."
    )
    question = Question(samplers=comparison.samplers, spacings=comparison.spacings)
    return samplers_page.page(what, rows, samplers_page.plane(question, min(comparison.budgets)), floors)


def take_own(args: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Put our names in place of those from elsewhere and of files, --sampler and --spacing beside the lists.

    A sampler's name that says a spacing adds it to those compared. Returns name -> file, sha256 of what was in a file.
    """
    if args.optimise:
        args.guidance, args.samplers = args.guidance or "1", args.samplers or "deis"
    args.guidance = args.guidance or "1,3,7.5"
    names, said, sources = _own_samplers(args.samplers, args.sampler)
    listed, levels = _listed(args.spacings), list[str]()
    if not listed and not (args.samplers and len(said) == len(names)):
        levels += SPACINGS if args.known_flow else samplers.COMPARED_SPACINGS
    for option, text in [*(("--spacings", text) for text in listed), *(("--spacing", text) for text in args.spacing)]:
        name, source = own_code.spacing(text, option)
        levels.append(name)
        sources |= {name: source} if source else {}
    args.spacings = ",".join(dict.fromkeys([*levels, *said]))
    if args.samplers or not args.known_flow:
        args.samplers = ",".join(dict.fromkeys([*([] if args.samplers else samplers.COMPARED), *names]))
    return sources


def _own_samplers(listed: str | None, beside: list[str]) -> tuple[list[str], list[str], dict[str, dict[str, str]]]:
    """Our names, the spacings that those from elsewhere say, and where files are. Unknown ones are left to refuse."""
    names, said = list[str](), list[str]()
    sources: dict[str, dict[str, str]] = {}
    for option, text in [
        *(("--samplers", text) for text in _listed(listed)),
        *(("--sampler", text) for text in beside),
    ]:
        name, source = own_code.sampler(text, option)
        meant = understood(name, SAMPLERS) or Meaning(name, None)
        names.append(meant.sampler)
        said += [meant.spacing] if meant.spacing else []
        sources |= {name: source} if source else {}
        if meant.sampler != name:
            print(f"{name}: {meant.sampler}, spacing {meant.spacing or 'of all that are compared'}")
    return names, said, sources


def _listed(names: str | None) -> list[str]:
    return names.split(",") if names else []


def comparison_of(args: argparse.Namespace) -> samplers.Comparison:
    """What the options ask for, seen to be possible before the weights are read."""
    styles = own_prompts(args)
    if args.classifier and not args.classifier.is_file():
        raise ValueError(f"--classifier: there is no file {args.classifier}")
    if args.rounds < 1:
        raise ValueError(f"--rounds: got {args.rounds}, expected 1 or more")
    try:
        guidances = tuple(float(scale) for scale in args.guidance.split(","))
    except ValueError as error:
        raise ValueError(f"--guidance: got {args.guidance!r}, expected numbers such as 1,7.5") from error
    if args.optimise and len(guidances) > 1:
        raise ValueError(f"--guidance: got {args.guidance}, expected one scale beside --optimise")
    return samplers.Comparison(
        neutral=args.neutral or CELL.neutral,
        styles=styles or CELL.styles,
        seeds=parse_integers(args.seeds or "0-1", "--seeds"),
        guidances=guidances,
        budgets=parse_integers(args.evaluations or "10,20", "--evaluations"),
        samplers=tuple(args.samplers.split(",")),
        spacings=tuple(args.spacings.split(",")),
        reference_steps=args.reference_steps,
    )


def classifier_of(args: argparse.Namespace) -> Path | None:
    """The classifier that fits the prompts; None where there is none."""
    if args.classifier or args.style or args.weights != PHANTOM_WEIGHTS:
        return args.classifier
    return classifiers.PHANTOM_CLASSIFIERS["chest"]
