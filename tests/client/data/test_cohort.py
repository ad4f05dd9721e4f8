"""The split: by hand, and the properties that its privacy rests on."""

import hashlib
import hmac
import os
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.data.cohort import commitment, holdout_key, holdout_share, is_held_out, split
from client.data.inventory import ImageRecord, Inventory
from common.errors import SiteError

KEY = bytes(range(32))
ids = st.lists(st.text(max_size=12), unique=True, max_size=30)


def inventory(*patients: str, images: int = 1) -> Inventory:
    records = tuple(
        ImageRecord(name := f"{number}_{index}.png", patient, f"label{index % 2}", (Path(name),), "image", "image")
        for number, patient in enumerate(patients)
        for index in range(images)
    )
    return Inventory(Path(), records, (), (), False)


def test_the_coin_by_hand() -> None:
    digest = hmac.new(KEY, b"sub-01", hashlib.sha256).digest()
    fraction = int.from_bytes(digest, "big") / 2**256
    assert is_held_out(KEY, "sub-01", fraction * 1.001) and not is_held_out(KEY, "sub-01", fraction * 0.999)


@pytest.mark.parametrize(("patients", "share"), [(1, 0.3), (149, 0.3), (150, 0.2), (10000, 0.2)])
def test_the_share_is_a_function_of_the_contracted_number(patients: int, share: float) -> None:
    assert holdout_share(patients) == share


def test_edges_of_the_share() -> None:
    assert not is_held_out(KEY, "x", 0.0) and is_held_out(KEY, "x", 1.0)


@given(ids, st.randoms())
def test_order_does_not_matter(patients: list[str], rng: random.Random) -> None:
    shuffled = patients.copy()
    rng.shuffle(shuffled)
    one, other = split(inventory(*patients), KEY, 200), split(inventory(*shuffled), KEY, 200)
    assert [p.patient_id for p in one.training] == [p.patient_id for p in other.training]
    assert [p.patient_id for p in one.held_out] == [p.patient_id for p in other.held_out]


@given(ids.filter(bool))
def test_one_patient_more_moves_nobody_else(patients: list[str]) -> None:
    more, fewer = split(inventory(*patients), KEY, 200), split(inventory(*patients[1:]), KEY, 200)
    assert {p.patient_id for p in more.training} - {patients[0]} == {p.patient_id for p in fewer.training}
    assert {p.patient_id for p in more.held_out} - {patients[0]} == {p.patient_id for p in fewer.held_out}


@given(ids, st.integers(1, 5), st.binary(min_size=32, max_size=32))
def test_each_patient_is_whole_and_on_one_side(patients: list[str], images: int, key: bytes) -> None:
    cohort = split(inventory(*patients, images=images), key, 100)
    both = [*cohort.training, *cohort.held_out]
    assert sorted(p.patient_id for p in both) == sorted(patients)
    assert all(len(p.records) == images and {r.patient_id for r in p.records} == {p.patient_id} for p in both)


@pytest.mark.parametrize("share", [0.2, 0.3])
def test_the_share_is_met(share: float) -> None:
    held_out = sum(is_held_out(KEY, f"patient {index}", share) for index in range(20000))
    assert abs(held_out - 20000 * share) < 4 * (20000 * share * (1 - share)) ** 0.5  # 4 standard deviations


def test_the_same_id_at_two_sites_has_two_coins() -> None:
    other = os.urandom(32)
    apart = sum(is_held_out(KEY, f"{i}", 0.3) != is_held_out(other, f"{i}", 0.3) for i in range(2000))
    assert 650 < apart < 1030  # expected 2000 * 2 * 0.3 * 0.7 = 840


def test_labels_stay_with_the_images() -> None:
    cohort = split(inventory("a", images=3), KEY, 100)
    (patient,) = (*cohort.training, *cohort.held_out)
    assert [record.label for record in patient.records] == ["label0", "label1", "label0"]


def test_the_key_is_made_once(tmp_path: Path) -> None:
    folder = tmp_path / "site"
    key = holdout_key(folder)
    assert len(key) == 32 and holdout_key(folder) == key != holdout_key(tmp_path / "other")
    (path,) = folder.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    assert commitment(key) == hashlib.sha256(key).hexdigest()


def test_a_damaged_or_public_key_is_refused(tmp_path: Path) -> None:
    key = holdout_key(tmp_path)
    (path,) = tmp_path.iterdir()
    for damaged in (b"", key[:31], key + b"\n"):
        path.write_bytes(damaged)
        with pytest.raises(SiteError, match="expected 32") as caught:
            holdout_key(tmp_path)
        assert key.hex() not in str(caught.value)
    path.write_bytes(key)
    path.chmod(0o644)
    with pytest.raises(SiteError, match="other users"):
        holdout_key(tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SiteError, match="cannot be read or made"):
        holdout_key(tmp_path / "file" / "site")
