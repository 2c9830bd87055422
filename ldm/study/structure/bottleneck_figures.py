"""Figures of directions in several spaces side by side: cosine matrices, and how straight and how shared they are.

Drawn from what `ldm hspace` writes to hspace.json: attribute -> its title, and space -> what was measured there.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ldm.study.report.plot_style import (
    COLOURS,
    GREY,
    MARKERS,
    NORMAL,
    PAGE_WIDTH,
    SMALL,
    add_legend,
    new_figure,
    styled,
)

COSINES = colormaps["RdBu"].with_extremes(bad="#d9d9d9")

# What is shown of straightness, and where a straight line lies.
MEASURES = {
    "arc_over_chord": "length of the path /\ndistance of its ends",
    "first_direction": "share of variance along\nthe first direction",
    "total_turning": "sum of turns\n(radians)",
}


@styled
def figure_directions(attributes: Mapping[str, Any]) -> Figure:
    """Cosines between the directions of all pairs of swap steps: a row a space, a column an attribute.

    Late swaps first, as in the paper's figure 5. The number is the mean over pairs of different swap steps.
    """
    spaces = list(next(iter(attributes.values()))["spaces"])
    figure = new_figure(PAGE_WIDTH, 0.92 * len(spaces) + 0.85)
    panels = figure.subplots(len(spaces), len(attributes), squeeze=False, sharex=True, sharey=True)
    for row, space in zip(panels, spaces, strict=True):
        for panel, entry in zip(row, attributes.values(), strict=True):
            summary = entry["spaces"][space]["directions"]
            values = np.array(summary["mean"], np.float64)[::-1, ::-1]
            image = panel.imshow(values, vmin=-1, vmax=1, cmap=COSINES)
            steps = summary["swap_steps"][::-1]
            ticks = [0, len(steps) // 2, len(steps) - 1]
            panel.set_xticks(ticks, [str(steps[i]) for i in ticks])
            panel.set_yticks(ticks, [str(steps[i]) for i in ticks])
            panel.tick_params(length=0)
            panel.spines[:].set_visible(False)
            off = values[~np.eye(len(values), dtype=bool)]
            panel.set_title(f"{np.nanmean(off):.2f}", fontsize=SMALL, pad=2)
        row[0].set_ylabel(space.replace(", ", ",\n"))
    for panel, entry in zip(panels[0], attributes.values(), strict=True):
        panel.set_title(entry["title"].replace(" ", "\n", 1) + "\n" + panel.get_title(), fontsize=SMALL, pad=2)
    for panel in panels[-1]:
        panel.set_xlabel("swap step s", fontsize=SMALL)
    figure.colorbar(image, ax=panels, label="cosine of the two directions", shrink=0.6, aspect=30)
    title = "directions from the neutral image to the swaps, in several spaces; above each panel the mean of its pairs"
    figure.suptitle(title, fontsize=NORMAL)
    return figure


@styled
def figure_straightness(attributes: Mapping[str, Any]) -> Figure:
    """How far each path is from a line, and how alike the directions of different seeds are; a dot a space.

    The lines through the dots are 95 % bootstrap intervals over seeds; dashed, what a straight line scores.
    """
    titles, spaces = [entry["title"] for entry in attributes.values()], list(next(iter(attributes.values()))["spaces"])
    figure = new_figure(PAGE_WIDTH, 0.36 * len(titles) + 1.15)
    panels = figure.subplots(1, len(MEASURES) + 1, sharey=True)
    for i, space in enumerate(spaces):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        offset = 0.6 * ((i + 0.5) / len(spaces) - 0.5)
        for y, entry in enumerate(attributes.values()):
            measured = entry["spaces"][space]
            for panel, measure in zip(panels, MEASURES, strict=False):
                score = measured["straightness"][measure]
                panel.plot(np.array([score["value"]], np.float64), [y + offset], color=colour, marker=marker, zorder=3)
                panel.plot(np.array(score["interval"], np.float64), [y + offset] * 2, color=colour)
            panels[-1].plot(_mean(measured["shared"]), y + offset, color=colour, marker=marker, zorder=3)
    for panel, (measure, label) in zip(panels, MEASURES.items(), strict=False):
        straight = next(iter(attributes.values()))["spaces"][spaces[0]]["straightness"][measure]["straight"]
        panel.axvline(straight, color=GREY, linestyle="--", linewidth=0.8)
        panel.set_xlabel(label)
    panels[-1].axvline(1, color=GREY, linestyle="--", linewidth=0.8)
    panels[-1].set_xlabel("cosine between the\ndirections of two seeds")
    panels[0].set_yticks(range(len(titles)), titles)
    panels[0].set_ylim(len(titles) - 0.5, -0.5)
    for panel in panels:
        panel.grid(axis="x")
        panel.tick_params(axis="y", length=0)
    marks = [
        Line2D([], [], color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], linestyle="", label=space)
        for i, space in enumerate(spaces)
    ]
    straight_line = Line2D([], [], color=GREY, linestyle="--", label="a straight line; one direction for all")
    add_legend(figure, [*marks, straight_line])
    return figure


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else np.nan
