"""DPM-Solver: the part of the flow that is known exactly is solved exactly, and only the network is approximated.

With lambda = log(alpha / sigma) and h = lambda_prev - lambda > 0, a step from (alpha, sigma) to (alpha', sigma') is

    x' = (alpha' / alpha) x_t - alpha' int e^-l eps(l) dl        written with eps   [DPM-Solver, eq. 3.4]
    x' = (sigma' / sigma) x_t + sigma' int e^l x0_pred(l) dl     written with x0    [DPM-Solver++, eq. 8]

over lambda .. lambda_prev. A polynomial in place of eps or x0_pred gives a method; a constant gives DDIM in both.

Papers: DPM-Solver = Lu et al. 2022, arXiv:2206.00927.  DPM-Solver++ = Lu et al. 2022, arXiv:2211.01095.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import expm1

from torch import Tensor

from ldm.samplers.step import EpsFn, History, Noise, Step, level_at, noise_levels, predict
from ldm.schedule import Schedule


def dpm_solver_2s(
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
    """DPM-Solver-2, a midpoint method in lambda. Order 2.

    u  = (alpha_m / alpha) x_t - sigma_m (e^(h/2) - 1) eps          m: halfway in lambda
    x' = (alpha' / alpha) x_t - sigma' (e^h - 1) eps(u, t_m)                            [DPM-Solver, algorithm 1]

    Two evaluations a step, both in this step's context; the second is made between two of the run's timesteps. Without
    noise at its end (h infinite) a step is DDIM's.

    Args, returns, raises: see `ldm.samplers.Sampler`.
    """
    levels = noise_levels(eps_fn, x_T, schedule, steps, start, history, timesteps)
    x_t = x_T
    for index in range(start, steps):
        now, then = levels[index], levels[index + 1]
        eps, x0_pred = predict(eps_fn, x_t, now, index)
        if then.sigma == 0:
            x_prev, evaluations = x0_pred, 1
        else:
            h = then.log_snr - now.log_snr
            middle = level_at(schedule, now.log_snr + h / 2)
            u = middle.alpha / now.alpha * x_t - middle.sigma * expm1(h / 2) * eps
            eps_middle, _ = predict(eps_fn, u, middle, index)
            x_prev, evaluations = then.alpha / now.alpha * x_t - then.sigma * expm1(h) * eps_middle, 2
        yield Step(index, now.t, x_prev, x0_pred, eps, x_in=x_t, evaluations=evaluations)
        x_t = x_prev


def dpm_solver_pp_2m(
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
    """DPM-Solver++(2M): x0_pred carried on to the middle of the step along the line through the last two. Order 2.

    D  = x0 + h / (2 h_1) (x0 - x0_1)                       h_1, x0_1: of the step before
    x' = (sigma' / sigma) x_t + alpha' (1 - e^-h) D                                     [DPM-Solver++, algorithm 2]

    The first step is DDIM's, and so is one without noise at its end (h infinite).

    Args:    history: the last x0_pred.
             All else, what it returns and raises: see `ldm.samplers.Sampler`.
    """
    levels = noise_levels(eps_fn, x_T, schedule, steps, start, history, timesteps)
    x_t = x_T
    for index in range(start, steps):
        now, then = levels[index], levels[index + 1]
        eps, x0_pred = predict(eps_fn, x_t, now, index)
        h = then.log_snr - now.log_snr
        D = x0_pred
        if history and then.sigma > 0:
            h_1 = now.log_snr - levels[index - 1].log_snr
            D = x0_pred + h / (2 * h_1) * (x0_pred - history[0])
        x_prev = then.sigma / now.sigma * x_t - then.alpha * expm1(-h) * D
        history = (x0_pred,)
        yield Step(index, now.t, x_prev, x0_pred, eps, x_in=x_t, history=history)
        x_t = x_prev


def dpm_solver_pp_3m(
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
    """DPM-Solver++ with the parabola through the last three x0_pred. Order 3.

    d_1 = (x0 - x0_1) / h_1,   d_2 = (d_1 - (x0_1 - x0_2) / h_2) / (h_1 + h_2)         (divided differences)
    x'  = (sigma' / sigma) x_t + alpha' (w_0 x0 + w_1 d_1 + (w_2 + h_1 w_1) d_2)
    w_k = int_0^h e^(l - h) l^k dl:   w_0 = 1 - e^-h,   w_1 = h - w_0,   w_2 = h^2 - 2 w_1

    The parabola is integrated exactly: its second derivative is 2 d_2. With d_2 in its place, an easy mistake, the
    method would be of order 2.

    The first two steps are those of DDIM and of the line through two; where their error is not small it is what
    remains, of order 2. Without noise at its end (h infinite) a step is DDIM's.

    Args:    history: the last two x0_pred, newest first.
             All else, what it returns and raises: see `ldm.samplers.Sampler`.
    """
    levels = noise_levels(eps_fn, x_T, schedule, steps, start, history, timesteps)
    x_t = x_T
    for index in range(start, steps):
        now, then = levels[index], levels[index + 1]
        eps, x0_pred = predict(eps_fn, x_t, now, index)
        h = then.log_snr - now.log_snr
        w_0 = -expm1(-h)
        integral = w_0 * x0_pred
        if history and then.sigma > 0:
            w_1 = h - w_0
            h_1 = now.log_snr - levels[index - 1].log_snr
            d_1 = (x0_pred - history[0]) / h_1
            integral = integral + w_1 * d_1
            if len(history) > 1:
                w_2 = h**2 - 2 * w_1
                h_2 = levels[index - 1].log_snr - levels[index - 2].log_snr
                d_2 = (d_1 - (history[0] - history[1]) / h_2) / (h_1 + h_2)
                integral = integral + (w_2 + h_1 * w_1) * d_2
        x_prev = then.sigma / now.sigma * x_t + then.alpha * integral
        history = (x0_pred, *history)[:2]
        yield Step(index, now.t, x_prev, x0_pred, eps, x_in=x_t, history=history)
        x_t = x_prev
