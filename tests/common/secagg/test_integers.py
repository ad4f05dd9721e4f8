"""Integers in lanes: exact to the last bit when they come back, under masks and whatever each summand was."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.secagg import masks
from common.secagg.encoding import MODULUS_BITS, PIECE, Encoding, Words, decode, decode_integers, encode_integers

WORDS = Encoding(1.0, 20, 32)


def summed(vectors: list[NDArray[np.int64]], encoding: Encoding) -> Words:
    total = np.zeros(encoding.num_words(len(vectors[0])), np.uint64)
    for vector in vectors:
        total += encode_integers(vector, encoding)
    return total


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        # -1 borrows from the lane above it; what the highest would borrow is left out.
        (32, [0xFFFFFFFE_FFFFFFFF, 0x00000007_00000003]),
        (21, [(7 << 42) - (2 << 21) - 1, 3]),
        (16, [0x0007_0002_FFFE_FFFF]),
    ],
)
def test_by_hand(bits: int, words: list[int]) -> None:
    encoding = Encoding(1.0, 20, bits)
    # Word i of m has coordinates i, i + m, ...
    values = {32: [-1, 3, -1, 7], 21: [-1, 3, -2, 0, 7, 0], 16: [-1, -1, 3, 7]}[bits]
    encoded = encode_integers(np.array(values), encoding)
    assert len(encoded) == encoding.num_words(len(values))
    assert encoded.tolist() == words
    assert decode_integers(encoded, encoding, len(values)).tolist() == values


@pytest.mark.parametrize("bits", MODULUS_BITS)
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 100])
def test_the_largest_sums_come_back(bits: int, length: int) -> None:
    # float32 would not do: 2^31 - 1 has more than its 24 bits.
    encoding = Encoding(1.0, 20, bits)
    extremes = np.resize(np.array([2 ** (bits - 1) - 1, -(2 ** (bits - 1)), 0, -1, 1]), length)
    assert decode_integers(encode_integers(extremes, encoding), encoding, length).tolist() == extremes.tolist()


@settings(max_examples=200, deadline=None)
@given(
    bits=st.sampled_from(MODULUS_BITS),
    length=st.integers(0, 40),
    seed=st.integers(0, 2**32),
    num_sites=st.integers(2, 6),
)
def test_sums_under_masks_are_exact_however_large_the_summands(
    bits: int, length: int, seed: int, num_sites: int
) -> None:
    """Summands are anything that int64 holds; only their sums are within the lanes."""
    random = np.random.default_rng(seed)
    encoding = Encoding(1.0, 20, bits)
    expected = random.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), length)
    spread = random.choice([2**6, 2**40, 2**58])
    vectors = [random.integers(-spread, spread, length) for _ in range(num_sites - 1)]
    vectors.append(expected - np.sum(vectors, axis=0, dtype=np.int64))
    total = np.zeros(encoding.num_words(length), np.uint64)
    keys = [random.bytes(32) for _ in range(num_sites)]
    for site, vector in enumerate(vectors):  # each site's mask with the next one, added by one, taken by the other
        words = encode_integers(vector, encoding)
        masks.apply(words, [(keys[site], True), (keys[site - 1], False)])
        total += words
    before = total.copy()
    assert decode_integers(total, encoding, length).tolist() == expected.tolist()
    assert (total == before).all()


@given(bits=st.sampled_from(MODULUS_BITS), seed=st.integers(0, 2**32), length=st.integers(1, 20))
def test_a_sum_of_words_tells_the_sums_and_nothing_else(bits: int, seed: int, length: int) -> None:
    # Two lists of summands with one sum have one sum of words, when it wraps as well.
    random = np.random.default_rng(seed)
    encoding = Encoding(1.0, 20, bits)
    first, second, shift = (random.integers(-(2**50), 2**50, length) for _ in range(3))
    assert (summed([first, second], encoding) == summed([first + shift, second - shift], encoding)).all()
    assert (summed([first, second], encoding) == encode_integers(first + second, encoding)).all()


def test_a_sum_that_wraps_does_so_in_its_lane_and_by_one_in_the_next() -> None:
    values = np.array([2**31, 5])
    assert decode_integers(encode_integers(values, WORDS), WORDS, 2).tolist() == [-(2**31), 6]


@pytest.mark.parametrize("length", [PIECE, 2 * PIECE + 1, 5 * PIECE + 3])
def test_floats_are_the_same_sums(length: int) -> None:
    values = np.random.default_rng(1).integers(-(2**23), 2**23, length)
    words = encode_integers(values, WORDS)
    assert (decode_integers(words, WORDS, length) == values).all()
    assert (decode(words, WORDS, length) == values.astype(np.float32) * np.float32(2.0**-20)).all()
