"""From prompts to files: sample a prompt tree for some seeds, draw the curves, decode, and write run.json.

    OUT/latents.safetensors                          seed0000/neutral, seed0000/<style>/s05, seed0000/<style>/bezier
    OUT/images/seed0000/neutral.png, <style>/s05.png, <style>/bezier_00.png
    OUT/figure.png, curve.gif
    OUT/run.json                                     what was run, on what, and what it cost

Letters: B seeds, S steps, P points of a curve, C H W of a latent.
"""

from __future__ import annotations

import math
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.files import read_json, write_json
from ldm.guidance import guided, rows_a_latent
from ldm.images import Pixels, load_pixels, save_image, to_uint8
from ldm.pipeline import StableDiffusion
from ldm.samplers import initial_noise, step_noise
from ldm.schedule import SPACINGS
from ldm.traversal import bezier, figures
from ldm.traversal.plan import Generation, Sampling, Traversal
from ldm.traversal.prompt_tree import KEEPABLE, Branch, TreeResult, swaps, traverse_tree, unet_rows
from ldm.traversal.store import iterate_latents, run_seeds


class Start(Protocol):
    """Where x_T comes from when it is not the seeds' own noise, such as `ldm.traversal.real_images.ImageStart`."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Everything that the latents depend on, as JSON values."""

    def latents(self, seeds: Sequence[int]) -> Mapping[str, Tensor]:
        """x_T, and what is to be kept beside it: name -> (B, C, H, W)."""

    def record(self, latents: Path, out: Path, earlier: Mapping[str, Any]) -> Mapping[str, Any]:
        """What run.json should say of it, given the finished run."""


def run_generation(
    sd: StableDiffusion,
    plan: Generation,
    out: Path,
    *,
    max_batch: int | None = None,
) -> dict[str, Any]:
    """Images of one prompt into a folder, OUT/images/seed0000/image.png; see `run_traversal`."""
    tree = Branch("image", sd.encode_prompts([plan.prompt]))
    return _run(sd, plan, tree, out, max_batch, True, "generate")


def run_traversal(
    sd: StableDiffusion,
    plan: Traversal,
    out: Path,
    *,
    max_batch: int | None = None,
    images: bool = True,
    label: str = "traverse",
    start: Start | None = None,
) -> dict[str, Any]:
    """Run a traversal into a folder, continuing one that was cut off there.

    Args:    max_batch: most rows in one call of the U-Net; bounds memory, changes results in the last bits only.
             None: 8 at 512 x 512 pixels, and so many that they are as large together at other sizes.
             images: decode and write the images as well.  label: in front of the progress bars.
             start: where each seed begins; None: at its noise.
    Returns: the content of run.json.
    Raises:  ValueError: the folder holds a traversal of other settings.
    """
    return _run(sd, plan, prompt_tree(sd, plan), out, max_batch, images, label, start)


def prompt_tree(sd: StableDiffusion, plan: Traversal) -> Branch:
    """The neutral prompt, and every style swapped in at every swap step."""
    neutral, *contexts = sd.encode_prompts([plan.neutral, *plan.styles.values()])[:, None]
    styles = dict(zip(plan.styles, contexts, strict=True))
    return swaps(neutral, styles, plan.swap_steps, plan.steps, plan.indexing)


def latent_shape(sd: StableDiffusion, plan: Sampling) -> tuple[int, int, int]:
    """(C, H, W) of the plan's latents."""
    channels, *trained_size = sd.latent_shape
    height, width = plan.latent_size or trained_size
    return channels, height, width


