"""The plan: one calibration for the whole study, whatever its phases, the same for every party."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import StudyConfig
from common.errors import ConfigError, PrivacyError
from common.privacy import plan as planning
from common.privacy.accounting import History, Mechanism, calibrate, epsilon, num_steps
from common.privacy.plan import MOMENTS_CLIP_NORM, PhasePlan, PrivacyPlan, check_delta, make_plan, same_kind

Phase = tuple[str, float, int, int]
"""Algorithm, share of epsilon, rounds, steps a round."""


def study_of(rounds: int = 10, local_steps: int = 4, **privacy: object) -> StudyConfig:
    privacy = {"epsilon": 3.0, "sampling_probability": 1.0, **privacy}
    return StudyConfig.model_validate(
        {"privacy": privacy, "federation": {"rounds": rounds, "local_steps": local_steps}}
    )


def phases_of(*phases: Phase, **privacy: object) -> StudyConfig:
    privacy = {"epsilon": 3.0, "sampling_probability": 1.0, **privacy}
    table = [dict(zip(("algorithm", "share", "rounds", "steps"), phase, strict=True)) for phase in phases]
    return StudyConfig.model_validate({"privacy": privacy, "federation": {"phase": table}})


def plan_of(*phases: Phase, **privacy: object) -> PrivacyPlan:
    plan = make_plan(phases_of(*phases, **privacy))
    assert plan is not None
    return plan


def forget() -> None:
    """As a party that has planned nothing yet."""
    for cached in (planning.accounting.calibrate, planning.accounting.calibrate_together):
        cached.cache_clear()
    planning.accounting._prv_epsilon.cache_clear()


def test_the_noise_is_calibrated_once_for_all_rounds() -> None:
    # 10 rounds of 4 steps are 40 steps: the noise of 40, not of 4.
    plan = make_plan(study_of())
    assert plan is not None
    whole = calibrate(epsilon_target=3.0, delta=1e-5, sampling_probability=1.0, steps=40)
    one_round = calibrate(epsilon_target=3.0, delta=1e-5, sampling_probability=1.0, steps=4)
    assert plan.history == (Mechanism(1.0, whole, 40),)
    assert whole > 2 * one_round
    assert plan.epsilon == epsilon(plan.history, 1e-5)
    assert 0.99 * 3 <= plan.epsilon <= 3


def test_rounds_and_steps_count_alike() -> None:
    assert make_plan(study_of(10, 4)) == make_plan(study_of(4, 10)) == make_plan(study_of(1, 40))


def test_the_noise_scales_with_clip_norm() -> None:
    plan = make_plan(study_of(clip_norm=2.5))
    assert plan is not None
    (phase,) = plan.phases
    assert phase.noise_stddev == phase.mechanism.noise_multiplier * 2.5
    assert (phase.clip_norm, plan.delta) == (2.5, 1e-5)


def test_every_party_plans_alike_whatever_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of()
    first = make_plan(study)
    forget()
    assert make_plan(study.with_changes("", seed=5)) == first


def test_without_privacy_there_is_no_plan() -> None:
    assert make_plan(study_of(enabled=False)) is None


def test_a_budget_that_no_noise_meets_is_refused() -> None:
    with pytest.raises(ConfigError, match="no noise_multiplier"):
        make_plan(study_of(epsilon=1e-5))


@pytest.mark.parametrize(("delta", "patients"), [(1e-3, 100), (1e-5, 10_000), (0.009, 11), (1e-5, 1)])
def test_a_delta_up_to_a_tenth_of_a_patient_is_allowed(delta: float, patients: int) -> None:
    check_delta(delta, patients)


@pytest.mark.parametrize(("delta", "patients"), [(1.01e-3, 100), (1e-5, 10_001), (0.009, 12)])
def test_a_larger_delta_is_refused(delta: float, patients: int) -> None:
    with pytest.raises(PrivacyError, match=f"for {patients} patients"):
        check_delta(delta, patients)


# ---------------------------------------------------------------- phases

MOMENTS: Phase = ("moments", 0.6, 2, 1)
JOINT: Phase = ("joint", 0.3, 4, 25)
LOCAL: Phase = ("local", 0.1, 5, 4)
MIXED = (MOMENTS, JOINT, LOCAL)


def test_one_phase_is_planned_as_if_there_were_none() -> None:
    for algorithm, steps in (("local", 4), ("joint", 4), ("moments", 1)):
        short = study_of().with_changes("federation", algorithm=algorithm, rounds=10, local_steps=4)
        assert plan_of((algorithm, 1.0, 10, steps)) == make_plan(short)
    noise = calibrate(epsilon_target=3.0, delta=1e-5, sampling_probability=1.0, steps=40)
    assert plan_of(("joint", 1.0, 10, 4)).history == (Mechanism(1.0, noise, 40),)


def test_moments_are_of_all_patients_and_of_one_bound_whatever_the_training_has() -> None:
    plan = plan_of(*MIXED, sampling_probability=0.5, clip_norm=7.0)
    assert [phase.mechanism.sampling_probability for phase in plan.phases] == [1.0, 0.5, 0.5]
    assert [phase.clip_norm for phase in plan.phases] == [MOMENTS_CLIP_NORM, 7.0, 7.0]
    assert [phase.mechanism.steps for phase in plan.phases] == [2, 100, 20]


def test_all_phases_together_cost_what_the_study_promises() -> None:
    plan = plan_of(*MIXED)
    assert plan.epsilon == epsilon(tuple(phase.mechanism for phase in plan.phases), 1e-5)
    assert 0.98 * 3 <= plan.epsilon <= 3
    # Less noise than three studies of these budgets one after the other, which would be added up.
    alone = [
        calibrate(epsilon_target=3 * share, delta=1e-5, sampling_probability=1.0, steps=rounds * steps)
        for _, share, rounds, steps in MIXED
    ]
    for phase, noise in zip(plan.phases, alone, strict=True):
        assert phase.mechanism.noise_multiplier < 0.95 * noise


def test_one_factor_scales_the_noise_of_every_phase() -> None:
    """So the shares keep their proportion: each phase's noise is that of its share alone, times the same number."""
    plan = plan_of(*MIXED)
    factors = []
    for (_, share, rounds, steps), phase in zip(MIXED, plan.phases, strict=True):
        alone = calibrate(epsilon_target=3 * share, delta=1e-5, sampling_probability=1.0, steps=rounds * steps)
        factors.append(phase.mechanism.noise_multiplier / alone)
    assert factors == pytest.approx([factors[0]] * 3, rel=1e-9)


