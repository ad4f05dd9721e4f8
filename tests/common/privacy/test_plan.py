"""The plan: one calibration for the whole study, the same for every party."""

import pytest

from common.config import StudyConfig
from common.errors import ConfigError, PrivacyError
from common.privacy import plan as planning
from common.privacy.accounting import Mechanism, calibrate, epsilon
from common.privacy.plan import check_delta, make_plan


def study_of(rounds: int = 10, local_steps: int = 4, **privacy: object) -> StudyConfig:
    privacy = {"epsilon": 3.0, "sampling_probability": 1.0, **privacy}
    return StudyConfig.model_validate(
        {"privacy": privacy, "federation": {"rounds": rounds, "local_steps": local_steps}}
    )


def test_the_noise_is_calibrated_once_for_all_rounds() -> None:
    # 10 rounds of 4 steps are 40 steps: the noise of 40, not of 4.
    plan = make_plan(study_of())
    assert plan is not None
    whole = calibrate(epsilon_target=3.0, delta=1e-5, sampling_probability=1.0, steps=40)
    one_round = calibrate(epsilon_target=3.0, delta=1e-5, sampling_probability=1.0, steps=4)
    assert plan.mechanism == Mechanism(1.0, whole, 40)
    assert plan.mechanism.noise_multiplier > 2 * one_round
    assert plan.epsilon == epsilon((plan.mechanism,), 1e-5)
    assert 0.99 * 3 <= plan.epsilon <= 3


def test_rounds_and_steps_count_alike() -> None:
    assert make_plan(study_of(10, 4)) == make_plan(study_of(4, 10)) == make_plan(study_of(1, 40))


def test_the_noise_scales_with_clip_norm() -> None:
    plan = make_plan(study_of(clip_norm=2.5))
    assert plan is not None
    assert plan.noise_stddev == plan.mechanism.noise_multiplier * 2.5
    assert (plan.clip_norm, plan.delta) == (2.5, 1e-5)


def test_every_party_plans_alike_whatever_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of()
    first = make_plan(study)
    planning.accounting.calibrate.cache_clear()
    planning.accounting._prv_epsilon.cache_clear()
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
