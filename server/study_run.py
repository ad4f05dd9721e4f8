"""The server's flow of a whole study: warm start, enrolment, rounds, and what the run leaves."""

import logging
import secrets
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.audit.candidates import generator_digest
from common.config import StudyConfig
from common.errors import INTERNAL, BudgetExhausted, ConfigError, FederationError, TooFewSurvivors
from common.gan import losses, networks
from common.gan.devices import choose_device
from common.gan.parameters import load_vector
from common.gan.synthesis import synthesize
from common.phases import choose
from common.privacy import accounting
from common.privacy.accounting import History
from common.privacy.plan import PrivacyPlan, make_plan
from server import charging, checkpoints, record
from server.aggregation import GanState
from server.audit_plan import register_plan
from server.channel import Channel
from server.enrolment import enrol
from server.record import RunRecord
from server.round import RoundOutcome
from server.rounds import Rounds, sums_over
from server.synthesis import sample_grid, save_png
from server.warm_start import warm_start

logger = logging.getLogger("synthward.server")
ATTEMPTS_A_ROUND = 2


def run_study(
    study: StudyConfig,
    channel: Channel,
    out: Path,
    device: str,
    resume: bool,
    refused: Mapping[str, str] | None = None,
    signature: bytes = b"",
) -> RunRecord:
    """Train the study to its last round and write everything a run leaves into ``out``.

    Args:
        out: the run's folder; without a run in it unless ``resume``.
        device: ``auto``, ``cpu`` or ``cuda``, for the warm start and the record.
        resume: go on from the newest checkpoint in ``out``; a run that has none yet begins.
        refused: sites known to take no part, the code by name.
        signature: of the study (``common/study_signature.py``); empty for none.

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
        enrolled = enrol(study, channel, run, plan, signature)
        register_plan(study, channel, enrolled, out)
        sums = sums_over(study, channel, enrolled)
        rounds = Rounds(study, plan, sums, torch_device, out / "checkpoints")
        attempts = 0
        while state.round < study.total_rounds:
            clock = _Clock(channel)
            outcome = _attempt(study, plan, out, run, rounds, state)
            attempts += 1
            if outcome.state is not None:
                state, attempts = outcome.state, 0
                _keep(study, out, run, state, outcome, clock)
            elif charging.is_spent(study, outcome, len(enrolled)):
                run.error = BudgetExhausted.code
                last = study.last_round(study.phase_number(state.round + 1))
                logger.warning("the sites have spent what the study planned for rounds %d to %d", state.round + 1, last)
                state, attempts = replace(state, round=last), 0  # the phases after this one have noise of their own
            elif attempts == ATTEMPTS_A_ROUND:
                codes = ", ".join(f"{site}: {code}" for site, code in sorted(outcome.refusals.items()))
                raise TooFewSurvivors(
                    f"{outcome.failure} ({codes or 'no refusals'})",
                    "Look into the log in the folders of the sites that are named, then resume the run.",
                )
        run.generator_digest = generator_digest(state.generator_average)
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


def _attempt(
    study: StudyConfig, plan: PrivacyPlan | None, out: Path, run: RunRecord, rounds: Rounds, state: GanState
) -> RoundOutcome:
    """One attempt at the next round, charged before a site trains and settled whatever becomes of it."""
    before: dict[str, History] = {}

    def charge(names: tuple[str, ...]) -> None:
        before.update(charging.charge_ahead(study, plan, run, state.round + 1, names))
        run.save(out)

    outcome = rounds.run(state, charge)
    charging.settle(study, plan, run, state.round + 1, outcome, before)
    return outcome


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
        run=secrets.token_hex(8),
        started=started,
        study=study.model_dump(mode="json"),
        study_digest=study.digest,
        private=study.privacy.enabled,
        notice=record.notice(study, record_is_patient=False),
        versions=record.versions(),
        device=str(device),
        aggregation=study.federation.aggregation,
        phases=record.phases(study, plan),
        phases_chosen=choose(study).reason if study.federation.algorithm == "auto" else "",
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


class _Clock:
    """How long a round takes, and how much of it the server waits."""

    def __init__(self, channel: Channel) -> None:
        self._channel, self._started, self._waited = channel, time.monotonic(), channel.waited_seconds

    def seconds(self) -> dict[str, float]:
        whole, waited = time.monotonic() - self._started, self._channel.waited_seconds - self._waited
        parts = {"round": whole, "waiting_for_sites": waited, "server": whole - waited}
        return {name: round(value, 3) for name, value in parts.items()}


def _keep(study: StudyConfig, out: Path, run: RunRecord, state: GanState, outcome: RoundOutcome, clock: _Clock) -> None:
    """Write one round: pictures, figures and the record, then the checkpoint, which makes the round count."""
    _save_samples(study, out, run, state)
    sites: dict[str, dict[str, float | int | None]] = {}
    for name in outcome.answered:
        site = run.site(name)
        site.rounds.append(state.round)
        sites[name] = {"steps_charged": accounting.num_steps(record.history(site)), "epsilon_rdp": site.epsilon}
    run.rounds_completed = state.round
    run.save(out)
    algorithm = study.phases[study.phase_number(state.round)].algorithm
    line: dict[str, Any] = {"round": state.round, "algorithm": algorithm, "private": run.private}
    line |= {**_losses(study, state), **outcome.facts}
    refused = dict(outcome.refusals)
    record.append_metrics(out, {**line, "sites": sites, "refused": refused, "seconds": clock.seconds()})
    checkpoints.save(out / "checkpoints", state, run.notice)


def _losses(study: StudyConfig, state: GanState, count: int = 64) -> dict[str, float]:
    """Losses of the shared networks on fresh fakes: no real image is read, so they cost nothing."""
    discriminator = networks.build_discriminator(study).eval()
    load_vector(discriminator, state.discriminator)
    labels = np.arange(count, dtype=np.int64) % study.image.num_classes
    fakes = synthesize(study, state.generator, labels, study.seed + state.round)
    with torch.inference_mode():
        logits = discriminator(torch.from_numpy(fakes.images), torch.from_numpy(fakes.labels))
        generator = losses.generator_loss(study.gan.loss, logits).mean()
        fake = losses.fake_loss(study.gan.loss, logits).mean()
    return {"generator_loss": round(float(generator), 5), "discriminator_fake_loss": round(float(fake), 5)}


def _save_samples(study: StudyConfig, out: Path, run: RunRecord, state: GanState) -> None:
    grid = sample_grid(study, state.generator_average)
    save_png(out / "samples" / f"round-{state.round:04d}.png", grid, run.notice)
