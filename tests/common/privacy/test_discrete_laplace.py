"""Shares of discrete Laplace noise: the distribution against exact probabilities, and the epsilon it keeps. Seeds are
fixed."""

import inspect
import math
import os
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from common.privacy import discrete_laplace
from common.privacy.discrete_laplace import exact_epsilon, share, variance
from common.privacy.sampling import ByteSource
from tests.common.privacy.sources import Counted, failing, seeded, short

COUNT = 100_000
FALSE_ALARM = 1e-5


def share_probabilities(epsilon: float, num_noisy: int, farthest: int) -> NDArray[np.float64]:
    """Of -farthest to farthest: the difference of two negative binomials, by scipy's figures of each."""
    ratio = math.exp(-exact_epsilon(epsilon))
    terms = stats.nbinom.pmf(np.arange(farthest + 60 / epsilon), 1 / num_noisy, 1 - ratio)
    found = np.correlate(terms, terms, "full")
    middle = len(terms) - 1
    return np.asarray(found[middle - farthest : middle + farthest + 1])


def laplace_probabilities(epsilon: float, farthest: int) -> NDArray[np.float64]:
    """Of -farthest to farthest: (1 - a) / (1 + a) a^|x|."""
    ratio = math.exp(-exact_epsilon(epsilon))
    return np.asarray((1 - ratio) / (1 + ratio) * ratio ** np.abs(np.arange(-farthest, farthest + 1)))


def chi_square(values: NDArray[np.int64], inside: NDArray[np.float64]) -> float:
    """The p-value of samples against the probabilities of the middle; what lies beyond is a cell at each end."""
    farthest = len(inside) // 2
    tail = (1 - inside.sum()) / 2
    observed = np.bincount(np.clip(values, -farthest - 1, farthest + 1) + farthest + 1, minlength=2 * farthest + 3)
    expected = np.concatenate([[tail], inside, [tail]]) * len(values)
    assert expected.min() > 5
    return float(stats.chisquare(observed, expected).pvalue)


def reach(epsilon: float, num_noisy: int) -> int:
    """The farthest value that is still expected thirty times."""
    inside = share_probabilities(epsilon, num_noisy, math.ceil(25 / epsilon))
    return int(np.flatnonzero(inside * COUNT > 30)[-1]) - len(inside) // 2


# ------------------------------------------------------------ the distribution


CASES = [(0.5, 1), (0.5, 2), (0.5, 5), (2.0, 1), (2.0, 2), (2.0, 5), (0.3, 2)]


@pytest.mark.parametrize(("epsilon", "num_noisy"), CASES)
def test_a_share_has_its_exact_distribution(epsilon: float, num_noisy: int) -> None:
    values = share(epsilon, num_noisy, COUNT, seeded(num_noisy))
    far = reach(epsilon, num_noisy)
    assert chi_square(values, share_probabilities(epsilon, num_noisy, far)) > FALSE_ALARM


@pytest.mark.parametrize(("epsilon", "num_noisy"), CASES)
def test_the_sum_of_all_shares_is_the_discrete_laplace(epsilon: float, num_noisy: int) -> None:
    source = seeded(10 + num_noisy)
    total = sum((share(epsilon, num_noisy, COUNT, source) for _ in range(num_noisy)), np.zeros(COUNT, np.int64))
    assert chi_square(total, laplace_probabilities(epsilon, reach(epsilon, 1))) > FALSE_ALARM


def test_by_hand_one_in_two_of_epsilon_log_two() -> None:
    # a = 1/2, m = 2: NB(1/2, 1/2) is 0 with the probability (1 - a)^(1/2) = 0.70711, and 1, 2, 3 with 1/4, 3/32, 5/128
    # of that: a^k times 1/2, 1/2 3/4, 1/2 3/4 5/6. The squares of these add up to 1/2 (1 + 0.0625 + 0.00879 + 0.00153 +
    # ...) = 0.5366, the probability that the difference is 0.
    zeros = share(math.log(2), 2, COUNT, seeded(19)) == 0
    assert stats.binomtest(int(zeros.sum()), COUNT, 0.53659).pvalue > FALSE_ALARM


