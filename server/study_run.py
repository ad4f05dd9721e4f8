"""The server's flow of a whole study: warm start, enrolment, rounds, and what the run leaves."""

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.config import StudyConfig
from common.errors import BudgetExhausted, ConfigError, FederationError, TooFewSurvivors
from common.gan import losses, networks
from common.gan.devices import choose_device
from common.gan.parameters import load_vector
from common.messages import Enrolment, EnrolRequest, Refusal
from common.privacy import accounting
from common.privacy.plan import PrivacyPlan, make_plan
from server import checkpoints, record, synthesis
from server.aggregation import GanState, aggregate
from server.channel import MALFORMED, NO_ANSWER, Channel
from server.record import RunRecord, SiteRecord
from server.round import RoundAnswers, ask_sites, check_survivors
from server.warm_start import warm_start

logger = logging.getLogger("synthward.server")
ENROL_TIMEOUT_SECONDS = 600.0
INTERNAL_ERROR = "internal"


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
        device: ``auto``, ``cpu`` or ``cuda``, for the warm start.
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
        run, state = _resume(study, out)
    else:
        run, state = _begin(study, out, torch_device, plan, refused or {})
    before = run.seconds.get("total", 0.0)
    try:
        sites = _enrol(study, channel, run)
        while state.round < study.federation.rounds:
            round_started = time.monotonic()
            answers = ask_sites(study, channel, sites, state)
            _charge(plan, study, run, answers)
            if _is_spent(study, answers):
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
        run.status, run.error = "failed", INTERNAL_ERROR
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
    run.status, run.error, run.finished = "running", "", None
    run.rounds_completed = state.round
    for site in run.sites:  # the last round counts only if its checkpoint was written
        site.rounds = [number for number in site.rounds if number <= state.round]
    return run, state


def _enrol(study: StudyConfig, channel: Channel, run: RunRecord) -> dict[int, str]:
    """Ask every connected site to take part. Returns those that will, name by node id."""
    started = time.monotonic()
    contract, minimum = study.federation.contracted_patients, study.federation.minimum_sites
    nodes = channel.nodes(minimum, max(minimum, len(contract)), ENROL_TIMEOUT_SECONDS)
    answers = channel.ask(dict.fromkeys(nodes, EnrolRequest(study.digest)), "enrol", ENROL_TIMEOUT_SECONDS)
    sites: dict[int, str] = {}
    # Nodes are asked anew in a resumed run; a site's name is known only once it has enrolled.
    run.refused_sites = {name: code for name, code in run.refused_sites.items() if not name.startswith("node ")}
    for node, answer in sorted(answers.items()):
        reply = answer.reply
        if isinstance(reply, Enrolment) and reply.site in contract and reply.site not in sites.values():
            sites[node] = reply.site
            _enter(study, run, reply)
        else:
            run.refused_sites[f"node {node}"] = reply.code if isinstance(reply, Refusal) else MALFORMED
            logger.warning("a site takes no part: %s", run.refused_sites[f"node {node}"])
    order = list(contract)
    run.sites.sort(key=lambda site: order.index(site.name))
    run.notice = record.notice(study, any(site.record_is_patient for site in run.sites))
    run.seconds["enrolment"] = round(time.monotonic() - started, 3)
    if len(sites) < minimum:
        raise TooFewSurvivors(
            f"Expected at least {minimum} sites to enrol, got {len(sites)}"
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


def _charge(plan: PrivacyPlan | None, study: StudyConfig, run: RunRecord, answers: RoundAnswers) -> None:
    """Take over what each site has spent, whatever becomes of the round."""
    for name, update in answers.updates.items():
        run.site(name).mechanisms = record.mechanisms(update.history)
    for name, code in answers.refusals.items():
        site = run.site(name)
        site.refusals[code] = site.refusals.get(code, 0) + 1
        if plan is not None:
            _charge_unseen(plan, study, site, code)
    for name, seconds in answers.seconds.items():
        site = run.site(name)
        site.seconds = round(site.seconds + seconds, 3)
        record.set_epsilon(site, "rdp")


def _charge_unseen(plan: PrivacyPlan, study: StudyConfig, site: SiteRecord, code: str) -> None:
    """Charge a site as planned for what it spent and the server cannot read; its next update says what is true.

    An update that came too late, or in a form that does not fit, has left the site too. A site whose budget is
    exhausted has spent the whole plan: an interrupted round is paid for and lost.
    """
    spent = record.history(site)
    left = plan.mechanism.steps - accounting.num_steps(spent)
    steps = {NO_ANSWER: study.federation.local_steps, MALFORMED: study.federation.local_steps}.get(code, 0)
    steps = left if code == BudgetExhausted.code else min(steps, left)
    if steps > 0:
        site.mechanisms = record.mechanisms(accounting.append(spent, replace(plan.mechanism, steps=steps)))


def _is_spent(study: StudyConfig, answers: RoundAnswers) -> bool:
    """Whether the round fails for nothing but spent budgets, as after an interruption: then training is over."""
    spent = sum(code == BudgetExhausted.code for code in answers.refusals.values())
    return len(answers.updates) < study.federation.minimum_sites <= len(answers.updates) + spent


def _keep(
    study: StudyConfig, out: Path, run: RunRecord, state: GanState, answers: RoundAnswers, started: float
) -> None:
    """Write one round: pictures, figures and the record, then the checkpoint, which makes the round count."""
    waited = max(answers.seconds.values())
    _save_samples(study, out, state)
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
    line = {"round": state.round, **_losses(study, state), "sites": sites, "refused": answers.refusals}
    seconds = time.monotonic() - started
    line["seconds"] = _rounded({"round": seconds, "waiting_for_sites": waited, "server": seconds - waited})
    record.append_metrics(out, line)
    checkpoints.save(out / "checkpoints", state)


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
