"""Masks: AES-256-CTR keystreams added to a vector word by word, mod 2^64.

A mask is used whole or not at all, so a key of its own and counter 0 define it. Long vectors are worked through in
pieces that stay in the processor's cache, all masks on one piece before the next. One thread does it: at a million
coordinates two were faster only with pieces so long that input, result and pieces took more than two vectors.

**Guarantee.** A vector plus the mask of one unknown key is indistinguishable from words uniform over Z_2^64, all lanes
and what is between them (AES-256 in counter mode is a pseudo-random generator); keys come from HKDF-SHA256 or the
operating system, and no key makes two masks. Masks that cancel leave the sum of words, which is the sums of the lanes
and nothing more (``common/secagg/encoding.py``).
"""

from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from common.secagg.encoding import PIECE, Encoding, Floats, Integers, Words, encode, encode_integers

Mask = tuple[bytes, bool]  # key of 32 bytes; True to add the mask, False to subtract it


def masked(values: Floats, encoding: Encoding, masks: Sequence[Mask], rounding_key: bytes) -> tuple[Words, int]:
    """Encode a vector and add masks, never holding more than the input, the result and a few pieces.

    Args:
        values: (dim,) float32.
        encoding: the encoding.
        masks: every mask of this site.
        rounding_key: 32 fresh random bytes for the rounding.

    Returns:
        (num_words,) words, and how many coordinates were clipped.

    Raises:
        ValueError: a value is not finite.
    """
    words, clipped = np.empty(encoding.num_words(len(values)), np.uint64), 0
    rounding, streams, keystream = _stream(rounding_key), _streams(masks), _buffer(encoding.coin_words)
    scratch = np.empty((2, PIECE), np.uint64)
    for begin in range(0, len(words), PIECE):
        piece = words[begin : begin + PIECE]
        coins = _next(rounding, encoding.coin_words * len(piece), keystream).reshape(-1, len(piece))
        clipped += encode(values, encoding, begin, coins, piece, scratch)
        _apply(streams, piece, keystream)
    return words, clipped


def masked_integers(values: Integers, encoding: Encoding, masks: Sequence[Mask]) -> Words:
    """Encode integers (``encode_integers``) and add masks.

    Args:
        values: (dim,) int64.
        encoding: the encoding.
        masks: every mask of this site.

    Returns:
        (num_words,) words.
    """
    words = encode_integers(values, encoding)
    apply(words, masks)
    return words


def apply(total: Words, masks: Sequence[Mask]) -> None:
    """Add or subtract masks in place.

    Args:
        total: (num_words,) words.
        masks: keys and signs.
    """
    streams, keystream = _streams(masks), _buffer()
    for begin in range(0, len(total), PIECE):
        _apply(streams, total[begin : begin + PIECE], keystream)


def _stream(key: bytes, counter: int = 0) -> CipherContext:
    """The keystream of ``key`` from a block on."""
    return Cipher(algorithms.AES256(key), modes.CTR(counter.to_bytes(16, "big"))).encryptor()


def _streams(masks: Sequence[Mask]) -> list[tuple[CipherContext, bool]]:
    return [(_stream(key), add) for key, add in masks]


def _buffer(pieces: int = 1) -> bytearray:
    return bytearray(8 * PIECE * pieces + 15)  # update_into wants room for one more block


_ZEROS = memoryview(bytes(8 * PIECE * 2))


def _next(stream: CipherContext, count: int, keystream: bytearray) -> Words:
    """The stream's next ``count`` words, in the reused buffer."""
    stream.update_into(_ZEROS[: 8 * count], keystream)
    return np.frombuffer(keystream, "<u8", count)


def _apply(streams: Sequence[tuple[CipherContext, bool]], piece: Words, keystream: bytearray) -> None:
    for stream, add in streams:
        words = _next(stream, len(piece), keystream)
        (np.add if add else np.subtract)(piece, words, out=piece)
