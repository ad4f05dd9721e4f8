"""Exact samples of the discrete Gaussian: integers alone decide, so no rounding of a float weakens the noise.

N_Z(0, s^2) gives the integer x with a probability proportional to exp(-x^2 / (2 s^2)) (Canonne, Kamath and Steinke
2020). Many samples are made at a time, each a trial that is kept or thrown away by coins of the right probabilities.
"""

import os

import numpy as np
from numpy.typing import NDArray

from common.privacy.sampling import ByteSource

LARGEST_SCALE = 1 << 24

Words = NDArray[np.uint64]
Integers = NDArray[np.int64]
Coins = NDArray[np.bool_]

_TRIALS = 2.12  # per sample: 1 / ((1 - 1/e) sqrt(pi / 2) exp(-1/2)) are needed on average, which is 2.09
_WORDS = 1000  # per sample: about ten are needed
_FARTHEST = 128  # scales from zero; see the guarantee
_FACTORIAL = 20  # 20! is the largest below 2^64


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
    words, parts, missing = _Random(source, _WORDS * (count + 100)), [np.zeros(0, np.int64)], count
    while missing > 0:
        part = _trials(int(missing * _TRIALS) + 16, scale, words)[:missing]
        parts.append(part)
        missing -= len(part)
    return np.concatenate(parts)


class _Random:
    """Random words and what is made of them, each exactly uniform; a bound on their number stops a broken source."""

    def __init__(self, source: ByteSource, most_words: int) -> None:
        self._source = source
        self._left = most_words

    def bits(self, count: int) -> Coins:
        """Fair coins: (count,), from a byte each."""
        return (np.frombuffer(self._bytes(count), np.uint8) & 1).astype(np.bool_)

    def below(self, limit: int, count: int) -> Integers:
        """Uniform integers from 0 to ``limit`` - 1: (count,)."""
        step = self._step(limit)
        return (self._words(limit * step, count) // np.uint64(step)).astype(np.int64)

    def coins(self, numerators: Words, denominator: int) -> Coins:
        """A coin for each numerator, true with the probability numerator / denominator, which is at most 1."""
        step = self._step(denominator)
        return self._words(denominator * step, len(numerators)) < numerators * np.uint64(step)

    @staticmethod
    def _step(limit: int) -> int:
        """Words to each of ``limit`` equally likely outcomes."""
        if limit >= 1 << 63:
            raise OSError("the random source is broken: it does not give random bytes")
        return (2**64 - 1) // limit

    def _words(self, limit: int, count: int) -> Words:
        """Uniform words below ``limit``, which is 2^63 at least: what is not below it is drawn again."""
        words = np.frombuffer(bytearray(self._bytes(8 * count)), np.uint64)
        refused = np.flatnonzero(words >= np.uint64(limit))
        while len(refused):
            again = np.frombuffer(self._bytes(8 * len(refused)), np.uint64)
            words[refused] = again
            refused = refused[again >= np.uint64(limit)]
        return words

    def _bytes(self, count: int) -> bytes:
        self._left -= count // 8 + 1
        if self._left < 0:
            raise OSError("the random source is broken: it does not give random bytes")
        data = self._source(count)
        if len(data) != count:
            raise OSError(f"the random source gave {len(data)} bytes of {count}")
        return data


def _trials(count: int, scale: int, random: _Random) -> Integers:
    """The samples that ``count`` trials gave, fewer than half as many.

    A discrete Laplace y of the same scale (algorithm 2) is kept with the probability exp(-(|y| - s)^2 / (2 s^2)), by
    which exp(-|y| / s) becomes exp(-y^2 / (2 s^2)) times a constant (algorithm 3, with t = s).
    """
    within = random.below(scale, count)
    within = within[_exp_coins(within, scale, random)]
    magnitude = within + scale * _geometric(len(within), random)
    negative = random.bits(len(magnitude))
    once = ~negative | (magnitude != 0)  # zero has two signs, and must not come twice as often
    magnitude, negative = magnitude[once], negative[once]
    kept = _exp_coins((magnitude - scale) ** 2, 2 * scale**2, random)
    samples: Integers = np.where(negative, -magnitude, magnitude)[kept]
    return samples


def _exp_coins(numerators: Integers, denominator: int, random: _Random) -> Coins:
    """A coin for each numerator a, true with the probability exp(-a / b) (algorithm 1)."""
    whole, part = np.divmod(numerators, denominator)
    kept = np.ones(len(numerators), np.bool_)
    left = np.flatnonzero(whole)
    while len(left):  # exp(-1) once for each whole
        fallen = ~_inverse_e(len(left), random)
        kept[left[fallen]] = False
        whole[left] -= 1
        left = left[~fallen & (whole[left] > 0)]
    left = np.flatnonzero(kept)
    kept[left] = _series(part[left], denominator, 1, random)
    return kept


def _series(numerators: Integers, denominator: int, first: int, random: _Random) -> Coins:
    """Coins true with the probability exp(-g), g = a / b at most 1: of throws with the chances g, g / 2, g / 3, ... the
    first that fails has an odd number. ``first``, odd, is the number of the first throw: those before have succeeded.
    """
    odd = np.ones(len(numerators), np.bool_)
    left, number = np.arange(len(numerators)), first
    remaining = numerators.astype(np.uint64)
    while len(left):
        succeeded = random.coins(remaining, denominator * number)
        left, remaining, number = left[succeeded], remaining[succeeded], number + 1
        odd[left] = number % 2 == 1
    return odd


def _factorials() -> tuple[int, Integers]:
    """20!, and 20! / k! for k from 20 down to 1."""
    ascending = [1]
    for number in range(_FACTORIAL, 1, -1):
        ascending.append(ascending[-1] * number)
    return ascending[-1], np.array(ascending, np.int64)


_WHOLE, _THRESHOLDS = _factorials()


def _inverse_e(count: int, random: _Random) -> Coins:
    """Coins true with the probability exp(-1), from one word each: the first k throws of the series all succeed with
    the probability 1 / k!, so an integer below 20! tells how many do, up to 20."""
    drawn = random.below(_WHOLE, count)
    succeeded = _FACTORIAL - np.searchsorted(_THRESHOLDS, drawn, side="right")
    result: Coins = succeeded % 2 == 0  # the first that failed is one more
    beyond = np.flatnonzero(succeeded == _FACTORIAL)
    result[beyond] = _series(np.ones(len(beyond), np.int64), 1, _FACTORIAL + 1, random)
    return result


def _geometric(count: int, random: _Random) -> Integers:
    """How many coins of probability exp(-1) came true before one did not: (count,)."""
    number, left = np.zeros(count, np.int64), np.arange(count)
    for _ in range(_FARTHEST - 1):
        left = left[_inverse_e(len(left), random)]
        if not len(left):
            return number
        number[left] += 1
    raise OSError("the random source is broken: it does not give random bytes")
