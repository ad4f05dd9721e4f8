import time

import numpy as np
import pytest

from common.phantom.chest import draw_radiographs

HEALTHY = np.zeros(60, np.bool_)


def test_radiographs_fill_the_range() -> None:
    x = draw_radiographs(np.random.default_rng(0), 20, 48, opacity=np.arange(20) % 2 == 0)
    assert x.shape == (20, 1, 48, 48)
    assert x.dtype == np.float32
    assert x.min() == pytest.approx(-1, abs=0.05)
    assert 0.4 < x.max() <= 1
    assert np.abs(x[1:] - x[:-1]).mean(axis=(1, 2, 3)).min() > 0.03  # no two patients alike


def test_lungs_are_dark_and_the_heart_is_on_the_right_of_the_picture() -> None:
    mean = draw_radiographs(np.random.default_rng(0), 60, 64, opacity=HEALTHY)[:, 0].mean(axis=0)
    spine, right_lung, left_lung, belly = mean[30, 32], mean[26, 18], mean[26, 46], mean[58, 32]
    assert max(right_lung, left_lung) < spine - 0.4
    assert right_lung < belly - 0.4
    # At the height of the heart the shadow reaches further to the patient's left.
    assert mean[36, 40] > mean[36, 24] + 0.1
    assert mean[2, 2] < -0.7  # air above the shoulder


def test_opacities_brighten_the_lungs_and_nothing_else() -> None:
    # Same seeds, so the patients differ in their opacities only.
    ill = draw_radiographs(np.random.default_rng(4), 40, 64, opacity=np.ones(40, np.bool_))
    well = draw_radiographs(np.random.default_rng(4), 40, 64, opacity=np.zeros(40, np.bool_))
    change = (ill - well)[:, 0]
    assert change.min() > -0.05
    assert (change.max(axis=(1, 2)) > 0.15).mean() > 0.9
    assert change[:, :, 31:33].max() < 0.2  # little over the spine
    np.testing.assert_allclose(change[:, 60:], 0, atol=0.05)  # none in the belly


def test_equal_seeds_draw_equal_pictures() -> None:
    opacity = np.array([True, False])
    first, again, other = (draw_radiographs(np.random.default_rng(k), 2, 32, opacity=opacity) for k in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).mean() > 0.03


def test_labels_must_match_the_count() -> None:
    with pytest.raises(ValueError, match="expected"):
        draw_radiographs(np.random.default_rng(0), 3, 32, opacity=np.array([True]))


def test_it_is_quick() -> None:
    start = time.process_time()
    draw_radiographs(np.random.default_rng(0), 200, 64, opacity=np.zeros(200, np.bool_))
    assert time.process_time() - start < 4
