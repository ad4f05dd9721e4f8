"""Generator and discriminator of the DCGAN family (Radford et al. 2016), conditional on a label.

Another family is another pair of branches in ``build_*``: the trainer only needs a generator
``(latent (B, latent_size), label (B,)) -> images (B, channels, size, size) in [-1, 1]`` and a discriminator
``(images, label) -> logits (B,)``.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.config import StudyConfig, start_size

MAX_WIDTH_FACTOR = 8


def build_generator(study: StudyConfig) -> nn.Module:
    """Generator of the study, freshly initialised from torch's global random state."""
    gan, image = study.gan, study.image
    match gan.family:
        case "dcgan":
            network = DcganGenerator(
                gan.latent_size, image.num_classes, gan.generator_width, image.channels, image.size
            )
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a fifth faster, on CPUs too
            return network


def build_discriminator(study: StudyConfig) -> nn.Module:
    """Discriminator of the study. No layer mixes samples: one patient's gradient depends on that patient alone."""
    gan, image = study.gan, study.image
    match gan.family:
        case "dcgan":
            normalize = gan.discriminator_normalization == "group"
            return DcganDiscriminator(image.num_classes, gan.discriminator_width, image.channels, image.size, normalize)


class DcganGenerator(nn.Module):
    """Linear, then doublings by nearest neighbour and 3x3 convolution, GroupNorm, ReLU; tanh at the end.

    Upsample-and-convolve instead of transposed convolution avoids checkerboards (Odena et al. 2016). GroupNorm instead
    of BatchNorm, so that an image does not depend on its batch and sites have no running statistics to reconcile.
    """

    def __init__(self, latent_size: int, num_classes: int, width: int, channels: int, size: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.start = start_size(size)
        widths = _widths(width, size)[::-1]  # coarse to fine
        inputs = latent_size + (num_classes if num_classes > 1 else 0)
        self.stem = nn.Linear(inputs, widths[0] * self.start**2)
        layers: list[nn.Module] = [_group_norm(widths[0]), nn.ReLU()]
        for before, after in zip(widths, [*widths[1:], width], strict=True):
            layers += [
                nn.Upsample(scale_factor=2),
                nn.Conv2d(before, after, 3, padding=1),
                _group_norm(after),
                nn.ReLU(),
            ]
        layers += [nn.Conv2d(width, channels, 3, padding=1), nn.Tanh()]
        self.body = nn.Sequential(*layers)

    def forward(self, latent: Tensor, label: Tensor) -> Tensor:
        if self.num_classes > 1:
            latent = torch.cat([latent, functional.one_hot(label, self.num_classes).to(latent.dtype)], dim=1)
        hidden = self.stem(latent)
        return cast(Tensor, self.body(hidden.view(len(hidden), -1, self.start, self.start)))


class DcganDiscriminator(nn.Module):
    """Strided 4x4 convolutions with LeakyReLU, then one logit a class, of which the label picks one.

    **Guarantee.** The output is (B,), never (B, 1): a loss against (B,) targets would broadcast to (B, B) and mix
    patients. There is no BatchNorm, minibatch statistic or padding mode whose per-sample gradient Opacus gets wrong.
    """

    def __init__(self, num_classes: int, width: int, channels: int, size: int, normalize: bool) -> None:
        super().__init__()
        widths = _widths(width, size)  # fine to coarse
        layers: list[nn.Module] = []
        for before, after in zip([channels, *widths[:-1]], widths, strict=True):
            layers.append(nn.Conv2d(before, after, 4, stride=2, padding=1))
            if normalize and before != channels:
                layers.append(_group_norm(after))
            layers.append(nn.LeakyReLU(0.2))
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1] * start_size(size) ** 2, num_classes)

    def forward(self, images: Tensor, label: Tensor) -> Tensor:
        logits = self.head(self.body(images).flatten(1))  # (B, num_classes)
        return cast(Tensor, logits.gather(1, label[:, None])[:, 0])  # (B,)


def num_parameters(build: Callable[[StudyConfig], nn.Module], study: StudyConfig) -> int:
    """Number of trainable parameters of the network that ``build`` makes, without allocating it."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(study).parameters())


def _widths(width: int, size: int) -> list[int]:
    """Channels after each halving of ``size`` down to the start size, finest first."""
    halvings = (size // start_size(size)).bit_length() - 1
    return [width * min(2**level, MAX_WIDTH_FACTOR) for level in range(halvings)]


def _group_norm(channels: int) -> nn.GroupNorm:
    groups = next(count for count in (8, 4, 2, 1) if channels % count == 0 and channels // count >= 2 or count == 1)
    return nn.GroupNorm(groups, channels)
