"""Stable Diffusion 1.5 from scratch, and trajectories through its latent space that change one attribute at a time."""

import os

# Large tensors in pages of 2 MiB instead of 4 KiB, where Linux has them: SD1.5's images are decoded a seventh faster,
# as measured. Torch reads this once, at its first tensor, so `import ldm` should come before that.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# A thread that waits for the others of an operation looks 3,000 times, then sleeps, instead of 300,000: where other
# programs use the cores, too, the small models are 10 times as fast, as measured. GNU's OpenMP reads this with torch.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import torch

from ldm import conditioning, guidance, pipeline, samplers, schedule
from ldm.pipeline import StableDiffusion
from ldm.unet import STANDARD_BLOCKS, UNetBlocks

if TYPE_CHECKING:
    from ldm.traversal import bezier as bezier
    from ldm.traversal import inversion as inversion
    from ldm.traversal import prompt_tree as prompt_tree

__all__ = [
    "StableDiffusion",
    "conditioning",
    "guidance",
    "load",
    "samplers",
    "schedule",
]


def __getattr__(name: str) -> ModuleType:
    """`ldm.bezier` and the like, read when they are first asked for."""
    if name in ("bezier", "inversion", "prompt_tree"):
        return importlib.import_module(f"ldm.traversal.{name}")
    raise AttributeError(f"module 'ldm' has no attribute {name!r}")


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
    *,
    ema: Literal["ema", "plain"] | None = None,
    base: str | Path | None = None,
    backend: Literal["auto", "torch", "triton", "openvino"] | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
    embeddings: Sequence[str | Path] = (),
    blocks: UNetBlocks = STANDARD_BLOCKS,
) -> StableDiffusion:
    """Read a model, see `ldm.pipeline.load`, and install what makes its networks fast where it runs.

    Args:    path, device, dtype, ema, base, loras, embeddings, blocks: see there.
             backend: "auto", as None: fused kernels on a GPU that has them; "torch"; "triton"; "openvino". See
             `ldm.fast.backend`.
    Raises:  what it raises. ValueError: a backend that cannot compute there.
    """
    from ldm import fast

    fast.resolved(backend or "auto", torch.device(device))
    sd = pipeline.load(path, device, dtype, ema=ema, base=base, loras=loras, embeddings=embeddings, blocks=blocks)
    for network in (sd.unet, sd.clip):
        fast.install(network, kernels=backend or "auto")
    fast.install(sd.vae, kernels=backend or "auto", packed=False, channels_last=False)  # in float32
    return sd
