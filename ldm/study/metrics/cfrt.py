"""CFRT, the classifier flip rate along a trajectory: does swapping in an attribute change that attribute most?

The paper's eq. 3 can be read in four ways, so all four are reported. For seed i, attribute A and its classifier k = A,
with p the classifiers' probabilities, x the neutral image, x'_(A,s) the one whose prompt was swapped at step s, and
d_k = mean over s of p_k(x'_(A,s)) - p_k(x):

    own_head_signed   d_A is strictly the largest of d_1 .. d_K                       (what the authors' code computes)
    own_head_abs      the same with |d_k|
    single_f          the classifier of A alone: its d on the swap to A is strictly the largest of its d on the
                      swaps to every attribute, signed                                (the symbols taken literally)
    strict            own_head_abs, and at every averaged s the class decision is that of the neutral image and no
                      other attribute crosses 1/2 in either direction                 (what the text intends)

A tie fails and is counted. A NaN among the numbers that a reading uses drops the seed from it, numerator and
denominator, and is counted. Interpolated samples are scored by the same functions, their frames standing for s.

Letters: n seeds, K classifiers ("heads"), A attributes swapped in, S swap steps or frames.
Source: TehraniNasab, Kumar, Arbel 2025, eq. 3 and Table 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ldm.names import nearest
from ldm.study.metrics import stats

READINGS = ("own_head_signed", "own_head_abs", "single_f", "strict")

# Two changes closer than this are a tie. Means of probabilities written in decimals differ by 1e-16 where they are
# equal; a classifier's float32 steps are 1e-8 where anyone would call it sure.
TIE = 1e-12

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class _Table:
    """The checked input, whole or cut to some of its swap steps."""

    neutral: Floats  # (n, K)
    swapped: Floats  # (n, A, S, K)
    heads: tuple[str, ...]
    attributes: tuple[str, ...]
    decision_neutral: NDArray[np.int64] | None  # (n,)
    decision_swapped: NDArray[np.int64] | None  # (n, A, S)

    def at(self, columns: Sequence[int]) -> _Table:
        decisions = None if self.decision_swapped is None else self.decision_swapped[:, :, columns]
        return replace(self, swapped=self.swapped[:, :, columns], decision_swapped=decisions)


@dataclass(frozen=True)
class _Outcome:
    """One reading of one attribute, seed by seed."""

    success: Floats  # (n,) 1, 0, or NaN where the reading has no verdict
    tie: NDArray[np.bool_]
    dropped: NDArray[np.bool_]  # for a NaN


def cfrt(
    neutral: ArrayLike,
    swapped: ArrayLike,
    heads: Sequence[str],
    attributes: Sequence[str],
    decision_neutral: ArrayLike | None = None,
    decision_swapped: ArrayLike | None = None,
    *,
    swap_steps: Sequence[int] | None = None,
    averaged: Sequence[int] | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Everything that the paper reports about attribute changes, and what it leaves out, with intervals.

    Args:    neutral: (n, K) probabilities on the neutral images.  swapped: (n, A, S, K) on the swapped ones.
             heads: the K classifiers' names.  attributes: the A attributes swapped in, each one of heads.
             decision_neutral, decision_swapped: (n,), (n, A, S), the class that each image is taken for, as integers or
             booleans; None: `strict` goes without.
             swap_steps: the S swap steps or frames; None: 0..S-1.  averaged: those that d is a mean over; None: all.
    Returns: attribute -> swap_steps (those averaged) and, each with value, n, interval where it has them:
             cfrt: reading -> also ties, dropped, chance;  flip_rate (mean p_A rises over 1/2), also already_present;
             target_change (mean d_A);  largest_off_target (the other attribute with the largest mean |d_k|);
             decision (the class is unchanged at every averaged s; None without decisions);  per_swap_step: the same of
             each step alone, as lists, with interval: name -> [low, high] of each step. None where there is no figure.
    Raises:  ValueError: one head only, shapes or names that do not fit, probabilities outside 0..1.
    """
    table = _checked(neutral, swapped, heads, attributes, decision_neutral, decision_swapped)
    steps, columns = _averaged_columns(table.swapped.shape[2], swap_steps, averaged)
    used = table.at(columns)
    each = [table.at([column]) for column in range(len(steps))]
    return {
        name: {
            "swap_steps": [steps[column] for column in columns],
            **_report(used, a, seed),
            "per_swap_step": {"swap_steps": steps, **_curves(each, a, seed)},
        }
        for a, name in enumerate(table.attributes)
    }


