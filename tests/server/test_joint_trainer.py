"""``joint`` is pooled DP-SGD: with equal draws and no noise, sites and server together step as one trainer does."""

from dataclasses import astuple
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from client.real_half import real_half
from common.config import StudyConfig
from common.gan import losses, networks
from common.gan.parameters import load_vector, to_vector
from common.gan.training import GanTrainer, RealBatch
from common.privacy.gradient import ROUNDING_MARGIN, PatientOptimizer
from common.privacy.shared_noise import SharedNoise, noisy_integers, shared_noise
from common.secagg.encoding import Encoding, decode_integers, encode_integers
from server.aggregation import GanState
from server.joint_trainer import RATES, JointTrainer, StepRate, threshold_for
from tests.common.gan.trainers import CPU, DEVICES, batch, images, small_plan, small_study
from tests.common.privacy.sources import seeded

LABELS = {"label_column": "group", "labels": ["ill", "well", "other"]}
BATCH = 6


def study_of(steps: int = 1, max_images: int = 256, **gan: Any) -> StudyConfig:
    return small_study(
        image=LABELS,
        gan={"discriminator_steps_per_generator_step": steps, "ema_decay": 0.9, **gan},
        performance={"max_images_at_once": max_images},
    )


def pooled_trainer(study: StudyConfig, clip_norm: float, device: torch.device = CPU) -> GanTrainer:
    """The trainer of one party that has everybody's patients; without noise."""
    trainer = GanTrainer(study, device, small_plan(clip_norm), BATCH, seed=1)
    optimizer = trainer.discriminator_optimizer
    assert isinstance(optimizer, PatientOptimizer)
    optimizer.noise_stddev = 0.0
    return trainer


def state_of(trainer: GanTrainer) -> GanState:
    generator = to_vector(trainer.generator)
    return GanState(0, generator, to_vector(trainer.discriminator), generator)


def joint_trainer(study: StudyConfig, state: GanState, clip_norm: float, device: torch.device = CPU) -> JointTrainer:
    return JointTrainer(study, state, BATCH, clip_norm, device, seed=2)


def with_rate_one(optimizer_of: nn.Module) -> torch.optim.Optimizer:
    """Moves the parameters by the gradient itself, which the test reads off."""
    return torch.optim.SGD(optimizer_of.parameters(), lr=1.0)


def drawn_patients(study: StudyConfig, step: int) -> tuple[list[NDArray[np.float32]], list[int]]:
    """Seven patients of 1 to 4 images each, an outlier among them."""
    patients = [images(study, 1 + number % 4, seed=10 * step + number) for number in range(6)]
    patients.append(images(study, 2, seed=10 * step + 6, scale=1e3))
    return patients, [number % 3 for number in range(7)]


def spread(study: StudyConfig, step: int, num_sites: int) -> tuple[RealBatch, list[RealBatch]]:
    """One draw: all of it, and by site. With five sites one has nobody."""
    patients, labels = drawn_patients(study, step)
    parts = np.array_split(np.arange(7), num_sites) if num_sites < 5 else [[0], [], [1, 2], [3, 4, 5], [6]]
    by_site = [batch(study, [patients[n] for n in part], [labels[n] for n in part]) for part in parts]
    return batch(study, patients, labels), by_site


def through_the_sum(
    study: StudyConfig, trainer: JointTrainer, by_site: list[RealBatch], noise: SharedNoise, clip_norm: float
) -> NDArray[np.float64]:
    """What the server gets of a step: sites' halves as integers, added in words, decoded."""
    discriminator = networks.build_discriminator(study)
    load_vector(discriminator, trainer.discriminator)
    encoding = Encoding(1.0, noise.fraction_bits, 32)
    length = len(trainer.discriminator)
    total = np.zeros(encoding.num_words(length), np.uint64)
    for real in by_site:
        half = real_half(study, discriminator, real, clip_norm, CPU)
        total += encode_integers(noisy_integers(half, noise), encoding)
    return decode_integers(total, encoding, length) * 2.0**-noise.fraction_bits


# ------------------------------------------------------------ equal to pooled DP-SGD


