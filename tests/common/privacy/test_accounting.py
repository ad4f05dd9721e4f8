"""Epsilon against slower code by others (dp-accounting, Opacus) and closed forms, and the laws of composition."""

import json
import math
import tracemalloc

import mpmath
import numpy as np
import pytest
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism, from_randomized_response
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant
from scipy.optimize import brentq
from scipy.stats import norm

from common.privacy import accounting, privacy_loss
from common.privacy.accounting import (
    Budget,
    Entry,
    History,
    Mechanism,
    PureRelease,
    append,
    calibrate,
    calibrate_together,
    epsilon,
    fits,
    num_steps,
    of_audits,
    of_training,
    rdp_epsilon,
)
from common.quiet import quiet
from tests.common.privacy.epsilon_reference import (
    DELTAS,
    GRID,
    NOISES,
    STEPS,
    VECTORS,
    Entries,
    bracket,
    gaussian_epsilon,
    pld_epsilons,
)
from tests.strategies import histories, mechanisms, pure_releases

# Most that our figure may lie above the truth: a share of it, and an epsilon that nobody can tell from 0.
RELATIVE, ABSOLUTE = 0.01, 1e-6


def history_of(entries: Entries) -> History:
    return tuple(Mechanism(*entry) for entry in entries)


def test_epsilon_is_within_one_percent_above_dp_accounting_on_the_whole_grid() -> None:
    vectors = json.loads(VECTORS.read_text())
    assert tuple(vectors["deltas"]) == DELTAS
    cells = {tuple(map(tuple, cell["mechanisms"])): cell for cell in vectors["cells"]}
    assert cells.keys() == set(GRID)
    wrong = [
        (entries, delta, lower, found, upper)
        for entries, cell in cells.items()
        for delta, lower, upper in zip(DELTAS, cell["lower"], cell["upper"], strict=True)
        if not lower <= (found := epsilon(history_of(entries), delta)) <= (1 + RELATIVE) * upper + ABSOLUTE
    ]
    assert not wrong


@pytest.mark.parametrize("entries", [((0.25, 4.0, 20),), ((0.001, 0.8, 300),), ((0.3, 1.5, 6), (0.02, 0.9, 10))])
def test_epsilon_lies_in_a_bracket_made_here_and_now(entries: Entries) -> None:
    for delta, lower, upper in zip(DELTAS, *bracket(entries), strict=True):
        assert lower <= epsilon(history_of(entries), delta) <= (1 + RELATIVE) * upper


@pytest.mark.parametrize(
    ("entries", "mesh"),
    [
        (((0.2, 0.5, 3),), 1e-3),
        (((0.5, 1.0, 10),), 5e-4),
        (((0.25, 3.0, 30),), 1e-4),
        (((0.001, 0.5, 1),), 5e-4),
        (((0.3, 1.5, 6), (0.02, 0.9, 10)), 5e-4),
    ],
)
def test_epsilon_is_never_below_what_a_mechanism_costs_for_certain(entries: Entries, mesh: float) -> None:
    # Losses rounded down: what is found is at least that, and at most 1 % above losses rounded up.
    lower, upper = (pld_epsilons(entries, mesh, pessimistic=pessimistic) for pessimistic in (False, True))
    for delta, low, high in zip(DELTAS, lower, upper, strict=True):
        assert 0.98 * high < low <= epsilon(history_of(entries), delta) <= (1 + RELATIVE) * high


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("noise_multiplier", [*NOISES, 0.06, 1000.0])
def test_without_sampling_epsilon_is_within_one_percent_above_the_closed_form(
    noise_multiplier: float, steps: int
) -> None:
    for delta in (1e-5, 1e-8):
        exact = gaussian_epsilon(math.sqrt(steps) / noise_multiplier, delta)
        found = epsilon((Mechanism(1.0, noise_multiplier, steps),), delta)
        assert exact <= found <= (1 + RELATIVE) * exact + ABSOLUTE


