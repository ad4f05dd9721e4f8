"""Defects found in other private GANs and federations, each by name: that this one does not have it.

Two of the list are tested where they could arise: a ledger that is lost on restart, and a policy file that is absent.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from common.config import StudyConfig
from common.gan import networks
from common.gan.parameters import to_vector
from common.gan.training import GanTrainer
from common.privacy.accounting import History, append, epsilon
from common.privacy.plan import PhasePlan, PrivacyPlan, make_plan
from tests.common.gan.trainers import CPU, batch, images, movement, reading_trainer, small_plan, small_study
from tests.common.privacy.sources import seeded

LOSSES = ("non_saturating", "hinge", "least_squares")


def plan_of(study: StudyConfig) -> PrivacyPlan:
    plan = make_plan(study)
    assert plan is not None
    return plan


def only_phase(plan: PrivacyPlan) -> PhasePlan:
    (phase,) = plan.phases
    return phase


def contracted(*patients: int, weights: str = "equal") -> StudyConfig:
    """A study of one site for each number of patients; q = 1 keeps the calibration quick."""
    sites = {f"site-{number}": count for number, count in enumerate(patients)}
    return small_study(
        privacy={"epsilon": 3.0, "sampling_probability": 1.0},
        federation={"contracted_patients": sites, "weights": weights, "rounds": 4, "local_steps": 5},
    )


def site_trainer(study: StudyConfig) -> GanTrainer:
    """The reading trainer of a site under the study's own plan, with noise whose bytes are the same in every run."""
    plan = only_phase(plan_of(study))
    trainer = reading_trainer(study, clip_norm=plan.clip_norm, noise_stddev=plan.noise_stddev)
    trainer.discriminator_optimizer.source = seeded(1)  # type: ignore[attr-defined]
    return trainer


def noise_of_empty_steps(trainer: GanTrainer, steps: int) -> np.ndarray:
    """What the steps add to the sum beyond the fakes', (steps * dim,)."""
    optimizer: Any = trainer.discriminator_optimizer
    empty = batch(trainer.study, [])
    noisy = [movement(trainer, empty)[0] for _ in range(steps)]
    optimizer.noise_stddev = 0.0
    silent = movement(trainer, empty)[0]
    return torch.cat([seen - silent for seen in noisy]).numpy()


# ---------------------------------------------------------------- the account


def test_epsilon_is_not_reported_a_round_at_a_time() -> None:
    """A fresh accountant in every round would report the first figure after any number of rounds."""
    study = contracted(40, 40)
    plan = plan_of(study)
    mechanism = only_phase(plan).mechanism
    one_round = replace(mechanism, steps=study.federation.local_steps)
    history: History = ()
    after = []
    for _ in range(study.federation.rounds):
        history = append(history, one_round)
        after.append(epsilon(history, plan.delta))
    assert history == (mechanism,) == plan.history
    assert after == sorted(set(after))
    assert after[-1] == plan.epsilon > 2 * after[0]
    # Nor are rounds added up, at a delta that would be four times as large: that is not the composition either.
    assert after[-1] < 0.8 * study.federation.rounds * after[0]


def test_two_studies_are_composed_and_not_reported_one_at_a_time() -> None:
    first, second = plan_of(contracted(40, 40)), plan_of(contracted(40, 40).with_changes("privacy", epsilon=1.0))
    together = epsilon((*first.history, *second.history), 1e-5)
    assert max(first.epsilon, second.epsilon) < together < first.epsilon + second.epsilon


# ---------------------------------------------------------------- the noise of one site


@pytest.mark.parametrize("others", [0, 1, 49])
def test_noise_is_not_planned_for_many_sites_and_released_with_fewer(others: int) -> None:
    """However many sites are contracted, one site's own sum carries the whole noise: no other has to show up."""
    study = contracted(40, *[40] * others)
    plan = plan_of(study)
    assert plan == plan_of(contracted(40, 40))
    noise = noise_of_empty_steps(site_trainer(study), 12)
    total = float((noise**2).sum()) / only_phase(plan).noise_stddev ** 2
    low, high = stats.chi2.interval(1 - 1e-5, len(noise))
    assert low < total < high
    # A share of 1 / sqrt(2) of it, as two sites that trust each other would add, is far outside.
    assert total / 2 < low


