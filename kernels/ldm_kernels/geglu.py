"""GEGLU in one pass: value * gelu(gate), the two halves of a projection, with the exact (erf) GELU.

    out = value * gate * Phi(gate),   Phi(g) = (1 + erf(g / sqrt(2))) / 2       [Shazeer 2020; Hendrycks, Gimpel 2016]

Letters: M rows (batch times positions), C channels of the result.

                  C                 C
          +-----------------+-----------------+       A program takes a tile of ROWS x COLUMNS from the left half and
      M   |   value [tile]  |   gate  [tile]  |       the one at the same place in the right half, and writes one tile.
          +-----------------+-----------------+       Plain torch reads and writes the halves three times over.

Nothing is summed over, so there is nothing to save for the backward but the input.
"""

from collections.abc import Iterator
from math import pi, sqrt
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldm_kernels.checks import MOST_ELEMENTS, require_alike, require_shape
from ldm_kernels.specs import Spec

# ---- kernels ---------------------------------------------------------------------------------------

SQRT_HALF = tl.constexpr(sqrt(0.5))
GAUSSIAN_PEAK = tl.constexpr(1 / sqrt(2 * pi))


@triton.jit
def forward_kernel(x, out, M, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """x (M, 2C) -> out (M, C), both contiguous."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    there = (rows < M) & (columns < C)
    value = tl.load(x + rows * 2 * C + columns, mask=there).to(tl.float32)
    gate = tl.load(x + rows * 2 * C + C + columns, mask=there).to(tl.float32)
    phi = 0.5 + 0.5 * tl.erf(gate * SQRT_HALF)
    tl.store(out + rows * C + columns, value * gate * phi, mask=there)


@triton.jit
def backward_kernel(x, grad_out, grad_x, M, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """d gelu / d gate = Phi(gate) + gate * Phi'(gate), with Phi' the Gaussian's density."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    there = (rows < M) & (columns < C)
    value = tl.load(x + rows * 2 * C + columns, mask=there).to(tl.float32)
    gate = tl.load(x + rows * 2 * C + C + columns, mask=there).to(tl.float32)
    g = tl.load(grad_out + rows * C + columns, mask=there).to(tl.float32)
    phi = 0.5 + 0.5 * tl.erf(gate * SQRT_HALF)
    density = GAUSSIAN_PEAK * tl.exp(-0.5 * gate * gate)
    tl.store(grad_x + rows * 2 * C + columns, g * gate * phi, mask=there)
    tl.store(grad_x + rows * 2 * C + C + columns, g * value * (phi + gate * density), mask=there)


# ---- launchers -------------------------------------------------------------------------------------

TILE = {"ROWS": 8, "COLUMNS": 256}  # 16 numbers a thread at 4 warps: two loads of 16 bytes from each half
WARPS = 4


def launch_forward(x: Tensor) -> Tensor:
    """(..., 2C) -> (..., C)."""
    require_alike(x=x)
    if x.ndim == 0 or x.shape[-1] % 2 or x.numel() >= MOST_ELEMENTS:
        raise ValueError(f"x: shape {tuple(x.shape)}, expected (..., 2C) with fewer than 2^31 elements")
    x = x.contiguous()
    channels = x.shape[-1] // 2
    rows = x.numel() // (2 * channels)
    out = x.new_empty((*x.shape[:-1], channels))
    forward_kernel[_grid(rows, channels)](x, out, rows, channels, **TILE, num_warps=WARPS)
    return out


def launch_backward(grad_out: Tensor, x: Tensor) -> Tensor:
    """The gradient of x, contiguous."""
    x = x.contiguous()
    channels = x.shape[-1] // 2
    require_alike(x=x, grad_out=grad_out)
    require_shape("grad_out", grad_out, (*x.shape[:-1], channels), "(..., C)")
    rows = x.numel() // (2 * channels)
    grad_x = torch.empty_like(x)
    backward_kernel[_grid(rows, channels)](x, grad_out.contiguous(), grad_x, rows, channels, **TILE, num_warps=WARPS)
    return grad_x


def _grid(rows: int, channels: int) -> tuple[int, int]:
    return triton.cdiv(rows, TILE["ROWS"]), triton.cdiv(channels, TILE["COLUMNS"])


# ---- registration ----------------------------------------------------------------------------------


@torch.library.custom_op("ldm::geglu", mutates_args=())
def geglu_op(x: Tensor) -> Tensor:
    with torch.cuda.device_of(x):
        return launch_forward(x)


@geglu_op.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@torch.library.custom_op("ldm::geglu_backward", mutates_args=())
def geglu_backward_op(grad_out: Tensor, x: Tensor) -> Tensor:
    with torch.cuda.device_of(x):
        return launch_backward(grad_out, x)


@geglu_backward_op.register_fake
def _(grad_out: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad_out: Tensor) -> Tensor:
    return geglu_backward_op(grad_out, *ctx.saved_tensors)


geglu_op.register_autograd(_differentiate, setup_context=_save)


def geglu(x: Tensor) -> Tensor:
    """Gated GELU, differentiable once: the first half of the channels times gelu(the second half).

    Args:    x: (..., 2C) float16, bfloat16 or float32, computed in float32; copied first unless it is contiguous.
    Returns: (..., C), contiguous.
    Raises:  ValueError: another dtype, an odd width, or nothing in it.
    """
    return geglu_op(x)


# ---- for the compiler ------------------------------------------------------------------------------


def compile_specs() -> Iterator[Spec]:
    """What to compile: one tile serves every width."""
    for direction, fn, pointers in (
        ("forward", forward_kernel, ("x", "out")),
        ("backward", backward_kernel, ("x", "grad_out", "grad_x")),
    ):
        yield Spec(
            name=f"geglu.{direction} {TILE['ROWS']}x{TILE['COLUMNS']} w{WARPS}",
            fn=fn,
            signature=dict.fromkeys(pointers, "*fp16") | {"M": "i32", "C": "i32"} | dict.fromkeys(TILE, "constexpr"),
            constexprs=TILE,
            divisible=(*pointers, "M", "C"),
            num_warps=WARPS,
            num_stages=1,
            capabilities=(80, 86, 89, 90),
        )
