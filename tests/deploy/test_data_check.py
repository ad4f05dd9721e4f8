import json
from pathlib import Path

from tests.deploy.command import synthward, tiny_study


def test_it_counts_what_a_site_would_accept(hospitals: dict[str, Path]) -> None:
    result = synthward("data", "check", hospitals["north"])
    assert result.status == 0
    assert "accepted: 25 records of 25 patients" in result.out


def test_json_is_json(hospitals: dict[str, Path], tmp_path: Path) -> None:
    result = synthward("data", "check", hospitals["north"], "--json", "--study", tiny_study(tmp_path / "s.toml"))
    assert result.status == 0
    assert isinstance(json.loads(result.out), dict)


def test_too_few_patients_for_the_study_is_3(hospitals: dict[str, Path], tmp_path: Path) -> None:
    result = synthward("data", "check", hospitals["small"], "--study", tiny_study(tmp_path / "s.toml"))
    assert result.status == 3
    assert "at least 20 patients" in result.err
    assert "accepted: 5 records" in result.out


def test_an_absent_folder_is_3(tmp_path: Path) -> None:
    assert synthward("data", "check", tmp_path / "absent").status == 3
