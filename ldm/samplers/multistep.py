"""Methods that remember earlier steps: PLMS, iPNDM and LMS, DEIS, DPM-Solver++ (2M, 3M) and UniPC.

DPM-Solver solves exactly the part of the flow that is known exactly, and approximates only the network. With
h = lambda_prev - lambda > 0 a step from (alpha, std) to (alpha', std') is

    x' = (alpha' / alpha) x_t - alpha' int e^-l eps(l) dl        written with eps   [DPM-Solver, eq. 3.4]
    x' = (std' / std) x_t + std' int e^l x0_pred(l) dl           written with x0    [DPM-Solver++, eq. 8]

over lambda .. lambda_prev. A polynomial in place of eps or x0_pred gives a method; a constant gives DDIM in both.

Papers: PNDM = Liu et al. 2022, arXiv:2202.09778.  DPM-Solver = Lu et al. 2022, arXiv:2206.00927.
DPM-Solver++ = Lu et al. 2022, arXiv:2211.01095.  UniPC = Zhao et al. 2023, arXiv:2302.04867.
DEIS = Zhang and Chen 2022, arXiv:2204.13902, where iPNDM is too.
LMS is Crowson's, k-diffusion.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import expm1

import numpy as np
from torch import Tensor

from ldm.samplers.driver import History, Level, Run


def plms(now: Level, then: Level, x_t: Tensor, eps: Tensor, run: Run) -> tuple[Tensor, History]:
    """DDIM's step, taken along a mean of the last four eps: what Stable Diffusion was published with. Order 2.

    eps'   = (55 e_0 - 59 e_1 + 37 e_2 - 9 e_3) / 24      e_k: the eps of k steps ago        [PNDM, eq. 12]
    x_prev = transfer(x_t, eps')                                                             [PNDM, eq. 11]

    The means are Adams and Bashforth's, of order 4 for evenly spaced values; the transfer of a mean makes it order 2
    [PNDM, property 3.2]. With a shorter past: (23, -16, 5) / 12 and (3, -1) / 2. With none, half of eps here and half
    of eps at the step's end, a second evaluation that is not kept, as CompVis has it.

    History: the last three eps, newest first.
    """
    match run.history:
        case ():
            mean = eps
            if then.std > 0:
                mean = (eps + run.eps(_transfer(now, then, x_t, eps), then)) / 2
        case (e_1,):
            mean = (3 * eps - e_1) / 2
        case (e_1, e_2):
            mean = (23 * eps - 16 * e_1 + 5 * e_2) / 12
        case (e_1, e_2, e_3, *_):
            mean = (55 * eps - 59 * e_1 + 37 * e_2 - 9 * e_3) / 24
    return _transfer(now, then, x_t, mean), (eps, *run.history)[:3]


def ipndm(now: Level, then: Level, x_t: Tensor, eps: Tensor, run: Run) -> tuple[Tensor, History]:
    """PLMS whose first steps make do with the eps that they have: one evaluation in each. Order 2. [DEIS, iPNDM]

    eps' = e_0;   (3 e_0 - e_1) / 2;   (23 e_0 - 16 e_1 + 5 e_2) / 12;   then as in `plms`

    History: the last three eps, newest first.
    """
    return plms(now, then, x_t, eps, run) if run.history else (_transfer(now, then, x_t, eps), (eps,))


def _transfer(now: Level, then: Level, x_t: Tensor, eps: Tensor) -> Tensor:
    """DDIM's step along any eps."""
    return then.alpha * ((x_t - now.std * eps) / now.alpha) + then.std * eps


def lms(now: Level, then: Level, x_t: Tensor, eps: Tensor, run: Run) -> tuple[Tensor, History]:
    """Linear multistep: the cubic through the last four slopes, integrated over the step. Order 4.

    y_prev = y + sum_k w_k e_k,   w_k = integral from sigma to sigma_prev of the k-th Lagrange polynomial

    Adams and Bashforth's method for uneven strides. Its first steps know fewer slopes; where their error is not small
    it is what remains, of order 2.

    History: the last three eps, newest first.
    """
    slopes = (eps, *run.history)
    known_at = [level.sigma for level in (now, *run.before)[: len(slopes)]]
    weights = _adams_weights(known_at, now.sigma, then.sigma)
    x_prev = then.alpha * (x_t / now.alpha + sum(w * e for w, e in zip(weights, slopes, strict=True)))
    return x_prev, slopes[:3]


def _adams_weights(known_at: Sequence[float], begin: float, end: float) -> list[float]:
    """Weights with which values at some places give the integral from begin to end of the polynomial through them.

    They are those that integrate 1, x, x^2 ... exactly, x counted from `begin`.
    """
    scale = max(abs(end - begin), abs(known_at[-1] - begin))
    x, stride = (np.array(known_at) - begin) / scale, (end - begin) / scale
    powers = np.arange(len(x))
    integrals = stride ** (powers + 1) / (powers + 1)
    return (scale * np.linalg.solve(x ** powers[:, None], integrals)).tolist()


def deis(now: Level, then: Level, x_t: Tensor, eps: Tensor, run: Run) -> tuple[Tensor, History]:
    """DEIS, tAB2 in log sigma: the parabola in lambda through the last three eps, integrated. Order 3.

    x' = (alpha' / alpha) x_t - std' (w_0 e_0 + w_1 d_1 + (w_2 + h_1 w_1) d_2)   d_k as in `dpm_solver_pp_3m`, of eps
    w_k = int_0^h e^(h - l) l^k dl:   w_0 = e^h - 1,   w_k = k w_(k-1) - h^k                    [DEIS, proposition 3]

    What DPM-Solver is to DPM-Solver++(3M). Its first steps know less; what remains of their error is of order 2.
    Without noise at its end (h infinite) a step is DDIM's.

    History: the last two eps, newest first.
    """
    if then.std == 0:
        return run.x0_pred, (eps, *run.history)[:2]
    h = then.log_snr - now.log_snr
    w_0 = expm1(h)
    w_1 = w_0 - h
    integral = w_0 * eps + newton_rest(eps, w_1, 2 * w_1 - h**2, now, run)
    return then.alpha / now.alpha * x_t - then.std * integral, (eps, *run.history)[:2]


def newton_rest(value: Tensor, w_1: float, w_2: float, now: Level, run: Run) -> Tensor | float:
    """What slope and curvature add to an integral over lambda, of Newton's parabola through a value and the history.

    w_1 d_1 + (w_2 + h_1 w_1) d_2, with divided differences d; w_k is the integral of l^k under the method's weight.
    """
    if not run.history:
        return 0.0
    h_1 = now.log_snr - run.before[0].log_snr
    d_1 = (value - run.history[0]) / h_1
    if len(run.history) == 1:
        return w_1 * d_1
    h_2 = run.before[0].log_snr - run.before[1].log_snr
    d_2 = (d_1 - (run.history[0] - run.history[1]) / h_2) / (h_1 + h_2)
    return w_1 * d_1 + (w_2 + h_1 * w_1) * d_2


def dpm_solver_pp_2m(now: Level, then: Level, x_t: Tensor, eps: Tensor, run: Run) -> tuple[Tensor, History]:
    """DPM-Solver++(2M): x0_pred carried on to the middle of the step along the line through the last two. Order 2.

    D  = x0 + h / (2 h_1) (x0 - x0_1)                       h_1, x0_1: of the step before
    x' = (std' / std) x_t + alpha' (1 - e^-h) D                                         [DPM-Solver++, algorithm 2]

    The first step is DDIM's, and so is one without noise at its end (h infinite).

    History: the last x0_pred.
    """
    h = then.log_snr - now.log_snr
    D = run.x0_pred
    if run.history and then.std > 0:
        h_1 = now.log_snr - run.before[0].log_snr
        D = run.x0_pred + h / (2 * h_1) * (run.x0_pred - run.history[0])
    return then.std / now.std * x_t - then.alpha * expm1(-h) * D, (run.x0_pred,)


def dpm_solver_pp_3m(now: Level, then: Level, x_t: Tensor, eps: Tensor, run: Run) -> tuple[Tensor, History]:
    """DPM-Solver++ with the parabola through the last three x0_pred. Order 3.

    d_1 = (x0 - x0_1) / h_1,   d_2 = (d_1 - (x0_1 - x0_2) / h_2) / (h_1 + h_2)         (divided differences)
    x'  = (std' / std) x_t + alpha' (w_0 x0 + w_1 d_1 + (w_2 + h_1 w_1) d_2)
    w_k = int_0^h e^(l - h) l^k dl:   w_0 = 1 - e^-h,   w_1 = h - w_0,   w_2 = h^2 - 2 w_1

    The parabola is integrated exactly: its second derivative is 2 d_2. With d_2 in its place, an easy mistake, the
    method would be of order 2.

    The first two steps are those of DDIM and of the line through two; where their error is not small it is what
    remains, of order 2. Without noise at its end (h infinite) a step is DDIM's.

    History: the last two x0_pred, newest first.
    """
    h = then.log_snr - now.log_snr
    w_0 = -expm1(-h)
    integral = w_0 * run.x0_pred
    if then.std > 0:
        w_1 = h - w_0
        integral = integral + newton_rest(run.x0_pred, w_1, h**2 - 2 * w_1, now, run)
    return then.std / now.std * x_t + then.alpha * integral, (run.x0_pred, *run.history)[:2]


def unipc(now: Level, then: Level, x_t: Tensor, eps: Tensor, run: Run) -> tuple[Tensor, History]:
    """UniPC-2 that predicts x_0, with B(h) = e^h - 1. Order 3 for one evaluation a step.

    Each evaluation first corrects the step that led to it, then predicts the next.

    correct   x_t^c = (std / std_1) x_1^c + alpha int            the parabola through x0_2, x0_1 and x0, integrated over
                                                                 the step that is over            [UniPC, UniC-2]
    predict   x'    = (std' / std) x_t^c + alpha' (1 - e^-h) (x0 + h / (2 h_1) (x0 - x0_1))       [UniPC, UniP-2]

    The prediction is DPM-Solver++(2M)'s. The network saw the predicted x_t and is not asked again at the corrected one,
    so `Step.x_prev` is a prediction. The last step has no evaluation after it and stays uncorrected.

    After a swap the evaluation that corrects the last step of the old prompt is made in the new one's context; a run
    that begins anew there (history ()) leaves that step as it was predicted.

    History: the corrected latent before the last step, and the last two x0_pred, newest first.
    """
    corrected, D = x_t, run.x0_pred
    if run.history:
        x_1, x0_1, *older = run.history
        corrected = _correct(x_1, [run.x0_pred, x0_1, *older], [*reversed(run.before[:2]), now])
        if then.std > 0:
            h, h_1 = then.log_snr - now.log_snr, now.log_snr - run.before[0].log_snr
            D = run.x0_pred + h / (2 * h_1) * (run.x0_pred - x0_1)
    x_prev = then.std / now.std * corrected - then.alpha * expm1(now.log_snr - then.log_snr) * D
    return x_prev, (corrected, run.x0_pred, *run.history[1:2])


def _correct(x_1: Tensor, x0s: Sequence[Tensor], levels: Sequence[Level]) -> Tensor:
    """The last step again, now that x0_pred at its end is known.

    int_0^h e^(l - h) x0(l) dl with Newton's parabola x0(l) = x0_1 + d_1 l + d_2 l (l - h), h here that of the last
    step; w_k as in `dpm_solver_pp_3m`. Without x0_2 it is the mean of both ends   [UniC-1].

    Args:    x_1: corrected, before the step.  x0s: x0 at its end, x0_1 at its begin, x0_2 before, if known.
             levels: (before,) begin, end.
    """
    begin, end = levels[-2], levels[-1]
    h = end.log_snr - begin.log_snr
    w_0 = -expm1(-h)
    w_1 = h - w_0
    w_2 = h**2 - 2 * w_1
    x0, x0_1, *older = x0s
    if older:
        h_2 = begin.log_snr - levels[-3].log_snr
        d_1 = (x0 - x0_1) / h
        d_2 = (d_1 - (x0_1 - older[0]) / h_2) / (h + h_2)
        integral = w_0 * x0_1 + w_1 * d_1 + (w_2 - h * w_1) * d_2
    else:
        integral = w_0 * (x0_1 + x0) / 2
    return end.std / begin.std * x_1 + end.alpha * integral
