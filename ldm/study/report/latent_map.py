"""The latents of a run in the plane: t-SNE, and the paper's figure 4."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike, NDArray

from ldm.study.report.image_figures import FigureImages, LatentMap
from ldm.study.report.plot_style import (
    COLUMN_WIDTH,
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
from ldm.study.report.results import Results, cells

Floats = NDArray[np.float64]

NEUTRAL = Look("Neutral", "white", "*")
RIM = "black"  # of neutral, and of the thumbnails that show it
NEUTRAL_SIZE = 2.2  # its marker's area against that of a swap: it is what all else is compared with
THUMBNAIL = 0.12  # side, as a share of the panel's
MAX_THUMBNAILS = 10
MAX_VECTOR_POINTS = 1500  # above this the points of a PDF are stored as pixels, or it would be slow to open


def tsne(latents: ArrayLike, seed: int = 0) -> Floats:
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
def figure_4(results: Results, pictures: FigureImages) -> Figure:
    """The latents of each cell in the plane, coloured by attribute; a larger marker is an earlier swap.

    Raises:  NothingToDraw: without a map of any cell of the results.
    """
    shown = [(title, pictures.tsne[cell]) for cell, title in cells(results).items() if cell in pictures.tsne]
    if not shown:
        raise NothingToDraw("pictures.tsne: no map of any cell")
    known = looks(results)
    present = {name for _, latent_map in shown for name in latent_map.attribute}
    legend = swatches([look for key, look in known.items() if key in present], line=False)
    if present - known.keys():
        (neutral,) = swatches([NEUTRAL], line=False)
        neutral.set(markeredgecolor=RIM, markeredgewidth=0.5, markersize=5.5)
        legend.append(neutral)
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
    """One map: the swaps by attribute, over them the neutral latents, and thumbnails beside some of the points."""
    points = np.asarray(latent_map.points, dtype=np.float64)
    middle = (points.max(axis=0) + points.min(axis=0)) / 2
    reach = 1.12 * max(float(np.ptp(points, axis=0).max()) / 2, 1e-9)
    area = np.clip(4000 / len(points), 2.5, 12.0) * _strength(latent_map.swap_step)
    names = np.asarray(latent_map.attribute)
    for name in sorted(dict.fromkeys(latent_map.attribute), key=lambda name: name not in known):
        of_name, look, swapped = names == name, known.get(name, NEUTRAL), name in known
        axes.scatter(
            points[of_name, 0],
            points[of_name, 1],
            s=area[of_name] * (1.0 if swapped else NEUTRAL_SIZE),
            color=to_rgba(look.colour, 0.75 if swapped else 0.5),  # what lies under a star shines through
            marker=look.marker,
            linewidths=0 if swapped else 0.5,
            edgecolors=None if swapped else RIM,
            rasterized=len(points) > MAX_VECTOR_POINTS,
        )

    side = 2 * reach * THUMBNAIL
    chosen = spread_out(points, sorted(latent_map.thumbnails), side, middle)
    for i, corner in beside(points, chosen, side, middle, reach).items():
        colour = known[names[i]].colour if names[i] in known else RIM
        nearest = np.clip(points[i], corner, corner + side)
        axes.plot(*zip(points[i], nearest, strict=True), color=colour, linewidth=0.7, zorder=3)
        box = (corner[0], corner[0] + side, corner[1], corner[1] + side)
        axes.imshow(latent_map.thumbnails[i], extent=box, aspect="auto", zorder=4)
        axes.add_patch(Rectangle(tuple(corner), side, side, fill=False, edgecolor=colour, linewidth=0.8, zorder=5))

    axes.set(xlim=(middle[0] - reach, middle[0] + reach), ylim=(middle[1] - reach, middle[1] + reach))
    axes.set(xticks=[], yticks=[], xlabel="t-SNE 1", ylabel="t-SNE 2")


def spread_out(points: Floats, wanted: Sequence[int], apart: float, middle: Floats) -> list[int]:
    """Which of the wanted points get a thumbnail: greedily the one farthest from those chosen.

    Args:    points: (M, 2).  apart: how far, in x or in y, the chosen must lie from each other.  middle: (2,) of the
             panel.
    Returns: indices into points, at most 10, in the order chosen.
    """
    left = list(wanted)
    chosen: list[int] = []
    while left and len(chosen) < MAX_THUMBNAILS:
        from_others = [_distance(points, i, chosen, middle) for i in left]
        chosen.append(left[int(np.argmax(from_others))])
        left = [i for i in left if np.abs(points[i] - points[chosen[-1]]).max() > apart]
    return chosen


def beside(points: Floats, chosen: Sequence[int], side: float, middle: Floats, reach: float) -> dict[int, Floats]:
    """Where the thumbnails go: near their points, where they hide the fewest points and no other thumbnail.

    Args:    points: (M, 2).  chosen: those with a thumbnail, the first placed first.  side: of a thumbnail, in the
             same unit.  middle: (2,) of the panel.  reach: from the middle to the panel's edge.
    Returns: index -> (2,) lower left corner; a thumbnail that finds no room is left out.
    """
    angles = np.arange(16) * (2 * np.pi / 16)
    round_about = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    steps = np.concatenate([side * far * round_about for far in (0.8, 1.2, 1.8, 2.6)])  # near ones first: they win ties
    placed: dict[int, Floats] = {}
    for i in chosen:
        centres = points[i] + steps
        inside = np.abs(centres - middle).max(axis=1) <= reach - 0.55 * side
        for corner in placed.values():
            inside &= np.abs(centres - (corner + side / 2)).max(axis=1) > 1.1 * side
        if inside.any():
            from_points = np.abs(points - centres[:, None]).max(axis=2)  # (centres, M)
            hidden = (from_points <= 0.55 * side).sum(axis=1).astype(np.float64)
            placed[i] = centres[np.where(inside, hidden, np.inf).argmin()] - side / 2
    return placed


def _distance(points: Floats, i: int, chosen: Sequence[int], middle: Floats) -> float:
    others = points[list(chosen)] if chosen else middle[None]
    return float(np.linalg.norm(others - points[i], axis=1).min())


def _strength(swap_steps: Sequence[int | None]) -> Floats:
    """A marker's area against the mean one: 0.5 for the latest swap, 1.5 for the earliest, 1 where nothing is known."""
    steps = np.array([np.nan if s is None else s for s in swap_steps], dtype=np.float64)
    known = steps[np.isfinite(steps)]
    if known.size == 0 or np.ptp(known) == 0:
        return np.ones(len(steps))
    return np.nan_to_num(1.5 - (steps - known.min()) / np.ptp(known), nan=1.0)
