"""`ldm bench vae`: see tools/ldm_tools/bench/networks.py."""

from ldm_tools.bench.networks import add_arguments
from ldm_tools.bench.networks import run_vae as run

__all__ = ["add_arguments", "run"]