def successes(
    neutral: ArrayLike,
    swapped: ArrayLike,
    heads: Sequence[str],
    attributes: Sequence[str],
    decision_neutral: ArrayLike | None = None,
    decision_swapped: ArrayLike | None = None,
    *,
    swap_steps: Sequence[int] | None = None,
    averaged: Sequence[int] | None = None,
) -> dict[str, dict[str, Floats]]:
    """The verdict on every seed, to compare methods by `stats.paired_cluster_bootstrap`.

    Args, Raises: as `cfrt`.
    Returns: attribute -> reading -> (n,) of 1, 0, and NaN where the seed is dropped.
    """
    table = _checked(neutral, swapped, heads, attributes, decision_neutral, decision_swapped)
    _, columns = _averaged_columns(table.swapped.shape[2], swap_steps, averaged)
    used = table.at(columns)
    return {
        name: {reading: outcome.success for reading, outcome in _outcomes(used, a).items()}
        for a, name in enumerate(table.attributes)
    }


def find_name(argument: str, name: str, names: Sequence[str]) -> int:
    """Where a name is among names. Raises ValueError, offering the nearest, where it is not."""
    if name in names:
        return list(names).index(name)
    raise ValueError(f"{argument}: no {name!r} among {list(names)}{nearest(name, names)}")


# ---- one attribute ---------------------------------------------------------------------------------


def _changes(table: _Table, a: int) -> Floats:
    """d_k on the swaps to attribute a, (n, K)."""
    return (table.swapped[:, a] - table.neutral[:, None]).mean(axis=1)


def _outcomes(table: _Table, a: int) -> dict[str, _Outcome]:
    """All four readings of attribute a."""
    k = table.heads.index(table.attributes[a])
    change = _changes(table, a)
    own_head_abs = _strictly_largest(abs(change), k)
    one_head = table.swapped[:, :, :, k].mean(axis=2) - table.neutral[:, [k]]  # (n, A)
    kept = _unchanged_class(table, a) & ~_others_cross(table, a, k)
    strict = np.where(kept, own_head_abs.success, own_head_abs.success * 0)  # a NaN stays one
    return {
        "own_head_signed": _strictly_largest(change, k),
        "own_head_abs": own_head_abs,
        "single_f": _strictly_largest(one_head, a),
        "strict": replace(own_head_abs, success=strict),
    }


def _strictly_largest(values: Floats, target: int) -> _Outcome:
    """Whether values[:, target] exceeds every other column; no verdict where there is no other."""
    dropped = np.isnan(values.sum(axis=1))
    others = np.delete(values, target, axis=1)
    if others.shape[1] == 0:
        return _Outcome(np.full(len(values), np.nan), np.zeros(len(values), bool), dropped)
    margin = values[:, target] - others.max(axis=1)
    return _Outcome(np.where(dropped, np.nan, margin > TIE), abs(margin) <= TIE, dropped)


def _others_cross(table: _Table, a: int, k: int) -> NDArray[np.bool_]:
    """Whether any classifier but k changes its verdict at any swap step, (n,)."""
    before, after = table.neutral[:, None] >= 0.5, table.swapped[:, a] >= 0.5
    return np.delete(before != after, k, axis=2).any(axis=(1, 2))


def _unchanged_class(table: _Table, a: int) -> NDArray[np.bool_]:
    """Whether the class decision is the neutral image's at every swap step, (n,); true without decisions."""
    if table.decision_neutral is None or table.decision_swapped is None:
        return np.ones(len(table.neutral), bool)
    return (table.decision_swapped[:, a] == table.decision_neutral[:, None]).all(axis=1)


def _report(table: _Table, a: int, seed: int) -> dict[str, Any]:
    k = table.heads.index(table.attributes[a])
    rivals = {**dict.fromkeys(READINGS, len(table.heads)), "single_f": len(table.attributes)}
    readings = {
        reading: {
            **stats.share(outcome.success),
            "ties": int(outcome.tie.sum()),
            "dropped": int(outcome.dropped.sum()),
            "chance": 1 / rivals[reading] if rivals[reading] > 1 else None,
        }
        for reading, outcome in _outcomes(table, a).items()
    }
    change = _changes(table, a)
    flips = _flips(table, a)
    return {
        "cfrt": readings,
        "flip_rate": {**stats.share(flips), "already_present": int((table.neutral[~np.isnan(flips), k] >= 0.5).sum())},
        "target_change": stats.mean(change[:, k], seed=seed),
        "largest_off_target": _largest_off_target(table.heads, change, k),
        "decision": None if table.decision_neutral is None else stats.share(_unchanged_class(table, a)),
    }


def _flips(table: _Table, a: int) -> Floats:
    """Whether the target's probability rises across 1/2, (n,): 1, 0, or NaN."""
    k = table.heads.index(table.attributes[a])
    before, after = table.neutral[:, k], table.swapped[:, a, :, k].mean(axis=1)
    return np.where(np.isnan(before + after), np.nan, (before < 0.5) & (after >= 0.5))


