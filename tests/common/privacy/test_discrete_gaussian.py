"""The discrete Gaussian: its coins by hand to the last word, its distribution against exact sums. Seeds are fixed."""

import inspect
import itertools
import math
import os
from collections.abc import Callable
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from common.privacy import discrete_gaussian
from common.privacy.coins import Random, coins_in_a_row, exp_coins, inverse_e
from common.privacy.discrete_gaussian import LARGEST_SCALE, sample
from common.privacy.sampling import ByteSource
from tests.common.privacy.sources import Counted, failing, seeded, short

COUNT = 200_000
FALSE_ALARM = 1e-5


def scripted(*words: int) -> Random:
    """Gives these words in turn, then no more."""
    left = list(words)

    def source(count: int) -> bytes:
        taken = [left.pop(0) for _ in range(count // 8)]
        return np.array(taken, np.uint64).tobytes()

    return Random(source, 10**6)


def random(seed: int) -> Random:
    return Random(seeded(seed), 10**9)


def probabilities(scale: int, farthest: int) -> NDArray[np.float64]:
    """Exact probabilities of -farthest to farthest, to 30 digits before they become floats."""
    with mpmath.workdps(30):
        terms = [mpmath.exp(-mpmath.mpf(x * x) / (2 * scale**2)) for x in range(15 * scale)]
        total = 2 * mpmath.fsum(terms) - 1
        upper = [float(term / total) for term in terms[: farthest + 1]]
    return np.array(upper[:0:-1] + upper)


def chi_square(values: NDArray[np.int64], scale: int) -> float:
    """The p-value of samples against the exact probabilities; the tails beyond 3.5 scales are one cell each."""
    farthest = math.ceil(3.5 * scale)
    inside = probabilities(scale, farthest)
    tail = (1 - inside.sum()) / 2
    observed = np.bincount(np.clip(values, -farthest - 1, farthest + 1) + farthest + 1, minlength=2 * farthest + 3)
    expected = np.concatenate([[tail], inside, [tail]]) * len(values)
    return float(stats.chisquare(observed, expected).pvalue)


# ------------------------------------------------------------ words become integers and coins, by hand


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 10, 2**32, 2**32 + 1, math.factorial(20), 2**62 + 1])
def test_every_integer_below_the_limit_has_equally_many_words(limit: int) -> None:
    step = (2**64 - 1) // limit
    for value in {0, limit // 2, limit - 1}:
        assert scripted(value * step).below(limit, 1).tolist() == [value]
        assert scripted((value + 1) * step - 1).below(limit, 1).tolist() == [value]
    # What is left over, at most a word for each integer, is drawn again: here twice.
    assert 1 <= 2**64 - limit * step <= limit
    assert scripted(limit * step, 2**64 - 1, 0).below(limit, 1).tolist() == [0]


def test_words_drawn_again_take_the_place_of_the_refused_ones() -> None:
    assert scripted(0, 2**64 - 1, 1, 2**64 - 1, 2, 2**64 - 1, 3).below(2**62, 4).tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(("numerator", "denominator"), [(0, 5), (1, 5), (5, 5), (1, 1), (2**48 - 1, 2**49)])
def test_a_coin_is_true_for_the_share_of_words(numerator: int, denominator: int) -> None:
    step = (2**64 - 1) // denominator
    numerators = np.array([numerator], np.uint64)
    if numerator > 0:
        assert scripted(numerator * step - 1).coins(numerators, denominator).all()
    if numerator < denominator:
        assert not scripted(numerator * step).coins(numerators, denominator).any()


def test_the_coin_ofinverse_e_is_exact() -> None:
    # The integers below 20! that make it true, counted between the points where it changes; 0 is left to more coins.
    whole = math.factorial(20)
    step = (2**64 - 1) // whole
    changes = sorted({whole // math.factorial(k) for k in range(1, 21)})  # 1, 20, 20 * 19, ... 20!
    accepted = 0
    for low, high in itertools.pairwise(changes):
        results = [inverse_e(1, scripted(drawn * step)).item() for drawn in (low, (low + high) // 2, high - 1)]
        assert len(set(results)) == 1
        accepted += results[0] * (high - low)
    with mpmath.workdps(40):
        share = mpmath.exp(-1) * whole
        assert accepted <= share <= accepted + 1


def test_the_coin_ofinverse_e_goes_on_where_a_word_does_not_decide() -> None:
    fails, succeeds = 2**63, 0
    assert inverse_e(1, scripted(0, fails)).all()  # throw 21 is the first that fails, an odd one
    assert not inverse_e(1, scripted(0, succeeds, fails)).any()
    assert inverse_e(1, scripted(0, succeeds, succeeds, fails)).all()


@pytest.mark.parametrize(
    ("numerator", "denominator"),
    [(0, 7), (1, 1000), (1, 2), (999, 1000), (1, 1), (3, 2), (2, 1), (7, 3), (2**49 - 1, 2**49), (3 * 2**48, 2**49)],
)
def test_exponential_coins_have_their_probability(numerator: int, denominator: int) -> None:
    coins = exp_coins(np.full(COUNT, numerator, np.int64), denominator, random(1))
    exact = math.exp(-Fraction(numerator, denominator))
    assert stats.binomtest(int(coins.sum()), COUNT, exact).pvalue > FALSE_ALARM


def test_exponential_coins_do_not_mix_their_numerators() -> None:
    numerators = np.tile(np.array([0, 1, 5, 10, 15, 23, 50], np.int64), 30_000)
    coins = exp_coins(numerators, 10, random(2))
    for numerator in set(numerators.tolist()):
        mine = coins[numerators == numerator]
        assert stats.binomtest(int(mine.sum()), len(mine), math.exp(-numerator / 10)).pvalue > FALSE_ALARM


def test_geometric_numbers_have_their_distribution() -> None:
    observed = np.bincount(np.minimum(coins_in_a_row(COUNT, random(3)), 8), minlength=9)
    expected = np.array([math.exp(-k) * (1 - math.exp(-1)) for k in range(8)] + [math.exp(-8)]) * COUNT
    assert stats.chisquare(observed, expected).pvalue > FALSE_ALARM


# ------------------------------------------------------------ the distribution


@pytest.mark.parametrize("scale", [1, 2, 5, 33])
def test_the_distribution_is_the_exact_one(scale: int) -> None:
    assert chi_square(sample(COUNT, scale, seeded(scale)), scale) > FALSE_ALARM


def test_the_chi_square_tells_a_scale_three_percent_off() -> None:
    # Not vacuous: a rounded continuous Gaussian of scale 1 (variance 1 + 1/12), and 33 for 34, are found out.
    normals = np.random.default_rng(1).standard_normal(COUNT)
    assert chi_square(np.rint(normals).astype(np.int64), 1) < 1e-9
    assert chi_square(sample(COUNT, 34, seeded(4)), 33) < 1e-9


@pytest.mark.parametrize("scale", [1000, 40_000, LARGEST_SCALE])
def test_large_scales_are_normal(scale: int) -> None:
    values = sample(COUNT, scale, seeded(5)) / scale
    assert stats.kstest(values, "norm").pvalue > 1e-4
    low, high = stats.chi2.interval(1 - FALSE_ALARM, COUNT)
    assert low < float((values**2).sum()) < high
    assert abs(values.mean()) < 4.5 / math.sqrt(COUNT)
    assert abs(stats.kurtosis(values)) < 5 * math.sqrt(24 / COUNT)
    # 6.33e-5 of a normal lie beyond 4: 12.7, Poisson.
    assert 0 < (abs(values) > 4).sum() < 32


@pytest.mark.parametrize("scale", [1000, LARGEST_SCALE])
def test_the_lowest_bits_of_large_samples_are_uniform(scale: int) -> None:
    observed = np.bincount(sample(COUNT, scale, seeded(6)) % 16, minlength=16)
    assert stats.chisquare(observed).pvalue > FALSE_ALARM


def test_samples_are_independent() -> None:
    values = sample(COUNT, 40_000, seeded(7)).astype(np.float64)
    for lag in (1, 2, 3, COUNT // 2):
        for series in (values, values**2):
            assert abs(np.corrcoef(series[lag:], series[:-lag])[0, 1]) < 5 / math.sqrt(COUNT - lag)


def test_few_samples_have_the_same_distribution() -> None:
    # One to three at a time: what the first trials give must not depend on how many are wanted.
    source = seeded(8)
    for count in (1, 3):
        values = np.stack([sample(count, 2, source) for _ in range(2000)])
        for position in range(count):
            assert chi_square(values[:, position], 2) > FALSE_ALARM


@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_there_are_as_many_as_asked_for(count: int) -> None:
    values = sample(count, 3)
    assert (values.shape, values.dtype) == ((count,), np.int64)


# ------------------------------------------------------------ what is refused, and the source


@pytest.mark.parametrize("scale", [0, -1, LARGEST_SCALE + 1, 2.0, math.nan])
def test_other_scales_are_refused(scale: int) -> None:
    with pytest.raises(ValueError, match="scale must be an integer from 1 to 16777216"):
        sample(3, scale)


@pytest.mark.parametrize("source", [failing, short])
def test_a_source_that_fails_gives_no_noise(source: ByteSource) -> None:
    with pytest.raises(OSError, match="random"):
        sample(3, 40, source)


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
            sample(3, 40, Failing(calls))


def broken_sources() -> list[Callable[[int], bytes]]:
    return [lambda count, byte=byte: bytes([byte]) * count for byte in (0x00, 0x01, 0x7F, 0x80, 0xFF)]  # type: ignore[misc]


@pytest.mark.parametrize("source", broken_sources())
@pytest.mark.parametrize("scale", [1, 3, LARGEST_SCALE])
def test_a_source_that_repeats_a_byte_ends(source: ByteSource, scale: int) -> None:
    # Some bytes give samples, none random: only that nothing hangs, overflows or lies outside is tested.
    try:
        values = sample(3, scale, source)
    except OSError as error:
        assert "broken" in str(error)
    else:
        assert abs(values).max() < 128 * scale


def test_a_source_of_zeros_is_called_broken() -> None:
    with pytest.raises(OSError, match="broken"):
        sample(3, 40, lambda count: bytes(count))


def test_the_bytes_come_from_the_operating_system_a_few_times() -> None:
    source = Counted()
    first, second = sample(42_000, 40_000, source), sample(42_000, 40_000, source)
    assert not (first == second).all()
    assert len(source.asked) < 400
    assert sum(source.asked) < 2 * 42_000 * 90
    assert inspect.signature(sample).parameters["source"].default is os.urandom
    assert not hasattr(discrete_gaussian, "random")
