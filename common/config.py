"""The study: one TOML file that every party reads the same way.

A study holds public facts only. What changes the guarantee (``[privacy]``, ``[federation]``) stays apart from what
changes speed (``[performance]``); the digest that every message carries covers everything but speed.
"""

import hashlib
import json
import math
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from common.errors import ConfigError
from common.secagg.encoding import MODULUS_BITS, Encoding, check_capacity, fewest_bits
from common.secagg.neighbours import COMPLETE

# Labels and names pass through Flower's run config as "a,b" and "name=count,...": no such signs, no spaces at the ends.
Label = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[^,=\s]([^,=]*[^,=\s])?$")]
LossName = Literal["non_saturating", "hinge", "least_squares"]
Algorithm = Literal["local", "joint", "moments"]
SiteName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


MOST_CANDIDATE_PIXELS = 2**27
AUDIT_SITES = 3
"""An audit's sum is over at least so many sites."""


def start_size(size: int) -> int:
    """The spatial size (4 to 7) from which the generator doubles up to ``size``. Raises ValueError for other sizes."""
    start = size
    while start > 7 and start % 2 == 0:
        start //= 2
    if not (28 <= size <= 128 and 4 <= start <= 7):
        raise ValueError(
            f"size must be 28 to 128 and 4, 5, 6 or 7 times a power of two (28, 32, 40, 48, ...), not {size}"
        )
    return start


def holdout_share(num_patients: int) -> float:
    """Share of a site's patients that is never trained on: 0.2, or 0.3 below 150 (contracted) patients."""
    return 0.3 if num_patients < 150 else 0.2


class Part(BaseModel):
    """A frozen table of the study file. Unknown keys are refused by name; values never appear in error texts."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, allow_inf_nan=False)


class ImageConfig(Part):
    """What an image is: ``channels`` x ``size`` x ``size`` pixels, its label read from the table's ``label_column``."""

    size: int = 64
    channels: Literal[1] = 1
    label_column: str = ""
    labels: tuple[Label, ...] = ()

    @field_validator("labels", mode="before")
    @classmethod
    def _split_labels(cls, value: Any) -> Any:
        # Flower's run config has no lists: there the labels are one string, comma between.
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        start_size(self.size)
        if bool(self.label_column) != bool(self.labels):
            raise ValueError("label_column and labels belong together: give both or neither")
        if len(set(self.labels)) != len(self.labels) or len(self.labels) == 1:
            raise ValueError("labels must be at least two different names")
        return self

    @property
    def num_classes(self) -> int:
        """Number of labels, 1 for a study without labels."""
        return max(1, len(self.labels))


class GanConfig(Part):
    """Architecture and losses. Widths are channels at the finest resolution; they double as resolution halves."""

    family: Literal["dcgan"] = "dcgan"
    loss: LossName = "non_saturating"
    latent_size: int = Field(64, ge=1, le=1024)
    generator_width: int = Field(16, ge=4, le=256)
    discriminator_width: int = Field(8, ge=4, le=256)
    discriminator_normalization: Literal["none", "group"] = "none"
    generator_learning_rate: float = Field(2e-4, gt=0, le=1)
    discriminator_learning_rate: float = Field(1e-3, gt=0, le=1)
    generator_batch_size: int = Field(64, ge=2, le=4096)
    discriminator_steps_per_generator_step: int = Field(3, ge=1, le=1000)
    ema_decay: float = Field(0.95, ge=0, lt=1)
    warm_start: str = "none"
    warm_start_steps: int = Field(800, ge=1, le=1_000_000)
    moments_steps: int = Field(400, ge=1, le=1_000_000)
    warm_start_anatomy: Literal["brain", "skull_stripped_brain", "chest"] = "brain"


class PrivacyConfig(Part):
    """The guarantee: (epsilon, delta) for one patient, add or remove, over all rounds of the study together."""

    enabled: bool = True
    unit: Literal["patient"] = "patient"
    epsilon: float = Field(10.0, gt=0, le=1000)
    delta: float = Field(1e-5, gt=0, lt=0.01)
    clip_norm: float = Field(1.0, gt=0, le=1e6)
    colluding_sites: int = Field(1, ge=0, le=10_000)  # that may tell the server their share of a sum's noise
    sampling_probability: float = Field(0.25, gt=0, le=1)
    images_per_patient: int = Field(4, ge=1, le=1000)


class PhaseConfig(Part):
    """A stretch of a study, ``[[federation.phase]]``: rounds of one algorithm, for a share of the study's epsilon.

    ``steps`` are the discriminator steps of one round: a site's own with ``local``, everybody's together with
    ``joint``; a round of ``moments`` is one release and has 1.
    """

    algorithm: Algorithm
    share: float = Field(1.0, gt=0, le=1)
    rounds: int = Field(1, ge=1, le=100_000)
    steps: int = Field(1, ge=1, le=100_000)

    @model_validator(mode="after")
    def _one_release(self) -> Self:
        if self.algorithm == "moments" and self.steps != 1:
            raise ValueError("a round of moments is one release: leave out steps, or say 1")
        return self


