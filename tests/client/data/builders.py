"""Invented images on disk, as small as the checks allow."""

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian

from client.data.inventory import Inventory, take_inventory

SHAPE = (20, 24, 16)
CT, DIGITAL_XRAY = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.1.1"


def voxels(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """A bright box with texture on a black background, uint8."""
    out = np.zeros(shape, np.uint8)
    inner = tuple(slice(n // 5, n - n // 5) for n in shape[:3])
    out[inner] = np.random.default_rng(seed).integers(60, 250, out[inner].shape, dtype=np.uint8)
    return out


def write_nifti(path: Path, data: np.ndarray | None = None, **header: Any) -> Path:
    """One NIfTI file; ``header`` sets raw fields, ``affine`` and ``qform`` the orientations."""
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = header.pop("affine", np.diag([2.0, 2.0, 3.0, 1.0]))
    qform = header.pop("qform", None)
    image = nibabel.Nifti1Image(voxels() if data is None else data, affine)
    if qform is not None:
        image.set_qform(qform, code=1)
        image.header["sform_code"] = 1
    for name, value in header.items():
        image.header[name] = value
    nibabel.save(image, path)
    return path


def write_picture(path: Path, seed: int = 0, size: tuple[int, int] = (32, 32), **options: Any) -> Path:
    """One grey picture of 8 bits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(voxels(seed, size)).save(path, **options)
    return path


def write_dicom(path: Path, pixels: np.ndarray | None = None, position: float = 0.0, **fields: Any) -> Path:
    """One uncompressed axial CT slice with a patient id and no name; None removes a field."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (voxels(int(position), (32, 24)).astype(np.uint16) * 16) if pixels is None else pixels
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = UID(fields.pop("TransferSyntaxUID", ExplicitVRLittleEndian))
    values = {
        "SOPClassUID": CT, "SOPInstanceUID": f"1.2.3.{abs(hash(str(path))) % 10**9}", "Modality": "CT",
        "SeriesInstanceUID": "1.2.3.4", "StudyDate": "20200102", "PatientID": "p1", "PatientName": "",
        "ImagePositionPatient": [0, 0, position], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "PixelSpacing": [2, 2], "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2",
        "Rows": pixels.shape[0], "Columns": pixels.shape[1], "BitsAllocated": 16, "BitsStored": 12, "HighBit": 11,
        "PixelRepresentation": 0, "PixelData": pixels.tobytes(),
    }  # fmt: skip
    for name, value in (values | fields).items():
        if value is not None:
            setattr(dataset, name, value)
    dataset["PixelData"].VR = "OW"
    dataset.save_as(path, enforce_file_format=True)
    return path


def write_xray(path: Path, **fields: Any) -> Path:
    """One projection image."""
    plain = {"SOPClassUID": DIGITAL_XRAY, "Modality": "DX", "ImagePositionPatient": None}
    return write_dicom(path, **(plain | {"ImageOrientationPatient": None} | fields))


def write_series(folder: Path, positions: tuple[float, ...] = tuple(range(0, 48, 3)), **fields: Any) -> Path:
    """One series of slices."""
    for index, position in enumerate(positions):
        write_dicom(folder / f"slice{index:03d}", position=position, **fields)
    return folder


def inventory_of(folder: Path, *, records: bool = True) -> Inventory:
    """The inventory without labels; each image may be its own patient."""
    return take_inventory(folder, label_column=None, record_is_patient=records)


def verdict(folder: Path) -> str:
    """``accepted``, or the one refusal code of a folder that holds one image."""
    inventory = inventory_of(folder)
    codes = {refusal.code for refusal in inventory.refusals}
    assert len(codes) + bool(inventory.records) == 1, inventory.refusals
    return codes.pop() if codes else "accepted"
