"""The server's part of ``joint``: the fakes' half of each discriminator step, and the generator.

It reads no patient: what it gets of them is noised and summed, and all that it makes is post-processing of that.
"""

import io
import math
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from common.config import StudyConfig
from common.gan import losses
from common.gan.halves import clipped_sum
from common.gan.parameters import load_vector, to_vector
from common.gan.training import GanTrainer
from common.messages import Vector
from server.aggregation import GanState

RATES = (1, 2, 5, 10, 20, 50, 100, 200)
_DECAY = 0.99
_GRACE = 200  # generator steps: 2 / (1 - _DECAY)


@dataclass
class StepRate:
    """How many discriminator steps go before each generator step (Bie, Kamath and Zhang 2023).

    A noisy discriminator that no longer tells fakes gives the generator nothing to learn from, and needs more steps
    between two of the generator's. Before each generator step the share of fresh fakes that it calls fake is
    measured, and averaged with a decay of 0.99, beginning with the first. Where the average is at or below
    ``threshold``, the rate goes up to the next of 1, 2, 5, 10, 20, 50, 100, 200, and stays there for 200 generator
    steps at least; the first may come after 200. It never goes down. Only fakes are looked at, so it costs no privacy.

    Args:
        steps: discriminator steps before each generator step.
        threshold: of the average, in (0.5, 1).
        average: of the shares so far; None before the first.
        taken: discriminator steps since the last generator step.
        generator_steps: generator steps since the rate last changed.
    """

    steps: int
    threshold: float
    average: float | None = None
    taken: int = 0
    generator_steps: int = 0

    def due(self) -> bool:
        """Count a discriminator step; whether the generator's turn has come."""
        self.taken += 1
        return self.taken >= self.steps

    def measured(self, accuracy: float) -> None:
        """Count a generator step, before which this share of fresh fakes was called fake."""
        self.average = accuracy if self.average is None else _DECAY * self.average + (1 - _DECAY) * accuracy
        self.taken, self.generator_steps = 0, self.generator_steps + 1
        if self.generator_steps >= _GRACE and self.average <= self.threshold:
            self.steps = next((rate for rate in RATES if rate > self.steps), self.steps)
            self.generator_steps = 0


def threshold_for(study: StudyConfig) -> float:
    """The threshold of ``StepRate``: 0.70 up to epsilon 1, 0.60 from 10 on and without privacy, by log epsilon between.
    Smaller budgets mean more noise, and so a discriminator that needs more steps."""
    if not study.privacy.enabled:
        return 0.6
    return 0.7 - 0.1 * min(1.0, max(0.0, math.log10(study.privacy.epsilon)))


