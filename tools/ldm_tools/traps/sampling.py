"""Mistakes in the noise schedule, the sampler and guidance."""

from collections.abc import Sequence
from dataclasses import replace
from math import sqrt

import torch
from torch import Tensor

from ldm.schedule import TRAIN_STEPS, Schedule, leading
from ldm_tools.traps.conventions import Conventions


def final_alpha_one(recipe: Conventions) -> Conventions:
    """The last step lands on no noise at all; SD1.5's lands on alphas_cumprod[0] = 0.99915."""
    return replace(recipe, schedule=replace(recipe.schedule, final_alpha_cumprod=1.0))


def trailing_spacing(recipe: Conventions) -> Conventions:
    """Timesteps 999, 979 ... 19; SD1.5's are 981, 961 ... 1."""
    return replace(
        recipe,
        timesteps=lambda steps: tuple(TRAIN_STEPS - i * TRAIN_STEPS // steps - 1 for i in range(steps)),
    )


def even_spacing(recipe: Conventions) -> Conventions:
    """Timesteps spread from 999 to 0, both included."""
    return replace(
        recipe,
        timesteps=lambda steps: tuple(round((TRAIN_STEPS - 1) * (1 - i / (steps - 1))) for i in range(steps)),
    )


def no_offset(recipe: Conventions) -> Conventions:
    """Timesteps 980, 960 ... 0, without SD1.5's shift by one."""
    return replace(recipe, timesteps=lambda steps: leading(steps, offset=0))


def linear_betas(recipe: Conventions) -> Conventions:
    """Betas evenly spaced, as in DDPM; in SD1.5 their square roots are."""
    return replace(recipe, schedule=Schedule.from_betas(torch.linspace(0.00085, 0.012, TRAIN_STEPS).double()))


def clipped_x0(recipe: Conventions) -> Conventions:
    """The predicted x_0 clipped to [-1, 1], as for pixels; latents go beyond."""

    def x0_of(x: Tensor, eps: Tensor, a: float) -> Tensor:
        return ((x - sqrt(1 - a) * eps) / sqrt(a)).clamp(-1, 1)

    return replace(recipe, x0_of=x0_of)


def output_as_v(recipe: Conventions) -> Conventions:
    """The output taken for v, which SD2.1 predicts: eps = sqrt(a) v + sqrt(1 - a) x."""
    return replace(recipe, eps_of=lambda x, output, a: sqrt(a) * output + sqrt(1 - a) * x)


def scaled_noise(recipe: Conventions) -> Conventions:
    """Noise times sigma_max = 14.6, the start of Euler's and Heun's samplers, in a DDIM loop."""
    last = float(recipe.schedule.alphas_cumprod[-1])
    return replace(recipe, noise=lambda seeds, shape: sqrt((1 - last) / last) * recipe.noise(seeds, shape))


def one_generator(recipe: Conventions) -> Conventions:
    """The noise of all seeds drawn from the first one's generator: every image but the first is another."""

    def noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
        return torch.randn(len(seeds), *shape, generator=torch.Generator().manual_seed(seeds[0]))

    return replace(recipe, noise=noise)


def swap_off_by_one(recipe: Conventions) -> Conventions:
    """One more step under the neutral prompt: a callback that runs after the step swaps for the next one."""
    return replace(recipe, neutral_steps=lambda swap_step: swap_step + 1)


def halves_swapped(recipe: Conventions) -> Conventions:
    """The batch read as [cond, uncond]: guidance pushes away from the prompt."""
    return replace(recipe, guide=lambda uncond, cond, g: cond + g * (uncond - cond))


def guidance_from_the_prompt(recipe: Conventions) -> Conventions:
    """eps = cond + g (cond - uncond), which is guidance g + 1."""
    return replace(recipe, guide=lambda uncond, cond, g: cond + g * (cond - uncond))
