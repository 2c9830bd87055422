"""`ldm bench samplers --optimise spacing`: levels for a few steps, found by search, and held to seeds it has not seen.

ldm bench samplers --optimise spacing --steps 10 --out out/levels
ldm generate --prompt PROMPT --steps 10 --sampler deis --spacing out/levels/deis_10.json --out out/ten
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from ldm.bench import samplers, spacing_search
from ldm.bench.sampler_statistics import errors_by_seed, mean_error, ratio_interval
from ldm.bench.spacing_search import Levels
from ldm.conditioning import constant
from ldm.files import write_json
from ldm.samplers import SAMPLERS, Step
from ldm.samplers.noise import initial_noise
from ldm.schedule import log_snr
from ldm.traversal.plan import parse_integers

FIRST_TRAINING_SEED = 1_000_000  # those that levels are chosen by; --seeds are those that they are held to
STEPS, TRAINING_SEEDS = 10, 16
Errors = dict[str, list[float]]  # spacing -> of every unseen seed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options to `parser`."""
    parser.add_argument(
        "--optimise",
        choices=("spacing",),
        help="choose the levels of --steps steps, and the times that the network is told there, for each of --samplers "
        "(default: deis) on the network at the first --guidance (default: 1), hold them to --seeds (default: 0-7), "
        "and write SAMPLER_STEPS.json, which --spacing takes; with --known-flow without a network",
    )
    parser.add_argument("--steps", type=int, help=f"of the run to optimise (default: {STEPS})")
    parser.add_argument(
        "--tries", type=int, help="runs of all training seeds in a search (default: 20 x --steps, 10 a number searched)"
    )
    parser.add_argument("--training-seeds", type=int, help=f"how many to choose levels by (default: {TRAINING_SEEDS})")


def refuse_idle(args: argparse.Namespace) -> None:
    """ValueError for an option that does nothing beside --optimise, or without it."""
    idle: tuple[str, ...]
    if not args.optimise:
        idle, why = ("steps", "tries", "training_seeds"), "it belongs to --optimise, which is missing"
    elif args.known_flow:
        idle, why = (
            ("training_seeds", "seeds", "evaluations", "against"),
            "it does nothing beside --optimise --known-flow",
        )
    else:
        idle, why = ("evaluations", "against"), "it does nothing beside --optimise"
    if given := [name for name in idle if getattr(args, name) is not None]:
        raise ValueError(f"--{given[0].replace('_', '-')}: {why}")


def run(args: argparse.Namespace, bench: samplers.Bench | None) -> None:
    """Raises ValueError for options that do not fit."""
    names = checked(args)
    judge = None if bench is None else Judge(bench, args)
    require_enough(args, judge is None or judge.tell)
    if judge is not None and (both := set(judge.training) & set(judge.held)):
        raise ValueError(f"--seeds: got {min(both)}, by which levels are chosen; expected seeds unseen")
    args.out.mkdir(parents=True, exist_ok=True)
    verified: dict[tuple[str, str], list[float]] = {}  # sampler, spacing -> error of every unseen seed
    if judge is not None:
        judge.say_how_long(names)
    for name in names:
        content: dict[str, Any] = {"steps": args.steps, "sampler": name}
        if judge is None:
            found = spacing_search.on_known_flow(SAMPLERS[name], args.steps, tries=args.tries)
            print(f"{name} on the known flow: error {found.error:.2e} after {found.tried} runs", flush=True)
            content |= found.content()
        else:
            of_one, errors = judge.optimised(name)
            content |= of_one
            verified |= {(name, spacing): found for spacing, found in errors.items()}
        path = args.out / f"{name}_{args.steps}.json"
        write_json(path, content)
        print(f"timesteps {_listed(content['timesteps'])}{_told(content)}; see {path}, which --spacing takes")
    if len(names) > 1 and verified:
        print(of_all(verified))


