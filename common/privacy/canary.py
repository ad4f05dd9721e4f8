"""A white-box audit of one step: what an attacker who knows everything but the noise can tell about canary patients.

The real step runs many times, noise and sampling from the operating system, with and without a group of canary
patients whose clipped gradients all point the same way. The attacker knows the parameters, the fakes, the other
patients, who of them was drawn, and the sum without noise; they guess from the noisy sum whether the canaries were in
it. How often they err bounds the step's privacy from below (Nasr et al. 2023, "Tight auditing of differentially private
machine learning"): a step is mu-Gaussian-DP only if  miss >= Phi(Phi^-1(1 - false alarm) - mu)  (Dong, Roth, Su 2022).
A lower bound above the claim refutes the claim.

Design note. A group of k patients moves the sum by k clip_norm, so the claim for it is mu = k / noise_multiplier
(group privacy, exact for Gaussian DP). With k near 2 noise_multiplier, mu is near 2 at any noise, where error rates
tell most. The bound is for patients who were drawn: what sampling adds to privacy is not counted on either side, and
the rate of sampling is audited by itself.

Two kinds of step are audited. A trial of a *local* one is a whole ``GanTrainer.discriminator_step``. One thing is kept
between trials: the per-row gradients of a call that was made before with the same rows and parameters, which nothing
random enters. Owners are averaged, clipped, summed and noised anew each time. A trial of a *joint* one is a sum over as
few sites as a sum may be opened for, each with its half of the step and its share of the noise. The canaries and the
other patients are at the first site; the last ones collude: the attacker knows their integers. Halves before noise are
kept, as nothing random enters them. The claim counts what rounding adds to the sensitivity; a code that forgot it would
make noise that is smaller by a part in a thousand or less, which no number of trials here would show.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from common import progress
from common.config import StudyConfig
from common.errors import ConfigError
from common.gan import networks
from common.gan.training import GanTrainer, RealBatch
from common.privacy.gradient import PatientOptimizer
from common.privacy.plan import PhasePlan
from common.privacy.sampling import draw_patients
from common.privacy.shared_noise import SharedNoise, noisy_integers

TRIALS = 10_000
CONFIDENCE = 0.999
ERROR_OF_A_RATE, ERROR_OF_SAMPLING = 4e-4, 1e-6
"""How often a bound may be wrong: two error rates and the sampling stay below 0.001 together. What one canary moves is
measured without noise: there is no chance in it."""

WANTED_MU = 2.0
MOST_CANARIES = 200
NUM_OTHERS, NUM_FAKES = 3, 4
IMAGE_SIZE, WIDTH, LATENT_SIZE = 28, 4, 4  # the smallest network of the family
SCALES = (1.0, 1e3, 1e6, 3e38)  # the last overflows: such a patient must count as zero
WEIGHT_FACTORS = (1.0, 10.0, 100.0, 1000.0)
REACHED = 0.999
"""The search for a canary stops when one moves the sum by this share of ``clip_norm``."""
VACUOUS = 0.9
"""Below this share an audit would prove nothing, and is refused."""

Drawn = tuple[int, ...]
RealHalf = Callable[[StudyConfig, nn.Module, RealBatch, float, torch.device], NDArray[np.float64]]


@dataclass(frozen=True)
class JointSites:
    """How sites make a joint step together.

    Args:
        real_half: what a site sums of its draw before noise, (dim,), by study, discriminator, draw, clip norm and
            device.
        noise: of each site's share, for vectors of so many coordinates.
        num_sites: in the sum that is attacked, at least 1: as few as a sum is opened for.
        num_colluding: of these, those that tell the attacker what they added.
    """

    real_half: RealHalf
    noise: Callable[[int], SharedNoise]
    num_sites: int
    num_colluding: int


@dataclass(frozen=True)
class Audit:
    """What was found, beside what the plan claims. All figures ``found`` are lower bounds at ``CONFIDENCE`` together.

    Args:
        noise_multiplier: of the plan.
        sampling_probability: of the plan.
        delta: of the plan.
        trials: steps with the canaries, and as many without.
        num_canaries: patients in the group.
        num_parameters: of the audited discriminator.
        false_alarms: steps without the canaries that the attacker took for steps with them.
        misses: steps with the canaries that the attacker took for steps without them.
        coins: how often a patient could have been drawn.
        heads: how often one was drawn.
        movement: the most that one patient moved the sum without noise, in units of ``clip_norm``.
        seconds: how long it took.
    """

    noise_multiplier: float
    sampling_probability: float
    delta: float
    trials: int
    num_canaries: int
    num_parameters: int
    false_alarms: int
    misses: int
    coins: int
    heads: int
    movement: float
    seconds: float

    @property
    def inverse_noise_claimed(self) -> float:
        """Sensitivity over noise of one patient, as the plan has it: mu of one step."""
        return 1 / self.noise_multiplier

    @property
    def inverse_noise_found(self) -> float:
        """The same at least, by the attacker's errors; one patient is a share 1 / num_canaries of the group."""
        return mu_at_least(self.false_alarms, self.misses, self.trials) / self.num_canaries

    @property
    def epsilon_claimed(self) -> float:
        """Epsilon at ``delta`` of one step for one drawn patient, by the exact formula."""
        return gaussian_epsilon(self.inverse_noise_claimed, self.delta)

    @property
    def epsilon_found(self) -> float:
        """The same at least, by the same formula."""
        return gaussian_epsilon(self.inverse_noise_found, self.delta)

    @property
    def sampling_found(self) -> float:
        """The chance of a patient to be drawn is at least this."""
        return 1 - _at_most(self.coins - self.heads, self.coins, ERROR_OF_SAMPLING)

    @property
    def refuted(self) -> tuple[str, ...]:
        """The claims that cannot be true; empty when none was refuted, which proves none."""
        claims = {
            "noise": self.inverse_noise_found > self.inverse_noise_claimed,
            "sampling": self.sampling_found > self.sampling_probability,
            "sensitivity": self.movement > 1,
        }
        return tuple(name for name, is_refuted in claims.items() if is_refuted)

    @property
    def visible_noise(self) -> float:
        """Noise below this share of the claimed one would have been refuted with probability 0.999. 0: none would."""
        claimed = self.num_canaries / self.noise_multiplier

        def is_refuted(share: float) -> bool:
            errors = _unlucky(self.trials, claimed / share)
            return mu_at_least(errors, errors, self.trials) > claimed

        low, high = 0.0, 1.0
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (middle, high) if is_refuted(middle) else (low, middle)
        return low


