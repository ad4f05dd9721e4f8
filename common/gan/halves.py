"""One half of a discriminator's step: the real images' or the fakes', as a sum of one clipped gradient an owner.

The losses are E_real a(D(x)) + E_fake b(D(G(z))) (``common/gan/losses.py``), so the halves can be made at different
places and added: a site makes the real one, the server the other. Their sum is what ``PatientOptimizer`` sums at one.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common.privacy.gradient import ROUNDING_MARGIN, average_over_owners, per_sample
from common.privacy.shared_noise import exact_step

SMALLEST_NORM = 1e-6  # added to norms by Opacus, so that both ways to make a step clip alike


def clipped_sum(
    discriminator: nn.Module,
    row_losses: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    owner: NDArray[np.int64],
    clip_norm: float,
    max_images: int,
) -> NDArray[np.float64]:
    """The sum over owners of the clipped mean gradient of their rows.

    Args:
        discriminator: on any device; as it was before, but for its ``grad``, which is None.
        row_losses: from logits (rows,) to losses (rows,), each of its row alone.
        images: (rows, channels, size, size); may be empty. Moved to the discriminator's device a call at a time.
        labels: (rows,) int64.
        owner: (rows,) ascending from 0, without gaps.
        clip_norm: the L2 bound of one owner's vector.
        max_images: rows of one call; an owner with more has a call alone.

    Returns:
        (parameters of the discriminator,) float64, in the order of ``to_vector``.

    **Guarantee.** Each owner's vector has a norm of at most ``clip_norm``, however many rows and however large they
    are; an owner with a gradient that is not finite adds zero. Norms and sums are float64, and the sum is exact in
    these vectors: one owner more or less moves it by exactly their own (``exact_step``). What an owner's rows give does
    not depend on others' but through the last bits of float32, as any batch's do.
    """
    parameters: list[Any] = list(discriminator.parameters())
    device, step = parameters[0].device, exact_step(clip_norm)
    total = [torch.zeros(parameter.shape, dtype=torch.float64, device=device) for parameter in parameters]
    wrapped = per_sample(discriminator)
    try:
        for rows, first, count in _calls(owner, max_images):
            own = torch.from_numpy(owner[rows] - first).to(device)
            row_losses(discriminator(images[rows].to(device), labels[rows].to(device))).sum().backward()
            average_over_owners(discriminator, own, count)
            vectors = [parameter.grad_sample.double() for parameter in parameters]  # each (count, *shape)
            norms = torch.stack([vector.flatten(1).square().sum(dim=1) for vector in vectors]).sum(dim=0).sqrt()
            factors = (clip_norm * (1 - ROUNDING_MARGIN) / (norms + SMALLEST_NORM)).clamp(max=1.0)
            for sum_, vector in zip(total, vectors, strict=True):
                vector.mul_(factors.view(-1, *[1] * (vector.ndim - 1)))
                sum_ += vector.div_(step).round_().mul_(step).sum(dim=0)
            discriminator.zero_grad(set_to_none=True)
            wrapped.set_grad_sample_to_none()
    finally:
        wrapped.to_standard_module()
        discriminator.zero_grad(set_to_none=True)
    return np.asarray(torch.cat([sum_.flatten() for sum_ in total]).cpu().numpy())


def _calls(owner: NDArray[np.int64], max_images: int) -> Iterator[tuple[slice, int, int]]:
    """Rows of each call, the first owner in it and how many there are; no owner is split."""
    num_owners = int(owner[-1]) + 1 if len(owner) else 0
    ends = np.searchsorted(owner, np.arange(num_owners), side="right")  # end row of each owner
    first = start = 0
    while first < num_owners:
        last = max(first + 1, int(np.searchsorted(ends, start + max_images, side="right")))
        end = int(ends[last - 1])
        yield slice(start, end), first, last - first
        first, start = last, end
