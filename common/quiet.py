"""Silence around libraries whose warnings are of no use to an operator, or would quote a file."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LOCK = threading.Lock()  # catch_warnings is global to the process; sites of a simulation are threads of one


@contextmanager
def quiet() -> Iterator[None]:
    """Drops all warnings meanwhile; one thread at a time. Not to be nested."""
    with _LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
