"""Copies of patients, disguised: what a generator that remembers might show instead of a patient's image.

Every kind is a plain function (images, others, rng) -> copies. ``images`` and ``others`` are (n, rows, columns) uint8
on the same frame: the patients' images, and one image of somebody else for each (for mixtures and transplants).
Lengths are in pixels of a frame of 64; larger images are disguised in proportion.
"""

import io
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

Images = NDArray[np.uint8]
Rng = np.random.Generator
Kind = Callable[[Images, Images, Rng], Images]

_ELASTIC_SMOOTH = 6.0  # pixels over which an elastic displacement stays the same


def exact(images: Images, others: Images, rng: Rng) -> Images:
    """The images themselves."""
    return images.copy()


def noise(images: Images, others: Images, rng: Rng, stddev: float) -> Images:
    """Plus normal noise of so much of the range of grey."""
    return _grey(images + 255 * stddev * rng.standard_normal(images.shape))


def intensity(images: Images, others: Images, rng: Rng) -> Images:
    """Contrast times 0.6 to 1, brightness up by at most what is left of the range."""
    contrast = rng.uniform(0.6, 1, (len(images), 1, 1))
    return _grey(contrast * images + 255 * (1 - contrast) * rng.uniform(0, 1, contrast.shape))


def gamma(images: Images, others: Images, rng: Rng) -> Images:
    """Grey to a power between 0.6 and 1.6."""
    return _grey(255 * (images / 255) ** np.exp(rng.uniform(np.log(0.6), np.log(1.6), (len(images), 1, 1))))


def blur(images: Images, others: Images, rng: Rng, stddev: float) -> Images:
    """Convolved with a Gaussian."""
    scale = _scale(images)
    return _grey(ndimage.gaussian_filter(images.astype(np.float32), (0, stddev * scale, stddev * scale)))


def shift(images: Images, others: Images, rng: Rng) -> Images:
    """Moved by 2 to 4 pixels in any direction."""
    angle, length = rng.uniform(0, 2 * np.pi, len(images)), rng.uniform(2, 4, len(images)) * _scale(images)
    return _warped(images, np.eye(2), np.stack([length * np.sin(angle), length * np.cos(angle)], -1))


def flip(images: Images, others: Images, rng: Rng, axis: int) -> Images:
    """Mirrored: axis 1 up-down, 2 left-right."""
    return np.flip(images, axis).copy()


def rotation(images: Images, others: Images, rng: Rng, degrees: float) -> Images:
    """Turned to either side."""
    return _warped(images, _turn(np.deg2rad(degrees) * rng.choice([-1, 1], len(images))))


def combined(images: Images, others: Images, rng: Rng) -> Images:
    """Flipped or not, turned by up to 5 degrees, moved by up to 3 pixels, gamma, blurred by 1 pixel, noise 0.03."""
    images = np.where(rng.random((len(images), 1, 1)) < 0.5, images[:, :, ::-1], images)
    turn = _turn(np.deg2rad(rng.uniform(-5, 5, len(images))))
    images = _warped(images, turn, rng.uniform(-3, 3, (len(images), 2)) * _scale(images))
    return noise(blur(gamma(images, others, rng), others, rng, 1.0), others, rng, 0.03)


def elastic(images: Images, others: Images, rng: Rng, displacement: float) -> Images:
    """Every pixel displaced by a normal field, smooth over 6 pixels; the root mean square of its length is given."""
    scale = _scale(images)
    field = rng.standard_normal((len(images), 2, *images.shape[1:]))
    field = ndimage.gaussian_filter(field, (0, 0, _ELASTIC_SMOOTH * scale, _ELASTIC_SMOOTH * scale), mode="wrap")
    field *= displacement * scale / np.sqrt((field**2).sum(1, keepdims=True).mean((2, 3), keepdims=True))
    places = np.indices(images.shape[1:]) + field
    return _grey(np.stack([_sampled(one, place) for one, place in zip(images, places, strict=True)]))


def zoom(images: Images, others: Images, rng: Rng) -> Images:
    """Larger or smaller by 5 to 10 %."""
    factor = np.exp(rng.uniform(np.log(1.05), np.log(1.1), len(images)) * rng.choice([-1, 1], len(images)))
    return _warped(images, np.eye(2) / factor[:, None, None])


