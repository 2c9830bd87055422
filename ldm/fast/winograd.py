"""Convolutions of 3 x 3 on a CPU with a quarter of the multiplications: Winograd's algorithm, F(4 x 4, 3 x 3).

4 x 4 results need 6 x 6 numbers d of a map and the 3 x 3 weights g. Between transforms that hardly multiply, what is
left are 36 products for 144 (Lavin and Gray 2016, arXiv 1509.09308, equation 8):

    y = A^T [ (G g G^T) * (B^T d B) ] A

Summed over the channels of many tiles at once, they are 36 matrix products. G, B and A come from interpolation at
0, 1, -1, 1/2, -2 and infinity, where float32 loses less than at 0, +-1, +-2 (README).

Letters: B images, C channels, K channels of the result, H, W height and width, T tiles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.fast import onednn
from ldm.fast.watching import convolves, intercepted, parametrized, plain, readable

WORK = 1 << 30  # multiplications of the plain convolution, an image: from here on it pays
FEWEST_TILES = 64  # in an image; with fewer, transforming the weights is most of the work
FEWEST_CHANNELS = 128  # on either side; with fewer, transforming the map is
TILES = 512  # at a time, or as many as HELD allows
HELD = 3 << 22  # numbers of transformed tiles at a time
COLUMNS = 1 << 13  # of numbers, transformed at a time
WEIGHTS = 1 << 22  # numbers of transformed weights held at a time
FILTERS = 256  # at a time at most, where not all of them are held
BY_ONEDNN = 1 << 17  # weights of filters at a time, K C: from here on their products are faster by it


@dataclass(frozen=True)
class Transforms:
    """The matrices for tiles of size x size results, from n = size + 2 numbers each way; rows and columns in one."""

    size: int
    filter: Tensor  # (n^2, 9)
    input: Tensor  # (n^2, n^2)
    results: Tensor  # (size^2, n^2)

    @classmethod
    def of(cls, *, g: list[list[float]], b_t: list[list[float]], a_t: list[list[float]]) -> Transforms:
        """From G (n, 3), B^T (n, n) and A^T (size, n)."""
        matrices = (torch.tensor(rows, dtype=torch.float32) for rows in (g, b_t, a_t))
        return cls(len(a_t), *(torch.kron(matrix, matrix) for matrix in matrices))

    def tiles(self, height: int, width: int) -> tuple[int, int]:
        """How many it takes, down and across."""
        return -(-height // self.size), -(-width // self.size)


OF_4 = Transforms.of(
    a_t=[[1, 1, 1, 1, 1, 0], [0, 1, -1, 1 / 2, -2, 0], [0, 1, 1, 1 / 4, 4, 0], [0, 1, -1, 1 / 8, -8, 1]],
    g=[
        [1, 0, 0],
        [1 / 3, 1 / 3, 1 / 3],
        [-1 / 3, 1 / 3, -1 / 3],
        [-16 / 15, -8 / 15, -4 / 15],
        [1 / 15, -2 / 15, 4 / 15],
        [0, 0, 1],
    ],
    b_t=[
        [1, -3 / 2, -2, 3 / 2, 1, 0],
        [0, -1, 1 / 2, 5 / 2, 1, 0],
        [0, 1, -5 / 2, 1 / 2, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 1 / 2, -1, -1 / 2, 1, 0],
        [0, 1, -3 / 2, -2, 3 / 2, 1],
    ],
)
OF_2 = Transforms.of(
    a_t=[[1, 1, 1, 0], [0, 1, -1, 1]],
    g=[[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]],
    b_t=[[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, -1, 0, 1]],
)


def may_serve(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a layer is a convolution that some maps are fast with."""
    return convolves(conv, 3) and min(conv.in_channels, conv.out_channels) >= FEWEST_CHANNELS


