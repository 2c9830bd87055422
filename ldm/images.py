"""Images: as bytes, as the networks take them, and as files.

Bytes are (H, W, 3), as in a file; the networks take (B, 3, H, W) in [-1, 1].
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ldm.files import complete

Pixels = NDArray[np.uint8]


def to_uint8(images: Tensor) -> Pixels:
    """(B, 3, H, W) in [-1, 1], clipped -> (B, H, W, 3) bytes, rounded to nearest."""
    pixels = (images.float().clamp(-1, 1) + 1) * 127.5
    return pixels.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def from_uint8(pixels: Pixels | Tensor) -> Tensor:
    """(..., H, W, 3) bytes -> (..., 3, H, W) float32 in [-1, 1]."""
    tensor = pixels if isinstance(pixels, Tensor) else torch.tensor(pixels)
    return tensor.movedim(-1, -3).float() / 127.5 - 1


def load_pixels(path: Path) -> Pixels:
    """An image file as (H, W, 3) bytes."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def save_image(path: Path, image: Image.Image | Pixels) -> None:
    """A PNG; its folder is made where it is missing."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    path.parent.mkdir(parents=True, exist_ok=True)
    with complete(path) as partial:
        picture.save(partial, format="PNG")
