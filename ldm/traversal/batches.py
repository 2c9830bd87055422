"""How much goes through a network at once: on a CPU a fixed amount, on a GPU what its free memory holds.

A GPU of today is busy with 32 rows of 64 x 64 latents and more; 8 leave most of it idle. Numbers of rows are powers of
two, so that a little more or less free memory is the same batch, and gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ldm.pipeline import StableDiffusion

ROWS_ON_A_CPU = 8  # at 64 x 64
MOST_ROWS, MOST_IMAGES = 64, 16
SHARE = 0.5  # of the free memory; recorded graphs, the workspaces of convolutions and what others do have the rest
# Maps of the first width that live at once: 24 of a U-Net's row and 6 of a decoded image, counted over a call of SD1.5
# without its attention's scores; then a third and two thirds more.
UNET_MAPS, DECODER_MAPS = 32, 10


def free_bytes(device: torch.device) -> int:
    """Of a GPU, what torch holds and does not use included."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def rows_a_call(sd: StableDiffusion, shape: Sequence[int]) -> int:
    """Rows of a U-Net call; shape: (C, H, W) of a latent."""
    positions = math.prod(shape[1:])
    fewest = max(1, ROWS_ON_A_CPU * 64 * 64 // positions)
    if sd.device.type != "cuda":
        return fewest
    row = UNET_MAPS * sd.config.unet.widths[0] * positions * sd.dtype.itemsize
    return max(1, min(_fitting(sd.device, row), max(MOST_ROWS, fewest)))


def images_a_call(sd: StableDiffusion, shape: Sequence[int]) -> int:
    """Images decoded in one call; shape: (C, H, W) of a latent. They take more memory than a U-Net's rows."""
    if sd.device.type != "cuda":
        return max(1, 16 * 16 * 16 // math.prod(shape[1:]))
    pixels = math.prod(shape[1:]) * sd.config.vae.downscale**2
    image = DECODER_MAPS * sd.config.vae.widths[0] * pixels * sd.vae.quant_conv.weight.dtype.itemsize
    return max(1, min(_fitting(sd.device, image), MOST_IMAGES))


def _fitting(device: torch.device, each: int) -> int:
    """The largest power of two of them that fits; 0: none does."""
    fitting = int(SHARE * free_bytes(device)) // each
    return 1 << (fitting.bit_length() - 1) if fitting else 0
