"""What the server's record charges the sites: a planned round before it is asked for, then what the site says.

**Guarantee.** Whenever the process ends, ``run.json`` charges no honest site less than the site charged itself in this
run: a round is in the record before any site is asked for it. A site's own history, where it can be true, then takes
its place.

| answer | charged |
|---|---|
| an update | the site's own history |
| a refusal that a site gives only before it charges | what was charged before this round |
| ``budget_exhausted`` | the whole plan: an interrupted round is paid for and lost |
| any other refusal, or none | one planned round more: its update may have left the site |
"""

import logging
import math
from collections.abc import Iterable
from dataclasses import replace

from common.config import StudyConfig
from common.errors import BadPeer, BudgetExhausted, ConfigError, PrivacyError, SiteError
from common.privacy import accounting
from common.privacy.accounting import History
from common.privacy.plan import PrivacyPlan
from server import record
from server.channel import MALFORMED
from server.record import RunRecord, SiteRecord
from server.round import RoundAnswers

logger = logging.getLogger("synthward.server")
BEFORE_CHARGE = frozenset({SiteError.code, ConfigError.code, PrivacyError.code, BadPeer.code})
SAME_PLAN = 1e-6  # relative; sites calibrate the noise on machines of their own


def charge_ahead(
    study: StudyConfig, plan: PrivacyPlan | None, run: RunRecord, sites: Iterable[str]
) -> dict[str, History]:
    """Charge one planned round to every site that is about to be asked. Returns what each was charged before.

    The caller saves the record before it asks.
    """
    before = {name: record.history(run.site(name)) for name in sites}
    for name, spent in before.items():
        _set(run.site(name), _with_planned(plan, spent, study.federation.local_steps))
    return before


def refuse_impossible(
    study: StudyConfig, plan: PrivacyPlan | None, run: RunRecord, answers: RoundAnswers
) -> RoundAnswers:
    """The answers, every update whose history cannot be true turned into a ``malformed`` refusal."""
    updates, refusals = {}, dict(answers.refusals)
    for name, update in answers.updates.items():
        if _is_possible(study, plan, run.site(name), update.history):
            updates[name] = update
        else:
            refusals[name] = MALFORMED
            logger.warning("site %s takes no part: the history of what it spent does not fit the plan", name)
    return replace(answers, updates=updates, refusals=refusals)


def settle(plan: PrivacyPlan | None, run: RunRecord, answers: RoundAnswers, before: dict[str, History]) -> None:
    """Replace what was charged ahead by what the answers say, whatever becomes of the round."""
    for name, update in answers.updates.items():
        site = run.site(name)
        site.reported_steps = accounting.num_steps(update.history)
        _set(site, update.history)
    for name, code in answers.refusals.items():
        site = run.site(name)
        site.refusals[code] = site.refusals.get(code, 0) + 1
        if code in BEFORE_CHARGE:
            _set(site, before[name])
        elif code == BudgetExhausted.code and plan is not None:
            _set(site, _with_planned(plan, before[name], plan.mechanism.steps))
    for name, seconds in answers.seconds.items():
        site = run.site(name)
        site.seconds = round(site.seconds + seconds, 3)


def is_spent(study: StudyConfig, answers: RoundAnswers) -> bool:
    """Whether the round fails for nothing but spent budgets, as after an interruption: then training is over."""
    spent = sum(code == BudgetExhausted.code for code in answers.refusals.values())
    return len(answers.updates) < study.federation.minimum_sites <= len(answers.updates) + spent


def _is_possible(study: StudyConfig, plan: PrivacyPlan | None, site: SiteRecord, history: History) -> bool:
    """Whether an honest site could have this history: the plan's mechanism, this round and all before it included."""
    if plan is None:
        return not history
    planned = plan.mechanism
    answered = (len(site.rounds) + 1) * study.federation.local_steps
    least = max(site.reported_steps, min(answered, planned.steps))
    return least <= accounting.num_steps(history) <= planned.steps and all(
        math.isclose(m.sampling_probability, planned.sampling_probability, rel_tol=SAME_PLAN)
        and math.isclose(m.noise_multiplier, planned.noise_multiplier, rel_tol=SAME_PLAN)
        for m in history
    )


def _with_planned(plan: PrivacyPlan | None, spent: History, steps: int) -> History:
    """A history with planned steps more, at most as many as the plan has left."""
    if plan is None:
        return spent
    steps = min(steps, plan.mechanism.steps - accounting.num_steps(spent))
    return accounting.append(spent, replace(plan.mechanism, steps=steps)) if steps > 0 else spent


def _set(site: SiteRecord, history: History) -> None:
    site.mechanisms = record.mechanisms(history)
    record.set_epsilon(site, "rdp")
