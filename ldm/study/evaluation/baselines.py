"""Other ways to the same edit, to hold the traversal against, judged at the averaged swap steps.

    linear_direction    z_n + mean over other seeds of (z_s - z_n): one direction for all
    random_direction    z_n + a random direction as long as this seed's own swap direction
    constant_blend      the style's prompt mixed in with one weight from the first step to the last
    ramp_blend          mixed in along a ramp
    chord               points on the straight line from z_n to the strongest swap, instead of on the Bezier curve

A swap at s shows the style's prompt in (S - s) / S of the steps; the blends have the same mean weight.

Letters: A attributes, S steps, M averaged swap steps, F frames, N seeds, C H W of a latent.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from ldm.conditioning import Contexts, blend, neutral_steps, ramp, side_by_side
from ldm.study.evaluation.instruments import Instruments
from ldm.study.evaluation.trajectories import CURVE_POINTS, FRAMES
from ldm.traversal.plan import Traversal
from ldm.traversal.sampling import bounded, latent_shape

SWAP_METHODS = ("linear_direction", "random_direction", "constant_blend", "ramp_blend")  # beside the swaps
CURVE_METHODS = ("chord",)  # beside the interpolated samples


def direction_sum(seeds: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, int]:
    """The sum (A, S, C, H, W) of all seeds' swap directions, and their number.

    Args:    seeds: neutral (C, H, W) and swaps (A, S, C, H, W) of each.
    """
    total, count = torch.zeros(()), 0
    for neutral, swaps in seeds:
        total, count = total + (swaps - neutral), count + 1
    return total, count


def measure_baselines(
    instruments: Instruments,
    plan: Traversal,
    seed: int,
    neutral: Tensor,
    swaps: Tensor,
    directions: tuple[Tensor, int],
    averaged: Sequence[int],
) -> dict[str, Tensor]:
    """The classifier's probabilities on every baseline of one seed.

    Args:    neutral, swaps: (C, H, W) and (A, S, C, H, W) of this seed.  directions: see `direction_sum`, this seed
             included: it is left out here.  averaged: the swap steps to judge at.
    Returns: method -> (A, M, K); "chord" -> (A, F, K).
    """
    at = [plan.swap_steps.index(s) for s in averaged]
    own = (swaps - neutral)[:, at]
    total, count = directions
    others = (total[:, at] - own) / max(1, count - 1)
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(own.shape, generator=generator)
    random *= (own.flatten(2).norm(dim=2) / random.flatten(2).norm(dim=2))[..., None, None, None]

    strongest = swaps[:, plan.swap_steps.index(min(plan.swap_steps))]
    u = torch.linspace(0, 1, CURVE_POINTS)[list(FRAMES)].view(1, -1, 1, 1, 1)
    latents = {
        "linear_direction": neutral + others,
        "random_direction": neutral + random,
        **blends(instruments, plan, seed, averaged),
        "chord": neutral + u * (strongest - neutral)[:, None],
    }
    return {
        name: instruments.probabilities(instruments.pixels(points.flatten(0, 1))).unflatten(0, points.shape[:2])
        for name, points in latents.items()
    }


def blends(instruments: Instruments, plan: Traversal, seed: int, averaged: Sequence[int]) -> dict[str, Tensor]:
    """The final latents of the two blends, (A, M, C, H, W) each."""
    shape, steps = latent_shape(instruments.sd, plan), plan.steps
    sd = bounded(instruments.sd, shape)
    neutral, *styles = sd.encode_prompts([plan.neutral, *plan.styles.values()])[:, None]
    contexts: dict[str, list[Contexts]] = {"constant_blend": [], "ramp_blend": []}
    for style in styles:
        for s in averaged:
            share = 1 - neutral_steps(s, steps, plan.indexing) / steps
            contexts["constant_blend"].append(blend(neutral, style, [share] * steps))
            contexts["ramp_blend"].append(ramp(neutral, style, *ramp_of_mean(share, steps), steps))
    blended = {}
    for name, rows in contexts.items():
        seeds, negative = [seed] * len(rows), sd.encode_prompts([plan.negative])
        *_, last = sd.sample(
            side_by_side(rows), seeds, guidance_scale=plan.guidance, negative=negative, size=plan.latent_size
        )  # fmt: skip
        blended[name] = last.x_prev.cpu().unflatten(0, (len(styles), len(averaged)))
    return blended


def ramp_of_mean(share: float, steps: int) -> tuple[int, int]:
    """Begin and end of a ramp of this mean weight, 1 - (b + e) / 2S: it begins at step 0 or ends at the last."""
    middle = int(np.rint(2 * steps * (1 - share)))
    return (0, max(1, middle)) if middle <= steps else (min(middle - steps, steps - 1), steps)
