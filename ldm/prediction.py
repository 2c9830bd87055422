"""What a network predicts, and the eps and x_0 that it implies.

    x_t = alpha x_0 + std eps,   v = alpha eps - std x_0     alpha = sqrt(alphas_cumprod[t]), alpha^2 + std^2 = 1

    eps network:  x_0 = (x_t - std eps) / alpha
    v network:    x_0 = alpha x_t - std v,   eps = alpha v + std x_t    [Salimans and Ho 2022, appendix D]
    x_0 network:  eps = (x_t - alpha x_0) / std

SD1.5 predicts eps. Fine-tunes for v exist because eps says nothing of x_0 where x_t is pure noise (alpha = 0), which v
does; the samplers are given both there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from ldm.config import Prediction
from ldm.schedule import Schedule


class GuidedNetwork(Protocol):
    """output = guided(x_t, t, step), for a number of steps; rows: evaluated so far."""

    steps: int
    rows: int
    guidance_scale: float

    def __call__(self, x_t: Tensor, t: float, step: int) -> Tensor: ...

    def with_uncond(self, x_t: Tensor, t: float, step: int) -> tuple[Tensor, Tensor]: ...

    def row(self, i: int) -> Callable[[Tensor, float, int], Tensor]: ...


def implied(prediction: Prediction, output: Tensor, x_t: Tensor, alphas_cumprod: float) -> tuple[Tensor, Tensor]:
    """(eps, x0_pred) of a network's output at a noise level; ValueError where it says nothing of one of them."""
    alpha, std = math.sqrt(alphas_cumprod), math.sqrt(1 - alphas_cumprod)
    if prediction == "v":
        return alpha * output + std * x_t, alpha * x_t - std * output
    if prediction == "x0" and std:
        return (x_t - alpha * output) / std, output
    if prediction == "eps" and alpha:
        return output, (x_t - std * output) / alpha
    raise ValueError(
        f"prediction: {prediction} says nothing at alphas_cumprod {alphas_cumprod:g}; expected v there, or a spacing "
        "that leaves that level out (leading)"
    )


class Predicted:
    """An eps_fn for samplers, of a guided network that predicts something else."""

    # Guidance is the same for each: all three are linear in each other at one x_t, t, and its weights add up to 1.

    def __init__(self, guided: GuidedNetwork, prediction: Prediction, schedule: Schedule) -> None:
        self.guided = guided
        self.prediction = prediction
        self.schedule = schedule
        self.steps = guided.steps
        self.guidance_scale = guided.guidance_scale

    @property
    def rows(self) -> int:
        """U-Net rows evaluated so far."""
        return self.guided.rows

    def __call__(self, x_t: Tensor, t: float, step: int) -> Tensor:
        """eps, see `ldm.samplers.EpsFn`."""
        return self.eps_and_x0(x_t, t, step)[0]

    def eps_and_x0(self, x_t: Tensor, t: float, step: int) -> tuple[Tensor, Tensor]:
        """Both, from one evaluation: exact also where x_t is pure noise."""
        return self._implied(self.guided(x_t, t, step), x_t, t)

    def with_uncond(self, x_t: Tensor, t: float, step: int) -> tuple[Tensor, Tensor]:
        """eps, and the unconditional one."""
        output, uncond = self.guided.with_uncond(x_t, t, step)
        return self._implied(output, x_t, t)[0], self._implied(uncond, x_t, t)[0]

    def row(self, i: int) -> Callable[[Tensor, float, int], Tensor]:
        """The eps_fn of one latent of the batch."""
        guided = self.guided.row(i)
        return lambda x_t, t, step: self._implied(guided(x_t, t, step), x_t, t)[0]

    def _implied(self, output: Tensor, x_t: Tensor, t: float) -> tuple[Tensor, Tensor]:
        return implied(self.prediction, output, x_t, self.schedule.alphas_cumprod_at(t))
