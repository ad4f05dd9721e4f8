"""A site checks, splits and prepares its data: once, the same way for every study, and never with another key."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client import enrolment
from client.data import cohort, slices
from client.data.inventory import list_patients
from client.decision import whole_cost
from client.enrolled import PREPARED, TRAINING, open_accountant, read_enrolled
from client.enrolment import CHECK_FILE, enrol, open_study, prepare_data
from client.identity import load_member, pin_roster
from client.ledger import Ledger
from client.ledger_lines import Release, data_set_of
from client.policy import Policy, set_roster_digest
from client.secure_round import SecureSite, advertise_keys
from client.settings import SiteSettings
from client.simulated import allow, policy_for, simulated_roster
from common.config import StudyConfig
from common.errors import ConfigError, OutOfOrder, OverBudget, PolicyError, PrivacyError, SiteError
from common.identity import make_identity, read_public
from common.messages import AdvertiseKeysRequest, Enrolment, EnrolRequest
from common.privacy.accounting import Budget, Mechanism, PureRelease
from common.secagg.roster import load_roster, make_roster
from deploy.phantoms import write_bids
from tests.client.secure_sites import allow_too
from tests.client.sites import ledger_key_of

PATIENTS = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    return write_bids(folder, sites=1, patients=PATIENTS, seed=3, shape=(24, 24, 24))[0]


@pytest.fixture
def site(data: Path, tmp_path: Path) -> SiteSettings:
    settings = SiteSettings(name="north", data=data, folder=tmp_path / "north")
    allow(settings, study_of(), make_roster({"north": bytes(32)}))
    return settings


def study_of(contract: int | None = PATIENTS, **privacy: float) -> StudyConfig:
    return StudyConfig.model_validate(
        {
            "image": {"size": 28},
            "privacy": privacy,
            "federation": {
                "contracted_patients": {} if contract is None else {"north": contract},
                "aggregation": "plain",
                "minimum_sites": 1,
            },
        }
    )


def secure_study() -> StudyConfig:
    contract = {"north": PATIENTS, "south": PATIENTS}
    return study_of().with_changes("federation", aggregation="secure", minimum_sites=2, contracted_patients=contract)


def joined(site: SiteSettings, study: StudyConfig) -> Enrolment:
    """Enrol, after the site's policy was made to allow the study, whatever it allowed before."""
    allow_too(site.folder, study)
    return enrol(site, study, EnrolRequest(study.digest, "run"))


def trained_on(site: SiteSettings, study: StudyConfig) -> set[str]:
    return set(open_study(site, study).cohort.patient_ids)


def test_enrolment_answers_with_public_facts_and_leaves_images_for_the_rounds(site: SiteSettings) -> None:
    study = study_of()
    answer = joined(site, study)
    assert answer.site == "north"
    assert answer.holdout_commitment == cohort.commitment(cohort.holdout_key(site.folder))
    at = open_study(site, study)
    assert at.num_patients == 17  # 24 patients, 0.3 held out: the contract, not what the coins gave
    assert 0 < at.cohort.num_patients < PATIENTS
    assert json.loads((site.folder / CHECK_FILE).read_text())["accepted_patients"] == PATIENTS


