"""Every figure of the paper from one evaluation, as PNG and PDF.

    from ldm.study.report.plots import FigureImages, write_figures
    write_figures(results, FigureImages(rows, curves, tsne), out)

The paper: "Language-Guided Trajectory Traversal in Disentangled Stable Diffusion Latent Space for Factorized Medical
Image Generation" (TehraniNasab, Kumar, Arbel, 2025).
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from ldm.study.report.charts import figure_5, figure_cfrt, figure_methods, figure_truth
from ldm.study.report.image_figures import FigureImages, LatentMap, figure_1, figure_3, figure_6
from ldm.study.report.latent_map import figure_4, tsne
from ldm.study.report.plot_style import NothingToDraw, save_figure
from ldm.study.report.results import Results, attributes, cells

__all__ = [
    "FigureImages",
    "LatentMap",
    "NothingToDraw",
    "figure_1",
    "figure_3",
    "figure_4",
    "figure_5",
    "figure_6",
    "figure_cfrt",
    "figure_methods",
    "figure_truth",
    "tsne",
    "write_figures",
]

log = logging.getLogger(__name__)


def write_figures(results: Results, pictures: FigureImages, out: Path) -> list[Path]:
    """Every figure for which there is something to draw, as OUT/figures/<name>.png and .pdf.

    figure_3, figure_5 and figure_6 show all cells; with a cell's key behind the name they show that cell alone, the
    swaps with the change against the neutral image.

    Returns: the files written, in the order of the figures.
    """
    figures: dict[str, Callable[[], Figure]] = {
        "figure_1": partial(figure_1, results, pictures),
        "figure_3": partial(figure_3, results, pictures),
        "figure_4": partial(figure_4, results, pictures),
        "figure_5": partial(figure_5, results),
        "figure_6": partial(figure_6, results, pictures),
        "figure_cfrt": partial(figure_cfrt, results),
        "figure_truth": partial(figure_truth, results),
        "figure_methods": partial(figure_methods, results),
    }
    for cell in cells(results):
        seeds = 2 if len(attributes(results, cell)) <= 2 else 1  # what a page holds
        figures[f"figure_3_{cell}"] = partial(figure_3, results, pictures, cell, seeds=seeds, change=True)
        figures[f"figure_5_{cell}"] = partial(figure_5, results, cell)
        figures[f"figure_6_{cell}"] = partial(figure_6, results, pictures, cell, seeds=2)
    written = []
    for name, draw in figures.items():
        try:
            figure = draw()
        except NothingToDraw as nothing:
            log.info("%s: not drawn; %s", name, nothing)
            continue
        written += save_figure(figure, out / "figures" / name)
    return written
