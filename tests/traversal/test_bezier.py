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


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("at", [0.0, 0.3, 1.0])
def test_split_cuts_one_curve_into_two(degree, at):
    control_points, u = points(degree, 5), torch.linspace(0, 1, 7, dtype=torch.float64)
    left, right = bezier.split(control_points, at)
    torch.testing.assert_close(bezier.evaluate(left, u), bezier.evaluate(control_points, at * u))
    torch.testing.assert_close(bezier.evaluate(right, u), bezier.evaluate(control_points, at + (1 - at) * u))
    assert torch.equal(left[-1], right[0])
    assert torch.equal(left[0], control_points[0])
    assert torch.equal(right[-1], control_points[-1])


@pytest.mark.parametrize("degree", [1, 2, 9])
def test_the_derivative_is_the_slope(degree):
    control_points, u, h = points(degree, 5), torch.linspace(0.1, 0.9, 9, dtype=torch.float64), 1e-5
    slope = (bezier.evaluate(control_points, u + h) - bezier.evaluate(control_points, u - h)) / (2 * h)
    torch.testing.assert_close(bezier.evaluate(bezier.derivative(control_points), u), slope, rtol=1e-6, atol=1e-6)


def test_a_point_stands_still():
    assert torch.equal(bezier.derivative(points(0, 5)), torch.zeros(1, 5, dtype=torch.float64))
    assert bezier.arc_length(points(0, 5), torch.ones(1)).item() == 0


def test_the_length_of_a_line_is_the_distance():
    control_points = points(1, 4, 8, 8)
    lengths = bezier.arc_length(control_points, torch.tensor([0, 0.25, 1], dtype=torch.float64))
    distance = (control_points[1] - control_points[0]).norm()
    torch.testing.assert_close(lengths, torch.tensor([0, 0.25, 1], dtype=torch.float64) * distance)


def test_the_length_of_a_parabola_has_a_closed_form():
    # (u, u^2): integral of sqrt(1 + 4 u^2).
    control_points = torch.tensor([[0.0, 0.0], [0.5, 0.0], [1.0, 1.0]])
    u = torch.tensor([0.3, 1.0], dtype=torch.float64)
    expected = u / 2 * (1 + 4 * u**2).sqrt() + torch.asinh(2 * u) / 4
    torch.testing.assert_close(bezier.arc_length(control_points, u), expected, rtol=1e-12, atol=0)


def test_length_adds_up_and_chords_are_shorter():
    control_points = points(9, 4, 8, 8)
    whole = bezier.arc_length(control_points, torch.ones(1))
    halves = [bezier.arc_length(part, torch.ones(1)) for part in bezier.split(control_points, 0.4)]
    torch.testing.assert_close(halves[0] + halves[1], whole, rtol=1e-10, atol=0)
    torch.testing.assert_close(bezier.arc_length(control_points, torch.tensor([0.4]).double()), halves[0])
    chords = bezier.evaluate(control_points, torch.linspace(0, 1, 2000)).diff(dim=0).flatten(1).norm(dim=1).sum()
    assert 0.999 * whole < chords < whole


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
        (lambda: bezier.split(points(2, 3), 1.5), r"u: expected a value in \[0, 1\], got 1.5"),
        (lambda: bezier.arc_length(points(2, 3), torch.tensor([1.0001])), "u: expected a vector"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
