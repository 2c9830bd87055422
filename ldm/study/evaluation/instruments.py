"""What looks at latents: the decoder, the attribute classifier, LPIPS and SSIM.

Letters: B images, K heads, C H W of a latent.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm import checkpoint
from ldm.images import Pixels, from_uint8, to_uint8
from ldm.names import nearest
from ldm.pipeline import StableDiffusion
from ldm.study.classifier import Classifier
from ldm.study.metrics import perceptual
from ldm.traversal.batches import images_a_call


@dataclass(frozen=True, eq=False)
class Instruments:
    """A model's decoder and the judges of its images."""

    sd: StableDiffusion
    classifier: Classifier | None  # None: nothing here knows the attributes
    classifier_file: Path | None
    lpips: perceptual.Lpips | perceptual.Unavailable = field(repr=False)

    @cached_property  # a checkpoint is gigabytes to hash
    def fingerprint(self) -> dict[str, str | None]:
        """Everything here that a measurement depends on."""
        return {
            "weights_sha256": self.sd.weights_sha256(),
            "weight_set": self.sd.weight_set,
            "dtype": str(self.sd.dtype).removeprefix("torch."),
            "classifier_sha256": checkpoint.sha256(self.classifier_file) if self.classifier_file else None,
            "lpips": None if isinstance(self.lpips, perceptual.Unavailable) else self.lpips.net,
        }

    def check_size(self, shape: tuple[int, int, int]) -> None:
        """ValueError where latents (C, H, W) give images of a size that the classifier was not trained on."""
        height, width = (side * self.sd.config.vae.downscale for side in shape[1:])
        if self.classifier is None:
            return
        if height != width or height != self.classifier.input_size:
            size = self.classifier.input_size
            raise ValueError(
                f"images: {width} x {height} pixels, but {self.classifier_file} was trained on {size} x {size}; "
                "use a classifier of that size (`ldm classify train`), or trajectories of this one's"
            )

    def pixels(self, latents: Tensor) -> Pixels:
        """(B, C, H, W) -> (B, 8H, 8W, 3) bytes: every judge sees what a file would hold.

        Decoded in pieces of one size whatever B is, for decoding takes more memory than the U-Net.
        """
        at_once = images_a_call(self.sd, latents.shape[1:])
        return np.concatenate([to_uint8(self.sd.decode_latents(piece)) for piece in latents.split(at_once)])

    @property
    def attributes(self) -> tuple[str, ...]:
        """The K attributes that the classifier knows."""
        return () if self.classifier is None else self.classifier.attributes

    def probabilities(self, pixels: Pixels) -> Tensor:
        """(B, H, W, 3) bytes -> (B, K); (B, 0) without a classifier."""
        return self.judged(from_uint8(pixels))

    def judged(self, images: Tensor) -> Tensor:
        """The same of images (B, 3, H, W) in [-1, 1]."""
        return torch.empty(len(images), 0) if self.classifier is None else self.classifier.probabilities(images)

    def ssim(self, pixels: Pixels, reference: Pixels) -> Tensor:
        """Structural similarity of each image with the (H, W, 3) reference, (B,)."""
        return perceptual.ssim(from_uint8(pixels), from_uint8(reference[None])[0])

    def lpips_to(self, pixels: Pixels, reference: Pixels) -> Tensor:
        """LPIPS of each image to the (H, W, 3) reference, (B,); NaN where its weights are not at hand."""
        if isinstance(self.lpips, perceptual.Unavailable):
            return torch.full((len(pixels),), torch.nan, dtype=torch.float64)
        near = from_uint8(reference[None])[0]
        return torch.cat([self.lpips(piece, near).double() for piece in from_uint8(pixels).split(16)])

    def heads(self, attributes: tuple[str, ...], classes: str) -> tuple[str, ...]:
        """The heads that compete in the CFRT, seen to hold every attribute: all but the class's, unless it is swapped.

        Returns: none where there are no attributes to look for.
        Raises:  ValueError: an attribute that the classifier does not know, or fewer than two heads.
        """
        if not attributes:
            return ()
        heads = tuple(name for name in self.attributes if name != classes or classes in attributes)
        for name in attributes:
            if name not in heads:
                raise ValueError(
                    f"attributes: the classifier has no {name!r}{nearest(name, heads)}; it has {', '.join(heads)}; "
                    "use another --classifier, name the styles as it does, or --map STYLE=ATTRIBUTE"
                )
        if len(heads) < 2:
            raise ValueError(f"attributes: the classifier has {len(heads)} attribute; CFRT compares two or more")
        return heads
