import time
from dataclasses import fields, replace

import numpy as np
import pytest
from numpy.typing import NDArray

from common.orientation import SLICE_RANGE, axial_slice, slice_indices
from common.phantom.brain import (
    PUBLIC_LOOK,
    PUBLIC_STRIPPED_LOOK,
    Anatomy,
    SiteLook,
    affine,
    draw_anatomies,
    draw_anatomy,
    draw_slices,
    percentiles,
    render_slices,
    render_volume,
    site_look,
)

QUIET = replace(PUBLIC_LOOK, noise_stddev=0.0)
LOOKS = [PUBLIC_LOOK, PUBLIC_STRIPPED_LOOK, site_look(3), site_look(4, skull_stripped=True)]


def volume_of(seed: int, look: SiteLook, *, lesion: bool = False, scan: int = 0) -> NDArray[np.float32]:
    anatomy = draw_anatomy(np.random.default_rng(seed), lesion=lesion)
    return render_volume(anatomy, look, rng=np.random.default_rng(scan))


def patient(anatomy: Anatomy, k: int) -> Anatomy:
    return Anatomy(**{field.name: getattr(anatomy, field.name)[k : k + 1] for field in fields(Anatomy)})


def test_a_volume_is_a_head_in_air() -> None:
    volume = volume_of(0, PUBLIC_LOOK)
    assert volume.shape == (64, 64, 48)
    assert volume.dtype == np.float32
    assert volume.min() >= 0
    assert 0.3 < (volume > 0.2).mean() < 0.6
    assert volume[:2, :2].mean() < 2 * PUBLIC_LOOK.noise_stddev  # air in the corner


def test_white_matter_is_brighter_than_grey_and_grey_than_fluid() -> None:
    x = draw_slices(
        np.random.default_rng(0), 40, 64, lesion=np.zeros(40, np.bool_), look=replace(QUIET, skull_stripped=True)
    )
    middle = x.mean(axis=0)[0]
    assert middle[32, 22] > middle[32, 32] + 0.2  # white matter beside the midline against the cleft and ventricles
    assert middle[32, 22] > middle[32, 14] + 0.1  # and against the cortex


