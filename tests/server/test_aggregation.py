import numpy as np
import pytest

from common.messages import LocalUpdate
from server.aggregation import GanState, aggregate, site_weights
from tests.server.scripted import two_sites


def vector(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def state() -> GanState:
    return GanState(4, vector(1, 2), vector(10), vector(0, 0))


UPDATES = {"north": LocalUpdate(5, vector(1, 0), vector(4), ()), "south": LocalUpdate(5, vector(3, 8), vector(0), ())}


def test_equal_weights_by_hand() -> None:
    after = aggregate(two_sites(), state(), UPDATES)
    np.testing.assert_allclose(after.generator, [1 + (1 + 3) / 2, 2 + (0 + 8) / 2])
    np.testing.assert_allclose(after.discriminator, [10 + 4 / 2])
    assert after.round == 5
    assert after.generator.dtype == np.float32


def test_contracted_weights_by_hand() -> None:
    study = two_sites(weights="contracted")  # 25 and 75 patients
    assert site_weights(study, ["north", "south"]) == {"north": 0.25, "south": 0.75}
    after = aggregate(study, state(), UPDATES)
    np.testing.assert_allclose(after.generator, [1 + 0.25 * 1 + 0.75 * 3, 2 + 0.75 * 8])
    np.testing.assert_allclose(after.discriminator, [10 + 0.25 * 4])


@pytest.mark.parametrize("weights", ["equal", "contracted"])
def test_the_weights_of_those_who_answered_add_up_to_one(weights: str) -> None:
    assert site_weights(two_sites(weights=weights), ["south"]) == {"south": 1.0}
    after = aggregate(two_sites(weights=weights), state(), {"south": UPDATES["south"]})
    np.testing.assert_allclose(after.generator, [4, 10])


def test_the_average_moves_by_the_generator_steps_of_a_round() -> None:
    # 3 local steps, a generator step after each: decay 0.5^3 = 1/8 of the old average stays.
    study = two_sites().with_changes("gan", ema_decay=0.5, discriminator_steps_per_generator_step=1)
    after = aggregate(study, GanState(0, vector(0, 0), vector(0), vector(8, 16)), UPDATES)
    np.testing.assert_allclose(after.generator_average, [8 / 8 + 2 * 7 / 8, 16 / 8 + 4 * 7 / 8])


def test_the_old_state_is_left_as_it_was() -> None:
    before = state()
    aggregate(two_sites(), before, UPDATES)
    np.testing.assert_array_equal(before.generator, [1, 2])
