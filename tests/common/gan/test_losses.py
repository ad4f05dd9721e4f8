"""Losses by hand, at logits whose values can be checked on paper."""

import math

import pytest
import torch
from torch import Tensor

from common.config import LossName
from common.gan.losses import fake_loss, generator_loss, real_loss

LOSSES: tuple[LossName, ...] = ("non_saturating", "hinge", "least_squares")
LOGITS = torch.tensor([0.0, 2.0, -3.0])


def log1p_exp(value: float) -> float:
    return math.log1p(math.exp(value))


@pytest.mark.parametrize(
    ("name", "real", "fake", "generator"),
    [
        # -log sigmoid(D) = log(1 + exp(-D)); for fakes log(1 + exp(D)).
        (
            "non_saturating",
            [math.log(2), log1p_exp(-2), log1p_exp(3)],
            [math.log(2), log1p_exp(2), log1p_exp(-3)],
            [math.log(2), log1p_exp(-2), log1p_exp(3)],
        ),
        # max(0, 1 - D), max(0, 1 + D), -D.
        ("hinge", [1, 0, 4], [1, 3, 0], [0, -2, 3]),
        # (D - 1)^2 / 2, D^2 / 2, (D - 1)^2 / 2.
        ("least_squares", [0.5, 0.5, 8], [0, 2, 4.5], [0.5, 0.5, 8]),
    ],
)
def test_losses_by_hand(name: LossName, real: list[float], fake: list[float], generator: list[float]) -> None:
    torch.testing.assert_close(real_loss(name, LOGITS), torch.tensor(real, dtype=torch.float32))
    torch.testing.assert_close(fake_loss(name, LOGITS), torch.tensor(fake, dtype=torch.float32))
    torch.testing.assert_close(generator_loss(name, LOGITS), torch.tensor(generator, dtype=torch.float32))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("loss", [real_loss, fake_loss, generator_loss])
@pytest.mark.parametrize("logits", [torch.zeros(3, 1), torch.zeros(()), torch.zeros(2, 3)])
def test_logits_of_another_shape_are_refused(name: LossName, loss: object, logits: Tensor) -> None:
    with pytest.raises(ValueError, match=r"\(B,\)"):
        loss(name, logits)  # type: ignore[operator]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("loss", [real_loss, fake_loss, generator_loss])
def test_a_rows_loss_depends_on_its_own_logit_alone(name: LossName, loss: object) -> None:
    jacobian = torch.autograd.functional.jacobian(lambda logits: loss(name, logits), LOGITS)  # type: ignore[operator]
    assert (jacobian == torch.diag(jacobian.diagonal())).all()
    assert loss(name, torch.zeros(0)).shape == (0,)  # type: ignore[operator]
