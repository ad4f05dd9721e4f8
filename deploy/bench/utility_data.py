"""The data of the utility benchmark: patients divided over sites, and others that nobody trains on.

Phantoms are drawn here; the rest is read from where the user says.

| data | what is given | sites | label | test |
|---|---|---|---|---|
| phantoms | nothing | five looks in turn over the patients, dealt over the sites | lesion | 2000 others, a slice each |
| mnist, fashion-mnist | an npz with x_train, y_train, x_test, y_test | dealt | class | the test set |
| chest | a folder, each subfolder a site: pictures with a table | the subfolders | opacity: any finding | held out |
| t1 | an npz with x, z, site, subject: one axial slice each | as said | none: only one site knows any | held out |
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.data.inventory import take_inventory
from client.data.records import read_image
from client.data.slices import PreparedCohort, prepare_image
from common.config import holdout_share
from common.errors import ConfigError
from common.orientation import SLICE_RANGE
from common.phantom import brain
from deploy.bench.measures import Images, Labels
from deploy.bench.utility_cells import BASES, CHEST, FASHION, MEASURES_VERSION, MNIST, PHANTOMS, T1, Cell
from deploy.bench.utility_instrument import Instrument, Lesson, kept_instrument

NUM_LOOKS = 5
SLICES_A_PATIENT = 6
NUM_TEST, NUM_OTHERS = 2000, 8000
NO_FINDING = "No Finding"
_CHUNK = 250

Facts = NDArray[np.float32]
TEST_SEED, OTHERS_SEED, TRAINING_SEED = 1, 2, 3
NUM_LESSONS, LESSON_LOOKS, LESSON_SEED = 32_000, 40, 50  # of the phantoms that the measuring instrument learns from


@dataclass(frozen=True)
class Data:
    """What one cell trains and is measured on.

    Args:
        sites: prepared training patients, by the site's name. Empty for a reference.
        test: images of patients nobody trains on, (count, 1, size, size) in [-1, 1].
        test_labels: (count,).
        others: images of real patients other than those of the test; for data of fixed size, the training patients.
        other_labels: (count,).
        other_facts: what a measuring instrument learns to read off ``others``: (count, facts). Of phantoms none.
    """

    sites: dict[str, PreparedCohort]
    test: Images
    test_labels: Labels
    others: Images
    other_labels: Labels
    other_facts: Facts


@dataclass(frozen=True)
class Patients:
    """Images of some patients: uint8 (count, 1, size, size), their labels, where each patient's images start, and what
    else is known of each image: (count, facts)."""

    images: NDArray[np.uint8]
    labels: Labels
    starts: NDArray[np.int64]
    facts: Facts

    def take(self, chosen: Sequence[int]) -> "Patients":
        """Only these patients, in this order."""
        rows = [np.arange(self.starts[patient], self.starts[patient + 1]) for patient in chosen]
        joined = np.concatenate(rows) if rows else np.zeros(0, np.int64)
        starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        return Patients(self.images[joined], self.labels[joined], starts, self.facts[joined])

    @property
    def count(self) -> int:
        """How many patients."""
        return len(self.starts) - 1

    def cohort(self) -> PreparedCohort:
        """As a site holds them."""
        ids = tuple(str(patient) for patient in range(self.count))
        return PreparedCohort(self.images, self.labels, ids, self.starts, ())


def load(cell: Cell, path: Path | None) -> Data:
    """The data of a cell.

    Args:
        cell: the cell.
        path: where its data set is; None for phantoms.

    Raises:
        ConfigError: the data set is not at the path.
    """
    size = int(BASES[cell.data]["image"]["size"])
    try:
        match cell.data, path:
            case "phantoms", _:
                return _phantoms(cell, size)
            case "mnist" | "fashion-mnist", Path():
                return _records(cell, path)
            case "chest", Path():
                return _real(cell, {name: site for name, site in _chest(path, size).items()})
            case "t1", Path():
                return _real(cell, _slices(path, size))
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(f"{path} does not hold {cell.data}: {error!r}.", "Give its place with --data.") from error
    raise ConfigError(f"There is no place of {cell.data}.", f"Give --data {cell.data}=PATH.")


def needs_path(cell: Cell) -> bool:
    """Whether the cell's data set is read from a place that the user has to name."""
    return cell.data in (MNIST, FASHION, CHEST, T1)


