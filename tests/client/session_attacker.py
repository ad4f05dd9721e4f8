"""A server without scruples in a session: it keeps every answer and removes every mask whose key it can come by."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.identity import Member
from client.secagg import SiteRound
from client.secagg_session import SiteSession
from common.errors import FederationError, OutOfOrder
from common.messages import (
    AdvertiseKeysRequest,
    Confirmation,
    ConfirmStepRequest,
    JointRequest,
    MaskedStep,
    OpenedSeeds,
    OpenedStep,
    OpenSeedsRequest,
    OpenStepRequest,
    Refusal,
    Reply,
    SealedSeeds,
    ShareSeedRequest,
    StepRequest,
)
from common.secagg import keys, masks, shares
from common.secagg.encoding import Integers, Words, decode_integers
from common.secagg.keys import AdvertisedKeys, Attempt, Step, Transcript
from tests.client.attacker import TOO_UNEVEN, uniformity
from tests.consortium import STUDY, members_of
from tests.session_consortium import INTEGERS, discriminator_of

STAGES = ("advertise_keys", "share_seed", "begin_step", "confirm_step", "open_step")


class SessionMachines:
    """SiteSession objects in memory. A refusal ends the session, as ``client/round_file.py`` does it.

    Args:
        names: the sites.
        minimum: fewest sites of a sum.
        steps: of the session.
        length: coordinates of the integers.
        members: who the sites are; new ones when None.
    """

    def __init__(
        self,
        names: Sequence[str],
        minimum: int = 2,
        steps: int = 3,
        length: int = 4000,
        members: Mapping[str, Member] | None = None,
    ) -> None:
        self.study_digest, self.names, self.minimum = STUDY, tuple(names), minimum
        self.steps, self.length = steps, length
        self.members = dict(members or members_of(names, minimum))
        self.sites: dict[str, SiteRound | SiteSession] = {}

    def values(self, name: str, step: int) -> Integers:
        """What a site sums in a step: small, so that a vector without its masks is far from uniform."""
        return np.random.default_rng([self.names.index(name), step]).integers(-50, 50, self.length)

    def ask(self, name: str, request: Any) -> Reply:
        site = self.sites.get(name)
        if isinstance(request, AdvertiseKeysRequest):
            self.sites[name] = SiteRound(self.members[name], Attempt(STUDY, request.attempt), self.minimum)
        elif site is not None and request.attempt != site.attempt.number:
            return Refusal(OutOfOrder.code)
        try:
            return self._answer(name, request)
        except FederationError as error:
            self.sites.pop(name, None)
            return Refusal(error.code)

    def _answer(self, name: str, request: Any) -> Reply:
        if name not in self.sites:
            raise OutOfOrder("in no attempt")
        site = self.sites[name]
        if isinstance(request, AdvertiseKeysRequest):
            assert isinstance(site, SiteRound)
            return site.advertise_keys()
        if isinstance(site, SiteRound):
            site = self.sites[name] = SiteSession.after(site)
        match request:
            case ShareSeedRequest():
                return site.share_seed(request)
            case StepRequest():
                site.begin_step(request)
                return site.masked_step(self.values(name, request.step), INTEGERS)
            case ConfirmStepRequest():
                return site.confirm_step(request)
            case OpenStepRequest():
                return site.open_step(request)
            case OpenSeedsRequest():
                return site.open_seeds(request)
        raise AssertionError(request)

    def identity(self, name: str) -> Ed25519PrivateKey:
        return self.members[name].identity

    def roster_digest(self) -> str:
        return next(iter(self.members.values())).roster.digest

    def trees(self) -> dict[str, dict[str, Any]]:
        """Every session as it is, to go back to."""
        return {name: site.to_tree() for name, site in self.sites.items() if isinstance(site, SiteSession)}

    def back_to(self, trees: Mapping[str, dict[str, Any]]) -> None:
        self.sites = {name: SiteSession.from_tree(self.members[name], tree) for name, tree in trees.items()}


class SessionAttacker:
    """The server's side of one session. Left alone it is honest; every request can be made otherwise.

    Args:
        sites: the sites.
        number: of the attempt.
        colluders: sites whose every secret the server reads, and in whose name it signs.
    """

    def __init__(self, sites: SessionMachines, number: int = 1, colluders: Sequence[str] = ()) -> None:
        self.sites, self.number, self.colluders = sites, number, tuple(colluders)
        self.keys: dict[str, AdvertisedKeys] = {}
        self.dealt: dict[str, SealedSeeds] = {}
        self.masked: dict[tuple[int, str], tuple[Step, MaskedStep]] = {}  # by step and site
        self.confirmed: dict[tuple[int, str], tuple[tuple[str, ...], bytes]] = {}  # by step and site
        self.opened: dict[tuple[int, str], OpenedStep] = {}
        self.pool: set[bytes] = set()  # every key that was ever opened
        self.shares: dict[str, dict[str, bytes]] = {}  # by owner and holder, given or read from a colluder
        self.seeds: dict[str, bytes] = {}  # of colluders
        self.secrets: dict[frozenset[str], bytes] = {}  # of pairs with a colluder

    # ------------------------------------------------------------ what it asks

    def ask(self, name: str, request: Any) -> Reply:
        """Ask, keep the answer, and read the colluders' secrets before and after."""
        self._read(name)
        reply = self.sites.ask(name, request)
        self._read(name)
        match reply:
            case AdvertisedKeys():
                self.keys[name] = reply
            case SealedSeeds():
                self.dealt[name] = reply
            case MaskedStep():
                participants = tuple(sorted(request.participants))
                step = Step(self.transcript, request.step, request.work.digest, participants)
                self.masked[request.step, name] = step, reply
            case Confirmation():
                self.confirmed[request.step, name] = request.survivors, reply.signature
            case OpenedStep():
                self.opened[request.step, name] = reply
                self.pool |= {reply.self_key, *reply.pair_keys.values()}
            case OpenedSeeds():
                for owner, share in reply.shares.items():
                    self.shares.setdefault(owner, {})[name] = share
        return reply

    def walk(
        self,
        last: tuple[int, str],
        first: tuple[int, str] = (0, STAGES[0]),
        names: Sequence[str] | None = None,
        asked: Sequence[str] | None = None,
    ) -> None:
        """Walk honestly from one (step, stage) to another; ``names`` take part, and of them ``asked`` are asked."""
        where = [(0, "advertise_keys"), (0, "share_seed")]
        where += [(step, stage) for step in range(1, self.sites.steps + 1) for stage in STAGES[2:]]
        for step, stage in where[where.index(first) : where.index(last) + 1]:
            for name in asked or names or self.sites.names:
                reply = self.ask(name, self.request(step, stage, name, names))
                assert not isinstance(reply, Refusal), (step, stage, name, reply)

    def request(self, step: int, stage: str, name: str, names: Sequence[str] | None = None) -> Any:
        """What an honest server asks this site, when ``names`` take part."""
        names = tuple(names or self.sites.names)
        match stage:
            case "advertise_keys":
                return AdvertiseKeysRequest(STUDY, self.number, 1)
            case "share_seed":
                return self.share_seed([self.keys[each] for each in names if each in self.keys])
            case "begin_step":
                return self.step(step, name, [each for each in names if each in self.dealt])
            case "confirm_step":
                return self.confirm(step, [each for each in names if (step, each) in self.masked])
            case _:
                return self.open(step, [each for each in names if (step, each) in self.confirmed])

    def share_seed(self, cohort: Sequence[AdvertisedKeys]) -> ShareSeedRequest:
        return ShareSeedRequest(STUDY, self.number, 1, self.sites.steps, tuple(cohort))

    def step(self, step: int, name: str, participants: Sequence[str], state: int | None = None) -> StepRequest:
        dealt = {each: self.dealt[each].sealed for each in participants if each != name and each in self.dealt}
        sealed = {each: texts[name] for each, texts in dealt.items() if name in texts} if step == 1 else {}
        work = JointRequest(STUDY, 1, step, discriminator_of(step if state is None else state))
        return StepRequest(self.number, tuple(participants), sealed, work)

    def confirm(self, step: int, survivors: Sequence[str]) -> ConfirmStepRequest:
        return ConfirmStepRequest(STUDY, self.number, step, tuple(survivors))

    def open(self, step: int, names: Iterable[str]) -> OpenStepRequest:
        return OpenStepRequest(STUDY, self.number, step, {name: self.confirmed[step, name][1] for name in names})

    def seeds_of(self, step: int, owners: Sequence[str], next_round: int = 0) -> OpenSeedsRequest:
        return OpenSeedsRequest(STUDY, self.number, step, tuple(owners), next_round)

    def refused(self, name: str, request: Any, code: str) -> None:
        """The site refuses with this code."""
        reply = self.ask(name, request)
        assert reply == Refusal(code), f"expected {code}, found {reply}"

    def sign(self, colluder: str, step: Step, survivors: Sequence[str]) -> bytes:
        """A colluder's signature over whatever list."""
        return self.sites.identity(colluder).sign(step.confirmed(survivors))

    # ------------------------------------------------------------ what it knows

    @property
    def transcript(self) -> Transcript:
        """What everybody agreed on, when all were shown the true keys."""
        attempt, digest = Attempt(STUDY, self.number), self.sites.roster_digest()
        return keys.session_transcript(attempt, digest, self.keys.values(), 1, self.sites.steps)

    def seed_of(self, owner: str) -> bytes | None:
        """A site's seed, when a colluder's or when the shares at hand give it."""
        if owner in self.seeds:
            return self.seeds[owner]
        point = {name: position for position, name in enumerate(sorted(self.keys), start=1)}
        try:
            seed = shares.rebuild({point[name]: share for name, share in self.shares.get(owner, {}).items()})
        except ValueError:
            return None
        right = keys.commitment(self.transcript.attempt, "session_seed", owner, "", seed)
        return seed if right == self.dealt[owner].seed_digest else None

    def unknown(self, step_number: int, victim: str) -> tuple[Words, list[str]]:
        """A masked vector without every mask whose key is known, and the masks that stay ("" for the self mask)."""
        step, message = self.masked[step_number, victim]
        pool, seed = set(self.pool), self.seed_of(victim)
        if seed:
            pool.add(step.self_key(seed, victim))
        for pair, secret in self.secrets.items():
            if victim in pair:
                pool.add(step.pair_key(secret, *pair))
        found = {step.commitment(victim, other, key): key for key in pool for other in ("", *message.key_digests)}
        removed, left = [], []
        for name, digest in message.key_digests.items():
            other = "" if name == victim else name
            if digest in found:
                removed.append((found[digest], not (victim < other) if other else False))
            else:
                left.append(other)
        total = message.words.copy()
        masks.apply(total, removed)
        return total, left

    def finds(self, step: int, victim: str) -> bool:
        """Whether the victim's integers of a step lie open."""
        words, _ = self.unknown(step, victim)
        return bool((decode_integers(words, INTEGERS, self.sites.length) == self.sites.values(victim, step)).all())

    def assert_hidden(self, victim: str) -> None:
        """In every step a mask stays that no opened key removes, and what is left of the vector is uniform."""
        for step, name in self.masked:
            if name == victim:
                words, left = self.unknown(step, victim)
                assert left, f"step {step} of {victim} lies open"
                assert not self.finds(step, victim)
                if self.sites.length >= 1000:
                    assert uniformity(words) > TOO_UNEVEN

    def assert_nothing_is_left(self, victim: str) -> None:
        """The victim's session is over, whatever is asked, and every vector of it is hidden."""
        assert victim not in self.sites.sites
        for step in range(1, self.sites.steps + 1):
            for stage in STAGES[2:]:
                self.refused(victim, self.request(step, stage, victim), "out_of_order")
            self.refused(victim, self.seeds_of(step, [n for n in self.sites.names if n != victim]), "out_of_order")
        self.assert_hidden(victim)

    def _read(self, name: str) -> None:
        site = self.sites.sites.get(name)
        if name not in self.colluders or not isinstance(site, SiteSession):
            return
        if site.seed:
            self.seeds[name] = site.seed
        for owner, share in site.held.items():
            self.shares.setdefault(owner, {})[name] = share
        for other, secret in site.pair_secrets.items():
            self.secrets[frozenset((name, other))] = secret
