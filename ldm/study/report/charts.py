"""Figures of numbers: cosine matrices (the paper's figure 5), curves over the swap step, methods compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from ldm.study.report.plot_style import (
    COLUMN_WIDTH,
    GREY,
    PAGE_WIDTH,
    SMALL,
    Look,
    NothingToDraw,
    add_legend,
    looks,
    new_figure,
    square_panels,
    styled,
    swatches,
)
from ldm.study.report.results import (
    BASELINES,
    FLIPPED,
    MAIN_READING,
    Attribute,
    Results,
    attributes,
    bounds,
    cells,
    estimate,
    find,
    number,
    series,
)

LineStyle = Literal[":", "--", "-."]

SWAP_STEP = "swap step s"
COSINE_COLOURS = colormaps["RdBu"].with_extremes(bad="#d9d9d9")


@dataclass(frozen=True)
class Measure:
    """One row of panels: what is drawn over the swap step."""

    key: str
    label: str
    span: tuple[float, float]  # always in sight; the axis grows where a value lies outside


# ---- figure 5 --------------------------------------------------------------------------------------


@styled
def figure_5(results: Results, cell: str | None = None) -> Figure:
    """Cosines between the directions of all pairs of swap steps, mean over the seeds, a panel for each attribute.

        cos(z_s - z_neutral, z_s' - z_neutral)                                            [paper, eq. 4]

    Args:    cell: one cell; None: all.
    Raises:  NothingToDraw: without a matrix.
    """
    shown = [a for a in attributes(results, cell) if find(a.scores, "directions", "matrix")]
    if not shown:
        raise NothingToDraw("results: no directions of any attribute")
    several_cells = len({a.cell for a in shown}) > 1
    columns = min(len(shown), 3 if several_cells else 2)
    width, foot = COLUMN_WIDTH if columns == 1 else PAGE_WIDTH, 0.50
    figure, panels = square_panels(len(shown), columns, width, (0.40, 0.22, 0.36), foot)
    for a, panel in zip(shown, panels, strict=True):
        image = _cosines(panel, a, panel.get_position().width * width)
        panel.set_title(f"{a.images}: {a.title.lower()}" if several_cells else a.title)
        panel.set(xlabel=SWAP_STEP, ylabel=SWAP_STEP)
    height = figure.get_figheight()
    place = figure.add_axes((0.5 - 1.1 / width, 0.38 / height, 2.2 / width, 0.07 / height))
    bar = figure.colorbar(image, cax=place, orientation="horizontal", label="cosine of the two directions")
    bar.outline.set_visible(False)
    return figure


def _cosines(axes: Axes, a: Attribute, width: float) -> AxesImage:
    """One matrix, `width` inches wide, with its values; late swaps first, as in the figures of images."""
    matrix = find(a.scores, "directions", "matrix")
    rows = [series(row, len(matrix)) for row in matrix]
    steps = find(a.scores, "directions", "swap_steps") or range(len(rows))
    order = np.argsort(steps)[::-1]
    values = np.array(rows)[np.ix_(order, order)]
    image = axes.imshow(values, vmin=-1, vmax=1, cmap=COSINE_COLOURS)
    ticks, names = range(len(order)), [str(steps[i]) for i in order]
    axes.set_xticks(ticks, names)
    axes.set_yticks(ticks, names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    size = min(SMALL, 0.42 * 72 * width / len(order))
    for (r, c), value in np.ndenumerate(values):
        colour = "white" if abs(value) > 0.65 else "black"
        axes.text(c, r, _cosine(float(value)), ha="center", va="center", fontsize=size, color=colour)
    return image


def _cosine(value: float) -> str:
    """Two decimals without the zero in front, so that they are legible in a small square."""
    if not np.isfinite(value):
        return "-"
    return f"{value:z.2f}".replace("0.", ".", 1).replace("1.00", "1").replace("-", "\N{MINUS SIGN}")


# ---- over the swap step ----------------------------------------------------------------------------


@styled
def figure_cfrt(results: Results) -> Figure:
    """CFRT in two readings and the flip rate over the swap step, a column of panels a cell.

    An interval is drawn where per_swap_step holds "interval" -> measure, a list of [low, high]. Chance is that of the
    reading; of `strict` it is an upper bound.

    Raises:  NothingToDraw: without a curve.
    """
    measures = [
        Measure("own_head_signed", "CFRT (own head)", (0.0, 1.0)),
        Measure("strict", "CFRT (strict)", (0.0, 1.0)),
        Measure("flip_rate", "flip rate", (0.0, 1.0)),
    ]
    figure, panels = _panels_over_steps(results, measures, "swaps", mark_flipped=False)
    for row, measure in zip(panels, measures, strict=True):
        for axes, cell in zip(row, cells(results), strict=True):
            chances = [find(a.scores, "swaps", "cfrt", measure.key, "chance") for a in attributes(results, cell)]
            for chance in {number(chance) for chance in chances} - {None}:
                axes.axhline(chance, color=GREY, linestyle=":", linewidth=0.8)
        _show_all(row, measure)
    add_legend(figure, [*swatches(list(looks(results).values())), _line(":", "chance level")])
    return figure


@styled
def figure_truth(results: Results) -> Figure:
    """Skill, leakage and identity retrieval against the true counterfactual over the swap step.

    A filled marker is a swap step that flips at least 90 %. Intervals as in `figure_cfrt`. A dashed line is the floor
    that the autoencoder sets: what the true counterfactual scores, encoded and decoded. A dash-dotted one is that of
    the inversion: how often the original is still recognised after it, without any edit.

    Raises:  NothingToDraw: without ground truth.
    """
    measures = [
        Measure("skill", "skill", (0.0, 1.0)),
        Measure("leakage", "leakage", (0.0, 0.2)),
        Measure("retrieval", "identity\nretrieval@1", (0.8, 1.0)),
    ]
    floors: dict[str, LineStyle] = {"skill": "--", "leakage": "--", "retrieval": "-."}
    figure, panels = _panels_over_steps(results, measures, "truth", mark_flipped=True)
    known, drawn = looks(results), set()
    for row, measure in zip(panels, measures, strict=True):
        for axes, cell in zip(row, cells(results), strict=True):
            for a in attributes(results, cell):
                if (floor := number(find(a.scores, "truth", "floor", measure.key))) is not None:
                    style = floors[measure.key]
                    axes.axhline(floor, color=known[a.key].colour, linestyle=style, linewidth=0.7)
                    drawn.add(style)
        _show_all(row, measure)
    marks = {"--": _line("--", "autoencoder's floor"), "-.": _line("-.", "inversion's floor")}
    others = [
        *(mark for style, mark in marks.items() if style in drawn),
        Line2D([], [], color=GREY, marker="o", linestyle="", label=f"flips \N{GREATER-THAN OR EQUAL TO} {FLIPPED:.0%}"),
        Line2D([], [], color=GREY, marker="o", linestyle="", markerfacecolor="white", label="flips fewer"),
    ]
    add_legend(figure, [*swatches(list(known.values())), *others])
    return figure


def _panels_over_steps(
    results: Results, measures: Sequence[Measure], part: str, mark_flipped: bool
) -> tuple[Figure, NDArray[Any]]:
    """A grid of panels, a row a measure and a column a cell, with a curve for each attribute that has one.

    part: whose per_swap_step is drawn, "swaps" or "truth".
    """
    titles = cells(results)
    drawn = [a for a in attributes(results) if find(a.scores, part, "per_swap_step", "swap_steps")]
    if not drawn:
        raise NothingToDraw(f"results: no {part}.per_swap_step of any attribute")
    known = looks(results)
    steps = sorted({s for a in drawn for s in a.scores[part]["per_swap_step"]["swap_steps"]})
    figure = new_figure(COLUMN_WIDTH if len(titles) == 1 else PAGE_WIDTH, 1.3 * len(measures) + 0.7)
    panels = figure.subplots(len(measures), len(titles), sharex="col", sharey="row", squeeze=False)
    for row, measure in zip(panels, measures, strict=True):
        row[0].set_ylabel(measure.label)
        for axes, cell in zip(row, titles, strict=True):
            for a in (a for a in drawn if a.cell == cell):
                _curve(axes, a.scores[part]["per_swap_step"], measure.key, known[a.key], mark_flipped)
            axes.grid(axis="y")
    for axes, title in zip(panels[0], titles.values(), strict=True):
        axes.set_title(title)
        axes.set_xticks(steps[:: -(-len(steps) // 9)])
        axes.invert_xaxis()  # shared down the column: early swaps, the strong edits, on the right
    for axes in panels[-1]:
        axes.set_xlabel(SWAP_STEP)
    figure.align_ylabels()
    return figure, panels


def _show_all(row: Sequence[Axes], measure: Measure) -> None:
    """Limits of one row of panels that cut off no curve, no interval and no floor."""
    ends = np.array([*measure.span, *(end for axes in row for end in axes.dataLim.intervaly)])
    low, high = ends[np.isfinite(ends)].min(), ends[np.isfinite(ends)].max()
    pad = 0.04 * (high - low)
    row[0].set_ylim(low - pad, high + pad)


def _curve(axes: Axes, per_step: Any, key: str, look: Look, mark_flipped: bool) -> None:
    """One attribute over the swap step; with mark_flipped, open markers where fewer than nine of ten flip."""
    steps = np.asarray(per_step["swap_steps"])
    values = series(find(per_step, key), len(steps))
    if not np.isfinite(values).any():
        return
    axes.plot(steps, values, color=look.colour, marker=look.marker, clip_on=False)
    if mark_flipped:
        few = ~(series(find(per_step, "flip_rate"), len(steps)) >= FLIPPED)
        marks = axes.plot(steps[few], values[few], color=look.colour, marker=look.marker, linestyle="", clip_on=False)
        marks[0].set_markerfacecolor("white")
    intervals = find(per_step, "interval", key)
    if isinstance(intervals, Sequence) and len(intervals) == len(steps):
        ends = [bounds(interval) for interval in intervals]
        low, high = (series([end[side] for end in ends], len(steps)) for side in (0, 1))
        axes.fill_between(steps, low, high, color=look.colour, alpha=0.15, linewidth=0)


def _line(style: LineStyle, label: str) -> Line2D:
    return Line2D([], [], color=GREY, linestyle=style, linewidth=0.8, label=label)


# ---- methods ---------------------------------------------------------------------------------------


@styled
def figure_methods(results: Results) -> Figure:
    """The swaps, the Bezier curve and the baselines by CFRT and flip rate, with intervals, a row of panels a cell.

    n is the number of seeds that a method was measured on.

    Raises:  NothingToDraw: without a baseline.
    """
    if not any(find(a.scores, "baselines") for a in attributes(results)):
        raise NothingToDraw("results: no baselines of any attribute")
    methods: dict[str, tuple[str, ...]] = {"prompt swaps": ("swaps",), "Bezier curve": ("interpolations",)}
    methods |= {label: ("baselines", name) for name, label in BASELINES.items()}
    measures = (
        (("cfrt", MAIN_READING), "CFRT (own head)"),
        (("cfrt", "strict"), "CFRT (strict)"),
        (("flip_rate",), "flip rate"),
    )
    names = [label + _seeds(results, path) for label, path in methods.items()]
    titles, known = cells(results), looks(results)
    figure = new_figure(PAGE_WIDTH, 0.26 * len(methods) * len(titles) + 0.9)
    panels = figure.subplots(len(titles), len(measures), sharex=True, sharey=True, squeeze=False)
    for row, (cell, title) in zip(panels, titles.items(), strict=True):
        of_cell = attributes(results, cell)
        row[0].set_ylabel(title)
        for axes, (measure, _) in zip(row, measures, strict=True):
            for i, a in enumerate(of_cell):
                offset = 0.7 * ((i + 0.5) / len(of_cell) - 0.5)
                reports = [find(a.scores, *path) for path in methods.values()]
                _dots(axes, [find(report, *measure) for report in reports], offset, known[a.key])
            axes.set_yticks(range(len(names)), names)
            axes.tick_params(axis="y", length=0)
            axes.axhline(1.5, color=GREY, linewidth=0.6)
            axes.grid(axis="x")
    panels[0, 0].set(xlim=(-0.03, 1.03), ylim=(len(methods) - 0.5, -0.5))
    for axes, (_, label) in zip(panels[-1], measures, strict=True):
        axes.set_xlabel(label)
    add_legend(figure, swatches(list(known.values()), line=False))
    return figure


def _seeds(results: Results, method: Sequence[str]) -> str:
    """The seeds behind a method's CFRT, ", n = 8" or, where attributes differ, ", n = 5-8"; empty where none says."""
    seeds = [number(find(a.scores, *method, "cfrt", MAIN_READING, "n")) for a in attributes(results)]
    counts = sorted({n for n in seeds if n is not None})
    span = f"{counts[0]}-{counts[-1]}" if len(counts) > 1 else "".join(f"{n}" for n in counts)
    return f", n = {span}" if span else ""


def _dots(axes: Axes, scores: Sequence[Any], offset: float, look: Look) -> None:
    """One attribute's value for each method, a line through its interval."""
    for y, score in enumerate(estimate(score) for score in scores):
        if score is None:
            continue
        axes.plot(score.value, y + offset, color=look.colour, marker=look.marker, clip_on=False, zorder=3)
        if score.low is not None and score.high is not None:
            axes.plot([score.low, score.high], [y + offset] * 2, color=look.colour, clip_on=False)
