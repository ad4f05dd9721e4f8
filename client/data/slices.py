"""Prepared pixels on disk, and the images drawn from them at each step.

Each volume becomes the axial slices of ``common.orientation.SLICE_RANGE``, each picture one image; all are scaled,
padded to a square in millimetres and resized to the study's size. One file holds training patients only, another the
held-out ones, so no index error can mix them.

**Guarantee.** What is stored of a patient depends on that patient's images alone (``pixels.to_unit_range``), and
``draw`` never returns images of anyone else. How many images a patient has changes how they are drawn, not how many
patients there are.
"""

import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from client.data.cohort import Patient
from client.data.pixels import FloatArray, Picture, Refused, Volume, to_unit_range
from client.data.records import ImageRecord, Refusal, read_image
from common.errors import SiteError
from common.files import write_atomically
from common.orientation import SLICE_RANGE, axial_slice, slice_indices

PREPARATION_VERSION = 1
_MIN_SPREAD = 8 / 255  # a slice flatter than this shows background only


class Random(Protocol):
    """What ``draw`` needs of a source of randomness: ``random.Random`` and ``secrets.SystemRandom`` have it."""

    def sample(self, population: Sequence[int], k: int) -> list[int]: ...


@dataclass(frozen=True)
class PreparedCohort:
    """Prepared images of some patients; stays at the site.

    Attributes:
        images: uint8 (image, 1, row, column): one channel; read from disk as needed.
        label_indices: int64 (image,), into the study's labels; 0 where the study has none.
        patient_ids: in the order of their index; every one has at least one image.
        starts: int64 (patient + 1,): patient i owns images starts[i] to starts[i + 1] - 1.
        refusals: images that failed after the inventory had accepted them, for ``Inventory.with_refusals``.
    """

    images: npt.NDArray[np.uint8]
    label_indices: npt.NDArray[np.int64]
    patient_ids: tuple[str, ...]
    starts: npt.NDArray[np.int64]
    refusals: tuple[Refusal, ...]

    @property
    def num_patients(self) -> int:
        """Patients with at least one prepared image."""
        return len(self.patient_ids)

    def draw(
        self, patient_index: int, num_images: int, rng: Random | None = None
    ) -> tuple[FloatArray, npt.NDArray[np.int64]]:
        """Draws images of one patient without replacement, afresh each time.

        Args:
            patient_index: 0 to ``num_patients`` - 1.
            num_images: at most this many, 1 or more; a patient with fewer gives all, in random order.
            rng: a cryptographic source by default; only tests pass another.

        Returns:
            Images float32 (n, 1, row, column) in [-1, 1], and their label indices (n,).
        """
        if not 0 <= patient_index < self.num_patients:
            raise IndexError("patient index out of range")  # a negative one would wrap to another patient
        rng = rng if rng is not None else secrets.SystemRandom()
        own = range(int(self.starts[patient_index]), int(self.starts[patient_index + 1]))
        chosen = rng.sample(own, min(num_images, len(own)))
        images = np.asarray(self.images[chosen]).astype(np.float32) / np.float32(127.5) - np.float32(1)
        return images, self.label_indices[chosen]


def prepare(
    patients: tuple[Patient, ...],
    folder: Path,
    *,
    image_size: int,
    name: str,
    labels: tuple[str, ...] = (),
) -> PreparedCohort:
    """Prepares patients' images in a folder, or reopens them when nothing changed.

    Args:
        patients: training or held-out patients, sorted by id.
        folder: the site's private folder; made if absent.
        image_size: rows and columns.
        name: of this group of patients, such as ``training``; names the files.
        labels: the study's labels, in its order.

    Returns:
        The prepared patients. One none of whose images could be prepared is left out, and its files are refused.

    Raises:
        SiteError: the folder cannot be written.
    """
    key = _digest(patients, image_size, labels)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = _open(folder, name, key)
        if found is not None:
            return found
        _build(patients, folder, name, key, image_size, labels)
        found = _open(folder, name, key)
    except OSError as error:
        raise SiteError(
            f"The prepared images cannot be written to {folder}.", "Check the folder's rights and free space."
        ) from error
    if found is None:
        raise SiteError(f"The prepared images in {folder} were changed by another process.", "Run one at a time.")
    return found


def reopen(folder: Path, *, name: str) -> PreparedCohort:
    """Opens what ``prepare`` left, whatever study it was for; cheap, for every round.

    Args:
        folder, name: as for ``prepare``.

    Raises:
        SiteError: nothing was prepared there, or it is damaged.
    """
    found = _open(folder, name, None)
    if found is None:
        raise SiteError(f"There are no prepared images {name!r} in {folder}.", "Check and prepare the data first.")
    return found


def prepare_image(image: Volume | Picture, image_size: int) -> list[npt.NDArray[np.uint8]]:
    """The training images of one decoded image.

    Args:
        image: a checked volume or picture.
        image_size: rows and columns of the result.

    Returns:
        uint8 (row, column) images, inferior first; empty when every slice shows background only.
    """
    if isinstance(image, Picture):
        planes, spacing = [to_unit_range(image.pixels)], image.spacing_mm
    else:
        voxels = to_unit_range(image.voxels)
        planes = [axial_slice(voxels, z) for z in slice_indices(voxels.shape[2])]
        spacing = (image.spacing_mm[1], image.spacing_mm[0])  # rows run along Y, columns along X
    return [_to_square(plane, spacing, image_size) for plane in planes if np.ptp(plane) >= _MIN_SPREAD]


