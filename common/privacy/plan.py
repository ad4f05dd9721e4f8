"""One plan couples sampling, clipping, noise and accounting, so that they cannot drift apart."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from common.config import PhaseConfig, StudyConfig
from common.errors import ConfigError, PrivacyError
from common.privacy import accounting
from common.privacy.accounting import Entry, History, Mechanism, PureRelease

MOMENTS_CLIP_NORM = 1.0  # vectors of features are scaled to it: any other bound would be the same mechanism
SAME_PLAN = 1e-6  # relative: parties calibrate the noise on machines of their own


@dataclass(frozen=True)
class PhasePlan:
    """What a patient's contribution to one phase costs.

    Args:
        mechanism: every step of the phase.
        clip_norm: L2 bound of one patient's summed contribution to a step; the sensitivity.
    """

    mechanism: Mechanism
    clip_norm: float

    @property
    def noise_stddev(self) -> float:
        """Standard deviation of the noise on the sum of one step, a coordinate."""
        return self.mechanism.noise_multiplier * self.clip_norm


@dataclass(frozen=True)
class PrivacyPlan:
    """What one site will release over a whole study, all of it public.

    Args:
        phases: of each phase, in order.
        delta: of the reported (epsilon, delta).
        epsilon: of all phases together at ``delta``, by PRV.
    """

    phases: tuple[PhasePlan, ...]
    delta: float
    epsilon: float

    @property
    def history(self) -> tuple[Mechanism, ...]:
        """The whole plan as what it will have cost."""
        return _joined(phase.mechanism for phase in self.phases)

    def left(self, history: History) -> tuple[Mechanism, ...]:
        """What of the plan is not charged yet, by this study's own history at a site; in the plan's order."""
        return tuple(_left(mechanism, history) for mechanism in self.history if _steps_left(mechanism, history) > 0)

    def steps_left(self, phase_number: int, history: History) -> int:
        """Steps that a phase may still charge. Phases with the same noise and sampling draw on the same steps."""
        kind = self.phases[phase_number].mechanism
        return sum(mechanism.steps for mechanism in self.left(history) if same_kind(mechanism, kind))

    def covers(self, history: History) -> bool:
        """Whether a history of training is part of the plan: mechanisms of it, none more often than planned."""
        planned = self.history
        return all(any(same_kind(spent, mechanism) for mechanism in planned) for spent in history) and all(
            _steps_left(mechanism, history) >= 0 for mechanism in planned
        )


def make_plan(study: StudyConfig) -> PrivacyPlan | None:
    """Calibrate the noise from (epsilon, delta) for all phases of the study together. None when privacy is off.

    Each phase's noise is first calibrated for its share of epsilon alone; then all are made smaller, or larger, by one
    factor, until together they cost at most epsilon. Deterministic: every party that reads the same study gets the
    same plan, so no one has to be believed.
    """
    privacy = study.privacy
    if not privacy.enabled:
        return None
    shapes = tuple((_sampling(study, phase), phase.rounds * phase.steps, phase.share) for phase in study.phases)
    try:
        noise_multipliers = accounting.calibrate_together(
            epsilon_target=privacy.epsilon, delta=privacy.delta, shapes=shapes
        )
    except ValueError as error:
        raise ConfigError(
            f"privacy: {error}.", "Raise epsilon, or lower rounds, local_steps or sampling_probability."
        ) from None
    phases = tuple(
        PhasePlan(Mechanism(sampling, noise, steps), _clip_norm(study, phase))
        for (sampling, steps, _), noise, phase in zip(shapes, noise_multipliers, study.phases, strict=True)
    )
    epsilon = accounting.epsilon(tuple(phase.mechanism for phase in phases), privacy.delta)
    return PrivacyPlan(phases, privacy.delta, epsilon)


@dataclass(frozen=True)
class AuditCost:
    """What the verdicts that a study plans cost its patients, beside training; each patient pays one of the two.

    Args:
        training: what a patient that is trained on pays; nothing in a study that cannot be audited.
        held_out: what a patient that is held out pays.
    """

    training: tuple[PureRelease, ...]
    held_out: tuple[PureRelease, ...]

    def left(self, num_verdicts: int) -> "AuditCost":
        """What is not charged yet after so many verdicts."""
        return AuditCost(_fewer(self.training, num_verdicts), _fewer(self.held_out, num_verdicts))


def audit_cost(study: StudyConfig) -> AuditCost:
    """What the study's verdicts will cost; nothing without privacy, or with fewer sites than an audit's sum needs."""
    audit, sites = study.audit, len(study.federation.contracted_patients)
    if not study.privacy.enabled or sites < study.minimum_sites(study.audit_round):
        return AuditCost((), ())
    training, held_out = (
        PureRelease(each, audit.verdicts) for each in (audit.epsilon_training, audit.epsilon_held_out)
    )
    return AuditCost((training,), (held_out,))


def same_kind(one: Entry, other: Entry) -> bool:
    """Whether two entries have the same sampling and noise, or the same epsilon where they are pure."""
    if isinstance(one, PureRelease) or isinstance(other, PureRelease):
        return (
            isinstance(one, PureRelease)
            and isinstance(other, PureRelease)
            and math.isclose(one.epsilon, other.epsilon, rel_tol=SAME_PLAN)
        )
    return math.isclose(one.sampling_probability, other.sampling_probability, rel_tol=SAME_PLAN) and math.isclose(
        one.noise_multiplier, other.noise_multiplier, rel_tol=SAME_PLAN
    )


def check_delta(delta: float, num_patients: int) -> None:
    """Refuse a delta above 1 / (10 patients): it would allow one patient in ten cohorts to be exposed."""
    if delta > 1 / (10 * num_patients):
        raise PrivacyError(
            f"Expected delta at most {1 / (10 * num_patients):.1e} for {num_patients} patients, found {delta:g}.",
            "Lower privacy.delta in the study.",
        )


def _sampling(study: StudyConfig, phase: PhaseConfig) -> float:
    """Moments are of all patients; the discriminator's steps draw them."""
    return 1.0 if phase.algorithm == "moments" else study.privacy.sampling_probability


def _clip_norm(study: StudyConfig, phase: PhaseConfig) -> float:
    return MOMENTS_CLIP_NORM if phase.algorithm == "moments" else study.privacy.clip_norm


def _fewer(planned: tuple[PureRelease, ...], steps: int) -> tuple[PureRelease, ...]:
    return tuple(replace(each, steps=each.steps - steps) for each in planned if each.steps > steps)


def _joined(mechanisms: Iterator[Mechanism]) -> tuple[Mechanism, ...]:
    """One mechanism a kind, in the order in which the kinds appear."""
    joined: list[Mechanism] = []
    for mechanism in mechanisms:
        known = next((at for at, other in enumerate(joined) if same_kind(mechanism, other)), None)
        if known is None:
            joined.append(mechanism)
        else:
            joined[known] = replace(joined[known], steps=joined[known].steps + mechanism.steps)
    return tuple(joined)


def _left(mechanism: Mechanism, history: History) -> Mechanism:
    return replace(mechanism, steps=_steps_left(mechanism, history))


def _steps_left(mechanism: Mechanism, history: History) -> int:
    return mechanism.steps - sum(spent.steps for spent in history if same_kind(spent, mechanism))