class FederationConfig(Part):
    """How the sites train together. ``contracted_patients`` is each site's public cohort size, by site name.

    Either ``algorithm`` with ``rounds`` of ``local_steps`` steps, or several ``phase`` tables in their order;
    ``auto`` chooses the phases from the contract and epsilon (``common/phases.py``).
    """

    algorithm: Algorithm | Literal["auto"] = "local"
    aggregation: Literal["secure", "plain"] = "secure"
    weights: Literal["equal", "contracted"] = "equal"
    rounds: int = Field(10, ge=1, le=100_000)
    local_steps: int = Field(10, ge=1, le=100_000)
    minimum_sites: int = Field(2, ge=1, le=10_000)
    minimum_patients: int = Field(20, ge=1)
    round_timeout_seconds: float = Field(3600, gt=0)
    contracted_patients: dict[SiteName, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    phase: tuple[PhaseConfig, ...] = ()

    @field_validator("phase", mode="before")
    @classmethod
    def _split_phases(cls, value: Any) -> Any:
        # Flower's run config has no lists: there the phases are one string "algorithm key=value ...; ...".
        if isinstance(value, str):
            return tuple(_phase_of(text.split()) for text in value.split(";") if text.strip())
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _said_once(self) -> Self:
        if not self.phase:
            return self
        if any(getattr(self, key) != type(self).model_fields[key].default for key in _SHORT_FORM):
            raise ValueError(f"phases say what {', '.join(_SHORT_FORM)} would: leave these out beside phase tables")
        if abs(sum(phase.share for phase in self.phase) - 1) > 1e-6:
            raise ValueError("the shares of the phases must add up to 1")
        return self

    @field_validator("contracted_patients", mode="before")
    @classmethod
    def _split_contract(cls, value: Any) -> Any:
        # Flower's run config has no tables: there the contract is one string "name=count,name=count".
        if isinstance(value, str):
            pairs = [part.partition("=") for part in value.split(",") if part.strip()]
            contract = {name.strip(): count.strip() for name, _, count in pairs}
            if len(contract) < len(pairs) or not all(sign for _, sign, _ in pairs):
                raise ValueError("expected name=count with a comma between, each site once")
            return contract
        return value


class SecureAggregationConfig(Part):
    """Encoding of the secure sum (``common/secagg/encoding.py``), and how long its short stages may take."""

    value_range: float = Field(1.0, ge=1e-6, le=1e6)
    fraction_bits: int = Field(15, ge=1, le=30)
    modulus_bits: Literal[0, 16, 21, 32] = 0  # 0: the fewest that hold the sites
    stage_timeout_seconds: float = Field(120, gt=0)

    def encoding_for(self, num_sites: int) -> Encoding:
        """The encoding for a sum of this many sites. Raises ValueError, with the number to change, if it could wrap."""
        fewest = fewest_bits(self.value_range, self.fraction_bits, num_sites) or MODULUS_BITS[-1]
        encoding = Encoding(self.value_range, self.fraction_bits, self.modulus_bits or fewest)
        check_capacity(encoding, num_sites)
        return encoding


class AuditConfig(Part):
    """The audit of the synthetic images for memorised patients, fixed before training.

    ``candidates`` is how many images are checked at a time. The answer costs every training patient
    ``epsilon_training`` and every held-out one ``epsilon_held_out``, each time one of the ``verdicts`` is asked for.
    ``decoys`` is the share of candidates that the filter drops for no reason.
    """

    candidates: int = Field(2000, ge=1000, le=100_000)
    epsilon_training: float = Field(0.5, ge=1e-3, le=10)
    epsilon_held_out: float = Field(2.0, ge=1e-3, le=10)
    verdicts: int = Field(1, ge=1, le=3)
    canaries: int = Field(128, ge=0, le=4096)
    decoys: float = Field(0.25, gt=0, lt=1)


class PerformanceConfig(Part):
    """What only changes speed and memory: never the result's distribution, never the guarantee."""

    max_images_at_once: int = Field(256, ge=1)
    mixed_precision: bool = True


class StudyConfig(Part):
    """One study. ``seed`` fixes initial weights and latents; noise and sampling never depend on it."""

    name: str = Field("study", min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(0, ge=0, lt=2**32)
    image: ImageConfig = Field(default_factory=ImageConfig)
    gan: GanConfig = Field(default_factory=GanConfig)
    privacy: PrivacyConfig = Field(default_factory=PrivacyConfig)
    federation: FederationConfig = Field(default_factory=FederationConfig)
    secure_aggregation: SecureAggregationConfig = Field(default_factory=SecureAggregationConfig)
    audit: AuditConfig = Field(default_factory=AuditConfig)
    performance: PerformanceConfig = Field(default_factory=PerformanceConfig)

    @model_validator(mode="after")
    def _generator_trains(self) -> Self:
        if self.federation.algorithm == "auto":
            return self
        least = self.gan.discriminator_steps_per_generator_step
        if any(phase.algorithm == "local" and phase.steps < least for phase in self.phases):
            raise ValueError(
                "federation.local_steps (or the steps of a local phase) must be at least "
                "gan.discriminator_steps_per_generator_step, else the generator never makes a step"
            )
        return self

    @model_validator(mode="after")
    def _candidates_travel(self) -> Self:
        most = MOST_CANDIDATE_PIXELS // self.image.size**2
        if self.audit.candidates > most:
            raise ValueError(f"audit.candidates must be at most {most} for images of this size: they travel as one")
        return self

    @model_validator(mode="after")
    def _sums_hold(self) -> Self:
        if self.federation.aggregation != "secure":
            return self
        if self.federation.minimum_sites < 2:
            raise ValueError(
                "federation.minimum_sites must be at least 2 with secure aggregation: "
                "the sum over one site is its update"
            )
        if self.num_noisy < 1:
            raise ValueError(
                "federation.minimum_sites must be above privacy.colluding_sites (above 32 sites, a third of it): the "
                "sites that do not collude make the noise of a sum"
            )
        _ = self.encoding
        return self

    @property
    def encoding(self) -> Encoding:
        """The encoding of a secure sum of all sites of the study."""
        num_sites = max(len(self.federation.contracted_patients), self.federation.minimum_sites)
        return self.secure_aggregation.encoding_for(num_sites)

    @property
    def phases(self) -> tuple[PhaseConfig, ...]:
        """The phases in their order, however the study says them.

        Raises ConfigError when they are to be chosen from a contract that the study does not have yet.
        """
        federation = self.federation
        if federation.phase:
            return federation.phase
        if federation.algorithm == "auto":
            from common.phases import choose

            return choose(self).phases
        steps = 1 if federation.algorithm == "moments" else federation.local_steps
        return (PhaseConfig(algorithm=federation.algorithm, rounds=federation.rounds, steps=steps),)

    @property
    def total_rounds(self) -> int:
        """Rounds of all phases."""
        return sum(phase.rounds for phase in self.phases)

    @property
    def total_steps(self) -> int:
        """Discriminator steps of one site, and moments releases, over the whole study."""
        return sum(phase.rounds * phase.steps for phase in self.phases)

    def phase_number(self, round_number: int) -> int:
        """Index of the phase of a round; rounds count from 1 through all phases. ValueError for no such round."""
        last = 0
        for number, phase in enumerate(self.phases):
            last += phase.rounds
            if 0 < round_number <= last:
                return number
        raise ValueError(f"expected a round from 1 to {last}, found {round_number}")

    def last_round(self, phase_number: int) -> int:
        """The number of the last round of a phase."""
        return sum(phase.rounds for phase in self.phases[: phase_number + 1])

    @property
    def audit_round(self) -> int:
        """The number under which the sites are asked for the audit's counts, after all rounds of training."""
        return self.total_rounds + 1

    @property
    def filter_round(self) -> int:
        """The number under which the sites are asked which candidates to drop."""
        return self.total_rounds + 2

    def minimum_sites(self, round_number: int) -> int:
        """The fewest sites that a sum may be over."""
        training = round_number <= self.total_rounds
        return self.federation.minimum_sites if training else max(AUDIT_SITES, self.federation.minimum_sites)

    @property
    def num_noisy(self) -> int:
        """Sites that are sure to have shared the noise of a sum of ``joint`` or ``moments``: the fewest that a sum may
        be over, less those that may collude. Without secure aggregation every site makes all of it.

        In a cohort of more than ``COMPLETE`` sites, what a cheating server cannot open is a sum over fewer than a third
        of them (``common/secagg/neighbours.py``); the cohort itself is of ``minimum_sites`` at least.
        """
        return self._num_noisy(self.federation.minimum_sites)

    @property
    def num_noisy_in_audit(self) -> int:
        """The same for the audit's sum; at least 1."""
        return max(1, self._num_noisy(self.minimum_sites(self.audit_round)))

    def _num_noisy(self, fewest: int) -> int:
        if self.federation.aggregation == "plain":
            return 1
        if len(self.federation.contracted_patients) > COMPLETE:
            fewest = min(fewest, math.ceil(max(fewest, COMPLETE + 1) / 3))
        return fewest - self.privacy.colluding_sites

    def contracted_split(self, site: str) -> tuple[int, int]:
        """Public numbers of training and held-out patients of a site: its contracted size by the nominal share.

        Raises ConfigError when the study has no contract with the site.
        """
        if site not in self.federation.contracted_patients:
            raise ConfigError(
                f"The study has no contracted number of patients for site {site!r}.",
                "Add it under [federation.contracted_patients].",
            )
        patients = self.federation.contracted_patients[site]
        held_out = round(holdout_share(patients) * patients)
        return patients - held_out, held_out

    def site_weight(self, site: str) -> float:
        """What a site multiplies its update by, 0 to 1, from public facts only; the sum is divided by all weights.

        Raises ConfigError when weights follow the contract and the study has none with the site.
        """
        if self.federation.weights == "equal":
            return 1.0
        trained, held_out = self.contracted_split(site)
        return (trained + held_out) / max(self.federation.contracted_patients.values())

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the study without ``[performance]``, in canonical JSON."""
        facts = self.model_dump(mode="json", exclude={"performance"})
        return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def with_changes(self, part: str, **changes: Any) -> "StudyConfig":
        """The same study with some keys of one table changed; ``part`` "" for the study's own keys. Checked again."""
        tree = self.model_dump()
        (tree[part] if part else tree).update(changes)
        return _checked(tree, "command line")

    @classmethod
    def from_toml(cls, path: Path) -> "StudyConfig":
        """Read a study file. Raises ConfigError that names every wrong key."""
        try:
            with path.open("rb") as file:
                tree = tomllib.load(file)
        except OSError as error:
            raise ConfigError(
                f"Cannot read the study file {path}: {error.strerror}.", "Give an existing file."
            ) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not TOML: {error}.", "Correct the line.") from None
        return _checked(tree, str(path))

    def save(self, path: Path) -> None:
        """Write the study as a TOML file that ``from_toml`` reads back."""
        import tomli_w

        path.write_text(tomli_w.dumps(self.model_dump(mode="json")), encoding="utf-8")

    @classmethod
    def from_run_config(cls, run_config: dict[str, Any]) -> "StudyConfig":
        """Build a study from Flower's flat run config: ``study.privacy.epsilon`` and so on; other keys are ignored."""
        tree: dict[str, Any] = {}
        for key, value in run_config.items():
            first, _, rest = key.partition(".")
            if first != "study":
                continue
            part, _, leaf = rest.partition(".")
            table = tree.setdefault(part, {}) if leaf else tree
            if not isinstance(table, dict) or (leaf or part) in table:
                raise ConfigError(f"The run configuration gives {part!r} both as a key and as a table.", "Keep one.")
            table[leaf or part] = value
        return _checked(tree, "the run configuration")

    def to_run_config(self) -> dict[str, str | int | float | bool]:
        """The inverse of ``from_run_config``."""
        flat: dict[str, str | int | float | bool] = {}
        for key, value in self.model_dump(mode="json").items():
            if not isinstance(value, dict):
                flat[f"study.{key}"] = value
                continue
            for inner, leaf in value.items():
                if inner == "phase":
                    leaf = "; ".join(_phase_text(phase) for phase in leaf)
                elif isinstance(leaf, list):
                    leaf = ",".join(leaf)
                elif isinstance(leaf, dict):
                    leaf = ",".join(f"{name}={count}" for name, count in leaf.items())
                flat[f"study.{key}.{inner}"] = leaf
        return flat


_SHORT_FORM = ("algorithm", "rounds", "local_steps")


def _phase_of(words: list[str]) -> dict[str, str]:
    """A phase from its words: the algorithm, then key=value."""
    pairs = [word.partition("=") for word in words[1:]]
    keys = [key for key, _, _ in pairs]
    if not all(sign for _, sign, _ in pairs) or len({"algorithm", *keys}) < len(words):
        raise ValueError("expected 'algorithm key=value key=value', each key once, with a semicolon between phases")
    return {"algorithm": words[0], **{key: value for key, _, value in pairs}}


def _phase_text(phase: dict[str, Any]) -> str:
    """The inverse of ``_phase_of``."""
    return " ".join([phase["algorithm"], *(f"{key}={value}" for key, value in phase.items() if key != "algorithm")])


def _checked(tree: dict[str, Any], source: str) -> StudyConfig:
    try:
        return StudyConfig.model_validate(tree)
    except ValidationError as error:
        problems = []
        for item in error.errors(include_url=False, include_input=False, include_context=False):
            where = ".".join(str(part) for part in item["loc"]) or "study"
            text = "no such key" if item["type"] == "extra_forbidden" else item["msg"].removeprefix("Value error, ")
            problems.append(f"{where}: {text}")
        raise ConfigError(f"{source} is not a valid study: {'; '.join(problems)}.", "Correct these keys.") from None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{source} is not a valid study: {error}.", "Correct the values.") from None
