"""Every byte that leaves a site in a whole run, errors included, searched for what was planted among its patients."""

import base64
import logging
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import pytest
from flwr.app import Message
from PIL import Image

import deploy.simulate
from client import joint, training
from client.accountant import open_ledger
from client.data.inventory import list_patients
from client.training import SiteStudy
from common.gan.training import RealBatch
from deploy.local_grid import LocalGrid
from server.record import read_metrics
from tests.deploy.command import phased_study, synthward
from tests.deploy.conftest import MARK, bytes_of

NOTE, LABEL, BROKEN, TEXT = "Okapi5521note", "Quagga8812label", "Tapir9934broken", "Numbat4410text"
PLANTED = (MARK, NOTE, LABEL, BROKEN, TEXT)


@dataclass(frozen=True)
class Left:
    """What a run of marked hospitals left, and let out.

    Args:
        run: its folder.
        sent: the bytes of every reply of a site, and of every question to one.
        logged: what anyone but the sites' own logs was told.
        patients: the ids of all patients.
        codes: of the sites' refusals.
    """

    run: Path
    sent: bytes
    logged: str
    patients: frozenset[str]
    codes: tuple[str, ...]

    @property
    def public(self) -> dict[str, bytes]:
        """Files outside the sites' folders, pictures as their pixels too."""
        found = {}
        for path in self.run.rglob("*"):
            name = path.relative_to(self.run)
            if path.is_file() and name.parts[0] != "sites":
                found[str(name)] = path.name.encode() + path.read_bytes()
                if path.suffix == ".png":
                    found[f"{name} (pixels)"] = np.asarray(Image.open(path)).tobytes()
        return found


def plant(site: Path) -> None:
    """A column of notes, a patient with a label that no study has, and a file that cannot be read."""
    table = site / "participants.tsv"
    head, *rows = table.read_text().splitlines()
    column = head.split("\t").index("group")
    first = rows[2].split("\t")
    first[column] = LABEL
    rows[2] = "\t".join(first)
    table.write_text("\n".join([f"{head}\tnote", *(f"{row}\t{NOTE}" for row in rows)]) + "\n")
    whole = next(site.rglob("*.nii.gz"))
    folder = site / f"sub-{BROKEN}" / "anat"
    folder.mkdir(parents=True)
    (folder / f"sub-{BROKEN}_T1w.nii.gz").write_bytes(whole.read_bytes()[:1000])


