"""Which patient and label an image gets, in every kind of folder, and what happens to copies."""

import json
from pathlib import Path

import numpy as np
import pytest

from client.data.inventory import Inventory, Refusal, list_patients, take_inventory
from common.errors import SiteError
from tests.client.data.builders import inventory_of, voxels, write_nifti, write_picture, write_series


def bids(root: Path, subjects: int = 3) -> Path:
    """Subjects with one T1w volume each and a table of groups."""
    for index in range(1, subjects + 1):
        write_nifti(root / f"sub-{index:02d}" / "anat" / f"sub-{index:02d}_T1w.nii.gz", voxels(index))
    lines = [f"sub-{index:02d}\t{'well' if index % 2 else 'ill'}" for index in range(1, subjects + 1)]
    (root / "participants.tsv").write_text("\n".join(["participant_id\tgroup", *lines]) + "\n")
    return root


def pictures(root: Path) -> Path:
    """Patient a has two pictures with two labels, patient b one."""
    for index in range(3):
        write_picture(root / "images" / f"{index}.png", seed=index)
    (root / "images.tsv").write_text(
        "filename\tpatient_id\tlabel\n0.png\ta\twell\nimages/1.png\ta\till\n2.png\tb\twell\n"
    )
    return root


def codes(inventory: Inventory) -> dict[str, str]:
    return {refusal.file: refusal.code for refusal in inventory.refusals}


def test_bids(tmp_path: Path) -> None:
    inventory = take_inventory(bids(tmp_path), label_column="group", labels=("ill", "well"))
    assert inventory.patients == ("sub-01", "sub-02", "sub-03")
    assert [record.label for record in inventory.records] == ["well", "ill", "well"]
    assert inventory.refusals == () and not inventory.record_is_patient


def test_bids_sessions_are_one_patient_and_other_images_are_left_out(tmp_path: Path) -> None:
    for session in (1, 2):
        anat = tmp_path / "sub-x" / f"ses-{session}" / "anat"
        write_nifti(anat / f"sub-x_ses-{session}_T1w.nii.gz", voxels(session))
        write_nifti(anat / f"sub-x_ses-{session}_T2w.nii.gz", voxels(session + 10))
        write_nifti(anat.parent / "func" / f"sub-x_ses-{session}_bold.nii.gz", voxels(session + 20))
    write_nifti(tmp_path / "derivatives" / "sub-x" / "anat" / "sub-x_T1w.nii.gz", voxels(40))
    inventory = inventory_of(tmp_path, records=False)
    assert inventory.patients == ("sub-x",) and len(inventory.records) == 2
    assert len(inventory.notes) == 2  # the other contrasts, and the derivatives


def test_bids_without_t1w_takes_what_is_under_anat(tmp_path: Path) -> None:
    write_nifti(tmp_path / "sub-1" / "anat" / "sub-1_FLAIR.nii.gz")
    assert inventory_of(tmp_path, records=False).patients == ("sub-1",)


def test_a_file_in_another_subjects_folder_is_refused(tmp_path: Path) -> None:
    write_nifti(tmp_path / "sub-1" / "anat" / "sub-2_T1w.nii.gz")
    assert inventory_of(tmp_path).refusal_counts() == {"patient_mismatch": 1}


def test_labels_belong_to_images(tmp_path: Path) -> None:
    inventory = take_inventory(pictures(tmp_path), label_column="label", labels=("well", "ill"))
    assert [(r.patient_id, r.label) for r in inventory.records] == [("a", "well"), ("a", "ill"), ("b", "well")]


def test_another_label_or_none_is_refused(tmp_path: Path) -> None:
    pictures(tmp_path)
    (tmp_path / "images.tsv").write_text("filename\tpatient_id\tlabel\n0.png\ta\tWell\n1.png\ta\tn/a\n2.png\tb\twell\n")
    inventory = take_inventory(tmp_path, label_column="label", labels=("well",))
    assert inventory.refusal_counts() == {"unknown_label": 2} and inventory.patients == ("b",)
    assert len(take_inventory(tmp_path, label_column="label").records) == 3  # no labels named: any


