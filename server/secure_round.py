"""The server's flow of rounds under secure aggregation: the messages of each attempt, in order.

A round is four exchanges: ``share_keys``, ``masked_input`` (with training), ``confirm_survivors``, ``unmask``. The keys
of an attempt come with the answers to ``unmask`` of the one before; only at the start, and after an attempt that
failed, is ``advertise_keys`` an exchange of its own. A site that was away is asked for its keys while the others train.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from common.config import StudyConfig
from common.errors import BadPeer, OutOfOrder, ProtocolError
from common.messages import (
    AdvertiseKeysRequest,
    Confirmation,
    Enrolment,
    MaskedInput,
    Refusal,
    Reply,
    Request,
    SealedShares,
    TrainRequest,
    UnmaskShares,
)
from common.secagg.keys import AdvertisedKeys, Attempt
from server.aggregation import AggregateUpdate, GanState
from server.channel import MALFORMED, Channel
from server.round import RoundOutcome
from server.secagg import SecureSum, SumPlan, check_keys

logger = logging.getLogger("synthward.server")


class SecureRounds:
    """Rounds whose updates the server learns the sum of, and nothing else.

    Args:
        study: the study.
        channel: the network.
        enrolled: what each site said when it enrolled, by node id; all have the same roster.
    """

    def __init__(self, study: StudyConfig, channel: Channel, enrolled: Mapping[int, Enrolment]) -> None:
        self._study, self._channel = study, channel
        self._names = {node: site.site for node, site in enrolled.items()}
        self._nodes = {site.site: node for node, site in enrolled.items()}
        self._identities = {site.site: bytes.fromhex(site.identity) for site in enrolled.values()}
        self._roster_digest = next(iter(enrolled.values())).roster_digest
        self._last_attempt = max(site.last_attempt for site in enrolled.values())
        self._keys: dict[str, AdvertisedKeys] = {}  # on hand for the next attempt
        self._succeeded = False
        self._failed: set[str] = set()  # fell out of a failed attempt when asked to train

    def run(self, state: GanState, before_training: Callable[[tuple[str, ...]], None]) -> RoundOutcome:
        """See Rounds."""
        plan = self._plan(state, self._last_attempt + 1)
        self._last_attempt += 1
        refusals: dict[str, str] = {}
        if not self._succeeded or len(self._keys) < self._study.federation.minimum_sites:
            self._collect_keys(plan, refusals)
        self._failed = set()
        secure_sum, self._keys, self._succeeded = SecureSum(plan, self._keys), {}, False
        try:
            self._share_keys(secure_sum, refusals)
            self._masked_input(secure_sum, state, before_training, refusals)
            self._confirm_survivors(secure_sum, refusals)
            self._unmask(secure_sum, state, refusals)
            total = secure_sum.result()
        except ProtocolError as error:
            logger.warning("round %d: %s", plan.round, error)
            # Keys of the next attempt may be out and lost, and no site serves a number twice: begin with the one after.
            self._last_attempt, self._keys = self._last_attempt + 1, {}
            return RoundOutcome(None, secure_sum.survivors, refusals, str(error))
        self._succeeded, self._failed = True, set()
        return RoundOutcome(AggregateUpdate(total, secure_sum.survivors), secure_sum.survivors, refusals)

    # ------------------------------------------------------------ the exchanges

    def _collect_keys(self, plan: SumPlan, refusals: dict[str, str]) -> None:
        request = AdvertiseKeysRequest(plan.attempt.study_digest, plan.attempt.number)
        left = set(self._nodes) - self._failed  # who failed in training would let the others train for nothing again
        asked = left if len(left) >= self._study.federation.minimum_sites else set(self._nodes)
        requests = {name: request for name in sorted(asked) if name not in self._keys}
        self._exchange(plan, "advertise_keys", requests, {AdvertisedKeys: self._taker(plan)}, refusals)

    def _share_keys(self, secure_sum: SecureSum, refusals: dict[str, str]) -> None:
        requests = secure_sum.share_keys_requests()
        self._exchange(secure_sum.plan, "share_keys", requests, {SealedShares: secure_sum.take_sealed_shares}, refusals)

    def _masked_input(
        self,
        secure_sum: SecureSum,
        state: GanState,
        before_training: Callable[[tuple[str, ...]], None],
        refusals: dict[str, str],
    ) -> None:
        plan = secure_sum.plan
        train = TrainRequest(self._study.digest, plan.round, state.generator, state.discriminator)
        training = secure_sum.masked_input_requests(train)
        before_training(secure_sum.sharers)
        following = self._plan(state, plan.attempt.number + 1)
        back = AdvertiseKeysRequest(following.attempt.study_digest, following.attempt.number)
        # Those away may be back for the next attempt. They are asked first: their answer is quick, training is not.
        away = sorted(set(self._nodes) - set(self._keys) - set(training))
        requests: dict[str, Request] = {**dict.fromkeys(away, back), **training}
        takers: dict[type, Callable[[str, Any], None]] = {
            MaskedInput: secure_sum.take_masked_input,
            AdvertisedKeys: self._taker(following),
        }
        self._exchange(plan, "masked_input", requests, takers, refusals, until=set(secure_sum.sharers))
        self._failed = set(secure_sum.sharers) - set(secure_sum.survivors)

    def _confirm_survivors(self, secure_sum: SecureSum, refusals: dict[str, str]) -> None:
        requests = secure_sum.confirm_requests()
        self._exchange(
            secure_sum.plan, "confirm_survivors", requests, {Confirmation: secure_sum.take_confirmation}, refusals
        )

    def _unmask(self, secure_sum: SecureSum, state: GanState, refusals: dict[str, str]) -> None:
        following = self._plan(state, secure_sum.plan.attempt.number + 1)
        take_keys = self._taker(following)

        def take(name: str, reply: UnmaskShares) -> None:
            secure_sum.take_unmask_shares(name, reply)
            if reply.next_keys is not None:
                take_keys(name, reply.next_keys)

        requests = secure_sum.unmask_requests(another=secure_sum.plan.round < self._study.federation.rounds)
        self._exchange(secure_sum.plan, "unmask", requests, {UnmaskShares: take}, refusals)

    def _exchange(
        self,
        plan: SumPlan,
        stage: str,
        requests: Mapping[str, Request],
        takers: Mapping[type, Callable[[str, Any], None]],
        refusals: dict[str, str],
        until: set[str] | None = None,
    ) -> None:
        """Ask and take the answers as they come. A site that fails, refuses, is late or sends garbage falls out.

        Args:
            plan: of the attempt.
            stage: its name.
            requests: by site.
            takers: by kind of answer, who takes it; raises ProtocolError for one that does not fit.
            refusals: filled in, by site.
            until: stop when these have answered; None for all.
        """
        training = stage == "masked_input"
        timeout = (
            self._study.federation.round_timeout_seconds
            if training
            else self._study.secure_aggregation.stage_timeout_seconds
        )
        group = str(plan.round) if training else f"{plan.round}/{stage}"
        open_questions = set(requests if until is None else until)
        answers = self._channel.ask({self._nodes[name]: request for name, request in requests.items()}, group, timeout)
        for node, reply in answers:
            name = self._names[node]
            code = _refusal(reply, name, takers)
            if code:
                refusals[name] = code
                logger.warning("round %d, %s: site %s takes no part: %s", plan.round, stage, name, code)
            open_questions.discard(name)
            if not open_questions:
                break

    def _taker(self, plan: SumPlan) -> Callable[[str, AdvertisedKeys], None]:
        def take(name: str, advertised: AdvertisedKeys) -> None:
            check_keys(advertised, name, plan, self._keys.values())
            self._keys[name] = advertised

        return take

    def _plan(self, state: GanState, number: int) -> SumPlan:
        return SumPlan(
            Attempt(self._study.digest, number),
            state.round + 1,
            len(state.generator) + len(state.discriminator),
            self._study.encoding,
            self._study.federation.minimum_sites,
            self._roster_digest,
            self._identities,
        )


def _refusal(reply: Reply, name: str, takers: Mapping[type, Callable[[str, Any], None]]) -> str:
    """The code of a reply that cannot be used, "" for one that was taken."""
    if isinstance(reply, Refusal):
        return reply.code
    take = takers.get(type(reply))
    if take is None:
        return MALFORMED
    try:
        take(name, reply)
    except (BadPeer, OutOfOrder) as error:
        logger.warning("%s", error)
        return MALFORMED
    return ""
