"""Gaussian noise from the operating system's cryptographic source."""

import math
import os

import torch
from torch import Tensor

from common.privacy.sampling import ByteSource

NUM_SUMMANDS = 4


def gaussian_noise(reference: Tensor, stddev: float, source: ByteSource = os.urandom) -> Tensor:
    """Independent N(0, stddev^2) noise of the shape, device and dtype of ``reference``.

    Args:
        reference: any tensor; its values are not read.
        stddev: absolute standard deviation, finite and >= 0.
        source: bytes from a cryptographic source; anything else only in tests.

    Raises:
        OSError: the source failed or gave too little. Nothing is returned, so nothing un-noised can go on.

    **Guarantee.** No seed exists. Each value is a sum of four Box-Muller normals made in float64, halved: the set of
    reachable floats then no longer tells the noise-free value (Holohan & Braghin 2021, section 5.1; Opacus'
    ``secure_mode`` does the same).

    >>> gaussian_noise(torch.zeros(3), stddev=1.0).shape
    torch.Size([3])
    """
    if not (math.isfinite(stddev) and stddev >= 0):
        raise ValueError(f"stddev must be finite and not negative, found {stddev}")
    count = reference.numel()
    pairs = (count * NUM_SUMMANDS + 1) // 2
    radius = torch.sqrt(-2.0 * torch.log(_uniform(pairs, source)))
    angle = 2.0 * math.pi * _uniform(pairs, source)
    normals = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)])[: count * NUM_SUMMANDS]
    noise = normals.view(NUM_SUMMANDS, count).sum(dim=0) * (stddev / math.sqrt(NUM_SUMMANDS))
    return noise.view(reference.shape).to(device=reference.device, dtype=reference.dtype)


def _uniform(count: int, source: ByteSource) -> Tensor:
    """Uniform in (0, 1], 53 bits each: shape (count,), float64."""
    data = source(8 * count)
    if len(data) != 8 * count:
        raise OSError(f"the random source gave {len(data)} bytes of {8 * count}")
    if count == 0:
        return torch.empty(0, dtype=torch.float64)
    integers = torch.frombuffer(bytearray(data), dtype=torch.int64)
    return ((integers & (2**53 - 1)) + 1).to(torch.float64) * 2.0**-53
