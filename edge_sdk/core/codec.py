"""Adapters as bytes: PEFT's own safetensors layout on the wire, folded factors inside.

The file is what `PeftModel.from_pretrained` reads: for module `m` of shape (out, in) the tensors
`base_model.model.{m}.lora_A.weight` (r, in) and `….lora_B.weight` (out, r), beside an
`adapter_config.json` with `lora_alpha = s·r`. B is divided by s on the way out and multiplied on the way in.

A stranger's file is checked before a tensor of it is touched: size, header length, every name, dtype,
shape and byte range. Only then does safetensors map it, one module at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from edge_sdk.core.errors import AdapterError, TooLarge
from edge_sdk.core.lora import Adapter, LoraFactors, Matrix, peft_module_scaling

PREFIX = "base_model.model."
SUFFIX_A, SUFFIX_B = ".lora_A.weight", ".lora_B.weight"
MAX_HEADER_BYTES = 16 << 20  # a 70B model's adapter header is about 200 KB
ITEM_BYTES = {"F32": 4, "F16": 2}

Shapes = Mapping[str, tuple[int, int]]
"""Target module -> (out, in)."""


@dataclass(frozen=True)
class AdapterFile:
    """A checked adapter file on disk. `ranks`: module -> rank. Factors are read one module at a time."""

    path: Path
    ranks: Mapping[str, int]
    scaling: float

    def module(self, name: str) -> LoraFactors:
        """The factors of one module, float32, scaling folded in.

        Raises:
            AdapterError: a value is not finite.
        """
        with safe_open(self.path, framework="numpy") as tensors:
            return self._read(tensors, name)

    def modules(self) -> Iterator[tuple[str, LoraFactors]]:
        """All modules in name order, one in memory at a time."""
        with safe_open(self.path, framework="numpy") as tensors:
            for name in sorted(self.ranks):
                yield name, self._read(tensors, name)

    def _read(self, tensors: Any, name: str) -> LoraFactors:
        b: Matrix = tensors.get_tensor(PREFIX + name + SUFFIX_B).astype(np.float32)
        a: Matrix = tensors.get_tensor(PREFIX + name + SUFFIX_A).astype(np.float32)
        with np.errstate(over="ignore"):  # a huge B becomes infinite here and is refused like one
            b = b * np.float32(self.scaling)
        if not (np.isfinite(b).all() and np.isfinite(a).all()):
            raise AdapterError(f"module {name} holds values that are not finite")
        return LoraFactors(b, a)


def encode(adapter: Adapter, scaling: float) -> bytes:
    """An adapter as safetensors bytes in PEFT's layout, the same bytes for the same values."""
    shapes = {name: factors.shape for name, factors in adapter.items()}
    ranks = {name: factors.rank for name, factors in adapter.items()}
    return b"".join(encode_chunks(shapes, ranks, scaling, sorted(adapter.items())))


def encode_chunks(
    shapes: Shapes, ranks: Mapping[str, int], scaling: float, modules: Iterable[tuple[str, LoraFactors]]
) -> Iterator[bytes]:
    """The bytes of `encode` piece by piece, so that an adapter larger than memory can be written.

    `modules` must come in name order with the shapes and ranks announced; float32, A before B.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(shapes):
        (out_features, in_features), r = shapes[name], ranks[name]
        for suffix, shape in ((SUFFIX_A, [r, in_features]), (SUFFIX_B, [out_features, r])):
            begin, end = end, end + 4 * shape[0] * shape[1]
            header[PREFIX + name + suffix] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts on a multiple of 8, as the format asks
    yield len(text).to_bytes(8, "little") + text
    for expected, (name, factors) in zip(sorted(shapes), modules, strict=True):
        if name != expected or factors.shape != tuple(shapes[name]) or factors.rank != ranks[name]:
            raise AdapterError(f"module {name} is not the {expected} that the header announced")
        yield np.ascontiguousarray(factors.a, dtype="<f4").tobytes()
        yield np.ascontiguousarray(factors.b / scaling, dtype="<f4").tobytes()


def open_adapter(path: Path, shapes: Shapes, rank: int, scaling: float, max_bytes: int) -> AdapterFile:
    """Check a file from a device and return a reader of it.

    Args:
        path: the uploaded file.
        shapes: the federation's target modules; the file must hold exactly these.
        rank: the most that a module may have. Modules may have fewer, as narrow ones must and as a device
            does that trains attention and feed-forward layers at unequal ranks; none has less than 1.
        scaling: the federation's s.
        max_bytes: cap on the file.

    Raises:
        TooLarge: the file or its header is over its cap.
        AdapterError: not a safetensors file, or wrong modules, shapes or dtypes.
    """
    header, data_bytes = _read_header(path, max_bytes)
    missing = sorted(set(shapes) - {_module_of(name) for name in header})
    if missing:
        raise AdapterError(f"module {missing[0]} is missing ({len(missing)} of {len(shapes)} are)")
    for module in shapes:
        for suffix in (SUFFIX_A, SUFFIX_B):
            if PREFIX + module + suffix not in header:
                raise AdapterError(f"tensor {PREFIX + module + suffix} is missing")
    ranks = {module: _rank_of(module, header, rank, shape) for module, shape in shapes.items()}
    for name, entry in header.items():
        _check_entry(name, entry, shapes, ranks, data_bytes)
    _check_layout(header, data_bytes)
    try:
        with safe_open(path, framework="numpy"):  # what the reader itself minds, such as metadata
            pass
    except SafetensorError as error:
        raise AdapterError(f"not a safetensors file: {str(error)[:120]}") from error
    return AdapterFile(path, ranks, scaling)


def open_own(path: Path, scaling: float) -> AdapterFile:
    """A reader of a file that this side wrote itself; ranks come from its header."""
    header, _ = _read_header(path, max_bytes=path.stat().st_size)
    ranks = {_module_of(n): int(e["shape"][0]) for n, e in header.items() if n.endswith(SUFFIX_A)}
    return AdapterFile(path, ranks, scaling)


def _read_header(path: Path, max_bytes: int) -> tuple[dict[str, Any], int]:
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


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names are distinct: of two equal ones, two readers may take either."""
    names: dict[str, Any] = {}
    for name, value in pairs:
        if name in names:
            raise AdapterError(f"the safetensors header names {name[:120]!r} twice")
        names[name] = value
    return names


