"""The audit: what it can say is computed exactly; what it does say of the real step, right and with a planted defect.

The noise is the operating system's. A step that is right is refuted with probability under 0.001 by construction, far
less in fact (see the exact figures below); planted defects are as large as to show for certain at the trials given.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting.dp_event import GaussianDpEvent
from dp_accounting.pld import PLDAccountant
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import ndtr, ndtri
from scipy.stats import binom
from torch import Tensor, nn

from client.real_half import real_half
from common import progress
from common.config import StudyConfig
from common.errors import ConfigError
from common.gan import halves, networks
from common.gan.training import GanTrainer
from common.privacy import canary, gradient, noise
from common.privacy import sampling as sampling_module
from common.privacy.accounting import Mechanism
from common.privacy.canary import JointSites, audit, gaussian_epsilon, mu_at_least
from common.privacy.plan import PhasePlan
from common.privacy.shared_noise import SharedNoise, noisy_integers, shared_noise
from tests.common.gan.trainers import small_study

MULTIPLIERS = [0.5, 1.5, 5.0, 30.0]
FEW = 100  # trials enough to see a gross defect, a second


def plan_of(noise_multiplier: float, clip_norm: float = 1.0, sampling_probability: float = 0.5) -> PhasePlan:
    return PhasePlan(Mechanism(sampling_probability, noise_multiplier, 10), clip_norm)


def labelled(size: int = 28, **tables: dict[str, Any]) -> StudyConfig:
    return small_study(image={"size": size, "label_column": "group", "labels": ["ill", "well"]}, **tables)


def canaries_at(noise_multiplier: float) -> int:
    return max(1, min(canary.MOST_CANARIES, round(canary.WANTED_MU * noise_multiplier)))


def probability_of_refuting(noise_multiplier: float, share: float, trials: int = canary.TRIALS) -> float:
    """Exact for ``share`` of the noise: both counts of errors are binomial, and the threshold is half-way."""
    claimed = canaries_at(noise_multiplier) / noise_multiplier
    chance = float(ndtr(-claimed / share / 2))
    deviation = np.sqrt(trials * chance * (1 - chance))
    likely = range(max(0, int(trials * chance - 8 * deviation)), int(trials * chance + 8 * deviation) + 2)
    # The bound falls as either count grows: for each number of misses, up to which number of false alarms it refutes.
    total, most = 0.0, likely.stop - 1
    for misses in likely:
        while most >= likely.start and mu_at_least(most, misses, trials) <= claimed:
            most -= 1
        total += float(binom.pmf(misses, trials, chance) * binom.cdf(most, trials, chance)) if most >= 0 else 0.0
    return total


# ---------------------------------------------------------------- what the numbers can say


@pytest.mark.parametrize("noise_multiplier", [*MULTIPLIERS, 0.2, 0.7, 200.0])
def test_right_noise_is_refuted_with_a_probability_below_a_thousandth(noise_multiplier: float) -> None:
    assert probability_of_refuting(noise_multiplier, 1.0) < 1e-3


@pytest.mark.parametrize("noise_multiplier", MULTIPLIERS)
def test_noise_a_fifth_too_low_is_refuted_almost_surely(noise_multiplier: float) -> None:
    assert probability_of_refuting(noise_multiplier, 0.8) > 1 - 1e-9


def test_the_bound_by_hand() -> None:
    # 0 of 1 errors: (1 - p)^1 = 0.0004 at p = 0.9996, so both errors can be nearly certain: mu of 0.
    assert mu_at_least(0, 0, 1) == 0
    # 0 of 10000: p = 1 - 0.0004^(1/10000) = 7.82e-4, whose normal quantile is -3.1625; twice that.
    assert mu_at_least(0, 0, 10_000) == pytest.approx(2 * 3.1625, abs=1e-3)
    assert mu_at_least(10_000, 0, 10_000) == 0
    assert mu_at_least(5_000, 5_000, 10_000) == 0


@given(st.integers(1, 5000), st.data())
def test_the_bound_falls_with_every_error(trials: int, data: st.DataObject) -> None:
    false_alarms, misses = data.draw(st.integers(0, trials - 1)), data.draw(st.integers(0, trials))
    found = mu_at_least(false_alarms, misses, trials)
    assert 0 <= mu_at_least(false_alarms + 1, misses, trials) <= found
    assert mu_at_least(misses, false_alarms, trials) == pytest.approx(found)
    # Below what the error rates themselves say.
    if 0 < false_alarms and 0 < misses < trials:
        assert found <= max(0.0, -float(ndtri(false_alarms / trials)) - float(ndtri(misses / trials)))


@pytest.mark.parametrize(("noise_multiplier", "delta"), [(0.3, 1e-5), (1.0, 1e-8), (30.0, 1e-5), (500.0, 1e-3)])
def test_the_exact_epsilon_equals_dp_accountings(noise_multiplier: float, delta: float) -> None:
    accountant = PLDAccountant()
    accountant.compose(GaussianDpEvent(noise_multiplier))
    reference = accountant.get_epsilon(delta)  # pessimistic by its grid of 1e-4
    assert gaussian_epsilon(1 / noise_multiplier, delta) == pytest.approx(reference, rel=2e-3, abs=2e-4)


def test_no_signal_is_no_epsilon() -> None:
    assert gaussian_epsilon(0.0, 1e-5) == 0
    assert gaussian_epsilon(1e-5, 1e-5) == 0  # delta covers what so little can do


# ---------------------------------------------------------------- the real step


@pytest.mark.parametrize("noise_multiplier", MULTIPLIERS)
def test_a_right_step_is_not_refuted_and_the_bound_is_near(noise_multiplier: float) -> None:
    found = audit(labelled(), plan_of(noise_multiplier), trials=FEW)
    assert found.refuted == ()
    assert found.num_canaries == canaries_at(noise_multiplier)
    # 100 trials: each Clopper-Pearson bound costs about 0.4 of a mu of 2.
    assert 0.1 < found.inverse_noise_found / found.inverse_noise_claimed <= 1
    assert 0 < found.epsilon_found <= found.epsilon_claimed
    assert 0.9999 < found.movement <= 1
    assert 0.3 < found.sampling_found < 0.5


@pytest.mark.parametrize("loss", ["non_saturating", "hinge", "least_squares"])
@pytest.mark.parametrize(("normalization", "clip_norm"), [("none", 50.0), ("group", 1e-3), ("group", 50.0)])
def test_a_canary_is_found_for_every_loss_network_and_clip_norm(
    loss: str, normalization: str, clip_norm: float
) -> None:
    study = small_study(gan={"loss": loss, "discriminator_normalization": normalization})
    found = audit(study, plan_of(1.5, clip_norm), trials=2)
    assert found.refuted == ()
    assert 0.99 < found.movement <= 1


def test_a_large_study_is_audited_on_a_small_network() -> None:
    study = labelled(128, gan={"discriminator_width": 256, "generator_width": 256})
    found = audit(study, plan_of(1.5), trials=1)
    assert found.num_parameters < 2000


def test_what_few_trials_would_see_is_said() -> None:
    found = audit(labelled(), plan_of(1.5), trials=2)
    assert found.visible_noise == 0
    at = {trials: replace(found, trials=trials).visible_noise for trials in (200, 2000, 10_000)}
    assert 0.4 < at[200] < at[2000] < at[10_000] < 0.95
    assert probability_of_refuting(1.5, at[2000], 2000) > 0.999


def test_progress_is_told() -> None:
    heard: list[tuple[int, int]] = []
    with progress.listening(lambda done, total: heard.append((done, total))):
        audit(labelled(), plan_of(1.5), trials=3)
    assert heard == [(1, 3), (2, 3), (3, 3)]


def test_no_trials_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1 trial"):
        audit(labelled(), plan_of(1.5), trials=0)


def test_every_trial_is_a_step_of_the_trainer_with_noise_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """6 parameter tensors are noised in every step, those before the first trial with a deviation of zero."""
    drawn: list[tuple[float, Tensor]] = []

    def listening(reference: Tensor, stddev: float, source: Any) -> Tensor:
        made = noise.gaussian_noise(reference, stddev, source)
        drawn.append((stddev, made.flatten().clone()))
        return made

    monkeypatch.setattr(gradient, "gaussian_noise", listening)
    audit(labelled(), plan_of(1.5, clip_norm=2.0), trials=5)
    noisy = [made for stddev, made in drawn if stddev == 3.0]
    assert {stddev for stddev, _ in drawn} == {0.0, 3.0}
    assert len(noisy) == 2 * 5 * 6
    assert len({tuple(made.tolist()) for made in noisy}) == len(noisy)


# ---------------------------------------------------------------- planted defects


def weaker(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Only ``share`` of the noise is added."""
    monkeypatch.setattr(
        gradient,
        "gaussian_noise",
        lambda reference, stddev, source: noise.gaussian_noise(reference, share * stddev, source),
    )


