"""One study from its warm start to its end by the product's own rounds, without Flower and without masks.

Masks cancel in the sum, so plain sums of what the sites would have masked are what the server would have learned.
"""

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from client.data.slices import PreparedCohort
from client.joint import joint_step
from client.moments import release_moments
from client.training import SiteStudy, train_round
from client.updates import MadeSum, MadeUpdate
from common.config import StudyConfig
from common.messages import JointRequest, MomentsRequest, TrainRequest, Vector
from common.privacy.plan import make_plan
from deploy.bench.account import account_for
from server.aggregation import GanState
from server.round import Charge, StepSum, SumOutcome, WantedSession, WantedSum
from server.rounds import Rounds


@dataclass(frozen=True)
class SitesHere:
    """The sites of a study in this process, and sums over what they would have sent; every site answers.

    Args:
        sites: each site's side of the study, by the site's name.
    """

    sites: dict[str, SiteStudy]

    def sum(self, wanted: WantedSum, charge: Charge) -> SumOutcome:
        """See ``server.round.Sums``."""
        match wanted.work:
            case TrainRequest() as request:
                return self._total(train_round(site, request) for site in self.sites.values())
            case MomentsRequest() as request:
                return self._total(release_moments(site, request) for site in self.sites.values())
            case other:
                raise ValueError(f"not a sum of training: {type(other).__name__}")

    def session(self, wanted: WantedSession, charge: Charge, refusals: dict[str, str]) -> "SessionHere":
        """See ``server.round.Sums``."""
        return SessionHere(self, wanted)

    def _total(self, parts: Iterable[MadeUpdate | MadeSum]) -> SumOutcome:
        total = np.sum([part.floats.astype(np.float64) for part in parts], axis=0)
        return SumOutcome(total.astype(np.float32), tuple(self.sites))


class SessionHere:
    """The steps of a joint round over the same sites."""

    def __init__(self, here: SitesHere, wanted: WantedSession) -> None:
        self._here, self._wanted, self._made = here, wanted, 0

    @property
    def answered(self) -> tuple[str, ...]:
        """See ``server.round.Session``."""
        return tuple(self._here.sites) if self._made else ()

    def step(self, discriminator: Vector) -> StepSum:
        """See ``server.round.Session``."""
        self._made += 1
        sites = self._here.sites
        digest = next(iter(sites.values())).study.digest
        request = JointRequest(digest, self._wanted.round, self._made, discriminator)
        parts = [joint_step(site, request).vector for site in sites.values()]
        return StepSum(np.sum(parts, axis=0), tuple(sites))


def train(
    study: StudyConfig, start: GanState, cohorts: dict[str, PreparedCohort], device: torch.device
) -> Iterator[GanState]:
    """Walk through the phases of the study.

    Args:
        study: private or not; its contract names the sites.
        start: the first shared state.
        cohorts: each site's training patients.
        device: where to compute.

    Yields:
        The shared state after each phase.
    """
    plan, state = make_plan(study), start
    with tempfile.TemporaryDirectory() as folder:
        sites = {name: _site(study, name, cohort, Path(folder), device) for name, cohort in cohorts.items()}
        rounds = Rounds(study, plan, SitesHere(sites), device, Path(folder))
        for phase in study.phases:
            for _ in range(phase.rounds):
                outcome = rounds.run(state, _nothing)
                if outcome.state is None:
                    raise RuntimeError(f"every site answered, and the round failed all the same: {outcome.failure}")
                state = outcome.state
            yield state


def _site(study: StudyConfig, name: str, cohort: PreparedCohort, folder: Path, device: torch.device) -> SiteStudy:
    trained, _ = study.contracted_split(name)
    site_folder = folder / name
    site_folder.mkdir()
    account = account_for(study, site_folder, cohort.patient_ids)
    return SiteStudy(study, name, site_folder, cohort, trained, device.type, account)


def _nothing(sites: tuple[str, ...]) -> None:
    """The server's own record of what the sites charge is not kept here; their ledgers are."""
