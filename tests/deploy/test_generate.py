import csv
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from common.orientation import axial_slice
from server.record import RunRecord
from tests.deploy.command import synthward
from tests.deploy.conftest import Run


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "images.tsv").open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_all_labels_in_turn_each_file_with_its_notice(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "images"
    result = synthward("generate", run.folder, "--count", 5, "--out", out)
    assert (result.status, result.out) == (0, f"{out}\n")
    rows = table(out)
    notice = RunRecord.load(run.folder).notice
    assert [row["label"] for row in rows] == ["healthy", "lesion", "healthy", "lesion", "healthy"]
    assert {(row["synthetic"], row["notice"]) for row in rows} == {("true", notice)}
    assert sorted(path.name for path in out.iterdir()) == sorted(["images.tsv", *(row["filename"] for row in rows)])
    for row in rows:
        with Image.open(out / row["filename"]) as image:
            assert (image.size, image.mode) == ((28, 28), "L")
            assert image.text["Description"] == f"SYNTHETIC image. {notice}"


def test_one_label(run: Run, tmp_path: Path) -> None:
    assert synthward("generate", run.folder, "--count", 3, "--out", tmp_path / "i", "--label", "lesion").status == 0
    assert [row["label"] for row in table(tmp_path / "i")] == ["lesion"] * 3


def test_an_unknown_label_is_2_and_names_the_known(run: Run, tmp_path: Path) -> None:
    result = synthward("generate", run.folder, "--count", 3, "--out", tmp_path / "i", "--label", "tumour")
    assert result.status == 2
    assert "no label 'tumour'; its labels are healthy, lesion" in result.err
    assert not (tmp_path / "i").exists()


def test_the_seed_decides_the_images(run: Run, tmp_path: Path) -> None:
    pixels = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert synthward("generate", run.folder, "--count", 2, "--out", tmp_path / name, "--seed", seed).status == 0
        pixels.append([np.asarray(Image.open(path)) for path in sorted((tmp_path / name).glob("*.png"))])
    np.testing.assert_array_equal(pixels[0], pixels[1])
    assert not np.array_equal(pixels[0], pixels[2])


def test_a_nifti_shows_the_same_picture(run: Run, tmp_path: Path) -> None:
    for form in ("png", "nifti"):
        assert synthward("generate", run.folder, "--count", 2, "--out", tmp_path / form, "--format", form).status == 0
    for png, nifti in zip(
        sorted((tmp_path / "png").glob("*.png")), sorted((tmp_path / "nifti").glob("*.gz")), strict=True
    ):
        image = nibabel.load(nifti)
        assert nibabel.aff2axcodes(image.affine) == ("R", "A", "S")
        np.testing.assert_array_equal(axial_slice(np.asarray(image.dataobj), 0), np.asarray(Image.open(png)))
        assert image.header["descrip"].item() == b"SYNTHETIC; DP, unit: one patient"
        assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (1, 1)


def test_a_nifti_says_when_the_unit_is_one_image(copied: Path, tmp_path: Path) -> None:
    facts = RunRecord.load(copied)
    facts.sites[1].record_is_patient = True
    facts.save(copied)
    assert synthward("generate", copied, "--count", 1, "--out", tmp_path / "i", "--format", "nifti").status == 0
    (path,) = (tmp_path / "i").glob("*.nii.gz")
    assert nibabel.load(path).header["descrip"].item() == b"SYNTHETIC; DP, unit: one image"


def test_it_writes_into_no_occupied_folder(run: Run, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("")
    result = synthward("generate", run.folder, "--count", 1, "--out", tmp_path)
    assert result.status == 2
    assert "is not empty" in result.err


def test_a_run_without_checkpoint_is_2(copied: Path, tmp_path: Path) -> None:
    for path in (copied / "checkpoints").iterdir():
        path.unlink()
    result = synthward("generate", copied, "--count", 1, "--out", tmp_path / "i")
    assert result.status == 2
    assert "holds no checkpoint" in result.err


@pytest.mark.parametrize("content", [b"", b"{}", b"PK\x03\x04 torn"])
def test_a_damaged_checkpoint_is_2(content: bytes, copied: Path, tmp_path: Path) -> None:
    (copied / "checkpoints" / "round-0002.pt").write_bytes(content)
    result = synthward("generate", copied, "--count", 1, "--out", tmp_path / "i")
    assert result.status == 2
    assert "is not a checkpoint" in result.err
