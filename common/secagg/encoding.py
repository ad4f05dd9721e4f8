"""Floats to integers mod 2^modulus_bits and back, so that sums under masks are exact.

A coordinate x is clipped to [-value_range, value_range], scaled by 2^fraction_bits and rounded at random to one of the
two integers beside it, up with the probability that makes it unbiased.

**Guarantee.** ``check_capacity`` proves that the encoded values of ``num_sites`` sites cannot wrap: each is at most
value_range * 2^fraction_bits in magnitude (the bound is rounded up to an integer), so the sum is below
2^(modulus_bits - 1). The decoded sum then differs from the sum of the clipped inputs by less than
num_sites * 2^-fraction_bits, and by float32's own rounding where it has more than 24 bits.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
_ONE = np.float32(1).view(np.uint32)
MODULUS_BITS = (16, 24, 32)  # whole bytes: a coordinate is sent as modulus_bits / 8 of them


@dataclass(frozen=True)
class Encoding:
    """How a coordinate becomes an integer. All three are public.

    Args:
        value_range: largest magnitude of a coordinate; what is larger is clipped.
        fraction_bits: binary places kept.
        modulus_bits: size of the sum's integers: 16, 24 or 32.
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
    def bytes_each(self) -> int:
        """Bytes of one coordinate in a message."""
        return self.modulus_bits // 8


def check_capacity(encoding: Encoding, num_sites: int) -> None:
    """Raise ValueError, with the number to change, when the sum of ``num_sites`` encoded values could wrap."""
    if num_sites <= encoding.most_sites:
        return
    enough = [
        bits
        for bits in MODULUS_BITS
        if num_sites <= Encoding(encoding.value_range, encoding.fraction_bits, bits).most_sites
    ]
    change = f"use {enough[0]}" if enough else "lower fraction_bits or value_range"
    raise ValueError(
        f"modulus_bits={encoding.modulus_bits} cannot hold {num_sites} sites at "
        f"value_range={encoding.value_range:g}, fraction_bits={encoding.fraction_bits}; {change}"
    )


def encode(values: Floats, encoding: Encoding, random: Words, out: Words, scratch: Words | None = None) -> int:
    """Encode one piece of a vector.

    Args:
        values: (n,) float32.
        encoding: the encoding.
        random: (n,) uniform words that decide the rounding; overwritten.
        out: (n,) the integers, as words mod 2^32; the modulus is a divisor of it.
        scratch: (n,) words to work in, so that many pieces need no fresh memory; None for fresh ones.

    Returns:
        How many coordinates were clipped.

    Raises:
        ValueError: a value is not finite.
    """
    lowest, highest = float(values.min(initial=0)), float(values.max(initial=0))
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        raise ValueError("expected finite values")
    clipped = 0
    if max(-lowest, highest) > encoding.value_range:
        clipped = int(np.count_nonzero(np.abs(values) > encoding.value_range))
        values = np.clip(values, -encoding.value_range, encoding.value_range)
    if scratch is None:
        scratch = np.empty(len(values), np.uint32)
    fraction, whole = scratch.view(np.float32), out.view(np.float32)
    np.multiply(values, np.float32(2.0**encoding.fraction_bits), out=fraction)  # exact: only the exponent changes
    np.floor(fraction, out=whole)
    np.subtract(fraction, whole, out=fraction)
    # As a number from 1 to 2 a fraction has its 23 binary places in its low bits: there it meets as many random ones.
    np.add(fraction, np.float32(1), out=fraction)
    np.right_shift(random, np.uint32(9), out=random)
    np.bitwise_or(random, _ONE, out=random)
    drawn, integers = random.view(np.int32), scratch.view(np.int32)
    np.subtract(drawn, integers, out=drawn)
    np.right_shift(drawn, np.int32(31), out=drawn)  # -1 where the draw lies below the fraction, else 0
    integers[:] = whole
    np.subtract(integers, drawn, out=out.view(np.int32))
    return clipped


def decode(total: Words, encoding: Encoding) -> Floats:
    """The sum of floats behind a sum of encoded vectors.

    Args:
        total: (dim,) words mod 2^32, of which only the modulus counts; overwritten.

    Returns:
        (dim,) float32.
    """
    unused = 32 - encoding.modulus_bits
    np.left_shift(total, np.uint32(unused), out=total)
    signed = total.view(np.int32)
    np.right_shift(signed, np.int32(unused), out=signed)  # brings the sign along
    decoded = np.empty(len(total), np.float32)
    np.multiply(signed, 2.0**-encoding.fraction_bits, out=decoded, casting="unsafe")  # in float64, piece by piece
    return decoded


def pack(words: Words, encoding: Encoding, out: Bytes) -> None:
    """Write (n,) words mod 2^modulus_bits as bytes, lowest first, into ``out`` of shape (n * bytes_each,)."""
    count = encoding.bytes_each
    little = words.astype("<u4", copy=False).view(np.uint8).reshape(-1, 4)
    packed = out.reshape(-1, count)
    for position in range(count):  # one strided copy a byte is much faster than one of short rows
        packed[:, position] = little[:, position]


def unpack(packed: Bytes, encoding: Encoding) -> Words:
    """The inverse of ``pack``: (n * bytes_each,) bytes to (n,) words below 2^modulus_bits."""
    words = np.zeros(len(packed) // encoding.bytes_each, np.uint32)
    add_bytes(words, packed, encoding)
    return words & np.uint32(2**encoding.modulus_bits - 1)


def add_bytes(total: Words, packed: Bytes, encoding: Encoding) -> None:
    """Add packed words to ``total``, (n,), mod 2^modulus_bits: what stands above these bits has no meaning."""
    if encoding.bytes_each != 3:
        total += packed.view(f"<u{encoding.bytes_each}")
    elif len(total):
        # Reads four bytes at each third: the fourth lands above the modulus. Behind the last word there is none.
        total[:-1] += _spaced(packed, "<u4", len(total) - 1)
        total[-1] += np.uint32(int.from_bytes(packed[-3:].tobytes(), "little"))


def _spaced(data: Bytes, dtype: str, count: int) -> NDArray[Any]:
    """(count,) numbers of ``dtype`` that begin three bytes apart."""
    return np.ndarray((count,), dtype, data, 0, (3,))
