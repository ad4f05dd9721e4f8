"""Frontal chest radiographs of patients who are nobody, for warm starts, tests and demonstrations.

Points are (u, v): u from -1 at the left edge of the picture, the patient's right, to 1; v from -1 at the top to 1.
Bright is dense, as radiographs are hung. All numbers are rough proportions, measured on no patient.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]  # float32, but for what numpy widens on the way
Uniform = Callable[[float, float], Array]  # one number per patient, (n, 1)

_NUM_WAVES = 8
_NUM_OPACITIES = 3
_CHUNK_POINTS = 1 << 16  # arrays of this many points stay in a core's cache


def draw_radiographs(
    rng: np.random.Generator, count: int, size: int, *, opacity: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """Radiographs of as many different patients.

    Args:
        rng: source of all variation.
        count: number of pictures.
        size: pixels along each side.
        opacity: (count,) which patients have opacities in their lungs.

    Returns:
        (count, 1, size, size) in [-1, 1]; row 0 is the top, column 0 the patient's right.
    """
    if opacity.shape != (count,):
        raise ValueError(f"opacity has shape {opacity.shape}, expected ({count},)")
    out = np.empty((count, 1, size, size), np.float32)
    batch = max(1, _CHUNK_POINTS // (size * size))
    for start in range(0, count, batch):
        ill = opacity[start : start + batch]
        out[start : start + batch, 0] = _draw(rng, size, ill).reshape(len(ill), size, size)
    return out


def _draw(rng: np.random.Generator, size: int, opacity: NDArray[np.bool_]) -> Array:
    """(n, size * size) in [-1, 1]"""
    n = len(opacity)

    def uniform(low: float, high: float) -> Array:
        return rng.uniform(low, high, (n, 1)).astype(np.float32)

    u, v = _points(rng, n, size)
    soft = max(0.015, 2.0 / size)
    side = np.abs(u)
    lung, rib_cage, dome = _lungs(u, side, v, uniform, soft)
    heart = _heart(u, v - dome.min(axis=1, keepdims=True), v, uniform, soft)
    body = _body(side, v, uniform, soft)

    # Density adds up along the beam: tissue, then what lies in and before it.
    belly = _ramp((v - dome) / 0.3)
    density = 0.60 + 0.14 * belly + uniform(-0.04, 0.08) * v + uniform(0.08, 0.18) * np.exp(-((side / 0.2) ** 2))
    density -= uniform(0.26, 0.42) * lung * (1.0 - 0.9 * heart) * (1.0 - 0.3 * np.clip(v + 0.2, 0.0, 1.0))
    density += 0.07 * heart
    density += _bones(side, v, rib_cage * (1.0 - 0.7 * belly), uniform, soft)
    density += lung * (1.0 - heart) * _vessels(rng, u, side, v)
    density += lung * (1.0 - 0.9 * heart) * _opacities(rng, opacity, u, v)
    density -= 0.08 * np.exp(-((side / 0.045) ** 2)) * _ramp((-0.35 - v) / 0.15)  # trachea
    stomach = ((u - uniform(0.38, 0.5)) / 0.16) ** 2 + ((v - dome - 0.16) / 0.08) ** 2
    density -= uniform(-0.1, 0.2).clip(0.0) * np.exp(-(stomach**2))

    # A film saturates softly; exposure and processing vary.
    seen = 1.0 - np.exp(-uniform(1.5, 2.1) * np.clip(density * body, 0.0, None) ** uniform(1.2, 1.7))
    picture = uniform(1.12, 1.3) * seen + rng.normal(0.0, 0.01, density.shape)
    return np.clip(2.0 * picture - 1.0, -1.0, 1.0).astype(np.float32)


def _points(rng: np.random.Generator, n: int, size: int) -> tuple[Array, Array]:
    """(n, size * size) coordinates of the pixels, the patient a little turned, shifted and scaled."""
    line = ((np.arange(size) + 0.5) * (2.0 / size) - 1.0).astype(np.float32)
    u, v = np.tile(line, size)[None], np.repeat(line, size)[None]
    angle = rng.normal(0.0, 0.03, (n, 1)).astype(np.float32)
    zoom = rng.uniform(0.92, 1.12, (n, 1)).astype(np.float32)
    shift = rng.normal(0.0, 0.04, (2, n, 1)).astype(np.float32)
    cos, sin = np.cos(angle) * zoom, np.sin(angle) * zoom
    return cos * u - sin * v + shift[0], sin * u + cos * v + shift[1]


def _ramp(steps: Array) -> Array:
    """0 below -0.5, 1 above 0.5, straight in between: the share of a pixel that lies past an edge."""
    return np.asarray(np.clip(steps + np.float32(0.5), np.float32(0), np.float32(1)))


def _body(side: Array, v: Array, uniform: Uniform, soft: float) -> Array:
    """Neck, shoulders and flanks: how much of the full thickness the beam meets, 0 in air."""
    neck = uniform(0.2, 0.3) + 0.2 * _ramp((v + 0.75) / 0.5)
    shoulder = uniform(-0.98, -0.8) + 0.3 * side * side
    flank = uniform(0.84, 1.1) + 0.5 * _ramp((-0.15 - v) / 0.7)
    inside = np.maximum(np.minimum(v - shoulder, flank - side), neck - side)
    return _ramp(inside / (soft + 0.02)) * np.clip(inside / 0.3, 0.1, 1.0) ** 0.3


def _lungs(u: Array, side: Array, v: Array, uniform: Uniform, soft: float) -> tuple[Array, Array, Array]:
    """Lung field and rib cage as shares of a pixel, and the height of the diaphragm under each point."""
    width, top, base = uniform(0.62, 0.78), uniform(-0.84, -0.7), uniform(0.25, 0.55)
    middle = uniform(0.25, 0.4)
    wall = width * np.sqrt(np.maximum(1.0 - (np.minimum(v - middle, 0.0) / (top - middle)) ** 2, 0.0))
    cage = np.minimum(wall - side, v - top)
    # The right dome, on the left of the picture, stands higher; both fall away to the flanks.
    dome = base - uniform(0.0, 0.09) * (u < 0) + uniform(0.7, 1.2) * np.maximum(side - 0.3, 0.0) ** 2
    dome = dome + 0.25 * np.maximum(0.3 - side, 0.0) ** 2
    inner = side - (uniform(0.13, 0.19) + 0.04 * np.cos(6.0 * (v + 0.1)) * (v > -0.6))
    apex = v - top - 0.9 * (side - 0.55 * width) ** 2
    inside = np.minimum(np.minimum(cage, inner), np.minimum(dome - v, apex))
    return _ramp(inside / (soft + 0.035)), _ramp(cage / (soft + 0.05)), dome


def _heart(u: Array, above: Array, v: Array, uniform: Uniform, soft: float) -> Array:
    """The heart's shadow on the diaphragm, mostly on the right of the picture, and the arch of the aorta above."""
    width, height = uniform(0.24, 0.36), uniform(0.26, 0.34)
    across, down = u - uniform(0.08, 0.16), above + uniform(0.1, 0.18)
    along, off = 0.86 * across + 0.5 * down, 0.86 * down - 0.5 * across
    heart = 1.0 - np.sqrt((along / (width * 1.1)) ** 2 + (off / (height * 0.85)) ** 2)
    arch = 1.0 - np.sqrt(((u - 0.11) / 0.1) ** 2 + ((v + 0.27) / 0.11) ** 2)
    return np.asarray(np.maximum(_ramp(heart * width / (soft + 0.04)), 0.8 * _ramp(arch * 0.1 / (soft + 0.03))))