def draw_patients(count: int, seed: int, slices: int, size: int) -> Patients:
    """Phantom patients of five hospitals in turn; half of them have a lesion.

    Args:
        count: patients; patient i has the look of hospital i modulo 5, so that any part of them dealt in turn over
            1, 5 or 10 sites is the same population.
        seed: of all that differs between patients.
        slices: of each patient, at random heights.
        size: pixels along each side.
    """
    looks = [brain.site_look(number + 1) for number in range(NUM_LOOKS)]
    scales = np.array([brain.percentiles(look) for look in looks])
    rng = np.random.default_rng([seed, 0])
    lesion = rng.permutation(np.arange(count) % 2).astype(bool)
    images = np.empty((count, slices, size, size), np.uint8)
    for start in range(0, count, _CHUNK):
        ill = lesion[start : start + _CHUNK]
        rng = np.random.default_rng([seed, 1, start])
        owner = (start + np.arange(len(ill))) % NUM_LOOKS
        anatomies = brain.draw_anatomies(rng, lesion=ill)
        low, high = scales[owner].T[:, :, None, None]
        for number in range(slices):
            heights = rng.uniform(*SLICE_RANGE, size=len(ill))
            planes = brain.render_slices(anatomies, [looks[k] for k in owner], heights, size, rng=rng)
            images[start : start + len(ill), number] = np.clip((planes - low) / (high - low), 0, 1) * 255
    labels, starts = np.repeat(lesion.astype(np.int64), slices), np.arange(count + 1, dtype=np.int64) * slices
    return Patients(images.reshape(-1, 1, size, size), labels, starts, _none_of(labels))


def draw_lesson(count: int, seed: int, size: int) -> Lesson:
    """Phantoms of 40 hospitals, the five of ``draw_patients`` among them, and what one image can show of each.

    Args:
        count: images, each of another patient.
        seed: of all that differs between them.
        size: pixels along each side.
    """
    looks = [brain.site_look(number + 1) for number in range(LESSON_LOOKS)]
    scales = np.array([brain.percentiles(look) for look in looks])
    contrasts = np.array(
        [
            [look.gm / look.wm, look.csf / look.wm, look.fat / look.wm, look.noise_stddev, look.field_of_view_mm[0]]
            for look in looks
        ]
    )
    images = np.empty((count, 1, size, size), np.float32)
    facts = []
    for start in range(0, count, _CHUNK):
        rng = np.random.default_rng([seed, start])
        number = min(_CHUNK, count - start)
        ill, owner = rng.integers(2, size=number).astype(bool), rng.integers(LESSON_LOOKS, size=number)
        anatomies, heights = brain.draw_anatomies(rng, lesion=ill), rng.uniform(*SLICE_RANGE, size=number)
        planes = brain.render_slices(anatomies, [looks[k] for k in owner], heights, size, rng=rng)
        low, high = scales[owner].T[:, :, None, None]
        images[start : start + number, 0] = 2 * np.clip((planes - low) / (high - low), 0, 1) - 1
        known = (
            heights,
            anatomies.rotation[:, 0, 1],
            anatomies.scale[:, :2],
            anatomies.offset_mm[:, :2],
            np.log(anatomies.ventricles[:, 0]),
            anatomies.scalp_mm,
            ill,
            ill * anatomies.lesion_centre_mm[:, 0],
            ill * (2 * anatomies.lesion_bright - 1),
            contrasts[owner],
        )
        facts.append(np.column_stack(known).astype(np.float32))
    return Lesson(images, np.concatenate(facts))


def instrument_for(cell: Cell, data: Data, folder: Path) -> Instrument:
    """What measures the cell by facts that it learned to read off images other than the test's.

    Args:
        cell: the cell.
        data: the cell's.
        folder: of the results, where instruments are kept.
    """
    size, phantoms = data.test.shape[-1], cell.data == PHANTOMS
    split = f",seed={cell.seed}" if cell.table == "real" else ""  # the others' lessons are the same for all seeds

    def lesson() -> Lesson:
        return draw_lesson(NUM_LESSONS, LESSON_SEED, size) if phantoms else Lesson(data.others, data.other_facts)

    return kept_instrument(folder, f"{cell.data}{split},v{MEASURES_VERSION}", size, lesson)


def to_floats(images: NDArray[np.uint8]) -> Images:
    """0..255 to [-1, 1]."""
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1)


@lru_cache(maxsize=3)
def _drawn(count: int, seed: int, slices: int, size: int) -> Patients:
    return draw_patients(count, seed, slices, size)


def _phantoms(cell: Cell, size: int) -> Data:
    test, others = _drawn(NUM_TEST, TEST_SEED, 1, size), _drawn(NUM_OTHERS, OTHERS_SEED, 1, size)
    sites = {}
    if not cell.is_reference:
        everyone = _drawn(cell.patients, TRAINING_SEED + cell.seed, SLICES_A_PATIENT, size)
        sites = _deal(everyone, cell.sites)
    return Data(sites, to_floats(test.images), test.labels, to_floats(others.images), others.labels, others.facts)


