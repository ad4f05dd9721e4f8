"""Folders of invented images, and the real data where a checkout has them."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real public data beside the repository."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("REAL DATA ABSENT: ../shared/data is not beside this repository; its cases were NOT run")
    return folder


@pytest.fixture(scope="session")
def dicom_archive(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Unpacks one of the DICOM archives, once a session."""
    unpacked: dict[str, Path] = {}

    def unpack(name: str) -> Path:
        if name not in unpacked:
            folder = tmp_path_factory.mktemp(name)
            with zipfile.ZipFile(shared_data / "dicom" / f"{name}.zip") as archive:
                archive.extractall(folder)
            unpacked[name] = folder
        return unpacked[name]

    return unpack
