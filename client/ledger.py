"""What a site has spent on which patients, over all studies: one SQLite file, written before the gradients it pays for.

Lines are only ever added. Each holds the hash of the line before it, so that a changed, removed or inserted one is
found; ``ledger-head.json`` beside the file holds the newest line, so that an older copy of the file is found as well.

**Guarantee.** ``charge`` returns only after its line is on disk, and a crash at any moment can over-count, never
under-count. A ledger that is missing, damaged, altered, older than its head, locked or unwritable raises LedgerError:
nothing is trained. Whoever may write the site's folder can still put an older *pair* of files there, or compute a
false pair: the signed export that the data protection officer keeps is the proof against that.

| edge case | what counts |
|---|---|
| the same patients in a copied folder | one data set: the lines of both folders |
| a patient in two data sets (a larger cohort, another folder) | for this patient, the lines of both |
| a crash or a full disk between head and line | the line: it is put into the file when that is next opened |
| a crash after the line, before the training | the line: nobody knows that nothing was released |
| images that count as patients of their own (``record_is_patient``) | known by their paths: moved, they are others |
| two processes at once | the lines of both, one after the other |
"""

import json
import os
import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from client import ledger_file
from client.ledger_file import RESTORE
from client.ledger_lines import FIRST_HASH, Book, DataSet, Line, Release, canonical, digest_of, hash_of, is_whole
from common.errors import LedgerError, OverBudget
from common.files import locked, writable_by_everyone, write_atomically
from common.privacy import accounting
from common.privacy.accounting import Budget

FILE_NAME, HEAD_FILE, LOCK_FILE = "ledger.db", "ledger-head.json", "ledger.lock"
LOCK_SECONDS = 60.0  # a charge takes one at most: whoever holds the lock for longer has stopped
CLOCK_TOLERANCE = timedelta(minutes=10)
_TRACE = "state.pt"  # what training leaves in a study's folder


def create(folder: Path) -> None:
    """Make an empty ledger in a site's folder.

    Raises:
        LedgerError: there is one, there was one before, or it cannot be written.
    """
    path, head = folder / FILE_NAME, folder / HEAD_FILE
    with ledger_file.failures_named(path), locked(folder / LOCK_FILE):
        for found in (path, head, folder / f"{FILE_NAME}-wal"):
            if os.path.lexists(found):
                raise LedgerError(
                    f"{found} is there already, and a ledger is never made anew.",
                    "Keep it. Only if making it was interrupted and this site never trained, delete it and try again.",
                )
        if any(folder.glob(f"studies/*/{_TRACE}")):
            raise LedgerError(f"This site has trained before, and {path} is missing.", RESTORE)
        try:
            ledger_file.make(path)
            write_atomically(head, _head_content(None, None), mode=0o600)
        except BaseException:
            for half in (path, head):
                half.unlink(missing_ok=True)
            raise


