"""What the sums over patients in a study's ``joint`` and ``moments`` phases look like: noise and encoding."""

from common.canaries import num_canaries
from common.config import StudyConfig
from common.errors import ConfigError
from common.privacy.plan import PhasePlan
from common.privacy.shared_noise import MODULUS_BITS, SharedNoise, shared_noise
from common.secagg.encoding import Encoding


def noise_for(study: StudyConfig, plan: PhasePlan | None, length: int) -> SharedNoise:
    """The noise of a phase, for vectors of ``length`` coordinates. Every party computes the same from the study.

    Raises:
        ConfigError: no noise fits the study.
    """
    contract = study.federation.contracted_patients
    patients = sum(study.contracted_split(site)[0] + num_canaries(study, site) for site in contract)
    try:
        return shared_noise(plan, length, patients, len(contract), study.num_noisy)
    except ValueError as error:
        raise ConfigError(f"The study's sums cannot be made noisy: {error}.", "Change the study.") from None


def encoding_of(noise: SharedNoise) -> Encoding:
    """Of noisy integers in a secure sum. Its value range is not used: they wrap, nothing is clipped after the noise."""
    return Encoding(1.0, noise.fraction_bits, MODULUS_BITS)