def _bones(side: Array, v: Array, cage: Array, uniform: Uniform, soft: float) -> Array:
    """Density of ribs, spine and clavicles."""
    spacing, first = uniform(0.125, 0.15), uniform(0.0, 6.28)
    sharp = min(6.0, 0.12 / soft)
    # Seen from the front, ribs leave the spine sideways, arch down, and come back lower and steeper.
    back = np.cos(6.28 / spacing * (v + 0.1 * side - 0.6 * side * side) + first)
    front = np.cos(6.28 / spacing * (v - 0.55 * side + 0.15 * side * side) + first + 2.0)
    ribs = uniform(0.04, 0.08) * _ramp(sharp * (back - 0.15) / 2)
    ribs += uniform(0.01, 0.05) * _ramp(sharp * (front - 0.3) / 2) * _ramp((side - 0.4) / 0.3)
    ribs *= cage * (v < 0.75)
    disc = 0.5 + 0.5 * np.cos(6.28 / (0.9 * spacing) * v + first)
    spine = (0.05 + 0.03 * disc) * _ramp((0.075 - side) / (soft + 0.02))
    slope = uniform(0.0, 0.3)
    line = v + 0.6 + slope * (side - 0.1) + 0.06 * np.sin(6.0 * side)
    ends = np.minimum(side - 0.08, 0.72 - side)
    clavicles = uniform(0.06, 0.11) * _ramp((0.028 - np.abs(line)) / soft) * _ramp(ends / (soft + 0.03))
    return np.asarray(ribs + spine + clavicles)


