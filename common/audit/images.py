"""Images of any size and scale, made comparable: one frame, one range of grey."""

import numpy as np
from numpy.typing import NDArray

FRAME = {2: 64, 3: 48}
"""Pixels along each side of what is compared, by the number of dimensions."""

Images = NDArray[np.float32]


def normalise(images: NDArray[np.uint8]) -> Images:
    """Each image scaled by its own robust range and resized to the frame.

    Args:
        images: (n, rows, columns) slices, or (n, depth, rows, columns) volumes, of any size.

    Returns:
        (n, 64, 64) or (n, 48, 48, 48) in [0, 1]; a constant image becomes 0.

    Raises:
        ValueError: of another number of dimensions.
    """
    num_axes = images.ndim - 1
    if num_axes not in FRAME:
        raise ValueError(f"expected images (n, rows, columns) or (n, depth, rows, columns), got {images.ndim} axes")
    side = FRAME[num_axes]
    out = np.empty((len(images), *[side] * num_axes), np.float32)
    for index, image in enumerate(images):
        out[index] = _resized(_robust_range(image), side)
    return out


def _robust_range(image: NDArray[np.uint8]) -> Images:
    """1st to 99th percentile to [0, 1]."""
    low, high = np.percentile(image, [1, 99])
    if high <= low:
        return np.zeros(image.shape, np.float32)
    return np.asarray(np.clip((image - low) / (high - low), 0, 1), np.float32)


def _resized(image: Images, side: int) -> Images:
    for axis, length in enumerate(image.shape):
        if length != side:
            image = np.moveaxis(np.tensordot(_resizing(length, side), image, (1, axis)), 0, axis)
    return image


def _resizing(length: int, side: int) -> Images:
    """(side, length) triangle filter, as wide as the coarser of both grids."""
    centres = (np.arange(side) + 0.5) * length / side - 0.5
    width = max(1.0, length / side)
    weights = np.clip(1 - np.abs(np.arange(length) - centres[:, None]) / width, 0, None)
    return np.asarray(weights / weights.sum(1, keepdims=True), np.float32)
