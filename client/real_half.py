"""The half of a joint discriminator step that reads patients."""

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from common.config import StudyConfig
from common.gan import losses
from common.gan.halves import clipped_sum
from common.gan.training import RealBatch


def real_half(
    study: StudyConfig, discriminator: nn.Module, batch: RealBatch, clip_norm: float, device: torch.device
) -> NDArray[np.float64]:
    """The sum over the drawn patients of one clipped gradient each, before noise: it must not leave like this.

    Args:
        study: its loss, and how many images fit a call.
        discriminator: the server's, with any finite parameters; moved to ``device``.
        batch: the patients drawn for this step. May be empty: the sum is then zero, and is noised and sent all the
            same.
        clip_norm: L2 bound of one patient.
        device: where to compute.

    Returns:
        (parameters of the discriminator,) float64, in the order of ``to_vector``.

    **Guarantee.** One patient more or less moves the sum by at most ``clip_norm``, whatever the discriminator, however
    many images the patient has and however large they are: a patient's vector is the mean over their images of the
    gradient of the real loss, clipped. Where it is not finite it is zero.
    """
    return clipped_sum(
        discriminator.to(device),
        partial(losses.real_loss, study.gan.loss),
        torch.from_numpy(batch.images),
        torch.from_numpy(batch.labels),
        batch.owner,
        clip_norm,
        study.performance.max_images_at_once,
    )
