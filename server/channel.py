"""What the flow of a round needs of a network: nodes, and a question to some of them."""

from collections.abc import Iterator, Mapping
from typing import Protocol

from common.messages import Reply, Request

NODE_ERROR, NO_ANSWER, MALFORMED = "node_error", "no_answer", "malformed"


class Channel(Protocol):
    """What a round needs: the nodes, and a question to some of them.

    ``waited_seconds`` is how long all questions so far waited for answers.
    """

    waited_seconds: float

    def nodes(self, minimum: int, wanted: int, timeout_seconds: float) -> tuple[int, ...]:
        """Node ids that are connected; waits for ``wanted``, and after the timeout is content with ``minimum``.

        Raises TooFewSurvivors when there are fewer by then.
        """
        ...

    def ask(self, requests: Mapping[int, Request], group: str, timeout_seconds: float) -> Iterator[tuple[int, Reply]]:
        """Send each node its request and give the replies as they come, one a node asked.

        A node that failed, or said nothing in time, is a Refusal. Whoever stops early hears nothing of the rest.
        """
        ...
