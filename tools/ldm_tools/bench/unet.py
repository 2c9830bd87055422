"""`ldm bench unet`: see tools/ldm_tools/bench/networks.py, and against.py for --against."""

import argparse

from ldm_tools.bench import against, networks
from ldm_tools.bench.networks import run_unet as run

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the subject to `parser`."""
    networks.add_arguments(parser)
    against.add_arguments(parser)
