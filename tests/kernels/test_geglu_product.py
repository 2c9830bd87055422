"""GEGLU in its projection's epilogue, against torch's own in float64."""

import pytest
import torch
from accuracy import FACTOR, ROUNDING, randn, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from ldm_kernels.geglu_product import CANDIDATES, Tiles, launch_forward
from torch import Tensor
from torch.nn import functional as F

from ldm.bench.gpu_tuning import product_inputs, require_right_product
from ldm.bench.kernel_sites import sites

SMALL = Tiles(32, 16, 16, 4, 2, (80,))


def by_torch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    value, gate = F.linear(x, weight, bias).chunk(2, dim=-1)
    return value * F.gelu(gate)


def inputs(rows: int, channels: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    x, weight = randn(rows, width), randn(2 * channels, width, seed=1) / width**0.5
    return [t.to(dtype) for t in (x, weight, randn(2 * channels, seed=2))]


def assert_as_exact_as_torch(given: list[Tensor], c: Tiles) -> None:
    exact, peer = by_torch(*(t.double() for t in given)), by_torch(*given)
    out = launch_forward(*given, c)
    assert (out.shape, out.dtype) == (peer.shape, peer.dtype)
    assert relative_error(out, exact) <= FACTOR[out.dtype] * relative_error(peer, exact) + ROUNDING[out.dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(64, 32, 48), (65, 33, 47), (1, 40, 1), (3, 40, 100)], ids=str)
def test_results(shape, dtype):
    assert_as_exact_as_torch(inputs(*shape, dtype), SMALL)


@settings(max_examples=10)
@given(rows=st.integers(1, 70), channels=st.integers(1, 40), width=st.integers(1, 40))
def test_any_shape(rows, channels, width):
    assert_as_exact_as_torch(inputs(rows, channels, width), SMALL)


@pytest.mark.parametrize("c", CANDIDATES, ids=str)
def test_candidates_at_a_size_with_whole_and_broken_tiles(c):
    for rows in (2 * c.rows, c.rows + 1):
        assert_as_exact_as_torch(inputs(rows, c.columns, 2 * c.step, torch.float16), c)


def test_batches_and_strides():
    x, weight, bias = inputs(12, 8, 16)
    expected = launch_forward(x, weight, bias, SMALL)
    assert torch.equal(launch_forward(x.view(3, 4, 16), weight, bias, SMALL), expected.view(3, 4, 8))
    assert torch.equal(launch_forward(x.T.contiguous().T, weight.T.contiguous().T, bias, SMALL), expected)


X, WEIGHT, BIAS = inputs(4, 8, 16)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ((X, WEIGHT[:15], BIAS), r"weight: torch.float32 of shape \(15, 16\), expected \(2C, K\)"),
        ((X, WEIGHT.half(), BIAS), "weight: torch.float16"),
        ((X, WEIGHT, BIAS.half()), "in x's torch.float32"),
        ((X[:, :8], WEIGHT, BIAS), r"x: shape \(4, 8\), expected \(..., K\) = \(4, 16\)"),
        ((X, WEIGHT, BIAS[:8]), r"bias: shape \(8,\), expected \(2C,\) = \(16,\)"),
        ((X[:0], WEIGHT, BIAS), "x: shape .* holds nothing"),
        ((X, WEIGHT.to("meta"), BIAS), "weight: on meta"),
    ],
)
def test_what_cannot_be_multiplied_is_refused(given, complaint):
    with pytest.raises(ValueError, match=complaint):
        launch_forward(*given, SMALL)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("c", CANDIDATES, ids=str)
def test_candidates_at_every_site_on_a_gpu(c):
    if torch.cuda.get_device_capability() not in [divmod(known, 10) for known in c.capabilities]:
        pytest.skip(f"a candidate for {c.capabilities}")
    for site in sites():
        if site.op == "geglu":
            x, weight, bias = product_inputs(2 * site.sizes[0], site.sizes[1], "cuda")
            require_right_product(c, x, weight, bias)
            require_right_product(c, x[:-1], weight, bias)  # a broken tile
