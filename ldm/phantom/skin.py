"""Skin phantoms: a dermoscopic lesion, nevus or melanoma, with hair, gel bubbles, a ruler and ink.

The image is composed pointwise, in one fixed order: skin, lesion, ink, hair, gel bubbles, ruler, illumination, noise.
Each part has compact support and its own random stream, so switching one attribute changes no pixel outside its mask.

Lengths are in units of the image side; `_PX` is one pixel of a 128-pixel image. Nothing that is drawn is much
finer than 4 pixels, so that an autoencoder which downsamples 8 times can keep it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ldm.phantom.draw import Plane, coverage, curve, grid, over, polyline_distance, stream, texture
from ldm.phantom.types import Phantom

Image = NDArray[np.float32]  # (H, W, 3)
Mask = NDArray[np.bool_]  # (H, W)
Pick = Callable[[float, float, str], float]

# What can be seen in every image of a seed, whatever its attributes: name -> range.
ANATOMY = {
    "x": (0.40, 0.60),  # lesion centre
    "y": (0.40, 0.60),
    "radius": (0.15, 0.22),  # geometric mean of the two half axes
    "elongation": (1.12, 1.50),  # long over short axis
    "axis": (-1.35, 1.35),  # of the long axis, radians; short of +-pi/2, where its direction would flip
    "tone": (0.0, 1.0),  # Fitzpatrick I .. VI
    "redness": (-1.0, 1.0),
    "pigment": (0.75, 1.15),  # optical depth of the nevus
}

_PX = 1.0 / 128.0
_STENCIL_LESION = {"radius": 0.20, "elongation": 1.2, "axis": 0.0, "room": 0.40}  # 0.40: what every lesion leaves
_TEMPLATE = 3  # tied mode: the seed of the irregularities that all images share; chosen by eye
_TONES = np.array(  # Fitzpatrick I .. VI
    [
        [0.94, 0.78, 0.71],
        [0.90, 0.71, 0.61],
        [0.82, 0.61, 0.48],
        [0.70, 0.49, 0.36],
        [0.54, 0.36, 0.26],
        [0.40, 0.26, 0.19],
    ]
)
_MELANIN = np.array([0.60, 0.95, 1.20], dtype=np.float32)  # absorption of red, green, blue


@dataclass(frozen=True)
class Scene:
    """What every part of one phantom is drawn from."""

    seed: int
    size: int
    tied: bool
    unit: Mapping[str, float]  # the anatomy's draws, each in [0, 1)
    anatomy: Mapping[str, float]  # the same, scaled to the ranges of `ANATOMY`

    def placement(self, part: str) -> tuple[np.random.Generator, Pick]:
        """How a part that is added lies: its irregularities, and pick(low, high, fact) for its main parameters.

        Tied: the irregularities are the same in all images, and the visible fact sets the parameter.
        Free: both are drawn from the seed's own stream for that part.
        """
        rng = stream(_TEMPLATE if self.tied else self.seed, part)

        def pick(low: float, high: float, fact: str) -> float:
            return low + (high - low) * (self.unit[fact] if self.tied else float(rng.random()))

        return rng, pick

    def laid_over(self, part: str) -> tuple[np.random.Generator, Callable[[float, float], float], Mapping[str, float]]:
        """How a thing on the skin lies: its irregularities, pick(low, high) for its main parameters, and the lesion
        that it keeps clear of.

        Tied: one stencil for all images, which moves with the lesion's centre if it lies around the lesion.
        Free: all is drawn from the seed's own stream for that part, and the lesion is the one that is there.
        """
        rng = stream(_TEMPLATE if self.tied else self.seed, part)
        if not self.tied:
            return rng, lambda low, high: float(rng.uniform(low, high)), self.anatomy
        return rng, lambda low, high: (low + high) / 2, {**self.anatomy, **_STENCIL_LESION}


def render(seed: int, attributes: Mapping[str, bool], size: int = 128, tied: bool = True) -> Phantom:
    """Draw one dermoscopic phantom.

    Args:    seed: the subject: skin, lesion geometry, illumination, noise.  attributes: melanoma (False is a nevus)
             and any of `ARTIFACTS`; a name left out is absent.  tied: place what is added as a fixed function of
             the visible anatomy, so that the counterfactual is unique; else from the seed's own hidden draws.
    Returns: the phantom, with a mask for each attribute that is present; melanoma's covers both lesion outlines.
    Raises:  ValueError: an attribute's name is unknown.
    """
    names = ["melanoma", *ARTIFACTS]
    if unknown := sorted(set(attributes) - set(names)):
        raise ValueError(f"attributes: {unknown} unknown, expected some of {names}")
    present = {name: bool(attributes.get(name, False)) for name in names}

    rng = stream(seed, "anatomy")
    unit = {name: float(rng.random()) for name in ANATOMY}
    anatomy = {name: low + (high - low) * unit[name] for name, (low, high) in ANATOMY.items()}
    scene = Scene(seed, size, tied, unit, anatomy)

    masks: dict[str, Mask] = {}
    image, lesion_mask = _lesion(_skin(scene), scene, present["melanoma"])
    if present["melanoma"]:
        masks["melanoma"] = lesion_mask
    for name, lay_over in ARTIFACTS.items():
        if present[name]:
            image, masks[name] = lay_over(image, scene)

    noise = 0.01 * stream(seed, "noise").standard_normal((size, size, 1), dtype=np.float32)
    image = np.clip(image * _illumination(scene)[..., None] + noise, 0.0, 1.0).astype(np.float32)
    return Phantom(domain="skin", seed=seed, image=image, masks=masks, attributes=present, anatomy=anatomy)


# --- skin and light ---


def _tone(anatomy: Mapping[str, float]) -> NDArray[np.float64]:
    """(3,) the mean colour of the skin."""
    place = anatomy["tone"] * (len(_TONES) - 1)
    colour = np.array([np.interp(place, range(len(_TONES)), _TONES[:, c]) for c in range(3)])
    return colour * (1.0 + anatomy["redness"] * np.array([0.02, -0.035, -0.02]))


def _skin(scene: Scene) -> Image:
    """Mottled skin: low-frequency changes of melanin (brown) and of blood (red)."""
    rng, size = stream(scene.seed, "skin"), scene.size
    melanin = 0.045 * texture(rng, size, 3) + 0.03 * texture(rng, size, 7)
    blood = 0.04 * texture(rng, size, 4) + 0.025 * texture(rng, size, 9)
    depth = melanin[..., None] * _MELANIN + blood[..., None] * np.array([0.15, 1.0, 0.8], dtype=np.float32)
    return _tone(scene.anatomy).astype(np.float32) * np.exp(-depth)


def _illumination(scene: Scene) -> Plane:
    """The dermatoscope's light: brightest near the middle, falling off towards the corners, a little oblique."""
    rng = stream(scene.seed, "light")
    x, y = grid(scene.size)
    cx, cy = rng.uniform(0.4, 0.6, 2).tolist()
    square = (x - cx) ** 2 + (y - cy) ** 2
    tilt = rng.uniform(-0.06, 0.06, 2).tolist()
    falloff, brightness = rng.uniform(0.15, 0.65), rng.uniform(1.0, 1.09)
    oblique = tilt[0] * (x - 0.5) + tilt[1] * (y - 0.5)
    return (brightness * (1.0 - falloff * square - 0.5 * square**2 + oblique)).astype(np.float32)


