"""NIfTI: every way in which a file can be odd, by hand."""

import gzip
import struct
from pathlib import Path

import nibabel
import numpy as np
import pytest

from client.data.nifti import read_volume
from client.data.pixels import Refused
from tests.client.data.builders import SHAPE, verdict, voxels, write_nifti


def shear() -> np.ndarray:
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    affine[0, 1] = 0.2  # 5.7 degrees
    return affine


def test_an_ordinary_file_is_accepted(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii.gz")
    assert verdict(tmp_path) == "accepted"


@pytest.mark.parametrize(
    ("code", "data", "header"),
    [
        ("four_d", np.stack([voxels(), voxels(1)], axis=3), {}),
        ("two_d", voxels()[:, :, 8], {}),
        ("two_d", voxels()[:, :, 8:9], {}),
        ("complex", voxels().astype(np.complex64), {}),
        ("constant", np.full(SHAPE, 7, np.uint8), {}),
        ("non_finite", np.where(voxels() > 100, np.nan, 1.0).astype(np.float32), {}),
        ("non_finite", np.where(voxels() > 240, np.inf, 1.0).astype(np.float32), {}),
        ("too_few_slices", voxels()[:, :, 6:9], {}),
        ("too_small", voxels()[4:16], {}),
        ("sheared_affine", None, {"affine": shear(), "qform_code": 0}),
        ("qform_sform_disagree", None, {"qform": np.diag([3.0, 3.0, 3.0, 1.0])}),
        ("implausible_voxel_size", None, {"xyzt_units": 3}),
        ("implausible_voxel_size", None, {"affine": np.diag([50.0, 2, 2, 1])}),
        ("identifier_in_header", None, {"descrip": b"Doe Jane"}),
        ("identifier_in_header", None, {"aux_file": b"1950-01-02"}),
        ("identifier_in_header", None, {"db_name": b"ward 7"}),
        ("identifier_in_header", None, {"intent_name": b"8812345"}),
    ],
)
def test_one_code_for_each_fault(tmp_path: Path, code: str, data: np.ndarray | None, header: dict) -> None:
    write_nifti(tmp_path / "a.nii.gz", data, **header)
    assert verdict(tmp_path) == code


@pytest.mark.parametrize(
    ("code", "offset", "patch"),
    [
        ("no_affine", 252, struct.pack("<2h", 0, 0)),  # qform_code, sform_code
        ("singular_affine", 296, bytes(16)),  # srow_y
        ("singular_affine", 296, struct.pack("<4f", 0, float("nan"), 0, 0)),
        ("bad_dimensions", 40, struct.pack("<h", 9)),  # dim[0]
        ("bad_dimensions", 42, struct.pack("<h", -20)),  # dim[1]
        ("unreadable", 344, b"n+7\0"),  # magic
        ("unreadable", 70, struct.pack("<h", 9999)),  # datatype
        ("unreadable", 108, struct.pack("<f", 100.0)),  # vox_offset inside the header
        ("unreadable", 108, struct.pack("<f", float("nan"))),
        ("implausible_voxel_size", 123, b"\x07"),  # xyzt_units
    ],
)
def test_damaged_header_fields(tmp_path: Path, code: str, offset: int, patch: bytes) -> None:
    path = write_nifti(tmp_path / "a.nii")
    content = bytearray(path.read_bytes())
    content[offset : offset + len(patch)] = patch
    path.write_bytes(content)
    assert verdict(tmp_path) == code


def test_colour_voxels_are_refused(tmp_path: Path) -> None:
    rgb = np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    rgb["R"] = voxels()
    write_nifti(tmp_path / "a.nii", rgb)
    assert verdict(tmp_path) == "colour"


@pytest.mark.parametrize(
    "data",
    [
        voxels()[..., np.newaxis],
        voxels().astype(np.float32) * 1e6,
        voxels().astype(np.int16) * 8 - 1024,
        voxels().astype(">i2"),
        np.where(np.arange(voxels().size).reshape(SHAPE) == 5, 1e7, voxels()).astype(np.float32),
    ],
    ids=["trailing singleton", "scale 1e6", "like CT", "big endian", "hot pixel"],
)
def test_what_scaling_can_handle_is_accepted(tmp_path: Path, data: np.ndarray) -> None:
    write_nifti(tmp_path / "a.nii.gz", data)
    assert verdict(tmp_path) == "accepted"


def test_scanner_and_template_affines_may_differ_by_a_registration(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii.gz", qform=np.diag([2.2, 2.2, 3.1, 1.0]))
    image = nibabel.load(path)
    image.header["sform_code"] = 4
    nibabel.save(image, path)
    assert verdict(tmp_path) == "accepted"


def test_storage_order_does_not_change_the_volume(tmp_path: Path) -> None:
    data = voxels().astype(np.int16)
    plain = read_volume(write_nifti(tmp_path / "plain.nii", data))
    las = np.diag([-2.0, 2.0, 3.0, 1.0])
    las[0, 3] = 2.0 * (SHAPE[0] - 1)
    flipped = read_volume(write_nifti(tmp_path / "las.nii", data[::-1], affine=las))
    # axes stored as superior, right, anterior
    permuted_affine = np.array([[0, 2.0, 0, 0], [0, 0, 2.0, 0], [3.0, 0, 0, 0], [0, 0, 0, 1]])
    permuted = read_volume(write_nifti(tmp_path / "sra.nii", data.transpose(2, 0, 1), affine=permuted_affine))
    for other in (flipped, permuted):
        np.testing.assert_array_equal(plain.voxels, other.voxels)
        assert other.spacing_mm == plain.spacing_mm == (2.0, 2.0, 3.0)


@pytest.mark.parametrize(
    ("code", "content"),
    [
        ("truncated", b""),
        ("unreadable", b"version https://git-lfs.github.com/spec/v1\n"),
        ("unreadable", b"<!DOCTYPE html>"),
        ("unreadable", b"\x1f\x8bnot really gzip at all"),
    ],
)
def test_what_is_no_image_is_refused(tmp_path: Path, code: str, content: bytes) -> None:
    (tmp_path / "a.nii.gz").write_bytes(content)
    assert verdict(tmp_path) == code


def test_every_cut_is_truncated(tmp_path: Path) -> None:
    whole = write_nifti(tmp_path / "whole.nii").read_bytes()
    zipped = gzip.compress(whole)
    for index, cut in enumerate((100, 348, 351, 400, len(whole) - 1)):
        folder = tmp_path / f"plain{index}"
        folder.mkdir()
        (folder / "a.nii").write_bytes(whole[:cut])
        assert verdict(folder) == "truncated"
    folder = tmp_path / "zipped"
    folder.mkdir()
    (folder / "a.nii.gz").write_bytes(zipped[: len(zipped) // 2])
    assert verdict(folder) == "truncated"


def test_a_bomb_is_refused_before_its_voxels_are_read(tmp_path: Path) -> None:
    header = bytearray(write_nifti(tmp_path / "small.nii").read_bytes())
    header[40:56] = struct.pack("<8h", 3, 32767, 32767, 32767, 1, 1, 1, 1)
    (tmp_path / "small.nii").write_bytes(header)
    assert verdict(tmp_path) == "too_large"


def test_no_more_is_inflated_than_the_header_announces(tmp_path: Path) -> None:
    whole = write_nifti(tmp_path / "a.nii").read_bytes()
    (tmp_path / "a.nii").unlink()
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(whole + bytes(2**26)))
    import tracemalloc

    tracemalloc.start()
    assert verdict(tmp_path) == "size_mismatch"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24


@pytest.mark.parametrize("code", [2, 6, 4, 44])
def test_header_extensions_with_content_are_refused(tmp_path: Path, code: int) -> None:
    image = nibabel.Nifti1Image(voxels(), np.diag([2.0, 2.0, 3.0, 1.0]))
    body = b"\x10\x00\x10\x00LO\x04\x00Jane" if code == 2 else b"Jane Doe, ward seven"
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension(code, body))
    nibabel.save(image, tmp_path / "a.nii.gz")
    assert verdict(tmp_path) == "identifier_in_header"


def test_reasons_hold_no_header_value(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii.gz", descrip=b"Doe Jane")
    with pytest.raises(Refused) as caught:
        read_volume(path)
    assert "descrip" in caught.value.reason and "Jane" not in str(caught.value)


CASES = {
    "ok_reference_uint8.nii.gz": "accepted",
    "nan_block_float32.nii.gz": "non_finite",
    "inf_voxel_float32.nii.gz": "non_finite",
    "constant_zero.nii.gz": "constant",
    "constant_100.nii.gz": "constant",
    "hot_pixel_float32.nii.gz": "accepted",  # percentiles do not see one voxel
    "scale_1e6_float32.nii.gz": "accepted",  # scaled per volume
    "neg_ct_like_int16.nii.gz": "accepted",  # no range tells a wrong modality for certain
    "four_d_time3.nii.gz": "four_d",
    "trailing_singleton_4d.nii.gz": "accepted",
    "two_d.nii.gz": "two_d",
    "rgb24.nii.gz": "colour",
    "complex64.nii.gz": "complex",
    "int64.nii.gz": "accepted",  # odd, but every value is exact
    "big_endian_int16.nii": "accepted",
    "scl_slope_inter.nii.gz": "accepted",
    "flipped_LAS.nii.gz": "accepted",  # reoriented
    "wrong_left_right.nii.gz": "accepted",  # cannot be told from the file
    "axes_permuted_SRA.nii.gz": "accepted",  # reoriented
    "oblique_20deg.nii.gz": "accepted",  # read along its own axes: as oblique as the patient lay
    "sheared_sform.nii.gz": "sheared_affine",
    "no_sform_no_qform.nii.gz": "no_affine",
    "qform_sform_disagree.nii.gz": "qform_sform_disagree",
    "zero_affine_row.nii.gz": "singular_affine",
    "anisotropic_1x1x6.nii.gz": "accepted",  # axial slices keep their resolution
    "units_micron.nii.gz": "implausible_voxel_size",
    "phi_in_descrip.nii.gz": "identifier_in_header",
    "phi_in_extension_ecode6.nii.gz": "identifier_in_header",
    "truncated_gzip.nii.gz": "truncated",
    "truncated_data.nii": "truncated",
    "header_only_348.nii": "truncated",
    "zero_bytes.nii.gz": "truncated",
    "not_nifti_html.nii.gz": "unreadable",
    "lfs_pointer.nii.gz": "unreadable",
    "gz_named_nii.nii": "wrong_extension",  # readable, but other tools would not read it
    "bad_magic.nii": "unreadable",
    "bad_dim0.nii": "bad_dimensions",
    "negative_dim.nii": "bad_dimensions",
    "huge_dim_bomb.nii": "too_large",
    "duplicate_of_reference.nii.gz": "accepted",  # alone; beside the reference see below
    "near_duplicate_of_reference.nii.gz": "accepted",  # a note, never a refusal
}
REAL = {
    "anatomical.nii": "accepted",
    "functional.nii": "four_d",
    "example4d.nii.gz": "four_d",
    "example_nifti2.nii.gz": "four_d",
    "standard.nii.gz": "too_small",  # 4 x 5 voxels in a slice
    "analyze.hdr": "unsupported_format",  # Analyze says nothing of left and right
    "nifti1.hdr": "unsupported_format",  # pairs of files: one of the two gets lost, as here
    "phantom_truncated.PAR": "unsupported_format",
    "phantom_truncated.REC": "unsupported_format",
    "umass_anonymized.PAR": "unsupported_format",
    "scaled+tlrc.BRIK": "unsupported_format",
    "scaled+tlrc.HEAD": "unsupported_format",
    "test.mgz": "unsupported_format",
    "tiny.mnc": "unsupported_format",
}


@pytest.mark.parametrize(("name", "expected"), [*CASES.items(), *REAL.items()])
def test_odd_files_of_the_shared_data(shared_data: Path, tmp_path: Path, name: str, expected: str) -> None:
    source = "derived_from_ds002748" if name in CASES else "real_nibabel"
    (tmp_path / name).symlink_to(shared_data / "nifti_odd" / source / name)
    assert verdict(tmp_path) == expected


def test_every_odd_file_has_a_verdict(shared_data: Path) -> None:
    folder = shared_data / "nifti_odd"
    listed = {line.split("\t")[0] for line in (folder / "CASES.tsv").read_text().splitlines()[1:]}
    assert listed == set(CASES)
    assert {path.name for path in (folder / "real_nibabel").iterdir()} == set(REAL)
