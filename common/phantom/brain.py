"""T1-weighted heads of patients who are nobody: whole volumes for a site, or single slices for a warm start."""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from common.orientation import SLICE_RANGE
from common.phantom.anatomy import Anatomy, Array, draw_anatomies, to_head_frame
from common.phantom.look import PUBLIC_LOOK, PUBLIC_STRIPPED_LOOK, SiteLook, site_look
from common.phantom.tissue import Tissues, depth_below_surface, head_signal

__all__ = [
    "PUBLIC_LOOK",
    "PUBLIC_STRIPPED_LOOK",
    "Anatomy",
    "SiteLook",
    "affine",
    "draw_anatomies",
    "draw_anatomy",
    "draw_slices",
    "percentiles",
    "render_slices",
    "render_volume",
    "site_look",
]

_ORIGIN = 0.54  # the head frame's origin lies at this fraction of the depth, so that SLICE_RANGE means the same levels
_CHUNK_POINTS = 1 << 16  # arrays of this many points stay in a core's cache


def draw_anatomy(rng: np.random.Generator, *, lesion: bool) -> Anatomy:
    """The anatomy of one patient, as a batch of one.

    Args:
        rng: source of all variation.
        lesion: whether the patient has a lesion of the white matter.

    Returns:
        The anatomy.
    """
    return draw_anatomies(rng, lesion=np.array([lesion]))


def affine(look: SiteLook, shape: tuple[int, int, int] = (64, 64, 48)) -> NDArray[np.float64]:
    """From voxel indices (x, y, z) to mm (right, anterior, superior), the volume's centre at 0.

    Args:
        look: gives the field of view.
        shape: voxels along x, y, z.

    Returns:
        (4, 4).
    """
    voxel = np.array(look.field_of_view_mm) / shape
    matrix = np.diag([*voxel, 1.0])
    matrix[:3, 3] = -voxel * (np.array(shape) - 1) / 2
    return matrix


def render_volume(
    anatomy: Anatomy, look: SiteLook, shape: tuple[int, int, int] = (64, 64, 48), *, rng: np.random.Generator
) -> NDArray[np.float32]:
    """One patient's volume.

    Args:
        anatomy: one patient.
        look: the scanner.
        shape: voxels along x, y, z.
        rng: source of noise and of the scan's own bias.

    Returns:
        (x, y, z), indices growing to the right, anterior, superior; 0 is air, white matter about 0.75.
    """
    if len(anatomy) != 1:
        raise ValueError(f"a volume shows one patient, not {len(anatomy)}")
    grids = np.meshgrid(*(_centres(look, shape[k], k) for k in range(3)), indexing="ij")
    points = np.stack([grid.ravel() for grid in grids])[None]
    soft_mm = _soft_mm(look, shape[0])
    bias = _bias_slopes(rng, [look])
    signal = np.zeros(points.shape[2], np.float32)
    inside = np.empty(points.shape[2], np.bool_)
    for start in range(0, points.shape[2], _CHUNK_POINTS):
        chunk = slice(start, start + _CHUNK_POINTS)
        head = to_head_frame(anatomy, points[:, :, chunk])
        keep = depth_below_surface(anatomy, head, skull_stripped=look.skull_stripped)[0] > -soft_mm
        inside[chunk] = keep
        head = np.compress(keep, head, axis=2)
        if head.size:
            seen = head_signal(anatomy, _tissues([look]), head, soft_mm, skull_stripped=look.skull_stripped)
            signal[chunk][keep] = (seen * _gain([look], bias, head))[0]
    if look.skull_stripped:
        inside &= signal > 0
        signal[inside] = _with_noise(rng, signal[inside], np.float32(look.noise_stddev))
    else:
        signal = _with_noise(rng, signal, np.float32(look.noise_stddev))
    return signal.reshape(shape)


def render_slices(
    anatomy: Anatomy, looks: list[SiteLook], z_fractions: NDArray[np.float64], size: int, *, rng: np.random.Generator
) -> NDArray[np.float32]:
    """One axial slice of each patient, the same picture as that slice of the patient's volume.

    Args:
        anatomy: n patients.
        looks: the scanner of each; all skull-stripped, or none.
        z_fractions: (n,) height of each slice, 0 inferior to 1 superior.
        size: pixels along each side.
        rng: source of noise and of each scan's own bias.

    Returns:
        (n, size, size), oriented as ``axial_slice``; signal as in ``render_volume``.
    """
    count, stripped = len(anatomy), looks[0].skull_stripped
    if any(look.skull_stripped != stripped for look in looks):
        raise ValueError("either all looks are skull-stripped or none")
    points = np.empty((count, 3, size * size), np.float32)
    for k, (look, fraction) in enumerate(zip(looks, z_fractions, strict=True)):
        points[k, 0] = np.tile(_centres(look, size, 0)[::-1], size)  # the first column is the patient's right
        points[k, 1] = np.repeat(_centres(look, size, 1)[::-1], size)  # the first row is anterior
        points[k, 2] = (fraction - _ORIGIN) * look.field_of_view_mm[2]
    soft_mm = _soft_mm(looks[0], size)
    head = to_head_frame(anatomy, points)
    bias = _bias_slopes(rng, looks)
    signal = head_signal(anatomy, _tissues(looks), head, soft_mm, skull_stripped=stripped) * _gain(looks, bias, head)
    # Shrinking a 64-voxel-wide slice averages its noise.
    noise = np.array([[look.noise_stddev] for look in looks], np.float32) * min(1.0, size / 64)
    noisy = _with_noise(rng, signal, noise)
    noisy = np.where(signal > 0, noisy, 0) if stripped else noisy
    return np.asarray(noisy, dtype=np.float32).reshape(count, size, size)


