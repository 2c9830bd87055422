"""CFRT from a table alone: classifier probabilities along one trajectory, as the authors of the paper publish them.

    swaps            seed,path,neutral_ink,5_ink,10_ink,...,45_ink,neutral_ruler,5_ruler,...
    interpolations   seed,disease,0_hairs,0_ink,1_hairs,1_ink,...,49_hairs,49_ink       frame 0 is the neutral image

One row a seed, one file the swaps to one attribute; the classifiers and the steps are found from the header, in any
order, and other columns are passed over. An empty cell, or what pandas takes for one (NaN, NA, null, None), is a
missing value.

Letters: n seeds, K classifiers, S swap steps or frames.
"""

from __future__ import annotations

import csv
import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm.study.metrics.cfrt import cfrt, find_name

# What the authors average over.
AVERAGED_SWAP_STEPS = (5, 10, 15)
AVERAGED_FRAMES = tuple(range(30, 50))

COLUMN = re.compile(r"(neutral|\d+)_(.+)")
MISSING = frozenset(("", "na", "n/a", "<na>", "null", "none"))  # and float() reads "nan"
SHOWN = 5  # of the faults in a file, this many are spelt out


@dataclass(frozen=True)
class Predictions:
    """The classifiers' probabilities along one trajectory of every seed."""

    seeds: tuple[int, ...]  # n, in the file's order
    attributes: tuple[str, ...]  # K, in the header's order
    steps: tuple[int, ...]  # S swap steps or frames, ascending
    neutral: NDArray[np.float64]  # (n, K); NaN: missing
    swapped: NDArray[np.float64]  # (n, S, K)
    interpolated: bool  # the steps are frames of a curve whose frame 0 is the neutral image


def read(*paths: Path | str) -> Predictions:
    """Read one table, or several with different classifiers on the same images.

    Returns: the classifiers of all files, with the seeds in the first file's order.
    Raises:  ValueError: a header that is not of this layout, rows that do not fit (named by line), files that do not
             fit together (a seed in one and missing in another, the same classifier twice, other steps).
             OSError: a file that cannot be read.
    """
    if not paths:
        raise ValueError("paths: expected at least one table of predictions")
    tables = [_read(Path(path)) for path in paths]
    first = tables[0]
    for path, table in zip(paths[1:], tables[1:], strict=True):
        _check_fit(str(paths[0]), first, str(path), table)
        first = _beside(first, table)
    return first


def report(
    predictions: Predictions, attribute: str, swap_steps: Sequence[int] | None = None, *, seed: int = 0
) -> dict[str, Any]:
    """What `cfrt` reports, for the attribute that this trajectory swaps in.

    There are no images of other prompts here, so `single_f` is null, and no class, so `strict` goes without.

    Args:    attribute: one of predictions.attributes.
             swap_steps: those averaged; None: the authors' choice, 5, 10, 15, or frames 30 to 49 of interpolations.
    Returns: cfrt -> reading -> value, n, ties, dropped, interval, chance; the rest as `ldm.study.metrics.cfrt.cfrt`.
    Raises:  ValueError: an attribute or a step that the table has not, or a table of one attribute only.
    """
    find_name("attribute", attribute, predictions.attributes)
    usual = AVERAGED_FRAMES if predictions.interpolated else AVERAGED_SWAP_STEPS
    averaged = usual if swap_steps is None else tuple(swap_steps)
    if missing := [step for step in averaged if step not in predictions.steps]:
        raise ValueError(f"swap steps: the table has {list(predictions.steps)}, not {missing}")
    reports = cfrt(
        predictions.neutral,
        predictions.swapped[:, None],
        predictions.attributes,
        [attribute],
        swap_steps=predictions.steps,
        averaged=averaged,
        seed=seed,
    )
    return reports[attribute]


# ---- one file --------------------------------------------------------------------------------------


def _read(path: Path) -> Predictions:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            rows = [(reader.line_num, row) for row in reader if row]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a table with commas in UTF-8, got {error}") from None
    columns = _probability_columns(path, header)
    attributes, steps = tuple(columns), tuple(next(iter(columns.values())))
    interpolated = "neutral" not in steps
    frames = tuple(sorted(int(step) for step in steps if step != "neutral"))
    seeds, values = _probabilities(path, header, rows)
    before = "0" if interpolated else "neutral"
    neutral = [columns[attribute][before] for attribute in attributes]
    swapped = [[columns[attribute][str(frame)] for attribute in attributes] for frame in frames]
    return Predictions(seeds, attributes, frames, values[:, neutral], values[:, swapped], interpolated)


def _probability_columns(path: Path, header: Sequence[str]) -> dict[str, dict[str, int]]:
    """attribute -> step ("neutral", "5") -> where its column is; the same steps for every attribute."""
    if "seed" not in header:
        raise ValueError(
            f"{path}: expected a header with seed and neutral_<attribute>, 5_<attribute>, ..., got {header[:4]}"
        )
    columns: dict[str, dict[str, int]] = {}
    for where, name in enumerate(header):
        if match := COLUMN.fullmatch(name):
            step = match[1] if match[1] == "neutral" else str(int(match[1]))
            if step in columns.setdefault(match[2], {}):
                raise ValueError(f"{path}: the header has {name!r} twice")
            columns[match[2]][step] = where
    if not columns:
        raise ValueError(f"{path}: expected columns neutral_<attribute>, 5_<attribute>, ..., got {header[:4]}")
    steps = {step for by_step in columns.values() for step in by_step}
    interpolated = "neutral" not in steps and "0" in steps
    steps |= {"0"} if interpolated else {"neutral"}
    if fault := _describe_missing(columns, steps, header):
        raise ValueError(f"{path}: {fault}")
    if len(steps) < 2:
        raise ValueError(f"{path}: the header has neutral images only, expected 5_<attribute> and so on")
    return columns


