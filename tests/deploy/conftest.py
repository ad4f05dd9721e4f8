"""Phantom hospitals and one completed run, made once a session with the user's command."""

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import pytest
from flwr.app import Message
from flwr.common.serde import message_to_proto
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

import deploy.simulate
from deploy.local_grid import LocalGrid
from deploy.phantoms import write_bids
from tests.deploy.command import Result, synthward, tiny_study

MARK = "ZEBRA7319"
"""The id of a patient who is easy to recognise, in the tables, the file names and the pixels of site north."""


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Warm starts of the tests stay among the tests' files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SYNTHWARD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """north and south with 25 patients each, small with 5."""
    folder = tmp_path_factory.mktemp("hospitals")
    first, second = write_bids(folder / "both", sites=2, patients=25, seed=1, shape=(40, 40, 24))
    (third,) = write_bids(folder / "third", sites=1, patients=5, seed=2, shape=(40, 40, 24))
    _mark(first)
    return {"north": first, "south": second, "small": third}


def _mark(site: Path) -> None:
    """Give one patient the mark as id, and a chessboard as head."""
    table = site / "participants.tsv"
    patient = table.read_text().splitlines()[1].split("\t")[0]
    table.write_text(table.read_text().replace(patient, f"sub-{MARK}"))
    (site / patient).rename(site / f"sub-{MARK}")
    for path in (site / f"sub-{MARK}").rglob(f"{patient}*"):
        marked = path.rename(path.with_name(path.name.replace(patient, f"sub-{MARK}")))
        if marked.name.endswith(".nii.gz"):
            image = nibabel.load(marked)
            voxels = np.asarray(image.dataobj).copy()
            x, y, _ = np.indices(voxels.shape)
            voxels[((x // 5) + (y // 5)) % 2 == 0] = 0
            nibabel.save(nibabel.Nifti1Image(voxels, image.affine, image.header), marked)


@dataclass(frozen=True)
class Run:
    """A completed run of north and south; small was refused."""

    folder: Path
    result: Result
    replies: list[bytes]


def bytes_of(message: Message) -> bytes:
    """Everything that Flower sends for a message. Ask before it is read: reading may empty it."""
    assert not message.has_error()
    parts = get_all_nested_objects(message.content)
    return message_to_proto(message).SerializeToString() + b"".join(part.deflate() for part in parts.values())


@pytest.fixture(scope="session")
def run(hospitals: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """``synthward simulate study.toml --site ...``, all replies of the sites kept."""
    folder = tmp_path_factory.mktemp("completed")
    replies: list[bytes] = []

    class Listening(LocalGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            pulled = super().pull_messages(message_ids)
            replies.extend(map(bytes_of, pulled))
            return pulled

    sites = [word for name, path in hospitals.items() for word in ("--site", f"{name}={path}")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deploy.simulate, "LocalGrid", Listening)
        result = synthward("simulate", tiny_study(folder / "study.toml"), *sites, "--out", folder / "run")
    assert result.status == 0, result.err
    return Run(folder / "run", result, replies)


@pytest.fixture
def copied(run: Run, tmp_path: Path) -> Path:
    """A copy of the completed run, to spoil."""
    return Path(shutil.copytree(run.folder, tmp_path / "copy"))
