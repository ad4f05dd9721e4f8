"""What a data folder holds: the images that can be used, and every other file with the reason.

Recognised without being told: BIDS (``sub-*`` folders), loose NIfTI files, PNG or JPEG files with a table, DICOM files
by content, and mixtures of them. No file stops the inventory; a folder that cannot be understood at all does.

**Guarantee.** An image without a patient id is refused, never counted as a patient of its own, unless the site says
that a record is a patient; then ``Inventory.record_is_patient`` is True and the guarantee is one for records.

**Guarantee.** The verdict on an image depends on it, on its patient's other images and on their lines of the table:
adding or removing one patient changes nothing for another. The only places where patients couple:

| what they share | what happens |
|---|---|
| exactly the same pixels | the image later by path is refused, ``duplicate_across_patients`` (see below) |
| a file that the table gives to both | ``conflicting_table``; of ``1.png`` and ``images/1.png`` the latter counts |
| a ``sub-*`` name, whose files the table gives to both | chosen as one subject: a T1w leaves out other contrasts |
| a DICOM series (without its UID, a folder), no PatientID | one series; the table names both: ``mixed_series`` |
| the table: it cannot be read, or there are two | ``SiteError``: no data are used, as in a folder without images |
| the table: one's quote is never closed | it swallows the other's line: no patient id, so refused (or a record) |

Patients with the same pixels: one of the ids is wrong. Without the one patient the other's image would come back, so
the guarantee for such a pair is group privacy of 2, and of k for k patients who share pixels. Remove the wrong copy by
hand. A copy within one patient is dropped, ``duplicate``. Notes compare patients as well, but refuse nothing.

Text burned into the pixels is searched for in no format: DICOM headers may warn of it (``client.data.dicom``), the
headers of PNG, JPEG and NIfTI cannot.
"""

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from client.data.discovery import Candidate, Found, discover, subject_of
from client.data.pixels import Refused, Volume, near_duplicates, pixel_digest, thumbnail
from client.data.records import ImageRecord, Refusal, read_image
from client.data.tables import IMAGE_FOLDER, Table, find_table, read_table
from common.errors import SiteError

__all__ = ["ImageRecord", "Inventory", "Refusal", "list_patients", "take_inventory"]

_MAX_NAMED_PAIRS = 10


@dataclass(frozen=True)
class Inventory:
    """A site's images, checked. Every field stays at the site.

    Attributes:
        root: the data folder.
        records: usable images, by path.
        refusals: every other file, by path.
        notes: remarks that refuse nothing, such as near duplicates.
        record_is_patient: each image without a patient id counts as a patient of its own.
    """

    root: Path
    records: tuple[ImageRecord, ...]
    refusals: tuple[Refusal, ...]
    notes: tuple[str, ...]
    record_is_patient: bool

    @property
    def patients(self) -> tuple[str, ...]:
        """Patient ids with at least one usable image, sorted."""
        return tuple(sorted({record.patient_id for record in self.records}))

    def with_refusals(self, later: Iterable[Refusal]) -> "Inventory":
        """The inventory after preparation: images refused then are no records any more."""
        refusals = sorted((*self.refusals, *later), key=lambda refusal: refusal.file)
        refused = {refusal.file for refusal in refusals}
        records = tuple(record for record in self.records if record.file not in refused)
        return replace(self, records=records, refusals=tuple(refusals))

    def refusal_counts(self) -> dict[str, int]:
        """How many files were refused for each code."""
        return dict(sorted(Counter(refusal.code for refusal in self.refusals).items()))

    def to_json(self) -> dict[str, Any]:
        """The inventory for ``synthward data check --json``: for the site's own eyes, it names files."""
        return {
            "num_patients": len(self.patients),
            "num_images": len(self.records),
            "num_volumes": sum(record.kind == "volume" for record in self.records),
            "images_by_label": dict(sorted(Counter(r.label for r in self.records if r.label is not None).items())),
            "record_is_patient": self.record_is_patient,
            "num_refused": len(self.refusals),
            "refusal_counts": self.refusal_counts(),
            "refusals": [{"file": r.file, "code": r.code, "reason": r.reason} for r in self.refusals],
            "notes": list(self.notes),
        }


