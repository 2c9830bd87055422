"""How a call's time grows with its rows and with the size of the image: time ~ size^k, fitted to measured points.

On logarithmic axes a power is a line whose slope is its exponent k. Convolutions and linear layers grow with k = 1 in
rows and in pixels, self-attention's scores with k = 2 in pixels; fixed costs bend the small end below that.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from ldm.bench.harness import memory_gib, synchronise
from ldm.bench.rows import RowFile
from ldm.study.report.plot_style import COLOURS, GREY, PAGE_WIDTH, new_figure, styled
from ldm.traversal.batches import SHARE, UNET_MAPS, free_bytes

Json = dict[str, Any]
NAMES = ("rows", "side", "round")  # what tells the lines of the row file apart
RESAMPLES = 2000  # of the rounds, for the interval


class Point(NamedTuple):
    """A call: rows, and latent pixels a side."""

    rows: int
    side: int


# ---- which points ----------------------------------------------------------------------------------


def usual_sides(side: int, multiple: int) -> list[int]:
    """Latent sides from a model's own to 4 times that; of a model for 512 px and more from half of it to twice.

    multiple: that the network can halve.
    """
    smallest = side / 2 if side >= 64 else side
    return sorted({max(multiple, round(smallest * factor / multiple) * multiple) for factor in (1, 1.5, 2, 3, 4)})


def need_bytes(point: Point, width: int, itemsize: int) -> int:
    """The most that a call holds beside the weights, about: maps of the first level's width."""
    return UNET_MAPS * point.rows * point.side**2 * width * itemsize


def room_bytes(device: torch.device) -> float:
    """What a call may take of the free memory; without an end where the system does not say."""
    if device.type == "cuda":
        return SHARE * free_bytes(device)
    free = memory_gib("MemAvailable")
    return math.inf if free is None else SHARE * free * 2**30


# ---- time ------------------------------------------------------------------------------------------


