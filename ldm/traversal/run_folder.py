"""From a plan to a folder: sample for some seeds, decode, and write run.json; a run that was cut off is continued.

    OUT/latents.safetensors                          seed0000/neutral, seed0000/<style>/s05, seed0000/<style>/bezier
    OUT/images/seed0000/neutral.png, <style>/s05.png, <style>/bezier_00.png
    OUT/run.json                                     what was run, on what, and what it cost

Letters: B seeds, S steps, C H W of a latent.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.files import read_json, write_json
from ldm.guidance import rows_a_latent
from ldm.pipeline import StableDiffusion
from ldm.traversal.plan import Generation, Traversal
from ldm.traversal.prompt_tree import Branch
from ldm.traversal.run_images import remove_images, write_images
from ldm.traversal.sampling import bounded, curves, latent_shape, prompt_tree, rows_a_seed, sample
from ldm.traversal.store import run_seeds


class Start(Protocol):
    """Where x_T comes from when it is not the seeds' own noise, such as `ldm.traversal.real_images.ImageStart`."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Everything that the latents depend on, as JSON values."""

    def latents(self, seeds: Sequence[int]) -> Mapping[str, Tensor]:
        """x_T, and what is to be kept beside it: name -> (B, C, H, W)."""

    def record(self, latents: Path, out: Path, earlier: Mapping[str, Any]) -> Mapping[str, Any]:
        """What run.json should say of it, given the finished run."""


class SeedNoise:
    """The usual start: every seed's own noise."""

    settings: Mapping[str, Any] = {}

    def latents(self, seeds: Sequence[int]) -> Mapping[str, Tensor]:
        """Nothing: sampling draws it."""
        return {}

    def record(self, latents: Path, out: Path, earlier: Mapping[str, Any]) -> Mapping[str, Any]:
        """Nothing: the seeds say it all."""
        return {}


def run_generation(sd: StableDiffusion, plan: Generation, out: Path) -> dict[str, Any]:
    """Images of one prompt into a folder, OUT/images/seed0000/image.png; see `run_traversal`."""
    tree = Branch("image", sd.encode_prompts([plan.prompt]))
    return _Run(sd, plan, tree, out, "generate", SeedNoise()).into_folder()


def run_traversal(
    sd: StableDiffusion,
    plan: Traversal,
    out: Path,
    *,
    images: bool = True,
    label: str = "traverse",
    start: Start | None = None,
) -> dict[str, Any]:
    """Run a traversal into a folder, continuing one that was cut off there.

    Args:    sd: its `max_batch` bounds memory; None: see `ldm.traversal.sampling.bounded`.
             images: decode and write the images as well.  label: in front of the progress bars.
             start: where each seed begins; None: at its noise.
    Returns: the content of run.json.
    Raises:  ValueError: the folder holds a traversal of other settings.
    """
    run = _Run(sd, plan, prompt_tree(sd, plan), out, label, SeedNoise() if start is None else start)
    return run.into_folder(images)


