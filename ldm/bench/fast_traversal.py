"""What `ldm traverse --fast` keeps of trajectories: directions, flips, lengths, seed by seed.

The same noises are traversed both ways, and their swaps compared:

    cosine    between z_s - z of the fast run and of the usual one, z the neutral latent and z_s the swapped one
    length    |z_s - z| of the fast run over that of the usual one
    error     |z - z'| / |z'| of the neutral latents, which both take all steps to
    cfrt      of both, by the shipped classifier, and the difference on the same seeds

Letters: A attributes, S swap steps, M of them averaged by CFRT, K heads, n seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.bench.rows import RowFile
from ldm.bench.sampler_statistics import directions, errors_by_seed
from ldm.phantom.prompts import Cell
from ldm.study.evaluation import steps
from ldm.study.evaluation.cells import CLASS_HEAD
from ldm.study.evaluation.instruments import Instruments
from ldm.study.evaluation.summary import Votes
from ldm.study.metrics import stats
from ldm.study.metrics.cfrt import READINGS, successes
from ldm.traversal.following import evaluations
from ldm.traversal.plan import SWAP_STEPS, Traversal
from ldm.traversal.sampling import prompt_tree, rows_a_seed, sample, swap_name

Json = dict[str, Any]
Progress = Callable[[int], object]
GOALS = {"cosine": 0.98, "cfrt": 0.02, "fewer_evaluations": 2.5}  # at least, at most, at least


@dataclass(frozen=True, eq=False)
class Comparison:
    """One cell, by its model and its classifier, at one guidance."""

    cell: Cell
    instruments: Instruments
    guidance: float
    how: Mapping[str, Any] = field(default_factory=lambda: {"fast": True})  # the other run, as `Traversal` takes it

    def plan(self, seed: int, fast: bool) -> Traversal:
        """How one seed is traversed, either way."""
        common: Json = {"neutral": self.cell.neutral, "styles": self.cell.styles, "guidance": self.guidance}
        return Traversal(seeds=(seed,), bezier_points=0, **common, **(self.how if fast else {}))

    @property
    def settings(self) -> Json:
        """All that the rows of this cell depend on."""
        both = {name: self.plan(0, fast).settings() for name, fast in (("fast", True), ("usual", False))}
        return {**both, **self.instruments.fingerprint}

    @cached_property
    def rows_a_seed(self) -> int:
        """Through the U-Net, guidance's second half not counted."""
        return sum(self._rows(fast) for fast in (False, True))

    def _rows(self, fast: bool) -> int:
        plan = self.plan(0, fast)
        return rows_a_seed(plan, prompt_tree(self.instruments.sd, plan))

    def measure(self, seed: int, progress: Progress) -> Json:
        """One seed both ways: cosines and lengths (A, S), error, and what the classifier says of either."""
        usual, fast = (self._traversed(seed, fast, progress) for fast in (False, True))
        cosines, lengths = [], []
        for name in self.cell.styles:
            true = usual["swaps"][name] - usual["neutral"]
            cosine, length = directions(fast["swaps"][name], fast["neutral"].expand_as(true), true)
            cosines.append(cosine)
            lengths.append(length)
        return {
            "cosines": cosines,
            "lengths": lengths,
            "error": errors_by_seed(fast["neutral"], usual["neutral"])[0],
            "probabilities": {"usual": self._seen(usual), "fast": self._seen(fast)},
        }

    def _traversed(self, seed: int, fast: bool, progress: Progress) -> dict[str, Any]:
        """The neutral latent (1, C, H, W), and of every style those of its swaps (S, C, H, W), early ones first."""
        plan, sd = self.plan(seed, fast), self.instruments.sd
        latents = sample(sd, plan, prompt_tree(sd, plan), [seed], progress=progress).latents
        swaps = {a: torch.cat([latents[swap_name(a, s)] for s in plan.swap_steps]) for a in plan.styles}
        return {"neutral": latents["neutral"], "swaps": swaps}

    def _seen(self, latents: Mapping[str, Any]) -> Json:
        """Probabilities of the neutral image (K,), and of the swaps that CFRT averages (A, M, K)."""
        columns = [SWAP_STEPS.index(s) for s in steps.AVERAGED]
        looked: list[Tensor] = [
            self.instruments.probabilities(self.instruments.pixels(images))
            for images in (latents["neutral"], *(swaps[columns] for swaps in latents["swaps"].values()))
        ]
        return {"neutral": looked[0][0].tolist(), "swaps": [found.tolist() for found in looked[1:]]}


def measure_all(comparisons: Sequence[Comparison], seeds: Sequence[int], file: RowFile, progress: Progress) -> None:
    """A row for every seed of every cell, seed by seed; what the file holds is not measured again."""
    for seed in seeds:
        for comparison in comparisons:
            name = {"cell": comparison.cell.name, "seed": seed}
            if name in file:
                progress(comparison.rows_a_seed)
            else:
                file.add({**name, **comparison.measure(seed, progress)})


def summarise(comparison: Comparison, rows: Sequence[Json]) -> Json:
    """What a cell's seeds say together: attribute -> cosine, length, cfrt, difference; and the neutral error."""
    cell, instruments = comparison.cell, comparison.instruments
    cosines, lengths = (np.array([row[name] for row in rows], np.float64) for name in ("cosines", "lengths"))
    verdicts = {way: _verdicts(comparison, rows, way) for way in ("usual", "fast")}
    attributes = {}
    for a, name in enumerate(cell.styles):
        by_step = cosines[:, a].mean(axis=0)
        attributes[name] = {
            "cosine": stats.mean(cosines[:, a].mean(axis=1)),
            "cosine_per_swap_step": by_step.tolist(),
            "least_cosine": {"value": float(by_step.min()), "swap_step": SWAP_STEPS[int(by_step.argmin())]},
            "length": stats.mean(lengths[:, a].mean(axis=1)),
            "cfrt": {way: _shares(found[name]) for way, found in verdicts.items()},
            "difference": {
                reading: stats.paired_cluster_bootstrap(
                    verdicts["fast"][name][reading], verdicts["usual"][name][reading], np.arange(len(rows))
                )
                for reading in READINGS
            },
        }
    return {
        "n": len(rows),
        "seeds": [row["seed"] for row in rows],
        "guidance": comparison.guidance,
        "weights_sha256": instruments.fingerprint["weights_sha256"],
        "classifier_sha256": instruments.fingerprint["classifier_sha256"],
        "evaluations": {"fast": evaluations(fast=True), "usual": evaluations(fast=False)},
        "error": stats.mean([row["error"] for row in rows]),
        "attributes": attributes,
    }


def _verdicts(comparison: Comparison, rows: Sequence[Json], way: str) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Attribute -> reading of CFRT -> success of every seed."""
    instruments, styles = comparison.instruments, tuple(comparison.cell.styles)
    votes = Votes(instruments.attributes, instruments.heads(styles, CLASS_HEAD), styles)
    seen = [row["probabilities"][way] for row in rows]
    neutral, swaps = (np.array([row[name] for row in seen], np.float64) for name in ("neutral", "swaps"))
    return votes.of_styles(successes(**votes.arguments(neutral, swaps)))


def _shares(verdicts: Mapping[str, NDArray[np.float64]]) -> Json:
    return {reading: stats.share(found) for reading, found in verdicts.items()}
