"""A channel in memory whose sites answer as a test wants, and a study with two sites for it.

The study says ``aggregation = "plain"``: what is asked of a site in a round is then one message.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from common.audit.plan import parse_signed_plan
from common.config import StudyConfig
from common.messages import (
    Enrolment,
    EnrolRequest,
    LocalUpdate,
    PlanRegistered,
    Refusal,
    RegisterPlanRequest,
    Reply,
    Request,
    TrainRequest,
)
from common.privacy.accounting import Budget, History
from common.privacy.plan import make_plan

TRAINED = 0.5
"""What an honest scripted site adds to every weight in a round."""
WAITED_SECONDS = 0.25
"""How long every question to scripted sites takes."""


def two_sites(**federation: object) -> StudyConfig:
    """A study of north (25 patients) and south (75), two rounds of three steps, or the phases that are given."""
    study = StudyConfig(name="pilot").with_changes("image", size=28)
    study = study.with_changes("gan", latent_size=4, generator_width=4, discriminator_width=4)
    study = study.with_changes("privacy", epsilon=8.0, sampling_probability=1.0)
    short = {} if "phase" in federation else {"rounds": 2, "local_steps": 3}
    contract = {"north": 25, "south": 75}
    settings = {"aggregation": "plain", "minimum_sites": 1, "contracted_patients": contract, **short}
    return study.with_changes("federation", **{**settings, **federation})


def honest(study: StudyConfig, site: str, request: TrainRequest) -> LocalUpdate:
    """An update that fits, weighted as a site weighs it."""
    length = len(request.generator) + len(request.discriminator)
    return LocalUpdate(request.round, np.full(length, TRAINED * study.site_weight(site), np.float32))


def planned(study: StudyConfig, steps: int) -> History:
    """The history of a site that has charged so many of the planned steps, phase after phase; more of the last one."""
    plan = make_plan(study)
    history: History = ()
    *earlier, last = plan.history if plan is not None else (None,)
    for mechanism in filter(None, earlier):
        history += (replace(mechanism, steps=min(steps, mechanism.steps)),) if steps > 0 else ()
        steps -= mechanism.steps
    return (*history, replace(last, steps=steps)) if last is not None and steps > 0 else history


@dataclass
class Scripted:
    """Sites by node id; ``enrol`` and ``train`` replace the honest answer of a node.

    ``spent`` is what the sites have charged themselves, by name: an honest one charges a round before it answers, no
    more than the plan has, and answers the round that it made last again for nothing. It outlives a run.
    """

    study: StudyConfig
    names: tuple[str, ...] = ("north", "south")
    enrol: dict[int, Reply] = field(default_factory=dict)
    train: dict[int, Callable[[TrainRequest], Reply]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    timeouts: list[float] = field(default_factory=list)
    before: Callable[[str], None] = lambda group: None
    spent: dict[str, int] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)
    waited_seconds: float = 0.0
    enrolments: list[EnrolRequest] = field(default_factory=list)

    def nodes(self, minimum: int, wanted: int, timeout_seconds: float) -> tuple[int, ...]:
        return tuple(range(2, 2 + len(self.names)))

    def ask(self, requests: Mapping[int, Request], group: str, timeout_seconds: float) -> Iterator[tuple[int, Reply]]:
        if group == "register_plan":  # every honest site registers the plan
            for node, request in requests.items():
                assert isinstance(request, RegisterPlanRequest)
                yield node, PlanRegistered(parse_signed_plan(request.plan).plan.digest)
            return
        self.asked.append(group)
        self.timeouts.append(timeout_seconds)
        self.before(group)
        self.waited_seconds += WAITED_SECONDS
        for node, request in requests.items():
            yield node, self._reply(node, request)

    def _reply(self, node: int, request: Request) -> Reply:
        name = self.names[node - 2]
        match request:
            case EnrolRequest():
                self.enrolments.append(request)
                history = planned(self.study, self.spent.get(name, 0))
                budget = Budget(self.study.privacy.epsilon, self.study.privacy.delta)
                own = budget if self.study.privacy.enabled else None
                return self.enrol.get(node, Enrolment(name, "ab" * 32, False, history, budget=own))
            case TrainRequest():
                return self.train[node](request) if node in self.train else self.trained(name, request)
        return Refusal("internal")

    def trained(self, name: str, request: TrainRequest) -> LocalUpdate:
        """What an honest site does when it is asked to train."""
        if self.last.get(name) != request.round:
            phase = self.study.phase_number(request.round)
            until_then = sum(each.rounds * each.steps for each in self.study.phases[: phase + 1])
            self.spent[name] = min(self.spent.get(name, 0) + self.study.phases[phase].steps, until_then)
            self.last[name] = request.round
        return honest(self.study, name, request)
