"""What is said of samplers' errors: means over seeds, the order that they fall with, who is worth its evaluations.

Letters: B seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Row = Mapping[str, Any]
Floats = NDArray[np.float64]
RESAMPLES = 400  # of the seeds, for intervals
SWAP_NEAR = 600  # the timestep that swaps are made near to
WITHIN = 0.01  # "the cheapest within 1 %"


def errors_by_seed(x: Tensor, exact: Tensor) -> list[float]:
    """|x - exact| / |exact| of every seed."""
    apart, size = (x - exact).flatten(1).norm(dim=1), exact.flatten(1).norm(dim=1)
    return [float(error) for error in apart / size]


def mean_error(errors: Sequence[float]) -> float:
    """The root mean square over seeds."""
    return float(np.sqrt(np.mean(np.square(errors))))


def directions(swapped: Tensor, neutral: Tensor, true: Tensor) -> tuple[list[float], list[float]]:
    """Of swapped - neutral, a seed: the cosine to the true direction, and the length as a share of the true one's."""
    found, true = (swapped - neutral).flatten(1), true.flatten(1)
    cosine = torch.nn.functional.cosine_similarity(found, true, dim=1)
    return cosine.tolist(), (found.norm(dim=1) / true.norm(dim=1)).tolist()


def fitted_order(evaluations: Sequence[int], errors: Sequence[Sequence[float]]) -> tuple[float, float, float] | None:
    """The order that errors fall with, and its 95 % interval over seeds: least squares of log error on log evaluations.

    Seeds are drawn anew, the same ones at every number of evaluations. None: fewer than two numbers of evaluations, an
    error that is 0 or not finite.
    """
    table = np.array(errors, dtype=np.float64)  # (budgets, B)
    if len(set(evaluations)) < 2 or not np.isfinite(table).all() or not (table > 0).all():
        return None
    logs = np.log(np.array(evaluations, dtype=np.float64))
    weights = (logs - logs.mean()) / np.square(logs - logs.mean()).sum()
    order = -weights @ np.log(np.sqrt(np.square(table).mean(axis=1)))
    drawn = np.random.default_rng(0).integers(table.shape[1], size=(RESAMPLES, table.shape[1]))
    resampled = np.sqrt(np.square(table[:, drawn]).mean(axis=2))  # (budgets, RESAMPLES)
    low, high = np.quantile(-weights @ np.log(resampled), [0.025, 0.975])
    return float(order), float(low), float(high)


def fitted_orders(runs: Sequence[Row], errors: Mapping[str, str]) -> dict[str, float]:
    """NAME, NAME_low and NAME_high of every error that an order can be fitted to. errors: NAME -> which of by_seed."""
    orders: dict[str, float] = {}
    for name, error in errors.items():
        fit = fitted_order([row["evaluations"] for row in runs], [row["by_seed"][error] for row in runs])
        orders |= dict(zip((name, f"{name}_low", f"{name}_high"), fit, strict=True)) if fit else {}
    return orders


def ratio_interval(errors: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """How many times smaller `errors` are than `other`, and the 95 % interval; the same seeds, drawn together."""
    pair = np.array([errors, other], dtype=np.float64)
    drawn = np.random.default_rng(0).integers(pair.shape[1], size=(RESAMPLES, pair.shape[1]))
    means = np.sqrt(np.square(pair[:, drawn]).mean(axis=2))
    low, high = np.quantile(means[1] / means[0], [0.025, 0.975])
    return mean_error(other) / mean_error(errors), float(low), float(high)


def scored(rows: Sequence[Row]) -> list[Row]:
    """The rows that have an error, and a finite one: random samplers follow no flow, refused pairs have not run."""
    return [row for row in rows if row.get("error") is not None and math.isfinite(row["error"])]


def pareto(rows: Sequence[Row]) -> list[Row]:
    """Those that no other beats: fewer evaluations have a larger error. From few evaluations to many."""
    front: list[Row] = []
    for row in sorted(scored(rows), key=lambda row: (row["evaluations"], row["error"])):
        if not front or row["error"] < front[-1]["error"]:
            front.append(row)
    return front


def cheapest(rows: Sequence[Row], within: float = WITHIN) -> Row | None:
    """The fewest evaluations whose error is at most this; among equals the smallest error. None: there are none."""
    near = [row for row in scored(rows) if row["error"] <= within]
    return min(near, key=lambda row: (row["evaluations"], row["error"])) if near else None


# ---- a network's rows: guidance x sampler x spacing x budget ------------------------------------------


def slopes(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The observed order of every guidance x sampler x spacing, and its interval over seeds. See `fitted_order`."""
    orders = []
    rows = [row for row in rows if "by_seed" in row]
    for guidance, sampler, spacing in dict.fromkeys((row["guidance"], row["sampler"], row["spacing"]) for row in rows):
        runs = [r for r in rows if (r["guidance"], r["sampler"], r["spacing"]) == (guidance, sampler, spacing)]
        entry: dict[str, Any] = {"guidance": guidance, "sampler": sampler, "spacing": spacing}
        entry |= fitted_orders(runs, {"order": "error", "swap_order": "swap_error"})
        orders += [entry] if "order" in entry else []
    return orders


def paired(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For every guidance and budget how many times smaller the best pair's error is than each other's, seed by seed."""
    found = []
    rows = [row for row in scored(rows) if "by_seed" in row]
    for guidance, budget in dict.fromkeys((row["guidance"], row["budget"]) for row in rows):
        here = [row for row in rows if (row["guidance"], row["budget"]) == (guidance, budget)]
        best = min(here, key=lambda row: row["error"])
        for row in here:
            ratio, low, high = ratio_interval(best["by_seed"]["error"], row["by_seed"]["error"])
            case = {"guidance": guidance, "budget": budget, "sampler": row["sampler"], "spacing": row["spacing"]}
            against = {"best_sampler": best["sampler"], "best_spacing": best["spacing"]}
            found.append({**case, **against, "ratio": ratio, "low": low, "high": high})
    return found


def best_spacing(rows: Sequence[Mapping[str, Any]], sampler: str, budget: int, guidance: float) -> str:
    """The spacing with the smallest error; "trailing" for a sampler that has none."""
    runs = [r for r in scored(rows) if (r["sampler"], r["budget"], r["guidance"]) == (sampler, budget, guidance)]
    return min(runs, key=lambda row: row["error"])["spacing"] if runs else "trailing"
