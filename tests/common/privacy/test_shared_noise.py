"""Shared noise: steps and scales by hand, the sensitivity of rounding, and at least the declared noise in every sum."""

import inspect
import itertools
import math
import os
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from common.privacy.accounting import Mechanism
from common.privacy.discrete_gaussian import LARGEST_SCALE
from common.privacy.plan import PhasePlan
from common.privacy.shared_noise import SharedNoise, exact_step, noisy_integers, shared_noise
from tests.common.privacy.sources import failing, seeded, short


def phase(noise_multiplier: float = 1.0, clip_norm: float = 1.0) -> PhasePlan:
    return PhasePlan(Mechanism(0.5, noise_multiplier, 10), clip_norm)


# ------------------------------------------------------------ steps and scale


def test_by_hand() -> None:
    # 64 coordinates, C = 1, sigma = 4, 1000 patients, 6 sites of which 4 are sure. f = 20: 2^20 (1000 + 12 * 2 sqrt 6)
    # is 1.1e9, below 2^31. A step more or less of rounding in 64 coordinates moves by 8 steps. A site's share:
    # sqrt((4 * (2^20 + 8))^2 + 10) / 4) = 2^21 + 16 and a little, rounded up.
    noise = shared_noise(phase(4.0), length=64, patients=1000, num_sites=6, num_noisy=4)
    assert noise == SharedNoise(fraction_bits=20, scale=2**21 + 17, sensitivity=1 + 8 * 2.0**-20)


def test_more_patients_make_coarser_steps() -> None:
    bits = [shared_noise(phase(), 100, patients, 4, 3).fraction_bits for patients in (1000, 2000, 2040, 4000, 5000)]
    assert bits == [20, 20, 19, 19, 18]  # 2^20 (2040 + 12 sqrt(4 / 3)) is above 2^31, 2^19 (4000 + 13.9) is not


def test_a_study_without_privacy_has_steps_and_no_noise() -> None:
    assert shared_noise(None, 64, 1000, 6, 4) == SharedNoise(20, 0, 1 + 8 * 2.0**-20)


@pytest.mark.parametrize(("clip_norm", "bits"), [(2.0**-10, 30), (1e-3, 29), (1.0, 20), (1.5, 19), (2.0**20, 0)])
def test_steps_are_a_share_of_the_clip_norm(clip_norm: float, bits: int) -> None:
    # With steps of 2^-20 whatever the bound, 42 000 roundings would add a fifth to a clip norm of 0.001.
    noise = shared_noise(phase(clip_norm=clip_norm), 42_000, 500, 4, 3)
    assert noise.fraction_bits == bits
    assert noise.sensitivity < 1.001 * clip_norm


@settings(max_examples=200, deadline=None)
@given(
    noise_multiplier=st.floats(0.05, 1e5),
    clip_norm=st.floats(1e-6, 1e6),
    length=st.integers(1, 10**8),
    patients=st.integers(1, 10**6),
    num_sites=st.integers(1, 500),
    data=st.data(),
)
def test_the_steps_are_the_finest_that_hold_and_the_noise_is_never_less(
    noise_multiplier: float, clip_norm: float, length: int, patients: int, num_sites: int, data: st.DataObject
) -> None:
    num_noisy = data.draw(st.integers(1, num_sites))
    plan = phase(noise_multiplier, clip_norm)
    try:
        noise = shared_noise(plan, length, patients, num_sites, num_noisy)
    except ValueError as error:
        assert "scale" in str(error) or "fit" in str(error)
        assume(False)
    # In fractions, with square roots rounded against the claim.
    step = Fraction(2) ** -noise.fraction_bits
    root = Fraction(math.isqrt(length * 10**30), 10**15)  # from below, to 1e-15
    steps_moved = Fraction(clip_norm) / step + root
    assert num_noisy * noise.scale**2 >= (Fraction(noise_multiplier) * steps_moved) ** 2 + 9
    assert noise.sensitivity == pytest.approx(float(steps_moved * step), rel=1e-12)
    assert 10 <= noise.scale <= LARGEST_SCALE
    tails = Fraction(math.isqrt(num_sites * 10**20) + 1, 10**10)
    whole = Fraction(clip_norm) / step * patients + Fraction(num_sites, 2) + 12 * noise.scale * tails
    assert whole < 2**31 * (1 + Fraction(1, 10**9))
    # Steps half as long would not do, for one of the three reasons.
    halved = noise_multiplier * (2 * clip_norm / float(step) + math.sqrt(length)) / math.sqrt(num_noisy)
    assert (
        2 * patients * clip_norm / float(step) + 12 * halved * math.sqrt(num_sites) > 2**31 * 0.999
        or halved > LARGEST_SCALE * 0.999
        or 2 / float(step) * clip_norm > 2**20
    )


