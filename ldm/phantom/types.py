"""What a phantom is: one rendered image with everything that is known about it."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Phantom:
    """A rendered image and its ground truth.

    The masks are exact: switching one attribute off changes no pixel outside its mask, in float32 and in uint8.
    """

    domain: str
    seed: int
    image: NDArray[np.float32]  # (H, W, 3) in [0, 1]; chest: three equal channels
    masks: Mapping[str, NDArray[np.bool_]]  # of each attribute that is present: the pixels it may change, (H, W)
    attributes: Mapping[str, bool]
    anatomy: Mapping[str, float]  # the parameters drawn from the seed; the same whatever attributes are switched on

    def to_uint8(self) -> NDArray[np.uint8]:
        """The image as bytes, rounded to nearest, (H, W, 3)."""
        return np.rint(self.image * 255.0).astype(np.uint8)
