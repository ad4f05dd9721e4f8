"""What a site gives to ``moments``: the sum of one bounded vector a patient."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from client.data.slices import PreparedCohort
from common.config import StudyConfig
from common.gan.feature_map import LABEL_WEIGHT, FeatureMap
from common.privacy.gradient import ROUNDING_MARGIN
from common.privacy.shared_noise import exact_step

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

LARGEST_NORM = 1 - ROUNDING_MARGIN  # rounding to ``STEP`` lengthens a vector by less than the margin
STEP = exact_step(1.0)


def patient_sum(study: StudyConfig, feature_map: FeatureMap, cohort: PreparedCohort, device: torch.device) -> Floats:
    """Sum over the cohort's patients of the mean of their images' vectors, each patient clipped to a norm of 1.

    An image's vector has a block of D features and a count for each class; all but those of its label are 0. The mean
    is over all images of the patient, so a patient with many has no more weight.

    **Guarantee.** Each patient's vector has a norm of at most 1 (L2), whatever the images, their number and the map:
    each is clipped alone, and one that is not finite counts as 0. The sum is exact in these vectors: one patient more
    or less moves it by exactly their own (``exact_step``). All calls of the map have equally many rows, so that no
    patient's features depend, by another order of rounding, on how many others there are.

    Args:
        study: gives the classes, and how many images the map gets at once.
        feature_map: the round's public map.
        cohort: the site's training patients.
        device: where to compute the features.

    Returns:
        (``feature_map.length(num_classes)``,), class after class: block, then count times ``LABEL_WEIGHT``.
    """
    num_classes, rows = study.image.num_classes, study.performance.max_images_at_once
    total = np.zeros((num_classes, feature_map.num_features + 1))
    for first, last in _parts(cohort.starts, rows):
        start, end = int(cohort.starts[first]), int(cohort.starts[last])
        num_images = np.diff(cohort.starts[first : last + 1])
        patient = np.repeat(np.arange(len(num_images)), num_images)
        vectors = _image_vectors(feature_map, cohort.images[start:end], rows, device)
        # Blocks that are 0 are left out: a patient has a row for each label of theirs, most often one.
        key = patient * num_classes + cohort.label_indices[start:end]
        order = np.argsort(key, kind="stable")
        keys, starts = np.unique(key[order], return_index=True)
        owner, label = keys // num_classes, keys % num_classes
        means = np.add.reduceat(vectors[order], starts, axis=0) / num_images[owner, None]
        np.add.at(total, label, _clipped(means, owner))
    return total.ravel()


def _parts(starts: Integers, rows: int) -> Iterator[tuple[int, int]]:
    """First patient and the one after the last, of patients with at most ``rows`` images together, or of one."""
    first, num_patients = 0, len(starts) - 1
    while first < num_patients:
        last = max(first + 1, int(np.searchsorted(starts, starts[first] + rows, side="right")) - 1)
        yield first, last
        first = last


def _image_vectors(feature_map: FeatureMap, images: NDArray[np.uint8], rows: int, device: torch.device) -> Floats:
    """(images, D + 1): features and count; black images fill up the last call."""
    calls = []
    for start in range(0, len(images), rows):
        part = images[start : start + rows]
        filled = np.full((rows, *part.shape[1:]), -1, np.float32)
        filled[: len(part)] = part.astype(np.float32) / np.float32(127.5) - np.float32(1)
        with torch.inference_mode():
            calls.append(feature_map(torch.from_numpy(filled).to(device))[: len(part)].double().cpu().numpy())
    features = np.concatenate(calls) * (1 - LABEL_WEIGHT**2) ** 0.5
    return np.concatenate([features, np.full((len(images), 1), LABEL_WEIGHT)], axis=1)


def _clipped(rows: Floats, owner: Integers) -> Floats:
    """Rows (n, D + 1) of ``owner`` (n,), from 0 without gaps, such that those of one have a norm of at most 1."""
    norms = np.sqrt(np.bincount(owner, weights=np.square(rows).sum(axis=1)))[owner, None]
    factors = LARGEST_NORM / np.maximum(norms, LARGEST_NORM)
    return np.rint(np.where(np.isfinite(norms), rows, 0.0) * np.nan_to_num(factors) / STEP) * STEP
