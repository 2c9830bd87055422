"""`ldm bench unet`: see tools/bench/networks.py."""

from tools.bench.networks import add_arguments
from tools.bench.networks import run_unet as run

__all__ = ["add_arguments", "run"]
