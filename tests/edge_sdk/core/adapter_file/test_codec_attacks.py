"""One test for each way to break the reader. Each costs the sender an error that names the problem."""

from __future__ import annotations

import io
import json
import zipfile
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

SHAPES = {"layers.0.q": (4, 6), "layers.0.up": (6, 2)}
RANK, SCALING, MAX_BYTES = 3, 2.0, 64 << 10
Q_A, Q_B = codec.PREFIX + "layers.0.q" + codec.WEIGHT_A, codec.PREFIX + "layers.0.q" + codec.WEIGHT_B
UP_A, UP_B = codec.PREFIX + "layers.0.up" + codec.WEIGHT_A, codec.PREFIX + "layers.0.up" + codec.WEIGHT_B

Header = dict[str, Any]


def valid() -> bytes:
    rng = np.random.default_rng(0)
    ranks = {name: min(RANK, *shape) for name, shape in SHAPES.items()}
    adapter = {
        name: LoraFactors(
            rng.standard_normal((out, ranks[name])).astype(np.float32),
            rng.standard_normal((ranks[name], inp)).astype(np.float32),
        )
        for name, (out, inp) in SHAPES.items()
    }
    return codec.encode(adapter, SCALING)


def framed(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def parts(raw: bytes) -> tuple[Header, bytes]:
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def changed(change: Callable[[Header], Any], data: bytes | None = None) -> bytes:
    """A valid file with its header edited."""
    header, own = parts(valid())
    change(header)
    return framed(json.dumps(header).encode(), own if data is None else data)


class Reader:
    """Reads bytes to the end as the coordinator does: every check, then every module."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "adapter_model.safetensors"

    def __call__(self, raw: bytes) -> dict[str, LoraFactors]:
        self.path.write_bytes(raw)
        return dict(codec.open_adapter(self.path, SHAPES, RANK, SCALING, MAX_BYTES).modules())

    def refuses(self, raw: bytes, message: str, kind: type[Exception] = AdapterError) -> None:
        with pytest.raises(kind, match=message) as caught:
            self(raw)
        assert type(caught.value) is kind
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return Reader(tmp_path_factory.mktemp("attacks"))


def test_the_file_that_is_attacked_is_valid(read: Reader) -> None:
    assert set(read(valid())) == set(SHAPES)
    assert set(read(changed(lambda header: None))) == set(SHAPES)


# --- the frame ------------------------------------------------------------------------------------


def test_empty_file(read: Reader) -> None:
    read.refuses(b"", "not a safetensors file")


def test_seven_bytes(read: Reader) -> None:
    read.refuses(valid()[:7], "not a safetensors file")


def test_cut_within_the_header(read: Reader) -> None:
    read.refuses(valid()[:60], "header is longer than the file")


def test_cut_within_the_data(read: Reader) -> None:
    read.refuses(valid()[:-1], f"tensor {UP_B} does not lie within the file")


def test_bytes_behind_the_data(read: Reader) -> None:
    read.refuses(valid() + b"hidden!!", "8 bytes that belong to no tensor")


def test_header_longer_than_the_file(read: Reader) -> None:
    read.refuses((1 << 63).to_bytes(8, "little") + valid()[8:], "header is longer than the file")


def test_claim_of_a_header_of_100_mb(read: Reader) -> None:
    read.refuses((100 << 20).to_bytes(8, "little") + valid()[8:], "header is longer than the file")


def test_header_of_100_mb(tmp_path: Path) -> None:
    """A sparse file: were it read before its length is checked, this would take 100 MB."""
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.write((100 << 20).to_bytes(8, "little"))
        file.truncate(8 + (100 << 20))
    with pytest.raises(TooLarge, match="header has 104857600 bytes"):
        codec.open_adapter(path, SHAPES, RANK, SCALING, 1 << 30)


def test_file_over_its_cap(read: Reader) -> None:
    read.refuses(valid() + bytes(MAX_BYTES), f"more than the {MAX_BYTES}", TooLarge)


def test_zip_of_nonsense(read: Reader) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", b"\x80\x04nonsense" * 1000)
    read.refuses(buffer.getvalue(), "not a safetensors file")


# --- the header -----------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [b"{", b"", b"not json", b'{"a": 1', b"\xff\xfe{}", b"{}\x00", b"{}{}"])
def test_header_that_is_not_json(read: Reader, header: bytes) -> None:
    read.refuses(framed(header, b""), "header is not JSON")


def test_header_in_utf_16(read: Reader) -> None:
    header, data = parts(valid())
    read.refuses(framed(json.dumps(header).encode("utf-16"), data), "header is not JSON")


@pytest.mark.parametrize("header", [b"[]", b"null", b"5", b'"text"', b"NaN"])
def test_header_that_is_no_object(read: Reader, header: bytes) -> None:
    read.refuses(framed(header, b""), "header is not an object")


def test_header_nested_deeply(read: Reader) -> None:
    read.refuses(framed(b'{"x":' + b"[" * 30_000, b""), "header is not JSON")
    read.refuses(framed(b'{"x":' * 8_000, b""), "header is not JSON")


@pytest.mark.parametrize("key", ["shape", "dtype", "data_offsets"])
@pytest.mark.parametrize("depth", [10, 500, 900, 940])
def test_field_nested_deeply(read: Reader, key: str, depth: int) -> None:
    header, data = parts(valid())
    header[Q_A][key] = "HERE"
    text = json.dumps(header).replace('"HERE"', "[" * depth + "]" * depth)
    read.refuses(framed(text.encode(), data), f"tensor {Q_A} has|not JSON")


def test_number_of_5000_digits(read: Reader) -> None:
    header, data = parts(valid())
    header[Q_A]["data_offsets"] = ["HERE", 72]
    for digits in (4000, 4300, 5000):
        text = json.dumps(header).replace('"HERE"', "-" + "9" * digits)
        read.refuses(framed(text.encode(), data), "does not lie within the file|not JSON")


def test_empty_header(read: Reader) -> None:
    read.refuses(framed(b"{}", b""), r"module layers\.0\.q is missing \(2 of 2 are\)")


def test_names_given_twice(read: Reader) -> None:
    header, data = parts(valid())
    once = json.dumps(header)
    twice = once[:-1] + f', "{Q_A}": {json.dumps(header[Q_A])}' + "}"
    read.refuses(framed(twice.encode(), data), f"'{Q_A}' twice")


def test_fields_given_twice(read: Reader) -> None:
    text = json.dumps(parts(valid())[0]).replace('"dtype": "F32"', '"dtype": "F32", "dtype": "F16"', 1)
    read.refuses(framed(text.encode(), parts(valid())[1]), "'dtype' twice")


@pytest.mark.parametrize("metadata", [5, [], {"format": 5}, {"format": {"deep": "er"}}, "text"])
def test_metadata_of_another_form(read: Reader, metadata: Any) -> None:
    read.refuses(changed(lambda h: h.update(__metadata__=metadata)), "not a safetensors file")


# --- names ----------------------------------------------------------------------------------------


def test_module_missing(read: Reader) -> None:
    def drop(header: Header) -> None:
        del header[UP_A], header[UP_B]

    read.refuses(changed(drop), r"module layers\.0\.up is missing \(1 of 2 are\)")


@pytest.mark.parametrize("name", [Q_A, UP_B])
def test_tensor_missing(read: Reader, name: str) -> None:
    read.refuses(changed(lambda h: h.pop(name)), f"tensor {name} is missing")


def test_module_too_many(read: Reader) -> None:
    name = codec.PREFIX + "lm_head" + codec.WEIGHT_A
    read.refuses(changed(lambda h: h.update({name: h[Q_A]})), f"{name}' belongs to no target module")


@pytest.mark.parametrize(
    "name",
    [
        "extra",
        "layers.0.q",  # the bare name of a module
        codec.PREFIX + "layers.0.q.lora_magnitude_vector",
        codec.PREFIX + "layers.0.q.lora_A.weight.bias",
        "layers.0.q.lora_A.weight",
        Q_A + "\x00",
        "\x00" + Q_A,
        codec.PREFIX + "layers.0\x00.q" + codec.WEIGHT_A,
        codec.PREFIX + "../../etc/passwd" + codec.WEIGHT_A,
        "",
        "a" * 10_000,
        "line\nbreak",
        "\ud800",
    ],
)
def test_tensor_of_another_name(read: Reader, name: str) -> None:
    read.refuses(changed(lambda h: h.update({name: h[Q_B]})), "belongs to no target module")


def test_tensor_replaced_by_the_bare_name_of_its_module(read: Reader) -> None:
    """As many tensors as expected, and each of a known module; still not the right ones."""
    read.refuses(changed(lambda h: h.update({"layers.0.q": h.pop(Q_B)})), f"tensor {Q_B} is missing")


# --- entries --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["I8", "BF16", "F64", "U8", "BOOL", "f32", "", None, 5, ["F32"], {}])
def test_another_dtype(read: Reader, dtype: Any) -> None:
    read.refuses(
        changed(lambda h: h[Q_A].update(dtype=dtype)), f"tensor {Q_A} has dtype .*, expected F32 or F16"
    )


def test_float16_of_float32_length(read: Reader) -> None:
    read.refuses(changed(lambda h: h[Q_A].update(dtype="F16")), f"tensor {Q_A} does not lie")


@pytest.mark.parametrize(
    "shape",
    [[6, 3], [3, 7], [2, 6], [18], [3, 6, 1], [], [-3, -6], None, 5, "3x6", [3.0, 6], ["3", "6"], {"3": 6}],
)
def test_another_shape(read: Reader, shape: Any) -> None:
    read.refuses(changed(lambda h: h[Q_A].update(shape=shape)), rf"tensor {Q_A} has .*expected \[3, 6\]")


def test_shape_of_true_is_not_one(tmp_path: Path) -> None:
    """JSON's true equals 1 in Python."""
    raw = codec.encode({"x": LoraFactors(np.ones((2, 1), np.float32), np.ones((1, 2), np.float32))}, 1.0)
    path = tmp_path / "adapter"
    header, data = parts(raw)
    header[codec.PREFIX + "x" + codec.WEIGHT_A]["shape"] = [True, 2]
    path.write_bytes(framed(json.dumps(header).encode(), data))
    with pytest.raises(AdapterError, match="x.lora_A.weight has no shape"):
        codec.open_adapter(path, {"x": (2, 2)}, 1, 1.0, MAX_BYTES)


def test_a_higher_rank_than_assigned(tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    path.write_bytes(valid())
    with pytest.raises(AdapterError, match=rf"tensor {Q_A} has shape \[3, 6\], expected \[2, 6\]"):
        codec.open_adapter(path, SHAPES, 2, SCALING, MAX_BYTES)


@pytest.mark.parametrize("entry", [None, 5, [], "F32", {}])
def test_entry_that_is_no_object(read: Reader, entry: Any) -> None:
    read.refuses(changed(lambda h: h.update({Q_A: entry})), f"tensor {Q_A} has no shape")


@pytest.mark.parametrize(
    "offsets", [None, [], [0], [0, 72, 72], "0-72", [0.0, 72.0], [False, 72], ["0", "72"]]
)
def test_offsets_of_another_form(read: Reader, offsets: Any) -> None:
    read.refuses(changed(lambda h: h[Q_A].update(data_offsets=offsets)), f"tensor {Q_A} has no data_offsets")


@pytest.mark.parametrize(
    "offsets", [[-72, 0], [72, 0], [0, 71], [0, 73], [0, 0], [10**9, 10**9 + 72], [2**64, 2**64 + 72]]
)
def test_offsets_that_do_not_fit(read: Reader, offsets: list[int]) -> None:
    read.refuses(changed(lambda h: h[Q_A].update(data_offsets=offsets)), f"tensor {Q_A} does not lie")


def test_tensors_that_overlap(read: Reader) -> None:
    def overlap(header: Header) -> None:
        header[Q_B]["data_offsets"] = [0, 48]

    read.refuses(changed(overlap), f"tensor {Q_A} begins at byte 0 of the data, expected 48")


def test_gap_between_tensors(read: Reader) -> None:
    def shift(header: Header) -> None:
        begin, end = header[UP_B]["data_offsets"]
        header[UP_B]["data_offsets"] = [begin + 8, end + 8]

    data = parts(valid())[1] + bytes(8)
    read.refuses(changed(shift, data), f"tensor {UP_B} begins at byte")


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38], ids=str)
@pytest.mark.parametrize("index", [0, -1], ids=["first", "last"])
def test_values_that_are_not_finite(read: Reader, value: float, index: int) -> None:
    """3e38 in B is finite in the file and infinite once it is scaled by 2."""
    header, data = parts(valid())
    values = np.frombuffer(data, "<f4").copy()
    if value == 3e38:
        index = header[Q_B]["data_offsets"][0] // 4
    values[index] = value
    name = r"layers\.0\.up" if index == -1 else r"layers\.0\.q"
    read.refuses(framed(json.dumps(header).encode(), values.tobytes()), f"module {name} holds values")


