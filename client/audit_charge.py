"""One charge a verdict: what was charged and never made, because the site was stopped in between, is not charged again.

**Guarantee.** Noisy counts are made once for each verdict in the ledger. That they are about to be made is on disk
before the noise is drawn, so that a crash can count one too many and never one too few.
"""

import json
from pathlib import Path

from client.accountant import SiteAccountant
from common.errors import LedgerError
from common.files import write_atomically

FILE_NAME = "audit-charge.json"


def charge(folder: Path, accountant: SiteAccountant, number: int) -> None:
    """Charge a verdict, unless one that was charged before is still to be made.

    Raises:
        BudgetExhausted, OverBudget, LedgerError: as ``SiteAccountant.charge_audit``; nothing is charged.
    """
    if not is_paid(folder, accountant):
        _write(folder, accountant.num_verdicts, made=False)
        accountant.charge_audit(number)


def is_paid(folder: Path, accountant: SiteAccountant) -> bool:
    """Whether a verdict is charged whose counts were never made."""
    path = folder / FILE_NAME
    if not path.exists():
        return False
    try:
        content = json.loads(path.read_bytes())
        before, made = int(content["verdicts_before"]), bool(content["made"])
    except (ValueError, KeyError, TypeError):
        raise LedgerError(f"{path} is damaged.", "Restore it, or delete it: the next audit is charged anew.") from None
    return not made and accountant.num_verdicts == before + 1


def note_made(folder: Path, accountant: SiteAccountant) -> None:
    """The counts of the verdict that was charged last are about to be made; call this before any noise is drawn."""
    _write(folder, accountant.num_verdicts - 1, made=True)


def _write(folder: Path, verdicts_before: int, *, made: bool) -> None:
    content = {"verdicts_before": verdicts_before, "made": made}
    write_atomically(folder / FILE_NAME, json.dumps(content).encode(), mode=0o600)
