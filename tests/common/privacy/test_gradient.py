"""One clipped vector an owner, noise on every coordinate: by hand on a discriminator of two weights."""

import inspect
import math
import os
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from common.privacy.accounting import Mechanism
from common.privacy.gradient import ROUNDING_MARGIN, PatientOptimizer, average_over_owners, per_sample
from common.privacy.plan import PhasePlan
from tests.common.privacy.sources import Counted, failing, seeded, short
from tests.strategies import owners


def plan_of(clip_norm: float = 1.0, noise_multiplier: float = 1.0) -> PhasePlan:
    return PhasePlan(Mechanism(0.5, noise_multiplier, 1), clip_norm)


def network_with(rows: torch.Tensor) -> nn.Linear:
    """A layer of weights (1, 2) whose per-row gradients are ``rows`` (rows, 2); no bias."""
    network: Any = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        network.weight.zero_()
    network.weight.grad_sample = rows.view(-1, 1, 2)
    return network  # type: ignore[no-any-return]


def optimizer_of(network: nn.Module, *, noise_stddev: float | None = None, **options: Any) -> PatientOptimizer:
    plan = plan_of(options.pop("clip_norm", 1.0))
    optimizer = PatientOptimizer(torch.optim.SGD(network.parameters(), lr=1.0), plan, **options)
    if noise_stddev is not None:
        optimizer.noise_stddev = noise_stddev
    return optimizer


def test_rows_are_averaged_by_owner_by_hand() -> None:
    # Owner 0: mean of (1, 2) and (3, 6) = (2, 4). Owner 1: (5, 5) alone.
    network: Any = network_with(torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 5.0]]))
    assert average_over_owners(network, torch.tensor([0, 0, 1]), 2) == 0
    assert network.weight.grad_sample.view(2, 2).tolist() == [[2, 4], [5, 5]]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_owner_with_a_non_finite_row_is_zero_everywhere(value: float) -> None:
    network: Any = network_with(torch.tensor([[1.0, value], [3.0, 6.0], [5.0, 5.0]]))
    assert average_over_owners(network, torch.tensor([0, 0, 1]), 2) == 1
    assert network.weight.grad_sample.view(2, 2).tolist() == [[0, 0], [5, 5]]


def test_a_non_finite_value_in_one_layer_zeroes_the_owner_in_all() -> None:
    network: Any = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    for parameter in network.parameters():
        parameter.grad_sample = torch.ones(2, *parameter.shape)
    network[1].bias.grad_sample[0] = math.nan
    assert average_over_owners(network, torch.tensor([0, 1]), 2) == 1
    for parameter in network.parameters():
        assert parameter.grad_sample.flatten().tolist() == [0, 1]


def test_infinities_that_cancel_count_as_non_finite() -> None:
    network: Any = network_with(torch.tensor([[math.inf, 0.0], [-math.inf, 0.0]]))
    assert average_over_owners(network, torch.tensor([0, 0]), 1) == 1
    assert network.weight.grad_sample.flatten().tolist() == [0, 0]


@given(owners().filter(len), st.integers(0, 2**32 - 1))
def test_averages_equal_numpys(owner: NDArray[np.int64], seed: int) -> None:
    rows = np.random.default_rng(seed).normal(size=(len(owner), 2)).astype(np.float32)
    network: Any = network_with(torch.from_numpy(rows))
    num_owners = int(owner[-1]) + 1
    assert average_over_owners(network, torch.from_numpy(owner), num_owners) == 0
    expected = np.stack([rows[owner == each].mean(axis=0) for each in range(num_owners)])
    np.testing.assert_allclose(network.weight.grad_sample.view(-1, 2).numpy(), expected, atol=1e-5)


def test_clip_sum_and_divide_by_hand() -> None:
    # (3, 4) has norm 5, clipped to 1: (0.6, 0.8). (0.3, 0) stays. Sum (0.9, 0.8), divided by the public 2: SGD at
    # rate 1 from zero leaves -(0.45, 0.4), but for the rounding margin of 6e-5.
    network: Any = network_with(torch.tensor([[3.0, 4.0], [0.3, 0.0]]))
    optimizer_of(network, num_fakes=2, noise_stddev=0.0).step()
    np.testing.assert_allclose(network.weight.detach().numpy(), [[-0.45, -0.4]], atol=5e-5)


@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.sampled_from([1e-3, 1.0, 30.0]), st.floats(-6, 15))
def test_no_owner_moves_the_sum_by_more_than_clip_norm(
    seed: int, num_owners: int, clip_norm: float, magnitude: float
) -> None:
    random = np.random.default_rng(seed)
    rows = torch.from_numpy((random.normal(size=(num_owners, 2)) * 10**magnitude).astype(np.float32))
    sums = []
    for part in (rows, rows[1:]):
        network: Any = network_with(part)
        optimizer = optimizer_of(network, num_fakes=1, noise_stddev=0.0, clip_norm=clip_norm)
        optimizer.clip_and_accumulate()
        sums.append(network.weight.summed_grad.double())
    assert float((sums[0] - sums[1]).norm()) <= clip_norm


