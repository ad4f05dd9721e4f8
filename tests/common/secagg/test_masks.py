"""Masks against AES computed block by block, for any pieces; and what a masked vector looks like."""

import tracemalloc
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from common.secagg import masks
from common.secagg.encoding import MODULUS_BITS, Encoding, Floats, Words, decode
from common.secagg.keys import Attempt, Transcript, self_mask_key
from common.secagg.masks import PIECE, Mask, apply, masked
from tests.consortium import encoded, lanes_of

LENGTHS = (0, 1, 2, 3, 4, 5, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 3 * PIECE + 1, 9 * PIECE + 7)


def key(number: int) -> bytes:
    return np.random.default_rng(number).bytes(32)


def keystream(of: bytes, count: int) -> Words:
    """AES-256 of 0, 1, 2, ... as words, lowest byte first: counter mode spelled out with the bare block cipher."""
    blocks = np.zeros((-(-count // 2), 2), ">u8")  # a counter of 16 bytes, highest first
    blocks[:, 1] = np.arange(len(blocks))
    encryptor = Cipher(algorithms.AES256(of), modes.ECB()).encryptor()  # noqa: S305
    return np.frombuffer(encryptor.update(blocks.tobytes()), "<u8")[:count].astype(np.uint64)


def mask_of(of: bytes, count: int) -> Words:
    total = np.zeros(count, np.uint64)
    apply(total, [(of, True)])
    return total


def naively_masked(
    values: Floats, encoding: Encoding, all_masks: Sequence[Mask], rounding_key: bytes, piece: int = PIECE
) -> Words:
    """Of each piece the coins are all first words, then all second ones."""
    count, each = encoding.num_words(len(values)), encoding.coin_words
    stream = keystream(rounding_key, each * count)
    coins = [
        stream[each * begin : each * min(begin + piece, count)].reshape(each, -1) for begin in range(0, count, piece)
    ]
    words = encoded(values, encoding, np.hstack(coins) if coins else 0)
    for of, add in all_masks:
        words = words + keystream(of, count) if add else words - keystream(of, count)
    return words


# ------------------------------------------------------------ the mask of a key


@pytest.mark.parametrize("length", LENGTHS)
def test_a_mask_is_aes_in_counter_mode(length: int) -> None:
    assert np.array_equal(mask_of(key(1), length), keystream(key(1), length))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    length=st.integers(0, 200),
    piece=st.sampled_from([2, 4, 16, 32, PIECE]),
    signs=st.lists(st.booleans(), max_size=4),
    bits=st.sampled_from(MODULUS_BITS),
)
def test_masking_is_encoding_plus_masks(
    length: int, piece: int, signs: list[bool], bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the pieces; small ones stand for long vectors."""
    monkeypatch.setattr(masks, "PIECE", piece)
    encoding = Encoding(1, 7, bits)
    values = np.random.default_rng(length).normal(0, 0.6, length).astype(np.float32)
    all_masks = [(key(number), add) for number, add in enumerate(signs)]
    words, clipped = masked(values, encoding, all_masks, key(99))
    assert np.array_equal(words, naively_masked(values, encoding, all_masks, key(99), piece))
    assert clipped == np.count_nonzero(np.abs(values) > 1)


@pytest.mark.parametrize("bits", MODULUS_BITS)
@pytest.mark.parametrize("length", LENGTHS)
def test_masking_at_the_real_pieces(length: int, bits: int) -> None:
    encoding = Encoding(1, 7, bits)
    values = np.random.default_rng(length).normal(0, 0.6, length).astype(np.float32)
    all_masks = [(key(1), True), (key(2), False), (key(3), True)]
    words, clipped = masked(values, encoding, all_masks, key(4))
    assert np.array_equal(words, naively_masked(values, encoding, all_masks, key(4)))
    assert clipped == np.count_nonzero(np.abs(values) > 1)


@pytest.mark.parametrize("length", LENGTHS)
def test_adding_then_subtracting_changes_nothing(length: int) -> None:
    before = np.random.default_rng(length).integers(0, 2**64, length, np.uint64)
    total = before.copy()
    apply(total, [(key(1), True), (key(2), False)])
    assert length == 0 or not np.array_equal(total, before)
    apply(total, [(key(2), True), (key(1), False)])
    assert np.array_equal(total, before)


@pytest.mark.parametrize("place", [0, PIECE - 1, PIECE, 4 * PIECE, 8 * PIECE, -1])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_in_every_piece(value: float, place: int) -> None:
    values = np.zeros(9 * PIECE + 5, np.float32)
    values[place] = value
    with pytest.raises(ValueError, match="expected finite values"):
        masked(values, Encoding(1, 7, 21), [(key(1), True)], key(2))


def test_clipped_coordinates_of_all_pieces_are_counted() -> None:
    values = np.zeros(9 * PIECE + 5, np.float32)
    values[[0, PIECE - 1, PIECE, 2 * PIECE + 1, -1]] = [2, -2, 1.0001, -1e30, 7]
    assert masked(values, Encoding(1, 7, 21), [], key(2))[1] == 5


def test_the_rounding_follows_its_key() -> None:
    values = np.full(1000, 0.3, np.float32)
    encoding = Encoding(1, 4, 16)
    one, again, other = (masked(values, encoding, [], each)[0] for each in (key(1), key(1), key(2)))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert len(set(lanes_of(one, encoding, 1000).tolist())) == 2  # each coordinate has coins of its own


# ------------------------------------------------------------ sums


@pytest.mark.parametrize("bits", MODULUS_BITS)
@pytest.mark.parametrize("length", LENGTHS)
def test_pairwise_masks_cancel_in_a_sum(length: int, bits: int) -> None:
    """Three sites: every pair has a mask that one adds and the other subtracts; each has one of its own as well."""
    encoding = Encoding(4, 6, bits)
    vectors = np.random.default_rng(length).integers(-256, 257, (3, length)) / 64
    pairs = {(0, 1): key(1), (0, 2): key(2), (1, 2): key(3)}
    total = np.zeros(encoding.num_words(length), np.uint64)
    for site, vector in enumerate(vectors):
        own = [(key(10 + site), True)]
        own += [(of, site == low) for (low, high), of in pairs.items() if site in (low, high)]
        total += masked(vector.astype(np.float32), encoding, own, key(20 + site))[0]
    apply(total, [(key(10 + site), False) for site in range(3)])
    assert np.array_equal(decode(total, encoding, length), vectors.sum(axis=0).astype(np.float32))


# ------------------------------------------------------------ every bit of a key counts


def check_distinct_masks(keys_of: list[bytes]) -> None:
    """All masks differ, and each differs from the first in about half of its bits."""
    count = 2500
    found = [mask_of(each, count) for each in keys_of]
    assert len({each.tobytes() for each in found}) == len(keys_of)
    shares = np.array([np.bitwise_count(each ^ found[0]).sum() / (64 * count) for each in found[1:]])
    assert np.abs(shares - 0.5).max() < 5 * 0.5 / np.sqrt(64 * count)


def flips(of: bytes) -> list[bytes]:
    number = int.from_bytes(of, "big")
    return [of, *((number ^ 1 << bit).to_bytes(32, "big") for bit in range(256))]


def test_flipping_any_bit_of_a_key_gives_another_mask() -> None:
    check_distinct_masks(flips(key(1)))


def test_flipping_any_bit_of_a_seed_gives_another_mask() -> None:
    agreed = Transcript(Attempt("study", 1), b"t" * 32)
    check_distinct_masks([self_mask_key(seed, agreed, "site") for seed in flips(key(2))])


# ------------------------------------------------------------ a masked vector is uniform

DIM = 150_000
HONEST, COLLUDING = key(100), [(key(101), True), (key(102), False)]
FULL = {16: Encoding(16383.5, 1, 16), 21: Encoding(524287.5, 1, 21), 32: Encoding(1073741760.0, 1, 32)}
"""Encodings whose range fills the modulus, so that an attacker may choose any integer."""


def constant(encoding: Encoding) -> Floats:
    return np.full(DIM, 0.37 * encoding.value_range, np.float32)


def zero(encoding: Encoding) -> Floats:
    return np.zeros(DIM, np.float32)


def extreme(encoding: Encoding) -> Floats:
    return np.where(np.arange(DIM) % 2, 1, -1).astype(np.float32) * np.float32(encoding.value_range)


def beyond(encoding: Encoding) -> Floats:
    return np.full(DIM, 3e38, np.float32)


def cancelling(encoding: Encoding) -> Floats:
    """What undoes the masks that an attacker knows, as nearly as float32 can."""
    known = np.zeros(encoding.num_words(DIM), np.uint64)
    apply(known, [(of, not add) for of, add in COLLUDING])
    return decode(known, encoding, DIM)


def least_likely(words: Words) -> float:
    """The least p-value of chi-square tests: each byte of the words, its differences, and pairs of neighbours."""
    columns = words.view(np.uint8).reshape(-1, 8)
    found = []
    for position in range(8):
        column = columns[:, position]
        found.append(chisquare(np.bincount(column, minlength=256)).pvalue)
        found.append(chisquare(np.bincount(np.diff(column)[::2], minlength=256)).pvalue)
        pairs = column[:-1:2].astype(np.int64) // 8 * 32 + column[1::2] // 8  # the top five bits of each
        found.append(chisquare(np.bincount(pairs, minlength=1024)).pvalue)
    both = columns[:, -1].astype(np.int64) // 8 * 32 + columns[:, 0] // 8
    found.append(chisquare(np.bincount(both, minlength=1024)).pvalue)
    return float(min(found))


@pytest.mark.parametrize("bits", MODULUS_BITS)
@pytest.mark.parametrize("make", [constant, zero, extreme, beyond, cancelling])
def test_a_masked_vector_is_uniform(make: Callable[[Encoding], Floats], bits: int) -> None:
    """Also less all masks that colluding sites know: one mask of an honest site hides everything."""
    encoding = FULL[bits]
    words, _ = masked(make(encoding), encoding, [*COLLUDING, (HONEST, False)], key(9))
    assert least_likely(words) > 1e-4

    apply(words, [(of, not add) for of, add in COLLUDING])
    assert least_likely(words) > 1e-4


@pytest.mark.parametrize("bits", MODULUS_BITS)
@pytest.mark.parametrize("make", [constant, zero, extreme, beyond])
def test_the_statistic_sees_a_vector_without_its_last_mask(make: Callable[[Encoding], Floats], bits: int) -> None:
    encoding = FULL[bits]
    words, _ = masked(make(encoding), encoding, [], key(9))
    assert least_likely(words) < 1e-100


@pytest.mark.parametrize("bits", MODULUS_BITS)
def test_the_statistic_sees_masks_that_the_attacker_undid(bits: int) -> None:
    words, _ = masked(cancelling(FULL[bits]), FULL[bits], COLLUDING, key(9))
    assert least_likely(words) < 1e-100


# ------------------------------------------------------------ memory


@pytest.mark.parametrize("bits", MODULUS_BITS)
def test_masking_holds_the_result_and_a_few_pieces(bits: int) -> None:
    """Never a second copy of the vector, clipped coordinates or not."""
    values = np.random.default_rng(1).normal(0, 1, 4_000_000).astype(np.float32)
    encoding = Encoding(1, 5, bits)
    all_masks = [(key(number), True) for number in range(5)]
    tracemalloc.start()
    try:
        words, _ = masked(values, encoding, all_masks, key(9))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    few_pieces = 8 * 8 * PIECE
    assert few_pieces < values.nbytes
    assert words.nbytes < peak < words.nbytes + few_pieces


def test_removing_masks_holds_a_few_pieces() -> None:
    total = np.zeros(2_000_000, np.uint64)
    tracemalloc.start()
    try:
        apply(total, [(key(number), True) for number in range(5)])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * 8 * PIECE < total.nbytes
