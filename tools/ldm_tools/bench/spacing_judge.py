"""A search for levels on a network: by some seeds, held to others, and on disk round by round.

OUT/SAMPLER_STEPS.jsonl has a line for the fixed spacings, one for the begin of the search and for every round, and one
for what came of it on unseen seeds. A search that was cut off goes on behind its last line; on the same machine it
ends in the same file.
"""

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count, takewhile
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from ldm.bench import samplers, spacing_search
from ldm.bench.rows import RowFile
from ldm.bench.sampler_statistics import errors_by_seed, mean_error, ratio_interval
from ldm.bench.spacing_search import Levels, Stage
from ldm.conditioning import constant
from ldm.samplers import SAMPLERS, Step
from ldm.samplers.noise import initial_noise
from ldm.schedule import log_snr, told_at
from ldm.traversal.plan import parse_integers

FIRST_TRAINING_SEED = 1_000_000  # those that levels are chosen by; --seeds are those that they are held to
HELD_SEEDS = "0-7"
FIXED, HELD = {"part": "fixed"}, {"part": "held"}  # rows of the file; and those of rounds
Errors = dict[str, list[float]]  # spacing -> of every seed


def training_seeds(args: argparse.Namespace) -> tuple[int, ...]:
    """Seeds to choose by."""
    return tuple(range(FIRST_TRAINING_SEED, FIRST_TRAINING_SEED + args.training_seeds))


def held_seeds(args: argparse.Namespace) -> tuple[int, ...]:
    """Seeds unseen."""
    return parse_integers(args.seeds or HELD_SEEDS, "--seeds")


