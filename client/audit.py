"""The site's flow of an audit: check what the server shows, charge, compare with the site's own patients, count.

**Guarantee.** Nothing is charged or read before the candidates have been made again here. What leaves is one vector of
counts in which each patient is in one cell, with this site's share of the noise; what is kept of the comparison stays
in the site's folder.
"""

import hashlib
import hmac
import logging
import os
import secrets
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client import audit_charge, audit_plan, enrolled, updates
from client.accountant import SiteAccountant
from client.audit_pairs import MOST_PAIRS, Pairs, load_pairs, save_pairs
from client.data import cohort, slices
from client.data.canaries import Canaries, canaries_of
from client.data.slices import PreparedCohort
from client.enrolled import open_accountant, read_enrolled
from client.identity import load_member
from client.policy import Policy
from client.settings import SiteSettings
from client.updates import MadeSum
from common import progress
from common.audit import candidates as made
from common.audit import counts, score
from common.audit.bins import bin_edges
from common.audit.candidates import TOLERANCE, CandidateSet
from common.audit.counts import HELD_OUT_A, HELD_OUT_B, TRAINING
from common.audit.matches import decoy_probability, matched, threshold
from common.audit.plan import AuditPlan
from common.audit.score import Candidates, Comparison
from common.config import StudyConfig
from common.errors import BadPeer, FederationError, ProtocolError, SiteError
from common.files import locked
from common.messages import AuditRequest, FilterRequest, Vector
from common.privacy import discrete_laplace
from common.secagg.encoding import Encoding

logger = logging.getLogger("synthward.site")
AUDIT_ENCODING = Encoding(1.0, 0, 32)
_CHECKED_SHARE, _FEWEST_CHECKED = 0.01, 20
_NEAREST_TOLERANCE = 5e-3  # of a similarity, between two kinds of device


@dataclass(frozen=True)
class SiteAudit:
    """A study's audit at one site.

    Args:
        study: the study.
        site: the site's name.
        folder: the study's folder at the site.
        plan: what was registered before training.
        training: prepared images of the patients that were trained on.
        held_out: of those that were not.
        canaries: the site's canaries.
        key: the site's secret key of the split.
        accountant: charges the audit; None when the study is not private.
    """

    study: StudyConfig
    site: str
    folder: Path
    plan: AuditPlan
    training: PreparedCohort
    held_out: PreparedCohort
    canaries: Canaries
    key: bytes
    accountant: SiteAccountant | None


def open_audit(settings: SiteSettings, study: StudyConfig) -> SiteAudit:
    """The audit of a study at this site.

    Raises:
        BadPeer: no plan was registered before training, or it was for another roster.
        SiteError: the site never enrolled, or its prepared images are gone.
        PolicyError: the policy no longer allows the study.
    """
    kept = read_enrolled(settings, study)
    folder = settings.study_folder(study.digest)
    prepared = settings.folder / enrolled.PREPARED / kept.prepared
    return SiteAudit(
        study,
        settings.name,
        folder,
        audit_plan.registered(folder, study, pinned_roster(settings, study)),
        slices.reopen(prepared, name=enrolled.TRAINING),
        slices.reopen(prepared, name=enrolled.HELD_OUT),
        canaries_of(settings, study),
        cohort.holdout_key(settings.folder),
        open_accountant(settings, study, kept),
    )


def pinned_roster(settings: SiteSettings, study: StudyConfig) -> str:
    """The digest of the site's roster, "" in a study without secure aggregation."""
    if study.federation.aggregation != "secure":
        return ""
    return load_member(settings, Policy.load(settings.folder)).roster.digest


def count(at: SiteAudit, request: AuditRequest) -> MadeSum:
    """The noisy counts of the site's patients.

    Raises:
        BadPeer: the request is not what the plan says, or its images are not the generator's. Nothing is spent.
        SiteError: the site has no held-out patients to compare with. Nothing is spent.
        BudgetExhausted: every verdict that was planned is spent.
        OverBudget: a budget would be exceeded; nothing is charged.
        PrivacyError: the ledger cannot be trusted or written.
        ProtocolError: the audit was charged, and failed after that.
    """
    with locked(at.folder / "training.lock"):
        shown = _checked(at, request)
        if at.held_out.num_patients == 0 or at.training.num_patients == 0:
            raise SiteError("An audit needs patients that were trained on, and some that were not.")
        prepared = score.prepare_candidates(shown.images)
        edges = _scale(prepared, request.nearest)
        if at.accountant is not None:
            audit_charge.charge(at.folder, at.accountant, request.round)
        release = uuid.uuid4().hex
        try:
            updates.note_made(at.folder, release)
            found = _counts(at, request, prepared, edges)
            if at.accountant is not None:
                audit_charge.note_made(at.folder, at.accountant)
            noisy = found + _noise(at.study, len(edges) + 1)
        except (FederationError, OSError, ValueError) as error:  # others tell the server that nothing was spent
            raise ProtocolError(f"The audit was charged and failed: {error}") from error
        logger.info("audit: %d candidates compared with the site's patients", len(shown.images))
        return MadeSum(request.round, noisy, AUDIT_ENCODING, release)