def test_data_that_stay_the_same_are_checked_once(site: SiteSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    # A simulation prepares without a contract and enrols with one: still the same data.
    assert prepare_data(site, study_of(None)) == PATIENTS
    monkeypatch.setattr(enrolment, "take_inventory", None)  # checking again would fail
    joined(site, study_of())
    joined(site.model_copy(update={"device": "cpu"}), study_of())


def test_no_study_trains_on_patients_that_another_held_out(site: SiteSettings) -> None:
    # A contract of 150 would hold out 0.2 instead of 0.3 with the same key, and so train on more patients.
    first, second = study_of(PATIENTS), study_of(150)
    joined(site, first)
    before = trained_on(site, first)
    joined(site, second)
    assert trained_on(site, first) == before == trained_on(site, second)


def test_patients_who_are_held_out_pay_for_no_training_and_stay_who_they_are(site: SiteSettings) -> None:
    """Whatever the study, its contract and its images: the two data sets of a site are the same for ever."""
    joined(site, study_of())
    first = open_study(site, study_of()).accountant
    assert first is not None and first.held_out is not None
    names = {False: set[str](), True: set[str]()}
    key = cohort.holdout_key(site.folder)
    for patient in list_patients(site.data):
        names[cohort.is_held_out(key, patient, 0.3)].add(patient)
    for data_set, side in ((first.data_set, names[False]), (first.held_out, names[True])):
        assert side and data_set.patients == data_set_of(ledger_key_of(site.folder), site.data, side).patients
    first.charge_round(1)
    first.charge_audit(first.study.audit_round)
    book = first.ledger.read()
    assert [len(history) for history in book.histories(first.data_set.patients)] == [2]
    assert book.histories(first.held_out.patients) == ((PureRelease(2.0),),)
    for other in (study_of(150), study_of().with_changes("image", size=32), study_of(epsilon=3.0)):
        joined(site, other)
        again = open_study(site, other).accountant
        assert again is not None
        assert (again.data_set, again.held_out) == (first.data_set, first.held_out)


def test_room_for_all_verdicts_is_asked_for_before_training(site: SiteSettings) -> None:
    """Training and verdicts of a study of three sites must fit together; what they cost is what a simulation allows."""
    contract = {name: PATIENTS for name in ("north", "south", "west")}
    study = study_of(epsilon=4.0).with_changes("federation", contracted_patients=contract)
    allow_too(site.folder, study)
    policy = Policy.load(site.folder)
    whole = whole_cost(study)
    assert 4.0 < whole <= 4.5
    assert policy_for(site, study, make_roster({"north": bytes(32)})).data[0].epsilon == whole
    for budget, fits in ((whole, True), (4.0, False)):
        data = policy.data[0].model_copy(update={"epsilon": budget, "delta": study.privacy.delta})
        policy.model_copy(update={"data": (data,)}).save(site.folder)
        if fits:
            enrol(site, study, EnrolRequest(study.digest))
        else:
            with pytest.raises(OverBudget, match="and its audit"):
                enrol(site, study, EnrolRequest(study.digest))


def test_each_study_keeps_the_images_it_enrolled_with(site: SiteSettings) -> None:
    small = study_of()
    large = small.with_changes("image", size=32)
    joined(site, small)
    joined(site, large)
    assert open_study(site, small).cohort.images.shape[2:] == (28, 28)
    assert open_study(site, large).cohort.images.shape[2:] == (32, 32)


def test_a_lost_key_stops_the_site(site: SiteSettings) -> None:
    joined(site, study_of())
    (site.folder / cohort.KEY_NAME).unlink()
    with pytest.raises(SiteError, match="key"):
        joined(site, study_of())
    assert not (site.folder / cohort.KEY_NAME).exists()


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"contracted_patients": null}'])
def test_a_damaged_first_contract_stops_the_site(content: bytes, site: SiteSettings) -> None:
    joined(site, study_of())
    (site.folder / "holdout.json").write_bytes(content)
    with pytest.raises(SiteError, match="would be trained on"):
        joined(site, study_of().with_changes("image", size=32))  # prepared anew
    assert (site.folder / "holdout.json").read_bytes() == content


def test_a_site_that_never_enrolled_does_not_train(site: SiteSettings) -> None:
    joined(site, study_of())
    with pytest.raises(SiteError, match="not enrolled"):
        open_study(site, study_of(epsilon=1.0))
    with pytest.raises(ConfigError, match="contract"):
        joined(site, study_of(None))


def test_too_few_patients_or_too_large_a_delta_are_refused(site: SiteSettings) -> None:
    few = study_of().with_changes("federation", minimum_patients=PATIENTS + 1)
    with pytest.raises(SiteError, match="25 patients"):
        prepare_data(site, few)
    # 1 / (10 x 24) is 0.0042; a contract of 11 patients would allow 0.0091. The contract decides, not what is found.
    with pytest.raises(PrivacyError, match="delta"):
        prepare_data(site, study_of(PATIENTS, delta=0.005))
    assert prepare_data(site, study_of(11, delta=0.005)) == PATIENTS


