"""What a round is to the study's flow, and its plain form: updates in the clear, added up by the server."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from common.config import StudyConfig
from common.messages import LocalUpdate, Refusal, Reply, TrainRequest
from server.aggregation import AggregateUpdate, GanState
from server.channel import MALFORMED, Channel

logger = logging.getLogger("synthward.server")


@dataclass(frozen=True)
class RoundOutcome:
    """What came of one attempt at a round.

    Args:
        update: the sum; None when it failed.
        answered: the sites whose update came.
        refusals: by site, the code of those that fell out, at whatever stage.
        failure: why there is no sum, in a sentence or two; "" when there is.
    """

    update: AggregateUpdate | None
    answered: tuple[str, ...] = ()
    refusals: Mapping[str, str] = field(default_factory=dict)
    failure: str = ""


class Rounds(Protocol):
    """A way of combining updates."""

    def run(self, state: GanState, before_training: Callable[[tuple[str, ...]], None]) -> RoundOutcome:
        """One attempt at the round after ``state``.

        Args:
            state: the shared state.
            before_training: called with the sites that are about to be asked to train.
        """
        ...


class PlainRounds:
    """Rounds whose updates the server sees one by one.

    Args:
        study: the study.
        channel: the network.
        sites: enrolled sites, name by node id.
    """

    def __init__(self, study: StudyConfig, channel: Channel, sites: Mapping[int, str]) -> None:
        self._study, self._channel, self._sites = study, channel, sites

    def run(self, state: GanState, before_training: Callable[[tuple[str, ...]], None]) -> RoundOutcome:
        """See Rounds. A site that fails, refuses, is late or sends a wrong shape is left out of this round."""
        number, length = state.round + 1, len(state.generator) + len(state.discriminator)
        names = tuple(sorted(self._sites.values()))
        before_training(names)
        request = TrainRequest(self._study.digest, number, state.generator, state.discriminator)
        updates: dict[str, LocalUpdate] = {}
        refusals: dict[str, str] = {}
        timeout = self._study.federation.round_timeout_seconds
        for node, reply in self._channel.ask(dict.fromkeys(self._sites, request), str(number), timeout):
            usable = _usable(reply, number, length)
            if isinstance(usable, LocalUpdate):
                updates[self._sites[node]] = usable
            else:
                refusals[self._sites[node]] = usable.code
                logger.warning("round %d: site %s takes no part: %s", number, self._sites[node], usable.code)
        minimum = self._study.federation.minimum_sites
        if len(updates) < minimum:
            failure = f"Round {number} needs updates of at least {minimum} sites, got {len(updates)}."
            return RoundOutcome(None, tuple(sorted(updates)), refusals, failure)
        answered = tuple(sorted(updates))
        total = np.zeros(length, np.float32)
        for _, update in sorted(updates.items()):
            total += update.vector
        return RoundOutcome(AggregateUpdate(total, answered), answered, refusals)


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
