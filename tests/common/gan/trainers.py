"""Small trainers whose discriminator step can be read off: no noise, no optimizer between the sum and the test."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.config import StudyConfig
from common.gan.training import GanTrainer, RealBatch
from common.privacy.accounting import Mechanism
from common.privacy.gradient import PatientOptimizer
from common.privacy.plan import PhasePlan

CPU = torch.device("cpu")
DEVICES = [
    pytest.param(CPU, id="cpu"),
    pytest.param(
        torch.device("cuda"),
        id="cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: NOT checked on one"),
    ),
]
"""Every device that a site may compute on. Without a CUDA device its half is skipped, and pytest says so."""
CLIP_NORM = 1.0


def small_study(**tables: dict[str, Any]) -> StudyConfig:
    """A study with networks as narrow as the configuration allows; tables override its keys."""
    tree: dict[str, dict[str, Any]] = {
        "image": {"size": 28},
        "gan": {"latent_size": 4, "generator_width": 4, "discriminator_width": 4, "generator_batch_size": 4},
    }
    for name, changes in tables.items():
        tree.setdefault(name, {}).update(changes)
    return StudyConfig.model_validate(tree)


def small_plan(clip_norm: float = CLIP_NORM, noise_multiplier: float = 1.0) -> PhasePlan:
    return PhasePlan(Mechanism(0.5, noise_multiplier, 10), clip_norm)


class Reader(torch.optim.SGD):
    """Leaves the parameters alone and keeps the gradient that it was given, float64 (dim,) on the CPU."""

    gradient: Tensor

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        parts = [parameter.grad.double().flatten() for group in self.param_groups for parameter in group["params"]]
        self.gradient = torch.cat(parts).cpu()


def reading_trainer(
    study: StudyConfig,
    *,
    num_fakes: int = 4,
    clip_norm: float = CLIP_NORM,
    noise_stddev: float = 0.0,
    seed: int = 1,
    device: torch.device = CPU,
) -> GanTrainer:
    """A trainer with privacy whose optimizer only reads, by default without noise."""
    trainer = GanTrainer(study, device, small_plan(clip_norm), num_fakes, seed)
    optimizer = trainer.discriminator_optimizer
    assert isinstance(optimizer, PatientOptimizer)
    optimizer.original_optimizer = Reader(trainer.discriminator.parameters(), lr=1.0)
    optimizer.noise_stddev = noise_stddev
    return trainer


def movement(trainer: GanTrainer, real: RealBatch) -> tuple[Tensor, int]:
    """The sum that one step takes, (dim,) float64, and its number of non-finite patients; always the same fakes."""
    trainer.random.manual_seed(99)
    _, non_finite = trainer.discriminator_step(real)
    reader: Any = trainer.discriminator_optimizer.original_optimizer  # type: ignore[attr-defined]
    return reader.gradient * trainer.num_fakes, non_finite


def batch(study: StudyConfig, patients: list[NDArray[np.float32]], labels: list[int] | None = None) -> RealBatch:
    """A draw of these patients, each (images, 1, size, size); one label a patient."""
    image = study.image
    rows = [np.zeros((0, image.channels, image.size, image.size), np.float32), *patients]
    counts = [len(images) for images in patients]
    labels = labels if labels is not None else [0] * len(patients)
    return RealBatch(
        np.concatenate(rows),
        np.repeat(np.asarray(labels, np.int64), counts),
        np.repeat(np.arange(len(patients), dtype=np.int64), counts),
    )


def images(study: StudyConfig, count: int, seed: int, scale: float = 1.0) -> NDArray[np.float32]:
    size = study.image.size
    uniform = np.random.default_rng(seed).uniform(-1, 1, (count, 1, size, size))
    return (scale * uniform).astype(np.float32)
