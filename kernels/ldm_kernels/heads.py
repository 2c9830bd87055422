"""Attention heads as the kernels read them: (B, N, H, d) views, and a head's width in pieces a tensor core can take.

A head's width must be a sum of powers of two to be multiplied: 40 = 32 + 8, 80 = 64 + 16, 160 = 128 + 32. Two products
of those widths cost 1.0 to 1.2 times the operations that are needed, one of the next power of two 1.6 times.
"""

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldm_kernels.checks import MOST_BLOCKS
from ldm_kernels.interpreter import interpreting, mend_loops

Layout = Literal["split", "split8", "pad", "box"]

NARROWEST, WIDEST = 8, 160
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ALIGNMENT = 16  # bytes of an address, elements of a stride: below it, a load moves two bytes instead of sixteen


class Pieces(NamedTuple):
    """A head's width in tiles: `first` columns, then `second` (0: none). What exceeds the width is zeros.

    As the inner dimension of a product (q k^T) a piece is at least 16 wide, as its outer one (p v) 8 are enough:
    `outer` is the second piece there.
    """

    first: int
    second: int
    outer: int


def pieces(width: int, layout: Layout) -> Pieces:
    """How a head is cut: one of 40 into 32 + 16 (split), the same with 32 + 8 in p v (split8), or 64 (pad, box)."""
    if layout in ("pad", "box") or width <= 16:
        return Pieces(max(16, triton.next_power_of_2(width)), 0, 0)
    first = 1 << (width.bit_length() - 1)
    if first == width:
        return Pieces(first, 0, 0)
    rest = triton.next_power_of_2(width - first)
    second = max(16, rest)
    return Pieces(first, second, rest if layout == "split8" else second)


# ---- inside a kernel -------------------------------------------------------------------------------

LOG2_E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x log2 e): the GPU has an instruction for exp2


@triton.jit
def load_rows(
    base, rows, row_stride, count, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, EVEN: tl.constexpr
):
    """Columns FIRST .. FIRST + WIDTH - 1 of some rows: (len(rows), WIDTH), zero from row `count` and column D on.

    A mask costs instructions in every round of a loop, so there is none where EVEN says that every row exists.
    """
    columns = FIRST + tl.arange(0, WIDTH)
    addresses = base + rows[:, None] * row_stride + columns[None, :]
    if FIRST + WIDTH <= D:
        mask = None if EVEN else rows[:, None] < count
    else:
        mask = columns[None, :] < D if EVEN else (rows[:, None] < count) & (columns[None, :] < D)
    return tl.load(addresses, mask=mask, other=None if mask is None else 0.0)


