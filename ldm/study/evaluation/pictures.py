"""From a few seeds' latents to what people look at: the material of the figures and the pages of the explorer.

Letters: A attributes, S swap steps, P points of the curve, C H W of a latent, h w of an image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.images import Pixels, load_pixels
from ldm.phantom.prompts import Cell
from ldm.study.evaluation.instruments import Instruments
from ldm.study.evaluation.trajectories import stacked
from ldm.study.evaluation.truth import Patient
from ldm.study.metrics.directions import cosine_matrix
from ldm.study.report import explorer
from ldm.study.report.image_figures import FigureImages, LatentMap
from ldm.study.report.latent_map import tsne
from ldm.traversal.plan import Traversal
from ldm.traversal.run_images import bezier_name, image_path
from ldm.traversal.sampling import curves, swap_name
from ldm.traversal.store import load_seed

POINTS = 25  # of a curve, enough to be dragged along smoothly
FEWEST_ON_MAP = 3, 8  # seeds, latents; t-SNE of fewer says nothing


@dataclass(frozen=True, eq=False)
class Shown:
    """One seed, decoded."""

    seed: int
    neutral: Pixels  # (h, w, 3)
    swaps: Pixels  # (A, S, h, w, 3)
    curve: Pixels  # (A, P, h, w, 3); empty (A, 0, h, w, 3) where only the swaps are to be seen
    cosines: NDArray[np.float64]  # (A, S, S)


def decode(instruments: Instruments, plan: Traversal, seed: int, neutral: Tensor, swaps: Tensor, points: int) -> Shown:
    """Images of one seed's neutral latent (C, H, W), its swaps (A, S, C, H, W) and `points` of its curves."""
    named = {"neutral": neutral[None]} | {
        swap_name(style, s): swaps[a, i][None]
        for a, style in enumerate(plan.styles)
        for i, s in enumerate(plan.swap_steps)
    }
    drawn = curves(named, replace(plan, bezier_points=points))
    images = instruments.pixels(
        torch.cat([neutral[None], swaps.flatten(0, 1), *(points[0] for points in drawn.values())])
    )
    a, s = swaps.shape[:2]
    first, swapped, along = np.split(images, [1, 1 + a * s])
    return Shown(
        seed=seed,
        neutral=first[0],
        swaps=swapped.reshape(a, s, *first[0].shape),
        curve=along.reshape(a, points, *first[0].shape),
        cosines=np.stack([cosine_matrix(neutral.numpy(), swapped.numpy()) for swapped in swaps]),
    )


def read(run: Path, plan: Traversal, seed: int) -> Shown:
    """The same from the folder of a finished traversal: its images are there already."""

    def image(name: str) -> Pixels:
        return load_pixels(image_path(run, seed, name))

    latents = load_seed(run / "latents.safetensors", seed)
    points = range(plan.bezier_points)
    return Shown(
        seed=seed,
        neutral=image("neutral"),
        swaps=np.stack([[image(swap_name(style, s)) for s in plan.swap_steps] for style in plan.styles]),
        curve=np.stack([[image(bezier_name(style, i, len(points))) for i in points] for style in plan.styles]),
        cosines=np.stack(
            [cosine_matrix(latents["neutral"].numpy(), swapped.numpy()) for swapped in stacked(latents, plan)]
        ),
    )


# ---- the material of the figures ---------------------------------------------------------------------


def material(
    shown: Mapping[str, Sequence[Shown]], plans: Mapping[str, Traversal], maps: Mapping[str, LatentMap]
) -> FigureImages:
    """What the paper's figures show: cell -> seeds."""
    rows = {
        cell: {
            one.seed: {name: swap_strip(one, plans[cell], a) for a, name in enumerate(plans[cell].styles)}
            for one in seeds
        }
        for cell, seeds in shown.items()
    }
    along = {
        cell: {one.seed: {name: curve_strip(one, a) for a, name in enumerate(plans[cell].styles)} for one in seeds}
        for cell, seeds in shown.items()
    }
    return FigureImages(rows, along, maps)


def swap_strip(shown: Shown, plan: Traversal, a: int) -> list[tuple[str, Pixels]]:
    """neutral, then the swaps from late to early, each with its label."""
    order = sorted(range(len(plan.swap_steps)), key=lambda i: -plan.swap_steps[i])
    return [("neutral", shown.neutral), *((f"s = {plan.swap_steps[i]}", shown.swaps[a, i]) for i in order)]


def curve_strip(shown: Shown, a: int) -> list[tuple[str, Pixels]]:
    """The points of one curve, each with its label."""
    last = len(shown.curve[a]) - 1
    return [(f"u = {i / last:.2f}", image) for i, image in enumerate(shown.curve[a])]


