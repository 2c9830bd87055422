"""Methods that draw noise on the way: DPM2 ancestral, DPM-Solver++ as an SDE (2S, SDE, 2M, 3M), ER-SDE, Restart, LCM.

The SDE whose marginals are the diffusion's, with y = x / alpha and B a Brownian motion in the time 1 / sigma^2:

    dy = 2 (y - x0) / sigma dsigma + sigma^2 dB                              [compare DPM-Solver++, appendix, SDE]

With x0 held over a step it is solved exactly by

    y' = e^(-2h) y + (1 - e^(-2h)) x0 + up z,   up = sigma' sqrt(1 - e^(-2h)),   z = (B' - B) / sqrt(time)

which is ancestral Euler's step, and DDPM's. What a method draws is `Run.brownian`, what the seed's B does between two
levels: so runs of other steps follow the same path, and converge to the same image. Without noise at its end a step is
x0_pred.

Papers: DPM-Solver++ = Lu et al. 2022, arXiv:2211.01095.  ER-SDE = Cui et al. 2023, arXiv:2309.06169.
Restart = Xu et al. 2023, arXiv:2306.14878.  LCM = Luo et al. 2023, arXiv:2310.04378.
2S ancestral, SDE and the SDE's 2M and 3M are Crowson's, k-diffusion.
"""

from __future__ import annotations

from itertools import pairwise
from math import exp, expm1, sqrt

import numpy as np
from torch import Tensor

from ldm.samplers.driver import History, Level, Run
from ldm.samplers.multistep import newton_rest
from ldm.samplers.one_step import euler, heun

RESTART_FROM, RESTART_TO = 0.1, 2.0  # sigmas: where Restart leaps, and how far at most


def dpm2_ancestral(now: Level, then: Level, x_t: Tensor, eps: Tensor, run: Run) -> Tensor:
    """Ancestral Euler's step along the slope that is met halfway to where it goes in log sigma: at the step's end.

    y' = y + (sigma'^2 / sigma - sigma) eps(u) + up z,   u = y + (sigma' - sigma) eps
                                                                        [k-diffusion, sample_dpm_2_ancestral]
    """
    if then.std == 0:
        return run.x0_pred
    slope = run.eps(euler(now, then, x_t, eps, run), then)
    y = x_t / now.alpha + (then.sigma**2 / now.sigma - now.sigma) * slope
    return then.alpha * (y + _up(now, then) * run.brownian(now, then, x_t))


def dpm_solver_pp_2s_ancestral(now: Level, then: Level, x_t: Tensor, eps: Tensor, run: Run) -> Tensor:
    """The SDE's step, with the x0 that is seen where DDIM's leads to. [k-diffusion, sample_dpmpp_2s_ancestral]

    y' = e^(-2h) y + (1 - e^(-2h)) x0(u) + up z,   u = e^(-h) y + (1 - e^(-h)) x0
    """
    if then.std == 0:
        return run.x0_pred
    h, y = then.log_snr - now.log_snr, x_t / now.alpha
    seen = run.x0(then.alpha * _towards(run.x0_pred, y, h), then)
    return then.alpha * (_towards(seen, y, 2 * h) + _up(now, then) * run.brownian(now, then, x_t))


def dpm_solver_pp_sde(now: Level, then: Level, x_t: Tensor, eps: Tensor, run: Run) -> Tensor:
    """The SDE's step, with the x0 that is seen after the SDE's own half of it. [k-diffusion, sample_dpmpp_sde]

    u  = e^(-h) y + (1 - e^(-h)) x0 + up_m z_m               m: halfway in lambda
    y' = e^(-2h) y + (1 - e^(-2h)) x0(u) + up z              z_m, z: of one path
    """
    if then.std == 0:
        return run.x0_pred
    h, y = then.log_snr - now.log_snr, x_t / now.alpha
    middle = run.level_at(now.log_snr + h / 2)
    u = _towards(run.x0_pred, y, h) + _up(now, middle) * run.brownian(now, middle, x_t)
    seen = run.x0(middle.alpha * u, middle)
    return then.alpha * (_towards(seen, y, 2 * h) + _up(now, then) * run.brownian(now, then, x_t))


def dpm_solver_pp_2m_sde(now: Level, then: Level, x_t: Tensor, eps: Tensor, run: Run) -> tuple[Tensor, History]:
    """The SDE's step, with x0 carried on to its middle along the line through the last two.

    y' = e^(-2h) y + (1 - e^(-2h)) D + up z,   D as in `dpm_solver_pp_2m`    [k-diffusion, sample_dpmpp_2m_sde]

    History: the last x0_pred.
    """
    if then.std == 0:
        return run.x0_pred, (run.x0_pred,)
    h, y, D = then.log_snr - now.log_snr, x_t / now.alpha, run.x0_pred
    if run.history:
        h_1 = now.log_snr - run.before[0].log_snr
        D = D + h / (2 * h_1) * (D - run.history[0])
    return then.alpha * (_towards(D, y, 2 * h) + _up(now, then) * run.brownian(now, then, x_t)), (run.x0_pred,)


