"""A residual addition and the LayerNorm that reads its result, in one pass.

    total = x + residual        out = (total - mean) / sqrt(var + eps) * weight + bias          [Ba et al. 2016]

Letters: M rows (batch times positions), C channels.

           C
      +---------+      Forward: a program takes one row whole, so its mean and variance are sums over what it already
    M |---------| row  holds: the mean first, then the squares of what remains. (E[x^2] - E[x]^2 would cancel where the
      |---------|      mean is large against the spread.) The row's width is padded to a power of two, WIDTH.
      +---------+      Backward: a program takes every PROGRAMS-th row, and sums the gradients of weight and bias over
                       its own; the few sums that come out are added up by torch. No atomics: the same bits every time.

Plain torch writes the sum, reads it back to normalise, and reads both again in the backward.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldm_kernels.checks import require_alike, require_shape
from ldm_kernels.specs import Spec

# ---- kernels ---------------------------------------------------------------------------------------


@triton.jit
def forward_kernel(x, residual, weight, bias, total, out, mean, rstd, C, eps, WIDTH: tl.constexpr):
    """total and out (M, C), mean and rstd (M,) fp32."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    there = columns < C
    added = tl.load(x + row * C + columns, mask=there, other=0.0).to(tl.float32)
    added += tl.load(residual + row * C + columns, mask=there, other=0.0).to(tl.float32)
    rounded = added.to(total.dtype.element_ty)
    tl.store(total + row * C + columns, rounded, mask=there)

    # Normalise what was stored, not what it was rounded from: the backward only has that.
    stored = rounded.to(tl.float32)
    row_mean = tl.sum(stored, 0) / C
    centred = tl.where(there, stored - row_mean, 0.0)
    row_rstd = 1 / tl.sqrt(tl.sum(centred * centred, 0) / C + eps)
    w = tl.load(weight + columns, mask=there).to(tl.float32)
    b = tl.load(bias + columns, mask=there).to(tl.float32)
    tl.store(out + row * C + columns, centred * row_rstd * w + b, mask=there)
    tl.store(mean + row, row_mean)
    tl.store(rstd + row, row_rstd)


@triton.jit
def backward_kernel(
    total, grad_total, grad_out, weight, mean, rstd, grad_x, weight_sums, bias_sums, M, C, WIDTH: tl.constexpr
):  # fmt: skip
    """grad_x (M, C), and this program's row of weight_sums and bias_sums (PROGRAMS, C) fp32.

    With n = (total - mean) rstd and h = grad_out weight:  grad = rstd (h - mean(h) - n mean(h n)) + grad_total.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, WIDTH)
    there = columns < C
    w = tl.load(weight + columns, mask=there, other=0.0).to(tl.float32)
    weight_sum = tl.zeros((WIDTH,), tl.float32)
    bias_sum = tl.zeros((WIDTH,), tl.float32)
    for row_number in range(program, M, programs):
        row = tl.cast(row_number, tl.int64)
        t = tl.load(total + row * C + columns, mask=there, other=0.0).to(tl.float32)
        g = tl.load(grad_out + row * C + columns, mask=there, other=0.0).to(tl.float32)
        row_rstd = tl.load(rstd + row)
        normalised = tl.where(there, (t - tl.load(mean + row)) * row_rstd, 0.0)
        weight_sum += g * normalised
        bias_sum += g
        h = g * w
        along = tl.sum(h * normalised, 0) / C
        grad = (h - tl.sum(h, 0) / C - normalised * along) * row_rstd
        grad += tl.load(grad_total + row * C + columns, mask=there, other=0.0).to(tl.float32)
        tl.store(grad_x + row * C + columns, grad, mask=there)
    tl.store(weight_sums + program * C + columns, weight_sum, mask=there)
    tl.store(bias_sums + program * C + columns, bias_sum, mask=there)


# ---- launchers -------------------------------------------------------------------------------------

PROGRAMS = 512  # of the backward: two to four a multiprocessor
WIDEST = 8192  # a row has to fit the registers of one program


def _width(channels: int) -> tuple[int, int]:
    """WIDTH, and the warps for it: 8 numbers a thread, one load of 16 bytes."""
    width = triton.next_power_of_2(channels)
    return width, min(16, max(1, width // 256))


def launch_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """total, out (..., C), mean, rstd (M,) fp32."""
    require_alike(x=x, residual=residual, weight=weight, bias=bias)
    require_shape("residual", residual, tuple(x.shape), "x's shape")
    if x.ndim == 0:
        raise ValueError("x: shape (), expected (..., C)")
    channels = x.shape[-1]
    require_shape("weight", weight, (channels,), "(C,)")
    require_shape("bias", bias, (channels,), "(C,)")
    if x.dtype != residual.dtype or channels > WIDEST:
        raise ValueError(
            f"x: {channels} channels of {x.dtype} beside a residual of {residual.dtype}, "
            f"expected at most {WIDEST} channels and one dtype"
        )
    rows = x.numel() // channels
    total, out = (x.new_empty(x.shape) for _ in range(2))
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    width, warps = _width(channels)
    forward_kernel[(rows,)](
        *(x.contiguous(), residual.contiguous(), weight.contiguous(), bias.contiguous()),
        *(total, out, mean, rstd, channels, eps),
        WIDTH=width,
        num_warps=warps,
    )
    return total, out, mean, rstd


def launch_backward(
    grad_total: Tensor, grad_out: Tensor, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x (and of the residual: they are equal), weight and bias."""
    require_alike(total=total, grad_total=grad_total, grad_out=grad_out, weight=weight, mean=mean, rstd=rstd)
    require_shape("grad_total", grad_total, tuple(total.shape), "total's shape")
    require_shape("grad_out", grad_out, tuple(total.shape), "total's shape")
    channels = total.shape[-1]
    rows = total.numel() // channels
    programs = min(rows, PROGRAMS)
    grad_x = total.new_empty(total.shape)
    weight_sums, bias_sums = (total.new_empty((programs, channels), dtype=torch.float32) for _ in range(2))
    width, warps = _width(channels)
    backward_kernel[(programs,)](
        *(total.contiguous(), grad_total.contiguous(), grad_out.contiguous(), weight.contiguous(), mean, rstd),
        *(grad_x, weight_sums, bias_sums, rows, channels),
        WIDTH=width,
        num_warps=warps,
    )
    return grad_x, weight_sums.sum(0).to(weight.dtype), bias_sums.sum(0).to(weight.dtype)


