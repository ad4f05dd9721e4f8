"""Preparation of single images, and what is drawn of them."""

import os
import random
from pathlib import Path

import numpy as np
import pytest

from client.data.cohort import Cohort, Patient, split
from client.data.inventory import ImageRecord, take_inventory
from client.data.pixels import Picture, Volume, to_unit_range
from client.data.slices import PreparedCohort, prepare, prepare_image, reopen
from common.errors import SiteError
from common.orientation import slice_indices
from tests.client.data.builders import inventory_of, voxels, write_nifti, write_picture, write_series


def test_scaling_by_hand() -> None:
    # Background 0; foreground 1..100: its 1st percentile is 1.99, its 99th 99.01.
    values = np.concatenate([np.zeros(1000), np.arange(1, 101)]).astype(np.float32)
    scaled = to_unit_range(values)
    assert scaled[:1001].max() == 0 and scaled[-1] == 1
    assert scaled[1049] == pytest.approx((50 - 1.99) / (99.01 - 1.99))


@pytest.mark.parametrize("change", [lambda v: v * 1e6, lambda v: v - 1024, lambda v: v * 1e-6, lambda v: v * 1e34])
def test_gain_and_offset_cancel(change: object) -> None:
    values = voxels().astype(np.float32)
    np.testing.assert_allclose(to_unit_range(change(values)), to_unit_range(values), atol=1e-3)  # type: ignore[operator]


def test_a_large_background_or_a_hot_pixel_does_not_collapse_the_range() -> None:
    values = np.zeros((64, 64, 64), np.float32)  # foreground: 0.2 % of the voxels
    values[30:38, 30:38, 30:38] = np.arange(512).reshape(8, 8, 8) + 100
    assert to_unit_range(values).std() > 0.01
    values[0, 0, 0] = 1e7
    assert 0.3 < to_unit_range(values)[34, 34, 34] < 0.7


def test_a_mask_keeps_two_values() -> None:
    values = np.zeros((20, 20), np.float32)
    values[5:9] = 3
    assert set(np.unique(to_unit_range(values))) == {0.0, 1.0}


def test_orientation_of_a_slice() -> None:
    # One bright octant: right (high x is the patient's right in RAS), anterior. Column 0 is the patient's right,
    # row 0 anterior: it belongs in the upper left quarter.
    data = np.zeros((32, 32, 16), np.float32)
    data[2:30, 2:30] = 10
    data[16:30, 16:30] = 100
    images = prepare_image(Volume(data, (1.0, 1.0, 1.0)), 32)
    assert len(images) == len(slice_indices(16))
    quarters = {(r, c): images[0][16 * r : 16 * r + 16, 16 * c : 16 * c + 16].mean() for r in (0, 1) for c in (0, 1)}
    assert max(quarters, key=lambda quarter: quarters[quarter]) == (0, 0)


def test_a_millimetre_is_as_long_both_ways() -> None:
    # 24 columns of 1 mm (X) and 16 rows of 3 mm (Y): 24 mm wide, 48 mm high; half the width stays black.
    data = np.tile(np.arange(1, 17, dtype=np.float32), (24, 1))[:, :, None].repeat(16, axis=2)
    (image, *_) = prepare_image(Volume(data, (1.0, 3.0, 1.0)), 64)
    columns = np.flatnonzero(image.any(axis=0))
    assert (columns[0], columns[-1]) == (16, 47)
    tall = np.random.default_rng(0).uniform(50, 100, (24, 16)).astype(np.float32)
    (image,) = prepare_image(Picture(tall, (1.0, 1.0)), 48)
    columns = np.flatnonzero(image.any(axis=0))
    assert (columns[0], columns[-1]) == (8, 39)


def test_shrinking_does_not_alias() -> None:
    # A one-pixel checkerboard has no content at a quarter of the size.
    board = (np.indices((128, 128)).sum(axis=0) % 2).astype(np.float32)
    (image,) = prepare_image(Picture(board, (1.0, 1.0)), 32)
    assert np.ptp(image[4:-4, 4:-4]) < 20


def picture_folder(root: Path, counts: dict[str, int]) -> Path:
    """A patient with n pictures for each entry; labels alternate."""
    lines, seed = ["filename\tpatient_id\tlabel"], 0
    for patient, count in counts.items():
        for index in range(count):
            write_picture(root / "images" / f"{patient}_{index}.png", seed=seed)
            lines.append(f"{patient}_{index}.png\t{patient}\t{'ab'[index % 2]}")
            seed += 1
    (root / "images.tsv").write_text("\n".join(lines) + "\n")
    return root


