"""Canaries: who they are, which of them are trained on, and that nobody counts them as patients."""

import hashlib
import hmac
import os
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client import joint
from client.data.canaries import Canaries, canaries_of, canary_key, is_included
from client.data.cohort import KEY_NAME, holdout_key
from client.data.slices import PreparedCohort
from client.enrolment import enrol, open_study
from client.joint import joint_step
from client.ledger import Ledger
from client.moments import release_moments
from client.patient_sum import patient_sum
from client.real_half import real_half
from client.settings import SiteSettings
from client.simulated import allow
from client.training import SiteStudy, draw, train_round
from common.canaries import num_canaries
from common.config import StudyConfig
from common.errors import ConfigError, SiteError
from common.gan.training import GanTrainer, RealBatch
from common.messages import Enrolment, EnrolRequest
from common.secagg.roster import make_roster
from deploy.phantoms import write_bids
from tests.client.phased_sites import (
    JOINT,
    MOMENTS,
    PHASES,
    feature_map_of,
    kill_before,
    killed,
    moments_request,
    step_request,
)
from tests.client.secure_sites import allow_too
from tests.client.sites import KEY, ledger_key_of, request_of, study_of
from tests.common.gan.trainers import CPU

PATIENTS, CONTRACT = 24, 2000
ASSIGNED = 32  # 2 % of 1600 training patients


def contract_of(**sites: int) -> dict[str, Any]:
    return {"contracted_patients": sites}


