"""What the dtypes of the wire cost in bytes and in learning; and what error feedback is worth.

    python -m benchmarks.wire_dtypes --quick             # a few minutes
    python -m benchmarks.wire_dtypes --json FILE         # over an hour; goes on where it was stopped

Every row is a federation on the embedded base (benchmarks/carry/training.py): the same seeds, data and
order, and every download and every upload goes through the bytes of a file. The last column is what a device
has at the end: the final version as it is downloaded in that dtype.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from benchmarks.carry import training as carry_training
from benchmarks.carry.trade import WIDE
from benchmarks.carry.training import BUFFER_SIZE, HOUSEHOLDS, SCALING, TEST_PER_INTENT, Choice, Part
from benchmarks.common import command
from benchmarks.common.results import Results, spread
from benchmarks.wire.error_feedback import corrected, next_residual
from edge_sdk.core.adapter_file import codec
from edge_sdk.core.adapter_file.dtypes import WireDtype
from edge_sdk.core.lora import Adapter, LoraFactors, max_rank
from edge_sdk.machine.processor import cpu_name
from edge_sdk.training.plan import Start
from examples import smart_home

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
    "carry": Choice("carry", 4, carry_training.RANK_CAP, "int8", wide=WIDE),
    "flexlora": Choice("flexlora", 4),
}


@dataclass
class Measured:
    """Held-out losses after some versions; the last one's as downloaded; mean bytes of a file each way."""

    losses: dict[str, float]
    downloaded_loss: float
    download_bytes: float
    upload_bytes: float


class WireFederation(carry_training.Federation):
    """A federation whose files take the way over the wire."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._file = folder / "adapter.safetensors"

    def federate(self, choice: Choice, wire: Wire, seed: int, versions: int) -> Measured:
        """Train `versions` versions, and measure after each third of them."""
        homes = smart_home.households(HOUSEHOLDS, seed)
        data = [self._rows(home.train) for home in homes]
        held_out = self._rows(smart_home.test_set(smart_home.INTENTS, TEST_PER_INTENT, seed))
        history: list[Adapter | None] = [None]
        residuals: dict[int, Adapter] = {}
        losses, down, up = {}, [], []
        for version in range(versions):
            drawn = np.random.default_rng([seed, version])
            updates: list[Part] = []
            for place, home in enumerate(int(h) for h in drawn.permutation(HOUSEHOLDS)[:BUFFER_SIZE]):
                begin = max(0, version - place % 2)
                start = self._start(choice, history[begin], seed * 10_000 + version * 10 + home)
                if begin:
                    start, size = self._downloaded(start, wire.download)
                    down.append(size)
                adapter, _ = self._train(choice, start, data[home], begin)
                adapter, size = self._uploaded(adapter, wire, home, residuals)
                up.append(size)
                updates.append((begin, choice, start, adapter))
            history.append(self._merged(history, updates))
            if (version + 1) % (versions // 3) == 0:
                losses[str(version + 1)] = self._trainer.evaluate(history[-1], held_out).loss
        newest = history[-1]
        assert newest is not None
        downloaded, _ = self._over(newest, wire.download)
        final = self._trainer.evaluate(downloaded, held_out).loss
        return Measured(losses, final, statistics.mean(down), statistics.mean(up))

    def _downloaded(self, start: Start, dtype: WireDtype) -> tuple[Start, int]:
        """What a device begins with, where the coordinator's file has this dtype; bytes of the file."""
        if start.carried is not None:
            carried, size = self._over(start.carried, dtype)
            return dataclasses.replace(start, carried=carried), size
        assert start.adapter is not None
        adapter, size = self._over(start.adapter, dtype)
        return dataclasses.replace(start, adapter=adapter), size

    def _uploaded(
        self, trained: Adapter, wire: Wire, home: int, residuals: dict[int, Adapter]
    ) -> tuple[Adapter, int]:
        """What the coordinator receives of a trained adapter; bytes of the file."""
        before = residuals.get(home, {})
        sent = {n: corrected(f, before.get(n)) for n, f in trained.items()} if wire.feedback else trained
        received, size = self._over(sent, wire.upload)
        if wire.feedback:
            cap = RESIDUAL_RANKS * max_rank(trained)
            residuals[home] = {
                n: next_residual(f, before.get(n), received[n], cap) for n, f in trained.items()
            }
        return received, size

    def _over(self, adapter: Adapter, dtype: WireDtype) -> tuple[dict[str, LoraFactors], int]:
        """An adapter as the other side reads it; bytes of the file."""
        self._file.write_bytes(codec.encode(adapter, SCALING, dtype))
        return dict(codec.open_own(self._file, SCALING).modules()), self._file.stat().st_size


def training(
    results: Results, rows: Sequence[tuple[str, Wire]], seeds: Sequence[int], versions: int
) -> Table:
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
        loaded: list[WireFederation] = []

        def run(rule: str, wire: Wire, seed: int) -> Any:
            loaded.extend([] if loaded else [WireFederation(Path(folder))])
            return dataclasses.asdict(loaded[0].federate(RULES[rule], wire, seed, versions))

        for seed in seeds:  # seeds outside, so that a run that is stopped leaves whole comparisons
            for (rule, wire), measured in found.items():
                key = f"training/{versions}/{rule}/{wire.name}/{seed}"
                measured.append(results.get(key, lambda r=rule, w=wire, s=seed: run(r, w, s)))
    for (rule, wire), measured in found.items():
        sizes = (statistics.mean(row[key] for row in measured) for key in ("download_bytes", "upload_bytes"))
        cells = [spread([row["losses"][mark] for row in measured]) for mark in marks]
        cells.append(spread([row["downloaded_loss"] for row in measured]))
        table.add_row(rule, wire.name, str(len(measured)), *(f"{size / 1024:.0f}" for size in sizes), *cells)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write JSON if asked."""
    parser = command.parser("wire_dtypes", __doc__)
    parser.add_argument("--quick", action="store_true", help="one seed and few versions; noise, not a result")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rule", choices=RULES, action="append", help="only these rules")
    parser.add_argument("--wire", choices=[w.name for w in WIRES], action="append", help="only these wires")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    console = command.console(150)
    results = Results(options.json, {"cpu": cpu_name(), "threads": os.environ.get("OMP_NUM_THREADS", "all")})
    rules = options.rule or (["carry"] if options.quick else list(RULES))
    wires = [wire for wire in WIRES if wire.name in (options.wire or [w.name for w in WIRES])]
    seeds, versions = range(1 if options.quick else options.seeds), 3 if options.quick else 12
    console.print(f"{cpu_name()}, one thread")
    console.print(training(results, [(r, w) for r in rules for w in wires], seeds, versions))
    return 0


if __name__ == "__main__":
    sys.exit(main())
