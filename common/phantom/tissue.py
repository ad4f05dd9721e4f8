"""The head as an implicit function: which signal lies at a point.

Volumes and single slices both ask ``head_signal``, so they cannot drift apart. Points are (n, 3, p): n patients, three
coordinates in mm in the frame of ``anatomy``, p points.

Design note: the cortex is folded by a random field. The zero set of a band-limited field on the surface is a
labyrinth of lines about half a wavelength apart, much as sulci are; each line is drawn inwards as a sulcus, and
whatever lies within a ribbon's thickness of a sulcus or of the outer surface is grey matter.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from common.phantom.anatomy import NUM_WAVES, Anatomy, Array

_HALF_LENGTH, _HALF_WIDTH, _HEIGHT, _DEPTH = 86.0, 67.0, 66.0, 60.0
_ABOVE_BASE = 12.0  # from this height on the floor of the skull and the hindbrain change nothing, and can be left out


class Tissues(NamedTuple):
    """Signal of each tissue, floats or arrays that broadcast against the points; air is 0."""

    wm: Array | float
    gm: Array | float
    csf: Array | float
    fat: Array | float


def depth_below_surface(anatomy: Anatomy, points: Array, *, skull_stripped: bool) -> Array:
    """How far inside the skin, or the inner surface of the skull if that is stripped, points lie.

    Args:
        anatomy: n patients.
        points: (n, 3, p), head frame.
        skull_stripped: measure from the skull's inner surface.

    Returns:
        (n, p) in mm along the line to the centre, negative outside.
    """
    x, y, z = points[:, 0], points[:, 1], points[:, 2]
    outline = _outline(anatomy, x, y)
    return _braincase_depth(x, y, z, outline) if skull_stripped else _skin_depth(anatomy, x, y, z, outline)


def head_signal(anatomy: Anatomy, tissues: Tissues, points: Array, soft_mm: float, *, skull_stripped: bool) -> Array:
    """The signal at points of the head, before noise and bias.

    Args:
        anatomy: n patients.
        tissues: signal of each tissue, broadcast against (n, p).
        points: (n, 3, p), head frame.
        soft_mm: width over which tissues blend, about the size of a voxel.
        skull_stripped: leave everything outside the brain at 0.

    Returns:
        (n, p), in the units of ``tissues``.
    """
    x, y, z = points[:, 0], points[:, 1], points[:, 2]
    outline = _outline(anatomy, x, y)
    case = _braincase_depth(x, y, z, outline)
    x = x + anatomy.shape[:, 1:2] * ((y / 50.0) ** 2 + np.sin(y / 9.0 + anatomy.phases[:, :1]))
    side = np.abs(x)
    if skull_stripped:
        # White matter is then the brightest tissue and saturates when scaled, so that only dark lesions show.
        anatomy = replace(anatomy, lesion_bright=np.zeros_like(anatomy.lesion_bright))
    low = bool(z.min() < _ABOVE_BASE)
    depth = np.minimum(case, _height_above_base(side, y, z)) if low else case
    signal = _brain(anatomy, tissues, (x, side, y, z), depth, soft_mm)
    if low:
        signal = _hindbrain(tissues, signal, (side, y, z), depth, soft_mm)
    inside = _ramp(depth / soft_mm)
    if skull_stripped:
        return np.asarray(signal * inside, dtype=np.float32)
    around = _skull(anatomy, tissues, (x, y, z), outline, case, soft_mm)
    return np.asarray(around + (signal - around) * inside, dtype=np.float32)


def _ramp(steps: Array) -> Array:
    """0 below -0.5, 1 above 0.5, straight in between: the share of a voxel that lies past an edge."""
    return np.asarray(np.clip(steps + np.float32(0.5), np.float32(0), np.float32(1)))


def _outline(anatomy: Anatomy, x: Array, y: Array) -> Array:
    """Squared distance from the axis of the egg-shaped skull, 1 on its inner surface at z = 0."""
    forward = y / _HALF_LENGTH
    taper = anatomy.shape[:, 0:1]
    width = _HALF_WIDTH * (1.0 - taper * forward - taper * forward * forward)
    across = (x / (width * (1.0 + anatomy.shape[:, 2:3] * np.sign(x)))) ** 2
    along = forward * forward
    return np.asarray(across + along - 0.3 * np.minimum(across * along, 0.25))  # boxier than an ellipse


def _radial_depth(x: Array, y: Array, z: Array, outline: Array, height: Array) -> Array:
    radius = np.sqrt(outline + height * height) + np.float32(1e-4)
    return np.asarray(np.sqrt(x * x + y * y + z * z) * (1.0 / radius - 1.0))


def _braincase_depth(x: Array, y: Array, z: Array, outline: Array) -> Array:
    return _radial_depth(x, y, z, outline, np.where(z > 0, z / _HEIGHT, z / _DEPTH))


def _skin_depth(anatomy: Anatomy, x: Array, y: Array, z: Array, outline: Array) -> Array:
    # Below the braincase the head goes on, almost straight down.
    inner = _radial_depth(x, y, z, outline, np.where(z > 0, z / _HEIGHT, z / 160.0))
    temple = np.exp(-(((y - 22.0) / 26.0) ** 2) - ((z + 14.0) / 24.0) ** 2) * np.minimum(np.abs(x) / 50.0, 1.0)
    return np.asarray(inner + (8.0 + 3.0 * temple + anatomy.scalp_mm[:, None]))


def _height_above_base(side: Array, y: Array, z: Array) -> Array:
    """Depth inside what the brain may fill above the floor of the skull, which is low under the temporal lobes."""
    temporal = np.exp(-(((side - 42.0) / 21.0) ** 4) - ((y - 10.0) / 36.0) ** 4)
    floor = z + 16.0 + 32.0 * temporal - 0.1 * np.minimum(y, 0.0)
    floor = floor + 0.05 * np.maximum(z + 16.0, 0.0) ** 2
    return np.asarray(np.maximum(np.maximum(floor, _cerebellum(side, y, z)), _stem(side, y, z)))


def _brain(
    anatomy: Anatomy, tissues: Tissues, point: tuple[Array, Array, Array, Array], depth: Array, soft_mm: float
) -> Array:
    """Cortex, white matter, deep grey matter, ventricles and lesion."""
    x, side, y, z = point
    sulcus_depth, sulcus_width, thickness = (anatomy.sulci[:, k : k + 1] for k in range(3))

    # The cleft between the hemispheres ends at the corpus callosum, which caps the deep core.
    core = 24.0 * (1.0 - np.hypot(y / 42.0, np.maximum(z - 2.0, 0.0) / 24.0))
    cleft = np.hypot(side, np.maximum(core, 0.0))
    fold, wobble = _fold_distance(anatomy, x, side, y, z)
    reach = sulcus_depth * (1.0 + 0.3 * wobble)
    # Sulci stop at their depth, and everywhere before the basal ganglia.
    beyond = np.maximum(np.minimum(depth, 1.9 * cleft) - reach, _ellipsoid(side, y, z, (0, -2, -4), (35, 40, 26)))
    fold = np.hypot(fold, np.maximum(beyond, 0.0))
    insula = side - (39.0 - 0.006 * (y - 4.0) ** 2) + 1.5 * wobble
    lateral = np.maximum(np.abs(z) - 12.0, 0.0)
    insular = np.sqrt(insula**2 + np.maximum(np.abs(y - 4.0) - 17.0, 0.0) ** 2 + lateral**2)
    opening = y - 10.0 + 0.6 * z + 0.3 * (side - 39.0) + 2.5 * wobble
    sylvian = np.sqrt(opening**2 + np.minimum(insula, 0.0) ** 2 + lateral**2)
    # Sulci open towards the skull, and the crowns between them are round.
    outer = np.maximum(np.minimum(depth, cleft), 0.0)
    fold = np.maximum(np.minimum(fold, np.minimum(insular, sylvian)) - 3.0 * np.exp(outer / -5.0), 0.0)
    surface = outer + fold - np.hypot(outer, fold)
    grey = _ramp((surface - sulcus_width) / soft_mm)
    white = _ramp((surface - sulcus_width - thickness) / soft_mm)
    signal = tissues.csf + (tissues.gm - tissues.csf) * grey + (tissues.wm - tissues.gm) * white

    deep = np.maximum(np.maximum(*_basal_ganglia(side, y, z)), _ellipsoid(side, y, z, (11, -13, 4), (8, 15, 10)))
    signal = signal + (0.6 * (tissues.gm - tissues.wm)) * white * _ramp(deep / (soft_mm + 2.0))
    signal = _with_lesion(anatomy, tissues, signal, (x, y, z), np.minimum(depth, cleft), soft_mm)
    return signal + (tissues.csf - signal) * _ramp(_ventricles(anatomy, x, side, y, z) / soft_mm)


def _fold_distance(anatomy: Anatomy, x: Array, side: Array, y: Array, z: Array) -> tuple[Array, Array]:
    """Distance in mm to the middle of the nearest sulcus if it reached all the way in, and a smooth field."""
    # Mostly a function of direction from the middle of a hemisphere, so that sulci run inwards.
    out = np.stack([side - 25.0, 0.78 * y, z - 4.0], axis=1)
    radius = np.sqrt(np.einsum("ncp,ncp->np", out, out)) + np.float32(8.0)
    features = np.empty((out.shape[0], 4, out.shape[2]), np.float32)
    warp = np.sin(np.float32(0.15) * out[:, [2, 0, 1]] + anatomy.phases[:, :3, None])
    np.multiply(out + np.float32(3.5) * warp, (36.0 / radius + 0.42)[:, None], out=features[:, :3])
    np.sign(x, out=features[:, 3])
    angles = np.swapaxes(anatomy.waves, 1, 2) @ features
    angles += anatomy.phases[:, :, None]
    slope = anatomy.waves[:, :3] @ np.sin(angles)
    np.cos(angles, out=angles)
    # A field over its slope is the distance to its zero, to first order; the constant keeps flat places from cracking.
    slope_squared = np.einsum("ncp,ncp->np", slope, slope) + np.float32(0.25 * NUM_WAVES / 2 * (2 * np.pi / 24.0) ** 2)
    distance = np.abs(angles.sum(axis=1)) / np.sqrt(slope_squared) * ((radius + 10.0) / 68.0)
    return np.asarray(distance), np.asarray(0.6 * angles[:, :3].sum(axis=1))


def _ellipsoid(
    side: Array, y: Array, z: Array, centre: tuple[float, float, float], radius: tuple[float, float, float]
) -> Array:
    """Roughly the depth in mm below an ellipsoid's surface, negative outside."""
    distance = ((side - centre[0]) / radius[0]) ** 2 + ((y - centre[1]) / radius[1]) ** 2
    return np.asarray((1.0 - np.sqrt(distance + ((z - centre[2]) / radius[2]) ** 2)) * min(radius))


