"""Features that know what the images show: of a small network that learned to read facts off real images.

It is a measuring instrument, which no algorithm sees, so it may see real images. It has nothing in common with the
random convolutions of ``measures.features``, which resemble what ``moments`` fits, and finds out what is good at those
only.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import mse_loss

from common.files import locked, write_atomically
from deploy.bench.measures import Features, Images

NUM_FEATURES = 64
INSTRUMENT_SEED = 21
IMAGES_SEEN, MOST_EPOCHS = 120_000, 20  # in training; each image as often as that takes, within bounds
BATCH = 64
LEARNING_RATE = 1e-3
FOLDER = "instruments"


@dataclass(frozen=True)
class Lesson:
    """What an instrument learns from.

    Args:
        images: real ones, (count, 1, size, size) in [-1, 1].
        facts: what is known of each, (count, number of facts); a class is one fact a class, 0 or 1.
    """

    images: Images
    facts: NDArray[np.float32]


class Instrument:
    """A network from images to facts, read one layer before its end.

    Args:
        network: without its last layer; in evaluation mode.
        scale: root of the total variance of its features over the lesson's images: a Frechet distance of 1 is as far
            as real images spread.
    """

    def __init__(self, network: nn.Sequential, scale: float) -> None:
        self._network, self._scale = network.eval(), scale

    def features(self, images: Images) -> Features:
        """(count, 1, size, size) in [-1, 1] to (count, 64)."""
        with torch.inference_mode():
            parts = [self._network(part) for part in torch.from_numpy(images).split(500)]
        return np.asarray(torch.cat(parts).double().numpy()) / self._scale

    def to_bytes(self) -> bytes:
        """What ``from_bytes`` reads."""
        buffer = io.BytesIO()
        torch.save({"network": self._network.state_dict(), "scale": self._scale}, buffer)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, size: int) -> "Instrument":
        """The instrument that ``to_bytes`` was called on, for images of ``size`` pixels along each side."""
        saved = torch.load(io.BytesIO(data), weights_only=True)
        network = _network(size)
        network.load_state_dict(saved["network"])
        return cls(network, saved["scale"])


def make_instrument(lesson: Lesson) -> Instrument:
    """Train one: squared error on the facts, each scaled to variance 1. The same lesson makes the same instrument."""
    random = torch.Generator().manual_seed(INSTRUMENT_SEED)
    facts = torch.from_numpy(lesson.facts)
    varied = facts.std(dim=0) > 0
    targets = ((facts - facts.mean(dim=0)) / facts.std(dim=0))[:, varied]
    network = _network(lesson.images.shape[-1])
    head = nn.Sequential(nn.ReLU(), nn.Linear(NUM_FEATURES, targets.shape[1]))
    for part in [*network.modules(), *head]:
        if isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.kaiming_uniform_(part.weight, generator=random)
            nn.init.zeros_(part.bias)  # type: ignore[arg-type]
    images = torch.from_numpy(lesson.images)
    steps = min(IMAGES_SEEN, MOST_EPOCHS * len(images)) // BATCH
    optimizer = torch.optim.AdamW([*network.parameters(), *head.parameters()], LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        chosen = torch.randint(len(images), (BATCH,), generator=random)
        optimizer.zero_grad()
        mse_loss(head(network(images[chosen])), targets[chosen]).backward()
        optimizer.step()
        schedule.step()
    features = Instrument(network, 1.0).features(lesson.images[:2000])
    return Instrument(network, float(features.var(axis=0).sum() ** 0.5))


def _network(size: int) -> nn.Sequential:
    """Convolutions and halvings down to at most 4 pixels, then 64 features."""
    layers: list[nn.Module] = []
    channels, width = 1, 16
    while size > 4:
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        channels, width, size = width, min(64, 2 * width), size // 2
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * size**2, NUM_FEATURES))
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a third faster
    return network


def kept_instrument(folder: Path, name: str, size: int, lesson: Callable[[], Lesson]) -> Instrument:
    """The instrument of this name that lies in the folder of results; made and kept there when there is none.

    Args:
        folder: of the results.
        name: of all that the lesson depends on.
        size: pixels along each side.
        lesson: called when there is no such instrument.
    """
    (folder / FOLDER).mkdir(exist_ok=True)
    path = folder / FOLDER / f"{name}.pt"
    with locked(folder / FOLDER / "lock"):
        if not path.exists():
            write_atomically(path, make_instrument(lesson()).to_bytes())
    return Instrument.from_bytes(path.read_bytes(), size)
