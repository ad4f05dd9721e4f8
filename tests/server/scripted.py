"""A channel in memory whose sites answer as a test wants, and a study with two sites for it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from dataclasses import replace as changed

import numpy as np

from common.config import StudyConfig
from common.messages import Enrolment, EnrolRequest, LocalUpdate, Reply, Request, TrainRequest
from common.privacy.plan import make_plan
from server.channel import Answer

TRAINED = 0.5
"""What an honest scripted site adds to every weight in a round."""


def two_sites(**federation: object) -> StudyConfig:
    """A study of north (25 patients) and south (75), two rounds of three steps."""
    study = StudyConfig(name="pilot").with_changes("image", size=28)
    study = study.with_changes("gan", latent_size=4, generator_width=4, discriminator_width=4)
    study = study.with_changes("privacy", epsilon=8.0, sampling_probability=1.0)
    contract = {"north": 25, "south": 75}
    settings = {"rounds": 2, "local_steps": 3, "minimum_sites": 1, "contracted_patients": contract, **federation}
    return study.with_changes("federation", **settings)


def honest(study: StudyConfig, request: TrainRequest) -> LocalUpdate:
    """An update that fits, with the history of a site that has trained in every round."""
    plan = make_plan(study)
    steps = request.round * study.federation.local_steps
    history = (changed(plan.mechanism, steps=steps),) if plan else ()
    generator, discriminator = np.full_like(request.generator, TRAINED), np.full_like(request.discriminator, TRAINED)
    return LocalUpdate(request.round, generator, discriminator, history)


@dataclass
class Scripted:
    """Sites by node id; ``enrol`` and ``train`` replace the honest answer of a node."""

    study: StudyConfig
    names: tuple[str, ...] = ("north", "south")
    enrol: dict[int, Reply] = field(default_factory=dict)
    train: dict[int, Callable[[TrainRequest], Reply]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    timeouts: list[float] = field(default_factory=list)
    before: Callable[[str], None] = lambda group: None

    def nodes(self, minimum: int, wanted: int, timeout_seconds: float) -> tuple[int, ...]:
        return tuple(range(2, 2 + len(self.names)))

    def ask(self, requests: Mapping[int, Request], group: str, timeout_seconds: float) -> dict[int, Answer]:
        self.asked.append(group)
        self.timeouts.append(timeout_seconds)
        self.before(group)
        return {node: Answer(self._reply(node, request), 0.25) for node, request in requests.items()}

    def _reply(self, node: int, request: Request) -> Reply:
        if isinstance(request, EnrolRequest):
            return self.enrol.get(node, Enrolment(self.names[node - 2], "ab" * 32, False))
        return self.train[node](request) if node in self.train else honest(self.study, request)
