"""Random damage ends in a verdict, never in another exception or a warning."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from client.data.inventory import Inventory
from common.errors import SiteError
from tests.client.data.builders import inventory_of, write_nifti, write_picture, write_xray


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.nii", write_nifti),
        ("a.nii.gz", write_nifti),
        ("a.png", write_picture),
        ("a.jpg", write_picture),
        ("a.dcm", write_xray),
    ],
)
def test_changed_bytes(tmp_path: Path, name: str, write: Callable[[Path], Path]) -> None:
    whole = write(tmp_path / name).read_bytes()
    rng = random.Random(7)
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 3, 10])):
            damaged[rng.randrange(min(len(damaged), rng.choice([400, len(damaged)])))] = rng.randrange(256)
        (tmp_path / name).write_bytes(damaged[: rng.choice([len(damaged)] * 5 + [rng.randrange(len(damaged))])])
        inventory = inventory_of_anything(tmp_path)
        assert inventory is None or len(inventory.records) + len(inventory.refusals) == 1


def inventory_of_anything(folder: Path) -> Inventory | None:
    """The inventory, or None where no image is recognised (a lost DICOM mark)."""
    try:
        return inventory_of(folder)
    except SiteError:
        return None
