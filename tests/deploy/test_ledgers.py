"""``synthward ledger``: what an officer reads, and what it says when the files are not what they were."""

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.accountant import open_ledger
from client.enrolled import open_accountant, read_enrolled
from client.ledger_lines import Release
from client.policy import Policy
from client.settings import SiteSettings
from client.statement import sign_statement
from common.config import StudyConfig
from common.privacy import accounting
from common.privacy.accounting import Budget, Mechanism, PureRelease
from common.privacy.plan import make_plan
from server.record import RunRecord
from tests.deploy.command import synthward
from tests.deploy.conftest import MARK, Run

MORE = Mechanism(0.25, 2.0, 50)


@pytest.fixture
def site(run: Run, tmp_path: Path) -> Path:
    """A copy of the folder of a site that took part in a run of epsilon 8."""
    return Path(shutil.copytree(run.folder / "sites" / "north", tmp_path / "north"))


def spend_more(site: Path, study: str = "another") -> None:
    """Another study of the same patients."""
    ledger = open_ledger(site)
    data_set = ledger.read().data_sets()[0]
    ledger.charge(data_set, Release("ab" * 32, study, "run", 1, MORE, 1.0), Budget(100.0, 1e-5))


def shown(site: Path) -> dict[str, Any]:
    result = synthward("ledger", "show", site, "--json")
    assert result.status == 0, result.err
    return dict(json.loads(result.out))


# ---------------------------------------------------------------- show


def test_what_a_run_spent_is_what_its_record_says(run: Run, site: Path) -> None:
    facts, tree = RunRecord.load(run.folder), shown(site)
    assert tree["spent"] == {"epsilon": facts.site("north").epsilon, "delta": 1e-5}
    (found,) = tree["data_sets"]
    assert found["spent"] == tree["spent"]
    assert found["budget"] == {"epsilon": 8.0, "delta": 1e-5}
    assert found["left"]["epsilon"] == pytest.approx(8.0 - tree["spent"]["epsilon"])
    (study,) = found["studies"]
    assert (study["digest"], study["rounds"], study["steps"]) == (facts.study_digest, 2, 6)
    assert study["spent"] == tree["spent"]
    text = synthward("ledger", "show", site).out
    assert f"epsilon {tree['spent']['epsilon']:.4f} at delta 1e-05" in text and "left of 8" in text


def test_two_studies_are_shown_alone_and_composed(run: Run, site: Path) -> None:
    first = shown(site)["spent"]["epsilon"]
    spend_more(site)
    tree = shown(site)
    (found,) = tree["data_sets"]
    alone = [study["spent"]["epsilon"] for study in found["studies"]]
    assert alone == [first, accounting.epsilon((MORE,), 1e-5)]
    both = (*open_ledger(site).read().of_study(RunRecord.load(run.folder).study_digest), MORE)
    assert tree["spent"]["epsilon"] == accounting.epsilon(both, 1e-5)
    assert max(alone) < tree["spent"]["epsilon"] < sum(alone)
    assert found["left"]["epsilon"] == 0.0  # over the budget that the site has now
    assert "do not simply add up" in synthward("ledger", "show", site).out


def audit(site: Path, run: Run) -> None:
    """A verdict on the site's patients, in a policy with room for it."""
    policy = Policy.load(site)
    policy.model_copy(update={"data": (policy.data[0].model_copy(update={"epsilon": 20.0}),)}).save(site)
    settings, study = SiteSettings.load(site), StudyConfig.from_toml(run.folder / "study.toml")
    account = open_accountant(settings, study, read_enrolled(settings, study))
    assert account is not None
    account.charge_audit(study.audit_round)


def test_an_audit_is_shown_in_words_on_both_sides_of_the_split(run: Run, site: Path) -> None:
    before = shown(site)["spent"]["epsilon"]
    audit(site, run)
    trained, held_out = shown(site)["data_sets"]
    assert trained["patients"] + held_out["patients"] == 25 and held_out["patients"] > 0
    assert [(found["studies"][0]["audits"], found["studies"][0]["audited"]) for found in (trained, held_out)] == [
        (1, "training"),
        (1, "held_out"),
    ]
    assert [(found["studies"][0]["rounds"], found["studies"][0]["steps"]) for found in (trained, held_out)] == [
        (2, 6),
        (0, 0),
    ]
    assert before < trained["spent"]["epsilon"] <= before + 0.5
    assert 1.99 < held_out["spent"]["epsilon"] <= 2.0
    text = synthward("ledger", "show", site).out
    assert "alone, 2 lines, 6 steps, 1 audit of patients it trains on\n" in text
    assert "alone, 1 audit of patients it holds out, who pay for no training\n" in text


