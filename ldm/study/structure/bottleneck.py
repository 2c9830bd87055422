"""Directions inside the network: are they straighter at the bottleneck than in the latents?

Each seed is drawn under the neutral prompt and with every style swapped in at every swap step, and the same
trajectories are looked at in several spaces:

    z                 the final latents, where the paper measures directions
    PLACE, last step  the activation of a place at the last step
    x_t, all steps    the latents after each step, one after the other, as one long vector
    PLACE, all steps  the activations of all steps, likewise

Letters: A attributes, n seeds, M swap steps, S steps, R = 1 + A M rows of one seed, L tokens, D context width.
Source: Kwon et al. 2023 (arXiv:2210.10960), who report that edits are straight lines at `mid_block`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm import probe
from ldm.conditioning import constant, side_by_side, swap
from ldm.phantom.prompts import Cell
from ldm.pipeline import StableDiffusion
from ldm.study.metrics import directions, stats
from ldm.study.structure.domains import Prompts
from ldm.traversal.plan import SWAP_STEPS

Floats = NDArray[np.float64]


def scaled_swap_steps(steps: int) -> tuple[int, ...]:
    """The paper's swap steps, 5 to 45 of 50, at the same shares of another number of steps; each once."""
    return tuple(sorted({round(s * steps / 50) for s in SWAP_STEPS}))


def trajectories(
    sd: StableDiffusion,
    cell: Cell,
    seed: int,
    swap_steps: Sequence[int],
    places: Sequence[str],
    steps: int,
    guidance: float,
    done: Callable[[int], object] = lambda rows: None,
) -> dict[str, Tensor]:
    """One seed in every space.

    Returns: space -> (R, ...): the neutral row first, then each attribute's swap steps in turn.
    """
    prompts = Prompts.of(sd, cell)
    rows = [constant(prompts.neutral, steps)]
    rows += [swap(prompts.neutral, style, at, steps) for style in prompts.styles[:, None] for at in swap_steps]
    run = sd.sample(side_by_side(rows), [seed] * len(rows), guidance_scale=guidance, negative=prompts.empty)
    latents = []
    # Of a guided call the second half are the rows with the prompt.
    with probe.capture(sd.unet, *places, keep=lambda x: x[-len(rows) :].float().cpu()) as seen:
        for step in run:
            latents.append(step.x_prev.cpu())
            done(len(rows))
    spaces = {"z": step.x_prev.cpu()} | {f"{place}, last step": seen[place] for place in seen.runs}
    spaces["x_t, all steps"] = torch.stack(latents, dim=1)
    return spaces | {f"{place}, all steps": torch.stack(runs, dim=1) for place, runs in seen.runs.items()}


@dataclass(frozen=True, eq=False)
class Seen:
    """One seed in one space, per attribute."""

    cosines: Floats  # (A, M, M)
    geometry: tuple[Mapping[str, float], ...]  # A
    directions: Floats  # (A, M, ...) unit vectors, to be compared between seeds


def seen_in(space: Tensor, attributes: int, swap_steps: int) -> Seen:
    """Directions and paths of one seed: from neutral over late swaps to early ones.

    Args:    space: (R, ...) from `trajectories`.
    """
    neutral = space[0].double().numpy()
    swapped = space[1:].unflatten(0, (attributes, swap_steps)).double().numpy()
    paths = [np.concatenate([neutral[None], swaps[::-1]]) for swaps in swapped]
    moved = (swapped - neutral).reshape(attributes, swap_steps, -1)
    lengths = np.linalg.norm(moved, axis=-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        units = moved / lengths
    return Seen(
        np.stack([directions.cosine_matrix(neutral, swaps) for swaps in swapped]),
        tuple(directions.path_geometry(path) for path in paths),
        units.astype(np.float32),
    )


def report(seeds: Sequence[Seen], attribute: int, swap_steps: Sequence[int]) -> dict[str, object]:
    """One attribute in one space over seeds, for JSON.

    Returns: directions (see `directions.cosine_summary`), straightness (see `non_linearity`), shared: the
             mean cosine between the directions of two different seeds, by swap step: 1 means that one direction serves
             all.
    """
    matrices = np.stack([seen.cosines[attribute] for seen in seeds])
    return {
        "directions": directions.cosine_summary(matrices, swap_steps),
        "straightness": directions.non_linearity([seen.geometry[attribute] for seen in seeds], 1 + len(swap_steps)),
        "shared": shared([seen.directions[attribute] for seen in seeds]),
    }


def shared(units: Sequence[Floats]) -> list[float | None]:
    """The mean cosine between different seeds' directions, for each swap step.

    Args:    units: n of (M, ...) unit vectors.
    Returns: M values; null for fewer than two seeds, or a direction of length 0.
    """
    stacked = np.stack(units).reshape(len(units), len(units[0]), -1).astype(np.float64)
    n = len(stacked)
    if n < 2:
        return [None] * stacked.shape[1]
    # The square of a sum of unit vectors is n plus all pairs, each twice.
    pairs = (stacked.sum(axis=0) ** 2).sum(axis=-1) - n
    return [stats.or_none(value) for value in pairs / (n * (n - 1))]
