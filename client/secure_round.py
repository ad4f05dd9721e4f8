"""The site's flow of one secure sum: what each message of the server sets in motion. Training is handed in."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from client import audit_charge, updates
from client.accountant import SiteAccountant
from client.identity import Member
from client.phases import phase_asked
from client.round_file import RoundFile
from client.updates import MadeSum, MadeUpdate
from common.config import StudyConfig
from common.errors import BudgetExhausted, ConfigError, FederationError, OverBudget, ProtocolError
from common.messages import (
    AdvertiseKeysRequest,
    Confirmation,
    ConfirmSurvivorsRequest,
    MaskedInput,
    MaskedInputRequest,
    SealedShares,
    ShareKeysRequest,
    UnmaskRequest,
    UnmaskShares,
    Work,
)
from common.secagg.keys import AdvertisedKeys

logger = logging.getLogger("synthward.site")


@dataclass(frozen=True)
class SecureSite:
    """One study at one site, as the secure sum sees it.

    Args:
        study: the study.
        member: who the site is.
        folder: the study's folder at the site.
        accountant: opens the study's account, where keys are asked for; it gives None when the study is not private.
    """

    study: StudyConfig
    member: Member
    folder: Path
    accountant: Callable[[], SiteAccountant | None]

    @property
    def file(self) -> RoundFile:
        """Where the attempt is kept."""
        return RoundFile(self.folder, self.member, self.study.digest)


def advertise_keys(at: SecureSite, request: AdvertiseKeysRequest) -> AdvertisedKeys:
    """Begin an attempt. Raises OutOfOrder for one served before, BudgetExhausted when there is nothing left to add."""
    if at.study.federation.aggregation != "secure":
        raise ConfigError("The study has no secure aggregation.", "Ask for local rounds.")
    return begin_attempt(at, request.attempt, request.round)


def share_keys(at: SecureSite, request: ShareKeysRequest) -> SealedShares:
    """Check the cohort and deal the shares. Raises ProtocolError."""
    with at.file.stage(request.attempt) as attempt:
        return attempt.share_keys(request)


def masked_input(
    at: SecureSite, request: MaskedInputRequest, make: Callable[[Work], MadeUpdate | MadeSum]
) -> MaskedInput:
    """Check and open the shares, make this site's part of the sum, mask it, and note that it has left.

    Args:
        at: the study at this site.
        request: the request.
        make: makes the part that the request asks for.

    Raises:
        BadPeer, OutOfOrder, TooFewSurvivors: before anything is spent.
        ProtocolError: the update was made and cannot be sent; and whatever ``make`` raises.
    """
    with at.file.stage(request.attempt) as attempt:
        attempt.open_shares(request)
    try:
        update = make(request.work)
    except BaseException as error:
        if isinstance(error, BudgetExhausted | OverBudget):
            updates.give_up(at.folder)  # so that the next attempt is refused where it costs nobody anything
        at.file.end(request.attempt)
        raise
    try:
        with at.file.stage(request.attempt) as attempt:
            updates.note_left(at.folder, update.id)
            encoding = update.encoding if isinstance(update, MadeSum) else at.study.encoding
            message, clipped = attempt.masked_input(update.vector, encoding, update.round)
    except (FederationError, OSError) as error:  # a code of its own: others tell the server that nothing was spent
        raise ProtocolError(f"The update was made and not sent: {error}") from error
    # Site's own log: how many coordinates were clipped derives from patients.
    logger.info("round %d: %d of %d coordinates clipped to the value range", update.round, clipped, message.length)
    return message


def confirm_survivors(at: SecureSite, request: ConfirmSurvivorsRequest) -> Confirmation:
    """Sign the survivors. Raises ProtocolError."""
    with at.file.stage(request.attempt) as attempt:
        return attempt.confirm_survivors(request)


def unmask(at: SecureSite, request: UnmaskRequest) -> UnmaskShares:
    """Open the shares, end the attempt, and advertise keys if another follows. Raises ProtocolError."""
    with at.file.stage(request.attempt) as attempt:
        opened = attempt.unmask(request)
    at.file.end(request.attempt)
    next_keys = following_keys(at, request.attempt, request.next_round)
    return UnmaskShares(opened.attempt, opened.self_masks, opened.mask_keys, next_keys)


def following_keys(at: SecureSite, number: int, next_round: int) -> AdvertisedKeys | None:
    """Keys for the attempt after ``number``, which is over; None when ``next_round`` is 0 or the site has none.

    What was opened counts: a site that cannot make keys sits out one attempt.
    """
    try:
        return begin_attempt(at, number + 1, next_round) if next_round else None
    except (FederationError, OSError) as error:
        logger.warning("no keys for the next attempt: %s", error)
        return None


def begin_attempt(at: SecureSite, number: int, round_number: int) -> AdvertisedKeys:
    """Keys for an attempt. Raises OutOfOrder for one served before, PrivacyError when the round cannot be paid."""
    _check_budget(at, round_number)
    return at.file.begin(number, max(at.study.minimum_sites(round_number), at.member.minimum_cohort))


def _check_budget(at: SecureSite, round_number: int) -> None:
    """Refuse here, where it costs nobody anything, when the round cannot be paid and no update waits to be sent."""
    accountant = at.accountant()
    if round_number in (at.study.audit_round, at.study.filter_round):
        wants_counts = accountant is not None and round_number == at.study.audit_round
        if accountant is not None and wants_counts and not audit_charge.is_paid(at.folder, accountant):
            accountant.check_audit(round_number)
        return
    phase_asked(at.study, round_number)
    if accountant is not None and not updates.read(at.folder).pending:
        accountant.check_round(round_number)
