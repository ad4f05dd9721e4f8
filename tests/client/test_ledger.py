"""What was spent is on disk before it is spent, is never forgotten, and is never guessed."""
# ruff: noqa: S608 (the statements are built from this file's own words)

import ctypes
import hashlib
import hmac
import json
import math
import os
import random
import resource
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client import ledger, ledger_file
from client.ledger import FILE_NAME, HEAD_FILE, Ledger, create
from client.ledger_lines import Book, DataSet, Line, Release, data_set_of, ledger_key
from common.errors import LedgerError, OverBudget
from common.files import locked
from common.privacy import accounting
from common.privacy.accounting import Budget, History, Mechanism, PureRelease, num_steps
from tests.strategies import mechanisms

KEY = ledger_key(b"k" * 32)
STUDY, OTHER_STUDY = "d" * 64, "e" * 64
ONE, OTHER = Mechanism(0.25, 3.0, 10), Mechanism(0.5, 4.0, 1)
PLENTY = Budget(1e300, 1e-5)
NAMES = ("anna", "ben", "cleo", "dora", "emil")
PRIVATE = [*NAMES, *(hmac.new(KEY, b"patient\0" + name.encode(), "sha256").hexdigest() for name in NAMES)]
COLUMNS = list(Line.__dataclass_fields__)
few = settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def patients(*names: str, folder: str = "/data") -> DataSet:
    return data_set_of(KEY, Path(folder), names)


ALL = patients(*NAMES)


def release(mechanism: Mechanism = ONE, study: str = STUDY, number: int = 1) -> Release:
    return Release(study, "phantom", "run-1", number, mechanism, 1.0)


def new_ledger(folder: Path) -> Ledger:
    create(folder)
    return Ledger(folder, KEY)


def charge(folder: Path, *mechanisms: Mechanism, data_set: DataSet = ALL, study: str = STUDY) -> tuple[Line, ...]:
    return tuple(Ledger(folder, KEY).charge(data_set, release(each, study), PLENTY) for each in mechanisms)


HELD_OUT = patients("fay", "gus")
ANSWERS = (PureRelease(0.5), PureRelease(2.0))


def verdict(
    training: DataSet = ALL, held_out: DataSet = HELD_OUT, study: str = STUDY
) -> tuple[tuple[DataSet, Release], ...]:
    """What one verdict of an audit charges."""
    return (
        (training, Release(study, "phantom", "run-1", 9, ANSWERS[0], 1.0, "training")),
        (held_out, Release(study, "phantom", "run-1", 9, ANSWERS[1], 1.0, "held_out")),
    )


def audit(folder: Path, study: str = STUDY) -> tuple[Line, ...]:
    return Ledger(folder, KEY).charge_together(verdict(study=study), PLENTY)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / FILE_NAME, folder / HEAD_FILE) if path.is_file()}


def restore(folder: Path, files: dict[str, bytes], *names: str) -> None:
    for name in names:
        (folder / name).write_bytes(files[name])


def edit(folder: Path, *statements: str, keep_schema: bool = True) -> None:
    """What somebody with a database browser can do: the triggers go first, and come back."""
    with closing(sqlite3.connect(folder / FILE_NAME)) as db:
        triggers = db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            db.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            assert db.execute(statement).rowcount != 0, "the statement changed nothing"
        for _, sql in triggers if keep_schema else ():
            db.execute(sql)
        db.commit()


def assert_refused(folder: Path, cause: str, key: bytes = KEY) -> None:
    """Every call refuses for the same reason, changes nothing, and tells nothing about patients."""
    before, held, data_set = contents(folder), Ledger(folder, key), data_set_of(key, Path("/data"), NAMES)
    calls: list[Callable[[], object]] = [
        held.lines,
        held.read,
        lambda: held.read().of_study(STUDY),
        lambda: held.read().histories(data_set.patients),
        lambda: held.charge(data_set, release(), PLENTY),
    ]
    for call in calls:
        with pytest.raises(LedgerError, match=cause) as raised:
            call()
        assert raised.value.remedy
        assert not any(secret in str(raised.value) for secret in PRIVATE)
    assert contents(folder) == before


# By hand


def test_a_new_ledger_has_no_lines(tmp_path: Path) -> None:
    held = new_ledger(tmp_path)
    assert held.lines() == () and held.read().data_sets() == () and held.read().of_study(STUDY) == ()
    assert held.read().histories(ALL.patients) == ((),)
    assert held.read().histories(frozenset()) == ((),)


def test_a_line_says_what_was_released_and_is_on_disk_when_the_charge_returns(tmp_path: Path) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    line = new_ledger(tmp_path).charge(patients("anna", folder="/data/a"), release(ONE, number=7), PLENTY)
    with closing(sqlite3.connect(f"file:{tmp_path / FILE_NAME}?mode=ro", uri=True)) as db:
        assert db.execute("SELECT * FROM line").fetchall() == [tuple(asdict(line).values())]
    assert before <= datetime.fromisoformat(line.time) <= datetime.now(UTC)
    assert replace(line, time="", data_set="", hash="") == Line(
        1, "", STUDY, "phantom", "run-1", 7, "", "/data/a", 0.25, 3.0, 10, 1.0, "0" * 64, ""
    )
    assert line.mechanism == ONE


def test_an_auditor_can_recompute_the_chain_with_nothing_but_json_and_sha_256(tmp_path: Path) -> None:
    new_ledger(tmp_path)
    charge(tmp_path, ONE, OTHER)
    audit(tmp_path)
    previous = "0" * 64
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as db:
        for row in db.execute(f"SELECT {', '.join(COLUMNS)} FROM line ORDER BY number").fetchall():
            line = dict(zip(COLUMNS, row, strict=True))
            assert line["previous"] == previous
            previous = line.pop("hash")
            content = {key: value for key, value in line.items() if value is not None}  # only audits have all columns
            text = json.dumps(content, sort_keys=True, separators=(",", ":"))
            assert hashlib.sha256(text.encode()).hexdigest() == previous
    head = json.loads((tmp_path / HEAD_FILE).read_bytes())
    assert (head["line"]["number"], head["line"]["hash"]) == (4, previous)


def test_a_data_set_is_keyed_digests_of_its_patients() -> None:
    # By RFC 2104; these figures are in every site's ledger, so another way to compute them would lock every site out.
    key = hmac.new(b"k" * 32, b"synthward ledger", "sha256").digest()
    digests = sorted(hmac.new(key, b"patient\0" + name, "sha256").hexdigest() for name in (b"anna", b"ben"))
    whole = hmac.new(key, b"data set\0" + "".join(digests).encode(), "sha256").hexdigest()
    assert patients("anna", "ben") == DataSet(whole, "/data", frozenset(digests))
    assert patients("ben", "anna", "ben") == patients("anna", "ben")
    assert patients("anna", "ben", folder="/copy").digest == whole
    assert patients("anna").digest != whole and patients("annaben").digest != whole
    other = data_set_of(ledger_key(b"l" * 32), Path("/data"), ["anna", "ben"])
    assert other.digest != whole and not other.patients & frozenset(digests)
    assert not any(digest in repr(patients("anna", "ben")) for digest in digests)


def test_any_text_is_a_patient_and_any_bytes_are_a_folder(tmp_path: Path) -> None:
    held = new_ledger(tmp_path)
    names, folder = ["", "\0", "é", "\udcff", "a" * 10_000], Path(os.fsdecode(b"/data/\xff"))
    data_set = data_set_of(KEY, folder, names)
    assert len(data_set.patients) == 5
    assert held.charge(data_set, release(), PLENTY).folder == "/data/\\xff"
    assert Ledger(tmp_path, KEY).read().data_sets() == (data_set,)


def test_charges_add_up_and_survive(tmp_path: Path) -> None:
    first = new_ledger(tmp_path)
    for mechanism, study in ((ONE, STUDY), (ONE, STUDY), (OTHER, OTHER_STUDY), (OTHER, STUDY)):
        first.charge(ALL, release(mechanism, study), PLENTY)
    second = Ledger(tmp_path, KEY)
    assert second.lines() == first.lines() and len(second.lines()) == 4
    assert second.read().of_study(STUDY) == (Mechanism(0.25, 3.0, 20), OTHER)
    assert second.read().of_study(OTHER_STUDY) == (OTHER,)
    assert second.read().of_study("f" * 64) == ()
    assert second.read().histories(ALL.patients) == ((Mechanism(0.25, 3.0, 20), Mechanism(0.5, 4.0, 2)),)


