"""Convolutions of 3 x 3 with many weights and a small result, in float32 on a CPU: one matrix product an image.

torch's own lays the weights out anew in each call, which for 8 x 8 positions is as much work as the convolution.

Letters: B images, C channels, K channels of the result, H, W height and width, S stride.
"""

from __future__ import annotations

import math
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.fast import onednn, winograd
from ldm.fast.watching import convolves, intercepted, readable

POSITIONS = 64  # of the result, at most
WEIGHTS = 1 << 23  # at least


def may_serve(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a layer is a convolution that small maps are fast with."""
    return (convolves(conv, 3) or convolves(conv, 3, stride=2)) and weights(conv) >= WEIGHTS and onednn.there()


def weights(conv: nn.Conv2d) -> int:
    """How many a layer has; not asked of the weight itself, since some are computed as they are read."""
    return 9 * conv.in_channels * conv.out_channels


def serves(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether a map is one to do it with; by one image's size, so that it does not depend on the batch."""
    if not readable(x, 4) or weights(conv) < WEIGHTS or len(x) == 0:  # first, as in winograd
        return False
    if intercepted() or not may_serve(conv) or not onednn.on():
        return False
    small = 0 < math.prod(size_of(x, conv.stride[0])) <= POSITIONS
    return small and x.is_contiguous() and winograd.undisturbed(conv, x)


def size_of(x: Tensor, stride: int) -> tuple[int, int]:
    """Height and width of the result."""
    return (x.shape[2] - 1) // stride + 1, (x.shape[3] - 1) // stride + 1


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """x (B, C, H, W) with a border of zeros, weight (K, C, 3, 3), bias (K,) -> (B, K, H / S, W / S), rounded up.

    A weight of Inf gives NaN where it meets the border.
    """
    out = x.new_empty(len(x), len(weight), *size_of(x, stride))
    for image, there in zip(x, out, strict=True):
        windows = F.unfold(image, 3, padding=1, stride=stride)  # (9 C, positions)
        product = onednn.linear(weight.flatten(1), windows.T, None)  # (K, positions)
        torch.add(product, 0 if bias is None else bias[:, None], out=there.flatten(1))
    return out
