"""Decoded images in memory, and the checks and scaling that need nothing but one image.

**Guarantee.** Every function here reads a single patient's image. Nothing is estimated over a cohort, so what the
training draws later depends on other patients in no way.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

MAX_VOXELS = 2**28  # a CT of 512 x 512 x 1024; float32 of it is 1 GiB
MIN_PIXELS = 16  # shorter edges hold no anatomy that a generator could learn
MIN_SLICES = 4
LOW_PERCENTILE, HIGH_PERCENTILE = 1.0, 99.0
SPACING_RANGE_MM = (0.05, 20.0)
_THUMBNAIL = 16
_NEAR_DUPLICATE = 0.9995
_MAX_COMPARED = 5000


class Refused(Exception):
    """A file that cannot be trusted: the reader's only exception. It stays at the site.

    Args:
        code: stable, in snake_case, such as ``truncated``.
        reason: one sentence, expected and found; no header value, no pixel value.
    """

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason


@dataclass(frozen=True)
class Volume:
    """A scalar volume in RAS order.

    Attributes:
        voxels: float32 (X, Y, Z): right, anterior and superior grow with the index. Finite, not constant.
        spacing_mm: voxel size along X, Y, Z in millimetres.
    """

    voxels: FloatArray
    spacing_mm: tuple[float, float, float]


@dataclass(frozen=True)
class Picture:
    """A grey image.

    Attributes:
        pixels: float32 (rows, columns), dark to bright. Finite, not constant.
        spacing_mm: distance between rows and between columns; (1, 1) where the file does not say.
    """

    pixels: FloatArray
    spacing_mm: tuple[float, float]


def check_size(shape: tuple[int, ...]) -> None:
    """Refuses dimensions before anything of that size is read.

    Raises:
        Refused: ``bad_dimensions`` or ``too_large``.
    """
    if any(length < 1 for length in shape):
        raise Refused("bad_dimensions", "expected positive dimensions, found one that is zero or negative")
    voxels = 1
    for length in shape:  # python integers: a product of 32767s must not wrap
        voxels *= int(length)
    if voxels > MAX_VOXELS:
        raise Refused("too_large", f"expected at most {MAX_VOXELS} voxels, the header announces {voxels}")


def check_spacing(spacing_mm: tuple[float, ...]) -> None:
    """Refuses voxel sizes that no clinical scanner makes (a wrong unit, usually).

    Raises:
        Refused: ``implausible_voxel_size``.
    """
    low, high = SPACING_RANGE_MM
    if not all(low <= length <= high for length in spacing_mm):  # NaN fails too
        raise Refused("implausible_voxel_size", f"expected voxels of {low} to {high} mm, found another size or unit")


def check_values(values: FloatArray) -> None:
    """Refuses values that no scaling can repair.

    Raises:
        Refused: ``non_finite`` or ``constant``.
    """
    low, high = values.min(), values.max()  # NaN and Inf both show in the extremes
    if not (np.isfinite(low) and np.isfinite(high)):
        raise Refused("non_finite", "expected finite values, found NaN or infinity")
    if low == high:
        raise Refused("constant", "expected an image, all values are equal")


def check_volume_shape(shape: tuple[int, ...]) -> None:
    """Refuses a canonical volume whose axial slices would hold nothing.

    Raises:
        Refused: ``too_few_slices`` or ``too_small``.
    """
    if min(shape) < MIN_SLICES:
        raise Refused("too_few_slices", f"expected at least {MIN_SLICES} slices, found {min(shape)}")
    if min(shape[0], shape[1]) < MIN_PIXELS:
        raise Refused(
            "too_small",
            f"expected axial slices of at least {MIN_PIXELS}x{MIN_PIXELS} voxels, found {shape[0]}x{shape[1]}",
        )


def to_unit_range(values: FloatArray) -> FloatArray:
    """Scales one image to [0, 1] by the 1st and 99th percentile of its foreground.

    Foreground is everything above the image's minimum: skull-stripped zeros, CT air and padding take no part, so a
    large constant background cannot collapse the range, and one hot pixel cannot either.

    Args:
        values: any shape, finite, not constant.

    Returns:
        The same shape, clipped to [0, 1].
    """
    foreground = values[values > values.min()]
    low, high = (float(x) for x in np.percentile(foreground, [LOW_PERCENTILE, HIGH_PERCENTILE]))
    if high <= low:  # a mask: one foreground value
        low = float(values.min())
    # Divide before subtracting in float64: values near the float32 limit must not overflow.
    scaled = (values.astype(np.float64) - low) / (high - low)
    return np.clip(scaled, 0.0, 1.0).astype(np.float32)


def pixel_digest(values: FloatArray) -> bytes:
    """A digest of shape and values: equal for exact copies, whatever file format or header holds them."""
    digest = hashlib.blake2b(repr(values.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(values, dtype="<f4").data)
    return digest.digest()


def thumbnail(values: FloatArray) -> npt.NDArray[np.float16]:
    """A coarse picture of the image, centred and of unit length; (256,) for a picture, (768,) for a volume.

    Gain and offset cancel, so a copy saved with another scaling keeps its thumbnail.
    """
    if values.ndim == 3:
        x, y, z = (length // 2 for length in values.shape)
        planes = [values[x], values[:, y], values[:, :, z]]
    else:
        planes = [values]
    flat = np.concatenate([_block_means(plane).ravel() for plane in planes])
    flat -= flat.mean()
    norm = float(np.linalg.norm(flat))
    return (flat / norm if norm > 0 else flat).astype(np.float16)


def near_duplicates(thumbnails: list[npt.NDArray[np.float16]]) -> list[tuple[int, int]] | None:
    """Pairs (i < j) whose thumbnails almost coincide; None when there are too many images to compare."""
    if len(thumbnails) > _MAX_COMPARED:
        return None
    pairs: list[tuple[int, int]] = []
    for size in sorted({t.size for t in thumbnails}):
        indices = [i for i, t in enumerate(thumbnails) if t.size == size]
        table = np.stack([thumbnails[i] for i in indices]).astype(np.float32)  # (images, size)
        for start in range(0, len(indices), 512):
            close = table[start : start + 512] @ table.T > _NEAR_DUPLICATE  # (block, images)
            for a, b in zip(*np.nonzero(close), strict=True):
                if start + a < b:
                    pairs.append((indices[start + int(a)], indices[int(b)]))
    return pairs


def _block_means(plane: FloatArray) -> npt.NDArray[np.float64]:
    """Means over a 16 x 16 grid of blocks (fewer, larger blocks are repeated for short edges)."""
    means = plane.astype(np.float64)
    for axis in (0, 1):
        edges = np.linspace(0, means.shape[axis], _THUMBNAIL + 1).astype(int)
        blocks = [
            means.take(range(a, max(b, a + 1)), axis=axis).mean(axis=axis)
            for a, b in zip(edges[:-1], edges[1:], strict=True)
        ]
        means = np.stack(blocks, axis=axis)
    return means