def test_no_patient_id(tmp_path: Path) -> None:
    pictures(tmp_path)
    (tmp_path / "images.tsv").write_text("filename\tpatient_id\n0.png\ta\n1.png\t\n")
    inventory = inventory_of(tmp_path, records=False)
    assert codes(inventory) == {"images/1.png": "no_patient_id", "images/2.png": "no_patient_id"}
    inventory = inventory_of(tmp_path, records=True)
    assert inventory.record_is_patient
    assert inventory.patients == ("a", "record:images/1.png", "record:images/2.png")  # a known id is kept


def test_loose_nifti_needs_a_table(tmp_path: Path) -> None:
    write_nifti(tmp_path / "brain.nii.gz")
    assert inventory_of(tmp_path, records=False).refusal_counts() == {"no_patient_id": 1}
    (tmp_path / "list.csv").write_text("file,subject\nbrain.nii.gz,s7\n")
    assert inventory_of(tmp_path, records=False).patients == ("s7",)


def test_dicom_labels_come_from_a_table_of_patients(tmp_path: Path) -> None:
    write_series(tmp_path / "p1")
    (tmp_path / "labels.csv").write_text("patient_id,group\np1,well\n")
    inventory = take_inventory(tmp_path, label_column="group", labels=("well",))
    assert [(record.patient_id, record.label) for record in inventory.records] == [("p1", "well")]


def test_faults_of_the_table(tmp_path: Path) -> None:
    pictures(tmp_path)
    (tmp_path / "images.tsv").write_text("filename\tpatient_id\n0.png\ta\n0.png\tb\nimages/1.png\ta\ngone.png\tc\n")
    assert codes(inventory_of(tmp_path, records=False)) == {
        "images/0.png": "conflicting_table",
        "images/2.png": "no_patient_id",
        "gone.png": "missing_file",
    }


def test_names_in_the_table_start_at_its_folder_or_at_images(tmp_path: Path) -> None:
    for index, name in enumerate(("0.png", "images/1.png", "images/c/2.png", "other/3.png", "images/4.png", "4.png")):
        write_picture(tmp_path / name, seed=index)
    (tmp_path / "images.tsv").write_text(
        "filename\tpatient_id\n0.png\ta\n1.png\tb\nc/2.png\tc\n3.png\td\n4.png\te\nimages/4.png\tf\n"
    )
    inventory = inventory_of(tmp_path, records=False)
    assert {record.file: record.patient_id for record in inventory.records} == {
        "0.png": "a",
        "images/1.png": "b",
        "images/c/2.png": "c",
        "4.png": "e",
        "images/4.png": "f",
    }
    assert codes(inventory) == {"other/3.png": "no_patient_id", "3.png": "missing_file"}


def test_a_listed_file_that_is_left_out_is_not_missing(tmp_path: Path) -> None:
    for kind in ("T1w", "T2w"):
        write_nifti(tmp_path / "sub-1" / "anat" / f"sub-1_{kind}.nii")
    (tmp_path / "images.csv").write_text("file,patient_id\nsub-1/anat/sub-1_T2w.nii,sub-1\n")
    assert not inventory_of(tmp_path).refusals


def test_copies(tmp_path: Path) -> None:
    for name, seed in (("0", 0), ("1", 0), ("2", 0), ("3", 1)):
        write_picture(tmp_path / f"{name}.png", seed=seed)
    (tmp_path / "images.csv").write_text("filename,patient_id\n0.png,a\n1.png,a\n2.png,b\n3.png,b\n")
    inventory = inventory_of(tmp_path, records=False)
    assert codes(inventory) == {"1.png": "duplicate", "2.png": "duplicate_across_patients"}
    assert "patients a and b" in next(r.reason for r in inventory.refusals if r.file == "2.png")


