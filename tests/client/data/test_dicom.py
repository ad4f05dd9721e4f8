"""DICOM: single files, series, and every file of the three archives."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from client.data.dicom import read_picture, read_volume
from tests.client.data.builders import inventory_of, verdict, voxels, write_dicom, write_series, write_xray

TILT = [1, 0, 0, 0, 0.970295726276, -0.2419218955997]  # 14 degrees


def test_a_series_becomes_one_volume_in_slice_order(tmp_path: Path) -> None:
    positions = (9, 0, 21, 3, 18, 6, 15, 12)
    write_series(tmp_path / "ct", positions)
    inventory = inventory_of(tmp_path, records=False)
    (record,) = inventory.records
    assert (record.patient_id, record.kind, record.format) == ("p1", "volume", "dicom")
    by_position = sorted(range(len(positions)), key=lambda index: positions[index])
    assert [path.name for path in record.files] == [f"slice{index:03d}" for index in by_position]


def test_the_volume_lies_as_dicom_says(tmp_path: Path) -> None:
    # Columns grow towards the patient's left and rows towards the back: both are reversed in RAS.
    write_series(tmp_path, tuple(range(0, 48, 3)), RescaleSlope=2, RescaleIntercept=-100)
    volume, _ = read_volume(tuple(sorted(tmp_path.iterdir())))
    assert volume.voxels.shape == (24, 32, 16) and volume.spacing_mm == (2.0, 2.0, 3.0)
    stored = voxels(3, (32, 24)).astype(np.float32) * 16 * 2 - 100  # of the slice at 3 mm
    np.testing.assert_array_equal(volume.voxels[:, :, 1], stored[::-1, ::-1].T)


@pytest.mark.parametrize(
    ("code", "positions", "fields"),
    [
        ("too_few_slices", (0, 3, 6), {}),
        ("repeated_positions", (0, 3, 3, 6, 9), {}),
        ("uneven_increments", (0, 3, 6, 12, 15), {}),
        ("gantry_tilt", tuple(range(0, 48, 3)), {"ImageOrientationPatient": TILT}),
        ("implausible_voxel_size", tuple(range(0, 48, 3)), {"PixelSpacing": [2000, 2000]}),
        ("no_geometry", tuple(range(0, 48, 3)), {"ImageOrientationPatient": None}),
        ("no_geometry", tuple(range(0, 48, 3)), {"ImageOrientationPatient": [2, 0, 0, 0, 2, 0]}),
        ("identifier_in_header", tuple(range(0, 48, 3)), {"PatientName": "Doe^Jane"}),
        ("burned_in_text", tuple(range(0, 48, 3)), {"BurnedInAnnotation": "YES"}),
        ("burned_in_text", tuple(range(0, 48, 3)), {"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]}),
        ("colour", tuple(range(0, 48, 3)), {"PhotometricInterpretation": "PALETTE COLOR"}),
        ("unsupported_pixels", tuple(range(0, 48, 3)), {"BitsStored": None}),
    ],
)
def test_one_code_for_each_faulty_series(tmp_path: Path, code: str, positions: tuple[int, ...], fields: dict) -> None:
    write_series(tmp_path, positions, **fields)
    inventory = inventory_of(tmp_path)
    assert inventory.refusal_counts() == {code: 1} and not inventory.records
    assert "a series of" in inventory.refusals[0].reason


def test_one_slice_that_differs_refuses_the_series(tmp_path: Path) -> None:
    for name, code, fields in (
        ("orientation", "mixed_orientation", {"ImageOrientationPatient": [0, 1, 0, 1, 0, 0]}),
        ("spacing", "mixed_series", {"PixelSpacing": [1, 1]}),
        ("size", "mixed_series", {"pixels": np.ones((30, 24), np.uint16)}),
        ("flag", "burned_in_text", {"BurnedInAnnotation": "YES"}),
        ("name", "identifier_in_header", {"PatientName": "Doe^Jane"}),
    ):
        folder = write_series(tmp_path / name)
        write_dicom(folder / "slice005", position=15.0, **fields)
        assert verdict(folder) == code, name


def test_a_missing_patient_id_is_refused(tmp_path: Path) -> None:
    write_series(tmp_path, PatientID="")
    assert inventory_of(tmp_path, records=False).refusal_counts() == {"no_patient_id": 1}
    assert verdict(tmp_path) == "accepted"  # each record its own patient


@pytest.mark.parametrize(
    ("expected", "fields"),
    [
        ("accepted", {}),
        ("accepted", {"PatientName": "ANONYMOUS", "OperatorsName": "EC"}),
        ("accepted", {"PatientName": "p1", "PatientBirthDate": "20200102"}),  # both blanked by a tool
        ("accepted", {"Modality": "OT", "BurnedInAnnotation": "NO"}),
        ("identifier_in_header", {"PatientBirthDate": "19500102"}),
        ("identifier_in_header", {"PatientName": "Doe^Jane", "PatientIdentityRemoved": "YES"}),
        ("identifier_in_header", {"ReferringPhysicianName": "Moriarty^James"}),
        ("identifier_in_header", {"OtherPatientIDs": ["1", "2"]}),
        ("identifier_in_header", {"AccessionNumber": "A123"}),
        ("identifier_in_header", {"PatientTelephoneNumbers": "555"}),
        ("burned_in_text", {"Modality": "US"}),
        ("burned_in_text", {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}),
        ("burned_in_text", {"Modality": None}),
        ("several_frames", {"NumberOfFrames": 2}),
        ("too_large", {"Rows": 65535, "Columns": 65535}),
        ("truncated", {"Rows": 64}),
        ("constant", {"pixels": np.full((32, 24), 9, np.uint16)}),
        ("too_small", {"pixels": np.arange(200, dtype=np.uint16).reshape(10, 20)}),
        ("not_an_image", {"Rows": None}),
        ("undecodable", {"TransferSyntaxUID": "1.2.840.10008.1.2.1.99"}),
    ],
)
def test_single_images(tmp_path: Path, expected: str, fields: dict) -> None:
    write_xray(tmp_path / "image.dcm", **fields)
    assert verdict(tmp_path) == expected


def test_monochrome1_is_inverted(tmp_path: Path) -> None:
    plain = read_picture(write_xray(tmp_path / "plain"))
    inverted = read_picture(write_xray(tmp_path / "inverted", PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_array_equal(inverted.pixels, plain.pixels.max() - plain.pixels)


def test_reasons_name_the_field_and_not_its_value(tmp_path: Path) -> None:
    write_xray(tmp_path / "image.dcm", PatientName="Doe^Jane", PatientID="p1")
    (refusal,) = inventory_of(tmp_path).refusals
    assert "PatientName" in refusal.reason and "Doe" not in refusal.reason


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    whole = write_xray(tmp_path / "image.dcm").read_bytes()
    for length in (140, 200, 400, len(whole) - 10):
        (tmp_path / "image.dcm").write_bytes(whole[:length])
        assert verdict(tmp_path) in ("truncated", "unreadable", "not_an_image"), length
    (tmp_path / "image.dcm").write_bytes(bytes(200))
    assert verdict(tmp_path) == "unreadable"


# -- the archives ------------------------------------------------------------------------------------------------

SERIES = {
    "failing/gantrytilting/001": "gantry_tilt",
    "failing/notavolume/001": "repeated_positions",  # four slices at one position
    "failing/slicecount/001": "too_few_slices",
    "failing/sliceincrement/001": "uneven_increments",
    "failing/sliceincrement/002": "uneven_increments",  # tilted as well
    "failing/sliceorientation/001": "mixed_orientation",
    # Four sagittal or coronal slices are a regular stack, but their axial slices are four voxels wide.
    "ge/anatomical/001": "too_small",
    "generic/anatomical/001": "too_small",
    "generic/compressed/001": "too_small",
    "generic/compressed_j2k/001": "too_small",
    "generic/compressed_jpeg/001": "too_small",
    "generic/compressed_jpegls/001": "too_small",
    "generic/compressed_rle/001": "too_small",
    "hitachi/anatomical/001": "too_small",
    "philips/anatomical/001": "too_small",
    "philips/anatomical/001_implicit": "too_small",
    "siemens/anatomical/001": "too_small",
    "generic/anatomical/002_non_isotropic": "accepted",
    "generic/rgb/001": "burned_in_text",  # colour too; a secondary capture first of all
    "hyperfine/anatomical/001": "accepted",  # one file, eight frames
    "siemens_multiframe/anatomical/001": "accepted",
}


@pytest.mark.parametrize(("folder", "expected"), list(SERIES.items()))
def test_series_of_dicom2nifti(dicom_archive: Callable[[str], Path], folder: str, expected: str) -> None:
    assert verdict(dicom_archive("vendors_and_failing_dicom2nifti") / folder) == expected


def test_every_series_of_dicom2nifti_has_a_verdict(dicom_archive: Callable[[str], Path]) -> None:
    root = dicom_archive("vendors_and_failing_dicom2nifti")
    assert {path.parent.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()} == set(SERIES)


@pytest.mark.parametrize("kind", ["compressed", "compressed_j2k", "compressed_jpeg", "compressed_jpegls"])
def test_lossless_syntaxes_decode_to_the_same_pixels(dicom_archive: Callable[[str], Path], kind: str) -> None:
    # RLE is decoded by pydicom itself, the others by compiled decoders.
    root = dicom_archive("vendors_and_failing_dicom2nifti") / "generic"
    files = (sorted((root / name / "001").iterdir()) for name in ("compressed_rle", kind))
    for plain, packed in zip(*files, strict=True):
        np.testing.assert_array_equal(read_picture(plain).pixels, read_picture(packed).pixels)


def test_a_real_series_of_ge(dicom_archive: Callable[[str], Path]) -> None:
    # Its operator's field holds two initials; no other field names anybody.
    (record,) = inventory_of(dicom_archive("ge_signa_pd_axial_papaya"), records=False).records
    volume, _ = read_volume(record.files)
    assert volume.voxels.shape == (256, 256, 20)
    np.testing.assert_allclose(volume.spacing_mm, (0.859, 0.859, 7.0), atol=0.1)


def odd_verdict(name: str) -> str:
    if name.startswith("JLSL_RGB"):
        return "unreadable"  # bare JPEG-LS streams under a DICOM name
    if name.startswith("emri"):
        return "no_geometry"  # frames without positions
    if name.startswith("parametric_map"):
        return "unsupported_pixels"  # floating point
    # Ultrasound, palette, secondary captures and unknown modalities, none with BurnedInAnnotation NO.
    return "burned_in_text"


def test_every_file_of_the_burned_in_and_odd(dicom_archive: Callable[[str], Path], tmp_path: Path) -> None:
    files = sorted(dicom_archive("burned_in_and_odd_pydicom_data").rglob("*.dcm"))
    assert len(files) == 41
    for path in files:
        folder = tmp_path / path.stem
        folder.mkdir()
        (folder / path.name).symlink_to(path)
        assert verdict(folder) == odd_verdict(path.name), path.name