def drop(at: SiteAudit, request: FilterRequest) -> MadeSum:
    """A random non-zero number for each candidate that this site drops, zero for the others.

    **Guarantee.** In a sum of such numbers modulo 2^32, zero says that nobody drops a candidate (or, once in 2^32, that
    several do), anything else that some site does: not which, not how many, nor whether as a decoy. A patient who is in
    no candidate changes nothing. One who is makes candidates drop that are dropped anyway with the chance of a decoy:
    an epsilon of log(1 / decoys) for each candidate dropped, in this one direction, beside the ledger. An image stays a
    decoy: who asks again hears of the same ones.

    Raises:
        BadPeer: these are not the candidates that the site has compared.
    """
    if request.round != at.study.filter_round:
        raise BadPeer("The server asks for the filter in another round than the study's.")
    pairs = load_pairs(at.folder)
    if (str(pairs.audit_digest), len(pairs.dropped)) != (request.audit_digest, request.count):
        raise BadPeer("The server filters other candidates than the site has compared.")
    words = np.zeros(request.count, np.int64)
    for index in np.flatnonzero(pairs.dropped):
        words[index] = 1 + secrets.randbelow(2**32 - 1)
    release = uuid.uuid4().hex
    updates.note_made(at.folder, release)
    return MadeSum(request.round, words, AUDIT_ENCODING, release)


# ---------------------------------------------------------------- what the server shows


def _checked(at: SiteAudit, request: AuditRequest) -> CandidateSet:
    """The candidates, after making them again. Raises BadPeer."""
    study, size = at.study, at.study.image.size
    if request.round != study.audit_round or request.plan_digest != at.plan.digest:
        raise BadPeer("The server asks for another audit than the plan that was registered before training.")
    indices, n = request.indices, len(request.indices)
    if n < at.plan.fewest_candidates:
        raise BadPeer(f"Expected at least {at.plan.fewest_candidates} candidates, found {n}.")
    are_indices = indices[0] >= 0 and indices[-1] < at.plan.generated and bool((np.diff(indices) > 0).all())
    if len(request.images) != n * size * size or len(request.nearest) != n or not are_indices:
        raise BadPeer("The candidates do not fit the study.", "Audit the run with the study that it was trained with.")
    try:
        own = made.generate(study, request.generator)
    except (ValueError, RuntimeError):
        raise BadPeer("The generator does not fit the study.") from None
    kept = np.zeros(at.plan.generated, bool)
    kept[indices] = True
    own = made.keep(own, kept)
    shown = CandidateSet(request.images.reshape(n, size, size), own.labels, indices)
    if made.largest_difference(shown, own) > TOLERANCE:
        raise BadPeer("Some candidates are not images of the generator that came with them.")
    return shown


def _scale(prepared: Candidates, nearest: Vector) -> Vector:
    """The bins that follow from the candidates' similarities to each other.

    Some of these are computed again, of which the server cannot know which: with others of its choice the audit would
    be about candidates of its choice.

    Raises:
        BadPeer: they are not what the server says, or give no scale.
    """
    number = max(_FEWEST_CHECKED, round(_CHECKED_SHARE * len(nearest)))
    among = np.sort(secrets.SystemRandom().sample(range(len(nearest)), number)).astype(np.int64)
    found = score.self_similarity(prepared, among)
    if not np.abs(found - nearest[among]).max() <= _NEAREST_TOLERANCE:  # false for NaN
        raise BadPeer("The candidates' similarities to each other are not what the server says.")
    try:
        return bin_edges(nearest)
    except ValueError as error:
        raise BadPeer(f"The candidates give no scale to compare with: {error}.") from None