@pytest.mark.parametrize(("patients", "noise_multiplier"), [(10**6, 0.005), (10**8, 0.3)])
def test_a_noise_of_few_steps_is_refused(patients: int, noise_multiplier: float) -> None:
    with pytest.raises(ValueError, match=r"scale of \d steps, fewer than 10: use a larger noise multiplier"):
        shared_noise(phase(noise_multiplier), 1, patients, 4, 3)


def test_a_noise_too_large_for_any_steps_is_refused() -> None:
    # Rounding alone moves 3e6 coordinates by 1852 steps: 12 deviations of that times 4321 times sqrt(500) do not fit.
    with pytest.raises(ValueError, match="do not fit 32 bits"):
        shared_noise(phase(4321.0), 3_430_510, 1, 500, 1)


@pytest.mark.parametrize("wrong", [{"length": 0}, {"patients": 0}, {"num_noisy": 0}, {"num_noisy": 5}])
def test_what_is_no_sum_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not a sum"):
        shared_noise(phase(), **{"length": 3, "patients": 10, "num_sites": 4, "num_noisy": 3, **wrong})


# ------------------------------------------------------------ sensitivity


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    length=st.integers(1, 300),
    clip_norm=st.floats(1e-3, 1e3),
    others=st.floats(0, 1e3),
    bits=st.integers(0, 4),
)
def test_one_patient_moves_the_rounded_sum_by_at_most_the_sensitivity(
    seed: int, length: int, clip_norm: float, others: float, bits: int
) -> None:
    chosen = shared_noise(phase(clip_norm=clip_norm), length, 500, 4, 3)
    noise = SharedNoise(chosen.fraction_bits - 4 * bits, 0, 0.0)  # coarser steps too, where rounding counts most
    sensitivity = clip_norm + 2.0**-noise.fraction_bits * math.sqrt(length)
    random = np.random.default_rng(seed)
    patient = random.standard_normal(length)
    patient *= clip_norm * (1 - 1e-12) / np.linalg.norm(patient)
    rest = others * clip_norm * random.standard_normal(length)
    moved = noisy_integers(rest + patient, noise) - noisy_integers(rest, noise)
    assert np.linalg.norm(moved.astype(np.float64)) * 2.0**-noise.fraction_bits <= sensitivity * (1 + 1e-9)


def test_rounding_can_move_every_coordinate_by_a_step() -> None:
    # Tight: 100 coordinates at just below half a step, and a patient of norm 0.01 steps who takes them above it.
    noise, patient = SharedNoise(0, 0, 0.0), np.full(100, 0.001)
    rest = np.full(100, 0.4999)
    moved = noisy_integers(rest + patient, noise) - noisy_integers(rest, noise)
    assert np.linalg.norm(moved.astype(np.float64)) == 10 > 0.99 * (0.01 + math.sqrt(100))


