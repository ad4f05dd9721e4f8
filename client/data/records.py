"""One usable image on disk, one refused file, and the way from files to pixels."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from client.data.pixels import Picture, Refused, Volume

Kind = Literal["volume", "image"]
Format = Literal["nifti", "image", "dicom"]


@dataclass(frozen=True)
class Refusal:
    """A file that is not used, for the site's own eyes.

    Attributes:
        file: relative to the data folder; for a DICOM series, the file that shows the reason.
        code: stable, in snake_case, such as ``truncated``.
        reason: one sentence: expected and found. Never a header value, never a pixel value.
    """

    file: str
    code: str
    reason: str


@dataclass(frozen=True)
class ImageRecord:
    """One image of one patient.

    Attributes:
        file: its name, relative to the data folder, as in a ``Refusal``; for a DICOM series, one of its files.
        patient_id: whose it is.
        label: the image's label, not the patient's: a patient's X-rays may carry several; None without labels.
        files: one NIfTI file, one picture, or the files of one DICOM series in slice order.
        kind: a volume, cut into axial slices, or a single image.
        format: which reader takes it.
    """

    file: str
    patient_id: str
    label: str | None
    files: tuple[Path, ...]
    kind: Kind
    format: Format


def read_image(files: tuple[Path, ...], kind: Kind, format: Format) -> tuple[Volume | Picture, tuple[Path, ...]]:
    """Decodes and checks the files of one image.

    Returns:
        The image, and its files in slice order.

    Raises:
        Refused: the image cannot be trusted; no other exception comes out of a damaged file.
    """
    try:
        if format == "nifti":
            from client.data.nifti import read_volume

            return read_volume(files[0]), files
        if format == "image":
            from client.data.pictures import read_picture

            return read_picture(files[0]), files
        from client.data import dicom

        return dicom.read_volume(files) if kind == "volume" else (dicom.read_picture(files[0]), files)
    except OSError as error:
        raise Refused("unreadable", "expected a file that can be opened, the system refuses it") from error
    except MemoryError as error:
        raise Refused("too_large", "expected an image that fits into memory") from error
