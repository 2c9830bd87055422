"""`ldm traps`: the known mistakes in re-implementing SD1.5, each made on purpose and held against the right network.

Reading order: recipe (a traversal with every convention spelt out), text, unet, vae and sampling (the mistakes),
command (run, table, figure).
"""

from ldm_tools.traps.command import add_arguments, run

__all__ = ["add_arguments", "run"]