def test_skull_stripping_leaves_the_brain_only() -> None:
    anatomy = draw_anatomy(np.random.default_rng(1), lesion=False)
    stripped = render_volume(anatomy, replace(QUIET, skull_stripped=True), rng=np.random.default_rng(0))
    whole = render_volume(anatomy, QUIET, rng=np.random.default_rng(0))
    brain = stripped > 0.3
    assert 0.1 < brain.mean() < 0.35
    assert (stripped == 0).mean() > 0.5
    np.testing.assert_allclose(stripped[brain], whole[brain], atol=0.25)
    assert np.abs(stripped[brain] - whole[brain]).mean() < 0.01


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("size", [32, 64])
def test_direct_slices_agree_with_those_of_volumes(look: SiteLook, size: int) -> None:
    fine, low_high = [], percentiles(look)
    for k in range(6):
        anatomy = draw_anatomy(np.random.default_rng(k), lesion=k % 2 == 0)
        volume = render_volume(anatomy, look, rng=np.random.default_rng(k))
        z = slice_indices(48)[2 * k]
        low, high = np.percentile(volume, [1, 99])
        assert low == pytest.approx(low_high[0], abs=0.02)
        assert high == pytest.approx(low_high[1], rel=0.12)
        cut = axial_slice(np.clip((volume - low) / (high - low), 0, 1), z)
        cut = cut.reshape(size, 64 // size, size, 64 // size).mean(axis=(1, 3))
        direct = render_slices(anatomy, [look], np.array([(z + 0.5) / 48]), size, rng=np.random.default_rng(k))[0]
        direct = np.clip((direct - low_high[0]) / (low_high[1] - low_high[0]), 0, 1)
        fine.append(np.corrcoef(cut.ravel(), direct.ravel())[0, 1])
        assert direct.mean() == pytest.approx(cut.mean(), abs=0.03)
    assert np.mean(fine) > 0.95


def test_a_slice_does_not_depend_on_who_is_drawn_with_it() -> None:
    look = replace(QUIET, bias_strength=0.0)
    anatomy = draw_anatomies(np.random.default_rng(0), lesion=np.arange(5) % 2 == 0)
    heights = np.linspace(0.4, 0.8, 5)
    together = render_slices(anatomy, [look] * 5, heights, 32, rng=np.random.default_rng(0))
    for k in range(5):
        alone = render_slices(patient(anatomy, k), [look], heights[k : k + 1], 32, rng=np.random.default_rng(0))
        np.testing.assert_allclose(together[k], alone[0], atol=1e-5)


@pytest.mark.parametrize("look", [QUIET, replace(PUBLIC_STRIPPED_LOOK, noise_stddev=0.0)])
def test_a_lesion_changes_its_place_and_nothing_else(look: SiteLook) -> None:
    look = replace(look, bias_strength=0.0)
    n = 24
    ill = draw_anatomies(np.random.default_rng(5), lesion=np.ones(n, np.bool_))
    well = replace(ill, lesion_radius_mm=np.zeros_like(ill.lesion_radius_mm))
    heights = np.random.default_rng(6).uniform(*SLICE_RANGE, n)
    pictures = [
        render_slices(one, [look] * n, heights, 64, rng=np.random.default_rng(0)) / look.wm for one in (ill, well)
    ]
    change = np.abs(pictures[0] - pictures[1])
    # A lesion of 13 to 18 mm radius covers 1 to 2 % of a 220 mm wide slice.
    changed = (change > 0.15).mean(axis=(1, 2))
    assert (changed > 0.003).mean() > 0.9
    assert changed.max() < 0.04
    assert (change.max(axis=(1, 2)) > 0.3).mean() > 0.9


def test_healthy_patients_have_no_lesion() -> None:
    anatomy = draw_anatomies(np.random.default_rng(0), lesion=np.array([True, False, True, False]))
    assert (anatomy.lesion_radius_mm[[1, 3]] == 0).all()
    assert (anatomy.lesion_radius_mm[[0, 2]] > 10).all()
    # Nothing is darker or brighter in the white matter of the healthy than their tissues are.
    healthy = render_slices(patient(anatomy, 1), [QUIET], np.array([0.7]), 64, rng=np.random.default_rng(0))[0]
    assert healthy[16:48, 16:48].max() < 1.1 * QUIET.wm


def test_sites_differ_more_than_patients_within_a_site() -> None:
    def contrast(volume: NDArray[np.float32]) -> float:
        # The cortex and the fluid against white matter, from percentiles of the head's middle.
        middle = volume[20:44, 16:48, 26:34]
        return float(np.percentile(middle, 15) / np.percentile(middle, 85))

    means, spreads = [], []
    for site in range(5):
        found = [contrast(volume_of(100 * site + k, site_look(site), scan=k)) for k in range(5)]
        means.append(np.mean(found))
        spreads.append(np.std(found))
    assert np.std(means) > 1.5 * np.mean(spreads)


def test_looks_of_hospitals_saturate_fat_and_keep_the_order_of_tissues() -> None:
    for seed in range(20):
        look = site_look(seed)
        assert look != PUBLIC_LOOK
        assert look == site_look(seed)
        assert 0.05 < look.csf < look.gm < look.wm < 0.9
        assert 0.3 < look.fat < 0.6 * PUBLIC_LOOK.fat
        # Fields of view that still hold the head.
        assert all(
            0.97 <= a / b <= 1.1 for a, b in zip(look.field_of_view_mm, PUBLIC_LOOK.field_of_view_mm, strict=True)
        )


def test_equal_seeds_draw_equal_pictures_and_other_seeds_others() -> None:
    lesion = np.array([True, False, True])
    first, again, other = (draw_slices(np.random.default_rng(seed), 3, 32, lesion=lesion) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).mean() > 0.05
    np.testing.assert_array_equal(volume_of(3, PUBLIC_LOOK), volume_of(3, PUBLIC_LOOK))


@pytest.mark.parametrize("look", [PUBLIC_LOOK, PUBLIC_STRIPPED_LOOK])
def test_slices_fill_the_range(look: SiteLook) -> None:
    rng = np.random.default_rng(0)
    x = draw_slices(rng, 30, 48, lesion=np.arange(30) % 2 == 0, look=look)
    assert x.shape == (30, 1, 48, 48)
    assert x.dtype == np.float32
    assert x.min() == pytest.approx(-1, abs=0.02)
    assert x.max() <= 1
    assert (x.max(axis=(1, 2, 3)) > 0.7).all()
    differences = np.abs(x[1:] - x[:-1]).mean(axis=(1, 2, 3))
    assert differences.min() > 0.03  # no two patients alike


def test_labels_must_match_the_count() -> None:
    with pytest.raises(ValueError, match="expected"):
        draw_slices(np.random.default_rng(0), 3, 32, lesion=np.array([True]))


def test_the_affine_centres_the_volume_and_gives_the_voxel_size() -> None:
    look = replace(PUBLIC_LOOK, field_of_view_mm=(192.0, 224.0, 144.0))
    # 192 / 64 = 3, 224 / 64 = 3.5, 144 / 48 = 3; the centre of the first voxel of 64 is 31.5 voxels from the middle.
    expected = [[3, 0, 0, -94.5], [0, 3.5, 0, -110.25], [0, 0, 3, -70.5], [0, 0, 0, 1]]
    np.testing.assert_allclose(affine(look, (64, 64, 48)), expected)


def test_the_patients_right_lies_at_high_x() -> None:
    anatomy = draw_anatomy(np.random.default_rng(0), lesion=True)
    right = replace(anatomy, lesion_centre_mm=np.array([[27, 0, 12]], np.float32))
    left = replace(anatomy, lesion_centre_mm=np.array([[-27, 0, 12]], np.float32))
    volumes = [render_volume(one, QUIET, rng=np.random.default_rng(0)) for one in (right, left)]
    difference = np.abs(volumes[0] - volumes[1])
    right_only = np.abs(
        volumes[0]
        - render_volume(
            replace(right, lesion_radius_mm=np.zeros((1, 3), np.float32)), QUIET, rng=np.random.default_rng(0)
        )
    )
    assert right_only[32:].sum() > 20 * right_only[:32].sum()
    assert difference[:32].sum() > 0.5 * difference[32:].sum()
    # In the picture it is on the left.
    picture = axial_slice(right_only, 29)
    assert picture[:, :32].sum() > 20 * picture[:, 32:].sum()


def test_it_is_quick() -> None:
    start = time.process_time()
    for k in range(12):
        volume_of(k, PUBLIC_LOOK)
    draw_slices(np.random.default_rng(0), 500, 32, lesion=np.zeros(500, np.bool_))
    assert time.process_time() - start < 10
