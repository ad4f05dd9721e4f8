"""The channel over a Flower grid: the only place of the server's flow that knows Flower."""

import time
from collections.abc import Iterator, Mapping

from flwr.app import Message
from flwr.serverapp import Grid

from common import wire
from common.errors import FederationError, TooFewSurvivors
from common.messages import Refusal, Reply, Request
from server.channel import MALFORMED, NO_ANSWER, NODE_ERROR

NODES_POLL_SECONDS = 0.3
MOST_POLL_SECONDS, POLL_SHARE = 1.0, 0.03


class FlowerChannel:
    """The channel over a Flower grid, in simulation and deployment alike.

    Args:
        grid: Flower's grid of the running ServerApp.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self.waited_seconds = 0.0

    def nodes(self, minimum: int, wanted: int, timeout_seconds: float) -> tuple[int, ...]:
        """See Channel. Flower's grid is empty at the start, in its simulation too."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            nodes = tuple(sorted(self._grid.get_node_ids()))
            if len(nodes) >= wanted:
                return nodes
            if time.monotonic() > deadline:
                break
            time.sleep(NODES_POLL_SECONDS)
        if len(nodes) < minimum:
            raise TooFewSurvivors(
                f"Expected at least {minimum} connected sites, found {len(nodes)} after {timeout_seconds:.0f} s.",
                "Start the missing sites, or lower federation.minimum_sites.",
            )
        return nodes

    def ask(self, requests: Mapping[int, Request], group: str, timeout_seconds: float) -> Iterator[tuple[int, Reply]]:
        """See Channel. Replies are mapped by the message they answer: an absent node's error has another id."""
        start = time.monotonic()
        messages = [
            Message(wire.pack(request), node, wire.action(request), group_id=group, ttl=timeout_seconds)
            for node, request in requests.items()
        ]
        waiting = dict(zip(self._grid.push_messages(messages), requests, strict=True))
        while waiting and time.monotonic() - start < timeout_seconds:
            pulling, came = time.monotonic(), self._grid.pull_messages(list(waiting))
            if not came:  # the longer the sites work, the less often they are asked
                time.sleep(min(MOST_POLL_SECONDS, max(0.01, POLL_SHARE * (time.monotonic() - start))))
            self.waited_seconds += time.monotonic() - pulling
            for message in came:
                node = waiting.pop(message.metadata.reply_to_message_id, None)
                if node is not None:
                    yield node, _reply(message)
        for node in waiting.values():
            yield node, Refusal(NO_ANSWER)


def _reply(message: Message) -> Reply:
    if message.has_error():
        return Refusal(NODE_ERROR)
    try:
        reply = wire.unpack(message.content)
    except FederationError:
        return Refusal(MALFORMED)
    finally:  # Flower's records refer to themselves, so the bytes of a vector would stay until a garbage collection
        for arrays in message.content.array_records.values():
            arrays.clear()
    return reply if isinstance(reply, Reply) else Refusal(MALFORMED)
