"""Means from noisy ones, where the noise is known: James-Stein shrinkage, a band of components at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

FIRST_BAND = 4  # principal components in the first band; each further one doubles how many are in front of its end


def principal_components(features: Tensor) -> tuple[Tensor, Tensor]:
    """Directions in which features vary, and how much.

    Args:
        features: (n, D), of n images; n is smaller than D, so the n x n Gram matrix is taken apart.

    Returns:
        Orthonormal rows (components, D), strongest first, and their variances (components,).
    """
    centred = features - features.mean(dim=0)
    values, vectors = torch.linalg.eigh((centred @ centred.T).double())
    keep = values > 1e-6 * values[-1]
    components: Tensor = (vectors[:, keep] / values[keep].sqrt()).T.float() @ centred
    return components.flip(0), (values[keep].flip(0) / len(features)).float()


def shrink(difference: Tensor, variance: float, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Positive-part James-Stein (Efron and Morris 1973) in each band of components, and in what is orthogonal to all.

    Args:
        difference: (D,) from the point that is shrunk toward.
        variance: of the noise in each coordinate.
        basis: (components, D) orthonormal rows, strongest first.

    Returns:
        The shrunk difference (D,), and the factors (components + 1,) in [0, 1], the last one of the rest.
    """
    along = basis @ difference
    rest = difference - along @ basis
    factors = torch.ones(len(basis) + 1, device=basis.device)
    for band in _bands(len(basis)):
        factors[band] = _stein_factor(along[band], band.stop - band.start, variance)
    factors[-1] = _stein_factor(rest, len(difference) - len(basis), variance)
    return (along * factors[:-1]) @ basis + rest * factors[-1], factors


def _stein_factor(part: Tensor, dimensions: int, variance: float) -> float:
    energy = float(part.pow(2).sum())
    return max(0.0, 1 - max(0, dimensions - 2) * variance / energy) if energy > 0 else 0.0


def _bands(count: int) -> Iterator[slice]:
    """0 to 4, to 8, to 16 ... ``count``: components of similar strength."""
    start, stop = 0, FIRST_BAND
    while start < count:
        yield slice(start, min(stop, count))
        start, stop = stop, 2 * stop
