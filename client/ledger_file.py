"""The SQLite file of a site's ledger: made, recognised, brought up to date, and every failure of it named.

Nothing is changed in a file before it is recognised, so a foreign or damaged one stays as it was found.
"""

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from common.errors import LedgerError

BUSY_TIMEOUT_SECONDS = 5.0
APPLICATION_ID = int.from_bytes(b"SynL", "big")  # SQLite keeps it in the file's header
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE line (number INTEGER PRIMARY KEY, time TEXT NOT NULL, study_digest TEXT NOT NULL,"
        " study_name TEXT NOT NULL, run TEXT NOT NULL, round INTEGER NOT NULL, data_set TEXT NOT NULL,"
        " folder TEXT NOT NULL, sampling_probability REAL NOT NULL, noise_multiplier REAL NOT NULL,"
        " steps INTEGER NOT NULL, clip_norm REAL NOT NULL, previous TEXT NOT NULL, hash TEXT NOT NULL)",
        "CREATE TABLE member (data_set TEXT NOT NULL, patient TEXT NOT NULL, PRIMARY KEY (data_set, patient))"
        " WITHOUT ROWID",
        # REPLACE deletes without asking the trigger against it, so a line may only come right after the newest one.
        "CREATE TRIGGER line_follows BEFORE INSERT ON line"
        " WHEN NEW.number IS NOT (SELECT COALESCE(MAX(number), 0) + 1 FROM line)"
        " BEGIN SELECT RAISE(ABORT, 'append only'); END",
        "CREATE TRIGGER line_unchanged BEFORE UPDATE ON line BEGIN SELECT RAISE(ABORT, 'append only'); END",
        "CREATE TRIGGER line_kept BEFORE DELETE ON line BEGIN SELECT RAISE(ABORT, 'append only'); END",
        "CREATE TRIGGER member_unchanged BEFORE UPDATE ON member BEGIN SELECT RAISE(ABORT, 'append only'); END",
        "CREATE TRIGGER member_kept BEFORE DELETE ON member BEGIN SELECT RAISE(ABORT, 'append only'); END",
    ),
    ("ALTER TABLE line ADD COLUMN epsilon REAL", "ALTER TABLE line ADD COLUMN audited TEXT"),
)
"""What leads from each version of the schema to the next; ``PRAGMA user_version`` counts those that are applied."""

RESTORE = "Restore the newest state of both files. Without it, what was spent is unknown, and this site cannot train."
MAKE_ROOM = "Make room on the disk, then start again. Nothing was released."
GIVE_RIGHTS = "Let the account that trains read and write the site's folder and every file in it named ledger..."


