"""`ldm bench load`: from a checkpoint on disk to the first step, against reading its bytes."""

import argparse
import json

from ldm.bench import harness, traversal
from ldm_tools.options import add_model, load_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the subject to `parser`."""
    parser.description = (
        "Read the file, load it, and load it up to the end of the first U-Net evaluation, each with the file dropped "
        "from the page cache where the system can be asked for that. Single files only."
    )
    parser.add_argument("--rounds", type=int, default=3, help="of the timing (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    add_model(parser)


def run(args: argparse.Namespace) -> None:
    """Raises ValueError for options that do not fit."""
    if args.rounds < 1:
        raise ValueError(f"--rounds: got {args.rounds}, expected 1 or more")
    if not args.weights.is_file() or args.base or args.ema:
        raise ValueError(f"--weights: got {args.weights}, expected a single file that needs neither --base nor --ema")
    sd = load_model(args)  # what is wrong with the file or the device is said here
    result = traversal.load_against_read(args.weights, sd.device, sd.dtype, args.rounds)
    result |= {"peak_memory_mib": round(harness.peak_memory_mib(sd.device)), "environment": harness.environment()}
    if args.json:
        print(json.dumps(result, indent=1))
        return
    read = result["timings"]["read"]["median_ms"]
    for name, timing in result["timings"].items():
        print(
            f"{name:11} {timing['median_ms']:10.1f} ms  {timing['median_ms'] / read:6.2f} x the time to read the file"
        )
    print(f"{result['bytes'] / 2**20:.1f} MiB on disk; {result['peak_memory_mib']} MiB at most")
