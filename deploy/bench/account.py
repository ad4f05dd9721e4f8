"""A study's account in a new ledger, for benchmarks that train without a whole site around it."""

import os
from collections.abc import Iterable
from pathlib import Path

from client.accountant import SiteAccountant
from client.ledger import Ledger, create
from client.ledger_lines import data_set_of
from common.config import StudyConfig
from common.privacy.accounting import Budget
from common.privacy.plan import make_plan


def account_for(study: StudyConfig, folder: Path, patients: Iterable[str]) -> SiteAccountant | None:
    """Make a ledger in a folder of its own, with a budget that the study just fits; None when it is not private."""
    plan = make_plan(study)
    if plan is None:
        return None
    key, budget = os.urandom(32), Budget(study.privacy.epsilon, study.privacy.delta)
    create(folder)
    return SiteAccountant(Ledger(folder, key), data_set_of(key, folder, patients), budget, study, "", plan)