@triton.jit
def store_rows(
    tile, base, rows, row_stride, count, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, EVEN: tl.constexpr
):
    """The reverse of `load_rows`, rounded to the memory's type."""
    columns = FIRST + tl.arange(0, WIDTH)
    addresses = base + rows[:, None] * row_stride + columns[None, :]
    if FIRST + WIDTH <= D:
        mask = None if EVEN else rows[:, None] < count
    else:
        mask = columns[None, :] < D if EVEN else (rows[:, None] < count) & (columns[None, :] < D)
    tl.store(addresses, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def dot(a, b, total, UPCAST: tl.constexpr):
    """total + a b in fp32. UPCAST: Triton's interpreter multiplies the bits of bf16 numbers, so give it fp32 ones."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def scores(a0, a1, b0, b1, D1: tl.constexpr, UPCAST: tl.constexpr):
    """a b^T over both pieces of the head's width: (rows of a, rows of b), fp32."""
    s = dot(a0, tl.trans(b0), tl.zeros((a0.shape[0], b0.shape[0]), tl.float32), UPCAST)
    if D1:
        s = dot(a1, tl.trans(b1), s, UPCAST)
    return s


@triton.jit
def visible(s, queries, keys, M, CAUSAL: tl.constexpr, EVEN: tl.constexpr):
    """Scores with -inf where there is no key, or none that a query may see yet."""
    if not EVEN:
        s = tl.where(keys < M, s, float("-inf"))
    if CAUSAL:
        s = tl.where(keys <= queries, s, float("-inf"))
    return s


# ---- before a launch -------------------------------------------------------------------------------


def why_unsupported(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the kernels cannot take these heads, in one line that names the argument; None where they can.

    Args:    q: (B, N, H, d), k, v: (B, M, H, d), as `attention` and `cross_attention` take them.
    """
    for name, view in (("q", q), ("k", k), ("v", v)):
        if view.ndim != 4:
            return f"{name}: {view.ndim} dimensions, expected 4: (batch, positions, heads, head width)"
    batch, n, heads, width = q.shape
    m = k.shape[1]
    for name, view in (("k", k), ("v", v)):
        if view.shape != (batch, m, heads, width):
            return f"{name}: shape {tuple(view.shape)}, expected {(batch, m, heads, width)} beside q {tuple(q.shape)}"
        if view.dtype != q.dtype or view.device != q.device:
            return f"{name}: {view.dtype} on {view.device}, but q is {q.dtype} on {q.device}; bring them together"
    if q.dtype not in DTYPES:
        return f"q: dtype {q.dtype}, expected float16, bfloat16 or float32"
    if width % 8 or not NARROWEST <= width <= WIDEST:
        return f"q: heads {width} wide, expected a multiple of 8 from {NARROWEST} to {WIDEST}"
    if 0 in (n, m, heads):
        return f"q, k: {n} queries, {m} keys, {heads} heads; expected at least one of each"
    if max(batch, heads) > MOST_BLOCKS:
        return f"q: a batch of {batch} with {heads} heads, expected at most {MOST_BLOCKS} of each; split the batch"
    return next((why for name, view in (("q", q), ("k", k), ("v", v)) if (why := _bad_layout(name, view))), None)


def require_heads(kernel: object, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ValueError where a kernel cannot take these heads, or these heads are nowhere that a kernel runs."""
    why = why_unsupported(q, k, v)
    if why is None and not q.is_cuda and not interpreting(kernel):
        why = f"q: on {q.device}, expected a CUDA device; kernels run elsewhere only with TRITON_INTERPRET=1"
    if why is not None:
        raise ValueError(why)
    mend_loops()


def _bad_layout(name: str, view: Tensor) -> str | None:
    """Why (B, N, H, d) numbers cannot be read where they lie: heads apart, addresses uneven, rows over one another."""
    batch, n, heads, width = view.shape
    batch_stride, row_stride, head_stride, unit = view.stride()
    if unit != 1 or (heads > 1 and head_stride != width):
        return f"{name}: strides {view.stride()}, expected heads side by side: (any, any, {width}, 1)"
    if view.data_ptr() % ALIGNMENT or (n > 1 and row_stride % ALIGNMENT) or (batch > 1 and batch_stride % ALIGNMENT):
        return (
            f"{name}: strides {view.stride()}, address {view.data_ptr() % ALIGNMENT} beyond a multiple of {ALIGNMENT}; "
            f"expected a multiple of {ALIGNMENT} in both"
        )
    # A batch of stride 0 is one sample read again and again, on purpose; any other overlap is a mistake upstream.
    extent = heads * width
    for stride, size in sorted([(row_stride, n), (batch_stride, batch if batch_stride else 1)]):
        if size > 1 and stride < extent:
            return f"{name}: strides {view.stride()} of shape {tuple(view.shape)} make rows overlap; make it contiguous"
        extent += stride * (size - 1)
    if n * row_stride >= 2**31:
        return f"{name}: {n} rows {row_stride} elements apart, more than 32 bits can count"
    return None


def readable(view: Tensor) -> Tensor:
    """The view itself where the kernels can read it, a copy where they cannot: gradients come in any layout."""
    return view if _bad_layout("grad_out", view) is None else view.contiguous()
