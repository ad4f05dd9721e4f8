"""The verdict from counts: what passes, what fails, what cannot be told, and that noise of any kind breaks nothing."""

import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.audit.counts import AuditCounts, CountNoise
from common.audit.excess import tails
from common.audit.verdict import (
    FAIL,
    LEVEL,
    NO_RELEASE,
    PASS,
    Verdict,
    allowed_memorised,
    decide,
    no_release,
)
from tests.common.audit.audit_counts import EDGES, NOISE, USUAL, counts_of
from tests.common.privacy.sources import failing, seeded


def verdict_on(counts: AuditCounts, patients: int = 500, share: float = 0.2, seed: int = 0, **changes: Any) -> Verdict:
    wanted: dict[str, Any] = {
        "edges": EDGES,
        "noise": NOISE,
        "certified_epsilon": 3.0,
        "delta": 1e-5,
        "training_patients": round(patients * (1 - share)),
        "held_out_patients": round(patients * share),
        "source": seeded(seed),
        "simulations": 1000,
        "with_power": False,
    }
    return decide(counts, **(wanted | changes))


def cells(training: list[int], half_a: list[int], half_b: list[int]) -> AuditCounts:
    return AuditCounts(np.array([[training], [half_a], [half_b]], np.int64), np.zeros((2, len(training)), np.int64))


def test_tails_by_hand() -> None:
    counts = cells([70, 40, 10], [10, 4, 1], [9, 5, 1])
    found = verdict_on(counts, 150, edges=(0.0, 0.5))
    first, last = found.tails
    assert (first.training, first.held_out, first.expected) == (50, 11, 44)  # four trained on for each held out
    assert (last.edge, last.training, last.held_out, last.expected) == (0.5, 10, 2, 8)
    # One cell: 1.5 (7.835 + 16 x 2 x 0.3620) of noise, and coins 4 x 5 x (2 + 1/2).
    assert last.stddev == pytest.approx(math.sqrt(1.5 * (7.835 + 16 * 2 * 0.3620) + 50), rel=1e-3)
    assert last.z == pytest.approx(2 / last.stddev)
    assert last.class_z == (last.z,)
    assert found.training_cells == (70, 40, 10)
    assert found.held_out_cells == (19, 9, 2)


def test_a_clean_release_passes_and_says_so_to_people_and_programs() -> None:
    found = verdict_on(counts_of(500, np.random.default_rng(0)), with_power=True)
    assert found.outcome == PASS
    assert found.p is not None and found.p > LEVEL
    assert found.upper_bound is not None and found.upper_bound <= 30 == found.allowed_memorised
    assert found.minimum_detectable is not None and 10 < found.minimum_detectable < 100
    assert str(found.minimum_detectable) in found.reasons[-1]
    again = json.loads(json.dumps(asdict(found), allow_nan=False))
    assert again["outcome"] == "PASS"
    assert again["certified_epsilon"] == 3.0


@pytest.mark.parametrize("classes", [(1.0,), (0.6, 0.4), (0.9, 0.05, 0.03, 0.02)])
def test_a_hundred_and_fifty_copies_fail_however_many_classes_there_are(classes: tuple[float, ...]) -> None:
    found = verdict_on(counts_of(1000, np.random.default_rng(1), copies=150, classes=classes), 1150, simulations=5000)
    assert found.outcome == FAIL
    assert found.upper_bound is not None and found.upper_bound > 100
    assert "nearer to the synthetic images" in found.reasons[0]


def test_copies_in_one_rare_class_are_found() -> None:
    counts = counts_of(2000, np.random.default_rng(2), classes=(0.9, 0.05, 0.03, 0.02))
    counts.patients[0, 3, -1] += 60
    assert verdict_on(counts, 2000, simulations=5000).outcome == FAIL


def test_held_out_patients_who_are_as_near_explain_what_training_patients_show() -> None:
    lump = (0.0, 0.0, 0.1, 0.4, 0.3, 0.1, 0.0, 0.1)
    found = [verdict_on(counts_of(2000, np.random.default_rng(k), profile=lump), 2000) for k in range(10)]
    assert all(each.p is not None and each.p > LEVEL for each in found)
    # Nor can it be told that none of 160 who are as near as a copy was memorised.
    assert {each.outcome for each in found} == {NO_RELEASE}
    assert all(each.upper_bound is not None and each.upper_bound > 30 for each in found)


@pytest.mark.parametrize(("patients", "classes"), [(500, (1.0,)), (2000, (0.7, 0.3))])
def test_false_alarms_are_rare(patients: int, classes: tuple[float, ...]) -> None:
    """deploy/bench/audit_counts.py does it 2000 times in each of many settings; this finds coarse defects only."""
    rng = np.random.default_rng(3)
    outcomes = [verdict_on(counts_of(patients, rng, classes=classes), patients, seed=k).outcome for k in range(100)]
    assert outcomes.count(PASS) >= 96  # at 1 % each, 4 or fewer of 100 have a chance of 0.997


