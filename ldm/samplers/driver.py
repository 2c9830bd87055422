"""What every sampler takes and yields, and the one loop that runs them all.

A latent here is always variance preserving. EDM and k-diffusion divide it by alpha, and so does their sigma:

    x_t = alpha x_0 + std eps,       alpha = sqrt(alphas_cumprod),  std = sqrt(1 - alphas_cumprod)
    x_t / alpha = x_0 + sigma eps,   sigma = std / alpha

A method is one function, from a latent at one noise level to the latent at the next:

    def my_step(now, then, x_t, eps, run):            # EDM's Euler step, as an example
        return then.alpha * (x_t / now.alpha + (then.sigma - now.sigma) * eps)

    my_sampler = Sampler("my_sampler", my_step, order=1)

It returns x_prev; one that remembers returns (x_prev, history). What else it may ask for is in `Run`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

from torch import Tensor

from ldm.schedule import Schedule, leading, told_at

EpsFn = Callable[[Tensor, float, int], Tensor]
"""eps = eps_fn(x_t, t, step): x_t and eps (B, 4, H/8, W/8); t the training timestep, an int where it is whole; step
counted from noise. One that was made for a number of steps says so in an attribute `steps`; other numbers are refused.
Where it is guided, `with_uncond` gives eps and the unconditional one; where rows differ, `row(i)` is that of one row.
"""


class Noise(Protocol):
    """Standard normal like x_t: the same tensor whenever the same draw of the same step is asked for."""

    def __call__(self, step: int, /, draw: int = 0) -> Tensor: ...


History = tuple[Tensor, ...]
"""What a multistep sampler remembers of earlier steps, each like x_t; () for none."""


@dataclass(frozen=True, eq=False)
class Step:
    """One step of a sampler: x_t = sqrt(a_t) x0_pred + sqrt(1 - a_t) eps is what it met, x_prev what it left.

    x_prev is the x_t of the next Step; in the last, the result. With `history` it is all that the rest of the run
    depends on: `start=index + 1` goes on from there.
    """

    index: int  # 0 .. S-1, counted from noise
    t: float  # training timestep, 999 .. 0
    x_t: Tensor  # (B, 4, H/8, W/8) the latents as the network saw them at time t
    eps: Tensor  # (B, 4, H/8, W/8) the predicted noise, guidance included
    x0_pred: Tensor  # (B, 4, H/8, W/8) the clean latents that eps implies
    x_prev: Tensor  # (B, 4, H/8, W/8) the latents after this step
    history: History = ()  # what the next step may look back at
    evaluations: float = 1  # of the network, in this step; the mean over the batch where rows differ


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
    def std(self) -> float:
        """How much noise a latent holds."""
        return math.sqrt(1 - self.alphas_cumprod)

    @property
    def sigma(self) -> float:
        """The noise beside an x_0 of full size, as EDM and k-diffusion count it."""
        return self.std / self.alpha

    @property
    def log_snr(self) -> float:
        """lambda = log(alpha / std), half the log signal-to-noise ratio; infinite without noise."""
        return -math.log(self.sigma) if self.std else math.inf


@dataclass(eq=False)
class Run:
    """What a step function may ask for, beside its two noise levels, x_t and eps."""

    eps_fn: EpsFn
    schedule: Schedule
    index: int  # of this step
    before: Sequence[Level]  # of the steps taken, newest first
    history: History  # what the step before remembered
    eta: float  # how random, see `Sampler.eta`
    noise: Noise | None
    x0_pred: Tensor  # (x_t - std eps) / alpha, not clipped: latents have no natural range     [DDIM, eq. 9]
    eps_uncond: Tensor  # eps itself, unless the sampler says uncond and eps_fn is guided
    evaluations: float = 1
    draws: int = 0

    def eps(self, x: Tensor, level: Level) -> Tensor:
        """The network at another latent or level, in this step's context: one more evaluation."""
        self.evaluations += 1
        return _evaluate(self.eps_fn, x, level, self.index)

    def x0(self, x: Tensor, level: Level) -> Tensor:
        """The x_0 that the network sees at another latent or level: one more evaluation."""
        return (x - level.std * self.eps(x, level)) / level.alpha

    def noise_like(self, x: Tensor) -> Tensor:
        """Standard normal like x, a function of seed and step; every call of a step draws anew."""
        if self.noise is None:
            raise ValueError("noise: expected a callable, got None; a method that draws says random=True")
        drawn = self.noise(self.index, self.draws) if self.draws else self.noise(self.index)
        self.draws += 1
        return drawn.to(x)

    def brownian(self, now: Level, then: Level, x: Tensor) -> Tensor:
        """Standard normal like x: what a Brownian path of the seed, in time alpha^2 / std^2, does between two levels.

        Runs of other steps meet the same path. A noise that has none (see `SeedNoise.between`) gives fresh draws.
        """
        between = getattr(self.noise, "between", None)
        return self.noise_like(x) if between is None else between(now.log_snr, then.log_snr).to(x)

    def row(self, i: int) -> Run:
        """The run of one latent of the batch, nothing evaluated yet."""
        rows = getattr(self.eps_fn, "row", None)
        eps_fn = self.eps_fn if rows is None else rows(i)
        history = tuple(past[i : i + 1] for past in self.history)
        x0_pred, eps_uncond = self.x0_pred[i : i + 1], self.eps_uncond[i : i + 1]
        return replace(
            self, eps_fn=eps_fn, history=history, x0_pred=x0_pred, eps_uncond=eps_uncond, noise=None, evaluations=0
        )

    def level_at(self, log_snr: float) -> Level:
        """The noise level of some lambda."""
        return Level(_whole(self.schedule.timestep_at(log_snr)), 1 / (1 + math.exp(-2 * log_snr)))


