"""What a site keeps of its enrolment in a study, and the account that the rounds open with it. Starts without torch."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from client.accountant import SiteAccountant, open_ledger
from client.data import cohort, slices
from client.decision import decide, refuse_unless_allowed
from client.ledger_lines import DataSet, data_set_of, ledger_key
from client.policy import Policy
from client.settings import SiteSettings
from common.config import StudyConfig
from common.errors import SiteError
from common.files import write_atomically
from common.privacy.plan import make_plan

PREPARED, ENROLLED_FILE, FIRST_CONTRACT_FILE = "prepared", "enrolled.json", "holdout.json"
TRAINING, HELD_OUT = "training", "held_out"


@dataclass(frozen=True)
class Enrolled:
    """What a site keeps of its enrolment in a study.

    Args:
        prepared: name of the folder of the images that it enrolled with.
        run: the coordinator's run, for the ledger.
        signature: the study's signature as the coordinator sent it, hex.
        data: the settings that say which data these were.
    """

    prepared: str
    run: str
    signature: str
    data: dict[str, Any]


def data_settings(settings: SiteSettings) -> dict[str, Any]:
    """The settings that decide which patients there are, as JSON."""
    return settings.model_dump(mode="json", include={"name", "data", "record_is_patient", "patients"})


def note_enrolled(settings: SiteSettings, study: StudyConfig, enrolled: Enrolled) -> None:
    """Keep what the rounds will need."""
    path = settings.study_folder(study.digest) / ENROLLED_FILE
    write_atomically(path, json.dumps(asdict(enrolled)).encode(), mode=0o600)


def read_enrolled(settings: SiteSettings, study: StudyConfig) -> Enrolled:
    """What was kept. Raises SiteError when the site never enrolled in this study, or with other data."""
    try:
        content = json.loads((settings.study_folder(study.digest) / ENROLLED_FILE).read_bytes())
        enrolled = Enrolled(**content)
    except (OSError, ValueError, TypeError):
        raise SiteError(
            f"{settings.name} has not enrolled in this study.", "Enrol first; start the run again."
        ) from None
    if enrolled.data != data_settings(settings):  # the policy's answer and the budget were those of other patients
        raise SiteError(f"The data of {settings.name} are others than it enrolled with.", "Start the run again.")
    return enrolled


def open_accountant(settings: SiteSettings, study: StudyConfig, enrolled: Enrolled) -> SiteAccountant | None:
    """The study's account at this site, after asking the policy again; None when the study is not private.

    Raises:
        PolicyError: the policy no longer allows the study.
    """
    policy = Policy.load(settings.folder)
    # What a round costs is checked when it is charged; the whole plan was when the site enrolled.
    refuse_unless_allowed(decide(policy, settings, study, bytes.fromhex(enrolled.signature), None))
    plan = make_plan(study)
    if plan is None:
        return None
    training, held_out = data_sets(settings, enrolled.prepared)
    ledger, budget = open_ledger(settings.folder), policy.budget_of(settings.data)
    return SiteAccountant(ledger, training, budget, study, enrolled.run, plan, held_out)


def first_contract(folder: Path) -> int | None:
    """The contracted size at the site's first split, which fixed the share for ever; None before that.

    Raises SiteError when the file that says so is damaged.
    """
    path = folder / FIRST_CONTRACT_FILE
    try:
        return int(json.loads(path.read_bytes())["contracted_patients"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        raise SiteError(
            f"{path} is damaged: with another share of patients held out, some of them would be trained on.",
            "Restore it from a backup.",
        ) from None


def data_sets(settings: SiteSettings, prepared: str) -> tuple[DataSet, DataSet]:
    """The patients that are trained on, and those that are held out, in a state of the data.

    **Guarantee.** Training reads the first only, an audit both, and each pays for what reads it. A patient stays on one
    side for the life of a site's folder: the coin is a function of the site's key, the patient's id and the share
    (``client/data/cohort.py``); a site that has prepared data takes no other key, and its first contract fixes the
    share (``client/enrolment.py``). The budget does not rest on this: the ledger adds up what was spent on a patient,
    on whichever side, and patients of lines older than this division count as they did.
    """
    if not (settings.folder / cohort.KEY_NAME).exists():  # a new key would be of another split
        raise SiteError(f"{settings.folder / cohort.KEY_NAME} is gone.", "Restore the key.")
    folder, key = settings.folder / PREPARED / prepared, ledger_key(cohort.holdout_key(settings.folder))
    training, held_out = (
        data_set_of(key, settings.data, slices.reopen(folder, name=name).patient_ids) for name in (TRAINING, HELD_OUT)
    )
    return training, held_out