def test_a_copy_in_another_format_is_found(tmp_path: Path) -> None:
    data = voxels().astype(np.int16)
    write_nifti(tmp_path / "sub-1_T1w.nii", data)
    write_nifti(tmp_path / "sub-2_T1w.nii.gz", data[::-1].astype(np.float32), affine=np.diag([-2.0, 2.0, 3.0, 1.0]))
    assert inventory_of(tmp_path).refusal_counts() == {"duplicate_across_patients": 1}


def test_a_near_copy_is_a_note(tmp_path: Path) -> None:
    write_nifti(tmp_path / "sub-1_T1w.nii", voxels().astype(np.float32))
    write_nifti(tmp_path / "sub-2_T1w.nii", voxels().astype(np.float32) * 1.02 + 1)
    write_nifti(tmp_path / "sub-3_T1w.nii", voxels(3).astype(np.float32))
    inventory = inventory_of(tmp_path)
    assert len(inventory.records) == 3
    assert inventory.notes == ("Near duplicates of different patients: sub-1_T1w.nii and sub-2_T1w.nii.",)


def test_no_file_stops_the_others(tmp_path: Path) -> None:
    bids(tmp_path)
    (tmp_path / "sub-02" / "anat" / "sub-02_T1w.nii.gz").write_bytes(b"")
    (tmp_path / "scan.mgz").write_bytes(b"x")
    (tmp_path / "scan.dcm").write_bytes(b"x")
    (tmp_path / "gone.nii").symlink_to(tmp_path / "nowhere.nii")
    (tmp_path / "program").write_bytes(b"x")
    inventory = inventory_of(tmp_path)
    assert codes(inventory) == {
        "gone.nii": "unreadable",
        "sub-02/anat/sub-02_T1w.nii.gz": "truncated",
        "scan.mgz": "unsupported_format",
        "scan.dcm": "unreadable",
    }
    assert inventory.patients == ("sub-01", "sub-03")
    assert any("1 other files" in note for note in inventory.notes)


def test_a_dangling_link_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / "gone.nii").symlink_to(tmp_path / "nowhere.nii")
    assert inventory_of(tmp_path).refusal_counts() == {"unreadable": 1}


@pytest.mark.parametrize(
    ("files", "column", "words"),
    [
        ({}, None, "no image that is known"),
        ({"README.md": "x"}, None, "no image that is known"),
        ({"a.png": "x", "one.csv": "file,patient_id\n", "two.csv": "file,patient_id\n"}, None, "one.csv, two.csv"),
        ({"a.png": "x", "one.csv": "age,sex\n1,2\n", "images.tsv": "age\tsex\n"}, None, "neither a column"),
        ({"a.png": "x", "images.tsv": "filename\tpatient_id\n"}, "group", "no column 'group'"),
        ({"a.png": "x"}, "group", "has no table"),
        ({"a.png": "x", "images.tsv": ""}, None, "empty"),
    ],
)
def test_folders_that_cannot_be_understood(tmp_path: Path, files: dict[str, str], column: str, words: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(SiteError, match=words) as caught:
        take_inventory(tmp_path, label_column=column)
    assert caught.value.remedy


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="does not exist"):
        take_inventory(tmp_path / "nowhere", label_column=None)


def test_json(tmp_path: Path) -> None:
    bids(tmp_path)
    (tmp_path / "scan.mgz").write_bytes(b"x")
    content = json.loads(json.dumps(take_inventory(tmp_path, label_column="group").to_json()))
    assert content["num_patients"] == content["num_volumes"] == 3 and content["refusal_counts"] == {
        "unsupported_format": 1
    }
    assert content["images_by_label"] == {"ill": 1, "well": 2}
    assert content["refusals"][0]["file"] == "scan.mgz" and content["refusals"][0]["reason"]


def test_two_runs_agree(tmp_path: Path) -> None:
    bids(tmp_path, 5)
    assert inventory_of(tmp_path) == inventory_of(tmp_path)