StepFn = Callable[[Level, Level, Tensor, Tensor, Run], "Tensor | tuple[Tensor, History]"]
"""x_prev = step(now, then, x_t, eps, run), or (x_prev, history): eps is the network's at x_t, now."""


@dataclass(frozen=True)
class Sampler:
    """A method and its facts; called, it is the run: an iterator over the steps from noise to a latent."""

    name: str
    step: StepFn
    order: int | None  # of convergence to the probability flow; None: it follows none
    evaluations: int = 1  # of the network, a step
    starting: int = 0  # evaluations more in a run's first step
    memory: int = 0  # latents remembered from step to step
    random: bool = False  # needs `noise` at any eta
    eta: float | None = None  # how random unless told otherwise, 0 .. 1; None: it has no choice
    even: bool = False  # needs evenly spaced timesteps
    from_pure_noise: bool = False  # whether it can begin where alphas_cumprod is 0
    varies: bool = False  # evaluations depend on levels or latents; `evaluations` is then the least
    uncond: bool = False  # needs the unconditional eps beside the guided one, of a guidance scale in 0 .. 1

    def __call__(
        self,
        eps_fn: EpsFn,
        x_T: Tensor,
        schedule: Schedule,
        steps: int = 50,
        *,
        eta: float | None = None,
        start: int = 0,
        history: History = (),
        noise: Noise | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> Iterator[Step]:
        """Run the method.

        The coefficients are computed in float64 and applied in x_T's dtype. Under a half-precision network keep x_T in
        float32: rounding every step would add up (`ldm.guidance.guided` casts for each call).

        Args:    eps_fn: see `EpsFn`. Every evaluation of a step, also one at another noise level, asks for the context
                 of that step: contexts count steps, not evaluations.
                 x_T: (B, 4, H/8, W/8) standard normal; with `start`, the latents before that step.
                 steps: S.  eta: see `Sampler.eta`.
                 start: index of the first step to run; a branch that resumes from a shared prefix gives the number of
                 steps already taken; `start=S` yields nothing.
                 history: with `start`, that of the Step before, so that the run goes on as if it had never stopped;
                 () begins anew.
                 noise: z for each step, see `step_noise`; deterministic samplers leave it alone.
                 timesteps: visit these instead of `leading(steps)`; S falling values, see `ldm.schedule`.
        Returns: an iterator of S - start steps; shapes, dtype and device of x_T.
        Raises:  ValueError: an argument out of range, eps_fn made for another number of steps, or eps of another shape
                 than x_t. As with every generator, on the first `next`; always before the first evaluation, bar eps's
                 shape.
        """
        levels = noise_levels(eps_fn, x_T, schedule, steps, start, history, timesteps)
        eta = self._checked_eta(eta, noise)
        if self.even:
            _check_even(self.name, [level.t for level in levels[:-1]] if timesteps is None else timesteps)
        if self.uncond and not 0 <= (scale := getattr(eps_fn, "guidance_scale", 1)) <= 1:
            raise ValueError(f"guidance_scale: {self.name} expects 0..1, such as 0.6, got {scale:g}")
        if not self.from_pure_noise and not all(level.alphas_cumprod for level in levels[:-1]):
            raise ValueError(
                f"timesteps: {self.name} divides by alpha, which is 0 where this schedule begins (zero terminal SNR): "
                "use ddim or ddpm, or spacing leading"
            )
        x_t = x_T
        for index in range(start, steps):
            now, then = levels[index], levels[index + 1]
            eps, x0_pred, eps_uncond = _evaluate_all(eps_fn, x_t, now, index, self.uncond)
            run = Run(eps_fn, schedule, index, levels[:index][::-1], history, eta, noise, x0_pred, eps_uncond)
            result = self.step(now, then, x_t, eps, run)
            x_prev, history = result if isinstance(result, tuple) else (result, ())
            yield Step(index, now.t, x_t, eps, x0_pred, x_prev, history, run.evaluations)
            x_t = x_prev

    def evaluations_of(self, steps: int) -> int:
        """Of a run that takes this many steps; at least, where they vary."""
        return self.evaluations * steps + (self.starting if steps else 0)

    def steps_within(self, evaluations: int) -> int:
        """How many steps so many evaluations are good for; at least one."""
        return max(1, (evaluations - self.starting) // self.evaluations)

    def _checked_eta(self, eta: float | None, noise: Noise | None) -> float:
        if eta and self.eta is None:
            raise ValueError(f"eta: {self.name} has none, expected 0, got {eta}")
        eta = (self.eta or 0.0) if eta is None else eta
        if not 0 <= eta <= 1:
            raise ValueError(f"eta: expected 0..1, got {eta}")
        if noise is None and (self.random or eta > 0):
            reason = f"{self.name} is random" if self.random else f"eta is {eta}"
            raise ValueError(f"noise: expected a callable because {reason}, got None; see step_noise")
        return eta


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
    default = leading(steps, schedule.steps_offset, len(schedule)) if timesteps is None else ()
    ts = default if timesteps is None else tuple(timesteps)
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
    told = [_whole(told_at(t)) for t in ts]
    if told != list(ts):
        _check_told(eps_fn, told, len(schedule))
    return visited_levels(schedule, ts)


def visited_levels(schedule: Schedule, timesteps: Sequence[float]) -> list[Level]:
    """The same, of timesteps that are known to be in order."""
    visited = [Level(_whole(told_at(t)), schedule.alphas_cumprod_at(t)) for t in timesteps]
    return [*visited, final_level(schedule)]


def final_level(schedule: Schedule) -> Level:
    """Where runs end: at t = 0 in SD1's own schedule."""
    end = schedule.final_alpha_cumprod
    t = schedule.timestep_at(0.5 * math.log(end / (1 - end))) if end < 1 else 0
    return Level(_whole(round(t, 9)), end)


def _check_told(eps_fn: EpsFn, told: Sequence[float], train_steps: int) -> None:
    if not all(0 <= t <= train_steps - 1 for t in told):
        raise ValueError(f"timesteps: expected told times in 0..{train_steps - 1}, got {told}")
    if hasattr(eps_fn, "eps_and_x0"):
        raise ValueError("timesteps: told times are for networks that predict eps; expected timesteps alone")


def _check_even(name: str, timesteps: Sequence[float]) -> None:
    strides = [t - later for t, later in pairwise(timesteps)]
    if strides and max(strides) - min(strides) > 1:
        raise ValueError(
            f"timesteps: {name} expects evenly spaced ones (leading, trailing, linspace), got strides of "
            f"{min(strides):.4g} to {max(strides):.4g}"
        )


def _evaluate(eps_fn: EpsFn, x: Tensor, level: Level, step: int) -> Tensor:
    """eps in x's dtype; ValueError for one of another shape than x, which would broadcast."""
    eps = eps_fn(x, level.t, step).to(x.dtype)
    if eps.shape != x.shape:
        raise ValueError(f"eps_fn: expected eps like x_t, {tuple(x.shape)}, got {tuple(eps.shape)}")
    return eps


def _evaluate_all(eps_fn: EpsFn, x: Tensor, level: Level, step: int, uncond: bool) -> tuple[Tensor, Tensor, Tensor]:
    """eps, the x_0 that it implies, and the unconditional eps where it is asked for (else, or unguided: eps again)."""
    if uncond and (guided := getattr(eps_fn, "with_uncond", None)) is not None:
        eps, eps_uncond = (part.to(x.dtype) for part in guided(x, level.t, step))
        return eps, (x - level.std * eps) / level.alpha, eps_uncond
    if (both := getattr(eps_fn, "eps_and_x0", None)) is not None:  # whose network predicts something else
        eps, x0_pred = (part.to(x.dtype) for part in both(x, level.t, step))
        return eps, x0_pred, eps
    eps = _evaluate(eps_fn, x, level, step)
    if not level.alphas_cumprod:
        raise ValueError("timesteps: eps says nothing of x_0 in pure noise (zero terminal SNR); use spacing leading")
    return eps, (x - level.std * eps) / level.alpha, eps


def _whole(t: float) -> float:
    return int(t) if t == int(t) else float(t)
