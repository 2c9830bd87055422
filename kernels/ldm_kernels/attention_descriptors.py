"""The forward of attention.py for Hopper: tiles brought by tensor descriptors, copies and products by different warps.

    out = softmax(q k^T / sqrt(d)) v            the same walk along the keys, the same running maximum

A descriptor tells the GPU's copy unit where a head's rows begin and end; it then brings whole tiles by itself, zeros
where rows or columns are missing. So a head is not cut in pieces: it lies in a BOX, the next power of two wide.
`warp_specialize` makes three groups of four warps of a program:

    one copies      k, v tiles -> a ring of `stages` of them in shared memory
    two multiply    half of the OWN queries each: s = q k^T, softmax, acc += p v, with registers of their own

Triton halves the queries itself, 3.6 and 3.8 rightly if three things are as they are here: OWN is 128 with 4 warps, as
with 64 both groups do all of the work; the kernel makes the descriptors, as the host's cannot be halved; and rows count
from the tile's first, as the number that says where q's copy begins may not be added to rows: the second half would be
moved twice. tests/kernels/test_attention_descriptors.py reads the compiler's code for all three.

No GPU has run this: nothing here is chosen by itself. `ldm bench gpu` times CANDIDATES; one that wins there is moved to
CONFIGURATIONS of attention.py, and is then held against torch at its first use as all others are.
"""

from collections.abc import Callable
from contextvars import copy_context

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldm_kernels.configurations import SM90, Configuration, capability
from ldm_kernels.heads import LOG2_E, dot, scores, store_rows, visible


@triton.jit
def forward_kernel(
    q, k, v, out, lse,
    q_batch, q_row, k_batch, k_row, v_batch, v_row, N, M,
    D: tl.constexpr, HEAD_STRIDE: tl.constexpr, BOX: tl.constexpr,
    OWN: tl.constexpr, LOOP: tl.constexpr, CAUSAL: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out (B, N, H, d) and lse (B, H, N), both contiguous. Strides are in elements."""
    tile, head, batch, H = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    q = tl.make_tensor_descriptor(q + batch * q_batch + head * HEAD_STRIDE, [N, D], [q_row, 1], [OWN, BOX])
    k = tl.make_tensor_descriptor(k + batch * k_batch + head * HEAD_STRIDE, [M, D], [k_row, 1], [LOOP, BOX])
    v = tl.make_tensor_descriptor(v + batch * v_batch + head * HEAD_STRIDE, [M, D], [v_row, 1], [LOOP, BOX])
    begin = tile * OWN
    queries = tl.arange(0, OWN)  # counted from the tile's first, as keys are below
    to_log2: tl.constexpr = D**-0.5 * LOG2_E

    own_q = q.load([begin, 0])
    m = tl.full((OWN,), float("-inf"), tl.float32)
    total = tl.zeros((OWN,), tl.float32)
    acc = tl.zeros((OWN, BOX), tl.float32)

    end = M
    if CAUSAL:
        end = tl.minimum(M, (tile + 1) * OWN)
    for start in tl.range(0, end, LOOP, warp_specialize=True):
        keys = start - begin + tl.arange(0, LOOP)
        tile_k = k.load([start, 0])
        s = scores(own_q, own_q, tile_k, tile_k, 0, UPCAST)
        s = visible(s, queries[:, None], keys[None, :], M - begin, CAUSAL, EVEN)

        larger = tl.maximum(m, tl.max(s, 1) * to_log2)
        p = tl.exp2(s * to_log2 - larger[:, None])
        shrink = tl.exp2(m - larger)
        total = total * shrink + tl.sum(p, 1)
        m = larger
        acc = dot(p.to(own_q.dtype), v.load([start, 0]), acc * shrink[:, None], UPCAST)

    out += (batch * N + begin) * H * D + head * D
    store_rows(acc / total[:, None], out, queries, H * D, N - begin, 0, BOX, D, EVEN)
    lse += (batch * H + head) * N + begin
    tl.store(lse + queries, (m + tl.log2(total)) / LOG2_E, mask=queries < N - begin)


# At 160 no use is to be expected: 256 queries are 32 programs for 132 multiprocessors.
CANDIDATES = (
    Configuration(40, "forward", 128, 64, 4, 2, (SM90,), "box"),
    Configuration(40, "forward", 128, 64, 4, 3, (SM90,), "box"),
    Configuration(40, "forward", 128, 128, 4, 2, (SM90,), "box"),
    Configuration(80, "forward", 128, 64, 4, 2, (SM90,), "box"),
)


def serves(q: Tensor, k: Tensor) -> bool:
    """Whether descriptors can read these heads: on Hopper, in half precision; the stride of a single row may be any."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    return half and capability(q) == SM90 and min(q.shape[1], k.shape[1]) > 1


def with_scratch(launch: Callable[[], None]) -> None:
    """Launch with memory for the descriptors that a kernel makes, 128 bytes each; the caller's allocator stays."""

    def within() -> None:
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
        launch()

    copy_context().run(within)
