"""The server's side of a secure sum: one state machine, two methods a stage, no network.

For each stage: what to ask of whom, then ``take`` of each answer. An answer that does not fit raises BadPeer and its
site counts as dropped. Too few sites left for the next stage raise TooFewSurvivors: nothing is decoded.

The sum is kept as words and grows as masked inputs arrive, so that the server never holds more than one of them.
Nothing here has to be trusted: what a dishonest server could do instead is in ``client/secagg.py``.
"""

from collections.abc import Mapping

import numpy as np

from common.errors import BadPeer, OutOfOrder
from common.messages import (
    Confirmation,
    ConfirmSurvivorsRequest,
    MaskedInput,
    MaskedInputRequest,
    SealedShares,
    ShareKeysRequest,
    UnmaskRequest,
    UnmaskShares,
    Work,
)
from common.secagg import keys, masks
from common.secagg.encoding import Floats, decode
from common.secagg.keys import AdvertisedKeys
from server.attempt import DONE, ServerAttempt, SumPlan, check_keys

__all__ = ["SecureSum", "SumPlan", "check_keys"]
STAGES = ("start", "share_keys", "masked_input", "confirm_survivors", "unmask", DONE)


class SecureSum(ServerAttempt[SealedShares]):
    """One attempt at the sum of the vectors of ``cohort``.

    Args:
        plan: what is public about it.
        cohort: advertised keys by site, their signatures checked with ``check_keys``.
    """

    def __init__(self, plan: SumPlan, cohort: Mapping[str, AdvertisedKeys]) -> None:
        super().__init__(plan, cohort)
        self._agreed = keys.make_transcript(plan.attempt, plan.roster_digest, cohort.values())
        self._state = ""  # digest of what is summed
        self._total = np.zeros(plan.encoding.num_words(plan.length), np.uint64)
        self._summed: set[str] = set()  # whose masked input is in the total
        self._confirmed: dict[str, bytes] = {}  # by site, its signature
        self._opened: dict[str, UnmaskShares] = {}  # by holder

    @property
    def survivors(self) -> tuple[str, ...]:
        """The sites in the sum."""
        return tuple(sorted(self._summed))

    # ------------------------------------------------------------ share_keys

    def share_keys_requests(self) -> dict[str, ShareKeysRequest]:
        """Enter ``share_keys``."""
        self._enter("share_keys")
        self.check_minimum("advertise_keys", self.cohort)
        attempt, cohort = self.plan.attempt, tuple(self.cohort[name] for name in sorted(self.cohort))
        request = ShareKeysRequest(attempt.study_digest, attempt.number, cohort)
        return dict.fromkeys(self.cohort, request)

    def take_sealed_shares(self, site: str, reply: SealedShares) -> None:
        """A site's dealt shares."""
        self.expect("share_keys", reply.attempt, site, self.cohort, self._dealt)
        self.check_dealt(site, reply.sealed, (reply.self_mask_digests, reply.mask_key_digests))
        self._dealt[site] = reply

    # ------------------------------------------------------------ masked_input

    def masked_input_requests(self, work: Work) -> dict[str, MaskedInputRequest]:
        """Enter ``masked_input``: to every sharer the shares that others sealed for it."""
        self._enter("masked_input")
        self.check_minimum("share_keys", self._dealt)
        self.check_holders("share_keys", self._dealt, self._dealt)
        self._state = work.digest
        return {
            name: MaskedInputRequest(
                self.plan.attempt.number,
                self.sharers,
                self.sealed_for(name, self._dealt),
                work,
            )
            for name in self._dealt
        }

    def take_masked_input(self, site: str, reply: MaskedInput) -> None:
        """Add a site's masked vector to the total."""
        self.expect("masked_input", reply.attempt, site, self._dealt, self._summed)
        facts = {
            "study": reply.study_digest,
            "round": reply.round,
            "length": reply.length,
            "modulus_bits": reply.modulus_bits,
        }
        self.check_masked(site, facts, len(reply.words))
        self._total += reply.words
        self._summed.add(site)

    # ------------------------------------------------------------ confirm_survivors

    def confirm_requests(self) -> dict[str, ConfirmSurvivorsRequest]:
        """Enter ``confirm_survivors``."""
        self._enter("confirm_survivors")
        self.check_minimum("masked_input", self._summed)
        self.check_holders("masked_input", self._dealt, self._summed)
        attempt = self.plan.attempt
        return dict.fromkeys(
            self.survivors, ConfirmSurvivorsRequest(attempt.study_digest, attempt.number, self.survivors)
        )

    def take_confirmation(self, site: str, reply: Confirmation) -> None:
        """A site's signature over the survivors."""
        self.expect("confirm_survivors", reply.attempt, site, self._summed, self._confirmed)
        signed = keys.confirmed(self._agreed, self.survivors)
        keys.check_signature(self.plan.identities[site], reply.signature, signed)
        self._confirmed[site] = reply.signature

    # ------------------------------------------------------------ unmask

    def unmask_requests(self, next_round: int = 0) -> dict[str, UnmaskRequest]:
        """Enter ``unmask``: to every site that confirmed the signatures of its holders, as many as it needs.

        Args:
            next_round: for whose attempt the sites shall send keys; 0 for none.
        """
        self._enter("unmask")
        self.check_holders("confirm_survivors", self._dealt, self._confirmed)
        attempt, requests = self.plan.attempt, {}
        for name in sorted(self._confirmed):
            signatures = self.confirmations_for(name, self._confirmed)
            requests[name] = UnmaskRequest(attempt.study_digest, attempt.number, signatures, next_round)
        return requests

    def take_unmask_shares(self, site: str, reply: UnmaskShares) -> None:
        """The shares that a site opens. A wrong one is passed over when the sum is unmasked."""
        self.expect("unmask", reply.attempt, site, self._confirmed, self._opened)
        self._opened[site] = reply

    def result(self) -> Floats:
        """Remove every mask and decode: the sum of the survivors' vectors, (dim,) float32.

        Raises:
            TooFewSurvivors: too few right shares of some site.
            BadPeer: a site dealt shares that do not belong together. Nothing is decoded.
        """
        self._enter("done")
        removed = []
        for name in self.survivors:
            seed = self._rebuild("self_mask", name)
            removed.append((keys.self_mask_key(seed, self._agreed, name), False))
        for name in sorted(set(self._dealt) - self._summed):
            partners = [each for each in self.survivors if self.are_partners(name, each)]
            if not partners:
                continue
            private = keys.load(self._rebuild("mask_key", name))
            for other in partners:
                key = keys.pairwise_key(private, self.cohort[other].mask_key, self._agreed, self._state, name, other)
                removed.append((key, not other < name))
        masks.apply(self._total, removed)
        return decode(self._total, self.plan.encoding, self.plan.length)

    def _rebuild(self, kind: str, owner: str) -> bytes:
        """A survivor's self mask or a dropped site's private mask key."""
        dealt, found = self._dealt[owner], {}
        for holder in self.holders(owner) & set(self._opened):
            opened = self._opened[holder]
            share = (opened.self_masks if kind == "self_mask" else opened.mask_keys).get(owner)
            if share:
                found[holder] = share
        digests = dealt.self_mask_digests if kind == "self_mask" else dealt.mask_key_digests
        secret = self.rebuilt("unmask", kind, owner, found, digests)
        if not self._is_right(kind, owner, secret):
            raise BadPeer(f"{owner} dealt shares of its {kind} that do not belong together; nothing was decoded.")
        return secret

    def _is_right(self, kind: str, owner: str, secret: bytes) -> bool:
        if not secret:
            return False
        if kind == "mask_key":
            return keys.public_half(secret) == self.cohort[owner].mask_key
        return keys.commitment(self.plan.attempt, "seed", owner, "", secret) == self._dealt[owner].seed_digest

    # ------------------------------------------------------------ order

    def _enter(self, stage: str) -> None:
        if STAGES.index(stage) != STAGES.index(self.stage) + 1:
            raise OutOfOrder(f"Expected another stage after {self.stage}, found {stage}.")
        self.stage = stage
