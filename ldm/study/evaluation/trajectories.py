"""The paper's experiment on one seed: its latents, and everything that is measured on them.

A seed is sampled and measured by itself, so that no number depends on which seeds share a batch or a process.

Letters: A attributes, S swap steps, F frames of the curve, K heads, C H W of a latent.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.pipeline import StableDiffusion
from ldm.study.evaluation.instruments import Instruments
from ldm.study.metrics import directions
from ldm.traversal.plan import Traversal
from ldm.traversal.run_folder import read_record
from ldm.traversal.sampling import curves, prompt_tree, sample, swap_name
from ldm.traversal.store import check_seeds, load_seed

SampleSeed = Callable[[int], Mapping[str, Tensor]]
"""sample_seed(seed) -> {"neutral": (C, H, W), "<attribute>/s05": (C, H, W) ...}"""

CURVE_POINTS = 50
PATH_FIGURES = tuple(directions.STRAIGHT)
FRAMES = tuple(range(30, 50))  # the points of the curve that count as interpolated samples   [authors' code]


def sampled(instruments: Instruments, plan: Traversal) -> SampleSeed:
    """Latents straight from the prompts."""
    sd = instruments.sd
    tree = prompt_tree(sd, plan)

    def sample_seed(seed: int) -> Mapping[str, Tensor]:
        result = sample(sd, plan, tree, [seed])
        return {name: rows[0].cpu() for name, rows in result.latents.items()}

    return sample_seed


def from_run(folder: Path) -> SampleSeed:
    """Latents of a finished traversal; asked for a seed that it does not hold, it raises ValueError."""
    return partial(load_seed, folder / "latents.safetensors")


def check_run(folder: Path, seeds: Sequence[int], sd: StableDiffusion) -> None:
    """ValueError where a finished traversal lacks a seed, or was made with other weights than `sd`."""
    check_seeds(folder / "latents.safetensors", seeds)
    record = read_record(folder)
    made = record.get("weights_sha256"), record.get("weight_set")
    if made != (given := (sd.weights_sha256(), sd.weight_set)):
        files = ", ".join(map(str, record.get("weights", [])))
        raise ValueError(
            f"{folder}: made with the weights {_short(*made)} ({files}), to be decoded by {_short(*given)}; "
            "say --weights (and --base, --ema) as `ldm traverse` was told"
        )


def _short(sha256: str | None, weight_set: str | None) -> str:
    return f"{(sha256 or 'unknown')[:12]}{f' {weight_set}' if weight_set else ''}"


def measure(instruments: Instruments, plan: Traversal, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Everything that the paper measures, on one seed.

    Returns: latents.neutral (C, H, W), latents.swaps (A, S, C, H, W); probabilities.neutral (K,), .swaps (A, S, K),
             .curve (A, F, K); ssim.swaps (A, S), ssim.curve (A, F) and lpips.* alike, against the neutral image;
             cosines (A, S, S), float64; path (A, 6), `PATH_FIGURES` of the way from neutral over late swaps to early.
    """
    neutral, swaps = latents["neutral"], stacked(latents, plan)
    batched = {name: latent[None] for name, latent in latents.items()}
    drawn = curves(batched, replace(plan, bezier_points=CURVE_POINTS))
    curve = torch.stack([drawn[f"{attribute}/bezier"][0, list(FRAMES)] for attribute in plan.styles])

    base = instruments.pixels(neutral[None])
    measured = {"latents.neutral": neutral, "latents.swaps": swaps}
    measured["probabilities.neutral"] = instruments.probabilities(base)[0]
    for name, frames in (("swaps", swaps), ("curve", curve)):
        pixels = instruments.pixels(frames.flatten(0, 1))
        shape = frames.shape[:2]
        measured[f"probabilities.{name}"] = instruments.probabilities(pixels).unflatten(0, shape)
        measured[f"ssim.{name}"] = instruments.ssim(pixels, base[0]).unflatten(0, shape)
        measured[f"lpips.{name}"] = instruments.lpips_to(pixels, base[0]).unflatten(0, shape)

    late_to_early = [plan.swap_steps.index(s) for s in sorted(plan.swap_steps, reverse=True)]
    points = torch.cat([neutral.expand(len(swaps), 1, *neutral.shape), swaps[:, late_to_early]], dim=1)
    cosines = [directions.cosine_matrix(neutral.numpy(), swapped.numpy()) for swapped in swaps]
    geometry = [directions.path_geometry(path.numpy()) for path in points]
    measured["cosines"] = torch.from_numpy(np.stack(cosines))
    measured["path"] = torch.tensor([[path[name] for name in PATH_FIGURES] for path in geometry], dtype=torch.float64)
    return measured


def stacked(latents: Mapping[str, Tensor], plan: Traversal) -> Tensor:
    """The swaps of one seed: (A, S, C, H, W)."""
    return torch.stack([torch.stack([latents[swap_name(a, s)] for s in plan.swap_steps]) for a in plan.styles])
