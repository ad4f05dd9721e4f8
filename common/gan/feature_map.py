"""A public feature map of images, whose noisy mean over patients teaches the generator (``moments``).

Matching the means of enough features matches the distribution (Salimans et al. 2016; privately in one step: Harder et
al. 2021, DP-MERF). The map is made from public images alone and travels as one flat vector; random weights are drawn
from a seed in it. Each image's features are bounded, so no later clipping makes a real mean differ from a generated
one.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from common.config import StudyConfig
from common.gan import networks
from common.gan.parameters import load_vector
from common.messages import Vector

VERSION = 2
HEADER = 6  # version, spatial axes, size, seed (two numbers below 65536: exact in float32), discriminator or not
KERNELS = (5, 3, 3)  # pixels along an axis of a kernel, by layer; each layer halves the image
COARSEST = 8  # pixels along an axis of the coarsest scale
LABEL_WEIGHT = 0.4  # of a patient's norm goes to the count of the labels


@dataclass(frozen=True)
class Size:
    """How much a map looks at.

    Args:
        widths: channels of the random convolutions of a scale, one after the other.
        grid: cells along an axis in which a layer's averages and squares are taken, by spatial axes.
        thumbnail: pixels along an axis of the low-resolution image, by spatial axes.
        projections: random projections of the low-resolution image, whose products are its second moments.
    """

    widths: tuple[int, ...]
    grid: dict[int, int]
    thumbnail: dict[int, int]
    projections: int


SIZES = (
    Size((8, 12), {2: 2, 3: 1}, {2: 8, 3: 4}, 16),
    Size((16, 32), {2: 4, 3: 2}, {2: 16, 3: 6}, 48),
    Size((16, 32, 64), {2: 4, 3: 2}, {2: 16, 3: 6}, 48),
)
"""Fewest features first."""


class FeatureMap:
    """Features of images: random convolutions at several scales, the discriminator's layers, a thumbnail, products.

    **Guarantee.** None is needed of it: a site clips each patient's vector whatever the map, so a map of any numbers
    changes what is learned, not the privacy.

    Args:
        study: gives the discriminator's architecture, the number of channels and the image's size.
        spatial_axes: 2 or 3.
        size: index into ``SIZES``.
        seed: of the random weights, 0 to 2**32 - 1.
        discriminator: flat parameters whose layers are features too, or empty; two spatial axes only.
        centre: (D,), mean of the raw features of public images.
        gain: (D,), by which the centred features are multiplied.
    """

    def __init__(
        self,
        study: StudyConfig,
        spatial_axes: int,
        size: int,
        seed: int,
        discriminator: Vector,
        centre: Vector,
        gain: Vector,
    ) -> None:
        self.study, self.spatial_axes, self.size, self.seed = study, spatial_axes, size, seed
        self.discriminator, self.centre, self.gain = discriminator, centre, gain
        self.block_sizes = block_sizes(study, spatial_axes, size, with_discriminator=len(discriminator) > 0)
        self._on: dict[torch.device, _Weights] = {}

    @classmethod
    def from_vector(cls, study: StudyConfig, vector: Vector) -> "FeatureMap":
        """The map that ``to_vector`` wrote.

        Raises:
            ValueError: the vector is not one of this version, of this study's shapes, or of finite numbers.
        """
        if vector.ndim != 1 or len(vector) < HEADER or not np.isfinite(vector).all() or vector[0] != VERSION:
            raise ValueError(f"expected a feature map of version {VERSION}, of finite numbers")
        axes, size, high, low, with_discriminator = (int(number) for number in vector[1:HEADER])
        seed = high * 65536 + low
        in_range = axes in (2, 3) and size in range(len(SIZES)) and 0 <= seed < 2**32 and with_discriminator in (0, 1)
        if not in_range or (with_discriminator and axes != 2):
            raise ValueError(
                f"expected a feature map of 2 or 3 spatial axes, one of {len(SIZES)} sizes, with a discriminator for 2 "
                "axes only, and a seed below 2**32"
            )
        count = networks.num_parameters(networks.build_discriminator, study) if with_discriminator else 0
        num_features = sum(block_sizes(study, axes, size, with_discriminator=bool(with_discriminator)))
        expected = HEADER + count + 2 * num_features
        if len(vector) != expected:
            raise ValueError(f"expected {expected} numbers for {num_features} features, found {len(vector)}")
        discriminator, rest = vector[HEADER : HEADER + count], vector[HEADER + count :]
        return cls(study, axes, size, seed, discriminator, rest[:num_features], rest[num_features:])

    def to_vector(self) -> Vector:
        """Flat float32: header, discriminator, centre, gain; at most half a megabyte for 32x32 pixels."""
        seed = [self.seed // 65536, self.seed % 65536]
        header = [VERSION, self.spatial_axes, self.size, *seed, len(self.discriminator) > 0]
        return np.concatenate([np.array(header, np.float32), self.discriminator, self.centre, self.gain])

    @property
    def num_features(self) -> int:
        """D."""
        return len(self.centre)

    def length(self, num_classes: int) -> int:
        """Length of a site's vector: for each class a block of D features and one entry that counts its images."""
        return num_classes * (self.num_features + 1)

    def __call__(self, images: Tensor) -> Tensor:
        """Features of images in [-1, 1], (n, channels, *spatial), to (n, D); differentiable, norms of at most 1.

        The bound is the image's, not only the patient's: a patient's mean then needs no clipping, which generated
        images would not undergo. Public images have a norm of about 1 before it.
        """
        weights = self._weights(images.device)
        features = (weights.raw(images) - weights.centre) * weights.gain
        bounded: Tensor = features / features.norm(dim=1, keepdim=True).clamp(min=1.0)
        return bounded

    def raw(self, images: Tensor) -> Tensor:
        """The same neither centred, scaled nor bounded."""
        return self._weights(images.device).raw(images)

    def scaled(self, centre: Tensor, gain: Tensor) -> "FeatureMap":
        """The same map with another centre and gain, (D,) each."""
        as_vectors = [np.asarray(part.cpu().numpy(), dtype=np.float32) for part in (centre, gain)]
        return FeatureMap(self.study, self.spatial_axes, self.size, self.seed, self.discriminator, *as_vectors)

    def _weights(self, device: torch.device) -> "_Weights":
        if device not in self._on:
            with torch.inference_mode(False):  # else the first call would decide whether later ones can have gradients
                self._on[device] = _Weights(self, device)
        return self._on[device]


