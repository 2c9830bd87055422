"""Edits against the truth: images small enough to score by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from ldm.study.metrics import ground_truth

EXAMPLES = settings(max_examples=40)


def images(count, seed=0, size=6):
    return np.random.default_rng(seed).uniform(-1, 1, (count, 3, size, size))


def corner(count, size=6):
    """Masks of the upper left quarter."""
    mask = np.zeros((count, size, size), bool)
    mask[:, : size // 2, : size // 2] = True
    return mask


# ---- skill -----------------------------------------------------------------------------------------


@EXAMPLES
@given(share=st.floats(-1, 1))
def test_skill_is_the_share_of_the_way(share):
    original, truth = images(2), images(2, seed=1)
    edited = original + share * (truth - original)
    # |1 - share| of the way is left.
    np.testing.assert_allclose(ground_truth.skill(edited, truth, original), share, atol=1e-12)


def test_skill_at_its_ends():
    original, truth = images(1), images(1, seed=1)
    assert ground_truth.skill(truth, truth, original).tolist() == [1]
    assert ground_truth.skill(original, truth, original).tolist() == [0]
    assert ground_truth.skill(2 * original - truth, truth, original)[0] == pytest.approx(-1)
    assert math.isnan(ground_truth.skill(truth, original, original)[0])


def test_skill_does_not_depend_on_the_scale_of_the_values():
    edited, truth, original = images(2), images(2, seed=1), images(2, seed=2)
    in_bytes = [(x + 1) * 127.5 for x in (edited, truth, original)]
    np.testing.assert_allclose(ground_truth.skill(*in_bytes), ground_truth.skill(edited, truth, original), atol=1e-12)


def test_tensors_are_taken_too():
    edited, truth, original = images(2), images(2, seed=1), images(2, seed=2)
    tensors = [torch.from_numpy(x) for x in (edited, truth, original)]
    np.testing.assert_array_equal(ground_truth.skill(*tensors), ground_truth.skill(edited, truth, original))


# ---- leakage ---------------------------------------------------------------------------------------


def test_leakage_by_hand():
    original = np.zeros((3, 3, 6, 6))
    edited = original.copy()
    edited[0, :, 0, 0] = 1  # inside: 3
    edited[0, 0, 5, 5] = -1  # outside: 1
    edited[1, 1, 2, 2] = 0.5  # inside only
    np.testing.assert_array_equal(ground_truth.leakage(edited, original, corner(3)), [1 / 4, 0, np.nan])


def test_dilation_widens_sideways_and_diagonally():
    mask = np.zeros((2, 7, 7), bool)
    mask[0, 3, 3] = True
    for pixels in (0, 1, 2, 3):
        found = ground_truth.dilated(mask, pixels)
        expected = np.zeros((7, 7), bool)
        expected[3 - pixels : 4 + pixels, 3 - pixels : 4 + pixels] = True
        np.testing.assert_array_equal(found[0], expected)
        assert not found[1].any()  # the neighbour in the batch is another image


@EXAMPLES
@given(seed=st.integers(0, 1000))
def test_leakage_is_a_share_and_falls_with_dilation(seed):
    rng = np.random.default_rng(seed)
    original, edited, mask = images(3, seed), images(3, seed + 1), rng.random((3, 6, 6)) < 0.1
    values = [ground_truth.leakage(edited, original, mask, dilate) for dilate in (0, 1, 2, 6)]
    for less, more in zip(values[1:], values[:-1], strict=True):
        assert (less <= more).all()
    assert (values[0] <= 1).all()
    assert (values[3][mask.any(axis=(1, 2))] == 0).all()
    np.testing.assert_allclose(values[0] + ground_truth.leakage(edited, original, ~mask), 1, atol=1e-12)


# ---- identity --------------------------------------------------------------------------------------


def test_a_patient_is_nearest_to_himself_whatever_happens_inside_the_mask():
    (original, *others), mask = images(5), corner(1)[0]
    edited = np.where(mask, images(3, seed=1) * 100, original)
    assert ground_truth.identity_hits(edited, original, others, mask).all()


def test_equally_near_is_a_hit():
    original, other = np.zeros((3, 6, 6)), np.zeros((1, 3, 6, 6))
    other[0, :, 0, 0] = 1  # the two differ in one pixel only
    edited = np.full((2, 3, 6, 6), 0.5)
    edited[1, :, 0, 0] = 0.51  # a little nearer to the other
    mask = np.zeros((6, 6), bool)
    assert ground_truth.identity_hits(edited, original, other, mask).tolist() == [True, False]
    mask[0, 0] = True  # where they differ does not count
    assert ground_truth.identity_hits(edited, original, other, mask).tolist() == [True, True]


def test_another_patient_is_a_miss():
    own, *others = images(4)
    assert not ground_truth.identity_hits(others, own, others, np.zeros((6, 6), bool)).any()


def test_identity_agrees_with_plain_loops():
    own, *others = images(12)
    edited = own + 6 * images(12, seed=1)  # so that some are lost
    mask = np.random.default_rng(2).random((6, 6)) < 0.3
    expected = []
    for image in edited:
        distances = []
        for original in (own, *others):
            total = 0.0
            for y in range(6):
                for x in range(6):
                    if not mask[y, x]:
                        total += sum((image[c, y, x] - original[c, y, x]) ** 2 for c in range(3))
            distances.append(total)
        expected.append(min(range(12), key=distances.__getitem__) == 0)
    assert 0 < sum(expected) < 12
    assert ground_truth.identity_hits(edited, own, others, mask).tolist() == expected


# ---- oracle, strength, ceiling ---------------------------------------------------------------------


def test_the_oracle_names_the_nearest_rendering():
    without, with_it = images(3), images(3, seed=1)
    edited = np.stack([without[0], with_it[1], 0.4 * without[2] + 0.6 * with_it[2]])
    renderings = np.stack([without, with_it], axis=1)
    assert ground_truth.oracle_class(edited, renderings).tolist() == [0, 1, 1]


def test_an_earlier_swap_is_a_stronger_edit():
    rows = [
        [0.9, 0.5, 0.1],  # falls with s: 1
        [0.1, 0.5, 0.9],  # -1
        [0.5, 0.9, 0.1],  # ranks 2 3 1 against 3 2 1: 1 - 6 * 2 / 24
        [0.5, 0.5, 0.5],  # nothing to rank
        [0.5, math.nan, 0.1],
    ]
    correlations = ground_truth.edit_strength_correlations(rows, [5, 10, 45])
    assert correlations.tolist() == pytest.approx([1, -1, 0.5, math.nan, math.nan], nan_ok=True)


def test_the_correlation_is_scipys_with_equal_values_too():
    rows = np.random.default_rng(4).integers(0, 5, (50, 9)) / 4
    correlations = ground_truth.edit_strength_correlations(rows, range(5, 50, 5)).tolist()
    assert correlations == pytest.approx([spearmanr(row, range(50, 5, -5)).statistic for row in rows])


@EXAMPLES
@given(order=st.permutations(range(4)))
def test_the_order_of_the_steps_does_not_matter(order):
    rows, steps = np.random.default_rng(3).random((5, 4)), np.array([5, 10, 25, 45])
    found = ground_truth.edit_strength_correlations(rows, steps)
    assert ground_truth.edit_strength_correlations(rows[:, order], steps[order]) == pytest.approx(found)


def test_share_of_ceiling():
    assert ground_truth.share_of_ceiling(0.9, 0.96) == pytest.approx(0.9375)
    assert ground_truth.share_of_ceiling(None, 0.9) is None
    assert ground_truth.share_of_ceiling(0.9, None) is None
    assert ground_truth.share_of_ceiling(0.9, 0.0) is None


# ---- what is refused -------------------------------------------------------------------------------

X, M = images(2), corner(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ground_truth.skill(X, X[:1], X), r"truth: expected \(2, 3, 6, 6\), as edited, got \(1, 3, 6, 6\)"),
        (lambda: ground_truth.skill(X[0], X[0], X[0]), r"edited: expected \(B, 3, H, W\)"),
        (lambda: ground_truth.leakage(X.transpose(0, 2, 3, 1), X, M), r"edited: expected \(B, 3, H, W\)"),
        (lambda: ground_truth.leakage(X, X, M[0]), r"mask: expected booleans \(2, 6, 6\)"),
        (lambda: ground_truth.leakage(X, X, M.astype(np.uint8) * 255), "mask: expected booleans .* uint8"),
        (lambda: ground_truth.leakage(X, X, M, -1), "dilate: expected 0 or more"),
        (lambda: ground_truth.identity_hits(X, X[0, :, 1:], X[:, :, 1:], M[0]), "original: expected .* as edited"),
        (lambda: ground_truth.identity_hits(X, X[0], X, M), "mask: expected booleans"),
        (lambda: ground_truth.oracle_class(X, X), "renderings: expected"),
        (lambda: ground_truth.edit_strength_correlations([[0.1, 0.2]], [5, 10, 15]), "target_probabilities: expected"),
        (lambda: ground_truth.edit_strength_correlations([[0.1]], [5]), "target_probabilities: expected"),
    ],
)
def test_other_shapes_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
