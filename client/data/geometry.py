"""Whether DICOM slices make up a regular stack, and how that stack lies in the patient.

The criteria follow what dicom2nifti documents: at least four slices, one orientation, one increment, and a stack
that runs along the slices' normal (a tilted gantry shears it). The tolerances are this project's.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from client.data.pixels import MIN_SLICES, FloatArray, Refused, Volume, check_spacing

_ANGLE_COSINE = float(np.cos(np.deg2rad(1.0)))
_INCREMENT_TOLERANCE = 0.1  # of the median increment
_SAME_POSITION_MM = 1e-3

_Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Frames:
    """Positions (n, 3), row and column directions (n, 6), row and column spacing (n, 2); mm, DICOM's LPS axes."""

    positions: _Array
    directions: _Array
    spacing: _Array

    @classmethod
    def of(cls, places: list[tuple[float, ...]]) -> "Frames":
        """Splits rows of 11 numbers into their parts."""
        table = np.array(places, dtype=np.float64)  # (n, 11)
        return cls(table[:, :3], table[:, 3:9], table[:, 9:])


def arrange(frames: Frames) -> tuple[list[int], _Array]:
    """Orders slices along their normal.

    Args:
        frames: at least one slice.

    Returns:
        Indices of the slices in order, and the step (3,) from each slice to the next, in mm.

    Raises:
        Refused: ``no_geometry``, ``too_few_slices``, ``mixed_orientation``, ``mixed_series``,
            ``repeated_positions``, ``uneven_increments``, ``gantry_tilt`` or ``implausible_voxel_size``.
    """
    if not all(np.isfinite(part).all() for part in (frames.positions, frames.directions, frames.spacing)):
        raise Refused("no_geometry", "expected finite positions and directions, found others")
    across, down = frames.directions[:, :3], frames.directions[:, 3:]
    if np.abs(np.linalg.norm(frames.directions.reshape(-1, 3), axis=1) - 1).max() > 0.01:
        raise Refused("no_geometry", "expected directions of unit length, found others")
    if np.abs((across * down).sum(axis=1)).max() > 0.01:
        raise Refused("no_geometry", "expected perpendicular rows and columns, found others")
    if (across @ across[0]).min() < _ANGLE_COSINE or (down @ down[0]).min() < _ANGLE_COSINE:
        raise Refused("mixed_orientation", "expected one orientation in a series, found several")
    if not np.allclose(frames.spacing, frames.spacing[0], rtol=1e-3):
        raise Refused("mixed_series", "expected slices of one pixel spacing in a series, found several")
    count = len(frames.positions)
    if count < MIN_SLICES:
        raise Refused("too_few_slices", f"expected at least {MIN_SLICES} slices in a series, found {count}")
    normal = np.cross(across[0], down[0])
    order = np.argsort(frames.positions @ normal, kind="stable")
    steps = np.diff(frames.positions[order], axis=0)  # (n - 1, 3)
    lengths = np.linalg.norm(steps, axis=1)
    if lengths.min() < _SAME_POSITION_MM:
        raise Refused("repeated_positions", "expected one slice at each position, found several (a time series?)")
    if np.abs(lengths - np.median(lengths)).max() > _INCREMENT_TOLERANCE * np.median(lengths):
        raise Refused("uneven_increments", "expected evenly spaced slices, found gaps (a slice missing?)")
    step: _Array = (frames.positions[order[-1]] - frames.positions[order[0]]) / (count - 1)
    if abs(step @ normal) < _ANGLE_COSINE * np.linalg.norm(step):
        raise Refused("gantry_tilt", "expected a stack along the slices' normal, it is sheared (a tilted gantry?)")
    check_spacing((*frames.spacing[0], float(np.linalg.norm(step))))
    return [int(i) for i in order], step


def to_ras(stack: FloatArray, first: tuple[float, ...], step: _Array) -> Volume:
    """Reorients a DICOM stack to the closest RAS order.

    Args:
        stack: (column, row, slice).
        first: the 11 numbers of the first slice in order.
        step: (3,) mm from slice to slice.
    """
    row_spacing, column_spacing = first[9], first[10]
    affine = np.eye(4)
    affine[:3, 0] = np.array(first[3:6]) * column_spacing  # along a row the column index grows
    affine[:3, 1] = np.array(first[6:9]) * row_spacing
    affine[:3, 2] = step
    affine[:2] *= -1  # LPS to RAS
    return canonical(stack, affine)


def canonical(voxels: FloatArray, affine: _Array) -> Volume:
    """Permutes and flips axes to the closest RAS order; nothing is interpolated.

    Args:
        voxels: three axes.
        affine: (4, 4), voxel index to RAS millimetres, invertible.
    """
    from nibabel import orientations

    tools: Any = orientations
    orientation = tools.io_orientation(affine)  # (3, 2): the RAS axis of each voxel axis, and its sign
    spacing = np.empty(3)
    spacing[orientation[:, 0].astype(int)] = np.linalg.norm(affine[:3, :3], axis=0)
    reordered = np.ascontiguousarray(tools.apply_orientation(voxels, orientation))
    return Volume(reordered, (float(spacing[0]), float(spacing[1]), float(spacing[2])))
