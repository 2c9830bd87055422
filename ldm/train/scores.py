"""How well a classifier does on images that it was not trained on. [paper, Table 1]

Letters: N images, K attributes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest
from sklearn.metrics import f1_score, roc_auc_score

BINS = 10  # of the reliability table


class Interval(NamedTuple):
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


class Bin(NamedTuple):
    """One row of a reliability table: what was claimed of some images, and what was so."""

    low: float  # the bin's edges: low <= probability < high, in the last bin <=
    high: float
    n: int
    claimed: float | None  # mean probability; None where n is 0
    observed: float | None  # share of positives


@dataclass(frozen=True)
class Score:
    """One attribute's row of Table 1."""

    attribute: str
    n: int  # images whose label is known
    positives: int
    accuracy: Interval
    f1: Interval
    auroc: Interval
    ece: float
    reliability: tuple[Bin, ...]


def scores(
    probabilities: NDArray[np.float32],
    labels: NDArray[np.float32],
    groups: NDArray[np.str_],
    attributes: Sequence[str],
    seed: int = 0,
    draws: int = 1000,
) -> list[Score]:
    """One row an attribute; an image is called positive from probability 1/2 on.

    Args:    probabilities, labels: (N, K); a label that is NaN is unknown, and left out.
             groups: (N,) the patient or lesion of each image.  seed, draws: of the bootstrap.
    Raises:  ValueError: for a NaN among the probabilities, or an attribute with one class only, which has no AUROC.
    """
    if bad := int((~np.isfinite(probabilities)).sum()):
        raise ValueError(f"probabilities: {bad} of {probabilities.size} are NaN or infinite, expected none")
    rows = []
    for k, name in enumerate(attributes):
        known = np.isfinite(labels[:, k])
        truth = labels[known, k] == 1
        if truth.all() or not truth.any():
            raise ValueError(
                f"attribute {name!r}: {int(truth.sum())} of {len(truth)} known labels are positive, expected some of "
                "both classes; use more images"
            )
        p = probabilities[known, k].astype(np.float64)
        rows.append(_score(name, p, truth, list(group_weights(groups[known], truth, seed, draws))))
    return rows


def _score(attribute: str, p: NDArray[np.float64], truth: NDArray[np.bool_], weights: list[NDArray[np.int64]]) -> Score:
    called = p >= 0.5
    right = int((called == truth).sum())
    wilson = binomtest(right, len(truth)).proportion_ci(method="wilson")
    bins = reliability(p, truth)
    return Score(
        attribute=attribute,
        n=len(truth),
        positives=int(truth.sum()),
        accuracy=Interval(right / len(truth), float(wilson.low), float(wilson.high)),
        f1=_interval(f1_score(truth, called), [weighted_f1(truth, called, w) for w in weights]),
        auroc=_interval(roc_auc_score(truth, p), weighted_auroc(truth, p, weights)),
        ece=expected_calibration_error(bins),
        reliability=bins,
    )


def group_weights(
    groups: NDArray[np.str_], truth: NDArray[np.bool_], seed: int, draws: int
) -> Iterator[NDArray[np.int64]]:
    """How often each image is in each bootstrap sample, (N,) a draw.

    Groups are drawn, not images: the images of one patient are alike, and drawing them one by one would make intervals
    too narrow. A sample without both classes has no AUROC and is left out.
    """
    _, group = np.unique(groups, return_inverse=True)
    count = int(group.max()) + 1
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        weights = np.bincount(rng.integers(count, size=count), minlength=count)[group]
        if weights[truth].any() and weights[~truth].any():
            yield weights


def _interval(value: float, drawn: Sequence[float]) -> Interval:
    """The value of all images, and between which values 95 % of the bootstrap samples lie."""
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(float(value), float(low), float(high))


def weighted_f1(truth: NDArray[np.bool_], called: NDArray[np.bool_], weights: NDArray[np.int64]) -> float:
    """F1 where image i counts weights[i] times: scikit-learn's, without its checks of every call."""
    hits = weights[truth & called].sum()
    return float(2 * hits / (weights[truth].sum() + weights[called].sum()))


def weighted_auroc(
    truth: NDArray[np.bool_], p: NDArray[np.float64], weights: Sequence[NDArray[np.int64]]
) -> list[float]:
    """AUROC where image i counts w[i] times, for each w: the share of pairs in order, a tie being half a pair.

    Scikit-learn's, but sorted once for all draws. [Hanley and McNeil 1982]
    """
    order = np.argsort(p, kind="stable")
    starts = np.flatnonzero(np.diff(p[order], prepend=-np.inf))  # of each run of equal probabilities
    values = []
    for w in weights:
        positive = np.add.reduceat((w * truth)[order], starts)
        negative = np.add.reduceat((w * ~truth)[order], starts)
        in_order = positive * (negative.cumsum() - 0.5 * negative)
        values.append(float(in_order.sum() / (positive.sum() * negative.sum())))
    return values


def reliability(p: NDArray[np.float64], truth: NDArray[np.bool_]) -> tuple[Bin, ...]:
    """Ten bins of equal width over [0, 1], each with its images' mean probability and share of positives."""
    place = np.minimum((p * BINS).astype(int), BINS - 1)
    rows = []
    for b in range(BINS):
        here = place == b
        n = int(here.sum())
        claimed, observed = (float(p[here].mean()), float(truth[here].mean())) if n else (None, None)
        rows.append(Bin(b / BINS, (b + 1) / BINS, n, claimed, observed))
    return tuple(rows)


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """Mean over the images of |claimed - observed| of their bin. [Guo et al. 2017, eq. 3]"""
    gaps = [
        row.n * abs(row.claimed - row.observed) for row in bins if row.claimed is not None and row.observed is not None
    ]
    return sum(gaps) / sum(row.n for row in bins)


def table(rows: Sequence[Score]) -> str:
    """Table 1 as Markdown, intervals in brackets."""
    lines = [
        "| attribute | n | positives | accuracy | F1 | AUROC | ECE |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        figures = (f"{x.value:.3f} [{x.low:.3f}, {x.high:.3f}]" for x in (row.accuracy, row.f1, row.auroc))
        lines.append(f"| {row.attribute} | {row.n} | {row.positives} | {' | '.join(figures)} | {row.ece:.3f} |")
    return "\n".join(lines)


def to_json(rows: Sequence[Score]) -> list[dict[str, object]]:
    """The rows as plain lists and dictionaries, intervals as [value, low, high]."""
    return [asdict(row) for row in rows]
