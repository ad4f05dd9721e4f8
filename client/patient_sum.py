"""What a site gives to ``moments``: the sum of one bounded vector a patient."""

import numpy as np
import torch
from numpy.typing import NDArray

from client.data.slices import PreparedCohort
from common.config import StudyConfig
from common.gan.feature_map import LABEL_WEIGHT, FeatureMap

# Norms below 1 by more than float64 can round in a sum of a hundred thousand patients.
LARGEST_NORM = 1 - 1e-9


def patient_sum(
    study: StudyConfig, feature_map: FeatureMap, cohort: PreparedCohort, device: torch.device
) -> NDArray[np.float64]:
    """Sum over the cohort's patients of the mean of their images' vectors, each patient clipped to a norm of 1.

    An image's vector has a block of D features and a count for each class; all but those of its label are 0. The mean
    is over all images of the patient, so a patient with many has no more weight.

    **Guarantee.** One patient more or less moves the sum by at most 1 (L2), whatever the images, their number and the
    map: each patient is clipped alone, and one whose vector is not finite adds 0. All calls of the map have equally
    many rows, so that no patient's features depend, by another order of rounding, on who else is there.

    Args:
        study: gives the classes, and how many images are held at once.
        feature_map: the round's public map.
        cohort: the site's training patients.
        device: where to compute the features.

    Returns:
        (``feature_map.length(num_classes)``,), class after class: block, then count times ``LABEL_WEIGHT``.
    """
    shape = (study.image.num_classes, feature_map.num_features + 1)
    rows = study.performance.max_images_at_once
    total = np.zeros(shape)
    patient, current = 0, np.zeros(shape)
    for start in range(0, len(cohort.images), rows):
        labels = cohort.label_indices[start : start + rows]
        for label, vector in zip(labels, _image_vectors(feature_map, cohort, start, rows, device), strict=False):
            current[label] += vector
            start += 1
            if start == cohort.starts[patient + 1]:
                total += _clipped(current / (start - cohort.starts[patient]))
                patient, current = patient + 1, np.zeros(shape)
    return total.ravel()


def _image_vectors(
    feature_map: FeatureMap, cohort: PreparedCohort, start: int, rows: int, device: torch.device
) -> NDArray[np.float64]:
    """(rows, D + 1) of the images from ``start`` on; black ones fill up the last call."""
    part = np.asarray(cohort.images[start : start + rows])
    images = np.full((rows, *part.shape[1:]), -1, np.float32)
    images[: len(part)] = part.astype(np.float32) / np.float32(127.5) - np.float32(1)
    with torch.inference_mode():
        features = feature_map(torch.from_numpy(images).to(device)).double().cpu().numpy()
    counts = np.full((rows, 1), LABEL_WEIGHT)
    return np.concatenate([features * (1 - LABEL_WEIGHT**2) ** 0.5, counts], axis=1)


def _clipped(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    norm = float(np.linalg.norm(vector))
    if not np.isfinite(norm):
        return np.zeros_like(vector)
    return vector if norm <= LARGEST_NORM else vector * (LARGEST_NORM / norm)
