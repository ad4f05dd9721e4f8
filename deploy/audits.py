"""What ``synthward audit plan`` and ``synthward audit run`` do."""

from pathlib import Path

from common.audit.plan import load_signed_plan, make_audit_plan, sign
from common.config import StudyConfig
from common.errors import ConfigError, SiteError, VerdictError
from common.identity import load_private_key
from common.secagg.roster import load_roster


def make_plan(study_path: Path, roster_path: Path | None, key_path: Path, out: Path) -> None:
    """Make and sign the plan of a study's audit, and say what it can find.

    Raises:
        ConfigError: no study, one without a contract, no roster where the study needs one, no key, a file in the way.
    """
    study = StudyConfig.from_toml(study_path)
    if not study.federation.contracted_patients:
        raise ConfigError("The study has no contract with any site.", "Fill in [federation.contracted_patients].")
    if (study.federation.aggregation == "secure") != (roster_path is not None):
        raise ConfigError("A study with secure aggregation needs --roster; one without has none.", "Correct this.")
    if out.exists():
        raise ConfigError(f"{out} exists already.", "A study has one plan. Give another --out, or use that one.")
    try:
        key = load_private_key(key_path)
    except SiteError as error:  # the wrong argument of a command, not a fault of a site
        raise ConfigError(error.message, "Give the identity.key that `synthward site keygen` made.") from None
    signed = sign(make_audit_plan(study, load_roster(roster_path).digest if roster_path else ""), key)
    signed.save(out)
    print(f"{out}   plan {signed.plan.digest}")
    print(f"signed by {signed.key}")


def audit_run(run_folder: Path, plan_path: Path | None, device: str | None) -> None:
    """Audit a simulated run.

    Raises:
        ConfigError: the run cannot be audited, or ``plan_path`` is not the plan that was registered before training.
        TooFewSurvivors: a site did not answer.
        VerdictError: the verdict is not PASS.
    """
    from deploy.simulate import audit
    from server.audit import read_audit
    from server.audit_plan import PLAN_FILE

    if plan_path is not None and (run_folder / PLAN_FILE).exists():
        if load_signed_plan(plan_path) != load_signed_plan(run_folder / PLAN_FILE):
            raise ConfigError(
                f"{plan_path} is not the plan that was registered before the training of {run_folder}.",
                "The sites audit by that one only; leave out --plan.",
            )
    audit(run_folder, device)
    found = read_audit(run_folder)
    if found is None:
        raise ConfigError(f"{run_folder} has no verdict.", "Audit it again.")
    verdict = found["verdict"]
    print(verdict["outcome"])
    for reason in verdict["reasons"]:
        print(f"  {reason}")
    print(run_folder / "report.html")
    if verdict["outcome"] != "PASS":
        raise VerdictError(f"The verdict on {run_folder} is {verdict['outcome']}.", "Nothing of it may be released.")
