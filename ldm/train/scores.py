"""How well a classifier does on images that it was not trained on. [paper, Table 1]

Letters: N images, K attributes.
"""

from collections.abc import Callable, Iterator, Sequence
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
        f1=_with_interval(lambda w: f1_score(truth, called, sample_weight=w, zero_division=0.0), weights),
        auroc=_with_interval(lambda w: roc_auc_score(truth, p, sample_weight=w), weights),
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


def _with_interval(metric: Callable[[NDArray[np.int64] | None], float], weights: list[NDArray[np.int64]]) -> Interval:
    """The metric of all images, and between which values 95 % of the bootstrap samples lie."""
    low, high = np.quantile([metric(w) for w in weights], [0.025, 0.975])
    return Interval(float(metric(None)), float(low), float(high))


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
