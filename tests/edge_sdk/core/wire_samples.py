"""The values behind the golden bytes; `python -m tests.edge_sdk.core.wire_samples` writes them.

The bytes in tests/golden/ are the format. They change with the protocol version, or where a record is given a
field that older ones may lack; such records are read in `test_golden.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from edge_sdk.core import messages
from edge_sdk.core.adapter_file.codec import encode, peft_config
from edge_sdk.core.adapter_file.dtypes import WireDtype
from edge_sdk.core.lora import LoraFactors
from edge_sdk.core.records import to_json

GOLDEN = Path(__file__).resolve().parents[2] / "golden"

SCALING = 2.0
RANK = 3
# Wider than its rank, narrower than its rank, and wider than long.
SHAPES = {
    "model.layers.0.mlp.up_proj": (4, 6),
    "model.layers.0.self_attn.k_proj": (2, 5),
    "model.layers.10.mlp.up_proj": (6, 3),
}


def adapter() -> dict[str, LoraFactors]:
    """Factors with values that float32 holds exactly: 0, 1/8, 2/8, … and their negatives."""
    made = {}
    for start, (name, (out, inp)) in enumerate(SHAPES.items()):
        r = min(RANK, out, inp)
        b = (np.arange(start, start + out * r, dtype=np.float32).reshape(out, r) / 8) - 1
        a = 1 - np.arange(start, start + r * inp, dtype=np.float32).reshape(r, inp) / 8
        made[name] = LoraFactors(b, a)
    return made


BASE = messages.Base("tiny", "0123456789abcdef" * 4, SHAPES)
FEDERATION = messages.Federation(
    id="f-1",
    base=BASE,
    rule="carry",
    ladder=(2, 4, 8),
    rank_cap=16,
    scaling=SCALING,
    split="balanced",
    holds_global=True,
)
RUN = "7-3fa9c2d1"
DEVICE = messages.DeviceStatus(
    id="d-1",
    name="attic",
    rank=4,
    updates=3,
    mean_staleness=0.5,
    state="training",
    steps_done=7,
    steps=20,
    seen_s_ago=1.25,
)
RECORDS: tuple[Any, ...] = (
    BASE,
    messages.Training(),
    FEDERATION,
    messages.JoinRequest("attic", BASE.fingerprint, {"memory": "8 GiB"}, attempt="attempt-1-of-attic"),
    messages.JoinReply("d-1", "secret", FEDERATION, RUN),
    messages.Ask(4, carry_rank=12, run=RUN),
    messages.Assignment(
        id="a-1",
        version=7,
        rank=4,
        carry_rank=16,
        steps=20,
        seed=99,
        expires_in_s=600.0,
        start="01ab" * 4,
        run=RUN,
        renew=True,
    ),
    messages.NotNow(5.0, "nothing to do"),
    messages.NewCredential("another-secret"),
    messages.Newest(8, 16, "23cd" * 4),
    messages.Heartbeat(7),
    messages.HeartbeatReply("finish"),
    messages.Update(
        digest="ab" * 32,
        size_bytes=1234,
        rank=4,
        examples=160,
        steps=20,
        loss_before=2.5,
        loss_after=1.25,
        train_s=30.5,
    ),
    messages.UpdateReply("u-1", 8),
    DEVICE,
    messages.Status(
        "f-1",
        8,
        1,
        4,
        False,
        {"7": 12, "8": 16},
        {"7": 0.0, "8": 0.125},
        (DEVICE,),
        2,
        1,
        0.75,
        epsilon=3.5,
        delta=1e-5,
        start="23cd" * 4,
        bad_requests=5,
        page=1,
        pages=3,
    ),
)


def as_json(value: Any) -> bytes:
    """The spelling of the golden JSON files: two spaces, fields in the record's order, a last newline."""
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def files() -> dict[str, bytes]:
    """Name to content of every golden file."""
    made = {f"{type(record).__name__}.json": as_json(to_json(record)) for record in RECORDS}
    made["adapter_model.safetensors"] = encode(adapter(), SCALING)
    lossy: tuple[WireDtype, ...] = ("float16", "int8")
    for dtype in lossy:
        made[f"adapter_{dtype}.safetensors"] = encode(adapter(), SCALING, dtype)
    made["adapter_config.json"] = as_json(peft_config("tiny", SHAPES, RANK, SCALING))
    return made


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, content in files().items():
        (GOLDEN / name).write_bytes(content)
        print(f"{GOLDEN.name}/{name}: {len(content)} bytes")
