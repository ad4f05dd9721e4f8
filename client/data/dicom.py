"""DICOM files to checked RAS volumes and grey images.

Two passes: ``scan_file`` reads one header and judges the file alone; ``read_volume`` or ``read_picture`` decodes what
belongs together and judges the geometry. Nothing is decoded before its announced size was checked.

Design note. Deflated files are refused unread: their whole data set would be inflated without a bound. Burned-in
text is suspected, unless the file says NO, wherever such text is usual (ultrasound, secondary captures, screens,
unknown modalities); a missing flag proves nothing there, and no flag is trusted on those that say YES.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from client.data.geometry import Frames, arrange, to_ras
from client.data.identifiers import identifying_field
from client.data.pixels import MIN_PIXELS, Picture, Refused, Volume, check_size, check_values, check_volume_shape
from common.quiet import quiet

_DEFLATED = ("1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.8.1")
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_TEXT_IS_USUAL = frozenset(
    ("US", "IVUS", "SC", "OT", "ES", "XC", "GM", "SM", "OP", "OPT", "DOC", "ECG", "BDUS", "BI", "TG", "")
)
_CROSS_SECTIONAL = frozenset(("CT", "MR", "PT", "NM"))


@contextmanager
def _guarded() -> Iterator[None]:
    """Turns what a damaged file does to pydicom into a refusal, and keeps pydicom silent.

    pydicom parses values when they are asked for, so any access may raise or warn, and its texts quote header values.
    """
    logging.getLogger("pydicom").propagate = False
    try:
        with quiet():
            yield
    except (Refused, MemoryError):
        raise
    except Exception as error:
        raise Refused("unreadable", "expected a readable DICOM file, a field in it cannot be parsed") from error


@dataclass(frozen=True)
class Scan:
    """What the header of one DICOM file says; stays at the site.

    Attributes:
        patient_id: PatientID, empty where it is.
        series: SeriesInstanceUID, or the folder where it is absent.
        kind: one slice or several of a volume, or an image of its own.
        problem: why the file alone is refused, or None.
        identifying: keyword of a field that may name a person, or None.
    """

    path: Path
    patient_id: str
    series: str
    kind: Literal["volume", "image"]
    problem: Refused | None
    identifying: str | None


def is_dicom(path: Path) -> bool:
    """Whether the file holds the DICOM mark, whatever its name."""
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


@_guarded()
def scan_file(path: Path) -> Scan:
    """Reads one header, without pixels.

    Raises:
        Refused: when the file cannot even be parsed as an image.
    """
    dataset = _read(path, stop_before_pixels=True)
    if "Rows" not in dataset or "Columns" not in dataset:
        raise Refused("not_an_image", "expected an image, found a DICOM file without rows and columns")
    modality = str(dataset.get("Modality", "") or "").upper()
    placed = "ImagePositionPatient" in dataset or "PerFrameFunctionalGroupsSequence" in dataset
    kind: Literal["volume", "image"] = "volume" if placed or modality in _CROSS_SECTIONAL else "image"
    problem = None
    try:
        _check_burned_in(dataset, modality)
        _check_pixel_kind(dataset)
        frames = int(dataset.get("NumberOfFrames", 1) or 1)
        check_size((frames, int(dataset.Rows), int(dataset.Columns)))
        if kind == "image" and frames > 1:
            raise Refused("several_frames", "expected one image, found several frames")
    except Refused as refused:
        problem = refused
    identifying = identifying_field(dataset)
    series = str(dataset.get("SeriesInstanceUID", "") or "") or path.parent.as_posix()
    patient_id = str(dataset.get("PatientID", "") or "").strip()
    return Scan(path, patient_id, series, kind, problem, identifying)


@_guarded()
def read_volume(files: tuple[Path, ...]) -> tuple[Volume, tuple[Path, ...]]:
    """Decodes one series.

    Args:
        files: the files of one series in any order, or one file of several frames.

    Returns:
        The volume, and the files in slice order (along the normal of the slices).

    Raises:
        Refused: undecodable pixels, or slices that do not make up a regular stack.
    """
    frames = [(path, frame) for path in files for frame in _frames(_read(path, stop_before_pixels=True))]
    _check_alike([frame for _, frame in frames])
    rows, columns = frames[0][1].size
    check_size((len(frames), rows, columns))
    order, step = arrange(Frames.of([frame.place for _, frame in frames]))
    stack = np.empty((columns, rows, len(frames)), np.float32)
    where = {index: position for position, index in enumerate(order)}
    start = 0
    for path in files:
        for pixels in _decode(path):
            if pixels.shape != (rows, columns) or start >= len(frames):
                raise Refused("undecodable", "expected pixels of the announced size, found another")
            stack[:, :, where[start]] = pixels.T  # (column, row)
            start += 1
    if start != len(frames):
        raise Refused("undecodable", "expected as many frames as the headers announce, found fewer")
    volume = to_ras(stack, frames[order[0]][1].place, step)
    check_volume_shape(volume.voxels.shape)
    check_values(volume.voxels)
    in_order = tuple(dict.fromkeys(frames[index][0] for index in order))
    return volume, in_order


@_guarded()
def read_picture(path: Path) -> Picture:
    """Decodes one projection image (CR, DX and the like), bright where the detector saw matter.

    Raises:
        Refused: pixels that cannot be decoded or used.
    """
    dataset = _read(path, stop_before_pixels=True)
    if min(int(dataset.Rows), int(dataset.Columns)) < MIN_PIXELS:
        raise Refused("too_small", f"expected at least {MIN_PIXELS}x{MIN_PIXELS} pixels, found fewer")
    pixels = next(iter(_decode(path)))
    check_values(pixels)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        pixels = pixels.max() - pixels
    spacing = dataset.get("PixelSpacing") or dataset.get("ImagerPixelSpacing") or (1.0, 1.0)
    return Picture(np.ascontiguousarray(pixels), (float(spacing[0]), float(spacing[1])))


@dataclass(frozen=True)
class _Frame:
    size: tuple[int, int]
    patient_id: str
    place: tuple[float, ...]  # position (3), row and column direction (6), row and column spacing (2)


def _read(path: Path, *, stop_before_pixels: bool) -> Any:
    import pydicom
    from pydicom.filereader import read_file_meta_info

    try:
        if str(read_file_meta_info(path).get("TransferSyntaxUID", "")) in _DEFLATED:
            raise Refused("undecodable", "expected a data set that is not deflated, found a deflated one")
        return pydicom.dcmread(path, stop_before_pixels=stop_before_pixels)
    except EOFError as error:
        raise Refused("truncated", "expected a whole DICOM file, it ends early") from error


def _check_burned_in(dataset: Any, modality: str) -> None:
    flag = str(dataset.get("BurnedInAnnotation", "") or "").upper()
    if flag == "YES":
        raise Refused("burned_in_text", "expected no text in the pixels, BurnedInAnnotation says YES")
    image_type = " ".join(str(part) for part in dataset.get("ImageType", []) or []).upper()
    usual = (
        modality in _TEXT_IS_USUAL
        or str(dataset.get("SOPClassUID", "")).startswith(_SECONDARY_CAPTURE)
        or "SCREEN" in image_type
    )
    if usual and flag != "NO":
        raise Refused(
            "burned_in_text",
            "expected BurnedInAnnotation NO, as this kind of image often shows text; it is absent or says otherwise",
        )


def _check_pixel_kind(dataset: Any) -> None:
    if int(dataset.get("SamplesPerPixel", 1) or 1) != 1 or not str(
        dataset.get("PhotometricInterpretation", "")
    ).startswith("MONOCHROME"):
        raise Refused("colour", "expected grey values, found colour or a palette")
    if "BitsStored" not in dataset or "PixelRepresentation" not in dataset or dataset.get("BitsAllocated") == 1:
        raise Refused("unsupported_pixels", "expected whole-number pixels, found another kind")


def _frames(dataset: Any) -> list[_Frame]:
    size = (int(dataset.Rows), int(dataset.Columns))
    patient_id = str(dataset.get("PatientID", "") or "").strip()
    try:
        if "PerFrameFunctionalGroupsSequence" not in dataset:
            if int(dataset.get("NumberOfFrames", 1) or 1) != 1:
                raise Refused("no_geometry", "expected a position for each frame, found none")
            values = (dataset.ImagePositionPatient, dataset.ImageOrientationPatient, dataset.PixelSpacing)
            return [_Frame(size, patient_id, _flat(values))]
        shared = dataset.get("SharedFunctionalGroupsSequence") or [{}]
        found = []
        for item in dataset.PerFrameFunctionalGroupsSequence:
            values = (
                _group(item, shared[0], "PlanePositionSequence").ImagePositionPatient,
                _group(item, shared[0], "PlaneOrientationSequence").ImageOrientationPatient,
                _group(item, shared[0], "PixelMeasuresSequence").PixelSpacing,
            )
            found.append(_Frame(size, patient_id, _flat(values)))
        return found
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise Refused("no_geometry", "expected position, orientation and pixel spacing, one is missing") from error


def _flat(values: tuple[Any, Any, Any]) -> tuple[float, ...]:
    flat = tuple(float(x) for part in values for x in part)
    if len(flat) != 11:
        raise ValueError("3 positions, 6 directions and 2 spacings")
    return flat


def _group(item: Any, shared: Any, name: str) -> Any:
    return (item[name] if name in item else shared[name])[0]


def _check_alike(frames: list[_Frame]) -> None:
    first = frames[0]
    for frame in frames[1:]:
        if frame.patient_id != first.patient_id:
            raise Refused("mixed_series", "expected one patient in a series, found several")
        if frame.size != first.size:
            raise Refused("mixed_series", "expected slices of one size in a series, found several")


def _decode(path: Path) -> Iterator[npt.NDArray[np.float32]]:
    """The frames of one file, each (rows, columns), in the units of the rescale slope and intercept."""
    dataset = _read(path, stop_before_pixels=False)
    try:
        from pydicom.pixels.processing import apply_modality_lut

        raw = dataset.pixel_array
        if "ModalityLUTSequence" in dataset or "RescaleSlope" in dataset:
            raw = apply_modality_lut(raw, dataset)
    except Exception as error:  # each decoder raises its own kinds
        if "less than expected" in str(error):
            raise Refused("truncated", "expected as many pixels as the header announces, found fewer") from error
        raise Refused("undecodable", "expected pixels in a transfer syntax that can be decoded") from error
    stack = raw if raw.ndim == 3 else raw[np.newaxis]  # (frames, rows, columns)
    for index, (slope, intercept) in enumerate(_frame_scaling(dataset, len(stack))):
        yield stack[index].astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _frame_scaling(dataset: Any, num_frames: int) -> list[tuple[float, float]]:
    items = dataset.get("PerFrameFunctionalGroupsSequence")
    if items is None:
        return [(1.0, 0.0)] * num_frames
    shared = dataset.get("SharedFunctionalGroupsSequence") or [{}]
    scaling = []
    for item in items:
        name = "PixelValueTransformationSequence"
        if name in item or name in shared[0]:
            group = _group(item, shared[0], name)
            scaling.append((float(group.get("RescaleSlope", 1)), float(group.get("RescaleIntercept", 0))))
        else:
            scaling.append((1.0, 0.0))
    return scaling
