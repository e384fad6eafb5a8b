"""How fast records become JSON and come back, by msgspec and by the decoder written by hand that it replaced.

    python -m benchmarks.records                         # half a minute
    python -m benchmarks.records --quick                 # seconds
    python -m benchmarks.records --json FILE

From a record to bytes and from bytes to a record, as a body or a row of the store holds them. Microseconds of
one, the least of several runs, the two ways by turns.
"""

from __future__ import annotations

import json
import sys
import timeit
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.progress import track
from rich.table import Table

from benchmarks.common import command
from benchmarks.records import naive
from edge_sdk.core.messages import (
    Ask,
    Assignment,
    Base,
    DeviceStatus,
    Federation,
    Heartbeat,
    HeartbeatReply,
    JoinReply,
    Status,
    Update,
    UpdateReply,
)
from edge_sdk.core.records import decode, encode
from edge_sdk.machine.processor import cpu_name

BLOCKS = 32  # of the base that all devices share: LLaMA-7B with seven targets a block
DEVICES = 1000  # in a status
VERSIONS = 20

TARGETS = [f"self_attn.{name}_proj" for name in "qkvo"] + [
    f"mlp.{name}_proj" for name in ("gate", "up", "down")
]
BASE = Base(
    "meta-llama/Llama-2-7b-hf",
    "0123456789abcdef" * 4,
    {f"model.layers.{i}.{target}": (4096, 11008) for i in range(BLOCKS) for target in TARGETS},
)
FEDERATION = Federation("f" * 16, BASE, "carry", (2, 4, 8, 16), 32, 2.0, "balanced")
STATUS = Status(
    "f" * 16,
    100,
    buffered=3,
    buffer_size=4,
    aggregating=False,
    version_ranks={str(version): 32 for version in range(100 - VERSIONS, 100)},
    discarded_shares={str(version): 0.0123456789 for version in range(100 - VERSIONS, 100)},
    devices=tuple(
        DeviceStatus(f"d{i:08}", f"device {i}", 8, i, 0.75, "training", 7, 20, 1.2345678)
        for i in range(DEVICES)
    ),
)
RECORDS: dict[str, Any] = {
    "Ask": Ask(8, 16),
    "Assignment": Assignment("a" * 16, 100, 8, 16, 20, 1234567, 600.0, "01ab" * 4),
    "Heartbeat": Heartbeat(7),
    "HeartbeatReply": HeartbeatReply("continue"),
    "Update": Update("ab" * 32, 16_777_216, 8, 160, 20, 2.3456789, 1.2345678, 30.25),
    "UpdateReply": UpdateReply("a" * 16, 101),
    f"JoinReply, {len(BASE.modules)} modules": JoinReply("d" * 16, "s" * 43, FEDERATION),
    f"Status, {DEVICES:,} devices": STATUS,
}


def least_us(ways: dict[str, Callable[[], Any]], least_s: float, runs: int) -> dict[str, float]:
    """Microseconds of one call of each way: the least mean of several runs of `least_s` or more."""
    counts = {}
    for way, work in ways.items():
        count, took_s = timeit.Timer(work).autorange()
        counts[way] = max(1, round(count * least_s / took_s))
    found = dict.fromkeys(ways, float("inf"))
    for _ in range(runs):
        for way, work in ways.items():
            found[way] = min(found[way], timeit.timeit(work, number=counts[way]) / counts[way] * 1e6)
    return found


def measure(name: str, record: Any, least_s: float, runs: int) -> dict[str, Any]:
    """One row: both ways, both directions. Raises AssertionError where the two do not agree."""
    kind, raw = type(record), encode(record)
    assert decode(kind, raw) == naive.from_json(kind, json.loads(raw)) == record
    read = least_us(
        {
            "decode_us": lambda: decode(kind, raw),
            "naive_decode_us": lambda: naive.from_json(kind, json.loads(raw)),
        },
        least_s,
        runs,
    )
    written = least_us(
        {
            "encode_us": lambda: encode(record),
            "naive_encode_us": lambda: json.dumps(naive.to_json(record)).encode(),
        },
        least_s,
        runs,
    )
    return {"record": name, "bytes": len(raw), **read, **written}


def table_of(rows: list[dict[str, Any]], title: str) -> Table:
    """The rows, with how many times faster each is."""
    table = Table(title=title, title_justify="left")
    for column in ("record", "bytes", "decode µs", "by hand", "times", "encode µs", "by hand", "times"):
        table.add_column(column, justify="left" if column == "record" else "right")
    for row in rows:
        cells = [row["record"], f"{row['bytes']:,}"]
        for way in ("decode", "encode"):
            ours, naive_us = row[f"{way}_us"], row[f"naive_{way}_us"]
            cells += [f"{ours:,.2f}", f"{naive_us:,.2f}", f"{naive_us / ours:.1f}"]
        table.add_row(*cells)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write JSON if asked."""
    parser = command.parser("records", __doc__)
    parser.add_argument("--quick", action="store_true", help="short runs; noise, not a result")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    console = command.console(110)
    least_s, runs = (0.02, 2) if options.quick else (0.1, 5)
    rows = [
        measure(name, record, least_s, runs)
        for name, record in track(RECORDS.items(), "measuring", console=console, transient=True)
    ]
    console.print(table_of(rows, cpu_name()))
    command.write_json(options.json, {"machine": {"cpu": cpu_name()}, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
