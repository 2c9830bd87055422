"""Levels for a few steps, and what the network is told at each: least squares on a few seeds, held to seeds unseen.

A run of N steps has 2 N numbers x. Its first level and its end stay where they are.

    w_i     log of the share of the lambdas that step i covers; lambda: half the log signal-to-noise ratio
    s_i     by how many hundred timesteps the time that the network is told lies above the level's own    [Time shift]

What falls is the mean over seeds of c^2 log(1 + |r|^2 / c^2), r = (x_0 - x_0*) / |x_0*|: squares, but for the few
seeds whose error is far above c, which would decide all. A step is Levenberg and Marquardt's, with seeds weighted by
1 / (1 + |r|^2 / c^2):

    (J^T J + damping (diag(J^T J) + mean)) dx = -J^T r          J by differences: each number is moved by a little

LD3 trains such numbers by gradients. For 2 N of them differences cost little more, need no backward pass and so serve
any sampler and guidance; and steps that know J take fewer rounds. Broyden's correction makes one J good for several.

Papers: LD3 = Tong et al. 2024, arXiv:2405.15506.  Time shift = Li et al. 2023, arXiv:2305.15583.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ldm.bench import known_flow
from ldm.samplers import Sampler, Step
from ldm.schedule import EVEN_SPACINGS, SPACINGS, Schedule, ToldTime, told_at

Levels = tuple[float, ...]
Run = Callable[[Levels, Sequence[Step]], list[Step]]
"""taken = run(timesteps, first): all steps of a run that goes on after its first ones."""
Floats = NDArray[np.float64]
HUNDRED = 100.0  # timesteps in a unit of s
LEAST_SHARE = 0.01  # of lambda that a step covers: one from t = 0 covers none
MOVED = 0.01, 0.02  # w and s, for a difference
FARTHEST = 0.7  # that a number moves in a round
ATTEMPTS = 6  # of a round, each more damped than the one before
OUTLYING = 3.0  # times the median error at the begin: seeds near a watershed, where a small step decides the image
WELL = 0.01  # by which a step lowers the error, for another one with the same J
ENOUGH = 0.003  # by which a round lowers the error at least, or it is the last


@dataclass(frozen=True, eq=False)
class Aim:
    """Where runs should end."""

    run: Run
    exact: Tensor  # (B, ...) the flow's latents
    schedule: Schedule
    tell: bool = True  # whether told times are searched, or levels alone

    def residual(self, taken: Sequence[Step]) -> Floats:
        """(B, D): (x - exact) / |exact| of every seed."""
        exact = self.exact.flatten(1).double()
        apart = (taken[-1].x_prev.flatten(1).double() - exact) / exact.norm(dim=1, keepdim=True)
        return apart.cpu().numpy()


@dataclass(frozen=True)
class Found:
    """The best timesteps of a search."""

    timesteps: Levels
    error: float
    tried: int

    def content(self) -> dict[str, list[float]]:
        """For the file: timesteps, and told where it differs."""
        told = [float(told_at(t)) for t in self.timesteps]
        timesteps = [float(t) for t in self.timesteps]
        return {"timesteps": timesteps} | ({"told": told} if told != timesteps else {})


def fixed(sampler: Sampler, steps: int, schedule: Schedule) -> dict[str, Levels]:
    """The timesteps of every spacing that the sampler takes; equal ones once."""
    levels: dict[str, Levels] = {}
    for name in [name for name in SPACINGS if not sampler.even or name in EVEN_SPACINGS]:
        timesteps = tuple(SPACINGS[name](steps, schedule))
        if (timesteps, *map(told_at, timesteps)) not in [(other, *map(told_at, other)) for other in levels.values()]:
            levels[name] = timesteps
    return levels


@dataclass(frozen=True)
class Stage:
    """Where a search stands between two rounds: with its aim and its begin, all that the next round needs."""

    found: Found  # so far
    numbers: tuple[float, ...]
    scale: float  # c
    done: bool

    def content(self) -> dict[str, Any]:
        """As JSON, numbers to the last bit."""
        return {
            "timesteps": [float(t) for t in self.found.timesteps],
            "told": [float(told_at(t)) for t in self.found.timesteps],
            "error": self.found.error,
            "tried": self.found.tried,
            "numbers": list(self.numbers),
            "scale": self.scale,
            "done": self.done,
        }

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Stage:
        """What `content` gave."""
        pairs = zip(content["timesteps"], content["told"], strict=True)
        levels = tuple(t if told == t else ToldTime(t, told) for t, told in pairs)
        found = Found(levels, content["error"], content["tried"])
        return cls(found, tuple(content["numbers"]), content["scale"], content["done"])


def search(aim: Aim, begin: Levels, tries: int) -> Found:
    """Rounds of least squares from some timesteps, for at most so many runs; never worse than they are."""
    *_, last = stages(aim, begin, tries)
    return last.found


def stages(aim: Aim, begin: Levels, tries: int, stage: Stage | None = None) -> Iterator[Stage]:
    """A search's stages: at its begin and after every round; behind `stage`, those that are still to come.

    One that goes on takes the same steps: it runs the levels found so far once more, and does not count that.
    """
    if stage is not None and stage.done:
        return
    if stage is None:
        place = _place(aim, numbers_of(begin, aim), begin)
        scale = OUTLYING * float(np.median(np.linalg.norm(place.residual, axis=1)))
        stage = place.stage(1, tries, scale)
        yield stage
    else:
        place, scale = _place(aim, np.array(stage.numbers), stage.found.timesteps), stage.scale
    while not stage.done:
        before = _error(place.residual, scale)
        place, runs = _round(aim, begin, place, scale, stage.found.tried, tries)
        stage = place.stage(runs, tries, scale, last=_error(place.residual, scale) > (1 - ENOUGH) * before)
        yield stage


@dataclass(frozen=True, eq=False)
class _Place:
    """Some numbers and their run."""

    numbers: Floats
    timesteps: Levels
    taken: list[Step]
    residual: Floats

    def stage(self, runs: int, tries: int, scale: float, last: bool = False) -> Stage:
        """The search stands here after so many runs; done where it is the last or none are left for a round."""
        found = Found(self.timesteps, _error(self.residual), runs)
        return Stage(found, tuple(self.numbers.tolist()), scale, last or runs + len(self.numbers) >= tries)


def _place(aim: Aim, numbers: Floats, timesteps: Levels) -> _Place:
    taken = aim.run(timesteps, ())
    return _Place(numbers, timesteps, taken, aim.residual(taken))


def _round(aim: Aim, begin: Levels, place: _Place, scale: float, runs: int, tries: int) -> tuple[_Place, int]:
    """Measure J and step as long as that lowers the error well; each step corrects J by what it saw [Broyden]."""
    jacobian = differences(aim, begin, place.numbers, place.taken, place.residual)
    runs += len(place.numbers)
    damping, failed = 0.01, 0
    while runs < tries and failed < ATTEMPTS:
        step, before = _damped_step(jacobian, place.residual, scale, damping), _error(place.residual, scale)
        candidate = _place(aim, place.numbers + step, timesteps_of(place.numbers + step, begin, aim))
        after, runs = _error(candidate.residual, scale), runs + 1
        if not after < before:
            damping, failed = 4 * damping, failed + 1
            continue
        unforeseen = candidate.residual - place.residual - jacobian @ step
        jacobian = jacobian + np.multiply.outer(unforeseen, step / (step @ step))
        place, damping, failed = candidate, max(damping / 4, 1e-4), 0
        if after > (1 - WELL) * before:
            break
    return place, runs


def on_known_flow(sampler: Sampler, steps: int, seeds: Sequence[int] = (0, 1, 2, 3), tries: int = 300) -> Found:
    """The best levels on the known flow, from the best fixed spacing there."""
    flow = known_flow.KnownFlow(tuple(seeds))
    begins_at = flow.schedule.alphas_cumprod_at(len(flow.schedule) - 1)
    aim = Aim(follow(flow, sampler), flow.ends_at(begins_at), flow.schedule)
    candidates = fixed(sampler, steps, flow.schedule).values()
    return search(aim, min(candidates, key=lambda t: _error(aim.residual(aim.run(t, ())))), tries)


def follow(flow: known_flow.KnownFlow, sampler: Sampler) -> Run:
    """The neutral run on the known flow."""
    eps_fn = flow.eps_fn([0])

    def run(timesteps: Levels, taken: Sequence[Step]) -> list[Step]:
        x, history = (taken[-1].x_prev, taken[-1].history) if taken else (flow.x_T, ())
        more = sampler(eps_fn, x, flow.schedule, len(timesteps), start=len(taken), history=history, timesteps=timesteps)
        return [*taken, *more]

    return run


# ---- a run's numbers ---------------------------------------------------------------------------------


def numbers_of(timesteps: Levels, aim: Aim) -> Floats:
    """(2 N,) w and s, or (N,) without told times: of a run's levels."""
    shares = np.log(np.diff(_lambdas(timesteps, aim.schedule)).clip(min=LEAST_SHARE))
    shifts = [(told_at(t) - t) / HUNDRED for t in timesteps]
    return np.array([*shares, *(shifts if aim.tell else ())])


