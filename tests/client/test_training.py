"""One round at a site: charged first, trained from the shared state, answered again for nothing."""

import errno
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client import training, updates
from client.ledger import FILE_NAME, Ledger
from client.ledger_lines import Release
from client.training import STATE_FILE, train_round
from client.updates import MadeUpdate
from common import progress
from common.errors import BadPeer, BudgetExhausted, LedgerError, OverBudget, PrivacyError, SiteError
from common.gan.training import GanTrainer, RealBatch
from common.messages import TrainRequest
from common.privacy.accounting import Budget, epsilon, num_steps
from common.privacy.plan import make_plan
from tests.client.sites import IMAGES, KEY, account_in, charged_in, cohort_of, request_of, site_of, study_of


def spent(folder: Path) -> int:
    return num_steps(charged_in(folder, study_of()))


def assert_same(one: MadeUpdate, other: MadeUpdate) -> None:
    np.testing.assert_array_equal(one.vector, other.vector)
    assert one.round == other.round


def parts(update: MadeUpdate, request: TrainRequest) -> tuple[np.ndarray, np.ndarray]:
    """The update of the generator and that of the discriminator."""
    generator, discriminator = np.split(update.vector, [len(request.generator)])
    return generator, discriminator


def test_a_round_returns_both_differences_and_charges_what_was_planned(tmp_path: Path) -> None:
    at = site_of(tmp_path)
    request = request_of(at.study)
    update = train_round(at, request)
    plan = make_plan(at.study)
    assert plan is not None
    assert update.round == 1
    (planned,) = plan.history
    assert charged_in(tmp_path, at.study) == (replace(planned, steps=2),)
    assert update.vector.dtype == np.float32
    for difference, shared in zip(parts(update, request), (request.generator, request.discriminator), strict=True):
        assert difference.shape == shared.shape
        assert np.isfinite(difference).all()
        assert (difference != 0).mean() > 0.9
        assert abs(difference).max() < 0.01  # two Adam steps at 2e-4


def test_an_update_is_weighted_by_the_contract(tmp_path: Path) -> None:
    """North has 11 patients of the largest site's 44: without noise, its update is a quarter of the unweighted one."""
    contract = {"north": 11, "south": 44}
    equal = study_of(privacy={"enabled": False}, federation={"contracted_patients": contract})
    vectors = []
    for study in (equal, equal.with_changes("federation", weights="contracted")):
        folder = tmp_path / study.federation.weights
        folder.mkdir()
        at = site_of(folder, study, cohort_of((1,) * 8))
        vectors.append(train_round(at, request_of(study)).vector)
        assert_same(train_round(at, request_of(study)), MadeUpdate(1, vectors[-1], ""))  # weighted once, from its state
    np.testing.assert_allclose(vectors[1], 0.25 * vectors[0], atol=1e-6)
    assert abs(vectors[0]).max() > 1e-4


def test_the_charge_is_on_disk_before_the_first_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def stop(self: GanTrainer, real: RealBatch) -> None:
        seen.append(spent(tmp_path))
        raise RuntimeError("stopped")

    monkeypatch.setattr(GanTrainer, "discriminator_step", stop)
    with pytest.raises(RuntimeError, match="stopped"):
        train_round(site_of(tmp_path), request_of(study_of()))
    assert seen == [2]
    assert spent(tmp_path) == 2


def test_the_charge_is_on_disk_before_a_patient_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    draw = training.draw
    monkeypatch.setattr(training, "draw", lambda at: (seen.append(spent(tmp_path)), draw(at))[1])
    train_round(site_of(tmp_path), request_of(study_of()))
    assert seen == [2, 2]


@pytest.mark.parametrize("fails", ["os.replace", "os.fsync"])
def test_a_charge_that_cannot_be_written_means_no_training(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "disk full")

    at = site_of(tmp_path)
    steps: list[int] = []
    monkeypatch.setattr(GanTrainer, "discriminator_step", lambda self, real: steps.append(1))
    monkeypatch.setattr(fails, fail)
    with pytest.raises(LedgerError, match="disk is full"):
        train_round(at, request_of(study_of()))
    assert steps == []