@pytest.mark.parametrize(("q", "noise", "mesh"), [(0.25, 2.0, 0.01), (0.001, 0.6, 0.003), (1.0, 1.0, 0.1)])
def test_one_step_discretised_costs_exactly_what_it_costs_at_the_points_of_its_grid(
    q: float, noise: float, mesh: float
) -> None:
    # Between P = (1 - q) Q + q N(1, noise^2) and Q: what P has above Q exp(epsilon), and the other way round.
    removed, added = privacy_loss._discretised(q, noise, mesh, 1e-15)
    for losses in (removed, added):
        grid = (losses.first + np.arange(len(losses.masses))) * mesh
        assert losses.masses.sum() + losses.lost == pytest.approx(1, abs=1e-12)
        assert losses.masses @ np.exp(-grid) == pytest.approx(1, abs=1e-9)  # the other distribution's mass
    for epsilon_here in (mesh, 7 * mesh, 20 * mesh):
        place = noise**2 * math.log((math.exp(epsilon_here) - 1 + q) / q) + 0.5
        present = (1 - q) * norm.sf(place / noise) + q * norm.sf((place - 1) / noise)
        exact = present - math.exp(epsilon_here) * norm.sf(place / noise)
        assert _divergence(removed, mesh, epsilon_here) == pytest.approx(exact, rel=1e-6)
        if math.exp(-epsilon_here) > 1 - q:  # else no x is so much likelier without the patient
            place = noise**2 * math.log((math.exp(-epsilon_here) - 1 + q) / q) + 0.5
            present = (1 - q) * norm.cdf(place / noise) + q * norm.cdf((place - 1) / noise)
            exact = norm.cdf(place / noise) - math.exp(epsilon_here) * present
            assert _divergence(added, mesh, epsilon_here) == pytest.approx(exact, rel=1e-6, abs=1e-15)


def _divergence(losses: privacy_loss.Losses, mesh: float, epsilon_here: float) -> float:
    grid = (losses.first + np.arange(len(losses.masses))) * mesh
    return float(losses.masses @ np.maximum(0, -np.expm1(epsilon_here - grid))) + losses.lost


@pytest.mark.parametrize(
    ("delta", "entries", "mesh"),
    [
        (4.5e-4, ((1e-5, 0.06, 2), (0.01, 1.0, 2)), 1e-3),
        (2.9e-5, ((1e-5, 0.1, 2), (1.0, 100.0, 2), (1e-4, 1.0, 1)), 1e-3),
        (9.2e-5, ((0.5, 0.06, 10), (1e-5, 0.1, 100), (0.1, 1.0, 10_000)), 4e-3),
    ],
)
def test_a_rare_large_loss_among_small_ones_does_not_coarsen_the_figure(
    delta: float, entries: Entries, mesh: float
) -> None:
    # A first mesh made for the common losses would be 4 to 10 % off here.
    found = privacy_loss.epsilon(entries, delta)
    finer = privacy_loss._epsilon_at(mesh, entries, delta)
    assert 0.99 * finer <= found <= (1 + RELATIVE) * finer


def test_unlike_gaussian_mechanisms_compose_into_one() -> None:
    # Without sampling, mechanisms compose exactly: the squares of steps / noise^2 add up.
    entries = ((1.0, 3.0, 2), (1.0, 10.0, 50), (1.0, 40.0, 7), (1.0, 1.5, 1))
    exact = gaussian_epsilon(math.sqrt(sum(steps / noise**2 for _, noise, steps in entries)), 1e-5)
    assert exact <= epsilon(history_of(entries), 1e-5) <= (1 + RELATIVE) * exact


