from dataclasses import replace

import numpy as np
import pytest

from common.errors import TooFewSurvivors
from common.messages import Enrolment, LocalUpdate, Refusal, Reply, TrainRequest
from server.aggregation import GanState
from server.round import ask_sites, check_survivors
from tests.server.scripted import Scripted, honest, two_sites

STUDY = two_sites()
STATE = GanState(1, np.zeros(5, np.float32), np.zeros(3, np.float32), np.zeros(5, np.float32))
SITES = {2: "north", 3: "south"}


def test_every_site_is_asked_for_the_next_round_from_this_state() -> None:
    seen: list[TrainRequest] = []

    def train(request: TrainRequest) -> Reply:
        seen.append(request)
        return honest(STUDY, request)

    answers = ask_sites(STUDY, Scripted(STUDY, train={2: train, 3: train}), SITES, STATE)
    assert set(answers.updates) == {"north", "south"}
    assert answers.refusals == {}
    assert answers.seconds == {"north": 0.25, "south": 0.25}
    assert [(r.round, r.study_digest) for r in seen] == [(2, STUDY.digest)] * 2
    assert seen[0].generator is STATE.generator


def of(request: TrainRequest) -> LocalUpdate:
    return honest(STUDY, request)


WRONG = {
    "a refusal keeps its code": (lambda r: Refusal("site"), "site"),
    "another kind of message": (lambda r: Enrolment("north", "", False), "malformed"),
    "another round": (lambda r: replace(of(r), round=1), "malformed"),
    "a short generator": (lambda r: replace(of(r), generator=np.zeros(4, np.float32)), "malformed"),
    "a long discriminator": (lambda r: replace(of(r), discriminator=np.zeros(4, np.float32)), "malformed"),
    "a NaN": (lambda r: replace(of(r), generator=np.array([0, 0, np.nan, 0, 0], np.float32)), "malformed"),
    "an infinity": (lambda r: replace(of(r), discriminator=np.array([0, 0, -np.inf], np.float32)), "malformed"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_reply_that_does_not_fit_is_left_out(case: str) -> None:
    reply, code = WRONG[case]
    answers = ask_sites(STUDY, Scripted(STUDY, train={3: reply}), SITES, STATE)
    assert set(answers.updates) == {"north"}
    assert answers.refusals == {"south": code}


def test_too_few_survivors_names_who_is_missing() -> None:
    study = two_sites(minimum_sites=2)
    answers = ask_sites(study, Scripted(study, train={3: lambda r: Refusal("site")}), SITES, STATE)
    with pytest.raises(TooFewSurvivors, match=r"Round 2 needs updates of at least 2 sites, got 1 \(south: site\)"):
        check_survivors(study, 2, answers)
    check_survivors(STUDY, 2, answers)
