"""What a study's audit costs at a site: charged on both sides before a patient is read, and never once too often."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from client import ledger
from client.accountant import MOST_VERDICTS, SiteAccountant
from client.decision import whole_cost
from client.ledger_lines import Line, data_set_of
from common.config import StudyConfig
from common.errors import BudgetExhausted, LedgerError, OverBudget, SiteError
from common.privacy.accounting import Budget, PureRelease, epsilon, num_steps, of_audits, of_training
from tests.client.sites import HELD_OUT, KEY, account_in, study_of

CONTRACT = {"north": 11, "south": 11, "west": 11}


def audited(name: str = "study", epsilon: float = 5.0, **audit: float) -> StudyConfig:
    """A study of three sites, which can be audited."""
    return study_of(
        federation={"contracted_patients": CONTRACT}, privacy={"epsilon": epsilon}, audit=audit
    ).with_changes("", name=name)


def account(
    folder: Path, study: StudyConfig | None = None, budget: float | None = None, names: tuple[str, ...] = ("a", "b")
) -> SiteAccountant:
    study = study or audited()
    found = account_in(folder, study, names, Budget(budget, study.privacy.delta) if budget else None)
    assert found is not None
    return found


def lines(at: SiteAccountant) -> tuple[Line, ...]:
    return at.ledger.lines()


def spent_on(at: SiteAccountant, *names: str) -> list[PureRelease]:
    (history,) = at.ledger.read().histories(data_set_of(KEY, Path(), names).patients)
    return [each for each in history if isinstance(each, PureRelease)]


def test_a_verdict_costs_patients_trained_on_one_epsilon_and_those_held_out_another(tmp_path: Path) -> None:
    at = account(tmp_path, audited(epsilon_training=0.25, epsilon_held_out=1.5))
    number = at.study.audit_round
    at.check_audit(number)
    assert lines(at) == ()
    at.charge_audit(number)
    assert spent_on(at, "a", "b") == [PureRelease(0.25)]
    assert spent_on(at, *HELD_OUT) == [PureRelease(1.5)]
    assert [(line.round, line.run, line.study_digest, line.audited) for line in lines(at)] == [
        (number, "run", at.study.digest, "training"),
        (number, "run", at.study.digest, "held_out"),
    ]


def test_training_is_charged_to_no_patient_who_is_held_out(tmp_path: Path) -> None:
    at = account(tmp_path)
    for number in (1, 2, 3):
        at.charge_round(number)
    assert at.ledger.read().histories(data_set_of(KEY, Path(), HELD_OUT).patients) == ((),)
    at.charge_audit(at.study.audit_round)
    assert spent_on(at, *HELD_OUT) == [PureRelease(2.0)]
    assert at.plan.left(at.history) == () and of_audits(at.history) == (PureRelease(0.5),)


def test_an_audit_leaves_the_steps_of_training_as_they_were(tmp_path: Path) -> None:
    at = account(tmp_path)
    at.charge_round(1)
    at.charge_audit(at.study.audit_round)
    for number in (2, 3):
        at.charge_round(number)
    assert num_steps(of_training(at.history)) == at.plan.history[0].steps
    with pytest.raises(BudgetExhausted):
        at.charge_round(3)


@pytest.mark.parametrize("verdicts", [1, 2, 3])
def test_a_study_gets_the_verdicts_it_planned_and_no_more(verdicts: int, tmp_path: Path) -> None:
    at = account(tmp_path, audited(verdicts=verdicts), budget=100.0)
    for _ in range(verdicts):
        at.charge_audit(at.study.audit_round)
    before = lines(at)
    for call in (at.charge_audit, at.check_audit):
        with pytest.raises(BudgetExhausted, match=f"All verdicts that the study planned here are spent: {verdicts}"):
            call(at.study.audit_round)
    assert lines(at) == before and len(before) == 2 * verdicts


def test_a_fourth_verdict_on_a_cohort_is_refused_whichever_studies_asked(tmp_path: Path) -> None:
    for name, verdicts in (("one", 2), ("two", 1)):
        at = account(tmp_path, audited(name, verdicts=verdicts), budget=100.0)
        for _ in range(verdicts):
            at.charge_audit(at.study.audit_round)
    third = account(tmp_path, audited("three"), budget=100.0)
    for call in (third.charge_audit, third.check_audit):
        with pytest.raises(BudgetExhausted, match="3 verdicts have read patients of this cohort, and 3 is the most"):
            call(third.study.audit_round)
    assert len(lines(third)) == 2 * MOST_VERDICTS


def test_a_patient_whom_three_verdicts_have_read_is_enough_to_refuse(tmp_path: Path) -> None:
    """On either side; a cohort with other patients on both sides is another cohort."""
    strangers = data_set_of(KEY, Path(), ["x", "y"])
    at = account(tmp_path, audited(verdicts=3), budget=100.0)
    for _ in range(3):
        at.charge_audit(at.study.audit_round)
    for names, held_out in ((("b", "c"), strangers), (("c", "d"), at.held_out)):
        other = replace(account(tmp_path, audited("other"), budget=100.0, names=names), held_out=held_out)
        with pytest.raises(BudgetExhausted, match="3 is the most"):
            other.charge_audit(other.study.audit_round)
    other = replace(account(tmp_path, audited("other"), budget=100.0, names=("c", "d")), held_out=strangers)
    other.charge_audit(other.study.audit_round)


def test_what_the_study_costs_in_all_is_enough_and_a_little_less_is_not(tmp_path: Path) -> None:
    study = audited(verdicts=2)
    for name, budget, fits in (("enough", whole_cost(study), True), ("short", whole_cost(study) - 0.02, False)):
        (tmp_path / name).mkdir()
        at = account(tmp_path / name, study, budget)
        for number in (1, 2, 3):
            at.charge_round(number)
        at.charge_audit(study.audit_round)
        if fits:
            at.check_audit(study.audit_round)
            at.charge_audit(study.audit_round)
            whole = (*at.plan.history, PureRelease(0.5, 2))
            assert epsilon(at.history, 1e-5) == epsilon(whole, 1e-5) <= budget
        else:
            before = lines(at)
            for call in (at.charge_audit, at.check_audit):
                with pytest.raises(OverBudget, match="Another audit of study would bring"):
                    call(study.audit_round)
            assert lines(at) == before


def test_nothing_is_charged_to_anyone_when_those_held_out_cannot_pay(tmp_path: Path) -> None:
    at = account(tmp_path, audited(epsilon_held_out=9.0), budget=8.99)
    for call in (at.charge_audit, at.check_audit):
        with pytest.raises(OverBudget):
            call(at.study.audit_round)
    assert lines(at) == ()


def test_an_account_without_patients_held_out_pays_for_no_audit(tmp_path: Path) -> None:
    at = replace(account(tmp_path), held_out=None)
    for call in (at.charge_audit, at.check_audit):
        with pytest.raises(SiteError, match="knows no patients that are held out"):
            call(at.study.audit_round)
    assert lines(at) == ()


def test_a_ledger_that_cannot_be_used_charges_nothing(tmp_path: Path) -> None:
    at = account(tmp_path)
    head = tmp_path / ledger.HEAD_FILE
    content = head.read_bytes()
    head.write_bytes(b"{}")
    with pytest.raises(LedgerError):
        at.charge_audit(at.study.audit_round)
    head.write_bytes(content)
    assert lines(at) == ()


def test_processes_at_once_get_one_verdict_between_them(tmp_path: Path) -> None:
    """The verdicts are counted under the ledger's lock, not before it."""
    at = account(tmp_path, budget=100.0)
    children = []
    for _ in range(6):
        if not (pid := os.fork()):
            status = 2
            try:
                at.charge_audit(at.study.audit_round)
                status = 0
            except BudgetExhausted:
                status = 1
            finally:
                os._exit(status)
        children.append(pid)
    statuses = sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children)
    assert statuses == [0, 1, 1, 1, 1, 1]
    assert len(lines(at)) == 2