def checked(args: argparse.Namespace) -> list[str]:
    """The samplers to search for, where the options fit."""
    names = (args.samplers or "deis").split(",")
    for name in names:
        if name not in SAMPLERS or SAMPLERS[name].random or SAMPLERS[name].even:
            raise ValueError(
                f"--samplers: got {name!r}, expected samplers that follow the flow and take uneven timesteps"
            )
    args.steps = STEPS if args.steps is None else args.steps
    args.training_seeds = TRAINING_SEEDS if args.training_seeds is None else args.training_seeds
    args.tries = 20 * args.steps if args.tries is None else args.tries
    if not 2 <= args.steps <= 100 or args.tries < 1 or args.training_seeds < 1:
        raise ValueError(
            "--steps, --tries, --training-seeds: expected 2..100, 1 or more, 1 or more, got "
            f"{args.steps}, {args.tries}, {args.training_seeds}"
        )
    return names


def require_enough(args: argparse.Namespace, tell: bool) -> None:
    """Raises ValueError for fewer tries than one round: the begin, each number moved, one step."""
    numbers = args.steps * (2 if tell else 1)
    if args.tries < numbers + 2:
        raise ValueError(
            f"--tries: got {args.tries}, expected {numbers + 2} or more: {numbers} numbers are each moved before a step"
        )


@dataclass(frozen=True, eq=False)
class Judge:
    """A network, the seeds that levels are chosen by, and those that they are held to."""

    bench: samplers.Bench
    args: argparse.Namespace

    @cached_property
    def guidance(self) -> float:
        """The first."""
        return self.bench.comparison.guidances[0]

    @property
    def tell(self) -> bool:
        """Whether told times are searched, too."""
        return getattr(self.bench.sd.unet, "prediction", "eps") == "eps"

    @cached_property
    def held(self) -> tuple[int, ...]:
        """Seeds unseen."""
        return parse_integers(self.args.seeds or "0-7", "--seeds")

    @cached_property
    def training(self) -> tuple[int, ...]:
        """Seeds to choose by."""
        return tuple(range(FIRST_TRAINING_SEED, FIRST_TRAINING_SEED + self.args.training_seeds))

    @cached_property
    def exact(self) -> dict[tuple[int, ...], Tensor]:
        """Where the flow takes both."""
        fine = log_snr(self.args.reference_steps, self.bench.sd.schedule)
        return {
            seeds: self.bench.traverse("unipc", fine, {}, self.guidance, seeds).latents["neutral"]
            for seeds in (self.training, self.held)
        }

    def say_how_long(self, names: Sequence[str]) -> None:
        """By the speed of this moment, if every try is made; a told time asks for 0.65 of a run."""
        steps, schedule = self.args.steps, self.bench.sd.schedule
        rows = self.args.reference_steps * (len(self.training) + len(self.held))
        for name in names:
            evaluations = SAMPLERS[name].evaluations_of(steps)
            fixed = len(spacing_search.fixed(SAMPLERS[name], steps, schedule))
            rows += evaluations * round(len(self.training) * (fixed + 0.83 * self.args.tries))
            rows += evaluations * len(self.held) * (fixed + 1)
        rows *= 1 if self.guidance == 1 else 2
        minutes = rows * samplers.seconds_a_row(self.bench) / 60
        print(f"{rows} U-Net rows at most: about {minutes:.1f} minutes at this moment's speed", flush=True)

    def run(self, name: str, timesteps: Levels, seeds: Sequence[int], taken: Sequence[Step] = ()) -> list[Step]:
        """All steps of a neutral run that goes on after those taken."""
        sd = self.bench.sd
        x, history = (taken[-1].x_prev, taken[-1].history) if taken else (initial_noise(seeds, sd.latent_shape), ())
        more = sd.sample(
            constant(self.bench.contexts["neutral"], len(timesteps)),
            seeds,
            guidance_scale=self.guidance,
            negative=self.bench.empty,
            sampler=name,
            spacing=timesteps,
            x_T=x,
            start=len(taken),
            history=history,
        )
        return [*taken, *more]

    def errors(self, name: str, timesteps: Levels, seeds: tuple[int, ...]) -> list[float]:
        """Of every seed."""
        return errors_by_seed(self.run(name, timesteps, seeds)[-1].x_prev, self.exact[seeds])

    def optimised(self, name: str) -> tuple[dict[str, Any], Errors]:
        """Search from the best fixed spacing, hold all to unseen seeds, print what came of it; for the file."""
        sd, args, began = self.bench.sd, self.args, time.perf_counter()
        candidates = spacing_search.fixed(SAMPLERS[name], args.steps, sd.schedule)
        tried = {spacing: self.errors(name, timesteps, self.training) for spacing, timesteps in candidates.items()}
        begin = candidates[min(tried, key=lambda spacing: float(np.median(tried[spacing])))]
        with tqdm(total=args.tries, desc=f"search for {name}", unit="run", mininterval=1) as bar:

            def run(timesteps: Levels, taken: Sequence[Step]) -> list[Step]:
                bar.update()
                return self.run(name, timesteps, self.training, taken)

            aim = spacing_search.Aim(run, self.exact[self.training], sd.schedule, self.tell)
            best = spacing_search.search(aim, begin, args.tries)
        trained = {**{spacing: mean_error(errors) for spacing, errors in tried.items()}, "found": best.error}
        verified = {
            spacing: self.errors(name, timesteps, self.held)
            for spacing, timesteps in {**candidates, "found": best.timesteps}.items()
        }
        fixed = min(candidates, key=lambda spacing: mean_error(verified[spacing]))
        ratio, low, high = ratio_interval(verified["found"], verified[fixed])
        print(table(trained, verified, f"{name}, {args.steps} steps, guidance {self.guidance:g}"))
        told = "smaller than" if low > 1 else "(no gain) beside"
        print(
            f"on {len(self.held)} unseen seeds {ratio:.2f} x [{low:.2f}, {high:.2f}] {told} the best fixed one, {fixed}"
        )
        return {
            **best.content(),
            "guidance": self.guidance,
            "weights_sha256": sd.weights_sha256(),
            "training_seeds": [self.training[0], self.training[-1]],
            "seeds": list(self.held),
            "errors": {spacing: mean_error(found) for spacing, found in verified.items()},
            "best_fixed": fixed,
            "times_smaller": {"value": ratio, "low": low, "high": high},
            "tried": best.tried,
            "seconds": round(time.perf_counter() - began),
        }, verified


