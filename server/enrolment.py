"""The server's first question of a run: which sites take part, and who they are."""

import logging
import re
import time
from collections import Counter
from collections.abc import Collection, Iterable

from common.config import StudyConfig
from common.errors import TooFewSurvivors
from common.messages import Enrolment, EnrolRequest, Refusal, Reply
from common.privacy.plan import PrivacyPlan
from server import charging, record
from server.channel import MALFORMED, Channel
from server.record import RunRecord, SiteRecord

logger = logging.getLogger("synthward.server")
NODES_TIMEOUT_SECONDS = 600.0
ENROLMENT_CHANGED, OTHER_ROSTER = "enrolment_changed", "other_roster"


def enrol(
    study: StudyConfig, channel: Channel, run: RunRecord, plan: PrivacyPlan | None, signature: bytes = b""
) -> dict[int, Enrolment]:
    """Ask every connected site to take part, and put those that do into the record.

    Args:
        signature: of the study, for sites that trust its signer.

    Returns:
        What each of them said, by node id.

    Raises:
        TooFewSurvivors: fewer than ``federation.minimum_sites`` will.
    """
    started = time.monotonic()
    contract, minimum = study.federation.contracted_patients, study.federation.minimum_sites
    nodes = channel.nodes(minimum, max(minimum, len(contract)), NODES_TIMEOUT_SECONDS)
    # A site checks all of its files before it answers, which takes as long as a round may.
    requests = dict.fromkeys(nodes, EnrolRequest(study.digest, run.run, signature))
    answers = dict(channel.ask(requests, "enrol", study.federation.round_timeout_seconds))
    enrolled: dict[int, Enrolment] = {}
    # A resumed run asks all sites of the contract anew; those refused in preparation are not in it.
    run.refused_sites = {name: code for name, code in run.refused_sites.items() if name not in contract}
    run.refused_nodes = []
    roster = _common_roster(contract, answers.values())
    for node, reply in sorted(answers.items()):
        if isinstance(reply, Refusal):
            run.refused_nodes.append(reply.code)
        elif not isinstance(reply, Enrolment) or reply.site not in contract or not _is_complete(study, reply):
            run.refused_nodes.append(MALFORMED)
        elif reply.site in {other.site for other in enrolled.values()}:
            run.refused_nodes.append(MALFORMED)
        elif reply.roster_digest != roster:
            run.refused_sites[reply.site] = OTHER_ROSTER
        elif not _enter(study, plan, run, reply):
            run.refused_sites[reply.site] = ENROLMENT_CHANGED
        else:
            enrolled[node] = reply
    refusals = sorted([*run.refused_sites.values(), *run.refused_nodes])
    missing = sorted(set(contract) - {site.site for site in enrolled.values()})
    if missing or refusals:
        names, codes = ", ".join(missing) or "none of the contract", ", ".join(refusals) or "no answer"
        logger.warning("sites that take no part: %s (%s); their logs say why", names, codes)
    order = list(contract)
    run.sites.sort(key=lambda site: order.index(site.name))
    run.notice = record.notice(study, any(site.record_is_patient for site in run.sites))
    run.seconds["enrolment"] = round(time.monotonic() - started, 3)
    if len(enrolled) < minimum:
        raise TooFewSurvivors(
            f"Expected at least {minimum} sites to enrol, got {len(enrolled)}"
            f" (missing: {', '.join(missing)}; refused: {', '.join(refusals) or 'none'}).",
            "Look into the logs in the sites' folders; `synthward data check` says what a site would refuse.",
        )
    return enrolled


def _is_complete(study: StudyConfig, reply: Enrolment) -> bool:
    """Whether the site gave a public key and a budget where the study needs them.

    Whose the key is, only the other sites can tell.
    """
    has_key = re.fullmatch("[0-9a-f]{64}", reply.identity) is not None
    return (study.federation.aggregation == "plain" or has_key) and study.privacy.enabled == (reply.budget is not None)


def _common_roster(contract: Collection[str], replies: Iterable[Reply]) -> str:
    """The digest of the roster that most sites have pinned; a site with another one could not verify the rest."""
    pinned = {reply.site: reply.roster_digest for reply in replies if isinstance(reply, Enrolment)}
    digests = Counter(digest for site, digest in pinned.items() if site in contract)
    return min(digests, key=lambda digest: (-digests[digest], digest), default="")


def _enter(study: StudyConfig, plan: PrivacyPlan | None, run: RunRecord, reply: Enrolment) -> bool:
    """Put a site into the record. False when it says what cannot be true, or what the record contradicts."""
    site = next((site for site in run.sites if site.name == reply.site), None)
    if site is not None and (site.holdout_commitment, site.record_is_patient) != (
        reply.holdout_commitment,
        reply.record_is_patient,
    ):
        return False
    if site is None:
        site = _new_site(study, reply)
    if not charging.is_possible(study, plan, site, reply.history):
        return False
    charging.enrol(study, site, reply)
    if site not in run.sites:
        run.sites.append(site)
    return True


def _new_site(study: StudyConfig, reply: Enrolment) -> SiteRecord:
    trained, held_out = study.contracted_split(reply.site)
    delta = study.privacy.delta if study.privacy.enabled else None
    return SiteRecord(
        name=reply.site,
        epsilon=None if delta is None else 0.0,
        delta=delta,
        accountant="none" if delta is None else "rdp",
        patients_trained=trained,
        patients_held_out=held_out,
        holdout_commitment=reply.holdout_commitment,
        record_is_patient=reply.record_is_patient,
    )
