"""A site checks, splits and prepares its data: once, the same way for every study, and never with another key."""

import json
from pathlib import Path

import numpy as np
import pytest

from client import enrolment
from client.accountant import SiteAccountant
from client.data import cohort, slices
from client.enrolment import CHECK_FILE, PREPARED, TRAINING, enrol, open_study, prepare_data
from client.identity import load_member, make_identity, pin_roster, read_public, simulated_roster
from client.secure_round import SecureSite, advertise_keys
from client.settings import SiteSettings
from common.config import StudyConfig
from common.errors import ConfigError, OutOfOrder, PrivacyError, SiteError
from common.messages import AdvertiseKeysRequest
from common.privacy.accounting import Mechanism
from common.secagg.roster import load_roster, make_roster
from deploy.phantoms import write_bids

PATIENTS = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    return write_bids(folder, sites=1, patients=PATIENTS, seed=3, shape=(24, 24, 24))[0]


@pytest.fixture
def site(data: Path, tmp_path: Path) -> SiteSettings:
    settings = SiteSettings(name="north", data=data, folder=tmp_path / "north")
    settings.save()
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
    return study_of().with_changes("federation", aggregation="secure", minimum_sites=2)


def trained_on(site: SiteSettings, study: StudyConfig) -> set[str]:
    return set(open_study(site, study).cohort.patient_ids)


def test_enrolment_answers_with_public_facts_and_leaves_images_for_the_rounds(site: SiteSettings) -> None:
    study = study_of()
    answer = enrol(site, study)
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
    enrol(site, study_of())
    enrol(site.model_copy(update={"device": "cpu"}), study_of())


def test_no_study_trains_on_patients_that_another_held_out(site: SiteSettings) -> None:
    # A contract of 150 would hold out 0.2 instead of 0.3 with the same key, and so train on more patients.
    first, second = study_of(PATIENTS), study_of(150)
    enrol(site, first)
    before = trained_on(site, first)
    enrol(site, second)
    assert trained_on(site, first) == before == trained_on(site, second)


def test_each_study_keeps_the_images_it_enrolled_with(site: SiteSettings) -> None:
    small = study_of()
    large = small.with_changes("image", size=32)
    enrol(site, small)
    enrol(site, large)
    assert open_study(site, small).cohort.images.shape[2:] == (28, 28)
    assert open_study(site, large).cohort.images.shape[2:] == (32, 32)


def test_a_lost_key_stops_the_site(site: SiteSettings) -> None:
    enrol(site, study_of())
    (site.folder / cohort.KEY_NAME).unlink()
    with pytest.raises(SiteError, match="key"):
        enrol(site, study_of())
    assert not (site.folder / cohort.KEY_NAME).exists()


def test_a_site_that_never_enrolled_does_not_train(site: SiteSettings) -> None:
    enrol(site, study_of())
    with pytest.raises(SiteError, match="not enrolled"):
        open_study(site, study_of(epsilon=1.0))
    with pytest.raises(ConfigError, match="contract"):
        enrol(site, study_of(None))


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
    enrol(site, study_of())
    files = [path for path in site.folder.rglob("*") if path.is_file()]
    assert len(files) >= 8
    assert all(path.stat().st_mode & 0o077 == 0 for path in files)
    assert site.folder.stat().st_mode & 0o077 == 0
    assert (site.folder / PREPARED).is_dir() and TRAINING == "training"


# ---------------------------------------------------------------- what an enrolment says


def member(site: SiteSettings) -> SiteSettings:
    """The site as a member of a consortium of two: with a key, and the roster pinned."""
    return pin_roster(site, simulated_roster({"north": site.folder, "south": site.folder.parent / "south"}))


def test_in_a_plain_study_a_site_needs_no_key(site: SiteSettings) -> None:
    answer = enrol(site, study_of())
    assert (answer.history, answer.last_attempt, answer.identity, answer.roster_digest) == ((), 0, "", "")


def test_in_a_secure_study_a_site_shows_its_public_key_and_the_roster_it_pinned(site: SiteSettings) -> None:
    settings = member(site)
    answer = enrol(settings, secure_study())
    assert bytes.fromhex(answer.identity) == read_public(site.folder / "identity.pub")
    assert answer.roster_digest == load_roster(site.folder / "roster.json").digest == settings.roster_digest
    assert (answer.history, answer.last_attempt) == ((), 0)


def test_an_enrolment_tells_what_the_site_has_charged_for_this_study(site: SiteSettings) -> None:
    study, other = study_of(), study_of(epsilon=4.0)
    SiteAccountant(site.study_folder(other.digest), other.digest).charge(Mechanism(0.25, 9.0, 7))
    assert enrol(site, study).history == ()
    spent = (Mechanism(0.25, 3.0, 10), Mechanism(0.25, 4.0, 5))
    for mechanism in spent:
        SiteAccountant(site.study_folder(study.digest), study.digest).charge(mechanism)
    assert enrol(site, study).history == spent


def test_an_enrolment_tells_the_newest_attempt_that_the_site_served(site: SiteSettings) -> None:
    """The server begins after it: an attempt is never served twice, also when the server forgets."""
    study, settings = secure_study(), member(site)
    enrol(settings, study)
    at = SecureSite(study, load_member(settings), settings.study_folder(study.digest))
    for number in (3, 8):
        advertise_keys(at, AdvertiseKeysRequest(study.digest, number))
        assert enrol(settings, study).last_attempt == number
    with pytest.raises(OutOfOrder):
        advertise_keys(at, AdvertiseKeysRequest(study.digest, 8))
    assert enrol(settings, study.with_changes("", seed=1)).last_attempt == 0  # of this study


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
            return settings.model_copy(update={"roster_digest": ""})
        case "another roster than the pinned one":
            sites = dict(load_roster(roster).sites)
            make_roster({**sites, "west": bytes(32)}).save(roster)
        case "a roster without this site":
            sites = dict(load_roster(roster).sites)
            return pin_roster(settings, make_roster({"south": sites["south"]}))
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
    settings = spoil(member(site), how)
    monkeypatch.setattr(enrolment, "take_inventory", None)  # reading the data would fail in another way
    with pytest.raises(SiteError):
        enrol(settings, secure_study())
    assert not (site.folder / CHECK_FILE).exists() and not (site.folder / PREPARED).exists()


def test_two_studies_with_other_encodings_are_two_studies(site: SiteSettings) -> None:
    """So that no attempt, charge or update of one counts in the other."""
    first = secure_study()
    second = first.with_changes("secure_aggregation", fraction_bits=12)
    assert site.study_folder(first.digest) != site.study_folder(second.digest)