def _largest_off_target(heads: tuple[str, ...], change: Floats, k: int) -> dict[str, Any]:
    """The classifier other than k that changes most, by its mean |d| over the seeds; signs must not cancel a leak."""
    complete = change[~np.isnan(change).any(axis=1)]
    if len(complete) == 0:
        return {"attribute": None, "value": None}
    size = abs(complete).mean(axis=0)
    size[k] = -1
    return {"attribute": heads[int(size.argmax())], "value": float(size.max())}


def _curves(each: Sequence[_Table], a: int, seed: int) -> dict[str, Any]:
    """The figures of every swap step alone, and the intervals of all that are shares or means."""
    k = each[0].heads.index(each[0].attributes[a])
    changes = [_changes(table, a) for table in each]
    outcomes = [_outcomes(table, a) for table in each]
    shares = {reading: [stats.share(outcome[reading].success) for outcome in outcomes] for reading in READINGS}
    shares["flip_rate"] = [stats.share(_flips(table, a)) for table in each]
    on_target = np.stack([change[:, k] for change in changes], axis=1)
    low, high = stats.bootstrap_means(on_target, seed=seed)  # a resample serves all steps: it is the costly part
    return {
        **{name: [share["value"] for share in steps] for name, steps in shares.items()},
        "target_change": [_mean(column) for column in on_target.T],
        "off_target": [_largest_off_target(each[0].heads, change, k)["value"] for change in changes],
        "interval": {
            **{name: [share["interval"] for share in steps] for name, steps in shares.items()},
            "target_change": [[stats.or_none(end) for end in ends] for ends in zip(low, high, strict=True)],
        },
    }


def _mean(values: Floats) -> float | None:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else None


# ---- what may come in ------------------------------------------------------------------------------


def _checked(
    neutral: ArrayLike,
    swapped: ArrayLike,
    heads: Sequence[str],
    attributes: Sequence[str],
    decision_neutral: ArrayLike | None,
    decision_swapped: ArrayLike | None,
) -> _Table:
    p0, p = np.asarray(neutral, np.float64), np.asarray(swapped, np.float64)
    for name, names in (("heads", heads), ("attributes", attributes)):
        if not names or len(set(names)) != len(names):
            raise ValueError(f"{name}: expected names, each once, got {list(names)}")
    if len(heads) < 2:
        raise ValueError(f"heads: CFRT compares classifiers, expected two or more, got only {list(heads)}")
    for attribute in attributes:
        find_name("attributes", attribute, heads)
    n, K, A = len(p0), len(heads), len(attributes)
    if p0.shape != (n, K):
        raise ValueError(f"neutral: expected (seeds, {K} heads), got {p0.shape}")
    if p.ndim != 4 or p.shape != (n, A, p.shape[2], K) or p.shape[2] == 0:
        raise ValueError(f"swapped: expected ({n} seeds, {A} attributes, swap steps, {K} heads), got {p.shape}")
    for name, values in (("neutral", p0), ("swapped", p)):
        if ((values < 0) | (values > 1)).any():
            worst = values[(values < 0) | (values > 1)][0]
            raise ValueError(f"{name}: expected probabilities in 0..1 or NaN, got {worst:g}")
    if (decision_neutral is None) != (decision_swapped is None):
        raise ValueError("decision_neutral, decision_swapped: expected both or neither")
    d0 = _decisions("decision_neutral", decision_neutral, (n,))
    d = _decisions("decision_swapped", decision_swapped, p.shape[:3])
    return _Table(p0, p, tuple(heads), tuple(attributes), d0, d)


def _decisions(name: str, decisions: ArrayLike | None, shape: tuple[int, ...]) -> NDArray[np.int64] | None:
    if decisions is None:
        return None
    array = np.asarray(decisions)
    if array.shape != shape or array.dtype.kind not in "biu":
        raise ValueError(f"{name}: expected {shape} classes as integers or booleans, got {array.shape} {array.dtype}")
    return array.astype(np.int64)


def _averaged_columns(
    count: int, swap_steps: Sequence[int] | None, averaged: Sequence[int] | None
) -> tuple[list[int], list[int]]:
    """The steps' names, and which columns are averaged."""
    steps = list(range(count)) if swap_steps is None else [int(step) for step in swap_steps]
    if len(steps) != count or len(set(steps)) != count:
        raise ValueError(f"swap_steps: expected {count} different steps, one for each in swapped, got {steps}")
    wanted = steps if averaged is None else list(averaged)
    if not wanted or len(set(wanted)) != len(wanted) or not set(wanted) <= set(steps):
        raise ValueError(f"averaged: expected some of the swap steps {steps}, each once, got {wanted}")
    return steps, [steps.index(step) for step in wanted]
