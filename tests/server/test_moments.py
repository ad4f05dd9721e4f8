"""The generator learns what the noisy sum says, as far as the noise lets it, and never becomes worse than it was."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from common.config import StudyConfig
from common.gan.feature_map import LABEL_WEIGHT, SIZES, FeatureMap
from common.gan.parameters import to_vector
from common.gan.synthesis import synthesize
from common.gan.training import GanTrainer
from server import moments
from server.aggregation import GanState
from server.public_images import generic_images
from server.shrinkage import shrink
from tests.common.gan.trainers import CPU, small_study

PATIENTS = 200


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer images and faster steps than in earnest: networks are narrow here, and each test makes a map of its own."""
    monkeypatch.setattr(moments, "NUM_PUBLIC", 200)
    monkeypatch.setattr(moments, "CHECK_IMAGES", 256)
    for name in ("FROM_START", "FROM_NOTHING"):
        monkeypatch.setattr(moments, name, replace(getattr(moments, name), learning_rate=4e-3))


def study_of(warm_start: str = "phantom", labels: bool = True) -> StudyConfig:
    image: dict[str, Any] = {"size": 28}
    if labels:
        image |= {"label_column": "group", "labels": ["dark", "bright"]}
    return small_study(image=image, gan={"warm_start": warm_start})


def start_of(study: StudyConfig) -> GanState:
    trainer = GanTrainer(study, CPU, None, 4, study.seed)
    generator = to_vector(trainer.generator)
    return GanState(3, generator, to_vector(trainer.discriminator), generator.copy())


def patients_sum(study: StudyConfig, feature_map: FeatureMap, noise_stddev: float = 0.0) -> NDArray[np.float64]:
    """Of ``PATIENTS`` patients of one image each: a bright disc for label 1, dark noise for label 0."""
    random = torch.Generator().manual_seed(8)
    ramp = torch.linspace(-1, 1, 28)
    disc = (ramp[:, None] ** 2 + ramp**2 < 0.4).float()
    images = -0.7 + 0.2 * torch.randn(PATIENTS, 1, 28, 28, generator=random)
    labels = torch.arange(PATIENTS) % study.image.num_classes
    images[labels == study.image.num_classes - 1] += 1.2 * disc
    total = torch.zeros(study.image.num_classes, feature_map.num_features + 1, dtype=torch.float64)
    with torch.no_grad():
        features = feature_map(images.clamp(-1, 1)).double() * (1 - LABEL_WEIGHT**2) ** 0.5
    total.index_add_(0, labels, torch.cat([features, torch.full((PATIENTS, 1), LABEL_WEIGHT)], dim=1))
    noise = np.random.default_rng(9).normal(0, noise_stddev, total.numel())
    return np.asarray(total.numpy().ravel() + noise)


def middle_and_corner(study: StudyConfig, state: GanState, label: int) -> tuple[float, float]:
    images = synthesize(study, state.generator_average, np.full(64, label, np.int64), seed=1).images
    return float(images[:, 0, 11:17, 11:17].mean()), float(images[:, 0, :5, :5].mean())


@pytest.mark.parametrize("warm_start", ["phantom", "none"])
def test_the_generator_learns_what_each_class_looks_like(warm_start: str) -> None:
    study = study_of(warm_start)
    start = start_of(study)
    feature_map = moments.make_feature_map(study, start, PATIENTS, 0.1, CPU)
    total = patients_sum(study, feature_map, 0.1)
    state, record = moments.fit(study, start, feature_map, total, 0.1, CPU, seed=1, steps=60)
    assert (state.round, record.features) == (4, feature_map.num_features)
    assert record.residual_after < 0.4 * record.residual_before
    assert record.kept_step > 0 and record.stopped in ("steps", "no improvement")
    assert np.array_equal(state.generator, state.generator_average)
    assert np.array_equal(state.discriminator, start.discriminator)
    middle, corner = middle_and_corner(study, state, 1)
    assert middle - corner > 0.4
    middle, corner = middle_and_corner(study, state, 0)
    assert abs(middle - corner) < 0.3


def test_a_generator_on_the_way_is_kept_only_when_it_is_surely_better_than_the_last() -> None:
    released = moments._Released(torch.zeros(1, 10), torch.tensor([0.1]), torch.tensor([1.0]))
    held = torch.arange(10)

    def checked(distance: float, residual: float) -> moments._Checked:
        return moments._Checked(1, np.zeros(1, np.float32), torch.full((1, 10), distance), residual)

    # Means apart by 0.5 * sqrt(10): the noise moves the difference of the residuals by 2 * 0.1 * 1.58 = 0.316.
    near = checked(0.0, 1.0)
    assert not moments._surely_better(released, held, near, checked(0.5, 1.6))
    assert moments._surely_better(released, held, near, checked(0.5, 1.7))
    assert not moments._surely_better(released, held, checked(0.5, 1.7), near)


