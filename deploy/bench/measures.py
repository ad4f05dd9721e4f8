"""How good synthetic images are, measured against real ones that nobody trained on.

All measures but the classifiers see images through the same random features: no downloaded network, the same for
everyone, and none that an algorithm was trained on.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, cross_entropy

NUM_FEATURES = 256
FEATURE_SEED = 20
NEIGHBOURS = 5
NUM_STATISTICS = 12
CLASSIFIER_SEEDS = (0, 1, 2)

Images = NDArray[np.float32]
Labels = NDArray[np.int64]
Features = NDArray[np.float64]


def features(images: Images) -> Features:
    """Random features: untrained convolutions at three scales, averages and squares on a 4x4 grid, projected.

    Args:
        images: (count, 1, size, size) in [-1, 1].

    Returns:
        (count, 256).
    """
    random = torch.Generator().manual_seed(FEATURE_SEED)
    parts = []
    batch = torch.from_numpy(images)
    for scale in (1, 2, 4):
        seen = avg_pool2d(batch, scale) if scale > 1 else batch
        layers = nn.Sequential(
            nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(32, 48, 3), nn.ReLU()
        )
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, generator=random)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        with torch.inference_mode():
            pooled = []
            for part in seen.split(256):
                maps = layers(part)
                pooled.append(torch.cat([adaptive_avg_pool2d(power, 4).flatten(1) for power in (maps, maps**2)], dim=1))
            parts.append(torch.cat(pooled))
    joined = torch.cat(parts, dim=1).double()
    projection = torch.randn(joined.shape[1], NUM_FEATURES, generator=random, dtype=torch.float64)
    return np.asarray((joined @ projection / joined.shape[1] ** 0.5).numpy())


def frechet(a: Features, b: Features) -> float:
    """Frechet distance of two Gaussians fitted to (count, dim) features (Heusel et al. 2017); lower is better.

    Two samples of one distribution, 2000 images each, score about 0.02.
    """
    mean = a.mean(0) - b.mean(0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # tr sqrt(A B) by the eigenvalues of A B, which are real and not negative up to rounding.
    eigenvalues = np.linalg.eigvals(cov_a @ cov_b)
    return float(mean @ mean + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(np.maximum(eigenvalues.real, 0)).sum())


def neighbourhoods(real: Features, fake: Features, k: int = NEIGHBOURS) -> dict[str, float]:
    """Precision, recall, density and coverage (Naeem et al. 2020, section 3), by balls to the k-th nearest neighbour.

    Args:
        real: (count, dim), more than k.
        fake: (count, dim), more than k.
        k: which neighbour of the same set a ball reaches to.

    Returns:
        ``precision``: share of fakes in the ball of a real; ``recall``: share of reals in the ball of a fake;
        ``density``: real balls that hold a fake, on average, over k (may exceed 1); ``coverage``: share of real balls
        that hold a fake. Fewer modes lower recall and coverage, odd images lower precision and density.

    Raises:
        ValueError: a set is too small to have k neighbours.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"expected more than {k} of each, found {len(real)} real and {len(fake)} fake")
    real_radius, fake_radius = _radius(real, k), _radius(fake, k)
    distances = _distances(real, fake)  # (real, fake)
    in_real_ball = distances < real_radius[:, None]
    return {
        "precision": float(in_real_ball.any(axis=0).mean()),
        "recall": float((distances < fake_radius).any(axis=1).mean()),
        "density": float(in_real_ball.sum(axis=0).mean() / k),
        "coverage": float(in_real_ball.any(axis=1).mean()),
    }


def downstream_accuracy(
    images: Images, labels: Labels, real: Images, real_labels: Labels, device: torch.device, epochs: int
) -> float:
    """What a small convolution network gets right on real images when it learned from the synthetic ones only.

    Args:
        images, labels: synthetic, (count, 1, size, size) in [-1, 1] and (count,).
        real, real_labels: of patients nobody trained on.
        device: where to train.
        epochs: passes over the synthetic images.

    Returns:
        The mean over the classes of the share that is recognised, and over three fixed seeds: chance is 1 / classes.
    """
    scores = [
        balanced_accuracy(_train_and_predict(images, labels, real, device, epochs, seed), real_labels)
        for seed in CLASSIFIER_SEEDS
    ]
    return float(np.mean(scores))


