"""Who trains and who is held out: an independent, secret, repeatable coin for each patient.

**Guarantee.** Whether a patient is held out depends on the site's key and on that patient's id alone: not on other
patients, their number, their order, labels or scanners. So adding or removing one patient moves no other patient
between the two groups, and the split costs no privacy. The share is a function of the contracted number of patients,
which is public, never of the number found.

| edge case | what happens |
|---|---|
| a patient with several images, sessions or labels | one coin: all images on one side |
| the same patient at two sites | two keys, two coins |
| a patient added later | its own coin; the others stay |
| the key is lost | to ``holdout_key`` it looks like the first use: a new key, another split (see there) |
"""

import hashlib
import hmac
import os
import stat
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from client.data.inventory import Inventory
from client.data.records import ImageRecord
from common.config import holdout_share
from common.errors import SiteError

_KEY_BYTES = 32
KEY_NAME = "holdout.key"


@dataclass(frozen=True)
class Patient:
    """One patient's images, in the inventory's order. Labels belong to the images: they may differ."""

    patient_id: str
    records: tuple[ImageRecord, ...]


@dataclass(frozen=True)
class Cohort:
    """A site's patients, each on one side, sorted by patient id."""

    training: tuple[Patient, ...]
    held_out: tuple[Patient, ...]


def split(inventory: Inventory, key: bytes, num_patients: int) -> Cohort:
    """Splits the patients of an inventory.

    Args:
        inventory: the site's usable images.
        key: from ``holdout_key``.
        num_patients: the site's contracted, public number of patients.
    """
    share = holdout_share(num_patients)
    records: dict[str, list[ImageRecord]] = defaultdict(list)
    for record in inventory.records:
        records[record.patient_id].append(record)
    patients = [Patient(patient_id, tuple(records[patient_id])) for patient_id in sorted(records)]
    held_out = tuple(p for p in patients if is_held_out(key, p.patient_id, share))
    training = tuple(p for p in patients if not is_held_out(key, p.patient_id, share))
    return Cohort(training, held_out)


def is_held_out(key: bytes, patient_id: str, share: float) -> bool:
    """The patient's coin: HMAC-SHA256(key, patient id) / 2^256 < share.

    Args:
        key: 32 secret bytes.
        patient_id: any text; UTF-8 is hashed.
        share: probability in [0, 1].
    """
    digest = hmac.new(key, patient_id.encode("utf-8", "surrogatepass"), hashlib.sha256).digest()
    numerator, denominator = share.as_integer_ratio()  # exact: no rounding of 256 bits to a float
    return int.from_bytes(digest, "big") * denominator < numerator << 256


def commitment(key: bytes) -> str:
    """SHA-256 of the key, in hexadecimal: published before the first round, it fixes the split without revealing it."""
    return hashlib.sha256(key).hexdigest()


def holdout_key(folder: Path) -> bytes:
    """The site's secret key for the split; made at first use, the same ever after.

    A lost key cannot be told from the first use, and another one would train on patients held out until now: whoever
    has split data in this folder before must refuse when ``KEY_NAME`` is gone, and not call this.

    Args:
        folder: the site's private folder; made if absent.

    Returns:
        32 bytes from the operating system.

    Raises:
        SiteError: the key file is damaged, readable by others, or cannot be made.
    """
    path = folder / KEY_NAME
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            _create(path)
        mode = stat.S_IMODE(path.stat().st_mode)
        key = path.read_bytes()
    except OSError as error:
        raise SiteError(
            f"The key of the split in {path} cannot be read or made.", "Check the folder's rights."
        ) from error
    if mode & 0o077:
        raise SiteError(
            f"The key of the split in {path} can be read by other users (mode {mode:o}).",
            "Find out who may have read it, then set its mode to 600.",
        )
    if len(key) != _KEY_BYTES:
        raise SiteError(
            f"The key of the split in {path} has {len(key)} bytes, expected {_KEY_BYTES}.",
            "Restore it from a backup. A new key would train on patients who were held out until now.",
        )
    return key


def _create(path: Path) -> None:
    """Writes a whole key or none; of two processes at once, one wins and both read the same key."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".key-")  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(os.urandom(_KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(name, path)  # unlike a rename, fails if another process was faster
        except FileExistsError:
            return
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    finally:
        os.unlink(name)
