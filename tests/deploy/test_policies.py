import json
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from client import ledger
from client.data.cohort import holdout_key
from client.data.inventory import list_patients
from client.identity import pin_roster
from client.ledger import Ledger
from client.ledger_lines import Release, data_set_of, ledger_key
from client.policy import DataPolicy, Policy
from client.settings import SiteSettings
from common.config import StudyConfig
from common.errors import ConfigError, LedgerError, PolicyError, SiteError
from common.identity import load_identity, make_identity
from common.privacy.accounting import Budget, Mechanism
from common.privacy.plan import make_plan
from common.secagg.roster import Roster, make_roster
from deploy.phantoms import write_bids
from deploy.policies import check, init, study_digest, study_sign

MARKER = "Zebra-4711"


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 phantom patients."""
    (folder,) = write_bids(tmp_path_factory.mktemp("scans") / "all", sites=1, patients=25, seed=1, shape=(16, 16, 16))
    return folder


@pytest.fixture
def site(scans: Path, tmp_path: Path) -> Path:
    """A site with settings and a key, and nothing else."""
    folder = tmp_path / "north"
    SiteSettings.checked(name="north", data=scans, folder=folder).save()
    make_identity(folder)
    return folder


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A study of two sites and six steps, epsilon 2."""
    path = tmp_path / "study.toml"
    StudyConfig.model_validate(
        {
            "name": "lungs",
            "privacy": {"epsilon": 2.0, "delta": 1e-4, "sampling_probability": 0.25},
            "federation": {"rounds": 2, "local_steps": 3, "contracted_patients": {"north": 25, "south": 25}},
        }
    ).save(path)
    return path


def roster_of(site: Path) -> Roster:
    return make_roster({"north": load_identity(site).public_key().public_bytes_raw(), "south": b"s" * 32})


@pytest.fixture
def ready(site: Path, study: Path) -> Path:
    """A site that has a ledger, has pinned a roster, and allows the study and nothing more."""
    init(site, 2.0, 1e-4, 2, False)
    pin_roster(SiteSettings.load(site), roster_of(site))
    allow(site, study_digests=(StudyConfig.from_toml(study).digest,))
    return site


def allow(site: Path, **changes: object) -> None:
    Policy.checked(**Policy.load(site).model_dump() | changes).save(site)


# ---------------------------------------------------------------- policy init


