"""A model and a plan become latents: the prompt tree, sampled for some seeds, and the curves through it.

Letters: B seeds, P points of a curve, C H W of a latent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ldm.pipeline import StableDiffusion
from ldm.samplers import Level, initial_noise, visited_levels
from ldm.schedule import SPACINGS
from ldm.traversal.batches import rows_a_call
from ldm.traversal.following import follow_tree, followed_rows
from ldm.traversal.plan import Sampling, Traversal
from ldm.traversal.prompt_tree import Branch, TreeResult, swaps, traverse_tree, unet_rows


def latent_shape(sd: StableDiffusion, plan: Sampling) -> tuple[int, int, int]:
    """(C, H, W) of the plan's latents."""
    channels, *trained_size = sd.latent_shape
    height, width = plan.latent_size or trained_size
    return channels, height, width


def bounded(sd: StableDiffusion, shape: Sequence[int]) -> StableDiffusion:
    """The model with a limit to the rows of a U-Net call: its own, or what `ldm.traversal.batches` finds fit."""
    return sd if sd.max_batch else replace(sd, max_batch=rows_a_call(sd, shape))


def prompt_tree(sd: StableDiffusion, plan: Traversal) -> Branch:
    """The neutral prompt, and every style swapped in at every swap step."""
    neutral, *contexts = sd.encode_prompts([plan.neutral, *plan.styles.values()])[:, None]
    styles = dict(zip(plan.styles, contexts, strict=True))
    return swaps(neutral, styles, plan.swap_steps, plan.steps, plan.indexing)


def sample(
    sd: StableDiffusion,
    plan: Sampling,
    tree: Branch,
    seeds: Sequence[int],
    *,
    x_T: Tensor | None = None,
    progress: Callable[[int], object] | None = None,
) -> TreeResult:
    """Denoise a prompt tree for some seeds, as the plan says.

    Args:    x_T: (B, C, H, W) to start from instead of the seeds' own noise, such as an inverted image.
             progress: called with the number of U-Net rows done.
    """
    shape = latent_shape(sd, plan)
    denoise = partial(
        bounded(sd, shape).sample,
        guidance_scale=plan.guidance,
        negative=sd.encode_prompts([plan.negative]),
        sampler=plan.sampler,
        spacing=plan.spacing,
        end=plan.end,
        eta=plan.eta,
    )
    x_T = initial_noise(seeds, shape) if x_T is None else x_T
    if follows(plan):
        return follow_tree(denoise, x_T, tree, seeds, _levels(sd, plan), keep=plan.keep, progress=progress)
    return traverse_tree(denoise, x_T, tree, seeds, plan.steps, keep=plan.keep, progress=progress)


def rows_a_seed(plan: Sampling, tree: Branch) -> int:
    """Of the U-Net, guidance's second half not counted; at least, where the sampler's evaluations vary."""
    return followed_rows(tree, plan.steps) if follows(plan) else unet_rows(tree, plan.steps, plan.run_sampler)


def follows(plan: Sampling) -> bool:
    """Whether branches ask the network seldom."""
    return isinstance(plan, Traversal) and plan.fast


def _levels(sd: StableDiffusion, plan: Sampling) -> list[Level]:
    """The S + 1 noise levels that the plan visits."""
    schedule = sd.schedule if plan.end is None else sd.schedule.ending_at(plan.end)
    return visited_levels(schedule, SPACINGS[plan.spacing](plan.steps, schedule))


def swap_name(style: str, swap_step: int) -> str:
    """The name of a swap's latent and image."""
    return f"{style}/s{swap_step:02d}"


def curves(latents: Mapping[str, Tensor], plan: Traversal) -> dict[str, Tensor]:
    """One Bezier curve per style, from the neutral latent towards the earliest, strongest swap.

    Control points: neutral, then the swaps from late to early (s = 45, 40 ... 5); points at u = linspace(0, 1, P), so
    that the first is the neutral latent and the last the strongest edit.

    Returns: "<style>/bezier" -> (B, P, C, H, W), computed in float32.
    """
    if not plan.bezier_points:
        return {}
    from ldm.traversal import bezier

    u = torch.linspace(0, 1, plan.bezier_points)
    points = {}
    for style in plan.styles:
        names = ["neutral", *(swap_name(style, s) for s in sorted(plan.swap_steps, reverse=True))]
        control_points = torch.stack([latents[name].float().cpu() for name in names])
        points[f"{style}/bezier"] = bezier.evaluate(control_points, u).transpose(0, 1)
    return points
