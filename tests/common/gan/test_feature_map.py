import numpy as np
import pytest
import torch
from torch import Tensor

from common.config import StudyConfig
from common.gan.feature_map import SIZES, FeatureMap, block_sizes, raw_feature_map
from common.gan.parameters import to_vector
from common.gan.training import GanTrainer
from tests.common.gan.trainers import CPU, small_study


def pictures(count: int, *spatial: int, seed: int = 1) -> Tensor:
    return 2 * torch.rand(count, 1, *spatial, generator=torch.Generator().manual_seed(seed)) - 1


def scaled_map(
    study: StudyConfig, images: Tensor, seed: int = 3, *, size: int = 1, discriminator: bool = False
) -> FeatureMap:
    """Centred on the images, and scaled so that most of them stay below the bound."""
    trainer = GanTrainer(study, CPU, None, 4, 1)
    flat = to_vector(trainer.discriminator) if discriminator else np.zeros(0, np.float32)
    raw = raw_feature_map(study, images.ndim - 2, seed, flat, size)
    found = raw.raw(images)
    centre = found.mean(dim=0)
    return raw.scaled(centre, torch.full((raw.num_features,), 0.5 / float((found - centre).norm(dim=1).max())))


@pytest.mark.parametrize("spatial", [(28, 28), (64, 64), (28, 28, 28)])
@pytest.mark.parametrize("discriminator", [False, True])
@pytest.mark.parametrize("size", range(len(SIZES)))
def test_it_travels_as_one_vector(spatial: tuple[int, ...], discriminator: bool, size: int) -> None:
    if discriminator and len(spatial) == 3:
        pytest.skip("the discriminator has two spatial axes")
    study = small_study(image={"size": spatial[0]})
    images = pictures(4, *spatial)
    sent = scaled_map(study, images, seed=2**32 - 1, size=size, discriminator=discriminator)
    vector = sent.to_vector()
    assert vector.dtype == np.float32 and vector.nbytes < 10e6
    received = FeatureMap.from_vector(study, vector)
    assert received.size == size
    assert torch.equal(received(images), sent(images))
    assert received(images).shape == (4, sent.num_features)
    assert sum(sent.block_sizes) == sent.num_features
    assert sent.length(3) == 3 * (sent.num_features + 1)


@pytest.mark.parametrize("spatial", [(32, 32), (28, 28, 28)])
def test_gradients_are_those_of_differences(spatial: tuple[int, ...]) -> None:
    study = small_study(image={"size": spatial[0]})
    images = pictures(2, *spatial)
    feature_map = scaled_map(study, pictures(6, *spatial, seed=5))
    with torch.inference_mode():
        feature_map(images)  # a site's call before must not take the gradient away
    weights = torch.randn(feature_map.num_features, generator=torch.Generator().manual_seed(2))
    images.requires_grad_(True)
    (feature_map(images) @ weights).sum().backward()  # type: ignore[no-untyped-call]
    assert images.grad is not None
    # Along the gradient the sum changes the most, so what rectifiers that change sides do to the difference is small.
    direction = images.grad / images.grad.abs().mean()
    step = 1e-3
    with torch.no_grad():
        ahead, behind = (
            (feature_map(images + sign * step * direction) @ weights).sum().double() for sign in (1.0, -1.0)
        )
    assert float((images.grad * direction).sum()) == pytest.approx(float(ahead - behind) / (2 * step), rel=0.02)


def test_no_image_has_features_of_a_norm_above_one() -> None:
    study = small_study(image={"size": 32})
    feature_map = scaled_map(study, pictures(6, 32, 32))
    norms = feature_map(torch.cat([pictures(3, 32, 32, seed=4), 1e3 * pictures(3, 32, 32)])).norm(dim=1)
    assert float(norms[:3].max()) < 0.99  # a usual image is left as it is
    torch.testing.assert_close(norms[3:], torch.ones(3))


def test_features_of_an_image_do_not_depend_on_its_batch() -> None:
    study = small_study(image={"size": 32})
    images = pictures(6, 32, 32)
    feature_map = scaled_map(study, images, discriminator=True)
    torch.testing.assert_close(feature_map(images)[2:3], feature_map(images[2:3]), rtol=1e-4, atol=1e-6)


def test_they_tell_apart_what_has_the_same_mean() -> None:
    """Two sets of images with equal pixel means: one varies as a whole, the other pixel by pixel."""
    study = small_study(image={"size": 32})
    random = torch.Generator().manual_seed(1)
    together = 0.3 * torch.randn(400, 1, 1, 1, generator=random).expand(400, 1, 32, 32)
    apart = 0.3 * torch.randn(400, 1, 32, 32, generator=random)
    feature_map = scaled_map(study, torch.cat([together, apart]))
    first, again, other = (feature_map(part).mean(dim=0) for part in (together[:200], together[200:], apart))
    assert float((first - other).norm()) > 5 * float((first - again).norm())


def test_another_seed_gives_other_features() -> None:
    study = small_study(image={"size": 32})
    images = pictures(2, 32, 32)
    flat = np.zeros(0, np.float32)
    first, second, again = (raw_feature_map(study, 2, seed, flat).raw(images) for seed in (1, 65537, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, second)


@pytest.mark.parametrize(
    ("position", "value"),
    [(0, 9.0), (1, 4.0), (2, 3.0), (2, 2.0), (3, 65536.0), (5, 1.0), (5, 2.0), (9, np.nan), (9, np.inf)],
)
def test_a_damaged_vector_is_refused(position: int, value: float) -> None:
    study = small_study(image={"size": 32})
    vector = raw_feature_map(study, 2, 1, np.zeros(0, np.float32)).to_vector()
    vector[position] = value
    with pytest.raises(ValueError, match="expected"):
        FeatureMap.from_vector(study, vector)


@pytest.mark.parametrize("length", [0, 5, 6, 1000])
def test_a_vector_of_another_length_is_refused(length: int) -> None:
    study = small_study(image={"size": 32})
    vector = raw_feature_map(study, 2, 1, np.zeros(0, np.float32)).to_vector()
    with pytest.raises(ValueError, match="expected"):
        FeatureMap.from_vector(study, vector[:length])


def test_a_map_of_another_image_size_is_refused() -> None:
    vector = raw_feature_map(small_study(image={"size": 32}), 2, 1, np.zeros(0, np.float32)).to_vector()
    with pytest.raises(ValueError, match="expected"):
        FeatureMap.from_vector(small_study(image={"size": 64}), vector)


def test_sizes_have_ever_more_features() -> None:
    study = small_study(image={"size": 32})
    for axes in (2, 3):
        counts = [sum(block_sizes(study, axes, size, with_discriminator=False)) for size in range(len(SIZES))]
        assert counts == sorted(set(counts))
