"""`ldm bench kernels`: the fused kernels at every site of SD1.5's U-Net, against torch's own and the roofline.

ldm bench kernels                           on a GPU: correctness, then times
ldm bench kernels --compile-only            anywhere: compile every configuration for four GPUs, and hold it to bounds
ldm bench kernels --predict                 anywhere: what each site should take on A100 and H100
"""

import argparse
from pathlib import Path

import torch

from ldm.bench import harness, kernel_predictions, kernels
from ldm.files import write_json

# Of a timing, where they are not given; None till then, so that one which would do nothing is refused.
DEFAULTS = {"rounds": 30, "seconds": 200, "out": Path("out/bench/kernels")}
OF_COMPILING = ("only", "capability", "processes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the subject to `parser`."""
    parser.description = "Time the kernels on this GPU, or say without one what was compiled and what is expected."
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--compile-only", action="store_true", help="compile for sm_80, 86, 89 and 90; exit 2 where a bound is broken"
    )
    what.add_argument("--predict", action="store_true", help="least times from compiled code and data sheets")
    parser.add_argument("--record", action="store_true", help="with --compile-only: keep this to compare with later")
    parser.add_argument("--only", metavar="TEXT", help="with --compile-only: names that begin like this")
    parser.add_argument("--capability", type=int, metavar="N", help="with --compile-only: for sm_N alone")
    parser.add_argument("--processes", type=int, help="with --compile-only: at a time (default: one a core)")
    parser.add_argument("--rounds", type=int, help=f"of the timing, 2 or more (default: {DEFAULTS['rounds']})")
    parser.add_argument("--seconds", type=float, help=f"then sites are skipped (default: {DEFAULTS['seconds']})")
    parser.add_argument("--out", type=Path, help=f"folder of the timing (default: {DEFAULTS['out']})")


def run(args: argparse.Namespace) -> None:
    """Raises ValueError where compiled code breaks a bound, or a kernel computes something else."""
    if args.record and (not args.compile_only or args.only or args.capability):
        raise ValueError(
            "--record: expected with --compile-only and without --only or --capability, so that it is whole"
        )
    refuse_idle(args)
    if args.compile_only:
        compile_only(args)
    elif args.predict:
        print("A PREDICTION from compiled code and data sheets: peaks, perfectly overlapped. Nothing here was timed.\n")
        print(kernels.table(kernel_predictions.predictions()))
    elif not torch.cuda.is_available():
        print("no CUDA GPU here: nothing to time (see --compile-only and --predict)")
    else:
        clock(args)


def refuse_idle(args: argparse.Namespace) -> None:
    """ValueError for an option that would do nothing, or rounds that have no spread."""
    for name in () if args.compile_only else OF_COMPILING:
        if getattr(args, name) is not None:
            raise ValueError(f"--{name}: it belongs to --compile-only, which is missing")
    for name, default in DEFAULTS.items():
        if (args.compile_only or args.predict) and getattr(args, name) is not None:
            beside = "--compile-only" if args.compile_only else "--predict"
            raise ValueError(f"--{name}: it does nothing beside {beside}, which times nothing")
        setattr(args, name, default if getattr(args, name) is None else getattr(args, name))
    if args.rounds < 2:
        raise ValueError(f"--rounds: got {args.rounds}, expected 2 or more")


def clock(args: argparse.Namespace) -> None:
    """Time every site; both files are written anew after each. Raises ValueError at the end for what was not timed."""
    args.out.mkdir(parents=True, exist_ok=True)
    environment = harness.environment()
    text, wrong = "", []
    for known in kernels.measure(rounds=args.rounds, seconds=args.seconds):
        found = {**known.rates, "rows": known.rows, "wrong": known.wrong, "skipped": known.skipped}
        write_json(args.out / "ldm_kernels.json", {**found, "environment": environment})
        text = kernels.table(known.rows) if known.rows else ""
        (args.out / "ldm_kernels.md").write_text(text + "\n", encoding="utf-8")
        wrong = [*known.wrong, *(f"{name}: skipped, no time left (see --seconds)" for name in known.skipped)]
    print(text)
    if wrong:
        raise ValueError(f"{len(wrong)} sites not timed: {'; '.join(wrong)}")


def compile_only(args: argparse.Namespace) -> None:
    """Compile, print the table, and raise ValueError for what is out of bounds or worse than recorded."""
    rows, wrong = kernels.compile_all(args.only or "", args.capability, args.processes, args.record)
    if not rows:
        only, capability = (
            f"{name}: {value!r}" for name, value in (("--only", args.only), ("--capability", args.capability))
        )
        raise ValueError(
            f"{only}, {capability}: no configuration is of both; expected a name's beginning, 80, 86, 89 or 90"
        )
    print(kernels.table(rows))
    if wrong:
        raise ValueError(f"{len(wrong)} complaints: {'; '.join(wrong)}")