def test_the_chi_square_tells_another_epsilon_and_another_number_of_sites() -> None:
    # Not vacuous: a tenth more epsilon, and shares of one in 5 for one in 4, are found out.
    values = share(0.55, 5, COUNT, seeded(20))
    assert chi_square(values, share_probabilities(0.5, 5, reach(0.5, 5))) < 1e-9
    assert chi_square(values, share_probabilities(0.55, 4, reach(0.55, 5))) < 1e-9


@pytest.mark.parametrize(("epsilon", "num_noisy", "num_sites"), [(0.5, 2, 3), (2.0, 1, 3), (0.1, 10, 12), (0.02, 3, 2)])
def test_the_variance_of_an_opened_sum_is_the_declared_one(epsilon: float, num_noisy: int, num_sites: int) -> None:
    source, count = seeded(21), 4_000
    total = sum((share(epsilon, num_noisy, count, source) for _ in range(num_sites)), np.zeros(count, np.int64))
    expected = variance(epsilon, num_noisy, num_sites)
    squares = total.astype(np.float64) ** 2
    error = squares.std() / math.sqrt(count)
    assert abs(squares.mean() - expected) < 4.5 * error
    assert abs(total.mean()) < 4.5 * math.sqrt(expected / count)


def test_by_hand_the_variance() -> None:
    # a = exp(-0.5) = 0.60653: 2 a / (1 - a)^2 = 1.21306 / 0.154818 = 7.8354
    assert variance(0.5, 1, 1) == pytest.approx(7.8354, abs=1e-4)
    assert variance(0.5, 3, 4) == pytest.approx(7.8354 * 4 / 3, abs=1e-3)