@pytest.mark.parametrize(("q", "noise_multiplier"), [(1e-4, 5.0), (1e-4, 30.0), (1e-3, 10.0)])
def test_many_steps_of_little_each_cost_what_the_central_limit_says(q: float, noise_multiplier: float) -> None:
    # Bu et al. 2020, theorem 5 (both ways of neighbouring): Gaussian with mu = q sqrt(steps (exp(1 / noise^2) - 1)).
    mu = q * math.sqrt(1e6 * math.expm1(1 / noise_multiplier**2))
    for delta in (1e-5, 1e-8):
        exact = gaussian_epsilon(mu, delta)
        assert 0.999 * exact <= epsilon((Mechanism(q, noise_multiplier, 1_000_000),), delta) <= 1.01 * exact


@pytest.mark.parametrize(
    "entries", [((0.25, 4.0, 20),), ((0.01, 0.6, 300),), ((0.1, 1.5, 60), (0.02, 0.9, 100), (1.0, 40.0, 5))]
)
def test_epsilon_lies_between_the_bounds_of_the_prv_accountant_of_opacus(entries: Entries) -> None:
    accountant, delta, error = PRVAccountant(), 1e-5, 0.005
    accountant.history = [(noise, q, steps) for q, noise, steps in entries]
    with quiet():
        upper = float(accountant.get_epsilon(delta, eps_error=error))
    assert upper - 2 * error <= epsilon(history_of(entries), delta) <= upper


@settings(max_examples=6, deadline=None)
@given(histories, st.sampled_from([1e-3, 1e-5, 1e-8]))
def test_epsilon_is_finite_and_never_above_rdp(history: History, delta: float) -> None:
    # Of pure releases RDP may be as tight as it gets: there ours may lie above it by what it lies above the truth.
    ours, rdp = epsilon(history, delta), rdp_epsilon(history, delta)
    assert 0 <= ours <= rdp * (1 + RELATIVE * bool(of_audits(history))) < math.inf


@pytest.mark.parametrize(
    "entries",
    [((1e-4, 0.5, 1_000_000),), ((1e-4, 30.0, 1_000_000), (1.0, 1.0, 3)), ((1e-8, 0.5, 1000),), ((1.0, 2.0, 10**9),)],
)
def test_epsilon_takes_little_memory_whatever_the_history(entries: Entries) -> None:
    # A site computes it beside its training.
    accounting._prv_epsilon.cache_clear()
    tracemalloc.start()
    epsilon(history_of(entries), 1e-6)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 * 2**20


def test_an_empty_history_costs_nothing() -> None:
    assert epsilon((), 1e-5) == rdp_epsilon((), 1e-5) == 0


def test_a_cost_of_nothing_is_zero() -> None:
    # So much noise needs no epsilon at all at this delta, though it takes a large one of RDP at a smaller one.
    assert epsilon((Mechanism(0.01, 1e5, 100),), 0.009) == 0
    assert epsilon((Mechanism(1e-4, 30.0, 1),), 1e-5) == 0
    assert epsilon((Mechanism(1e-6, 1e15, 1), Mechanism(1.0, 1e300, 1)), 1e-5) < 1e-6


def test_a_history_beyond_doubles_has_the_figure_of_rdp() -> None:
    # exp() of a single loss overflows; or so many steps that their rounding alone is more than delta.
    for mechanism in (Mechanism(0.25, 0.03, 10), Mechanism(1.0, 1e6, 10**12)):
        kind = (mechanism.sampling_probability, mechanism.noise_multiplier, mechanism.steps)
        assert privacy_loss.epsilon([kind], 1e-5) == math.inf
        assert 1 < epsilon((mechanism,), 1e-5) == rdp_epsilon((mechanism,), 1e-5) < math.inf


def test_no_figure_is_negative() -> None:
    # Renyi's conversion gives Opacus a figure below 0 here.
    assert rdp_epsilon((Mechanism(2.5e-6, 14.0, 7000),), 0.00135) == 0


@settings(max_examples=8, deadline=None)
@given(st.sampled_from([0.25, 1.0]), st.floats(1.5, 5), st.integers(1, 50), st.integers(1, 50), st.floats(1.1, 3))
def test_epsilon_grows_with_steps_and_falls_with_noise(
    q: float, noise: float, steps: int, more: int, factor: float
) -> None:
    for figure in (epsilon, rdp_epsilon):
        here = figure((Mechanism(q, noise, steps),), 1e-5)
        # An upper bound's own error may hide a difference, never turn it by more.
        slack = 0.005 * here + ABSOLUTE
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