def _basal_ganglia(side: Array, y: Array, z: Array) -> tuple[Array, Array]:
    """Lentiform nucleus and head of the caudate."""
    lens = _ellipsoid(side + 0.3 * (y - 4.0), y, z, (26, 5, 2), (6.5, 18, 13))
    return lens, _ellipsoid(side - 0.2 * (y - 24.0), y, z, (14, 22, 7), (5, 11, 12))


def _ventricles(anatomy: Anatomy, x: Array, side: Array, y: Array, z: Array) -> Array:
    """Depth in mm below the walls of the lateral and third ventricles, negative outside."""
    size, tall, asymmetry = (anatomy.ventricles[:, k : k + 1] for k in range(3))
    size = size * np.where(x > 0, asymmetry, 1.0 / asymmetry)
    front, back = np.maximum(y - 6.0, 0.0), np.maximum(4.0 - y, 0.0)
    half = size * (4.2 + 0.07 * back)
    centre = 2.0 + half + 0.008 * front * front + 0.0075 * back * back
    height = 14.0 - 0.011 * front * front - 0.0085 * back * back
    ends = np.maximum(np.abs(y + 2.0) - 34.0, 0.0) / 9.0
    # Lower and wider at the back, where the body turns into the atrium.
    tall = tall * (6.5 + 0.05 * back)
    lateral = half * (1.0 - np.sqrt(((side - centre) / half) ** 2 + ((z - height) / tall) ** 2 + ends * ends))
    return np.asarray(np.maximum(lateral, _ellipsoid(side, y, z, (0, -8, -6), (2.2, 13, 13))))