def test_whole_numbers_are_the_same_mechanism(tmp_path: Path) -> None:
    held = new_ledger(tmp_path)
    held.charge(ALL, Release(STUDY, "phantom", "run-1", 1, Mechanism(1, 3, 2), 1), PLENTY)
    assert held.read().of_study(STUDY) == (Mechanism(1.0, 3.0, 2),)
    assert held.lines()[0].clip_norm == 1.0


def test_a_data_set_without_patients_has_a_budget_too(tmp_path: Path) -> None:
    held = new_ledger(tmp_path)
    held.charge(patients(), release(Mechanism(1.0, 3.0, 6)), budget_of(10))
    with pytest.raises(OverBudget):
        held.charge(patients(), release(Mechanism(1.0, 3.0, 6)), budget_of(10))
    assert len(held.lines()) == 1


# Overlapping data sets


def test_the_same_patients_in_a_copied_folder_share_what_was_spent(tmp_path: Path) -> None:
    held, copy = new_ledger(tmp_path), patients(*NAMES, folder="/copy")
    held.charge(ALL, release(), PLENTY)
    assert held.read().histories(copy.patients) == ((ONE,),)
    held.charge(copy, release(), PLENTY)
    assert held.read().histories(ALL.patients) == ((Mechanism(0.25, 3.0, 20),),)
    assert held.read().data_sets() == (copy,)  # one data set; its images were last seen in the copy
    assert [line.folder for line in held.lines()] == ["/data", "/copy"]


def test_one_patient_more_is_another_data_set_and_the_others_keep_what_was_spent(tmp_path: Path) -> None:
    held, more = new_ledger(tmp_path), patients(*NAMES, "fay")
    held.charge(ALL, release(), PLENTY)
    assert held.read().histories(more.patients) == ((ONE,), ())  # nothing was spent on fay
    held.charge(more, release(), PLENTY)
    assert held.read().histories(more.patients) == ((Mechanism(0.25, 3.0, 20),), (ONE,))
    assert held.read().histories(ALL.patients) == ((Mechanism(0.25, 3.0, 20),),)
    assert held.read().histories(patients("fay").patients) == ((ONE,),)
    assert held.read().data_sets() == (ALL, more)


def test_disjoint_data_sets_share_nothing(tmp_path: Path) -> None:
    held = new_ledger(tmp_path)
    held.charge(patients("anna", "ben"), release(ONE), PLENTY)
    held.charge(patients("cleo"), release(OTHER), PLENTY)
    assert held.read().histories(patients("anna", "ben").patients) == ((ONE,),)
    assert held.read().histories(patients("cleo").patients) == ((OTHER,),)
    assert held.read().histories(patients("dora").patients) == ((),)
    assert held.read().histories(ALL.patients) == ((ONE,), (OTHER,), ())


def budget_of(steps: int) -> Budget:
    """The budget that this many steps of Mechanism(1, 3, ...) fill exactly."""
    return Budget(accounting.epsilon((Mechanism(1.0, 3.0, steps),), 1e-5), 1e-5)


def test_a_budget_is_kept_for_every_patient_over_data_sets_and_studies(tmp_path: Path) -> None:
    held, six, budget = new_ledger(tmp_path), Mechanism(1.0, 3.0, 6), budget_of(12)
    held.charge(patients("anna", "ben"), release(six, STUDY), budget)  # 6 on anna, 6 on ben
    held.charge(patients("ben", "cleo"), release(six, OTHER_STUDY), budget)  # 12 on ben, 6 on cleo
    held.charge(patients("anna", "cleo"), release(six), budget)  # 12 on each of the three
    for names in (["ben"], ["dora", "ben"], list(NAMES)):
        before = contents(tmp_path)
        with pytest.raises(
            OverBudget, match="Another round of phantom .* /data to epsilon .* at delta 1e-05.* allows"
        ) as raised:
            held.charge(patients(*names), release(Mechanism(1.0, 3.0, 1), "f" * 64), budget)
        assert contents(tmp_path) == before  # nothing was written
        assert not any(secret in str(raised.value) for secret in PRIVATE)
    held.charge(patients("dora"), release(Mechanism(1.0, 3.0, 12)), budget)  # to the last step, beside the full ones
    assert len(held.lines()) == 4


def test_a_fresh_patient_does_not_hide_a_spent_one(tmp_path: Path) -> None:
    # Ben alone is over the budget; neither the whole data set nor most of its patients are.
    held, budget = new_ledger(tmp_path), budget_of(10)
    held.charge(patients("ben"), release(Mechanism(1.0, 3.0, 5)), budget)
    with pytest.raises(OverBudget):
        held.charge(ALL, release(Mechanism(1.0, 3.0, 6)), budget)
    held.charge(ALL, release(Mechanism(1.0, 3.0, 5)), budget)


@few
@given(charges=st.lists(mechanisms, min_size=1, max_size=4))
def test_every_history_survives_exactly(charges: list[Mechanism], tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=tmp_path) as name:
        new_ledger(Path(name))
        expected: History = ()
        for mechanism in charges:
            charge(Path(name), mechanism)
            expected = accounting.append(expected, mechanism)
            assert Ledger(Path(name), KEY).read().of_study(STUDY) == expected
            assert Ledger(Path(name), KEY).read().histories(ALL.patients) == (expected,)


some_patients = st.sets(st.sampled_from(NAMES), min_size=1)
wanted = st.tuples(
    some_patients,
    st.sampled_from([Mechanism(1.0, 3.0, 3), Mechanism(1.0, 3.0, 6), Mechanism(1.0, 6.0, 12)]),
    st.sampled_from([STUDY, OTHER_STUDY]),
)


@few
@given(charges=st.lists(wanted, min_size=1, max_size=6), asked=some_patients)
def test_any_sequence_of_charges_is_what_a_list_for_each_patient_says(
    charges: list[tuple[set[str], Mechanism, str]], asked: set[str], tmp_path: Path
) -> None:
    budget = budget_of(12)
    spent: dict[str, History] = {name: () for name in NAMES}
    studies: dict[str, History] = {STUDY: (), OTHER_STUDY: ()}
    with tempfile.TemporaryDirectory(dir=tmp_path) as name:
        held = new_ledger(Path(name))
        for number, (names, mechanism, study) in enumerate(charges):
            after = {each: accounting.append(spent[each], mechanism) for each in names}
            data_set = patients(*names, folder=f"/data/{number}")
            if all(accounting.fits(history, budget) for history in after.values()):
                held.charge(data_set, release(mechanism, study), budget)
                spent |= after
                studies[study] = accounting.append(studies[study], mechanism)
            else:
                with pytest.raises(OverBudget):
                    held.charge(data_set, release(mechanism, study), budget)
            assert set(held.read().histories(patients(*asked).patients)) == {spent[each] for each in asked}
        assert {study: held.read().of_study(study) for study in studies} == studies


# Made once


def test_only_the_owner_may_read_it(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        new_ledger(tmp_path)
        with ledger_file.opened(tmp_path / FILE_NAME):  # while it is open there are more files
            names = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
        charge(tmp_path, ONE)
    finally:
        os.umask(umask)
    assert set(names) > {FILE_NAME, HEAD_FILE} and set(names.values()) == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}


def test_every_commit_waits_for_the_disk(tmp_path: Path) -> None:
    new_ledger(tmp_path)
    with ledger_file.opened(tmp_path / FILE_NAME) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


@pytest.mark.parametrize("gone", [(), (FILE_NAME,), (HEAD_FILE,)])
def test_it_is_never_made_anew(gone: tuple[str, ...], tmp_path: Path) -> None:
    new_ledger(tmp_path)
    charge(tmp_path, ONE)
    for name in gone:
        (tmp_path / name).unlink()
    before = contents(tmp_path)
    with pytest.raises(LedgerError, match="is there already, and a ledger is never made anew"):
        create(tmp_path)
    assert contents(tmp_path) == before


