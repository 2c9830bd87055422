"""The paper's figures of images: the teaser (figure 1), the swaps (figure 3) and the Bezier curve (figure 6).

A strip is one trajectory: pairs of a label and an image (H, W, 3) of bytes, the neutral image first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from ldm.study.report.plot_style import GREY, NORMAL, PAGE_WIDTH, SMALL, NothingToDraw, sheet, styled
from ldm.study.report.results import Results, attributes, cells, find, short
from ldm.traversal.figures import Pixels, difference

Strip = Sequence[tuple[str, Pixels]]
Strips = Mapping[str, Mapping[int, Mapping[str, Strip]]]  # cell -> seed -> attribute -> strip

MARGIN, GAP = 0.03, 0.02
LABEL_WIDTH, LINE = 0.66, 0.15


@dataclass(frozen=True)
class LatentMap:
    """A cell's latents in the plane.

    points: (M, 2), from `tsne`.  attribute: the key of each point's attribute, "neutral" for the start of a
    trajectory.  swap_step, seed: of each point; swap_step is None where nothing was swapped.  thumbnails: images of
    some points, by index.
    """

    points: NDArray[np.float64]
    attribute: Sequence[str]
    swap_step: Sequence[int | None]
    seed: Sequence[int]
    thumbnails: Mapping[int, Pixels] = field(default_factory=dict)


@dataclass(frozen=True)
class FigureImages:
    """What the figures show besides numbers; any part may be empty, and its figures are then not drawn.

    rows: the swaps, labelled "neutral", "s = 45", ... "s = 5".  curves: samples of the Bezier curve, labelled
    "u = 0.00", ... "u = 1.00".  tsne: a map for each cell.
    """

    rows: Strips = field(default_factory=dict)
    curves: Strips = field(default_factory=dict)
    tsne: Mapping[str, LatentMap] = field(default_factory=dict)


@styled
def figure_1(results: Results, pictures: FigureImages, frames: int = 4) -> Figure:
    """The teaser: one start image a cell, and from it a short trajectory along each attribute, two to a line.

    Args:    frames: images a trajectory, besides the start.
    Raises:  NothingToDraw: without any trajectory.
    """
    blocks = _blocks(results, pictures.curves or pictures.rows, seeds=1)
    side = (PAGE_WIDTH - 2 * MARGIN - 2 * 0.12 - 2 * (frames - 1) * GAP) / (1 + 2 * frames)
    line = side + LINE + 0.05
    lines = [(len(block.strips) + 1) // 2 for block in blocks]
    figure, axes = sheet(PAGE_WIDTH, sum(lines) * line + (len(blocks) - 1) * 0.10 + MARGIN)

    top = 0.0
    for block, n in zip(blocks, lines, strict=True):
        start = top + (n - 1) * line / 2  # beside the middle of its lines
        axes.text(MARGIN, start + LINE - 0.04, short(block.title), fontsize=SMALL, weight="bold")
        _image(axes, block.strips[0].images[0][1], MARGIN, start + LINE, side)
        for i, strip in enumerate(block.strips):
            x = MARGIN + side + 0.12 + (i % 2) * (frames * (side + GAP) - GAP + 0.12)
            y = top + (i // 2) * line
            axes.text(x, y + LINE - 0.04, f"{strip.title} \N{RIGHTWARDS ARROW}", fontsize=SMALL)
            for c, (_, image) in enumerate(evenly(strip.images, frames + 1)[1:]):
                _image(axes, image, x + c * (side + GAP), y + LINE, side)
        top += n * line + 0.10
    return figure


@styled
def figure_3(
    results: Results, pictures: FigureImages, cell: str | None = None, seeds: int = 1, change: bool = False
) -> Figure:
    """Swaps: a row for each attribute and seed, from the neutral image over late swaps to the earliest.

    Args:    cell: one cell; None: all.  seeds: how many.  change: draw under each row what differs from neutral.
    Raises:  NothingToDraw: without images of the swaps.
    """
    direction = "swap step s; the earlier the swap, the stronger the edit \N{RIGHTWARDS ARROW}"
    return _grid(_blocks(results, pictures.rows, seeds, cell), 12, direction, change)


@styled
def figure_6(
    results: Results, pictures: FigureImages, cell: str | None = None, seeds: int = 1, columns: int = 9
) -> Figure:
    """Along the Bezier curve: a row for each attribute and seed, from u = 0, the neutral image, to u = 1.

    Args:    cell: one cell; None: all.  seeds: how many.  columns: images a row, evenly chosen.
    Raises:  NothingToDraw: without images of the curve.
    """
    anew = any(find(results, "cells", each, "redrawn") for each in ([cell] if cell else cells(results)))
    curve = "the Bezier curve, drawn anew through the swaps" if anew else "the Bezier curve"
    direction = f"position u on {curve} \N{RIGHTWARDS ARROW}"
    return _grid(_blocks(results, pictures.curves, seeds, cell), columns, direction, change=False)


def evenly(strip: Strip, count: int) -> Strip:
    """At most `count` images of a strip, evenly spread, with its first and its last."""
    if len(strip) <= count:
        return strip
    return [strip[round(i * (len(strip) - 1) / (count - 1))] for i in range(count)]


# ---- what is drawn ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _TitledStrip:
    title: str
    seed: int
    images: Strip


@dataclass(frozen=True)
class _Block:
    title: str
    strips: Sequence[_TitledStrip]


def _blocks(results: Results, strips: Strips, seeds: int, only: str | None = None) -> list[_Block]:
    """The strips of each cell: attributes in the order of the results, and the first seeds of each."""
    blocks = []
    for cell, title in cells(results).items():
        of_seeds = strips.get(cell, {}) if only in (None, cell) else {}
        titled = [
            _TitledStrip(attribute.title, seed, of_seeds[seed][attribute.key])
            for attribute in attributes(results, cell)
            for seed in sorted(of_seeds)[:seeds]
            if of_seeds[seed].get(attribute.key)
        ]
        if titled:
            blocks.append(_Block(title, titled))
    if not blocks:
        raise NothingToDraw(f"pictures: no images of cell {only!r}" if only else "pictures: no images of any cell")
    return blocks


def _grid(blocks: Sequence[_Block], columns: int, direction: str, change: bool) -> Figure:
    """Blocks of rows under each other, each under its title and the labels of its columns."""
    shown = [[evenly(strip.images, columns) for strip in block.strips] for block in blocks]
    width = max(len(strip) for block in shown for strip in block)
    side = (PAGE_WIDTH - LABEL_WIDTH - 2 * MARGIN + GAP) / width - GAP
    lines = sum(len(block) for block in shown) * (2 if change else 1)
    height = len(blocks) * (2 * LINE + 0.06) + lines * (side + GAP) + (LINE if change else 0.0)
    figure, axes = sheet(PAGE_WIDTH, height)

    y = 0.0
    axes.text(PAGE_WIDTH - MARGIN, LINE - 0.03, direction, fontsize=SMALL, color=GREY, ha="right")
    for block, strips in zip(blocks, shown, strict=True):
        y += 2 * LINE
        axes.text(MARGIN, y - LINE - 0.03, block.title, fontsize=NORMAL, weight="bold")
        for c, (label, _) in enumerate(strips[0]):
            axes.text(LABEL_WIDTH + c * (side + GAP) + side / 2, y - 0.04, label, fontsize=SMALL, ha="center")
        for strip, images in zip(block.strips, strips, strict=True):
            pixels = [image for _, image in images]
            y = _row(axes, _row_label(block, strip), pixels, y, side)
            if change:
                y = _change_row(axes, pixels, y, side)
        y += 0.06
    if change:
        legend = "change against the neutral image: red is brighter, blue darker"
        axes.text(PAGE_WIDTH - MARGIN, height - 0.05, legend, fontsize=SMALL, color=GREY, ha="right")
    return figure


def _row_label(block: _Block, strip: _TitledStrip) -> str:
    several = len({other.seed for other in block.strips}) > 1
    words = strip.title.replace(" ", "\n", 1)
    return f"{words}\nseed {strip.seed}" if several else words


def _row(axes: Axes, label: str, images: Sequence[Pixels], y: float, side: float) -> float:
    """Draw one line of images; returns where the next begins."""
    axes.text(LABEL_WIDTH - 0.06, y + side / 2, label, fontsize=SMALL, ha="right", va="center")
    for c, image in enumerate(images):
        _image(axes, image, LABEL_WIDTH + c * (side + GAP), y, side)
    return y + side + GAP


def _change_row(axes: Axes, images: Sequence[Pixels], y: float, side: float) -> float:
    """Draw what differs from the first image, each in a frame, since most of it is white; returns where the next row
    begins."""
    axes.text(LABEL_WIDTH - 0.06, y + side / 2, "change", fontsize=SMALL, color=GREY, ha="right", va="center")
    for c, image in enumerate(images[1:], start=1):
        x = LABEL_WIDTH + c * (side + GAP)
        _image(axes, difference(image, images[0]), x, y, side)
        axes.add_patch(Rectangle((x, y), side, side, fill=False, edgecolor="#c8c8c8", linewidth=0.4))
    return y + side + GAP


def _image(axes: Axes, image: Pixels, x: float, y: float, side: float) -> None:
    axes.imshow(image, extent=(x, x + side, y + side, y), aspect="auto")
