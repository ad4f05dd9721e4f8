"""``synthward privacy audit``: one step attacked by someone who knows everything but the noise."""

import json
import sys
from pathlib import Path

from common.config import StudyConfig
from common.errors import ConfigError, PrivacyError
from common.privacy import canary
from common.privacy.canary import Audit
from common.privacy.plan import make_plan
from deploy.runs import EXAMPLES


def audit(study_path: Path | None = None, trials: int = canary.TRIALS, *, as_json: bool = False) -> None:
    """Audit one step of a study on this machine, and print what was found beside what is claimed.

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
    stepped = [planned for phase, planned in zip(study.phases, plan.phases, strict=True) if phase.algorithm != "moments"]
    if not stepped:
        raise ConfigError("The study has no discriminator's step, which is what is audited.", "Give another study.")
    found = canary.audit(study, stepped[0], trials=trials)
    if as_json:
        json.dump(to_json(study, found), sys.stdout, indent=2)
        print()
    else:
        _print(study, found)
    if found.refuted:
        raise PrivacyError(
            f"The audit refutes the claimed {' and '.join(found.refuted)}.",
            "Do not train on patients with this installation; report what was printed.",
        )


def to_json(study: StudyConfig, found: Audit) -> dict[str, object]:
    """The audit as plain data: figures by claim, each claimed and found, and the verdict."""
    return {
        "study": study.name,
        "digest": study.digest,
        "verdict": "refuted" if found.refuted else "not refuted",
        "refuted": list(found.refuted),
        "confidence": canary.CONFIDENCE,
        "delta": found.delta,
        "claimed": {name: claimed for name, claimed, _ in _rows(found)},
        "at_least": {name: at_least for name, _, at_least in _rows(found)},
        "visible_noise": found.visible_noise,
        "trials": found.trials,
        "false_alarms": found.false_alarms,
        "misses": found.misses,
        "canaries": found.num_canaries,
        "parameters": found.num_parameters,
        "seconds": found.seconds,
    }


def _rows(found: Audit) -> tuple[tuple[str, float, float], ...]:
    return (
        ("inverse_noise_multiplier", found.inverse_noise_claimed, found.inverse_noise_found),
        ("epsilon_of_a_step", found.epsilon_claimed, found.epsilon_found),
        ("sampling_probability", found.sampling_probability, found.sampling_found),
        ("movement_over_clip_norm", 1.0, found.movement),
    )


def _print(study: StudyConfig, found: Audit) -> None:
    print(f"study {study.name}: one step, {found.trials} times with {found.num_canaries} canary patients and without,")
    print(f"on the smallest network of its family ({found.num_parameters} parameters), noise of the operating system")
    print(f"{'':28}{'claimed':>10}{'at least':>10}")
    for name, claimed, at_least in _rows(found):
        print(f"{name:28}{claimed:10.4f}{at_least:10.4f}")
    print(f"epsilon is at delta {found.delta:g}, of one step for one drawn patient; confidence {canary.CONFIDENCE:.1%}")
    verdict = f"REFUTED: {', '.join(found.refuted)}" if found.refuted else "not refuted"
    print(
        f"{verdict}; noise below {found.visible_noise:.0%} of the claimed one would show; {found.seconds:.0f} seconds"
    )
