"""The chest phantom: a frontal radiograph drawn as summed attenuation, seen through an exposure curve.

Coordinates are those of `ldm.phantom.chest_anatomy`. Pixel by pixel:

    attenuation = tissue * (1 - AERATION * air * (1 - fluid)) + bones
    image = (1 - exp(-exposure * attenuation)) under the device, + noise

so the fluid changes only pixels where fluid and air are > 0, the device only pixels where its coverage is > 0.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, replace

import numpy as np
from numpy.typing import NDArray

from ldm.phantom.chest_anatomy import (
    Anatomy,
    body_coordinates,
    draw_anatomy,
    heart_distance,
    lateral_wall,
    lung_distance,
    ramp,
    smooth_max,
    smooth_min,
    to_image,
    true_distance,
)
from ldm.phantom.draw import Plane, coverage, curve, ellipse_distance, over, polyline_distance, stream, texture
from ldm.phantom.types import Phantom

AERATION = 0.80  # share of the attenuation that is missing where there is lung
NOISE_STD = 0.012
ENLARGEMENT = 0.17  # of the cardiothoracic ratio by cardiomegaly, so that even the smallest heart exceeds CTR_RANGE


def render(seed: int, attributes: Mapping[str, bool], size: int = 128, tied: bool = True) -> Phantom:
    """Draw one chest. attributes: pleural_effusion, support_devices, and on request cardiomegaly; see
    `ldm.phantom.render`."""
    a = draw_anatomy(seed, tied)
    s, y = body_coordinates(a, size)
    masks = {}

    # What the seed fixes, and the size of the heart
    lungs = {side: lung_distance(a, s, y, side) for side in (-1, 1)}
    heart = coverage(heart_distance(a, s, y), 0.035)
    lung = np.maximum(coverage(lungs[-1], 0.030), coverage(lungs[1], 0.030))
    if attributes.get("cardiomegaly", False):
        enlarged = enlarged_heart(a, heart, s, y)
        masks["cardiomegaly"] = (enlarged > heart) & (lung > 0)
        heart = enlarged
    air = lung * (1.0 - 0.90 * heart)
    tissue = tissue_thickness(a, s, y) * (1.0 + 0.04 * texture(stream(seed, "chest texture"), size, 6))
    hard = bones(a, s, y, size) * np.minimum(2.0 * tissue, 1.0) + vessels(a, seed, size) * air

    # What the attributes add, in this order
    if attributes["pleural_effusion"]:
        fluid = fluid_coverage(a, lungs, s, y)
        masks["pleural_effusion"] = (fluid > 0) & (air > 0)
        air = air * (1.0 - fluid)
    image = 1.0 - np.exp(-a.exposure * (tissue * (1.0 - AERATION * air) + hard))
    if attributes["support_devices"]:
        shade, alpha = device(a, s, y, size)
        masks["support_devices"] = alpha > 0
        image = over(image, shade, alpha)

    noise = stream(seed, "chest noise").standard_normal((size, size), dtype=np.float32)
    image = np.clip(image + NOISE_STD * noise, 0.0, 1.0).astype(np.float32)
    anatomy = {name: float(value) for name, value in asdict(a).items()}
    return Phantom("chest", seed, np.repeat(image[..., None], 3, axis=2), masks, dict(attributes), anatomy)


# ---------------------------------------------------------------- attenuation


def tissue_thickness(a: Anatomy, s: Plane, y: Plane) -> Plane:
    """Soft tissue along the ray, about 1 at the middle: neck, shoulders, trunk, arms, breasts, air in the stomach."""
    out = np.abs(s)
    half = a.chest_half_width + 0.062 + 0.030 * a.habitus + 0.02 * ramp(0.6, 1.0, y)
    shoulder = true_distance(0.030 + 0.50 * np.maximum(out - 0.09, 0.0) ** 1.25 - y, len(s))
    trunk = smooth_max(shoulder, out - half, 0.08)
    neck = smooth_max(out - (0.105 + 0.012 * a.habitus), y - 0.3, 0.05)
    arm = arm_distance(out, y)
    body = smooth_min(smooth_min(trunk, neck, 0.06), arm, 0.03)
    depth = np.maximum(-body, 0.0)
    thick = 0.88 * (1.0 - np.exp(-depth / 0.050)) * (0.78 + 0.30 * ramp(0.0, 0.9, y))
    breast = coverage(ellipse_distance(out, y, 0.55 * a.chest_half_width, a.base_y - 0.12, 0.17, 0.15), 0.12)
    liver = ramp(a.base_y - a.dome_height - 0.06, a.base_y + 0.05, y)
    gas = coverage(ellipse_distance(s, y, 0.16, a.base_y + 0.005, 0.085, 0.045), 0.05)
    return thick * (1.0 + 0.10 * a.breast * breast + 0.22 * liver - 0.30 * a.gas * gas)


def arm_distance(out: Plane, y: Plane) -> Plane:
    """Signed distance to the upper arms: capsules from the shoulders outwards and down."""
    ax, ay, bx, by = 0.415, 0.235, 0.56, 0.95
    t = np.clip(((out - ax) * (bx - ax) + (y - ay) * (by - ay)) / ((bx - ax) ** 2 + (by - ay) ** 2), 0.0, 1.0)
    return np.hypot(out - ax - t * (bx - ax), y - ay - t * (by - ay)) - (0.085 - 0.01 * t)


def beads(points: NDArray[np.floating], radius: float, size: int, weight: NDArray[np.floating] | float = 1.0) -> Plane:
    """A soft stroke: the sum of Gaussians at densely sampled points, about `weight` high at its middle.

    sum_i w_i exp(-(x - x_i)^2 / r^2) exp(-(y - y_i)^2 / r^2): separable, hence one matrix product.

    points: (..., P, 2) in image coordinates, one curve for each leading index.
    """
    points = np.asarray(points, dtype=np.float32)
    step = np.linalg.norm(np.gradient(points, axis=-2), axis=-1)
    weight = (np.broadcast_to(weight, step.shape) * step / (radius * np.sqrt(np.pi))).reshape(-1, 1).astype(np.float32)
    flat = points.reshape(-1, 2)
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size
    columns = np.exp(-(((centres - flat[:, :1]) / radius) ** 2))
    rows = np.exp(-(((centres - flat[:, 1:]) / radius) ** 2))
    return (rows * weight).T @ columns


def bones(a: Anatomy, s: Plane, y: Plane, size: int) -> Plane:
    """Spine with vertebrae, ribs, clavicles, heads of the humeri; less the air of the windpipe."""
    out = np.abs(s)
    vertebrae = 1.0 + 0.16 * np.sin(2 * np.pi * y / 0.068)
    spine = 0.26 * coverage(out - 0.040, 0.030) * vertebrae * ramp(-0.1, 0.5, y)
    top = (a.apex_y + 0.035 + a.rib_spacing * np.arange(9))[:, None]
    wall = lateral_wall(a, top + 0.08) + 0.008
    # behind: from the spine up and out, then down to the wall; in front: on down and inwards
    back = np.stack(
        [_at(0.04, top), _at(0.45 * wall, top - 0.045), _at(0.95 * wall, top - 0.01), _at(wall, top + 0.085)], 1
    )
    front = np.stack(
        [
            _at(wall, top + 0.085),
            _at(0.98 * wall, top + 0.15),
            _at(0.70 * wall, top + 0.20),
            _at(0.38 * wall, top + 0.20),
        ],
        1,
    )[:6]
    y0, y1 = a.apex_y + 0.090, a.apex_y + 0.045 - a.clavicle_slope
    collar = np.array([(0.030, y0), (0.14, y0 + 0.005), (0.20, y1 - 0.030), (0.385, y1 + 0.045)])
    ribs = a.rib_strength * (beads(both_sides(a, back), 0.017, size) + 0.6 * beads(both_sides(a, front), 0.017, size))
    clavicles = 0.20 * beads(both_sides(a, collar[None]), 0.016, size)
    humerus = 0.22 * coverage(ellipse_distance(out, y, 0.425, 0.235, 0.055, 0.06), 0.05)
    windpipe = 0.22 * coverage(np.maximum(np.abs(s + 0.004) - 0.014, y - (a.apex_y + 0.19)), 0.018)
    return spine + ribs + clavicles + humerus - windpipe


def _at(s: NDArray[np.floating] | float, y: NDArray[np.floating]) -> NDArray[np.float64]:
    """Points (P, 2) from columns of s and y."""
    return np.concatenate([np.broadcast_to(s, y.shape), y], axis=1)


def both_sides(a: Anatomy, control: NDArray[np.floating]) -> NDArray[np.float64]:
    """Curves with control points (n, 4, 2) in s, y, and their mirror images -> image points (2 n, 24, 2)."""
    return to_image(a, curve(np.concatenate([control, control * (-1.0, 1.0)])))


def vessels(a: Anatomy, seed: int, size: int) -> Plane:
    """The branching vessels of both hila: thick at the root, fading outwards."""
    rng = stream(seed, "chest vessels")
    # upwards, outwards, two downwards (the lower lobes carry most of the blood), on either side
    side = np.repeat([-1.0, 1.0], 4)
    angle = np.tile([-1.0, -0.15, 0.55, 1.0], 2) + rng.uniform(-0.15, 0.15, 8)
    reach = np.tile([0.17, 0.17, 0.24, 0.27], 2) * rng.uniform(0.9, 1.1, 8)
    ahead = np.stack([side * np.cos(angle), np.sin(angle)], axis=1)
    aside = np.stack([-ahead[:, 1], ahead[:, 0]], axis=1) * (side * rng.uniform(-0.03, 0.06, 8))[:, None]
    rise = a.apex_y + np.where(side < 0, 0.29, 0.27)
    start = np.stack([side * (0.070 + 0.0135 * (angle - 0.2)), rise + 0.05 * (angle - 0.2)], axis=1)
    tip = reach[:, None] * ahead
    stems = curve(np.stack([start, start + 0.3 * tip, start + 0.7 * tip, start + tip + aside], axis=1))
    fade = np.linspace(1.0, 0.1, 24)
    along = np.linspace(0.0, 0.45, 24)[:, None]
    twigs = []
    for turn, fork in ((-0.5, 9), (0.45, 13)):
        way = reach[:, None] * np.stack([side * np.cos(angle + turn), np.sin(angle + turn)], axis=1)
        twigs.append(stems[:, fork, None] + along * way[:, None])
    trunks, branches = to_image(a, stems), to_image(a, np.concatenate(twigs))
    root = 0.17 * beads(trunks, 0.024, size, fade**3)
    return root + 0.14 * beads(trunks, 0.0145, size, fade) + 0.06 * beads(branches, 0.013, size, fade)


# ---------------------------------------------------------------- attributes


def enlarged_heart(a: Anatomy, heart: Plane, s: Plane, y: Plane) -> Plane:
    """Coverage of a heart that is wider by ENLARGEMENT, and holds the patient's own. Nothing else moves."""
    wide = replace(a, ctr=a.ctr + ENLARGEMENT)
    return np.maximum(heart, coverage(heart_distance(wide, s, y), 0.035))


