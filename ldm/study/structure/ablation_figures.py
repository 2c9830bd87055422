"""Figures of an ablation: what each part carries, each head, each layer at each time; and the images themselves.

Drawn from what `ldm ablate` writes to ablation.json, one entry a domain. Colours: cividis for probabilities, orange to
purple for differences, which have a sign; the same for all kinds of sight. Grey: nothing was there to be lost.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import NDArray

from ldm.probe.parts import HEAD
from ldm.study.report.plot_style import GREY, NORMAL, PAGE_WIDTH, SMALL, new_figure, sheet, styled
from ldm.traversal.figures import Pixels

Found = Mapping[str, Any]  # domain -> its part of ablation.json
Floats = NDArray[np.float64]

SHARES = colormaps["cividis"].with_extremes(bad="#d9d9d9")
LOST = colormaps["PuOr_r"].with_extremes(bad="#d9d9d9")
DRAWN = 0.1  # an intact effect below this is no attribute that a part could carry
WRITTEN = 0.05  # smaller values are left blank, so that the map can be read


@styled
def figure_parts(domains: Found) -> Figure:
    """How much of each attribute's effect is lost without each part, and what else changes.

    The first map: intact effect minus that without the part, mean over seeds; grey where the intact network does not
    draw the attribute. The others: how far the edit spills over
    outside its region, and how far the neutral image moves, both in grey levels of 255.
    """
    rows = _rows(domains)
    lost, titles = _lost(domains, [name for _, name, _ in rows])
    side = {
        "spill-over\nof the edit": _per_domain(domains, [name for _, name, _ in rows], "identity"),
        "change of\nneutral image": _per_domain(domains, [name for _, name, _ in rows], "neutral"),
    }
    figure = new_figure(PAGE_WIDTH, 0.135 * len(rows) + 1.6)
    widths = [len(titles), *(len(domains) for _ in side)]
    panels = figure.subplots(1, 3, sharey=True, squeeze=False, width_ratios=widths)[0]
    image = _map(panels[0], lost, LOST, -1.0, 1.0)
    panels[0].set_xticks(range(len(titles)), titles, rotation=40, ha="right", rotation_mode="anchor")
    panels[0].set_yticks(range(len(rows)), [label for *_, label in rows])
    panels[0].set_title("effect lost without the part")
    for panel, (title, values) in zip(panels[1:], side.items(), strict=True):
        greys = _map(panel, values, colormaps["Greys"], 0.0, max(20.0, float(np.nanmax(values))), digits=0)
        panel.set_xticks(range(len(domains)), list(domains), rotation=40, ha="right", rotation_mode="anchor")
        panel.set_title(title)
    _kinds(panels, [kind for kind, *_ in rows])
    figure.colorbar(image, ax=panels[0], orientation="horizontal", label="probability lost", aspect=40, pad=0.02)
    figure.colorbar(greys, ax=list(panels[1:]), orientation="horizontal", label="grey levels", aspect=16, pad=0.02)
    return figure


@styled
def figure_heads(domains: Found) -> Figure:
    """The same for each head of each cross-attention: a panel an attribute, a row a layer, a column a head."""
    heads = {domain: [part for part in entry["parts"] if part["kind"] == HEAD] for domain, entry in domains.items()}
    panels_of = [
        (_intact_title(entry, name), _grid(heads[domain], entry["intact"]["effect"][name], name))
        for domain, entry in domains.items()
        for name in entry["attributes"]
    ]
    layers = list(dict.fromkeys(part["label"] for part in next(iter(heads.values()))))
    figure, panels = _panels(len(panels_of), 4, 0.19 * len(layers) + 0.7)
    for i, (panel, (title, values)) in enumerate(zip(panels, panels_of, strict=True)):
        image = _map(panel, values, LOST, -1.0, 1.0)
        panel.set_title(title)
        panel.set_xticks(range(values.shape[1]))
        panel.set_yticks(range(len(layers)), layers if i % 4 == 0 else [""] * len(layers))
        panel.set_xlabel("head")
    _bar(figure, panels, image, "effect lost without the head (probability)")
    figure.suptitle("one head (column) of one cross-attention (row) taken out", fontsize=NORMAL)
    return figure


@styled
def figure_injection(domains: Found) -> Figure:
    """The style's context in one layer (row) during one window of steps (column), neutral everywhere else.

    The network's depth against the paper's time; the last row is all layers, the last column all steps.
    """
    panels_of = [
        (_title(entry, name), np.array(entry["injection"]["probability"][name], np.float64))
        for entry in domains.values()
        for name in entry["attributes"]
    ]
    injection = next(iter(domains.values()))["injection"]
    layers, windows = [*injection["labels"], "all"], [*injection["windows"], "all"]
    figure, panels = _panels(len(panels_of), 4, 0.19 * len(layers) + 0.75)
    for i, (panel, (title, values)) in enumerate(zip(panels, panels_of, strict=True)):
        image = _map(panel, values, SHARES, 0.0, 1.0)
        panel.set_title(title)
        panel.set_xticks(range(len(windows)), windows, rotation=50, ha="right", rotation_mode="anchor")
        panel.set_yticks(range(len(layers)), layers if i % 4 == 0 else [""] * len(layers))
        panel.axhline(len(layers) - 1.5, color="white", linewidth=1.5)
        panel.axvline(len(windows) - 1.5, color="white", linewidth=1.5)
        panel.set_xlabel("steps with the style")
    _bar(figure, panels, image, "probability of the attribute")
    title = "the style's prompt in one cross-attention (row) during some steps (column), the neutral prompt elsewhere"
    figure.suptitle(title, fontsize=NORMAL)
    return figure


@styled
def figure_images(rows: Sequence[tuple[str, str, Sequence[Pixels]]], titles: Sequence[str]) -> Figure:
    """What the network draws without each part: rows of (kind, label, images (h, w, 3)), each image under its title."""
    left, top, gap = 0.78, 0.36, 0.02
    side = (PAGE_WIDTH - left - 0.03) / len(titles) - gap
    figure, axes = sheet(PAGE_WIDTH, top + len(rows) * (side + gap))
    for c, title in enumerate(titles):
        x = left + c * (side + gap) + side / 2
        axes.text(x, top - 0.05, title.replace(" ", "\n", 1), fontsize=SMALL, ha="center", va="bottom")
    for r, (kind, label, images) in enumerate(rows):
        y = top + r * (side + gap)
        axes.text(left - 0.06, y + side / 2, f"{kind}\n{label}".strip(), fontsize=SMALL, ha="right", va="center")
        for c, image in enumerate(images):
            x = left + c * (side + gap)
            axes.imshow(image, extent=(x, x + side, y + side, y), aspect="auto")
    return figure


# ---- what is drawn ---------------------------------------------------------------------------------


def _rows(domains: Found) -> list[tuple[str, str, str]]:
    """Kind, name and label of every part but the heads, which have a figure of their own."""
    parts = next(iter(domains.values()))["parts"]
    return [(part["kind"], part["name"], part["label"]) for part in parts if part["kind"] != HEAD]


def _lost(domains: Found, names: Sequence[str]) -> tuple[Floats, list[str]]:
    """(parts, attributes of all domains): intact effect minus that without the part; and the attributes' titles."""
    table, titles = [], []
    for entry in domains.values():
        by_name = {part["name"]: part for part in entry["parts"]}
        for attribute in entry["attributes"]:
            intact = entry["intact"]["effect"][attribute]
            table.append([_lost_of(intact, by_name[name], attribute) for name in names])
            titles.append(_intact_title(entry, attribute))
    return np.array(table).T, titles