def audit(
    study: StudyConfig,
    plan: PhasePlan,
    *,
    trials: int = TRIALS,
    device: torch.device | None = None,
    joint: JointSites | None = None,
) -> Audit:
    """Audit the discriminator's step under ``plan``, on the smallest network of the study's family.

    Args:
        study: its loss, labels, normalisation and images of a patient are used; no data is.
        plan: its noise, clipping and sampling are the claim.
        trials: steps with the canaries, and as many without, 1 or more.
        device: where to compute; the CPU by default.
        joint: who makes a joint step; None for a local one.

    Raises:
        ConfigError: no trials, or no canary whose gradient is as large as ``plan.clip_norm``.
        OSError: the source of randomness failed.
    """
    if trials < 1:
        raise ConfigError(f"Expected at least 1 trial, found {trials}.", "Ask for more.")
    started = time.monotonic()
    small, device = _smallest(study), device or torch.device("cpu")
    step: _Step = _JointStep(small, device, plan, joint) if joint else _LocalStep(small, device, plan)
    num_canaries = max(1, min(MOST_CANARIES, round(WANTED_MU * plan.mechanism.noise_multiplier)))
    movement = step.find_canary()

    # All that the attacker decides by is fixed here, before the first noise is drawn.
    sums, directions, thresholds = {}, {}, {}
    for drawn in _subsets(NUM_OTHERS):
        sums[drawn] = step.sum_of(drawn, 0, noisy=False)
        moved = step.sum_of(drawn, num_canaries, noisy=False) - sums[drawn]
        directions[drawn] = moved / max(_length(moved), 1e-300)
        thresholds[drawn] = _length(moved) / 2
        alone = step.sum_of(drawn, 1, noisy=False) - sums[drawn]
        movement = max(movement, _length(alone) / plan.clip_norm, _length(moved) / num_canaries / plan.clip_norm)

    wrong, heads = {0: 0, num_canaries: 0}, 0
    for trial in range(trials):
        for present in wrong:
            drawn = tuple(draw_patients(NUM_OTHERS, plan.mechanism.sampling_probability).tolist())
            heads += len(drawn)
            seen = step.sum_of(drawn, present, noisy=True) - sums[drawn]
            guess = float(seen @ directions[drawn]) > thresholds[drawn]
            wrong[present] += guess != bool(present)
        progress.report(trial + 1, trials)
    return Audit(
        noise_multiplier=plan.mechanism.noise_multiplier,
        sampling_probability=plan.mechanism.sampling_probability,
        delta=study.privacy.delta,
        trials=trials,
        num_canaries=num_canaries,
        num_parameters=len(sums[()]),
        false_alarms=wrong[0],
        misses=wrong[num_canaries],
        coins=2 * trials * NUM_OTHERS,
        heads=heads,
        movement=movement,
        seconds=time.monotonic() - started,
    )


