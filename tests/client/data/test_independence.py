"""Other patients change no verdict on another's files, in any mixture of formats."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from client.data.inventory import Inventory
from tests.client.data.builders import inventory_of, voxels, write_dicom, write_nifti, write_picture

Writer = Callable[[Path, str], list[str]]  # writes a patient's files, answers with their lines of the table
ALONE = "m"
OTHERS = ("b", "z")  # before and after it by name


def seed(patient: str) -> int:
    return ord(patient)


def bids(*kinds: str) -> Writer:
    def write(root: Path, patient: str) -> list[str]:
        for index, kind in enumerate(kinds):
            path = root / f"sub-{patient}" / Path(kind).parent / f"sub-{patient}_{Path(kind).name}.nii.gz"
            write_nifti(path, voxels(1000 * index + seed(patient)))
        return []

    return write


def loose_nifti(root: Path, patient: str) -> list[str]:
    write_nifti(root / f"{patient}.nii", voxels(5000 + seed(patient)))
    return [f"{patient}.nii\t{patient}"]


def pictures_in_a_folder_of_their_own(root: Path, patient: str) -> list[str]:
    names = (ALONE, *OTHERS)
    for index, name in enumerate(names):
        write_picture(root / patient / f"{name}.png", seed=6000 + 10 * seed(patient) + index)
    return [f"{patient}/{name}.png\t{patient}" for name in names]


def picture_without_a_folder_in_the_table(root: Path, patient: str) -> list[str]:
    write_picture(root / "images" / f"{patient}.png", seed=8000 + seed(patient))
    return [f"{patient}.png\t{patient}"]


def dicom_series(uid: str | None) -> Writer:
    def write(root: Path, patient: str) -> list[str]:
        for index in range(16):
            pixels = voxels(9000 + 100 * seed(patient) + index, (32, 24)).astype(np.uint16) * 16
            path = root / "dicom" / f"{index:02d}{patient}"
            write_dicom(path, pixels, 3.0 * index, PatientID=patient, SeriesInstanceUID=uid)
        return []

    return write


def faulty(root: Path, patient: str) -> list[str]:
    (root / f"sub-{patient}_scan.mgz").write_bytes(b"x")
    (root / f"{patient}.nii.gz").write_bytes(b"x")
    return [f"{patient}.nii.gz\t{patient}", f"gone-{patient}.png\t{patient}"]


FORMATS: dict[str, Writer] = {
    "T1w": bids("anat/T1w", "anat/T2w", "func/bold"),
    "T2w": bids("anat/T2w", "anat/FLAIR"),
    "func": bids("func/bold"),
    "no data type": bids("scan"),
    "loose NIfTI": loose_nifti,
    "pictures": pictures_in_a_folder_of_their_own,
    "bare names": picture_without_a_folder_in_the_table,
    "series": dicom_series("1.2.3"),
    "series without UID": dicom_series(None),
    "faulty": faulty,
}


def folder_of(root: Path, patients: dict[str, str]) -> set[str]:
    """Writes patients, each in one format; answers with their files and the names in their lines."""
    lines = [line for patient, name in patients.items() for line in FORMATS[name](root, patient)]
    written = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    (root / "images.tsv").write_text("\n".join(["filename\tpatient_id", *lines]) + "\n")
    return written | {line.split("\t")[0] for line in lines}


def verdicts(inventory: Inventory, files: set[str]) -> dict[str, object]:
    accepted = {r.file: (r.patient_id, r.label, tuple(map(str, r.files))) for r in inventory.records}
    refused = {r.file: (r.code, r.reason) for r in inventory.refusals}
    return {file: (accepted.get(file), refused.get(file)) for file in files}


@pytest.mark.parametrize(("mine", "others"), list(itertools.product(FORMATS, FORMATS)))
def test_other_patients_change_no_verdict(tmp_path: Path, mine: str, others: str) -> None:
    files = folder_of(tmp_path, {ALONE: mine})
    before = verdicts(inventory_of(tmp_path, records=False), files)
    assert any(accepted or refused for accepted, refused in before.values())
    folder_of(tmp_path, dict.fromkeys(OTHERS, others) | {ALONE: mine})
    assert verdicts(inventory_of(tmp_path, records=False), files) == before


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("T1w", {"sub-m/anat/sub-m_T1w.nii.gz": "accepted"}),
        ("T2w", {"sub-m/anat/sub-m_T2w.nii.gz": "accepted", "sub-m/anat/sub-m_FLAIR.nii.gz": "accepted"}),
        ("func", {"sub-m/func/sub-m_bold.nii.gz": "not_anatomical"}),
        ("no data type", {"sub-m/sub-m_scan.nii.gz": "accepted"}),
        ("series", {"dicom/00m": "accepted"}),
        ("series without UID", {"dicom/00m": "accepted"}),
    ],
)
def test_the_verdicts_by_hand(tmp_path: Path, name: str, expected: dict[str, str]) -> None:
    folder_of(tmp_path, {"b": "T1w", "m": name, "z": name})
    inventory = inventory_of(tmp_path, records=False)
    found = dict.fromkeys((r.file for r in inventory.records), "accepted") | {
        r.file: r.code for r in inventory.refusals
    }
    assert {file: code for file, code in found.items() if Path(file).name.split("_")[0] in ("sub-m", "00m")} == expected


def test_subjects_without_t1w_among_others_with_it_are_noted(tmp_path: Path) -> None:
    folder_of(tmp_path, {"b": "T2w"})
    assert not inventory_of(tmp_path).notes
    folder_of(tmp_path, {"b": "T2w", "m": "T1w"})
    assert any(note.startswith("1 subjects have no T1w") for note in inventory_of(tmp_path).notes)


@pytest.mark.parametrize("uid", ["1.2.3", None])
def test_series_without_patient_id_are_one(tmp_path: Path, uid: str | None) -> None:
    # The exception in the guarantee: nothing in the files tells the patients apart.
    for index in range(16):
        write_dicom(tmp_path / f"{index:02d}", position=3.0 * index, PatientID="", SeriesInstanceUID=uid)
    table = tmp_path / "images.csv"
    table.write_text("file,patient_id\n05,a\n07,a\n")
    (record,) = inventory_of(tmp_path, records=False).records
    assert record.patient_id == "a"
    table.write_text("file,patient_id\n05,a\n07,b\n")
    assert inventory_of(tmp_path, records=False).refusal_counts() == {"mixed_series": 1}
