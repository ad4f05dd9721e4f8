"""Floats become integers in lanes and come back: by hand, then the promised bounds, for anything the module accepts."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray

from common.secagg import encoding as encoding_module
from common.secagg.encoding import (
    MODULUS_BITS,
    PIECE,
    Encoding,
    Floats,
    Words,
    check_capacity,
    decode,
    encode,
    fewest_bits,
)
from tests.consortium import encoded, lanes_of

UP, DOWN = 2**64 - 1, 0  # the coins that round up, and down, whatever has a fraction
AWKWARD_RANGES = (0.1, 1 + 2**-24, 1 + 3 * 2**-24, 1 / 3, 1e-6, 0.7071067811865476, 5.3)


@st.composite
def encodings(draw: st.DrawFn) -> Encoding:
    """Encodings that hold one site at least."""
    encoding = Encoding(
        draw(st.floats(1e-6, 1e6) | st.sampled_from(AWKWARD_RANGES)),
        draw(st.integers(1, 30)),
        draw(st.sampled_from(MODULUS_BITS)),
    )
    assume(encoding.most_sites >= 1)
    return encoding


def count_clipped(values: ArrayLike, encoding: Encoding) -> int:
    array = np.asarray(values, np.float32)
    num_words = encoding.num_words(len(array))
    coins, scratch = np.zeros((encoding.coin_words, num_words), np.uint64), np.empty((2, num_words), np.uint64)
    return encode(array, encoding, 0, coins, np.empty(num_words, np.uint64), scratch)


def signed(values: ArrayLike, encoding: Encoding, coins: int | Words) -> list[int]:
    array = np.asarray(values, np.float32)
    return lanes_of(encoded(array, encoding, coins), encoding, len(array)).tolist()


def words_of(lanes: ArrayLike, bits: int) -> Words:
    """(lane, word) integers as words, with Python's integers."""
    columns = np.asarray(lanes, object).T
    return np.array([sum(each << bits * at for at, each in enumerate(column)) % 2**64 for column in columns], np.uint64)


# ------------------------------------------------------------ by hand


def test_by_hand() -> None:
    encoding = Encoding(value_range=2, fraction_bits=2, modulus_bits=16)  # steps of a quarter, at most 8 of them
    values = [0, 0.25, -0.25, 2, -2, 0.3, -0.3, 5, -5]
    assert signed(values, encoding, DOWN) == [0, 1, -1, 8, -8, 1, -2, 8, -8]  # 0.3 is 1.2 steps
    assert signed(values, encoding, UP) == [0, 1, -1, 8, -8, 2, -1, 8, -8]
    assert encoding.largest == 8
    assert encoding.most_sites == 4095  # of 32767 // 8


def test_a_sum_of_three_by_hand() -> None:
    encoding = Encoding(value_range=2, fraction_bits=2, modulus_bits=16)
    total = np.zeros(1, np.uint64)
    for value in (0.25, 2.0, -0.75):
        total += encoded(np.array([value, -value], np.float32), encoding)
    assert decode(total, encoding, 2).tolist() == [1.5, -1.5]


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        # Seven coordinates are two words of four lanes (1, 3, 5, 7 and 2, 4, 6), three of three, four of two.
        (16, [0x0007_0005_0003_0001, 0x0000_0006_0004_0002]),
        (21, [1 + (4 << 21) + (7 << 42), 2 + (5 << 21), 3 + (6 << 21)]),
        (32, [0x00000005_00000001, 0x00000006_00000002, 0x00000007_00000003, 0x00000000_00000004]),
    ],
)
def test_a_coordinate_lies_in_the_word_of_its_number_modulo_the_number_of_words(bits: int, words: list[int]) -> None:
    encoding = Encoding(8, 1, bits)
    values = np.arange(1, 8, dtype=np.float32) / 2
    for coins in (UP, DOWN):
        assert encoded(values, encoding, coins).tolist() == words
    assert encoding.num_words(7) == len(words)
    assert decode(np.array(words, np.uint64), encoding, 7).tolist() == values.tolist()


