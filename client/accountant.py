"""What one study charges at one site: the bridge from its training to the site's ledger and budget."""

from dataclasses import dataclass, replace
from pathlib import Path

from client.data import cohort
from client.ledger import DataSet, Ledger, Release, ledger_key
from common.config import StudyConfig
from common.errors import BudgetExhausted, OverBudget
from common.privacy import accounting
from common.privacy.accounting import Budget, History, Mechanism
from common.privacy.plan import PrivacyPlan


@dataclass(frozen=True)
class Terms:
    """Under which a plan was found to fit: while they stay, so does the answer.

    Args:
        budget: of the patients.
        other_lines: lines of other studies in the ledger.
    """

    budget: Budget
    other_lines: int


@dataclass(frozen=True)
class SiteAccountant:
    """One study's account at a site.

    **Guarantee.** A charge is on disk when ``charge_round`` returns, and is made only when no patient of the data set
    would have spent more than the budget, all studies together, and the study no more steps than it planned.

    Args:
        ledger: the site's.
        data_set: the patients that the study uses.
        budget: what the site's policy allows for them.
        study: the study.
        run: of the coordinator, for the record.
        planned: every step of the study, as planned when the site enrolled.
        accepted: the terms under which the whole plan fitted, at enrolment.
    """

    ledger: Ledger
    data_set: DataSet
    budget: Budget
    study: StudyConfig
    run: str
    planned: Mechanism
    accepted: Terms

    @property
    def history(self) -> History:
        """What this study has charged here so far."""
        return self.ledger.history_of(self.study.digest)

    def charge_round(self, number: int, plan: PrivacyPlan) -> int:
        """Charge the steps of a round that are about to be made under this plan. Returns how many there are.

        Raises:
            BudgetExhausted: all that the study planned is spent.
            OverBudget: a patient would have spent more than the budget. Nothing is charged.
            LedgerError: the ledger cannot be trusted or written.
        """
        mechanism = self._next_round(plan.mechanism)
        release = Release(self.study.digest, self.study.name, self.run, number, mechanism, plan.clip_norm)
        self.ledger.charge(self.data_set, release, self.budget)
        return mechanism.steps

    def check_next_round(self) -> None:
        """Raise what ``charge_round`` would, without charging. Quick while nobody else has spent."""
        mechanism = self._next_round(self.planned)
        if terms(self.ledger, self.study.digest, self.budget) == self.accepted:
            return
        for history in self.ledger.histories(self.data_set.patients):
            if not accounting.fits((*history, mechanism), self.budget):
                raise OverBudget("The site's budget for its patients is spent.", "See `synthward ledger show`.")

    def _next_round(self, planned: Mechanism) -> Mechanism:
        left = planned.steps - accounting.num_steps(self.history)
        if left < 1:
            raise BudgetExhausted(
                f"All {planned.steps} steps that the study planned for this site are spent.", "Plan a new study."
            )
        return replace(planned, steps=min(left, self.study.federation.local_steps))


def terms(ledger: Ledger, study_digest: str, budget: Budget) -> Terms:
    """The terms as they are now."""
    return Terms(budget, sum(line.study_digest != study_digest for line in ledger.lines()))


def open_ledger(folder: Path) -> Ledger:
    """The ledger of a site's folder. The key of the split is not made here: without one nothing was spent."""
    made = (folder / cohort.KEY_NAME).exists()
    return Ledger(folder, ledger_key(cohort.holdout_key(folder)) if made else b"")
