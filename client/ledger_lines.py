"""What stands in a site's ledger: lines, each sealed by a hash, and the patients that they are about.

Patients are known by keyed digests only: who lacks the site's key cannot tell from one whether somebody is a patient.
"""

import hashlib
import hmac
import json
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from common.privacy import accounting
from common.privacy.accounting import Entry, History, Mechanism, PureRelease

FIRST_HASH = "0" * 64
AUDIT_SENSITIVITY = 1.0  # a patient is in one of the audit's cells
Audited = Literal["training", "held_out"]
"""Whom an audit's answer is about: the patients that a study trains on, or those that it holds out."""


@dataclass(frozen=True)
class DataSet:
    """Patients on whom something is spent together, known by keyed digests only.

    Args:
        digest: of all of them, hex; says nothing about the folder.
        folder: where their images lie, for people.
        patients: one digest each, hex.
    """

    digest: str
    folder: str
    patients: frozenset[str] = field(repr=False)


@dataclass(frozen=True)
class Release:
    """What is about to be released.

    Args:
        study_digest: the study.
        study_name: its name, for people.
        run: the run of the study.
        round: the round of the run.
        mechanism: the steps about to be made, or an audit's answer.
        clip_norm: the sensitivity of one step.
        audited: whom an audit's answer is about; None in training.
    """

    study_digest: str
    study_name: str
    run: str
    round: int
    mechanism: Entry
    clip_norm: float
    audited: Audited | None = None

    def __post_init__(self) -> None:
        if isinstance(self.mechanism, PureRelease) != (self.audited is not None):
            raise ValueError("an audit's answer is a pure release, and training none")


@dataclass(frozen=True)
class Line:
    """One release on one data set. Numbers begin at 1, ``time`` is UTC in ISO 8601, ``hash`` covers all the others.

    A line of an audit has ``epsilon`` and ``audited``, and no noise multiplier: 0. Lines of training, also of programs
    that knew no audits, have neither, and their hash does not cover them.
    """

    number: int
    time: str
    study_digest: str
    study_name: str
    run: str
    round: int
    data_set: str
    folder: str
    sampling_probability: float
    noise_multiplier: float
    steps: int
    clip_norm: float
    previous: str
    hash: str
    epsilon: float | None = None
    audited: Audited | None = None

    @property
    def mechanism(self) -> Entry:
        """What was released."""
        if self.epsilon is not None:
            return PureRelease(self.epsilon, self.steps)
        return Mechanism(self.sampling_probability, self.noise_multiplier, self.steps)


@dataclass(frozen=True)
class Book:
    """A whole ledger, verified.

    Args:
        lines: oldest first.
        members: the patients of each data set.
        unwritten: how many of the newest lines are in the head, not yet in the file.
    """

    lines: tuple[Line, ...]
    members: Mapping[str, frozenset[str]]
    unwritten: int

    def with_line(self, line: Line, patients: frozenset[str]) -> "Book":
        """The ledger after one more line on these patients."""
        return Book((*self.lines, line), {**self.members, line.data_set: patients}, self.unwritten)

    def data_sets(self) -> tuple[DataSet, ...]:
        """Every data set that anything was spent on, oldest first, with the folder where it was last."""
        folders = {line.data_set: line.folder for line in self.lines}
        return tuple(DataSet(digest, folder, self.members[digest]) for digest, folder in folders.items())

    def of_study(self, study_digest: str) -> History:
        """What was spent in one study on patients that it trains on, its audits included."""
        return history_of(line for line in self._on_trained() if line.study_digest == study_digest)

    def of_other_studies(self, study_digest: str) -> History:
        """What was spent in all others on patients that they train on, whichever: which of them two data sets share is
        not told."""
        return history_of(line for line in self._on_trained() if line.study_digest != study_digest)

    def _on_trained(self) -> Iterator[Line]:
        """Lines of training, and those that its patients paid for audits: for each, another patient paid another."""
        return (line for line in self.lines if line.audited != "held_out")

    def num_verdicts(self, study_digest: str) -> int:
        """How many verdicts one study has asked for here, on whichever patients."""
        asked = [line.audited for line in self.lines if line.study_digest == study_digest]
        return max(asked.count(group) for group in get_args(Audited))

    def most_verdicts(self, patients: frozenset[str]) -> int:
        """How many verdicts, of all studies, have read one of these patients: the one that most have read."""
        return max((len(self._audits(group)) for group in self.groups(patients)), default=0)

    def _audits(self, data_sets: frozenset[str]) -> list[Line]:
        return [line for line in self.lines if line.audited is not None and line.data_set in data_sets]

    def histories(self, patients: frozenset[str]) -> tuple[History, ...]:
        """What was spent on these patients of a data set: a history for each group of them with the same lines.

        Returns:
            Most steps first. ``((),)`` when nothing was spent on any of them.
        """
        found = {self.history(data_sets) for data_sets in self.groups(patients)} or {()}
        return tuple(sorted(found, key=lambda history: (-accounting.num_steps(history), str(history))))

    def groups(self, patients: frozenset[str]) -> set[frozenset[str]]:
        """The data sets that each patient is in; every combination once."""
        found: dict[str, set[str]] = {patient: set() for patient in patients}
        for data_set, members in self.members.items():
            for patient in members & patients:
                found[patient].add(data_set)
        return {frozenset(data_sets) for data_sets in found.values()}

    def history(self, data_sets: frozenset[str]) -> History:
        """All that was spent on a patient who is in these data sets."""
        return history_of(line for line in self.lines if line.data_set in data_sets)


