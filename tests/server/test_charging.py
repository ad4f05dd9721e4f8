"""What the server's record charges a site, answer by answer, and which histories it believes."""

from dataclasses import replace

import pytest

from common.config import StudyConfig
from common.messages import Enrolment
from common.privacy import accounting
from common.privacy.accounting import Budget, History, Mechanism, PureRelease
from common.privacy.plan import PhasePlan, PrivacyPlan, make_plan
from server import charging, record
from server.record import RunRecord, SiteRecord
from server.round import RoundOutcome
from tests.server.report.runs import make_run
from tests.server.scripted import two_sites

STUDY = two_sites(rounds=3)  # three steps a round, nine in all
OFF = STUDY.with_changes("privacy", enabled=False)
NAMES = ("north", "south", "west")
NEXT = 2  # the round that is charged


def planned() -> PrivacyPlan:
    plan = make_plan(STUDY)
    assert plan is not None
    return plan


def spent(steps: int, *, noise: float = 1.0, probability: float = 1.0) -> History:
    """Steps of the plan's mechanism, its noise multiplied by ``noise``."""
    (mechanism,) = planned().history
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
    before = charging.charge_ahead(STUDY, planned(), run, NEXT, ["north"])
    charging.settle(STUDY, planned(), run, NEXT, outcome, before)
    return site


def steps(site: SiteRecord) -> int:
    return accounting.num_steps(record.history(site))


# ---------------------------------------------------------------- what is charged


def test_a_round_is_charged_before_anyone_is_asked() -> None:
    run, site = north()
    assert charging.charge_ahead(STUDY, planned(), run, NEXT, ["north"]) == {"north": spent(3)}
    assert steps(site) == 3 + 3
    assert site.epsilon == accounting.rdp_epsilon(spent(6), 1e-5)


def test_only_those_who_are_asked_are_charged() -> None:
    run = make_run(("north", "south"), rounds=0)
    charging.charge_ahead(STUDY, planned(), run, NEXT, ["south"])
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
    charging.settle(STUDY, planned(), run, NEXT, refusal(code), {})
    assert (steps(site), site.refusals) == (3, {code: 1})


def test_an_update_costs_what_was_charged_ahead() -> None:
    site = one_round(ANSWERED)
    assert (steps(site), site.refusals) == (6, {})


def test_a_round_that_is_tried_again_is_charged_again() -> None:
    """A site never masks one update twice: it trains anew for the second attempt."""
    run, site = north()
    for expected in (6, 9):
        before = charging.charge_ahead(STUDY, planned(), run, NEXT, ["north"])
        charging.settle(STUDY, planned(), run, NEXT, ANSWERED, before)
        assert steps(site) == expected


def test_the_plan_bounds_what_is_charged_unseen() -> None:
    assert steps(one_round(refusal("no_answer"), rounds=3)) == 9


def test_without_privacy_nothing_is_charged() -> None:
    run = make_run(("north",), private=False)
    before = charging.charge_ahead(OFF, None, run, NEXT, ["north"])
    charging.settle(OFF, None, run, NEXT, refusal("budget_exhausted"), before)
    assert (run.site("north").mechanisms, run.site("north").epsilon) == ([], None)


def test_what_a_site_says_when_it_enrols_takes_the_place_of_what_was_assumed() -> None:
    _, site = north()
    for said in (9, 3):  # two rounds that nobody saw; a round that never reached the site
        charging.enrol(STUDY, site, Enrolment("north", "ab" * 32, False, spent(said), budget=Budget(9.0, 1e-5)))
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


def test_more_answers_than_the_plan_has_rounds_are_covered_by_the_whole_plan() -> None:
    _, site = north(rounds=3)
    site.rounds.append(3)  # four answers, nine steps: the plan has no more
    assert charging.is_possible(STUDY, planned(), site, spent(9))
    assert not charging.is_possible(STUDY, planned(), site, spent(8))


def test_steps_charged_unseen_may_turn_out_not_to_be_spent() -> None:
    _, site = north(rounds=0)
    site.mechanisms = record.mechanisms(spent(6))  # two rounds without an answer, which never reached the site
    assert charging.is_possible(STUDY, planned(), site, spent(3))


def test_without_privacy_there_is_no_history() -> None:
    assert believed(OFF, ())
    assert not believed(OFF, spent(6))


# ---------------------------------------------------------------- phases

PHASES = [
    {"algorithm": "local", "share": 0.5, "rounds": 2, "steps": 3},
    {"algorithm": "moments", "share": 0.25, "rounds": 1},
    {"algorithm": "local", "share": 0.25, "rounds": 2, "steps": 4},
]
LONG = two_sites(phase=PHASES, minimum_sites=2)
"""Rounds 1 and 2 of three steps, 3 of one release, 4 and 5 of four steps; each phase has noise of its own."""
FIRST, MOMENTS, LAST = make_plan(LONG).phases  # type: ignore[union-attr]


def of(phase: PhasePlan, steps: int) -> Mechanism:
    return replace(phase.mechanism, steps=steps)