@pytest.mark.parametrize(
    ("bits", "values", "words"),
    [
        (16, [-1, 0, 0, 0], [0xFFFF_FFFF_FFFF_FFFF]),  # the lowest lane borrows from all above it
        (16, [-1, 1, -1, 1], [0x0000_FFFF_0000_FFFF]),
        (16, [0, 0, 0, -1], [0xFFFF_0000_0000_0000]),  # what the highest would borrow is left out, mod 2^64
        (21, [-1, -1, -1], [2**64 - 1 - (1 << 21) - (1 << 42)]),
        (21, [-1, 1, 0], [(1 << 21) - 1]),
        (32, [-1, 0], [0xFFFFFFFF_FFFFFFFF]),
        (32, [-1, -1], [0xFFFFFFFE_FFFFFFFF]),
    ],
)
def test_negative_lanes_borrow_from_the_next_by_hand(bits: int, values: list[int], words: list[int]) -> None:
    encoding = Encoding(4, 1, bits)
    halves = np.array(values, np.float32) / 2
    assert encoded(halves, encoding).tolist() == words
    assert decode(np.array(words, np.uint64), encoding, len(values)).tolist() == halves.tolist()


@pytest.mark.parametrize("bits", MODULUS_BITS)
@pytest.mark.parametrize("length", range(10))
def test_lanes_without_a_coordinate_are_zero_whatever_the_coins(length: int, bits: int) -> None:
    encoding = Encoding(1, 2, bits)
    num_words = -(-length // encoding.lanes)
    for coins in (UP, DOWN):
        words = encoded(np.full(length, -0.25, np.float32), encoding, coins)
        lanes = lanes_of(words, encoding, num_words * encoding.lanes)
        assert lanes.tolist() == [-1] * length + [0] * (num_words * encoding.lanes - length)


# ------------------------------------------------------------ one value


@settings(max_examples=300)
@given(encodings(), st.floats(-2e6, 2e6, width=32), st.integers(0, 2**64 - 1))
def test_one_value_is_off_by_less_than_a_step(encoding: Encoding, value: float, coin: int) -> None:
    limit = float(np.float32(encoding.value_range))
    for whole in signed([value] * encoding.lanes, encoding, coin):
        assert abs(whole - min(max(value, -limit), limit) * 2.0**encoding.fraction_bits) < 1
        assert abs(whole) <= encoding.largest


@settings(max_examples=300)
@given(encodings(), st.floats(-1, 1, width=32), st.integers(0, 2**64 - 1))
def test_small_values_are_off_by_less_than_a_step(encoding: Encoding, value: float, coin: int) -> None:
    """As above, where float32 has more binary places than the coins."""
    value = float(np.float32(value * 2.0**-encoding.fraction_bits))
    assume(abs(value) <= encoding.value_range)
    for whole in signed([value] * encoding.lanes, encoding, coin):
        assert abs(whole - value * 2.0**encoding.fraction_bits) < 1


@pytest.mark.parametrize("bits", MODULUS_BITS)
@pytest.mark.parametrize("value", [0.3, -0.3, 0.01, -0.99, 5.5, -7.125, 2**-20, -(2**-20)])
def test_rounding_is_unbiased(value: float, bits: int) -> None:
    """In every lane the mean of many roundings of v steps is v, and the share rounded up is its fraction."""
    count = 1_000_000
    encoding = Encoding(value_range=8, fraction_bits=4, modulus_bits=bits)
    steps = float(np.float32(value / 16)) * 16
    coins = np.random.default_rng(5).integers(0, 2**64, (encoding.coin_words, count), np.uint64)
    found = lanes_of(
        encoded(np.full(count * encoding.lanes, value / 16, np.float32), encoding, coins),
        encoding,
        count * encoding.lanes,
    ).reshape(encoding.lanes, count)
    fraction = steps - math.floor(steps)
    assert set(np.unique(found).tolist()) <= {math.floor(steps), math.floor(steps) + 1}
    deviation = math.sqrt(fraction * (1 - fraction) / count)
    assert np.abs(found.mean(axis=1) - steps).max() < 4.5 * deviation + 2**-24


@pytest.mark.parametrize("fraction", [0.0, 2**-20, 0.3, 0.5, 0.75 + 2**-20, 1 - 2**-20, 2**-21, 3 * 2**-22])
@pytest.mark.parametrize("whole", [0, -6])
def test_the_share_of_coins_that_rounds_up_is_the_fraction_to_a_millionth(fraction: float, whole: int) -> None:
    """All 2^20 coins once, in each lane: exact where the fraction has twenty places, else as near as they come."""
    value = np.float32(whole + fraction)
    exact = float(value) - math.floor(value)
    all_coins = np.arange(2**20, dtype=np.uint64)
    for bits in MODULUS_BITS:
        encoding = Encoding(16, 0, bits)
        coins = np.stack([all_coins * np.uint64(1 + 2**20 + 2**40)] * encoding.coin_words)
        vector = np.full(2**20 * encoding.lanes, value)
        found = lanes_of(encoded(vector, encoding, coins), encoding, len(vector)).reshape(encoding.lanes, -1)
        ups = (found == math.floor(value) + 1).sum(axis=1) / 2**20
        assert ((found == math.floor(value)).sum(axis=1) / 2**20 == 1 - ups).all()
        assert np.abs(ups - exact).max() <= 2**-21


@pytest.mark.parametrize("bits", MODULUS_BITS)
def test_every_coordinate_of_a_word_has_coins_of_its_own(bits: int) -> None:
    """Roundings of a half in two lanes agree half of the time, and each coin is that of no other word."""
    count, encoding = 100_000, Encoding(8, 4, bits)
    coins = np.random.default_rng(6).integers(0, 2**64, (encoding.coin_words, count), np.uint64)
    halves = np.full(count * encoding.lanes, 1 / 32, np.float32)
    found = lanes_of(encoded(halves, encoding, coins), encoding, len(halves)).reshape(encoding.lanes, count)
    for one in range(encoding.lanes):
        for other in range(one):
            assert abs((found[one] == found[other]).mean() - 0.5) < 5 * 0.5 / math.sqrt(count)
        assert abs((found[one, :-1] == found[one, 1:]).mean() - 0.5) < 5 * 0.5 / math.sqrt(count)


def test_whole_steps_are_never_moved() -> None:
    encoding = Encoding(value_range=100, fraction_bits=3, modulus_bits=16)
    values = np.arange(-800, 801, dtype=np.float32) / 8
    for coin in (UP, 0x1234_5678_9ABC_DEF0, DOWN):
        assert signed(values, encoding, coin) == list(range(-800, 801))


# ------------------------------------------------------------ clipping and what is refused


def test_clipped_coordinates_are_counted() -> None:
    encoding = Encoding(value_range=1.5, fraction_bits=4, modulus_bits=16)
    over = float(np.nextafter(np.float32(1.5), np.float32(2)))
    assert count_clipped([1.5, -1.5, 0, 1.4], encoding) == 0
    assert count_clipped([1.5, over, -over, -1e30, 3e38, 0], encoding) == 4


@pytest.mark.parametrize("value_range", AWKWARD_RANGES)
def test_the_range_itself_is_not_clipped(value_range: float) -> None:
    """Values are float32: the range that counts is the float32 beside ``value_range``."""
    encoding = Encoding(value_range, 4, 32)
    limit = np.float32(value_range)
    over = np.nextafter(limit, np.float32(np.inf))
    assert count_clipped([limit, -limit], encoding) == 0
    assert count_clipped([over, -over, limit], encoding) == 2
    assert signed([over, -over], encoding, UP) == signed([limit, -limit], encoding, UP)


@settings(max_examples=200)
@given(encodings(), st.lists(st.floats(-4, 4, width=32), max_size=30))
def test_the_count_is_that_of_values_out_of_range(encoding: Encoding, values: list[float]) -> None:
    limit = float(np.float32(encoding.value_range))
    values = [float(np.float32(value * limit)) for value in values]
    assert count_clipped(values, encoding) == sum(abs(value) > limit for value in values)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 3, -1])
