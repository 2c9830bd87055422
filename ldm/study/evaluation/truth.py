"""Ground truth: a rendered phantom is encoded, inverted, swapped, and held against the rendered counterfactual.

What encoding and inversion lose by themselves, the floor, is measured beside everything: the neutral branch retraces
the original, at any scale, because the negative prompt of these runs is the neutral one.

Letters: A attributes, S swap steps, K heads, G patients of the gallery, C H W of a latent, h w of an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.conditioning import constant
from ldm.images import from_uint8
from ldm.phantom import Phantom, render
from ldm.phantom.prompts import Cell
from ldm.pipeline import StableDiffusion
from ldm.study.evaluation.instruments import Instruments
from ldm.study.evaluation.trajectories import stacked
from ldm.study.metrics import ground_truth
from ldm.traversal.inversion import ddim_inversion
from ldm.traversal.plan import Traversal
from ldm.traversal.sampling import latent_shape, prompt_tree, sample

GALLERY_SEEDS = range(200)  # the other patients among whom an edited one must still be recognised
DILATE_PX = 4  # half of a latent pixel: the autoencoder cannot place an edge more finely
INVERSION_ITERATIONS = 3
FLOORS = ("psnr_db", "latent", "skill", "leakage", "retrieved", "oracle")
SETTINGS = {
    **{"gallery": len(GALLERY_SEEDS), "dilate_px": DILATE_PX, "inversion_iterations": INVERSION_ITERATIONS},
    "floors": list(FLOORS),  # a folder without one of them is of an earlier version, and is not continued
}


@dataclass(frozen=True, eq=False)
class Patient:
    """A neutral phantom and what it looks like with each attribute."""

    original: Phantom
    counterfactuals: tuple[Phantom, ...]  # A

    @classmethod
    def of(cls, cell: Cell, seed: int, size: int) -> "Patient":
        """Render them. Raises ValueError for a cell that is not of phantoms."""
        if cell.domain is None:
            raise ValueError(f"cell: {cell.name!r} is not of phantoms, so there is no ground truth")
        domain, base = cell.domain, dict(cell.base)
        edited = (render(domain, seed, base | {attribute: True}, size) for attribute in cell.styles)
        return cls(render(domain, seed, base, size), tuple(edited))

    def images(self) -> Tensor:
        """The original, then the counterfactuals: (1 + A, 3, h, w) in [-1, 1]."""
        return from_uint8(np.stack([phantom.to_uint8() for phantom in (self.original, *self.counterfactuals)]))

    def masks(self, attributes: Sequence[str]) -> Tensor:
        """Where each attribute may change the image: (A, h, w) bool."""
        masks = [phantom.masks[name] for phantom, name in zip(self.counterfactuals, attributes, strict=True)]
        return torch.from_numpy(np.stack(masks))


def gallery(cell: Cell, size: int) -> Tensor:
    """The neutral images of `GALLERY_SEEDS`: (G, 3, h, w)."""
    images = [render(cell.domain or "", seed, dict(cell.base), size).to_uint8() for seed in GALLERY_SEEDS]
    return from_uint8(np.stack(images))


def retraceable(plan: Traversal, swap_steps: tuple[int, ...], guidance: float) -> Traversal:
    """The same plan with the neutral prompt as the negative one, so that the neutral branch retraces an inversion."""
    return replace(plan, negative=plan.neutral, eta=0.0, swap_steps=swap_steps, guidance=guidance)


def invert(sd: StableDiffusion, plan: Traversal, latents: Tensor) -> Tensor:
    """x_T of some latents (B, C, H, W) under the plan's neutral prompt, at guidance 1."""
    context = sd.encode_prompts([plan.neutral])
    eps_fn = sd.guided(constant(context, plan.steps), 1.0)
    with torch.no_grad():
        *_, last = ddim_inversion(
            eps_fn, latents.float().to(sd.device), sd.schedule, plan.steps, iterations=INVERSION_ITERATIONS
        )
    return last.x_t


