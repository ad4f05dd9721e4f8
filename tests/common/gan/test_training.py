"""A discriminator step by hand, and what of it must not depend on who was drawn."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from common.gan import losses
from common.gan.parameters import to_vector
from common.gan.training import GanTrainer, RealBatch, _pieces
from common.privacy import gradient, noise
from common.privacy.gradient import ROUNDING_MARGIN
from common.privacy.sampling import ByteSource, draw_patients
from tests.common.gan.trainers import CPU, DEVICES, batch, images, movement, reading_trainer, small_plan, small_study
from tests.common.privacy.sources import Counted, seeded
from tests.strategies import owners

LABELS = {"label_column": "group", "labels": ["ill", "well", "other"]}


def gradient_of_row(trainer: GanTrainer, image: Tensor, label: int, real: bool) -> Tensor:
    """One image's gradient by torch's own autograd, (dim,) float64."""
    parameters = list(trainer.discriminator.parameters())
    logits = trainer.discriminator(image[None], torch.tensor([label]))
    loss = losses.real_loss if real else losses.fake_loss
    row = loss(trainer.study.gan.loss, logits).sum()
    return torch.cat([part.double().flatten() for part in torch.autograd.grad(row, parameters)])


def clipped(vector: Tensor, clip_norm: float) -> Tensor:
    # Opacus: min(1, C / (norm + 1e-6)), with C a rounding margin inside the bound.
    return vector * min(1.0, clip_norm * (1 - ROUNDING_MARGIN) / (float(vector.norm()) + 1e-6))


@pytest.mark.parametrize("clip_norm", [1e-2, 1e3])
@pytest.mark.parametrize("loss", ["non_saturating", "hinge", "least_squares"])
def test_the_sum_by_hand(loss: str, clip_norm: float) -> None:
    # Each owner's vector is the mean over their rows, clipped once: patients of 1 and 3 images, 4 fakes.
    study = small_study(image=LABELS, gan={"loss": loss, "discriminator_normalization": "group"})
    trainer = reading_trainer(study, clip_norm=clip_norm)
    patients = [images(study, 1, seed=1), images(study, 3, seed=2)]
    total, _ = movement(trainer, batch(study, patients, [2, 1]))

    trainer.random.manual_seed(99)  # as movement() does
    with torch.no_grad():
        fakes, fake_labels = trainer.draw_fakes(4)
    expected = sum(
        clipped(gradient_of_row(trainer, fake, int(label), real=False), clip_norm)
        for fake, label in zip(fakes, fake_labels, strict=True)
    )
    for patient, label in zip(patients, (2, 1), strict=True):
        rows = [gradient_of_row(trainer, torch.from_numpy(row), label, real=True) for row in patient]
        expected = expected + clipped(torch.stack(rows).mean(dim=0), clip_norm)
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-6 * clip_norm)


def test_repeating_all_images_of_a_patient_changes_nothing() -> None:
    study = small_study()
    trainer = reading_trainer(study, clip_norm=1e3)
    once, twice = images(study, 3, seed=1), np.repeat(images(study, 3, seed=1), 2, axis=0)
    a, _ = movement(trainer, batch(study, [once]))
    b, _ = movement(trainer, batch(study, [twice]))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_fakes", [1, 2, 8])
def test_the_divisor_is_the_number_of_fakes_whoever_was_drawn(num_fakes: int) -> None:
    # SGD with rate 1 moves the parameters by sum / num_fakes: nobody, one and three patients divide alike.
    study = small_study()
    for count in (0, 1, 3):
        drawn = batch(study, [images(study, 2, seed=patient) for patient in range(count)])
        reader = reading_trainer(study, num_fakes=num_fakes)
        total, _ = movement(reader, drawn)
        trainer = reading_trainer(study, num_fakes=num_fakes)
        optimizer = torch.optim.SGD(trainer.discriminator.parameters(), lr=1.0)
        trainer.discriminator_optimizer.original_optimizer = optimizer  # type: ignore[attr-defined]
        before = to_vector(trainer.discriminator)
        trainer.random.manual_seed(99)
        trainer.discriminator_step(drawn)
        moved = to_vector(trainer.discriminator) - before
        np.testing.assert_allclose(moved, -total.numpy() / num_fakes, atol=1e-6)


def test_patients_add_up() -> None:
    # f(A and B) + f(nobody) = f(A) + f(B): no factor depends on how many were drawn.
    study = small_study()
    trainer = reading_trainer(study)
    first, second = images(study, 2, seed=1), images(study, 5, seed=2)
    both, _ = movement(trainer, batch(study, [first, second]))
    nobody, _ = movement(trainer, batch(study, []))
    one, _ = movement(trainer, batch(study, [first]))
    other, _ = movement(trainer, batch(study, [second]))
    torch.testing.assert_close(both + nobody, one + other, rtol=1e-5, atol=1e-6)


def test_pieces_do_not_change_the_sum() -> None:
    patients = [3, 1, 9, 2]
    sums = []
    for max_images in (1, 4, 10, 256):
        study = small_study(performance={"max_images_at_once": max_images})
        drawn = batch(study, [images(study, count, seed=count) for count in patients])
        sums.append(movement(reading_trainer(study), drawn)[0])
    for total in sums[1:]:
        torch.testing.assert_close(total, sums[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_patients", [0, 1, 5])
def test_the_number_of_fakes_does_not_depend_on_the_draw(num_patients: int, monkeypatch: pytest.MonkeyPatch) -> None:
    study = small_study()
    trainer = reading_trainer(study, num_fakes=6)
    counts: list[int] = []
    draw = trainer.draw_fakes
    monkeypatch.setattr(trainer, "draw_fakes", lambda count: counts.append(count) or draw(count))
    trainer.discriminator_step(batch(study, [images(study, 2, seed=patient) for patient in range(num_patients)]))
    assert counts == [6]


def test_labels_of_fakes_are_uniform() -> None:
    trainer = reading_trainer(small_study(image=LABELS))
    with torch.no_grad():
        _, drawn = trainer.draw_fakes(3000)
    counts = np.bincount(drawn.numpy(), minlength=3)
    assert len(counts) == 3
    assert stats.chisquare(counts).pvalue > 1e-4


def test_an_empty_draw_is_a_step_with_noise() -> None:
    study = small_study()
    trainer = reading_trainer(study, noise_stddev=3.0)
    empty = batch(study, [])
    with_noise, _ = movement(trainer, empty)
    without, _ = movement(reading_trainer(study), empty)
    noise = (with_noise - without).numpy()
    # The standard deviation of n squares' mean is sqrt(2 / n): 5 of them.
    assert abs(noise.var() / 9 - 1) < 5 * np.sqrt(2 / len(noise))


def chi_square_of_empty_steps(device: torch.device, steps: int = 50) -> tuple[float, int]:
    """Sum of squares of what the plan's noise adds to the sums of empty batches, in units of its variance; and how many
    squares. The bytes are the same in every run."""
    study = small_study()
    plan = small_plan(clip_norm=2.0, noise_multiplier=1.5)
    trainer = reading_trainer(study, clip_norm=2.0, noise_stddev=plan.noise_stddev, device=device)
    trainer.discriminator_optimizer.source = seeded(1)  # type: ignore[attr-defined]
    silent, _ = movement(reading_trainer(study, clip_norm=2.0, device=device), batch(study, []))
    added = torch.cat([movement(trainer, batch(study, []))[0] - silent for _ in range(steps)])
    return float((added / 3.0).square().sum()), len(added)


@pytest.mark.parametrize("device", DEVICES)
def test_chi_square_of_empty_batches_tells_right_noise_from_noise_3_percent_too_low(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 50 steps of 981 coordinates: a relative deviation of sqrt(2 / 49050) = 0.64 %. 3 % less noise is 5.9 % less
    # variance, 9 deviations; the interval ends at 4.4.
    total, count = chi_square_of_empty_steps(device)
    assert count == 50 * 981
    low, high = stats.chi2.interval(1 - 1e-5, count)
    assert low < total < high

    def weaker(reference: Tensor, stddev: float, source: ByteSource) -> Tensor:
        return noise.gaussian_noise(reference, 0.97 * stddev, source)

    monkeypatch.setattr(gradient, "gaussian_noise", weaker)
    assert chi_square_of_empty_steps(device)[0] < low


def test_every_step_of_a_run_is_noised_and_counted_whoever_was_drawn() -> None:
    # 5 patients at 0.2: a third of the draws are empty, 0.8^5 = 0.33.
    study = small_study()
    trainer = GanTrainer(study, CPU, small_plan(), 4, seed=1)
    optimizer: Any = trainer.discriminator_optimizer
    coins, drawn, asked = seeded(2), [], []
    for step in range(1, 31):
        patients = draw_patients(5, 0.2, coins).tolist()
        optimizer.source = Counted()
        before = to_vector(trainer.discriminator)
        trainer.discriminator_step(batch(study, [images(study, 1 + patient, seed=patient) for patient in patients]))
        drawn.append(len(patients))
        asked.append(sum(optimizer.source.asked))
        assert (to_vector(trainer.discriminator) != before).mean() > 0.99
        assert {int(state["step"]) for state in optimizer.original_optimizer.state.values()} == {step}
    assert drawn.count(0) >= 3
    assert max(drawn) >= 2
    assert set(asked) == {981 * 32}  # 4 normals of 8 bytes a coordinate: the same at every step


def test_two_runs_with_one_seed_differ_in_their_noise_alone() -> None:
    study = small_study()
    runs = []
    for noise_stddev in (0.0, 0.0, 1.0, 1.0):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        trainer = GanTrainer(study, CPU, small_plan(), 4, seed=3)
        trainer.discriminator_optimizer.noise_stddev = noise_stddev  # type: ignore[attr-defined]
        for patients in ([0], [], [0, 1]):
            trainer.discriminator_step(batch(study, [images(study, 2, seed=patient) for patient in patients]))
            trainer.generator_step()
        runs.append(to_vector(trainer.discriminator))
    np.testing.assert_array_equal(runs[0], runs[1])
    assert (runs[2] != runs[3]).mean() > 0.99


@pytest.mark.parametrize("max_images", [2, 256])
def test_noise_is_added_once_a_step_however_many_calls(max_images: int) -> None:
    study = small_study(performance={"max_images_at_once": max_images})
    drawn = batch(study, [images(study, 2, seed=patient) for patient in range(5)])
    with_noise, _ = movement(reading_trainer(study, noise_stddev=3.0), drawn)
    without, _ = movement(reading_trainer(study), drawn)
    noise = (with_noise - without).numpy()
    assert abs(noise.var() / 9 - 1) < 5 * np.sqrt(2 / len(noise))


def test_one_seed_gives_one_network_and_two_noises() -> None:
    study = small_study()
    drawn = batch(study, [images(study, 2, seed=1)])
    sums = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        trainer = reading_trainer(study, noise_stddev=1.0, seed=3)
        sums.append(movement(trainer, drawn)[0])
    assert not torch.isclose(sums[0], sums[1]).any()


def test_the_plan_sets_the_noise() -> None:
    # noise_multiplier 1.5 at clip_norm 4: standard deviation 6 on the sum.
    trainer = GanTrainer(small_study(), CPU, small_plan(clip_norm=4.0, noise_multiplier=1.5), 4, seed=1)
    assert trainer.discriminator_optimizer.noise_stddev == 6.0  # type: ignore[attr-defined]


def test_weights_follow_the_seed_and_nothing_else() -> None:
    study = small_study(gan={"discriminator_normalization": "group"})
    vectors = []
    for seed, torch_seed in ((5, 0), (5, 1), (6, 0)):
        torch.manual_seed(torch_seed)
        trainer = GanTrainer(study, CPU, None, 4, seed)
        vectors.append(np.concatenate([to_vector(trainer.generator), to_vector(trainer.discriminator)]))
    np.testing.assert_array_equal(vectors[0], vectors[1])
    assert (vectors[0] != vectors[2]).any()


def test_a_failing_source_stops_the_step_before_the_parameters_change() -> None:
    def broken(count: int) -> bytes:
        raise OSError("no randomness")

    study = small_study()
    trainer = GanTrainer(study, CPU, small_plan(), 4, seed=1)
    trainer.discriminator_optimizer.source = broken  # type: ignore[attr-defined]
    before = to_vector(trainer.discriminator)
    with pytest.raises(OSError, match="no randomness"):
        trainer.discriminator_step(batch(study, [images(study, 2, seed=1)]))
    np.testing.assert_array_equal(to_vector(trainer.discriminator), before)


@pytest.mark.parametrize("fails_at_piece", [1, 2])
def test_a_step_that_broke_off_leaves_nothing_to_the_next(fails_at_piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # 3 patients of 2 images in calls of 2: the sum of the first calls must not stay in the optimizer.
    study = small_study(performance={"max_images_at_once": 2})
    drawn = batch(study, [images(study, 2, seed=patient) for patient in range(3)])
    expected, _ = movement(reading_trainer(study), drawn)
    trainer = reading_trainer(study)
    calls = [0]
    row_losses = trainer._row_losses

    def breaking(piece: object) -> Tensor:
        calls[0] += 1
        if calls[0] == fails_at_piece + 1:
            raise MemoryError
        return row_losses(piece)  # type: ignore[arg-type]

    monkeypatch.setattr(trainer, "_row_losses", breaking)
    with pytest.raises(MemoryError):
        trainer.discriminator_step(drawn)
    total, _ = movement(trainer, drawn)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-7)


def test_noise_that_failed_leaves_nothing_to_the_next_step() -> None:
    study = small_study(performance={"max_images_at_once": 2})
    drawn = batch(study, [images(study, 2, seed=patient) for patient in range(3)])
    expected, _ = movement(reading_trainer(study), drawn)
    trainer = reading_trainer(study)
    optimizer = trainer.discriminator_optimizer
    working = optimizer.source  # type: ignore[attr-defined]
    optimizer.source = lambda count: b""  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="random source"):
        trainer.discriminator_step(drawn)
    optimizer.source = working  # type: ignore[attr-defined]
    total, _ = movement(trainer, drawn)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-7)


def test_the_generator_reads_no_real_image() -> None:
    # The same discriminator, different last batches: the generator's step is the same to the last bit.
    study = small_study()
    results = []
    for seed, count in ((1, 1), (2, 7)):
        trainer = reading_trainer(study)
        movement(trainer, batch(study, [images(study, count, seed=seed)]))
        before = to_vector(trainer.generator)
        trainer.generator_step()
        results.append(to_vector(trainer.generator))
        assert (results[-1] != before).any()
    np.testing.assert_array_equal(results[0], results[1])


def test_the_generator_step_leaves_the_discriminator_alone() -> None:
    study = small_study()
    trainer = GanTrainer(study, CPU, small_plan(), 4, seed=1)
    trainer.discriminator_step(batch(study, [images(study, 2, seed=1)]))
    before = to_vector(trainer.discriminator)
    trainer.generator_step()
    np.testing.assert_array_equal(to_vector(trainer.discriminator), before)
    for parameter in trainer.discriminator.parameters():
        assert parameter.requires_grad
        assert parameter.grad is None
        assert parameter.grad_sample is None  # type: ignore[attr-defined]


def test_without_privacy_a_patient_still_counts_once() -> None:
    # Means over a patient's images, divided by the number of fakes; nothing is clipped.
    study = small_study()
    trainer = GanTrainer(study, CPU, None, 4, seed=1)
    trainer.discriminator_optimizer = torch.optim.SGD(trainer.discriminator.parameters(), lr=1.0)
    patients = [images(study, 1, seed=1), images(study, 3, seed=2)]
    private = reading_trainer(study, clip_norm=1e6)
    before = to_vector(trainer.discriminator)
    np.testing.assert_array_equal(before, to_vector(private.discriminator))
    total, _ = movement(private, batch(study, patients))
    trainer.random.manual_seed(99)
    trainer.discriminator_step(batch(study, patients))
    np.testing.assert_allclose(to_vector(trainer.discriminator) - before, -total.numpy() / 4, atol=1e-6)


def test_a_toy_is_learned_without_privacy() -> None:
    # Every real image is 0.8 everywhere; fakes start near 0 and must move most of the way.
    study = small_study(
        gan={
            "generator_width": 8,
            "generator_batch_size": 16,
            "generator_learning_rate": 2e-3,
            "discriminator_learning_rate": 2e-3,
        }
    )
    trainer = GanTrainer(study, CPU, None, 16, seed=1)
    bright = batch(study, [np.full((1, 1, 28, 28), 0.8, np.float32)] * 16)

    def mean_fake() -> float:
        with torch.no_grad():
            return float(trainer.draw_fakes(64)[0].mean())

    start = mean_fake()
    for _ in range(60):
        trainer.discriminator_step(bright)
        trainer.generator_step()
    assert abs(start) < 0.3
    assert abs(mean_fake() - 0.8) < 0.3


@given(owners(), st.integers(0, 9), st.integers(1, 15))
def test_pieces_hold_every_row_once_and_split_no_patient(
    owner: NDArray[np.int64], num_fakes: int, max_images: int
) -> None:
    rows = len(owner)
    # Row r's image holds r, fake f's holds -1 - f, so that order and identity can be read back.
    values = np.arange(rows, dtype=np.float32).reshape(-1, 1, 1, 1)
    fakes = (-1 - torch.arange(num_fakes, dtype=torch.float32)).view(-1, 1, 1, 1)
    real = RealBatch(values, np.arange(rows, dtype=np.int64), owner)
    pieces = _pieces(real, fakes, torch.arange(num_fakes) + 1000, max_images)

    seen = [float(value) for piece in pieces for value in piece.images.flatten()]
    assert seen == [float(row) for row in range(rows)] + [float(-1 - fake) for fake in range(num_fakes)]
    labels = [int(label) for piece in pieces for label in piece.labels]
    assert labels == [*range(rows), *range(1000, 1000 + num_fakes)]

    patients_seen: list[int] = []
    for piece in pieces:
        assert len(piece.images) == len(piece.labels) == len(piece.owner) >= 1
        assert len(piece.images) <= max_images or piece.num_owners == 1
        # Owners count from 0 without gaps, and every one has a row.
        assert piece.owner.unique().tolist() == list(range(piece.num_owners))
        assert (piece.owner.diff() >= 0).all()
        is_real = piece.images.flatten() >= 0
        assert int(is_real.sum()) == piece.num_real
        assert is_real[: piece.num_real].all()
        whose = owner[piece.images.flatten()[is_real].long().numpy()]
        patients_seen += sorted(set(whose.tolist()))
        np.testing.assert_array_equal(piece.owner[is_real].numpy(), whose - (whose[0] if len(whose) else 0))
    assert patients_seen == list(range(len(set(owner.tolist()))))
