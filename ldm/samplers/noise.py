"""Random numbers that belong to a seed, not to a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


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


def step_noise(seeds: Sequence[int], shape: Sequence[int]) -> SeedNoise:
    """The noise that random samplers add; seeds, shape: as for `initial_noise`."""
    return SeedNoise(seeds, shape)


class SeedNoise:
    """The noise that random samplers add, a function of seed, step and draw alone.

    Random access instead of a running stream: a branch that starts at step 20 gets the same z as the
    run that it left, and branches of one seed stay comparable.

    Args:    seeds, shape: as for `initial_noise`.
    Returns: noise(step, draw) -> (B, *shape) float32 on the CPU; draw 0 is a step's first.
    Raises:  ValueError: no seeds, or a seed out of range.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int]) -> None:
        _check_seeds(seeds)
        self.seeds, self.shape = seeds, shape
        self._unique = list(dict.fromkeys(seeds))
        self._normal = lru_cache(maxsize=2 * DEPTH)(self._fresh_normal)
        self._path = lru_cache(maxsize=4)(self._fresh_path)  # a step begins where the one before ended

    def __call__(self, step: int, /, draw: int = 0) -> Tensor:
        # SeedSequence hashes the numbers: seed + step would give seed 7's step 1 to seed 8's step 0.
        names = [(seed, step, draw) if draw else (seed, step) for seed in self.seeds]
        mixed = [int(np.random.SeedSequence(name).generate_state(1)[0]) for name in names]
        return initial_noise(mixed, self.shape)

    def between(self, noisier: float, cleaner: float) -> Tensor:
        """What each seed's Brownian path B(time), time = e^(2 log_snr), does between two log_snr: standard normal.

        z = (B(cleaner) - B(noisier)) / sqrt(its variance): (B, *shape) float32; zeros between equal levels. The path is
        there before it is asked for, to 1e-8 in log_snr, so results depend neither on the order nor on the number of
        questions.
        """
        (begin, before), (end, after) = self._path(noisier), self._path(cleaner)
        change = (after - before) / math.sqrt(end - begin) if end > begin else torch.zeros_like(after)
        return change[[self._unique.index(seed) for seed in self.seeds]].float()

    def _fresh_path(self, log_snr: float) -> tuple[float, Tensor]:
        """Time and B there: halving an interval, B in the middle is a Brownian bridge between its ends."""
        sought = min(max(round((log_snr - LOWEST) / (HIGHEST - LOWEST) * 2**DEPTH), 0), 2**DEPTH)
        (low, time), (high, last) = (0, _time(0)), (2**DEPTH, _time(2**DEPTH))
        value = math.sqrt(time) * self._normal(1)
        ahead = value + math.sqrt(last - time) * self._normal(2)
        node = 2
        while low < sought < high:
            node, middle = 2 * node, (low + high) // 2
            now = _time(middle)
            share = (now - time) / (last - time)
            between = value + share * (ahead - value) + math.sqrt(share * (last - now)) * self._normal(node)
            if sought < middle:
                high, last, ahead = middle, now, between
            else:
                low, time, value, node = middle, now, between, node + 1
        return (last, ahead) if sought == high else (time, value)

    def _fresh_normal(self, node: int) -> Tensor:
        """The normal of a node of the tree of intervals; four numbers, so that no `__call__` draws it too."""
        mixed = [int(np.random.SeedSequence((seed, 0, 0, node)).generate_state(1)[0]) for seed in self._unique]
        return initial_noise(mixed, self.shape).double()


LOWEST, HIGHEST, DEPTH = -16.0, 16.0, 31  # the path's span in log_snr, and how often it is halved


def _time(cell: int) -> float:
    """e^(2 log_snr) at a mark of the span."""
    return math.exp(2 * (LOWEST + (HIGHEST - LOWEST) * cell / 2**DEPTH))


def _check_seeds(seeds: Sequence[int]) -> None:
    if len(seeds) == 0 or not all(0 <= seed < 2**32 for seed in seeds):
        raise ValueError(f"seeds: expected at least one, each in 0..2^32-1, got {list(seeds)}")
