"""Sites with identities in memory, and a whole secure sum among them with sites that fall out at any stage."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from client.identity import Member
from client.secagg import SiteRound
from common.messages import TrainRequest
from common.secagg.encoding import Encoding, Words, encode
from common.secagg.keys import AdvertisedKeys, Attempt
from common.secagg.roster import make_roster
from server.secagg import SecureSum, SumPlan, check_keys

STUDY = "5d" * 32
ENCODING = Encoding(value_range=1.0, fraction_bits=15, modulus_bits=21)
NOTHING = np.zeros(0, np.float32)


def members_of(names: Sequence[str], minimum_cohort: int = 2) -> dict[str, Member]:
    """Every site with a key of its own; all hold the same roster."""
    identities = {name: Ed25519PrivateKey.generate() for name in names}
    roster = make_roster({name: identity.public_key().public_bytes_raw() for name, identity in identities.items()})
    return {name: Member(name, identity, roster, minimum_cohort) for name, identity in identities.items()}


def names_of(count: int) -> list[str]:
    """site-000, site-001, ..."""
    return [f"site-{number:03d}" for number in range(count)]


class Consortium:
    """Sites in one attempt, and the honest server's side of it.

    Args:
        names: the sites.
        length: coordinates of the vectors.
        encoding: of the sum.
        minimum: fewest sites, for the server and every site.
        number: of the attempt.
    """

    def __init__(
        self,
        names: Sequence[str],
        length: int,
        encoding: Encoding = ENCODING,
        minimum: int = 2,
        number: int = 1,
        members: Mapping[str, Member] | None = None,
    ) -> None:
        self.members = dict(members or members_of(names, minimum))
        roster = next(iter(self.members.values())).roster
        self.attempt = Attempt(STUDY, number)
        self.plan = SumPlan(self.attempt, 1, length, encoding, minimum, roster.digest, roster.sites)
        self.sites = {name: SiteRound(self.members[name], self.attempt, minimum) for name in names}
        self.keys: dict[str, AdvertisedKeys] = {}
        self.train = TrainRequest(STUDY, 1, NOTHING, NOTHING)

    def advertise(self, gone: Collection[str] = ()) -> SecureSum:
        """Everybody but ``gone`` advertises keys; the server begins a sum with them."""
        for name, site in self.sites.items():
            if name not in gone:
                self.keys[name] = site.advertise_keys()
                check_keys(self.keys[name], name, self.plan)
        return SecureSum(self.plan, self.keys)

    def share(self, server: SecureSum, gone: Collection[str] = ()) -> None:
        for name, request in server.share_keys_requests().items():
            if name not in gone:
                server.take_sealed_shares(name, self.sites[name].share_keys(request))

    def mask(self, server: SecureSum, vectors: Mapping[str, NDArray[np.float32]], gone: Collection[str] = ()) -> None:
        for name, request in server.masked_input_requests(self.train).items():
            if name not in gone:
                self.sites[name].open_shares(request)
                message, _ = self.sites[name].masked_input(vectors[name], self.plan.encoding, 1)
                server.take_masked_input(name, message)

    def confirm(self, server: SecureSum, gone: Collection[str] = ()) -> None:
        for name, request in server.confirm_requests().items():
            if name not in gone:
                server.take_confirmation(name, self.sites[name].confirm_survivors(request))

    def unmask(self, server: SecureSum, gone: Collection[str] = ()) -> None:
        for name, request in server.unmask_requests().items():
            if name not in gone:
                server.take_unmask_shares(name, self.sites[name].unmask(request))

    def total(
        self, vectors: Mapping[str, NDArray[np.float32]], drops: Mapping[str, Collection[str]] | None = None
    ) -> tuple[NDArray[np.float32], tuple[str, ...]]:
        """The decoded sum and whose vectors are in it; ``drops`` has the sites that fall out, by stage, for good."""
        drops, gone = drops or {}, set[str]()

        def lost(stage: str) -> set[str]:
            gone.update(drops.get(stage, ()))
            return gone

        server = self.advertise(lost("advertise_keys"))
        self.share(server, lost("share_keys"))
        self.mask(server, vectors, lost("masked_input"))
        self.confirm(server, lost("confirm_survivors"))
        self.unmask(server, lost("unmask"))
        return server.result(), server.survivors


def vectors_of(names: Sequence[str], length: int, seed: int = 0, scale: float = 0.3) -> dict[str, NDArray[np.float32]]:
    """A random vector a site, within the value range of 1."""
    random = np.random.default_rng(seed)
    return {name: (scale * random.uniform(-1, 1, length)).astype(np.float32) for name in names}


def encoded(vector: NDArray[np.float32], encoding: Encoding, coins: int | Words = 0) -> Words:
    """A vector's words without any mask. Coins of zeros round down, those of ones up."""
    words = np.empty(encoding.num_words(len(vector)), np.uint64)
    if isinstance(coins, int):
        coins = np.full((encoding.coin_words, len(words)), coins, np.uint64)
    encode(vector, encoding, 0, coins, words, np.empty((2, len(words)), np.uint64))
    return words


def lanes_of(words: Words, encoding: Encoding, length: int) -> NDArray[np.int64]:
    """The integers in the lanes of words, by coordinate: the lowest lane's with its sign, then what is left of it."""
    rest, unused, found = words.view(np.int64).copy(), 64 - encoding.modulus_bits, []
    for _ in range(encoding.lanes):
        lowest = (rest << unused) >> unused
        found.append(lowest)
        rest = (rest - lowest) >> encoding.modulus_bits
    return np.concatenate(found)[:length]
