"""The strongest test: with noise off, one patient more or less moves the step's sum by at most ``clip_norm``.

It goes through ``GanTrainer.discriminator_step`` as a site does; only the optimizer behind the sum is replaced.
"""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import StudyConfig
from tests.common.gan.trainers import CLIP_NORM, DEVICES, batch, images, movement, reading_trainer, small_study

LOSSES = ("non_saturating", "hinge", "least_squares")
CONFIGURATIONS = list(itertools.product(LOSSES, ("none", "group"), (False, True), (28, 32, 64)))


def study_of(loss: str, normalization: str, labelled: bool, size: int, max_images: int = 20) -> StudyConfig:
    image = {"size": size, "label_column": "group", "labels": ["ill", "well"]} if labelled else {"size": size}
    return small_study(
        image=image,
        gan={"loss": loss, "discriminator_normalization": normalization},
        performance={"max_images_at_once": max_images},
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("loss", "normalization", "labelled", "size"), CONFIGURATIONS)
def test_one_patient_moves_the_sum_by_at_most_clip_norm(
    loss: str, normalization: str, labelled: bool, size: int, device: torch.device
) -> None:
    study = study_of(loss, normalization, labelled, size)
    # 3 + 26 + 1 + 2 images and 4 fakes in calls of at most 20 rows: the second patient exceeds a call alone.
    patients = [
        images(study, 3, seed=1),
        images(study, 26, seed=2, scale=1e6),
        images(study, 1, seed=3, scale=-1e6),
        images(study, 2, seed=4, scale=1e3),
    ]
    labels = [0, 1, 0, 1] if labelled else [0, 0, 0, 0]
    largest = 0.0
    for weight_scale in (1.0, -20.0):  # the sign turns the logits: a saturated loss has no gradient to clip
        trainer = reading_trainer(study, device=device)
        with torch.no_grad():
            trainer.discriminator.head.weight.mul_(weight_scale)
        everyone, _ = movement(trainer, batch(study, patients, labels))
        for left_out in range(len(patients)):
            kept = [number for number in range(len(patients)) if number != left_out]
            rest = batch(study, [patients[number] for number in kept], [labels[number] for number in kept])
            fewer, _ = movement(trainer, rest)
            alone, _ = movement(trainer, batch(study, [patients[left_out]], [labels[left_out]]))
            nobody, _ = movement(trainer, batch(study, []))
            moved, moved_alone = float((everyone - fewer).norm()), float((alone - nobody).norm())
            assert moved <= CLIP_NORM
            assert moved_alone <= CLIP_NORM
            assert moved == pytest.approx(moved_alone, abs=1e-3)
            largest = max(largest, moved)
    assert largest > 0.99 * CLIP_NORM  # not vacuous: an outlier is clipped, not lost


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("normalization", ["none", "group"])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_no_patient_of_any_batch_moves_the_sum_by_more(
    data: st.DataObject, loss: str, normalization: str, device: torch.device
) -> None:
    """Batches of 0 to 4 patients beside the one who leaves, each of 1 to 50 images, as large as 1e6; any piece size."""
    labels = st.integers(0, 1)
    patient = st.tuples(st.integers(1, 50), labels, st.floats(-6, 6), st.sampled_from([1, -1]), st.integers(0, 99))
    drawn = data.draw(st.lists(patient, min_size=1, max_size=5))
    leaves = data.draw(st.integers(0, len(drawn) - 1))
    study = study_of(loss, normalization, True, 28, max_images=data.draw(st.sampled_from([1, 7, 40, 256])))
    clip_norm = data.draw(st.sampled_from([1e-3, 1.0, 50.0]))
    trainer = reading_trainer(study, clip_norm=clip_norm, device=device)
    with torch.no_grad():
        trainer.discriminator.head.weight.mul_(data.draw(st.sampled_from([1, -1, 100, -100])))
    patients = [images(study, count, seed, sign * 10**scale) for count, _, scale, sign, seed in drawn]
    everyone = batch(study, patients, [label for _, label, *_ in drawn])
    del patients[leaves], drawn[leaves]
    rest = batch(study, patients, [label for _, label, *_ in drawn])
    moved = float((movement(trainer, everyone)[0] - movement(trainer, rest)[0]).norm())
    assert moved <= clip_norm


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("num_images", [1, 2, 7, 50])
@pytest.mark.parametrize("clip_norm", [1e-3, 1.0, 50.0])
def test_the_number_of_images_does_not_raise_the_bound(loss: str, num_images: int, clip_norm: float) -> None:
    study = study_of(loss, "none", False, 28, max_images=16)
    patient = images(study, num_images, seed=5, scale=1e4)
    moves = []
    for sign in (1, -1):
        trainer = reading_trainer(study, clip_norm=clip_norm)
        with torch.no_grad():
            trainer.discriminator.head.weight.mul_(100 * sign)
        with_patient, _ = movement(trainer, batch(study, [images(study, 2, seed=6), patient]))
        without, _ = movement(trainer, batch(study, [images(study, 2, seed=6)]))
        moves.append(float((with_patient - without).norm()))
    assert max(moves) <= clip_norm
    assert max(moves) > 0.99 * clip_norm


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_a_patient_without_a_finite_gradient_adds_zero_and_is_counted(loss: str, value: float) -> None:
    study = study_of(loss, "none", False, 28, max_images=3)
    broken = images(study, 2, seed=7)
    broken[1, 0, 5, 5] = value  # one pixel of the second image; 3e38 overflows in the first convolution
    trainer = reading_trainer(study)
    with torch.no_grad():
        trainer.discriminator.body[0].weight.fill_(2.0)
    others = [images(study, 2, seed=8), images(study, 1, seed=9)]
    with_broken, counted = movement(trainer, batch(study, [others[0], broken, others[1]]))
    without, none = movement(trainer, batch(study, others))
    assert (counted, none) == (1, 0)
    assert torch.isfinite(with_broken).all()
    torch.testing.assert_close(with_broken, without, rtol=1e-5, atol=1e-6)


def test_a_gradient_whose_norm_overflows_adds_zero() -> None:
    # Least squares with pixels near 1e17: gradients near 1e35 are finite, their squares are not.
    study = study_of("least_squares", "none", False, 28)
    trainer = reading_trainer(study)
    nobody, _ = movement(trainer, batch(study, []))
    alone, _ = movement(trainer, batch(study, [images(study, 1, seed=10, scale=1e17)]))
    assert torch.isfinite(alone).all()
    assert float((alone - nobody).norm()) <= CLIP_NORM
