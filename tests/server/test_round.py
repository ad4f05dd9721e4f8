"""A plain sum, and a round of local training on it: who is asked for what, and which answers are added up."""

from dataclasses import replace

import numpy as np
import pytest

from common.config import StudyConfig
from common.messages import Enrolment, LocalUpdate, Refusal, Reply, TrainRequest
from server.aggregation import GanState
from server.local_round import local_round
from server.round import Charge, PlainSums, RoundOutcome, SumOutcome, WantedSum
from tests.server.scripted import TRAINED, Scripted, honest, two_sites

STUDY = two_sites()
STATE = GanState(1, np.zeros(5, np.float32), np.zeros(3, np.float32), np.zeros(5, np.float32))
SITES = {2: "north", 3: "south"}


def one_round(channel: Scripted, study: StudyConfig = STUDY, charge: Charge = lambda names: None) -> RoundOutcome:
    return local_round(study, PlainSums(study, channel, SITES), STATE, charge)


def summed(channel: Scripted, study: StudyConfig = STUDY) -> SumOutcome:
    """The sum of what the sites answer to a request for round 2: 8 coordinates."""
    request = TrainRequest(study.digest, 2, STATE.generator, STATE.discriminator)
    return PlainSums(study, channel, SITES).sum(WantedSum(request, 8, study.encoding), lambda names: None)


def test_every_site_is_asked_for_the_next_round_from_this_state() -> None:
    seen: list[TrainRequest] = []

    def train(request: TrainRequest) -> Reply:
        seen.append(request)
        return honest(STUDY, "north", request)

    outcome = one_round(Scripted(STUDY, train={2: train, 3: train}))
    assert outcome.answered == ("north", "south")
    assert (outcome.refusals, outcome.failure) == ({}, "")
    assert [(r.round, r.study_digest) for r in seen] == [(2, STUDY.digest)] * 2
    assert seen[0].generator is STATE.generator and seen[0].discriminator is STATE.discriminator


def test_the_sum_is_that_of_the_vectors_as_the_sites_sent_them() -> None:
    study = two_sites(weights="contracted")  # north sends its update times 1/3
    outcome = summed(Scripted(study), study)
    assert outcome.total is not None
    assert outcome.answered == ("north", "south")
    assert outcome.total.dtype == np.float32
    np.testing.assert_allclose(outcome.total, np.full(8, TRAINED * (1 / 3 + 1)), rtol=1e-6)


def test_the_state_after_it_is_moved_by_the_weighted_mean_of_who_answered() -> None:
    study = two_sites(weights="contracted")
    outcome = one_round(Scripted(study), study)
    assert outcome.state is not None and outcome.state.round == STATE.round + 1
    np.testing.assert_allclose(outcome.state.generator, np.full(5, TRAINED), rtol=1e-6)
    np.testing.assert_allclose(outcome.state.discriminator, np.full(3, TRAINED), rtol=1e-6)


def test_the_flow_hears_who_will_train_before_anybody_is_asked() -> None:
    heard: list[object] = []
    channel = Scripted(STUDY, before=heard.append)
    one_round(channel, charge=heard.append)
    assert heard == [("north", "south"), "2"]


def of(request: TrainRequest) -> LocalUpdate:
    return honest(STUDY, "south", request)


def spoilt(value: float) -> np.ndarray:
    return np.array([0, 0, 0, value, 0, 0, 0, 0], np.float32)


WRONG = {
    "a refusal keeps its code": (lambda r: Refusal("site"), "site"),
    "another kind of message": (lambda r: Enrolment("north", "", False), "malformed"),
    "another round": (lambda r: replace(of(r), round=1), "malformed"),
    "a short vector": (lambda r: replace(of(r), vector=np.zeros(7, np.float32)), "malformed"),
    "a long vector": (lambda r: replace(of(r), vector=np.zeros(9, np.float32)), "malformed"),
    "a NaN": (lambda r: replace(of(r), vector=spoilt(np.nan)), "malformed"),
    "an infinity": (lambda r: replace(of(r), vector=spoilt(-np.inf)), "malformed"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_reply_that_does_not_fit_is_left_out(case: str) -> None:
    reply, code = WRONG[case]
    outcome = summed(Scripted(STUDY, train={3: reply}))
    assert outcome.answered == ("north",)
    assert outcome.refusals == {"south": code}
    assert outcome.total is not None
    np.testing.assert_allclose(outcome.total, np.full(8, TRAINED))


def test_too_few_updates_are_no_sum_and_say_how_many_came() -> None:
    study = two_sites(minimum_sites=2)
    outcome = one_round(Scripted(study, train={3: lambda r: Refusal("site")}), study)
    assert outcome.state is None
    assert outcome.failure == "Round 2 needs updates of at least 2 sites, got 1."
    # North's update came, so it is not forgotten.
    assert (outcome.answered, outcome.refusals) == (("north",), {"south": "site"})
