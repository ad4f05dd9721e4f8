"""The site's own log: ``site.log`` in the site's folder. It may name files and patients, so it never leaves."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

FILE_NAME = "site.log"
logger = logging.getLogger("synthward.site")
logger.setLevel(logging.INFO)
logger.propagate = False
_current: ContextVar[Path | None] = ContextVar("current_site", default=None)


@contextmanager
def site_log(folder: Path) -> Iterator[logging.Logger]:
    """Send what this thread logs to ``synthward.site`` to the log of the site in ``folder``, inside the block.

    Sites of a simulation are threads of one process: each record goes to the file of its own thread's site only.
    """
    os.close(os.open(folder / FILE_NAME, os.O_WRONLY | os.O_CREAT, 0o600))  # it names files: for its owner only
    handler = logging.FileHandler(folder / FILE_NAME, delay=True)
    handler.addFilter(lambda record: _current.get() == folder)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    token = _current.set(folder)
    logger.addHandler(handler)
    try:
        yield logger
    finally:
        logger.removeHandler(handler)
        handler.close()
        _current.reset(token)
