import csv
import gzip
import json
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from common.errors import ConfigError
from common.phantom.brain import percentiles, site_look
from deploy.phantoms import write_bids

SHAPE = (32, 32, 24)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_each_site_is_a_bids_folder(tmp_path: Path) -> None:
    sites = write_bids(tmp_path / "data", sites=2, patients=6, seed=1, shape=SHAPE)
    assert sites == [tmp_path / "data" / "site-1", tmp_path / "data" / "site-2"]
    everyone = []
    for site in sites:
        description = json.loads((site / "dataset_description.json").read_text())
        assert {"Name", "BIDSVersion"} <= description.keys()
        table = rows(site / "participants.tsv")
        assert list(table[0]) == ["participant_id", "age", "sex", "group"]
        assert sorted(row["group"] for row in table) == ["healthy"] * 3 + ["lesion"] * 3
        assert all(20 <= int(row["age"]) < 80 and row["sex"] in "FM" for row in table)
        subjects = [row["participant_id"] for row in table]
        assert subjects == sorted(path.name for path in site.glob("sub-*"))
        for subject in subjects:
            assert subject.removeprefix("sub-").isalnum()
            assert [path.name for path in site.glob(f"{subject}/**/*.nii.gz")] == [f"{subject}_T1w.nii.gz"]
        everyone += subjects
    assert len(set(everyone)) == 12  # no id is used at two sites


def test_headers_agree_on_place_and_name_nobody(tmp_path: Path) -> None:
    (site,) = write_bids(tmp_path, sites=1, patients=1, seed=2)
    image = nib.load(site / "sub-A001" / "anat" / "sub-A001_T1w.nii.gz")
    header = image.header
    sform, sform_code = header.get_sform(coded=True)
    qform, qform_code = header.get_qform(coded=True)
    assert sform_code == qform_code == 1
    np.testing.assert_allclose(sform, qform, atol=1e-3)
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    assert image.shape == (64, 64, 48)
    # 64 voxels fill the field of view of about 220 mm, 48 that of about 172 mm.
    zooms = header.get_zooms()
    np.testing.assert_allclose(zooms, np.abs(np.diag(image.affine)[:3]), rtol=1e-5)
    assert 3.3 < zooms[0] == zooms[1] < 3.8
    assert 3.4 < zooms[2] < 3.8
    np.testing.assert_allclose(image.affine @ [31.5, 31.5, 23.5, 1], [0, 0, 0, 1], atol=1e-3)
    assert header.get_data_dtype() == np.int16
    assert header.get_xyzt_units()[0] == "mm"
    for field in ("descrip", "aux_file", "intent_name", "db_name"):
        assert header[field].item() == b""
    voxels = np.asarray(image.dataobj)
    assert voxels.min() >= 0
    low, high = percentiles(site_look(2001))
    assert np.percentile(voxels, 99) == pytest.approx(1000 * high, rel=0.15)


def test_equal_seeds_write_equal_files_and_more_patients_change_no_picture(tmp_path: Path) -> None:
    few = write_bids(tmp_path / "few", sites=1, patients=3, seed=5, shape=SHAPE)[0]
    more = write_bids(tmp_path / "more", sites=2, patients=5, seed=5, shape=SHAPE)[0]
    for path in few.glob("sub-*/anat/*"):
        assert path.read_bytes() == (more / path.relative_to(few)).read_bytes()
    assert rows(few / "participants.tsv") == rows(more / "participants.tsv")[:3]
    other = write_bids(tmp_path / "other", sites=1, patients=1, seed=6, shape=SHAPE)[0]
    name = Path("sub-A001", "anat", "sub-A001_T1w.nii.gz")
    assert gzip.decompress((other / name).read_bytes()) != gzip.decompress((few / name).read_bytes())


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "site-2").mkdir()
    kept = tmp_path / "site-2" / "notes.txt"
    kept.write_text("mine")
    with pytest.raises(ConfigError, match="nothing was written") as caught:
        write_bids(tmp_path, sites=2, patients=1, seed=0)
    assert caught.value.remedy
    assert [path.name for path in tmp_path.iterdir()] == ["site-2"]
    assert kept.read_text() == "mine"


def test_an_empty_folder_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "site-1").mkdir()
    assert write_bids(tmp_path, sites=1, patients=1, seed=0, shape=SHAPE)[0].joinpath("participants.tsv").exists()


def test_a_file_in_the_way_is_an_error_to_act_on(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    with pytest.raises(ConfigError, match="Cannot write"):
        write_bids(tmp_path / "data", sites=1, patients=1, seed=0, shape=SHAPE)


@pytest.mark.parametrize(("sites", "patients"), [(0, 1), (1, 0)])
def test_there_must_be_someone(tmp_path: Path, sites: int, patients: int) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        write_bids(tmp_path, sites=sites, patients=patients, seed=0)


def test_it_is_quick(tmp_path: Path) -> None:
    start = time.process_time()
    write_bids(tmp_path, sites=3, patients=8, seed=0)
    assert time.process_time() - start < 10
