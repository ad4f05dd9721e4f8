"""The audit's plan at a site: the first one that it was shown for a study, before anything was trained."""

from pathlib import Path

from common.audit.plan import AuditPlan, SignedPlan, make_audit_plan, parse_signed_plan
from common.config import StudyConfig
from common.errors import BadPeer
from common.files import write_atomically
from common.messages import PlanRegistered, RegisterPlanRequest

FILE_NAME = "audit-plan.json"


def register(
    folder: Path, study: StudyConfig, roster_digest: str, request: RegisterPlanRequest, *, has_trained: bool
) -> PlanRegistered:
    """Keep the plan, or find it kept already.

    Args:
        folder: the study's, at the site.
        study: the study.
        roster_digest: of the roster that the site has pinned.
        request: the request.
        has_trained: whether the site has spent anything on the study.

    Raises:
        BadPeer: no plan, one that does not follow from study and roster, another than the first, or a first one after
            training began.
    """
    signed = _parsed(request.plan)
    if signed.plan != make_audit_plan(study, roster_digest):
        raise BadPeer("The audit's plan is not the one that follows from the study and the pinned roster.")
    path = folder / FILE_NAME
    if path.exists():
        if _parsed(path.read_bytes()) != signed:
            raise BadPeer("Another audit plan, or another coordinator's, is registered here for this study.")
    elif has_trained:
        raise BadPeer("The audit's plan comes after training began: then it could follow from what was seen.")
    else:
        write_atomically(path, request.plan, mode=0o600)
    return PlanRegistered(signed.plan.digest)


def registered(folder: Path, study: StudyConfig, roster_digest: str) -> AuditPlan:
    """The plan by which the study may be audited here.

    Raises:
        BadPeer: none was registered before training, or study, roster or program are others than it was for.
    """
    path = folder / FILE_NAME
    if not path.exists():
        raise BadPeer("No audit plan was registered here before training.", "Register one and train anew.")
    plan = _parsed(path.read_bytes()).plan
    if plan != make_audit_plan(study, roster_digest):
        raise BadPeer(
            "The audit's plan was registered for another roster, study or version of the audit.",
            "Audit with the roster and the version of Synthward that the training began with.",
        )
    return plan


def _parsed(content: bytes) -> SignedPlan:
    try:
        return parse_signed_plan(content)
    except ValueError as error:
        raise BadPeer(f"The audit's plan cannot be used: {error}.") from None