def mu_at_least(false_alarms: int, misses: int, trials: int) -> float:
    """The least mu for which a mu-Gaussian-DP step lets an attacker err this seldom; wrong with probability 0.0008.

    Clopper-Pearson upper bounds on both error rates, each at ``ERROR_OF_A_RATE``, then the Gaussian trade-off function.
    """
    from scipy.special import ndtri

    false_alarm = _at_most(false_alarms, trials, ERROR_OF_A_RATE)
    miss = _at_most(misses, trials, ERROR_OF_A_RATE)
    return max(0.0, float(-ndtri(false_alarm) - ndtri(miss)))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon at ``delta`` of one mu-Gaussian-DP mechanism, exact (Balle & Wang 2018, theorem 8).

    delta(epsilon) = Phi(mu / 2 - epsilon / mu) - exp(epsilon) Phi(-mu / 2 - epsilon / mu), solved for epsilon.

    >>> round(gaussian_epsilon(1.0, 1e-5), 3)
    4.377
    """
    from scipy.optimize import brentq
    from scipy.special import log_ndtr, ndtr

    def excess(epsilon: float) -> float:
        unlikely = math.exp(min(0.0, epsilon + float(log_ndtr(-mu / 2 - epsilon / mu))))
        return float(ndtr(mu / 2 - epsilon / mu)) - unlikely - delta

    if mu <= 0 or excess(0.0) <= 0:
        return 0.0
    high = 1.0
    while excess(high) > 0:
        high *= 2
    return float(brentq(excess, 0.0, high, xtol=1e-12, rtol=1e-12))


def _at_most(count: int, trials: int, error: float) -> float:
    """Clopper-Pearson: the probability behind ``count`` of ``trials`` lies above this with probability <= ``error``."""
    from scipy.stats import beta

    return 1.0 if count >= trials else float(beta.ppf(1 - error, count + 1, trials - count))


def _unlucky(trials: int, mu: float) -> int:
    """More errors of one kind than this are made with probability at most 0.0005 when the truth is ``mu``."""
    from scipy.special import ndtr
    from scipy.stats import binom

    return int(binom.ppf(0.9995, trials, float(ndtr(-mu / 2))))


def _smallest(study: StudyConfig) -> StudyConfig:
    """The study with its images and networks as small as its family allows; the rest as it is."""
    study = study.with_changes("image", size=IMAGE_SIZE)
    return study.with_changes(
        "gan", discriminator_width=WIDTH, generator_width=WIDTH, latent_size=LATENT_SIZE, warm_start="none"
    )


def _length(moved: Tensor) -> float:
    """The norm; a sum that one patient made NaN or infinite has moved without bound."""
    length = float(moved.norm())
    return length if math.isfinite(length) else math.inf


def _subsets(count: int) -> Iterator[Drawn]:
    """All that a draw of ``count`` patients can be, each ascending."""
    for taken in product((False, True), repeat=count):
        yield tuple(number for number in range(count) if taken[number])


class _Step(ABC):
    """One discriminator step on chosen patients, always from the same parameters."""

    def __init__(self, study: StudyConfig, discriminator: nn.Module, clip_norm: float) -> None:
        self.discriminator, self.clip_norm = discriminator, clip_norm
        random = np.random.default_rng(0)
        self.num_classes = study.image.num_classes
        self.shape = (study.image.channels, study.image.size, study.image.size)
        self.others: list[_Patient] = [
            (random.uniform(-1, 1, (1 + number, *self.shape)).astype(np.float32), number % self.num_classes)
            for number in range(NUM_OTHERS)
        ]
        self.canary: _Patient = self.others[0]
        # More than one image, so that a patient whose images are not averaged counts twice.
        self.images_of_canary = min(2, study.privacy.images_per_patient)

    @abstractmethod
    def sum_of(self, drawn: Drawn, num_canaries: int, *, noisy: bool) -> Tensor:
        """The sum of one step over the other patients ``drawn`` and so many canaries, (dim,) float64.

        Only from the first noisy one on do the canary and the parameters stay the same.
        """

    def batch_of(self, drawn: Drawn, num_canaries: int) -> RealBatch:
        """What a site draws that has these patients."""
        patients = [self.others[number] for number in drawn] + [self.canary] * num_canaries
        counts = [len(images) for images, _ in patients]
        empty = np.zeros((0, *self.shape), np.float32)
        return RealBatch(
            np.concatenate([empty, *(images for images, _ in patients)]),
            np.repeat(np.array([label for _, label in patients], np.int64), counts),
            np.repeat(np.arange(len(patients), dtype=np.int64), counts),
        )

    def find_canary(self) -> float:
        """Choose the image, its label and the parameters that let one patient move the sum the most.

        Returns:
            How much that is, without noise, in units of ``clip_norm``.
        """
        discriminator, everybody = self.discriminator, tuple(range(NUM_OTHERS))
        start, most = parameters_to_vector(discriminator.parameters()).detach().clone(), 0.0
        best = self.canary, start
        for factor in WEIGHT_FACTORS:
            parameters = start * factor
            vector_to_parameters(parameters, discriminator.parameters())
            nobody = self.sum_of(everybody, 0, noisy=False)
            for candidate in self._candidates():
                self.canary = candidate
                moved = _length(self.sum_of(everybody, 1, noisy=False) - nobody) / self.clip_norm
                if moved > most:
                    most, best = moved, (candidate, parameters)
            if most >= REACHED:
                break
        if most < VACUOUS:
            raise ConfigError(
                f"No canary's gradient is as large as clip_norm {self.clip_norm:g} (at most {most:.2g} of it): "
                "an audit would prove nothing.",
                "Lower privacy.clip_norm.",
            )
        self.canary, parameters = best
        vector_to_parameters(parameters, discriminator.parameters())
        return most

    def _candidates(self) -> Iterator["_Patient"]:
        """Patients with one picture, again and again: of either sign, since a loss can be flat on one side."""
        noise = np.random.default_rng(1).uniform(-1, 1, self.shape)
        for picture, sign, scale in product((noise, np.ones(self.shape)), (1, -1), SCALES):
            images = np.repeat((sign * scale * picture)[None], self.images_of_canary, axis=0)
            for label in {0, self.num_classes - 1}:
                yield images.astype(np.float32), label


class _LocalStep(_Step):
    """A step of one site's trainer, with the same fakes every time."""

    def __init__(self, study: StudyConfig, device: torch.device, plan: PhasePlan) -> None:
        self.trainer = _KeepingTrainer(study, device, plan)
        super().__init__(study, self.trainer.discriminator, plan.clip_norm)
        optimizer = self.trainer.discriminator_optimizer
        if not isinstance(optimizer, PatientOptimizer):
            raise TypeError("a trainer with a plan has another optimizer than PatientOptimizer")
        self.optimizer, self.noise_stddev = optimizer, optimizer.noise_stddev
        self.reader = _Reader(self.trainer.discriminator.parameters(), lr=1.0)
        optimizer.original_optimizer = self.reader

    def sum_of(self, drawn: Drawn, num_canaries: int, *, noisy: bool) -> Tensor:
        self.optimizer.noise_stddev = self.noise_stddev if noisy else 0.0
        self.trainer.begin((drawn, num_canaries) if noisy else None)
        self.trainer.discriminator_step(self.batch_of(drawn, num_canaries))
        return self.reader.gradient * NUM_FAKES  # the step divides by this public number