@dataclass(frozen=True, eq=False)
class Judge:
    """A network, the seeds that levels are chosen by, and those that they are held to.

    told: what else the network and the samplers are made of, such as files of your own.
    """

    bench: samplers.Bench
    args: argparse.Namespace
    told: Mapping[str, Any]

    @cached_property
    def guidance(self) -> float:
        """The only one."""
        return self.bench.comparison.guidances[0]

    @property
    def tell(self) -> bool:
        """Whether told times are searched, too."""
        return getattr(self.bench.sd.unet, "prediction", "eps") == "eps"

    @cached_property
    def held(self) -> tuple[int, ...]:
        """Seeds unseen."""
        return held_seeds(self.args)

    @cached_property
    def training(self) -> tuple[int, ...]:
        """Seeds to choose by."""
        return training_seeds(self.args)

    @cached_property
    def exact(self) -> dict[tuple[int, ...], Tensor]:
        """Where the flow takes both."""
        fine = log_snr(self.args.reference_steps, self.bench.sd.schedule)
        return {
            seeds: self.bench.traverse("unipc", fine, {}, self.guidance, seeds).latents["neutral"]
            for seeds in (self.training, self.held)
        }

    # ---- the file ------------------------------------------------------------------------------------

    def file(self, name: str) -> RowFile:
        """What is known of the search for a sampler. Raises ValueError where it is of other settings."""
        sd, args, method = self.bench.sd, self.args, SAMPLERS[name]
        settings = {
            **dict(self.told),
            "weights_sha256": sd.weights_sha256(),
            "dtype": str(sd.dtype).removeprefix("torch."),
            "device": str(sd.device),
            "max_batch": sd.max_batch,
            "neutral": self.bench.comparison.neutral,
            "guidance": self.guidance,
            "sampler": [name, method.order, method.evaluations],
            "spacings": {spacing: _both(levels) for spacing, levels in self.candidates(name).items()},
            "training_seeds": self.training,
            "seeds": self.held,
            "reference_steps": args.reference_steps,
            "tries": args.tries,
        }
        return RowFile(args.out / f"{name}_{args.steps}.jsonl", settings, ("part", "round"))

    def candidates(self, name: str) -> dict[str, Levels]:
        """The fixed spacings: the best is where the search begins."""
        return spacing_search.fixed(SAMPLERS[name], self.args.steps, self.bench.sd.schedule)

    def say_how_long(self, files: Mapping[str, RowFile]) -> None:
        """By the speed of this moment, if every try is made; a told time asks for 0.65 of a run."""
        known = sum(len(file.rows) for file in files.values())
        rows = sum(self._rows_left(name, file) for name, file in files.items())
        if known:
            print(f"{known} rounds and parts are read from {', '.join(str(file.path) for file in files.values())}")
        if rows:
            rows += self.args.reference_steps * (len(self.training) + len(self.held))
            rows *= 1 if self.guidance == 1 else 2
            minutes = rows * samplers.seconds_a_row(self.bench) / 60
            print(
                f"{rows} U-Net rows at most: about {minutes:.1f} minutes at this moment's speed; a search that is cut "
                "off goes on",
                flush=True,
            )

    def _rows_left(self, name: str, file: RowFile) -> int:
        if HELD in file:
            return 0
        stage, fixed = last_stage(file), len(self.candidates(name))
        tries = 0 if stage and stage.done else self.args.tries - (stage.found.tried if stage else 0)
        chosen = len(self.training) * ((0 if FIXED in file else fixed) + 0.83 * tries)
        return SAMPLERS[name].evaluations_of(self.args.steps) * (round(chosen) + len(self.held) * (fixed + 1))

    # ---- the search ----------------------------------------------------------------------------------

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

    def errors(self, name: str, spacings: Mapping[str, Levels], seeds: tuple[int, ...]) -> dict[str, Any]:
        """A row: of every spacing and seed, and the seconds that it took."""
        began = time.perf_counter()
        found = {
            spacing: errors_by_seed(self.run(name, levels, seeds)[-1].x_prev, self.exact[seeds])
            for spacing, levels in spacings.items()
        }
        return {"errors": found, "seconds": time.perf_counter() - began}

    def searched(self, name: str, begin: Levels, file: RowFile) -> Stage:
        """The last stage of the search; each that comes is written."""
        known, rounds = last_stage(file), len(list(rounds_of(file)))
        if known is not None and known.done:
            return known
        tried = known.found.tried - 1 if known else 0  # a search that goes on repeats one run
        with tqdm(total=self.args.tries, initial=tried, desc=f"search for {name}", unit="run", mininterval=1) as bar:

            def run(timesteps: Levels, taken: Sequence[Step]) -> list[Step]:
                bar.update()
                return self.run(name, timesteps, self.training, taken)

            aim = spacing_search.Aim(run, self.exact[self.training], self.bench.sd.schedule, self.tell)
            began = time.perf_counter()
            for k, stage in enumerate(spacing_search.stages(aim, begin, self.args.tries, known), start=rounds):
                file.add({"part": "round", "round": k, **stage.content(), "seconds": time.perf_counter() - began})
                began = time.perf_counter()
        return stage

    def optimised(self, name: str, file: RowFile) -> tuple[dict[str, Any], Errors]:
        """Search from the best fixed spacing, hold all to unseen seeds, print what came of it; for the file."""
        candidates = self.candidates(name)
        tried: Errors = file.get(FIXED, partial(self.errors, name, candidates, self.training))["errors"]
        begin = candidates[min(tried, key=lambda spacing: float(np.median(tried[spacing])))]
        best = self.searched(name, begin, file).found
        all_of_them = {**candidates, "found": best.timesteps}
        verified: Errors = file.get(HELD, partial(self.errors, name, all_of_them, self.held))["errors"]
        trained = {**{spacing: mean_error(errors) for spacing, errors in tried.items()}, "found": best.error}
        fixed = min(candidates, key=lambda spacing: mean_error(verified[spacing]))
        ratio, low, high = ratio_interval(verified["found"], verified[fixed])
        print(table(trained, verified, f"{name}, {self.args.steps} steps, guidance {self.guidance:g}"))
        told = "smaller than" if low > 1 else "(no gain) beside"
        print(
            f"on {len(self.held)} unseen seeds {ratio:.2f} x [{low:.2f}, {high:.2f}] {told} the best fixed one, {fixed}"
        )
        return {
            **best.content(),
            "guidance": self.guidance,
            "weights_sha256": self.bench.sd.weights_sha256(),
            "training_seeds": [self.training[0], self.training[-1]],
            "seeds": list(self.held),
            "errors": {spacing: mean_error(found) for spacing, found in verified.items()},
            "best_fixed": fixed,
            "times_smaller": {"value": ratio, "low": low, "high": high},
            "tried": best.tried,
            "seconds": round(sum(row["seconds"] for row in file.rows.values())),
        }, verified


def rounds_of(file: RowFile) -> Iterator[dict[str, Any]]:
    """The rows of the search itself, one after the other."""
    names = ({"part": "round", "round": k} for k in count())
    return (file[name] for name in takewhile(file.__contains__, names))


def last_stage(file: RowFile) -> Stage | None:
    """Where the search stands; None before its begin."""
    rows = list(rounds_of(file))
    return Stage.read(rows[-1]) if rows else None


def table(trained: Mapping[str, float], verified: Mapping[str, list[float]], what: str) -> str:
    """Error of every spacing on the seeds that levels were chosen by, and on those unseen; the best first."""
    lines = [f"{'spacing':20}{'chosen by':>12}{'held to':>12}   {what}"]
    for spacing, found in sorted(verified.items(), key=lambda item: mean_error(item[1])):
        lines.append(f"{spacing:20}{trained[spacing]:12.2e}{mean_error(found):12.2e}")
    return "\n".join(lines)


def _both(levels: Levels) -> list[list[float]]:
    """Timesteps, and the times told."""
    return [[float(t) for t in levels], [float(told_at(t)) for t in levels]]
