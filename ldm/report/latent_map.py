"""The latents of a run in the plane: t-SNE, and the paper's figure 4."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike, NDArray

from ldm.report.image_figures import LatentMap, Material
from ldm.report.plot_style import (
    COLUMN_WIDTH,
    GREY,
    PAGE_WIDTH,
    Look,
    NothingToDraw,
    add_legend,
    legend_rows,
    looks,
    square_panels,
    styled,
    swatches,
)
from ldm.report.results import Results, cells

NEUTRAL = Look("Neutral", GREY, "*")
THUMBNAIL = 0.15  # side, as a share of the panel's
MAX_THUMBNAILS = 10
MAX_VECTOR_POINTS = 1500  # above this the points of a PDF are stored as pixels, or it would be slow to open


def tsne(latents: ArrayLike, seed: int = 0) -> NDArray[np.float64]:
    """t-SNE of latents, the same for the same latents (van der Maaten and Hinton, 2008).

    Reduced to 50 principal components first, which is what the authors of t-SNE do; started from the first two of
    them; perplexity 30, or a third of the neighbours there are.

    Args:    latents: (M, D), M >= 4; an image's latent flattened.  seed: of t-SNE's random numbers.
    Returns: (M, 2).
    Raises:  ValueError: too few latents, another shape, a value that is not finite.
    """
    from sklearn.decomposition import PCA  # imported here: it takes a second, and only this needs it
    from sklearn.manifold import TSNE

    vectors = np.asarray(latents, dtype=np.float64)
    if vectors.ndim != 2 or len(vectors) < 4 or vectors.shape[1] < 2:
        raise ValueError(f"latents: got shape {vectors.shape}, expected (M, D) with M >= 4 and D >= 2; flatten them")
    if not np.isfinite(vectors).all():
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        raise ValueError(f"latents: row {bad[0]} holds a value that is not finite, expected numbers; leave it out")
    components = min(50, *vectors.shape)
    reduced = PCA(components, svd_solver="full" if components < 50 else "randomized", random_state=seed)
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    plane = TSNE(2, perplexity=perplexity, init="pca", random_state=seed, n_jobs=1)
    return plane.fit_transform(reduced.fit_transform(vectors)).astype(np.float64)


@styled
def figure_4(results: Results, material: Material) -> Figure:
    """The latents of each cell in the plane, coloured by attribute; a larger marker is an earlier swap.

    Raises:  NothingToDraw: without a map of any cell of the results.
    """
    shown = [(title, material.tsne[cell]) for cell, title in cells(results).items() if cell in material.tsne]
    if not shown:
        raise NothingToDraw("material.tsne: no map of any cell")
    known = looks(results)
    present = {name for _, latent_map in shown for name in latent_map.attribute}
    entries = [look for key, look in known.items() if key in present]
    legend = swatches([*entries, *([NEUTRAL] if present - known.keys() else [])], line=False)
    legend.append(Line2D([], [], linestyle="", label="larger: an earlier swap"))

    columns = min(3, len(shown))
    width = COLUMN_WIDTH if columns == 1 else PAGE_WIDTH
    foot = 0.15 * legend_rows(len(legend), width) + 0.06
    figure, panels = square_panels(len(shown), columns, width, (0.20, 0.20, 0.20), foot)
    for panel, (title, latent_map) in zip(panels, shown, strict=True):
        _panel(panel, latent_map, known)
        panel.set_title(title)
    add_legend(figure, legend)
    return figure


def _panel(axes: Axes, latent_map: LatentMap, known: dict[str, Look]) -> None:
    """One map: the points by attribute, and over them as many thumbnails as find room."""
    points = np.asarray(latent_map.points, dtype=np.float64)
    middle = (points.max(axis=0) + points.min(axis=0)) / 2
    reach = 1.08 * max(float(np.ptp(points, axis=0).max()) / 2, 1e-9)
    area = np.clip(4000 / len(points), 2.5, 12.0) * _strength(latent_map.swap_step)
    names = np.asarray(latent_map.attribute)
    for name in dict.fromkeys(latent_map.attribute):
        of_name, look = names == name, known.get(name, NEUTRAL)
        axes.scatter(
            points[of_name, 0],
            points[of_name, 1],
            s=area[of_name],
            c=look.colour,
            marker=look.marker,
            linewidths=0,
            alpha=0.75,
            rasterized=len(points) > MAX_VECTOR_POINTS,
        )

    side = 2 * reach * THUMBNAIL
    room = reach - side / 2
    for i in spread_out(points, sorted(latent_map.thumbnails), side, middle, room):
        left, bottom = points[i] - side / 2
        box = (left, left + side, bottom, bottom + side)
        axes.imshow(latent_map.thumbnails[i], extent=box, aspect="auto", zorder=3)
        colour = known.get(latent_map.attribute[i], NEUTRAL).colour
        axes.add_patch(Rectangle((left, bottom), side, side, fill=False, edgecolor=colour, linewidth=1.0, zorder=4))

    axes.set(xlim=(middle[0] - reach, middle[0] + reach), ylim=(middle[1] - reach, middle[1] + reach))
    axes.set(xticks=[], yticks=[], xlabel="t-SNE 1", ylabel="t-SNE 2")


def spread_out(
    points: NDArray[np.float64], wanted: Sequence[int], side: float, middle: NDArray[np.float64], room: float
) -> list[int]:
    """Which of the wanted points get a thumbnail: greedily the one farthest from those chosen, never overlapping.

    Args:    points: (M, 2).  side: of a thumbnail, in the same unit.  middle: (2,) of the panel.  room: how far from
             the middle a thumbnail's centre may lie without being cut off.
    Returns: indices into points, at most 10, in the order chosen.
    """
    left = [i for i in wanted if np.abs(points[i] - middle).max() <= room]
    chosen: list[int] = []
    while left and len(chosen) < MAX_THUMBNAILS:
        from_others = [_distance(points, i, chosen, middle) for i in left]
        chosen.append(left[int(np.argmax(from_others))])
        left = [i for i in left if np.abs(points[i] - points[chosen[-1]]).max() > 1.1 * side]
    return chosen


def _distance(points: NDArray[np.float64], i: int, chosen: Sequence[int], middle: NDArray[np.float64]) -> float:
    others = points[list(chosen)] if chosen else middle[None]
    return float(np.linalg.norm(others - points[i], axis=1).min())


def _strength(swap_steps: Sequence[int | None]) -> NDArray[np.float64]:
    """A marker's area against the mean one: 0.5 for the latest swap, 1.5 for the earliest, 1 where nothing is known."""
    steps = np.array([np.nan if s is None else s for s in swap_steps], dtype=np.float64)
    known = steps[np.isfinite(steps)]
    if known.size == 0 or np.ptp(known) == 0:
        return np.ones(len(steps))
    return np.nan_to_num(1.5 - (steps - known.min()) / np.ptp(known), nan=1.0)
