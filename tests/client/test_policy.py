import os
import re
import stat
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from client.decision import Rule, Spent, decide, refuse_unless_allowed, rest_of, whole_cost
from client.policy import FILE_NAME, DataPolicy, Policy, set_roster_digest
from client.settings import SiteSettings
from common.config import StudyConfig
from common.errors import ConfigError, OverBudget, PolicyError
from common.privacy.accounting import Budget, History, Mechanism, PureRelease, epsilon
from common.privacy.plan import make_plan
from common.study_signature import sign

MARKER = "Zebra-4711"
RULES = [
    "data", "study", "algorithm", "outputs", "cohort", "colluders", "roster", "patients", "sampling", "private",
    "delta", "budget",
]  # fmt: skip
SCANS = Path("/srv/scans")
SETTINGS = SiteSettings(name="north", data=SCANS, folder=Path("/srv/north"))
STUDY = StudyConfig.model_validate(
    {
        "name": "lungs",
        "privacy": {"epsilon": 2.0, "delta": 1e-4, "sampling_probability": 0.25},
        "federation": {"rounds": 2, "local_steps": 3, "contracted_patients": {"north": 100, "south": 50, "west": 50}},
    }
)
SIGNER = Ed25519PrivateKey.from_private_bytes(b"s" * 32)
SIGNER_KEY = SIGNER.public_key().public_bytes_raw().hex()
DIGEST = "5a" * 32


def policy_of(**changes: Any) -> Policy:
    """A policy that allows the study with nothing to spare."""
    keys: dict[str, Any] = {
        "roster_digest": DIGEST,
        "minimum_cohort": 3,
        "study_digests": (STUDY.digest,),
        "study_signers": (),
        "algorithms": ("local",),
        "outputs": ("masked_updates",),
        "largest_sampling_probability": 0.25,
        "minimum_patients": 100,
        "data": (data_of(),),
    }
    return Policy(**(keys | changes))


def data_of(**changes: Any) -> DataPolicy:
    """Training for 2.0 and one verdict of 0.5 are 2.397 together, with other phases up to 2.46."""
    return DataPolicy(**({"folder": SCANS, "epsilon": 2.46, "delta": 1e-4} | changes))


def refused(
    policy: Policy,
    study: StudyConfig = STUDY,
    *,
    settings: SiteSettings = SETTINGS,
    signature: bytes = b"",
    histories: Sequence[History] | None = ((),),
    held_out: Sequence[History] = ((),),
    spent_here: History = (),
) -> list[str]:
    """Names of the rules that refuse. Every answer lists all rules, each with a sentence."""
    spent = None if histories is None else Spent(tuple(histories), tuple(held_out), spent_here)
    rules = decide(policy, settings, study, signature, spent)
    assert [rule.name for rule in rules] == RULES
    assert all(rule.why.endswith(".") for rule in rules)
    return [rule.name for rule in rules if not rule.allowed]


def rule_of(name: str, policy: Policy, study: StudyConfig = STUDY, histories: Sequence[History] = ((),)) -> Rule:
    rules = decide(policy, SETTINGS, study, b"", Spent(tuple(histories)))
    return next(rule for rule in rules if rule.name == name)


# ---------------------------------------------------------------- each rule


def test_a_policy_that_allows_a_study_with_nothing_to_spare() -> None:
    assert refused(policy_of()) == []
    refuse_unless_allowed(decide(policy_of(), SETTINGS, STUDY, b"", Spent()))


def test_a_policy_that_lists_nothing_allows_nothing() -> None:
    empty = Policy(minimum_cohort=2, largest_sampling_probability=1.0, minimum_patients=1)
    assert refused(empty) == ["data", "study", "algorithm", "outputs", "roster", "delta", "budget"]
    for nothing, rules in (
        ({"data": ()}, ["data", "delta", "budget"]),
        ({"study_digests": ()}, ["study"]),
        ({"algorithms": ()}, ["algorithm"]),
        ({"outputs": ()}, ["outputs"]),
    ):
        assert refused(policy_of(**nothing)) == rules


def test_only_a_listed_folder_may_be_used_not_one_inside_or_around_it() -> None:
    for folder in ("/srv/scans/2024", "/srv", "/srv/scans-2"):
        other = SETTINGS.model_copy(update={"data": Path(folder)})
        assert refused(policy_of(), settings=other) == ["data", "delta", "budget"]


def test_a_folder_is_the_same_under_another_name(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "scans")
    policy = policy_of(data=(data_of(folder=tmp_path / "scans"),))
    assert refused(policy, settings=SETTINGS.model_copy(update={"data": tmp_path / "link"})) == []
    assert refused(policy, settings=SETTINGS.model_copy(update={"data": tmp_path / "x" / ".." / "scans"})) == []


