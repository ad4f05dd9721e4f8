"""No layer mixes images: a row's output is a function of that row alone."""

import itertools

import pytest
import torch
from torch import nn

from common.config import StudyConfig
from common.gan.networks import build_discriminator, build_generator, num_parameters
from tests.common.gan.trainers import small_study

SIZES = (28, 32, 40, 48, 64, 80)
LABELS = {"label_column": "group", "labels": ["ill", "well"]}
CONFIGURATIONS = list(itertools.product(("none", "group"), (False, True), SIZES))


def study_of(normalization: str, labelled: bool, size: int) -> StudyConfig:
    image = {"size": size, **(LABELS if labelled else {})}
    return small_study(image=image, gan={"discriminator_normalization": normalization})


@pytest.mark.parametrize(("normalization", "labelled", "size"), CONFIGURATIONS)
def test_a_logit_depends_on_its_own_image_and_label_alone(normalization: str, labelled: bool, size: int) -> None:
    study = study_of(normalization, labelled, size)
    torch.manual_seed(0)
    discriminator = build_discriminator(study)
    images, labels = torch.rand(5, 1, size, size) * 2 - 1, torch.randint(study.image.num_classes, (5,))
    logits = discriminator(images, labels)
    assert logits.shape == (5,)
    for row in range(5):
        others, other_labels = 1e6 * torch.randn(5, 1, size, size), (labels + 1) % study.image.num_classes
        others[row], other_labels[row] = images[row], labels[row]
        torch.testing.assert_close(discriminator(others, other_labels)[row], logits[row], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("normalization", "labelled", "size"), CONFIGURATIONS)
def test_a_logits_gradient_reaches_its_own_image_alone(normalization: str, labelled: bool, size: int) -> None:
    study = study_of(normalization, labelled, size)
    torch.manual_seed(0)
    images = (torch.rand(3, 1, size, size) * 2 - 1).requires_grad_()
    build_discriminator(study)(images, torch.zeros(3, dtype=torch.int64))[1].backward()
    assert images.grad is not None
    assert images.grad[1].abs().sum() > 0
    assert images.grad[[0, 2]].abs().sum() == 0


@pytest.mark.parametrize("normalization", ["none", "group"])
def test_the_discriminator_holds_only_layers_that_opacus_gets_right(normalization: str) -> None:
    modules = list(build_discriminator(study_of(normalization, True, 64)).modules())
    leaves = [module for module in modules if not list(module.children())]
    assert {type(leaf) for leaf in leaves} <= {nn.Conv2d, nn.GroupNorm, nn.LeakyReLU, nn.Linear}
    assert all(leaf.padding_mode == "zeros" for leaf in leaves if isinstance(leaf, nn.Conv2d))
    assert not [buffer for module in modules for buffer in module.buffers()]


def test_the_label_chooses_the_logit() -> None:
    study = study_of("none", True, 28)
    torch.manual_seed(0)
    discriminator = build_discriminator(study)
    image = torch.rand(1, 1, 28, 28).repeat(2, 1, 1, 1)
    ill, well = discriminator(image, torch.tensor([0, 1]))
    assert ill != well


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_a_fake_has_the_studys_shape_and_depends_on_its_own_latent_alone(labelled: bool, size: int) -> None:
    study = study_of("none", labelled, size)
    torch.manual_seed(0)
    generator = build_generator(study)
    latent, label = torch.randn(3, 4), torch.zeros(3, dtype=torch.int64)
    with torch.no_grad():
        fakes = generator(latent, label)
        changed = latent.clone()
        changed[[0, 2]] *= 100
        again = generator(changed, label)
    assert fakes.shape == (3, 1, size, size)
    assert fakes.abs().max() <= 1
    torch.testing.assert_close(again[1], fakes[1], rtol=1e-5, atol=1e-6)
    assert (again[0] != fakes[0]).any()


def test_widths_by_hand() -> None:
    # Size 32 halves to 4 in 3 steps: 4x4 convolutions 1 -> 4 -> 8 -> 16, then 16 x 4 x 4 -> 1.
    # (1*4*16 + 4) + (4*8*16 + 8) + (8*16*16 + 16) + (16*16 + 1) = 68 + 520 + 2064 + 257 = 2909.
    study = study_of("none", False, 32)
    assert num_parameters(build_discriminator, study) == 2909
    assert sum(parameter.numel() for parameter in build_discriminator(study).parameters()) == 2909
