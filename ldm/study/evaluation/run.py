"""The evaluation from seeds to metrics.json, continued where it was cut off.

    OUT/seeds/<cell>/trajectories/seed0000.safetensors    latents, probabilities, distances of every seed
    OUT/seeds/<cell>/baselines_of_<n>/..., truth/...      the same for baselines and rendered patients
    OUT/metrics.json                                      what they say together

One seed is in memory at a time, whatever their number.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ldm.phantom.prompts import Cell
from ldm.study.evaluation import baselines, summary, truth
from ldm.study.evaluation.cells import CLASS_HEAD
from ldm.study.evaluation.instruments import Instruments
from ldm.study.evaluation.trajectories import (
    CURVE_POINTS,
    FRAMES,
    SampleSeed,
    check_run,
    from_run,
    measure,
    sampled,
    stacked,
)
from ldm.study.evaluation.workers import Worker
from ldm.traversal.plan import Traversal
from ldm.traversal.sampling import latent_shape
from ldm.traversal.store import SeedFolder

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One cell to evaluate."""

    cell: Cell
    plan: Traversal
    run: Path | None = None  # a finished traversal to take the latents from; None: sample them
    averaged: tuple[int, ...] = (5, 10, 15)  # the swap steps that CFRT averages   [authors' code]
    baseline_seeds: int = 0  # so many of the plan's seeds
    truth_seeds: int = 0  # rendered patients 0 .. truth_seeds - 1
    truth_swap_steps: tuple[int, ...] = (5, 10, 15, 25, 35)
    truth_guidance: float = 1.0
    judged: Mapping[str, str] | None = None  # style -> the classifier's name of it; None: every style, by its own

    def __post_init__(self) -> None:
        """Everything that can be wrong before a network is at hand."""
        if missing := sorted(set(self.averaged) - set(self.plan.swap_steps)):
            raise ValueError(f"swap steps: {missing} are not among the trajectory's, {list(self.plan.swap_steps)}")
        if len(self.plan.seeds) < 2 and self.baseline_seeds:
            raise ValueError("baseline seeds: the linear direction is a mean over other seeds, expected two or more")
        if self.truth_seeds and self.cell.domain is None:
            raise ValueError(f"truth seeds: {self.cell.name!r} is not a cell of phantoms, which alone have a truth")
        if missing := sorted(set(self.averaged) - set(self.truth_swap_steps)) if self.truth_seeds else []:
            raise ValueError(f"truth swap steps: expected {list(self.averaged)} among them, missing {missing}")

    @property
    def judges(self) -> dict[str, str]:
        """Style -> the classifier's attribute that looks for it, in the plan's order; a style may have none."""
        judged = {style: style for style in self.plan.styles} if self.judged is None else self.judged
        return {style: judged[style] for style in self.plan.styles if style in judged}

    @property
    def truth_plan(self) -> Traversal:
        """How rendered patients are edited."""
        return truth.retraceable(self.plan, self.truth_swap_steps, self.truth_guidance)


@dataclass(frozen=True, eq=False)
class Workplace:
    """What evaluates, and where."""

    instruments: Instruments
    out: Path
    worker: Worker

    def trajectories(self, task: Task) -> SeedFolder:
        """What was measured on every seed. Raises ValueError where it was measured with other settings."""
        return self._folder(task, "trajectories", settings_of(self.instruments, task.plan))

    def baselines(self, task: Task) -> SeedFolder:
        """The same of the baselines."""
        seeds = list(task.plan.seeds)
        settings = settings_of(self.instruments, task.plan) | {"averaged": list(task.averaged), "of_seeds": seeds}
        # The linear direction is a mean over all seeds: with more of them it is another baseline.
        return self._folder(task, f"baselines_of_{len(seeds)}", settings)

    def truth(self, task: Task) -> SeedFolder:
        """The same of the rendered patients."""
        return self._folder(task, "truth", settings_of(self.instruments, task.truth_plan) | truth.SETTINGS)

    def _folder(self, task: Task, name: str, settings: Mapping[str, Any]) -> SeedFolder:
        return SeedFolder(self.out / "seeds" / task.cell.name / name, settings)


def check(tasks: Sequence[Task], places: Mapping[str, Workplace]) -> None:
    """Everything that can be refused before anything is sampled or measured, which may take days.

    Args:    places: by the cell's name.
    Raises:  ValueError: a classifier does not know the attributes or the size of the images; a run lacks seeds, was
             made with other weights, or is no longer the one that was measured; the folder holds an evaluation with
             other settings.
    """
    for task in tasks:
        instruments = places[task.cell.name].instruments
        instruments.heads(tuple(task.judges.values()), CLASS_HEAD)
        instruments.check_size(latent_shape(instruments.sd, task.plan))
        if task.run:
            check_run(task.run, task.plan.seeds, instruments.sd)
    for task in tasks:
        place = places[task.cell.name]
        measured = place.trajectories(task)
        if task.run:
            _check_unchanged(task.run, task.plan, measured)
        if task.baseline_seeds:
            place.baselines(task)
        if task.truth_seeds:
            place.truth(task)


