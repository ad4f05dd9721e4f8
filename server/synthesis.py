"""Images from a generator: post-processing, so it costs no privacy."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

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
    """Draw one image for each label. The same (generator, labels, seed) gives the same images on one machine."""
    network = networks.build_generator(study).eval()
    load_vector(network, generator)
    random = torch.Generator().manual_seed(seed)
    latent = torch.randn(len(labels), study.gan.latent_size, generator=random)
    batches = zip(latent.split(BATCH), torch.from_numpy(labels).split(BATCH), strict=True)
    with torch.inference_mode():
        images = [network(part, label).numpy() for part, label in batches]
    return Synthetic(np.concatenate(images), labels)


def sample_grid(study: StudyConfig, generator: Vector, columns: int = 8) -> NDArray[np.uint8]:
    """A grid of synthetic images, (rows * size, columns * size) grey levels; with labels, whole rows share one.

    Six rows, or one for each label where there are more.

    Latents are the study's own and the same for every generator, so that two grids compare image by image.
    """
    num_classes = study.image.num_classes
    rows = max(6, num_classes)
    labels = np.repeat(np.arange(rows, dtype=np.int64) * num_classes // rows, columns)
    images = to_gray(synthesize(study, generator, labels, study.seed).images[:, 0])  # (rows * columns, size, size)
    size = study.image.size
    return images.reshape(rows, columns, size, size).transpose(0, 2, 1, 3).reshape(rows * size, columns * size)


def to_gray(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """[-1, 1] to 0..255, any shape."""
    return np.asarray(np.clip((images + 1) * 127.5 + 0.5, 0, 255), dtype=np.uint8)


def save_png(path: Path, pixels: NDArray[np.uint8], notice: str) -> None:
    """Write grey levels, (height, width), with a text that says what they are and how private."""
    text = PngInfo()
    text.add_text("Description", f"SYNTHETIC image. {notice}")
    Image.fromarray(pixels).save(path, pnginfo=text)