def _to_square(plane: FloatArray, spacing: tuple[float, float], image_size: int) -> npt.NDArray[np.uint8]:
    """Resizes with antialiasing so that a millimetre is as long both ways, and centres the plane on black."""
    from PIL import Image

    extent = (plane.shape[0] * spacing[0], plane.shape[1] * spacing[1])  # mm
    rows, columns = (max(1, round(length / max(extent) * image_size)) for length in extent)
    source = Image.fromarray(np.ascontiguousarray(plane, dtype=np.float32))  # mode F
    resized = np.asarray(source.resize((columns, rows), Image.Resampling.BICUBIC))
    square = np.zeros((image_size, image_size), np.uint8)
    top, left = (image_size - rows) // 2, (image_size - columns) // 2
    square[top : top + rows, left : left + columns] = np.round(np.clip(resized, 0, 1) * 255).astype(np.uint8)
    return square


def _digest(patients: tuple[Patient, ...], image_size: int, labels: tuple[str, ...]) -> str:
    """Changes with the patients, their files, the study's size and labels, or the way of preparation."""
    content: list[Any] = [PREPARATION_VERSION, list(SLICE_RANGE), image_size, list(labels)]
    for patient in patients:
        content.append([patient.patient_id, [_identity(record) for record in patient.records]])
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _identity(record: ImageRecord) -> list[Any]:
    files = []
    for path in record.files:
        try:
            status = path.stat()
            files.append([str(path), status.st_size, status.st_mtime_ns])
        except OSError:
            files.append([str(path), -1, -1])
    return [record.label, record.kind, record.format, files]


def _open(folder: Path, name: str, key: str | None) -> PreparedCohort | None:
    """The prepared cohort of this key (None: any), or None if there is none or it is damaged."""
    try:
        index = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        if key not in (None, index["key"]):
            return None
        images = np.load(folder / index["file"], mmap_mode="r", allow_pickle=False)
        starts = np.array(index["starts"], dtype=np.int64)
        label_indices = np.array(index["label_indices"], dtype=np.int64)
        refusals = tuple(Refusal(*entry) for entry in index["refusals"])
        patient_ids = tuple(index["patient_ids"])
    except (FileNotFoundError, ValueError, KeyError, TypeError, EOFError):
        return None
    if list(images.shape) != index["shape"] or not len(images) == len(label_indices) == starts[-1]:
        return None
    return PreparedCohort(images, label_indices, patient_ids, starts, refusals)


def _build(
    patients: tuple[Patient, ...],
    folder: Path,
    name: str,
    key: str,
    image_size: int,
    labels: tuple[str, ...],
) -> None:
    """Streams all images to a temporary file, renames it, then the index that points to it."""
    starts, patient_ids, label_indices = [0], [], []
    refusals: list[Refusal] = []
    data_name = f"{name}-{key[:16]}.npy"
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".preparing-")  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            header_bytes = _write_header(file, 0, image_size)
            for patient in patients:
                for image, label_index in _images_of(patient, image_size, labels, refusals):
                    file.write(image.tobytes())
                    label_indices.append(label_index)
                if len(label_indices) > starts[-1]:
                    patient_ids.append(patient.patient_id)
                    starts.append(len(label_indices))
            file.seek(0)
            # numpy leaves room in the header for a longer first axis
            if _write_header(file, len(label_indices), image_size) != header_bytes:
                raise SiteError("The prepared images cannot be stored: their header changed its length.")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / data_name)
    except BaseException:
        os.unlink(temporary)
        raise
    index = {
        "key": key,
        "file": data_name,
        "shape": [len(label_indices), 1, image_size, image_size],
        "patient_ids": patient_ids,
        "starts": starts,
        "label_indices": label_indices,
        "refusals": [[r.file, r.code, r.reason] for r in refusals],
    }
    write_atomically(folder / f"{name}.json", json.dumps(index).encode(), mode=0o600)
    for stale in folder.glob(f"{name}-*.npy"):
        if stale.name != data_name:
            stale.unlink(missing_ok=True)


def _images_of(
    patient: Patient, image_size: int, labels: tuple[str, ...], refusals: list[Refusal]
) -> Iterator[tuple[npt.NDArray[np.uint8], int]]:
    for record in patient.records:
        try:
            image, _ = read_image(record.files, record.kind, record.format)
            planes = prepare_image(image, image_size)
            if not planes:
                raise Refused("no_usable_slice", "expected anatomy in the middle of the volume, found background only")
            if labels and record.label not in labels:
                raise Refused("unknown_label", "expected one of the study's labels for this image, found another")
        except Refused as refused:
            refusals.append(Refusal(record.file, refused.code, refused.reason))
            continue
        label_index = labels.index(record.label) if labels and record.label is not None else 0
        for plane in planes:
            yield plane, label_index


def _write_header(file: Any, num_images: int, image_size: int) -> int:
    description = {"descr": "|u1", "fortran_order": False, "shape": (num_images, 1, image_size, image_size)}
    np.lib.format.write_array_header_1_0(file, description)
    return int(file.tell())
