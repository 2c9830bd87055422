"""Directions and paths: right angles, lines and circles, whose cosines and curvatures are known."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ldm.study.metrics import directions, stats

EXAMPLES = settings(max_examples=40)
vectors = arrays(np.float64, (4, 2, 3), elements=st.integers(-5, 5))


# ---- eq. 4 -----------------------------------------------------------------------------------------


def test_cosines_by_hand():
    neutral = np.array([1.0, 1.0])
    swapped = neutral + np.array([[2, 0], [0, 3], [1, 1], [-4, 0], [0, 0]])
    half = math.sqrt(0.5)
    expected = [
        [1, 0, half, -1, math.nan],
        [0, 1, half, 0, math.nan],
        [half, half, 1, -half, math.nan],
        [-1, 0, -half, 1, math.nan],
        [math.nan] * 5,
    ]
    found = directions.cosine_matrix(neutral, swapped)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-15)  # one rounding


def test_cosines_of_float32_latents_are_taken_in_float64():
    rng = np.random.default_rng(0)
    neutral, swapped = rng.normal(size=(4, 8, 8)), rng.normal(size=(3, 4, 8, 8))
    z, z_s = torch.from_numpy(neutral).float(), torch.from_numpy(swapped).float()
    by_hand = [torch.dot((a - z).double().flatten(), (b - z).double().flatten()) for a in z_s for b in z_s]
    lengths = [(a - z).double().norm() for a in z_s]
    expected = np.array([float(x) for x in by_hand]).reshape(3, 3) / np.outer(lengths, lengths)
    # The differences above are rounded to float32 before they are widened.
    np.testing.assert_allclose(directions.cosine_matrix(z, z_s), expected, atol=1e-6)


@EXAMPLES
@given(points=vectors, scale=st.sampled_from([0.25, 3.0]), shift=st.integers(-3, 3))
def test_cosines_know_no_scale_and_no_origin(points, scale, shift):
    found = directions.cosine_matrix(points[0], points[1:])
    moved = directions.cosine_matrix(points[0] * scale + shift, points[1:] * scale + shift)
    np.testing.assert_allclose(moved, found, atol=1e-12)  # roundings of a dozen sums
    np.testing.assert_array_equal(found, found.T)
    diagonal = np.diagonal(found)
    np.testing.assert_allclose(diagonal[~np.isnan(diagonal)], 1, atol=1e-15)
    assert not (abs(found) > 1).any()


def test_cosines_refuse_other_shapes():
    with pytest.raises(ValueError, match="swapped: expected"):
        directions.cosine_matrix(np.zeros((4, 8)), np.zeros((3, 4, 9)))


def test_the_summary_has_the_papers_row():
    rng = np.random.default_rng(1)
    matrices = [directions.cosine_matrix(np.zeros(5), rng.normal(size=(3, 5))) for _ in range(30)]
    found = directions.cosine_summary(matrices, [45, 10, 5])
    assert (found["swap_steps"], found["n"], found["row"]["against"]) == ([45, 10, 5], 30, 45)
    np.testing.assert_allclose(found["mean"], np.mean(matrices, axis=0), atol=1e-14)
    np.testing.assert_allclose(found["row"]["value"], np.mean(matrices, axis=0)[:, 0], atol=1e-14)
    assert found["row"]["interval"][0] == pytest.approx([1, 1])
    for step in (1, 2):
        column = [matrix[step, 0] for matrix in matrices]
        assert found["row"]["interval"][step] == pytest.approx(stats.bootstrap_mean(column))
        low, high = found["low"][step][0], found["high"][step][0]
        assert [low, high] == found["row"]["interval"][step]
    json.dumps(found, allow_nan=False)


def test_the_summary_leaves_nan_out_of_its_cell_only():
    zero = directions.cosine_matrix(np.zeros(2), [[1, 0], [0, 0]])
    right = directions.cosine_matrix(np.zeros(2), [[1, 0], [0, 1]])
    found = directions.cosine_summary([zero, right], [45, 5])
    assert found["mean"] == [[1, 0], [0, 1]]
    nothing = directions.cosine_summary([zero], [45, 5])
    assert nothing["mean"] == [[1, None], [None, None]]
    assert nothing["row"]["interval"] == [[1, 1], [None, None]]


def test_the_summary_takes_the_latest_step_where_45_is_not_there():
    assert directions.cosine_summary(np.ones((1, 2, 2)), [5, 30])["row"]["against"] == 30


def test_the_summary_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"matrices: expected \(seeds, 2, 2\)"):
        directions.cosine_summary(np.ones((2, 2)), [5, 45])


# ---- paths -----------------------------------------------------------------------------------------


def test_a_line_scores_what_a_line_scores():
    u = np.array([0, 0.1, 0.5, 0.8, 1])[:, None, None]
    found = directions.path_geometry(3 + u * np.arange(6).reshape(2, 3))
    assert found.keys() == directions.STRAIGHT.keys()
    for measure, straight in directions.STRAIGHT.items():
        # Roundings of the points, seen from segments of a tenth of the path.
        assert found[measure] == pytest.approx(straight, abs=1e-13)


def test_a_corner_by_hand():
    found = directions.path_geometry([[0, 0], [3, 0], [3, 4]])
    assert found["arc_over_chord"] == pytest.approx(7 / 5)
    assert found["total_turning"] == pytest.approx(math.pi / 2)
    assert found["mean_curvature"] == found["max_curvature"] == pytest.approx(math.pi / 2 / 3.5)
    # Scatter about the mean (2, 4/3): xx 6, yy 32/3, xy 4; eigenvalues 25/3 +- sqrt((7/3)^2 + 16).
    reach = math.sqrt((7 / 3) ** 2 + 16)
    assert found["first_direction"] == pytest.approx((25 / 3 + reach) / (50 / 3))
    assert found["line_residual"] == pytest.approx(math.sqrt((25 / 3 - reach) / 3) / 5)


@pytest.mark.parametrize("radius", [1.0, 20.0])
def test_a_half_circle(radius):
    angle = np.linspace(0, math.pi, 201)
    found = directions.path_geometry(radius * np.stack([np.cos(angle), np.sin(angle), 0 * angle], axis=1))
    # A polygon of 200 sides is shorter and turns by a side less than the arc: by 1 / 24 (pi / 200)^2 and by 1 / 200.
    assert found["arc_over_chord"] == pytest.approx(math.pi / 2, rel=1e-4)
    assert found["total_turning"] == pytest.approx(math.pi * 199 / 200)
    assert found["mean_curvature"] == pytest.approx(1 / radius, rel=1e-4)
    assert found["max_curvature"] == pytest.approx(1 / radius, rel=1e-4)


def test_a_turn_back_is_a_turn_by_pi():
    assert directions.path_geometry([[0.0], [2.0], [1.0]])["total_turning"] == pytest.approx(math.pi)


@EXAMPLES
@given(points=vectors, scale=st.sampled_from([0.5, 4.0]))
def test_geometry_knows_no_origin_and_curvature_only_a_scale(points, scale):
    found = directions.path_geometry(points)
    moved = directions.path_geometry(points * scale + 2)
    for measure, value in found.items():
        expected = value / scale if measure.endswith("curvature") else value
        assert moved[measure] == pytest.approx(expected, abs=1e-7, nan_ok=True)  # the residual is a root of a rounding


@EXAMPLES
@given(points=vectors)
def test_geometry_backwards_is_the_same(points):
    assert directions.path_geometry(points[::-1]) == pytest.approx(
        directions.path_geometry(points), abs=1e-7, nan_ok=True
    )


def test_points_that_stand_still():
    still = directions.path_geometry(np.ones((3, 2)))
    assert all(math.isnan(value) for value in still.values())
    paused = directions.path_geometry([[0, 0], [3, 0], [3, 0], [3, 4]])
    assert paused["total_turning"] == pytest.approx(math.pi / 2)
    closed = directions.path_geometry([[0, 0], [1, 0], [0, 0]])
    assert math.isnan(closed["arc_over_chord"])
    assert closed["total_turning"] == pytest.approx(math.pi)
    assert math.isnan(directions.path_geometry([[0, 0], [1, 0]])["mean_curvature"])


def test_one_point_is_no_path():
    with pytest.raises(ValueError, match="points: expected two or more"):
        directions.path_geometry(np.ones((1, 4)))


# ---- the claim -------------------------------------------------------------------------------------


def test_a_walk_by_hand():
    """Three steps e1, e2, e3 of length 1: a chord of sqrt(3), two right angles."""
    found = directions.walk_geometry(4)
    assert found["arc_over_chord"] == pytest.approx(math.sqrt(3))
    assert found["total_turning"] == pytest.approx(math.pi)
    assert math.isnan(found["mean_curvature"])
    assert math.isnan(found["max_curvature"])
    # About the mean (3, 2, 1) / 4 the scatter has the eigenvalues 1 / (4 sin^2(pi k / 8)), k = 1, 2, 3; their sum 5/2.
    eigenvalues = [1 / (4 * math.sin(math.pi * k / 8) ** 2) for k in (1, 2, 3)]
    assert sum(eigenvalues) == pytest.approx(5 / 2)
    assert found["first_direction"] == pytest.approx(eigenvalues[0] / (5 / 2))
    assert found["line_residual"] == pytest.approx(math.sqrt(sum(eigenvalues[1:]) / 4 / 3))


@pytest.mark.parametrize("points", [3, 10, 400])
def test_the_first_direction_of_a_walk_is_its_closed_form(points):
    expected = 6 / (4 * math.sin(math.pi / (2 * points)) ** 2 * (points**2 - 1))
    assert directions.walk_geometry(points)["first_direction"] == pytest.approx(expected)
    assert directions.walk_geometry(400)["first_direction"] == pytest.approx(6 / math.pi**2, abs=1e-5)


def test_random_steps_in_many_dimensions_score_what_the_walk_scores():
    steps = np.random.default_rng(4).normal(size=(9, 200_000))
    found = directions.path_geometry(np.concatenate([np.zeros((1, 200_000)), steps.cumsum(axis=0)]))
    for measure, walk in directions.walk_geometry(10).items():
        if not math.isnan(walk):
            # Cosines of the steps scatter by 1 / sqrt(200,000) = 0.0022, and so do their lengths.
            assert found[measure] == pytest.approx(walk, rel=0.01)


def test_the_turning_of_a_walk_does_not_depend_on_the_lengths_of_its_steps():
    path = np.concatenate([np.zeros((1, 5)), np.cumsum(np.diag([5.0, 0.1, 1.0, 20.0, 3.0]), axis=0)])
    assert directions.path_geometry(path)["total_turning"] == pytest.approx(
        directions.walk_geometry(6)["total_turning"]
    )


def test_a_walk_of_one_point_is_refused():
    with pytest.raises(ValueError, match="points: expected two or more, got 1"):
        directions.walk_geometry(1)


def test_paths_that_a_line_would_do_for_are_lines():
    """A bow beside a line of the same length: sagging by a tenth it is a line, by a half it is none."""
    u = np.linspace(0, 1, 10)
    slight, deep = (directions.path_geometry(np.stack([u, 4 * sag * u * (1 - u)], axis=1)) for sag in (0.1, 0.5))
    assert 0.95 < slight["first_direction"] < 0.999  # far from exact, and yet one direction holds it
    assert deep["first_direction"] < 0.95
    found = directions.non_linearity([slight, slight, slight, deep], 10)["first_direction"]["departs"]
    assert found == {"below": 0.95, **stats.share([0, 0, 0, 1])}


def test_every_measure_has_both_references_and_an_interval():
    rng = np.random.default_rng(2)
    starts, ends = rng.normal(size=(2, 10, 64))
    u = np.linspace(0, 1, 10)[:, None]
    lines = [(a + u * (b - a)).astype(np.float32) for a, b in zip(starts, ends, strict=True)]
    straight = directions.non_linearity([directions.path_geometry(line) for line in lines], 10)
    assert straight["first_direction"]["departs"]["value"] == 0
    bent = [line + 5 * u * (1 - u) * rng.normal(size=64) for line in lines]
    curved = directions.non_linearity([directions.path_geometry(path) for path in bent], 10)
    assert curved["first_direction"]["departs"]["value"] == 1
    for measure, found in curved.items():
        assert found["n"] == 10
        assert found["straight"] == directions.STRAIGHT[measure]
        low, high = found["interval"]
        assert low < found["value"] < high
        assert not low <= directions.STRAIGHT[measure] <= high
        assert (found["walk"] is None) == measure.endswith("curvature")
        assert ("departs" in found) == (measure == "first_direction")
    assert curved["total_turning"]["walk"] == pytest.approx(8 * math.pi / 2)
    json.dumps(curved, allow_nan=False)


def test_seeds_without_a_path_are_left_out():
    still = directions.path_geometry(np.ones((3, 2)))
    corner = directions.path_geometry([[0, 0], [3, 0], [3, 4]])
    found = directions.non_linearity([still, corner], 3)
    assert (found["arc_over_chord"]["value"], found["arc_over_chord"]["n"]) == (pytest.approx(1.4), 1)
    assert found["first_direction"]["departs"]["n"] == 1
