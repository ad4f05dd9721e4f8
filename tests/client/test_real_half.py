"""The real half of a joint step: by hand, and one patient more or less moves it by at most ``clip_norm``."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from client.real_half import real_half
from common.config import StudyConfig
from common.gan import losses, networks
from common.gan.parameters import to_vector
from common.gan.training import RealBatch
from common.privacy.gradient import ROUNDING_MARGIN
from common.privacy.shared_noise import exact_step
from tests.common.gan.trainers import CPU, DEVICES, batch, images, small_study

LOSSES = ("non_saturating", "hinge", "least_squares")
CONFIGURATIONS = list(itertools.product(LOSSES, ("none", "group"), (False, True), (28, 64)))


def study_of(loss: str, normalization: str = "none", size: int = 28, max_images: int = 20) -> StudyConfig:
    return small_study(
        image={"size": size, "label_column": "group", "labels": ["ill", "well"]},
        gan={"loss": loss, "discriminator_normalization": normalization},
        performance={"max_images_at_once": max_images},
    )


def network(study: StudyConfig, head: float = 1.0, seed: int = 1) -> nn.Module:
    """A discriminator; ``head`` scales, and by its sign turns, the logits."""
    discriminator = networks.build_discriminator(study)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random))
        discriminator.head.weight.mul_(head)
    return discriminator


def by_hand(study: StudyConfig, discriminator: nn.Module, real: RealBatch, clip_norm: float) -> NDArray[np.float64]:
    """Row by row with torch's own autograd."""
    total = np.zeros(len(to_vector(discriminator)))
    parameters = list(discriminator.parameters())
    for patient in range(int(real.owner.max(initial=-1)) + 1):
        rows = []
        for row in np.flatnonzero(real.owner == patient):
            logits = discriminator(torch.from_numpy(real.images[row][None]), torch.from_numpy(real.labels[row][None]))
            loss = losses.real_loss(study.gan.loss, logits).sum()
            rows.append(np.concatenate([g.double().flatten() for g in torch.autograd.grad(loss, parameters)]))
        mean = np.mean(rows, axis=0)
        total += mean * min(1.0, clip_norm * (1 - ROUNDING_MARGIN) / (np.linalg.norm(mean) + 1e-6))
    return total


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("clip_norm", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_sum_by_hand(loss: str, clip_norm: float, device: torch.device) -> None:
    study = study_of(loss, "group", max_images=5)
    discriminator = network(study)
    patients = [images(study, count, seed=count) for count in (1, 3, 9, 2, 2)]
    real = batch(study, patients, [0, 1, 1, 0, 1])
    expected = by_hand(study, discriminator, real, clip_norm)
    total = real_half(study, discriminator, real, clip_norm, device)
    assert (total.shape, total.dtype) == (expected.shape, np.float64)
    np.testing.assert_allclose(total, expected, rtol=1e-4, atol=1e-6 * float(np.linalg.norm(expected)))


def test_coordinates_are_in_the_order_of_the_parameters() -> None:
    # Least squares with all weights zero: the logit is the head's bias, so only the bias of label 1 has a gradient.
    study = study_of("least_squares")
    discriminator = networks.build_discriminator(study)
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter.zero_()
    total = real_half(study, discriminator, batch(study, [images(study, 2, seed=1)], [1]), 0.25, CPU)
    assert total.nonzero()[0].tolist() == [len(total) - 1]  # the head's bias comes last
    assert total[-1] == pytest.approx(-0.25 * (1 - ROUNDING_MARGIN), rel=2e-6)  # -1, clipped


def test_an_empty_draw_gives_zeros() -> None:
    study = study_of("hinge")
    discriminator = network(study)
    total = real_half(study, discriminator, batch(study, []), 1.0, CPU)
    assert total.shape == (len(to_vector(discriminator)),)
    assert not total.any()


def test_the_discriminator_is_left_as_it_was() -> None:
    # A site uses it again: no hook, gradient or attribute of a patient stays with it.
    study = study_of("hinge")
    discriminator = network(study)
    before = to_vector(discriminator)
    first = real_half(study, discriminator, batch(study, [images(study, 3, seed=1)]), 1.0, CPU)
    assert (to_vector(discriminator) == before).all()
    for parameter in discriminator.parameters():
        assert parameter.grad is None
        assert not hasattr(parameter, "grad_sample")
    assert not any(module._forward_hooks or module._backward_hooks for module in discriminator.modules())
    second = real_half(study, discriminator, batch(study, [images(study, 3, seed=1)]), 1.0, CPU)
    assert (first == second).all()


@pytest.mark.parametrize("max_images", [1, 4, 10])
def test_pieces_do_not_change_the_sum(max_images: int) -> None:
    study = study_of("non_saturating", max_images=256)
    patients = [images(study, count, seed=count) for count in (3, 1, 9, 2)]
    whole = real_half(study, network(study), batch(study, patients), 1.0, CPU)
    study = study_of("non_saturating", max_images=max_images)
    pieces = real_half(study, network(study), batch(study, patients), 1.0, CPU)
    np.testing.assert_allclose(pieces, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("max_images", "calls"), [(1, [3, 1, 9, 2]), (4, [4, 9, 2]), (12, [4, 11]), (256, [15])])
def test_no_call_is_larger_than_it_may_be_or_splits_a_patient(max_images: int, calls: list[int]) -> None:
    study = study_of("hinge", max_images=max_images)
    discriminator, rows = network(study), []
    discriminator.body.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    patients = [images(study, count, seed=count) for count in (3, 1, 9, 2)]
    real_half(study, discriminator, batch(study, patients), 1.0, CPU)
    assert rows == calls


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("loss", "normalization", "labelled", "size"), CONFIGURATIONS)
def test_one_patient_moves_the_sum_by_at_most_clip_norm(
    loss: str, normalization: str, labelled: bool, size: int, device: torch.device
) -> None:
    study = study_of(loss, normalization, size)
    patients = [
        images(study, 3, seed=1),
        images(study, 26, seed=2, scale=1e6),
        images(study, 1, seed=3, scale=-1e6),
        images(study, 2, seed=4, scale=1e3),
    ]
    labels = [0, 1, 0, 1] if labelled else [0, 0, 0, 0]
    largest = 0.0
    for head in (1.0, -20.0):  # the sign turns the logits: a saturated loss has no gradient to clip
        discriminator = network(study, head)
        everyone = real_half(study, discriminator, batch(study, patients, labels), 1.0, device)
        for left_out in range(len(patients)):
            kept = [number for number in range(len(patients)) if number != left_out]
            rest = batch(study, [patients[number] for number in kept], [labels[number] for number in kept])
            fewer = real_half(study, discriminator, rest, 1.0, device)
            alone = real_half(study, discriminator, batch(study, [patients[left_out]], [labels[left_out]]), 1.0, device)
            assert np.linalg.norm(everyone - fewer) <= 1.0
            assert np.linalg.norm(alone) <= 1.0
            np.testing.assert_allclose(everyone - fewer, alone, atol=1e-4)
            largest = max(largest, float(np.linalg.norm(everyone - fewer)))
    assert largest > 0.99  # not vacuous: an outlier is clipped, not lost


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_patient_of_any_batch_moves_the_sum_by_more(data: st.DataObject) -> None:
    """Batches of 0 to 4 patients beside the one who leaves, each of 1 to 50 images, as large as 1e6; any piece size."""
    patient = st.tuples(
        st.integers(1, 50), st.integers(0, 1), st.floats(-6, 6), st.sampled_from([1, -1]), st.integers(0, 99)
    )
    drawn = data.draw(st.lists(patient, min_size=1, max_size=5))
    leaves = data.draw(st.integers(0, len(drawn) - 1))
    study = study_of(
        data.draw(st.sampled_from(LOSSES)),
        data.draw(st.sampled_from(["none", "group"])),
        max_images=data.draw(st.sampled_from([1, 7, 40, 256])),
    )
    clip_norm = data.draw(st.sampled_from([1e-3, 0.7, 1.0, 50.0]))
    discriminator = network(study, data.draw(st.sampled_from([1.0, -1.0, 100.0, -100.0])))
    patients = [images(study, count, seed, sign * 10**scale) for count, _, scale, sign, seed in drawn]
    everyone = batch(study, patients, [label for _, label, *_ in drawn])
    del patients[leaves], drawn[leaves]
    rest = batch(study, patients, [label for _, label, *_ in drawn])
    moved = real_half(study, discriminator, everyone, clip_norm, CPU)
    moved -= real_half(study, discriminator, rest, clip_norm, CPU)
    assert np.linalg.norm(moved) <= clip_norm


