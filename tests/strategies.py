"""Hypothesis strategies for what the tests of several packages share."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from common.config import StudyConfig
from common.privacy.accounting import Mechanism

SIZES = (28, 32, 40, 48, 56, 64, 80, 96, 112, 128)

site_names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
labels = st.text(min_size=1, max_size=20).filter(lambda text: text == text.strip() and not set(text) & set(",="))
vectors = arrays.arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32, allow_nan=True))
mechanisms = st.builds(Mechanism, st.floats(1e-6, 1), st.floats(0.05, 1e5), st.integers(1, 10**6))
histories = st.lists(mechanisms, max_size=4).map(tuple)


@st.composite
def studies(draw: st.DrawFn) -> StudyConfig:
    """Valid studies whose every table differs from the defaults."""
    names = draw(st.just([]) | st.lists(labels, min_size=2, max_size=4, unique=True))
    tree = {
        "name": draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)),
        "seed": draw(st.integers(0, 2**32 - 1)),
        "image": {
            "size": draw(st.sampled_from(SIZES)),
            "label_column": draw(st.from_regex(r"[a-z ]{1,10}", fullmatch=True)) if names else "",
            "labels": names,
        },
        "gan": {
            "loss": draw(st.sampled_from(["non_saturating", "hinge", "least_squares"])),
            "latent_size": draw(st.integers(1, 1024)),
            "generator_learning_rate": draw(st.floats(1e-9, 1)),
            "discriminator_normalization": draw(st.sampled_from(["none", "group"])),
        },
        "privacy": {
            "enabled": draw(st.booleans()),
            "epsilon": draw(st.floats(1e-3, 1000)),
            "sampling_probability": draw(st.floats(1e-6, 1)),
        },
        "federation": {
            "rounds": draw(st.integers(1, 100_000)),
            "contracted_patients": draw(st.dictionaries(site_names, st.integers(1, 10**6), max_size=3)),
        },
        "performance": {"max_images_at_once": draw(st.integers(1, 4096)), "mixed_precision": draw(st.booleans())},
    }
    return StudyConfig.model_validate(tree)


@st.composite
def owners(draw: st.DrawFn, max_patients: int = 6, max_images: int = 12) -> NDArray[np.int64]:
    """The owner of each row of a draw: patients ascending from 0, each with one image or more; possibly nobody."""
    counts = draw(st.lists(st.integers(1, max_images), max_size=max_patients))
    return np.repeat(np.arange(len(counts), dtype=np.int64), counts)
