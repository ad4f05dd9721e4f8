"""A joint step at a site: the round is charged before a patient is drawn, each step is begun once, and noise leaves."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client import joint
from client.accountant import SiteAccountant
from client.joint import STEPS_FILE, joint_step
from client.ledger_lines import Release
from client.real_half import real_half
from client.training import SiteStudy, draw
from client.updates import MadeSum
from common.errors import BadPeer, BudgetExhausted, LedgerError, OutOfOrder, OverBudget, ProtocolError
from common.gan import networks
from common.gan.parameters import load_vector
from common.messages import JointRequest
from common.noisy_sums import noise_for
from common.privacy.accounting import Budget
from common.privacy.plan import make_plan
from tests.client.phased_sites import (
    JOINT,
    LOCAL,
    MOMENTS,
    STEPS,
    charged_lines,
    kill_after,
    kill_before,
    killed,
    of_sites,
    phased_study,
    step_request,
    within,
)
from tests.client.sites import account_in, charged_in, cohort_of, site_of
from tests.common.gan.trainers import CPU

ONE_IMAGE = cohort_of((1,) * 8)
"""A cohort of which every draw with a probability of 1 is the same."""


@pytest.fixture
def at(tmp_path: Path) -> SiteStudy:
    return site_of(tmp_path, phased_study())


def ask(at: SiteStudy, step: int, round_number: int = JOINT) -> MadeSum:
    return joint_step(at, step_request(at.study, step, round_number))


def true_half(at: SiteStudy, request: JointRequest, clip_norm: float) -> np.ndarray:
    """The sum of a draw, as it must not leave."""
    discriminator = networks.build_discriminator(at.study)
    load_vector(discriminator, request.discriminator)
    return real_half(at.study, discriminator, draw(at), clip_norm, CPU)


# ---------------------------------------------------------------- the charge


def test_a_round_is_charged_whole_before_the_first_patient_is_drawn(
    at: SiteStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(joint, "draw", lambda site: (seen.append(charged_lines(at.folder)), draw(site))[1])
    for step in range(1, STEPS + 1):
        made = ask(at, step)
        assert made.round == JOINT and made.vector.dtype == np.int64
    assert seen == [[(JOINT, STEPS)]] * STEPS
    plan = make_plan(at.study)
    assert plan is not None
    assert charged_in(at.folder, at.study) == (replace(plan.phases[1].mechanism, steps=STEPS),)


@pytest.mark.parametrize("fails", ["os.replace", "os.fsync"])
def test_a_charge_that_cannot_be_written_means_no_draw(
    fails: str, at: SiteStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(joint, "draw", None)
    monkeypatch.setattr(fails, full)
    with pytest.raises(LedgerError, match="disk is full"):
        ask(at, 1)


def test_a_second_attempt_at_a_round_is_charged_anew_until_all_is_spent(at: SiteStudy) -> None:
    ask(at, 1)
    ask(at, 2)
    ask(at, 1)  # another session: what the first one released is paid for
    assert charged_lines(at.folder) == [(JOINT, STEPS)] * 2
    ask(at, 2)
    for round_number in (JOINT, JOINT + 1):
        with pytest.raises(BudgetExhausted, match="All 6 steps .* phase 2 are spent"):
            ask(at, 1, round_number)
    ask(at, 3)  # the session that was paid for goes on
    assert charged_lines(at.folder) == [(JOINT, STEPS)] * 2


def test_a_step_beyond_what_the_round_could_charge_is_refused(at: SiteStudy) -> None:
    account = at.accountant
    assert account is not None
    planned = account.phase(JOINT)
    spent = Release(at.study.digest, "", "run", JOINT, replace(planned.mechanism, steps=4), planned.clip_norm)
    account.ledger.charge(account.data_set, spent, account.budget)
    for step in (1, 2):
        ask(at, step)
    with pytest.raises(BudgetExhausted, match="Only 2 steps"):
        ask(at, 3)
    assert charged_lines(at.folder) == [(JOINT, 4), (JOINT, 2)]


def test_a_site_whose_budget_is_smaller_refuses_and_charges_nothing(
    at: SiteStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = account_in(at.folder, at.study, at.cohort.patient_ids, Budget(0.5, at.study.privacy.delta))
    monkeypatch.setattr(joint, "draw", None)
    with pytest.raises(OverBudget):
        ask(replace(at, accountant=small), 1)
    assert charged_lines(at.folder) == []
    with pytest.raises(OutOfOrder):
        ask(at, 2)


def test_a_failure_after_the_charge_has_a_code_that_says_so(at: SiteStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(site: SiteStudy) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(joint, "draw", unreadable)
    with pytest.raises(ProtocolError, match="charged and failed") as caught:
        ask(at, 1)
    assert caught.value.code == "protocol"
    assert charged_lines(at.folder) == [(JOINT, STEPS)]


# ---------------------------------------------------------------- each step once


@pytest.mark.parametrize(
    ("asked", "refused"), [([1, 2], 2), ([1, 3], 2), ([1, 3], 3), ([1, 2, 3], 2), ([], 2), ([], 3)]
)
def test_a_step_is_begun_once_and_none_before_it_any_more(asked: list[int], refused: int, at: SiteStudy) -> None:
    for step in asked:
        ask(at, step)
    before = charged_lines(at.folder)
    with pytest.raises(OutOfOrder):
        ask(at, refused)
    assert charged_lines(at.folder) == before == [(JOINT, STEPS)] * bool(asked)


def test_a_step_may_be_left_out(at: SiteStudy) -> None:
    for step in (1, 3):
        ask(at, step)
    assert charged_lines(at.folder) == [(JOINT, STEPS)]


@pytest.mark.parametrize(("begun", "asked"), [(JOINT, JOINT + 1), (JOINT + 1, JOINT)])
def test_a_step_of_another_round_than_the_one_that_was_begun_is_refused(begun: int, asked: int, at: SiteStudy) -> None:
    ask(at, 1, begun)
    with pytest.raises(OutOfOrder):
        ask(at, 2, asked)
    ask(at, 2, begun)
    assert charged_lines(at.folder) == [(begun, STEPS)]


def test_a_step_that_failed_is_not_begun_again(at: SiteStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(at, 1)

    def interrupted(site: SiteStudy) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(joint, "draw", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ask(at, 2)
    with pytest.raises(OutOfOrder):
        ask(at, 2)
    ask(at, 3)


@pytest.mark.parametrize("damage", ["gone", b"", b"{", b"[]", b'{"round": 3}'])
def test_a_site_that_has_lost_count_begins_no_step(damage: Any, at: SiteStudy) -> None:
    ask(at, 1)
    path = at.folder / STEPS_FILE
    path.unlink() if damage == "gone" else path.write_bytes(damage)
    with pytest.raises(OutOfOrder, match="first step"):
        ask(at, 2)


# ---------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    "spoil",
    [
        lambda request: replace(request, round=0),
        lambda request: replace(request, round=7),
        lambda request: replace(request, round=MOMENTS),
        lambda request: replace(request, round=LOCAL),
        lambda request: replace(request, step=0),
        lambda request: replace(request, step=-1),
        lambda request: replace(request, step=STEPS + 1),
        lambda request: replace(request, discriminator=request.discriminator[:-1]),
        lambda request: replace(request, discriminator=request.discriminator[:0]),
        lambda request: replace(request, discriminator=request.discriminator * np.float32(np.nan)),
    ],
)
def test_what_does_not_fit_the_study_is_refused_and_nothing_is_spent(
    spoil: Callable[[JointRequest], JointRequest], at: SiteStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joint, "draw", None)
    with pytest.raises(BadPeer):
        joint_step(at, spoil(step_request(at.study, 1)))
    assert charged_lines(at.folder) == []
    assert not (at.folder / STEPS_FILE).exists()


def test_a_discriminator_that_does_not_fit_uses_no_step_up(at: SiteStudy) -> None:
    ask(at, 1)
    request = step_request(at.study, 2)
    with pytest.raises(BadPeer):
        joint_step(at, replace(request, discriminator=request.discriminator[:-1]))
    joint_step(at, request)


# ---------------------------------------------------------------- a process that is killed

MOMENTS_OF_DEATH: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], int, bool]] = {
    "before the charge": (
        lambda patch: patch.setattr(SiteAccountant, "charge_round", kill_before(SiteAccountant.charge_round)),
        0,
        False,
    ),
    "after the charge": (
        lambda patch: patch.setattr(SiteAccountant, "charge_round", kill_after(SiteAccountant.charge_round)),
        STEPS,
        False,
    ),
    "after the step is begun": (lambda patch: patch.setattr(joint, "_begin", kill_after(joint._begin)), STEPS, True),
    "after the draw": (lambda patch: patch.setattr(joint, "draw", kill_after(joint.draw)), STEPS, True),
    "before the noise": (
        lambda patch: patch.setattr(joint, "noisy_integers", kill_before(joint.noisy_integers)),
        STEPS,
        True,
    ),
}


@pytest.mark.parametrize("moment", MOMENTS_OF_DEATH)
def test_killed_at_any_moment_a_site_has_charged_what_it_drew_or_more(
    moment: str, at: SiteStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_trap, charged, begun = MOMENTS_OF_DEATH[moment]
    drawn = at.folder / "drawn"

    def counted(site: SiteStudy) -> Any:
        with drawn.open("ab", buffering=0) as file:
            file.write(b"x")
        return draw(site)

    monkeypatch.setattr(joint, "draw", counted)
    with monkeypatch.context() as patch:
        set_trap(patch)
        killed(lambda: ask(at, 1))
    assert sum(steps for _, steps in charged_lines(at.folder)) == charged
    assert (drawn.stat().st_size if drawn.exists() else 0) <= charged
    # A new process: the round that was cut is paid for, and goes on only where its first step was begun.
    again = site_of(at.folder, at.study)
    if begun:
        ask(again, 2)
    else:
        with pytest.raises(OutOfOrder):
            ask(again, 2)
    ask(again, 1)
    assert sum(steps for _, steps in charged_lines(at.folder)) == charged + STEPS
    assert drawn.stat().st_size <= charged + STEPS


# ---------------------------------------------------------------- noise


@pytest.mark.parametrize(
    ("aggregation", "sites", "minimum", "colluding", "num_noisy"),
    [
        ("secure", 2, 2, 1, 1),
        ("secure", 5, 4, 1, 3),
        ("secure", 5, 4, 2, 2),
        ("secure", 5, 5, 0, 5),
        ("plain", 5, 4, 1, 1),
    ],
)
def test_a_site_adds_its_share_of_the_noise_to_every_step(
    aggregation: str, sites: int, minimum: int, colluding: int, num_noisy: int, tmp_path: Path
) -> None:
    federation = {"aggregation": aggregation, "minimum_sites": minimum}
    study = of_sites(sites, federation=federation, privacy={"colluding_sites": colluding})
    at, plan = site_of(tmp_path, study, ONE_IMAGE), make_plan(study)
    assert plan is not None and at.accountant is not None
    phase = plan.phases[1]
    true = true_half(at, step_request(study, 1), phase.clip_norm)
    added = []
    for step in (1, 2, 3):
        made = ask(at, step)
        added.append(made.vector * 2.0**-made.encoding.fraction_bits - true)
    rounding = 2.0**-made.encoding.fraction_bits
    sensitivity = phase.clip_norm + rounding * len(true) ** 0.5
    share = (phase.mechanism.noise_multiplier * sensitivity) ** 2 / num_noisy
    together = np.concatenate(added)
    assert within(together, share)
    assert not within(together, 0.7 * share) and not within(together, 1.4 * share)  # it would have been seen
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert within(added[one] - added[other], 2 * share)  # independent
    # As it leaves in the clear it is the same sum.
    np.testing.assert_allclose(made.floats, made.vector * rounding, rtol=1e-6)


def test_a_step_that_draws_nobody_is_noised_like_any_other(tmp_path: Path) -> None:
    study = phased_study(privacy={"sampling_probability": 1e-6})
    at, plan = site_of(tmp_path, study), make_plan(study)
    assert plan is not None
    made = ask(at, 1)
    assert len(draw(at).images) == 0
    share = noise_for(study, plan.phases[1], len(made.vector)).scale ** 2
    assert within(made.vector.astype(float), share)
    assert charged_lines(tmp_path) == [(JOINT, STEPS)]


def test_without_privacy_the_sites_sums_are_those_of_all_patients_but_for_rounding(tmp_path: Path) -> None:
    study = of_sites(3, privacy={"enabled": False})
    names = list(study.federation.contracted_patients)
    request, total, everybody = step_request(study, 1), 0, 0
    for number, name in enumerate(names):
        (tmp_path / name).mkdir()
        at = replace(site_of(tmp_path / name, study, cohort_of((1,) * (3 + number))), site=name)
        assert at.accountant is None
        made = joint_step(at, request)
        total += made.vector
        everybody += true_half(at, request, study.privacy.clip_norm)
    step = 2.0**-made.encoding.fraction_bits
    assert np.abs(total * step - everybody).max() <= len(names) / 2 * step
    assert np.abs(everybody).max() > 1000 * step


def test_a_study_without_privacy_counts_its_steps_too(tmp_path: Path) -> None:
    at = site_of(tmp_path, phased_study(privacy={"enabled": False}))
    for step in (1, 2):
        ask(at, step)
    with pytest.raises(OutOfOrder):
        ask(at, 2)
    ask(at, 1)  # there is nothing to charge: as often as the server likes
    assert charged_in(tmp_path, at.study) == ()
