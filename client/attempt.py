"""What a site does alike in one secure sum and in a session of many: the cohort, its signatures, dealt shares."""

import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from client.identity import Member
from common.errors import BadPeer, OutOfOrder, TooFewSurvivors
from common.secagg import keys, neighbours, shares
from common.secagg.keys import AdvertisedKeys, Attempt, Transcript


@dataclass(repr=False)
class SiteAttempt:
    """One attempt among sites that the server names, as one site lives it; what it is for is in its subclasses.

    Args:
        member: who the site is.
        attempt: the attempt.
        minimum_cohort: join no sum over fewer sites than this.
        stage: the last stage entered.
        share_private, mask_private: this site's private keys of 32 bytes; empty before and after their time.
        cohort: advertised keys by site.
        checked: the sites whose signatures were verified.
        agreed: the transcript; None before the cohort is known.
        picks: the others that hold this site's shares.
        held: by owner, the shares this site holds.
    """

    member: Member
    attempt: Attempt
    minimum_cohort: int
    stage: str = "start"
    share_private: bytes = b""
    mask_private: bytes = b""
    cohort: dict[str, AdvertisedKeys] = field(default_factory=dict)
    checked: tuple[str, ...] = ()
    agreed: Transcript | None = None
    picks: tuple[str, ...] = ()
    held: dict[str, bytes] = field(default_factory=dict)

    @property
    def transcript(self) -> Transcript:
        """What the sites agreed on. Raises OutOfOrder before they did."""
        if self.agreed is None:
            raise OutOfOrder("Expected shared keys first.")
        return self.agreed

    # ------------------------------------------------------------ the cohort

    def join(self, entries: Collection[AdvertisedKeys]) -> None:
        """Check the cohort, then pick this site's holders from it.

        Raises:
            BadPeer: a site is not on the roster, twice in the list, badly signed, or this site's own keys were altered.
            TooFewSurvivors: the cohort is below the minimum.
        """
        own, cohort = self.cohort[self.member.site], {advertised.site: advertised for advertised in entries}
        if cohort.get(self.member.site) != own:
            raise BadPeer("Expected this site's own keys in the cohort, found others or none.")
        distinct = [{keys_of.share_key for keys_of in entries}, {keys_of.mask_key for keys_of in entries}]
        if any(len(found) < len(entries) for found in (cohort, *distinct)):
            raise BadPeer("Expected every site and every key once in the cohort.")
        if not set(cohort) <= set(self.member.roster.sites):
            raise BadPeer("Expected sites of the pinned roster only in the cohort.")
        self.check_minimum(len(cohort))
        self.cohort = cohort
        self.picks = neighbours.pick(self.member.site, list(cohort), secrets.SystemRandom())
        self.check_signatures(self.picks)
        self.check_signatures(self._some_others())

    def _some_others(self) -> tuple[str, ...]:
        """Random others, so that with the picks at least ``minimum_cohort`` sites of the cohort are known genuine."""
        missing = self.minimum_cohort - 1 - len(self.checked)
        others = sorted(set(self.cohort) - set(self.checked) - {self.member.site})
        return tuple(secrets.SystemRandom().sample(others, missing)) if missing > 0 else ()

    # ------------------------------------------------------------ dealing

    def deal(self, owned: Mapping[str, bytes]) -> tuple[dict[str, bytes], dict[str, dict[str, bytes]]]:
        """Share secrets among this site's holders.

        Args:
            owned: 32 bytes each, by kind.

        Returns:
            By holder, itself included, its shares one after the other; and by kind and holder, their digests.
        """
        site, holders = self.member.site, sorted((*self.picks, self.member.site))
        point = {name: position for position, name in enumerate(sorted(self.cohort), start=1)}
        points, threshold = [point[name] for name in holders], neighbours.threshold_of(len(holders))
        dealt = {kind: shares.split(secret, points, threshold) for kind, secret in owned.items()}
        digests = {
            kind: {name: keys.commitment(self.attempt, kind, site, name, by_point[point[name]]) for name in holders}
            for kind, by_point in dealt.items()
        }
        return {name: b"".join(by_point[point[name]] for by_point in dealt.values()) for name in holders}, digests

    def seal(self, texts: Mapping[str, bytes]) -> dict[str, bytes]:
        """A text for each holder, so that nobody else can read it."""
        private = keys.load(self.share_private)
        return {
            name: keys.seal(private, self.cohort[name].share_key, self.transcript, self.member.site, name, text)
            for name, text in texts.items()
        }

    def unseal(self, sealed: Mapping[str, bytes], senders: Collection[str], num_shares: int) -> None:
        """Open and hold what others dealt; check the signatures of senders that were not checked yet.

        Args:
            sealed: by sender.
            senders: who may have sent.
            num_shares: in each text.

        Raises:
            BadPeer: another sender, or a share that was altered or replayed.
        """
        if not set(sealed) <= set(senders) - {self.member.site}:
            raise BadPeer("Expected shares of other sites that shared their keys, found others.")
        self.check_signatures(tuple(sorted(set(sealed) - set(self.checked))))
        private = keys.load(self.share_private)
        for sender, text in sealed.items():
            public = self.cohort[sender].share_key
            opened = keys.unseal(private, public, self.transcript, sender, self.member.site, text)
            if len(opened) != num_shares * shares.SHARE_BYTES:
                raise BadPeer("Expected so many shares in a sealed text, found another length.")
            self.held[sender] = opened

    # ------------------------------------------------------------ checks

    def check_signatures(self, names: tuple[str, ...]) -> None:
        """Raise BadPeer unless these sites signed the keys they are said to have."""
        for name in names:
            keys.check_advertised(self.cohort[name], self.attempt, self.member.roster.sites[name])
        self.checked += names

    def check_list(self, names: tuple[str, ...], allowed: Collection[str]) -> set[str]:
        """The set of names: each once, all allowed, this site among them, enough of them and of its holders."""
        found = set(names)
        if len(found) < len(names) or not found <= set(allowed) or self.member.site not in found:
            raise BadPeer("Expected a list of sites still taking part, this one among them, each once.")
        self.check_minimum(len(found))
        self.check_holders(found, "left")
        return found

    def check_confirmations(
        self, confirmations: Mapping[str, bytes], survivors: Collection[str], signed: bytes
    ) -> None:
        """Raise BadPeer for a signature that is not a survivor's, TooFewSurvivors unless enough holders signed."""
        for name, signature in confirmations.items():
            if name not in survivors:
                raise BadPeer("Expected confirmations of survivors, found another site's.")
            keys.check_signature(self.member.roster.sites[name], signature, signed)
        self.check_holders({*confirmations, self.member.site}, "confirmed")

    def check_minimum(self, count: int) -> None:
        """Raise TooFewSurvivors for fewer sites than this site wants beside itself."""
        if count < self.minimum_cohort:
            raise TooFewSurvivors(f"Expected at least {self.minimum_cohort} sites in the sum, found {count}.")

    def check_holders(self, names: set[str], what: str) -> None:
        """Raise TooFewSurvivors unless the threshold of this site's holders are among these."""
        holders = {*self.picks, self.member.site}
        threshold = neighbours.threshold_of(len(holders))
        if len(holders & names) < threshold:
            raise TooFewSurvivors(
                f"Expected {threshold} of this site's {len(holders)} holders {what}, found {len(holders & names)}."
            )

    # ------------------------------------------------------------ between two messages

    def common_tree(self) -> dict[str, Any]:
        """The fields that every attempt has, but the member, as JSON can hold them. Secret."""
        return {
            "attempt": [self.attempt.study_digest, self.attempt.number],
            "minimum_cohort": self.minimum_cohort,
            "stage": self.stage,
            "private": [self.share_private.hex(), self.mask_private.hex()],
            "cohort": [
                [entry.site, entry.share_key.hex(), entry.mask_key.hex(), entry.signature.hex()]
                for entry in self.cohort.values()
            ],
            "checked": self.checked,
            "agreed": self.agreed.digest.hex() if self.agreed else "",
            "picks": self.picks,
            "held": hex_by_name(self.held),
        }


def common_fields(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``common_tree``: arguments by name."""
    attempt = Attempt(*tree["attempt"])
    share_private, mask_private = (bytes.fromhex(text) for text in tree["private"])
    return {
        "attempt": attempt,
        "minimum_cohort": tree["minimum_cohort"],
        "stage": tree["stage"],
        "share_private": share_private,
        "mask_private": mask_private,
        "cohort": {site: AdvertisedKeys(site, *map(bytes.fromhex, entry)) for site, *entry in tree["cohort"]},
        "checked": tuple(tree["checked"]),
        "agreed": Transcript(attempt, bytes.fromhex(tree["agreed"])) if tree["agreed"] else None,
        "picks": tuple(tree["picks"]),
        "held": bytes_by_name(tree["held"]),
    }


def hex_by_name(values: Mapping[str, bytes]) -> dict[str, str]:
    """Bytes as JSON can hold them."""
    return {name: value.hex() for name, value in values.items()}


def bytes_by_name(values: Mapping[str, str]) -> dict[str, bytes]:
    """The inverse of ``hex_by_name``."""
    return {name: bytes.fromhex(value) for name, value in values.items()}
