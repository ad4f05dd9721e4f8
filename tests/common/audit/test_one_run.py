"""Lower bounds on epsilon from one run: by hand, and seldom above the truth for mechanisms of known epsilon."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from common.audit import one_run
from common.audit.counts import AuditCounts, CountNoise
from common.audit.excess import Group
from common.audit.one_run import ERROR, from_canaries, from_patients, log_moment
from tests.common.audit.audit_counts import NOISE

QUIET = CountNoise(5.0, 8.0, num_sites=1, num_noisy=1)


def canaries(*included: int, left_out: tuple[int, ...]) -> NDArray[np.int64]:
    return np.array([included, left_out], np.int64)


def test_canaries_that_are_told_apart_perfectly_by_hand() -> None:
    # All 128 are guessed right; two guesses are possible with two bins, so each has half of the error:
    # p^128 > 0.0025, p > 0.9543, epsilon > 3.04.
    found = from_canaries(canaries(0, 64, left_out=(64, 0)), delta=0.0)
    p = (ERROR / 2) ** (1 / 128)
    assert found == pytest.approx(math.log(p / (1 - p)), abs=one_run.STEP)
    assert found <= math.log(p / (1 - p))


def test_canaries_that_say_nothing_give_no_bound() -> None:
    assert from_canaries(canaries(32, 32, left_out=(32, 32)), delta=0.0) == 0
    assert from_canaries(np.zeros((2, 8), np.int64), delta=1e-5) == 0
    assert from_canaries(canaries(64, left_out=(64,)), delta=0.0) == 0
    # Memorisation is to be near: canaries that are farther off when included are no evidence of that guess.
    assert from_canaries(canaries(64, 0, left_out=(0, 64)), delta=0.0) == 0


def test_a_larger_delta_explains_more() -> None:
    told_apart = canaries(0, 64, left_out=(64, 0))
    bounds = [from_canaries(told_apart, delta) for delta in (0.0, 1e-5, 1e-3, 0.5)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] > bounds[2] > bounds[3] == 0


@pytest.mark.parametrize("epsilon", [0.0, 1.0, 2.0])
def test_randomised_response_is_not_refuted(epsilon: float) -> None:
    """Each canary is shown right with the chance that epsilon allows: no private mechanism shows more."""
    rng = np.random.default_rng(1)
    right = 1 / (1 + math.exp(-epsilon))
    above = 0
    for _ in range(400):
        included = rng.random(128) < 0.5
        shown = np.where(rng.random(128) < right, included, ~included)
        rows = [np.bincount(shown[coin].astype(int), minlength=2) for coin in (included, ~included)]
        above += from_canaries(np.stack(rows).astype(np.int64), 0.0) > epsilon
    assert above <= 7  # 2 are expected at most; more than 7 of a binomial (400, 0.005) has a chance of 0.001


def patients(
    named: int, others: int, epsilon: float, share: float, noise: CountNoise, rng: np.random.Generator
) -> AuditCounts:
    """Two bins: ``named`` patients above, each trained on with the largest chance that epsilon allows."""
    odds = (1 - share) / share * math.exp(epsilon)
    above = rng.binomial(named, odds / (1 + odds))
    below = rng.binomial(others, 1 - share)
    half = rng.binomial([others - below, named - above], 0.5)
    cells = np.array([[[below, above]], [half], [[others - below, named - above] - half]], np.int64)
    stops = [-math.expm1(-noise.epsilon(group)) for group in range(3)]
    for group, stop in enumerate(stops):
        first, second = rng.negative_binomial(noise.shape, stop, (2, 1, 2))
        cells[group] += first - second
    return AuditCounts(cells, np.zeros((2, 2), np.int64))


@pytest.mark.parametrize(("epsilon", "share"), [(0.0, 0.2), (0.5, 0.2), (1.0, 0.3)])
@pytest.mark.parametrize("noise", [NOISE, QUIET])
def test_patients_of_the_worst_private_mechanism_are_not_refuted(
    epsilon: float, share: float, noise: CountNoise
) -> None:
    rng = np.random.default_rng(2)
    bounds = [from_patients(patients(400, 100, epsilon, share, noise, rng), noise, share, 0.0, 500) for _ in range(200)]
    assert sum(bound > epsilon for bound in bounds) <= 5  # a binomial (200, 0.005) is above 5 once in 1000 times


def test_patients_of_a_memoriser_refute_a_small_epsilon() -> None:
    rng = np.random.default_rng(3)
    leaking = patients(400, 2000, 8.0, 0.2, NOISE, rng)  # almost nobody above was held out
    bound = from_patients(leaking, NOISE, 0.2, 0.0, 2400)
    assert 0.5 < bound < 8.0
    assert 0 < from_patients(leaking, NOISE, 0.2, 1e-5, 2400) <= bound
    assert from_patients(leaking, NOISE, 0.2, 0.5, 2400) == 0


def test_patients_of_a_clean_release_show_nothing_whatever_the_noise_does() -> None:
    cells = np.array([[[-40, -3]], [[-2, 0]], [[-1, -4]]], np.int64)
    assert from_patients(AuditCounts(cells, np.zeros((2, 2), np.int64)), NOISE, 0.2, 1e-5, 500) == 0


def test_noise_alone_shows_nothing() -> None:
    """Twenty classes without any patient: noise of 77 patients a tail is not taken for patients."""
    loud, rng = CountNoise(0.1, 2.0, 3, 2), np.random.default_rng(4)
    above = 0
    for _ in range(200):
        cells = np.stack([Group(loud.epsilon(group), loud.shape).draw((20, 2), rng) for group in range(3)])
        counts = AuditCounts(cells.astype(np.int64), np.zeros((2, 2), np.int64))
        above += from_patients(counts, loud, 0.2, 0.0, 500) > 0
    assert above <= 5


@pytest.mark.parametrize(("t", "epsilon"), [(0.3, 0.5), (-0.4, 0.5), (1.5, 2.0)])
def test_the_noise_s_moment_is_that_of_its_distribution(t: float, epsilon: float) -> None:
    values = np.arange(-400, 401)
    assert math.exp(log_moment(t, epsilon)) == pytest.approx(
        (np.exp(t * values) * stats.dlaplace.pmf(values, epsilon)).sum()
    )