@pytest.mark.parametrize("noise_multiplier", [0.5, 5.0])
def test_half_of_the_noise_is_refuted_in_few_trials(noise_multiplier: float, monkeypatch: pytest.MonkeyPatch) -> None:
    assert probability_of_refuting(noise_multiplier, 0.5, 4 * FEW) > 1 - 1e-5
    weaker(monkeypatch, 0.5)
    found = audit(labelled(), plan_of(noise_multiplier), trials=4 * FEW)
    assert found.refuted == ("noise",)
    assert found.epsilon_found > found.epsilon_claimed


def test_no_noise_at_all_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    weaker(monkeypatch, 0.0)
    found = audit(labelled(), plan_of(1.5), trials=FEW)
    assert (found.false_alarms, found.misses) == (0, 0)
    assert found.refuted == ("noise",)


def test_noise_that_an_empty_draw_does_not_get_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    # At a rate of 0.01 and 3 patients 97 % of the draws without canaries are empty.
    step = GanTrainer.discriminator_step

    def skipping(self: GanTrainer, real: Any) -> tuple[float, int]:
        optimizer: Any = self.discriminator_optimizer
        before = optimizer.noise_stddev
        optimizer.noise_stddev = before if len(real.images) else 0.0
        try:
            return step(self, real)
        finally:
            optimizer.noise_stddev = before

    monkeypatch.setattr(GanTrainer, "discriminator_step", skipping)
    found = audit(labelled(), plan_of(1.5, sampling_probability=0.01), trials=4 * FEW)
    assert "noise" in found.refuted