def shortcut_accuracy(images: Images, labels: Labels, real: Images, real_labels: Labels) -> float:
    """The same from twelve grey-level statistics and no picture at all: what brightness alone gives away."""
    known, asked = statistics(images), statistics(real)
    centre, scale = known.mean(0), known.std(0) + 1e-9
    inputs, targets = torch.from_numpy((known - centre) / scale), torch.from_numpy(labels)
    model = nn.Linear(NUM_STATISTICS, int(labels.max()) + 1).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = cross_entropy(model(inputs), targets) + 1e-3 * model.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    # Statistics far from all synthetic ones are clipped: an extreme value should not decide alone.
    seen = torch.from_numpy(np.clip((asked - centre) / scale, -5, 5))
    with torch.inference_mode():
        return balanced_accuracy(np.asarray(model(seen).argmax(dim=1).numpy()), real_labels)


def statistics(images: Images) -> Features:
    """Mean, standard deviation, skewness, kurtosis, seven percentiles, share of black: (count, 12)."""
    flat = images.reshape(len(images), -1).astype(np.float64)
    mean, stddev = flat.mean(1), flat.std(1) + 1e-9
    standard = (flat - mean[:, None]) / stddev[:, None]
    percentiles = np.percentile(flat, [1, 5, 25, 50, 75, 95, 99], axis=1)
    black = (flat < -0.98).mean(1)
    return np.column_stack([mean, stddev, (standard**3).mean(1), (standard**4).mean(1), *percentiles, black])


def balanced_accuracy(predicted: Labels, labels: Labels) -> float:
    """Share recognised of each class that occurs in ``labels``, averaged over these classes."""
    return float(np.mean([(predicted[labels == label] == label).mean() for label in np.unique(labels)]))


def _radius(points: Features, k: int) -> NDArray[np.float64]:
    """Distance of each point to its k-th nearest other: (count,)."""
    return np.asarray(np.partition(_distances(points, points), k, axis=1)[:, k])  # the nearest is the point itself


def _distances(a: Features, b: Features) -> NDArray[np.float64]:
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    distances = np.sqrt(np.maximum(squares, 0))
    if a is b:
        np.fill_diagonal(distances, 0)  # rounding leaves a little
    return np.asarray(distances)


def _train_and_predict(
    images: Images, labels: Labels, real: Images, device: torch.device, epochs: int, seed: int
) -> Labels:
    random = torch.Generator().manual_seed(seed)
    network = _classifier(images.shape[-1], int(labels.max()) + 1, random).to(device)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    inputs, targets = torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device)
    for _ in range(epochs):
        for batch in torch.randperm(len(inputs), generator=random).split(64):
            optimizer.zero_grad()
            cross_entropy(network(inputs[batch]), targets[batch]).backward()
            optimizer.step()
    with torch.inference_mode():
        parts = [network(part.to(device)).argmax(dim=1).cpu() for part in torch.from_numpy(real).split(500)]
    return np.asarray(torch.cat(parts).numpy())


def _classifier(size: int, num_classes: int, random: torch.Generator) -> nn.Sequential:
    """Convolutions and halvings down to at most 8 pixels, one more, a linear layer; weights by ``random``."""
    layers: list[nn.Module] = []
    channels, width = 1, 16
    while size > 8:
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        channels, width, size = width, 32, size // 2
    layers += [nn.Conv2d(channels, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * size**2, num_classes)]
    for part in layers:
        if isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.kaiming_uniform_(part.weight, a=5**0.5, generator=random)
            nn.init.zeros_(part.bias)  # type: ignore[arg-type]
    network = nn.Sequential(*layers)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a third faster
    return network
