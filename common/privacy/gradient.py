"""Per-patient clipped gradients: Opacus' per-sample gradients, one row a patient, clipped, summed, noised.

Design note. A discriminator step has R rows of real images and F rows of fakes in one call. Per-sample gradients of
Opacus are averaged over the rows of each *owner*: a patient owns all of their images, a fake owns itself. Opacus'
optimizer then clips each owner's vector, sums, and the noise is ours (see ``common/privacy/noise.py``). Fakes need no
privacy; they are clipped too so that real and fake gradients keep one scale.
"""

import os
import warnings
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from common.privacy.noise import gaussian_noise
from common.privacy.plan import PhasePlan
from common.privacy.sampling import ByteSource

# Real images need no gradient, and torch remarks on that when Opacus' hooks fire on the first layer.
warnings.filterwarnings("ignore", message="Full backward hook is firing when gradients are computed")

# Norms are float32: clipping a little inside the bound keeps the rounded vector inside it as well.
ROUNDING_MARGIN = 2.0**-14


class PatientOptimizer(DPOptimizer):
    """Opacus' clip-and-noise optimizer with noise from the operating system.

    **Guarantee.** With ``average_over_owners`` called after each backward pass, one patient more or less moves
    ``p.summed_grad``, all parameters together, by at most ``plan.clip_norm``, however many images the patient has and
    however large they are; noise of standard deviation ``plan.noise_stddev`` is added to every coordinate at every
    step, on an empty draw as well; the divisor is public.

    | edge case | what happens |
    |---|---|
    | no patient drawn | the sum holds fakes only; noise is added; the step counts |
    | NaN or Inf in a patient's gradient | the patient adds zero |
    | gradient norm overflows float32 | the clip factor is zero: the patient adds zero |
    | source of randomness fails | OSError before the parameters change |
    | a step breaks off half-way | ``begin_step`` forgets its sum |
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, plan: PhasePlan, num_fakes: int, source: ByteSource = os.urandom
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=plan.mechanism.noise_multiplier,
            max_grad_norm=plan.clip_norm * (1 - ROUNDING_MARGIN),
            expected_batch_size=num_fakes,
            loss_reduction="mean",
        )
        self.noise_stddev = plan.noise_stddev
        self.source = source

    def begin_step(self) -> None:
        """Drop whatever an interrupted step left: its sum would count a patient twice in the next one."""
        self._step_skip_queue.clear()
        self._is_last_step_skipped = False
        self.zero_grad(set_to_none=True)

    def add_noise(self) -> None:
        """Set ``p.grad`` to the clipped sum plus fresh noise. Called by Opacus once a step."""
        for parameter in self.params:
            summed: Any = parameter.summed_grad
            noise = gaussian_noise(summed, self.noise_stddev, self.source)
            parameter.grad = (summed + noise).view_as(parameter)


def per_sample(discriminator: nn.Module) -> GradSampleModule:
    """Wrap a discriminator so that backward leaves ``p.grad_sample``; rows are never averaged by Opacus itself."""
    return GradSampleModule(discriminator, loss_reduction="sum", strict=True)


def average_over_owners(discriminator: nn.Module, owner: Tensor, num_owners: int) -> int:
    """Replace per-row gradients by per-owner means, in place, before the optimizer clips them.

    Args:
        discriminator: after one backward pass; each parameter has ``grad_sample`` (rows, ...).
        owner: which owner each row belongs to, (rows,) int64 in [0, num_owners). Every owner has a row.
        num_owners: patients plus fakes.

    Returns:
        How many owners had a non-finite gradient and count as zero. It derives from patients: it stays at the site.
    """
    rows_of_owner = torch.bincount(owner, minlength=num_owners)
    finite = torch.ones(num_owners, dtype=torch.bool, device=owner.device)
    parameters: list[Any] = [parameter for parameter in discriminator.parameters() if parameter.requires_grad]
    for parameter in parameters:
        rows = parameter.grad_sample
        sums = torch.zeros((num_owners, *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
        sums.index_add_(0, owner, rows)
        means = sums / rows_of_owner.view(-1, *[1] * (rows.ndim - 1))
        finite &= torch.isfinite(means.flatten(1)).all(dim=1)
        parameter.grad_sample = means
    if not bool(finite.all()):
        for parameter in parameters:
            parameter.grad_sample[~finite] = 0.0
    return int((~finite).sum())
