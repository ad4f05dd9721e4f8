"""The site's flow of one round: shared state in, local DP-GAN steps, update out."""

import hashlib
import io
import logging
import secrets
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from client import updates
from client.accountant import SiteAccountant
from client.data.slices import PreparedCohort
from client.phases import phase_asked
from client.updates import MadeUpdate
from common import progress
from common.config import PhaseConfig, StudyConfig
from common.errors import BadPeer, FederationError, LedgerError, PrivacyError, ProtocolError, SiteError
from common.files import locked, write_atomically
from common.gan.devices import choose_device
from common.gan.parameters import load_vector, to_vector
from common.gan.training import GanTrainer, RealBatch
from common.messages import TrainRequest, Vector
from common.privacy.plan import PhasePlan, check_delta
from common.privacy.sampling import draw_patients

logger = logging.getLogger("synthward.site")
STATE_FILE = "state.pt"


@dataclass(frozen=True)
class SiteStudy:
    """One study at one site.

    Args:
        study: the study.
        site: the site's name.
        folder: where this study's state lives at the site.
        cohort: prepared images of the training patients.
        num_patients: training patients by contract, a public number; the expected batch is a share of it.
        device: ``auto``, ``cpu`` or ``cuda``.
        accountant: charges what is about to be released; None when the study is not private.
        canaries: phantoms that are trained on like patients, and counted nowhere; None for none.
    """

    study: StudyConfig
    site: str
    folder: Path
    cohort: PreparedCohort
    num_patients: int
    device: str
    accountant: SiteAccountant | None
    canaries: PreparedCohort | None = None

    @property
    def trained(self) -> tuple[PreparedCohort, ...]:
        """All that a step draws from and a sum is over: the patients, then the canaries."""
        return (self.cohort, self.canaries) if self.canaries is not None else (self.cohort,)

    @property
    def expected_batch_size(self) -> int:
        """Expected number of patients a step, at least 1. Public."""
        return max(1, round(self.study.privacy.sampling_probability * self.num_patients))


def train_round(at: SiteStudy, request: TrainRequest) -> MadeUpdate:
    """Train one round, one process at a time: two would release two updates under one charge. See ``_train_round``."""
    with locked(at.folder / "training.lock"):
        return _train_round(at, request)


def _train_round(at: SiteStudy, request: TrainRequest) -> MadeUpdate:
    """Train both networks for one round and return their differences.

    A round that this site has already finished from the same shared state is answered from its state file: the update
    is out of the mechanism already, so repeating it costs nothing. One that has left masked is trained anew
    (``client/updates.py``). A round that was stopped between two steps goes on where it stopped, under the charge that
    was made for it, with the patients that were charged. What a crash cut off is paid for and lost.

    Raises:
        KeyboardInterrupt: the listener to the progress stopped the work; what was done is kept.
        BudgetExhausted: every step that the study planned is spent.
        OverBudget: the site's budget would be exceeded; nothing is charged.
        PrivacyError: delta does not suit the cohort, or the ledger cannot be trusted or written.
        ProtocolError: the round was charged, and failed after that.
        OSError: the state cannot be written.
    """
    phase, plan = phase_asked(at.study, request.round, "local"), phase_plan(at, request.round)
    saved = _load_state(at.folder)
    if saved is not None and at.accountant is not None and not at.accountant.history:
        raise LedgerError(f"{at.folder} has a trained state that the ledger does not know.", "Restore the ledger.")
    known = updates.read(at.folder)  # before anything is charged: a damaged file refuses
    if saved is not None and not (at.folder / updates.FILE_NAME).exists():
        raise PrivacyError(f"{at.folder} has a trained state but no {updates.FILE_NAME}.", "Restore that file.")

    source, patients = request.digest, at.accountant.data_set.digest if at.accountant else ""
    same = saved is not None and saved["source"] == source and saved["id"] == known.made and known.pending
    if saved is not None and same and saved["step"] == saved["num_steps"]:
        logger.info("round %d: answered again from the saved state", request.round)
        return _weighted(
            at, request.round, str(saved["id"]), saved["generator"].numpy(), saved["discriminator"].numpy()
        )

    trainer = _restore(at, plan, request, saved)  # refuses a shared state that does not fit before anything is charged
    if saved is not None and same and saved["data_set"] == patients:  # the charge was for these patients
        update_id, step, num_steps = str(saved["id"]), int(saved["step"]), int(saved["num_steps"])
        load_vector(trainer.generator, request.generator + saved["generator"].numpy())
        load_vector(trainer.discriminator, request.discriminator + saved["discriminator"].numpy())
        logger.info("round %d: goes on after step %d", request.round, step)
    else:
        update_id, step, num_steps = uuid.uuid4().hex, 0, _charge(at, phase, request.round)

    def update() -> tuple[Vector, Vector]:
        return (
            to_vector(trainer.generator) - request.generator,
            to_vector(trainer.discriminator) - request.discriminator,
        )

    def keep(step: int) -> None:
        updates.note_made(at.folder, update_id)
        made = {"id": update_id, "source": source, "step": step, "num_steps": num_steps, "data_set": patients}
        _save_state(at.folder, made, trainer, *update())

    try:
        _train(at, trainer, range(step, num_steps), request.round, keep)
        keep(num_steps)
    except FederationError as error:  # a code of its own: others tell the server that nothing was spent
        raise ProtocolError(f"The round was charged and failed: {error}") from error
    return _weighted(at, request.round, update_id, *update())


