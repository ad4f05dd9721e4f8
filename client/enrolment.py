"""A site joins a study: its data are checked, split and prepared, once for each state of the data."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from client.accountant import open_ledger
from client.data import cohort, slices
from client.data.canaries import canaries_of
from client.data.inventory import take_inventory
from client.decision import Spent, decide, refuse_unless_allowed
from client.enrolled import (
    FIRST_CONTRACT_FILE,
    HELD_OUT,
    PREPARED,
    TRAINING,
    Enrolled,
    data_sets,
    data_settings,
    first_contract,
    note_enrolled,
    open_accountant,
    read_enrolled,
)
from client.identity import load_member
from client.policy import Policy
from client.round_file import RoundFile, last_attempt
from client.settings import SiteSettings
from client.training import STATE_FILE, SiteStudy
from common.config import StudyConfig
from common.errors import LedgerError, PolicyError, SiteError
from common.files import locked, write_atomically
from common.messages import Enrolment, EnrolRequest
from common.privacy.accounting import History
from common.privacy.plan import check_delta, make_plan

logger = logging.getLogger("synthward.site")
CHECK_FILE, REFUSED_FILE = "data-check.json", "refused.json"
CHECKS_VERSION = 1  # raise it when the checks or the preparation change, so that sites check their data again
DataCheck = dict[str, Any]


def enrol(settings: SiteSettings, study: StudyConfig, request: EnrolRequest) -> Enrolment:
    """Check the policy, check and prepare the data, and answer with public facts only.

    Raises:
        PolicyError, OverBudget: the site's policy refuses the study, or the study does not fit what is left.
        LedgerError: what was spent cannot be told.
        SiteError: the data are refused as a whole, there are fewer patients than the study's minimum, or the site's
            key and roster do not fit.
        PrivacyError: the study's delta is too large for this site.
        ConfigError: the study has no contract with this site.
    """
    study.contracted_split(settings.name)
    policy = Policy.load(settings.folder)
    refuse_unless_allowed(decide(policy, settings, study, request.signature, Spent()))  # before the data are read
    member = load_member(settings, policy) if study.federation.aggregation == "secure" else None
    known = _checked_data(settings, study)
    if known["accepted_patients"] < policy.minimum_patients:
        raise PolicyError(
            f"The policy asks for {policy.minimum_patients} patients or more, found {known['accepted_patients']}.",
            "Add patients, or correct what `synthward data check` refuses.",
        )
    prepared = str(known["fingerprint"])
    folder = settings.study_folder(study.digest)
    history: History = ()
    earlier: History = ()
    plan = make_plan(study)
    if plan is not None:
        book = open_ledger(settings.folder).read()
        history, earlier = book.of_study(study.digest), book.of_other_studies(study.digest)
        if (folder / STATE_FILE).exists() and not history:
            raise LedgerError(f"{folder} has a trained state that the ledger does not know.", "Restore the ledger.")
        training, held_out = (book.histories(each.patients) for each in data_sets(settings, prepared))
        refuse_unless_allowed(
            decide(policy, settings, study, request.signature, Spent(training, held_out, here=history))
        )
    note_enrolled(settings, study, Enrolled(prepared, request.run, request.signature.hex(), data_settings(settings)))
    if member is not None:
        RoundFile(folder, member, study.digest).end(last_attempt(folder))  # what an earlier run may have left
    return Enrolment(
        settings.name,
        cohort.commitment(cohort.holdout_key(settings.folder)),
        settings.record_is_patient,
        history,
        earlier,
        policy.budget_of(settings.data) if plan else None,
        last_attempt(folder) if member else 0,
        member.identity.public_key().public_bytes_raw().hex() if member else "",
        member.roster.digest if member else "",
    )


def open_study(settings: SiteSettings, study: StudyConfig) -> SiteStudy:
    """The study at this site with the images it enrolled with: cheap, for every round.

    Raises:
        SiteError: the site never enrolled in this study, or its prepared images are gone.
        PolicyError: the policy no longer allows the study.
    """
    num_patients, _ = study.contracted_split(settings.name)
    enrolled = read_enrolled(settings, study)
    canaries = canaries_of(settings, study).trained
    accountant = open_accountant(settings, study, enrolled)
    folder = settings.study_folder(study.digest)
    prepared = slices.reopen(settings.folder / PREPARED / enrolled.prepared, name=TRAINING)
    return SiteStudy(study, settings.name, folder, prepared, num_patients, settings.device, accountant, canaries)


def prepare_data(settings: SiteSettings, study: StudyConfig) -> int:
    """Check every file, split the patients, and write the training and held-out pixels. Returns the number of patients.

    Nothing is done again while data, settings and the study's image table stay the same.

    Raises:
        SiteError: unusable data folder, or fewer patients than ``federation.minimum_patients``.
        PrivacyError: the study's delta is too large for this many patients.
    """
    return int(_checked_data(settings, study)["accepted_patients"])


def _checked_data(settings: SiteSettings, study: StudyConfig) -> DataCheck:
    with locked(settings.folder / "enrolment.lock"):  # another study may prepare the same data its own way
        known = _prepared_already(settings, study)
    num_patients = int(known["accepted_patients"])
    if num_patients < study.federation.minimum_patients:
        raise SiteError(
            f"Expected at least {study.federation.minimum_patients} patients with usable images, found {num_patients}.",
            "Add patients, correct what `synthward data check` refuses, or lower federation.minimum_patients.",
        )
    if study.privacy.enabled:
        check_delta(study.privacy.delta, study.federation.contracted_patients.get(settings.name, num_patients))
    return known


def _prepared_already(settings: SiteSettings, study: StudyConfig) -> DataCheck:
    if (settings.folder / PREPARED).exists() and not (settings.folder / cohort.KEY_NAME).exists():
        raise SiteError(
            f"{settings.folder / cohort.KEY_NAME} is gone: with another key, patients held out would be trained on.",
            "Restore the key. Without it, begin with a new site folder and a new budget.",
        )
    key = cohort.holdout_key(settings.folder)
    fingerprint = _fingerprint(settings, study, cohort.commitment(key))
    known = _read_json(settings.folder / CHECK_FILE)
    if known.get("fingerprint") == fingerprint and (settings.folder / PREPARED / fingerprint).exists():
        return known
    return _check_and_prepare(settings, study, key, fingerprint)


def _check_and_prepare(settings: SiteSettings, study: StudyConfig, key: bytes, fingerprint: str) -> DataCheck:
    image = study.image
    inventory = take_inventory(
        settings.data,
        label_column=image.label_column or None,
        labels=image.labels,
        record_is_patient=settings.record_is_patient,
        patients=settings.patients,
    )
    contracted = study.federation.contracted_patients.get(settings.name, len(inventory.patients))
    divided = cohort.split(inventory, key, _first_contract(settings.folder, contracted))
    # Held-out patients are prepared now as well: the audit compares them with images made from this very state.
    for name, patients in ((TRAINING, divided.training), (HELD_OUT, divided.held_out)):
        prepared = slices.prepare(
            patients,
            settings.folder / PREPARED / fingerprint,
            image_size=image.size,
            name=name,
            labels=image.labels,
        )
        inventory = inventory.with_refusals(prepared.refusals)
    known = {
        "fingerprint": fingerprint,
        "accepted_records": len(inventory.records),
        "accepted_patients": len(inventory.patients),
        "refused": inventory.refusal_counts(),
        "notes": len(inventory.notes),
    }
    # The whole inventory is for the site's engineer: it names files.
    write_atomically(settings.folder / REFUSED_FILE, json.dumps(inventory.to_json(), indent=2).encode(), mode=0o600)
    write_atomically(settings.folder / CHECK_FILE, json.dumps(known, indent=2).encode(), mode=0o600)
    logger.info("accepted %d records, refused %d files", len(inventory.records), len(inventory.refusals))
    return known


def _first_contract(folder: Path, contracted: int) -> int:
    """The contracted size at the site's first split: it fixes the share, so that no later study moves a patient."""
    known = first_contract(folder)
    if known is None:
        content = json.dumps({"contracted_patients": contracted}).encode()
        write_atomically(folder / FIRST_CONTRACT_FILE, content, mode=0o600)
    return known or contracted


def _read_json(path: Path) -> DataCheck:
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError):
        return {}


def _fingerprint(settings: SiteSettings, study: StudyConfig, commitment: str) -> str:
    """Changes when a file, the settings, the hold-out key or what the study wants of an image changes."""
    digest = hashlib.sha256(f"{CHECKS_VERSION}\0{commitment}\0".encode())
    for fact in (json.dumps(data_settings(settings)), study.image.model_dump_json()):
        digest.update(fact.encode() + b"\0")
    for path in sorted(settings.data.rglob("*")) if settings.data.is_dir() else ():
        if path.is_file():
            status = path.stat()
            digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:16]