def _with_lesion(
    anatomy: Anatomy,
    tissues: Tissues,
    signal: Array,
    point: tuple[Array, Array, Array],
    depth: Array,
    soft_mm: float,
) -> Array:
    """A blob with a soft rim, which spares the outermost cortex: bright with a dark rim, or the reverse."""
    if not anatomy.lesion_radius_mm.any():
        return signal
    centre, radius = anatomy.lesion_centre_mm, np.maximum(anatomy.lesion_radius_mm, 1e-3)
    across, along, up = ((point[k] - centre[:, k : k + 1]) / radius[:, k : k + 1] for k in range(3))
    distance = np.sqrt(across**2 + along**2 + up**4)
    mean_radius = radius[:, :1]
    blob = _ramp((1.0 - distance) * mean_radius / (soft_mm + 2.0)) * _ramp((depth - 3.0) / soft_mm)
    core = _ramp((0.85 - distance) * mean_radius / (soft_mm + 2.0))
    bright = 0.7 * tissues.gm + (1.45 * tissues.wm - 0.7 * tissues.gm) * core
    dark = 1.35 * tissues.wm + (1.2 * tissues.csf - 1.35 * tissues.wm) * core
    is_bright = anatomy.lesion_bright[:, None]
    blob = blob * (anatomy.lesion_radius_mm[:, :1] > 0)
    return np.asarray(signal + (bright * is_bright + dark * (1.0 - is_bright) - signal) * blob)


