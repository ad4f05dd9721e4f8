"""The site's part of a joint step: draw patients, sum their clipped gradients, add this site's share of the noise."""

import json
import logging
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from client.phases import phase_asked
from client.real_half import real_half
from client.training import SiteStudy, draw, phase_plan
from client.updates import MadeSum
from common.errors import BadPeer, BudgetExhausted, FederationError, OutOfOrder, ProtocolError
from common.files import locked, write_atomically
from common.gan import networks
from common.gan.devices import choose_device
from common.gan.parameters import load_vector
from common.messages import JointRequest
from common.noisy_sums import encoding_of, noise_for
from common.privacy.shared_noise import noisy_integers

logger = logging.getLogger("synthward.site")
STEPS_FILE = "joint-steps.json"


@dataclass(frozen=True)
class Steps:
    """How far a site is in a joint round.

    Args:
        round: the round.
        charged: steps that are charged.
        made: the newest step that was begun.
    """

    round: int
    charged: int
    made: int


def joint_step(at: SiteStudy, request: JointRequest) -> MadeSum:
    """The sum over this step's drawn patients of one clipped gradient each, with this site's share of the noise.

    The first step of a round charges all of them, before a patient is drawn; each step is begun once, which is on disk
    before its patients are drawn. A round that breaks off is paid for whole, and a second attempt at it is charged
    anew.

    **Guarantee.** One patient more or less moves the sum by at most the plan's ``clip_norm``, whatever discriminator
    the server sends; an empty draw is sent like any other.

    Raises:
        BadPeer: no such round or step, or a discriminator that does not fit the study. Nothing is spent.
        OutOfOrder: a step that was begun before.
        BudgetExhausted: the steps that the study planned, or that this round could charge, are spent.
        OverBudget: the site's budget would be exceeded; nothing is charged.
        PrivacyError: delta does not suit the cohort, or the ledger cannot be trusted or written.
        ProtocolError: the round was charged, and the step failed after that.
    """
    with locked(at.folder / "training.lock"):
        phase, plan = phase_asked(at.study, request.round, "joint"), phase_plan(at, request.round)
        if not 1 <= request.step <= phase.steps:
            raise BadPeer(f"Expected a step from 1 to {phase.steps}, found {request.step}.", "Nothing was spent.")
        discriminator = networks.build_discriminator(at.study)
        try:
            load_vector(discriminator, request.discriminator)
        except ValueError as error:
            raise BadPeer(f"The discriminator does not fit the study: {error}.", "Nothing was spent.") from None
        if request.step == 1:
            steps = Steps(request.round, at.accountant.charge_round(request.round) if at.accountant else phase.steps, 0)
        else:
            steps = _read(at.folder)
        try:
            _begin(at.folder, steps, request)
            clip_norm = plan.clip_norm if plan else at.study.privacy.clip_norm
            total = real_half(at.study, discriminator, draw(at), clip_norm, choose_device(at.device))
            noise = noise_for(at.study, plan, len(total))
            return MadeSum(request.round, noisy_integers(total, noise), encoding_of(noise), uuid.uuid4().hex)
        except (OutOfOrder, BudgetExhausted):
            raise
        except (FederationError, OSError) as error:  # a code of its own: others tell the server that nothing was spent
            raise ProtocolError(f"The round was charged and failed: {error}") from error


def _begin(folder: Path, steps: Steps, request: JointRequest) -> None:
    """Note that a step is begun; after this it never is again."""
    if steps.round != request.round or request.step <= steps.made:
        raise OutOfOrder(
            f"Expected a step of round {steps.round} after {steps.made}, found {request.step} of {request.round}."
        )
    if request.step > steps.charged:
        raise BudgetExhausted(f"Only {steps.charged} steps of this round could be charged.", "Plan a new study.")
    begun = asdict(Steps(steps.round, steps.charged, request.step))
    write_atomically(folder / STEPS_FILE, json.dumps(begun).encode(), mode=0o600)


def _read(folder: Path) -> Steps:
    try:
        return Steps(**json.loads((folder / STEPS_FILE).read_bytes()))
    except (OSError, ValueError, TypeError):
        raise OutOfOrder("Expected the first step of a round.", "It takes part again in the next one.") from None