class Ledger:
    """The ledger of one site. Every call reads and verifies all of it: nothing is believed from memory.

    Args:
        folder: the site's folder.
        key: from ``ledger_key``.
    """

    def __init__(self, folder: Path, key: bytes) -> None:
        self._path, self._head, self._lock = folder / FILE_NAME, folder / HEAD_FILE, folder / LOCK_FILE
        self._key = key

    def read(self) -> Book:
        """The whole ledger as it is now.

        Raises:
            LedgerError: the ledger cannot be used; says why. So do all the others.
        """
        with self._opened() as (_, book):
            return book

    def lines(self) -> tuple[Line, ...]:
        """Every line, oldest first."""
        return self.read().lines

    def charge(self, data_set: DataSet, release: Release, budget: Budget) -> Line:
        """Write down a release before it is made, if the budget allows it for every patient.

        Returns:
            The line, which is on disk.

        Raises:
            OverBudget: more would be spent on some patient than the budget. Nothing is charged.
            LedgerError: the ledger cannot be used or written; says why. At most this release is charged.
        """
        if data_set.digest != digest_of(self._key, data_set.patients):
            raise LedgerError("The data set was not made with this ledger's key.", "Use the site's own key for both.")
        with self._opened() as (db, book):
            self._check_budget(book, data_set, release, budget)
            line = self._next_line(book.lines, data_set, release)
            patients = None if data_set.digest in book.members else data_set.patients
            _insert(db, line, patients)
            # The head comes first: after a crash here the line is put back from it, and counts.
            write_atomically(self._head, _head_content(line, patients), mode=0o600)
            ledger_file.commit(db)
        return line

    def check(self, data_set: DataSet, release: Release, budget: Budget) -> None:
        """Raise what ``charge`` would raise for this release, without charging."""
        with self._opened() as (_, book):
            self._check_budget(book, data_set, release, budget)

    @contextmanager
    def _opened(self) -> Iterator[tuple[sqlite3.Connection, Book]]:
        """The verified ledger inside a transaction; one process at a time."""
        with ledger_file.failures_named(self._path):
            self._refuse_missing()
            with locked(self._lock, LOCK_SECONDS), ledger_file.opened(self._path) as db:
                book = self._verified(db)
                if book.unwritten:  # committed by itself, so that the file is never two lines behind the head
                    _insert(db, book.lines[-1], book.members[book.lines[-1].data_set])
                    ledger_file.commit(db)
                    ledger_file.begin(db)
                yield db, book

    def _refuse_missing(self) -> None:
        files = (self._path, self._head)
        missing = [path for path in files if not path.exists()]
        if len(missing) == 2:
            raise LedgerError(
                f"{self._path} is missing: this site has no ledger.",
                "For a site that never trained, `synthward policy init` makes one. Else restore it and its head.",
            )
        if missing:
            raise LedgerError(f"{missing[0]} is missing: half of the ledger is gone.", RESTORE)
        for path in files:
            if writable_by_everyone(path):
                raise LedgerError(f"Everyone may write {path}, so it proves nothing.", f"chmod 600 {path}")

    def _verified(self, db: sqlite3.Connection) -> Book:
        lines = [Line(*row) for row in db.execute(_SELECT_LINES)]
        members: dict[str, set[str]] = defaultdict(set)
        for data_set, patient in db.execute("SELECT data_set, patient FROM member"):
            members[data_set].add(patient)
        self._check_chain(lines)
        newest, patients = self._read_head()
        unwritten = self._is_ahead(newest, lines)
        if newest is not None and unwritten:
            lines.append(newest)
            members[newest.data_set].update(patients)
        self._check_members(lines, members)
        return Book(tuple(lines), {line.data_set: frozenset(members[line.data_set]) for line in lines}, unwritten)

    def _check_chain(self, lines: Sequence[Line]) -> None:
        previous = FIRST_HASH
        for number, line in enumerate(lines, 1):
            if line.number != number:
                raise self._altered(f"line {number} is missing")
            if not is_whole(line):
                raise self._altered(f"line {number} is not what was written")
            if line.previous != previous:
                raise self._altered(f"line {number} does not follow the line before it")
            previous = line.hash

    def _is_ahead(self, newest: Line | None, lines: Sequence[Line]) -> bool:
        """Whether the head holds the one line that the file lacks; raises unless it is that or the newest line."""
        number, found = (newest.number if newest else 0), len(lines)
        hash_ = newest.hash if newest else FIRST_HASH
        last = lines[-1].hash if lines else FIRST_HASH
        if number > found + 1:
            raise LedgerError(
                f"{self._path} is an older copy: it ends at line {found}, and {HEAD_FILE} at line {number}.", RESTORE
            )
        if number < found:
            raise self._altered(
                f"it ends at line {found}, and {HEAD_FILE} at line {number}, so lines were added, or {HEAD_FILE} is an "
                "older copy"
            )
        if number == found and hash_ != last:
            raise self._altered(f"line {number} is another one than in {HEAD_FILE}")
        if newest is not None and number > found and newest.previous != last:
            raise self._altered(f"line {number}, in {HEAD_FILE}, does not follow line {found}")
        return number > found

    def _check_members(self, lines: Sequence[Line], members: Mapping[str, set[str]]) -> None:
        first: dict[str, int] = {}
        for line in lines:
            first.setdefault(line.data_set, line.number)
        if members.keys() - first.keys():
            raise self._altered("it has patients of a data set without lines")
        for data_set, number in first.items():
            if data_set != digest_of(self._key, members.get(data_set, ())):
                raise self._altered(f"the patients of line {number} are others, or the site's key is another one")

    def _read_head(self) -> tuple[Line | None, frozenset[str]]:
        """The newest line and, when its data set was new, the patients."""
        try:
            content = json.loads(self._head.read_bytes())
            line = None if content["line"] is None else Line(**content["line"])
            patients = None if content["members"] is None else frozenset(map(str, content["members"]))
            whole = (line is None or is_whole(line)) and content == json.loads(_head_content(line, patients))
        except (ValueError, KeyError, TypeError, RecursionError):
            whole = False
        if not whole:
            raise LedgerError(f"{self._head} is damaged or was altered.", RESTORE)
        return line, patients or frozenset()

    def _check_budget(self, book: Book, data_set: DataSet, release: Release, budget: Budget) -> None:
        own = frozenset({data_set.digest})
        groups = {group | own for group in book.groups(data_set.patients)} or {own}
        for group in groups:
            if any(group < other for other in groups):
                continue  # on the patients of the other group at least as much was spent
            history = accounting.append(book.history(group), release.mechanism)
            if not accounting.fits(history, budget):
                epsilon = accounting.epsilon(history, budget.delta)
                raise OverBudget(
                    f"Another round of {release.study_name} would bring patients in {data_set.folder} to "
                    f"epsilon {epsilon:.4g} at delta {budget.delta:g}, and the site allows {budget.epsilon:g}.",
                    "What is spent stays spent. Plan fewer steps or more noise, or train on other patients.",
                )

    def _next_line(self, lines: Sequence[Line], data_set: DataSet, release: Release) -> Line:
        line = Line(
            number=len(lines) + 1,
            time=self._time_after(lines),
            study_digest=release.study_digest,
            study_name=release.study_name,
            run=release.run,
            round=release.round,
            data_set=data_set.digest,
            folder=data_set.folder,
            sampling_probability=float(release.mechanism.sampling_probability),
            noise_multiplier=float(release.mechanism.noise_multiplier),
            steps=release.mechanism.steps,
            clip_norm=float(release.clip_norm),
            previous=lines[-1].hash if lines else FIRST_HASH,
            hash="",
        )
        return replace(line, hash=hash_of(line))

    def _time_after(self, lines: Sequence[Line]) -> str:
        """Now; the newest line's time when the clock is a little behind it."""
        now = _now()
        newest = datetime.fromisoformat(lines[-1].time) if lines else now
        if newest - now > CLOCK_TOLERANCE:
            raise LedgerError(
                f"The clock was set back: it says {_text(now)}, and the newest line in {self._path} {_text(newest)}.",
                "Correct the clock. If it was ahead when that line was written, wait until then.",
            )
        return _text(max(now, newest))

    def _altered(self, what: str) -> LedgerError:
        return LedgerError(f"{self._path} was altered: {what}.", RESTORE)


