"""The server's flow of one secure sum: the messages of each attempt, in order.

A sum is four exchanges: ``share_keys``, ``masked_input`` (with training), ``confirm_survivors``, ``unmask``. The keys
of the next attempt come with the answers to ``unmask``; a site that was away is asked for its keys while the others
train.
"""

import logging
from collections.abc import Mapping

from common.config import StudyConfig
from common.errors import ProtocolError
from common.messages import Confirmation, Enrolment, MaskedInput, Request, SealedShares, UnmaskShares
from common.secagg.keys import AdvertisedKeys
from server.channel import Channel
from server.exchange import Exchange, Takers
from server.round import Charge, SumOutcome, WantedSession, WantedSum
from server.secagg import SecureSum
from server.secure_session import SecureSession, open_session

logger = logging.getLogger("synthward.server")


class SecureSums:
    """Sums of which the server learns nothing else.

    Args:
        study: the study.
        channel: the network.
        enrolled: what each site said when it enrolled, by node id; all have the same roster.
    """

    def __init__(self, study: StudyConfig, channel: Channel, enrolled: Mapping[int, Enrolment]) -> None:
        self.exchange = Exchange(study, channel, enrolled)

    def sum(self, wanted: WantedSum, charge: Charge) -> SumOutcome:
        """See Sums."""
        refusals: dict[str, str] = {}
        plan, found = self.exchange.begin(wanted.work.round, wanted.length, wanted.encoding, refusals)
        secure_sum = SecureSum(plan, found)
        try:
            self._share_keys(secure_sum, refusals)
            self._masked_input(secure_sum, wanted, charge, refusals)
            self._confirm_survivors(secure_sum, refusals)
            self._unmask(secure_sum, refusals)
            total = secure_sum.result()
        except ProtocolError as error:
            logger.warning("round %d: %s", plan.round, error)
            self.exchange.give_up()
            return SumOutcome(None, secure_sum.survivors, refusals, str(error))
        self.exchange.end()
        return SumOutcome(total, secure_sum.survivors, refusals)

    def session(self, wanted: WantedSession, charge: Charge, refusals: dict[str, str]) -> SecureSession:
        """See Sums."""
        return open_session(self.exchange, wanted, charge, refusals)

    # ------------------------------------------------------------ the exchanges

    def _share_keys(self, secure_sum: SecureSum, refusals: dict[str, str]) -> None:
        takers: Takers = {SealedShares: secure_sum.take_sealed_shares}
        self.exchange.ask(secure_sum.plan.round, "share_keys", secure_sum.share_keys_requests(), takers, refusals)

    def _masked_input(self, secure_sum: SecureSum, wanted: WantedSum, charge: Charge, refusals: dict[str, str]) -> None:
        number = secure_sum.plan.round
        training = secure_sum.masked_input_requests(wanted.work)
        charge(secure_sum.sharers)
        # Those away may be back for the next attempt. They are asked first: their answer is quick, training is not.
        requests: dict[str, Request] = {**self.exchange.away(set(training), number), **training}
        takers: Takers = {
            MaskedInput: secure_sum.take_masked_input,
            AdvertisedKeys: self.exchange.take_next_keys,
        }
        self.exchange.ask(number, "masked_input", requests, takers, refusals, set(training), group=str(number))
        self.exchange.note_failed(set(training) - set(secure_sum.survivors))

    def _confirm_survivors(self, secure_sum: SecureSum, refusals: dict[str, str]) -> None:
        takers: Takers = {Confirmation: secure_sum.take_confirmation}
        self.exchange.ask(secure_sum.plan.round, "confirm_survivors", secure_sum.confirm_requests(), takers, refusals)

    def _unmask(self, secure_sum: SecureSum, refusals: dict[str, str]) -> None:
        def take(name: str, reply: UnmaskShares) -> None:
            secure_sum.take_unmask_shares(name, reply)
            self.exchange.take_next_keys(name, reply.next_keys)

        number = secure_sum.plan.round
        requests = secure_sum.unmask_requests(self.exchange.next_round(number))
        self.exchange.ask(number, "unmask", requests, {UnmaskShares: take}, refusals)
