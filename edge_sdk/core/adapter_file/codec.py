"""Adapters as bytes, with folded factors inside: PEFT's own safetensors layout, or int8 in a layout of ours.

In float32 and float16 the file is what `PeftModel.from_pretrained` reads: for module `m` of shape (out, in)
the tensors `base_model.model.{m}.lora_A.weight` (r, in) and `….lora_B.weight` (out, r), beside an
`adapter_config.json` with `lora_alpha = s·r`. B is divided by s on the way out and multiplied on the way in.

In int8 it is no PEFT file. Its tensors are `….lora_A.int8` (r, in) and `….lora_B.int8` (r, out), one row a
component, and the scales of their blocks, `….lora_A.scales` and `….lora_B.scales`; see `dtypes`.

A stranger's file is checked before a tensor of it is touched (`header`). Only then are its
tensors read, one module at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from edge_sdk.core.adapter_file.dtypes import WEIGHT_A, WEIGHT_B, Packed, WireDtype, pack, unpack
from edge_sdk.core.adapter_file.header import (
    PREFIX,
    Contents,
    Shapes,
    check_header,
    check_whole,
    header_bytes,
    max_adapter_bytes,
    module_of,
    own_contents,
    read_header,
)
from edge_sdk.core.errors import AdapterError
from edge_sdk.core.lora import Adapter, LoraFactors, Matrix, peft_module_scaling

__all__ = [
    "PREFIX",
    "WEIGHT_A",
    "WEIGHT_B",
    "AdapterFile",
    "Shapes",
    "encode",
    "encode_chunks",
    "from_peft",
    "header_bytes",
    "max_adapter_bytes",
    "module_bytes",
    "open_adapter",
    "open_own",
    "packed_module",
    "peft_config",
    "require_length",
    "require_whole",
    "sha256_file",
]


DTYPES = {"F32": "<f4", "F16": "<f2", "I8": "i1"}  # in safetensors' words


@dataclass(frozen=True)
class AdapterFile:
    """A checked adapter file on disk, of any dtype. Factors are read one module at a time."""

    path: Path
    contents: Contents
    scaling: float
    data_begin: int  # the first byte behind the header

    @property
    def ranks(self) -> Mapping[str, int]:
        """Module -> rank."""
        return self.contents.ranks

    def module(self, name: str) -> LoraFactors:
        """The factors of one module, float32, scaling folded in.

        Raises:
            AdapterError: a value is not finite.
        """
        with self.path.open("rb", buffering=0) as file:
            return self._read(file, name)

    def modules(self) -> Iterator[tuple[str, LoraFactors]]:
        """All modules in name order, one in memory at a time."""
        with self.path.open("rb", buffering=0) as file:
            for name in sorted(self.ranks):
                yield name, self._read(file, name)

    def _read(self, file: FileIO, name: str) -> LoraFactors:
        try:
            return unpack(self._tensors(file, name), self.scaling, owned=True)
        except AdapterError as error:
            raise AdapterError(f"module {name} {error}") from error

    def _tensors(self, file: FileIO, name: str) -> dict[str, npt.NDArray[np.generic]]:
        """The tensors of a module by the ends of their names, in memory of their own, at one read each.

        Writers put those of a module side by side; then one read has them all, because every read hands the
        interpreter to another thread and back.
        """
        entries = {end: self.contents.header[PREFIX + name + end] for end in self.contents.ends}
        begins, stops = zip(*(entry["data_offsets"] for entry in entries.values()), strict=True)
        first, size = min(begins), sum(stops) - sum(begins)
        if max(stops) - first != size:
            return {end: _tensor(self._bytes(file, *e["data_offsets"]), 0, e) for end, e in entries.items()}
        block = self._bytes(file, first, first + size)
        return {end: _tensor(block, e["data_offsets"][0] - first, e) for end, e in entries.items()}

    def _bytes(self, file: FileIO, begin: int, end: int) -> npt.NDArray[np.uint8]:
        """So many bytes of the data; other threads may compute meanwhile."""
        block = np.empty(end - begin, np.uint8)
        file.seek(self.data_begin + begin)
        rest = block.data
        while rest:
            count = file.readinto(rest)
            if not count:
                raise AdapterError("is cut short")
            rest = rest[count:]
        return block


def _tensor(block: npt.NDArray[np.uint8], offset: int, entry: Mapping[str, Any]) -> npt.NDArray[np.generic]:
    """The tensor of a header's entry that begins at `offset` of a block: a view, and perhaps not aligned."""
    return np.ndarray(entry["shape"], DTYPES[entry["dtype"]], block.data, offset)


