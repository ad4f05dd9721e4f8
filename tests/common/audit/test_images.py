"""Images of any size and scale, in one frame."""

import numpy as np
import pytest

from common.audit.images import normalise
from common.phantom.brain import draw_slices


def _heads(count: int, size: int) -> np.ndarray:
    drawn = draw_slices(np.random.default_rng(3), count, size, lesion=np.zeros(count, np.bool_))[:, 0]
    return np.rint((drawn + 1) * 127.5).astype(np.uint8)


def test_slices_and_volumes_come_out_in_their_frame() -> None:
    rng = np.random.default_rng(0)
    assert normalise(rng.integers(256, size=(2, 28, 33), dtype=np.uint8)).shape == (2, 64, 64)
    volumes = normalise(rng.integers(256, size=(1, 20, 60, 50), dtype=np.uint8))
    assert volumes.shape == (1, 48, 48, 48) and volumes.dtype == np.float32


def test_range_is_robust_to_a_few_bright_pixels() -> None:
    image = np.tile(np.arange(64, dtype=np.uint8), (64, 1))  # 0 to 63
    image[0, :20] = 255  # half a percent of the pixels
    found = normalise(image[None])[0]
    np.testing.assert_allclose(found[5, [0, 32, 63]], [0, 0.508, 1], atol=0.02)


def test_contrast_and_brightness_do_not_matter() -> None:
    heads = _heads(3, 64)
    fainter = np.rint(heads * 0.5 + 40).astype(np.uint8)
    np.testing.assert_allclose(normalise(fainter), normalise(heads), atol=0.01)


def test_size_hardly_matters() -> None:
    """Twice as many pixels, each as bright as the one it came from, make the same image."""
    heads = _heads(3, 64)
    larger = heads.repeat(2, 1).repeat(2, 2)
    assert np.abs(normalise(larger) - normalise(heads)).mean() < 0.05


def test_a_constant_image_is_all_zero() -> None:
    assert not normalise(np.full((1, 40, 40), 77, np.uint8)).any()


def test_other_numbers_of_axes_are_refused() -> None:
    with pytest.raises(ValueError, match="got 2 axes"):
        normalise(np.zeros((4, 4), np.uint8))
