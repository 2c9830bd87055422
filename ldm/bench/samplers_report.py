"""What `ldm bench samplers` prints, writes and draws."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ldm.bench.samplers import best_spacing
from ldm.study.report.plot_style import COLOURS, GREY, MARKERS, PAGE_WIDTH, add_legend, new_figure, styled

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
    """One line a run."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


@styled
def figure(rows: Sequence[Row], orders: Sequence[Row]) -> Figure:
    """Error against evaluations, both logarithmic: a row of panels a guidance, a panel a spacing, a line a sampler.

    Grey lines fall with slopes 1, 2 and 3. In brackets, the steepest slope seen of each sampler.
    """
    guidances = list(dict.fromkeys(row["guidance"] for row in rows))
    spacings = list(dict.fromkeys(row["spacing"] for row in rows))
    samplers = list(dict.fromkeys(row["sampler"] for row in rows))
    drawn = new_figure(PAGE_WIDTH, 0.4 + 2.0 * len(guidances))
    panels = drawn.subplots(len(guidances), len(spacings), sharex=True, sharey=True, squeeze=False)
    for guidance, line in zip(guidances, panels, strict=True):
        for spacing, axes in zip(spacings, line, strict=True):
            here = [row for row in rows if (row["guidance"], row["spacing"]) == (guidance, spacing)]
            _slope_guides(axes, [row["evaluations"] for row in here], max(row["error"] for row in rows))
            for k, sampler in enumerate(samplers):
                own = [row for row in here if row["sampler"] == sampler]
                axes.loglog([r["evaluations"] for r in own], [r["error"] for r in own], **_look(k))
            axes.grid(visible=True)
            axes.minorticks_off()
            ticks = sorted({row["budget"] for row in rows})
            axes.set_xticks(ticks, [str(budget) for budget in ticks])
        line[0].set_ylabel(f"relative error, guidance {guidance:g}")
    for spacing, above, below in zip(spacings, panels[0], panels[-1], strict=True):
        above.set_title(spacing.replace("_", " "))
        below.set_xlabel("evaluations")
    add_legend(drawn, [Line2D([], [], label=_legend(name, orders), **_look(k)) for k, name in enumerate(samplers)])
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


def _legend(sampler: str, orders: Sequence[Row]) -> str:
    """The sampler with the largest order seen, over spacings and guidances."""
    seen = [row["order"] for row in orders if row["sampler"] == sampler]
    return f"{sampler} ({max(seen):.1f})" if seen else sampler
