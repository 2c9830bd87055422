"""What every sampler takes and yields, and what all of them begin with.

Two ways to write a noised latent are in use. Here a latent is always variance preserving:

    x_t = alpha x_0 + sigma eps,  alpha = sqrt(alphas_cumprod),  sigma = sqrt(1 - alphas_cumprod)

EDM and k-diffusion divide by alpha: x_t / alpha = x_0 + kappa eps with kappa = sigma / alpha, which is what they call
sigma. Samplers that are published in that form divide on the way in and multiply on the way out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from torch import Tensor

from ldm.schedule import Schedule, leading

EpsFn = Callable[[Tensor, float, int], Tensor]
"""eps = eps_fn(x_t, t, step): x_t and eps (B, 4, H/8, W/8); t the training timestep, an int where it is whole; step
counted from noise.

An eps_fn that was made for a number of steps says so in an attribute `steps`; samplers of another number refuse it.
One with a method `ddim_step` may do a whole step of DDIM at once: see `ldm.guidance.GuidedEps`.
"""

Noise = Callable[[int], Tensor]
"""noise(step) -> standard normal like x_t: the same tensor whenever the same step is asked for."""

History = tuple[Tensor, ...]
"""What a multistep sampler remembers of earlier steps, each like x_t; () for none."""


@dataclass(frozen=True, eq=False)
class Step:
    """One step of a sampler, from the latent that it met to the latent that it left.

    x_in, eps and x0_pred belong together: x_in = sqrt(a_t) x0_pred + sqrt(1 - a_t) eps.
    `x_t` is where the step arrives (the DDIM paper's x_{t-1}): the x_in of the next Step; in the last, the result.
    With `history` it is all that the rest of the run depends on: `start=index + 1` goes on from there.
    """

    index: int  # 0 .. S-1, counted from noise
    t: float  # training timestep, 999 .. 0
    x_t: Tensor  # (B, 4, H/8, W/8) the latents AFTER this step
    x0_pred: Tensor  # (B, 4, H/8, W/8) the clean latents that eps implies
    eps: Tensor  # (B, 4, H/8, W/8) the predicted noise, guidance included
    x_in: Tensor  # (B, 4, H/8, W/8) the latents BEFORE this step, as the network saw them at time t
    history: History = ()  # what the next step may look back at
    evaluations: int = 1  # of the network, in this step


class Sampler(Protocol):
    """The signature that all samplers share.

    Args:    eps_fn: see `EpsFn`. Every evaluation of a step, also one at another noise level, asks for the context
             of that step: an embedding schedule counts steps, not evaluations.
             x_T: (B, 4, H/8, W/8) standard normal; with `start`, the latents before that step.
             steps: S.  start: index of the first step to run; a branch that resumes from a shared prefix gives the
             number of steps already taken; `start=S` yields nothing.
             history: with `start`, that of the Step before, so that the run goes on as if it had never stopped;
             () begins anew. One-step samplers have none.
             noise: z for each step; deterministic samplers leave it alone.
             timesteps: visit these instead of `leading(steps)`; S falling values, see `ldm.schedule`.
    Returns: an iterator of S - start steps; shapes, dtype and device of x_T.
    Raises:  ValueError: an argument out of range, eps_fn made for another number of steps, or eps of another shape
             than x_t. As with every generator, on the first `next`; always before the first evaluation, bar eps's
             shape.
    """

    def __call__(
        self,
        eps_fn: EpsFn,
        x_T: Tensor,
        schedule: Schedule,
        steps: int = 50,
        *,
        start: int = 0,
        history: History = (),
        noise: Noise | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> Iterator[Step]: ...


@dataclass(frozen=True)
class Level:
    """A noise level. All numbers are float64, and rounded once, when they meet a latent."""

    t: float  # the timestep at which the network is asked; an int where it is whole
    alphas_cumprod: float

    @property
    def alpha(self) -> float:
        """How much of x_0 a latent holds."""
        return math.sqrt(self.alphas_cumprod)

    @property
    def sigma(self) -> float:
        """How much noise a latent holds."""
        return math.sqrt(1 - self.alphas_cumprod)

    @property
    def kappa(self) -> float:
        """sigma / alpha: the noise beside an x_0 of full size. EDM's and k-diffusion's sigma."""
        return self.sigma / self.alpha

    @property
    def log_snr(self) -> float:
        """lambda = log(alpha / sigma), half the log signal-to-noise ratio; infinite without noise."""
        return -math.log(self.kappa) if self.sigma else math.inf


def noise_levels(
    eps_fn: EpsFn,
    x_T: Tensor,
    schedule: Schedule,
    steps: int,
    start: int = 0,
    history: History = (),
    timesteps: Sequence[float] | None = None,
) -> list[Level]:
    """The S + 1 noise levels of a run: one for every timestep, and the one it ends at. See `Sampler`."""
    ts = leading(steps, train_steps=len(schedule)) if timesteps is None else tuple(map(_whole, timesteps))
    if len(ts) != steps or any(later >= t for t, later in pairwise(ts)) or not 0 <= ts[-1] <= ts[0] < len(schedule):
        raise ValueError(f"timesteps: expected {steps} falling values in 0..{len(schedule) - 1}, got {ts}")
    if (expected := getattr(eps_fn, "steps", steps)) != steps:
        raise ValueError(f"steps: got {steps}, expected {expected}, as many as eps_fn has contexts for")
    if not 0 <= start <= steps:
        raise ValueError(f"start: expected 0..{steps}, the number of steps already taken, got {start}")
    if any(past.shape != x_T.shape for past in history):
        shapes = [tuple(past.shape) for past in history]
        raise ValueError(f"history: expected latents like x_T, {tuple(x_T.shape)}, got {shapes}")
    if history and not start:
        raise ValueError(f"history: expected () at the first step, got {len(history)} entries")
    visited = [Level(t, schedule.alphas_cumprod_at(t)) for t in ts]
    return [*visited, final_level(schedule)]


def final_level(schedule: Schedule) -> Level:
    """Where runs end: at t = 0 in SD1's own schedule."""
    end = schedule.final_alpha_cumprod
    t = schedule.timestep_at(0.5 * math.log(end / (1 - end))) if end < 1 else 0
    return Level(_whole(round(t, 9)), end)


def level_at(schedule: Schedule, log_snr: float) -> Level:
    """The noise level of some lambda."""
    return Level(_whole(schedule.timestep_at(log_snr)), 1 / (1 + math.exp(-2 * log_snr)))


def predict(eps_fn: EpsFn, x_t: Tensor, level: Level, step: int) -> tuple[Tensor, Tensor]:
    """One evaluation: eps, and the clean latents that it implies, both in x_t's dtype.

    x0_pred = (x_t - sigma eps) / alpha                                                      [DDIM, eq. 9]

    It is not clipped: latents have no natural range.

    Raises:  ValueError: eps of another shape than x_t, which would broadcast.
    """
    eps = eps_fn(x_t, level.t, step).to(x_t.dtype)
    if eps.shape != x_t.shape:
        raise ValueError(f"eps_fn: expected eps like x_t, {tuple(x_t.shape)}, got {tuple(eps.shape)}")
    return eps, (x_t - level.sigma * eps) / level.alpha


def _whole(t: float) -> float:
    return int(t) if t == int(t) else float(t)
