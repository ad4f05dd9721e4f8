"""The site's side of a secure sum: one state machine, one method a stage, no files and no network.

Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning", figure 4 (active
adversary), with the neighbours of Bell et al. 2020. Each method checks what the server says, then answers; a check that
fails raises, and whoever drives the machine ends the attempt here.

**Guarantee.** The only thing that derives from this site's update is the masked vector of ``masked_input``. It is
uniformly random to everybody who lacks either this site's ``self_mask`` or one of its pairwise masks. This site opens,
for any one site, a share of the first or of the second, never both, once, and only after its own holders have signed
the same survivors. Masks cancel only between sites that were shown the same shared state. With h holders and threshold
t, nothing but the sum is learned by an honest server with t - 1 colluding holders, nor by an active one with 2t - h - 1
(a third of them): one more could sign two lists of survivors. From the sum everyone can subtract its own part: with two
or three sites, or after as many dropouts as the threshold allows, t - 1 colluders are left with one site's update.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.identity import Member
from common.errors import BadPeer, OutOfOrder, SiteError, TooFewSurvivors
from common.messages import (
    Confirmation,
    ConfirmSurvivorsRequest,
    MaskedInput,
    MaskedInputRequest,
    SealedShares,
    ShareKeysRequest,
    UnmaskRequest,
    UnmaskShares,
)
from common.secagg import keys, masks, neighbours, shares
from common.secagg.encoding import Encoding
from common.secagg.keys import AdvertisedKeys, Attempt, Transcript

STAGES = ("start", "advertise_keys", "share_keys", "masked_input", "confirm_survivors", "unmask")


@dataclass(repr=False)
class SiteRound:
    """One attempt at a secure sum, as one site lives it.

    Args:
        member: who the site is.
        attempt: the attempt.
        minimum_cohort: join no sum over fewer sites than this.
        stage: the last stage entered.
        share_private, mask_private, self_mask: this site's secrets of 32 bytes; empty before and after their time.
        pairwise: by neighbour, the key of the mask in common; empty before and after its time.
        cohort: advertised keys by site.
        checked: the sites whose signatures were verified.
        agreed: the transcript; None before ``share_keys``.
        picks: the others that hold this site's shares.
        held: by owner, the shares this site holds: of the self mask, then of the mask key.
        sharers: the sites that shared their keys.
        survivors: the sites whose masked input came.
    """

    member: Member
    attempt: Attempt
    minimum_cohort: int
    stage: str = STAGES[0]
    share_private: bytes = b""
    mask_private: bytes = b""
    self_mask: bytes = b""
    pairwise: dict[str, bytes] = field(default_factory=dict)
    cohort: dict[str, AdvertisedKeys] = field(default_factory=dict)
    checked: tuple[str, ...] = ()
    agreed: Transcript | None = None
    picks: tuple[str, ...] = ()
    held: dict[str, bytes] = field(default_factory=dict)
    sharers: tuple[str, ...] = ()
    survivors: tuple[str, ...] = ()

    # ------------------------------------------------------------ the stages

    def advertise_keys(self) -> AdvertisedKeys:
        """Make two fresh key pairs and sign their public halves."""
        self._enter("advertise_keys")
        self.share_private, self.mask_private = secrets.token_bytes(32), secrets.token_bytes(32)
        own = keys.advertise(
            self.member.identity,
            self.attempt,
            self.member.site,
            keys.public_half(self.share_private),
            keys.public_half(self.mask_private),
        )
        self.cohort = {self.member.site: own}
        return own

    def share_keys(self, request: ShareKeysRequest) -> SealedShares:
        """Check the cohort, draw the self mask, and deal shares of it and of the mask key.

        Raises:
            BadPeer: a site is not on the roster, twice in the list, badly signed, or this site's own keys were altered.
            TooFewSurvivors: the cohort is below the minimum.
        """
        self._enter("share_keys")
        own = self.cohort[self.member.site]
        cohort = {advertised.site: advertised for advertised in request.cohort}
        self._check_cohort(request, own, cohort)
        self.cohort = cohort
        self.picks = neighbours.pick(self.member.site, list(cohort), secrets.SystemRandom())
        self._check_signatures(self.picks)
        self._check_signatures(self._some_others())
        self.agreed = keys.make_transcript(self.attempt, self.member.roster.digest, request.cohort)
        self.self_mask = secrets.token_bytes(32)
        return self._deal()

    def open_shares(self, request: MaskedInputRequest) -> None:
        """Enter ``masked_input``: check and open what the others dealt. Nothing is trained before this succeeds.

        Raises:
            BadPeer: a list that no honest server makes, a degenerate key, or a share that was altered or replayed.
            TooFewSurvivors: too few sites, or too few of this site's holders, shared.
        """
        self._enter("masked_input")
        sharers = self._check_list(request.sharers, set(self.cohort))
        senders = set(request.sealed)
        if not senders <= sharers - {self.member.site}:
            raise BadPeer("Expected shares of other sites that shared their keys, found others.")
        self._check_signatures(tuple(sorted(senders - set(self.checked))))
        share_private, mask_private = keys.load(self.share_private), keys.load(self.mask_private)
        for sender, sealed in request.sealed.items():
            opened = keys.unseal(
                share_private,
                self.cohort[sender].share_key,
                self._transcript,
                sender,
                self.member.site,
                sealed,
            )
            if len(opened) != 2 * shares.SHARE_BYTES:
                raise BadPeer("Expected two shares in a sealed text, found another length.")
            self.held[sender] = opened
        state = request.train.digest
        for other in (set(self.picks) & sharers) | senders:
            shared = self.cohort[other].mask_key
            self.pairwise[other] = keys.pairwise_key(
                mask_private, shared, self._transcript, state, self.member.site, other
            )
        self.share_private = self.mask_private = b""
        self.sharers = tuple(sorted(sharers))

    def masked_input(self, vector: NDArray[np.float32], encoding: Encoding, number: int) -> tuple[MaskedInput, int]:
        """Encode and mask the update; then forget the secrets that made the masks.

        Args:
            vector: the weighted update, (dim,) float32.
            encoding: the study's.
            number: the round trained for.

        Returns:
            The message, and how many coordinates were clipped to the value range.

        Raises:
            OutOfOrder: the shares were not opened, or a vector was masked already.
            SiteError: the update is not finite.
        """
        if self.stage != "masked_input" or not self.sharers or not self.self_mask:
            raise OutOfOrder("Expected opened shares and no masked input yet.")
        site = self.member.site
        all_masks = [(keys.self_mask_key(self.self_mask, self._transcript, site), True)]
        all_masks += [(key, site < other) for other, key in self.pairwise.items()]  # what one adds, the other subtracts
        try:
            words, clipped = masks.masked(vector, encoding, all_masks, secrets.token_bytes(32))
        except ValueError:
            raise SiteError("The update is not finite.", "Lower the learning rates of the study.") from None
        self.self_mask, self.pairwise = b"", {}
        message = MaskedInput(
            self.attempt.study_digest, self.attempt.number, number, len(vector), encoding.modulus_bits, words
        )
        return message, clipped

    def confirm_survivors(self, request: ConfirmSurvivorsRequest) -> Confirmation:
        """Sign the survivors.

        Raises:
            OutOfOrder: no masked input was made.
            BadPeer: a survivor that never shared, one twice, or this site left out.
            TooFewSurvivors: too few sites, or too few of this site's holders, survive.
        """
        self._enter("confirm_survivors")
        if self.self_mask:
            raise OutOfOrder("Expected a masked input before the survivors.")
        self.survivors = tuple(sorted(self._check_list(request.survivors, set(self.sharers))))
        signed = keys.confirmed(self._transcript, self.survivors)
        return Confirmation(self.attempt.number, self.member.identity.sign(signed))

    def unmask(self, request: UnmaskRequest) -> UnmaskShares:
        """Open one share a site: of the self mask of a survivor, of the mask key of a dropped site.

        Raises:
            BadPeer: a signature that is not a survivor's over the same survivors.
            TooFewSurvivors: fewer than ``threshold`` of this site's holders confirmed.
        """
        self._enter("unmask")
        signed = keys.confirmed(self._transcript, self.survivors)
        for name, signature in request.confirmations.items():
            if name not in self.survivors:
                raise BadPeer("Expected confirmations of survivors, found another site's.")
            keys.check_signature(self.member.roster.sites[name], signature, signed)
        self._check_holders(set(request.confirmations) | {self.member.site}, "confirmed")
        size = shares.SHARE_BYTES
        self_masks = {owner: held[:size] for owner, held in self.held.items() if owner in self.survivors}
        mask_keys = {owner: held[size:] for owner, held in self.held.items() if owner not in self.survivors}
        self.held = {}
        return UnmaskShares(self.attempt.number, self_masks, mask_keys, None)

    @property
    def _transcript(self) -> Transcript:
        if self.agreed is None:
            raise OutOfOrder("Expected shared keys first.")
        return self.agreed

    # ------------------------------------------------------------ checks

    def _enter(self, stage: str) -> None:
        if STAGES.index(stage) != STAGES.index(self.stage) + 1:
            raise OutOfOrder(f"Expected another stage after {self.stage}, found {stage}.")
        self.stage = stage

    def _check_cohort(
        self, request: ShareKeysRequest, own: AdvertisedKeys, cohort: Mapping[str, AdvertisedKeys]
    ) -> None:
        if cohort.get(self.member.site) != own:
            raise BadPeer("Expected this site's own keys in the cohort, found others or none.")
        distinct = [{keys_of.share_key for keys_of in request.cohort}, {keys_of.mask_key for keys_of in request.cohort}]
        if any(len(found) < len(request.cohort) for found in (cohort, *distinct)):
            raise BadPeer("Expected every site and every key once in the cohort.")
        if not set(cohort) <= set(self.member.roster.sites):
            raise BadPeer("Expected sites of the pinned roster only in the cohort.")
        self._check_minimum(len(cohort))

    def _some_others(self) -> tuple[str, ...]:
        """Random others, so that with the picks at least ``minimum_cohort`` sites of the cohort are known genuine."""
        missing = self.minimum_cohort - 1 - len(self.checked)
        others = sorted(set(self.cohort) - set(self.checked) - {self.member.site})
        return tuple(secrets.SystemRandom().sample(others, missing)) if missing > 0 else ()

    def _check_signatures(self, names: tuple[str, ...]) -> None:
        for name in names:
            keys.check_advertised(self.cohort[name], self.attempt, self.member.roster.sites[name])
        self.checked += names

    def _check_list(self, names: tuple[str, ...], allowed: set[str]) -> set[str]:
        """The set of names: each once, all allowed, this site among them, enough of them and of its holders."""
        found = set(names)
        if len(found) < len(names) or not found <= allowed or self.member.site not in found:
            raise BadPeer("Expected a list of sites still taking part, this one among them, each once.")
        self._check_minimum(len(found))
        self._check_holders(found, "left")
        return found

    def _check_minimum(self, count: int) -> None:
        if count < self.minimum_cohort:
            raise TooFewSurvivors(f"Expected at least {self.minimum_cohort} sites in the sum, found {count}.")

    def _check_holders(self, names: set[str], what: str) -> None:
        holders = {*self.picks, self.member.site}
        threshold = neighbours.threshold_of(len(holders))
        if len(holders & names) < threshold:
            raise TooFewSurvivors(
                f"Expected {threshold} of this site's {len(holders)} holders {what}, found {len(holders & names)}."
            )

    # ------------------------------------------------------------ dealing

    def _deal(self) -> SealedShares:
        site, holders = self.member.site, sorted((*self.picks, self.member.site))
        point = {name: position for position, name in enumerate(sorted(self.cohort), start=1)}
        points, threshold = [point[name] for name in holders], neighbours.threshold_of(len(holders))
        dealt = {
            "self_mask": shares.split(self.self_mask, points, threshold),
            "mask_key": shares.split(self.mask_private, points, threshold),
        }
        digests: dict[str, dict[str, bytes]] = {
            kind: {name: keys.commitment(self.attempt, kind, site, name, by_point[point[name]]) for name in holders}
            for kind, by_point in dealt.items()
        }
        texts = {name: dealt["self_mask"][point[name]] + dealt["mask_key"][point[name]] for name in holders}
        self.held = {site: texts.pop(site)}
        share_private = keys.load(self.share_private)
        sealed = {
            name: keys.seal(share_private, self.cohort[name].share_key, self._transcript, site, name, text)
            for name, text in texts.items()
        }
        seed = keys.commitment(self.attempt, "seed", site, "", self.self_mask)
        return SealedShares(self.attempt.number, sealed, digests["self_mask"], digests["mask_key"], seed)

    # ------------------------------------------------------------ between two messages

    def to_tree(self) -> dict[str, Any]:
        """Everything but the member, as JSON can hold it. Secret: see ``client/round_file.py``."""
        return {
            "attempt": [self.attempt.study_digest, self.attempt.number],
            "minimum_cohort": self.minimum_cohort,
            "stage": self.stage,
            "secrets": [self.share_private.hex(), self.mask_private.hex(), self.self_mask.hex()],
            "pairwise": {other: key.hex() for other, key in self.pairwise.items()},
            "cohort": [
                [entry.site, entry.share_key.hex(), entry.mask_key.hex(), entry.signature.hex()]
                for entry in self.cohort.values()
            ],
            "checked": self.checked,
            "agreed": self.agreed.digest.hex() if self.agreed else "",
            "picks": self.picks,
            "held": {owner: held.hex() for owner, held in self.held.items()},
            "sharers": self.sharers,
            "survivors": self.survivors,
        }

    @classmethod
    def from_tree(cls, member: Member, tree: Mapping[str, Any]) -> "SiteRound":
        """The inverse of ``to_tree``."""
        attempt = Attempt(*tree["attempt"])
        share_private, mask_private, self_mask = (bytes.fromhex(text) for text in tree["secrets"])
        return cls(
            member,
            attempt,
            tree["minimum_cohort"],
            stage=tree["stage"],
            share_private=share_private,
            mask_private=mask_private,
            self_mask=self_mask,
            pairwise={other: bytes.fromhex(key) for other, key in tree["pairwise"].items()},
            cohort={site: AdvertisedKeys(site, *map(bytes.fromhex, entry)) for site, *entry in tree["cohort"]},
            checked=tuple(tree["checked"]),
            agreed=Transcript(attempt, bytes.fromhex(tree["agreed"])) if tree["agreed"] else None,
            picks=tuple(tree["picks"]),
            held={owner: bytes.fromhex(held) for owner, held in tree["held"].items()},
            sharers=tuple(tree["sharers"]),
            survivors=tuple(tree["survivors"]),
        )
