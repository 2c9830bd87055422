"""Stable Diffusion 1.5 from scratch, and trajectories through its latent space that change one attribute at a time."""

import os

# Large tensors in pages of 2 MiB instead of 4 KiB, where Linux has them: SD1.5's images are decoded a seventh faster,
# as measured. Torch reads this once, at its first tensor, so `import ldm` should come before that.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

from ldm import conditioning, guidance, samplers, schedule
from ldm.pipeline import StableDiffusion, load
from ldm.traversal import bezier, inversion, prompt_tree

__all__ = [
    "StableDiffusion",
    "bezier",
    "conditioning",
    "guidance",
    "inversion",
    "load",
    "prompt_tree",
    "samplers",
    "schedule",
]
