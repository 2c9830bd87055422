"""Self-attention in Triton's interpreter against float64, forward and gradients; and what it refuses."""

import shutil
from dataclasses import replace

import pytest
import torch
from ldm_kernels import attention as kernel
from ldm_kernels.attention import attention
from ldm_kernels.configurations import Configuration, candidates, run_first_that_fits
from ldm_kernels.heads import pieces
from torch import Tensor
from torch.nn import functional as F
from triton.runtime.errors import OutOfResources

LOW = (torch.float16, torch.bfloat16)


def small(width: int, own: int = 32, loop: int = 16, layout: str = "split") -> list[Configuration]:
    """Tiles so small that short sequences have several; a GPU would get larger ones."""
    return [Configuration(width, name, own, loop, 4, 1, (80,), layout) for name in ("forward", "dq", "dkdv")]


def heads(batch: int, n: int, count: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """(B, N, H, d) standard normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((batch, n, count, width), generator=generator).to(dtype)


def triple(batch: int, n: int, m: int, count: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [heads(batch, length, count, width, dtype, seed) for seed, length in enumerate((n, m, m))]


def torch_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """torch's own, on (B, N, H, d)."""
    moved = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*moved, is_causal=causal).transpose(1, 2)


def torch_results(qkv: list[Tensor], grad: Tensor, causal: bool, dtype: torch.dtype) -> list[Tensor]:
    """out, dq, dk, dv by torch's attention in another precision."""
    inputs = [x.to(dtype).requires_grad_() for x in qkv]
    out = torch_attention(*inputs, causal)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(dtype))]


def kernel_results(qkv: list[Tensor], grad: Tensor, causal: bool, options: list[Configuration]) -> list[Tensor]:
    """out, dq, dk, dv by the kernels."""
    out, lse = kernel.launch_forward(*qkv, causal, options)
    return [out, *kernel.launch_backward(grad, *qkv, out, lse, causal, options)]


def assert_as_good_as_torch(qkv: list[Tensor], causal: bool, options: list[Configuration]) -> None:
    """Each result's error against float64 is at most twice torch's in the same dtype, plus the dtype's own rounding.

    The weights p and their gradients ds are rounded to the dtype before they are multiplied, as tensor cores want them,
    by the interpreter even downwards (bf16): 2 eps, of numbers as large as the largest result. In float32 the longest
    sums, 160 products and 130 keys, round some ten times: 16 eps.
    """
    grad = heads(*qkv[0].shape, qkv[0].dtype, seed=3)
    exact = torch_results(qkv, grad, causal, torch.float64)
    peers = torch_results(qkv, grad, causal, grad.dtype)
    rounding = (16 if grad.dtype == torch.float32 else 2) * torch.finfo(grad.dtype).eps
    for name, result, peer, truth in zip(
        ("out", "dq", "dk", "dv"), kernel_results(qkv, grad, causal, options), peers, exact, strict=True
    ):
        allowed = 2 * (peer - truth).abs().max() + rounding * truth.abs().max()
        assert (result - truth).abs().max() <= allowed, name
        assert result.dtype == grad.dtype, name


# ---- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "n", "m", "count", "width", "causal"),
    [
        (2, 1, 1, 2, 40, False),  # nothing to attend to but itself
        (1, 63, 63, 2, 80, False),  # one short of whole tiles
        (1, 77, 77, 2, 64, True),  # the text encoder
        (1, 101, 101, 1, 16, False),  # one piece of the smallest width
        (1, 130, 130, 1, 160, False),  # the widest head, two rows over
        (18, 16, 16, 1, 32, False),  # nine branches with guidance, less than a tile
        (1, 40, 100, 2, 40, False),  # more keys than queries
        (1, 64, 32, 2, 40, False),  # whole tiles: no masks
    ],
)
def test_float32(batch, n, m, count, width, causal):
    layout = "split8" if width == 40 else "split"
    assert_as_good_as_torch(triple(batch, n, m, count, width), causal, small(width, layout=layout))


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("n", "width", "causal"), [(63, 40, False), (77, 64, True), (34, 160, False), (33, 80, False)])
def test_half_precision(n, width, causal, dtype):
    assert_as_good_as_torch(triple(1, n, n, 2, width, dtype), causal, small(width))


def test_causal_with_tiles_of_keys_wider_than_those_of_queries():
    assert_as_good_as_torch(triple(1, 50, 50, 1, 16), True, small(16, own=16, loop=32))