@pytest.mark.parametrize("num_sites", [1, 3, 5])
def test_the_sum_of_sites_is_that_of_all_patients_to_half_a_step_a_site(num_sites: int) -> None:
    # A call for each patient, so that float32 gives each the same vector wherever they are: only rounding is left.
    study = study_of(max_images=1)
    trainer = joint_trainer(study, state_of(pooled_trainer(study, 1.0)), 1.0)
    everyone, by_site = spread(study, 1, num_sites)
    length = len(trainer.discriminator)
    noise = SharedNoise(shared_noise(None, length, 100, num_sites, 1).fraction_bits, 0, 1.0)
    discriminator = networks.build_discriminator(study)
    load_vector(discriminator, trainer.discriminator)
    exact = real_half(study, discriminator, everyone, 1.0, CPU)
    summed = through_the_sum(study, trainer, by_site, noise, 1.0)
    assert np.abs(summed - exact).max() <= num_sites / 2 * 2.0**-noise.fraction_bits
    assert np.abs(exact).max() > 1e4 * 2.0**-noise.fraction_bits


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_sites", [1, 3, 5])
@pytest.mark.parametrize("clip_norm", [1e-2, 1.0, 1e3])
@pytest.mark.parametrize("loss", ["non_saturating", "hinge", "least_squares"])
def test_a_gradient_is_the_pooled_one(loss: str, clip_norm: float, num_sites: int, device: torch.device) -> None:
    study = study_of(steps=10, loss=loss, discriminator_normalization="group")
    pooled = pooled_trainer(study, clip_norm, device)
    joint = joint_trainer(study, state_of(pooled), clip_norm, device)
    start = joint.discriminator.astype(np.float64)
    pooled.discriminator_optimizer.original_optimizer = with_rate_one(pooled.discriminator)  # type: ignore[attr-defined]
    joint._gan.discriminator_optimizer = with_rate_one(joint._gan.discriminator)
    everyone, by_site = spread(study, 1, num_sites)
    noise = shared_noise(None, len(start), 100, num_sites, 1)
    noise = SharedNoise(noise.fraction_bits - int(np.log2(max(clip_norm, 1))), 0, 1.0)

    pooled.random.manual_seed(7)
    pooled.discriminator_step(everyone)
    joint._gan.random.manual_seed(7)  # the same fakes
    joint.step(through_the_sum(study, joint, by_site, noise, clip_norm))

    # Half a step a site and coordinate; and float32: a gradient of up to 13 owners' (norm clip_norm each, if they are
    # clipped), known to 2^-20 of the norm of their sum, and the parameters' own last bits twice.
    moved = to_vector(pooled.discriminator) - start
    float32 = 2.0**-20 * np.linalg.norm(moved) + 2.0**-23 * np.abs(start)
    bound = num_sites / 2 * 2.0**-noise.fraction_bits / BATCH + float32
    assert (np.abs(joint.discriminator - to_vector(pooled.discriminator)) <= bound).all()
    assert np.linalg.norm(moved) > 100 * np.linalg.norm(bound)


@pytest.mark.parametrize("num_sites", [1, 3, 5])
def test_an_adam_step_is_the_pooled_one(num_sites: int) -> None:
    # Adam's first step is rate * g / (|g| + 1e-8): rounding by r moves it by at most 2 r / |g| of the rate.
    study = study_of(steps=10)
    pooled = pooled_trainer(study, 1.0)
    joint = joint_trainer(study, state_of(pooled), 1.0)
    everyone, by_site = spread(study, 1, num_sites)
    noise = SharedNoise(shared_noise(None, len(joint.discriminator), 100, num_sites, 1).fraction_bits, 0, 1.0)
    total = through_the_sum(study, joint, by_site, noise, 1.0)
    for trainer in (pooled, joint._gan):
        trainer.random.manual_seed(7)
    gradient = (total + joint.fake_half()) / BATCH
    joint._gan.random.manual_seed(7)
    before = joint.discriminator
    joint.step(total)
    pooled.discriminator_step(everyone)
    rounding = num_sites / 2 * 2.0**-noise.fraction_bits / BATCH + 2.0**-20 * np.linalg.norm(gradient)
    clear = np.abs(gradient) > 20 * rounding
    assert clear.mean() > 0.9
    rate = study.gan.discriminator_learning_rate
    apart = np.abs(joint.discriminator - to_vector(pooled.discriminator))[clear]
    assert (apart <= rate * 2 * rounding / np.abs(gradient[clear]) + 2.0**-23 * np.abs(before[clear])).all()
    assert np.abs(joint.discriminator - before)[clear].min() > 0.9 * rate