def draw_slices(
    rng: np.random.Generator,
    count: int,
    size: int,
    *,
    lesion: NDArray[np.bool_],
    look: SiteLook = PUBLIC_LOOK,
) -> NDArray[np.float32]:
    """Slices of as many different patients, at random heights within ``SLICE_RANGE``.

    Args:
        rng: source of all variation.
        count: number of slices.
        size: pixels along each side.
        lesion: (count,) which patients have a lesion.
        look: the scanner.

    Returns:
        (count, 1, size, size) in [-1, 1], scaled as a volume's 1st to 99th percentile would be.
    """
    if lesion.shape != (count,):
        raise ValueError(f"lesion has shape {lesion.shape}, expected ({count},)")
    out = np.empty((count, 1, size, size), np.float32)
    batch = max(1, _CHUNK_POINTS // (size * size))
    for start in range(0, count, batch):
        ill = lesion[start : start + batch]
        slices = render_slices(
            draw_anatomies(rng, lesion=ill), [look] * len(ill), rng.uniform(*SLICE_RANGE, len(ill)), size, rng=rng
        )
        low, high = np.array(percentiles(look), np.float32)
        out[start : start + batch, 0] = np.clip(2 * (slices - low) / (high - low) - 1, -1, 1)
    return out


@cache
def percentiles(look: SiteLook) -> tuple[float, float]:
    """The 1st and 99th percentile of a volume of this look, by which volumes are scaled.

    Args:
        look: the scanner.

    Returns:
        Signals (low, high), the mean over a few patients of small volumes.
    """
    rng = np.random.default_rng(0)
    coarse = [render_volume(draw_anatomy(rng, lesion=False), look, (40, 40, 30), rng=rng) for _ in range(4)]
    low, high = np.mean([np.percentile(volume, [1, 99]) for volume in coarse], axis=0)
    return float(low), float(high)


def _centres(look: SiteLook, count: int, axis: int) -> Array:
    """Centres of the voxels along an axis, in mm from the head's origin."""
    middle = _ORIGIN if axis == 2 else 0.5
    return (((np.arange(count) + 0.5) / count - middle) * look.field_of_view_mm[axis]).astype(np.float32)


def _soft_mm(look: SiteLook, size: int) -> float:
    return max(2.0, 0.85 * look.field_of_view_mm[0] / size)


def _tissues(looks: list[SiteLook]) -> Tissues:
    wm, gm, csf, fat = np.array([(one.wm, one.gm, one.csf, one.fat) for one in looks], np.float32).T[:, :, None]
    return Tissues(wm=wm, gm=gm, csf=csf, fat=fat)


def _bias_slopes(rng: np.random.Generator, looks: list[SiteLook]) -> Array:
    """(n, 3) logarithmic gain per 90 mm: the site's coil, and a little of the scan's own."""
    own = rng.normal(0.0, 0.25, (len(looks), 3))
    slopes = [look.bias_strength * (np.array(look.bias_direction) + own[k]) for k, look in enumerate(looks)]
    return np.array(slopes, np.float32)


def _gain(looks: list[SiteLook], slopes: Array, points: Array) -> Array:
    """(n, p) sensitivity of the receive coil, 1 at the head's origin."""
    centre = np.array([[look.centre_gain] for look in looks], np.float32)
    scaled = points / np.float32(90.0)
    return np.asarray(
        np.exp(np.einsum("nk,nkp->np", slopes, scaled) - centre * np.einsum("nkp,nkp->np", scaled, scaled))
    )


def _with_noise(rng: np.random.Generator, signal: Array, stddev: Array | np.float32) -> Array:
    """The magnitude of the signal with complex normal noise, as a scanner records it."""
    first = signal + stddev * rng.standard_normal(signal.shape, np.float32)
    second = stddev * rng.standard_normal(signal.shape, np.float32)
    return np.asarray(np.sqrt(first * first + second * second), dtype=np.float32)