@pytest.fixture(scope="module")
def left(hospitals: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Left]:
    folder = tmp_path_factory.mktemp("leaks")
    north = Path(shutil.copytree(hospitals["north"], folder / f"scans-{MARK}"))
    plant(north)
    sent: list[bytes] = []
    codes: list[str] = []

    class Listening(LocalGrid):
        def push_messages(self, pushed: Iterable[Message]) -> Iterable[str]:
            kept = list(pushed)
            sent.extend(map(bytes_of, kept))
            return super().push_messages(kept)

        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            pulled = super().pull_messages(message_ids)
            sent.extend(map(bytes_of, pulled))  # now: whoever reads a message may empty it
            facts = [dict(message.content.config_records["facts"]) for message in pulled]
            codes.extend(str(fact["code"]) for fact in facts if fact["kind"] == "refusal")
            return pulled

    draw, failed = joint.draw, []  # the joint steps keep it: an error in the only one of that phase would end it

    def failing_once(at: SiteStudy) -> RealBatch:
        if at.site == "north" and not failed:
            failed.append(at.site)
            raise ValueError(f"{TEXT}: {at.cohort.patient_ids} {at.cohort.images[0]}")
        return draw(at)

    records: list[str] = []

    class Keeping(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if not record.name.startswith("synthward.site"):
                records.append(self.format(record))

    handler = Keeping(logging.DEBUG)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(deploy.simulate, "LocalGrid", Listening)
            patch.setattr(training, "draw", failing_once)
            phases = [
                {"algorithm": "moments", "share": 0.4},
                {"algorithm": "joint", "share": 0.3, "steps": 3},
                {"algorithm": "local", "share": 0.3, "rounds": 3, "steps": 3},
            ]
            study = phased_study(folder / "study.toml", federation__phase=phases, gan__moments_steps=12)
            sites = ("--site", f"north={north}", "--site", f"south={hospitals['south']}")
            result = synthward("simulate", study, *sites, "--out", folder / "run")
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    assert result.status == 0, result.err
    assert failed
    assert [line["algorithm"] for line in read_metrics(folder / "run")][:3] == ["moments", "joint", "local"]
    yield Left(
        folder / "run",
        b"".join(sent),
        "\n".join([*records, result.out, result.err]),
        frozenset(list_patients(north)) | frozenset(list_patients(hospitals["south"])),
        tuple(codes),
    )


def forms(text: str) -> list[bytes]:
    """As it could be written down."""
    plain = text.encode()
    return [plain, plain.hex().encode(), base64.b64encode(plain)[:-4], plain[::-1], text.lower().encode()]


def found_in(content: bytes, texts: Iterable[str]) -> list[str]:
    return [text for text in texts if any(form in content for form in forms(text))]


def test_what_was_planted_is_known_at_the_site_and_something_failed_there(left: Left) -> None:
    """The control: the site read all of it, and its own files say so."""
    own = b"".join(path.read_bytes() for path in (left.run / "sites" / "north").rglob("*") if path.is_file())
    assert set(found_in(own, PLANTED)) >= {MARK, BROKEN, TEXT}
    assert "internal" in left.codes
    assert len(left.patients) > 49 and len(left.sent) > 1_000_000


def test_nothing_planted_is_in_any_message(left: Left) -> None:
    assert found_in(left.sent, {*PLANTED, *left.patients, str(left.run / "sites")}) == []


def test_nothing_planted_is_in_any_file_beside_the_sites_folders(left: Left) -> None:
    files = left.public
    assert {"run.json", "report.html", "metrics.jsonl", "study.toml"} <= set(files)
    for name, content in files.items():
        assert found_in(content, {*PLANTED, *left.patients}) == [], name


def test_nothing_planted_is_in_what_the_coordinator_is_told(left: Left) -> None:
    assert found_in(left.logged.encode(), {*PLANTED, *left.patients}) == []


def test_no_digest_of_a_patient_or_of_a_data_set_leaves(left: Left) -> None:
    """They are keyed, and still tell whether two runs had the same patients."""
    for site in ("north", "south"):
        for data_set in open_ledger(left.run / "sites" / site).read().data_sets():
            for digest in (data_set.digest, *data_set.patients):
                for content in (left.sent, *left.public.values()):
                    assert digest.encode() not in content and bytes.fromhex(digest) not in content


def pieces_of_images(left: Left, count: int) -> list[bytes]:
    """Rows of patients' prepared pixels, as stored and as networks see them, and of the volumes themselves."""
    random = np.random.default_rng(4)
    found: list[bytes] = []
    for path in sorted(left.run.glob("sites/*/prepared/*/*.npy")):
        images = np.load(path)
        if images.dtype != np.uint8 or images.ndim != 4:
            continue
        for index in random.integers(0, len(images), count):
            row = images[index, 0, random.integers(8, 20), 8:20]
            scaled = row.astype(np.float32) / np.float32(127.5) - np.float32(1)
            found += [row.tobytes(), scaled[:5].tobytes(), row.astype(np.float32)[:5].tobytes()]
    for scan in sorted((left.run.parent / f"scans-{MARK}").rglob("*.nii.gz"))[:10]:
        try:
            voxels = np.asarray(nibabel.load(scan).dataobj)
        except Exception:  # noqa: S112  the planted one, which cannot be read
            continue
        middle = voxels[voxels.shape[0] // 2, 10:20, voxels.shape[2] // 2]
        found += [np.ascontiguousarray(middle).tobytes(), middle.astype(np.float32)[:5].tobytes()]
    return [piece for piece in found if len(set(piece)) > 6]


def test_no_row_of_pixels_leaves(left: Left) -> None:
    pieces = pieces_of_images(left, 150)
    assert len(pieces) > 300
    own = b"".join(np.load(path).tobytes() for path in left.run.glob("sites/*/prepared/*/*.npy"))
    assert sum(piece in own for piece in pieces) > 100  # the search finds what is there
    public = b"".join(left.public.values())
    assert [piece for piece in pieces if piece in left.sent or piece in public] == []
