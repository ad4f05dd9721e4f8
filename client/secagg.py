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

from client.attempt import SiteAttempt, bytes_by_name, common_fields, hex_by_name
from client.identity import Member
from common.errors import OutOfOrder, SiteError
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
from common.secagg import keys, masks, shares
from common.secagg.encoding import Encoding, Floats, Integers, Words
from common.secagg.keys import AdvertisedKeys

STAGES = ("start", "advertise_keys", "share_keys", "masked_input", "confirm_survivors", "unmask")


@dataclass(repr=False)
class SiteRound(SiteAttempt):
    """One attempt at a secure sum, as one site lives it. ``held`` has shares of self masks, then of mask keys.

    Args:
        self_mask: this site's seed of 32 bytes; empty before and after its time.
        pairwise: by neighbour, the key of the mask in common; empty before and after its time.
        sharers: the sites that shared their keys.
        survivors: the sites whose masked input came.
    """

    self_mask: bytes = b""
    pairwise: dict[str, bytes] = field(default_factory=dict)
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
        self.join(request.cohort)
        self.agreed = keys.make_transcript(self.attempt, self.member.roster.digest, request.cohort)
        self.self_mask = secrets.token_bytes(32)
        texts, digests = self.deal({"self_mask": self.self_mask, "mask_key": self.mask_private})
        self.held = {self.member.site: texts.pop(self.member.site)}
        seed = keys.commitment(self.attempt, "seed", self.member.site, "", self.self_mask)
        return SealedShares(self.attempt.number, self.seal(texts), digests["self_mask"], digests["mask_key"], seed)

    def open_shares(self, request: MaskedInputRequest) -> None:
        """Enter ``masked_input``: check and open what the others dealt. Nothing is trained before this succeeds.

        Raises:
            BadPeer: a list that no honest server makes, a degenerate key, or a share that was altered or replayed.
            TooFewSurvivors: too few sites, or too few of this site's holders, shared.
        """
        self._enter("masked_input")
        sharers = self.check_list(request.sharers, self.cohort)
        self.unseal(request.sealed, sharers, num_shares=2)
        mask_private = keys.load(self.mask_private)
        state = request.work.digest
        for other in (set(self.picks) & sharers) | set(request.sealed):
            shared = self.cohort[other].mask_key
            self.pairwise[other] = keys.pairwise_key(
                mask_private, shared, self.transcript, state, self.member.site, other
            )
        self.share_private = self.mask_private = b""
        self.sharers = tuple(sorted(sharers))

    def masked_input(self, vector: Floats | Integers, encoding: Encoding, number: int) -> tuple[MaskedInput, int]:
        """Encode and mask the update; then forget the secrets that made the masks.

        Args:
            vector: the weighted update, (dim,) float32; or integers, (dim,) int64, which are masked as they are.
            encoding: of the sum.
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
        all_masks = [(keys.self_mask_key(self.self_mask, self.transcript, site), True)]
        all_masks += [(key, site < other) for other, key in self.pairwise.items()]  # what one adds, the other subtracts
        clipped = 0
        if vector.dtype == np.int64:
            words = masks.masked_integers(np.asarray(vector, np.int64), encoding, all_masks)
        else:
            words, clipped = self._masked_floats(np.asarray(vector, np.float32), encoding, all_masks)
        self.self_mask, self.pairwise = b"", {}
        message = MaskedInput(
            self.attempt.study_digest, self.attempt.number, number, len(vector), encoding.modulus_bits, words
        )
        return message, clipped

    def _masked_floats(self, vector: Floats, encoding: Encoding, all_masks: list[masks.Mask]) -> tuple[Words, int]:
        try:
            return masks.masked(vector, encoding, all_masks, secrets.token_bytes(32))
        except ValueError:
            raise SiteError("The update is not finite.", "Lower the learning rates of the study.") from None

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
        self.survivors = tuple(sorted(self.check_list(request.survivors, self.sharers)))
        signed = keys.confirmed(self.transcript, self.survivors)
        return Confirmation(self.attempt.number, self.member.identity.sign(signed))

    def unmask(self, request: UnmaskRequest) -> UnmaskShares:
        """Open one share a site: of the self mask of a survivor, of the mask key of a dropped site.

        Raises:
            BadPeer: a signature that is not a survivor's over the same survivors.
            TooFewSurvivors: fewer than ``threshold`` of this site's holders confirmed.
        """
        self._enter("unmask")
        signed = keys.confirmed(self.transcript, self.survivors)
        self.check_confirmations(request.confirmations, self.survivors, signed)
        size = shares.SHARE_BYTES
        self_masks = {owner: held[:size] for owner, held in self.held.items() if owner in self.survivors}
        mask_keys = {owner: held[size:] for owner, held in self.held.items() if owner not in self.survivors}
        self.held = {}
        return UnmaskShares(self.attempt.number, self_masks, mask_keys, None)

    def _enter(self, stage: str) -> None:
        if STAGES.index(stage) != STAGES.index(self.stage) + 1:
            raise OutOfOrder(f"Expected another stage after {self.stage}, found {stage}.")
        self.stage = stage

    # ------------------------------------------------------------ between two messages

    def to_tree(self) -> dict[str, Any]:
        """Everything but the member, as JSON can hold it. Secret: see ``client/round_file.py``."""
        return {
            **self.common_tree(),
            "self_mask": self.self_mask.hex(),
            "pairwise": hex_by_name(self.pairwise),
            "sharers": self.sharers,
            "survivors": self.survivors,
        }

    @classmethod
    def from_tree(cls, member: Member, tree: Mapping[str, Any]) -> "SiteRound":
        """The inverse of ``to_tree``."""
        return cls(
            member,
            **common_fields(tree),
            self_mask=bytes.fromhex(tree["self_mask"]),
            pairwise=bytes_by_name(tree["pairwise"]),
            sharers=tuple(tree["sharers"]),
            survivors=tuple(tree["survivors"]),
        )