def test_a_round_of_as_many_steps_as_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"discriminator": 0, "generator": 0}
    for name in counts:
        original: Any = getattr(GanTrainer, f"{name}_step")

        def counting(self: GanTrainer, *arguments: Any, name: str = name, original: Any = original) -> Any:
            counts[name] += 1
            return original(self, *arguments)

        monkeypatch.setattr(GanTrainer, f"{name}_step", counting)
    study = study_of(gan={"discriminator_steps_per_generator_step": 2})
    train_round(site_of(tmp_path, study), request_of(study))
    assert counts == {"discriminator": 2, "generator": 1}


def test_more_rounds_than_planned_are_refused(tmp_path: Path) -> None:
    at = site_of(tmp_path)
    for round_number in (1, 2, 3):
        train_round(at, request_of(at.study, round_number))
        assert spent(tmp_path) == 2 * round_number
    with pytest.raises(BudgetExhausted, match="All 6 steps .* phase 1 are spent"):
        train_round(at, request_of(at.study, 3, seed=1))
    with pytest.raises(BadPeer, match="from 1 to 3, found 4"):
        train_round(at, request_of(at.study, 4))
    assert spent(tmp_path) == 6
    history = charged_in(tmp_path, at.study)
    assert epsilon(history, at.study.privacy.delta) <= at.study.privacy.epsilon


def test_a_repeated_request_is_answered_again_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = site_of(tmp_path)
    request = request_of(at.study)
    first = train_round(at, request)
    before = Ledger(tmp_path, KEY).lines()
    monkeypatch.setattr(GanTrainer, "discriminator_step", None)
    assert_same(train_round(at, request), first)
    assert Ledger(tmp_path, KEY).lines() == before


def test_a_repeated_request_is_answered_even_when_all_is_spent(tmp_path: Path) -> None:
    at = site_of(tmp_path)
    for round_number in (1, 2, 3):
        request = request_of(at.study, round_number)
        last = train_round(at, request)
    assert_same(train_round(at, request), last)


@pytest.mark.parametrize("change", ["round", "state"])
def test_another_round_or_state_is_trained_and_charged(change: str, tmp_path: Path) -> None:
    at = site_of(tmp_path)
    first = train_round(at, request_of(at.study))
    second = train_round(at, request_of(at.study, 2) if change == "round" else request_of(at.study, 1, seed=1))
    assert spent(tmp_path) == 4
    assert (first.vector != second.vector).any()


def test_an_update_that_has_left_masked_is_trained_anew_under_its_own_charge(tmp_path: Path) -> None:
    """Masked twice with other sites, the difference of the two sums could be this site's update."""
    at = site_of(tmp_path)
    request = request_of(at.study)
    first = train_round(at, request)
    updates.note_left(tmp_path, updates.read(tmp_path).made)
    second = train_round(at, request)
    assert spent(tmp_path) == 4
    assert (first.vector != second.vector).mean() > 0.9
    assert_same(train_round(at, request), second)  # this one has not left
    updates.note_left(tmp_path, updates.read(tmp_path).made)
    third = train_round(at, request)
    assert spent(tmp_path) == 6
    assert (second.vector != third.vector).mean() > 0.9
    updates.note_left(tmp_path, updates.read(tmp_path).made)
    with pytest.raises(BudgetExhausted):
        train_round(at, request)


def test_an_update_that_has_not_left_is_known_as_pending(tmp_path: Path) -> None:
    at = site_of(tmp_path)
    assert not updates.read(tmp_path).pending
    train_round(at, request_of(at.study))
    assert updates.read(tmp_path).pending
    updates.note_left(tmp_path, updates.read(tmp_path).made)
    assert not updates.read(tmp_path).pending
    train_round(at, request_of(at.study, 2))
    assert updates.read(tmp_path).pending


def stop_after(step: int, error: type[BaseException]) -> progress.Listener:
    def stop(done: int, total: int) -> None:
        if done == step:
            raise error

    return stop