def crop(images: Images, others: Images, rng: Rng) -> Images:
    """A window of 7/8 of each side at random, resized to the whole."""
    reach = np.array(images.shape[1:]) / 16
    return _warped(images, np.eye(2) * 7 / 8, rng.uniform(-1, 1, (len(images), 2)) * reach)


def mixture(images: Images, others: Images, rng: Rng, share: float) -> Images:
    """This share of the image, the rest of another."""
    return _grey(share * images + (1 - share) * others)


def reconstruction(images: Images, others: Images, rng: Rng) -> Images:
    """By the leading principal components, half as many as there are images."""
    flat = images.reshape(len(images), -1).astype(np.float64)
    mean = flat.mean(0)
    left, values, right = np.linalg.svd(flat - mean, full_matrices=False)
    count = max(1, len(images) // 2)
    return _grey(((left[:, :count] * values[:count]) @ right[:count] + mean).reshape(images.shape))


def transplant(images: Images, others: Images, rng: Rng) -> Images:
    """A disc of 6 to 10 pixels' radius replaced by the other's, with soft edges."""
    rows, columns = np.indices(images.shape[1:])
    scale, middle = _scale(images), np.array(images.shape[1:]) / 2
    centre = middle + rng.uniform(-12, 12, (len(images), 2)) * scale
    radius = rng.uniform(6, 10, (len(images), 1, 1)) * scale
    distance = np.hypot(rows - centre[:, :1, None], columns - centre[:, 1:, None])
    theirs = np.clip((radius - distance) / (2 * scale) + 0.5, 0, 1)
    return _grey(theirs * others + (1 - theirs) * images)


def jpeg(images: Images, others: Images, rng: Rng) -> Images:
    """Compressed with quality 20."""
    return np.stack([_compressed(image) for image in images])


KINDS: dict[str, Kind] = {
    "exact": exact,
    "noise 0.01": partial(noise, stddev=0.01),
    "noise 0.05": partial(noise, stddev=0.05),
    "noise 0.10": partial(noise, stddev=0.10),
    "intensity": intensity,
    "gamma": gamma,
    "blur 1": partial(blur, stddev=1.0),
    "blur 2": partial(blur, stddev=2.0),
    "shift 2-4": shift,
    "flip left-right": partial(flip, axis=2),
    "flip up-down": partial(flip, axis=1),
    "rotation 3": partial(rotation, degrees=3.0),
    "rotation 5": partial(rotation, degrees=5.0),
    "rotation 10": partial(rotation, degrees=10.0),
    "combined": combined,
    "elastic 1": partial(elastic, displacement=1.0),
    "elastic 2": partial(elastic, displacement=2.0),
    "zoom": zoom,
    "crop": crop,
    "mixture 0.7": partial(mixture, share=0.7),
    "mixture 0.5": partial(mixture, share=0.5),
    "reconstruction": reconstruction,
    "transplant": transplant,
    "jpeg": jpeg,
}
"""Every kind that needs no more than images. A slice 3 mm off needs the volume: ``audit_score`` plants it."""


def _scale(images: Images) -> float:
    return float(images.shape[-1] / 64)


def _grey(values: NDArray[np.floating]) -> Images:
    return np.asarray(np.clip(np.rint(values), 0, 255), np.uint8)


def _turn(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    cos, sin = np.cos(angles), np.sin(angles)
    return np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)


def _warped(images: Images, matrices: NDArray[np.float64], offsets: NDArray[np.float64] | None = None) -> Images:
    """Image k at matrices[k] times the place from the middle, plus offsets[k]; (2, 2) is one matrix for all."""
    matrices = np.broadcast_to(matrices, (len(images), 2, 2))
    offsets = np.zeros((len(images), 2)) if offsets is None else offsets
    middle = (np.array(images.shape[1:]) - 1)[:, None, None] / 2
    from_middle = np.indices(images.shape[1:]) - middle
    places = np.einsum("nij,jrc->nirc", matrices, from_middle) + middle + offsets[:, :, None, None]
    return _grey(np.stack([_sampled(one, place) for one, place in zip(images, places, strict=True)]))


def _sampled(image: Images, places: NDArray[np.float64]) -> NDArray[np.float32]:
    return np.asarray(ndimage.map_coordinates(image.astype(np.float32), places, order=3, mode="nearest"))


def _compressed(image: Images) -> Images:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=20)
    return np.asarray(Image.open(buffer))
