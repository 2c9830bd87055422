"""Self-attention that never writes its N x M weights to memory, forward and backward.

    out = softmax(q k^T / sqrt(d)) v            per batch row and head

Letters: B batch, N queries, M keys, H heads of width d.

Forward. A program owns OWN queries of one head and walks along the keys, LOOP at a time:

               keys ->   LOOP   LOOP   LOOP
                       +------+------+------+        of each tile: s = q k^T / sqrt(d)
    OWN queries (kept) |  s   |  s   |  s   |  ...   m = max so far, total = sum of exp(s - m) so far,
                       +------+------+------+        acc = sum of exp(s - m) v so far
                          k,v    k,v    k,v          when m grows, total and acc are scaled down to it

A softmax can be summed in one pass that way [Milakov and Gimelshein 2018, "Online normalizer calculation for softmax",
alg. 3], and its product with v along with it [Dao 2023, "FlashAttention-2", alg. 1]. At the end out = acc / total;
the logarithm lse = m + log(total) is all the backward needs to have any weight again: p = exp(s - lse).

Backward, with g the gradient of out [FlashAttention-2, alg. 2]:

    delta = rowsum(g * out)    ds = p * (g v^T - delta)
    dv = p^T g                 dq = ds k / sqrt(d)                 dk = ds^T q / sqrt(d)

dq sums along keys, dk and dv along queries. So two kernels: one owns queries and walks along keys as above, the other
owns keys and walks along queries. Every sum lives in one program: no atomics, and the same bits every time.

A head's width is cut into two pieces (kernels/ldm_kernels/heads.py): what reads q below is q0 and q1 in the code.
attention_descriptors.py has another forward, for Hopper, that no GPU has run: a candidate that nothing chooses yet.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldm_kernels import attention_descriptors
from ldm_kernels.configurations import EVERYWHERE, SM80, SM86, SM89, SM90, Configuration, run_first_that_fits
from ldm_kernels.heads import LOG2_E, dot, load_rows, pieces, readable, require_heads, scores, store_rows, visible
from ldm_kernels.interpreter import interpreting
from ldm_kernels.specs import Spec, signature

# ---- kernels ---------------------------------------------------------------------------------------


@triton.jit
def forward_kernel(
    q, k, v, out, lse,
    q_batch, q_row, k_batch, k_row, v_batch, v_row, N, M,
    D: tl.constexpr, HEAD_STRIDE: tl.constexpr,  # equal; a stride known only at run time would make every load 2 bytes
    D0: tl.constexpr, D1: tl.constexpr, V1: tl.constexpr,  # the pieces of D: in q k^T D0 + D1, in p v D0 + V1
    OWN: tl.constexpr, LOOP: tl.constexpr, CAUSAL: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out (B, N, H, d) and lse (B, H, N), both contiguous. Strides are in elements."""
    tile, head, batch, H = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    q += batch * q_batch + head * HEAD_STRIDE
    k += batch * k_batch + head * HEAD_STRIDE
    v += batch * v_batch + head * HEAD_STRIDE
    queries = tile * OWN + tl.arange(0, OWN)
    # In units of log2: exp(x / sqrt(d)) = exp2(x * to_log2).
    to_log2: tl.constexpr = D**-0.5 * LOG2_E

    q0 = load_rows(q, queries, q_row, N, 0, D0, D, EVEN)
    q1 = q0
    if D1:
        q1 = load_rows(q, queries, q_row, N, D0, D1, D, EVEN)
    m = tl.full((OWN,), float("-inf"), tl.float32)
    total = tl.zeros((OWN,), tl.float32)
    acc0 = tl.zeros((OWN, D0), tl.float32)
    if V1:
        acc1 = tl.zeros((OWN, V1), tl.float32)

    end = M
    if CAUSAL:
        end = tl.minimum(M, (tile + 1) * OWN)
    for start in range(0, end, LOOP):
        keys = start + tl.arange(0, LOOP)
        k0 = load_rows(k, keys, k_row, M, 0, D0, D, EVEN)
        k1 = k0
        if D1:
            k1 = load_rows(k, keys, k_row, M, D0, D1, D, EVEN)
        s = visible(scores(q0, q1, k0, k1, D1, UPCAST), queries[:, None], keys[None, :], M, CAUSAL, EVEN)

        # Every query sees a key of the first tile, so m is finite from then on and nothing is inf - inf.
        larger = tl.maximum(m, tl.max(s, 1) * to_log2)
        p = tl.exp2(s * to_log2 - larger[:, None])
        shrink = tl.exp2(m - larger)
        total = total * shrink + tl.sum(p, 1)
        m = larger

        p = p.to(q0.dtype)
        v0 = load_rows(v, keys, v_row, M, 0, D0, D, EVEN)
        acc0 = dot(p, v0, acc0 * shrink[:, None], UPCAST)
        if V1:
            v1 = load_rows(v, keys, v_row, M, D0, V1, D, EVEN)
            acc1 = dot(p, v1, acc1 * shrink[:, None], UPCAST)

    out += batch * N * H * D + head * D
    store_rows(acc0 / total[:, None], out, queries, H * D, N, 0, D0, D, EVEN)
    if V1:
        store_rows(acc1 / total[:, None], out, queries, H * D, N, D0, V1, D, EVEN)
    lse += (batch * H + head) * N
    tl.store(lse + queries, (m + tl.log2(total)) / LOG2_E, mask=queries < N)