def _per_domain(domains: Found, names: Sequence[str], key: str) -> Floats:
    """(parts, domains): a figure that has one value for all attributes."""
    table = []
    for entry in domains.values():
        by_name = {part["name"]: part for part in entry["parts"]}
        table.append([by_name[name][key] for name in names])
    return np.array(table).T


def _grid(heads: Sequence[Mapping[str, Any]], intact: float, attribute: str) -> Floats:
    """(layers, heads): what is lost of one attribute."""
    by_layer: dict[str, list[float]] = {}
    for part in heads:
        by_layer.setdefault(part["name"].rpartition(".")[0], []).append(_lost_of(intact, part, attribute))
    return np.array(list(by_layer.values()))


def _lost_of(intact: float, part: Mapping[str, Any], attribute: str) -> float:
    """What goes with a part; NaN where the intact network does not draw the attribute."""
    return float(intact - part["effect"][attribute]) if intact >= DRAWN else float("nan")


def _intact_title(entry: Mapping[str, Any], attribute: str) -> str:
    """The attribute, its effect in the intact network, and of how many seeds all of it is the mean."""
    intact = entry["intact"]
    effect = f"{intact['effect'][attribute]:.2f}".replace("-", "\N{MINUS SIGN}")
    return f"{_title(entry, attribute)}\nintact {effect}, n = {intact['seeds']}"


def _title(entry: Mapping[str, Any], attribute: str) -> str:
    return str(entry["attributes"][attribute])


def _panels(count: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of panels in rows, and the panels in reading order; places that are not needed stay empty.

    height: of a row, with its titles and labels; there is room for a title above all of them and a bar below.
    """
    rows = -(-count // columns)
    figure = new_figure(PAGE_WIDTH, 0.2 + rows * height + 0.55)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in grid[count:]:
        panel.axis("off")
    return figure, list(grid[:count])


def _bar(figure: Figure, panels: Sequence[Axes], image: AxesImage, label: str) -> None:
    """The colours, under all panels: beside them the label would be higher than a few layers are."""
    pad = 0.1 / figure.get_figheight()
    figure.colorbar(image, ax=list(panels), orientation="horizontal", label=label, aspect=40, shrink=0.8, pad=pad)


def _map(axes: Axes, values: Floats, colours: Any, low: float, high: float, digits: int = 2) -> AxesImage:
    """A heat map with its values written in, those near zero left away."""
    image = axes.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for (r, c), value in np.ndenumerate(values):
        if np.isfinite(value) and abs(value) >= (WRITTEN if digits else 0.5):
            red, green, blue, _ = image.to_rgba(np.array([value]))[0]
            dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
            text = f"{value:.{digits}f}".replace("0.", ".", 1) if digits else f"{value:.0f}"
            text = text.replace("1.00", "1").replace("-", "\N{MINUS SIGN}")
            axes.text(c, r, text, ha="center", va="center", fontsize=5.5, color="white" if dark else "black")
    return image


def _kinds(panels: Sequence[Axes], kinds: Sequence[str]) -> None:
    """White lines between the kinds of parts, and each kind's name beside its rows."""
    for start in [i for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1]]:
        for panel in panels:
            if start:
                panel.axhline(start - 0.5, color="white", linewidth=2.5)
        middle = start + (kinds.count(kinds[start]) - 1) / 2
        panels[0].annotate(
            kinds[start].replace("-", "-\n"),
            (0, middle),
            xycoords=("axes fraction", "data"),
            xytext=(-46, 0),
            textcoords="offset points",
            rotation=90,
            ha="center",
            va="center",
            fontsize=NORMAL,
            color=GREY,
        )
