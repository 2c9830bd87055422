"""UniPC: each evaluation first corrects the step that led to it, then predicts the next.

Paper: UniPC = Zhao et al. 2023, "A unified predictor-corrector framework for fast sampling", arXiv:2302.04867.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import expm1

from torch import Tensor

from ldm.samplers.step import EpsFn, History, Level, Noise, Step, noise_levels, predict
from ldm.schedule import Schedule


def unipc(
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
    """UniPC-2 that predicts x_0, with B(h) = e^h - 1. Order 3 for one evaluation a step.

    Letters as in `ldm.samplers.dpm_solver`: h is the stride in lambda of the step to come, h_1 that of the step before.

    correct   x_t^c = (sigma / sigma_1) x_1^c + alpha int        the parabola through x0_2, x0_1 and x0, integrated over
                                                                 the step that is over            [UniPC, UniC-2]
    predict   x'    = (sigma' / sigma) x_t^c + alpha' (1 - e^-h) (x0 + h / (2 h_1) (x0 - x0_1))   [UniPC, UniP-2]

    The prediction is DPM-Solver++(2M)'s. The network saw the predicted x_t; it is not asked again at the corrected
    one. So `Step.x_t` is a prediction, and the corrected latent is part of the history. The last step has no
    evaluation after it and stays uncorrected.

    After a swap the evaluation that corrects the last step of the old prompt is made in the new one's context; a run
    that begins anew there (history ()) leaves that step as it was predicted.

    Args:    history: the corrected latent before the last step, and the last two x0_pred, newest first.
             All else, what it returns and raises: see `ldm.samplers.Sampler`.
    """
    levels = noise_levels(eps_fn, x_T, schedule, steps, start, history, timesteps)
    x_t = x_T
    for index in range(start, steps):
        now, then = levels[index], levels[index + 1]
        eps, x0_pred = predict(eps_fn, x_t, now, index)
        corrected, D = x_t, x0_pred
        if history:
            x_1, x0_1, *older = history
            corrected = _correct(x_1, [x0_pred, x0_1, *older], levels[max(0, index - 2) : index + 1])
            if then.sigma > 0:
                h, h_1 = then.log_snr - now.log_snr, now.log_snr - levels[index - 1].log_snr
                D = x0_pred + h / (2 * h_1) * (x0_pred - x0_1)
        x_prev = then.sigma / now.sigma * corrected - then.alpha * expm1(now.log_snr - then.log_snr) * D
        history = (corrected, x0_pred, *history[1:2])
        yield Step(index, now.t, x_prev, x0_pred, eps, x_in=x_t, history=history)
        x_t = x_prev


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
    return end.sigma / begin.sigma * x_1 + end.alpha * integral
