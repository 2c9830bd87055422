"""Reading metrics.json: any value may be null, not a number, or missing, and is then None here.

    results["cells"][cell]["attributes"][attribute]["swaps"]["cfrt"][reading] = {"value": ..., "interval": ...}

A cell is one neutral prompt: the chest, a melanoma, a nevus.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Results = Mapping[str, Any]

READINGS = ("own_head_signed", "own_head_abs", "single_f", "strict")
MAIN_READING = "own_head_signed"  # the one that the paper's printed figures follow
BASELINES = {
    "linear_direction": "linear direction",
    "chord": "straight chord",
    "constant_blend": "constant blend",
    "ramp_blend": "ramped blend",
    "random_direction": "random direction",
}
FLIPPED = 0.9  # the flip rate from which on an edit counts as made
ON_CURVE = ("chord",)  # baselines of the interpolations; the others are baselines of the swaps

DATA_SETS = {"chexpert": "CheXpert", "isic": "ISIC 2019"}

# Title of a cell -> (what the images are, which class).
CELL_NAMES = {
    "Chest X-ray": ("Chest X-ray", None),
    "Melanoma": ("Dermoscopy", "Melanoma"),
    "Melanocytic nevus": ("Dermoscopy", "Nevus"),
}


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval, if there is one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Attribute:
    """What was measured of one attribute in one cell."""

    cell: str
    cell_title: str
    key: str
    title: str
    scores: Results

    @property
    def data_set(self) -> str:
        return CELL_NAMES.get(self.cell_title, (self.cell_title, None))[0]

    @property
    def diagnosis(self) -> str | None:
        return CELL_NAMES.get(self.cell_title, (self.cell_title, None))[1]

    @property
    def images(self) -> str:
        """What the images of the cell are, in a word or two."""
        return short(self.cell_title)


def find(node: Any, *keys: str) -> Any:
    """The value at the end of a path of keys; None where the path breaks off."""
    for key in keys:
        if not isinstance(node, Mapping):
            return None
        node = node.get(key)
    return node


def number(value: Any) -> float | None:
    """A finite number, an int staying an int; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def estimate(node: Any) -> Estimate | None:
    """{"value": ..., "interval": [low, high]}, or a bare number, as an Estimate; None without a value."""
    value = number(find(node, "value") if isinstance(node, Mapping) else node)
    if value is None:
        return None
    low, high = bounds(find(node, "interval"))
    return Estimate(value, low, high)


def bounds(interval: Any) -> tuple[float | None, float | None]:
    """[low, high]; (None, None) unless both are numbers."""
    if not isinstance(interval, Sequence) or isinstance(interval, str) or len(interval) != 2:
        return None, None
    low, high = number(interval[0]), number(interval[1])
    return (None, None) if low is None or high is None else (low, high)


def series(values: Any, length: int) -> NDArray[np.float64]:
    """A list of numbers as a vector (length,); nan where one is null, and everywhere if the list does not fit."""
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != length:
        return np.full(length, np.nan)
    numbers = [number(value) for value in values]
    return np.array([np.nan if n is None else n for n in numbers], dtype=np.float64)


def cells(results: Results) -> dict[str, str]:
    """The key of every cell with its title."""
    entries = find(results, "cells") or {}
    return {key: str(find(cell, "title") or key) for key, cell in entries.items()}


def attributes(results: Results, cell: str | None = None) -> list[Attribute]:
    """Every attribute of one cell, or of all, in the order of the results."""
    listed = []
    for key, title in cells(results).items():
        if cell in (None, key):
            for name, scores in (find(results, "cells", key, "attributes") or {}).items():
                listed.append(Attribute(key, title, name, plain(find(scores, "title") or name), scores or {}))
    return listed


def data_set_title(name: str, drawn: bool) -> str:
    """A data set as a table names it: "chexpert" -> "CheXpert", or "CheXpert phantoms (drawn)"."""
    title = DATA_SETS.get(name, plain(name))
    return f"{title} phantoms (drawn)" if drawn else title


def short(cell_title: str) -> str:
    """A cell's title where there is little room: "Nevus"."""
    data_set, diagnosis = CELL_NAMES.get(cell_title, (cell_title, None))
    return diagnosis or data_set


def plain(name: str) -> str:
    """A key as words: "gel_bubble" -> "Gel bubble". What already has capitals stays as it is."""
    words = name.replace("_", " ")
    return words if words != words.lower() else words[:1].upper() + words[1:]
