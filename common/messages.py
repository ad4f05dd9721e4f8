"""What the coordinator and the sites say to each other, as plain types; ``common/wire.py`` makes records of them."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from common.privacy.accounting import Budget, History
from common.secagg.keys import AdvertisedKeys

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class EnrolRequest:
    """Server to site: will you take part in this study?

    Args:
        study_digest: the study.
        run: the coordinator's run (random, hex), for the site's ledger.
        signature: of the study (``common/study_signature.py``); empty for none.
    """

    study_digest: str
    run: str = ""
    signature: bytes = b""


@dataclass(frozen=True)
class Enrolment:
    """Site to server: yes. Holds public facts only.

    Args:
        site: the site's name.
        holdout_commitment: SHA-256 (hex) of the key that splits training from held-out patients.
        record_is_patient: the site counts every image as a patient of its own, because it has no patient ids.
        history: what the site has charged patients that are trained on for this study so far: steps, and an answer for
            each verdict of its audit, for which those held out have paid as well. It counts, so it does not depend on
            any patient.
        earlier: what other studies have charged patients that they train on, whichever patients these were.
        budget: the most that the site's policy allows for any patient; None in a study that is not private.
        last_attempt: the newest secure sum of this study that the site has served, 0 for none.
        identity: the site's public Ed25519 key (hex); "" in a study without secure aggregation.
        roster_digest: the roster that the site has pinned (hex), or "".
    """

    site: str
    holdout_commitment: str
    record_is_patient: bool
    history: History = ()
    earlier: History = ()
    budget: Budget | None = None
    last_attempt: int = 0
    identity: str = ""
    roster_digest: str = ""


@dataclass(frozen=True)
class TrainRequest:
    """Server to site: train from this shared state. Both vectors are flat float32."""

    study_digest: str
    round: int
    generator: Vector
    discriminator: Vector

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the round and the exact shared state: what an update answers. It reads all, so once."""
        digest = hashlib.sha256(f"{self.study_digest}/{self.round}/".encode())
        digest.update(self.generator.tobytes())
        digest.update(self.discriminator.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class MomentsRequest:
    """Server to site: tell the noisy sum of your patients' features.

    Args:
        study_digest: the study.
        round: the round.
        features: the public feature map, flat float32 (``common/gan/feature_map.py``).
    """

    study_digest: str
    round: int
    features: Vector

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the round and the exact feature map: what the sum answers. It reads all, so once."""
        digest = hashlib.sha256(f"{self.study_digest}/{self.round}/moments/".encode())
        digest.update(self.features.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class JointRequest:
    """Server to site: what do this step's patients say of this discriminator?

    Args:
        study_digest: the study.
        round: the round.
        step: counts from 1 within the round.
        discriminator: the shared discriminator, flat float32.
    """

    study_digest: str
    round: int
    step: int
    discriminator: Vector

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of round, step and the exact discriminator: what the sum answers. It reads all, so once."""
        digest = hashlib.sha256(f"{self.study_digest}/{self.round}/joint/{self.step}/".encode())
        digest.update(self.discriminator.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class RegisterPlanRequest:
    """Server to site: this is how the study's images will be audited. Answered by PlanRegistered.

    Args:
        study_digest: the study.
        plan: a signed plan, JSON (``common/audit/plan.py``).
    """

    study_digest: str
    plan: bytes


@dataclass(frozen=True)
class PlanRegistered:
    """Site to server: the site will audit by the plan of this digest and by no other."""

    plan_digest: str


@dataclass(frozen=True)
class AuditRequest:
    """Server to site: how near do these images come to your patients?

    Args:
        study_digest: the study.
        round: the study's ``audit_round``.
        plan_digest: of the plan.
        generator: the generator that made the images, flat float32.
        indices: (n,) int64, which of the generated images these are.
        images: (n size size,) uint8.
        nearest: (n,) float32, each one's similarity to its nearest fellow.
    """

    study_digest: str
    round: int
    plan_digest: str
    generator: Vector
    indices: NDArray[np.int64]
    images: NDArray[np.uint8]
    nearest: Vector

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of all of it: what the sum answers. It reads all, so once."""
        digest = hashlib.sha256(f"{self.study_digest}/{self.round}/audit/{self.plan_digest}/".encode())
        for array in (self.generator, self.indices, self.images, self.nearest):
            digest.update(f"{len(array)}/".encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class FilterRequest:
    """Server to site: which of the audited images are to be dropped?

    Args:
        study_digest: the study.
        round: the study's ``filter_round``.
        audit_digest: digest of the AuditRequest.
        count: candidates in it.
    """

    study_digest: str
    round: int
    audit_digest: str
    count: int

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the request: what the sum answers."""
        text = f"{self.study_digest}/{self.round}/filter/{self.audit_digest}/{self.count}"
        return hashlib.sha256(text.encode()).hexdigest()


Work = TrainRequest | MomentsRequest | AuditRequest | FilterRequest
"""What the sites are asked to sum, under secure aggregation or in the clear."""


@dataclass(frozen=True)
class LocalUpdate:
    """Site to server, only in a study that says ``aggregation = "plain"``: the site's part of a sum as it is.

    Args:
        round: the round that was asked for.
        vector: (dim,) float32, private by itself. After a TrainRequest trained minus shared of the generator, then of
            the discriminator, times the site's public weight; else the noisy sum over the site's patients.
    """

    round: int
    vector: Vector


@dataclass(frozen=True)
class AdvertiseKeysRequest:
    """Server to site: make fresh keys for this attempt at a secure sum of a round. Answered by AdvertisedKeys."""

    study_digest: str
    attempt: int
    round: int


@dataclass(frozen=True)
class ShareKeysRequest:
    """Server to site: these sites, each with its signed keys, take part. Answered by SealedShares."""

    study_digest: str
    attempt: int
    cohort: tuple[AdvertisedKeys, ...]


@dataclass(frozen=True)
class SealedShares:
    """Site to server: shares of the site's secrets, one text for each holder that only the holder can open.

    Args:
        attempt: the attempt.
        sealed: by holder, both its shares, sealed.
        self_mask_digests: by holder, SHA-256 of its share of the self mask, so that the server can tell a wrong one.
        mask_key_digests: by holder, SHA-256 of its share of the mask key.
        seed_digest: SHA-256 of the self mask.
    """

    attempt: int
    sealed: Mapping[str, bytes]
    self_mask_digests: Mapping[str, bytes]
    mask_key_digests: Mapping[str, bytes]
    seed_digest: bytes


@dataclass(frozen=True)
class MaskedInputRequest:
    """Server to site: train, or tell the moments, and send the result masked. Answered by MaskedInput.

    Args:
        attempt: the attempt.
        sharers: the sites that shared their keys.
        sealed: by sender, the shares sealed for this site.
        work: what to sum.
    """

    attempt: int
    sharers: tuple[str, ...]
    sealed: Mapping[str, bytes]
    work: Work

    @property
    def study_digest(self) -> str:
        """The study, as every request names it."""
        return self.work.study_digest


@dataclass(frozen=True)
class MaskedInput:
    """Site to server: the weighted update, encoded and masked. Uniformly random to whoever lacks the masks.

    Args:
        study_digest: the study.
        attempt: the attempt.
        round: the round trained for.
        length: coordinates.
        modulus_bits: bits of each.
        words: (num_words,) uint64, several coordinates each (``common/secagg/encoding.py``).
    """

    study_digest: str
    attempt: int
    round: int
    length: int
    modulus_bits: int
    words: NDArray[np.uint64]


@dataclass(frozen=True)
class ConfirmSurvivorsRequest:
    """Server to site: the masked updates of these sites came in time. Answered by Confirmation."""

    study_digest: str
    attempt: int
    survivors: tuple[str, ...]


@dataclass(frozen=True)
class Confirmation:
    """Site to server: the site's signature over the transcript and the survivors."""

    attempt: int
    signature: bytes


@dataclass(frozen=True)
class UnmaskRequest:
    """Server to site: these sites confirmed the same survivors. Answered by UnmaskShares.

    Args:
        study_digest: the study.
        attempt: the attempt.
        confirmations: by site, its signature.
        next_round: the round of the attempt for which keys are wanted; 0 for none, after the last round.
    """

    study_digest: str
    attempt: int
    confirmations: Mapping[str, bytes]
    next_round: int = 0


@dataclass(frozen=True)
class UnmaskShares:
    """Site to server: one share of each site whose shares it holds, and fresh keys for the attempt after this one.

    Args:
        attempt: the attempt.
        self_masks: by survivor, a share of its self mask.
        mask_keys: by dropped site, a share of its mask key.
        next_keys: keys for ``attempt + 1``; None when there is none, or the site will take no part in it.
    """

    attempt: int
    self_masks: Mapping[str, bytes]
    mask_keys: Mapping[str, bytes]
    next_keys: AdvertisedKeys | None


@dataclass(frozen=True)
class ShareSeedRequest:
    """Server to site: these sites begin a session, many secure sums on one set of keys. Answered by SealedSeeds.

    Args:
        study_digest: the study.
        attempt: the attempt; sums and sessions are counted together.
        round: the round that all sums of the session belong to.
        steps: how many sums there will be, at least 1.
        cohort: each site's signed keys.
    """

    study_digest: str
    attempt: int
    round: int
    steps: int
    cohort: tuple[AdvertisedKeys, ...]


@dataclass(frozen=True)
class SealedSeeds:
    """Site to server: shares of the seed of its self masks, one text for each holder that only the holder can open.

    Args:
        attempt: the attempt.
        sealed: by holder, its share, sealed.
        digests: by holder, SHA-256 of its share, so that the server can tell a wrong one.
        seed_digest: SHA-256 of the seed.
    """

    attempt: int
    sealed: Mapping[str, bytes]
    digests: Mapping[str, bytes]
    seed_digest: bytes


@dataclass(frozen=True)
class StepRequest:
    """Server to site: the next step of a session. Answered by MaskedStep.

    Args:
        attempt: the attempt.
        participants: the sites asked: first those that shared a seed, then survivors of the step before.
        sealed: by sender, the shares sealed for this site; in the first step only.
        work: what to sum.
    """

    attempt: int
    participants: tuple[str, ...]
    sealed: Mapping[str, bytes]
    work: JointRequest

    @property
    def study_digest(self) -> str:
        """The study, as every request names it."""
        return self.work.study_digest

    @property
    def step(self) -> int:
        """Counts from 1 within the session."""
        return self.work.step


@dataclass(frozen=True)
class MaskedStep:
    """Site to server: the integers of a step, masked. Uniformly random to whoever lacks the masks.

    Args:
        study_digest: the study.
        attempt: the attempt.
        round: the round.
        step: of the session.
        length: coordinates.
        modulus_bits: bits of each.
        key_digests: by partner, SHA-256 of the key of the mask in common; under the site's own name that of its self
            mask. So the server can tell a wrong key when one is opened.
        words: (num_words,) uint64, several coordinates each (``common/secagg/encoding.py``).
    """

    study_digest: str
    attempt: int
    round: int
    step: int
    length: int
    modulus_bits: int
    key_digests: Mapping[str, bytes]
    words: NDArray[np.uint64]


@dataclass(frozen=True)
class ConfirmStepRequest:
    """Server to site: the masked vectors of these sites came in time. Answered by Confirmation."""

    study_digest: str
    attempt: int
    step: int
    survivors: tuple[str, ...]


@dataclass(frozen=True)
class OpenStepRequest:
    """Server to site: these sites confirmed the same survivors of a step; by site, the signature. See OpenedStep."""

    study_digest: str
    attempt: int
    step: int
    confirmations: Mapping[str, bytes]


@dataclass(frozen=True)
class OpenedStep:
    """Site to server: keys of masks of one step.

    Args:
        attempt: the attempt.
        step: of the session.
        self_key: of this site's own mask.
        pair_keys: by participant that is no survivor, of the mask in common with it.
    """

    attempt: int
    step: int
    self_key: bytes
    pair_keys: Mapping[str, bytes]


@dataclass(frozen=True)
class OpenSeedsRequest:
    """Server to site: these survivors did not open the step; after the last step, also: the session is over.

    Args:
        study_digest: the study.
        attempt: the attempt.
        step: of the session.
        owners: whose shares of a seed are wanted. They take part in no later step. May be empty after the last one.
        next_round: the round of the attempt after this one, for which keys are wanted; 0 for none, and before the last
            step.
    """

    study_digest: str
    attempt: int
    step: int
    owners: tuple[str, ...]
    next_round: int = 0


@dataclass(frozen=True)
class OpenedSeeds:
    """Site to server: a share of the seed of each owner, and fresh keys for the attempt after this one.

    Args:
        attempt: the attempt.
        step: of the session.
        shares: by owner.
        next_keys: keys for ``attempt + 1``; None when there is none, or the site will take no part in it.
    """

    attempt: int
    step: int
    shares: Mapping[str, bytes]
    next_keys: AdvertisedKeys | None


@dataclass(frozen=True)
class Refusal:
    """Site to server: no, with a bare code. The reason stays in the site's own log."""

    code: str


Request = (
    EnrolRequest
    | RegisterPlanRequest
    | TrainRequest
    | MomentsRequest
    | AuditRequest
    | FilterRequest
    | JointRequest
    | AdvertiseKeysRequest
    | ShareKeysRequest
    | MaskedInputRequest
    | ConfirmSurvivorsRequest
    | UnmaskRequest
    | ShareSeedRequest
    | StepRequest
    | ConfirmStepRequest
    | OpenStepRequest
    | OpenSeedsRequest
)
Reply = (
    Enrolment
    | PlanRegistered
    | LocalUpdate
    | AdvertisedKeys
    | SealedShares
    | MaskedInput
    | Confirmation
    | UnmaskShares
    | SealedSeeds
    | MaskedStep
    | OpenedStep
    | OpenedSeeds
    | Refusal
)