def fluid_coverage(a: Anatomy, lungs: Mapping[int, Plane], s: Plane, y: Plane) -> Plane:
    """Pleural fluid: the lung below a meniscus that climbs towards the chest wall."""
    side = 1 if a.effusion_side > 0 else -1
    out = side * s / a.chest_half_width
    level = a.base_y - a.dome_height - 0.035 - 0.20 * (a.effusion_severity - 0.5)
    meniscus = level - a.effusion_climb * np.clip(out, 0.0, 1.1) ** 5
    inside = coverage(lungs[side] - 0.010, 0.030)
    return 0.94 * inside * coverage(meniscus - y, 0.055)


def device(a: Anatomy, s: Plane, y: Plane, size: int) -> tuple[Plane, Plane]:
    """A pacemaker: shade and coverage of its can and of the lead to the heart's apex, at least 4 pixels of 128 wide."""
    side = a.device_side
    cx, cy = side * a.device_x * a.chest_half_width, a.apex_y + a.device_y
    c, t = math.cos(0.25), side * math.sin(0.25)
    u, v = c * (s - cx) + t * (y - cy), c * (y - cy) - t * (s - cx)
    box = np.hypot(np.maximum(np.abs(u) - 0.034, 0.0), np.maximum(np.abs(v) - 0.022, 0.0)) - 0.024
    can = coverage(box, 0.014)
    # The lead: from the can along the clavicle to the vena cava, down the right border of the heart, across to the apex
    width = a.ctr * 2 * a.chest_half_width
    floor = a.base_y - a.dome_height + 0.030
    upper = np.array(
        [(cx - side * 0.04, cy - 0.03), (cx - side * 0.10, cy - 0.08), (0.02 * side, cy - 0.07), (-0.040, cy + 0.08)]
    )
    lower = np.array(
        [(-0.040, cy + 0.08), (-0.085, floor - 0.19), (-0.06, floor - 0.01), (0.42 * width, floor - 0.050)]
    )
    path = to_image(a, np.concatenate([curve(upper, 20), curve(lower, 20)[1:]]))
    lead = coverage(polyline_distance(size, path, 0.03) - 0.0165, 0.012)
    shade = np.where(can >= lead, 0.86 + 0.10 * ramp(-0.014, 0.004, v), 0.97)  # the can's upper part is clear resin
    return shade.astype(np.float32), 0.97 * np.maximum(can, lead)