def _check_unchanged(run: Path, plan: Traversal, measured: SeedFolder) -> None:
    """ValueError where a seed's latents are not those that were measured: the run was made anew in the same folder."""
    now = from_run(run)
    for seed in sorted(measured.seeds() & set(plan.seeds)):
        latents = now(seed)
        neutral, swaps = read_latents(measured, seed)
        if not (torch.equal(latents["neutral"], neutral) and torch.equal(stacked(latents, plan), swaps)):
            raise ValueError(f"{run}: seed {seed} is no longer what {measured.folder} was measured on; use a new --out")


def read_latents(folder: SeedFolder, seed: int) -> tuple[Tensor, Tensor]:
    """One seed's neutral latent (C, H, W) and swaps (A, S, C, H, W)."""
    read = folder.read(seed, ["latents.neutral", "latents.swaps"])
    return read["latents.neutral"], read["latents.swaps"]


def evaluate_cell(place: Workplace, task: Task) -> Json | None:
    """Measure what is missing of a cell, and summarise it.

    Returns: the cell's part of metrics.json; None in all processes but the first.
    Raises:  ValueError: see `check`.
    """
    check([task], {task.cell.name: place})
    instruments, plan = place.instruments, task.plan
    heads = instruments.heads(tuple(task.judges.values()), CLASS_HEAD)
    votes = summary.Votes(instruments.attributes, heads, tuple(plan.styles), task.judges)

    trajectories = place.trajectories(task)
    source: SampleSeed = from_run(task.run) if task.run else sampled(instruments, plan)
    fill(trajectories, plan.seeds, lambda seed: measure(instruments, plan, source(seed)), place, task)
    measured = stack(trajectories, plan.seeds)
    result: Json = summary.summarise(task.cell, votes, plan.swap_steps, task.averaged, measured, instruments.lpips)
    if task.run:
        result["redrawn"] = f"{CURVE_POINTS} points, where the folder's own curve has {plan.bezier_points}"
    if plan.fast:
        result["fast"] = True
    if task.baseline_seeds:
        for name, reports in _baselines(place, task, votes, trajectories, measured).items():
            result["attributes"][name]["baselines"] = reports
    if task.truth_seeds:
        for name, report in _truth(place, task, votes).items():
            result["attributes"][name]["truth"] = report
    return result if place.worker.first else None


def _baselines(
    place: Workplace, task: Task, votes: summary.Votes, trajectories: SeedFolder, measured: summary.Arrays
) -> dict[str, Json]:
    """See `summary.compare_baselines`."""
    instruments, plan = place.instruments, task.plan
    seeds = plan.seeds[: task.baseline_seeds]
    folder = place.baselines(task)

    @cache  # once, and only if a seed is missing
    def directions() -> tuple[Tensor, int]:
        return baselines.direction_sum(read_latents(trajectories, seed) for seed in plan.seeds)

    def compare(seed: int) -> Mapping[str, Tensor]:
        latents = read_latents(trajectories, seed)
        return baselines.measure_baselines(instruments, plan, seed, *latents, directions(), task.averaged)

    fill(folder, seeds, compare, place, task)
    ours = {name: values[: len(seeds)] for name, values in measured.items()}
    return summary.compare_baselines(votes, plan.swap_steps, task.averaged, ours, stack(folder, seeds))


def _truth(place: Workplace, task: Task, votes: summary.Votes) -> dict[str, Json]:
    """See `summary.summarise_truth`."""
    instruments, cell, plan = place.instruments, task.cell, task.truth_plan
    folder = place.truth(task)
    others = truth.gallery(cell, latent_shape(instruments.sd, plan)[-1] * instruments.sd.config.vae.downscale)
    seeds = range(task.truth_seeds)
    fill(
        folder,
        seeds,
        lambda seed: truth.measure_truth(instruments, cell, plan, seed, others),
        place,
        task,
    )
    return summary.summarise_truth(votes, plan.swap_steps, task.averaged, stack(folder, seeds))


def settings_of(instruments: Instruments, plan: Traversal) -> Json:
    """Everything that one seed's numbers depend on."""
    settings = {
        **plan.settings(),
        **instruments.fingerprint,
        "latent_size": list(latent_shape(instruments.sd, plan)[1:]),
        "frames": [FRAMES[0], FRAMES[-1]],
    }
    del settings["seeds"], settings["bezier_points"], settings["keep"]
    return settings


def fill(
    folder: SeedFolder,
    seeds: Sequence[int],
    compute: Callable[[int], Mapping[str, Tensor]],
    place: Workplace,
    task: Task,
) -> None:
    """Compute the seeds that a folder lacks, this process its share, and wait for the others."""
    done = folder.seeds()
    place.worker.wait()  # all have looked before any writes
    mine = place.worker.share([seed for seed in seeds if seed not in done])
    label = f"{task.cell.name}: {folder.folder.name}"
    for seed in tqdm(mine, desc=label, unit="seed", mininterval=1, disable=not place.worker.first):
        folder.write(seed, compute(seed))
    place.worker.wait()


def stack(folder: SeedFolder, seeds: Sequence[int]) -> dict[str, NDArray[np.float64]]:
    """All that was measured, but for the latents: name -> (n, ...), seeds in the order given."""
    rows = [folder.read(seed, folder.names(seed, but="latents.")) for seed in seeds]
    return {name: np.stack([row[name].double().numpy() for row in rows]) for name in rows[0]}
