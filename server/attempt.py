"""What the server does alike in one secure sum and in a session of many: who is left, and secrets from shares."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, NoReturn, TypeVar

from common.errors import BadPeer, OutOfOrder, TooFewSurvivors
from common.messages import SealedSeeds, SealedShares
from common.secagg import keys, neighbours, shares
from common.secagg.encoding import Encoding
from common.secagg.keys import AdvertisedKeys, Attempt

_PROBE = keys.load(bytes(range(32)))  # any private key: with a public one of small order it agrees on nothing
DONE = "done"
D = TypeVar("D", SealedShares, SealedSeeds)


@dataclass(frozen=True)
class SumPlan:
    """What is public about one secure sum, or about each sum of a session.

    Args:
        attempt: the attempt.
        round: the round the sum is for.
        length: coordinates of the vector.
        encoding: of the sum.
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


class ServerAttempt(Generic[D]):
    """One attempt among sites; what it is for is in its subclasses.

    Args:
        plan: what is public about it.
        cohort: advertised keys by site, their signatures checked with ``check_keys``.
    """

    def __init__(self, plan: SumPlan, cohort: Mapping[str, AdvertisedKeys]) -> None:
        self.plan = plan
        self.stage = "start"
        self.cohort = dict(cohort)
        self._dealt: dict[str, D] = {}  # by sharer

    @property
    def sharers(self) -> tuple[str, ...]:
        """The sites that dealt shares."""
        return tuple(sorted(self._dealt))

    def check_dealt(self, site: str, sealed: Collection[str], digests: Iterable[Collection[str]]) -> None:
        """Raise BadPeer unless there are shares for as many holders as there must be, and a digest of each."""
        receivers, picks = set(sealed), neighbours.num_picks(len(self.cohort))
        if site in receivers or not receivers <= set(self.cohort) or len(receivers) != picks:
            raise BadPeer(f"Expected shares for {picks} other sites of the cohort from {site}.")
        if any(set(names) != receivers | {site} for names in digests):
            raise BadPeer(f"Expected a digest of every share from {site}.")

    def sealed_for(self, name: str, senders: Iterable[str]) -> dict[str, bytes]:
        """By sender, what these sealed for a site."""
        return {sender: self._dealt[sender].sealed[name] for sender in senders if name in self._dealt[sender].sealed}

    def check_masked(self, site: str, found: Mapping[str, object], num_words: int) -> None:
        """Raise BadPeer unless a masked vector has these facts, by name, and this many words."""
        plan = self.plan
        expected = {
            "study": plan.attempt.study_digest,
            "round": plan.round,
            "length": plan.length,
            "modulus_bits": plan.encoding.modulus_bits,
            "number of words": plan.encoding.num_words(plan.length),
        }
        for name, value in {**found, "number of words": num_words}.items():
            if expected[name] != value:
                raise BadPeer(f"Expected {name} {expected[name]} in the masked input of {site}, found {value}.")

    def confirmations_for(self, name: str, confirmed: Mapping[str, bytes]) -> dict[str, bytes]:
        """Signatures of a site's holders, as many as it needs beside its own."""
        others = sorted((self.holders(name) - {name}) & set(confirmed))
        return {other: confirmed[other] for other in others[: self.threshold(name) - 1]}

    def rebuilt(
        self, stage: str, kind: str, owner: str, found: Mapping[str, bytes], digests: Mapping[str, bytes]
    ) -> bytes:
        """The secret behind shares, wrong ones passed over; b"" when the right ones do not belong together.

        Args:
            stage: in which they were opened.
            kind: of the secret.
            owner: whose it is.
            found: by holder, its share.
            digests: by holder, that of the right one.

        Raises:
            TooFewSurvivors: too few right ones.
        """
        points = {name: at for at, name in enumerate(sorted(self.cohort), start=1)}
        threshold, right = self.threshold(owner), dict[int, bytes]()
        for holder in sorted(found):
            if len(right) == threshold:
                break
            if keys.commitment(self.plan.attempt, kind, owner, holder, found[holder]) == digests[holder]:
                right[points[holder]] = found[holder]
        if len(right) < threshold:
            self.too_few(stage, f"{threshold} right shares of {owner}", len(right))
        try:
            return shares.rebuild(right)
        except ValueError:
            return b""

    # ------------------------------------------------------------ who is who

    def holders(self, owner: str) -> set[str]:
        """Who holds shares of a site's secrets, itself included."""
        return {*self._dealt[owner].sealed, owner}

    def threshold(self, owner: str) -> int:
        """How many holders open a site's secrets."""
        return neighbours.threshold_of(len(self.holders(owner)))

    def are_partners(self, one: str, other: str) -> bool:
        """Whether two sharers have masks in common."""
        return other in self._dealt[one].sealed or one in self._dealt[other].sealed

    # ------------------------------------------------------------ order

    def check_minimum(self, stage: str, left: Collection[str]) -> None:
        """Raise TooFewSurvivors unless there are the study's fewest sites."""
        if len(left) < self.plan.minimum_sites:
            self.too_few(stage, f"{self.plan.minimum_sites} sites", len(left))

    def check_holders(self, stage: str, owners: Iterable[str], left: Collection[str]) -> None:
        """Raise TooFewSurvivors unless those left can still open the secret of each owner."""
        for owner in owners:
            holders = self.holders(owner)
            if len(holders & set(left)) < self.threshold(owner):
                needed = f"{self.threshold(owner)} of the {len(holders)} holders of a site's shares"
                self.too_few(stage, needed, len(holders & set(left)))

    def expect(self, stage: str, number: int, site: str, asked: Iterable[str], answered: Iterable[str]) -> None:
        """Raise unless this is the first answer of a site that was asked, at its stage and of this attempt."""
        if self.stage != stage:
            raise OutOfOrder(f"Expected an answer to {self.stage}, found one to {stage}.")
        if site not in asked or site in answered:
            raise OutOfOrder(f"Expected one answer of {site} to {stage} at most, and only when it was asked.")
        if number != self.plan.attempt.number:
            raise BadPeer(f"Expected attempt {self.plan.attempt.number} from {site}, found {number}.")

    def too_few(self, stage: str, needed: str, found: int) -> NoReturn:
        """End the attempt: nothing follows."""
        self.stage = DONE
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
