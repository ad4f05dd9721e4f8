"""What the coordinator and the sites say to each other, as plain types; ``common/wire.py`` makes records of them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.privacy.accounting import History

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class EnrolRequest:
    """Server to site: will you take part in this study?"""

    study_digest: str


@dataclass(frozen=True)
class Enrolment:
    """Site to server: yes. Holds public facts only.

    Args:
        site: the site's name.
        holdout_commitment: SHA-256 (hex) of the key that splits training from held-out patients.
        record_is_patient: the site counts every image as a patient of its own, because it has no patient ids.
    """

    site: str
    holdout_commitment: str
    record_is_patient: bool


@dataclass(frozen=True)
class TrainRequest:
    """Server to site: train from this shared state. Both vectors are flat float32."""

    study_digest: str
    round: int
    generator: Vector
    discriminator: Vector


@dataclass(frozen=True)
class LocalUpdate:
    """Site to server: flat differences of both networks after local training.

    Args:
        round: the round that was asked for.
        generator: trained minus shared, (dim,) float32.
        discriminator: the same; private by itself, every step was clipped and noised.
        history: every mechanism the site has charged for this study, this round included. It counts steps, so it does
            not depend on any patient.
    """

    round: int
    generator: Vector
    discriminator: Vector
    history: History


@dataclass(frozen=True)
class Refusal:
    """Site to server: no, with a bare code. The reason stays in the site's own log."""

    code: str


Request = EnrolRequest | TrainRequest
Reply = Enrolment | LocalUpdate | Refusal
