"""Epsilon against slower code of other authors (dp-accounting's PLD), and the laws of composition."""

import math

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from common.privacy import accounting
from common.privacy.accounting import History, Mechanism, append, calibrate, epsilon, num_steps, rdp_epsilon
from tests.strategies import histories, mechanisms

# Every kind of history that costs under two seconds: sparse and full sampling, little and much noise, mixtures.
GRID: list[tuple[float, tuple[tuple[float, float, int], ...]]] = [
    (1e-5, ((1.0, 5.0, 1),)),
    (1e-6, ((1.0, 5.0, 16),)),
    (1e-5, ((0.25, 2.0, 100),)),
    (1e-6, ((0.25, 10.0, 100),)),
    (1e-5, ((0.2, 0.5, 3),)),
    (1e-6, ((0.01, 0.6, 300),)),
    (1e-5, ((0.001, 0.8, 1000),)),  # RDP lies 4 times above here
    (1e-6, ((0.001, 0.5, 1),)),
    (1e-5, ((0.5, 30.0, 50),)),
    (1e-5, ((0.1, 1.5, 60), (0.02, 0.9, 100), (1.0, 40.0, 5))),
    (1e-6, ((0.25, 3.0, 50), (0.25, 6.0, 80))),
    (1e-5, ((0.001, 2.0, 2000), (0.1, 8.0, 100))),
    (1e-5, ((0.001, 1.0, 10), (1.0, 3.0, 1))),
]


def history_of(entries: tuple[tuple[float, float, int], ...]) -> History:
    return tuple(Mechanism(*entry) for entry in entries)


def pld_epsilon(history: History, delta: float) -> float:
    accountant = PLDAccountant(value_discretization_interval=1e-4)
    for mechanism in history:
        gaussian = GaussianDpEvent(mechanism.noise_multiplier)
        accountant.compose(PoissonSampledDpEvent(mechanism.sampling_probability, gaussian), mechanism.steps)
    return float(accountant.get_epsilon(delta))


def gaussian_epsilon(noise_multiplier: float, steps: int, delta: float) -> float:
    """Exact epsilon of the Gaussian mechanism composed (Balle & Wang 2018, theorem 8): mu = sqrt(steps) / noise."""
    mu = math.sqrt(steps) / noise_multiplier

    def excess(eps: float) -> float:
        return float(norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu)) - delta

    return float(brentq(excess, 0, 200))


@pytest.mark.parametrize(("delta", "entries"), GRID)
def test_epsilon_is_within_one_percent_above_dp_accounting(
    delta: float, entries: tuple[tuple[float, float, int], ...]
) -> None:
    history = history_of(entries)
    exact, found = pld_epsilon(history, delta), epsilon(history, delta)
    assert exact <= found <= 1.01 * exact
    assert rdp_epsilon(history, delta) >= found


@pytest.mark.parametrize(("noise_multiplier", "steps"), [(1.0, 1), (5.0, 1), (4.0, 9), (20.0, 10), (0.3, 1)])
@pytest.mark.parametrize("delta", [1e-5, 1e-6])
def test_without_sampling_epsilon_is_within_one_percent_above_the_closed_form(
    noise_multiplier: float, steps: int, delta: float
) -> None:
    exact = gaussian_epsilon(noise_multiplier, steps, delta)
    assert exact <= epsilon((Mechanism(1.0, noise_multiplier, steps),), delta) <= 1.01 * exact


def test_an_empty_history_costs_nothing() -> None:
    assert epsilon((), 1e-5) == rdp_epsilon((), 1e-5) == 0


def test_a_cost_of_nothing_stays_zero_or_an_upper_bound() -> None:
    # At delta 0.009 so much noise needs no epsilon at all; PRV has no grid for it.
    history = (Mechanism(0.01, 1e5, 100),)
    assert 0 <= epsilon(history, 0.009) <= 1e-3


def test_a_huge_cost_is_still_finite() -> None:
    # PRV's answer is infinity here; RDP's bound is the figure.
    history = (Mechanism(0.25, 0.08, 10),)
    assert 300 < epsilon(history, 1e-5) == rdp_epsilon(history, 1e-5) < 2000


@settings(max_examples=8, deadline=None)
@given(st.sampled_from([0.25, 1.0]), st.floats(1.5, 5), st.integers(1, 50), st.integers(1, 50), st.floats(1.1, 3))
def test_epsilon_grows_with_steps_and_falls_with_noise(
    q: float, noise: float, steps: int, more: int, factor: float
) -> None:
    for figure in (epsilon, rdp_epsilon):
        here = figure((Mechanism(q, noise, steps),), 1e-5)
        # An upper bound's own error (0.3 %, 5e-5) may hide a difference, never turn it by more.
        slack = 0.004 * here + 1e-4
        assert figure((Mechanism(q, noise, steps + more),), 1e-5) >= here - slack
        assert figure((Mechanism(q, noise * factor, steps),), 1e-5) <= here + slack
        assert figure((Mechanism(q, noise, steps),), 1e-6) >= here - slack


