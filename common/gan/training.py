"""One GAN's networks, optimizers and steps: the same code trains at a site with privacy and on phantoms without.

The discriminator's step is the only one that reads real images. The generator learns from the private discriminator
alone, so it, its average and all that it draws are post-processing.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common.config import StudyConfig
from common.gan import losses, networks
from common.privacy.gradient import PatientOptimizer, average_over_owners, per_sample
from common.privacy.plan import PhasePlan


@dataclass(frozen=True)
class RealBatch:
    """The images drawn for one step, grouped by patient. May be empty.

    Args:
        images: (rows, channels, size, size) float32 in [-1, 1].
        labels: (rows,) int64 class indices.
        owner: (rows,) int64, ascending from 0: the position of the row's patient in this draw.
    """

    images: NDArray[np.float32]
    labels: NDArray[np.int64]
    owner: NDArray[np.int64]


class GanTrainer:
    """Networks and optimizers of one party.

    Args:
        study: the study.
        device: where to compute.
        plan: the privacy plan, or None to train without privacy (phantoms, or public data by explicit choice).
        num_fakes: fakes a discriminator step, a public number; also the divisor of the summed gradient.
        seed: of initial weights, latents and fake labels. Noise and patient sampling never use it.
    """

    def __init__(
        self, study: StudyConfig, device: torch.device, plan: PhasePlan | None, num_fakes: int, seed: int
    ) -> None:
        gan = study.gan
        self.study = study
        self.device = device
        self.plan = plan
        self.num_fakes = num_fakes
        self.random = torch.Generator().manual_seed(seed)
        self.generator = _initialized(networks.build_generator(study), self.random).to(device)
        self.discriminator = _initialized(networks.build_discriminator(study), self.random).to(device)
        self.generator_optimizer = torch.optim.Adam(
            self.generator.parameters(), lr=gan.generator_learning_rate, betas=(0.5, 0.999)
        )
        self.discriminator_optimizer: torch.optim.Optimizer = torch.optim.Adam(
            self.discriminator.parameters(), lr=gan.discriminator_learning_rate, betas=(0.5, 0.999)
        )
        if plan is not None:
            self._per_sample = per_sample(self.discriminator)
            self._per_sample.disable_hooks()
            self.discriminator_optimizer = PatientOptimizer(self.discriminator_optimizer, plan, num_fakes)

    def draw_fakes(self, count: int) -> tuple[Tensor, Tensor]:
        """Fresh fakes with uniform labels: images (count, channels, size, size) and labels (count,)."""
        latent = torch.randn(count, self.study.gan.latent_size, generator=self.random).to(self.device)
        label = torch.randint(self.study.image.num_classes, (count,), generator=self.random).to(self.device)
        # bf16 and channels_last only where no clipped gradient is made: the discriminator stays float32 and contiguous,
        # as Opacus unfolds its activations and norms must be exact.
        mixed = self.device.type == "cuda" and self.study.performance.mixed_precision
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=mixed):
            images = self.generator(latent, label)
        return images.float(), label

    def discriminator_step(self, real: RealBatch) -> tuple[float, int]:
        """One step of the discriminator on the drawn patients and ``num_fakes`` fakes.

        Returns:
            The summed loss over rows and the number of non-finite patients: both derive from patients and stay here.
        """
        with torch.no_grad():
            fakes, fake_labels = self.draw_fakes(self.num_fakes)
        if isinstance(self.discriminator_optimizer, PatientOptimizer):
            self._per_sample.enable_hooks()
            self.discriminator_optimizer.begin_step()
        else:
            self.discriminator_optimizer.zero_grad(set_to_none=True)
        pieces = _pieces(real, fakes, fake_labels, self.study.performance.max_images_at_once)
        total_loss, non_finite = 0.0, 0
        for number, piece in enumerate(pieces):
            rows = self._row_losses(piece)
            if isinstance(self.discriminator_optimizer, PatientOptimizer):
                rows.sum().backward()
                non_finite += average_over_owners(self.discriminator, piece.owner, piece.num_owners)
                self.discriminator_optimizer.signal_skip_step(number < len(pieces) - 1)
                self.discriminator_optimizer.step()
                self.discriminator_optimizer.zero_grad(set_to_none=True)
            else:
                weight = 1.0 / torch.bincount(piece.owner, minlength=piece.num_owners)[piece.owner]
                ((rows * weight).sum() / self.num_fakes).backward()
            total_loss += float(rows.detach().sum())
        if self.plan is None:
            self.discriminator_optimizer.step()
        else:
            self._per_sample.disable_hooks()
        return total_loss, non_finite

    def generator_step(self) -> float:
        """One step of the generator on a fixed number of fresh fakes. Returns its mean loss; reads no real image."""
        for parameter in self.discriminator.parameters():
            parameter.requires_grad_(False)
        self.generator_optimizer.zero_grad(set_to_none=True)
        fakes, labels = self.draw_fakes(self.study.gan.generator_batch_size)
        loss = losses.generator_loss(self.study.gan.loss, self.discriminator(fakes, labels)).mean()
        loss.backward()
        self.generator_optimizer.step()
        for parameter in self.discriminator.parameters():
            parameter.requires_grad_(True)
        return float(loss.detach())

    def _row_losses(self, piece: "_Piece") -> Tensor:
        logits = self.discriminator(piece.images.to(self.device), piece.labels.to(self.device))
        real, fake = logits[: piece.num_real], logits[piece.num_real :]
        return torch.cat([losses.real_loss(self.study.gan.loss, real), losses.fake_loss(self.study.gan.loss, fake)])


@dataclass(frozen=True)
class _Piece:
    """Rows of one discriminator call: real rows first, then fakes; ``owner`` counts from 0 within the piece."""

    images: Tensor
    labels: Tensor
    owner: Tensor
    num_owners: int
    num_real: int


def _pieces(real: RealBatch, fakes: Tensor, fake_labels: Tensor, max_images: int) -> list[_Piece]:
    """Split a step into calls of at most ``max_images`` rows without splitting a patient (who may exceed it alone)."""
    device = fakes.device
    num_patients = int(real.owner[-1]) + 1 if len(real.owner) else 0
    ends = np.searchsorted(real.owner, np.arange(num_patients), side="right")  # end row of each patient
    cuts, start = [0], 0
    for patient in range(num_patients):
        if ends[patient] - start > max_images and cuts[-1] != patient:
            cuts.append(patient)
            start = int(ends[patient - 1])
    cuts.append(num_patients)
    pieces = []
    for first, last in zip(cuts[:-1], cuts[1:], strict=True):
        rows = slice(int(ends[first - 1]) if first else 0, int(ends[last - 1]) if last else 0)
        if rows.stop > rows.start:
            owner = torch.from_numpy(real.owner[rows] - first).to(device)
            images = torch.from_numpy(real.images[rows]).to(device)
            labels = torch.from_numpy(real.labels[rows]).to(device)
            pieces.append(_Piece(images, labels, owner, last - first, rows.stop - rows.start))
    for begin in range(0, len(fakes), max_images):
        part = fakes[begin : begin + max_images]
        own = torch.arange(len(part), device=device)
        pieces.append(_Piece(part, fake_labels[begin : begin + max_images], own, len(part), 0))
    return _joined(pieces, max_images)


def _joined(pieces: list[_Piece], max_images: int) -> list[_Piece]:
    """Join the last real piece and the first fake one when they fit into one call: the usual, small step."""
    for index in range(len(pieces) - 1):
        a, b = pieces[index], pieces[index + 1]
        if a.num_real and not b.num_real and len(a.images) + len(b.images) <= max_images:
            both = _Piece(
                torch.cat([a.images, b.images]),
                torch.cat([a.labels, b.labels]),
                torch.cat([a.owner, b.owner + a.num_owners]),
                a.num_owners + b.num_owners,
                a.num_real,
            )
            return [*pieces[:index], both, *pieces[index + 2 :]]
    return pieces


def _initialized(module: nn.Module, random: torch.Generator) -> nn.Module:
    """He initialisation (He et al. 2015) from ``random``, without touching torch's global random state."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(part.weight, a=0.2, generator=random)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    return module