def test_a_folder_that_is_listed_twice_has_no_budget() -> None:
    policy = policy_of(data=(data_of(), data_of(folder="/srv/x/../scans", epsilon=1000.0, public=True)))
    assert refused(policy) == ["data", "delta", "budget"]
    with pytest.raises(PolicyError, match="more than once"):
        policy.budget_of(SCANS)


def test_budget_of_a_folder() -> None:
    policy = policy_of(data=(data_of(folder="/srv/other", epsilon=7.0), data_of()))
    assert policy.budget_of(SCANS) == Budget(2.46, 1e-4)
    assert policy.budget_of(Path("/srv/other")) == Budget(7.0, 1e-4)
    with pytest.raises(PolicyError, match="nowhere"):
        policy.budget_of(Path("/srv"))


def test_a_study_is_allowed_by_its_digest_or_by_its_signer() -> None:
    signed = sign(SIGNER, STUDY.digest)
    by_signer = policy_of(study_digests=(), study_signers=(DIGEST, SIGNER_KEY))
    assert refused(by_signer, signature=signed) == []
    assert refused(by_signer) == ["study"]
    assert refused(policy_of(study_digests=(DIGEST, STUDY.digest)), signature=b"no signature") == []
    changed = STUDY.with_changes("gan", latent_size=65)
    assert refused(policy_of(), changed) == ["study"]
    assert refused(by_signer, changed, signature=signed) == ["study"]


@pytest.mark.parametrize(
    "signature",
    [
        pytest.param(sign(SIGNER, "0" * 64), id="another study's"),
        pytest.param(sign(Ed25519PrivateKey.generate(), STUDY.digest), id="another signer's"),
        pytest.param(sign(SIGNER, STUDY.digest)[:-1], id="truncated"),
        pytest.param(bytes([sign(SIGNER, STUDY.digest)[0] ^ 1]) + sign(SIGNER, STUDY.digest)[1:], id="one bit"),
    ],
)
def test_a_wrong_signature_allows_nothing(signature: bytes) -> None:
    assert refused(policy_of(study_digests=(), study_signers=(SIGNER_KEY,)), signature=signature) == ["study"]


def test_plain_updates_leave_only_where_they_are_allowed_and_need_no_cohort() -> None:
    plain = STUDY.with_changes("federation", aggregation="plain")
    listed = {"study_digests": (plain.digest,)}
    assert refused(policy_of(**listed), plain) == ["outputs"]
    alone = policy_of(**listed, outputs=("plain_updates",), roster_digest="", minimum_cohort=9)
    assert refused(alone, plain) == []
    assert refused(alone.model_copy(update={"study_digests": (STUDY.digest,)})) == ["outputs", "cohort", "roster"]


def test_the_contract_has_enough_sites_for_a_sum() -> None:
    assert refused(policy_of(minimum_cohort=4)) == ["cohort"]
    assert refused(policy_of(minimum_cohort=2)) == []


def test_a_secure_sum_needs_a_pinned_roster() -> None:
    assert refused(policy_of(roster_digest="")) == ["roster"]


def test_this_site_has_enough_patients() -> None:
    assert refused(policy_of(minimum_patients=101)) == ["patients"]
    assert refused(policy_of(minimum_patients=1)) == []
    east = SETTINGS.model_copy(update={"name": "east"})
    assert refused(policy_of(minimum_patients=1), settings=east) == ["patients", "delta"]


def test_patients_are_not_drawn_too_often() -> None:
    assert refused(policy_of(largest_sampling_probability=0.2499)) == ["sampling"]
    assert refused(policy_of(largest_sampling_probability=1.0)) == []


def test_training_without_privacy_is_for_public_data_only() -> None:
    open_study = STUDY.with_changes("privacy", enabled=False)
    listed = {"study_digests": (open_study.digest,)}
    assert refused(policy_of(**listed), open_study) == ["private", "budget"]
    assert refused(policy_of(**listed, data=(data_of(epsilon=1e300),)), open_study) == ["private", "budget"]
    public = policy_of(**listed, data=(data_of(public=True, delta=0.9),))
    everything = (Mechanism(1.0, 0.1, 10**6),)
    assert refused(public, open_study, histories=(everything,)) == []
    assert rule_of("budget", public, open_study).why == "Public data: nothing is spent."
    elsewhere = policy_of(**listed, data=(data_of(), data_of(folder="/srv/published", public=True)))
    assert refused(elsewhere, open_study) == ["private", "budget"]