def _cerebellum(side: Array, y: Array, z: Array) -> Array:
    return _ellipsoid(side, y + 0.004 * side * side, z, (0, -44, -38), (50, 34, 25))


def _stem(side: Array, y: Array, z: Array) -> Array:
    return _ellipsoid(side, y, z, (0, -14, -38), (14, 12, 32))


def _hindbrain(
    tissues: Tissues, signal: Array, point: tuple[Array, Array, Array], depth: Array, soft_mm: float
) -> Array:
    """Cerebellum and brainstem, in the fluid around them."""
    side, y, z = point
    cerebellum = _cerebellum(side, y, z)
    folia = 1.5 * np.cos(1.1 * z + 0.5 * y)
    inner = tissues.gm + (tissues.wm - tissues.gm) * (0.8 * _ramp((np.minimum(cerebellum, depth) - 9.0 + folia) / 8.0))
    fluid = np.maximum(cerebellum + 1.5, _ellipsoid(side, y, z, (0, -6, -22), (17, 18, 13)))
    signal = signal + (tissues.csf - signal) * _ramp(fluid / soft_mm)
    signal = signal + (inner - signal) * _ramp(cerebellum / soft_mm)
    return signal + (0.95 * tissues.wm - signal) * _ramp(_stem(side, y, z) / soft_mm)


def _skull(
    anatomy: Anatomy, tissues: Tissues, point: tuple[Array, Array, Array], outline: Array, case: Array, soft_mm: float
) -> Array:
    """Fluid around the brain, bone with marrow, muscle below, then scalp and air."""
    x, y, z = point
    head = _skin_depth(anatomy, x, y, z, outline)
    out = -case
    marrow = np.maximum(1.0 - np.abs(out - 5.0) / 2.5, 0.0)
    bone = 0.35 * tissues.csf + (0.3 * tissues.gm) * marrow
    signal = tissues.csf + (bone - tissues.csf) * _ramp((out - 2.0) / soft_mm)
    signal = signal + (0.7 * tissues.gm - signal) * _ramp((out - 8.0) / soft_mm)
    signal = signal + (0.6 * tissues.gm - signal) * _ramp((-20.0 - z) / 8.0) * _ramp(case / soft_mm)  # the skull's base
    signal = signal + (tissues.fat - signal) * _ramp((anatomy.scalp_mm[:, None] - head) / soft_mm)
    return np.asarray(signal * _ramp(head / soft_mm))
