"""The one convention for axial slices, and which part of the head they are taken from.

A slice is ``array[row, column]``. Row 0 is anterior (the forehead is up) and column 0 is the patient's right, so the
patient's right lies on the left of the picture, as radiologists hang it.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

SLICE_RANGE = (0.5, 0.75)
"""Slices are taken between these fractions of a volume's depth, from inferior (0) to superior (1).

In a field of view that just holds the head this runs from the basal ganglia, through the lateral ventricles, to the
centrum semiovale: the levels at which most of a slice is brain.
"""


def axial_slice(volume_ras: NDArray[Any], z: int) -> NDArray[Any]:
    """One axial slice of a volume, in the project's convention.

    Args:
        volume_ras: (x, y, z), indices growing towards the patient's right, anterior and superior.
        z: index of the slice; 0 is the most inferior.

    Returns:
        A view of the volume, (y, x): row 0 anterior, column 0 the patient's right.
    """
    return volume_ras[::-1, ::-1, z].T


def slice_indices(depth: int) -> range:
    """The slices of a volume of ``depth`` slices whose centres lie within ``SLICE_RANGE``.

    Args:
        depth: number of slices, 1 or more.

    Returns:
        Indices, inferior first. Never empty: a very thin volume gives its middle slice.
    """
    low, high = SLICE_RANGE
    first = int(np.ceil(low * depth - 0.5))
    last = int(np.floor(high * depth - 0.5))
    return range(first, last + 1) if first <= last else range(depth // 2, depth // 2 + 1)
