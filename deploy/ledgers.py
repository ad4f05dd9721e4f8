"""``synthward ledger``: what a site has spent, whether its ledger is whole, and whether another study would fit."""

import json
from collections.abc import Iterator
from pathlib import Path

from client.accountant import open_ledger
from client.data import cohort
from client.data.inventory import list_patients
from client.decision import Spent, outlook
from client.enrolled import first_contract
from client.ledger_lines import data_set_of, ledger_key
from client.policy import Policy
from client.settings import SiteSettings
from client.statement import DataSetSpent, StudySpent, check_continues, read_statement, sign_statement, spent_on
from common.config import StudyConfig, holdout_share
from common.errors import ConfigError, OverBudget, PolicyError
from common.files import write_atomically
from common.identity import PUBLIC_FILE, load_identity, read_public
from common.privacy.plan import audit_cost, make_plan


def show(folder: Path, *, as_json: bool) -> None:
    """Print what is spent and left, by data set and study. Raises SiteError, LedgerError."""
    settings = SiteSettings.load(folder)
    policy, trouble = _policy(folder)
    data_sets = spent_on(open_ledger(folder).read(), policy)
    if as_json:
        worst = max(data_sets, key=lambda found: found.epsilon, default=None)
        spent = {"epsilon": worst.epsilon, "delta": worst.delta} if worst else {"epsilon": 0.0, "delta": None}
        tree = {"site": settings.name, "spent": spent, "data_sets": [found.to_json() for found in data_sets]}
        print(json.dumps(tree, indent=2))
        return
    if trouble:
        print(f"budgets cannot be shown: {trouble}")
    if not data_sets:
        print(f"{settings.name} has spent nothing.")
    for found in data_sets:
        _print(found)


def _print(found: DataSetSpent) -> None:
    print(f"{found.folder}: {found.num_patients} patients (data set {found.digest[:16]})")
    left = "the policy has no budget for this folder"
    if found.budget is not None:
        left = f"{found.left:.4f} left of {found.budget.epsilon:g}"
    print(f"  spent  epsilon {found.epsilon:.4f} at delta {found.delta:g}; {left}")
    for study in found.studies:
        charged = ", ".join(_charged(study))
        print(f"  study  {study.name} ({study.digest[:16]}): epsilon {study.epsilon:.4f} alone, {charged}")
    own = max((study.epsilon for study in found.studies), default=0.0)
    if len(found.studies) > 1 or found.epsilon > own:
        print("  Epsilons of studies do not simply add up: the total is that of all steps composed, for the patient")
        print("  on whom most was spent, lines of other data sets with this patient included.")


def _charged(study: StudySpent) -> Iterator[str]:
    """What a study has charged a data set, in words."""
    if study.rounds or not study.audits:
        yield f"{study.rounds} lines, {study.steps} steps"
    if study.audits:
        whom = (
            "patients it trains on" if study.audited == "training" else "patients it holds out, who pay for no training"
        )
        yield f"{study.audits} audit{'s' if study.audits > 1 else ''} of {whom}"


def verify(folder: Path, statement: Path | None) -> None:
    """Walk the chain, compare with a statement of this site. Raises SiteError, ConfigError, LedgerError."""
    settings = SiteSettings.load(folder)
    ledger = open_ledger(folder)
    lines = ledger.lines()
    print(f"The ledger is whole: {len(lines)} lines" + (f", newest hash {lines[-1].hash}" if lines else ""))
    if statement is not None:
        stated = read_statement(statement)
        if (stated.site, stated.public_key) != (settings.name, read_public(folder / PUBLIC_FILE).hex()):
            raise ConfigError(f"{statement} was signed by another site or key.", "Give a statement of this site.")
        check_continues(ledger, stated.lines)
        print(f"It begins with the {len(stated.lines)} lines of {statement}, signed with {stated.public_key}")


