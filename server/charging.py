"""What the record charges the sites: what a site says when it enrols, then a planned round each time it is asked.

**Guarantee.** Whenever the process ends, ``run.json`` charges no honest site less than the site charged itself in this
run: a round is in the record before any site is asked to train it, and a verdict before any is asked for its counts.
Answers carry no account of their own; when a run is resumed or audited, each site's own history takes the place of what
the record assumed.

| the site | charged |
|---|---|
| was asked to train | one planned round more, whatever became of its answer |
| refused with a code that a site gives only before it charges | what was charged before |
| refused with ``budget_exhausted`` | the phase's whole plan: an interrupted round is paid for and lost |
| refused with ``ledger`` | one planned round: the line may have been written |
| was asked for the audit's counts | one verdict more, at most as many as planned, whatever became of its answer |
"""

from collections.abc import Iterable
from dataclasses import replace

from common.config import StudyConfig
from common.errors import (
    BadPeer,
    BudgetExhausted,
    ConfigError,
    OutOfOrder,
    OverBudget,
    PolicyError,
    PrivacyError,
    SiteError,
    TooFewSurvivors,
)
from common.messages import Enrolment
from common.privacy import accounting
from common.privacy.accounting import Entry, History, PureRelease
from common.privacy.plan import PrivacyPlan, same_kind
from server import record
from server.record import AuditsRecord, BudgetRecord, RunRecord, SiteRecord
from server.round import RoundOutcome

BEFORE_CHARGE = frozenset(
    kind.code
    for kind in (SiteError, ConfigError, PrivacyError, PolicyError, OverBudget, BadPeer, OutOfOrder, TooFewSurvivors)
)


def is_possible(study: StudyConfig, plan: PrivacyPlan | None, site: SiteRecord, history: History) -> bool:
    """Whether an honest site could have this history when it enrols: of the plan, all that it answered included."""
    if plan is None:
        return not history
    answered: History = ()
    for number in site.rounds:
        answered = _with_planned(study, plan, answered, number)
    training = accounting.of_training(history)
    return (
        plan.covers(training)
        and all(_steps_of(mechanism, training) >= _steps_of(mechanism, answered) for mechanism in answered)
        and _are_possible(study, site, accounting.of_audits(history))
    )


def _are_possible(study: StudyConfig, site: SiteRecord, audits: tuple[PureRelease, ...]) -> bool:
    verdict = PureRelease(study.audit.epsilon_training)
    answered = site.audits.answered if site.audits else 0
    return (
        all(same_kind(each, verdict) for each in audits)
        and answered <= accounting.num_steps(audits) <= study.audit.verdicts
    )


def enrol(study: StudyConfig, site: SiteRecord, reply: Enrolment) -> None:
    """Take over what a site says that it has charged, in this study and before, and its budget."""
    before = record.charged(site)
    site.earlier = record.entries(reply.earlier)
    if reply.budget is not None:
        site.budget = BudgetRecord(epsilon=reply.budget.epsilon, delta=reply.budget.delta)
    site.mechanisms = record.mechanisms(reply.history)
    _set_verdicts(study, site, accounting.num_steps(accounting.of_audits(reply.history)))
    stays = site.accountant == "prv" and record.charged(site) == before  # a run that is over keeps its figures
    record.set_epsilon(site, "prv" if stays else "rdp")


def charge_ahead(
    study: StudyConfig, plan: PrivacyPlan | None, run: RunRecord, number: int, sites: Iterable[str]
) -> dict[str, History]:
    """Charge a planned round to every site that is about to be asked for it. Returns what each was charged before.

    The caller saves the record before it asks.
    """
    before = {name: record.history(run.site(name)) for name in sites}
    for name, spent in before.items():
        _set(run.site(name), _with_planned(study, plan, spent, number))
    return before


def settle(
    study: StudyConfig,
    plan: PrivacyPlan | None,
    run: RunRecord,
    number: int,
    outcome: RoundOutcome,
    before: dict[str, History],
) -> None:
    """Correct what was charged ahead by the refusals, whatever became of the round."""
    for name, code in outcome.refusals.items():
        site = run.site(name)
        site.refusals[code] = site.refusals.get(code, 0) + 1
        if code == BudgetExhausted.code and plan is not None:
            _set(site, _with_planned(study, plan, record.history(site), number, whole=True))
        elif code in BEFORE_CHARGE and name in before and name not in outcome.answered:
            _set(site, before[name])


def charge_audit(study: StudyConfig, run: RunRecord, sites: Iterable[str]) -> None:
    """Charge a verdict to every site that is about to be asked for the audit's counts; nothing without privacy.

    The caller saves the record before it asks.
    """
    for name in sites if study.privacy.enabled else ():
        site = run.site(name)
        _set_verdicts(study, site, min(study.audit.verdicts, (site.audits.verdicts if site.audits else 0) + 1))
        record.set_epsilon(site, "prv")


def note_audited(run: RunRecord, sites: Iterable[str]) -> None:
    """These sites have answered the audit: what they say later that they were charged holds it."""
    for name in sites:
        audits = run.site(name).audits
        if audits is not None:
            audits.answered = min(audits.answered + 1, audits.verdicts)


def is_spent(study: StudyConfig, outcome: RoundOutcome, num_sites: int) -> bool:
    """Whether a round failed for nothing but spent budgets, as after an interruption: then training is over."""
    spent = sum(code in (BudgetExhausted.code, OverBudget.code) for code in outcome.refusals.values())
    others = num_sites - len(outcome.refusals)
    return outcome.state is None and others + spent >= study.federation.minimum_sites > others


def _steps_of(mechanism: Entry, history: History) -> int:
    """Steps of the mechanism's kind, wherever in the history they are."""
    return accounting.num_steps(other for other in history if same_kind(other, mechanism))


def _with_planned(
    study: StudyConfig, plan: PrivacyPlan | None, spent: History, number: int, *, whole: bool = False
) -> History:
    """A history with the steps of a round more, or all of its phase, at most as many as the plan has left."""
    if plan is None:
        return spent
    phase_number = study.phase_number(number)
    steps = plan.steps_left(phase_number, spent)
    if not whole:
        steps = min(steps, study.phases[phase_number].steps)
    mechanism = plan.phases[phase_number].mechanism
    return accounting.append(spent, replace(mechanism, steps=steps)) if steps > 0 else spent


def _set_verdicts(study: StudyConfig, site: SiteRecord, verdicts: int) -> None:
    if verdicts or site.audits is not None:
        audit, answered = study.audit, site.audits.answered if site.audits else 0
        site.audits = AuditsRecord(
            verdicts=verdicts,
            answered=answered,
            epsilon_training=audit.epsilon_training,
            epsilon_held_out=audit.epsilon_held_out,
        )


def _set(site: SiteRecord, history: History) -> None:
    site.mechanisms = record.mechanisms(history)
    record.set_epsilon(site, "rdp")
