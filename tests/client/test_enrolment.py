"""A site checks, splits and prepares its data: once, the same way for every study, and never with another key."""

import json
from pathlib import Path

import numpy as np
import pytest

from client import enrolment
from client.data import cohort, slices
from client.enrolment import CHECK_FILE, PREPARED, TRAINING, enrol, open_study, prepare_data
from client.settings import SiteSettings
from common.config import StudyConfig
from common.errors import ConfigError, PrivacyError, SiteError
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
            "federation": {"contracted_patients": {} if contract is None else {"north": contract}},
        }
    )


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
