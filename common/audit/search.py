"""The nearest of many images under flips, rotations, zooms and shifts: a search over all, then the best compared.

No approximate index: the coarse search is a matrix product over every pair and every transform. What is found for an
image does not depend on the others of its block, beyond the rounding of float32.
"""

from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray

from common.audit.likeness import REACH, bands, closeness, likeness, points
from common.audit.waves import coarse_vectors, parities

ROTATIONS = (-5.0, 0.0, 5.0)
"""Degrees, in the plane of the slices; windows take up the rest."""
SCALES = (0.9, 1.0, 1.1)
FLIPS = ((False, False), (False, True), (True, False), (True, True))
"""(up-down, left-right), in the plane of the slices."""
SHIFTS = {2: (-4, -2, 0, 2, 4), 3: (-4, 0, 4)}
"""Pixels of the frame, along each axis."""
NUM_COMPARED = 32
_CANDIDATES_AT_ONCE = 1024
_PAIRS_AT_ONCE = {2: 4, 3: 1}
_NEVER = -9.0


@dataclass(frozen=True)
class Pairs:
    """What was found for m images: k candidates of each, in no order.

    Args:
        indices: (m, k) which candidates.
        sims: (m, k) similarity of each, 1 at most.
        transforms: (m, k, 3 + axes): index into FLIPS, ROTATIONS and SCALES, then the shift in pixels.
    """

    indices: NDArray[np.int64]
    sims: NDArray[np.float32]
    transforms: NDArray[np.int64]


