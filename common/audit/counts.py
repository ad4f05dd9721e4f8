"""The one vector of integers that leaves a site in an audit: how many patients and canaries have scored how high.

**Guarantee.** Every patient is in exactly one cell, chosen by that patient's own images, coins and label and by public
numbers alone. So one patient more or less moves the vector by 1 in one cell (L1 sensitivity 1), and discrete Laplace
noise of scale 1 / epsilon in each cell of a group makes the counts epsilon-private for the patients of that group: the
groups are disjoint sets of patients, and no patient is charged twice. Canaries are nobody: their cells need no noise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TRAINING, HELD_OUT_A, HELD_OUT_B = range(3)
"""The groups of patients: trained on, and the two halves of those that were held out."""
NUM_GROUPS = 3

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class AuditCounts:
    """Counts of one site or of all, without noise or with it (then cells can be negative).

    Args:
        patients: (3, num_classes, num_bins) int64: training, held-out half A, held-out half B.
        canaries: (2, num_bins) int64: included in training, left out.
    """

    patients: Integers
    canaries: Integers

    @property
    def num_classes(self) -> int:
        """Classes of patients."""
        return int(self.patients.shape[1])

    @property
    def num_bins(self) -> int:
        """Bins of the score, one more than edges."""
        return int(self.patients.shape[2])


@dataclass(frozen=True)
class CountNoise:
    """The noise in opened counts. All four are public.

    Args:
        epsilon_training: what the counts cost a patient who was trained on, above 0.
        epsilon_held_out: what they cost one who was held out, above 0.
        num_sites: sites in the sum; each has added the difference of two negative binomials NB(1 / num_noisy,
            1 - exp(-epsilon)) to each cell.
        num_noisy: shares that are together one discrete Laplace, 1 to ``num_sites``: sites that surely do not collude.
    """

    epsilon_training: float
    epsilon_held_out: float
    num_sites: int
    num_noisy: int

    def __post_init__(self) -> None:
        if not (self.epsilon_training > 0 and self.epsilon_held_out > 0 and 1 <= self.num_noisy <= self.num_sites):
            raise ValueError(f"not the noise of a sum: {self}")

    @property
    def shape(self) -> float:
        """Discrete Laplaces in a cell of the sum, K / m; from 1."""
        return self.num_sites / self.num_noisy

    def epsilon(self, group: int) -> float:
        """What the counts cost a patient of a group."""
        return self.epsilon_training if group == TRAINING else self.epsilon_held_out

    def variance(self, group: int) -> float:
        """Of the noise in one cell of a group.

        >>> round(CountNoise(0.5, 2.0, num_sites=3, num_noisy=3).variance(TRAINING), 2)
        7.84
        """
        # exp(-epsilon) / (1 - exp(-epsilon))^2 is 1 / (2 sinh(epsilon / 2))^2, without the loss of digits.
        return self.shape * 2 / (2 * math.sinh(self.epsilon(group) / 2)) ** 2


def length(num_classes: int, num_bins: int) -> int:
    """Integers in the vector.

    >>> length(num_classes=2, num_bins=10)
    80
    """
    return NUM_GROUPS * num_classes * num_bins + 2 * num_bins


def cells_of(group: int, num_classes: int, num_bins: int) -> slice:
    """Where the cells of a group of patients are in the vector; each of them gets this group's noise."""
    size = num_classes * num_bins
    return slice(group * size, (group + 1) * size)


def to_vector(counts: AuditCounts) -> Integers:
    """The counts as one vector (length,) int64: groups, in them classes, in them bins; then the canaries."""
    return np.concatenate([counts.patients.ravel(), counts.canaries.ravel()]).astype(np.int64)


def from_vector(vector: Integers, num_classes: int, num_bins: int) -> AuditCounts:
    """The counts again. Raises ValueError for a vector of another length or of no integers."""
    expected = length(num_classes, num_bins)
    if vector.shape != (expected,) or vector.dtype.kind not in "iu":
        raise ValueError(f"expected {expected} integers, found {vector.dtype} of shape {vector.shape}")
    patients, canaries = np.split(vector.astype(np.int64), [expected - 2 * num_bins])
    return AuditCounts(patients.reshape(NUM_GROUPS, num_classes, num_bins), canaries.reshape(2, num_bins))


def count(
    scores: NDArray[np.floating],
    groups: Integers,
    classes: Integers,
    edges: Sequence[float],
    num_classes: int,
    *,
    canary_scores: NDArray[np.floating] | None = None,
    canary_included: NDArray[np.bool_] | None = None,
) -> AuditCounts:
    """The counts of a site's patients and canaries.

    Args:
        scores: (patients,) float; any real number, infinities included, each falls into a bin.
        groups: (patients,) 0 to 2: ``TRAINING``, ``HELD_OUT_A`` or ``HELD_OUT_B``.
        classes: (patients,) 0 to ``num_classes`` - 1.
        edges: strictly increasing; bin 0 is below the first, bin b has edges[b - 1] <= score < edges[b].
        num_classes: of the study.
        canary_scores: (canaries,) float; None for no canaries.
        canary_included: (canaries,) whether the canary was trained on.

    Raises:
        ValueError: a score is NaN, a group or a class is none, lengths differ, or edges do not increase. A patient
            who cannot be counted is an error, never a patient left out: who is left out could be told.

    >>> count(np.array([0.1, 0.9]), np.array([0, 2]), np.array([0, 0]), [0.5], 1).patients.tolist()
    [[[1, 0]], [[0, 0]], [[0, 1]]]
    """
    num_bins = len(edges) + 1
    if not len(scores) == len(groups) == len(classes):
        raise ValueError(f"{len(scores)} scores, {len(groups)} groups and {len(classes)} classes")
    if len(groups) and not (0 <= groups.min() and groups.max() < NUM_GROUPS):
        raise ValueError(f"groups must be 0 to {NUM_GROUPS - 1}")
    if len(classes) and not (0 <= classes.min() and classes.max() < num_classes):
        raise ValueError(f"classes must be 0 to {num_classes - 1}")
    cells = (groups.astype(np.int64) * num_classes + classes) * num_bins + bins_of(scores, edges)
    patients = np.bincount(cells, minlength=NUM_GROUPS * num_classes * num_bins)
    canaries = np.zeros(2 * num_bins, np.int64)
    if canary_scores is not None and canary_included is not None:
        if len(canary_scores) != len(canary_included):
            raise ValueError(f"{len(canary_scores)} scores of canaries, {len(canary_included)} coins")
        rows = np.where(canary_included, 0, 1)
        canaries = np.bincount(rows * num_bins + bins_of(canary_scores, edges), minlength=2 * num_bins)
    return AuditCounts(
        patients.astype(np.int64).reshape(NUM_GROUPS, num_classes, num_bins),
        canaries.astype(np.int64).reshape(2, num_bins),
    )


def bins_of(scores: NDArray[np.floating], edges: Sequence[float]) -> Integers:
    """The bin of each score, 0 to len(edges). Raises ValueError for NaN or edges that do not increase strictly."""
    borders = np.asarray(edges, np.float64)
    if np.isnan(borders).any() or not (np.diff(borders) > 0).all():
        raise ValueError("edges must increase strictly")
    if np.isnan(scores).any():
        raise ValueError("a score is NaN")
    return np.searchsorted(borders, np.asarray(scores, np.float64), side="right").astype(np.int64)
