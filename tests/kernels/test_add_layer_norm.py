"""Residual and LayerNorm in one against torch's own in float64."""

import pytest
import torch
from accuracy import assert_as_exact_as_torch, randn, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from ldm_kernels import add_layer_norm as module
from ldm_kernels.add_layer_norm import add_layer_norm, add_layer_norm_backward_op, add_layer_norm_op
from torch import Tensor
from torch.nn import functional as F


def reference(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = x + branch
    return total, F.layer_norm(total, (x.shape[-1],), weight, bias, 1e-5)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    channels = shape[-1]
    weight, bias = 1 + 0.1 * randn(channels, seed=2), 0.1 * randn(channels, seed=3)
    return [x.to(dtype) for x in (randn(*shape), randn(*shape, seed=1), weight, bias)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 7, 40), (18, 1, 96)])
def test_results_and_gradients(dtype, shape):
    assert_as_exact_as_torch(add_layer_norm, reference, inputs(*shape, dtype=dtype))


@pytest.mark.parametrize(("offset", "scale"), [(1e3, 1e-2), (-1e4, 0.1), (0.0, 1e-4)])
def test_a_large_mean_does_not_swallow_the_variance(offset, scale):
    x, weight, bias = scale * randn(4, 320) + offset, torch.ones(320), torch.zeros(320)
    exact = F.layer_norm(x.double(), (320,), weight.double(), bias.double(), 1e-5)
    # What x - mean loses by x's own 24 bits, and the mean's.
    bound = 2e-7 * (1 + 2 * abs(offset) / max(scale, 1e-5**0.5))
    assert relative_error(add_layer_norm(x, torch.zeros_like(x), weight, bias)[1], exact) < bound


def test_more_rows_than_programs_of_the_backward(monkeypatch):
    monkeypatch.setattr(module, "PROGRAMS", 3)
    assert_as_exact_as_torch(add_layer_norm, reference, inputs(10, 8))


def test_the_normalised_sum_is_the_sum_that_is_returned():
    # In float16 1 + 2^-12 is 1: what is normalised is the rounded sum, which the backward has, not what was rounded.
    x, branch = torch.ones(1, 16).half(), torch.full((1, 16), 2.0**-12).half()
    total, out = add_layer_norm(x, branch, torch.ones(16).half(), torch.zeros(16).half())
    assert torch.equal(total, x)
    assert torch.equal(out, torch.zeros_like(x))


def test_a_sum_that_nothing_reads_further_has_no_gradient_to_add():
    x, branch, weight, bias = (t.requires_grad_() for t in inputs(3, 16))
    add_layer_norm(x, branch, weight, bias)[1].backward(randn(3, 16, seed=9))
    again = [t.detach().clone().requires_grad_() for t in (x, branch, weight, bias)]
    reference(*again)[1].backward(randn(3, 16, seed=9))
    for got, expected in zip((x, branch, weight, bias), again, strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-4, atol=1e-5)  # float32 sums in another order


@pytest.mark.parametrize(
    "transform",
    [lambda x: x.transpose(0, 1), lambda x: x[:, ::2], lambda x: x[..., 3:11], lambda x: x[:1].expand(4, -1, -1)],
)
def test_any_strides(transform):
    x, branch = transform(randn(4, 4, 16)), transform(randn(4, 4, 16, seed=1))
    channels = x.shape[-1]
    assert_as_exact_as_torch(add_layer_norm, reference, [x, branch, *inputs(1, channels)[2:]])


@settings(max_examples=10)
@given(rows=st.integers(1, 12), channels=st.integers(2, 300))
def test_any_shape(rows, channels):
    assert_as_exact_as_torch(add_layer_norm, reference, inputs(rows, channels))


def test_the_ops_keep_torchs_rules():
    given_inputs = [x.requires_grad_() for x in inputs(3, 16)]
    torch.library.opcheck(add_layer_norm_op, (*given_inputs, 1e-5))
    x, branch, weight, bias = (x.detach() for x in given_inputs)
    total, out, mean, rstd = add_layer_norm_op(x, branch, weight, bias, 1e-5)
    torch.library.opcheck(add_layer_norm_backward_op, (x, out, total, weight, mean, rstd))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"x": torch.zeros(2, 16, dtype=torch.float64)}, "x: dtype torch.float64"),
        ({"residual": torch.zeros(3, 16)}, r"residual: shape \(3, 16\), expected x's shape = \(2, 16\)"),
        ({"residual": torch.zeros(2, 16).half()}, "beside a residual of torch.float16"),
        ({"weight": torch.ones(8)}, r"weight: shape \(8,\), expected \(C,\) = \(16,\)"),
        ({"x": torch.zeros(0, 16)}, r"x: shape \(0, 16\) holds nothing"),
    ],
)
def test_what_it_cannot_take_is_said_in_one_line(change, complaint):
    given = {"x": torch.zeros(2, 16), "residual": torch.zeros(2, 16), "weight": torch.ones(16), "bias": torch.zeros(16)}
    with pytest.raises(ValueError, match=complaint):
        add_layer_norm(**(given | change))
