"""Masks: AES-256-CTR keystreams added to a vector word by word, mod 2^32.

A mask is used whole or not at all, so a key of its own and counter 0 define it. Long vectors are worked through in
pieces that stay in the processor's cache, all masks on one piece before the next. One thread does it: at a million
coordinates two were faster only with pieces so long that input, result and pieces took more than two vectors.

**Guarantee.** A vector plus the mask of one unknown key is indistinguishable from uniform words (AES-256 in counter
mode is a pseudo-random generator); keys come from HKDF-SHA256 or the operating system, and no key makes two masks.
"""

from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from common.secagg.encoding import Bytes, Encoding, Floats, Words, add_bytes, encode, pack

PIECE = 1 << 16  # words: 256 KiB, so that a piece, its keystream and scratch stay in the second-level cache
Mask = tuple[bytes, bool]  # key of 32 bytes; True to add the mask, False to subtract it


def masked(values: Floats, encoding: Encoding, masks: Sequence[Mask], rounding_key: bytes) -> tuple[Bytes, int]:
    """Encode a vector, add masks, and pack it, never holding more than the input, the result and a few pieces.

    Args:
        values: (dim,) float32.
        encoding: the encoding.
        masks: every mask of this site.
        rounding_key: 32 fresh random bytes for the rounding.

    Returns:
        (dim * modulus_bits / 8,) bytes, and how many coordinates were clipped.

    Raises:
        ValueError: a value is not finite.
    """
    out, clipped = np.empty(len(values) * encoding.bytes_each, np.uint8), 0
    rounding, streams = _stream(rounding_key), _streams(masks)
    words, scratch, keystream = np.empty(PIECE, np.uint32), np.empty(PIECE, np.uint32), _buffer()
    for begin in range(0, len(values), PIECE):
        end = min(begin + PIECE, len(values))
        piece = words[: end - begin]
        random = _next(rounding, len(piece), keystream)
        clipped += encode(values[begin:end], encoding, random, piece, scratch[: len(piece)])
        _apply(streams, piece, keystream)
        pack(piece, encoding, out[begin * encoding.bytes_each : end * encoding.bytes_each])
    return out, clipped


def apply(total: Words, masks: Sequence[Mask]) -> None:
    """Add or subtract masks in place.

    Args:
        total: (dim,) words mod 2^32.
        masks: keys and signs.
    """
    streams, keystream = _streams(masks), _buffer()
    for begin in range(0, len(total), PIECE):
        _apply(streams, total[begin : begin + PIECE], keystream)


def add_packed(total: Words, packed: Bytes, encoding: Encoding) -> None:
    """Add a packed vector to ``total``, (dim,), in place."""
    count = encoding.bytes_each
    for begin in range(0, len(total), PIECE):
        piece = total[begin : begin + PIECE]
        add_bytes(piece, packed[begin * count : (begin + len(piece)) * count], encoding)


def _stream(key: bytes, counter: int = 0) -> CipherContext:
    """The keystream of ``key`` from a block on."""
    return Cipher(algorithms.AES256(key), modes.CTR(counter.to_bytes(16, "big"))).encryptor()


def _streams(masks: Sequence[Mask]) -> list[tuple[CipherContext, bool]]:
    return [(_stream(key), add) for key, add in masks]


def _buffer() -> bytearray:
    return bytearray(4 * PIECE + 15)  # update_into wants room for one more block


_ZEROS = memoryview(bytes(4 * PIECE))


def _next(stream: CipherContext, count: int, keystream: bytearray) -> Words:
    """The stream's next ``count`` words, in the reused buffer."""
    stream.update_into(_ZEROS[: 4 * count], keystream)
    return np.frombuffer(keystream, "<u4", count)


def _apply(streams: Sequence[tuple[CipherContext, bool]], piece: Words, keystream: bytearray) -> None:
    for stream, add in streams:
        words = _next(stream, len(piece), keystream)
        (np.add if add else np.subtract)(piece, words, out=piece)
