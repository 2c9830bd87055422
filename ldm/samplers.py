"""Samplers: hand-written loops from noise to a latent, one self-contained generator each.

A sampler yields a `Step` for every network evaluation it completes and holds no other state, so
whatever a caller wants of the trajectory is a `for` loop away:

    for step in ddim(eps_fn, x_T, schedule, steps=50):
        ...
    latents = step.x_t

Nothing here switches gradients off: wrap the loop in `torch.no_grad()` to sample.

Papers: DDIM = Song et al. 2020, arXiv:2010.02502 (its alpha_t is our alphas_cumprod[t]).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from ldm.schedule import Schedule, leading

EpsFn = Callable[[Tensor, int, int], Tensor]
"""eps = eps_fn(x_t, t, step): x_t and eps (B, 4, H/8, W/8); t the training timestep; step counted from noise.

An eps_fn that was made for a number of steps says so in an attribute `steps`; samplers of another number refuse it.
"""

Noise = Callable[[int], Tensor]
"""noise(step) -> standard normal like x_t: the same tensor whenever the same step is asked for."""


@dataclass(frozen=True, eq=False)
class Step:
    """One step of a sampler, from the latent that it met to the latent that it left.

    x_in, eps and x0_pred belong together: x_in = sqrt(a_t) x0_pred + sqrt(1 - a_t) eps.
    `x_t` is where the step arrives (the DDIM paper's x_{t-1}): the x_in of the next Step; in the last, the result.
    """

    index: int  # 0 .. S-1, counted from noise
    t: int  # training timestep, 999 .. 0
    x_t: Tensor  # (B, 4, H/8, W/8) the latents AFTER this step
    x0_pred: Tensor  # (B, 4, H/8, W/8) the clean latents that eps implies
    eps: Tensor  # (B, 4, H/8, W/8) the predicted noise, guidance included
    x_in: Tensor  # (B, 4, H/8, W/8) the latents BEFORE this step, as the network saw them at time t


def ddim(
    eps_fn: EpsFn,
    x_T: Tensor,
    schedule: Schedule,
    steps: int = 50,
    *,
    eta: float = 0.0,
    start: int = 0,
    noise: Noise | None = None,
    timesteps: Sequence[int] | None = None,
) -> Iterator[Step]:
    """Denoising diffusion implicit models: the deterministic sampler (eta 0), or DDPM-like (eta 1).

    x0_pred = (x_t - sqrt(1 - a_t) eps) / sqrt(a_t)                                          [DDIM, eq. 9]
    sigma   = eta sqrt((1 - a_prev) / (1 - a_t)) sqrt(1 - a_t / a_prev)                      [DDIM, eq. 16]
    x_prev  = sqrt(a_prev) x0_pred + sqrt(1 - a_prev - sigma^2) eps + sigma z                [DDIM, eq. 12]

    The coefficients are computed in float64 and applied in x's dtype. x0_pred is not clipped:
    latents have no natural range. Under a half-precision network keep x_T in float32: rounding every
    step would add up (`ldm.guidance.guided` casts for each call).

    Args:    eps_fn: see `EpsFn`.  x_T: (B, 4, H/8, W/8) standard normal; with `start`, the latents before that step.
             steps: S.  eta: 0 (deterministic) .. 1.  start: index of the first step to run; a branch that resumes
             from a shared prefix gives the number of steps already taken; `start=S` yields nothing.
             noise: z for each step, needed when eta > 0; `step_noise(seeds, shape)` makes one.
             timesteps: visit these instead of `leading(steps)`; S falling values.
    Returns: an iterator of S - start steps; shapes, dtype and device of x_T.
    Raises:  ValueError: steps, eta, start or timesteps out of range, eps_fn made for another number of steps, noise
             missing, or eps of another shape than x_t.
             As with every generator, on the first `next`; always before the first evaluation, bar eps's shape.
    """
    ts = leading(steps, train_steps=len(schedule)) if timesteps is None else tuple(int(t) for t in timesteps)
    if len(ts) != steps or any(later >= t for t, later in pairwise(ts)) or not 0 <= ts[-1] <= ts[0] < len(schedule):
        raise ValueError(f"timesteps: expected {steps} falling values in 0..{len(schedule) - 1}, got {ts}")
    if (expected := getattr(eps_fn, "steps", steps)) != steps:
        raise ValueError(f"steps: got {steps}, expected {expected}, as many as eps_fn has contexts for")
    if not 0 <= start <= steps:
        raise ValueError(f"start: expected 0..{steps}, the number of steps already taken, got {start}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: expected 0..1, got {eta}")
    if eta > 0 and noise is None:
        raise ValueError(f"noise: expected a callable because eta is {eta}, got None; see step_noise")

    alphas = [float(schedule.alphas_cumprod[t]) for t in ts] + [schedule.final_alpha_cumprod]
    x_t = x_T
    for index in range(start, steps):
        a_t, a_prev = alphas[index], alphas[index + 1]
        eps = eps_fn(x_t, ts[index], index).to(x_t.dtype)
        if eps.shape != x_t.shape:
            raise ValueError(f"eps_fn: expected eps like x_t, {tuple(x_t.shape)}, got {tuple(eps.shape)}")
        x0_pred = (x_t - sqrt(1 - a_t) * eps) / sqrt(a_t)
        sigma = eta * sqrt((1 - a_prev) / (1 - a_t)) * sqrt(1 - a_t / a_prev)
        x_prev = sqrt(a_prev) * x0_pred + sqrt(1 - a_prev - sigma**2) * eps
        if noise is not None and sigma > 0:
            x_prev = x_prev + sigma * noise(index).to(x_t)
        yield Step(index, ts[index], x_prev, x0_pred, eps, x_in=x_t)
        x_t = x_prev


def initial_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """x_T, each sample from a CPU generator of its own.

    So a seed names an image, whatever else is in the batch and wherever the network runs. Drawing a
    batch from one generator, or on the device, is why other tools give other images for one seed.

    Args:    seeds: one a sample, 0 .. 2^32-1 (torch's CPU generator ignores higher bits).
             shape: of one sample, (4, H/8, W/8).
    Returns: (B, *shape) float32 on the CPU: move it afterwards.
    Raises:  ValueError: no seeds, or a seed out of range.
    """
    _check_seeds(seeds)
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds])


def step_noise(seeds: Sequence[int], shape: Sequence[int]) -> Noise:
    """The noise that eta > 0 adds, a function of seed and step alone.

    Random access instead of a running stream: a branch that starts at step 20 gets the same z as the
    run that it left, and branches of one seed stay comparable.

    Args:    seeds, shape: as for `initial_noise`.
    Returns: noise(step) -> (B, *shape) float32 on the CPU.
    Raises:  ValueError: no seeds, or a seed out of range.
    """
    _check_seeds(seeds)

    def noise(step: int) -> Tensor:
        # SeedSequence hashes the pair: seed + step would give seed 7's step 1 to seed 8's step 0.
        mixed = [int(np.random.SeedSequence((seed, step)).generate_state(1)[0]) for seed in seeds]
        return initial_noise(mixed, shape)

    return noise


def _check_seeds(seeds: Sequence[int]) -> None:
    if len(seeds) == 0 or not all(0 <= seed < 2**32 for seed in seeds):
        raise ValueError(f"seeds: expected at least one, each in 0..2^32-1, got {list(seeds)}")