def long_run(*history: Mechanism, rounds: int = 0) -> tuple[RunRecord, SiteRecord]:
    """A run of the long study whose site north is charged a history and has answered the first rounds."""
    run = make_run(("north",), rounds=rounds)
    site = run.site("north")
    site.mechanisms = record.mechanisms(history)
    return run, site


@pytest.mark.parametrize(
    ("number", "charged"),
    [
        (1, (of(FIRST, 3),)),
        (2, (of(FIRST, 3),)),
        (3, (of(MOMENTS, 1),)),
        (4, (of(LAST, 4),)),
        (5, (of(LAST, 4),)),
    ],
)
def test_a_round_is_charged_with_the_noise_and_the_steps_of_its_phase(number: int, charged: History) -> None:
    run, site = long_run()
    assert charging.charge_ahead(LONG, make_plan(LONG), run, number, ["north"]) == {"north": ()}
    assert record.history(site) == charged


def test_every_round_of_every_phase_is_the_plan() -> None:
    run, site = long_run()
    for number in range(1, 6):
        charging.charge_ahead(LONG, make_plan(LONG), run, number, ["north"])
    assert record.history(site) == (FIRST.mechanism, MOMENTS.mechanism, LAST.mechanism)
    for number in range(1, 6):  # whatever is asked again after that: the plan has no more
        charging.charge_ahead(LONG, make_plan(LONG), run, number, ["north"])
    assert record.history(site) == (FIRST.mechanism, MOMENTS.mechanism, LAST.mechanism)


@pytest.mark.parametrize(
    ("code", "charged"),
    [
        ("over_budget", (of(FIRST, 3),)),
        ("no_answer", (of(FIRST, 3), of(LAST, 4))),
        ("budget_exhausted", (of(FIRST, 3), LAST.mechanism)),  # all of this phase and nothing of the others
    ],
)
def test_a_refusal_is_about_the_phase_of_its_round(code: str, charged: History) -> None:
    run, site = long_run(of(FIRST, 3), rounds=1)
    before = charging.charge_ahead(LONG, make_plan(LONG), run, 4, ["north"])
    charging.settle(LONG, make_plan(LONG), run, 4, refusal(code), before)
    assert record.history(site) == charged


LONG_HISTORIES = {
    "its one round": (1, (of(FIRST, 3),), True),
    "a later phase after one that was lost": (1, (of(FIRST, 6), of(LAST, 4)), True),
    "the phases in another order": (1, (of(LAST, 4), of(FIRST, 3)), True),
    "the whole plan": (5, (FIRST.mechanism, MOMENTS.mechanism, LAST.mechanism), True),
    "without the round of a phase": (3, (of(FIRST, 6),), False),
    "steps of the last phase instead of the first's": (2, (of(FIRST, 3), of(LAST, 8)), False),
    "more of one phase, less of another": (1, (of(FIRST, 9),), False),
    "two releases of one planned": (3, (of(FIRST, 6), of(MOMENTS, 2)), False),
    "another noise": (0, (replace(LAST.mechanism, noise_multiplier=9.0),), False),
}


@pytest.mark.parametrize("case", LONG_HISTORIES)
def test_a_history_over_phases_is_believed_phase_by_phase(case: str) -> None:
    rounds, history, expected = LONG_HISTORIES[case]
    _, site = long_run(rounds=rounds)
    assert charging.is_possible(LONG, make_plan(LONG), site, history) is expected


def test_phases_with_the_same_noise_are_told_apart_by_nobody_and_counted_together() -> None:
    """Local, moments, local, the two alike: a site that answered rounds 1 and 3 has charged the steps of both."""
    alike = {"algorithm": "local", "share": 0.25, "steps": 3}
    study = two_sites(phase=[alike, {"algorithm": "moments", "share": 0.5}, alike])
    plan = make_plan(study)
    assert plan is not None
    first, release, last = plan.phases
    assert first == last
    run, site = long_run()
    for number in (1, 2, 3):
        charging.charge_ahead(study, plan, run, number, ["north"])
    assert record.history(site) == (of(first, 3), release.mechanism, of(first, 3))
    site.rounds = [1, 2, 3]
    assert charging.is_possible(study, plan, site, (of(first, 6), release.mechanism))
    assert charging.is_possible(study, plan, site, (of(first, 3), release.mechanism, of(first, 3)))
    assert not charging.is_possible(study, plan, site, (of(first, 5), release.mechanism))
    assert not charging.is_possible(study, plan, site, (of(first, 7), release.mechanism))


# ---------------------------------------------------------------- the audit

AUDITED = STUDY.with_changes("audit", verdicts=2, epsilon_training=0.25, epsilon_held_out=1.5)


def of_audit(run: RunRecord) -> tuple[int, int]:
    """Verdicts that north is charged, and those it has answered."""
    audits = run.site("north").audits
    return (audits.verdicts, audits.answered) if audits else (0, 0)


