"""The sparse warm-up: columns that are trained first, as factors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.rules.columns import drawn_columns, serve_columns
from edge_sdk.core.errors import AdapterError
from edge_sdk.core.flexlora import combine
from edge_sdk.core.lora import LoraFactors
from tests.edge_sdk.core.draws import factors, seeds


@given(seeds, st.integers(1, 9), st.integers(1, 9))
def test_the_product_is_the_global_update_with_all_other_columns_zero(
    seed: int, rank: int, stored_rank: int
) -> None:
    stored = factors(np.random.default_rng(seed), 7, 9, stored_rank)
    served = serve_columns(stored, rank, "f/m")
    columns = drawn_columns(9, rank, "f/m")
    expected = np.zeros((7, 9))
    expected[:, columns] = stored.product()[:, columns]
    np.testing.assert_allclose(served.product(), expected, rtol=1e-5, atol=1e-5)
    assert served.a.sum() == rank
    assert ((served.a == 0) | (served.a == 1)).all()


@given(st.integers(1, 40), st.data())
def test_a_smaller_device_trains_a_part_of_what_a_larger_one_trains(width: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, width))
    most = drawn_columns(width, width, "s").tolist()
    assert drawn_columns(width, rank, "s").tolist() == most[:rank]
    assert sorted(most) == list(range(width))


@given(seeds, st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_states_of_unlike_devices_average_to_the_dense_sparse_average(seed: int, ranks: list[int]) -> None:
    """Merged, stored canonically and served again, the columns are those that were averaged."""
    rng = np.random.default_rng(seed)
    states, expected = [], np.zeros((7, 9))
    for rank in ranks:
        start = serve_columns(LoraFactors.empty(7, 9), rank, "m")
        state = LoraFactors(rng.standard_normal((7, rank)).astype(np.float32), start.a)
        states.append((1 / len(ranks), state))
        expected[:, drawn_columns(9, rank, "m")] += state.b / len(ranks)
    stored = combine(states, max(ranks)).factors  # its rank is that of the widest: nothing is lost
    again = serve_columns(stored, max(ranks), "m")
    np.testing.assert_allclose(again.product(), expected, atol=1e-5)


def test_numbers_by_hand() -> None:
    stored = LoraFactors(np.array([[1.0], [2.0]]), np.array([[3.0, 4.0, 5.0]]))
    served = serve_columns(stored, 3, "x")
    order = drawn_columns(3, 3, "x")
    np.testing.assert_array_equal(served.b, np.array([[3.0, 4.0, 5.0], [6.0, 8.0, 10.0]])[:, order])


def test_version_0_starts_at_zero() -> None:
    served = serve_columns(LoraFactors.empty(4, 6), 2, "x")
    assert not served.b.any()
    assert served.b.shape == (4, 2)


def test_more_columns_than_there_are() -> None:
    with pytest.raises(AdapterError, match="7 columns of 6"):
        drawn_columns(6, 7, "x")
