"""Classifier-free guidance: a U-Net and its contexts become the `eps_fn` that samplers call.

Paper: Ho and Salimans 2022, "Classifier-Free Diffusion Guidance", arXiv:2207.12598.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.conditioning import Contexts, constant
from ldm.config import Prediction
from ldm.prediction import Predicted
from ldm.schedule import Schedule

UNetFn = Callable[[Tensor, float, Tensor], Tensor]
"""eps = unet(x_t, t, context): (B, 4, H/8, W/8), training timestep, (B, L, D); all in the network's dtype."""


def guided(
    unet: UNetFn,
    contexts: Contexts,
    guidance_scale: float = 7.5,
    uncond: Tensor | Contexts | None = None,
    *,
    max_batch: int | None = None,
    schedule: Schedule | None = None,
) -> GuidedEps | Predicted:
    """Bind a U-Net to the contexts of a run: eps_fn(x_t, t, step), eps in x_t's dtype whatever the U-Net's.

    eps = eps_uncond + g (eps_cond - eps_uncond)        g = 1 is no guidance, and half the cost (the paper's w is g - 1)

    contexts: of the prompt, in the U-Net's dtype.  guidance_scale: g.
    uncond: what guidance pushes away from: the empty prompt's (L, D) or (B or 1, L, D) context, or a negative prompt's
    contexts; ValueError where it is missing or does not fit.
    max_batch: most rows in one U-Net call. Under guidance a latent has two, which stay together. Another number of rows
    changes results in the last bits of float32; with 1 no result depends on the rest of the batch.
    schedule: of the model, where the network predicts v or x_0: eps is made of that here.
    """
    if max_batch is not None and max_batch < 1:
        raise ValueError(f"max_batch: expected 1 or more, or None, got {max_batch}")
    prediction: Prediction = getattr(unet, "prediction", "eps")
    if prediction != "eps":
        if schedule is None:
            raise ValueError(f"schedule: expected the model's, as its U-Net predicts {prediction}; or use sd.guided")
        return Predicted(_guided(unet, contexts, guidance_scale, uncond, max_batch), prediction, schedule)
    return _guided(unet, contexts, guidance_scale, uncond, max_batch)


def _guided(
    unet: UNetFn,
    contexts: Contexts,
    guidance_scale: float,
    uncond: Tensor | Contexts | None,
    max_batch: int | None,
) -> GuidedEps:
    if guidance_scale == 1:
        return GuidedEps(unet, contexts, 1.0, None, max_batch)
    if uncond is None:
        raise ValueError(f"uncond: expected the empty prompt's context for guidance_scale {guidance_scale}, got None")
    if isinstance(uncond, Tensor):
        if uncond.ndim not in (2, 3):
            raise ValueError(f"uncond: expected (L, D) or (B, L, D), got {tuple(uncond.shape)}")
        uncond = constant(uncond if uncond.ndim == 3 else uncond[None], len(contexts))
    if len(uncond) != len(contexts):
        raise ValueError(f"uncond: expected {len(contexts)} steps, as the prompt's contexts, got {len(uncond)}")
    want, got = contexts.at(0), uncond.at(0)
    if (got.shape[1:], got.dtype, got.device) != (want.shape[1:], want.dtype, want.device):
        raise ValueError(
            f"uncond: expected (L, D), dtype and device of the prompt's contexts, {tuple(want.shape[1:])} "
            f"{want.dtype} on {want.device}, got {tuple(got.shape[1:])} {got.dtype} on {got.device}"
        )
    return GuidedEps(unet, contexts, guidance_scale, uncond, max_batch)


def rows_a_latent(guidance_scale: float) -> int:
    """How many rows of the U-Net's batch a latent takes: with the prompt, and under guidance without it too."""
    return 1 if guidance_scale == 1 else 2


class GuidedEps:
    """The eps_fn that `guided` returns. rows: U-Net rows evaluated so far.  steps: that it has contexts for."""

    def __init__(
        self, unet: UNetFn, contexts: Contexts, guidance_scale: float, uncond: Contexts | None, max_batch: int | None
    ) -> None:
        self.unet = unet
        self.contexts = contexts
        self.guidance_scale = guidance_scale
        self.uncond = uncond
        self.latents_a_call = max_batch and max(1, max_batch // rows_a_latent(guidance_scale))
        self.steps = len(contexts)
        self.rows = 0

    def __call__(self, x_t: Tensor, t: float, step: int) -> Tensor:
        """eps of (B, 4, H/8, W/8), see `guided`; ValueError when a context's batch is neither B nor 1."""
        return self.with_uncond(x_t, t, step)[0]

    def with_uncond(self, x_t: Tensor, t: float, step: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """eps, and the unconditional one (eps again without guidance); rows: of the contexts, where x_t is some."""
        size = self.latents_a_call or len(x_t)
        cond = _for_batch("context", self.contexts.at(step), len(x_t), rows)
        if self.uncond is None:
            parts = zip(x_t.split(size), cond.split(size), strict=True)
            eps = torch.cat([self._evaluate(x, t, context) for x, context in parts])
            return eps, eps
        uncond = _for_batch("uncond", self.uncond.at(step), len(x_t), rows)
        halves = []
        for x, without, with_prompt in zip(x_t.split(size), uncond.split(size), cond.split(size), strict=True):
            # One call for both, the unconditional half first, as CompVis has it.
            eps = self._evaluate(torch.cat([x, x]), t, torch.cat([without, with_prompt]))
            halves.append(eps.chunk(2))
        eps_uncond, eps_cond = (torch.cat(parts) for parts in zip(*halves, strict=True))
        return eps_uncond + self.guidance_scale * (eps_cond - eps_uncond), eps_uncond

    def row(self, i: int) -> Callable[[Tensor, float, int], Tensor]:
        """The eps_fn of one latent of the batch, for samplers that step each by itself."""
        return lambda x_t, t, step: self.with_uncond(x_t, t, step, slice(i, i + 1))[0]

    def _evaluate(self, x_t: Tensor, t: float, context: Tensor) -> Tensor:
        self.rows += len(x_t)
        return self.unet(x_t.to(context.dtype), t, context).to(x_t.dtype)


def _for_batch(name: str, context: Tensor, batch: int, rows: slice) -> Tensor:
    """(B or 1, L, D) -> (B, L, D), as a view."""
    context = context[rows] if len(context) > 1 else context
    if len(context) not in (1, batch):
        raise ValueError(f"{name}: expected a batch of 1 or {batch}, as x_t's, got {len(context)}")
    return context.expand(batch, -1, -1)
