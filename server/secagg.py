"""The server's side of a secure sum: one state machine, two methods a stage, no network.

For each stage: what to ask of whom, then ``take`` of each answer. An answer that does not fit raises BadPeer and its
site counts as dropped. Too few sites left for the next stage raise TooFewSurvivors: nothing is decoded.

The sum is kept as words and grows as masked inputs arrive, so that the server never holds more than one of them.
Nothing here has to be trusted: what a dishonest server could do instead is in ``client/secagg.py``.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from common.errors import BadPeer, OutOfOrder, TooFewSurvivors
from common.messages import (
    Confirmation,
    ConfirmSurvivorsRequest,
    MaskedInput,
    MaskedInputRequest,
    SealedShares,
    ShareKeysRequest,
    TrainRequest,
    UnmaskRequest,
    UnmaskShares,
)
from common.secagg import keys, masks, neighbours, shares
from common.secagg.encoding import Encoding, Floats, decode
from common.secagg.keys import AdvertisedKeys, Attempt

_PROBE = keys.load(bytes(range(32)))  # any private key: with a public one of small order it agrees on nothing
STAGES = ("start", "share_keys", "masked_input", "confirm_survivors", "unmask", "done")


@dataclass(frozen=True)
class SumPlan:
    """What is public about one secure sum.

    Args:
        attempt: the attempt.
        round: the round the sum is for.
        length: coordinates of the vector.
        encoding: the study's.
        minimum_sites: of the study.
        roster_digest: of the roster that the sites pinned.
        identities: by site, the public key it enrolled with.
    """

    attempt: Attempt
    round: int
    length: int
    encoding: Encoding
    minimum_sites: int
    roster_digest: str
    identities: Mapping[str, bytes]


class SecureSum:
    """One attempt at the sum of the vectors of ``cohort``.

    Args:
        plan: what is public about it.
        cohort: advertised keys by site, their signatures checked with ``check_keys``.
    """

    def __init__(self, plan: SumPlan, cohort: Mapping[str, AdvertisedKeys]) -> None:
        self.plan = plan
        self.stage = STAGES[0]
        self.cohort = dict(cohort)
        self._agreed = keys.make_transcript(plan.attempt, plan.roster_digest, cohort.values())
        self._dealt: dict[str, SealedShares] = {}  # by sharer
        self._state = ""  # digest of the request to train
        self._total = np.zeros(plan.encoding.num_words(plan.length), np.uint64)
        self._summed: set[str] = set()  # whose masked input is in the total
        self._confirmed: dict[str, bytes] = {}  # by site, its signature
        self._opened: dict[str, UnmaskShares] = {}  # by holder

    @property
    def sharers(self) -> tuple[str, ...]:
        """The sites that shared their keys."""
        return tuple(sorted(self._dealt))

    @property
    def survivors(self) -> tuple[str, ...]:
        """The sites in the sum."""
        return tuple(sorted(self._summed))

    # ------------------------------------------------------------ share_keys

    def share_keys_requests(self) -> dict[str, ShareKeysRequest]:
        """Enter ``share_keys``."""
        self._enter("share_keys")
        self._check_minimum("advertise_keys", self.cohort)
        attempt, cohort = self.plan.attempt, tuple(self.cohort[name] for name in sorted(self.cohort))
        request = ShareKeysRequest(attempt.study_digest, attempt.number, cohort)
        return dict.fromkeys(self.cohort, request)

    def take_sealed_shares(self, site: str, reply: SealedShares) -> None:
        """A site's dealt shares."""
        self._expect("share_keys", reply.attempt, site, self.cohort, self._dealt)
        receivers = set(reply.sealed)
        picks = neighbours.num_picks(len(self.cohort))
        if site in receivers or not receivers <= set(self.cohort) or len(receivers) != picks:
            raise BadPeer(f"Expected shares for {picks} other sites of the cohort from {site}.")
        if set(reply.self_mask_digests) != receivers | {site} or set(reply.mask_key_digests) != receivers | {site}:
            raise BadPeer(f"Expected a digest of every share from {site}.")
        self._dealt[site] = reply

    # ------------------------------------------------------------ masked_input

    def masked_input_requests(self, train: TrainRequest) -> dict[str, MaskedInputRequest]:
        """Enter ``masked_input``: to every sharer the shares that others sealed for it."""
        self._enter("masked_input")
        self._check_minimum("share_keys", self._dealt)
        self._check_holders("share_keys", self._dealt, self._dealt)
        self._state = train.digest
        return {
            name: MaskedInputRequest(
                self.plan.attempt.number,
                self.sharers,
                {sender: dealt.sealed[name] for sender, dealt in self._dealt.items() if name in dealt.sealed},
                train,
            )
            for name in self._dealt
        }

    def take_masked_input(self, site: str, reply: MaskedInput) -> None:
        """Add a site's masked vector to the total."""
        self._expect("masked_input", reply.attempt, site, self._dealt, self._summed)
        plan = self.plan
        for name, expected, found in (
            ("study", plan.attempt.study_digest, reply.study_digest),
            ("round", plan.round, reply.round),
            ("length", plan.length, reply.length),
            ("modulus_bits", plan.encoding.modulus_bits, reply.modulus_bits),
            ("number of words", len(self._total), len(reply.words)),
        ):
            if expected != found:
                raise BadPeer(f"Expected {name} {expected} in the masked input of {site}, found {found}.")
        self._total += reply.words
        self._summed.add(site)

    # ------------------------------------------------------------ confirm_survivors

    def confirm_requests(self) -> dict[str, ConfirmSurvivorsRequest]:
        """Enter ``confirm_survivors``."""
        self._enter("confirm_survivors")
        self._check_minimum("masked_input", self._summed)
        self._check_holders("masked_input", self._dealt, self._summed)
        attempt = self.plan.attempt
        return dict.fromkeys(
            self.survivors, ConfirmSurvivorsRequest(attempt.study_digest, attempt.number, self.survivors)
        )

    def take_confirmation(self, site: str, reply: Confirmation) -> None:
        """A site's signature over the survivors."""
        self._expect("confirm_survivors", reply.attempt, site, self._summed, self._confirmed)
        signed = keys.confirmed(self._agreed, self.survivors)
        keys.check_signature(self.plan.identities[site], reply.signature, signed)
        self._confirmed[site] = reply.signature

    # ------------------------------------------------------------ unmask

    def unmask_requests(self, another: bool = True) -> dict[str, UnmaskRequest]:
        """Enter ``unmask``: to every site that confirmed the signatures of its holders, as many as it needs.

        Args:
            another: whether the sites shall send keys for another attempt.
        """
        self._enter("unmask")
        self._check_holders("confirm_survivors", self._dealt, self._confirmed)
        attempt, requests = self.plan.attempt, {}
        for name in sorted(self._confirmed):
            others = sorted((self._holders(name) - {name}) & set(self._confirmed))
            needed = others[: self._threshold(name) - 1]
            signatures = {other: self._confirmed[other] for other in needed}
            requests[name] = UnmaskRequest(attempt.study_digest, attempt.number, signatures, another)
        return requests

    def take_unmask_shares(self, site: str, reply: UnmaskShares) -> None:
        """The shares that a site opens. A wrong one is passed over when the sum is unmasked."""
        self._expect("unmask", reply.attempt, site, self._confirmed, self._opened)
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
            partners = self._partners(name)
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
        dealt, points = self._dealt[owner], {name: at for at, name in enumerate(sorted(self.cohort), start=1)}
        digests = dealt.self_mask_digests if kind == "self_mask" else dealt.mask_key_digests
        right: dict[int, bytes] = {}
        for holder in sorted(self._holders(owner) & set(self._opened)):
            opened = self._opened[holder]
            share = (opened.self_masks if kind == "self_mask" else opened.mask_keys).get(owner)
            if share and keys.commitment(self.plan.attempt, kind, owner, holder, share) == digests[holder]:
                right[points[holder]] = share
            if len(right) == self._threshold(owner):
                break
        if len(right) < self._threshold(owner):
            self._too_few("unmask", f"{self._threshold(owner)} right shares of {owner}", len(right))
        try:
            secret = shares.rebuild(right)
        except ValueError:
            secret = b""
        if not self._is_right(kind, owner, secret):
            raise BadPeer(f"{owner} dealt shares of its {kind} that do not belong together; nothing was decoded.")
        return secret

    def _is_right(self, kind: str, owner: str, secret: bytes) -> bool:
        if not secret:
            return False
        if kind == "mask_key":
            return keys.public_half(secret) == self.cohort[owner].mask_key
        return keys.commitment(self.plan.attempt, "seed", owner, "", secret) == self._dealt[owner].seed_digest

    # ------------------------------------------------------------ who is who

    def _holders(self, owner: str) -> set[str]:
        return {*self._dealt[owner].sealed, owner}

    def _threshold(self, owner: str) -> int:
        return neighbours.threshold_of(len(self._holders(owner)))

    def _partners(self, dropped: str) -> list[str]:
        """The survivors whose masked input has a mask in common with a dropped site."""
        picked = self._dealt[dropped].sealed
        return [name for name in self.survivors if name in picked or dropped in self._dealt[name].sealed]

    # ------------------------------------------------------------ order

    def _enter(self, stage: str) -> None:
        if STAGES.index(stage) != STAGES.index(self.stage) + 1:
            raise OutOfOrder(f"Expected another stage after {self.stage}, found {stage}.")
        self.stage = stage

    def _check_minimum(self, stage: str, left: Collection[str]) -> None:
        if len(left) < self.plan.minimum_sites:
            self._too_few(stage, f"{self.plan.minimum_sites} sites", len(left))

    def _check_holders(self, stage: str, owners: Iterable[str], left: Collection[str]) -> None:
        """Whether those left can still open the secret of each owner that has a mask in the sum."""
        for owner in owners:
            holders = self._holders(owner)
            if len(holders & set(left)) < self._threshold(owner):
                needed = f"{self._threshold(owner)} of the {len(holders)} holders of a site's shares"
                self._too_few(stage, needed, len(holders & set(left)))

    def _expect(self, stage: str, number: int, site: str, asked: Iterable[str], answered: Iterable[str]) -> None:
        if self.stage != stage:
            raise OutOfOrder(f"Expected an answer to {self.stage}, found one to {stage}.")
        if site not in asked or site in answered:
            raise OutOfOrder(f"Expected one answer of {site} to {stage} at most, and only when it was asked.")
        if number != self.plan.attempt.number:
            raise BadPeer(f"Expected attempt {self.plan.attempt.number} from {site}, found {number}.")

    def _too_few(self, stage: str, needed: str, found: int) -> NoReturn:
        self.stage = STAGES[-1]  # nothing follows
        raise TooFewSurvivors(
            f"The secure sum of round {self.plan.round} ended after {stage}: it needs {needed}, {found} left."
        )


def check_keys(advertised: AdvertisedKeys, site: str, plan: SumPlan, others: Iterable[AdvertisedKeys] = ()) -> None:
    """Raise BadPeer unless these are usable keys of this site for this attempt: else all other sites would refuse.

    Args:
        advertised: what the site answered.
        site: the site.
        plan: of the attempt.
        others: keys of other sites.
    """
    if advertised.site != site:
        raise BadPeer(f"Expected keys of {site}, found another name.")
    for public in (advertised.share_key, advertised.mask_key):
        keys.agree(_PROBE, public)
    if any({advertised.share_key, advertised.mask_key} & {other.share_key, other.mask_key} for other in others):
        raise BadPeer(f"Expected keys of its own from {site}, found those of another site.")
    keys.check_advertised(advertised, plan.attempt, plan.identities[site])