def test_public_data_have_a_budget_all_the_same_when_a_study_is_private() -> None:
    assert refused(policy_of(data=(data_of(public=True, epsilon=1.9),))) == ["budget"]


def test_delta_suits_the_number_of_patients_in_study_and_budget() -> None:
    # 100 contracted patients: 1 / (10 * 100) = 1e-3 at most.
    at_most = STUDY.with_changes("privacy", delta=1e-3)
    above = STUDY.with_changes("privacy", delta=1.01e-3)
    assert refused(policy_of(study_digests=(at_most.digest,), data=(data_of(epsilon=9.0),)), at_most) == []
    assert refused(policy_of(study_digests=(above.digest,), data=(data_of(epsilon=9.0),)), above) == ["delta"]
    assert refused(policy_of(data=(data_of(delta=1e-3),))) == []
    assert refused(policy_of(data=(data_of(delta=1.01e-3),))) == ["delta"]


# ---------------------------------------------------------------- phases


def phases_of(*algorithms: str, **privacy: Any) -> StudyConfig:
    """The study with a phase of each algorithm, of equal shares."""
    phases = [
        {"algorithm": name, "share": 1 / len(algorithms), "steps": 1 + 2 * (name != "moments")} for name in algorithms
    ]
    tree = STUDY.model_dump() | {"privacy": STUDY.privacy.model_dump() | privacy}
    tree["federation"] = {"contracted_patients": STUDY.federation.contracted_patients, "phase": phases}
    return StudyConfig.model_validate(tree)


def allowing(study: StudyConfig, **changes: Any) -> Policy:
    return policy_of(study_digests=(study.digest,), **changes)


@pytest.mark.parametrize(
    ("phases", "allowed", "expected"),
    [
        (("moments",), ("moments",), []),
        (("moments", "joint", "moments"), ("joint", "moments"), []),
        (("moments", "local"), ("local", "joint", "moments"), []),
        (("moments", "local"), ("local",), ["algorithm"]),
        (("local", "joint"), ("local", "moments"), ["algorithm"]),
        (("moments",), (), ["algorithm"]),
    ],
)
def test_every_algorithm_of_a_study_is_allowed_or_none(
    phases: tuple[str, ...], allowed: tuple[str, ...], expected: list[str]
) -> None:
    study = phases_of(*phases)
    assert refused(allowing(study, algorithms=allowed), study) == expected


def test_the_algorithms_are_named_once_each() -> None:
    study = phases_of("moments", "joint", "moments")
    rule = rule_of("algorithm", allowing(study, algorithms=("local", "joint")), study)
    assert (rule.allowed, rule.why) == (
        False, "The policy allows local and joint; the study uses moments and joint."
    )  # fmt: skip


@pytest.mark.parametrize(
    ("phases", "aggregation", "colluding", "expected"),
    [
        (("moments",), "secure", 2, ["colluders"]),
        (("local", "joint"), "secure", 2, ["colluders"]),
        (("moments",), "secure", 1, []),
        (("joint",), "secure", 0, []),
        (("local",), "secure", 2, []),  # every site makes all of its noise
        (("joint",), "plain", 2, []),
    ],
)
def test_where_sites_share_the_noise_enough_of_them_may_tell_theirs(
    phases: tuple[str, ...], aggregation: str, colluding: int, expected: list[str]
) -> None:
    """The study's noise holds though one other site tells the server its part."""
    study = phases_of(*phases).with_changes("federation", aggregation=aggregation)
    outputs = ("masked_updates", "plain_updates")
    assert refused(allowing(study, algorithms=phases, outputs=outputs, colluding_sites=colluding), study) == expected


def test_how_often_patients_are_drawn_is_not_asked_of_moments_alone() -> None:
    """They are of all patients, with the noise for that; a study that also trains draws them."""
    strict = {"algorithms": ("local", "joint", "moments"), "largest_sampling_probability": 0.1}
    alone, mixed = phases_of("moments", "moments"), phases_of("moments", "joint")
    assert refused(allowing(alone, **strict), alone) == []
    assert "Not asked" in rule_of("sampling", allowing(alone, **strict), alone).why
    assert refused(allowing(mixed, **strict), mixed) == ["sampling"]
    assert refused(allowing(mixed, **strict | {"largest_sampling_probability": 0.25}), mixed) == []


def test_the_budget_is_for_all_phases_together() -> None:
    study = phases_of("moments", "local")
    both = {"algorithms": ("local", "moments")}
    assert refused(allowing(study, **both, data=(data_of(epsilon=2.41),)), study) == []
    assert refused(allowing(study, **both, data=(data_of(epsilon=2.4),)), study) == ["budget"]


