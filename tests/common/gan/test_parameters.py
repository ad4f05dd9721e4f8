import numpy as np
import pytest
import torch
from torch import nn

from common.config import StudyConfig
from common.errors import ConfigError
from common.gan.devices import choose_device
from common.gan.networks import build_discriminator, build_generator
from common.gan.parameters import load_vector, to_vector
from tests.common.gan.trainers import small_study


def by_hand() -> nn.Linear:
    # weight [[1, 2], [3, 4]], bias [5, 6] -> [1, 2, 3, 4, 5, 6]: named_parameters order, row by row.
    module = nn.Linear(2, 2)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        module.bias.copy_(torch.tensor([5.0, 6.0]))
    return module


def test_the_vector_by_hand() -> None:
    vector = to_vector(by_hand())
    assert vector.dtype == np.float32
    assert vector.tolist() == [1, 2, 3, 4, 5, 6]


def test_loading_by_hand() -> None:
    module = by_hand()
    load_vector(module, np.array([6, 5, 4, 3, 2, 1], np.float32))
    assert module.weight.tolist() == [[6, 5], [4, 3]]
    assert module.bias.tolist() == [2, 1]


@pytest.mark.parametrize("study", [small_study(), small_study(gan={"discriminator_normalization": "group"})])
def test_every_network_survives_the_round_trip(study: StudyConfig) -> None:
    for build in (build_generator, build_discriminator):
        one, other = build(study), build(study)
        load_vector(other, to_vector(one))
        np.testing.assert_array_equal(to_vector(other), to_vector(one))


def test_the_memory_format_does_not_change_the_vector() -> None:
    generator = build_generator(small_study())
    vector = to_vector(generator)
    generator.to(memory_format=torch.channels_last)
    np.testing.assert_array_equal(to_vector(generator), vector)
    load_vector(generator, vector[::-1].copy())
    np.testing.assert_array_equal(to_vector(generator), vector[::-1])


def test_the_vector_is_a_copy() -> None:
    module = by_hand()
    to_vector(module)[0] = 100
    assert module.weight[0, 0] == 1
    mine = np.zeros(6, np.float32)
    load_vector(module, mine)
    mine[0] = 100
    assert module.weight[0, 0] == 0


@pytest.mark.parametrize(
    ("vector", "text"),
    [
        (np.zeros(5, np.float32), "6 parameters"),
        (np.zeros(7, np.float32), "6 parameters"),
        (np.zeros((1, 6), np.float32), "6 parameters"),
        (np.array([0, 0, np.nan, 0, 0, 0], np.float32), "finite"),
        (np.array([0, 0, 0, 0, 0, np.inf], np.float32), "finite"),
    ],
)
def test_vectors_that_do_not_fit_are_refused_and_change_nothing(vector: np.ndarray, text: str) -> None:
    module = by_hand()
    with pytest.raises(ValueError, match=text):
        load_vector(module, vector)
    assert to_vector(module).tolist() == [1, 2, 3, 4, 5, 6]


def test_the_device_is_the_gpu_only_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="CUDA"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda")
    assert choose_device("cpu") == torch.device("cpu")
