"""How long work reports how far it is, without knowing who listens.

The listener is set for one thread of work (a context variable). It may raise KeyboardInterrupt to stop the work
between two steps.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Listener = Callable[[int, int], None]

_listener: ContextVar[Listener | None] = ContextVar("progress_listener", default=None)


def report(done: int, total: int) -> None:
    """Tell the listener, if there is one, that ``done`` steps of ``total`` are made."""
    listener = _listener.get()
    if listener is not None:
        listener(done, total)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Send reports from this thread to ``listener`` inside the block."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
