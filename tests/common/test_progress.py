import threading

import pytest

from common.progress import listening, report


def test_reports_reach_the_listener_inside_the_block_only() -> None:
    heard: list[tuple[int, int]] = []
    report(1, 3)
    with listening(lambda done, total: heard.append((done, total))):
        report(2, 3)
    report(3, 3)
    assert heard == [(2, 3)]


def test_the_inner_listener_replaces_the_outer_one() -> None:
    heard: list[str] = []
    with listening(lambda done, total: heard.append("outer")):
        with listening(lambda done, total: heard.append("inner")):
            report(1, 2)
        report(2, 2)
    assert heard == ["inner", "outer"]


def test_a_listener_may_stop_the_work_and_is_then_gone() -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), listening(stop):
        report(1, 2)
    report(2, 2)


def test_each_thread_has_its_own_listener() -> None:
    heard: dict[str, list[int]] = {"a": [], "b": []}
    barrier = threading.Barrier(2)

    def work(name: str, step: int) -> None:
        with listening(lambda done, total: heard[name].append(done)):
            barrier.wait()
            report(step, 9)
            barrier.wait()

    threads = [threading.Thread(target=work, args=arguments) for arguments in (("a", 1), ("b", 2))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert heard == {"a": [1], "b": [2]}
