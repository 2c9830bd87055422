"""Methods that remember nothing: DDIM (also with CFG++) and DDPM, Euler and Heun, DPM-Solver, ancestral Euler.

The probability flow in EDM's coordinates, which Euler's and Heun's methods follow:

    d(x / alpha) / dsigma = eps(x, t)                                                        [EDM, section 2]

Papers: DDIM = Song et al. 2020, arXiv:2010.02502 (its alpha_t is our alphas_cumprod[t]).
DDPM = Ho et al. 2020, arXiv:2006.11239.  EDM = Karras et al. 2022, arXiv:2206.00364.
DPM-Solver = Lu et al. 2022, arXiv:2206.00927.  CFG++ = Chung et al. 2024, arXiv:2406.08070.
Ancestral Euler is Crowson's, k-diffusion.
"""

from __future__ import annotations

from math import expm1, sqrt

from torch import Tensor

from ldm.samplers.driver import Level, Run


def ddim(now: Level, then: Level, x_t: Tensor, eps: Tensor, run: Run) -> Tensor:
    """Denoising diffusion implicit models: deterministic at eta 0, like DDPM at eta 1. Order 1.

    x0_pred = (x_t - sqrt(1 - a_t) eps) / sqrt(a_t)                                          [DDIM, eq. 9]
    s       = eta sqrt((1 - a_prev) / (1 - a_t)) sqrt(1 - a_t / a_prev)                      [DDIM, eq. 16]
    x_prev  = sqrt(a_prev) x0_pred + sqrt(1 - a_prev - s^2) eps + s z                        [DDIM, eq. 12]
    """
    a_t, a_prev = now.alphas_cumprod, then.alphas_cumprod
    s = run.eta * sqrt((1 - a_prev) / (1 - a_t)) * sqrt(1 - a_t / a_prev)
    x_prev = sqrt(a_prev) * run.x0_pred + sqrt(1 - a_prev - s**2) * eps
    return x_prev + s * run.noise_like(x_t) if s > 0 else x_prev


def ddim_cfgpp(now: Level, then: Level, x_t: Tensor, eps: Tensor, run: Run) -> Tensor:
    """DDIM whose x_0 is guided, but not the noise that it goes back to. Order 1.           [CFG++, algorithm 2]

    x_prev = sqrt(a_prev) x0_pred + sqrt(1 - a_prev) eps_uncond,   eps = eps_uncond + g (eps_cond - eps_uncond), g < 1

    At g = 1, which is no guidance here, it is DDIM. `ldm.traversal.inversion.cfgpp_inversion` goes the way back.
    """
    return then.alpha * run.x0_pred + then.std * run.eps_uncond


def ddpm(now: Level, then: Level, x_t: Tensor, eps: Tensor, run: Run) -> Tensor:
    """Ancestral sampling: draw x_prev from the posterior given x_t and x0_pred. What DDIM does at eta 1.

    beta   = 1 - a_t / a_prev
    x_prev = (sqrt(a_prev) beta x0_pred + sqrt(a_t / a_prev) (1 - a_prev) x_t) / (1 - a_t) + sqrt(beta') z
    beta'  = beta (1 - a_prev) / (1 - a_t)                                                   [DDPM, eq. 7]

    The smaller of DDPM's two variances. Random, so it has no order: with more steps it draws from the distribution
    more closely, and finds another image of it.
    """
    a_t, a_prev = now.alphas_cumprod, then.alphas_cumprod
    beta = 1 - a_t / a_prev
    mean = (sqrt(a_prev) * beta * run.x0_pred + sqrt(a_t / a_prev) * (1 - a_prev) * x_t) / (1 - a_t)
    return mean + sqrt(beta * (1 - a_prev) / (1 - a_t)) * run.noise_like(x_t)


def euler(now: Level, then: Level, x_t: Tensor, eps: Tensor, run: Run) -> Tensor:
    """One slope a step. Order 1. The very same step as DDIM's, in other letters.

    y_prev = y + (sigma_prev - sigma) eps,   y = x_t / alpha
    """
    return then.alpha * (x_t / now.alpha + (then.sigma - now.sigma) * eps)