# --- lesion ---


def _lesion(skin: Image, scene: Scene, melanoma: bool) -> tuple[Image, Mask]:
    """Nevus or melanoma on the skin, and the union of both supports.

    Lesion frame: u along the long axis, v across, rho = 1 near the border, theta from the long axis.
    Both borders are radial Fourier series with the same phases; only the melanoma's has high harmonics and notches.
    """
    anatomy = scene.anatomy
    rng = stream(scene.seed, "lesion")
    phases = rng.uniform(0.0, 2.0 * np.pi, 2).tolist()
    mottle = texture(rng, scene.size, 6)
    period, kind = rng.uniform(8.5, 11.0) * _PX, rng.uniform(-1.0, 1.0)
    hidden, pick = scene.placement("melanoma")

    x, y = grid(scene.size)
    dx, dy = x - anatomy["x"], y - anatomy["y"]
    c, s = math.cos(anatomy["axis"]), math.sin(anatomy["axis"])
    stretch = math.sqrt(anatomy["elongation"])
    u = (c * dx + s * dy) / (anatomy["radius"] * stretch)
    v = (c * dy - s * dx) / (anatomy["radius"] / stretch)
    rho, theta = np.hypot(u, v), np.arctan2(v, u)

    shared = np.cos(2 * theta + phases[0]) + np.cos(3 * theta + phases[1])
    rough = np.cos(5 * theta + hidden.uniform(0, 2 * np.pi)) + np.cos(7 * theta + hidden.uniform(0, 2 * np.pi))
    place = pick(-1.2, 1.2, "y")
    notches = sum(np.maximum(np.cos(theta - place - at), 0.0) ** 18 for at in (0.7, 2.9))
    bulge = np.maximum(np.cos(theta - place - 5.1), 0.0) ** 3
    nevus_border = 1.0 + 0.045 * shared
    melanoma_border = 1.09 + 0.075 * shared + 0.05 * rough - 0.26 * notches + 0.16 * bulge
    nevus_alpha = coverage((rho - nevus_border) * anatomy["radius"], 9 * _PX)
    melanoma_alpha = coverage((rho - melanoma_border) * anatomy["radius"], 4 * _PX)
    mask = (nevus_alpha > 0) | (melanoma_alpha > 0)

    # Pigment network (kind < 0: dark meshes) or globules (kind > 0), fading towards the border.
    waves = sum(
        np.cos(2 * np.pi / period * (math.cos(turn) * dx + math.sin(turn) * dy) + 0.8 * mottle)
        for turn in (anatomy["axis"] + k * np.pi / 3 for k in range(3))
    )
    network = kind * waves / 3.0 * np.clip(1.15 - rho, 0.0, 1.0)
    depth = anatomy["pigment"] * (1.0 + 0.10 * mottle - 0.22 * rho**2 + 0.26 * network)
    if not melanoma:
        return over(skin, _absorb(skin, depth), nevus_alpha), mask

    brown = _absorb(skin, np.maximum(depth * 1.2 + 0.20 + 0.30 * mottle, 0.7))
    colour = _melanoma_areas(brown, u, v, mottle, anatomy["tone"], hidden, pick)
    return over(skin, colour, melanoma_alpha), mask


