"""Where the networks begin: untrained, trained on phantoms (cached), or from a checkpoint."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from common.config import StudyConfig
from common.errors import ConfigError
from server import checkpoints, phantom_gan
from server.warm_start import cache_folder, warm_start

CPU = torch.device("cpu")
TINY = StudyConfig.model_validate(
    {
        "image": {"size": 28, "label_column": "group", "labels": ["healthy", "lesion"]},
        "gan": {
            "latent_size": 8,
            "generator_width": 4,
            "discriminator_width": 4,
            "warm_start": "phantom",
            "warm_start_steps": 5,
        },
    }
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNTHWARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(phantom_gan, "NUM_PHANTOMS", 64)


def test_without_a_warm_start_the_networks_are_untrained_and_repeatable() -> None:
    study = TINY.with_changes("gan", warm_start="none")
    first, again = warm_start(study, CPU), warm_start(study, CPU)
    other = warm_start(study.with_changes("", seed=1), CPU)
    assert first.record is None
    np.testing.assert_array_equal(first.state.generator, again.state.generator)
    assert (first.state.generator != other.state.generator).any()
    np.testing.assert_array_equal(first.state.generator, first.state.generator_average)


def test_both_networks_learn_from_phantoms_once_and_are_then_read_from_the_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    untrained = warm_start(TINY.with_changes("gan", warm_start="none"), CPU).state
    first = warm_start(TINY, CPU)
    assert first.record is not None and not first.record.from_cache
    assert (first.state.generator != untrained.generator).any()
    assert (first.state.discriminator != untrained.discriminator).any()
    monkeypatch.setattr("server.warm_start.train_on_phantoms", None)  # training again would fail
    again = warm_start(TINY, CPU)
    assert again.record is not None and again.record.from_cache
    assert again.record.digest == first.record.digest
    np.testing.assert_array_equal(again.state.discriminator, first.state.discriminator)
    # What only steers the private steps has no part in it.
    gentle = TINY.with_changes("gan", generator_learning_rate=1e-5).with_changes("privacy", epsilon=1.0)
    same = warm_start(gentle, CPU)
    assert same.record is not None and same.record.digest == first.record.digest


@pytest.mark.parametrize("change", [{"warm_start_steps": 6}, {"warm_start_anatomy": "chest"}, {"latent_size": 9}])
def test_another_recipe_is_another_warm_start(change: dict[str, object]) -> None:
    warm_start(TINY, CPU)
    other = warm_start(TINY.with_changes("gan", **change), CPU)
    assert other.record is not None and not other.record.from_cache
    assert len(list(cache_folder().glob("*.pt"))) == 2


def test_a_checkpoint_of_another_run_begins_a_new_one_at_round_zero(tmp_path: Path) -> None:
    trained = dataclasses.replace(warm_start(TINY, CPU).state, round=7)
    path = checkpoints.save(tmp_path, trained, "NOT PRIVATE: public data.")
    start = warm_start(TINY.with_changes("gan", warm_start=str(path)), CPU)
    assert start.state.round == 0
    assert start.record is not None and "NOT PRIVATE" in start.record.source  # its own notice goes along
    np.testing.assert_array_equal(start.state.generator, trained.generator)
    with pytest.raises(ConfigError, match="parameters"):
        warm_start(TINY.with_changes("gan", warm_start=str(path), generator_width=8), CPU)
    with pytest.raises(ConfigError, match="not a checkpoint"):
        warm_start(TINY.with_changes("gan", warm_start=str(tmp_path / "absent.pt")), CPU)


def test_a_damaged_cache_is_made_anew() -> None:
    first = warm_start(TINY, CPU)
    (path,) = cache_folder().glob("*.pt")
    path.write_bytes(path.read_bytes()[:-100])
    again = warm_start(TINY, CPU)
    assert first.record is not None and again.record is not None
    assert not again.record.from_cache
    np.testing.assert_array_equal(again.state.generator, first.state.generator)