class _Run:
    """One plan, on one model, into one folder."""

    def __init__(
        self,
        sd: StableDiffusion,
        plan: Generation | Traversal,
        tree: Branch,
        out: Path,
        label: str,
        start: Start,
    ) -> None:
        self.plan, self.tree, self.out, self.label, self.start = plan, tree, out, label, start
        self.shape = latent_shape(sd, plan)
        self.sd = bounded(sd, self.shape)
        self.branches = 1 + len(tree.children)
        self.rows_a_seed = rows_a_seed(plan, tree)
        self.model = model_record(sd, plan.prompts)

    def into_folder(self, images: bool = True) -> dict[str, Any]:
        """Sample, decode, write run.json, and return what it says."""
        began, plan, out = time.monotonic(), self.plan, self.out
        varies = plan.run_sampler.varies
        earlier = read_record(out) if (out / "latents.safetensors").exists() else {}
        latents, rows = self.sampled()
        decoded = write_images(self.sd, latents, out, self.label) if images else 0
        if not rows and not decoded and set(plan.seeds) <= set(earlier.get("seeds", [])):
            return {**earlier, "unet_rows_this_run": 0}  # nothing was left to do

        seeds = sorted({*plan.seeds, *earlier.get("seeds", [])})
        record = {
            "unet_rows": rows + earlier.get("unet_rows", 0) if varies else len(seeds) * self.rows_a_seed,
            "unet_rows_separate": len(seeds) * self.branches * plan.run_sampler.evaluations_of(plan.steps),
            "unet_rows_this_run": rows,  # fewer where an earlier run was continued
            **({"unet_rows_separate_is": "the least: its sampler's evaluations vary"} if varies else {}),
            "seconds": round(earlier.get("seconds", 0) + time.monotonic() - began, 2),
            "backend": self.sd.backend,
            **({"engine": self.sd.engine} if self.sd.engine else {}),
            **({"kernels_refused": self.sd.kernels_refused} if self.sd.kernels_refused else {}),
            "cuda_graph": self.sd.cuda_graph_used or earlier.get("cuda_graph", False),
            "device": str(self.sd.device),
            "max_batch": self.sd.max_batch,
            "weights": [str(path) for path in self.sd.files],
            **self.model,
            **plan.settings(),
            **({"sampler_named": plan.sampler_named} if plan.sampler_named else {}),
            **self.start.record(latents, out, earlier),
            "seeds": seeds,
            "latent_size": self.shape[1:],
            **versions(),
        }
        write_json(out / "run.json", record)
        return record

    def sampled(self) -> tuple[Path, int]:
        """The file of latents, with all of the plan's seeds in it, and the U-Net rows that were computed for it now."""
        settings = {**self.plan.settings(), **self.model, "latent_size": self.shape[1:], **self.start.settings}
        del settings["seeds"]  # so that a folder may grow by further seeds
        rows = len(self.plan.seeds) * self.rows_a_seed
        at_once = max(1, (self.sd.max_batch or 1) // (self.branches * rows_a_latent(self.plan.guidance)))
        with tqdm(total=rows, desc=f"{self.label}: U-Net rows", unit="row", mininterval=1) as bar:
            compute = partial(self.latents, progress=bar.update)
            return run_seeds(compute, self.plan.seeds, self.out, settings, at_once), int(bar.n)

    def latents(self, seeds: Sequence[int], progress: Callable[[int], object]) -> dict[str, Tensor]:
        """All that is kept of some seeds: name -> (B, ...)."""
        remove_images(self.out, seeds)
        begin = self.start.latents(seeds)
        result = sample(self.sd, self.plan, self.tree, seeds, x_T=begin.get("x_T"), progress=progress)
        latents = {**begin, "x_T": result.x_T, **result.latents}
        for quantity, by_branch in result.kept.items():  # each branch's own steps, (B, S - s, C, H, W)
            latents |= {f"{name}/{quantity}": steps.transpose(0, 1) for name, steps in by_branch.items()}
        return latents | (curves(result.latents, self.plan) if isinstance(self.plan, Traversal) else {})


def model_record(sd: StableDiffusion, prompts: Sequence[str]) -> dict[str, Any]:
    """Of the model, what latents depend on; where it reads weights, those of the prompts."""
    dtype = str(sd.dtype).removeprefix("torch.")
    unusual: dict[str, Any] = {"adapters": list(sd.adapters)} if sd.adapters else {}
    unusual |= {"prompt_chunks": sd.prompt_chunks} if sd.prompt_chunks != 1 else {}
    if sd.tokenizer.reads_weights:
        unusual["prompt_weights"] = {text: [list(piece) for piece in sd.tokenizer.pieces_of(text)] for text in prompts}
    return {"weights_sha256": sd.weights_sha256(), "weight_set": sd.weight_set, "dtype": dtype, **unusual}


def versions() -> dict[str, str]:
    """Of what everything ran on."""
    return {"torch": torch.__version__, "python": platform.python_version()}


def read_record(out: Path) -> dict[str, Any]:
    """The run.json of a folder; empty where there is none. Raises ValueError where it is no JSON object."""
    return read_json(out / "run.json")