def _melanoma_areas(
    brown: Image, u: Plane, v: Plane, mottle: Plane, tone: float, hidden: np.random.Generator, pick: Pick
) -> Image:
    """The melanoma's pink, blue-grey and black areas, each to another side of its centre. (u, v): the lesion frame."""
    turn, dim = pick(-1.5, 1.5, "x"), np.float32(1.0 - 0.45 * tone)
    pink, blue_grey = np.array([0.88, 0.50, 0.48]) * dim, np.array([0.43, 0.49, 0.58]) * dim
    black = np.array([0.08, 0.06, 0.07])
    colour = brown
    for at, distance, radius, opacity, paint in (
        (4.5, 0.72, pick(0.36, 0.50, "redness"), 0.80, pink),
        (2.0, 0.42, pick(0.62, 0.46, "elongation"), 0.80, blue_grey),
        (0.1, 0.55, pick(0.44, 0.64, "pigment"), 0.93, black),
    ):
        angle = at + turn + hidden.uniform(-0.3, 0.3)
        c, s = math.cos(angle), math.sin(angle)
        outward, sideways = c * u + s * v - distance, c * v - s * u
        gap = np.hypot(outward * 1.2, sideways * 0.85) - radius * (1.0 + 0.22 * mottle)
        colour = over(colour, paint.astype(np.float32), opacity * coverage(gap, 0.55))
    return colour


def _absorb(skin: Image, depth: Plane) -> Image:
    """Skin seen through melanin of that optical depth (Beer and Lambert)."""
    return (skin * np.exp(-np.maximum(depth, 0.0)[..., None] * _MELANIN)).astype(np.float32)


