"""Phantoms as a study sees images: of its anatomy, at its size, with its labels."""

import numpy as np
from numpy.typing import NDArray

from common.config import StudyConfig
from common.phantom import brain, chest

LESION_LABELS = ("lesion", "opacity")
"""Phantoms of a label of this name show one."""


def draw_labels(study: StudyConfig, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Uniform labels, (count,)."""
    return rng.integers(study.image.num_classes, size=count)


def draw_phantoms(study: StudyConfig, labels: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float32]:
    """Public phantoms of the study's anatomy and size: (count, 1, size, size) in [-1, 1].

    Those whose label is called ``lesion`` (brain) or ``opacity`` (chest) show one.
    """
    shows = np.array([name in LESION_LABELS for name in study.image.labels] or [False])[labels]
    size = study.image.size
    match study.gan.warm_start_anatomy:
        case "brain":
            return brain.draw_slices(rng, len(labels), size, lesion=shows, look=brain.PUBLIC_LOOK)
        case "skull_stripped_brain":
            return brain.draw_slices(rng, len(labels), size, lesion=shows, look=brain.PUBLIC_STRIPPED_LOOK)
        case "chest":
            return chest.draw_radiographs(rng, len(labels), size, opacity=shows)