def default_max_batch(shape: Sequence[int]) -> int:
    """8 rows of 64 x 64 in one call of the U-Net, and so many that they are as large together at other sizes."""
    return max(1, 8 * 64 * 64 // math.prod(shape[1:]))


def sample(
    sd: StableDiffusion,
    plan: Sampling,
    tree: Branch,
    seeds: Sequence[int],
    max_batch: int,
    progress: Callable[[int], object] | None = None,
    x_T: Tensor | None = None,
) -> TreeResult:
    """Denoise a prompt tree for some seeds, as the plan says.

    Args:    x_T: (B, C, H, W) to start from instead of the seeds' own noise, such as an inverted image.
             progress: called with the number of U-Net rows done.
    """
    shape = latent_shape(sd, plan)
    x_T = initial_noise(seeds, shape) if x_T is None else x_T
    guide = partial(
        guided,
        sd.unet,
        guidance_scale=plan.guidance,
        uncond=sd.encode_prompts([plan.negative]),
        max_batch=max_batch,
    )
    return traverse_tree(
        guide,
        x_T.to(sd.device),  # float32, whatever the network's precision
        tree,
        sd.schedule,
        plan.steps,
        sampler=plan.run_sampler,
        eta=plan.eta,
        noise=step_noise(seeds, shape),
        timesteps=SPACINGS[plan.spacing](plan.steps, sd.schedule),
        keep=plan.keep,
        progress=progress,
    )


def _run(
    sd: StableDiffusion,
    plan: Generation | Traversal,
    tree: Branch,
    out: Path,
    max_batch: int | None,
    images: bool,
    label: str,
    start: Start | None = None,
) -> dict[str, Any]:
    began = time.monotonic()
    shape = latent_shape(sd, plan)
    max_batch = default_max_batch(shape) if max_batch is None else max_batch
    branches, rows_a_seed = 1 + len(tree.children), unet_rows(tree, plan.steps, plan.run_sampler)
    at_once = max(1, max_batch // (branches * rows_a_latent(plan.guidance)))
    model = {
        "weights_sha256": sd.weights_sha256(),
        "weight_set": sd.weight_set,
        "dtype": str(sd.dtype).removeprefix("torch."),
    }
    evaluated = 0

    with tqdm(total=len(plan.seeds) * rows_a_seed, desc=f"{label}: U-Net rows", unit="row", mininterval=1) as bar:

        def count(rows: int) -> None:
            nonlocal evaluated
            evaluated += rows
            bar.update(rows)

        def compute(seeds: list[int]) -> dict[str, Tensor]:
            for seed in seeds:  # whatever lies there was decoded from other latents
                shutil.rmtree(image_path(out, seed, "").parent, ignore_errors=True)
            begin = start.latents(seeds) if start else {}
            result = sample(sd, plan, tree, seeds, max_batch, count, begin.get("x_T"))
            found = {**begin, "x_T": result.x_T, **result.latents}
            for quantity, by_branch in result.kept.items():  # each branch's own steps, (B, S - s, C, H, W)
                found |= {f"{name}/{quantity}": steps.transpose(0, 1) for name, steps in by_branch.items()}
            return found | (curves(result.latents, plan) if isinstance(plan, Traversal) else {})

        settings = {**asdict(plan), **model, "latent_size": shape[1:], **(start.settings if start else {})}
        del settings["seeds"]  # so that a folder may grow by further seeds
        earlier = read_record(out) if (out / "latents.safetensors").exists() else {}
        path = run_seeds(compute, plan.seeds, out, settings, at_once)

    decoded = write_images(sd, path, out, label) if images else 0
    if not evaluated and not decoded and set(plan.seeds) <= set(earlier.get("seeds", [])):
        return {**earlier, "unet_rows_this_run": 0}  # nothing was left to do

    seeds = sorted({*plan.seeds, *earlier.get("seeds", [])})
    record = {
        "unet_rows": len(seeds) * rows_a_seed,
        "unet_rows_separate": len(seeds) * branches * plan.run_sampler.evaluations_of(plan.steps),
        "unet_rows_this_run": evaluated,  # fewer where an earlier run was continued
        "seconds": round(earlier.get("seconds", 0) + time.monotonic() - began, 2),
        "backend": sd.backend,
        "cuda_graph": sd.cuda_graph_used or earlier.get("cuda_graph", False),
        "device": str(sd.device),
        "max_batch": max_batch,
        "weights": [str(path) for path in sd.files],
        **model,
        **asdict(plan),
        **(start.record(path, out, earlier) if start else {}),
        "seeds": seeds,
        "latent_size": shape[1:],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    write_json(out / "run.json", record)
    return record


def curves(latents: Mapping[str, Tensor], plan: Traversal) -> dict[str, Tensor]:
    """One Bezier curve per style, from the neutral latent towards the earliest, strongest swap.

    Control points: neutral, then the swaps from late to early (s = 45, 40 ... 5); points at u = linspace(0, 1, P), so
    that the first is the neutral latent and the last the strongest edit.

    Returns: "<style>/bezier" -> (B, P, C, H, W), computed in float32.
    """
    if not plan.bezier_points:
        return {}
    u = torch.linspace(0, 1, plan.bezier_points)
    late_to_early = sorted(plan.swap_steps, reverse=True)
    found = {}
    for style in plan.styles:
        names = ["neutral", *(swap_name(style, s) for s in late_to_early)]
        control_points = torch.stack([latents[name].float().cpu() for name in names])
        found[f"{style}/bezier"] = bezier.evaluate(control_points, u).transpose(0, 1)
    return found


def swap_name(style: str, swap_step: int) -> str:
    """The name of a swap's latent and image."""
    return f"{style}/s{swap_step:02d}"


def image_path(out: Path, seed: int, name: str) -> Path:
    """Where the image of a latent lies; name: such as "neutral" or "hair/s05"."""
    return out / "images" / f"seed{seed:04d}" / f"{name}.png"


def bezier_name(style: str, point: int, points: int) -> str:
    """The name of the image at one point of a curve."""
    return f"{style}/bezier_{point:0{max(2, len(str(points - 1)))}d}"


def write_images(sd: StableDiffusion, latents: Path, out: Path, label: str) -> int:
    """Decode the final latents and those of the curves, but for images that are there already; returns how many.

    Decoding takes more memory than the U-Net (0.8 GB for one image of 512 x 512 in float32): its batches are smaller.
    """
    wanted = [(path, latent) for path, latent in _image_files(latents, out) if not path.exists()]
    with tqdm(total=len(wanted), desc=f"{label}: decoding", unit="image", mininterval=1) as bar:
        while wanted:
            batch = max(1, 16 * 16 * 16 // wanted[0][1][0].numel())
            (paths, rows), wanted = zip(*wanted[:batch], strict=True), wanted[batch:]
            for path, pixels in zip(paths, to_uint8(sd.decode_latents(torch.stack(rows))), strict=True):
                save_image(path, pixels)
            bar.update(len(paths))
    return int(bar.n)


def _image_files(latents: Path, out: Path) -> Iterator[tuple[Path, Tensor]]:
    """Every image's path and its latent (C, H, W); noises and kept steps are no images."""
    for seed, name, latent in iterate_latents(latents):
        style, _, last = name.rpartition("/")
        if last == "bezier":
            for i, point in enumerate(latent):
                yield image_path(out, seed, bezier_name(style, i, len(latent))), point
        elif last not in ("x_T", "y_T", *KEEPABLE):
            yield image_path(out, seed, name), latent


def write_figures(out: Path, plan: Traversal, seeds: Sequence[int] | None = None, title: str = "") -> list[Path]:
    """Draw a finished traversal from its images, in the manner of the paper's figures 1, 3 and 6.

    figure.png: a row per seed and style, from the neutral image over late swaps to the earliest one, with the change
    against the neutral image under each. curve.gif: every style of the first seed, along its Bezier curve.

    Args:    out: the traversal's folder.  seeds: those to draw; None: as many as give about six rows.
    Returns: the files written.
    """
    rows = [
        row for seed in seeds or plan.seeds[: max(1, 6 // len(plan.styles))] for row in trajectory_rows(out, plan, seed)
    ]
    written = [out / "figure.png"]
    save_image(written[0], figures.trajectories(rows, trajectory_columns(plan), title))
    if points := plan.bezier_points:
        seed = (seeds or plan.seeds)[0]
        frames = [
            figures.grid(
                [[load_pixels(image_path(out, seed, bezier_name(style, i, points))) for style in plan.styles]],
                [""],
                list(plan.styles),
                f"u = {i / (points - 1):.2f}",
            )
            for i in range(points)
        ]
        written.append(out / "curve.gif")
        figures.save_animation(written[1], frames)
    return written


def trajectory_rows(out: Path, plan: Traversal, seed: int) -> list[tuple[str, list[Pixels]]]:
    """For each style of one seed: its name, and the images from neutral over late swaps to the earliest."""
    late_to_early = sorted(plan.swap_steps, reverse=True)
    names = {style: ["neutral", *(swap_name(style, s) for s in late_to_early)] for style in plan.styles}
    return [(style, [load_pixels(image_path(out, seed, name)) for name in of]) for style, of in names.items()]


def trajectory_columns(plan: Traversal) -> list[str]:
    """The columns of `trajectory_rows`."""
    return ["neutral", *(f"s = {s}" for s in sorted(plan.swap_steps, reverse=True))]


def read_record(out: Path) -> dict[str, Any]:
    """The run.json of a folder; empty where there is none. Raises ValueError where it is no JSON object."""
    return read_json(out / "run.json")
