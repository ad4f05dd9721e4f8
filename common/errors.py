"""Every error that Synthward raises on purpose, on one page.

FederationError                 code, message, remedy
  ConfigError                   the study or the command is wrong: fix the file       exit status 2
  SiteError                     the site's data or settings are refused              exit status 3
  PrivacyError                  training would break or exceed the guarantee         exit status 3
    BudgetExhausted             all steps that the study planned for the site are spent
    OverBudget                  the site's own budget would be exceeded
    PolicyError                 the site's policy is missing or refuses
    LedgerError                 the site's ledger is missing, altered, locked or cannot be written
  ProtocolError                 the federation itself failed                         exit status 4
    OutOfOrder                  a message at a stage where it has no place: too early, twice, or replayed
    BadPeer                     a message that no honest peer sends
    TooFewSurvivors             fewer sites take part than the study needs
  VerdictError                  the audit ended, and not with PASS                   exit status 5

``message`` says what was expected and what was found; ``remedy`` says what to change. Only ``code`` may leave a
site: the rest can name files and patients.
"""

from typing import ClassVar

INTERNAL = "internal"
"""The code of whatever was not foreseen: a defect, whose text stays where it happened."""


class FederationError(Exception):
    """Base of all errors that an operator can act on.

    Args:
        message: what was expected and what was found, one sentence or two.
        remedy: what to change; may be empty.
    """

    code: ClassVar[str]
    exit_status: ClassVar[int]

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".strip()


class ConfigError(FederationError):
    """A study file or a command that cannot be used as it is."""

    code = "config"
    exit_status = 2


class SiteError(FederationError):
    """A site's data or settings that the site itself refuses."""

    code = "site"
    exit_status = 3


class PrivacyError(FederationError):
    """Training as asked would break the stated guarantee."""

    code = "privacy"
    exit_status = 3


class BudgetExhausted(PrivacyError):
    """The site has spent what the study planned for it."""

    code = "budget_exhausted"


class OverBudget(PrivacyError):
    """More would be spent on some patient than the site's policy allows."""

    code = "over_budget"


class PolicyError(PrivacyError):
    """The site's policy is missing, cannot be trusted, or refuses the study."""

    code = "policy"


class LedgerError(PrivacyError):
    """What the site has spent cannot be told for certain, or cannot be written down."""

    code = "ledger"


class ProtocolError(FederationError):
    """The federation failed: nothing that one site's files explain."""

    code = "protocol"
    exit_status = 4


class OutOfOrder(ProtocolError):
    """A message that may be genuine, but not now: a stage was left out, repeated, or belongs to another attempt."""

    code = "out_of_order"


class BadPeer(ProtocolError):
    """A peer sent something that no honest peer sends."""

    code = "bad_peer"


class TooFewSurvivors(ProtocolError):
    """Fewer sites than the study, or the threshold of its secure sum, needs."""

    code = "too_few_survivors"


class VerdictError(FederationError):
    """An audit whose verdict forbids a release: for a command's exit status."""

    code = "verdict"
    exit_status = 5
