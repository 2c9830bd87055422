"""A perceptual loss: images that a network sees alike, not only pixels that are near each other.

Pixels alone are nearest on average where fine texture and thin hairs are left out: the mean of all that might be there.
To the first layers of a network trained on photographs such a line is much, a shift of the whole brightness little.

d(x, y) = sum over layers l of mean over positions of |f_l(x) - f_l(y)|^2,  f_l of unit length over its channels
[Zhang et al. 2018, arXiv:1801.03924, eq. 1 with all weights 1]

Letters: B batch, S the side of an image.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.study import classifier

LAYERS = 3  # of timm's feature maps: at 1/2, 1/4 and 1/8 of the image's side in most networks


class Perceptual(nn.Module):
    """The distance d in the first feature maps of a classifier, which stay as they are."""

    def __init__(self, judge: classifier.Classifier) -> None:
        super().__init__()
        if not hasattr(judge.network, "forward_intermediates"):
            raise ValueError(
                f"perceptual: timm gives no feature maps of {judge.model}; use an efficientnet, for example"
            )
        self.network, self.mean, self.std = judge.network.requires_grad_(False).eval(), judge.mean, judge.std
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def features(self, images: Tensor) -> list[Tensor]:
        """Feature maps of images (B, 3, S, S) in [-1, 1], each of unit length over its channels."""
        maps = self.network.forward_intermediates(  # type: ignore[operator]
            classifier.normalise(images, self.mean, self.std),
            indices=list(range(LAYERS)),
            stop_early=True,
            intermediates_only=True,
        )
        return [F.normalize(each.float(), dim=1) for each in maps]

    def forward(self, images: Tensor, decoded: Tensor) -> Tensor:
        """d, mean over B: a scalar. The gradient reaches `decoded` alone. Args: (B, 3, S, S) each, in [-1, 1]."""
        with torch.autocast(images.device.type, torch.bfloat16):
            with torch.no_grad():
                wanted = self.features(images)
            come = self.features(decoded)
        return torch.stack([(f - g).square().sum(1).mean() for f, g in zip(come, wanted, strict=True)]).sum()


def load(path: Path, device: torch.device | str = "cpu") -> Perceptual:
    """That of a classifier which `ldm classify train` wrote. Raises ValueError for another file."""
    return Perceptual(classifier.load(path, device))
