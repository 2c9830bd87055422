"""Does a model repeat its training images? How near samples come to them, beside how near unseen real images come.

An image is compared by its 32 x 32 means, in which a copy is a copy although its texture is gone; distances are root
mean squares. A smooth sample is near many images, so the distance that counts is the one to the nearest training image
over the mean one to the 50 nearest: a copy has one neighbour that is far nearer than the others.
[compare Carlini et al. 2023, "Extracting training data from diffusion models", section 5.1]

Letters: Q queries, V training images, F = 3 * 32 * 32 numbers of an image.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

SIDE = 32
NEIGHBOURS = 50
CHUNK = 256
UNSEEN_BELOW = 0.01  # a sample is suspect where its ratio is below that of all but this share of unseen images


@dataclass(frozen=True, eq=False)
class Nearest:
    """For each query: its nearest training image, how far that is in [-1, 1] units, and that over the 50 nearest."""

    index: NDArray[np.int64]  # (Q,)
    distance: NDArray[np.float64]  # (Q,)
    ratio: NDArray[np.float64]  # (Q,) at most 1


def fingerprint(images: Tensor) -> Tensor:
    """(B, 3, S, S) in [-1, 1], S a multiple of 32 -> (B, F)."""
    if images.shape[-1] % SIDE or images.shape[-2] % SIDE:
        raise ValueError(f"images: {images.shape[-2]} x {images.shape[-1]} pixels, expected multiples of {SIDE}")
    return F.adaptive_avg_pool2d(images.float(), SIDE).flatten(1)


def nearest(queries: Tensor, bank: Tensor) -> Nearest:
    """The neighbours of some fingerprints (Q, F) among those of the training images (V, F)."""
    if not len(bank):
        raise ValueError("bank: no training image to compare with")
    found = [_of_chunk(chunk, bank) for chunk in queries.split(CHUNK)]
    index, distance, ratio = (np.concatenate(column) for column in zip(*found, strict=True))
    return Nearest(index, distance, ratio)


def _of_chunk(queries: Tensor, bank: Tensor) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    distances = torch.cdist(queries, bank) / queries.shape[1] ** 0.5
    near, index = distances.topk(min(NEIGHBOURS, len(bank)), largest=False)
    ratio = near[:, 0] / near.mean(dim=1).clamp(min=1e-12)
    return index[:, 0].numpy(), near[:, 0].double().numpy(), ratio.double().numpy()


def report(samples: Nearest, unseen: Nearest) -> dict[str, float]:
    """Medians of both, and the share of samples that are nearer to one training image than unseen images ever are."""
    threshold = float(np.quantile(unseen.ratio, UNSEEN_BELOW))
    return {
        "samples": len(samples.ratio),
        "unseen_images": len(unseen.ratio),
        "distance_of_samples": float(np.median(samples.distance)),
        "distance_of_unseen": float(np.median(unseen.distance)),
        "ratio_of_samples": float(np.median(samples.ratio)),
        "ratio_of_unseen": float(np.median(unseen.ratio)),
        "suspect_below": threshold,
        "suspect_share": float((samples.ratio < threshold).mean()),
    }
