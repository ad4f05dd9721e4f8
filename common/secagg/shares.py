"""Shamir's secret sharing (1979), exact, over the integers mod the smallest prime above 2^256.

Design note: pycryptodome's Shamir, which Flower uses, shares 16 bytes at a time over GF(2^128), in Python bit by bit. A
prime field above 2^256 holds a 32-byte secret whole, and Python's integers make it thirty times faster (one site's two
secrets, 7 of 10: 0.08 against 2.4 ms) in twenty lines. ``tests/vectors/shamir.json`` has values confirmed by another
program.

**Guarantee.** Fewer than ``threshold`` shares leave every secret equally likely (the coefficients are uniform and
secret). Python's integer arithmetic is not constant-time; shares are made and joined once a round, inside one process.
"""

import secrets
from collections.abc import Mapping, Sequence

PRIME = 2**256 + 297
SECRET_BYTES, SHARE_BYTES = 32, 33


def split(secret: bytes, points: Sequence[int], threshold: int) -> dict[int, bytes]:
    """Share a secret so that any ``threshold`` shares rebuild it.

    Args:
        secret: 32 bytes.
        points: where the polynomial is evaluated: different numbers of at least 1, one a holder.
        threshold: 1 to ``len(points)``.

    Returns:
        A share of 33 bytes by point.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"expected a secret of {SECRET_BYTES} bytes, found {len(secret)}")
    if len(set(points)) != len(points) or not all(0 < point < PRIME for point in points):
        raise ValueError("expected different points of at least 1")
    if not 1 <= threshold <= len(points):
        raise ValueError(f"expected a threshold of 1 to {len(points)}, found {threshold}")
    coefficients = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return {point: evaluate(coefficients, point, PRIME).to_bytes(SHARE_BYTES, "big") for point in points}


def rebuild(shares: Mapping[int, bytes]) -> bytes:
    """The secret behind shares by point: right when there are at least ``threshold`` and all are right.

    Raises:
        ValueError: a share has another length or is no element of the field, or the result is no 32-byte secret.
    """
    values = {}
    for point, share in shares.items():
        if len(share) != SHARE_BYTES:
            raise ValueError(f"expected shares of {SHARE_BYTES} bytes")
        values[point] = int.from_bytes(share, "big")
        if values[point] >= PRIME:
            raise ValueError("expected an element of the field")
    secret = interpolate(values, PRIME)
    if secret >> (8 * SECRET_BYTES):
        raise ValueError("the shares do not belong together")
    return secret.to_bytes(SECRET_BYTES, "big")


def evaluate(coefficients: Sequence[int], point: int, prime: int) -> int:
    """The polynomial with these coefficients, lowest first, at a point, mod a prime (Horner)."""
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * point + coefficient) % prime
    return value


def interpolate(values: Mapping[int, int], prime: int) -> int:
    """The value at 0 of the polynomial of lowest degree through (point, value), mod a prime (Lagrange)."""
    total = 0
    for point, value in values.items():
        numerator = denominator = 1
        for other in values:
            if other != point:
                numerator = numerator * other % prime
                denominator = denominator * (other - point) % prime
        total = (total + value * numerator * pow(denominator, -1, prime)) % prime
    return total
