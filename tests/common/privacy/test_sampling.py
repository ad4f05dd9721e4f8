"""Poisson sampling: independent coins of rate q, fresh at every call. Statistics have a fixed seed."""

import inspect
import math
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from common.privacy.sampling import draw_patients
from tests.common.privacy.sources import Counted, failing, seeded, short

PATIENTS, STEPS = 40, 2000


def drawn(q: float, seed: int = 1, steps: int = STEPS) -> np.ndarray:
    """Which patient took part in which step, (steps, patients) bool."""
    source = seeded(seed)
    taken = np.zeros((steps, PATIENTS), bool)
    for step in range(steps):
        taken[step, draw_patients(PATIENTS, q, source)] = True
    return taken


def test_the_coin_by_hand() -> None:
    # q = 1/2: threshold 2^63. A coin below it is drawn, a coin at it is not.
    coins = np.array([0, 2**63 - 1, 2**63, 2**64 - 1], np.uint64).tobytes()
    assert draw_patients(4, 0.5, lambda count: coins).tolist() == [0, 1]
    # q = 1/4: threshold 2^62.
    coins = np.array([2**62, 2**62 - 1], np.uint64).tobytes()
    assert draw_patients(2, 0.25, lambda count: coins).tolist() == [1]


@pytest.mark.parametrize("q", [0.02, 0.25, 0.9])
def test_every_patient_is_drawn_at_rate_q(q: float) -> None:
    # Each count is binomial(2000, q): within 4.5 standard deviations for all 40 patients, and 4 for the total.
    counts = drawn(q).sum(axis=0)
    deviation = math.sqrt(STEPS * q * (1 - q))
    assert abs(counts - STEPS * q).max() < 4.5 * deviation
    assert abs(counts.sum() - PATIENTS * STEPS * q) < 4 * deviation * math.sqrt(PATIENTS)


@pytest.mark.parametrize("q", [0.1, 0.5])
def test_the_number_drawn_is_binomial_not_fixed(q: float) -> None:
    # Variance of binomial(40, q); from 2000 values it has a relative standard deviation of about sqrt(2 / 2000).
    sizes = drawn(q).sum(axis=1)
    expected = PATIENTS * q * (1 - q)
    assert abs(sizes.var() / expected - 1) < 5 * math.sqrt(2 / STEPS)


@pytest.mark.parametrize("q", [0.02, 0.1, 0.5])
def test_inclusion_counts_and_batch_sizes_follow_the_binomial_distribution(q: float) -> None:
    """Chi-square of all 2000 batch sizes and, in blocks of 40 steps, of all 2000 counts of one patient."""
    taken = drawn(q)
    blocks = taken.reshape(STEPS // 40, 40, PATIENTS).sum(axis=1).ravel()
    expected = stats.binom.pmf(np.arange(41), 40, q)
    for counts in (taken.sum(axis=1), blocks):
        # Values that are expected less than 5 times go to the nearest that is not.
        likely = np.flatnonzero(expected * len(counts) >= 5)
        observed = np.bincount(np.clip(counts, likely[0], likely[-1]), minlength=41)[likely]
        shares = expected[likely].copy()
        shares[0], shares[-1] = expected[: likely[0] + 1].sum(), expected[likely[-1] :].sum()
        assert stats.chisquare(observed, shares * len(counts)).pvalue > 1e-4


def test_patients_and_steps_are_independent() -> None:
    # Correlations of independent coins are about N(0, 1 / 2000): of 780 pairs and 40 lags none beyond 5 deviations.
    taken = drawn(0.3).astype(float)
    between = np.corrcoef(taken.T) - np.eye(PATIENTS)
    assert abs(between).max() < 5 / math.sqrt(STEPS)
    lagged = [np.corrcoef(taken[1:, patient], taken[:-1, patient])[0, 1] for patient in range(PATIENTS)]
    assert abs(np.array(lagged)).max() < 5 / math.sqrt(STEPS)


def test_every_call_takes_fresh_bytes() -> None:
    source = Counted()
    first, second = draw_patients(500, 0.5, source), draw_patients(500, 0.5, source)
    assert source.asked == [4000, 4000]
    assert first.tolist() != second.tolist()  # equal with probability 2^-500


def test_the_default_source_is_the_operating_systems() -> None:
    assert inspect.signature(draw_patients).parameters["source"].default is os.urandom


def test_no_seed_reaches_the_draw() -> None:
    np.random.seed(0)  # noqa: NPY002
    first = draw_patients(500, 0.5)
    np.random.seed(0)  # noqa: NPY002
    assert first.tolist() != draw_patients(500, 0.5).tolist()


def test_probability_one_draws_everybody() -> None:
    assert draw_patients(5, 1.0, lambda count: b"\xff" * count).tolist() == [0, 1, 2, 3, 4]


def test_the_float_below_one_can_leave_somebody_out() -> None:
    assert draw_patients(2, math.nextafter(1, 0), lambda count: b"\xff" * count).tolist() == []


@pytest.mark.parametrize("q", [1e-12, 2.0**-64, 5e-324])
def test_tiny_probabilities_draw_almost_nobody(q: float) -> None:
    assert draw_patients(1000, q).tolist() == []
    # floor(q 2^64) coins are below the threshold: at 2^-64 the coin 0 is, under it none.
    assert draw_patients(1, q, lambda count: b"\0" * count).tolist() == ([0] if q >= 2.0**-64 else [])


def test_empty_draws_happen() -> None:
    # 40 patients at 0.02: (0.98)^40 = 0.446 of the steps; binomial(2000, 0.446) has deviation 22.
    empty = int((drawn(0.02).sum(axis=1) == 0).sum())
    assert abs(empty - 0.98**40 * STEPS) < 5 * 22.3


@pytest.mark.parametrize("q", [0.5, 1.0])
def test_no_patients_is_an_empty_draw(q: float) -> None:
    result = draw_patients(0, q)
    assert result.shape == (0,)
    assert np.issubdtype(result.dtype, np.integer)


@pytest.mark.parametrize("q", [0.5, 1.0])
@pytest.mark.parametrize("source", [short, failing])
def test_a_source_that_fails_stops_the_draw(q: float, source: object) -> None:
    with pytest.raises(OSError, match="random"):
        draw_patients(5, q, source)  # type: ignore[arg-type]


@pytest.mark.parametrize("q", [0.0, -0.1, 1.0000001, math.nan, math.inf])
def test_other_probabilities_are_refused(q: float) -> None:
    with pytest.raises(ValueError, match="sampling_probability"):
        draw_patients(5, q)


@given(st.integers(0, 200), st.floats(0, 1, exclude_min=True), st.integers(0, 2**32 - 1))
def test_the_draw_is_ascending_without_repeats(num_patients: int, q: float, seed: int) -> None:
    result = draw_patients(num_patients, q, seeded(seed)).tolist()
    assert result == sorted(set(result))
    assert all(0 <= patient < num_patients for patient in result)


@given(st.integers(1, 50), st.floats(0.01, 1), st.integers(0, 2**32 - 1))
def test_one_patient_more_changes_nobody_elses_coin(num_patients: int, q: float, seed: int) -> None:
    fewer = draw_patients(num_patients, q, seeded(seed)).tolist()
    coins = seeded(seed)(8 * num_patients)
    more = draw_patients(num_patients + 1, q, lambda count: (coins + bytes(8))[:count]).tolist()
    assert [patient for patient in more if patient < num_patients] == fewer
