"""A round of ``joint``: a sum over the sites at every discriminator step, the rest of training at the server."""

import logging
from pathlib import Path

import numpy as np
import torch

from common.config import StudyConfig
from common.errors import ConfigError, ProtocolError
from common.files import write_atomically
from common.noisy_sums import encoding_of, noise_for
from common.privacy.plan import PhasePlan
from server.aggregation import GanState
from server.joint_trainer import JointTrainer
from server.round import Charge, RoundOutcome, Session, Sums, WantedSession

logger = logging.getLogger("synthward.server")


def joint_round(
    study: StudyConfig, plan: PhasePlan | None, sums: Sums, trainer: JointTrainer, number: int, charge: Charge
) -> RoundOutcome:
    """One attempt at a round. A session that breaks off after some steps is a shorter round: they are paid for."""
    phase, length = study.phases[study.phase_number(number)], len(trainer.discriminator)
    encoding = encoding_of(noise_for(study, plan, length))
    step = np.float64(2.0**-encoding.fraction_bits)
    refusals: dict[str, str] = {}
    made, failure = 0, ""
    session: Session | None = None
    try:
        session = sums.session(WantedSession(number, phase.steps, length, encoding), charge, refusals)
        while made < phase.steps:
            found = session.step(trainer.discriminator)
            trainer.step(np.asarray(found.total, np.float64) * step)
            made += 1
    except ProtocolError as error:
        logger.warning("round %d: ended after %d of %d steps: %s", number, made, phase.steps, error)
        failure = str(error)
    answered = session.answered if session else ()
    if made == 0:
        return RoundOutcome(None, answered, refusals, failure)
    facts = {"joint_steps": made, "discriminator_steps_per_generator_step": trainer.rate.steps}
    return RoundOutcome(trainer.state(number), answered, refusals, facts=facts)


def open_trainer(
    study: StudyConfig, plan: PhasePlan | None, folder: Path, state: GanState, device: torch.device
) -> JointTrainer:
    """The trainer for the round after ``state``: as the round before left it, or new in the first of a phase."""
    patients = sum(study.contracted_split(site)[0] for site in study.federation.contracted_patients)
    batch = max(1, round(study.privacy.sampling_probability * patients))
    clip_norm = plan.clip_norm if plan else study.privacy.clip_norm
    path = trainer_path(folder, state.round)
    if path.exists():
        try:
            return JointTrainer.from_bytes(path.read_bytes(), study, batch, clip_norm, device)
        except ValueError as error:
            raise ConfigError(f"{path} is damaged: {error}.", "Delete it: the optimizers begin anew.") from None
    return JointTrainer(study, state, batch, clip_norm, device, study.seed + state.round)


def save_trainer(trainer: JointTrainer, folder: Path, number: int) -> None:
    """Keep what the next round goes on with, beside the checkpoint of this one; that of the round before goes."""
    write_atomically(trainer_path(folder, number), trainer.to_bytes())
    trainer_path(folder, number - 2).unlink(missing_ok=True)  # a kill before the checkpoint goes back by one round


def trainer_path(folder: Path, number: int) -> Path:
    """Where the trainer is kept after a round."""
    return folder / f"joint-trainer-{number:04d}.pt"