def large_study(canaries: int = 128, **tables: dict[str, Any]) -> StudyConfig:
    """A contract of far more patients than the site has in these tests: it decides how many canaries there are."""
    federation = {"aggregation": "plain", "minimum_sites": 1, **contract_of(north=CONTRACT)}
    return study_of(
        federation={**federation, **tables.pop("federation", {})},
        audit={"canaries": canaries},
        image={"size": 28, "label_column": "group", "labels": ["healthy", "lesion"]},
        **tables,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    return write_bids(folder, sites=1, patients=PATIENTS, seed=3, shape=(24, 24, 24))[0]


@pytest.fixture
def site(data: Path, tmp_path: Path) -> SiteSettings:
    settings = SiteSettings(name="north", data=data, folder=tmp_path / "north", device="cpu")
    allow(settings, large_study(), make_roster({"north": bytes(32)}))
    return settings


def joined(site: SiteSettings, study: StudyConfig) -> Enrolment:
    allow_too(site.folder, study, algorithms=("local", "joint", "moments"))
    return enrol(site, study, EnrolRequest(study.digest, "run"))


def opened(site: SiteSettings, study: StudyConfig) -> tuple[SiteStudy, Canaries]:
    joined(site, study)
    return open_study(site, study), canaries_of(site, study)


def pictures(images: np.ndarray) -> set[bytes]:
    """Images that can be looked for among others, whether prepared or drawn."""
    if images.dtype == np.float32:
        images = np.rint((images + 1) * 127.5).astype(np.uint8)
    return {np.ascontiguousarray(image).tobytes() for image in images}


def groups(canaries: Canaries) -> tuple[set[bytes], set[bytes]]:
    """The pictures of those included, and of those left out; some of each."""
    included, left_out = (pictures(canaries.images[chosen]) for chosen in (canaries.included, ~canaries.included))
    assert len(included) + len(left_out) == ASSIGNED and included and left_out
    return included, left_out


def kept_files(site: SiteSettings) -> list[Path]:
    return sorted(site.folder.rglob("canaries*"))


# ---------------------------------------------------------------- how many


def test_shares_by_hand() -> None:
    # Trained on are 0.8 of 1000 and of 500, and 0.7 of 40: 800, 400 and 28, together 1228.
    contract = contract_of(large=1000, middle=500, small=40)
    few = study_of(federation=contract, audit={"canaries": 10})
    assert [num_canaries(few, name) for name in ("large", "middle", "small")] == [6, 3, 0]  # 6.5, 3.3, 0.2
    many = study_of(federation=contract, audit={"canaries": 4096})
    assert [num_canaries(many, name) for name in ("large", "middle", "small")] == [16, 8, 0]  # 2 % of each
    assert num_canaries(study_of(federation=contract, audit={"canaries": 0}), "large") == 0
    with pytest.raises(ConfigError, match="contracted number"):
        num_canaries(few, "west")


@pytest.mark.parametrize(("contract", "most"), [(70, 0), (71, 1), (125, 1), (149, 2), (150, 2), (187, 3)])
def test_a_site_has_at_most_one_canary_in_fifty_training_patients(contract: int, most: int) -> None:
    # 0.7 of 70 is 49; of 71, rounded, 50; of 149, 104. 0.8 of 150 is 120; of 187, rounded, 150.
    study = study_of(federation=contract_of(north=contract), audit={"canaries": 4096})
    assert num_canaries(study, "north") == most


@given(
    st.dictionaries(st.sampled_from(["a", "b", "c", "d", "e"]), st.integers(1, 10**6), min_size=2),
    st.integers(0, 4096),
)
def test_all_shares_together_keep_to_the_study_and_to_each_site(contract: dict[str, int], canaries: int) -> None:
    study = study_of(federation=contract_of(**contract), audit={"canaries": canaries})
    shares = {name: num_canaries(study, name) for name in contract}
    assert sum(shares.values()) <= canaries
    for name, share in shares.items():
        assert 0 <= 50 * share <= study.contracted_split(name)[0]


# ---------------------------------------------------------------- the coins


def test_a_coin_by_hand() -> None:
    study = large_study()
    own = hmac.new(KEY, f"synthward canaries {study.digest}".encode(), hashlib.sha256).digest()
    assert canary_key(KEY, study) == own
    for number in range(20):
        coin = int.from_bytes(hmac.new(own, f"included {number}".encode(), hashlib.sha256).digest(), "big")
        assert is_included(own, number) == (coin / 2**256 < 0.5)


def test_coins_are_fair_and_those_of_other_studies_and_keys_are_others() -> None:
    keys = [canary_key(KEY, large_study()), canary_key(KEY, large_study(127)), canary_key(bytes(32), large_study())]
    coins = np.array([[is_included(key, number) for number in range(4096)] for key in keys])
    for heads in (*coins, coins[0] ^ coins[1], coins[0] ^ coins[2], coins[0, :-1] ^ coins[0, 1:]):
        assert abs(heads.sum() - len(heads) / 2) < 5 * np.sqrt(len(heads)) / 2


# ---------------------------------------------------------------- who they are


def test_canaries_are_pictures_of_the_studys_kind_for_the_owners_eyes(site: SiteSettings) -> None:
    study = large_study()
    _, canaries = opened(site, study)
    assert canaries.images.shape == (ASSIGNED, 1, 28, 28) and canaries.images.dtype == np.uint8
    assert canaries.starts.tolist() == list(range(ASSIGNED + 1))
    assert set(canaries.label_indices.tolist()) == {0, 1}
    assert canaries.included.shape == (ASSIGNED,) and canaries.included.dtype == np.bool_
    groups(canaries)  # all are different
    assert (np.ptp(canaries.images, axis=(1, 2, 3)) > 200).all()
    (path,) = kept_files(site)
    assert path.parent == site.study_folder(study.digest)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_canaries_stay_the_same_whatever_becomes_of_their_file_or_the_patients(
    site: SiteSettings, tmp_path: Path
) -> None:
    study = large_study()
    holdout_key(site.folder)
    first = canaries_of(site, study)
    kept = np.array(first.images)
    (path,) = kept_files(site)
    written = path.stat().st_mtime_ns

    def assert_the_same(of: SiteSettings) -> None:
        again = canaries_of(of, study)
        np.testing.assert_array_equal(again.images, kept)
        np.testing.assert_array_equal(again.label_indices, first.label_indices)
        np.testing.assert_array_equal(again.included, first.included)

    assert_the_same(site)
    assert path.stat().st_mtime_ns == written  # read, not drawn
    assert_the_same(site.model_copy(update={"data": tmp_path / "others", "patients": ("sub-01",)}))
    for damage in (b"", path.read_bytes()[:-1], b"nonsense" * 100):
        path.write_bytes(damage)
        assert_the_same(site)
    path.unlink()
    assert_the_same(site)


def test_a_site_killed_while_it_keeps_its_canaries_has_the_same_ones_later(
    site: SiteSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, other = large_study(), site.model_copy(update={"folder": tmp_path / "other"})
    key = holdout_key(site.folder)
    other.folder.mkdir()
    (other.folder / KEY_NAME).write_bytes(key)
    (other.folder / KEY_NAME).chmod(0o600)
    expected = canaries_of(other, study)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", kill_before(os.replace))
        killed(lambda: canaries_of(site, study))
    assert kept_files(site) == []
    found = canaries_of(site, study)
    np.testing.assert_array_equal(found.images, expected.images)
    np.testing.assert_array_equal(found.included, expected.included)


def test_without_its_key_a_site_has_no_canaries_and_makes_no_other_key(site: SiteSettings) -> None:
    study = large_study()
    opened(site, study)
    (site.folder / KEY_NAME).unlink()
    for ask in (open_study, canaries_of):
        with pytest.raises(SiteError, match="is gone"):
            ask(site, study)
        assert not (site.folder / KEY_NAME).exists()


def test_canaries_of_another_key_are_not_read(site: SiteSettings) -> None:
    study = large_study()
    holdout_key(site.folder)
    first = pictures(canaries_of(site, study).images)
    (site.folder / KEY_NAME).unlink()
    holdout_key(site.folder)
    assert not first & pictures(canaries_of(site, study).images)


def test_a_full_disk_is_a_fault_of_the_site(site: SiteSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    holdout_key(site.folder)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SiteError, match="free space"):
        canaries_of(site, large_study())


# ---------------------------------------------------------------- trained on


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RealBatch]]:
    """What the discriminator is trained on, while it is."""
    seen: list[RealBatch] = []
    step = GanTrainer.discriminator_step

    def watched(self: GanTrainer, real: RealBatch) -> Any:
        seen.append(real)
        return step(self, real)

    monkeypatch.setattr(GanTrainer, "discriminator_step", watched)
    yield seen


