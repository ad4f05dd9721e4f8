"""The cells of the utility benchmark, and the study that each of them runs."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from common.config import StudyConfig, holdout_share

Table = Literal["phantoms", "records", "real"]
TABLES: tuple[Table, ...] = ("phantoms", "records", "real")

OTHERS = "other patients"
WARM_START = "warm start"
LOCAL, JOINT, MOMENTS, BOTH = "local", "joint", "moments", "moments + joint"
NOT_PRIVATE = "without privacy"
ALGORITHMS = (OTHERS, WARM_START, LOCAL, JOINT, MOMENTS, BOTH, NOT_PRIVATE)
PRIVATE = (LOCAL, JOINT, MOMENTS, BOTH)

PHANTOMS, MNIST, FASHION, CHEST, T1 = "phantoms", "mnist", "fashion-mnist", "chest", "t1"
MEASURES_VERSION = 2
"""Raise this when a measure, the data or the settings below change in a way that the study does not show."""


@dataclass(frozen=True)
class Cell:
    """One run of one algorithm, and its measures.

    Args:
        table: which of the three tables it belongs to.
        data: the data set.
        patients: in training at all sites together; 0 where no patient is trained on, and for data of fixed size.
        epsilon: of the whole study; None without privacy and where no patient is trained on.
        sites: among which the patients are divided; 0 where no patient is trained on.
        algorithm: one of ``ALGORITHMS``. ``other patients`` are real images that take the place of synthetic ones:
            what the measures say of a perfect generator.
        seed: of initial weights and latents, and of which patients there are. Noise and sampling have no seed.
    """

    table: Table
    data: str
    patients: int
    epsilon: float | None
    sites: int
    algorithm: str
    seed: int

    @property
    def name(self) -> str:
        """Names the cell on the command line and its pictures on disk."""
        epsilon = "none" if self.epsilon is None else f"{self.epsilon:g}"
        algorithm = self.algorithm.replace(" ", "-").replace("-+-", "+")
        return f"{self.data},N={self.patients},eps={epsilon},sites={self.sites},{algorithm},seed={self.seed}"

    @property
    def is_reference(self) -> bool:
        """Whether no patient of the cell's sites is trained on, so that all cells of the data share the figure."""
        return self.algorithm in (OTHERS, WARM_START)


def all_cells(table: Table, seeds: int) -> Iterator[Cell]:
    """The cells of a table, one seed after the other, so that a whole table with one seed is there first."""
    for seed in range(seeds):
        match table:
            case "phantoms":
                yield from _of_data(table, PHANTOMS, seed, (300, 600, 2000, 5000, 20000), (1.0, 3.0, 8.0), (1, 5, 10))
            case "records":
                for data in (MNIST, FASHION):
                    yield from _of_data(table, data, seed, (0,), (1.0, 10.0), (1, 4))
            case "real":
                for data in (CHEST, T1):
                    yield from _of_data(table, data, seed, (0,), (8.0,), (2,))


def study_for(cell: Cell, training_patients: dict[str, int]) -> StudyConfig:
    """The study of a cell.

    Args:
        cell: the cell.
        training_patients: how many each site trains on, by the site's name.
    """
    study = StudyConfig.model_validate(BASES[cell.data] | {"name": "utility", "seed": cell.seed})
    if cell.is_reference:
        return study
    total = sum(training_patients.values())
    sites = len(training_patients)
    smallest = min(training_patients.values())
    phases = _phases(cell)
    with_local = any(phase["algorithm"] == "local" for phase in phases)
    batch = _BATCH[cell.table] * (4 if cell.algorithm == BOTH else 1)
    sampling = min(0.5, batch / (smallest if with_local else total))
    privacy: dict[str, Any] = {"sampling_probability": sampling, "delta": 1e-5 if total <= 5000 else 1e-6}
    privacy |= {"enabled": False} if cell.epsilon is None else {"epsilon": cell.epsilon}
    federation = {
        "phase": phases,
        "minimum_sites": sites,
        "contracted_patients": {site: contract_for(count) for site, count in training_patients.items()},
        # One site has nobody to add its sum to, and makes the whole noise.
        "aggregation": "secure" if sites > 1 else "plain",
    }
    changed = study.with_changes("privacy", **privacy).with_changes("federation", **federation)
    return changed.with_changes("gan", **_STEPS.get(cell.algorithm, {}))


