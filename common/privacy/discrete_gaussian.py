"""Exact samples of the discrete Gaussian: integers alone decide, so no rounding of a float weakens the noise.

N_Z(0, s^2) gives the integer x with a probability proportional to exp(-x^2 / (2 s^2)) (Canonne, Kamath and Steinke
2020). Many samples are made at a time, each a trial that is kept or thrown away by coins of the right probabilities.
"""

import os

import numpy as np

from common.privacy.coins import Integers, Random, exp_coins, geometric
from common.privacy.sampling import ByteSource

LARGEST_SCALE = 1 << 24

_TRIALS = 2.12  # per sample: 1 / ((1 - 1/e) sqrt(pi / 2) exp(-1/2)) are needed on average, which is 2.09
_WORDS = 1000  # per sample: about ten are needed


def sample(count: int, scale: int, source: ByteSource = os.urandom) -> Integers:
    """Independent samples of N_Z(0, scale^2).

    Args:
        count: how many, 0 or more.
        scale: the parameter s, 1 to 2^24; from 1 on the standard deviation is s to 1e-6, and never above it.
        source: bytes from a cryptographic source; anything else only in tests.

    Returns:
        (count,) int64.

    Raises:
        ValueError: the scale is not an integer from 1 to 2^24.
        OSError: the source failed, gave too little, or does not give random bytes. Nothing is returned.

    **Guarantee.** No seed exists, and no float decides anything: what is drawn is N_Z(0, scale^2) itself (algorithms 1
    to 3 of the paper). Every integer fits its 64 bits: numerators (|y| - s)^2 are below (128 s)^2 <= 2^62, denominators
    2 s^2 k of the k-th coin of a series below 2^63 for k < 2^14. A sample 128 scales from zero, 2^14 coins in one
    series or a thousand words a sample come from a working source with a probability below 2^-180 a sample; where they
    come, the source is called broken.

    The time taken depends on the samples, all of them together: how many trials were thrown away.

    >>> sample(3, scale=40_000).shape
    (3,)
    """
    if not (isinstance(scale, int) and 1 <= scale <= LARGEST_SCALE):
        raise ValueError(f"scale must be an integer from 1 to {LARGEST_SCALE}, found {scale}")
    words, parts, missing = Random(source, _WORDS * (count + 100)), [np.zeros(0, np.int64)], count
    while missing > 0:
        part = _trials(int(missing * _TRIALS) + 16, scale, words)[:missing]
        parts.append(part)
        missing -= len(part)
    return np.concatenate(parts)


def _trials(count: int, scale: int, random: Random) -> Integers:
    """The samples that ``count`` trials gave, fewer than half as many.

    A discrete Laplace y of the same scale (algorithm 2) is kept with the probability exp(-(|y| - s)^2 / (2 s^2)), by
    which exp(-|y| / s) becomes exp(-y^2 / (2 s^2)) times a constant (algorithm 3, with t = s).
    """
    magnitude = geometric(count, scale, random)
    negative = random.bits(len(magnitude))
    once = ~negative | (magnitude != 0)  # zero has two signs, and must not come twice as often
    magnitude, negative = magnitude[once], negative[once]
    kept = exp_coins((magnitude - scale) ** 2, 2 * scale**2, random)
    samples: Integers = np.where(negative, -magnitude, magnitude)[kept]
    return samples
