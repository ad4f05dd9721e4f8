"""What the flow of a round needs of a network: nodes, and a question to some of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from common.messages import Reply, Request

NODE_ERROR, NO_ANSWER, MALFORMED = "node_error", "no_answer", "malformed"


@dataclass(frozen=True)
class Answer:
    """One node's reply and the seconds until it came. A node that failed, or said nothing in time, is a Refusal."""

    reply: Reply
    seconds: float


class Channel(Protocol):
    """What a round needs: the nodes, and a question to some of them."""

    def nodes(self, minimum: int, wanted: int, timeout_seconds: float) -> tuple[int, ...]:
        """Node ids that are connected; waits for ``wanted``, and after the timeout is content with ``minimum``.

        Raises TooFewSurvivors when there are fewer by then.
        """
        ...

    def ask(self, requests: Mapping[int, Request], group: str, timeout_seconds: float) -> dict[int, Answer]:
        """Send each node its request and wait for the answers; every node asked is in the result."""
        ...
