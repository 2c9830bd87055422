"""Bezier curves: end points, invariances, other formulas for the same curve, and lengths with a closed form."""

import math

import pytest
import torch
from torch import Tensor

from ldm.traversal import bezier

U50 = torch.linspace(0, 1, 50)
DEGREES = [0, 1, 2, 3, 9, 30, 200]


def points(degree: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(degree + 1, *shape, generator=torch.Generator().manual_seed(degree), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("degree", DEGREES)
def test_the_ends_are_the_end_points_exactly(degree, dtype):
    control_points = points(degree, 4, 8, 8, dtype=dtype)
    curve = bezier.evaluate(control_points, U50)
    assert curve.shape == (50, 4, 8, 8)
    assert curve.dtype == dtype
    assert torch.equal(curve[0], control_points[0])
    assert torch.equal(curve[-1], control_points[-1])


@pytest.mark.parametrize("degree", [1, 2, 9, 20])
def test_bernstein_is_its_definition(degree):
    u = torch.linspace(0, 1, 11, dtype=torch.float64)
    expected = [math.comb(degree, i) * u**i * (1 - u) ** (degree - i) for i in range(degree + 1)]
    torch.testing.assert_close(bezier.bernstein(degree, u), torch.stack(expected, dim=1), rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("degree", [0, 1, 9, 100, 2000])
def test_bernstein_is_a_partition_of_unity_at_any_degree(degree):
    basis = bezier.bernstein(degree, U50)
    assert basis.shape == (50, degree + 1)
    assert (basis >= 0).all()
    torch.testing.assert_close(basis.sum(1), torch.ones(50, dtype=torch.float64), rtol=0, atol=1e-12)


def test_affine_invariance():
    control_points, u = points(9, 3), torch.rand(20, dtype=torch.float64)
    matrix, shift = points(2, 3), points(0, 3)
    moved = bezier.evaluate(control_points @ matrix + shift, u)
    torch.testing.assert_close(moved, bezier.evaluate(control_points, u) @ matrix + shift)


def test_reversing_the_points_reverses_the_curve():
    control_points = points(9, 3)
    forward, backward = bezier.evaluate(control_points, U50), bezier.evaluate(control_points.flip(0), (1 - U50))
    torch.testing.assert_close(forward, backward, rtol=1e-6, atol=1e-6)  # 1 - u rounds in float32


def test_evenly_spaced_points_on_a_line_give_the_line():
    start, end = points(1, 4, 8, 8)
    control_points = torch.stack([torch.lerp(start, end, i / 9) for i in range(10)])
    expected = torch.stack([torch.lerp(start, end, float(u)) for u in U50])
    torch.testing.assert_close(bezier.evaluate(control_points, U50), expected)


def test_the_curve_stays_in_the_hull():
    curve = bezier.evaluate(points(9, 1000), U50)
    assert (curve <= points(9, 1000).max(0).values + 1e-12).all()
    assert (curve >= points(9, 1000).min(0).values - 1e-12).all()


def test_float32_is_within_the_roundings_promised():
    exact, rounded = points(9, 4, 64, 64), points(9, 4, 64, 64).float()
    error = (bezier.evaluate(rounded, U50) - bezier.evaluate(rounded.double(), U50)).abs().max()
    assert error <= (9 + 2) * 2**-24 * exact.abs().max()


def test_a_batch_of_curves_is_the_curves_one_by_one():
    control_points = points(9, 3, 4, 8, 8)
    together = bezier.evaluate(control_points, U50)
    for row in range(3):
        assert torch.equal(together[:, row], bezier.evaluate(control_points[:, row], U50))


def test_scalar_control_points_make_a_polynomial():
    torch.testing.assert_close(bezier.evaluate(torch.tensor([0.0, 0.0, 1.0]), U50), U50**2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bezier.evaluate(torch.zeros(0, 3), U50), r"control_points: expected .* got \(0, 3\)"),
        (lambda: bezier.evaluate(torch.zeros(3, dtype=torch.int64), U50), "control_points: expected floating-point"),
        (lambda: bezier.evaluate(torch.tensor(1.0), U50), "control_points: expected"),
        (lambda: bezier.evaluate(points(2, 3), torch.tensor([1.1])), r"u: expected a vector of values in \[0, 1\]"),
        (lambda: bezier.evaluate(points(2, 3), torch.tensor(0.5)), r"u: expected a vector .* got shape \(\)"),
        (lambda: bezier.evaluate(points(2, 3), torch.tensor([math.nan])), "u: expected a vector"),
        (lambda: bezier.bernstein(-1, U50), "n: expected a degree of 0 or more, got -1"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
