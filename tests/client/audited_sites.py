"""A small site with phantom patients, held-out ones and canaries, and an honest server's request for an audit."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from client.audit import SiteAudit
from client.data.canaries import Canaries
from client.data.slices import PreparedCohort
from common.audit.plan import make_audit_plan
from common.config import StudyConfig
from common.gan import networks
from common.messages import AuditRequest
from common.phantom import brain
from server.candidates import Candidates, make_candidates
from tests.client.sites import KEY, account_in, study_of

ROSTER = "ab" * 32
SITES = {"north": 40, "south": 40, "west": 40}


def audited_study(**tables: dict[str, Any]) -> StudyConfig:
    """Three sites, a thousand candidates."""
    audit = {"candidates": 1000, "canaries": 8, **tables.pop("audit", {})}
    federation = {"contracted_patients": SITES, "minimum_sites": 3, **tables.pop("federation", {})}
    return study_of(federation=federation, audit=audit, gan={"latent_size": 16}, **tables)


def phantoms(count: int, seed: int, size: int = 28) -> np.ndarray:
    """(count, 1, size, size) uint8 phantom brains."""
    drawn = brain.draw_slices(np.random.default_rng(seed), count, size, lesion=np.zeros(count, bool))
    return np.asarray(np.clip((drawn + 1) * 127.5, 0, 255), np.uint8)


def patients_of(images: np.ndarray, name: str) -> PreparedCohort:
    """Each image is a patient of its own."""
    count = len(images)
    names = tuple(f"{name} {number}" for number in range(count))
    return PreparedCohort(images, np.zeros(count, np.int64), names, np.arange(count + 1), ())


def generator_of(study: StudyConfig, seed: int = 0) -> np.ndarray:
    """A generator that was trained on nothing."""
    count = networks.num_parameters(networks.build_generator, study)
    return np.random.default_rng(seed).normal(0, 0.3, count).astype(np.float32)


@functools.cache
def candidates_of(study_json: str) -> Candidates:
    """An honest server's candidates; slow, so once a study."""
    study = StudyConfig.model_validate_json(study_json)
    return make_candidates(study, generator_of(study))


def request_of(study: StudyConfig) -> AuditRequest:
    """What an honest server asks."""
    candidates = candidates_of(study.model_dump_json())
    return AuditRequest(
        study.digest,
        study.audit_round,
        make_audit_plan(study, ROSTER).digest,
        generator_of(study),
        candidates.kept.indices,
        candidates.kept.images.ravel(),
        candidates.nearest,
    )


def site_audit(folder: Path, study: StudyConfig | None = None, **changes: Any) -> SiteAudit:
    """A site that was shown the plan before training."""
    study = study or audited_study()
    training, held_out = patients_of(phantoms(24, 1), "trained"), patients_of(phantoms(8, 2), "held out")
    canaries = Canaries(phantoms(2, 3), np.arange(3), np.zeros(2, np.int64), np.array([True, False]))
    account = account_in(folder, study, training.patient_ids)
    at = SiteAudit(study, "north", folder, make_audit_plan(study, ROSTER), training, held_out, canaries, KEY, account)
    return replace(at, **changes)
