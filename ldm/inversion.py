"""Inversion: from an image's latent back to the noise from which DDIM would make it.

Papers: DDIM = Song et al. 2020, arXiv:2010.02502, section 4.3.  AIDI = Pan et al. 2023, arXiv:2309.04907.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from math import sqrt

from torch import Tensor

from ldm.samplers import EpsFn, Step
from ldm.schedule import Schedule, leading


def ddim_inversion(
    eps_fn: EpsFn, x_0: Tensor, schedule: Schedule, steps: int = 50, *, iterations: int = 1
) -> Iterator[Step]:
    """Run DDIM's steps backwards, from the image to the noise.

    x0_pred = (x_prev - sqrt(1 - a_prev) eps) / sqrt(a_prev)
    x_t     = sqrt(a_t) x0_pred + sqrt(1 - a_t) eps                                          [DDIM, eq. 13 reversed]

    The step down from x_t used eps(x_t, t), but x_t is what is sought. The plain inversion takes eps(x_prev, t)
    for it: close, since neighbours on the path are alike. Every further iteration asks the network again at the x_t
    just found, which converges to the x_t that DDIM steps down from [AIDI, eq. 7].

    Invert under the prompt that the image should be retraced with, and at guidance 1: a larger scale bends the two
    ways apart. Steps come in reverse, so that an embedding schedule and `Step.index` keep their meaning: the first
    step has index S - 1.

    Args:    eps_fn: see `ldm.samplers.EpsFn`.  x_0: (B, 4, H/8, W/8) scaled latents, float32.  steps: S, those that
             `ddim` will take back.  iterations: network evaluations a step; 1 is the plain inversion.
    Returns: an iterator of S steps with falling `index`: `x_in` is the latent before (less noise), `x_t` the latent
             after (more noise); the last `x_t` is x_T.
    Raises:  ValueError: steps or iterations out of range, or eps_fn made for another number of steps; on the
             first `next`.
    """
    if iterations < 1:
        raise ValueError(f"iterations: expected 1 or more, got {iterations}")
    if (expected := getattr(eps_fn, "steps", steps)) != steps:
        raise ValueError(f"steps: got {steps}, expected {expected}, as many as eps_fn has contexts for")
    ts = leading(steps, train_steps=len(schedule))
    alphas = [float(schedule.alphas_cumprod[t]) for t in ts] + [schedule.final_alpha_cumprod]
    upwards = list(enumerate(pairwise(alphas)))[::-1]
    x_prev = x_0
    for index, (a_t, a_prev) in upwards:
        x_t = x_prev
        for _ in range(iterations):
            eps = eps_fn(x_t, ts[index], index).to(x_0.dtype)
            x0_pred = (x_prev - sqrt(1 - a_prev) * eps) / sqrt(a_prev)
            x_t = sqrt(a_t) * x0_pred + sqrt(1 - a_t) * eps
        yield Step(index, ts[index], x_t, x0_pred, eps, x_in=x_prev)
        x_prev = x_t