def test_an_order_that_no_sorting_hides_does_not_matter_either() -> None:
    kinds = [(0.25, 3.0, 10), (0.5, 8.0, 5), (0.001, 0.7, 300)]
    figures = [privacy_loss.epsilon(order, 1e-5) for order in (kinds, kinds[::-1], [kinds[1], kinds[0], kinds[2]])]
    assert figures == pytest.approx([figures[0]] * 3, rel=1e-9)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.01, 0.25]), st.sampled_from([1.5, 4.0]), st.integers(1, 9)), max_size=12))
def test_rounds_of_several_studies_cost_what_their_sums_cost(rounds: list[tuple[float, float, int]]) -> None:
    history: History = ()
    sums: dict[tuple[float, float], int] = {}
    for q, noise, steps in rounds:
        history = append(history, Mechanism(q, noise, steps))
        sums[q, noise] = sums.get((q, noise), 0) + steps
    whole = tuple(Mechanism(q, noise, steps) for (q, noise), steps in sums.items())
    assert epsilon(history, 1e-5) == epsilon(whole, 1e-5)
    assert num_steps(history) == num_steps(whole)


def test_a_split_that_is_not_merged_costs_the_same() -> None:
    # 6 and 4 steps as two parts of one sum: the same distribution, composed in another way.
    whole, parts = ([(0.25, 3.0, 10)], [(0.25, 3.0, 6), (0.25, 3.0, 4)])
    assert privacy_loss.epsilon(parts, 1e-5) == pytest.approx(privacy_loss.epsilon(whole, 1e-5), rel=1e-9)


def test_studies_together_cost_less_than_the_sum_of_their_epsilons() -> None:
    studies = [Mechanism(0.25, 4.0, 50), Mechanism(0.1, 2.0, 100), Mechanism(0.01, 1.0, 500)]
    alone = [epsilon((study,), 1e-5) for study in studies]
    assert max(alone) < epsilon(tuple(studies), 1e-5) < 0.8 * sum(alone)


@pytest.mark.parametrize(
    "entries", [((0.25, 4.0, 20),), ((0.001, 0.8, 1000),), ((0.25, 3.0, 50), (0.25, 6.0, 80)), ((1.0, 0.06, 1),)]
)
def test_a_history_fits_a_budget_of_its_epsilon_and_not_one_a_hair_below(entries: Entries) -> None:
    history, delta = history_of(entries), 1e-5
    here = epsilon(history, delta)
    assert fits(history, Budget(here, delta))
    assert fits(history, Budget(here * (1 + 1e-12), delta))
    assert not fits(history, Budget(here * (1 - 1e-12), delta))
    assert not fits(append(history, Mechanism(0.25, 1.0, 5)), Budget(here, delta))


def test_a_budget_that_rdp_would_refuse_is_fit_all_the_same() -> None:
    history = (Mechanism(0.001, 0.8, 1000),)  # RDP lies 4 times above
    assert rdp_epsilon(history, 1e-5) > 1
    assert fits(history, Budget(0.31, 1e-5))


def test_nothing_spent_fits_every_budget() -> None:
    assert fits((), Budget(1e-9, 1e-9))


@pytest.mark.parametrize(
    "wrong", [(0.0, 1e-5), (-1.0, 1e-5), (math.inf, 1e-5), (math.nan, 1e-5), (1.0, 0.0), (1.0, 1.0)]
)
def test_what_is_no_budget_is_refused(wrong: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="not a budget"):
        Budget(*wrong)


