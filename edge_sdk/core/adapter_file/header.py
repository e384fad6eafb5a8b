"""What an adapter file claims to hold, checked before a tensor of it is touched.

Size, header length, every name, dtype, shape and byte range. A file is of one kind: PEFT's (each tensor
float32 or float16) or int8 with scales, which has tensors of other names. The frame is that of safetensors
(huggingface/safetensors, README, "Format").
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_sdk.core.adapter_file.dtypes import (
    INT8_A,
    INT8_B,
    SCALES_A,
    SCALES_B,
    WEIGHT_A,
    WEIGHT_B,
    WireDtype,
    blocks_of,
)
from edge_sdk.core.errors import AdapterError, TooLarge

PREFIX = "base_model.model."
MAX_HEADER_BYTES = 16 << 20  # a 70B model's adapter header is about 200 KB
ITEM_BYTES = {"F32": 4, "F16": 2, "I8": 1}

FLOATING = (WEIGHT_A, WEIGHT_B)
INTEGER = (INT8_A, INT8_B, SCALES_A, SCALES_B)
ALLOWED: Mapping[str, tuple[str, ...]] = {
    WEIGHT_A: ("F32", "F16"),
    WEIGHT_B: ("F32", "F16"),
    INT8_A: ("I8",),
    INT8_B: ("I8",),
    SCALES_A: ("F32",),
    SCALES_B: ("F32",),
}
"""End of a tensor's name -> the dtypes that it may have, in safetensors' words."""

Shapes = Mapping[str, tuple[int, int]]
"""Target module -> (out, in)."""


@dataclass(frozen=True)
class Contents:
    """What a checked file holds: module -> rank, the ends of every module's tensor names, and the header."""

    ranks: Mapping[str, int]
    ends: tuple[str, ...]
    header: Mapping[str, Any]  # tensor -> dtype, shape and data_offsets, counted from the end of the header


def shape_of(end: str, shape: tuple[int, int], rank: int) -> list[int]:
    """The shape of the tensor whose name ends so, for a module of shape (out, in)."""
    out_features, in_features = shape
    if end in (WEIGHT_A, INT8_A):
        return [rank, in_features]
    if end == WEIGHT_B:
        return [out_features, rank]
    return [rank, {INT8_B: out_features, SCALES_A: blocks_of(in_features)}.get(end, blocks_of(out_features))]


def layout(shape: tuple[int, int], rank: int, dtype: WireDtype) -> list[tuple[str, str, list[int]]]:
    """The tensors of a module in the order of a file: end of the name, dtype in safetensors' words, shape."""
    ends = INTEGER if dtype == "int8" else FLOATING
    place = 1 if dtype == "float16" else 0
    return [(end, ALLOWED[end][place], shape_of(end, shape, rank)) for end in ends]


def size_bytes(code: str, shape: list[int]) -> int:
    """Bytes of a tensor of two axes."""
    return ITEM_BYTES[code] * shape[0] * shape[1]


