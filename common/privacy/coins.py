"""Coins and numbers of exact probability, many at a time: integers alone decide, so no float is ever rounded.

What the discrete Gaussian and the discrete Laplace are made of (Canonne, Kamath and Steinke 2020, section 5).

**Guarantee.** No seed exists. Where 2^14 coins in one series, 128 coins of exp(-1) in a row, or more words than the
caller expects come, the source is called broken: a working one gives them with a probability below 2^-180.
"""

import numpy as np
from numpy.typing import NDArray

from common.privacy.sampling import ByteSource

Words = NDArray[np.uint64]
Integers = NDArray[np.int64]
Coins = NDArray[np.bool_]

FARTHEST = 128
"""Coins of exp(-1) in a row that a working source does not give."""
_FACTORIAL = 20  # 20! is the largest below 2^64


class Random:
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


def exp_coins(numerators: Integers, denominator: int, random: Random) -> Coins:
    """A coin for each numerator a, true with the probability exp(-a / b) (algorithm 1)."""
    whole, part = np.divmod(numerators, denominator)
    kept = np.ones(len(numerators), np.bool_)
    left = np.flatnonzero(whole)
    while len(left):  # exp(-1) once for each whole
        fallen = ~inverse_e(len(left), random)
        kept[left[fallen]] = False
        whole[left] -= 1
        left = left[~fallen & (whole[left] > 0)]
    left = np.flatnonzero(kept)
    kept[left] = _series(part[left], denominator, 1, random)
    return kept


def _series(numerators: Integers, denominator: int, first: int, random: Random) -> Coins:
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


def inverse_e(count: int, random: Random) -> Coins:
    """Coins true with the probability exp(-1), from one word each: the first k throws of the series all succeed with
    the probability 1 / k!, so an integer below 20! tells how many do, up to 20."""
    drawn = random.below(_WHOLE, count)
    succeeded = _FACTORIAL - np.searchsorted(_THRESHOLDS, drawn, side="right")
    result: Coins = succeeded % 2 == 0  # the first that failed is one more
    beyond = np.flatnonzero(succeeded == _FACTORIAL)
    result[beyond] = _series(np.ones(len(beyond), np.int64), 1, _FACTORIAL + 1, random)
    return result


def geometric(trials: int, scale: int, random: Random) -> Integers:
    """Numbers x of 0 or more, each with a probability proportional to exp(-x / scale), below 128 scales: as many as so
    many trials gave, about (1 - 1/e) of them (algorithm 2)."""
    within = random.below(scale, trials)
    within = within[exp_coins(within, scale, random)]
    return within + scale * coins_in_a_row(len(within), random)


def coins_in_a_row(count: int, random: Random) -> Integers:
    """How many coins of probability exp(-1) came true before one did not: (count,)."""
    number, left = np.zeros(count, np.int64), np.arange(count)
    for _ in range(FARTHEST - 1):
        left = left[inverse_e(len(left), random)]
        if not len(left):
            return number
        number[left] += 1
    raise OSError("the random source is broken: it does not give random bytes")
