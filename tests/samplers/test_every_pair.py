"""Every sampler with every spacing under the prompt tree, on a cheap eps: finite, counted, the same in any batch."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import cycle

import pytest
import torch
from torch import Tensor

from ldm.conditioning import Contexts
from ldm.samplers import SAMPLERS, History, Sampler, Step, initial_noise, step_noise
from ldm.samplers.noise import SeedNoise
from ldm.schedule import EVEN_SPACINGS, SPACINGS, Schedule
from ldm.traversal.prompt_tree import Branch, TreeResult, traverse_tree, unet_rows

SCHEDULE, SHAPE = Schedule.sd15(), (1, 2, 2)
COUNTS = (2, 3, 5, 10, 50)  # of steps; 1 and 6 in the batch's test
LARGE = (250, 999, 1000)


def spacings_of(name: str) -> tuple[str, ...]:
    return EVEN_SPACINGS if SAMPLERS[name].even else tuple(SPACINGS)


PAIRS = [(name, spacing) for name in SAMPLERS for spacing in spacings_of(name)]


@cache
def levels(spacing: str, steps: int) -> tuple[float, ...]:
    return tuple(SPACINGS[spacing](steps, SCHEDULE))


@cache
def noise_of(seeds: tuple[int, ...]) -> SeedNoise:
    """Its path kept: samplers ask for the same levels of it."""
    noise = step_noise(seeds, SHAPE)
    noise.between = cache(noise.between)
    return noise


class GaussianEps:
    """The exact eps of data of width 0.5 around the context; rows: evaluated so far."""

    def __init__(self, contexts: Contexts) -> None:
        self.contexts, self.rows = contexts, 0

    def __call__(self, x_t: Tensor, t: float, step: int, rows: slice = slice(None)) -> Tensor:
        self.rows += len(x_t)
        a_t = SCHEDULE.alphas_cumprod_at(t)
        mean = a_t**0.5 * self.contexts.at(step)[rows, :, :, None]
        return (1 - a_t) ** 0.5 * (x_t - mean) / (a_t / 4 + 1 - a_t)

    def row(self, i: int) -> Callable[[Tensor, float, int], Tensor]:
        return lambda x_t, t, step: self(x_t, t, step, slice(i, i + 1))


def traversed(sampler: Sampler, spacing: str, steps: int, seeds: Sequence[int]) -> tuple[TreeResult, Branch, int]:
    """A neutral path and a late swap, and the rows that were evaluated."""
    tree = Branch("neutral", torch.zeros(1, 1, 1), children=(Branch("swap", torch.ones(1, 1, 1), steps * 5 // 6),))
    asked: list[GaussianEps] = []

    def sample(contexts: Contexts, of: Sequence[int], *, x_T: Tensor, start: int, history: History) -> Iterator[Step]:
        asked.append(GaussianEps(contexts))
        rest = {"start": start, "history": history, "timesteps": levels(spacing, steps)}
        return sampler(asked[-1], x_T, SCHEDULE, steps, noise=noise_of(tuple(of)), **rest)

    result = traverse_tree(sample, initial_noise(seeds, SHAPE).double(), tree, seeds, steps)
    return result, tree, sum(eps.rows for eps in asked)


def check(name: str, spacing: str, steps: int, seeds: Sequence[int] = (0, 1)) -> TreeResult:
    sampler = SAMPLERS[name]
    result, tree, rows = traversed(sampler, spacing, steps, seeds)
    for latents in result.latents.values():
        assert latents.isfinite().all()
    foreseen = len(seeds) * unet_rows(tree, steps, sampler)
    assert result.unet_rows == rows
    assert rows >= foreseen if sampler.varies else rows == foreseen
    return result


@pytest.mark.parametrize(("name", "spacing"), PAIRS)
def test_every_pair_runs_under_the_tree_whatever_the_batch(name, spacing):
    for steps in (1, 6):
        together, alone = check(name, spacing, steps), check(name, spacing, steps, (1,))
        for branch, latents in together.latents.items():
            torch.testing.assert_close(latents[1:], alone.latents[branch], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_pair_at_few_steps(name):
    for spacing in spacings_of(name):
        for steps in COUNTS:
            check(name, spacing, steps, (0,))


def test_a_thousand_steps():
    """Every sampler, and every spacing; the slow test below has every pair."""
    spacings, even = cycle(SPACINGS), cycle(EVEN_SPACINGS)
    for name, sampler in SAMPLERS.items():
        check(name, next(even if sampler.even else spacings), 1000, (0,))


@pytest.mark.parametrize("steps", [250, 999])
def test_hundreds_of_steps(steps):
    for name in SAMPLERS:
        check(name, "linspace", steps, (0,))


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_pair_at_many_steps(name):
    """Spacings with the same levels make the same run: once."""
    for steps in (4, 7, 20, 61, 100, *LARGE):
        for spacing in {levels(spacing, steps): spacing for spacing in spacings_of(name)}.values():
            check(name, spacing, steps, (0,))
