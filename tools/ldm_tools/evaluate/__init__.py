"""`ldm evaluate`: everything that the paper reports, and what only phantoms allow.

ldm evaluate --seeds 0-199 --out out/evaluation             the shipped models, all five cells
ldm evaluate out/glasses --weights FILE --classifier FILE   trajectories that exist
ldm evaluate --predictions FILE.csv --attribute hair        a table of probabilities, no model
ldm evaluate --processes 4 ...                              seeds shared among processes; the numbers stay the same
"""

from ldm_tools.evaluate.command import run
from ldm_tools.evaluate.options import add_arguments

__all__ = ["add_arguments", "run"]
