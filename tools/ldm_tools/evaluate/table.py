"""`ldm evaluate --predictions`: scores of a table of probabilities, without a model."""

import argparse
import shlex
import sys
from pathlib import Path

from ldm.files import read_json, write_json
from ldm.study.evaluation import report
from ldm.study.metrics import predictions


def score_table(args: argparse.Namespace, averaged: tuple[int, ...] | None) -> None:
    """Print the report of a table of probabilities, of every attribute unless one is named; write that one's."""
    if args.runs:
        raise ValueError(
            f"RUN: got {[str(folder) for folder in args.runs]} beside --predictions; expected one or the other"
        )
    table = predictions.read(*args.predictions)
    if args.attribute is None and args.out is not None:
        raise ValueError(
            f"--attribute: missing; which one do the trajectories swap in? The table has {', '.join(table.attributes)}"
        )
    if args.out is not None:
        refuse_to_replace(args.out, "cells", "an evaluation")
    names = table.attributes if args.attribute is None else (args.attribute,)
    reports = [
        {"command": command_line(), "attribute": name, **predictions.report(table, name, averaged)} for name in names
    ]
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(args.out / "metrics.json", reports[0])
    if len(reports) > 1:
        print("No --attribute: each of them, as if it were the one that the trajectories swap in.\n")
    print("\n\n".join(report.of_table(scores) for scores in reports))


def refuse_to_replace(out: Path, key: str, what: str) -> None:
    """ValueError where OUT/metrics.json is of the other kind, told by a key that only that has."""
    path = out / "metrics.json"
    if key in read_json(path):
        raise ValueError(f"--out: {path} is {what}, which this would replace; name another folder")


def command_line() -> str:
    """The command as it was typed."""
    return shlex.join(["ldm", *sys.argv[1:]])