def prepare(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Coarse vectors (n, dim) and compared points (n, 2, *half the frame) of normalised images, not transformed."""
    return coarse_vectors(images)[:, 0], points(bands(images))


def find(
    images: torch.Tensor,
    coarse: torch.Tensor,
    fine: torch.Tensor,
    usual: torch.Tensor,
    exclude: torch.Tensor | None = None,
) -> Pairs:
    """The candidates nearest to each normalised image.

    Half of those compared are the most similar by the coarse search, half the most similar beyond what is usual for
    the candidate: a bent copy of a patient is like few others, and would be crowded out by those that are like many.

    Args:
        images: (m, *frame).
        coarse, fine: of the candidates, from ``prepare``.
        usual: (n,) each candidate's coarse similarity to its nearest other.
        exclude: (m,) one candidate for each image that is not to be found: itself.
    """
    num_axes = images.ndim - 1
    vectors = _turned_and_moved(images)
    near = _coarse_similarities(vectors, coarse, num_axes)
    if exclude is not None:
        near[torch.arange(len(images)), exclude] = _NEVER
    available = len(coarse) - (exclude is not None)
    chosen = near.topk(min(NUM_COMPARED // 2, available), dim=1).indices
    beyond = (near - usual).scatter_(1, chosen, _NEVER)
    more = beyond.topk(min(NUM_COMPARED // 2, available - chosen.shape[1]), dim=1).indices
    chosen = torch.cat([chosen, more], 1)
    found = [_compared(*each, coarse, fine) for each in zip(images, vectors, chosen, strict=True)]
    return Pairs(chosen.numpy(), np.stack([sims for sims, _ in found]), np.stack([how for _, how in found]))


def similarities(image: torch.Tensor, coarse: torch.Tensor, fine: torch.Tensor, least: float) -> NDArray[np.float32]:
    """(n,) similarity of one image (1, *frame) to candidates; -1 where the coarse search gives less than ``least``."""
    vectors = _turned_and_moved(image)
    chosen = (_coarse_similarities(vectors, coarse, image.ndim - 1)[0] >= least).nonzero()[:, 0]
    out = np.full(len(coarse), -1, np.float32)
    for start in range(0, len(chosen), 256):
        part = chosen[start : start + 256]
        out[part.numpy()] = _compared(image[0], vectors[0], part, coarse, fine)[0]
    return out


def aligned(image: torch.Tensor, transform: NDArray[np.int64]) -> torch.Tensor:
    """A normalised image (*frame) as it was compared: turned, zoomed, flipped and moved onto the candidate."""
    flip, rotation, scale, *shift = transform.tolist()
    margin = max(map(abs, shift), default=0)
    turned = _padded(_warped(image[None], ROTATIONS[rotation], SCALES[scale])[0], margin, image.ndim)
    cut = tuple(slice(margin + d, margin + d + side) for d, side in zip(shift, image.shape, strict=True))
    return _flipped(turned[cut], FLIPS[flip])


def _turned_and_moved(images: torch.Tensor) -> torch.Tensor:
    """(m, rotations x scales x shifts, dim) coarse vectors."""
    shifts = tuple(map(float, SHIFTS[images.ndim - 1]))
    return torch.cat([coarse_vectors(_warped(images, *how), shifts) for how in product(ROTATIONS, SCALES)], 1)


def _coarse_similarities(vectors: torch.Tensor, candidates: torch.Tensor, num_axes: int) -> torch.Tensor:
    """(m, n) the largest dot product of an image's vectors, flipped or not, with each candidate's."""
    groups = parities(num_axes)
    best = torch.empty(len(vectors), len(candidates))
    queries = [[vectors[:, k, group].contiguous() for group in groups] for k in range(vectors.shape[1])]
    for start in range(0, len(candidates), _CANDIDATES_AT_ONCE):
        block = candidates[start : start + _CANDIDATES_AT_ONCE]
        parts = [block[:, group].T.contiguous() for group in groups]
        into = torch.full((len(vectors), len(block)), -1.0)
        products = [torch.empty_like(into) for _ in groups]
        total = torch.empty_like(into)
        for query in queries:
            for one, other, out in zip(query, parts, products, strict=True):
                torch.mm(one, other, out=out)
            ee, eo, oe, oo = products
            # A flip changes the sign of the odd waves: the best of four sums is two sums and two absolute values.
            torch.add(ee, oe, out=total)
            ee.sub_(oe)
            torch.add(eo, oo, out=oe)
            torch.maximum(into, total.add_(oe.abs_()), out=into)
            torch.maximum(into, ee.add_(eo.sub_(oo).abs_()), out=into)
        best[:, start : start + _CANDIDATES_AT_ONCE] = into
    return best


def _compared(
    image: torch.Tensor, vectors: torch.Tensor, chosen: torch.Tensor, coarse: torch.Tensor, fine: torch.Tensor
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Similarities (k,) of one image to the chosen candidates, and transforms (k, 3 + axes).

    Each pair is compared once, under the transform that the coarse search likes best.
    """
    num_axes = image.ndim
    tried = _under_flips(vectors, num_axes) @ coarse[chosen].T  # (flips x rotations x scales x shifts, k)
    best, place = tried.max(0)
    shape = (len(FLIPS), len(ROTATIONS), len(SCALES), *[len(SHIFTS[num_axes])] * num_axes)
    how = np.stack(np.unravel_index(place.numpy(), shape), -1)
    how[:, 3:] = np.array(SHIFTS[num_axes])[how[:, 3:]]
    reach, margin = REACH[num_axes], REACH[num_axes] + max(SHIFTS[num_axes])
    filtered = bands(image[None])[0]
    turned = {
        each: _padded(_warped(filtered, ROTATIONS[each[0]], SCALES[each[1]]), margin, num_axes)
        for each in {(int(r), int(s)) for r, s in how[:, 1:3]}
    }
    sims = []
    for start in range(0, len(chosen), _PAIRS_AT_ONCE[num_axes]):
        part = slice(start, start + _PAIRS_AT_ONCE[num_axes])
        cuts = []
        for flip, rotation, scale, *shift in how[part].tolist():
            corner, length = [margin - reach + d for d in shift], image.shape[-1] + 2 * reach
            cut = (slice(None), *(slice(first, first + length) for first in corner))
            cuts.append(_flipped(turned[rotation, scale][cut], FLIPS[flip]))
        correlations = likeness(torch.stack(cuts), fine[chosen[part]])
        sims.append(closeness(torch.cat([best[part, None], correlations], 1)).mean(1))
    return torch.cat(sims).numpy(), how


def _under_flips(vectors: torch.Tensor, num_axes: int) -> torch.Tensor:
    """(flips x k, dim) of vectors (k, dim)."""
    signs = torch.ones(len(FLIPS), vectors.shape[-1])
    for group, odd in zip(parities(num_axes), product((False, True), repeat=2), strict=True):
        for k, flip in enumerate(FLIPS):
            signs[k, group] = (-1.0) ** sum(a and b for a, b in zip(odd, flip, strict=True))
    return (signs[:, None] * vectors).flatten(0, 1)


def _warped(images: torch.Tensor, degrees: float, scale: float) -> torch.Tensor:
    """Images (n, ..., rows, columns) turned in the plane and zoomed about the middle."""
    if degrees == 0 and scale == 1:
        return images
    grid = _grid(images.ndim - 1, images.shape[-1], degrees, scale)
    turned = torch.nn.functional.grid_sample(images[None], grid, "bilinear", "border", align_corners=False)
    return turned[0]


@cache
def _grid(num_axes: int, side: int, degrees: float, scale: float) -> torch.Tensor:
    angle = np.deg2rad(degrees)
    matrix = torch.eye(num_axes, num_axes + 1)
    matrix[:2, :2] = torch.tensor([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return torch.nn.functional.affine_grid(matrix[None] / scale, [1, 1, *[side] * num_axes], False)


def _flipped(images: torch.Tensor, flip: tuple[bool, bool]) -> torch.Tensor:
    """Images (..., rows, columns) flipped."""
    return images.flip([axis for axis, on in zip((-2, -1), flip, strict=True) if on]) if any(flip) else images


def _padded(images: torch.Tensor, margin: int, num_axes: int) -> torch.Tensor:
    """Frames (..., *frame) with a margin of nothing on every side."""
    return torch.nn.functional.pad(images, [margin] * (2 * num_axes))