class JointTrainer:
    """Networks, optimizers and random state of the server during ``joint``.

    A step equals one of ``GanTrainer`` with all sites' patients in one place: fakes are clipped to ``clip_norm`` one by
    one, like patients, so that both halves keep one scale; the sum of both is divided by the expected batch, which is
    the number of fakes too.

    Args:
        study: the study.
        state: the networks to go on from; the optimizers begin anew.
        expected_batch_size: expected number of patients drawn a step at all sites together, at least 1. Public.
        clip_norm: the L2 bound of one patient's contribution.
        device: where to compute.
        seed: of latents and fake labels.
    """

    def __init__(
        self,
        study: StudyConfig,
        state: GanState,
        expected_batch_size: int,
        clip_norm: float,
        device: torch.device,
        seed: int,
    ) -> None:
        self._study, self._clip_norm = study, clip_norm
        self._gan = GanTrainer(study, device, None, expected_batch_size, seed)
        load_vector(self._gan.generator, state.generator)
        load_vector(self._gan.discriminator, state.discriminator)
        self._average = state.generator_average.copy()
        self._rate = StepRate(study.gan.discriminator_steps_per_generator_step, threshold_for(study))

    @property
    def discriminator(self) -> Vector:
        """The discriminator that sites need for the next step: (dim,) float32."""
        return to_vector(self._gan.discriminator)

    @property
    def rate(self) -> StepRate:
        """How often the generator steps, and why."""
        return self._rate

    def fake_half(self) -> NDArray[np.float64]:
        """The sum over as many fresh fakes as patients are expected of one clipped gradient each: (dim,)."""
        with torch.no_grad():
            images, labels = self._gan.draw_fakes(self._gan.num_fakes)
        owner = np.arange(len(images), dtype=np.int64)
        loss = partial(losses.fake_loss, self._study.gan.loss)
        pieces = self._study.performance.max_images_at_once
        return clipped_sum(self._gan.discriminator, loss, images, labels, owner, self._clip_norm, pieces)

    def step(self, noisy_sum: NDArray[np.float64]) -> None:
        """One step of the discriminator, and of the generator and its average where it is their turn.

        Args:
            noisy_sum: the sites' real halves with their noise, summed: (dim,).

        Raises:
            ValueError: it has another length or is not finite; nothing has changed.
        """
        if noisy_sum.shape != self.discriminator.shape or not np.isfinite(noisy_sum).all():
            raise ValueError(f"expected {len(self.discriminator)} finite values, found shape {noisy_sum.shape}")
        gradient = torch.from_numpy((noisy_sum + self.fake_half()) / self._gan.num_fakes)
        begin = 0
        for parameter in self._gan.discriminator.parameters():
            part = gradient[begin : begin + parameter.numel()].view_as(parameter)
            parameter.grad = part.to(device=parameter.device, dtype=parameter.dtype)
            begin += parameter.numel()
        self._gan.discriminator_optimizer.step()
        self._gan.discriminator_optimizer.zero_grad(set_to_none=True)
        if self._rate.due():
            self._rate.measured(self._share_called_fake())
            self._gan.generator_step()
            decay = np.float32(self._study.gan.ema_decay)
            self._average = decay * self._average + (1 - decay) * to_vector(self._gan.generator)

    def state(self, round_number: int) -> GanState:
        """The networks as the federation's state after a round."""
        return GanState(round_number, to_vector(self._gan.generator), self.discriminator, self._average.copy())

    def to_bytes(self) -> bytes:
        """All that a later ``from_bytes`` needs to go on as if it had never stopped."""
        buffer = io.BytesIO()
        networks = {name: torch.from_numpy(vector) for name, vector in self._vectors().items()}
        torch.save(
            {
                **networks,
                "generator_optimizer": self._gan.generator_optimizer.state_dict(),
                "discriminator_optimizer": self._gan.discriminator_optimizer.state_dict(),
                "random": self._gan.random.get_state(),
                "rate": asdict(self._rate),
            },
            buffer,
        )
        return buffer.getvalue()

    @classmethod
    def from_bytes(
        cls, data: bytes, study: StudyConfig, expected_batch_size: int, clip_norm: float, device: torch.device
    ) -> "JointTrainer":
        """The trainer that ``to_bytes`` was called on. Raises ValueError for bytes that are damaged or do not fit."""
        try:
            saved: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            networks = {name: saved[name].numpy() for name in ("generator", "discriminator", "generator_average")}
            trainer = cls(study, GanState(0, **networks), expected_batch_size, clip_norm, device, seed=0)
            trainer._gan.generator_optimizer.load_state_dict(saved["generator_optimizer"])
            trainer._gan.discriminator_optimizer.load_state_dict(saved["discriminator_optimizer"])
            trainer._gan.random.set_state(saved["random"])
            trainer._rate = StepRate(**saved["rate"])
        except Exception as error:  # torch raises many kinds for damaged bytes
            raise ValueError(f"not a saved trainer of this study ({type(error).__name__})") from None
        return trainer

    def _vectors(self) -> dict[str, Vector]:
        state = self.state(0)
        return {
            "generator": state.generator,
            "discriminator": state.discriminator,
            "generator_average": state.generator_average,
        }

    def _share_called_fake(self) -> float:
        """Of fresh fakes, how many the discriminator takes for fakes; its boundary lies between the loss's targets."""
        boundary = 0.5 if self._study.gan.loss == "least_squares" else 0.0
        with torch.no_grad():
            images, labels = self._gan.draw_fakes(self._study.gan.generator_batch_size)
            logits = self._gan.discriminator(images, labels)
        return float((logits < boundary).float().mean())