def encode(adapter: Adapter, scaling: float, dtype: WireDtype = "float32") -> bytes:
    """An adapter as safetensors bytes, the same bytes for the same values.

    Raises:
        AdapterError: what `packed_module` raises.
    """
    shapes = {name: factors.shape for name, factors in adapter.items()}
    ranks = {name: factors.rank for name, factors in adapter.items()}
    return b"".join(encode_chunks(shapes, ranks, scaling, sorted(adapter.items()), dtype))


def encode_chunks(
    shapes: Shapes,
    ranks: Mapping[str, int],
    scaling: float,
    modules: Iterable[tuple[str, LoraFactors]],
    dtype: WireDtype = "float32",
) -> Iterator[bytes]:
    """The bytes of `encode` piece by piece, so that an adapter larger than memory can be written.

    `modules` must come in name order with the shapes and ranks announced.
    """
    yield header_bytes(shapes, ranks, dtype)
    for expected, (name, factors) in zip(sorted(shapes), modules, strict=True):
        if name != expected or factors.shape != tuple(shapes[name]) or factors.rank != ranks[name]:
            raise AdapterError(f"module {name} is not the {expected} that the header announced")
        yield from module_bytes(packed_module(name, factors, scaling, dtype))


def packed_module(name: str, factors: LoraFactors, scaling: float, dtype: WireDtype) -> Packed:
    """One module in a dtype of the wire.

    Raises:
        AdapterError: a lossy dtype cannot hold its values; names the module.
    """
    try:
        return pack(factors, scaling, dtype)
    except AdapterError as error:
        raise AdapterError(f"module {name} {error}") from error


def module_bytes(packed: Packed) -> Iterator[bytes]:
    """The data of one module as it follows that of the module before."""
    for tensor in packed.tensors.values():
        yield np.ascontiguousarray(tensor).tobytes()


def open_adapter(path: Path, shapes: Shapes, rank: int, scaling: float, max_bytes: int) -> AdapterFile:
    """Check a file from a device and return a reader of it.

    Args:
        path: the uploaded file, of any dtype of the wire.
        shapes: the federation's target modules; the file must hold exactly these.
        rank: the most that a module may have. Modules may have fewer, as narrow ones must and as a device
            does that trains attention and feed-forward layers at unequal ranks; none has less than 1.
        scaling: the federation's s.
        max_bytes: cap on the file.

    Raises:
        TooLarge: the file or its header is over its cap.
        AdapterError: not a safetensors file, or wrong modules, shapes or dtypes.
    """
    header, data_bytes = read_header(path, max_bytes)
    contents = check_header(header, data_bytes, shapes, rank)
    try:
        with safe_open(path, framework="numpy"):  # what the reader itself minds, such as metadata
            pass
    except SafetensorError as error:
        raise AdapterError(f"not a safetensors file: {str(error)[:120]}") from error
    return AdapterFile(path, contents, scaling, path.stat().st_size - data_bytes)


def open_own(path: Path, scaling: float) -> AdapterFile:
    """A reader of a file that this side wrote itself; ranks come from its header."""
    size = path.stat().st_size
    header, data_bytes = read_header(path, max_bytes=size)
    return AdapterFile(path, own_contents(header), scaling, size - data_bytes)


def require_length(path: Path) -> None:
    """Check that a file has the bytes that its header speaks of, and no others; reads the header alone.

    Raises:
        AdapterError, TooLarge: it has not.
    """
    check_whole(*read_header(path, max_bytes=path.stat().st_size))


def require_whole(path: Path) -> None:
    """Read a file from end to end that came over the wire, from somebody who is trusted to send an adapter.

    Raises:
        AdapterError, TooLarge: it came cut short or damaged, as far as that shows: a header that does not
            fit the file, or values that are not finite.
    """
    require_length(path)
    try:
        for _ in open_own(path, scaling=1.0).modules():
            pass
    except (SafetensorError, ValueError) as error:
        raise AdapterError(f"not an adapter file: {str(error)[:120]}") from error


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
    for name in sorted({module_of(tensor) for tensor in tensors}):
        for suffix in (WEIGHT_A, WEIGHT_B):
            if PREFIX + name + suffix not in tensors:
                raise AdapterError(f"tensor {PREFIX + name + suffix} is missing")
        a = np.asarray(tensors[PREFIX + name + WEIGHT_A], dtype=np.float32)
        b = np.asarray(tensors[PREFIX + name + WEIGHT_B], dtype=np.float32)
        s = peft_module_scaling(config, name, a.shape[0])
        adapter[name] = LoraFactors(b * np.float32(s), a)
    return adapter


def sha256_file(path: Path) -> str:
    """SHA-256 of a file in hex, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
