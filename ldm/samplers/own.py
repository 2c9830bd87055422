"""A sampler or a spacing of one's own: facts that are not stated are counted in a trial, those that are are held to it.

The trial's network is exact and costs nothing: x_0 ~ N(0, 1/4), whose eps is std x_t / (alpha^2 / 4 + std^2).
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from ldm.names import nearest
from ldm.samplers.driver import History, Noise, Sampler, Step, StepFn, noise_levels
from ldm.samplers.noise import initial_noise, step_noise
from ldm.schedule import Schedule, Spacing, ToldTime, trailing

log = logging.getLogger(__name__)

STEP = ("now", "then", "x_t", "eps", "run")
RUN = ("eps_fn", "x_T", "schedule", "steps")
FACTS = {f.name: f for f in fields(Sampler) if f.name not in ("name", "step")}
TRIAL_STEPS = (1, 2, 7, 20)
SEEDS = (0, 1)
SHAPE = (4, 4, 4)
SCHEDULE = Schedule.sd15()


@dataclass(frozen=True)
class GeneratorSampler(Sampler):
    """A sampler whose loop is its own: a generator with the signature of `Sampler.__call__`, which yields Steps."""

    generator: Callable[..., Iterator[Step]] | None = None

    def __call__(self, eps_fn, x_T, schedule, steps=50, *, eta=None, start=0, history: History = (), noise=None,  # type: ignore[no-untyped-def]
                 timesteps=None) -> Iterator[Step]:  # fmt: skip
        """Run it, its arguments seen to be in range. See `Sampler`."""
        assert self.generator is not None
        noise_levels(eps_fn, x_T, schedule, steps, start, history, timesteps)
        if any(isinstance(t, ToldTime) for t in timesteps or ()):
            raise ValueError(f"timesteps: {self.name} is a generator of its own, which knows no told times")
        told = {"eta": self._checked_eta(eta, noise), "start": start, "history": history, "noise": noise}
        yield from self.generator(eps_fn, x_T, schedule, steps, timesteps=timesteps, **told)


def sampler(name: str, given: object, facts: Mapping[str, Any]) -> Sampler:
    """A sampler made of a step function, a generator or a Sampler, after a trial.

    Args:    given: step(now, then, x_t, eps, run), or a generator like `Sampler.__call__`, or a Sampler, whose facts
             are its own.  facts: fields of `Sampler`; those missing are counted, and said in the log.
    Raises:  ValueError: another signature, an unknown fact, or a trial that fails or contradicts a fact.
    """
    if isinstance(given, Sampler):
        made, missing = replace(given, name=name), set[str]()
    else:
        _check_facts(name, facts)
        made, missing = _made(name, given, facts), FACTS.keys() - facts.keys()
    trial = _Trial(made)
    for steps in TRIAL_STEPS:
        trial.run(steps)
    seen = trial.facts()
    if unstated := {fact: value for fact, value in seen.items() if fact in missing}:
        made = replace(made, **unstated)
    for steps in TRIAL_STEPS:
        if (expected := made.evaluations_of(steps)) != trial.asked[steps]:
            raise ValueError(
                f"{name}: a run of {steps} steps asked the network {trial.asked[steps]} times, expected {expected} by "
                f"its facts (evaluations {made.evaluations} a step, starting {made.starting})"
            )
    for fact in ("memory", "random"):
        if seen[fact] > getattr(made, fact):
            raise ValueError(f"{name}: {fact} is said to be {getattr(made, fact)}, seen in a trial: {seen[fact]}")
    _try_clean_end(made)
    stated = {"order": made.order, "evaluations": made.evaluations, "memory": made.memory, "random": made.random}
    how = ", ".join(f"{fact} {value}{'' if fact not in missing else _how(fact)}" for fact, value in stated.items())
    log.info("%s: %s", name, how)
    return made


def spacing(name: str, given: object) -> Spacing:
    """timesteps = given(steps, schedule), after a trial at several numbers of steps.

    Raises ValueError: no function of two arguments, or levels that are not S falling timesteps in 0..999.
    """
    _check_signature(name, given, ("steps", "schedule"))

    def checked(steps: int, schedule: Schedule) -> tuple[float, ...]:
        assert callable(given)
        try:
            told = given(steps, schedule)
            levels = tuple(t if isinstance(t, ToldTime) else float(t) for t in told)
        except Exception as error:
            raise ValueError(f"{name}: failed for {steps} steps with {type(error).__name__}: {error}") from error
        _check_levels(name, levels, steps, len(schedule))
        return levels

    for steps in (1, 2, 10, 50):
        checked(steps, SCHEDULE)
    return checked


def stored_spacing(name: str, content: Mapping[str, Any]) -> Spacing:
    """A file's {"steps": N, "timesteps": [...]}; for other N straight lines in log sigma between its N + 1 levels.

    With "told": [...] the network is told those at its N levels; at other N what it is told is the level's own.
    Raises ValueError where the content is something else.
    """
    stored, optimised, told = content.get("timesteps"), content.get("steps"), content.get("told")
    if not _numbers(stored) or optimised != len(stored):
        raise ValueError(f'{name}: expected {{"steps": N, "timesteps": [N falling numbers]}}, as the bench writes it')
    _check_levels(name, stored, len(stored), len(SCHEDULE))
    if told is not None and not (_numbers(told) and len(told) == len(stored) and _on_table(told)):
        raise ValueError(f"{name}: expected told: [{len(stored)} numbers in 0..{len(SCHEDULE) - 1}], got {told}")
    levels = tuple(stored) if told is None else tuple(map(ToldTime, stored, told))
    if sampler := content.get("sampler"):
        log.info("%s: %d levels, chosen for %s", name, len(levels), sampler)

    said = set[int]()  # once for each number of steps

    def spacing(steps: int, schedule: Schedule) -> tuple[float, ...]:
        if steps == len(stored):
            return levels
        if steps not in said:
            log.info(
                "%s: levels chosen for %d steps; for %d, straight lines in log sigma between them%s",
                name, len(stored), steps, "" if told is None else ", and no told times",
            )  # fmt: skip
        said.add(steps)
        log_sigmas = [_log_sigma(schedule, t) for t in (*stored, 0)]
        at = np.interp(np.linspace(0, len(stored), steps, endpoint=False), range(len(log_sigmas)), log_sigmas)
        return tuple(round(schedule.timestep_at(-float(log_sigma)), 9) for log_sigma in at)

    return spacing


def _numbers(value: object) -> TypeGuard[list[float]]:
    return isinstance(value, list) and all(isinstance(t, int | float) and not isinstance(t, bool) for t in value)


def _on_table(told: Sequence[float]) -> bool:
    return all(0 <= t <= len(SCHEDULE) - 1 for t in told)


def _log_sigma(schedule: Schedule, t: float) -> float:
    a_t = schedule.alphas_cumprod_at(t)
    return 0.5 * math.log((1 - a_t) / a_t)


# ---- signatures and facts --------------------------------------------------------------------------


def _made(name: str, given: object, facts: Mapping[str, Any]) -> Sampler:
    known = {"order": None, **facts}
    if inspect.isgeneratorfunction(given):
        _check_signature(name, given, RUN)
        return GeneratorSampler(name, _no_step, generator=given, **known)
    _check_signature(name, given, STEP)
    step: StepFn = given  # type: ignore[assignment]
    return Sampler(name, step, **known)


def _no_step(*_: object) -> Tensor:
    raise ValueError("step: a generator has none; call the sampler")


def _check_signature(name: str, given: object, expected: Sequence[str]) -> None:
    wanted = f"a function of ({', '.join(expected)})"
    if not callable(given):
        raise ValueError(f"{name}: it is of type {type(given).__name__}, expected {wanted}")
    found = inspect.signature(given)
    try:
        found.bind(*expected)
    except TypeError:
        raise ValueError(f"{name}: expected {wanted}, found {found}") from None


def _check_facts(name: str, facts: Mapping[str, Any]) -> None:
    for fact, value in facts.items():
        if fact not in FACTS:
            raise ValueError(f"{name}: no such fact as {fact!r}{nearest(fact, FACTS)}; known are {', '.join(FACTS)}")
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        if fact in ("evaluations", "starting", "memory") and not whole:
            raise ValueError(f"{name}: {fact} is {value!r}, expected a whole number")
        if fact == "order" and value is not None and not (whole and value > 0):
            raise ValueError(f"{name}: order is {value!r}, expected 1, 2 ... or None")
        if fact in ("random", "even", "from_pure_noise") and not isinstance(value, bool):
            raise ValueError(f"{name}: {fact} is {value!r}, expected True or False")


def _how(fact: str) -> str:
    return " (not stated: none is assumed)" if fact == "order" else " (not stated: counted in a trial)"


def _check_levels(name: str, levels: Sequence[float], steps: int, train_steps: int) -> None:
    finite = all(math.isfinite(t) for t in levels)
    falling = finite and all(later < t for t, later in pairwise(levels))
    if len(levels) != steps or not falling or not 0 <= levels[-1] <= levels[0] < train_steps:
        shown = ", ".join(f"{t:g}" for t in levels[:4]) + (" ..." if len(levels) > 4 else "")
        raise ValueError(
            f"{name}: expected {steps} falling timesteps in 0..{train_steps - 1}, got {len(levels)}: {shown}"
        )


# ---- the trial -------------------------------------------------------------------------------------


def _try_clean_end(made: Sampler) -> None:
    """Runs of SD1's own schedule end with a trace of noise. Others end without: said in the log where that fails."""
    try:
        _Trial(made).run(7, replace(SCHEDULE, final_alpha_cumprod=1.0))
    except ValueError as error:
        log.warning("%s; so it is where a run ends without any noise (then.std is 0), as k-diffusion's do", error)


