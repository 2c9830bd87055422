"""What the prompt tree saves against running every branch alone, and what loading costs against reading the file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm import pipeline
from ldm.bench.harness import time_in_turn
from ldm.conditioning import swap
from ldm.pipeline import StableDiffusion
from ldm.traversal.plan import Traversal
from ldm.traversal.prompt_tree import Branch, unet_rows
from ldm.traversal.round_trip import relative_error
from ldm.traversal.sampling import bounded, latent_shape, prompt_tree, sample

Json = dict[str, Any]
# Between the tree and the branches alone: batches of other sizes add up in another order, over all steps of a run.
AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.1}


def tree_against_separate(sd: StableDiffusion, plan: Traversal, rounds: int) -> Json:
    """The traversal as one tree and as runs of their own, by the same code, to the final latents.

    Returns: rows and timings of both; `ratio` is how many times faster the tree is, beside that of the rows.
    Raises:  ValueError: their latents differ.
    """
    tree = prompt_tree(sd, plan)
    sd = bounded(sd, latent_shape(sd, plan))

    def together() -> Mapping[str, Tensor]:
        return sample(sd, plan, tree, plan.seeds).latents

    def one_by_one() -> Mapping[str, Tensor]:
        return {branch.name: run_alone(sd, plan, tree, branch) for branch in (tree, *tree.children)}

    def check() -> None:
        expected = one_by_one()
        for name, latents in together().items():
            error = relative_error(latents, expected[name])
            if not error <= AGREEMENT[sd.dtype]:
                raise ValueError(f"tree: {name!r} is {error:.1e} away from the branch run alone; not timed")

    timings = time_in_turn({"separate runs": one_by_one, "tree": together}, rounds, 0, check, label="traversal")
    rows = len(plan.seeds) * unet_rows(tree, plan.steps)
    rows_separate = len(plan.seeds) * plan.steps * (1 + len(tree.children))
    return {
        "unet_rows": rows,
        "unet_rows_separate": rows_separate,
        "rows_ratio": rows_separate / rows,
        "max_batch": sd.max_batch,
        "timings": {name: asdict(timing) for name, timing in timings.items()},
    }


def run_alone(sd: StableDiffusion, plan: Traversal, tree: Branch, branch: Branch) -> Tensor:
    """One branch for every seed from noise, neutral steps included: (B, C, H, W)."""
    contexts = swap(tree.context, branch.context, at=branch.at, steps=plan.steps)
    negative = sd.encode_prompts([plan.negative])
    *_, last = sd.sample(contexts, plan.seeds, guidance_scale=plan.guidance, negative=negative, size=plan.latent_size)
    return last.x_prev


def load_against_read(path: Path, device: torch.device, dtype: torch.dtype, rounds: int) -> Json:
    """Reading a checkpoint's bytes, loading it, and loading it to its first step's end; files out of the page cache.

    The weights of a mapped file are read by the first step, so beside it stands what a step takes once they are there.
    """

    def read() -> None:
        forget(path)
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass

    def load() -> StableDiffusion:
        forget(path)
        return pipeline.load(path, device, dtype)

    def step(sd: StableDiffusion) -> None:
        context = sd.encode_prompts([""])
        with torch.inference_mode():
            sd.unet(torch.zeros(1, *sd.latent_shape, device=device, dtype=dtype), 981, context)

    timings = time_in_turn({"read": read, "load": load, "first step": lambda: step(load())}, rounds, 0, label="load")
    timings |= time_in_turn({"later step": partial(step, load())}, rounds, label="step")
    return {"bytes": path.stat().st_size, "timings": {name: asdict(timing) for name, timing in timings.items()}}


def forget(path: Path) -> None:
    """Ask the system to drop the file from its cache, so that it is read from the disk; where it can be asked."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