def test_what_fails_only_in_preparation_is_counted_as_refused(
    site: SiteSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = slices.prepare_image, []

    def background_once(image: object, image_size: int) -> list[np.ndarray]:
        seen.append(image)
        return [] if len(seen) == 1 else real(image, image_size)  # type: ignore[arg-type]

    monkeypatch.setattr(slices, "prepare_image", background_once)
    assert prepare_data(site, study_of()) == PATIENTS - 1
    known = json.loads((site.folder / CHECK_FILE).read_text())
    assert (known["accepted_records"], known["refused"]) == (PATIENTS - 1, {"no_usable_slice": 1})
    details = json.loads((site.folder / "refused.json").read_text())
    assert [refusal["code"] for refusal in details["refusals"]] == ["no_usable_slice"]


def test_what_a_site_writes_is_for_its_owner_only(site: SiteSettings) -> None:
    joined(site, study_of())
    public = {"roster.json"}
    files = [path for path in site.folder.rglob("*") if path.is_file() and path.name not in public]
    assert len(files) >= 10
    assert all(path.stat().st_mode & 0o077 == 0 for path in files)
    assert site.folder.stat().st_mode & 0o077 == 0
    assert (site.folder / PREPARED).is_dir() and TRAINING == "training"


# ---------------------------------------------------------------- what an enrolment says


def member(site: SiteSettings) -> SiteSettings:
    """The site as a member of a consortium of two: with a key, and the roster pinned."""
    pin_roster(site, simulated_roster({"north": site.folder, "south": site.folder.parent / "south"}))
    return site


def test_in_a_plain_study_a_site_needs_no_key(site: SiteSettings) -> None:
    answer = joined(site, study_of())
    assert (answer.history, answer.last_attempt, answer.identity, answer.roster_digest) == ((), 0, "", "")


def test_in_a_secure_study_a_site_shows_its_public_key_and_the_roster_it_pinned(site: SiteSettings) -> None:
    settings = member(site)
    answer = joined(settings, secure_study())
    assert bytes.fromhex(answer.identity) == read_public(site.folder / "identity.pub")
    assert (
        answer.roster_digest
        == load_roster(site.folder / "roster.json").digest
        == Policy.load(site.folder).roster_digest
    )
    assert (answer.history, answer.last_attempt) == ((), 0)


def charge(site: SiteSettings, study: StudyConfig, mechanism: Mechanism, patients: Iterable[str]) -> None:
    key = ledger_key_of(site.folder)
    data_set = data_set_of(key, site.data, patients)
    release = Release(study.digest, study.name, "run", 1, mechanism, 1.0)
    Ledger(site.folder, key).charge(data_set, release, Budget(100.0, 1e-5))


def test_an_enrolment_tells_what_this_study_and_what_others_have_charged(site: SiteSettings) -> None:
    study, other = study_of(), study_of(epsilon=4.0)
    charge(site, other, Mechanism(0.25, 9.0, 7), ["nobody of this data set"])
    first = joined(site, study)
    # Other studies count in full, so that what leaves does not depend on which patients they shared with this one.
    assert (first.history, first.earlier) == ((), (Mechanism(0.25, 9.0, 7),))
    spent = (Mechanism(0.25, 3.0, 10), Mechanism(0.25, 4.0, 5))
    for mechanism in spent:
        charge(site, study, mechanism, ["a"])
    again = joined(site, study)
    assert (again.history, again.earlier) == (spent, (Mechanism(0.25, 9.0, 7),))
    assert again.budget == Budget(100.0, 1e-5)


def test_patients_who_were_in_another_study_bring_their_lines_along(site: SiteSettings) -> None:
    """The budget is the patient's: a study of the same patients is refused where one of others is not."""
    study = study_of(epsilon=4.0)
    joined(site, study)
    key, patients = ledger_key_of(site.folder), open_study(site, study).accountant
    assert patients is not None
    strangers = data_set_of(key, site.data, ["stranger"])
    release = Release("other", "other", "run", 1, Mechanism(0.25, 1.0, 10), 1.0)
    for data_set, fits in ((strangers, True), (patients.data_set, False)):
        Ledger(site.folder, key).charge(data_set, release, Budget(100.0, 1e-5))
        policy = Policy.load(site.folder)
        policy.model_copy(update={"data": (policy.data[0].model_copy(update={"epsilon": 4.1}),)}).save(site.folder)
        if fits:
            enrol(site, study, EnrolRequest(study.digest))
        else:
            with pytest.raises(OverBudget, match="budget"):
                enrol(site, study, EnrolRequest(study.digest))


def test_the_same_patients_in_a_copied_folder_share_their_budget(site: SiteSettings, tmp_path: Path) -> None:
    study = study_of(epsilon=4.0)
    joined(site, study)
    first = open_study(site, study).accountant
    copy = tmp_path / "copied scans"
    shutil.copytree(site.data, copy)
    moved = site.model_copy(update={"data": copy})
    with pytest.raises(PolicyError, match="nowhere"):
        enrol(moved, study, EnrolRequest(study.digest))
    policy = Policy.load(site.folder)
    policy.model_copy(update={"data": (policy.data[0].model_copy(update={"folder": copy}),)}).save(site.folder)
    enrol(moved, study, EnrolRequest(study.digest))
    second = open_study(moved, study).accountant
    assert first is not None and second is not None
    assert first.data_set.digest == second.data_set.digest and first.data_set.folder != second.data_set.folder


def test_settings_that_name_other_data_after_enrolment_stop_the_site(site: SiteSettings, tmp_path: Path) -> None:
    """Their folder may have another budget, and the images at hand are still those of the first one."""
    study = study_of()
    joined(site, study)
    copy = tmp_path / "other scans"
    shutil.copytree(site.data, copy)
    policy = Policy.load(site.folder)
    wide = policy.data[0].model_copy(update={"folder": copy, "epsilon": 500.0})
    policy.model_copy(update={"data": (*policy.data, wide)}).save(site.folder)
    for changes in ({"data": copy}, {"record_is_patient": True}, {"patients": ("sub-synth1",)}):
        with pytest.raises(SiteError, match="others than it enrolled with"):
            open_study(site.model_copy(update=changes), study)
    moved = site.model_copy(update={"data": copy})
    enrol(moved, study, EnrolRequest(study.digest))
    account = open_study(moved, study).accountant
    assert account is not None and (account.budget.epsilon, account.data_set.folder) == (500.0, str(copy))


def test_fewer_patients_than_the_policy_asks_for_are_refused_whatever_the_contract_says(site: SiteSettings) -> None:
    study = study_of(150)
    allow_too(site.folder, study, minimum_patients=PATIENTS + 1)
    with pytest.raises(PolicyError, match="found 24"):
        enrol(site, study, EnrolRequest(study.digest))
    allow_too(site.folder, study, minimum_patients=PATIENTS)
    enrol(site, study, EnrolRequest(study.digest))


def test_each_enrolment_has_its_own_images_though_another_prepares_at_the_same_time(
    site: SiteSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = study_of()
    large = small.with_changes("image", size=32)
    for study in (small, large):
        allow_too(site.folder, study)
    check = enrolment._checked_data

    def overtaken(settings: SiteSettings, study: StudyConfig) -> dict[str, Any]:
        known = check(settings, study)
        check(settings, large)
        return known

    monkeypatch.setattr(enrolment, "_checked_data", overtaken)
    enrol(site, small, EnrolRequest(small.digest))
    assert open_study(site, small).cohort.images.shape[2:] == (28, 28)


def test_an_enrolment_tells_the_newest_attempt_that_the_site_served(site: SiteSettings) -> None:
    """The server begins after it: an attempt is never served twice, also when the server forgets."""
    study, settings = secure_study(), member(site)
    joined(settings, study)
    at = SecureSite(
        study,
        load_member(settings, Policy.load(settings.folder)),
        settings.study_folder(study.digest),
        lambda: open_accountant(settings, study, read_enrolled(settings, study)),
    )
    for number in (3, 8):
        advertise_keys(at, AdvertiseKeysRequest(study.digest, number, 1))
        assert joined(settings, study).last_attempt == number
    with pytest.raises(OutOfOrder):
        advertise_keys(at, AdvertiseKeysRequest(study.digest, 8, 1))
    assert joined(settings, study.with_changes("", seed=1)).last_attempt == 0  # of this study


def spoil(settings: SiteSettings, how: str) -> SiteSettings:
    key, roster = settings.folder / "identity.key", settings.folder / "roster.json"
    match how:
        case "no key":
            key.unlink()
        case "a key that others can read":
            key.chmod(0o644)
        case "another key":
            key.unlink()
            make_identity(settings.folder)
        case "no roster":
            roster.unlink()
        case "no roster pinned":
            set_roster_digest(settings.folder, "")
        case "another roster than the pinned one":
            sites = dict(load_roster(roster).sites)
            make_roster({**sites, "west": bytes(32)}).save(roster)
        case "a roster without this site":
            sites = dict(load_roster(roster).sites)
            pin_roster(settings, make_roster({"south": sites["south"]}))
    return settings


@pytest.mark.parametrize(
    "how",
    [
        "no key",
        "a key that others can read",
        "another key",
        "no roster",
        "no roster pinned",
        "another roster than the pinned one",
        "a roster without this site",
    ],
)
def test_without_its_key_and_the_pinned_roster_a_site_refuses_before_it_reads_data(
    how: str, site: SiteSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow_too(site.folder, secure_study())
    settings = spoil(member(site), how)
    monkeypatch.setattr(enrolment, "take_inventory", None)  # reading the data would fail in another way
    with pytest.raises(PolicyError if how == "no roster pinned" else SiteError):
        enrol(settings, secure_study(), EnrolRequest(secure_study().digest))
    assert not (site.folder / CHECK_FILE).exists() and not (site.folder / PREPARED).exists()


def test_two_studies_with_other_encodings_are_two_studies(site: SiteSettings) -> None:
    """So that no attempt, charge or update of one counts in the other."""
    first = secure_study()
    second = first.with_changes("secure_aggregation", fraction_bits=12)
    assert site.study_folder(first.digest) != site.study_folder(second.digest)
