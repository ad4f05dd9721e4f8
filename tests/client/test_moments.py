"""A moments release at a site: charged before a patient is read, never repeated, with its share of the noise."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client import moments, updates
from client.accountant import SiteAccountant
from client.moments import release_moments
from client.patient_sum import patient_sum
from client.training import SiteStudy, train_round
from client.updates import MadeSum
from common.errors import BadPeer, BudgetExhausted, LedgerError, OverBudget, ProtocolError, SiteError
from common.messages import MomentsRequest
from common.privacy.accounting import Budget
from common.privacy.plan import MOMENTS_CLIP_NORM, make_plan
from tests.client.phased_sites import (
    JOINT,
    LOCAL,
    MOMENTS,
    charged_lines,
    feature_map_of,
    kill_after,
    kill_before,
    killed,
    moments_request,
    of_sites,
    phased_study,
    within,
)
from tests.client.sites import account_in, charged_in, cohort_of, request_of, site_of, study_of
from tests.common.gan.trainers import CPU


@pytest.fixture
def at(tmp_path: Path) -> SiteStudy:
    return site_of(tmp_path, phased_study())


def release(at: SiteStudy, round_number: int = MOMENTS) -> MadeSum:
    return release_moments(at, moments_request(at.study, round_number))


def true_sum(at: SiteStudy) -> np.ndarray:
    """The sum over all patients, as it must not leave."""
    return patient_sum(at.study, feature_map_of(at.study), at.cohort, CPU)


# ---------------------------------------------------------------- the charge


def test_a_release_is_charged_before_a_patient_is_read(at: SiteStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def reading(*arguments: Any) -> Any:
        seen.append(charged_lines(at.folder))
        return patient_sum(*arguments)

    monkeypatch.setattr(moments, "patient_sum", reading)
    made = release(at)
    assert made.round == MOMENTS and made.vector.dtype == np.int64
    assert seen == [[(MOMENTS, 1)]]
    plan = make_plan(at.study)
    assert plan is not None
    planned = plan.phases[0].mechanism
    assert planned.sampling_probability == 1  # of all patients
    assert charged_in(at.folder, at.study) == (replace(planned, steps=1),)


@pytest.mark.parametrize("fails", ["os.replace", "os.fsync"])
def test_a_charge_that_cannot_be_written_means_no_release(
    fails: str, at: SiteStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(moments, "patient_sum", None)
    monkeypatch.setattr(fails, full)
    with pytest.raises(LedgerError, match="disk is full"):
        release(at)


def test_a_release_that_is_asked_for_again_is_another_one(at: SiteStudy) -> None:
    first, again = release(at), release(at)
    assert (first.vector != again.vector).mean() > 0.9  # with noise of its own
    assert first.id != again.id
    assert charged_lines(at.folder) == [(MOMENTS, 1)] * 2
    for round_number in (MOMENTS, MOMENTS + 1):
        with pytest.raises(BudgetExhausted, match="All 2 steps .* phase 1 are spent"):
            release(at, round_number)
    assert charged_lines(at.folder) == [(MOMENTS, 1)] * 2


def test_a_site_whose_budget_is_smaller_refuses_and_charges_nothing(
    at: SiteStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = account_in(at.folder, at.study, at.cohort.patient_ids, Budget(0.5, at.study.privacy.delta))
    monkeypatch.setattr(moments, "patient_sum", None)
    with pytest.raises(OverBudget):
        release(replace(at, accountant=small))
    assert charged_lines(at.folder) == []
    assert not (at.folder / updates.FILE_NAME).exists()


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), SiteError("an image is gone")])
def test_a_failure_after_the_charge_has_a_code_that_says_so(
    error: Exception, at: SiteStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(moments, "patient_sum", unreadable)
    with pytest.raises(ProtocolError, match="charged and failed") as caught:
        release(at)
    assert caught.value.code == "protocol"
    assert charged_lines(at.folder) == [(MOMENTS, 1)]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda request: replace(request, round=0),
        lambda request: replace(request, round=7),
        lambda request: replace(request, round=JOINT),
        lambda request: replace(request, round=LOCAL),
        lambda request: replace(request, features=request.features[:-1]),
        lambda request: replace(request, features=request.features[:0]),
        lambda request: replace(request, features=np.full_like(request.features, np.inf)),
        lambda request: replace(request, features=np.concatenate([[9], request.features[1:]]).astype(np.float32)),
    ],
)
def test_what_does_not_fit_the_study_is_refused_and_nothing_is_spent(
    spoil: Callable[[MomentsRequest], MomentsRequest], at: SiteStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments, "patient_sum", None)
    with pytest.raises(BadPeer):
        release_moments(at, spoil(moments_request(at.study)))
    assert charged_lines(at.folder) == []


# ---------------------------------------------------------------- a process that is killed

MOMENTS_OF_DEATH: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], int]] = {
    "before the charge": (
        lambda patch: patch.setattr(SiteAccountant, "charge_round", kill_before(SiteAccountant.charge_round)),
        0,
    ),
    "after the charge": (
        lambda patch: patch.setattr(SiteAccountant, "charge_round", kill_after(SiteAccountant.charge_round)),
        1,
    ),
    "after it is noted": (lambda patch: patch.setattr(updates, "note_made", kill_after(updates.note_made)), 1),
    "after the patients": (lambda patch: patch.setattr(moments, "patient_sum", kill_after(patient_sum)), 1),
}


@pytest.mark.parametrize("moment", MOMENTS_OF_DEATH)
def test_killed_at_any_moment_a_site_has_charged_what_it_read_or_more(
    moment: str, at: SiteStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_trap, charged = MOMENTS_OF_DEATH[moment]
    read = at.folder / "read"

    def counted(*arguments: Any) -> Any:
        with read.open("ab", buffering=0) as file:
            file.write(b"x")
        return patient_sum(*arguments)

    monkeypatch.setattr(moments, "patient_sum", counted)
    with monkeypatch.context() as patch:
        set_trap(patch)
        killed(lambda: release(at))
    assert len(charged_lines(at.folder)) == charged >= (read.stat().st_size if read.exists() else 0)
    release(site_of(at.folder, at.study))  # what was cut is paid for and lost
    assert len(charged_lines(at.folder)) == charged + 1


# ---------------------------------------------------------------- an update of an earlier round


def test_an_update_that_has_left_never_leaves_again_after_a_release(tmp_path: Path) -> None:
    """The note of what has left is of the newest only: the release must not make the site forget the update."""
    phases = [{"algorithm": "local", "share": 0.5, "rounds": 2, "steps": 2}, {"algorithm": "moments", "share": 0.5}]
    study = study_of(federation={"phase": phases})
    at, request = site_of(tmp_path, study), request_of(study, 1)
    update = train_round(at, request)
    updates.note_left(tmp_path, update.id)  # as the secure sum does when it is masked
    made = release_moments(at, moments_request(study, 3))
    updates.note_left(tmp_path, made.id)
    again = train_round(at, request)
    assert again.id != update.id
    assert (again.vector != update.vector).mean() > 0.9
    assert charged_lines(tmp_path) == [(1, 2), (3, 1), (1, 2)]


def test_an_update_that_waits_is_not_sent_after_a_release(tmp_path: Path) -> None:
    phases = [{"algorithm": "local", "share": 0.5, "rounds": 2, "steps": 2}, {"algorithm": "moments", "share": 0.5}]
    study = study_of(federation={"phase": phases})
    at, request = site_of(tmp_path, study), request_of(study, 1)
    update = train_round(at, request)
    release_moments(at, moments_request(study, 3))
    assert train_round(at, request).id != update.id
    assert charged_lines(tmp_path) == [(1, 2), (3, 1), (1, 2)]


# ---------------------------------------------------------------- noise


@pytest.mark.parametrize(
    ("aggregation", "sites", "minimum", "colluding", "num_noisy"),
    [("secure", 2, 2, 1, 1), ("secure", 5, 4, 1, 3), ("secure", 5, 5, 0, 5), ("plain", 5, 4, 1, 1)],
)
def test_a_site_adds_its_share_of_the_noise(
    aggregation: str, sites: int, minimum: int, colluding: int, num_noisy: int, tmp_path: Path
) -> None:
    federation = {"aggregation": aggregation, "minimum_sites": minimum}
    study = of_sites(sites, federation=federation, privacy={"colluding_sites": colluding, "clip_norm": 7.0})
    at, plan = site_of(tmp_path, study), make_plan(study)
    assert plan is not None
    true, made = true_sum(at), [release(at), release(at)]
    step = 2.0 ** -made[0].encoding.fraction_bits
    first, second = (each.vector * step - true for each in made)
    sensitivity = MOMENTS_CLIP_NORM + step * len(true) ** 0.5  # whatever the clip norm of the gradients is
    share = (plan.phases[0].mechanism.noise_multiplier * sensitivity) ** 2 / num_noisy
    noise = np.concatenate([first, second])
    assert within(noise, share)
    assert not within(noise, 0.65 * share) and not within(noise, 1.55 * share)  # it would have been seen
    assert within(first - second, 2 * share)  # independent


def test_without_privacy_the_sites_sums_are_those_of_all_patients_but_for_rounding(tmp_path: Path) -> None:
    study = of_sites(3, privacy={"enabled": False})
    names = list(study.federation.contracted_patients)
    total, everybody = 0, 0
    for number, name in enumerate(names):
        (tmp_path / name).mkdir()
        at = replace(site_of(tmp_path / name, study, cohort_of((1, 4, 2)[: 1 + number])), site=name)
        assert at.accountant is None
        made = release(at)
        total += made.vector
        everybody += true_sum(at)
    step = 2.0**-made.encoding.fraction_bits
    assert np.abs(total * step - everybody).max() <= len(names) / 2 * step
    assert np.abs(everybody).max() > 1000 * step