class _JointStep(_Step):
    """A step of several sites: the patients are at the first, the last ones collude."""

    def __init__(self, study: StudyConfig, device: torch.device, plan: PhasePlan, sites: JointSites) -> None:
        torch.manual_seed(0)
        super().__init__(study, networks.build_discriminator(study).to(device), plan.clip_norm)
        self.study, self.device, self.sites = study, device, sites
        self.noise = sites.noise(networks.num_parameters(networks.build_discriminator, study))
        self._halves: dict[tuple[Drawn, int], NDArray[np.float64]] = {}

    def sum_of(self, drawn: Drawn, num_canaries: int, *, noisy: bool) -> Tensor:
        if not noisy:
            return torch.from_numpy(self._half(drawn, num_canaries))
        for patients in ((drawn, num_canaries), ((), 0)):
            if patients not in self._halves:
                self._halves[patients] = self._half(*patients)
        halves = [self._halves[drawn, num_canaries]] + [self._halves[(), 0]] * (self.sites.num_sites - 1)
        integers = [noisy_integers(half, self.noise) for half in halves]
        known = integers[self.sites.num_sites - self.sites.num_colluding :]
        seen = np.sum(integers, axis=0) - np.sum(known, axis=0, dtype=np.int64)
        return torch.from_numpy(seen * 2.0**-self.noise.fraction_bits)

    def _half(self, drawn: Drawn, num_canaries: int) -> NDArray[np.float64]:
        batch = self.batch_of(drawn, num_canaries)
        return self.sites.real_half(self.study, self.discriminator, batch, self.clip_norm, self.device)