def test_a_site_that_has_trained_gets_no_empty_one(tmp_path: Path) -> None:
    (tmp_path / "studies" / "0123").mkdir(parents=True)
    (tmp_path / "studies" / "0123" / "state.pt").touch()
    with pytest.raises(LedgerError, match="has trained before, and .*ledger.db is missing"):
        create(tmp_path)
    assert contents(tmp_path) == {}


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="none/ledger.lock cannot be .*: No such file or directory"):
        create(tmp_path / "none")


def fail_for_want_of_space(*arguments: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_making_it_leaves_nothing_when_it_fails(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(LedgerError, match="disk is full"):
        patch.setattr(os, call, fail_for_want_of_space)
        create(tmp_path)
    assert contents(tmp_path) == {}
    create(tmp_path)


# Missing, damaged, foreign


def test_a_site_without_a_ledger_is_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path, "this site has no ledger")
    assert_refused(tmp_path / "none", "this site has no ledger")


@pytest.mark.parametrize("name", [FILE_NAME, HEAD_FILE])
@pytest.mark.parametrize("num_lines", [0, 2])
def test_half_a_ledger_is_refused(name: str, num_lines: int, tmp_path: Path) -> None:
    new_ledger(tmp_path)
    charge(tmp_path, *[ONE] * num_lines)
    (tmp_path / name).unlink()
    assert_refused(tmp_path, f"{name} is missing: half of the ledger is gone")


@pytest.mark.parametrize("name", [FILE_NAME, HEAD_FILE])
def test_a_folder_in_place_of_a_file_is_refused(name: str, tmp_path: Path) -> None:
    new_ledger(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    assert_refused(tmp_path, f"{name} cannot be read and written")


@pytest.mark.parametrize(
    "content, cause",
    [
        (b"", "is not a ledger"),
        (b"5", "is not a ledger"),
        (b"SQLite format 3\0", "is damaged: file is not a database"),
        (b"\xff" * 100_000, "is damaged: file is not a database"),
    ],
)
def test_a_file_that_is_no_database_is_refused_and_left_alone(content: bytes, cause: str, tmp_path: Path) -> None:
    new_ledger(tmp_path)
    (tmp_path / FILE_NAME).write_bytes(content)
    assert_refused(tmp_path, cause)


def test_damage_that_is_no_text_is_named(altered: Path) -> None:
    content = (altered / FILE_NAME).read_bytes()
    assert content.count(b"line_kept") == 2
    (altered / FILE_NAME).write_bytes(content.replace(b"line_kept", b"l\xecne_kept", 1))
    assert_refused(altered, "ledger.db is damaged: it has text that is none")


@pytest.mark.parametrize("mark", ["0", "1", str(ledger_file.APPLICATION_ID)])
def test_a_foreign_database_is_refused_and_left_alone(mark: str, tmp_path: Path) -> None:
    new_ledger(tmp_path)
    (tmp_path / FILE_NAME).unlink()
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as db:
        db.execute("CREATE TABLE line (number INTEGER PRIMARY KEY, text TEXT)")
        db.execute(f"PRAGMA application_id = {mark}")
        db.execute("PRAGMA user_version = 1")
    assert_refused(tmp_path, "is not a ledger" if len(mark) == 1 else "its tables or triggers are not a ledger's")


def test_a_file_without_tables_is_no_empty_ledger(altered: Path) -> None:
    (altered / FILE_NAME).unlink()
    with closing(sqlite3.connect(altered / FILE_NAME)) as db:  # as far as an interrupted `policy init` may have come
        db.execute(f"PRAGMA application_id = {ledger_file.APPLICATION_ID}")
    assert_refused(altered, "ledger.db is not a ledger")


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
        b"[" * 100_000,
        b'{"hash": "ZEROS", "line": null, "members": null}',
        b'{"number": 1, "hash": "ZEROS", "line": null, "members": null}',
        b'{"number": 0, "hash": "ones", "line": null, "members": null}',
        b'{"number": 0, "hash": "ZEROS", "line": 5, "members": null}',
        b'{"number": 0, "hash": "ZEROS", "line": {}, "members": null}',
        b'{"number": 0, "hash": "ZEROS", "line": null, "members": [[]]}',
        b'{"number": 0, "hash": "ZEROS", "line": null, "members": "abc"}',
        b'{"number": 0, "hash": "ZEROS", "line": null, "members": null, "more": 1}',
    ],
)
def test_a_damaged_head_is_refused_and_left_alone(content: bytes, tmp_path: Path) -> None:
    new_ledger(tmp_path)
    (tmp_path / HEAD_FILE).write_bytes(content.replace(b"ZEROS", b"0" * 64))
    assert_refused(tmp_path, "ledger-head.json is damaged or was altered")


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0},
        {"steps": -3},
        {"steps": 2.9},
        {"steps": True},
        {"sampling_probability": 2.0},
        {"sampling_probability": 1},
        {"noise_multiplier": math.inf},
        {"noise_multiplier": math.nan},
        {"noise_multiplier": "3.0"},
        {"clip_norm": math.nan},
        {"time": "yesterday"},
        {"time": "2026-01-01T00:00:00"},
        {"time": "2026-01-01T00:00:00+02:00"},
        {"study_name": None},
    ],
)
def test_a_line_that_means_nothing_is_refused_with_any_hash(changes: dict[str, object], tmp_path: Path) -> None:
    new_ledger(tmp_path)
    before = contents(tmp_path)
    (line,) = charge(tmp_path, ONE)
    (tmp_path / FILE_NAME).write_bytes(before[FILE_NAME])  # so that the head's line is the one to believe
    content = {**asdict(line), **changes}
    del content["hash"]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    content["hash"] = hashlib.sha256(text.encode()).hexdigest()
    head = {"line": content, "members": sorted(ALL.patients)}
    (tmp_path / HEAD_FILE).write_text(json.dumps(head))
    assert_refused(tmp_path, "ledger-head.json is damaged or was altered")