# --- fuzz -----------------------------------------------------------------------------------------


def survives(read: Reader, raw: bytes) -> None:
    """The file loads, or its sender gets one of the two errors."""
    try:
        read(raw)
    except (AdapterError, TooLarge) as error:
        assert "\n" not in str(error)


@given(raw=st.binary(max_size=400))
@settings(max_examples=300)
def test_random_bytes(read: Reader, raw: bytes) -> None:
    survives(read, raw)


@given(header=st.binary(max_size=200), data=st.binary(max_size=50))
@settings(max_examples=300)
def test_random_bytes_in_a_right_frame(read: Reader, header: bytes, data: bytes) -> None:
    survives(read, framed(header, data))


@given(data=st.data())
@settings(max_examples=1000)
def test_a_few_wrong_bytes(read: Reader, data: st.DataObject) -> None:
    raw = bytearray(valid())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        kind = data.draw(st.sampled_from(["replace", "insert", "delete", "repeat"]))
        if kind == "replace":
            raw[at] = data.draw(st.integers(0, 255))
        elif kind == "insert":
            raw[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        elif kind == "delete":
            del raw[at : at + data.draw(st.integers(1, 8))]
        else:
            raw[at:at] = raw[at : at + 40]
    survives(read, bytes(raw))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["F32", "F16"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(data=st.data())
@settings(max_examples=1000)
def test_any_json_in_the_header(read: Reader, data: st.DataObject) -> None:
    header, body = parts(valid())
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from([*header, "extra"]))
        if isinstance(header.get(name), dict) and data.draw(st.booleans()):
            key = data.draw(st.sampled_from(["shape", "dtype", "data_offsets", "extra"]))
            header[name][key] = data.draw(json_values)
        else:
            header[name] = data.draw(json_values)
    survives(read, framed(json.dumps(header).encode(), body))
