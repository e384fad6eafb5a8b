"""The files of a version for all ranks that devices ask for, made in one pass over the stored factors.

The file of rank r holds the first r of the components that are served, and no value of it depends on what
follows: every module is read, split and rounded once, at the largest rank, and cut for each file. What a
file holds follows from the stored version alone, so that it is the same whoever asks, and however often it is
made.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from coordinator.rules.named import served
from edge_sdk.core.adapter_file.codec import header_bytes, open_own, packed_module
from edge_sdk.core.adapter_file.dtypes import WIRE_DTYPES, WireDtype
from edge_sdk.core.choice.carried import splits
from edge_sdk.core.lora import LoraFactors
from edge_sdk.core.messages import Federation

Place = Callable[[str], contextlib.AbstractContextManager[BinaryIO]]


@dataclass(frozen=True, order=True)
class Rung:
    """One file of a version: how many components, and in which dtype."""

    rank: int
    dtype: WireDtype = "float32"


def rungs(federation: Federation, live_rank: int) -> tuple[Rung, ...]:
    """What devices of this federation will start a version of this live rank from.

    Where they hold the global adapter frozen they ask for all that it may have, or for the shares of that
    which are worth it, and are granted what there is.
    """
    ranks = set(federation.ladder)
    if federation.carries:
        asked = {split.carry_rank for split in splits(federation.ladder, federation.rank_cap)}
        ranks = {min(rank, live_rank) for rank in asked} - {0}
    return tuple(Rung(rank, federation.download_dtype) for rank in sorted(ranks))


def file_name(federation: Federation, version: int, rung: Rung) -> str:
    """What the file is called in the cache."""
    end = "" if rung.dtype == "float32" else f"-{rung.dtype}"
    return f"{federation.id}-{version}-{rung.rank}{end}.safetensors"


def version_of(file_name: str) -> int | None:
    """Of which version a file in the cache is; None for a file that is none of these."""
    found = re.search(rf"-(\d+)-\d+(-({'|'.join(WIRE_DTYPES)}))?\.safetensors$", file_name)
    return int(found[1]) if found else None


def write_rungs(
    federation: Federation, version: int, current: Path | None, wanted: Sequence[Rung], place: Place
) -> None:
    """Make these files of `version`, whose stored factors are in `current` (None for version 0).

    `place` opens each by its name, like `Blobs.caching`.

    Raises:
        AdapterError: a module does not fit a dtype; no file is left.
    """
    shapes, scaling = federation.base.modules, federation.scaling
    with contextlib.ExitStack() as stack:
        files = {}
        for rung in wanted:
            file = stack.enter_context(place(file_name(federation, version, rung)))
            ranks = {name: min(rung.rank, *shape) for name, shape in shapes.items()}
            file.write(header_bytes(shapes, ranks, rung.dtype))
            files[rung] = file
        dtypes = {rung.dtype for rung in wanted}
        # At one rank whichever files are wanted: a product of other shapes may differ in its last bits.
        highest, top = max(rung.rank for rung in wanted), federation.ladder[-1]
        for name, factors in _served(federation, version, current, top if highest <= top else highest):
            packed = {dtype: packed_module(name, factors, scaling, dtype) for dtype in dtypes}
            for rung, file in files.items():
                for tensor in packed[rung.dtype].leading(rung.rank).tensors.values():
                    file.write(np.ascontiguousarray(tensor).data)


def _served(
    federation: Federation, version: int, current: Path | None, rank: int
) -> Iterator[tuple[str, LoraFactors]]:
    """What devices of the largest rank are given, in name order, one module in memory at a time."""
    shapes = federation.base.modules
    empty = ((name, LoraFactors.empty(*shapes[name])) for name in sorted(shapes))
    for name, factors in open_own(current, federation.scaling).modules() if current else empty:
        yield name, served(federation, version, name, factors, min(rank, *shapes[name]))
