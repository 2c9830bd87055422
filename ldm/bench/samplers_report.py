"""What `ldm bench samplers` prints, writes and draws."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ldm.bench.sampler_statistics import scored
from ldm.bench.samplers import best_spacing
from ldm.study.report.plot_style import COLOURS, GREY, MARKERS, PAGE_WIDTH, SMALL, add_legend, new_figure, styled

Row = Mapping[str, Any]


def table(rows: Sequence[Row], orders: Sequence[Row], timed: Mapping[str, Mapping[str, float]]) -> str:
    """For every guidance a line a sampler, at the spacing with the smallest error in the middle budget."""
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    middle = budgets[len(budgets) // 2]
    lines = []
    for guidance in dict.fromkeys(row["guidance"] for row in rows):
        errors = "".join(f"{f'error@{budget}':>10}" for budget in budgets)
        lines.append(
            f"guidance {guidance:g}\n{'sampler':18}{'spacing':18}{errors}{'order':>7}"
            f"{f'swap@{middle}':>10}{'cosine':>8}{'ms/eval':>9}"
        )
        for sampler in dict.fromkeys(row["sampler"] for row in rows):
            spacing = best_spacing(rows, sampler, middle, guidance)
            key = (guidance, sampler, spacing)
            by_budget = {row["budget"]: row for row in rows if (row["guidance"], row["sampler"], row["spacing"]) == key}
            order = [o["order"] for o in orders if (o["guidance"], o["sampler"], o["spacing"]) == key]
            lines.append(
                f"{sampler:18}{spacing:18}"
                + "".join(f"{by_budget[budget]['error']:10.2e}" for budget in budgets)
                + (f"{order[0]:7.2f}" if order else f"{'':7}")
                + f"{by_budget[middle]['swap_error']:10.2e}{by_budget[middle]['swap_cosine']:8.4f}"
                + f"{timed[sampler]['ms_per_evaluation']:9.1f}"
            )
        lines.append("")
    return "\n".join(lines)


def flip_table(flips: Sequence[Row]) -> str:
    """CFRT a sampler."""
    lines = [f"{'CFRT':18}{'spacing':18}{'evals':>6}  " + "  ".join(flips[0]["cfrt"])]
    for row in flips:
        rates = "  ".join(f"{rate:{len(style)}.2f}" for style, rate in row["cfrt"].items())
        lines.append(f"{row['sampler']:18}{row['spacing']:18}{row['evaluations']:6d}  {rates}")
    return "\n".join(lines)


def as_csv(rows: Sequence[Row]) -> str:
    """One line a run; what is given by seed is in the JSON."""
    names = dict.fromkeys(name for row in rows for name in row if name != "by_seed")
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(names), lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


@styled
def figure(rows: Sequence[Row], floors: Mapping[float, float] | None = None) -> Figure:
    """Error against evaluations, both logarithmic: a panel for every guidance and spacing, a line a sampler.

    Grey lines fall with slopes 1, 2 and 3. A broken line is the reference's own error, below which nothing is told
    apart: guidance -> error.
    """
    shown = scored(rows)
    cases = list(dict.fromkeys((row.get("guidance"), row["spacing"]) for row in shown))
    samplers = list(dict.fromkeys(row["sampler"] for row in shown))
    columns = min(4, len(dict.fromkeys(spacing for _, spacing in cases)))
    lines = -(-len(cases) // columns)
    drawn = new_figure(PAGE_WIDTH, 0.5 + 1.7 * lines + 0.12 * len(samplers) / 5)
    panels = drawn.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for (guidance, spacing), axes in zip(cases, panels.flat, strict=False):
        here = [row for row in shown if (row.get("guidance"), row["spacing"]) == (guidance, spacing)]
        _slope_guides(axes, [row["evaluations"] for row in here], max(row["error"] for row in shown))
        for k, sampler in enumerate(samplers):
            own = [row for row in here if row["sampler"] == sampler]
            axes.loglog([r["evaluations"] for r in own], [r["error"] for r in own], **_look(k))
        if floors and guidance is not None and guidance in floors:
            axes.axhline(floors[guidance], color="black", linewidth=0.7, linestyle="--")
        axes.grid(visible=True)
        axes.minorticks_off()
        ticks = sorted({row["budget"] for row in shown})
        axes.set_xticks(ticks, [str(budget) for budget in ticks])
        axes.set_title(
            spacing.replace("_", " ") + ("" if guidance is None else f", guidance {guidance:g}"), fontsize=SMALL
        )
    for k, axes in enumerate(panels.flat):
        axes.set_visible(k < len(cases))
        if len(cases) - columns <= k < len(cases):  # nothing below it
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("evaluations")
    drawn.supylabel("relative error of the latent", fontsize=SMALL)
    entries = [Line2D([], [], label=name, **_look(k)) for k, name in enumerate(samplers)]
    if floors:
        entries.append(Line2D([], [], label="reference's own error", color="black", linestyle="--", linewidth=0.7))
    add_legend(drawn, entries)
    return drawn


def _slope_guides(axes: Axes, evaluations: Sequence[int], top: float) -> None:
    first, last = min(evaluations), max(evaluations)
    for slope in (1, 2, 3):
        low = top * (first / last) ** slope
        axes.loglog([first, last], [top, low], color=GREY, linewidth=0.6, linestyle=":", zorder=0)
        axes.annotate(f"{slope}", (last, low), color=GREY, fontsize=6, xytext=(2, -2), textcoords="offset points")


def _look(k: int) -> dict[str, Any]:
    """Colour and marker; past the seventh the line is dashed, and colours come again with other markers."""
    again = k // len(COLOURS)
    marker = MARKERS[(k + again) % len(MARKERS)]
    return {"color": COLOURS[k % len(COLOURS)], "marker": marker, "linestyle": "--" if again else "-"}
