"""The audit as an operator runs it, on the built-in study and on their own."""

import json
import re
from pathlib import Path

import pytest

from common.config import StudyConfig
from common.errors import ConfigError, PrivacyError
from common.privacy import gradient
from common.privacy.plan import make_plan
from deploy.privacy_audit import audit


def own_study(path: Path, **privacy: object) -> Path:
    """A study whose plan is quickly made."""
    study = StudyConfig.model_validate({"name": "own", "image": {"size": 64}})
    study.with_changes("privacy", **{"sampling_probability": 1.0, "epsilon": 30.0, **privacy}).save(path)
    return path


def test_the_built_in_study_is_audited_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    audit(trials=20)
    text = capsys.readouterr().out
    assert re.search(r"study phantom: one (joint|local) step, 20 times with \d+ canaries and without", text)
    assert "claimed  at least" in text
    assert "at delta 1e-05" in text
    assert "\nnot refuted; " in text


def test_the_bound_stands_beside_the_claim_of_the_studys_own_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = own_study(tmp_path / "own.toml")
    audit(path, 100, as_json=True)
    tree = json.loads(capsys.readouterr().out)
    study = StudyConfig.from_toml(path)
    plan = make_plan(study)
    assert plan is not None
    assert (tree["study"], tree["digest"]) == ("own", study.digest)
    assert tree["verdict"] == "not refuted"
    (step,) = tree["steps"]
    assert (step["algorithm"], step["refuted"]) == ("local", [])
    assert step["claimed"]["inverse_noise_multiplier"] == 1 / plan.phases[0].mechanism.noise_multiplier
    assert step["claimed"]["sampling_probability"] == 1
    assert step["claimed"].keys() == step["at_least"].keys()
    for name, claimed in step["claimed"].items():
        assert 0 < step["at_least"][name] <= claimed
    assert step["delta"] == 1e-5
    assert step["seconds"] > 0


@pytest.mark.parametrize("as_json", [False, True])
def test_a_refuted_claim_is_printed_and_raised(
    as_json: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gradient, "ROUNDING_MARGIN", -0.2)
    with pytest.raises(PrivacyError, match="refutes the claimed sensitivity") as caught:
        audit(own_study(tmp_path / "own.toml"), 2, as_json=as_json)
    assert caught.value.exit_status == 3
    text = capsys.readouterr().out
    assert json.loads(text)["steps"][0]["refuted"] == ["sensitivity"] if as_json else "REFUTED: sensitivity" in text


def test_a_study_without_privacy_claims_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="enabled = false"):
        audit(own_study(tmp_path / "own.toml", enabled=False), 2)


def test_an_absent_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Cannot read"):
        audit(tmp_path / "absent.toml", 2)


def test_a_study_with_both_kinds_of_step_has_both_audited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "both.toml"
    phases = [
        {"algorithm": "moments", "share": 0.2},
        {"algorithm": "joint", "share": 0.4, "steps": 4},
        {"algorithm": "local", "share": 0.4, "steps": 4},
    ]
    study = StudyConfig.model_validate({"federation": {"phase": phases}})  # no contract yet
    study.with_changes("privacy", sampling_probability=1.0).save(path)
    audit(path, 100, as_json=True)
    tree = json.loads(capsys.readouterr().out)
    assert tree["verdict"] == "not refuted"
    assert [step["algorithm"] for step in tree["steps"]] == ["joint", "local"]
    plan = make_plan(StudyConfig.from_toml(path))
    assert plan is not None
    for step, phase in zip(tree["steps"], plan.phases[1:], strict=True):
        assert step["claimed"]["inverse_noise_multiplier"] == 1 / phase.mechanism.noise_multiplier
        assert 0 < step["at_least"]["inverse_noise_multiplier"] <= step["claimed"]["inverse_noise_multiplier"]
        assert 0.99 < step["at_least"]["movement_over_clip_norm"] <= 1


def test_a_study_of_moments_alone_has_no_step(tmp_path: Path) -> None:
    path = tmp_path / "moments.toml"
    StudyConfig.model_validate({"federation": {"algorithm": "moments", "rounds": 1}}).save(path)
    with pytest.raises(ConfigError, match="no discriminator's step"):
        audit(path, 2)
