import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from common.config import StudyConfig
from common.errors import ConfigError
from common.privacy import accounting
from common.privacy.accounting import Mechanism, PureRelease
from server import record
from server.record import AuditsRecord, RunRecord, SiteRecord
from tests.server.report.runs import make_run


def test_a_record_round_trips(tmp_path: Path) -> None:
    run = make_run()
    run.save(tmp_path)
    assert RunRecord.load(tmp_path) == run


@pytest.mark.parametrize("content", [None, b"", b"{}", b'{"schema_version": 1}', b"\xff"])
def test_what_is_no_record_is_named(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ConfigError, match="schema version 2"):
        RunRecord.load(tmp_path)


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(ValidationError):
        RunRecord.model_validate({**make_run().model_dump(), "patients": ["Jane"]})


def test_metrics_are_one_line_a_round(tmp_path: Path) -> None:
    assert record.read_metrics(tmp_path) == []
    for number in (1, 2):
        record.append_metrics(tmp_path, {"round": number, "loss": 0.5})
    assert record.read_metrics(tmp_path) == [{"round": 1, "loss": 0.5}, {"round": 2, "loss": 0.5}]


def test_a_round_that_was_run_twice_counts_once_the_last_time(tmp_path: Path) -> None:
    for number, loss in ((1, 1), (2, 2), (2, 3)):
        record.append_metrics(tmp_path, {"round": number, "loss": loss})
    assert record.read_metrics(tmp_path) == [{"round": 1, "loss": 1}, {"round": 2, "loss": 3}]


@pytest.mark.parametrize("kept", range(len('{"round": 2}')))
def test_a_line_cut_by_a_crash_is_ignored_and_then_replaced(kept: int, tmp_path: Path) -> None:
    record.append_metrics(tmp_path, {"round": 1})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"round": 2}'[:kept])
    assert record.read_metrics(tmp_path) == [{"round": 1}]
    record.append_metrics(tmp_path, {"round": 2})
    assert record.read_metrics(tmp_path) == [{"round": 1}, {"round": 2}]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"round": 1}, {"round": 2}]


def test_mechanisms_there_and_back() -> None:
    history = (Mechanism(0.5, 2.0, 3), Mechanism(0.25, 2.0, 4))
    site = make_run().sites[0]
    site.mechanisms = record.mechanisms(history)
    assert record.history(site) == history


def test_audits_stand_beside_the_training_and_are_no_part_of_it() -> None:
    history = (Mechanism(0.5, 2.0, 3), PureRelease(0.5, 2), Mechanism(0.25, 2.0, 4))
    site = make_run().sites[0]
    site.mechanisms, site.earlier = record.mechanisms(history), record.entries(history)
    assert record.history(site) == record.charged(site) == (history[0], history[2])
    assert [type(each).__name__ for each in site.earlier] == ["MechanismRecord", "MechanismRecord", "PureRecord"]
    site.audits = AuditsRecord(verdicts=2, epsilon_training=0.5, epsilon_held_out=2.0)
    assert record.charged(site) == (history[0], history[2], PureRelease(0.5, 2))
    again = SiteRecord.model_validate_json(site.model_dump_json())
    assert again == site and record.charged(again) == record.charged(site)


def test_a_record_from_before_audits_is_read() -> None:
    content = make_run().model_dump()
    for site in content["sites"]:
        del site["audits"]
    assert all(site.audits is None for site in RunRecord.model_validate(content).sites)


def test_the_figure_that_stays_is_prv() -> None:
    site = make_run().sites[0]
    record.set_epsilon(site, "rdp")
    rough = site.epsilon
    record.set_epsilon(site, "prv")
    assert site.epsilon == accounting.epsilon(record.history(site), 1e-5)
    assert rough is not None and site.epsilon is not None and site.epsilon < rough
    assert site.accountant == "prv"


@pytest.mark.parametrize(
    ("enabled", "records", "expected"),
    [
        (True, False, "the privacy unit is one patient."),
        (True, True, "one record (image): the data had no patient ids"),
        (False, False, "NOT PRIVATE"),
        (False, True, "NOT PRIVATE"),
    ],
)
def test_the_notice_says_what_is_protected(enabled: bool, records: bool, expected: str) -> None:
    study = StudyConfig().with_changes("privacy", enabled=enabled)
    assert expected in record.notice(study, record_is_patient=records)