def test_what_is_left_of_the_phases_is_what_a_study_still_costs() -> None:
    study = phases_of("moments", "local")
    plan = make_plan(study)
    assert plan is not None
    release, training = plan.history
    verdict, held_out = PureRelease(0.5), (PureRelease(2.0),)
    assert rest_of(study, ()) == ((release, training, verdict), held_out)
    assert rest_of(study, (release,)) == ((training, verdict), held_out)
    assert rest_of(study, (release, replace(training, steps=2))) == ((replace(training, steps=1), verdict), held_out)
    assert rest_of(study, (release, training)) == ((verdict,), held_out)
    assert rest_of(study, (release, training, verdict)) == ((), ())
    both = allowing(study, algorithms=("local", "moments"))
    for spent in ((release,), (release, replace(training, steps=1)), plan.history):
        assert refused(both, study, histories=(spent,), spent_here=spent) == []
        assert refused(both, study, histories=(spent,)) == ["budget"]  # as if another study had made the same


# ---------------------------------------------------------------- the budget


def steps_of(study: StudyConfig, steps: int) -> Mechanism:
    """What a study charges for some of its steps."""
    plan = make_plan(study)
    assert plan is not None
    (planned,) = plan.history
    return replace(planned, steps=steps)


EARLIER = (Mechanism(0.1, 3.0, 20),)


def test_a_study_of_exactly_the_budget_fits_and_a_larger_one_does_not() -> None:
    assert refused(policy_of(data=(data_of(epsilon=2.4),))) == []
    assert refused(policy_of(data=(data_of(epsilon=2.39),))) == ["budget"]
    assert refused(policy_of(data=(data_of(delta=1e-5),))) == ["budget"]  # more epsilon at a smaller delta


def test_earlier_studies_use_up_the_budget() -> None:
    assert refused(policy_of(), histories=(EARLIER,)) == ["budget"]
    wider = policy_of(data=(data_of(epsilon=2.5),))
    assert refused(wider, histories=(EARLIER,)) == []
    assert refused(wider, histories=(EARLIER, (*EARLIER, Mechanism(0.2, 1.0, 30)))) == ["budget"]


def test_the_budget_holds_for_every_group_of_patients() -> None:
    heavy = (Mechanism(0.5, 0.8, 50),)
    for histories in (((), heavy), (heavy, ())):
        assert refused(policy_of(), histories=histories) == ["budget"]


def test_steps_that_this_study_has_charged_are_not_paid_twice() -> None:
    spent = (steps_of(STUDY, 3),)
    assert refused(policy_of(), histories=(spent,), spent_here=spent) == []
    assert refused(policy_of(), histories=(spent,)) == ["budget"]  # as if another study had made the same steps
    everything = (steps_of(STUDY, 6),)
    assert refused(policy_of(), histories=(everything,), spent_here=everything) == []
    assert refused(policy_of(data=(data_of(epsilon=1.5),)), histories=(everything,), spent_here=everything) == [
        "budget"
    ]


def test_the_budget_is_not_asked_where_no_history_is_given_and_all_else_is() -> None:
    tiny = policy_of(data=(data_of(epsilon=0.01),))
    assert refused(tiny) == ["budget"]
    assert refused(tiny, histories=None) == []
    assert refused(tiny.model_copy(update={"study_digests": ()}), histories=None) == ["study"]
    assert refused(policy_of(data=()), histories=None) == ["data", "delta", "budget"]


@pytest.mark.parametrize("audited", [True, False])
def test_the_budget_says_what_is_spent_and_what_it_would_be(audited: bool) -> None:
    study = STUDY if audited else small(STUDY)
    spent, verdict = (steps_of(study, 3),), (PureRelease(0.5),) * audited
    for budget, histories in ((2.46, ((),)), (0.5, (spent,))):
        why = rule_of("budget", policy_of(data=(data_of(epsilon=budget),)), study, histories).why
        then = (
            r" and its audit it would be (.*), or 2 for patients that are held out\."
            if audited
            else r" it would be (.*)\."
        )
        found = re.fullmatch(
            rf"The policy allows epsilon {budget:g} at delta 0.0001 for any patient; (.*) is spent, "
            rf"and with the rest of the study{then}",
            why,
        )
        assert found, why
        before = max(epsilon(history, 1e-4) for history in histories)
        after = max(epsilon((*history, steps_of(study, 6), *verdict), 1e-4) for history in histories)
        # Four digits, never below the figure.
        assert before <= float(found[1]) <= before * 1.001
        assert after <= float(found[2]) <= after * 1.001


