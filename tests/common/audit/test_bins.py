"""The borders of the bins: by hand, for any generator increasing or a named reason, and where copies end up."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from common.audit.bins import NUM_BINS, REFERENCE, bin_edges
from common.audit.counts import bins_of


def test_the_borders_by_hand() -> None:
    # The middle candidate is 0.6 like its fellow: a copy scores 0.4, and 0 likeness is -0.6.
    edges = bin_edges(np.array([0.1, 0.6, 0.9], np.float32))
    assert edges.dtype == np.float32
    assert edges.tolist() == pytest.approx([-0.3, -0.15, -0.075, 0.0, 0.05, 0.1, 0.2])
    assert len(edges) == NUM_BINS - 1 == len(REFERENCE) - 1
    assert sum(REFERENCE) == pytest.approx(1)


def test_an_exact_copy_is_in_the_highest_bin_and_a_blurry_generator_s_patients_are_spread() -> None:
    for typical in (0.5, 0.86, 0.97):
        edges = bin_edges(np.full(1000, typical, np.float32)).tolist()
        assert bins_of(np.array([1 - typical]), edges).tolist() == [NUM_BINS - 1]
        assert bins_of(np.array([0.9, 0.7, 0.2]) * typical - typical, edges).tolist() == [3, 1, 0]


@given(arrays.arrays(np.float32, st.integers(2, 50), elements=st.floats(-1, 1, width=32)))
def test_borders_increase_or_a_reason_is_given(nearest: NDArray[np.float32]) -> None:
    try:
        edges = bin_edges(nearest)
    except ValueError as error:
        assert np.median(nearest) > 0.98
        assert "could not be told" in str(error)
    else:
        assert (np.diff(edges) > 1e-3).all()
        assert np.array_equal(edges, bin_edges(nearest[::-1]))  # the order of candidates does not matter


@pytest.mark.parametrize(
    ("nearest", "said"),
    [
        ([], "two candidates"),
        ([0.5], "two candidates"),
        ([0.5, np.nan], "constant"),
        ([0.5, np.inf], "constant"),
        ([0.5, 1.5], "correlations"),
        ([1.0, 1.0, 1.0], "1.0000 like them"),
        ([0.999, 0.995, 0.2], "0.9950 like them"),
    ],
)
def test_candidates_that_give_no_scale_are_a_named_reason(nearest: list[float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        bin_edges(np.array(nearest, np.float32))