def latent_map(
    plan: Traversal, latents: Mapping[int, tuple[Tensor, Tensor]], steps: Sequence[int], shown: Sequence[Shown]
) -> LatentMap | None:
    """t-SNE of neutral latents and of the swaps at some steps; None for too few.

    Args:    latents: seed -> neutral (C, H, W), swaps (A, S, C, H, W).  shown: seeds that lend thumbnails.
    """
    columns = [plan.swap_steps.index(s) for s in steps]
    points: list[tuple[int, str, int | None, Tensor]] = []
    for seed, (neutral, swaps) in latents.items():
        points.append((seed, "neutral", None, neutral))
        points += [(seed, name, plan.swap_steps[i], swaps[a, i]) for a, name in enumerate(plan.styles) for i in columns]
    if len(latents) < FEWEST_ON_MAP[0] or len(points) < FEWEST_ON_MAP[1]:
        return None
    pictures = {one.seed: one for one in shown}
    strongest, names = min(steps), list(plan.styles)
    thumbnails = {}
    for i, (seed, name, step, _) in enumerate(points):
        if seed in pictures and name == "neutral":
            thumbnails[i] = pictures[seed].neutral
        elif seed in pictures and step == strongest:
            thumbnails[i] = pictures[seed].swaps[names.index(name), plan.swap_steps.index(strongest)]
    return LatentMap(
        points=tsne(torch.stack([latent.flatten() for *_, latent in points]).numpy()),
        attribute=[name for _, name, _, _ in points],
        swap_step=[step for _, _, step, _ in points],
        seed=[seed for seed, _, _, _ in points],
        thumbnails=thumbnails,
    )


# ---- the explorer --------------------------------------------------------------------------------------


def domain(
    instruments: Instruments,
    cell: Cell,
    plan: Traversal,
    patients: Sequence[explorer.PatientView],
    at: LatentMap | None,
    summary: Sequence[tuple[str, Mapping[str, str]]] = (),
    note: str = "",
) -> explorer.Domain:
    """One cell of the explorer. Args: note: of `explorer.Domain`."""
    places = {p.seed: i for i, p in enumerate(patients) if p.kind == "generated"}
    points = () if at is None else zip(at.points, at.attribute, at.swap_step, at.seed, strict=True)
    return explorer.Domain(
        name=cell.name,
        title=cell.title,
        neutral_prompt=plan.neutral,
        heads=tuple(cell.title_of(name) for name in instruments.attributes),
        patients=tuple(patients),
        map=tuple(explorer.MapPoint(places.get(seed), name, s, float(x), float(y)) for (x, y), name, s, seed in points),
        summary=summary,
        note=note,
    )


def generated_patient(
    instruments: Instruments, cell: Cell, plan: Traversal, shown: Shown, judges: Mapping[str, str] | None = None
) -> explorer.PatientView:
    """A patient that the model drew, with the swaps and the curve of every attribute."""
    trajectories = [
        _trajectory(instruments, cell, plan, shown, a, curve_strip(shown, a)[1:], None, judges)
        for a in range(len(plan.styles))
    ]
    return explorer.PatientView(shown.seed, "generated", f"seed {shown.seed}", tuple(trajectories))


def rendered_patient(
    instruments: Instruments, cell: Cell, plan: Traversal, shown: Shown, judges: Mapping[str, str] | None = None
) -> explorer.PatientView:
    """A rendered phantom that was inverted and edited, with the true counterfactuals."""
    truths = Patient.of(cell, shown.seed, len(shown.neutral)).counterfactuals
    trajectories = [
        _trajectory(instruments, cell, plan, shown, a, [], truth.to_uint8(), judges) for a, truth in enumerate(truths)
    ]
    return explorer.PatientView(shown.seed, "rendered", f"rendered patient {shown.seed}", tuple(trajectories))


def _trajectory(
    instruments: Instruments,
    cell: Cell,
    plan: Traversal,
    shown: Shown,
    a: int,
    curve: Sequence[tuple[str, Pixels]],
    truth: Pixels | None,
    judges: Mapping[str, str] | None,
) -> explorer.Trajectory:
    """One attribute: the neutral image, the swaps, and the points of the curve after the first."""
    name = tuple(plan.styles)[a]
    (_, neutral), *swaps = swap_strip(shown, plan, a)
    tiles = [("neutral", "neutral", 0.0, neutral)]
    tiles += [(label, "swap", i / len(swaps), image) for i, (label, image) in enumerate(swaps, start=1)]
    tiles += [(label, "curve", i / len(curve), image) for i, (label, image) in enumerate(curve, start=1)]
    return explorer.Trajectory(
        attribute=name,
        title=cell.title_of(name),
        prompt=plan.styles[name],
        frames=_frames(instruments, sorted(tiles, key=lambda tile: tile[2])),
        truth=truth,
        swap_steps=plan.swap_steps,
        cosines=shown.cosines[a],
        head=cell.title_of(judges[name]) if judges and name in judges else None,
    )


def _frames(instruments: Instruments, tiles: Sequence[tuple[str, Any, float, Pixels]]) -> tuple[explorer.Frame, ...]:
    """(label, kind, position, image) with what the instruments read off the images; the first is neutral."""
    images = np.stack([image for *_, image in tiles])
    probabilities = instruments.probabilities(images).tolist()
    ssim = instruments.ssim(images, images[0]).tolist()
    lpips = instruments.lpips_to(images, images[0]).tolist()
    return tuple(
        explorer.Frame(label, kind, position, image, tuple(p), None if np.isnan(d) else d, similarity)
        for (label, kind, position, image), p, d, similarity in zip(tiles, probabilities, lpips, ssim, strict=True)
    )
