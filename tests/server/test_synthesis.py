import numpy as np

from common.gan import networks
from common.gan.parameters import to_vector
from common.gan.synthesis import BATCH, synthesize, to_gray
from server.synthesis import sample_grid
from tests.server.scripted import two_sites

STUDY = two_sites().with_changes("image", labels=("a", "b", "c"), label_column="group")
GENERATOR = to_vector(networks.build_generator(STUDY))


def test_one_image_for_each_label() -> None:
    labels = np.array([2, 0, 1] * 30, np.int64)
    synthetic = synthesize(STUDY, GENERATOR, labels, seed=1)
    assert synthetic.images.shape == (90, 1, 28, 28)
    assert synthetic.images.dtype == np.float32
    assert np.abs(synthetic.images).max() <= 1
    np.testing.assert_array_equal(synthetic.labels, labels)


def test_an_image_depends_on_its_label_and_seed_only() -> None:
    zeros, ones = np.zeros(BATCH + 3, np.int64), np.ones(BATCH + 3, np.int64)
    first, again, other_label = (synthesize(STUDY, GENERATOR, labels, 1).images for labels in (zeros, zeros, ones))
    other_seed = synthesize(STUDY, GENERATOR, zeros, 2).images
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other_label)
    assert not np.array_equal(first, other_seed)


def test_the_grid_has_the_same_image_at_the_same_place() -> None:
    grid = sample_grid(STUDY, GENERATOR, columns=4)
    assert (grid.shape, grid.dtype) == ((6 * 28, 4 * 28), np.uint8)
    labels = np.repeat([0, 0, 1, 1, 2, 2], 4)  # three labels, six rows
    images = to_gray(synthesize(STUDY, GENERATOR, labels, STUDY.seed).images[:, 0])
    np.testing.assert_array_equal(grid[28:56, 56:84], images[1 * 4 + 2])


def test_grey_levels_by_hand() -> None:
    levels = to_gray(np.array([-1, -2, 0, 1, 3, np.float32(0.5)], np.float32))
    assert levels.tolist() == [0, 0, 128, 255, 255, 191]
