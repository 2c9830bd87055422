"""DDIM, and DDPM's ancestral sampling as its noisy limit.

Papers: DDIM = Song et al. 2020, arXiv:2010.02502 (its alpha_t is our alphas_cumprod[t]).
DDPM = Ho et al. 2020, arXiv:2006.11239.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import sqrt

from torch import Tensor

from ldm.samplers.step import EpsFn, History, Level, Noise, Step, noise_levels, predict
from ldm.schedule import Schedule


def ddim(
    eps_fn: EpsFn,
    x_T: Tensor,
    schedule: Schedule,
    steps: int = 50,
    *,
    eta: float = 0.0,
    start: int = 0,
    history: History = (),
    noise: Noise | None = None,
    timesteps: Sequence[float] | None = None,
) -> Iterator[Step]:
    """Denoising diffusion implicit models: the deterministic sampler (eta 0), or DDPM-like (eta 1). Order 1.

    x0_pred = (x_t - sqrt(1 - a_t) eps) / sqrt(a_t)                                          [DDIM, eq. 9]
    sigma   = eta sqrt((1 - a_prev) / (1 - a_t)) sqrt(1 - a_t / a_prev)                      [DDIM, eq. 16]
    x_prev  = sqrt(a_prev) x0_pred + sqrt(1 - a_prev - sigma^2) eps + sigma z                [DDIM, eq. 12]

    The coefficients are computed in float64 and applied in x's dtype. Under a half-precision network keep x_T in
    float32: rounding every step would add up (`ldm.guidance.guided` casts for each call).

    Args:    eta: 0 (deterministic) .. 1.  noise: needed when eta > 0; `step_noise(seeds, shape)` makes one.
             All else, what it returns and raises: see `ldm.samplers.Sampler`.
    """
    levels = noise_levels(eps_fn, x_T, schedule, steps, start, history, timesteps)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: expected 0..1, got {eta}")
    if eta > 0 and noise is None:
        raise ValueError(f"noise: expected a callable because eta is {eta}, got None; see step_noise")
    x_t = x_T
    for index in range(start, steps):
        a_t, a_prev = levels[index].alphas_cumprod, levels[index + 1].alphas_cumprod
        if eta == 0 and (fused := _in_one_kernel(eps_fn, x_t, levels[index], levels[index + 1], index)):
            x_prev, x0_pred, eps = fused
        else:
            eps, x0_pred = predict(eps_fn, x_t, levels[index], index)
            sigma = eta * sqrt((1 - a_prev) / (1 - a_t)) * sqrt(1 - a_t / a_prev)
            x_prev = sqrt(a_prev) * x0_pred + sqrt(1 - a_prev - sigma**2) * eps
            if noise is not None and sigma > 0:
                x_prev = x_prev + sigma * noise(index).to(x_t)
        yield Step(index, levels[index].t, x_prev, x0_pred, eps, x_in=x_t)
        x_t = x_prev


def _in_one_kernel(
    eps_fn: EpsFn, x_t: Tensor, now: Level, following: Level, step: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """x_prev, x0_pred, eps of the formulas above, to within rounding, where eps_fn has them as one kernel for x_t."""
    # Asked of its type: a wrapper may lend the attributes of an eps_fn, and change its eps.
    ddim_step = getattr(type(eps_fn), "ddim_step", None)
    return ddim_step and ddim_step(eps_fn, x_t, now.t, step, now.alphas_cumprod, following.alphas_cumprod)


def ddpm(
    eps_fn: EpsFn,
    x_T: Tensor,
    schedule: Schedule,
    steps: int = 50,
    *,
    start: int = 0,
    history: History = (),
    noise: Noise | None = None,
    timesteps: Sequence[float] | None = None,
) -> Iterator[Step]:
    """Ancestral sampling: draw x_prev from the posterior given x_t and x0_pred. What DDIM does at eta 1.

    beta   = 1 - a_t / a_prev
    x_prev = (sqrt(a_prev) beta x0_pred + sqrt(a_t / a_prev) (1 - a_prev) x_t) / (1 - a_t) + sqrt(beta') z
    beta'  = beta (1 - a_prev) / (1 - a_t)                                                   [DDPM, eq. 7]

    The smaller of DDPM's two variances. Random, so it has no order: with more steps it draws from the distribution
    more closely, and finds another image of it.

    Args:    noise: needed.  All else, what it returns and raises: see `ldm.samplers.Sampler`.
    """
    levels = noise_levels(eps_fn, x_T, schedule, steps, start, history, timesteps)
    if noise is None:
        raise ValueError("noise: expected a callable because ddpm is random, got None; see step_noise")
    x_t = x_T
    for index in range(start, steps):
        a_t, a_prev = levels[index].alphas_cumprod, levels[index + 1].alphas_cumprod
        eps, x0_pred = predict(eps_fn, x_t, levels[index], index)
        beta = 1 - a_t / a_prev
        mean = (sqrt(a_prev) * beta * x0_pred + sqrt(a_t / a_prev) * (1 - a_prev) * x_t) / (1 - a_t)
        x_prev = mean + sqrt(beta * (1 - a_prev) / (1 - a_t)) * noise(index).to(x_t)
        yield Step(index, levels[index].t, x_prev, x0_pred, eps, x_in=x_t)
        x_t = x_prev