def test_rounds_that_a_crash_cut_off_never_cost_more_than_the_plan(tmp_path: Path) -> None:
    at = site_of(tmp_path)
    with pytest.raises(MemoryError), progress.listening(stop_after(1, MemoryError)):
        train_round(at, request_of(at.study, 1))
    assert spent(tmp_path) == 2  # over-counted, never under-counted
    assert not (tmp_path / STATE_FILE).exists()
    train_round(at, request_of(at.study, 1))
    assert spent(tmp_path) == 4
    train_round(at, request_of(at.study, 2))
    assert spent(tmp_path) == 6
    with pytest.raises(BudgetExhausted):
        train_round(at, request_of(at.study, 3))
    assert spent(tmp_path) == 6


@pytest.mark.parametrize("stopped_after", [1, 2])
def test_a_round_that_was_stopped_goes_on_under_its_own_charge(stopped_after: int, tmp_path: Path) -> None:
    at = site_of(tmp_path)
    request = request_of(at.study, 1)
    with pytest.raises(KeyboardInterrupt), progress.listening(stop_after(stopped_after, KeyboardInterrupt)):
        train_round(at, request)
    assert spent(tmp_path) == 2
    halfway = torch.load(tmp_path / STATE_FILE, weights_only=True)["discriminator"].numpy()
    assert (halfway != 0).any()
    made: list[int] = []
    with progress.listening(lambda done, total: made.append(done)):
        update = train_round(at, request)
    assert made == [2][stopped_after - 1 :]  # the step that was left, or none
    assert spent(tmp_path) == 2
    assert (parts(update, request)[1] != halfway).any() == (stopped_after == 1)
    # From another shared state nothing of it is used, and the round is charged anew.
    train_round(at, request_of(at.study, 1, seed=1))
    assert spent(tmp_path) == 4


def test_a_stopped_round_does_not_go_on_with_patients_who_were_not_charged(tmp_path: Path) -> None:
    at = site_of(tmp_path)
    request = request_of(at.study, 1)
    with pytest.raises(KeyboardInterrupt), progress.listening(stop_after(1, KeyboardInterrupt)):
        train_round(at, request)
    others = replace(cohort_of(), patient_ids=tuple(f"newcomer-{number}" for number in range(8)))
    with_others = site_of(tmp_path, cohort=others)
    made: list[int] = []
    with progress.listening(lambda done, total: made.append(done)):
        train_round(with_others, request)
    assert made == [1, 2]  # from its beginning, under a charge of its own
    first, second = Ledger(tmp_path, KEY).lines()
    assert first.data_set != second.data_set
    assert with_others.accountant is not None
    (history,) = Ledger(tmp_path, KEY).read().histories(with_others.accountant.data_set.patients)
    assert num_steps(history) == 2


def test_an_update_that_has_left_stays_so_when_the_next_one_was_never_saved_and_is_given_up(tmp_path: Path) -> None:
    at = site_of(tmp_path)
    first = train_round(at, request_of(at.study, 1))
    updates.note_left(tmp_path, first.id)
    updates.note_made(tmp_path, "another")  # killed before its state was saved
    updates.give_up(tmp_path)
    assert not updates.read(tmp_path).pending
    assert (train_round(at, request_of(at.study, 1)).vector != first.vector).any()
    assert spent(tmp_path) == 4


def test_the_last_round_takes_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 5 of 6 steps are spent: a round of two becomes a round of one.
    at = site_of(tmp_path)
    plan = make_plan(at.study)
    assert plan is not None and at.accountant is not None
    release = Release(at.study.digest, "", "run", 1, replace(plan.phases[0].mechanism, steps=5), 1.0)
    at.accountant.ledger.charge(at.accountant.data_set, release, at.accountant.budget)
    reports: list[tuple[int, int]] = []
    with progress.listening(lambda done, total: reports.append((done, total))):
        train_round(at, request_of(at.study))
    assert reports == [(1, 1)]
    assert spent(tmp_path) == 6


