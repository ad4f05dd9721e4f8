"""Images from a generator: post-processing, so it costs no privacy."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from common.config import StudyConfig
from common.gan import networks
from common.gan.parameters import load_vector
from common.messages import Vector

BATCH = 64


@dataclass(frozen=True)
class Synthetic:
    """Synthetic images.

    Args:
        images: (count, channels, size, size) float32 in [-1, 1].
        labels: (count,) int64 class indices.
    """

    images: NDArray[np.float32]
    labels: NDArray[np.int64]


def synthesize(study: StudyConfig, generator: Vector, labels: NDArray[np.int64], seed: int) -> Synthetic:
    """Draw one image for each label.

    The same (generator, labels, seed) gives the same images on one machine with as many threads; on another, grey
    levels may differ in the last place.
    """
    network = networks.build_generator(study).eval()
    load_vector(network, generator)
    random = torch.Generator().manual_seed(seed)
    latent = torch.randn(len(labels), study.gan.latent_size, generator=random)
    batches = zip(latent.split(BATCH), torch.from_numpy(labels).split(BATCH), strict=True)
    with torch.inference_mode():
        images = [network(part, label).numpy() for part, label in batches]
    return Synthetic(np.concatenate(images), labels)


def to_gray(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """[-1, 1] to 0..255, any shape."""
    return np.asarray(np.clip((images + 1) * 127.5 + 0.5, 0, 255), dtype=np.uint8)