@pytest.mark.parametrize("num_sites", [1, 3, 5])
def test_several_steps_of_both_networks_are_the_pooled_ones(num_sites: int) -> None:
    # Plain descent: Adam would step by its whole rate in any direction where a gradient is as small as its rounding.
    study = study_of(steps=2)
    pooled = pooled_trainer(study, 1.0)
    joint = joint_trainer(study, state_of(pooled), 1.0)
    start, average = state_of(pooled), to_vector(pooled.generator)
    noise = SharedNoise(shared_noise(None, len(start.discriminator), 100, num_sites, 1).fraction_bits, 0, 1.0)
    for trainer in (pooled, joint._gan):
        trainer.random.manual_seed(3)
        trainer.generator_optimizer = torch.optim.SGD(trainer.generator.parameters(), lr=0.1)
    joint._gan.discriminator_optimizer = torch.optim.SGD(joint._gan.discriminator.parameters(), lr=0.1)
    optimizer: Any = pooled.discriminator_optimizer
    optimizer.original_optimizer = torch.optim.SGD(pooled.discriminator.parameters(), lr=0.1)
    for step in range(6):
        everyone, by_site = spread(study, step, num_sites)
        joint.step(through_the_sum(study, joint, by_site, noise, 1.0))
        pooled.discriminator_step(everyone)
        if step % 2 == 1:
            pooled.draw_fakes(study.gan.generator_batch_size)  # the server looks at the accuracy on these
            pooled.generator_step()
            average = np.float32(0.9) * average + (1 - np.float32(0.9)) * to_vector(pooled.generator)
    found, expected = joint.state(6), state_of(pooled)
    for mine, theirs, before in (
        (found.discriminator, expected.discriminator, start.discriminator),
        (found.generator, expected.generator, start.generator),
        (found.generator_average, average, start.generator),
    ):
        assert np.linalg.norm(mine - theirs) < 2e-4 * np.linalg.norm(theirs - before)
    assert found.round == 6


def test_the_fakes_half_by_hand() -> None:
    # Each fake's own gradient, clipped like a patient's, and added.
    study = study_of()
    joint = joint_trainer(study, state_of(pooled_trainer(study, 1.0)), 0.05)
    joint._gan.random.manual_seed(5)
    half = joint.fake_half()
    joint._gan.random.manual_seed(5)
    with torch.no_grad():
        fakes, labels = joint._gan.draw_fakes(BATCH)
    parameters = list(joint._gan.discriminator.parameters())
    expected, norms = np.zeros(len(half)), []
    for row in range(BATCH):
        logits = joint._gan.discriminator(fakes[row : row + 1], labels[row : row + 1])
        loss = losses.fake_loss(study.gan.loss, logits).sum()
        vector = np.concatenate([part.double().flatten() for part in torch.autograd.grad(loss, parameters)])
        norms.append(np.linalg.norm(vector))
        expected += vector * min(1.0, 0.05 * (1 - ROUNDING_MARGIN) / (norms[-1] + 1e-6))
    assert min(norms) > 0.05  # so that clipping is seen
    np.testing.assert_allclose(half, expected, rtol=1e-4, atol=1e-7)


def test_noise_goes_through_to_the_gradient() -> None:
    # Two steps with the same fakes and no patient, one noised: they differ by the noise over the divisor.
    study = study_of(steps=10)
    state = state_of(pooled_trainer(study, 1.0))
    noise = SharedNoise(20, 2**20, 1.0)
    shares = noisy_integers(np.zeros(len(state.discriminator)), noise, seeded(1)) * 2.0**-20
    found = []
    for total in (shares, np.zeros(len(shares))):
        joint = joint_trainer(study, state, 1.0)
        joint._gan.discriminator_optimizer = with_rate_one(joint._gan.discriminator)
        joint.step(total)
        found.append(joint.discriminator)
    np.testing.assert_allclose(found[1] - found[0], shares / BATCH, atol=1e-6)


@pytest.mark.parametrize("wrong", ["short", "nan"])
def test_a_sum_that_does_not_fit_changes_nothing(wrong: str) -> None:
    study = study_of()
    joint = joint_trainer(study, state_of(pooled_trainer(study, 1.0)), 1.0)
    before = joint.to_bytes()
    total = np.zeros(len(joint.discriminator) - (wrong == "short"))
    total[3] = np.nan if wrong == "nan" else 0
    with pytest.raises(ValueError, match=r"expected \d+ finite values"):
        joint.step(total)
    assert joint.to_bytes() == before


# ------------------------------------------------------------ how often the generator steps


def test_the_generator_steps_after_every_few_steps() -> None:
    study = study_of(steps=3)
    joint = joint_trainer(study, state_of(pooled_trainer(study, 1.0)), 1.0)
    changed, before = [], joint.state(0)
    for _ in range(7):
        joint.step(np.zeros(len(joint.discriminator)))
        after = joint.state(0)
        changed.append(not (after.generator == before.generator).all())
        assert (after.generator_average == before.generator_average).all() != changed[-1]
        assert not (after.discriminator == before.discriminator).all()
        before = after
    assert changed == [False, False, True, False, False, True, False]


def test_the_average_moves_by_the_decay() -> None:
    study = study_of(steps=1)
    joint = joint_trainer(study, state_of(pooled_trainer(study, 1.0)), 1.0)
    before = joint.state(0)
    joint.step(np.zeros(len(joint.discriminator)))
    after = joint.state(1)
    expected = 0.9 * before.generator_average + 0.1 * after.generator
    np.testing.assert_allclose(after.generator_average, expected, atol=1e-7)
    assert np.abs(after.generator_average - before.generator_average).max() > 1e-6


