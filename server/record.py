"""What a run leaves for people and programs: ``run.json`` (the whole run) and ``metrics.jsonl`` (a line a round)."""

import importlib.metadata
import json
import platform
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from common.config import StudyConfig
from common.errors import ConfigError
from common.files import write_atomically
from common.privacy import accounting
from common.privacy.accounting import History, Mechanism, PureRelease
from common.privacy.plan import PrivacyPlan

RUN_FILE, METRICS_FILE = "run.json", "metrics.jsonl"
SCHEMA_VERSION = 2


class Record(BaseModel):
    """A part of the run's record."""

    model_config = ConfigDict(extra="forbid")


class MechanismRecord(Record):
    """Equal mechanisms, how many."""

    sampling_probability: float
    noise_multiplier: float
    steps: int


class PureRecord(Record):
    """Equal pure releases (verdicts of an audit), how many."""

    epsilon: float
    steps: int


class PhaseRecord(Record):
    """A phase as it was planned: ``steps`` in each of its rounds; the noise is None without privacy."""

    algorithm: str
    share: float
    rounds: int
    steps: int
    sampling_probability: float | None
    noise_multiplier: float | None
    clip_norm: float | None


class BudgetRecord(Record):
    """The most that a site's policy allows for any of its patients, and what is spent of it, all studies together.

    The spent figures are epsilons at the budget's ``delta`` of patients that are trained on: of what other studies had
    charged when the site enrolled, of this study with its audit, and of both together.
    """

    epsilon: float
    delta: float
    spent_before: float = 0.0
    spent_here: float = 0.0
    spent_after: float = 0.0


class AuditsRecord(Record):
    """What the audit's verdicts cost the patients of a site. Each patient pays one of the two, and never both.

    ``verdicts`` is how many the site is charged for, ``answered`` how many of them it has answered. A verdict costs a
    patient that is trained on ``epsilon_training`` and one that is held out ``epsilon_held_out``, without a delta.
    ``spent_training`` is what the former have spent with the training together, ``spent_held_out`` what the latter
    have, both at the site's ``delta``.
    """

    verdicts: int
    answered: int = 0
    epsilon_training: float
    epsilon_held_out: float
    spent_training: float = 0.0
    spent_held_out: float = 0.0


class SiteRecord(Record):
    """One site's part. Patients are contracted sizes, public; nothing here depends on an image.

    ``epsilon`` is of this study's training alone, None when it is not private, and None in JSON must be read as
    unbounded. ``mechanisms`` is what the site is charged for training in this study, ``audits`` what for its audit
    (None before one), ``earlier`` what other studies charged patients that they trained on.
    """

    name: str
    epsilon: float | None
    delta: float | None
    accountant: Literal["prv", "rdp", "none"]
    mechanisms: list[MechanismRecord] = Field(default_factory=list)
    earlier: list[MechanismRecord | PureRecord] = Field(default_factory=list)
    audits: AuditsRecord | None = None
    budget: BudgetRecord | None = None
    rounds: list[int] = Field(default_factory=list)
    refusals: dict[str, int] = Field(default_factory=dict)
    patients_trained: int
    patients_held_out: int
    holdout_commitment: str
    record_is_patient: bool


class WarmStartRecord(Record):
    """Where both networks began."""

    source: str
    digest: str
    seconds: float
    from_cache: bool


