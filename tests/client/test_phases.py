"""Which phase a site takes a message for: that of its own copy of the study, whatever the server says."""

import pytest

from client.phases import phase_asked
from common.config import Algorithm
from common.errors import BadPeer
from tests.client.sites import study_of

STUDY = study_of(
    federation={
        "phase": [
            {"algorithm": "moments", "share": 0.5, "rounds": 2},
            {"algorithm": "joint", "share": 0.3, "steps": 40},
            {"algorithm": "local", "share": 0.2, "rounds": 2, "steps": 5},
        ]
    }
)


@pytest.mark.parametrize(("number", "index"), [(1, 0), (2, 0), (3, 1), (4, 2), (5, 2)])
def test_a_round_belongs_to_one_phase(number: int, index: int) -> None:
    phase = STUDY.phases[index]
    assert phase_asked(STUDY, number) is phase
    assert phase_asked(STUDY, number, phase.algorithm) is phase


@pytest.mark.parametrize("number", [-1, 0, 6, 2**60])
@pytest.mark.parametrize("algorithm", [None, "moments", "local"])
def test_a_round_that_the_study_does_not_have_is_no_honest_servers(number: int, algorithm: Algorithm | None) -> None:
    with pytest.raises(BadPeer, match=f"from 1 to 5, found {number}"):
        phase_asked(STUDY, number, algorithm)


@pytest.mark.parametrize(
    ("number", "algorithm"), [(1, "local"), (1, "joint"), (3, "moments"), (3, "local"), (4, "joint"), (5, "moments")]
)
def test_another_algorithm_than_the_phases_is_no_honest_servers(number: int, algorithm: Algorithm) -> None:
    with pytest.raises(BadPeer, match=f"asks for {algorithm} in round {number}, which is one of"):
        phase_asked(STUDY, number, algorithm)
