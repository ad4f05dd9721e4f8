"""What a site's policy says to a study: every rule, allowed or refused, and why.

**Guarantee.** A decision depends on the policy's file, the site's settings, the study and what the site has spent; no
message from the server can widen it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context
from pathlib import Path

from client.policy import FILE_NAME, DataPolicy, Output, Policy
from client.settings import SiteSettings
from common import study_signature
from common.config import StudyConfig
from common.errors import OverBudget, PolicyError, PrivacyError
from common.privacy.accounting import History, epsilon, num_steps, of_audits
from common.privacy.plan import audit_cost, check_delta, make_plan

_NO_SUM = "Not asked: the study makes no secure sum."
_OUTPUT_OF: dict[str, Output] = {"secure": "masked_updates", "plain": "plain_updates"}


@dataclass(frozen=True)
class Rule:
    """One rule's answer to a study: ``why`` says what the policy says and what the study wants. For the site's eyes."""

    name: str
    allowed: bool
    why: str


@dataclass(frozen=True)
class Spent:
    """What a site's ledger holds for the patients of a study.

    Args:
        training: on those that it trains on: one history for each group of them with the same lines, this study's
            included.
        held_out: the same of those that it holds out.
        here: the part of ``training`` that is this study's: it need not be paid for again.
    """

    training: tuple[History, ...] = ((),)
    held_out: tuple[History, ...] = ((),)
    here: History = ()


@dataclass(frozen=True)
class Outlook:
    """Epsilons of the patient on whom most is spent: now, and when all is charged that a study has planned.

    Args:
        spent: now, on whichever side.
        training: then, of those that are trained on: the rounds and the audit's verdicts.
        held_out: then, of those that are held out: the verdicts.
    """

    spent: float
    training: float
    held_out: float

    @property
    def after(self) -> float:
        """Then, on whichever side."""
        return max(self.training, self.held_out)


def outlook(study: StudyConfig, spent: Spent, delta: float) -> Outlook:
    """What a study would take a site to.

    Args:
        study: with its contract.
        spent: what the site's ledger holds.
        delta: of the site's budget.

    Raises:
        ConfigError: no noise gives what the study promises.
    """
    training, held_out = rest_of(study, spent.here)
    return Outlook(
        max(epsilon(history, delta) for history in (*spent.training, *spent.held_out)),
        max(epsilon((*history, *training), delta) for history in spent.training),
        max(epsilon((*history, *held_out), delta) for history in spent.held_out),
    )


def rest_of(study: StudyConfig, spent_here: History) -> tuple[History, History]:
    """What the study has planned and not yet charged here: patients that it trains on, and those that it holds out."""
    plan = make_plan(study)
    if plan is None:
        return (), ()
    audit = audit_cost(study).left(num_steps(of_audits(spent_here)))
    return (*plan.left(spent_here), *audit.training), audit.held_out


def whole_cost(study: StudyConfig) -> float:
    """The smallest budget, to four digits, under which a patient can take part in all of a study, its audit included.

    The study's own epsilon where nothing comes on top of it; so it is without privacy.
    """
    privacy = study.privacy
    if not audit_cost(study).training:
        return privacy.epsilon
    return max(privacy.epsilon, rounded_up(outlook(study, Spent(), privacy.delta).after))


def rounded_up(value: float) -> float:
    """Four digits: no figure looks smaller than it is."""
    return float(Context(prec=4, rounding=ROUND_CEILING).create_decimal_from_float(value))


def decide(
    policy: Policy, settings: SiteSettings, study: StudyConfig, signature: bytes, spent: Spent | None
) -> tuple[Rule, ...]:
    """What every rule of the policy says to a study: always all rules, in one order. All must allow it.

    Args:
        policy: the site's.
        settings: the site's.
        study: what is asked.
        signature: on the study; empty for none.
        spent: what the ledger holds for the site's patients. None not to ask about the budget, which every charge is
            measured by.

    Raises:
        ConfigError: no noise gives what the study promises: nothing that a policy could decide.
    """
    data = _listed(policy, settings.data)
    return (
        _data_rule(policy, settings),
        _study_rule(policy, study, signature),
        _algorithm_rule(policy, study),
        _outputs_rule(policy, study),
        _cohort_rule(policy, study),
        _colluders_rule(policy, study),
        _roster_rule(policy, study),
        _patients_rule(policy, settings, study),
        _sampling_rule(policy, study),
        _private_rule(data, study),
        _delta_rule(data, settings, study),
        _budget_rule(data, study, spent),
    )


def refuse_unless_allowed(rules: Sequence[Rule]) -> None:
    """Raise when a rule refuses.

    Args:
        rules: from ``decide``.

    Raises:
        OverBudget: only the budget refuses.
        PolicyError: other rules refuse; all of them are named.
    """
    refused = [rule for rule in rules if not rule.allowed]
    if not refused:
        return
    error = OverBudget if [rule.name for rule in refused] == ["budget"] else PolicyError
    raise error(
        f"This site's policy refuses the study: {' '.join(f'({rule.name}) {rule.why}' for rule in refused)}",
        f"`synthward policy check` explains; only the site changes its {FILE_NAME}.",
    )


def _listed(policy: Policy, folder: Path) -> DataPolicy | None:
    try:
        return policy.data_of(folder)
    except PolicyError:
        return None


def _data_rule(policy: Policy, settings: SiteSettings) -> Rule:
    try:
        policy.data_of(settings.data)
    except PolicyError as error:
        return Rule("data", False, error.message)
    return Rule("data", True, f"The policy lists the folder {settings.data}.")


def _study_rule(policy: Policy, study: StudyConfig, signature: bytes) -> Rule:
    if study.digest in policy.study_digests:
        return Rule("study", True, f"The policy lists the study's digest {study.digest}.")
    for signer in policy.study_signers:
        if study_signature.is_signed(bytes.fromhex(signer), study.digest, signature):
            return Rule("study", True, f"The policy lists the key {signer}, which has signed the study.")
    signed = "its signature is of no key that the policy lists" if signature else "it comes without a signature"
    return Rule("study", False, f"The policy does not list the study's digest {study.digest}, and {signed}.")


def _algorithm_rule(policy: Policy, study: StudyConfig) -> Rule:
    wanted = list(dict.fromkeys(phase.algorithm for phase in study.phases))
    why = f"The policy allows {_all(policy.algorithms)}; the study uses {_all(wanted)}."
    return Rule("algorithm", set(wanted) <= set(policy.algorithms), why)


def _outputs_rule(policy: Policy, study: StudyConfig) -> Rule:
    wanted = _OUTPUT_OF[study.federation.aggregation]
    why = f"The policy allows {_all(policy.outputs)} to leave; the study wants {wanted}."
    return Rule("outputs", wanted in policy.outputs, why)


def _cohort_rule(policy: Policy, study: StudyConfig) -> Rule:
    if study.federation.aggregation != "secure":
        return Rule("cohort", True, _NO_SUM)
    sites, smallest = len(study.federation.contracted_patients), study.federation.minimum_sites
    why = (
        f"The policy asks for sums over {policy.minimum_cohort} sites or more; the study has {sites}, and would go on "
        f"with {smallest}: this site refuses each sum over too few."
    )
    return Rule("cohort", sites >= policy.minimum_cohort, why)


def _colluders_rule(policy: Policy, study: StudyConfig) -> Rule:
    shared = study.privacy.enabled and study.federation.aggregation == "secure"
    if not shared or all(phase.algorithm == "local" for phase in study.phases):
        return Rule("colluders", True, "Not asked: every site makes all of its noise.")
    wanted, found = policy.colluding_sites, study.privacy.colluding_sites
    why = (
        f"The policy asks for noise that protects though {wanted} other sites tell theirs; "
        f"the study's does though {found} do."
    )
    return Rule("colluders", found >= wanted, why)


def _roster_rule(policy: Policy, study: StudyConfig) -> Rule:
    if study.federation.aggregation != "secure":
        return Rule("roster", True, _NO_SUM)
    if not policy.roster_digest:
        return Rule("roster", False, "The policy has pinned no roster; the study's secure sum needs one.")
    return Rule("roster", True, f"The policy has pinned the roster {policy.roster_digest}.")


def _patients_rule(policy: Policy, settings: SiteSettings, study: StudyConfig) -> Rule:
    patients = study.federation.contracted_patients.get(settings.name)
    if patients is None:
        return Rule("patients", False, f"The study has no contracted number of patients for {settings.name}.")
    why = f"The policy asks for {policy.minimum_patients} patients or more; the study contracts {patients} here."
    return Rule("patients", patients >= policy.minimum_patients, why)


def _sampling_rule(policy: Policy, study: StudyConfig) -> Rule:
    if all(phase.algorithm == "moments" for phase in study.phases):
        return Rule("sampling", True, "Not asked: moments are of all patients, with the noise for that.")
    wanted, largest = study.privacy.sampling_probability, policy.largest_sampling_probability
    why = f"The policy allows a sampling probability of {largest:.6g} at most; the study wants {wanted:.6g}."
    return Rule("sampling", wanted <= largest, why)


def _private_rule(data: DataPolicy | None, study: StudyConfig) -> Rule:
    if study.privacy.enabled:
        return Rule("private", True, "The study trains with differential privacy.")
    public = data is not None and data.public
    says = "says" if public else "does not say"
    why = f"The study trains without differential privacy; the policy {says} that the data are public."
    return Rule("private", public, why)


def _delta_rule(data: DataPolicy | None, settings: SiteSettings, study: StudyConfig) -> Rule:
    if not study.privacy.enabled:
        return Rule("delta", True, "Not asked: the study trains without differential privacy.")
    patients = study.federation.contracted_patients.get(settings.name)
    if patients is None or data is None:
        return Rule("delta", False, "Cannot be told without a listed folder and a contracted number of patients.")
    why = (
        f"For {patients} patients delta may be {1 / (10 * patients):.6g} at most; "
        f"the study has {study.privacy.delta:.6g}, the policy's budget {data.delta:.6g}."
    )
    try:
        check_delta(max(study.privacy.delta, data.delta), patients)
    except PrivacyError:
        return Rule("delta", False, why)
    return Rule("delta", True, why)


def _budget_rule(data: DataPolicy | None, study: StudyConfig, spent: Spent | None) -> Rule:
    if data is None:
        return Rule("budget", False, "The policy has no budget for this folder.")
    if not study.privacy.enabled:
        why = "Public data: nothing is spent." if data.public else "No budget covers training without privacy."
        return Rule("budget", data.public, why)
    allows = f"The policy allows epsilon {data.epsilon:.6g} at delta {data.delta:.6g} for any patient"
    if spent is None:
        return Rule("budget", True, f"{allows}; every charge is measured by it.")
    found = outlook(study, spent, data.delta)
    why = f"{allows}; {_figure(found.spent)} is spent, and with the rest of the study"
    if audit_cost(study).training:
        why += (
            f" and its audit it would be {_figure(found.training)}, or {_figure(found.held_out)} for patients that are "
            "held out."
        )
    else:
        why += f" it would be {_figure(found.training)}."
    return Rule("budget", found.after <= data.epsilon, why)


def _all(names: Sequence[str]) -> str:
    return " and ".join(names) or "nothing"


def _figure(value: float) -> str:
    return f"{rounded_up(value):g}"
