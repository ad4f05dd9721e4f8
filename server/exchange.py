"""The sites behind a channel, as secure sums and sessions ask them: who they are, their keys, and questions to some.

The keys of an attempt come with the last answers of the one before; only at the start, and after an attempt that
failed, is ``advertise_keys`` an exchange of its own.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from common.config import StudyConfig
from common.errors import BadPeer, OutOfOrder
from common.messages import AdvertiseKeysRequest, Enrolment, Refusal, Reply, Request
from common.secagg.encoding import Encoding
from common.secagg.keys import AdvertisedKeys, Attempt
from server.attempt import SumPlan, check_keys
from server.channel import MALFORMED, Channel

logger = logging.getLogger("synthward.server")
Takers = Mapping[type, Callable[[str, Any], None]]
"""By kind of answer, who takes it; raises BadPeer or OutOfOrder for one that does not fit."""


class Exchange:
    """The sites of one run, over all its attempts.

    Args:
        study: the study.
        channel: the network.
        enrolled: what each site said when it enrolled, by node id; all have the same roster.
    """

    def __init__(self, study: StudyConfig, channel: Channel, enrolled: Mapping[int, Enrolment]) -> None:
        self._study, self._channel = study, channel
        self._names = {node: site.site for node, site in enrolled.items()}
        self._nodes = {site.site: node for node, site in enrolled.items()}
        self._last_attempt = max(site.last_attempt for site in enrolled.values())
        self._plan = SumPlan(  # of no attempt yet: what is the same in all of them
            Attempt(study.digest, self._last_attempt),
            0,
            0,
            study.encoding,
            study.federation.minimum_sites,
            next(iter(enrolled.values())).roster_digest,
            {site.site: bytes.fromhex(site.identity) for site in enrolled.values()},
        )
        self._keys: dict[str, AdvertisedKeys] = {}  # on hand for the next attempt
        self._succeeded = False
        self._failed: set[str] = set()  # fell out of a failed attempt when asked for what takes long

    # ------------------------------------------------------------ attempts

    def begin(
        self, round_number: int, length: int, encoding: Encoding, refusals: dict[str, str]
    ) -> tuple[SumPlan, dict[str, AdvertisedKeys]]:
        """Begin the next attempt: its plan, and the keys of every site that has some.

        Args:
            round_number: what it is for.
            length: coordinates of each vector.
            encoding: of the sums.
            refusals: filled in, by site.
        """
        self._last_attempt += 1
        attempt = Attempt(self._study.digest, self._last_attempt)
        minimum = self._study.minimum_sites(round_number)
        plan = replace(
            self._plan,
            attempt=attempt,
            round=round_number,
            length=length,
            encoding=encoding,
            minimum_sites=minimum,
        )
        if not self._succeeded or len(self._keys) < minimum:
            self._collect_keys(plan, refusals)
        found, self._keys, self._succeeded, self._failed = self._keys, {}, False, set()
        return plan, found

    def end(self) -> None:
        """The attempt succeeded: the next one uses the keys that came with it."""
        self._succeeded, self._failed = True, set()

    def give_up(self) -> None:
        """The attempt failed."""
        # Keys of the next attempt may be out and lost, and no site serves a number twice: begin with the one after.
        self._last_attempt, self._keys = self._last_attempt + 1, {}

    def note_failed(self, names: set[str]) -> None:
        """These fell out when asked for what takes long: should the attempt fail, the next one begins without them."""
        self._failed |= names

    def next_round(self, round_number: int) -> int:
        """The round of training after this one, 0 for none."""
        return 0 if round_number >= self._study.total_rounds else round_number + 1

    def away(self, present: set[str], round_number: int) -> dict[str, Request]:
        """For sites that are not in the attempt, by name: that they give keys for the next one. None after the last."""
        following = self.next_round(round_number)
        if following == 0:
            return {}
        request = AdvertiseKeysRequest(self._study.digest, self._last_attempt + 1, following)
        return dict.fromkeys(sorted(set(self._nodes) - present), request)

    def take_next_keys(self, name: str, advertised: AdvertisedKeys | None) -> None:
        """A site's keys for the next attempt; None for none. Raises BadPeer for unusable ones."""
        if advertised is not None:
            following = replace(self._plan, attempt=Attempt(self._study.digest, self._last_attempt + 1))
            self._take_keys(following, name, advertised)

    def _collect_keys(self, plan: SumPlan, refusals: dict[str, str]) -> None:
        request = AdvertiseKeysRequest(plan.attempt.study_digest, plan.attempt.number, plan.round)
        left = set(self._nodes) - self._failed  # who failed in training would let the others train for nothing again
        asked = left if len(left) >= self._study.federation.minimum_sites else set(self._nodes)
        requests = {name: request for name in sorted(asked) if name not in self._keys}

        def take(name: str, advertised: AdvertisedKeys) -> None:
            self._take_keys(plan, name, advertised)

        self.ask(plan.round, "advertise_keys", requests, {AdvertisedKeys: take}, refusals)

    def _take_keys(self, plan: SumPlan, name: str, advertised: AdvertisedKeys) -> None:
        check_keys(advertised, name, plan, self._keys.values())
        self._keys[name] = advertised

    # ------------------------------------------------------------ a question

    def ask(
        self,
        round_number: int,
        stage: str,
        requests: Mapping[str, Request],
        takers: Takers,
        refusals: dict[str, str],
        until: set[str] | None = None,
        group: str | None = None,
    ) -> None:
        """Ask and take the answers as they come. A site that fails, refuses, is late or sends garbage falls out.

        Args:
            round_number: the round.
            stage: its name.
            requests: by site.
            takers: of the answers.
            refusals: filled in, by site.
            until: stop when these have answered; None for all.
            group: Flower's name for the question; given where sites are asked for what takes long, which then has the
                time of a round, not of a stage.
        """
        timeout = (
            self._study.secure_aggregation.stage_timeout_seconds
            if group is None
            else self._study.federation.round_timeout_seconds
        )
        open_questions = set(requests if until is None else until)
        asked = {self._nodes[name]: request for name, request in requests.items()}
        for node, reply in self._channel.ask(asked, group or f"{round_number}/{stage}", timeout):
            name = self._names[node]
            code = _refusal(reply, name, takers)
            if code:
                refusals.setdefault(name, code)  # a later one, to another question, does not say what the first cost
                logger.warning("round %d, %s: site %s takes no part: %s", round_number, stage, name, code)
            open_questions.discard(name)
            if not open_questions:
                break


def _refusal(reply: Reply, name: str, takers: Takers) -> str:
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
