"""Cross-attention to a prompt: 77 keys fit into one block, so a query's whole softmax is in registers at once.

    out = softmax(q k^T / sqrt(d)) v            per batch row and head, M = 64..80 keys

Letters: B batch, N queries, M keys, H heads of width d.

               keys:     64 (all there)      16 (77: 13 there)
                       +-------------------+------+
    TILE queries       |        s0         |  s1  |   s = q k^T / sqrt(d), p = exp(s - max) / sum
                       +-------------------+------+   out = p0 v0 + p1 v1

    A program takes some such tiles of one head, one after the other; keys and values stay.

80 columns hold 77 keys with 4 % of waste; the next power of two, 128, would waste 40 %. Nothing is rescaled, and
nothing but q, k and v is kept for the backward, which computes p again [Vaswani et al. 2017, eq. 1, differentiated]:

    dp = g v^T      ds = p * (dp - rowsum(p * dp))      dq = ds k / sqrt(d)      dk = ds^T q / sqrt(d)      dv = p^T g

One kernel walks along queries as above and writes dq, and each query's log-sum of exponentials and rowsum(p * dp).
With these a second one owns OWN keys and walks along a stripe of the queries; the stripes' dk and dv are added up
afterwards, in a fixed order: no atomics, the same bits every time.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldm_kernels.configurations import EVERYWHERE, SM80, Configuration, run_first_that_fits
from ldm_kernels.heads import LOG2_E, dot, load_rows, pieces, readable, require_heads, scores, store_rows
from ldm_kernels.interpreter import interpreting
from ldm_kernels.specs import Spec, signature

FEWEST_KEYS, MOST_KEYS = 64, 80

# ---- kernels ---------------------------------------------------------------------------------------

K0, K1 = tl.constexpr(64), tl.constexpr(16)  # the pieces of the keys


@triton.jit
def weights(q0, q1, k00, k01, k10, k11, M, TO_LOG2: tl.constexpr, D1: tl.constexpr, UPCAST: tl.constexpr):
    """p0 (TILE, 64), p1 (TILE, 16): each query's softmax over the keys, fp32; and log2 of its sum of exponentials.

    k01: of the keys piece 0, of their width piece 1.
    """
    s0 = scores(q0, q1, k00, k01, D1, UPCAST) * TO_LOG2
    s1 = scores(q0, q1, k10, k11, D1, UPCAST) * TO_LOG2
    s1 = tl.where(tl.arange(0, K1)[None, :] + K0 < M, s1, float("-inf"))
    top = tl.maximum(tl.max(s0, 1), tl.max(s1, 1))
    e0, e1 = tl.exp2(s0 - top[:, None]), tl.exp2(s1 - top[:, None])
    total = tl.sum(e0, 1) + tl.sum(e1, 1)
    share = 1 / total
    return e0 * share[:, None], e1 * share[:, None], top + tl.log2(total)


@triton.jit
def forward_kernel(
    q, k, v, out,
    q_batch, q_row, k_batch, k_row, v_batch, v_row, N, M, rounds,
    D: tl.constexpr, HEAD_STRIDE: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, V1: tl.constexpr,
    TILE: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out (B, N, H, d); strides are in elements."""
    stripe, head, batch, H = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    q += batch * q_batch + head * HEAD_STRIDE
    k += batch * k_batch + head * HEAD_STRIDE
    v += batch * v_batch + head * HEAD_STRIDE
    out += batch * N * H * D + head * D
    keys0, keys1 = tl.arange(0, K0), tl.arange(0, K1) + K0
    to_log2: tl.constexpr = D**-0.5 * LOG2_E

    k00 = load_rows(k, keys0, k_row, M, 0, D0, D, True)
    k10 = load_rows(k, keys1, k_row, M, 0, D0, D, False)
    v00 = load_rows(v, keys0, v_row, M, 0, D0, D, True)
    v10 = load_rows(v, keys1, v_row, M, 0, D0, D, False)
    k01, k11 = k00, k10
    if D1:
        k01 = load_rows(k, keys0, k_row, M, D0, D1, D, True)
        k11 = load_rows(k, keys1, k_row, M, D0, D1, D, False)
        v01 = load_rows(v, keys0, v_row, M, D0, V1, D, True)
        v11 = load_rows(v, keys1, v_row, M, D0, V1, D, False)

    first = stripe * rounds * TILE
    for start in range(first, first + rounds * TILE, TILE):
        queries = start + tl.arange(0, TILE)
        q0 = load_rows(q, queries, q_row, N, 0, D0, D, EVEN)
        q1 = q0
        if D1:
            q1 = load_rows(q, queries, q_row, N, D0, D1, D, EVEN)
        p0, p1, _ = weights(q0, q1, k00, k01, k10, k11, M, to_log2, D1, UPCAST)
        p0, p1 = p0.to(q0.dtype), p1.to(q0.dtype)
        acc = dot(p0, v00, tl.zeros((TILE, D0), tl.float32), UPCAST)
        store_rows(dot(p1, v10, acc, UPCAST), out, queries, H * D, N, 0, D0, D, EVEN)
        if D1:
            acc = dot(p0, v01, tl.zeros((TILE, V1), tl.float32), UPCAST)
            store_rows(dot(p1, v11, acc, UPCAST), out, queries, H * D, N, D0, V1, D, EVEN)


