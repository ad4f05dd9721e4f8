"""What the server's record charges a site, answer by answer, and which histories it believes."""

import pytest

from common.config import StudyConfig
from common.messages import Enrolment
from common.privacy import accounting
from common.privacy.accounting import Budget, History, Mechanism
from common.privacy.plan import PrivacyPlan, make_plan
from server import charging, record
from server.record import RunRecord, SiteRecord
from server.round import RoundOutcome
from tests.server.report.runs import make_run
from tests.server.scripted import two_sites

STUDY = two_sites(rounds=3)  # three steps a round, nine in all
OFF = STUDY.with_changes("privacy", enabled=False)
NAMES = ("north", "south", "west")


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
    site.mechanisms = record.mechanisms(spent(3 * rounds)) if rounds else []
    record.set_epsilon(site, "rdp")
    return run, site


ANSWERED = RoundOutcome(None, ("north",))


def refusal(code: str, *, answered: bool = False) -> RoundOutcome:
    return RoundOutcome(None, ("north",) if answered else (), {"north": code}, "too few")


def one_round(outcome: RoundOutcome, rounds: int = 1) -> SiteRecord:
    run, site = north(rounds)
    before = charging.charge_ahead(STUDY, planned(), run, ["north"])
    charging.settle(planned(), run, outcome, before)
    return site


def steps(site: SiteRecord) -> int:
    return accounting.num_steps(record.history(site))


# ---------------------------------------------------------------- what is charged


def test_a_round_is_charged_before_anyone_is_asked() -> None:
    run, site = north()
    assert charging.charge_ahead(STUDY, planned(), run, ["north"]) == {"north": spent(3)}
    assert steps(site) == 3 + 3
    assert site.epsilon == accounting.rdp_epsilon(spent(6), 1e-5)


def test_only_those_who_are_asked_are_charged() -> None:
    run = make_run(("north", "south"), rounds=0)
    charging.charge_ahead(STUDY, planned(), run, ["south"])
    assert [steps(site) for site in run.sites] == [0, 3]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        # Given before the site charges.
        *((code, 3) for code in ("site", "config", "privacy", "bad_peer", "out_of_order", "too_few_survivors")),
        *((code, 3) for code in ("over_budget", "policy")),
        *(
            (code, 6)
            for code in ("ledger", "no_answer", "malformed", "node_error", "internal", "protocol", "a new code")
        ),
        ("budget_exhausted", 9),
    ],
)
def test_a_refusal_is_charged_unless_it_precedes_the_charge(code: str, expected: int) -> None:
    site = one_round(refusal(code))
    assert steps(site) == expected
    assert site.epsilon == accounting.rdp_epsilon(spent(expected), 1e-5)
    assert site.refusals == {code: 1}


@pytest.mark.parametrize("code", ["out_of_order", "bad_peer", "too_few_survivors", "site"])
def test_whoever_answered_has_trained_whatever_it_refuses_later(code: str) -> None:
    """As in a secure sum: the masked update came, then the site refused to confirm or to unmask."""
    site = one_round(refusal(code, answered=True))
    assert steps(site) == 6
    assert site.refusals == {code: 1}


@pytest.mark.parametrize("code", ["out_of_order", "site", "no_answer"])
def test_a_site_that_was_not_asked_to_train_is_charged_nothing(code: str) -> None:
    """As in a secure sum: the site fell out while keys were shared."""
    run, site = north()
    charging.settle(planned(), run, refusal(code), {})
    assert (steps(site), site.refusals) == (3, {code: 1})


def test_an_update_costs_what_was_charged_ahead() -> None:
    site = one_round(ANSWERED)
    assert (steps(site), site.refusals) == (6, {})


def test_a_round_that_is_tried_again_is_charged_again() -> None:
    """A site never masks one update twice: it trains anew for the second attempt."""
    run, site = north()
    for expected in (6, 9):
        before = charging.charge_ahead(STUDY, planned(), run, ["north"])
        charging.settle(planned(), run, ANSWERED, before)
        assert steps(site) == expected


def test_the_plan_bounds_what_is_charged_unseen() -> None:
    assert steps(one_round(refusal("no_answer"), rounds=3)) == 9


