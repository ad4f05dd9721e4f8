"""Rows of the test bed whose generator is trained: one that overfits, the product's own, and that with seeded bugs.

Every row trains anew on phantoms of its seed. The public warm start is the same for all.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client import joint
from client.real_half import real_half
from common.audit.candidates import FEWEST
from common.config import StudyConfig
from common.gan import halves, networks
from common.gan.parameters import to_vector
from common.gan.synthesis import synthesize, to_gray
from common.gan.training import GanTrainer, RealBatch
from common.messages import Vector
from common.noisy_sums import noise_for
from common.privacy import canary, gradient
from common.privacy.canary import JointSites
from common.privacy.plan import make_plan
from common.privacy.shared_noise import SharedNoise, noisy_integers
from deploy.bench.audit_bed_images import NUM_CANDIDATES, Images
from deploy.bench.audit_bed_release import Facts, compare_with_others, judge, score_patients, summary
from deploy.bench.utility_cells import JOINT, MOMENTS, PHANTOMS, Cell, study_for
from deploy.bench.utility_data import Patients, draw_patients, to_floats
from deploy.bench.utility_training import train
from server.warm_start import warm_start

CPU = torch.device("cpu")
SIZE, NUM_SITES = 32, 3
OVERFIT_PATIENTS, OVERFIT_STEPS, BY_HEART_STEPS = 50, 20_000, 4000
OVERFIT_STUDY = {
    "image": {"size": SIZE},
    "gan": {"latent_size": 8, "generator_learning_rate": 1e-3, "generator_batch_size": 32},
    "privacy": {"enabled": False},
}
OVERFIT_SHARE = 0.3
DP_PATIENTS, DP_SHARE, DP_EPSILON = 750, 0.2, 3.0
BUG_STEPS = 100  # of the joint round that a release with a bug comes from
TRIALS = 600
"""Of the white-box audit: enough for noise of less than 0.7 of the claimed deviation."""

OVERFIT, BY_HEART, PRIVATE = "GAN overfit on 50", "50 patients by heart", "federated DP, epsilon 3"
Learn = Callable[[NDArray[np.float32], int], Images]


def overfit(seed: int, releases: int, learn: Learn) -> Facts:
    """A generator that has seen 50 patients far too often, without privacy."""
    rng = np.random.default_rng([seed, 3])
    everybody = draw_patients(round(OVERFIT_PATIENTS / (1 - OVERFIT_SHARE)), 1000 + seed, 1, SIZE)
    training = np.arange(everybody.count) < OVERFIT_PATIENTS
    candidates = learn(to_floats(everybody.images[training]), seed)
    return _released(candidates, math.inf, everybody, training, OVERFIT_SHARE, releases, rng)


def adversarial(images: NDArray[np.float32], seed: int, steps: int = OVERFIT_STEPS) -> Images:
    """The product's trainer; half of the patients a step. A quarter of an hour on one core.

    Args:
        images: (n, 1, size, size) in [-1, 1], one a patient.
        seed: of weights, latents and draws.
        steps: of each network.

    Returns:
        Candidates.
    """
    study = StudyConfig.model_validate(OVERFIT_STUDY)
    half = len(images) // 2
    trainer, rng = GanTrainer(study, CPU, None, half, seed), np.random.default_rng(seed)
    for _ in range(steps):
        drawn = images[rng.choice(len(images), half, replace=False)]
        trainer.discriminator_step(RealBatch(drawn, np.zeros(half, np.int64), np.arange(half)))
        trainer.generator_step()
    return _candidates(study, to_vector(trainer.generator), seed)


def by_heart(images: NDArray[np.float32], seed: int, steps: int = BY_HEART_STEPS) -> Images:
    """Least squares instead of a discriminator, and a plain network: every latent has a patient, the one whose random
    code is nearest, and is to be drawn as that patient. Half-way between two codes it shows a mixture. What an
    adversary overfits in hours, this does in a minute.
    """
    random = torch.Generator().manual_seed(seed)
    targets = torch.from_numpy(images).flatten(1)
    codes = torch.nn.functional.normalize(torch.randn(len(images), 16, generator=random))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hidden = (nn.Linear(16, 256), nn.LeakyReLU(0.2), nn.Linear(256, 256), nn.LeakyReLU(0.2))
        network = nn.Sequential(*hidden, nn.Linear(256, targets.shape[1]), nn.Tanh())
    optimizer = torch.optim.Adam(network.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, 2 * (1 - step / steps))
        latent = torch.randn(128, 16, generator=random)
        loss = (network(latent) - targets[(latent @ codes.T).argmax(1)]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.inference_mode():
        made = network(torch.randn(NUM_CANDIDATES, 16, generator=random))
    return to_gray(made.reshape(-1, *images.shape[2:]).numpy())


def private(seed: int, releases: int) -> Facts:
    """``moments`` at three sites, epsilon 3 for every patient."""
    return _federated(MOMENTS, seed, releases, {})


def _federated(algorithm: str, seed: int, releases: int, changes: dict[str, Any]) -> Facts:
    rng = np.random.default_rng([seed, 4])
    everybody = draw_patients(DP_PATIENTS, 2000 + seed, 1, SIZE)
    each = DP_PATIENTS // NUM_SITES
    held_out = np.concatenate(
        [site * each + rng.choice(each, round(DP_SHARE * each), replace=False) for site in range(NUM_SITES)]
    )
    training = ~np.isin(np.arange(DP_PATIENTS), held_out)
    numbers = np.flatnonzero(training)
    cohorts = {
        f"site-{site + 1}": everybody.take(numbers[numbers // each == site].tolist()).cohort()
        for site in range(NUM_SITES)
    }
    cell = Cell("phantoms", PHANTOMS, len(numbers), DP_EPSILON, NUM_SITES, algorithm, 0)
    study = study_for(cell, {name: cohort.num_patients for name, cohort in cohorts.items()})
    study = study.with_changes("privacy", images_per_patient=1)
    if changes:
        study = study.with_changes("federation", **changes)
    *_, state = train(study, warm_start(study, CPU).state, cohorts, CPU)
    return _released(
        _candidates(study, state.generator_average, seed), DP_EPSILON, everybody, training, DP_SHARE, releases, rng
    )


def _candidates(study: StudyConfig, generator: Vector, seed: int) -> Images:
    labels = np.arange(NUM_CANDIDATES, dtype=np.int64) % study.image.num_classes
    return to_gray(synthesize(study, generator, labels, seed).images[:, 0])


def _released(
    candidates: Images,
    certified: float,
    everybody: Patients,
    training: NDArray[np.bool_],
    share: float,
    releases: int,
    rng: np.random.Generator,
) -> Facts:
    people = list(everybody.images)
    fixed = np.ones(len(people), np.bool_)
    scored = score_patients(candidates, people, FEWEST)
    verdicts = judge(scored, training, fixed, share, releases, rng, certified_epsilon=certified)
    facts = summary(verdicts) | {"candidates": len(scored.candidates), "patients": len(people)}
    if scored.problem:  # what a rule without a least number of candidates would say
        few = score_patients(candidates, people, 2)
        facts["without the rule"] = summary(
            judge(few, training, fixed, share, releases, rng, certified_epsilon=certified)
        )
    return facts | {"baselines": compare_with_others(candidates, people, training, fixed, share, rng)}


# ---------------------------------------------------------------- seeded bugs


@dataclass(frozen=True)
class Bug:
    """A defect of differentially private training.

    Args:
        planted: makes it, as long as the context lasts.
        is_joint: in a step that sites make together; else in a local one.
        trials: of the white-box audit.
    """

    planted: Callable[[], Any]
    is_joint: bool
    trials: int = TRIALS


@contextmanager
def no_clipping() -> Iterator[None]:
    """No gradient is shortened."""
    with patch.object(gradient, "ROUNDING_MARGIN", -1e30), patch.object(halves, "ROUNDING_MARGIN", -1e30):
        yield


@contextmanager
def half_noise() -> Iterator[None]:
    """The noise is divided among the sites twice: half of the deviation is left."""

    def quiet(half: NDArray[np.float64], noise: SharedNoise) -> NDArray[np.int64]:
        return noisy_integers(half, replace(noise, scale=round(noise.scale / 2)))

    with patch.object(canary, "noisy_integers", quiet), patch.object(joint, "noisy_integers", quiet):
        yield


@contextmanager
def clipped_by_image() -> Iterator[None]:
    """Every image of a patient is clipped for itself."""

    def not_averaged(network: nn.Module, owner: Tensor, num_owners: int) -> int:
        return gradient.average_over_owners(network, torch.arange(len(owner)), len(owner))

    with patch("common.gan.training.average_over_owners", not_averaged):
        yield


class _Centred(nn.Module):
    """Batch normalisation without a scale or running statistics."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Minus the mean of the batch."""
        return hidden - hidden.mean(dim=0)


