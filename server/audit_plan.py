"""The server's flow before the first round: the audit's plan, signed and registered at every site."""

import logging
from collections.abc import Mapping
from pathlib import Path

from common.audit.plan import SignedPlan, load_signed_plan, make_audit_plan, sign
from common.config import StudyConfig
from common.errors import ConfigError
from common.messages import Enrolment, PlanRegistered, Refusal, RegisterPlanRequest
from server.channel import Channel
from server.coordinator import coordinator_key

logger = logging.getLogger("synthward.server")
PLAN_FILE = "audit-plan.json"


def register_plan(study: StudyConfig, channel: Channel, enrolled: Mapping[int, Enrolment], out: Path) -> SignedPlan:
    """Register the plan at every site that enrolled; one that was made before the run began is used.

    A site that keeps another plan, or began to train without one, trains all the same; it will refuse the audit.

    Raises:
        ConfigError: the plan in ``out`` is not the study's.
    """
    signed = _plan(study, next(iter(enrolled.values())).roster_digest, out)
    request = RegisterPlanRequest(study.digest, signed.model_dump_json().encode())
    timeout = study.secure_aggregation.stage_timeout_seconds
    for node, reply in channel.ask(dict.fromkeys(enrolled, request), "register_plan", timeout):
        if not (isinstance(reply, PlanRegistered) and reply.plan_digest == signed.plan.digest):
            code = reply.code if isinstance(reply, Refusal) else "malformed"
            logger.warning("site %s did not register the audit's plan: %s", enrolled[node].site, code)
    return signed


def _plan(study: StudyConfig, roster_digest: str, out: Path) -> SignedPlan:
    path, expected = out / PLAN_FILE, make_audit_plan(study, roster_digest)
    if not path.exists():
        sign(expected, coordinator_key(out)).save(path)
    signed = load_signed_plan(path)
    if signed.plan != expected:
        raise ConfigError(
            f"{path} is not the plan that follows from the study and the sites' roster.",
            "Make it again: `synthward audit plan`. After training began, a new plan needs a new run.",
        )
    return signed
