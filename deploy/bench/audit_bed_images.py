"""Patients and generators of the audit's test bed: honest ones, useless ones, and those that remember.

Every generator is a plain function of a ``Setting`` that gives images and says which patients they depend on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from deploy.bench import audit_kinds, audit_score

Images = NDArray[np.uint8]
Mask = NDArray[np.bool_]

NUM_PATIENTS, NUM_CANDIDATES = 500, 1100
COPIES = (1, 2, 4, 8, 16, 30, 64)
DIALS = (0.1, 0.3, 0.5, 0.7, 0.9)
_COMPONENTS = 100  # of the Gaussian, or half as many as there are patients
_COLLAPSED = 20  # different images of a collapsed generator


@dataclass(frozen=True)
class Setting:
    """The patients of one cell.

    Args:
        fresh: (n, rows, columns) images of patients who are nobody's: the generator's honest images.
        people: images of each patient, (k, rows, columns) each.
        training: (patients,) who is trained on.
        share: chance to be held out.
        rng: of what the generator draws.
    """

    fresh: Images
    people: list[Images]
    training: Mask
    share: float
    rng: np.random.Generator

    @property
    def taken(self) -> Images:
        """All images of all who are trained on."""
        return np.concatenate([self.people[k] for k in np.flatnonzero(self.training)])


@dataclass(frozen=True)
class Made:
    """What a generator has made.

    Args:
        candidates: (n, rows, columns).
        fixed: (patients,) whose being trained on the candidates follow from: the others could toss their coin again.
    """

    candidates: Images
    fixed: Mask


Generator = Callable[[Setting], Made]


def fresh(at: Setting) -> Made:
    """Images of patients who are nobody's: as good as a generator can be."""
    return Made(at.fresh, _nobody(at))


def copies(at: Setting, count: int, disguise: str = "exact") -> Made:
    """Fresh patients, and one image of so many who were trained on."""
    who = at.rng.choice(np.flatnonzero(at.training), min(count, int(at.training.sum())), replace=False)
    theirs = np.stack([at.people[k][at.rng.integers(len(at.people[k]))] for k in who])
    others = at.fresh[at.rng.integers(len(at.fresh), size=len(who))]
    theirs = audit_kinds.KINDS[disguise](theirs, others, at.rng)
    mixed = at.rng.permutation(np.concatenate([at.fresh[: len(at.fresh) - len(who)], theirs]))
    return Made(mixed, np.isin(np.arange(len(at.people)), who))


def blurry(at: Setting) -> Made:
    """Fresh patients, blurred."""
    width = 3 * at.fresh.shape[-1] / 64
    return Made(_grey(ndimage.gaussian_filter(at.fresh.astype(np.float32), (0, width, width))), _nobody(at))


def constant(at: Setting) -> Made:
    """The mean of all training images, with noise."""
    mean = at.taken.astype(np.float64).mean(0)
    noise = at.rng.standard_normal((len(at.fresh), *mean.shape))
    return Made(_grey(mean + 255 * 0.1 * noise), _everybody(at))


def collapsed(at: Setting) -> Made:
    """A few fresh patients again and again, with a little noise."""
    few = at.fresh[at.rng.integers(_COLLAPSED, size=len(at.fresh))].astype(np.float64)
    return Made(_grey(few + 255 * 0.02 * at.rng.standard_normal(few.shape)), _nobody(at))


def other_contrast(at: Setting) -> Made:
    """Fresh patients on a scanner that shows bright what the others show dark, within the body."""
    values = at.fresh.astype(np.float64)
    return Made(_grey(np.where(values > 25, 280 - values, values)), _nobody(at))


def bootstrap(at: Setting, dial: float) -> Made:
    """Training images drawn again, each with a part of it replaced by a draw of ``gaussian``: 0 copies, 1 remembers
    only the mean and the covariance. The variance is the same at every dial.
    """
    taken = at.taken.astype(np.float64)
    mean, drawn = _gaussian(taken, len(at.fresh), at.rng)
    resampled = taken[at.rng.permutation(np.arange(len(at.fresh)) % len(taken))] - mean
    return Made(_grey(mean + np.sqrt(1 - dial**2) * resampled + dial * drawn), _everybody(at))


def gaussian(at: Setting) -> Made:
    """Draws of the normal distribution with the training images' mean and leading principal components."""
    mean, drawn = _gaussian(at.taken.astype(np.float64), len(at.fresh), at.rng)
    return Made(_grey(mean + drawn), _everybody(at))


GENERATORS: dict[str, Generator] = {
    "fresh patients": fresh,
    **{f"fresh + {count} copies": partial(copies, count=count) for count in COPIES},
    "fresh + 30 disguised": partial(copies, count=30, disguise="combined"),
    "blurry": blurry,
    "constant mean + noise": constant,
    "collapsed": collapsed,
    "other contrast": other_contrast,
    **{f"bootstrap {dial:g}": partial(bootstrap, dial=dial) for dial in DIALS},
    "PCA-Gaussian": gaussian,
}


def setting(data: str, place: Path | None, seed: int, folder: Path) -> Setting:
    """The patients of a cell, drawn or divided by its seed; every one of them tosses the hold-out's coin.

    Args:
        data: "phantoms", "t1" or "chest".
        place: where the data are; None for phantoms.
        seed: of everything.
        folder: where phantoms are kept once drawn.
    """
    rng = np.random.default_rng([seed, 0])
    if data == "phantoms":
        images, people = _phantoms(seed, folder)
    else:
        if place is None:
            raise ValueError(f"no --data {data}=PLACE")
        everybody = (audit_score.t1 if data == "t1" else audit_score.chest)(place)
        order = rng.permutation(len(everybody))
        third = len(everybody) // 3
        images = np.concatenate([everybody[k].images for k in order[:third]])
        people = [everybody[k].images for k in order[third:]]
    share = 0.3 if len(people) < 450 else 0.2  # as for three sites of as many patients
    return Setting(images, people, rng.random(len(people)) >= share, share, np.random.default_rng([seed, 1]))


def _phantoms(seed: int, folder: Path) -> tuple[Images, list[Images]]:
    path = folder / f"phantoms-{seed}.npz"
    if not path.exists():
        drawn = audit_score.phantoms(NUM_CANDIDATES + NUM_PATIENTS, NUM_PATIENTS // 2)(np.random.default_rng([seed, 2]))
        fresh = drawn.fresh[:NUM_CANDIDATES]
        people = np.concatenate([person.images for person in drawn.training + drawn.held_out])
        np.savez(path, fresh=fresh, people=people)
    with np.load(path) as kept:
        return kept["fresh"], list(kept["people"][:, None])


def _gaussian(taken: NDArray[np.float64], count: int, rng: np.random.Generator) -> tuple[NDArray[np.float64], ...]:
    mean = taken.mean(0)
    flat = (taken - mean).reshape(len(taken), -1)
    _, values, directions = np.linalg.svd(flat, full_matrices=False)
    kept = min(_COMPONENTS, len(taken) // 2)
    drawn = rng.standard_normal((count, kept)) * values[:kept] / np.sqrt(len(taken) - 1) @ directions[:kept]
    return mean, drawn.reshape(count, *mean.shape)


def _grey(values: NDArray[np.floating]) -> Images:
    return np.asarray(np.clip(np.rint(values), 0, 255), np.uint8)


def _nobody(at: Setting) -> Mask:
    return np.zeros(len(at.people), np.bool_)


def _everybody(at: Setting) -> Mask:
    return np.ones(len(at.people), np.bool_)
