"""GAN losses as sums of a term for real and a term for fake images, each a row of the batch.

Every loss has the form  E_real a(D(x)) + E_fake b(D(G(z)))  and none mixes rows.
"""

from torch import Tensor
from torch.nn.functional import relu, softplus

from common.config import LossName


def real_loss(name: LossName, logits: Tensor) -> Tensor:
    """Discriminator's loss of each real image: a(D(x)). Shapes (B,) -> (B,)."""
    _check_rows(logits)
    match name:
        case "non_saturating":  # Goodfellow et al. 2014, -log sigmoid(D)
            return softplus(-logits)
        case "hinge":  # Lim & Ye 2017
            return relu(1.0 - logits)
        case "least_squares":  # Mao et al. 2017, targets 1 and 0
            return 0.5 * (logits - 1.0) ** 2


def fake_loss(name: LossName, logits: Tensor) -> Tensor:
    """Discriminator's loss of each fake image: b(D(G(z))). Shapes (B,) -> (B,)."""
    _check_rows(logits)
    match name:
        case "non_saturating":
            return softplus(logits)
        case "hinge":
            return relu(1.0 + logits)
        case "least_squares":
            return 0.5 * logits**2


def generator_loss(name: LossName, logits: Tensor) -> Tensor:
    """Generator's loss of each fake image. Shapes (B,) -> (B,)."""
    _check_rows(logits)
    match name:
        case "non_saturating":
            return softplus(-logits)
        case "hinge":
            return -logits
        case "least_squares":
            return 0.5 * (logits - 1.0) ** 2


def _check_rows(logits: Tensor) -> None:
    # (B, 1) against (B,) broadcasts to (B, B): every row then carries every patient, and clipping bounds nothing.
    if logits.ndim != 1:
        raise ValueError(f"logits must have shape (B,), found {tuple(logits.shape)}")