@triton.jit
def dq_kernel(
    q, k, v, grad_out, dq, lse, delta,
    q_batch, q_row, k_batch, k_row, v_batch, v_row, g_batch, g_row, N, M, rounds,
    D: tl.constexpr, HEAD_STRIDE: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    TILE: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq (B, N, H, d), and for the other kernel each query's lse, in units of log2, and delta, both (B, H, N)."""
    stripe, head, batch, H = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    q += batch * q_batch + head * HEAD_STRIDE
    k += batch * k_batch + head * HEAD_STRIDE
    v += batch * v_batch + head * HEAD_STRIDE
    grad_out += batch * g_batch + head * HEAD_STRIDE
    dq += batch * N * H * D + head * D
    lse += (batch * H + head) * N
    delta += (batch * H + head) * N
    keys0, keys1 = tl.arange(0, K0), tl.arange(0, K1) + K0
    to_log2: tl.constexpr = D**-0.5 * LOG2_E

    k00 = load_rows(k, keys0, k_row, M, 0, D0, D, True)
    k10 = load_rows(k, keys1, k_row, M, 0, D0, D, False)
    v00 = load_rows(v, keys0, v_row, M, 0, D0, D, True)
    v10 = load_rows(v, keys1, v_row, M, 0, D0, D, False)
    k01, k11, v01, v11 = k00, k10, v00, v10
    if D1:
        k01 = load_rows(k, keys0, k_row, M, D0, D1, D, True)
        k11 = load_rows(k, keys1, k_row, M, D0, D1, D, False)
        v01 = load_rows(v, keys0, v_row, M, D0, D1, D, True)
        v11 = load_rows(v, keys1, v_row, M, D0, D1, D, False)

    first = stripe * rounds * TILE
    for start in range(first, first + rounds * TILE, TILE):
        queries = start + tl.arange(0, TILE)
        q0 = load_rows(q, queries, q_row, N, 0, D0, D, EVEN)
        g0 = load_rows(grad_out, queries, g_row, N, 0, D0, D, EVEN)
        q1, g1 = q0, g0
        if D1:
            q1 = load_rows(q, queries, q_row, N, D0, D1, D, EVEN)
            g1 = load_rows(grad_out, queries, g_row, N, D0, D1, D, EVEN)
        p0, p1, lse_log2 = weights(q0, q1, k00, k01, k10, k11, M, to_log2, D1, UPCAST)
        dp0, dp1 = scores(g0, g1, v00, v01, D1, UPCAST), scores(g0, g1, v10, v11, D1, UPCAST)
        own_delta = tl.sum(p0 * dp0, 1) + tl.sum(p1 * dp1, 1)
        tl.store(lse + queries, lse_log2, mask=queries < N)
        tl.store(delta + queries, own_delta, mask=queries < N)

        ds0 = (p0 * (dp0 - own_delta[:, None])).to(q0.dtype)
        ds1 = (p1 * (dp1 - own_delta[:, None])).to(q0.dtype)
        dq0 = dot(ds1, k10, dot(ds0, k00, tl.zeros((TILE, D0), tl.float32), UPCAST), UPCAST)
        store_rows(dq0 * D**-0.5, dq, queries, H * D, N, 0, D0, D, EVEN)
        if D1:
            dq1 = dot(ds1, k11, dot(ds0, k01, tl.zeros((TILE, D1), tl.float32), UPCAST), UPCAST)
            store_rows(dq1 * D**-0.5, dq, queries, H * D, N, D0, D1, D, EVEN)


@triton.jit
def dkdv_kernel(
    q, k, v, grad_out, lse, delta, dk, dv,
    q_batch, q_row, k_batch, k_row, v_batch, v_row, g_batch, g_row, N, M, rounds,
    D: tl.constexpr, HEAD_STRIDE: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    OWN: tl.constexpr, TILE: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dk and dv (stripes, B, M, H, d) fp32: a program owns OWN keys, and sums over its stripe of the queries.

    A query beyond N has q = g = 0, so whatever its weight, it adds nothing.
    """
    key_tiles = tl.cdiv(M, OWN)
    tile, stripe = tl.program_id(0) % key_tiles, tl.program_id(0) // key_tiles
    head, batch, H = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    q += batch * q_batch + head * HEAD_STRIDE
    k += batch * k_batch + head * HEAD_STRIDE
    v += batch * v_batch + head * HEAD_STRIDE
    grad_out += batch * g_batch + head * HEAD_STRIDE
    lse += (batch * H + head) * N
    delta += (batch * H + head) * N
    keys = tile * OWN + tl.arange(0, OWN)
    to_log2: tl.constexpr = D**-0.5 * LOG2_E

    k0 = load_rows(k, keys, k_row, M, 0, D0, D, False)
    v0 = load_rows(v, keys, v_row, M, 0, D0, D, False)
    dk0, dv0 = tl.zeros((OWN, D0), tl.float32), tl.zeros((OWN, D0), tl.float32)
    k1, v1 = k0, v0
    if D1:
        k1 = load_rows(k, keys, k_row, M, D0, D1, D, False)
        v1 = load_rows(v, keys, v_row, M, D0, D1, D, False)
        dk1, dv1 = tl.zeros((OWN, D1), tl.float32), tl.zeros((OWN, D1), tl.float32)

    first = stripe * rounds * TILE
    for start in range(first, first + rounds * TILE, TILE):
        queries = start + tl.arange(0, TILE)
        q0 = load_rows(q, queries, q_row, N, 0, D0, D, EVEN)
        g0 = load_rows(grad_out, queries, g_row, N, 0, D0, D, EVEN)
        q1, g1 = q0, g0
        if D1:
            q1 = load_rows(q, queries, q_row, N, D0, D1, D, EVEN)
            g1 = load_rows(grad_out, queries, g_row, N, D0, D1, D, EVEN)
        row_lse = tl.load(lse + queries, mask=queries < N, other=0.0)
        row_delta = tl.load(delta + queries, mask=queries < N, other=0.0)

        p = tl.exp2(scores(k0, k1, q0, q1, D1, UPCAST) * to_log2 - row_lse[None, :])
        dp = scores(v0, v1, g0, g1, D1, UPCAST)
        ds = (p * (dp - row_delta[None, :])).to(q0.dtype)
        p = p.to(q0.dtype)
        dv0, dk0 = dot(p, g0, dv0, UPCAST), dot(ds, q0, dk0, UPCAST)
        if D1:
            dv1, dk1 = dot(p, g1, dv1, UPCAST), dot(ds, q1, dk1, UPCAST)

    dk += (stripe * tl.num_programs(2) + batch) * M * H * D + head * D
    dv += (stripe * tl.num_programs(2) + batch) * M * H * D + head * D
    store_rows(dk0 * D**-0.5, dk, keys, H * D, M, 0, D0, D, False)
    store_rows(dv0, dv, keys, H * D, M, 0, D0, D, False)
    if D1:
        store_rows(dk1 * D**-0.5, dk, keys, H * D, M, D0, D1, D, False)
        store_rows(dv1, dv, keys, H * D, M, D0, D1, D, False)


# ---- launchers -------------------------------------------------------------------------------------

# own: keys, all 64 + 16 or some.  loop: TILE.
CONFIGURATIONS = (
    Configuration(40, "forward", 80, 64, 4, 2, EVERYWHERE),
    Configuration(64, "forward", 80, 64, 4, 2, EVERYWHERE),
    Configuration(80, "forward", 80, 64, 4, 2, EVERYWHERE),
    Configuration(160, "forward", 80, 64, 4, 2, EVERYWHERE),
    Configuration(40, "dq", 80, 64, 4, 2, EVERYWHERE),
    Configuration(64, "dq", 80, 64, 4, 2, EVERYWHERE),
    Configuration(80, "dq", 80, 64, 4, 2, EVERYWHERE),
    Configuration(160, "dq", 80, 64, 4, 2, (SM80,)),
    Configuration(160, "dq", 80, 16, 4, 2, EVERYWHERE),
    # Where d has a piece of 16 columns, several warps would all compute the same 16 x 16 results: one warp does.
    Configuration(40, "dkdv", 16, 64, 1, 2, EVERYWHERE),
    Configuration(64, "dkdv", 16, 64, 4, 2, EVERYWHERE),
    Configuration(80, "dkdv", 16, 32, 1, 2, EVERYWHERE),
    Configuration(160, "dkdv", 16, 32, 4, 2, EVERYWHERE),
)

WARPS = 1024  # to spread the queries over: about ten for each multiprocessor of an A100 or H100


def spread(n: int, rows: int, c: Configuration) -> tuple[int, int]:
    """(stripes, rounds): among how many programs each of `rows` heads' queries go, and how many tiles each takes."""
    tiles = triton.cdiv(n, c.loop)
    rounds = max(1, min(tiles, tiles * rows * c.warps // WARPS))
    return triton.cdiv(tiles, rounds), rounds


def constants(c: Configuration, width: int, even: bool, upcast: bool) -> dict[str, int]:
    """A configuration's compile-time arguments for heads of one width."""
    first, second, outer = pieces(width, c.layout)
    return {
        **{"D": width, "HEAD_STRIDE": width, "D0": first, "D1": second},
        **({"V1": outer} if c.kernel == "forward" else {}),
        **({"OWN": c.own} if c.kernel == "dkdv" else {}),
        **{"TILE": c.loop, "EVEN": even, "UPCAST": upcast},
    }


def require_supported(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ValueError where the kernels cannot run: see `cross_attention`."""
    require_heads(forward_kernel, q, k, v)
    if not FEWEST_KEYS <= k.shape[1] <= MOST_KEYS:
        raise ValueError(f"k: {k.shape[1]} keys, expected {FEWEST_KEYS} to {MOST_KEYS}; `attention` takes any number")


def launch(kernel: Any, c: Configuration, tensors: Sequence[Tensor], views: Sequence[Tensor]) -> None:
    """One kernel over all stripes, heads and batch rows.

    Args:    tensors: the kernel's pointers in its order.  views: q, k, v (and grad_out), whose strides it takes.
    """
    q, k = views[:2]
    (batch, n, heads, width), m = q.shape, k.shape[1]
    key_tiles = triton.cdiv(m, c.own)
    stripes, rounds = spread(n, batch * heads * key_tiles, c)
    upcast = interpreting(kernel) and q.dtype == torch.bfloat16
    even = n % (c.loop * rounds) == 0
    strides = [stride for view in views for stride in view.stride()[:2]]
    values = constants(c, width, even=even, upcast=upcast)
    settings = {"num_warps": c.warps, "num_stages": c.stages}
    kernel[key_tiles * stripes, heads, batch](*tensors, *strides, n, m, rounds, **values, **settings)


def launch_forward(q: Tensor, k: Tensor, v: Tensor, options: Sequence[Configuration] = CONFIGURATIONS) -> Tensor:
    """out (B, N, H, d); see `cross_attention`."""
    require_supported(q, k, v)
    out = q.new_empty(q.shape)
    run_first_that_fits(options, "forward", q, lambda c: launch(forward_kernel, c, (q, k, v, out), (q, k, v)))
    return out


def launch_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, options: Sequence[Configuration] = CONFIGURATIONS
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, each contiguous, from what `launch_forward` took and the gradient of what it gave."""
    require_supported(q, k, v)
    batch, n, heads, _ = q.shape
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    views = (q, k, v, readable(grad_out))
    lse, delta = q.new_empty((2, batch, heads, n), dtype=torch.float32)
    run_first_that_fits(options, "dq", q, lambda c: launch(dq_kernel, c, (*views, dq, lse, delta), views))

    def sum_stripes(c: Configuration) -> None:
        stripes, _ = spread(n, batch * heads * triton.cdiv(k.shape[1], c.own), c)
        parts = q.new_empty((2, stripes, *k.shape), dtype=torch.float32)
        launch(dkdv_kernel, c, (*views, lse, delta, *parts), views)
        dk.copy_(parts[0].sum(0))
        dv.copy_(parts[1].sum(0))

    # It reads the lse and delta that the first kernel has written; a stream runs them in turn.
    run_first_that_fits(options, "dkdv", q, sum_stripes)
    return dq, dk, dv


# ---- registration ----------------------------------------------------------------------------------


@torch.library.custom_op("ldm::cross_attention", mutates_args=())
def cross_attention_op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return launch_forward(q, k, v)


@cross_attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("ldm::cross_attention_backward", mutates_args=())
def cross_attention_backward_op(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return launch_backward(grad_out, q, k, v)


@cross_attention_backward_op.register_fake
def _(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return cross_attention_backward_op(grad_out, *ctx.saved_tensors)


cross_attention_op.register_autograd(_differentiate, setup_context=_save)


def cross_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention to a prompt of 64 to 80 tokens, differentiable; what `attention` computes, in fewer steps.

    Args:    q: (B, N, H, d), k, v: (B, M, H, d), M = 64..80: views as `attention` takes them.
    Returns: (B, N, H, d), contiguous: `.flatten(2)` is a view.
    Raises:  ValueError: when M or a tensor is not as above, or the tensors are on different devices.
    """
    return cross_attention_op(q, k, v)


# ---- for the compiler ------------------------------------------------------------------------------


KERNELS = {"forward": forward_kernel, "dq": dq_kernel, "dkdv": dkdv_kernel}


def compile_spec(c: Configuration, even: bool = True) -> Spec:
    """What to compile for one configuration, at its own head width and 77 keys."""
    fn = KERNELS[c.kernel]
    constexprs = constants(c, c.width, even, upcast=False)
    strides = {name for name in fn.arg_names if name.endswith(("_batch", "_row"))}
    sizes = {"N", "M", "rounds"}
    fp32 = {"lse", "delta", "dk", "dv"}
    promised = set(fn.arg_names) - constexprs.keys() - (sizes - {"N"} if even else sizes)
    first, second, outer = pieces(c.width, c.layout)
    executed = first + (second + outer) / 2 if c.kernel == "forward" else first + second
    return Spec(
        name=f"cross_attention.{c}" + ("" if even else " uneven"),
        fn=fn,
        signature=signature(fn, {"i32": sizes | strides, "*fp32": fp32, "constexpr": constexprs}),
        constexprs=constexprs,
        divisible=tuple(name for name in fn.arg_names if name in promised),
        num_warps=c.warps,
        num_stages=c.stages,
        capabilities=c.capabilities,
        useful_ratio=executed / c.width * MOST_KEYS / 77,
    )


def compile_specs() -> Iterator[Spec]:
    """What is shipped, for the compiler: every configuration."""
    for c in CONFIGURATIONS:
        yield compile_spec(c)
