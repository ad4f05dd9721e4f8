"""Which candidates a site drops because they show one of its patients, and how many it drops for no reason.

A verdict about noisy counts cannot show a single copy. So a candidate is dropped where one patient stands out: more
similar to it than its nearest fellow among the candidates, and than every other patient.
"""

import numpy as np
from numpy.typing import NDArray

from common.audit.score import Comparison

Mask = NDArray[np.bool_]


def excess(comparison: Comparison, nearest: NDArray[np.float32]) -> NDArray[np.float32]:
    """How far each candidate's most similar patient stands out, (n,).

    Args:
        comparison: of patients with n candidates.
        nearest: (n,) similarity of each candidate to its nearest fellow.
    """
    others = np.maximum(comparison.second_sims, nearest)
    return np.asarray(comparison.nearest_sims - others, np.float32)


def threshold(held_out: Comparison, nearest: NDArray[np.float32], drop: float) -> float:
    """The excess from which on a candidate shows a patient: at most a share ``drop`` of them reach it for patients who
    were never trained on, and 0 at least.
    """
    found = np.sort(excess(held_out, nearest))
    allowed = int(drop * len(found))
    return max(0.0, float(np.nextafter(found[len(found) - allowed - 1], np.float32(np.inf))))


def matched(training: Comparison, nearest: NDArray[np.float32], limit: float) -> Mask:
    """The candidates that show a patient who was trained on, (n,)."""
    return np.asarray(excess(training, nearest) >= limit)


def decoy_probability(decoys: float, num_sites: int) -> float:
    """With which chance each of so many sites drops a candidate for no reason, so that one of them does with the chance
    ``decoys``.

    >>> round(decoy_probability(0.25, 2), 4)
    0.134
    """
    return float(-np.expm1(np.log1p(-decoys) / num_sites))