@pytest.mark.parametrize(
    ("folder", "column", "patients", "images", "refused"),
    [
        ("ds002748_2mm", "group", 72, 72, {}),
        ("cxr/nih", "label", 682, 999, {"duplicate": 1}),  # one picture of one patient was published twice
        ("cxr/hannover", "label", 71, 243, {}),
    ],
)
def test_real_cohorts(shared_data: Path, folder: str, column: str, patients: int, images: int, refused: dict) -> None:
    inventory = take_inventory(shared_data / folder, label_column=column)
    assert (len(inventory.patients), len(inventory.records)) == (patients, images)
    assert inventory.refusal_counts() == refused
    assert not any("Near" in note for note in inventory.notes)


def test_a_copy_of_a_real_volume(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "nifti_odd" / "derived_from_ds002748"
    for name in ("ok_reference_uint8", "duplicate_of_reference", "near_duplicate_of_reference"):
        (tmp_path / f"{name}.nii.gz").symlink_to(source / f"{name}.nii.gz")
    inventory = inventory_of(tmp_path)
    assert inventory.refusal_counts() == {"duplicate_across_patients": 1} and len(inventory.notes) == 1


def test_patients_can_be_listed_without_reading_pixels(tmp_path: Path) -> None:
    bids(tmp_path)
    (tmp_path / "sub-02" / "anat" / "sub-02_T1w.nii.gz").write_bytes(b"")
    write_nifti(tmp_path / "sub-1" / "anat" / "sub-9_T1w.nii.gz")
    assert list_patients(tmp_path) == ("sub-01", "sub-02", "sub-03", "sub-1")
    pictures(tmp_path / "pictures")
    assert list_patients(tmp_path / "pictures") == ("a", "b")
    write_picture(tmp_path / "records" / "x.png")
    assert list_patients(tmp_path / "records") == ()
    assert list_patients(tmp_path / "records", record_is_patient=True) == ("record:x.png",)


def test_only_wanted_patients_take_part(tmp_path: Path) -> None:
    pictures(tmp_path)
    write_picture(tmp_path / "images" / "3.png", seed=0)  # a copy of a's first, of another patient
    write_picture(tmp_path / "images" / "4.png", seed=4)  # of a patient whom nothing names
    for name in ("images/5.tif", "sub-a/x.mgz", "sub-b/x.mgz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    write_nifti(tmp_path / "sub-b" / "anat" / "sub-c_T1w.nii.gz")
    (tmp_path / "images.tsv").write_text(
        "filename\tpatient_id\tlabel\n0.png\ta\twell\n1.png\ta\till\n2.png\tb\todd\n3.png\tc\twell\n"
        "gone.png\tb\twell\nlost.png\ta\twell\nnobody.png\t\twell\n5.tif\ta\twell\n"
    )

    def of(*patients: str) -> Inventory:
        return take_inventory(tmp_path, label_column="label", labels=("well", "ill"), patients=patients)

    assert of("a").patients == ("a",)
    assert codes(of("a")) == {"lost.png": "missing_file", "images/5.tif": "unsupported_format"}
    assert codes(of("b")) == {"images/2.png": "unknown_label", "gone.png": "missing_file"}
    assert codes(of("sub-a")) == {"sub-a/x.mgz": "unsupported_format"}
    assert codes(of("sub-b")) == {
        "sub-b/x.mgz": "unsupported_format",
        "sub-b/anat/sub-c_T1w.nii.gz": "patient_mismatch",
    }
    assert of().records == () and of().refusals == ()
    everything = take_inventory(tmp_path, label_column="label", labels=("well", "ill"))
    assert codes(everything).items() >= {"images/4.png": "no_patient_id", "nobody.png": "missing_file"}.items()
    assert len(everything.refusals) == 10


def test_what_is_refused_later_is_no_record_any_more(tmp_path: Path) -> None:
    bids(tmp_path)
    (tmp_path / "scan.mgz").write_bytes(b"x")
    before = inventory_of(tmp_path)
    later = Refusal("sub-02/anat/sub-02_T1w.nii.gz", "no_usable_slice", "expected anatomy")
    after = before.with_refusals([later])
    assert after.patients == ("sub-01", "sub-03") and len(after.refusals) == 2
    assert after.refusal_counts() == {"no_usable_slice": 1, "unsupported_format": 1}
    assert before.with_refusals(()) == before