def test_what_is_not_finite_is_refused(value: float, place: int) -> None:
    values = [0.0, 1.0, 100.0, -1.0, 2.0]
    values[place] = value
    with pytest.raises(ValueError, match="expected finite values"):
        signed(values, Encoding(1, 4, 16), UP)


def test_the_input_is_left_alone() -> None:
    values = np.array([0.3, -7, 9], np.float32)
    encoded(values, Encoding(1, 4, 16), UP)
    assert values.tolist() == np.array([0.3, -7, 9], np.float32).tolist()


# ------------------------------------------------------------ capacity


@settings(max_examples=500)
@given(encodings(), st.data())
def test_as_many_sites_as_fit_never_wrap_and_one_more_would(encoding: Encoding, data: st.DataObject) -> None:
    limit, most = float(np.float32(encoding.value_range)), encoding.most_sites
    signs = data.draw(st.lists(st.sampled_from([1, -1]), min_size=encoding.lanes, max_size=encoding.lanes))
    extremes = [signed([limit], encoding, UP)[0], signed([-limit], encoding, DOWN)[0]]
    reached = math.ceil(round(limit * 2.0 ** (encoding.fraction_bits + 20)) / 2**20)  # the coins have twenty places
    assert extremes == [reached, -reached]  # the largest magnitudes that rounding can make
    assert encoding.largest - 1 <= reached <= encoding.largest

    def decoded(num_sites: int) -> list[float]:
        """What ``num_sites`` sites with the same extremes in all lanes add up to."""
        word = words_of([[sign * encoding.largest] for sign in signs], encoding.modulus_bits)
        total = np.array([int(word[0]) * num_sites % 2**64], np.uint64)
        return decode(total, encoding, encoding.lanes).tolist()

    num_sites = data.draw(st.integers(1, most) | st.just(most))
    check_capacity(encoding, num_sites)
    exact = num_sites * encoding.largest * 2.0**-encoding.fraction_bits
    assert decoded(num_sites) == [np.float32(sign * exact) for sign in signs]

    with pytest.raises(ValueError, match=f"modulus_bits={encoding.modulus_bits} cannot hold {most + 1} sites"):
        check_capacity(encoding, most + 1)
    signs = [1] * encoding.lanes
    assert decoded(most + 1)[0] < 0  # the sum of positive numbers


