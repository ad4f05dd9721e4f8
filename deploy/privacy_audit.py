"""``synthward privacy audit``: one step attacked by someone who knows everything but the noise."""

import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from common.config import Algorithm, StudyConfig
from common.errors import ConfigError, PrivacyError
from common.noisy_sums import noise_for
from common.privacy import canary
from common.privacy.canary import Audit, JointSites
from common.privacy.plan import PhasePlan, make_plan
from deploy.runs import EXAMPLES


def audit(study_path: Path | None = None, trials: int = canary.TRIALS, *, as_json: bool = False) -> None:
    """Audit one step of a study on this machine, and print what was found beside what is claimed.

    A step of the first ``local`` phase is audited and one of the first ``joint`` phase, of those that the study has.

    Args:
        study_path: the study; the built-in phantom study when None.
        trials: steps with the canary patients, and as many without.
        as_json: print JSON.

    Raises:
        ConfigError: an invalid study, one without privacy, or one that no canary can audit.
        PrivacyError: a claim is refuted.
    """
    study = StudyConfig.from_toml(study_path or EXAMPLES / "phantom.toml")
    plan = make_plan(study)
    if plan is None:
        raise ConfigError("The study has privacy.enabled = false: it claims nothing to audit.", "Give another study.")
    planned: dict[Algorithm, PhasePlan] = {}
    for phase, phase_plan in zip(study.phases, plan.phases, strict=True):
        planned.setdefault(phase.algorithm, phase_plan)
    planned.pop("moments", None)
    if not planned:
        raise ConfigError("The study has no discriminator's step, which is what is audited.", "Give another study.")
    found = {
        kind: canary.audit(study, phase, trials=trials, joint=_sites(study, phase) if kind == "joint" else None)
        for kind, phase in planned.items()
    }
    if as_json:
        json.dump(to_json(study, found), sys.stdout, indent=2)
        print()
    else:
        for kind, each in found.items():
            _print(study, kind, each)
    refuted = sorted({claim for each in found.values() for claim in each.refuted})
    if refuted:
        raise PrivacyError(
            f"The audit refutes the claimed {' and '.join(refuted)}.",
            "Do not train on patients with this installation; report what was printed.",
        )


def _sites(study: StudyConfig, plan: PhasePlan) -> JointSites:
    """As few sites as a sum of the study is opened for. A study without a contract is audited with one of 100 each."""
    from client.real_half import real_half

    names = [f"site-{number}" for number in range(1, study.federation.minimum_sites + 1)]
    if not study.federation.contracted_patients:
        study = study.with_changes("federation", contracted_patients=dict.fromkeys(names, 100))
    colluding = study.privacy.colluding_sites if study.federation.aggregation == "secure" else 0
    return JointSites(real_half, partial(noise_for, study, plan), study.num_noisy + colluding, colluding)


def to_json(study: StudyConfig, found: Mapping[Algorithm, Audit]) -> dict[str, object]:
    """The audits as plain data: of each kind of step its figures by claim, each claimed and found, and the verdict."""
    return {
        "study": study.name,
        "digest": study.digest,
        "verdict": "refuted" if any(each.refuted for each in found.values()) else "not refuted",
        "confidence": canary.CONFIDENCE,
        "steps": [
            {
                "algorithm": kind,
                "refuted": list(each.refuted),
                "delta": each.delta,
                "claimed": {name: claimed for name, claimed, _ in _rows(each)},
                "at_least": {name: at_least for name, _, at_least in _rows(each)},
                "visible_noise": each.visible_noise,
                "trials": each.trials,
                "false_alarms": each.false_alarms,
                "misses": each.misses,
                "canaries": each.num_canaries,
                "parameters": each.num_parameters,
                "seconds": each.seconds,
            }
            for kind, each in found.items()
        ],
    }


def _rows(found: Audit) -> tuple[tuple[str, float, float], ...]:
    return (
        ("inverse_noise_multiplier", found.inverse_noise_claimed, found.inverse_noise_found),
        ("epsilon_of_a_step", found.epsilon_claimed, found.epsilon_found),
        ("sampling_probability", found.sampling_probability, found.sampling_found),
        ("movement_over_clip_norm", 1.0, found.movement),
    )


def _print(study: StudyConfig, kind: Algorithm, found: Audit) -> None:
    print(f"study {study.name}: one {kind} step, {found.trials} times with {found.num_canaries} canaries and without,")
    print(f"on the smallest network of its family ({found.num_parameters} parameters), noise of the operating system")
    print(f"{'':28}{'claimed':>10}{'at least':>10}")
    for name, claimed, at_least in _rows(found):
        print(f"{name:28}{claimed:10.4f}{at_least:10.4f}")
    print(f"epsilon is at delta {found.delta:g}, of one step for one drawn patient; confidence {canary.CONFIDENCE:.1%}")
    verdict = f"REFUTED: {', '.join(found.refuted)}" if found.refuted else "not refuted"
    print(
        f"{verdict}; noise below {found.visible_noise:.0%} of the claimed one would show; {found.seconds:.0f} seconds"
    )
