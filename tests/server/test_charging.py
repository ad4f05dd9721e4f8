"""What the server's record charges a site, answer by answer, and which histories it believes."""

from dataclasses import replace

import numpy as np
import pytest

from common.config import StudyConfig
from common.messages import LocalUpdate
from common.privacy import accounting
from common.privacy.accounting import History, Mechanism
from common.privacy.plan import PrivacyPlan, make_plan
from server import charging, record
from server.record import RunRecord, SiteRecord
from server.round import RoundAnswers
from tests.server.report.runs import make_run
from tests.server.scripted import two_sites

STUDY = two_sites(rounds=3)  # three steps a round, nine in all
OFF = STUDY.with_changes("privacy", enabled=False)


def planned() -> PrivacyPlan:
    plan = make_plan(STUDY)
    assert plan is not None
    return plan


def spent(steps: int, *, noise: float = 1.0, probability: float = 1.0) -> History:
    """Steps of the plan's mechanism, its noise multiplied by ``noise``."""
    mechanism = planned().mechanism
    q, multiplier = mechanism.sampling_probability * probability, mechanism.noise_multiplier * noise
    return (Mechanism(q, multiplier, steps),)


def north(rounds: int = 1) -> tuple[RunRecord, SiteRecord]:
    """A run whose site north has answered in so many rounds."""
    run = make_run(("north",), rounds=rounds)
    site = run.site("north")
    site.reported_steps = 3 * rounds
    site.mechanisms = record.mechanisms(spent(3 * rounds)) if rounds else []
    record.set_epsilon(site, "rdp")
    return run, site


def update(history: History) -> RoundAnswers:
    return RoundAnswers({"north": LocalUpdate(1, np.zeros(1, np.float32), np.zeros(1, np.float32), history)}, {}, {})


def refusal(code: str) -> RoundAnswers:
    return RoundAnswers({}, {"north": code}, {"north": 1.0})


def one_round(answers: RoundAnswers, rounds: int = 1) -> SiteRecord:
    run, site = north(rounds)
    before = charging.charge_ahead(STUDY, planned(), run, ["north"])
    charging.settle(planned(), run, answers, before)
    return site


def steps(site: SiteRecord) -> int:
    return accounting.num_steps(record.history(site))


# ---------------------------------------------------------------- what is charged


def test_a_round_is_charged_before_anyone_is_asked() -> None:
    run, site = north()
    charging.charge_ahead(STUDY, planned(), run, ["north"])
    assert steps(site) == 3 + 3
    assert site.epsilon == accounting.rdp_epsilon(spent(6), 1e-5)
    assert site.reported_steps == 3


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        *((code, 3) for code in ("site", "config", "privacy", "bad_peer")),  # given before the site charges
        *((code, 6) for code in ("no_answer", "malformed", "node_error", "internal", "protocol", "a new code")),
        ("budget_exhausted", 9),
    ],
)
def test_a_refusal_is_charged_unless_it_precedes_the_charge(code: str, expected: int) -> None:
    site = one_round(refusal(code))
    assert steps(site) == expected
    assert site.epsilon == accounting.rdp_epsilon(spent(expected), 1e-5)
    assert site.refusals == {code: 1}


def test_the_plan_bounds_what_is_charged_unseen() -> None:
    assert steps(one_round(refusal("no_answer"), rounds=3)) == 9


@pytest.mark.parametrize("reported", [6, 9])
def test_an_update_replaces_what_was_charged_ahead(reported: int) -> None:
    site = one_round(update(spent(reported)))
    assert (steps(site), site.reported_steps) == (reported, reported)
    assert site.epsilon == accounting.rdp_epsilon(spent(reported), 1e-5)


def test_without_privacy_nothing_is_charged() -> None:
    run = make_run(("north",), private=False)
    before = charging.charge_ahead(OFF, None, run, ["north"])
    charging.settle(None, run, refusal("budget_exhausted"), before)
    assert (run.site("north").mechanisms, run.site("north").epsilon) == ([], None)


# ---------------------------------------------------------------- which history can be true


def believed(study: StudyConfig, history: History, rounds: int = 1) -> bool:
    run, _ = north(rounds)
    answers = charging.refuse_impossible(study, make_plan(study), run, update(history))
    assert answers.refusals == ({} if answers.updates else {"north": "malformed"})
    return bool(answers.updates)


HISTORIES = {
    "this round": (spent(6), True),
    "a round that was lost, too": (spent(9), True),
    "a calibration on another machine": (spent(6, noise=1 + 5e-7), True),
    "in two parts": (spent(3) + spent(3, noise=1 + 5e-7), True),
    "empty": ((), False),
    "without this round": (spent(3), False),
    "more than the plan": (spent(10), False),
    "more noise": (spent(6, noise=1 + 1e-5), False),
    "less noise": (spent(6, noise=1 - 1e-5), False),
    "more noise in one part": (spent(3) + spent(3, noise=2.0), False),
    "smaller batches": (spent(6, probability=0.5), False),
}


@pytest.mark.parametrize("case", HISTORIES)
def test_a_history_that_cannot_be_true_is_malformed(case: str) -> None:
    history, expected = HISTORIES[case]
    assert believed(STUDY, history) is expected


def test_a_history_does_not_shrink() -> None:
    run, site = north()
    site.reported_steps = 9  # it told of rounds that were lost
    for reported, expected in ((6, False), (9, True)):
        answers = charging.refuse_impossible(STUDY, planned(), run, update(spent(reported)))
        assert bool(answers.updates) is expected


def test_steps_charged_unseen_may_turn_out_not_to_be_spent() -> None:
    run, site = north(rounds=0)
    site.mechanisms = record.mechanisms(spent(6))  # two rounds without an answer, which never reached the site
    assert charging.refuse_impossible(STUDY, planned(), run, update(spent(3))).updates


def test_the_last_round_has_what_the_plan_has_left() -> None:
    assert believed(STUDY, spent(9), rounds=3)  # four answers, nine steps: the plan has no more
    assert not believed(STUDY, spent(8), rounds=3)


def test_without_privacy_there_is_no_history() -> None:
    assert believed(OFF, ())
    assert not believed(OFF, spent(6))


def test_other_answers_are_left_alone() -> None:
    run, _ = north()
    answers = replace(refusal("site"), seconds={"north": 2.0})
    assert charging.refuse_impossible(STUDY, planned(), run, answers) == answers