@pytest.mark.parametrize("layout", ["split", "split8", "pad"])
def test_every_way_to_cut_a_head_gives_the_same(layout):
    assert_as_good_as_torch(triple(1, 20, 20, 1, 80), False, small(80, layout=layout))


@pytest.mark.parametrize("causal", [False, True])
def test_lse_is_the_log_of_the_sum_of_exponentials(causal):
    q, k, v = triple(1, 45, 45, 2, 16)
    scores = torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()) / 4
    if causal:
        scores = scores.masked_fill(torch.ones(45, 45).triu(1).bool(), float("-inf"))
    _, lse = kernel.launch_forward(q, k, v, causal, small(16))
    # Of order 1, in float32.
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-6, atol=2e-6)


def test_logits_of_ten_thousand():
    """q = +-800 e, k = +-100 e, d = 64: logits of exactly +-1e4. Whoever sees one takes all of its value."""
    q, k = torch.zeros(1, 40, 1, 64), torch.zeros(1, 40, 1, 64)
    q[0, :20, 0, 0], q[0, 20:, 0, 0] = 800, -800
    k[0, 33, 0, 0], k[0, 7, 0, 0] = 100, -100
    v, grad = heads(1, 40, 1, 64), heads(1, 40, 1, 64, seed=1)
    out, dq, dk, dv = kernel_results([q, k, v], grad, False, small(64))
    assert torch.equal(out[0, :20], v[0, 33].expand(20, 1, 64))
    assert torch.equal(out[0, 20:], v[0, 7].expand(20, 1, 64))
    # One weight is 1, the others 0: no softmax moves. What is left of p (dp - delta) is 6e-7 of rounding, times q.
    assert dq.abs().max() < 1e-3
    assert dk.abs().max() < 0.1
    torch.testing.assert_close(dv[0, [33, 7]], torch.stack([grad[0, :20].sum(0), grad[0, 20:].sum(0)]))
    assert dv[0, [i for i in range(40) if i not in (7, 33)]].abs().max() == 0


@pytest.mark.parametrize("dtype", LOW)
def test_large_logits_in_half_precision(dtype):
    """dq and dk are tiny here, differences dp - delta of large numbers, of which delta is summed from the rounded out,
    as in FlashAttention-2: an eps of dp, times the largest key or query.
    """
    q, k, v = triple(1, 33, 33, 2, 40, dtype)
    q, k, grad = 30 * q, 30 * k, heads(1, 33, 2, 40, dtype, seed=3)
    assert torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double()).abs().max() / 40**0.5 > 2000
    results = kernel_results([q, k, v], grad, False, small(40))
    exact = torch_results([q, k, v], grad, False, torch.float64)
    out, dq, dk, dv = ((mine - truth).abs().max() for mine, truth in zip(results, exact, strict=True))
    eps = torch.finfo(dtype).eps
    largest_dp = torch.einsum("bnhd,bmhd->bhnm", grad.double(), v.double()).abs().max()
    assert out <= 2 * eps * v.abs().max()
    assert dv <= 2 * eps * exact[3].abs().max()
    assert dq <= eps * largest_dp * k.abs().max() / 40**0.5
    assert dk <= eps * largest_dp * q.abs().max() / 40**0.5


def test_equal_keys_average_the_values():
    q, _, v = triple(1, 5, 48, 1, 16)
    out, _ = kernel.launch_forward(q, torch.ones_like(v), v, False, small(16))
    torch.testing.assert_close(out, v.mean(1, keepdim=True).expand_as(out))


# ---- views -----------------------------------------------------------------------------------------


def packed() -> list[Tensor]:
    """Of one projection to q, k and v side by side."""
    return list(heads(2, 24, 3 * 2, 40).unflatten(2, (3, 2)).unbind(2))


def positions_first() -> list[Tensor]:
    return [heads(24, 2, 2, 40, seed=seed).transpose(0, 1) for seed in range(3)]


def one_context_for_all() -> list[Tensor]:
    context = heads(1, 24, 2, 40).expand(3, -1, -1, -1)
    return [heads(3, 24, 2, 40), context, context]


def every_other_row() -> list[Tensor]:
    return [heads(2, 48, 2, 40, seed=seed)[:, ::2] for seed in range(3)]