@lru_cache(maxsize=1)
def _archive(path: Path) -> dict[str, NDArray[np.generic]]:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}  # each access decompresses


def _records(cell: Cell, path: Path) -> Data:
    """One record a patient, dealt over the sites."""
    archive = _archive(path)
    images, test = (archive[name].astype(np.uint8)[:, None] for name in ("x_train", "x_test"))
    labels, test_labels = (archive[name].astype(np.int64) for name in ("y_train", "y_test"))
    everyone = Patients(images, labels, np.arange(len(images) + 1, dtype=np.int64), _one_hot(labels))
    chosen = np.random.default_rng([TRAINING_SEED, cell.seed]).permutation(len(images))
    sites = {} if cell.is_reference else _deal(everyone.take(chosen.tolist()), cell.sites)
    return Data(sites, to_floats(test), test_labels, to_floats(images), labels, everyone.facts)


def _real(cell: Cell, hospitals: dict[str, Patients]) -> Data:
    """Each hospital holds out as many of its patients as a study would; who, the seed says."""
    training, held_out = {}, []
    for number, (name, patients) in enumerate(sorted(hospitals.items())):
        order = np.random.default_rng([TRAINING_SEED, cell.seed, number]).permutation(patients.count).tolist()
        count = round(holdout_share(patients.count) * patients.count)
        held_out.append(patients.take(order[:count]))
        training[name] = patients.take(order[count:])
    test, others = _joined(held_out), _joined(list(training.values()))
    site = np.repeat(np.arange(len(training)), [len(patients.images) for patients in training.values()])
    facts = np.column_stack([others.facts, _one_hot(site)])
    sites = {} if cell.is_reference else {name: patients.cohort() for name, patients in training.items()}
    return Data(sites, to_floats(test.images), test.labels, to_floats(others.images), others.labels, facts)


@lru_cache(maxsize=1)
def _chest(folder: Path, size: int) -> dict[str, Patients]:
    """Pictures with a table in each subfolder, read as a site reads them."""
    return {site.name: _pictures(site, size) for site in sorted(folder.iterdir()) if site.is_dir()}


def _pictures(folder: Path, size: int) -> Patients:
    inventory = take_inventory(folder, label_column="label")
    images, labels, starts = [], [], [0]
    for patient in inventory.patients:
        for record in inventory.records:
            if record.patient_id == patient:
                image, _ = read_image(record.files, record.kind, record.format)
                images += prepare_image(image, size)
                labels.append(int(record.label != NO_FINDING))
        starts.append(len(images))
    ill = np.array(labels, np.int64)
    return Patients(np.stack(images)[:, None], ill, np.array(starts, np.int64), ill[:, None].astype(np.float32))


@lru_cache(maxsize=1)
def _slices(path: Path, size: int) -> dict[str, Patients]:
    """Slices of whole subjects, of each site; averaged down to the study's size."""
    archive = _archive(path)
    sites, subjects = archive["site"], archive["subject"]
    factor = archive["x"].shape[1] // size
    blocks = archive["x"].astype(np.float32).reshape(-1, size, factor, size, factor)
    small = np.round(blocks.mean(axis=(2, 4))).astype(np.uint8)[:, None]
    hospitals = {}
    for site in np.unique(sites).tolist():
        rows = [np.flatnonzero((sites == site) & (subjects == one)) for one in np.unique(subjects[sites == site])]
        joined, starts = np.concatenate(rows), np.cumsum([0, *map(len, rows)], dtype=np.int64)
        heights = archive["z"][joined].astype(np.float32)[:, None]
        hospitals[site] = Patients(small[joined], np.zeros(len(joined), np.int64), starts, heights)
    return hospitals


def _deal(everyone: Patients, sites: int) -> dict[str, PreparedCohort]:
    """Patient i to site i modulo the number of sites."""
    dealt = {f"site-{number + 1}": range(number, everyone.count, sites) for number in range(sites)}
    return {name: everyone.take(chosen).cohort() for name, chosen in dealt.items()}


def _joined(groups: list[Patients]) -> Patients:
    lengths = np.concatenate([np.diff(group.starts) for group in groups])
    return Patients(
        np.concatenate([group.images for group in groups]),
        np.concatenate([group.labels for group in groups]),
        np.cumsum([0, *lengths], dtype=np.int64),
        np.concatenate([group.facts for group in groups]),
    )


def _one_hot(classes: NDArray[np.int64]) -> Facts:
    return np.eye(int(classes.max()) + 1, dtype=np.float32)[classes]


def _none_of(labels: Labels) -> Facts:
    return np.zeros((len(labels), 0), np.float32)