def order(points: Sequence[Point], turn: int) -> list[Point]:
    """The points of a round: shuffled, and backwards in the next one, so that none always follows the same."""
    shuffled = np.random.default_rng(turn // 2).permutation(len(points))
    return [points[i] for i in (shuffled[::-1] if turn % 2 else shuffled)]


def measure(
    call: Callable[[Point], object],
    points: Sequence[Point],
    rounds: int,
    clock: Callable[[], float],
    file: RowFile,
    progress: Callable[[], object],
) -> None:
    """Time every point once a round; a line in the file for each. What it holds already is not measured again.

    Args:    call: computes the network once, warmed up here before a point's first timing.
             progress: called after every timing.
    """
    warm: set[Point] = set()
    for turn in range(rounds):
        for point in order(points, turn):
            name = {**point._asdict(), "round": turn}
            if name in file:
                continue
            if point not in warm:
                call(point)
                warm.add(point)
            synchronise()
            began = clock()
            call(point)
            synchronise()
            file.add({**name, "ms": 1000 * (clock() - began)})
            progress()


def times(file: RowFile, points: Sequence[Point], rounds: int) -> np.ndarray:
    """Milliseconds, (rounds, points)."""
    return np.array([[file[{**point._asdict(), "round": turn}]["ms"] for point in points] for turn in range(rounds)])


# ---- the exponent ----------------------------------------------------------------------------------


def power(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """k and log(c) of values ~ c size^k, by least squares on logarithms."""
    k, log_c = np.polyfit(np.log(sizes), np.log(values), 1)
    return float(k), float(log_c)


def fit(sizes: Sequence[float], taken: np.ndarray) -> Json:
    """The power law through medians, and how far to trust it.

    Args:    taken: (rounds, sizes) ms.
    Returns: exponent; interval: 95 % over rounds drawn again, None of fewer than three; ms_at_one: c of c size^k;
             worst: the largest share by which a median leaves the line; slopes: of each piece between neighbours.
    Raises:  ValueError: fewer than two sizes.
    """
    if len(set(sizes)) < 2:
        raise ValueError(f"growth: {len(set(sizes))} sizes, expected 2 or more to fit an exponent to")
    medians = np.median(taken, axis=0)
    k, log_c = power(sizes, medians)
    line = np.exp(log_c + k * np.log(sizes))
    return {
        "exponent": k,
        "interval": _interval(sizes, taken) if len(taken) >= 3 else None,
        "ms_at_one": math.exp(log_c),
        "worst": float(np.max(np.abs(medians / line - 1))),
        "slopes": [float(slope) for slope in np.diff(np.log(medians)) / np.diff(np.log(sizes))],
    }


def _interval(sizes: Sequence[float], taken: np.ndarray) -> list[float]:
    drawn = np.random.default_rng(0).integers(len(taken), size=(RESAMPLES, len(taken)))
    medians = np.median(taken[drawn], axis=1)  # (RESAMPLES, sizes); a round is drawn with all its sizes
    slopes = np.polyfit(np.log(sizes), np.log(medians).T, 1)[0]
    return [float(end) for end in np.quantile(slopes, [0.025, 0.975])]


def series(points: Sequence[Point], sizes: Sequence[int], taken: np.ndarray, gflop: Sequence[float]) -> Json:
    """The points of one panel with their medians, the fit, and the exponent of the operations alone."""
    p20, medians, p80 = np.quantile(taken, [0.2, 0.5, 0.8], axis=0)
    rows = [
        {
            **point._asdict(),
            "size": size,
            "median_ms": float(median),
            "p20_ms": float(low),
            "p80_ms": float(high),
            "gflop": operations,
            "gflops": 1000 * operations / float(median),
        }
        for point, size, low, median, high, operations in zip(points, sizes, p20, medians, p80, gflop, strict=True)
    ]
    return {"points": rows, **fit(sizes, taken), "operations_exponent": power(sizes, gflop)[0]}


# ---- what is written -------------------------------------------------------------------------------


def as_csv(result: Json) -> str:
    """A line for each point of each series, and the fitted line's time there."""
    text = io.StringIO()
    rows = [
        {"series": name, **row, "fitted_ms": one["ms_at_one"] * row["size"] ** one["exponent"]}
        for name, one in result["series"].items()
        for row in one["points"]
    ]
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


@styled
def figure(result: Json) -> Figure:
    """Time against rows and against pixels, both logarithmic: medians, the fitted line, the operations alone."""
    drawn = new_figure(PAGE_WIDTH, 2.9)
    panels = drawn.subplots(1, 2)
    rows, pixels = result["series"]["rows"], result["series"]["pixels"]
    _panel(panels[0], rows, COLOURS[0], "o")
    _panel(panels[1], pixels, COLOURS[1], "s")
    side, count = rows["points"][0]["px"], pixels["points"][0]["rows"]
    panels[0].set(
        title=f"rows of {side} x {side} px", xlabel="rows in a call", ylabel=f"ms a call, {result['clock']} time"
    )
    panels[0].set_xticks([row["size"] for row in rows["points"]], [str(row["rows"]) for row in rows["points"]])
    panels[1].set(title=f"{count} row{'s' if count > 1 else ''}, by size", xlabel="pixels of the image")
    panels[1].set_xticks([row["size"] for row in pixels["points"]], [f"{row['px']}²" for row in pixels["points"]])
    return drawn


def _panel(axes: Axes, one: Json, colour: str, marker: str) -> None:
    sizes = np.array([row["size"] for row in one["points"]], dtype=float)
    medians = np.array([row["median_ms"] for row in one["points"]])
    spread = np.abs(np.array([[row["p20_ms"], row["p80_ms"]] for row in one["points"]]).T - medians)
    work = np.array([row["gflop"] for row in one["points"]])
    axes.errorbar(sizes, medians, spread, color=colour, marker=marker, linestyle="", label="median, p20 to p80")
    axes.plot(sizes, one["ms_at_one"] * sizes ** one["exponent"], color=colour, label=f"time: k = {exponent_text(one)}")
    floor = work * np.min(medians / work)  # at the best rate of the series, so that it touches the points from below
    label = f"operations at the best rate: k = {one['operations_exponent']:.2f}"
    axes.plot(sizes, floor, color=GREY, linestyle="--", label=label)
    axes.set(xscale="log", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
    axes.minorticks_off()
    axes.grid(True)
    axes.legend(loc="upper left")


def exponent_text(one: Json) -> str:
    """ "0.94 [0.92, 0.95]", the interval where there is one."""
    ends = f" [{one['interval'][0]:.2f}, {one['interval'][1]:.2f}]" if one["interval"] else ""
    return f"{one['exponent']:.2f}{ends}"
