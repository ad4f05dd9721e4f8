"""The vector that leaves a site: layout by hand, one patient moves one cell by one, bad input is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.audit.counts import (
    HELD_OUT_A,
    HELD_OUT_B,
    TRAINING,
    AuditCounts,
    CountNoise,
    cells_of,
    count,
    from_vector,
    length,
    to_vector,
)
from common.audit.excess import Group

EDGES = (-0.5, 0.0, 0.5)


def ints(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def test_the_layout_by_hand() -> None:
    found = count(
        np.array([-0.7, 0.1, 0.1, 0.9]),
        ints(TRAINING, TRAINING, HELD_OUT_A, HELD_OUT_B),
        ints(0, 1, 1, 0),
        EDGES,
        2,
        canary_scores=np.array([0.9, 0.2, -0.9]),
        canary_included=np.array([True, False, False]),
    )
    # Groups, in them two classes, in them four bins; then canaries included and left out.
    expected = [1, 0, 0, 0, 0, 0, 1, 0] + [0, 0, 0, 0, 0, 0, 1, 0] + [0, 0, 0, 1, 0, 0, 0, 0] + [0, 0, 0, 1, 1, 0, 1, 0]
    vector = to_vector(found)
    assert vector.tolist() == expected
    assert len(vector) == length(2, 4) == 32
    assert cells_of(HELD_OUT_B, 2, 4) == slice(16, 24)


def test_a_score_on_a_border_is_in_the_bin_above_and_infinite_ones_are_in_the_outer_bins() -> None:
    scores = np.array([0.0, np.nextafter(0.0, -1), np.inf, -np.inf])
    found = count(scores, ints(0, 0, 0, 0), ints(0, 0, 0, 0), EDGES, 1)
    assert found.patients[TRAINING, 0].tolist() == [1, 1, 1, 1]


@given(st.lists(st.tuples(st.floats(-2, 2), st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=20), st.data())
def test_one_patient_less_moves_one_cell_of_its_own_group_by_one(
    patients: list[tuple[float, int, int]], data: st.DataObject
) -> None:
    def vector_of(rows: list[tuple[float, int, int]]) -> NDArray[np.int64]:
        table = np.array(rows, np.float64).reshape(-1, 3)
        return to_vector(count(table[:, 0], table[:, 1].astype(int), table[:, 2].astype(int), EDGES, 3))

    left_out = data.draw(st.integers(0, len(patients) - 1))
    moved = vector_of(patients) - vector_of(patients[:left_out] + patients[left_out + 1 :])
    assert np.abs(moved).sum() == moved.sum() == 1
    assert moved[cells_of(patients[left_out][1], 3, len(EDGES) + 1)].sum() == 1


@given(st.integers(1, 4), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_vector_and_counts_are_one(classes: int, bins: int, seed: int) -> None:
    vector = np.random.default_rng(seed).integers(-(2**31), 2**31, length(classes, bins))
    found = from_vector(vector, classes, bins)
    assert (found.num_classes, found.num_bins) == (classes, bins)
    assert (to_vector(found) == vector).all()


def test_a_vector_of_another_length_or_of_floats_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 32 integers"):
        from_vector(np.zeros(31, np.int64), 2, 4)
    with pytest.raises(ValueError, match="float64"):
        from_vector(np.zeros(32), 2, 4)


@pytest.mark.parametrize(
    ("scores", "groups", "classes", "edges", "said"),
    [
        ([np.nan], [0], [0], EDGES, "NaN"),
        ([0.0], [3], [0], EDGES, "groups"),
        ([0.0], [-1], [0], EDGES, "groups"),
        ([0.0], [0], [2], EDGES, "classes"),
        ([0.0, 1.0], [0], [0], EDGES, "2 scores"),
        ([0.0], [0], [0], (0.0, 0.0), "increase"),
        ([0.0], [0], [0], (0.0, np.nan), "increase"),
    ],
)
def test_who_cannot_be_counted_is_an_error(
    scores: list[float], groups: list[int], classes: list[int], edges: tuple[float, ...], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        count(np.array(scores), ints(*groups), ints(*classes), edges, 2)


def test_canaries_without_a_coin_each_are_refused() -> None:
    with pytest.raises(ValueError, match="coins"):
        count(np.zeros(0), ints(), ints(), EDGES, 1, canary_scores=np.zeros(2), canary_included=np.array([True]))


def test_a_site_without_patients_counts_none() -> None:
    found = count(np.zeros(0), ints(), ints(), EDGES, 2)
    assert isinstance(found, AuditCounts)
    assert to_vector(found).sum() == 0


@pytest.mark.parametrize(("epsilon", "sites", "noisy"), [(0.5, 3, 3), (0.5, 3, 2), (2.0, 10, 4)])
def test_the_noise_s_variance_is_that_of_the_shares(epsilon: float, sites: int, noisy: int) -> None:
    rng = np.random.default_rng(0)
    stop = 1 - np.exp(-epsilon)
    shares = rng.negative_binomial(1 / noisy, stop, (2, sites, 200_000))
    sums = (shares[0] - shares[1]).sum(0)
    noise = CountNoise(epsilon, epsilon, sites, noisy)
    assert sums.var() == pytest.approx(noise.variance(TRAINING), rel=0.03)  # 5 standard deviations are 2.5 %
    assert Group(epsilon, noise.shape).variance == pytest.approx(noise.variance(HELD_OUT_A))


@pytest.mark.parametrize("wrong", [(0.0, 2.0, 3, 2), (0.5, -1.0, 3, 2), (0.5, 2.0, 3, 4), (0.5, 2.0, 3, 0)])
def test_noise_of_no_sum_is_refused(wrong: tuple[float, float, int, int]) -> None:
    with pytest.raises(ValueError, match="not the noise of a sum"):
        CountNoise(*wrong)
