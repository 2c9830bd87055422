"""Figures of where words look: every word over the image, the attribute's word by layer and step, and its overlap with
the true mask.

Drawn from what `ldm attend` writes to attention.json, one entry an attribute, and from the maps themselves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from ldm.study.report.plot_style import COLOURS, GREY, MARKERS, NORMAL, PAGE_WIDTH, SMALL, new_figure, sheet, styled
from ldm.traversal.figures import Pixels

Floats = NDArray[np.float64]

HEAT = colormaps["inferno"]
GROUPS = {"own": "the attribute's words", "[start]": "start", "[end]": "end", "[padding]": "padding"}
GAP, LABEL, WORD, TITLE = 0.03, 0.78, 0.50, 0.20  # inches: between images; room for a row's name, slanted words, title


@dataclass(frozen=True, eq=False)
class Shown:
    """One image of one attribute, and where the words of its prompt looked."""

    title: str
    image: Pixels  # (H, W, 3)
    mask: NDArray[np.bool_]  # (H, W)
    words: Sequence[tuple[str, float, Floats]]  # text, its share of all attention, its map (h, w)
    layers: Sequence[tuple[str, Floats]]  # of the attribute's words: label, map
    steps: Sequence[tuple[str, Floats]]


@styled
def figure_words(shown: Sequence[Shown]) -> Figure:
    """Every word of each prompt over the image: the mean over layers, heads and steps, each map on its own scale.

    Written below a map: the word's share of all attention.
    """
    columns = 1 + max(len(one.words) for one in shown)
    side = (PAGE_WIDTH - LABEL - 0.25) / columns - GAP  # the last word slants beyond its image
    line = WORD + side + 0.13
    figure, axes = sheet(PAGE_WIDTH, TITLE + line * len(shown) + 0.05)
    title = "where each word looks (mean over layers, heads, steps), its share of attention; outlined, the true mask"
    axes.text(PAGE_WIDTH / 2, 0.15, title, fontsize=NORMAL, ha="center")
    for r, one in enumerate(shown):
        y = TITLE + r * line + WORD
        _row_title(axes, one.title, y + side / 2)
        _picture(axes, one.image, one.mask, LABEL, y, side)
        for c, (text, share, looked) in enumerate(one.words, start=1):
            x = LABEL + c * (side + GAP)
            _overlay(axes, one, looked, x, y, side)
            axes.text(x + side / 3, y - 0.04, text, fontsize=6, rotation=45, ha="left", va="bottom")
            axes.text(x + side / 2, y + side + 0.09, f"{share:.0%}", fontsize=5.5, color=GREY, ha="center")
    return figure


@styled
def figure_depth_and_time(shown: Sequence[Shown]) -> Figure:
    """The attribute's words over the image: for each layer, mean over steps; then at some steps, mean over layers."""
    layers, steps = len(shown[0].layers), len(shown[0].steps)
    gap = 0.14
    side = (PAGE_WIDTH - LABEL - 2 * gap) / (1 + layers + steps) - GAP
    top = 0.42 + TITLE
    figure, axes = sheet(PAGE_WIDTH, top + len(shown) * (side + GAP) + 0.02)
    xs = [LABEL + c * (side + GAP) + (c > 0) * gap + (c > layers) * gap for c in range(1 + layers + steps)]
    for x, (label, _) in zip(xs[1:], [*shown[0].layers, *shown[0].steps], strict=True):
        axes.text(x + side / 2, top - 0.05, label, fontsize=6, ha="center")
    for first, last, text in ((1, layers, "layer, all steps"), (1 + layers, layers + steps, "step, all layers")):
        axes.text((xs[first] + xs[last] + side) / 2, TITLE + 0.17, text, fontsize=SMALL, ha="center")
    title = "where the words that name the attribute look; outlined, the true mask"
    axes.text(PAGE_WIDTH / 2, 0.15, title, fontsize=NORMAL, ha="center")
    for r, one in enumerate(shown):
        y = top + r * (side + GAP)
        _row_title(axes, one.title, y + side / 2)
        _picture(axes, one.image, one.mask, xs[0], y, side)
        for x, (_, looked) in zip(xs[1:], [*one.layers, *one.steps], strict=True):
            _overlay(axes, one, looked, x, y, side)
    return figure