def said(*history: Mechanism | PureRelease) -> Enrolment:
    return Enrolment("north", "ab" * 32, False, history, budget=Budget(9.0, 1e-5))


def test_a_verdict_is_charged_before_anyone_is_asked_and_beside_the_training() -> None:
    run, site = north()
    record.set_epsilon(site, "prv")
    training = site.epsilon
    charging.charge_audit(AUDITED, run, ["north"])
    assert site.audits is not None and of_audit(run) == (1, 0)
    assert (site.audits.epsilon_training, site.audits.epsilon_held_out) == (0.25, 1.5)
    assert (site.epsilon, site.accountant) == (training, "prv")  # the study's promise is training's
    assert site.audits.spent_training == accounting.epsilon((*spent(3), PureRelease(0.25)), 1e-5)
    assert site.audits.spent_held_out == accounting.epsilon((PureRelease(1.5),), 1e-5)
    charging.charge_audit(AUDITED, run, ["north"])
    assert site.audits.spent_held_out == accounting.epsilon((PureRelease(1.5, 2),), 1e-5)
    charging.charge_audit(AUDITED, run, ["north"])  # the plan has no more: an honest site refuses the third
    assert of_audit(run) == (2, 0)


def test_only_sites_that_are_asked_are_charged_and_nobody_without_privacy() -> None:
    run = make_run(("north", "south"), rounds=0)
    charging.charge_audit(AUDITED, run, ["south"])
    assert [site.audits is not None for site in run.sites] == [False, True]
    run = make_run(("north",), rounds=0)
    charging.charge_audit(AUDITED.with_changes("privacy", enabled=False), run, ["north"])
    assert run.site("north").audits is None


def test_the_budget_of_patients_trained_on_covers_both() -> None:
    run, site = north()
    earlier = (Mechanism(0.1, 5.0, 10), PureRelease(0.5))
    charging.enrol(AUDITED, site, replace(said(*spent(3), PureRelease(0.25)), earlier=earlier))
    assert site.budget is not None and of_audit(run) == (1, 0)
    assert record.history(site) == spent(3)
    record.set_epsilon(site, "prv")
    both = (*spent(3), PureRelease(0.25))
    assert site.epsilon == accounting.epsilon(spent(3), 1e-5)
    assert site.budget.spent_before == accounting.epsilon(earlier, 1e-5)
    assert site.budget.spent_here == accounting.epsilon(both, 1e-5)
    assert site.budget.spent_after == accounting.epsilon((*earlier, *both), 1e-5)
    assert RunRecord.model_validate_json(run.model_dump_json()) == run


@pytest.mark.parametrize(
    ("audits", "answered", "expected"),
    [
        ((), 0, True),
        ((PureRelease(0.25),), 0, True),
        ((PureRelease(0.25, 2),), 0, True),
        ((PureRelease(0.25), PureRelease(0.25)), 0, True),
        ((PureRelease(0.25, 3),), 0, False),  # more than planned
        ((PureRelease(0.5),), 0, False),  # of another study
        ((PureRelease(1.5),), 0, False),  # what those held out pay is not said: it follows
        ((), 1, False),  # an answer that the ledger has forgotten
        ((PureRelease(0.25),), 1, True),
        ((PureRelease(0.25),), 2, False),
        ((PureRelease(0.25, 2),), 1, True),  # one was charged and lost
    ],
)
def test_a_history_with_verdicts_is_believed_when_an_honest_site_can_have_it(
    audits: tuple[PureRelease, ...], answered: int, expected: bool
) -> None:
    run, site = north()
    for _ in range(answered):
        charging.charge_audit(AUDITED, run, ["north"])
        charging.note_audited(run, ["north"])
    assert charging.is_possible(AUDITED, planned(), site, (*spent(3), *audits)) is expected
    assert charging.is_possible(AUDITED, planned(), site, (*audits, *spent(3))) is expected
    assert not charging.is_possible(AUDITED, planned(), site, audits)  # the round that it answered is missing


def test_no_history_of_an_audit_is_possible_without_privacy() -> None:
    _, site = north(rounds=0)
    assert not charging.is_possible(OFF, None, site, (PureRelease(0.5),))


def test_what_a_site_says_takes_the_place_of_what_was_assumed_and_its_answers_stay() -> None:
    run, site = north()
    for _ in range(2):
        charging.charge_audit(AUDITED, run, ["north"])
    charging.note_audited(run, ["north"])
    charging.enrol(AUDITED, site, said(*spent(3), PureRelease(0.25)))  # the second never reached it
    assert of_audit(run) == (1, 1)


def test_a_run_that_is_over_keeps_its_figures_when_its_sites_enrol_for_the_audit() -> None:
    run, site = north()
    charging.enrol(AUDITED, site, said(*spent(3)))
    record.set_epsilon(site, "prv")
    before = site.model_copy(deep=True)
    charging.enrol(AUDITED, site, said(*spent(3)))
    assert site == before
    charging.enrol(AUDITED, site, said(*spent(6)))
    assert site.accountant == "rdp"  # it trained on: the run goes on