def cohort_of(folder: Path) -> Cohort:
    return split(take_inventory(folder, label_column="label"), bytes(32), 100)


def everyone(folder: Path) -> tuple[Patient, ...]:
    cohort = cohort_of(folder)
    return tuple(sorted((*cohort.training, *cohort.held_out), key=lambda patient: patient.patient_id))


def prepared(patients: tuple[Patient, ...], folder: Path, **options: object) -> PreparedCohort:
    plain: dict = {"image_size": 16, "name": "training", "labels": ("a", "b")}
    return prepare(patients, folder, **(plain | options))


def test_draw(tmp_path: Path) -> None:
    cohort = prepared(everyone(picture_folder(tmp_path / "in", {"one": 1, "many": 50})), tmp_path / "out")
    assert cohort.patient_ids == ("many", "one") and cohort.num_patients == 2
    assert np.diff(cohort.starts).tolist() == [50, 1]
    images, labels = cohort.draw(0, 8)
    assert images.shape == (8, 1, 16, 16) and images.dtype == np.float32 and labels.shape == (8,)
    assert images.min() >= -1 and images.max() <= 1 and type(images) is np.ndarray
    assert cohort.draw(1, 8)[0].shape == (1, 1, 16, 16)
    assert cohort.draw(0, 100)[0].shape[0] == 50
    with pytest.raises(IndexError):
        cohort.draw(-1, 1)
    with pytest.raises(IndexError):
        cohort.draw(2, 1)


def test_draws_are_without_replacement_and_fresh(tmp_path: Path) -> None:
    cohort = prepared(everyone(picture_folder(tmp_path / "in", {"p": 20})), tmp_path / "out")
    draws = [cohort.draw(0, 5)[0] for _ in range(20)]
    assert all(len({image.tobytes() for image in images}) == 5 for images in draws)
    assert len({images.tobytes() for images in draws}) > 15
    seeded = [cohort.draw(0, 5, random.Random(7))[0] for _ in range(2)]
    np.testing.assert_array_equal(*seeded)


def test_labels_follow_their_images(tmp_path: Path) -> None:
    cohort = prepared(everyone(picture_folder(tmp_path / "in", {"p": 9})), tmp_path / "out")
    by_image = {image.tobytes(): i % 2 for i, image in enumerate(cohort.images)}
    images, labels = cohort.draw(0, 9)
    stored = np.round((images + 1) * 127.5).astype(np.uint8)
    assert [by_image[image.tobytes()] for image in stored] == labels.tolist()
    reverse = prepared(everyone(tmp_path / "in"), tmp_path / "out", labels=("b", "a"))
    assert reverse.label_indices.tolist() == [1 - label for label in cohort.label_indices.tolist()]


def test_draw_never_returns_held_out_patients(tmp_path: Path) -> None:
    cohort = cohort_of(picture_folder(tmp_path / "in", {f"p{index}": 2 for index in range(30)}))
    assert cohort.training and cohort.held_out
    training = prepared(cohort.training, tmp_path / "out", name="training")
    held_out = prepared(cohort.held_out, tmp_path / "out", name="held_out")
    assert training.patient_ids == tuple(patient.patient_id for patient in cohort.training)
    hidden = {image.tobytes() for image in held_out.images}
    assert len(hidden) == 2 * len(cohort.held_out)
    assert hidden.isdisjoint(image.tobytes() for image in training.images)
    for index in range(training.num_patients):
        drawn = np.round((training.draw(index, 5)[0] + 1) * 127.5).astype(np.uint8)
        assert hidden.isdisjoint(image.tobytes() for image in drawn)


def test_other_patients_do_not_change_a_patients_pixels(tmp_path: Path) -> None:
    patients = everyone(picture_folder(tmp_path / "in", {"a": 2, "b": 3, "c": 1}))
    together = prepared(patients, tmp_path / "together")
    for index, patient in enumerate(patients):
        alone = prepared((patient,), tmp_path / patient.patient_id)
        np.testing.assert_array_equal(
            alone.images, together.images[together.starts[index] : together.starts[index + 1]]
        )