@dataclass
class _Trial:
    """Short runs on the exact network, and what was seen of them."""

    made: Sampler
    asked: dict[int, int] = field(default_factory=dict)  # steps -> evaluations
    remembered: int = 0
    drew: bool = False

    def run(self, steps: int, schedule: Schedule = SCHEDULE) -> None:
        """One run, counted and checked."""
        name = self.made.name
        x_T = initial_noise(SEEDS, SHAPE)
        drawn, self.asked[steps] = step_noise(SEEDS, SHAPE), 0

        def eps_fn(x_t: Tensor, t: float, step: int) -> Tensor:
            self.asked[steps] += 1
            a_t = schedule.alphas_cumprod_at(t)
            return math.sqrt(1 - a_t) * x_t / (a_t / 4 + 1 - a_t)

        def noise(step: int, /, draw: int = 0) -> Tensor:
            self.drew = True
            return drawn(step, draw) if draw else drawn(step)

        try:
            with torch.no_grad():
                taken = list(self._steps(eps_fn, x_T, schedule, steps, noise))
        except Exception as error:
            raise ValueError(f"{name}: a trial of {steps} steps failed with {type(error).__name__}: {error}") from error
        if len(taken) != steps:
            raise ValueError(f"{name}: a trial of {steps} steps yielded {len(taken)}")
        for step in taken:
            self._check(step, x_T)

    def _steps(self, eps_fn: Any, x_T: Tensor, schedule: Schedule, steps: int, noise: Noise) -> Iterator[Step]:
        # A method that does not say that it draws is let draw here: then this is counted.
        lenient = replace(self.made, random=True)
        for step in lenient(eps_fn, x_T, schedule, steps, noise=noise, timesteps=trailing(steps)):
            yield step
            if not isinstance(step, Step):
                return

    def _check(self, step: object, x_T: Tensor) -> None:
        name = self.made.name
        if not isinstance(step, Step):
            raise ValueError(f"{name}: yielded {type(step).__name__}, expected ldm.samplers.Step")
        x_prev = step.x_prev
        if not isinstance(x_prev, Tensor) or x_prev.shape != x_T.shape or x_prev.dtype != x_T.dtype:
            got = f"{x_prev.dtype} {tuple(x_prev.shape)}" if isinstance(x_prev, Tensor) else type(x_prev).__name__
            raise ValueError(f"{name}: returned {got}, expected x_prev like x_t, {x_T.dtype} {tuple(x_T.shape)}")
        if not bool(x_prev.isfinite().all()):
            raise ValueError(f"{name}: NaN or Inf in x_prev after step {step.index} of a trial (t = {step.t:g})")
        self.remembered = max(self.remembered, len(step.history))

    def facts(self) -> dict[str, Any]:
        """Evaluations a step and at the start, memory, randomness, as counted."""
        evaluations = (self.asked[20] - self.asked[7]) // 13
        starting = self.asked[20] - 20 * evaluations
        if starting < 0 or any(evaluations * steps + starting != count for steps, count in self.asked.items()):
            counted = ", ".join(f"{count} in {steps} steps" for steps, count in self.asked.items())
            raise ValueError(f"{self.made.name}: expected as many evaluations in every step, counted {counted}")
        seen = {"evaluations": evaluations, "starting": starting}
        return {**seen, "memory": self.remembered, "random": self.drew and not self.made.eta}
