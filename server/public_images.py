"""Images that cost no privacy: of the current generator, or generic ones; and the same as other scanners see them."""

import torch
from torch import Tensor
from torch.nn import functional

from common.config import StudyConfig
from common.gan import networks
from common.gan.parameters import load_vector
from server.aggregation import GanState

_AT_ONCE = 128  # images


def public_images(study: StudyConfig, state: GanState, count: int, device: torch.device) -> Tensor:
    """Images of the averaged generator, or generic ones while there is none worth looking at.

    Args:
        study: its seed draws the images; without a warm start they are generic.
        state: the generator.
        count: number of images.
        device: where to make and leave them.

    Returns:
        (count, channels, size, size) in [-1, 1]; labels 0, 1, 2 ... in turn.
    """
    random = torch.Generator().manual_seed(study.seed)
    if study.gan.warm_start == "none":
        return generic_images(count, study.image.size, random).to(device)
    generator = networks.build_generator(study)
    load_vector(generator, state.generator_average)
    generator.to(device)
    latents = torch.randn(count, study.gan.latent_size, generator=random).to(device)
    labels = torch.arange(count, device=device) % study.image.num_classes
    parts = zip(torch.split(latents, _AT_ONCE), torch.split(labels, _AT_ONCE), strict=True)
    with torch.no_grad():
        return torch.cat([generator(*part) for part in parts])


def generic_images(count: int, size: int, random: torch.Generator) -> Tensor:
    """Soft blobs and strokes on a dark ground: (count, 1, size, size) in [-1, 1]."""
    ramp = torch.linspace(-1, 1, size)
    border = 2 * (ramp[:, None] ** 2 + ramp**2)
    images = []
    for _ in range(count):
        cells = int(torch.randint(3, 9, (), generator=random))
        coarse = torch.randn(1, 1, cells, cells, generator=random)
        field = functional.interpolate(coarse, size=(size, size), mode="bicubic")
        field = field / field.std()
        is_stroke = bool(torch.rand((), generator=random) < 0.5)
        images.append(torch.tanh(3 * ((0.3 - field.abs() if is_stroke else field - 0.3) - border)))
    return torch.cat(images)


def varied_images(images: Tensor, random: torch.Generator) -> Tensor:
    """The images, (n, channels, rows, columns), as other scanners and heads might have made them.

    Each has its own gamma, contrast, sharpness, zoom and place. How hospitals differ from public images is mostly of
    this kind, so the first principal components of varied images hold most of what there is to learn.
    """
    count = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(count, 1, 1, 1, generator=random)).to(images.device)

    grey = (images + 1).clamp(min=0) / 2
    grey = grey ** torch.exp(uniform(-0.7, 0.7)) * uniform(0.7, 1.2)
    grey = grey + uniform(-0.5, 1.0) * (functional.avg_pool2d(grey, 3, 1, 1) - grey)
    place = torch.zeros(count, 2, 3, device=images.device)
    place[:, 0, 0], place[:, 1, 1] = uniform(0.88, 1.12).flatten(), uniform(0.88, 1.12).flatten()
    place[:, :, 2] = 0.08 * torch.randn(count, 2, generator=random).to(images.device)
    grid = functional.affine_grid(place, list(grey.shape), align_corners=False)
    return (2 * functional.grid_sample(grey, grid, align_corners=False) - 1).clamp(-1, 1)
