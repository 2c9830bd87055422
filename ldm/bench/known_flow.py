"""Samplers on a flow that is known exactly: every sampler x spacing in seconds, without a network.

Each coordinate of a latent is a mixture of Gaussians, independent of the others. In one dimension a flow cannot let two
points pass each other, so each keeps its quantile: the exact x at one noise level is F^-1(G(y)) of the exact y at
another, with F and G the mixture's distribution functions there. Coordinates come in pairs, with two mixtures: a pair
is a point of the plane, whose path can be drawn. A prompt moves the mixture, so a swap is a jump of it.

    error           |x - x*| / |x*|; x*: where the flow takes x_T from t = 999, the root mean square over seeds
    step_error      the same against the flow from the level that the run begins at; what the order is fitted to
    start_error     between those two flows: what beginning at another level costs, however small the steps
    swap_error      as step_error, with the prompt swapped at the visited level that is nearest to t = 600
    swap_cosine     of swapped - neutral, to the flow's;  swap_length: its length as a share of the flow's
    distance        Kolmogorov's, between the coordinates drawn and the mixture; the only score of random samplers

Letters: B seeds, K components, W = 8 coordinates a row.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ldm.bench.against import Peer, beside
from ldm.bench.rows import RowFile
from ldm.bench.sampler_statistics import SWAP_NEAR, directions, errors_by_seed, fitted_orders, mean_error
from ldm.samplers import SAMPLERS, EpsFn, Sampler, Step, initial_noise, step_noise
from ldm.samplers.driver import final_level
from ldm.samplers.noise import SeedNoise
from ldm.schedule import EVEN_SPACINGS, SPACINGS, Schedule, told_at

SHAPE = (4, 8, 8)
BUDGETS = (10, 20, 40, 80)  # evaluations of a run
SHIFT = 0.5  # by which the other prompt moves the mixture


class Mixture:
    """The noised mixture: x (B, C, H, W) float64."""

    # Of the two coordinates of a pair, K shares, means and deviations each.
    SHARES = ((0.5, 0.3, 0.2), (0.4, 0.35, 0.25))
    MEANS = ((-1.2, 0.4, 1.5), (-0.9, 1.1, 0.1))
    DEVIATIONS = ((0.5, 0.3, 0.6), (0.25, 0.4, 0.7))

    def __init__(self, schedule: Schedule, width: int = SHAPE[-1]) -> None:
        self.schedule = schedule
        both = (self.SHARES, self.MEANS, self.DEVIATIONS)
        tables = (torch.tensor(table, dtype=torch.float64).repeat(width // 2, 1) for table in both)
        shares, means, deviations = (table.T[:, None, None, None, :] for table in tables)  # (K, 1, 1, 1, W)
        self.shares, self.means, self.deviations = shares, means, deviations
        self.levels: dict[tuple[float, float], tuple[float, Tensor, Tensor, Tensor]] = {}  # kept: a run asks again

    def eps(self, x_t: Tensor, t: float, shift: float = 0.0) -> Tensor:
        """The exact eps of the mixture moved by `shift`: -std times the score."""
        if (t, shift) not in self.levels:
            a_t = self.schedule.alphas_cumprod_at(t)
            means, variances = math.sqrt(a_t) * (self.means + shift), a_t * self.deviations**2 + 1 - a_t
            self.levels[t, shift] = math.sqrt(1 - a_t), means, 1 / variances, self.shares / variances.sqrt()
        std, means, precisions, peaks = self.levels[t, shift]
        apart = x_t - means  # (K, B, C, H, W)
        slopes = apart * precisions
        logs = apart.mul_(slopes).mul_(-0.5)
        shares = logs.sub_(logs.amax(dim=0)).exp_().mul_(peaks)
        return std * slopes.mul_(shares).sum(0) / shares.sum(0)

    def flow(self, x: Tensor, a_from: float, a_to: float, shift: float = 0.0) -> Tensor:
        """Where the flow takes x from one alphas_cumprod to another, by bisection of the quantile."""
        quantile = self.cdf(x, a_from, shift)
        low, high = torch.full_like(x, -30.0), torch.full_like(x, 30.0)
        for _ in range(58):
            middle = (low + high) / 2
            below = self.cdf(middle, a_to, shift) < quantile
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def cdf(self, x: Tensor, a_t: float, shift: float = 0.0) -> Tensor:
        """The distribution function of each coordinate."""
        deviations = torch.sqrt(a_t * self.deviations**2 + 1 - a_t)
        return (self.shares * torch.special.ndtr((x - math.sqrt(a_t) * (self.means + shift)) / deviations)).sum(0)

    def distance(self, x: Tensor, a_t: float) -> float:
        """Kolmogorov's distance of x's coordinates to the mixture: by its distribution function they are uniform."""
        uniform = self.cdf(x, a_t).flatten().sort().values
        count = len(uniform)
        steps = torch.arange(count, dtype=torch.float64) / count
        return float(torch.maximum(uniform - steps, steps + 1 / count - uniform).max())


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is compared on the known flow."""

    samplers: tuple[str, ...] = ()  # (): all
    spacings: tuple[str, ...] = ()
    budgets: tuple[int, ...] = BUDGETS
    seeds: tuple[int, ...] = tuple(range(8))

    def __post_init__(self) -> None:
        """Raises ValueError for what cannot be compared."""
        for argument, names, known in (("samplers", self.samplers, SAMPLERS), ("spacings", self.spacings, SPACINGS)):
            if unknown := [name for name in names if name not in known]:
                raise ValueError(f"{argument}: expected some of {', '.join(known)}, got {', '.join(unknown)}")
        if not self.budgets or min(self.budgets) < 1 or not self.seeds:
            raise ValueError(f"evaluations, seeds: expected one or more of each, got {self.budgets}, {self.seeds}")

    def pairs(self) -> list[tuple[str, str]]:
        """Sampler and spacing, but for uneven timesteps where the sampler refuses them."""
        both = product(self.samplers or tuple(SAMPLERS), self.spacings or tuple(SPACINGS))
        return [(name, spacing) for name, spacing in both if not SAMPLERS[name].even or spacing in EVEN_SPACINGS]