def header_bytes(shapes: Shapes, ranks: Mapping[str, int], dtype: WireDtype) -> bytes:
    """What comes before the data: the JSON's length and the JSON, modules in name order."""
    metadata = {"format": "pt"} if dtype != "int8" else {"format": "edge-sdk int8 blocks of 64"}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in sorted(shapes):
        for suffix, code, shape in layout(shapes[name], ranks[name], dtype):
            begin, end = end, end + size_bytes(code, shape)
            header[PREFIX + name + suffix] = {"dtype": code, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts on a multiple of 8, as the format asks
    return len(text).to_bytes(8, "little") + text


def max_adapter_bytes(shapes: Shapes, rank: int, dtype: WireDtype = "float32") -> int:
    """Cap on an adapter of `rank` in a dtype: its tensors and a generous header."""
    tensors = [t for shape in shapes.values() for t in layout(shape, min(rank, *shape), dtype)]
    return sum(size_bytes(code, shape) for _, code, shape in tensors) + 256 * len(tensors) + 4096


def read_header(path: Path, max_bytes: int) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file (without its metadata) and the length of the data behind it."""
    size = path.stat().st_size
    if size > max_bytes:
        raise TooLarge(f"the adapter has {size} bytes, more than the {max_bytes} that its rank needs")
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            raise AdapterError("not a safetensors file: its header is longer than the file")
        if length > MAX_HEADER_BYTES:
            raise TooLarge(f"the safetensors header has {length} bytes, more than {MAX_HEADER_BYTES}")
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise AdapterError("not a safetensors file: its header is not JSON") from error
    if not isinstance(header, dict):
        raise AdapterError("not a safetensors file: its header is not an object")
    header.pop("__metadata__", None)
    return header, size - 8 - length


def check_header(header: Mapping[str, Any], data_bytes: int, shapes: Shapes, rank: int) -> Contents:
    """Check a stranger's header; `rank` is the most that a module may have, and none has less than 1.

    Raises:
        AdapterError: wrong modules, names, shapes, dtypes or byte ranges.
    """
    missing = sorted(set(shapes) - {module_of(name) for name in header})
    if missing:
        raise AdapterError(f"module {missing[0]} is missing ({len(missing)} of {len(shapes)} are)")
    ends = ends_of(header)
    for module in shapes:
        for end in ends:
            if PREFIX + module + end not in header:
                raise AdapterError(f"tensor {PREFIX + module + end} is missing")
    ranks = {module: _rank_of(module, header, ends, rank, shape) for module, shape in shapes.items()}
    for name, entry in header.items():
        _check_entry(name, entry, ends, shapes, ranks)
        _check_range(name, entry, data_bytes)
    _check_layout(header, data_bytes)
    return Contents(ranks, ends, header)


def check_whole(header: Mapping[str, Any], data_bytes: int) -> None:
    """Check that a file holds what its header says, from the first byte to the last, whatever its modules.

    Raises:
        AdapterError: it is cut short, has more, or is something else.
    """
    if not header:
        raise AdapterError("the file holds no tensor")
    for name, entry in header.items():
        shape, dtype = (entry.get(key) if isinstance(entry, dict) else None for key in ("shape", "dtype"))
        sized = isinstance(shape, list) and len(shape) == 2 and all(type(size) is int for size in shape)
        if module_of(name) == name or not (sized and isinstance(dtype, str) and dtype in ITEM_BYTES):
            raise AdapterError(f"tensor {name[:120]!r} is none of an adapter")
        _check_range(name, entry, data_bytes)
    ends = ends_of(header)
    shapes, ranks = _claimed(header, ends)
    for name, entry in header.items():
        _check_entry(name, entry, ends, shapes, ranks)
    _check_layout(header, data_bytes)


def _claimed(
    header: Mapping[str, Any], ends: tuple[str, ...]
) -> tuple[dict[str, tuple[int, int]], dict[str, int]]:
    """Shape and rank of every module as the two factors have them, whose entries have two sizes each."""
    shapes, ranks = {}, {}
    for module in sorted({module_of(name) for name in header}):
        for end in ends:
            if PREFIX + module + end not in header:
                raise AdapterError(f"tensor {(PREFIX + module + end)[:160]} is missing")
        a, b = (header[PREFIX + module + end]["shape"] for end in ends[:2])
        ranks[module] = a[0]
        shapes[module] = (b[1] if ends == INTEGER else b[0], a[1])
    return shapes, ranks


def own_contents(header: Mapping[str, Any]) -> Contents:
    """What a file holds that this side wrote itself."""
    ends = ends_of(header)
    first = ends[0]
    ranks = {module_of(n): int(e["shape"][0]) for n, e in header.items() if n.endswith(first)}
    return Contents(ranks, ends, header)


def ends_of(header: Mapping[str, Any]) -> tuple[str, ...]:
    """Which tensors a module of this file has: int8 with scales if any tensor says so."""
    return INTEGER if any(name.endswith(INTEGER) for name in header) else FLOATING


def module_of(tensor: str) -> str:
    """`base_model.model.x.lora_A.weight` -> `x`; a name of another form comes back unchanged."""
    for end in ALLOWED:
        if tensor.startswith(PREFIX) and tensor.endswith(end):
            return tensor[len(PREFIX) : -len(end)]
    return tensor


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names are distinct: of two equal ones, two readers may take either."""
    names: dict[str, Any] = {}
    for name, value in pairs:
        if name in names:
            raise AdapterError(f"the safetensors header names {name[:120]!r} twice")
        names[name] = value
    return names


def _rank_of(
    module: str, header: Mapping[str, Any], ends: tuple[str, ...], rank: int, shape: tuple[int, int]
) -> int:
    """The rank that a module's A and B agree on; the largest possible where they agree on none."""
    most = min(rank, *shape)
    end_a, end_b = ends[:2]
    a, b = header[PREFIX + module + end_a], header[PREFIX + module + end_b]
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return most
    said = a.get("shape"), b.get("shape")
    claimed = said[0][0] if isinstance(said[0], list) and said[0] else None  # A has a row a component
    if type(claimed) is not int or not 1 <= claimed < most:
        return most
    return claimed if said == (shape_of(end_a, shape, claimed), shape_of(end_b, shape, claimed)) else most


def _check_entry(
    name: str, entry: Any, ends: tuple[str, ...], shapes: Shapes, ranks: Mapping[str, int]
) -> None:
    """Check name, shape and dtype of one header entry against the module that it claims to belong to."""
    module = module_of(name)
    if module not in shapes or module == name:
        raise AdapterError(f"tensor {name[:120]!r} belongs to no target module of this federation")
    end = name[len(PREFIX) + len(module) :]
    if end not in ends:
        raise AdapterError(f"tensor {name} is floating point, and others of this file are int8")
    expected = shape_of(end, shapes[module], ranks[module])
    shape, dtype = (entry.get(key) if isinstance(entry, dict) else None for key in ("shape", "dtype"))
    if not (isinstance(shape, list) and all(type(size) is int for size in shape)):
        raise AdapterError(f"tensor {name} has no shape, expected {expected}")
    if shape != expected:
        raise AdapterError(f"tensor {name} has shape {str(shape)[:60]}, expected {expected}")
    if not (isinstance(dtype, str) and dtype in ALLOWED[end]):
        shown = dtype[:20] if isinstance(dtype, str) else "none"
        raise AdapterError(f"tensor {name} has dtype {shown!r}, expected {' or '.join(ALLOWED[end])}")


def _check_range(name: str, entry: Mapping[str, Any], data_bytes: int) -> None:
    """The bytes of a tensor whose shape and dtype are right must lie within the file, and be as many."""
    offsets = entry.get("data_offsets")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(o) is int for o in offsets)):
        raise AdapterError(f"tensor {name} has no data_offsets")
    begin, end = offsets
    if not 0 <= begin <= end <= data_bytes or end - begin != size_bytes(entry["dtype"], entry["shape"]):
        raise AdapterError(f"tensor {name} does not lie within the file at its size")


def _check_layout(header: Mapping[str, Any], data_bytes: int) -> None:
    """The tensors must fill the data from its first byte to its last, without overlap or gap."""
    position = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if begin != position:
            raise AdapterError(f"tensor {name} begins at byte {begin} of the data, expected {position}")
        position = end
    if position != data_bytes:
        raise AdapterError(f"the file holds {data_bytes - position} bytes that belong to no tensor")
