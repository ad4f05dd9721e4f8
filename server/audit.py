"""The server's flow of an audit: candidates, one noisy sum of counts, the verdict, and the filter if it is PASS.

What the sites are asked for is written down before they are asked, and what they answered before anything is made of
it: an audit that was interrupted goes on, and costs nothing twice.
"""

import io
import json
import logging
import math
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from numpy.typing import NDArray

from common.audit import counts
from common.audit.bins import NUM_BINS, bin_edges
from common.audit.candidates import CandidateSet, generator_digest
from common.audit.counts import CountNoise
from common.audit.plan import AuditPlan, SignedPlan, load_signed_plan
from common.audit.verdict import PASS, Verdict, decide, no_release
from common.config import StudyConfig, holdout_share
from common.errors import ConfigError, TooFewSurvivors
from common.files import write_atomically
from common.messages import AuditRequest, FilterRequest, Vector
from common.privacy.plan import make_plan
from common.secagg.encoding import Encoding
from server import charging, checkpoints, record
from server.audit_plan import PLAN_FILE
from server.candidates import Candidates, Collapsed, make_candidates
from server.channel import Channel
from server.coordinator import coordinator_key
from server.enrolment import enrol
from server.record import RunRecord
from server.round import Charge, Sums, WantedSum
from server.rounds import sums_over

logger = logging.getLogger("synthward.server")
AUDIT_FILE, FOLDER = "audit.json", "audit"
CANDIDATES_FILE, COUNTS_FILE, FILTER_FILE = "candidates.npz", "counts.npz", "filter.npz"
AUDIT_VERSION = 1
ENCODING = Encoding(1.0, 0, 32)
_LABEL = b"synthward audit v1\x00"  # a key signs other things too: no signature of one kind passes for another


@dataclass(frozen=True)
class Answer:
    """A sum over the sites: (length,) int64, and who is in it."""

    total: NDArray[np.int64]
    answered: tuple[str, ...]


def run_audit(study: StudyConfig, channel: Channel, out: Path, signature: bytes = b"") -> dict[str, Any]:
    """Audit the final generator of a finished run. Returns what ``audit.json`` in its folder says then.

    Args:
        study: of the run.
        channel: to the sites.
        out: the run's folder.
        signature: of the study; empty for none.

    Raises:
        ConfigError: no finished run, no plan from before its training, a checkpoint that is not the run's, or a verdict
            that is there already.
        TooFewSurvivors: a site that was trained with did not answer; the run's record says what was charged.
    """
    run, generator = _audited(study, out)
    signed = load_signed_plan(out / PLAN_FILE)
    (out / FOLDER).mkdir(exist_ok=True)
    candidates, sums = _read_candidates(out, generator), None
    if candidates is None:
        sums = _sums(study, channel, out, run, signature)  # whether all are there, before the long work
        try:
            candidates = make_candidates(study, generator)
        except Collapsed as error:
            return _write(out, study, signed, generator, None, no_release(str(error)), None)
        _keep_candidates(out, generator, candidates)
    request = _request(study, signed.plan, generator, candidates)
    counted = _read(out / FOLDER / COUNTS_FILE, request.digest)
    kept = _read(out / FOLDER / FILTER_FILE, request.digest)
    if counted is None:
        sums = sums or _sums(study, channel, out, run, signature)
        counted = _count(study, out, run, sums, request)
    verdict = _decide(study, run, signed.plan, candidates, counted)
    if verdict.outcome == PASS and kept is None:
        sums = sums or _sums(study, channel, out, run, signature)
        kept = _filter(study, out, run, sums, request)
    return _write(out, study, signed, generator, candidates, verdict, kept)


def read_audit(out: Path) -> dict[str, Any] | None:
    """What ``audit.json`` in a run's folder says; None when the run was not audited."""
    path = out / AUDIT_FILE
    return dict(json.loads(path.read_bytes())) if path.exists() else None


# ---------------------------------------------------------------- before the sites are asked


def _audited(study: StudyConfig, out: Path) -> tuple[RunRecord, Vector]:
    """The run and its final generator. Raises ConfigError unless it can be audited now."""
    run = RunRecord.load(out)
    if run.study_digest != study.digest:
        raise ConfigError(f"{out} holds a run of another study.", "Audit it with the study it was trained with.")
    if run.status != "completed":
        raise ConfigError(f"The run in {out} is {run.status}.", "Resume it to its end, then audit it.")
    if (out / AUDIT_FILE).exists():
        raise ConfigError(
            f"{out} has a verdict already: {AUDIT_FILE}.",
            "It stands. Another one needs another training run: the plan allows no second try.",
        )
    if not (out / PLAN_FILE).exists():
        raise ConfigError(f"{out} has no {PLAN_FILE}: none was registered before its training.", "Train anew.")
    state = checkpoints.latest(out / "checkpoints")
    if state is None or generator_digest(state.generator_average) != run.generator_digest:
        raise ConfigError(
            f"The newest checkpoint in {out} is not what the run ended with: its generator's digest should be "
            f"{run.generator_digest}.",
            "Restore the checkpoint.",
        )
    return run, state.generator_average


