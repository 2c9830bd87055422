"""`ldm traverse --fast`: fewer steps, with the swaps at the noise levels where the usual 50 steps make them.

What it keeps of their trajectories is measured by `ldm bench traverse --fast`, and told in ldm/samplers/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ldm.samplers import SAMPLERS
from ldm.traversal.plan import SWAP_STEPS, Traversal

USUAL_STEPS = 50  # which `SWAP_STEPS` count


@dataclass(frozen=True)
class FewerSteps:
    """How to sample, and after how many steps each of `SWAP_STEPS` is made."""

    sampler: str
    spacing: str
    steps: int
    swap_steps: tuple[int, ...]

    @property
    def evaluations(self) -> int:
        """Of the network, for a seed and one attribute, neutral image included; guidance doubles what each costs."""
        return sum(SAMPLERS[self.sampler].evaluations_of(self.steps - at) for at in (0, *self.swap_steps))

    def options(self) -> dict[str, Any]:
        """As `Traversal` takes them."""
        return {name: getattr(self, name) for name in ("sampler", "spacing", "steps", "swap_steps")}

    def record(self) -> dict[str, Any]:
        """As run.json has it."""
        chosen = {**self.options(), "swap_steps": list(self.swap_steps)}
        return {**chosen, "evaluations_a_seed_and_attribute": self.evaluations}


USUAL = FewerSteps("ddim", "leading", USUAL_STEPS, SWAP_STEPS)
FAST = FewerSteps("ddim", "swaps_of_50", 23, (4, 7, 10, 12, 14, 16, 18, 20, 22))


def record(plan: Traversal) -> dict[str, Any]:
    """For run.json, where a plan is that of `FAST`: what was chosen, and what it stands for; else nothing."""
    if FewerSteps(plan.sampler, plan.spacing, plan.steps, plan.swap_steps) != FAST:
        return {}
    return {"fast": {**FAST.record(), "instead_of": USUAL.record()}}


def stands_for(run: dict[str, Any], swap_steps: Sequence[int]) -> tuple[int, ...] | None:
    """The swap steps of a run.json that stand for some of 50 steps; None where the run is none of --fast."""
    if "fast" not in run:
        return None
    pairs = dict(zip(run["fast"]["instead_of"]["swap_steps"], run["fast"]["swap_steps"], strict=True))
    return tuple(pairs[s] for s in swap_steps)