def test_init_writes_a_policy_that_allows_no_study_and_an_empty_ledger(
    site: Path, scans: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init(site, 8.0, 1e-5, 3, False)
    policy = Policy.load(site)
    assert policy.data == (DataPolicy(folder=scans, epsilon=8.0, delta=1e-5, public=False),)
    assert (policy.minimum_cohort, policy.roster_digest) == (3, "")
    assert (policy.study_digests, policy.study_signers) == ((), ())
    assert (policy.algorithms, policy.outputs) == (("local", "joint", "moments"), ("masked_updates",))
    assert stat.S_IMODE((site / "policy.toml").stat().st_mode) == 0o600
    assert Ledger(site, b"").lines() == ()
    out = capsys.readouterr().out
    for words in (site / "policy.toml", site / "ledger.db", "synthward study digest", "synthward policy check"):
        assert str(words) in out


def test_init_keeps_the_roster_that_the_site_has_pinned(ready: Path) -> None:
    (ready / "policy.toml").unlink()
    init(ready, 2.0, 1e-4, 2, True)
    assert Policy.load(ready).roster_digest == roster_of(ready).digest
    assert Policy.load(ready).data[0].public


def test_init_never_replaces_a_policy_nor_a_ledger(ready: Path) -> None:
    before = (ready / "policy.toml").read_bytes()
    with pytest.raises(ConfigError, match="exists already"):
        init(ready, 1000.0, 1e-4, 2, False)
    assert (ready / "policy.toml").read_bytes() == before

    spend(ready, "another study", Mechanism(0.1, 3.0, 20))
    (ready / "policy.toml").unlink()
    init(ready, 2.0, 1e-4, 2, False)
    assert len(Ledger(ready, ledger_key(holdout_key(ready))).lines()) == 1


def test_init_needs_settings(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="site init"):
        init(tmp_path, 8.0, 1e-5, 2, False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("epsilon", "delta", "cohort", "key"),
    [(0.0, 1e-5, 2, "epsilon"), (float("inf"), 1e-5, 2, "epsilon"), (8.0, 1.0, 2, "delta"), (8.0, 1e-5, 1, "cohort")],
)
def test_a_wrong_value_writes_nothing(epsilon: float, delta: float, cohort: int, key: str, site: Path) -> None:
    before = sorted(site.iterdir())
    with pytest.raises(ConfigError, match=key):
        init(site, epsilon, delta, cohort, False)
    assert sorted(site.iterdir()) == before


def test_a_site_that_has_trained_without_a_ledger_gets_no_policy(site: Path) -> None:
    (site / "studies" / "0a").mkdir(parents=True)
    (site / "studies" / "0a" / "state.pt").touch()
    with pytest.raises(LedgerError):
        init(site, 8.0, 1e-5, 2, False)
    assert not (site / "policy.toml").exists()


# ---------------------------------------------------------------- policy check


def spend(site: Path, study_digest: str, mechanism: Mechanism, patients: int = 25) -> None:
    """Charge the first so many patients of the site."""
    settings, key = SiteSettings.load(site), ledger_key(holdout_key(site))
    data_set = data_set_of(key, settings.data, list_patients(settings.data)[:patients])
    release = Release(study_digest, "earlier", "run", 1, mechanism, 1.0)
    Ledger(site, key).charge(data_set, release, Budget(1000.0, 1e-4))


def rules_of(site: Path, study: Path, capsys: pytest.CaptureFixture[str], signature: Path | None = None) -> list[str]:
    """The rules that refuse, by ``--json``."""
    capsys.readouterr()
    try:
        check(site, study, signature, as_json=True)
        allowed = True
    except PolicyError as error:
        assert error.exit_status == 3
        allowed = False
    tree = json.loads(capsys.readouterr().out)
    assert tree["study"] == StudyConfig.from_toml(study).digest
    assert tree["allowed"] == allowed == all(rule["allowed"] for rule in tree["rules"])
    assert len(tree["rules"]) == 12
    return [rule["rule"] for rule in tree["rules"] if not rule["allowed"]]


def test_check_shows_every_rule_and_the_verdict(ready: Path, study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    check(ready, study, None, as_json=False)
    *rules, verdict = capsys.readouterr().out.splitlines()
    names = ["data", "study", "algorithm", "outputs", "cohort", "colluders", "roster", "patients"]
    names += ["sampling", "private", "delta"]
    assert [line.split()[:2] for line in rules] == [[name, "allowed"] for name in (*names, "budget")]
    assert verdict == "north and the study lungs: allowed"
    assert not (ready / "holdout.key").exists()  # asking makes nothing


def test_check_says_which_rules_refuse_and_why(ready: Path, study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    allow(ready, study_digests=(), minimum_patients=26)
    capsys.readouterr()
    with pytest.raises(PolicyError, match="lungs is refused, because of: study, patients"):
        check(ready, study, None, as_json=False)
    *rules, verdict = capsys.readouterr().out.splitlines()
    assert verdict.endswith("refused, because of: study, patients")
    refused = [line for line in rules if "REFUSED" in line]
    assert StudyConfig.from_toml(study).digest in refused[0]
    assert "26 patients or more; the study contracts 25" in refused[1]


def test_a_new_policy_refuses_every_study(site: Path, study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    init(site, 2.0, 1e-4, 2, False)
    assert rules_of(site, study, capsys) == ["study", "roster"]


def test_check_counts_what_was_spent(ready: Path, study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rules_of(ready, study, capsys) == []
    spend(ready, "0a" * 32, Mechanism(0.25, 1.0, 50), patients=1)  # on one of the 25 patients
    assert rules_of(ready, study, capsys) == ["budget"]


def test_steps_that_the_study_has_charged_are_not_counted_twice(
    ready: Path, study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read = StudyConfig.from_toml(study)
    plan = make_plan(read)
    assert plan is not None
    (planned,) = plan.history
    spend(ready, read.digest, replace(planned, steps=3))
    assert rules_of(ready, study, capsys) == []
    spend(ready, "0a" * 32, replace(planned, steps=3))
    assert rules_of(ready, study, capsys) == ["budget"]


def test_patients_outside_the_sites_list_do_not_count(
    ready: Path, scans: Path, study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spend(ready, "0a" * 32, Mechanism(0.25, 1.0, 50), patients=1)
    settings = SiteSettings.load(ready).model_copy(update={"patients": list_patients(scans)[1:]})
    settings.save()
    assert rules_of(ready, study, capsys) == []


def test_without_a_policy_or_a_ledger_there_is_no_verdict(
    ready: Path, study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    policy = (ready / "policy.toml").read_bytes()
    (ready / "policy.toml").unlink()
    with pytest.raises(PolicyError, match="policy init"):
        check(ready, study, None, as_json=False)
    (ready / "policy.toml").write_bytes(policy)
    spend(ready, "0a" * 32, Mechanism(0.1, 30.0, 1))
    (ready / ledger.HEAD_FILE).rename(ready / "head")
    with pytest.raises(LedgerError):
        check(ready, study, None, as_json=False)
    (ready / "head").rename(ready / ledger.HEAD_FILE)
    (ready / "holdout.key").unlink()  # a site whose key was lost has spent, and cannot tell on whom
    with pytest.raises(LedgerError):
        check(ready, study, None, as_json=False)
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------- study digest, study sign


def test_the_digest_is_the_one_that_a_policy_lists(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study_digest(study)
    assert capsys.readouterr().out == f"{StudyConfig.from_toml(study).digest}\n"


def test_a_signed_study_is_allowed_where_its_signer_is(
    ready: Path, study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_identity(tmp_path / "coordinator")
    study_sign(study, tmp_path / "coordinator/identity.key")
    public = load_identity(tmp_path / "coordinator").public_key().public_bytes_raw().hex()
    signature = tmp_path / "study.toml.sig"
    out = capsys.readouterr().out
    assert str(signature) in out and public in out
    assert len(bytes.fromhex(signature.read_text())) == 64

    allow(ready, study_digests=())
    assert rules_of(ready, study, capsys) == ["study"]
    allow(ready, study_signers=(public,))
    assert rules_of(ready, study, capsys) == []

    moved = signature.rename(tmp_path / "elsewhere")
    assert rules_of(ready, study, capsys) == ["study"]
    assert rules_of(ready, study, capsys, moved) == []

    StudyConfig.from_toml(study).with_changes("gan", latent_size=65).save(study)
    assert rules_of(ready, study, capsys, moved) == ["study"]


def test_a_cut_or_missing_signature_is_not_taken_for_one(
    ready: Path, study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    public = load_identity(ready).public_key().public_bytes_raw().hex()
    allow(ready, study_digests=(), study_signers=(public,))
    study_sign(study, ready / "identity.key")
    assert rules_of(ready, study, capsys) == []
    signature = tmp_path / "study.toml.sig"
    text = signature.read_text()
    signature.write_text(text[:126])
    assert rules_of(ready, study, capsys) == ["study"]
    for content in (text[:125].encode(), MARKER.encode(), b"\xff\xfe"):
        signature.write_bytes(content)
        with pytest.raises(ConfigError, match="is no signature") as caught:
            check(ready, study, None, as_json=True)
        assert MARKER not in str(caught.value)
    with pytest.raises(ConfigError, match="Cannot read the signature"):
        check(ready, study, tmp_path / "missing.sig", as_json=True)


def test_only_a_private_key_that_nobody_else_reads_signs(site: Path, study: Path) -> None:
    (site / "identity.key").chmod(0o640)
    for name, reason in (
        ("identity.key", "can be read by others"),
        ("missing", "Cannot read"),
        ("site.toml", "no Ed25519 private key"),
    ):
        with pytest.raises(ConfigError, match=reason):
            study_sign(study, site / name)
    (site / "identity.pub").chmod(0o600)
    with pytest.raises(ConfigError, match="no Ed25519 private key"):
        study_sign(study, site / "identity.pub")
    assert not study.with_name("study.toml.sig").exists()
