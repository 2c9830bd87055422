"""Round trips: latents inverted to noise by one of three methods, and retraced by the sampler that it inverts.

Letters: B images, C H W of a latent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ldm.conditioning import constant
from ldm.data.images import FITS
from ldm.data.reading import AS_STORED, Reading
from ldm.guidance import GuidedEps
from ldm.pipeline import StableDiffusion
from ldm.prediction import Predicted
from ldm.samplers import EpsFn, Step, ddim
from ldm.schedule import SPACINGS, TRAIN_STEPS
from ldm.traversal.inversion import ddim_inversion, edict, edict_inversion, fixed_point_inversion

Method = Literal["naive", "fixed-point", "edict"]
METHODS: dict[Method, Callable[..., Iterator[Step]]] = {
    "naive": ddim_inversion,
    "fixed-point": fixed_point_inversion,
    "edict": edict_inversion,
}


@dataclass(frozen=True, kw_only=True)
class Inversion:
    """How images become noise, and how they are retraced."""

    prompt: str
    method: Method = "fixed-point"
    steps: int = 50
    spacing: str = "leading"  # one of ldm.schedule.SPACINGS
    guidance: float = 1.0  # see `ldm.traversal.inversion`
    negative: str = ""
    fit: str = "squash"  # how an image is brought to that size
    reading: Reading = AS_STORED  # how its file becomes pixels
    own_code: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # "spacing" -> file, sha256

    def settings(self) -> dict[str, Any]:
        """For run.json: a reading as usual is not mentioned, so that older folders can be grown."""
        entries = asdict(self)
        if self.reading == AS_STORED:
            del entries["reading"]
        if not self.own_code:
            del entries["own_code"]
        return entries

    def __post_init__(self) -> None:
        """Everything that can be wrong before a network is at hand."""
        if not self.prompt.strip():
            raise ValueError("prompt: none given, expected what the image shows; it is retraced under this prompt")
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {self.method!r}")
        if not 1 <= self.steps <= TRAIN_STEPS:
            raise ValueError(f"steps: expected 1..{TRAIN_STEPS}, got {self.steps}")
        if self.spacing not in SPACINGS:
            raise ValueError(
                f"spacing: expected one of {', '.join(SPACINGS)}, FILE.py:NAME or FILE.json, got {self.spacing!r}"
            )
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance: expected a finite number, got {self.guidance}")
        if self.fit not in FITS:
            raise ValueError(f"fit: expected one of {', '.join(FITS)}, got {self.fit!r}")


@dataclass(frozen=True, eq=False)
class Inverted:
    """What latents were inverted to."""

    x_T: Tensor  # (B, C, H, W)
    y_T: Tensor | None = None  # its partner, of EDICT

    def latents(self) -> dict[str, Tensor]:
        """By the names that they are saved under."""
        return {"x_T": self.x_T} if self.y_T is None else {"x_T": self.x_T, "y_T": self.y_T}


Progress = Callable[[int], object]
"""Called after every step with the number of images that it was taken for."""


def bind(sd: StableDiffusion, how: Inversion) -> GuidedEps | Predicted:
    """The network under the inversion's prompts."""
    prompt, negative = sd.encode_prompts([how.prompt, how.negative])[:, None]
    return sd.guided(constant(prompt, how.steps), how.guidance, negative)


@torch.no_grad()
def invert(sd: StableDiffusion, how: Inversion, eps_fn: EpsFn, x_0: Tensor, progress: Progress = int) -> Inverted:
    """Latents (B, C, H, W), float32, to noise by the chosen method; eps_fn: see `bind`."""
    timesteps = SPACINGS[how.spacing](how.steps, sd.schedule)
    for step in METHODS[how.method](eps_fn, x_0, sd.schedule, how.steps, timesteps=timesteps):
        progress(len(step.x_t))
    return Inverted(step.x_t, *step.history)


@torch.no_grad()
def retrace(sd: StableDiffusion, how: Inversion, eps_fn: EpsFn, noise: Inverted, progress: Progress = int) -> Tensor:
    """The way down again, by the sampler that the method inverts: latents (B, C, H, W)."""
    timesteps = SPACINGS[how.spacing](how.steps, sd.schedule)
    if noise.y_T is None:
        run = ddim(eps_fn, noise.x_T, sd.schedule, how.steps, timesteps=timesteps)
    else:
        run = edict(eps_fn, noise.x_T, sd.schedule, how.steps, history=(noise.y_T,), timesteps=timesteps)
    for step in run:
        progress(len(step.x_prev))
    return step.x_prev


def relative_error(x: Tensor, reference: Tensor) -> float:
    """|x - reference| / |reference|"""
    return float((x - reference).norm() / reference.norm())


def finite(value: float | Tensor) -> float | None:
    """A number as JSON can hold it: None for infinity and NaN, where a latent was lost."""
    return float(value) if math.isfinite(value) else None
