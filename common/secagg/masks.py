"""Masks: AES-256-CTR keystreams added to a vector word by word, mod 2^32.

A mask is used whole or not at all, so a key of its own and counter 0 define it. Long vectors are worked through in
pieces that stay in the processor's cache, all masks on one piece before the next, by a few threads.

**Guarantee.** A vector plus the mask of one unknown key is indistinguishable from uniform words (AES-256 in counter
mode is a pseudo-random generator); keys come from HKDF-SHA256 or the operating system, and no key makes two masks.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from common.secagg.encoding import Bytes, Encoding, Floats, Words, add_bytes, encode, pack

PIECE = 1 << 15  # words: 128 KiB, so that a piece, its keystream and scratch stay in the second-level cache
WORDS_A_BLOCK = 4  # an AES block is 16 bytes
MOST_THREADS = 4
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
    out = np.empty(len(values) * encoding.bytes_each, np.uint8)

    def work(start: int, stop: int) -> int:
        rounding, streams, clipped = _stream(rounding_key, start), _streams(masks, start), 0
        words, scratch, keystream = np.empty(PIECE, np.uint32), np.empty(PIECE, np.uint32), _buffer()
        for begin in range(start, stop, PIECE):
            end = min(begin + PIECE, stop)
            piece = words[: end - begin]
            random = _next(rounding, len(piece), keystream)
            clipped += encode(values[begin:end], encoding, random, piece, scratch[: len(piece)])
            _apply(streams, piece, keystream)
            pack(piece, encoding, out[begin * encoding.bytes_each : end * encoding.bytes_each])
        return clipped

    return out, sum(_in_threads(work, len(values)))


def apply(total: Words, masks: Sequence[Mask]) -> None:
    """Add or subtract masks in place.

    Args:
        total: (dim,) words mod 2^32.
        masks: keys and signs.
    """

    def work(start: int, stop: int) -> int:
        streams, keystream = _streams(masks, start), _buffer()
        for begin in range(start, stop, PIECE):
            _apply(streams, total[begin : min(begin + PIECE, stop)], keystream)
        return 0

    _in_threads(work, len(total))


def add_packed(total: Words, packed: Bytes, encoding: Encoding) -> None:
    """Add a packed vector to ``total``, (dim,), in place."""
    count = encoding.bytes_each
    for begin in range(0, len(total), PIECE):
        piece = total[begin : begin + PIECE]
        add_bytes(piece, packed[begin * count : (begin + len(piece)) * count], encoding)


def _stream(key: bytes, start: int) -> CipherContext:
    """The keystream of ``key`` from word ``start`` (a multiple of four) on."""
    counter = (start // WORDS_A_BLOCK).to_bytes(16, "big")
    return Cipher(algorithms.AES256(key), modes.CTR(counter)).encryptor()


def _streams(masks: Sequence[Mask], start: int) -> list[tuple[CipherContext, bool]]:
    return [(_stream(key, start), add) for key, add in masks]


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


def _in_threads(work: Callable[[int, int], int], dim: int) -> list[int]:
    """Call ``work(start, stop)`` for a few ranges that cover ``dim`` words; the ciphers and numpy release the GIL."""
    pieces = -(-dim // PIECE)
    count = max(1, min(MOST_THREADS, os.cpu_count() or 1, pieces))
    starts = [pieces * number // count * PIECE for number in range(count)]
    ranges = list(zip(starts, [*starts[1:], dim], strict=True))
    if count == 1:
        return [work(*only) for only in ranges]
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda both: work(*both), ranges))
