"""Does the direction of a swap depend on when it is made? Cosines of directions, and the shape of the path.

Beside the paper's row of cosines (eq. 4) stand the whole matrix, and measures of the path with two references: a
straight line, and a walk whose every step goes somewhere new.

Letters: n seeds, S swap steps, P points of a path; "..." is the shape of a latent, taken as one vector.
Sources: TehraniNasab, Kumar, Arbel 2025, eq. 4 and Figure 5; Antognini and Sohl-Dickstein 2018 (arXiv:1806.08805), on
the principal directions of walks in many dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ldm.study.metrics import stats

Floats = NDArray[np.float64]

# What a straight line scores.
STRAIGHT = {
    "arc_over_chord": 1.0,
    "total_turning": 0.0,
    "mean_curvature": 0.0,
    "max_curvature": 0.0,
    "line_residual": 0.0,
    "first_direction": 1.0,
}

# A path counts as a line where one direction holds 95 % of its points' variance: the share up to which principal
# components are commonly kept, and what is then lost is a twentieth. The other measures have no such limit: none is
# natural for a length or an angle, and rounding alone takes any path off their value of a line.
LINE_VARIANCE = 0.95


def cosine_matrix(neutral: ArrayLike, swapped: ArrayLike) -> Floats:
    """The cosine between every two swap directions z_s - z_neutral of one seed.

    cos(s, s') = <z_s - z, z_s' - z> / (|z_s - z| |z_s' - z|)                 [paper, eq. 4]

    Args:    neutral: (...) latent.  swapped: (S, ...).
    Returns: (S, S) float64; NaN where a direction has length 0.
    Raises:  ValueError: shapes that do not fit.
    """
    z, z_s = np.asarray(neutral, np.float64), np.asarray(swapped, np.float64)
    if z_s.ndim != z.ndim + 1 or z_s.shape[1:] != z.shape:
        raise ValueError(f"swapped: expected (swap steps, {z.shape}), got {z_s.shape}")
    directions = (z_s - z).reshape(len(z_s), -1)
    products = np.einsum("id,jd->ij", directions, directions)  # not a BLAS call: no sum depends on the threads
    lengths = np.sqrt(np.diagonal(products))
    with np.errstate(invalid="ignore"):
        cosines = products / (lengths[:, None] * lengths)
    # A product of lengths overshoots by a rounding.
    return np.clip(cosines, -1, 1)


def cosine_summary(
    matrices: ArrayLike, swap_steps: Sequence[int], *, reference: int = 45, seed: int = 0
) -> dict[str, Any]:
    """The mean of the seeds' cosine matrices, and of the row that the paper shows, with bootstrap intervals.

    Args:    matrices: (n, S, S) from `cosine_matrix`; a NaN is left out of its own cell.  swap_steps: the S steps.
             reference: the row's step; where it is not among the steps, the latest is taken.
    Returns: swap_steps, n, mean, low, high (S x S), and row: against, value (S), interval (S x 2); ready for JSON.
    Raises:  ValueError: shapes that do not fit.
    """
    values, steps = np.asarray(matrices, np.float64), [int(step) for step in swap_steps]
    if values.ndim != 3 or values.shape[1:] != (len(steps), len(steps)):
        raise ValueError(f"matrices: expected (seeds, {len(steps)}, {len(steps)}), got {values.shape}")
    against = reference if reference in steps else max(steps)
    low, high = stats.bootstrap_means(values, seed=seed)
    average = _nanmean(values)
    column = steps.index(against)
    interval = np.stack([low[:, column], high[:, column]], axis=-1)
    return {
        "swap_steps": steps,
        "n": len(values),
        "mean": _rows(average),
        "low": _rows(low),
        "high": _rows(high),
        "row": {"against": against, "value": _rows(average[:, [column]].T)[0], "interval": _rows(interval)},
    }


def path_geometry(points: ArrayLike) -> dict[str, float]:
    """How far a path of one seed is from a straight line.

    arc_over_chord    length of the polygon over the distance between its ends; 1 for a line
    total_turning     sum of the angles between consecutive segments, in radians
    mean_curvature    total_turning over the length that turns, in radians per unit of the latent
    max_curvature     the largest angle over the mean length of its two segments
    line_residual     root mean square distance from the best (least squares) line, over the chord
    first_direction   share of the points' variance along their first principal direction; 1 for a line

    Args:    points: (P, ...) in order.
    Returns: the six; NaN where a path has no length, no chord, or (turning, curvature) no corner.
    Raises:  ValueError: fewer than two points, or NaN or Inf in them.
    """
    path = np.asarray(points, np.float64)
    if path.ndim == 0 or len(path) < 2:
        raise ValueError(f"points: expected two or more, got shape {path.shape}")
    if not np.isfinite(path).all():
        raise ValueError("points: got NaN or Inf in them, expected finite latents; the run that they are of was broken")
    path = path.reshape(len(path), -1)
    segments = np.diff(path, axis=0)
    lengths = np.linalg.norm(segments, axis=1)
    segments, lengths = segments[lengths > 0], lengths[lengths > 0]
    chord = np.linalg.norm(path[-1] - path[0])
    spread = np.linalg.svd(path - path.mean(axis=0), compute_uv=False) ** 2  # per principal direction
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "arc_over_chord": _finite(lengths.sum() / chord),
            **_turning(segments, lengths),
            "line_residual": _finite(np.sqrt(spread[1:].sum() / len(path)) / chord),
            "first_direction": _finite(spread[0] / spread.sum()),
        }


def walk_geometry(points: int) -> dict[str, float]:
    """What a walk scores whose equal steps are all at right angles, as random steps in many dimensions very nearly are.

    first_direction = 6 / (4 sin^2(pi / 2P) (P^2 - 1)), falling to 6 / pi^2 = 0.61             [Antognini 2018]

    Returns: the six of `path_geometry`; the curvatures are NaN, since such a walk has no scale.
    Raises:  ValueError: fewer than two points.
    """
    if points < 2:
        raise ValueError(f"points: expected two or more, got {points}")
    walk = np.tri(points, points - 1, -1)  # one step further along another axis in every row
    return path_geometry(walk) | {"mean_curvature": np.nan, "max_curvature": np.nan}


def non_linearity(
    geometries: Sequence[Mapping[str, float]], points: int, *, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """The paper's claim that trajectories are not lines, tested over seeds.

    Args:    geometries: one `path_geometry` a seed.  points: P of every path.
    Returns: measure -> straight (what a line scores), walk (what `walk_geometry` does), value, n, interval of the mean;
             first_direction also has departs: value, n, interval of the share of seeds below `LINE_VARIANCE`.
    """
    walk = walk_geometry(points)
    report: dict[str, dict[str, Any]] = {}
    for measure, straight in STRAIGHT.items():
        values = [geometry[measure] for geometry in geometries]
        references = {"straight": straight, "walk": stats.or_none(walk[measure])}
        report[measure] = {**references, **stats.mean(values, seed=seed)}
    along = np.array([geometry["first_direction"] for geometry in geometries], np.float64)
    departs = np.where(np.isnan(along), np.nan, along < LINE_VARIANCE)
    report["first_direction"]["departs"] = {"below": LINE_VARIANCE, **stats.share(departs)}
    return report


def _turning(segments: Floats, lengths: Floats) -> dict[str, float]:
    if len(segments) < 2:
        return {"total_turning": np.nan, "mean_curvature": np.nan, "max_curvature": np.nan}
    units = segments / lengths[:, None]
    before, after = units[:-1], units[1:]
    # Twice the angle of a rhombus' half; unlike arccos it is exact for small angles.
    angles = 2 * np.arctan2(np.linalg.norm(after - before, axis=1), np.linalg.norm(after + before, axis=1))
    corner_lengths = (lengths[:-1] + lengths[1:]) / 2
    return {
        "total_turning": float(angles.sum()),
        "mean_curvature": float(angles.sum() / corner_lengths.sum()),
        "max_curvature": float((angles / corner_lengths).max()),
    }


def _nanmean(values: Floats) -> Floats:
    valid = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(valid, values, 0).sum(axis=0) / valid.sum(axis=0)


def _rows(matrix: Floats) -> list[list[float | None]]:
    return [[stats.or_none(cell) for cell in row] for row in matrix]


def _finite(x: float) -> float:
    return float(x) if np.isfinite(x) else np.nan