def test_clipping_a_fifth_too_wide_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient, "ROUNDING_MARGIN", -0.2)
    found = audit(labelled(), plan_of(1.5), trials=2)
    assert found.refuted == ("sensitivity",)
    assert found.movement == pytest.approx(1.2, abs=1e-3)


def test_no_clipping_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient, "ROUNDING_MARGIN", -1e30)
    found = audit(labelled(), plan_of(1.5), trials=FEW)
    assert found.refuted == ("noise", "sensitivity")


def every_image_a_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_averaged(network: nn.Module, owner: Tensor, num_owners: int) -> int:
        return gradient.average_over_owners(network, torch.arange(len(owner)), len(owner))

    monkeypatch.setattr("common.gan.training.average_over_owners", not_averaged)


@pytest.mark.parametrize("noise_multiplier", [0.5, 30.0])
def test_images_of_a_patient_that_are_not_averaged_are_refuted(
    noise_multiplier: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    every_image_a_patient(monkeypatch)
    found = audit(labelled(), plan_of(noise_multiplier), trials=2)
    assert found.refuted == ("sensitivity",)
    assert found.movement == pytest.approx(2, abs=1e-3)  # the canary counts once an image


def test_a_patient_who_counts_twice_shows_in_the_noise_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    every_image_a_patient(monkeypatch)
    assert audit(labelled(), plan_of(1.5), trials=4 * FEW).refuted == ("noise", "sensitivity")


def test_a_patient_who_makes_the_sum_nan_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Averaged, but what is not finite is not set to zero."""

    def averaging(network: nn.Module, owner: Tensor, num_owners: int) -> int:
        parameters: list[Any] = list(network.parameters())
        for parameter in parameters:
            sums = torch.zeros((num_owners, *parameter.shape)).index_add_(0, owner, parameter.grad_sample)
            parameter.grad_sample = sums / torch.bincount(owner).view(-1, *[1] * parameter.ndim)
        return 0

    monkeypatch.setattr("common.gan.training.average_over_owners", averaging)
    found = audit(labelled(), plan_of(1.5), trials=2)
    assert found.refuted == ("sensitivity",)
    assert found.movement == np.inf


class Spread(nn.Module):
    """Minibatch standard deviation (Karras et al. 2018): one more feature, the same for all rows of the batch."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + hidden.std(dim=0, unbiased=False).mean()


class Centred(nn.Module):
    """Batch normalisation without a scale or running statistics, and so without a buffer that Opacus would refuse."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden - hidden.mean(dim=0)


@pytest.mark.parametrize("noise_multiplier", [0.5, 30.0])
@pytest.mark.parametrize("mixing", [Spread, Centred])
def test_a_network_that_mixes_samples_is_refuted(
    mixing: type[nn.Module], noise_multiplier: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = networks.build_discriminator

    def mixed(study: StudyConfig) -> nn.Module:
        network: Any = build(study)
        network.body.append(mixing())
        return network  # type: ignore[no-any-return]

    monkeypatch.setattr(networks, "build_discriminator", mixed)
    found = audit(labelled(), plan_of(noise_multiplier), trials=1)
    assert "sensitivity" in found.refuted
    assert found.movement > 1.5


def test_sampling_more_often_than_claimed_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    # 600 coins at 0.5, deviation 0.02: 12 of them above the claim of 0.25.
    monkeypatch.setattr(canary, "draw_patients", lambda number, q: sampling_module.draw_patients(number, 2 * q))
    found = audit(labelled(), plan_of(1.5, sampling_probability=0.25), trials=FEW)
    assert found.refuted == ("sampling",)
    assert 0.25 < found.sampling_found < 0.5


def test_a_gradient_that_is_lost_is_no_audit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipped to a tenth, no canary can reach the bound: refused, not passed."""
    monkeypatch.setattr(gradient, "ROUNDING_MARGIN", 0.9)
    with pytest.raises(ConfigError, match="prove nothing"):
        audit(labelled(), plan_of(1.5), trials=FEW)


def test_a_failing_source_ends_the_audit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canary, "draw_patients", lambda number, q: sampling_module.draw_patients(number, q, short))
    with pytest.raises(OSError, match="random source"):
        audit(labelled(), plan_of(1.5), trials=FEW)


