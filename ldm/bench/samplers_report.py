"""What `ldm bench samplers` prints, writes and draws."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ldm.bench.sampler_statistics import cheapest, pareto, scored
from ldm.study.report.plot_style import COLOURS, GREY, MARKERS, PAGE_WIDTH, SMALL, add_legend, new_figure, styled

Row = Mapping[str, Any]


def heading(peer: str | None = None) -> str:
    """Over the lines of `line`."""
    theirs = f"{'its error':>10}{'apart':>10}   {peer}" if peer else ""
    return (
        f"{'guidance':>8}  {'sampler':26}{'spacing':18}{'evals':>5}{'error':>10}{'swap':>10}{'cosine':>8}{'SSIM':>8}"
        f"{'LPIPS':>8}{'s':>7}{theirs}"
    )


def line(row: Row) -> str:
    """One run."""
    begin = f"{row['guidance']:8g}  {row['sampler']:26}{row['spacing']:18}"
    if "refused" in row:
        return f"{begin}  refused: {row['refused']}"
    theirs = "".join(f"{row[name]:10.2e}" for name in ("peer_error", "peer_apart") if name in row)
    theirs += f"  refused: {row['peer_refused']}" if "peer_refused" in row else ""
    looks = "".join(f"{row[name]:8.4f}" if name in row else f"{'-':>8}" for name in ("ssim", "lpips"))
    return (
        f"{begin}{row['evaluations']:5d}{row['error']:10.2e}{row['swap_error']:10.2e}{row['swap_cosine']:8.4f}{looks}"
        f"{row['seconds']:7.1f}{theirs}"
    )


def summary(rows: Sequence[Row], references: Sequence[Row], timed: Mapping[str, Mapping[str, float]]) -> str:
    """For every guidance the front with its margins, the cheapest within 1 %, the floor; then time and memory."""
    lines = []
    for reference in references:
        guidance = reference["guidance"]
        here = [row for row in rows if row["guidance"] == guidance]
        floor = reference["half_steps_error"]
        lines.append(f"guidance {guidance:g}: no run with fewer evaluations has a smaller error than these")
        for row in pareto(here):
            under = "  (below the reference's own error: not told apart)" if row["error"] < floor else ""
            lines.append(
                f"  {row['evaluations']:4} evaluations  {row['error']:.2e}  {row['sampler']}, {row['spacing']}{under}"
            )
        best = cheapest(here)
        told = "none" if best is None else f"{best['sampler']}, {best['spacing']}, {best['evaluations']} evaluations"
        lines.append(f"  the cheapest within 1 %: {told}")
        lines.append(
            f"  the reference: {reference['steps']} steps; one of half as many is {floor:.1e} away, "
            f"{reference['half_steps_swap_error']:.1e} when swapped"
        )
    spent = ", ".join(
        f"{name} {of['ms_per_evaluation']:.0f} ({of['ratio_to_ddim']:.2f} x)" for name, of in timed.items()
    )
    return "\n".join([*lines, f"ms an evaluation, and ddim's speed in the same rounds as a ratio: {spent}"])


def flip_table(flips: Sequence[Row]) -> str:
    """CFRT a sampler."""
    lines = [f"{'CFRT':26}{'spacing':18}{'evals':>6}  " + "  ".join(flips[0]["cfrt"])]
    for row in flips:
        rates = "  ".join(f"{rate:{len(style)}.2f}" for style, rate in row["cfrt"].items())
        lines.append(f"{row['sampler']:26}{row['spacing']:18}{row['evaluations']:6d}  {rates}")
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