def dpm_solver_pp_3m_sde(now: Level, then: Level, x_t: Tensor, eps: Tensor, run: Run) -> tuple[Tensor, History]:
    """The SDE's step, with the parabola through the last three x0_pred, integrated.

    y'  = e^(-2h) y + w_0 x0 + w_1 d_1 + (w_2 + h_1 w_1) d_2 + up z              d_k as in `dpm_solver_pp_3m`
    w_k = int_0^h 2 e^(2 (l - h)) l^k dl:   w_0 = 1 - e^(-2h),   w_k = h^k - (k/2) w_(k-1)

    k-diffusion's sample_dpmpp_3m_sde weighs the curvature by half, see README.md.

    History: the last two x0_pred, newest first.
    """
    history = (run.x0_pred, *run.history)[:2]
    if then.std == 0:
        return run.x0_pred, history
    h, y = then.log_snr - now.log_snr, x_t / now.alpha
    w_1 = h + expm1(-2 * h) / 2
    drift = _towards(run.x0_pred, y, 2 * h) + newton_rest(run.x0_pred, w_1, h**2 - w_1, now, run)
    return then.alpha * (drift + _up(now, then) * run.brownian(now, then, x_t)), history


def _towards(x0: Tensor, y: Tensor, h: float) -> Tensor:
    """e^(-h) y + (1 - e^(-h)) x0."""
    return exp(-h) * y - expm1(-h) * x0


def _up(now: Level, then: Level) -> float:
    """Standard deviation of the noise that a step of the SDE adds to y."""
    return then.sigma * sqrt(-expm1(2 * (now.log_snr - then.log_snr)))


# ---- another SDE -------------------------------------------------------------------------------------


def er_sde(now: Level, then: Level, x_t: Tensor, eps: Tensor, run: Run) -> tuple[Tensor, History]:
    """ER-SDE-Solver-3: less noise than the SDE, by f(sigma) = sigma (e^(sigma^0.3) + 10).         [ER-SDE, algorithm 2]

    y' = r y + (1 - r) x0 + w_1 d_1 + w_2 d_2 + sqrt(sigma'^2 - r^2 sigma^2) z                  r = f(sigma') / f(sigma)
    w_k = int_sigma^sigma' (s - sigma)^(k-1) (1 - f(sigma') / f(s)) ds                  by Gauss and Legendre's rule
    d_1 = (x0 - x0_1) / (sigma - sigma_1),   d_2 = 2 (d_1 - d_1 before) / (sigma - sigma_2)

    History: the last two x0_pred, newest first.
    """
    history = (run.x0_pred, *run.history)[:2]
    if then.std == 0:
        return run.x0_pred, history
    r = float(_er_scale(then.sigma) / _er_scale(now.sigma))
    nodes, weights = np.polynomial.legendre.leggauss(32)
    s = now.sigma + (then.sigma - now.sigma) * (nodes + 1) / 2
    share = (then.sigma - now.sigma) / 2 * weights * (1 - _er_scale(then.sigma) / _er_scale(s))
    y = r * x_t / now.alpha + (1 - r) * run.x0_pred
    if run.history:
        sigma_1 = run.before[0].sigma
        d_1 = (run.x0_pred - run.history[0]) / (now.sigma - sigma_1)
        y = y + float(share.sum()) * d_1
        if len(run.history) > 1:
            sigma_2 = run.before[1].sigma
            earlier = (run.history[0] - run.history[1]) / (sigma_1 - sigma_2)
            y = y + float((share * (s - now.sigma)).sum()) * 2 * (d_1 - earlier) / (now.sigma - sigma_2)
    added = sqrt(max(then.sigma**2 - (r * now.sigma) ** 2, 0))
    return then.alpha * (y + added * run.brownian(now, then, x_t)), history


def _er_scale(sigma: float | np.ndarray) -> np.ndarray:
    return np.asarray(sigma * (np.exp(sigma**0.3) + 10))


# ---- leaps back to more noise ------------------------------------------------------------------------


def restart(now: Level, then: Level, x_t: Tensor, eps: Tensor, run: Run) -> Tensor:
    """Heun's method that once, at sigma 0.1, leaps back to sigma 2 and takes those steps again.  [Restart, algorithm 1]

    y_top = y_prev + sqrt(sigma_top^2 - sigma_prev^2) z        then Heun's steps over this run's levels again

    The noise wipes out errors that steps have added up. Where no level of the run lies between, it is Heun's method.
    """
    x_prev = heun(now, then, x_t, eps, run)
    if not then.sigma <= RESTART_FROM < now.sigma <= RESTART_TO:
        return x_prev
    again = [then, now, *(level for level in run.before if level.sigma <= RESTART_TO)][::-1]
    added = sqrt(again[0].sigma ** 2 - then.sigma**2) * run.noise_like(x_t)
    x = again[0].alpha * (x_prev / then.alpha + added)
    for here, there in pairwise(again):
        x = heun(here, there, x, run.eps(x, here), run)
    return x


def lcm(now: Level, then: Level, x_t: Tensor, eps: Tensor, run: Run) -> Tensor:
    """Consistency steps: straight to x_0, and back to less noise. For weights or LoRAs distilled so, in 2 to 8 steps.

    x_prev = alpha_prev x0_pred + std_prev z                                                          [LCM, algorithm 3]

    LCM's boundary weights are left out: c_skip is below 0.0025 and c_out above 0.9987 from t = 1 on.
    """
    return then.alpha * run.x0_pred + then.std * run.noise_like(x_t)