@pytest.mark.parametrize("views", [packed, positions_first, one_context_for_all, every_other_row])
def test_a_view_gives_the_bits_of_its_copy(views):
    qkv, grad = views(), views()[0]
    copies = [x.contiguous() for x in qkv]
    assert any(not x.is_contiguous() for x in qkv)
    options = small(40)
    mine = kernel_results(qkv, grad, False, options)
    theirs = kernel_results(copies, grad.contiguous(), False, options)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert all(x.is_contiguous() for x in mine)


def test_the_gradient_of_a_sum_has_no_memory_of_its_own():
    q, k, v = (x.requires_grad_() for x in triple(1, 10, 10, 1, 16))
    attention(q, k, v).sum().backward()  # its gradient is a 1 with strides 0
    assert torch.allclose(v.grad.sum((0, 1)), torch.full((1, 16), 10.0))  # each query hands out a weight of 1


# ---- as torch sees it ------------------------------------------------------------------------------


def test_attention_is_differentiable():
    qkv = [x.requires_grad_() for x in triple(2, 70, 70, 2, 40)]  # the configuration that a GPU would get
    out = attention(*qkv, causal=True)
    assert out.flatten(2).data_ptr() == out.data_ptr()
    expected = torch_attention(*qkv, True)
    grad = heads(2, 70, 2, 40, seed=3)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)  # two float32 sums of 70 in different orders
    for mine, theirs in zip(torch.autograd.grad(out, qkv, grad), torch.autograd.grad(expected, qkv, grad), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_opcheck():
    qkv = [x.requires_grad_() for x in packed()]
    torch.library.opcheck(kernel.attention_op, (*qkv, False))
    out, lse = kernel.launch_forward(*packed(), False)
    torch.library.opcheck(kernel.attention_backward_op, (out, *packed(), out, lse, False))


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles with g++")
def test_compiled_without_a_graph_break():
    def f(qkv: Tensor) -> Tensor:
        return attention(*qkv.unbind(2)).flatten(2)

    qkv = heads(1, 20, 3 * 2, 40).unflatten(2, (3, 2)).requires_grad_()
    grad = heads(1, 20, 2, 40, seed=1).flatten(2)
    compiled = torch.compile(f, fullgraph=True)
    assert torch.equal(compiled(qkv), f(qkv))
    assert torch.equal(*(torch.autograd.grad(g(qkv), qkv, grad)[0] for g in (compiled, f)))


def test_an_empty_batch():
    qkv = [x.requires_grad_() for x in triple(0, 10, 10, 2, 40)]
    out = attention(*qkv)
    assert out.shape == (0, 10, 2, 40)
    assert [x.shape for x in torch.autograd.grad(out.sum(), qkv)] == [x.shape for x in qkv]


# ---- what it refuses -------------------------------------------------------------------------------

GOOD = heads(2, 20, 2, 40)


@pytest.mark.parametrize(
    ("q", "k", "v", "complaint"),
    [
        (GOOD[0], GOOD, GOOD, "q: 3 dimensions"),
        (GOOD, GOOD[:1], GOOD[:1], r"k: shape \(1, 20, 2, 40\), expected \(2, 20, 2, 40\)"),
        (GOOD, GOOD, GOOD[:, :10], "v: shape"),
        (GOOD, GOOD.half(), GOOD, "k: torch.float16 on cpu, but q is torch.float32"),
        (GOOD.double(), GOOD.double(), GOOD.double(), "q: dtype torch.float64"),
        (*[GOOD[..., :12]] * 3, "q: heads 12 wide"),
        (*[heads(1, 4, 1, 168)] * 3, "q: heads 168 wide"),
        (*[GOOD[:, :0]] * 3, "q, k: 0 queries, 0 keys"),
        (GOOD, GOOD[:, :0], GOOD[:, :0], "q, k: 20 queries, 0 keys"),
        (*[GOOD[:, :, :0]] * 3, "0 heads"),
        (*[heads(2, 40, 20, 2).permute(0, 2, 3, 1)] * 3, "q: strides .* heads side by side"),
        (*[heads(2, 2, 20, 40).transpose(1, 2)] * 3, "q: strides .* heads side by side"),
        (GOOD, GOOD.flatten()[1:1].new_empty(3201)[1:].view(2, 20, 2, 40), GOOD, "k: .* address 4 beyond"),
        (*[heads(1, 20, 1, 40)] * 3, "q: strides .* a multiple of 16"),
        (GOOD, GOOD, GOOD.as_strided((2, 20, 2, 40), (1600, 16, 40, 1)), "v: .* rows overlap"),
        (GOOD, GOOD, GOOD.as_strided((2, 20, 2, 40), (80, 80, 40, 1)), "v: .* rows overlap"),
        (GOOD, GOOD, GOOD.as_strided((2, 20, 2, 40), (1600, 0, 40, 1)), "v: .* rows overlap"),
    ],
)
def test_what_cannot_be_read_is_refused(q, k, v, complaint):
    with pytest.raises(ValueError, match=complaint):
        attention(q, k, v)


def test_tensors_on_different_devices_are_refused():
    with pytest.raises(ValueError, match=r"v: torch\.float32 on meta, but q is torch\.float32 on cpu"):
        kernel.launch_forward(GOOD, GOOD, GOOD.to("meta"), False)


def test_causal_wants_as_many_keys_as_queries():
    with pytest.raises(ValueError, match="causal: 10 queries and 20 keys"):
        attention(GOOD[:, :10], GOOD, GOOD, causal=True)


def test_no_kernel_runs_on_a_cpu_by_itself(monkeypatch):
    monkeypatch.setattr("ldm_kernels.heads.interpreting", lambda kernel: False)
    with pytest.raises(ValueError, match="q: on cpu, expected a CUDA device"):
        attention(GOOD, GOOD, GOOD)


# ---- configurations --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "layout", "expected"),
    [
        (40, "split", (32, 16, 16)),
        (40, "split8", (32, 16, 8)),
        (40, "pad", (64, 0, 0)),
        (64, "split", (64, 0, 0)),
        (80, "split", (64, 16, 16)),
        (160, "split", (128, 32, 32)),
        (160, "pad", (256, 0, 0)),
        (8, "split", (16, 0, 0)),
        (48, "split8", (32, 16, 16)),
        (112, "split", (64, 64, 64)),
    ],
)
def test_a_head_is_cut_into_powers_of_two(width, layout, expected):
    assert pieces(width, layout) == expected


