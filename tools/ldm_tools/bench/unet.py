"""`ldm bench unet`: see tools/ldm_tools/bench/networks.py, against.py for --against, growth.py for --growth."""

import argparse

from ldm_tools.bench import against, growth, networks
from ldm_tools.bench.networks import run_unet as run

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the subject to `parser`."""
    networks.add_arguments(parser)
    against.add_arguments(parser)
    growth.add_arguments(parser)