def test_append_by_hand() -> None:
    a, b = Mechanism(0.25, 3.0, 10), Mechanism(0.25, 4.0, 1)
    assert append((), a) == (a,)
    assert append((a,), Mechanism(0.25, 3.0, 5)) == (Mechanism(0.25, 3.0, 15),)
    assert append((a,), b) == (a, b)
    assert append((a, b), a) == (a, b, a)  # only neighbours merge: the history keeps its order
    half = PureRelease(0.5)
    assert append((a, half), half) == (a, PureRelease(0.5, 2))
    assert append((half,), PureRelease(0.25)) == (half, PureRelease(0.25))
    assert append((half,), a) == (half, a) and append((a,), half) == (a, half)


@given(histories, mechanisms | pure_releases)
def test_append_loses_no_step(history: History, mechanism: Entry) -> None:
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
        (8.0, 1e-6, 0.001, 1_000_000),
    ],
)
def test_calibration_hits_its_target_from_below(epsilon_target: float, delta: float, q: float, steps: int) -> None:
    noise_multiplier = calibrate(epsilon_target=epsilon_target, delta=delta, sampling_probability=q, steps=steps)
    reached = epsilon((Mechanism(q, noise_multiplier, steps),), delta)
    assert 0.99 * epsilon_target <= reached <= epsilon_target
    # The smallest such noise: 1 % less would not do.
    assert epsilon((Mechanism(q, noise_multiplier / 1.01, steps),), delta) > epsilon_target


@pytest.mark.parametrize(("epsilon_target", "steps"), [(1e-6, 1_000_000), (0.01, 100_000_000)])
def test_an_impossible_target_is_refused(epsilon_target: float, steps: int) -> None:
    with pytest.raises(ValueError, match="no noise_multiplier"):
        calibrate(epsilon_target=epsilon_target, delta=1e-5, sampling_probability=0.25, steps=steps)


def test_several_stretches_together_by_hand() -> None:
    # One step each of the same share: two steps of one mechanism, so the noise of two steps.
    shapes = ((1.0, 1, 0.5), (1.0, 1, 0.5))
    together = calibrate_together(epsilon_target=2.0, delta=1e-5, shapes=shapes)
    both = calibrate(epsilon_target=2.0, delta=1e-5, sampling_probability=1.0, steps=2)
    assert together == pytest.approx((both, both), rel=1e-9)
    # One stretch with all of it is calibrated as ever.
    whole = calibrate_together(epsilon_target=2.0, delta=1e-5, shapes=((1.0, 2, 1.0),))
    assert whole == (both,)


def test_shares_that_are_far_too_much_together_are_refused() -> None:
    """Two hundred times all of epsilon: ten times the noise of one is not enough for fourteen."""
    with pytest.raises(ValueError, match="with these shares"):
        calibrate_together(epsilon_target=2.0, delta=1e-5, shapes=((1.0, 1, 1.0),) * 200)
    assert calibrate_together(epsilon_target=2.0, delta=1e-5, shapes=((1.0, 1, 1.0),) * 50)


def test_calibration_works_where_much_noise_costs_nothing() -> None:
    # The largest noise multiplier has epsilon 0 at this delta.
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


# ------------------------------------------------------------ pure releases


@pytest.mark.parametrize("wrong", [(0.0, 1), (-0.5, 1), (math.inf, 1), (math.nan, 1), (0.5, 0), (0.5, -1)])
def test_what_is_no_pure_release_is_refused(wrong: tuple[float, int]) -> None:
    with pytest.raises(ValueError, match="not a pure release"):
        PureRelease(*wrong)


def test_the_parts_of_a_history() -> None:
    history = (Mechanism(0.25, 3.0, 10), PureRelease(0.5, 2), Mechanism(1.0, 4.0, 1))
    assert of_training(history) == (history[0], history[2]) and of_audits(history) == (history[1],)
    assert num_steps(history) == 13