def _weighted(at: SiteStudy, number: int, update_id: str, generator: Vector, discriminator: Vector) -> MadeUpdate:
    """The update as it is summed: the server divides by the weights of those in the sum."""
    weight = np.float32(at.study.site_weight(at.site))
    return MadeUpdate(number, np.concatenate([generator, discriminator]) * weight, update_id)


def phase_plan(at: SiteStudy, number: int) -> PhasePlan | None:
    """The plan by which the site is charged: its noise is the one that is made. None when the study is not private.

    Raises:
        LedgerError: the study is private and there is no ledger.
        PrivacyError: the study's delta does not suit the cohort.
    """
    if not at.study.privacy.enabled:
        return None
    if at.accountant is None:
        raise LedgerError("The study is private and has no ledger to charge.", "Nothing was trained.")
    check_delta(at.accountant.plan.delta, at.study.federation.contracted_patients[at.site])
    return at.accountant.phase(number)


def _charge(at: SiteStudy, phase: PhaseConfig, number: int) -> int:
    """Charge this round's steps before the first gradient. Returns how many steps to make."""
    return at.accountant.charge_round(number) if at.accountant else phase.steps


def _train(at: SiteStudy, trainer: GanTrainer, steps: range, number: int, keep: Callable[[int], None]) -> None:
    """Discriminator steps on Poisson draws of patients, generator steps after every few of them."""
    every = at.study.gan.discriminator_steps_per_generator_step
    loss, non_finite = 0.0, 0
    for step in steps:
        step_loss, step_non_finite = trainer.discriminator_step(draw(at))
        loss, non_finite = loss + step_loss, non_finite + step_non_finite
        if (step + 1) % every == 0:
            trainer.generator_step()
        try:
            progress.report(step + 1, steps.stop)
        except KeyboardInterrupt:
            keep(step + 1)
            raise
    # Site's own log: these figures derive from patients and go nowhere else.
    mean_loss = loss / max(1, len(steps))
    logger.info("round %d: %d steps, loss %.4f, %d non-finite", number, len(steps), mean_loss, non_finite)


def draw(at: SiteStudy) -> RealBatch:
    """Poisson-sample patients, then a few images of each. Every canary is a coin of its own, like a patient."""
    privacy = at.study.privacy
    random = secrets.SystemRandom()
    images = [np.zeros((0, *at.cohort.images.shape[1:]), np.float32)]
    labels, owners = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    everybody = (
        (cohort, int(patient))
        for cohort in at.trained
        for patient in draw_patients(cohort.num_patients, privacy.sampling_probability)
    )
    for position, (cohort, patient) in enumerate(everybody):
        drawn, drawn_labels = cohort.draw(patient, privacy.images_per_patient, random)
        images.append(drawn)
        labels.append(drawn_labels)
        owners.append(np.full(len(drawn), position, np.int64))
    return RealBatch(np.concatenate(images), np.concatenate(labels), np.concatenate(owners))


def _restore(at: SiteStudy, plan: PhasePlan | None, request: TrainRequest, saved: dict[str, Any] | None) -> GanTrainer:
    """A trainer at the shared state, with the optimizers as this site left them."""
    seed = hashlib.sha256(f"{at.study.seed}/{at.site}/{request.round}".encode()).digest()
    trainer = GanTrainer(
        at.study, choose_device(at.device), plan, at.expected_batch_size, int.from_bytes(seed[:7], "big")
    )
    try:
        load_vector(trainer.generator, request.generator)
        load_vector(trainer.discriminator, request.discriminator)
    except ValueError as error:
        raise BadPeer(f"The shared state does not fit the study: {error}.", "Nothing was spent.") from None
    if saved is not None:
        trainer.generator_optimizer.load_state_dict(saved["generator_optimizer"])
        trainer.discriminator_optimizer.load_state_dict(saved["discriminator_optimizer"])
    return trainer


def _load_state(folder: Path) -> dict[str, Any] | None:
    path = folder / STATE_FILE
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise SiteError(
            f"{path} is damaged ({type(error).__name__}).",
            "Delete it: the optimizers start anew, what was spent stays.",
        ) from None
    return state


def _save_state(
    folder: Path, progress_made: dict[str, Any], trainer: GanTrainer, generator: Vector, discriminator: Vector
) -> None:
    state = {
        **progress_made,
        "generator": torch.from_numpy(generator),
        "discriminator": torch.from_numpy(discriminator),
        "generator_optimizer": trainer.generator_optimizer.state_dict(),
        "discriminator_optimizer": trainer.discriminator_optimizer.state_dict(),
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(folder / STATE_FILE, buffer.getvalue(), mode=0o600)