def serves(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether a map is one to do it with; by one image's size, so that it does not depend on the batch."""
    if not readable(x, 4) or work(conv, x) < WORK:  # first: small ones are called most, and dear to ask more of
        return False
    return able(conv, x) and x.is_contiguous() and len(x) > 0 and _transforms(x.shape[2], x.shape[3]) is not None


def able(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether the algorithm gives what the layer, as it is set now, makes of x, large or small."""
    return not intercepted() and may_serve(conv) and undisturbed(conv, x)


def undisturbed(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether a layer and a map (B, C, H, W) are of plain numbers in float32 on a CPU, and fit each other."""
    if parametrized(conv):
        return False
    mine = x.ndim == 4 and x.device.type == "cpu" and conv.weight.shape[1:] == (x.shape[1], 3, 3)
    return mine and plain(x, conv.weight, conv.bias) and conv.weight.is_contiguous() and exact()


def exact() -> bool:
    """Whether matrix products are of float32: of products that torch may round to fewer bits, too much is lost."""
    return torch.backends.mkldnn.matmul.fp32_precision not in ("tf32", "bf16")  # type: ignore[attr-defined]


def work(conv: nn.Conv2d, x: Tensor) -> int:
    """Multiplications of the plain convolution, of one image of x (B, C, H, W)."""
    return 9 * conv.out_channels * x.shape[1:].numel()


def _transforms(height: int, width: int) -> Transforms | None:
    """The largest tiles that a map of such results has enough of; None: it has too few of any."""
    return next((of for of in (OF_4, OF_2) if math.prod(of.tiles(height, width)) >= FEWEST_TILES), None)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int] = (1, 1)) -> Tensor:
    """What F.conv2d gives for weights of 3 x 3, but for rounding; NaN and Inf spread over whole tiles, as NaN.

    Args:    x: (B, C, H, W), float32.  weight: (K, C, 3, 3).  bias: (K,).
             padding: rows and columns of zeros around x, 0 or 1 of each.
    Returns: (B, K, H + 2 padding - 2, W + 2 padding - 2).
    """
    height, width = (size + 2 * zeros - 2 for size, zeros in zip(x.shape[2:], padding, strict=True))
    of = _transforms(height, width) or OF_2
    down, across = of.tiles(height, width)
    out = x.new_empty(len(x), len(weight), height, width)
    most = min(TILES, HELD // (len(of.input) * x.shape[1])) or 1
    images, rows, columns = max(1, most // (down * across)), even(down, most // across or 1), even(across, most)
    for first, top, left in product(range(0, len(x), images), range(0, down, rows), range(0, across, columns)):
        these, bottom, right = slice(first, first + images), min(top + rows, down), min(left + columns, across)
        here = _with_zeros(of, x[these], (top, bottom), (left, right), padding)
        there = out[these, :, of.size * top : of.size * bottom, of.size * left : of.size * right]
        _convolve(of, here, weight, bias, there)
    return out


def even(count: int, most: int) -> int:
    """The size of parts of count, as few and as equal as can be, none larger than most."""
    return -(-count // -(-count // most))


def _with_zeros(
    of: Transforms, x: Tensor, down: tuple[int, int], across: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """What tiles from the first to before the second, down and across, read of x; zeros where there is nothing."""
    zeros: list[int] = []
    for dim, (first, end), before in ((3, across, padding[1]), (2, down, padding[0])):  # F.pad begins with the last
        start, stop = of.size * first - before, of.size * end - before + 2
        zeros += max(0, -start), max(0, stop - x.shape[dim])
        x = x.narrow(dim, max(0, start), min(stop, x.shape[dim]) - max(0, start))
    return F.pad(x, zeros)


def _convolve(of: Transforms, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Some tiles of some images into out, which may end within the last tiles; x has a row and a column more around."""
    size, squared = of.size, len(of.input)
    count, channels, down, across = len(x), x.shape[1], (x.shape[2] - 2) // size, (x.shape[3] - 2) // size
    fits = out.shape[2:] == (size * down, size * across)
    whole = out if fits else x.new_empty(count, len(weight), size * down, size * across)

    tiles = x.new_empty(squared, channels, count * down * across)
    flat, some = tiles.view(squared, -1), COLUMNS // tiles.shape[2] or 1
    for these, there in zip(x.split(some, dim=1), flat.split(some * tiles.shape[2], dim=1), strict=True):
        d = these.unfold(2, size + 2, size).unfold(3, size + 2, size).permute(4, 5, 1, 0, 2, 3)
        torch.mm(of.input, d.reshape(squared, -1), out=there)

    step = len(weight) if squared * channels * len(weight) <= WEIGHTS else even(len(weight), FILTERS)
    filters, products = x.new_empty(max(WEIGHTS, step * channels)), x.new_empty(squared * step * tiles.shape[2])
    by_tiles = whole.unflatten(3, (across, size)).unflatten(2, (down, size))  # (B, K, down, size, across, size)
    added = x.new_zeros(len(weight)) if bias is None else bias
    for g, b, there in zip(weight.split(step), added.split(step), by_tiles.split(step, dim=1), strict=True):
        these = products[: squared * len(g) * tiles.shape[2]].view(squared, len(g), -1)
        _multiply(of, g.reshape(-1, 9), tiles, filters, these)
        y = (of.results @ these.view(squared, -1)).view(size, size, -1, count, down, across)
        torch.add(y.permute(3, 2, 4, 0, 5, 1), b.view(-1, 1, 1, 1, 1), out=there)
    if not fits:
        out.copy_(whole[:, :, : out.shape[2], : out.shape[3]])


def _multiply(of: Transforms, g: Tensor, tiles: Tensor, filters: Tensor, out: Tensor) -> None:
    """g (K C, 9), transformed into `filters` for as many positions at a time as fit, times tiles (n^2, C, T): into out
    (n^2, K, T).
    """
    each = (part.split(len(filters) // len(g)) for part in (of.filter, tiles, out))
    for rows, d, there in zip(*each, strict=True):
        some = filters[: len(rows) * len(g)].view(len(rows), -1)
        torch.mm(rows, g.T, out=some)
        some = some.view(len(rows), -1, tiles.shape[1])
        if len(g) < BY_ONEDNN or not onednn.on():
            torch.bmm(some, d, out=there)
            continue
        for one, its_tiles, place in zip(some, d, there, strict=True):
            place.copy_(onednn.linear(one, its_tiles.T, None))
