"""What the record charges the sites: what a site says when it enrols, then a planned round each time it is asked.

**Guarantee.** Whenever the process ends, ``run.json`` charges no honest site less than the site charged itself in this
run: a round is in the record before any site is asked to train it. Answers carry no account of their own; when a run
is resumed, each site's own history takes the place of what the record assumed.

| the site | charged |
|---|---|
| was asked to train | one planned round more, whatever became of its answer |
| refused with a code that a site gives only before it charges | what was charged before |
| refused with ``budget_exhausted`` | the phase's whole plan: an interrupted round is paid for and lost |
| refused with ``ledger`` | one planned round: the line may have been written |
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
from common.privacy.accounting import History, Mechanism
from common.privacy.plan import PrivacyPlan, same_kind
from server import record
from server.record import BudgetRecord, RunRecord, SiteRecord
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
    return plan.covers(history) and all(
        _steps_of(mechanism, history) >= _steps_of(mechanism, answered) for mechanism in answered
    )


def enrol(site: SiteRecord, reply: Enrolment) -> None:
    """Take over what a site says that it has charged, in this study and before, and its budget."""
    site.earlier = record.mechanisms(reply.earlier)
    if reply.budget is not None:
        site.budget = BudgetRecord(epsilon=reply.budget.epsilon, delta=reply.budget.delta)
    _set(site, reply.history)


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


def is_spent(study: StudyConfig, outcome: RoundOutcome, num_sites: int) -> bool:
    """Whether a round failed for nothing but spent budgets, as after an interruption: then training is over."""
    spent = sum(code in (BudgetExhausted.code, OverBudget.code) for code in outcome.refusals.values())
    others = num_sites - len(outcome.refusals)
    return outcome.state is None and others + spent >= study.federation.minimum_sites > others


def _steps_of(mechanism: Mechanism, history: History) -> int:
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


def _set(site: SiteRecord, history: History) -> None:
    site.mechanisms = record.mechanisms(history)
    record.set_epsilon(site, "rdp")
