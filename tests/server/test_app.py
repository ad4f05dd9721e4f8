import logging
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

import server.report.page
import server.study_run
from common.errors import ConfigError, TooFewSurvivors
from deploy.local_grid import LocalGrid
from server.app import main
from tests.server.report.runs import make_run
from tests.server.scripted import two_sites


def start(out: str, **more: str) -> None:
    config = {**two_sites().to_run_config(), "run.out": out, "run.device": "cpu", "run.resume": False}
    config |= {f"run.{name}": value for name, value in more.items()}
    grid = LocalGrid(lambda message, context: message, {}, {}, 1)  # type: ignore[arg-type, return-value]
    main(grid, Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config))


def test_a_relative_folder_is_refused() -> None:
    with pytest.raises(ConfigError, match="run.out must be an absolute path, found runs/flwr"):
        start("runs/flwr")


def test_what_is_no_signature_is_refused_before_anyone_is_asked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run.study_signature is no signature"):
        start(str(tmp_path), study_signature="not hex")
    assert list(tmp_path.iterdir()) == []


def test_the_studys_signature_is_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[bytes] = []

    def run_study(*arguments: object) -> None:
        make_run().save(tmp_path)
        handed.append(arguments[-1])  # type: ignore[arg-type]

    monkeypatch.setattr(server.study_run, "run_study", run_study)
    start(str(tmp_path), study_signature="5e" * 64 + "\n")  # as in the file, with its line end
    start(str(tmp_path))
    assert handed == [bytes.fromhex("5e" * 64), b""]


def test_a_report_that_fails_does_not_hide_why_the_run_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        make_run().save(tmp_path)
        raise TooFewSurvivors("nobody came")

    def no_space(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(server.study_run, "run_study", fail)
    monkeypatch.setattr(server.report.page, "write_report", no_space)
    with caplog.at_level(logging.ERROR), pytest.raises(TooFewSurvivors, match="nobody came"):
        start(str(tmp_path))
    assert "the report could not be written: no space left" in caplog.text


def test_a_failed_run_has_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        make_run().save(tmp_path)
        raise ZeroDivisionError

    monkeypatch.setattr(server.study_run, "run_study", fail)
    with pytest.raises(ZeroDivisionError):
        start(str(tmp_path))
    assert (tmp_path / "report.html").exists()
