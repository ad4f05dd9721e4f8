"""Which phase of the study a message of the server belongs to: a site does what its own copy of the study says."""

from common.config import Algorithm, PhaseConfig, StudyConfig
from common.errors import BadPeer


def phase_asked(study: StudyConfig, round_number: int, algorithm: Algorithm | None = None) -> PhaseConfig:
    """The phase of a round that the server names. Raises BadPeer for no such round, or one of another algorithm."""
    try:
        phase = study.phases[study.phase_number(round_number)]
    except ValueError as error:
        raise BadPeer(f"The server asks for a round that the study does not have: {error}.") from None
    if algorithm not in (None, phase.algorithm):
        raise BadPeer(f"The server asks for {algorithm} in round {round_number}, which is one of {phase.algorithm}.")
    return phase
