"""The server's flow of one round: shared state out, local training, updates back."""

import logging
from dataclasses import dataclass

import numpy as np

from common.config import StudyConfig
from common.errors import TooFewSurvivors
from common.messages import LocalUpdate, Refusal, Reply, TrainRequest
from server.aggregation import GanState
from server.channel import MALFORMED, Channel

logger = logging.getLogger("synthward.server")


@dataclass(frozen=True)
class RoundAnswers:
    """What came back in one round.

    Args:
        updates: by site, what can be used.
        refusals: by site, the code of those who take no part this round.
        seconds: by site, wall-clock until the answer.
    """

    updates: dict[str, LocalUpdate]
    refusals: dict[str, str]
    seconds: dict[str, float]


def ask_sites(study: StudyConfig, channel: Channel, sites: dict[int, str], state: GanState) -> RoundAnswers:
    """Ask every site for one round of local training from ``state``.

    A site that fails, refuses, is late or sends a wrong shape is left out of this round and asked again in the next.

    Args:
        sites: enrolled sites, name by node id.
    """
    number = state.round + 1
    request = TrainRequest(study.digest, number, state.generator, state.discriminator)
    answers = channel.ask(dict.fromkeys(sites, request), str(number), study.federation.round_timeout_seconds)
    updates: dict[str, LocalUpdate] = {}
    refusals: dict[str, str] = {}
    for node, answer in sorted(answers.items()):
        usable = _usable(answer.reply, number, state)
        if isinstance(usable, LocalUpdate):
            updates[sites[node]] = usable
        else:
            refusals[sites[node]] = usable.code
            logger.warning("round %d: site %s takes no part: %s", number, sites[node], usable.code)
    return RoundAnswers(updates, refusals, {sites[node]: answer.seconds for node, answer in answers.items()})


def check_survivors(study: StudyConfig, number: int, answers: RoundAnswers) -> None:
    """Raise TooFewSurvivors when fewer updates came than ``federation.minimum_sites``."""
    if len(answers.updates) < study.federation.minimum_sites:
        codes = ", ".join(f"{site}: {code}" for site, code in sorted(answers.refusals.items()))
        raise TooFewSurvivors(
            f"Round {number} needs updates of at least {study.federation.minimum_sites} sites,"
            f" got {len(answers.updates)} ({codes or 'no site enrolled'}).",
            "Look into the log in the folders of the sites that are named, then resume the run.",
        )


def _usable(reply: Reply, number: int, state: GanState) -> LocalUpdate | Refusal:
    if isinstance(reply, Refusal):
        return reply
    fits = (
        isinstance(reply, LocalUpdate)
        and reply.round == number
        and reply.generator.shape == state.generator.shape
        and reply.discriminator.shape == state.discriminator.shape
        and bool(np.isfinite(reply.generator).all() and np.isfinite(reply.discriminator).all())
    )
    return reply if fits and isinstance(reply, LocalUpdate) else Refusal(MALFORMED)
