"""The evaluation from seeds to metrics.json, continued where it was cut off.

    OUT/seeds/<cell>/trajectories/seed0000.safetensors    latents, probabilities, distances of every seed
    OUT/seeds/<cell>/baselines_of_<n>/..., truth/...      the same for baselines and rendered patients
    OUT/metrics.json                                      what they say together

One seed is in memory at a time, whatever their number.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ldm.evaluation import baselines, summary, truth
from ldm.evaluation.cells import CLASS_HEAD, Cell
from ldm.evaluation.instruments import Instruments
from ldm.evaluation.processes import Processes
from ldm.evaluation.trajectories import FRAMES, SampleSeed, from_run, measure, sampled
from ldm.experiment import latent_shape
from ldm.latents import SeedFolder
from ldm.plan import Traversal

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
    def truth_plan(self) -> Traversal:
        """How rendered patients are edited."""
        return truth.retraceable(self.plan, self.truth_swap_steps, self.truth_guidance)


@dataclass(frozen=True, eq=False)
class Workplace:
    """What evaluates, and where."""

    instruments: Instruments
    out: Path
    processes: Processes
    max_batch: int | None = None

    def folder(self, task: Task, name: str, settings: Mapping[str, Any]) -> SeedFolder:
        """OUT/seeds/<cell>/<name>"""
        return SeedFolder(self.out / "seeds" / task.cell.name / name, settings)


def evaluate_cell(place: Workplace, task: Task) -> Json | None:
    """Measure what is missing of a cell, and summarise it.

    Returns: the cell's part of metrics.json; None in all processes but the first.
    Raises:  ValueError: the folder holds an evaluation with other settings, or the classifier does not know the
             attributes or the size of the images.
    """
    instruments, plan = place.instruments, task.plan
    heads = instruments.heads(tuple(plan.styles), CLASS_HEAD)
    instruments.check_size(latent_shape(instruments.sd, plan))
    votes = summary.Votes(instruments.classifier.attributes, heads, tuple(plan.styles))

    trajectories = place.folder(task, "trajectories", settings_of(instruments, plan))
    source: SampleSeed = from_run(task.run) if task.run else sampled(instruments, plan, place.max_batch)
    fill(trajectories, plan.seeds, lambda seed: measure(instruments, plan, source(seed)), place, task)
    found = stack(trajectories, plan.seeds)
    result: Json = summary.summarise(task.cell, votes, plan.swap_steps, task.averaged, found, instruments.lpips)
    if task.baseline_seeds:
        for name, reports in _baselines(place, task, votes, trajectories, found).items():
            result["attributes"][name]["baselines"] = reports
    if task.truth_seeds:
        for name, report in _truth(place, task, votes).items():
            result["attributes"][name]["truth"] = report
    return result if place.processes.first else None


def _baselines(
    place: Workplace, task: Task, votes: summary.Votes, trajectories: SeedFolder, found: summary.Arrays
) -> dict[str, Json]:
    """See `summary.compare_baselines`."""
    instruments, plan = place.instruments, task.plan
    seeds = plan.seeds[: task.baseline_seeds]
    settings = settings_of(instruments, plan) | {"averaged": list(task.averaged), "of_seeds": list(plan.seeds)}
    # The linear direction is a mean over all seeds: with more of them it is another baseline.
    folder = place.folder(task, f"baselines_of_{len(plan.seeds)}", settings)

    def latents(seed: int) -> tuple[Tensor, Tensor]:
        read = trajectories.read(seed, ["latents.neutral", "latents.swaps"])
        return read["latents.neutral"], read["latents.swaps"]

    @cache  # once, and only if a seed is missing
    def directions() -> tuple[Tensor, int]:
        return baselines.direction_sum(latents(seed) for seed in plan.seeds)

    def compare(seed: int) -> Mapping[str, Tensor]:
        return baselines.measure_baselines(
            instruments, plan, seed, *latents(seed), directions(), task.averaged, place.max_batch
        )

    fill(folder, seeds, compare, place, task)
    ours = {name: values[: len(seeds)] for name, values in found.items()}
    return summary.compare_baselines(votes, plan.swap_steps, task.averaged, ours, stack(folder, seeds))


def _truth(place: Workplace, task: Task, votes: summary.Votes) -> dict[str, Json]:
    """See `summary.summarise_truth`."""
    instruments, cell, plan = place.instruments, task.cell, task.truth_plan
    folder = place.folder(task, "truth", settings_of(instruments, plan) | truth.SETTINGS)
    others = truth.gallery(cell, instruments.classifier.input_size)
    seeds = range(task.truth_seeds)
    fill(
        folder,
        seeds,
        lambda seed: truth.measure_truth(instruments, cell, plan, seed, others, place.max_batch),
        place,
        task,
    )
    return summary.summarise_truth(votes, plan.swap_steps, task.averaged, stack(folder, seeds))


def settings_of(instruments: Instruments, plan: Traversal) -> Json:
    """Everything that one seed's numbers depend on."""
    settings = {
        **asdict(plan),
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
    place.processes.wait()  # all have looked before any writes
    mine = place.processes.share([seed for seed in seeds if seed not in done])
    label = f"{task.cell.name}: {folder.folder.name}"
    for seed in tqdm(mine, desc=label, unit="seed", mininterval=1, disable=not place.processes.first):
        folder.write(seed, compute(seed))
    place.processes.wait()


def stack(folder: SeedFolder, seeds: Sequence[int]) -> dict[str, NDArray[np.float64]]:
    """All that was measured, but for the latents: name -> (n, ...), seeds in the order given."""
    rows = [folder.read(seed, folder.names(seed, but="latents.")) for seed in seeds]
    return {name: np.stack([row[name].double().numpy() for row in rows]) for name in rows[0]}