def test_a_norm_that_overflows_clips_to_zero() -> None:
    # (3e38, 3e38) is finite, its norm 4.2e38 is not: the factor is 0.
    network: Any = network_with(torch.tensor([[3e38, 3e38]]))
    optimizer = optimizer_of(network, num_fakes=1, noise_stddev=0.0)
    optimizer.clip_and_accumulate()
    assert torch.isfinite(network.weight.summed_grad).all()
    assert float(network.weight.summed_grad.norm()) <= 1


def test_the_margin_keeps_a_rounded_vector_inside() -> None:
    assert 0 < ROUNDING_MARGIN < 1e-4
    optimizer = optimizer_of(nn.Linear(2, 1), num_fakes=1, clip_norm=3.0)
    assert optimizer.max_grad_norm < 3.0


def test_noise_is_for_the_whole_bound_not_for_the_margin() -> None:
    optimizer = PatientOptimizer(torch.optim.SGD(nn.Linear(2, 1).parameters()), plan_of(4.0, 1.5), 1)
    assert optimizer.noise_stddev == 6.0


def test_every_coordinate_of_every_layer_is_noised() -> None:
    # 2 x 3 + 3 + 3 x 1 + 1 = 13 coordinates, 400 steps at standard deviation 2 over num_fakes 4.
    network: Any = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    optimizer = optimizer_of(network, num_fakes=4, noise_stddev=2.0, source=seeded(1))
    steps = []
    for _ in range(400):
        for parameter in network.parameters():
            parameter.grad_sample = torch.zeros(1, *parameter.shape)
        optimizer.pre_step()
        steps.append(torch.cat([parameter.grad.flatten() for parameter in network.parameters()]).numpy())
        optimizer.zero_grad()
    values = np.stack(steps)
    assert values.shape == (400, 13)
    assert (abs(values.var(axis=0) / 0.25 - 1) < 5 * math.sqrt(2 / 400)).all()
    assert (abs(values.mean(axis=0)) < 5 * 0.5 / 20).all()
    assert abs(np.corrcoef(values.T) - np.eye(13)).max() < 5 / 20


def test_an_owner_without_rows_at_all_still_gets_noise() -> None:
    network: Any = network_with(torch.zeros(0, 2))
    optimizer_of(network, num_fakes=1, noise_stddev=1.0).step()
    assert (network.weight != 0).all()


@pytest.mark.parametrize("source", [short, failing])
def test_a_failing_source_leaves_the_parameters_alone(source: Any) -> None:
    network: Any = network_with(torch.ones(1, 2))
    optimizer = optimizer_of(network, num_fakes=1, source=source)
    with pytest.raises(OSError, match="random"):
        optimizer.step()
    assert network.weight.tolist() == [[0, 0]]


def test_fresh_bytes_each_step_and_the_operating_system_by_default() -> None:
    source = Counted()
    network: Any = network_with(torch.ones(1, 2))
    optimizer = optimizer_of(network, num_fakes=1, source=source)
    optimizer.step()
    optimizer.zero_grad()
    network.weight.grad_sample = torch.ones(1, 1, 2)
    optimizer.step()
    assert source.asked == [32, 32] * 2  # 2 coordinates of 4 normals: 4 radii, 4 angles
    assert inspect.signature(PatientOptimizer.__init__).parameters["source"].default is os.urandom


def test_begin_step_forgets_a_skipped_sum() -> None:
    network: Any = network_with(torch.tensor([[0.5, 0.0]]))
    optimizer = optimizer_of(network, num_fakes=1, noise_stddev=0.0)
    optimizer.signal_skip_step(True)
    optimizer.step()
    optimizer.begin_step()
    network.weight.grad_sample = torch.tensor([[[0.0, 0.25]]])
    optimizer.step()
    assert network.weight.tolist() == [[0, -0.25]]


def test_per_sample_gradients_are_not_divided_by_the_batch() -> None:
    # D(x) = w . x for rows (1, 2) and (3, 4): the gradients of the sum of losses are the rows themselves.
    network: Any = nn.Linear(2, 1, bias=False)
    per_sample(network)
    network(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
    assert network.weight.grad_sample.view(2, 2).tolist() == [[1, 2], [3, 4]]


def test_layers_that_mix_samples_are_refused() -> None:
    with pytest.raises(Exception, match="[Bb]uffer|BatchNorm"):
        per_sample(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
