"""The pictures of a run folder: latents decoded to files, and figures drawn from them.

OUT/images/seed0000/neutral.png, <style>/s05.png, <style>/bezier_00.png
OUT/figure.png, curve.gif
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.images import Pixels, load_pixels, save_image, to_uint8
from ldm.pipeline import StableDiffusion
from ldm.traversal.batches import images_a_call
from ldm.traversal.image_writer import ImageWriter
from ldm.traversal.plan import Traversal
from ldm.traversal.prompt_tree import KEEPABLE
from ldm.traversal.sampling import swap_name
from ldm.traversal.store import iterate_latents


def image_path(out: Path, seed: int, name: str) -> Path:
    """Where the image of a latent lies; name: such as "neutral" or "hair/s05"."""
    return out / "images" / f"seed{seed:04d}" / f"{name}.png"


def bezier_name(style: str, point: int, points: int) -> str:
    """The name of the image at one point of a curve."""
    return f"{style}/bezier_{point:0{max(2, len(str(points - 1)))}d}"


def remove_images(out: Path, seeds: Sequence[int]) -> None:
    """Those of some seeds: they were decoded from latents that are computed anew."""
    for seed in seeds:
        shutil.rmtree(image_path(out, seed, "").parent, ignore_errors=True)


def write_images(sd: StableDiffusion, latents: Path, out: Path, label: str) -> int:
    """Decode the final latents and those of the curves, but for images that are there already; returns how many.

    Files are written by threads while the next images are decoded.
    """
    wanted = [(path, latent) for path, latent in _image_files(latents, out) if not path.exists()]
    at_once = images_a_call(sd, wanted[0][1].shape) if wanted else 1
    with (
        tqdm(total=len(wanted), desc=f"{label}: decoding", unit="image", mininterval=1) as bar,
        ImageWriter(bar.update) as writer,
    ):
        for first in range(0, len(wanted), at_once):
            paths, rows = zip(*wanted[first : first + at_once], strict=True)
            for path, pixels in zip(paths, to_uint8(sd.decode_latents(torch.stack(rows))), strict=True):
                writer.write(path, pixels)
    return len(wanted)


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
    from ldm.traversal import figures

    shown = seeds or plan.seeds[: max(1, 6 // len(plan.styles))]
    rows = [row for seed in shown for row in trajectory_rows(out, plan, seed)]
    written = [out / "figure.png"]
    save_image(written[0], figures.trajectories(rows, trajectory_columns(plan), title))
    if points := plan.bezier_points:
        frames = []
        for i in range(points):
            names = [bezier_name(style, i, points) for style in plan.styles]
            images = [load_pixels(image_path(out, shown[0], name)) for name in names]
            frames.append(figures.grid([images], [""], list(plan.styles), f"u = {i / (points - 1):.2f}"))
        written.append(out / "curve.gif")
        figures.save_animation(written[1], frames)
    return written


def trajectory_rows(out: Path, plan: Traversal, seed: int) -> list[tuple[str, list[Pixels]]]:
    """For each style of one seed: its name, and the images from neutral over late swaps to the earliest."""
    late_to_early = sorted(plan.swap_steps, reverse=True)
    rows = []
    for style in plan.styles:
        names = ["neutral", *(swap_name(style, s) for s in late_to_early)]
        rows.append((style, [load_pixels(image_path(out, seed, name)) for name in names]))
    return rows


def trajectory_columns(plan: Traversal) -> list[str]:
    """The columns of `trajectory_rows`."""
    return ["neutral", *(f"s = {s}" for s in sorted(plan.swap_steps, reverse=True))]
