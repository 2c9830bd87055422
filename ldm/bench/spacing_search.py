"""Levels for a few steps, chosen by search: first on the known flow, then on the network, then held to seeds unseen.

A spacing is a curve lambda(u), u = 0 .. 1 along the run, lambda half the log signal-to-noise ratio, through a few knots
(Fritsch and Carlson's monotone cubics); step i of N begins at u = i / N, and the last ends at u = 1, t = 0. A few knots
instead of N free levels: ten levels that fit four seeds were worse on others than the spacing that they began from.
The search moves one knot at a time by a share of the room to its neighbour, keeps what lowers the error, and halves the
share when nothing does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.interpolate import PchipInterpolator

from ldm.bench import known_flow
from ldm.samplers import Sampler
from ldm.schedule import EVEN_SPACINGS, SPACINGS, Schedule

Levels = tuple[float, ...]
Objective = Callable[[Levels], float]  # timesteps -> error
KNOTS = 5  # the end, which stays, not counted
SMALLEST_SHARE = 0.03


@dataclass(frozen=True)
class Found:
    """The best timesteps of a search."""

    timesteps: Levels
    error: float
    tried: int


def fixed(sampler: Sampler, steps: int, schedule: Schedule) -> dict[str, Levels]:
    """The timesteps of every spacing that the sampler takes; equal ones once."""
    levels: dict[str, Levels] = {}
    for name in [name for name in SPACINGS if not sampler.even or name in EVEN_SPACINGS]:
        timesteps = tuple(SPACINGS[name](steps, schedule))
        if timesteps not in levels.values():
            levels[name] = timesteps
    return levels


def search(objective: Objective, begin: Levels, schedule: Schedule, tries: int, share: float = 0.3) -> Found:
    """Pattern search from some timesteps, for at most so many calls of the objective; never worse than they are."""
    knots, steps = knots_of(begin, schedule), len(begin)
    best = Found(begin, objective(begin), 1)
    tried = 1
    while share >= SMALLEST_SHARE and tried < tries:
        before = best.error
        for index in range(KNOTS):
            for signed in (share, -share):
                moved = _moved(knots, index, signed, schedule)
                candidate = through(moved, steps, schedule)
                if candidate is None or tried >= tries:
                    continue
                error, tried = objective(candidate), tried + 1
                if error < best.error:
                    best, knots = Found(candidate, error, tried), moved
                    break
        if best.error == before:
            share /= 2
    return Found(best.timesteps, best.error, tried)


def on_known_flow(sampler: Sampler, steps: int, seeds: Sequence[int] = (0, 1, 2, 3), tries: int = 300) -> Found:
    """The best levels on the known flow, from the best fixed spacing there; neutral and swapped runs count alike."""
    flow = known_flow.KnownFlow(tuple(seeds))

    def objective(timesteps: Levels) -> float:
        error = known_flow.error_of(flow, sampler, timesteps)
        return error if math.isfinite(error) else math.inf

    begin = min(fixed(sampler, steps, flow.schedule).values(), key=objective)
    return search(objective, begin, flow.schedule, tries)


def refine(
    objective: Objective, candidates: Mapping[str, Levels], schedule: Schedule, tries: int
) -> tuple[dict[str, float], Found]:
    """Every candidate's error, and the best that a search from the best of them has found."""
    errors = {name: objective(timesteps) for name, timesteps in candidates.items()}
    best = min(errors, key=lambda name: errors[name])
    return errors, search(objective, candidates[best], schedule, tries)


def knots_of(timesteps: Levels, schedule: Schedule) -> list[float]:
    """lambda at u = 0, 1/5 ... 4/5 of a run's levels."""
    lambdas = [_lambda(schedule, t) for t in (*timesteps, 0)]
    u = np.linspace(0, 1, KNOTS + 1)[:-1]
    return np.interp(u * len(timesteps), range(len(lambdas)), lambdas).tolist()


def through(knots: Sequence[float], steps: int, schedule: Schedule) -> Levels | None:
    """The N timesteps of the curve through some knots, to 0.001; None where two would fall together."""
    curve = PchipInterpolator(np.linspace(0, 1, KNOTS + 1), [*knots, float(schedule.lambdas[0])])
    timesteps = tuple(round(schedule.timestep_at(float(curve(i / steps))), 3) for i in range(steps))
    return timesteps if all(later < t for t, later in pairwise(timesteps)) else None


def _moved(knots: Sequence[float], index: int, share: float, schedule: Schedule) -> list[float]:
    around = [float(schedule.lambdas[-1]), *knots, float(schedule.lambdas[0])]
    here, neighbour = around[index + 1], around[index + (2 if share > 0 else 0)]
    return [*knots[:index], here + abs(share) * (neighbour - here), *knots[index + 1 :]]


def _lambda(schedule: Schedule, t: float) -> float:
    a_t = schedule.alphas_cumprod_at(t)
    return 0.5 * math.log(a_t / (1 - a_t))
