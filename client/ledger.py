"""What a site has spent on which patients, over all studies: one SQLite file, written before the gradients it pays for.

Lines are only ever added. Each holds the hash of the line before it, so that a changed, removed or inserted one is
found; ``ledger-head.json`` beside the file holds the lines charged last, so that an older copy is found as well.

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
| several lines of one charge | all of them or none, wherever a crash comes |
"""

import json
import os
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from client import ledger_file
from client.ledger_file import RESTORE
from client.ledger_lines import (
    FIRST_HASH,
    Book,
    DataSet,
    Line,
    Release,
    canonical,
    content_of,
    digest_of,
    hash_of,
    is_whole,
)
from common.errors import LedgerError, OverBudget
from common.files import locked, writable_by_everyone, write_atomically
from common.privacy import accounting
from common.privacy.accounting import Budget, Mechanism, PureRelease

Written = tuple[Line, frozenset[str] | None]
"""A line with the patients of its data set, None when an older line has them."""
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
            write_atomically(head, _head_content(()), mode=0o600)
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
        return self.charge_together([(data_set, release)], budget)[0]

    def charge_together(
        self,
        charges: Sequence[tuple[DataSet, Release]],
        budget: Budget,
        refuse: Callable[[Book], None] = lambda book: None,
    ) -> tuple[Line, ...]:
        """Write down several releases before they are made: all of them, or none.

        Args:
            charges: one release or more, each on its own data set.
            budget: of every patient.
            refuse: raises, by what the ledger holds before, when the releases must not be made.

        Returns:
            A line for each, which are on disk.

        Raises:
            OverBudget: more would be spent on some patient than the budget. Nothing is charged.
            LedgerError: the ledger cannot be used or written; says why. At most these releases are charged, and when
                one is, all are.
        """
        with self._opened() as (db, book):
            written = self._allowed(book, charges, budget, refuse)
            for line, patients in written:
                _insert(db, line, patients)
            # The head comes first: after a crash here the lines are put back from it, and count.
            write_atomically(self._head, _head_content(written), mode=0o600)
            ledger_file.commit(db)
        return tuple(line for line, _ in written)

    def check(self, data_set: DataSet, release: Release, budget: Budget) -> None:
        """Raise what ``charge`` would raise for this release, without charging."""
        self.check_together([(data_set, release)], budget)

    def check_together(
        self,
        charges: Sequence[tuple[DataSet, Release]],
        budget: Budget,
        refuse: Callable[[Book], None] = lambda book: None,
    ) -> None:
        """Raise what ``charge_together`` would raise for these releases, without charging."""
        with self._opened() as (_, book):
            self._allowed(book, charges, budget, refuse)

    @contextmanager
    def _opened(self) -> Iterator[tuple[sqlite3.Connection, Book]]:
        """The verified ledger inside a transaction; one process at a time."""
        with ledger_file.failures_named(self._path):
            self._refuse_missing()
            with locked(self._lock, LOCK_SECONDS), ledger_file.opened(self._path) as db:
                book = self._verified(db)
                if book.unwritten:  # committed by itself, so that the file is never two charges behind the head
                    for line in book.lines[-book.unwritten :]:
                        _insert(db, line, book.members[line.data_set])
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
        newest = self._read_head()
        unwritten = self._num_ahead([line for line, _ in newest], lines)
        for line, patients in newest[len(newest) - unwritten :]:
            lines.append(line)
            members[line.data_set].update(patients or ())
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

    def _num_ahead(self, newest: Sequence[Line], lines: Sequence[Line]) -> int:
        """How many lines of the head the file lacks; raises unless it has all the others, and only they are missing."""
        number, found = (newest[-1].number if newest else 0), len(lines)
        if number > found + max(1, len(newest)):
            raise LedgerError(
                f"{self._path} is an older copy: it ends at line {found}, and {HEAD_FILE} at line {number}.", RESTORE
            )
        if number < found:
            raise self._altered(
                f"it ends at line {found}, and {HEAD_FILE} at line {number}, so lines were added, or {HEAD_FILE} is an "
                "older copy"
            )
        known = list(lines)
        for line in newest:
            if line.number <= found and line != known[line.number - 1]:
                raise self._altered(f"line {line.number} is another one than in {HEAD_FILE}")
            if line.number > found:
                previous = known[-1].hash if known else FIRST_HASH
                if line.number != len(known) + 1 or line.previous != previous:
                    raise self._altered(f"line {line.number}, in {HEAD_FILE}, does not follow line {len(known)}")
                known.append(line)
        return len(known) - found

    def _check_members(self, lines: Sequence[Line], members: Mapping[str, set[str]]) -> None:
        first: dict[str, int] = {}
        for line in lines:
            first.setdefault(line.data_set, line.number)
        if members.keys() - first.keys():
            raise self._altered("it has patients of a data set without lines")
        for data_set, number in first.items():
            if data_set != digest_of(self._key, members.get(data_set, ())):
                raise self._altered(f"the patients of line {number} are others, or the site's key is another one")

    def _read_head(self) -> tuple[Written, ...]:
        """The lines that were charged last, oldest first; none in a new ledger."""
        try:
            content = json.loads(self._head.read_bytes())
            entries = [*content.get("before", ()), {key: content[key] for key in ("line", "members")}]
            written = tuple(map(_written, entries)) if content["line"] is not None else ()
            whole = all(is_whole(line) for line, _ in written) and content == json.loads(_head_content(written))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            whole = False
        if not whole:
            raise LedgerError(f"{self._head} is damaged or was altered.", RESTORE)
        return written

    def _allowed(
        self,
        book: Book,
        charges: Sequence[tuple[DataSet, Release]],
        budget: Budget,
        refuse: Callable[[Book], None],
    ) -> tuple[Written, ...]:
        """The lines of these charges, each with its patients when its data set is new. Raises when one is refused."""
        if any(data_set.digest != digest_of(self._key, data_set.patients) for data_set, _ in charges):
            raise LedgerError("The data set was not made with this ledger's key.", "Use the site's own key for both.")
        refuse(book)
        written = []
        for data_set, release in charges:
            self._check_budget(book, data_set, release, budget)
            line = self._next_line(book.lines, data_set, release)
            written.append((line, None if data_set.digest in book.members else data_set.patients))
            book = book.with_line(line, data_set.patients)
        return tuple(written)

    def _check_budget(self, book: Book, data_set: DataSet, release: Release, budget: Budget) -> None:
        own = frozenset({data_set.digest})
        groups = {group | own for group in book.groups(data_set.patients)} or {own}
        for group in groups:
            if any(group < other for other in groups):
                continue  # on the patients of the other group at least as much was spent
            history = accounting.append(book.history(group), release.mechanism)
            if not accounting.fits(history, budget):
                epsilon = accounting.epsilon(history, budget.delta)
                what = "round" if release.audited is None else "audit"
                raise OverBudget(
                    f"Another {what} of {release.study_name} would bring patients in {data_set.folder} to "
                    f"epsilon {epsilon:.4g} at delta {budget.delta:g}, and the site allows {budget.epsilon:g}.",
                    "What is spent stays spent. Plan fewer steps or more noise, or train on other patients.",
                )

    def _next_line(self, lines: Sequence[Line], data_set: DataSet, release: Release) -> Line:
        mechanism = release.mechanism
        noise = mechanism if isinstance(mechanism, Mechanism) else None
        line = Line(
            number=len(lines) + 1,
            time=self._time_after(lines),
            study_digest=release.study_digest,
            study_name=release.study_name,
            run=release.run,
            round=release.round,
            data_set=data_set.digest,
            folder=data_set.folder,
            sampling_probability=float(noise.sampling_probability) if noise else 1.0,
            noise_multiplier=float(noise.noise_multiplier) if noise else 0.0,
            steps=mechanism.steps,
            clip_norm=float(release.clip_norm),
            previous=lines[-1].hash if lines else FIRST_HASH,
            hash="",
            epsilon=float(mechanism.epsilon) if isinstance(mechanism, PureRelease) else None,
            audited=release.audited,
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
    noise_multiplier, steps, clip_norm, previous, hash, epsilon, audited FROM line ORDER BY number
"""
_INSERT_LINE = """
    INSERT INTO line (number, time, study_digest, study_name, run, round, data_set, folder, sampling_probability,
    noise_multiplier, steps, clip_norm, previous, hash, epsilon, audited)
    VALUES (:number, :time, :study_digest, :study_name, :run, :round, :data_set, :folder, :sampling_probability,
    :noise_multiplier, :steps, :clip_norm, :previous, :hash, :epsilon, :audited)
"""


def _insert(db: sqlite3.Connection, line: Line, new_patients: frozenset[str] | None) -> None:
    rows = [(line.data_set, patient) for patient in new_patients or ()]
    db.executemany("INSERT OR IGNORE INTO member (data_set, patient) VALUES (?, ?)", rows)
    db.execute(_INSERT_LINE, asdict(line))


def _head_content(written: Sequence[Written]) -> bytes:
    """The newest line and its patients; beside them those that were charged with it, when there are any."""
    entries = [
        {"line": content_of(line), "members": None if patients is None else sorted(patients)}
        for line, patients in written
    ]
    if not entries:
        return canonical({"line": None, "members": None})
    return canonical(entries[-1] | ({"before": entries[:-1]} if entries[:-1] else {}))


def _written(entry: Mapping[str, Any]) -> Written:
    members = entry["members"]
    return Line(**entry["line"]), None if members is None else frozenset(map(str, members))


def _now() -> datetime:
    return datetime.now(UTC)


def _text(time: datetime) -> str:
    return time.isoformat(timespec="seconds")
