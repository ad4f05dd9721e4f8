"""A joint round among sites: the noise of every sum that is opened, and the same discriminator as with one party."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client import secure_round, secure_session
from client.data.slices import PreparedCohort
from client.joint import joint_step
from client.round_file import last_attempt
from client.secure_round import SecureSite
from client.training import SiteStudy
from common.config import StudyConfig
from common.errors import FederationError, ProtocolError, TooFewSurvivors
from common.messages import (
    AdvertiseKeysRequest,
    ConfirmStepRequest,
    Enrolment,
    JointRequest,
    LocalUpdate,
    OpenSeedsRequest,
    OpenStepRequest,
    Refusal,
    Reply,
    Request,
    ShareSeedRequest,
    StepRequest,
)
from common.noisy_sums import encoding_of, noise_for
from common.privacy.plan import make_plan
from common.privacy.shared_noise import SharedNoise, noisy_integers
from server.aggregation import GanState
from server.channel import NO_ANSWER
from server.joint_round import joint_round, open_trainer, save_trainer, trainer_path
from server.joint_trainer import JointTrainer
from server.round import PlainSums, RoundOutcome, Sums
from server.secure_round import SecureSums
from tests.client.phased_sites import within
from tests.common.gan.trainers import CPU
from tests.consortium import members_of, names_of
from tests.session_consortium import SessionConsortium

# ---------------------------------------------------------------- the noise of an opened sum

ROUNDS, LENGTH = 200, 300
WHEN = ("present", "advertise", "share", "begin_step", "confirm_step", "open_step", "open_seeds")
"""When a site falls out for good; from ``confirm_step`` on its integers are in the first sum."""


def noisy_study(sites: int, minimum: int, colluding: int) -> StudyConfig:
    """A study of one joint phase with a contract for these sites."""
    phase = [{"algorithm": "joint", "rounds": 1, "steps": ROUNDS}]
    federation = {"phase": phase, "minimum_sites": minimum, "contracted_patients": dict.fromkeys(names_of(sites), 20)}
    tree = {"privacy": {"colluding_sites": colluding, "sampling_probability": 1.0}, "federation": federation}
    return StudyConfig.model_validate(tree)


@dataclass
class EmptySums:
    """Sums over sites that drew nobody.

    Args:
        declared: variance that the plan says, in steps of the encoding.
        share: of one site.
        totals: of each opened sum, less the colluding sites' integers.
        counts: honest sites of each.
        plain: the same totals with the colluding sites' integers in them.
    """

    declared: float
    share: float
    totals: list[np.ndarray] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    plain: list[np.ndarray] = field(default_factory=list)


def empty_sums(study: StudyConfig, falls_out: Mapping[str, str], add: Callable[..., Any] = noisy_integers) -> EmptySums:
    """Every sum of a session that the sites let the server open; the last ``colluding_sites`` of those left tell it all.

    Args:
        study: the study.
        falls_out: by site, when; a site that is not named stays.
        add: makes the integers of a site.
    """
    names, plan = tuple(study.federation.contracted_patients), make_plan(study)
    assert plan is not None
    noise = noise_for(study, plan.phases[0], LENGTH)
    step = 2.0**-noise.fraction_bits
    declared = plan.phases[0].mechanism.noise_multiplier * (plan.phases[0].clip_norm / step + LENGTH**0.5)
    found = EmptySums(declared**2, noise.scale**2)
    sites = SessionConsortium(
        names, LENGTH, ROUNDS, study.federation.minimum_sites, encoding=encoding_of(noise)
    )

    def gone(stage: str) -> set[str]:
        return {name for name, when in falls_out.items() if when == stage}

    try:
        server = sites.advertise(gone("advertise"))
        sites.share(server, gone("share"))
        for number in range(ROUNDS):
            values = {name: add(np.zeros(LENGTH), noise) for name in names}
            drops = {stage: gone(stage) for stage in WHEN[3:]} if number == 0 else {}
            total = sites.one_step(server, values, drops)
            survivors = server.survivors
            told = survivors[len(survivors) - study.privacy.colluding_sites :]
            found.plain.append(total)
            found.totals.append(total - sum(values[name] for name in told))
            found.counts.append(len(survivors) - len(told))
    except TooFewSurvivors:
        pass
    return found


def patterns(sites: int) -> list[dict[str, str]]:
    """Nobody falls out; one does, at any stage; two do, at all stages that the session may outlive."""
    names = names_of(sites)
    single = [{names[0]: when} for when in WHEN[1:]]
    double = [{names[0]: one, names[1]: other} for one, other in product(("advertise", "begin_step", "open_step"), WHEN[1:])]
    return [{}, *single, *(double if sites == 5 else [])]


def label(pattern: Any) -> str:
    return "-".join(pattern.values()) or "all" if isinstance(pattern, dict) else str(pattern)


@pytest.mark.parametrize(
    ("sites", "minimum", "colluding", "falls_out"),
    [
        *((3, 2, 1, pattern) for pattern in patterns(3)),
        *((5, 3, colluding, pattern) for colluding in (1, 2) for pattern in patterns(5)),
    ],
    ids=label,
)
def test_an_opened_sum_has_the_declared_noise_whoever_falls_out_and_whoever_tells(
    sites: int, minimum: int, colluding: int, falls_out: dict[str, str]
) -> None:
    found = empty_sums(noisy_study(sites, minimum, colluding), falls_out)
    if not found.totals:
        # Five sites hold each other's secrets so that four must be left once they are dealt.
        late = [when for when in falls_out.values() if when not in ("advertise", "share")]
        assert sites == 5 and len(falls_out) == 2 and late, "too few were left, though they were enough"
        return
    assert len(found.totals) in (1, ROUNDS) or falls_out
    for total, told, honest in zip(found.plain, found.totals, found.counts, strict=True):
        assert honest + colluding >= minimum
        assert total.std() > 0 and told.std() > 0
    # Sums over equally many honest sites together: exactly the variance of their shares.
    for honest in set(found.counts):
        noise = np.concatenate(
            [told for told, count in zip(found.totals, found.counts, strict=True) if count == honest]
        ).astype(float)
        assert within(noise, honest * found.share)
        # Never below what is declared, and just that when as few as may be are left.
        assert honest * found.share >= found.declared
        if honest == minimum - colluding:
            assert honest * found.share < 1.01 * found.declared
            if len(noise) == ROUNDS * LENGTH:
                assert within(noise, found.declared * 1.005)
                assert not within(noise, 0.95 * found.declared)
