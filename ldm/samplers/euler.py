"""Textbook methods for the probability flow in EDM's coordinates: Euler, Heun, linear multistep; ancestral Euler.

With y = x_t / alpha and kappa = sigma / alpha the flow is

    dy / dkappa = eps(x_t, t),   x_t = alpha y                                               [EDM, section 2]

Papers: EDM = Karras et al. 2022, arXiv:2206.00364. The multistep and the ancestral one are Crowson's, k-diffusion.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import sqrt

import numpy as np
from torch import Tensor

from ldm.samplers.step import EpsFn, History, Noise, Step, noise_levels, predict
from ldm.schedule import Schedule


def euler(
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
    """One slope a step. Order 1. The very same step as DDIM's, in other letters.

    y_prev = y + (kappa_prev - kappa) eps

    Args, returns, raises: see `ldm.samplers.Sampler`.
    """
    levels = noise_levels(eps_fn, x_T, schedule, steps, start, history, timesteps)
    x_t = x_T
    for index in range(start, steps):
        now, then = levels[index], levels[index + 1]
        eps, x0_pred = predict(eps_fn, x_t, now, index)
        x_prev = then.alpha * (x_t / now.alpha + (then.kappa - now.kappa) * eps)
        yield Step(index, now.t, x_prev, x0_pred, eps, x_in=x_t)
        x_t = x_prev


def heun(
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
    """Euler's step to a guess, the slope there, and the step again with the mean of both slopes. Order 2.

    y'     = y + (kappa_prev - kappa) eps
    y_prev = y + (kappa_prev - kappa) (eps + eps') / 2,  eps' = eps(alpha_prev y', t_prev)   [EDM, algorithm 1]

    Two evaluations a step, both in this step's context although the second is made at the next timestep. Without
    noise at its end (kappa_prev = 0) a step is Euler's.

    Args, returns, raises: see `ldm.samplers.Sampler`.
    """
    levels = noise_levels(eps_fn, x_T, schedule, steps, start, history, timesteps)
    x_t = x_T
    for index in range(start, steps):
        now, then = levels[index], levels[index + 1]
        eps, x0_pred = predict(eps_fn, x_t, now, index)
        stride, slope, evaluations = then.kappa - now.kappa, eps, 1
        if then.sigma > 0:
            eps_then, _ = predict(eps_fn, then.alpha * (x_t / now.alpha + stride * eps), then, index)
            slope, evaluations = (eps + eps_then) / 2, 2
        x_prev = then.alpha * (x_t / now.alpha + stride * slope)
        yield Step(index, now.t, x_prev, x0_pred, eps, x_in=x_t, evaluations=evaluations)
        x_t = x_prev


def lms(
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
    """Linear multistep: the cubic through the last four slopes, integrated over the step. Order 4.

    y_prev = y + sum_k w_k e_k,   w_k = integral from kappa to kappa_prev of the k-th Lagrange polynomial

    Adams and Bashforth's method for uneven strides. Its first steps know fewer slopes; where their error is not
    small it is what remains, of order 2.

    Args:    history: the last three eps, newest first.
             All else, what it returns and raises: see `ldm.samplers.Sampler`.
    """
    levels = noise_levels(eps_fn, x_T, schedule, steps, start, history, timesteps)
    x_t = x_T
    for index in range(start, steps):
        now, then = levels[index], levels[index + 1]
        eps, x0_pred = predict(eps_fn, x_t, now, index)
        slopes = (eps, *history)
        known_at = [levels[index - k].kappa for k in range(len(slopes))]
        weights = _adams_weights(known_at, now.kappa, then.kappa)
        x_prev = then.alpha * (x_t / now.alpha + sum(w * e for w, e in zip(weights, slopes, strict=True)))
        history = slopes[:3]
        yield Step(index, now.t, x_prev, x0_pred, eps, x_in=x_t, history=history)
        x_t = x_prev


def euler_ancestral(
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
    """Euler's step to less noise than is wanted, and fresh noise for the rest.

    up^2   = kappa_prev^2 (kappa^2 - kappa_prev^2) / kappa^2
    down^2 = kappa_prev^2 - up^2
    y_prev = y + (down - kappa) eps + up z                                [k-diffusion, sample_euler_ancestral]

    As DDPM's posterior, in EDM's coordinates. Random, so it has no order.

    Args:    noise: needed.  All else, what it returns and raises: see `ldm.samplers.Sampler`.
    """
    levels = noise_levels(eps_fn, x_T, schedule, steps, start, history, timesteps)
    if noise is None:
        raise ValueError("noise: expected a callable because euler_ancestral is random, got None; see step_noise")
    x_t = x_T
    for index in range(start, steps):
        now, then = levels[index], levels[index + 1]
        eps, x0_pred = predict(eps_fn, x_t, now, index)
        up = then.kappa * sqrt(now.kappa**2 - then.kappa**2) / now.kappa
        down = sqrt(then.kappa**2 - up**2)
        x_prev = then.alpha * (x_t / now.alpha + (down - now.kappa) * eps + up * noise(index).to(x_t))
        yield Step(index, now.t, x_prev, x0_pred, eps, x_in=x_t)
        x_t = x_prev


def _adams_weights(known_at: Sequence[float], begin: float, end: float) -> list[float]:
    """Weights with which values at some places give the integral from begin to end of the polynomial through them.

    They are those that integrate 1, x, x^2 ... exactly, x counted from `begin`.
    """
    scale = max(abs(end - begin), abs(known_at[-1] - begin))
    x, stride = (np.array(known_at) - begin) / scale, (end - begin) / scale
    powers = np.arange(len(x))
    integrals = stride ** (powers + 1) / (powers + 1)
    return (scale * np.linalg.solve(x ** powers[:, None], integrals)).tolist()
