"""One patient more or less moves a site's sum by exactly their own vector, of a norm of at most 1."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from client.data.slices import PreparedCohort
from client.patient_sum import patient_sum
from common.config import StudyConfig
from common.gan.feature_map import LABEL_WEIGHT, FeatureMap, raw_feature_map
from tests.common.gan.trainers import CPU, DEVICES, small_study

Images = NDArray[np.uint8]
KEPT = (1 - LABEL_WEIGHT**2) ** 0.5


def study_of(rows: int = 8) -> StudyConfig:
    return small_study(
        image={"size": 28, "label_column": "group", "labels": ["ill", "well"]},
        performance={"max_images_at_once": rows},
    )


def pictures(count: int, seed: int) -> Images:
    return np.random.default_rng(seed).integers(256, size=(count, 1, 28, 28), dtype=np.uint8)


def cohort_of(patients: list[Images], labels: list[list[int]]) -> PreparedCohort:
    starts = np.cumsum([0, *(len(images) for images in patients)]).astype(np.int64)
    images = np.concatenate([np.zeros((0, 1, 28, 28), np.uint8), *patients])
    flat = np.array([label for own in labels for label in own], dtype=np.int64)
    return PreparedCohort(images, flat, tuple(str(k) for k in range(len(patients))), starts, ())


def map_of(study: StudyConfig, gain: float) -> FeatureMap:
    """Centred on black; a gain of 1 makes every image's features as long as they may be."""
    raw = raw_feature_map(study, 2, 1, np.zeros(0, np.float32))
    return raw.scaled(raw.raw(torch.full((1, 1, 28, 28), -1.0))[0], torch.full((raw.num_features,), gain))


def test_it_is_the_sum_of_the_patients_means() -> None:
    study = study_of(rows=3)
    feature_map = map_of(study, 1e-3)
    patients = [pictures(1, 1), pictures(5, 2), pictures(2, 3)]
    labels = [[1], [0, 0, 1, 0, 0], [1, 1]]
    total = patient_sum(study, feature_map, cohort_of(patients, labels), CPU)
    assert total.shape == (feature_map.length(2),) and total.dtype == np.float64
    expected = np.zeros((2, feature_map.num_features + 1))
    for images, own in zip(patients, labels, strict=True):
        features = feature_map(torch.from_numpy(images / 127.5 - 1).float()).numpy()
        for label, vector in zip(own, features, strict=True):
            expected[label, :-1] += KEPT * vector / len(own)
            expected[label, -1] += LABEL_WEIGHT / len(own)
    np.testing.assert_allclose(total.reshape(expected.shape), expected, rtol=1e-4, atol=1e-6)
    assert total.reshape(2, -1)[:, -1] / LABEL_WEIGHT == pytest.approx([0.8, 2.2])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gain", [1e-3, 1.0, 1e6])
def test_one_patient_moves_the_sum_by_their_own_vector(gain: float, device: torch.device) -> None:
    study = study_of()
    feature_map = map_of(study, gain)
    white, black = np.full((3, 1, 28, 28), 255, np.uint8), np.zeros((2, 1, 28, 28), np.uint8)
    patients = [pictures(3, 1), white, pictures(50, 2), black, pictures(1, 3)]
    labels = [[0] * 3, [1] * 3, [0, 1] * 25, [1] * 2, [0]]
    everyone = patient_sum(study, feature_map, cohort_of(patients, labels), device)
    nobody = patient_sum(study, feature_map, cohort_of([], []), device)
    assert not nobody.any()
    largest = 0.0
    for left_out in range(len(patients)):
        kept = [number for number in range(len(patients)) if number != left_out]
        others = cohort_of([patients[k] for k in kept], [labels[k] for k in kept])
        moved = everyone - patient_sum(study, feature_map, others, device)
        only = patient_sum(study, feature_map, cohort_of([patients[left_out]], [labels[left_out]]), device)
        if device == CPU:
            assert np.array_equal(moved, only)
        else:  # the same image may have other last bits at another place in a call
            np.testing.assert_allclose(moved, only, atol=1e-5)
        norm = float(np.linalg.norm(moved))
        assert norm <= 1
        largest = max(largest, norm)
    assert gain < 1 or largest > 0.999  # not vacuous: the bound is reached


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_every_patient_of_any_cohort_moves_the_sum_by_their_own_vector(data: st.DataObject) -> None:
    """Cohorts of 1 to 5 patients of 1 to 50 images; any gain, any number of images at once."""
    counts = data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=5))
    study = study_of(rows=data.draw(st.sampled_from([1, 7, 64])))
    feature_map = map_of(study, 10 ** data.draw(st.floats(-4, 8)))
    patients = [pictures(count, seed) for seed, count in enumerate(counts)]
    labels = [data.draw(st.lists(st.integers(0, 1), min_size=count, max_size=count)) for count in counts]
    everyone = patient_sum(study, feature_map, cohort_of(patients, labels), CPU)
    leaves = data.draw(st.integers(0, len(counts) - 1))
    own = patient_sum(study, feature_map, cohort_of([patients.pop(leaves)], [labels.pop(leaves)]), CPU)
    others = patient_sum(study, feature_map, cohort_of(patients, labels), CPU)
    assert np.array_equal(everyone - others, own)
    assert np.linalg.norm(own) <= 1


class Unbounded(FeatureMap):
    """A map that breaks its promise, as one of another version might."""

    value = 1e30

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        bright = images.mean(dim=(1, 2, 3)) > 0.5
        features = torch.zeros(len(images), self.num_features)
        features[bright] = self.value
        return features


@pytest.mark.parametrize(("value", "added"), [(1e30, 1.0), (-3e38, 1.0), (np.nan, 0.0), (np.inf, 0.0)])
def test_a_map_that_breaks_its_promise_breaks_no_guarantee(value: float, added: float) -> None:
    study = study_of()
    raw = raw_feature_map(study, 2, 1, np.zeros(0, np.float32))
    broken = Unbounded(study, 2, 0, 1, raw.discriminator, raw.centre, raw.gain)
    broken.value = value
    white = np.full((2, 1, 28, 28), 255, np.uint8)
    dark = np.zeros((1, 1, 28, 28), np.uint8)
    with_it = patient_sum(study, broken, cohort_of([dark, white, dark], [[0], [0, 1], [0]]), CPU)
    without = patient_sum(study, broken, cohort_of([dark, dark], [[0], [0]]), CPU)
    assert np.isfinite(with_it).all()
    assert np.linalg.norm(with_it - without) == pytest.approx(added, abs=1e-4)


def test_it_does_not_depend_on_how_many_images_are_held_at_once() -> None:
    patients, labels = [pictures(9, 1), pictures(2, 2)], [[0] * 9, [1] * 2]
    sums = [
        patient_sum(study_of(rows), map_of(study_of(rows), 1e-2), cohort_of(patients, labels), CPU)
        for rows in (1, 4, 256)
    ]
    np.testing.assert_allclose(sums[0], sums[1], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(sums[0], sums[2], rtol=1e-4, atol=1e-6)
