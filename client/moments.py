"""The site's flow of a moments round: charge, sum over the patients, add noise. One Gaussian mechanism."""

import logging
import uuid

import numpy as np

from client import updates
from client.patient_sum import patient_sum
from client.phases import phase_asked
from client.training import SiteStudy, phase_plan
from client.updates import MadeSum
from common.errors import BadPeer, FederationError, ProtocolError
from common.files import locked
from common.gan.devices import choose_device
from common.gan.feature_map import FeatureMap
from common.messages import MomentsRequest
from common.noisy_sums import encoding_of, noise_for
from common.privacy.shared_noise import noisy_integers

logger = logging.getLogger("synthward.site")


def release_moments(at: SiteStudy, request: MomentsRequest) -> MadeSum:
    """The sum over all training patients and canaries of one clipped vector each, with this site's share of the noise.

    The charge is on disk before a patient is read. Nothing is kept: a release that is asked for again is another one,
    with noise and a charge of its own.

    **Guarantee.** Whatever feature map the server sends, one patient more or less moves the sum by at most
    ``MOMENTS_CLIP_NORM``; the noise is the declared one for that, less what colluding sites may know of it.

    Raises:
        BadPeer: no such round, or a feature map that does not fit the study. Nothing is spent.
        BudgetExhausted: every release that the study planned is spent.
        OverBudget: the site's budget would be exceeded; nothing is charged.
        PrivacyError: delta does not suit the cohort, or the ledger cannot be trusted or written.
        ProtocolError: the round was charged, and failed after that.
    """
    with locked(at.folder / "training.lock"):
        phase_asked(at.study, request.round, "moments")
        plan = phase_plan(at, request.round)
        try:
            feature_map = FeatureMap.from_vector(at.study, request.features)
        except ValueError as error:
            raise BadPeer(f"The feature map does not fit the study: {error}.", "Nothing was spent.") from None
        noise = noise_for(at.study, plan, feature_map.length(at.study.image.num_classes))
        release = uuid.uuid4().hex
        if at.accountant is not None:
            at.accountant.charge_round(request.round)
        try:
            updates.note_made(at.folder, release)  # an update of an earlier round is never sent after this one
            device = choose_device(at.device)
            total = np.sum([patient_sum(at.study, feature_map, cohort, device) for cohort in at.trained], axis=0)
            integers = noisy_integers(total, noise)
        except (FederationError, OSError) as error:  # a code of its own: others tell the server that nothing was spent
            raise ProtocolError(f"The round was charged and failed: {error}") from error
        logger.info("round %d: the moments of the site's patients", request.round)
        return MadeSum(request.round, integers, encoding_of(noise), release)