def make(path: Path) -> None:
    """A file with the newest schema and nothing in it, for its owner only. There must be none."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    with closing(_connect(path)) as db:
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        _make_durable(db, path)
        _migrate(db, 0)


@contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    """The file inside a transaction, up to date. Whoever writes commits; what is not committed never was.

    Raises:
        LedgerError: it is no ledger, its schema was altered, or a newer program has used it.
    """
    with closing(_connect(path)) as db:
        version = _recognise(db, path)
        _make_durable(db, path)
        _migrate(db, version)
        begin(db)
        yield db


def begin(db: sqlite3.Connection) -> None:
    """Begin a transaction that may write."""
    db.execute("BEGIN IMMEDIATE")


def commit(db: sqlite3.Connection) -> None:
    """Wait until what was written is on disk."""
    db.execute("COMMIT")


@contextmanager
def failures_named(path: Path) -> Iterator[None]:
    """Raise every failure of SQLite and of the file system as a LedgerError that says what is wrong and what helps."""
    try:
        yield
    except sqlite3.Error as error:
        raise _named(path, error) from error
    except UnicodeDecodeError as error:  # SQLite's own text quotes the damaged bytes
        raise LedgerError(f"{path} is damaged: it has text that is none.", RESTORE) from error
    except OSError as error:
        where, why = error.filename or path, error.strerror or str(error)
        if isinstance(error, TimeoutError):
            raise LedgerError(f"{path} is locked: {why}.", "End the process of Synthward that has stopped.") from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise LedgerError(f"The disk is full: {path} cannot be written ({why}).", MAKE_ROOM) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise LedgerError(f"{where} cannot be read and written: {why}.", GIVE_RIGHTS) from error
        raise LedgerError(f"{where} cannot be read and written: {why}.", "Check the site's folder and disk.") from error


def _named(path: Path, error: sqlite3.Error) -> LedgerError:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # the lowest byte is the kind of error
    name = getattr(error, "sqlite_errorname", type(error).__name__)
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return LedgerError(
            f"{path} is locked: another program has held it for {BUSY_TIMEOUT_SECONDS:g} seconds.",
            "Close the program that has it open, such as a database browser or a backup.",
        )
    if code == sqlite3.SQLITE_FULL:
        return LedgerError(f"The disk is full: {path} cannot be written.", MAKE_ROOM)
    if code == sqlite3.SQLITE_IOERR:  # a limit on the size of files reads the same as a failing disk
        return LedgerError(f"The disk is full or fails: {path} cannot be read and written ({name}).", MAKE_ROOM)
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH, sqlite3.SQLITE_CANTOPEN):
        return LedgerError(f"{path} cannot be read and written: {error} ({name}).", GIVE_RIGHTS)
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return LedgerError(f"{path} is damaged: {error}.", RESTORE)
    return LedgerError(f"{path} was altered: {error}.", RESTORE)


def _connect(path: Path) -> sqlite3.Connection:
    """A connection that begins no transaction by itself and makes no file."""
    if not os.access(path, os.R_OK | os.W_OK):  # SQLite would only read, and leave files behind that cannot be written
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    address = f"{path.absolute().as_uri()}?mode=rw"
    return sqlite3.connect(address, uri=True, timeout=BUSY_TIMEOUT_SECONDS, isolation_level=None)


def _recognise(db: sqlite3.Connection, path: Path) -> int:
    """The version of a ledger's schema; refuses every other file, and changes nothing."""
    version = _number(db, "user_version")
    if _number(db, "application_id") != APPLICATION_ID or version < 1:
        raise LedgerError(f"{path} is not a ledger.", RESTORE)
    if version > len(MIGRATIONS):
        raise LedgerError(
            f"{path} has version {version} of the schema, and this program knows versions up to {len(MIGRATIONS)}.",
            "A newer program has used this ledger: install that one.",
        )
    if _schema(db) != _schema_of(MIGRATIONS[:version]):
        raise LedgerError(f"{path} was altered: its tables or triggers are not a ledger's.", RESTORE)
    return version


def _make_durable(db: sqlite3.Connection, path: Path) -> None:
    """A commit returns when its line is on disk."""
    (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise LedgerError(
            f"The file system of {path} cannot hold a write-ahead log: SQLite chose {mode!r}.",
            "Keep the site's folder on a local disk.",
        )
    db.execute("PRAGMA synchronous = FULL")


def _migrate(db: sqlite3.Connection, version: int) -> None:
    """All missing versions or none."""
    if version == len(MIGRATIONS):
        return
    begin(db)
    for statements in MIGRATIONS[version:]:
        for statement in statements:
            db.execute(statement)
    db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
    commit(db)


def _number(db: sqlite3.Connection, pragma: str) -> int:
    return int(db.execute(f"PRAGMA {pragma}").fetchone()[0])


def _schema(db: sqlite3.Connection) -> list[tuple[str, str, str]]:
    """What was declared; SQLite's own tables and indices left out."""
    return list(
        db.execute("SELECT type, name, sql FROM sqlite_master WHERE substr(name, 1, 7) <> 'sqlite_' ORDER BY 2")
    )


def _schema_of(migrations: tuple[tuple[str, ...], ...]) -> list[tuple[str, str, str]]:
    with closing(sqlite3.connect(":memory:")) as db:
        for statements in migrations:
            for statement in statements:
                db.execute(statement)
        return _schema(db)
