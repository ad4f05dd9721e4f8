"""What a secure sum costs: clocks, bytes on the wire and traced memory, for whichever implementation makes the sum."""

import time
import tracemalloc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from flwr.app import RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from numpy.typing import NDArray

Vector = NDArray[np.float32]
T = TypeVar("T")


class Clock:
    """Seconds spent in its ``with`` blocks, added up: wall, and CPU of all threads."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self.wall += time.perf_counter() - self._began[0]
        self.cpu += time.process_time() - self._began[1]


@dataclass(frozen=True)
class Case:
    """One sum.

    Args:
        dim: coordinates.
        sites: how many begin.
        dropped: how many of them, the first, send no masked vector.
    """

    dim: int
    sites: int
    dropped: int = 0

    @property
    def staying(self) -> range:
        """The sites in the sum."""
        return range(self.dropped, self.sites)

    def vector(self, site: int) -> Vector:
        """The vector of a site, (dim,); made when it is asked for, so that not all are held at once."""
        return np.random.default_rng([7, site]).standard_normal(self.dim, np.float32) * np.float32(0.1)

    def error_of(self, total: NDArray[np.floating]) -> float:
        """Largest deviation from the plain sum."""
        plain = np.zeros(self.dim)
        for site in self.staying:
            plain += self.vector(site)
        return float(np.max(np.abs(total - plain)))


@dataclass
class Cost:
    """What one sum cost. Of a site: the mean over those that stay. Memory in vectors of 4 bytes a coordinate."""

    client_seconds: float
    client_cpu_seconds: float
    server_seconds: float
    server_cpu_seconds: float
    up_bytes: float
    down_bytes: float
    client_vectors: float
    server_vectors: float
    error: float = 0.0
    masks: float = 0.0


@dataclass
class Meter:
    """Measures one sum.

    Args:
        case: the sum.
        tracing: measure memory; the clocks then mean nothing.
    """

    case: Case
    tracing: bool = False
    server: Clock = field(default_factory=Clock)
    client_peak: int = 0
    server_peak: int = 0

    def __post_init__(self) -> None:
        self.clients = [Clock() for _ in range(self.case.sites)]
        self.up, self.down = [0] * self.case.sites, [0] * self.case.sites
        if self.tracing:
            tracemalloc.start()

    def serve(self, work: Callable[[], T]) -> T:
        """Do a part of the server's work."""
        self.begin_peak()
        with self.server:
            result = work()
        self.end_server_peak()
        return result

    def begin_peak(self) -> int:
        """Look for the most memory in use from here on. Returns what is in use."""
        if not self.tracing:
            return 0
        tracemalloc.reset_peak()
        return tracemalloc.get_traced_memory()[0]

    def end_server_peak(self) -> None:
        """What was in use since ``begin_peak`` is the server's."""
        if self.tracing:
            self.server_peak = max(self.server_peak, tracemalloc.get_traced_memory()[1])

    def end_client_peak(self, before: int) -> None:
        """What was in use since ``begin_peak`` on top of ``before`` is a site's."""
        if self.tracing:
            self.client_peak = max(self.client_peak, tracemalloc.get_traced_memory()[1] - before)

    def cost(self) -> Cost:
        """The sum is made."""
        if self.tracing:
            tracemalloc.stop()
        staying, vector = self.case.staying, 4 * self.case.dim
        return Cost(
            mean(self.clients[site].wall for site in staying),
            mean(self.clients[site].cpu for site in staying),
            self.server.wall,
            self.server.cpu,
            mean(self.up[site] for site in staying),
            mean(self.down[site] for site in staying),
            1 + self.client_peak / vector,  # its own vector was there before
            self.server_peak / vector,
        )


def wire_bytes(content: RecordDict) -> int:
    """The size of what Flower sends for a message's content."""
    return sum(len(part.deflate()) for part in get_all_nested_objects(content).values())


def mean(numbers: Iterable[float]) -> float:
    """Their mean; 0 of none."""
    found = list(numbers)
    return sum(found) / max(1, len(found))
