"""Phantoms among the patients of a site: half of them are trained on, and the audit asks whether it can tell which.

Each canary is a coin of its own, fixed by the site's hold-out key and the study. Enrolment publishes the SHA-256 of
that key, so a site cannot choose its canaries, or who of them was included, after it has seen the audit; and who does
not know the key, the server among them, can tell neither. One that is included is drawn and clipped like a patient. It
has one image: all of its gradient then comes from that image, the case in which an image is memorised most easily.

**Guarantee.** Canaries are a function of the hold-out key and the study: no patient changes which there are, and one
patient more or less changes nothing of theirs. So they are fixed terms in every sum over patients: its sensitivity to a
patient, the coins of the Poisson sampling and the noise are what they were without them. They are nobody: no inventory,
contract, ledger or count of patients holds them. Their pixels stay in the site's folder.
"""

import hashlib
import hmac
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.data.cohort import KEY_NAME, holdout_key
from client.data.slices import PreparedCohort
from client.settings import SiteSettings
from common.canaries import num_canaries
from common.config import StudyConfig
from common.errors import SiteError
from common.files import write_atomically
from common.phantom.draw import draw_labels, draw_phantoms


@dataclass(frozen=True)
class Canaries:
    """A site's canaries, those trained on and those left out; stays at the site.

    Attributes:
        images: uint8 (canary, 1, row, column), as ``PreparedCohort`` has them; read from disk as needed.
        starts: int64 (canary + 1,): canary i owns image i.
        label_indices: int64 (canary,), into the study's labels.
        included: bool (canary,): which are trained on.
    """

    images: NDArray[np.uint8]
    starts: NDArray[np.int64]
    label_indices: NDArray[np.int64]
    included: NDArray[np.bool_]

    @property
    def trained(self) -> PreparedCohort:
        """Those that are trained on, in the form of patients."""
        numbers = np.flatnonzero(self.included)
        names = tuple(f"canary {number}" for number in numbers)
        starts = np.arange(len(numbers) + 1, dtype=np.int64)
        return PreparedCohort(self.images[numbers], self.label_indices[numbers], names, starts, ())


def canaries_of(settings: SiteSettings, study: StudyConfig) -> Canaries:
    """The site's canaries in a study, the same whenever they are asked for.

    Their pixels are drawn once and kept in the study's folder, for its owner's eyes only.

    Raises:
        SiteError: the hold-out key is gone or damaged, or the pixels cannot be kept.
        ConfigError: the study has no contract with this site.
    """
    count, size = num_canaries(study, settings.name), study.image.size
    if count == 0:
        nothing, nobody = np.zeros((0, 1, size, size), np.uint8), np.zeros(0, np.int64)
        return Canaries(nothing, np.zeros(1, np.int64), nobody, np.zeros(0, np.bool_))
    if not (settings.folder / KEY_NAME).exists():  # a new one would make other canaries than those trained on
        raise SiteError(f"{settings.folder / KEY_NAME} is gone.", "Restore the key.")
    key = canary_key(holdout_key(settings.folder), study)
    rng = np.random.default_rng(int.from_bytes(_keyed(key, "phantoms"), "big"))
    label_indices = draw_labels(study, count, rng)
    # A file of another key is not these canaries'.
    path = settings.study_folder(study.digest) / f"canaries-{_keyed(key, 'file').hex()[:16]}.npy"
    try:
        images = _kept(path, (count, 1, size, size))
        if images is None:
            _keep(path, draw_phantoms(study, label_indices, rng))
            images = _kept(path, (count, 1, size, size))
    except OSError as error:
        raise SiteError(
            f"The canaries cannot be kept in {path.parent}.", "Check the folder's rights and free space."
        ) from error
    if images is None:
        raise SiteError(f"{path} was changed by another process.", "Run one at a time.")
    included = np.array([is_included(key, number) for number in range(count)])
    return Canaries(images, np.arange(count + 1, dtype=np.int64), label_indices, included)


def canary_key(key: bytes, study: StudyConfig) -> bytes:
    """32 bytes, from the site's hold-out key: canaries stay apart from patients, whatever these are called."""
    return _keyed(key, f"synthward canaries {study.digest}")


def is_included(key: bytes, number: int) -> bool:
    """The canary's coin: HMAC-SHA256(``canary_key``, number) / 2^256 < 1/2, independent of every other."""
    return _keyed(key, f"included {number}")[0] < 128


def _keyed(key: bytes, what: str) -> bytes:
    return hmac.digest(key, what.encode(), hashlib.sha256)


def _kept(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8] | None:
    """The pixels on disk; None when there are none, or they are damaged: they are drawn again."""
    try:
        images: NDArray[np.uint8] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (FileNotFoundError, ValueError, EOFError):
        return None
    return images if images.shape == shape and images.dtype == np.uint8 else None


def _keep(path: Path, phantoms: NDArray[np.float32]) -> None:
    """Write phantoms in [-1, 1] as prepared images are: uint8."""
    buffer = io.BytesIO()
    np.save(buffer, np.round((phantoms + 1) * np.float32(127.5)).astype(np.uint8), allow_pickle=False)
    write_atomically(path, buffer.getvalue(), mode=0o600)
