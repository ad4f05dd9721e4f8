"""What was spent is on disk before it is spent, never shrinks, and is never guessed."""

import json
import multiprocessing
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.accountant import FILE_NAME, SiteAccountant
from common.errors import PrivacyError
from common.privacy.accounting import Mechanism, num_steps
from tests.strategies import mechanisms

DIGEST = "d" * 64
ONE, OTHER = Mechanism(0.25, 3.0, 10), Mechanism(0.5, 4.0, 1)


def test_a_new_site_has_spent_nothing(tmp_path: Path) -> None:
    accountant = SiteAccountant(tmp_path, DIGEST)
    assert accountant.history == ()
    assert not accountant.exists


def test_a_charge_is_on_disk_when_it_returns(tmp_path: Path) -> None:
    accountant = SiteAccountant(tmp_path, DIGEST)
    accountant.charge(ONE)
    assert accountant.exists
    content = json.loads((tmp_path / FILE_NAME).read_text())
    assert content == {"version": 1, "study_digest": DIGEST, "mechanisms": [[0.25, 3.0, 10]]}


def test_charges_add_up_and_survive(tmp_path: Path) -> None:
    first = SiteAccountant(tmp_path, DIGEST)
    first.charge(ONE)
    first.charge(ONE)
    second = SiteAccountant(tmp_path, DIGEST)
    second.charge(OTHER)
    assert SiteAccountant(tmp_path, DIGEST).history == (Mechanism(0.25, 3.0, 20), OTHER)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(charges=st.lists(mechanisms, min_size=1, max_size=4))
def test_every_history_survives_exactly(charges: list[Mechanism], tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).unlink(missing_ok=True)
    spent = 0
    for mechanism in charges:
        accountant = SiteAccountant(tmp_path, DIGEST)
        accountant.charge(mechanism)
        again = SiteAccountant(tmp_path, DIGEST).history
        assert again == accountant.history
        assert num_steps(again) == spent + mechanism.steps  # never shrinks
        spent = num_steps(again)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"5",
        b"null",
        b"\xff\xfe",
        b"{}",
        b'{"version": 2, "study_digest": "DIGEST", "mechanisms": []}',
        b'{"version": 1, "study_digest": "other", "mechanisms": []}',
        b'{"version": 1, "study_digest": "DIGEST"}',
        b'{"version": 1, "study_digest": "DIGEST", "mechanisms": 5}',
        b'{"version": 1, "study_digest": "DIGEST", "mechanisms": [[0.5, 1.0]]}',
        b'{"version": 1, "study_digest": "DIGEST", "mechanisms": [[0.5, 1.0, 3, 4]]}',
        b'{"version": 1, "study_digest": "DIGEST", "mechanisms": [[0.5, 1.0, -3]]}',
        b'{"version": 1, "study_digest": "DIGEST", "mechanisms": [[0.5, 1.0, 0]]}',
        b'{"version": 1, "study_digest": "DIGEST", "mechanisms": [[0.5, 1.0, 2.9]]}',
        b'{"version": 1, "study_digest": "DIGEST", "mechanisms": [[0.5, 1.0, Infinity]]}',
        b'{"version": 1, "study_digest": "DIGEST", "mechanisms": [[0.5, Infinity, 3]]}',
        b'{"version": 1, "study_digest": "DIGEST", "mechanisms": [[0.5, NaN, 3]]}',
        b'{"version": 1, "study_digest": "DIGEST", "mechanisms": [[2.0, 1.0, 3]]}',
        b'{"version": 1, "study_digest": "DIGEST", "mechanisms": ["abc"]}',
    ],
)
def test_a_damaged_or_foreign_file_is_refused_and_left_alone(content: bytes, tmp_path: Path) -> None:
    content = content.replace(b"DIGEST", DIGEST.encode())
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(PrivacyError):
        SiteAccountant(tmp_path, DIGEST)
    assert (tmp_path / FILE_NAME).read_bytes() == content


def test_a_folder_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(PrivacyError):
        SiteAccountant(tmp_path, DIGEST)


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_charge_that_cannot_be_written_is_an_error_and_not_a_charge(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accountant = SiteAccountant(tmp_path, DIGEST)
    accountant.charge(ONE)

    def fail(*arguments: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match="disk full"):
            accountant.charge(OTHER)
    assert accountant.history == SiteAccountant(tmp_path, DIGEST).history == (ONE,)


def test_two_at_once_cannot_overwrite_each_other(tmp_path: Path) -> None:
    # Both read an empty history; the second would write its own over the first one's charge.
    first, second = SiteAccountant(tmp_path, DIGEST), SiteAccountant(tmp_path, DIGEST)
    first.charge(ONE)
    with pytest.raises(PrivacyError, match="another process"):
        second.charge(ONE)
    assert SiteAccountant(tmp_path, DIGEST).history == (ONE,)


def _charge_often(folder: Path, won: "multiprocessing.Queue[int]") -> None:
    count = 0
    for _ in range(20):
        try:
            SiteAccountant(folder, DIGEST).charge(OTHER)
            count += 1
        except PrivacyError:
            pass
    won.put(count)


def test_processes_at_once_lose_no_charge(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    won: multiprocessing.Queue[int] = context.Queue()  # type: ignore[assignment]
    processes = [context.Process(target=_charge_often, args=(tmp_path, won)) for _ in range(3)]
    for process in processes:
        process.start()
    total = sum(won.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    assert total >= 20
    assert num_steps(SiteAccountant(tmp_path, DIGEST).history) == total