def test_more_of_epsilon_is_less_noise() -> None:
    half, most = (
        plan_of(("moments", 0.5, 1, 1), ("joint", 0.5, 2, 5)),
        plan_of(("moments", 0.9, 1, 1), ("joint", 0.1, 2, 5)),
    )
    noise = [[phase.mechanism.noise_multiplier for phase in plan.phases] for plan in (half, most)]
    assert noise[1][0] < noise[0][0]
    assert noise[1][1] > noise[0][1]


def test_every_party_plans_phases_alike() -> None:
    first = plan_of(*MIXED)
    forget()
    assert plan_of(*MIXED) == first


def test_phases_without_enough_epsilon_are_refused() -> None:
    with pytest.raises(ConfigError, match="no noise_multiplier"):
        make_plan(phases_of(*MIXED, epsilon=1e-5))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["local", "joint", "moments"]), st.integers(1, 20), st.integers(1, 9), st.integers(3, 40)
        ),
        min_size=1,
        max_size=4,
    ),
    st.floats(0.5, 15),
    st.sampled_from([1e-4, 1e-6]),
)
def test_no_study_costs_more_than_it_promises_nor_wastes_much(
    drawn: list[tuple[str, int, int, int]], budget: float, delta: float
) -> None:
    total = sum(weight for _, weight, _, _ in drawn)
    phases = [
        (algorithm, weight / total, rounds, 1 if algorithm == "moments" else steps)
        for algorithm, weight, rounds, steps in drawn
    ]
    plan = plan_of(*phases, epsilon=budget, delta=delta)
    together = tuple(phase.mechanism for phase in plan.phases)
    assert plan.epsilon == epsilon(together, delta) <= budget
    assert plan.epsilon >= 0.98 * budget
    assert num_steps(plan.history) == num_steps(together)
    assert epsilon(plan.history, delta) == plan.epsilon


