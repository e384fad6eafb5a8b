"""Factors in the dtypes of the wire: numbers by hand, a naive reference, and what every dtype must keep."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.core.adapter_file.dtypes import (
    FLOAT16_LARGEST,
    INT8_A,
    INT8_BLOCK,
    WEIGHT_A,
    WEIGHT_B,
    WIRE_DTYPES,
    WireDtype,
    dequantised,
    pack,
    quantised,
    unpack,
)
from edge_sdk.core.errors import AdapterError
from edge_sdk.core.lora import LoraFactors, Matrix
from tests.edge_sdk.core.draws import factors, seeds

shapes = st.tuples(st.integers(1, 150), st.integers(1, 150))
dtypes = st.sampled_from(WIRE_DTYPES)


def there_and_back(f: LoraFactors, dtype: WireDtype, scaling: float = 2.0) -> LoraFactors:
    return unpack(pack(f, scaling, dtype).tensors, scaling)


# --- int8 -----------------------------------------------------------------------------------------


def test_int8_by_hand() -> None:
    """Two blocks of one row, of scales 1 and 1/2, with a half each rounded to even; and a row of zeros."""
    row = np.zeros(INT8_BLOCK + 3, np.float32)
    row[:4] = [127, -3, 2.5, 0.4]
    row[INT8_BLOCK:] = [63.5, -63.5, 1.75]
    values, scales = quantised(np.stack([row, np.zeros_like(row)]))
    assert scales.tolist() == [[1.0, 0.5], [0.0, 0.0]]
    assert values[0, :4].tolist() == [127, -3, 2, 0]
    assert values[0, INT8_BLOCK:].tolist() == [127, -127, 4]
    assert not values[1].any()
    assert dequantised(values, scales)[0, INT8_BLOCK:].tolist() == [63.5, -63.5, 2.0]


def naive(rows: Matrix) -> Matrix:
    """Value by value, as the specification says it."""
    back = np.zeros(rows.shape, np.float32)
    for i, row in enumerate(rows.astype(np.float32)):
        for begin in range(0, len(row), INT8_BLOCK):
            block = row[begin : begin + INT8_BLOCK]
            scale = np.float32(max(abs(value) for value in block)) / np.float32(127)
            for j, value in enumerate(block):
                back[i, begin + j] = np.float32(round(float(value / scale))) * scale if scale else 0.0
    return back


@given(seed=seeds, rank=st.integers(1, 4), width=st.integers(1, 200))
def test_int8_is_the_naive_reference(seed: int, rank: int, width: int) -> None:
    rows = np.random.default_rng(seed).standard_normal((rank, width)).astype(np.float32)
    np.testing.assert_array_equal(dequantised(*quantised(rows)), naive(rows))


@given(seed=seeds, size=st.sampled_from([1e-44, 1e-30, 1e-3, 1.0, 1e30]))
def test_an_error_is_at_most_half_a_scale(seed: int, size: float) -> None:
    """Also of the smallest numbers that float32 has, where a scale is coarse."""
    rows = (np.random.default_rng(seed).uniform(-1, 1, (3, 100)) * size).astype(np.float32)
    values, scales = quantised(rows)
    error = np.abs(dequantised(values, scales) - rows)
    largest = np.abs(rows).max()
    assert error.max() <= max(0.502 * scales.max(), 64 * 1.5e-45)
    assert error.max() <= largest


@given(seed=seeds)
def test_a_small_component_beside_a_large_one_keeps_its_digits(seed: int) -> None:
    draw = np.random.default_rng(seed)
    f = LoraFactors(
        (draw.standard_normal((100, 2)) * [1.0, 1e-6]).astype(np.float32),
        draw.standard_normal((2, 80)).astype(np.float32),
    )
    back = there_and_back(f, "int8")
    small = LoraFactors(f.b[:, 1:], f.a[1:]).product()
    error = LoraFactors(back.b[:, 1:], back.a[1:]).product() - small
    assert np.linalg.norm(error) < 0.02 * np.linalg.norm(small)


def test_a_scale_below_zero_is_refused() -> None:
    packed = dict(pack(factors(np.random.default_rng(0), 5, 6, 2), 1.0, "int8").tensors)
    for wrong in (-1.0, np.nan, np.inf):
        scales = np.full((2, 1), wrong, np.float32)
        with pytest.raises(AdapterError, match="scales that are negative or not finite"):
            dequantised(packed[INT8_A], scales)


# --- float16 --------------------------------------------------------------------------------------


def test_what_fits_float16_is_not_moved() -> None:
    f = LoraFactors(np.float32([[FLOAT16_LARGEST, 0.5]]).reshape(2, 1), np.float32([[2.0, -0.25, 8.0]]))
    packed = pack(f, 1.0, "float16").tensors
    assert packed[WEIGHT_A].tolist() == [[2.0, -0.25, 8.0]]
    assert packed[WEIGHT_B].tolist() == [[FLOAT16_LARGEST], [0.5]]


@pytest.mark.parametrize("turned", [False, True])
def test_what_is_too_large_is_moved_to_the_other_side(turned: bool) -> None:
    """2^20 is halved five times and its partner doubled as often; the small component stays as it is."""
    large, small = np.float32([[2.0**20, 0.5], [4.0, 0.25]]), np.float32([[0.25, 1.0], [0.5, 0.125]])
    f = LoraFactors(small.T, large.T) if turned else LoraFactors(large, small)
    before = LoraFactors(f.b.copy(), f.a.copy())
    packed = pack(f, 1.0, "float16").tensors
    assert max(np.abs(tensor).max() for tensor in packed.values()) <= FLOAT16_LARGEST
    back = there_and_back(f, "float16", 1.0)
    np.testing.assert_array_equal(back.product(), f.product())
    untouched = packed[WEIGHT_A][1], packed[WEIGHT_B][:, 1]
    np.testing.assert_array_equal(untouched[0], f.a[1])
    np.testing.assert_array_equal(untouched[1], f.b[:, 1])
    np.testing.assert_array_equal(f.b, before.b)  # what was packed is the caller's own


def test_what_is_too_large_on_both_sides_is_refused() -> None:
    f = LoraFactors(np.full((3, 1), 1e5, np.float32), np.full((1, 2), 1e5, np.float32))
    with pytest.raises(AdapterError, match="exceeds float16 in both B and A; send it in float32"):
        pack(f, 1.0, "float16")


@given(seed=seeds, up=st.integers(0, 30), shape=shapes)
def test_float16_keeps_the_product_of_whatever_it_takes(seed: int, up: int, shape: tuple[int, int]) -> None:
    f = factors(np.random.default_rng(seed), *shape, min(3, *shape))
    large = LoraFactors(np.ldexp(f.b, up), np.ldexp(f.a, -up // 2))
    back = there_and_back(large, "float16")
    bound = 2.0**-9 * np.abs(large.b) @ np.abs(large.a) + 1e-6 * np.ldexp(1.0, up)
    assert (np.abs(back.product() - large.product()) <= bound).all()


# --- every dtype ----------------------------------------------------------------------------------


@given(seed=seeds, shape=shapes, dtype=dtypes, data=st.data())
def test_leading_components_are_packed_alike_whatever_follows(
    seed: int, shape: tuple[int, int], dtype: WireDtype, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(8, *shape)))
    kept = data.draw(st.integers(0, rank))
    f = factors(np.random.default_rng(seed), *shape, rank)
    whole, alone = pack(f, 2.0, dtype).leading(kept), pack(f.leading(kept), 2.0, dtype)
    assert list(whole.tensors) == list(alone.tensors)
    for end, tensor in whole.tensors.items():
        assert np.ascontiguousarray(tensor).tobytes() == alone.tensors[end].tobytes(), end
        assert tensor.shape == alone.tensors[end].shape


@given(seed=seeds, shape=shapes, dtype=dtypes)
def test_packed_again_is_the_same(seed: int, shape: tuple[int, int], dtype: WireDtype) -> None:
    """What came over the wire goes over it again without a further loss, but for the last bit of a scale."""
    once = there_and_back(factors(np.random.default_rng(seed), *shape, min(4, *shape)), dtype)
    twice = there_and_back(once, dtype)
    np.testing.assert_allclose(twice.b, once.b, rtol=1e-6)
    np.testing.assert_allclose(twice.a, once.a, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_not_packed(dtype: WireDtype, value: float) -> None:
    f = factors(np.random.default_rng(0), 5, 6, 2)
    f.b[3, 1] = value
    with pytest.raises(AdapterError, match="not finite"):
        pack(f, 2.0, dtype)


@pytest.mark.parametrize("dtype", WIRE_DTYPES)
def test_tensors_that_somebody_else_needs_are_left_alone(dtype: WireDtype) -> None:
    packed = pack(factors(np.random.default_rng(0), 6, 5, 3), 2.0, dtype)
    before = {end: tensor.copy() for end, tensor in packed.tensors.items()}
    read = unpack(packed.tensors, 2.0)
    for end, tensor in packed.tensors.items():
        np.testing.assert_array_equal(tensor, before[end])
    owned = unpack(packed.tensors, 2.0, owned=True)
    np.testing.assert_array_equal(owned.b, read.b)
    np.testing.assert_array_equal(owned.a, read.a)