def test_steps_and_noise_matter() -> None:
    base = epsilon((Mechanism(0.25, 4.0, 20),), 1e-5)
    assert epsilon((Mechanism(0.25, 4.0, 40),), 1e-5) > 1.2 * base
    assert epsilon((Mechanism(0.25, 5.0, 20),), 1e-5) < 0.9 * base


def test_the_order_of_a_history_and_its_cuts_do_not_matter() -> None:
    a, b = Mechanism(0.25, 3.0, 10), Mechanism(0.5, 8.0, 5)
    whole = epsilon((a, b), 1e-5)
    assert epsilon((b, a), 1e-5) == whole
    assert epsilon((Mechanism(0.25, 3.0, 4), b, Mechanism(0.25, 3.0, 6)), 1e-5) == whole
    assert whole > max(epsilon((a,), 1e-5), epsilon((b,), 1e-5))


def test_append_by_hand() -> None:
    a, b = Mechanism(0.25, 3.0, 10), Mechanism(0.25, 4.0, 1)
    assert append((), a) == (a,)
    assert append((a,), Mechanism(0.25, 3.0, 5)) == (Mechanism(0.25, 3.0, 15),)
    assert append((a,), b) == (a, b)
    assert append((a, b), a) == (a, b, a)  # only neighbours merge: the history keeps its order


@given(histories, mechanisms)
def test_append_loses_no_step(history: History, mechanism: Mechanism) -> None:
    longer = append(history, mechanism)
    assert num_steps(longer) == num_steps(history) + mechanism.steps
    assert len(history) <= len(longer) <= len(history) + 1


@pytest.mark.parametrize(
    ("epsilon_target", "delta", "q", "steps"),
    [
        (1.0, 1e-5, 0.25, 100),
        (10.0, 1e-5, 1.0, 10),
        (8.0, 1e-6, 1.0, 20),
        (1.0, 1e-5, 0.001, 1),  # RDP asks for twice the noise here
        (10.0, 1e-5, 0.001, 1),
    ],
)
def test_calibration_hits_its_target_from_below(epsilon_target: float, delta: float, q: float, steps: int) -> None:
    noise_multiplier = calibrate(epsilon_target=epsilon_target, delta=delta, sampling_probability=q, steps=steps)
    reached = epsilon((Mechanism(q, noise_multiplier, steps),), delta)
    assert 0.99 * epsilon_target <= reached <= epsilon_target
    # The smallest such noise: 1 % less would not do.
    assert epsilon((Mechanism(q, noise_multiplier / 1.01, steps),), delta) > epsilon_target


@pytest.mark.parametrize(("epsilon_target", "steps"), [(1e-4, 100), (0.01, 100_000_000)])
def test_an_impossible_target_is_refused(epsilon_target: float, steps: int) -> None:
    with pytest.raises(ValueError, match="no noise_multiplier"):
        calibrate(epsilon_target=epsilon_target, delta=1e-5, sampling_probability=0.25, steps=steps)


def test_calibration_works_where_much_noise_costs_nothing() -> None:
    # The largest noise multiplier has epsilon 0 at this delta, whose logarithm does not exist.
    noise_multiplier = calibrate(epsilon_target=8.0, delta=0.009, sampling_probability=0.01, steps=100)
    assert epsilon((Mechanism(0.01, noise_multiplier, 100),), 0.009) <= 8


@pytest.mark.parametrize(
    "wrong",
    [
        (0.0, 1.0, 1),
        (-0.1, 1.0, 1),
        (1.1, 1.0, 1),
        (math.nan, 1.0, 1),
        (0.5, 0.0, 1),
        (0.5, -1.0, 1),
        (0.5, math.nan, 1),
        (0.5, math.inf, 1),
        (0.5, 1.0, 0),
        (0.5, 1.0, -3),
    ],
)
def test_what_is_no_mechanism_is_refused(wrong: tuple[float, float, int]) -> None:
    with pytest.raises(ValueError, match="not a mechanism"):
        Mechanism(*wrong)


def test_the_figures_of_many_threads_agree() -> None:
    # Sites of a simulation are threads: the filters of warnings are global to the process.
    from concurrent.futures import ThreadPoolExecutor

    accounting._prv_epsilon.cache_clear()
    accounting._rdp_epsilon.cache_clear()
    history = (Mechanism(1.0, 7.0, 3),)
    with ThreadPoolExecutor(4) as pool:
        figures = set(pool.map(lambda _: epsilon(history, 1e-5), range(8)))
    assert len(figures) == 1
