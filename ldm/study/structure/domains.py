"""How the network is asked about the drawn domains: the settings, the contexts, and all rows denoised in one call.

Letters: A attributes, B seeds, R rows of one batch, S steps, L tokens, D context width, C H W of a latent.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.phantom.prompts import DOMAINS, GUIDANCE, Cell
from ldm.pipeline import StableDiffusion


@dataclass(frozen=True)
class Settings:
    """How every run of a command is sampled."""

    seeds: tuple[int, ...]
    steps: int
    guidance: float = GUIDANCE


@dataclass(frozen=True, eq=False)
class Prompts:
    """The contexts of a domain."""

    neutral: Tensor  # (1, L, D)
    styles: Tensor  # (A, L, D)
    empty: Tensor  # (1, L, D)

    @classmethod
    def of(cls, sd: StableDiffusion, cell: Cell) -> "Prompts":
        contexts = sd.encode_prompts(["", cell.neutral, *cell.styles.values()])
        return cls(contexts[1:2], contexts[2:], contexts[:1])


def denoise(
    sd: StableDiffusion, contexts: Tensor, empty: Tensor, settings: Settings, done: Callable[[int], object]
) -> Tensor:
    """Every context from every seed's noise, all rows in one call of the U-Net, so that an edit can name rows.

    Args:    contexts: (K, L, D).  empty: (1, L, D), for guidance.  done: called with U-Net rows as they are done.
    Returns: (K, B, C, H, W) latents.
    """
    seeds, count = settings.seeds, len(contexts)
    rows = contexts.repeat_interleave(len(seeds), dim=0)
    run = sd.sample(rows, seeds * count, steps=settings.steps, guidance_scale=settings.guidance, negative=empty)
    for step in run:
        done(len(step.x_prev))
    return step.x_prev.unflatten(0, (count, len(seeds)))


def decoded(sd: StableDiffusion, latents: Tensor) -> Tensor:
    """(K, B, C, H, W) -> images (K, B, 3, h, w) in [-1, 1], clipped as a file would."""
    pieces = [sd.decode_latents(piece).clamp(-1, 1) for piece in latents.flatten(0, 1).split(16)]
    return torch.cat(pieces).float().unflatten(0, latents.shape[:2])


def chosen_domains(names: str) -> dict[str, Cell]:
    """ "chest,skin" -> cells. Raises ValueError for another name, or none."""
    wanted: Sequence[str] = [name for name in names.split(",") if name]
    if not wanted or not set(wanted) <= set(DOMAINS):
        raise ValueError(f"--domains: got {names!r}, expected some of {','.join(DOMAINS)}")
    return {name: DOMAINS[name] for name in wanted}
