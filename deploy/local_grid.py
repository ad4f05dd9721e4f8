"""A Flower grid inside this process: the same two apps, sites as threads, no SuperLink.

Flower has no public local grid with a return value and real exceptions, so this is one. It touches Flower's internals
in two places, both marked: the task identity that messages are stamped with, and the message id that a SuperLink gives.
"""

import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from common import progress

PULL_SECONDS = 0.3
CLIENT_APP_RAISED = 2  # Flower's error code for a handler that raised
MESSAGE_UNAVAILABLE = 5  # and for a message that was never handed over
UserConfig = dict[str, str | int | float | bool]


@dataclass
class Watcher:
    """Hears about every message of a site; all calls come from worker threads.

    Args:
        started: (site's node id, group of the message).
        stepped: (node id, steps done, steps in all).
        finished: (node id, group).
    """

    started: Callable[[int, str], None] = lambda node, group: None
    stepped: Callable[[int, int, int], None] = lambda node, done, total: None
    finished: Callable[[int, str], None] = lambda node, group: None


@dataclass
class _Node:
    """A site: it handles one message at a time, and those that wait keep no thread from other sites."""

    context: Context
    waiting: deque[tuple[Message, Future[Message]]] = field(default_factory=deque)
    working: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)  # of the two above


class LocalGrid(Grid):
    """Grid that runs a ClientApp for each node in a pool of threads.

    Args:
        client_app: the app of every site.
        nodes: node configuration by node id.
        run_config: the run's configuration, the same for all.
        num_workers: how many sites work at once.
        prepare_worker: called once in each worker thread before it works.
        watcher: for progress bars.
    """

    def __init__(
        self,
        client_app: ClientApp,
        nodes: dict[int, UserConfig],
        run_config: UserConfig,
        num_workers: int,
        prepare_worker: Callable[[], None] = lambda: None,
        watcher: Watcher | None = None,
    ) -> None:
        self._app = client_app
        self._watcher = watcher or Watcher()
        self._stopping = threading.Event()
        self._futures: dict[str, Future[Message]] = {}
        self._run = Run.create_empty(run_id=1)
        self._nodes = {
            node: _Node(Context(run_id=1, node_id=node, node_config=config, state=RecordDict(), run_config=run_config))
            for node, config in nodes.items()
        }
        self._pool = ThreadPoolExecutor(num_workers, "site", prepare_worker)
        # Private to Flower: without it no message can be made.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1

    def stop(self) -> None:
        """Tell the sites to stop between two steps."""
        self._stopping.set()

    def close(self) -> None:
        """Stop the sites and wait until they have."""
        self.stop()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def set_run(self, run: Run) -> None:
        """Take over the run's description."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run's description."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to one node."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        """All nodes: they are there from the start."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Hand every message to its node's thread. Returns the message ids, in order."""
        ids = []
        for message in messages:
            message_id = uuid.uuid4().hex
            message.metadata.__dict__["_message_id"] = message_id  # private to Flower: a SuperLink would set it
            future = self._futures[message_id] = Future()
            node = self._nodes[message.metadata.dst_node_id]
            with node.lock:
                node.waiting.append((message, future))
            self._wake(node)
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that are there, after waiting a moment for one; each is given once."""
        asked = list(message_ids)
        wait([self._futures[message_id] for message_id in asked], PULL_SECONDS, return_when=FIRST_COMPLETED)
        ready = [message_id for message_id in asked if self._futures[message_id].done()]
        return [self._futures.pop(message_id).result() for message_id in ready]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push, then wait for all replies that come within ``timeout`` seconds."""
        ids = self.push_messages(messages)
        wait([self._futures[message_id] for message_id in ids], timeout)
        return self.pull_messages(ids)

    def _wake(self, node: _Node) -> None:
        """Give the node's next message to a thread, unless the node is at work."""
        with node.lock:
            if node.working or not node.waiting:
                return
            message, future = node.waiting.popleft()
            node.working = True
        try:
            self._pool.submit(self._work, node, message, future)
        except RuntimeError:  # closed: nobody waits for the answer any more
            future.cancel()

    def _work(self, node: _Node, message: Message, future: Future[Message]) -> None:
        try:
            future.set_result(self._deliver(node, message))
        except BaseException as error:
            future.set_exception(error)
        node.working = False
        self._wake(node)

    def _deliver(self, node: _Node, message: Message) -> Message:
        node_id, group = message.metadata.dst_node_id, message.metadata.group_id
        if time.time() > message.metadata.created_at + message.metadata.ttl:  # as a SuperLink does it
            return Message(Error(MESSAGE_UNAVAILABLE, "expired"), reply_to=message)

        def stepped(done: int, total: int) -> None:
            if self._stopping.is_set():
                raise KeyboardInterrupt
            self._watcher.stepped(node_id, done, total)

        with progress.listening(stepped):
            self._watcher.started(node_id, group)
            try:
                return self._app(message, node.context)
            except Exception:  # as Flower does it; Synthward's own handlers never raise
                return Message(Error(CLIENT_APP_RAISED, "handler raised"), reply_to=message)
            except KeyboardInterrupt:
                return Message(Error(CLIENT_APP_RAISED, "stopped"), reply_to=message)
            finally:
                self._watcher.finished(node_id, group)
