"""The autoencoder's large maps on a CPU, a band of rows at a time: less memory, and what a band needs stays in cache.

A convolution of 3 x 3 needs one row above and one below its band; a GroupNorm needs the mean and the variance of the
whole map, which are taken first. So a band gives what the whole map would, up to the last bits of the norm.

Letters: B batch, C channels, H W height and width, G groups.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.blocks import ResnetBlock, Upsample
from ldm.fast import winograd
from ldm.fast.watching import convolves, transformed, untouched

LARGE = 1 << 23  # numbers in one map, C * H * W: from here on it pays
BAND = 1 << 20  # numbers in a band


def serves(x: Tensor) -> bool:
    """Whether a map is one to go through in bands; of one image, so that it does not depend on the batch."""
    kind = x.device.type == "cpu" and x.dtype == torch.float32 and x.ndim == 4
    dense = kind and x.stride()[1:] == (x.shape[2] * x.shape[3], x.shape[3], 1)  # a part of the channels is, too
    plain = not (torch.is_grad_enabled() or transformed())
    return dense and plain and len(x) > 0 and x[0].numel() >= LARGE and not torch.is_autocast_enabled("cpu")


def resnet(block: ResnetBlock, x: Tensor, own: bool = False) -> Tensor | None:
    """(B, C_in, H, W) -> (B, C_out, H, W), see `ldm.blocks.ResnetBlock`; None where it cannot be had in bands.

    own: x is nobody else's, and its memory is used for the result.
    """
    norm1, conv1, norm2, conv2, shortcut = block.norm1, block.conv1, block.norm2, block.conv2, block.conv_shortcut
    if not (_norm(norm1) and _norm(norm2) and _conv(conv1) and _conv(conv2)):
        return None
    if not (shortcut is None or _conv(shortcut, 1)):
        return None
    width = conv2.out_channels
    if shortcut is not None and own and x.shape[1] >= conv1.out_channels + width:  # room for both beside each other
        h, out = x[:, : conv1.out_channels], x[:, -width:]
        _norm_silu_conv(norm1, conv1, x, h, beside=(shortcut, out))
    else:
        h = _norm_silu_conv(norm1, conv1, x, x.new_empty(len(x), conv1.out_channels, *x.shape[2:]))
        out = x if own else x.clone()
        if shortcut is not None:
            out = shortcut(x)
    return _norm_silu_conv(norm2, conv2, h, out, add=True)


def upsample(block: Upsample, x: Tensor) -> Tensor | None:
    """(B, C, H, W) -> (B, C, 2H, 2W), see `ldm.blocks.Upsample`; None where it cannot be had in bands."""
    conv = block.conv
    if not _conv(conv):
        return None
    _give_back()
    out = x.new_empty(len(x), conv.out_channels, 2 * x.shape[2], 2 * x.shape[3])
    for rows in _bands(x, 4 * max(x.shape[1], conv.out_channels)):
        doubled = F.interpolate(_with_neighbours(x, rows), scale_factor=2.0, mode="nearest")
        above, below = rows.start == 0, rows.stop == x.shape[2]
        doubled = doubled[:, :, 0 if above else 1 : None if below else -1]
        out[:, :, 2 * rows.start : 2 * rows.stop] = _conv_rows(conv, doubled, above, below)
    return out


def norm_silu_conv(norm: nn.Module, conv: nn.Module, x: Tensor) -> Tensor | None:
    """conv(silu(norm(x))), the end of a decoder; None where it cannot be had in bands."""
    if not (_norm(norm) and _conv(conv)):
        return None
    return _norm_silu_conv(norm, conv, x, x.new_empty(len(x), conv.out_channels, *x.shape[2:]))


def _norm_silu_conv(
    norm: nn.GroupNorm,
    conv: nn.Conv2d,
    x: Tensor,
    out: Tensor,
    beside: tuple[nn.Conv2d, Tensor] | None = None,
    add: bool = False,
) -> Tensor:
    """out = conv(silu(norm(x))), or added to it; beside: what a 1 x 1 convolution makes of x, and where to put it.

    All may be in the memory of x: a row is written once it was read, and the last of a band is kept for the next.
    """
    mean, scale, shift = _moments(norm, x)
    above = x[:, :, :0]
    for rows in _bands(x, max(x.shape[1], conv.out_channels)):
        these = x[:, :, rows.start : rows.stop + 1]
        h = F.silu(torch.addcmul(shift, torch.cat([above, these], dim=2).sub_(mean), scale), inplace=True)
        above = x[:, :, rows.stop - 1 : rows.stop].clone()
        h = _conv_rows(conv, h, rows.start == 0, rows.stop == x.shape[2])
        if beside is not None:
            shortcut, there = beside
            there[:, :, rows] = shortcut(x[:, :, rows])
        out[:, :, rows].add_(h) if add else out[:, :, rows].copy_(h)
    return out


def _moments(norm: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mean, weight / std and bias, each (B or 1, C, 1, 1): norm(x) = (x - mean) * weight / std + bias.

    The variance is that of x - mean, a second look at x: E[x^2] - E[x]^2 would lose it where the mean is large.
    """
    groups = [group for image in x for group in image.reshape(norm.num_groups, -1)]
    means = [group.mean() for group in groups]
    mean = torch.stack(means)
    variance = torch.stack([(group - m).square_().mean() for group, m in zip(groups, means, strict=True)])
    each = x.shape[1] // norm.num_groups
    mean, rstd = (
        y.view(len(x), norm.num_groups).repeat_interleave(each, dim=1)[:, :, None, None]
        for y in (mean, (variance + norm.eps).rsqrt_())
    )
    weight, bias = (1.0 if norm.weight is None else norm.weight[:, None, None]), norm.bias
    return mean, rstd * weight, x.new_zeros(1) if bias is None else bias[:, None, None]


def _give_back() -> None:
    """To the system, what freed tensors have left of glibc's heap: some 250 MB after a call of SD1.5's U-Net."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def _bands(x: Tensor, channels: int) -> Iterator[slice]:
    """The rows of x, as many at a time as BAND has room for with so many channels."""
    height, width = x.shape[2:]
    step = max(1, BAND // (channels * width))
    for start in range(0, height, step):
        yield slice(start, min(start + step, height))


def _with_neighbours(x: Tensor, rows: slice) -> Tensor:
    """Rows of x, with the one above and the one below where there are any."""
    return x[:, :, max(rows.start - 1, 0) : rows.stop + 1]


def _conv_rows(conv: nn.Conv2d, h: Tensor, above: bool, below: bool) -> Tensor:
    """A 3 x 3 convolution of rows that have their neighbours; above, below: but for the map's edge, where zeros are."""
    if above or below:
        h = F.pad(h, (0, 0, int(above), int(below)))
    if winograd.able(conv, h) and winograd.work(conv, h) >= winograd.WORK >> 4:  # of the whole map it is far more
        return winograd.convolution(h, conv.weight, conv.bias, padding=(0, 1))
    return F.conv2d(h, conv.weight, conv.bias, padding=(0, 1))


def _norm(module: nn.Module) -> TypeGuard[nn.GroupNorm]:
    return isinstance(module, nn.GroupNorm) and untouched(module, nn.GroupNorm)


def _conv(module: nn.Module, size: int = 3) -> TypeGuard[nn.Conv2d]:
    """Whether it is a plain convolution that keeps the size of a map."""
    return convolves(module, size) and untouched(module, nn.Conv2d)
