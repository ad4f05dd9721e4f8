"""One plan couples sampling, clipping, noise and accounting, so that they cannot drift apart."""

from dataclasses import dataclass

from common.config import StudyConfig
from common.errors import ConfigError, PrivacyError
from common.privacy import accounting
from common.privacy.accounting import Mechanism


@dataclass(frozen=True)
class PrivacyPlan:
    """What one site will release over a whole study, all of it public.

    Args:
        mechanism: every discriminator step of the study.
        clip_norm: L2 bound of one patient's summed contribution to a step; the sensitivity.
        delta: of the reported (epsilon, delta).
        epsilon: of ``mechanism`` at ``delta``, by PRV.
    """

    mechanism: Mechanism
    clip_norm: float
    delta: float
    epsilon: float

    @property
    def noise_stddev(self) -> float:
        """Standard deviation of the noise on the sum of one step, a coordinate."""
        return self.mechanism.noise_multiplier * self.clip_norm


def make_plan(study: StudyConfig) -> PrivacyPlan | None:
    """Calibrate the noise from (epsilon, delta) for all rounds of the study together. None when privacy is off.

    Deterministic: every party that reads the same study gets the same plan, so no one has to be believed.
    """
    privacy = study.privacy
    if not privacy.enabled:
        return None
    try:
        noise_multiplier = accounting.calibrate(
            epsilon_target=privacy.epsilon,
            delta=privacy.delta,
            sampling_probability=privacy.sampling_probability,
            steps=study.total_steps,
        )
    except ValueError as error:
        raise ConfigError(
            f"privacy: {error}.", "Raise epsilon, or lower rounds, local_steps or sampling_probability."
        ) from None
    mechanism = Mechanism(privacy.sampling_probability, noise_multiplier, study.total_steps)
    epsilon = accounting.epsilon((mechanism,), privacy.delta)
    return PrivacyPlan(mechanism, privacy.clip_norm, privacy.delta, epsilon)


def check_delta(delta: float, num_patients: int) -> None:
    """Refuse a delta above 1 / (10 patients): it would allow one patient in ten cohorts to be exposed."""
    if delta > 1 / (10 * num_patients):
        raise PrivacyError(
            f"Expected delta at most {1 / (10 * num_patients):.1e} for {num_patients} patients, found {delta:g}.",
            "Lower privacy.delta in the study.",
        )
