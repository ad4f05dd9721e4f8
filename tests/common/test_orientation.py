import numpy as np
import pytest

from common.orientation import SLICE_RANGE, axial_slice, slice_indices


def test_anterior_is_up_and_the_patients_right_is_on_the_left() -> None:
    # x grows to the right, y forward: voxel (1, 2) is right and anterior, voxel (0, 0) left and posterior.
    volume = np.zeros((2, 3, 4), np.int16)
    volume[1, 2, 3] = 1
    volume[0, 0, 3] = 2
    volume[1, 0, 3] = 3
    np.testing.assert_array_equal(axial_slice(volume, 3), [[1, 0], [0, 0], [3, 2]])


def test_every_pixel_is_the_documented_voxel() -> None:
    volume = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    picture = axial_slice(volume, 1)
    assert picture.shape == (3, 2)
    for row in range(3):
        for column in range(2):
            assert picture[row, column] == volume[1 - column, 2 - row, 1]


def test_slices_have_their_centres_in_the_range() -> None:
    # 48 slices: centres (z + 0.5) / 48, so z = 24 (0.5104) is the first past 0.5 and 35 (0.7396) the last before 0.75.
    assert SLICE_RANGE == (0.5, 0.75)
    assert list(slice_indices(48)) == list(range(24, 36))
    assert list(slice_indices(80)) == list(range(40, 60))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_thin_volumes_still_give_a_slice(depth: int) -> None:
    found = slice_indices(depth)
    assert len(found) >= 1
    assert all(0 <= z < depth for z in found)
