"""The rounds of a study: each by the algorithm of its phase, over the sums that the study allows."""

from collections.abc import Mapping
from pathlib import Path

import torch

from common.config import StudyConfig
from common.messages import Enrolment
from common.privacy.plan import PrivacyPlan
from server.aggregation import GanState
from server.channel import Channel
from server.joint_round import joint_round, open_trainer, save_trainer
from server.local_round import local_round
from server.moments_round import moments_round
from server.round import Charge, PlainSums, RoundOutcome, Sums
from server.secure_round import SecureSums


class Rounds:
    """What runs the rounds of one study.

    Args:
        study: the study.
        plan: its privacy plan; None when it is not private.
        sums: over the sites.
        device: what the server trains on.
        folder: where checkpoints lie.
    """

    def __init__(
        self, study: StudyConfig, plan: PrivacyPlan | None, sums: Sums, device: torch.device, folder: Path
    ) -> None:
        self._study, self._plan, self._sums, self._device, self._folder = study, plan, sums, device, folder

    def run(self, state: GanState, charge: Charge) -> RoundOutcome:
        """One attempt at the round after ``state``."""
        study, number = self._study, state.round + 1
        phase_number = study.phase_number(number)
        plan = self._plan.phases[phase_number] if self._plan else None
        match study.phases[phase_number].algorithm:
            case "local":
                return local_round(study, self._sums, state, charge)
            case "moments":
                return moments_round(study, plan, self._sums, state, self._device, self._folder, charge)
            case "joint":
                trainer = open_trainer(study, plan, self._folder, state, self._device)
                outcome = joint_round(study, plan, self._sums, trainer, number, charge)
                if outcome.state is not None:
                    save_trainer(trainer, self._folder, number)
                return outcome


def sums_over(study: StudyConfig, channel: Channel, enrolled: Mapping[int, Enrolment]) -> Sums:
    """Sums as the study wants them.

    Args:
        study: the study.
        channel: the network.
        enrolled: what each site said when it enrolled, by node id.
    """
    if study.federation.aggregation == "plain":
        return PlainSums(study, channel, {node: site.site for node, site in enrolled.items()})
    return SecureSums(study, channel, enrolled)
