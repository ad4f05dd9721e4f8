"""The anatomy of heads: the parameters in which patients differ, for one patient or many at once.

Lengths are in mm in a frame of the head: x to the patient's right, y anterior, z superior, the origin between the
frontal horns and the thalami. All numbers are rough adult proportions; nothing here was measured on a patient.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]  # float32, but for what numpy widens on the way

NUM_WAVES = 14


@dataclass(frozen=True)
class Anatomy:
    """Parameters of ``n`` patients; every array has the patients as its leading axis.

    Attributes:
        rotation: (n, 3, 3) from scanner to head frame.
        scale: (n, 3) size relative to the average head.
        offset_mm: (n, 3) where the head lies in the scanner.
        shape: (n, 3) how much narrower the front is, bend of the midline, left against right width.
        waves: (n, 4, num_waves) wave vectors of the folding per mm, and the phase by which the hemispheres differ.
        phases: (n, num_waves).
        sulci: (n, 3) depth in mm, half-width in mm, thickness of the cortex in mm.
        ventricles: (n, 3) width and height relative to the average, left against right.
        scalp_mm: (n,) thickness of scalp and fat.
        lesion_centre_mm: (n, 3).
        lesion_radius_mm: (n, 3); 0 for a patient without a lesion.
        lesion_bright: (n,) 1 for a bright lesion with a dark rim, 0 for the reverse.
    """

    rotation: Array
    scale: Array
    offset_mm: Array
    shape: Array
    waves: Array
    phases: Array
    sulci: Array
    ventricles: Array
    scalp_mm: Array
    lesion_centre_mm: Array
    lesion_radius_mm: Array
    lesion_bright: Array

    def __len__(self) -> int:
        return len(self.scalp_mm)


def draw_anatomies(rng: np.random.Generator, *, lesion: NDArray[np.bool_]) -> Anatomy:
    """Patients with and without a lesion.

    Args:
        rng: source of all variation.
        lesion: (n,) which patients have one.

    Returns:
        The anatomy of n patients.
    """
    n = len(lesion)

    def uniform(low: list[float], high: list[float]) -> Array:
        return np.asarray(rng.uniform(low, high, (n, len(low))), dtype=np.float32)

    # A fold is 11 to 14 mm wide, half the wavelength.
    wavelength = rng.uniform(22.0, 29.0, (n, 1, NUM_WAVES))
    direction = rng.standard_normal((n, 3, NUM_WAVES)) * [[1.0], [1.0], [0.55]]  # most sulci stand upright
    vectors = 2 * np.pi / wavelength * direction / np.linalg.norm(direction, axis=1, keepdims=True)
    sides = rng.normal(0.0, 0.7, (n, 1, NUM_WAVES))
    centre = uniform([22.0, -36.0, 10.0], [32.0, 36.0, 17.0])
    centre[:, 0] *= rng.choice([-1.0, 1.0], n)
    return Anatomy(
        rotation=_rotations(rng.normal(0.0, [0.05, 0.03, 0.05], (n, 3))),
        scale=(rng.normal(1.0, 0.025, (n, 1)) * rng.normal(1.0, 0.02, (n, 3))).astype(np.float32),
        offset_mm=rng.normal(0.0, [1.5, 2.0, 3.5], (n, 3)).astype(np.float32),
        shape=rng.normal([0.06, 0.0, 0.0], [0.02, 0.6, 0.02], (n, 3)).astype(np.float32),
        waves=np.concatenate([vectors, sides], axis=1).astype(np.float32),
        phases=rng.uniform(0.0, 2 * np.pi, (n, NUM_WAVES)).astype(np.float32),
        sulci=uniform([16.0, 0.3, 2.0], [22.0, 0.9, 2.8]),
        ventricles=(np.exp(rng.normal(0.0, [0.28, 0.12, 0.12], (n, 3)))).astype(np.float32),
        scalp_mm=rng.uniform(4.5, 8.0, n).astype(np.float32),
        lesion_centre_mm=centre,
        # Tall enough to be met by nearly every slice that is taken from the patient.
        lesion_radius_mm=uniform([13.0, 13.0, 27.0], [18.0, 18.0, 34.0]) * lesion.astype(np.float32)[:, None],
        lesion_bright=rng.integers(0, 2, n).astype(np.float32),
    )


def _rotations(angles: NDArray[np.float64]) -> Array:
    """(n, 3) angles about x, y, z in radians to (n, 3, 3)."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles).T, np.sin(angles).T
    zero, one = np.zeros_like(cx), np.ones_like(cx)
    about_x = np.array([[one, zero, zero], [zero, cx, -sx], [zero, sx, cx]])
    about_y = np.array([[cy, zero, sy], [zero, one, zero], [-sy, zero, cy]])
    about_z = np.array([[cz, -sz, zero], [sz, cz, zero], [zero, zero, one]])
    return np.asarray(np.einsum("ijn,jkn,kln->nil", about_z, about_y, about_x), dtype=np.float32)


def to_head_frame(anatomy: Anatomy, points_mm: Array) -> Array:
    """Scanner coordinates to those of the average head.

    Args:
        anatomy: n patients.
        points_mm: (n, 3, p) or (1, 3, p), scanner frame.

    Returns:
        (n, 3, p) in the head frame.
    """
    moved = anatomy.rotation @ (points_mm - anatomy.offset_mm[:, :, None])
    return np.asarray(moved / anatomy.scale[:, :, None], dtype=np.float32)