def _beside(anatomy: Mapping[str, float], angle: float, fraction: float, margin: float) -> tuple[float, float]:
    """The point beside the lesion on the ray at `angle` from its centre: `fraction` of the way from its outermost
    border to the image's border less `margin`."""
    c, s = math.cos(angle), math.sin(angle)
    turn, stretch = angle - anatomy["axis"], math.sqrt(anatomy["elongation"])
    inner = 1.15 * anatomy["radius"] / math.hypot(math.cos(turn) / stretch, math.sin(turn) * stretch)
    room_x = ((1 - margin if c > 0 else margin) - anatomy["x"]) / (c if abs(c) > 1e-6 else 1e-6)
    room_y = ((1 - margin if s > 0 else margin) - anatomy["y"]) / (s if abs(s) > 1e-6 else 1e-6)
    room = anatomy["room"] - margin if "room" in anatomy else min(room_x, room_y)
    length = inner + fraction * (room - inner)
    return anatomy["x"] + length * c, anatomy["y"] + length * s


# --- what lies on the skin ---


def _ink(image: Image, scene: Scene) -> tuple[Image, Mask]:
    """Violet dashes of a surgical marker around the lesion."""
    size, anatomy = scene.size, scene.anatomy
    rng, pick, lesion = scene.laid_over("ink")
    count = 2 + int(pick(0.0, 3.0))
    first, half_width = pick(0.5, 0.9), pick(3.0, 3.8) * _PX
    alpha = np.zeros((size, size), dtype=np.float32)
    for k in range(count):
        angle = lesion["axis"] + first + 2 * np.pi * k / count + rng.uniform(-0.15, 0.15)
        sweep, bow = rng.uniform(0.30, 0.42), rng.uniform(-0.1, 0.1)
        ends = [_beside(lesion, angle + side * sweep, 0.50 + bow * side, 5 * _PX) for side in (-1.0, -0.4, 0.4, 1.0)]
        distance = polyline_distance(size, curve(np.array(ends), points=7), half_width + 2 * _PX)
        alpha = np.maximum(alpha, coverage(distance - half_width, 2.5 * _PX))
    uneven = 0.84 + 0.10 * np.clip(texture(rng, size, 11), -2.4, 1.4)
    hue = pick(0.0, 1.0)
    colour = np.array([0.22 + 0.14 * hue, 0.13, 0.52 + 0.14 * anatomy["tone"]], dtype=np.float32)
    return over(image, colour, (alpha * uneven).astype(np.float32)), alpha > 0


def _hair(image: Image, scene: Scene) -> tuple[Image, Mask]:
    """Curved, tapered hairs across the image, combed one way."""
    size, anatomy = scene.size, scene.anatomy
    rng, pick, _ = scene.laid_over("hair")
    angle = pick(0.0, 2 * np.pi / 3)
    spacing = pick(0.15, 0.21)
    bend, shift = pick(-0.5, 0.5), pick(-0.3, 0.3)
    x, y = grid(size)
    c, s = math.cos(angle), math.sin(angle)
    p = c * (x - 0.5) + s * (y - 0.5)  # along the hairs
    q = c * (y - 0.5) - s * (x - 0.5)  # across
    alpha = np.zeros((size, size), dtype=np.float32)
    for k in range(-4, 5):
        offset = (k + shift + rng.uniform(-0.3, 0.3)) * spacing
        slope, arch = 0.5 * offset + rng.uniform(-0.22, 0.22), bend + rng.uniform(-0.35, 0.35)
        way, width = float(rng.choice([-1.0, 1.0])), rng.uniform(4.2, 5.2) * _PX
        root, tip = rng.uniform(-0.95, -0.45), rng.uniform(0.25, 0.8)
        if abs(offset) > 0.55:
            continue
        gap = np.abs(q - offset - slope * p - arch * p**2) / np.sqrt(1.0 + (slope + 2 * arch * p) ** 2)
        to_tip, to_root = tip - way * p, way * p - root
        taper = np.minimum(np.minimum(to_tip, to_root) / 0.04, np.minimum(0.6 + 0.4 * to_tip / 0.3, 1.0))
        half = 0.5 * width * taper
        alpha = np.maximum(alpha, coverage(gap - half, 2.0 * _PX))
    light = np.clip(1.0 - 2.2 * anatomy["tone"], 0.0, 1.0)  # fair skin, brown hair
    colour = np.array([0.06, 0.045, 0.04]) + light * np.array([0.26, 0.14, 0.06])
    return over(image, colour.astype(np.float32), (0.94 * alpha).astype(np.float32)), alpha > 0


