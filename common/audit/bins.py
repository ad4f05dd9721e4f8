"""The rule from candidates to the borders of the score's bins, fixed before training: no patient has a say in it.

A patient's score is max(sim - c_j) over images, transforms and candidates j, where sim is a correlation and c_j the
likeness of candidate j to its nearest fellow. So 0 is "as near to a candidate as its nearest fellow is", an exact copy
scores 1 - c_j, and t = median(c) says where a typical copy is, 1 - t, and where no likeness at all is, -t. The borders:

- 1/2, 1/4 and 1/8 of the way from 0 down to -t: there are the patients of a blurry generator, whose images are more
  like each other than like anybody;
- 0, then 1/8, 1/4 and 1/2 of the way up to a typical copy. Of fresh patients (phantoms, MRI and X-ray) about half
  score above 0, one in 10 to 100 above the next to last border, and none was seen above the last, as most exact copies
  were. So what matters most is in one bin: each bin more of a tail would bring its own noise.
"""

import numpy as np
from numpy.typing import NDArray

BINS_VERSION = 1
STEPS_DOWN = (1 / 2, 1 / 4, 1 / 8)
STEPS_UP = (1 / 8, 1 / 4, 1 / 2)
NUM_BINS = len(STEPS_DOWN) + 1 + len(STEPS_UP) + 1
REFERENCE = (0.0, 0.005, 0.045, 0.45, 0.25, 0.2, 0.0498, 0.0002)
"""Share of patients in each bin for the power before training: about as on phantoms, MRI and X-ray."""
SMALLEST_WAY = 1e-2
"""Of a correlation: the lengths of the way up and down are at least this, so that borders differ by more than rounding
on two devices does."""


def bin_edges(nearest: NDArray[np.floating]) -> NDArray[np.float32]:
    """The borders of the bins.

    Args:
        nearest: (candidates,) c_j, similarity of each candidate to its nearest fellow, in [-1, 1].

    Returns:
        (``NUM_BINS`` - 1,) float32, strictly increasing. The same array gives the same borders on every machine.

    Raises:
        ValueError: fewer than two candidates; a candidate that is constant and so like nothing (its c_j is no number);
            or candidates so alike (constant or collapsed generators) that a copy could not be told from a fellow.

    >>> bin_edges(np.array([0.8, 0.8])).astype(float).round(3).tolist()
    [-0.4, -0.2, -0.1, 0.0, 0.025, 0.05, 0.1]
    """
    if nearest.ndim != 1 or len(nearest) < 2:
        raise ValueError(f"expected the likenesses of two candidates or more, found {nearest.shape}")
    if not np.isfinite(nearest).all():
        raise ValueError("a candidate is like nothing: its image is constant")
    if np.abs(nearest).max() > 1.001:
        raise ValueError(f"expected correlations, from -1 to 1, found {np.abs(nearest).max():.3f}")
    typical = float(np.median(nearest.astype(np.float64)))
    up, down = 1 - typical, max(typical, SMALLEST_WAY)
    if up < SMALLEST_WAY:
        raise ValueError(
            f"half of the candidates have a fellow that is {typical:.4f} like them, so that a copy of a patient could "
            "not be told from any other image"
        )
    return np.array([*(-down * s for s in STEPS_DOWN), 0.0, *(up * s for s in STEPS_UP)], np.float32)