@pytest.mark.parametrize("value_range", AWKWARD_RANGES)
@pytest.mark.parametrize("fraction_bits", [3, 24, 28])
def test_the_bound_counts_the_range_as_float32_has_it(value_range: float, fraction_bits: int) -> None:
    """float32(0.1) is above 0.1: a bound from the float64 would be too small at many fraction bits."""
    encoding = Encoding(value_range, fraction_bits, 32)
    assert signed([value_range], encoding, UP) == [encoding.largest]


def test_the_bound_at_a_tenth_by_hand() -> None:
    assert float(np.float32(0.1)) * 2**30 == 107374184.0  # the float64 makes 107374182.4
    assert Encoding(0.1, 30, 32).largest == 107374184


@pytest.mark.parametrize(
    ("encoding", "num_sites", "change"),
    [
        (Encoding(8, 8, 16), 16, "use 21"),  # 16 * 2048 is 2^15, one too many
        (Encoding(1, 15, 16), 1, "use 21"),
        (Encoding(8, 16, 21), 2, "use 32"),
        (Encoding(1, 8, 16), 128 * 2**5, "use 32"),  # 21 bits hold 4095
        (Encoding(8, 16, 32), 5000, "lower fraction_bits or value_range"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_number_to_change(
    encoding: Encoding, num_sites: int, change: str
) -> None:
    with pytest.raises(ValueError) as caught:
        check_capacity(encoding, num_sites)
    assert str(caught.value) == (
        f"modulus_bits={encoding.modulus_bits} cannot hold {num_sites} sites at "
        f"value_range={encoding.value_range:g}, fraction_bits={encoding.fraction_bits}; {change}"
    )


def test_the_number_to_change_is_enough() -> None:
    check_capacity(Encoding(8, 8, 21), 16)
    check_capacity(Encoding(8, 16, 32), 40)
    check_capacity(Encoding(8, 8, 16), 15)


@given(encodings(), st.integers(1, 100_000))
def test_the_fewest_bits_hold_the_sites_and_fewer_do_not(encoding: Encoding, num_sites: int) -> None:
    found = fewest_bits(encoding.value_range, encoding.fraction_bits, num_sites)
    for bits in MODULUS_BITS:
        holds = num_sites <= Encoding(encoding.value_range, encoding.fraction_bits, bits).most_sites
        assert holds == (found is not None and bits >= found)


# ------------------------------------------------------------ sums


@st.composite
def lane_sums(draw: st.DrawFn) -> tuple[Encoding, NDArray[np.int64]]:
    """An encoding and (site, coordinate) integers that it can make, often the extremes, of as many sites as fit."""
    bits, fraction_bits = draw(st.sampled_from(MODULUS_BITS)), draw(st.integers(0, 6))
    num_sites, length = draw(st.integers(1, 12)), draw(st.integers(0, 50))
    # The largest range for which this many sites still fit, in whole steps that float32 has.
    largest = int(np.float32(((1 << (bits - 1)) - 1) // num_sites))
    while num_sites * largest >= 1 << (bits - 1):
        largest = int(np.nextafter(np.float32(largest), np.float32(0)))
    encoding = Encoding(largest * 2.0**-fraction_bits, fraction_bits, bits)
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    extremes = random.choice([-largest, largest, -1, 0], (num_sites, length))
    same_signs = np.broadcast_to(random.choice([-largest, largest], length), (num_sites, length))
    anything = random.integers(-largest, largest + 1, (num_sites, length))
    return encoding, draw(st.sampled_from([extremes, same_signs, anything]))


@settings(max_examples=500)
@given(lane_sums(), st.sampled_from([1, 2, 3, PIECE]))
def test_the_sum_of_words_mod_2_64_is_the_sums_of_the_lanes(case: tuple[Encoding, NDArray], piece: int) -> None:
    encoding, integers = case
    num_sites, length = integers.shape
    check_capacity(encoding, num_sites)
    num_words = encoding.num_words(length)
    total = np.zeros(num_words, np.uint64)
    for row in integers:
        padded = np.zeros(num_words * encoding.lanes, np.int64)
        padded[:length] = row
        total += words_of(padded.reshape(encoding.lanes, num_words).tolist(), encoding.modulus_bits)
    assert np.array_equal(lanes_of(total, encoding, length), integers.sum(axis=0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding_module, "PIECE", piece)
        decoded = decode(total, encoding, length)
    expected = integers.sum(axis=0) * 2.0**-encoding.fraction_bits
    assert decoded.dtype == np.float32
    assert np.array_equal(decoded, expected.astype(np.float32))


@st.composite
def sums(draw: st.DrawFn) -> tuple[Encoding, Floats, list[Words]]:
    """An encoding, values of as many sites as it holds or fewer (site, coordinate), and coins to round them."""
    encoding = draw(encodings())
    num_sites, dim = draw(st.integers(1, min(encoding.most_sites, 12))), draw(st.integers(1, 8))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from([0.01, 1, 3]))
    values = random.uniform(-spread, spread, (num_sites, dim)) * encoding.value_range
    shape = (num_sites, encoding.coin_words, encoding.num_words(dim))
    return encoding, values.astype(np.float32), list(random.integers(0, 2**64, shape, np.uint64))


@settings(max_examples=300)
@given(sums())
def test_a_decoded_sum_is_off_by_less_than_a_step_a_site(case: tuple[Encoding, Floats, list[Words]]) -> None:
    encoding, values, random = case
    total = np.zeros(encoding.num_words(values.shape[1]), np.uint64)
    for row, coins in zip(values, random, strict=True):
        total += encoded(row, encoding, coins)
    decoded = decode(total, encoding, values.shape[1])
    limit = float(np.float32(encoding.value_range))
    exact = np.clip(values.astype(np.float64), -limit, limit).sum(axis=0)
    # Sums of 24 bits or fewer are exact in float32; of longer ones the result is the nearest float32.
    nearest = 0 if encoding.modulus_bits <= 24 else np.spacing(np.abs(decoded)) / 2
    assert (np.abs(decoded - exact) < len(values) * 2.0**-encoding.fraction_bits + nearest).all()