@pytest.mark.parametrize("patients", [(11, 44), (20, 1000)])
def test_weights_of_unequal_sites_do_not_weaken_the_noise_of_one(patients: tuple[int, ...]) -> None:
    """A weight multiplies what was noised, so signal and noise alike: no site's ratio falls below the plan's."""
    study = contracted(*patients, weights="contracted")
    plan = plan_of(study)
    assert plan == plan_of(contracted(*patients))
    weights = [study.site_weight(site) for site in study.federation.contracted_patients]
    assert min(weights) < 0.3
    assert max(weights) == 1
    trainer = site_trainer(study)
    drawn = [images(study, 2, seed=1), images(study, 3, seed=2, scale=1e6)]
    with torch.no_grad():
        trainer.discriminator.head.weight.mul_(-20.0)
    noise = noise_of_empty_steps(trainer, 12)  # leaves the noise off
    moved = movement(trainer, batch(study, drawn))[0] - movement(trainer, batch(study, drawn[:1]))[0]
    noise_multiplier = only_phase(plan).mechanism.noise_multiplier
    for weight in np.float32(weights):
        sensitivity = float((weight * moved).norm())
        ratio = float(np.std(weight * noise)) / sensitivity
        assert sensitivity == pytest.approx(weight * only_phase(plan).clip_norm, rel=1e-3)
        assert ratio == pytest.approx(noise_multiplier, rel=5 / math.sqrt(2 * len(noise)) + 1e-3)


def test_a_zero_update_is_never_made() -> None:
    """Nobody drawn and no gradient of a fake: the step moves every parameter all the same, and counts."""
    study = small_study(gan={"loss": "hinge"})
    trainer = GanTrainer(study, CPU, small_plan(), 4, seed=1)
    with torch.no_grad():
        trainer.discriminator.head.weight.zero_()
        trainer.discriminator.head.bias.fill_(-100.0)  # hinge is flat below -1: the fakes are told for certain
    silent = reading_trainer(study)
    silent.discriminator.load_state_dict(trainer.discriminator.state_dict())
    assert float(movement(silent, batch(study, []))[0].norm()) == 0

    for step in range(1, 4):
        before = to_vector(trainer.discriminator)
        trainer.discriminator_step(batch(study, []))
        assert (to_vector(trainer.discriminator) != before).all()
        adam = trainer.discriminator_optimizer.original_optimizer  # type: ignore[attr-defined]
        assert {int(state["step"]) for state in adam.state.values()} == {step}


# ---------------------------------------------------------------- the discriminator's call


class Column(nn.Module):
    """A discriminator whose logits are (B, 1): against (B,) targets a loss would broadcast to (B, B)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pictures: Tensor, label: Tensor) -> Tensor:
        return self.network(pictures, label)[:, None]


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_logits_of_shape_b_1_are_refused_before_anything_moves(
    loss: str, private: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = networks.build_discriminator
    monkeypatch.setattr(networks, "build_discriminator", lambda study: Column(build(study)))
    study = small_study(gan={"loss": loss})
    trainer = GanTrainer(study, CPU, small_plan() if private else None, 4, seed=1)
    before = to_vector(trainer.discriminator)
    for patients in ([], [images(study, 1, seed=1)], [images(study, 2, seed=1), images(study, 1, seed=2)]):
        with pytest.raises(ValueError, match=r"logits must have shape \(B,\), found \(\d+, 1\)"):
            trainer.discriminator_step(batch(study, patients))
    with pytest.raises(ValueError, match=r"\(B,\)"):
        trainer.generator_step()
    np.testing.assert_array_equal(to_vector(trainer.discriminator), before)


@pytest.mark.parametrize("max_images", [3, 256])
def test_the_number_of_fakes_is_not_tied_to_the_drawn_batch(max_images: int) -> None:
    """Rows that the discriminator sees, less those of the drawn patients: the public number, at every draw."""
    study = small_study(performance={"max_images_at_once": max_images})
    trainer = reading_trainer(study, num_fakes=5)
    rows: list[int] = []
    trainer.discriminator.body.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    for counts in ([], [1], [2, 1, 4], [3] * 9):
        rows.clear()
        trainer.discriminator_step(batch(study, [images(study, count, seed=count) for count in counts]))
        assert sum(rows) - sum(counts) == 5
        rows.clear()
        trainer.generator_step()
        assert sum(rows) == study.gan.generator_batch_size
