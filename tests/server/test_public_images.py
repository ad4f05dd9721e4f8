"""Public images have the study's shape and range, come from a seed alone, and vary as scanners and heads do."""

import numpy as np
import pytest
import torch

from common.gan.synthesis import synthesize
from server.public_images import generic_images, public_images, varied_images
from tests.common.gan.trainers import CPU, small_study
from tests.server.test_moments import start_of


@pytest.mark.parametrize("size", [28, 32, 64, 128])
def test_generic_and_varied_images_are_images_and_differ(size: int) -> None:
    images = generic_images(20, size, torch.Generator().manual_seed(1))
    varied = varied_images(images, torch.Generator().manual_seed(2))
    assert images.shape == varied.shape == (20, 1, size, size)
    for batch in (images, varied):
        assert float(batch.min()) >= -1 and float(batch.max()) <= 1
        assert float(batch.flatten(1).std(dim=1).median()) > 0.05  # something is in most
    assert float((varied - images).abs().mean(dim=(1, 2, 3)).min()) > 0.005
    border = torch.cat([images[:, :, 0].flatten(), images[:, :, :, 0].flatten()])
    assert float(border.mean()) < -0.95  # a dark ground
    again = generic_images(20, size, torch.Generator().manual_seed(1))
    assert torch.equal(images, again)


def test_they_are_the_generators_where_there_is_a_warm_start() -> None:
    study = small_study(image={"size": 28}, gan={"warm_start": "phantom"})
    start = start_of(study)
    images = public_images(study, start, 150, CPU)
    assert images.shape == (150, 1, 28, 28) and not images.requires_grad
    of_generator = synthesize(study, start.generator_average, np.zeros(200, np.int64), seed=1).images
    assert float(images.mean()) == pytest.approx(float(of_generator.mean()), abs=0.02)


def test_they_are_generic_where_there_is_none() -> None:
    study = small_study(image={"size": 28}, gan={"warm_start": "none"})
    random = torch.Generator().manual_seed(study.seed)
    assert torch.equal(public_images(study, start_of(study), 30, CPU), generic_images(30, 28, random))