def history_of(lines: Iterable[Line]) -> History:
    """What these lines spent together."""
    history: History = ()
    for line in lines:
        history = accounting.append(history, line.mechanism)
    return history


# ---------------------------------------------------------------- who the patients are


def ledger_key(holdout_key: bytes) -> bytes:
    """The key of the patients' digests, 32 bytes, from the site's secret key: ``client.data.cohort.holdout_key``."""
    return hmac.new(holdout_key, b"synthward ledger", hashlib.sha256).digest()


def data_set_of(key: bytes, folder: Path, patient_ids: Iterable[str]) -> DataSet:
    """The data set of these patients: the same digest wherever their images lie.

    Args:
        key: from ``ledger_key``; without it a digest does not tell whether somebody is a patient.
        folder: where their images lie.
        patient_ids: any text; order and repetition do not matter, nor does the prefix ``sub-`` of BIDS.
    """
    patients = frozenset(_keyed(key, "patient", _plain(patient_id)) for patient_id in patient_ids)
    return DataSet(digest_of(key, patients), os.fsencode(folder).decode(errors="backslashreplace"), patients)


def _plain(patient_id: str) -> str:
    """The id however it was found: a folder ``sub-01`` and a table's ``01`` are one patient."""
    return unicodedata.normalize("NFC", patient_id).strip().removeprefix("sub-")


def digest_of(key: bytes, patients: Iterable[str]) -> str:
    """The digest of a data set, from those of its patients."""
    return _keyed(key, "data set", "".join(sorted(patients)))


def _keyed(key: bytes, kind: str, text: str) -> str:
    return hmac.new(key, f"{kind}\0{text}".encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


# ---------------------------------------------------------------- what a line's hash covers


def is_whole(line: Line) -> bool:
    """Whether a line has the right types, means something, and is what its hash was computed from."""
    required = [each for each in fields(line) if each.name not in _OF_AUDITS]
    if any(type(getattr(line, each.name)) is not each.type for each in required) or not _is_of_one_kind(line):
        return False
    try:
        return line.hash == hash_of(line) and datetime.fromisoformat(line.time).tzinfo == UTC and bool(line.mechanism)
    except ValueError:
        return False


_OF_AUDITS = ("epsilon", "audited")


def _is_of_one_kind(line: Line) -> bool:
    """Whether a line is one of training or one of an audit, and nothing between."""
    if line.epsilon is None:
        return line.audited is None
    others = (line.sampling_probability, line.noise_multiplier, line.steps, line.clip_norm)
    return type(line.epsilon) is float and line.audited in get_args(Audited) and others == (1, 0, 1, AUDIT_SENSITIVITY)


def content_of(line: Line) -> dict[str, Any]:
    """All of a line, as JSON holds it: what only audits have is left out of the others."""
    content = asdict(line)
    return content if line.epsilon is not None else {key: content[key] for key in content if key not in _OF_AUDITS}


def hash_of(line: Line) -> str:
    """SHA-256 (hex) of all of a line but its hash."""
    content = content_of(line)
    del content["hash"]
    return hashlib.sha256(canonical(content)).hexdigest()


def canonical(content: Mapping[str, object]) -> bytes:
    """The one JSON text of this content."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
