"""What the dtypes of the wire cost in bytes and in learning; and what error feedback is worth.

    python -m benchmarks.wire_dtypes --quick             # a few minutes
    python -m benchmarks.wire_dtypes --log FILE          # over an hour; goes on where it was stopped

Every row is a federation on the embedded base (benchmarks/carry/training.py): the same seeds, data and
order, and every download and every upload goes through the bytes of a file. The last column is what a device
has at the end: the final version as it is downloaded in that dtype.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.carry import training
from benchmarks.carry.trade import WIDE
from benchmarks.carry.training import HOUSEHOLDS, Choice
from benchmarks.common import command
from benchmarks.common.federation import RANK_CAP, SCALING, Turn
from benchmarks.common.results import LOG_HELP, Results, opened, spread
from benchmarks.wire.error_feedback import corrected, next_residual
from edge_sdk.core.adapter_file import codec
from edge_sdk.core.adapter_file.dtypes import WireDtype
from edge_sdk.core.lora import Adapter, max_rank
from edge_sdk.machine.processor import cpu_name
from edge_sdk.training.plan import Start

RESIDUAL_RANKS = 4  # rank of the residual, as a multiple of the upload's


@dataclass(frozen=True)
class Wire:
    """How files travel. `feedback`: uploads are corrected by what the one before lost."""

    name: str
    download: WireDtype
    upload: WireDtype
    feedback: bool = False


WIRES = (
    Wire("float32", "float32", "float32"),
    Wire("float16", "float16", "float16"),
    Wire("int8", "int8", "int8"),
    Wire("int8, error feedback", "int8", "int8", feedback=True),
)
RULES = {
    "carry": Choice("carry", 4, RANK_CAP, "int8", wide=WIDE),
    "flexlora": Choice("flexlora", 4),
}


@dataclass
class Measured:
    """Held-out losses after some versions; the last one's as downloaded; mean bytes of a file each way."""

    losses: dict[str, float]
    downloaded_loss: float
    download_bytes: float
    upload_bytes: float


class Files(training.Road):
    """Every download and every upload goes through the bytes of a file.

    Args:
        wire: how files travel.
        folder: where the file lies while it does.
    """

    def __init__(self, wire: Wire, folder: Path) -> None:
        self._wire, self._file = wire, folder / "adapter.safetensors"
        self._residuals: dict[int, Adapter] = {}
        self.down_bytes: list[int] = []
        self.up_bytes: list[int] = []

    def down(self, start: Start, turn: Turn) -> Start:
        """What a device begins with, where the coordinator's file has the wire's dtype."""
        if not turn.begin:  # version 0 has no file
            return start
        sent = start.adapter if start.carried is None else start.carried
        assert sent is not None
        received, size = self.over(sent, self._wire.download)
        self.down_bytes.append(size)
        if start.carried is None:
            return dataclasses.replace(start, adapter=received)
        return dataclasses.replace(start, carried=received)

    def up(self, adapter: Adapter, turn: Turn) -> Adapter:
        """What the coordinator receives of a trained adapter."""
        feedback, before = self._wire.feedback, self._residuals.get(turn.device, {})
        sent = {n: corrected(f, before.get(n)) for n, f in adapter.items()} if feedback else adapter
        received, size = self.over(sent, self._wire.upload)
        self.up_bytes.append(size)
        if feedback:
            cap = RESIDUAL_RANKS * max_rank(adapter)
            self._residuals[turn.device] = {
                n: next_residual(f, before.get(n), received[n], cap) for n, f in adapter.items()
            }
        return received

    def over(self, adapter: Adapter, dtype: WireDtype) -> tuple[Adapter, int]:
        """An adapter as the other side reads it; bytes of the file."""
        self._file.write_bytes(codec.encode(adapter, SCALING, dtype))
        return dict(codec.open_own(self._file, SCALING).modules()), self._file.stat().st_size


def federate(
    federation: training.Federation, folder: Path, choice: Choice, wire: Wire, seed: int, last: int
) -> Measured:
    """Train until version `last`, and measure after each third of that."""
    homes, road, losses = federation.homes(seed), Files(wire, folder), {}
    newest = federation.base.empty()
    choices = [choice] * HOUSEHOLDS
    for number, newest in federation.versions(choices, homes, seed, last, [], road):
        if number % (last // 3) == 0:
            losses[str(number)] = federation.base.loss(newest, homes.test)
    downloaded, _ = road.over(newest, wire.download)
    final = federation.base.loss(downloaded, homes.test)
    return Measured(losses, final, statistics.mean(road.down_bytes), statistics.mean(road.up_bytes))


def measure(results: Results, rows: Sequence[tuple[str, Wire]], seeds: Sequence[int], versions: int) -> Table:
    """One row a rule and wire."""
    marks = [str(versions * part // 3) for part in (1, 2, 3)]
    table = Table(title="Embedded base, smart-home commands: held-out loss", title_justify="left")
    columns = (
        "rule",
        "wire",
        "seeds",
        "KiB down",
        "KiB up",
        *(f"version {m}" for m in marks),
        "as downloaded",
    )
    for column in columns:
        table.add_column(column, justify="left" if column in ("rule", "wire") else "right")
    found: dict[tuple[str, Wire], list[dict[str, Any]]] = {row: [] for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        loaded = cache(training.Federation)  # not at all where every row is known

        def run(rule: str, wire: Wire, seed: int) -> Any:
            return vars(federate(loaded(), Path(folder), RULES[rule], wire, seed, versions))

        for seed in seeds:  # seeds outside, so that a run that is stopped leaves whole comparisons
            for (rule, wire), measured in found.items():
                case = {"versions": versions, "rule": rule, "wire": wire.name, "seed": seed}
                measured.append(results.get(case, partial(run, rule, wire, seed)))
    for (rule, wire), measured in found.items():
        sizes = (statistics.mean(row[key] for row in measured) for key in ("download_bytes", "upload_bytes"))
        cells = [spread([row["losses"][mark] for row in measured]) for mark in marks]
        cells.append(spread([row["downloaded_loss"] for row in measured]))
        table.add_row(rule, wire.name, str(len(measured)), *(f"{size / 1024:.0f}" for size in sizes), *cells)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the log lacks, and print the table."""
    parser = command.parser("wire_dtypes", __doc__)
    parser.add_argument("--quick", action="store_true", help="one seed and few versions; noise, not a result")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rule", choices=RULES, action="append", help="only these rules")
    parser.add_argument("--wire", choices=[w.name for w in WIRES], action="append", help="only these wires")
    parser.add_argument("--log", "--json", type=Path, help=LOG_HELP)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    console = command.console(150)
    results = opened(parser, options.log, "wire_dtypes", training.SETTINGS)
    rules = options.rule or (["carry"] if options.quick else list(RULES))
    wires = [wire for wire in WIRES if wire.name in (options.wire or [w.name for w in WIRES])]
    seeds, versions = range(1 if options.quick else options.seeds), 3 if options.quick else 12
    console.print(f"{cpu_name()}, one thread")
    console.print(measure(results, [(r, w) for r in rules for w in wires], seeds, versions))
    return 0


if __name__ == "__main__":
    sys.exit(main())
