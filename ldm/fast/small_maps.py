"""Convolutions of 3 x 3 of a small map with many weights, in float32 on a CPU: one matrix product an image.

torch's own lays the weights out anew in each call, which at 8 x 8 positions is as much work as the convolution.

Letters: B images, C channels, K channels of the result, H, W height and width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.fast import onednn, winograd
from ldm.fast.watching import traced

POSITIONS = 64  # H W, at most
WEIGHTS = 1 << 23  # at least


def serves(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether a map is one to do it with; by one image's size, so that it does not depend on the batch."""
    weights = 9 * conv.in_channels * conv.out_channels  # not of the weight itself: some are computed as they are read
    if traced() or x.ndim != 4 or weights < WEIGHTS or x.shape[2] * x.shape[3] > POSITIONS:
        return False
    return len(x) > 0 and winograd.able(conv, x) and onednn.there() and bool(torch.backends.mkldnn.enabled)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (B, C, H, W) with a border of zeros, weight (K, C, 3, 3), bias (K,) -> (B, K, H, W)."""
    out = x.new_empty(len(x), len(weight), *x.shape[2:])
    for image, there in zip(x, out, strict=True):
        windows = F.unfold(image, 3, padding=1)  # (9 C, H W)
        product = onednn.linear(weight.flatten(1), windows.T, None)  # (K, H W)
        torch.add(product, 0 if bias is None else bias[:, None], out=there.flatten(1))
    return out
