"""A site joins a study: its data are checked, split and prepared, once for each state of the data."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from client.data import cohort, slices
from client.data.inventory import Inventory, take_inventory
from client.settings import SiteSettings
from client.training import SiteStudy
from common.config import StudyConfig
from common.errors import SiteError
from common.files import write_atomically
from common.messages import Enrolment
from common.privacy.plan import check_delta

logger = logging.getLogger("synthward.site")
CHECK_FILE, REFUSED_FILE, PREPARED, STUDIES = "data-check.json", "refused.json", "prepared", "studies"
TRAINING, HELD_OUT = "training", "held_out"
DataCheck = dict[str, Any]


def enrol(settings: SiteSettings, study: StudyConfig) -> Enrolment:
    """Check and prepare the data, and answer with public facts only.

    Raises:
        SiteError: the data are refused as a whole, or there are fewer patients than the study's minimum.
        ConfigError: the study has no contract with this site.
    """
    study.contracted_split(settings.name)
    prepare_data(settings, study)
    key = cohort.holdout_key(settings.folder)
    return Enrolment(settings.name, cohort.commitment(key), settings.record_is_patient)


def open_study(settings: SiteSettings, study: StudyConfig) -> SiteStudy:
    """The study at this site, as ``enrol`` left it: cheap, for every round. Raises SiteError when it never enrolled."""
    folder = settings.folder / STUDIES / study.digest[:16]
    folder.mkdir(parents=True, exist_ok=True)
    num_patients, _ = study.contracted_split(settings.name)
    prepared = slices.reopen(settings.folder / PREPARED, name=TRAINING)
    return SiteStudy(study, settings.name, folder, prepared, num_patients, settings.device)


def prepare_data(settings: SiteSettings, study: StudyConfig) -> int:
    """Check every file, split the patients, and write the training and held-out pixels. Returns the number of patients.

    Nothing is done again while data, settings and the study's image table stay the same.

    Raises:
        SiteError: unusable data folder, or fewer patients than ``federation.minimum_patients``.
        PrivacyError: the study's delta is too large for this many patients.
    """
    fingerprint = _fingerprint(settings, study)
    known = _read_check(settings.folder)
    contracted = study.federation.contracted_patients.get(settings.name, known.get("contracted_patients"))
    if known.get("fingerprint") != fingerprint or known.get("contracted_patients") != contracted:
        known = _check_and_prepare(settings, study, fingerprint)
    num_patients = int(known["accepted_patients"])
    if num_patients < study.federation.minimum_patients:
        raise SiteError(
            f"Expected at least {study.federation.minimum_patients} patients with usable images, found {num_patients}.",
            "Add patients, correct what `synthward data check` refuses, or lower federation.minimum_patients.",
        )
    if study.privacy.enabled:
        check_delta(study.privacy.delta, num_patients)
    return num_patients


def _check_and_prepare(settings: SiteSettings, study: StudyConfig, fingerprint: str) -> DataCheck:
    image = study.image
    inventory = take_inventory(
        settings.data,
        label_column=image.label_column or None,
        labels=image.labels,
        record_is_patient=settings.record_is_patient,
        patients=settings.patients,
    )
    num_patients = len(inventory.patients)
    contracted = study.federation.contracted_patients.get(settings.name, num_patients)
    divided = cohort.split(inventory, cohort.holdout_key(settings.folder), contracted)
    for name, patients in ((TRAINING, divided.training), (HELD_OUT, divided.held_out)):
        slices.prepare(
            patients,
            settings.folder / PREPARED,
            image_size=image.size,
            channels=image.channels,
            name=name,
            labels=image.labels,
        )
    known = {
        "fingerprint": fingerprint,
        "contracted_patients": contracted,
        "accepted_records": len(inventory.records),
        "accepted_patients": num_patients,
        "refused": inventory.refusal_counts(),
        "notes": len(inventory.notes),
    }
    _write_refused(settings.folder, inventory)
    write_atomically(settings.folder / CHECK_FILE, json.dumps(known, indent=2).encode(), mode=0o600)
    return known


def _write_refused(folder: Path, inventory: Inventory) -> None:
    """The whole inventory, for the site's engineer: it names files."""
    write_atomically(folder / REFUSED_FILE, json.dumps(inventory.to_json(), indent=2).encode(), mode=0o600)
    logger.info("accepted %d records, refused %d files", len(inventory.records), len(inventory.refusals))


def _read_check(folder: Path) -> DataCheck:
    try:
        return dict(json.loads((folder / CHECK_FILE).read_bytes()))
    except (OSError, ValueError):
        return {}


def _fingerprint(settings: SiteSettings, study: StudyConfig) -> str:
    """Changes when a file, the settings or what the study wants of an image changes."""
    digest = hashlib.sha256()
    for fact in (settings.model_dump_json(exclude={"device"}), study.image.model_dump_json()):
        digest.update(fact.encode() + b"\0")
    for path in sorted(settings.data.rglob("*")) if settings.data.is_dir() else ():
        if path.is_file():
            status = path.stat()
            digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()