def test_a_lost_ledger_stops_the_site(tmp_path: Path) -> None:
    at = site_of(tmp_path)
    train_round(at, request_of(at.study, 1))
    (tmp_path / FILE_NAME).unlink()
    for request in (request_of(at.study, 1), request_of(at.study, 2)):
        with pytest.raises(LedgerError, match="is missing"):
            train_round(at, request)
    assert not (tmp_path / FILE_NAME).exists()


def test_a_new_ledger_beside_a_trained_state_stops_the_site(tmp_path: Path) -> None:
    at = site_of(tmp_path)
    train_round(at, request_of(at.study, 1))
    for path in tmp_path.glob("ledger*"):
        path.unlink()
    with pytest.raises(LedgerError, match="does not know"):
        train_round(site_of(tmp_path), request_of(at.study, 2))


def test_a_damaged_ledger_stops_the_site(tmp_path: Path) -> None:
    at = site_of(tmp_path)
    (tmp_path / FILE_NAME).write_text("{")
    with pytest.raises(LedgerError):
        train_round(at, request_of(study_of()))


def test_a_private_study_never_trains_without_a_ledger(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="no ledger"):
        train_round(replace(site_of(tmp_path), accountant=None), request_of(study_of()))


def test_a_budget_that_ends_in_the_middle_of_a_study_stops_the_site_before_it_draws_anyone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another study of the same patients has spent meanwhile: what the second would still add is refused, uncharged."""
    at = site_of(tmp_path)
    train_round(at, request_of(at.study, 1))
    other = study_of(privacy={"epsilon": 4.6, "sampling_probability": 1.0})
    account = account_in(tmp_path, other, cohort_of().patient_ids, Budget(5.0, 1e-5))
    assert account is not None
    account.charge_round(1)
    account.charge_round(2)
    with pytest.raises(OverBudget):
        account.charge_round(3)
    before = Ledger(tmp_path, KEY).lines()
    monkeypatch.setattr(training, "draw", None)
    with pytest.raises(OverBudget, match="epsilon"):
        train_round(at, request_of(at.study, 2))
    assert Ledger(tmp_path, KEY).lines() == before
    assert at.accountant is not None
    with pytest.raises(OverBudget):
        at.accountant.check_round(2)


def test_a_delta_too_large_for_the_site_stops_it_before_it_spends(tmp_path: Path) -> None:
    study = study_of(privacy={"delta": 0.009, "epsilon": 5.0, "sampling_probability": 1.0})
    study = study.with_changes("federation", contracted_patients={"north": 12})  # 1 / (10 x 12) is 0.0083
    at = site_of(tmp_path, study)
    with pytest.raises(PrivacyError, match="delta"):
        train_round(at, request_of(study))
    assert charged_in(tmp_path, study) == ()


def test_a_shared_state_of_another_shape_is_refused_before_anything_is_charged(tmp_path: Path) -> None:
    at = site_of(tmp_path)
    request = request_of(study_of(gan={"latent_size": 5}))
    with pytest.raises(BadPeer, match="parameters"):
        train_round(at, request)
    assert not (tmp_path / STATE_FILE).exists()
    assert charged_in(at.folder, at.study) == ()


def test_a_damaged_state_file_is_refused_with_a_remedy(tmp_path: Path) -> None:
    at = site_of(tmp_path)
    (tmp_path / STATE_FILE).write_bytes(b"half a file")
    with pytest.raises(SiteError, match="Delete it"):
        train_round(at, request_of(at.study))


def test_two_sites_with_one_study_seed_differ_in_noise_only(tmp_path: Path) -> None:
    # Equal seed, cohort (all drawn at q = 1, one image each) and shared state: what differs is the noise.
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        torch.manual_seed(0)
        at = site_of(tmp_path / name, cohort=cohort_of((1,) * 8))
        made.append(train_round(at, request_of(at.study)))
    (generators, discriminators) = zip(*(parts(each, request_of(study_of())) for each in made), strict=True)
    assert (discriminators[0] != discriminators[1]).mean() > 0.3
    assert (generators[0] != generators[1]).any()


def test_without_privacy_nothing_is_charged_and_everything_repeats(tmp_path: Path) -> None:
    study = study_of(privacy={"enabled": False, "sampling_probability": 1.0})
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        at = site_of(tmp_path / name, study, cohort_of((1,) * 8))
        made.append(train_round(at, request_of(study)))
        assert not (tmp_path / name / FILE_NAME).exists()
    np.testing.assert_allclose(made[0].vector, made[1].vector, atol=1e-6)


def test_optimizers_go_on_where_the_site_left_them(tmp_path: Path) -> None:
    at = site_of(tmp_path)
    train_round(at, request_of(at.study, 1))
    train_round(at, request_of(at.study, 2))
    state = torch.load(tmp_path / STATE_FILE, weights_only=True)
    for name in ("generator_optimizer", "discriminator_optimizer"):
        assert {int(entry["step"]) for entry in state[name]["state"].values()} == {4}


def test_the_saved_state_is_for_the_site_alone(tmp_path: Path) -> None:
    train_round(site_of(tmp_path), request_of(study_of()))
    assert (tmp_path / STATE_FILE).stat().st_mode & 0o077 == 0


def test_the_expected_batch_is_public() -> None:
    # q times the contracted number, never the number found: 0.25 x 8 = 2, 0.01 x 8 rounds to 0 and becomes 1.
    for q, expected in ((0.25, 2), (1.0, 8), (0.01, 1)):
        study = study_of(privacy={"sampling_probability": q})
        for cohort in (cohort_of(), cohort_of((1, 2)), cohort_of((5,) * 12)):
            assert site_of(Path(), study, cohort).expected_batch_size == expected


def test_a_draw_groups_images_by_patient_up_to_the_limit() -> None:
    batch = training.draw(site_of(Path()))
    # q = 1 and 3 images a patient at most: 1, 3, 2, 3, 1, 3, 2, 1 rows in this order.
    expected = np.repeat(np.arange(8), [min(count, 3) for count in IMAGES])
    np.testing.assert_array_equal(batch.owner, expected)
    np.testing.assert_array_equal(np.rint((batch.images[:, 0, 0, 0] + 1) * 127.5), 20 * expected + 10)
    assert batch.labels.shape == batch.owner.shape


def test_a_draws_owners_are_positions_in_the_draw() -> None:
    study = study_of(privacy={"sampling_probability": 0.5, "images_per_patient": 3})
    sizes = set()
    for _ in range(30):
        batch = training.draw(site_of(Path(), study))
        positions = sorted(set(batch.owner.tolist()))
        assert positions == list(range(len(positions)))
        values = [set(batch.images[batch.owner == each, 0, 0, 0].tolist()) for each in positions]
        assert all(len(value) == 1 for value in values)  # one patient's images each
        sizes.add(len(positions))
    assert len(sizes) > 1


def test_an_empty_draw_is_trained_and_charged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "draw_patients", lambda num_patients, q: np.zeros(0, np.intp))
    at = site_of(tmp_path)
    assert training.draw(at).images.shape == (0, 1, 28, 28)
    request = request_of(at.study)
    update = train_round(at, request)
    assert spent(tmp_path) == 2
    assert (parts(update, request)[1] != 0).mean() > 0.9


def test_every_step_draws_patients_afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, float]] = []
    draw = training.draw_patients

    def counting(num_patients: int, q: float) -> Any:
        calls.append((num_patients, q))
        return draw(num_patients, q)

    monkeypatch.setattr(training, "draw_patients", counting)
    train_round(site_of(tmp_path), request_of(study_of()))
    assert calls == [(8, 1.0), (8, 1.0)]


def test_two_processes_release_one_update_under_one_charge(tmp_path: Path) -> None:
    # Both are asked for the same round at once: one trains, the other waits and repeats the answer.
    at = site_of(tmp_path)
    request = request_of(at.study, 1)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: train_round(at, request), range(2))
    assert_same(first, second)
    assert spent(tmp_path) == 2


# ---------------------------------------------------------------- phases

TWO = study_of(
    federation={
        "phase": [
            {"algorithm": "local", "share": 0.5, "rounds": 2, "steps": 2},
            {"algorithm": "local", "share": 0.5, "rounds": 2, "steps": 3},
        ]
    }
)
"""Four steps, then six with noise of their own."""


def test_every_round_is_charged_and_noised_as_its_phase_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at, plan, stddevs = site_of(tmp_path, TWO), make_plan(TWO), []
    step = GanTrainer.discriminator_step

    def reading(self: GanTrainer, real: RealBatch) -> Any:
        stddevs.append(self.discriminator_optimizer.noise_stddev)  # type: ignore[attr-defined]
        return step(self, real)

    monkeypatch.setattr(GanTrainer, "discriminator_step", reading)
    for number in (1, 2, 3, 4):
        train_round(at, request_of(TWO, number))
    assert plan is not None
    first, second = plan.phases
    assert charged_in(tmp_path, TWO) == (first.mechanism, second.mechanism)
    assert stddevs == [first.noise_stddev] * 4 + [second.noise_stddev] * 6
    assert first.noise_stddev < 0.95 * second.noise_stddev
    lines = [(line.round, line.steps, line.noise_multiplier) for line in Ledger(tmp_path, KEY).lines()]
    assert lines == [
        (1, 2, first.mechanism.noise_multiplier),
        (2, 2, first.mechanism.noise_multiplier),
        (3, 3, second.mechanism.noise_multiplier),
        (4, 3, second.mechanism.noise_multiplier),
    ]


def test_a_phase_that_is_spent_leaves_the_next_one_whole(tmp_path: Path) -> None:
    """Two rounds of the first phase were lost to crashes: its other rounds are refused, the next phase's made."""
    at = site_of(tmp_path, TWO)
    assert at.accountant is not None
    for number in (1, 1):
        at.accountant.charge_round(number)
    for number in (1, 2):
        with pytest.raises(BudgetExhausted, match="All 4 steps .* phase 1 are spent"):
            at.accountant.check_round(number)
        with pytest.raises(BudgetExhausted):
            train_round(at, request_of(TWO, number))
    at.accountant.check_round(3)
    for number in (3, 4):
        train_round(at, request_of(TWO, number))
    assert charged_in(tmp_path, TWO) == make_plan(TWO).history  # type: ignore[union-attr]
    with pytest.raises(BudgetExhausted, match="All 6 steps .* phase 2 are spent"):
        at.accountant.check_round(4)