def test_a_discriminator_that_no_longer_tells_fakes_gets_more_steps() -> None:
    rate = StepRate(steps=1, threshold=0.6)
    seen = []
    for _ in range(1900):
        rate.measured(0.5)
        seen.append(rate.steps)
    # Every 200 generator steps to the next, and no further than the last.
    assert [seen[200 * number - 1] for number in range(1, 9)] == [2, 5, 10, 20, 50, 100, 200, 200]
    assert seen[:199] == [1] * 199


def test_one_that_tells_fakes_keeps_its_rate() -> None:
    rate = StepRate(steps=1, threshold=0.6)
    for _ in range(1000):
        rate.measured(0.61)
    assert rate.steps == 1
    # The average of 0.61 and n times 0.5 falls to 0.6 where 0.11 * 0.99^n is 0.1: after 10.
    for count in range(1, 30):
        rate.measured(0.5)
        assert rate.steps == (1 if count < 10 else 2)
    assert rate.average == pytest.approx(0.5 + 0.11 * 0.99**29, abs=1e-9)


def test_a_rate_between_two_goes_on_with_the_next() -> None:
    assert StepRate(3, 0.6).steps not in RATES
    for steps, then in ((3, 5), (7, 10), (200, 200), (1000, 1000)):
        rate = StepRate(steps, 0.6, generator_steps=199)
        rate.measured(0.0)
        assert rate.steps == then


@pytest.mark.parametrize(("epsilon", "threshold"), [(0.1, 0.7), (1, 0.7), (10**0.5, 0.65), (10, 0.6), (100, 0.6)])
def test_the_threshold_falls_with_the_budget(epsilon: float, threshold: float) -> None:
    assert threshold_for(small_study(privacy={"epsilon": epsilon})) == pytest.approx(threshold)
    assert threshold_for(small_study(privacy={"epsilon": epsilon, "enabled": False})) == 0.6


@pytest.mark.parametrize(("loss", "boundary"), [("non_saturating", 0.0), ("hinge", 0.0), ("least_squares", 0.5)])
def test_accuracy_counts_fakes_below_the_losss_boundary(loss: str, boundary: float) -> None:
    study = study_of(steps=1, loss=loss)
    for bias, share in ((boundary - 0.01, 1.0), (boundary + 0.01, 0.0)):
        joint = joint_trainer(study, state_of(pooled_trainer(study, 1.0)), 1.0)
        with torch.no_grad():
            for parameter in joint._gan.discriminator.parameters():
                parameter.zero_()
            joint._gan.discriminator.head.bias.fill_(bias)
        joint._gan.discriminator_optimizer = torch.optim.SGD(joint._gan.discriminator.parameters(), lr=1e-9)
        joint.step(np.zeros(len(joint.discriminator)))
        assert joint.rate.average == share


# ------------------------------------------------------------ resuming


@pytest.mark.parametrize("device", DEVICES)
def test_a_resumed_run_is_the_same_run(device: torch.device) -> None:
    study = study_of(steps=3)
    state = state_of(pooled_trainer(study, 1.0))
    random = np.random.default_rng(1)
    sums = random.standard_normal((8, len(state.discriminator)))
    joint = joint_trainer(study, state, 1.0, device)
    for total in sums[:4]:
        joint.step(total)
    resumed = JointTrainer.from_bytes(joint.to_bytes(), study, BATCH, 1.0, device)
    for total in sums[4:]:
        joint.step(total)
        resumed.step(total)
    for mine, theirs in zip(astuple(joint.state(8)), astuple(resumed.state(8)), strict=True):
        assert np.array_equal(mine, theirs)
    assert joint.rate == resumed.rate
    assert joint.to_bytes() == resumed.to_bytes()


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * 100])
def test_damaged_bytes_are_refused(damage: Any) -> None:
    study = study_of()
    joint = joint_trainer(study, state_of(pooled_trainer(study, 1.0)), 1.0)
    with pytest.raises(ValueError, match="not a saved trainer"):
        JointTrainer.from_bytes(damage(joint.to_bytes()), study, BATCH, 1.0, CPU)


def test_bytes_of_another_study_are_refused() -> None:
    study = study_of()
    joint = joint_trainer(study, state_of(pooled_trainer(study, 1.0)), 1.0)
    with pytest.raises(ValueError, match="not a saved trainer"):
        JointTrainer.from_bytes(joint.to_bytes(), study_of(discriminator_width=8), BATCH, 1.0, CPU)
