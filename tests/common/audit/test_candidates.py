import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.audit import candidates as made
from common.audit.candidates import CandidateSet, merkle_root
from common.config import StudyConfig
from common.gan import networks

STUDY = StudyConfig.model_validate(
    {
        "image": {"size": 28, "label_column": "group", "labels": ["a", "b"]},
        "gan": {"latent_size": 4, "generator_width": 4, "discriminator_width": 4},
        "audit": {"candidates": 1000},
    }
)
LEAVES = st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=20)


def generator(seed: int = 0) -> np.ndarray:
    count = networks.num_parameters(networks.build_generator, STUDY)
    return np.random.default_rng(seed).normal(0, 0.2, count).astype(np.float32)


def test_a_generator_gives_the_same_candidates_every_time_and_another_gives_others() -> None:
    first, again, other = (made.generate(STUDY, generator(seed)) for seed in (0, 0, 1))
    assert np.array_equal(first.images, again.images) and first.root == again.root
    assert first.images.shape == (1000, 28, 28) and first.labels[:4].tolist() == [0, 1, 0, 1]
    assert made.largest_difference(first, other) > made.TOLERANCE
    assert len(np.unique(first.images, axis=0)) > 900


def test_nobody_can_choose_the_seed() -> None:
    renamed = STUDY.with_changes("", name="another")
    assert made.largest_difference(made.generate(STUDY, generator()), made.generate(renamed, generator())) > 10


def test_one_pixel_that_differs_is_found() -> None:
    found = made.generate(STUDY, generator())
    images = found.images.copy()
    images[999, 27, 27] ^= 128
    altered = CandidateSet(images, found.labels, found.indices)
    assert made.largest_difference(altered, found) == 128
    assert altered.root != found.root


def test_the_root_by_hand() -> None:
    a, b, c = (bytes([number]) * 32 for number in (1, 2, 3))
    node = hashlib.sha256(b"\x01" + a + b).digest()
    assert merkle_root([a, b, c]) == hashlib.sha256(b"\x01" + node + c).digest()


@given(LEAVES, LEAVES)
def test_no_two_lists_have_one_root(first: list[bytes], second: list[bytes]) -> None:
    assert (merkle_root(first) == merkle_root(second)) == (first == second)


@pytest.mark.parametrize("change", ["image", "label", "index", "order", "fewer"])
def test_the_root_covers_everything_about_a_candidate(change: str) -> None:
    images = np.arange(3 * 28 * 28, dtype=np.uint8).reshape(3, 28, 28)
    labels, indices = np.array([0, 1, 0]), np.array([2, 5, 9])
    root = CandidateSet(images, labels, indices).root
    if change == "image":
        images = images.copy()
        images[1, 0, 0] += 1
    elif change == "label":
        labels = np.array([0, 0, 0])
    elif change == "index":
        indices = np.array([2, 5, 10])
    elif change == "order":
        images = images[::-1]
    else:
        images, labels, indices = images[:2], labels[:2], indices[:2]
    assert CandidateSet(images, labels, indices).root != root