# ---------------------------------------------------------------- the audit


def small(study: StudyConfig) -> StudyConfig:
    """The study with two sites: too few for an audit's sum."""
    return study.with_changes("federation", contracted_patients={"north": 100, "south": 50})


def audited(**changes: Any) -> StudyConfig:
    return STUDY.with_changes("audit", **changes)


def budget_of(epsilon: float, **changes: Any) -> Policy:
    return policy_of(study_digests=(changes.pop("study", STUDY).digest,), data=(data_of(epsilon=epsilon, **changes),))


def test_a_study_of_two_sites_plans_no_verdict() -> None:
    study = small(STUDY)
    assert rest_of(study, ()) == ((steps_of(study, 6),), ())
    policy = budget_of(2.0, study=study).model_copy(update={"minimum_cohort": 2})
    assert refused(policy, study) == []
    assert whole_cost(study) == 2.0


def test_what_is_left_of_the_verdicts_is_still_to_be_paid_by_both_sides() -> None:
    study = audited(verdicts=3, epsilon_training=0.25, epsilon_held_out=1.0)
    steps = steps_of(study, 6)
    assert rest_of(study, ()) == ((steps, PureRelease(0.25, 3)), (PureRelease(1.0, 3),))
    assert rest_of(study, (steps, PureRelease(0.25, 1))) == ((PureRelease(0.25, 2),), (PureRelease(1.0, 2),))
    assert rest_of(study, (steps, PureRelease(0.25, 3))) == ((), ())


def test_all_planned_verdicts_must_fit_beside_the_training() -> None:
    for verdicts in (1, 2, 3):
        study = audited(verdicts=verdicts, epsilon_held_out=0.1)
        whole = epsilon((steps_of(study, 6), PureRelease(0.5, verdicts)), 1e-4)
        assert refused(budget_of(whole, study=study), study) == []
        assert refused(budget_of(whole - 0.001, study=study), study) == ["budget"]


def test_patients_held_out_pay_for_the_verdicts_and_for_nothing_else() -> None:
    study = audited(verdicts=2, epsilon_held_out=4.0)  # 8.0, where training and its verdicts are 2.8
    assert refused(budget_of(8.0, study=study), study) == []
    assert refused(budget_of(7.99, study=study), study) == ["budget"]
    earlier = (PureRelease(0.5),)
    assert refused(budget_of(8.0, study=study), study, held_out=((), earlier)) == ["budget"]
    assert refused(budget_of(8.5, study=study), study, held_out=((), earlier)) == []
    spent = (PureRelease(0.5),)  # one of the study's own two verdicts
    assert refused(budget_of(8.0, study=study), study, held_out=((PureRelease(4.0),),), spent_here=spent) == []


@pytest.mark.parametrize(("verdicts", "held_out"), [(1, 0.1), (1, 2.0), (3, 0.1), (3, 2.0)])
def test_the_whole_cost_is_the_smallest_budget_of_four_digits(verdicts: int, held_out: float) -> None:
    study = audited(verdicts=verdicts, epsilon_held_out=held_out)
    whole = whole_cost(study)
    assert refused(budget_of(whole, study=study), study) == []
    assert refused(budget_of(whole - 0.001, study=study), study) == ["budget"]


def test_a_study_without_privacy_pays_for_no_verdict() -> None:
    study = STUDY.with_changes("privacy", enabled=False)
    assert rest_of(study, ()) == ((), ())
    assert whole_cost(study) == 2.0


# ---------------------------------------------------------------- check


def test_check_names_every_rule_that_refuses() -> None:
    with pytest.raises(PolicyError) as caught:
        refuse_unless_allowed(decide(policy_of(study_digests=(), minimum_cohort=5), SETTINGS, STUDY, b"", Spent()))
    assert "(study)" in caught.value.message and "(cohort)" in caught.value.message
    assert "(roster)" not in caught.value.message
    assert caught.value.exit_status == 3


def test_over_budget_is_said_only_when_nothing_else_refuses() -> None:
    with pytest.raises(OverBudget, match=r"\(budget\)"):
        refuse_unless_allowed(decide(policy_of(), SETTINGS, STUDY, b"", Spent((EARLIER,))))
    with pytest.raises(PolicyError, match=r"\(study\).*\(budget\)"):
        refuse_unless_allowed(decide(policy_of(study_digests=()), SETTINGS, STUDY, b"", Spent((EARLIER,))))