@dataclass(eq=False)
class KnownFlow:
    """The mixture, noises, and where the flow takes them."""

    seeds: tuple[int, ...]
    schedule: Schedule = field(default_factory=Schedule.sd15)
    peer: Peer | None = None  # another library, whose run is measured beside each
    exact: dict[tuple[float, float], Tensor] = field(default_factory=dict)  # (begin, swap) levels -> (B, *SHAPE)
    visited: dict[tuple[str, int], tuple[float, ...]] = field(default_factory=dict)  # spacing, steps -> timesteps

    @cached_property
    def mixture(self) -> Mixture:
        """The neutral prompt's."""
        return Mixture(self.schedule)

    @cached_property
    def x_T(self) -> Tensor:
        """(B, *SHAPE) float64."""
        return initial_noise(self.seeds, SHAPE).double()

    @cached_property
    def noise(self) -> KeptNoise:
        """What random samplers add."""
        return KeptNoise(step_noise(self.seeds, SHAPE))

    @cached_property
    def end(self) -> float:
        """alphas_cumprod where runs end."""
        return final_level(self.schedule).alphas_cumprod

    def ends_at(self, a_begin: float, a_swap: float | None = None) -> Tensor:
        """Where the flow from x_T at one level ends, with the prompt swapped at another; computed once."""
        key = (a_begin, -1.0 if a_swap is None else a_swap)
        if key not in self.exact:
            if a_swap is None:
                self.exact[key] = self.mixture.flow(self.x_T, a_begin, self.end)
            else:
                middle = self.mixture.flow(self.x_T, a_begin, a_swap)
                self.exact[key] = self.mixture.flow(middle, a_swap, self.end, SHIFT)
        return self.exact[key]

    def timesteps(self, spacing: str, steps: int) -> tuple[float, ...]:
        """Those of a spacing, computed once."""
        if (spacing, steps) not in self.visited:
            self.visited[spacing, steps] = tuple(SPACINGS[spacing](steps, self.schedule))
        return self.visited[spacing, steps]

    def eps_fn(self, counted: list[int], shift: float = 0.0) -> EpsFn:
        """eps under a prompt; the rows of each call are counted."""

        def eps(x_t: Tensor, t: float, step: int) -> Tensor:
            counted[0] += len(x_t)
            return self.mixture.eps(x_t, t, shift)

        return eps