def timesteps_of(numbers: Floats, begin: Levels, aim: Aim) -> Levels:
    """The run that some numbers describe, to 0.0001; its first level is that of `begin`."""
    steps, schedule = len(begin), aim.schedule
    first, *_, end = _lambdas(begin, schedule)
    shares = np.exp(numbers[:steps])
    lambdas = first + (end - first) * np.cumsum(shares)[:-1] / shares.sum()
    levels = [float(begin[0]), *(round(schedule.timestep_at(float(value)), 4) for value in lambdas)]
    if not aim.tell:
        return tuple(levels)
    told = np.clip(np.array(levels) + HUNDRED * numbers[steps:], 0, len(schedule) - 1)
    return tuple(ToldTime(t, round(float(t_told), 4)) for t, t_told in zip(levels, told, strict=True))


def differences(aim: Aim, begin: Levels, numbers: Floats, taken: Sequence[Step], residual: Floats) -> Floats:
    """(B, D, numbers): how the residual changes with each number; a run begins where the number first matters.

    A time told is met one step early by methods that look ahead, such as Heun's.
    """
    columns = []
    for index in range(len(numbers)):
        told = index - len(begin)  # the step whose told time it is, if any
        stride = MOVED[0] if told < 0 else MOVED[1] if told else -MOVED[1]  # the first is told T - 1, and no more
        moved = numbers.copy()
        moved[index] += stride
        again = aim.run(timesteps_of(moved, begin, aim), taken[: max(told - 1, 0)])
        columns.append((aim.residual(again) - residual) / stride)
    return np.stack(columns, axis=-1)