@triton.jit
def dq_kernel(
    q, k, v, out, grad_out, lse, delta, dq,
    q_batch, q_row, k_batch, k_row, v_batch, v_row, g_batch, g_row, N, M,
    D: tl.constexpr, HEAD_STRIDE: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    OWN: tl.constexpr, LOOP: tl.constexpr, CAUSAL: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq (B, N, H, d), and delta (B, H, N) for the other kernel: a program owns queries and walks along keys."""
    tile, head, batch, H = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    q += batch * q_batch + head * HEAD_STRIDE
    k += batch * k_batch + head * HEAD_STRIDE
    v += batch * v_batch + head * HEAD_STRIDE
    grad_out += batch * g_batch + head * HEAD_STRIDE
    out += batch * N * H * D + head * D
    queries = tile * OWN + tl.arange(0, OWN)
    to_log2: tl.constexpr = D**-0.5 * LOG2_E

    q0 = load_rows(q, queries, q_row, N, 0, D0, D, EVEN)
    g0 = load_rows(grad_out, queries, g_row, N, 0, D0, D, EVEN)
    out0 = load_rows(out, queries, H * D, N, 0, D0, D, EVEN)
    own_delta = tl.sum(g0.to(tl.float32) * out0.to(tl.float32), 1)
    q1, g1 = q0, g0
    if D1:
        q1 = load_rows(q, queries, q_row, N, D0, D1, D, EVEN)
        g1 = load_rows(grad_out, queries, g_row, N, D0, D1, D, EVEN)
        out1 = load_rows(out, queries, H * D, N, D0, D1, D, EVEN)
        own_delta += tl.sum(g1.to(tl.float32) * out1.to(tl.float32), 1)
    row = (batch * H + head) * N
    tl.store(delta + row + queries, own_delta, mask=queries < N)
    lse_log2 = tl.load(lse + row + queries, mask=queries < N, other=0.0) * LOG2_E

    dq0 = tl.zeros((OWN, D0), tl.float32)
    if D1:
        dq1 = tl.zeros((OWN, D1), tl.float32)
    end = M
    if CAUSAL:
        end = tl.minimum(M, (tile + 1) * OWN)
    for start in range(0, end, LOOP):
        keys = start + tl.arange(0, LOOP)
        k0 = load_rows(k, keys, k_row, M, 0, D0, D, EVEN)
        v0 = load_rows(v, keys, v_row, M, 0, D0, D, EVEN)
        k1, v1 = k0, v0
        if D1:
            k1 = load_rows(k, keys, k_row, M, D0, D1, D, EVEN)
            v1 = load_rows(v, keys, v_row, M, D0, D1, D, EVEN)
        s = visible(scores(q0, q1, k0, k1, D1, UPCAST), queries[:, None], keys[None, :], M, CAUSAL, EVEN)
        p = tl.exp2(s * to_log2 - lse_log2[:, None])
        ds = (p * (scores(g0, g1, v0, v1, D1, UPCAST) - own_delta[:, None])).to(q0.dtype)
        dq0 = dot(ds, k0, dq0, UPCAST)
        if D1:
            dq1 = dot(ds, k1, dq1, UPCAST)

    dq += batch * N * H * D + head * D
    store_rows(dq0 * D**-0.5, dq, queries, H * D, N, 0, D0, D, EVEN)
    if D1:
        store_rows(dq1 * D**-0.5, dq, queries, H * D, N, D0, D1, D, EVEN)


@triton.jit
def dkdv_kernel(
    q, k, v, grad_out, lse, delta, dk, dv,
    q_batch, q_row, k_batch, k_row, v_batch, v_row, g_batch, g_row, N, M,
    D: tl.constexpr, HEAD_STRIDE: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    OWN: tl.constexpr, LOOP: tl.constexpr, CAUSAL: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dk and dv (B, M, H, d): a program owns keys, walks along queries. Its tiles are those above, transposed.

    A query beyond N has q = g = 0, so whatever its weight, it adds nothing.
    """
    tile, head, batch, H = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    q += batch * q_batch + head * HEAD_STRIDE
    k += batch * k_batch + head * HEAD_STRIDE
    v += batch * v_batch + head * HEAD_STRIDE
    grad_out += batch * g_batch + head * HEAD_STRIDE
    lse += (batch * H + head) * N
    delta += (batch * H + head) * N
    keys = tile * OWN + tl.arange(0, OWN)
    to_log2: tl.constexpr = D**-0.5 * LOG2_E

    k0 = load_rows(k, keys, k_row, M, 0, D0, D, EVEN)
    v0 = load_rows(v, keys, v_row, M, 0, D0, D, EVEN)
    dk0 = tl.zeros((OWN, D0), tl.float32)
    dv0 = tl.zeros((OWN, D0), tl.float32)
    k1, v1 = k0, v0
    if D1:
        k1 = load_rows(k, keys, k_row, M, D0, D1, D, EVEN)
        v1 = load_rows(v, keys, v_row, M, D0, D1, D, EVEN)
        dk1 = tl.zeros((OWN, D1), tl.float32)
        dv1 = tl.zeros((OWN, D1), tl.float32)

    begin = 0
    if CAUSAL:
        begin = tile * OWN // LOOP * LOOP  # earlier queries see none of these keys
    for start in range(begin, N, LOOP):
        queries = start + tl.arange(0, LOOP)
        q0 = load_rows(q, queries, q_row, N, 0, D0, D, EVEN)
        g0 = load_rows(grad_out, queries, g_row, N, 0, D0, D, EVEN)
        q1, g1 = q0, g0
        if D1:
            q1 = load_rows(q, queries, q_row, N, D0, D1, D, EVEN)
            g1 = load_rows(grad_out, queries, g_row, N, D0, D1, D, EVEN)
        if EVEN:
            lse_log2, row_delta = tl.load(lse + queries) * LOG2_E, tl.load(delta + queries)
        else:
            lse_log2 = tl.load(lse + queries, mask=queries < N, other=0.0) * LOG2_E
            row_delta = tl.load(delta + queries, mask=queries < N, other=0.0)

        s = visible(scores(k0, k1, q0, q1, D1, UPCAST), queries[None, :], keys[:, None], M, CAUSAL, EVEN)
        p = tl.exp2(s * to_log2 - lse_log2[None, :])
        dv0 = dot(p.to(q0.dtype), g0, dv0, UPCAST)
        if D1:
            dv1 = dot(p.to(q0.dtype), g1, dv1, UPCAST)
        ds = (p * (scores(v0, v1, g0, g1, D1, UPCAST) - row_delta[None, :])).to(q0.dtype)
        dk0 = dot(ds, q0, dk0, UPCAST)
        if D1:
            dk1 = dot(ds, q1, dk1, UPCAST)

    dk += batch * M * H * D + head * D
    dv += batch * M * H * D + head * D
    store_rows(dk0 * D**-0.5, dk, keys, H * D, M, 0, D0, D, EVEN)
    store_rows(dv0, dv, keys, H * D, M, 0, D0, D, EVEN)
    if D1:
        store_rows(dk1 * D**-0.5, dk, keys, H * D, M, D0, D1, D, EVEN)
        store_rows(dv1, dv, keys, H * D, M, D0, D1, D, EVEN)


# ---- launchers -------------------------------------------------------------------------------------

# For each head width and GPU the best guess first, judged by what the compiler made of it (registers, shared memory,
# programs a multiprocessor), not by a clock; then what to fall back on. Larger tiles of d = 160 spill registers; so do
# those of dkdv at 64 with triton 3.6 on sm_80, which also makes products of 64x128 at d = 40 on sm_90 wait.
CONFIGURATIONS = (
    Configuration(40, "forward", 128, 64, 4, 3, (SM80, SM86, SM89), "split8"),
    Configuration(40, "forward", 128, 64, 8, 2, (SM80, SM86, SM89), "split8"),
    Configuration(40, "forward", 128, 64, 8, 3, (SM90,), "split8"),
    Configuration(40, "forward", 64, 64, 4, 2, EVERYWHERE, "split8"),
    Configuration(64, "forward", 128, 64, 8, 3, (SM90,)),
    Configuration(64, "forward", 64, 64, 4, 3, EVERYWHERE),
    Configuration(80, "forward", 64, 64, 4, 3, (SM80,)),
    Configuration(80, "forward", 128, 64, 4, 2, (SM80, SM86, SM89)),
    Configuration(80, "forward", 128, 64, 8, 2, (SM90,)),
    Configuration(80, "forward", 64, 128, 4, 2, (SM90,)),
    Configuration(80, "forward", 64, 64, 4, 2, (SM86, SM89, SM90)),
    Configuration(160, "forward", 64, 64, 4, 2, (SM80, SM90)),
    Configuration(160, "forward", 128, 64, 8, 2, (SM80, SM90)),
    Configuration(160, "forward", 64, 32, 4, 2, EVERYWHERE),
    Configuration(40, "dq", 64, 64, 4, 2, EVERYWHERE),
    Configuration(64, "dq", 64, 64, 4, 2, EVERYWHERE),
    Configuration(80, "dq", 64, 64, 4, 2, EVERYWHERE),
    Configuration(160, "dq", 64, 32, 4, 2, EVERYWHERE),
    Configuration(40, "dkdv", 64, 64, 4, 2, EVERYWHERE),
    Configuration(64, "dkdv", 64, 64, 4, 2, (SM90,)),
    Configuration(64, "dkdv", 64, 32, 4, 2, (SM80, SM86, SM89)),
    Configuration(80, "dkdv", 64, 64, 4, 2, EVERYWHERE),
    Configuration(160, "dkdv", 64, 64, 8, 2, (SM90,)),
    Configuration(160, "dkdv", 64, 16, 4, 2, EVERYWHERE),
)


KERNELS = {"forward": forward_kernel, "dq": dq_kernel, "dkdv": dkdv_kernel}


def kernel_of(c: Configuration) -> Any:
    """The kernel that a configuration is for."""
    return attention_descriptors.forward_kernel if c.layout == "box" else KERNELS[c.kernel]


def constants(c: Configuration, width: int, causal: bool, even: bool, upcast: bool) -> dict[str, int]:
    """A configuration's compile-time arguments for heads of one width."""
    first, second, outer = pieces(width, c.layout)
    cut = {"BOX": first} if c.layout == "box" else {"D0": first, "D1": second}
    return {
        **{"D": width, "HEAD_STRIDE": width, **cut},
        **({"V1": outer} if c.kernel == "forward" and c.layout != "box" else {}),
        **{"OWN": c.own, "LOOP": c.loop, "CAUSAL": causal, "EVEN": even, "UPCAST": upcast},
    }


def launch(kernel: Any, c: Configuration, causal: bool, tensors: Sequence[Tensor], views: Sequence[Tensor]) -> None:
    """One kernel over every tile, head and batch row.

    Args:    tensors: the kernel's pointers in its order.  views: q, k, v (and grad_out), whose strides it takes.
    """
    q, k = views[:2]
    (batch, n, heads, width), m = q.shape, k.shape[1]
    own, loop = (m, n) if c.kernel == "dkdv" else (n, m)
    even = own % c.own == 0 and loop % c.loop == 0
    upcast = interpreting(kernel) and q.dtype == torch.bfloat16
    strides = [stride for view in views for stride in view.stride()[:2]]
    grid = (triton.cdiv(own, c.own), heads, batch)
    settings = {"num_warps": c.warps, "num_stages": c.stages}
    compiled_in = constants(c, width, causal, even, upcast)

    def run() -> None:
        kernel[grid](*tensors, *strides, n, m, **compiled_in, **settings)

    if c.layout == "box":
        attention_descriptors.with_scratch(run)
    else:
        run()


def require_supported(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    """Raises ValueError where the kernels cannot run: see `attention`."""
    require_heads(forward_kernel, q, k, v)
    if causal and q.shape[1] != k.shape[1]:
        raise ValueError(f"causal: {q.shape[1]} queries and {k.shape[1]} keys, expected as many of both")


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, options: Sequence[Configuration] = CONFIGURATIONS
) -> tuple[Tensor, Tensor]:
    """out (B, N, H, d) and lse (B, H, N) fp32, the natural logarithm of each query's sum of exponentials."""
    require_supported(q, k, v, causal)
    batch, n, heads, _ = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((batch, heads, n), dtype=torch.float32)
    pointers, views = (q, k, v, out, lse), (q, k, v)
    if not attention_descriptors.serves(q, k):
        options = [c for c in options if c.layout != "box"]
    run_first_that_fits(options, "forward", q, lambda c: launch(kernel_of(c), c, causal, pointers, views))
    return out, lse


def launch_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    options: Sequence[Configuration] = CONFIGURATIONS,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, each contiguous, from what `launch_forward` took and gave."""
    require_supported(q, k, v, causal)
    grad_out = readable(grad_out)
    dq, dk, dv, delta = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), torch.empty_like(lse)
    views = (q, k, v, grad_out)
    pointers = (q, k, v, out, grad_out, lse, delta, dq)
    run_first_that_fits(options, "dq", q, lambda c: launch(dq_kernel, c, causal, pointers, views))
    # The second kernel reads the delta that the first has written; a stream runs them in turn.
    pointers = (q, k, v, grad_out, lse, delta, dk, dv)
    run_first_that_fits(options, "dkdv", q, lambda c: launch(dkdv_kernel, c, causal, pointers, views))
    return dq, dk, dv


# ---- registration ----------------------------------------------------------------------------------


@torch.library.custom_op("ldm::attention", mutates_args=())
def attention_op(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    return launch_forward(q, k, v, causal)


@attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    batch, n, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, n), dtype=torch.float32)


@torch.library.custom_op("ldm::attention_backward", mutates_args=())
def attention_backward_op(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_backward(grad_out, q, k, v, out, lse, causal)


@attention_backward_op.register_fake
def _(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.causal = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse)


def _differentiate(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *attention_backward_op(grad_out, *ctx.saved_tensors, ctx.causal), None


attention_op.register_autograd(_differentiate, setup_context=_save)


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """Multi-head scaled dot-product attention, differentiable.

    softmax(q k^T / sqrt(d)) v                                            [Vaswani et al. 2017, eq. 1]

    Args:    q: (B, N, H, d), k, v: (B, M, H, d): views of projections, heads side by side in memory (strides
             (any, any, d, 1)), rows and batch rows any multiple of 16 elements apart, addresses multiples of 16 bytes.
             d: a multiple of 8 up to 160.  float16 or bfloat16, multiplied on tensor cores and summed in float32;
             float32 is for checks: it is slow.
             causal: query n sees keys 0..n only (N = M).
    Returns: (B, N, H, d), contiguous: `.flatten(2)` is a view.
    Raises:  ValueError: when a tensor is not as above, a length is zero, or the tensors are on different devices.
    """
    return attention_op(q, k, v, causal)[0]


# ---- for the compiler ------------------------------------------------------------------------------


def compile_spec(c: Configuration, causal: bool = False, even: bool = True) -> Spec:
    """What to compile for one configuration, at its own head width."""
    fn = kernel_of(c)
    constexprs = constants(c, c.width, causal, even, upcast=False)
    sizes = {"N", "M"}
    strides = {name for name in fn.arg_names if name.endswith(("_batch", "_row"))}
    promised = set(fn.arg_names) - constexprs.keys() - (set() if even else sizes)
    first, second, outer = pieces(c.width, c.layout)
    # Half of the forward's products read the narrow second piece; all of the backward's read the wide one.
    executed = first + (second + outer) / 2 if c.kernel == "forward" else first + second
    return Spec(
        name=f"attention.{c}" + (" causal" if causal else "") + ("" if even else " uneven"),
        fn=fn,
        signature=signature(fn, {"i32": sizes | strides, "*fp32": {"lse", "delta"}, "constexpr": constexprs}),
        constexprs=constexprs,
        divisible=tuple(name for name in fn.arg_names if name in promised),
        num_warps=c.warps,
        num_stages=c.stages,
        capabilities=c.capabilities,
        useful_ratio=executed / c.width,
    )


def compile_specs() -> Iterator[Spec]:
    """For the compiler: every configuration and candidate; and the text encoder's causal 77 tokens, 64 wide."""
    for c in (*CONFIGURATIONS, *attention_descriptors.CANDIDATES):
        yield compile_spec(c)
        if c.width == 64:
            yield compile_spec(c, causal=True, even=False)