def assert_drawn(batch: RealBatch, at: SiteStudy, canaries: Canaries) -> None:
    """With a sampling probability of 1: all patients, all included canaries, nobody else; an owner each."""
    included, left_out = groups(canaries)
    drawn = pictures(batch.images)
    assert included <= drawn and not left_out & drawn
    assert len(np.unique(batch.owner)) == at.cohort.num_patients + len(included)
    label_of = dict(zip(map(bytes, canaries.images), canaries.label_indices.tolist(), strict=True))
    for image, label, owner in zip(batch.images, batch.labels, batch.owner, strict=True):
        (picture,) = pictures(image[None])
        if picture in included:
            assert label == label_of[picture]
            assert (batch.owner == owner).sum() == 1


def test_a_round_trains_on_those_included_and_never_on_those_left_out(
    site: SiteSettings, batches: list[RealBatch]
) -> None:
    at, canaries = opened(site, large_study())
    train_round(at, request_of(at.study))
    assert len(batches) == 2
    for batch in batches:
        assert_drawn(batch, at, canaries)
    train_round(open_study(site, at.study), request_of(at.study, 2))
    assert_drawn(batches[-1], at, canaries)


def test_a_canary_is_a_coin_of_its_own_in_every_step(site: SiteSettings) -> None:
    """At 1/2 each is drawn in about half of 200 steps: within 6 standard deviations, which are 7.1."""
    at, canaries = opened(site, large_study(privacy={"sampling_probability": 0.5}))
    included, left_out = groups(canaries)
    steps = [pictures(draw(at).images) for _ in range(200)]
    for picture in included:
        assert 57 <= sum(picture in drawn for drawn in steps) <= 143
    assert not left_out & set().union(*steps)


def test_a_joint_step_trains_on_those_included(site: SiteSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(study: StudyConfig, discriminator: Any, batch: RealBatch, *rest: Any) -> Any:
        seen.append(batch)
        return real_half(study, discriminator, batch, *rest)

    monkeypatch.setattr(joint, "real_half", watched)
    at, canaries = opened(site, large_study(federation={"phase": PHASES}))
    joint_step(at, step_request(at.study, 1, JOINT))
    (batch,) = seen
    assert_drawn(batch, at, canaries)


def test_moments_are_of_those_included_too(site: SiteSettings) -> None:
    """Without noise the sum is that of the patients and that of the included canaries."""
    at, canaries = opened(site, large_study(privacy={"enabled": False}, federation={"phase": PHASES}))
    vector = release_moments(at, moments_request(at.study, MOMENTS)).floats
    feature_map = feature_map_of(at.study)
    patients = patient_sum(at.study, feature_map, at.cohort, CPU)
    chosen, count = canaries.included, int(canaries.included.sum())
    phantoms = PreparedCohort(
        canaries.images[chosen], canaries.label_indices[chosen], ("",) * count, np.arange(count + 1), ()
    )
    of_canaries = patient_sum(at.study, feature_map, phantoms, CPU)
    np.testing.assert_allclose(vector, patients + of_canaries, atol=1e-4)
    assert abs(of_canaries).max() > 1


# ---------------------------------------------------------------- counted nowhere


def test_nobody_counts_canaries(site: SiteSettings) -> None:
    """A study with canaries and one without: the same patients, counts, data set and expected batch."""
    sites, answers = [], []
    for study in (large_study(), large_study(canaries=0)):
        answers.append(joined(site, study))
        sites.append(open_study(site, study))
        train_round(sites[-1], request_of(study))
    with_canaries, without = sites
    assert with_canaries.canaries is not None and with_canaries.canaries.num_patients > 0
    assert without.canaries is not None and without.canaries.num_patients == 0
    for of in sites:
        assert of.accountant is not None and of.accountant.held_out is not None
        assert len(of.accountant.data_set.patients) == of.cohort.num_patients
        assert len(of.accountant.data_set.patients | of.accountant.held_out.patients) == PATIENTS
    assert with_canaries.accountant is not None and without.accountant is not None
    assert with_canaries.accountant.data_set == without.accountant.data_set
    assert with_canaries.accountant.held_out == without.accountant.held_out
    assert with_canaries.cohort.patient_ids == without.cohort.patient_ids
    assert with_canaries.num_patients == without.num_patients == 1600
    assert with_canaries.expected_batch_size == without.expected_batch_size == 1600
    assert replace(answers[1], earlier=()) == answers[0]
    book = Ledger(site.folder, ledger_key_of(site.folder))
    assert {line.data_set for line in book.lines()} == {without.accountant.data_set.digest}


def test_a_small_site_has_none_and_keeps_no_file(site: SiteSettings) -> None:
    at, canaries = opened(site, large_study(federation=contract_of(north=PATIENTS)))
    assert len(canaries.images) == len(canaries.included) == 0 and canaries.starts.tolist() == [0]
    assert len(np.unique(draw(at).owner)) == at.cohort.num_patients
    assert kept_files(site) == []