def _vessels(rng: np.random.Generator, u: Array, side: Array, v: Array) -> Array:
    """Branching shadows, densest at the hila."""
    n = len(u)
    waves = rng.normal(0.0, 1.0, (n, _NUM_WAVES, 2))
    waves *= rng.uniform(14.0, 34.0, (n, _NUM_WAVES, 1)) / np.linalg.norm(waves, axis=2, keepdims=True)
    phases = rng.uniform(0.0, 6.28, (n, _NUM_WAVES, 1)).astype(np.float32)
    field = np.cos(waves.astype(np.float32) @ np.stack([u, v], axis=1) + phases).sum(axis=1) / np.sqrt(_NUM_WAVES / 2)
    near = np.exp(-(((side - 0.2) / 0.28) ** 2) - ((v - 0.02) / 0.4) ** 2)
    hilum = np.exp(-(((side - 0.2) / 0.1) ** 2) - ((v + 0.02) / 0.14) ** 2)
    return np.asarray((0.008 + 0.045 * near) * field + 0.16 * hilum)


def _opacities(rng: np.random.Generator, opacity: NDArray[np.bool_], u: Array, v: Array) -> Array:
    """Density of up to three cloudy patches in the lungs of the patients who have them."""
    n = len(opacity)
    centre_u = rng.uniform(0.3, 0.52, (n, _NUM_OPACITIES)) * rng.choice([-1.0, 1.0], (n, _NUM_OPACITIES))
    centre_v = rng.uniform(-0.25, 0.3, (n, _NUM_OPACITIES))
    radius = rng.uniform(0.13, 0.26, (n, _NUM_OPACITIES))
    strength = rng.uniform(0.28, 0.42, (n, _NUM_OPACITIES))
    strength[:, 1:] *= rng.random((n, _NUM_OPACITIES - 1)) < 0.5
    wave = rng.uniform(0.0, 6.28, (n, 2))
    total = np.zeros_like(u)
    if not opacity.any():
        return total
    ragged = 1.0 + 0.25 * np.cos(13.0 * u + 7.0 * v + wave[:, :1]) + 0.25 * np.cos(-6.0 * u + 15.0 * v + wave[:, 1:])
    for k in range(_NUM_OPACITIES):
        distance = ((u - centre_u[:, k, None]) ** 2 + (v - centre_v[:, k, None]) ** 2) / radius[:, k, None] ** 2
        total = np.maximum(total, strength[:, k, None] * np.exp(-distance * ragged))
    return np.asarray(total * opacity[:, None], dtype=np.float32)