@given(seed=st.integers(0, 2**32), patients=st.integers(1, 40), clip_norm=st.floats(1e-6, 1e6))
def test_multiples_of_the_exact_step_add_up_exactly_in_any_order(seed: int, patients: int, clip_norm: float) -> None:
    random, step = np.random.default_rng(seed), exact_step(clip_norm)
    vectors = np.rint(clip_norm * random.uniform(-1, 1, (patients, 5)) ** 9 / step) * step
    exact = [sum(map(Fraction, column)) for column in vectors.T.tolist()]
    for order in (np.arange(patients), random.permutation(patients)):
        total = np.zeros(5)
        for vector in vectors[order]:
            total += vector
        assert [Fraction(value) for value in total.tolist()] == exact


@given(clip_norm=st.floats(1e-6, 1e6))
def test_a_million_of_the_largest_still_add_up_exactly(clip_norm: float) -> None:
    step = exact_step(clip_norm)
    largest = math.floor(clip_norm / step) * step  # 2^20 of them and one step more: float64 has 53 bits
    assert Fraction(largest * 2**20) + Fraction(step) == Fraction(largest * 2**20 + step)
    assert 2.0**-32 * clip_norm <= step < 2.0**-31 * clip_norm  # half a step is what rounding moves a coordinate by


# ------------------------------------------------------------ noise


def test_integers_by_hand() -> None:
    noise = SharedNoise(fraction_bits=2, scale=0, sensitivity=1.0)
    values = np.array([0, 0.25, 0.3, -0.3, 0.375, -7, 2.0**40])
    assert noisy_integers(values, noise).tolist() == [0, 1, 1, -1, 2, -28, 2**42]
    assert noisy_integers(values, SharedNoise(-1, 0, 1.0)).tolist() == [0, 0, 0, 0, 0, -4, 2**39]


def test_every_sum_that_may_be_opened_holds_the_declared_noise() -> None:
    # Five sites, sums of three and more are opened, one site subtracts its own share: for every such pattern.
    sigma, length, num_sites, minimum, colluding = 1.5, 20_000, 5, 3, 1
    noise = shared_noise(phase(sigma), length, 500, num_sites, minimum - colluding)
    source = seeded(1)
    shares = [noisy_integers(np.zeros(length), noise, source) for _ in range(num_sites)]
    declared = sigma * noise.sensitivity * 2**noise.fraction_bits
    patterns = [
        [site for site in survivors if site not in known]
        for size in range(minimum, num_sites + 1)
        for survivors in itertools.combinations(range(num_sites), size)
        for known in itertools.combinations(survivors, colluding)
    ]
    assert len(patterns) == 10 * 3 + 5 * 4 + 5
    for unknown in patterns:
        total = np.sum([shares[site] for site in unknown], axis=0).astype(np.float64)
        exact = len(unknown) * noise.scale**2
        assert exact >= declared**2
        low, high = stats.chi2.interval(1 - 1e-6, length)
        assert low < float((total**2).sum()) / exact < high
        assert stats.kstest(total / math.sqrt(exact), "norm").pvalue > 1e-5
    # Nor is it much more than declared where as few as may be are left.
    assert (minimum - colluding) * noise.scale**2 < 1.0001 * declared**2


def test_sums_of_few_steps_have_the_distribution_of_one_discrete_gaussian() -> None:
    # Two shares of scale 10 are one of variance 200, cell by cell.
    noise = SharedNoise(0, 10, 1.0)
    source = seeded(2)
    total = sum(noisy_integers(np.zeros(200_000), noise, source) for _ in range(2))
    cells = np.arange(-40, 41)
    mass = np.exp(-(np.arange(-300, 301) ** 2) / 400)
    inside = mass[300 - 40 : 300 + 41] / mass.sum()
    tail = (1 - inside.sum()) / 2
    observed = np.bincount(np.clip(total, -41, 41) + 41, minlength=83)
    assert len(cells) + 2 == len(observed)
    expected = np.concatenate([[tail], inside, [tail]]) * 200_000
    assert stats.chisquare(observed, expected).pvalue > 1e-5


@pytest.mark.parametrize("source", [short, failing])
def test_a_source_that_fails_gives_nothing(source: Any) -> None:
    with pytest.raises(OSError, match="random"):
        noisy_integers(np.zeros(3), SharedNoise(20, 40, 1.0), source)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2.0**62])