def heun(now: Level, then: Level, x_t: Tensor, eps: Tensor, run: Run) -> Tensor:
    """Euler's step to a guess, the slope there, and the step again with the mean of both slopes. Order 2.

    y'     = y + (sigma_prev - sigma) eps
    y_prev = y + (sigma_prev - sigma) (eps + eps') / 2,  eps' = eps(alpha_prev y', t_prev)   [EDM, algorithm 1]

    Without noise at its end (sigma_prev = 0) a step is Euler's.
    """
    guess = euler(now, then, x_t, eps, run)
    if then.std == 0:
        return guess
    return euler(now, then, x_t, (eps + run.eps(guess, then)) / 2, run)


def dpm_solver_2s(now: Level, then: Level, x_t: Tensor, eps: Tensor, run: Run) -> Tensor:
    """DPM-Solver-2, a midpoint method in lambda; h is the step's stride in it. Order 2.

    u  = (alpha_m / alpha) x_t - std_m (e^(h/2) - 1) eps            m: halfway in lambda
    x' = (alpha' / alpha) x_t - std' (e^h - 1) eps(u, t_m)                              [DPM-Solver, algorithm 1]

    The second evaluation is made between two of the run's timesteps. Without noise at its end (h infinite) a step is
    DDIM's.
    """
    if then.std == 0:
        return run.x0_pred
    h = then.log_snr - now.log_snr
    middle = run.level_at(now.log_snr + h / 2)
    u = middle.alpha / now.alpha * x_t - middle.std * expm1(h / 2) * eps
    return then.alpha / now.alpha * x_t - then.std * expm1(h) * run.eps(u, middle)


def dpm_solver_3s(now: Level, then: Level, x_t: Tensor, eps: Tensor, run: Run) -> Tensor:
    """DPM-Solver-3: eps at a third and at two thirds of the step in lambda, of stride h. Order 3.

    u_1 = (alpha_1 / alpha) x_t - std_1 (e^(h/3) - 1) eps,   d_1 = eps(u_1, t_1) - eps         [DPM-Solver, algorithm 2]
    u_2 = (alpha_2 / alpha) x_t - std_2 ((e^(2h/3) - 1) eps + 2 ((e^(2h/3) - 1) / (2h/3) - 1) d_1)
    x'  = (alpha' / alpha) x_t - std' ((e^h - 1) eps + 3/2 ((e^h - 1) / h - 1) (eps(u_2, t_2) - eps))

    Without noise at its end (h infinite) a step is DDIM's.
    """
    return run.x0_pred if then.std == 0 else embedded_pair(now, then, x_t, eps, run)[1]


def embedded_pair(now: Level, then: Level, x_t: Tensor, eps: Tensor, run: Run) -> tuple[Tensor, Tensor]:
    """x' of order 2, from the first two evaluations, and that of `dpm_solver_3s`.          [DPM-Solver, appendix C]"""
    h = then.log_snr - now.log_snr
    first, second = (run.level_at(now.log_snr + share * h) for share in (1 / 3, 2 / 3))
    u = first.alpha / now.alpha * x_t - first.std * expm1(h / 3) * eps
    d_1 = run.eps(u, first) - eps
    u = second.alpha / now.alpha * x_t - second.std * (expm1(2 * h / 3) * eps + 2 * _beyond(2 * h / 3) * d_1)
    d_2 = run.eps(u, second) - eps
    straight = then.alpha / now.alpha * x_t - then.std * expm1(h) * eps
    return straight - then.std * 1.5 * expm1(h) * d_1, straight - then.std * 1.5 * _beyond(h) * d_2


def _beyond(h: float) -> float:
    """(e^h - 1) / h - 1."""
    return expm1(h) / h - 1 if h else 0.0


def euler_ancestral(now: Level, then: Level, x_t: Tensor, eps: Tensor, run: Run) -> Tensor:
    """Euler's step to less noise than is wanted, and fresh noise for the rest. Random, so it has no order.

    up^2   = sigma_prev^2 (sigma^2 - sigma_prev^2) / sigma^2
    down^2 = sigma_prev^2 - up^2
    y_prev = y + (down - sigma) eps + up z                                [k-diffusion, sample_euler_ancestral]

    As DDPM's posterior, in EDM's coordinates.
    """
    up = then.sigma * sqrt(now.sigma**2 - then.sigma**2) / now.sigma
    down = sqrt(then.sigma**2 - up**2)
    return then.alpha * (x_t / now.alpha + (down - now.sigma) * eps + up * run.noise_like(x_t))