class KeptNoise:
    """A seed's noise, drawn once: samplers that visit the same levels ask for the same."""

    def __init__(self, noise: SeedNoise) -> None:
        self.between, self.drawn = cache(noise.between), cache(noise)

    def __call__(self, step: int, /, draw: int = 0) -> Tensor:
        return self.drawn(step, draw)


def run(flow: KnownFlow, sampler: Sampler, timesteps: Sequence[float]) -> tuple[list[Step], list[Step], float]:
    """The neutral run, the steps after the swap, and how often the neutral one asked for eps, the mean over seeds."""
    counted, steps, noise = [0], len(timesteps), flow.noise
    fork = fork_near(timesteps)
    with torch.no_grad():
        neutral = list(sampler(flow.eps_fn(counted), flow.x_T, flow.schedule, steps, noise=noise, timesteps=timesteps))
        at_fork = neutral[fork - 1].x_prev if fork else flow.x_T
        other = flow.eps_fn([0], SHIFT)
        swapped = list(sampler(other, at_fork, flow.schedule, steps, start=fork, noise=noise, timesteps=timesteps))
    evaluations, rest = divmod(counted[0], len(flow.seeds))
    return neutral, swapped, evaluations + rest / len(flow.seeds) if rest else evaluations


def fork_near(timesteps: Sequence[float]) -> int:
    """How many steps are taken before the visited level that is nearest to `SWAP_NEAR`."""
    return min(range(len(timesteps)), key=lambda i: abs(timesteps[i] - SWAP_NEAR))


def measure(flow: KnownFlow, sampler: str, spacing: str, budget: int) -> dict[str, Any]:
    """One row; see the head of this file. `refused` says why where the two do not fit."""
    method, row = SAMPLERS[sampler], {"sampler": sampler, "spacing": spacing, "budget": budget}
    began = time.perf_counter()
    try:
        timesteps = flow.timesteps(spacing, method.steps_within(budget))
        neutral, swapped, evaluations = run(flow, method, timesteps)
    except ValueError as error:
        return {**row, "refused": str(error)}
    row |= {"steps": len(timesteps), "evaluations": evaluations, "order": method.order, "random": method.random}
    x, y = neutral[-1].x_prev, swapped[-1].x_prev
    a_first, a_begin = (flow.schedule.alphas_cumprod_at(t) for t in (len(flow.schedule) - 1, timesteps[0]))
    a_swap = flow.schedule.alphas_cumprod_at(timesteps[fork_near(timesteps)])
    row |= {"finite": bool((x.isfinite() & y.isfinite()).all()), "distance": flow.mixture.distance(x, flow.end)}
    if not row["finite"]:
        return {**row, "distance": None}
    if not method.random:
        row |= _errors(flow, x, y, a_first, a_begin, a_swap)
        if flow.peer is not None:
            case, eps = (sampler, spacing, timesteps), flow.mixture.eps
            row |= beside(flow.peer, eps, flow.x_T, flow.schedule, case, x, flow.ends_at(a_first))
    return {**row, "seconds": round(time.perf_counter() - began, 4)}


def _errors(flow: KnownFlow, x: Tensor, y: Tensor, a_first: float, a_begin: float, a_swap: float) -> dict[str, Any]:
    own, other = flow.ends_at(a_begin), flow.ends_at(a_begin, a_swap)
    by_seed = {
        "error": errors_by_seed(x, flow.ends_at(a_first)),
        "step_error": errors_by_seed(x, own),
        "start_error": errors_by_seed(own, flow.ends_at(a_first)),
        "swap_error": errors_by_seed(y, other),
    }
    cosines, lengths = directions(y, x, other - own)
    means = {name: mean_error(errors) for name, errors in by_seed.items()}
    means |= {"swap_cosine": sum(cosines) / len(cosines), "swap_length": sum(lengths) / len(lengths)}
    kept = ("error", "step_error", "swap_error")
    return means | {"by_seed": {name: by_seed[name] for name in kept}}