def test_without_privacy_nothing_is_charged() -> None:
    run = make_run(("north",), private=False)
    before = charging.charge_ahead(OFF, None, run, ["north"])
    charging.settle(None, run, refusal("budget_exhausted"), before)
    assert (run.site("north").mechanisms, run.site("north").epsilon) == ([], None)


def test_what_a_site_says_when_it_enrols_takes_the_place_of_what_was_assumed() -> None:
    _, site = north()
    for said in (9, 3):  # two rounds that nobody saw; a round that never reached the site
        charging.enrol(site, Enrolment("north", "ab" * 32, False, spent(said), budget=Budget(9.0, 1e-5)))
        assert record.history(site) == spent(said)
        assert site.epsilon == accounting.rdp_epsilon(spent(said), 1e-5)


# ---------------------------------------------------------------- when nothing is left


@pytest.mark.parametrize(
    ("minimum", "codes", "expected"),
    [
        (2, {"north": "budget_exhausted", "south": "budget_exhausted"}, True),
        (2, {"north": "over_budget", "south": "budget_exhausted"}, True),
        (3, {"north": "budget_exhausted"}, True),  # with it there would be enough
        (2, {"north": "budget_exhausted"}, False),  # two are left: something else failed
        (2, {"north": "budget_exhausted", "south": "site"}, True),  # one is left, and one is spent
        (3, {"north": "budget_exhausted", "south": "site"}, False),  # too few without the spent budget, too
        (2, {"north": "site", "south": "no_answer"}, False),
    ],
)
def test_training_is_over_when_only_spent_budgets_are_missing(
    minimum: int, codes: dict[str, str], expected: bool
) -> None:
    contract = dict.fromkeys(NAMES, 40)
    study = two_sites(minimum_sites=minimum, contracted_patients=contract)
    assert charging.is_spent(study, RoundOutcome(None, (), codes), len(NAMES)) is expected


# ---------------------------------------------------------------- which history can be true


def believed(study: StudyConfig, history: History, rounds: int = 1) -> bool:
    _, site = north(rounds)
    return charging.is_possible(study, make_plan(study), site, history)


HISTORIES = {
    "its one round": (spent(3), True),
    "a round that was lost, too": (spent(6), True),
    "the whole plan": (spent(9), True),
    "a calibration on another machine": (spent(6, noise=1 + 5e-7), True),
    "in two parts": (spent(3) + spent(3, noise=1 + 5e-7), True),
    "empty": ((), False),
    "without its round": (spent(2), False),
    "more than the plan": (spent(10), False),
    "more noise": (spent(6, noise=1 + 1e-5), False),
    "less noise": (spent(6, noise=1 - 1e-5), False),
    "more noise in one part": (spent(3) + spent(3, noise=2.0), False),
    "smaller batches": (spent(6, probability=0.5), False),
}


@pytest.mark.parametrize("case", HISTORIES)
def test_a_history_that_cannot_be_true_is_not_believed(case: str) -> None:
    history, expected = HISTORIES[case]
    assert believed(STUDY, history) is expected


def test_a_site_that_never_answered_may_have_spent_nothing_or_something() -> None:
    assert believed(STUDY, (), rounds=0)
    assert believed(STUDY, spent(3), rounds=0)


def test_the_rounds_of_a_resumed_run_bind() -> None:
    assert believed(STUDY, spent(6), rounds=2)
    assert not believed(STUDY, spent(5), rounds=2)


def test_the_last_round_has_what_the_plan_has_left() -> None:
    assert believed(STUDY, spent(9), rounds=4)  # four answers, nine steps: the plan has no more
    assert not believed(STUDY, spent(8), rounds=4)


def test_steps_charged_unseen_may_turn_out_not_to_be_spent() -> None:
    _, site = north(rounds=0)
    site.mechanisms = record.mechanisms(spent(6))  # two rounds without an answer, which never reached the site
    assert charging.is_possible(STUDY, planned(), site, spent(3))


def test_without_privacy_there_is_no_history() -> None:
    assert believed(OFF, ())
    assert not believed(OFF, spent(6))