def test_samples_are_independent() -> None:
    values = share(0.1, 3, COUNT, seeded(22)).astype(np.float64)
    for lag in (1, 2, 3, COUNT // 2):
        for series in (values, np.abs(values)):
            assert abs(np.corrcoef(series[lag:], series[:-lag])[0, 1]) < 5 / math.sqrt(COUNT - lag)
    half = COUNT // 2
    assert abs(np.corrcoef(values[:half], values[::-1][:half])[0, 1]) < 5 / math.sqrt(half)


def test_few_samples_have_the_same_distribution() -> None:
    source = seeded(23)
    values = np.stack([share(2.0, 3, 2, source) for _ in range(2000)])
    for position in range(2):
        assert chi_square(values[:, position], share_probabilities(2.0, 3, 1)) > FALSE_ALARM


@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_there_are_as_many_as_asked_for(count: int) -> None:
    values = share(0.5, 3, count)
    assert (values.shape, values.dtype) == ((count,), np.int64)


@pytest.mark.parametrize(("epsilon", "num_noisy"), [(1 / 1024, 1), (1 / 1024, 1 << 20), (100, 1), (100, 1 << 20)])
def test_the_ends_of_what_is_allowed_work(epsilon: float, num_noisy: int) -> None:
    values = share(epsilon, num_noisy, 20, seeded(24))
    assert np.abs(values).max() <= (100_000 if epsilon < 1 else 0)


# ------------------------------------------------------------ which epsilon


@pytest.mark.parametrize(
    ("declared", "exact"), [(0.5, Fraction(1, 2)), (2.0, Fraction(2)), (1.25, Fraction(5, 4)), (3, Fraction(3))]
)
def test_epsilons_of_few_bits_are_kept(declared: float, exact: Fraction) -> None:
    assert exact_epsilon(declared) == exact


@settings(max_examples=300)
@given(st.floats(1 / 1024, 100))
def test_the_noise_is_never_for_more_than_was_declared(declared: float) -> None:
    exact = exact_epsilon(declared)
    assert exact <= Fraction(declared) and exact <= Fraction(repr(declared))
    assert Fraction(declared) - exact <= Fraction(1, 2**20) + Fraction(1, 2**40)
    assert exact.denominator <= 2**20


def test_both_readings_of_a_decimal_text_are_kept_below() -> None:
    # The double of 0.3 is below three tenths, that of 0.1 above one tenth.
    assert Fraction(0.3) < Fraction(3, 10) and Fraction(0.1) > Fraction(1, 10)
    assert exact_epsilon(0.3) == Fraction(314572, 2**20) and exact_epsilon(0.1) == Fraction(104857, 2**20)
    # A multiple of 2^-20 whose shortest text is below it: the next lower multiple.
    declared = 1_048_613 / 2**20
    assert Fraction(repr(declared)) < Fraction(declared)
    assert exact_epsilon(declared) == Fraction(1_048_612, 2**20)


@pytest.mark.parametrize("num_noisy", [1, 2, 5])
@pytest.mark.parametrize("epsilon", [0.1, 0.5, 2.0])
def test_a_patient_more_changes_no_probability_by_more_than_epsilon(epsilon: float, num_noisy: int) -> None:
    """By convolution of the shares' exact probabilities, whatever the output."""
    far = math.ceil(40 / epsilon)
    one = share_probabilities(epsilon, num_noisy, far)
    total = np.ones(1)
    for _ in range(num_noisy):
        total = np.convolve(total, one)
    middle = len(total) // 2
    inside = total[middle - far // 2 : middle + far // 2 + 1]
    losses = np.log(inside[1:] / inside[:-1])
    assert np.abs(losses).max() <= epsilon + 1e-6
    assert np.abs(losses).max() >= epsilon - 2e-6  # and no more noise than that
    fewer = np.ones(1)
    for _ in range(num_noisy - 1):  # one site too few: the guarantee is gone
        fewer = np.convolve(fewer, one)
    if num_noisy > 1:
        middle = len(fewer) // 2
        assert np.log(fewer[middle] / fewer[middle + 1]) > epsilon + 0.1


# ------------------------------------------------------------ what is refused, and the source


@pytest.mark.parametrize("epsilon", [0.0, -1.0, 0.0009, 101.0, math.nan, math.inf])
def test_other_epsilons_are_refused(epsilon: float) -> None:
    with pytest.raises(ValueError, match="epsilon must be from 0.000976562 to 100"):
        share(epsilon, 3, 4)


@pytest.mark.parametrize("num_noisy", [0, -1, (1 << 20) + 1])
def test_other_numbers_of_sites_are_refused(num_noisy: int) -> None:
    with pytest.raises(ValueError, match="num_noisy must be from 1 to 1048576"):
        share(0.5, num_noisy, 4)


@pytest.mark.parametrize("source", [failing, short])
def test_a_source_that_fails_gives_no_noise(source: ByteSource) -> None:
    with pytest.raises(OSError, match="random"):
        share(0.5, 3, 4, source)


def test_a_source_that_fails_later_gives_no_noise() -> None:
    class Failing:
        def __init__(self, calls: int) -> None:
            self.calls, self.random = calls, seeded(9)

        def __call__(self, count: int) -> bytes:
            self.calls -= 1
            if self.calls < 0:
                raise OSError("no randomness")
            return self.random(count)

    for calls in range(8):  # there are more
        with pytest.raises(OSError, match="no randomness"):
            share(0.5, 3, 4, Failing(calls))


def repeating() -> list[Callable[[int], bytes]]:
    return [lambda count, byte=byte: bytes([byte]) * count for byte in (0x00, 0x01, 0x7F, 0x80, 0xFF)]  # type: ignore[misc]


@pytest.mark.parametrize("source", repeating())
@pytest.mark.parametrize("epsilon", [0.1, 2.0])
def test_a_source_that_repeats_a_byte_ends(source: ByteSource, epsilon: float) -> None:
    # Some bytes give samples, none random: only that nothing hangs, overflows or lies outside is tested.
    try:
        values = share(epsilon, 3, 3, source)
    except OSError as error:
        assert "broken" in str(error)
    else:
        assert np.abs(values).max() < 128 / epsilon + 1


def test_the_bytes_come_from_the_operating_system_a_few_times() -> None:
    source = Counted()
    first, second = share(0.5, 3, 2000, source), share(0.5, 3, 2000, source)
    assert not (first == second).all()
    assert len(source.asked) < 400
    assert sum(source.asked) < 2 * 4000 * 8 * 40
    assert inspect.signature(share).parameters["source"].default is os.urandom
    assert not hasattr(discrete_laplace, "random")
