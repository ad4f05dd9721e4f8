"""What a site has spent, for its data protection officer: on each data set and in each study, and as a signed file.

**Guarantee.** A statement is signed with the site's identity key over all lines of the ledger. Whoever keeps one can
tell later whether the ledger still begins with these lines: it is the proof against a ledger that was replaced, whole,
by an older one or by another.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from client.ledger import Ledger
from client.ledger_lines import Book, Line, content_of, history_of
from client.policy import Policy
from common.errors import ConfigError, LedgerError, PolicyError
from common.privacy import accounting
from common.privacy.accounting import Budget

NO_BUDGET_DELTA = 1e-5  # for data that the policy does not list: there is no budget, and still something was spent
_LABEL = b"synthward ledger statement v1\x00"


@dataclass(frozen=True)
class StudySpent:
    """What one study has spent on one data set.

    Args:
        name: of the study.
        digest: of the study.
        rounds: how many lines of training it has.
        steps: of all of them.
        audits: how many verdicts of its audit have read these patients.
        audited: "training" where it trains on them, "held_out" where it holds them out; None without an audit.
        epsilon: of all these lines alone, at the delta of the data set's budget.
    """

    name: str
    digest: str
    rounds: int
    steps: int
    audits: int
    audited: str | None
    epsilon: float


@dataclass(frozen=True)
class DataSetSpent:
    """What was spent on one data set, all studies together.

    Args:
        digest: keyed, of its patients.
        folder: where the images lay.
        num_patients: how many.
        budget: of the policy; None when it does not list the folder.
        delta: at which the epsilons are.
        epsilon: of the patient on whom most was spent, lines of other data sets with this patient included.
        studies: the data set's own lines, by study.
    """

    digest: str
    folder: str
    num_patients: int
    budget: Budget | None
    delta: float
    epsilon: float
    studies: tuple[StudySpent, ...]

    @property
    def left(self) -> float | None:
        """Epsilon of the budget that is not spent; None without a budget."""
        return max(0.0, self.budget.epsilon - self.epsilon) if self.budget else None

    def to_json(self) -> dict[str, Any]:
        """As the commands print it."""
        return {
            "data_set": self.digest,
            "folder": self.folder,
            "patients": self.num_patients,
            "spent": {"epsilon": self.epsilon, "delta": self.delta},
            "budget": asdict(self.budget) if self.budget else None,
            "left": {"epsilon": self.left, "delta": self.delta} if self.budget else None,
            "studies": [
                {
                    "study": study.name,
                    "digest": study.digest,
                    "rounds": study.rounds,
                    "steps": study.steps,
                    "audits": study.audits,
                    "audited": study.audited,
                    "spent": {"epsilon": study.epsilon, "delta": self.delta},
                }
                for study in self.studies
            ],
        }


def spent_on(book: Book, policy: Policy | None) -> tuple[DataSetSpent, ...]:
    """What was spent on each data set of the ledger, in the order of their first lines.

    Args:
        book: the site's whole ledger.
        policy: the site's, for the budgets; None when it cannot be read.
    """
    found = []
    for data_set in book.data_sets():
        budget = _budget(policy, Path(data_set.folder))
        delta = budget.delta if budget else NO_BUDGET_DELTA
        epsilon = max(accounting.epsilon(history, delta) for history in book.histories(data_set.patients))
        studies = _by_study([line for line in book.lines if line.data_set == data_set.digest], delta)
        found.append(
            DataSetSpent(data_set.digest, data_set.folder, len(data_set.patients), budget, delta, epsilon, studies)
        )
    return tuple(found)


def _budget(policy: Policy | None, folder: Path) -> Budget | None:
    try:
        return policy.budget_of(folder) if policy else None
    except PolicyError:
        return None


def _by_study(lines: Sequence[Line], delta: float) -> tuple[StudySpent, ...]:
    studies = []
    for digest in dict.fromkeys(line.study_digest for line in lines):
        own = [line for line in lines if line.study_digest == digest]
        history = history_of(own)
        audits = [line for line in own if line.audited is not None]
        studies.append(
            StudySpent(
                name=own[-1].study_name,
                digest=digest,
                rounds=len(own) - len(audits),
                steps=accounting.num_steps(accounting.of_training(history)),
                audits=len(audits),
                audited=audits[-1].audited if audits else None,
                epsilon=accounting.epsilon(history, delta),
            )
        )
    return tuple(studies)


# ---------------------------------------------------------------- the signed file


def sign_statement(site: str, identity: Ed25519PrivateKey, ledger: Ledger, policy: Policy | None) -> dict[str, Any]:
    """Everything the ledger holds, signed. It names no patient, and no digest of one."""
    book = ledger.read()
    content = {
        "version": 1,
        "site": site,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "public_key": identity.public_key().public_bytes_raw().hex(),
        "lines": [content_of(line) for line in book.lines],
        "data_sets": [spent.to_json() for spent in spent_on(book, policy)],
    }
    return {**content, "signature": identity.sign(_signed(content)).hex()}


@dataclass(frozen=True)
class Statement:
    """What a signed statement says, and who signed it.

    Args:
        site: the site's name.
        public_key: the signer's, hex.
        lines: of the ledger.
    """

    site: str
    public_key: str
    lines: tuple[Line, ...]


def read_statement(path: Path) -> Statement:
    """A signed statement. Raises ConfigError when it is none, or was altered after it was signed."""
    try:
        content = json.loads(path.read_bytes())
        signature = bytes.fromhex(content.pop("signature"))
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(content["public_key"]))
        public.verify(signature, _signed(content))
        lines = tuple(Line(**line) for line in content["lines"])
        return Statement(str(content["site"]), str(content["public_key"]), lines)
    except OSError as error:
        raise ConfigError(
            f"Cannot read {path}: {error.strerror}.", "Give a file of `synthward ledger export`."
        ) from None
    except (InvalidSignature, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(
            f"{path} is no statement of a ledger, or was altered after it was signed.",
            "Give a file of `synthward ledger export` as it was written.",
        ) from None


def check_continues(ledger: Ledger, stated: Sequence[Line]) -> None:
    """Raise LedgerError when the ledger no longer begins with these lines."""
    if ledger.lines()[: len(stated)] != tuple(stated):
        raise LedgerError(
            f"The ledger does not begin with the {len(stated)} lines that were stated: it was replaced.",
            "Find the newest copy. The statement says what had been spent when it was signed.",
        )


def _signed(content: dict[str, Any]) -> bytes:
    return _LABEL + json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
