"""A small site in a study of three algorithms: moments in round 1 and 2, joint in 3 and 4, local in 5 and 6."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from client.ledger import Ledger
from common.config import StudyConfig
from common.gan.feature_map import FeatureMap, raw_feature_map
from common.gan.networks import build_discriminator, num_parameters
from common.messages import JointRequest, MomentsRequest
from tests.client.sites import KEY, study_of

MOMENTS, JOINT, LOCAL = 1, 3, 5
"""The first round of each algorithm."""
STEPS = 3
"""Of a joint round."""
PHASES = [
    {"algorithm": "moments", "share": 0.4, "rounds": 2},
    {"algorithm": "joint", "share": 0.3, "rounds": 2, "steps": STEPS},
    {"algorithm": "local", "share": 0.3, "rounds": 2, "steps": 2},
]


def phased_study(**tables: dict[str, Any]) -> StudyConfig:
    """The site's study; a call for each patient, so that nobody's gradient depends on who else was drawn."""
    federation = {"phase": PHASES, **tables.pop("federation", {})}
    performance = {"max_images_at_once": 1, **tables.pop("performance", {})}
    return study_of(federation=federation, performance=performance, **tables)


def of_sites(count: int, **tables: dict[str, Any]) -> StudyConfig:
    """The study with a contract for so many sites, the first of them north."""
    names = ("north", "south", *(f"site-{number}" for number in range(3, count + 1)))[:count]
    federation = {"contracted_patients": dict.fromkeys(names, 11), **tables.pop("federation", {})}
    return phased_study(federation=federation, **tables)


def feature_map_of(study: StudyConfig) -> FeatureMap:
    """Centred on black; a gain of 1 makes every image's features as long as they may be."""
    raw = raw_feature_map(study, 2, 1, np.zeros(0, np.float32))
    size = study.image.size
    return raw.scaled(raw.raw(torch.full((1, 1, size, size), -1.0))[0], torch.ones(raw.num_features))


def moments_request(study: StudyConfig, round_number: int = MOMENTS) -> MomentsRequest:
    return MomentsRequest(study.digest, round_number, feature_map_of(study).to_vector())


def step_request(study: StudyConfig, step: int, round_number: int = JOINT) -> JointRequest:
    """Ask for a step of a round, always from the same discriminator."""
    random = np.random.default_rng(7)
    discriminator = 0.1 * random.normal(size=num_parameters(build_discriminator, study))
    return JointRequest(study.digest, round_number, step, discriminator.astype(np.float32))


def charged_lines(folder: Path) -> list[tuple[int, int]]:
    """Round and steps of every line of the ledger in this folder, whatever became of the process that wrote it."""
    return [(line.round, line.steps) for line in Ledger(folder, KEY).lines()]


def killed(work: Callable[[], object]) -> None:
    """Do it in a process of its own, which has to kill itself in the middle of it."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)  # a child that hangs fails the test
        torch.set_num_threads(1)  # OpenMP's threads, which the parent may have, do not survive a fork
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def kill_before(work: Callable[..., Any]) -> Callable[..., Any]:
    """The process dies when it is about to do this."""

    def die(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    return die


def kill_after(work: Callable[..., Any]) -> Callable[..., Any]:
    """The process dies as soon as it has done this."""

    def do(*arguments: Any, **options: Any) -> None:
        work(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    return do


def within(values: np.ndarray, variance: float) -> bool:
    """Whether these may be normal with this variance: chi-square, wrong once in a billion."""
    chance = stats.chi2.cdf(float((values**2).sum()) / variance, len(values))
    return 5e-10 < chance < 1 - 5e-10
