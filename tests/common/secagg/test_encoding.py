"""Floats become integers and come back: by hand, then the bounds that the module promises, for anything it accepts."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from common.secagg.encoding import (
    MODULUS_BITS,
    Bytes,
    Encoding,
    Floats,
    Words,
    check_capacity,
    decode,
    encode,
    pack,
    unpack,
)
from common.secagg.masks import PIECE

UP, DOWN = 0, 2**32 - 1  # the words that round up, and down, whatever has a fraction
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


def encoded(values: ArrayLike, encoding: Encoding, random: int | Words) -> tuple[Words, int]:
    array = np.asarray(values, np.float32)
    words = random if isinstance(random, np.ndarray) else np.full(len(array), random, np.uint32)
    out = np.empty(len(array), np.uint32)
    clipped = encode(array, encoding, words, out)
    return out, clipped


def signed(values: ArrayLike, encoding: Encoding, random: int | Words) -> list[int]:
    return [int(each) for each in encoded(values, encoding, random)[0].view(np.int32)]


def packed(words: Words, encoding: Encoding) -> Bytes:
    out = np.empty(len(words) * encoding.bytes_each, np.uint8)
    pack(words, encoding, out)
    return out


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
    total = sum((encoded([value, -value], encoding, UP)[0] for value in (0.25, 2.0, -0.75)), np.zeros(2, np.uint32))
    assert decode(total, encoding).tolist() == [1.5, -1.5]


def test_the_integers_wrap_at_the_modulus() -> None:
    encoding = Encoding(value_range=2, fraction_bits=0, modulus_bits=24)
    minus_one_and_noise = np.array([0x00FFFFFF, 0xABFFFFFF, 0xFF000002], np.uint32)  # only the low 24 bits count
    assert decode(minus_one_and_noise, encoding).tolist() == [-1, -1, 2]


@pytest.mark.parametrize(
    ("bits", "expected"),
    [(16, "0403 ddcc 0100"), (24, "040302 ddccbb 010000"), (32, "04030201 ddccbbaa 01000000")],
)
def test_the_lowest_byte_goes_first(bits: int, expected: str) -> None:
    words = np.array([0x01020304, 0xAABBCCDD, 1], np.uint32)
    assert packed(words, Encoding(1, 1, bits)).tobytes() == bytes.fromhex(expected)


@pytest.mark.parametrize(("bits", "expected"), [(16, [0x0201, 0x0403]), (24, [0x030201]), (32, [0x04030201])], ids=str)
def test_bytes_are_read_lowest_first(bits: int, expected: list[int]) -> None:
    count = len(expected) * bits // 8
    assert unpack(np.arange(1, count + 1, dtype=np.uint8), Encoding(1, 1, bits)).tolist() == expected


# ------------------------------------------------------------ one value


@settings(max_examples=300)
@given(encodings(), st.floats(-2e6, 2e6, width=32), st.integers(0, 2**32 - 1))
def test_one_value_is_off_by_less_than_a_step(encoding: Encoding, value: float, word: int) -> None:
    limit = float(np.float32(encoding.value_range))
    [whole] = signed([value], encoding, word)
    assert abs(whole - min(max(value, -limit), limit) * 2.0**encoding.fraction_bits) < 1
    assert abs(whole) <= encoding.largest


@settings(max_examples=300)
@given(encodings(), st.floats(-1, 1, width=32), st.integers(0, 2**32 - 1))
def test_small_values_are_off_by_less_than_a_step(encoding: Encoding, value: float, word: int) -> None:
    """As above, where float32 has more binary places than the random words."""
    value = float(np.float32(value * 2.0**-encoding.fraction_bits))
    assume(abs(value) <= encoding.value_range)
    [whole] = signed([value], encoding, word)
    assert abs(whole - value * 2.0**encoding.fraction_bits) < 1


@pytest.mark.parametrize("value", [0.3, -0.3, 0.01, -0.99, 5.5, -7.125, 2**-20, -(2**-20)])
def test_rounding_is_unbiased(value: float) -> None:
    """The mean of many roundings of v steps is v, and the share rounded up is its fraction."""
    count = 1_000_000
    encoding = Encoding(value_range=8, fraction_bits=4, modulus_bits=16)
    steps = float(np.float32(value / 16)) * 16
    words = np.random.default_rng(5).integers(0, 2**32, count, np.uint32)
    found = np.array(signed(np.full(count, value / 16, np.float32), encoding, words))
    fraction = steps - math.floor(steps)
    assert set(found.tolist()) <= {math.floor(steps), math.floor(steps) + 1}
    deviation = math.sqrt(fraction * (1 - fraction) / count)
    assert abs(found.mean() - steps) < 4 * deviation + 2**-24


def test_whole_steps_are_never_moved() -> None:
    encoding = Encoding(value_range=100, fraction_bits=3, modulus_bits=16)
    values = np.arange(-800, 801, dtype=np.float32) / 8
    for word in (UP, 12345 << 8, DOWN):
        assert signed(values, encoding, word) == list(range(-800, 801))


# ------------------------------------------------------------ clipping and what is refused


def test_clipped_coordinates_are_counted() -> None:
    encoding = Encoding(value_range=1.5, fraction_bits=4, modulus_bits=16)
    over = float(np.nextafter(np.float32(1.5), np.float32(2)))
    assert encoded([1.5, -1.5, 0, 1.4], encoding, UP)[1] == 0
    assert encoded([1.5, over, -over, -1e30, 3e38, 0], encoding, UP)[1] == 4


@pytest.mark.parametrize("value_range", AWKWARD_RANGES)
def test_the_range_itself_is_not_clipped(value_range: float) -> None:
    """Values are float32: the range that counts is the float32 beside ``value_range``."""
    encoding = Encoding(value_range, 4, 32)
    limit = np.float32(value_range)
    over = np.nextafter(limit, np.float32(np.inf))
    assert encoded([limit, -limit], encoding, UP)[1] == 0
    assert encoded([over, -over, limit], encoding, UP)[1] == 2
    assert signed([over, -over], encoding, UP) == signed([limit, -limit], encoding, UP)


@settings(max_examples=200)
@given(encodings(), st.lists(st.floats(-4, 4, width=32), max_size=30))
def test_the_count_is_that_of_values_out_of_range(encoding: Encoding, values: list[float]) -> None:
    limit = float(np.float32(encoding.value_range))
    values = [float(np.float32(value * limit)) for value in values]
    assert encoded(values, encoding, UP)[1] == sum(abs(value) > limit for value in values)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 3, -1])
def test_what_is_not_finite_is_refused(value: float, place: int) -> None:
    values = [0.0, 1.0, 100.0, -1.0, 2.0]
    values[place] = value
    with pytest.raises(ValueError, match="expected finite values"):
        encoded(values, Encoding(1, 4, 16), UP)


def test_the_input_is_left_alone() -> None:
    values = np.array([0.3, -7, 9], np.float32)
    encoded(values, Encoding(1, 4, 16), UP)
    assert values.tolist() == np.array([0.3, -7, 9], np.float32).tolist()


# ------------------------------------------------------------ capacity


def sum_of(num_sites: int, words: Words, encoding: Encoding) -> Floats:
    """What ``num_sites`` sites with the same integers add up to, mod 2^32."""
    return decode((words.astype(np.uint64) * num_sites).astype(np.uint32), encoding)


@settings(max_examples=500)
@given(encodings(), st.data())
def test_as_many_sites_as_fit_never_wrap_and_one_more_would(encoding: Encoding, data: st.DataObject) -> None:
    limit, most = float(np.float32(encoding.value_range)), encoding.most_sites
    extremes = np.concatenate(
        [encoded([limit], encoding, UP)[0], encoded([-limit], encoding, DOWN)[0]]
    )  # the largest magnitudes that rounding can make
    assert extremes.view(np.int32).tolist() == [encoding.largest, -encoding.largest]

    num_sites = data.draw(st.integers(1, most) | st.just(most))
    check_capacity(encoding, num_sites)
    exact = num_sites * encoding.largest * 2.0**-encoding.fraction_bits
    assert sum_of(num_sites, extremes, encoding).tolist() == [np.float32(exact), np.float32(-exact)]

    with pytest.raises(ValueError, match=f"modulus_bits={encoding.modulus_bits} cannot hold {most + 1} sites"):
        check_capacity(encoding, most + 1)
    assert sum_of(most + 1, extremes, encoding)[0] < 0  # the sum of positive numbers


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
        (Encoding(8, 8, 16), 16, "use 24"),  # 16 * 2048 is 2^15, one too many
        (Encoding(1, 15, 16), 1, "use 24"),
        (Encoding(8, 16, 24), 40, "use 32"),
        (Encoding(1, 8, 16), 128 * 2**8, "use 32"),  # 24 bits hold 32767
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
    check_capacity(Encoding(8, 8, 24), 16)
    check_capacity(Encoding(8, 16, 32), 40)
    check_capacity(Encoding(8, 8, 16), 15)


# ------------------------------------------------------------ sums


@st.composite
def sums(draw: st.DrawFn) -> tuple[Encoding, Floats, Words]:
    """An encoding, values of as many sites as it holds or fewer (site, coordinate), and words to round them."""
    encoding = draw(encodings())
    num_sites, dim = draw(st.integers(1, min(encoding.most_sites, 12))), draw(st.integers(1, 8))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from([0.01, 1, 3]))
    values = random.uniform(-spread, spread, (num_sites, dim)) * encoding.value_range
    return encoding, values.astype(np.float32), random.integers(0, 2**32, (num_sites, dim), np.uint32)


@settings(max_examples=300)
@given(sums())
def test_a_decoded_sum_is_off_by_less_than_a_step_a_site(case: tuple[Encoding, Floats, Words]) -> None:
    encoding, values, random = case
    total = np.zeros(values.shape[1], np.uint32)
    for row, words in zip(values, random, strict=True):
        total += unpack(packed(encoded(row, encoding, words)[0], encoding), encoding)
    decoded = decode(total, encoding)
    limit = float(np.float32(encoding.value_range))
    exact = np.clip(values.astype(np.float64), -limit, limit).sum(axis=0)
    # Sums of 24 bits or fewer are exact in float32; of longer ones the result is the nearest float32.
    nearest = 0 if encoding.modulus_bits <= 24 else np.spacing(np.abs(decoded)) / 2
    assert (np.abs(decoded - exact) < len(values) * 2.0**-encoding.fraction_bits + nearest).all()


# ------------------------------------------------------------ packing


@pytest.mark.parametrize("bits", MODULUS_BITS)
@pytest.mark.parametrize("length", [0, 1, PIECE - 1, PIECE, PIECE + 1])
def test_packing_and_back(bits: int, length: int) -> None:
    encoding = Encoding(1, 1, bits)
    words = np.random.default_rng(length).integers(0, 2**32, length, np.uint32)
    as_bytes = packed(words, encoding)
    assert len(as_bytes) == length * bits // 8
    back = unpack(as_bytes, encoding)
    assert back.dtype == np.uint32
    assert np.array_equal(back, words & np.uint32(2**bits - 1))


@given(st.sampled_from(MODULUS_BITS), st.binary(max_size=60))
def test_bytes_to_words_and_back(bits: int, content: bytes) -> None:
    encoding = Encoding(1, 1, bits)
    content = content[: len(content) // encoding.bytes_each * encoding.bytes_each]
    assert packed(unpack(np.frombuffer(content, np.uint8), encoding), encoding).tobytes() == content
