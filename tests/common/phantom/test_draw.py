"""Phantoms drawn for a study: its anatomy, its size, its labels."""

import numpy as np
import pytest

from common.config import StudyConfig
from common.phantom.draw import draw_labels, draw_phantoms

TINY = StudyConfig.model_validate(
    {"image": {"size": 28, "label_column": "group", "labels": ["healthy", "lesion"]}},
)


@pytest.mark.parametrize("anatomy", ["brain", "skull_stripped_brain", "chest"])
def test_phantoms_of_each_anatomy_show_a_lesion_where_the_label_says_so(anatomy: str) -> None:
    labels = ["clear", "opacity"] if anatomy == "chest" else ["healthy", "lesion"]
    study = TINY.with_changes("image", size=32, labels=labels).with_changes("gan", warm_start_anatomy=anatomy)
    rng = np.random.default_rng(0)
    classes = np.repeat(np.array([0, 1]), 100)
    pictures = draw_phantoms(study, classes, rng)
    assert pictures.shape == (200, 1, 32, 32)
    assert -1 <= pictures.min() < -0.9 and 0.9 < pictures.max() <= 1
    # A lesion is brighter or darker than its surroundings: it changes the picture of one and the same patient.
    plain = draw_phantoms(study, np.zeros(50, np.int64), np.random.default_rng(1))
    ill = draw_phantoms(study, np.ones(50, np.int64), np.random.default_rng(1))
    assert np.abs(plain - ill).max(axis=(1, 2, 3)).mean() > 0.3
    unlabelled = draw_phantoms(TINY.with_changes("image", label_column="", labels=[]), np.zeros(4, np.int64), rng)
    assert unlabelled.shape == (4, 1, 28, 28)
    assert set(draw_labels(study, 100, rng).tolist()) == {0, 1}
