"""Verdicts made by hand, in signed files beside a run."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.audit.plan import make_audit_plan
from common.audit.verdict import Tail, Verdict
from common.config import StudyConfig
from server import record
from server.audit import AUDIT_FILE, sign_facts
from server.record import AuditsRecord, RunRecord
from tests.server.report.runs import make_run, save

GENERATOR, ROOT, ROSTER = "c4" * 32, "a7" * 32, "ab" * 32


def passed(**changes: Any) -> Verdict:
    """A clean release: 480 patients trained on, 120 held out, three bins."""
    figures: dict[str, Any] = {
        "outcome": "PASS",
        "reasons": ("Nobody is nearer than chance.", "At most 12 were memorised."),
        "p": 0.34,
        "upper_bound": 11.2,
        "upper_bound_edge": 0.25,
        "allowed_memorised": 30,
        "minimum_detectable": 24,
        "power_curve": ((5, 0.1), (20, 0.7), (40, 0.98)),
        "epsilon_lower_canaries": 0.0,
        "epsilon_lower_patients": 1.25,
        "certified_epsilon": 10.0,
        "delta": 1e-5,
        "control_p": 0.61,
        "training_patients": 480,
        "held_out_patients": 120,
        "tails": (
            Tail(edge=-0.1, training=83, held_out=19, expected=76.0, stddev=21.5, z=0.33, class_z=(0.3,)),
            Tail(edge=0.25, training=-3, held_out=1, expected=4.0, stddev=7.25, z=-0.97, class_z=(-1.0,)),
        ),
        "training_cells": (401, 86, -3),
        "held_out_cells": (102, 18, 1),
        "training_cell_stddev": 2.8,
        "held_out_cell_stddev": 0.8,
        "canaries": ((50, 10, 4), (55, 9, 0)),
    }
    return Verdict(**{**figures, **changes})


def failed(**changes: Any) -> Verdict:
    """One with forty patients in it."""
    figures = {
        "outcome": "FAIL",
        "reasons": ("Those trained on are nearer.",),
        "p": 0.00002,
        "upper_bound": 51.4,
        "epsilon_lower_canaries": 12.0,
        "control_p": 0.2,
    }
    return passed(**{**figures, **changes})


def audited(folder: Path, verdict: Verdict, *, private: bool = True, **changes: Any) -> RunRecord:
    """A run with this verdict in ``audit.json``, signed; ``changes`` are other facts in it."""
    run = make_run(("north", "south", "west"), private=private)
    run.run, run.generator_digest = "5e" * 16, GENERATOR
    for site in run.sites:
        site.audits = AuditsRecord(verdicts=1, answered=1, epsilon_training=0.5, epsilon_held_out=2.0)
        record.set_epsilon(site, "prv")
    save(folder, run)
    plan = make_audit_plan(StudyConfig.model_validate(run.study), ROSTER)
    kept = {"dropped": 601, "kept": 1402, "epsilon_one_sided": 1.386, "kept_candidates": list(range(1402))}
    facts = {
        "version": 1,
        "time": "2031-05-06T07:08:09+00:00",
        "run": run.run,
        "study_digest": run.study_digest,
        "private": private,
        "plan": plan.model_dump(mode="json"),
        "plan_digest": plan.digest,
        "generator_digest": GENERATOR,
        "candidates": {"generated": 2041, "audited": 2003, "root": ROOT},
        "verdict": asdict(verdict),
        "filter": kept if verdict.outcome == "PASS" else None,
        "spent": {"training": 0.5, "held_out": 2.0},
        **changes,
    }
    (folder / AUDIT_FILE).write_text(json.dumps(sign_facts(facts, folder)))
    return run