# ---------------------------------------------------------------- counts


def _counts(at: SiteAudit, request: AuditRequest, prepared: Candidates, edges: Vector) -> NDArray[np.int64]:
    """(``counts.length(...)``,) int64: the counts of this site without noise. Keeps the comparison for the filter."""
    parts = (at.training, at.held_out, at.canaries)
    total, done = sum(len(part.images) for part in parts), 0
    compared = []
    for part in parts:
        compared.append(score.compare(prepared, request.nearest, part.images[:, 0], part.starts, _after(done, total)))
        done += len(part.images)
    training, held_out, canaries = compared
    save_pairs(at.folder, _pairs(at, request, training, held_out))
    halves = np.where(_halves(at), HELD_OUT_A, HELD_OUT_B)
    found = counts.count(
        np.concatenate([training.scores, held_out.scores]),
        np.concatenate([np.full(len(training.scores), TRAINING), halves]),
        np.concatenate([_classes(at.training), _classes(at.held_out)]),
        edges.tolist(),
        at.study.image.num_classes,
        canary_scores=canaries.scores,
        canary_included=at.canaries.included,
    )
    return counts.to_vector(found)


def _after(done: int, total: int) -> progress.Listener:
    """Reports a part's images as those after ``done`` of all."""
    return lambda images, _: progress.report(done + images, total)


def _classes(patients: PreparedCohort) -> NDArray[np.int64]:
    """(p,) the label that most images of each patient have; the first of those that are equally many."""
    bounds = zip(patients.starts[:-1], patients.starts[1:], strict=True)
    return np.array([np.bincount(patients.label_indices[first:last]).argmax() for first, last in bounds], np.int64)


def _halves(at: SiteAudit) -> NDArray[np.bool_]:
    """(p,) a coin for each held-out patient, by the site's key: two halves to compare with each other."""

    def coin(patient_id: str) -> bool:
        return bool(hmac.digest(at.key, b"audit half\x00" + patient_id.encode(), hashlib.sha256)[0] & 1)

    return np.array([coin(patient_id) for patient_id in at.held_out.patient_ids], bool)


def _noise(study: StudyConfig, num_bins: int) -> NDArray[np.int64]:
    """This site's share of the noise: none in the cells of canaries, who are nobody."""
    num_classes = study.image.num_classes
    noise = np.zeros(counts.length(num_classes, num_bins), np.int64)
    for group in range(counts.NUM_GROUPS):
        epsilon = study.audit.epsilon_training if group == TRAINING else study.audit.epsilon_held_out
        cells = counts.cells_of(group, num_classes, num_bins)
        noise[cells] = discrete_laplace.share(epsilon, study.num_noisy_in_audit, cells.stop - cells.start, os.urandom)
    return noise


def _decoys(at: SiteAudit, request: AuditRequest) -> NDArray[np.bool_]:
    """(n,) what this site drops for no reason: a coin for each image, by the site's key.

    Whoever asks twice, about others as well, finds the same ones: else two filters would tell decoys from matches.
    """
    chance = decoy_probability(at.plan.decoys, at.study.num_noisy_in_audit)
    images = f"{at.study.digest}/{made.generator_digest(request.generator)}"

    def coin(index: int) -> bool:
        found = hmac.digest(at.key, f"audit decoy\x00{images}/{index}".encode(), hashlib.sha256)
        return int.from_bytes(found[:8], "big") < chance * 2**64

    return np.array([coin(int(index)) for index in request.indices], bool)


def _pairs(at: SiteAudit, request: AuditRequest, training: Comparison, held_out: Comparison) -> Pairs:
    """What stays here: which candidates to drop, and the pairs that come closest."""
    limit = threshold(held_out, request.nearest, at.plan.filter_drop)
    shows = matched(training, request.nearest, limit)
    closest = np.argsort(-training.scores, kind="stable")[:MOST_PAIRS]
    size = at.study.image.size
    return Pairs(
        audit_digest=np.array(request.digest),
        matched=shows,
        dropped=shows | _decoys(at, request),
        threshold=np.array(limit),
        training_scores=training.scores,
        held_out_scores=held_out.scores,
        patients=closest,
        images=training.images[closest],
        candidates=training.candidates[closest],
        candidate_images=request.images.reshape(-1, size, size)[training.candidates[closest]],
        scores=training.scores[closest],
        sims=training.sims[closest],
        transforms=training.transforms[closest],
    )
