"""What one study charges at one site: the bridge from its training to the site's ledger and budget."""

from dataclasses import dataclass, replace
from pathlib import Path

from client.data import cohort
from client.ledger import Ledger
from client.ledger_lines import AUDIT_SENSITIVITY, Audited, Book, DataSet, Release, ledger_key
from common.config import StudyConfig
from common.errors import BudgetExhausted, SiteError
from common.privacy.accounting import Budget, History, PureRelease
from common.privacy.plan import PhasePlan, PrivacyPlan

MOST_VERDICTS = 3
"""An audit reads no patient whom so many verdicts have read, whichever studies asked for them."""


@dataclass(frozen=True)
class SiteAccountant:
    """One study's account at a site.

    **Guarantee.** A charge is on disk when ``charge_round`` or ``charge_audit`` returns, and is made only when no
    patient of its data sets would have spent more than the budget, all studies together, and the study no more than it
    planned. Patients held out pay for audits only: training never reads them. The ledger knows patients, not groups, so
    should one come to the other side of the split, what was spent on either side counts.

    Args:
        ledger: the site's.
        data_set: the patients that the study trains on.
        budget: what the site's policy allows for each patient, held out or not.
        study: the study.
        run: of the coordinator, for the record.
        plan: of the study.
        held_out: the patients that the study holds out; None in an account that pays for no audit.
    """

    ledger: Ledger
    data_set: DataSet
    budget: Budget
    study: StudyConfig
    run: str
    plan: PrivacyPlan
    held_out: DataSet | None = None

    @property
    def history(self) -> History:
        """What this study has charged patients that it trains on."""
        return self.ledger.read().of_study(self.study.digest)

    @property
    def num_verdicts(self) -> int:
        """How many verdicts the study has charged here."""
        return self.ledger.read().num_verdicts(self.study.digest)

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

    def charge_audit(self, number: int) -> None:
        """Charge one verdict of the audit, before a patient is read: the patients trained on, and those held out.

        Both lines are on disk when this returns; a crash at any moment leaves both or none.

        Args:
            number: the audit's, ``study.audit_round``.

        Raises:
            BudgetExhausted: the study's verdicts are all asked for, or three have read one of the patients. Nothing is
                charged.
            OverBudget: a patient would have spent more than the budget. Nothing is charged.
            LedgerError: the ledger cannot be trusted or written.
            SiteError: the account knows no patients that are held out.
        """
        self.ledger.charge_together(self._verdict(number), self.budget, self._refuse_a_verdict_too_many)

    def check_audit(self, number: int) -> None:
        """Raise what ``charge_audit`` would, without charging."""
        self.ledger.check_together(self._verdict(number), self.budget, self._refuse_a_verdict_too_many)

    def _verdict(self, number: int) -> tuple[tuple[DataSet, Release], ...]:
        if self.held_out is None:
            raise SiteError(
                "This account knows no patients that are held out.", "Enrol in the study; start the run again."
            )
        audit = self.study.audit
        return (
            (self.data_set, self._answer(number, audit.epsilon_training, "training")),
            (self.held_out, self._answer(number, audit.epsilon_held_out, "held_out")),
        )

    def _answer(self, number: int, epsilon: float, audited: Audited) -> Release:
        study, mechanism = self.study, PureRelease(epsilon)
        return Release(study.digest, study.name, self.run, number, mechanism, AUDIT_SENSITIVITY, audited)

    def _refuse_a_verdict_too_many(self, book: Book) -> None:
        asked, planned = book.num_verdicts(self.study.digest), self.study.audit.verdicts
        if asked >= planned:
            raise BudgetExhausted(
                f"All verdicts that the study planned here are spent: {planned}.", "Plan a new study."
            )
        patients = self.data_set.patients | (self.held_out.patients if self.held_out else frozenset())
        read = book.most_verdicts(patients)
        if read >= MOST_VERDICTS:
            raise BudgetExhausted(
                f"{read} verdicts have read patients of this cohort, and {MOST_VERDICTS} is the most.",
                "Plan a study on other patients.",
            )


def open_ledger(folder: Path) -> Ledger:
    """The ledger of a site's folder. The key of the split is not made here: without one nothing was spent."""
    made = (folder / cohort.KEY_NAME).exists()
    return Ledger(folder, ledger_key(cohort.holdout_key(folder)) if made else b"")
