"""The server's flow of a whole study: warm start, enrolment, rounds, and what the run leaves."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.config import StudyConfig
from common.errors import ConfigError, FederationError, TooFewSurvivors
from common.gan import losses, networks
from common.gan.devices import choose_device
from common.gan.parameters import load_vector
from common.messages import Enrolment, EnrolRequest
from common.privacy import accounting
from common.privacy.plan import make_plan
from server import checkpoints, record, synthesis
from server.aggregation import GanState
from server.channel import MALFORMED, Channel
from server.record import RunRecord, SiteRecord
from server.round import RoundResult, run_round
from server.warm_start import warm_start

logger = logging.getLogger("synthward.server")
ENROL_TIMEOUT_SECONDS = 600.0


def run_study(study: StudyConfig, channel: Channel, out: Path, device: str, resume: bool) -> RunRecord:
    """Train the study to its last round and write everything a run leaves into ``out``.

    Args:
        out: the run's folder; empty or absent unless ``resume``.
        device: ``auto``, ``cpu`` or ``cuda``, for the warm start.
        resume: go on from the newest checkpoint in ``out``.

    Raises:
        ConfigError: ``out`` holds another run, or the study cannot be run.
        TooFewSurvivors: too few sites; the run's folder holds all rounds completed until then.
    """
    started = time.monotonic()
    torch_device = choose_device(device)
    plan = make_plan(study)
    if resume:
        run, state = _resume(study, out)
    else:
        run, state = _begin(study, out, torch_device, plan.mechanism.noise_multiplier if plan else None)
    before = run.seconds.get("total", 0.0)
    try:
        sites = _enrol(study, channel, run)
        while state.round < study.federation.rounds:
            round_started = time.monotonic()
            result = run_round(study, channel, sites, state)
            waited = max(result.seconds.values())
            state = result.state
            _keep(study, out, run, result, time.monotonic() - round_started, waited)
        run.status, run.error = "completed", ""
    except KeyboardInterrupt:
        run.status = "interrupted"
        raise
    except FederationError as error:
        run.status, run.error = "failed", error.code
        raise
    finally:
        for site in run.sites:
            record.set_epsilon(site, "prv")
        run.seconds["total"] = round(before + time.monotonic() - started, 3)
        run.save(out)
    return run


def _begin(
    study: StudyConfig, out: Path, device: torch.device, noise_multiplier: float | None
) -> tuple[RunRecord, GanState]:
    if (out / record.RUN_FILE).exists():
        raise ConfigError(f"{out} already holds a run.", "Give another --out, or continue it with --resume.")
    for name in ("checkpoints", "samples"):
        (out / name).mkdir(parents=True, exist_ok=True)
    start = warm_start(study, device)
    run = RunRecord(
        study=study.model_dump(mode="json"),
        study_digest=study.digest,
        private=study.privacy.enabled,
        notice=record.notice(study, record_is_patient=False),
        versions=record.versions(),
        device=str(device),
        aggregation=study.federation.aggregation,
        noise_multiplier=noise_multiplier,
        warm_start=start.record,
    )
    if start.record is not None:
        run.seconds["warm_start"] = start.record.seconds
    checkpoints.save(out / "checkpoints", start.state)
    _save_samples(study, out, start.state)
    run.save(out)
    return run, start.state


def _resume(study: StudyConfig, out: Path) -> tuple[RunRecord, GanState]:
    run = RunRecord.load(out)
    state = checkpoints.latest(out / "checkpoints")
    if run.study_digest != study.digest:
        raise ConfigError(f"{out} holds a run of another study.", "Resume it with the study it was started with.")
    if state is None:
        raise ConfigError(f"{out} holds no checkpoint to resume from.", "Start the run again with another --out.")
    run.status = "running"
    run.rounds_completed = state.round
    return run, state


def _enrol(study: StudyConfig, channel: Channel, run: RunRecord) -> dict[int, str]:
    """Ask every connected site to take part. Returns those that will, name by node id."""
    started = time.monotonic()
    nodes = channel.nodes(study.federation.minimum_sites, ENROL_TIMEOUT_SECONDS)
    answers = channel.ask(dict.fromkeys(nodes, EnrolRequest(study.digest)), "enrol", ENROL_TIMEOUT_SECONDS)
    sites: dict[int, str] = {}
    run.refused_sites = {}
    for node, answer in answers.items():
        reply = answer.reply
        if isinstance(reply, Enrolment) and reply.site not in sites.values():
            sites[node] = reply.site
            _enter(study, run, reply)
        else:
            run.refused_sites[f"node {node}"] = getattr(reply, "code", MALFORMED)
            logger.warning("a site takes no part: %s", run.refused_sites[f"node {node}"])
    run.notice = record.notice(study, any(site.record_is_patient for site in run.sites))
    run.seconds["enrolment"] = round(time.monotonic() - started, 3)
    if len(sites) < study.federation.minimum_sites:
        raise TooFewSurvivors(
            f"Expected at least {study.federation.minimum_sites} sites to enrol, got {len(sites)}"
            f" (refused: {', '.join(sorted(run.refused_sites.values())) or 'none'}).",
            "Look into the logs in the sites' folders; `synthward data check` says what a site would refuse.",
        )
    return sites


def _enter(study: StudyConfig, run: RunRecord, reply: Enrolment) -> None:
    if any(site.name == reply.site for site in run.sites):  # a resumed run knows its sites
        return
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


def _keep(study: StudyConfig, out: Path, run: RunRecord, result: RoundResult, seconds: float, waited: float) -> None:
    """Write one completed round: checkpoint first, then pictures, figures and the record."""
    started = time.monotonic()
    state = result.state
    checkpoints.save(out / "checkpoints", state)
    _save_samples(study, out, state)
    sites: dict[str, dict[str, float | int | None]] = {}
    for name, update in result.updates.items():
        site = run.site(name)
        site.rounds = sorted({*site.rounds, state.round})
        site.mechanisms = record.mechanisms(update.history)
        record.set_epsilon(site, "rdp")
        sites[name] = {
            "seconds": round(result.seconds[name], 3),
            "steps_charged": accounting.num_steps(update.history),
            "epsilon_rdp": site.epsilon,
        }
    for name, code in result.refusals.items():
        refusals = run.site(name).refusals
        refusals[code] = refusals.get(code, 0) + 1
    for name, spent in result.seconds.items():
        run.site(name).seconds = round(run.site(name).seconds + spent, 3)
    run.rounds_completed = state.round
    run.save(out)
    server = seconds - waited + time.monotonic() - started
    record.append_metrics(
        out,
        {
            "round": state.round,
            **_losses(study, state),
            "sites": sites,
            "refused": dict(result.refusals),
            "seconds": _rounded({"round": waited + server, "waiting_for_sites": waited, "server": server}),
        },
    )


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


def _save_samples(study: StudyConfig, out: Path, state: GanState) -> None:
    grid = synthesis.sample_grid(study, state.generator_average)
    Image.fromarray(grid).save(out / "samples" / f"round-{state.round:04d}.png")


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in seconds.items()}
