"""The one table of a data folder: which file belongs to which patient, and which label it has.

A file's name in the table is its path from the folder of the table, or from the folder ``images`` beside it; where both
are listed, the former counts. So a line means the same files whatever else the folder or the table holds.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

from client.data.pixels import Refused
from common.errors import SiteError

IMAGE_FOLDER = "images/"
_FILE_COLUMNS = ("filename", "file", "image", "path")
_PATIENT_COLUMNS = ("patient_id", "participant_id", "subject_id", "subject", "patient", "patientid")
_PREFERRED = ("images.tsv", "images.csv", "metadata.tsv", "metadata.csv", "participants.tsv", "participants.csv")
_MAX_TABLE_BYTES = 2**28
_MISSING = frozenset(("", "n/a", "na", "nan", "none", "null"))


@dataclass(frozen=True)
class Row:
    """One line of the table; None where the cell is empty or the column absent."""

    patient_id: str | None
    label: str | None


@dataclass(frozen=True)
class Table:
    """A table, by file (POSIX path) or by patient.

    Attributes:
        by_file: filled when the table has a column of file names.
        by_patient: filled when it has none; each patient once.
        conflicts: file names or patients with two lines that contradict each other.
    """

    by_file: dict[str, Row]
    by_patient: dict[str, Row]
    conflicts: frozenset[str]

    def row_of_file(self, relative: str) -> Row | None:
        """The line of a file, by its path from the data folder; ``Refused`` where lines differ."""
        key = relative if relative in self.by_file else relative.removeprefix(IMAGE_FOLDER)
        return self._agreed(key, self.by_file.get(key))

    def row_of_patient(self, patient_id: str) -> Row | None:
        """The line of a patient, with or without ``sub-``; ``Refused`` where lines differ."""
        key = patient_id if patient_id in self.by_patient else patient_id.removeprefix("sub-")
        return self._agreed(key, self.by_patient.get(key))

    def _agreed(self, key: str, row: Row | None) -> Row | None:
        if key in self.conflicts:
            raise Refused("conflicting_table", "expected one line in the table, found several that differ")
        return row


def find_table(root: Path) -> Path | None:
    """The folder's table: a well-known name first, else the only .tsv or .csv beside the images.

    Raises:
        SiteError: several tables, none of a well-known name.
    """
    tables = sorted(p for p in root.iterdir() if p.suffix.lower() in (".tsv", ".csv") and p.is_file())
    for name in _PREFERRED:
        for path in tables:
            if path.name.lower() == name:
                return path
    usable = [path for path in tables if _has_key_column(path)]
    if len(usable) > 1:
        names = ", ".join(path.name for path in usable)
        raise SiteError(f"Expected one table in the data folder, found {names}.", "Keep one, or name it images.tsv.")
    return usable[0] if usable else None


def read_table(path: Path, label_column: str | None) -> Table:
    """Reads a tab- or comma-separated table with a header line, UTF-8.

    Raises:
        SiteError: the table cannot be read or lacks a column that is needed.
    """
    header, rows = _read_rows(path)
    names = [name.strip().casefold() for name in header]
    file_index = _first(names, _FILE_COLUMNS)
    patient_index = _first(names, _PATIENT_COLUMNS)
    if file_index is None and patient_index is None:
        raise SiteError(
            f"{path.name} has neither a column of files nor one of patients.", "Name them filename and patient_id."
        )
    label_index = None
    if label_column is not None:
        exact = [name.strip() for name in header]
        if label_column not in exact:
            raise SiteError(
                f"{path.name} has no column {label_column!r}; it has {', '.join(exact)}.",
                "Set label_column in the study to one of them.",
            )
        label_index = exact.index(label_column)
    key_index = file_index if file_index is not None else patient_index
    found: dict[str, Row] = {}
    conflicts: set[str] = set()
    for cells in rows:
        key = _cell(cells, key_index)
        if key is None:
            continue
        key = key.replace("\\", "/").removeprefix("./") if file_index is not None else key
        row = Row(_cell(cells, patient_index), _cell(cells, label_index))
        if found.setdefault(key, row) != row:
            conflicts.add(key)
    return Table(
        found if file_index is not None else {},
        found if file_index is None else {},
        frozenset(conflicts),
    )


def _has_key_column(path: Path) -> bool:
    try:
        header, _ = _read_rows(path, header_only=True)
    except SiteError:
        return False
    names = [name.strip().casefold() for name in header]
    return _first(names, _FILE_COLUMNS + _PATIENT_COLUMNS) is not None


def _read_rows(path: Path, header_only: bool = False) -> tuple[list[str], list[list[str]]]:
    remedy = "Save it as UTF-8 text, tab-separated (.tsv) or comma-separated (.csv), with a header line."
    try:
        if path.stat().st_size > _MAX_TABLE_BYTES:
            raise SiteError(f"{path.name} is larger than {_MAX_TABLE_BYTES // 2**20} MiB.", remedy)
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            header = next(reader, None)
            rows = [] if header_only else [row for row in reader if row]
    except (OSError, UnicodeError, csv.Error) as error:
        raise SiteError(f"{path.name} cannot be read as a table.", remedy) from error
    if not header:
        raise SiteError(f"{path.name} is empty.", remedy)
    return header, rows


def _first(names: list[str], wanted: tuple[str, ...]) -> int | None:
    return next((names.index(name) for name in wanted if name in names), None)


def _cell(cells: list[str], index: int | None) -> str | None:
    if index is None or index >= len(cells):
        return None
    text = cells[index].strip()
    return None if text.casefold() in _MISSING else text
