"""The site's flow of a session: what each message of the server sets in motion. What is summed is handed in."""

from collections.abc import Callable

from client.secure_round import SecureSite, following_keys
from client.updates import MadeSum
from common.errors import FederationError, ProtocolError
from common.messages import (
    Confirmation,
    ConfirmStepRequest,
    JointRequest,
    MaskedStep,
    OpenedSeeds,
    OpenedStep,
    OpenSeedsRequest,
    OpenStepRequest,
    SealedSeeds,
    ShareSeedRequest,
    StepRequest,
)


def share_seed(at: SecureSite, request: ShareSeedRequest) -> SealedSeeds:
    """Check the cohort and deal shares of a seed. Raises ProtocolError."""
    with at.file.session(request.attempt) as session:
        return session.share_seed(request)


def step(at: SecureSite, request: StepRequest, work: Callable[[JointRequest], MadeSum]) -> MaskedStep:
    """Note the step as begun, make this site's integers of it, and mask them.

    A step that was begun is never begun again, so that whatever ``work`` draws leaves under one list of sites at most.

    Args:
        at: the study at this site.
        request: the request.
        work: makes the integers and says their encoding; called once at most.

    Raises:
        BadPeer, OutOfOrder, TooFewSurvivors: before ``work`` is called.
        ProtocolError: the integers were made and cannot be sent; and whatever ``work`` raises.
    """
    with at.file.session(request.attempt) as session:
        session.begin_step(request)
    try:
        made = work(request.work)
    except BaseException:
        at.file.end(request.attempt)
        raise
    try:
        with at.file.session(request.attempt) as session:
            return session.masked_step(made.vector, made.encoding)
    except (FederationError, OSError) as error:  # a code of its own: others tell the server that nothing was spent
        raise ProtocolError(f"The step was made and not sent: {error}") from error


def confirm_step(at: SecureSite, request: ConfirmStepRequest) -> Confirmation:
    """Sign the survivors of a step. Raises ProtocolError."""
    with at.file.session(request.attempt) as session:
        return session.confirm_step(request)


def open_step(at: SecureSite, request: OpenStepRequest) -> OpenedStep:
    """Open the keys of a step. Raises ProtocolError."""
    with at.file.session(request.attempt) as session:
        return session.open_step(request)


def open_seeds(at: SecureSite, request: OpenSeedsRequest) -> OpenedSeeds:
    """Give shares of seeds; after the last step end the session, and advertise keys if another attempt follows.

    Raises ProtocolError.
    """
    with at.file.session(request.attempt) as session:
        opened, over = session.open_seeds(request), session.step == session.steps
    if not over:
        return opened
    at.file.end(request.attempt)
    next_keys = following_keys(at, request.attempt, request.next_round)
    return OpenedSeeds(opened.attempt, opened.step, opened.shares, next_keys)
