"""What a classifier's training images go through, so that it looks at what matters. [authors' code]

All images of a batch are drawn for at once, each with numbers of its own, from torch's global random stream.

Letters: B images, S the side in pixels.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

NOISE = 0.03  # most standard deviation of the noise of `soften`, in units of [-1, 1]


@dataclass(frozen=True)
class Augmentation:
    """How far images are moved; the default moves nothing."""

    flip_horizontal: bool = False
    flip_vertical: bool = False
    degrees: float = 0.0  # largest rotation, either way
    shift: float = 0.0  # largest translation, as a share of the side
    jitter: float = 0.0  # largest change of brightness and of contrast, as a share
    soften: bool = False  # blur and noise, for images that went through an autoencoder


CHEXPERT = Augmentation(flip_horizontal=True, degrees=10.0, shift=0.1, jitter=0.2)
ISIC = Augmentation(flip_horizontal=True, flip_vertical=True)


def augment(images: Tensor, augmentation: Augmentation) -> Tensor:
    """(B, 3, S, S) in [-1, 1] -> the same, moved. What comes in from outside the image is black."""
    a = augmentation
    if a.flip_horizontal:
        images = torch.where(_coin(images), images.flip(3), images)
    if a.flip_vertical:
        images = torch.where(_coin(images), images.flip(2), images)
    if a.degrees or a.shift:
        images = move(images, _spread(images, math.radians(a.degrees)), _spread(images, a.shift, 2))
    if a.jitter:
        images = jitter(images, 1 + _spread(images, a.jitter), 1 + _spread(images, a.jitter))
    if a.soften:
        images = soften(images)
    return images


def move(images: Tensor, angles: Tensor, shifts: Tensor) -> Tensor:
    """Rotate each image about its centre, then shift it.

    Args:    angles: (B, 1) radians.  shifts: (B, 2) shares of the width and the height.
    """
    cos, sin = angles.cos()[:, 0], angles.sin()[:, 0]
    # Where each output pixel is taken from, in coordinates that run from -1 to 1 across the image
    x, y = -2 * shifts[:, 0], -2 * shifts[:, 1]
    theta = torch.stack([cos, sin, cos * x + sin * y, -sin, cos, cos * y - sin * x], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, mode="bilinear", padding_mode="zeros", align_corners=False) - 1


def jitter(images: Tensor, brightness: Tensor, contrast: Tensor) -> Tensor:
    """Multiply each image's intensity, then its distance from its own mean; factors (B, 1), clipped to [-1, 1]."""
    intensity = (images + 1) * brightness[:, :, None, None]
    mean = intensity.mean(dim=(1, 2, 3), keepdim=True)
    return (mean + (intensity - mean) * contrast[:, :, None, None] - 1).clamp(-1, 1)


def soften(images: Tensor) -> Tensor:
    """Blur each image, from not at all to a standard deviation of 1.2 pixels, then add noise, from none to 0.03.

    Autoencoders lose fine texture; a classifier that lives by it does not know their images.
    """
    share = torch.rand(len(images), 1, 1, 1, device=images.device)
    level = NOISE * torch.rand(len(images), 1, 1, 1, device=images.device)
    return images + share * (_blurred(images) - images) + level * torch.randn_like(images)


def _blurred(images: Tensor) -> Tensor:
    """Two means over 3 x 3 pixels, close to a Gaussian of variance 2 * 2/3 pixels."""
    for _ in range(2):
        images = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    return images


def _coin(images: Tensor) -> Tensor:
    return torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5


def _spread(images: Tensor, most: float, columns: int = 1) -> Tensor:
    """Uniform in [-most, most], (B, columns)."""
    return (2 * torch.rand(len(images), columns, device=images.device) - 1) * most