_SELECT_LINES = """
    SELECT number, time, study_digest, study_name, run, round, data_set, folder, sampling_probability,
    noise_multiplier, steps, clip_norm, previous, hash FROM line ORDER BY number
"""
_INSERT_LINE = """
    INSERT INTO line (number, time, study_digest, study_name, run, round, data_set, folder, sampling_probability,
    noise_multiplier, steps, clip_norm, previous, hash)
    VALUES (:number, :time, :study_digest, :study_name, :run, :round, :data_set, :folder, :sampling_probability,
    :noise_multiplier, :steps, :clip_norm, :previous, :hash)
"""


def _insert(db: sqlite3.Connection, line: Line, new_patients: frozenset[str] | None) -> None:
    rows = [(line.data_set, patient) for patient in new_patients or ()]
    db.executemany("INSERT OR IGNORE INTO member (data_set, patient) VALUES (?, ?)", rows)
    db.execute(_INSERT_LINE, asdict(line))


def _head_content(newest: Line | None, new_patients: frozenset[str] | None) -> bytes:
    members = None if new_patients is None else sorted(new_patients)
    return canonical({"line": asdict(newest) if newest else None, "members": members})


def _now() -> datetime:
    return datetime.now(UTC)


def _text(time: datetime) -> str:
    return time.isoformat(timespec="seconds")