@styled
def figure_overlap(attributes: Mapping[str, Any], columns: int = 4) -> Figure:
    """Intersection over union with the true mask over the steps, mean over layers: a panel an attribute."""
    rows = -(-(len(attributes) + 1) // columns)  # the legend takes one place
    figure = new_figure(PAGE_WIDTH, 1.55 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for panel, entry in zip(grid, attributes.values(), strict=False):
        for (group, label), colour, marker in zip(GROUPS.items(), COLOURS, MARKERS, strict=False):
            values = np.array(entry["overlap"][group]["all layers"], np.float64)
            every = max(1, len(values) // 5)
            panel.plot(values, color=colour, marker=marker, markevery=every, label=label, clip_on=False)
        panel.axhline(entry["ceiling"], color=GREY, linestyle="--", linewidth=0.8)
        panel.axhline(entry["chance"], color=GREY, linestyle=":", linewidth=0.8)
        panel.set_title(entry["title"])
        panel.grid(axis="y")
    for i, panel in enumerate(grid[: len(attributes)]):
        panel.set_ylim(0, 1)
        panel.tick_params(labelbottom=i + columns >= len(attributes))
        if i % columns == 0:
            panel.set_ylabel("IoU with the mask")
        if i + columns >= len(attributes):
            panel.set_xlabel("step, from noise")
    for panel in grid[len(attributes) :]:
        panel.axis("off")
    lines = [
        *(
            Line2D([], [], color=colour, marker=marker, label=label)
            for label, colour, marker in zip(GROUPS.values(), COLOURS, MARKERS, strict=False)
        ),
        Line2D([], [], color=GREY, linestyle="--", label="ceiling: the mask\non the finest grid"),
        Line2D([], [], color=GREY, linestyle=":", label="a random place"),
    ]
    grid[len(attributes)].legend(handles=lines, loc="center left", borderaxespad=0)
    return figure


@styled
def figure_layers(attributes: Mapping[str, Any]) -> Figure:
    """The same by layer, mean over steps: the attribute's words, and the tokens around the prompt."""
    titles = [entry["title"] for entry in attributes.values()]
    layers = [name for name in next(iter(attributes.values()))["overlap"]["own"] if name != "all layers"]
    tables = {
        label: np.array(
            [[np.mean(entry["overlap"][group][layer]) for layer in layers] for entry in attributes.values()]
        )
        for group, label in GROUPS.items()
    }
    highest = max(table.max() for table in tables.values())
    figure = new_figure(PAGE_WIDTH, 0.2 * len(titles) + 1.1)
    panels = figure.subplots(1, len(GROUPS), sharey=True, squeeze=False)[0]
    for panel, (label, values) in zip(panels, tables.items(), strict=True):
        image = panel.imshow(values, cmap=colormaps["cividis"], vmin=0, vmax=highest, aspect="auto")
        panel.set_title(label)
        panel.set_xticks(range(len(layers)), layers, rotation=50, ha="right", rotation_mode="anchor")
        panel.set_yticks(range(len(titles)), titles)
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
        for (r, c), value in np.ndenumerate(values):
            text = f"{value:.2f}".replace("0.", ".", 1)
            colour = "white" if value < 0.55 * highest else "black"
            panel.text(c, r, text, ha="center", va="center", fontsize=5.5, color=colour)
    figure.colorbar(image, ax=list(panels), label="IoU with the mask", shrink=0.9)
    return figure


# ---- what is drawn ---------------------------------------------------------------------------------


def _row_title(axes: Axes, title: str, y: float) -> None:
    axes.text(LABEL - 0.07, y, title.replace(" ", "\n", 1), fontsize=SMALL, ha="right", va="center")


def _picture(axes: Axes, image: Pixels, mask: NDArray[np.bool_], x: float, y: float, side: float) -> None:
    """The image itself, the mask's outline on it."""
    axes.imshow(image, extent=(x, x + side, y + side, y), aspect="auto")
    _outline(axes, mask, x, y, side)


def _overlay(axes: Axes, one: Shown, looked: Floats, x: float, y: float, side: float) -> None:
    """A map over its image, darkened where it is low; from its lowest to its highest value."""
    height, width = one.image.shape[:2]
    span = looked.max() - looked.min()
    level = (looked - looked.min()) / (span if span > 0 else 1.0)
    heat = HEAT(_bilinear(level, height, width))[..., :3]
    grey = one.image.mean(axis=-1, keepdims=True) / 255
    axes.imshow(0.35 * grey + 0.65 * heat, extent=(x, x + side, y + side, y), aspect="auto")
    _outline(axes, one.mask, x, y, side)


def _outline(axes: Axes, mask: NDArray[np.bool_], x: float, y: float, side: float) -> None:
    height, width = mask.shape
    columns, rows = (np.arange(width) + 0.5) / width * side + x, (np.arange(height) + 0.5) / height * side + y
    axes.contour(columns, rows, mask.astype(float), levels=[0.5], colors="#56B4E9", linewidths=0.5)


def _bilinear(level: Floats, height: int, width: int) -> Floats:
    """(h, w) -> (height, width), pixel centres aligned as in `torch.nn.functional.interpolate`."""
    rows = np.clip((np.arange(height) + 0.5) * level.shape[0] / height - 0.5, 0, level.shape[0] - 1)
    columns = np.clip((np.arange(width) + 0.5) * level.shape[1] / width - 0.5, 0, level.shape[1] - 1)
    by_rows = np.array([np.interp(rows, np.arange(level.shape[0]), column) for column in level.T]).T
    return np.array([np.interp(columns, np.arange(level.shape[1]), row) for row in by_rows])