# ---------------------------------------------------------------- what is left of a plan

LONG, SHORT, OTHER = Mechanism(0.5, 2.0, 10), Mechanism(0.5, 2.0, 5), Mechanism(1.0, 3.0, 4)
PLAN = PrivacyPlan((PhasePlan(LONG, 1.0), PhasePlan(OTHER, 1.0), PhasePlan(SHORT, 1.0)), 1e-5, 1.0)


def of(mechanism: Mechanism, steps: int) -> Mechanism:
    return replace(mechanism, steps=steps)


def test_phases_of_the_same_noise_and_sampling_are_one_in_the_account() -> None:
    """No ledger tells them apart, so they draw on the same steps."""
    assert PLAN.history == (of(LONG, 15), OTHER)


@pytest.mark.parametrize(
    ("history", "left", "steps"),
    [
        ((), (of(LONG, 15), OTHER), [15, 4, 15]),
        ((of(LONG, 3),), (of(LONG, 12), OTHER), [12, 4, 12]),
        ((of(LONG, 12), OTHER), (of(LONG, 3),), [3, 0, 3]),
        ((OTHER, of(LONG, 4), of(LONG, 11)), (), [0, 0, 0]),
        ((of(LONG, 3), of(OTHER, 1), of(LONG, 2)), (of(LONG, 10), of(OTHER, 3)), [10, 3, 10]),
        ((of(LONG, 99),), (OTHER,), [0, 4, 0]),  # more than planned is never less than nothing
    ],
)
def test_what_is_left_by_hand(history: History, left: History, steps: list[int]) -> None:
    assert PLAN.left(history) == left
    assert [PLAN.steps_left(number, history) for number in range(3)] == steps


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ((), True),
        ((OTHER,), True),  # a phase may be spent before the one before it
        ((of(LONG, 15), OTHER), True),
        ((of(LONG, 8), of(OTHER, 4), of(LONG, 7)), True),
        ((of(LONG, 16),), False),
        ((of(LONG, 8), OTHER, of(LONG, 8)), False),
        ((of(OTHER, 5),), False),
        ((LONG, Mechanism(0.5, 2.1, 1)), False),
        ((LONG, Mechanism(0.6, 2.0, 1)), False),
        ((Mechanism(1.0, 2.0, 1),), False),  # the sampling of one phase, the noise of another
    ],
)
def test_the_histories_that_a_plan_covers(history: History, expected: bool) -> None:
    assert PLAN.covers(history) is expected


def test_another_machines_last_digits_are_the_same_mechanism() -> None:
    near, far = replace(OTHER, noise_multiplier=3 * (1 + 5e-7)), replace(OTHER, noise_multiplier=3 * (1 + 5e-6))
    assert same_kind(OTHER, near) and not same_kind(OTHER, far)
    assert PLAN.covers((near,)) and not PLAN.covers((far,))
    assert PLAN.steps_left(1, (near,)) == 0
    assert not PLAN.covers((of(OTHER, 2), of(near, 3)))


mechanisms = st.builds(of, st.sampled_from([LONG, OTHER]), st.integers(1, 8))


@given(st.lists(mechanisms, max_size=6).map(tuple))
def test_what_is_charged_and_what_is_left_make_the_plan(history: History) -> None:
    left = PLAN.left(history)
    if PLAN.covers(history):
        assert num_steps(history) + num_steps(left) == num_steps(PLAN.history)
        assert PLAN.covers((*history, *left))
        assert PLAN.left((*history, *left)) == ()
    else:
        assert num_steps(history) + num_steps(left) > num_steps(PLAN.history)


def test_the_rest_of_a_real_plan_is_paid_from_the_epsilon_that_is_left() -> None:
    plan = plan_of(*MIXED)
    moments, joint, local = (phase.mechanism for phase in plan.phases)
    assert plan.left((moments, of(joint, 30))) == (of(joint, 70), local)
    assert [plan.steps_left(number, (moments, of(joint, 30))) for number in range(3)] == [0, 70, 20]
