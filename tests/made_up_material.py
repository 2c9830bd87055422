"""Drawn phantoms as material of figures: an attribute is laid over a phantom, a little more at every step."""

from functools import cache

import numpy as np
from made_up_results import SWAP_STEPS

from ldm import phantom
from ldm.study.report.plots import FigureImages, LatentMap, tsne

DOMAINS = {"chest": ("chest", frozenset()), "mel": ("skin", frozenset({"melanoma"})), "nv": ("skin", frozenset())}
KEYS = {"chest": ("pleural_effusion", "support_devices"), "skin": ("hair", "gel_bubble", "ruler", "ink")}


@cache
def shown(domain: str, seed: int, attributes: frozenset[str]) -> np.ndarray:
    return phantom.render(domain, seed, dict.fromkeys(attributes, True), size=64).image


def faded(cell: str, seed: int, attribute: str, amount: float) -> np.ndarray:
    """A phantom with its attribute faded in by `amount` in [0, 1], (64, 64, 3) bytes."""
    domain, base = DOMAINS[cell]
    without, present = shown(domain, seed, base), shown(domain, seed, base | {attribute})
    return np.rint(255 * (without + amount * (present - without))).astype(np.uint8)


def strip(cell: str, seed: int, attribute: str, labels: list[str]) -> list[tuple[str, np.ndarray]]:
    return [(label, faded(cell, seed, attribute, i / (len(labels) - 1))) for i, label in enumerate(labels)]


def made_up_material(seeds: int = 2, map_seeds: int = 30) -> FigureImages:
    """Swaps, curves and a map of every cell; the latents of the map are drawn at random around each attribute."""
    swaps = ["neutral", *(f"s = {s}" for s in sorted(SWAP_STEPS, reverse=True))]
    curve = [f"u = {u:.2f}" for u in np.linspace(0, 1, 17)]
    rows, curves = (
        {
            cell: {seed: {a: strip(cell, seed, a, labels) for a in KEYS[domain]} for seed in range(seeds)}
            for cell, (domain, _) in DOMAINS.items()
        }
        for labels in (swaps, curve)
    )
    return FigureImages(rows, curves, {cell: made_up_map(cell, map_seeds) for cell in DOMAINS})


def made_up_map(cell: str, seeds: int) -> LatentMap:
    rng = np.random.default_rng(5)
    names = KEYS[DOMAINS[cell][0]]
    directions = {name: rng.standard_normal(64) for name in names}
    points = []
    for seed in range(seeds):
        start = 0.5 * rng.standard_normal(64)
        points.append((start, "neutral", None, seed))
        points += [
            (start + (50 - s) / 30 * directions[a] + 0.1 * rng.standard_normal(64), a, s, seed)
            for a in names
            for s in SWAP_STEPS
        ]
    latents, attribute, swap_step, seed_of = zip(*points, strict=True)
    thumbnails = {
        i: faded(cell, seed_of[i], attribute[i] if swap_step[i] else names[0], (50 - (swap_step[i] or 50)) / 45)
        for i in range(0, len(points), 7)
        if seed_of[i] < 8
    }
    return LatentMap(tsne(np.array(latents)), attribute, swap_step, seed_of, thumbnails)
