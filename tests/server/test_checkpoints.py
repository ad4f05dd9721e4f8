from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import ConfigError
from server import checkpoints
from server.aggregation import GanState

NOTICE = "NOT PRIVATE: trained without differential privacy. For public data only."


def state(number: int) -> GanState:
    return GanState(number, *(np.full(size, number, np.float32) for size in (5, 3, 5)))


def test_a_state_round_trips(tmp_path: Path) -> None:
    path = checkpoints.save(tmp_path / "new", state(7), NOTICE)
    assert path.name == "round-0007.pt"
    loaded = checkpoints.load(path)
    assert loaded.round == 7
    np.testing.assert_array_equal(loaded.discriminator, state(7).discriminator)
    assert loaded.generator_average.dtype == np.float32
    assert torch.load(path, weights_only=True)["notice"] == NOTICE


def test_the_newest_is_that_of_the_highest_round(tmp_path: Path) -> None:
    assert checkpoints.latest(tmp_path) is None
    for number in (9_999, 10_000, 2):
        checkpoints.save(tmp_path, state(number), NOTICE)
    (tmp_path / ".round-20000.pt.123.tmp").write_bytes(b"a write that a crash ended")
    latest = checkpoints.latest(tmp_path)
    assert latest is not None
    assert latest.round == 10_000


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = checkpoints.save(tmp_path, state(1), NOTICE)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="round-0001.pt is not a checkpoint"):
        checkpoints.load(path)