def _describe_missing(columns: Mapping[str, Mapping[str, int]], steps: set[str], header: Sequence[str]) -> str:
    """What is misspelt in the header and, apart from that, what is missing; "" if nothing."""
    stray = _misspelt_attributes(columns)
    meant = {header[at]: f"{step}_{right}" for name, right in stray.items() for step, at in columns[name].items()}
    lacking = [f"{step}_{name}" for name in columns if name not in stray for step in sorted(steps - set(columns[name]))]
    others = [name for name in header if not COLUMN.fullmatch(name)]
    for wanted in lacking:
        near = difflib.get_close_matches(wanted, others, n=1, cutoff=0.8)
        if near and wanted not in meant.values():
            meant.setdefault(near[0], wanted)
    misspelt = [f"unknown column {name!r}, did you mean {meant[name]!r}?" for name in header if name in meant]
    missing = [name for name in lacking if name not in meant.values()]
    told = [_first(misspelt, "; ")] if misspelt else []
    if missing:
        told.append(f"every attribute needs the same steps, missing {_first(missing, ', ')}")
    return "; ".join(told)


def _first(texts: Sequence[str], separator: str) -> str:
    more = [f"and {len(texts) - SHOWN} more"] if len(texts) > SHOWN else []
    return separator.join([*texts[:SHOWN], *more])


def _misspelt_attributes(columns: Mapping[str, Mapping[str, int]]) -> dict[str, str]:
    """Attributes that exist by a slip of the pen -> the one meant: similar, and without the columns that these have."""
    stray: dict[str, str] = {}
    by_size = sorted(columns, key=lambda name: -len(columns[name]))
    for place, name in enumerate(by_size):
        larger = [other for other in by_size[:place] if other not in stray]
        lacking = [other for other in larger if not columns[name].keys() & columns[other].keys()]
        if near := difflib.get_close_matches(name, lacking, n=1):
            stray[name] = near[0]
    return stray


def _probabilities(
    path: Path, header: Sequence[str], rows: Sequence[tuple[int, list[str]]]
) -> tuple[tuple[int, ...], NDArray[np.float64]]:
    """The seeds, and every cell of a probability column; cells of other columns stay NaN."""
    used = [(where, name) for where, name in enumerate(header) if COLUMN.fullmatch(name)]
    seeds: dict[int, int] = {}  # seed -> its line
    values = np.full((len(rows), len(header)), np.nan)
    faults = []
    for index, (line, row) in enumerate(rows):
        try:
            if len(row) != len(header):
                raise ValueError(f"{len(row)} fields, the header has {len(header)}")
            seed = _seed(row[header.index("seed")])
            if seed in seeds:
                raise ValueError(f"seed {seed} again, first in line {seeds[seed]}")
            seeds[seed] = line
            for where, name in used:
                values[index, where] = _probability(name, row[where])
        except ValueError as fault:
            faults.append(f"line {line}: {fault}")
    if faults:
        raise ValueError(f"{path}: {len(faults)} of {len(rows)} rows do not fit: {_first(faults, '; ')}")
    if not rows:
        raise ValueError(f"{path}: a header without rows")
    return tuple(seeds), values


def _seed(cell: str) -> int:
    try:
        return int(re.sub(r"\.0*\s*$", "", cell))  # "7.0" is how pandas writes a seed after a merge
    except ValueError:
        raise ValueError(f"seed is {cell!r}, expected an integer") from None


def _probability(name: str, cell: str) -> float:
    if cell.strip().casefold() in MISSING:
        return math.nan
    try:
        value = float(cell)
    except ValueError:
        raise ValueError(f"{name} is {cell!r}, expected a number") from None
    if not (math.isnan(value) or 0 <= value <= 1):
        raise ValueError(f"{name} is {cell}, expected a probability in 0..1")
    return value


# ---- several files ---------------------------------------------------------------------------------


def _check_fit(path_a: str, a: Predictions, path_b: str, b: Predictions) -> None:
    for missing, where, other in (
        (set(a.seeds) - set(b.seeds), path_b, path_a),
        (set(b.seeds) - set(a.seeds), path_a, path_b),
    ):
        if missing:
            shown = ", ".join(str(seed) for seed in sorted(missing)[:SHOWN])
            raise ValueError(f"{where}: {len(missing)} seeds of {other} are missing: {shown}")
    if common := set(a.attributes) & set(b.attributes):
        raise ValueError(f"{path_b}: {sorted(common)} also in {path_a}; expected one file for each classifier")
    if (a.steps, a.interpolated) != (b.steps, b.interpolated):
        raise ValueError(f"{path_b}: steps {list(b.steps)}, but {path_a} has {list(a.steps)}")


def _beside(a: Predictions, b: Predictions) -> Predictions:
    order = [b.seeds.index(seed) for seed in a.seeds]
    neutral = np.concatenate([a.neutral, b.neutral[order]], axis=-1)
    swapped = np.concatenate([a.swapped, b.swapped[order]], axis=-1)
    return Predictions(a.seeds, a.attributes + b.attributes, a.steps, neutral, swapped, a.interpolated)
