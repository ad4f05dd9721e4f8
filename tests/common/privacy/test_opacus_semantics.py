"""What the project relies on in Opacus, pinned by hand on the CPU: a release that changes it fails here first."""

from typing import Any

import pytest
import torch
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn


def rows_by_autograd(network: nn.Module, inputs: Tensor) -> list[list[Tensor]]:
    """Each parameter's gradient for each row alone."""
    parameters = list(network.parameters())
    return [list(torch.autograd.grad(network(row[None]).sum(), parameters)) for row in inputs]


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (nn.Conv2d(1, 3, 4, stride=2, padding=1), (1, 8, 8)),
        (nn.Conv2d(2, 3, 3, padding=1), (2, 5, 5)),
        (nn.Linear(6, 2), (6,)),
        (nn.GroupNorm(2, 4), (4, 3, 3)),
        (
            nn.Sequential(
                nn.Conv2d(1, 4, 4, stride=2, padding=1),
                nn.GroupNorm(2, 4),
                nn.LeakyReLU(0.2),
                nn.Flatten(),
                nn.Linear(64, 1),
            ),
            (1, 8, 8),
        ),
    ],
)
def test_per_sample_gradients_equal_autograd_row_by_row(network: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(5, *shape)
    if isinstance(network, nn.GroupNorm):  # the sum of a normalised image has no gradient: weigh the pixels
        network = nn.Sequential(network, nn.Tanh())
    expected = rows_by_autograd(network, inputs)
    wrapped: Any = GradSampleModule(network, loss_reduction="sum", strict=True)
    network(inputs).sum().backward()
    for position, parameter in enumerate(wrapped.parameters()):
        rows = torch.stack([row[position] for row in expected])
        torch.testing.assert_close(parameter.grad_sample, rows, rtol=1e-4, atol=1e-5)


def doubled(loss_reduction: str) -> list[float]:
    """grad_sample of D(x) = w x for x = 1 and 2, under a loss that is a sum."""
    network: Any = nn.Linear(1, 1, bias=False)
    GradSampleModule(network, loss_reduction=loss_reduction)
    network(torch.tensor([[1.0], [2.0]])).sum().backward()
    return [float(value) for value in network.weight.grad_sample.flatten()]


def test_loss_reduction_sum_leaves_rows_as_they_are_and_mean_multiplies_by_the_batch() -> None:
    assert doubled("sum") == [1, 2]
    assert doubled("mean") == [2, 4]


def one_weight(*gradients: float, noise_multiplier: float = 0.0, **options: Any) -> tuple[Any, DPOptimizer]:
    weight: Any = nn.Parameter(torch.zeros(1))
    weight.grad_sample = torch.tensor(gradients).view(-1, 1)
    settings: dict[str, Any] = {"max_grad_norm": 1.0, "expected_batch_size": 1, "loss_reduction": "mean", **options}
    return weight, DPOptimizer(torch.optim.SGD([weight], lr=1.0), noise_multiplier=noise_multiplier, **settings)


def test_the_optimizer_clips_sums_and_divides_by_the_expected_batch() -> None:
    # 10 is clipped to 1, 0.5 stays: (1 + 0.5) / 2.
    weight, optimizer = one_weight(10.0, 0.5, expected_batch_size=2)
    optimizer.step()
    assert weight.item() == pytest.approx(-0.75, abs=1e-6)


def test_the_norm_is_over_all_parameters_together() -> None:
    # 3 and 4 in two parameters: norm 5, each divided by 5.
    a: Any = nn.Parameter(torch.zeros(1))
    b: Any = nn.Parameter(torch.zeros(1))
    a.grad_sample, b.grad_sample = torch.tensor([[3.0]]), torch.tensor([[4.0]])
    sgd = torch.optim.SGD([a, b], lr=1.0)
    DPOptimizer(sgd, noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=1).step()
    assert (a.item(), b.item()) == (pytest.approx(-0.6, abs=1e-6), pytest.approx(-0.8, abs=1e-6))


def test_a_skipped_step_accumulates_the_clipped_sum_and_moves_nothing() -> None:
    weight, optimizer = one_weight(10.0)
    optimizer.signal_skip_step(True)
    optimizer.step()
    optimizer.zero_grad()
    assert weight.item() == 0
    assert float(weight.summed_grad) == pytest.approx(1.0, abs=1e-6)
    weight.grad_sample = torch.tensor([[0.25]])
    optimizer.signal_skip_step(False)
    optimizer.step()
    optimizer.zero_grad()
    assert weight.item() == pytest.approx(-1.25, abs=1e-6)
    assert weight.summed_grad is None


def test_two_backward_calls_on_one_step_concatenate_rows_and_halve_the_scale() -> None:
    # Why the trainer makes one backward call a step: the rows become two lists, and the divisor doubles.
    network: Any = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        network.weight.zero_()
    wrapped = GradSampleModule(network, loss_reduction="sum")
    optimizer = DPOptimizer(
        torch.optim.SGD(wrapped.parameters(), lr=1.0), noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=1
    )
    for value in (0.5, 0.25):
        network(torch.tensor([[value]])).sum().backward()
    assert isinstance(network.weight.grad_sample, list)
    optimizer.step()
    assert network.weight.item() == pytest.approx(-(0.5 + 0.25) / 2, abs=1e-6)


def test_disabled_hooks_leave_no_per_sample_gradient() -> None:
    network: Any = nn.Linear(1, 1)
    wrapped: Any = GradSampleModule(network, loss_reduction="sum")
    wrapped.disable_hooks()
    network(torch.ones(2, 1)).sum().backward()
    assert network.weight.grad_sample is None
    wrapped.enable_hooks()
    network(torch.ones(2, 1)).sum().backward()
    assert network.weight.grad_sample.shape == (2, 1, 1)


def test_hooks_fire_on_the_bare_network_too() -> None:
    # The trainer calls the discriminator itself, not its wrapper.
    network: Any = nn.Linear(1, 1)
    wrapped: Any = GradSampleModule(network, loss_reduction="sum")
    network(torch.tensor([[2.0]])).sum().backward()
    assert float(network.weight.grad_sample) == 2
    assert wrapped.hooks_enabled


def test_batch_norm_is_refused_by_strict_mode() -> None:
    with pytest.raises(NotImplementedError, match="buffer"):
        GradSampleModule(nn.BatchNorm2d(2), strict=True)


def test_add_noise_is_called_once_a_step_and_not_on_skipped_ones() -> None:
    calls = []

    class Counting(DPOptimizer):
        def add_noise(self) -> None:
            calls.append(1)
            super().add_noise()

    weight: Any = nn.Parameter(torch.zeros(1))
    optimizer = Counting(
        torch.optim.SGD([weight], lr=1.0), noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=1
    )
    for skip in (True, True, False):
        weight.grad_sample = torch.ones(1, 1)
        optimizer.signal_skip_step(skip)
        optimizer.step()
        optimizer.zero_grad()
    assert len(calls) == 1
