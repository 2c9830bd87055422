"""Every kernel as a GPU runs it: numbers and gradients against float64, at all shapes of SD1.5 and at odd ones.

On a CPU the same checks run in Triton's interpreter, at sizes that take it a moment: so that they are known to work.
"""

from functools import partial

import pytest
import torch
from accuracy import assert_as_exact_as_torch, randn
from torch import nn

from ldm.bench import kernels
from ldm.bench.kernel_sites import Site, sites
from ldm.fast.ops import HALF, Ops

ON_A_GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")],
)
TINY = (
    Site("attention", (32, 32, 2, 40), 1),
    Site("cross_attention", (16, 77, 2, 40), 1),
    Site("group_norm_silu", (32, 4, 4), 1),
    Site("group_norm", (32, 4, 4), 1),
    Site("geglu", (4, 16), 1),
    Site("add_layer_norm", (4, 16), 1),
)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("op", [site.op for site in TINY])
@pytest.mark.parametrize("device", ["cpu", ON_A_GPU])
def test_every_site_is_at_most_twice_as_wrong_as_torch(device, op, dtype):
    if op.endswith("attention") and dtype not in HALF:
        pytest.skip("float32 attention is torch's")
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter cuts off what a GPU rounds to bfloat16: twice the error by itself")
    wrong = []
    for site in TINY if device == "cpu" else sites():
        if site.op == op:
            try:
                kernels.check(site, dtype, device)
            except ValueError as error:
                wrong.append(str(error))
    assert wrong == []


def heads(batch: int, n: int, m: int, count: int, width: int, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k and v as projections give them: of one packed product where they are as long."""
    packed = randn(batch, n, 3 * count * width, dtype=dtype).to(device)
    q, k, v = packed.chunk(3, dim=-1)
    return (
        [q, k, v] if n == m else [q, *(randn(batch, m, count * width, seed=s, dtype=dtype).to(device) for s in (1, 2))]
    )


ODD = {  # batch, N, M, heads, width, causal: uneven tiles, one wide head, more keys than a block, the text encoder's
    "uneven": (2, 63, 63, 2, 40, False),
    "text": (1, 77, 77, 12, 64, True),
    "wide": (1, 130, 130, 2, 160, False),
    "few keys": (2, 100, 40, 2, 80, False),
    "prompt": (2, 100, 77, 2, 40, False),
    "longest prompt": (1, 64, 80, 2, 160, False),
    "many rows": (18, 3, 3, 2, 16, False),
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("batch", "n", "m", "count", "width", "causal"), ODD.values(), ids=ODD.keys())
def test_odd_attentions_on_a_gpu(batch, n, m, count, width, causal, dtype):
    ours, theirs = (partial(Ops(backend).attention, heads=count, causal=causal) for backend in ("triton", "torch"))
    assert_as_exact_as_torch(ours, theirs, heads(batch, n, m, count, width, "cuda", dtype))


NORMS = {  # shape, groups, mean, time
    "large mean": ((1, 96, 7, 5), 32, 100.0, False),
    "time": ((3, 1280, 8, 8), 32, 3.0, True),
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("shape", "groups", "mean", "timed"), NORMS.values(), ids=NORMS.keys())
def test_odd_norms_on_a_gpu(shape, groups, mean, timed, dtype):
    x = (randn(*shape) + mean).to("cuda", dtype).contiguous(memory_format=torch.channels_last)
    time = randn(*shape[:2], seed=3).to("cuda", dtype) if timed else None

    def norm(backend, x, time):
        module = nn.GroupNorm(groups, shape[1]).to("cuda", x.dtype)
        return Ops(backend).group_norm(x, module, time, silu=True)

    assert_as_exact_as_torch(partial(norm, "triton"), partial(norm, "torch"), [x, time])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("site", TINY, ids=lambda site: site.op)
def test_the_same_bits_twice_on_a_gpu(site, dtype):
    first, second = (kernels._results(site, dtype, "cuda", "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