def table(trained: Mapping[str, float], verified: Mapping[str, list[float]], what: str) -> str:
    """Error of every spacing on the seeds that levels were chosen by, and on those unseen; the best first."""
    lines = [f"{'spacing':20}{'chosen by':>12}{'held to':>12}   {what}"]
    for spacing, found in sorted(verified.items(), key=lambda item: mean_error(item[1])):
        lines.append(f"{spacing:20}{trained[spacing]:12.2e}{mean_error(found):12.2e}")
    return "\n".join(lines)


def of_all(verified: Mapping[tuple[str, str], list[float]]) -> str:
    """The best found beside the best fixed, over samplers; of samplers that take one evaluation a step alike."""

    def error(case: tuple[str, str]) -> float:
        return mean_error(verified[case])

    found = min((case for case in verified if case[1] == "found"), key=error)
    fixed = min((case for case in verified if case[1] != "found"), key=error)
    ratio, low, high = ratio_interval(verified[found], verified[fixed])
    return (
        f"of all: {found[0]} with the levels found, {error(found):.2e}, {ratio:.2f} x [{low:.2f}, {high:.2f}] beside "
        f"the best fixed, {' '.join(fixed)}, {error(fixed):.2e}"
    )


def _listed(timesteps: Sequence[float]) -> str:
    return ", ".join(f"{t:g}" for t in timesteps)


def _told(content: Mapping[str, Any]) -> str:
    return f", told {_listed(content['told'])}" if "told" in content else ""