def measure_truth(
    instruments: Instruments, cell: Cell, plan: Traversal, seed: int, others: Tensor
) -> dict[str, Tensor]:
    """One rendered patient, edited by every attribute at every swap step, against the truth.

    Args:    plan: see `retraceable`.  others: see `gallery`.
    Returns: latents.neutral, .swaps;  probabilities.original (K,), .neutral (K,) of the retraced image, .truth (A, K),
             .swaps (A, S, K);  skill, leakage, retrieved, oracle: (A, S).
             floor.psnr_db, .latent (relative error), .retrieved (A,), .oracle of the retraced original;
             floor.skill, .leakage (A,) of the true counterfactual encoded and decoded, a perfect edit.
    """
    sd, attributes = instruments.sd, tuple(plan.styles)
    shape = latent_shape(sd, plan)
    patient = Patient.of(cell, seed, shape[1] * sd.config.vae.downscale)
    images, masks = patient.images(), patient.masks(attributes)
    original, truths = images[0], images[1:]
    encoded = sd.encode_image(images).float()

    x_T = invert(sd, plan, encoded[:1])
    result = sample(sd, plan, prompt_tree(sd, plan), [seed], x_T=x_T)
    latents = {name: rows[0].cpu() for name, rows in result.latents.items()}
    neutral, swaps = latents["neutral"], stacked(latents, plan)

    retraced = from_uint8(instruments.pixels(neutral[None]))[0]
    edited_pixels = instruments.pixels(swaps.flatten(0, 1))
    edited = from_uint8(edited_pixels).unflatten(0, swaps.shape[:2])
    others = others[[g for g in range(len(others)) if GALLERY_SEEDS[g] != seed]]
    autoencoded = from_uint8(instruments.pixels(encoded))

    numbers = {
        "latents.neutral": neutral,
        "latents.swaps": swaps,
        "probabilities.original": instruments.judged(images)[0],
        "probabilities.truth": instruments.judged(images)[1:],
        "probabilities.neutral": instruments.judged(retraced[None])[0],
        "probabilities.swaps": instruments.probabilities(edited_pixels).unflatten(0, swaps.shape[:2]),
        "floor.psnr_db": psnr_db(retraced, original),
        "floor.latent": (neutral - encoded[0].cpu()).norm() / encoded[0].cpu().norm(),
        "floor.retrieved": torch.from_numpy(
            np.concatenate([ground_truth.identity_hits(retraced[None], original, others, m) for m in masks])
        ),
        "floor.oracle": torch.from_numpy(ground_truth.oracle_class(retraced[None], images[None]) == 0)[0],
        "floor.skill": torch.from_numpy(ground_truth.skill(autoencoded[1:], truths, original.expand_as(truths))),
        "floor.leakage": torch.from_numpy(
            ground_truth.leakage(autoencoded[1:], autoencoded[:1].expand_as(truths), masks, DILATE_PX)
        ),
    }
    measured: dict[str, list[NDArray[Any]]] = {
        "skill": [
            ground_truth.skill(e, t.expand_as(e), original.expand_as(e)) for e, t in zip(edited, truths, strict=True)
        ],
        "leakage": [
            ground_truth.leakage(e, retraced.expand_as(e), m.expand(len(e), -1, -1), DILATE_PX)
            for e, m in zip(edited, masks, strict=True)
        ],
        "retrieved": [ground_truth.identity_hits(e, original, others, m) for e, m in zip(edited, masks, strict=True)],
        "oracle": [
            ground_truth.oracle_class(e, images.expand(len(e), *images.shape)) == a + 1 for a, e in enumerate(edited)
        ],
    }
    for name, rows in measured.items():
        numbers[name] = torch.from_numpy(np.stack(rows).astype(np.float64))
    return numbers


def psnr_db(image: Tensor, reference: Tensor) -> Tensor:
    """Peak signal to noise ratio of images in [-1, 1], whose range is 2."""
    return 10 * torch.log10(4 / (image - reference).square().mean())