def take_inventory(
    root: Path,
    *,
    label_column: str | None,
    labels: tuple[str, ...] = (),
    record_is_patient: bool = False,
    patients: tuple[str, ...] | None = None,
) -> Inventory:
    """Reads every image of a folder once and judges it.

    Args:
        root: the data folder.
        label_column: column of the folder's table that holds the labels; None for none.
        labels: the study's labels; with a column, an image with another label or none is refused. Empty: any.
        record_is_patient: see the module's guarantee. Images with a known patient id keep it.
        patients: only these take part: images of others are not read, and a file is refused only when it is known
            to be theirs. None for all; only then are files refused whose patient cannot be told.

    Returns:
        The inventory. It may hold no record at all, and then says why.

    Raises:
        SiteError: no such folder, nothing in it that looks like an image, or a table that cannot be used.
    """
    found, assign = _look_through(root, label_column, labels, record_is_patient)
    wanted = None if patients is None else frozenset(patients)
    unread = [*found.refusals, *assign.missing_files(found)]
    refusals = [r for r in unread if wanted is None or assign.patient_of(r.file) in wanted]
    judged = _Judged(root, wanted, [], refusals, [], {})
    for candidate in found.candidates:
        judged.judge(candidate, assign)
    notes = found.notes + _case_notes(judged.records) + _near_duplicate_notes(judged)
    refusals = sorted(judged.refusals, key=lambda refusal: refusal.file)
    return Inventory(root, tuple(judged.records), tuple(refusals), tuple(notes), record_is_patient)


def list_patients(root: Path, *, record_is_patient: bool = False) -> tuple[str, ...]:
    """The patients that a folder names, sorted, without reading any pixel: some may have no usable image.

    Raises:
        SiteError: as ``take_inventory``.
    """
    found, assign = _look_through(root, None, (), record_is_patient)
    patients = set()
    for candidate in found.candidates:
        with suppress(Refused):
            patients.add(assign.resolve(candidate)[0])
    return tuple(sorted(patients))


def _look_through(
    root: Path, label_column: str | None, labels: tuple[str, ...], record_is_patient: bool
) -> tuple[Found, "_Assignment"]:
    """Candidates, and the way to their patients and labels."""
    if not root.is_dir():
        raise SiteError(f"The data folder {root} does not exist.", "Set the site's data folder to an existing one.")
    found = discover(root)
    if not found.candidates and not found.refusals:
        raise SiteError(
            f"The data folder {root} holds no image that is known here.",
            "Expected BIDS, NIfTI, DICOM, or PNG/JPEG files with a table images.tsv (filename, patient_id).",
        )
    table_path = find_table(root)
    if table_path is None and label_column is not None:
        raise SiteError(
            f"The study asks for the label column {label_column!r}, but the data folder has no table.",
            "Add images.tsv (filename, patient_id, label) or participants.tsv (participant_id, label).",
        )
    table = read_table(table_path, label_column) if table_path is not None else None
    return found, _Assignment(root, table, label_column is not None and bool(labels), labels, record_is_patient)


class _Assignment:
    """Finds the patient and the label of a candidate."""

    def __init__(
        self, root: Path, table: Table | None, labels_needed: bool, labels: tuple[str, ...], record_is_patient: bool
    ) -> None:
        self.root, self.table = root, table
        self.labels_needed, self.labels, self.record_is_patient = labels_needed, frozenset(labels), record_is_patient

    def resolve(self, candidate: Candidate) -> tuple[str, str | None]:
        """Patient id, and the label that the table gives; or ``Refused``."""
        files = [path.relative_to(self.root).as_posix() for path in candidate.files]
        rows = {row for file in files if self.table and (row := self.table.row_of_file(file)) is not None}
        if len(rows) > 1:
            raise Refused("mixed_series", "expected one patient and one label for a series, the table gives several")
        row = next(iter(rows), None)
        patient_id = candidate.patient_hint
        if row is not None and row.patient_id is not None:
            if candidate.format == "dicom" and patient_id not in (None, row.patient_id):
                raise Refused("patient_mismatch", "expected one patient id, the table and the header differ")
            patient_id = row.patient_id
        if row is None and patient_id is not None and self.table is not None:
            row = self.table.row_of_patient(patient_id)
        if patient_id is None:
            if not self.record_is_patient:
                raise Refused("no_patient_id", "expected a patient id in the path, the table or the header, found none")
            patient_id = f"record:{files[0]}"
        return patient_id, row.label if row is not None else None

    def patient_of(self, file: str) -> str | None:
        """The patient of a file that was not opened: by the table, else by its path; None where neither tells."""
        with suppress(Refused):
            row = self.table.row_of_file(file) if self.table is not None else None
            return row.patient_id if row and row.patient_id else subject_of(PurePosixPath(file))
        return None

    def check_label(self, label: str | None) -> None:
        """Refuses a label that the study does not have."""
        if self.labels_needed and label not in self.labels:
            found = "none" if label is None else "another"
            raise Refused("unknown_label", f"expected one of the study's labels for this image, found {found}")

    def missing_files(self, found: Found) -> list[Refusal]:
        """Lines of the table whose file is not there."""
        paths = [path for candidate in found.candidates for path in candidate.files] + found.left_out
        present = {path.relative_to(self.root).as_posix() for path in paths} | {r.file for r in found.refusals}
        reason = "expected the file that the table lists beside the table or in the folder images, there is none"
        return [
            Refusal(file, "missing_file", reason)
            for file in (self.table.by_file if self.table is not None else ())
            if file not in present and IMAGE_FOLDER + file not in present
        ]


