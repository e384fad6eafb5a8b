"""What devices send under load: adapters of the paper's four types, on a small model, no two alike.

The types are those of FlexLoRA (arXiv:2402.11505): rank 8; rank 30; 30 in attention and 200 in the
feed-forward part; rank 200; in equal numbers. The ranks are the paper's own. The model is scaled down to a
sixteenth of LLaMA-7B's width and two layers, the narrowest that holds rank 200 in every module.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.aggregation.cases import Model, update
from edge_sdk.core.adapter_file.codec import encode_chunks
from edge_sdk.core.adapter_file.dtypes import WireDtype
from edge_sdk.core.choice.setting import Ranks
from edge_sdk.core.messages import Base, Update
from edge_sdk.core.records import to_json

PAPER_DEVICES = 1613
FINGERPRINT = "ab" * 32
SCALING = 2.0
MODEL = Model("a sixteenth of LLaMA-7B's width, 2 layers", 256, 688, 2)
TYPES = (Ranks(8, 8), Ranks(30, 30), Ranks(30, 200), Ranks(200, 200))

AT_ONCE = {"joins_minute": 1_000_000, "joins_minute_of_address": 1_000_000}  # all devices of a measurement


@dataclass(frozen=True)
class Template:
    """An adapter but for its last value, which makes each device's file another one."""

    rank: int
    body: bytes  # without the last 4 bytes
    last: int  # the bits of the last float32
    _hashed: Any  # SHA-256 of `body`, to be copied

    @property
    def size_bytes(self) -> int:
        """Of a whole file."""
        return len(self.body) + 4

    def tail(self, number: int) -> bytes:
        """The last bytes of the file number so and so: the float32 that lies so many steps further."""
        return (self.last + number).to_bytes(4, "little")

    def record(self, number: int) -> dict[str, Any]:
        """The Update record of that file."""
        digest = self._hashed.copy()
        digest.update(self.tail(number))
        made = Update(digest.hexdigest(), self.size_bytes, self.rank, 10, 20, 2.5, 1.5, 3.0)
        return to_json(made)


def templates(dtype: WireDtype, model: Model = MODEL, types: Sequence[Ranks] = TYPES) -> tuple[Template, ...]:
    """One for each type."""
    shapes = model.shapes()
    made = []
    for place, kind in enumerate(types):
        rng = np.random.default_rng(place)
        ranks = {name: min(kind.of(name), *shape) for name, shape in shapes.items()}
        modules = ((name, update(shapes[name], ranks[name], rng)) for name in sorted(shapes))
        content = b"".join(encode_chunks(shapes, ranks, SCALING, modules, dtype))
        body = content[:-4]
        last = int.from_bytes(content[-4:], "little")
        made.append(Template(kind.largest, body, last, hashlib.sha256(body)))
    return tuple(made)


def configuration(
    folder: Path,
    dtype: WireDtype,
    policy: dict[str, Any],
    model: Model = MODEL,
    types: Sequence[Ranks] = TYPES,
    limits: Mapping[str, Any] = AT_ONCE,
) -> Path:
    """Write the coordinator's configuration and base record into `folder`."""
    base = Base(model.name, FINGERPRINT, model.shapes())
    (folder / "base.json").write_text(json.dumps(to_json(base)))
    ladder = sorted({kind.largest for kind in types})
    lines = [
        'base = "base.json"',
        "[federation]",
        f"ladder = {ladder}",
        f"rank_cap = {ladder[-1]}",
        f"mixed_ranks = {[[k.attention, k.mlp] for k in types if k.attention != k.mlp]}",
        f"scaling = {SCALING}",
        f'upload_dtype = "{dtype}"',
        f'download_dtype = "{dtype}"',
        "[admission]",
        "reach_factor = 1e9",  # random adapters are no training
        "[policy]",
        *(f"{key} = {json.dumps(value)}" for key, value in policy.items()),
        "[limits]",
        *(f"{key} = {json.dumps(value)}" for key, value in limits.items()),
    ]
    path = folder / "load.toml"
    path.write_text("\n".join(lines) + "\n")
    return path
