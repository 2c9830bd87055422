"""PLMS, the pseudo linear multistep method: the sampler that Stable Diffusion was published with.

Paper: PNDM = Liu et al. 2022, "Pseudo numerical methods for diffusion models on manifolds", arXiv:2202.09778.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from ldm.samplers.step import EpsFn, History, Level, Noise, Step, noise_levels, predict
from ldm.schedule import Schedule


def plms(
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
    """DDIM's step, taken along a mean of the last four eps. Order 2.

    eps'   = (55 e_0 - 59 e_1 + 37 e_2 - 9 e_3) / 24      e_k: the eps of k steps ago        [PNDM, eq. 12]
    x_prev = transfer(x_t, eps')                                                             [PNDM, eq. 11]

    The means are Adams and Bashforth's, of order 4 for evenly spaced values; the transfer of a mean makes it order 2
    [PNDM, property 3.2]. With a shorter past: (23, -16, 5) / 12 and (3, -1) / 2. With none, the improved Euler
    step: half of eps here and half of eps at the step's end, which is a second evaluation in this step's context (and
    is not kept), as CompVis has it. PNDM's own beginning takes twelve evaluations for three steps; diffusers spreads
    the second one over a timestep of its own, whereby contexts slip by one against the steps.

    Args:    history: the last three eps, newest first.  timesteps: evenly spaced, up to rounding.
             All else, what it returns and raises: see `ldm.samplers.Sampler`.
    """
    levels = noise_levels(eps_fn, x_T, schedule, steps, start, history, timesteps)
    strides = [now.t - then.t for now, then in pairwise(levels[:-1])]
    if strides and max(strides) - min(strides) > 1:
        raise ValueError(
            f"timesteps: plms expects evenly spaced ones (leading, trailing, linspace), got strides of "
            f"{min(strides):.4g} to {max(strides):.4g}"
        )
    x_t = x_T
    for index in range(start, steps):
        now, then = levels[index], levels[index + 1]
        eps, x0_pred = predict(eps_fn, x_t, now, index)
        evaluations = 1
        match history:
            case ():
                mean = eps
                if then.sigma > 0:
                    eps_then, _ = predict(eps_fn, _transfer(x_t, eps, now, then), then, index)
                    mean, evaluations = (eps + eps_then) / 2, 2
            case (e_1,):
                mean = (3 * eps - e_1) / 2
            case (e_1, e_2):
                mean = (23 * eps - 16 * e_1 + 5 * e_2) / 12
            case (e_1, e_2, e_3, *_):
                mean = (55 * eps - 59 * e_1 + 37 * e_2 - 9 * e_3) / 24
        x_prev = _transfer(x_t, mean, now, then)
        history = (eps, *history)[:3]
        yield Step(index, now.t, x_prev, x0_pred, eps, x_in=x_t, history=history, evaluations=evaluations)
        x_t = x_prev


def _transfer(x_t: Tensor, eps: Tensor, now: Level, then: Level) -> Tensor:
    """DDIM's step along any eps."""
    return then.alpha * ((x_t - now.sigma * eps) / now.alpha) + then.sigma * eps