@contextmanager
def batch_mean() -> Iterator[None]:
    """The discriminator sees what the batch has in common, as with batch normalisation."""
    build = networks.build_discriminator

    def mixed(study: StudyConfig) -> nn.Module:
        network: Any = build(study)
        network.body.append(_Centred())
        return network  # type: ignore[no-any-return]

    with patch.object(networks, "build_discriminator", mixed):
        yield


@contextmanager
def silent_site() -> Iterator[None]:
    """The first of three sites adds no noise."""
    calls = itertools.count()

    def silent(half: NDArray[np.float64], noise: SharedNoise) -> NDArray[np.int64]:
        return noisy_integers(half, replace(noise, scale=0) if next(calls) % NUM_SITES == 0 else noise)

    with patch.object(canary, "noisy_integers", silent), patch.object(joint, "noisy_integers", silent):
        yield


ONE_IMAGE = "bug: clipping per image"  # has no release of its own: patients have one image each there
BUGS: dict[str, Bug] = {
    "bug: no clipping": Bug(no_clipping, is_joint=False),
    "bug: noise divided twice": Bug(half_noise, is_joint=True),
    ONE_IMAGE: Bug(clipped_by_image, is_joint=False),
    "bug: batch mean leaks": Bug(batch_mean, is_joint=False),
    "bug: one site without noise": Bug(silent_site, is_joint=True, trials=2000),
}


