"""Floats to integers in words of 64 bits and back, so that sums under masks are exact.

A coordinate x is clipped to [-value_range, value_range], scaled by 2^fraction_bits and rounded at random to one of the
two integers beside it, up with the probability that makes it unbiased to 2^-20. A word holds one such integer in each
of its lanes of modulus_bits: of a vector with m words, word i has the coordinates i, i + m, i + 2m, ..., lowest lane
first, as the sum of integer * 2^(modulus_bits * lane) mod 2^64. Coordinates missing at the end are 0.

**Guarantee.** ``check_capacity`` proves that the encoded values of ``num_sites`` sites cannot wrap: each is at most
value_range * 2^fraction_bits in magnitude (the bound is rounded up to an integer), so the sum in every lane is below
2^(modulus_bits - 1). The sum of words mod 2^64 then determines the sum of every lane: with 2^(modulus_bits - 1) added,
the lanes are the word's digits in base 2^modulus_bits. It tells nothing more, for the sums of the lanes determine it.
The decoded sum differs from the sum of the clipped inputs by less than num_sites * 2^-fraction_bits, and by float32's
own rounding where it has more than 24 bits.

Integers that already carry noise (``common/privacy/shared_noise.py``) go into the lanes as they are.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
MODULUS_BITS = (16, 21, 32)  # four, three and two lanes
PIECE = 1 << 15  # words: 256 KiB, so that a piece, its keystream and scratch stay in the second-level cache
_COIN_BITS = 20  # random bits that round one coordinate: a word has them for three


@dataclass(frozen=True)
class Encoding:
    """How a coordinate becomes an integer. All three are public.

    Args:
        value_range: largest magnitude of a coordinate; what is larger is clipped.
        fraction_bits: binary places kept.
        modulus_bits: size of a lane, the sum's integers: 16, 21 or 32.
    """

    value_range: float
    fraction_bits: int
    modulus_bits: int

    @property
    def largest(self) -> int:
        """The largest magnitude of one encoded coordinate."""
        return math.ceil(float(np.float32(self.value_range)) * 2.0**self.fraction_bits)

    @property
    def most_sites(self) -> int:
        """The largest number of sites whose sum cannot wrap."""
        return ((1 << (self.modulus_bits - 1)) - 1) // self.largest

    @property
    def lanes(self) -> int:
        """Coordinates in a word."""
        return 64 // self.modulus_bits

    @property
    def coin_words(self) -> int:
        """Random words that round the coordinates of one word."""
        return math.ceil(self.lanes * _COIN_BITS / 64)

    def num_words(self, length: int) -> int:
        """Words of a vector of ``length`` coordinates."""
        return math.ceil(length / self.lanes)


def fewest_bits(value_range: float, fraction_bits: int, num_sites: int) -> int | None:
    """The smallest modulus that holds the sum of ``num_sites`` encoded values; None when none does."""
    fitting = (bits for bits in MODULUS_BITS if num_sites <= Encoding(value_range, fraction_bits, bits).most_sites)
    return next(fitting, None)


def check_capacity(encoding: Encoding, num_sites: int) -> None:
    """Raise ValueError, with the number to change, when the sum of ``num_sites`` encoded values could wrap."""
    if num_sites <= encoding.most_sites:
        return
    enough = fewest_bits(encoding.value_range, encoding.fraction_bits, num_sites)
    change = f"use {enough}" if enough else "lower fraction_bits or value_range"
    raise ValueError(
        f"modulus_bits={encoding.modulus_bits} cannot hold {num_sites} sites at "
        f"value_range={encoding.value_range:g}, fraction_bits={encoding.fraction_bits}; {change}"
    )


def encode(values: Floats, encoding: Encoding, begin: int, coins: Words, out: Words, scratch: Words) -> int:
    """Encode one piece of a vector, the words from ``begin`` on.

    Args:
        values: (length,) float32, the whole vector.
        encoding: the encoding.
        begin: number of the first word.
        coins: (coin_words, n) uniform words that decide the rounding.
        out: (n,) the words.
        scratch: (2, n) words to work in, so that many pieces need no fresh memory.

    Returns:
        How many coordinates were clipped.

    Raises:
        ValueError: a value is not finite.
    """
    # A float64 above them all whose last bit counts 2^-20 of a step: with it added, coordinates are integers below it.
    anchor = np.float64(1.5 * 2.0 ** (52 - _COIN_BITS - encoding.fraction_bits))
    above = int(anchor.view(np.uint64)) >> _COIN_BITS  # what it leaves in front of each integer
    shifts = [encoding.modulus_bits * lane for lane in range(encoding.lanes)]
    out[:] = -sum(above << shift for shift in shifts) % 2**64
    integers, rounding = scratch[:, : len(out)]
    floats = integers.view(np.float64)
    clipped, stride = 0, encoding.num_words(len(values))
    for lane, shift in enumerate(shifts):
        first = lane * stride + begin
        part, over = _clip(values[first : first + len(out)], encoding.value_range)
        clipped += over
        floats[: len(part)], floats[len(part) :] = part, 0
        floats += anchor
        np.right_shift(coins[lane // 3], _COIN_BITS * (lane % 3), out=rounding)
        rounding &= 2**_COIN_BITS - 1
        integers += rounding
        integers >>= _COIN_BITS  # rounds down: up with the probability of the fraction
        integers <<= shift
        out += integers
    return clipped


def decode(total: Words, encoding: Encoding, length: int) -> Floats:
    """The sum of floats behind a sum of encoded vectors.

    Args:
        total: (num_words,) words; overwritten.
        encoding: the encoding.
        length: coordinates of the vectors.

    Returns:
        (length,) float32.
    """
    bits, half = encoding.modulus_bits, 1 << (encoding.modulus_bits - 1)
    offset = sum(half << (bits * lane) for lane in range(encoding.lanes))
    # As the low bits of 2^52 an integer is a float64 without any conversion.
    whole = np.float64(2.0**52)
    decoded, scratch = np.empty(length, np.float32), np.empty(min(PIECE, len(total)), np.uint64)
    for begin in range(0, len(total), PIECE):
        piece = total[begin : begin + PIECE]
        piece += offset
        for lane in range(encoding.lanes):
            first = lane * len(total) + begin
            part = decoded[first : first + len(piece)]
            digits = scratch[: len(part)]
            floats = digits.view(np.float64)
            np.right_shift(piece[: len(part)], bits * lane, out=digits)
            digits &= 2**bits - 1
            digits |= int(whole.view(np.uint64))
            floats -= whole + half
            np.multiply(floats, 2.0**-encoding.fraction_bits, out=part)
    return decoded


def encode_integers(values: Integers, encoding: Encoding) -> Words:
    """Integers that have been rounded elsewhere, as words; nothing is clipped.

    Args:
        values: (length,) int64, any.
        encoding: its ``modulus_bits`` decide the lanes; ``value_range`` is not read.

    **Guarantee.** A sum of such words, mod 2^64, is the word of the sums of the integers: it tells these at most,
    however large they are. Where all the sums are from -2^(modulus_bits - 1) to 2^(modulus_bits - 1) - 1, whatever the
    summands were, ``decode_integers`` gives them. A sum beyond wraps, and each time moves the next lane's by 1.
    """
    words = np.zeros(encoding.num_words(len(values)), np.uint64)
    for lane in range(encoding.lanes):
        part = values[lane * len(words) : (lane + 1) * len(words)].view(np.uint64)
        words[: len(part)] += part << np.uint64(encoding.modulus_bits * lane)
    return words


def decode_integers(total: Words, encoding: Encoding, length: int) -> Integers:
    """The sums of integers behind a sum of words of ``encode_integers``: (length,) int64. Leaves ``total`` alone."""
    bits, half = encoding.modulus_bits, 1 << (encoding.modulus_bits - 1)
    digits = total + np.uint64(sum(half << (bits * lane) for lane in range(encoding.lanes)))
    lanes = [(digits >> np.uint64(bits * lane)) & np.uint64(2**bits - 1) for lane in range(encoding.lanes)]
    integers: Integers = np.concatenate(lanes)[:length].astype(np.int64) - half
    return integers


def _clip(values: Floats, value_range: float) -> tuple[Floats, int]:
    """The values within the range, and how many were not."""
    lowest, highest = float(values.min(initial=0)), float(values.max(initial=0))
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        raise ValueError("expected finite values")
    if max(-lowest, highest) <= value_range:
        return values, 0
    return np.clip(values, -value_range, value_range), int(np.count_nonzero(np.abs(values) > value_range))