def test_sums_are_exact_in_the_patients_vectors() -> None:
    # Each patient in a call of their own: the sum is theirs to the last bit, in any order, as float64 adds multiples
    # of one step exactly.
    study = study_of("non_saturating", max_images=1)
    discriminator = network(study)
    patients = [images(study, 2, seed=seed, scale=10.0**seed) for seed in range(6)]
    alone = [real_half(study, discriminator, batch(study, [patient]), 0.7, CPU) for patient in patients]
    assert not np.fmod(np.array(alone), exact_step(0.7)).any()
    for order in ((0, 1, 2, 3, 4, 5), (5, 3, 1, 0, 2, 4)):
        together = real_half(study, discriminator, batch(study, [patients[number] for number in order]), 0.7, CPU)
        assert (together == np.sum(alone, axis=0)).all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_a_patient_without_a_finite_gradient_adds_zero(loss: str, value: float) -> None:
    study = study_of(loss, max_images=3)
    broken = images(study, 2, seed=7)
    broken[1, 0, 5, 5] = value  # one pixel of the second image; 3e38 overflows in the first convolution
    discriminator = network(study)
    with torch.no_grad():
        discriminator.body[0].weight.fill_(2.0)
    others = [images(study, 2, seed=8), images(study, 1, seed=9)]
    with_broken = real_half(study, discriminator, batch(study, [others[0], broken, others[1]]), 1.0, CPU)
    without = real_half(study, discriminator, batch(study, others), 1.0, CPU)
    np.testing.assert_allclose(with_broken, without, rtol=1e-5, atol=1e-6)


def test_a_gradient_whose_norm_overflows_float32_is_clipped() -> None:
    # Least squares with pixels near 1e17: gradients near 1e35 are finite, their squares are not, in float32.
    study = study_of("least_squares")
    alone = real_half(study, network(study), batch(study, [images(study, 1, seed=10, scale=1e17)]), 1.0, CPU)
    assert 0.99 < np.linalg.norm(alone) <= 1.0