def white_box(name: str, seed: int, releases: int) -> Facts:
    """What ``synthward privacy audit`` says of a step with a bug. Neither seed nor releases matter."""
    bug, study = BUGS[name], _bugged_study()
    plan = make_plan(study)
    if plan is None:
        raise ValueError("a study with privacy has a plan")
    sites = JointSites(real_half, partial(noise_for, study, plan.phases[0]), NUM_SITES, study.privacy.colluding_sites)
    with bug.planted():
        found = canary.audit(study, plan.phases[0], trials=bug.trials, joint=sites if bug.is_joint else None)
    return {"white_box": list(found.refuted), "movement": min(found.movement, 1e30)}


def released_with(name: str, seed: int, releases: int) -> Facts:
    """What the audit of a release says that a joint round with a bug has made."""
    phase = [{"algorithm": "joint", "rounds": 1, "steps": BUG_STEPS}]
    with BUGS[name].planted():
        return _federated(JOINT, seed, releases, {"phase": phase})


def _bugged_study() -> StudyConfig:
    cell = Cell("phantoms", PHANTOMS, 600, DP_EPSILON, NUM_SITES, JOINT, 0)
    return study_for(cell, {f"site-{number + 1}": 200 for number in range(NUM_SITES)})


ROWS: dict[str, Callable[[int, int], Facts]] = {
    BY_HEART: partial(overfit, learn=by_heart),
    OVERFIT: partial(overfit, learn=adversarial),
    PRIVATE: private,
    **{f"{name}, a step": partial(white_box, name) for name in BUGS},
    **{f"{name}, a release": partial(released_with, name) for name in BUGS if name != ONE_IMAGE},
}