@pytest.mark.parametrize(("patients", "profile"), [(500, USUAL), (2000, (0.0, 0.1, 0.2, 0.3, 0.2, 0.1, 0.09, 0.01))])
def test_the_upper_bound_holds_with_its_confidence(patients: int, profile: tuple[float, ...]) -> None:
    rng = np.random.default_rng(9)
    bounds = []
    for seed in range(150):
        found = verdict_on(counts_of(patients, rng, copies=20, profile=profile), patients, seed=seed, simulations=50)
        assert found.upper_bound is not None
        bounds.append(found.upper_bound)
    assert sum(bound < 20 for bound in bounds) <= 15  # 7.5 are expected; more than 15 have a chance of 0.004
    assert np.median(bounds) < 60


def test_halves_that_differ_prevent_any_conclusion() -> None:
    counts = counts_of(2000, np.random.default_rng(4), copies=200)
    counts.patients[1, 0, -1] += 60
    found = verdict_on(counts, 2000)
    assert found.outcome == NO_RELEASE
    assert found.control_p is not None and found.control_p <= 0.001
    assert "control failed" in found.reasons[0]
    counts.patients[1, 0, -1] -= 60
    counts.patients[2, 0, -1] += 60
    assert verdict_on(counts, 2000).outcome == NO_RELEASE  # whichever half it is


def test_canaries_that_give_themselves_away_refute_the_certificate() -> None:
    counts = counts_of(500, np.random.default_rng(5), canaries=0)
    counts.canaries[0, -1], counts.canaries[1, 0] = 64, 64
    refuted = verdict_on(counts, certified_epsilon=1.0)
    assert refuted.outcome == FAIL
    assert any("canaries show" in each for each in refuted.reasons)
    assert verdict_on(counts, certified_epsilon=8.0).outcome == PASS
    without = verdict_on(counts, certified_epsilon=math.inf)
    assert without.outcome == PASS
    assert without.certified_epsilon is None
    assert any("not private" in each for each in without.reasons)


def test_without_canaries_there_is_no_bound_by_them() -> None:
    found = verdict_on(counts_of(500, np.random.default_rng(6), canaries=0))
    assert found.epsilon_lower_canaries is None
    assert found.outcome == PASS


def test_more_noise_than_the_bound_allows_is_no_release() -> None:
    loud = CountNoise(0.02, 0.02, 3, 1)
    rng = np.random.default_rng(7)
    outcomes = {verdict_on(counts_of(500, rng, noise=loud), noise=loud, seed=k).outcome for k in range(10)}
    assert outcomes == {NO_RELEASE}


def test_nobody_to_compare_with_is_no_release_with_its_reason() -> None:
    counts = counts_of(500, np.random.default_rng(0))
    for changes in ({"held_out_patients": 0}, {"training_patients": 0}):
        found = verdict_on(counts, **changes)
        assert found.outcome == NO_RELEASE
        assert "held-out" in found.reasons[0]
        json.dumps(asdict(found), allow_nan=False)
    assert no_release("All images are alike.").reasons == ("All images are alike.",)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(2, 10), st.sampled_from([1, 10, 1000]))
def test_any_counts_give_a_verdict_with_finite_figures(seed: int, classes: int, bins: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    counts = AuditCounts(
        rng.integers(-size, size + 1, (3, classes, bins)), rng.integers(0, 20, (2, bins)) * rng.integers(2)
    )
    found = verdict_on(counts, edges=range(bins - 1), simulations=50)
    assert found.outcome in {PASS, FAIL, NO_RELEASE}
    assert found.p is not None and 0 < found.p <= 1
    json.dumps(asdict(found), allow_nan=False)


def test_sites_that_hold_out_fewer_make_the_comparison_milder() -> None:
    counts = counts_of(1000, np.random.default_rng(8), copies=15, share=0.3)
    plain, mild = (verdict_on(counts, 1000, 0.3, smallest_share=share).p for share in (None, 0.2))
    assert plain is not None and mild is not None and plain < mild


def test_allowed_patients_are_30_or_one_in_a_hundred() -> None:
    assert [allowed_memorised(n) for n in (1, 3000, 3099, 3100, 8000)] == [30, 30, 30, 31, 80]


def test_what_cannot_be_counts_is_refused() -> None:
    counts = counts_of(500, np.random.default_rng(0))
    with pytest.raises(ValueError, match="edges"):
        verdict_on(counts, edges=EDGES[1:])
    with pytest.raises(ValueError, match="delta"):
        verdict_on(counts, delta=1.0)
    with pytest.raises(ValueError, match="smallest_share"):
        verdict_on(counts, smallest_share=0.0)


def test_without_randomness_there_is_no_verdict() -> None:
    with pytest.raises(OSError, match="no randomness"):
        verdict_on(counts_of(500, np.random.default_rng(0)), source=failing)


def test_tails_are_sums_from_the_top() -> None:
    rows: NDArray[np.float64] = np.arange(8.0).reshape(2, 4)
    assert tails(rows).tolist() == [[6, 5, 3], [18, 13, 7]]
    assert len(USUAL) == len(EDGES) + 1
