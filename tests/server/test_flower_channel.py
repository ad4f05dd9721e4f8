import threading
import time
from collections.abc import Callable

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from common import wire
from common.errors import TooFewSurvivors
from common.messages import Enrolment, EnrolRequest, Refusal, Reply
from deploy.local_grid import LocalGrid
from server.flower_channel import FlowerChannel

Handler = Callable[[Message, Context], Message]


def site(message: Message, context: Context) -> Message:
    return reply(message, Enrolment(f"site-{context.node_id}", "ab", False))


def reply(message: Message, answer: Reply) -> Message:
    return Message(wire.pack(answer), reply_to=message)


def grid(handler: Handler, nodes: int = 3) -> LocalGrid:
    app = ClientApp()
    app.query("enrol")(handler)
    return LocalGrid(app, {node: {} for node in range(2, 2 + nodes)}, {}, num_workers=nodes)


def ask(on: LocalGrid, group: str = "1", timeout: float = 5.0) -> dict[int, Reply]:
    answers = list(FlowerChannel(on).ask(dict.fromkeys(on.get_node_ids(), EnrolRequest("d")), group, timeout))
    assert len(answers) == len({node for node, _ in answers})  # one a node
    return dict(sorted(answers))


def test_every_node_asked_is_in_the_result() -> None:
    on = grid(site)
    assert ask(on) == {node: Enrolment(f"site-{node}", "ab", False) for node in (2, 3, 4)}
    on.close()


def test_a_late_site_is_left_out_and_takes_part_again() -> None:
    release = threading.Event()

    def slow(message: Message, context: Context) -> Message:
        if (context.node_id, message.metadata.group_id) == (3, "1"):
            release.wait(10)
        return site(message, context)

    on = grid(slow)
    started = time.monotonic()
    first = ask(on, "1", timeout=0.5)
    assert 0.4 < time.monotonic() - started < 2
    assert first == {2: Enrolment("site-2", "ab", False), 3: Refusal("no_answer"), 4: Enrolment("site-4", "ab", False)}
    release.set()
    assert ask(on, "2")[3] == Enrolment("site-3", "ab", False)
    on.close()


def test_an_answer_is_given_when_it_comes_and_whoever_stops_early_waits_for_nobody() -> None:
    release, asked = threading.Event(), threading.Event()

    def slow(message: Message, context: Context) -> Message:
        if context.node_id == 2:
            asked.set()
            release.wait(10)
        return site(message, context)

    on = grid(slow)
    started = time.monotonic()
    answers = FlowerChannel(on).ask(dict.fromkeys(on.get_node_ids(), EnrolRequest("d")), "1", 10)
    assert {next(answers)[0], next(answers)[0]} == {3, 4}
    assert time.monotonic() - started < 2
    assert asked.is_set() and not release.is_set()
    release.set()
    assert next(answers) == (2, Enrolment("site-2", "ab", False))
    on.close()


def test_each_node_gets_its_own_request() -> None:
    def echo(message: Message, context: Context) -> Message:
        request = wire.unpack(message.content)
        assert isinstance(request, EnrolRequest)
        return reply(message, Enrolment(f"site-{context.node_id}", request.study_digest, False))

    on = grid(echo)
    answers = dict(FlowerChannel(on).ask({4: EnrolRequest("four"), 2: EnrolRequest("two")}, "1", 5))
    assert answers == {2: Enrolment("site-2", "two", False), 4: Enrolment("site-4", "four", False)}
    on.close()


def test_it_counts_the_time_it_waits_and_not_what_is_done_with_an_answer() -> None:
    def slow(message: Message, context: Context) -> Message:
        time.sleep({2: 0.2, 3: 1.6}[context.node_id])
        return site(message, context)

    on = grid(slow, nodes=2)
    channel = FlowerChannel(on)
    assert channel.waited_seconds == 0
    for _ in channel.ask(dict.fromkeys(on.get_node_ids(), EnrolRequest("d")), "1", 5):
        time.sleep(1.2)  # what the server makes of the first answer, while the other site still works
    assert 0.3 < channel.waited_seconds < 1.2  # 0.2 s and 1.6 - 1.4 s
    on.close()


def malformed(message: Message, context: Context) -> Message:
    return Message(
        RecordDict({"facts": ConfigRecord({"version": wire.PROTOCOL_VERSION, "kind": "gossip"})}), reply_to=message
    )


def a_request(message: Message, context: Context) -> Message:
    return Message(wire.pack(EnrolRequest("d")), reply_to=message)


def empty(message: Message, context: Context) -> Message:
    return Message(RecordDict(), reply_to=message)


def raising(message: Message, context: Context) -> Message:
    raise ValueError("patient Jane Doe")


@pytest.mark.parametrize(
    ("wrong", "code"),
    [(malformed, "malformed"), (a_request, "malformed"), (empty, "malformed"), (raising, "node_error")],
)
def test_a_reply_that_nobody_can_read_is_a_code(wrong: Handler, code: str) -> None:
    on = grid(lambda message, context: wrong(message, context) if context.node_id == 2 else site(message, context))
    assert ask(on) == {2: Refusal(code), 3: Enrolment("site-3", "ab", False), 4: Enrolment("site-4", "ab", False)}
    on.close()


def test_it_waits_for_all_nodes_and_then_is_content_with_the_minimum() -> None:
    on = grid(site)
    channel = FlowerChannel(on)
    assert channel.nodes(1, 3, 5) == (2, 3, 4)
    assert channel.nodes(2, 4, 0.1) == (2, 3, 4)
    with pytest.raises(TooFewSurvivors, match="at least 4 connected sites, found 3"):
        channel.nodes(4, 4, 0.1)
    on.close()
