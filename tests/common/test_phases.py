"""``auto``: which phases a study gets, from nothing but its contract and its epsilon, and that it says why."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import StudyConfig
from common.errors import ConfigError
from common.phases import choose
from common.privacy.plan import make_plan


def auto(*patients: int, private: bool = True, epsilon: float = 8.0, **federation: object) -> StudyConfig:
    contract = {f"site-{number}": count for number, count in enumerate(patients)}
    privacy = {"enabled": private, "epsilon": epsilon, "sampling_probability": 1.0}
    table = {"algorithm": "auto", "contracted_patients": contract, **federation}
    return StudyConfig.model_validate({"name": "lungs", "privacy": privacy, "federation": table})


def algorithms(study: StudyConfig) -> list[str]:
    return [phase.algorithm for phase in study.phases]


def test_a_small_cohort_gets_moments_alone_and_a_large_one_adversarial_steps_too() -> None:
    assert algorithms(auto(100, 100)) == ["moments"]
    assert algorithms(auto(100_000, 100_000)) == ["moments", "joint"]


def test_epsilon_counts_as_patients_do() -> None:
    assert algorithms(auto(100_000, epsilon=0.001)) == ["moments"]
    assert algorithms(auto(100, 100, private=False)) == ["moments", "joint"]


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=5), st.floats(0.01, 900), st.booleans())
def test_what_is_chosen_is_a_study_and_has_a_reason(patients: list[int], epsilon: float, private: bool) -> None:
    study = auto(*patients, epsilon=epsilon, private=private)
    chosen = choose(study)
    assert study.phases == chosen.phases
    trained = sum(study.contracted_split(site)[0] for site in study.federation.contracted_patients)
    assert chosen.reason.endswith(".") and str(trained) in chosen.reason
    said = study.model_copy(update={"federation": study.federation.model_copy(update={"algorithm": "local"})})
    again = said.with_changes("federation", phase=[phase.model_dump() for phase in chosen.phases])
    assert again.phases == chosen.phases  # shares add up, steps suit the generator
    assert study.total_rounds == sum(phase.rounds for phase in chosen.phases)


def test_what_is_chosen_can_be_planned() -> None:
    for study in (auto(100, 100), auto(100_000, 100_000)):
        plan = make_plan(study)
        assert plan is not None and len(plan.phases) == len(study.phases)
        assert 0.98 * 8 <= plan.epsilon <= 8


def test_without_a_contract_nothing_can_be_chosen_and_the_study_is_valid_all_the_same() -> None:
    """A simulation adds its contract later."""
    study = auto()
    with pytest.raises(ConfigError, match="chooses by the contracted patients"):
        _ = study.phases
    assert algorithms(study.with_changes("federation", contracted_patients={"north": 100, "south": 100})) == ["moments"]
    assert StudyConfig.from_run_config(study.to_run_config()) == study
