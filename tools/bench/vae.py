"""`ldm bench vae`: see tools/bench/networks.py."""

from tools.bench.networks import add_arguments
from tools.bench.networks import run_vae as run

__all__ = ["add_arguments", "run"]
