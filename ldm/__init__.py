"""Stable Diffusion 1.5 from scratch, and trajectories through its latent space that change one attribute at a time."""

from ldm import bezier, conditioning, guidance, inversion, samplers, schedule, trajectory
from ldm.pipeline import StableDiffusion, load

__all__ = [
    "StableDiffusion",
    "bezier",
    "conditioning",
    "guidance",
    "inversion",
    "load",
    "samplers",
    "schedule",
    "trajectory",
]