@dataclass
class _Judged:
    root: Path
    wanted: frozenset[str] | None
    records: list[ImageRecord]
    refusals: list[Refusal]
    thumbnails: list[npt.NDArray[np.float16]]
    seen: dict[bytes, ImageRecord]

    def judge(self, candidate: Candidate, assign: _Assignment) -> None:
        """Reads one candidate and files it under records or refusals; its pixels are not kept."""
        file = candidate.files[0].relative_to(self.root).as_posix()
        patient_id, label, unknown = "", None, None
        try:
            patient_id, label = assign.resolve(candidate)
        except Refused as refused:
            unknown = refused
        if self.wanted is not None and (unknown or patient_id not in self.wanted):
            return
        try:
            if problem := candidate.problem or unknown:
                raise problem
            assign.check_label(label)
            image, files = read_image(candidate.files, candidate.kind, candidate.format)
            if candidate.identifying is not None:
                raise Refused(
                    "identifier_in_header",
                    f"expected an empty or de-identified {candidate.identifying}, found another value",
                )
            record = ImageRecord(file, patient_id, label, files, candidate.kind, candidate.format)
            values = image.voxels if isinstance(image, Volume) else image.pixels
            self._check_duplicate(pixel_digest(values), record)
        except Refused as refused:
            count = len(candidate.files)
            series = f" (a series of {count} files, refused whole)" if count > 1 else ""
            self.refusals.append(Refusal(file, refused.code, refused.reason + series))
            return
        self.records.append(record)
        self.thumbnails.append(thumbnail(values))

    def _check_duplicate(self, digest: bytes, record: ImageRecord) -> None:
        first = self.seen.setdefault(digest, record)
        if first is record:
            return
        if first.patient_id == record.patient_id:
            raise Refused("duplicate", f"expected a new image, found the pixels of {first.file} again")
        raise Refused(
            "duplicate_across_patients",
            f"expected images of one patient, found the pixels of {first.file} again: "
            f"patients {first.patient_id} and {record.patient_id}",
        )


def _case_notes(records: list[ImageRecord]) -> list[str]:
    folded = Counter(patient.strip().casefold() for patient in {record.patient_id for record in records})
    alike = sum(count > 1 for count in folded.values())
    return [f"{alike} patient ids differ from another only in upper and lower case."] if alike else []


def _near_duplicate_notes(judged: _Judged) -> list[str]:
    pairs = near_duplicates(judged.thumbnails)
    if pairs is None:
        return ["Too many images to look for near duplicates; exact ones were looked for."]
    records = judged.records
    across = [(records[a], records[b]) for a, b in pairs if records[a].patient_id != records[b].patient_id]
    notes = [
        "Near duplicates of different patients: " + " and ".join(record.file for record in pair) + "."
        for pair in across[:_MAX_NAMED_PAIRS]
    ]
    if len(across) > _MAX_NAMED_PAIRS:
        notes.append(f"{len(across) - _MAX_NAMED_PAIRS} more pairs of near duplicates of different patients.")
    return notes
