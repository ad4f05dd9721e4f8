"""What a round is to the study's flow, and sums in their plain form: parts in the clear, added up by the server."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from common.config import StudyConfig
from common.errors import TooFewSurvivors
from common.messages import JointRequest, LocalUpdate, Refusal, Reply, Vector, Work
from common.secagg.encoding import Encoding, Integers
from server.aggregation import GanState
from server.channel import MALFORMED, Channel

logger = logging.getLogger("synthward.server")
Charge = Callable[[tuple[str, ...]], None]
"""Called with the sites that are about to be asked for something that they charge."""


@dataclass(frozen=True)
class RoundOutcome:
    """What came of one attempt at a round.

    Args:
        state: the shared state after it; None when it failed.
        answered: the sites whose part came.
        refusals: by site, the code of those that fell out, at whatever stage.
        failure: why there is no sum, in a sentence or two; "" when there is.
        facts: of the round, for its line in ``metrics.jsonl``.
    """

    state: GanState | None
    answered: tuple[str, ...] = ()
    refusals: Mapping[str, str] = field(default_factory=dict)
    failure: str = ""
    facts: Mapping[str, float | int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class WantedSum:
    """A sum over the sites.

    Args:
        work: what each is asked for.
        length: coordinates.
        encoding: of each site's part, where it travels as integers.
    """

    work: Work
    length: int
    encoding: Encoding


@dataclass(frozen=True)
class SumOutcome:
    """What came of one attempt at a sum: (length,) float32 in ``total``, None when it failed; see RoundOutcome."""

    total: Vector | None
    answered: tuple[str, ...] = ()
    refusals: Mapping[str, str] = field(default_factory=dict)
    failure: str = ""

    @property
    def failed(self) -> RoundOutcome:
        """The round that failed with this sum."""
        return RoundOutcome(None, self.answered, self.refusals, self.failure)


@dataclass(frozen=True)
class WantedSession:
    """Sums over the sites, one after the other.

    Args:
        round: what they are for.
        steps: how many, at least 1.
        length: coordinates of each.
        encoding: of each.
    """

    round: int
    steps: int
    length: int
    encoding: Encoding


@dataclass(frozen=True)
class StepSum:
    """The sum of one step.

    Args:
        total: (length,) int64.
        survivors: whose integers are in it.
    """

    total: Integers
    survivors: tuple[str, ...]


class Sums(Protocol):
    """A way of adding up what the sites send."""

    def sum(self, wanted: WantedSum, charge: Charge) -> SumOutcome:
        """One attempt at a sum."""
        ...

    def session(self, wanted: WantedSession, charge: Charge, refusals: dict[str, str]) -> "Session":
        """Begin the sums of a round of ``joint``.

        Args:
            wanted: the sums.
            charge: called before the first step, with the sites that are about to be asked for it.
            refusals: filled in until the session is over: by site, the code of those that fell out.

        Raises:
            ProtocolError: it cannot begin.
        """
        ...


class Session(Protocol):
    """The sums of a round of ``joint``."""

    @property
    def answered(self) -> tuple[str, ...]:
        """The sites whose part of any step came, of one that failed as well: they have charged the round."""
        ...

    def step(self, discriminator: Vector) -> StepSum:
        """The next sum. Raises ProtocolError when there is none; then the session is over."""
        ...


class PlainSums:
    """Sums whose parts the server sees one by one.

    Args:
        study: the study.
        channel: the network.
        sites: enrolled sites, name by node id.
    """

    def __init__(self, study: StudyConfig, channel: Channel, sites: Mapping[int, str]) -> None:
        self._study, self._channel, self._sites = study, channel, sites

    def sum(self, wanted: WantedSum, charge: Charge) -> SumOutcome:
        """See Sums. A site that fails, refuses, is late or sends a wrong shape is left out of this sum."""
        charge(tuple(sorted(self._sites.values())))
        return self.ask(wanted.work, wanted.length)

    def session(self, wanted: WantedSession, charge: Charge, refusals: dict[str, str]) -> "PlainSession":
        """See Sums."""
        charge(tuple(sorted(self._sites.values())))
        return PlainSession(self, self._study.digest, wanted, refusals)

    def ask(self, work: Work | JointRequest, length: int) -> SumOutcome:
        """The sum of the answers to a request."""
        number, names = work.round, self._sites
        updates: dict[str, LocalUpdate] = {}
        refusals: dict[str, str] = {}
        timeout = self._study.federation.round_timeout_seconds
        for node, reply in self._channel.ask(dict.fromkeys(names, work), str(number), timeout):
            usable = _usable(reply, number, length)
            if isinstance(usable, LocalUpdate):
                updates[names[node]] = usable
            else:
                refusals[names[node]] = usable.code
                logger.warning("round %d: site %s takes no part: %s", number, names[node], usable.code)
        minimum, answered = self._study.minimum_sites(number), tuple(sorted(updates))
        if len(updates) < minimum:
            failure = f"Round {number} needs updates of at least {minimum} sites, got {len(updates)}."
            return SumOutcome(None, answered, refusals, failure)
        total = np.zeros(length, np.float32)
        for name in answered:
            total += updates[name].vector
        return SumOutcome(total, answered, refusals)


class PlainSession:
    """A session in the clear: every step is a sum of its own."""

    def __init__(self, sums: PlainSums, study_digest: str, wanted: WantedSession, refusals: dict[str, str]) -> None:
        self._sums, self._study_digest, self._wanted, self._refusals = sums, study_digest, wanted, refusals
        self._made, self._answered = 0, set[str]()

    @property
    def answered(self) -> tuple[str, ...]:
        """See Session."""
        return tuple(sorted(self._answered))

    def step(self, discriminator: Vector) -> StepSum:
        """See Session."""
        self._made += 1
        request = JointRequest(self._study_digest, self._wanted.round, self._made, discriminator)
        found = self._sums.ask(request, self._wanted.length)
        self._answered.update(found.answered)
        self._refusals |= {**found.refusals, **self._refusals}  # the first: see Exchange.ask
        if found.total is None:
            raise TooFewSurvivors(found.failure)
        steps = np.rint(found.total * 2.0**self._wanted.encoding.fraction_bits)
        return StepSum(steps.astype(np.int64), found.answered)


def _usable(reply: Reply, number: int, length: int) -> LocalUpdate | Refusal:
    if isinstance(reply, Refusal):
        return reply
    fits = (
        isinstance(reply, LocalUpdate)
        and reply.round == number
        and reply.vector.shape == (length,)
        and bool(np.isfinite(reply.vector).all())
    )
    return reply if fits and isinstance(reply, LocalUpdate) else Refusal(MALFORMED)
