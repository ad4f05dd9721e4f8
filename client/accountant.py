"""What one study charges at one site: the bridge from its training to the site's ledger and budget."""

from dataclasses import dataclass, replace
from pathlib import Path

from client.data import cohort
from client.ledger import Ledger
from client.ledger_lines import DataSet, Release, ledger_key
from common.config import StudyConfig
from common.errors import BudgetExhausted
from common.privacy.accounting import Budget, History
from common.privacy.plan import PhasePlan, PrivacyPlan


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
        plan: of the study.
    """

    ledger: Ledger
    data_set: DataSet
    budget: Budget
    study: StudyConfig
    run: str
    plan: PrivacyPlan

    @property
    def history(self) -> History:
        """What this study has charged here so far."""
        return self.ledger.read().of_study(self.study.digest)

    def phase(self, number: int) -> PhasePlan:
        """What the plan says of the phase of a round."""
        return self.plan.phases[self.study.phase_number(number)]

    def charge_round(self, number: int) -> int:
        """Charge the steps of a round that are about to be made. Returns how many there are.

        Raises:
            BudgetExhausted: all that the study planned for the round's phase is spent.
            OverBudget: a patient would have spent more than the budget. Nothing is charged.
            LedgerError: the ledger cannot be trusted or written.
        """
        release = self._release(number)
        self.ledger.charge(self.data_set, release, self.budget)
        return release.mechanism.steps

    def check_round(self, number: int) -> None:
        """Raise what ``charge_round`` would, without charging."""
        self.ledger.check(self.data_set, self._release(number), self.budget)

    def _release(self, number: int) -> Release:
        phase_number = self.study.phase_number(number)
        planned, left = self.phase(number), self.plan.steps_left(phase_number, self.history)
        if left < 1:
            raise BudgetExhausted(
                f"All {planned.mechanism.steps} steps that the study planned here for phase {phase_number + 1} are "
                "spent.",
                "Plan a new study.",
            )
        mechanism = replace(planned.mechanism, steps=min(left, self.study.phases[phase_number].steps))
        return Release(self.study.digest, self.study.name, self.run, number, mechanism, planned.clip_norm)


def open_ledger(folder: Path) -> Ledger:
    """The ledger of a site's folder. The key of the split is not made here: without one nothing was spent."""
    made = (folder / cohort.KEY_NAME).exists()
    return Ledger(folder, ledger_key(cohort.holdout_key(folder)) if made else b"")