@settings(few, max_examples=100)
@given(name=st.sampled_from([FILE_NAME, HEAD_FILE]), place=st.integers(0, 2**16), change=st.integers(0, 255))
def test_any_damage_is_found_or_harmless(name: str, place: int, change: int, whole: Path, tmp_path: Path) -> None:
    content = bytearray((whole / name).read_bytes())
    place %= len(content)
    if change:
        content[place] ^= change
    else:
        del content[place:]
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        restore(Path(folder), {**contents(whole), name: bytes(content)}, FILE_NAME, HEAD_FILE)
        try:
            lines, histories = (
                Ledger(Path(folder), KEY).lines(),
                Ledger(Path(folder), KEY).read().histories(ALL.patients),
            )
        except LedgerError:
            return
        assert [line.mechanism for line in lines] == [ONE, OTHER, OTHER]
        assert set(histories) == {(ONE, OTHER), (ONE, Mechanism(0.5, 4.0, 2)), (OTHER,), ()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger with three lines and two data sets."""
    folder = tmp_path_factory.mktemp("whole")
    new_ledger(folder)
    charge(folder, ONE, OTHER, data_set=patients("anna", "ben"))
    charge(folder, OTHER, data_set=patients("ben", "cleo"))
    return folder


# Altered


@pytest.fixture
def altered(whole: Path, tmp_path: Path) -> Path:
    """A copy of that ledger, to be altered."""
    restore(tmp_path, contents(whole), FILE_NAME, HEAD_FILE)
    return tmp_path


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("column", [name for name in COLUMNS if name != "number"])
def test_a_changed_row_is_found(column: str, number: int, altered: Path) -> None:
    kind = Line.__dataclass_fields__[column].type
    changes = {str: f"{column} || 'x'", float: f"{column} / 2", int: f"{column} + 1"}
    new = "0.5" if column == "epsilon" else "'training'" if column == "audited" else changes[kind]  # type: ignore[index]
    edit(altered, f"UPDATE line SET {column} = {new} WHERE number = {number}")
    assert_refused(altered, f"ledger.db was altered: line {number} is not what was written")


@pytest.mark.parametrize("value", ["NULL", "x'00'", "'many'", "CAST(x'ff' AS TEXT)"])
def test_a_row_with_a_value_of_another_kind_is_found(value: str, altered: Path) -> None:
    if value == "NULL":
        with pytest.raises(sqlite3.IntegrityError):
            edit(altered, "UPDATE line SET steps = NULL")
    else:
        edit(altered, f"UPDATE line SET steps = {value} WHERE number = 2")
        assert_refused(altered, "ledger.db was altered: ")


@pytest.mark.parametrize(
    "statements, cause",
    [
        (["DELETE FROM line WHERE number = 1"], "line 1 is missing"),
        (["DELETE FROM line WHERE number = 2"], "line 2 is missing"),
        (["DELETE FROM line WHERE number >= 2"], "an older copy: it ends at line 1"),
        (
            ["DELETE FROM line", "DELETE FROM member"],
            "an older copy: it ends at line 0, and ledger-head.json at line 3",
        ),
        (
            ["DELETE FROM line WHERE number = 2", "UPDATE line SET number = 2 WHERE number = 3"],
            "line 2 is not what was",
        ),
        (["UPDATE line SET number = 9 WHERE number = 3"], "line 3 is missing"),
        (["UPDATE line SET number = 0 WHERE number = 1"], "line 1 is missing"),
        (
            ["UPDATE line SET number = -1 WHERE number = 2", "UPDATE line SET number = 2 WHERE number = 3"],
            "line 1 is missing",
        ),
    ],
)
def test_removed_and_moved_rows_are_found(statements: list[str], cause: str, altered: Path) -> None:
    edit(altered, *statements)
    assert_refused(altered, cause)


def test_the_newest_row_comes_back_when_it_is_removed(altered: Path) -> None:
    before = Ledger(altered, KEY).lines()
    edit(altered, "DELETE FROM line WHERE number = 3")
    assert Ledger(altered, KEY).lines() == before


def test_an_inserted_row_is_found(altered: Path) -> None:
    columns = ", ".join(COLUMNS[1:])
    edit(altered, f"INSERT INTO line SELECT 4, {columns} FROM line WHERE number = 3")
    assert_refused(altered, "ledger.db was altered: line 4 is not what was written")


def forged(lines: list[Line]) -> list[Line]:
    """Lines with numbers and hashes as they should be, by whoever knows how they are made."""
    previous, chain = "0" * 64, []
    for number, line in enumerate(lines, 1):
        content = {key: value for key, value in asdict(line).items() if value is not None}
        content |= {"number": number, "previous": previous}
        del content["hash"]
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        previous = hashlib.sha256(text.encode()).hexdigest()
        chain.append(Line(**content, hash=previous))
    return chain


def write_lines(folder: Path, lines: list[Line]) -> None:
    values = [
        "(" + ", ".join("NULL" if value is None else repr(value) for value in asdict(line).values()) + ")"
        for line in lines
    ]
    edit(folder, "DELETE FROM line", f"INSERT INTO line VALUES {', '.join(values)}")


def test_a_chain_that_was_computed_anew_differs_from_the_head(altered: Path) -> None:
    lines = Ledger(altered, KEY).lines()
    write_lines(altered, forged([replace(lines[0], noise_multiplier=30.0), *lines[1:]]))
    assert_refused(altered, "line 3 is another one than in ledger-head.json")
    write_lines(altered, forged([*lines, lines[2]]))
    assert_refused(altered, "ends at line 4, and ledger-head.json at line 3, so lines were added")
    write_lines(altered, forged([replace(lines[0], noise_multiplier=30.0), lines[1]]))
    assert_refused(altered, "line 3, in ledger-head.json, does not follow line 2")
    write_lines(altered, [lines[0], replace(lines[1], previous="1" * 64), lines[2]])
    assert_refused(altered, "line 2 is not what was written")
    write_lines(altered, [lines[0], *forged([lines[0], lines[1], lines[2]])[1:]])
    assert Ledger(altered, KEY).lines() == lines  # the same lines again: nothing was altered


def test_a_line_of_another_chain_does_not_follow(altered: Path, tmp_path: Path) -> None:
    lines = Ledger(altered, KEY).lines()
    other = forged([replace(lines[0], noise_multiplier=30.0), lines[1], lines[2]])
    write_lines(altered, [lines[0], other[1], lines[2]])
    assert_refused(altered, "line 2 does not follow the line before it")


OF_LINE_3 = "data_set = (SELECT data_set FROM line WHERE number = 3)"


@pytest.mark.parametrize(
    "statement, number",
    [
        ("DELETE FROM member WHERE data_set = (SELECT data_set FROM line WHERE number = 1)", 1),
        (f"DELETE FROM member WHERE {OF_LINE_3} AND patient = (SELECT MAX(patient) FROM member WHERE {OF_LINE_3})", 3),
        ("INSERT INTO member SELECT data_set, 'somebody' FROM line WHERE number = 3", 3),
        (f"UPDATE member SET patient = 'x' || patient WHERE {OF_LINE_3}", 3),
        ("UPDATE member SET patient = x'00' || patient", 1),
    ],
)
def test_changed_patients_of_a_data_set_are_found(statement: str, number: int, altered: Path) -> None:
    edit(altered, statement)
    assert_refused(altered, f"the patients of line {number} are others, or the site's key is another one")


def test_a_data_set_without_lines_is_found(altered: Path) -> None:
    edit(altered, "INSERT INTO member VALUES ('x', 'y')")
    assert_refused(altered, "it has patients of a data set without lines")


def test_another_key_is_refused_and_a_data_set_of_another_key_too(altered: Path) -> None:
    other = ledger_key(b"l" * 32)
    assert_refused(altered, "the patients of line 1 are others, or the site's key is another one", key=other)
    before = contents(altered)
    for wrong in (data_set_of(other, Path("/data"), NAMES), replace(ALL, patients=patients("anna").patients)):
        with pytest.raises(LedgerError, match="not made with this ledger's key"):
            Ledger(altered, KEY).charge(wrong, release(), PLENTY)
    assert contents(altered) == before


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE line SET steps = 1",
        "DELETE FROM line",
        "DELETE FROM line WHERE number = 3",
        "INSERT OR REPLACE INTO line SELECT 3, {columns} FROM line WHERE number = 1",
        "REPLACE INTO line SELECT 1, {columns} FROM line WHERE number = 3",
        "INSERT INTO line SELECT 5, {columns} FROM line WHERE number = 1",
        "INSERT INTO line SELECT NULL, {columns} FROM line WHERE number = 1",
        "UPDATE member SET patient = 'x'",
        "DELETE FROM member",
    ],
)
def test_the_file_itself_lets_nobody_change_a_row(statement: str, altered: Path) -> None:
    before = contents(altered)
    with (
        closing(sqlite3.connect(altered / FILE_NAME)) as db,
        pytest.raises(sqlite3.IntegrityError, match="append only"),
    ):
        db.execute(statement.format(columns=", ".join(COLUMNS[1:])))
    assert contents(altered) == before


@pytest.mark.parametrize(
    "statements",
    [
        ["CREATE TABLE more (x)"],
        ["ALTER TABLE line ADD COLUMN more TEXT"],
        ["DROP TABLE member"],
        ["CREATE TRIGGER more AFTER INSERT ON line BEGIN DELETE FROM member; END"],
    ],
)
def test_an_altered_schema_is_found(statements: list[str], altered: Path) -> None:
    with closing(sqlite3.connect(altered / FILE_NAME)) as db:
        for statement in statements:
            db.execute(statement)
    assert_refused(altered, "its tables or triggers are not a ledger's")


def test_triggers_that_are_gone_are_found(altered: Path) -> None:
    edit(altered, keep_schema=False)
    assert_refused(altered, "its tables or triggers are not a ledger's")


# Older copies


@pytest.mark.parametrize("data_set", [ALL, patients("fay")])
def test_an_older_copy_of_the_file_is_found_and_of_the_head_too(data_set: DataSet, tmp_path: Path) -> None:
    new_ledger(tmp_path)
    copies = []
    for mechanism in (ONE, OTHER, ONE):
        charge(tmp_path, mechanism)
        copies.append(contents(tmp_path))
    charge(tmp_path, OTHER, data_set=data_set)
    newest, lines = contents(tmp_path), Ledger(tmp_path, KEY).lines()
    for number in (1, 2):
        restore(tmp_path, copies[number - 1], FILE_NAME)
        assert_refused(tmp_path, f"is an older copy: it ends at line {number}, and ledger-head.json at line 4")
    restore(tmp_path, copies[2], FILE_NAME)  # one line: as after a crash, and the head has that line
    assert Ledger(tmp_path, KEY).lines() == lines
    assert set(Ledger(tmp_path, KEY).read().data_sets()) == {ALL, data_set}
    for number in (1, 2, 3):
        restore(tmp_path, newest, FILE_NAME)
        restore(tmp_path, copies[number - 1], HEAD_FILE)
        assert_refused(
            tmp_path, f"ends at line 4, and ledger-head.json at line {number}, so lines were added, or ledger-h"
        )
    restore(tmp_path, newest, HEAD_FILE)
    assert Ledger(tmp_path, KEY).lines() == lines


def test_an_older_pair_is_believed_as_the_guarantee_says(tmp_path: Path) -> None:
    # The limit of what one folder can prove about itself: the signed export that somebody else keeps is the proof.
    new_ledger(tmp_path)
    (first,) = charge(tmp_path, ONE)
    pair = contents(tmp_path)
    charge(tmp_path, ONE)
    restore(tmp_path, pair, FILE_NAME, HEAD_FILE)
    assert Ledger(tmp_path, KEY).lines() == (first,)


def test_patients_in_the_head_are_verified_before_they_are_put_back(tmp_path: Path) -> None:
    new_ledger(tmp_path)
    empty = contents(tmp_path)
    charge(tmp_path, ONE)
    restore(tmp_path, empty, FILE_NAME)
    head = json.loads((tmp_path / HEAD_FILE).read_bytes())
    (tmp_path / HEAD_FILE).write_text(json.dumps({**head, "members": head["members"][1:]}))
    assert_refused(tmp_path, "the patients of line 1 are others")


# The clock


@contextmanager
def clock(monkeypatch: pytest.MonkeyPatch, now: datetime) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(ledger, "_now", lambda: now)
        yield


def test_a_clock_that_was_set_back_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, noon = new_ledger(tmp_path), datetime(2030, 1, 1, 12, 0, 0, 999_999, tzinfo=UTC)
    with clock(monkeypatch, noon):
        assert held.charge(ALL, release(), PLENTY).time == "2030-01-01T12:00:00+00:00"
    before = contents(tmp_path)
    for back in (timedelta(minutes=10, seconds=1), timedelta(days=4000)):
        with (
            clock(monkeypatch, noon.replace(microsecond=0) - back),
            pytest.raises(LedgerError, match=r"The clock was set back: .* 2030-01-01T12:00:00\+00:00"),
        ):
            held.charge(ALL, release(), PLENTY)
        assert contents(tmp_path) == before
    with clock(monkeypatch, noon - timedelta(minutes=10)):  # a small correction: time stands still
        assert held.charge(ALL, release(), PLENTY).time == "2030-01-01T12:00:00+00:00"
    with clock(monkeypatch, noon + timedelta(seconds=1)):
        assert held.charge(ALL, release(), PLENTY).time == "2030-01-01T12:00:01+00:00"


def test_a_clock_in_the_past_hides_nothing_that_was_spent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_ledger(tmp_path)
    charge(tmp_path, ONE)
    with clock(monkeypatch, datetime(2001, 1, 1, tzinfo=UTC)):
        assert Ledger(tmp_path, KEY).read().of_study(STUDY) == (ONE,)


# Versions of the schema

MORE = ("CREATE TABLE note (text TEXT NOT NULL)", "ALTER TABLE line ADD COLUMN note TEXT")


def version(folder: Path) -> int:
    with closing(sqlite3.connect(folder / FILE_NAME)) as db:
        found: int = db.execute("PRAGMA user_version").fetchone()[0]
        return found


def test_an_older_schema_is_brought_up_to_date_and_the_older_program_then_refuses(
    altered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = Ledger(altered, KEY).lines()
    assert version(altered) == len(ledger_file.MIGRATIONS) == 2
    with monkeypatch.context() as patch:
        patch.setattr(ledger_file, "MIGRATIONS", (*ledger_file.MIGRATIONS, MORE[:1], MORE[1:]))
        assert Ledger(altered, KEY).lines() == lines
        assert version(altered) == 4
        (line,) = charge(altered, ONE)
        assert Ledger(altered, KEY).lines() == (*lines, line)
        new = altered / "new"
        new.mkdir()
        create(new)
        assert version(new) == 4 and Ledger(new, KEY).lines() == ()
    assert_refused(altered, "has version 4 of the schema, and this program knows versions up to 2")


def test_a_failing_migration_changes_nothing(altered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = Ledger(altered, KEY).lines()
    with monkeypatch.context() as patch:
        patch.setattr(ledger_file, "MIGRATIONS", (*ledger_file.MIGRATIONS, (MORE[0], "CREATE TABLE line (x)")))
        assert_refused(altered, "table line already exists")
    assert version(altered) == 2 and Ledger(altered, KEY).lines() == lines


# Locked, full, unwritable


def test_a_ledger_locked_by_another_program_is_refused_until_it_is_free(
    altered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_file, "BUSY_TIMEOUT_SECONDS", 0.05)
    for begin in ("BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"):
        with closing(sqlite3.connect(altered / FILE_NAME, isolation_level=None)) as db:
            db.execute(begin)
            assert_refused(altered, "ledger.db is locked: another program has held it for 0.05 seconds")
        charge(altered, ONE)


def test_a_program_that_only_reads_does_not_disturb(altered: Path) -> None:
    with closing(sqlite3.connect(altered / FILE_NAME, isolation_level=None)) as db:
        db.execute("BEGIN")
        assert db.execute("SELECT COUNT(*) FROM line").fetchone() == (3,)
        charge(altered, ONE)
        assert db.execute("SELECT COUNT(*) FROM line").fetchone() == (3,)
    assert len(Ledger(altered, KEY).lines()) == 4


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_head_that_cannot_be_written_is_an_error_and_not_a_charge(
    call: str, altered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = Ledger(altered, KEY).lines()
    with monkeypatch.context() as patch, pytest.raises(LedgerError, match="The disk is full: .*ledger.db"):
        patch.setattr(os, call, fail_for_want_of_space)
        charge(altered, ONE)
    assert Ledger(altered, KEY).lines() == lines


# Other processes. One has imported everything and forks for each task, as importing takes seconds.


def serve() -> None:
    """Fork a child for each line of standard input: the name of a function in this file, and its arguments."""
    accounting.fits((ONE,), Budget(1e-3, 1e-5))  # imports what forked children need, before one loses its rights
    print("ready", flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        if child := os.fork():
            print(child, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            continue
        status = 1
        try:
            globals()[name](*arguments)
            status = 0
        finally:
            os._exit(status)


class Processes:
    """Runs functions of this file in processes of their own."""

    def __init__(self) -> None:
        code = "from tests.client.test_ledger import serve; serve()"
        root = Path(__file__).parents[2]
        self._server = subprocess.Popen(
            [sys.executable, "-c", code], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._answer() == "ready"

    def start(self, function: Callable[..., None], *arguments: object) -> int:
        assert self._server.stdin
        print(json.dumps([function.__name__, *arguments], default=str), file=self._server.stdin, flush=True)
        return int(self._answer())

    def wait(self) -> int:
        return int(self._answer())

    def run(self, function: Callable[..., None], *arguments: object) -> int:
        self.start(function, *arguments)
        return self.wait()

    def close(self) -> None:
        self._server.communicate()

    def _answer(self) -> str:
        assert self._server.stdout
        return self._server.stdout.readline().strip()


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    running = Processes()
    yield running
    running.close()


def append_to(path: str, text: str) -> None:
    with open(path, "a") as file:
        file.write(text)


def charge_until_killed(folder: str, acknowledged: str) -> None:
    for number in range(1_000_000):
        data_set = patients("anna", f"patient {number}") if number % 2 else ALL  # a new data set every other time
        line = Ledger(Path(folder), KEY).charge(data_set, release(OTHER, number=number), PLENTY)
        append_to(acknowledged, f"{line.number} {line.hash}\n")


def test_kill_at_any_moment_never_loses_an_acknowledged_charge(processes: Processes, tmp_path: Path) -> None:
    held, acknowledged, coin = new_ledger(tmp_path), tmp_path / "acknowledged", random.Random(4)
    before: tuple[Line, ...] = ()
    num_acknowledged = 0
    for attempt in range(50):
        acknowledged.write_text("")
        pid = processes.start(charge_until_killed, tmp_path, acknowledged)
        patience = time.monotonic() + 30
        while attempt % 2 and not acknowledged.stat().st_size and time.monotonic() < patience:
            time.sleep(0.001)  # every other time it is in full swing
        time.sleep(coin.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        assert processes.wait() == -signal.SIGKILL
        lines = held.lines()
        assert lines[: len(before)] == before  # never goes down
        seen = [line.split() for line in acknowledged.read_text().splitlines()]
        assert [[str(line.number), line.hash] for line in lines[len(before) :]][: len(seen)] == seen
        assert len(lines) - len(before) - len(seen) in (0, 1)  # the one that was on its way may count
        assert num_steps(held.read().of_study(STUDY)) == len(lines)
        before, num_acknowledged = lines, num_acknowledged + len(seen)
    assert num_acknowledged >= 25
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("ledger*")} == {0o600}


def die_around_the_head(folder: str, moment: str) -> None:
    write = ledger.write_atomically

    def write_and_die(path: Path, data: bytes, mode: int) -> None:
        if moment == "after":
            write(path, data, mode)
        os.kill(os.getpid(), signal.SIGKILL)

    ledger.write_atomically = write_and_die  # type: ignore[attr-defined]
    charge(Path(folder), OTHER, data_set=patients("fay"))


@pytest.mark.parametrize("num_lines", [0, 2])
def test_a_crash_between_head_and_line_counts_the_line(num_lines: int, processes: Processes, tmp_path: Path) -> None:
    held = new_ledger(tmp_path)
    lines = charge(tmp_path, *[ONE] * num_lines)
    assert processes.run(die_around_the_head, tmp_path, "before") == -signal.SIGKILL
    assert held.lines() == lines  # nothing was charged, and nothing acknowledged
    assert processes.run(die_around_the_head, tmp_path, "after") == -signal.SIGKILL
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as db:
        assert db.execute("SELECT COUNT(*) FROM line").fetchone() == (num_lines,)
    assert held.read().histories(patients("fay").patients) == ((OTHER,),)
    (newest,) = charge(tmp_path, ONE)
    assert (newest.number, newest.previous) == (num_lines + 2, held.lines()[-2].hash)
    assert held.read().of_study(STUDY)[-2:] == (OTHER, ONE)


def test_crashes_one_after_the_other_count_each(processes: Processes, tmp_path: Path) -> None:
    held = new_ledger(tmp_path)
    for number in range(1, 4):
        assert processes.run(die_around_the_head, tmp_path, "after") == -signal.SIGKILL
        assert number == 1 or len(held.lines()) == number  # also when nobody looks between the first two


def charge_and_report(folder: str, report: str, num_patients: int, largest_file: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    try:
        charge(Path(folder), OTHER, data_set=patients(*map(str, range(num_patients))))
        text = "charged"
    except LedgerError as error:
        text = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    append_to(report, f"{text}\n")


@pytest.mark.parametrize(
    "num_patients, largest_file, counts",
    [
        (600, 50_000, True),  # the head fits with 600 digests of 67 bytes, the line's pages do not
        (600, 20_000, False),  # not even the head
        (5, 100, False),  # nothing at all
    ],
)
def test_a_full_disk_is_named_and_at_most_over_counts(
    num_patients: int, largest_file: int, counts: bool, processes: Processes, tmp_path: Path
) -> None:
    held, report = new_ledger(tmp_path), tmp_path / "report"
    (first,) = charge(tmp_path, ONE)
    for _ in range(2):  # trying again does not count twice
        assert processes.run(charge_and_report, tmp_path, report, num_patients, largest_file) == 0
    for text in report.read_text().splitlines():
        assert "disk is full" in text and "Make room" in text
    assert held.read().of_study(STUDY) == ((ONE, OTHER) if counts else (ONE,))
    charge(tmp_path, OTHER)
    assert held.lines()[0] == first and num_steps(held.read().of_study(STUDY)) == 11 + counts


def fill_a_small_disk(folder: str, report: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    user, mounts, private, recursive = 0x10000000, 0x00020000, 1 << 18, 1 << 14
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(mounts if uid == 0 else user | mounts):
        return append_to(report, "unavailable")
    if uid:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            Path("/proc/self", name).write_text(text)
    libc.mount(b"none", b"/", None, recursive | private, None)
    if libc.mount(b"small", os.fsencode(folder), b"tmpfs", 0, b"size=256k"):
        return append_to(report, "unavailable")
    held, filler = new_ledger(Path(folder)), Path(folder) / "filler"
    charged = [line.hash for line in charge(Path(folder), ONE, OTHER)]
    for free in range(200_000, 0, -4_096):  # less and less room, until the first charge fails
        size = max(0, os.statvfs(folder).f_bavail * 4_096 - free)
        with filler.open("ab") as file:
            file.write(bytes(size))
        try:
            (line,) = charge(Path(folder), ONE)
        except LedgerError as error:
            append_to(report, f"{error}\n")
            continue
        charged.append(line.hash)
    filler.unlink()
    lines = [line.hash for line in held.lines()]
    kept = [each for each in lines if each in charged]
    append_to(report, f"{kept == charged} {len(lines) - len(kept)}")


def test_a_file_system_without_room_loses_no_acknowledged_charge(processes: Processes, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    status = processes.run(fill_a_small_disk, tmp_path / "disk", tmp_path / "report")
    *errors, result = (tmp_path / "report").read_text().splitlines()
    if result == "unavailable":
        pytest.skip("the system does not allow a small file system of one's own")
    assert status == 0
    assert errors and all("disk is full" in error for error in errors)
    kept, over = result.split()
    assert kept == "True" and int(over) <= 1


def charge_without_rights(folder: str, report: str) -> None:
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    charge_and_report(folder, report, 5, resource.RLIM_INFINITY)


@pytest.mark.parametrize(
    "folder_mode, file_mode, head_mode, lock_mode, cause",
    [
        (0o555, 0o444, 0o444, 0o444, "ledger.lock"),
        (0o555, 0o444, 0o444, 0o666, "ledger.db"),
        (0o555, 0o000, 0o444, 0o666, "ledger.db"),
        (0o777, 0o444, 0o444, 0o666, "ledger.db"),
        (0o777, 0o660, 0o000, 0o666, "ledger.db"),
        (0o000, 0o666, 0o444, 0o666, "ledger.db"),
    ],
)
def test_files_without_rights_are_named(
    folder_mode: int, file_mode: int, head_mode: int, lock_mode: int, cause: str, processes: Processes
) -> None:
    with tempfile.TemporaryDirectory() as name:  # root gives up its rights, and nobody else enters pytest's folders
        (folder := Path(name) / "site").mkdir()
        report = Path(name) / "report"
        report.touch(0o666)
        report.chmod(0o666)
        Path(name).chmod(0o755)
        held = new_ledger(folder)
        lines = charge(folder, ONE)
        modes = {"": folder_mode, FILE_NAME: file_mode, HEAD_FILE: head_mode, ledger.LOCK_FILE: lock_mode}
        for each, mode in reversed(modes.items()):
            (folder / each).chmod(mode)
        assert processes.run(charge_without_rights, folder, report) == 0
        folder.chmod(0o700)
        for each in (FILE_NAME, HEAD_FILE, ledger.LOCK_FILE):
            (folder / each).chmod(0o600)
        assert f"{cause} cannot be read and written" in report.read_text()
        assert "Let the account that trains read and write" in report.read_text()
        assert held.lines() == lines


def charge_in_three(folder: str, charges: int) -> None:
    children = []
    for child in range(3):
        if not (pid := os.fork()):
            status = 1
            try:
                for _ in range(charges):
                    charge(Path(folder), OTHER, data_set=patients("anna", str(child)))
                status = 0
            finally:
                os._exit(status)
        children.append(pid)
    assert all(os.waitpid(pid, 0)[1] == 0 for pid in children)


def test_processes_at_once_lose_no_charge(processes: Processes, tmp_path: Path) -> None:
    held = new_ledger(tmp_path)
    assert processes.run(charge_in_three, tmp_path, 10) == 0
    assert len(held.lines()) == num_steps(held.read().of_study(STUDY)) == 30
    assert [num_steps(history) for history in held.read().histories(patients("anna").patients)] == [30]
    for child in range(3):
        assert [num_steps(history) for history in held.read().histories(patients(str(child)).patients)] == [10]


def test_two_at_once_cannot_overwrite_each_other(tmp_path: Path) -> None:
    first, second = new_ledger(tmp_path), Ledger(tmp_path, KEY)
    assert first.lines() == second.lines() == ()  # both have read an empty ledger
    first.charge(ALL, release(), PLENTY)
    second.charge(ALL, release(), PLENTY)
    assert first.read().of_study(STUDY) == (Mechanism(0.25, 3.0, 20),)


def test_a_moved_folder_is_the_same_ledger(altered: Path, tmp_path: Path) -> None:
    lines = Ledger(altered, KEY).lines()
    moved = tmp_path / "moved ?#%20é"
    moved.mkdir()
    for name in (FILE_NAME, HEAD_FILE):
        shutil.move(altered / name, moved / name)
    assert Ledger(moved, KEY).lines() == lines
    charge(moved, ONE)


# ---------------------------------------------------------------- audits


def test_a_verdict_is_a_line_on_each_side_of_the_split(tmp_path: Path) -> None:
    held = new_ledger(tmp_path)
    charge(tmp_path, ONE)
    lines = audit(tmp_path)
    assert held.lines()[1:] == lines
    assert [(line.audited, line.epsilon, line.mechanism, line.data_set) for line in lines] == [
        ("training", 0.5, PureRelease(0.5), ALL.digest),
        ("held_out", 2.0, PureRelease(2.0), HELD_OUT.digest),
    ]
    assert {(line.sampling_probability, line.noise_multiplier, line.steps, line.clip_norm) for line in lines} == {
        (1.0, 0.0, 1, 1.0)
    }
    book = held.read()
    assert book.histories(ALL.patients) == ((ONE, PureRelease(0.5)),)
    assert book.histories(HELD_OUT.patients) == ((PureRelease(2.0),),)
    assert book.of_study(STUDY) == (ONE, PureRelease(0.5))  # nobody pays what both sides pay
    assert book.of_other_studies(OTHER_STUDY) == (ONE, PureRelease(0.5))


def test_a_line_written_before_the_split_was_charged_apart_counts_for_both_sides(tmp_path: Path) -> None:
    held = new_ledger(tmp_path)
    charge(tmp_path, ONE, data_set=patients(*NAMES, "fay", "gus"))
    charge(tmp_path, OTHER)
    audit(tmp_path)
    assert held.read().histories(ALL.patients) == ((ONE, OTHER, PureRelease(0.5)),)
    assert held.read().histories(HELD_OUT.patients) == ((ONE, PureRelease(2.0)),)


def test_a_patient_who_comes_to_the_other_side_has_paid_on_both(tmp_path: Path) -> None:
    # As when ids are written another way: sub-fay was held out, fay is trained on, and both are the same person.
    held = new_ledger(tmp_path)
    audit(tmp_path)
    charge(tmp_path, ONE, data_set=patients("sub-fay"))
    assert set(held.read().histories(HELD_OUT.patients)) == {(PureRelease(2.0), ONE), (PureRelease(2.0),)}


def test_verdicts_are_counted_by_study_and_by_patient(tmp_path: Path) -> None:
    held = new_ledger(tmp_path)
    assert held.read().num_verdicts(STUDY) == held.read().most_verdicts(ALL.patients) == 0
    charge(tmp_path, ONE)  # training is no verdict
    audit(tmp_path)
    audit(tmp_path, OTHER_STUDY)
    held.charge_together(verdict(training=patients("anna", "zoe"), held_out=patients("yan")), PLENTY)
    book = held.read()
    assert (book.num_verdicts(STUDY), book.num_verdicts(OTHER_STUDY), book.num_verdicts("f" * 64)) == (2, 1, 0)
    for names, most in ((("anna",), 3), (("ben", "cleo"), 2), (("zoe", "yan"), 1), (("ben", "anna"), 3), (("x",), 0)):
        assert book.most_verdicts(patients(*names).patients) == most
    assert book.most_verdicts(HELD_OUT.patients) == 2


@pytest.mark.parametrize(
    ("epsilon", "side"),
    [(1.99, "fay"), (0.49, "anna")],  # the held-out patients' 2 does not fit, or not even the others' 0.5
)
def test_a_verdict_that_one_side_cannot_pay_charges_neither(epsilon: float, side: str, tmp_path: Path) -> None:
    held = new_ledger(tmp_path)
    before = contents(tmp_path)
    for call in (held.charge_together, held.check_together):
        with pytest.raises(OverBudget, match="Another audit of phantom would bring"):
            call(verdict(), Budget(epsilon, 1e-12))
    assert held.lines() == () and contents(tmp_path) == before
    held.charge_together(verdict(), Budget(2.0, 1e-12))


def test_what_is_charged_together_adds_up_on_patients_of_both(tmp_path: Path) -> None:
    held = new_ledger(tmp_path)
    both = verdict(held_out=patients("anna"))
    with pytest.raises(OverBudget):
        held.charge_together(both, Budget(2.49, 1e-12))
    held.charge_together(both, Budget(2.5, 1e-12))
    assert held.read().histories(patients("anna").patients) == (ANSWERS,)


def test_who_refuses_sees_the_ledger_as_it_is_and_nothing_is_charged(tmp_path: Path) -> None:
    held, seen = new_ledger(tmp_path), []

    def refuse(book: Book) -> None:
        seen.append(len(book.lines))
        if book.num_verdicts(STUDY) >= 1:
            raise KeyError("enough")

    held.check_together(verdict(), PLENTY, refuse)
    held.charge_together(verdict(), PLENTY, refuse)
    for call in (held.charge_together, held.check_together):
        with pytest.raises(KeyError, match="enough"):
            call(verdict(), PLENTY, refuse)
    assert seen == [0, 0, 2, 2] and len(held.lines()) == 2


def test_nobody_may_be_held_out(tmp_path: Path) -> None:
    held = new_ledger(tmp_path)
    held.charge_together(verdict(held_out=patients()), PLENTY)
    assert len(held.lines()) == 2 and held.read().most_verdicts(ALL.patients) == 1


def test_a_release_is_of_one_kind() -> None:
    for mechanism, audited in ((ONE, "training"), (ANSWERS[0], None)):
        with pytest.raises(ValueError, match="an audit's answer is a pure release"):
            Release(STUDY, "phantom", "run-1", 1, mechanism, 1.0, audited)  # type: ignore[arg-type]


@pytest.fixture
def audited(tmp_path: Path) -> Path:
    """A ledger with a line of training and a verdict."""
    new_ledger(tmp_path)
    charge(tmp_path, ONE)
    audit(tmp_path)
    return tmp_path


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("column", [name for name in COLUMNS if name != "number"])
def test_a_changed_row_of_an_audit_is_found(column: str, number: int, audited: Path) -> None:
    kind = float if column == "epsilon" else str if column == "audited" else Line.__dataclass_fields__[column].type
    new = {str: f"{column} || 'x'", float: f"{column} + 1", int: f"{column} + 1"}[kind]  # type: ignore[index]
    edit(audited, f"UPDATE line SET {column} = {new} WHERE number = {number}")
    assert_refused(audited, f"ledger.db was altered: line {number} is not what was written")


@pytest.mark.parametrize(
    "changes",
    [
        {"epsilon": None},
        {"audited": None},
        {"epsilon": None, "audited": None},
        {"audited": "somebody"},
        {"epsilon": 0.0},
        {"epsilon": -0.5},
        {"epsilon": 1},
        {"noise_multiplier": 1.0},
        {"sampling_probability": 0.5},
        {"steps": 2},
        {"clip_norm": 2.0},
    ],
)
def test_a_line_between_the_kinds_is_none_whatever_its_hash(changes: dict[str, object], audited: Path) -> None:
    lines = Ledger(audited, KEY).lines()
    write_lines(audited, forged([*lines[:2], replace(lines[2], **changes)]))  # type: ignore[arg-type]
    assert_refused(audited, "altered: line 3 is not what was written|text that is none")


def test_the_rows_of_a_verdict_come_back_when_they_are_removed(audited: Path) -> None:
    before = Ledger(audited, KEY).read()
    for first in (3, 2):
        edit(audited, f"DELETE FROM line WHERE number >= {first}", "DELETE FROM member")
        edit(audited, *(f"INSERT INTO member VALUES ('{ALL.digest}', '{patient}')" for patient in ALL.patients))
        assert Ledger(audited, KEY).read() == replace(before, unwritten=4 - first)
        assert Ledger(audited, KEY).read() == before
    edit(audited, "DELETE FROM line")
    assert_refused(audited, "an older copy: it ends at line 0, and ledger-head.json at line 3")


@pytest.mark.parametrize("part", ["the first line", "its patients", "the order", "one line more", "the first alone"])
def test_a_head_of_a_verdict_that_was_altered_is_found(part: str, audited: Path) -> None:
    head = json.loads((audited / HEAD_FILE).read_bytes())
    (first,) = head["before"]
    match part:
        case "the first line":
            first["line"]["epsilon"] = 0.25
        case "its patients":
            first["members"] = ["somebody"]
        case "the order":
            head = {"line": first["line"], "members": None, "before": [{"line": head["line"], "members": None}]}
        case "one line more":
            head["before"] = [first, first]
        case "the first alone":
            head = first
    (audited / HEAD_FILE).write_bytes(json.dumps(head, sort_keys=True, separators=(",", ":")).encode())
    edit(audited, "DELETE FROM line WHERE number >= 2", f"DELETE FROM member WHERE data_set = '{HELD_OUT.digest}'")
    if part == "the first alone":
        assert len(Ledger(audited, KEY).lines()) == 2  # an older pair of file and head: what the export is the proof of
    else:
        assert_refused(audited, "damaged or was altered|does not follow|the patients of line|another one|is missing")


def audit_and_die(folder: str, moment: str) -> None:
    write = ledger.write_atomically

    def write_and_die(path: Path, data: bytes, mode: int) -> None:
        if moment == "after":
            write(path, data, mode)
        os.kill(os.getpid(), signal.SIGKILL)

    ledger.write_atomically = write_and_die  # type: ignore[attr-defined]
    audit(Path(folder))


def test_a_crash_leaves_both_lines_of_a_verdict_or_none(processes: Processes, tmp_path: Path) -> None:
    held = new_ledger(tmp_path)
    lines = charge(tmp_path, ONE)
    assert processes.run(audit_and_die, tmp_path, "before") == -signal.SIGKILL
    assert held.lines() == lines
    assert processes.run(audit_and_die, tmp_path, "after") == -signal.SIGKILL
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as db:
        assert db.execute("SELECT COUNT(*) FROM line").fetchone() == (1,)
    assert held.read().unwritten == 2
    assert held.read().unwritten == 0
    assert held.read().histories(HELD_OUT.patients) == ((PureRelease(2.0),),)
    assert held.read().num_verdicts(STUDY) == 1
    assert processes.run(audit_and_die, tmp_path, "after") == -signal.SIGKILL
    (newest,) = charge(tmp_path, ONE)  # what opens the ledger next puts both lines back
    assert newest.number == 6 and held.read().num_verdicts(STUDY) == 2


def audit_until_killed(folder: str, acknowledged: str) -> None:
    for _ in range(1_000_000):
        append_to(acknowledged, f"{audit(Path(folder))[-1].number}\n")


def test_kill_at_any_moment_leaves_whole_verdicts(processes: Processes, tmp_path: Path) -> None:
    held, acknowledged, coin = new_ledger(tmp_path), tmp_path / "acknowledged", random.Random(5)
    num_acknowledged = 0
    for attempt in range(12):
        acknowledged.write_text("")
        pid = processes.start(audit_until_killed, tmp_path, acknowledged)
        patience = time.monotonic() + 30
        while attempt % 2 and not acknowledged.stat().st_size and time.monotonic() < patience:
            time.sleep(0.001)  # every other time it is in full swing
        time.sleep(coin.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        assert processes.wait() == -signal.SIGKILL
        asked, seen = [line.audited for line in held.lines()], acknowledged.read_text().split()
        assert asked == ["training", "held_out"] * (len(asked) // 2)
        assert all(int(number) <= len(asked) for number in seen)
        num_acknowledged += len(seen)
    assert num_acknowledged >= 6


# Lines that were written before there were audits


OLD = json.loads((Path(__file__).parent / "ledger_v1.json").read_text())


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A ledger as it was left by a program that knew no audits."""
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as db:
        db.execute(f"PRAGMA application_id = {OLD['application_id']}")
        for statement in OLD["schema"]:
            db.execute(statement)
        for line in OLD["lines"]:
            db.execute(f"INSERT INTO line VALUES ({', '.join('?' * len(line))})", tuple(line.values()))
        db.executemany("INSERT INTO member VALUES (?, ?)", OLD["members"])
        db.execute(f"PRAGMA user_version = {OLD['user_version']}")
        db.commit()
    (tmp_path / HEAD_FILE).write_text(OLD["head"])
    for name in (FILE_NAME, HEAD_FILE):
        (tmp_path / name).chmod(0o600)
    return tmp_path


def test_an_old_ledger_is_read_and_goes_on(old: Path) -> None:
    held = Ledger(old, KEY)
    lines = held.lines()
    assert [line.hash for line in lines] == [line["hash"] for line in OLD["lines"]]
    assert lines == tuple(Line(**line) for line in OLD["lines"])
    assert version(old) == 2 and (old / HEAD_FILE).read_text() == OLD["head"]
    assert held.read().histories(patients("ben").patients) == ((Mechanism(0.25, 3.0, 20), Mechanism(1.0, 4.5, 1)),)
    charged = (*audit(old), *charge(old, ONE))
    assert held.lines() == (*lines, *charged)
    assert charged[0].previous == OLD["lines"][-1]["hash"]


def test_an_old_ledger_whose_newest_line_is_in_the_head_alone_is_put_right(old: Path) -> None:
    with closing(sqlite3.connect(old / FILE_NAME)) as db:
        db.execute("DROP TRIGGER line_kept")
        db.execute("DELETE FROM line WHERE number = 3")
        db.execute(next(statement for statement in OLD["schema"] if "TRIGGER line_kept" in statement))
        db.commit()
    assert [line.hash for line in Ledger(old, KEY).lines()] == [line["hash"] for line in OLD["lines"]]


def test_a_new_line_of_training_is_what_an_old_program_would_have_written(tmp_path: Path) -> None:
    new_ledger(tmp_path)
    (line,) = charge(tmp_path, ONE)
    head = json.loads((tmp_path / HEAD_FILE).read_bytes())
    assert head["line"].keys() == OLD["lines"][0].keys() and head.keys() == {"line", "members"}
    assert head["line"]["hash"] == line.hash


# ---------------------------------------------------------------- who is who, and who may write


@pytest.mark.parametrize("other", ["sub-01", " 01", "01 ", "sub-01 "])
def test_a_patient_is_the_same_however_the_id_was_found(other: str, tmp_path: Path) -> None:
    one, two = (data_set_of(bytes(32), tmp_path, [text, "x"]) for text in ("01", other))
    assert one.digest == two.digest and one.patients == two.patients


def test_accents_are_the_same_in_both_forms_of_unicode_and_other_ids_are_others(tmp_path: Path) -> None:
    ids = ["Zo\u00eb", "Zoe\u0308", "Zoe", "zo\u00eb", "subs-Zo\u00eb"]
    digests = [data_set_of(bytes(32), tmp_path, [text]).digest for text in ids]
    assert digests[0] == digests[1] and len(set(digests)) == 4


@pytest.mark.parametrize("name", [FILE_NAME, HEAD_FILE])
def test_a_file_that_everyone_may_write_proves_nothing(name: str, tmp_path: Path) -> None:
    create(tmp_path)
    (tmp_path / name).chmod(0o666)
    with pytest.raises(LedgerError, match="Everyone may write"):
        Ledger(tmp_path, bytes(32)).lines()
    (tmp_path / name).chmod(0o600)
    assert Ledger(tmp_path, bytes(32)).lines() == ()


def test_a_process_that_stopped_while_it_held_the_ledger_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(tmp_path)
    monkeypatch.setattr(ledger, "LOCK_SECONDS", 0.2)
    with locked(tmp_path / "ledger.lock"), pytest.raises(LedgerError, match="is locked: another process"):
        Ledger(tmp_path, bytes(32)).lines()
    assert Ledger(tmp_path, bytes(32)).lines() == ()
