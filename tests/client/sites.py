"""A small site in memory: bright and dark patients, a study of three rounds."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from client import ledger, ledger_lines
from client.accountant import SiteAccountant
from client.data import cohort as cohort_module
from client.data.slices import PreparedCohort
from client.decision import whole_cost
from client.training import SiteStudy
from common.config import StudyConfig
from common.gan.networks import build_discriminator, build_generator, num_parameters
from common.messages import TrainRequest
from common.privacy.accounting import Budget, History
from common.privacy.plan import make_plan

IMAGES = (1, 4, 2, 9, 1, 3, 2, 1)  # of each patient


def study_of(**tables: dict[str, Any]) -> StudyConfig:
    """Two steps a round, three rounds, unless there are phases; q = 1 keeps the calibration quick."""
    tree: dict[str, dict[str, Any]] = {
        "image": {"size": 28},
        "gan": {
            "latent_size": 4,
            "generator_width": 4,
            "discriminator_width": 4,
            "generator_batch_size": 4,
            "generator_learning_rate": 2e-4,
            "discriminator_learning_rate": 2e-4,
            "discriminator_steps_per_generator_step": 1,
        },
        "privacy": {"epsilon": 5.0, "sampling_probability": 1.0, "images_per_patient": 3},
        "federation": {
            "rounds": 3,
            "local_steps": 2,
            "minimum_patients": 1,
            "contracted_patients": {"north": 11, "south": 11},
        },
    }
    for name, changes in tables.items():
        tree[name] = {**tree.get(name, {}), **changes}
    if "phase" in tree["federation"]:
        del tree["federation"]["rounds"], tree["federation"]["local_steps"]
    return StudyConfig.model_validate(tree)


def cohort_of(counts: tuple[int, ...] = IMAGES, size: int = 28) -> PreparedCohort:
    """Every pixel of patient i is 20 i + 10, so that whose image it is can be read."""
    owner = np.repeat(np.arange(len(counts)), counts)
    images = np.broadcast_to((20 * owner + 10).astype(np.uint8)[:, None, None, None], (len(owner), 1, size, size))
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    names = tuple(f"patient-{index}" for index in range(len(counts)))
    return PreparedCohort(images, np.zeros(len(owner), np.int64), names, starts, ())


KEY = bytes(range(32))
"""Of the ledgers that tests make for themselves."""


def site_of(folder: Path, study: StudyConfig | None = None, cohort: PreparedCohort | None = None) -> SiteStudy:
    """Train in ``folder``, which holds the site's ledger too; the empty path is for what neither trains nor charges."""
    study, cohort = study or study_of(), cohort or cohort_of()
    accountant = account_in(folder, study, cohort.patient_ids) if folder != Path() else None
    return SiteStudy(study, "north", folder, cohort, 8, "cpu", accountant)


HELD_OUT = ("held out 1", "held out 2")
"""Patients of every site of tests whom no study trains on."""


def account_in(
    folder: Path, study: StudyConfig, patients: Iterable[str] = ("a", "b"), budget: Budget | None = None
) -> SiteAccountant | None:
    """The study's account in the ledger of this folder, which is made when there is none.

    Its budget is what the study and all verdicts of its audit cost.
    """
    plan = make_plan(study)
    if plan is None:
        return None
    if not (folder / ledger.FILE_NAME).exists():
        ledger.create(folder)
    budget = budget or Budget(whole_cost(study), study.privacy.delta)
    book = ledger.Ledger(folder, KEY)
    training, held_out = (ledger_lines.data_set_of(KEY, folder / "images", names) for names in (patients, HELD_OUT))
    return SiteAccountant(book, training, budget, study, "run", plan, held_out)


def charged_in(folder: Path, study: StudyConfig) -> History:
    """What the study has charged in the ledger of this folder; nothing when there is no ledger."""
    if not (folder / ledger.FILE_NAME).exists():
        return ()
    key = ledger_key_of(folder) if (folder / cohort_module.KEY_NAME).exists() else KEY
    return ledger.Ledger(folder, key).read().of_study(study.digest)


def ledger_key_of(folder: Path) -> bytes:
    """The key of a real site's ledger."""
    return ledger_lines.ledger_key(cohort_module.holdout_key(folder))


def request_of(study: StudyConfig, round_number: int = 1, seed: int = 0) -> TrainRequest:
    """Ask for a round from a random shared state."""
    random = np.random.default_rng(seed)
    vectors = [
        (0.1 * random.normal(size=num_parameters(build, study))).astype(np.float32)
        for build in (build_generator, build_discriminator)
    ]
    return TrainRequest(study.digest, round_number, *vectors)
