"""How close candidates come to patients: similarity under flips, rotations, zooms and shifts, less what is usual.

The score of a patient is the largest of sim - c over the patient's images, the transforms and the candidates, where c
is the candidate's similarity to its nearest other candidate. A copy of a patient is closer to that patient than to any
other candidate; an image that is like everybody is like the other candidates too. Nothing but images goes in: labels
are not the score's business.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from common.audit.images import normalise
from common.progress import Listener

if TYPE_CHECKING:
    import torch

    from common.audit.search import Pairs

T = TypeVar("T")

SCORE_VERSION = 1
DUPLICATE = 0.8
"""Two candidates at least as similar as this are near-duplicates: their correlations are above 0.97."""
_COARSE_DUPLICATE = 0.9  # near-duplicates are at least so alike in the coarse search
_AT_ONCE = {2: 128, 3: 2}


@dataclass(frozen=True)
class Candidates:
    """Candidates with what is computed of them once.

    Args:
        images: (n, rows, columns) or (n, depth, rows, columns) uint8, as given.
        coarse: (n, dim) float32 unit vectors to search by.
        fine: (n, 2, *half the frame) float32 points to compare by.
        usual: (n,) float32 coarse similarity to the nearest other, untransformed.
    """

    images: NDArray[np.uint8]
    coarse: NDArray[np.float32]
    fine: NDArray[np.float32]
    usual: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.images)

    def those(self, kept: NDArray[np.bool_]) -> "Candidates":
        """Those of them that a mask (n,) names."""
        return Candidates(self.images[kept], self.coarse[kept], self.fine[kept], _usual(self.coarse[kept]))


@dataclass(frozen=True)
class Comparison:
    """How close p patients and n candidates come to each other.

    Args:
        scores: (p,) float32: largest similarity less the candidate's own c, over images, transforms and candidates.
        images: (p,) which image gives it, of all images.
        candidates: (p,) which candidate gives it.
        sims: (p,) that pair's similarity.
        transforms: (p, 3 + axes) under which transform: ``aligned`` applies it. Indices into ``search.FLIPS``,
            ROTATIONS and SCALES, then the shift in pixels of the frame.
        nearest_sims: (n,) largest similarity of each candidate to a patient, of those to whose images it was among
            the nearest few; -1 where it was to none.
        nearest_patients: (n,) which patient; -1 for none.
        second_sims: (n,) largest similarity to another patient; -1 likewise.
    """

    scores: NDArray[np.float32]
    images: NDArray[np.int64]
    candidates: NDArray[np.int64]
    sims: NDArray[np.float32]
    transforms: NDArray[np.int64]
    nearest_sims: NDArray[np.float32]
    nearest_patients: NDArray[np.int64]
    second_sims: NDArray[np.float32]

    @property
    def flips(self) -> NDArray[np.bool_]:
        """(p, 2) whether flipped up-down, left-right: after the rest."""
        from common.audit.search import FLIPS

        return np.array(FLIPS, np.bool_)[self.transforms[:, 0]]

    @property
    def rotations(self) -> NDArray[np.float64]:
        """(p,) degrees."""
        from common.audit.search import ROTATIONS

        return np.array(ROTATIONS)[self.transforms[:, 1]]

    @property
    def scales(self) -> NDArray[np.float64]:
        """(p,) zooms."""
        from common.audit.search import SCALES

        return np.array(SCALES)[self.transforms[:, 2]]

    @property
    def shifts(self) -> NDArray[np.int64]:
        """(p, axes) pixels of the frame."""
        return self.transforms[:, 3:]


def prepare_candidates(images: NDArray[np.uint8], progress: Listener | None = None) -> Candidates:
    """All that is computed of candidates once.

    Args:
        images: (n, rows, columns) or (n, depth, rows, columns), n >= 1.
        progress: hears how many are done.

    Returns:
        The candidates.
    """
    import torch

    from common.audit.search import prepare

    def work(block: slice) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        coarse, fine = prepare(torch.from_numpy(normalise(images[block])))
        return coarse.numpy(), fine.numpy()

    parts = list(_blockwise(work, len(images), images.ndim - 1, progress))
    coarse = np.concatenate([each[0] for each in parts])
    return Candidates(images, coarse, np.concatenate([each[1] for each in parts]), _usual(coarse))


def self_similarity(
    candidates: Candidates, among: NDArray[np.int64] | None = None, progress: Listener | None = None
) -> NDArray[np.float32]:
    """Similarity c of candidates to their nearest other candidate.

    Args:
        candidates: all of them, two or more.
        among: (m,) indices of those asked for; all by default.
        progress: hears how many are done.

    Returns:
        (n,) or (m,).

    Raises:
        ValueError: there is one candidate or none.
    """
    import torch

    from common.audit.search import find

    if len(candidates) < 2:
        raise ValueError(f"{len(candidates)} candidates have no others to be like; make more")
    asked = np.arange(len(candidates)) if among is None else among
    index = _tensors(candidates)

    def work(block: slice) -> NDArray[np.float32]:
        own = torch.from_numpy(asked[block])
        images = torch.from_numpy(normalise(candidates.images[asked[block]]))
        return np.asarray(find(images, *index, own).sims.max(1))

    return np.concatenate(list(_blockwise(work, len(asked), candidates.images.ndim - 1, progress)))


def near_duplicates(candidates: Candidates, c: NDArray[np.float32], threshold: float = DUPLICATE) -> NDArray[np.bool_]:
    """What to drop so that no two that stay are near-duplicates of each other.

    Args:
        candidates: n of them.
        c: (n,) from ``self_similarity``.
        threshold: similarity from which on two are near-duplicates.

    Returns:
        (n,) True where one is to be dropped; the first of each group stays.
    """
    import torch

    from common.audit.search import similarities

    dropped = np.zeros(len(candidates), np.bool_)
    left = np.flatnonzero(c >= threshold)
    while len(left) > 1:
        first, left = left[0], left[1:]
        image = torch.from_numpy(normalise(candidates.images[first : first + 1]))
        index = torch.from_numpy(candidates.coarse[left]), torch.from_numpy(candidates.fine[left])
        sims = similarities(image, *index, _COARSE_DUPLICATE)
        dropped[left[sims >= threshold]] = True
        left = left[sims < threshold]
    return dropped


def compare(
    candidates: Candidates,
    c: NDArray[np.float32],
    images: NDArray[np.uint8],
    starts: NDArray[np.int64],
    progress: Listener | None = None,
) -> Comparison:
    """The score of every patient, and each candidate's nearest patients.

    Args:
        candidates: n of them.
        c: (n,) from ``self_similarity``.
        images: (m, rows, columns) or (m, depth, rows, columns); may lie on disk, read block by block.
        starts: (p + 1,): patient i owns images starts[i] to starts[i + 1] - 1, at least one.
        progress: hears how many images are done.

    Returns:
        The comparison.

    Raises:
        ValueError: ``starts`` does not fit the images.
    """
    import torch

    from common.audit.search import find

    if len(images) != starts[-1] or starts[0] != 0 or np.any(np.diff(starts) < 1):
        raise ValueError(f"starts do not divide {len(images)} images into patients with an image each")
    index = _tensors(candidates)

    def work(block: slice) -> "Pairs":
        return find(torch.from_numpy(normalise(np.asarray(images[block]))), *index)

    num_patients, num_axes = len(starts) - 1, images.ndim - 1
    nearest = _Nearest(len(candidates))
    scores, sims = np.full(num_patients, -np.inf, np.float32), np.zeros(num_patients, np.float32)
    where = np.zeros((num_patients, 2), np.int64)
    transforms = np.zeros((num_patients, 3 + num_axes), np.int64)
    owners = iter(np.repeat(np.arange(num_patients), np.diff(starts)).tolist())
    row = 0
    for found in _blockwise(work, len(images), num_axes, progress):
        gains = found.sims - c[found.indices]
        for k, best in enumerate(gains.argmax(1)):
            patient = next(owners)
            nearest.hear(patient, found.indices[k], found.sims[k])
            if gains[k, best] > scores[patient]:
                scores[patient], sims[patient] = gains[k, best], found.sims[k, best]
                where[patient] = row, found.indices[k, best]
                transforms[patient] = found.transforms[k, best]
            row += 1
    return Comparison(
        scores, where[:, 0], where[:, 1], sims, transforms, nearest.sims, nearest.patients, nearest.second_sims
    )


def aligned(image: NDArray[np.uint8], transform: NDArray[np.int64]) -> NDArray[np.float32]:
    """An image as it was compared: normalised, turned, zoomed, flipped and moved onto the candidate.

    Args:
        image: (rows, columns) or (depth, rows, columns).
        transform: (3 + axes,), a row of ``Comparison.transforms``.

    Returns:
        (64, 64) or (48, 48, 48), to be drawn beside the candidate's ``normalise``.
    """
    import torch

    from common.audit import search

    return np.asarray(search.aligned(torch.from_numpy(normalise(image[None])[0]), transform).numpy())


class _Nearest:
    """The two patients nearest to each of n candidates, so far. Patients come in turn."""

    def __init__(self, n: int) -> None:
        self.sims, self.second_sims = np.full(n, -1, np.float32), np.full(n, -1, np.float32)
        self.patients = np.full(n, -1, np.int64)

    def hear(self, patient: int, indices: NDArray[np.int64], sims: NDArray[np.float32]) -> None:
        """Similarities of one of the patient's images to candidates, each named once."""
        best, theirs = self.sims[indices], self.patients[indices] == patient
        passed = ~theirs & (sims > best)
        self.second_sims[indices] = np.where(
            passed, best, np.where(theirs, self.second_sims[indices], np.maximum(self.second_sims[indices], sims))
        )
        self.sims[indices] = np.maximum(best, sims)
        self.patients[indices] = np.where(passed, patient, self.patients[indices])


def _usual(coarse: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n,) largest dot product of each vector with another; 0 of a single one."""
    out = np.zeros(len(coarse), np.float32)
    for start in range(0, len(coarse) if len(coarse) > 1 else 0, 1024):
        products = coarse[start : start + 1024] @ coarse.T
        products[np.arange(len(products)), start + np.arange(len(products))] = -1
        out[start : start + 1024] = products.max(1)
    return out


def _tensors(candidates: Candidates) -> tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]:
    import torch

    return torch.from_numpy(candidates.coarse), torch.from_numpy(candidates.fine), torch.from_numpy(candidates.usual)


def _blockwise(work: Callable[[slice], T], count: int, num_axes: int, progress: Listener | None) -> Iterator[T]:
    """Results of work on each block in order, on as many threads as torch has, each block on one."""
    import torch

    at_once, num_threads = _AT_ONCE[num_axes], torch.get_num_threads()
    blocks = [slice(start, min(start + at_once, count)) for start in range(0, count, at_once)]
    with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for block, result in zip(blocks, pool.map(work, blocks), strict=True):
                if progress is not None:
                    progress(block.stop, count)
                yield result
        finally:
            torch.set_num_threads(num_threads)  # the workers have set it for all
