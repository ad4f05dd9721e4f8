"""The noise: right size, normal, independent, and from no seed. Statistics have a fixed seed."""

import inspect
import math
import os

import numpy as np
import pytest
import torch
from scipy import stats

from common.privacy.noise import gaussian_noise
from tests.common.privacy.sources import Counted, failing, seeded, short

COUNT = 100_000


def noise(stddev: float = 1.0, seed: int = 1, count: int = COUNT) -> np.ndarray:
    return gaussian_noise(torch.zeros(count, dtype=torch.float64), stddev, seeded(seed)).numpy()


def test_one_value_by_hand() -> None:
    # One value takes 4 normals from 2 radii and 2 angles. All bytes zero: u = 2^-53 for both, so
    # r = sqrt(-2 ln 2^-53) = sqrt(106 ln 2), angle 2 pi 2^-53: cos 1, sin 0 (7e-16). (r + r + 0 + 0) / 2 = r.
    value = gaussian_noise(torch.zeros(1, dtype=torch.float64), 3.0, lambda count: bytes(count))
    assert value.item() == pytest.approx(3 * math.sqrt(106 * math.log(2)), rel=1e-12)
    # All bits one: u = 1, radius 0.
    assert gaussian_noise(torch.zeros(1), 3.0, lambda count: b"\xff" * count).item() == 0


@pytest.mark.parametrize("stddev", [1e-4, 1.0, 250.0])
def test_the_variance_is_right_to_well_under_3_percent(stddev: float) -> None:
    # sum of squares / stddev^2 is chi-square with 100 000 degrees of freedom, relative deviation 0.45 %: a standard
    # deviation 3 % too small lowers it by 5.9 %, 13 deviations.
    total = float((noise(stddev) ** 2).sum()) / stddev**2
    low, high = stats.chi2.interval(1 - 1e-5, COUNT)
    assert low < total < high
    assert not low < 0.97**2 * total < high


def test_the_mean_is_zero() -> None:
    assert abs(noise().mean()) < 4.5 / math.sqrt(COUNT)


def test_the_distribution_is_normal_out_to_the_tails() -> None:
    values = noise()
    assert stats.kstest(values, "norm").pvalue > 1e-4
    # 6.33e-5 of a normal lie beyond 4: 6.33 of 100 000, Poisson.
    assert 0 < (abs(values) > 4).sum() < 20
    assert abs(stats.kurtosis(values)) < 5 * math.sqrt(24 / COUNT)


def test_coordinates_are_independent() -> None:
    # The lags at which the Box-Muller halves and the four summands of a value lie, and small ones.
    values = noise()
    for lag in (1, 2, 3, 4, COUNT // 8, COUNT // 4, COUNT // 2, 3 * COUNT // 4):
        correlation = np.corrcoef(values[lag:], values[:-lag])[0, 1]
        assert abs(correlation) < 5 / math.sqrt(COUNT - lag)
        # cos and sin of one radius are uncorrelated, but their squares would tell.
        squares = np.corrcoef(values[lag:] ** 2, values[:-lag] ** 2)[0, 1]
        assert abs(squares) < 5 / math.sqrt(COUNT - lag)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_odd_shapes_have_full_variance(count: int) -> None:
    source = seeded(4)
    values = np.stack([gaussian_noise(torch.zeros(count), 1.0, source).numpy() for _ in range(4000)])
    assert (abs(values.var(axis=0) - 1) < 5 * math.sqrt(2 / 4000)).all()
    if count > 1:
        assert abs(np.corrcoef(values.T) - np.eye(count)).max() < 5 / math.sqrt(4000)


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 4, 4), (1, 0, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shape_dtype_and_device_follow_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    reference = torch.full(shape, math.nan, dtype=dtype)  # its values are not read
    result = gaussian_noise(reference, 2.0)
    assert (result.shape, result.dtype, result.device) == (reference.shape, dtype, reference.device)
    assert torch.isfinite(result).all()
    assert not result.requires_grad


def test_a_stddev_of_zero_is_no_noise() -> None:
    assert (gaussian_noise(torch.ones(10), 0.0) == 0).all()


@pytest.mark.parametrize("stddev", [-1.0, math.nan, math.inf])
def test_other_stddevs_are_refused(stddev: float) -> None:
    with pytest.raises(ValueError, match="stddev"):
        gaussian_noise(torch.zeros(3), stddev)


@pytest.mark.parametrize("source", [short, failing])
def test_a_source_that_fails_gives_no_noise(source: object) -> None:
    with pytest.raises(OSError, match="random"):
        gaussian_noise(torch.zeros(3), 1.0, source)  # type: ignore[arg-type]


def test_no_seed_reaches_the_noise() -> None:
    values = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        values.append(gaussian_noise(torch.zeros(100), 1.0))
    assert not (values[0] == values[1]).any()


def test_the_noise_leaves_torchs_random_state_alone() -> None:
    before = torch.get_rng_state()
    gaussian_noise(torch.zeros(100), 1.0)
    assert (torch.get_rng_state() == before).all()


def test_every_call_takes_fresh_bytes_from_the_operating_system() -> None:
    source = Counted()
    first, second = gaussian_noise(torch.zeros(3), 1.0, source), gaussian_noise(torch.zeros(3), 1.0, source)
    assert source.asked == [48, 48, 48, 48]  # 3 values of 4 normals: 6 radii and 6 angles of 8 bytes, each call
    assert not (first == second).any()
    assert inspect.signature(gaussian_noise).parameters["source"].default is os.urandom