def test_check_pays_no_step_twice_either() -> None:
    spent = (steps_of(STUDY, 3),)
    refuse_unless_allowed(decide(policy_of(), SETTINGS, STUDY, b"", Spent((spent,), here=spent)))
    with pytest.raises(OverBudget):
        refuse_unless_allowed(decide(policy_of(), SETTINGS, STUDY, b"", Spent((spent,))))


# ---------------------------------------------------------------- the file


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site's folder with a policy."""
    folder = tmp_path / "site"
    folder.mkdir(mode=0o700)
    policy_of().save(folder)
    return folder


hex64s = st.text("0123456789abcdef", min_size=64, max_size=64)
folders = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30).map(
    lambda text: Path("/") / text
)
data_policies = st.builds(
    DataPolicy,
    folder=folders,
    epsilon=st.floats(0, exclude_min=True, allow_infinity=False),
    delta=st.floats(0, 1, exclude_min=True, exclude_max=True),
    public=st.booleans(),
)


def tuples(values: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(values, max_size=3).map(tuple)


policies = st.builds(
    Policy,
    roster_digest=st.just("") | hex64s,
    minimum_cohort=st.integers(2, 10**6),
    colluding_sites=st.integers(0, 10**6),
    study_digests=tuples(hex64s),
    study_signers=tuples(hex64s),
    algorithms=tuples(st.sampled_from(["local", "joint", "moments"])),
    outputs=tuples(st.sampled_from(["masked_updates", "plain_updates"])),
    largest_sampling_probability=st.floats(0, 1, exclude_min=True),
    minimum_patients=st.integers(1, 10**9),
    data=tuples(data_policies),
)


@hypothesis_settings(max_examples=150, deadline=None)
@given(policy=policies)
def test_a_saved_policy_is_read_back(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("site")
    policy.save(folder)
    assert Policy.load(folder) == policy


@hypothesis_settings(max_examples=50, deadline=None)
@given(policy=policies, digest=hex64s)
def test_pinning_changes_the_roster_alone(
    policy: Policy, digest: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("site")
    policy.save(folder)
    set_roster_digest(folder, digest)
    assert Policy.load(folder) == policy.model_copy(update={"roster_digest": digest})


def test_the_file_is_for_its_owner_and_explains_every_key(site: Path) -> None:
    assert stat.S_IMODE((site / FILE_NAME).stat().st_mode) == 0o600
    lines = (site / FILE_NAME).read_text().splitlines()
    for key in Policy.model_fields.keys() - {"data"}:
        (number,) = [n for n, line in enumerate(lines) if line.startswith(f"{key} = ")]
        assert lines[number - 1].startswith("# "), key
    for key in DataPolicy.model_fields:
        assert any(line.startswith(f"#   {key} ") for line in lines), key
    assert max(map(len, lines)) <= 120


def test_a_file_without_data_blocks_lists_no_data(site: Path) -> None:
    text = (site / FILE_NAME).read_text()
    (site / FILE_NAME).write_text(text[: text.index("\n[[data]]")])
    assert Policy.load(site).data == ()


def test_whole_numbers_are_epsilons_too(site: Path) -> None:
    text = (site / FILE_NAME).read_text()
    (site / FILE_NAME).write_text(text.replace("epsilon = 2.46", "epsilon = 2"))
    assert Policy.load(site) == policy_of(data=(data_of(epsilon=2.0),))


def test_without_a_file_nothing_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="Cannot read.*No such file.*allows nothing.*policy init"):
        Policy.load(tmp_path)


def test_a_file_that_cannot_be_read_is_refused(site: Path) -> None:
    (site / FILE_NAME).chmod(0)
    if os.access(site / FILE_NAME, os.R_OK):
        pytest.skip("THIS TEST DID NOT RUN: the superuser reads every file")
    with pytest.raises(PolicyError, match="Cannot read.*Permission denied"):
        Policy.load(site)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a" / FILE_NAME).mkdir(parents=True)
    (tmp_path / "b").mkdir()
    os.mkfifo(tmp_path / "b" / FILE_NAME)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / FILE_NAME).symlink_to(tmp_path / "missing")
    for name, reason in (("a", "Cannot read.*Is a directory"), ("b", "no file"), ("c", "Cannot read")):
        with pytest.raises(PolicyError, match=reason):
            Policy.load(tmp_path / name)


@pytest.mark.parametrize("mode", [0o602, 0o646, 0o666, 0o777])
def test_a_file_that_everyone_may_write_is_refused(mode: int, site: Path) -> None:
    (site / FILE_NAME).chmod(mode)
    with pytest.raises(PolicyError, match=f"Everyone may write .*{FILE_NAME}.*chmod o-w"):
        Policy.load(site)


@pytest.mark.parametrize("mode", [0o702, 0o777, 0o1777])
def test_a_folder_that_everyone_may_write_is_refused(mode: int, site: Path) -> None:
    site.chmod(mode)
    with pytest.raises(PolicyError, match="Everyone may write .*site, so"):
        Policy.load(site)


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o644, 0o660])
def test_owner_and_group_may_write_and_everyone_may_read(mode: int, site: Path) -> None:
    (site / FILE_NAME).chmod(mode)
    site.chmod(0o775)
    assert Policy.load(site) == policy_of()


