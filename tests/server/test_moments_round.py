"""A moments round with real sites: what the server is given to fit, and that no release is asked for twice."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.patient_sum import patient_sum
from common.config import StudyConfig
from common.errors import ConfigError
from common.gan.feature_map import FeatureMap
from common.noisy_sums import noise_for
from common.privacy.plan import make_plan
from server import moments, moments_round
from server.aggregation import GanState
from server.moments_round import sum_path
from server.round import RoundOutcome
from tests.client.phased_sites import within
from tests.common.gan.trainers import CPU
from tests.consortium import names_of
from tests.server.test_joint_round import Network, cohorts_of, gone, ignore, joint_study, start_of

FIVE = tuple(names_of(5))


def study_of(**tables: dict[str, Any]) -> StudyConfig:
    """Two moments rounds among five sites, in the clear so that each site's answer can be lost alone."""
    federation = {"phase": [{"algorithm": "moments", "rounds": 2}], "minimum_sites": 4}
    return joint_study(5, "plain", 1, federation=federation, gan={"moments_steps": 1}, **tables)


class Fits:
    """In place of the server's training, which has tests of its own: what it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.given: list[tuple[FeatureMap, np.ndarray, float]] = []
        self.dies = False
        monkeypatch.setattr(moments_round, "fit", self)

    def __call__(
        self, study: StudyConfig, state: GanState, feature_map: FeatureMap, total: Any, stddev: float, *rest: Any
    ) -> tuple[GanState, moments.MomentsRecord]:
        self.given.append((feature_map, total, stddev))
        if self.dies:
            raise KeyboardInterrupt
        return moments.fit(study, state, feature_map, total, stddev, *rest)


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> Fits:
    return Fits(monkeypatch)


def one_round(network: Network, folder: Path, number: int = 1) -> RoundOutcome:
    study, plan = network.study, make_plan(network.study)
    state = replace(start_of(study), round=number - 1)
    phase = plan.phases[0] if plan else None
    return moments_round.moments_round(study, phase, network.sums(), state, CPU, folder, ignore)


def true_sum(network: Network, feature_map: FeatureMap, names: tuple[str, ...]) -> np.ndarray:
    sums = [patient_sum(network.study, feature_map, network.sites[name].cohort, CPU) for name in names]
    return np.sum(sums, axis=0)


def test_the_server_fits_to_the_sum_of_those_who_answered_and_knows_its_noise(tmp_path: Path, fits: Fits) -> None:
    study = study_of()
    network = Network(study, tmp_path / "sites", cohorts_of(5))
    network.faults = {(FIVE[2], "moments", 0): gone}
    outcome = one_round(network, tmp_path)
    left = tuple(name for name in FIVE if name != FIVE[2])
    assert (outcome.answered, outcome.refusals) == (left, {FIVE[2]: "no_answer"})
    assert outcome.state is not None and outcome.state.round == 1
    assert outcome.facts["features"] > 100 and outcome.facts["steps"] == 1
    ((feature_map, total, stddev),) = fits.given
    plan = make_plan(study)
    assert plan is not None
    assert stddev == noise_for(study, plan.phases[0], len(total)).stddev_of_sum(4)
    noise = total - true_sum(network, feature_map, left)
    assert within(noise, stddev**2)
    assert not within(noise, 0.6 * stddev**2) and not within(noise, 1.7 * stddev**2)  # it would have been seen


def test_without_privacy_the_sum_is_the_patients_but_for_rounding(tmp_path: Path, fits: Fits) -> None:
    network = Network(study_of(privacy={"enabled": False}), tmp_path / "sites", cohorts_of(5))
    one_round(network, tmp_path)
    ((feature_map, total, stddev),) = fits.given
    assert stddev == 0
    np.testing.assert_allclose(total, true_sum(network, feature_map, FIVE), rtol=1e-6, atol=5 / 2 * 2.0**-20 + 1e-6)


def test_a_round_that_is_interrupted_after_the_sum_asks_nobody_again(tmp_path: Path, fits: Fits) -> None:
    network = Network(study_of(), tmp_path / "sites", cohorts_of(5))
    fits.dies = True
    with pytest.raises(KeyboardInterrupt):
        one_round(network, tmp_path)
    assert network.charged() == dict.fromkeys(FIVE, 1)

    fits.dies, network.asked = False, []
    outcome = one_round(network, tmp_path)
    assert network.asked == [] and network.charged() == dict.fromkeys(FIVE, 1)
    assert outcome.state is not None and (outcome.answered, outcome.refusals) == (FIVE, {})
    (first_map, first, stddev), (again_map, again, same) = fits.given
    assert np.array_equal(first_map.to_vector(), again_map.to_vector())
    assert np.array_equal(first, again) and stddev == same > 0

    assert one_round(network, tmp_path, number=2).state is not None  # another release, under its own charge
    assert network.charged() == dict.fromkeys(FIVE, 2)
    assert not np.array_equal(fits.given[2][1], first)
    assert [sum_path(tmp_path, number).exists() for number in (1, 2)] == [False, True]


def test_a_round_that_too_few_answer_keeps_nothing(tmp_path: Path, fits: Fits) -> None:
    network = Network(study_of(), tmp_path / "sites", cohorts_of(5))
    network.faults = {(name, "moments", 0): gone for name in FIVE[:2]}
    outcome = one_round(network, tmp_path)
    assert outcome.state is None and "needs updates of at least 4 sites, got 3" in outcome.failure
    assert outcome.answered == FIVE[2:]  # they have charged it
    assert not sum_path(tmp_path, 1).exists() and fits.given == []
    network.faults = {}
    assert one_round(network, tmp_path).state is not None
    assert network.charged() == {name: 1 if name in FIVE[:2] else 2 for name in FIVE}


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"damaged" * 100])
def test_a_kept_sum_that_is_damaged_is_named(content: bytes, tmp_path: Path, fits: Fits) -> None:
    network = Network(study_of(), tmp_path / "sites", cohorts_of(5))
    sum_path(tmp_path, 1).write_bytes(content)
    with pytest.raises(ConfigError, match=r"moments-sum-0001.npz is damaged"):
        one_round(network, tmp_path)
    assert network.charged() == dict.fromkeys(FIVE, 0)
