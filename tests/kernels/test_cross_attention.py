"""Cross-attention in Triton's interpreter against float64: output, gradients; and what it refuses."""

import pytest
import torch
from ldm_kernels import cross_attention as kernel
from ldm_kernels.attention import attention
from ldm_kernels.configurations import Configuration, candidates
from ldm_kernels.cross_attention import cross_attention
from torch import Tensor


def small(width: int, tile: int = 32, layout: str = "split") -> list[Configuration]:
    """Tiles so small that a few queries fill several."""
    own = {"forward": 80, "dq": 80, "dkdv": 16}
    return [Configuration(width, name, own[name], tile, 4, 1, (80,), layout) for name in own]


def heads(batch: int, n: int, count: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """(B, N, H, d) standard normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((batch, n, count, width), generator=generator).to(dtype)


def triple(batch: int, n: int, m: int, count: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [heads(batch, length, count, width, dtype, seed) for seed, length in enumerate((n, m, m))]


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """out (B, N, H, d), as the formula says it, in the inputs' precision."""
    weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v)


def formula_results(qkv: list[Tensor], grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    inputs = [x.detach().to(dtype).requires_grad_() for x in qkv]
    out = softmax_attention(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(dtype))]


def assert_as_good_as_torch(qkv: list[Tensor], options: list[Configuration]) -> None:
    """Each error against float64 is at most twice that of torch's matrix products and softmax in the same dtype, plus
    the dtype's own rounding of p and ds before they are multiplied, by the interpreter even downwards (bf16): 2 eps, of
    numbers as large as the largest result. In float32 sums of 160 and 130 numbers round some ten times: 16 eps.
    """
    grad = heads(*qkv[0].shape, qkv[0].dtype, seed=3)
    exact = formula_results(qkv, grad, torch.float64)
    peers = formula_results(qkv, grad, grad.dtype)
    out = kernel.launch_forward(*qkv, options=options)
    results = [out, *kernel.launch_backward(grad, *qkv, options=options)]
    rounding = (16 if grad.dtype == torch.float32 else 2) * torch.finfo(grad.dtype).eps
    for name, result, peer, truth in zip(("out", "dq", "dk", "dv"), results, peers, exact, strict=True):
        allowed = 2 * (peer - truth).abs().max() + rounding * truth.abs().max()
        assert (result - truth).abs().max() <= allowed, name
        assert result.dtype == grad.dtype, name


# ---- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "n", "m", "count", "width"),
    [
        (2, 1, 77, 2, 40),  # a single query
        (1, 63, 77, 2, 80),  # one short of whole tiles
        (1, 64, 64, 1, 64),  # whole tiles, and no key in the second piece
        (1, 130, 80, 1, 160),  # the widest head, every key there is room for
        (3, 16, 77, 1, 16),  # less than a tile
        (1, 101, 78, 1, 32),
    ],
)
def test_float32(batch, n, m, count, width):
    assert_as_good_as_torch(triple(batch, n, m, count, width), small(width))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [40, 160])
def test_half_precision(width, dtype):
    assert_as_good_as_torch(triple(1, 33, 77, 2, width, dtype), small(width))


@pytest.mark.parametrize("layout", ["split8", "pad"])
def test_every_way_to_cut_a_head_gives_the_same(layout):
    assert_as_good_as_torch(triple(1, 20, 77, 2, 40), small(40, layout=layout))


def test_a_program_with_several_tiles(monkeypatch):
    """With few programs each takes several tiles, the last of them beyond the queries; several stripes are summed."""
    monkeypatch.setattr(kernel, "WARPS", 16)
    options = small(40, tile=16)
    assert kernel.spread(130, 2, options[0]) == (3, 4)  # 3 x 4 x 16: 130 queries and 62 that are not there
    assert_as_good_as_torch(triple(1, 130, 77, 2, 40), options)


@pytest.mark.parametrize(("n", "rows", "expected"), [(4096, 16, (16, 4)), (64, 16, (1, 1)), (1, 1, (1, 1))])
def test_queries_are_spread_over_programs(n, rows, expected):
    assert kernel.spread(n, rows, small(40, tile=64)[0]) == expected


def test_it_is_attention():
    qkv = triple(1, 20, 77, 2, 40)
    # Sums of 77 in float32, in another order.
    torch.testing.assert_close(cross_attention(*qkv), attention(*qkv), rtol=1e-5, atol=1e-6)