@pytest.fixture
def linked(site: Path, tmp_path: Path) -> Path:
    """A site whose policy is a link to a file that somebody else keeps."""
    kept = tmp_path / "kept"
    kept.mkdir(mode=0o700)
    (site / FILE_NAME).rename(kept / "north.toml")
    (site / FILE_NAME).symlink_to(kept / "north.toml")
    return kept


def test_a_link_is_followed(linked: Path, site: Path) -> None:
    assert Policy.load(site) == policy_of()
    set_roster_digest(site, "0b" * 32)
    assert (site / FILE_NAME).is_symlink()
    assert "0b" * 32 in (linked / "north.toml").read_text()


def test_what_a_link_leads_to_is_judged_as_well(linked: Path, site: Path) -> None:
    linked.chmod(0o777)
    with pytest.raises(PolicyError, match="Everyone may write .*kept, so"):
        Policy.load(site)
    linked.chmod(0o700)
    (linked / "north.toml").chmod(0o606)
    with pytest.raises(PolicyError, match="Everyone may write"):
        Policy.load(site)
    (linked / "north.toml").chmod(0o600)
    site.chmod(0o777)  # where the link could be replaced
    with pytest.raises(PolicyError, match="Everyone may write .*site, so"):
        Policy.load(site)


@pytest.mark.parametrize("content", [b"minimum_cohort = ", b"\xff\xfe", b"minimum_cohort = 2\nminimum_cohort = 3\n"])
def test_what_is_not_toml_is_refused(content: bytes, site: Path) -> None:
    (site / FILE_NAME).write_bytes(content)
    with pytest.raises(PolicyError, match="is not TOML"):
        Policy.load(site)


def test_an_empty_file_is_no_policy(site: Path) -> None:
    (site / FILE_NAME).write_bytes(b"")
    with pytest.raises(PolicyError, match="minimum_cohort: the key is missing"):
        Policy.load(site)


@pytest.mark.parametrize(
    ("line", "wrong", "found"),
    [
        ("minimum_cohort = 3", f'minimum_cohort = 3\ncolour = "{MARKER}"', "colour: no such key"),
        ("minimum_cohort = 3", "", "minimum_cohort: the key is missing"),
        ("minimum_cohort = 3", "minimum_cohort = 1", "minimum_cohort"),  # the sum over one site is its update
        ("minimum_cohort = 3", f'minimum_cohort = "{MARKER}"', "minimum_cohort"),
        ("minimum_cohort = 3", "minimum_cohort = true", "minimum_cohort"),
        ("minimum_cohort = 3", "minimum_cohort = 2.5", "minimum_cohort"),
        (f'"{DIGEST}"', f'"{MARKER}"', "roster_digest"),
        (f'"{DIGEST}"', f'"{DIGEST[2:]}"', "roster_digest"),
        (f'"{DIGEST}"', f'"{DIGEST.upper()}"', "roster_digest"),
        (f'"{DIGEST}"', f'"{DIGEST}\\n"', "roster_digest"),
        ("study_signers = []", f'study_signers = ["{MARKER}"]', r"study_signers \(number 1\)"),
        ("study_signers = []", f'study_signers = "{DIGEST}"', "study_signers"),
        ('algorithms = ["local"]', f'algorithms = ["local", "{MARKER}"]', r"algorithms \(number 2\)"),
        ('outputs = ["masked_updates"]', f'outputs = ["{MARKER}"]', "outputs"),
        ("largest_sampling_probability = 0.25", "largest_sampling_probability = 0", "largest_sampling_probability"),
        ("largest_sampling_probability = 0.25", "largest_sampling_probability = 1.1", "largest_sampling_probability"),
        ("minimum_patients = 100", "minimum_patients = 0", "minimum_patients"),
        ("epsilon = 2.46", "epsilon = 0", r"data \(number 1\) epsilon"),
        ("epsilon = 2.46", "epsilon = inf", "epsilon"),
        ("epsilon = 2.46", "epsilon = nan", "epsilon"),
        ("epsilon = 2.46", 'epsilon = "2.0"', "epsilon"),
        ("epsilon = 2.46", "", r"data \(number 1\) epsilon: the key is missing"),
        ("delta = 0.0001", "delta = 1", "delta"),
        ("delta = 0.0001", "delta = 0", "delta"),
        ("public = false", 'public = "yes"', "public"),
        ("public = false", "public = 1", "public"),
        ("public = false", f'public = false\n"{MARKER[:5]}" = "{MARKER}"', "Zebra: no such key"),
        ('"/srv/scans"', f'"{MARKER}/scans"', "folder: must be a whole path that begins with /"),
        ('"/srv/scans"', f'"/{MARKER}\\u0000"', "folder"),
    ],
)
def test_a_wrong_key_is_named_and_its_value_is_not_printed(line: str, wrong: str, found: str, site: Path) -> None:
    text = (site / FILE_NAME).read_text()
    assert text.count(line) == 1
    (site / FILE_NAME).write_text(text.replace(line, wrong))
    with pytest.raises(PolicyError, match=found) as caught:
        Policy.load(site)
    assert MARKER not in str(caught.value) and "5a5a" not in str(caught.value).lower()