class RunRecord(Record):
    """``run.json``. Times are UTC; ``finished`` is None while the run goes on. The sites' ledgers name ``run``: random.

    ``generator_digest`` is of the final generator (``common/audit/candidates.py``), "" before the run is completed.
    ``phases_chosen`` says why these phases, where the study left the choice to Synthward.
    ``refused_sites`` has the code of each site that takes no part, by name; ``refused_nodes`` those of sites that
    refused before they gave a name.
    """

    schema_version: Literal[2] = 2
    status: Literal["running", "completed", "interrupted", "failed"] = "running"
    error: str = ""
    run: str = ""
    started: str = ""
    finished: str | None = None
    study: dict[str, Any]
    study_digest: str
    private: bool
    notice: str
    versions: dict[str, str]
    device: str
    aggregation: str
    rounds_completed: int = 0
    generator_digest: str = ""
    phases: list[PhaseRecord] = Field(default_factory=list)
    phases_chosen: str = ""
    warm_start: WarmStartRecord | None = None
    sites: list[SiteRecord] = Field(default_factory=list)
    refused_sites: dict[str, str] = Field(default_factory=dict)
    refused_nodes: list[str] = Field(default_factory=list)
    seconds: dict[str, float] = Field(default_factory=dict)

    def site(self, name: str) -> SiteRecord:
        """The record of a site that enrolled."""
        return next(site for site in self.sites if site.name == name)

    def save(self, folder: Path) -> None:
        """Write ``run.json`` atomically."""
        write_atomically(folder / RUN_FILE, (self.model_dump_json(indent=2) + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> "RunRecord":
        """Read ``run.json``. Raises ConfigError when it is missing or of another schema."""
        try:
            return cls.model_validate_json((folder / RUN_FILE).read_bytes())
        except (OSError, ValueError):
            raise ConfigError(
                f"Expected a run of schema version {SCHEMA_VERSION} in {folder}, found no readable {RUN_FILE}.",
                "Give the folder that --out of `synthward simulate` named.",
            ) from None


def notice(study: StudyConfig, record_is_patient: bool) -> str:
    """The sentence that goes beside everything a run makes."""
    if not study.privacy.enabled:
        return "NOT PRIVATE: trained without differential privacy. For public data only."
    unit = "one record (image): the data had no patient ids" if record_is_patient else "one patient"
    return f"Trained with differential privacy; the privacy unit is {unit}."


def phases(study: StudyConfig, plan: PrivacyPlan | None) -> list[PhaseRecord]:
    """The study's phases with what the plan makes of them."""
    planned = plan.phases if plan else [None] * len(study.phases)
    return [
        PhaseRecord(
            **phase.model_dump(),
            sampling_probability=found.mechanism.sampling_probability if found else None,
            noise_multiplier=found.mechanism.noise_multiplier if found else None,
            clip_norm=found.clip_norm if found else None,
        )
        for phase, found in zip(study.phases, planned, strict=True)
    ]


def mechanisms(history: History) -> list[MechanismRecord]:
    """What a history has cost in training, as it stands in ``run.json``."""
    return [
        MechanismRecord(sampling_probability=m.sampling_probability, noise_multiplier=m.noise_multiplier, steps=m.steps)
        for m in accounting.of_training(history)
    ]


def entries(history: History) -> list[MechanismRecord | PureRecord]:
    """All of a history as it stands in ``run.json``, training before audits."""
    audits = accounting.of_audits(history)
    return [*mechanisms(history), *(PureRecord(epsilon=each.epsilon, steps=each.steps) for each in audits)]


def history(site: SiteRecord) -> History:
    """What a site is charged for training in this study, to compute with."""
    return _history(site.mechanisms)


def charged(site: SiteRecord) -> History:
    """What patients that are trained on are charged in this study: training and audit."""
    audits = site.audits
    verdicts = (PureRelease(audits.epsilon_training, audits.verdicts),) if audits and audits.verdicts else ()
    return (*history(site), *verdicts)


def _history(records: Iterable[MechanismRecord | PureRecord]) -> History:
    return tuple(
        PureRelease(each.epsilon, each.steps)
        if isinstance(each, PureRecord)
        else Mechanism(each.sampling_probability, each.noise_multiplier, each.steps)
        for each in records
    )


def set_epsilon(site: SiteRecord, accountant: Literal["prv", "rdp"]) -> None:
    """Fill in the site's epsilons: RDP while the run goes on, PRV for the figures that stay."""
    compute = accounting.epsilon if accountant == "prv" else accounting.rdp_epsilon
    if site.delta is not None:
        site.epsilon, site.accountant = compute(history(site), site.delta), accountant
        if site.audits is not None and site.audits.verdicts:
            held_out = (PureRelease(site.audits.epsilon_held_out, site.audits.verdicts),)
            site.audits.spent_training = compute(charged(site), site.delta)
            site.audits.spent_held_out = compute(held_out, site.delta)
    if site.budget is not None:
        earlier, delta = _history(site.earlier), site.budget.delta
        site.budget.spent_before = compute(earlier, delta)
        site.budget.spent_here = compute(charged(site), delta)
        site.budget.spent_after = compute((*earlier, *charged(site)), delta)


def append_metrics(folder: Path, line: dict[str, Any]) -> None:
    """Add one JSON line to ``metrics.jsonl``, in place of an incomplete last one (the run was killed in the middle)."""
    path = folder / METRICS_FILE
    with path.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write((json.dumps(line) + "\n").encode())


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All complete lines of ``metrics.jsonl``; a round that was run twice after a resume counts once, the last time."""
    path = folder / METRICS_FILE
    if not path.exists():
        return []
    complete = path.read_bytes().split(b"\n")[:-1]
    lines = [json.loads(text) for text in complete if text.strip()]
    return [line for _, line in sorted({line["round"]: line for line in lines}.items())]


def now() -> str:
    """The time of day in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of what computed the run."""
    packages = ("synthward", "torch", "opacus", "flwr", "numpy")
    return {"python": platform.python_version(), **{name: _version(name) for name in packages}}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # inside Flower's bundle Synthward is files, not a package
        return "bundle"
