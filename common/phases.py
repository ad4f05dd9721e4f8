"""``federation.algorithm = "auto"``: the phases for a contracted cohort and an epsilon, by what was measured.

The rule comes from ``deploy/bench/utility.py``; the README has the figures.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.errors import ConfigError

if TYPE_CHECKING:
    from common.config import PhaseConfig, StudyConfig

JOINT_FROM = 160_000.0  # training patients times epsilon: up to here (20000 at 8) no adversarial steps helped
JOINT_SHARE, JOINT_ROUNDS, JOINT_STEPS = 0.1, 6, 50


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Args:
        phases: in their order.
        reason: why, in a sentence.
    """

    phases: tuple["PhaseConfig", ...]
    reason: str


def choose(study: "StudyConfig") -> Choice:
    """Choose from public facts only: contracted patients and epsilon.

    Raises:
        ConfigError: the study has no contract with any site.
    """
    from common.config import PhaseConfig

    contract = study.federation.contracted_patients
    if not contract:
        raise ConfigError(
            'federation.algorithm = "auto" chooses by the contracted patients, and the study has none.',
            "Add [federation.contracted_patients], or say the algorithm.",
        )
    patients = sum(study.contracted_split(site)[0] for site in contract)
    epsilon = study.privacy.epsilon if study.privacy.enabled else float("inf")
    moments = PhaseConfig(algorithm="moments")
    facts = f"{patients} training patients at {len(contract)} sites and epsilon {epsilon:g}"
    if patients * epsilon < JOINT_FROM:
        return Choice(
            (moments,),
            f"{facts}: moments alone; adversarial steps after them made images no better in any "
            "cohort that was measured, up to 20000 patients at epsilon 8.",
        )
    joint = PhaseConfig(algorithm="joint", share=JOINT_SHARE, rounds=JOINT_ROUNDS, steps=JOINT_STEPS)
    both = (moments.model_copy(update={"share": 1 - JOINT_SHARE}), joint)
    return Choice(
        both,
        f"{facts}: more than was measured; a tenth goes to adversarial steps after the "
        "moments, which then did no harm.",
    )
