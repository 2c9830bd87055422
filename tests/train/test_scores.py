"""Scores of classifiers by hand."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import f1_score, roc_auc_score

from ldm.train import scores

NAN = float("nan")


def column(*values: float) -> NDArray[np.float32]:
    return np.array(values, np.float32)[:, None]


def test_scores_by_hand() -> None:
    """Ten images, one unknown. Called positive: .9 .8 .5 .6; true: .9 .8 .4 .5. Pairs in order: 4 * 5 - 2 of 20."""
    p = column(0.9, 0.8, 0.4, 0.5, 0.6, 0.1, 0.1, 0.2, 0.3, 0.99)
    labels = column(1, 1, 1, 1, 0, 0, 0, 0, 0, NAN)
    (row,) = scores.scores(p, labels, np.arange(10).astype(str), ("hair",), draws=200)
    assert (row.attribute, row.n, row.positives) == ("hair", 9, 4)
    assert row.accuracy.value == pytest.approx(7 / 9)
    assert row.f1.value == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    assert row.auroc.value == pytest.approx(18 / 20)
    # Wilson (1927) for 7 of 9, z = 1.96: (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
    z, n, share = 1.959964, 9, 7 / 9
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    expected = [(share + z * z / (2 * n) + sign * half) / (1 + z * z / n) for sign in (-1, 1)]
    assert row.accuracy[1:] == pytest.approx(expected, abs=1e-6)
    for x in (row.f1, row.auroc):
        assert 0 <= x.low <= x.value <= x.high <= 1
    assert row.f1.low < row.f1.high


def test_calibration_by_hand() -> None:
    """Two bins: four images at .25, one positive; two at 1.0, one positive. ECE = (4 * 0 + 2 * .5) / 6."""
    bins = scores.reliability(np.array([0.25] * 4 + [1.0] * 2), np.array([1, 0, 0, 0, 1, 0], bool))
    assert [row.n for row in bins] == [0, 0, 4, 0, 0, 0, 0, 0, 0, 2]
    assert bins[2] == pytest.approx((0.2, 0.3, 4, 0.25, 0.25))
    assert bins[9] == pytest.approx((0.9, 1.0, 2, 1.0, 0.5))
    assert scores.expected_calibration_error(bins) == pytest.approx(1 / 6)


def test_the_bootstrap_draws_groups() -> None:
    groups = np.array(["a", "a", "b", "c", "c", "c"])
    truth = np.array([1, 0, 1, 0, 1, 0], bool)
    drawn = list(scores.group_weights(groups, truth, seed=0, draws=50))
    assert all(w[0] == w[1] and w[3] == w[4] == w[5] for w in drawn)
    assert all(w[0] + w[2] + w[3] == 3 for w in drawn)
    assert all(w[truth].any() and w[~truth].any() for w in drawn)


def test_weights_count_images_as_often_as_repeating_them_does() -> None:
    """scikit-learn on the repeated images is the reference; probabilities of one decimal tie often."""
    rng = np.random.default_rng(0)
    p, truth, w = rng.random(60).round(1), rng.random(60) < 0.5, rng.integers(0, 4, 60)
    called, times = p >= 0.5, np.repeat(np.arange(60), w)
    assert scores.weighted_f1(truth, called, w) == pytest.approx(f1_score(truth[times], called[times]))
    assert scores.weighted_auroc(truth, p, [w])[0] == pytest.approx(roc_auc_score(truth[times], p[times]))


def test_images_of_one_group_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    p, labels = column(*rng.random(40)), column(*(rng.random(40) < 0.5))
    alone, eightfold = (
        scores.scores(np.repeat(p, k, 0), np.repeat(labels, k, 0), np.repeat(np.arange(40), k).astype(str), ("x",))[0]
        for k in (1, 8)
    )
    apart = scores.scores(np.repeat(p, 8, 0), np.repeat(labels, 8, 0), np.arange(320).astype(str), ("x",))[0]
    assert eightfold.auroc == pytest.approx(alone.auroc)
    assert apart.auroc.high - apart.auroc.low < 0.6 * (alone.auroc.high - alone.auroc.low)


def test_scores_refuse_what_has_no_score() -> None:
    groups = np.array(["a", "b"])
    with pytest.raises(ValueError, match="1 of 2 are NaN or infinite"):
        scores.scores(column(NAN, 0.5), column(0, 1), groups, ("ink",))
    with pytest.raises(ValueError, match="attribute 'ink': 0 of 2 known labels are positive"):
        scores.scores(column(0.1, 0.5), column(0, 0), groups, ("ink",))