def _module_of(tensor: str) -> str:
    """`base_model.model.x.lora_A.weight` -> `x`; a name of another form comes back unchanged."""
    for suffix in (SUFFIX_A, SUFFIX_B):
        if tensor.startswith(PREFIX) and tensor.endswith(suffix):
            return tensor[len(PREFIX) : -len(suffix)]
    return tensor


def _rank_of(module: str, header: Mapping[str, Any], rank: int, shape: tuple[int, int]) -> int:
    """The rank that a module's A and B agree on; the largest possible where they agree on none."""
    most = min(rank, *shape)
    a, b = (header[PREFIX + module + suffix] for suffix in (SUFFIX_A, SUFFIX_B))
    said = (a.get("shape"), b.get("shape")) if isinstance(a, dict) and isinstance(b, dict) else None
    out_features, in_features = shape
    return next((r for r in range(1, most) if said == ([r, in_features], [out_features, r])), most)


def _check_entry(name: str, entry: Any, shapes: Shapes, ranks: Mapping[str, int], data_bytes: int) -> None:
    """Check one header entry against the module that it claims to belong to."""
    module = _module_of(name)
    if module not in shapes or module == name:
        raise AdapterError(f"tensor {name[:120]!r} belongs to no target module of this federation")
    out_features, in_features = shapes[module]
    r = ranks[module]
    expected = [r, in_features] if name.endswith(SUFFIX_A) else [out_features, r]
    shape, dtype, offsets = (
        entry.get(key) if isinstance(entry, dict) else None for key in ("shape", "dtype", "data_offsets")
    )
    if not (isinstance(shape, list) and all(type(size) is int for size in shape)):
        raise AdapterError(f"tensor {name} has no shape, expected {expected}")
    if shape != expected:
        raise AdapterError(f"tensor {name} has shape {str(shape)[:60]}, expected {expected}")
    if not (isinstance(dtype, str) and dtype in ITEM_BYTES):
        shown = dtype[:20] if isinstance(dtype, str) else "none"
        raise AdapterError(f"tensor {name} has dtype {shown!r}, expected F32 or F16")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(o) is int for o in offsets)):
        raise AdapterError(f"tensor {name} has no data_offsets")
    begin, end = offsets
    if not 0 <= begin <= end <= data_bytes or end - begin != ITEM_BYTES[dtype] * expected[0] * expected[1]:
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


def max_adapter_bytes(shapes: Shapes, rank: int) -> int:
    """Cap on a float32 adapter of `rank`: its tensors and a generous header."""
    values = sum(min(rank, o, i) * (o + i) for o, i in shapes.values())
    return 4 * values + 512 * len(shapes) + 4096


def peft_config(base_model: str, shapes: Shapes, rank: int, scaling: float) -> dict[str, Any]:
    """The `adapter_config.json` of an adapter of `rank` with `lora_alpha = s·r`.

    Modules narrower than `rank` are listed in `rank_pattern` and `alpha_pattern`.
    """
    narrow = {name: min(shape) for name, shape in shapes.items() if min(shape) < rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": scaling * rank,
        "target_modules": sorted(shapes),
        "rank_pattern": {f"^{name}": r for name, r in sorted(narrow.items())},
        "alpha_pattern": {f"^{name}": scaling * r for name, r in sorted(narrow.items())},
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "inference_mode": True,
    }


def from_peft(config: Mapping[str, Any], tensors: Mapping[str, Matrix]) -> Adapter:
    """Fold a PEFT adapter (its config and its saved tensors) into factors.

    Honours `lora_alpha`, `rank_pattern` (through the shapes), `alpha_pattern` and `use_rslora`.

    Raises:
        AdapterError: a tensor is not the A or B of a linear layer, or its other half is missing.
    """
    adapter = {}
    for name in sorted({_module_of(tensor) for tensor in tensors}):
        for suffix in (SUFFIX_A, SUFFIX_B):
            if PREFIX + name + suffix not in tensors:
                raise AdapterError(f"tensor {PREFIX + name + suffix} is missing")
        a = np.asarray(tensors[PREFIX + name + SUFFIX_A], dtype=np.float32)
        b = np.asarray(tensors[PREFIX + name + SUFFIX_B], dtype=np.float32)
        s = peft_module_scaling(config, name, a.shape[0])
        adapter[name] = LoraFactors(b * np.float32(s), a)
    return adapter


def sha256_file(path: Path) -> str:
    """SHA-256 of a file in hex, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
