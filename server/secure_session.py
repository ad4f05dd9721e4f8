"""The server's flow of a session: one exchange to begin it, then three for each sum, in order.

A step is ``begin_step`` (the sites compute), ``confirm_step`` and ``open_step``; ``open_seeds`` follows when a survivor
did not open the step, and after the last one, whose answers bring the keys of the next attempt. A site that falls out
joins again in the next session: those away are asked for their keys during the last step.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from common.errors import OutOfOrder, ProtocolError
from common.messages import Confirmation, MaskedStep, OpenedSeeds, OpenedStep, Request, SealedSeeds, Vector
from common.secagg.keys import AdvertisedKeys
from server.exchange import Exchange, Takers
from server.round import Charge, StepSum, WantedSession
from server.secagg_session import SecureSteps

logger = logging.getLogger("synthward.server")


def open_session(
    exchange: Exchange, wanted: WantedSession, charge: Charge, refusals: dict[str, str]
) -> "SecureSession":
    """Agree on keys for a session.

    Args:
        exchange: the sites.
        wanted: its sums.
        charge: called before the first step, with the sites that are about to be asked for it.
        refusals: filled in, until the session is over: by site, the code of those that fell out.

    Raises:
        TooFewSurvivors: too few sites.
    """
    plan, found = exchange.begin(wanted.round, wanted.length, wanted.encoding, refusals)
    session = SecureSession(exchange, SecureSteps(plan, wanted.steps, found), charge, refusals)
    session.share_seed()
    return session


class SecureSession:
    """Sums of one round, of which the server learns nothing else; see ``open_session``.

    After a ProtocolError it is over. Whoever needs no more sums lets it go: the next attempt ends it at the sites.
    """

    def __init__(self, exchange: Exchange, steps: SecureSteps, charge: Charge, refusals: dict[str, str]) -> None:
        self._exchange, self._steps, self._charge, self._refusals = exchange, steps, charge, refusals
        self._over, self._answered = False, set[str]()

    @property
    def answered(self) -> tuple[str, ...]:
        """See Session."""
        return tuple(sorted(self._answered))

    @property
    def survivors(self) -> tuple[str, ...]:
        """The sites whose integers of the newest step came."""
        return self._steps.survivors

    def step(self, discriminator: Vector) -> StepSum:
        """The next sum.

        Args:
            discriminator: the shared state, flat float32.

        Raises:
            TooFewSurvivors: too few sites, or what a site that fell out leaves behind cannot be removed.
            BadPeer: a site that fell out dealt wrong shares.
            OutOfOrder: the session is over.

            Nothing of this step is decoded.
        """
        if self._over:
            raise OutOfOrder("Expected a session that is not over.", "Open another.")
        with self._until_it_fails():
            self._begin_step(discriminator)
            self._confirm_step()
            self._open_step()
            self._open_seeds()
            total = self._steps.result()
        if self._steps.is_last:
            self._over = True
            self._exchange.end()
        return StepSum(total, self.survivors)

    # ------------------------------------------------------------ the exchanges

    def share_seed(self) -> None:
        """The first exchange. Raises TooFewSurvivors."""
        with self._until_it_fails():
            takers: Takers = {SealedSeeds: self._steps.take_sealed_seeds}
            self._ask("share_seed", self._steps.share_seed_requests(), takers)

    def _begin_step(self, discriminator: Vector) -> None:
        steps, number = self._steps, self._steps.plan.round
        computing = steps.step_requests(discriminator)
        if steps.step == 1:
            self._charge(steps.sharers)
        away: dict[str, Request] = self._exchange.away(set(computing), number) if steps.is_last else {}
        takers: Takers = {
            MaskedStep: steps.take_masked_step,
            AdvertisedKeys: self._exchange.take_next_keys,
        }
        group, asked = f"{number}/{steps.step}", set(computing)
        self._exchange.ask(number, "begin_step", away | computing, takers, self._refusals, asked, group)
        self._answered.update(steps.survivors)
        self._exchange.note_failed(asked - set(steps.survivors))

    def _confirm_step(self) -> None:
        takers: Takers = {Confirmation: self._steps.take_confirmation}
        self._ask("confirm_step", self._steps.confirm_requests(), takers)

    def _open_step(self) -> None:
        takers: Takers = {OpenedStep: self._steps.take_opened_step}
        self._ask("open_step", self._steps.open_requests(), takers)

    def _open_seeds(self) -> None:
        steps = self._steps

        def take(name: str, reply: OpenedSeeds) -> None:
            steps.take_opened_seeds(name, reply)
            self._exchange.take_next_keys(name, reply.next_keys)

        if steps.missing or steps.is_last:
            requests = steps.open_seeds_requests(self._exchange.next_round(steps.plan.round))
            self._ask("open_seeds", requests, {OpenedSeeds: take})

    def _ask(self, stage: str, requests: Any, takers: Takers) -> None:
        self._exchange.ask(self._steps.plan.round, stage, requests, takers, self._refusals)

    @contextmanager
    def _until_it_fails(self) -> Iterator[None]:
        try:
            yield
        except ProtocolError as error:
            logger.warning("round %d, step %d: %s", self._steps.plan.round, self._steps.step, error)
            self._over = True
            self._exchange.give_up()
            raise
