"""Pictures of synthetic images, for the report and for files."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from common.config import StudyConfig
from common.gan.synthesis import synthesize, to_gray
from common.messages import Vector


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


def save_png(path: Path, pixels: NDArray[np.uint8], notice: str) -> None:
    """Write grey levels, (height, width), with a text that says what they are and how private."""
    text = PngInfo()
    text.add_text("Description", f"SYNTHETIC image. {notice}")
    Image.fromarray(pixels).save(path, pnginfo=text)