def contract_for(training_patients: int) -> int:
    """The contracted number of patients by which a site trains on this many and holds the rest out.

    Raises:
        ValueError: no contract does: 105 to 119 patients.
    """
    guess = round(training_patients / 0.7)
    for contracted in (guess, guess - 1, guess + 1, *range(round(training_patients / 0.8) - 1, guess)):
        if contracted - round(holdout_share(contracted) * contracted) == training_patients:
            return int(contracted)
    raise ValueError(f"no contract gives {training_patients} training patients")


def recipe(cell: Cell) -> str:
    """Changes with every setting that the cell's figures depend on: a result of another recipe is not of this table.

    It is known before the data are read, so it does not show that other data stand at the same place.
    """
    study = study_for(cell, {f"site-{number + 1}": _nominal(cell) for number in range(cell.sites)})
    facts = study.model_dump(mode="json", exclude={"performance", "audit"})  # no cell is audited, nor has canaries
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return hashlib.sha256(f"{MEASURES_VERSION} {digest}".encode()).hexdigest()[:16]


def to_json(cell: Cell) -> dict[str, Any]:
    """The cell as it stands in the file of results."""
    return asdict(cell)


def _nominal(cell: Cell) -> int:
    """Training patients of a site where their number is known without the data, else some number."""
    return int((cell.patients or 60_000) / cell.sites)


def _of_data(
    table: Table, data: str, seed: int, patients: tuple[int, ...], epsilons: tuple[float, ...], sites: tuple[int, ...]
) -> Iterator[Cell]:
    yield Cell(table, data, 0, None, 0, OTHERS, seed)
    if BASES[data]["gan"].get("warm_start", "none") != "none":
        yield Cell(table, data, 0, None, 0, WARM_START, seed)
    for count in patients:
        for number in sites:
            yield Cell(table, data, count, None, number, NOT_PRIVATE, seed)
            for epsilon in epsilons:
                for algorithm in PRIVATE:
                    yield Cell(table, data, count, epsilon, number, algorithm, seed)


def _phases(cell: Cell) -> list[dict[str, Any]]:
    """What a study of the algorithm does, in the settings that were found good on phantoms."""
    local = {"algorithm": "local", "rounds": 6, "steps": 30}
    joint = {"algorithm": "joint", "rounds": 1, "steps": 300}
    match cell.algorithm:
        case "moments":
            return [{"algorithm": "moments"}]
        case "moments + joint":
            # From 5000 patients at epsilon 8 on, moments alone are as good with half of epsilon as with all of it.
            return [{"algorithm": "moments", "share": 0.9}, joint | {"share": 0.1}]
        case "joint":
            return [joint]
        case "without privacy":
            return [local | {"rounds": 20}]
        case _:
            return [local]


_GAN = {"latent_size": 64, "generator_width": 16, "discriminator_width": 8}
_WARM = _GAN | {"warm_start": "phantom", "warm_start_steps": 800}
_DIGITS = {
    "image": {"size": 28, "label_column": "label", "labels": [str(digit) for digit in range(10)]},
    "gan": _GAN | {"generator_learning_rate": 1e-3, "ema_decay": 0.99},
    "privacy": {"images_per_patient": 1},
}
BASES: dict[str, dict[str, Any]] = {
    PHANTOMS: {
        "image": {"size": 32, "label_column": "group", "labels": ["healthy", "lesion"]},
        "gan": _WARM,
        "privacy": {"images_per_patient": 2},
    },
    MNIST: _DIGITS,
    FASHION: _DIGITS,
    CHEST: {
        "image": {"size": 64, "label_column": "label", "labels": ["clear", "opacity"]},
        "gan": _WARM | {"warm_start_anatomy": "chest"},
        "privacy": {"images_per_patient": 2},
    },
    T1: {
        "image": {"size": 64},
        "gan": _WARM | {"warm_start_anatomy": "skull_stripped_brain"},
        "privacy": {"images_per_patient": 8},
    },
}
_BATCH: dict[Table, int] = {"phantoms": 128, "records": 256, "real": 128}
"""Patients that a step draws on average: at each site (``local``), or at all sites together (``joint``); four times as
many after moments."""
_STEPS: dict[str, dict[str, Any]] = {
    # Measured at 2000 phantom patients, epsilon 8: distance 2.3, against 3.1 at a rate of 2e-4.
    JOINT: {"discriminator_steps_per_generator_step": 1, "generator_learning_rate": 5e-4},
    # After moments, 20000 phantom patients, epsilon 8, a distance of 1.01: seven settings tried once each, none better.
    # This one, with 100 steps of the discriminator alone before, harmed least: 1.04. Rates from 5e-5 gave 1.20 to 1.77.
    BOTH: {"discriminator_steps_per_generator_step": 3, "generator_learning_rate": 2e-5, "ema_decay": 0.98},
}