def test_optimizers_go_on_through_phases(tmp_path: Path) -> None:
    at = site_of(tmp_path, TWO)
    for number in (2, 3):
        train_round(at, request_of(TWO, number))
    state = torch.load(tmp_path / STATE_FILE, weights_only=True)
    assert {int(entry["step"]) for entry in state["discriminator_optimizer"]["state"].values()} == {2 + 3}


def test_a_round_of_another_algorithm_is_refused_before_anything_is_charged(tmp_path: Path) -> None:
    federation = {"phase": [{"algorithm": "moments", "share": 0.5}, {"algorithm": "local", "share": 0.5, "steps": 2}]}
    study = study_of(federation=federation)
    at = site_of(tmp_path, study)
    with pytest.raises(BadPeer, match="asks for local in round 1, which is one of moments"):
        train_round(at, request_of(study, 1))
    assert charged_in(tmp_path, study) == ()
    train_round(at, request_of(study, 2))
    assert num_steps(charged_in(tmp_path, study)) == 2


def test_without_privacy_a_round_has_the_steps_of_its_phase(tmp_path: Path) -> None:
    study = TWO.with_changes("privacy", enabled=False)
    reports: list[tuple[int, int]] = []
    for number in (2, 3):
        with progress.listening(lambda done, total: reports.append((done, total))):
            train_round(site_of(tmp_path, study), request_of(study, number))
    assert reports == [(1, 2), (2, 2), (1, 3), (2, 3), (3, 3)]