def _gel_bubbles(image: Image, scene: Scene) -> tuple[Image, Mask]:
    """Air bubbles in the immersion gel: bright rings with a glint, lit from the upper left, partly transparent."""
    size = scene.size
    rng, pick, lesion = scene.laid_over("gel_bubble")
    count = 4 + int(pick(0.0, 5.0))
    first = lesion["axis"] + pick(-0.4, 0.4)
    scale = pick(0.85, 1.15)
    stroke, edge = 3.4 * _PX, 2.0 * _PX
    dark, bright = np.array([0.20, 0.13, 0.10], dtype=np.float32), np.array([1.0, 0.99, 0.97], dtype=np.float32)
    x, y = grid(size)
    image, mask = image.copy(), np.zeros((size, size), dtype=bool)
    for k in range(count):
        radius = min(max(scale * rng.uniform(6.5, 11.0), 6.0), 12.0) * _PX
        angle, fraction = first + 2 * np.pi * (k + rng.uniform(-0.25, 0.25)) / count, rng.uniform(0.25, 0.9)
        cx, cy = _beside(lesion, angle, fraction, radius + 3 * _PX)
        rows, columns = _window(cy, radius + stroke, size), _window(cx, radius + stroke, size)
        dx, dy = x[rows, columns] - cx, y[rows, columns] - cy
        r = np.hypot(dx, dy)
        lit = -(dx + dy) / (math.sqrt(2.0) * radius)  # 1 towards the light, -1 away from it
        ring = coverage(np.abs(r - radius) - stroke / 2, edge)
        shade = coverage(np.abs(r - radius + 0.9 * stroke) - stroke / 2, 1.5 * edge)
        body = coverage(r - radius, edge)
        glint = coverage(np.hypot(dx + 0.38 * radius, dy + 0.38 * radius) - 2.3 * _PX, edge)
        patch = over(image[rows, columns], dark, shade * np.clip(0.24 + 0.16 * lit, 0, 1))
        patch = over(patch, 1.0, body * np.clip(0.14 - 0.14 * lit, 0, 1))
        patch = over(patch, bright, np.maximum(ring * (0.72 + 0.2 * np.abs(lit)), glint))
        image[rows, columns] = patch
        mask[rows, columns] |= np.maximum(np.maximum(ring, shade), np.maximum(body, glint)) > 0
    return image, mask


def _window(centre: float, reach: float, size: int) -> slice:
    """The pixels within `reach` of `centre` along one side."""
    return slice(max(0, int((centre - reach) * size)), min(size, int((centre + reach) * size) + 2))


def _ruler(image: Image, scene: Scene) -> tuple[Image, Mask]:
    """Ticks along one side, every fifth one long; white on dark skin."""
    size, anatomy = scene.size, scene.anatomy
    rng, pick, _ = scene.laid_over("ruler")
    side = "bottom" if scene.tied else ("left", "right", "top", "bottom")[rng.integers(4)]
    spacing, tilt = pick(9.5, 12.5) * _PX, pick(-0.06, 0.06)
    phase, baseline = pick(0.0, 5.0), pick(0.0, 1.0) >= 0.5
    x, y = grid(size)
    along, depth = (y, x) if side in ("left", "right") else (x, y)
    depth = depth if side in ("left", "top") else 1.0 - depth
    depth = depth + tilt * (along - 0.5) - 6 * _PX
    tick = np.round(along / spacing - phase)
    gap = np.abs(along - (tick + phase) * spacing)
    length = np.where(tick % 5 == 0, np.float32(17 * _PX), np.float32(10 * _PX))
    distance = np.maximum(gap - 1.7 * _PX, np.abs(depth - length / 2) - length / 2)
    if baseline:
        distance = np.minimum(distance, np.abs(depth) - 1.7 * _PX)
    alpha = coverage(distance.astype(np.float32), 1.6 * _PX)
    colour = np.array([0.93, 0.93, 0.90] if anatomy["tone"] > 0.72 else [0.07, 0.07, 0.08], dtype=np.float32)
    return over(image, colour, 0.93 * alpha), alpha > 0


ARTIFACTS = {"ink": _ink, "hair": _hair, "gel_bubble": _gel_bubbles, "ruler": _ruler}  # in the order of compositing
