"""`ldm train-small`: the options, the stages, and what the samples repeat."""

from ldm_tools.train_small.command import run
from ldm_tools.train_small.options import add_arguments

__all__ = ["add_arguments", "run"]