def _request(study: StudyConfig, plan: AuditPlan, generator: Vector, candidates: Candidates) -> AuditRequest:
    return AuditRequest(
        study.digest,
        study.audit_round,
        plan.digest,
        generator,
        candidates.kept.indices,
        candidates.kept.images.ravel(),
        candidates.nearest,
    )


def _keep_candidates(out: Path, generator: Vector, candidates: Candidates) -> None:
    """For an audit that goes on after an interruption, and for the release, which takes images from here."""
    buffer, kept = io.BytesIO(), candidates.kept
    np.savez_compressed(
        buffer,
        generator=generator_digest(generator),
        generated=candidates.generated,
        images=kept.images,
        labels=kept.labels,
        indices=kept.indices,
        nearest=candidates.nearest,
    )
    write_atomically(out / FOLDER / CANDIDATES_FILE, buffer.getvalue())


def _read_candidates(out: Path, generator: Vector) -> Candidates | None:
    """Those that were made of this generator before. Raises ConfigError for a damaged file."""
    path = out / FOLDER / CANDIDATES_FILE
    if not path.exists():
        return None
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as saved:
            if str(saved["generator"]) != generator_digest(generator):
                return None
            kept, nearest = CandidateSet(saved["images"], saved["labels"], saved["indices"]), saved["nearest"]
            return Candidates(int(saved["generated"]), kept, nearest, bin_edges(nearest))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} is damaged: {type(error).__name__}.", "Delete it: it is made again.") from None


# ---------------------------------------------------------------- the sites


def _sums(study: StudyConfig, channel: Channel, out: Path, run: RunRecord, signature: bytes) -> Sums:
    """Sums over exactly the sites that were trained with. Raises TooFewSurvivors when one of them is not there."""
    trained = _trained(run)
    enrolled = enrol(study, channel, run, make_plan(study), signature)
    run.save(out)
    missing = sorted(trained - {site.site for site in enrolled.values()})
    if missing:
        codes = ", ".join(f"{name}: {run.refused_sites.get(name, 'no answer')}" for name in missing)
        raise TooFewSurvivors(
            f"An audit needs every site that was trained with; missing: {codes}.",
            "Look into the logs of these sites, then audit again: nothing was charged.",
        )
    return sums_over(study, channel, {node: site for node, site in enrolled.items() if site.site in trained})


def _count(study: StudyConfig, out: Path, run: RunRecord, sums: Sums, request: AuditRequest) -> Answer:
    """The noisy counts of all sites, charged in the record before any site is asked."""

    def charge(names: tuple[str, ...]) -> None:
        charging.charge_audit(study, run, names)
        run.save(out)

    length = counts.length(study.image.num_classes, NUM_BINS)
    answer = _sum(sums, WantedSum(request, length, ENCODING), charge, _trained(run))
    _save(out / FOLDER / COUNTS_FILE, request.digest, answer)
    charging.note_audited(run, answer.answered)
    run.save(out)
    return answer


def _filter(study: StudyConfig, out: Path, run: RunRecord, sums: Sums, request: AuditRequest) -> Answer:
    """A number for each candidate: 0 where no site drops it."""
    question = FilterRequest(study.digest, study.filter_round, request.digest, len(request.indices))
    answer = _sum(sums, WantedSum(question, question.count, ENCODING), lambda names: None, _trained(run))
    _save(out / FOLDER / FILTER_FILE, request.digest, answer)
    return answer


def _sum(sums: Sums, wanted: WantedSum, charge: Charge, sites: Collection[str]) -> Answer:
    """Over all of these sites. Raises TooFewSurvivors."""
    found = sums.sum(wanted, charge)
    missing = sorted(set(sites) - set(found.answered))
    if found.total is None or missing:
        codes = ", ".join(f"{name}: {found.refusals.get(name, 'no answer')}" for name in missing)
        raise TooFewSurvivors(
            f"{found.failure or 'An audit counts only what all sites answer.'} Missing: {codes or 'none'}.",
            "Look into the logs of these sites. What was charged stands in run.json and in their ledgers.",
        )
    return Answer(np.rint(found.total).astype(np.int64), found.answered)


