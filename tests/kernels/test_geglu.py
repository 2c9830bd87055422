"""Fused GEGLU against torch's own in float64."""

import pytest
import torch
from accuracy import assert_as_exact_as_torch, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from ldm_kernels.geglu import geglu, geglu_backward_op, geglu_op
from torch import Tensor
from torch.nn import functional as F


def reference(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 8.0])  # gates far out, where Phi is 0 or 1
def test_results_and_gradients(dtype, scale):
    assert_as_exact_as_torch(geglu, reference, [(scale * randn(2, 9, 74)).to(dtype)])


def test_gates_of_any_size_stay_finite():
    gate = torch.tensor([-1e4, -30.0, -6.0, 0.0, 6.0, 30.0, 1e4])
    x = torch.cat([torch.ones(7), gate]).requires_grad_()
    out = geglu(x)
    out.sum().backward()
    assert torch.equal(out, F.gelu(gate))
    assert torch.equal(x.grad[7:], torch.tensor([0.0, 0.0, x.grad[9], 0.5, x.grad[11], 1.0, 1.0]))


@pytest.mark.parametrize(
    "transform",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x[:, ::2],
        lambda x: x[..., 3:11],  # misaligned: fewer bytes a load, the same numbers
        lambda x: x[:1].expand(3, -1, -1),
    ],
)
def test_any_strides(transform):
    assert_as_exact_as_torch(geglu, reference, [transform(randn(3, 4, 16))])


@settings(max_examples=10)
@given(rows=st.integers(1, 20), channels=st.integers(1, 300))
def test_any_shape(rows, channels):
    assert_as_exact_as_torch(geglu, reference, [randn(rows, 2 * channels)])


def test_the_ops_keep_torchs_rules():
    x = randn(3, 12).requires_grad_()
    torch.library.opcheck(geglu_op, (x,))
    torch.library.opcheck(geglu_backward_op, (randn(3, 6, seed=1), x.detach()))


@pytest.mark.parametrize(
    ("x", "complaint"),
    [
        (torch.zeros(2, 4, dtype=torch.float64), "x: dtype torch.float64, expected float16"),
        (torch.zeros(2, 5), r"x: shape \(2, 5\), expected \(..., 2C\)"),
        (torch.zeros(0, 4), r"x: shape \(0, 4\) holds nothing"),
        (torch.zeros(2, 0), "holds nothing"),
    ],
)
def test_what_it_cannot_take_is_said_in_one_line(x, complaint):
    with pytest.raises(ValueError, match=complaint):
        geglu(x)
