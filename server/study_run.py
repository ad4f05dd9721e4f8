"""The server's flow of a whole study: warm start, enrolment, rounds, and what the run leaves."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from common.config import StudyConfig
from common.errors import INTERNAL, BudgetExhausted, ConfigError, FederationError, TooFewSurvivors
from common.gan import losses, networks
from common.gan.devices import choose_device
from common.gan.parameters import load_vector
from common.messages import Enrolment, EnrolRequest, Refusal
from common.privacy import accounting
from common.privacy.plan import PrivacyPlan, make_plan
from server import charging, checkpoints, record, synthesis
from server.aggregation import GanState, aggregate
from server.channel import MALFORMED, Channel
from server.record import RunRecord, SiteRecord
from server.round import RoundAnswers, ask_sites, check_survivors
from server.warm_start import warm_start

logger = logging.getLogger("synthward.server")
NODES_TIMEOUT_SECONDS = 600.0
ENROLMENT_CHANGED = "enrolment_changed"


def run_study(
    study: StudyConfig,
    channel: Channel,
    out: Path,
    device: str,
    resume: bool,
    refused: Mapping[str, str] | None = None,
) -> RunRecord:
    """Train the study to its last round and write everything a run leaves into ``out``.

    Args:
        out: the run's folder; without a run in it unless ``resume``.
        device: ``auto``, ``cpu`` or ``cuda``, for the warm start and the record.
        resume: go on from the newest checkpoint in ``out``; a run that has none yet begins.
        refused: sites known to take no part, the code by name.

    Raises:
        ConfigError: ``out`` holds another run, or the study cannot be run.
        TooFewSurvivors: too few sites; the run's folder holds all rounds completed until then.
    """
    started = time.monotonic()
    torch_device = choose_device(device)
    plan = make_plan(study)
    if resume and (out / record.RUN_FILE).exists():
        run, state = _resume(study, out, torch_device)
    else:
        run, state = _begin(study, out, torch_device, plan, refused or {})
    before = run.seconds.get("total", 0.0)
    try:
        sites = _enrol(study, channel, run)
        while state.round < study.federation.rounds:
            round_started = time.monotonic()
            spent = charging.charge_ahead(study, plan, run, sites.values())
            run.save(out)  # what is charged, and the sites' commitments, are on disk before a site is asked
            answers = charging.refuse_impossible(study, plan, run, ask_sites(study, channel, sites, state))
            charging.settle(plan, run, answers, spent)
            if charging.is_spent(study, answers):
                run.error = BudgetExhausted.code
                logger.warning("the sites have spent all that the study planned after round %d", state.round)
                break
            check_survivors(study, state.round + 1, answers)
            state = aggregate(study, state, answers.updates)
            _keep(study, out, run, state, answers, round_started)
        run.status = "completed"
    except KeyboardInterrupt:
        run.status = "interrupted"
        raise
    except FederationError as error:
        run.status, run.error = "failed", error.code
        raise
    except Exception:
        run.status, run.error = "failed", INTERNAL
        raise
    finally:
        for site in run.sites:
            record.set_epsilon(site, "prv")
        run.seconds["total"] = round(before + time.monotonic() - started, 3)
        run.finished = record.now()
        run.save(out)
    return run


def _begin(
    study: StudyConfig, out: Path, device: torch.device, plan: PrivacyPlan | None, refused: Mapping[str, str]
) -> tuple[RunRecord, GanState]:
    if (out / record.RUN_FILE).exists():
        raise ConfigError(f"{out} already holds a run.", "Give another --out, or continue it with --resume.")
    for name in ("checkpoints", "samples"):
        (out / name).mkdir(parents=True, exist_ok=True)
    started = record.now()
    start = warm_start(study, device)
    run = RunRecord(
        started=started,
        study=study.model_dump(mode="json"),
        study_digest=study.digest,
        private=study.privacy.enabled,
        notice=record.notice(study, record_is_patient=False),
        versions=record.versions(),
        device=str(device),
        aggregation=study.federation.aggregation,
        noise_multiplier=plan.mechanism.noise_multiplier if plan else None,
        warm_start=start.record,
        refused_sites=dict(refused),
    )
    if start.record is not None:
        run.seconds["warm_start"] = start.record.seconds
    checkpoints.save(out / "checkpoints", start.state, run.notice)
    _save_samples(study, out, run, start.state)
    run.save(out)
    return run, start.state


def _resume(study: StudyConfig, out: Path, device: torch.device) -> tuple[RunRecord, GanState]:
    run = RunRecord.load(out)
    state = checkpoints.latest(out / "checkpoints")
    if run.study_digest != study.digest:
        raise ConfigError(f"{out} holds a run of another study.", "Resume it with the study it was started with.")
    if state is None:
        raise ConfigError(f"{out} holds no checkpoint to resume from.", "Start the run again with another --out.")
    run.status, run.error, run.finished = "running", "", None
    run.rounds_completed, run.device = state.round, str(device)
    for site in run.sites:  # the last round counts only if its checkpoint was written
        site.rounds = [number for number in site.rounds if number <= state.round]
    return run, state


def _enrol(study: StudyConfig, channel: Channel, run: RunRecord) -> dict[int, str]:
    """Ask every connected site to take part. Returns those that will, name by node id."""
    started = time.monotonic()
    contract, minimum = study.federation.contracted_patients, study.federation.minimum_sites
    nodes = channel.nodes(minimum, max(minimum, len(contract)), NODES_TIMEOUT_SECONDS)
    # A site checks all of its files before it answers, which takes as long as a round may.
    requests = dict.fromkeys(nodes, EnrolRequest(study.digest))
    answers = channel.ask(requests, "enrol", study.federation.round_timeout_seconds)
    sites: dict[int, str] = {}
    # A resumed run asks all sites of the contract anew; those refused in preparation are not in it.
    run.refused_sites = {name: code for name, code in run.refused_sites.items() if name not in contract}
    run.refused_nodes = []
    for node, answer in sorted(answers.items()):
        reply = answer.reply
        if isinstance(reply, Refusal):
            run.refused_nodes.append(reply.code)
        elif not isinstance(reply, Enrolment) or reply.site not in contract or reply.site in sites.values():
            run.refused_nodes.append(MALFORMED)
        elif not _enter(study, run, reply):
            run.refused_sites[reply.site] = ENROLMENT_CHANGED
        else:
            sites[node] = reply.site
    refusals = sorted([*run.refused_sites.values(), *run.refused_nodes])
    if refusals:
        logger.warning("sites that take no part: %s", ", ".join(refusals))
    order = list(contract)
    run.sites.sort(key=lambda site: order.index(site.name))
    run.notice = record.notice(study, any(site.record_is_patient for site in run.sites))
    run.seconds["enrolment"] = round(time.monotonic() - started, 3)
    if len(sites) < minimum:
        raise TooFewSurvivors(
            f"Expected at least {minimum} sites to enrol, got {len(sites)} (refused: {', '.join(refusals) or 'none'}).",
            "Look into the logs in the sites' folders; `synthward data check` says what a site would refuse.",
        )
    return sites


def _enter(study: StudyConfig, run: RunRecord, reply: Enrolment) -> bool:
    """Put a site into the record. False when a resumed run knows it with another split or privacy unit."""
    known = next((site for site in run.sites if site.name == reply.site), None)
    if known is not None:
        return reply == Enrolment(known.name, known.holdout_commitment, known.record_is_patient)
    trained, held_out = study.contracted_split(reply.site)
    delta = study.privacy.delta if study.privacy.enabled else None
    run.sites.append(
        SiteRecord(
            name=reply.site,
            epsilon=None if delta is None else 0.0,
            delta=delta,
            accountant="none" if delta is None else "rdp",
            patients_trained=trained,
            patients_held_out=held_out,
            holdout_commitment=reply.holdout_commitment,
            record_is_patient=reply.record_is_patient,
        )
    )
    return True


def _keep(
    study: StudyConfig, out: Path, run: RunRecord, state: GanState, answers: RoundAnswers, started: float
) -> None:
    """Write one round: pictures, figures and the record, then the checkpoint, which makes the round count."""
    waited = max(answers.seconds.values())
    _save_samples(study, out, run, state)
    sites: dict[str, dict[str, float | int | None]] = {}
    for name, update in answers.updates.items():
        site = run.site(name)
        site.rounds.append(state.round)
        sites[name] = {
            "seconds": round(answers.seconds[name], 3),
            "steps_charged": accounting.num_steps(update.history),
            "epsilon_rdp": site.epsilon,
        }
    run.rounds_completed = state.round
    run.save(out)
    line = {"round": state.round, "private": run.private, **_losses(study, state)}
    seconds = time.monotonic() - started
    parts = _rounded({"round": seconds, "waiting_for_sites": waited, "server": seconds - waited})
    record.append_metrics(out, {**line, "sites": sites, "refused": answers.refusals, "seconds": parts})
    checkpoints.save(out / "checkpoints", state, run.notice)


def _losses(study: StudyConfig, state: GanState, count: int = 64) -> dict[str, float]:
    """Losses of the shared networks on fresh fakes: no real image is read, so they cost nothing."""
    discriminator = networks.build_discriminator(study).eval()
    load_vector(discriminator, state.discriminator)
    labels = np.arange(count, dtype=np.int64) % study.image.num_classes
    fakes = synthesis.synthesize(study, state.generator, labels, study.seed + state.round)
    with torch.inference_mode():
        logits = discriminator(torch.from_numpy(fakes.images), torch.from_numpy(fakes.labels))
        generator = losses.generator_loss(study.gan.loss, logits).mean()
        fake = losses.fake_loss(study.gan.loss, logits).mean()
    return {"generator_loss": round(float(generator), 5), "discriminator_fake_loss": round(float(fake), 5)}


def _save_samples(study: StudyConfig, out: Path, run: RunRecord, state: GanState) -> None:
    grid = synthesis.sample_grid(study, state.generator_average)
    synthesis.save_png(out / "samples" / f"round-{state.round:04d}.png", grid, run.notice)


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in seconds.items()}
