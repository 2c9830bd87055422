"""Fused GroupNorm against torch's own in float64: odd images, strides, dtypes, a mean that dwarfs the spread."""

import pytest
import torch
from accuracy import assert_as_exact_as_torch, randn, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from ldm_kernels import group_norm_silu as module
from ldm_kernels.checks import require_alike
from ldm_kernels.group_norm_silu import Tiling, group_norm_silu, group_norm_silu_backward_op, group_norm_silu_op
from torch import Tensor
from torch.nn import functional as F

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def reference(x: Tensor, weight: Tensor, bias: Tensor, time: Tensor | None, groups: int, silu: bool) -> Tensor:
    if time is not None:
        x = x + time[:, :, None, None]
    x = F.group_norm(x, groups, weight, bias, 1e-5)
    return F.silu(x) if silu else x


def check(shape, groups, dtype, with_time=True, silu=True, scale=1.0, offset=0.0, transform=lambda x: x) -> None:
    batch, channels = shape[:2]
    x = transform((randn(*shape) * scale + offset).to(dtype).contiguous(memory_format=torch.channels_last))
    weight, bias = 1 + 0.1 * randn(channels, seed=1), 0.1 * randn(channels, seed=2)
    time = randn(batch, channels, seed=3).to(dtype) if with_time else None
    assert_as_exact_as_torch(
        lambda x, w, b, t: group_norm_silu(x, w, b, groups, 1e-5, t, silu),
        lambda x, w, b, t: reference(x, w, b, t, groups, silu),
        [x, weight.to(dtype), bias.to(dtype), time],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_time", [False, True])
@pytest.mark.parametrize("silu", [False, True])
def test_results_and_gradients(dtype, with_time, silu):
    check((2, 40, 6, 5), 4, dtype, with_time, silu)


@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((1, 8, 1, 1), 1),  # one position
        ((18, 8, 2, 3), 2),  # nine branches with guidance
        ((1, 80, 9, 7), 8),  # ten channels a group, as SD1.5 has: groups straddle tiles
        ((1, 96, 13, 10), 8),  # 130 positions: the last tile sticks out
        ((1, 8, 67, 64), 2),  # several tiles in a column
        ((1, 8, 4, 4), 8),  # every channel its own group
        ((2, 64, 4, 4), 1),  # one group
    ],
)
def test_shapes(shape, groups):
    check(shape, groups, torch.float32)


def test_chunks_of_several_tiles_merge(monkeypatch):
    # More tiles than chunks are allowed: one chunk walks over three, the other over one and a piece of one.
    monkeypatch.setattr(module, "MOST_CHUNKS", 2)
    tiling = Tiling.of(512 * 4 + 17, 8)
    assert (tiling.rows, tiling.tiles, tiling.chunks, tiling.chunk_rows) == (512, 5, 2, 3 * 512)
    check((1, 8, 1, 512 * 4 + 17), 2, torch.float32, with_time=False)


@pytest.mark.parametrize(("offset", "scale"), [(1e3, 1e-2), (-1e4, 0.1), (0.0, 1e-4), (0.0, 1e4)])
def test_a_large_mean_does_not_swallow_the_variance(offset, scale):
    """E[x^2] - E[x]^2 has no correct digit here: 1e6 in float32 is known to 0.06, the variance is 1e-4."""
    x = (randn(2, 16, 8, 8) * scale + offset).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.ones(16), torch.zeros(16)
    exact = F.group_norm(x.double(), 4, weight.double(), bias.double(), 1e-5)
    # What x - mean loses by x's own 24 bits, and the mean's.
    bound = 2e-7 * (1 + 2 * abs(offset) / max(scale, 1e-5**0.5))
    assert relative_error(group_norm_silu(x, weight, bias, 4, 1e-5, silu=False), exact) < bound


def test_a_time_that_dwarfs_the_image():
    x, time = randn(1, 16, 8, 8).contiguous(memory_format=torch.channels_last), torch.full((1, 16), 1e3)
    weight, bias = torch.ones(16), torch.zeros(16)
    exact = F.group_norm(x.double() + 1e3, 4, weight.double(), bias.double(), 1e-5)
    assert relative_error(group_norm_silu(x, weight, bias, 4, 1e-5, time, silu=False), exact) < 2e-4


@pytest.mark.parametrize(
    "transform",
    [
        lambda x: x.contiguous(),  # NCHW
        lambda x: x.mT,  # turned
        lambda x: torch.cat([x, x], 2)[:, :, ::2],  # every second row
        lambda x: x[:1].expand(2, -1, -1, -1),  # one image twice
    ],
)
def test_any_strides(transform):
    check((2, 16, 6, 6), 4, torch.float32, transform=transform)


def test_the_result_is_channels_last_and_the_weights_may_be_of_another_dtype():
    x = randn(2, 16, 4, 4, dtype=torch.float16)
    out = group_norm_silu(x, torch.ones(16), torch.zeros(16), 4, 1e-5)
    assert out.dtype == torch.float16
    assert out.is_contiguous(memory_format=torch.channels_last)


@settings(max_examples=6)
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 4),
    width=st.integers(1, 3),
    height=st.integers(1, 9),
    across=st.integers(1, 9),
    silu=st.booleans(),
    with_time=st.booleans(),
)
def test_any_shape(batch, groups, width, height, across, silu, with_time):
    check((batch, 8 * groups * width, height, across), groups, torch.float32, with_time, silu)


@pytest.mark.parametrize("with_time", [False, True])
def test_the_ops_keep_torchs_rules(with_time):
    x = randn(2, 16, 3, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = randn(16, seed=1).requires_grad_(), randn(16, seed=2).requires_grad_()
    time = randn(2, 16, seed=3).requires_grad_() if with_time else None
    torch.library.opcheck(group_norm_silu_op, (x, weight, bias, 4, 1e-5, time, True))
    out, mean, rstd = (y.detach() for y in group_norm_silu_op(x, weight, bias, 4, 1e-5, time, True))
    saved = [None if y is None else y.detach() for y in (x, weight, bias, time)]
    torch.library.opcheck(group_norm_silu_backward_op, (torch.ones_like(out), *saved, mean, rstd, True))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"x": torch.zeros(2, 16, 4, 4, dtype=torch.float64)}, "x: dtype torch.float64"),
        ({"x": torch.zeros(2, 16, 4)}, r"x: shape \(2, 16, 4\), expected \(B, C, H, W\)"),
        ({"x": torch.zeros(0, 16, 4, 4)}, r"x: shape \(0, 16, 4, 4\) holds nothing"),
        ({"x": torch.zeros(2, 16, 0, 4)}, "holds nothing"),
        ({"x": torch.zeros(2, 12, 4, 4)}, "12 channels in 4 groups"),
        ({"groups": 3}, "16 channels in 3 groups"),
        ({"weight": torch.ones(8)}, r"weight: shape \(8,\), expected \(C,\)"),
        ({"time": torch.zeros(1, 16)}, r"time: shape \(1, 16\), expected \(B, C\) = \(2, 16\)"),
    ],
)
def test_what_it_cannot_take_is_said_in_one_line(change, complaint):
    given = {"x": torch.zeros(2, 16, 4, 4), "weight": torch.ones(16), "bias": torch.zeros(16), "groups": 4}
    with pytest.raises(ValueError, match=complaint):
        group_norm_silu(**(given | {"eps": 1e-5} | change))


def test_tensors_of_two_devices_are_refused():
    with pytest.raises(ValueError, match="bias: on meta, but x is on cpu; bring them together"):
        require_alike(x=torch.zeros(1), time=None, bias=torch.zeros(1, device="meta"))
