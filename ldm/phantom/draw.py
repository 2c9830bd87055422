"""What the phantoms are drawn with: random streams, soft edges, curves, textures, compositing.

H = W = size pixels. Coordinates are in units of the image side: x right, y down, both in (0, 1), at pixel centres.
Every edge has compact support: coverage is exactly 0 outside, so that a shape changes no pixel beyond its mask.
"""

import math
import zlib
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.floating]  # (H, W), float32


def stream(seed: int, part: str) -> np.random.Generator:
    """The random stream of one named part of one phantom.

    A stream for each part, so that drawing or omitting one part never shifts another part's draws.
    """
    return np.random.Generator(np.random.PCG64([seed, zlib.crc32(part.encode())]))


def grid(size: int) -> tuple[Plane, Plane]:
    """x and y at the pixel centres, each (H, W)."""
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = np.meshgrid(centres, centres)
    return x, y


def coverage(distance: Plane, edge: float) -> Plane:
    """Soft inside: 1 where the signed distance <= -edge / 2, exactly 0 where >= edge / 2, smoothstep between."""
    u = np.clip(0.5 - distance / edge, 0.0, 1.0)
    return (u * u * (3.0 - 2.0 * u)).astype(np.float32)


def ellipse_distance(x: Plane, y: Plane, cx: float, cy: float, rx: float, ry: float, angle: float = 0.0) -> Plane:
    """Approximate signed distance to an ellipse turned by `angle` (radians): first-order exact at its border."""
    c, s = math.cos(angle), math.sin(angle)  # Python floats keep the planes in float32
    u, v = (c * (x - cx) + s * (y - cy)), (-s * (x - cx) + c * (y - cy))
    level = np.sqrt((u / rx) ** 2 + (v / ry) ** 2)
    slope = np.sqrt((u / rx**2) ** 2 + (v / ry**2) ** 2)
    return (level * (level - 1.0) / np.maximum(slope, 1e-6)).astype(np.float32)


def polyline_distance(size: int, points: NDArray[np.floating], reach: float) -> Plane:
    """Distance to an open polyline, (H, W); infinite beyond `reach`, so that each segment costs only its own window.

    points: (P, 2), x then y.
    """
    x, y = grid(size)
    best = np.full((size, size), np.inf, dtype=np.float32)
    for (ax, ay), (bx, by) in pairwise(points):
        left, right = _window(min(ax, bx) - reach, max(ax, bx) + reach, size)
        top, bottom = _window(min(ay, by) - reach, max(ay, by) + reach, size)
        px, py = x[top:bottom, left:right] - ax, y[top:bottom, left:right] - ay
        dx, dy = bx - ax, by - ay
        u = np.clip((px * dx + py * dy) / max(dx * dx + dy * dy, 1e-12), 0.0, 1.0)
        distance = np.hypot(px - u * dx, py - u * dy)
        window = best[top:bottom, left:right]
        np.minimum(window, np.where(distance <= reach, distance, np.inf), out=window)
    return best


def _window(low: float, high: float, size: int) -> tuple[int, int]:
    """The pixel range that covers [low, high] in units of the side."""
    return max(0, math.floor(low * size)), min(size, math.ceil(high * size))


def curve(control: NDArray[np.floating], points: int = 24) -> NDArray[np.float64]:
    """(points, 2) samples of the cubic Bezier curve with control points (4, 2)."""
    u = np.linspace(0.0, 1.0, points)[:, None]
    basis = np.concatenate([(1 - u) ** 3, 3 * u * (1 - u) ** 2, 3 * u**2 * (1 - u), u**3], axis=1)
    return basis @ np.asarray(control, dtype=np.float64)


def texture(rng: np.random.Generator, size: int, cells: int) -> Plane:
    """Smooth noise of unit variance at its nodes: `cells` x `cells` random values, interpolated with smoothstep."""
    nodes = rng.standard_normal((cells + 1, cells + 1))
    place = (np.arange(size) + 0.5) / size * cells
    low = np.minimum(place.astype(int), cells - 1)
    u = place - low
    u = u * u * (3.0 - 2.0 * u)
    rows = nodes[low] * (1 - u)[:, None] + nodes[low + 1] * u[:, None]
    return (rows[:, low] * (1 - u) + rows[:, low + 1] * u).astype(np.float32)


def over(image: NDArray[np.floating], colour: NDArray[np.floating] | float, alpha: Plane) -> NDArray[np.floating]:
    """`colour` over `image` with coverage `alpha`: exactly `image` where alpha is 0. image: (H, W) or (H, W, 3)."""
    weight = alpha if image.ndim == 2 else alpha[..., None]
    return image + weight * (colour - image)