def raw_feature_map(
    study: StudyConfig, spatial_axes: int, seed: int, discriminator: Vector, size: int = 1
) -> FeatureMap:
    """A map with centre 0 and gain 1, to find better ones with; arguments as of ``FeatureMap``."""
    count = sum(block_sizes(study, spatial_axes, size, with_discriminator=len(discriminator) > 0))
    centre, gain = np.zeros(count, np.float32), np.ones(count, np.float32)
    return FeatureMap(study, spatial_axes, size, seed, discriminator, centre, gain)


class _Weights:
    """The map's numbers on one device."""

    def __init__(self, feature_map: FeatureMap, device: torch.device) -> None:
        axes, study, size = feature_map.spatial_axes, feature_map.study, SIZES[feature_map.size]
        random = torch.Generator().manual_seed(feature_map.seed)
        before: int = study.image.channels
        self.axes, self.grid, self.side = axes, size.grid[axes], size.thumbnail[axes]
        self.layers = []
        for channels, kernel in zip(size.widths, KERNELS, strict=False):
            kernels = torch.randn(channels, before, *[kernel] * axes, generator=random)
            kernels *= math.sqrt(2 / kernels[0].numel())
            bias = 0.3 * torch.randn(channels, generator=random)
            self.layers.append((kernels.to(device), bias.to(device)))
            before = channels
        projections = torch.randn(size.projections, study.image.channels, *[self.side] * axes, generator=random)
        for _ in range(3):  # neighbouring pixels go together, as in images: rough projections would see noise
            projections = _average(functional.pad(projections, [1, 1] * axes, mode="replicate"), 3, 1)
        self.projections = torch.linalg.qr(projections.flatten(1).T)[0].to(device)
        first, second = torch.triu_indices(size.projections, size.projections)
        self.first, self.second = first.to(device), second.to(device)
        self.critic: list[nn.Module] = []
        if len(feature_map.discriminator):
            network = networks.build_discriminator(study)
            load_vector(network, feature_map.discriminator)
            self.critic = list(network.requires_grad_(False).to(device).get_submodule("body").children())
        self.centre = torch.from_numpy(feature_map.centre.copy()).to(device)
        self.gain = torch.from_numpy(feature_map.gain.copy()).to(device)
        self.thumbnail_centre = torch.split(self.centre, list(feature_map.block_sizes))[-3]

    def raw(self, images: Tensor) -> Tensor:
        """(n, D), neither centred nor scaled."""
        found = []
        convolve = functional.conv2d if self.axes == 2 else functional.conv3d
        for scale in _scales(images.shape[2]):
            hidden = _average(images, scale, scale) if scale > 1 else images
            for kernels, bias in self.layers:
                hidden = functional.relu(convolve(hidden, kernels, bias, stride=2, padding=kernels.shape[2] // 2))
                found.append(self._cells(hidden))
        hidden = images
        for layer in self.critic:
            hidden = layer(hidden)
            if isinstance(layer, nn.LeakyReLU):
                found.append(self._cells(hidden))
        thumbnail = _adaptive(images, self.side).flatten(1)
        projected = (thumbnail - self.thumbnail_centre) @ self.projections
        products = projected[:, self.first] * projected[:, self.second]
        return torch.cat([*found, thumbnail, thumbnail**2, products], dim=1)

    def _cells(self, maps: Tensor) -> Tensor:
        """Averages of the maps and of their squares in each cell of the grid, (n, features)."""
        return torch.cat([_adaptive(part, min(self.grid, maps.shape[2])).flatten(1) for part in (maps, maps**2)], dim=1)


def _scales(size: int) -> list[int]:
    """Factors by which an image of this size is reduced: 1, 2, ... while ``COARSEST`` pixels are left."""
    return [2**level for level in range((size // COARSEST).bit_length())]


def block_sizes(study: StudyConfig, spatial_axes: int, size: int, *, with_discriminator: bool) -> tuple[int, ...]:
    """Number of features of each block: layers of the convolutions, of the discriminator, thumbnail, square, products.

    Args:
        study, spatial_axes, size: as of ``FeatureMap``.
        with_discriminator: whether its layers are features.
    """
    chosen = SIZES[size]
    cells = 2 * chosen.grid[spatial_axes] ** spatial_axes  # averages and squares
    sizes = []
    for scale in _scales(study.image.size):
        side = study.image.size // scale
        for width in chosen.widths:
            side = (side + 1) // 2
            sizes.append(width * 2 * min(side, chosen.grid[spatial_axes]) ** spatial_axes)
    if with_discriminator:
        with torch.device("meta"):
            layers = networks.build_discriminator(study).modules()
        sizes += [layer.out_channels * cells for layer in layers if isinstance(layer, nn.Conv2d)]
    pixels = study.image.channels * chosen.thumbnail[spatial_axes] ** spatial_axes
    return (*sizes, pixels, pixels, chosen.projections * (chosen.projections + 1) // 2)


def _adaptive(maps: Tensor, cells: int) -> Tensor:
    pool = functional.adaptive_avg_pool2d if maps.ndim == 4 else functional.adaptive_avg_pool3d
    return pool(maps, cells)


def _average(maps: Tensor, kernel: int, stride: int) -> Tensor:
    pool = functional.avg_pool2d if maps.ndim == 4 else functional.avg_pool3d
    return pool(maps, kernel, stride)