def test_a_statement_holds_audits_and_the_ledger_continues_it(run: Run, site: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    assert synthward("ledger", "export", site, "--out", first).status == 0
    audit(site, run)
    assert synthward("ledger", "export", site, "--out", second).status == 0
    lines = json.loads(second.read_bytes())["lines"]
    assert ["epsilon" in line for line in lines] == [False, False, True, True]
    assert [(line["epsilon"], line["audited"]) for line in lines[2:]] == [(0.5, "training"), (2.0, "held_out")]
    spend_more(site)
    for statement, number in ((first, 2), (second, 4)):
        result = synthward("ledger", "verify", site, "--statement", statement)
        assert (result.status, f"begins with the {number} lines" in result.out) == (0, True)


def test_a_new_site_has_spent_nothing(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    synthward("site", "init", tmp_path / "new", "--name", "new", "--data", tmp_path / "scans")
    missing = synthward("ledger", "show", tmp_path / "new")
    assert (missing.status, "has no ledger" in missing.err) == (3, True)
    assert synthward("policy", "init", tmp_path / "new", "--epsilon", 4, "--delta", 1e-5).status == 0
    assert synthward("ledger", "show", tmp_path / "new").out == "new has spent nothing.\n"
    assert shown(tmp_path / "new") == {"site": "new", "spent": {"epsilon": 0.0, "delta": None}, "data_sets": []}
    assert not (tmp_path / "new" / "holdout.key").exists()  # looking makes no key


def test_what_was_spent_is_shown_without_a_policy_too(site: Path) -> None:
    spent = shown(site)["spent"]
    (site / "policy.toml").unlink()
    result = synthward("ledger", "show", site)
    assert (result.status, "budgets cannot be shown" in result.out) == (0, True)
    (found,) = shown(site)["data_sets"]
    assert (found["spent"], found["budget"], found["left"]) == (spent, None, None)


# ---------------------------------------------------------------- verify


def altered(site: Path) -> None:
    with sqlite3.connect(site / "ledger.db") as db:
        db.execute("DROP TRIGGER line_unchanged")
        db.execute("UPDATE line SET steps = 1")
    db.close()


def without_database(site: Path) -> None:
    (site / "ledger.db").unlink()


@pytest.mark.parametrize(("how", "reason"), [(altered, "was altered"), (without_database, "is missing")])
@pytest.mark.parametrize("command", ["show", "verify"])
def test_a_ledger_that_is_not_whole_is_named(how: Any, reason: str, command: str, site: Path) -> None:
    assert synthward("ledger", command, site).status == 0
    how(site)
    result = synthward("ledger", command, site)
    assert (result.status, reason in result.err, "Traceback" in result.err) == (3, True, False)


def test_a_statement_shows_that_the_whole_ledger_was_replaced_by_an_older_pair(site: Path, tmp_path: Path) -> None:
    """What no chain can show by itself: whoever has the site's folder puts back both files as they were."""
    old = Path(shutil.copytree(site, tmp_path / "old"))
    statement = tmp_path / "statement.json"
    spend_more(site)
    assert synthward("ledger", "export", site, "--out", statement).status == 0
    spend_more(site)
    after = synthward("ledger", "verify", site, "--statement", statement)
    assert (after.status, "begins with the 3 lines" in after.out) == (0, True)
    assert synthward("ledger", "verify", old).status == 0
    replaced = synthward("ledger", "verify", old, "--statement", statement)
    assert (replaced.status, "was replaced" in replaced.err) == (3, True)
    spend_more(old, study="a cheaper one")  # as long as the stated one, and other lines
    assert synthward("ledger", "verify", old, "--statement", statement).status == 3


# ---------------------------------------------------------------- export


def test_a_statement_is_signed_and_names_no_patient(site: Path, tmp_path: Path) -> None:
    out = tmp_path / "statement.json"
    assert synthward("ledger", "export", site, "--out", out).out == f"{out}\n"
    content = json.loads(out.read_bytes())
    assert (content["site"], len(content["lines"])) == ("north", 2)
    assert content["data_sets"] == shown(site)["data_sets"]
    members = {patient for data_set in open_ledger(site).read().data_sets() for patient in data_set.patients}
    text = out.read_text().replace(str(SiteSettings.load(site).data), "")  # the folder is named, on purpose
    assert len(members) > 10 and not [patient for patient in members if patient in text]
    assert MARK not in text
    again = synthward("ledger", "export", site, "--out", out)
    assert (again.status, "exists already" in again.err) == (2, True)


@pytest.mark.parametrize("change", ["steps", "site", "signature", "public_key", "garbage", "missing"])
def test_a_statement_that_was_altered_is_refused(change: str, site: Path, tmp_path: Path) -> None:
    out = tmp_path / "statement.json"
    synthward("ledger", "export", site, "--out", out)
    content = json.loads(out.read_bytes())
    match change:
        case "steps":
            content["lines"][0]["steps"] -= 1
        case "site":
            content["site"] = "south"
        case "signature" | "public_key":
            content[change] = content[change][:-2] + "00"
    out.write_text("[]" if change == "garbage" else json.dumps(content))
    if change == "missing":
        out.unlink()
    result = synthward("ledger", "verify", site, "--statement", out)
    assert (result.status, "Traceback" in result.err) == (2, False)


def test_a_statement_that_somebody_else_signed_is_refused(site: Path, run: Run, tmp_path: Path) -> None:
    """A stranger can sign fewer lines, or any: only this site's own key counts."""
    statement = sign_statement("north", Ed25519PrivateKey.generate(), open_ledger(site), None)
    (tmp_path / "forged.json").write_text(json.dumps(statement))
    result = synthward("ledger", "verify", site, "--statement", tmp_path / "forged.json")
    assert (result.status, "another site or key" in result.err) == (2, True)
    south = run.folder / "sites" / "south"
    synthward("ledger", "export", south, "--out", tmp_path / "south.json")
    assert synthward("ledger", "verify", site, "--statement", tmp_path / "south.json").status == 2


# ---------------------------------------------------------------- plan


def test_a_study_is_measured_against_what_is_left_before_anyone_joins(run: Run, site: Path, tmp_path: Path) -> None:
    before = open_ledger(site).lines()
    same = synthward("ledger", "plan", site, run.folder / "study.toml", "--json")  # a resumed run pays nothing again
    assert (same.status, json.loads(same.out)["fits"]) == (0, True)
    other = StudyConfig.from_toml(run.folder / "study.toml").with_changes("", seed=99)
    other.save(tmp_path / "other.toml")
    refused = synthward("ledger", "plan", site, tmp_path / "other.toml")
    assert (refused.status, "It does not fit." in refused.out) == (3, True)
    policy = Policy.load(site)
    wider = policy.model_copy(update={"data": (policy.data[0].model_copy(update={"epsilon": 20.0}),)})
    wider.save(site)
    tree = json.loads(synthward("ledger", "plan", site, tmp_path / "other.toml", "--json").out)
    spent = tree["spent"]["epsilon"]
    assert tree["fits"] and spent == tree["study"]["epsilon"] == shown(site)["spent"]["epsilon"]
    assert spent < tree["after"]["epsilon"] < 2 * spent
    assert open_ledger(site).lines() == before  # asking costs nothing


def test_verdicts_that_a_study_plans_are_measured_on_both_sides(run: Run, site: Path, tmp_path: Path) -> None:
    study = StudyConfig.from_toml(run.folder / "study.toml")
    contract = {**study.federation.contracted_patients, "west": 25}
    other = study.with_changes("federation", contracted_patients=contract).with_changes("audit", verdicts=2)
    other.save(tmp_path / "other.toml")
    policy = Policy.load(site)
    policy.model_copy(update={"data": (policy.data[0].model_copy(update={"epsilon": 20.0}),)}).save(site)
    tree = json.loads(synthward("ledger", "plan", site, tmp_path / "other.toml", "--json").out)
    plan = make_plan(other)
    assert plan is not None and tree["study"]["epsilon"] == plan.epsilon
    spent = open_ledger(site).read().of_study(study.digest)
    after = accounting.epsilon((*spent, *plan.history, PureRelease(0.5, 2)), 1e-5)
    assert tree["after"]["epsilon"] == after
    assert tree["after_held_out"]["epsilon"] == accounting.epsilon((PureRelease(2.0, 2),), 1e-5)
    text = synthward("ledger", "plan", site, tmp_path / "other.toml").out
    assert f"after it, all spent   epsilon {after:.4f} at delta 1e-05, 2 audits included\n" in text
    assert "patients held out     epsilon 4.0000 at delta 1e-05, 2 audits included\n" in text


def test_a_study_without_privacy_has_no_plan(run: Run, site: Path, tmp_path: Path) -> None:
    StudyConfig.from_toml(run.folder / "study.toml").with_changes("privacy", enabled=False).save(tmp_path / "s.toml")
    result = synthward("ledger", "plan", site, tmp_path / "s.toml")
    assert (result.status, "not private" in result.err) == (2, True)