def test_logits_of_ten_thousand():
    """q = +-800 e, k = +-100 e, d = 64: logits of exactly +-1e4, in both pieces of the keys."""
    q, k = torch.zeros(1, 40, 1, 64), torch.zeros(1, 77, 1, 64)
    q[0, :20, 0, 0], q[0, 20:, 0, 0] = 800, -800
    k[0, 70, 0, 0], k[0, 7, 0, 0] = 100, -100
    v = heads(1, 77, 1, 64)
    out = cross_attention(q, k, v)
    assert torch.equal(out[0, :20], v[0, 70].expand(20, 1, 64))
    assert torch.equal(out[0, 20:], v[0, 7].expand(20, 1, 64))


def test_logits_far_below_zero():
    """All are -512, and no exponential survives unless the largest is subtracted; keys that are not there score 0."""
    v = heads(1, 70, 1, 64)
    out = cross_attention(torch.full((1, 20, 1, 64), 8.0), torch.full_like(v, -8.0), v)
    torch.testing.assert_close(out, v.mean(1, keepdim=True).expand_as(out))


# ---- views, and as torch sees it -------------------------------------------------------------------


def test_a_view_gives_the_bits_of_its_copy():
    """One context for the whole batch, its keys and values side by side in one projection."""
    k, v = heads(1, 77, 2 * 2, 40).unflatten(2, (2, 2)).expand(2, -1, -1, -1, -1).unbind(2)
    q = heads(20, 2, 2, 40).transpose(0, 1)
    grad = heads(2, 20, 2, 40, seed=1)
    views, copies = [q, k, v], [x.contiguous() for x in (q, k, v)]
    for mine, theirs in (
        (kernel.launch_forward(*views), kernel.launch_forward(*copies)),
        *zip(kernel.launch_backward(grad, *views), kernel.launch_backward(grad, *copies), strict=True),
    ):
        assert torch.equal(mine, theirs)
        assert mine.is_contiguous()


def test_opcheck():
    qkv = [x.requires_grad_() for x in triple(1, 10, 77, 2, 40)]
    torch.library.opcheck(kernel.cross_attention_op, tuple(qkv))
    plain = [x.detach() for x in qkv]
    torch.library.opcheck(kernel.cross_attention_backward_op, (heads(1, 10, 2, 40), *plain))


def test_compiled_without_a_graph_break():
    qkv = [x.requires_grad_() for x in triple(1, 10, 77, 2, 40)]
    compiled = torch.compile(cross_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*qkv), cross_attention(*qkv))
    mine, theirs = (torch.autograd.grad(f(*qkv).square().sum(), qkv) for f in (compiled, cross_attention))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_an_empty_batch():
    qkv = [x.requires_grad_() for x in triple(0, 10, 77, 2, 40)]
    out = cross_attention(*qkv)
    assert out.shape == (0, 10, 2, 40)
    assert [x.shape for x in torch.autograd.grad(out.sum(), qkv)] == [x.shape for x in qkv]


# ---- what it refuses -------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 63, 81])
def test_other_numbers_of_keys_are_for_the_other_kernel(m):
    with pytest.raises(ValueError, match=f"k: {m} keys, expected 64 to 80"):
        cross_attention(*triple(1, 10, m, 2, 40))


def test_heads_that_cannot_be_read_are_refused():
    q, k, v = triple(1, 10, 77, 2, 40)
    with pytest.raises(ValueError, match=r"k: torch\.float16 on cpu, but q is torch\.float32"):
        cross_attention(q, k.half(), v)


# ---- for the compiler ------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 120])
def test_every_width_has_configurations_on_every_gpu(capability, monkeypatch):
    monkeypatch.setattr("ldm_kernels.configurations.capability", lambda x: capability)
    for width in range(8, 161, 8):
        for name in ("forward", "dq", "dkdv"):
            assert candidates(kernel.CONFIGURATIONS, name, torch.empty(1, 1, 1, width))


def test_specs_name_every_argument():
    specs = list(kernel.compile_specs())
    assert len({spec.name for spec in specs}) == len(specs) == len(kernel.CONFIGURATIONS)
    for spec in specs:
        assert list(spec.signature) == spec.fn.arg_names
        assert {name for name, kind in spec.signature.items() if kind == "constexpr"} == set(spec.constexprs)
        assert set(spec.divisible) <= set(spec.signature) - set(spec.constexprs)
