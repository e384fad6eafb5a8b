"""What a stranger may claim of int8 values and their scales. Each costs the sender an error that names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.core.adapter_file import codec
from edge_sdk.core.errors import AdapterError, TooLarge
from edge_sdk.core.lora import LoraFactors
from tests.edge_sdk.core.adapter_file.test_codec_attacks import (
    RANK,
    SCALING,
    SHAPES,
    Header,
    Reader,
    framed,
    parts,
    survives,
)

STEM = codec.PREFIX + "layers.0.q.lora_"
VALUES_A, VALUES_B, SCALES_A, SCALES_B = (STEM + end for end in ("A.int8", "B.int8", "A.scales", "B.scales"))
UP = codec.PREFIX + "layers.0.up.lora_"


def adapter() -> dict[str, LoraFactors]:
    rng = np.random.default_rng(0)
    made = {}
    for name, (out, inp) in SHAPES.items():
        r = min(RANK, out, inp)
        b, a = rng.standard_normal((out, r)), rng.standard_normal((r, inp))
        made[name] = LoraFactors(b.astype(np.float32), a.astype(np.float32))
    return made


def valid() -> bytes:
    return codec.encode(adapter(), SCALING, "int8")


def changed(change: Callable[[Header], Any], data: bytes | None = None) -> bytes:
    header, own = parts(valid())
    change(header)
    return framed(json.dumps(header).encode(), own if data is None else data)


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return Reader(tmp_path_factory.mktemp("attacks"))


def test_the_file_that_is_attacked_is_valid(read: Reader) -> None:
    for name, factors in read(valid()).items():
        np.testing.assert_allclose(factors.b, adapter()[name].b, atol=0.02)


@pytest.mark.parametrize("name", [VALUES_A, VALUES_B, SCALES_A, SCALES_B])
def test_tensor_missing(read: Reader, name: str) -> None:
    read.refuses(changed(lambda h: h.pop(name)), f"tensor {name} is missing")


def test_module_missing(read: Reader) -> None:
    def drop(header: Header) -> None:
        for end in ("A.int8", "B.int8", "A.scales", "B.scales"):
            del header[UP + end]

    read.refuses(changed(drop), r"module layers\.0\.up is missing \(1 of 2 are\)")


def test_floating_point_beside_int8(read: Reader) -> None:
    weight = STEM + "A.weight"
    entry = {"dtype": "F32", "shape": [3, 6], "data_offsets": [0, 72]}
    read.refuses(changed(lambda h: h.update({weight: entry})), f"tensor {weight} is floating point")


def test_one_module_in_floating_point(read: Reader) -> None:
    def swap(header: Header) -> None:
        for end in ("A.int8", "B.int8", "A.scales", "B.scales"):
            del header[STEM + end]
        header[STEM + "A.weight"] = {"dtype": "F32", "shape": [3, 6], "data_offsets": [0, 72]}
        header[STEM + "B.weight"] = {"dtype": "F32", "shape": [4, 3], "data_offsets": [72, 120]}

    read.refuses(changed(swap), f"tensor {VALUES_A} is missing")


@pytest.mark.parametrize("name", [STEM + "C.int8", STEM + "A.scale", codec.PREFIX + "lm_head.lora_A.int8"])
def test_tensor_of_another_name(read: Reader, name: str) -> None:
    read.refuses(changed(lambda h: h.update({name: h[VALUES_A]})), "belongs to no target module")


@pytest.mark.parametrize("name", [VALUES_A, VALUES_B])
@pytest.mark.parametrize("dtype", ["U8", "F32", "F8_E4M3", "i8", None, ["I8"]])
def test_values_of_another_dtype(read: Reader, name: str, dtype: Any) -> None:
    read.refuses(changed(lambda h: h[name].update(dtype=dtype)), f"tensor {name} has dtype .*expected I8")


@pytest.mark.parametrize("name", [SCALES_A, SCALES_B])
@pytest.mark.parametrize("dtype", ["F16", "I8", "F64", "I32", None])
def test_scales_of_another_dtype(read: Reader, name: str, dtype: Any) -> None:
    read.refuses(changed(lambda h: h[name].update(dtype=dtype)), f"tensor {name} has dtype .*expected F32")


@pytest.mark.parametrize("shape", [[3], [3, 2], [1, 3], [3, 0], [0, 1], [3, 1, 1], [3, -1], None, [True, 1]])
def test_scales_of_another_shape(read: Reader, shape: Any) -> None:
    """One more block than the width needs would be memory that nobody asked for."""
    read.refuses(changed(lambda h: h[SCALES_A].update(shape=shape)), rf"{SCALES_A} has .*expected \[3, 1\]")


def test_b_the_way_that_peft_has_it(read: Reader) -> None:
    read.refuses(changed(lambda h: h[VALUES_B].update(shape=[4, 3])), rf"{VALUES_B} has shape .*\[3, 4\]")


@pytest.mark.parametrize("offsets", [[0, 17], [0, 72], [18, 0], [-18, 0], [10**9, 10**9 + 18]])
def test_values_that_do_not_lie_in_the_file(read: Reader, offsets: list[int]) -> None:
    read.refuses(changed(lambda h: h[VALUES_A].update(data_offsets=offsets)), f"{VALUES_A} does not lie")


def test_scales_that_overlap_values(read: Reader) -> None:
    read.refuses(changed(lambda h: h[SCALES_A].update(data_offsets=[0, 12])), "begins at byte")


def test_bytes_behind_the_data(read: Reader) -> None:
    read.refuses(valid() + b"hidden!!", "8 bytes that belong to no tensor")


def test_a_higher_rank_than_assigned(tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    path.write_bytes(valid())
    with pytest.raises(AdapterError, match=rf"{VALUES_A} has shape \[3, 6\], expected \[2, 6\]"):
        codec.open_adapter(path, SHAPES, 2, SCALING, 10_000)


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, -1.0, 3e38], ids=str)
def test_scales_that_are_no_scales(read: Reader, scale: float) -> None:
    """3e38 is finite, and 127 times it is not."""
    header, data = parts(valid())
    raw = bytearray(data)
    begin = header[SCALES_A]["data_offsets"][0]
    raw[begin : begin + 4] = np.float32(scale).tobytes()
    message = r"module layers\.0\.q holds (values that are|scales that are negative or) not finite"
    read.refuses(framed(json.dumps(header).encode(), bytes(raw)), message)


def test_float32_under_the_cap_of_int8(tmp_path: Path) -> None:
    """The cap is that of the dtype which the host chose; another may come if it is as small."""
    path = tmp_path / "adapter"
    shapes, rank = {"q": (2000, 2000)}, 8
    cap = codec.max_adapter_bytes(shapes, rank, "int8")
    f = LoraFactors(np.ones((2000, 8), np.float32), np.ones((8, 2000), np.float32))
    path.write_bytes(codec.encode({"q": f}, 1.0))
    with pytest.raises(TooLarge, match=f"more than the {cap}"):
        codec.open_adapter(path, shapes, rank, 1.0, cap)
    path.write_bytes(codec.encode({"q": f.leading(2)}, 1.0))
    assert codec.open_adapter(path, shapes, 2, 1.0, cap).ranks == {"q": 2}


@given(data=st.data())
@settings(max_examples=500)
def test_a_few_wrong_bytes(read: Reader, data: st.DataObject) -> None:
    raw = bytearray(valid())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        if data.draw(st.booleans()):
            raw[at] = data.draw(st.integers(0, 255))
        else:
            del raw[at : at + data.draw(st.integers(1, 8))]
    survives(read, bytes(raw))


values = (
    st.none() | st.integers() | st.lists(st.integers(0, 100), max_size=3) | st.sampled_from(["F32", "I8"])
)


@given(data=st.data())
@settings(max_examples=500)
def test_any_json_in_an_entry(read: Reader, data: st.DataObject) -> None:
    header, body = parts(valid())
    for _ in range(data.draw(st.integers(1, 3))):
        entry = header[data.draw(st.sampled_from([*header]))]
        entry[data.draw(st.sampled_from(["shape", "dtype", "data_offsets"]))] = data.draw(values)
    survives(read, framed(json.dumps(header).encode(), body))