def _damped_step(jacobian: Floats, residual: Floats, scale: float, damping: float) -> Floats:
    weights = 1 / np.sqrt(1 + np.square(residual).sum(axis=1) / scale**2)
    rows = (weights[:, None, None] * jacobian).reshape(-1, jacobian.shape[-1])
    normal = rows.T @ rows
    diagonal = np.diag(normal)
    slope = rows.T @ (weights[:, None] * residual).flatten()
    step = np.linalg.solve(normal + damping * np.diag(diagonal + diagonal.mean()), -slope)
    return np.clip(step, -FARTHEST, FARTHEST)


def _error(residual: Floats, scale: float = math.inf) -> float:
    """The root mean square over seeds of the relative error, outlying ones by their logarithm; infinite where NaN."""
    squares = np.square(residual).sum(axis=1)
    counted = squares if math.isinf(scale) else scale**2 * np.log1p(squares / scale**2)
    error = float(np.sqrt(counted.mean()))
    return error if math.isfinite(error) else math.inf


def _lambdas(timesteps: Levels, schedule: Schedule) -> Floats:
    """(N + 1,) of a run's levels, and of t = 0, where it ends or almost ends."""
    a_t = np.array([schedule.alphas_cumprod_at(t) for t in (*timesteps, 0)])
    return 0.5 * np.log(a_t / (1 - a_t))
