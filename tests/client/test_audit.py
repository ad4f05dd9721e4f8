"""An audit at a site: what the server may not do, what is charged when, what leaves and what does not."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client import audit, audit_charge, audit_pairs
from client.accountant import SiteAccountant
from client.audit import SiteAudit
from common.audit import counts
from common.audit.bins import NUM_BINS
from common.errors import BadPeer, BudgetExhausted, LedgerError, ProtocolError, SiteError
from common.messages import AuditRequest, FilterRequest
from common.privacy import discrete_laplace
from tests.client.audited_sites import audited_study, generator_of, patients_of, phantoms, request_of, site_audit
from tests.client.phased_sites import charged_lines, kill_after, kill_before, killed

STUDY = audited_study()


@pytest.fixture
def at(tmp_path: Path) -> SiteAudit:
    return site_audit(tmp_path, STUDY)


@pytest.fixture
def request_() -> AuditRequest:
    return request_of(STUDY)


# ---------------------------------------------------------------- a server that does what it may not


def with_real_image(request: AuditRequest) -> AuditRequest:
    """A probe: is this person a patient?"""
    images = request.images.copy()
    images[-28 * 28 :] = phantoms(1, seed=99).ravel()
    return replace(request, images=images)


def with_large_similarities(request: AuditRequest) -> AuditRequest:
    """Whoever is not near candidate 7 scores low: an audit of one image."""
    nearest = np.ones_like(request.nearest)
    nearest[7] = request.nearest[7]
    return replace(request, nearest=nearest)


CHEATS: dict[str, Callable[[AuditRequest], AuditRequest]] = {
    "a real image among the candidates": with_real_image,
    "one pixel": lambda it: replace(it, images=np.concatenate([it.images[:-1], it.images[-1:] ^ np.uint8(128)])),
    "images of another generator": lambda it: replace(it, generator=generator_of(STUDY, seed=1)),
    "a generator that does not fit": lambda it: replace(it, generator=it.generator[:-1]),
    "a generator that is not finite": lambda it: replace(it, generator=it.generator * np.float32(np.nan)),
    "fewer than 1000": lambda it: replace(
        it, indices=it.indices[:999], images=it.images[: 999 * 28 * 28], nearest=it.nearest[:999]
    ),
    "images of another size": lambda it: replace(it, images=it.images[: 14 * 14 * len(it.indices)]),
    "one image twice": lambda it: replace(it, indices=np.concatenate([it.indices[:1], it.indices[:-1]])),
    "an index below": lambda it: replace(it, indices=it.indices - 1),
    "an index above": lambda it: replace(it, indices=it.indices + 10**6),
    "similarities that hide all but one": with_large_similarities,
    "similarities that are none": lambda it: replace(it, nearest=it.nearest * np.float32(np.nan)),
    "too few similarities": lambda it: replace(it, nearest=it.nearest[1:]),
    "another plan": lambda it: replace(it, plan_digest="0" * 64),
    "another round": lambda it: replace(it, round=it.round + 1),
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_what_is_not_the_registered_audit_of_the_generator_is_refused_and_nothing_is_spent(
    cheat: str, at: SiteAudit, request_: AuditRequest
) -> None:
    with pytest.raises(BadPeer):
        audit.count(at, CHEATS[cheat](request_))
    assert not charged_lines(at.folder)
    assert not (at.folder / audit_pairs.FOLDER).exists()


def test_all_candidates_alike_are_refused(at: SiteAudit, request_: AuditRequest) -> None:
    size = len(request_.images) // len(request_.indices)
    alike = replace(request_, images=np.tile(request_.images[:size], len(request_.indices)))
    with pytest.raises(BadPeer):
        audit.count(at, alike)
    assert not charged_lines(at.folder)


@pytest.mark.parametrize("missing", ["held_out", "training"])
def test_a_site_with_nobody_to_compare_with_refuses(missing: str, at: SiteAudit, request_: AuditRequest) -> None:
    nobody = patients_of(phantoms(1, 1)[:0], "nobody")
    with pytest.raises(SiteError, match="patients"):
        audit.count(replace(at, **{missing: nobody}), request_)
    assert not charged_lines(at.folder)


# ---------------------------------------------------------------- the charge


def test_both_groups_are_charged_before_a_patient_is_read(
    at: SiteAudit, request_: AuditRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    compare = audit.score.compare

    def reading(*arguments: Any) -> Any:
        seen.append(charged_lines(at.folder))
        return compare(*arguments)

    monkeypatch.setattr(audit.score, "compare", reading)
    audit.count(at, request_)
    assert len(seen) == 3 and all(len(lines) == 2 for lines in seen)


def test_a_charge_that_cannot_be_written_means_no_comparison(
    at: SiteAudit, request_: AuditRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise LedgerError("the disk is full")

    monkeypatch.setattr(SiteAccountant, "charge_audit", fail)
    monkeypatch.setattr(audit.score, "compare", lambda *_: pytest.fail("a patient was read"))
    with pytest.raises(LedgerError):
        audit.count(at, request_)


def test_one_verdict_more_than_planned_is_refused(at: SiteAudit, request_: AuditRequest) -> None:
    audit.count(at, request_)
    with pytest.raises(BudgetExhausted):
        audit.count(at, request_)
    assert len(charged_lines(at.folder)) == 2


def test_a_failure_after_the_charge_has_a_code_that_says_so(
    at: SiteAudit, request_: AuditRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError("no random bytes")

    monkeypatch.setattr(discrete_laplace, "share", fail)
    with pytest.raises(ProtocolError, match="charged and failed"):
        audit.count(at, request_)
    assert len(charged_lines(at.folder)) == 2


@pytest.mark.parametrize("moment", ["before the charge", "after the charge", "before the noise", "after the noise"])
def test_killed_at_any_moment_a_verdict_is_charged_once_and_made_at_most_once(
    moment: str, at: SiteAudit, request_: AuditRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        match moment:
            case "before the charge":
                patch.setattr(SiteAccountant, "charge_audit", kill_before(SiteAccountant.charge_audit))
            case "after the charge":
                patch.setattr(SiteAccountant, "charge_audit", kill_after(SiteAccountant.charge_audit))
            case "before the noise":
                patch.setattr(audit_charge, "note_made", kill_before(audit_charge.note_made))
            case _:
                patch.setattr(discrete_laplace, "share", kill_after(discrete_laplace.share))
        killed(lambda: audit.count(at, request_))
    again = site_audit(at.folder, STUDY)
    if moment == "after the noise":
        with pytest.raises(BudgetExhausted):
            audit.count(again, request_)
    else:
        audit.count(again, request_)
        with pytest.raises(BudgetExhausted):
            audit.count(again, request_)
    assert len(charged_lines(at.folder)) == 2


# ---------------------------------------------------------------- what leaves


def without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(epsilon: float, num_noisy: int, count: int, source: Any) -> np.ndarray:
        return np.zeros(count, np.int64)

    monkeypatch.setattr(discrete_laplace, "share", nothing)


def test_each_patient_and_each_canary_is_in_one_cell(
    at: SiteAudit, request_: AuditRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_noise(monkeypatch)
    made = audit.count(at, request_)
    found = counts.from_vector(made.vector, 1, NUM_BINS)
    assert found.patients.sum(axis=(1, 2))[counts.TRAINING] == 24
    assert found.patients.sum(axis=(1, 2))[1:].sum() == 8
    assert found.canaries.sum(axis=1).tolist() == [1, 1]
    assert (made.vector >= 0).all()


def test_the_patients_cells_are_noisy_with_the_declared_epsilons_and_the_canaries_are_not(
    at: SiteAudit, request_: AuditRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    share = discrete_laplace.share

    def noted(epsilon: float, num_noisy: int, count: int, source: Any) -> np.ndarray:
        asked.append((epsilon, num_noisy, count))
        return share(epsilon, num_noisy, count, source) + 1000

    monkeypatch.setattr(discrete_laplace, "share", noted)
    bins = NUM_BINS
    vector = audit.count(at, request_).vector
    assert asked == [(0.5, 2, bins), (2.0, 2, bins), (2.0, 2, bins)]
    assert (vector[: 3 * bins] > 500).all() and (vector[3 * bins :] < 500).all()


def test_a_copied_patient_scores_higher_than_all_others(
    at: SiteAudit, request_: AuditRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_noise(monkeypatch)
    images = phantoms(24, 1)
    images[5] = request_.images.reshape(-1, 1, 28, 28)[17]
    copied = replace(at, training=patients_of(images, "trained"))
    found = counts.from_vector(audit.count(copied, request_).vector, 1, NUM_BINS)
    assert found.patients[counts.TRAINING, 0, -1] == 1
    pairs = audit_pairs.load_pairs(at.folder)
    assert (pairs.patients[0], pairs.candidates[0]) == (5, 17)
    assert pairs.matched[17] and pairs.sims[0] > 0.99


# ---------------------------------------------------------------- the filter


def filter_of(request: AuditRequest) -> FilterRequest:
    return FilterRequest(STUDY.digest, STUDY.filter_round, request.digest, len(request.indices))


def test_the_filter_names_matches_and_decoys_by_numbers_that_say_nothing(at: SiteAudit, request_: AuditRequest) -> None:
    audit.count(at, request_)
    first, second = (audit.drop(at, filter_of(request_)).vector for _ in range(2))
    pairs = audit_pairs.load_pairs(at.folder)
    assert np.array_equal(first != 0, pairs.dropped) and np.array_equal(second != 0, pairs.dropped)
    assert (pairs.dropped | ~pairs.matched).all()
    both = pairs.dropped
    assert len(np.unique(first[both])) > 0.99 * both.sum() and (first[both] != second[both]).any()
    assert (first >= 0).all() and (first < 2**32).all()
    decoys = (pairs.dropped & ~pairs.matched).mean()
    assert abs(decoys - (1 - 0.75**0.5)) < 0.06  # two sites that do not collude share 25 %


def test_an_image_stays_a_decoy_whatever_else_is_asked_about(at: SiteAudit, request_: AuditRequest) -> None:
    audit.count(at, request_)
    pairs, decoys = audit_pairs.load_pairs(at.folder), audit._decoys(at, request_)
    assert np.array_equal(pairs.dropped, pairs.matched | decoys)
    fewer = replace(request_, indices=request_.indices[7:])
    assert np.array_equal(audit._decoys(at, fewer), decoys[7:])
    assert (audit._decoys(replace(at, key=bytes(32)), request_) != decoys).any()
    assert (audit._decoys(at, replace(request_, generator=generator_of(STUDY, seed=1))) != decoys).any()


def test_candidates_that_were_not_compared_are_not_filtered(at: SiteAudit, request_: AuditRequest) -> None:
    with pytest.raises(BadPeer):
        audit.drop(at, filter_of(request_))
    audit.count(at, request_)
    asked = filter_of(request_)
    for other in (replace(asked, audit_digest="0" * 64), replace(asked, count=3), replace(asked, round=1)):
        with pytest.raises(BadPeer):
            audit.drop(at, other)


def test_what_stays_is_readable_by_its_owner_only(at: SiteAudit, request_: AuditRequest) -> None:
    audit.count(at, request_)
    kept = at.folder / audit_pairs.FOLDER
    assert kept.stat().st_mode & 0o077 == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in kept.iterdir())