@pytest.mark.parametrize("capability", [80, 86, 87, 89, 90, 100, 120])
@pytest.mark.parametrize("name", ["forward", "dq", "dkdv"])
def test_every_width_has_configurations_on_every_gpu(name, capability, monkeypatch):
    monkeypatch.setattr("ldm_kernels.configurations.capability", lambda x: capability)
    offered = max(known for known in (80, 86, 89, 90) if known <= capability)
    for width in range(8, 161, 8):
        found = candidates(kernel.CONFIGURATIONS, name, torch.empty(1, 1, 1, width))
        assert found, width
        assert all(offered in c.capabilities and c.width >= width for c in found)


def test_a_gpu_before_ampere_is_refused(monkeypatch):
    monkeypatch.setattr("ldm_kernels.configurations.capability", lambda x: 75)
    with pytest.raises(ValueError, match=r"capability 7\.5, expected 8\.0 or newer"):
        attention(GOOD, GOOD, GOOD)


def test_what_does_not_fit_is_said_once_and_not_tried_again(caplog, monkeypatch):
    monkeypatch.setattr("ldm_kernels.configurations._too_large", set())
    large, fits = small(40)[0], replace(small(40)[0], own=16)
    tried: list[Configuration] = []

    def launch(c: Configuration) -> None:
        tried.append(c)
        if c == large:
            raise OutOfResources(200_000, 101_376, "shared memory")

    for _ in range(2):
        run_first_that_fits([large, fits], "forward", GOOD, launch)
    assert tried == [large, fits, fits]
    assert len(caplog.records) == 1
    assert "forward d40 32x16 w4 s1 split does not fit" in caplog.text
    with pytest.raises(ValueError, match="no configuration of forward fits this GPU"):
        run_first_that_fits([large], "forward", GOOD, launch)


# ---- for the compiler ------------------------------------------------------------------------------


def test_specs_name_every_argument():
    specs = list(kernel.compile_specs())
    assert len({spec.name for spec in specs}) == len(specs) > len(kernel.CONFIGURATIONS)
    for spec in specs:
        assert list(spec.signature) == spec.fn.arg_names
        assert {name for name, kind in spec.signature.items() if kind == "constexpr"} == set(spec.constexprs)
        assert spec.constexprs["HEAD_STRIDE"] == spec.constexprs["D"]
        assert set(spec.divisible) <= set(spec.signature) - set(spec.constexprs)
        if "BOX" in spec.constexprs:
            assert spec.useful_ratio == spec.constexprs["BOX"] / spec.constexprs["D"]
            continue
        assert spec.useful_ratio <= (1.0 if spec.constexprs["D"] != 40 else 1.1 if "split8" in spec.name else 1.2)
