"""A round of ``local``: every site trains both networks, the server averages the updates."""

from common.config import StudyConfig
from common.messages import TrainRequest
from server.aggregation import AggregateUpdate, GanState, aggregate
from server.round import Charge, RoundOutcome, Sums, WantedSum


def local_round(study: StudyConfig, sums: Sums, state: GanState, charge: Charge) -> RoundOutcome:
    """One attempt at the round after ``state``."""
    request = TrainRequest(study.digest, state.round + 1, state.generator, state.discriminator)
    length = len(state.generator) + len(state.discriminator)
    found = sums.sum(WantedSum(request, length, study.encoding), charge)
    if found.total is None:
        return found.failed
    after = aggregate(study, state, AggregateUpdate(found.total, found.answered))
    return RoundOutcome(after, found.answered, found.refusals)
