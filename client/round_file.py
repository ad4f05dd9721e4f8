"""What a site keeps of a secure sum between two messages, each of which may reach a new process.

**Guarantee.** The secrets of an attempt are on disk sealed only (ChaCha20-Poly1305 under a key derived from the site's
identity key), in a file for its owner's eyes, until the attempt ends here; one that a crash or a failed run cut off is
erased when the site is next asked to enrol or begins another. A replaced or ended file is overwritten before it goes.
Overwriting reaches the disk's blocks only where the file system writes in place; the sealing does not depend on it. The
newest attempt served is on disk before its keys leave, so none is served twice. A session's step is on disk as begun
before anything is computed for it, so none is served twice either.
"""

import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from client import updates
from client.identity import Member
from client.secagg import SiteRound
from client.secagg_session import SiteSession
from common.errors import OutOfOrder, SiteError
from common.files import locked, write_atomically
from common.secagg import keys
from common.secagg.keys import AdvertisedKeys, Attempt

ROUND_FILE, SERVED_FILE, LOCK_FILE = "secure-sum.sealed", "secure-sum.json", "secure-sum.lock"
A = TypeVar("A", SiteRound, SiteSession)


class RoundFile:
    """The attempt that a site is in, of one study.

    Args:
        folder: the study's folder at the site.
        member: who the site is.
        study_digest: the study.
    """

    def __init__(self, folder: Path, member: Member, study_digest: str) -> None:
        self._folder, self._member, self._study_digest = folder, member, study_digest
        label = Attempt(study_digest, 0).label("round_file", member.site)
        self._cipher = ChaCha20Poly1305(keys.derive(member.identity.private_bytes_raw(), b"", label))

    def begin(self, number: int, minimum_cohort: int) -> AdvertisedKeys:
        """Start an attempt, in place of any before it, and return its keys once both are on disk.

        Raises:
            OutOfOrder: this attempt, or a later one, was served before.
        """
        with locked(self._folder / LOCK_FILE):
            newest = last_attempt(self._folder)
            if number <= newest:
                raise OutOfOrder(f"Expected an attempt after {newest}, found {number}.", "It is never served twice.")
            write_atomically(self._folder / SERVED_FILE, json.dumps({"attempt": number}).encode(), mode=0o600)
            self._erase()
            attempt = SiteRound(self._member, Attempt(self._study_digest, number), minimum_cohort)
            own = attempt.advertise_keys()
            self._save(attempt)
            return own

    @contextmanager
    def stage(self, number: int) -> Iterator[SiteRound]:
        """The attempt, for one stage of a sum: kept as the block leaves it, and ended when the block raises.

        Raises:
            OutOfOrder: the site is not in this attempt, or in a session.
        """
        with self._opened(number, _as_round) as current:
            yield current

    @contextmanager
    def session(self, number: int) -> Iterator[SiteSession]:
        """The attempt, for one stage of a session, its first included; see ``stage``."""
        with self._opened(number, _as_session) as current:
            yield current

    @contextmanager
    def _opened(self, number: int, read_as: Callable[[SiteRound | SiteSession], A]) -> Iterator[A]:
        with locked(self._folder / LOCK_FILE):
            found = self._load()
            if found.attempt.number != number:
                raise OutOfOrder(f"Expected attempt {found.attempt.number}, found {number}.")
            try:
                current = read_as(found)
                yield current
                self._save(current)
            except BaseException:
                self._erase()
                raise

    def end(self, number: int) -> None:
        """Overwrite and unlink the secrets of this attempt, and of any before it."""
        with locked(self._folder / LOCK_FILE):
            if last_attempt(self._folder) <= number:
                self._erase()

    def _load(self) -> SiteRound | SiteSession:
        try:
            data = (self._folder / ROUND_FILE).read_bytes()
        except FileNotFoundError:
            raise OutOfOrder("This site is in no attempt.", "It takes part again in the next one.") from None
        try:
            tree = json.loads(self._cipher.decrypt(data[:12], data[12:], None))
            kind = SiteSession if "steps" in tree else SiteRound
            return kind.from_tree(self._member, tree)
        except (InvalidTag, ValueError, KeyError, TypeError):
            self._erase()
            raise SiteError(
                "The file of the running attempt was damaged; it is erased.", "The next one works."
            ) from None

    def _save(self, current: SiteRound | SiteSession) -> None:
        nonce = secrets.token_bytes(12)
        sealed = nonce + self._cipher.encrypt(nonce, json.dumps(current.to_tree()).encode(), None)
        with _overwritten(self._folder / ROUND_FILE):
            write_atomically(self._folder / ROUND_FILE, sealed, mode=0o600)

    def _erase(self) -> None:
        path = self._folder / ROUND_FILE
        with _overwritten(path):
            path.unlink(missing_ok=True)
        for unfinished in self._folder.glob(f".{ROUND_FILE}.*"):  # of a process that was killed while it wrote
            unfinished.unlink(missing_ok=True)


def _as_round(found: SiteRound | SiteSession) -> SiteRound:
    if isinstance(found, SiteSession):
        raise OutOfOrder("Expected a message of a session, found one of a sum.")
    return found


def _as_session(found: SiteRound | SiteSession) -> SiteSession:
    return found if isinstance(found, SiteSession) else SiteSession.after(found)


def last_attempt(folder: Path) -> int:
    """The newest attempt served in the study of this folder, 0 for none. Raises SiteError for a damaged file."""
    path = folder / SERVED_FILE
    if not path.exists():
        if (folder / updates.FILE_NAME).exists():
            raise SiteError(f"{path} is gone.", "Restore it: without it an attempt could be served twice.")
        return 0
    try:
        number = json.loads(path.read_bytes())["attempt"]
    except (ValueError, KeyError, TypeError):
        number = None
    if type(number) is not int or number < 0:
        raise SiteError(f"{path} is damaged.", "Restore it: without it an attempt could be served twice.")
    return number


@contextmanager
def _overwritten(path: Path) -> Iterator[None]:
    """Overwrite, after the block, the content that ``path`` had before it."""
    try:
        descriptor = os.open(path, os.O_WRONLY)
    except FileNotFoundError:
        yield
        return
    try:
        yield
        os.pwrite(descriptor, bytes(os.fstat(descriptor).st_size), 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