def test_reopening_and_rebuilding(tmp_path: Path) -> None:
    patients = everyone(picture_folder(tmp_path / "in", {"a": 2, "b": 3}))
    first = prepared(patients, tmp_path / "out")
    (data,) = (tmp_path / "out").glob("*.npy")
    made = data.stat().st_mtime_ns
    again = prepared(patients, tmp_path / "out")
    assert data.stat().st_mtime_ns == made
    np.testing.assert_array_equal(first.images, again.images)
    assert prepared(patients, tmp_path / "out", image_size=24).images.shape == (5, 1, 24, 24)
    assert len(list((tmp_path / "out").iterdir())) == 2 and not data.exists()  # the old pixels are gone
    assert prepared(patients[:1], tmp_path / "out").images.shape == (2, 1, 16, 16)
    source = tmp_path / "in" / "images" / "a_0.png"
    write_picture(source, seed=99)
    os.utime(source, (1, 1))
    changed = prepared(patients, tmp_path / "out")
    assert not np.array_equal(changed.images[0], first.images[0])


def test_a_damaged_index_or_file_is_rebuilt(tmp_path: Path) -> None:
    patients = everyone(picture_folder(tmp_path / "in", {"a": 2}))
    whole = prepared(patients, tmp_path / "out")
    expected = np.array(whole.images)
    for name, content in (("training.json", b"{"), ("training.json", b"[]"), (None, b"\x93NUMPY")):
        path = tmp_path / "out" / name if name else next((tmp_path / "out").glob("*.npy"))
        path.write_bytes(content)
        np.testing.assert_array_equal(prepared(patients, tmp_path / "out").images, expected)


def test_reopen(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="no prepared images"):
        reopen(tmp_path, name="training")
    made = prepared(everyone(picture_folder(tmp_path / "in", {"a": 2})), tmp_path / "out")
    again = reopen(tmp_path / "out", name="training")
    np.testing.assert_array_equal(again.images, made.images)
    assert again.patient_ids == made.patient_ids


def test_private_files_and_no_leftovers(tmp_path: Path) -> None:
    prepared(everyone(picture_folder(tmp_path / "in", {"a": 2})), tmp_path / "out")
    files = sorted((tmp_path / "out").iterdir())
    assert [path.suffix for path in files] == [".npy", ".json"]
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in files)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700


def test_what_fails_after_the_inventory_is_refused(tmp_path: Path) -> None:
    patients = everyone(picture_folder(tmp_path / "in", {"a": 1, "b": 2}))
    (tmp_path / "in" / "images" / "a_0.png").write_bytes(b"")
    (tmp_path / "in" / "images" / "b_0.png").unlink()
    cohort = prepared(patients, tmp_path / "out")
    assert cohort.patient_ids == ("b",) and len(cohort.images) == 1
    assert [refusal.code for refusal in cohort.refusals] == ["unreadable", "unreadable"]
    assert [refusal.file for refusal in cohort.refusals] == ["images/a_0.png", "images/b_0.png"]
    assert prepared(patients, tmp_path / "out").refusals == cohort.refusals


def test_no_patients(tmp_path: Path) -> None:
    cohort = prepared((), tmp_path / "out")
    assert cohort.num_patients == 0 and cohort.images.shape == (0, 1, 16, 16)


def test_a_volume_without_anatomy_in_the_middle(tmp_path: Path) -> None:
    data = np.zeros((20, 20, 16), np.uint8)
    data[5:15, 5:15, :3] = np.arange(300).reshape(10, 10, 3) % 250
    record = ImageRecord("a.nii", "p", None, (write_nifti(tmp_path / "a.nii", data),), "volume", "nifti")
    cohort = prepared((Patient("p", (record,)),), tmp_path / "out", labels=())
    assert [refusal.code for refusal in cohort.refusals] == ["no_usable_slice"] and cohort.num_patients == 0


def test_dicom_series_are_prepared(tmp_path: Path) -> None:
    write_series(tmp_path / "in")
    patients = split(inventory_of(tmp_path / "in"), bytes(32), 100)
    cohort = prepared((*patients.training, *patients.held_out), tmp_path / "out", labels=())
    assert cohort.images.shape == (len(slice_indices(16)), 1, 16, 16)


def test_real_brains(shared_data: Path, tmp_path: Path) -> None:
    inventory = take_inventory(shared_data / "ds002748_2mm", label_column="group")
    cohort = split(inventory, bytes(range(32)), 72)
    labels = tuple(sorted({record.label for record in inventory.records if record.label is not None}))
    training = prepare(cohort.training, tmp_path, image_size=64, name="training", labels=labels)
    assert training.num_patients == len(cohort.training) and not training.refusals
    assert len(training.images) == training.num_patients * len(slice_indices(80))
    mean = training.images[:, 0].mean(axis=0)  # (row, column)
    assert mean[32, 32] > 60 and mean[0].max() < 20  # a head in the middle, on black
    np.testing.assert_allclose(mean[:, :32].mean(), mean[:, 32:].mean(), rtol=0.1)  # left and right alike