def pure_delta(epsilon_of_each: float, steps: int, at: float) -> float:
    """Kairouz, Oh and Viswanath 2015, theorem 3.3: what the composition of so many is worst at, exactly."""
    whole = (1 + math.exp(epsilon_of_each)) ** steps
    return sum(
        math.comb(steps, lies)
        * max(0.0, math.exp((steps - lies) * epsilon_of_each) - math.exp(at + lies * epsilon_of_each))
        / whole
        for lies in range(steps + 1)
    )


def pure_epsilon(epsilon_of_each: float, steps: int, delta: float) -> float:
    return float(
        brentq(lambda at: pure_delta(epsilon_of_each, steps, at) - delta, 0, steps * epsilon_of_each, xtol=1e-12)
    )


def test_by_hand_one_release_costs_a_little_less_than_its_epsilon() -> None:
    # Randomised response with p = exp(0.5) / (1 + exp(0.5)) = 0.62246: p - exp(x) (1 - p) = delta, so that
    # x = log((0.62246 - 0.001) / 0.37754) = 0.49839.
    assert 0.49839 == pytest.approx(pure_epsilon(0.5, 1, 0.001), abs=1e-5)
    assert 0.49839 <= epsilon((PureRelease(0.5),), 0.001) <= 0.5


@pytest.mark.parametrize("delta", [1e-2, 1e-5, 1e-9])
@pytest.mark.parametrize(
    ("each", "steps"), [(0.5, 1), (0.5, 2), (0.5, 3), (2.0, 1), (2.0, 3), (0.1, 30), (0.01, 400), (0.3, 7), (5.0, 2)]
)
def test_equal_releases_cost_what_the_closed_form_says(each: float, steps: int, delta: float) -> None:
    exact, found = pure_epsilon(each, steps, delta), epsilon((PureRelease(each, steps),), delta)
    assert exact <= found * (1 + 1e-12) and found <= min((1 + RELATIVE) * exact + ABSOLUTE, steps * each)


def test_a_coarse_grid_does_not_pass_for_a_fine_one_where_the_largest_loss_decides() -> None:
    # Of few releases at a large delta: cells as wide as for many would be 1.5 % off, and twice in a row the same.
    exact = pure_epsilon(0.050083389, 6, 0.046083)
    assert exact <= epsilon((PureRelease(0.050083389, 6),), 0.046083) <= (1 + RELATIVE) * exact


@pytest.mark.parametrize("each", [0.1, 1 / 3, 0.5, 0.7, 2.0, 9.99])
def test_one_release_fits_a_budget_of_its_epsilon_to_the_last_digit(each: float) -> None:
    assert fits((PureRelease(each),), Budget(each, 1e-12))
    assert fits((PureRelease(each, 3),), Budget(3 * each, 1e-12))
    assert not fits((PureRelease(each, 3),), Budget(0.99 * 3 * each, 1e-12))


MIXED: list[tuple[Entries, tuple[tuple[float, int], ...]]] = [
    (((0.25, 4.0, 20),), ((0.5, 1),)),
    (((1.0, 2.0, 1), (0.1, 1.0, 50)), ((0.5, 3),)),
    (((0.001, 0.8, 300),), ((2.0, 2), (0.1, 5))),
]


@pytest.mark.parametrize("delta", [1e-3, 1e-6])
@pytest.mark.parametrize(("entries", "pure"), MIXED)
def test_training_and_audits_together_cost_what_dp_accounting_says(
    entries: Entries, pure: tuple[tuple[float, int], ...], delta: float
) -> None:
    lower, upper = (pld_epsilon(entries, pure, delta, pessimistic=pessimistic) for pessimistic in (False, True))
    found = epsilon((*history_of(entries), *(PureRelease(*each) for each in pure)), delta)
    assert 0.98 * upper < lower <= found <= (1 + RELATIVE) * upper


