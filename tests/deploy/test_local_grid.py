import threading
import time
from collections.abc import Callable

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from common import progress
from deploy.local_grid import LocalGrid, Watcher


class Sites:
    """An app whose answer says which node gave it, and that notes what is at work."""

    def __init__(self, work: Callable[[int, str], None] = lambda node, group: None) -> None:
        self.app = ClientApp()
        self.at_work: list[int] = []
        self.overlaps: list[int] = []
        self.done: list[tuple[int, str]] = []

        @self.app.query("name")
        def name(message: Message, context: Context) -> Message:
            node, group = context.node_id, message.metadata.group_id
            if node in self.at_work:
                self.overlaps.append(node)
            self.at_work.append(node)
            work(node, group)
            self.at_work.remove(node)
            self.done.append((node, group))
            facts = ConfigRecord({"node": str(node), "config": str(context.node_config["site"])})
            return Message(RecordDict({"facts": facts}), reply_to=message)

    def grid(self, nodes: int = 2, workers: int = 2, watcher: Watcher | None = None) -> LocalGrid:
        configs = {node: {"site": f"folder-{node}"} for node in range(2, 2 + nodes)}
        return LocalGrid(self.app, configs, {}, workers, watcher=watcher)  # type: ignore[arg-type]


def message(node: int, group: str = "1", ttl: float = 60.0) -> Message:
    return Message(RecordDict(), node, "query.name", group_id=group, ttl=ttl)


def answer(reply: Message) -> tuple[str, str]:
    facts = reply.content.config_records["facts"]
    return str(facts["node"]), str(facts["config"])


def test_every_reply_is_mapped_to_its_message() -> None:
    grid = Sites().grid(nodes=5)
    assert list(grid.get_node_ids()) == [2, 3, 4, 5, 6]
    ids = grid.push_messages([message(node) for node in (6, 2, 4)])
    by_id: dict[str, Message] = {}
    while len(by_id) < 3:
        by_id |= {reply.metadata.reply_to_message_id: reply for reply in grid.pull_messages(set(ids) - set(by_id))}
    assert [answer(by_id[i]) for i in ids] == [("6", "folder-6"), ("2", "folder-2"), ("4", "folder-4")]
    grid.close()


def test_a_node_handles_one_message_at_a_time_in_order() -> None:
    sites = Sites(lambda node, group: time.sleep(0.02))
    grid = sites.grid(nodes=2, workers=4)
    groups = [str(number) for number in range(5)]
    replies = grid.send_and_receive([message(node, group) for group in groups for node in (2, 3)], timeout=10)
    assert len(replies) == 10
    assert sites.overlaps == []
    assert [group for node, group in sites.done if node == 2] == groups
    grid.close()


def test_messages_that_wait_for_a_slow_node_keep_no_thread_from_others() -> None:
    release = threading.Event()
    sites = Sites(lambda node, group: release.wait(10) and None if node == 2 else None)
    grid = sites.grid(nodes=2, workers=2)
    grid.push_messages([message(2, "1"), message(2, "2"), message(2, "3")])
    assert [answer(reply)[0] for reply in grid.send_and_receive([message(3)], timeout=5)] == ["3"]
    release.set()
    grid.close()


def test_a_message_past_its_time_is_not_handed_over() -> None:
    sites = Sites(lambda node, group: time.sleep(0.2))
    grid = sites.grid(nodes=1)
    first, second = grid.send_and_receive([message(2, "1"), message(2, "2", ttl=0.1)], timeout=5)
    assert not first.has_error()
    assert second.has_error()
    assert sites.done == [(2, "1")]
    grid.close()


def test_an_exception_becomes_an_error_without_its_text() -> None:
    def work(node: int, group: str) -> None:
        if node == 2:
            raise ValueError("patient Jane Doe")

    grid = Sites(work).grid()
    replies = {
        reply.metadata.src_node_id: reply for reply in grid.send_and_receive([message(2), message(3)], timeout=5)
    }
    assert [reply.has_error() for _, reply in sorted(replies.items())] == [True, False]
    assert "Jane" not in str(replies[2].error.reason)
    grid.close()


def test_two_grids_do_not_disturb_each_other() -> None:
    first, second = Sites(), Sites()
    grids = first.grid(), second.grid()
    ids = [grid.push_messages([message(2, group), message(3, group)]) for grid, group in zip(grids, "ab", strict=True)]
    time.sleep(0.1)
    for grid, asked in zip(grids, ids, strict=True):
        assert len(grid.pull_messages(asked)) == 2
    assert sorted(first.done) == [(2, "a"), (3, "a")]
    assert sorted(second.done) == [(2, "b"), (3, "b")]
    for grid in grids:
        grid.close()


def test_close_stops_between_two_steps() -> None:
    reached = threading.Event()
    steps: list[int] = []

    def work(node: int, group: str) -> None:
        for step in range(1, 1001):
            steps.append(step)
            reached.set()
            time.sleep(0.01)
            progress.report(step, 1000)

    grid = Sites(work).grid(nodes=1)
    grid.push_messages([message(2)])
    assert reached.wait(5)
    started = time.monotonic()
    grid.close()
    assert time.monotonic() - started < 1
    assert len(steps) < 100


def test_the_watcher_hears_of_every_message_and_step() -> None:
    heard: list[tuple[object, ...]] = []
    watcher = Watcher(
        lambda node, group: heard.append(("started", node, group)),
        lambda node, done, total: heard.append(("stepped", node, done, total)),
        lambda node, group: heard.append(("finished", node, group)),
    )
    grid = Sites(lambda node, group: progress.report(1, 3)).grid(nodes=1, watcher=watcher)
    grid.send_and_receive([message(2, "7")], timeout=5)
    grid.close()
    assert heard == [("started", 2, "7"), ("stepped", 2, 1, 3), ("finished", 2, "7")]


def test_pulling_waits_only_a_moment() -> None:
    release = threading.Event()
    grid = Sites(lambda node, group: release.wait(10) and None).grid(nodes=1)
    ids = grid.push_messages([message(2)])
    started = time.monotonic()
    assert grid.pull_messages(ids) == []
    assert time.monotonic() - started == pytest.approx(0.3, abs=0.2)
    release.set()
    grid.close()