def test_without_labels() -> None:
    study = study_of(labels=False)
    start = start_of(study)
    feature_map = moments.make_feature_map(study, start, PATIENTS, 0.0, CPU)
    state, record = moments.fit(study, start, feature_map, patients_sum(study, feature_map), 0.0, CPU, seed=1, steps=60)
    assert record.noise_share == 0
    assert record.residual_after < 0.5 * record.residual_before
    middle, corner = middle_and_corner(study, state, 0)
    assert middle - corner > 0.5


def test_the_start_is_kept_when_the_sum_is_noise() -> None:
    study = study_of()
    start = start_of(study)
    feature_map = moments.make_feature_map(study, start, PATIENTS, 500.0, CPU)
    total = patients_sum(study, feature_map, 500.0)
    state, record = moments.fit(study, start, feature_map, total, 500.0, CPU, seed=1, steps=24)
    assert (record.stopped, record.kept_step) == ("noise", 0)
    assert record.residual_after == record.residual_before
    assert np.array_equal(state.generator_average, start.generator_average)


def test_one_seed_gives_one_result() -> None:
    study = study_of()
    start = start_of(study)
    feature_map = moments.make_feature_map(study, start, PATIENTS, 0.1, CPU)
    assert np.array_equal(
        feature_map.to_vector(), moments.make_feature_map(study, start, PATIENTS, 0.1, CPU).to_vector()
    )
    total = patients_sum(study, feature_map, 0.1)
    first, again, other = (
        moments.fit(study, start, feature_map, total, 0.1, CPU, seed, steps=12)[0].generator_average
        for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("warm_start", ["phantom", "none"])
def test_public_images_have_features_of_about_one(warm_start: str) -> None:
    study = study_of(warm_start)
    start = start_of(study)
    feature_map = moments.make_feature_map(study, start, PATIENTS, 0.6, CPU)
    if warm_start == "none":
        images = generic_images(300, 28, torch.Generator().manual_seed(5))
        assert len(feature_map.discriminator) == 0  # an untrained one says nothing
    else:
        images = torch.from_numpy(synthesize(study, start.generator_average, np.arange(100) % 2, seed=5).images)
    with torch.no_grad():
        long = (feature_map.raw(images) - torch.from_numpy(feature_map.centre)) * torch.from_numpy(feature_map.gain)
    assert float(long.norm(dim=1).median()) == pytest.approx(1.0, rel=0.25)
    shares = [float(block.pow(2).sum()) for block in torch.split(long, list(feature_map.block_sizes), dim=1)]
    assert max(shares) < 4 * min(shares)  # no block drowns another


@pytest.mark.parametrize("stddev", [0.0, 0.01, 0.1])
def test_shrunk_means_are_nearer_to_the_truth_than_released_ones(stddev: float) -> None:
    """Along a few components there is signal; everywhere is noise of a known variance."""
    random = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(1000, 60, generator=random))[0].T
    truth = 0.3 * torch.randn(6, generator=random) @ basis[:6]
    noisy = truth + stddev * torch.randn(1000, generator=random)
    shrunk, factors = shrink(noisy, stddev**2, basis)
    assert float(factors[:4].min()) > 0.9  # what stands out is kept
    assert bool(((factors >= 0) & (factors <= 1)).all())
    if stddev == 0:
        torch.testing.assert_close(shrunk, truth, rtol=1e-4, atol=1e-5)
    else:
        assert float((shrunk - truth).norm()) < 0.35 * float((noisy - truth).norm())


def test_counts_are_shrunk_as_far_as_the_noise_explains_their_differences() -> None:
    noisy = torch.tensor([90.0, 110.0, 100.0, 100.0], dtype=torch.float64)  # squared differences of 200
    counts = moments._label_counts(noisy, 5.0)  # of which noise explains 3 * 25
    torch.testing.assert_close(counts, 100 + (noisy - 100) * (1 - 75 / 200))
    torch.testing.assert_close(moments._label_counts(noisy, 0.0), noisy)
    torch.testing.assert_close(moments._label_counts(noisy, 50.0), torch.full_like(noisy, 100))
    assert float(moments._label_counts(torch.tensor([-30.0, 5.0]), 4.0).min()) >= 1  # never divides by nothing


@pytest.mark.parametrize("labels", [True, False])
def test_more_noise_or_fewer_patients_never_give_more_features(labels: bool) -> None:
    study = study_of(labels=labels)
    noises = [0.0, *np.geomspace(1e-3, 1e8, 80)]
    sizes = [[moments.map_size(study, patients, noise) for noise in noises] for patients in (10, 300, 5000, 10**6)]
    for few, many in zip(sizes[:-1], sizes[1:], strict=True):
        assert all(a <= b for a, b in zip(few, many, strict=True))
    for of_cohort in sizes:
        assert of_cohort == sorted(of_cohort, reverse=True)
        assert (of_cohort[0], of_cohort[-1]) == (len(SIZES) - 1, 0)
    assert set(sizes[1]) == set(range(len(SIZES)))  # each size has its use


def test_the_map_has_the_chosen_size() -> None:
    study = study_of()
    start = start_of(study)
    for noise in (0.0, 5.0, 1e4):
        feature_map = moments.make_feature_map(study, start, PATIENTS, noise, CPU)
        assert feature_map.size == moments.map_size(study, PATIENTS, noise)