def pld_epsilon(entries: Entries, pure: tuple[tuple[float, int], ...], delta: float, *, pessimistic: bool) -> float:
    """By dp-accounting's privacy loss distributions, on a grid of 0.0005."""
    whole = None
    for q, noise, steps in entries:
        part = from_gaussian_mechanism(
            noise,
            sampling_prob=q,
            value_discretization_interval=5e-4,
            pessimistic_estimate=pessimistic,
            use_connect_dots=pessimistic,
        ).self_compose(steps)
        whole = part if whole is None else whole.compose(part)
    assert whole is not None
    for each, steps in pure:
        part = (
            from_randomized_response(  # of a bit, replaced by a random one with the probability 2 / (1 + exp(epsilon))
                2 / (1 + math.exp(each)), 2, pessimistic_estimate=pessimistic, value_discretization_interval=5e-4
            )
        )
        whole = whole.compose(part.self_compose(steps))
    return float(whole.get_epsilon_for_delta(delta))


@settings(max_examples=15, deadline=None)
@given(
    st.floats(0.01, 1),
    st.floats(0.7, 20),
    st.integers(1, 200),
    st.floats(0.05, 3),
    st.integers(1, 3),
    st.sampled_from([1e-4, 1e-6]),
)
def test_a_composition_is_never_above_the_sum_and_never_below_its_parts(
    q: float, noise: float, steps: int, each: float, releases: int, delta: float
) -> None:
    training, audits = (Mechanism(q, noise, steps),), (PureRelease(each, releases),)
    one, other, both = (epsilon(history, delta) for history in (training, audits, training + audits))
    assert max(one, other) <= (1 + RELATIVE) * both + ABSOLUTE
    assert both <= one + releases * each
    assert both == epsilon(audits + training, delta)


def test_releases_of_several_epsilons_compose_exactly() -> None:
    # By hand: losses of +-0.5 and +-1 with p = 0.62246 and 0.73106. The largest, 1.5, has the mass 0.45506, the next,
    # 0.5, has 0.27600 (1 right, 0.5 wrong): at x = 1 delta is 0.45506 (1 - exp(-0.5)) = 0.179052.
    found = epsilon((PureRelease(0.5), PureRelease(1.0)), 0.179052)
    assert 1.0 - 1e-4 <= found <= 1.01


@pytest.mark.parametrize("alpha", [1.25, 2, 8, 63])
@pytest.mark.parametrize("each", [0.01, 0.5, 2.0, 50.0])
def test_the_renyi_divergence_is_that_of_randomised_response(each: float, alpha: float) -> None:
    with mpmath.workdps(40):
        p = mpmath.exp(each) / (1 + mpmath.exp(each))
        exact = mpmath.log(p**alpha * (1 - p) ** (1 - alpha) + (1 - p) ** alpha * p ** (1 - alpha)) / (alpha - 1)
    assert accounting._pure_rdp(each)[accounting.ALPHAS.index(alpha)] == pytest.approx(float(exact), rel=1e-9)


@pytest.mark.parametrize(("each", "steps"), [(0.5, 1), (0.5, 3), (2.0, 3), (0.1, 30)])
def test_rdp_is_above_the_closed_form_and_not_far(each: float, steps: int) -> None:
    exact, found = pure_epsilon(each, steps, 1e-5), rdp_epsilon((PureRelease(each, steps),), 1e-5)
    assert exact <= found <= 1.1 * exact


def test_rdp_adds_up_over_both_kinds() -> None:
    training, audits = (Mechanism(0.25, 2.0, 50),), (PureRelease(0.5, 2),)
    one, both = rdp_epsilon(training, 1e-5), rdp_epsilon(training + audits, 1e-5)
    assert epsilon(training + audits, 1e-5) < both <= one + 1.0
    assert both > one + 0.1


def test_losses_beyond_doubles_are_added_up() -> None:
    history = (Mechanism(0.25, 2.0, 50), PureRelease(800.0))
    alone = epsilon(history[:1], 1e-5)
    assert epsilon((PureRelease(800.0),), 1e-5) == pytest.approx(800.0, rel=1e-3)
    assert 800 <= epsilon(history, 1e-5) * 1.001 and epsilon(history, 1e-5) <= 800 + alone