def export(folder: Path, out: Path) -> None:
    """Write a signed statement of the whole ledger. Raises SiteError, ConfigError, LedgerError."""
    settings = SiteSettings.load(folder)
    if out.exists():
        raise ConfigError(f"{out} exists already.", "Give another --out: an older statement is worth keeping.")
    policy, _ = _policy(folder)
    statement = sign_statement(settings.name, load_identity(folder), open_ledger(folder), policy)
    write_atomically(out, (json.dumps(statement, indent=2) + "\n").encode(), mode=0o600)
    print(out)


def plan(folder: Path, study_file: Path, *, as_json: bool) -> None:
    """Print whether a study would fit into what is left. Raises OverBudget when it would not, after printing."""
    settings, study = SiteSettings.load(folder), StudyConfig.from_toml(study_file)
    planned = make_plan(study)
    if planned is None:
        raise ConfigError(f"{study_file} is not private: it has no plan.", "Set privacy.enabled = true.")
    policy = Policy.load(folder)
    budget = policy.budget_of(settings.data)
    found = outlook(study, spent_by(settings, study), budget.delta)
    fits = found.after <= budget.epsilon
    if as_json:
        tree = {
            "fits": fits,
            "spent": {"epsilon": found.spent, "delta": budget.delta},
            "study": {"epsilon": planned.epsilon, "delta": planned.delta},
            "after": {"epsilon": found.training, "delta": budget.delta},
            "after_held_out": {"epsilon": found.held_out, "delta": budget.delta},
            "budget": {"epsilon": budget.epsilon, "delta": budget.delta},
        }
        print(json.dumps(tree, indent=2))
    else:
        print(f"spent so far          epsilon {found.spent:.4f} at delta {budget.delta:g}")
        print(f"this study's training epsilon {planned.epsilon:.4f} at delta {planned.delta:g}")
        print(f"after it, all spent   epsilon {found.training:.4f} at delta {budget.delta:g}{_audits(study)}")
        if audit_cost(study).held_out:
            print(f"patients held out     epsilon {found.held_out:.4f} at delta {budget.delta:g}{_audits(study)}")
        print(f"budget                epsilon {budget.epsilon:g} at delta {budget.delta:g}")
        print("It fits." if fits else "It does not fit.")
    if not fits:
        raise OverBudget(
            f"The study would take the site to epsilon {found.after:.4f}, its budget is {budget.epsilon:g}.",
            "Plan a study with a smaller epsilon.",
        )


def _audits(study: StudyConfig) -> str:
    verdicts = sum(each.steps for each in audit_cost(study).training)
    return f", {verdicts} audit{'s' if verdicts > 1 else ''} included" if verdicts else ""


def spent_by(settings: SiteSettings, study: StudyConfig) -> Spent:
    """What the ledger holds for the patients whose images lie in the site's folder now, without reading the images."""
    book = open_ledger(settings.folder).read()  # refuses when there is none
    if not (settings.folder / cohort.KEY_NAME).exists():
        return Spent()
    patients = list_patients(settings.data, record_is_patient=settings.record_is_patient)
    if settings.patients is not None:
        patients = tuple(sorted(set(patients) & set(settings.patients)))
    key, contract = cohort.holdout_key(settings.folder), first_contract(settings.folder)
    share = holdout_share(contract or len(patients))
    held_out = {patient for patient in patients if cohort.is_held_out(key, patient, share)}
    sides = (sorted(set(patients) - held_out), sorted(held_out))
    data_sets = (data_set_of(ledger_key(key), settings.data, side) for side in sides)
    training, others = (book.histories(data_set.patients) for data_set in data_sets)
    return Spent(training, others, here=book.of_study(study.digest))


def _policy(folder: Path) -> tuple[Policy | None, str]:
    """The policy, or why there is none: what was spent can be shown without it."""
    try:
        return Policy.load(folder), ""
    except PolicyError as error:
        return None, error.message
