"""Random numbers that belong to a seed, not to a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ldm.samplers.driver import Noise


def initial_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """x_T, each sample from a CPU generator of its own.

    So a seed names an image, whatever else is in the batch and wherever the network runs. Drawing a
    batch from one generator, or on the device, is why other tools give other images for one seed.

    Args:    seeds: one a sample, 0 .. 2^32-1 (torch's CPU generator ignores higher bits).
             shape: of one sample, (4, H/8, W/8).
    Returns: (B, *shape) float32 on the CPU: move it afterwards.
    Raises:  ValueError: no seeds, or a seed out of range.
    """
    _check_seeds(seeds)
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds])


def step_noise(seeds: Sequence[int], shape: Sequence[int]) -> Noise:
    """The noise that random samplers add, a function of seed, step and draw alone.

    Random access instead of a running stream: a branch that starts at step 20 gets the same z as the
    run that it left, and branches of one seed stay comparable.

    Args:    seeds, shape: as for `initial_noise`.
    Returns: noise(step, draw) -> (B, *shape) float32 on the CPU; draw 0 is a step's first.
    Raises:  ValueError: no seeds, or a seed out of range.
    """
    _check_seeds(seeds)

    def noise(step: int, draw: int = 0) -> Tensor:
        # SeedSequence hashes the numbers: seed + step would give seed 7's step 1 to seed 8's step 0.
        names = [(seed, step, draw) if draw else (seed, step) for seed in seeds]
        mixed = [int(np.random.SeedSequence(name).generate_state(1)[0]) for name in names]
        return initial_noise(mixed, shape)

    return noise


def _check_seeds(seeds: Sequence[int]) -> None:
    if len(seeds) == 0 or not all(0 <= seed < 2**32 for seed in seeds):
        raise ValueError(f"seeds: expected at least one, each in 0..2^32-1, got {list(seeds)}")