def compare(
    question: Question, file: RowFile | None = None, peer: Peer | None = None
) -> Iterator[list[dict[str, Any]]]:
    """For each sampler x spacing the rows of all budgets, as they come; those that the file holds are not run again.

    Spacings with the same levels are run once (but for a peer, which goes by names): the row of the later one names the
    first in `same_as`.
    """
    flow = KnownFlow(question.seeds, peer=peer)
    first: dict[Visited, dict[str, Any]] = {}  # whose row it is
    for sampler, spacing in question.pairs():
        rows = []
        for budget in question.budgets:
            name = {"sampler": sampler, "spacing": spacing, "budget": budget}
            visited = _visited(flow, sampler, spacing, budget)
            compute = partial(_measure_once, flow, name, None if peer else first.get(visited))
            rows.append(compute() if file is None else file.get(name, compute))
            first.setdefault(visited, rows[-1])
        yield rows


Visited = tuple[str, int, str | tuple[float, ...]]
"""Sampler, budget, timesteps and the times told; a spacing's name where it refuses."""


def _visited(flow: KnownFlow, sampler: str, spacing: str, budget: int) -> Visited:
    try:
        timesteps = flow.timesteps(spacing, SAMPLERS[sampler].steps_within(budget))
        return sampler, budget, (*timesteps, *map(told_at, timesteps))
    except ValueError:
        return sampler, budget, spacing


def _measure_once(flow: KnownFlow, name: Mapping[str, Any], same: Mapping[str, Any] | None) -> dict[str, Any]:
    return measure(flow, **name) if same is None else {**same, **name, "same_as": same["spacing"]}


def orders(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The orders that step_error and swap_error fall with over each pair's last three budgets, and intervals."""
    found = []
    for sampler, spacing in dict.fromkeys((row["sampler"], row["spacing"]) for row in rows):
        runs = [row for row in rows if (row["sampler"], row["spacing"]) == (sampler, spacing) and "by_seed" in row]
        runs = runs[-3:]
        entry: dict[str, Any] = {"sampler": sampler, "spacing": spacing, "theory": SAMPLERS[sampler].order}
        entry |= fitted_orders(runs, {"order": "step_error", "swap_order": "swap_error"})
        found += [entry] if "order" in entry else []
    return found


def paths(
    flow: KnownFlow, question: Question, budget: int, points: int = 10
) -> Iterator[tuple[str, str, list[list[list[float]]]]]:
    """Where the first points of the plane go: sampler, spacing, path of each point, (x, y) after every step."""
    for name, spacing in question.pairs():
        try:
            timesteps = flow.timesteps(spacing, SAMPLERS[name].steps_within(budget))
            neutral, _, _ = run(flow, SAMPLERS[name], timesteps)
        except ValueError:
            continue
        yield name, spacing, as_points([flow.x_T, *(step.x_prev for step in neutral)], points)


def exact_paths(flow: KnownFlow, points: int = 10, levels: int = 60) -> list[list[list[float]]]:
    """The same of the flow."""
    lambdas = torch.linspace(float(flow.schedule.lambdas[-1]), float(flow.schedule.lambdas[0]), levels)
    a_first = flow.schedule.alphas_cumprod_at(len(flow.schedule) - 1)
    few = KnownFlow(flow.seeds[:1], flow.schedule)
    moved = [few.mixture.flow(few.x_T, a_first, 1 / (1 + math.exp(-2 * float(level)))) for level in lambdas]
    return as_points([few.x_T, *moved], points)


def as_points(latents: Sequence[Tensor], points: int) -> list[list[list[float]]]:
    """The first pairs of coordinates of the first seed: (points, steps, 2), three decimals."""
    pairs = torch.stack([latent[0].reshape(-1, 2)[:points] for latent in latents], dim=1)
    return [[[round(float(v), 3) for v in xy] for xy in path] for path in pairs]
