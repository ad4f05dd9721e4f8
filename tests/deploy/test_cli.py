import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pytest

from common.errors import FederationError
from deploy import cli
from tests.deploy.command import ONE_SITE, synthward, tiny_study

COMMANDS = (["data", "phantom"], ["data", "check"], ["simulate"], ["generate"])
HEAVY = ("torch", "flwr", "pydantic", "numpy", "opacus", "rich", "scipy")


def test_help_answers_within_half_a_second() -> None:
    command = [str(Path(sys.executable).with_name("synthward")), "--help"]
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds.append(time.monotonic() - started)
    assert median(seconds) < 0.5
    for expected in (
        "examples:",
        "simulate --phantom",
        "--resume",
        "exit status:",
        "1 a defect",
        "4 the federation failed",
    ):
        assert expected in done.stdout


def test_the_parser_needs_no_heavy_import() -> None:
    code = f"import sys, deploy.cli; deploy.cli._parser(); print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", [[], ["data"], *COMMANDS], ids=" ".join)
def test_every_command_has_help(command: list[str]) -> None:
    result = synthward(*command, "--help")
    assert result.status == 0
    assert "usage: synthward" in result.out
    assert not result.err


def one_paragraph(text: str) -> bool:
    return text.startswith("synthward: ") and text.count("\n") == 1 and "Traceback" not in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "required: COMMAND"),
        (["train"], "invalid choice"),
        (["simulate", "--phantom", "many"], "whole number of at least 1, found many"),
        (["simulate", "--phantom", "0"], "at least 1"),
        (["simulate", "--phantom", "30", "--seed", "-1"], "expected"),
        (["simulate", "--site", "north"], "expected NAME=PATH, found 'north'"),
        (["simulate", "--site", "=path"], "expected NAME=PATH"),
        (["generate", "run"], "required: --count, --out"),
    ],
)
def test_wrong_usage_is_2_and_says_what_was_expected(arguments: list[str], expected: str) -> None:
    result = synthward(*arguments)
    assert result.status == 2
    assert expected in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["simulate"], "exactly one of --site, --data, --phantom and --resume, found 0"),
        (["simulate", "--phantom", "9", "--data", "x"], "found 2"),
        (["simulate", "--site", "a=x", "--sites", "2"], "--sites does not go with --site"),
        (["simulate", "--site", "a=x", "--site", "a=y", "--out", "OUT"], "same name"),
        (["simulate", "--site", "a b=x", "--site", "b=x", "--out", "OUT"], "Wrong settings of a site: name"),
        (["simulate", "missing.toml", "--phantom", "9"], "Cannot read the study file missing.toml"),
        (["simulate", "--resume", "OUT"], "holds no run to go on with"),
        (["simulate", "--resume", "OUT", "--rounds", "3"], "rounds cannot change"),
        (["generate", "OUT", "--count", "1", "--out", "OUT"], "no readable run.json"),
    ],
)
def test_wrong_configuration_is_2_in_one_paragraph(
    arguments: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = synthward(*arguments)
    assert result.status == 2
    assert expected in result.err
    assert one_paragraph(result.err)


def test_a_wrong_study_names_its_keys(tmp_path: Path) -> None:
    study = tiny_study(tmp_path / "s.toml", privacy__epsilom=1.0, federation__rounds=0)
    result = synthward("simulate", study, "--phantom", 30, "--out", tmp_path / "out")
    assert result.status == 2
    assert "privacy.epsilom: no such key" in result.err
    assert "federation.rounds" in result.err
    assert one_paragraph(result.err)
    assert not (tmp_path / "out").exists()


def test_bad_toml_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text("name = 'a'\nrounds = = 3\n")
    result = synthward("simulate", tmp_path / "s.toml", "--phantom", 30, "--out", tmp_path / "out")
    assert result.status == 2
    assert "line 2" in result.err


def test_an_occupied_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    result = synthward("simulate", "--phantom", 30, "--out", tmp_path)
    assert result.status == 2
    assert "is not empty" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_where_a_folder_belongs_is_2(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    result = synthward("simulate", "--phantom", 30, "--out", tmp_path / "out")
    assert result.status == 2
    assert one_paragraph(result.err)


def test_too_few_patients_is_3_and_says_how_many(tmp_path: Path) -> None:
    study = tiny_study(tmp_path / "s.toml")
    result = synthward("simulate", study, "--phantom", 2, "--sites", 2, "--out", tmp_path / "out")
    assert result.status == 3
    assert "Expected at least 2 sites with usable data, found 0" in result.err
    assert "Expected at least 20 patients with usable images, found 2" in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("source", ["--data", "--site"])
def test_an_absent_data_folder_is_3(source: str, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    study = tiny_study(tmp_path / "s.toml", **ONE_SITE)
    path = absent if source == "--data" else f"north={absent}"
    result = synthward("simulate", study, source, path, "--out", tmp_path / "out")
    assert result.status == 3
    assert str(absent) in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("position", [0, 3])
def test_debug_shows_where_it_failed(position: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["simulate", "--resume", "absent"]
    arguments.insert(position, "--debug")
    with pytest.raises(FederationError, match="holds no run"):  # what the interpreter then prints as a traceback
        cli.main(arguments)


def test_a_defect_is_1_without_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_simulate", lambda options: 1 // 0)
    result = synthward("simulate", "--phantom", 3)
    assert result.status == 1
    assert "Unexpected ZeroDivisionError" in result.err
    assert one_paragraph(result.err)


@pytest.mark.parametrize(("arguments", "folder"), [(("--out", "mine"), "mine"), ((), "runs/tiny")])
@pytest.mark.parametrize("trained", [True, False])
def test_ctrl_c_says_how_to_go_on(
    trained: bool, arguments: tuple[str, ...], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        if trained:
            Path(folder).mkdir(parents=True)
            Path(folder, "study.toml").touch()
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("deploy.runs.simulate", stopped)
    sites = ("--site", f"a={tmp_path}", "--site", f"b={tmp_path}")
    result = synthward("simulate", tiny_study(tmp_path / "s.toml"), *sites, *arguments)
    assert result.status == 130
    assert (f"--resume {folder}" if trained else "before training began") in result.err


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    command = f"{Path(sys.executable).with_name('synthward')} data phantom {tmp_path}/p --patients 1 | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=dict(os.environ))  # noqa: S602
    assert done.stderr == ""