def test_a_name_that_is_not_utf_8_is_no_folder_of_a_policy() -> None:
    with pytest.raises(ConfigError, match="UTF-8"):
        Policy.checked(**policy_of().model_dump() | {"data": ({**data_of().model_dump(), "folder": Path("/a\udcff")},)})


def test_checked_names_the_wrong_keys_without_values() -> None:
    with pytest.raises(ConfigError, match="minimum_cohort") as caught:
        Policy.checked(**policy_of().model_dump() | {"minimum_cohort": MARKER})
    assert MARKER not in str(caught.value)
    assert Policy.checked(**policy_of().model_dump()) == policy_of()


# ---------------------------------------------------------------- pinning a roster


def test_pinning_keeps_every_other_sign_of_the_file(site: Path) -> None:
    text = (site / FILE_NAME).read_text()
    text = text.replace(f'"{DIGEST}"', f"'{DIGEST}'   # compared with Ms Ito by telephone").replace("\n", "\r\n")
    text += "# a last remark, é"
    (site / FILE_NAME).write_bytes(text.encode())
    (site / FILE_NAME).chmod(0o640)
    set_roster_digest(site, "0b" * 32)
    after = (site / FILE_NAME).read_bytes().decode()
    assert after == text.replace(f"'{DIGEST}'", f'"{"0b" * 32}"')
    assert stat.S_IMODE((site / FILE_NAME).stat().st_mode) == 0o640


@pytest.mark.parametrize(
    "lines",
    ["", f'"roster_digest" = "{DIGEST}"', f'roster_digest = """{DIGEST}"""'],
)
def test_pinning_needs_the_one_line(lines: str, site: Path) -> None:
    text = (site / FILE_NAME).read_text().replace(f'roster_digest = "{DIGEST}"', lines)
    (site / FILE_NAME).write_text(text)
    with pytest.raises(PolicyError, match="exactly one line"):
        set_roster_digest(site, "0b" * 32)
    assert (site / FILE_NAME).read_text() == text


def test_pinning_is_not_led_astray_by_text_that_looks_like_the_line(site: Path) -> None:
    folder = f'"""/srv/scans\nroster_digest = "{DIGEST}"\n"""'
    text = (site / FILE_NAME).read_text().replace(f'roster_digest = "{DIGEST}"\n', "").replace('"/srv/scans"', folder)
    assert tomllib.loads(text)["data"][0]["folder"].startswith("/srv/scans\nroster_digest")
    (site / FILE_NAME).write_text(text)
    with pytest.raises(PolicyError, match="exactly one line"):
        set_roster_digest(site, "0b" * 32)
    assert (site / FILE_NAME).read_text() == text


def test_only_a_digest_can_be_pinned_and_only_in_a_policy_that_can_be_trusted(site: Path) -> None:
    before = (site / FILE_NAME).read_bytes()
    with pytest.raises(ConfigError, match="digest"):
        set_roster_digest(site, MARKER)
    site.chmod(0o777)
    with pytest.raises(PolicyError, match="Everyone"):
        set_roster_digest(site, "0b" * 32)
    assert (site / FILE_NAME).read_bytes() == before
    with pytest.raises(PolicyError, match="Cannot read"):
        set_roster_digest(site / "none", "0b" * 32)


def test_why_names_what_can_be_pasted_into_the_policy() -> None:
    assert STUDY.digest in rule_of("study", policy_of(study_digests=())).why
    assert str(SCANS) in rule_of("data", policy_of(data=())).why
