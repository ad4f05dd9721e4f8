"""Writing files so that a crash leaves either the old content or the new one, and one process at a time."""

import errno
import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace ``path`` by ``data``: temporary file beside it, fsync, rename, fsync of the folder.

    Args:
        path: the file; its folder exists.
        data: the whole content.
        mode: permission bits of the new file.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # a name of its own, mode 0600
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def writable_by_everyone(path: Path) -> bool:
    """Whether every user of this machine may write the file."""
    return bool(path.stat().st_mode & stat.S_IWOTH)


@contextmanager
def locked(path: Path, most_seconds: float | None = None) -> Iterator[None]:
    """Be the only process, and the only thread, inside a block with this path. Waits for its turn.

    The operating system drops the lock when the process ends, however it ends.

    Raises:
        TimeoutError: after ``most_seconds``, if given, somebody else still has it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if most_seconds is None:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        else:
            _lock_by(descriptor, path, time.monotonic() + most_seconds)
        yield
    finally:
        os.close(descriptor)


def _lock_by(descriptor: int, path: Path, deadline: float) -> None:
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    errno.ETIMEDOUT, "another process has held the lock for too long", str(path)
                ) from None
            time.sleep(0.01)
