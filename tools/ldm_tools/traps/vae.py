"""Mistakes around the autoencoder: between images and latents."""

import copy
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.blocks import Downsample
from ldm.samplers import initial_noise
from ldm.vae import DiagonalGaussian
from ldm_tools.traps.conventions import Conventions, replaced


class Symmetric(nn.Module):
    """A downsampler padded on every side."""

    def __init__(self, downsample: nn.Module) -> None:
        super().__init__()
        assert isinstance(downsample, Downsample)
        self.conv = downsample.conv

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.conv.weight, self.conv.bias, stride=2, padding=1)


def symmetric_padding(recipe: Conventions) -> Conventions:
    """One pixel on every side in the encoder's downsamplers; SD1.5 pads right and bottom only."""
    return replace(recipe, vae=replaced(recipe.vae, Downsample, Symmetric))


def epsilon(recipe: Conventions) -> Conventions:
    """1e-5, torch's default, in the autoencoder's norms; SD1.5 has 1e-6."""
    vae = copy.deepcopy(recipe.vae)
    for module in vae.modules():
        if isinstance(module, nn.GroupNorm):
            module.eps = 1e-5
    return replace(recipe, vae=vae)


def no_scale_in_decoding(recipe: Conventions) -> Conventions:
    """Latents decoded without the division by 0.18215."""
    return replace(recipe, decode_scale=1.0)


def no_scale_in_encoding(recipe: Conventions) -> Conventions:
    """Latents of images without the factor 0.18215."""
    return replace(recipe, encode_scale=1.0)


def half_precision(recipe: Conventions) -> Conventions:
    """Decoding in float16, whose largest number is 65504: published weights can pass it, and images come out black."""
    return replace(recipe, decode_dtype=torch.float16)


def posterior_sampled(recipe: Conventions) -> Conventions:
    """A sample of the posterior for an image that is to be edited; its mean loses less."""

    def pick(posterior: DiagonalGaussian) -> Tensor:
        noise = initial_noise(range(len(posterior.mean)), posterior.mean.shape[1:])
        return posterior.sample(noise.to(posterior.mean))

    return replace(recipe, pick=pick)


def images_from_0_to_1(recipe: Conventions) -> Conventions:
    """Images in [0, 1] into the encoder, which knows [-1, 1]."""
    return replace(recipe, to_network=lambda images: (images + 1) / 2)


def truncated_bytes(recipe: Conventions) -> Conventions:
    """Pixels cut off to whole numbers, as in the original code; rounding is nearer."""

    def to_bytes(images: Tensor) -> NDArray[np.uint8]:
        pixels = (images.clamp(-1, 1) + 1) * 127.5
        return pixels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

    return replace(recipe, to_bytes=to_bytes)
