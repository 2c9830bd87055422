"""`ldm bench samplers`: which sampler and spacing come closest to the flow, for how many evaluations.

ldm bench samplers --out out/bench/samplers
ldm bench samplers --weights FILE --neutral PROMPT --style NAME=PROMPT --guidance 1,7.5
"""

import argparse
from pathlib import Path

from ldm.bench import harness, samplers, samplers_report
from ldm.files import write_json
from ldm.phantom.prompts import CELLS
from ldm.pipeline import PHANTOM_WEIGHTS
from ldm.samplers import SAMPLERS
from ldm.schedule import SPACINGS
from ldm.study import classifier as classifiers
from ldm.study.evaluation.instruments import Instruments
from ldm.study.metrics.perceptual import Unavailable
from ldm.study.report.plot_style import save_figure
from ldm.traversal.plan import parse_integers
from ldm_tools import own_code
from ldm_tools.bench import known_flow
from ldm_tools.options import add_model, add_own_prompts, load_model, own_prompts

CELL = CELLS["chest"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the subject to `parser`."""
    parser.description = (
        "Denoise the same noises by every sampler, spacing, guidance and number of evaluations, neutral and with a "
        "prompt swapped in, and compare with a converged run. Prints tables; writes samplers.json, .csv, .png, .pdf."
    )
    default = samplers.Comparison(neutral=CELL.neutral, styles=CELL.styles)
    add_own_prompts(parser, "the phantom chest's; the first style is what is swapped in")
    parser.add_argument(
        "--known-flow",
        action="store_true",
        help="no network: mixtures of Gaussians, whose flow is known exactly; every sampler x spacing, within a minute",
    )
    parser.add_argument("--seeds", help="such as 0-7 (default: 0; 0-7 with --known-flow)")
    parser.add_argument("--guidance", default="1,3", help="scales (default: %(default)s)")
    parser.add_argument("--evaluations", help="of a run, multiples of 10 (default: 10,20,40; and 80 with --known-flow)")
    parser.add_argument(
        "--samplers",
        help=f"some of {', '.join(SAMPLERS)} (default: {','.join(default.samplers)}; all with --known-flow)",
    )
    parser.add_argument(
        "--spacings",
        help=f"some of {', '.join(SPACINGS)} (default: {','.join(default.spacings)}; all with --known-flow)",
    )
    parser.add_argument(
        "--sampler", action="append", default=[], metavar="FILE.py:NAME", help="your own, beside them; may be repeated"
    )
    parser.add_argument(
        "--spacing", action="append", default=[], metavar="FILE", help="your own, FILE.py:NAME or FILE.json, likewise"
    )
    parser.add_argument("--reference-steps", type=int, default=default.reference_steps, help="default: %(default)s")
    parser.add_argument("--cfrt-seeds", type=int, default=4, help="for the CFRT; 0: none (default: %(default)s)")
    parser.add_argument("--classifier", type=Path, help="for the CFRT (default: the shipped one, for its prompts only)")
    parser.add_argument("--rounds", type=int, default=3, help="of the timing (default: %(default)s)")
    parser.add_argument("--max-batch", type=int, help="most rows in one U-Net call, to bound memory")
    parser.add_argument("--out", type=Path, default=Path("out/bench/samplers"), help="folder (default: %(default)s)")
    add_model(parser)


def run(args: argparse.Namespace) -> None:
    """Raises ValueError for options that do not fit."""
    own_code = take_own(args)
    if args.known_flow:
        known_flow.run(args, own_code)
        return
    comparison = comparison_of(args)
    sd = load_model(args)
    bench = samplers.Bench(sd, comparison)
    checks = samplers.check(bench)
    timed = samplers.timings(bench, args.rounds)
    rows, convergence = samplers.compare(bench)
    orders = samplers.slopes(rows)
    budget = comparison.budgets[len(comparison.budgets) // 2]
    judge = classifier_of(args)
    flips = []
    if judge is not None and args.cfrt_seeds > 0:
        no_lpips = Unavailable("not asked for", "see `ldm evaluate`")
        instruments = Instruments(sd, classifiers.load(judge, sd.device), judge, no_lpips)
        flips = list(samplers.flip_rates(bench, instruments, rows, budget, range(args.cfrt_seeds)))

    args.out.mkdir(parents=True, exist_ok=True)
    result = {
        "rows": rows,
        "orders": orders,
        "reference": convergence,
        "cfrt": flips,
        "checks": checks,
        "timings": timed,
        "peak_memory_mib": round(harness.peak_memory_mib(sd.device)),
        "prompts": {"neutral": comparison.neutral, **comparison.styles},
        "seeds": list(comparison.seeds),
        "at_swap": "reset",  # what a multistep sampler remembers
        "weights_sha256": sd.weights_sha256(),
        "environment": harness.environment(),
    }
    write_json(args.out / "samplers.json", result)
    (args.out / "samplers.csv").write_text(samplers_report.as_csv(rows))
    save_figure(
        samplers_report.figure(rows, {row["guidance"]: row["half_steps_error"] for row in convergence}),
        args.out / "samplers",
    )
    print(samplers_report.table(rows, orders, timed))
    for row in convergence:
        print(
            f"reference at guidance {row['guidance']:g}: {row['steps']} steps; one of half as many is "
            f"{row['half_steps_error']:.1e} away, {row['half_steps_swap_error']:.1e} when swapped"
        )
    if flips:
        print("\n" + samplers_report.flip_table(flips))
    moved = max(row["batch_error"] for row in checks)
    invariant = all(row["batch_invariant"] for row in checks)
    print(
        f"\nall the same twice; independent of the batch with one latent a call: {invariant} (else within {moved:.0e})"
        f"; {result['peak_memory_mib']} MiB at most; see {args.out}"
    )


def take_own(args: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Put what --sampler and --spacing name into the tables, beside those to compare: name -> file, sha256."""
    if not args.known_flow:
        args.samplers = args.samplers or ",".join(samplers.COMPARED)
        args.spacings = args.spacings or ",".join(samplers.COMPARED_SPACINGS)
    sources: dict[str, dict[str, str]] = {}
    for option, load, several in (("sampler", own_code.sampler, "samplers"), ("spacing", own_code.spacing, "spacings")):
        names = []
        for text in getattr(args, option):
            name, source = load(text)
            names.append(name)
            sources |= {name: source} if source else {}
        if names and getattr(args, several):
            setattr(args, several, ",".join([getattr(args, several), *names]))
    return sources


def comparison_of(args: argparse.Namespace) -> samplers.Comparison:
    """What the options ask for, seen to be possible before the weights are read."""
    styles = own_prompts(args)
    if args.rounds < 1:
        raise ValueError(f"--rounds: got {args.rounds}, expected 1 or more")
    try:
        guidances = tuple(float(scale) for scale in args.guidance.split(","))
    except ValueError as error:
        raise ValueError(f"--guidance: got {args.guidance!r}, expected numbers such as 1,7.5") from error
    return samplers.Comparison(
        neutral=args.neutral or CELL.neutral,
        styles=styles or CELL.styles,
        seeds=parse_integers(args.seeds or "0", "--seeds"),
        guidances=guidances,
        budgets=parse_integers(args.evaluations or "10,20,40", "--evaluations"),
        samplers=tuple(args.samplers.split(",")),
        spacings=tuple(args.spacings.split(",")),
        reference_steps=args.reference_steps,
    )


def classifier_of(args: argparse.Namespace) -> Path | None:
    """The classifier that fits the prompts; None where there is none."""
    if args.classifier or args.style or args.weights != PHANTOM_WEIGHTS:
        return args.classifier
    return classifiers.PHANTOM_CLASSIFIERS["chest"]
