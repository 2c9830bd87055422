"""`ldm bench gpu`: everything that only a GPU can tell, by one command, in the first hour with one.

ldm bench gpu                   about 40 minutes at most; out/bench/gpu/results.md and results.json
ldm bench gpu --dry-run         the same steps on the CPU with tiny sizes: is all of it there and does it run
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ldm.bench import gpu_hour, gpu_parts, gpu_tuning

OWN: dict[str, Callable[[Path, bool], Iterator[dict[str, Any]]]] = {
    "agree": lambda out, dry: gpu_parts.agree(dry),
    "step": lambda out, dry: gpu_parts.step(dry),
    "tune": lambda out, dry: gpu_tuning.tune(dry),
    "weights": lambda out, dry: gpu_parts.random_weights(out / "random.safetensors", dry),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the subject to `parser`."""
    parser.description = (
        "Doctor, agreement with the CPU, a step of SD1.5's U-Net every way (torch.compile in a CUDA graph among them), "
        "kernels and SDPA, the GPU tests, a whole traversal, block sizes. Each part is a process with a limit; what "
        "fails is noted, and the next one follows. Results are written after each part."
    )
    parser.add_argument("--out", type=Path, default=Path("out/bench/gpu"), help="folder (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=50, help="then what is left is skipped (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="PART,PART", help="some of the parts, and what they need")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny; its numbers mean nothing")
    parser.add_argument("--part", choices=OWN, help=argparse.SUPPRESS)  # how a part's process is told which it is


def run(args: argparse.Namespace) -> None:
    """Raises ValueError where there is no GPU, for an unknown part, or where a part was not all right."""
    if not args.dry_run and not torch.cuda.is_available():
        raise ValueError("no CUDA GPU that torch can use here; --dry-run takes the same steps on the CPU")
    if args.part:
        for row in OWN[args.part](args.out, args.dry_run):
            print(json.dumps(row), flush=True)
        return
    listed = gpu_hour.parts(args.out.resolve(), args.dry_run)
    names = [part.name for part in listed]
    wanted = set(args.only.split(",") if args.only else names)
    if unknown := wanted - set(names):
        raise ValueError(f"--only: got {', '.join(sorted(unknown))}, expected some of {', '.join(names)}")
    wanted |= {gpu_hour.NEEDS[name] for name in wanted & gpu_hour.NEEDS.keys()}
    wrong = []
    for part, found in gpu_hour.run([part for part in listed if part.name in wanted], args.out, args.minutes):
        tqdm.write(f"{part.name:16}{found['state']:20}{found.get('seconds', 0):6.1f} s  {part.says}")
        if found["state"] != "ok":
            wrong.append(f"{part.name}: {found['state']}")
    (args.out / "random.safetensors").unlink(missing_ok=True)
    print(f"see {args.out / 'results.md'}")
    if wrong:
        raise ValueError(f"{len(wrong)} parts not all right: {'; '.join(wrong)}")
