"""How every figure looks and is written: sizes of a two-column paper, colours that all can tell apart.

Sizes are inches, fonts points. Nothing here touches matplotlib's global state: figures are made of `Figure` itself, and
`styled` sets its parameters only while a function runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ldm.files import complete
from ldm.study.report.results import Results, attributes

COLUMN_WIDTH, PAGE_WIDTH, PAGE_HEIGHT = 3.25, 6.875, 9.2
PNG_DPI = 300
SMALL, NORMAL = 7.0, 8.0

PARAMETERS = {
    **{"font.family": "DejaVu Sans", "font.size": NORMAL, "axes.titlesize": NORMAL, "axes.labelsize": NORMAL},
    **{"xtick.labelsize": SMALL, "ytick.labelsize": SMALL, "legend.fontsize": SMALL, "legend.frameon": False},
    **{"legend.columnspacing": 1.2, "legend.handletextpad": 0.5, "legend.handlelength": 1.4, "legend.borderpad": 0.2},
    **{"axes.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True},
    **{"xtick.major.width": 0.6, "ytick.major.width": 0.6, "xtick.major.size": 2.5, "ytick.major.size": 2.5},
    **{"lines.linewidth": 1.0, "lines.markersize": 3.5, "lines.markeredgewidth": 0.8},
    **{"grid.linewidth": 0.4, "grid.color": "#e3e3e3", "pdf.fonttype": 42, "savefig.dpi": PNG_DPI},
}

# Okabe and Ito 2008, its yellow left out: too light for a line on white. A marker as well, for print without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#767676"

styled = matplotlib.rc_context(PARAMETERS)  # type: ignore[arg-type]


class NothingToDraw(ValueError):
    """The results or the pictures hold nothing of what a figure shows."""


@dataclass(frozen=True)
class Look:
    """How one attribute is drawn, in every figure and every cell."""

    title: str
    colour: str
    marker: str


def looks(results: Results) -> dict[str, Look]:
    """The look of every attribute by its key, in order of appearance; past seven they repeat."""
    titles: dict[str, str] = {}
    for attribute in attributes(results):
        titles.setdefault(attribute.key, attribute.title)
    return {
        key: Look(title, COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)])
        for i, (key, title) in enumerate(titles.items())
    }


def new_figure(width: float, height: float) -> Figure:
    """An empty figure on an Agg canvas that lays its parts out so that none overlap."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def sheet(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure that is one bare sheet: x and y are inches from its upper left corner."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.axis("off")
    axes.set(xlim=(0.0, width), ylim=(height, 0.0))
    axes.set_autoscale_on(False)
    return figure, axes


def square_panels(
    count: int, columns: int, width: float, margins: tuple[float, float, float], foot: float
) -> tuple[Figure, list[Axes]]:
    """A figure of square panels in rows, as large as the page allows, and its panels in reading order.

    margins: to the left of each panel, above it and below it.  foot: room under all of them.
    """
    left, above, below = margins
    rows, slot = -(-count // columns), (width - 0.05) / columns
    side = min(slot - left, (PAGE_HEIGHT - foot) / rows - above - below)
    line = above + side + below
    height = rows * line + foot
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    panels = []
    for i in range(count):
        x, y = (i % columns) * slot + left, height - (i // columns) * line - above - side
        panels.append(figure.add_axes((x / width, y / height, side / width, side / height)))
    return figure, panels


def swatches(shown: Sequence[Look], line: bool = True) -> list[Line2D]:
    """What a legend shows for attributes: their marker, on a piece of their line if there is one."""
    style: Literal["-", ""] = "-" if line else ""
    return [Line2D([], [], color=k.colour, marker=k.marker, linestyle=style, label=k.title) for k in shown]


def legend_rows(entries: int, width: float) -> int:
    """How many rows `add_legend` takes."""
    return -(-entries // (7 if width > COLUMN_WIDTH else 3))


def add_legend(figure: Figure, entries: Sequence[Line2D]) -> None:
    """One legend for all panels, under them, in rows of about equal length."""
    columns = -(-len(entries) // legend_rows(len(entries), figure.get_figwidth()))
    outside = figure.get_layout_engine() is not None  # then the panels make room for it
    figure.legend(handles=entries, loc="outside lower center" if outside else "lower center", ncols=columns)


def save_figure(figure: Figure, path: Path) -> list[Path]:
    """PATH.png at 300 dpi and PATH.pdf with embedded TrueType fonts; no date in either, so the same figure gives the
    same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {
        "png": {"Software": None},
        "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    }
    written = []
    for ending, entries in metadata.items():
        final = path.with_name(f"{path.name}.{ending}")
        with complete(final) as partial, matplotlib.rc_context(PARAMETERS):  # type: ignore[arg-type]
            figure.savefig(partial, format=ending, dpi=PNG_DPI, metadata=entries)
        written.append(final)
    return written
