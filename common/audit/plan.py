"""What an audit will do and may conclude, fixed and signed before the first round of training.

**Guarantee.** A plan is a function of the study, the roster and this program's version of the audit: a site computes it
itself, keeps the first one that it was shown for a study, and takes part in no audit under another. A server can choose
nothing of it after it has seen a generator.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, ValidationError

from common.audit.candidates import FEWEST, FILTER_DROP, num_generated
from common.config import StudyConfig
from common.errors import ConfigError
from common.files import write_atomically

PLAN_VERSION = 1
_LABEL = b"synthward audit plan v1\x00"  # a key signs other things too: no signature of one kind passes for another


class AuditPlan(BaseModel):
    """The plan. Every field is public, and known before training."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, allow_inf_nan=False)

    version: Literal[1] = 1
    study_digest: str
    roster_digest: str
    score_version: int
    bins_version: int
    verdict_version: int
    generated: int
    fewest_candidates: int
    epsilon_training: float
    epsilon_held_out: float
    verdicts: int
    fewest_sites: int
    noisy_sites: int
    canaries: int
    decoys: float
    filter_drop: float

    def to_bytes(self) -> bytes:
        """The one JSON text of this plan."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode()

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of its text."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


class SignedPlan(BaseModel):
    """A plan with the coordinator's public key and signature, hex; ``audit-plan.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    plan: AuditPlan
    key: str
    signature: str

    @property
    def is_signed(self) -> bool:
        """Whether the key's holder has signed exactly this plan."""
        try:
            public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.key))
            public.verify(bytes.fromhex(self.signature), _LABEL + self.plan.to_bytes())
        except (InvalidSignature, ValueError):
            return False
        return True

    def save(self, path: Path) -> None:
        """Write it for people and programs."""
        write_atomically(path, (json.dumps(self.model_dump(mode="json"), indent=2) + "\n").encode())


def make_audit_plan(study: StudyConfig, roster_digest: str) -> AuditPlan:
    """The plan of a study.

    Args:
        study: the study, with its contract.
        roster_digest: of the roster that all sites have pinned; "" in a study without secure aggregation.
    """
    from common.audit.bins import BINS_VERSION
    from common.audit.score import SCORE_VERSION
    from common.audit.verdict import VERDICT_VERSION

    audit = study.audit
    return AuditPlan(
        study_digest=study.digest,
        roster_digest=roster_digest,
        score_version=SCORE_VERSION,
        bins_version=BINS_VERSION,
        verdict_version=VERDICT_VERSION,
        generated=num_generated(study),
        fewest_candidates=FEWEST,
        epsilon_training=audit.epsilon_training,
        epsilon_held_out=audit.epsilon_held_out,
        verdicts=audit.verdicts,
        fewest_sites=study.minimum_sites(study.audit_round),
        noisy_sites=study.num_noisy_in_audit,
        canaries=audit.canaries,
        decoys=audit.decoys,
        filter_drop=FILTER_DROP,
    )


def sign(plan: AuditPlan, private: Ed25519PrivateKey) -> SignedPlan:
    """The plan with the coordinator's signature."""
    signature = private.sign(_LABEL + plan.to_bytes())
    return SignedPlan(plan=plan, key=private.public_key().public_bytes_raw().hex(), signature=signature.hex())


def load_signed_plan(path: Path) -> SignedPlan:
    """Read a plan. Raises ConfigError when it is none, or its signature is wrong."""
    try:
        found = parse_signed_plan(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror}.", "Give a plan of `synthward audit plan`.") from None
    except ValueError as error:
        raise ConfigError(f"{path} is no audit plan: {error}.", "Give a plan of `synthward audit plan`.") from None
    return found


def parse_signed_plan(content: bytes) -> SignedPlan:
    """A signed plan from its JSON. Raises ValueError when it is none or its signature is wrong."""
    try:
        found = SignedPlan.model_validate_json(content)
    except ValidationError as error:
        fields = ", ".join(sorted({_where(each) for each in error.errors(include_input=False, include_url=False)}))
        raise ValueError(f"expected a signed plan, found something else at {fields}") from None
    if not found.is_signed:
        raise ValueError("its signature does not fit its content")
    return found


def _where(error: Any) -> str:
    return ".".join(str(part) for part in error["loc"]) or "its start"
