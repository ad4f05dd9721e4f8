import numpy as np
import pytest

from common.config import StudyConfig
from server.aggregation import AggregateUpdate, GanState, aggregate
from tests.server.scripted import two_sites


def vector(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def state() -> GanState:
    return GanState(4, vector(1, 2), vector(10), vector(0, 0))


UPDATES = {"north": vector(1, 0, 4), "south": vector(3, 8, 0)}  # two of the generator, one of the discriminator


def total(study: StudyConfig, *sites: str) -> AggregateUpdate:
    """What the server learns: the sum of what each site sends, its update times its own weight."""
    return AggregateUpdate(sum(study.site_weight(site) * UPDATES[site] for site in sites).astype(np.float32), sites)


def test_equal_weights_by_hand() -> None:
    study = two_sites(rounds=5)
    after = aggregate(study, state(), total(study, "north", "south"))
    np.testing.assert_allclose(after.generator, [1 + (1 + 3) / 2, 2 + (0 + 8) / 2])
    np.testing.assert_allclose(after.discriminator, [10 + 4 / 2])
    assert after.round == 5
    assert after.generator.dtype == np.float32


def test_contracted_weights_by_hand() -> None:
    study = two_sites(rounds=5, weights="contracted")  # 25 and 75 patients
    after = aggregate(study, state(), total(study, "north", "south"))
    np.testing.assert_allclose(after.generator, [1 + 0.25 * 1 + 0.75 * 3, 2 + 0.75 * 8], rtol=1e-6)
    np.testing.assert_allclose(after.discriminator, [10 + 0.25 * 4])


@pytest.mark.parametrize("weights", ["equal", "contracted"])
@pytest.mark.parametrize("site", ["north", "south"])
def test_the_weights_of_those_who_answered_add_up_to_one(weights: str, site: str) -> None:
    study = two_sites(rounds=5, weights=weights)
    after = aggregate(study, state(), total(study, site))
    np.testing.assert_allclose(after.generator, [1, 2] + UPDATES[site][:2], rtol=1e-6)
    np.testing.assert_allclose(after.discriminator, [10 + UPDATES[site][2]], rtol=1e-6)


def test_the_average_moves_by_the_generator_steps_of_a_round() -> None:
    # 3 local steps, a generator step after each: decay 0.5^3 = 1/8 of the old average stays.
    study = two_sites(rounds=5).with_changes("gan", ema_decay=0.5, discriminator_steps_per_generator_step=1)
    before = GanState(0, vector(0, 0), vector(0), vector(8, 16))
    after = aggregate(study, before, total(study, "north", "south"))
    np.testing.assert_allclose(after.generator_average, [8 / 8 + 2 * 7 / 8, 16 / 8 + 4 * 7 / 8])


def test_the_old_state_is_left_as_it_was() -> None:
    before, study = state(), two_sites(rounds=5)
    aggregate(study, before, total(study, "north", "south"))
    np.testing.assert_array_equal(before.generator, [1, 2])