_Patient = tuple[NDArray[np.float32], int]  # images (image, channel, row, column) and their label


class _KeepingTrainer(GanTrainer):
    """A trainer that makes its fakes once, and the backward pass of equal calls once."""

    def __init__(self, study: StudyConfig, device: torch.device, plan: PhasePlan) -> None:
        super().__init__(study, device, plan, NUM_FAKES, seed=0)
        self._fakes: dict[int, tuple[Tensor, Tensor]] = {}
        self._rows: dict[tuple[Drawn, int, int], list[Tensor]] = {}
        self.begin(None)

    def begin(self, key: tuple[Drawn, int] | None) -> None:
        """Say what the next step is on. None: its backward pass is made, and not kept."""
        self._key, self._call = key, 0

    def draw_fakes(self, count: int) -> tuple[Tensor, Tensor]:
        if count not in self._fakes:
            self._fakes[count] = super().draw_fakes(count)
        return self._fakes[count]

    def _row_losses(self, piece: Any) -> Tensor:
        if self._key is None:
            return super()._row_losses(piece)
        key = (*self._key, self._call)
        self._call += 1
        parameters: list[Any] = list(self.discriminator.parameters())
        if key not in self._rows:
            torch.autograd.backward(super()._row_losses(piece).sum())
            self._rows[key] = [parameter.grad_sample for parameter in parameters]
        for parameter, rows in zip(parameters, self._rows[key], strict=True):
            parameter.grad_sample = rows.clone()
        # The step calls backward on this, which leaves the gradients as they are.
        return torch.zeros(len(piece.images), device=self.device, requires_grad=True)


class _Reader(torch.optim.SGD):
    """Leaves the parameters alone and keeps the gradient that it was given, float64 (dim,)."""

    gradient: Tensor

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        parts = [parameter.grad.double().flatten() for group in self.param_groups for parameter in group["params"]]
        self.gradient = torch.cat(parts)
