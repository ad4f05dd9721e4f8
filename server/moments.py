"""``moments`` at the server: the feature map before the patients' noisy sum, the generator's training after it.

Everything here is public or post-processing of the noisy sum, so it costs no privacy. The noise is known, and used:
the released means are shrunk toward the start where noise dominates, and a part of the coordinates is held back, on
which the noise is independent of what the generator was fitted to: they choose among the generators on the way, and
keep the start when none is surely better.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common import progress
from common.config import StudyConfig
from common.gan import networks
from common.gan.feature_map import LABEL_WEIGHT, SIZES, FeatureMap, block_sizes, raw_feature_map
from common.gan.parameters import load_vector, to_vector
from common.messages import Vector
from server.aggregation import GanState
from server.public_images import public_images, varied_images
from server.shrinkage import principal_components, shrink

NUM_PUBLIC = 1500  # images behind centre, gain and principal components; more no longer change the result
MOST_NOISE = (math.inf, 1.0, 0.2)  # for each size of the map: energy of the noise in a class's mean
IMAGES_A_CLASS = 32  # of each step: small batches and many steps did better than the reverse
SMALLEST_BATCH, LARGEST_BATCH = 64, 128
WARM_UP = 20  # steps, while Adam's second moments settle
AVERAGE_DECAY = 0.98
HELD_BACK = 0.2  # of the coordinates
SURELY = 2.0  # standard deviations by which one held-back residual must beat another to be believed
CHECKS, PATIENCE = 12, 2  # looks at the held-back residual; so many in a row that are surely worse end the fit
CHECK_IMAGES = 1024  # a class or fewer, so that a check costs as much as a few steps
RIDGE = 0.01  # of the strongest component's variance, is added to each before whitening


@dataclass(frozen=True)
class Pace:
    """How boldly the generator is trained.

    Args:
        steps: of the generator.
        learning_rate: the largest, of Adam.
        whitening: weights of components fall with their variance to this power: strong ones would drown fine ones.
    """

    steps: int
    learning_rate: float
    whitening: float


# From nothing all is to be learned; what a warm start knows is lost at the larger rate. Both were measured.
FROM_START, FROM_NOTHING = Pace(400, 1e-3, 0.0), Pace(1000, 3e-3, 0.5)


@dataclass(frozen=True)
class MomentsRecord:
    """Facts of one fit, all of them post-processing.

    Attributes:
        features: number of features, D.
        noise_share: energy of the noise in the released means, as a share of their whole distance from the start.
        steps: generator steps made; ``kept_step`` is the one whose average was kept, 0 for the start.
        stopped: why the fit ended: ``steps``, ``no improvement``, or ``noise`` when nothing surely beat the start.
        residual_before, residual_after: squared distance of the generator's means from the patients' on the held-back
            features, without the noise's share; unbiased, so it can be negative.
    """

    features: int
    noise_share: float
    steps: int
    kept_step: int
    stopped: str
    residual_before: float
    residual_after: float


def make_feature_map(
    study: StudyConfig, state: GanState, patients: int, noise_stddev: float, device: torch.device
) -> FeatureMap:
    """The map whose mean the patients will give, from the current generator's images or, without a start, generic ones.

    Args:
        study, state: the discriminator's layers are features only where there is a warm start.
        patients, noise_stddev: contracted training patients of all sites together, and the noise of each coordinate of
            the opened sum: they decide how many features there are (``map_size``).
        device: where to compute.
    """
    has_start = study.gan.warm_start != "none"
    critic = state.discriminator if has_start else state.discriminator[:0]
    raw = raw_feature_map(study, 2, study.seed, critic, map_size(study, patients, noise_stddev))
    images = public_images(study, state, NUM_PUBLIC, device)
    # Twice, as products are of what the thumbnails' mean leaves.
    centred = raw.scaled(_raw(raw, images).mean(dim=0), torch.ones(raw.num_features))
    features = _raw(centred, images)
    centre = features.mean(dim=0)
    features = features - centre
    gain = torch.cat(
        [
            (1 / block.pow(2).sum(dim=1).mean().sqrt()).expand(block.shape[1])
            for block in torch.split(features, list(raw.block_sizes), dim=1)
        ]
    )
    gain = gain / (features * gain).norm(dim=1).median()
    return raw.scaled(centre, gain)


def map_size(study: StudyConfig, patients: int, noise_stddev: float) -> int:
    """The largest size of the map with no more noise than ``MOST_NOISE`` allows: an index into ``SIZES``.

    The noise is the expected energy, D times the variance, of that in the mean of one of equally large classes. The
    features of a usual public image have an energy of 1, and so have those of any patient at most.
    """
    noise = noise_stddev * study.image.num_classes / (patients * (1 - LABEL_WEIGHT**2) ** 0.5)
    has_start = study.gan.warm_start != "none"
    counts = [sum(block_sizes(study, 2, size, with_discriminator=has_start)) for size in range(len(SIZES))]
    return max(size for size, most in enumerate(MOST_NOISE) if counts[size] * noise**2 <= most)


def fit(
    study: StudyConfig,
    state: GanState,
    feature_map: FeatureMap,
    total: NDArray[np.float64],
    noise_stddev: float,
    device: torch.device,
    seed: int,
    steps: int | None = None,
) -> tuple[GanState, MomentsRecord]:
    """Train the generator until its mean features are the patients'.

    Args:
        study, state: the generator that is trained is the average.
        feature_map: the one that the sites used.
        total: noisy sum of all patients' vectors, (``feature_map.length(num_classes)``,).
        noise_stddev: of each of its coordinates; 0 without privacy.
        device: where to compute.
        seed: of latents and of which features are held back.
        steps: the most generator steps, over which the learning rate falls; None for those of the pace.

    Returns:
        The state after one more round, and what happened.
    """
    steps = steps if steps is not None else _pace(study).steps
    random = torch.Generator().manual_seed(seed)
    released = _released(study, feature_map, total, noise_stddev, device)
    order = torch.randperm(feature_map.num_features, generator=random).to(device)
    num_held = round(HELD_BACK * len(order))
    held, used = order[:num_held], order[num_held:]
    trainer = _Trainer(study, state, feature_map, device, random, steps)
    start = trainer.average_means()
    prior = start if study.gan.warm_start != "none" else torch.zeros_like(start)
    pull = _pull(study, state, feature_map, released, prior, used, device)
    first = best = last = _Checked(0, state.generator_average, start, _residual(released, start, held))
    worse, stopped = 0, "steps"
    for step in range(1, steps + 1):
        trainer.step(pull, released.share)
        progress.report(step, steps)
        if step * CHECKS // steps == (step - 1) * CHECKS // steps:
            continue
        means = trainer.average_means()
        last = _Checked(step, trainer.average(), means, _residual(released, means, held))
        best = min(best, last, key=lambda checked: checked.residual)
        worse = worse + 1 if _surely_better(released, held, best, last) else 0
        if worse == PATIENCE:
            stopped = "no improvement"
            break
    # Later averages are the smoother, and the noise alone makes one of many look best: only a sure lead is believed.
    kept = best if _surely_better(released, held, best, last) else last
    if not _surely_better(released, held, kept, first):
        kept, stopped = first, "noise"
    noise_energy = float((released.share * released.noise_stddev**2).sum()) * feature_map.num_features
    distance = float((released.share * (released.means - prior).pow(2).sum(dim=1)).sum())
    record = MomentsRecord(
        features=feature_map.num_features,
        noise_share=noise_energy / max(distance, 1e-12),
        steps=last.step,
        kept_step=kept.step,
        stopped=stopped,
        residual_before=first.residual,
        residual_after=kept.residual,
    )
    return replace(
        state, round=state.round + 1, generator=kept.generator.copy(), generator_average=kept.generator.copy()
    ), record


@dataclass(frozen=True)
class _Released:
    """What the noisy sum says of each class.

    Args:
        means: (classes, D) noisy mean features.
        noise_stddev: (classes,) of each coordinate of a class's means.
        share: (classes,) share of the patients; they sum to 1.
    """

    means: Tensor
    noise_stddev: Tensor
    share: Tensor


def _pace(study: StudyConfig) -> Pace:
    return FROM_NOTHING if study.gan.warm_start == "none" else FROM_START


def _released(
    study: StudyConfig, feature_map: FeatureMap, total: NDArray[np.float64], noise_stddev: float, device: torch.device
) -> _Released:
    sums = torch.from_numpy(total.reshape(study.image.num_classes, -1))
    counts = _label_counts(sums[:, -1] / LABEL_WEIGHT, noise_stddev / LABEL_WEIGHT)
    scale = (counts * (1 - LABEL_WEIGHT**2) ** 0.5)[:, None]
    means, noise = (sums[:, :-1] / scale).float(), (noise_stddev / scale)[:, 0].float()
    return _Released(means.to(device), noise.to(device), (counts / counts.sum()).float().to(device))


def _label_counts(noisy: Tensor, noise_stddev: float) -> Tensor:
    """Counts, shrunk toward their mean as far as their differences are the noise's, and at least one image's worth."""
    mean = noisy.mean()
    difference = noisy - mean
    expected = (len(noisy) - 1) * noise_stddev**2
    counts = mean + difference * (1 - expected / difference.pow(2).sum().clamp(min=1e-12)).clamp(min=0)
    return counts.clamp(min=max(1.0, noise_stddev))


class _Trainer:
    """The generator, its optimizer and its average."""

    def __init__(
        self,
        study: StudyConfig,
        state: GanState,
        feature_map: FeatureMap,
        device: torch.device,
        random: torch.Generator,
        steps: int,
    ) -> None:
        self.study, self.feature_map, self.device, self.random, self.steps = study, feature_map, device, random, steps
        self.generator = _generator(study, state.generator_average, device)
        self.averaged = _generator(study, state.generator_average, device)
        self.learning_rate = _pace(study).learning_rate
        self.optimizer = torch.optim.Adam(self.generator.parameters(), lr=self.learning_rate, betas=(0.5, 0.99))
        num_classes = study.image.num_classes
        batch = min(max(IMAGES_A_CLASS * num_classes, SMALLEST_BATCH), LARGEST_BATCH)
        self.labels = torch.arange(num_classes, device=device).repeat_interleave(max(2, batch // num_classes))
        self.check_latent = torch.randn(CHECK_IMAGES, study.gan.latent_size, generator=random).to(device)
        self.made = 0
        with torch.no_grad():
            self.last_means = self._means()

    def step(self, pull: "_Pull", share: Tensor) -> None:
        """One step down the squared distance of the means from the target."""
        done = self.made / self.steps
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * min(1.0, (self.made + 1) / WARM_UP, 2 * (1 - done) + 0.02)
        means = self._means()
        # The residual is of the batch before: independent of this batch, so that the product of the two estimates the
        # squared distance without bias, and each batch serves twice.
        loss = 2 * (share[:, None] * pull(self.last_means) * means).sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.last_means = means.detach()
        self.made += 1
        decay = min(AVERAGE_DECAY, self.made / (self.made + 5))
        with torch.no_grad():
            pairs = zip(self.averaged.parameters(), self.generator.parameters(), strict=True)
            for average, parameter in pairs:
                average.lerp_(parameter, 1 - decay)

    def average(self) -> Vector:
        return to_vector(self.averaged)

    def average_means(self) -> Tensor:
        """Mean features of the averaged generator, (classes, D), always of the same latents."""
        count = max(128, CHECK_IMAGES // self.study.image.num_classes)
        means = []
        with torch.no_grad():
            for label in range(self.study.image.num_classes):
                parts = torch.split(self.check_latent[:count], 128)
                images = (self.averaged(part, torch.full((len(part),), label, device=self.device)) for part in parts)
                means.append(torch.stack([self.feature_map(part).sum(dim=0) for part in images]).sum(dim=0) / count)
        return torch.stack(means)

    def _means(self) -> Tensor:
        latent = torch.randn(len(self.labels), self.study.gan.latent_size, generator=self.random).to(self.device)
        features = self.feature_map(self.generator(latent, self.labels))
        num_classes = self.study.image.num_classes
        return features.view(num_classes, -1, features.shape[1]).mean(dim=1)  # (classes * n, D) -> (classes, D)


@dataclass(frozen=True)
class _Pull:
    """Residual of means, (classes, D), weighted by how much of the signal along each component is no noise.

    Args:
        target: (classes, used) shrunk means.
        basis: (components, used) orthonormal rows.
        weights: (components + 1,) not negative, the last one for what is orthogonal to the basis.
        used: (used,) indices of the features that are not held back.
    """

    target: Tensor
    basis: Tensor
    weights: Tensor
    used: Tensor

    def __call__(self, means: Tensor) -> Tensor:
        residual = means[:, self.used] - self.target
        rest = self.weights[-1]
        weighted = rest * residual + (residual @ self.basis.T * (self.weights[:-1] - rest)) @ self.basis
        return torch.zeros_like(means).index_copy_(1, self.used, weighted)


def _pull(
    study: StudyConfig,
    state: GanState,
    feature_map: FeatureMap,
    released: _Released,
    prior: Tensor,
    used: Tensor,
    device: torch.device,
) -> _Pull:
    """Shrink the released means toward the prior, band by band of principal components of varied public images.

    What all classes have in common is shrunk apart from what sets them apart, as its noise is smaller.
    """
    images = varied_images(public_images(study, state, NUM_PUBLIC, device), torch.Generator().manual_seed(study.seed))
    varied = torch.cat([feature_map(part)[:, used] for part in torch.split(images, 128)])
    basis, variances = principal_components(varied)
    difference, share, noise = (released.means - prior)[:, used], released.share, released.noise_stddev
    common = (share[:, None] * difference).sum(dim=0)
    common_variance = float((share * noise).pow(2).sum())
    shrunk, weights = shrink(common, common_variance, basis)
    target = prior[:, used] + shrunk
    for label in range(len(share) if len(share) > 1 else 0):
        variance = float(noise[label] ** 2 * (1 - 2 * share[label])) + common_variance
        own, own_weights = shrink(difference[label] - common, variance, basis)
        target[label] += own
        weights = torch.maximum(weights, own_weights)
    spread = torch.cat([variances, variances[-1:]]) / variances[0]
    weights = weights * (spread + RIDGE) ** -_pace(study).whitening
    return _Pull(target, basis, weights, used)


def _residual(released: _Released, means: Tensor, held: Tensor) -> float:
    """Squared distance on the held-back features, less the noise's expected share: unbiased."""
    distance = (means - released.means)[:, held].pow(2).sum(dim=1) - len(held) * released.noise_stddev**2
    return float((released.share * distance).sum())


@dataclass(frozen=True)
class _Checked:
    """An average on the way: the step, its parameters, mean features (classes, D), and residual on held-back ones."""

    step: int
    generator: Vector
    means: Tensor
    residual: float


def _surely_better(released: _Released, held: Tensor, one: _Checked, other: _Checked) -> bool:
    """Whether the first residual is smaller by more than the noise explains.

    The noise moves the difference of two residuals by twice its scalar product with the difference of the means.
    """
    moved = (one.means - other.means)[:, held].pow(2).sum(dim=1) * (released.share * released.noise_stddev).pow(2)
    return other.residual - one.residual > SURELY * 2 * float(moved.sum().sqrt())


def _generator(study: StudyConfig, vector: Vector, device: torch.device) -> torch.nn.Module:
    network = networks.build_generator(study)
    load_vector(network, vector)
    return network.to(device)


def _raw(feature_map: FeatureMap, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([feature_map.raw(part) for part in torch.split(images, 128)])