def _trained(run: RunRecord) -> frozenset[str]:
    """The sites whose patients are in the generator."""
    return frozenset(site.name for site in run.sites if site.rounds)


# ---------------------------------------------------------------- what they answered


def _save(path: Path, request_digest: str, answer: Answer) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, request=request_digest, total=answer.total, answered=np.array(answer.answered, np.str_))
    write_atomically(path, buffer.getvalue())


def _read(path: Path, request_digest: str) -> Answer | None:
    """What stands there, when it answers this request. Raises ConfigError for a damaged file."""
    if not path.exists():
        return None
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as saved:
            if str(saved["request"]) != request_digest:
                raise ValueError("it answers another request")
            return Answer(saved["total"], tuple(str(name) for name in saved["answered"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        remedy = "Restore it. Without it the sites must be asked, and charge, again."
        raise ConfigError(f"{path} cannot be used: {error}.", remedy) from None


def _decide(study: StudyConfig, run: RunRecord, plan: AuditPlan, candidates: Candidates, counted: Answer) -> Verdict:
    contract = study.federation.contracted_patients
    split = [study.contracted_split(name) for name in counted.answered]
    found = counts.from_vector(counted.total, study.image.num_classes, NUM_BINS)
    noise = CountNoise(plan.epsilon_training, plan.epsilon_held_out, len(counted.answered), plan.noisy_sites)
    return decide(
        found,
        edges=candidates.edges.tolist(),
        noise=noise,
        certified_epsilon=study.privacy.epsilon if study.privacy.enabled else math.inf,
        delta=study.privacy.delta,
        training_patients=sum(trained for trained, _ in split),
        held_out_patients=sum(held_out for _, held_out in split),
        smallest_share=min(holdout_share(contract[name]) for name in counted.answered),
    )


# ---------------------------------------------------------------- audit.json


def _write(
    out: Path,
    study: StudyConfig,
    signed: SignedPlan,
    generator: Vector,
    candidates: Candidates | None,
    verdict: Verdict,
    kept: Answer | None,
) -> dict[str, Any]:
    """Sign and write the verdict with what it is about."""
    run = RunRecord.load(out)
    dropped = np.zeros(0, bool) if kept is None else kept.total != 0
    facts: dict[str, Any] = {
        "version": AUDIT_VERSION,
        "time": record.now(),
        "run": run.run,
        "study_digest": study.digest,
        "private": run.private,
        "plan": signed.plan.model_dump(mode="json"),
        "plan_digest": signed.plan.digest,
        "generator_digest": generator_digest(generator),
        "candidates": _candidate_facts(candidates),
        "verdict": asdict(verdict),
        "filter": None if kept is None else _filter_facts(signed.plan, dropped),
        "spent": {"training": signed.plan.epsilon_training, "held_out": signed.plan.epsilon_held_out}
        if candidates is not None
        else {"training": 0.0, "held_out": 0.0},
    }
    content = sign_facts(facts, out)
    write_atomically(out / AUDIT_FILE, (json.dumps(content, indent=2) + "\n").encode())
    return content


def _candidate_facts(candidates: Candidates | None) -> dict[str, Any] | None:
    if candidates is None:
        return None
    return {"generated": candidates.generated, "audited": len(candidates.kept.images), "root": candidates.kept.root}


def _filter_facts(plan: AuditPlan, dropped: NDArray[np.bool_]) -> dict[str, Any]:
    return {
        "dropped": int(dropped.sum()),
        "kept": int((~dropped).sum()),
        "epsilon_one_sided": math.log(1 / plan.decoys),
        "kept_candidates": np.flatnonzero(~dropped).tolist(),
    }


def sign_facts(facts: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """The facts with the coordinator's public key and signature, hex."""
    key = coordinator_key(out)
    signature = key.sign(_LABEL + _canonical(facts))
    return {**facts, "key": key.public_key().public_bytes_raw().hex(), "signature": signature.hex()}


def is_signed(content: Mapping[str, Any]) -> bool:
    """Whether the key in an ``audit.json`` has signed the rest of it."""
    facts = {name: value for name, value in content.items() if name not in ("key", "signature")}
    try:
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(content["key"]))
        public.verify(bytes.fromhex(content["signature"]), _LABEL + _canonical(facts))
    except (InvalidSignature, ValueError, KeyError, TypeError):
        return False
    return True


def _canonical(facts: Mapping[str, Any]) -> bytes:
    return json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()
