"""Images as a few long waves, to search by: short unit vectors whose dot product is a band-passed correlation.

Shifts are exact to a fraction of a pixel, and a flip only changes signs.
"""

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

_HIGHEST = {2: 5, 3: 4}  # waves along the frame, by the number of axes; 7 retrieved no more copies (measured)
_LOW, _HIGH = 3.0, 5.0  # the band fades below the one and above the other
TINY = 1e-4
"""An image with less than this in its band (root mean square) shows nothing, and is like no other."""


def coarse_vectors(images: torch.Tensor, shifts: tuple[float, ...] = (0.0,)) -> torch.Tensor:
    """Unit vectors of images, moved along each axis by each of some shifts.

    Args:
        images: (n, *frame).
        shifts: pixels.

    Returns:
        (n, shifts to the power of axes, dim); 0 of flat images. Later axes vary fastest.
    """
    num_axes, side = images.ndim - 1, images.shape[-1]
    num_waves = 2 * _HIGHEST[num_axes] + 1
    waves = _waves(side, _HIGHEST[num_axes], shifts)
    for _ in range(num_axes):
        images = torch.tensordot(images, waves, ([1], [1]))  # takes the first axis, puts its waves last
    split = images.reshape(len(images), *[len(shifts), num_waves] * num_axes)
    order = [0, *range(1, 2 * num_axes, 2), *range(2, 2 * num_axes + 1, 2)]
    kept, weights, _ = _band(num_axes)
    vectors = split.permute(order).reshape(len(images), len(shifts) ** num_axes, num_waves**num_axes)[..., kept]
    return unit(vectors * weights)


def parities(num_axes: int) -> tuple[torch.Tensor, ...]:
    """Which entries of a vector are (even, even), (even, odd), (odd, even), (odd, odd) in (rows, columns)."""
    return _band(num_axes)[2]


def unit(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors (..., dim) over their norms; 0 where one is tiny."""
    norm = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return torch.where(norm > TINY, vectors / norm.clamp_min(TINY), 0.0)


@cache
def _waves(side: int, highest: int, shifts: tuple[float, ...]) -> torch.Tensor:
    """(shifts x waves, side): cosines, then sines, about the middle of the frame moved by each shift."""
    x = 2 * np.pi * (np.arange(side) - (side - 1) / 2 - np.array(shifts)[:, None, None]) / side
    k = np.arange(highest + 1)[:, None]
    rows = np.sqrt(2) * np.concatenate([np.cos(k * x) / np.where(k, 1, np.sqrt(2)), np.sin(k[1:] * x)], 1)
    return torch.from_numpy((rows / side).reshape(-1, side).astype(np.float32))


@cache
def _band(num_axes: int) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    highest = _HIGHEST[num_axes]
    k = np.arange(highest + 1)
    grids = np.meshgrid(*[np.concatenate([k, k[1:]])] * num_axes, indexing="ij")
    squared = np.asarray(sum(grid.astype(np.float64) ** 2 for grid in grids)).ravel()
    kept = np.flatnonzero((squared > 0) & (squared <= (highest + 0.5) ** 2))
    weights = (1 - np.exp(-squared / (2 * _LOW**2))) * np.exp(-squared / (2 * _HIGH**2))
    odd = np.meshgrid(*[np.arange(2 * highest + 1) > highest] * num_axes, indexing="ij")
    rows, columns = (grid.ravel()[kept] for grid in odd[-2:])
    groups = tuple(_where((rows == r) & (columns == c)) for r in (False, True) for c in (False, True))
    return torch.from_numpy(kept), torch.from_numpy(weights[kept].astype(np.float32)), groups


def _where(mask: NDArray[np.bool_]) -> torch.Tensor:
    return torch.from_numpy(np.flatnonzero(mask))
