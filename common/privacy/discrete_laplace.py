"""Exact shares of discrete Laplace noise: sites add them to counts whose sum is then epsilon-differentially private.

The discrete Laplace of epsilon gives the integer x with a probability proportional to exp(-epsilon |x|). A share of one
in m is the difference of two negative binomials NB(1/m, exp(-epsilon)); m shares are together the whole (Goryczka and
Xiong 2017, section 3.2; Bagdasaryan et al. 2022).

**Guarantee.** Counts of patients, each patient in one cell, plus the sum of at least m independent shares are
(epsilon, 0)-differentially private, a patient added or removed, for the very epsilon that was declared or a smaller
one:

1. *Sensitivity.* A patient moves one count by one.
2. *The sum of m shares is the discrete Laplace.* With a = exp(-epsilon), NB(r, a) has the generating function
   ((1 - a) / (1 - a z))^r. So m of NB(1/m, a) are NB(1, a), the geometric numbers of ratio a, and the difference of two
   of those gives x with the probability (1 - a) / (1 + a) a^|x|. Neighbouring x have a ratio of exp(epsilon) at most.
   More shares are independent noise on top: post-processing.
3. *The sampler is exact.* NB(1/m, a) gives k with a probability proportional to a^k times the product, over i from 1
   to k, of (m (i - 1) + 1) / (m i): rationals of at most 1. So a geometric number k of ratio a is kept when coins of
   these chances all come true, and drawn again otherwise. With a = exp(-s/t), a geometric number of ratio exp(-1/t),
   divided by s and rounded down, is one of ratio a (Canonne, Kamath and Steinke 2020, algorithm 2). Integers alone
   decide.
4. *Which epsilon.* s/t is the largest multiple of 2^-20 that is neither above the float nor above its shortest decimal
   text. So where 0.3 is declared, s/t is below both 0.3 and the double next to it.

Sums wrap where the secure sum does: a function of the sum. No seed exists.
"""

import math
import os
from fractions import Fraction

import numpy as np

from common.privacy.coins import Integers, Random, geometric
from common.privacy.sampling import ByteSource

SMALLEST_EPSILON, LARGEST_EPSILON = 1 / 1024, 100
MOST_NOISY = 1 << 20
_EPSILON_BITS = 20
_MOST_TRIALS = 1 << 18  # at a time, for the memory
_WORDS = 200  # per trial: about ten are needed


def share(epsilon: float, num_noisy: int, count: int, source: ByteSource = os.urandom) -> Integers:
    """A site's share of the noise of ``count`` cells.

    Args:
        epsilon: of the whole noise, 1/1024 to 100.
        num_noisy: m, the sites that are sure to add their share to every sum that is opened, and to tell nobody; 1 to
            2^20. With 1 the share is the whole noise.
        count: how many cells, 0 or more.
        source: bytes from a cryptographic source; anything else only in tests.

    Returns:
        (count,) int64, each independent, of mean 0 and variance 2 a / (m (1 - a)^2) with a = exp(-epsilon).

    Raises:
        ValueError: another epsilon or number of sites.
        OSError: the source failed, gave too little, or does not give random bytes. Nothing is returned, so nothing
            without noise can go on.

    The time taken depends on the samples, all of them together: how many trials were thrown away.

    >>> share(0.5, num_noisy=3, count=4).shape
    (4,)
    """
    if not SMALLEST_EPSILON <= epsilon <= LARGEST_EPSILON:  # false for NaN
        raise ValueError(f"epsilon must be from {SMALLEST_EPSILON:g} to {LARGEST_EPSILON}, found {epsilon}")
    if not 1 <= num_noisy <= MOST_NOISY:
        raise ValueError(f"num_noisy must be from 1 to {MOST_NOISY}, found {num_noisy}")
    exact = exact_epsilon(epsilon)
    both = _negative_binomial(2 * count, exact, num_noisy, source)
    return both[:count] - both[count:]


def variance(epsilon: float, num_noisy: int, num_sites: int) -> float:
    """Of the noise in a cell of an opened sum over ``num_sites`` sites: K / m times one discrete Laplace's."""
    ratio = math.exp(-exact_epsilon(epsilon))
    return 2 * ratio / (1 - ratio) ** 2 * num_sites / num_noisy


def exact_epsilon(epsilon: float) -> Fraction:
    """The epsilon that the noise has: a multiple of 2^-20, never above the declared one, as a double or as its text."""
    declared = min(Fraction(epsilon), Fraction(repr(float(epsilon))))
    return Fraction(math.floor(declared * 2**_EPSILON_BITS), 2**_EPSILON_BITS)


def _negative_binomial(count: int, epsilon: Fraction, sites: int, source: ByteSource) -> Integers:
    """``count`` independent numbers of NB(1 / sites, exp(-epsilon))."""
    ratio = math.exp(-epsilon)
    # Kept are 1 - 1/e of the geometric trials, and (1 - a)^(1 - 1/m) of those; how many are tried changes no sample.
    trials = 1.1 / ((1 - 1 / math.e) * (1 - ratio) ** (1 - 1 / sites))
    random = Random(source, int(_WORDS * trials * (count + 100)))
    parts, missing = [np.zeros(0, np.int64)], count
    while missing > 0:
        part = _trials(min(int(missing * trials) + 16, _MOST_TRIALS), epsilon, sites, random)[:missing]
        parts.append(part)
        missing -= len(part)
    return np.concatenate(parts)


def _trials(count: int, epsilon: Fraction, sites: int, random: Random) -> Integers:
    """The numbers of NB(1 / sites, exp(-epsilon)) that ``count`` trials gave."""
    numbers = geometric(count, epsilon.denominator, random) // epsilon.numerator
    kept, left, throw = np.ones(len(numbers), np.bool_), np.flatnonzero(numbers), 1
    while len(left) and sites > 1:  # throw i: numbers of at least i, of which no throw has failed
        chances = np.full(len(left), sites * (throw - 1) + 1, np.uint64)
        succeeded = random.coins(chances, sites * throw)
        kept[left[~succeeded]] = False
        left = left[succeeded & (numbers[left] > throw)]
        throw += 1
    return numbers[kept]
