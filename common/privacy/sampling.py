"""Which patients take part in a step: Poisson sampling from the operating system's cryptographic source."""

import os
from collections.abc import Callable
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

ByteSource = Callable[[int], bytes]


def draw_patients(num_patients: int, sampling_probability: float, source: ByteSource = os.urandom) -> NDArray[np.intp]:
    """Indices of the patients drawn for one step, ascending; possibly none.

    Args:
        num_patients: size of the training cohort, 0 or more.
        sampling_probability: chance of each patient, in (0, 1].
        source: bytes from a cryptographic source; anything else only in tests.

    **Guarantee.** Every patient is an independent coin, fresh at every call (Poisson subsampling, as assumed by the
    accountants; Abadi et al. 2016). The coin compares 64 random bits with floor(q 2^64), so its bias is under 2^-64 and
    never upward.
    """
    if not 0 < sampling_probability <= 1:
        raise ValueError(f"sampling_probability must be in (0, 1], found {sampling_probability}")
    threshold = int(Fraction(sampling_probability) * 2**64)
    coins = np.frombuffer(_exactly(source, 8 * num_patients), dtype=np.uint64)
    if threshold == 2**64:
        return np.arange(num_patients, dtype=np.intp)
    return np.flatnonzero(coins < np.uint64(threshold))


def _exactly(source: ByteSource, count: int) -> bytes:
    data = source(count)
    if len(data) != count:
        raise OSError(f"the random source gave {len(data)} bytes of {count}")
    return data
