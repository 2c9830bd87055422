"""Intervals: known values, and what must hold whatever the data."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm.study.metrics import stats


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # Newcombe 1998, table I, method 3 (Wilson without continuity correction), to the four decimals printed there.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_values(successes, n, low, high):
    assert stats.wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_ends_exactly_in_0_and_1():
    assert stats.wilson(0, 7)[0] == 0
    assert stats.wilson(7, 7)[1] == 1


def test_wilson_of_nothing_is_nan():
    assert all(math.isnan(end) for end in stats.wilson(0, 0))


@given(n=st.integers(1, 5000), data=st.data())
def test_wilson_holds_the_share_and_mirrors(n, data):
    successes = data.draw(st.integers(0, n))
    low, high = stats.wilson(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    mirrored = stats.wilson(n - successes, n)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)  # rounding of 1 - p


@pytest.mark.parametrize(("successes", "n", "confidence"), [(3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0), (1, 2, 95)])
def test_wilson_refuses_what_is_no_share(successes, n, confidence):
    with pytest.raises(ValueError, match="expected"):
        stats.wilson(successes, n, confidence)


def test_bootstrap_of_equal_values_has_no_width():
    assert stats.bootstrap_mean([0.25] * 9) == (0.25, 0.25)


def test_bootstrap_of_nothing_is_nan():
    assert all(math.isnan(end) for end in stats.bootstrap_mean([]))
    assert all(math.isnan(end) for end in stats.bootstrap_mean([math.nan, math.nan]))


def test_bootstrap_of_two_values_can_be_counted_by_hand():
    # Two draws of {0, 1} have the mean 0 in a quarter of cases, 1 in another: the outer 2.5 % are those.
    assert stats.bootstrap_mean([0.0, 1.0]) == (0.0, 1.0)


def test_bootstrap_approaches_the_normal_interval():
    values = np.random.default_rng(1).normal(size=2000)
    low, high = stats.bootstrap_mean(values)
    reach = 1.96 * values.std() / math.sqrt(len(values))
    # 2,000 resamples know a 2.5 % quantile to about 5 % of the half width.
    assert low == pytest.approx(values.mean() - reach, abs=0.15 * reach)
    assert high == pytest.approx(values.mean() + reach, abs=0.15 * reach)


def test_bootstrap_leaves_nan_out_and_repeats_itself():
    values = list(np.random.default_rng(4).random(20))
    assert stats.bootstrap_mean([*values, math.nan], seed=3) == stats.bootstrap_mean(values, seed=3)
    assert stats.bootstrap_mean(values, seed=3) != stats.bootstrap_mean(values, seed=4)


def test_bootstrap_refuses_a_matrix():
    with pytest.raises(ValueError, match=r"values: expected \(n,\), got \(2, 2\)"):
        stats.bootstrap_mean(np.zeros((2, 2)))


def test_bootstrap_of_many_cells_is_that_of_each_and_nan_is_left_out_by_cell():
    values = np.random.default_rng(2).random((12, 2, 3))
    values[:, 0, 0] = np.nan
    values[4, 1, 1] = np.nan
    low, high = stats.bootstrap_means(values)
    assert low.shape == high.shape == (2, 3)
    assert np.isnan(low[0, 0])
    assert np.isnan(high[0, 0])
    assert (low[1, 2], high[1, 2]) == stats.bootstrap_mean(values[:, 1, 2])
    assert low[1, 1] < np.nanmean(values[:, 1, 1]) < high[1, 1]


def test_paired_difference_of_a_constant_shift_is_certain():
    b = np.random.default_rng(5).random(30)
    found = stats.paired_cluster_bootstrap(b + 0.25, b, np.arange(30))
    assert found["value"] == pytest.approx(0.25)
    assert found["interval"] == pytest.approx([0.25, 0.25])  # pairing takes all spread of b away
    assert (found["clusters"], found["n"]) == (30, 30)


def test_paired_difference_by_hand_with_a_pair_missing():
    found = stats.paired_cluster_bootstrap([1, 1, 0, math.nan], [0, 1, 1, 0], [7, 7, 8, 9])
    assert found["value"] == 0  # (1 + 0 - 1) / 3
    assert (found["clusters"], found["n"]) == (2, 3)
    # Seed 7 twice: 2/4; seed 8 twice: -1; both: 0. The outer 2.5 % are the first two.
    assert found["interval"] == [-1.0, 0.5]


def test_rows_of_one_seed_are_not_independent():
    # Ten copies of every row add nothing: whole clusters are drawn.
    a, b = np.random.default_rng(6).random((2, 40))
    once = stats.paired_cluster_bootstrap(a, b, np.arange(40))
    tenfold = stats.paired_cluster_bootstrap(np.tile(a, 10), np.tile(b, 10), np.tile(np.arange(40), 10))
    assert tenfold["interval"] == pytest.approx(once["interval"])
    assert tenfold["clusters"] == 40


def test_paired_difference_of_nothing_is_null():
    found = stats.paired_cluster_bootstrap([math.nan], [1.0], ["a"])
    assert found == {"value": None, "interval": [None, None], "clusters": 0, "n": 0}


def test_paired_difference_refuses_other_lengths():
    with pytest.raises(ValueError, match=r"expected three vectors of one length"):
        stats.paired_cluster_bootstrap([1, 2], [1, 2], [1])


def test_share_and_mean_are_ready_for_json():
    assert stats.share([1, 0, math.nan, 1])["value"] == pytest.approx(2 / 3)
    assert stats.share([True, False])["interval"] == list(stats.wilson(1, 2))
    assert stats.share([math.nan]) == {"value": None, "n": 0, "interval": [None, None]}
    assert stats.mean([1.0, math.nan, 3.0]) == {
        "value": 2.0,
        "n": 2,
        "interval": list(stats.bootstrap_mean([1.0, 3.0])),
    }
    assert stats.mean([]) == {"value": None, "n": 0, "interval": [None, None]}
