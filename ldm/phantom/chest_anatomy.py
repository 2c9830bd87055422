"""The chest phantom's anatomy: what is drawn from the seed, and where it lies.

Body coordinates: s runs from the midline to the viewer's right (the patient's left, where the heart's apex points),
y runs down; both in units of the image side. A side is -1 (the viewer's left) or +1.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ldm.phantom.draw import Plane, ellipse_distance, grid, stream

CTR_RANGE = (0.40, 0.52)
SEVERITY_RANGE = (0.50, 1.00)


@dataclass(frozen=True)
class Anatomy:
    """Everything that is drawn from the seed. Lengths in units of the image side, angles in radians."""

    shift: float  # of the midline; the body leans towards the side to which it is shifted
    lift: float
    tilt: float
    habitus: float  # -1 slim .. +1 wide
    chest_half_width: float
    apex_y: float
    base_y: float  # the costophrenic angles
    dome_height: float
    right_dome_lift: float  # the diaphragm is higher above the liver
    ctr: float  # cardiothoracic ratio: width of the heart / width of the chest
    heart_turn: float
    knob: float  # radius of the aortic arch
    rib_spacing: float
    rib_strength: float
    clavicle_slope: float
    breast: float
    gas: float  # air in the stomach
    exposure: float
    effusion_side: float
    effusion_severity: float
    effusion_climb: float  # how far the meniscus rises at the chest wall
    device_side: float
    device_x: float  # of the can, as a share of the chest's half width
    device_y: float  # of the can, below the apex of the lung


def draw_anatomy(seed: int, tied: bool) -> Anatomy:
    """The parameters of one chest.

    Tied: fluid gathers on the side to which the body leans, and the larger the heart, the more of it; the device sits
    on the patient's left at a fixed place between clavicle and ribs. Free: all of these have their own streams.
    """
    pose, build, thorax, heart = (stream(seed, f"chest {part}") for part in ("pose", "build", "thorax", "heart"))
    lean = 1.0 if pose.random() < 0.5 else -1.0
    habitus = build.uniform(-1.0, 1.0)
    ctr = heart.uniform(*CTR_RANGE)
    fluid, device = stream(seed, "chest effusion"), stream(seed, "chest device")
    if tied:
        share = (ctr - CTR_RANGE[0]) / (CTR_RANGE[1] - CTR_RANGE[0])
        side, severity, climb = lean, SEVERITY_RANGE[0] + share * (SEVERITY_RANGE[1] - SEVERITY_RANGE[0]), 0.11
        device_side, device_x, device_y = 1.0, 0.68, 0.115
    else:
        side = 1.0 if fluid.random() < 0.5 else -1.0
        severity, climb = fluid.uniform(*SEVERITY_RANGE), fluid.uniform(0.08, 0.18)
        device_side = 1.0 if device.random() < 0.7 else -1.0
        device_x, device_y = device.uniform(0.58, 0.76), device.uniform(0.09, 0.15)
    return Anatomy(
        shift=lean * pose.uniform(0.010, 0.030),
        lift=pose.uniform(-0.02, 0.03),
        tilt=lean * math.radians(pose.uniform(1.0, 4.5)),
        habitus=habitus,
        chest_half_width=0.365 + 0.022 * habitus + thorax.uniform(-0.018, 0.018),
        apex_y=thorax.uniform(0.115, 0.170),
        base_y=0.835 - 0.030 * habitus + thorax.uniform(-0.035, 0.035),
        dome_height=thorax.uniform(0.06, 0.12),
        right_dome_lift=thorax.uniform(0.020, 0.040),
        ctr=ctr,
        heart_turn=heart.uniform(0.50, 0.75),
        knob=heart.uniform(0.038, 0.052),
        rib_spacing=thorax.uniform(0.074, 0.084),
        rib_strength=thorax.uniform(0.07, 0.11),
        clavicle_slope=pose.uniform(-0.02, 0.05),
        breast=max(0.0, build.uniform(-0.5, 1.0)),
        gas=max(0.0, build.uniform(-0.6, 1.0)),
        exposure=stream(seed, "chest exposure").uniform(1.02, 1.48),
        effusion_side=side,
        effusion_severity=severity,
        effusion_climb=climb,
        device_side=device_side,
        device_x=device_x,
        device_y=device_y,
    )


# ---------------------------------------------------------------- geometry


def body_coordinates(a: Anatomy, size: int) -> tuple[Plane, Plane]:
    """s and y of every pixel: shifted, and turned about the middle of the chest."""
    x, y = grid(size)
    dx, dy = x - (0.5 + a.shift), y - (0.55 + a.lift)
    c, t = math.cos(a.tilt), math.sin(a.tilt)
    return c * dx + t * dy, c * dy - t * dx + 0.55


def to_image(a: Anatomy, points: NDArray[np.floating]) -> NDArray[np.float64]:
    """Points (..., 2) given as s, y -> x, y of the image: the inverse of `body_coordinates`."""
    c, t = math.cos(a.tilt), math.sin(a.tilt)
    s, y = points[..., 0], points[..., 1] - 0.55
    return np.stack([c * s - t * y + 0.5 + a.shift, t * s + c * y + 0.55 + a.lift], axis=-1)


def smooth_max(p: Plane, q: Plane, width: float) -> Plane:
    """Maximum with its crease rounded over `width`: intersection of two distances (of -p and -q, negated: union)."""
    h = np.maximum(width - np.abs(p - q), 0.0) / width
    return np.maximum(p, q) + h * h * (0.25 * width)


def smooth_min(p: Plane, q: Plane, width: float) -> Plane:
    """Minimum with its crease rounded over `width`: the union of two distances."""
    return -smooth_max(-p, -q, width)


def true_distance(level: Plane, size: int) -> Plane:
    """A level function made a first-order signed distance: level / |grad level|."""
    dy, dx = np.gradient(level, 1.0 / size)
    return level / np.maximum(np.hypot(dx, dy), 1e-3)


def ramp(low: float, high: float, value: Plane) -> Plane:
    """Smoothstep from 0 at `low` to 1 at `high`."""
    u = np.clip((value - low) / (high - low), 0.0, 1.0)
    return u * u * (3.0 - 2.0 * u)


def lateral_wall(a: Anatomy, y: Plane) -> Plane:
    """Half width of the rib cage at height y: narrow at the apex, widest low, drawn in slightly at the base."""
    rise = 1.0 - np.clip((a.apex_y + 0.52 - y) / 0.60, 0.0, 1.0) ** 2
    return a.chest_half_width * (0.62 + 0.38 * rise)


def lung_distance(a: Anatomy, s: Plane, y: Plane, side: int) -> Plane:
    """Signed distance to one lung: a superellipse between mediastinum and chest wall, cut off by the diaphragm."""
    out = side * s
    wall, inner = lateral_wall(a, y), 0.040 + 0.02 * ramp(0.45, 0.75, y)
    middle, half = (wall + inner) / 2, (wall - inner) / 2
    u = np.abs(out - middle) / half
    v = np.abs(y - 0.66) / (0.66 - a.apex_y)
    hull = true_distance(u**2.6 + v**2.4 - 1.0, len(s))
    # The dome: highest a little inside the middle, steep towards the costophrenic angle, gentle towards the heart
    top = a.base_y - a.dome_height - (a.right_dome_lift if side < 0 else 0.0)
    w = (out - 0.45 * a.chest_half_width) / (0.55 * a.chest_half_width)
    drop = np.where(w > 0, w**2.0 * (a.base_y - top), 0.35 * w**2 * a.dome_height)
    return smooth_max(hull, true_distance(y - (top + drop), len(s)), 0.012)


def heart_distance(a: Anatomy, s: Plane, y: Plane) -> Plane:
    """Signed distance to heart and great vessels: two chambers, apex to the patient's left, aortic arch, pedicle."""
    width = a.ctr * 2 * a.chest_half_width
    floor = a.base_y - a.dome_height + 0.030
    left, right = 0.64 * width, 0.36 * width
    r = 0.40 * width
    body = ellipse_distance(s, y, left - 0.50 * width, floor - 0.125, 0.53 * width, 0.34 * width, a.heart_turn)
    atrium = ellipse_distance(s, y, 0.30 * r - right + 0.055, floor - 0.13, 0.055 + 0.25 * r, 0.125)
    heart = smooth_min(body, atrium, 0.06)
    pedicle = np.maximum(np.abs(s - 0.005) - 0.052, np.maximum(y - (floor - 0.10), 0.05 - y))
    arch = ellipse_distance(s, y, 0.048, a.apex_y + 0.165, a.knob, a.knob * 1.1)
    trunk = ellipse_distance(s, y, 0.048, a.apex_y + 0.265, 0.045, 0.060)
    vessels = smooth_min(smooth_min(pedicle, arch, 0.025), trunk, 0.03)
    return smooth_min(heart, vessels, 0.05)