def short(count: int) -> bytes:
    return bytes(count - 1)


# ---------------------------------------------------------------- as it is run by default


@pytest.mark.slow
def test_the_default_audit_is_close_to_the_claim() -> None:
    found = audit(labelled(), plan_of(1.5))
    assert found.refuted == ()
    assert found.inverse_noise_found > 0.88 * found.inverse_noise_claimed
    assert found.sampling_found > 0.48


@pytest.mark.slow
@pytest.mark.parametrize("noise_multiplier", [MULTIPLIERS[0], MULTIPLIERS[-1]])
def test_the_default_audit_refutes_noise_a_fifth_too_low(
    noise_multiplier: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    weaker(monkeypatch, 0.8)
    assert audit(labelled(), plan_of(noise_multiplier)).refuted == ("noise",)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the audit was NOT run on one")
@pytest.mark.parametrize("noise_multiplier", MULTIPLIERS)
def test_a_right_step_on_a_cuda_device_is_not_refuted(noise_multiplier: float) -> None:
    found = audit(labelled(), plan_of(noise_multiplier), trials=FEW, device=torch.device("cuda"))
    assert found.refuted == ()
    assert 0.1 < found.inverse_noise_found / found.inverse_noise_claimed <= 1


# ---------------------------------------------------------------- a step that sites make together


def joint_of(
    plan: PhasePlan, num_sites: int = 3, num_colluding: int = 1, add: Callable[[SharedNoise], SharedNoise] = lambda n: n
) -> JointSites:
    """Sites that share the noise so that those that do not collude make all of it; ``add`` changes their share."""
    num_noisy = num_sites - num_colluding

    def noise(length: int) -> SharedNoise:
        return add(shared_noise(plan, length, 300, num_sites, num_noisy))

    return JointSites(real_half, noise, num_sites, num_colluding)


def joint_audit(noise_multiplier: float, trials: int = FEW, **sites: Any) -> canary.Audit:
    plan = plan_of(noise_multiplier)
    return audit(labelled(), plan, trials=trials, joint=joint_of(plan, **sites))


@pytest.mark.parametrize(("num_sites", "num_colluding"), [(2, 1), (3, 1), (3, 2), (5, 2), (1, 0)])
@pytest.mark.parametrize("noise_multiplier", [0.5, 5.0])
def test_a_right_joint_step_is_not_refuted_and_the_bound_is_near(
    noise_multiplier: float, num_sites: int, num_colluding: int
) -> None:
    found = joint_audit(noise_multiplier, num_sites=num_sites, num_colluding=num_colluding)
    assert found.refuted == ()
    assert 0.1 < found.inverse_noise_found / found.inverse_noise_claimed <= 1
    assert 0.999 < found.movement <= 1
    assert 0.3 < found.sampling_found < 0.5


@pytest.mark.parametrize("loss", ["non_saturating", "hinge", "least_squares"])
@pytest.mark.parametrize(("normalization", "clip_norm"), [("none", 50.0), ("group", 1e-3)])
def test_a_canary_of_a_joint_step_is_found_for_every_loss_network_and_clip_norm(
    loss: str, normalization: str, clip_norm: float
) -> None:
    study = small_study(gan={"loss": loss, "discriminator_normalization": normalization})
    plan = plan_of(1.5, clip_norm)
    found = audit(study, plan, trials=2, joint=joint_of(plan))
    assert found.refuted == () and 0.99 < found.movement <= 1


def silent_first(monkeypatch: pytest.MonkeyPatch, num_sites: int) -> None:
    """The site of the canaries adds no noise; the others do."""
    calls = itertools.count()

    def silent(half: Any, noise: SharedNoise) -> Any:
        return noisy_integers(half, replace(noise, scale=0) if next(calls) % num_sites == 0 else noise)

    monkeypatch.setattr(canary, "noisy_integers", silent)


def test_the_only_honest_site_of_a_joint_step_that_adds_no_noise_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    silent_first(monkeypatch, 3)
    assert joint_audit(1.5, num_sites=3, num_colluding=2).refuted == ("noise",)


@pytest.mark.slow
@pytest.mark.parametrize("noise_multiplier", [0.5, 5.0])
def test_one_of_three_sites_that_adds_no_noise_is_refuted(
    noise_multiplier: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One colludes, so that half of the noise is left: 0.71 of the deviation."""
    assert probability_of_refuting(noise_multiplier, 0.5**0.5, 2000) > 0.9999
    silent_first(monkeypatch, 3)
    assert joint_audit(noise_multiplier, 2000).refuted == ("noise",)


@pytest.mark.slow
def test_one_of_three_honest_sites_that_adds_no_noise_is_refuted_by_the_default_audit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody colludes: 0.82 of the deviation is left."""
    assert probability_of_refuting(1.5, (2 / 3) ** 0.5, 10_000) > 0.9999
    silent_first(monkeypatch, 3)
    assert joint_audit(1.5, canary.TRIALS, num_colluding=0).refuted == ("noise",)


def test_noise_that_is_divided_twice_is_refuted() -> None:
    # Five sites, one of which colludes: half of the deviation.
    assert probability_of_refuting(1.5, 0.5, 4 * FEW) > 1 - 1e-5

    def twice(noise: SharedNoise) -> SharedNoise:
        return replace(noise, scale=round(noise.scale / 2))

    assert joint_audit(1.5, 4 * FEW, num_sites=5, add=twice).refuted == ("noise",)


def test_noise_that_is_shared_with_those_who_collude_is_refuted() -> None:
    # Divided by all three, though two tell theirs: 0.58 of the deviation.
    assert probability_of_refuting(1.5, 3**-0.5, 6 * FEW) > 0.999

    def by_all(noise: SharedNoise) -> SharedNoise:
        return replace(noise, scale=round(noise.scale * 3**-0.5))

    assert joint_audit(1.5, 6 * FEW, num_sites=3, num_colluding=2, add=by_all).refuted == ("noise",)


def test_no_noise_in_a_joint_step_is_refuted() -> None:
    found = joint_audit(1.5, add=lambda noise: replace(noise, scale=0))
    assert (found.false_alarms, found.misses, found.refuted) == (0, 0, ("noise",))


def test_clipping_a_fifth_too_wide_in_a_joint_step_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halves, "ROUNDING_MARGIN", -0.2)
    found = joint_audit(1.5, 2)
    assert found.refuted == ("sensitivity",) and found.movement == pytest.approx(1.2, abs=1e-3)


def test_images_of_a_patient_that_are_not_averaged_in_a_joint_step_are_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = halves._calls

    def an_owner_each(owner: Any, max_images: int) -> Any:
        return calls(np.arange(len(owner)), max_images)

    def not_averaged(network: nn.Module, owner: Tensor, num_owners: int) -> int:
        return gradient.average_over_owners(network, torch.arange(len(owner)), len(owner))

    monkeypatch.setattr(halves, "_calls", an_owner_each)
    monkeypatch.setattr(halves, "average_over_owners", not_averaged)
    found = joint_audit(1.5, 2)
    assert found.refuted == ("sensitivity",) and found.movement == pytest.approx(2, abs=1e-2)


def test_sensitivity_that_leaves_out_the_rounding_is_too_small_to_see() -> None:
    """What the module says of itself: at the finest steps it is a part in ten thousand of the noise."""
    plan = plan_of(1.5)
    noise = shared_noise(plan, 2000, 300, 3, 2)
    assert 1 < noise.sensitivity / plan.clip_norm < 1 + 1e-3
    assert replace(joint_audit(1.5, 2), trials=canary.TRIALS).visible_noise < 1 - 1e-2