# ---- registration ----------------------------------------------------------------------------------


@torch.library.custom_op("ldm::add_layer_norm", mutates_args=())
def add_layer_norm_op(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(x):
        return launch_forward(x, residual, weight, bias, eps)


@add_layer_norm_op.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(x.shape), mean, rstd


@torch.library.custom_op("ldm::add_layer_norm_backward", mutates_args=())
def add_layer_norm_backward_op(
    grad_total: Tensor, grad_out: Tensor, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(total):
        return launch_backward(grad_total, grad_out, total, weight, mean, rstd)


@add_layer_norm_backward_op.register_fake
def _(
    grad_total: Tensor, grad_out: Tensor, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return total.new_empty(total.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple, output: Any) -> None:
    _, _, weight, _, _ = inputs
    total, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(total, weight, mean, rstd)


def _differentiate(
    ctx: Any, grad_total: Tensor, grad_out: Tensor, _mean: Tensor, _rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
    grad_x, grad_weight, grad_bias = add_layer_norm_backward_op(grad_total, grad_out, *ctx.saved_tensors)
    return grad_x, grad_x, grad_weight, grad_bias, None


add_layer_norm_op.register_autograd(_differentiate, setup_context=_save)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """x + residual, and the LayerNorm of that; differentiable once.

    Args:    x, residual: (..., C) of one dtype, float16, bfloat16 or float32; C at most 8192. weight, bias: (C,) of any
             of these dtypes. Computed in float32; copied first unless contiguous.
    Returns: the sum and its LayerNorm, both like x and contiguous.
    Raises:  ValueError: other shapes or dtypes, different devices, or nothing to normalise.
    """
    total, out, _, _ = add_layer_norm_op(x, residual, weight, bias, eps)
    return total, out


# ---- for the compiler ------------------------------------------------------------------------------

SHIPPED_WIDTHS = (320, 640, 1280)  # SD1.5's transformers; CLIP's 768 is compiled as 1280's half


def compile_specs() -> Iterator[Spec]:
    """What to compile for the channels of SD1.5."""
    for channels in SHIPPED_WIDTHS:
        width, warps = _width(channels)
        for direction, fn in (("forward", forward_kernel), ("backward", backward_kernel)):
            fp32 = {"mean", "rstd", "weight_sums", "bias_sums"}
            numbers = {"M": "i32", "C": "i32", "eps": "fp32", "WIDTH": "constexpr"}
            signature = {name: numbers.get(name, "*fp32" if name in fp32 else "*fp16") for name in fn.arg_names}
            yield Spec(
                name=f"add_layer_norm.{direction} {width} w{warps}",
                fn=fn,
                signature=signature,
                constexprs={"WIDTH": width},
                divisible=tuple(name for name in signature if name not in ("eps", "WIDTH", "M")),
                num_warps=warps,
                num_stages=1,
                capabilities=(80, 86, 89, 90),
            )
