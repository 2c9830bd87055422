"""GEGLU in the epilogue of its own projection: the product's two halves are never written to memory.

    out = value * gelu(gate),   value = x Wv^T + bv,   gate = x Wg^T + bg        [Shazeer 2020]; Wv, Wg: halves of W

Letters: M rows (batch times positions), K channels of x, C channels of the result.

          K               C                     C
      +-------+     +-----------+         +-----------+       A program walks along K with one tile of x and two of W,
    M |   x   |  K  |   Wv^T    |       K |   Wg^T    |       sums both products in float32 registers, and writes one
      +-------+     +-----------+         +-----------+       tile of value * gelu(gate).

geglu.py takes what torch's product has written: 2 M C numbers written and read again, which this saves; it has to be
nearly as fast a product as cuBLAS's to gain by that. No GPU has timed it: nothing is installed that uses it.
`ldm bench gpu` times CANDIDATES beside that pair. Forward only, for sampling.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldm_kernels.checks import MOST_ELEMENTS, require_alike, require_shape
from ldm_kernels.configurations import SM80, SM90
from ldm_kernels.geglu import SQRT_HALF
from ldm_kernels.heads import dot
from ldm_kernels.interpreter import interpreting
from ldm_kernels.specs import Spec, signature

# ---- kernel ----------------------------------------------------------------------------------------


@triton.jit
def load_tile(base, rows, columns, row_count, width, EVEN: tl.constexpr):
    """rows x columns of a matrix that is so wide, zeros where it has none."""
    mask = None if EVEN else (rows[:, None] < row_count) & (columns[None, :] < width)
    return tl.load(base + rows[:, None] * width + columns[None, :], mask=mask, other=None if EVEN else 0.0)


@triton.jit
def forward_kernel(
    x, weight, bias, out, M, C, K,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """x (M, K), weight (2C, K), bias (2C) -> out (M, C), all contiguous. Programs side by side share columns of W."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    value = tl.zeros((ROWS, COLUMNS), tl.float32)
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, K, STEP):
        inner = start + tl.arange(0, STEP)
        tile = load_tile(x, rows, inner, M, K, EVEN)
        value = dot(tile, tl.trans(load_tile(weight, columns, inner, C, K, EVEN)), value, UPCAST)
        gate = dot(tile, tl.trans(load_tile(weight + C * K, columns, inner, C, K, EVEN)), gate, UPCAST)
    value += tl.load(bias + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
    gate += tl.load(bias + C + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
    result = value * gate * (0.5 + 0.5 * tl.erf(gate * SQRT_HALF))
    there = None if EVEN else (rows[:, None] < M) & (columns[None, :] < C)
    tl.store(out + rows[:, None] * C + columns[None, :], result.to(out.dtype.element_ty), mask=there)


# ---- launcher --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiles:
    """rows x columns of the result that a program owns, a step along K; warps, stages, capabilities: as elsewhere."""

    rows: int
    columns: int
    step: int
    warps: int
    stages: int
    capabilities: tuple[int, ...]

    def __str__(self) -> str:
        return f"geglu_product {self.rows}x{self.columns}x{self.step} w{self.warps} s{self.stages}"


CANDIDATES = (
    Tiles(128, 128, 64, 8, 3, (SM90,)),
    Tiles(128, 64, 64, 8, 3, (SM80, SM90)),
    Tiles(128, 64, 64, 4, 4, (SM90,)),
)


def constants(c: Tiles, even: bool, upcast: bool) -> dict[str, int]:
    """A candidate's compile-time arguments."""
    return {"ROWS": c.rows, "COLUMNS": c.columns, "STEP": c.step, "EVEN": even, "UPCAST": upcast}


def launch_forward(x: Tensor, weight: Tensor, bias: Tensor, c: Tiles) -> Tensor:
    """(..., K), (2C, K), (2C) -> (..., C). Raises ValueError: other shapes, dtypes that differ, too many numbers."""
    require_alike(x=x, weight=weight, bias=bias)
    if x.ndim == 0 or weight.ndim != 2 or len(weight) % 2 or len({t.dtype for t in (x, weight, bias)}) > 1:
        raise ValueError(f"weight: {weight.dtype} of shape {tuple(weight.shape)}, expected (2C, K) in x's {x.dtype}")
    channels, width = len(weight) // 2, weight.shape[1]
    require_shape("x", x, (*x.shape[:-1], width), "(..., K)")
    require_shape("bias", bias, (2 * channels,), "(2C,)")
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    rows = x.numel() // width
    if max(x.numel(), weight.numel(), rows * channels) >= MOST_ELEMENTS:
        raise ValueError(f"x: shape {tuple(x.shape)} to {channels} channels, expected fewer than 2^31 numbers of each")
    out = x.new_empty((*x.shape[:-1], channels))
    even = rows % c.rows == 0 and channels % c.columns == 0 and width % c.step == 0
    upcast = interpreting(forward_kernel) and x.dtype == torch.bfloat16
    grid = (triton.cdiv(rows, c.rows), triton.cdiv(channels, c.columns))
    settings = {"num_warps": c.warps, "num_stages": c.stages}
    with torch.cuda.device_of(x):
        forward_kernel[grid](x, weight, bias, out, rows, channels, width, **constants(c, even, upcast), **settings)
    return out


# ---- for the compiler ------------------------------------------------------------------------------


def compile_specs() -> Iterator[Spec]:
    """Every candidate, at whole tiles as all of SD1.5's are."""
    for c in CANDIDATES:
        constexprs = constants(c, even=True, upcast=False)
        kinds = {"i32": ("M", "C", "K"), "constexpr": tuple(constexprs)}
        yield Spec(
            name=str(c).replace(" ", ".forward ", 1),
            fn=forward_kernel,
            signature=signature(forward_kernel, kinds),
            constexprs=constexprs,
            divisible=tuple(name for name in forward_kernel.arg_names if name not in constexprs),
            num_warps=c.warps,
            num_stages=c.stages,
            capabilities=c.capabilities,
            useful_ratio=1.0,
        )