def test_a_sum_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        noisy_integers(np.array([0.0, value]), SharedNoise(0, 40, 1.0))


def test_noise_is_fresh_and_from_the_operating_system() -> None:
    noise = SharedNoise(20, 40_000, 1.0)
    assert not (noisy_integers(np.zeros(100), noise) == noisy_integers(np.zeros(100), noise)).all()
    assert inspect.signature(noisy_integers).parameters["source"].default is os.urandom


# ------------------------------------------------------------ the proof, in numbers


def discrete(scale2: float, farthest: int) -> NDArray[np.float64]:
    """Probabilities of -farthest to farthest under the discrete Gaussian of variance ``scale2``."""
    mass = np.exp(-(np.arange(-farthest, farthest + 1) ** 2) / (2 * scale2))
    return mass / mass.sum()


def discrete_delta(epsilon: float, scale2: float, moved: tuple[int, ...]) -> float:
    """Delta of the discrete Gaussian for integers that move by this vector: exact, summed over the lattice."""
    farthest = math.ceil(9 * math.sqrt(scale2)) + max(moved)
    ours, theirs = np.ones(1), np.ones(1)
    for by in moved:
        line = discrete(scale2, farthest)
        ours = np.multiply.outer(ours, line[by:] if by else line).ravel()
        theirs = np.multiply.outer(theirs, line[: len(line) - by] if by else line).ravel()
    return float(np.maximum(ours - math.exp(epsilon) * theirs, 0).sum())


def continuous_delta(epsilon: float, stddev: float, moved: float) -> float:
    """Delta of the Gaussian (Balle and Wang 2018, theorem 8)."""
    half, slope = moved / (2 * stddev), epsilon * stddev / moved
    return float(stats.norm.cdf(half - slope) - math.exp(epsilon) * stats.norm.cdf(-half - slope))


MOVED = [(1,), (7,), (15,), (40,), (3, 4)]


@pytest.mark.parametrize("moved", MOVED)
@pytest.mark.parametrize("scale", [10, 23])
def test_the_discrete_gaussian_costs_no_more_than_the_declared_one(scale: int, moved: tuple[int, ...]) -> None:
    # Against the continuous Gaussian whose variance is less by the rounding variance 9, at every epsilon, in both
    # directions (the moved vector's sign does not matter, by symmetry).
    stddev = math.sqrt(scale**2 - 9)
    norm = math.hypot(*moved)
    for epsilon in np.linspace(0, 6, 121) * norm / scale:
        assert discrete_delta(epsilon, scale**2, moved) <= continuous_delta(epsilon, stddev, norm) + 1e-14


def test_without_the_rounding_variance_it_would_cost_more_at_some_epsilon() -> None:
    excess = [
        discrete_delta(epsilon, 100.0, (7,)) / continuous_delta(epsilon, 10.0, 7.0) - 1
        for epsilon in np.linspace(0, 3, 241)
    ]
    assert max(excess) > 1e-3


def test_a_discrete_gaussian_is_a_continuous_one_rounded_at_random() -> None:
    # With a rounding variance of 1 instead of 9, so that the factor (eta = 5.4e-9) can be seen at all.
    y = np.linspace(-60, 60, 24_001)
    density = np.exp(-((y - 3) ** 2) / (2 * 24)) / math.sqrt(2 * math.pi * 24)
    normalisation = np.exp(-((np.arange(-70, 71)[:, None] - y) ** 2) / 2).sum(axis=0)
    eta = 2 * math.exp(-2 * math.pi**2)
    assert abs(normalisation / math.sqrt(2 * math.pi) - 1).max() == pytest.approx(eta, rel=1e-3)
    expected = discrete(25.0, 60)
    for x in range(-15, 22):
        rounded = np.trapezoid(density * np.exp(-((x - y) ** 2) / 2) / normalisation, y)
        assert rounded == pytest.approx(expected[x - 3 + 60], rel=2 * eta)
