"""Intervals of shares and means over seeds, and of the difference between two methods.

A resample takes a seed with all that belongs to it, since images of one seed resemble each other. Nothing depends on
the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri

CONFIDENCE = 0.95
RESAMPLES = 2000

Floats = NDArray[np.float64]


def wilson(successes: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The Wilson score interval of a share, which stays within 0..1.  [Wilson 1927]

    (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n),  p = successes/n

    Returns: low, high; (nan, nan) for n = 0.
    Raises:  ValueError: successes outside 0..n, or confidence outside (0, 1).
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes: expected 0..n = {n}, got {successes}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a share between 0 and 1, got {confidence}")
    if n == 0:
        return math.nan, math.nan
    z, p = float(ndtri((1 + confidence) / 2)), successes / n
    centre = p + z**2 / (2 * n)
    reach = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = ((centre + side * reach) / (1 + z**2 / n) for side in (-1, 1))
    # At the ends the exact value is 0 or 1; rounding would miss it by a bit.
    return (0.0 if successes == 0 else low, 1.0 if successes == n else high)


def bootstrap_mean(values: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """The 95 % percentile interval of a mean over seeds.

    Args:    values: (n,); NaN are left out.
    Returns: low, high; (nan, nan) where no value is left.
    Raises:  ValueError: values is not a vector.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1:
        raise ValueError(f"values: expected (n,), got {values.shape}")
    low, high = bootstrap_means(values[~np.isnan(values)], seed=seed, resamples=resamples)
    return float(low), float(high)


def bootstrap_means(values: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES) -> tuple[Floats, Floats]:
    """The 95 % percentile intervals of many means over the same seeds, such as the cells of a matrix.

    Args:    values: (n, ...), the cells of every seed; a cell's mean leaves its NaN out.
    Returns: low, high: (...) each; NaN where a cell has no value.
    """
    values = np.asarray(values, np.float64)
    n, cells = len(values), values.shape[1:]
    if n == 0:
        return np.full(cells, np.nan), np.full(cells, np.nan)
    valid = (~np.isnan(values)).astype(np.float64)
    filled = np.where(np.isnan(values), 0, values)
    # einsum, unlike @, is no BLAS call, whose sums would depend on the number of threads.
    means = [
        _ratio(np.einsum("rn,n...->r...", times, filled), np.einsum("rn,n...->r...", times, valid))
        for times in _draws(n, resamples, seed)
    ]
    return _percentiles(np.concatenate(means))


def paired_cluster_bootstrap(
    a: ArrayLike, b: ArrayLike, clusters: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, Any]:
    """The mean of a - b over the same seeds, with its 95 % percentile interval: by how much one method exceeds another.

    Args:    a, b: (n,) one value a row; a row where either is NaN is left out.  clusters: (n,) the seed of each row.
    Returns: value, interval [low, high], clusters (how many are left), n (rows); None without rows.
    Raises:  ValueError: the three are not vectors of one length.
    """
    a, b, clusters = np.asarray(a, np.float64), np.asarray(b, np.float64), np.asarray(clusters)
    if not (a.ndim == 1 and a.shape == b.shape == clusters.shape):
        raise ValueError(
            f"a, b, clusters: expected three vectors of one length, got {a.shape} {b.shape} {clusters.shape}"
        )
    paired = ~np.isnan(a - b)
    difference = (a - b)[paired]
    names, cluster_of = np.unique(clusters[paired], return_inverse=True)
    sums, rows = np.bincount(cluster_of, difference), np.bincount(cluster_of)
    m = len(names)
    draws = _draws(m, resamples, seed) if m else ()
    means = [np.einsum("rm,m->r", times, sums) / np.einsum("rm,m->r", times, rows) for times in draws]
    low, high = _percentiles(np.concatenate(means)) if m else (math.nan, math.nan)
    return {
        "value": float(difference.mean()) if m else None,
        "interval": [or_none(float(low)), or_none(float(high))],
        "clusters": m,
        "n": len(difference),
    }


def share(successes: ArrayLike) -> dict[str, Any]:
    """A share with its Wilson interval, ready for JSON.

    Args:    successes: (n,) of 1 and 0, or booleans; NaN are left out.
    Returns: value, n, interval [low, high]; None instead of NaN.
    """
    successes = np.asarray(successes, np.float64)
    n, hits = int((~np.isnan(successes)).sum()), int(np.nansum(successes))
    return {"value": hits / n if n else None, "n": n, "interval": [or_none(end) for end in wilson(hits, n)]}


def mean(values: ArrayLike, *, seed: int = 0) -> dict[str, Any]:
    """A mean with its bootstrap interval, ready for JSON.

    Args:    values: (n,); NaN are left out.
    Returns: value, n, interval [low, high]; None instead of NaN.
    """
    array = np.asarray(values, np.float64)
    kept = array[~np.isnan(array)]
    interval = [or_none(end) for end in bootstrap_mean(kept, seed=seed)]
    return {"value": float(kept.mean()) if len(kept) else None, "n": len(kept), "interval": interval}


def or_none(x: float) -> float | None:
    """The number, or None for NaN, which JSON does not have."""
    return None if math.isnan(x) else float(x)


def _draws(n: int, resamples: int, seed: int) -> Iterator[Floats]:
    """Draws of n out of n with replacement: how often each is drawn, one row a resample, some 65,000 at a time."""
    rng = np.random.default_rng(seed)
    at_once = max(1, 65536 // n)
    for done in range(0, resamples, at_once):
        rows = min(at_once, resamples - done)
        drawn = rng.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def _ratio(sums: Floats, counts: Floats) -> Floats:
    with np.errstate(invalid="ignore"):  # 0 / 0: no value was drawn, NaN
        return sums / counts


def _percentiles(means: Floats) -> tuple[Floats, Floats]:
    """The middle 95 % of the resamples; where every one is NaN, NaN."""
    empty = np.isnan(means).all(axis=0)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(np.where(empty, 0.0, means), [tail, 1 - tail], axis=0)
    return np.where(empty, np.nan, low), np.where(empty, np.nan, high)
